"""The metadata of a LeRobot data set, v2.1 or v3.0: features, tasks, where each episode lies, and what is selected of it.

`PATH?cameras=front,wrist&episodes=0:50` names a data set, or one of its files, and what is wanted of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paligemma_vla.data.formats import READ_ERRORS
from paligemma_vla.data.formats.parquet import MOST_NUMBERS
from paligemma_vla.errors import DataError, closest, first_line
from paligemma_vla.storage import read_json

Indices = NDArray[np.int64]
MOST = 2**40  # episodes, steps, files
INFO = "meta/info.json"
VERSIONS = ("v2.1", "v3.0")
CAMERA_PREFIXES = ("observation.images.", "observation.")
# What LeRobot itself offers for what we do not read.
OLDER = {
    "v2.0": "python -m lerobot.datasets.v21.convert_dataset_v20_to_v21 --repo-id=... (lerobot 0.3)",
    "v1": "python -m lerobot.datasets.v2.convert_dataset_v1_to_v2 --repo-id=... (lerobot 0.3), then to v2.1",
}
# Columns that place a row; every data set has them.
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
EXPECTED = "PATH?cameras=NAME,NAME&episodes=FIRST:STOP&state=FEATURE&action=FEATURE, each of them if wanted"


@dataclass(frozen=True)
class Selection:
    """What is wanted of a data set.

    cameras: names in the order image_1, image_2, ... (None: all of them, as info.json has them). episodes: [first, stop) of
    their numbers, None where it is open. state, action: the features that hold them.
    """

    cameras: tuple[str, ...] | None = None
    episodes: tuple[int | None, int | None] = (None, None)
    state: str = "observation.state"
    action: str = "action"

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Read what follows the question mark. Raises `DataError` that begins with `where`."""
        values: dict[str, object] = {}
        for part in filter(None, text.split("&")):
            key, sign, value = part.partition("=")
            if key not in _PARSERS:
                raise DataError(f"{where}: got '{key}', expected {EXPECTED}{closest(key, _PARSERS)}")
            if not sign or not value or key in values:
                raise DataError(f"{where}: {key}: got '{part}', expected one value; write {EXPECTED}")
            values[key] = _PARSERS[key](value, where)
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """As it is written; nothing where nothing is selected."""
        first, stop = ("" if number is None else str(number) for number in self.episodes)
        default = Selection()
        parts = [
            f"cameras={','.join(self.cameras)}" if self.cameras is not None else "",
            f"episodes={first}:{stop}" if self.episodes != default.episodes else "",
            f"state={self.state}" if self.state != default.state else "",
            f"action={self.action}" if self.action != default.action else "",
        ]
        return "&".join(filter(None, parts))


def parse_range(text: str, where: str) -> tuple[int | None, int | None]:
    """`FIRST:STOP`, of which either may be missing. Raises `DataError`."""
    first, colon, stop = text.partition(":")
    if not colon or not all(number == "" or (number.isascii() and number.isdigit()) for number in (first, stop)):
        raise DataError(f"{where}: episodes: got '{text}', expected FIRST:STOP, as 0:50 for the first fifty")
    return int(first) if first else None, int(stop) if stop else None


def _camera_names(text: str, where: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise DataError(f"{where}: cameras: got '{text}', expected different names with commas between them")
    return names


def _feature(text: str, where: str) -> str:
    return text


_PARSERS = {"cameras": _camera_names, "episodes": parse_range, "state": _feature, "action": _feature}


@dataclass(frozen=True)
class Place:
    """path: of the data set's folder, or of one of its data files."""

    path: str
    selection: Selection

    @classmethod
    def parse(cls, text: str, where: str = "lerobot") -> Self:
        """Raises `DataError` that begins with `where`. A leading `~` is the home folder, as in a shell."""
        if not os.path.exists(text):
            text = os.path.expanduser(text)
        if os.path.exists(text):  # a name may hold a question mark
            return cls(text, Selection())
        path, _, selection = text.rpartition("?") if "?" in text else (text, "", "")
        if not path:
            raise DataError(f"{where}: got 'lerobot:{text}', expected a folder after lerobot: as in lerobot:{EXPECTED}")
        return cls(path, Selection.parse(selection, f"{where}: {text}"))

    def __str__(self) -> str:
        return f"{self.path}?{self.selection}" if str(self.selection) else self.path


@dataclass(frozen=True)
class Feature:
    """One entry of info.json. dtype: `video`, `image`, or of a number. names: one per dimension, or none."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def is_camera(self) -> bool:
        return self.dtype in ("video", "image")

    @property
    def camera(self) -> str:
        """A camera's short name."""
        prefix = next((prefix for prefix in CAMERA_PREFIXES if self.key.startswith(prefix)), "")
        return self.key.removeprefix(prefix)


def find_root(path: str) -> str:
    """The data set's folder for itself or for one of its files. Raises `DataError`."""
    folder = Path(path)
    for candidate in (folder, *folder.parents[:6]):
        if (candidate / INFO).is_file():
            return str(candidate)
    remedy = "give its folder (one of the hub first: hf download NAME --repo-type dataset --local-dir FOLDER)"
    raise DataError(f"{path}: got no {INFO} there, expected a LeRobot data set; {remedy}")


def read_info(root: str) -> dict[str, Any]:
    path = f"{root}/{INFO}"
    info = read_json(path, DataError, "restore it")
    version = info.get("codebase_version")
    if version not in VERSIONS:
        command = next((command for old, command in OLDER.items() if str(version).startswith(old)), None)
        remedy = f"convert it with LeRobot: {command}" if command else "convert it with LeRobot, or restore the file"
        raise DataError(f"{path}: codebase_version: got {version}, expected one of {', '.join(VERSIONS)}; {remedy}")
    fps = info.get("fps")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < float("inf"):
        raise DataError(f"{path}: fps: got {fps!r}, expected frames per second, more than 0; restore the file")
    chunk = info.get("chunks_size", 1)
    if not isinstance(chunk, int) or chunk < 1:
        raise DataError(f"{path}: chunks_size: got {chunk!r}, expected a whole number of at least 1; restore the file")
    templates = ["data_path", *(["video_path"] if _has_videos(info) else [])]
    for name in templates:
        if not isinstance(info.get(name), str):
            raise DataError(f"{path}: {name}: got {info.get(name)!r}, expected a template of paths; restore the file")
    return info


def _has_videos(info: dict[str, Any]) -> bool:
    features = info.get("features")
    return isinstance(features, dict) and any(
        isinstance(raw, dict) and raw.get("dtype") == "video" for raw in features.values()
    )


def read_features(info: dict[str, Any], where: str) -> dict[str, Feature]:
    raw = info.get("features")
    if not isinstance(raw, dict) or not raw:
        raise DataError(f"{where}: features: got {type(raw).__name__}, expected an object with a feature at least; restore it")
    features = {}
    for key, value in raw.items():
        shape = value.get("shape") if isinstance(value, dict) else None
        if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape) or not isinstance(value.get("dtype"), str):
            got = json.dumps(value)[:120]
            raise DataError(f"{where}: features.{key}: got {got}, expected dtype, shape and names; restore the file")
        names = _names(value.get("names"))
        dimensions = shape[0] if len(shape) == 1 else -1
        features[key] = Feature(key, value["dtype"], tuple(shape), names if len(names) == dimensions else ())
    return features


def _names(raw: Any) -> tuple[str, ...]:
    """Names of dimensions: a list, lists by group ({"motors": [...]}), or numbers by name."""
    if isinstance(raw, list):
        return tuple(name for entry in raw for name in (_names(entry) if isinstance(entry, list | dict) else (str(entry),)))
    if isinstance(raw, dict) and raw and all(isinstance(value, int) for value in raw.values()):
        return tuple(sorted(raw, key=lambda name: int(raw[name])))
    if isinstance(raw, dict):
        return tuple(name for value in raw.values() for name in _names(value))
    return ()


@dataclass(frozen=True)
class VideoSpans:
    """For one camera, per episode: which of `files` (relative to the data set) it is in, and where it begins in it, in s."""

    files: tuple[str, ...]
    file: Indices
    start: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Metadata:
    """root: the folder. Per episode, in order: its number, length, and which of `files` (relative) holds its rows.

    videos: by feature key. extra: what this project kept of its own when it wrote the data set.
    """

    root: str
    version: str
    fps: float
    robot: str
    features: dict[str, Feature]
    tasks: dict[int, str]
    number: Indices
    length: Indices
    files: tuple[str, ...]
    file: Indices
    videos: dict[str, VideoSpans]
    extra: dict[str, Any]
    sources: tuple[str, ...]

    @cached_property
    def file_numbers(self) -> dict[str, int]:
        """Place of each file in `files`."""
        return {name: number for number, name in enumerate(self.files)}

    def cameras(self, selection: Selection) -> list[Feature]:
        """The selected cameras in order. Raises `DataError` that lists those there are."""
        known = [feature for feature in self.features.values() if feature.is_camera]
        if selection.cameras is None:
            chosen = known
        else:
            by_name = {**{feature.camera: feature for feature in known}, **{feature.key: feature for feature in known}}
            for name in selection.cameras:
                if name not in by_name:
                    there = ", ".join(feature.camera for feature in known) or "none"
                    raise DataError(f"{self.root}: cameras: got '{name}', expected of {there}")
            chosen = [by_name[name] for name in selection.cameras]
        if not chosen:
            raise DataError(f"{self.root}/{INFO}: got no feature of dtype image or video, expected a camera at least")
        return chosen

    def vector(self, key: str, role: str) -> Feature:
        """The feature that holds the state or the action (`role`). Raises `DataError` that lists those there are."""
        feature = self.features.get(key)
        if feature is None:
            there = [one.key for one in self.features.values() if not one.is_camera and one.key not in INDEX_COLUMNS]
            raise DataError(
                f"{self.root}/{INFO}: features: got no '{key}', expected one for the {role}; name it with ?{role}=FEATURE"
                f"{closest('', there)}"
            )
        numbers = feature.shape[0] if len(feature.shape) == 1 else 0
        if feature.is_camera or feature.dtype == "string" or not 0 < numbers <= MOST_NUMBERS:
            got = f"got dtype {feature.dtype} of shape {list(feature.shape)}, expected 1 to {MOST_NUMBERS} numbers in a row"
            raise DataError(f"{self.root}/{INFO}: features.{key}: {got}; name another with ?{role}=FEATURE")
        return feature

    def selected(self, selection: Selection) -> NDArray[np.bool_]:
        """Which episodes are wanted (E,). Raises `DataError` for a range that leaves the data."""
        first, stop = selection.episodes
        most = int(self.number.max()) + 1
        first, stop = first or 0, most if stop is None else stop
        if not first < stop <= most:
            got = f"got {first}:{stop}, expected a range within 0:{most}, the numbers of its episodes"
            raise DataError(f"{self.root}: episodes: {got}")
        return (self.number >= first) & (self.number < stop)


def load_metadata(root: str) -> Metadata:
    """Metadata of a data set, kept until one of its files changes. Raises `DataError` naming file, got and expected."""
    return _load(root, tuple(_stamp(root, name) for name in _metadata_files(root)))


def _metadata_files(root: str) -> list[str]:
    names = [INFO, "meta/tasks.jsonl", "meta/episodes.jsonl", "meta/tasks.parquet"]
    names += sorted(str(path.relative_to(root)) for path in Path(root, "meta/episodes").rglob("*.parquet"))
    return [name for name in names if os.path.isfile(os.path.join(root, name))]


def _stamp(root: str, name: str) -> tuple[str, int, int]:
    status = os.stat(os.path.join(root, name))
    return name, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=16)
def _load(root: str, stamps: tuple[tuple[str, int, int], ...]) -> Metadata:
    info = read_info(root)
    version = info["codebase_version"]
    features = read_features(info, f"{root}/{INFO}")
    names = [name for name, _, _ in stamps]
    if version == "v2.1":
        tasks, episodes = tasks_v21(root), episodes_v21(root, info, features)
    else:
        tasks, episodes = tasks_v30(root), episodes_v30(root, names, info, features)
    _check_counts(root, info, episodes, tasks)
    files, file = _distinct(episodes.file)
    extra = info.get("paligemma_vla")
    return Metadata(
        root=root,
        version=version,
        fps=float(info["fps"]),
        robot=info["robot_type"] if isinstance(info.get("robot_type"), str) else "",
        features=features,
        tasks=tasks,
        number=episodes.number,
        length=episodes.length,
        files=files,
        file=file,
        videos={key: VideoSpans(*_distinct(names), start) for key, (names, start) in episodes.videos.items()},
        extra=extra if isinstance(extra, dict) else {},
        sources=tuple(names),
    )


def _distinct(names: Sequence[str]) -> tuple[tuple[str, ...], Indices]:
    """Different names in the order they first occur, and the number of each one's."""
    place: dict[str, int] = {}
    file = np.array([place.setdefault(name, len(place)) for name in names], np.int64)
    return tuple(place), file


def _check_counts(root: str, info: dict[str, Any], episodes: Episodes, tasks: dict[int, str]) -> None:
    """What info.json counts against what is listed. Raises `DataError` with the first difference."""
    where, numbers = f"{root}/{INFO}", episodes.number
    if len(numbers) == 0:
        raise DataError(f"{root}/meta: got no episode, expected one at least")
    if len(np.unique(numbers)) != len(numbers):
        raise DataError(f"{root}/meta: got an episode_index twice, expected each once; restore the list of episodes")
    counted = {"total_episodes": len(numbers), "total_frames": int(episodes.length.sum()), "total_tasks": len(tasks)}
    for name, expected in counted.items():
        if name in info and info[name] != expected:
            text = f"{name}: got {info[name]!r}, expected {expected} as meta lists them"
            raise DataError(f"{where}: {text}; the copy is incomplete, or restore the file")


@dataclass(frozen=True)
class Episodes:
    """Per episode, in order: number, length, data file. videos: per feature, file and begin in it, in seconds."""

    number: Indices
    length: Indices
    file: list[str]
    videos: dict[str, tuple[list[str], NDArray[np.float64]]]


def _lines(root: str, name: str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    path = f"{root}/{name}"
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as lines of JSON ({first_line(error)}); restore it") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: got lines that are no objects, expected an object per line; restore it")
    return rows


def _table(root: str, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    path = f"{root}/{name}"
    try:
        with pq.ParquetFile(path) as file:
            wanted = None if columns is None else [column for column in columns if column in file.schema_arrow.names]
            return file.read(columns=wanted, use_threads=False)
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read as Parquet ({first_line(error)}); restore it") from error


def _whole_numbers(values: Sequence[Any], where: str) -> Indices:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MOST:
            raise DataError(f"{where}: got {str(value)[:80]}, expected a whole number from 0 to {MOST - 1}; restore the file")
    return np.array(values, np.int64)


def tasks_v21(root: str) -> dict[int, str]:
    """Instructions by their numbers."""
    name = "meta/tasks.jsonl"
    rows = _lines(root, name)
    numbers = _whole_numbers([row.get("task_index") for row in rows], f"{root}/{name}: task_index")
    return _tasks(numbers, [row.get("task") for row in rows], f"{root}/{name}")


def tasks_v30(root: str) -> dict[int, str]:
    """As `tasks_v21`. The texts are a pandas index; where its note is missing, they are still the one column of strings."""
    name = "meta/tasks.parquet"
    table = _table(root, name)
    where = f"{root}/{name}"
    texts = [field.name for field in table.schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    column = next((known for known in ("task", "__index_level_0__", *texts) if known in texts), None)
    if column is None or "task_index" not in table.column_names:
        got = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
        raise DataError(f"{where}: got columns {got}, expected task_index and the tasks as strings; restore it")
    numbers = _whole_numbers(table["task_index"].to_pylist(), f"{where}: task_index")
    try:
        return _tasks(numbers, table[column].to_pylist(), where)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: got tasks that are not UTF-8, expected text; restore the file") from error


def _tasks(numbers: Indices, texts: Sequence[Any], where: str) -> dict[int, str]:
    tasks: dict[int, str] = {}
    for number, text in zip(numbers.tolist(), texts, strict=True):
        if not isinstance(text, str) or tasks.get(number, text) != text:
            raise DataError(f"{where}: task_index {number}: got {text!r}, expected one text; restore the file")
        tasks[number] = text
    return tasks


def _path(template: str, where: str, **values: object) -> str:
    """Fill in a template of paths; the result lies in the data set."""
    try:
        name = os.path.normpath(template.format(**values))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: got {template!r}, expected a template with {', '.join(values)}; restore the file") from error
    if os.path.isabs(name) or name.startswith("..") or "\0" in name:
        raise DataError(f"{where}: got {template!r}, expected a path within the data set; restore the file")
    return name


def episodes_v21(root: str, info: dict[str, Any], features: dict[str, Feature]) -> Episodes:
    """The episodes of v2.1; each has files of its own."""
    name = "meta/episodes.jsonl"
    rows = _lines(root, name)
    numbers = _whole_numbers([row.get("episode_index") for row in rows], f"{root}/{name}: episode_index")
    lengths = _whole_numbers([row.get("length") for row in rows], f"{root}/{name}: length")
    order = np.argsort(numbers)
    numbers, lengths = numbers[order], lengths[order]
    size, where = info.get("chunks_size", 1000), f"{root}/{INFO}"
    places = [{"episode_chunk": number // size, "episode_index": number} for number in numbers.tolist()]
    return Episodes(
        number=numbers,
        length=lengths,
        file=[_path(info["data_path"], f"{where}: data_path", **place) for place in places],
        videos={
            key: (
                [_path(info["video_path"], f"{where}: video_path", **place, video_key=key) for place in places],
                np.zeros(len(places)),
            )
            for key, feature in features.items()
            if feature.dtype == "video"
        },
    )


def episodes_v30(root: str, names: Sequence[str], info: dict[str, Any], features: dict[str, Feature]) -> Episodes:
    """The episodes of v3.0; several share a file."""
    cameras = [key for key, feature in features.items() if feature.dtype == "video"]
    columns = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
    for key in cameras:
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    parts = [_table(root, name, columns) for name in names if name.startswith("meta/episodes/")]
    where = f"{root}/meta/episodes"
    if not parts:
        raise DataError(f"{where}: got no Parquet file there, expected chunk-000/file-000.parquet; restore it")
    for part in parts:
        missing = [name for name in columns if name not in part.column_names]
        if missing:
            raise DataError(f"{where}: got no column {missing[0]}, expected one; restore the file")
    table = pa.concat_tables(parts).sort_by("episode_index")
    numbers = {name: _whole_numbers(table[name].to_pylist(), f"{where}: {name}") for name in columns if "timestamp" not in name}
    template = f"{root}/{INFO}"

    def paths(prefix: str, pattern: str, **values: object) -> list[str]:
        chunks, files = numbers[f"{prefix}/chunk_index"], numbers[f"{prefix}/file_index"]
        return [
            _path(pattern, template, chunk_index=chunk, file_index=file, **values)
            for chunk, file in zip(chunks.tolist(), files.tolist(), strict=True)
        ]

    return Episodes(
        number=numbers["episode_index"],
        length=numbers["length"],
        file=paths("data", info["data_path"]),
        videos={
            key: (
                paths(f"videos/{key}", info["video_path"], video_key=key),
                _times(table[f"videos/{key}/from_timestamp"].to_numpy(), f"{where}: videos/{key}/from_timestamp"),
            )
            for key in cameras
        },
    )


def _times(values: NDArray[Any], where: str) -> NDArray[np.float64]:
    times = values.astype(np.float64)
    if not (np.isfinite(times) & (times >= 0)).all():
        raise DataError(f"{where}: got {times[~(times >= 0)][:1]}, expected seconds of at least 0; restore the file")
    return times
