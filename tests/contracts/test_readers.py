"""What every way of reading rows promises: the rows of the files, few requests, bounded memory, no file that was replaced.

From a disk and from behind a URL, by row group and by block.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from paligemma_vla import storage
from paligemma_vla.data import formats
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import EpisodeReader, cut_blocks
from paligemma_vla.errors import DataError
from support import read_rows, write_episodes

LENGTHS = (20, 33, 5, 40, 12, 28, 61, 7, 19, 30, 2, 44)
LEFT_OUT = [2, 6, 7]  # so that blocks have holes
Open = Callable[..., EpisodeReader]
Requests = list[tuple[str, int, int]]
Written = tuple[Path, dict[tuple[str, int], dict[str, Any]]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Twelve episodes in three files, and their rows, read naively, by file and number."""
    path = tmp_path_factory.mktemp("episodes")
    write_episodes(path, LENGTHS, cameras=2, per_file=5)
    return path, {(row["file"], row["row"]): row for row in read_rows(path)}


@pytest.fixture(params=["disk", "URL"])
def url(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "URL")


@pytest.fixture(params=["row groups", "blocks"])
def open_reader(request: pytest.FixtureRequest, url: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens a reader of a folder. Where it reads by block, every block was asked for ahead of need."""
    monkeypatch.setattr(formats, "TRUSTED_SECONDS", 0.0)
    opened: list[EpisodeReader] = []

    def open_reader(folder: Path, cache_bytes: int = 2**30, left_out: list[int] | None = None) -> EpisodeReader:
        index = EpisodeIndex.build(f"file://{folder}" if url else str(folder))
        index = index.select(np.delete(np.arange(len(index)), left_out or []))
        blocks = cut_blocks(index, 2e4) if request.param == "blocks" else None
        opened.append(EpisodeReader(index, 2, cache_bytes, blocks))
        if blocks is not None:
            opened[-1].prefetch(range(len(blocks)))
        return opened[-1]

    yield open_reader
    for reader in opened:
        reader.close()


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    """Every request for bytes that there was: file, offset, count. (Rows of a disk's row groups are read by pyarrow itself.)"""
    seen: Requests = []
    read = storage.FileSource._read

    def noted(self: storage.FileSource, offset: int, count: int) -> bytes:
        seen.append((self.location, offset, count))
        return read(self, offset, count)

    monkeypatch.setattr(storage.FileSource, "_read", noted)
    return seen


def content(reader: EpisodeReader, file: int, row: int) -> dict[str, Any]:
    group, number = reader.group_of(file, row)
    images = {
        f"image_{camera}_bytes": column.encoded(number) if column is not None and column.present(number) else None
        for camera, column in enumerate(group.images, start=1)
    }
    numbers = {"state": group.state[number].tolist(), "action": group.action[number].tolist()}
    return {**images, **numbers, "prompt": group.prompt[number].as_py()}


def path_of(reader: EpisodeReader, file: int) -> str:
    return reader.index.paths[file].removeprefix("file://")


def shuffled_rows(reader: EpisodeReader) -> list[tuple[int, int]]:
    index = reader.index
    rows = [
        (int(f), int(s) + n) for f, s, length in zip(index.file, index.start, index.length, strict=True) for n in range(length)
    ]
    return [rows[number] for number in np.random.default_rng(0).permutation(len(rows))]


@pytest.mark.parametrize("cache_bytes", [1, 2**30])
def test_rows_are_those_of_the_files(open_reader: Open, written: Written, cache_bytes: int) -> None:
    folder, rows = written
    reader = open_reader(folder, cache_bytes, LEFT_OUT)
    for file, row in shuffled_rows(reader):
        got, naive = content(reader, file, row), rows[path_of(reader, file), row]
        assert got == {name: naive[name] for name in got}
    for episode in range(len(reader.index)):
        file, start, length = (int(part[episode]) for part in (reader.index.file, reader.index.start, reader.index.length))
        actions = reader.actions(file, start, start + length)
        assert actions.tolist() == [rows[path_of(reader, file), start + n]["action"] for n in range(length)]


def test_a_row_group_or_block_is_one_request_and_a_file_one_more(
    open_reader: Open, written: Written, requests: Requests
) -> None:
    index = EpisodeIndex.build(str(written[0]))  # a cached index asks for nothing below
    del requests[:]
    reader = open_reader(written[0])
    footers = [request for request in requests if request[1] + request[2] == index.stamps[0, 0]]
    for file, row in shuffled_rows(reader):
        reader.group_of(file, row)
    if reader.blocks is None and not reader.index.paths[0].startswith("file://"):
        assert not requests
        return
    opened = [request for request in requests if request[2] > 0 and request[1] + request[2] in index.stamps[:, 0]]
    units = sum(len(reader.index.row_groups(file)) - 1 for file in range(3)) if reader.blocks is None else len(reader.blocks)
    assert len(requests) - len(opened) == units
    assert len(opened) - len(footers) <= 3 + 3  # of indexing and of reading
    assert len({request for request in requests if request not in opened}) == units


def test_memory_stays_within_its_bound_and_what_left_it_is_read_again(open_reader: Open, written: Written) -> None:
    folder, rows = written
    whole = sum(os.path.getsize(path) for path in folder.glob("*.parquet"))
    reader = open_reader(folder, whole // 2)
    for number, (file, row) in enumerate(shuffled_rows(reader)):
        if reader.blocks is not None and number % 3 == 0:
            reader.prefetch([number % len(reader.blocks)])
        assert content(reader, file, row)["prompt"] == rows[path_of(reader, file), row]["prompt"]
        assert reader._cached_bytes == sum(nbytes for nbytes, _ in reader._cache.values())
        assert reader._cached_bytes + reader._files.nbytes <= whole // 2
    for nbytes, block in reader._cache.values():
        if isinstance(block, dict):
            assert nbytes == sum(group.nbytes for group in block.values())


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def shorten(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes()[:100])
    path.with_suffix(".new").replace(path)


def replace(path: Path) -> None:
    write_episodes(path.parent / "new", LENGTHS[:5], cameras=2, per_file=5, seed=1)
    (path.parent / "new" / path.name).replace(path)


@pytest.mark.parametrize("change", [Path.unlink, shorten, touch, replace])
@pytest.mark.parametrize("open_already", [False, True])
def test_a_file_that_is_no_longer_the_one_indexed_is_refused_by_name(
    open_reader: Open,
    written: Written,
    tmp_path: Path,
    change: Callable[[Path], None],
    open_already: bool,
) -> None:
    path = tmp_path / "episodes-00000.parquet"
    shutil.copy(written[0] / path.name, path)
    reader = open_reader(tmp_path)
    if open_already:
        reader.group_of(0, 0)
    reader.close()  # forget what was read ahead
    if open_already:
        reader.group_of(0, 0)
    change(path)
    what = "gone" if change is Path.unlink else "changed"
    with pytest.raises(DataError, match=rf"episodes-00000\.parquet: {what} since it was indexed: got .*, expected \d+ bytes"):
        reader.group_of(0, 100)


@pytest.mark.parametrize("url", [False])
def test_reading_goes_on_with_a_file_that_was_put_back(open_reader: Open, written: Written, tmp_path: Path) -> None:
    path = tmp_path / "episodes-00000.parquet"
    shutil.copy(written[0] / path.name, path)
    reader = open_reader(tmp_path)
    reader.close()
    path.rename(tmp_path / "aside")
    with pytest.raises(DataError, match="gone"):
        reader.group_of(0, 7)
    (tmp_path / "aside").rename(path)
    assert reader.group_of(0, 40)[1] == 20


def test_damage_is_refused_with_its_row_group_where_it_is_needed(open_reader: Open, written: Written, tmp_path: Path) -> None:
    """Another bit in the pictures of a row group; size and dates stay."""
    path = tmp_path / "episodes-00000.parquet"
    shutil.copy(written[0] / path.name, path)
    chunk, status, damaged = pq.read_metadata(path).row_group(3).column(0), path.stat(), bytearray(path.read_bytes())
    damaged[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    reader = open_reader(tmp_path)
    bounds = reader.index.row_groups(0)
    for _ in range(2):  # also when it is tried again
        reader.group_of(0, 0)
        with pytest.raises(DataError, match=rf"00000\.parquet: row {bounds[3]}: row group 3 \(rows {bounds[3]} to"):
            reader.group_of(0, int(bounds[3]))


def test_a_reader_takes_no_more_to_a_worker_than_the_index(open_reader: Open, written: Written) -> None:
    reader = open_reader(written[0])
    reader.group_of(0, 0)
    sent = pickle.dumps(reader)
    assert len(sent) < 20_000
    copy = pickle.loads(sent)  # noqa: S301 - what a worker gets
    assert content(copy, 1, 3) == content(reader, 1, 3)
    copy.close()
