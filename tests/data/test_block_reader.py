"""Reading block by block: the same rows as one by one, each block by one request, in bounded memory, ahead of need."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from episode_files import columns, write

from paligemma_vla.data import reader as reader_module
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import BlockFiles, BlockReader, Blocks, EpisodeReader, RowReader, cut_blocks, pool_bytes
from paligemma_vla.errors import DataError
from paligemma_vla.storage import GAP_BYTES, LocalSource
from support import write_episodes

LENGTHS = (20, 33, 5, 40, 12, 28, 61, 7, 19, 30, 2, 44)
SMALL = 2e4  # bytes of a block: some episodes of LENGTHS
Reads = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocks")
    write_episodes(path, LENGTHS, cameras=2, per_file=5)
    return path


@pytest.fixture
def index(folder: Path) -> EpisodeIndex:
    return EpisodeIndex.build(str(folder))


def reader_of(index: EpisodeIndex, pool: int = 2**30, size: float = SMALL, cameras: int = 2) -> BlockReader:
    return BlockReader(index, cut_blocks(index, size), cameras, pool)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Every request there was: file, offset, bytes."""
    seen: Reads = []
    read = LocalSource._read

    def noted(self: LocalSource, offset: int, count: int) -> bytes:
        seen.append((self.location, offset, count))
        return read(self, offset, count)

    monkeypatch.setattr(LocalSource, "_read", noted)
    return seen


def row_content(reader: RowReader, file: int, row: int) -> list[object]:
    group, place = reader.group_of(file, row)
    images = [i.encoded(place) if i is not None and i.present(place) else None for i in group.images]
    return [group.state[place].tolist(), group.action[place].tolist(), group.prompt[place].as_py(), images]


def held_rows(index: EpisodeIndex) -> Iterator[tuple[int, int]]:
    for file, start, length in zip(index.file.tolist(), index.start.tolist(), index.length.tolist(), strict=True):
        yield from ((file, start + step) for step in range(length))


@pytest.mark.parametrize("size", [1.0, SMALL, 1e9])
def test_blocks_are_runs_of_whole_episodes_of_a_file(index: EpisodeIndex, size: float) -> None:
    blocks = cut_blocks(index, size)
    assert blocks.episodes[0] == 0
    assert blocks.episodes[-1] == len(index)
    assert blocks.samples[-1] == index.steps
    assert (np.diff(blocks.episodes) > 0).all()
    first_samples = np.cumsum(index.length) - index.length
    for number, (first, stop) in enumerate(itertools.pairwise(blocks.episodes.tolist())):
        assert len(set(index.file[first:stop].tolist())) == 1
        assert blocks.sizes[number] == index.length[first:stop].sum()
        assert blocks.samples[number] == first_samples[first]
        assert blocks.of_samples(np.arange(blocks.samples[number], blocks.samples[number + 1])).tolist() == [number] * int(
            blocks.sizes[number]
        )
    assert len(blocks) == {1.0: len(LENGTHS), 1e9: 3}.get(size, len(blocks))


def test_blocks_are_of_about_the_size_asked_for(tmp_path: Path) -> None:
    write_episodes(tmp_path, (6,) * 60, per_file=60)
    index = EpisodeIndex.build(str(tmp_path))
    size = int(index.stamps[0, 0])
    for pieces in (1, 3, 7, 20):
        blocks = cut_blocks(index, size / pieces)
        assert len(blocks) == pieces
        assert blocks.sizes.max() - blocks.sizes.min() <= 6


@pytest.mark.parametrize("chosen", [slice(None), [0, 1, 3, 4, 9, 11]])
def test_bytes_to_read_are_those_of_the_row_groups(index: EpisodeIndex, chosen: slice | list[int]) -> None:
    index = index.select(np.arange(len(index))[chosen])
    blocks = cut_blocks(index, SMALL)
    for number, (first, stop) in enumerate(itertools.pairwise(blocks.episodes.tolist())):
        file, bounds = int(index.file[first]), index.row_groups(int(index.file[first])).tolist()
        low, high = int(index.start[first]), int(index.start[stop - 1] + index.length[stop - 1])
        rows = min(b for b in bounds if b >= high) - max(b for b in bounds if b <= low)
        assert blocks.nbytes[number] == np.ceil(rows * (index.stamps[file, 0] / bounds[-1]))
    each = 5 + 32 / blocks.sizes.mean()
    assert pool_bytes(blocks, 3, 4, 16) == pytest.approx(blocks.nbytes.mean() * (3 * each + 4) + blocks.nbytes.max(), abs=1)


@pytest.mark.parametrize("size", [1.0, SMALL, 1e9])
@pytest.mark.parametrize("pool", [1, 2**30])
def test_rows_are_those_of_the_other_reader(index: EpisodeIndex, size: float, pool: int) -> None:
    index = index.select(np.delete(np.arange(len(index)), [2, 6, 7]))  # held out, so blocks have holes
    expected, got = EpisodeReader(index, 2, 2**30), reader_of(index, pool, size)
    for file, row in np.random.default_rng(0).permutation(list(held_rows(index))).tolist():
        assert row_content(got, file, row) == row_content(expected, file, row)
    for file, start, length in zip(index.file.tolist(), index.start.tolist(), index.length.tolist(), strict=True):
        np.testing.assert_array_equal(got.actions(file, start, start + length), expected.actions(file, start, start + length))


@pytest.mark.parametrize("ahead", [False, True])
def test_each_block_and_each_footer_is_one_request(index: EpisodeIndex, reads: Reads, ahead: bool) -> None:
    reader = reader_of(index)
    reads.clear()
    if ahead:
        reader.prefetch(range(len(reader.blocks)))
    for file, row in np.random.default_rng(0).permutation(list(held_rows(index))).tolist():
        reader.group_of(file, row)
    sizes = dict(zip(index.paths, index.stamps[:, 0].tolist(), strict=True))
    footers = [read for read in reads if read[1] + read[2] == sizes[read[0]]]
    assert len(footers) == len(index.paths) == 3
    assert len(reads) == len(footers) + len(reader.blocks)
    assert len(set(reads)) == len(reads)
    reader.close()


def test_rows_that_no_episode_needs_are_not_asked_for(folder: Path, reads: Reads) -> None:
    whole = EpisodeIndex.build(str(folder))
    index = whole.select(np.array([0]))
    reads.clear()
    reader_of(index).group_of(0, 3)
    (read,) = [read for read in reads if read[1] < 1000]
    footer = pq.read_metadata(index.paths[0])
    chunks = [footer.row_group(0).column(n) for n in range(footer.num_columns)]
    wanted = [chunk.total_compressed_size for chunk in chunks if not chunk.path_in_schema.startswith("is_")]
    assert read[1:] == (4, sum(wanted))


@pytest.mark.parametrize("picture", [2**17, 2**15])
def test_what_is_large_and_not_wanted_is_left_out(tmp_path: Path, reads: Reads, picture: int) -> None:
    content = columns((20, 20))
    for name, size in (("depth", picture), ("note", 2**10)):
        content[name] = [os.urandom(size) for _ in range(40)]
    content = {name: content[name] for name in ("state", "note", "action", "depth", "image_1_bytes", *content)}
    path = write(tmp_path / "x.parquet", content, row_group_size=10, compression="none")
    reader = reader_of(EpisodeIndex.build(path), cameras=1, size=1)
    reads.clear()
    reader.group_of(0, 3)
    blocks = sorted(read[1:] for read in reads)[:-1]  # the footer is the last
    if 10 * picture < GAP_BYTES:
        assert len(blocks) == 1
        return
    assert len(blocks) == 3  # before, between and after the depth of two row groups
    depth = pq.read_metadata(path).row_group(0).column(3)
    assert depth.path_in_schema == "depth"
    assert blocks[0][0] == 4
    assert blocks[1][0] == depth.dictionary_page_offset + depth.total_compressed_size
    assert 20 * 2**10 < sum(count for _, count in blocks) < 2**17


def test_pool_stays_within_its_bound_and_what_left_it_is_read_again(index: EpisodeIndex, reads: Reads) -> None:
    blocks = cut_blocks(index, SMALL)
    bound = int(np.sort(blocks.nbytes)[-3:].sum())
    reader, expected = BlockReader(index, blocks, 2, bound), EpisodeReader(index, 2, 2**30)
    for number, (file, row) in enumerate(np.random.default_rng(0).permutation(list(held_rows(index))).tolist()):
        if number % 3 == 0:
            reader.prefetch([number % len(blocks)])
        assert row_content(reader, file, row) == row_content(expected, file, row)
        assert reader._taken == sum(kept.nbytes for kept in reader._pool.values())
        assert reader._taken <= bound
    assert len(reads) > 2 * len(blocks)
    for kept in reader._pool.values():
        if kept.there:
            assert kept.nbytes == sum(group.nbytes for group in kept.future.result().values())
    reader.close()


def test_what_was_announced_stays_and_what_was_not_asked_for_longest_makes_room(
    index: EpisodeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(index)
    assert len(reader.blocks) > 6
    for block in (0, 1, 2):
        reader._need(block)
    large = max(int(reader.blocks.nbytes[3]), sum(group.nbytes for group in reader._read(3).values()))
    reader.pool_bytes = reader._taken + large - 1
    reader.prefetch([0])
    reader._need(3)
    assert list(reader._pool) == [2, 0, 3]
    waiting: list[Future[Any]] = []
    monkeypatch.setattr(reader._threads, "submit", lambda _: waiting.append(Future()) or waiting[-1])
    reader.pool_bytes = 1
    reader.prefetch([4, 5])
    assert list(reader._pool) == [5]
    assert [future.cancelled() for future in waiting] == [True, False]


class Gate:
    """Holds back every read until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.asked = threading.Event(), Counter[int]()
        read = BlockReader._read

        def held(reader: BlockReader, block: int) -> object:
            self.asked[block] += 1
            assert self.open.wait(10)
            return read(reader, block)

        patch.setattr(BlockReader, "_read", held)


def test_a_block_on_its_way_is_waited_for(index: EpisodeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, reader = Gate(monkeypatch), reader_of(index)
    reader.prefetch([0, 1])
    reader.prefetch([1, 0, 2])
    threading.Timer(0.05, gate.open.set).start()
    began = time.monotonic()
    reader.group_of(0, 0)
    assert time.monotonic() - began >= 0.04
    for block in range(3):
        reader._need(block)
    assert gate.asked == {0: 1, 1: 1, 2: 1}
    reader.close()


def test_threads_end_with_the_reader_and_leave_waiting_work(index: EpisodeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def alive() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("reads ahead")]

    monkeypatch.setattr(reader_module, "PARTING", 0.05)
    before = len(alive())
    descriptors = len(os.listdir("/proc/self/fd"))
    gate, reader = Gate(monkeypatch), reader_of(index)
    reader.prefetch(range(len(reader.blocks)))
    assert all(thread.daemon for thread in alive())
    while len(gate.asked) < 4:
        time.sleep(0.001)
    reader.close()
    gate.open.set()
    deadline = time.monotonic() + 5
    while len(alive()) > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(alive()) == before
    assert len(gate.asked) == 4  # those that had been begun
    reader.group_of(0, 0)  # it can go on
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_what_is_sent_to_a_worker_is_the_index_and_the_blocks(index: EpisodeIndex) -> None:
    reader = reader_of(index)
    empty = len(pickle.dumps(reader))
    reader.prefetch(range(len(reader.blocks)))
    reader.group_of(0, 0)
    content = pickle.dumps(reader)
    assert len(content) == empty
    assert row_content(pickle.loads(content), 1, 3) == row_content(reader, 1, 3)  # noqa: S301 - what a worker gets
    reader.close()


def flip(path: Path, group: int) -> None:
    """Another bit in the pictures of a row group; size and dates stay."""
    footer, status = pq.read_metadata(path), path.stat()
    chunk = footer.row_group(group).column(0)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_damaged_block_is_told_where_it_is_needed_in_the_words_of_the_other_reader(tmp_path: Path, ahead: bool) -> None:
    write_episodes(tmp_path, LENGTHS, cameras=2, per_file=5)
    index = EpisodeIndex.build(str(tmp_path))
    flip(Path(index.paths[1]), 2)
    reader = reader_of(index)
    if ahead:
        reader.prefetch(range(len(reader.blocks)))
    with pytest.raises(DataError) as expected:
        EpisodeReader(index, 2, 2**20).group_of(1, 70)
    assert "row 60: row group 2 (rows 60 to 88) cannot be read" in str(expected.value)
    reader.group_of(0, 0)
    reader.group_of(2, 5)
    for _ in range(2):  # also when it is tried again
        with pytest.raises(DataError, match=re.escape(str(expected.value))):
            reader.group_of(1, 70)
    reader.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_reading_goes_on_with_a_file_that_was_put_back(tmp_path: Path, ahead: bool) -> None:
    path = tmp_path / "x.parquet"
    write(path, columns(), row_group_size=4)
    reader = reader_of(EpisodeIndex.build(str(path)), size=1, cameras=1)
    path.rename(tmp_path / "aside")
    if ahead:
        reader.prefetch([0])
    with pytest.raises(DataError, match="gone"):
        reader.group_of(0, 1)
    (tmp_path / "aside").rename(path)
    assert reader.group_of(0, 1)[1] == 1
    reader.close()


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, 100), lambda path: os.utime(path, ns=(0, 1))])
@pytest.mark.parametrize("open_already", [False, True])
def test_a_file_that_is_no_longer_the_one_indexed_is_refused(
    tmp_path: Path, change: Callable[[Path], None], open_already: bool
) -> None:
    path = tmp_path / "x.parquet"
    write(path, columns(), row_group_size=4)
    index = EpisodeIndex.build(str(path))
    reader = reader_of(index, size=1, cameras=1)
    if open_already:
        reader.group_of(0, 0)
    change(path)
    with pytest.raises(DataError) as expected:
        EpisodeReader(index, 1, 2**20).group_of(0, 7)
    assert "since it was indexed" in str(expected.value)
    with pytest.raises(DataError, match=re.escape(str(expected.value))):
        reader.group_of(0, 7)


def test_a_bad_number_and_a_missing_column_read_as_ever(tmp_path: Path) -> None:
    content = columns()
    content["state"][5] = [float("nan")] * 3
    path = write(tmp_path / "x.parquet", content, row_group_size=3)
    reader = reader_of(EpisodeIndex.build(path), cameras=3)
    with pytest.raises(DataError, match="row 5, column state: dimension 0 is nan"):
        reader.group_of(0, 4)


def test_footers_larger_than_expected_are_read_too(index: EpisodeIndex, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "FOOTER_GUESS", (16, 0))
    reader = reader_of(index)
    reads.clear()
    assert row_content(reader, 1, 3) == row_content(EpisodeReader(index, 2, 2**20), 1, 3)
    assert len(reads) == 3


@pytest.mark.parametrize(("files", "footers"), [(1, 2**20), (64, 1)])
def test_few_files_stay_open_and_few_footers(
    index: EpisodeIndex, monkeypatch: pytest.MonkeyPatch, files: int, footers: int
) -> None:
    monkeypatch.setattr(reader_module, "OPEN_FILES", files)
    monkeypatch.setattr(reader_module, "FOOTER_BYTES", footers)
    opened = BlockFiles(index, 2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for file in range(3):
            assert list(opened.read(file, [0, 1])) == [0, 1]
            assert len(os.listdir("/proc/self/fd")) - before <= 1
    opened.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_threads_may_read_at_once(index: EpisodeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "OPEN_FILES", 1)
    opened = BlockFiles(index, 2)
    expected = {file: opened.read(file, [0, 1]) for file in range(3)}
    with ThreadPoolExecutor(6) as pool:
        for file, got in pool.map(lambda number: (number % 3, opened.read(number % 3, [0, 1])), range(120)):
            assert got == expected[file]
    opened.close()


def test_blocks_of_several_sources_are_those_of_each(folder: Path, tmp_path: Path) -> None:
    write_episodes(tmp_path, (9, 30, 4), cameras=2, seed=3)
    parts = [EpisodeIndex.build(str(folder)), EpisodeIndex.build(str(tmp_path))]
    together = cut_blocks(EpisodeIndex.concatenate(parts), SMALL)
    alone: list[Blocks] = [cut_blocks(part, SMALL) for part in parts]
    assert together.sizes.tolist() == [size for blocks in alone for size in blocks.sizes.tolist()]
    assert together.nbytes.tolist() == [size for blocks in alone for size in blocks.nbytes.tolist()]
