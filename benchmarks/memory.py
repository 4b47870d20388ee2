"""Memory of a training run against the size of its data: `python -m benchmarks.memory [--gigabytes 1 4 16] [--folder F]`.

Peak anonymous memory (what no file on disk stands behind) of the main process and of its loader processes, each read from
/proc while `paligemma-vla train` runs with the default settings, in both ways of reading. The first gigabyte is written, the
rest are hard links to it under other names: to whoever reads them files of their own, which no page cache is asked about.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from benchmarks.common import demo_config, environment, write_episodes
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.model.tiny import TinySpec

RESULTS = Path(__file__).parent / "results" / "memory.json"
SIDE, LENGTH, WORKERS, BATCH, STEPS = 640, 100, 2, 16, 250
SPEC = TinySpec(image_size=32, patch_size=16, width=32, vision_layers=1, text_layers=1, heads=2)


@dataclass(frozen=True)
class Line:
    """One run: size and way of reading, what the data is, peak MB of the main process and of the larger of its loaders."""

    gb: float
    reading: str
    files: int
    steps: int
    index_bytes: int
    main_mb: float
    worker_mb: float


def measure(sizes: Sequence[float], folder: Path) -> list[Line]:
    """A line per size in GB, in rising order, and way of reading."""
    lines = []
    for size in sizes:
        _grow(folder / "episodes", size)
        index = EpisodeIndex.build(str(folder / "episodes"))
        for reading in ("random", "streamed"):
            config = demo_config(
                folder,
                SPEC,
                cameras=1,
                data__batch_size=BATCH,
                data__num_workers=WORKERS,
                data__reading=reading,
                training__max_steps=STEPS,
                training__save_every_n_epochs=1000,
                training__experiment_name=f"{reading}_{size:g}",
            )
            (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            main, worker = peaks(folder)
            lines.append(Line(size, reading, len(index.paths), index.steps, index.nbytes, main, worker))
    return lines


def _grow(folder: Path, size: float) -> None:
    """Let a folder have at least so many GB, of which at most one is written."""
    while _gigabytes(folder) < min(size, 1.0):
        write_episodes(folder, episodes=64, length=LENGTH, side=SIDE, cameras=1, state_dim=8, action_dim=8)
    written = sorted(folder.glob("episodes-*.parquet"))
    for copy in count():
        for path in written:
            if _gigabytes(folder) >= size:
                return
            link = folder / path.name.replace("episodes", f"copy_{copy:03d}")
            if not link.exists():
                link.hardlink_to(path)


def _gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.parquet")) / 1e9


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


def table(lines: Sequence[Line]) -> str:
    """The lines as Markdown."""
    rows = [
        "| data, GB | reading | files | steps | index, kB | main process, MB | loader process, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        size, index = f"{line.gb:g} | {line.reading} | {line.files}", f"{line.index_bytes / 1e3:.0f}"
        rows.append(f"| {size} | {line.steps:,} | {index} | {line.main_mb:.0f} | {line.worker_mb:.0f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0], help="sizes, rising (default: 1 4)")
    parser.add_argument("--folder", type=Path, help="where the data is put (default: a temporary folder)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        lines = measure(given.gigabytes, Path(folder))
    print(table(lines))
    command = "python -m benchmarks.memory --gigabytes " + " ".join(f"{size:g}" for size in given.gigabytes)
    RESULTS.write_text(json.dumps({**environment(command), "rows": [asdict(line) for line in lines]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
