"""A file of episodes, whatever its format: what the index, the readers and `data check` ask of it.

A name that begins with `NAME:` is read by the module of that name, whose `SOURCE` satisfies `Source` below; another format is
another file here, and a line in `MODULES`. Every other name is a path, or a URL, of this project's own format (`parquet.py`).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from types import TracebackType
from typing import Protocol, Self

import pyarrow as pa
from PIL import Image

from paligemma_vla.data.faults import Fault, FaultError, Kind, Unusable, raise_first
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import Layout, Rows

# What pyarrow raises for damaged files: its own errors, and those of Python for text and sizes that cannot be.
READ_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)
MODULES = {"lerobot": "paligemma_vla.data.formats.lerobot"}
MARKS = {"lerobot": "meta/info.json"}  # what a folder of a foreign format is known by
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


class Source(Protocol):
    """A foreign format. A place is what follows `NAME:`; a file is one of the places that `files` lists."""

    def files(self, place: str, where: str) -> list[str]:
        """Places of the files behind a place, in order. Raises `DataError`, naming `where` (config key or flag)."""

    def open(self, place: str, name: str, stream: bool) -> EpisodeFile:
        """Open a file that is called `name`. stream: it is read piece by piece. Raises `FaultError`."""

    def identify(self, place: str) -> tuple[int, int, int]:
        """Size, mtime_ns and ctime_ns of a file with all that belongs to it, as `formats.parquet.identify`."""

    def file_of(self, place: str) -> str:
        """The path of a file itself, without what is selected of it."""

    def episodes_of(self, place: str) -> tuple[int | None, int | None]:
        """Numbers [first, stop) of the episodes that a place selects, None where it is open."""


def find_source(name: str) -> tuple[str, Source | None, str]:
    """Prefix, source and place of a name; without a source, an empty prefix and the name itself."""
    prefix, colon, place = name.partition(":")
    if not colon or prefix not in MODULES or os.path.exists(name):
        return "", None, name
    return f"{prefix}:", _source(prefix), place


def foreign_format(folder: str) -> str | None:
    """The foreign format that a folder holds, None for any other."""
    return next((name for name, mark in MARKS.items() if os.path.isfile(os.path.join(folder, mark))), None)


@cache
def _source(prefix: str) -> Source:
    source: Source = import_module(MODULES[prefix]).SOURCE
    return source


def open_file(name: str, stream: bool = False) -> EpisodeFile:
    """Open a file of episodes of any format. Raises `FaultError` when it cannot be read."""
    from paligemma_vla.data.formats.parquet import ParquetEpisodes

    _, source, place = find_source(name)
    return ParquetEpisodes(name, stream) if source is None else source.open(place, name, stream)


def identify_file(name: str) -> tuple[int, int, int]:
    """Size, mtime_ns and ctime_ns of a file, and of all that belongs to it; raises `FaultError` when it is not there."""
    from paligemma_vla.data.formats.parquet import identify

    _, source, place = find_source(name)
    return identify(name) if source is None else source.identify(place)
