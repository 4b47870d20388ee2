"""What data is converted to: this project's own episode files, or LeRobot's."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from paligemma_vla.data.reader import Picture, Recording
from paligemma_vla.data.sources.lerobot_layout import Format
from paligemma_vla.data.sources.lerobot_writer import NOTES, LeRobotShard, note_path, write_metadata
from paligemma_vla.data.writer import IMAGE_MAGIC, EpisodeWriter
from paligemma_vla.errors import DataError
from paligemma_vla.schema import DatasetMetadata, Episode

NATIVE_EPISODES = 16  # of a file: few enough that a small data set keeps several processes busy
VIDEO_STEPS, IMAGE_STEPS = 5000, 2000  # of a file of LeRobot v3.0, about


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


def encode_image(image: Image.Image, kind: str, quality: int) -> bytes:
    """An RGB image as `png`, or as `jpeg` of a quality from 1 to 100."""
    stream = io.BytesIO()
    if kind == "png":
        image.save(stream, "PNG", compress_level=4)
    else:
        image.save(stream, "JPEG", quality=quality, subsampling=0)  # small pictures need colour at full resolution
    return stream.getvalue()


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
