"""The metadata of a LeRobot data set, v2.1 or v3.0: features, tasks, and where each episode's rows and frames lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.data.sources.lerobot_info import INDEX_COLUMNS, INFO, Feature, read_features, read_info
from paligemma_vla.data.sources.lerobot_place import Selection
from paligemma_vla.data.sources.lerobot_tables import Episodes, episodes_v21, episodes_v30, tasks_v21, tasks_v30
from paligemma_vla.errors import DataError, closest

Indices = NDArray[np.int64]


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
        if feature.is_camera or feature.dtype == "string" or len(feature.shape) != 1 or feature.shape[0] < 1:
            got = f"got dtype {feature.dtype} of shape {list(feature.shape)}, expected numbers of one dimension"
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
