"""From one format to another: shard by shard, in parallel, resumable, and verified against the source before it counts as done.

The work goes on in `OUTPUT.partial` beside the output folder. Only what is complete and verified gets the output's name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.data.formats import Pictures, open_file
from paligemma_vla.data.images import encode_image
from paligemma_vla.data.index import EpisodeIndex, read_flags
from paligemma_vla.data.reader import EpisodeReader, Picture
from paligemma_vla.data.writer import IMAGE_MAGIC, EpisodeWriter
from paligemma_vla.errors import DataError
from paligemma_vla.preprocess import ImageSpec
from paligemma_vla.progress import progress_bar
from paligemma_vla.schema import DatasetMetadata, Episode, Pixels
from paligemma_vla.storage import atomic_write, lock_file
from paligemma_vla.workers import WorkerPool

RECORD, LOCK, WORK = ".conversion.json", ".lock", ".shard"
NOTES = f"{WORK}-notes"  # folder of a note for each shard that is complete
VERSION = 2
NATIVE_EPISODES = 16  # of a file: few enough that a small data set keeps several processes busy
SAMPLED = 4  # images of an episode and camera that are decoded and compared, when their bytes are not the same
LEAST_PSNR = 20.0  # dB; a lossy codec's usual pictures have 30 and more, another picture has 10 or so
CLOSER = 1.0  # mean difference in levels by which a picture's neighbour may be more like it without a complaint
CACHE_BYTES = 64 * 2**20  # of the reader of one shard
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """One episode of L steps, whose images are read when they are asked for.

    file, row: where its first step is stored. state (L, P), action (L, A). prompts: an instruction per step. pictures: per
    camera and step, None where the camera is absent.
    """

    file: str
    row: int
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    prompts: list[str]
    pictures: list[list[Picture | None]]
    is_terminal: bool

    @property
    def length(self) -> int:
        return len(self.action)

    def where(self, step: int = 0) -> str:
        """File and row of a step."""
        return f"{self.file}: row {self.row + step}"


@dataclass(frozen=True)
class ResizedPictures(Pictures):
    """Images as training resizes them."""

    pictures: Pictures
    spec: ImageSpec

    def present(self, row: int) -> bool:
        return self.pictures.present(row)

    def decode(self, row: int, side: int = 0) -> Pixels:
        return self.spec.apply(self.pictures.decode(row, self.spec.decoded_side())).transpose(1, 2, 0)

    def encoded(self, row: int) -> None:
        return None


def read_episodes(
    index: EpisodeIndex, cameras: Sequence[int], episodes: Sequence[int], spec: ImageSpec | None = None
) -> Iterator[Recording]:
    """Some episodes of an index, one by one, with the cameras numbered `cameras` (from 0). Raises `DataError`.

    spec: how images are resized; None: not at all.
    """

    def resized(picture: Picture | None) -> Picture | None:
        if picture is None or spec is None:
            return picture
        return replace(picture, pictures=ResizedPictures(picture.pictures, spec))

    terminal: dict[int, set[int]] = {}
    with contextlib.closing(EpisodeReader(index, max(cameras) + 1, CACHE_BYTES)) as reader:
        for episode in episodes:
            file, start, length = (int(values[episode]) for values in (index.file, index.start, index.length))
            path, rows = index.paths[file], range(start, start + length)
            if file not in terminal:
                with open_file(path) as source:
                    terminal = {file: set(read_flags(source).terminal.tolist())}
            groups = [reader.group_of(file, row) for row in rows]
            images = [group.pictures(number) for group, number in groups]
            yield Recording(
                file=path,
                row=start,
                state=np.stack([group.state[number] for group, number in groups]),
                action=reader.actions(file, start, start + length),
                prompts=[group.instruction(number) for group, number in groups],
                pictures=[[resized(step[camera]) for step in images] for camera in cameras],
                is_terminal=rows[-1] in terminal[file],
            )


class OutputFormat(Protocol):
    """A format to write: a dataclass of all that decides what is written, pickled for worker processes.

    name: of the format. prefix: before a folder, in the name that it is read by.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]

    @property
    def lossless(self) -> bool:
        """True if pixels must come out as they went in."""

    def shards(self, lengths: Sequence[int]) -> list[range]:
        """The episodes of each shard, given the length of every episode."""

    def write(self, folder: Path, shard: int, first: tuple[int, int], recordings: Iterator[Recording]) -> Any:
        """Write a shard, also over what a killed process has left of it; returns what `finish` needs of it, fit for JSON.

        first: number of its first episode and step.
        """

    def finish(self, folder: Path, notes: list[Any]) -> None:
        """What is left to do when all shards are complete. notes: what `write` returned for each."""


@dataclass(frozen=True)
class Encoding:
    """How images are stored one by one. image_format: all as `png`, or as `jpeg` of `quality`; None: those that are encoded
    stay as they are, the others (frames of videos, resized images) become PNG.
    """

    image_format: str | None
    quality: int

    def encode(self, picture: Picture) -> bytes:
        data, kept = picture.encoded(), [IMAGE_MAGIC[self.image_format]] if self.image_format else IMAGE_MAGIC.values()
        if data is not None and data.startswith(tuple(kept)):
            return data
        return encode_image(picture.decode(), self.image_format or "png", self.quality)


@dataclass(frozen=True)
class NativeOutput:
    """Episode files, by `EpisodeWriter`."""

    name: ClassVar = "native"
    prefix: ClassVar = ""
    metadata: DatasetMetadata
    encoding: Encoding

    @property
    def lossless(self) -> bool:
        return self.encoding.image_format != "jpeg"

    def shards(self, lengths: Sequence[int]) -> list[range]:
        return [range(n, min(n + NATIVE_EPISODES, len(lengths))) for n in range(0, len(lengths), NATIVE_EPISODES)]

    def write(self, folder: Path, shard: int, first: tuple[int, int], recordings: Iterator[Recording]) -> None:
        own = folder / f"{WORK}-{shard:05d}"
        shutil.rmtree(own, ignore_errors=True)
        with EpisodeWriter(own, self.metadata, episodes_per_file=NATIVE_EPISODES) as writer:
            for recording in recordings:
                writer.write(self._episode(recording))
        (written,) = own.glob("*.parquet")
        written.replace(folder / f"episodes-{shard:05d}.parquet")
        own.rmdir()

    def finish(self, folder: Path, notes: list[Any]) -> None:
        """Nothing: each file describes itself."""

    def _episode(self, recording: Recording) -> Episode:
        prompt = recording.prompts[0]
        for step, text in enumerate(recording.prompts):
            if text != prompt:
                got = f"step {step}: got the instruction {text[:60]!r}, expected {prompt[:60]!r} as at the first step"
                raise DataError(f"{recording.where()}: {got}: an episode file has one; read the data directly: lerobot:PATH")
        encode = self.encoding.encode
        images = [[None if picture is None else encode(picture) for picture in camera] for camera in recording.pictures]
        return Episode(images, recording.state, recording.action, prompt, recording.is_terminal)


@dataclass(frozen=True)
class Conversion:
    """One conversion: the episodes of `index`, of which the cameras numbered `cameras` (from 0), into the folder `output`.

    spec: how images are resized; None: not at all.
    """

    index: EpisodeIndex
    cameras: tuple[int, ...]
    form: OutputFormat
    output: Path
    spec: ImageSpec | None = None

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

    def note(self, shard: int) -> Path:
        """Where the note about a shard is, once the shard is complete."""
        return self.partial / NOTES / f"{shard:05d}.json"

    def missing(self) -> list[int]:
        """Shards that are not complete."""
        return [shard for shard in range(len(self.shards)) if not self.note(shard).is_file()]

    @property
    def record(self) -> str:
        """What a resumed conversion must agree in, and what stays with its result."""
        source = {"fingerprint": self.index.fingerprint, "episodes": len(self.index), "cameras": self.cameras}
        source |= {"resized": self.spec and asdict(self.spec)}
        target = {"format": self.form.name, **asdict(cast(Any, self.form))}
        return json.dumps({"version": VERSION, "source": source, "target": target}, indent=1)

    def is_recorded(self, folder: Path) -> bool:
        """True if the record in a folder is the one of this conversion."""
        path = folder / RECORD
        return path.is_file() and path.read_bytes() == self.record.encode()

    @cached_property
    def result(self) -> EpisodeIndex:
        """The index of what was written, before it gets its name."""
        return self.open_result(self.partial)

    def open_result(self, folder: Path) -> EpisodeIndex:
        """The index of the result in a folder. Raises `DataError` when it has other episodes than the source."""
        result = EpisodeIndex.build(f"{self.form.prefix}{folder}", str(folder))
        got, expected = result.length.tolist(), self.index.length.tolist()
        if got != expected:
            counts = f"got {len(got)} episodes of {sum(got)} steps, expected {len(expected)} of {sum(expected)}"
            raise DataError(f"{folder}: {counts}, each as long as in the source; delete it and convert again")
        return result


@dataclass
class Comparison:
    """Images that were compared: how many have the same bytes; how many were decoded, and the worst of those in dB."""

    identical: int = 0
    decoded: int = 0
    worst_psnr: float = float("inf")

    def add(self, other: Comparison) -> None:
        self.identical += other.identical
        self.decoded += other.decoded
        self.worst_psnr = min(self.worst_psnr, other.worst_psnr)

    def __str__(self) -> str:
        parts = [f"{self.identical} images have the same bytes"] if self.identical else []
        if self.decoded:
            worst = f"PSNR {self.worst_psnr:.1f} dB or better (at least {LEAST_PSNR:g})"
            found = "every pixel is equal" if self.worst_psnr == float("inf") else worst
            parts.append(f"{self.decoded} frames were compared, {found}")
        return "; ".join(parts)


def convert(conversion: Conversion, workers: int) -> str | None:
    """Convert, verify, publish; returns what was compared, in words, None when the output was there already, complete.

    workers: processes; 0 does it all in this one. Raises `DataError`: for an output that is something else, for a source that
    cannot be read, and for a result that differs from it.
    """
    if _is_done(conversion):
        return None
    index, shards, comparison = conversion.index, len(conversion.shards), Comparison()
    pool = WorkerPool(workers, _prepare, (conversion,))
    bar = progress_bar(2 * index.steps, "convert", "step")  # written, and compared
    with _workspace(conversion) as folder, bar, pool:
        missing = conversion.missing()
        bar.update(index.steps - sum(map(conversion.steps, missing)))
        if len(missing) < shards:
            logger.info("%s: going on, %d of %d shards are there", folder, shards - len(missing), shards)
        for steps in pool.map(_write, missing):
            bar.update(steps)
        conversion.form.finish(folder, [json.loads(conversion.note(shard).read_bytes()) for shard in range(shards)])
        conversion.open_result(folder)
        for shard, compared in enumerate(pool.map(_verify, range(shards))):
            comparison.add(compared)
            bar.update(conversion.steps(shard))
    return f"{len(index)} episodes, {index.steps} steps; state, action, instructions and flags are equal; {comparison}"


def _is_done(conversion: Conversion) -> bool:
    """True if the output is there, complete. Raises `DataError` when it is something else, or has lost files."""
    output = conversion.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not conversion.is_recorded(output):
        raise DataError(f"{output}: is there already, and is not this conversion; delete it, or give another --output_dir")
    conversion.open_result(output)
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
        if others and not conversion.is_recorded(folder):
            text = "is there already, and is not what this conversion of this data left unfinished"
            raise DataError(f"{folder}: {text}; delete it, or give another --output_dir")
        for leftover in folder.rglob("*.tmp"):  # of a killed process
            leftover.unlink()
        atomic_write(folder / RECORD, conversion.record)
        try:
            yield folder
        except BaseException:
            if len(conversion.missing()) == len(conversion.shards):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        for path in (*folder.glob(f"{WORK}*"), folder / LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.replace(conversion.output)
    finally:
        lock.release()


_conversion: list[Conversion] = []  # of this process


def _prepare(conversion: Conversion) -> None:
    _conversion[:] = [conversion]


def _write(shard: int) -> int:
    """Write one shard; returns its steps."""
    (conversion,) = _conversion
    episodes = conversion.shards[shard]
    first = episodes.start, int(conversion.index.length[: episodes.start].sum())
    recordings = read_episodes(conversion.index, conversion.cameras, episodes, conversion.spec)
    note = conversion.form.write(conversion.partial, shard, first, recordings)
    conversion.note(shard).parent.mkdir(exist_ok=True)
    atomic_write(conversion.note(shard), json.dumps(note))
    return conversion.steps(shard)


def _verify(shard: int) -> Comparison:
    """As `compare_episode`, of a shard's episodes together."""
    (conversion,), comparison = _conversion, Comparison()
    episodes = conversion.shards[shard]
    sources = read_episodes(conversion.index, conversion.cameras, episodes, conversion.spec)
    results = read_episodes(conversion.result, range(len(conversion.cameras)), episodes)
    for source, result in zip(sources, results, strict=True):
        comparison.add(compare_episode(source, result, conversion.form.lossless))
    return comparison


def compare_episode(source: Recording, result: Recording, lossless: bool) -> Comparison:
    """Compare an episode of a result with its source: numbers, instructions and flags exactly, images exactly or within a
    codec's loss. Raises `DataError` with the first difference.
    """
    difference = f"{result.where()}: differs from {source.where()}: %s; delete the result and convert again"
    for name in ("length", "state", "action", "prompts", "is_terminal"):
        got, expected = getattr(result, name), getattr(source, name)
        if (got.tobytes() != expected.tobytes()) if isinstance(got, np.ndarray) else (got != expected):
            raise DataError(difference % f"{name}: got {str(got)[:80]}, expected {str(expected)[:80]}")
    comparison = Comparison()
    for camera, (before, after) in enumerate(zip(source.pictures, result.pictures, strict=True), 1):
        different = []
        for step, (original, picture) in enumerate(zip(before, after, strict=True)):
            if original is None or picture is None:
                if original is not picture:
                    raise DataError(difference % f"camera {camera}, step {step}: an image is there in only one of them")
                continue
            data = original.encoded()
            if data is None or data != picture.encoded():
                different.append(step)
            else:
                comparison.identical += 1
        for number in np.unique(np.linspace(0, len(different) - 1, min(SAMPLED, len(different))).round().astype(int)):
            psnr, fault = _compare_frame(before, after, different[number], lossless)
            if fault:
                raise DataError(difference % f"camera {camera}, step {different[number]}: {fault}")
            comparison.add(Comparison(0, 1, psnr))
    return comparison


def _compare_frame(
    source: Sequence[Picture | None], result: Sequence[Picture | None], step: int, lossless: bool
) -> tuple[float, str]:
    """PSNR of one frame, in dB, and what is wrong with it."""

    def pixels(picture: Picture | None) -> NDArray[np.float64]:
        assert picture is not None
        return picture.decode().astype(np.float64)

    expected, got = pixels(source[step]), pixels(result[step])
    if got.shape != expected.shape:
        return 0.0, f"got an image of {got.shape[:2]}, expected {expected.shape[:2]}"
    error = float(((got - expected) ** 2).mean())
    psnr = float("inf") if error == 0 else 10 * np.log10(255**2 / error)
    if lossless and error:
        return psnr, f"got other pixels (PSNR {psnr:.1f} dB), expected the same"
    if psnr < LEAST_PSNR:
        return psnr, f"got PSNR {psnr:.1f} dB, expected {LEAST_PSNR:g} dB at least; a smaller --crf loses less"
    for neighbour in (step - 1, step + 1):  # a picture that is one step off may still look much the same
        other = source[neighbour] if 0 <= neighbour < len(source) else None
        if other is not None and np.abs(got - pixels(other)).mean() + CLOSER < np.abs(got - expected).mean():
            return psnr, f"got an image more like step {neighbour} than its own"
    return psnr, ""
