"""Rows of indexed files, block by block: each block comes with one request, and stays as long as it is drawn from."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from paligemma_vla.data.block_files import BlockFiles
from paligemma_vla.data.blocks import Blocks, Numbers
from paligemma_vla.data.episode_file import EncodedPictures
from paligemma_vla.data.episodes import EpisodeIndex
from paligemma_vla.data.reader import Group, RowReader, make_group

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
