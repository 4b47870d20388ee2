"""The metadata of a LeRobot data set, v2.1 or v3.0: features, tasks, where each episode lies, and what is selected of it.

`PATH?cameras=front,wrist&episodes=0:50` names a data set, or one of its files, and the selection.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import json as arrow_json
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paligemma_vla.data.formats import READ_ERRORS
from paligemma_vla.data.formats.parquet import MAX_DIMENSION
from paligemma_vla.errors import DataError, closest, first_line
from paligemma_vla.schema import Rows, first_fault
from paligemma_vla.storage import read_json

INFO = "meta/info.json"
VERSIONS = ("v2.1", "v3.0")
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # of every row, in every data set
CAMERA_PREFIXES = ("observation.images.", "observation.")
LARGEST = 2**40  # episodes, steps, files
UNNAMED = "__index_level_0__"  # a table's index without a name, as pandas stores it; in v3.0 the tasks are one
EXPECTED = "PATH?cameras=NAME,NAME&episodes=FIRST:STOP&state=FEATURE&action=FEATURE, each of them if wanted"


@dataclass(frozen=True)
class Selection:
    """A data set, or one of its data files (`path`), and what is wanted of it.

    cameras: names in the order image_1, image_2, ... (None: all of them, as info.json has them). episodes: [first, stop) of
    their numbers, None where it is open. state, action: the features that hold them.
    """

    path: str
    cameras: tuple[str, ...] | None = None
    episodes: tuple[int | None, int | None] = (None, None)
    state: str = "observation.state"
    action: str = "action"

    @classmethod
    def parse(cls, text: str, where: str = "lerobot") -> Self:
        """Raises `DataError` that begins with `where`. A leading `~` is the home folder, as in a shell."""
        text = text if os.path.exists(text) else os.path.expanduser(text)
        if os.path.exists(text):  # a name may hold a question mark
            return cls(text)
        path, _, selected = text.rpartition("?") if "?" in text else (text, "", "")
        if not path:
            raise DataError(f"{where}: got 'lerobot:{text}', expected a folder after lerobot: as in lerobot:{EXPECTED}")
        values: dict[str, Any] = {}
        for part in filter(None, selected.split("&")):
            key, _, value = part.partition("=")
            if key not in ("cameras", "episodes", "state", "action") or not value or key in values:
                raise DataError(f"{where}: {text}: got '{part}', expected {EXPECTED}")
            values[key] = value
        if "episodes" in values:
            values["episodes"] = parse_range(values["episodes"], f"{where}: {text}")
        if "cameras" in values:
            values["cameras"] = names = tuple(values["cameras"].split(","))
            if not all(names) or len(set(names)) != len(names):
                raise DataError(f"{where}: {text}: cameras: got {', '.join(names)}, expected different names")
        return cls(path, **values)

    @property
    def choices(self) -> str:
        """What is selected, as it is written behind a question mark; empty for everything."""
        first, stop = ("" if number is None else str(number) for number in self.episodes)
        written = {"cameras": ",".join(self.cameras or ()), "episodes": f"{first}:{stop}"}
        written |= {"state": self.state, "action": self.action}
        return "&".join(f"{name}={text}" for name, text in written.items() if getattr(self, name) != getattr(Selection, name))

    def __str__(self) -> str:
        return f"{self.path}?{self.choices}" if self.choices else self.path


def parse_range(text: str, where: str) -> tuple[int | None, int | None]:
    """`FIRST:STOP`, of which either may be missing. Raises `DataError`."""
    match = re.fullmatch(r"([0-9]*):([0-9]*)", text)
    if match is None:
        raise DataError(f"{where}: episodes: got '{text}', expected FIRST:STOP, as 0:50 for the first fifty")
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] else None


class Feature(BaseModel):
    """One entry of info.json. dtype: `video`, `image`, or of a number. names: of its dimensions, in one of many shapes."""

    model_config = ConfigDict(strict=True)
    key: str = ""
    dtype: str
    shape: list[int]
    names: Any = None

    @property
    def is_camera(self) -> bool:
        return self.dtype in ("video", "image")

    @property
    def camera(self) -> str:
        """A camera's short name."""
        prefix = next((prefix for prefix in CAMERA_PREFIXES if self.key.startswith(prefix)), "")
        return self.key.removeprefix(prefix)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """A name for each dimension, or none."""
        names = _dimension_names(self.names)
        return names if [len(names)] == self.shape else ()


class Info(BaseModel):
    """info.json, as far as it is used. paligemma_vla: what this project kept of its own when it wrote the data set."""

    model_config = ConfigDict(strict=True)
    codebase_version: str
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    features: Annotated[dict[str, Feature], Field(min_length=1)]
    data_path: str
    video_path: str | None = None
    chunks_size: Annotated[int, Field(ge=1)] = 1000
    total_episodes: int | None = None
    total_frames: int | None = None
    robot_type: str | None = None
    paligemma_vla: dict[str, Any] | None = None


@dataclass(frozen=True)
class VideoSpans:
    """Of one camera, per episode: which of `files` (relative to the data set) it is in, and where it begins in it, in s."""

    files: tuple[str, ...]
    file: Rows
    start: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Metadata:
    """root: the folder. Per episode, in order: its number, length, and which of `files` (relative) holds its rows.

    videos: by feature key. sources: files that this was read from (relative).
    """

    root: str
    info: Info
    tasks: dict[int, str]
    number: Rows
    length: Rows
    files: tuple[str, ...]
    file: Rows
    videos: dict[str, VideoSpans]
    sources: tuple[str, ...]

    @cached_property
    def file_numbers(self) -> dict[str, int]:
        """Index of each file in `files`."""
        return {name: number for number, name in enumerate(self.files)}

    def cameras(self, selection: Selection) -> list[Feature]:
        """The selected cameras in order. Raises `DataError` that lists those there are."""
        known = [feature for feature in self.info.features.values() if feature.is_camera]
        if not known:
            raise DataError(f"{self.root}/{INFO}: got no feature of dtype image or video, expected a camera at least")
        by_name = {**{feature.camera: feature for feature in known}, **{feature.key: feature for feature in known}}
        for name in selection.cameras or ():
            if name not in by_name:
                raise DataError(f"{self.root}: cameras: got '{name}', expected of {', '.join(one.camera for one in known)}")
        return known if selection.cameras is None else [by_name[name] for name in selection.cameras]

    def vector(self, key: str, role: str) -> Feature:
        """The feature that holds the state or the action (`role`). Raises `DataError` that lists those there are."""
        features = self.info.features
        feature = features.get(key)
        numeric = feature is not None and feature.dtype not in ("video", "image", "string")
        if feature is not None and numeric and len(feature.shape) == 1 and 0 < feature.shape[0] <= MAX_DIMENSION:
            return feature
        got = f"got dtype {feature.dtype} of shape {feature.shape}" if feature else f"got no '{key}'"
        there = [one.key for one in features.values() if not one.is_camera and one.key not in INDEX_COLUMNS]
        expected = f"expected 1 to {MAX_DIMENSION} numbers in a row for the {role}; name another with ?{role}=FEATURE"
        raise DataError(f"{self.root}/{INFO}: features.{key}: {got}, {expected}{closest('', there)}")

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
    info = _read_info(f"{root}/{INFO}")
    names, old = tuple(name for name, _, _ in stamps), info.codebase_version == "v2.1"
    cameras = [key for key, feature in info.features.items() if feature.dtype == "video"]
    tasks = _read_tasks(f"{root}/meta/tasks.{'jsonl' if old else 'parquet'}")
    listed = ["meta/episodes.jsonl"] if old else [name for name in names if name.startswith("meta/episodes/")]
    episodes = _read_episodes(root, listed, [] if old else ["data", *(f"videos/{key}" for key in cameras)])
    number, length = episodes["episode_index"], episodes["length"]
    _check_counts(root, info, number, length)

    def list_files(template: str, prefix: str, **values: str) -> tuple[tuple[str, ...], Rows]:
        """The files that hold rows (prefix `data`) or frames (`videos/KEY`), and which of them each episode is in."""
        fields = {name: episodes[f"{prefix}/{name}"] for name in (() if old else ("chunk_index", "file_index"))}
        if old:
            fields = {"episode_chunk": number // info.chunks_size, "episode_index": number}
        rows = zip(*(column.tolist() for column in fields.values()), strict=True)
        where, text, numbers = f"{root}/{INFO}: {template}", getattr(info, template) or "", dict[str, int]()
        names = [_fill(text, where, **dict(zip(fields, row, strict=True)), **values) for row in rows]
        file = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
        return tuple(numbers), file

    def spans(key: str) -> VideoSpans:
        start = episodes.get(f"videos/{key}/from_timestamp", np.zeros(len(number)))
        return VideoSpans(*list_files("video_path", f"videos/{key}", video_key=key), start)

    files, file = list_files("data_path", "data")
    return Metadata(root, info, tasks, number, length, files, file, {key: spans(key) for key in cameras}, names)


def _read_info(path: str) -> Info:
    raw = read_json(path, DataError, "restore it")
    version = raw.get("codebase_version")
    if version not in VERSIONS:
        remedy = "convert it with the scripts for that in LeRobot (lerobot.datasets)"
        raise DataError(f"{path}: codebase_version: got {version}, expected one of {', '.join(VERSIONS)}; {remedy}")
    try:
        info = Info.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{path}: {first_fault(error)}; restore the file") from error
    features = {key: feature.model_copy(update={"key": key}) for key, feature in info.features.items()}
    return info.model_copy(update={"features": features})


def _dimension_names(raw: Any) -> tuple[str, ...]:
    """Names of dimensions: a list, lists by group ({"motors": [...]}), or numbers by name."""
    if isinstance(raw, dict) and raw and all(isinstance(value, int) for value in raw.values()):
        return tuple(sorted(raw, key=lambda name: int(raw[name])))
    parts = raw.values() if isinstance(raw, dict) else raw if isinstance(raw, list) else ()
    return tuple(name for part in parts for name in (_dimension_names(part) if isinstance(part, list | dict) else (str(part),)))


def _read_tasks(path: str) -> dict[int, str]:
    """Instructions by their numbers."""
    columns = _read_columns(path, {"task_index": pa.int64(), "task": pa.string()})
    tasks = dict(zip(columns["task_index"].tolist(), columns["task"].tolist(), strict=True))
    if len(tasks) != len(columns["task"]):
        got = f"got {len(columns['task'])} rows of {len(tasks)} numbers"
        raise DataError(f"{path}: task_index: {got}, expected each once; restore it")
    return tasks


def _read_episodes(root: str, listed: Sequence[str], files: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Columns of the lists of episodes, in the order of their numbers. files: prefixes of the columns that name a file."""
    kinds = dict.fromkeys(("episode_index", "length"), pa.int64())
    kinds |= {f"{file}/{name}": pa.int64() for file in files for name in ("chunk_index", "file_index")}
    kinds |= {f"{file}/from_timestamp": pa.float64() for file in files if file != "data"}
    if not listed:
        raise DataError(f"{root}/meta/episodes: got no Parquet file there, expected chunk-000/file-000.parquet; restore it")
    parts = [_read_columns(f"{root}/{name}", kinds) for name in listed]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in kinds}
    order = np.argsort(columns["episode_index"])
    return {name: values[order] for name, values in columns.items()}


def _read_columns(path: str, kinds: dict[str, pa.DataType]) -> dict[str, NDArray[Any]]:
    """Columns of a table in JSON Lines (v2.1) or Parquet (v3.0). Raises `DataError` when one is missing or unusable."""
    try:
        if path.endswith(".parquet"):
            with pq.ParquetFile(path) as file:
                table = file.read(columns=[*kinds, UNNAMED], use_threads=False)
            table = table.rename_columns(["task" if name == UNNAMED else name for name in table.column_names])
        else:
            options = arrow_json.ReadOptions(use_threads=False, block_size=os.path.getsize(path) + 1)  # no line is cut in two
            parse = arrow_json.ParseOptions(explicit_schema=pa.schema(kinds), unexpected_field_behavior="ignore")
            table = arrow_json.read_json(path, options, parse)
        arrays = {name: table[name].cast(kind).to_numpy() for name, kind in kinds.items()}
        for name, values in arrays.items():
            usable = kinds[name] == pa.string() or ((values >= 0) & (values < LARGEST)).all()
            if table[name].null_count or not usable:
                raise ValueError(f"{name}: got others, expected {kinds[name]} in every row, numbers from 0 to {LARGEST - 1}")
    except (KeyError, *READ_ERRORS) as error:
        raise DataError(f"{path}: cannot be read as a table ({first_line(error)}); restore it") from error
    return arrays


def _fill(template: str, where: str, **values: object) -> str:
    """A path within the data set, by its template."""
    try:
        name = os.path.normpath(template.format(**values))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: got {template!r}, expected a template with {', '.join(values)}; restore the file") from error
    if os.path.isabs(name) or name.startswith("..") or "\0" in name:
        raise DataError(f"{where}: got {template!r}, expected a path within the data set; restore the file")
    return name


def _check_counts(root: str, info: Info, number: Rows, length: Rows) -> None:
    """What info.json counts against what is listed. Raises `DataError` with the first difference."""
    if len(number) == 0 or len(np.unique(number)) != len(number):
        raise DataError(f"{root}/meta: got {len(number)} episodes, expected one at least, each episode_index once; restore it")
    for name, expected in (("total_episodes", len(number)), ("total_frames", int(length.sum()))):
        if getattr(info, name) not in (None, expected):
            text = f"got {getattr(info, name)}, expected {expected} as meta lists them; copy the data set again"
            raise DataError(f"{root}/{INFO}: {name}: {text}")
