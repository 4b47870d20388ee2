"""Which rows are episodes: the list of files, their index and its cache on disk, the list of episodes to leave out."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.faults import LEAVE_OUT, Fault, FaultError, Kind, raise_first, robot_faults
from paligemma_vla.data.formats import (
    MARKS,
    EpisodeFile,
    find_format,
    foreign_format,
    identify_file,
    open_file,
    read_columns,
    read_layout,
)
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import DatasetMetadata, Layout, Rows, joint_layout
from paligemma_vla.storage import (
    Listed,
    atomic_file,
    atomic_write,
    cache_dir,
    is_url,
    join_url,
    list_files,
    read_json,
    split_url,
)

EXCLUSIONS_VERSION = 1
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
        content = json.dumps({"version": EXCLUSIONS_VERSION, "episodes": episodes}, indent=1) + "\n"
        try:
            atomic_write(target, content)
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
    missing = "write it with `paligemma-vla data check`, or set the key to null"
    raw = read_json(path, DataError, AGAIN, missing, where=f"data.exclude_episodes: {path}")
    if raw.get("version") != EXCLUSIONS_VERSION or not isinstance(raw.get("episodes"), list):
        expected = f'an object with "version": {EXCLUSIONS_VERSION} and a list "episodes"'
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


@dataclass(frozen=True)
class FlagRows:
    """Rows of one file in which a flag is true, ascending. null: 3 * row + number in `schema.FLAGS` of every null."""

    first: Rows
    last: Rows
    terminal: Rows
    null: Rows


def find_flags(file: EpisodeFile) -> FlagRows:
    """Flags of one open file, read only where they are not told otherwise; raises `FaultError` when they cannot be read."""
    told = file.flags_from_footer()
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


CACHE_VERSION = 6
ROWS = ("groups", "outside", *(field.name for field in fields(FlagRows)))
# S3 refuses requests of clocks that differ by more (RequestTimeTooSkewed); and a second, which is as exact as mtimes are.
SETTLED_SECONDS = 15 * 60 + 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileFacts:
    """What indexing learns from one file, exclusions aside.

    identity: see `ByteSource.identity`. settled: whether it was asked for so long after the file's mtime that another file
    has another mtime. digest: see `EpisodeFile.digest`. groups: see `group_bounds`. outside: row ranges [first, stop) that
    were not asked for, one after the other (2 X,).
    """

    identity: tuple[int, int, int]
    settled: bool
    layout: Layout
    digest: int
    groups: Rows
    outside: Rows
    flags: FlagRows


def read_facts(path: str) -> FileFacts:
    """Read footer and flags of one file. Raises `FaultError` naming file and column."""
    asked = time.time()
    with open_file(path) as file:
        identity = file.identity()  # before it is read: a change in between is found later
        layout, digest = read_layout(file), file.digest()
        facts = layout, digest, file.bounds, file.outside.ravel(), find_flags(file)
        return FileFacts(identity, is_settled(identity, asked), *facts)


def is_settled(identity: tuple[int, int, int], asked: float) -> bool:
    """Whether a file that is written after `asked` (seconds; the identity was not known yet) has another mtime, whatever the
    clock of the store says."""
    return asked - identity[1] / 1e9 > SETTLED_SECONDS


def cache_path(arguments: Sequence[str]) -> Path:
    """Where the facts about the files behind some arguments (files, folders, globs) are kept."""
    absolute = "\n".join(absolute_name(argument) for argument in arguments)
    key = hashlib.blake2b(os.fsencode(absolute), digest_size=16).hexdigest()
    return cache_dir("index") / f"{key}.npz"


def load_facts(path: Path) -> dict[str, FileFacts]:
    """Facts by absolute path of the file; none when there is no cache that can be used."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return _unpack({name: arrays[name] for name in arrays.files})
    except Exception as error:  # of any kind: bytes on a disk can be anything, and the files themselves are there
        logger.debug("%s: no index is taken from there (%s)", path, error)
        return {}


def save_facts(path: Path, facts: Mapping[str, FileFacts]) -> None:
    """Replace the cache by these facts; does nothing where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.savez(file, **_pack(facts))  # type: ignore[arg-type]
    except OSError as error:
        logger.debug("%s: the index is not kept (%s)", path, error)


def _pack(facts: Mapping[str, FileFacts]) -> dict[str, NDArray[Any]]:
    layouts = [_layout_text(entry.layout) for entry in facts.values()]
    distinct = sorted(set(layouts))
    number = {text: place for place, text in enumerate(distinct)}
    header = json.dumps({"version": CACHE_VERSION, "paths": list(facts), "layouts": distinct})
    rows = {name: [_rows(entry, name) for entry in facts.values()] for name in ROWS}
    return {
        "header": np.frombuffer(header.encode(), np.uint8),
        "identity": np.array([entry.identity for entry in facts.values()], np.int64),
        "settled": np.array([entry.settled for entry in facts.values()], bool),
        "digest": np.array([entry.digest for entry in facts.values()], np.uint64),
        "layout": np.array([number[text] for text in layouts], np.int64),
        **{name: np.concatenate([np.empty(0, np.int64), *parts]) for name, parts in rows.items()},
        **{f"{name}_count": np.array([len(part) for part in parts], np.int64) for name, parts in rows.items()},
    }


def _unpack(arrays: Mapping[str, NDArray[Any]]) -> dict[str, FileFacts]:
    header = json.loads(arrays["header"].tobytes())
    if header["version"] != CACHE_VERSION:
        raise ValueError(f"version {header['version']}")
    layouts = [_layout(text) for text in header["layouts"]]
    rows = {name: np.split(arrays[name], np.cumsum(arrays[f"{name}_count"])[:-1]) for name in ROWS}
    return {
        path: FileFacts(
            identity=tuple(arrays["identity"][place].tolist()),
            settled=bool(arrays["settled"][place]),
            layout=layouts[arrays["layout"][place]],
            digest=int(arrays["digest"][place]),
            groups=rows["groups"][place],
            outside=rows["outside"][place],
            flags=FlagRows(*(rows[field.name][place] for field in fields(FlagRows))),
        )
        for place, path in enumerate(header["paths"])
    }


def _rows(entry: FileFacts, name: str) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = getattr(entry if name in ("groups", "outside") else entry.flags, name)
    return rows


def _layout_text(layout: Layout) -> str:
    return json.dumps([layout.cameras, layout.state_dim, layout.action_dim, layout.metadata.to_json()])


def _layout(text: str) -> Layout:
    cameras, state_dim, action_dim, metadata = json.loads(text)
    return Layout(cameras, state_dim, action_dim, DatasetMetadata.from_json(metadata))


COPY_IT = "copy it to this machine; `paligemma-vla data convert` makes episode files of it, which may lie behind URLs"
MAGIC = re.compile(r"[*\[]")  # a question mark begins the options of a URL


def files_behind(url: str, where: str) -> dict[str, Listed]:
    """Files behind a URL, by theirs, sorted. Raises `DataError` naming `where`, or `StorageError`."""
    head, rest = split_url(url)
    if not head.partition("://")[2].strip("/"):
        raise DataError(f"{where}: got '{url}', which names no place; give a bucket, or a folder or file in it")
    folder, pattern = _base(head.rstrip("/"))
    base = folder + rest
    listed = list_files(base)
    files = {_tidy(name): name for name in sorted(listed, key=lambda name: name != _tidy(name))}
    if not pattern and not files:
        return {url: None}  # a file, or nothing: opening it tells
    matches = _matching(list(files), pattern) if pattern else {"": list(files)}
    for match, inside in matches.items():
        for form, mark in MARKS.items():
            if mark in inside:
                place = join_url(base, match) if match else url
                raise DataError(f"{where}: {place}: this is {form} data, which is read from a disk only; {COPY_IT}")
    found = {
        f"{match}/{name}".strip("/")
        for match, inside in matches.items()
        for name in inside
        if not name or (name.endswith(".parquet") and not PurePosixPath(name).name.startswith("."))
    }
    for name in sorted(found):
        if files[name] != name:
            raise DataError(f"{where}: {join_url(base, files[name])}: has a part without a name in its path; rename it")
    return {join_url(base, name): listed[name] for name in sorted(found)}


def _tidy(name: str) -> str:
    """A path without parts that have no name, which stores allow."""
    return "/".join(part for part in name.split("/") if part)


def _base(head: str) -> tuple[str, str]:
    """A URL up to the last folder without a glob, and the pattern below it."""
    magic = MAGIC.search(head, head.index("://") + 3)
    if magic is None:
        return head, ""
    folder, _, _ = head[: magic.start()].rpartition("/")
    return folder, head[len(folder) + 1 :]


def _matching(names: list[str], pattern: str) -> dict[str, list[str]]:
    """Files and folders that match a pattern, each with the names of the files below it; a file's is empty.

    What is called just so matches, and nothing else does then: a name may well hold what a glob would take for its own. What
    is hidden matches only a pattern that says so.
    """
    from fsspec.utils import glob_translate

    literal = any(name == pattern or name.startswith(f"{pattern}/") for name in names)
    expression = re.compile(f"{re.escape(pattern)}$" if literal else glob_translate(pattern))
    hidden = literal or _is_hidden(pattern)
    found: dict[str, list[str]] = {}
    for name in names:
        for place in (name, *(str(parent) for parent in PurePosixPath(name).parents if str(parent) != ".")):
            if expression.match(place) and (hidden or not _is_hidden(place)):
                found.setdefault(place, []).append(name.removeprefix(place).strip("/"))
    return found


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


REQUESTS = 16  # under way at once


def expand_paths(paths: str | Sequence[str], where: str) -> list[str]:
    """List the files behind a file, folder (searched through), glob, URL of these, place of a source, or list; without repeats.

    Raises `DataError`, naming `where` (the config key or flag), when one of them holds none, or data of a foreign format.
    """
    return list(find_files(paths, where))


def find_files(paths: str | Sequence[str], where: str) -> dict[str, Listed]:
    """What `expand_paths` lists, with what a store's listing says of each file."""
    found: dict[str, Listed] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        prefix, source, place = find_format(path)
        if source is not None:
            if is_url(place):
                raise DataError(f"{where}: {path}: data of another format is read from a disk only; {COPY_IT}")
            files: dict[str, Listed] = dict.fromkeys(prefix + file for file in source.list_files(place, where))
        else:
            files = files_behind(path, where) if is_url(path) else dict.fromkeys(_local_files(path, where))
        if not files:
            raise DataError(f"{where}: {path}: no Parquet file there; expected a file, a folder that holds some, or a glob")
        found.update(files)
    return found


def _local_files(path: str, where: str) -> list[str]:
    matches = [path]
    if not os.path.exists(path):  # else its name may well hold what a glob would take for its own
        matches = [str(Path(match)) for match in glob.glob(path, recursive=True)]
    for match in matches:
        if form := foreign_format(match):
            raise DataError(f"{where}: {match}: this is data of another format; write {form}:{match}")
    return sorted({file for match in matches for file in _files_in(match)})


def _files_in(path: str) -> list[str]:
    """A file itself, or the Parquet files anywhere in a folder."""
    if not os.path.isdir(path):
        return [path] if os.path.isfile(path) else []
    return [str(file) for file in Path(path).rglob("*.parquet") if file.is_file() and not file.name.startswith(".")]


@dataclass(frozen=True)
class EpisodeIndex:
    """Where every episode lies.

    paths: files. Per episode, in the order of files and rows: file (int32), start (int64, row in its file), length (int32).
    groups: of all files one after the other, the first row of each row group, and the file's number of rows (int64); those
    of file f lie at group_offsets[f : f + 2] (int64). stamps: per file, size in bytes, mtime in ns, and a store's version of
    it (int64, see `ByteSource.identity`). digests: per file, see `EpisodeFile.digest` (uint64). excluded: how many episodes
    (and files as a whole) an exclusion list left out.
    """

    paths: tuple[str, ...]
    layout: Layout
    file: NDArray[np.int32]
    start: NDArray[np.int64]
    length: NDArray[np.int32]
    groups: NDArray[np.int64]
    group_offsets: NDArray[np.int64]
    stamps: NDArray[np.int64]
    digests: NDArray[np.uint64]
    excluded: int = 0

    @classmethod
    def build(
        cls,
        paths: str | Sequence[str],
        where: str = "data.train_parquet_files",
        exclude: ExclusionList | None = None,
    ) -> EpisodeIndex:
        """Index files from their flags, in parallel. Raises `DataError` naming file, row and column of the first fault.

        exclude: what it lists is left out before anything is judged.
        """
        files = find_files(paths, where)
        kept = [path for path in files if exclude is None or not exclude.leaves_out(path)]
        facts = _gather([paths] if isinstance(paths, str) else paths, files, kept)
        for path in kept[1:]:
            raise_first(robot_faults(path, facts[path].layout, kept[0], facts[kept[0]].layout))
        episodes = [_episodes(path, facts[path], exclude) for path in kept]
        excluded = len(files) - len(kept) + sum(left_out for _, _, left_out in episodes)
        if not sum(len(starts) for starts, _, _ in episodes):
            assert exclude is not None  # a file without episodes has been refused
            raise DataError(
                f"{where}: every episode is left out by {exclude.path}; mend them and check again, or give other data"
            )
        entries = [facts[path] for path in kept]
        return cls(
            paths=tuple(kept),
            layout=joint_layout([entry.layout for entry in entries]),
            file=np.repeat(np.arange(len(kept), dtype=np.int32), [len(starts) for starts, _, _ in episodes]),
            start=np.concatenate([starts for starts, _, _ in episodes]),
            length=np.concatenate([lengths for _, lengths, _ in episodes]).astype(np.int32),
            groups=np.concatenate([entry.groups for entry in entries]),
            group_offsets=np.cumsum([0, *(len(entry.groups) for entry in entries)], dtype=np.int64),
            stamps=np.array([_stamp_of(path, facts[path].identity) for path in kept], np.int64),
            digests=np.array([entry.digest for entry in entries], np.uint64),
            excluded=excluded,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[EpisodeIndex]) -> EpisodeIndex:
        """Several indices end to end; raises `DataError` when they are not of one robot."""
        first = parts[0]
        if len(parts) == 1:
            return first
        for part in parts:
            raise_first(robot_faults(part.paths[0], part.layout, first.paths[0], first.layout))
        files = np.cumsum([0, *(len(part.paths) for part in parts[:-1])])
        groups = np.cumsum([0, *(len(part.groups) for part in parts[:-1])])
        return cls(
            paths=tuple(path for part in parts for path in part.paths),
            layout=joint_layout([part.layout for part in parts]),
            file=np.concatenate([part.file + offset for part, offset in zip(parts, files.astype(np.int32), strict=True)]),
            start=np.concatenate([part.start for part in parts]),
            length=np.concatenate([part.length for part in parts]),
            groups=np.concatenate([part.groups for part in parts]),
            group_offsets=np.concatenate(
                [[0], *(part.group_offsets[1:] + offset for part, offset in zip(parts, groups, strict=True))]
            ).astype(np.int64),
            stamps=np.concatenate([part.stamps for part in parts]),
            digests=np.concatenate([part.digests for part in parts]),
            excluded=sum(part.excluded for part in parts),
        )

    def __len__(self) -> int:
        return len(self.start)

    @property
    def steps(self) -> int:
        """Number of time steps (rows) in all episodes."""
        return int(self.length.sum())

    @property
    def nbytes(self) -> int:
        """Memory the index takes, paths included."""
        arrays = (self.file, self.start, self.length, self.groups, self.group_offsets, self.stamps, self.digests)
        return sum(array.nbytes for array in arrays) + sum(sys.getsizeof(path) for path in self.paths)

    @property
    def fingerprint(self) -> str:
        """Of the data, not of where it lies: digests of the files, and which rows are the episodes, in order. 32 characters.

        Another machine with the same data under another folder gets the same one.
        """
        digest = hashlib.blake2b(np.int64(len(self.paths)).tobytes(), digest_size=16)
        for array, kind in ((self.digests, "<u8"), (self.file, "<i4"), (self.start, "<i8"), (self.length, "<i4")):
            digest.update(array.astype(kind).tobytes())
        return digest.hexdigest()

    @cached_property
    def row_offsets(self) -> Rows:
        """Number of rows in the files before each, and in all (F + 1,)."""
        offsets: Rows = np.concatenate([[0], np.cumsum(self.groups[self.group_offsets[1:] - 1])])
        return offsets

    def row_groups(self, file: int) -> Rows:
        """First row of each row group of a file, and its number of rows at the end."""
        return self.groups[self.group_offsets[file] : self.group_offsets[file + 1]]

    def has_rows(self, file: int, rows: Rows) -> NDArray[np.bool_]:
        """Which rows of a file belong to an episode of this index."""
        first, stop = np.searchsorted(self.file, [file, file + 1])
        starts, lengths = self.start[first:stop], self.length[first:stop]
        if len(starts) == 0:
            return np.zeros(len(rows), bool)
        place = np.searchsorted(starts, rows, side="right") - 1
        held: NDArray[np.bool_] = (place >= 0) & (rows < (starts + lengths)[place])
        return held

    def check_unchanged(self, file: int, identify: Callable[[], tuple[int, int, int]] | None = None) -> None:
        """Raise `DataError` when a file is no longer the one that was indexed. identify: tells what it is (default: asked
        anew)."""
        path, indexed = self.paths[file], tuple(self.stamps[file].tolist())
        try:
            current = identify_file(path) if identify is None else identify()
        except FaultError as error:
            cause = error.__cause__
            why = str(cause.strerror) if isinstance(cause, OSError) else error.fault.text
            raise DataError(_changed(path, "gone", why, indexed)) from error
        if _stamp_of(path, current) != indexed:
            raise DataError(_changed(path, "changed", _stamp(_stamp_of(path, current)), indexed))

    def select(self, episodes: NDArray[np.int64]) -> EpisodeIndex:
        """The same files with some of the episodes, given in ascending order."""
        return replace(self, file=self.file[episodes], start=self.start[episodes], length=self.length[episodes])

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


def _changed(path: str, what: str, got: str, indexed: tuple[int, ...]) -> str:
    remedy = "put it back as it was, or start a new run: order and statistics depend on it"
    return f"{path}: {what} since it was indexed: got {got}, expected {_stamp(indexed)}; {remedy}"


def _stamp_of(path: str, identity: tuple[int, int, int]) -> tuple[int, int, int]:
    """What must stay of a file's identity: not ctime, which changes with its name and rights too."""
    size, modified, version = identity
    return size, modified, version if is_url(path) else 0


def _stamp(stamp: tuple[int, ...]) -> str:
    size, modified, version = stamp
    date = f" of {datetime.fromtimestamp(modified / 1e9).isoformat(sep=' ', timespec='microseconds')}" if modified else ""
    return f"{size} bytes{date}" + (f", version {version:016x}" if version else "")


def _gather(arguments: Sequence[str], files: Mapping[str, Listed], kept: Sequence[str]) -> Mapping[str, FileFacts]:
    """Facts of the kept files: from the cache where they have not changed, else from the files, in parallel.

    A store is not asked about files that its listing tells enough of: one request for a thousand.
    """
    cache = cache_path(arguments)
    known = load_facts(cache)
    absolute = {path: absolute_name(path) for path in files}
    facts = {path: known[absolute[path]] for path in kept if absolute[path] in known}
    asked = time.time()
    remote = any(map(is_url, kept))  # a store is waited for, so it is asked many things at once; a disk's files are work
    with ThreadPoolExecutor(REQUESTS if remote else min(REQUESTS, 2 * (os.cpu_count() or 1))) as pool:
        doubtful = [path for path, entry in facts.items() if not _is_listed(entry, files[path])]
        identities = dict(zip(doubtful, (pool.map if remote else map)(identify_file, doubtful), strict=True))
        facts = {path: entry for path, entry in facts.items() if identities.get(path, entry.identity) == entry.identity}
        missing = [path for path in kept if path not in facts]
        facts.update(zip(missing, pool.map(read_facts, missing), strict=True))
    same = facts.keys() - set(missing)
    settled = [path for path in doubtful if path in same and files[path] and is_settled(facts[path].identity, asked)]
    facts.update((path, replace(facts[path], settled=True)) for path in settled)
    gone = known.keys() - set(absolute.values())
    if missing or gone or settled:
        current = {path: entry for path, entry in known.items() if path not in gone}
        save_facts(cache, {**current, **{absolute[path]: entry for path, entry in facts.items()}})
    return facts


def _is_listed(entry: FileFacts, listed: Listed) -> bool:
    """Whether what a store lists is the file that the facts are of."""
    size, modified, _ = entry.identity
    return entry.settled and listed == (size, modified // 10**9)


def _episodes(path: str, facts: FileFacts, exclude: ExclusionList | None) -> tuple[Rows, Rows, int]:
    """First rows and lengths of a file's episodes, and how many are left out. Raises `DataError` for a broken chain."""
    rows = int(facts.groups[-1])
    left_out = exclude.ranges(path, rows, facts.digest) if exclude else NOTHING
    ranges = np.concatenate([left_out, facts.outside.reshape(-1, 2)])
    raise_first(chain_faults(path, facts.flags, rows, ranges))
    return *segment(facts.flags, rows, ranges), len(left_out)


def absolute_name(name: str) -> str:
    """A name that means the same from any folder."""
    prefix, _, place = find_format(name)
    return prefix + (place if is_url(place) else os.path.abspath(place))


def real_name(name: str) -> str:
    """The one name of a file, whatever links lead to it and whatever is selected of it."""
    prefix, source, place = find_format(name)
    file = place if source is None else source.selected(place)[0]
    return prefix + (file if is_url(file) else os.path.realpath(file))


def share_episodes(first: str, second: str) -> bool:
    """Whether two names of the same data may select an episode in common."""
    ranges = []
    for name in (first, second):
        _, source, place = find_format(name)
        start, stop = (None, None) if source is None else source.selected(place)[1:]
        ranges.append((start or 0, float("inf") if stop is None else stop))
    return max(start for start, _ in ranges) < min(stop for _, stop in ranges)


def relative_name(name: str, folder: str) -> str:
    """A name as seen from a folder (a URL is the same from anywhere); `joined_name` is the way back."""
    prefix, _, place = find_format(name)
    return prefix + (place if is_url(place) else os.path.relpath(place, folder))


def joined_name(folder: str, name: str) -> str:
    """The real name behind a name as seen from a folder."""
    prefix, _, place = find_format(name)
    return prefix + (place if is_url(place) else os.path.realpath(os.path.join(folder, place)))
