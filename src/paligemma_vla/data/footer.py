"""What the footer of a Parquet file tells without its columns being read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.storage import Range

ROWS_PER_GROUP = 32  # of EpisodeWriter, which begins a row group with each episode


def column_ranges(metadata: pq.FileMetaData, columns: Iterable[str], groups: Iterable[int]) -> list[Range]:
    """Where the chunks of some columns lie in a Parquet file."""
    names = set(columns)
    leaves = [n for n in range(metadata.num_columns) if metadata.schema.column(n).path.partition(".")[0] in names]
    ranges = []
    for number in groups:
        group = metadata.row_group(number)
        for leaf in leaves:
            chunk = group.column(leaf)
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
                start = min(start, chunk.dictionary_page_offset)
            ranges.append((start, start + chunk.total_compressed_size))
    return ranges


def flag_rows(metadata: pq.FileMetaData, bounds: NDArray[np.int64]) -> list[NDArray[np.int64]] | None:
    """Rows in which each flag is true, as EpisodeWriter's row groups and their statistics settle it; else None.

    bounds: first row of each row group, and the number of rows (G + 1,). A file that something else has written from one of
    EpisodeWriter's may still carry its metadata: row groups that are not exactly EpisodeWriter's settle nothing.
    """
    count = (metadata.metadata or {}).get(schema.EPISODES_KEY, b"")
    true = np.array(list(_flags_in_groups(metadata)), bool).reshape(-1, len(schema.FLAGS))
    if not count.isdigit() or len(true) != len(bounds) - 1:
        return None
    first, last, terminal = (np.flatnonzero(column) for column in true.T)
    expected = np.append(first[1:], len(true)) - 1
    if len(first) != int(count) or len(first) == 0 or first[0] != 0 or not np.array_equal(last, expected):
        return None
    sizes, inner = np.diff(bounds), np.isin(np.arange(len(true)), last, invert=True)
    if not (sizes <= ROWS_PER_GROUP).all() or not (sizes[inner] == ROWS_PER_GROUP).all() or not np.isin(terminal, last).all():
        return None
    return [bounds[first], bounds[last + 1] - 1, bounds[terminal + 1] - 1]


def _flags_in_groups(metadata: pq.FileMetaData) -> Iterator[list[bool]]:
    """Whether each flag is true anywhere in a row group, until one whose statistics do not say."""
    paths = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
    if not set(schema.FLAGS) <= set(paths):
        return
    leaves = [paths.index(name) for name in schema.FLAGS]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        facts = [group.column(leaf).statistics for leaf in leaves]
        if not all(fact is not None and fact.has_min_max and fact.has_null_count and not fact.null_count for fact in facts):
            return
        yield [bool(fact.max) for fact in facts]
