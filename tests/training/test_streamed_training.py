"""Training on data that is read block by block: interrupted or not, the same run; another order is another run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from conftest import ConfigFactory
from lerobot_sets import write_set
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.errors import ConfigError
from paligemma_vla.training import preflight
from paligemma_vla.training.checkpoint import load_checkpoint
from support import identical, read_metrics, train_here

STREAMED = {"data.reading": "streamed", "data.stream_block_mb": 0.01, "data.stream_window": 2, "training.epochs": 3}


@pytest.mark.parametrize("weighted", [False, True])
def test_a_streamed_run_that_was_stopped_goes_on_bit_for_bit(
    tiny_config: ConfigFactory, episode_dir: Path, two_camera_dir: Path, weighted: bool
) -> None:
    settings: dict[str, Any] = {**STREAMED, "data.batch_size": 9}
    if weighted:
        sources = [{"path": str(episode_dir), "weight": 0.7}, {"path": str(two_camera_dir), "weight": 0.3}]
        settings |= {"data.train_parquet_files": sources, "training.epochs": 2}
    whole = tiny_config({**settings, "training.experiment_name": "whole"})
    trainer = train_here(whole)
    assert trainer.data.train.reader.blocks is not None
    assert trainer.data.validation.reader.blocks is None
    assert trainer.total_steps % trainer.data.order.steps_per_epoch == 0
    assert trainer.data.order.epoch_size % 9  # a smaller last batch
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reads ahead") and not thread.daemon]
    for stop in (3, 13):
        cut = tiny_config({**settings, "training.stop_after_step": stop, "data.num_workers": int(stop == 13)})
        train_here(cut, cut.run_dir / "checkpoints" / "last.pth.tar" if stop > 3 else None)
    rest = tiny_config({**settings, "training.save_every_n_steps": 5})
    train_here(rest, rest.run_dir / "checkpoints" / "last.pth.tar")
    expected, got = (load_checkpoint(config.run_dir / "checkpoints" / "last.pth.tar") for config in (whole, rest))
    for key in ("state_dict", "optimizer", "ema", "lr_scheduler", "rng", "epoch", "step"):
        assert identical(got[key], expected[key]), key
    assert read_metrics(rest.run_dir) == read_metrics(whole.run_dir)


def test_foreign_formats_are_read_in_random_order_only(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    index = EpisodeIndex.build(write_set(tmp_path / "set", video=False).name)
    with pytest.raises(ConfigError, match=r"data\.reading: got streamed, so data is streamed, but lerobot:"):
        preflight.check_episodes(index, tiny_config({"data.reading": "streamed"}))
    preflight.check_episodes(index, tiny_config())
