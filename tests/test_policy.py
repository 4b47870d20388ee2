"""Policy: the same numbers as the model called by hand, from a checkpoint that stands alone."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import paligemma_vla
from conftest import ConfigFactory
from paligemma_vla import Policy, flow
from paligemma_vla.data.loader import Collator, VLADataset
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.errors import DataError
from paligemma_vla.model import VLAModel
from paligemma_vla.model.vla_model import arguments_from_batch
from paligemma_vla.seeding import derive_seed
from paligemma_vla.training.checkpoint import load_checkpoint
from support import ACTION_DIM, HORIZON, METADATA, STATE_DIM, observation_of, read_rows, train_here, write_episodes

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
    """Pictures of any memory layout and size, states of any numbers, an absent camera left out or None."""

    def answer(**change: Any) -> Any:
        return policy.infer({**observation, "state": [1, 2, 3], **change}, seed=0)["actions"]

    image, base = observation["image_1"], answer()
    read_only = image.copy()
    read_only.flags.writeable = False
    states: list[Any] = [(1.0, 2.0, 3.0), np.array([1, 2, 3], np.int16), np.array([1.0, 2.0, 3.0])]
    for change in [{"image_1": read_only}, {"image_1": np.asfortranarray(image)}, *({"state": state} for state in states)]:
        np.testing.assert_array_equal(answer(**change), base)
    pixels = np.asarray(Image.fromarray(image).resize((200, 10)))
    resized = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(answer(image_1=pixels), answer(image_1=resized))
    observation = {**observation, "image_2": None}
    absent = answer()
    del observation["image_2"]
    np.testing.assert_array_equal(answer(), absent)
    for change in ({"image_1": image[::-1]}, {"state": [9, 2, 3]}, {"image_2": np.zeros((32, 32, 3), np.uint8)}):
        assert np.abs(answer(**change) - absent).max() > 1e-6


def test_policy_wrong_observation_names_every_fault(policy: Policy, observation: Observation) -> None:
    wrong = {"image_2": np.zeros((8, 8, 4), np.uint8), "image_3": np.zeros((8, 8, 3), np.uint8), "state": [1.0], "prompt": 3}
    with pytest.raises(DataError) as caught:
        policy.infer(wrong)
    faults = {line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]}
    assert faults == {"image_1", "image_2", "image_3", "state", "prompt"}
    assert "got uint8 (8, 8, 4), expected a uint8 array (H, W, 3)" in str(caught.value)
    shapes = [(3, 8, 8), (8, 8), (0, 8, 3)]
    values: dict[str, list[Any]] = {
        "image_1": [None, *(np.zeros(shape, np.uint8) for shape in shapes), np.zeros((8, 8, 3)), [[1, 2]], "wrist.png"],
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
