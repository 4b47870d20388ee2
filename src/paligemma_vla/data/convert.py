"""From one format to another: shard by shard, in parallel, resumable, and compared with the source before it counts as done.

The work goes on in `OUTPUT.partial` beside the output folder. Only what is whole and has been compared gets the output's name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paligemma_vla.data.compare import Comparison, compare_episode
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import Recording, Recordings
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.storage import atomic_write, lock_file
from paligemma_vla.workers import WorkerPool

RECORD, LOCK = ".conversion.json", ".lock"
VERSION = 1
Progress = Callable[[int], contextlib.AbstractContextManager[Any]]
logger = logging.getLogger(__name__)


class Target(Protocol):
    """A format to write. Plain data, since it is sent to worker processes."""

    @property
    def lossless(self) -> bool:
        """Whether pixels must come out as they went in."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is written, as plain data."""

    def shards(self, lengths: Sequence[int]) -> list[range]:
        """Which episodes go together into a shard, given the length of each."""

    def is_written(self, folder: Path, shard: int) -> bool:
        """Whether a shard is whole."""

    def write(self, folder: Path, shard: int, first: tuple[int, int], recordings: Iterator[Recording]) -> None:
        """Write a shard; killed meanwhile, it is not whole. first: number of its first episode and step."""

    def finish(self, folder: Path, shards: int) -> None:
        """What is left to do when all shards are whole."""

    def place(self, folder: Path) -> str:
        """What the result is read by."""

    def tidy(self, folder: Path) -> None:
        """Take away what only an unfinished conversion needs."""


@dataclass(frozen=True)
class Conversion:
    """One conversion: the episodes of `index`, of which the cameras numbered `cameras` (from 0), into `output`."""

    index: EpisodeIndex
    cameras: tuple[int, ...]
    target: Target
    output: Path

    @property
    def partial(self) -> Path:
        output = Path(os.path.abspath(self.output))
        return output.with_name(f"{output.name}.partial")

    def record(self) -> dict[str, Any]:
        """What a resumed conversion must agree in, and what stays with its result."""
        source = {"fingerprint": self.index.fingerprint, "episodes": len(self.index), "cameras": self.cameras}
        record: dict[str, Any] = json.loads(json.dumps({"version": VERSION, "source": source, "target": self.target.settings}))
        return record


def convert(conversion: Conversion, workers: int, progress: Progress) -> Comparison | None:
    """Convert, compare, publish; returns what was compared, None when the output was there already, whole.

    progress: called with the number of time steps, each counted once when written and once when compared. workers:
    processes; 0 does it all in this one. Raises `DataError`: for an output that is something else, for a source that cannot be
    read, and for a result that differs from it.
    """
    if _is_done(conversion):
        conversion.target.tidy(conversion.output)
        return None
    lengths = conversion.index.length.tolist()
    shards = conversion.target.shards(lengths)
    pool = WorkerPool(workers, _prepare, (conversion,))
    with _workspace(conversion) as folder, progress(2 * sum(lengths)) as bar, pool:
        missing = [number for number in range(len(shards)) if not conversion.target.is_written(folder, number)]
        bar.update(sum(lengths) - sum(_steps(lengths, shards[number]) for number in missing))
        if len(missing) < len(shards):
            logger.info("%s: going on, %d of %d shards are there", folder, len(shards) - len(missing), len(shards))
        firsts = np.cumsum([0, *lengths]).tolist()
        for steps in pool.map(_write, ((number, shards[number], firsts[shards[number].start]) for number in missing)):
            bar.update(steps)
        conversion.target.finish(folder, len(shards))
        _build(conversion, folder)
        comparison = Comparison()
        for part in pool.map(_compare, shards):
            comparison += part
            bar.update(part.steps)
    conversion.target.tidy(conversion.output)
    return comparison


def _steps(lengths: Sequence[int], episodes: range) -> int:
    return sum(lengths[episode] for episode in episodes)


def _is_done(conversion: Conversion) -> bool:
    """Whether the output is there, whole. Raises `DataError` when it is something else, or has lost files."""
    output = conversion.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if _recorded(output) != conversion.record():
        raise DataError(f"{output}: is there already, and is not this conversion; delete it, or give another --output_dir")
    try:
        _build(conversion, output)
    except DataError as error:
        text = f"its record is there, its files are not, or differ ({first_line(error)})"
        raise DataError(f"{output}: {text}; delete it and convert again") from error
    return True


def _recorded(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _workspace(conversion: Conversion) -> Iterator[Path]:
    """The folder to work in, held by this process; what it holds gets the output's name in the end.

    What failed before any shard was whole leaves no folder: it has nothing to go on from, and another conversion may follow.
    """
    folder = conversion.partial
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / LOCK)
    if lock is None:
        raise DataError(f"{folder}: another process converts into it; wait for it, or give another --output_dir")
    try:
        if (folder / RECORD).exists() and _recorded(folder) != conversion.record():
            text = "holds what another conversion, or one of other data, left unfinished"
            raise DataError(f"{folder}: {text}; delete it, or give another --output_dir")
        if not (folder / RECORD).exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise DataError(f"{folder}: is there already, and no conversion made it; move it, or give another --output_dir")
        atomic_write(folder / RECORD, json.dumps(conversion.record(), indent=1))
        try:
            yield folder
        except BaseException:
            shards = range(len(conversion.target.shards(conversion.index.length.tolist())))
            if not any(conversion.target.is_written(folder, number) for number in shards):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        (folder / LOCK).unlink()
        try:
            folder.replace(conversion.output)
        except OSError as error:
            text = f"cannot be made ({first_line(error)}); the result is in {folder}, name it yourself"
            raise DataError(f"{conversion.output}: {text}") from error
    finally:
        lock.release()


def _build(conversion: Conversion, folder: Path) -> EpisodeIndex:
    """The index of the result in a folder. Raises `DataError` when it has other episodes than the source."""
    result = EpisodeIndex.build(conversion.target.place(folder), str(folder))
    got, expected = result.length.tolist(), conversion.index.length.tolist()
    if got != expected:
        counts = f"got {len(got)} episodes of {sum(got)} steps, expected {len(expected)} of {sum(expected)}"
        raise DataError(f"{folder}: {counts}, each as long as in the source; delete it and convert again")
    return result


class _Worker:
    """What a process keeps from job to job."""

    def __init__(self, conversion: Conversion) -> None:
        self.conversion = conversion
        self.source = Recordings(conversion.index, conversion.cameras)

    @cached_property
    def result(self) -> Recordings:
        return Recordings(_build(self.conversion, self.conversion.partial), range(len(self.conversion.cameras)))


_worker: list[_Worker] = []


def _prepare(conversion: Conversion) -> None:
    _worker[:] = [_Worker(conversion)]


def _write(job: tuple[int, range, int]) -> int:
    """Write one shard; returns its steps."""
    number, episodes, first_step = job
    worker = _worker[0]
    recordings = (worker.source.read(episode) for episode in episodes)
    worker.conversion.target.write(worker.conversion.partial, number, (episodes.start, first_step), recordings)
    return _steps(worker.conversion.index.length.tolist(), episodes)


def _compare(episodes: range) -> Comparison:
    worker = _worker[0]
    lossless = worker.conversion.target.lossless
    return sum((compare_episode(worker.source, worker.result, episode, lossless) for episode in episodes), Comparison())
