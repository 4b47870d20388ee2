"""What cannot work is told before a weight is loaded, all of it at once."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ConfigFactory
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.order import Order, SampleOrder, StreamedOrder
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.errors import VLAError
from paligemma_vla.training import preflight
from paligemma_vla.training.trainer import Trainer
from ranks import ALONE, Apart
from support import write_episodes


def message(config: VLAConfig, processes: int = 1) -> str:
    with pytest.raises(VLAError) as caught:
        preflight.prepare(config, Apart(0, processes, torch.device("cpu")))
    return str(caught.value)


def test_every_fault_of_data_statistics_tokenizer_and_sizes_is_told_at_once(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    config = tiny_config(
        {
            "data.state_dim": 5,
            "data.batch_size": 1001,
            "data.normalization_stats_path": str(tmp_path / "missing.json"),
            "model.vlm_config.model_name_or_path": str(tmp_path / "no-model"),
            "model.vlm_config.num_cameras": 3,
            "model.action_head_config.horizon": 41,
            "model.action_head_config.per_action_dim": 9,
        }
    )
    told = message(config, processes=1002)
    for words in (
        "data.batch_size: got 1001, expected at least processes * gradient_accumulation_steps = 1002",
        "data.batch_size: got 1001, expected at most ",
        "missing.json",
        "cannot load '",
        "model.action_head_config.horizon: got 41, expected at most 40, the steps of the longest training episode",
        "data.state_dim: got 5, expected 3 as in column state",
        "per_action_dim: got 9, expected 2 as in column action",
        "expects 3 cameras, the data has 1",
    ):
        assert words in told


def test_statistics_of_other_dimensions_are_refused(tiny_config: ConfigFactory, tmp_path: Path, statistics_path: Path) -> None:
    raw = json.loads(statistics_path.read_text())
    raw["action"] = raw["state"]
    (tmp_path / "stats.json").write_text(json.dumps(raw))
    told = message(tiny_config({"data.normalization_stats_path": str(tmp_path / "stats.json")}))
    assert "statistics of 3 action dimensions, the data has 2" in told


def test_statistics_of_other_data_are_refused_unless_allowed(
    tiny_config: ConfigFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Numbers ten times as large are other data; the same files under another name are not."""
    here = tmp_path / "data"
    write_episodes(here)
    statistics = compute_statistics(str(here), "test")
    path = tmp_path / "stats.json"
    statistics.save(path)
    settings = {"data.train_parquet_files": str(here), "data.normalization_stats_path": str(path)}
    moved = here.rename(tmp_path / "moved")
    with caplog.at_level(logging.WARNING):
        preflight.prepare(tiny_config({**settings, "data.train_parquet_files": str(moved)}), ALONE)
    assert not caplog.records

    raw = json.loads(path.read_text())
    raw["digests"] = []
    path.write_text(json.dumps(raw))
    settings["data.train_parquet_files"] = str(moved)
    with caplog.at_level(logging.WARNING):
        preflight.prepare(tiny_config(settings), ALONE)  # other files, but numbers like theirs
    assert "was not computed from 3 of the 3 training files" in caplog.text

    for name in ("mean", "q99", "max"):
        raw["action"][name][1] = 0.1
    path.write_text(json.dumps(raw))
    told = message(tiny_config(settings))
    assert f"{path} is of other data: {moved}" in told
    assert "column action, dimension 1 (dy): got 0." in told
    assert "and 0.1; compute the statistics of this data" in told
    preflight.prepare(tiny_config({**settings, "data.allow_other_statistics": True}), ALONE)


@pytest.mark.parametrize("resuming", [False, True])
def test_faults_are_told_before_the_backbone_is_loaded(
    tiny_config: ConfigFactory, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, resuming: bool
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the backbone was loaded")

    monkeypatch.setattr("paligemma_vla.training.trainer.VLAModel", load)
    config = tiny_config({"data.batch_size": 999}, cameras=2)
    with pytest.raises(VLAError, match=r"data\.batch_size: got 999, expected at most"):
        Trainer(config, ALONE, checkpoint if resuming else None)


@pytest.mark.parametrize(("reading", "kind"), [("random", SampleOrder), ("streamed", StreamedOrder)])
def test_sources_are_mixed_by_weight_and_validation_is_split_off_each(
    tiny_config: ConfigFactory, episode_dir: Path, two_camera_dir: Path, reading: str, kind: type[Order]
) -> None:
    sources = [{"path": str(episode_dir), "weight": 3.0}, {"path": str(two_camera_dir), "weight": 1.0}]
    settings = {"data.reading": reading, "data.stream_block_mb": 0.01, "data.batch_size": 8}
    _, data, _ = preflight.prepare(tiny_config({**settings, "data.train_parquet_files": sources}), ALONE)
    samples = np.concatenate([data.order.batch(step)[1] for step in range(data.order.steps_per_epoch)])
    of_first = [data.train.where(int(sample)).startswith(str(episode_dir)) for sample in samples]
    assert np.mean(of_first) == pytest.approx(0.75, abs=0.01)
    assert isinstance(data.order, kind)
    assert data.fingerprint.get("order") == data.order.version
    assert data.validation is not None
    held_out, trained_on = ({each.where(n) for n in range(len(each))} for each in (data.validation, data.train))
    assert {place.rpartition("/")[0] for place in held_out} == {str(episode_dir), str(two_camera_dir)}
    assert not held_out & trained_on


def test_source_inside_another_trains_on_nothing_that_is_held_out(tiny_config: ConfigFactory, episode_dir: Path) -> None:
    """A subset of the data that is to weigh more."""
    subset = str(episode_dir / "episodes-00000.parquet")
    sources = [{"path": str(episode_dir), "weight": 1.0}, {"path": subset, "weight": 3.0}]
    _, data, _ = preflight.prepare(tiny_config({"data.train_parquet_files": sources, "data.val_fraction": 0.3}), ALONE)
    assert data.validation is not None
    held_out, trained_on = ({data_set.where(n) for n in range(len(data_set))} for data_set in (data.validation, data.train))
    assert held_out
    assert not held_out & trained_on
    assert any(place.startswith(subset) for place in held_out)


def test_copies_are_told_wherever_they_are(
    tiny_config: ConfigFactory, episode_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """But not the same file in two weighted sources, which is meant so."""
    path = str(episode_dir / "episodes-00000.parquet")
    copy = shutil.copy(path, str(tmp_path / "copy.parquet"))
    (tmp_path / "link.parquet").symlink_to(path)
    twice = [{"path": path, "weight": 2.0}, {"path": str(tmp_path / "link.parquet"), "weight": 1.0}]
    for training, validation, told in ((twice, None, False), ([path, copy], None, True), ([path], copy, True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            preflight.prepare(tiny_config({"data.train_parquet_files": training, "data.val_parquet_files": validation}), ALONE)
        assert (f"{copy}: has the same content as {path}, so its episodes count twice" in caplog.text) == told


def test_validation_files_that_are_trained_on_are_told(
    tiny_config: ConfigFactory, episode_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        preflight.prepare(tiny_config({"data.val_parquet_files": str(episode_dir / "episodes-00000.parquet")}), ALONE)
    assert "data.val_parquet_files: 4 of 4 episodes are trained on as well" in caplog.text
