"""Training on data that is read block by block: interrupted or not, the same run; another order is another run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lerobot_sets import write_set
from paligemma_vla.config import VLAConfig, config_from_dict
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.order import RunSampler, SampleOrder, StreamedOrder
from paligemma_vla.errors import CheckpointError, ConfigError
from paligemma_vla.training import preflight
from paligemma_vla.training.checkpoint import load_checkpoint
from paligemma_vla.training.run import check_same_run
from ranks import ALONE, train_on
from support import distance, identical, read_metrics, train_here
from zygote import Zygote

ConfigFactory = Callable[..., VLAConfig]
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


def test_a_streamed_run_of_several_processes_is_that_of_one(tiny_config: ConfigFactory, zygote: Zygote, tmp_path: Path) -> None:
    """With accumulation, and a last batch that leaves a rank without samples."""
    settings = {**STREAMED, "data.batch_size": 12, "training.gradient_accumulation_steps": 2}
    runs = {size: {**settings, "training.experiment_name": f"of_{size}"} for size in (1, 2)}
    for size, run in runs.items():
        train_on(zygote, tiny_config(run), size, tmp_path)
    one, two = (tiny_config(run).run_dir for run in runs.values())
    lines = [[line for line in read_metrics(folder) if "train/batch_loss" in line] for folder in (one, two)]
    assert [line["step"] for line in lines[1]] == [line["step"] for line in lines[0]]
    for got, expected in zip(lines[1], lines[0], strict=True):
        assert got["train/batch_loss"] == pytest.approx(expected["train/batch_loss"], rel=1e-5)
    weights = [load_checkpoint(folder / "checkpoints" / "last.pth.tar")["state_dict"].values() for folder in (one, two)]
    assert distance(weights[1], weights[0]) < 1e-4


def test_both_ways_train_on_the_same_samples_of_an_epoch_in_another_order(tiny_config: ConfigFactory) -> None:
    drawn = []
    for reading in ("random", "streamed"):
        _, data, _ = preflight.prepare(tiny_config({**STREAMED, "data.reading": reading}), ALONE)
        run = RunSampler(data.order, 0, data.order.steps_per_epoch, 0, 1, 1)
        drawn.append([ref.sample for refs in run for ref in refs])
        assert isinstance(data.order, StreamedOrder if reading == "streamed" else SampleOrder)
        assert (data.train.reader.blocks is not None) is (reading == "streamed")
    assert drawn[0] != drawn[1]
    assert sorted(drawn[0]) == sorted(drawn[1])


def test_a_resume_in_another_order_is_refused_and_an_old_checkpoint_is_of_random_order(
    tiny_config: ConfigFactory, trained_run: Path
) -> None:
    saved = load_checkpoint(trained_run / "checkpoints" / "last.pth.tar")
    now: dict[str, Any] = {"optimizer.lr": 5e-3}

    def differences(change: dict[str, Any]) -> list[str]:
        try:
            check_same_run(saved, tiny_config({**now, **change}, cameras=2), saved["data"], "x")
        except CheckpointError as error:
            return [line.strip() for line in str(error).splitlines()[1:]]
        return []

    assert differences({"data.reading": "random"}) == []
    assert differences({"data.stream_window": 9}) == []  # of no account in random order
    (line,) = [line for line in differences({"data.reading": "streamed"}) if line.startswith("data.reading")]
    assert line == "data.reading: 'random' in the checkpoint, 'streamed' now"
    for name in ("reading", "stream_block_mb", "stream_window"):
        del saved["config"]["data"][name]
    assert differences({}) == []
    assert any(line.startswith("data.reading: 'random'") for line in differences({"data.reading": "streamed"}))
    saved["config"] = config_from_dict(saved["config"], {"data.reading": "streamed"}).model_dump(mode="json")
    assert differences({"data.reading": "streamed"}) == []
    assert [line.split(":")[0] for line in differences({"data.reading": "streamed", "data.stream_window": 9})] == [
        "data.stream_window"
    ]
    assert any(line.startswith("data.reading: 'streamed'") for line in differences({}))


def test_foreign_formats_are_read_in_random_order_only(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    index = EpisodeIndex.build(write_set(tmp_path / "set", video=False).name)
    with pytest.raises(ConfigError, match=r"data\.reading: got streamed, so data is streamed, but lerobot:"):
        preflight.check_reading(index, tiny_config({"data.reading": "streamed"}))
    preflight.check_reading(index, tiny_config())


def test_a_weighted_streamed_run_of_an_older_order_is_refused(tiny_config: ConfigFactory, trained_run: Path) -> None:
    """Its samples would come in another order from here on. Older checkpoints say nothing of an order."""
    saved = load_checkpoint(trained_run / "checkpoints" / "last.pth.tar")
    sources = [{"path": "a", "weight": 3.0}, {"path": "b", "weight": 1.0}]
    changes = {**STREAMED, "data.train_parquet_files": sources, "optimizer.lr": 5e-3}
    config = tiny_config(changes, cameras=2)
    saved["config"] = config.model_dump(mode="json")
    order = StreamedOrder([np.array([9]), np.array([9])], [3.0, 1.0], 4, 0, 2)
    now = {**saved["data"], "order": order.version}
    with pytest.raises(
        CheckpointError, match=r"weighted sources are streamed\): None in the checkpoint, 'streamed by weight, 2' now"
    ):
        check_same_run(saved, config, now, "x")
    saved["data"] = now
    check_same_run(saved, config, now, "x")


def test_the_order_of_weighted_sources_is_of_each_source_and_stored_with_the_run(
    tiny_config: ConfigFactory, episode_dir: Path, two_camera_dir: Path
) -> None:
    sources = [{"path": str(episode_dir), "weight": 3.0}, {"path": str(two_camera_dir), "weight": 1.0}]
    config = tiny_config({**STREAMED, "data.train_parquet_files": sources, "data.batch_size": 8, "data.val_fraction": 0.0})
    _, data, _ = preflight.prepare(config, ALONE)
    first, total = int(data.order.sizes[0]), data.order.epoch_size
    drawn = np.concatenate([data.order.batch(step)[1] for step in range(data.order.steps_per_epoch)])
    assert np.count_nonzero(drawn < first) == round(0.75 * total)
    assert data.fingerprint["order"] == data.order.version
    unweighted = config.model_copy(update={"data": config.data.model_copy(update={"train_parquet_files": str(episode_dir)})})
    assert "order" not in preflight.prepare(unweighted, ALONE)[1].fingerprint
