"""Bytes by range from every kind of location, through stores that fail in passing and for good."""

from __future__ import annotations

import errno
import io
import logging
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from paligemma_vla import storage
from paligemma_vla.errors import DataError, StorageError, UnreachableError
from paligemma_vla.storage import (
    MARKS,
    ByteSource,
    CachedSource,
    atomic_file,
    atomic_write,
    fetch,
    lock_file,
    open_source,
    read_file,
    read_json,
)
from store import Faults, Store

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with Store("bytes") as started:
        started.put("folder/file.bin", CONTENT)
        yield started


@pytest.fixture(params=["local", "file", "memory", "s3"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ByteSource]:
    (tmp_path / "file.bin").write_bytes(CONTENT)
    if request.param == "memory":
        fsspec.filesystem("memory").pipe("/folder/file.bin", CONTENT)
    location = {
        "local": lambda: str(tmp_path / "file.bin"),
        "file": lambda: f"file://{tmp_path}/file.bin",
        "memory": lambda: "memory://folder/file.bin",
        "s3": lambda: request.getfixturevalue("store").url("folder/file.bin"),
    }[request.param]()
    with open_source(location) as opened:
        yield opened


def box(kind: bytes, content: bytes = b"", long: bool = False) -> bytes:
    """Of an MP4 file."""
    size = 8 + 8 * long + len(content)
    return (struct.pack(">I4sQ", 1, kind, size) if long else struct.pack(">I4s", size, kind)) + content


FTYP, MDAT, MOOV = box(b"ftyp", b"isom"), box(b"mdat", bytes(50)), box(b"moov", bytes(50))
CUT = "its footer is missing: the recording was not finalized"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (storage.POINTER + b"\noid sha256:4d7a\nsize 12345\n", "it is a pointer of git-lfs, not the file: run `git lfs pull`"),
        (b"PAR1" + bytes(100), CUT),
        (FTYP + MDAT, CUT),
        (FTYP + MDAT + MOOV[:20], CUT),
        (FTYP + box(b"mdat", bytes(50), long=True), CUT),
        (FTYP + struct.pack(">I4s", 0, b"mdat") + bytes(50), CUT),
        (FTYP + MDAT + MOOV, "library"),
        (FTYP + MOOV + MDAT[:20], "library"),
        (FTYP + box(b"mdat", bytes(50), long=True) + MOOV, "library"),
        (b"PAR1" + bytes(100) + b"PAR1", "library"),
        (b"", "library"),
    ],
)
def test_reason_of_a_failure_to_read_is_what_stands_in_the_file(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "b.bin").write_bytes(content)
    found = storage.read_failure(tmp_path / "b.bin", ValueError("library\nand more"))
    assert found.startswith(reason)
    (tmp_path / "a.json").write_text("{}")
    expected = found if found == "library" else f"{tmp_path}/b.bin: {found}"
    assert storage.read_failure(tmp_path, ValueError("library")) == expected
    assert storage.read_failure("org/name", ValueError("library")) == "library"


def test_file_that_this_process_cannot_open_is_not_at_fault(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"a\.bin: too many open files; raise the limit \(`ulimit -n`"):
        storage.read_failure(tmp_path / "a.bin", OSError(errno.EMFILE, "Too many open files"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of hundredths of seconds."""
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.01)


def test_ranges_are_exactly_what_was_asked_for(source: ByteSource) -> None:
    assert source.size == len(CONTENT)
    for offset, count in [(0, 1), (0, len(CONTENT)), (123, 4567), (len(CONTENT) - 8, 8), (5, 0), (len(CONTENT), 0)]:
        assert source.read_at(offset, count) == CONTENT[offset : offset + count]
    for offset, count in [(len(CONTENT) - 8, 9), (-1, 2), (0, -1)]:
        with pytest.raises(StorageError, match=re.escape(f"{source.location}: bytes {offset} to ")):
            source.read_at(offset, count)


def test_short_answers_are_found_whatever_the_last_byte_is(store: Store) -> None:
    """Either of the two marks may be the data's own."""
    content = bytes([0, 0x5A, 0xA5, 0xFF, *MARKS])
    store.put("bytes.bin", content)
    with open_source(store.url("bytes.bin")) as source:
        assert b"".join(source.read_at(n, 1) for n in range(len(content))) == content


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (Faults(unavailable=0.5), "SLOW_DOWN"),
        (Faults(cut=0.5), "partial file"),
        (Faults(short=0.5), "shorter than"),
    ],
)
def test_transient_faults_are_logged_and_retried(
    store: Store, quick: None, caplog: pytest.LogCaptureFixture, faults: Faults, reason: str
) -> None:
    url = store.url("folder/file.bin")
    with open_source(url) as source, store.failing(faults), caplog.at_level(logging.WARNING):
        for offset in range(0, len(CONTENT), 10_000):
            assert source.read_at(offset, 10_000) == CONTENT[offset : offset + 10_000]
    pattern = rf"{url}: bytes \d+ to \d+: .*{reason}.*; again in 0\.0 s \(attempt \d+ of 10\)"
    assert caplog.messages
    assert all(re.fullmatch(pattern, message) for message in caplog.messages)


def test_pauses_grow_and_end_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise TimeoutError("no luck")

    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    message = r"s3://bucket/x: part: cannot be reached \(10 attempts in 0 s, the last: no luck\); check the address"
    with pytest.raises(UnreachableError, match=message):
        storage.retry("s3://bucket/x", fail, "part")
    whole = [min(storage.LONGEST_PAUSE, storage.FIRST_PAUSE * 2**n) for n in range(storage.ATTEMPTS - 1)]
    assert all(0.5 * most <= pause <= most for pause, most in zip(pauses, whole, strict=True))
    monkeypatch.setattr(storage, "PATIENCE", 0.1)  # shorter than the first pause
    with pytest.raises(UnreachableError, match=r"1 attempts in 0 s"):
        storage.retry("s3://bucket/x", fail)


@pytest.mark.parametrize(
    "location",
    ["s3://bytes/none", "s3://no-such-bucket/x", "memory://none", "local://none", "nosuch://x", "hf://datasets/a/b/c", "none"],
)
def test_what_is_not_there_is_an_error_at_once(store: Store, caplog: pytest.LogCaptureFixture, location: str) -> None:
    with pytest.raises(StorageError, match=location):
        open_source(location)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("transient", "text"),
    [
        (True, "AWS Error SLOW_DOWN during GetObject operation: m"),
        (True, "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body."),
        (False, "AWS Error UNKNOWN (HTTP status 400) during GetObject operation"),
        (False, "AWS Error INVALID_ACCESS_KEY_ID during GetObject operation: m"),
        (False, "AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: m"),
        (True, "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached"),
        (False, "google::cloud::Status(PERMISSION_DENIED: no)"),
        (True, "google::cloud::Status(UNAVAILABLE: later)"),
        (True, "503 Server Error: Service Unavailable for url: https://huggingface.co/datasets/404"),
        (False, "Client error '401 Unauthorized' for url 'https://huggingface.co/503'"),
        (True, "Server disconnected"),
    ],
)
def test_errors_that_pass_are_distinguished_from_those_that_stay(transient: bool, text: str) -> None:
    assert storage.is_transient(OSError(text)) is transient


def test_whole_files_are_fetched_piece_by_piece_through_the_same_patience(
    store: Store, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = store.url("folder/file.bin")
    monkeypatch.setattr(storage, "REQUEST_BYTES", 70_000)
    with store.failing(Faults(unavailable=0.3, cut=0.2, short=0.2)):
        assert fetch(url, tmp_path / "copy").read_bytes() == CONTENT
        assert read_file(url) == CONTENT


class Counted(ByteSource):
    """Bytes in memory, and the ranges that were asked for."""

    def __init__(self, content: bytes) -> None:
        self.location, self.size, self.identity = "memory", len(content), (len(content), 0, 0)
        self.content = content
        self.asked: list[tuple[int, int]] = []

    def _read(self, offset: int, count: int) -> bytes:
        self.asked.append((offset, offset + count))
        return self.content[offset : offset + count]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits in the proportions of the real ones."""
    for name, value in {"GAP_BYTES": 8, "REQUEST_BYTES": 64, "CACHE_BYTES": 256}.items():
        monkeypatch.setattr(storage, name, value)


def test_whatever_ranges_are_expected_every_read_gives_the_files_bytes(small: None) -> None:
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, 1000, dtype=np.uint8).tobytes()
    for _ in range(200):
        starts = rng.integers(-20, 1020, rng.integers(0, 30))
        cached = CachedSource(Counted(content), [(int(start), int(start + rng.integers(0, 80))) for start in starts])
        for _ in range(10):
            offset = int(rng.integers(0, 1000))
            count = int(rng.integers(0, min(60, 1001 - offset)))
            assert cached.read_at(offset, count) == content[offset : offset + count]


def every(step: int, first: int = 0) -> list[tuple[int, int]]:
    """Ranges of 4 bytes over 960 bytes, as columns lie in row groups."""
    return [(n + first, n + first + 4) for n in range(0, 960, step)]


@pytest.mark.parametrize(
    ("ranges", "asked"),
    [
        ([(100, 110), (118, 130)], [(100, 130)]),
        ([(118, 130), (100, 110)], [(100, 130)]),
        ([(100, 110), (119, 130)], [(100, 110), (119, 130)]),
        ([(n, n + 10) for n in range(0, 200, 10)], [(0, 60), (60, 120), (120, 180), (180, 200)]),
        # Column after column, as Parquet's reader does; what lies between them is not kept, or there would be no room.
        (every(48) + every(48, first=6), [(n, n + 10) for n in range(0, 960, 48)]),
    ],
)
def test_near_ranges_are_one_request_and_far_ones_are_not(
    small: None, ranges: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    source = Counted(bytes(1000))
    cached = CachedSource(source, ranges)
    for start, stop in ranges:
        cached.read_at(start, (stop - start) // 2)
        cached.read_at(start + 1, stop - start - 1)
    assert source.asked == asked
    cached.read_at(995, 3)
    assert source.asked[-1] == (995, 998)


def test_python_file_reads_and_seeks_like_a_file() -> None:
    file, source = io.BytesIO(CONTENT), Counted(CONTENT)
    with io.BufferedReader(source, 512) as ours:
        for whence, offset, count in ((0, 100, 20), (1, -10, 700), (2, -30, 20), (2, -5, -1), (0, 0, 3)):
            assert ours.seek(offset, whence) == file.seek(offset, whence)
            assert ours.read(count) == file.read(count)
            assert ours.tell() == file.tell()


def test_atomic_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"half of the new")
        file.flush()
        assert path.read_text() == "old"
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    atomic_write(path, b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_json_that_is_missing_or_damaged_is_one_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="key: .*; restore it" if content is not None else "key: no such file; write it"):
        read_json(path, DataError, "restore it", missing="write it", where="key")


def test_lock_keeps_others_out_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = lock_file(path)
    assert lock is not None and lock_file(path) is None
    path.unlink()  # as its holder does before it ends
    again = lock_file(path)
    assert again is not None
    lock.release()
    assert lock_file(path) is None
    again.release()
    assert lock_file(path) is not None
