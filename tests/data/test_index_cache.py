"""The index on disk: as if it were not there, but for the files that need not be opened."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from episode_files import columns, flags, put, write

from paligemma_vla.data import index as index_module
from paligemma_vla.data.index import EpisodeIndex, Excluded, ExclusionList
from paligemma_vla.errors import DataError

Opened = Callable[[], list[str]]
ARRAYS = ("file", "start", "length", "groups", "group_offsets", "stamps", "digests")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "paligemma_vla" / "index"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate("abc"):
        write(folder / f"{name}.parquet", columns((3, number + 1, 4)), row_group_size=3)
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Names of the files opened since it was last called."""
    names: list[str] = []
    original = index_module.open_file

    def recording(path: str, stream: bool = False) -> object:
        names.append(Path(path).name)
        return original(path, stream)

    def since() -> list[str]:
        found = sorted(names)
        names.clear()
        return found

    monkeypatch.setattr(index_module, "open_file", recording)
    return since


def same(first: EpisodeIndex, second: EpisodeIndex) -> None:
    assert (first.paths, first.layout, first.excluded) == (second.paths, second.layout, second.excluded)
    for name in ARRAYS:
        a, b = getattr(first, name), getattr(second, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def fresh(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EpisodeIndex:
    """Built without a cache."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / f"none-{time.monotonic_ns()}"))
        return EpisodeIndex.build(str(data))


def test_second_build_opens_no_file_and_is_the_same(data: Path, cache: Path, opened: Opened) -> None:
    first = EpisodeIndex.build(str(data))
    assert opened() == ["a.parquet", "b.parquet", "c.parquet"]
    same(EpisodeIndex.build(str(data)), first)
    assert opened() == []
    assert len(list(cache.iterdir())) == 1
    EpisodeIndex.build([str(data)])
    EpisodeIndex.build(os.path.relpath(data))
    assert opened() == []


def flip_byte(data: Path) -> None:
    """One byte of an image, with size and dates as before; only ctime tells."""
    path = data / "b.parquet"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    time.sleep(0.02)  # a file system's clock is coarse
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def add_and_remove(data: Path) -> None:
    write(data / "b2.parquet", columns((5,)))
    (data / "a.parquet").unlink()


def replace(data: Path) -> None:
    time.sleep(0.02)
    write(data / "new", columns((2, 2)))
    (data / "new").replace(data / "c.parquet")


@pytest.mark.parametrize(
    ("change", "read_again"),
    [(flip_byte, ["b.parquet"]), (add_and_remove, ["b2.parquet"]), (replace, ["c.parquet"])],
)
def test_only_what_changed_is_read_again(
    data: Path,
    cache: Path,
    opened: Opened,
    change: Callable[[Path], None],
    read_again: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    EpisodeIndex.build(str(data))
    opened()
    change(data)
    index = EpisodeIndex.build(str(data))
    assert opened() == read_again
    same(index, fresh(data, monkeypatch, tmp_path))
    opened()
    same(EpisodeIndex.build(str(data)), index)
    assert opened() == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, folder])
def test_damaged_cache_is_as_good_as_none(data: Path, cache: Path, opened: Opened, damage: Callable[[Path], None]) -> None:
    first = EpisodeIndex.build(str(data))
    (kept,) = cache.iterdir()
    damage(kept)
    opened()
    same(EpisodeIndex.build(str(data)), first)
    assert opened() == ["a.parquet", "b.parquet", "c.parquet"]
    same(EpisodeIndex.build(str(data)), first)
    assert opened() == ([] if damage is not folder else ["a.parquet", "b.parquet", "c.parquet"])
    assert [path.name for path in cache.iterdir()] == [kept.name]  # nothing half-written stays


def test_flipped_byte_in_the_cache_or_another_version_is_found(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EpisodeIndex.build(str(data))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        assert not index_module.load_facts(path)
    path.write_bytes(whole)
    assert len(index_module.load_facts(path)) == 3
    monkeypatch.setattr(index_module, "CACHE_VERSION", 1)
    assert not index_module.load_facts(path)


def test_cache_that_cannot_be_written_is_no_error(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first = EpisodeIndex.build(str(data))
    same(EpisodeIndex.build(str(data)), first)


def test_exclusions_and_faults_are_judged_anew_each_time(data: Path, cache: Path, opened: Opened) -> None:
    write(data / "b.parquet", flags(put("is_last", 2, False)))
    for _ in range(2):
        with pytest.raises(DataError, match="row 2, column is_last"):
            EpisodeIndex.build(str(data))
    assert len(opened()) == 3
    bad = Excluded(os.path.realpath(data / "b.parquet"), 0, 3, 0, (), None)
    assert EpisodeIndex.build(str(data), "x", ExclusionList("l", [bad])).excluded == 1
    whole = Excluded(os.path.realpath(data / "b.parquet"), None, None, None, (), None)
    assert len(EpisodeIndex.build(str(data), "x", ExclusionList("l", [whole])).paths) == 2
    with pytest.raises(DataError, match="row 2, column is_last"):
        EpisodeIndex.build(str(data))
    assert opened() == []
