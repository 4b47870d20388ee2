"""The flags of an episode file: which rows are an episode, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.episode_file import EpisodeFile, read_columns
from paligemma_vla.data.faults import LEAVE_OUT, Fault, Kind
from paligemma_vla.data.files import Rows


@dataclass(frozen=True)
class FlagRows:
    """Rows of one file in which a flag is true, ascending. null: 3 * row + number in `schema.FLAGS` of every null."""

    first: Rows
    last: Rows
    terminal: Rows
    null: Rows


def find_flags(file: EpisodeFile) -> FlagRows:
    """Flags of one open file, read only where they are not told otherwise; raises `FaultError` when they cannot be read."""
    told = file.told_flags()
    if told is None:
        return read_flags(file)
    first, last, terminal = told
    return FlagRows(first, last, terminal, np.empty(0, np.int64))


def read_flags(file: EpisodeFile) -> FlagRows:
    """Flags of one open file; raises `FaultError` when they cannot be read."""
    table = read_columns(file, schema.FLAGS)
    rows, null = [], []
    for number, name in enumerate(schema.FLAGS):
        column = table[name]
        rows.append(np.flatnonzero(column.fill_null(False).to_numpy()))
        null.append(3 * np.flatnonzero(column.is_null().to_numpy()) + number if column.null_count else rows[0][:0])
    first, last, terminal = rows
    return FlagRows(first, last, terminal, np.sort(np.concatenate(null)))


def segment(flags: FlagRows, rows: int, excluded: Rows) -> tuple[Rows, Rows]:
    """First rows and lengths of the episodes of a file, as far as its flags tell.

    A new one begins at is_first and after is_last. excluded (X, 2): row ranges [first, stop) that are left out.
    """
    bounds = np.unique(np.concatenate([[0, rows], flags.first, flags.last + 1, excluded.ravel()]).astype(np.int64))
    starts, lengths = bounds[:-1], np.diff(bounds)
    if len(excluded):
        kept = ~inside(starts, excluded)
        starts, lengths = starts[kept], lengths[kept]
    return starts, lengths


def inside(rows: Rows, ranges: Rows) -> NDArray[np.bool_]:
    """Which of some rows lie in any of the ranges [first, stop)."""
    if len(ranges) == 0:
        return np.zeros(len(rows), bool)
    ordered = ranges[np.argsort(ranges[:, 0])]
    place = np.searchsorted(ordered[:, 0], rows, side="right") - 1
    inside: NDArray[np.bool_] = (place >= 0) & (rows < np.maximum.accumulate(ordered[:, 1])[place])
    return inside


def chain_faults(path: str, flags: FlagRows, rows: int, excluded: Rows) -> list[Fault]:
    """Faults of the flags outside the excluded ranges: every episode runs from is_first to is_last without a gap.

    is_terminal may stand in an episode's last row only. In the order of rows.
    """
    starts, lengths = segment(flags, rows, excluded)
    lasts = starts + lengths - 1
    null = flags.null[~inside(flags.null // 3, excluded)]
    headless = starts[~np.isin(starts, flags.first) & ~np.isin(3 * starts, null)]
    endless = lasts[~np.isin(lasts, flags.last) & ~np.isin(3 * lasts + 1, null)]
    early = flags.terminal[~np.isin(flags.terminal, lasts) & ~inside(flags.terminal, excluded)]
    faults = [(int(code) // 3, schema.FLAGS[int(code) % 3], "got null, expected true or false") for code in null]
    for row, after_last in zip(headless.tolist(), np.isin(headless - 1, flags.last), strict=True):
        why = f"row {row - 1} {'has is_last' if after_last else 'is excluded'}" if row else "it is the first row of the file"
        faults.append((row, schema.IS_FIRST, f"got false, expected true, because {why}"))
    for row, before_first in zip(endless.tolist(), np.isin(endless + 1, flags.first), strict=True):
        why = f"row {row + 1} {'has is_first' if before_first else 'is excluded'}"
        why = "it is the last row of the file" if row == rows - 1 else why
        faults.append((row, schema.IS_LAST, f"got false, expected true, because {why}"))
    for row in early.tolist():
        why = "because only the last row of an episode may be terminal"
        faults.append((row, schema.IS_TERMINAL, f"got true, expected false, {why}"))
    remedy = f"mend the flags, or {LEAVE_OUT}"
    return [Fault(path, Kind.FLAGS, f"{text}; {remedy}", row, column) for row, column, text in sorted(faults)]
