"""Places that are not on this machine: URLs that pyarrow (s3://, gs://, hdfs://) or fsspec (hf://, sftp://, ...) reaches."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import uuid
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

# Those that pyarrow reaches without another package.
NATIVE = ("s3://", "gs://", "gcs://", "hdfs://", "viewfs://")
# Until a connection stands; and without a byte coming through it.
CONNECT_SECONDS, SILENT_SECONDS = 5.0, 20.0


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a path."""
    return re.match(r"[A-Za-z][\w+.-]*://", place) is not None


def cache_folder(*parts: str) -> Path:
    """A folder for what can be had again: under $XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "paligemma_vla", *parts)


def working_copy(url: str) -> Path:
    """The folder of this machine that stands for a URL."""
    return cache_folder("runs", hashlib.blake2b(url.rstrip("/").encode(), digest_size=8).hexdigest())


def split_url(url: str) -> tuple[str, str]:
    """A URL without what stands after its path, and that: the options of a native one, or the places within which it lies
    (`zip://a::s3://b/c.zip`)."""
    mark = "?" if url.startswith(NATIVE) else "::"
    head, found, rest = url.partition(mark)
    return head, found + rest


def join_url(url: str, path: str) -> str:
    """The URL of a file by its path, as a store has it, below the folder behind a URL."""
    head, rest = split_url(url)
    return f"{head.rstrip('/')}/{quote(path) if url.startswith(NATIVE) else path}{rest}"


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system behind a URL, and the path in it. Raises what that system raises; `reach` tells of it."""
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper

    if url.startswith(NATIVE):
        system, path = native_system(url)
        return ArrowFSWrapper(system), path
    system, path = fsspec.core.url_to_fs(url.rstrip("/"))
    return system, path


def native_system(url: str) -> tuple[FileSystem, str]:
    """pyarrow's file system behind a URL that begins as in `NATIVE`, and the path in it. Raises as `file_system`.

    One client serves a bucket as long as nothing changes in the environment: it keeps its connections.
    """
    parts = urlsplit(url)
    surroundings = frozenset(item for item in os.environ.items() if item[0].startswith(("AWS_", "GOOGLE_", "CLOUDSDK_")))
    query = f"?{parts.query}" if parts.query else ""
    system = _client(f"{parts.scheme}://{parts.netloc}/-{query}", surroundings, os.getpid())
    bucket = parts.netloc.rpartition("@")[2]
    key = unquote(parts.path).rstrip("/")
    return system, key if parts.scheme in ("hdfs", "viewfs") else f"{bucket}{key}"


@lru_cache(maxsize=32)
def _client(url: str, surroundings: frozenset[tuple[str, str]], process: int) -> FileSystem:
    """Made so that a fault is told by the first request that meets it: pausing and asking again is `reach`'s, which logs it."""
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


def sha256(path: str | Path) -> str:
    """Digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Let the renames in a folder outlive a loss of power."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def replace_file(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file under another name, then give it its own: neither a kill nor another process leaves half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def hold_lock(path: Path) -> IO[bytes] | None:
    """Hold a lock file until it is closed, or the process ends; None when another process holds it.

    Raises `OSError` where the file system has no locks.
    """
    file = open(path, "ab")  # noqa: SIM115 - held as long as the caller is at work
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(file.fileno()).st_ino:  # else its holder has just removed it
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        file.close()
        raise
    file.close()
    return None
