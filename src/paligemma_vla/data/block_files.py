"""Row groups of Parquet files by coarse ranges: what is near together in a file comes with one request, wherever it lies."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from paligemma_vla.byte_source import ByteSource, open_bytes
from paligemma_vla.data.byte_file import HeldBytes
from paligemma_vla.data.episode_file import TRUSTED_SECONDS
from paligemma_vla.data.episodes import EpisodeIndex
from paligemma_vla.data.faults import Fault, FaultError, Kind
from paligemma_vla.data.files import FOOTER_TAIL, file_faults, identify, open_parquet
from paligemma_vla.data.footer import column_ranges
from paligemma_vla.data.reader import columns_of, explaining
from paligemma_vla.storage import is_url

OPEN_FILES = 64
FOOTER_BYTES = 2**26  # footers that are kept, as they are stored: unfolded they would take ten times as much
FOOTER_GUESS = 2**14, 2**10  # bytes of a footer, and for each row group: asked for at once, which is mostly enough


class _OpenFile:
    """A file with its footer. It is closed when nobody uses it."""

    def __init__(self) -> None:
        self.users = 0
        self.opening = threading.Lock()
        self.source: ByteSource | None = None
        self.footer = b""

    def open(self, path: str, guess: int) -> None:
        with file_faults(path):
            source = open_bytes(path)
            try:
                self.footer = _footer(source, guess)
            except BaseException:
                source.close()
                raise
        self.source, self._identity, self._seen = source, source.identity, time.monotonic()

    def identity(self) -> tuple[int, int, int]:
        """As `EpisodeFile.identity`: that of a file behind a URL is good for a while."""
        assert self.source is not None
        if not is_url(self.source.place) or time.monotonic() - self._seen > TRUSTED_SECONDS:
            self._identity, self._seen = identify(self.source.place), time.monotonic()
        return self._identity


class BlockFiles:
    """Reads row groups of the files of an index, from several threads. Keeps some files open, with their footers."""

    def __init__(self, index: EpisodeIndex, cameras: int) -> None:
        self.index, self.cameras = index, cameras
        self._lock = threading.Lock()
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._closed = False

    def read(self, file: int, groups: Sequence[int]) -> dict[int, pa.Table]:
        """Row groups of a file, with the columns that a sample is made of.

        Raises `DataError` when they cannot be read or the file has changed, `StorageError` when it cannot be reached.
        """
        path = self.index.paths[file]
        tables = {}
        with explaining(self.index, file, groups[0]), self._opened(file) as opened:
            assert opened.source is not None
            metadata = pq.read_metadata(pa.BufferReader(opened.footer))
            columns = columns_of(metadata.schema.to_arrow_schema().names, self.cameras)
            held = HeldBytes(opened.source)
            held.expect(column_ranges(metadata, columns, groups))
            parquet = open_parquet(path, source=held, metadata=metadata)
            for group in groups:
                with explaining(self.index, file, group):
                    tables[group] = parquet.read_row_group(group, columns=columns, use_threads=False).combine_chunks()
            # After reading: what was read before a change is what was indexed.
            self.index.check_unchanged(file, opened.identity)
        return tables

    def close(self) -> None:
        """Close every file, those in use when they no longer are."""
        with self._lock:
            self._closed = True
            self._trim()

    @contextmanager
    def _opened(self, file: int) -> Iterator[_OpenFile]:
        with self._lock:
            entry = self._files.setdefault(file, _OpenFile())
            self._files.move_to_end(file)
            entry.users += 1
        try:
            with entry.opening:  # by the first that needs it
                if entry.source is None:
                    base, per_group = FOOTER_GUESS
                    entry.open(self.index.paths[file], base + per_group * len(self.index.row_groups(file)))
            yield entry
        finally:
            with self._lock:
                entry.users -= 1
                self._trim()

    def _trim(self) -> None:
        footers = sum(len(entry.footer) for entry in self._files.values())
        for file, entry in list(self._files.items()):
            if not self._closed and len(self._files) <= OPEN_FILES and footers <= FOOTER_BYTES:
                return
            if not entry.users:
                footers -= len(entry.footer)
                del self._files[file]
                if entry.source is not None:
                    entry.source.close()


def _footer(source: ByteSource, guess: int) -> bytes:
    """The end of a file: its footer, the footer's length, and the magic. guess: bytes to ask for first."""
    guess = min(source.size, guess)
    tail = source.read_at(source.size - guess, guess)
    length = int.from_bytes(tail[-FOOTER_TAIL:-4], "little") + FOOTER_TAIL
    if length > source.size:
        text = f"its footer is said to be of {length} bytes, of {source.size} in all; restore it"
        raise FaultError(Fault(source.place, Kind.FILE, text))
    return tail[-length:] if length <= guess else source.read_at(source.size - length, length)
