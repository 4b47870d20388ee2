"""Places that are not on this machine: URLs that pyarrow (s3://, gs://, hdfs://) or fsspec (hf://, sftp://, ...) reaches."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from paligemma_vla.errors import StorageError, first_line

# Those that pyarrow reaches without another package.
NATIVE = ("s3://", "gs://", "gcs://", "hdfs://", "viewfs://")


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


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Tell of a place that cannot be reached."""
    try:
        yield
    except Exception as error:  # of any kind: each file system has errors of its own
        raise StorageError(
            f"{url}: cannot be reached ({first_line(error)}); check the address, the network and the credentials (for s3:// "
            f"the usual AWS_ variables)"
        ) from error


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system behind a URL, and the path in it. Raises `StorageError`."""
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSystem

    with reaching(url):
        if url.startswith(NATIVE):
            native, path = FileSystem.from_uri(url.rstrip("/"))
            return ArrowFSWrapper(native), path
        system, path = fsspec.core.url_to_fs(url.rstrip("/"))
        return system, path


def fetch(url: str, target: Path) -> Path:
    """Copy a file behind a URL to `target`, which is whole or not there. Raises `StorageError`."""
    system, path = file_system(url)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with reaching(url):
            system.get_file(path, str(temporary))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def read_file(place: str | Path, most: int = -1) -> bytes:
    """The first `most` bytes (all by default) of a file at a path or URL. Raises `OSError`, or `StorageError` for a URL."""
    if is_url(str(place)):
        system, path = file_system(str(place))
        with reaching(str(place)):
            content = bytes(system.cat_file(path))  # whole: not every store reads a part
        return content if most < 0 else content[:most]
    with open(place, "rb") as file:
        return file.read(most)


def sha256(path: str | Path) -> str:
    """Digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
