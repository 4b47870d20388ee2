"""The metadata of a LeRobot data set, v2.x or v3.x: features, tasks, where each episode lies, and what is selected of it.

What is not needed may be of any kind; what is needed and can be rebuilt is rebuilt, and said.

`PATH?cameras=front,wrist&episodes=0:50` names a data set, or one of its files, and the selection.
"""

from __future__ import annotations

import codecs
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import json as arrow_json
from pydantic import BaseModel, Field, ValidationError

from paligemma_vla.data.formats import READ_ERRORS, parse_location
from paligemma_vla.data.formats.parquet import MAX_DIMENSION, is_list, open_table
from paligemma_vla.data.video import DEEP_GREY, EXACT
from paligemma_vla.errors import DataError, closest
from paligemma_vla.schema import Rows, first_fault
from paligemma_vla.storage import CUT, find_files, missing_content, read_failure, read_json

INFO, SUBTASKS = "meta/info.json", "meta/subtasks.parquet"
DEFAULTS = {"state": "observation.state", "action": "action"}
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # of every row, in every data set
CAMERA_PREFIXES = ("observation.images.", "observation.")
LARGEST = 2**40  # episodes, steps, files
UNNAMED = "__index_level_0__"  # a table's index without a name, as pandas stores it; in v3.0 the tasks are one
EXPECTED = "PATH?cameras=NAME,NAME&episodes=FIRST:STOP&state=FEATURE+FEATURE&action=FEATURE&prompt=COLUMN, each if wanted"
KEYS = ("cameras", "episodes", "state", "action", "prompt")
TASK, SUBTASK = "task_index", "subtask_index"  # columns of numbers of texts
STYLES = {"language_events": "interjection"}  # what is taken of a column of texts by style, if it is no subtask
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """A data set, or one of its data files (`path`), and what is wanted of it.

    cameras: names in the order image_1, image_2, ... (None: all of them, as info.json has them). episodes: [first, stop) of
    their numbers, None where it is open. state, action: the features that hold them, joined by `+` (None: those of `DEFAULTS`).
    prompt: the column with the instruction, with `:STYLE` one of dtype `language` (None: the task).
    """

    path: str
    cameras: tuple[str, ...] | None = None
    episodes: tuple[int | None, int | None] = (None, None)
    state: str | None = None
    action: str | None = None
    prompt: str | None = None

    @classmethod
    def parse(cls, text: str, where: str = "lerobot") -> Self:
        """Raises `DataError` that begins with `where`."""
        path, values = parse_location(text, "lerobot", KEYS, EXPECTED, where)
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
        written |= {"state": self.state or "", "action": self.action or "", "prompt": self.prompt or ""}
        return "&".join(f"{name}={text}" for name, text in written.items() if getattr(self, name) != getattr(Selection, name))

    @property
    def of_a_row(self) -> Self:
        """Without the episodes, and without what is the default: what decides what a row is."""
        state = None if self.state == DEFAULTS["state"] else self.state
        action = None if self.action == DEFAULTS["action"] else self.action
        return replace(self, episodes=(None, None), state=state, action=action)

    def __str__(self) -> str:
        return f"{self.path}?{self.choices}" if self.choices else self.path


def _split(text: str, known: Container[str]) -> list[str]:
    """The names that `+` joins, which may have one themselves: the longest known ones."""
    parts = text.split("+")
    stop = next((n for n in range(len(parts), 1, -1) if "+".join(parts[:n]) in known), 1)
    return ["+".join(parts[:stop]), *(_split("+".join(parts[stop:]), known) if stop < len(parts) else ())]


def parse_range(text: str, where: str) -> tuple[int | None, int | None]:
    """`FIRST:STOP`, of which either may be missing. Raises `DataError`."""
    match = re.fullmatch(r"([0-9]*):([0-9]*)", text)
    if match is None:
        raise DataError(f"{where}: episodes: got '{text}', expected FIRST:STOP, as 0:50 for the first fifty")
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] else None


@dataclass(frozen=True)
class Feature:
    """One entry of info.json, of any content. dtype: `video`, `image`, or of a number. shape: None where it is none.

    names: of its dimensions, in one of many shapes. is_depth: pictures of it are depth maps. info: of its videos.
    """

    key: str
    dtype: str
    shape: tuple[int, ...] | None
    names: Any
    is_depth: bool
    info: dict[str, Any]

    @classmethod
    def parse(cls, key: str, raw: Any) -> Self:
        raw = raw if isinstance(raw, dict) else {}
        shape = raw.get("shape")
        sizes = shape if isinstance(shape, list) else [shape]
        whole = [int(size) for size in sizes if isinstance(size, int | float) and size % 1 == 0]
        known = tuple(whole) if len(whole) == len(sizes) else None
        info = raw.get("info") if isinstance(raw.get("info"), dict) else {}
        return cls(key, str(raw.get("dtype", "")), known, raw.get("names"), _is_depth(key, raw, known), info)

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
        return names if len(names) == self.size else ()

    @property
    def size(self) -> int:
        """How many numbers a row has; 0 where info.json does not say."""
        return math.prod(self.shape) if self.shape is not None else 0

    @property
    def is_flat(self) -> bool:
        """True for one row of numbers, as [N], [1, N] and []."""
        return sum(size != 1 for size in self.shape or ()) <= 1

    @property
    def numbered(self) -> tuple[str, ...]:
        """Its short name with the position of each number, as gripper, arm[2] and pose[0,3]."""
        name, sizes = self.key.removeprefix("observation."), [size for size in self.shape or () if size != 1]
        return tuple(f"{name}[{','.join(map(str, at))}]" if at else name for at in np.ndindex(*sizes))


@dataclass(frozen=True)
class Vector:
    """State or action: the features whose numbers it has, one after the other."""

    features: tuple[Feature, ...]

    @property
    def keys(self) -> list[str]:
        return [feature.key for feature in self.features]

    @property
    def size(self) -> int:
        return sum(feature.size for feature in self.features)

    @property
    def is_plain(self) -> bool:
        """True for one feature with one row of numbers."""
        return len(self.features) == 1 and self.features[0].is_flat

    @property
    def names(self) -> tuple[str, ...]:
        """Of the numbers; none of a plain one without names. Those that several features have begin with their feature's."""
        if self.is_plain:
            return self.features[0].dimensions
        named = [(feature, name) for feature in self.features for name in feature.dimensions or feature.numbered]
        count = Counter(name for _, name in named)
        return tuple(f"{feature.key}.{name}" if count[name] > 1 else name for feature, name in named)


def _is_depth(key: str, raw: dict[str, Any], shape: tuple[int, ...] | None) -> bool:
    """True for what says that it is a depth map, has pixels of more than 8 bits in grey, or one channel under that name."""
    said = dict(raw)
    for facts in (raw.get("info"), raw.get("video_info")):
        said |= facts if isinstance(facts, dict) else {}
    if any(said.get(name) is True for name in ("is_depth_map", "video.is_depth_map")):
        return True
    if any(DEEP_GREY.match(str(said.get(name))) for name in ("pix_fmt", "video.pix_fmt")):
        return True
    one_channel = shape is not None and (len(shape) == 2 or 1 in (*shape[:1], *shape[-1:]))
    return one_channel and "depth" in f"{key} {raw.get('names')}".lower()


class Info(BaseModel):
    """info.json, as far as it is used. paligemma_vla: what this project kept of its own when it wrote the data set."""

    codebase_version: Any
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    features: Annotated[dict[str, Any], Field(min_length=1)]
    data_path: str
    video_path: Any = None
    chunks_size: Annotated[int, Field(ge=1)] = 1000
    total_episodes: Any = None
    total_frames: Any = None
    robot_type: Any = None
    paligemma_vla: dict[str, Any] | None = None

    @property
    def major(self) -> int:
        """Of the version: 2 has one episode a file and lists in JSON lines, 3 many episodes a file; 0 where it is none."""
        match = re.fullmatch(r"v?([0-9]+)(\.[0-9]+)*", str(self.codebase_version))
        return int(match[1]) if match else 0


@dataclass(frozen=True)
class VideoSpans:
    """Of one camera, per episode: which of `files` (relative to the data set; empty where the metadata has none) it is in, and
    where it begins in it, in s.
    """

    files: tuple[str, ...]
    file: Rows
    start: NDArray[np.float64]

    @cached_property
    def stop(self) -> NDArray[np.float64]:
        """Where the next episode in the same video begins (infinity: there is none), in s."""
        order, stop = np.lexsort((self.start, self.file)), np.full(len(self.file), np.inf)
        same = np.diff(self.file[order]) == 0
        stop[order[:-1][same]] = self.start[order[1:][same]]
        return stop

    @cached_property
    def shared(self) -> NDArray[np.bool_]:
        """True for episodes that begin where another one in the same video begins: one of them is elsewhere (E,)."""
        order = np.lexsort((self.start, self.file))
        same = (np.diff(self.file[order]) == 0) & (np.diff(self.start[order]) <= EXACT)
        shared = np.zeros(len(order), bool)
        shared[order[:-1][same]] = shared[order[1:][same]] = True
        return shared

    @cached_property
    def first(self) -> NDArray[np.float64]:
        """Where the first episode in each of `files` begins in it, in s."""
        first = np.full(len(self.files), np.inf)
        np.fmin.at(first, self.file, self.start)
        return first

    @cached_property
    def episodes(self) -> Rows:
        """How many episodes are in each of `files`."""
        return np.bincount(self.file, minlength=len(self.files))


@dataclass(frozen=True, eq=False)
class Metadata:
    """root: the folder. Per episode, in order: its number, length, and which of `files` (relative) holds its rows.

    videos: by feature key, of those whose videos are listed. sources: files that this was read from (relative). differences:
    what does not agree, and is no hindrance.
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
    differences: tuple[str, ...] = ()

    @cached_property
    def file_numbers(self) -> dict[str, int]:
        """Index of each file in `files`."""
        return {name: number for number, name in enumerate(self.files)}

    @property
    def complete(self) -> bool:
        """False if a data file of a v3.0 set is listed for no episode, or an episode for no file."""
        return self.info.major == 2 or ("" not in self.files and set(self._data_files) <= set(self.files))

    @cached_property
    def _data_files(self) -> list[str]:
        folder = os.path.dirname(self.info.data_path.partition("{")[0])
        return sorted(name for name in _parquet_files(self.root, folder) if not name.startswith("meta/"))

    @cached_property
    def located(self) -> Metadata:
        """The same, with episodes that are not in the file they are listed for in the one whose rows have them (v3.0)."""
        if self.info.major == 2:
            return self
        files = tuple(dict.fromkeys((*self.files, *self._data_files)))
        held = [_episode_rows(os.path.join(self.root, name)) for name in files]
        found = {number: file for file in reversed(range(len(files))) for number in held[file]}
        pairs = zip(self.number.tolist(), self.file.tolist(), strict=True)
        file = np.array([at if number in held[at] else found.get(number, at) for number, at in pairs], np.int64)
        if moved := int((file != self.file).sum()):
            say(self.root, f"{moved} episodes lie in another data file than meta/episodes says; they are read from there")
        return replace(self, files=files, file=file)

    @cached_property
    def counted(self) -> Metadata:
        """The same, with the lengths that the list does not have (-1) counted in the rows of the data files."""
        unknown, found, length = np.flatnonzero(self.length < 0).tolist(), self.located, self.length.copy()
        if not unknown:
            return self
        held = {file: _episode_rows(os.path.join(self.root, found.files[file])) for file in set(found.file[unknown].tolist())}
        for episode in unknown:  # in v2.x all rows of a file are of one episode
            rows, number = held[int(found.file[episode])], float(self.number[episode])
            length[episode] = sum(rows.values()) if self.info.major == 2 else rows.get(number, 0)
        text = f"{len(unknown)} episodes are listed without a length; their rows are counted"
        return replace(self, length=length, differences=(*self.differences, text))

    def cameras(self, selection: Selection) -> list[Feature]:
        """The selected cameras in order, by default all. Raises `DataError` that lists those there are."""
        images = [feature for feature in self.info.features.values() if feature.is_camera]
        colour = [feature for feature in images if not feature.is_depth]
        if not colour:
            got = f"{len(images)} depth maps" if images else "no feature of dtype image or video"
            raise DataError(f"{self.root}/{INFO}: got {got}, expected a colour camera at least")
        by_name = {**{feature.camera: feature for feature in images}, **{feature.key: feature for feature in images}}
        names = [feature.camera for feature in colour]
        for name in selection.cameras or ():
            if name not in by_name:
                raise DataError(f"{self.root}: cameras: got '{name}', expected of {', '.join(names)}")
            if by_name[name].is_depth:
                got = f"got '{name}': a depth map, no colour image"
                raise DataError(f"{self.root}: cameras: {got}; leave this camera out: ?cameras={','.join(names)}")
        chosen = colour if selection.cameras is None else [by_name[name] for name in selection.cameras]
        for camera in chosen:
            if camera.dtype == "video" and camera.key not in self.videos:
                got = f"got no columns videos/{camera.key}/chunk_index, file_index and from_timestamp in meta/episodes"
                raise DataError(f"{self.root}: {got}; restore them, or choose other cameras (?cameras=...)")
        return chosen

    @property
    def depth_maps(self) -> list[Feature]:
        """Pictures that are no camera's."""
        return [feature for feature in self.info.features.values() if feature.is_camera and feature.is_depth]

    def vector(self, role: str, asked: str | None) -> Vector:
        """The state or the action (`role`), of the features asked for. Raises `DataError` that lists those there are."""
        features: dict[str, Feature] = self.info.features
        text = asked or DEFAULTS[role]
        keys = _split(text, features)
        for key in keys:
            feature = features.get(key)
            where = f"{self.root}/{INFO}: features.{key}"
            got = f"got dtype {feature.dtype}, shape {feature.shape and list(feature.shape)}" if feature else f"got no '{key}'"
            if feature is None or feature.is_camera or not 0 < feature.size <= MAX_DIMENSION:
                there = [one.key for one in features.values() if not one.is_camera and one.key not in INDEX_COLUMNS]
                expected = f"expected 1 to {MAX_DIMENSION} numbers in a row for the {role}"
                raise DataError(f"{where}: {got}, {expected}; name others: ?{role}=FEATURE+FEATURE{closest('', there)}")
            if asked is None and not feature.is_flat:
                raise DataError(f"{where}: {got}, expected one row of numbers; to have its rows joined, ask: ?{role}={key}")
        if len(set(keys)) != len(keys):
            raise DataError(f"{self.root}: {role}={text}: got a column twice, expected each once; name others: ?{role}=FEATURE")
        vector = Vector(tuple(features[key] for key in keys))
        if vector.size > MAX_DIMENSION:
            raise DataError(f"{self.root}: {role}={text}: got {vector.size} numbers, expected at most {MAX_DIMENSION}")
        return vector

    @cached_property
    def subtasks(self) -> dict[int, str]:
        """Texts by their numbers in `SUBTASK` (LeRobot 0.4 and 0.5)."""
        return _read_tasks(f"{self.root}/{SUBTASKS}", "subtask")

    def prompt(self, asked: str | None) -> tuple[str, str]:
        """The column with the instruction, and the style of its texts. Raises `DataError` that lists those there are."""
        text, features = asked or TASK, self.info.features
        key, _, style = (text, "", "") if text in features else text.partition(":")
        if asked is not None and key not in features:
            wanted = [one.key for one in features.values() if one.dtype in ("string", "language")]
            wanted += [name for name in (TASK, SUBTASK) if name in features]
            expected = "expected a column of texts, of numbers of tasks, or of LeRobot's texts by style"
            raise DataError(f"{self.root}/{INFO}: prompt: got no '{key}', {expected}{closest(key, wanted)}")
        return key, style or STYLES.get(key, "subtask")

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
    if revisions := sorted(Path(path).glob(f"snapshots/*/{INFO}")):  # a data set's folder in the cache of the hub
        remedy = f"give one of its revisions: {', '.join(f'lerobot:{info.parents[1]}' for info in revisions)}"
    raise DataError(f"{path}: got no {INFO} there, expected a LeRobot data set; {remedy}")


def load_metadata(root: str) -> Metadata:
    """Metadata of a data set, kept until one of its files changes. Raises `DataError` naming file, got and expected."""
    names = [INFO, "meta/tasks.jsonl", "meta/episodes.jsonl", "meta/tasks.parquet", SUBTASKS]
    names += sorted(_parquet_files(root, "meta/episodes"))
    stats = {name: os.stat(os.path.join(root, name)) for name in names if os.path.isfile(os.path.join(root, name))}
    return _load(root, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()))


@lru_cache(maxsize=16)
def _load(root: str, stamps: tuple[tuple[str, int, int], ...]) -> Metadata:
    info = _read_info(f"{root}/{INFO}")
    names, old = tuple(name for name, _, _ in stamps), info.major == 2
    cameras = [key for key, feature in info.features.items() if feature.dtype == "video"]
    forms = ["meta/tasks.jsonl", "meta/tasks.parquet"] if old else ["meta/tasks.parquet", "meta/tasks.jsonl"]
    tasks_file = next((name for name in forms if name in names), forms[0])
    tasks = _read_tasks(f"{root}/{tasks_file}")
    listed = ["meta/episodes.jsonl"] if old else [name for name in names if name.startswith("meta/episodes/")]
    cut = [name for name in listed if missing_content(f"{root}/{name}") == CUT]  # by a recorder that went on after another one
    listed = [name for name in listed if name not in cut] or listed
    episodes = _read_episodes(root, listed, [] if old else ["data", *(f"videos/{key}" for key in cameras)])
    number, length = episodes["episode_index"], episodes["length"]
    if len(number) == 0 or len(np.unique(number)) != len(number):
        raise DataError(f"{root}/meta: got {len(number)} episodes, expected one at least, each episode_index once; restore it")

    def list_files(template: str, prefix: str, **values: str) -> tuple[tuple[str, ...], Rows]:
        """The files that hold rows (prefix `data`) or frames (`videos/KEY`), and which of them each episode is in."""
        fields = {name: episodes[f"{prefix}/{name}"] for name in (() if old else ("chunk_index", "file_index"))}
        if old:
            fields = {"episode_chunk": number // info.chunks_size, "episode_index": number}
        rows = zip(*(column.tolist() for column in fields.values()), strict=True)
        where, text, numbers = f"{root}/{INFO}: {template}", getattr(info, template), dict[str, int]()
        names = [_fill(text, where, **dict(zip(fields, row, strict=True)), **values) if min(row) >= 0 else "" for row in rows]
        file = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
        return tuple(numbers), file

    def spans(key: str) -> VideoSpans:
        start = episodes.get(f"videos/{key}/from_timestamp", np.zeros(len(number)))
        if not old:  # without a begin the file is of no use
            episodes[f"videos/{key}/file_index"][~(start >= 0)] = -1
        return VideoSpans(*list_files("video_path", f"videos/{key}", video_key=key), np.where(start >= 0, start, 0.0))

    files, file = list_files("data_path", "data")
    videos = {key: spans(key) for key in cameras if old or f"videos/{key}/from_timestamp" in episodes}
    metadata = Metadata(root, info, tasks, number, length, files, file, videos, names).counted
    counts = {"total_episodes": len(number), "total_frames": int(metadata.length.sum())}
    differences = tuple(
        f"{INFO}: {name}: got {str(got)[:40]}, expected {expected} as the episodes are listed; the list is used"
        for name, expected in counts.items()
        if (got := getattr(info, name)) not in (None, expected)
    )
    differences += tuple(f"{name}: {CUT}; what it lists is left out" for name in cut)
    differences += (f"{forms[0]}: is missing; the tasks are those of {forms[1]}",) if tasks_file == forms[1] else ()
    return replace(metadata, differences=(*metadata.differences, *differences))


_said: dict[tuple[str, str], object] = {}


def say(root: str, text: str) -> None:
    """Log, once for each data set, what is amiss in it and is no hindrance."""
    call = object()
    if _said.setdefault((root, text), call) is call:  # in one step, since several threads open files
        logger.warning("%s: %s", root, text)


def _parquet_files(root: str, folder: str) -> list[str]:
    """Parquet files in a folder of a data set, relative to the data set."""
    found = (os.path.join(folder, name) for name in find_files(os.path.join(root, folder)))
    return [name for name in found if name.endswith(".parquet")]


def _episode_rows(path: str) -> dict[float, int]:
    """How many rows of a data file have each episode_index (NaN: none); none at all where it cannot be read."""
    try:
        with open_table(path) as source, pq.ParquetFile(source) as file:
            table = file.read(["episode_index"], use_threads=False)
            given = "episode_index" in table.column_names
            numbers = to_scalars(table["episode_index"]) if given else np.full(file.metadata.num_rows, np.nan)
    except READ_ERRORS:
        return {}  # opening the file for its own episodes tells why
    return dict(zip(*(part.tolist() for part in np.unique(numbers, return_counts=True)), strict=True))


def _read_info(path: str) -> Info:
    raw = read_json(path, DataError, "restore it")
    if raw.get("chunks_size") is None:
        raw.pop("chunks_size", None)
    try:
        info = Info.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{path}: {first_fault(error)}; restore the file") from error
    if info.major not in (2, 3):
        remedy = "convert it with the scripts for that in LeRobot (lerobot.datasets)"
        raise DataError(f"{path}: codebase_version: got {str(info.codebase_version)[:40]}, expected v2.x or v3.x; {remedy}")
    return info.model_copy(update={"features": {key: Feature.parse(key, feature) for key, feature in info.features.items()}})


def _dimension_names(raw: Any) -> tuple[str, ...]:
    """Names of dimensions: a list, lists by group ({"motors": [...]}), or numbers by name."""
    if isinstance(raw, dict) and raw and all(isinstance(value, int) for value in raw.values()):
        return tuple(sorted(raw, key=lambda name: int(raw[name])))
    parts = raw.values() if isinstance(raw, dict) else raw if isinstance(raw, list) else ()
    return tuple(
        name
        for part in parts
        for name in (_dimension_names(part) if isinstance(part, list | dict) else (str(part),) if part is not None else ())
    )


def _read_tasks(path: str, name: str = "task") -> dict[int, str]:
    """Instructions by their numbers."""
    columns = _read_columns(path, [f"{name}_index"], texts=[name])
    tasks = dict(zip(columns[f"{name}_index"].tolist(), columns[name].tolist(), strict=True))
    if len(tasks) != len(columns[name]):
        got = f"got {len(columns[name])} rows of {len(tasks)} numbers"
        raise DataError(f"{path}: {name}_index: {got}, expected each once; restore it")
    return tasks


def _read_episodes(root: str, listed: Sequence[str], files: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Columns of the lists of episodes, in the order of their numbers. files: prefixes of the columns that name a file.

    A length or the number of a file is -1 where there is none. Columns of videos are there if every list has them.
    """
    if not listed:
        raise DataError(f"{root}/meta/episodes: got no Parquet file there, expected chunk-000/file-000.parquet; restore it")
    unsure = ["length", *(f"{file}/{name}" for file in files for name in ("chunk_index", "file_index"))]
    times = [f"{file}/from_timestamp" for file in files if file != "data"]
    parts = [_read_columns(f"{root}/{name}", ["episode_index"], unsure, times) for name in listed]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if all(name in part for part in parts)}
    order = np.argsort(columns["episode_index"])
    return {name: values[order] for name, values in columns.items()}


def _read_columns(
    path: str, numbers: Sequence[str], unsure: Sequence[str] = (), times: Sequence[str] = (), texts: Sequence[str] = ()
) -> dict[str, NDArray[Any]]:
    """Columns of a table in JSON Lines (v2.x) or Parquet (v3.x): whole numbers, times in seconds, texts.

    unsure: whole numbers, -1 where there is none. Raises `DataError` when another column is missing or unusable.
    """
    kinds = {**dict.fromkeys((*numbers, *unsure, *times), pa.float64()), **dict.fromkeys(texts, pa.string())}
    try:
        table = _read_table(path, pa.schema(kinds))
        rows, arrays = table.num_rows, dict[str, NDArray[Any]]()
        for name in (*numbers, *unsure):
            given = name in table.column_names or name in numbers
            values = to_scalars(table[name]) if given else np.full(rows, np.nan)
            fits = (values % 1 == 0) & (values >= 0) & (values < LARGEST)
            if name in numbers and not fits.all():
                raise ValueError(f"{name}: got others, expected whole numbers from 0 to {LARGEST - 1} in every row")
            arrays[name] = np.where(fits, values, -1).astype(np.int64)
        arrays |= {name: to_scalars(table[name]) for name in times if name in table.column_names}
        for name in texts:
            if table[name].null_count:
                raise ValueError(f"{name}: got null, expected a text in every row")
            arrays[name] = table[name].cast(pa.string()).to_numpy()
    except (KeyError, *READ_ERRORS) as error:
        raise DataError(f"{path}: cannot be read as a table ({read_failure(path, error)}); restore it") from error
    return arrays


def _read_table(path: str, columns: pa.Schema) -> pa.Table:
    if path.endswith(".parquet"):
        with open_table(path) as source, pq.ParquetFile(source) as file:
            table = file.read(columns=[*columns.names, UNNAMED], use_threads=False)
        return table.rename_columns([columns.names[-1] if name == UNNAMED else name for name in table.column_names])
    content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    options = arrow_json.ReadOptions(use_threads=False, block_size=len(content) + 1)  # no line is cut in two
    parse = arrow_json.ParseOptions(explicit_schema=columns, unexpected_field_behavior="ignore")
    return arrow_json.read_json(pa.BufferReader(content), options, parse)


def to_scalars(column: pa.Array | pa.ChunkedArray) -> NDArray[np.float64]:
    """One finite number per row (R,), which may be in lists of one; NaN where there is none, or more."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    while is_list(values.type):
        lengths = values.value_lengths().fill_null(0).to_numpy()
        values = values.flatten().take(pa.array(np.cumsum(lengths) - 1, mask=lengths != 1))
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    numbers: NDArray[np.float64] = values.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _fill(template: str, where: str, **values: object) -> str:
    """A path within the data set, by its template."""
    try:
        name = os.path.normpath(template.format(**values))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: got {template!r}, expected a template with {', '.join(values)}; restore the file") from error
    if os.path.isabs(name) or name.startswith("..") or "\0" in name:
        raise DataError(f"{where}: got {template!r}, expected a path within the data set; restore the file")
    return name
