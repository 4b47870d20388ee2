"""LeRobot data sets (v2.1, v3.0) as episode files: `lerobot:PATH?cameras=front,wrist&episodes=0:50`.

Rows are translated as they are read; docs/data_format.md has the table.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from paligemma_vla import schema
from paligemma_vla.data.faults import LEAVE_OUT, Fault, FaultError, Kind, Unusable, file_faults
from paligemma_vla.data.formats import FOOTER_UNFOLDS, EpisodeFile, Pictures
from paligemma_vla.data.formats.lerobot_meta import INDEX_COLUMNS, Metadata, Place, VideoSpans, find_root, load_metadata
from paligemma_vla.data.formats.parquet import file_digest, group_bounds, identify, open_parquet, sample_digest
from paligemma_vla.data.images import decode
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import DatasetMetadata, Layout, Rows
from paligemma_vla.storage import open_source

FRAME_FIELDS = ("camera", "video", "time", "episode", "frame")
SUCCESS = ("next.success", "next.done")  # the first of them that is there says whether an episode ended in success


class LeRobotSource:
    """See `data.formats.Source`."""

    def files(self, place: str, where: str) -> list[str]:
        asked = Place.parse(place, where)
        metadata = load_metadata(find_root(asked.path))
        metadata.cameras(asked.selection)
        wanted = np.unique(metadata.file[metadata.selected(asked.selection)]).tolist()
        paths = [os.path.join(metadata.root, metadata.files[file]) for file in wanted]
        if os.path.isfile(asked.path):  # one of its files
            paths = [path for path in paths if os.path.realpath(path) == os.path.realpath(asked.path)]
        return [str(replace(asked, path=path)) for path in paths]

    def open(self, place: str, name: str, stream: bool) -> EpisodeFile:
        return LeRobotFile(Place.parse(place), name, stream)

    def identify(self, place: str) -> tuple[int, int, int]:
        asked = Place.parse(place)
        metadata = load_metadata(find_root(asked.path))
        others = [os.path.join(metadata.root, name) for name in (*metadata.sources, *_videos_of(metadata, asked))]
        stamps = [identify(path) for path in (asked.path, *filter(os.path.exists, others))]  # `survey` tells what is missing
        sizes, modified, changed = zip(*stamps, strict=True)
        return sum(sizes), max(modified), max(changed)

    def file_of(self, place: str) -> str:
        return Place.parse(place).path

    def episodes_of(self, place: str) -> tuple[int | None, int | None]:
        return Place.parse(place).selection.episodes


SOURCE = LeRobotSource()


def _file_number(metadata: Metadata, path: str) -> int:
    """Which of a data set's files a path is."""
    relative = os.path.relpath(path, metadata.root)
    if relative not in metadata.file_numbers:
        raise FaultError(Fault(path, Kind.FILE, f"is none of the data files that {metadata.root}/meta lists"))
    return metadata.file_numbers[relative]


def _videos_of(metadata: Metadata, asked: Place) -> list[str]:
    """Videos (relative to the data set) of the selected cameras and episodes of one data file."""
    here = (metadata.file == _file_number(metadata, asked.path)) & metadata.selected(asked.selection)
    spans = [metadata.videos[camera.key] for camera in metadata.cameras(asked.selection) if camera.dtype == "video"]
    return [span.files[file] for span in spans for file in np.unique(span.file[here]).tolist()]


class LeRobotFile(EpisodeFile):
    """One data file of a LeRobot data set, with the videos that belong to it. Raises `FaultError`."""

    def __init__(self, place: Place, name: str, stream: bool) -> None:
        self.path, self.place = name, place
        self.metadata = load_metadata(find_root(place.path))
        self.cameras = self.metadata.cameras(place.selection)
        self._file = open_parquet(place.path, stream)
        self.bounds = group_bounds(self._file)
        self.nbytes = FOOTER_UNFOLDS * int(self._file.metadata.serialized_size)
        self.episodes = np.flatnonzero(self.metadata.file == _file_number(self.metadata, place.path))
        ends = np.cumsum(self.metadata.length[self.episodes])
        self.starts: Rows = ends - self.metadata.length[self.episodes]
        unwanted = ~self.metadata.selected(place.selection)[self.episodes]
        self.outside = np.stack([self.starts, ends], axis=1)[unwanted]
        if int(ends[-1]) != self.bounds[-1]:
            got = f"got {self.bounds[-1]} rows, expected {ends[-1]}, the lengths of its episodes in {self.metadata.root}/meta"
            raise FaultError(Fault(name, Kind.FLAGS, f"{got}; restore the file, or take it out of the data"))
        self._sources = {schema.PROMPT: ["task_index"], schema.STATE: [place.selection.state]}
        self._sources[schema.ACTION] = [place.selection.action]
        flags = [*self._there("episode_index", "frame_index", "timestamp"), *self._there(*SUCCESS)[:1]]
        self._sources.update(dict.fromkeys(schema.FLAGS, flags))
        for number, camera in enumerate(self.cameras):
            video = self._there("frame_index", "timestamp")
            self._sources[schema.image_column(number + 1)] = video if camera.dtype == "video" else [camera.key]
        self._by_column = {schema.image_column(number + 1): number for number in range(len(self.cameras))}
        self._features = {schema.STATE: place.selection.state, schema.ACTION: place.selection.action}
        self._numbers = np.array(sorted(self.metadata.tasks), np.int64)
        self._texts = pa.array([self.metadata.tasks[number] for number in self._numbers.tolist()], pa.string())

    def _there(self, *names: str) -> list[str]:
        return [name for name in names if name in self._file.schema_arrow.names]

    @property
    def columns(self) -> Sequence[str]:
        return list(self._sources)

    @property
    def unused(self) -> Sequence[str]:
        success = self._there(*SUCCESS)[:1]
        known = {*self._features.values(), *(camera.key for camera in self.cameras), *INDEX_COLUMNS, *success}
        return [key for key in self.metadata.features if key not in known]

    def survey(self) -> tuple[Layout, list[Fault]]:
        faults = [*self._column_faults(), *self._video_faults()]
        metadata, selection = self.metadata, self.place.selection
        state, action = metadata.vector(selection.state, "state"), metadata.vector(selection.action, "action")
        own = DatasetMetadata()
        try:
            own = DatasetMetadata.from_json(json.dumps(metadata.extra))
        except DataError as error:
            faults.append(Fault(self.path, Kind.METADATA, f"info.json: paligemma_vla: {error}; mend it, or take it out"))
        described = replace(
            own,
            robot=metadata.robot,
            cameras=tuple(camera.camera for camera in self.cameras),
            state_names=state.names,
            action_names=action.names,
            control_hz=metadata.fps,
        )
        return Layout(len(self.cameras), state.shape[0], action.shape[0], described), faults

    def _column_faults(self) -> Iterator[Fault]:
        names, selection = self._file.schema_arrow.names, self.place.selection
        images = [camera.key for camera in self.cameras if camera.dtype == "image"]
        for name in (selection.state, selection.action, "task_index", "episode_index", "frame_index", *images):
            if name not in names:
                yield Fault(self.path, Kind.COLUMN, f"missing; got {', '.join(names)[:500]}; restore the file", column=name)
                continue
            kind, role = self._file.schema_arrow.field(name).type, ""
            if name in images and not is_stored_image(kind):
                role = "an image as struct<bytes, path>"
            elif name.endswith("_index") and not pa.types.is_integer(kind):
                role = "whole numbers"
            elif name in (selection.state, selection.action) and not is_numeric(kind):
                role = "numbers, or lists of them"
            if role:
                yield Fault(self.path, Kind.TYPE, f"got type {kind}, expected {role}; restore the file", column=name)

    def _video_faults(self) -> Iterator[Fault]:
        for name in _videos_of(self.metadata, self.place):
            path = os.path.join(self.metadata.root, name)
            if not os.path.isfile(path):
                remedy = "restore it, or choose other cameras (?cameras=...) or episodes (?episodes=...)"
                yield Fault(self.path, Kind.FILE, f"got no video {path}, expected one as its metadata says; {remedy}")

    def read(self, columns: Sequence[str], group: int | None = None) -> pa.Table:
        names = self._needed(columns)
        if group is None:
            table = self._file.read(columns=names, use_threads=False)
        else:
            table = self._file.read_row_group(group, columns=names, use_threads=False)
        first = 0 if group is None else int(self.bounds[group])
        return self._translate(columns, table, np.arange(first, first + table.num_rows))

    def batches(self, columns: Sequence[str], groups: Sequence[int], rows: int) -> Iterator[pa.RecordBatch]:
        bounds = self.bounds
        numbers = np.concatenate([bounds[:0], *(np.arange(bounds[group], bounds[group + 1]) for group in groups)])
        options = {"batch_size": rows, "row_groups": list(groups), "columns": self._needed(columns), "use_threads": False}
        for batch in self._file.iter_batches(**options):
            here, numbers = numbers[: batch.num_rows], numbers[batch.num_rows :]
            table = self._translate(columns, pa.Table.from_batches([batch]), here).combine_chunks()
            yield table.to_batches()[0]

    def _needed(self, columns: Sequence[str]) -> list[str]:
        """Columns to read. One at least, or a table would have no rows."""
        names = {name for column in columns for name in self._sources[column]} or {"task_index"}
        return sorted(names)

    def _translate(self, columns: Sequence[str], table: pa.Table, rows: Rows) -> pa.Table:
        """Some rows of the file in this project's columns."""
        flags = self._flags(table, rows) if set(columns) & set(schema.FLAGS) else {}
        arrays = {name: flags[name] if name in flags else self._column(name, table, rows) for name in columns}
        return pa.table(arrays)

    def _column(self, name: str, table: pa.Table, rows: Rows) -> pa.Array:
        if name == schema.PROMPT:
            numbers = column_values(table["task_index"], -1)
            place = np.searchsorted(self._numbers, numbers)
            known = self._numbers[np.minimum(place, len(self._numbers) - 1)] == numbers
            return pa.DictionaryArray.from_arrays(pa.array(place.astype(np.int32), mask=~known), self._texts)
        if name in self._features:
            return number_lists(table[self._features[name]].combine_chunks())
        camera = self.cameras[self._by_column[name]]
        if camera.dtype == "image":
            return table[camera.key].combine_chunks()
        place = np.searchsorted(self.starts, rows, side="right") - 1
        entries, frames = self.episodes[place], rows - self.starts[place]
        times = frames / self.metadata.fps
        if "timestamp" in table.column_names:
            told = column_values(table["timestamp"], np.nan)
            times = np.where(np.isfinite(told), told, times)
        places = np.stack([entries, self.metadata.number[entries], frames], axis=1)
        return frame_column(self._by_column[name], self.metadata.videos[camera.key], places, times)

    def _flags(self, table: pa.Table, rows: Rows) -> dict[str, pa.Array]:
        """is_first, is_last and is_terminal of all rows, by the metadata. Raises `FaultError` where the rows contradict it."""
        place = np.searchsorted(self.starts, rows, side="right") - 1
        frames = rows - self.starts[place]
        self._check_rows(table, "episode_index", self.metadata.number[self.episodes][place])
        self._check_rows(table, "frame_index", frames)
        self._check_times(table, frames)
        last = frames == self.metadata.length[self.episodes][place] - 1
        succeeded = np.zeros(len(rows), bool)
        for name in SUCCESS:
            if name in table.column_names:
                succeeded = column_values(table[name], 0) != 0
                break
        return dict(zip(schema.FLAGS, map(pa.array, (frames == 0, last, last & succeeded)), strict=True))

    def _check_rows(self, table: pa.Table, name: str, expected: Rows) -> None:
        got = column_values(table[name], -1)
        wrong = np.flatnonzero(got != expected)
        if len(wrong):
            row = int(wrong[0])
            text = f"got {got[row]:g}, expected {expected[row]} by the lengths of the episodes in {self.metadata.root}/meta"
            raise FaultError(Fault(self.path, Kind.FLAGS, f"{text}; restore the file", row, name))

    def _check_times(self, table: pa.Table, frames: Rows) -> None:
        """Timestamps against the frame rate, half a frame apart at most."""
        if "timestamp" not in table.column_names:
            return
        times = column_values(table["timestamp"], np.nan)
        began = times[np.arange(len(frames)) - frames]
        wrong = np.flatnonzero(~(np.abs(times - began - frames / self.metadata.fps) <= 0.5 / self.metadata.fps))
        if len(wrong):
            row = int(wrong[0])
            expected = f"{frames[row] / self.metadata.fps:.3f} s after the episode's begin, at fps {self.metadata.fps:g}"
            text = f"got {times[row] - began[row]:.3f} s, expected {expected} of info.json; correct fps, or restore the file"
            raise FaultError(Fault(self.path, Kind.FLAGS, text, row, "timestamp"))

    def pictures(self, column: pa.Array, videos: VideoDecoders) -> Pictures:
        if is_stored_image(column.type):
            return StoredPictures(column, self.metadata.root)
        camera = self.cameras[column[0]["camera"].as_py()]
        files, tolerance = self.metadata.videos[camera.key].files, 0.5 / self.metadata.fps
        return FramePictures(column, self.metadata.root, files, tolerance, videos)

    def digest(self) -> int:
        metadata, selection = self.metadata, replace(self.place.selection, episodes=(None, None))
        with file_faults(self.path), open_source(self.place.path) as source:
            rows = file_digest(source, self._file.metadata)
        digest = hashlib.blake2b(rows.to_bytes(8, "little"), digest_size=8)
        spans = [metadata.videos[camera.key] for camera in self.cameras if camera.dtype == "video"]
        facts = {
            "selection": str(selection),
            "cameras": [camera.key for camera in self.cameras],
            "fps": metadata.fps,
            "tasks": sorted(metadata.tasks.items()),
            "episodes": metadata.number[self.episodes].tolist(),
            "lengths": metadata.length[self.episodes].tolist(),
            "videos": [[span.start[self.episodes].tolist(), span.file[self.episodes].tolist()] for span in spans],
        }
        digest.update(json.dumps(facts).encode())
        for name in _videos_of(metadata, replace(self.place, selection=selection)):
            path = os.path.join(metadata.root, name)
            if not os.path.isfile(path):
                digest.update(b"missing")
                continue
            with file_faults(path), open_source(path) as video:
                digest.update(sample_digest(video))
        return int.from_bytes(digest.digest(), "little")

    def told_flags(self) -> list[Rows] | None:
        return None  # the rows' own are checked against what the data set says

    def identity(self) -> tuple[int, int, int]:
        return SOURCE.identify(str(self.place))

    def close(self) -> None:
        self._file.close()


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
