"""Policy: the same numbers as the model called by hand, from a checkpoint that stands alone."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, floating_dtypes, scalar_dtypes
from PIL import ExifTags, Image

import paligemma_vla
from conftest import ConfigFactory
from paligemma_vla import Policy, flow
from paligemma_vla.config import config_from_dict
from paligemma_vla.data.images import decode
from paligemma_vla.data.loader import Collator, VLADataset
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.errors import DataError, VLAError
from paligemma_vla.model import VLAModel
from paligemma_vla.model.vla_model import arguments_from_batch
from paligemma_vla.observation import _from_pillow
from paligemma_vla.policy import Continuation
from paligemma_vla.seeding import derive_seed
from paligemma_vla.training.checkpoint import load_checkpoint
from support import (
    ACTION_DIM,
    HORIZON,
    METADATA,
    STATE_DIM,
    encode_image,
    observation_of,
    read_rows,
    train_here,
    write_episodes,
)

Observation = dict[str, Any]


@pytest.fixture
def observation(rows: list[dict[str, Any]]) -> Observation:
    return observation_of(rows[0])


def test_policy_equals_the_model_called_by_hand_on_the_loaders_batch(
    policy: Policy,
    checkpoint: Path,
    rows: list[dict[str, Any]],
    two_camera_dataset: VLADataset,
    session_config: ConfigFactory,
) -> None:
    saved = load_checkpoint(checkpoint)
    model = VLAModel(session_config(cameras=2)).eval()
    model.load_state_dict({**saved["state_dict"], **saved["ema"]["average"]})
    statistics = two_camera_dataset.preprocessor.statistics.action
    low, high = np.array(statistics.min), np.array(statistics.max)
    several = [n for n, row in enumerate(rows) if n % 9 == 0 or row["image_2_bytes"] is None][:12]
    assert len({rows[n]["image_2_bytes"] is None for n in several}) == 2
    for number in several:
        batch = Collator(two_camera_dataset.preprocessor.prompts)([two_camera_dataset[number]])
        assert isinstance(batch, dict)
        generator = torch.Generator().manual_seed(derive_seed(number, "policy noise", 0))
        noise = flow.draw_noise((1, 1, HORIZON, ACTION_DIM), generator)
        with torch.no_grad():
            normalised = model(**arguments_from_batch({**batch, "flow_noise": noise}, sample=True))[0].double().numpy()
        expected = (normalised + 1) / 2 * (high - low) + low
        got = policy.infer(observation_of(rows[number]), seed=number)["actions"]
        assert (got.shape, got.dtype) == ((HORIZON, ACTION_DIM), np.float32)
        np.testing.assert_allclose(got, expected, atol=1e-6 * max(1.0, np.abs(expected).max()))


def test_answers_of_a_batch_continue_each_in_its_own_way(policy: Policy, rows: list[dict[str, Any]]) -> None:
    """None, a trained prefix and guidance beside one another: each answer is the one that its observation gets alone."""
    learned = copy.copy(policy)
    learned.config = config_from_dict(policy.config.model_dump(), {"training.rtc_max_delay": 2})
    observations = [observation_of(rows[number]) for number in range(4)]
    planned = np.array([row["action"] for row in rows[1:4]], np.float32)
    continuations = [None, Continuation(planned, 2), Continuation(planned, 3), Continuation(planned[:0], 1)]
    assert [learned.realtime_method(each) for each in continuations] == [None, "prefix", "guidance", None]
    together = learned.infer_batch(observations, [0, 1, 2, 3], continuations=continuations)
    for number, observation in enumerate(observations):
        alone = learned.infer(observation, seed=number, continuation=continuations[number])["actions"]
        np.testing.assert_allclose(together[number], alone, atol=1e-4)
    plain = policy.infer_batch(observations, [0, 1, 2, 3])
    np.testing.assert_allclose(together[[0, 3]], plain[[0, 3]], atol=1e-5)
    np.testing.assert_allclose(together[1, :2], planned[:2], atol=1e-5)
    distance = [np.abs(chunk[:3] - planned).mean() for chunk in (plain[2], together[2])]
    assert distance[1] < 0.3 * distance[0]


def test_prefix_that_was_not_trained_is_refused(policy: Policy, observation: Observation) -> None:
    planned = np.zeros((3, ACTION_DIM), np.float32)
    with pytest.raises(
        DataError, match=r"realtime: got prefix with a delay of 2 steps, expected none \(training.rtc_max_delay: 0"
    ):
        policy.infer(observation, continuation=Continuation(planned, 2), realtime="prefix")


def test_policy_needs_nothing_but_its_checkpoint(
    session_config: ConfigFactory, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backbone folder, episodes, statistics and config are deleted; the file is moved and stands alone.

    Its model answers with more dimensions than the data has; the policy leaves the padding out.
    """
    model = shutil.copytree(tiny_model_dir, tmp_path / "work" / "model")
    write_episodes(tmp_path / "work" / "data", lengths=(5, 12), cameras=2)
    compute_statistics(str(tmp_path / "work" / "data"), "x").save(tmp_path / "work" / "stats.json")
    config = session_config(
        {
            "data.train_parquet_files": str(tmp_path / "work" / "data"),
            "data.normalization_stats_path": str(tmp_path / "work" / "stats.json"),
            "data.pad_action_dim": True,
            "model.vlm_config.model_name_or_path": str(model),
            "model.action_head_config.per_action_dim": ACTION_DIM + 3,
            "data.val_fraction": 0.0,
            "training.max_steps": 2,
            "training.checkpoint_dir": str(tmp_path / "work" / "runs"),
        },
        cameras=2,
    )
    train_here(config)
    row = read_rows(tmp_path / "work" / "data")[0]
    path = config.run_dir / "checkpoints" / "last.pth.tar"
    before = Policy.from_checkpoint(path).infer(observation_of(row), seed=1)["actions"]
    assert before.shape == (HORIZON, ACTION_DIM)
    shutil.copy(path, tmp_path / "alone.pth.tar")
    shutil.rmtree(tmp_path / "work")
    monkeypatch.chdir(tmp_path)
    policy = Policy.from_checkpoint("alone.pth.tar")
    np.testing.assert_array_equal(policy.infer(observation_of(row), seed=1)["actions"], before)
    assert policy.metadata["action_dim"] == ACTION_DIM


def test_policy_answers_the_same_for_the_same_seed_and_steps(policy: Policy, observation: Observation) -> None:
    assert not policy.model.training and not any(p.requires_grad for p in policy.model.parameters())
    first = policy.infer(observation, seed=3)["actions"]
    torch.manual_seed(5)
    np.testing.assert_array_equal(policy.infer(observation, seed=3)["actions"], first)
    assert np.abs(policy.infer(observation, seed=4)["actions"] - first).max() > 1e-3
    np.testing.assert_array_equal(policy.infer(observation, seed=3, num_steps=4)["actions"], first)
    assert np.abs(policy.infer(observation, seed=3, num_steps=1)["actions"] - first).max() > 1e-4
    with pytest.raises(DataError, match="num_steps: got 0"):
        policy.infer(observation, seed=3, num_steps=0)
    state = torch.get_rng_state()
    fresh = [policy.infer(observation)["actions"] for _ in range(2)]
    assert np.abs(fresh[0] - fresh[1]).max() > 1e-3
    assert torch.equal(torch.get_rng_state(), state)


def test_policy_takes_an_observation_however_it_is_written(policy: Policy, observation: Observation) -> None:
    """Pictures of any memory layout and size, an absent camera left out or None."""

    def answer(**change: Any) -> Any:
        return policy.infer({**observation, "state": [1, 2, 3], **change}, seed=0)["actions"]

    image, base = observation["image_1"], answer()
    read_only = image.copy()
    read_only.flags.writeable = False
    for change in ({"image_1": read_only}, {"image_1": np.asfortranarray(image)}):
        np.testing.assert_array_equal(answer(**change), base)
    pixels = np.asarray(Image.fromarray(image).resize((200, 10)))
    resized = policy.preprocessor.image.apply(pixels).transpose(1, 2, 0)
    np.testing.assert_array_equal(answer(image_1=pixels), answer(image_1=resized))
    observation = {**observation, "image_2": None}
    absent = answer()
    del observation["image_2"]
    np.testing.assert_array_equal(answer(), absent)
    for change in ({"image_1": image[::-1]}, {"state": [9, 2, 3]}, {"image_2": np.zeros((32, 32, 3), np.uint8)}):
        assert np.abs(answer(**change) - absent).max() > 1e-6


def floats(image: Any) -> Any:
    return image.astype(np.float32) / 255


SAME_IMAGE: dict[str, Callable[[Any], Any]] = {
    "float32": floats,
    "float16": lambda image: floats(image).astype(np.float16),
    "float64": lambda image: image / 255,
    "(3, H, W)": lambda image: image.transpose(2, 0, 1),
    "(1, H, W, 3)": lambda image: image[None],
    "torch": torch.tensor,
    "torch, float, (1, 3, H, W)": lambda image: torch.tensor(floats(image)).permute(2, 0, 1)[None],
    "PIL": Image.fromarray,
    "PIL, with alpha": lambda image: Image.fromarray(image).convert("RGBA"),
    "PIL, on its side": lambda image: tagged(Image.fromarray(image).transpose(Image.Transpose.ROTATE_90), 6),
}
SAME_STATE: dict[str, Any] = {
    "list": [1, 2, 3],
    "tuple": (1.0, 2.0, 3.0),
    "(1, P)": [[1, 2, 3]],
    "(1, 1, P)": np.array([[[1, 2, 3]]]),
    **{name: np.array([1, 2, 3], name) for name in ("float16", "float64", "int16", "uint64")},
    "bfloat16": torch.tensor([1, 2, 3], dtype=torch.bfloat16),
    "torch, learning": torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True),
    "numbers of torch": [torch.tensor(1.0), np.float32(2), 3],
}


def tagged(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as a file says that it is to be turned."""
    image.getexif()[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=image.getexif())
    return Image.open(stream)


@pytest.fixture
def base(policy: Policy, observation: Observation) -> Any:
    return policy.infer({**observation, "state": np.array([1, 2, 3], np.float32)}, seed=0)["actions"]


@pytest.mark.parametrize("form", SAME_IMAGE)
def test_policy_takes_a_picture_in_any_form(form: str, policy: Policy, observation: Observation, base: Any) -> None:
    changed = {**observation, "state": [1, 2, 3], "image_1": SAME_IMAGE[form](observation["image_1"])}
    np.testing.assert_array_equal(policy.infer(changed, seed=0)["actions"], base)


@pytest.mark.parametrize("form", SAME_STATE)
def test_policy_takes_a_state_in_any_form(form: str, policy: Policy, observation: Observation, base: Any) -> None:
    changed = {**observation, "state": SAME_STATE[form], "prompt": [observation["prompt"]]}
    np.testing.assert_array_equal(policy.infer(changed, seed=np.int64(0), num_steps=torch.tensor(4))["actions"], base)


PIXELS = np.zeros((8, 8, 3), np.uint8)
CUT = Image.open(io.BytesIO(encode_image(np.random.default_rng(0))[:700]))
REFUSED: dict[str, tuple[dict[Any, Any], str]] = {
    "a camera's name": ({"wrist": PIXELS}, r"wrist: not a key of this policy; did you mean 'image_2'\?"),
    "LeRobot's key": ({"observation.images.wrist": PIXELS}, r"observation\.images\.wrist: .*did you mean 'image_2'\?"),
    "LeRobot's state": ({"observation.state": [1, 2, 3]}, r"observation\.state: .*did you mean 'state'\?"),
    "upper case": ({"Image_2": PIXELS}, r"Image_2: .*did you mean 'image_2'\?"),
    "a camera too many": ({"image_3": None}, r"image_3: .*did you mean 'image_[12]'\?"),
    "nothing like it": ({"task": "x"}, r"task: .*; known: image_1, image_2, prompt, state"),
    "no text": ({3: "x"}, r"3: not a key"),
    "dark 0 to 255 as floats": (
        {"image_1": PIXELS + np.float32(2)},
        r"image_1: got float32 \(8, 8, 3\) from 2 to 2, exp",
    ),
    "a camera that gave nothing": ({"image_1": None}, r"image_1: got None, expected an RGB picture"),
    "floats from -1": ({"image_2": PIXELS - 1.0}, r"image_2: got float64 \(8, 8, 3\) from -1 to -1"),
    "not a number": ({"image_1": PIXELS + np.nan}, r"image_1: got float64 \(8, 8, 3\) from nan"),
    "0 and 1": ({"image_1": np.eye(8)[..., None] + np.zeros(3)}, r"image_1: .* of 0 and 1 alone, which may end at 1 or at 255"),
    "16 bits": ({"image_1": PIXELS.astype(np.uint16)}, r"image_1: got uint16"),
    "PIL, 16 bits": ({"image_1": Image.new("I;16", (8, 8))}, r"image_1: got a PIL image of mode I;16"),
    "PIL, cut": (
        {"image_1": Image.open(io.BytesIO(encode_image(np.random.default_rng(0))[:700]))},
        r"image_1: .*cannot be decoded",
    ),
    "grey": ({"image_1": PIXELS[..., 0]}, r"image_1: got uint8 \(8, 8\)"),
    "two pictures": ({"image_1": np.stack([PIXELS, PIXELS])}, r"image_1: got uint8 \(2, 8, 8, 3\)"),
    "overflow": ({"state": [0, 1e39, 0]}, r"state\[1\]: got 1e\+39, expected a finite number within float32"),
    "infinite": ({"state": [0, 0, float("inf")]}, r"state\[2\]: got inf"),
    "complex": ({"state": [1j, 0, 0]}, r"state: got list, expected 3 numbers"),
    "two states": ({"state": np.zeros((2, 3))}, r"state: got float64 \(2, 3\), expected 3 numbers"),
    "without storage": ({"state": torch.empty(3, device="meta")}, r"state: got Tensor"),
    "two prompts": ({"prompt": ["a", "b"]}, r"prompt: got list"),
    "half a letter": ({"prompt": "open \ud800"}, r"prompt: got 'open \\ud800'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_policy_refuses_by_name(case: str, policy: Policy, observation: Observation) -> None:
    change, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        policy.infer({**observation, **change}, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", torch.tensor(0.5), [1]])
def test_policy_refuses_a_seed_that_is_none(seed: Any, policy: Policy, observation: Observation) -> None:
    with pytest.raises(DataError, match=r"seed: got .*, expected a whole number from 0"):
        policy.infer(observation, seed=seed)
    with pytest.raises(DataError, match="observations: got 1, 2 seeds and"):
        policy.infer_batch([observation], [1, 2])
    with pytest.raises(DataError, match="observation: got list, expected a dictionary of image_1, image_2"):
        policy.infer([observation], seed=0)  # type: ignore[arg-type]


ODD = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    st.recursive(st.integers() | st.floats(), lambda inner: st.lists(inner, max_size=4), max_leaves=12),
    arrays(scalar_dtypes(), array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=3)),
    arrays(np.float32, array_shapes(max_dims=4, max_side=3)).map(torch.from_numpy),
    arrays(floating_dtypes(sizes=(16, 32, 64)), (3,)),
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "F", "I;16"]).map(lambda mode: Image.new(mode, (3, 2))),
)


@given(
    st.sampled_from(["image_1", "image_2", "state", "prompt"]) | st.text(max_size=4),
    *(ODD, st.none() | st.integers() | ODD, st.integers(1, 3) | ODD),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_policy_answers_or_says_what_is_wrong(
    policy: Policy, observation: Observation, key: str, value: Any, seed: Any, num_steps: Any
) -> None:
    try:
        answer = policy.infer({**observation, key: value}, seed=seed, num_steps=num_steps)["actions"]
    except VLAError as error:
        assert str(error)
    else:
        assert np.isfinite(answer).all()


def test_policy_wrong_observation_names_every_fault(policy: Policy, observation: Observation) -> None:
    wrong = {"image_2": np.zeros((8, 8, 4), np.uint8), "image_3": np.zeros((8, 8, 3), np.uint8), "state": [1.0], "prompt": 3}
    with pytest.raises(DataError) as caught:
        policy.infer(wrong)
    faults = {line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]}
    assert faults == {"image_1", "image_2", "image_3", "state", "prompt"}
    assert "got uint8 (8, 8, 4), expected an RGB picture: a uint8 array (H, W, 3)" in str(caught.value)
    shapes = [(8, 3, 8), (8, 8), (0, 8, 3)]
    values: dict[str, list[Any]] = {
        "image_1": [None, *(np.zeros(shape, np.uint8) for shape in shapes), [[1, 2]], "wrist.png"],
        "state": [None, [1.0, 2.0], [1.0, float("nan"), 2.0], [[1.0], [2.0, 3.0], 4.0], ["a", "b", "c"]],
        "prompt": [None, "", "word " * 500],
    }
    for name, wrong_values in values.items():
        for value in wrong_values:
            with pytest.raises(DataError, match=name):
                policy.infer({**observation, name: value}, seed=0)


def test_policy_metadata_says_what_it_expects_and_returns(policy: Policy) -> None:
    metadata = policy.metadata
    expected = {
        **{"cameras": ["image_1", "image_2"], "camera_names": list(METADATA.cameras), "state_names": ["x", "y", "z"]},
        **{"state_dim": STATE_DIM, "action_dim": ACTION_DIM, "horizon": HORIZON, "action_names": ["dx", "dy"]},
        **{"control_hz": 12.5, "image_orientation": "upright", "action_convention": METADATA.action_convention},
        "versions": paligemma_vla.versions(),
    }
    assert {name: metadata[name] for name in expected} == expected
    pickle.dumps(metadata)


def test_picture_with_damaged_exif_is_seen_as_training_sees_it() -> None:
    """Both take it as it is stored: one function turns pictures."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    pixels = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    damaged = exif.tobytes().replace(b"MM\0*", b"MM\0\xff").replace(b"II*\0", b"II\xff\0")
    Image.fromarray(pixels).save(stream, "PNG", exif=damaged)
    parsed = _from_pillow("image_1", Image.open(io.BytesIO(stream.getvalue())))
    assert np.array_equal(parsed, decode(stream.getvalue()))
    assert np.array_equal(parsed, pixels)
