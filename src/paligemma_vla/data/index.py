"""Which rows are episodes: the files, their index and its cache on disk, the list of episodes to leave out.

An index is built from footers and flags, and from the cache for files that have not changed. `reader.py` reads rows.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from paligemma_vla import schema
from paligemma_vla.data.faults import LEAVE_OUT, Fault, FaultError, Kind, raise_first, robot_faults
from paligemma_vla.data.formats import (
    MARKS,
    EpisodeFile,
    Identity,
    find_format,
    identify_file,
    open_file,
    read_columns,
    read_layout,
)
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import DatasetMetadata, Layout, Rows, first_fault, joint_layout
from paligemma_vla.storage import (
    atomic_file,
    atomic_write,
    cache_dir,
    find_files,
    is_stranger,
    is_url,
    join_url,
    read_json,
    split_url,
)

REQUESTS = 32  # to a store, at a time
CACHE_VERSION, EXCLUSIONS_VERSION = 12, 1
DIGEST_BYTES = 16
NOTHING: Rows = np.empty((0, 2), np.int64)
COPY_IT = "copy it to this machine; `paligemma-vla data convert` makes episode files of it, which may be behind URLs"
CHECK_AGAIN = "run `paligemma-vla data check` again"
ROWS = ("first", "last", "terminal", "null", "groups", "outside")  # arrays of a `FileFacts`
CACHE_SCHEMA = pa.schema(
    {
        "path": pa.binary(),
        "layout": pa.dictionary(pa.int32(), pa.string()),
        "digest": pa.uint64(),
        "faults": pa.string(),
        **dict.fromkeys(("identity", *ROWS), pa.large_list(pa.int64())),
    }
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeIndex:
    """Where every episode is.

    paths: files. Per episode, in the order of files and rows: file (int32), start (int64, row in its file), length (int32).
    groups: of all files one after the other, the first row of each row group, and the file's number of rows (int64); those
    of file f are at group_offsets[f : f + 2] (int64). stamps: per file, size in bytes, mtime in ns, and a store's version of
    it (int64, see `ByteSource.identity`). digests: per file, see `EpisodeFile.digest` (uint64). excluded: how many episodes
    (and files as a whole) an exclusion list left out. unlabelled: per episode, its first rows that are no labels (int32);
    None: all are.
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
    unlabelled: NDArray[np.int32] | None = None

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
        files = expand_paths(paths, where)
        kept = [path for path in files if exclude is None or not exclude.leaves_out(path)]
        facts = _gather([paths] if isinstance(paths, str) else paths, files, kept)
        index = cls.concatenate([_index_file(path, facts[path], exclude) for path in kept]) if kept else None
        if index is None or len(index) == 0:
            cause = "the episodes have no rows" if exclude is None else f"every episode is left out by {exclude.path}"
            raise DataError(f"{where}: {cause}; mend them and check again, or give other data")
        return replace(index, excluded=index.excluded + len(files) - len(kept))

    @classmethod
    def concatenate(cls, parts: Sequence[EpisodeIndex]) -> EpisodeIndex:
        """Several indices end to end; raises `DataError` when they are not of one robot."""
        first = parts[0]
        if len(parts) == 1:
            return first
        for part in parts[1:]:
            raise_first(robot_faults(part.paths[0], part.layout, first.paths[0], first.layout))
        files = np.cumsum([0, *(len(part.paths) for part in parts[:-1])], dtype=np.int32)
        groups = np.cumsum([0, *(len(part.groups) for part in parts[:-1])])
        offsets = [part.group_offsets[1:] + offset for part, offset in zip(parts, groups, strict=True)]
        return cls(
            paths=tuple(path for part in parts for path in part.paths),
            layout=joint_layout([part.layout for part in parts]),
            file=np.concatenate([part.file + offset for part, offset in zip(parts, files, strict=True)]),
            group_offsets=np.concatenate([np.zeros(1, np.int64), *offsets]),
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "length", "groups")},
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ("stamps", "digests")},
            excluded=sum(part.excluded for part in parts),
            unlabelled=None if all(part.unlabelled is None for part in parts) else np.concatenate([*map(_unlabelled, parts)]),
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
        labels = 0 if self.unlabelled is None else self.unlabelled.nbytes
        return labels + sum(array.nbytes for array in arrays) + sum(sys.getsizeof(path) for path in self.paths)

    @property
    def fingerprint(self) -> str:
        """Of the data, wherever it is: digests of the files, and which rows are the episodes, in order. 32 characters."""
        digest = hashlib.blake2b(np.int64(len(self.paths)).tobytes(), digest_size=16)
        for array, kind in ((self.digests, "<u8"), (self.file, "<i4"), (self.start, "<i8"), (self.length, "<i4")):
            digest.update(array.astype(kind).tobytes())
        if self.unlabelled is not None:
            digest.update(self.unlabelled.astype("<i4").tobytes())
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
        starts = self.start[first:stop]
        return inside(rows, np.stack([starts, starts + self.length[first:stop]], axis=1))

    def check_unchanged(self, file: int, identify: Callable[[], Identity] | None = None) -> None:
        """Raise `DataError` when a file is no longer the one that was indexed. identify: returns its identity (None: asks)."""
        path, indexed = self.paths[file], tuple(self.stamps[file].tolist())
        try:
            current = _stamp(path, identify_file(path) if identify is None else identify())
            what, got = "changed", _describe(current)
        except FaultError as error:
            what, current, got = "gone", None, first_line(error.__cause__ or error)
        if current != indexed:
            remedy = "put it back as it was, or start a new run: order and statistics depend on it"
            raise DataError(f"{path}: {what} since it was indexed: got {got}, expected {_describe(indexed)}; {remedy}")

    def select(self, episodes: NDArray[np.int64]) -> EpisodeIndex:
        """The same files with some of the episodes, given in ascending order."""
        unlabelled = None if self.unlabelled is None else self.unlabelled[episodes]
        chosen = replace(self, file=self.file[episodes], start=self.start[episodes], length=self.length[episodes])
        return replace(chosen, unlabelled=unlabelled)

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


def _unlabelled(index: EpisodeIndex) -> NDArray[np.int32]:
    return np.zeros(len(index), np.int32) if index.unlabelled is None else index.unlabelled


def _stamp(path: str, identity: Identity) -> Identity:
    """What must stay of a file's identity: not ctime, which changes with its name and rights too."""
    return (*identity[:2], identity[2] if is_url(path) else 0)


def _describe(stamp: tuple[int, ...]) -> str:
    size, modified, version = stamp
    date = f" of {datetime.fromtimestamp(modified / 1e9).isoformat(sep=' ', timespec='microseconds')}" if modified else ""
    return f"{size} bytes{date}" + (f", version {version:016x}" if version else "")


@dataclass(frozen=True)
class FlagRows:
    """Rows of one file in which a flag is true, ascending. null: 3 * row + number in `schema.FLAGS` of every null."""

    first: Rows
    last: Rows
    terminal: Rows
    null: Rows


@dataclass(frozen=True)
class FileFacts(FlagRows):
    """What indexing learns from one file, exclusions aside: its flags, and the rest.

    groups: see `group_bounds`. outside: row ranges [first, stop) that were not selected, one after the other (2 X,).
    identity: see `ByteSource.identity`. digest: see `EpisodeFile.digest`. faults: see `EpisodeFile.row_faults`.
    """

    groups: Rows
    outside: Rows
    identity: Identity
    layout: Layout
    digest: int
    faults: tuple[Fault, ...]


def read_facts(path: str) -> FileFacts:
    """Read footer and flags of one file. Raises `FaultError` naming file and column."""
    with open_file(path) as file:
        identity = file.identity()  # before it is read: a change in between is found later
        return FileFacts(
            identity=identity,
            layout=read_layout(file),
            digest=file.digest(),
            groups=file.bounds,
            outside=file.outside.ravel(),
            faults=tuple(file.row_faults()),
            **vars(find_flags(file)),
        )


def find_flags(file: EpisodeFile) -> FlagRows:
    """Flags of one open file, read only where its footer does not have them; raises `FaultError` when they cannot be read."""
    rows = file.flags_from_footer()
    if rows is None:
        return read_flags(file)
    first, last, terminal = rows
    return FlagRows(first, last, terminal, np.empty(0, np.int64))


def read_flags(file: EpisodeFile) -> FlagRows:
    """Flags of one open file; raises `FaultError` when they cannot be read."""
    table = read_columns(file, schema.FLAGS)
    columns = [table[name] for name in schema.FLAGS]
    null = [3 * np.flatnonzero(column.is_null().to_numpy()) + number for number, column in enumerate(columns)]
    first, last, terminal = (np.flatnonzero(column.fill_null(False).to_numpy()) for column in columns)
    return FlagRows(first, last, terminal, np.sort(np.concatenate(null)))


def segment(flags: FlagRows, rows: int, excluded: Rows) -> tuple[Rows, Rows]:
    """First rows and lengths of the episodes of a file, as its flags have them.

    A new one begins at is_first and after is_last. excluded (X, 2): row ranges [first, stop) that are left out.
    """
    bounds = np.unique(np.concatenate([[0, rows], flags.first, flags.last + 1, excluded.ravel()]).astype(np.int64))
    kept = ~inside(bounds[:-1], excluded)
    return bounds[:-1][kept], np.diff(bounds)[kept]


def inside(rows: Rows, ranges: Rows) -> NDArray[np.bool_]:
    """Which of some rows are in any of the ranges [first, stop) (X, 2)."""
    if len(ranges) == 0:
        return np.zeros(len(rows), bool)
    ordered = ranges[np.argsort(ranges[:, 0])]
    number = np.searchsorted(ordered[:, 0], rows, side="right") - 1
    found: NDArray[np.bool_] = (number >= 0) & (rows < np.maximum.accumulate(ordered[:, 1])[number])
    return found


def chain_faults(path: str, flags: FlagRows, rows: int, excluded: Rows) -> list[Fault]:
    """Faults of the flags outside the excluded ranges: every episode runs from is_first to is_last without a gap.

    is_terminal may be true in an episode's last row only. In the order of rows.
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
    why = "because only the last row of an episode may be terminal"
    faults += [(row, schema.IS_TERMINAL, f"got true, expected false, {why}") for row in early.tolist()]
    return [
        Fault(path, Kind.FLAGS, f"{text}; mend the flags, or {LEAVE_OUT}", row, column) for row, column, text in sorted(faults)
    ]


def _index_file(path: str, facts: FileFacts, exclude: ExclusionList | None) -> EpisodeIndex:
    """The index of one file. Raises `DataError` for a broken chain of flags, and for an exclusion list of another file."""
    rows = int(facts.groups[-1])
    left_out = exclude.ranges(path, rows, facts.digest) if exclude else NOTHING
    ranges = np.concatenate([left_out, facts.outside.reshape(-1, 2)])
    raise_first(replace(fault, file=path) for fault in facts.faults if not inside(np.array([fault.row]), ranges).all())
    raise_first(chain_faults(path, facts, rows, ranges))
    starts, lengths = segment(facts, rows, ranges)
    return EpisodeIndex(
        paths=(path,),
        layout=facts.layout,
        file=np.zeros(len(starts), np.int32),
        start=starts,
        length=lengths.astype(np.int32),
        groups=facts.groups,
        group_offsets=np.array([0, len(facts.groups)], np.int64),
        stamps=np.array([_stamp(path, facts.identity)], np.int64),
        digests=np.array([facts.digest], np.uint64),
        excluded=len(left_out),
    )


def _gather(arguments: Sequence[str], files: Sequence[str], kept: Sequence[str]) -> Mapping[str, FileFacts]:
    """Facts of the kept files: from the cache where their identity is the same, else from the files, in parallel."""
    cache = cache_path(arguments)
    cached = load_facts(cache)
    absolute = {path: map_path(path, os.path.abspath) for path in files}
    known = [path for path in kept if absolute[path] in cached]
    remote = any(map(is_url, kept))  # a store is waited for, so it is asked many things at once; a disk's files are work
    with ThreadPoolExecutor(REQUESTS if remote else 2 * (os.cpu_count() or 1)) as pool:
        identities = zip(known, pool.map(identify_file, known) if remote else map(identify_file, known), strict=True)
        same = [path for path, identity in identities if cached[absolute[path]].identity == identity]
        facts = {path: cached[absolute[path]] for path in same}
        missing = [path for path in kept if path not in facts]
        facts.update(zip(missing, pool.map(read_facts, missing), strict=True))
    if missing or cached.keys() - set(absolute.values()):
        still_there = {path: cached[path] for path in absolute.values() if path in cached}
        save_facts(cache, {**still_there, **{absolute[path]: entry for path, entry in facts.items()}})
    return facts


def cache_path(arguments: Sequence[str]) -> Path:
    """Where the facts about the files behind some arguments (files, folders, globs) are kept."""
    absolute = "\n".join(map_path(argument, os.path.abspath) for argument in arguments)
    key = hashlib.blake2b(os.fsencode(absolute), digest_size=16).hexdigest()
    return cache_dir("index") / f"{key}.arrow"


def load_facts(path: Path) -> dict[str, FileFacts]:
    """Facts by absolute path of the file; none when there is no cache that can be used."""
    try:
        kept = path.read_bytes()
        digest, content = kept[:DIGEST_BYTES], memoryview(kept)[DIGEST_BYTES:]
        if digest != _digest(content):
            raise ValueError("it is damaged, or of another version")
    except (OSError, ValueError) as error:
        logger.debug("%s: no index is taken from there (%s)", path, error)
        return {}
    columns = pa.ipc.open_file(content).read_all().combine_chunks().to_batches()[0]
    found = {name: columns[name].to_pylist() for name in ("path", "identity", "layout", "digest", "faults")}
    found |= {name: np.split(columns[name].values.to_numpy(), columns[name].offsets.to_numpy()[1:-1]) for name in ROWS}
    layouts = {text: _parse_layout(text) for text in set(found["layout"])}
    return {
        os.fsdecode(name): FileFacts(
            **dict(zip(ROWS, rows, strict=True)),
            identity=tuple(identity),
            layout=layouts[layout],
            digest=digest,
            faults=_parse_faults(faults),
        )
        for name, identity, layout, digest, faults, *rows in zip(*found.values(), strict=True)
    }


def _parse_layout(text: str) -> Layout:
    raw = json.loads(text)
    return Layout(**{**raw, "metadata": DatasetMetadata.from_json(raw["metadata"])})


def _parse_faults(text: str) -> tuple[Fault, ...]:
    return tuple(Fault(**{**raw, "kind": Kind(raw["kind"])}) for raw in json.loads(text))


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES, person=b"index %d" % CACHE_VERSION).digest()


def save_facts(path: Path, facts: Mapping[str, FileFacts]) -> None:
    """Replace the cache by these facts; does nothing where it cannot be written."""
    entries = list(facts.values())
    layouts = [json.dumps({**vars(entry.layout), "metadata": entry.layout.metadata.to_json()}) for entry in entries]
    columns = {name: [getattr(entry, name) for entry in entries] for name in ("identity", "digest", *ROWS)}
    columns["faults"] = [json.dumps(list(map(vars, entry.faults))) for entry in entries]
    table = pa.table({"path": list(map(os.fsencode, facts)), "layout": layouts, **columns}, CACHE_SCHEMA)
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, CACHE_SCHEMA) as writer:
        writer.write_table(table)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(_digest(content.getvalue()))
            file.write(content.getvalue())
    except OSError as error:
        logger.debug("%s: the index is not kept (%s)", path, error)


def expand_paths(paths: str | Sequence[str], where: str) -> list[str]:
    """List the files behind a file, folder (searched through), glob, URL of these, name of another format, or list of them;
    each once, whatever links lead to it.

    Raises `DataError`, naming `where` (the config key or flag), when one of them holds none, or data of a foreign format.
    """
    found: dict[str, str] = {}  # by the name without links
    for path in [paths] if isinstance(paths, str) else paths:
        prefix, form, location = find_format(path)
        if form is None:
            files = _find_episodes(path, where)
        elif is_url(location):
            raise DataError(f"{where}: {path}: data of another format is read from a disk only; {COPY_IT}")
        else:
            files = [prefix + file for file in form.list_files(location, where)]
        if not files:
            raise DataError(f"{where}: {path}: no Parquet file there; expected a file, a folder that holds some, or a glob")
        for file in files:
            found.setdefault(map_path(file, os.path.realpath), file)
    return list(found.values())


def _find_episodes(location: str, where: str) -> list[str]:
    """The Parquet files behind a path, glob or URL. Raises `DataError`, or `StorageError`."""
    found: set[str] = set()
    logs: list[str] = []
    for base, pattern in _remote_bases(location, where) if is_url(location) else local_bases(location):
        names = find_files(base, pattern)
        if not names and not pattern and is_url(location):
            return [location]  # a file, or nothing: opening it tells
        for name in names:
            if name.endswith(".parquet") and "//" in f"/{name}":  # a disk has no such path, so no pattern matches it
                raise DataError(f"{where}: {join_url(base, name)}: has a part without a name in its path; rename it")
        for match, below in _matches(names, pattern):
            folder = _join(base, match)
            for form, mark in MARKS.items():
                if f"/{below}".endswith(f"/{mark}"):
                    folder = _join(folder, below.removesuffix(mark).rstrip("/"))
                    got = f"this is {form} data, which is read from a disk only; {COPY_IT}"
                    got = got if is_url(base) else f"this is data of another format; write {form}:{folder}"
                    raise DataError(f"{where}: {folder}: {got}")
            file = _join(folder, below)
            if file.endswith(schema.LOG_SUFFIX):
                logs.append(file)
            elif not below or below.endswith(".parquet"):
                found.add(file)
    if logs and not found:
        what = "a log of served chunks, with one view for several actions, so it holds no episodes"
        raise DataError(f"{where}: {logs[0]}: {what}; `serve --record` writes some of clients that send every step")
    return sorted(found)


def _join(folder: str, path: str) -> str:
    if not path:
        return folder
    return join_url(folder, path) if is_url(folder) else str(Path(folder, path))


def local_bases(path: str) -> list[tuple[str, str]]:
    """What a path or glob names on this machine: files and folders, each with the pattern for what is below it.

    There is one only after `**`: the files are found before they are compared with it, since links may lead in circles.
    """
    if os.path.exists(path):  # no glob, whatever characters it has
        return [(path, "")]
    head, *deep = re.split(r"(?<![^/])\*\*(?![^/])", path, maxsplit=1)
    matches = glob.glob(head) if head or not deep else ["."]
    shown = [match for match in matches if not any(is_stranger(part, head) for part in match.split("/"))]
    return [(str(Path(match)), "".join(["**", *deep]) if deep else "") for match in shown]


def _remote_bases(url: str, where: str) -> list[tuple[str, str]]:
    """The folder of a URL before its first part with a glob, and the pattern from there on. Raises `DataError`."""
    head, options = split_url(url)
    scheme, _, path = head.rstrip("/").partition("://")
    if not path.strip("/"):
        raise DataError(f"{where}: got '{url}', which names no place; give a bucket, or a folder or file in it")
    folder, pattern = path, ""
    if glob_start := re.search(r"[*\[]", path):  # a question mark begins the options of a URL
        folder = path[: glob_start.start()].rpartition("/")[0]
        pattern = path[len(folder) + 1 :]
    return [(f"{scheme}://{folder}{options}", pattern)]


def _matches(names: Sequence[str], pattern: str) -> Iterator[tuple[str, str]]:
    """Files and folders that match a pattern, and the path below each of every file in it (of a file, an empty one).

    A name that is the pattern itself is no glob.
    """
    from fsspec.utils import glob_translate

    literal = not pattern or any(name == pattern or name.startswith(f"{pattern}/") for name in names)
    expression = re.compile(re.escape(pattern) if literal else glob_translate(pattern))
    for name in names:
        parts = name.split("/")
        for depth in range(len(parts) + 1):
            match = "/".join(parts[:depth])
            if expression.fullmatch(match):
                yield match, "/".join(parts[depth:])


@dataclass(frozen=True)
class Excluded:
    """An episode to leave out, by its rows in a file; with first_row and rows None, the whole file.

    file: absolute, without links. episode: its number in the file. digest: of the file as `data check` saw it.
    """

    file: str
    first_row: Annotated[int, Field(ge=0, strict=True)] | None
    rows: Annotated[int, Field(gt=0, strict=True)] | None
    episode: int | None = None
    reasons: tuple[str, ...] = ()
    digest: str | None = None

    def __post_init__(self) -> None:
        if (self.first_row is None) != (self.rows is None):
            raise ValueError("first_row and rows: expected whole numbers, or both null")


@dataclass(frozen=True)
class _Listed:
    """JSON of an `ExclusionList`."""

    version: Literal[1]
    episodes: tuple[Excluded, ...]


class ExclusionList:
    """The list of episodes to leave out: written by `data check`, named by `data.exclude_episodes`. path: for messages."""

    def __init__(self, path: str, entries: Iterable[Excluded]) -> None:
        self.path, self.entries = path, tuple(entries)
        self._by_file: dict[str, list[Excluded]] = defaultdict(list)
        for entry in self.entries:
            self._by_file[entry.file].append(entry)

    def leaves_out(self, path: str) -> bool:
        """Whether a file is left out as a whole; it is not even opened then."""
        return any(entry.first_row is None for entry in self._by_file.get(real_name(path), ()))

    def ranges(self, path: str, rows: int, digest: int) -> Rows:
        """Row ranges [first, stop) to leave out of a file of that many rows: (X, 2).

        Raises `DataError` when the file is not the one that was checked.
        """
        ranges = []
        for entry in self._by_file.get(real_name(path), ()):
            assert entry.first_row is not None and entry.rows is not None
            stop = entry.first_row + entry.rows
            if stop > rows or entry.digest not in (None, hex_digest(digest)):
                changed = "the file, or what is read of it, has changed since" if stop <= rows else f"the file has {rows} rows"
                listed = f"{self.path}: rows {entry.first_row} to {stop - 1} of {path}"
                raise DataError(f"{listed}: {changed}; {CHECK_AGAIN}, or give no list (data.exclude_episodes: null)")
            ranges.append((entry.first_row, stop))
        return np.array(ranges, np.int64).reshape(-1, 2)

    def save(self) -> None:
        """Write the list; its files are named relative to its folder, so that data and list can move together."""
        target = os.path.realpath(self.path)
        relative = partial(os.path.relpath, start=os.path.dirname(target))
        episodes = [{**vars(entry), "file": map_path(entry.file, relative)} for entry in self.entries]
        try:
            atomic_write(target, json.dumps({"version": EXCLUSIONS_VERSION, "episodes": episodes}, indent=1) + "\n")
        except OSError as error:
            remedy = "give a file in a folder you may write: --exclusion_list FILE"
            raise DataError(f"{self.path}: cannot be written ({first_line(error)}); {remedy}") from error


def hex_digest(digest: int) -> str:
    """A digest as text, 16 characters."""
    return f"{digest:016x}"


def load_exclusions(path: str | None, key: str = "data.exclude_episodes") -> ExclusionList | None:
    """The list behind a config key or flag, None where none is given. Raises `DataError` when it is malformed."""
    if path is None:
        return None
    where = f"{key}: {path}"
    missing = "write it with `paligemma-vla data check`, or give none"
    remedy = f"correct it, or delete it and {CHECK_AGAIN}"
    raw, folder = read_json(path, DataError, remedy, missing, where), os.path.dirname(os.path.realpath(path))

    def real(path: str) -> str:
        return os.path.realpath(os.path.join(folder, path))

    try:  # not as JSON, which has no names of files that are not UTF-8
        listed = TypeAdapter(_Listed).validate_python(raw)
        return ExclusionList(path, [replace(entry, file=map_path(entry.file, real)) for entry in listed.episodes])
    except ValueError as error:
        why = first_fault(error) if isinstance(error, ValidationError) else first_line(error)
        raise DataError(f"{where}: not a list of episodes to leave out ({why}); {remedy}") from error


def real_name(name: str) -> str:
    """The one name of a file, whatever links lead to it and whatever is selected of it."""
    prefix, form, location = find_format(name)
    file = location if form is None else form.selected(location)[0]
    return prefix + (file if is_url(file) else os.path.realpath(file))


def share_episodes(first: str, second: str) -> bool:
    """Whether two names of the same data may select an episode in common."""
    ranges = []
    for name in (first, second):
        _, form, location = find_format(name)
        start, stop = (None, None) if form is None else form.selected(location)[1:]
        ranges.append((start or 0, float("inf") if stop is None else stop))
    return max(start for start, _ in ranges) < min(stop for _, stop in ranges)


def find_copies(digests: Mapping[str, object]) -> list[tuple[str, str]]:
    """Files with the content of another one, and that one. digests: by name, see `EpisodeFile.digest`.

    It finds files that were copied, not episodes that were written again into other files.
    """
    first: dict[object, str] = {}
    pairs = [(name, first.setdefault(digest, name)) for name, digest in digests.items()]
    return [pair for pair in pairs if len({*map(real_name, pair)}) == 2 and share_episodes(*pair)]


def map_path(name: str, change: Callable[[str], str]) -> str:
    """A name with its path changed; a URL means the same from anywhere."""
    prefix, _, location = find_format(name)
    return prefix + (location if is_url(location) else change(location))
