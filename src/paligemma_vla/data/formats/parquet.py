"""This project's own format: a Parquet file of episodes, on this machine or behind a URL. No image is decoded here."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from paligemma_vla import schema
from paligemma_vla.data.faults import Fault, FaultError, Kind, file_faults
from paligemma_vla.data.formats import READ_ERRORS, EpisodeFile, Pictures
from paligemma_vla.data.formats.pages import ImageChunk, find_chunk, locate_pictures
from paligemma_vla.data.images import decode
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import DatasetMetadata, Layout, Pixels, Rows
from paligemma_vla.storage import REQUEST_BYTES, ByteSource, CachedSource, Range, is_url, open_source, read_failure

FOOTER_UNFOLDS = 10  # a parsed footer against its bytes: 148 kB of 256 row groups with 7 columns took 1.5 MB
FOOTER_TAIL = 8  # length of the footer (4 bytes, little-endian) and the magic PAR1
ROWS_PER_GROUP = 32  # of EpisodeWriter, which begins a row group with each episode
STREAM_BUFFER = 2**18
TAIL_BYTES = 2**19  # at the end of a file behind a URL; most footers are smaller
SAMPLED_ROWS = 1024
MAX_DIMENSION = 4096  # of a state or an action, as in the configuration
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096  # of a file that is digested
METADATA_REMEDY = "write it as docs/data_format.md says"


class EncodedPictures(Pictures):
    """Images in a binary column."""

    def __init__(self, column: pa.Array) -> None:
        self.column = column

    def present(self, row: int) -> bool:
        return bool(self.column[row].is_valid)

    def decode(self, row: int, side: int = 0) -> Pixels:
        return decode(self.column[row].as_buffer(), side)

    def encoded(self, row: int) -> bytes | None:
        data: bytes = self.column[row].as_py()
        return data


class ParquetEpisodes(EpisodeFile):
    """A file as docs/data_format.md describes it. Raises `FaultError` when it is not Parquet or is cut short.

    Behind a URL, and with `ranges`, what a call needs of it is fetched in as few requests as possible. A format whose
    Parquet files have other columns overrides `_stored_columns` and `_translate`.
    """

    _file: pq.ParquetFile | None = None
    _source: ByteSource | None = None

    def __init__(self, name: str, location: str, stream: bool = False, ranges: bool = False) -> None:
        self.path, self._location, self._stream = name, location, stream
        self._read_whole: set[str] = set()  # columns whose images cannot be read one by one
        if ranges or is_url(location):
            with file_faults(name):
                self._source = open_source(location)
                self._footer = read_footer(self._source)
        if self._source is not None and is_url(name):
            self._identified = self._source.identity, time.monotonic()
        file = self._open()
        if self._source is None:
            self._file, self.nbytes = file, FOOTER_UNFOLDS * int(file.metadata.serialized_size)
        else:  # of many open files the footers are kept as they are stored
            self.nbytes = len(self._footer)
        self.arrow = file.schema_arrow
        self.bounds = group_bounds(file)
        self.columns = self.arrow.names
        known = {schema.STATE, schema.ACTION, schema.PROMPT, *schema.FLAGS}
        known |= {schema.image_column(n + 1) for n in range(count_cameras(self.arrow))}
        self.unused = [column for column in self.columns if column not in known]

    def _open(self, columns: Iterable[str] = (), groups: Iterable[int] = ()) -> pq.ParquetFile:
        """The file, to read some stored columns of some row groups. Raises `FaultError` when it is not Parquet or is cut short.

        What is read by ranges is opened anew each time, with a cache of its own, so that several threads can read.
        """
        if self._file is not None:
            return self._file
        options = {
            "memory_map": False,  # reading a mapped file that was cut short kills the process
            "pre_buffer": False,  # it goes through other threads, which costs a small row group more than it saves
            "page_checksum_verification": True,
        }
        try:
            if self._source is None:
                return pq.ParquetFile(open_table(self._location), buffer_size=STREAM_BUFFER if self._stream else 0, **options)
            metadata = pq.read_metadata(pa.BufferReader(self._footer))
            source = CachedSource(self._source, column_ranges(metadata, columns, groups))
            return pq.ParquetFile(source, metadata=metadata, buffer_size=REQUEST_BYTES if self._stream else 0, **options)
        except READ_ERRORS as error:
            text = f"cannot be read as Parquet ({read_failure(self._location, error)}); restore it, or take it out of the data"
            raise FaultError(Fault(self.path, Kind.FILE, text)) from error

    @property
    def outside(self) -> Rows:
        return np.empty((0, 2), np.int64)

    def survey(self) -> tuple[Layout, list[Fault]]:
        path, arrow = self.path, self.arrow
        if self.bounds[-1] == 0:
            text = "got 0 rows, expected at least one episode; take the file out of the data"
            return Layout(0, 0, 0, DatasetMetadata()), [Fault(path, Kind.EMPTY, text)]
        faults = list(_column_faults(path, arrow))
        dimensions = {schema.STATE: 0, schema.ACTION: 0}
        file = self._open(dimensions, [0])
        for name in dimensions.keys() - {fault.column for fault in faults}:
            try:
                dimensions[name] = _dimension(path, file, name)
            except FaultError as error:
                faults.append(error.fault)
        metadata, stored = DatasetMetadata(), (arrow.metadata or {}).get(schema.METADATA_KEY)
        try:
            metadata = DatasetMetadata.from_json(stored) if stored else metadata
            misfits = metadata.misfits(*dimensions.values()) if all(dimensions.values()) else []
        except DataError as error:
            misfits = [str(error)]
        faults += [Fault(path, Kind.METADATA, f"{text}; {METADATA_REMEDY}") for text in misfits]
        return Layout(count_cameras(arrow), dimensions[schema.STATE], dimensions[schema.ACTION], metadata), faults

    def read(self, columns: Sequence[str]) -> pa.Table:
        stored = self._stored_columns(columns)
        table = self._open(stored, range(len(self.bounds) - 1)).read(columns=stored, use_threads=False)
        return self._translate(columns, table, np.arange(self.bounds[-1]))

    def read_groups(self, columns: Sequence[str], groups: Sequence[int]) -> Iterator[pa.Table]:
        stored = self._stored_columns(columns)
        file = self._open(stored, groups)
        for group in groups:
            table = file.read_row_group(group, columns=stored, use_threads=False)
            yield self._translate(columns, table, np.arange(*self.bounds[group : group + 2]))

    def batches(self, columns: Sequence[str], groups: Sequence[int], rows: int) -> Iterator[tuple[Rows, pa.RecordBatch]]:
        stored = self._stored_columns(columns)
        file = self._open(stored, groups)
        numbers = np.concatenate([self.bounds[:0], *(np.arange(*self.bounds[group : group + 2]) for group in groups)])
        for batch in file.iter_batches(rows, row_groups=list(groups), columns=stored, use_threads=False):
            here, numbers = numbers[: batch.num_rows], numbers[batch.num_rows :]
            table = self._translate(columns, pa.Table.from_batches([batch]), here)
            yield here, table.combine_chunks().to_batches()[0]

    def _stored_columns(self, columns: Sequence[str]) -> list[str]:
        """Columns of the file that hold `columns`."""
        return list(columns)

    def _translate(self, columns: Sequence[str], table: pa.Table, rows: Rows) -> pa.Table:
        """`columns` of some rows, made of the stored columns."""
        return table

    def without(self, column: str) -> str:
        return f"write the files without {column}"

    def pictures(self, column: pa.Array, videos: VideoDecoders) -> Pictures:
        return EncodedPictures(column)

    def locate(self, column: str, group: int, check: Callable[[], None]) -> Pictures | None:
        images = self._find_chunk(column, group)
        if images is None or column in self._read_whole:
            return None
        located = locate_pictures(self._location, images, check)
        if located is None:  # nor are they, most likely, in the other row groups, and looking costs time
            self._read_whole.add(column)
        return located

    def loaded_bytes(self, cameras: int) -> Rows:
        metadata, found = self._open().metadata, []
        images = [name for name in (schema.image_column(n + 1) for n in range(cameras)) if name in self.columns]
        for group in range(len(self.bounds) - 1):
            loaded = [name for name in images if self._find_chunk(name, group) is None]
            stored = self._stored_columns([schema.STATE, schema.ACTION, schema.PROMPT, *loaded])
            found.append(sum(end - begin for begin, end in column_ranges(metadata, stored, [group])))
        return np.array(found, np.int64)

    def _find_chunk(self, column: str, group: int) -> ImageChunk | None:
        stored = self._image_column(column)
        if self._file is None or self.arrow.names.count(stored) != 1:
            return None
        return find_chunk(self._file.metadata, self.arrow.field(stored), group)

    def _image_column(self, column: str) -> str | None:
        """Column of the file that holds a camera's encoded images; None where they are in none."""
        return column

    def digest(self) -> int:
        metadata = self._open().metadata
        complete = schema.CONTENT_KEY in (metadata.metadata or {})
        if self._source is not None:
            return file_digest(self._source, self._footer, complete)
        with file_faults(self.path), open_source(self._location) as source:
            length = metadata.serialized_size + FOOTER_TAIL
            return file_digest(source, source.read_at(source.size - length, length), complete)

    def row_faults(self) -> list[Fault]:
        return []

    def flags_from_footer(self) -> list[Rows] | None:
        return flag_rows(self._open().metadata, self.bounds)

    def close(self) -> None:
        if self._file is not None:
            self._file.close(force=True)
        if self._source is not None:
            self._source.close()


def open_table(path: str) -> pa.NativeFile:
    """A file for pyarrow, which takes a relative path with a colon for a URL, and only names in UTF-8. Raises `OSError`."""
    return pa.OSFile(os.fsencode(path))


def group_bounds(file: pq.ParquetFile) -> Rows:
    """First row of each row group, and the number of rows at the end (G + 1,)."""
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    return np.cumsum([0, *sizes], dtype=np.int64)


def count_cameras(arrow: pa.Schema) -> int:
    """Number of image columns, counted from 1 without a gap."""
    cameras = 0
    while schema.image_column(cameras + 1) in arrow.names:
        cameras += 1
    return cameras


def _column_faults(path: str, arrow: pa.Schema) -> Iterator[Fault]:
    cameras = max(1, count_cameras(arrow))
    for name, matches, expected in [
        (schema.image_column(1), is_binary, "binary"),
        *((schema.image_column(n + 1), is_binary_or_null, "binary") for n in range(1, cameras)),
        *((name, _is_number_list, "a list of float32 or float64") for name in (schema.STATE, schema.ACTION)),
        (schema.PROMPT, is_text, "string"),
        *((flag, pa.types.is_boolean, "bool") for flag in schema.FLAGS),
    ]:
        count = arrow.names.count(name)
        if count == 0:
            yield Fault(path, Kind.COLUMN, f"missing; got {', '.join(map(ascii, arrow.names))[:500]}", column=name)
        elif count > 1:
            yield Fault(path, Kind.COLUMN, f"got {count} columns of that name, expected one", column=name)
        elif not matches(arrow.field(name).type):
            yield Fault(path, Kind.TYPE, f"got type {arrow.field(name).type}, expected {expected}", column=name)
    numbers = [int(match[1]) for name in arrow.names if (match := re.fullmatch(r"image_([1-9]\d{0,8})_bytes", name))]
    after, last = schema.image_column(cameras + 1), max(numbers, default=0)
    if last > cameras:
        text = f"missing, but {schema.image_column(last)} is there; number cameras without a gap, or rename what is none"
        yield Fault(path, Kind.COLUMN, text, column=after)


def is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_binary_or_null(kind: pa.DataType) -> bool:
    """pyarrow writes a column in which every row is null without a type."""
    return is_binary(kind) or bool(pa.types.is_null(kind))


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_list(kind: pa.DataType) -> bool:
    """True for lists of any length or of a fixed one."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number_list(kind: pa.DataType) -> bool:
    return is_list(kind) and bool(pa.types.is_floating(kind.value_type))


def _dimension(path: str, file: pq.ParquetFile, name: str) -> int:
    """Numbers per row: the most frequent length at the beginning of the first row group that can be read.

    Not the first row's: that row may be at fault, and be left out.
    """
    kind = file.schema_arrow.field(name).type
    dimension = int(kind.list_size) if pa.types.is_fixed_size_list(kind) else 0
    why = "its lists are empty"
    for group in range(0 if dimension else file.metadata.num_row_groups):
        try:
            batch = next(file.iter_batches(SAMPLED_ROWS, row_groups=[group], columns=[name], use_threads=False), None)
        except READ_ERRORS as error:
            why = first_line(error)
            continue
        lengths = [] if batch is None else batch.column(0).value_lengths().drop_null().to_numpy()
        counts = np.bincount(np.minimum(lengths, MAX_DIMENSION + 1).astype(np.int64), minlength=1)
        if dimension := int(counts.argmax()):
            break
    if not 0 < dimension <= MAX_DIMENSION:  # of a damaged schema: do not even ask for the memory of such lists
        got = f"cannot be read ({why})" if not dimension else f"got lists of more than {MAX_DIMENSION} numbers"
        raise FaultError(Fault(path, Kind.GROUP, f"{got}, expected some numbers in each; restore the file", column=name))
    return dimension


def read_footer(source: ByteSource) -> bytes:
    """The end of a Parquet file: its footer, the length of that, and the magic. Of a damaged file it may be anything."""
    tail = source.read_at(max(0, source.size - TAIL_BYTES), min(source.size, TAIL_BYTES))
    length = min(source.size, int.from_bytes(tail[-FOOTER_TAIL:-4], "little") + FOOTER_TAIL)
    return tail[-length:] if length <= len(tail) else source.read_at(source.size - length, length)


def file_digest(source: ByteSource, footer: bytes, complete: bool) -> int:
    """64 bits over a readable Parquet file: its footer, and blocks spread evenly over it (all of a small file).

    The footer holds sizes, offsets, statistics, schema and metadata. complete: EpisodeWriter put a digest of every value
    there, so nothing else is read. What another writer left without statistics may change between the blocks unseen. It does
    not depend on the file's name, location and dates.
    """
    digest = hashlib.blake2b(footer[:-FOOTER_TAIL], digest_size=8)
    if not complete:
        _digest_blocks(digest, source)
    return int.from_bytes(digest.digest(), "little")


def sample_digest(source: ByteSource) -> bytes:
    """As `file_digest`, of a file of any kind: size, and blocks spread evenly over it."""
    digest = hashlib.blake2b(source.size.to_bytes(8, "little"), digest_size=8)
    _digest_blocks(digest, source)
    return digest.digest()


def _digest_blocks(digest: hashlib.blake2b, source: ByteSource) -> None:
    size, last = source.size, SAMPLED_BLOCKS - 1
    blocks = [(n * (size - BLOCK_BYTES) // last, BLOCK_BYTES) for n in range(SAMPLED_BLOCKS)]
    if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
        blocks = [(0, size)]
    if is_url(source.location):
        source = CachedSource(source, [(offset, offset + count) for offset, count in blocks])
    for offset, count in blocks:
        digest.update(source.read_at(offset, count))


def column_ranges(metadata: pq.FileMetaData, columns: Iterable[str], groups: Iterable[int]) -> list[Range]:
    """Byte ranges of the chunks of some columns in a Parquet file. A name may have dots, as the paths within a column."""
    names, ranges = tuple(f"{name}." for name in columns), []
    for number in groups:
        group = metadata.row_group(number)
        for chunk in (group.column(leaf) for leaf in range(group.num_columns)):
            if not f"{chunk.path_in_schema}.".startswith(names):
                continue
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
                start = min(start, chunk.dictionary_page_offset)
            ranges.append((start, start + chunk.total_compressed_size))
    return ranges


def flag_rows(metadata: pq.FileMetaData, bounds: Rows) -> list[Rows] | None:
    """Rows in which each flag is true, as EpisodeWriter's row groups and their statistics determine it; else None.

    bounds: first row of each row group, and the number of rows (G + 1,). A file that something else has written from one of
    EpisodeWriter's may still carry its metadata: row groups that are not exactly EpisodeWriter's determine nothing.
    """
    count = (metadata.metadata or {}).get(schema.EPISODES_KEY, b"")
    true = np.array(list(_flags_in_groups(metadata)), bool).reshape(-1, len(schema.FLAGS))
    if not count.isdigit() or len(true) != len(bounds) - 1:
        return None
    first, last, terminal = (np.flatnonzero(column) for column in true.T)
    expected = np.append(first[1:], len(true)) - 1
    if len(first) != int(count) or len(first) == 0 or first[0] != 0 or not np.array_equal(last, expected):
        return None
    sizes, inner = np.diff(bounds), np.isin(np.arange(len(true)), last, invert=True)
    if not (sizes <= ROWS_PER_GROUP).all() or not (sizes[inner] == ROWS_PER_GROUP).all() or not np.isin(terminal, last).all():
        return None
    return [bounds[first], bounds[last + 1] - 1, bounds[terminal + 1] - 1]


def _flags_in_groups(metadata: pq.FileMetaData) -> Iterator[list[bool]]:
    """For each flag, True if it is true anywhere in a row group; ends at a group whose statistics do not say."""
    paths = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
    if not set(schema.FLAGS) <= set(paths):
        return
    leaves = [paths.index(name) for name in schema.FLAGS]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        facts = [group.column(leaf).statistics for leaf in leaves]
        if not all(fact is not None and fact.has_min_max and fact.has_null_count and not fact.null_count for fact in facts):
            return
        yield [bool(fact.max) for fact in facts]
