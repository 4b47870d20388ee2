"""What the benchmarks share: synthetic episodes, a configuration, and timing as the best of several repeats."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from paligemma_vla import versions
from paligemma_vla.config import VLAConfig, config_from_dict
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma
from paligemma_vla.schema import DatasetMetadata, Episode


@dataclass(frozen=True)
class Row:
    """One line of the table. `better` is `higher` or `lower`; spread: from the fastest to the slowest repeat, in `unit`.

    ratio: how many times better than `against`, measured in the same run. share: of `limit`, a physical one, reached.
    """

    name: str
    value: float
    unit: str
    better: str
    spread: tuple[float, float] | None = None
    ratio: float | None = None
    against: str | None = None
    share: float | None = None
    limit: str | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of the repeats of one thing."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def in_ms(self) -> tuple[float, str, str, tuple[float, float]]:
        """Value, unit, direction and spread of a `Row`."""
        return self.median * 1e3, "ms", "lower", (min(self.seconds) * 1e3, max(self.seconds) * 1e3)

    def rate(self, number: float, unit: str) -> tuple[float, str, str, tuple[float, float]]:
        """Value, unit, direction and spread of a `Row`, where each repeat did `number` things."""
        return number / self.median, unit, "higher", (number / max(self.seconds), number / min(self.seconds))


def interleaved(
    runs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Times]:
    """Seconds of several things, one after the other in each of several rounds, so that a slow minute is everybody's.

    Each has run once before, untimed. clock: `time.process_time` for what one process does alone: other programs that use its
    cores do not count.
    """
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = clock()
            run()
            taken[name].append(clock() - began)
    return {name: Times(tuple(seconds)) for name, seconds in taken.items()}


def read_bytes_per_second() -> float:
    """What all threads together read from memory: the sum of numbers that no cache holds."""
    numbers = torch.ones(2**27)  # 512 MB
    return numbers.nbytes / best_seconds(numbers.sum)


def matrix_product_flops(dtype: torch.dtype) -> float:
    """Operations a second of all threads together, in a product of the size of a layer of a large model."""
    size = 2048
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    torch.mm(left, right)
    return 2 * size**3 / best_seconds(lambda: torch.mm(left, right))


def environment(command: str) -> dict[str, Any]:
    """What a result depends on: command, date, commit, hardware, versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "hardware": f"{os.cpu_count()} cores, {_processor()}, torch threads {torch.get_num_threads()}",
        "versions": versions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def best_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Shortest of several runs: on a shared machine the one least disturbed."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def alone(stage: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a stage measures in a fresh process, with its wall time and peak memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(stage, arguments, sender))
    process.start()
    sender.close()
    try:
        measured: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{stage.__name__}: the process ended with {process.exitcode}") from None
    process.join()
    print(stage.__name__, measured, flush=True)
    return measured


def _run(stage: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], sender: Any) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    measured = stage(*arguments)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send({**measured, "wall_s": round(seconds, 1), "peak_gb": round(peak / 1e9, 2)})


def write_episodes(folder: Path, episodes: int, length: int, side: int, cameras: int, state_dim: int, action_dim: int) -> None:
    """Episodes with smooth pictures, as cameras make them (noise would not compress)."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(16):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        pictures.append(stream.getvalue())
    with EpisodeWriter(folder, DatasetMetadata(robot="benchmark")) as writer:
        for _ in range(episodes):
            images = [[pictures[i] for i in rng.integers(0, len(pictures), length)] for _ in range(cameras)]
            state = rng.standard_normal((length, state_dim)).astype(np.float32)
            action = rng.standard_normal((length, action_dim)).astype(np.float32)
            writer.write(Episode(images, state, action, "open the drawer"))


def demo_config(folder: Path, spec: TinySpec, cameras: int, **overrides: object) -> VLAConfig:
    """A configuration over `folder/episodes` and a tiny backbone, statistics included; overrides are dotted keys."""
    write_tiny_paligemma(folder / "backbone", spec)
    statistics = compute_statistics(str(folder / "episodes"), "benchmark")
    statistics.save(folder / "stats.json")
    base = {
        "data": {
            "train_parquet_files": str(folder / "episodes"),
            "normalization_stats_path": str(folder / "stats.json"),
            "state_dim": len(statistics.state.min),
            "num_workers": 0,
            "val_fraction": 0.0,
        },
        "model": {
            "vlm_config": {
                "model_name_or_path": str(folder / "backbone"),
                "dtype": "float32",
                "num_cameras": cameras,
            },
            "action_head_config": {
                "per_action_dim": len(statistics.action.min),
                "embed_dim": 128,
                "num_layers": 3,
                "num_heads": 4,
                "num_flow_samples": 4,
            },
        },
        "training": {"checkpoint_dir": str(folder / "experiments")},
    }
    return config_from_dict(base, {key.replace("__", "."): value for key, value in overrides.items()})
