"""A file behind a URL as Parquet's reader wants it: a Python file, whose small reads are served out of a few large requests."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from paligemma_vla.byte_source import ByteSource, Range

# A request to a store takes as long as about a megabyte of its answer: what lies between two ranges is read along with them.
HOLE = 2**20
REQUEST = 2**23  # bytes of one request at most
HELD = 2**25  # bytes at once
TAIL = 2**19  # bytes at the end, which hold most footers


class HeldBytes(ByteSource):
    """A source whose announced ranges are fetched several at once, and kept until they are read. For one thread."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.place, self.size, self.identity = source.place, source.size, source.identity
        self.expect([(self.size - TAIL, self.size)])

    def expect(self, ranges: Iterable[Range]) -> None:
        """As far as they lie in the file; what is held is dropped."""
        self._ranges = sorted(part for whole in ranges for part in _cut(max(0, whole[0]), min(whole[1], self.size)))
        self._starts = [start for start, _ in self._ranges]
        self._requests = list(_together(self._ranges))
        self._first = [request.start for request in self._requests]
        self._held: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0

    def _read(self, offset: int, count: int) -> bytes:
        parts, stop = [], offset + count
        while offset < stop:
            number = bisect_right(self._starts, offset) - 1
            start, end = self._ranges[number] if number >= 0 else (0, 0)
            if start <= offset < end:
                parts.append(self._content(number)[offset - start : min(stop, end) - start])
            else:  # not announced
                following = self._starts[number + 1] if number + 1 < len(self._starts) else stop
                parts.append(self.source.read_at(offset, min(stop, following) - offset))
            offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _content(self, number: int) -> bytes:
        """Bytes of a range; those that are fetched with it are kept, but what lies between them is not."""
        content = self._held.get(number)
        if content is None:
            together = self._requests[bisect_right(self._first, number) - 1]
            start = self._ranges[together.start][0]
            answer = self.source.read_at(start, max(self._ranges[n][1] for n in together) - start)
            for n in together:
                self._hold(n, answer[self._ranges[n][0] - start : self._ranges[n][1] - start])
            content = answer[self._ranges[number][0] - start : self._ranges[number][1] - start]
        return content

    def _hold(self, number: int, content: bytes) -> None:
        if number not in self._held:
            self._held[number] = content
            self._bytes += len(content)
        while self._bytes > HELD:
            self._bytes -= len(self._held.popitem(last=False)[1])

    def close(self) -> None:
        self.source.close()


def _cut(start: int, stop: int) -> Iterator[Range]:
    for first in range(start, stop, REQUEST):
        yield first, min(stop, first + REQUEST)


def _together(ranges: list[Range]) -> Iterator[range]:
    """Numbers of the ranges (ordered) that are fetched by one request: near to each other, and not too much in all."""
    first = 0
    for number in range(1, len(ranges) + 1):
        if number < len(ranges):
            start, stop = ranges[number]
            if start - ranges[number - 1][1] <= HOLE and stop - ranges[first][0] <= REQUEST:
                continue
        yield range(first, number)
        first = number


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
