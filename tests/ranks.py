"""Several training processes that find each other as under a launcher, at the price of a fork each; and what must be the same
however many they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from paligemma_vla.config import VLAConfig, config_from_dict
from paligemma_vla.training.checkpoint import LAST, load_checkpoint
from paligemma_vla.training.distributed import Distributed
from support import distance, identical, read_metrics
from zygote import Child, Result, Zygote

ALONE = Distributed(0, 1, torch.device("cpu"))


class Apart(Distributed):
    """One of many processes, the others of which are not there to be waited for."""

    def barrier(self) -> None:
        pass

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


def start_ranks(
    zygote: Zygote, config: VLAConfig, world_size: int, folder: Path, *flags: str, **environment: str
) -> list[Child]:
    """Start `paligemma-vla train` on that many ranks of one machine."""
    path = folder / f"{config.training.experiment_name}.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    command = ["train", "--config_path", str(path), "--device", "cpu", *flags]
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
        **environment,
    }
    return [
        zygote.start(command, folder, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else environment)
        for rank in range(world_size)
    ]


def train_on(zygote: Zygote, config: VLAConfig, world_size: int, folder: Path, *flags: str) -> list[Result]:
    """Train to the end; every rank has to get there."""
    results = [child.wait(120) for child in start_ranks(zygote, config, world_size, folder, *flags)]
    for rank, result in enumerate(results):
        assert result.status == 0, f"rank {rank}: {result.stderr}"
    return results


@dataclass(frozen=True)
class Reference:
    """A run that others are compared with. folder: for files of their configurations, and logs."""

    config: VLAConfig
    folder: Path
    zygote: Zygote

    def another(self, name: str, changes: dict[str, Any] | None = None) -> VLAConfig:
        """Its configuration, changed and under another name."""
        return config_from_dict(self.config.model_dump(mode="json"), {**(changes or {}), "training.experiment_name": name})

    def train(self, config: VLAConfig, world_size: int, *flags: str) -> list[Result]:
        return train_on(self.zygote, config, world_size, self.folder, *flags)


def last(config: VLAConfig) -> dict[str, Any]:
    return load_checkpoint(config.run_dir / "checkpoints" / LAST)


def assert_same_curve(config: VLAConfig, expected: VLAConfig) -> None:
    """Losses to 1e-5, all weights together to 1e-4, as everything that follows from the position in the run."""
    lines = [read_metrics(each.run_dir) for each in (config, expected)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for got, want in zip(*lines, strict=True):
        assert got.keys() == want.keys()
        for key in want.keys() & {"train/batch_loss", "train/lr", "val/epoch_loss", "val/action_mae"}:
            assert got[key] == pytest.approx(want[key], rel=1e-5), (want["step"], key)
        if "train/grad_norm" in want:
            assert got["train/grad_norm"] == pytest.approx(want["train/grad_norm"], rel=1e-4)
    got, want = last(config), last(expected)
    assert got["state_dict"].keys() == want["state_dict"].keys()
    assert distance(got["state_dict"].values(), want["state_dict"].values()) < 1e-4
    assert distance(got["ema"]["average"].values(), want["ema"]["average"].values()) < 1e-4
    for key in ("step", "epoch", "lr_scheduler", "data"):
        assert identical(got[key], want[key]), key
    assert got["optimizer"]["param_groups"] == want["optimizer"]["param_groups"]
    assert distance(*([moments(saved) for saved in (got, want)])) < 1e-3


def moments(saved: dict[str, Any]) -> list[torch.Tensor]:
    return [entry[name] for _, entry in sorted(saved["optimizer"]["state"].items()) for name in ("exp_avg", "exp_avg_sq")]
