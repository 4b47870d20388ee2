"""Index of episode files: which rows are an episode, which row group holds a row.

Built from footers and flags (`files.py`, `flags.py`), kept between runs (`index_cache.py`); `reader.py` reads rows.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.byte_source import Listed
from paligemma_vla.data.exclusions import NOTHING, ExclusionList
from paligemma_vla.data.faults import FaultError, raise_first
from paligemma_vla.data.files import Layout, Rows, joint_layout, robot_faults
from paligemma_vla.data.flags import chain_faults, segment
from paligemma_vla.data.index_cache import FileFacts, cache_path, is_settled, load_facts, read_facts, save_facts
from paligemma_vla.data.remote_files import COPY_IT, files_behind
from paligemma_vla.data.sources import absolute_name, find_source, foreign_format, identify_file
from paligemma_vla.errors import DataError
from paligemma_vla.storage import is_url

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
        prefix, source, place = find_source(path)
        if source is not None:
            if is_url(place):
                raise DataError(f"{where}: {path}: data of another format is read from a disk only; {COPY_IT}")
            files: dict[str, Listed] = dict.fromkeys(prefix + file for file in source.files(place, where))
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

    def row_groups(self, file: int) -> Rows:
        """First row of each row group of a file, and its number of rows at the end."""
        return self.groups[self.group_offsets[file] : self.group_offsets[file + 1]]

    def holds(self, file: int, rows: Rows) -> NDArray[np.bool_]:
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
