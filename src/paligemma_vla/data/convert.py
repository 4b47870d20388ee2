"""From one format to another: shard by shard, in parallel, resumable, and verified against the source before it counts as done.

The work goes on in `OUTPUT.partial` beside the output folder. Only what is complete and verified gets the output's name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import numpy as np

from paligemma_vla.data.images import encode_image
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import Picture, Recording, Recordings
from paligemma_vla.data.writer import IMAGE_MAGIC, EpisodeWriter
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import DatasetMetadata, Episode
from paligemma_vla.storage import atomic_write, lock_file
from paligemma_vla.workers import WorkerPool

RECORD, LOCK, WORK = ".conversion.json", ".lock", ".shard"
VERSION = 1
NATIVE_EPISODES = 16  # of a file: few enough that a small data set keeps several processes busy
SAMPLED = 4  # images of an episode and camera that are decoded and compared, when their bytes are not the same
LEAST_PSNR = 20.0  # dB; a lossy codec's usual pictures have 30 and more, another picture has 10 or so
CLOSER = 1.0  # mean difference in levels by which a picture's neighbour may be more like it without a complaint
Progress = Callable[[int], contextlib.AbstractContextManager[Any]]
logger = logging.getLogger(__name__)


class OutputFormat(Protocol):
    """A format to write: `NativeOutput` below, `formats.lerobot_writer.LeRobotOutput`. A dataclass of all that decides what is
    written; it is pickled for worker processes.

    name: of the format. prefix: before a folder, in the name that it is read by.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]

    @property
    def lossless(self) -> bool:
        """True if pixels must come out as they went in."""

    def shards(self, lengths: Sequence[int]) -> list[range]:
        """The episodes of each shard, given the length of every episode."""

    def is_written(self, folder: Path, shard: int) -> bool:
        """True if a shard is complete."""

    def write(self, folder: Path, shard: int, first: tuple[int, int], recordings: Iterator[Recording]) -> None:
        """Write a shard; when this is killed, it is not complete. first: number of its first episode and step."""

    def finish(self, folder: Path, shards: int) -> None:
        """What is left to do when all shards are complete. Folders `.shard*` are removed after it."""


@dataclass(frozen=True)
class NativeOutput:
    """Episode files, by `EpisodeWriter`. Frames of videos become PNG, or JPEG of `quality`; encoded images stay as they are."""

    name: ClassVar = "native"
    prefix: ClassVar = ""
    metadata: DatasetMetadata
    image_format: str
    quality: int

    @property
    def lossless(self) -> bool:
        return self.image_format == "png"

    def shards(self, lengths: Sequence[int]) -> list[range]:
        return [range(n, min(n + NATIVE_EPISODES, len(lengths))) for n in range(0, len(lengths), NATIVE_EPISODES)]

    def is_written(self, folder: Path, shard: int) -> bool:
        return self._path(folder, shard).is_file()

    def write(self, folder: Path, shard: int, first: tuple[int, int], recordings: Iterator[Recording]) -> None:
        own = folder / f"{WORK}-{shard:05d}"
        shutil.rmtree(own, ignore_errors=True)
        with EpisodeWriter(own, self.metadata, episodes_per_file=NATIVE_EPISODES) as writer:
            for recording in recordings:
                writer.write(self._episode(recording))
        (written,) = own.glob("*.parquet")
        written.replace(self._path(folder, shard))
        own.rmdir()

    def finish(self, folder: Path, shards: int) -> None:
        """Nothing: each file describes itself."""

    def _path(self, folder: Path, shard: int) -> Path:
        return folder / f"episodes-{shard:05d}.parquet"

    def _episode(self, recording: Recording) -> Episode:
        prompt = recording.prompts[0]
        for step, text in enumerate(recording.prompts):
            if text != prompt:
                got = f"step {step}: got the instruction {text[:60]!r}, expected {prompt[:60]!r} as at the first step"
                raise DataError(f"{recording.where()}: {got}: an episode file has one; read the data directly: lerobot:PATH")
        images = [[None if picture is None else self._encoded(picture) for picture in camera] for camera in recording.images]
        return Episode(images, recording.state, recording.action, prompt, recording.is_terminal)

    def _encoded(self, picture: Picture) -> bytes:
        data = picture.encoded()
        if data is not None and data.startswith(IMAGE_MAGIC):
            return data
        return encode_image(picture.decode(), self.image_format, self.quality)


@dataclass(frozen=True)
class Conversion:
    """One conversion: the episodes of `index`, of which the cameras numbered `cameras` (from 0), into the folder `output`."""

    index: EpisodeIndex
    cameras: tuple[int, ...]
    form: OutputFormat
    output: Path

    @property
    def partial(self) -> Path:
        output = Path(os.path.abspath(self.output))
        return output.with_name(f"{output.name}.partial")

    @cached_property
    def shards(self) -> list[range]:
        return self.form.shards(self.index.length.tolist())

    def steps(self, shard: int) -> int:
        episodes = self.shards[shard]
        return int(self.index.length[episodes.start : episodes.stop].sum())

    def written(self) -> list[bool]:
        """For each shard, True if it is complete."""
        return [self.form.is_written(self.partial, shard) for shard in range(len(self.shards))]

    def record(self) -> dict[str, Any]:
        """What a resumed conversion must agree in, and what stays with its result."""
        source = {"fingerprint": self.index.fingerprint, "episodes": len(self.index), "cameras": self.cameras}
        target = {"format": self.form.name, **asdict(cast(Any, self.form))}
        record: dict[str, Any] = json.loads(json.dumps({"version": VERSION, "source": source, "target": target}))
        return record

    def recorded(self, folder: Path) -> bool:
        """True if the record in a folder is the one of this conversion."""
        try:
            return bool(json.loads((folder / RECORD).read_bytes()) == self.record())
        except (OSError, ValueError):
            return False

    def result(self, folder: Path) -> EpisodeIndex:
        """The index of the result in a folder. Raises `DataError` when it has other episodes than the source."""
        result = EpisodeIndex.build(f"{self.form.prefix}{folder}", str(folder))
        got, expected = result.length.tolist(), self.index.length.tolist()
        if got != expected:
            counts = f"got {len(got)} episodes of {sum(got)} steps, expected {len(expected)} of {sum(expected)}"
            raise DataError(f"{folder}: {counts}, each as long as in the source; delete it and convert again")
        return result


def convert(conversion: Conversion, workers: int, progress: Progress) -> str | None:
    """Convert, verify, publish; returns what was compared, in words, None when the output was there already, complete.

    progress: called with the number of time steps, each counted once when written and once when compared. workers:
    processes; 0 does it all in this one. Raises `DataError`: for an output that is something else, for a source that cannot be
    read, and for a result that differs from it.
    """
    if _is_done(conversion):
        _remove_work(conversion.output)
        return None
    pool = WorkerPool(workers, _prepare, (conversion,))
    with _workspace(conversion) as folder, progress(2 * conversion.index.steps) as bar, pool:
        missing = [shard for shard, written in enumerate(conversion.written()) if not written]
        bar.update(conversion.index.steps - sum(map(conversion.steps, missing)))
        if len(missing) < len(conversion.shards):
            done = len(conversion.shards) - len(missing)
            logger.info("%s: going on, %d of %d shards are there", folder, done, len(conversion.shards))
        for steps in pool.map(_write, missing):
            bar.update(steps)
        conversion.form.finish(folder, len(conversion.shards))
        conversion.result(folder)
        identical, ratios = 0, list[float]()
        for shard, (same, compared) in enumerate(pool.map(_verify, range(len(conversion.shards)))):
            identical, ratios = identical + same, ratios + compared
            bar.update(conversion.steps(shard))
    _remove_work(conversion.output)
    return _summary(conversion.index, identical, ratios)


def _remove_work(folder: Path) -> None:
    """Remove what only an unfinished conversion needs."""
    for path in folder.glob(f"{WORK}*"):
        shutil.rmtree(path, ignore_errors=True)


def _summary(index: EpisodeIndex, identical: int, ratios: Sequence[float]) -> str:
    """What was compared: images whose bytes are the same, and the signal-to-noise ratios of those that were decoded."""
    parts = [f"{len(index)} episodes, {index.steps} steps; state, action, instructions and flags are equal"]
    if identical:
        parts.append(f"{identical} images have the same bytes")
    if ratios:
        worst = f"PSNR {min(ratios):.1f} dB or better (at least {LEAST_PSNR:g})"
        parts.append(f"{len(ratios)} frames were compared, {'every pixel is equal' if min(ratios) == float('inf') else worst}")
    return "; ".join(parts)


def _is_done(conversion: Conversion) -> bool:
    """True if the output is there, complete. Raises `DataError` when it is something else, or has lost files."""
    output = conversion.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not conversion.recorded(output):
        raise DataError(f"{output}: is there already, and is not this conversion; delete it, or give another --output_dir")
    try:
        conversion.result(output)
    except DataError as error:
        text = f"its record is there, its files are not, or differ ({first_line(error)})"
        raise DataError(f"{output}: {text}; delete it and convert again") from error
    return True


@contextlib.contextmanager
def _workspace(conversion: Conversion) -> Iterator[Path]:
    """The folder to work in, locked; what it holds gets the output's name in the end.

    What failed before any shard was complete leaves no folder: it has nothing to resume, and another conversion may follow.
    """
    folder = conversion.partial
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / LOCK)
    if lock is None:
        raise DataError(f"{folder}: another process converts into it; wait for it, or give another --output_dir")
    try:
        others = [path.name for path in folder.iterdir() if path.name == RECORD or not path.name.startswith(".")]
        if others and not conversion.recorded(folder):
            text = "is there already, and is not what this conversion of this data left unfinished"
            raise DataError(f"{folder}: {text}; delete it, or give another --output_dir")
        for leftover in folder.rglob("*.tmp"):  # of a killed process
            leftover.unlink()
        atomic_write(folder / RECORD, json.dumps(conversion.record(), indent=1))
        try:
            yield folder
        except BaseException:
            if not any(conversion.written()):
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


class _Worker:
    """What a process keeps from job to job."""

    def __init__(self, conversion: Conversion) -> None:
        self.conversion = conversion
        self.source = Recordings(conversion.index, conversion.cameras)

    @cached_property
    def result(self) -> Recordings:
        return Recordings(self.conversion.result(self.conversion.partial), range(len(self.conversion.cameras)))


_worker: list[_Worker] = []


def _prepare(conversion: Conversion) -> None:
    _worker[:] = [_Worker(conversion)]


def _write(shard: int) -> int:
    """Write one shard; returns its steps."""
    conversion, source = _worker[0].conversion, _worker[0].source
    episodes = conversion.shards[shard]
    first = episodes.start, int(conversion.index.length[: episodes.start].sum())
    conversion.form.write(conversion.partial, shard, first, map(source.read, episodes))
    return conversion.steps(shard)


def _verify(shard: int) -> tuple[int, list[float]]:
    """As `compare_episode`, of a shard's episodes together."""
    worker = _worker[0]
    identical, ratios = 0, list[float]()
    for episode in worker.conversion.shards[shard]:
        source, result = worker.source.read(episode), worker.result.read(episode)
        same, compared = compare_episode(source, result, worker.conversion.form.lossless)
        identical, ratios = identical + same, ratios + compared
    return identical, ratios


def compare_episode(source: Recording, result: Recording, lossless: bool) -> tuple[int, list[float]]:
    """Compare an episode of a result with its source: numbers, instructions and flags exactly, images exactly or within a
    codec's loss. Returns the number of images with the same bytes, and the peak signal-to-noise ratio, in dB, of others.

    Raises `DataError` with the first difference.
    """
    difference = f"{result.where()}: differs from {source.where()}: %s; delete the result and convert again"
    for name in ("length", "state", "action", "prompts", "is_terminal"):
        got, expected = getattr(result, name), getattr(source, name)
        if (got.tobytes() != expected.tobytes()) if isinstance(got, np.ndarray) else (got != expected):
            raise DataError(difference % f"{name}: got {str(got)[:80]}, expected {str(expected)[:80]}")
    identical, ratios = 0, list[float]()
    for camera, (expected, got) in enumerate(zip(source.images, result.images, strict=True)):
        try:
            same, compared = _compare_camera(expected, got, lossless)
        except _DifferenceError as error:
            raise DataError(difference % f"camera {camera + 1}, {error}") from error
        identical, ratios = identical + same, ratios + compared
    return identical, ratios


class _DifferenceError(Exception):
    """Two images that should be the same."""


def _compare_camera(
    source: Sequence[Picture | None], result: Sequence[Picture | None], lossless: bool
) -> tuple[int, list[float]]:
    different = []
    for step, (expected, got) in enumerate(zip(source, result, strict=True)):
        if (expected is None) != (got is None):
            raise _DifferenceError(f"step {step}: an image is there in only one of them")
        data = None if expected is None else expected.encoded()
        if expected is not None and got is not None and (data is None or data != got.encoded()):
            different.append(step)
    chosen = np.unique(np.linspace(0, len(different) - 1, min(SAMPLED, len(different))).round().astype(int))
    ratios = [_compare_frame(source, result, different[n], lossless) for n in chosen]
    return sum(picture is not None for picture in source) - len(different), ratios


def _compare_frame(source: Sequence[Picture | None], result: Sequence[Picture | None], step: int, lossless: bool) -> float:
    """PSNR of one frame, in dB."""

    def pixels(pictures: Sequence[Picture | None], step: int) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        picture = pictures[step] if 0 <= step < len(pictures) else None
        return None if picture is None else np.asarray(picture.decode(), np.float64)

    expected, got = pixels(source, step), pixels(result, step)
    assert expected is not None and got is not None
    if got.shape != expected.shape:
        raise _DifferenceError(f"step {step}: got an image of {got.shape[:2]}, expected {expected.shape[:2]}")
    error = float(((got - expected) ** 2).mean())
    psnr = float("inf") if error == 0 else 10 * np.log10(255**2 / error)
    if lossless and error:
        raise _DifferenceError(f"step {step}: got other pixels (PSNR {psnr:.1f} dB), expected the same")
    if psnr < LEAST_PSNR:
        expectation = f"expected {LEAST_PSNR:g} dB at least; a smaller --crf loses less"
        raise _DifferenceError(f"step {step}: got PSNR {psnr:.1f} dB, {expectation}")
    for neighbour in (step - 1, step + 1):  # a picture that is one step off may still look much the same
        other = pixels(source, neighbour)
        if other is not None and np.abs(got - other).mean() + CLOSER < np.abs(got - expected).mean():
            raise _DifferenceError(f"step {step}: got an image more like step {neighbour} than its own")
    return psnr
