"""Writing LeRobot data sets, v2.1 and v3.0: shard by shard, then the metadata over all shards.

A shard is a run of episodes: in v3.0 one data file and one video per camera, in v2.1 a file of each per episode. What the
metadata needs of it lies in a note, written last: a shard without one is written again.

Statistics are as LeRobot keeps them, per episode and of all together: minimum, maximum, mean, standard deviation (of the
population) and count. Images are sampled, and their values are in [0, 1] per channel, of shape (3, 1, 1). LeRobot's optional
quantiles are left out: it averages those of episodes, which is no quantile of the data.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paligemma_vla.data.reader import Picture, Recording
from paligemma_vla.data.video import VideoWriter
from paligemma_vla.errors import DataError
from paligemma_vla.schema import Layout
from paligemma_vla.storage import atomic_file, atomic_write

CHUNK = 1000  # files per folder
SUCCESS = "next.success"
PATHS = {
    "v2.1": {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    },
    "v3.0": {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}
INDEX_TYPES = {
    "timestamp": pa.float32(),
    "frame_index": pa.int64(),
    "episode_index": pa.int64(),
    "index": pa.int64(),
    "task_index": pa.int64(),
}


NOTES = ".shards"
SAMPLED_IMAGES = 100  # per episode at least, where it has as many, as LeRobot does
LARGEST_SIDE = 150  # of a sampled image, about
Stats = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """version: v2.1 or v3.0. video: frames in videos rather than images in Parquet. fps: steps per second."""

    version: str
    video: bool
    codec: str
    crf: int
    fps: float
    layout: Layout

    @property
    def camera_keys(self) -> list[str]:
        """A feature per camera. Raises `DataError` for names that LeRobot cannot have."""
        names = [
            self.layout.metadata.cameras[number] if number < len(self.layout.metadata.cameras) else f"image_{number + 1}"
            for number in range(self.layout.cameras)
        ]
        for name in names:
            if not name or "/" in name or names.count(name) > 1:
                text = f"metadata cameras: got {names}, expected different names without a slash"
                raise DataError(f"{text}; choose with --cameras")
        return [f"observation.images.{name}" for name in names]

    def path(self, kind: str, number: int, **values: object) -> str:
        """Path, in the data set, of file or episode `number`. kind: `data_path` or `video_path`."""
        chunk = number // CHUNK
        places = {"episode_chunk": chunk, "episode_index": number, "chunk_index": chunk, "file_index": number % CHUNK}
        return PATHS[self.version][kind].format(**places, **values)

    def features(self, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """`features` of info.json. sizes: height and width of each camera's images."""
        metadata, features = self.layout.metadata, dict[str, Any]()
        for key, (height, width) in sizes.items():
            dtype = "video" if self.video else "image"
            features[key] = {"dtype": dtype, "shape": [height, width, 3], "names": ["height", "width", "channels"]}
            if self.video:
                features[key]["info"] = self._video_info(height, width)
        for key, dimension, names in [
            ("observation.state", self.layout.state_dim, metadata.state_names),
            ("action", self.layout.action_dim, metadata.action_names),
        ]:
            features[key] = {"dtype": "float32", "shape": [dimension], "names": list(names) or None}
        scalars = {SUCCESS: "bool", "timestamp": "float32", **dict.fromkeys(list(INDEX_TYPES)[1:], "int64")}
        features.update({key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in scalars.items()})
        return features

    def _video_info(self, height: int, width: int) -> dict[str, Any]:
        return {
            "video.height": height,
            "video.width": width,
            "video.codec": self.codec,
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": json_number(self.fps),
            "video.channels": 3,
            "has_audio": False,
        }

    def schema(self) -> pa.Schema:
        """Of a data file, with the note by which LeRobot's loader knows images and the lengths of lists."""
        fields, noted = list[pa.Field](), dict[str, Any]()
        if not self.video:
            image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            fields += [pa.field(key, image) for key in self.camera_keys]
            noted.update({key: {"_type": "Image"} for key in self.camera_keys})
        for key, dimension in (("observation.state", self.layout.state_dim), ("action", self.layout.action_dim)):
            if dimension == 1:  # LeRobot keeps a single number as one, not as a list of one
                fields.append(pa.field(key, pa.float32()))
                noted[key] = {"dtype": "float32", "_type": "Value"}
            else:
                fields.append(pa.field(key, pa.list_(pa.float32(), dimension)))
                value = {"dtype": "float32", "_type": "Value"}
                noted[key] = {"feature": value, "length": dimension, "_type": "Sequence"}
        for key, kind in {SUCCESS: pa.bool_(), **INDEX_TYPES}.items():
            fields.append(pa.field(key, kind))
            noted[key] = {"dtype": {"float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}
        note = json.dumps({"info": {"features": noted}})
        return pa.schema(fields, metadata={b"huggingface": note.encode()})

    def info(self, lengths: list[int], tasks: int, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """info.json. What LeRobot has no place for is under `paligemma_vla`."""
        metadata, episodes = self.layout.metadata, len(lengths)
        counts = {"total_episodes": episodes, "total_frames": sum(lengths), "total_tasks": tasks}
        if self.version == "v2.1":
            videos = episodes * len(sizes) if self.video else 0
            counts |= {"total_videos": videos, "total_chunks": -(-episodes // CHUNK), "chunks_size": CHUNK}
        else:
            counts |= {"chunks_size": CHUNK, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
        return {
            "codebase_version": self.version,
            "robot_type": metadata.robot or None,
            **counts,
            "fps": json_number(self.fps),
            "splits": {"train": f"0:{episodes}"},
            "data_path": PATHS[self.version]["data_path"],
            "video_path": PATHS[self.version]["video_path"] if self.video else None,
            "features": self.features(sizes),
            "paligemma_vla": json.loads(metadata.to_json()),
        }


def json_number(value: float) -> int | float:
    """Whole numbers as such: LeRobot's own fps are."""
    return int(value) if value == int(value) else value


class LeRobotShard:
    """One shard being written. number: of the shard. first: number of its first episode and step. tasks: by instruction."""

    def __init__(self, folder: Path, form: Format, number: int, first: tuple[int, int], tasks: dict[str, int]) -> None:
        self.folder, self.form, self.number, self.tasks = folder, form, number, tasks
        self.episode, self.step = first
        self.sizes: dict[str, tuple[int, int]] = {}
        self.entries: list[dict[str, Any]] = []

    def write(self, recordings: Iterable[Recording]) -> None:
        """Write the shard's episodes, then its note. Raises `DataError`."""
        if self.form.version == "v2.1":
            for recording in recordings:
                self._files(self.episode, [recording])
        else:
            self._files(self.number, recordings)
        note = json.dumps({"sizes": self.sizes, "episodes": self.entries})
        path = note_path(self.folder, self.number)
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, note)

    def _files(self, number: int, recordings: Iterable[Recording]) -> None:
        """One data file, and one video per camera."""
        keys, form = self.form.camera_keys, self.form
        data = self._target(form.path("data_path", number))
        paths = [self._target(form.path("video_path", number, video_key=key)) for key in keys] if form.video else []
        with ExitStack() as stack:
            table = stack.enter_context(_parquet(data, form))
            videos = [stack.enter_context(VideoWriter(path, form.codec, form.fps, form.crf)) for path in paths]
            for recording in recordings:
                begins = [video.frames / form.fps for video in videos]
                stats, images = self._images(recording, videos)
                columns = self._columns(recording)
                stats.update({key: number_stats(values) for key, values in columns.items()})
                table.write_table(_rows(columns, images, form), row_group_size=max(recording.length, 1))
                self._note(recording, number, begins, stats)
        for path in (data, *paths):
            path.replace(path.with_name(path.name.removesuffix(".tmp")))

    def _target(self, name: str) -> Path:
        path = self.folder / f"{name}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _images(self, recording: Recording, videos: Sequence[VideoWriter]) -> tuple[dict[str, Stats], dict[str, list[bytes]]]:
        """Encode frames, or collect encoded images; statistics of some of them."""
        stats, stored = {}, {}
        for camera, (key, pictures) in enumerate(zip(self.form.camera_keys, recording.images, strict=True)):
            counted, sampled = ImageStats(), set(sampled_steps(recording.length).tolist())
            images: list[bytes] = []
            for step, picture in enumerate(pictures):
                where = f"{recording.where(step)}: camera {key}"
                if picture is None:
                    text = "got no image, expected one: LeRobot has no place for an absent one"
                    raise DataError(f"{where}: {text}; leave the camera out (--cameras), or the episode (--episodes)")
                if self.form.video or step in sampled or step == 0:
                    pixels = np.asarray(picture.decode())
                    self._check_size(key, pixels.shape, where)
                    if step in sampled:
                        counted.add(pixels)
                    if self.form.video:
                        videos[camera].write(pixels, where)
                if not self.form.video:
                    images.append(stored_image(picture))
            stats[key] = counted.result()
            if not self.form.video:
                stored[key] = images
        return stats, stored

    def _check_size(self, key: str, shape: tuple[int, ...], where: str) -> None:
        size = (shape[0], shape[1])
        expected = self.sizes.setdefault(key, size)
        if size != expected:
            raise size_error(where, size, expected)

    def _columns(self, recording: Recording) -> dict[str, Any]:
        """Everything but images, by column."""
        steps = np.arange(recording.length)
        return {
            "observation.state": recording.state,
            "action": recording.action,
            SUCCESS: (steps == recording.length - 1) & recording.is_terminal,
            "timestamp": (steps / self.form.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(recording.length, self.episode),
            "index": self.step + steps,
            "task_index": np.array([self.tasks[prompt] for prompt in recording.prompts]),
        }

    def _note(self, recording: Recording, file: int, begins: Sequence[float], stats: dict[str, Stats]) -> None:
        entry = {
            "episode_index": self.episode,
            "tasks": list(dict.fromkeys(recording.prompts)),
            "length": recording.length,
            "from": self.step,
            "file": file,
            "begins": list(begins),
            "stats": stats,
        }
        self.entries.append(entry)
        self.episode += 1
        self.step += recording.length


def size_error(where: str, size: tuple[int, int], expected: tuple[int, int]) -> DataError:
    got, wanted = (f"{width} x {height}" for height, width in (size, expected))
    return DataError(f"{where}: got {got} pixels, expected {wanted} as before: in LeRobot a camera has one size; resize them")


def stored_image(picture: Picture) -> bytes:
    """The bytes of an image as they are, or a frame of a video as PNG, which loses nothing."""
    data = picture.encoded()
    if data is None:
        stream = io.BytesIO()
        picture.decode().save(stream, "PNG")
        data = stream.getvalue()
    return data


def note_path(folder: Path, number: int) -> Path:
    """Where the note of a shard is."""
    return folder / NOTES / f"{number:05d}.json"


def _parquet(path: Path, form: Format) -> pq.ParquetWriter:
    images = [] if form.video else form.camera_keys
    plain = [name for name in form.schema().names if name not in images]
    return pq.ParquetWriter(
        path,
        form.schema(),
        compression={**{f"{name}.bytes": "NONE" for name in images}, **dict.fromkeys(_leaves(form, plain), "SNAPPY")},
        write_statistics=_leaves(form, plain),
        use_dictionary=["task_index"],
        write_page_checksum=True,
    )


def _leaves(form: Format, names: Sequence[str]) -> list[str]:
    """Parquet's own column paths."""
    lists = {field.name for field in form.schema() if pa.types.is_fixed_size_list(field.type)}
    return [f"{name}.list.element" if name in lists else name for name in names]


def _rows(columns: dict[str, Any], images: dict[str, list[bytes]], form: Format) -> pa.Table:
    arrays = []
    for field in form.schema():
        if field.name in images:
            names = [f"frame-{step:06d}{_suffix(data)}" for step, data in enumerate(images[field.name])]
            parts = [pa.array(images[field.name], pa.binary()), pa.array(names, pa.string())]
            arrays.append(pa.StructArray.from_arrays(parts, names=["bytes", "path"]))
        elif pa.types.is_fixed_size_list(field.type):
            values = np.ascontiguousarray(columns[field.name], np.float32)
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]))
        else:
            arrays.append(pa.array(np.asarray(columns[field.name]).reshape(-1), field.type))
    return pa.table(arrays, schema=form.schema())


def _suffix(data: bytes) -> str:
    return ".png" if data.startswith(b"\x89PNG") else ".jpg"


def write_metadata(folder: Path, form: Format, shards: int, tasks: Sequence[str]) -> None:
    """Everything in `meta/`, from the shards' notes, which are gone then; info.json is written last."""
    notes = [json.loads(note_path(folder, number).read_bytes()) for number in range(shards)]
    sizes: dict[str, tuple[int, int]] = {}
    for note in notes:
        for key, (height, width) in note["sizes"].items():
            if sizes.setdefault(key, (height, width)) != (height, width):
                raise size_error(f"{folder}: camera {key}", (height, width), sizes[key])
    entries = [entry for note in notes for entry in note["episodes"]]
    merged = {key: merge_stats([entry["stats"][key] for entry in entries]) for key in entries[0]["stats"]}
    write = _write_v21 if form.version == "v2.1" else _write_v30
    (folder / "meta").mkdir(exist_ok=True)
    write(folder / "meta", form, entries, tasks)
    _json(folder / "meta" / "stats.json", merged)
    _json(folder / "meta" / "info.json", form.info([entry["length"] for entry in entries], len(tasks), sizes))


def _json(path: Path, content: Any) -> None:
    atomic_write(path, json.dumps(content, indent=4, ensure_ascii=False) + "\n")


def _lines(path: Path, rows: Iterable[Any]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_v21(meta: Path, form: Format, entries: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    _lines(meta / "tasks.jsonl", ({"task_index": number, "task": task} for number, task in enumerate(tasks)))
    _lines(meta / "episodes.jsonl", ({key: entry[key] for key in ("episode_index", "tasks", "length")} for entry in entries))
    _lines(meta / "episodes_stats.jsonl", ({key: entry[key] for key in ("episode_index", "stats")} for entry in entries))


def _write_v30(meta: Path, form: Format, entries: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    texts = {"task_index": pa.array(range(len(tasks)), pa.int64()), "__index_level_0__": pa.array(tasks, pa.string())}
    # Without this note pandas would take the texts for a column, and row numbers for the tasks.
    columns = [_pandas_column("task_index", "int64", "int64"), _pandas_column(None, "unicode", "object")]
    note = {"index_columns": ["__index_level_0__"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    _parquet_table(meta / "tasks.parquet", pa.table(texts).replace_schema_metadata({b"pandas": json.dumps(note).encode()}))
    rows = [_episode_row(entry, form) for entry in entries]
    _parquet_table(meta / "episodes" / "chunk-000" / "file-000.parquet", pa.Table.from_pylist(rows))


def _pandas_column(name: str | None, pandas_type: str, numpy_type: str) -> dict[str, Any]:
    field = name or "__index_level_0__"
    return {"name": name, "field_name": field, "pandas_type": pandas_type, "numpy_type": numpy_type, "metadata": None}


def _episode_row(entry: dict[str, Any], form: Format) -> dict[str, Any]:
    chunk, file = divmod(entry["file"], 1000)
    row: dict[str, Any] = {
        "episode_index": entry["episode_index"],
        "tasks": entry["tasks"],
        "length": entry["length"],
        "data/chunk_index": chunk,
        "data/file_index": file,
        "dataset_from_index": entry["from"],
        "dataset_to_index": entry["from"] + entry["length"],
    }
    for key, begin in zip(form.camera_keys if form.video else [], entry["begins"], strict=True):
        row |= {f"videos/{key}/chunk_index": chunk, f"videos/{key}/file_index": file}
        row |= {f"videos/{key}/from_timestamp": begin, f"videos/{key}/to_timestamp": begin + entry["length"] / form.fps}
    row |= {f"stats/{key}/{name}": value for key, stats in entry["stats"].items() for name, value in stats.items()}
    return {**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}


def _parquet_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        pq.write_table(table, file)


def number_stats(values: NDArray[Any]) -> Stats:
    """Of numbers (L, D) or (L,): each a list of D values."""
    table = values.reshape(len(values), -1)
    numbers = table.astype(np.float64)
    return {
        "min": table.min(axis=0).tolist(),
        "max": table.max(axis=0).tolist(),
        "mean": numbers.mean(axis=0).tolist(),
        "std": numbers.std(axis=0).tolist(),
        "count": [len(table)],
    }


def sampled_steps(length: int) -> NDArray[np.int64]:
    """Steps of an episode whose images are counted, spread evenly."""
    count = max(min(SAMPLED_IMAGES, length), min(int(length**0.75), 10_000))
    return np.unique(np.linspace(0, length - 1, count).round().astype(np.int64))


class ImageStats:
    """Statistics of some images, added one by one."""

    def __init__(self) -> None:
        self.count = 0
        self.pixels = 0
        self.low, self.high = np.full(3, 255.0), np.zeros(3)
        self.sum, self.squares = np.zeros(3), np.zeros(3)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Count an RGB image (H, W, 3), thinned out when it is large."""
        step = max(1, max(image.shape) // LARGEST_SIDE)
        values = image[::step, ::step].reshape(-1, 3).astype(np.float64)
        self.low, self.high = np.minimum(self.low, values.min(axis=0)), np.maximum(self.high, values.max(axis=0))
        self.sum += values.sum(axis=0)
        self.squares += (values**2).sum(axis=0)
        self.pixels += len(values)
        self.count += 1

    def result(self) -> Stats:
        mean = self.sum / self.pixels
        std = np.sqrt(np.maximum(self.squares / self.pixels - mean**2, 0))
        values = {"min": self.low, "max": self.high, "mean": mean, "std": std}
        return {**{name: (value / 255).reshape(3, 1, 1).tolist() for name, value in values.items()}, "count": [self.count]}


def merge_stats(parts: Sequence[Stats]) -> Stats:
    """Statistics of several parts together."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    means, stds = (np.array([part[name] for part in parts], np.float64) for name in ("mean", "std"))
    weights = (counts / counts.sum()).reshape(-1, *[1] * (means.ndim - 1))
    mean = (weights * means).sum(axis=0)
    variance = (weights * (stds**2 + (means - mean) ** 2)).sum(axis=0)
    return {
        "min": np.array([part["min"] for part in parts]).min(axis=0).tolist(),
        "max": np.array([part["max"] for part in parts]).max(axis=0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(counts.sum())],
    }
