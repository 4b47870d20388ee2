"""Rows of indexed episode files: on demand through a bounded cache, or as a stream of numbers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.faults import (
    FaultError,
    Unusable,
    located,
    number_faults,
    prompt_of,
    raise_first,
    to_matrix,
    unreadable_group,
)
from paligemma_vla.data.formats import READ_ERRORS, EpisodeFile, Pictures, depth_faults, open_file, read_columns, reading
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, StorageError, UnreachableError, VLAError, first_line
from paligemma_vla.schema import Pixels, Rows

OPEN_FILES, FOOTER_BYTES = 64, 2**25  # files that are kept open, and about what their footers take
READING_THREADS = 4  # requests at a time of one loader process
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Picture:
    """One image of an episode. file, row, column: where it is stored, for messages."""

    pictures: Pictures
    number: int
    file: str
    row: int
    column: str

    def encoded(self) -> bytes | None:
        """As it is stored, when that is an encoded image of its own. Raises `FaultError`."""
        with located(self.file, self.row, self.column):
            return self.pictures.encoded(self.number)

    def frame(self) -> tuple[str, float] | None:
        """The video that it is a frame of, and its time there in s; None for an image of its own."""
        return self.pictures.frame(self.number)

    def decode(self, side: int = 0) -> Pixels:
        """As RGB (H, W, 3); side: of at least so many px, if it is smaller than it was taken; 0: as it was taken.
        Raises `FaultError`."""
        with located(self.file, self.row, self.column):
            return self.pictures.decode(self.number, side)


@dataclass(frozen=True)
class RowGroup:
    """Rows of a file that were read together, from row `first` on: state (R, P), action (R, A), prompts, images per camera
    (None: no such column).

    Rows of episodes that the index does not have may be of any content.
    """

    file: str
    first: int
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    prompt: pa.Array
    images: tuple[Pictures | None, ...]
    nbytes: int

    def instruction(self, number: int) -> str:
        """Of one row, counted from the first. Raises `FaultError` when there is none."""
        with located(self.file, self.first + number, schema.PROMPT):
            return prompt_of(self.prompt, number)

    def pictures(self, number: int) -> list[Picture | None]:
        """Of one row, counted from the first: one for each camera, None where it is absent."""
        return [
            Picture(images, number, self.file, self.first + number, schema.image_column(camera))
            if images is not None and images.present(number)
            else None
            for camera, images in enumerate(self.images, start=1)
        ]


@dataclass(frozen=True)
class Blocks:
    """Runs of consecutive whole episodes of a file, each read by one request: of K blocks, in the order of the index,

    episodes: number of each block's first episode, and the number of episodes (K + 1,). samples: its first sample, and the
    number of samples (K + 1,). nbytes: about what reading it takes, in whole row groups (K,).
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


def cut_blocks(index: EpisodeIndex, block_bytes: float) -> Blocks:
    """Cut the episodes of an index where each file passes a multiple of about `block_bytes`.

    A file is taken to be equally dense, so that the index has all that the cuts depend on. An episode belongs to where it
    begins: one that is longer than a block is a block of its own.
    """
    rows, size = np.diff(index.row_offsets), index.stamps[:, 0]
    pieces = np.maximum(1, np.round(size / block_bytes)).astype(np.int64)
    piece = index.start * pieces[index.file] // rows[index.file]
    begins = np.ones(len(index), bool)
    begins[1:] = (np.diff(index.file) != 0) | (np.diff(piece) != 0)
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(index)) - 1
    file = index.file[first]
    # Row groups of all files on one line, so that one search serves them all.
    offsets = index.row_offsets[:-1]
    groups = index.groups + np.repeat(offsets, np.diff(index.group_offsets))
    begin = np.searchsorted(groups, offsets[file] + index.start[first], side="right") - 1
    end = np.searchsorted(groups, offsets[file] + index.start[last] + index.length[last] - 1, side="right")
    nbytes = np.ceil((groups[end] - groups[begin]) * (size / rows)[file]).astype(np.int64)
    episodes = np.append(first, len(index))
    steps = np.concatenate([[0], np.cumsum(index.length, dtype=np.int64)])
    return Blocks(episodes, steps[episodes], nbytes)


def streaming_cache_bytes(blocks: Blocks, slots: int, window: int, ahead: int) -> int:
    """Memory for the blocks of so many slots of a batch that are read `ahead` steps before their need, and for open files.

    Of each slot a window of blocks, another one, and what it takes in those steps, twice: blocks leave the cache when they
    were not used for longest, so used ones leave only after those that were read ahead. And room for a slot to be in two
    windows, with a block of any size.
    """
    each = window + 1 + 2 * ahead * len(blocks) / blocks.samples[-1]
    return int(blocks.nbytes.mean() * (slots * each + window) + blocks.nbytes.max()) + FOOTER_BYTES


Block = dict[int, RowGroup]  # by number of the row group in its file


class EpisodeReader:
    """Read rows on demand, through a cache of blocks (images still compressed) and open files of `cache_bytes` together.

    A block is what is read at a time: one row group, or with `blocks`, for an object store, a run of episodes by one request.
    `prefetch` reads blocks ahead in a few threads. What goes wrong there is raised where the block is needed.
    Made to be sent to loader processes: what is cached stays behind. Its threads end with `close`, or with the process.
    """

    def __init__(self, index: EpisodeIndex, cameras: int, cache_bytes: int, blocks: Blocks | None = None) -> None:
        self.index, self.cameras, self.cache_bytes, self.blocks = index, cameras, cache_bytes, blocks
        if blocks is not None:
            first = blocks.episodes[:-1]
            self._begins = index.row_offsets[index.file[first]] + index.start[first]
        self._reset()

    def _reset(self) -> None:
        self._files = _OpenFiles(self.index, ranges=self.blocks is not None)
        self._videos = VideoDecoders()
        # A block that was read or is being read ahead, and what it takes or is expected to.
        self._cache: OrderedDict[int, tuple[int, Block | AsyncResult[Block]]] = OrderedDict()
        self._cached_bytes = 0
        self._threads: ThreadPool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index, self.cameras, self.cache_bytes, self.blocks)

    def group_of(self, file: int, row: int) -> tuple[RowGroup, int]:
        """The row group that holds a row of a file, and the row's number in it. Raises `DataError` or `StorageError`."""
        bounds = self.index.row_groups(file)
        group = int(np.searchsorted(bounds, row, side="right")) - 1
        if self.blocks is None:
            block = int(self.index.group_offsets[file]) + group
        else:
            block = int(np.searchsorted(self._begins, self.index.row_offsets[file] + row, side="right")) - 1
        return self._block(block)[group], row - int(bounds[group])

    def actions(self, file: int, start: int, stop: int) -> NDArray[np.float32]:
        """Actions of rows [start, stop) of a file: (stop - start, A)."""
        parts = []
        while start < stop:
            group, row = self.group_of(file, start)
            parts.append(group.action[row : row + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begin to read blocks that will be needed, the soonest first; those that are there stay longer."""
        assert self.blocks is not None
        # Daemons: an executor's threads would be waited for at exit, and a request to a store may take minutes to fail.
        self._threads = self._threads or ThreadPool(READING_THREADS, _name_thread)
        for block in blocks:
            if block in self._cache:
                self._cache.move_to_end(block)
            else:
                expected = int(self.blocks.nbytes[block])
                self._insert(block, expected, {})  # first, since a block that has been dropped is not read ahead
                self._cache[block] = expected, self._threads.apply_async(self._read_ahead, (block,))

    def close(self) -> None:
        """Give up what is being read ahead, and what is cached. The reader can be used again."""
        self._cache.clear()
        if self._threads is not None:
            self._threads.terminate()
        self._reset()

    def _block(self, number: int) -> Block:
        """The row groups of a block."""
        _, block = self._cache.get(number, (0, None))
        if not isinstance(block, dict):
            try:
                block = self._read(number) if block is None else block.get()
            finally:
                self._drop(number)  # no error is kept: whoever needs the block next reads it again
            self._insert(number, sum(group.nbytes for group in block.values()), block)
        self._cache.move_to_end(number)
        return block

    def _insert(self, number: int, nbytes: int, block: Block) -> None:
        self._cache[number] = nbytes, block
        self._cached_bytes += nbytes
        self._make_room()

    def _make_room(self) -> None:
        while self._cached_bytes + self._files.nbytes > self.cache_bytes and len(self._cache) > 1:
            self._drop(next(iter(self._cache)))

    def _drop(self, number: int) -> None:
        self._cached_bytes -= self._cache.pop(number, (0, None))[0]

    def _read_ahead(self, block: int) -> Block:
        return self._read(block) if block in self._cache else {}  # nobody asks for a block that has been dropped

    def _read(self, block: int) -> Block:
        """Read a block; may be called from any thread."""
        file, groups = self._groups(block)
        images = [schema.image_column(n + 1) for n in range(self.cameras)]
        read, group, located = {}, groups[0], {}
        try:
            source = self._files.open(file)
            if self.blocks is None:  # random order wants few of a row group's images, a stream all of them
                check = partial(self.index.check_unchanged, file)
                located = {name: source.locate(name, group, check) for name in images if name in source.columns}
            columns = [schema.STATE, schema.ACTION, schema.PROMPT, *(name for name in images if located.get(name) is None)]
            tables = source.read_groups([name for name in columns if name in source.columns], groups)
            for group in groups:
                read[group] = self._row_group(file, group, next(tables).combine_chunks(), located, source)
            # After reading: what was read before a change is what was indexed.
            self.index.check_unchanged(file, source.identity)
        except UnreachableError:
            raise  # the store has been asked often enough
        except (DataError, StorageError, *READ_ERRORS) as error:
            self.index.check_unchanged(file)  # that the file has changed is the better explanation
            if isinstance(error, VLAError):
                raise
            bounds = self.index.row_groups(file)
            raise FaultError(unreadable_group(self.index.paths[file], group, bounds, first_line(error))) from error
        return read

    def _groups(self, block: int) -> tuple[int, list[int]]:
        """File of a block, and the row groups that hold a row of its episodes."""
        if self.blocks is None:
            file = int(np.searchsorted(self.index.group_offsets, block, side="right")) - 1
            return file, [block - int(self.index.group_offsets[file])]
        episodes = slice(*self.blocks.episodes[block : block + 2].tolist())
        file, start = int(self.index.file[episodes.start]), self.index.start[episodes]
        ends = (start, start + self.index.length[episodes] - 1)
        first, last = (np.searchsorted(self.index.row_groups(file), rows, side="right") - 1 for rows in ends)
        groups = np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)])
        return file, np.unique(groups).tolist()

    def _row_group(
        self, file: int, group: int, table: pa.Table, located: Mapping[str, Pictures | None], source: EpisodeFile
    ) -> RowGroup:
        """located: images of cameras that the table has not, since they are read one by one."""
        index, bounds = self.index, self.index.row_groups(file)
        if table.num_rows != bounds[group + 1] - bounds[group]:
            raise FaultError(unreadable_group(index.paths[file], group, bounds, f"got {table.num_rows} rows"))
        arrays = {name: table[name].combine_chunks() for name in table.column_names}
        images = [schema.image_column(n + 1) for n in range(self.cameras)]
        pictures = tuple(
            source.pictures(arrays[name], self._videos) if name in arrays else located.get(name) for name in images
        )
        rows = np.arange(bounds[group], bounds[group + 1])
        return RowGroup(
            file=index.paths[file],
            first=int(bounds[group]),
            state=_numbers(index, file, schema.STATE, arrays[schema.STATE], rows),
            action=_numbers(index, file, schema.ACTION, arrays[schema.ACTION], rows),
            prompt=arrays[schema.PROMPT],
            images=pictures,
            nbytes=table.nbytes + sum(one.nbytes for one in pictures if one is not None),
        )


def _numbers(index: EpisodeIndex, file: int, name: str, column: pa.Array, rows: Rows) -> NDArray[np.float32]:
    """A list column of some rows of a file (R, dimension); raises `FaultError` for a bad row of an episode of the index."""
    values = to_matrix(column, index.layout.state_dim if name == schema.STATE else index.layout.action_dim)
    if not np.isfinite(values).all():
        own = np.flatnonzero(index.has_rows(file, rows))
        raise_first(number_faults(index.paths[file], name, column.take(pa.array(own)), values[own], rows[own]))
    return values


class _Entry:
    """A file that is opened when it is first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.file: EpisodeFile | None = None


class _OpenFiles:
    """The OPEN_FILES files that were used last, for several threads. The others are closed when nobody uses them any more."""

    def __init__(self, index: EpisodeIndex, ranges: bool) -> None:
        self.index, self.ranges = index, ranges
        self._lock = threading.Lock()
        self._entries: OrderedDict[int, _Entry] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        with self._lock:
            return sum(entry.file.nbytes for entry in self._entries.values() if entry.file is not None)

    def open(self, file: int) -> EpisodeFile:
        with self._lock:
            entry = self._entries.setdefault(file, _Entry())
            self._entries.move_to_end(file)
            if len(self._entries) > OPEN_FILES:
                self._entries.popitem(last=False)
        with entry.lock:
            if entry.file is None:
                entry.file = open_file(self.index.paths[file], ranges=self.ranges)
            return entry.file


def _name_thread() -> None:
    threading.current_thread().name = "reads ahead"


def iterate_numbers(
    index: EpisodeIndex, file: int, rows: int = 65536
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Stream (state (R, P), action (R, A)) of a file's episodes, reading no other column.

    Row groups without a row of them are not read: they may be unreadable. Raises `DataError` for a file that is not the one
    that was indexed.
    """
    bounds, columns = index.row_groups(file), [schema.STATE, schema.ACTION]
    wanted = index.has_rows(file, np.arange(bounds[-1]))
    groups = [group for group in range(len(bounds) - 1) if wanted[bounds[group] : bounds[group + 1]].any()]
    with open_file(index.paths[file], stream=True) as source:
        with reading(source.path, columns):
            for here, batch in source.batches(columns, groups, rows):
                state, action = (_numbers(index, file, name, batch[name], here) for name in columns)
                yield state[wanted[here]], action[wanted[here]]
        index.check_unchanged(file, source.identity)


def check_cameras(index: EpisodeIndex, cameras: Sequence[int]) -> None:
    """Raise `FaultError` when one of some cameras (numbers, from 0) gives depth maps, by the first images of the index."""
    path, start = index.paths[index.file[0]], int(index.start[0])
    with open_file(path, stream=True) as file:
        columns = [name for name in map(schema.image_column, np.add(cameras, 1).tolist()) if name in file.columns]
        raise_first(depth_faults(file, columns, int(np.searchsorted(file.bounds, start, side="right")) - 1))


def episode_prompts(index: EpisodeIndex, file: int) -> list[list[str]]:
    """Different instructions of each episode of a file, in the order of their first rows. Raises `DataError`.

    An instruction that is missing, empty or not UTF-8 is an empty text.
    """
    with open_file(index.paths[file]) as source:
        column = read_columns(source, [schema.PROMPT])[schema.PROMPT].combine_chunks().dictionary_encode()
    codes, found = column.indices.fill_null(-1).to_numpy(), []
    texts = [*(_prompt_or_none(column.dictionary, number) for number in range(len(column.dictionary))), ""]  # null is -1
    for start, length in zip(*(values[index.file == file].tolist() for values in (index.start, index.length)), strict=True):
        different, first = np.unique(codes[start : start + length], return_index=True)
        found.append(list(dict.fromkeys(texts[code] for code in different[np.argsort(first)].tolist())))
    return found


def _prompt_or_none(column: pa.Array, row: int) -> str:
    try:
        return prompt_of(column, row)
    except Unusable:
        return ""


def instructions(index: EpisodeIndex) -> list[str]:
    """Different instructions of all steps of an index, in the order of their first occurrence. Raises `DataError`."""
    files = np.unique(index.file).tolist()
    return list(dict.fromkeys(text for file in files for texts in episode_prompts(index, file) for text in texts))
