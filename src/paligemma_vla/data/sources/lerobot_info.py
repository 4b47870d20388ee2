"""info.json of a LeRobot data set: its version, rate and features."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paligemma_vla.errors import DataError
from paligemma_vla.storage import read_json

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
