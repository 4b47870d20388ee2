"""Every representation on its whole way, statistics, loader, training, validation, Policy, resume, against loops over rows."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from conftest import ConfigFactory
from paligemma_vla import Policy, flow
from paligemma_vla.actions import ActionTransform
from paligemma_vla.cli.main import main
from paligemma_vla.config import VLAConfig, config_from_dict
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.loader import Collator, VLADataset
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import ConfigError, DataError, VLAError
from paligemma_vla.evaluation.open_loop import OpenLoopConfig, check_same_robot, evaluate
from paligemma_vla.model.vla_model import arguments_from_batch
from paligemma_vla.normalization import DatasetStatistics
from paligemma_vla.policy import Continuation
from paligemma_vla.schema import METADATA_KEY, DatasetMetadata, Episode
from paligemma_vla.seeding import derive_seed
from paligemma_vla.training import preflight
from paligemma_vla.training.trainer import Trainer
from ranks import ALONE
from support import HORIZON, encode_image, read_rows, train_here

REPRESENTATIONS = ("absolute", "chunk_relative", "delta")
LENGTHS = (9, 1, 12, 3, 10, 4)
NAMES = ("x", "y", "z", "qx", "qy", "qz", "qw")
ARM = DatasetMetadata(
    robot="arm with a hand",
    state_names=("gripper_open", *NAMES),
    action_names=(*NAMES, "gripper"),
    state_units=("", "m", "m", "m", "", "", "", ""),
    action_units=("m", "m", "m", "", "", "", "", ""),
    control_hz=10.0,
    action_representation="absolute",
    action_rotation="quaternion_xyzw",
)
QUATERNION = {"representation": "quaternion_xyzw", "dimensions": ["qx", "qy", "qz", "qw"]}


@dataclass(frozen=True)
class Arm:
    """A folder of episodes of an arm whose actions are absolute poses, its rows, and settings that fit it."""

    folder: Path
    rows: list[dict[str, Any]]
    work: Path

    def overrides(self, representation: str, **more: Any) -> dict[str, Any]:
        return {
            "data.train_parquet_files": str(self.folder),
            "data.val_fraction": 0.34,
            "data.batch_size": 8,
            "data.state_dim": 8,
            "data.normalization_stats_path": str(self.work / f"{representation}.json"),
            "data.actions.representation": representation,
            "data.actions.rotation": QUATERNION,
            "model.action_head_config.per_action_dim": 8,
            "training.experiment_name": f"arm_{representation}",
            "training.max_steps": 3,
            "training.ema_decay": 0.0,
            **more,
        }


def write_arm(folder: Path, lengths: tuple[int, ...] = LENGTHS, metadata: DatasetMetadata = ARM) -> None:
    rng = np.random.default_rng(3)
    with EpisodeWriter(folder, metadata, episodes_per_file=2) as writer:
        for number, length in enumerate(lengths):
            images: list[list[bytes | None]] = [[encode_image(rng) for _ in range(length)]]
            gripper = rng.integers(0, 2, (length, 1))
            position = np.cumsum(rng.normal(size=(length, 3)), axis=0)
            turns = [Rotation.random(random_state=rng).as_quat() for _ in range(length)]
            aims = [Rotation.random(random_state=rng).as_quat() * (-1) ** step for step in range(length)]
            state = np.concatenate([gripper, position, turns], axis=1).astype(np.float32)
            action = np.concatenate([position + rng.normal(size=(length, 3)), aims, 1 - gripper], axis=1).astype(np.float32)
            writer.write(Episode(images, state, action, f"do thing {number}"))


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Arm:
    folder = tmp_path_factory.mktemp("arm")
    write_arm(folder)
    return Arm(folder, read_rows(folder), tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def configs(arm: Arm, session_config: ConfigFactory) -> dict[str, VLAConfig]:
    """A configuration per representation, its statistics written by the command: one file, and `--set` as in training."""
    made = {name: session_config(arm.overrides(name)) for name in REPRESENTATIONS}
    path = str(arm.work / "absolute.yaml")
    Path(path).write_text(made["absolute"].to_yaml())
    for name, config in made.items():
        output = ["--output_path", config.data.normalization_stats_path, "--set", f"data.actions.representation={name}"]
        assert main(["stats", "--config_path", path, *output]) == 0
    return made


@pytest.fixture(scope="module")
def trained(configs: dict[str, VLAConfig]) -> dict[str, Trainer]:
    return {name: train_here(config) for name, config in configs.items()}


def recorded_after(rows: list[dict[str, Any]], number: int) -> np.ndarray:
    """The actions (n, 8) that follow a row, within its episode, at most a chunk."""
    chunk = [row["action"] for row in rows[number : number + HORIZON] if row["episode"] == rows[number]["episode"]]
    return np.array(chunk, np.float32)


def seen_by_the_model(rows: list[dict[str, Any]], number: int, actions: ActionTransform) -> np.ndarray:
    """The same as the model is to see it. `test_actions.py` has the loops that `encode` and `decode` equal."""
    return actions.encode(recorded_after(rows, number), state_of(rows[number]))


def state_of(row: dict[str, Any]) -> np.ndarray:
    return np.array(row["state"], np.float32)


def policy_of(trainer: Trainer) -> Policy:
    return Policy.from_checkpoint(trainer.config.run_dir / "checkpoints" / "last.pth.tar")


def alone(dataset: VLADataset, number: int) -> dict[str, Any]:
    """A batch of one sample."""
    batch = Collator(dataset.preprocessor.prompts)([dataset[number]])
    assert isinstance(batch, dict)
    return batch


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_statistics_are_over_every_step_of_every_chunk(arm: Arm, configs: dict[str, VLAConfig], representation: str) -> None:
    """Over all (t, k) that the loss sees; with absolute actions over every row, as they always were."""
    got = DatasetStatistics.load(configs[representation].data.normalization_stats_path)
    chunks = [seen_by_the_model(arm.rows, number, got.actions) for number in range(len(arm.rows))]
    if representation == "absolute":
        chunks = [chunk[:1] for chunk in chunks]
    data = np.concatenate(chunks).astype(np.float64)
    assert got.action.count == len(data)
    assert got.state.count == len(arm.rows)
    for name, expected in [
        ("min", data.min(0)),
        ("max", data.max(0)),
        ("mean", data.mean(0)),
        ("std", data.std(0)),
        ("q01", np.quantile(data, 0.01, axis=0)),
        ("q99", np.quantile(data, 0.99, axis=0)),
    ]:
        np.testing.assert_allclose(getattr(got.action, name), expected, atol=3e-6, err_msg=name)
    assert got.actions.representation == representation
    assert got.actions.horizon == (0 if representation == "absolute" else HORIZON)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_labels_equal_a_loop_over_rows(arm: Arm, configs: dict[str, VLAConfig], representation: str) -> None:
    config = configs[representation]
    data = VLADataset(str(arm.folder), config.model.vlm_config.model_name_or_path, config)
    preprocessor = data.preprocessor
    assert len(data) == len(arm.rows)
    padded = 0
    for number, row in enumerate(arm.rows):
        item, expected = data[number], seen_by_the_model(arm.rows, number, preprocessor.actions)
        label = item["action"].view(HORIZON, 8).numpy()
        np.testing.assert_allclose(label[: len(expected)], preprocessor.action.normalize(expected), atol=2e-5)
        np.testing.assert_allclose(item["state"], preprocessor.state.normalize(state_of(row)), atol=1e-5)
        assert item["action_mask"].tolist() == [[step < len(expected)] * 8 for step in range(HORIZON)]
        # Past the end the last action is repeated: with deltas, and nowhere else, that is to stay where one is.
        real = preprocessor.decode_actions(label, state_of(row))
        last = np.abs(real[len(expected) :] - real[len(expected) - 1]).max(initial=0)
        assert last < 1e-5
        padded += HORIZON - len(expected)
    assert padded > 5


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_policy_returns_actions_as_recorded(trained: dict[str, Trainer], arm: Arm, representation: str) -> None:
    """The model called by hand, its answer inverted from the state that was given."""
    trainer = trained[representation]
    policy = policy_of(trainer)
    data = VLADataset(str(arm.folder), trainer.preprocessor, trainer.config)
    for number in (0, 12, 30):
        batch, row = alone(data, number), arm.rows[number]
        generator = torch.Generator().manual_seed(derive_seed(number, "policy noise", 0))
        batch["flow_noise"] = flow.draw_noise((1, 1, HORIZON, 8), generator)
        with torch.no_grad():
            sampled = trainer.model.eval()(**arguments_from_batch(batch, sample=True))[0]
        expected = data.preprocessor.decode_actions(sampled.numpy(), state_of(row))
        image = np.asarray(Image.open(io.BytesIO(row["image_1_bytes"])))
        observation = {"image_1": image, "state": row["state"], "prompt": row["prompt"]}
        np.testing.assert_allclose(policy.infer(observation, seed=number)["actions"], expected, atol=1e-4)
    said = policy.metadata
    assert (said["action_representation"], said["rotation"]) == ("absolute", QUATERNION)
    assert (said["state_units"], said["action_units"]) == (list(ARM.state_units), list(ARM.action_units))
    assert said["action_names"] == list(ARM.action_names)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_validation_error_is_of_actions_as_recorded(trained: dict[str, Trainer], representation: str) -> None:
    trainer = trained[representation]
    validation, preprocessor = trainer.data.validation, trainer.preprocessor
    assert validation is not None
    errors, count = np.zeros((HORIZON, 8)), np.zeros((HORIZON, 8))
    trainer.model.eval().requires_grad_(False)
    for number in range(len(validation)):
        batch = alone(validation, number)
        state = preprocessor.state.denormalize(batch["state"][0].numpy())
        chunks = trainer.model(**arguments_from_batch(batch, sample=True))[0], batch["action"].view(HORIZON, 8)
        got, expected = (preprocessor.decode_actions(chunk.numpy(), state) for chunk in chunks)
        mask = batch["action_mask"][0].numpy()
        errors += np.abs(got - expected) * mask
        count += mask
    metrics = trainer.validate()
    assert metrics["val/action_mae"] == pytest.approx(errors.sum() / count.sum(), rel=1e-4)
    assert metrics["val/action_mae_per_dim"] == pytest.approx((errors.sum(0) / count.sum(0)).tolist(), rel=1e-4)


@pytest.mark.parametrize("representation", ["chunk_relative", "delta"])
def test_chunk_that_goes_on_is_anchored_to_the_new_state(trained: dict[str, Trainer], arm: Arm, representation: str) -> None:
    """Poses that the arm is being led to, composed by hand from where it is now; a prefix of them comes back as they are."""
    policy = policy_of(trained[representation])
    policy.config = config_from_dict(policy.config.model_dump(), {"training.rtc_max_delay": 3})
    row, later = arm.rows[10], arm.rows[12]  # of one episode
    left = recorded_after(arm.rows, 10)[1:3]  # (2, 8): two of the four actions that were planned from the earlier state
    state = state_of(later)
    expected, before = [], state[1:8].astype(np.float64)
    for pose in [*left, left[-1], left[-1]]:
        step = pose[:3] - before[:3]
        turn = (Rotation.from_quat(before[3:]).inv() * Rotation.from_quat(pose[3:7])).as_quat(canonical=True)
        expected.append([*step, *turn, pose[7]])
        if representation == "delta":
            before = pose[:7]
    ongoing = policy._ongoing([Continuation(left.astype(np.float32), 2)], state[None], "prefix")
    normalised = policy.preprocessor.action.normalize(np.array(expected, np.float32))
    np.testing.assert_allclose(ongoing.actions[0], normalised, atol=2e-5)
    assert (ongoing.delay.item(), ongoing.length.item(), ongoing.guided) == (2, 2, False)
    image = np.asarray(Image.open(io.BytesIO(row["image_1_bytes"])))
    observation = {"image_1": image, "state": state, "prompt": row["prompt"]}
    answer = policy.infer(observation, seed=0, continuation=Continuation(left.astype(np.float32), 2))["actions"]
    canonical = left.copy()
    canonical[:, 3:7] *= np.sign(left[:, 6:7])  # q and -q are one rotation
    np.testing.assert_allclose(answer[:2], canonical, atol=1e-4)


@pytest.mark.parametrize("representation", ["chunk_relative", "delta"])
def test_open_loop_compares_with_recorded_actions(trained: dict[str, Trainer], arm: Arm, representation: str) -> None:
    """A quaternion recorded as its negative is no error; the baseline is the mean of what the model sees."""
    policy = policy_of(trained[representation])
    entries = evaluate(policy, str(arm.folder), OpenLoopConfig(euler_samples=1, batch_size=16)).metrics["per_dimension"]
    chunk_of_means = np.tile(policy.preprocessor.statistics.action.mean, (HORIZON, 1)).astype(np.float32)
    errors = []
    for number, row in enumerate(arm.rows):
        constant = policy.preprocessor.actions.decode(chunk_of_means, state_of(row))
        for ahead, action in enumerate(recorded_after(arm.rows, number)):
            quaternion = action[3:7] * (1 if action[6] >= 0 else -1)
            errors.append(np.abs(constant[ahead] - np.concatenate([action[:3], quaternion, action[7:]])))
    np.testing.assert_allclose([entry["mean_action_mae"] for entry in entries], np.mean(errors, axis=0), rtol=1e-4)
    recorded = np.array([row["action"] for row in arm.rows])
    for n in range(3):
        assert entries[n]["recorded_range"] == pytest.approx([recorded[:, n].min(), recorded[:, n].max()])
    assert [entry["training_range"] is None for entry in entries] == [n < 7 for n in range(8)]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("key", "value"), [("representation", "chunk_relative"), ("dimensions", ["x", "y", "z"])])
def test_resume_with_other_actions_is_refused_even_by_force(
    trained: dict[str, Trainer], session_config: ConfigFactory, arm: Arm, key: str, value: Any, force: bool
) -> None:
    resume = trained["delta"].config.run_dir / "checkpoints" / "last.pth.tar"
    config = session_config(arm.overrides("delta", **{f"data.actions.{key}": value}))
    with pytest.raises(ConfigError, match=r"data\.actions: got .*; the checkpoint predicts delta in chunks of 4: x from x, "):
        Trainer(config, ALONE, resume, force)


@pytest.mark.parametrize(
    ("wanted", "changes", "difference"),
    [
        ("absolute", {}, "is of actions as delta in chunks of 4: x from x, .* expected absolute"),
        ("chunk_relative", {}, "is of actions as delta .*, expected chunk_relative in chunks of 4: x from x, "),
        ("delta", {"data.actions.dimensions": ["x", "y", "z"]}, "expected .*: x from x, y from y, z from z"),
    ],
)
@pytest.mark.usefixtures("configs")
def test_statistics_of_other_actions_are_refused_with_the_remedy(
    session_config: ConfigFactory, arm: Arm, wanted: str, changes: dict[str, Any], difference: str
) -> None:
    path = arm.work / "delta.json"
    config = session_config(arm.overrides(wanted, **{**changes, "data.normalization_stats_path": str(path)}))
    message = rf"data\.normalization_stats_path: {path} .*{difference}.*; compute the statistics again: .*--output_path {path}"
    with pytest.raises(VLAError, match=message):
        preflight.prepare(config, ALONE)
    with pytest.raises(VLAError, match=message):
        VLADataset(str(arm.folder), config.model.vlm_config.model_name_or_path, config)


def test_row_whose_rotation_is_none_is_named(arm: Arm, configs: dict[str, VLAConfig], tmp_path: Path) -> None:
    rows = [row for row in arm.rows if row["episode"] == 2]
    state, action = (np.array([row[name] for row in rows], np.float32) for name in ("state", "action"))
    action[9, 3:7] = 0
    with EpisodeWriter(tmp_path, ARM) as writer:
        writer.write(Episode([[row["image_1_bytes"] for row in rows]], state, action, "x"))
    config = configs["chunk_relative"]
    actions = DatasetStatistics.load(config.data.normalization_stats_path).actions
    with pytest.raises(DataError, match=r"episodes-00000\.parquet: row 6, column action: the rotation here, in the next"):
        compute_statistics(str(tmp_path), "x", actions=actions)  # 6 + 3 = 9, the first chunk that reaches it
    data = VLADataset(str(tmp_path), config.model.vlm_config.model_name_or_path, config)
    assert torch.isfinite(data[5]["action"]).all()
    with pytest.raises(DataError, match=r"row 6, column action: the rotation here"):
        data[6]


@pytest.mark.parametrize(
    ("field", "value"), [("state_units", ("", *["mm"] * 3, *[""] * 4)), ("action_rotation", "quaternion_wxyz")]
)
def test_files_and_checkpoints_that_mean_other_actions_are_refused(
    trained: dict[str, Trainer], tmp_path: Path, field: str, value: Any
) -> None:
    write_arm(tmp_path / "a", (3, 4))
    write_arm(tmp_path / "b", (3, 4), replace(ARM, **{field: value}))
    write_arm(tmp_path / "c", (3, 4), replace(ARM, **{field: type(value)()}))  # says nothing, so cannot contradict
    EpisodeIndex.build([str(tmp_path / "a"), str(tmp_path / "c")])
    with pytest.raises(DataError, match=f"metadata {field}: got .*, expected .* as in .*; train on one robot's data at a time"):
        EpisodeIndex.build([str(tmp_path / "a"), str(tmp_path / "b")])
    policy = policy_of(trained["absolute"])
    check_same_robot(EpisodeIndex.build(str(tmp_path / "c")), policy)
    with pytest.raises(DataError, match=f"{field}: got .*, expected "):
        check_same_robot(EpisodeIndex.build(str(tmp_path / "b")), policy)


def test_names_and_units_that_are_not_one_per_dimension_are_refused(tmp_path: Path) -> None:
    wrong = replace(ARM, action_units=("m",), state_names=("x",) * 9)
    faults = r"state_names: got 9, expected 8, one per dimension .*action_units: got 1, expected 8"
    with pytest.raises(DataError, match=rf"(?s)episode 0 of 'episodes' cannot be written.*{faults}"):
        write_arm(tmp_path / "a", (3,), wrong)
    write_arm(tmp_path / "b", (3,))
    (path,) = (tmp_path / "b").glob("*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: wrong.to_json().encode()}), path)
    with pytest.raises(DataError, match=r"metadata state_names: got 9, expected 8, .*write it as docs/data_format\.md says"):
        EpisodeIndex.build(str(path))


def test_policy_refuses_a_state_without_a_rotation(trained: dict[str, Trainer]) -> None:
    policy = policy_of(trained["delta"])
    observation = {"image_1": np.zeros((32, 32, 3), np.uint8), "state": [1, 0, 0, 0, 0, 0, 0, 0], "prompt": "x"}
    with pytest.raises(DataError, match=r"state: got \[1, 0.*expected a rotation in it as quaternion_xyzw: a length of 0"):
        policy.infer(observation)
