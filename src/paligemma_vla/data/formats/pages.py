"""Images of a Parquet file one by one: where each is in the file, so that one sample does not read a long episode.

pyarrow reads a column chunk (a column in a row group) from its first page to its last, and the usual writers put all images of
an episode into one page, or into the dictionary before it: a page index would not help. So the pages are gone through once, as
github.com/apache/parquet-format describes them, and the places of the images are kept. What is not handled here (other codecs
and encodings, damage) pyarrow reads, or says what is wrong with it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from paligemma_vla.data.faults import LEAVE_OUT, Kind, Unusable, file_faults
from paligemma_vla.data.formats import READ_ERRORS, Pictures
from paligemma_vla.data.images import decode
from paligemma_vla.errors import StorageError, first_line
from paligemma_vla.schema import Pixels, Rows
from paligemma_vla.storage import ByteSource, open_source

SMALLEST_CHUNK = 2**16  # bytes; a smaller one is read as fast as it is gone through
OBJECT_BYTES = 2**12  # that the objects of a chunk take beside their numbers (measured: 3 kB)
SMALLEST_IMAGE = 2**10  # bytes on average; each takes a turn of a loop
HEADER_BYTES = 2**14  # of a page, at most; statistics in it hold a smallest and a largest value
DATA_PAGE, DICTIONARY_PAGE = 0, 2
PLAIN, DICTIONARY_ENCODINGS = 0, (2, 8)
SNAPPY_BLOCK = 2**16  # bytes that Snappy packs without regard to those before
FEW_PARTS, SHORTEST_PART = 64, 2**8  # of encoded images a part takes 2**16 bytes; each takes a turn of a loop
CODECS = {"UNCOMPRESSED": None, "SNAPPY": "snappy"}
DAMAGE = (StorageError, IndexError, KeyError, TypeError, OverflowError, RecursionError, *READ_ERRORS)


class Places(NamedTuple):
    """Where the values of a column chunk are.

    start, length: of each row's value in the content of all pages, unpacked, one after the other (R,); length -1: null.
    content, begin, end: pieces of that which are read as one: where they are in it, and in the file (B,). Without a codec a
    piece is a page, of which any part can be read.
    """

    start: Rows
    length: Rows
    content: Rows
    begin: Rows
    end: Rows
    codec: str | None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.start, self.length, self.content, self.begin, self.end))

    def read(self, source: ByteSource, row: int) -> bytes:
        """The value of a row that has one. Raises `StorageError`, or what is in `READ_ERRORS`."""
        start, length = int(self.start[row]), int(self.length[row])
        if not length:
            return b""
        first, last = (np.searchsorted(self.content, (start, start + length - 1), side="right") - 1).tolist()
        begin, end, skip = int(self.begin[first]), int(self.end[last]), start - int(self.content[first])
        if self.codec is None:
            return source.read_at(begin + skip, length)
        size = int(self.content[last + 1] - self.content[first])
        packed = _to_varint(size) + source.read_at(begin, end - begin)
        unpacked: bytes = pa.Codec(self.codec).decompress(packed, size, asbytes=True)
        return unpacked[skip : skip + length]


class LocatedPictures(Pictures):
    """Images of which each is read from a local file when it is decoded.

    modified: of the file when they were located, see `_modified`. check: raises when the file is not the one that was indexed.
    """

    def __init__(self, location: str, places: Places, modified: tuple[int, int], check: Callable[[], None]) -> None:
        self.location, self.places, self.modified, self.check = location, places, modified, check
        self.nbytes = OBJECT_BYTES + places.nbytes

    def present(self, row: int) -> bool:
        return bool(self.places.length[row] >= 0)

    def decode(self, row: int, side: int = 0) -> Pixels:
        return decode(self.encoded(row), side)

    def encoded(self, row: int) -> bytes:
        try:
            with file_faults(self.location), open_source(self.location) as source:
                return self.places.read(source, row)
        except READ_ERRORS as error:
            raise Unusable(Kind.IMAGE, f"cannot be read ({first_line(error)}); restore the file, or {LEAVE_OUT}") from error
        finally:  # what was read before a change is what was indexed; and that it has changed is the better explanation
            if _modified(self.location) != self.modified:
                self.check()


class ImageChunk(NamedTuple):
    """A column chunk of encoded images that are large enough to be read one by one.

    levels: definition level of an image that is there. plain: a column of images, not of structs that have them as `bytes`.
    """

    chunk: pq.ColumnChunkMetaData
    rows: int
    levels: int
    plain: bool


def find_chunk(metadata: pq.FileMetaData, field: pa.Field, group: int) -> ImageChunk | None:
    """The images of a column in a row group, if its footer does not say that pyarrow has to read them.

    `metadata.schema` knows levels and paths too, but refers back to the footer: both would stay until garbage is collected.
    """
    fields = [field, *(inner for inner in (field.type if pa.types.is_struct(field.type) else ()) if inner.name == "bytes")]
    kind, path = fields[-1].type, ".".join(part.name for part in fields)
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        return None
    found = metadata.row_group(group)
    chunks = (found.column(number) for number in range(found.num_columns))
    chunk = next((one for one in chunks if one.path_in_schema == path), None)
    if chunk is None or chunk.compression not in CODECS:
        return None
    if chunk.total_uncompressed_size < max(SMALLEST_CHUNK, SMALLEST_IMAGE * found.num_rows):
        return None
    return ImageChunk(chunk, found.num_rows, sum(part.nullable for part in fields), len(fields) == 1)


def locate_pictures(location: str, images: ImageChunk, check: Callable[[], None]) -> LocatedPictures | None:
    """The images of a chunk of a local file; None when pyarrow has to read them."""
    modified = _modified(location)
    with suppress(*DAMAGE), open_source(location) as source:
        places = _locate(source, images)
        if images.plain or (places.length >= 0).all():  # of a struct without bytes, the image is elsewhere
            return LocatedPictures(location, places, modified, check)
    return None


def _modified(location: str) -> tuple[int, int]:
    """Size of a file, and when it was modified; (0, 0): there is none."""
    try:
        status = os.stat(location)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _locate(source: ByteSource, images: ImageChunk) -> Places:
    """Raises what is in `DAMAGE` for what is damaged, or of another kind."""
    chunk, codec = images.chunk, CODECS[images.chunk.compression]
    offset = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    end, size = offset + chunk.total_compressed_size, 0
    dictionary, spans = np.empty((0, 2), np.int64), [np.empty((0, 2), np.int64)]
    pieces: list[tuple[int, int, int]] = []
    while offset < end:
        header, length = _struct(source.read_at(offset, min(HEADER_BYTES, end - offset)), 0)
        offset += length
        page = content = source.read_at(offset, header[3])
        if 4 in header and zlib.crc32(page) != header[4] % 2**32:
            raise ValueError("wrong checksum")
        if codec is None:
            pieces.append((size, offset, offset + len(page)))
        else:
            content = pa.Codec(codec).decompress(page, header[2], asbytes=True)
            blocks = _snappy_blocks(page, header[2])
            pieces += [(size + n * SNAPPY_BLOCK, offset + blocks[n], offset + blocks[n + 1]) for n in range(len(blocks) - 1)]
        if header[1] == DICTIONARY_PAGE:
            dictionary = _plain(content, 0, header[7][1], size)
        elif header[1] == DATA_PAGE:
            spans.append(_values(content, header[5][1], header[5][2], images.levels, dictionary, size))
        else:
            raise ValueError("a page of another kind")
        size, offset = size + len(content), offset + len(page)
    start, lengths = np.concatenate(spans).T
    if len(start) != images.rows:
        raise ValueError(f"got {len(start)} values, expected {images.rows}")
    begins, begin, ends = np.array(pieces, np.int64).T
    return Places(start, lengths, np.append(begins, size), begin, ends, codec)


def _values(content: bytes, count: int, encoding: int, levels: int, dictionary: Rows, offset: int) -> Rows:
    """Start and length of the values of a data page (count, 2), whose content begins at `offset`; those of a null are 0, -1."""
    there, position = np.ones(count, bool), 0
    if levels:
        position = 4 + int.from_bytes(content[:4], "little")
        there = _hybrid(content, 4, levels.bit_length(), count) == levels
    number = int(there.sum())
    if encoding == PLAIN:
        values = _plain(content, position, number, offset)
    elif encoding in DICTIONARY_ENCODINGS:
        values = dictionary[_hybrid(content, position + 1, content[position], number)]
    else:
        raise ValueError(f"encoding {encoding}")
    spans = np.full((count, 2), (0, -1))
    spans[there] = values
    return spans


def _plain(content: bytes, position: int, count: int, offset: int) -> Rows:
    """Start and length of values that follow each other, each after its length (count, 2)."""
    spans = []
    for _ in range(count):
        length = int.from_bytes(content[position : position + 4], "little")
        spans.append((offset + position + 4, length))
        position += 4 + length
    if position > len(content):
        raise ValueError("the values do not fit into their page")
    return np.array(spans, np.int64).reshape(-1, 2)


def _hybrid(content: bytes, position: int, width: int, count: int) -> Rows:
    """Numbers of `width` bits, in runs of one number or packed by eights (count,)."""
    if width > 32:
        raise ValueError(f"numbers of {width} bits")
    runs, left = [np.empty(0, np.int64)], count
    while left > 0:
        header, position = _varint(content, position)
        size = (header >> 1) * width if header & 1 else (width + 7) // 8
        if header & 1:
            packed = np.frombuffer(content, np.uint8, size, position)
            numbers = np.unpackbits(packed, bitorder="little").reshape(8 * (header >> 1), width) @ (1 << np.arange(width))
        else:
            numbers = np.full(min(header >> 1, left), int.from_bytes(content[position : position + size], "little"))
        runs.append(numbers)
        position, left = position + size, left - len(numbers)
    return np.concatenate(runs)[:count]


def _snappy_blocks(page: bytes, size: int) -> list[int]:
    """Where the blocks of a page in Snappy's format begin, and the last one ends.

    Raises `ValueError` when they cannot be unpacked one by one, or when it can be packed so well that the loop would be slow.
    """
    _, position = _varint(page, 0)
    blocks, unpacked = [position], 0
    for _ in range(FEW_PARTS + len(page) // SHORTEST_PART):
        if position >= len(page):
            break
        kind, number = page[position] & 3, page[position] >> 2
        if kind == 0:  # bytes as they are; more than 60 have their length in the next bytes
            more = max(0, number - 59)
            length = 1 + (int.from_bytes(page[position + 1 : position + 1 + more], "little") if more else number)
            position += 1 + more + length
        else:  # a copy of what was unpacked before
            more = (1, 2, 4)[kind - 1]
            distance = int.from_bytes(page[position + 1 : position + 1 + more], "little")
            distance, length = (distance + (number >> 3 << 8), 4 + (number & 7)) if kind == 1 else (distance, 1 + number)
            if distance > unpacked % SNAPPY_BLOCK:
                raise ValueError("a copy from another block")
            position += 1 + more
        unpacked += length
        if unpacked > len(blocks) * SNAPPY_BLOCK:
            raise ValueError("blocks of another size")
        if unpacked == min(len(blocks) * SNAPPY_BLOCK, size):
            blocks.append(position)
    if (position, unpacked) != (len(page), size):
        raise ValueError("not gone through")
    return blocks


def _struct(content: bytes, position: int) -> tuple[dict[int, Any], int]:
    """A structure in Thrift's compact protocol: its fields by number, without texts, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while content[position]:
        kind, step = content[position] & 15, content[position] >> 4
        position += 1
        if not step:
            raise ValueError("a field far from the one before")
        number += step
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (5, 6):
            value, position = _varint(content, position)
            fields[number] = value >> 1 ^ -(value & 1)
        elif kind == 8:
            length, position = _varint(content, position)
            position += length
        elif kind == 12:
            fields[number], position = _struct(content, position)
        else:
            raise ValueError(f"a field of kind {kind}")
    return fields, position + 1


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while content[position] & 128:
        value |= (content[position] & 127) << shift
        position, shift = position + 1, shift + 7
    return value | content[position] << shift, position + 1


def _to_varint(value: int) -> bytes:
    head = []
    while value >= 128:
        head.append(value & 127 | 128)
        value >>= 7
    return bytes([*head, value])
