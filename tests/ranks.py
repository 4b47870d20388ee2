"""Several training processes that find each other as under a launcher, at the price of a fork each."""

from __future__ import annotations

import socket
from pathlib import Path

from paligemma_vla.config import VLAConfig
from zygote import Child, Result, Zygote


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        "MASTER_PORT": str(free_port()),
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
