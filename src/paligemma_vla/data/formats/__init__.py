"""A file of episodes, whatever its format: what the index, the readers and `data check` ask of it.

A name that begins with `NAME:` is read by the module of that name, whose `FORMAT` satisfies `Format` below; another format is
another file here, and a line in `MODULES`. Every other name is a path, or a URL, of this project's own format (`parquet.py`).
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paligemma_vla.data.faults import Fault, FaultError, Kind, Unusable, file_faults, raise_first
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import Layout, Pixels, Rows
from paligemma_vla.storage import is_url, open_source

# What pyarrow raises for damaged files: its own errors, and those of Python for text and sizes that cannot be.
READ_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)
MODULES = {name: f"paligemma_vla.data.formats.{name}" for name in ("lerobot", "hdf5")}
MARKS = {"lerobot": "meta/info.json"}  # what a folder of a foreign format is recognised by
JUDGED_ROWS = 32  # among which a camera's first image is looked for
TRUSTED_SECONDS = 60.0  # that a file behind a URL is taken to be as it was
Identity = tuple[int, int, int]  # size, mtime_ns, and ctime_ns or a store's version: see `ByteSource.identity`


class Pictures(ABC):
    """The images of one camera in some rows; `row` is counted from the first of them. nbytes: memory beside the column's."""

    nbytes = 0

    @abstractmethod
    def present(self, row: int) -> bool:
        """True if there is an image at all."""

    @abstractmethod
    def decode(self, row: int, side: int = 0) -> Pixels:
        """A present image as RGB (H, W, 3); side: of at least so many px where that is less work; 0: as it was taken.
        Raises `Unusable`."""

    @abstractmethod
    def encoded(self, row: int) -> bytes | None:
        """A present image as it is stored, when that is an encoded image of its own; raises `Unusable`."""

    def frame(self, row: int) -> tuple[str, float] | None:
        """The video that a present image is a frame of, and its time there in s; None for an image of its own."""
        return None


class Frames(NamedTuple):
    """A camera's images as frames of videos: which of `files` in the folder `root` each row's is in (R,), and its time there
    in s (R,).

    episodes: how many the data set has in each file (V,). info: what the data set says of these files.
    """

    root: str
    files: tuple[str, ...]
    file: Rows
    time: NDArray[np.float64]
    episodes: Rows
    info: dict[str, Any]


class EpisodeFile(ABC):
    """One open file of episodes, as rows with the columns of S1.1.

    path: its name in the index. columns: names of those it has. unused: what else is in it, in the format's own names.
    bounds: first row of each row group, and the number of rows (G + 1,). nbytes: memory that it takes while it is open.
    tells_success: an optional column says which episodes succeeded, even if none did.
    prompts_change: the instruction is meant to change within an episode.
    """

    path: str
    columns: Sequence[str]
    unused: Sequence[str]
    bounds: Rows
    nbytes: int
    tells_success: bool = False
    prompts_change: bool = False
    _identified: tuple[Identity, float] | None = None  # and when, of a file behind a URL

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def identity(self) -> Identity:
        """Identity of the file with all that belongs to it.

        Asking a store costs a request, so the answer for a file behind a URL is used for `TRUSTED_SECONDS`.
        """
        if self._identified is not None and time.monotonic() - self._identified[1] <= TRUSTED_SECONDS:
            return self._identified[0]
        identity = identify_file(self.path)
        if is_url(self.path):
            self._identified = identity, time.monotonic()
        return identity

    @property
    @abstractmethod
    def outside(self) -> Rows:
        """Row ranges [first, stop) that were not selected (X, 2)."""

    @abstractmethod
    def survey(self) -> tuple[Layout, list[Fault]]:
        """What the columns hold, and every fault of them; dimensions that a fault hides are 0."""

    @abstractmethod
    def read(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all rows. Raises what is in `READ_ERRORS`, or `FaultError`."""

    @abstractmethod
    def read_groups(self, columns: Sequence[str], groups: Sequence[int]) -> Iterator[pa.Table]:
        """Columns of some row groups, a table for each. Raises as `read`, at the group that cannot be read.

        Of a file that was opened with `ranges`, near groups are fetched together, and several threads may read at once.
        """

    @abstractmethod
    def batches(self, columns: Sequence[str], groups: Sequence[int], rows: int) -> Iterator[tuple[Rows, pa.RecordBatch]]:
        """Columns of some row groups piece by piece, at most `rows` rows each, with their numbers. Raises as `read`."""

    @abstractmethod
    def pictures(self, column: pa.Array, videos: VideoDecoders) -> Pictures:
        """The images of a camera's column as `read` or `batches` gave it."""

    def locate(self, column: str, group: int, check: Callable[[], None]) -> Pictures | None:
        """The images of a camera in a row group, of which each is read when it is needed; None: its column has to be read.

        check: raises when the file is not the one that was indexed.
        """
        return None

    @abstractmethod
    def loaded_bytes(self, cameras: int) -> Rows:
        """Bytes of each row group that are loaded for one sample with so many cameras (G,)."""

    def frames(self, column: str) -> Frames | None:
        """Where the frames of a camera's column are, for all rows; None when its images are stored one by one."""
        return None

    @abstractmethod
    def without(self, column: str) -> str:
        """How the data is read without one of its cameras."""

    @abstractmethod
    def digest(self) -> int:
        """64 bits over the content, wherever it lies; of large files of other writers over parts of it (see `file_digest`)."""

    @abstractmethod
    def row_faults(self) -> list[Fault]:
        """What makes single episodes unusable beside flags and values: one fault of each. Raises as `read`."""

    @abstractmethod
    def flags_from_footer(self) -> list[Rows] | None:
        """Rows in which each of `schema.FLAGS` is true, if that is known without reading the flags; else None."""

    @abstractmethod
    def close(self) -> None: ...


def read_layout(file: EpisodeFile) -> Layout:
    """Check the columns of an open file (S1.1) and return their dimensions. Raises `FaultError` naming the column."""
    layout, faults = file.survey()
    raise_first(faults)
    return layout


def depth_faults(file: EpisodeFile, columns: Sequence[str], group: int) -> Iterator[Fault]:
    """Cameras whose first image in a row group is a depth map: so are the others, which nobody can mend one by one.

    What cannot be read is not judged.
    """
    videos = VideoDecoders()
    for column in columns:
        with suppress(FaultError, *READ_ERRORS):
            _, batch = next(file.batches([column], [group], JUDGED_ROWS))
            pictures = file.pictures(batch.column(0), videos)
            try:
                for row in islice(filter(pictures.present, range(batch.num_rows)), 1):
                    pictures.decode(row)
            except Unusable as error:
                if error.kind is Kind.DEPTH:
                    yield Fault(file.path, error.kind, f"{error.text}: {file.without(column)}", column=column)


@contextmanager
def reading(path: str, columns: Sequence[str]) -> Iterator[None]:
    """Turn what pyarrow raises while some columns of a file are read into a `FaultError` that names them."""
    try:
        yield
    except READ_ERRORS as error:
        what = f"column{'s' * (len(columns) > 1)} {', '.join(columns)}"
        text = f"{what}: cannot be read ({first_line(error)}); restore the file"
        raise FaultError(Fault(path, Kind.GROUP, text)) from error


def read_columns(file: EpisodeFile, columns: Sequence[str]) -> pa.Table:
    """Some columns of all rows of an open file; raises `FaultError` when they cannot be read."""
    with reading(file.path, columns):
        table = file.read(columns)
        if table.num_rows != file.bounds[-1]:
            raise ValueError(f"got {table.num_rows} rows, expected {file.bounds[-1]} as its footer says")
        return table


class Format(Protocol):
    """A foreign format. A location is what follows `NAME:` in a name: a path, and what is selected of it."""

    def list_files(self, location: str, where: str) -> list[str]:
        """Locations of the data files behind a location, in order. Raises `DataError`, naming `where` (config key or flag)."""

    def open(self, name: str, location: str, stream: bool) -> EpisodeFile:
        """Open a data file whose name is `name`. stream: it is read piece by piece. Raises `FaultError`."""

    def parts(self, location: str) -> list[str]:
        """Paths of a data file and of all that belongs to it: when one of them changes, the data has changed."""

    def selected(self, location: str) -> tuple[str, int | None, int | None]:
        """Path of a data file, and the numbers [first, stop) of the selected episodes, None where the range is open."""


def parse_location(text: str, form: str, keys: Sequence[str], expected: str, where: str) -> tuple[str, dict[str, Any]]:
    """Split `PATH?KEY=VALUE&KEY=VALUE`, of a foreign format, into the path and the values by key. Raises `DataError` that
    begins with `where`. A leading `~` is the home folder, as in a shell."""
    text = text if os.path.exists(text) else os.path.expanduser(text)
    if os.path.exists(text):  # a name may hold a question mark
        return text, {}
    path, _, selected = text.rpartition("?") if "?" in text else (text, "", "")
    if not path:
        raise DataError(f"{where}: got '{form}:{text}', expected a path after {form}: as in {form}:{expected}")
    values: dict[str, Any] = {}
    for part in filter(None, selected.split("&")):
        key, _, value = part.partition("=")
        if key not in keys or not value or key in values:
            raise DataError(f"{where}: {text}: got '{part}', expected {expected}")
        values[key] = value
    return path, values


@cache
def _format(name: str) -> Format:
    form: Format = import_module(MODULES[name]).FORMAT
    return form


def find_format(name: str) -> tuple[str, Format | None, str]:
    """Prefix, format and location of a name; of this project's own format an empty prefix, None, and the name itself."""
    prefix, colon, location = name.partition(":")
    if not colon or prefix not in MODULES or os.path.exists(name):
        return "", None, name
    return f"{prefix}:", _format(prefix), location


def open_file(name: str, stream: bool = False, ranges: bool = False) -> EpisodeFile:
    """Open a file of episodes of any format. Raises `FaultError` when it cannot be read.

    stream: large row groups are read piece by piece. ranges: what a read needs is fetched in few large requests, as it always
    is behind a URL; for this project's own format.
    """
    from paligemma_vla.data.formats.parquet import ParquetEpisodes

    _, form, location = find_format(name)
    return ParquetEpisodes(name, name, stream, ranges) if form is None else form.open(name, location, stream)


def identify_file(name: str) -> Identity:
    """Identity of a file with all that belongs to it; raises `FaultError` when it is not there."""
    _, form, location = find_format(name)
    sizes, modified, changed = zip(*map(_identify, [location] if form is None else form.parts(location)), strict=True)
    return sum(sizes), max(modified), max(changed)


def _identify(location: str) -> Identity:
    with file_faults(location), open_source(location) as source:
        return source.identity
