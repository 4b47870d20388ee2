"""openpi's wire, spoken by hand: what stock clients get is tested in `test_stock_clients.py`."""

from __future__ import annotations

import numpy as np
import pytest
from websockets.sync.client import connect

from observations import draw, local
from paligemma_vla.errors import ConfigError
from paligemma_vla.serving.build import WIRES
from paligemma_vla.serving.keys import build_key_maps
from paligemma_vla.serving.protocols.openpi import ROBOARENA, roboarena_configuration
from paligemma_vla_client import pack, unpack


def to_wire(drawn: dict) -> dict:
    """A message of LIBERO's names."""
    images = {"observation/image": drawn["image_1"], "observation/wrist_image": drawn["image_2"]}
    return {**images, "observation/state": drawn["state"], "prompt": drawn["prompt"]}


def test_openpi_client_learns_the_contract_and_gets_the_local_action(serve, policy):
    server = serve(seed=5, limited=False)
    drawn = draw(policy)
    message = to_wire(drawn)
    with connect(server.url) as connection:
        contract = unpack(connection.recv())
        assert {key: contract[key] for key in ("cameras", "horizon", "state_dim", "action_names")} == {
            key: policy.metadata[key] for key in ("cameras", "horizon", "state_dim", "action_names")
        }
        assert len(contract["fingerprint"]) == 64
        connection.send(pack(message))
        reply = unpack(connection.recv())
        np.testing.assert_array_equal(reply["actions"], local(policy, drawn, 5))
        assert reply["server_timing"]["infer_ms"] > 0
        connection.send(pack(message | {"seed": 6}))
        np.testing.assert_array_equal(unpack(connection.recv())["actions"], local(policy, drawn, 6))


def test_roboarena_messages_get_a_bare_array_and_a_reset(serve, policy):
    drawn = draw(policy)
    message = to_wire(drawn) | {"session_id": "a", "endpoint": "infer"}
    with connect(serve(seed=5, limited=False, execute=2).url) as connection:
        connection.recv()
        connection.send(pack(message))
        np.testing.assert_array_equal(unpack(connection.recv()), local(policy, drawn, 5)[:2])
        connection.send(pack({"endpoint": "reset", "session_id": "a"}))
        assert connection.recv() == "reset successful"
        connection.send(pack(message | {"endpoint": "infr"}))
        assert "endpoint: got 'infr'; did you mean 'infer'?" in connection.recv()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"observation/state": np.zeros(1)}, "state: got float64 (1,), expected"),
        ({"observation/image": "a picture"}, "image_1: got str, expected an RGB picture"),
        ({"prompt": ""}, "prompt: got an empty instruction"),
        ({"observation/state": None, "observation/stat": 1}, "did you mean 'observation/stat'"),
    ],
)
def test_wrong_observation_is_refused_by_name_and_the_connection_lives_on(serve, policy, change, said):
    message = to_wire(draw(policy))
    with connect(serve().url) as connection:
        connection.recv()
        wrong = {key: value for key, value in (message | change).items() if value is not None}
        connection.send(pack(wrong))
        refusal = connection.recv()
        assert said in refusal and "Traceback" not in refusal
        connection.send(pack(message))
        assert unpack(connection.recv())["actions"].shape == (policy.metadata["horizon"], policy.metadata["action_dim"])


def test_roboarenas_clients_are_sent_its_six_fields_alone(serve):
    keys = ("openpi:action=joint_velocity", "image_1=observation/exterior_image_1_left")
    with connect(serve(preset="roboarena", keys=keys).url) as connection:
        assert unpack(connection.recv()) == {
            "image_resolution": None,
            "needs_wrist_camera": True,
            "n_external_cameras": 2,  # they count from 0
            "needs_stereo_camera": False,
            "needs_session_id": False,
            "action_space": "joint_velocity",
        }


@pytest.mark.parametrize(
    ("convention", "given", "space"),
    [
        ("", "joint_position", "joint_position"),
        ("Joint velocity, rad/s; gripper +1 = close", None, "joint_velocity"),
        ("joint position", "cartesian_velocity", "cartesian_velocity"),
        ("delta, +1 = 1 cm", None, None),
        ("joint position or joint velocity", None, None),
        ("", "joints", None),
    ],
)
def test_roboarenas_action_space_is_named_and_never_guessed(convention, given, space):
    key_map = build_key_maps(WIRES, {"image_1": ""}, [f"action={given}"] if given else [], ROBOARENA)["openpi"]
    if space is None:
        with pytest.raises(ConfigError, match="add --keys openpi:action=NAME, NAME one of joint_position, "):
            roboarena_configuration(key_map, convention)
    else:
        assert roboarena_configuration(key_map, convention)["action_space"] == space
