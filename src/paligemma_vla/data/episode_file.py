"""A file of episodes, whatever its format: what the index, the readers and `data check` ask of it.

`ParquetEpisodes` is this project's own format; foreign ones are in `sources/`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
from PIL import Image

from paligemma_vla import schema
from paligemma_vla.data.faults import Fault, FaultError, Kind, Unusable, raise_first
from paligemma_vla.data.files import (
    READ_ERRORS,
    count_cameras,
    file_digest,
    file_faults,
    group_bounds,
    identify,
    open_parquet,
    survey,
)
from paligemma_vla.data.footer import column_ranges, flag_rows
from paligemma_vla.data.images import decode
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import Layout, Rows
from paligemma_vla.storage import CachedSource, is_url, open_source

TRUSTED_SECONDS = 60.0  # that a file behind a URL is taken to be as it was
FOOTER_UNFOLDS = 10  # 148 kB of 256 row groups with 7 columns took 1.5 MB


class Pictures(ABC):
    """The images of one camera in some rows; `place` is a row's number among them."""

    @abstractmethod
    def present(self, place: int) -> bool:
        """Whether there is an image at all."""

    @abstractmethod
    def decode(self, place: int) -> Image.Image:
        """A present image as RGB; raises `Unusable`."""

    @abstractmethod
    def encoded(self, place: int) -> bytes | None:
        """A present image as it is stored, when that is an encoded image of its own; raises `Unusable`."""


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


def decode_picture(pictures: Pictures, place: int, where: str) -> Image.Image:
    """A present image as RGB; raises `DataError`, starting with `where` (file, row, column)."""
    try:
        return pictures.decode(place)
    except Unusable as error:
        raise DataError(f"{where}: {error}") from error


class EpisodeFile(ABC):
    """One open file of episodes, as rows with the columns of S1.1.

    path: its place, as the index names it. bounds: first row of each row group, and the number of rows (G + 1,).
    outside: row ranges [first, stop) that were not asked for (X, 2). nbytes: memory it takes while it is open.
    """

    path: str
    bounds: Rows
    outside: Rows
    nbytes: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """Names of the columns it has."""

    @property
    @abstractmethod
    def unused(self) -> Sequence[str]:
        """Names, as the format has them, of what it holds besides."""

    @abstractmethod
    def survey(self) -> tuple[Layout, list[Fault]]:
        """What the columns hold, and every fault of them; dimensions that a fault hides are 0."""

    @abstractmethod
    def read(self, columns: Sequence[str], group: int | None = None) -> pa.Table:
        """Columns of one row group, or of all. Raises what is in `READ_ERRORS`, or `FaultError`."""

    @abstractmethod
    def batches(self, columns: Sequence[str], groups: Sequence[int], rows: int) -> Iterator[pa.RecordBatch]:
        """Columns of some row groups piece by piece, at most `rows` rows each. Raises as `read`."""

    @abstractmethod
    def pictures(self, column: pa.Array, videos: VideoDecoders) -> Pictures:
        """The images of a camera's column as `read` or `batches` gave it."""

    @abstractmethod
    def digest(self) -> int:
        """64 bits over the content, wherever it lies."""

    @abstractmethod
    def identity(self) -> tuple[int, int, int]:
        """Size, mtime_ns and ctime_ns of it with all that belongs to it, now or not long ago. Raises `FaultError`."""

    @abstractmethod
    def told_flags(self) -> list[Rows] | None:
        """Rows in which each of `schema.FLAGS` is true, where that is told without the flags being read; else None."""

    @abstractmethod
    def close(self) -> None: ...


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


def read_layout(file: EpisodeFile) -> Layout:
    """Check the columns of an open file (S1.1) and tell their dimensions. Raises `FaultError` naming the column."""
    layout, faults = file.survey()
    raise_first(faults)
    return layout


def read_columns(file: EpisodeFile, columns: Sequence[str]) -> pa.Table:
    """Some columns of an open file as a whole; raises `FaultError` when they cannot be read."""
    what, rows = f"column{'s' * (len(columns) > 1)} {', '.join(columns)}", int(file.bounds[-1])
    try:
        table = file.read(columns)
    except READ_ERRORS as error:
        raise FaultError(
            Fault(file.path, Kind.GROUP, f"{what}: cannot be read ({first_line(error)}); restore the file")
        ) from error
    if table.num_rows != rows:  # a damaged footer
        got = f"got {table.num_rows} rows, expected {rows} as the file says; restore it"
        raise FaultError(Fault(file.path, Kind.GROUP, f"{what}: {got}"))
    return table
