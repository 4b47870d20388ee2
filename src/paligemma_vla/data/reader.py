"""Reading rows of indexed Parquet files: numbers in a stream, or rows on demand through a bounded cache of row groups."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.episodes import EpisodeIndex, Layout, open_parquet
from paligemma_vla.errors import DataError, first_line

OPEN_FILES = 64


def number_matrix(column: pa.Array, dimension: int, path: str, name: str, first_row: int) -> NDArray[np.float32]:
    """A list column whose first entry is row `first_row` as an array (rows, dimension).

    Raises `DataError` naming the row that is null, of another length or not finite."""
    flat = column.flatten()
    lengths = column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    if column.null_count or (lengths != dimension).any():
        row = int(np.flatnonzero(lengths != dimension)[0])
        got = "null" if lengths[row] < 0 else f"{lengths[row]} numbers"
        raise DataError(f"{path}: row {first_row + row}, column {name}: got {got}, expected {dimension} numbers")
    values: NDArray[np.float32] = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, dimension)
    if not np.isfinite(values).all():
        row, item = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise DataError(
            f"{path}: row {first_row + row}, column {name}: dimension {item} is {values[row, item]}, expected a finite number"
        )
    return values


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one row group: state (R, P), action (R, A), prompts, images per camera (None: no such column)."""

    state: NDArray[np.float32]
    action: NDArray[np.float32]
    prompt: pa.Array
    images: tuple[pa.Array | None, ...]
    nbytes: int


class EpisodeReader:
    """Read rows on demand. Keeps open files and row groups (images still compressed) up to `cache_bytes`.

    Made to be sent to loader processes: what is cached stays behind.
    """

    def __init__(self, index: EpisodeIndex, cameras: int, cache_bytes: int) -> None:
        self.index, self.cameras, self.cache_bytes = index, cameras, cache_bytes
        self._clear()

    def _clear(self) -> None:
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        self._cached = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "cameras": self.cameras, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def group_of(self, file: int, row: int) -> tuple[Rows, int]:
        """The row group that holds a row, and the row's place in it."""
        starts = self.index.groups[file]
        group = int(np.searchsorted(starts, row, side="right")) - 1
        key = (file, group)
        rows = self._groups.get(key)
        if rows is None:
            rows = self._load(file, group)
            self._groups[key] = rows
            self._cached += rows.nbytes
            while self._cached > self.cache_bytes and len(self._groups) > 1:
                self._cached -= self._groups.popitem(last=False)[1].nbytes
        else:
            self._groups.move_to_end(key)
        return rows, row - int(starts[group])

    def actions(self, file: int, start: int, stop: int) -> NDArray[np.float32]:
        """Actions of rows [start, stop) of a file: (stop - start, A)."""
        parts = []
        while start < stop:
            rows, place = self.group_of(file, start)
            part = rows.action[place : place + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _load(self, file: int, group: int) -> Rows:
        path, first_row = self.index.paths[file], int(self.index.groups[file][group])
        parquet = self._open(file)
        available = [schema.image_column(n + 1) for n in range(self.cameras)]
        images = [name for name in available if name in parquet.schema_arrow.names]
        try:
            table = parquet.read_row_group(
                group, columns=[schema.STATE, schema.ACTION, schema.PROMPT, *images], use_threads=False
            ).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: row group {group} cannot be read ({first_line(error)}); restore the file") from error
        arrays = {name: table[name].combine_chunks() for name in table.column_names}
        layout = self.index.layout
        return Rows(
            state=number_matrix(arrays[schema.STATE], layout.state_dim, path, schema.STATE, first_row),
            action=number_matrix(arrays[schema.ACTION], layout.action_dim, path, schema.ACTION, first_row),
            prompt=arrays[schema.PROMPT],
            images=tuple(arrays.get(name) for name in available),
            nbytes=table.nbytes,
        )

    def _open(self, file: int) -> pq.ParquetFile:
        parquet = self._files.get(file)
        if parquet is None:
            parquet = self._files[file] = open_parquet(self.index.paths[file])
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(file)
        return parquet


def iterate_numbers(path: str, layout: Layout, rows: int = 65536) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Stream (state (R, P), action (R, A)) of one file, touching no other column."""
    with open_parquet(path) as file:
        first_row = 0
        batches = file.iter_batches(batch_size=rows, columns=[schema.STATE, schema.ACTION], use_threads=False)
        while (batch := _next_batch(batches, path)) is not None:
            yield (
                number_matrix(batch[schema.STATE], layout.state_dim, path, schema.STATE, first_row),
                number_matrix(batch[schema.ACTION], layout.action_dim, path, schema.ACTION, first_row),
            )
            first_row += batch.num_rows


def _next_batch(batches: Iterator[pa.RecordBatch], path: str) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: columns state, action: cannot be read ({first_line(error)}); restore the file") from error
