"""A file behind a URL as Parquet's reader wants it: a Python file, whose small reads are served out of a few large requests."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from paligemma_vla.byte_source import ByteSource

# A request costs as long as some megabytes; but what lies between two ranges is paid for in bytes.
HOLE = 2**17
PIECE = 2**23  # bytes of one request at most, unless one read is longer
HELD = 4  # pieces at once
TAIL = 2**18  # bytes at the end that hold most footers

Range = tuple[int, int]  # offset, and the first byte after it


class HeldBytes(ByteSource):
    """A source from which ranges that were announced are fetched together when the first of them is read. For one thread."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.place, self.size, self.identity = source.place, source.size, source.identity
        self.expect([(max(0, self.size - TAIL), self.size)])

    def expect(self, ranges: Iterable[Range], hole: int = HOLE) -> None:
        """Announce what will be read from now on; what is held is dropped. hole: see `merge`."""
        self._pieces = [piece for merged in merge(ranges, hole) for piece in _cut(merged)]
        self._starts = [start for start, _ in self._pieces]
        self._held: OrderedDict[int, bytes] = OrderedDict()

    def _read(self, offset: int, count: int) -> bytes:
        parts, stop = [], offset + count
        while offset < stop:
            number = bisect_right(self._starts, offset) - 1
            start, end = self._pieces[number] if number >= 0 else (0, 0)
            if not start <= offset < end:  # not announced
                end = min(stop, self._starts[number + 1] if number + 1 < len(self._starts) else stop)
                parts.append(self.source.read_at(offset, end - offset))
            else:
                parts.append(self._piece(number)[offset - start : min(stop, end) - start])
            offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _piece(self, number: int) -> bytes:
        content = self._held.get(number)
        if content is None:
            start, end = self._pieces[number]
            content = self._held[number] = self.source.read_at(start, end - start)
            if len(self._held) > HELD:
                self._held.popitem(last=False)
        else:
            self._held.move_to_end(number)
        return content

    def close(self) -> None:
        self.source.close()


def merge(ranges: Iterable[Range], hole: int = HOLE) -> list[Range]:
    """Ranges in order, those nearer to each other than a hole worth skipping as one."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start - merged[-1][1] <= hole:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def _cut(whole: Range) -> list[Range]:
    start, stop = whole
    return [(first, min(stop, first + PIECE)) for first in range(start, stop, PIECE)]


class ByteFile(io.RawIOBase):
    """A source as an open binary file. Closing it does not close the source."""

    def __init__(self, source: ByteSource) -> None:
        self.source, self._place = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.source.size}[whence]
        return self._place

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self.source.size - self._place)
        count = left if count is None or count < 0 else min(count, left)
        content = self.source.read_at(self._place, count) if count else b""
        self._place += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
