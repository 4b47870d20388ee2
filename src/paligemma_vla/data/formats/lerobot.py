"""LeRobot data sets (v2.1, v3.0) as episode files: `lerobot:PATH?cameras=front,wrist&episodes=0:50`.

Rows are translated as they are read; docs/data_format.md has the table.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from paligemma_vla import schema
from paligemma_vla.data.faults import LEAVE_OUT, Fault, FaultError, Kind, Unusable, file_faults
from paligemma_vla.data.formats import EpisodeFile, Pictures
from paligemma_vla.data.formats.lerobot_meta import INDEX_COLUMNS, Metadata, Selection, VideoSpans, find_root, load_metadata
from paligemma_vla.data.formats.parquet import ParquetEpisodes, is_list, sample_digest
from paligemma_vla.data.images import decode
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import DatasetMetadata, Layout, Rows
from paligemma_vla.storage import open_source

SUCCESS = ("next.success", "next.done")  # the first of them that is there says if an episode ended in success


class LeRobotFormat:
    """See `data.formats.Format`."""

    def list_files(self, location: str, where: str) -> list[str]:
        selection = Selection.parse(location, where)
        metadata = load_metadata(find_root(selection.path))
        metadata.cameras(selection)
        wanted = np.unique(metadata.file[metadata.selected(selection)]).tolist()
        paths = [os.path.join(metadata.root, metadata.files[file]) for file in wanted]
        if os.path.isfile(selection.path):  # one of its files
            paths = [path for path in paths if os.path.realpath(path) == os.path.realpath(selection.path)]
        return [str(replace(selection, path=path)) for path in paths]

    def open(self, name: str, location: str, stream: bool) -> EpisodeFile:
        return LeRobotFile(name, Selection.parse(location), stream)

    def parts(self, location: str) -> list[str]:
        selection = Selection.parse(location)
        metadata = load_metadata(find_root(selection.path))
        others = [os.path.join(metadata.root, name) for name in (*metadata.sources, *_videos(metadata, selection))]
        return [selection.path, *filter(os.path.exists, others)]  # `survey` reports what is missing

    def selected(self, location: str) -> tuple[str, int | None, int | None]:
        selection = Selection.parse(location)
        return selection.path, *selection.episodes


FORMAT = LeRobotFormat()


def _file_number(metadata: Metadata, path: str) -> int:
    """Which of a data set's files a path is."""
    relative = os.path.relpath(path, metadata.root)
    if relative not in metadata.file_numbers:
        raise FaultError(Fault(path, Kind.FILE, f"is none of the data files that {metadata.root}/meta lists"))
    return metadata.file_numbers[relative]


def _videos(metadata: Metadata, selection: Selection) -> list[str]:
    """Videos (relative to the data set) of the selected cameras and episodes of one data file."""
    here = (metadata.file == _file_number(metadata, selection.path)) & metadata.selected(selection)
    spans = [metadata.videos[camera.key] for camera in metadata.cameras(selection) if camera.dtype == "video"]
    return [span.files[file] for span in spans for file in np.unique(span.file[here]).tolist()]


class LeRobotFile(ParquetEpisodes):
    """One data file of a LeRobot data set, with the videos that belong to it. Raises `FaultError`."""

    def __init__(self, name: str, selection: Selection, stream: bool) -> None:
        super().__init__(name, selection.path, stream)
        self.selection = selection
        self.metadata = load_metadata(find_root(selection.path))
        self.cameras = self.metadata.cameras(selection)
        self.episodes = np.flatnonzero(self.metadata.file == _file_number(self.metadata, selection.path))
        ends = np.cumsum(self.metadata.length[self.episodes])
        self.starts: Rows = ends - self.metadata.length[self.episodes]
        unwanted = ~self.metadata.selected(selection)[self.episodes]
        self.outside = np.stack([self.starts, ends], axis=1)[unwanted]
        if int(ends[-1]) != self.bounds[-1]:
            got = f"got {self.bounds[-1]} rows, expected {ends[-1]}, the lengths of its episodes in {self.metadata.root}/meta"
            raise FaultError(Fault(name, Kind.FLAGS, f"{got}; restore the file, or take it out of the data"))
        self._numbers = {schema.STATE: selection.state, schema.ACTION: selection.action}
        self._cameras = {schema.image_column(n + 1): camera for n, camera in enumerate(self.cameras)}
        self._success = self._present(*SUCCESS)[:1]
        times = self._present("frame_index", "timestamp")
        self._stored = {
            schema.PROMPT: ["task_index"],
            **{column: [feature] for column, feature in self._numbers.items()},
            **{flag: [*self._present("episode_index"), *times, *self._success] for flag in schema.FLAGS},
            **{name: times if one.dtype == "video" else [one.key] for name, one in self._cameras.items()},
        }
        self.columns = list(self._stored)
        used = {*self._numbers.values(), *(camera.key for camera in self.cameras), *INDEX_COLUMNS, *self._success}
        self.unused = [key for key in self.metadata.info.features if key not in used]
        self._task_numbers = pa.array(self.metadata.tasks.keys(), pa.int64())
        self._tasks = pa.array(self.metadata.tasks.values(), pa.string())

    def _present(self, *names: str) -> list[str]:
        return [name for name in names if name in self.arrow.names]

    def survey(self) -> tuple[Layout, list[Fault]]:
        faults = [*self._column_faults(), *self._video_faults()]
        metadata, selection = self.metadata, self.selection
        state, action = metadata.vector(selection.state, "state"), metadata.vector(selection.action, "action")
        own = DatasetMetadata()
        try:
            own = DatasetMetadata.from_json(json.dumps(metadata.info.paligemma_vla or {}))
        except DataError as error:
            faults.append(Fault(self.path, Kind.METADATA, f"info.json: paligemma_vla: {error}; mend it, or take it out"))
        described = replace(
            own,
            robot=metadata.info.robot_type or "",
            cameras=tuple(camera.camera for camera in self.cameras),
            state_names=state.dimensions,
            action_names=action.dimensions,
            control_hz=metadata.info.fps,
        )
        return Layout(len(self.cameras), state.shape[0], action.shape[0], described), faults

    def _column_faults(self) -> Iterator[Fault]:
        names = self.arrow.names
        images = [camera.key for camera in self.cameras if camera.dtype == "image"]
        for name, matches, expected in [
            *((name, _is_numeric, "numbers, or lists of them") for name in self._numbers.values()),
            *((f"{name}_index", pa.types.is_integer, "whole numbers") for name in ("task", "episode", "frame")),
            *((name, _is_stored_image, "an image as struct<bytes, path>") for name in images),
        ]:
            if name not in names:
                yield Fault(self.path, Kind.COLUMN, f"missing; got {', '.join(names)[:500]}; restore the file", column=name)
            elif not matches(kind := self.arrow.field(name).type):
                yield Fault(self.path, Kind.TYPE, f"got type {kind}, expected {expected}; restore the file", column=name)

    def _video_faults(self) -> Iterator[Fault]:
        for name in _videos(self.metadata, self.selection):
            path = os.path.join(self.metadata.root, name)
            if not os.path.isfile(path):
                remedy = "restore it, or choose other cameras (?cameras=...) or episodes (?episodes=...)"
                yield Fault(self.path, Kind.FILE, f"got no video {path}, expected one as its metadata says; {remedy}")

    def _stored_columns(self, columns: Sequence[str]) -> list[str]:
        """One at least, or a table would have no rows."""
        return sorted({name for column in columns for name in self._stored[column]} or {"task_index"})

    def _translate(self, columns: Sequence[str], table: pa.Table, rows: Rows) -> pa.Table:
        flags = self._flags(table, rows) if set(columns) & set(schema.FLAGS) else {}
        return pa.table({name: flags[name] if name in flags else self._column(name, table, rows) for name in columns})

    def _column(self, name: str, table: pa.Table, rows: Rows) -> pa.Array:
        if name == schema.PROMPT:
            index = pa.compute.index_in(table["task_index"].combine_chunks().cast(pa.int64()), self._task_numbers)
            return pa.DictionaryArray.from_arrays(index, self._tasks)
        if name in self._numbers:
            return _number_lists(table[self._numbers[name]].combine_chunks())
        camera = self._cameras[name]
        if camera.dtype == "image":
            return table[camera.key].combine_chunks()
        episodes, frames = self._locate(rows)
        times = frames / self.metadata.info.fps
        if "timestamp" in table.column_names:
            stored = _column_values(table["timestamp"], np.nan)
            times = np.where(np.isfinite(stored), stored, times)
        spans = self.metadata.videos[camera.key]
        values = {
            "camera": np.full(len(rows), self.cameras.index(camera)),
            "video": spans.file[episodes],
            "time": spans.start[episodes] + times,
            "episode": self.metadata.number[episodes],
            "frame": frames,
        }
        return pa.StructArray.from_arrays(list(map(pa.array, values.values())), names=list(values))

    def _locate(self, rows: Rows) -> tuple[Rows, Rows]:
        """Of some rows of the file, the episode (its row in the metadata), and the frame in it."""
        slot = np.searchsorted(self.starts, rows, side="right") - 1
        return self.episodes[slot], rows - self.starts[slot]

    def _flags(self, table: pa.Table, rows: Rows) -> dict[str, pa.Array]:
        """is_first, is_last and is_terminal by the metadata. Raises `FaultError` where the rows contradict it."""
        episodes, frames = self._locate(rows)
        by_lengths = f"by the lengths of the episodes in {self.metadata.root}/meta; restore the file"
        for name, expected in (("episode_index", self.metadata.number[episodes]), ("frame_index", frames)):
            got = _column_values(table[name], -1)
            for slot in np.flatnonzero(got != expected)[:1].tolist():
                text = f"got {got[slot]:g}, expected {expected[slot]} {by_lengths}"
                raise FaultError(Fault(self.path, Kind.FLAGS, text, int(rows[slot]), name))
        if "timestamp" in table.column_names:
            self._check_times(_column_values(table["timestamp"], np.nan), rows, frames)
        last = frames == self.metadata.length[episodes] - 1
        succeeded = np.zeros(len(rows), bool)
        if self._success:
            succeeded = _column_values(table[self._success[0]], 0) != 0
        return dict(zip(schema.FLAGS, map(pa.array, (frames == 0, last, last & succeeded)), strict=True))

    def _check_times(self, times: NDArray[np.float64], rows: Rows, frames: Rows) -> None:
        """Timestamps against the frame rate, half a frame apart at most; of episodes whose begin is among the rows."""
        fps, begin = self.metadata.info.fps, np.arange(len(rows)) - frames
        passed = np.where(begin >= 0, times - times[np.maximum(begin, 0)], frames / fps)
        for slot in np.flatnonzero(~(np.abs(passed - frames / fps) <= 0.5 / fps))[:1].tolist():
            expected = f"expected {frames[slot] / fps:.3f} s after the episode's begin, at fps {fps:g} of info.json"
            text = f"got {passed[slot]:.3f} s, {expected}; correct fps, or restore the file"
            raise FaultError(Fault(self.path, Kind.FLAGS, text, int(rows[slot]), "timestamp"))

    def pictures(self, column: pa.Array, videos: VideoDecoders) -> Pictures:
        if _is_stored_image(column.type):
            return StoredPictures(column, self.metadata.root)
        spans = self.metadata.videos[self.cameras[column[0]["camera"].as_py()].key]
        return FramePictures(column, self.metadata.root, spans, 0.5 / self.metadata.info.fps, videos)

    def digest(self) -> int:
        metadata, everything = self.metadata, replace(self.selection, episodes=(None, None))
        digest = hashlib.blake2b(super().digest().to_bytes(8, "little"), digest_size=8)
        spans = [metadata.videos[camera.key] for camera in self.cameras if camera.dtype == "video"]
        facts = {
            "selection": everything.choices,
            "cameras": [camera.key for camera in self.cameras],
            "fps": metadata.info.fps,
            "tasks": sorted(metadata.tasks.items()),
            "episodes": metadata.number[self.episodes].tolist(),
            "lengths": metadata.length[self.episodes].tolist(),
            "videos": [[span.start[self.episodes].tolist(), span.file[self.episodes].tolist()] for span in spans],
        }
        digest.update(json.dumps(facts).encode())
        for name in _videos(metadata, everything):
            path = os.path.join(metadata.root, name)
            if not os.path.isfile(path):
                digest.update(b"missing")
                continue
            with file_faults(path), open_source(path) as video:
                digest.update(sample_digest(video))
        return int.from_bytes(digest.digest(), "little")

    def flags_from_footer(self) -> list[Rows] | None:
        return None  # those in the rows are checked against the metadata


def _is_numeric(kind: pa.DataType) -> bool:
    """True for numbers, and for lists of them."""
    number = kind.value_type if is_list(kind) else kind
    return bool(pa.types.is_floating(number) or pa.types.is_integer(number) or pa.types.is_boolean(number))


def _is_stored_image(kind: pa.DataType) -> bool:
    """True for images as `datasets.Image` stores them."""
    return pa.types.is_struct(kind) and {field.name for field in kind} >= {"bytes", "path"}


def _number_lists(column: pa.Array) -> pa.Array:
    """Numbers, or lists of them, as lists of float32 or float64."""
    if not is_list(column.type):
        return pa.FixedSizeListArray.from_arrays(column.cast(pa.float32()), 1)
    if pa.types.is_float32(column.type.value_type) or pa.types.is_float64(column.type.value_type):
        return column
    return column.cast(pa.list_(pa.float32()))


def _column_values(column: pa.ChunkedArray, missing: float) -> NDArray[np.float64]:
    """A column of one number per row, which may be in a list of one (R,); `missing` where it is null."""
    values = column.combine_chunks()
    if is_list(values.type):
        values = pa.compute.list_element(values, 0)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    numbers: NDArray[np.float64] = values.cast(pa.float64()).fill_null(missing).to_numpy(zero_copy_only=False)
    return numbers


class FramePictures(Pictures):
    """Frames of one camera's videos. column: struct of video, time, episode and frame. tolerance: in seconds."""

    def __init__(self, column: pa.Array, root: str, spans: VideoSpans, tolerance: float, videos: VideoDecoders) -> None:
        self.column, self.root, self.files, self.tolerance, self.videos = column, root, spans.files, tolerance, videos

    def present(self, row: int) -> bool:
        return True

    def decode(self, row: int) -> Image.Image:
        wanted = self.column[row].as_py()
        path = os.path.join(self.root, self.files[wanted["video"]])
        try:
            return self.videos.frame(path, wanted["time"], self.tolerance)
        except Unusable as error:
            raise Unusable(error.kind, f"episode {wanted['episode']}, frame {wanted['frame']}: {error.text}") from error

    def encoded(self, row: int) -> bytes | None:
        return None


class StoredPictures(Pictures):
    """Images in a column of struct<bytes, path>: in the bytes, or in a file within the data set."""

    def __init__(self, column: pa.Array, root: str) -> None:
        self.column, self.root = column, os.path.realpath(root)

    def present(self, row: int) -> bool:
        value = self.column[row]
        return bool(value.is_valid and (value["bytes"].is_valid or value["path"].is_valid))

    def decode(self, row: int) -> Image.Image:
        return decode(self.encoded(row))

    def encoded(self, row: int) -> bytes:
        data: bytes | None = self.column[row]["bytes"].as_py()
        if data is not None:
            return data
        name = self.column[row]["path"].as_py()
        path = os.path.realpath(os.path.join(self.root, name))
        if not path.startswith(self.root + os.sep):
            raise Unusable(Kind.IMAGE, f"got the path {name!r}, expected one within the data set; mend it, or {LEAVE_OUT}")
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise Unusable(Kind.IMAGE, f"{path}: cannot be read ({first_line(error)}); restore it, or {LEAVE_OUT}") from error
