"""Values of a LeRobot data set's rows: numbers in the shape this project has them, images in Parquet and in videos."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from paligemma_vla.data.episode_file import Pictures
from paligemma_vla.data.faults import LEAVE_OUT, Kind, Unusable
from paligemma_vla.data.images import decode
from paligemma_vla.data.sources.lerobot_meta import VideoSpans
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import first_line

FRAME_FIELDS = ("camera", "video", "time", "episode", "frame")


def is_numeric(kind: pa.DataType) -> bool:
    """Whether a column holds numbers, or lists of them."""
    number = kind.value_type if _is_list(kind) else kind
    return bool(pa.types.is_floating(number) or pa.types.is_integer(number) or pa.types.is_boolean(number))


def is_stored_image(kind: pa.DataType) -> bool:
    """Whether a column holds images as `datasets.Image` stores them."""
    return pa.types.is_struct(kind) and {field.name for field in kind} >= {"bytes", "path"}


def number_lists(column: pa.Array) -> pa.Array:
    """Numbers, or lists of them, as lists of float32 or float64."""
    if not _is_list(column.type):
        return pa.FixedSizeListArray.from_arrays(column.cast(pa.float32()), 1)
    if pa.types.is_float32(column.type.value_type) or pa.types.is_float64(column.type.value_type):
        return column
    return column.cast(pa.list_(pa.float32()))


def column_values(column: pa.ChunkedArray, missing: float) -> NDArray[np.float64]:
    """A column of one number per row, which may be in a list of one (R,); `missing` where it is null."""
    values = column.combine_chunks()
    if _is_list(values.type):
        values = pa.compute.list_element(values, 0)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    numbers: NDArray[np.float64] = values.cast(pa.float64()).fill_null(missing).to_numpy(zero_copy_only=False)
    return numbers


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def frame_column(camera: int, spans: VideoSpans, places: NDArray[np.int64], times: NDArray[np.float64]) -> pa.Array:
    """Which video of a camera, and when in it, a row's frame is. places (R, 3): row of the metadata, episode, frame in it."""
    row, episode, frame = places.T
    values = [np.full(len(row), camera), spans.file[row], spans.start[row] + times, episode, frame]
    return pa.StructArray.from_arrays([pa.array(value) for value in values], names=list(FRAME_FIELDS))


class FramePictures(Pictures):
    """Frames of videos. column: of `frame_column`. files: of one camera. tolerance: in seconds."""

    def __init__(self, column: pa.Array, root: str, files: Sequence[str], tolerance: float, videos: VideoDecoders) -> None:
        self.column, self.root, self.files, self.tolerance, self.videos = column, root, files, tolerance, videos

    def present(self, place: int) -> bool:
        return True

    def decode(self, place: int) -> Image.Image:
        wanted = self.column[place].as_py()
        path = os.path.join(self.root, self.files[wanted["video"]])
        try:
            return self.videos.frame(path, wanted["time"], self.tolerance)
        except Unusable as error:
            raise Unusable(error.kind, f"episode {wanted['episode']}, frame {wanted['frame']}: {error.text}") from error

    def encoded(self, place: int) -> bytes | None:
        return None


class StoredPictures(Pictures):
    """Images in a column of struct<bytes, path>: in the bytes, or in a file within the data set."""

    def __init__(self, column: pa.Array, root: str) -> None:
        self.column, self.root = column, os.path.realpath(root)

    def present(self, place: int) -> bool:
        value = self.column[place]
        return bool(value.is_valid and (value["bytes"].is_valid or value["path"].is_valid))

    def decode(self, place: int) -> Image.Image:
        data = self.column[place]["bytes"]
        return decode(data.as_buffer() if data.is_valid else self._file(place))

    def encoded(self, place: int) -> bytes | None:
        data = self.column[place]["bytes"]
        return data.as_py() if data.is_valid else self._file(place)

    def _file(self, place: int) -> bytes:
        name = self.column[place]["path"].as_py()
        path = os.path.realpath(os.path.join(self.root, name))
        if not path.startswith(self.root + os.sep):
            raise Unusable(Kind.IMAGE, f"got the path {name!r}, expected one within the data set; mend it, or {LEAVE_OUT}")
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise Unusable(Kind.IMAGE, f"{path}: cannot be read ({first_line(error)}); restore it, or {LEAVE_OUT}") from error
