"""Memory of a training run against the size of its data: `python -m benchmarks.memory [GB ...]` (default: 1 4).

Peak anonymous memory (what no file on disk stands behind) of the main process and of its loader processes, each read from
/proc while `paligemma-vla train` runs with the default cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import demo_config, write_episodes
from paligemma_vla.data.episodes import EpisodeIndex
from paligemma_vla.model.tiny import TinySpec

SIDE, LENGTH, WORKERS, BATCH, STEPS = 640, 100, 2, 16, 250
SPEC = TinySpec(image_size=32, patch_size=16, width=32, vision_layers=1, text_layers=1, heads=2)


def measure(sizes: list[float], folder: Path) -> list[dict[str, float]]:
    """One row per size in GB, in rising order: steps, index bytes, peak MB of the main process and of the larger worker."""
    rows = []
    for size in sizes:
        _grow(folder / "episodes", size)
        config = demo_config(
            folder,
            SPEC,
            cameras=1,
            data__batch_size=BATCH,
            data__num_workers=WORKERS,
            training__max_steps=STEPS,
            training__save_every_n_epochs=1000,
        )
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        main, worker = peaks(folder)
        index = EpisodeIndex.build(str(folder / "episodes"))
        rows.append({"gb": size, "steps": index.steps, "index_bytes": index.nbytes, "main_mb": main, "worker_mb": worker})
    return rows


def _grow(folder: Path, size: float) -> None:
    while sum(path.stat().st_size for path in folder.glob("*.parquet")) < size * 1e9:
        write_episodes(folder, episodes=64, length=LENGTH, side=SIDE, cameras=1, state_dim=8, action_dim=8)


def peaks(folder: Path) -> tuple[float, float]:
    """Peak anonymous MB of the main process of a run and of the largest of its loader processes."""
    command = [sys.executable, "-m", "paligemma_vla.cli.main", "train", "--config_path", "config.yaml", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    highest: dict[int, float] = {}
    log = folder / "log.txt"
    with log.open("w") as told, subprocess.Popen(command, cwd=folder, env=environment, stderr=told) as process:
        while process.poll() is None:
            for pid in [process.pid, *_descendants(process.pid)]:
                highest[pid] = max(highest.get(pid, 0.0), _anonymous(pid))
            time.sleep(0.02)
    if process.returncode != 0:
        raise RuntimeError(f"training failed:\n{log.read_text()[-2000:]}")
    main = highest.pop(process.pid)
    return main, max(highest.values())


def _descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)


def _anonymous(pid: int) -> float:
    """RssAnon in MB; 0 of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon:")), 0.0)


def table(rows: list[dict[str, float]]) -> str:
    """The rows as Markdown."""
    lines = ["| data, GB | steps | index, kB | main process, MB | loader process, MB |", "|---|---|---|---|---|"]
    for row in rows:
        index = row["index_bytes"] / 1e3
        lines.append(f"| {row['gb']:g} | {row['steps']:,} | {index:.0f} | {row['main_mb']:.0f} | {row['worker_mb']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    sizes = [float(size) for size in sys.argv[1:]] or [1.0, 4.0]
    with tempfile.TemporaryDirectory() as folder:
        print(table(measure(sizes, Path(folder))))


if __name__ == "__main__":
    main()
