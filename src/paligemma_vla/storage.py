"""Files, on this machine and behind URLs: bytes of any range, retries, atomic writes, locks.

A location is a path or a URL. pyarrow opens s3://, gs:// and hdfs:// by itself; fsspec opens the others (hf://, sftp://, ...).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import random
import re
import struct
import threading
import time
import uuid
from abc import abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from paligemma_vla.errors import OPEN_FILES_REMEDY, StorageError, UnreachableError, VLAError, first_line

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from pyarrow.fs import FileSystem

Result = TypeVar("Result")
Range = tuple[int, int]  # offset, and the first byte after it

NATIVE = ("s3://", "gs://", "gcs://", "hdfs://", "viewfs://")  # URLs that pyarrow opens
CONNECT_SECONDS, SILENT_SECONDS = 5.0, 20.0  # until a connection stands; and without a byte coming through it

# A store that restarts is back within minutes. What takes longer needs a human, and a run can be resumed.
ATTEMPTS = 10
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; each pause is twice the one before
PATIENCE = 300.0  # seconds; no attempt begins later
REMEDY = "check the address, the network and the credentials (for s3:// the usual AWS_ variables)"

# A request to a store takes as long as about a megabyte of its answer, so a gap of that size between two ranges is read too.
GAP_BYTES = 2**20
REQUEST_BYTES = 2**23  # of one request at most
CACHE_BYTES = 2**25

# In a clone without git-lfs such a text stands in the place of each large file.
POINTER = b"version https://git-lfs.github.com/spec/v1"
POINTER_REMEDY = "it is a pointer of git-lfs, not the file: run `git lfs pull` in its folder, or fetch it with `hf download`"

# Trash, thumbnails and old snapshots, as desktops, archives and network drives leave them beside the data.
STRANGERS = {"$recycle.bin", "recycler", "system volume information", "__macosx", "lost+found"}
STRANGERS |= {"@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"}

CUT = "its footer is missing: the recording was not finalized, or the copy not completed"

logger = logging.getLogger(__name__)
_jitter = random.Random()  # its own generator: training's random numbers must not depend on the network


def is_url(location: str) -> bool:
    """Whether a location is a URL rather than a path."""
    return re.match(r"[A-Za-z][\w+.-]*://", location) is not None


def split_url(url: str) -> tuple[str, str]:
    """A URL up to the end of its path, and the rest: options of a native URL, or the archive of `zip://a::s3://b/c.zip`."""
    mark = "?" if url.startswith(NATIVE) else "::"
    head, found, rest = url.partition(mark)
    return head, found + rest


def join_url(url: str, path: str) -> str:
    """The URL of a file, given the URL of a folder and the file's path below it as the store lists it."""
    head, rest = split_url(url)
    return f"{head.rstrip('/')}/{quote(path) if url.startswith(NATIVE) else path}{rest}"


def cache_dir(*parts: str) -> Path:
    """A folder for files that can be made again: below $XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "paligemma_vla", *parts)


def working_copy(url: str) -> Path:
    """The local folder in which a run whose folder is a URL works."""
    return cache_dir("runs", hashlib.blake2b(url.rstrip("/").encode(), digest_size=8).hexdigest())


def read_file(location: str | Path) -> bytes:
    """The content of a file. Raises `OSError`, or `StorageError` for a URL."""
    if is_url(str(location)):
        with open_source(location) as source:
            return source.read_at(0, source.size)
    return Path(location).read_bytes()


def read_json(
    location: str | Path, error: type[VLAError], remedy: str, missing: str | None = None, where: str | None = None
) -> dict[str, Any]:
    """The object in a JSON file that somebody may have edited or damaged.

    Raises `error` with `where` (by default the location), the reason and `remedy`, or `missing` when there is no such file.
    """
    where = where or str(location)
    try:
        raw = json.loads(read_file(location))
    except FileNotFoundError as cause:
        raise error(f"{where}: no such file; {missing or remedy}") from cause
    except (OSError, ValueError, RecursionError) as cause:  # RecursionError: nested too deep
        raise error(f"{where}: cannot be read as JSON ({read_failure(location, cause)}); {remedy}") from cause
    if not isinstance(raw, dict):
        raise error(f"{where}: got {type(raw).__name__}, expected a JSON object; {remedy}")
    return raw


def sha256(path: str | Path) -> str:
    """Digest of a file. Raises `StorageError` when a pointer of git-lfs stands in its place."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise StorageError(f"{path}: {POINTER_REMEDY}")
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_failure(location: str | Path, error: BaseException) -> str:
    """Why a file, or a folder of files, cannot be read: what `missing_content` says, or the error of the library that tried.

    Raises `StorageError` when it is not for the file that it cannot.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise StorageError(f"{location}: too many open files; {OPEN_FILES_REMEDY}") from error
    if not os.path.isdir(location):
        return missing_content(location) or first_line(error)
    reasons = ((path, missing_content(path)) for path in sorted(Path(location).glob("*")))
    return next((f"{path}: {reason}" for path, reason in reasons if reason), first_line(error))


def missing_content(location: str | Path) -> str | None:
    """What a library does not say of the bytes that it cannot read: a pointer of git-lfs, or a recording without its end."""
    try:
        with open_source(location) as source:
            head, tail = (source.read_at(offset, min(source.size, 64)) for offset in (0, max(0, source.size - 64)))
            parquet_cut = head.startswith(b"PAR1") and not tail.endswith(b"PAR1")
            if parquet_cut or (head[4:8] == b"ftyp" and b"moov" not in _boxes(source)):
                return CUT
    except StorageError:
        return None
    return POINTER_REMEDY if head.startswith(POINTER) else None


def _boxes(source: ByteSource) -> Iterator[bytes]:
    """Types of the complete boxes that an MP4 file begins with (ISO 14496-12)."""
    offset, size = 0, 8
    while size >= 8 and offset + 16 <= source.size:
        size, kind, long_size = struct.unpack(">I4sQ", source.read_at(offset, 16))
        size = long_size if size == 1 else size
        offset += size
        if offset <= source.size:
            yield kind


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write, which becomes `path` when the block ends: `path` is the old file or the complete new one.

    It has a temporary name (`.name`) beside `path` until then, is synced to the disk and renamed; an error removes it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: str | Path, content: bytes | memoryview | str) -> None:
    """Write a file as `atomic_file` does; text as UTF-8."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that the renames in it survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(path: Path, seconds: float = 0.0) -> BaseFileLock | None:
    """Lock a file until `release` is called or the process ends; None when another process holds it for `seconds` more.

    Raises `OSError` where the file system has no locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return None
    return lock


# Errors of Python for what is not there, or was asked wrongly: another attempt cannot help.
FINAL_ERRORS = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError, RecursionError),
)
# The same in the words of the AWS and Google clients in pyarrow, and of huggingface_hub.
FINAL_WORDS = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|MISSING_AUTHENTICATION_TOKEN|"
    r"UNRECOGNIZED_CLIENT|EXPIRED|TOO_SKEWED|NO_SUCH_|RESOURCE_NOT_FOUND|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|"
    r"Bucket '[^']*' not found|offline mode is enabled"
)
# As pyarrow ("HTTP status 503"), httpx ("Server error '503 ..."), requests and aiohttp ("503 ...") write it.
STATUS = re.compile(r"(?:HTTP status |status=|(?:Client|Server) error '|^)([345]\d\d)\b", re.IGNORECASE)
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504, 507, 509, 529}


def retry(location: str, action: Callable[[], Result], part: str = "") -> Result:
    """Call `action` until it succeeds: errors that may be gone at the next attempt are logged and retried after a pause.

    Pauses double from FIRST_PAUSE to LONGEST_PAUSE seconds, each cut by up to half at random so that the processes of a run
    do not return together. part: which bytes of the location, for messages. Raises `UnreachableError` after ATTEMPTS attempts
    or PATIENCE seconds, `StorageError` at once for any other error; a `VLAError` passes through.
    """
    start, where = time.monotonic(), f"{location}: {part}" if part else location
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except VLAError:
            raise
        except Exception as error:  # of any kind: each file system has errors of its own
            reason = first_line(error)
            if not is_transient(error):
                raise StorageError(f"{where}: cannot be reached ({reason}); {REMEDY}") from error
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1.0)
            elapsed = time.monotonic() - start
            if attempt == ATTEMPTS or elapsed + pause > PATIENCE:
                tried = f"{attempt} attempts in {elapsed:.0f} s, the last: {reason}"
                raise UnreachableError(f"{where}: cannot be reached ({tried}); {REMEDY}") from error
            logger.warning("%s: %s; again in %.1f s (attempt %d of %d)", where, reason, pause, attempt + 1, ATTEMPTS)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def is_transient(error: Exception) -> bool:
    """Whether an error of a store may be gone at the next attempt. An unknown error may."""
    if isinstance(error, FINAL_ERRORS):
        return False
    text = str(error)
    if status := STATUS.search(text):
        return int(status[1]) in TRANSIENT_STATUS
    return not FINAL_WORDS.search(text)


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises what that system raises; call it inside `retry`."""
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper

    if url.startswith(NATIVE):
        system, path = native_system(url)
        return ArrowFSWrapper(system), path
    system, path = fsspec.core.url_to_fs(url.rstrip("/"))
    return system, path


def native_system(url: str) -> tuple[FileSystem, str]:
    """pyarrow's file system of a URL that begins as in `NATIVE`, and the path in it. Raises as `file_system`."""
    parts = urlsplit(url)
    environment = frozenset(item for item in os.environ.items() if item[0].startswith(("AWS_", "GOOGLE_", "CLOUDSDK_")))
    query = f"?{parts.query}" if parts.query else ""
    system = _client(f"{parts.scheme}://{parts.netloc}/-{query}", environment, os.getpid())
    bucket = parts.netloc.rpartition("@")[2]
    key = unquote(parts.path).rstrip("/")
    return system, key if parts.scheme in ("hdfs", "viewfs") else f"{bucket}{key}"


@lru_cache(maxsize=32)  # a client keeps its connections; another environment or a fork needs another client
def _client(url: str, environment: frozenset[tuple[str, str]], process: int) -> FileSystem:
    """A client that does not retry by itself: `retry` does, and logs it."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, GcsFileSystem, S3FileSystem

    system, _ = FileSystem.from_uri(url)
    changes: dict[str, Any] = {}
    if isinstance(system, S3FileSystem):
        changes = {
            "retry_strategy": AwsStandardS3RetryStrategy(max_attempts=1),
            "connect_timeout": CONNECT_SECONDS,
            "request_timeout": SILENT_SECONDS,
        }
    elif isinstance(system, GcsFileSystem):
        changes = {"retry_time_limit": timedelta(seconds=1)}
    if not changes:
        return system
    _, (options,) = system.__reduce__()  # all that the URL and the environment said
    return type(system)(**{**options, **changes})


def is_stranger(name: str, pattern: str = "") -> bool:
    """True if a file or folder of that name is no data: it is hidden, or one of `STRANGERS`, and no part of the pattern is."""
    wanted = [part for part in pattern.split("/") if is_stranger(part)] if pattern else []
    return (name.startswith(".") or name.casefold() in STRANGERS) and not any(fnmatchcase(name, part) for part in wanted)


def find_files(folder: str, pattern: str = "") -> list[str]:
    """Files below a folder on this machine or behind a URL, without strangers: paths relative to it, sorted.

    Links are followed. A file that is reached on several ways is found once, by a way without links if there is one. Of a
    file itself the path is empty. pattern: what is searched for; it may name strangers (`*/.old/*.parquet`).
    Raises `StorageError`, and `OSError` for a folder that cannot be read.
    """
    if is_url(folder):
        return [name for name in list_files(folder) if not any(is_stranger(part, pattern) for part in name.split("/"))]
    if not os.path.isdir(folder):
        return [""] if os.path.isfile(folder) else []
    found: dict[str, str] = {}  # by the path without links
    above = (*Path(os.path.abspath(folder)).parents, *Path(os.path.realpath(folder)).parents)
    entered, links = set(map(os.path.realpath, above)), deque([""])

    def enter(name: str, real: str) -> None:
        if real in entered:  # it leads back, or is a second way
            return
        entered.add(real)
        with os.scandir(os.path.join(folder, name)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                below = os.path.join(name, entry.name)
                if is_stranger(entry.name, pattern):
                    continue
                if entry.is_symlink():
                    links.append(below)  # later: a way without links comes first
                elif entry.is_dir():
                    enter(below, os.path.join(real, entry.name))
                elif entry.is_file():
                    found[os.path.join(real, entry.name)] = below

    while links:
        name = links.popleft()
        real = os.path.realpath(os.path.join(folder, name))
        if os.path.isdir(real):
            enter(name, real)
        elif os.path.isfile(real):
            found.setdefault(real, name)
        else:
            logger.warning("%s: this link leads nowhere; what it stands for is not read", os.path.join(folder, name))
            found[name] = name  # opening it tells
    return sorted(found.values())


def list_files(url: str) -> list[str]:
    """Files below a folder behind a URL, as paths relative to it, sorted; none when it is not there. Raises `StorageError`.

    A store that fails in the middle of a listing is asked again: no file is left out silently.
    """
    try:
        found, root = retry(url, lambda: _native_files(url) if url.startswith(NATIVE) else _fsspec_files(url), "its files")
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    folder = f"{root.strip('/')}/".lstrip("/")
    return [path.removeprefix(folder) for path in sorted(path.strip("/") for path in found) if path.startswith(folder)]


def _native_files(url: str) -> tuple[list[str], str]:
    from pyarrow.fs import FileSelector, FileType

    system, path = native_system(url)
    found = system.get_file_info(FileSelector(path, recursive=True))
    return [info.path for info in found if info.type == FileType.File], path


def _fsspec_files(url: str) -> tuple[list[str], str]:
    from fsspec import AbstractFileSystem

    system, path = file_system(url)
    system.invalidate_cache()
    # fsspec's own `find` leaves out folders that it fails to list, unless asked to raise.
    strict = {"on_error": "raise"} if type(system).find is AbstractFileSystem.find else {}
    return [name for name in system.find(path, **strict) if name.rstrip("/") != path.rstrip("/")], path


class ByteSource(io.RawIOBase):
    """The bytes of one file, and an open binary file of them. It must not be used after a fork.

    Several threads may call `read_at`; `seek` and `read` are for one. location: path or URL. size: in bytes. identity: size,
    mtime_ns, and ctime_ns of a local file or 63 bits of what a store calls the file's version. All are as they were when the
    file was opened.
    """

    location: str
    size: int
    identity: tuple[int, int, int]
    _position = 0

    def read_at(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes from `offset` on. Raises `StorageError`."""
        if not 0 <= offset <= offset + count <= self.size:
            raise StorageError(f"{self.location}: bytes {offset} to {offset + count - 1} were asked for, it has {self.size}")
        return self._read(offset, count) if count else b""

    @abstractmethod
    def _read(self, offset: int, count: int) -> bytes: ...

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self.size - self._position)
        content = self.read_at(self._position, left if count is None or count < 0 else min(count, left)) if left else b""
        self._position += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def open_source(location: str | Path) -> ByteSource:
    """Open a file at a path or URL. Raises `StorageError` when it is not there, or cannot be reached."""
    return FileSource(str(location))


MARKS = (0xA5, 0x5A)  # see `FileSource._request`


class FileSource(ByteSource):
    """A file on this machine or behind a URL, where every request is retried; one is made at a time."""

    _file: Any = None

    def __init__(self, location: str) -> None:
        self.location = location
        open_file = _open_local if not is_url(location) else _open_native if location.startswith(NATIVE) else _open_fsspec
        self._file, self.identity = self._attempt(partial(open_file, location))
        self.size = self.identity[0]
        self._lock = threading.Lock()

    def _attempt(self, action: Callable[[], Result], part: str = "") -> Result:
        if is_url(self.location):
            return retry(self.location, action, part)
        try:
            return action()
        except OSError as error:
            raise StorageError(f"{self.location}: cannot be read ({first_line(error)}); restore it") from error

    def _read(self, offset: int, count: int) -> bytes:
        """In requests of REQUEST_BYTES at most, each of them retried by itself."""
        parts = []
        for first in range(offset, offset + count, REQUEST_BYTES):
            size = min(REQUEST_BYTES, offset + count - first)
            parts.append(self._attempt(partial(self._request, first, size), f"bytes {first} to {first + size - 1}"))
        return b"".join(parts)

    def _request(self, offset: int, count: int) -> bytes:
        """All the bytes, or an error.

        pyarrow's S3 client accepts an answer that is too short, and leaves the rest of the buffer as it was. So the last byte
        is set before each request. If it is unchanged afterwards, the request is repeated with another value: a byte that is
        unchanged twice was never written.
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

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def _open_local(path: str) -> tuple[Any, tuple[int, int, int]]:
    """A file, and its identity."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - the source closes it
    status = os.fstat(file.fileno())
    return file, (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _open_native(url: str) -> tuple[Any, tuple[int, int, int]]:
    """The same of a file that pyarrow opens: one request, and one for each range."""
    system, path = native_system(url)
    file = system.open_input_file(path)
    facts = file.metadata() or {}
    if "Last-Modified" in facts:  # S3 answers all at once
        modified = datetime.fromisoformat(facts["Last-Modified"].decode())
        return file, (file.size(), int(modified.timestamp()) * 10**9, _version_number(facts.get("ETag", b"")))
    return file, (file.size(), system.get_file_info(path).mtime_ns or 0, 0)


def _open_fsspec(url: str) -> tuple[Any, tuple[int, int, int]]:
    """The same of a file that fsspec opens."""
    system, path = file_system(url)
    system.invalidate_cache(system._parent(path))  # an old listing does not matter
    facts = system.info(path)
    if facts["type"] != "file":
        raise IsADirectoryError(f"{facts['type']}, expected a file")
    try:
        modified = int(system.modified(path).timestamp() * 10**9)
    except NotImplementedError:
        modified = 0
    version = _version_number(system.ukey(path).encode())
    return system.open(path, "rb", cache_type="none"), (int(facts["size"]), modified, version)


def _version_number(version: bytes) -> int:
    """63 bits of what a store calls the version of a file; 0 where it has none."""
    return int.from_bytes(hashlib.blake2b(version, digest_size=8).digest(), "little") >> 1 if version else 0


class CachedSource(ByteSource):
    """A source of which some ranges are fetched in few large requests, each when it is first needed. For one thread.

    Of what was fetched the ranges are kept, up to CACHE_BYTES, but not what lies between them. Everything else is read as it
    is asked for.
    """

    def __init__(self, source: ByteSource, ranges: Iterable[Range]) -> None:
        self.source = source
        self.location, self.size, self.identity = source.location, source.size, source.identity
        self._requests: list[list[Range]] = []
        for start, stop in sorted(ranges):
            together = self._requests[-1] if self._requests else []
            if not 0 <= start < stop <= min(start + REQUEST_BYTES, self.size):
                continue
            if together and start - together[-1][1] <= GAP_BYTES and stop - together[0][0] <= REQUEST_BYTES:
                together.append((start, stop))
            else:
                self._requests.append([(start, stop)])
        self._cache: dict[int, dict[Range, bytes]] = {}  # by number of the request, the oldest first

    def _read(self, offset: int, count: int) -> bytes:
        number = bisect_right(self._requests, offset, key=lambda together: together[0][0]) - 1
        for start, stop in self._requests[number] if number >= 0 else ():
            if start <= offset and offset + count <= stop:
                return self._fetch(number)[start, stop][offset - start : offset - start + count]
        return self.source.read_at(offset, count)

    def _fetch(self, number: int) -> dict[Range, bytes]:
        """The ranges of a request."""
        if number not in self._cache:
            ranges = self._requests[number]
            first, last = ranges[0][0], max(stop for _, stop in ranges)
            answer = self.source.read_at(first, last - first)
            self._cache[number] = {(start, stop): answer[start - first : stop - first] for start, stop in ranges}
            while sum(len(content) for parts in self._cache.values() for content in parts.values()) > CACHE_BYTES:
                del self._cache[next(iter(self._cache))]
        return self._cache[number]


def fetch(url: str, target: Path) -> Path:
    """Copy a file behind a URL to `target`. Raises `StorageError`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_source(url) as source, atomic_file(target) as file:
        for offset in range(0, source.size, REQUEST_BYTES):
            file.write(source.read_at(offset, min(REQUEST_BYTES, source.size - offset)))
    return target
