"""Texts by style in the columns of dtype `language` (LeRobot 0.6): for each row, the one that is in force.

A persistent text has a timestamp and is in force until the next of its style; every row lists all of its episode. An event
has none, and belongs to its row alone.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paligemma_vla.data.formats.parquet import is_list, is_text


def is_language(kind: pa.DataType) -> bool:
    """True for lists of texts with styles. Of events without a text, only calls of tools, the type has no text either."""
    if not (is_list(kind) and pa.types.is_struct(kind.value_type)):
        return False
    parts = {field.name: field.type for field in kind.value_type}
    return all(name in parts and is_text(parts[name]) for name in ("content", "style"))


def styles(column: pa.Array) -> list[str]:
    """Those of a column's texts."""
    items = pa.compute.list_flatten(column)
    named = pa.compute.struct_field(items, "style").filter(pa.compute.struct_field(items, "content").is_valid())
    return sorted(named.unique().drop_null().to_pylist())


def texts_in_force(column: pa.Array, style: str, times: NDArray[np.float64]) -> tuple[pa.Array, NDArray[np.bool_]]:
    """The text of a style at each row, null where none is in force, and where that is as it should be (R,): it has not begun,
    or the column is of events.

    times (R,): of the rows, in seconds from the episode's begin.
    """
    row = pa.compute.list_parent_indices(column).to_numpy()
    items = pa.compute.list_flatten(column)
    content = pa.compute.struct_field(items, "content")
    begin = np.zeros(len(items), np.float32)  # as LeRobot has the times of rows
    persistent = column.type.value_type.get_field_index("timestamp") >= 0
    if persistent:
        begin = pa.compute.struct_field(items, "timestamp").cast(pa.float32()).to_numpy(zero_copy_only=False)
    given = pa.compute.and_(pa.compute.equal(pa.compute.struct_field(items, "style"), style), content.is_valid())
    usable = given.fill_null(False).to_numpy(zero_copy_only=False)
    listed, chosen = np.full(len(column), not persistent), np.full(len(column), -1)
    listed[row[usable]] = True
    begun = np.flatnonzero(usable & (begin <= times.astype(np.float32)[row]))
    begun = begun[np.argsort(begin[begun], kind="stable")]
    chosen[row[begun]] = begun  # the latest of each row stays
    return content.take(pa.array(chosen, mask=chosen < 0)), listed
