"""Rows of indexed episode files: on demand, block by block, as a stream of numbers, or as whole episodes."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from paligemma_vla import schema
from paligemma_vla.data.faults import (
    Fault,
    FaultError,
    Kind,
    Unusable,
    file_faults,
    number_faults,
    prompt_of,
    raise_first,
    to_matrix,
    unreadable_group,
)
from paligemma_vla.data.formats import READ_ERRORS, EpisodeFile, Pictures, RecentIdentity, open_file, read_columns
from paligemma_vla.data.formats.parquet import FOOTER_TAIL, EncodedPictures, column_ranges, open_parquet
from paligemma_vla.data.index import EpisodeIndex, read_flags
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, StorageError, UnreachableError, VLAError, first_line
from paligemma_vla.schema import Rows
from paligemma_vla.storage import ByteSource, CachedSource, open_source

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


Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Of K blocks, in the order of the index.

    episodes: number of each block's first episode, and the number of episodes (K + 1,). samples: its first sample, and the
    number of samples (K + 1,). nbytes: about what reading it takes, whole row groups of the file that is (K,).
    """

    episodes: Numbers
    samples: Numbers
    nbytes: Numbers

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def sizes(self) -> Numbers:
        """Samples in each block (K,)."""
        return np.diff(self.samples)

    def of_samples(self, samples: Numbers) -> Numbers:
        """The blocks that hold some samples."""
        blocks: Numbers = np.searchsorted(self.samples, samples, side="right") - 1
        return blocks

    def of_episode(self, episode: int) -> int:
        """The block that holds an episode."""
        return int(np.searchsorted(self.episodes, episode, side="right")) - 1


def cut_blocks(index: EpisodeIndex, block_bytes: float) -> Blocks:
    """Cut the episodes of an index where each file passes a multiple of about `block_bytes`.

    A file is taken to be equally dense, so the cuts follow from sizes of files and rows of episodes, which the index has. An
    episode belongs to where it begins: episodes longer than a block are blocks of their own.
    """
    rows = index.groups[index.group_offsets[1:] - 1]
    size = index.stamps[:, 0]
    pieces = np.maximum(1, np.round(size / block_bytes)).astype(np.int64)
    piece = index.start * pieces[index.file] // rows[index.file]
    begins = np.ones(len(index), bool)
    begins[1:] = (np.diff(index.file) != 0) | (np.diff(piece) != 0)
    first = np.flatnonzero(begins)
    episodes = np.append(first, len(index))
    steps = np.concatenate([[0], np.cumsum(index.length, dtype=np.int64)])
    return Blocks(episodes, steps[episodes], _bytes_to_read(index, episodes, rows, size))


def _bytes_to_read(index: EpisodeIndex, episodes: Numbers, rows: Numbers, size: Numbers) -> Numbers:
    """Row groups that hold a row of a block, in bytes of a file that is equally dense."""
    first, last = episodes[:-1], episodes[1:] - 1
    file = index.file[first]
    before = np.concatenate([[0], np.cumsum(rows)])  # rows of the files before, so that one search serves all files
    groups = index.groups + np.repeat(before[:-1], np.diff(index.group_offsets))
    begin = np.searchsorted(groups, before[file] + index.start[first], side="right") - 1
    end = np.searchsorted(groups, before[file] + index.start[last] + index.length[last] - 1, side="right")
    nbytes: Numbers = np.ceil((groups[end] - groups[begin]) * (size / rows)[file]).astype(np.int64)
    return nbytes


def pool_bytes(blocks: Blocks, streams: int, window: int, ahead: int) -> int:
    """Memory for the blocks of so many streams (a slot that draws from a set) that are read `ahead` steps before their need.

    Of each stream a window of blocks, another one, and what it takes in those steps, twice: blocks leave the pool when they
    were not asked for longest, so what it has done with leaves only after what it has been promised. And room for a stream
    to be in two windows, with a block of any size.
    """
    each = window + 1 + 2 * ahead * len(blocks) / blocks.samples[-1]
    return int(blocks.nbytes.mean() * (streams * each + window) + blocks.nbytes.max())


FOOTER_BYTES = 2**26  # footers that are kept, as they are stored: unfolded they would take ten times as much
FOOTER_GUESS = 2**14, 2**10  # bytes of a footer, and for each row group: asked for at once, which is mostly enough


class _OpenFile:
    """A file with its footer. It is closed when nobody uses it."""

    def __init__(self) -> None:
        self.users = 0
        self.opening = threading.Lock()
        self.source: ByteSource | None = None
        self.footer = b""

    def open(self, path: str, guess: int) -> None:
        with file_faults(path):
            source = open_source(path)
            try:
                self.footer = _footer(source, guess)
            except BaseException:
                source.close()
                raise
        self.source, self.identity = source, RecentIdentity(path, source.identity)


class BlockFiles:
    """Reads row groups of the files of an index, from several threads. Keeps some files open, with their footers."""

    def __init__(self, index: EpisodeIndex, cameras: int) -> None:
        self.index, self.cameras = index, cameras
        self._lock = threading.Lock()
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._closed = False

    def read(self, file: int, groups: Sequence[int]) -> dict[int, pa.Table]:
        """Row groups of a file, with the columns that a sample is made of.

        Raises `DataError` when they cannot be read or the file has changed, `StorageError` when it cannot be reached.
        """
        path = self.index.paths[file]
        tables = {}
        with explaining(self.index, file, groups[0]), self._opened(file) as opened:
            assert opened.source is not None
            metadata = pq.read_metadata(pa.BufferReader(opened.footer))
            columns = columns_of(metadata.schema.to_arrow_schema().names, self.cameras)
            held = CachedSource(opened.source)
            held.expect(column_ranges(metadata, columns, groups))
            parquet = open_parquet(path, source=held, metadata=metadata)
            for group in groups:
                with explaining(self.index, file, group):
                    tables[group] = parquet.read_row_group(group, columns=columns, use_threads=False).combine_chunks()
            # After reading: what was read before a change is what was indexed.
            self.index.check_unchanged(file, opened.identity)
        return tables

    def close(self) -> None:
        """Close every file, those in use when they no longer are."""
        with self._lock:
            self._closed = True
            self._trim()

    @contextmanager
    def _opened(self, file: int) -> Iterator[_OpenFile]:
        with self._lock:
            entry = self._files.setdefault(file, _OpenFile())
            self._files.move_to_end(file)
            entry.users += 1
        try:
            with entry.opening:  # by the first that needs it
                if entry.source is None:
                    base, per_group = FOOTER_GUESS
                    entry.open(self.index.paths[file], base + per_group * len(self.index.row_groups(file)))
            yield entry
        finally:
            with self._lock:
                entry.users -= 1
                self._trim()

    def _trim(self) -> None:
        footers = sum(len(entry.footer) for entry in self._files.values())
        for file, entry in list(self._files.items()):
            if not self._closed and len(self._files) <= OPEN_FILES and footers <= FOOTER_BYTES:
                return
            if not entry.users:
                footers -= len(entry.footer)
                del self._files[file]
                if entry.source is not None:
                    entry.source.close()


def _footer(source: ByteSource, guess: int) -> bytes:
    """The end of a file: its footer, the footer's length, and the magic. guess: bytes to ask for first."""
    guess = min(source.size, guess)
    tail = source.read_at(source.size - guess, guess)
    length = int.from_bytes(tail[-FOOTER_TAIL:-4], "little") + FOOTER_TAIL
    if length > source.size:
        text = f"its footer is said to be of {length} bytes, of {source.size} in all; restore it"
        raise FaultError(Fault(source.location, Kind.FILE, text))
    return tail[-length:] if length <= guess else source.read_at(source.size - length, length)


READERS = 4  # threads, so requests at a time of one loader process
PARTING = 1.0  # seconds that requests under way may take to end when nobody needs them any more

Block = dict[int, Group]  # by number of the row group


@dataclass
class _Kept:
    """A block in the pool, or on its way. nbytes: what it takes; until it is there, what it is expected to."""

    future: Future[Block]
    nbytes: int
    there: bool = False


class BlockReader(RowReader):
    """Read rows on demand, a block at a time, and blocks ahead of demand. Images stay compressed.

    pool_bytes: what the blocks may take together; those not asked for longest make room. A block that was asked for ahead is
    waited for, not read again. What goes wrong with it is raised where it is needed, in the words of a direct read.
    Made to be sent to loader processes: what is read stays behind. Its threads end with `close`, or with the process.
    """

    def __init__(self, index: EpisodeIndex, blocks: Blocks, cameras: int, pool_bytes: int) -> None:
        self.index, self.blocks, self.cameras, self.pool_bytes = index, blocks, cameras, pool_bytes
        self._clear()

    def _clear(self) -> None:
        rows = self.index.groups[self.index.group_offsets[1:] - 1]
        self._before: Numbers = np.concatenate([[0], np.cumsum(rows)])  # rows of the files before each
        first = self.blocks.episodes[:-1]
        self._begin: Numbers = self._before[self.index.file[first]] + self.index.start[first]
        self._files = BlockFiles(self.index, self.cameras)
        self._threads = _Threads(READERS)
        self._pool: OrderedDict[int, _Kept] = OrderedDict()
        self._taken = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("index", "blocks", "cameras", "pool_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def group_of(self, file: int, row: int) -> tuple[Group, int]:
        block = int(np.searchsorted(self._begin, self._before[file] + row, side="right")) - 1
        starts = self.index.row_groups(file)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return self._need(block)[group], row - int(starts[group])

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begin to read blocks that will be needed, the soonest first; those that are there stay longer."""
        for block in blocks:
            if block in self._pool:
                self._pool.move_to_end(block)
            else:
                self._keep(block, self._threads.submit(partial(self._read, block)))

    def close(self) -> None:
        """Give up what is being read ahead, and what is kept. The reader can be used again."""
        self._threads.close()
        self._files.close()
        self._clear()

    def _need(self, block: int) -> Block:
        kept = self._pool.get(block)
        if kept is None:
            future: Future[Block] = Future()
            future.set_result(self._read(block))
            kept = self._keep(block, future)
        if kept.there:
            self._pool.move_to_end(block)
            return kept.future.result()
        try:
            read = kept.future.result()
        except BaseException:
            self._drop(block)  # the next that needs it reads it again
            raise
        nbytes = sum(group.nbytes for group in read.values())
        self._taken += nbytes - kept.nbytes
        kept.nbytes, kept.there = nbytes, True
        self._pool.move_to_end(block)
        self._make_room()
        return read

    def _keep(self, block: int, future: Future[Block]) -> _Kept:
        kept = self._pool[block] = _Kept(future, int(self.blocks.nbytes[block]))
        self._taken += kept.nbytes
        self._make_room()
        return kept

    def _make_room(self) -> None:
        while self._taken > self.pool_bytes and len(self._pool) > 1:
            self._drop(next(iter(self._pool)))

    def _drop(self, block: int) -> None:
        kept = self._pool.pop(block)
        self._taken -= kept.nbytes
        kept.future.cancel()

    def _read(self, block: int) -> Block:
        episodes = slice(*self.blocks.episodes[block : block + 2].tolist())
        file = int(self.index.file[episodes.start])
        starts = self.index.row_groups(file)
        first, last = self.index.start[episodes], self.index.start[episodes] + self.index.length[episodes] - 1
        begin, end = (np.searchsorted(starts, rows, side="right") - 1 for rows in (first, last))
        groups = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(begin, end, strict=True)])).tolist()
        return {
            group: make_group(self.index, file, group, self.cameras, table, EncodedPictures)
            for group, table in self._files.read(file, groups).items()
        }


class _Threads:
    """A few threads that take jobs in order. They do not keep the process from ending, whatever they wait for."""

    def __init__(self, count: int) -> None:
        self._jobs: SimpleQueue[tuple[Future[Block], Callable[[], Block]] | None] = SimpleQueue()
        self._threads = [
            Thread(target=_work, args=(self._jobs,), name=f"reads ahead {number}", daemon=True) for number in range(count)
        ]

    def submit(self, job: Callable[[], Block]) -> Future[Block]:
        if self._threads[0].ident is None:
            for thread in self._threads:
                thread.start()
        future: Future[Block] = Future()
        self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """Cancel the jobs that no thread has taken; the threads end after those they have, which is waited for a moment."""
        with suppress(Empty):
            while True:
                if (waiting := self._jobs.get_nowait()) is not None:
                    waiting[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + PARTING
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))


def _work(jobs: SimpleQueue[tuple[Future[Block], Callable[[], Block]] | None]) -> None:
    while (taken := jobs.get()) is not None:
        future, job = taken
        if future.set_running_or_notify_cancel():
            try:
                result = job()
            except BaseException as error:  # of any kind: it is raised where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del taken, future, job  # or a thread that waits would keep what it read last


CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Picture:
    """One image of an episode. file, row, column: where it lies, for messages."""

    pictures: Pictures
    place: int
    file: str
    row: int
    column: str

    def encoded(self) -> bytes | None:
        """As it is stored, when that is an encoded image of its own. Raises `FaultError`."""
        try:
            return self.pictures.encoded(self.place)
        except Unusable as error:
            raise FaultError(error.at(self.file, self.row, self.column)) from error

    def decode(self) -> Image.Image:
        """As RGB. Raises `FaultError`."""
        try:
            return self.pictures.decode(self.place)
        except Unusable as error:
            raise FaultError(error.at(self.file, self.row, self.column)) from error


@dataclass(frozen=True)
class Recording:
    """One episode of L steps: state (L, P), action (L, A), an instruction per step, images per camera and step.

    file, row: where its first step lies, for messages. An image is None where the camera is absent.
    """

    file: str
    row: int
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    prompts: list[str]
    images: list[list[Picture | None]]
    is_terminal: bool

    @property
    def length(self) -> int:
        return len(self.action)

    def where(self, step: int = 0) -> str:
        """File and row of a step."""
        return f"{self.file}: row {self.row + step}"


class Recordings:
    """The episodes of an index. cameras: numbers, from 0, of those that are wanted."""

    def __init__(self, index: EpisodeIndex, cameras: Sequence[int]) -> None:
        self.index, self.cameras = index, tuple(cameras)
        self.reader = EpisodeReader(index, max(cameras) + 1, CACHE_BYTES)
        self._terminal = lru_cache(maxsize=16)(self._terminal_rows)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, episode: int) -> Recording:
        """One episode; images are decoded when they are asked for. Raises `DataError` naming file, row and column."""
        index = self.index
        file, start, length = (int(values[episode]) for values in (index.file, index.start, index.length))
        path = index.paths[file]
        states, prompts = [], []
        images: list[list[Picture | None]] = [[] for _ in self.cameras]
        for row in range(start, start + length):
            rows, place = self.reader.group_of(file, row)
            states.append(rows.state[place])
            try:
                prompts.append(prompt_of(rows.prompt, place))
            except Unusable as error:
                raise FaultError(error.at(path, row, schema.PROMPT)) from error
            for camera, found in zip(self.cameras, images, strict=True):
                pictures = rows.images[camera]
                there = pictures is not None and pictures.present(place)
                column = schema.image_column(camera + 1)
                found.append(Picture(pictures, place, path, row, column) if pictures is not None and there else None)
        return Recording(
            file=path,
            row=start,
            state=np.stack(states),
            action=self.reader.actions(file, start, start + length),
            prompts=prompts,
            images=images,
            is_terminal=start + length - 1 in self._terminal(file),
        )

    def instructions(self) -> list[str]:
        """Different instructions of all steps, in the order of their first occurrence. Raises `DataError`."""
        found: dict[str, None] = {}
        for file in np.unique(self.index.file).tolist():
            for text in self._file_instructions(file):
                found.setdefault(text)
        return list(found)

    def _file_instructions(self, file: int) -> list[str]:
        path = self.index.paths[file]
        with open_file(path) as episodes:
            column = episodes.read([schema.PROMPT])[schema.PROMPT].combine_chunks()
        rows = np.flatnonzero(self.index.holds(file, np.arange(len(column)))).tolist()
        texts: dict[str, None] = {}
        for row in rows:
            try:
                texts.setdefault(prompt_of(column, row))
            except Unusable as error:
                raise FaultError(error.at(path, row, schema.PROMPT)) from error
        return list(texts)

    def _terminal_rows(self, file: int) -> frozenset[int]:
        with open_file(self.index.paths[file]) as episodes:
            return frozenset(read_flags(episodes).terminal.tolist())
