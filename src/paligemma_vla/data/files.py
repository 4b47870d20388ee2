"""One Parquet file of episodes: opening it, what its columns hold, its digest. No image is decoded here."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from paligemma_vla import schema
from paligemma_vla.data.faults import LEAVE_OUT, Fault, FaultError, Kind
from paligemma_vla.errors import DataError, StorageError, first_line
from paligemma_vla.schema import DatasetMetadata, Layout, Rows
from paligemma_vla.storage import ByteFile, ByteSource, is_url, open_source

# What pyarrow raises for damaged files: its own errors, and those of Python for text and sizes that cannot be.
READ_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)
STREAM_BUFFER = 2**18
SAMPLED_ROWS = 1024
MOST_NUMBERS = 4096  # in a state or an action, as in the configuration
METADATA_REMEDY = "write it as docs/data_format.md says"
NAMED = 20  # columns named in a message
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096  # of a file that is digested
# Of the metadata, what files of one robot share where they say it.
COMPARED = (
    *("image_orientation", "control_hz", "action_convention", "action_representation", "action_rotation"),
    *("state_names", "action_names", "state_units", "action_units"),
)
FOOTER_TAIL = 8  # length of the footer (4 bytes, little-endian) and the magic PAR1


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


@contextmanager
def file_faults(path: str) -> Iterator[None]:
    """Turn a file that is not there, or a disk that cannot read it, into a `FaultError`; a store that fails stays its own."""
    try:
        yield
    except StorageError as error:
        cause = error.__cause__
        if is_url(path) and not isinstance(cause, FileNotFoundError):
            raise
        why = str(error) if cause is None else f"{path}: cannot be read ({first_line(cause)}); restore it"
        raise FaultError(Fault(path, Kind.FILE, why.removeprefix(f"{path}: "))) from cause


def _is_encodable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def unreadable_group(path: str, group: int, groups: Rows, why: str, column: str | None = None) -> Fault:
    """Row group `group` of a file whose row groups begin at `groups` cannot be read."""
    first, stop = int(groups[group]), int(groups[group + 1])
    text = f"row group {group} (rows {first} to {stop - 1}) cannot be read ({why}); restore the file, or {LEAVE_OUT}"
    return Fault(path, Kind.GROUP, text, first, column, stop - first)


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


def joint_layout(layouts: Sequence[Layout]) -> Layout:
    """Layout of files of one robot together: the first one's, with as many cameras as any of them has."""
    return replace(layouts[0], cameras=max(layout.cameras for layout in layouts))


def robot_faults(path: str, layout: Layout, first_path: str, first: Layout) -> Iterator[Fault]:
    """Files that differ in dimensions, or that both say what their numbers and pixels mean and contradict."""
    remedy = f"as in {first_path}; train on one robot's data at a time"
    for name, got, expected in [
        (schema.STATE, layout.state_dim, first.state_dim),
        (schema.ACTION, layout.action_dim, first.action_dim),
    ]:
        if got != expected:
            yield Fault(path, Kind.ROBOT, f"got {got} numbers per row, expected {expected} {remedy}", column=name)
    for name in COMPARED:
        said, said_first = getattr(layout.metadata, name), getattr(first.metadata, name)
        if said and said_first and said != said_first:
            yield Fault(path, Kind.ROBOT, f"metadata {name}: got {said}, expected {said_first} {remedy}")


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
