"""The reader beyond the contract of all ways of reading: blocks, what is read ahead, open files, what is not read at all."""

from __future__ import annotations

import gc
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from episode_files import columns, write
from pydantic.fields import FieldInfo

from paligemma_vla.config import DataConfig
from paligemma_vla.data import reader as reader_module
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import EpisodeReader, cut_blocks, streaming_cache_bytes
from paligemma_vla.storage import FileSource
from support import call, write_episodes

LENGTHS = (20, 33, 5, 40, 12, 28, 61, 7, 19, 30, 2, 44)
SMALL = 2e4  # bytes of a block: some episodes of LENGTHS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocks")
    write_episodes(path, LENGTHS, cameras=2, per_file=5)
    return path


@pytest.fixture
def index(folder: Path) -> EpisodeIndex:
    return EpisodeIndex.build(str(folder))


@pytest.fixture
def reader(index: EpisodeIndex) -> Iterator[EpisodeReader]:
    """By block."""
    opened = EpisodeReader(index, 2, 2**30, cut_blocks(index, SMALL))
    yield opened
    opened.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every request there was: offset, bytes."""
    seen: list[tuple[int, int]] = []
    read = FileSource._read

    def noted(self: FileSource, offset: int, count: int) -> bytes:
        seen.append((offset, count))
        return read(self, offset, count)

    monkeypatch.setattr(FileSource, "_read", noted)
    return seen


@pytest.mark.parametrize("size", [1.0, SMALL, 1e9])
def test_blocks_are_runs_of_whole_episodes_of_a_file(index: EpisodeIndex, size: float) -> None:
    blocks = cut_blocks(index, size)
    assert (blocks.episodes[0], blocks.episodes[-1], blocks.samples[-1]) == (0, len(index), index.steps)
    assert (np.diff(blocks.episodes) > 0).all()
    first_samples = np.cumsum(index.length) - index.length
    for number, (first, stop) in enumerate(itertools.pairwise(blocks.episodes.tolist())):
        assert len(set(index.file[first:stop].tolist())) == 1
        assert blocks.samples[number] == first_samples[first]
        samples = np.arange(blocks.samples[number], blocks.samples[number + 1])
        assert len(samples) == blocks.sizes[number] == index.length[first:stop].sum()
        assert set(blocks.of_samples(samples).tolist()) == {number}
    assert len(blocks) == {1.0: len(LENGTHS), 1e9: 3}.get(size, len(blocks))


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
    needed = blocks.nbytes.mean() * (3 * each + 4) + blocks.nbytes.max()
    assert streaming_cache_bytes(blocks, 3, 4, 16) == pytest.approx(needed + reader_module.FOOTER_BYTES, abs=1)


def test_rows_that_no_episode_needs_are_not_asked_for(index: EpisodeIndex, reads: list[tuple[int, int]]) -> None:
    index = index.select(np.array([0]))
    reader = EpisodeReader(index, 2, 2**30, cut_blocks(index, SMALL))
    reader.group_of(0, 3)
    footer = pq.read_metadata(index.paths[0])
    chunks = [footer.row_group(0).column(n) for n in range(footer.num_columns)]
    wanted = [chunk.total_compressed_size for chunk in chunks if not chunk.path_in_schema.startswith("is_")]
    assert reads[-1] == (4, sum(wanted))


def test_what_was_announced_stays_and_what_was_not_used_for_longest_makes_room(
    reader: EpisodeReader,
) -> None:
    assert reader.blocks is not None
    for block in (0, 1, 2):
        reader._block(block)
    large = max(int(reader.blocks.nbytes[3]), sum(group.nbytes for group in reader._read(3).values()))
    reader.cache_bytes = reader._cached_bytes + reader._files.nbytes + large - 1
    reader.prefetch([0])
    reader._block(3)
    assert list(reader._cache) == [2, 0, 3]
    reader.cache_bytes = 1
    reader.prefetch([4, 5])
    assert list(reader._cache) == [5]


class Gate:
    """Holds back every read until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.asked = threading.Event(), Counter[int]()
        read = EpisodeReader._read

        def held(reader: EpisodeReader, block: int) -> object:
            self.asked[block] += 1
            assert self.open.wait(10)
            return read(reader, block)

        patch.setattr(EpisodeReader, "_read", held)


def test_threads_end_with_the_reader_and_leave_waiting_work(reader: EpisodeReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def alive() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("reads ahead")}

    before, descriptors, gate = alive(), len(os.listdir("/proc/self/fd")), Gate(monkeypatch)
    assert reader.blocks is not None
    reader.prefetch(range(len(reader.blocks)))
    assert all(thread.daemon for thread in alive())
    while len(gate.asked) < 4:
        time.sleep(0.001)
    reader.close()
    gate.open.set()
    deadline = time.monotonic() + 5
    while alive() - before and time.monotonic() < deadline:  # those of an earlier test may still end
        time.sleep(0.001)
    assert not alive() - before
    assert len(gate.asked) == 4  # those that had been begun
    reader.group_of(0, 0)  # it can go on
    reader.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_few_files_stay_open(index: EpisodeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "OPEN_FILES", 1)
    reader = EpisodeReader(index, 2, 2**30, cut_blocks(index, SMALL))
    before = len(os.listdir("/proc/self/fd"))
    for file in (0, 1, 2, 0, 1, 2):
        reader.group_of(file, 0)
        assert len(os.listdir("/proc/self/fd")) - before <= 1
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_data_info_warns_of_row_groups_by_what_a_sample_loads_of_them(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small pictures are no matter, and few large ones are where they are not read one by one."""
    monkeypatch.setitem(DataConfig.model_fields, "cache_mb", FieldInfo(default=1))
    rng, content = np.random.default_rng(0), columns((600,))
    small = write(tmp_path / "small.parquet", content)
    content["image_1_bytes"] = [rng.bytes(4000) for _ in range(600)]
    one_by_one, whole = (write(tmp_path / f"{codec}.parquet", content, compression=codec) for codec in ("snappy", "zstd"))
    for path, warned in ((small, False), (one_by_one, False), (whole, True)):
        loaded = json.loads(call(capfd, "data", "info", path, "--json")[1])["loaded_megabytes"]
        assert ("note: one sample loads a row group" in call(capfd, "data", "info", path)[1]) is warned
        assert (loaded["largest"] > 2) is warned
        footer = pq.read_metadata(path).row_group(0)
        chunks = {footer.column(n).path_in_schema.partition(".")[0]: footer.column(n) for n in range(footer.num_columns)}
        names = ("state", "action", "prompt", *["image_1_bytes"][: path != one_by_one])
        assert loaded["all"] == round(sum(chunks[name].total_compressed_size for name in names) / 1e6, 1)


def test_data_info_counts_the_episodes_that_have_an_instruction_at_any_step(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    content = columns((3, 2, 2))
    content["prompt"] = ["open", "close", "open", "close", "close", None, " "]
    path = write(tmp_path / "x.parquet", content)
    assert json.loads(call(capfd, "data", "info", path, "--json")[1])["instructions"] == {"close": 2, "open": 1, "": 1}
    out = call(capfd, "data", "info", path)[1]
    assert "3 instructions (episodes each):\n       2  close\n       1  open\n       1  (none: missing, empty," in out
