"""Ranges that are announced, fetched together and kept; and what a footer tells of the flags."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episode_files import columns, write

from paligemma_vla import schema, storage
from paligemma_vla.data.doctor import CheckOptions, diagnose
from paligemma_vla.data.formats import open_file
from paligemma_vla.data.formats.parquet import ParquetEpisodes, column_ranges, flag_rows
from paligemma_vla.data.index import find_flags, read_flags
from paligemma_vla.storage import ByteFile, ByteSource, CachedSource
from support import write_episodes


class Counted(ByteSource):
    """Bytes in memory, and the ranges that were asked for."""

    def __init__(self, content: bytes) -> None:
        self.location, self.size, self.identity = "memory", len(content), (len(content), 0, 0)
        self.content = content
        self.asked: list[tuple[int, int]] = []

    def _read(self, offset: int, count: int) -> bytes:
        self.asked.append((offset, offset + count))
        return self.content[offset : offset + count]

    def close(self) -> None:
        pass


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits in the proportions of the real ones."""
    for name, value in {"GAP_BYTES": 8, "REQUEST_BYTES": 64, "CACHE_BYTES": 256, "TAIL_BYTES": 16}.items():
        monkeypatch.setattr(storage, name, value)


def test_whatever_is_announced_every_read_gives_the_files_bytes(small: None) -> None:
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, 1000, dtype=np.uint8).tobytes()
    for _ in range(200):
        held = CachedSource(Counted(content))
        starts = rng.integers(-20, 1020, rng.integers(0, 30))
        held.expect((int(start), int(start + rng.integers(0, 150))) for start in starts)
        for _ in range(10):
            offset = int(rng.integers(0, 1000))
            count = int(rng.integers(0, 1001 - offset))
            assert held.read_at(offset, count) == content[offset : offset + count]


def requests(content: bytes, ranges: Iterable[tuple[int, int]], reads: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    source = Counted(content)
    held = CachedSource(source)
    held.expect(ranges)
    for start, stop in reads:
        held.read_at(start, stop - start)
    return source.asked


def test_near_ranges_are_one_request_and_far_ones_are_not(small: None) -> None:
    content = bytes(1000)
    near, far = [(100, 110), (118, 130)], [(100, 110), (119, 130)]
    assert requests(content, near, near) == [(100, 130)]
    assert requests(content, far, far) == far
    assert requests(content, near, reversed(near)) == [(100, 130)]
    several = [(n, n + 10) for n in range(0, 200, 10)]
    assert requests(content, several, several) == [(0, 60), (60, 120), (120, 180), (180, 200)]
    assert requests(content, [(0, 150)], [(0, 10), (10, 70), (140, 150)]) == [(0, 64), (64, 128), (128, 150)]
    assert requests(content, [], [(984, 1000), (5, 7)]) == [(984, 1000), (5, 7)]


def test_columns_read_one_after_the_other_fetch_their_row_groups_once(small: None) -> None:
    """As Parquet's reader does; what lies between two columns is not kept, or there would be no room."""
    state = [(n, n + 4) for n in range(0, 960, 48)]
    action = [(n + 6, n + 10) for n in range(0, 960, 48)]
    asked = requests(bytes(1000), state + action, state + action)
    assert asked == [(n, n + 10) for n in range(0, 960, 48)]


def test_parquet_reads_through_it_what_it_reads_from_the_disk(tmp_path: Path, small: None) -> None:
    write_episodes(tmp_path, lengths=(40, 3, 70))
    (path,) = tmp_path.glob("*.parquet")
    whole = pq.ParquetFile(path)
    held = CachedSource(Counted(path.read_bytes()))
    file = pq.ParquetFile(ByteFile(held), pre_buffer=False, buffer_size=64)
    for names in (["state"], ["action", "prompt"], ["image_1_bytes", "is_last"]):
        held.expect(column_ranges(file.metadata, names, [1, 3]))
        assert file.read_row_groups([1, 3], columns=names).equals(whole.read_row_groups([1, 3], columns=names))


def told(path: Path) -> list[list[int]] | None:
    with open_file(str(path)) as file:
        rows = file.flags_from_footer()
        return None if rows is None else [part.tolist() for part in rows]


def test_footer_tells_the_flags_of_our_files(tmp_path: Path) -> None:
    write_episodes(tmp_path, lengths=(40, 1, 32, 33, 64, 2), per_file=6)
    (path,) = tmp_path.glob("*.parquet")
    with open_file(str(path)) as file:
        expected, got = read_flags(file), find_flags(file)
    assert told(path) is not None
    for name in ("first", "last", "terminal", "null"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def rewrite(path: Path, group: int, change: dict[int, tuple[bool, bool]] | None = None, **options: object) -> Path:
    """As pyarrow writes it from a table of our file, whose metadata the table keeps. change: row -> is_first, is_last."""
    table = pq.read_table(path)
    for row, flags in (change or {}).items():
        for name, value in zip((schema.IS_FIRST, schema.IS_LAST), flags, strict=True):
            values = table[name].to_pylist()
            values[row] = value
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(place), pa.array(values))
    assert schema.EPISODES_KEY in table.schema.metadata
    pq.write_table(table, path, row_group_size=group, **options)
    return path


@pytest.mark.parametrize(
    ("group", "change", "options"),
    [
        (1000, None, {}),
        (16, None, {}),
        (32, {40: (True, False), 39: (False, True)}, {}),
        (32, None, {"write_statistics": False}),
    ],
    ids=["one group", "smaller groups", "an episode cut in two", "no statistics"],
)
def test_footer_of_a_file_written_anew_settles_nothing_that_is_not_so(
    tmp_path: Path, group: int, change: dict[int, tuple[bool, bool]] | None, options: dict[str, object]
) -> None:
    write_episodes(tmp_path, lengths=(64, 96))
    (path,) = tmp_path.glob("*.parquet")
    rewrite(path, group, change, **options)
    assert told(path) is None
    with open_file(str(path)) as file:
        assert len(find_flags(file).first) == (3 if change else 2)


def test_check_tells_flags_that_the_footer_contradicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_episodes(tmp_path, lengths=(5, 6))
    (path,) = tmp_path.glob("*.parquet")
    wrong = [np.array(rows) for rows in ([0, 4], [3, 10], [10])]
    assert not diagnose([str(path)], CheckOptions(), lambda size: None).faults
    monkeypatch.setattr(ParquetEpisodes, "flags_from_footer", lambda self: wrong)
    (fault,) = diagnose([str(path)], CheckOptions(), lambda size: None).faults
    assert "the footer's statistics contradict them" in str(fault)


def test_files_of_other_writers_tell_no_flags(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "x.parquet", columns((3, 4))))
    metadata = pq.read_metadata(path)
    assert flag_rows(metadata, np.array([0, metadata.num_rows])) is None
