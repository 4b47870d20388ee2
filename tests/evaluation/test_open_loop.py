"""Open-loop evaluation against naive loops over the files, the trainer's own validation, and damaged or foreign data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from paligemma_vla import Policy
from paligemma_vla.cli.main import script
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.index import EpisodeIndex, share_episodes
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import CheckpointError, DataError
from paligemma_vla.evaluation import open_loop
from paligemma_vla.evaluation.open_loop import EULER_STEPS, ErrorSums, OpenLoopConfig, OpenLoopResult, evaluate
from paligemma_vla.normalization import DatasetStatistics
from paligemma_vla.seeding import derive_seed
from support import ACTION_DIM, HORIZON, METADATA, make_episode, observation_of, train_here, write_episodes

Rows = list[dict[str, Any]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few Euler steps, each timed once."""
    monkeypatch.setattr(open_loop, "EULER_STEPS", (1,))
    monkeypatch.setattr(open_loop, "LATENCY_CALLS", 1)


@pytest.fixture(scope="module")
def predictions_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("open_loop") / "predictions.parquet"


@pytest.fixture(scope="module")
def result(policy: Policy, two_camera_dir: Path, predictions_path: Path) -> OpenLoopResult:
    return evaluate(policy, str(two_camera_dir), OpenLoopConfig(batch_size=16, predictions_path=predictions_path))


def chunk_after(rows: Rows, number: int) -> list[list[float]]:
    """The recorded actions from row `number` on that belong to its episode: at most HORIZON."""
    chunk = rows[number : number + HORIZON]
    return [row["action"] for row in chunk if row["episode"] == rows[number]["episode"]]


def predict_alone(policy: Policy, row: dict[str, Any], number: int) -> np.ndarray:
    return np.asarray(policy.infer(observation_of(row), seed=derive_seed(0, "open loop", number))["actions"])


def test_metrics_equal_a_naive_loop_over_the_rows(
    policy: Policy, rows: Rows, result: OpenLoopResult, statistics_path: Path
) -> None:
    metrics, count = result.metrics, len(rows)
    recorded = np.full((count, HORIZON, ACTION_DIM), np.nan)
    for number in range(count):
        chunk = chunk_after(rows, number)
        recorded[number, : len(chunk)] = chunk
    errors = np.stack([predict_alone(policy, row, number) for number, row in enumerate(rows)]) - recorded
    close = partial(pytest.approx, rel=1e-4)
    for name, values in (("mae", np.abs(errors)), ("mse", errors**2)):
        assert metrics[name] == close(np.nanmean(values))
        assert [entry[name] for entry in metrics["per_dimension"]] == close(np.nanmean(values, axis=(0, 1)))
        assert [entry[name] for entry in metrics["per_step"]] == close(np.nanmean(values, axis=(0, 2)))
    assert [entry["count"] for entry in metrics["per_step"]] == np.isfinite(errors[..., 0]).sum(0).tolist()
    assert (metrics["samples"], metrics["episodes"]) == (count, rows[-1]["episode"] + 1)
    assert [entry["name"] for entry in metrics["per_dimension"]] == ["dx", "dy"]
    variance = np.nanmean((recorded - DatasetStatistics.load(statistics_path).action.mean) ** 2)
    assert metrics["baselines"]["zero_action"]["mae"] == close(np.nanmean(np.abs(recorded)))
    assert metrics["baselines"]["mean_action"]["mse"] == close(variance)
    assert metrics["explained"] == close(1 - metrics["mse"] / variance)
    assert metrics["per_dimension"][1]["zero_action_mae"] == close(np.nanmean(np.abs(recorded[..., 1])))


def test_steps_that_no_episode_has_are_null_whatever_stands_there() -> None:
    sums = ErrorSums(2, 1)
    sums.add(np.array([[[3.0], [np.nan]]]), np.ones((1, 2, 1), np.float32), np.array([[True, False]]))
    assert sums.per_step()[1] == {"step": 1, "mae": None, "mse": None, "count": 0}
    assert sums.total == {"mae": 2.0, "mse": 4.0}


@pytest.mark.usefixtures("quick")
def test_velocity_loss_is_the_validation_loss_of_training(tiny_config: Callable[..., VLAConfig], two_camera_dir: Path) -> None:
    config = tiny_config({"data.val_parquet_files": str(two_camera_dir), "training.max_steps": 3}, cameras=2)
    trainer = train_here(config)
    evaluated = evaluate(
        Policy.from_checkpoint(config.run_dir / "checkpoints" / "last.pth.tar"),
        str(two_camera_dir),
        OpenLoopConfig(batch_size=5, euler_samples=1, episodes_shown=1),
    ).metrics
    assert evaluated["velocity_loss"] == pytest.approx(trainer.validate()["val/epoch_loss"], rel=1e-5)
    assert evaluated["data"]["training_files"] == len(evaluated["data"]["paths"])


@pytest.mark.usefixtures("quick")
def test_figures_depend_on_the_seed_and_not_on_the_batch_size(policy: Policy, two_camera_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    config = OpenLoopConfig(max_samples=6, euler_samples=2, episodes_shown=1, predictions_path=path)
    first = evaluate(policy, str(two_camera_dir), config).metrics
    episodes = pq.read_table(path)["episode"].to_pylist()
    assert first["samples"] == len(episodes) == 6
    assert (episodes[0], episodes[-1]) == (0, 9), "spread over the data"
    batches, seeded = (
        evaluate(policy, str(two_camera_dir), c).metrics for c in (replace(config, batch_size=4), replace(config, seed=1))
    )
    for name in ("mae", "mse", "velocity_loss"):
        assert batches[name] == pytest.approx(first[name], rel=1e-4)
    assert seeded["mae"] != first["mae"]
    assert seeded["velocity_loss"] == first["velocity_loss"]


def test_euler_table_starts_every_row_from_the_same_noise(result: OpenLoopResult) -> None:
    table = {row["steps"]: row for row in result.metrics["euler_steps"]}
    assert sorted(table) == sorted({*EULER_STEPS, 4})
    assert [steps for steps, row in table.items() if row["used"]] == [4]
    assert table[4]["mae"] == pytest.approx(result.metrics["mae"], rel=1e-5)
    assert table[50]["change"] == 0
    assert table[20]["change"] < table[5]["change"] < table[1]["change"]
    assert all(row["ms_per_observation"] > 0 and row["ms_per_observation_in_batches"] > 0 for row in table.values())


def test_predictions_hold_every_step_with_what_was_recorded(
    policy: Policy, rows: Rows, result: OpenLoopResult, predictions_path: Path
) -> None:
    table = pq.read_table(predictions_path).to_pylist()
    assert [(row["episode"], row["step"], row["prompt"]) for row in table] == [
        (row["episode"], row["step"], row["prompt"]) for row in rows
    ]
    for number, row in enumerate(table):
        real = chunk_after(rows, number)
        assert row["mask"] == [k < len(real) for k in range(HORIZON)]
        assert row["true"] == real + [real[-1]] * (HORIZON - len(real))
    np.testing.assert_allclose(table[12]["predicted"], predict_alone(policy, rows[12], 12), atol=1e-5)


def test_traces_cover_whole_episodes(rows: Rows, result: OpenLoopResult) -> None:
    assert len(result.traces) == 3
    for trace in result.traces:
        mine = [row for row in rows if row["episode"] == trace.episode]
        np.testing.assert_array_equal(trace.actions, np.array([row["action"] for row in mine], np.float32))
        assert trace.prompt == mine[0]["prompt"]
        assert trace.starts.tolist() == list(range(0, len(mine), HORIZON))
        assert trace.predicted.shape == (len(trace.starts), HORIZON, ACTION_DIM)


def test_data_of_another_robot_is_refused_with_every_field(policy: Policy, tmp_path: Path) -> None:
    changes = {"control_hz": 50.0, "image_orientation": "flipped"}
    metadata = replace(METADATA, cameras=(), state_names=(), action_names=(), **changes)  # type: ignore[arg-type]
    with EpisodeWriter(tmp_path, metadata) as writer:
        episode = make_episode(np.random.default_rng(0), 3)
        writer.write(replace(episode, action=np.zeros((3, 5), np.float32), state=np.zeros((3, 9), np.float32)))
    with pytest.raises(DataError) as caught:
        evaluate(policy, str(tmp_path))
    differences = {**changes, "state": 9, "action": 5}
    assert all(f"\n  {name}: got {value!r}" in str(caught.value) for name, value in differences.items())
    assert "cameras: got 1, the checkpoint takes 2" in str(caught.value)


def test_policy_that_diverged_is_named_not_averaged(checkpoint: Path, two_camera_dir: Path) -> None:
    broken = Policy.from_checkpoint(checkpoint)
    with torch.no_grad():
        next(iter(broken.model.action_head.parameters())).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="are not finite: the training run diverged"):
        evaluate(broken, str(two_camera_dir))


def test_command_names_a_damaged_picture_and_leaves_no_half_file(
    checkpoint: Path, two_camera_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    table = pq.read_table(sorted(two_camera_dir.glob("*.parquet"))[0])
    pictures = table["image_1_bytes"].to_pylist()
    pictures[7] = pictures[7][:60]
    damaged = tmp_path / "damaged.parquet"
    pq.write_table(table.set_column(0, "image_1_bytes", pa.array(pictures, pa.binary())), damaged)
    arguments = ["--checkpoint_path", str(checkpoint), "--eval_data_path", str(damaged), "--device", "cpu"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--save_predictions", "--batch_size", "2"]
    assert script("evaluate", arguments) == 2
    assert f"{damaged}: row 7, column image_1_bytes: cannot be decoded" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_figures_flatter_wherever_the_training_files_lie_now(policy: Policy, two_camera_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(two_camera_dir, moved)
    index = EpisodeIndex.build(str(moved))
    assert open_loop.count_training_files(index, policy) == len(index.paths)
    write_episodes(tmp_path / "others", cameras=2, seed=77)
    assert open_loop.count_training_files(EpisodeIndex.build(str(tmp_path / "others")), policy) == 0


def test_episodes_selected_apart_are_not_shared() -> None:
    for first, second, shared in [
        ("lerobot:set?episodes=0:4", "lerobot:set?episodes=4:5", False),
        ("lerobot:set?episodes=0:4", "lerobot:set?episodes=3:5", True),
        ("lerobot:set", "lerobot:set?episodes=4:5", True),
        ("lerobot:set?episodes=:4", "lerobot:elsewhere?cameras=front&episodes=4:", False),
        ("a.parquet", "a.parquet", True),
    ]:
        assert share_episodes(first, second) is shared
