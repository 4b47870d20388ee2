"""From one format to another: shard by shard, in parallel, resumable, and compared with the source before it counts as done.

The work goes on in `OUTPUT.partial` beside the output folder. Only what is whole and has been compared gets the output's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.data.formats.lerobot_writer import NOTES, Format, LeRobotShard, note_path, write_metadata
from paligemma_vla.data.images import encode_image
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import Picture, Recording, Recordings
from paligemma_vla.data.writer import IMAGE_MAGIC, EpisodeWriter
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import DatasetMetadata, Episode
from paligemma_vla.storage import atomic_write, lock_file
from paligemma_vla.workers import WorkerPool

RECORD, LOCK = ".conversion.json", ".lock"
VERSION = 1
NATIVE_EPISODES = 16  # of a file: few enough that a small data set keeps several processes busy
VIDEO_STEPS, IMAGE_STEPS = 5000, 2000  # of a file of LeRobot v3.0, about
SAMPLED = 4  # images of an episode and camera that are decoded and compared, when their bytes are not the same
LEAST_PSNR = 20.0  # dB; a lossy codec's usual pictures have 30 and more, another picture has 10 or so
CLOSER = 1.0  # mean difference in levels by which a picture's neighbour may be more like it without a complaint
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
        for part in pool.map(_verify, shards):
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


def _verify(episodes: range) -> Comparison:
    worker = _worker[0]
    lossless = worker.conversion.target.lossless
    return sum((compare_episode(worker.source, worker.result, episode, lossless) for episode in episodes), Comparison())


@dataclass(frozen=True)
class NativeTarget:
    """Episode files, by `EpisodeWriter`. Frames of videos become PNG, or JPEG of `quality`; encoded images stay as they are."""

    metadata: DatasetMetadata
    image_format: str
    quality: int

    @property
    def lossless(self) -> bool:
        return self.image_format == "png"

    @property
    def settings(self) -> dict[str, Any]:
        return {"format": "native", **json.loads(json.dumps(asdict(self)))}

    def shards(self, lengths: Sequence[int]) -> list[range]:
        return [range(n, min(n + NATIVE_EPISODES, len(lengths))) for n in range(0, len(lengths), NATIVE_EPISODES)]

    def is_written(self, folder: Path, shard: int) -> bool:
        return self._path(folder, shard).is_file()

    def write(self, folder: Path, shard: int, first: tuple[int, int], recordings: Iterator[Recording]) -> None:
        own = folder / f".shard-{shard:05d}"
        shutil.rmtree(own, ignore_errors=True)
        with EpisodeWriter(own, self.metadata, episodes_per_file=NATIVE_EPISODES) as writer:
            for recording in recordings:
                writer.write(self._episode(recording))
        (written,) = own.glob("*.parquet")
        written.replace(self._path(folder, shard))
        own.rmdir()

    def finish(self, folder: Path, shards: int) -> None:
        """Nothing: each file tells everything about itself."""

    def place(self, folder: Path) -> str:
        return str(folder)

    def tidy(self, folder: Path) -> None:
        """Nothing: a shard's folder is gone when it is whole."""

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
class LeRobotTarget:
    """A LeRobot data set. tasks: instructions, in the order of their numbers."""

    form: Format
    tasks: tuple[str, ...]

    @property
    def lossless(self) -> bool:
        return not self.form.video

    @property
    def settings(self) -> dict[str, Any]:
        return {"format": "lerobot", "tasks": list(self.tasks), **json.loads(json.dumps(asdict(self.form)))}

    def shards(self, lengths: Sequence[int]) -> list[range]:
        most, shards, first, steps = VIDEO_STEPS if self.form.video else IMAGE_STEPS, [], 0, 0
        for episode, length in enumerate(lengths):
            if episode > first and steps + length > most:
                shards.append(range(first, episode))
                first, steps = episode, 0
            steps += length
        return [*shards, range(first, len(lengths))]

    def is_written(self, folder: Path, shard: int) -> bool:
        return note_path(folder, shard).is_file()

    def write(self, folder: Path, shard: int, first: tuple[int, int], recordings: Iterator[Recording]) -> None:
        numbers = {task: number for number, task in enumerate(self.tasks)}
        LeRobotShard(folder, self.form, shard, first, numbers).write(recordings)

    def finish(self, folder: Path, shards: int) -> None:
        write_metadata(folder, self.form, shards, self.tasks)

    def place(self, folder: Path) -> str:
        return f"lerobot:{folder}"

    def tidy(self, folder: Path) -> None:
        shutil.rmtree(folder / NOTES, ignore_errors=True)


@dataclass(frozen=True)
class Comparison:
    """What was compared and found the same. identical: images whose bytes are equal. sampled: images that were decoded.

    worst: least peak signal-to-noise ratio of those, in dB; infinite when all pixels were equal.
    """

    episodes: int = 0
    steps: int = 0
    identical: int = 0
    sampled: int = 0
    worst: float = float("inf")

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.episodes + other.episodes,
            self.steps + other.steps,
            self.identical + other.identical,
            self.sampled + other.sampled,
            min(self.worst, other.worst),
        )

    def __str__(self) -> str:
        counts = f"{self.episodes} episodes, {self.steps} steps; state, action, instructions and flags are equal"
        images = [f"{self.identical} images have the same bytes"] if self.identical else []
        if self.sampled and self.worst == float("inf"):
            images.append(f"{self.sampled} frames were compared, every pixel is equal")
        elif self.sampled:
            images.append(f"{self.sampled} frames were compared, PSNR {self.worst:.1f} dB or better (at least {LEAST_PSNR:g})")
        return "; ".join([counts, *images])


def compare_episode(source: Recordings, result: Recordings, episode: int, lossless: bool) -> Comparison:
    """Hold one episode of a result against its source. Raises `DataError` with the first difference."""
    first, second = source.read(episode), result.read(episode)
    for name, got, expected in [
        ("steps", second.length, first.length),
        ("state", _digest(second.state), _digest(first.state)),
        ("action", _digest(second.action), _digest(first.action)),
        ("instructions", second.prompts, first.prompts),
        ("is_terminal", second.is_terminal, first.is_terminal),
        ("cameras", len(second.images), len(first.images)),
    ]:
        if got != expected:
            raise _difference(first, second, f"{name}: got {str(got)[:80]}, expected {str(expected)[:80]}")
    found = Comparison(episodes=1, steps=first.length)
    for camera in range(len(first.images)):
        found += _compare_camera(first, second, camera, lossless)
    return found


def _digest(values: NDArray[np.float32]) -> str:
    """Of every bit."""
    digest = hashlib.blake2b(repr(values.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(values, np.float32).tobytes())
    return digest.hexdigest()


def _difference(first: Recording, second: Recording, text: str) -> DataError:
    return DataError(f"{second.where()}: differs from {first.where()}: {text}; delete the result and convert again")


def _compare_camera(first: Recording, second: Recording, camera: int, lossless: bool) -> Comparison:
    pairs = list(zip(first.images[camera], second.images[camera], strict=True))
    identical, different = 0, []
    for step, (source, result) in enumerate(pairs):
        if (source is None) != (result is None):
            raise _difference(first, second, f"camera {camera + 1}, step {step}: an image is there in only one of them")
        if source is None or result is None:
            continue
        data = source.encoded()
        if data is not None and data == result.encoded():
            identical += 1
        else:
            different.append(step)
    chosen = np.unique(np.linspace(0, len(different) - 1, min(SAMPLED, len(different))).round().astype(int))
    ratios = [_compare_frame(first, second, camera, different[n], lossless) for n in chosen]
    return Comparison(identical=identical, sampled=len(ratios), worst=min(ratios, default=float("inf")))


def _compare_frame(first: Recording, second: Recording, camera: int, step: int, lossless: bool) -> float:
    """PSNR of one frame, in dB."""
    source, result = first.images[camera][step], second.images[camera][step]
    assert source is not None and result is not None
    expected, got = _pixels(source), _pixels(result)
    where = f"camera {camera + 1}, step {step}"
    if got.shape != expected.shape:
        raise _difference(first, second, f"{where}: got an image of {got.shape[:2]}, expected {expected.shape[:2]}")
    error = float(((got - expected) ** 2).mean())
    psnr = float("inf") if error == 0 else 10 * np.log10(255**2 / error)
    if lossless and error:
        raise _difference(first, second, f"{where}: got other pixels (PSNR {psnr:.1f} dB), expected the same")
    if psnr < LEAST_PSNR:
        text = f"{where}: got PSNR {psnr:.1f} dB, expected {LEAST_PSNR:g} dB at least; a smaller --crf loses less"
        raise _difference(first, second, text)
    for neighbour in (step - 1, step + 1):  # a picture that is one step off may still look much the same
        other = first.images[camera][neighbour] if 0 <= neighbour < first.length else None
        if other is not None and np.abs(got - _pixels(other)).mean() + CLOSER < np.abs(got - expected).mean():
            raise _difference(first, second, f"{where}: got an image more like step {neighbour} than its own")
    return psnr


def _pixels(picture: Picture) -> NDArray[np.float64]:
    return np.asarray(picture.decode(), np.float64)
