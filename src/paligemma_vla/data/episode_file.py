"""A file of episodes, whatever its format: what the index, the readers and `data check` ask of it.

`ParquetEpisodes` is this project's own format; foreign ones are in `sources/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
from PIL import Image

from paligemma_vla import schema
from paligemma_vla.data.faults import Fault, FaultError, Kind, Unusable, raise_first
from paligemma_vla.data.files import READ_ERRORS, Layout, Rows, count_cameras, file_digest, group_bounds, open_parquet, survey
from paligemma_vla.data.images import decode
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, first_line

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
    def close(self) -> None: ...


class ParquetEpisodes(EpisodeFile):
    """A file as docs/data_format.md describes it. Raises `FaultError` when it is not Parquet or is cut short."""

    def __init__(self, path: str, stream: bool = False) -> None:
        self.path = path
        self._file = open_parquet(path, stream)
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
        if group is None:
            return self._file.read(columns=list(columns), use_threads=False)
        return self._file.read_row_group(group, columns=list(columns), use_threads=False)

    def batches(self, columns: Sequence[str], groups: Sequence[int], rows: int) -> Iterator[pa.RecordBatch]:
        batches: Iterator[pa.RecordBatch] = self._file.iter_batches(
            batch_size=rows, row_groups=list(groups), columns=list(columns), use_threads=False
        )
        return batches

    def pictures(self, column: pa.Array, videos: VideoDecoders) -> Pictures:
        return EncodedPictures(column)

    def digest(self) -> int:
        return file_digest(self.path)

    def close(self) -> None:
        self._file.close()


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
