"""Index of Parquet files, from flags and footers: which rows are an episode, which row group holds a row.

Image bytes are never touched here; `reader.py` reads rows.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import DatasetMetadata


def expand_paths(paths: str | Sequence[str], where: str) -> list[str]:
    """List the Parquet files behind a file, folder (searched through), glob, or list of these; sorted, without repeats.

    Raises `DataError`, naming `where` (the config key or flag), when one of them holds none.
    """
    found: dict[str, None] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        if os.path.isdir(path):
            files = sorted(str(file) for file in Path(path).rglob("*.parquet") if not file.name.startswith("."))
        elif glob.has_magic(path):
            files = sorted(glob.glob(path, recursive=True))
        else:
            files = [path] if os.path.isfile(path) else []
        if not files:
            raise DataError(f"{where}: {path}: no Parquet file there; expected a file, a folder that holds some, or a glob")
        found.update(dict.fromkeys(files))
    return list(found)


def open_parquet(path: str) -> pq.ParquetFile:
    """Open one file; raises `DataError` when it is not Parquet or is cut short."""
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet ({first_line(error)}); restore it, or take it out of the data"
        ) from error


@dataclass(frozen=True)
class Layout:
    """What the columns hold: number of cameras, numbers in state (P) and action (A), and the writer's metadata."""

    cameras: int
    state_dim: int
    action_dim: int
    metadata: DatasetMetadata


@dataclass(frozen=True)
class EpisodeIndex:
    """Where every episode lies.

    paths: files. Per episode: file (int32), start (int64, row in its file), length (int32).
    groups: per file, the first row of each row group, and the number of rows at the end (int64).
    """

    paths: tuple[str, ...]
    layout: Layout
    file: NDArray[np.int32]
    start: NDArray[np.int64]
    length: NDArray[np.int32]
    groups: tuple[NDArray[np.int64], ...]

    @classmethod
    def build(cls, paths: str | Sequence[str], where: str = "data.train_parquet_files") -> EpisodeIndex:
        """Index files from their flags, in parallel. Raises `DataError` naming file, row and column of the first fault."""
        files = expand_paths(paths, where)
        with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
            parts = list(pool.map(_index_file, files))
        for path, part in zip(files, parts, strict=True):
            _same_robot(path, part.layout, files[0], parts[0].layout)
        return cls(
            paths=tuple(files),
            layout=replace(parts[0].layout, cameras=max(part.layout.cameras for part in parts)),
            file=np.concatenate([np.full(len(p.start), n, np.int32) for n, p in enumerate(parts)]),
            start=np.concatenate([p.start for p in parts]),
            length=np.concatenate([p.length for p in parts]),
            groups=tuple(p.groups for p in parts),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[EpisodeIndex]) -> EpisodeIndex:
        """Several indices end to end; raises `DataError` when they are not of one robot."""
        first = parts[0]
        for part in parts:
            _same_robot(part.paths[0], part.layout, first.paths[0], first.layout)
        offsets = np.cumsum([0, *(len(part.paths) for part in parts[:-1])]).astype(np.int32)
        return cls(
            paths=tuple(path for part in parts for path in part.paths),
            layout=replace(first.layout, cameras=max(part.layout.cameras for part in parts)),
            file=np.concatenate([part.file + offset for part, offset in zip(parts, offsets, strict=True)]),
            start=np.concatenate([part.start for part in parts]),
            length=np.concatenate([part.length for part in parts]),
            groups=tuple(groups for part in parts for groups in part.groups),
        )

    def __len__(self) -> int:
        return len(self.start)

    @property
    def steps(self) -> int:
        """Number of time steps (rows) in all episodes."""
        return int(self.length.sum())

    def select(self, episodes: NDArray[np.int64]) -> EpisodeIndex:
        """The same files with some of the episodes."""
        return EpisodeIndex(
            self.paths, self.layout, self.file[episodes], self.start[episodes], self.length[episodes], self.groups
        )

    def split(self, fraction: float, seed: int) -> tuple[EpisodeIndex, EpisodeIndex]:
        """Split by whole episodes into (training, validation); `fraction` of them, at least one, go to validation."""
        count = max(1, round(fraction * len(self)))
        if count >= len(self):
            raise DataError(
                f"data.val_fraction: got {fraction} of {len(self)} episode{'s' * (len(self) > 1)}, which leaves none to "
                f"train on; give data.val_parquet_files, or set it to 0"
            )
        order = np.random.default_rng(np.random.SeedSequence([seed, 0x5A11D])).permutation(len(self))
        return self.select(np.sort(order[count:])), self.select(np.sort(order[:count]))


def _same_robot(path: str, layout: Layout, first_path: str, first: Layout) -> None:
    """Refuse files that differ in dimensions, or that both say what their numbers and pixels mean and contradict."""
    for name, got, expected in [
        (schema.STATE, layout.state_dim, first.state_dim),
        (schema.ACTION, layout.action_dim, first.action_dim),
    ]:
        if got != expected:
            raise DataError(
                f"{path}: column {name}: got {got} numbers per row, expected {expected} as in {first_path}; train on one "
                f"robot's data at a time"
            )
    for name in ("image_orientation", "control_hz", "action_convention", "state_names", "action_names"):
        said, said_first = getattr(layout.metadata, name), getattr(first.metadata, name)
        if said and said_first and said != said_first:
            raise DataError(
                f"{path}: metadata {name}: got {said}, expected {said_first} as in {first_path}; train on one robot's data at "
                f"a time"
            )


@dataclass(frozen=True)
class _FileIndex:
    layout: Layout
    start: NDArray[np.int64]
    length: NDArray[np.int32]
    groups: NDArray[np.int64]


def _index_file(path: str) -> _FileIndex:
    with open_parquet(path) as file:
        layout = read_layout(path, file)
        rows = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
        try:
            table = file.read(columns=[schema.IS_FIRST, schema.IS_LAST], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: columns is_first, is_last: cannot be read ({first_line(error)}); restore the file"
            ) from error
    first, last = (_flags(path, table, name) for name in (schema.IS_FIRST, schema.IS_LAST))
    starts, ends = np.flatnonzero(first), np.flatnonzero(last)
    _check_chain(path, starts, ends, len(first))
    return _FileIndex(layout, starts, (ends - starts + 1).astype(np.int32), np.cumsum([0, *rows], dtype=np.int64))


def _flags(path: str, table: pa.Table, name: str) -> NDArray[np.bool_]:
    column = table[name]
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{path}: row {row}, column {name}: got null, expected true or false")
    return np.asarray(column.to_numpy(), bool)


def _check_chain(path: str, starts: NDArray[np.int64], ends: NDArray[np.int64], rows: int) -> None:
    """Episodes must follow one another without a gap: first..last, first..last, to the end of the file."""
    remedy = "mend the flags, or leave the episode out"
    if rows == 0:
        raise DataError(f"{path}: got 0 rows, expected at least one episode; take the file out of the data")
    if len(starts) == 0 or starts[0] != 0:
        raise DataError(f"{path}: row 0, column is_first: got false, expected true at the first row of a file; {remedy}")
    wanted = np.append(starts[1:] - 1, rows - 1)
    if len(ends) == len(wanted) and (ends == wanted).all():
        return
    missing = np.setdiff1d(wanted, ends)
    row = int(min(np.setxor1d(wanted, ends)))
    if len(missing) and missing[0] == row:
        why = "it is the last row of the file" if row == rows - 1 else f"row {row + 1} has is_first"
        raise DataError(f"{path}: row {row}, column is_last: got false, expected true, because {why}; {remedy}")
    raise DataError(
        f"{path}: row {row}, column is_last: got true, expected false, because row {row + 1} has no is_first; {remedy}"
    )


def read_layout(path: str, file: pq.ParquetFile) -> Layout:
    """Check the columns of one open file (S1.1) and tell their dimensions. Raises `DataError` naming the column."""
    arrow = file.schema_arrow
    required = [schema.image_column(1), schema.STATE, schema.ACTION, schema.PROMPT, *schema.FLAGS]
    missing = [name for name in required if name not in arrow.names]
    if missing:
        raise DataError(f"{path}: missing column {', '.join(missing)}; got {', '.join(arrow.names)}")
    cameras = 1
    while schema.image_column(cameras + 1) in arrow.names:
        cameras += 1
    for name, matches, expected in [
        *((schema.image_column(n + 1), _is_bytes, "binary") for n in range(cameras)),
        *((name, _is_number_list, "a list of float32 or float64") for name in (schema.STATE, schema.ACTION)),
        (schema.PROMPT, _is_text, "string"),
        *((flag, pa.types.is_boolean, "bool") for flag in schema.FLAGS),
    ]:
        if not matches(arrow.field(name).type):
            raise DataError(f"{path}: column {name}: got type {arrow.field(name).type}, expected {expected}")
    metadata = (arrow.metadata or {}).get(schema.METADATA_KEY)
    return Layout(
        cameras=cameras,
        state_dim=_dimension(path, file, schema.STATE),
        action_dim=_dimension(path, file, schema.ACTION),
        metadata=DatasetMetadata.from_json(metadata, path) if metadata else DatasetMetadata(),
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))
    )


def _is_number_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _dimension(path: str, file: pq.ParquetFile, name: str) -> int:
    kind = file.schema_arrow.field(name).type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    try:
        first = next(file.iter_batches(batch_size=1, columns=[name], use_threads=False), None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: column {name}: cannot be read ({first_line(error)}); restore the file") from error
    if first is None or first.num_rows == 0:
        raise DataError(f"{path}: got 0 rows, expected at least one episode; take the file out of the data")
    return 0 if first[name][0].as_py() is None else len(first[name][0])
