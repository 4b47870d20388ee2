"""This project's own format: a Parquet file of episodes, on this machine or behind a URL. No image is decoded here."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from paligemma_vla import schema
from paligemma_vla.data.faults import Fault, FaultError, Kind, file_faults
from paligemma_vla.data.formats import FOOTER_UNFOLDS, READ_ERRORS, TRUSTED_SECONDS, EpisodeFile, Pictures
from paligemma_vla.data.images import decode
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import DatasetMetadata, Layout, Rows
from paligemma_vla.storage import ByteFile, ByteSource, CachedSource, Range, is_url, open_source

STREAM_BUFFER = 2**18
SAMPLED_ROWS = 1024
MOST_NUMBERS = 4096  # in a state or an action, as in the configuration
METADATA_REMEDY = "write it as docs/data_format.md says"
NAMED = 20  # columns named in a message
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096  # of a file that is digested
FOOTER_TAIL = 8  # length of the footer (4 bytes, little-endian) and the magic PAR1
ROWS_PER_GROUP = 32  # of EpisodeWriter, which begins a row group with each episode


class EncodedPictures(Pictures):
    """Images in a binary column."""

    def __init__(self, column: pa.Array) -> None:
        self.column = column

    def present(self, place: int) -> bool:
        return bool(self.column[place].is_valid)

    def decode(self, place: int) -> Image.Image:
        return decode(self.column[place].as_buffer())

    def encoded(self, place: int) -> bytes | None:
        data: bytes = self.column[place].as_py()
        return data


class ParquetEpisodes(EpisodeFile):
    """A file as docs/data_format.md describes it. Raises `FaultError` when it is not Parquet or is cut short.

    Behind a URL it is read by ranges: what a call needs of it is fetched in as few requests as it takes.
    """

    def __init__(self, path: str, stream: bool = False) -> None:
        self.path = path
        self._remote: CachedSource | None = None
        if is_url(path):
            with file_faults(path):
                self._remote = CachedSource(open_source(path))
            self._identity, self._seen = self._remote.identity, time.monotonic()
        self._file = open_parquet(path, stream, self._remote)
        self.bounds = group_bounds(self._file)
        self.outside = np.empty((0, 2), np.int64)
        # Its footer as objects, of which there are many for each column of each row group.
        self.nbytes = FOOTER_UNFOLDS * int(self._file.metadata.serialized_size)

    @property
    def columns(self) -> Sequence[str]:
        names: list[str] = self._file.schema_arrow.names
        return names

    @property
    def unused(self) -> Sequence[str]:
        known = {schema.STATE, schema.ACTION, schema.PROMPT, *schema.FLAGS}
        known.update(schema.image_column(number + 1) for number in range(count_cameras(self._file.schema_arrow)))
        return [name for name in self.columns if name not in known]

    def survey(self) -> tuple[Layout, list[Fault]]:
        return survey(self.path, self._file)

    def read(self, columns: Sequence[str], group: int | None = None) -> pa.Table:
        self._expect(columns, range(len(self.bounds) - 1) if group is None else [group])
        if group is None:
            table = self._file.read(columns=list(columns), use_threads=False)
        else:
            table = self._file.read_row_group(group, columns=list(columns), use_threads=False)
        self._expect((), ())  # what was held is in the table
        return table

    def batches(self, columns: Sequence[str], groups: Sequence[int], rows: int) -> Iterator[pa.RecordBatch]:
        self._expect(columns, groups)
        batches: Iterator[pa.RecordBatch] = self._file.iter_batches(
            batch_size=rows, row_groups=list(groups), columns=list(columns), use_threads=False
        )
        return batches

    def _expect(self, columns: Sequence[str], groups: Iterable[int]) -> None:
        if self._remote is not None:
            self._remote.expect(column_ranges(self._file.metadata, columns, groups))

    def pictures(self, column: pa.Array, videos: VideoDecoders) -> Pictures:
        return EncodedPictures(column)

    def digest(self) -> int:
        if self._remote is not None:
            return file_digest(self._remote, self._file.metadata)
        with file_faults(self.path), open_source(self.path) as source:
            return file_digest(source, self._file.metadata)

    def told_flags(self) -> list[Rows] | None:
        return flag_rows(self._file.metadata, self.bounds)

    def identity(self) -> tuple[int, int, int]:
        """Asking a store costs a request, so its answer is good for a while."""
        if self._remote is None:
            return identify(self.path)
        if time.monotonic() - self._seen > TRUSTED_SECONDS:
            self._identity, self._seen = identify(self.path), time.monotonic()
        return self._identity

    def close(self) -> None:
        self._file.close()
        if self._remote is not None:
            self._remote.close()


def open_parquet(
    path: str, stream: bool = False, source: ByteSource | None = None, metadata: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """Open one file; its page checksums, where it has them, are verified by whatever reads from it.

    stream: columns are read piece by piece, so that a large row group need not fit into memory. source: its bytes, for a
    file behind a URL. metadata: its footer, where that has been read.
    Raises `FaultError` when it is not Parquet or is cut short.
    """
    if not _is_encodable(path):  # pyarrow takes no other
        raise FaultError(Fault(path, Kind.FILE, "its path is not UTF-8; rename it, or take it out of the data"))
    try:
        return pq.ParquetFile(
            path if source is None else ByteFile(source),
            metadata=metadata,
            memory_map=False,  # reading a mapped file that was cut short kills the process
            pre_buffer=False,  # it goes through other threads, which costs a small row group more than it saves
            buffer_size=STREAM_BUFFER if stream else 0,
            page_checksum_verification=True,
        )
    except READ_ERRORS as error:
        text = f"cannot be read as Parquet ({first_line(error)}); restore it, or take it out of the data"
        raise FaultError(Fault(path, Kind.FILE, text)) from error


def _is_encodable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def group_bounds(file: pq.ParquetFile) -> Rows:
    """First row of each row group, and the number of rows at the end (G + 1,)."""
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    return np.cumsum([0, *sizes], dtype=np.int64)


def file_digest(source: ByteSource, metadata: pq.FileMetaData) -> int:
    """64 bits over a readable Parquet file: its footer, and blocks spread evenly over it (all of a small file).

    The footer, of which `metadata` is made, holds sizes, offsets, statistics, schema and metadata. EpisodeWriter puts a
    digest of every value there, so of its files nothing else is read. What another writer left without statistics may change
    between the blocks unseen. It does not depend on the file's name, place and dates.
    """
    length = int.from_bytes(source.read_at(source.size - FOOTER_TAIL, 4), "little")
    footer = source.read_at(source.size - FOOTER_TAIL - length, length)
    digest = hashlib.blake2b(footer, digest_size=8)
    if schema.CONTENT_KEY not in (metadata.metadata or {}):
        blocks = _sampled_blocks(source.size)
        source.expect((offset, offset + count) for offset, count in blocks)
        for offset, count in blocks:
            digest.update(source.read_at(offset, count))
    return int.from_bytes(digest.digest(), "little")


def sample_digest(source: ByteSource) -> bytes:
    """As `file_digest`, of a file of any kind: size, and blocks spread evenly over it."""
    digest = hashlib.blake2b(source.size.to_bytes(8, "little"), digest_size=8)
    for offset, count in _sampled_blocks(source.size):
        digest.update(source.read_at(offset, count))
    return digest.digest()


def _sampled_blocks(size: int) -> list[tuple[int, int]]:
    """Offset and length of the blocks of a file that `file_digest` reads."""
    if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
        return [(0, size)]
    return [(n * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1), BLOCK_BYTES) for n in range(SAMPLED_BLOCKS)]


def survey(path: str, file: pq.ParquetFile) -> tuple[Layout, list[Fault]]:
    """Layout of one open file, and every fault of its columns; dimensions that a fault hides are 0."""
    if file.metadata.num_rows == 0:
        text = "got 0 rows, expected at least one episode; take the file out of the data"
        return Layout(0, 0, 0, DatasetMetadata()), [Fault(path, Kind.EMPTY, text)]
    faults = list(_column_faults(path, file.schema_arrow))
    dimensions = {schema.STATE: 0, schema.ACTION: 0}
    for name in dimensions.keys() - {str(fault.column) for fault in faults}:
        try:
            dimensions[name] = _dimension(path, file, name)
        except FaultError as error:
            faults.append(error.fault)
    metadata, stored = DatasetMetadata(), (file.schema_arrow.metadata or {}).get(schema.METADATA_KEY)
    try:
        metadata = DatasetMetadata.from_json(stored) if stored else metadata
    except DataError as error:
        faults.append(Fault(path, Kind.METADATA, f"{error}; {METADATA_REMEDY}"))
    if all(dimensions.values()):
        misfits = metadata.misfits(dimensions[schema.STATE], dimensions[schema.ACTION])
        faults += [Fault(path, Kind.METADATA, f"{text}; {METADATA_REMEDY}") for text in misfits]
    return Layout(count_cameras(file.schema_arrow), dimensions[schema.STATE], dimensions[schema.ACTION], metadata), faults


def count_cameras(arrow: pa.Schema) -> int:
    """Number of image columns, counted from 1 without a gap."""
    cameras = 0
    while schema.image_column(cameras + 1) in arrow.names:
        cameras += 1
    return cameras


def _column_faults(path: str, arrow: pa.Schema) -> Iterator[Fault]:
    cameras = max(1, count_cameras(arrow))
    for name, matches, expected in [
        (schema.image_column(1), _is_bytes, "binary"),
        *((schema.image_column(n + 1), _is_bytes_or_null, "binary") for n in range(1, cameras)),
        *((name, _is_number_list, "a list of float32 or float64") for name in (schema.STATE, schema.ACTION)),
        (schema.PROMPT, _is_text, "string"),
        *((flag, pa.types.is_boolean, "bool") for flag in schema.FLAGS),
    ]:
        if name not in arrow.names:
            yield Fault(path, Kind.COLUMN, f"missing; got {_listed(arrow.names)}", column=name)
        elif arrow.names.count(name) > 1:
            yield Fault(path, Kind.COLUMN, f"got {arrow.names.count(name)} columns of that name, expected one", column=name)
        elif not matches(arrow.field(name).type):
            yield Fault(path, Kind.TYPE, f"got type {arrow.field(name).type}, expected {expected}", column=name)
    after, last = schema.image_column(cameras + 1), max(map(_camera, arrow.names), default=0)
    if last > cameras and after not in arrow.names:
        text = f"missing, but {schema.image_column(last)} is there; number cameras without a gap, or rename what is none"
        yield Fault(path, Kind.COLUMN, text, column=after)


def _camera(name: str) -> int:
    """Number of the camera whose images a column holds, 0 where it holds none."""
    match = re.fullmatch(r"image_([1-9][0-9]{0,8})_bytes", name)
    return int(match[1]) if match else 0


def _listed(names: Sequence[str]) -> str:
    """Names that come out of a file, on one line of a message."""
    shown = [name if name.isprintable() else repr(name) for name in names[:NAMED]]
    return ", ".join(shown) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_bytes_or_null(kind: pa.DataType) -> bool:
    """pyarrow writes a column in which every row is null without a type."""
    return _is_bytes(kind) or bool(pa.types.is_null(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))
    )


def _is_number_list(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _dimension(path: str, file: pq.ParquetFile, name: str) -> int:
    """Numbers per row: the commonest length at the beginning of the first row group that can be read.

    Not the first row's: that one may be at fault, and be left out.
    """
    kind = file.schema_arrow.field(name).type
    dimension = int(kind.list_size) if pa.types.is_fixed_size_list(kind) else 0
    why = "its lists are empty"
    for group in range(file.metadata.num_row_groups):
        if dimension:
            break
        try:
            batches = file.iter_batches(batch_size=SAMPLED_ROWS, row_groups=[group], columns=[name], use_threads=False)
            batch = next(batches, None)
        except READ_ERRORS as error:
            why = first_line(error)
            continue
        lengths = [] if batch is None else batch.column(0).value_lengths().drop_null().to_numpy()
        values, counts = np.unique(np.asarray(lengths, np.int64), return_counts=True)
        dimension = int(values[counts.argmax()]) if len(values) else 0
    if not dimension:
        raise FaultError(Fault(path, Kind.GROUP, f"cannot be read ({why}), expected numbers; restore the file", column=name))
    if not 0 < dimension <= MOST_NUMBERS:  # a damaged schema: memory for such lists must not even be asked for
        got = f"got lists of {dimension} numbers, expected 1 to {MOST_NUMBERS}; restore the file"
        raise FaultError(Fault(path, Kind.GROUP, got, column=name))
    return dimension


def identify(path: str) -> tuple[int, int, int]:
    """Size, mtime_ns and ctime_ns of a file, see `ByteSource.identity`; raises `FaultError` when it is not there."""
    if is_url(path):
        with file_faults(path), open_source(path) as source:
            return source.identity
    try:
        status = os.stat(path)
    except OSError as error:
        raise FaultError(Fault(path, Kind.FILE, f"cannot be read ({first_line(error)}); restore it")) from error
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def column_ranges(metadata: pq.FileMetaData, columns: Iterable[str], groups: Iterable[int]) -> list[Range]:
    """Where the chunks of some columns lie in a Parquet file."""
    names = set(columns)
    leaves = [n for n in range(metadata.num_columns) if metadata.schema.column(n).path.partition(".")[0] in names]
    ranges = []
    for number in groups:
        group = metadata.row_group(number)
        for leaf in leaves:
            chunk = group.column(leaf)
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
                start = min(start, chunk.dictionary_page_offset)
            ranges.append((start, start + chunk.total_compressed_size))
    return ranges


def flag_rows(metadata: pq.FileMetaData, bounds: NDArray[np.int64]) -> list[NDArray[np.int64]] | None:
    """Rows in which each flag is true, as EpisodeWriter's row groups and their statistics settle it; else None.

    bounds: first row of each row group, and the number of rows (G + 1,). A file that something else has written from one of
    EpisodeWriter's may still carry its metadata: row groups that are not exactly EpisodeWriter's settle nothing.
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
    """Whether each flag is true anywhere in a row group, until one whose statistics do not say."""
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
