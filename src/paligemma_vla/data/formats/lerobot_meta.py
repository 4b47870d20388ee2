"""The metadata of a LeRobot data set, v2.1 or v3.0: features, tasks, where each episode lies, and what is selected of it.

`PATH?cameras=front,wrist&episodes=0:50` names a data set, or one of its files, and the selection.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import json as arrow_json

from paligemma_vla.data.formats import READ_ERRORS
from paligemma_vla.data.formats.parquet import MAX_DIMENSION
from paligemma_vla.errors import DataError, closest, first_line
from paligemma_vla.schema import Rows
from paligemma_vla.storage import read_json

INFO = "meta/info.json"
VERSIONS = ("v2.1", "v3.0")
# What LeRobot itself offers for what we do not read.
OLDER = {
    "v2.0": "python -m lerobot.datasets.v21.convert_dataset_v20_to_v21 --repo-id=... (lerobot 0.3)",
    "v1": "python -m lerobot.datasets.v2.convert_dataset_v1_to_v2 --repo-id=... (lerobot 0.3), then to v2.1",
}
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # of every row, in every data set
CAMERA_PREFIXES = ("observation.images.", "observation.")
LARGEST = 2**40  # episodes, steps, files
SELECTION = "PATH?cameras=NAME,NAME&episodes=FIRST:STOP&state=FEATURE&action=FEATURE, each of them if wanted"


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
        parsers: dict[str, Callable[[str, str], object]] = {
            "cameras": _parse_names,
            "episodes": parse_range,
            "state": lambda value, where: value,
            "action": lambda value, where: value,
        }
        values: dict[str, Any] = {}
        for part in filter(None, text.split("&")):
            key, _, value = part.partition("=")
            if key not in parsers or not value or key in values:
                raise DataError(f"{where}: got '{part}', expected {SELECTION}{closest(key, parsers)}")
            values[key] = parsers[key](value, where)
        return cls(**values)

    def __str__(self) -> str:
        """As it is written; empty where nothing is selected."""
        first, stop = ("" if number is None else str(number) for number in self.episodes)
        written = {"cameras": ",".join(self.cameras or ()), "episodes": f"{first}:{stop}"}
        written |= {"state": self.state, "action": self.action}
        return "&".join(f"{name}={text}" for name, text in written.items() if getattr(self, name) != getattr(Selection, name))


def parse_range(text: str, where: str) -> tuple[int | None, int | None]:
    """`FIRST:STOP`, of which either may be missing. Raises `DataError`."""
    first, colon, stop = text.partition(":")
    if not colon or not all(number == "" or (number.isascii() and number.isdigit()) for number in (first, stop)):
        raise DataError(f"{where}: episodes: got '{text}', expected FIRST:STOP, as 0:50 for the first fifty")
    return int(first) if first else None, int(stop) if stop else None


def _parse_names(text: str, where: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise DataError(f"{where}: cameras: got '{text}', expected different names with commas between them")
    return names


@dataclass(frozen=True)
class Location:
    """path: of the data set's folder, or of one of its data files."""

    path: str
    selection: Selection

    @classmethod
    def parse(cls, text: str, where: str = "lerobot") -> Self:
        """Raises `DataError` that begins with `where`. A leading `~` is the home folder, as in a shell."""
        text = text if os.path.exists(text) else os.path.expanduser(text)
        if os.path.exists(text):  # a name may hold a question mark
            return cls(text, Selection())
        path, _, selection = text.rpartition("?") if "?" in text else (text, "", "")
        if not path:
            raise DataError(f"{where}: got 'lerobot:{text}', expected a folder after lerobot: as in lerobot:{SELECTION}")
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


@dataclass(frozen=True)
class VideoSpans:
    """Of one camera, per episode: which of `files` (relative to the data set) it is in, and where it begins in it, in s."""

    files: tuple[str, ...]
    file: Rows
    start: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Metadata:
    """root: the folder. Per episode, in order: its number, length, and which of `files` (relative) holds its rows.

    videos: by feature key. extra: what this project kept of its own when it wrote the data set. sources: files that this was
    read from (relative).
    """

    root: str
    fps: float
    robot: str
    features: dict[str, Feature]
    tasks: dict[int, str]
    number: Rows
    length: Rows
    files: tuple[str, ...]
    file: Rows
    videos: dict[str, VideoSpans]
    extra: dict[str, Any]
    sources: tuple[str, ...]

    @cached_property
    def file_numbers(self) -> dict[str, int]:
        """Index of each file in `files`."""
        return {name: number for number, name in enumerate(self.files)}

    def cameras(self, selection: Selection) -> list[Feature]:
        """The selected cameras in order. Raises `DataError` that lists those there are."""
        known = [feature for feature in self.features.values() if feature.is_camera]
        if not known:
            raise DataError(f"{self.root}/{INFO}: got no feature of dtype image or video, expected a camera at least")
        by_name = {**{feature.camera: feature for feature in known}, **{feature.key: feature for feature in known}}
        for name in selection.cameras or ():
            if name not in by_name:
                raise DataError(f"{self.root}: cameras: got '{name}', expected of {', '.join(one.camera for one in known)}")
        return known if selection.cameras is None else [by_name[name] for name in selection.cameras]

    def vector(self, key: str, role: str) -> Feature:
        """The feature that holds the state or the action (`role`). Raises `DataError` that lists those there are."""
        where, feature = f"{self.root}/{INFO}: features", self.features.get(key)
        if feature is None:
            there = [one.key for one in self.features.values() if not one.is_camera and one.key not in INDEX_COLUMNS]
            got = f"got no '{key}', expected one for the {role}; name it with ?{role}=FEATURE"
            raise DataError(f"{where}: {got}{closest('', there)}")
        numbers = feature.shape[0] if len(feature.shape) == 1 else 0
        if feature.is_camera or feature.dtype == "string" or not 0 < numbers <= MAX_DIMENSION:
            got = f"got dtype {feature.dtype} of shape {list(feature.shape)}, expected 1 to {MAX_DIMENSION} numbers in a row"
            raise DataError(f"{where}.{key}: {got}; name another with ?{role}=FEATURE")
        return feature

    def selected(self, selection: Selection) -> NDArray[np.bool_]:
        """Mask of the selected episodes (E,). Raises `DataError` for a range that leaves the data."""
        first, stop = selection.episodes
        end = int(self.number.max()) + 1
        first, stop = first or 0, end if stop is None else stop
        if not first < stop <= end:
            got = f"got {first}:{stop}, expected a range within 0:{end}, the numbers of its episodes"
            raise DataError(f"{self.root}: episodes: {got}")
        return (self.number >= first) & (self.number < stop)


def find_root(path: str) -> str:
    """The data set's folder, for the folder itself or for one of its files. Raises `DataError`."""
    for candidate in (Path(path), *Path(path).parents[:6]):
        if (candidate / INFO).is_file():
            return str(candidate)
    remedy = "give its folder (one of the hub first: hf download NAME --repo-type dataset --local-dir FOLDER)"
    raise DataError(f"{path}: got no {INFO} there, expected a LeRobot data set; {remedy}")


def load_metadata(root: str) -> Metadata:
    """Metadata of a data set, kept until one of its files changes. Raises `DataError` naming file, got and expected."""
    names = [INFO, "meta/tasks.jsonl", "meta/episodes.jsonl", "meta/tasks.parquet"]
    names += sorted(str(path.relative_to(root)) for path in Path(root, "meta/episodes").rglob("*.parquet"))
    stats = {name: os.stat(os.path.join(root, name)) for name in names if os.path.isfile(os.path.join(root, name))}
    return _load(root, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()))


@lru_cache(maxsize=16)
def _load(root: str, stamps: tuple[tuple[str, int, int], ...]) -> Metadata:
    info, names = _read_info(f"{root}/{INFO}"), tuple(name for name, _, _ in stamps)
    features = _read_features(info, f"{root}/{INFO}")
    cameras = [key for key, feature in features.items() if feature.dtype == "video"]
    tasks = _read_tasks(f"{root}/meta/tasks.{'jsonl' if info['codebase_version'] == 'v2.1' else 'parquet'}")
    episodes = _read_episodes(root, info, names, cameras)
    number, length = episodes["episode_index"], episodes["length"]
    _check_counts(root, info, number, length, tasks)

    def paths(template: str, prefix: str, **values: str) -> list[str]:
        """Of the file of each episode, for rows (prefix `data`) or frames (`videos/KEY`)."""
        if info["codebase_version"] == "v2.1":
            fields = {"episode_chunk": number // info.get("chunks_size", 1000), "episode_index": number}
        else:
            fields = {name: episodes[f"{prefix}/{name}"] for name in ("chunk_index", "file_index")}
        rows = zip(*(column.tolist() for column in fields.values()), strict=True)
        where = f"{root}/{INFO}: {template}"
        return [_fill(info.get(template) or "", where, **dict(zip(fields, row, strict=True)), **values) for row in rows]

    def spans(key: str) -> VideoSpans:
        start = episodes.get(f"videos/{key}/from_timestamp", np.zeros(len(number)))
        return VideoSpans(*_distinct(paths("video_path", f"videos/{key}", video_key=key)), start)

    files, file = _distinct(paths("data_path", "data"))
    robot, extra = info.get("robot_type"), info.get("paligemma_vla")
    return Metadata(
        root=root,
        fps=float(info["fps"]),
        robot=robot if isinstance(robot, str) else "",
        features=features,
        tasks=tasks,
        number=number,
        length=length,
        files=files,
        file=file,
        videos={key: spans(key) for key in cameras},
        extra=extra if isinstance(extra, dict) else {},
        sources=names,
    )


def _read_info(path: str) -> dict[str, Any]:
    info = read_json(path, DataError, "restore it")
    version, features = info.get("codebase_version"), info.get("features")
    if version not in VERSIONS:
        command = next((command for old, command in OLDER.items() if str(version).startswith(old)), "see its documentation")
        expected = f"expected one of {', '.join(VERSIONS)}; convert it with LeRobot: {command}"
        raise DataError(f"{path}: codebase_version: got {version}, {expected}")
    fps: Any = info.get("fps")
    chunk = info.get("chunks_size", 1)
    for name, fits, expected in [
        ("features", isinstance(features, dict) and features, "an object with a feature at least"),
        ("fps", type(fps) in (int, float) and 0 < fps < float("inf"), "frames per second, more than 0"),
        ("chunks_size", isinstance(chunk, int) and chunk >= 1, "a whole number of at least 1"),
        ("data_path", isinstance(info.get("data_path"), str), "a template of paths"),
        ("video_path", isinstance(info.get("video_path"), str | None), "a template of paths"),
    ]:
        if not fits:
            raise DataError(f"{path}: {name}: got {json.dumps(info.get(name))[:120]}, expected {expected}; restore the file")
    return info


def _read_features(info: dict[str, Any], where: str) -> dict[str, Feature]:
    features = {}
    for key, raw in info["features"].items():
        shape = raw.get("shape") if isinstance(raw, dict) else None
        if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape) or not isinstance(raw.get("dtype"), str):
            got = json.dumps(raw)[:120]
            raise DataError(f"{where}: features.{key}: got {got}, expected dtype, shape and names; restore the file")
        names = _dimension_names(raw.get("names"))
        features[key] = Feature(key, raw["dtype"], tuple(shape), names if [len(names)] == shape else ())
    return features


def _dimension_names(raw: Any) -> tuple[str, ...]:
    """Names of dimensions: a list, lists by group ({"motors": [...]}), or numbers by name."""
    if isinstance(raw, dict) and raw and all(isinstance(value, int) for value in raw.values()):
        return tuple(sorted(raw, key=lambda name: int(raw[name])))
    parts = raw.values() if isinstance(raw, dict) else raw if isinstance(raw, list) else ()
    return tuple(name for part in parts for name in (_dimension_names(part) if isinstance(part, list | dict) else (str(part),)))


def _read_tasks(path: str) -> dict[int, str]:
    """Instructions by their numbers. In v3.0 they are a pandas index: the one column of strings, whatever its name."""
    table = _read_table(path, {"task_index": pa.int64(), "task": pa.string()}, everything=True)
    texts = [field.name for field in table.schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    text = next((name for name in ("task", "__index_level_0__", *texts) if name in texts), "task")
    values = _checked_columns(path, table, {"task_index": pa.int64(), text: pa.string()})
    tasks: dict[int, str] = {}
    for number, task in zip(values["task_index"].tolist(), values[text].tolist(), strict=True):
        if tasks.setdefault(number, task) != task:
            raise DataError(f"{path}: task_index {number}: got {tasks[number]!r} and {task!r}, expected one; restore the file")
    return tasks


def _read_episodes(root: str, info: dict[str, Any], names: Sequence[str], cameras: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Columns of the list of episodes, in the order of their numbers: one file in v2.1, any number of files in v3.0."""
    kinds = dict.fromkeys(("episode_index", "length"), pa.int64())
    listed = ["meta/episodes.jsonl"]
    if info["codebase_version"] != "v2.1":
        files = ["data", *(f"videos/{key}" for key in cameras)]
        kinds |= {f"{file}/{name}": pa.int64() for file in files for name in ("chunk_index", "file_index")}
        kinds |= {f"videos/{key}/from_timestamp": pa.float64() for key in cameras}
        listed = [name for name in names if name.startswith("meta/episodes/")]
    if not listed:
        raise DataError(f"{root}/meta/episodes: got no Parquet file there, expected chunk-000/file-000.parquet; restore it")
    parts = [_checked_columns(path, _read_table(path, kinds), kinds) for path in (f"{root}/{name}" for name in listed)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in kinds}
    order = np.argsort(columns["episode_index"])
    return {name: values[order] for name, values in columns.items()}


def _read_table(path: str, kinds: dict[str, pa.DataType], everything: bool = False) -> pa.Table:
    """Those of some columns that a table in JSON Lines (v2.1) or Parquet (v3.0) has. everything: all columns of Parquet."""
    try:
        if path.endswith(".parquet"):
            with pq.ParquetFile(path) as file:
                wanted = [name for name in file.schema_arrow.names if everything or name in kinds]
                return file.read(columns=wanted, use_threads=False)
        options = arrow_json.ReadOptions(use_threads=False, block_size=os.path.getsize(path) + 1)  # no line is cut in two
        parse = arrow_json.ParseOptions(explicit_schema=pa.schema(kinds), unexpected_field_behavior="ignore")
        return arrow_json.read_json(path, options, parse)
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read as a table ({first_line(error)}); restore it") from error


def _checked_columns(path: str, table: pa.Table, kinds: dict[str, pa.DataType]) -> dict[str, NDArray[Any]]:
    """Columns of a table as arrays. Raises `DataError` for one that is missing or holds what it cannot be used with."""
    columns: dict[str, NDArray[Any]] = {}
    for name, kind in kinds.items():
        expected = f"{'text' if kind == pa.string() else f'numbers from 0 to {LARGEST - 1}'} in every row; restore the file"
        if name not in table.column_names:
            raise DataError(f"{path}: {name}: got no such column, expected {expected}")
        try:
            values = table[name].cast(kind).to_numpy()
        except READ_ERRORS as error:
            raise DataError(f"{path}: {name}: got {first_line(error)}, expected {expected}") from error
        wrong = np.array([None]) if table[name].null_count else values[:0]
        if not len(wrong) and kind != pa.string():
            wrong = values[~((values >= 0) & (values < LARGEST))]
        if len(wrong):
            raise DataError(f"{path}: {name}: got {wrong[0]}, expected {expected}")
        columns[name] = values
    return columns


def _fill(template: str, where: str, **values: object) -> str:
    """A path within the data set, by its template."""
    try:
        name = os.path.normpath(template.format(**values))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: got {template!r}, expected a template with {', '.join(values)}; restore the file") from error
    if os.path.isabs(name) or name.startswith("..") or "\0" in name:
        raise DataError(f"{where}: got {template!r}, expected a path within the data set; restore the file")
    return name


def _distinct(names: Sequence[str]) -> tuple[tuple[str, ...], Rows]:
    """Different names in the order they first occur, and the number of each one's."""
    numbers: dict[str, int] = {}
    file = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
    return tuple(numbers), file


def _check_counts(root: str, info: dict[str, Any], number: Rows, length: Rows, tasks: dict[int, str]) -> None:
    """What info.json counts against what is listed. Raises `DataError` with the first difference."""
    if len(number) == 0 or len(np.unique(number)) != len(number):
        raise DataError(f"{root}/meta: got {len(number)} episodes, expected one at least, each episode_index once; restore it")
    counted = {"total_episodes": len(number), "total_frames": int(length.sum()), "total_tasks": len(tasks)}
    for name, expected in counted.items():
        if name in info and info[name] != expected:
            got = f"got {info[name]!r}, expected {expected} as meta lists them"
            raise DataError(f"{root}/{INFO}: {name}: {got}; the copy is incomplete, or restore the file")
