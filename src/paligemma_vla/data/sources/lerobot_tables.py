"""Lists of tasks and of episodes of a LeRobot data set: JSON Lines in v2.1, Parquet in v3.0."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paligemma_vla.data.files import READ_ERRORS
from paligemma_vla.data.sources.lerobot_info import INFO, Feature
from paligemma_vla.errors import DataError, first_line

Indices = NDArray[np.int64]


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
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        bad = next(value for value in values if not isinstance(value, int) or value < 0)
        raise DataError(f"{where}: got {bad!r}, expected a whole number of at least 0; restore the file")
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
    return _tasks(numbers, table[column].to_pylist(), where)


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
    if os.path.isabs(name) or name.startswith(".."):
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
    size, where = int(info.get("chunks_size", 1000)), f"{root}/{INFO}"
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
