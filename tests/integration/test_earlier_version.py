"""What commit 422f095 wrote loads and resumes: statistics, checkpoints (one file, shards), run folders, an exported folder."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_vla import Policy
from paligemma_vla.cli.main import main
from paligemma_vla.normalization import DatasetStatistics

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "written_by_422f095.tar.xz"
STREAMED = ["--set", "data.reading=streamed", "--set", "data.stream_block_mb=0.01"]
WEIGHTED = [*STREAMED, "--set", "data.val_parquet_files=data"]
WEIGHTED += ["--set", "data.train_parquet_files=[{path: data, weight: 2.0}, {path: data/*-00001*.parquet, weight: 1.0}]"]
OPTIONS = {"random": [], "shards": ["--set", "training.checkpoint_format=sharded"], "streamed": STREAMED}
METRICS = ("train/batch_loss", "train/grad_norm", "val/epoch_loss", "val/action_mae")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since 3.11.4
    return folder


@pytest.fixture
def here(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: configurations name data and statistics relative to it."""
    monkeypatch.chdir(earlier)
    return earlier


@pytest.fixture(scope="module")
def answers(earlier: Path) -> Any:
    return json.loads((earlier / "answers.json").read_text())


def actions(path: Path) -> np.ndarray:
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (28, 40, 3), dtype=np.uint8) for _ in range(2)]
    state = np.array([0.1, -0.2, 0.3], np.float32)
    observation = {"image_1": images[0], "image_2": images[1], "state": state, "prompt": "open the drawer"}
    return Policy.from_checkpoint(path).infer(observation, seed=0)["actions"]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("checkpoint", "runs/random/checkpoints/checkpoint_step_7.pth.tar"),
        ("shards", "runs/shards/checkpoints/checkpoint_step_7.dcp"),
        ("exported", "exported"),
    ],
)
def test_policies_of_an_earlier_version_give_the_actions_they_gave(kind: str, path: str, here: Path, answers: Any) -> None:
    np.testing.assert_allclose(actions(here / path), answers[kind], atol=1e-5)


def test_statistics_of_an_earlier_version_load(here: Path) -> None:
    loaded = DatasetStatistics.load(str(here / "normalization_stats.json")).to_dict()
    written = json.loads((here / "normalization_stats.json").read_text())
    assert all(loaded[name] == written[name] for name in ("state", "action"))


def resume(name: str, options: list[str]) -> int:
    words = ["train", "--config_path", "config.yaml", "--device", "cpu", "--experiment_name", name]
    return main([*words, "--resume_checkpoint", "auto", *options])


@pytest.mark.parametrize("name", OPTIONS)
def test_runs_of_an_earlier_version_go_on_to_the_same_end(name: str, here: Path, answers: Any) -> None:
    assert resume(name, OPTIONS[name]) == 0
    starts = json.loads((here / "runs" / name / "environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 7]
    lines = [json.loads(line) for line in (here / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    got = [(line["step"], key, line[key]) for line in lines for key in METRICS if key in line]
    expected = answers["resumed"][name]
    assert [entry[:2] for entry in got] == [tuple(entry[:2]) for entry in expected["metrics"]]
    np.testing.assert_allclose([entry[2] for entry in got], [entry[2] for entry in expected["metrics"]], rtol=1e-5)
    np.testing.assert_allclose(actions(here / "runs" / name / "checkpoints" / "last.pth.tar"), expected["actions"], atol=1e-5)


def test_a_run_folder_of_an_earlier_version_is_a_configuration(here: Path) -> None:
    words = ["train", "--config_path", "runs/random/config.yaml", "--device", "cpu", "--experiment_name", "again"]
    assert main([*words, "--epochs", "1", "--set", "training.stop_after_step=1"]) == 0


def test_a_weighted_streamed_run_of_an_earlier_version_is_refused_with_the_reason(here: Path, capfd: Any) -> None:
    assert resume("weighted", WEIGHTED) == 2
    error = capfd.readouterr().err
    assert "this would be another run" in error
    assert "the order in which weighted sources are streamed" in error
