"""Reading rows of indexed files: numbers in a stream, or rows on demand through a bounded cache of row groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.checks import number_faults, prompt_of, to_matrix
from paligemma_vla.data.episode_file import EpisodeFile, Pictures, read_columns
from paligemma_vla.data.episodes import EpisodeIndex
from paligemma_vla.data.faults import FaultError, Unusable, raise_first
from paligemma_vla.data.files import READ_ERRORS, Rows, unreadable_group
from paligemma_vla.data.sources import open_file
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, StorageError, UnreachableError, VLAError, first_line

OPEN_FILES = 64


@dataclass(frozen=True)
class Group:
    """One row group: state (R, P), action (R, A), prompts, images per camera (None: no such column).

    Rows of episodes that the index does not hold may be of any content.
    """

    state: NDArray[np.float32]
    action: NDArray[np.float32]
    prompt: pa.Array
    images: tuple[Pictures | None, ...]
    nbytes: int


class RowReader(ABC):
    """Rows of an index on demand."""

    index: EpisodeIndex

    @abstractmethod
    def group_of(self, file: int, row: int) -> tuple[Group, int]:
        """The row group that holds a row, and the row's place in it."""

    def actions(self, file: int, start: int, stop: int) -> NDArray[np.float32]:
        """Actions of rows [start, stop) of a file: (stop - start, A)."""
        parts = []
        while start < stop:
            rows, place = self.group_of(file, start)
            part = rows.action[place : place + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


class EpisodeReader(RowReader):
    """Read rows on demand. Keeps open files and row groups (images still compressed) up to `cache_bytes` together, and a
    few open videos.

    Made to be sent to loader processes: what is cached stays behind.
    """

    def __init__(self, index: EpisodeIndex, cameras: int, cache_bytes: int) -> None:
        self.index, self.cameras, self.cache_bytes = index, cameras, cache_bytes
        self._clear()

    def _clear(self) -> None:
        self._files: OrderedDict[int, EpisodeFile] = OrderedDict()
        self._videos = VideoDecoders()
        self._groups: OrderedDict[tuple[int, int], Group] = OrderedDict()
        self._cached = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "cameras": self.cameras, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def group_of(self, file: int, row: int) -> tuple[Group, int]:
        starts = self.index.row_groups(file)
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

    def _load(self, file: int, group: int) -> Group:
        table = self._read(file, group)
        return make_group(self.index, file, group, self.cameras, table, self._pictures(file))

    def _read(self, file: int, group: int) -> pa.Table:
        """The columns of a row group that the file has. Raises `DataError` when it cannot be read or the file has changed."""
        with explaining(self.index, file, group):
            episodes = self._open(file)
            table = episodes.read(columns_of(episodes.columns, self.cameras), group).combine_chunks()
        # After reading: what was read before a change is what was indexed.
        self.index.check_unchanged(file, episodes.identity)
        return table

    def _pictures(self, file: int) -> Callable[[pa.Array], Pictures]:
        return lambda column: self._open(file).pictures(column, self._videos)

    def _open(self, file: int) -> EpisodeFile:
        episodes = self._files.get(file)
        if episodes is None:
            episodes = self._files[file] = open_file(self.index.paths[file])
            self._cached += episodes.nbytes
            if len(self._files) > OPEN_FILES:
                closed = self._files.popitem(last=False)[1]
                self._cached -= closed.nbytes
                closed.close()
        else:
            self._files.move_to_end(file)
        return episodes


def columns_of(available: Sequence[str], cameras: int) -> list[str]:
    """What a sample is made of, of the columns that a file has."""
    wanted = [schema.STATE, schema.ACTION, schema.PROMPT, *(schema.image_column(n + 1) for n in range(cameras))]
    return [name for name in wanted if name in available]


@contextmanager
def explaining(index: EpisodeIndex, file: int, group: int) -> Iterator[None]:
    """Tell of a row group that cannot be read; that the file has changed explains it better."""
    try:
        yield
    except UnreachableError:
        raise  # the store has been asked often enough
    except (DataError, StorageError, *READ_ERRORS) as error:
        index.check_unchanged(file)
        if isinstance(error, VLAError):
            raise
        raise FaultError(unreadable_group(index.paths[file], group, index.row_groups(file), first_line(error))) from error


def make_group(
    index: EpisodeIndex, file: int, group: int, cameras: int, table: pa.Table, pictures: Callable[[pa.Array], Pictures]
) -> Group:
    """What was read of a row group as what a sample is made of. Raises `FaultError` for what cannot be used."""
    groups = index.row_groups(file)
    if table.num_rows != groups[group + 1] - groups[group]:
        raise FaultError(unreadable_group(index.paths[file], group, groups, f"got {table.num_rows} rows"))
    arrays = {name: table[name].combine_chunks() for name in table.column_names}
    images = [arrays.get(schema.image_column(n + 1)) for n in range(cameras)]
    rows, layout = np.arange(groups[group], groups[group + 1]), index.layout
    return Group(
        state=_numbers(index, file, schema.STATE, arrays[schema.STATE], layout.state_dim, rows),
        action=_numbers(index, file, schema.ACTION, arrays[schema.ACTION], layout.action_dim, rows),
        prompt=arrays[schema.PROMPT],
        images=tuple(None if column is None else pictures(column) for column in images),
        nbytes=table.nbytes,
    )


def _numbers(index: EpisodeIndex, file: int, name: str, column: pa.Array, dimension: int, rows: Rows) -> NDArray[np.float32]:
    """A list column (R, dimension) of some rows of a file; raises `DataError` for a bad row of an episode that is held."""
    values = to_matrix(column, dimension)
    if not np.isfinite(values).all():
        held = np.flatnonzero(index.holds(file, rows))
        raise_first(number_faults(index.paths[file], name, column.take(pa.array(held)), values[held], rows[held]))
    return values


def iterate_numbers(
    index: EpisodeIndex, file: int, rows: int = 65536
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Stream (state (R, P), action (R, A)) of a file's episodes, touching no other column.

    Row groups without a row of them are not read: they may be unreadable. Raises `DataError` for a file that is not the one
    that was indexed.
    """
    bounds, layout = index.row_groups(file), index.layout
    held = index.holds(file, np.arange(bounds[-1]))
    groups = [group for group in range(len(bounds) - 1) if held[bounds[group] : bounds[group + 1]].any()]
    numbers = np.concatenate([np.arange(bounds[group], bounds[group + 1]) for group in groups] or [bounds[:0]])
    with open_file(index.paths[file], stream=True) as episodes:
        batches = episodes.batches([schema.STATE, schema.ACTION], groups, rows)
        while (batch := _next_batch(batches, episodes, groups)) is not None:
            here, numbers = numbers[: batch.num_rows], numbers[batch.num_rows :]
            state = _numbers(index, file, schema.STATE, batch[schema.STATE], layout.state_dim, here)
            action = _numbers(index, file, schema.ACTION, batch[schema.ACTION], layout.action_dim, here)
            yield state[held[here]], action[held[here]]
        index.check_unchanged(file, episodes.identity)


def _next_batch(batches: Iterator[pa.RecordBatch], episodes: EpisodeFile, groups: list[int]) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except READ_ERRORS as error:
        for group in groups:  # a batch may lie in several: find the one to blame
            try:
                episodes.read([schema.STATE, schema.ACTION], group)
            except READ_ERRORS as cause:
                raise FaultError(unreadable_group(episodes.path, group, episodes.bounds, first_line(cause))) from cause
        text = f"columns state, action: cannot be read ({first_line(error)}); restore the file"
        raise DataError(f"{episodes.path}: {text}") from error


def episode_prompts(index: EpisodeIndex, file: int) -> list[str]:
    """The instruction of each episode of a file, at its first row. Raises `DataError` where it cannot be read."""
    path, starts = index.paths[file], index.start[index.file == file]
    with open_file(path) as episodes:
        column = read_columns(episodes, [schema.PROMPT])[schema.PROMPT].combine_chunks()
    prompts = []
    for row in starts.tolist():
        try:
            prompts.append(prompt_of(column, row))
        except Unusable as error:
            raise FaultError(error.at(path, row, schema.PROMPT)) from error
    return prompts
