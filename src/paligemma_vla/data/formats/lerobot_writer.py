"""Writing LeRobot data sets, v2.1 and v3.0: shard by shard, then the metadata over all shards.

A shard is a run of episodes in one data file; in v2.1 each episode is a shard. Of each camera it has one video, unless video
files of the source are copied: a shard copies those whose first episode it has.

What is written has the columns, types and keys of LeRobot 0.6, so that its tools can resume, edit and merge it.

Statistics are as LeRobot keeps them, per episode and of all together: minimum, maximum, mean, standard deviation (of the
population), quantiles and count. Images are sampled, and their values are in [0, 1] per channel, of shape (3, 1, 1). A
quantile of an episode is its smallest value that so many values do not exceed; over all episodes LeRobot averages them.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paligemma_vla.data.convert import Encoding, Recording
from paligemma_vla.data.formats import open_file
from paligemma_vla.data.formats.lerobot_videos import CameraVideos, find_videos, plan_camera
from paligemma_vla.data.index import EpisodeIndex, find_flags
from paligemma_vla.data.reader import Picture
from paligemma_vla.data.video import CODECS, KEYFRAME_EVERY, VideoWriter
from paligemma_vla.data.writer import parquet_writer
from paligemma_vla.errors import DataError
from paligemma_vla.schema import Layout, image_column
from paligemma_vla.storage import atomic_file, atomic_write

VIDEO_STEPS, IMAGE_STEPS = 5000, 2000  # of a file of v3.0, about
CHUNK = 1000  # files per folder
STATE, ACTION, SUCCESS = "observation.state", "action", "next.success"
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
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
ARROW_TYPES = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}
SAMPLED_IMAGES = 100  # per episode at least, where it has as many, as LeRobot does
LARGEST_SIDE = 150  # of a sampled image, about
Stats = dict[str, Any]
Size = tuple[int, int]  # height and width of a camera's images


@dataclass(frozen=True)
class LeRobotOutput:
    """A LeRobot data set to write; see `data.convert.OutputFormat`.

    version: v2.1 or v3.0. videos: by feature of a camera; images of other cameras are in Parquet, as `encoding` says. fps:
    steps per second. tasks: instructions, in the order of their numbers. success: write `next.success`.
    """

    name: ClassVar = "lerobot"
    prefix: ClassVar = "lerobot:"
    version: str
    videos: dict[str, CameraVideos]
    encoding: Encoding
    crf: int
    fps: float
    layout: Layout
    tasks: tuple[str, ...]
    success: bool

    @property
    def lossless(self) -> bool:
        copied = all(videos.copied == len(videos.files) for videos in self.videos.values())
        return copied and self.encoding.image_format != "jpeg"

    def shards(self, lengths: Sequence[int]) -> list[range]:
        return _cut_shards(self.version, len(self.videos) < self.layout.cameras, lengths)

    def write(self, folder: Path, shard: int, first: tuple[int, int], recordings: Iterable[Recording]) -> dict[str, Any]:
        """One data file, and the videos that begin with one of its episodes."""
        sizes: dict[str, Size] = {}
        entries: list[dict[str, Any]] = []
        with ExitStack() as stack:

            def create(kind: str, number: int, **values: str) -> IO[bytes]:
                path = folder / self.path(kind, number, **values)
                path.parent.mkdir(parents=True, exist_ok=True)
                return stack.enter_context(atomic_file(path))

            data, stored = create("data_path", shard), [key for key in self.camera_keys if key not in self.videos]
            table = stack.enter_context(parquet_writer(data, self.schema(), stored, "SNAPPY", "task_index"))
            writers = _VideoFiles(self, create, stack)
            for recording in recordings:
                episode, step = first[0] + len(entries), first[1] + sum(entry["length"] for entry in entries)
                stats, images, begins = dict[str, Stats](), dict[str, list[bytes]](), dict[str, tuple[int, float]]()
                for camera, key in enumerate(self.camera_keys):
                    video = None
                    if key in self.videos:
                        begins[key], video = writers.place(key, episode, recording.pictures[camera][0])
                    stats[key], images[key] = self._write_camera(recording, camera, video, sizes)
                columns = self._values(recording, episode, step)
                table.write_table(self._table(columns, images), row_group_size=max(recording.length, 1))
                stats.update({key: _number_stats(values) for key, values in columns.items()})
                tasks = list(dict.fromkeys(recording.prompts))
                entry = {"episode_index": episode, "tasks": tasks, "length": recording.length, "from": step}
                entries.append({**entry, "file": shard, "videos": begins, "stats": stats})
        return {"sizes": sizes, "episodes": entries}

    def finish(self, folder: Path, notes: list[dict[str, Any]]) -> None:
        """Write everything in `meta/`, from the shards' notes; info.json is written last."""
        sizes: dict[str, Size] = {}
        for note in notes:
            for key, (height, width) in note["sizes"].items():
                _check_size(sizes, key, (height, width), f"{folder}: camera {key}")
        entries = [entry for note in notes for entry in note["episodes"]]
        (folder / "meta").mkdir(exist_ok=True)
        self._write_lists(folder / "meta", entries)
        merged = {key: _merge_stats([entry["stats"][key] for entry in entries]) for key in entries[0]["stats"]}
        for name, content in (("stats", merged), ("info", self.info([entry["length"] for entry in entries], sizes))):
            atomic_write(folder / "meta" / f"{name}.json", json.dumps(content, indent=4, ensure_ascii=False) + "\n")

    @property
    def camera_keys(self) -> list[str]:
        return camera_keys(self.layout)

    @property
    def columns(self) -> dict[str, tuple[str, int]]:
        """Type and count of the numbers in each column but those of images."""
        numbers = {STATE: ("float32", self.layout.state_dim), ACTION: ("float32", self.layout.action_dim)}
        indices = ("frame_index", "episode_index", "index", "task_index")
        success = {SUCCESS: ("bool", 1)} if self.success else {}
        return {**numbers, **success, "timestamp": ("float32", 1), **dict.fromkeys(indices, ("int64", 1))}

    def path(self, kind: str, number: int, **values: str) -> str:
        """Path, in the data set, of file or episode `number`. kind: `data_path` or `video_path`."""
        chunk, index = divmod(number, CHUNK)
        fields = {"episode_chunk": chunk, "episode_index": number, "chunk_index": chunk, "file_index": index}
        return PATHS[self.version][kind].format(**fields, **values)

    def schema(self) -> pa.Schema:
        """Of a data file, with the note by which LeRobot's loader knows images and the lengths of lists."""
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        fields = dict.fromkeys((key for key in self.camera_keys if key not in self.videos), image)
        noted: dict[str, Any] = {key: {"_type": "Image"} for key in fields}
        for key, (dtype, count) in self.columns.items():
            value = {"dtype": dtype, "_type": "Value"}
            # LeRobot keeps a single number as one, not as a list of one.
            fields[key] = ARROW_TYPES[dtype] if count == 1 else pa.list_(ARROW_TYPES[dtype], count)
            noted[key] = value if count == 1 else {"feature": value, "length": count, "_type": "Sequence"}
        return pa.schema(fields, metadata={b"huggingface": json.dumps({"info": {"features": noted}}).encode()})

    def info(self, lengths: list[int], sizes: dict[str, Size]) -> dict[str, Any]:
        """info.json. What LeRobot has no key for is under `paligemma_vla`."""
        metadata, episodes = self.layout.metadata, len(lengths)
        counts = {"total_episodes": episodes, "total_frames": sum(lengths), "total_tasks": len(self.tasks)}
        if self.version == "v2.1":
            videos = episodes * len(self.videos)
            counts |= {"total_videos": videos, "total_chunks": -(-episodes // CHUNK), "chunks_size": CHUNK}
        else:
            counts |= {"chunks_size": CHUNK, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
        names = {STATE: list(metadata.state_names) or None, ACTION: list(metadata.action_names) or None}
        features = {key: self._camera_feature(key, size) for key, size in sizes.items()}
        for key, (dtype, count) in self.columns.items():
            features[key] = {"dtype": dtype, "shape": [count], "names": names.get(key)}
        return {
            "codebase_version": self.version,
            "robot_type": metadata.robot or None,
            **counts,
            "fps": _json_number(self.fps),
            "splits": {"train": f"0:{episodes}"},
            "data_path": PATHS[self.version]["data_path"],
            "video_path": PATHS[self.version]["video_path"] if self.videos else None,
            "features": features,
            "paligemma_vla": json.loads(metadata.to_json()),
        }

    def _camera_feature(self, key: str, size: Size) -> dict[str, Any]:
        (height, width), videos = size, self.videos.get(key)
        feature: dict[str, Any] = {"shape": [height, width, 3], "names": ["height", "width", "channels"]}
        if videos is None:
            return {"dtype": "image", **feature}
        facts = {"height": height, "width": width, "codec": videos.codec, "pix_fmt": videos.pix_fmt, "channels": 3}
        facts |= {"fps": _json_number(self.fps)}
        if videos.info is None:  # what LeRobot cuts out of a video it encodes by these
            _, preset, options = CODECS[videos.codec]
            facts |= {"g": KEYFRAME_EVERY, "crf": self.crf, "preset": preset, "fast_decode": 0}
            facts |= {"video_backend": "pyav", "extra_options": options}
        info = {"has_audio": False, **(videos.info or {}), **{f"video.{name}": value for name, value in facts.items()}}
        info.pop("video.is_depth_map", None)  # as LeRobot before 0.6 named it
        return {"dtype": "video", **feature, "info": {**info, "is_depth_map": False}}

    def _write_camera(
        self, recording: Recording, camera: int, video: VideoWriter | None, sizes: dict[str, Size]
    ) -> tuple[Stats, list[bytes]]:
        """Write the frames of one camera, or return its encoded images (none if a video is copied); and statistics of some."""
        key, sampled = self.camera_keys[camera], _sampled_steps(recording.length)
        images, levels = list[bytes](), np.zeros((3, 256), np.int64)
        for step, picture in enumerate(recording.pictures[camera]):
            where = f"{recording.where(step)}: camera {key}"
            if picture is None:
                text = "got no image, expected one: LeRobot cannot leave one out"
                raise DataError(f"{where}: {text}; leave the camera out (--cameras), or the episode (--exclusion_list)")
            if video is not None or step in sampled or step == 0:
                pixels = picture.decode()
                _check_size(sizes, key, (pixels.shape[0], pixels.shape[1]), where)
                if step in sampled:
                    thin = max(1, max(pixels.shape) // LARGEST_SIDE)
                    levels += [np.bincount(channel, minlength=256) for channel in pixels[::thin, ::thin].reshape(-1, 3).T]
                if video is not None:
                    video.write(pixels, where)
            if key not in self.videos:
                images.append(self.encoding.encode(picture))
        return _image_stats(levels, len(sampled)), images

    def _values(self, recording: Recording, episode: int, step: int) -> dict[str, NDArray[Any]]:
        """Everything but images, by column. episode, step: numbers of the episode and of its first step."""
        steps, tasks = np.arange(recording.length), {text: self.tasks.index(text) for text in set(recording.prompts)}
        values = {
            STATE: recording.state,
            ACTION: recording.action,
            SUCCESS: (steps == recording.length - 1) & recording.is_terminal,
            "timestamp": (steps / self.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(recording.length, episode),
            "index": step + steps,
            "task_index": np.array([tasks[text] for text in recording.prompts]),
        }
        return {name: values[name] for name in self.columns}

    def _table(self, columns: dict[str, NDArray[Any]], images: dict[str, list[bytes]]) -> pa.Table:
        schema, rows = self.schema(), dict[str, list[Any]]()
        for field in schema:
            if field.name in images:
                kinds = [".png" if data.startswith(b"\x89PNG") else ".jpg" for data in images[field.name]]
                stored = enumerate(zip(images[field.name], kinds, strict=True))
                rows[field.name] = [{"bytes": data, "path": f"frame-{step:06d}{kind}"} for step, (data, kind) in stored]
            else:
                values = columns[field.name]
                rows[field.name] = (values if pa.types.is_fixed_size_list(field.type) else values.reshape(-1)).tolist()
        return pa.table(rows, schema=schema)

    def _write_lists(self, meta: Path, entries: Sequence[dict[str, Any]]) -> None:
        """The lists of tasks and of episodes."""
        if self.version == "v2.1":
            _write_lines(meta / "tasks.jsonl", [{"task_index": n, "task": task} for n, task in enumerate(self.tasks)])
            for name, keys in (("episodes", ("tasks", "length")), ("episodes_stats", ("stats",))):
                lines = [{key: entry[key] for key in ("episode_index", *keys)} for entry in entries]
                _write_lines(meta / f"{name}.jsonl", lines)
            return
        # Without this note pandas would take the texts for a column, and row numbers for the tasks.
        columns = [_pandas_column("task_index", "int64", "int64"), _pandas_column("task", "unicode", "object")]
        note = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
        texts = {"task_index": pa.array(range(len(self.tasks)), pa.int64()), "task": pa.array(self.tasks, pa.string())}
        _write_table(meta / "tasks.parquet", pa.table(texts, metadata={"pandas": json.dumps(note)}))
        rows = [self._episode_row(entry) for entry in entries]
        _write_table(meta / "episodes" / "chunk-000" / "file-000.parquet", pa.Table.from_pylist(rows))

    def _episode_row(self, entry: dict[str, Any]) -> dict[str, Any]:
        chunk, file = divmod(entry["file"], CHUNK)
        row = {name: entry[name] for name in ("episode_index", "tasks", "length")}
        row |= {"data/chunk_index": chunk, "data/file_index": file}
        row |= {"dataset_from_index": entry["from"], "dataset_to_index": entry["from"] + entry["length"]}
        for key, (number, begin) in entry["videos"].items():
            row |= dict(zip((f"videos/{key}/chunk_index", f"videos/{key}/file_index"), divmod(number, CHUNK), strict=True))
            row |= {f"videos/{key}/from_timestamp": begin, f"videos/{key}/to_timestamp": begin + entry["length"] / self.fps}
        row |= {f"stats/{key}/{name}": value for key, stats in entry["stats"].items() for name, value in stats.items()}
        return {**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}


def tells_success(index: EpisodeIndex) -> bool:
    """True if the source says of its episodes if they succeeded: it has a column for that alone, or one of them did."""
    for number, path in enumerate(index.paths):
        ends = (index.start + index.length - 1)[index.file == number]
        with open_file(path) as file:
            if file.tells_success or np.isin(ends, find_flags(file).terminal).any():
                return True
    return False


def camera_keys(layout: Layout) -> list[str]:
    """A feature per camera. Raises `DataError` for names that LeRobot cannot have."""
    given = layout.metadata.cameras
    names = [given[n] if n < len(given) else f"image_{n + 1}" for n in range(layout.cameras)]
    for name in names:
        if not name or "/" in name or names.count(name) > 1:
            expected = "expected different names without a slash; choose with --cameras"
            raise DataError(f"metadata cameras: got {names}, {expected}")
    return [f"observation.images.{name}" for name in names]


class _VideoFiles:
    """The video files that begin in a shard. create: opens one for writing."""

    def __init__(self, form: LeRobotOutput, create: Callable[..., IO[bytes]], stack: ExitStack) -> None:
        self.form, self.create, self.stack = form, create, stack
        self.writers = dict[str, VideoWriter]()

    def place(self, key: str, episode: int, first: Picture | None) -> tuple[tuple[int, float], VideoWriter | None]:
        """Number of an episode's video file, and the episode's begin in it, in s; and what encodes it, if it is not copied.

        first: its first image.
        """
        videos = self.form.videos[key]
        number = bisect_right(videos.files, episode, key=lambda file: file.first) - 1
        file = videos.files[number]
        if file.copied:
            source = None if first is None else first.frame()
            assert source is not None
            if file.first == episode:
                with open(source[0], "rb") as stream:
                    shutil.copyfileobj(stream, self.create("video_path", number, video_key=key))
            return (number, source[1]), None
        if file.first == episode:
            target = self.create("video_path", number, video_key=key)
            self.writers[key] = self.stack.enter_context(VideoWriter(target, videos.codec, self.form.fps, self.form.crf))
        return (number, self.writers[key].frames / self.form.fps), self.writers[key]


def _cut_shards(version: str, stored: bool, lengths: Sequence[int]) -> list[range]:
    """The episodes of each data file. stored: it holds images."""
    most, shards, first, steps = (IMAGE_STEPS if stored else VIDEO_STEPS), list[range](), 0, 0
    if version == "v2.1":
        most = 0
    for episode, length in enumerate(lengths):
        if episode > first and steps + length > most:
            shards.append(range(first, episode))
            first, steps = episode, 0
        steps += length
    return [*shards, range(first, len(lengths))]


def plan_videos(
    index: EpisodeIndex, cameras: Sequence[int], version: str, images: str | None, codec: str | None, copy: bool
) -> list[CameraVideos | None]:
    """Of each camera of `index`, how it is written to videos; None: its images are stored in Parquet.

    images: `video` or `parquet` for all cameras; None: each as in the source. codec: of what is encoded; None: the source's,
    or h264. copy: video files of which all episodes are kept, in order, are copied.
    """
    sources = [find_videos(index, image_column(camera + 1), version) for camera in cameras]
    chosen = [images == "video" or (images is None and source is not None) for source in sources]
    begins = [shard.start for shard in _cut_shards(version, not all(chosen), index.length.tolist())]
    return [plan_camera(source, begins, codec, copy) if video else None for source, video in zip(sources, chosen, strict=True)]


def _check_size(sizes: dict[str, Size], key: str, size: Size, where: str) -> None:
    """Images of one camera are of one size. Raises `DataError`."""
    if size != sizes.setdefault(key, size):
        got, expected = (f"{width} x {height}" for height, width in (size, sizes[key]))
        raise DataError(
            f"{where}: got {got} pixels, expected {expected} as before: in LeRobot a camera has one size; resize them"
        )


def _json_number(value: float) -> int | float:
    """Whole numbers as such: LeRobot's own fps are."""
    return int(value) if value == int(value) else value


def _pandas_column(name: str, pandas_type: str, numpy_type: str) -> dict[str, Any]:
    return {"name": name, "field_name": name, "pandas_type": pandas_type, "numpy_type": numpy_type, "metadata": None}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        pq.write_table(table, file)


def _number_stats(values: NDArray[Any]) -> Stats:
    """Of numbers (L, D) or (L,): each a list of D values."""
    numbers = values.reshape(len(values), -1).astype(np.float64)
    quantiles = np.quantile(numbers, list(QUANTILES.values()), axis=0, method="inverted_cdf")
    stats = {"min": numbers.min(axis=0), "max": numbers.max(axis=0), "mean": numbers.mean(axis=0), "std": numbers.std(axis=0)}
    return _listed({**stats, **dict(zip(QUANTILES, quantiles, strict=True))}, len(numbers))


def _image_stats(levels: NDArray[np.int64], images: int) -> Stats:
    """Of so many images, from how many pixels have each level in each channel (3, 256)."""
    values, total, below = np.arange(256) / 255, int(levels[0].sum()), levels.cumsum(axis=1)

    def smallest(count: float) -> NDArray[np.float64]:
        """Of each channel the smallest value that at least `count` pixels do not exceed."""
        found: NDArray[np.float64] = values[(below < count).sum(axis=1)]
        return found

    mean = levels @ values / total
    std = np.sqrt((levels * (values - mean[:, None]) ** 2).sum(axis=1) / total)
    stats = {"min": smallest(1), "max": smallest(total), "mean": mean, "std": std}
    stats |= {name: smallest(share * total) for name, share in QUANTILES.items()}
    return _listed({name: value.reshape(3, 1, 1) for name, value in stats.items()}, images)


def _merge_stats(parts: Sequence[Stats]) -> Stats:
    """Statistics of several parts together."""
    found = {name: np.array([part[name] for part in parts], np.float64) for name in parts[0]}
    counts = found.pop("count")[:, 0]
    weights = (counts / counts.sum()).reshape(-1, *[1] * (found["mean"].ndim - 1))
    merged = {name: (weights * values).sum(axis=0) for name, values in found.items()}
    variance = (weights * (found["std"] ** 2 + (found["mean"] - merged["mean"]) ** 2)).sum(axis=0)
    merged |= {"min": found["min"].min(axis=0), "max": found["max"].max(axis=0), "std": np.sqrt(variance)}
    return _listed(merged, int(counts.sum()))


def _listed(stats: dict[str, NDArray[np.float64]], count: int) -> Stats:
    """In the order of LeRobot's columns."""
    listed = {name: stats[name].tolist() for name in ("min", "max", "mean", "std")}
    return {**listed, "count": [count], **{name: stats[name].tolist() for name in QUANTILES}}


def _sampled_steps(length: int) -> set[int]:
    """Steps of an episode whose images are counted, spread evenly."""
    count = max(min(SAMPLED_IMAGES, length), min(int(length**0.75), 10_000))
    return set(np.linspace(0, length - 1, count).round().astype(np.int64).tolist())
