"""Bytes by range from every kind of place, through stores that fail in passing and for good."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from paligemma_vla import storage
from paligemma_vla.errors import StorageError, UnreachableError
from paligemma_vla.storage import MARKS, ByteSource, fetch, open_source, read_file
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
    place = {
        "local": lambda: str(tmp_path / "file.bin"),
        "file": lambda: f"file://{tmp_path}/file.bin",
        "memory": lambda: "memory://folder/file.bin",
        "s3": lambda: request.getfixturevalue("store").url("folder/file.bin"),
    }[request.param]()
    with open_source(place) as opened:
        yield opened


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


def test_every_last_byte_is_told_from_a_short_answer(store: Store) -> None:
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
def test_passing_faults_are_waited_for_and_logged(
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
    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    message = r"s3://bucket/x: part: cannot be reached \(10 attempts in 0 s, the last: no luck\); check the address"
    with pytest.raises(UnreachableError, match=message):
        storage.retry("s3://bucket/x", _fail, "part")
    whole = [min(storage.LONGEST_PAUSE, storage.FIRST_PAUSE * 2**n) for n in range(storage.ATTEMPTS - 1)]
    assert all(0.5 * most <= pause <= most for pause, most in zip(pauses, whole, strict=True))


def _fail() -> None:
    raise TimeoutError("no luck")


def test_no_attempt_begins_after_the_patience_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.05)
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.02)
    with pytest.raises(UnreachableError, match=r"[23] attempts in 0 s"):
        storage.retry("s3://bucket/x", _fail)


@pytest.mark.parametrize(
    "place",
    ["s3://bytes/none", "s3://no-such-bucket/x", "memory://none", "nosuch://x", "hf://datasets/a/b/c", "none"],
)
def test_what_is_not_there_is_told_at_once(store: Store, caplog: pytest.LogCaptureFixture, place: str) -> None:
    with pytest.raises(StorageError, match=place):
        open_source(place)
    assert not caplog.messages


def test_file_url_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be reached"):
        open_source((tmp_path / "none").as_uri())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AWS Error SLOW_DOWN during GetObject operation: m", True),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.", True),
        ("AWS Error UNKNOWN (HTTP status 429) during HeadObject operation", True),
        ("AWS Error UNKNOWN (HTTP status 400) during GetObject operation", False),
        ("AWS Error ACCESS_DENIED during GetObject operation: m", False),
        ("AWS Error INVALID_ACCESS_KEY_ID during GetObject operation: m", False),
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: m", False),
        ("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached", True),
        ("google::cloud::Status(PERMISSION_DENIED: no)", False),
        ("google::cloud::Status(UNAVAILABLE: later)", True),
        ("503 Server Error: Service Unavailable for url: https://huggingface.co/datasets/404", True),
        ("Client error '401 Unauthorized' for url 'https://huggingface.co/503'", False),
        ("Server disconnected", True),
    ],
)
def test_what_passes_is_told_from_what_does_not(text: str, expected: bool) -> None:
    assert storage.is_transient(OSError(text)) is expected


def test_whole_files_are_fetched_through_the_same_patience(store: Store, quick: None, tmp_path: Path) -> None:
    url = store.url("folder/file.bin")
    with store.failing(Faults(unavailable=0.3, cut=0.2, short=0.2)):
        assert fetch(url, tmp_path / "copy").read_bytes() == CONTENT
        assert read_file(url) == CONTENT
        assert read_file(url, 10) == CONTENT[:10]
