"""Which names are taken for a policy's cameras, state and instruction."""

from __future__ import annotations

import pytest

from paligemma_vla.errors import ConfigError
from paligemma_vla.serving.build import WIRES
from paligemma_vla.serving.keys import build_key_maps

CAMERAS = {"image_1": "observation.images.front", "image_2": "wrist"}


def names(protocol: str, key: str, *given: str, cameras=CAMERAS, preset=None) -> list[str]:
    found = build_key_maps(WIRES, cameras, given, preset)[protocol].sources.get(key, ())
    return ["+".join(parts) for parts in found]


def test_camera_goes_by_its_own_name_then_by_the_protocols_then_by_ours():
    assert names("openpi", "image_1") == ["observation/front", "observation/image", "image_1"]
    assert names("vla-eval", "image_1") == ["images/front", "images/agentview", "image_1"]
    assert names("groot", "image_2") == ["video/wrist", "video/wrist_image", "image_2"]
    assert names("vla-eval", "state") == ["states", "state"]


def test_usual_name_is_not_taken_for_a_camera_if_it_is_another_cameras_own():
    swapped = {"image_1": "wrist", "image_2": "agentview"}
    assert names("vla-eval", "image_1", cameras=swapped) == ["images/wrist", "image_1"]
    assert names("vla-eval", "image_2", cameras=swapped) == ["images/agentview", "image_2"]


def test_given_names_are_the_only_ones_and_those_of_a_protocol_win():
    given = ("vla-eval:image_1=images/primary", "image_1=cam", "state=a+b", "groot:image_2=-")
    assert names("vla-eval", "image_1", *given) == ["images/primary"]
    assert names("groot", "image_1", *given) == ["cam"]
    assert names("openpi", "state", *given) == ["a+b"]
    assert names("groot", "image_2", *given) == []
    assert names("vla-eval", "image_2", *given) == ["images/wrist", "image_2"]


def test_preset_names_what_openpis_clients_send():
    assert names("openpi", "image_1", preset="droid") == ["observation/exterior_image_1_left"]
    assert names("vla-eval", "image_1", preset="droid") == names("vla-eval", "image_1")


def test_preset_says_which_of_its_cameras_the_policy_has_not(caplog):
    assert names("openpi", "image_1", cameras={"image_1": "table"}, preset="droid") == ["observation/exterior_image_1_left"]
    assert "the policy has no image_2; what clients send as observation/wrist_image_left is ignored" in caplog.text


@pytest.mark.parametrize(
    "given, said",
    [
        ("vla_eval:image_1=a", "got protocol 'vla_eval', expected one of openpi, vla-eval, groot"),
        ("image_9=a", "one of image_1, image_2, state, prompt, action"),
        ("image_1=", "expected [PROTOCOL:]NAME=THEIRS"),
        ("image_1=-", "only a camera after the first can be absent"),
    ],
)
def test_keys_that_do_not_fit_are_refused(given, said):
    with pytest.raises(ConfigError) as refused:
        build_key_maps(WIRES, CAMERAS, [given], None)
    assert said in str(refused.value)


def test_what_the_clients_of_a_preset_do_not_send_is_absent(caplog):
    """As in published weights, which have slots for three cameras."""
    three = {**CAMERAS, "image_3": ""}
    assert names("openpi", "image_3", cameras=three, preset="droid") == []
    assert "--preset droid: its clients send no image_3" in caplog.text
    assert names("openpi", "image_3", "image_3=top", cameras=three, preset="droid") == ["top"]
    assert names("vla-eval", "image_3", cameras=three, preset="droid") == names("vla-eval", "image_3", cameras=three) != []
