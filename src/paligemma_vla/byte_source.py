"""The bytes of a file, wherever it lies: on this machine, or behind a URL, where every request may fail and is asked again."""

from __future__ import annotations

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paligemma_vla.errors import StorageError, first_line
from paligemma_vla.reaching import reach
from paligemma_vla.storage import NATIVE, file_system, is_url, native_system

MARKS = (0xA5, 0x5A)
Range = tuple[int, int]  # offset, and the first byte after it
Listed = tuple[int, int] | None  # what a listing says of a file: size, and mtime in whole seconds
FETCHED = 2**23  # bytes of one request, where a file is copied


class ByteSource(ABC):
    """One file's bytes. Not to be taken through a fork; `read_at` may be called from several threads.

    place: path or URL. size: in bytes. identity: size, mtime_ns, and what else changes with the content: ctime_ns of a file
    on this machine, 63 bits of what a store calls its version. All as they were when the file was opened.
    """

    place: str
    size: int
    identity: tuple[int, int, int]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def read_at(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes from `offset` on. Raises `StorageError` when they cannot be had."""
        if not 0 <= offset <= offset + count <= self.size:
            raise StorageError(f"{self.place}: bytes {offset} to {offset + count - 1} were asked for, it has {self.size}")
        return self._read(offset, count) if count else b""

    def expect(self, ranges: Iterable[Range]) -> None:  # noqa: B027 - most sources have no use for it
        """Announce the ranges that will be read from now on, so that near ones may be fetched together."""

    @abstractmethod
    def _read(self, offset: int, count: int) -> bytes: ...

    @abstractmethod
    def close(self) -> None: ...


def open_bytes(place: str | Path) -> ByteSource:
    """Open a file at a path or URL. Raises `StorageError` when it is not there, or cannot be reached."""
    place = str(place)
    if not is_url(place):
        return LocalBytes(place)
    return NativeBytes(place) if place.startswith(NATIVE) else FsspecBytes(place)


class LocalBytes(ByteSource):
    """A file on this machine."""

    def __init__(self, place: str) -> None:
        self.place = place
        try:
            self._descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from error
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        self.identity = status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _read(self, offset: int, count: int) -> bytes:
        parts, got = [], 0
        while got < count:  # Linux gives 2 GiB at once at most
            try:
                part = os.pread(self._descriptor, count - got, offset + got)
            except OSError as error:
                raise self._unreadable(error) from error
            if not part:
                raise StorageError(f"{self.place}: ends at byte {offset + got}, expected {self.size}; restore it")
            parts.append(part)
            got += len(part)
        return b"".join(parts) if len(parts) > 1 else parts[0]

    def _unreadable(self, error: OSError) -> StorageError:
        return StorageError(f"{self.place}: cannot be read ({first_line(error)}); restore it")

    def close(self) -> None:
        os.close(self._descriptor)


class RemoteBytes(ByteSource):
    """A file behind a URL: every request goes through `reach`, one at a time."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._file, self.identity = reach(place, self._open)
        self.size = self.identity[0]
        self._lock = threading.Lock()

    @abstractmethod
    def _open(self) -> tuple[Any, tuple[int, int, int]]:
        """The open file, and its identity."""

    @abstractmethod
    def _request(self, offset: int, count: int) -> bytes:
        """All that was asked for, or an error: of one request."""

    def _read(self, offset: int, count: int) -> bytes:
        return reach(self.place, lambda: self._request(offset, count), f"bytes {offset} to {offset + count - 1}")

    def close(self) -> None:
        self._file.close()


class NativeBytes(RemoteBytes):
    """A file behind a URL that pyarrow reaches by itself: one request to open it, one for each range."""

    def _open(self) -> tuple[Any, tuple[int, int, int]]:
        system, path = native_system(self.place)
        file = system.open_input_file(path)
        facts = file.metadata() or {}
        if "Last-Modified" in facts:  # S3 answers all at once
            modified = datetime.fromisoformat(facts["Last-Modified"].decode())
            return file, (file.size(), int(modified.timestamp()) * 10**9, _number(facts.get("ETag", b"")))
        return file, (file.size(), system.get_file_info(path).mtime_ns or 0, 0)

    def _request(self, offset: int, count: int) -> bytes:
        """pyarrow's S3 client takes an answer that is too short for a whole one, and leaves the rest of the memory as it was.

        So the last byte is marked: a mark that is still there is the data's own only if the other one does not stay.
        """
        content = bytearray(count)
        for mark in MARKS:
            content[-1] = mark
            with self._lock:
                self._file.seek(offset)
                got = self._file.readinto(content)
            if got == count and content[-1] != mark:
                return bytes(content)
        raise ConnectionError(f"the answer was shorter than the {count} bytes that were asked for")


class FsspecBytes(RemoteBytes):
    """A file behind any other URL, through fsspec."""

    def _open(self) -> tuple[Any, tuple[int, int, int]]:
        system, path = file_system(self.place)
        system.invalidate_cache(system._parent(path))  # what it was when it was listed does not matter
        facts = system.info(path)
        if facts["type"] != "file":
            raise IsADirectoryError(f"{facts['type']}, expected a file")
        try:
            modified = int(system.modified(path).timestamp() * 10**9)
        except NotImplementedError:
            modified = 0
        version = _number(system.ukey(path).encode())
        return system.open(path, "rb", cache_type="none"), (int(facts["size"]), modified, version)

    def _request(self, offset: int, count: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            content = bytes(self._file.read(count))
        if len(content) != count:
            raise ConnectionError(f"the answer was of {len(content)} bytes, {count} were asked for")
        return content


def _number(version: bytes) -> int:
    """63 bits of what a store calls the version of a file; 0 where it has none."""
    return int.from_bytes(hashlib.blake2b(version, digest_size=8).digest(), "little") >> 1 if version else 0


def list_files(url: str) -> dict[str, Listed]:
    """Files below a folder behind a URL, by path relative to it, sorted; none when it is not there. Raises `StorageError`.

    A store that fails in mid-listing is asked again: no file is left out in silence.
    """
    try:
        found, root = reach(url, lambda: _native_files(url) if url.startswith(NATIVE) else _fsspec_files(url), "its files")
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise
    folder = f"{root.strip('/')}/".lstrip("/")
    named = {path.strip("/"): listed for path, listed in found.items()}
    return {path.removeprefix(folder): named[path] for path in sorted(named) if path.startswith(folder)}


def _native_files(url: str) -> tuple[dict[str, Listed], str]:
    from pyarrow.fs import FileSelector, FileType

    system, path = native_system(url)
    selector = FileSelector(path, recursive=True)
    files = (info for info in system.get_file_info(selector) if info.type == FileType.File)
    return {info.path: (info.size, info.mtime_ns // 10**9) if info.mtime_ns else None for info in files}, path


def _fsspec_files(url: str) -> tuple[dict[str, Listed], str]:
    from fsspec import AbstractFileSystem

    system, path = file_system(url)
    system.invalidate_cache()
    # fsspec's own `find` leaves out folders that it fails to list, unless told otherwise.
    strict = {"on_error": "raise"} if type(system).find is AbstractFileSystem.find else {}
    return {name: None for name in system.find(path, **strict) if name.rstrip("/") != path.rstrip("/")}, path


def fetch(url: str, target: Path) -> Path:
    """Copy a file behind a URL to `target`, which is whole or not there. Raises `StorageError`."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_bytes(url) as source, open(temporary, "wb") as file:
            for offset in range(0, source.size, FETCHED):
                file.write(source.read_at(offset, min(FETCHED, source.size - offset)))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def read_file(place: str | Path, most: int = -1) -> bytes:
    """The first `most` bytes (all by default) of a file at a path or URL. Raises `OSError`, or `StorageError` for a URL."""
    if is_url(str(place)):
        with open_bytes(place) as source:
            return source.read_at(0, source.size if most < 0 else min(most, source.size))
    with open(place, "rb") as file:
        return file.read(most)
