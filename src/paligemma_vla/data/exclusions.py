"""The list of episodes to leave out: written by `data check`, named by `data.exclude_episodes`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from paligemma_vla.data.files import Rows
from paligemma_vla.data.sources import joined_name, real_name, relative_name
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.storage import replace_file

VERSION = 1
AGAIN = "run `paligemma-vla data check` again"
NOTHING: Rows = np.empty((0, 2), np.int64)


@dataclass(frozen=True)
class Excluded:
    """An episode to leave out, by its rows in a file; with first_row None, the whole file.

    file: absolute, without links. episode: its number in the file. digest: of the file as `data check` saw it.
    """

    file: str
    first_row: int | None
    rows: int | None
    episode: int | None
    reasons: tuple[str, ...]
    digest: str | None


class ExclusionList:
    """Episodes to leave out, by file. path: of the list, for messages."""

    def __init__(self, path: str, entries: Iterable[Excluded]) -> None:
        self.path, self.entries = path, tuple(entries)
        self._by_file: dict[str, list[Excluded]] = {}
        for entry in self.entries:
            self._by_file.setdefault(entry.file, []).append(entry)

    def leaves_out(self, path: str) -> bool:
        """Whether a file is left out as a whole; it is not even opened then."""
        return any(entry.first_row is None for entry in self._entries(path))

    def ranges(self, path: str, rows: int, digest: int) -> Rows:
        """Row ranges [first, stop) to leave out of a file of that many rows: (X, 2).

        Raises `DataError` when the file is not the one that was checked.
        """
        ranges = []
        for entry in self._entries(path):
            assert entry.first_row is not None and entry.rows is not None
            stop = entry.first_row + entry.rows
            if stop > rows or entry.digest not in (None, hex_digest(digest)):
                changed = "the file, or what is read of it, has changed since" if stop <= rows else f"the file has {rows} rows"
                where = f"{self.path}: rows {entry.first_row} to {stop - 1} of {path}"
                raise DataError(f"{where}: {changed}; {AGAIN}, or set data.exclude_episodes to null")
            ranges.append((entry.first_row, stop))
        return np.array(ranges, np.int64).reshape(-1, 2)

    def _entries(self, path: str) -> list[Excluded]:
        return self._by_file.get(real_name(path), [])

    def save(self) -> None:
        """Write the list; its files are named relative to its folder, so that data and list can move together."""
        target = os.path.realpath(self.path)
        folder = os.path.dirname(target)
        episodes = [{**vars(entry), "file": relative_name(entry.file, folder)} for entry in self.entries]
        content = json.dumps({"version": VERSION, "episodes": episodes}, indent=1) + "\n"
        try:
            replace_file(target, content.encode())
        except OSError as error:
            remedy = "give a file in a folder you may write: --exclusion_list FILE"
            raise DataError(f"{self.path}: cannot be written ({first_line(error)}); {remedy}") from error


def hex_digest(digest: int) -> str:
    """A digest as text, 16 characters."""
    return f"{digest:016x}"


def load_exclusions(path: str | None) -> ExclusionList | None:
    """The list behind `data.exclude_episodes`, None where none is given. Raises `DataError` when it is malformed."""
    if path is None:
        return None
    try:
        raw = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        remedy = "write it with `paligemma-vla data check`, or set the key to null"
        raise DataError(f"data.exclude_episodes: {path}: no such file; {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"data.exclude_episodes: {path}: cannot be read as JSON ({first_line(error)}); {AGAIN}") from error
    if not isinstance(raw, dict) or raw.get("version") != VERSION or not isinstance(raw.get("episodes"), list):
        expected = f'an object with "version": {VERSION} and a list "episodes"'
        raise DataError(f"data.exclude_episodes: {path}: got something else, expected {expected}; {AGAIN}")
    folder = os.path.dirname(os.path.realpath(path))
    return ExclusionList(path, [_entry(item, folder, f"{path}: episodes.{n}") for n, item in enumerate(raw["episodes"])])


def _entry(raw: Any, folder: str, where: str) -> Excluded:
    values = raw if isinstance(raw, dict) else {}
    file, first, rows, digest = (values.get(name) for name in ("file", "first_row", "rows", "digest"))
    whole = first is None and rows is None
    some = type(first) is int and type(rows) is int and first >= 0 and rows > 0
    if not _is_path(file) or not (whole or some) or not isinstance(digest, str | None):
        expected = "file, and first_row and rows as whole numbers, or both null"
        raise DataError(f"data.exclude_episodes: {where}: got {json.dumps(raw)[:120]}, expected {expected}; {AGAIN}")
    reasons = values.get("reasons")
    return Excluded(
        file=joined_name(folder, file),
        first_row=first,
        rows=rows,
        episode=values.get("episode"),
        reasons=tuple(map(str, reasons)) if isinstance(reasons, list) else (),
        digest=digest,
    )


def _is_path(value: Any) -> TypeGuard[str]:
    """Whether a file could be named so."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
