"""LeRobot data sets (v2.x, v3.x) as episode files: `lerobot:PATH?cameras=front,wrist&episodes=0:50`.

Rows are translated as they are read; docs/data_format.md has the table. Where they lie is said by their own episode_index,
else by the metadata; what single rows contradict is a fault of their episode.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.faults import LEAVE_OUT, Fault, FaultError, Kind, Unusable, file_faults, to_matrix
from paligemma_vla.data.formats import READ_ERRORS, EpisodeFile, Frames, Pictures, read_columns, reading
from paligemma_vla.data.formats.lerobot_language import is_language, styles, texts_in_force
from paligemma_vla.data.formats.lerobot_meta import (
    INDEX_COLUMNS,
    SUBTASK,
    TASK,
    Metadata,
    Selection,
    VideoSpans,
    find_root,
    load_metadata,
    say,
    to_scalars,
)
from paligemma_vla.data.formats.parquet import (
    EncodedPictures,
    ParquetEpisodes,
    is_binary,
    is_list,
    is_text,
    open_table,
    sample_digest,
)
from paligemma_vla.data.images import decode
from paligemma_vla.data.video import EXACT, VideoDecoders
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import DatasetMetadata, Layout, Pixels, Rows
from paligemma_vla.storage import POINTER, POINTER_REMEDY, missing_content, open_source

SMALLEST_VIDEO = 1024  # bytes; a file with less is a text in its place
REBUILT = ("timestamp", "frame_index", "episode_index")  # from the order of the rows, where they are missing
SUCCESS = ("next.success", "next.done")  # the first of them that is there says if an episode ended in success


class LeRobotFormat:
    """See `data.formats.Format`."""

    def list_files(self, location: str, where: str) -> list[str]:
        selection = Selection.parse(location, where)
        metadata = load_metadata(find_root(selection.path))
        for difference in metadata.differences:
            say(metadata.root, difference)
        metadata.cameras(selection)
        for camera in metadata.depth_maps if selection.cameras is None else ():
            say(metadata.root, f"{camera.camera} is left out: a depth map is no colour camera")
        if not metadata.complete or (selection.episodes != (None, None) and not _are_there(metadata, selection)):
            metadata = metadata.located
        wanted = [file for file in np.unique(metadata.file[metadata.selected(selection)]).tolist() if metadata.files[file]]
        paths = [os.path.join(metadata.root, metadata.files[file]) for file in wanted]
        if os.path.isfile(selection.path):  # one of its files
            paths = [path for path in paths if os.path.realpath(path) == os.path.realpath(selection.path)]
        return [str(replace(selection, path=path)) for path in paths]

    def open(self, name: str, location: str, stream: bool) -> EpisodeFile:
        return LeRobotFile(name, Selection.parse(location), stream)

    def parts(self, location: str) -> list[str]:
        selection = Selection.parse(location)
        metadata = _metadata_of(selection.path)
        others = [os.path.join(metadata.root, name) for name in (*metadata.sources, *_videos(metadata, selection))]
        return [selection.path, *filter(os.path.isfile, others)]  # `row_faults` reports what is missing

    def selected(self, location: str) -> tuple[str, int | None, int | None]:
        selection = Selection.parse(location)
        return selection.path, *selection.episodes


FORMAT = LeRobotFormat()


def _metadata_of(path: str) -> Metadata:
    """The metadata of the data set that a data file is in, and is one of the files of. Raises `FaultError`."""
    metadata = load_metadata(find_root(path))
    relative = os.path.relpath(path, metadata.root)
    metadata = metadata if relative in metadata.file_numbers else metadata.located
    if relative not in metadata.file_numbers or not (metadata.file == metadata.file_numbers[relative]).any():
        raise FaultError(Fault(path, Kind.FILE, f"holds no episode that {metadata.root}/meta lists; take it out of the data"))
    return metadata


def _listed(metadata: Metadata, path: str) -> Rows:
    """The episodes (rows of the metadata) of one of its data files."""
    return np.flatnonzero(metadata.file == metadata.file_numbers[os.path.relpath(path, metadata.root)])


def _are_there(metadata: Metadata, selection: Selection) -> bool:
    """True if the files of the selected episodes have as many rows as their episodes, or cannot be read (opening tells why)."""
    for file in np.unique(metadata.file[metadata.selected(selection)]).tolist():
        path = os.path.join(metadata.root, metadata.files[file])
        with suppress(*READ_ERRORS), open_table(path) as source:
            if pq.read_metadata(source).num_rows != metadata.length[metadata.file == file].sum():
                return False
    return True


def _videos(metadata: Metadata, selection: Selection) -> list[str]:
    """Videos (relative to the data set) of the selected cameras and episodes of one data file."""
    listed = _listed(metadata, selection.path)
    here = listed[metadata.selected(selection)[listed]]
    spans = [metadata.videos[camera.key] for camera in metadata.cameras(selection) if camera.dtype == "video"]
    return [span.files[file] for span in spans for file in np.unique(span.file[here]).tolist()]


class LeRobotFile(ParquetEpisodes):
    """One data file of a LeRobot data set, with the videos that belong to it. Raises `FaultError`."""

    def __init__(self, name: str, selection: Selection, stream: bool) -> None:
        super().__init__(name, selection.path, stream)
        if self.bounds[-1] == 0:
            raise FaultError(
                Fault(name, Kind.EMPTY, "got 0 rows, expected at least one episode; take the file out of the data")
            )
        self.selection = selection
        self.metadata = _metadata_of(selection.path)
        if self.metadata.length[_listed(self.metadata, selection.path)].sum() != self.bounds[-1]:
            self.metadata = self.metadata.located
        self.cameras = self.metadata.cameras(selection)
        asked = {schema.STATE: selection.state, schema.ACTION: selection.action}
        self._numbers = {column: self.metadata.vector(column, features) for column, features in asked.items()}
        self._cameras = {schema.image_column(n + 1): camera for n, camera in enumerate(self.cameras)}
        self._success = self._present(*SUCCESS)[:1]
        self.tells_success = bool(self._success)
        self._prompt, self._style = self.metadata.prompt(selection.prompt)
        self.prompts_change = selection.prompt is not None
        self._by_style = self._prompt in self.arrow.names and is_language(self.arrow.field(self._prompt).type)
        times, tasks = self._present("timestamp"), self._present(TASK)
        prompt = tasks if self._prompt == TASK else [self._prompt]
        self._stored = {
            schema.PROMPT: [*prompt, *times, *tasks] if self._by_style else prompt,
            **{column: vector.keys for column, vector in self._numbers.items()},
            **dict.fromkeys(schema.FLAGS, self._success),
            **{name: times if one.dtype == "video" else [one.key] for name, one in self._cameras.items()},
        }
        self.columns = list(self._stored)
        used = {
            *(key for vector in self._numbers.values() for key in vector.keys),
            *(camera.key for camera in self.cameras),
            *INDEX_COLUMNS,
            *self._success,
            self._prompt,
        }
        depth = {feature.key: f"{feature.key} (depth map)" for feature in self.metadata.depth_maps}
        self.unused = [depth.get(key, key) for key in self.metadata.info.features if key not in used]
        self._texts = self.metadata.subtasks if self._prompt == SUBTASK else self.metadata.tasks

    def _present(self, *names: str) -> list[str]:
        """Those of the names that are one column, of numbers; not of those that are rebuilt and have no number in any row."""
        return [name for name in self._numeric(*names) if name not in self._blank]

    def _numeric(self, *names: str) -> list[str]:
        return [name for name in names if self.arrow.names.count(name) == 1 and _is_numeric(self.arrow.field(name).type)]

    @cached_property
    def _blank(self) -> set[str]:
        """Columns of `REBUILT` without a number in any row. Those of which the footer has a minimum need not be read."""
        metadata = self._open().metadata
        paths = [metadata.schema.column(number).path.partition(".")[0] for number in range(metadata.num_columns)]

        def has_minimum(name: str) -> bool:
            column = paths.index(name)
            chunks = (metadata.row_group(group).column(column) for group in range(metadata.num_row_groups))
            return any(chunk.statistics is not None and chunk.statistics.has_min_max for chunk in chunks)

        unsure = [name for name in self._numeric(*REBUILT) if not has_minimum(name)]
        return {name for name, values in self._read(unsure).items() if np.isnan(values).all()}

    def _read_scalars(self, *names: str) -> dict[str, NDArray[np.float64]]:
        """Those of the columns that are there, of all rows (R,)."""
        return self._read(self._present(*names))

    def _read(self, names: list[str]) -> dict[str, NDArray[np.float64]]:
        with reading(self.path, names):
            table = self._open().read(columns=names, use_threads=False)
        return {name: to_scalars(table[name]) for name in names}

    @cached_property
    def _spans(self) -> tuple[Rows, Rows]:
        """The episodes (rows of the metadata; -1: it does not list it) in the order of their rows (S,), and where the rows of
        each begin, and all of them end (S + 1,).
        """
        metadata, rows = self.metadata, int(self.bounds[-1])
        listed = _listed(metadata, self.selection.path)
        ends = np.cumsum(metadata.length[listed])
        if len(listed) == 1 and (metadata.info.major == 2 or ends[0] == rows):
            return listed, np.array([0, rows])
        if not self._present("episode_index"):
            if ends[-1] != rows:
                got = f"missing, and there are {rows} rows, not {ends[-1]} as by the lengths in {metadata.root}/meta"
                raise FaultError(Fault(self.path, Kind.COLUMN, f"{got}; restore the file", column="episode_index"))
            return listed, np.concatenate([[0], ends])
        numbers = self._read_scalars("episode_index")["episode_index"]
        if ends[-1] == rows and np.array_equal(numbers, np.repeat(metadata.number[listed], metadata.length[listed])):
            return listed, np.concatenate([[0], ends])
        # Single rows may have a wrong number: an episode is where the middle one of its rows is.
        order = np.argsort(numbers, kind="stable")
        value, begin, count = np.unique(numbers[order], return_index=True, return_counts=True)
        middle = order[begin + count // 2]
        if ends[-1] == rows:
            if np.isin(metadata.number[listed], value).all():
                listed = listed[np.argsort(middle[np.searchsorted(value, metadata.number[listed])])]
            return listed, np.cumsum([0, *metadata.length[listed]])
        value, count = value[np.argsort(middle)], count[np.argsort(middle)]
        episodes = {number: row for row, number in zip(listed.tolist(), metadata.number[listed].tolist(), strict=True)}
        return np.array([episodes.get(number, -1) for number in value.tolist()]), np.cumsum([0, *count])

    @property
    def outside(self) -> Rows:
        episodes, bounds = self._spans
        unwanted = (episodes < 0) | ~self.metadata.selected(self.selection)[episodes]
        return np.stack([bounds[:-1], bounds[1:]], axis=1)[unwanted]

    def survey(self) -> tuple[Layout, list[Fault]]:
        faults = [*self._column_faults(), *self._style_faults()]
        metadata, state, action = self.metadata, self._numbers[schema.STATE], self._numbers[schema.ACTION]
        own = DatasetMetadata()
        try:
            own = DatasetMetadata.from_json(json.dumps(metadata.info.paligemma_vla or {}))
        except DataError as error:
            faults.append(Fault(self.path, Kind.METADATA, f"info.json: paligemma_vla: {error}; mend it, or take it out"))
        described = replace(
            own,
            robot=metadata.info.robot_type if isinstance(metadata.info.robot_type, str) else "",
            cameras=tuple(camera.camera for camera in self.cameras),
            state_names=state.names,
            action_names=action.names,
            control_hz=metadata.info.fps,
            extra=own.extra
            | {f"{role}_columns": "+".join(one.keys) for role, one in self._numbers.items() if not one.is_plain}
            | ({"prompt_column": self.selection.prompt} if self.selection.prompt is not None else {}),
        )
        return Layout(len(self.cameras), state.size, action.size, described), faults

    def _column_faults(self) -> Iterator[Fault]:
        """What the columns of `self._stored` are not made of: the one place that says so."""
        names = self.arrow.names
        images = [(name, camera.key) for name, camera in self._cameras.items() if camera.dtype == "image"]
        tasks = [(schema.PROMPT, TASK)] if len(self._texts) != 1 and (self._by_style or self._prompt == TASK) else []
        prompts = [(schema.PROMPT, self._prompt)] if self._prompt != TASK else []
        numbers = [(column, key) for column, vector in self._numbers.items() for key in vector.keys]
        for stored, matches, expected, remedy in [
            (numbers, _is_numeric, "numbers, or lists of them", "name another with ?state=FEATURE and ?action=FEATURE"),
            (tasks, _is_numeric, "whole numbers", "leave one task in the list of tasks"),
            (prompts, _is_prompt, "texts, numbers of tasks, or lists of texts by style", "name another with ?prompt=COLUMN"),
            (images, _is_image, "encoded images: binary, or struct<bytes, path>", "choose other cameras (?cameras=...)"),
        ]:
            for column, name in stored:
                if (count := names.count(name)) != 1:
                    got = f"got {count or 'no'} column {name}, expected one; there are {', '.join(map(ascii, names))[:500]}"
                    yield Fault(self.path, Kind.COLUMN, f"{got}; restore the file, or {remedy}", column=column)
                elif not matches(kind := self.arrow.field(name).type):
                    text = f"{name}: got type {str(kind)[:80]}, expected {expected}; restore the file, or {remedy}"
                    yield Fault(self.path, Kind.TYPE, text, column=column)

    def row_faults(self) -> list[Fault]:
        """One fault at most of each kind for each episode whose rows contradict the metadata, or whose video is missing."""
        (episodes, bounds), metadata = self._spans, self.metadata
        lengths, rows, of = np.diff(bounds), np.arange(bounds[-1]), f"of {metadata.root}/meta; restore the file, or {LEAVE_OUT}"
        frames = rows - np.repeat(bounds[:-1], lengths)
        faults = list(self._video_faults())
        for span in np.flatnonzero((lengths != metadata.length[episodes]) & (episodes >= 0)).tolist():
            text = f"got {lengths[span]} rows, expected {metadata.length[episodes[span]]}, the length of episode"
            text = f"{text} {metadata.number[episodes[span]]} {of}"
            faults.append(Fault(self.path, Kind.FLAGS, text, int(bounds[span]), rows=int(lengths[span])))
        found = self._read_scalars("episode_index", "frame_index", "timestamp")
        # Some recorders count frames from 1, or through the file: what matters is that none is missing.
        counted = frames + np.repeat(found["frame_index"][bounds[:-1]], lengths) if "frame_index" in found else frames
        for name, expected in (("episode_index", np.repeat(metadata.number[episodes], lengths)), ("frame_index", counted)):
            got = found.get(name, expected)
            for row in self._first_of_spans(got != expected):
                text = f"got {got[row]:g}, expected {expected[row]:g} by the lengths {of}"
                faults.append(Fault(self.path, Kind.FLAGS, text, row, name))
        if "timestamp" in found:
            faults += self._time_faults(found["timestamp"], frames)
        self._say_differences()
        return faults

    def _style_faults(self) -> Iterator[Fault]:
        """A style that no text of the column has."""
        if self._by_style:
            with reading(self.path, [self._prompt]):
                known = styles(self._open().read(columns=[self._prompt], use_threads=False)[self._prompt].combine_chunks())
            if self._style not in known:
                got = f"{self._prompt}: got no text of style {self._style}, expected of {', '.join(known) or 'any'}"
                text = f"{got}; name another with ?prompt={self._prompt}:STYLE"
                yield Fault(self.path, Kind.PROMPT, text, column=schema.PROMPT)

    def _first_of_spans(self, wrong: NDArray[np.bool_]) -> list[int]:
        """The first row of each episode where it is true."""
        rows = np.flatnonzero(wrong)
        _, first = np.unique(np.searchsorted(self._spans[1], rows, side="right"), return_index=True)
        return rows[first].tolist()  # type: ignore[no-any-return]

    def _time_faults(self, times: NDArray[np.float64], frames: Rows) -> Iterator[Fault]:
        """Times that are none, go back, or are those of another episode's frames; others may be as they are."""
        (episodes, bounds), fps = self._spans, self.metadata.info.fps
        lengths, shortest, longest = np.diff(bounds), -np.inf, np.full(len(episodes), np.inf)
        for camera in (one for one in self.cameras if one.dtype == "video"):
            spans = self.metadata.videos[camera.key]
            duration = (spans.stop - spans.start)[episodes]
            shortest, longest = -EXACT, np.minimum(longest, duration * (1 - 0.5 / np.maximum(lengths, 1)) + EXACT)
        before, latest = np.where(frames > 0, np.roll(times, 1), shortest), np.repeat(longest, lengths)
        for row in self._first_of_spans(~((before <= times) & (times <= latest))):
            got = f"got {times[row]:g} s, {before[row]:g} s in the row before, expected times that do not go back"
            got = f"got {times[row]:g} s, expected it within its episode's video" if times[row] > latest[row] else got
            yield Fault(self.path, Kind.FLAGS, f"{got}; restore the file, or {LEAVE_OUT}", row, "timestamp")
        if (np.abs(times - times[np.arange(len(times)) - frames] - frames / fps) > 0.5 / fps).any():
            text = f"timestamps are not those of fps {fps:g} in info.json, which is taken for the control rate"
            say(self.metadata.root, f"{text}; of videos the frames nearest to the timestamps are read")

    def _say_differences(self) -> None:
        root, episodes = self.metadata.root, self._spans[0]
        for name in ("episode_index", "frame_index", "timestamp", "task_index"):
            if not self._present(name):
                source = "the only task" if name == "task_index" else "the order of the rows"
                say(root, f"the rows have no column {name} of numbers; it is taken from {source}")
        if (episodes < 0).any():
            say(root, "there are rows of episodes that meta does not list; they are left out")
        if len(np.setdiff1d(_listed(self.metadata, self.selection.path), episodes)):
            say(root, "there are episodes in meta of which no data file has a row; they are left out")

    def _video_faults(self) -> Iterator[Fault]:
        episodes, bounds = self._spans
        wanted = (episodes >= 0) & self.metadata.selected(self.selection)[episodes]
        videos = {column: self.metadata.videos[one.key] for column, one in self._cameras.items() if one.dtype == "video"}
        for column, spans in videos.items():
            for file in np.unique(spans.file[episodes[wanted]]).tolist():
                path = os.path.join(self.metadata.root, spans.files[file])
                reason = _why_no_video(path) if spans.files[file] else "no file_index or from_timestamp in meta/episodes"
                here, kind = wanted & (spans.file[episodes] == file), Kind.FILE
                text = f"got no video {path} ({reason}), expected one as the metadata says; restore it"
                if reason is None:
                    here, kind = here & spans.shared[episodes], Kind.FRAME
                    text = f"got the from_timestamp of another episode in {path}, expected one of its own; restore the metadata"
                for span in np.flatnonzero(here).tolist():
                    first, stop = bounds[span : span + 2].tolist()
                    remedy = f"{text}, choose other cameras (?cameras=...), or {LEAVE_OUT}"
                    yield Fault(self.path, kind, remedy, first, column, stop - first)

    def _stored_columns(self, columns: Sequence[str]) -> list[str]:
        """One at least, or a table would have no rows."""
        cheap = next((name for name in INDEX_COLUMNS if name in self.arrow.names), self.arrow.names[0])
        return sorted({name for column in columns for name in self._stored[column]} or {cheap})

    def _translate(self, columns: Sequence[str], table: pa.Table, rows: Rows) -> pa.Table:
        flags = self._flags(table, rows) if set(columns) & set(schema.FLAGS) else {}
        return pa.table({name: flags[name] if name in flags else self._column(name, table, rows) for name in columns})

    def _column(self, name: str, table: pa.Table, rows: Rows) -> pa.Array:
        if name == schema.PROMPT:
            return self._instructions(table, rows)
        if name in self._numbers:
            lists = [_number_lists(table[key].combine_chunks()) for key in self._numbers[name].keys]
            return lists[0] if len(lists) == 1 else _join_lists(lists, [one.size for one in self._numbers[name].features])
        camera = self._cameras[name]
        if camera.dtype == "image":
            return table[camera.key].combine_chunks()
        (episodes, frames), spans = self._locate(rows), self.metadata.videos[camera.key]
        values = {
            "camera": np.full(len(rows), self.cameras.index(camera)),
            "video": spans.file[episodes],
            "time": spans.start[episodes] + self._times(table, rows),
            "episode": self.metadata.number[episodes],
            "frame": frames,
        }
        return pa.StructArray.from_arrays(list(map(pa.array, values.values())), names=list(values))

    def _instructions(self, table: pa.Table, rows: Rows) -> pa.Array:
        """Of some rows: texts as they are, or by their numbers, or those in force; where none is yet, the task."""
        if not (self._by_style or self._prompt in (TASK, *self._present(self._prompt))):
            return table[self._prompt].combine_chunks()
        number, index = TASK if self._by_style else self._prompt, pa.array(np.zeros(len(rows), np.int32))  # the only task
        if number in table.column_names:
            index = pa.compute.index_in(pa.array(to_scalars(table[number])), pa.array(self._texts.keys(), pa.float64()))
        tasks = pa.DictionaryArray.from_arrays(index, pa.array(self._texts.values(), pa.string()))
        if not self._by_style:
            return tasks
        texts, listed = texts_in_force(table[self._prompt].combine_chunks(), self._style, self._times(table, rows))
        return pa.compute.coalesce(texts, pa.compute.if_else(pa.array(listed), tasks.dictionary_decode(), None))

    def _times(self, table: pa.Table, rows: Rows) -> NDArray[np.float64]:
        """Of some rows, in seconds."""
        if self._present("timestamp"):
            return to_scalars(table["timestamp"])
        times: NDArray[np.float64] = self._locate(rows)[1] / self.metadata.info.fps
        return times

    def _locate(self, rows: Rows) -> tuple[Rows, Rows]:
        """Of some rows of the file, the episode (its row in the metadata), and the frame in it."""
        episodes, bounds = self._spans
        span = np.searchsorted(bounds, rows, side="right") - 1
        return episodes[span], rows - bounds[span]

    def _flags(self, table: pa.Table, rows: Rows) -> dict[str, pa.Array]:
        """is_first, is_last and is_terminal by where the episodes lie."""
        _, bounds = self._spans
        span = np.searchsorted(bounds, rows, side="right")
        first, last = rows == bounds[span - 1], rows + 1 == bounds[span]
        succeeded = np.nan_to_num(to_scalars(table[self._success[0]])) != 0 if self._success else np.zeros(len(rows), bool)
        return dict(zip(schema.FLAGS, map(pa.array, (first, last, last & succeeded)), strict=True))

    def frames(self, column: str) -> Frames | None:
        camera = self._cameras[column]
        if camera.dtype != "video":
            return None
        stored, spans = read_columns(self, [column])[column].combine_chunks(), self.metadata.videos[camera.key]
        file, time = (stored.field(name).to_numpy(zero_copy_only=False) for name in ("video", "time"))
        return Frames(self.metadata.root, spans.files, file, time, spans.episodes, camera.info)

    def without(self, column: str) -> str:
        others = ",".join(camera.camera for name, camera in self._cameras.items() if name != column)
        return f"?cameras={others}" if others else "the data has no other"

    def pictures(self, column: pa.Array, videos: VideoDecoders) -> Pictures:
        if is_binary(column.type):
            return EncodedPictures(column)
        if _is_image(column.type):
            return StoredPictures(column, self.metadata.root)
        spans = self.metadata.videos[self.cameras[column[0]["camera"].as_py()].key]
        return FramePictures(column, self.metadata.root, spans, self._begin, 0.5 / self.metadata.info.fps, videos)

    def _image_column(self, column: str) -> str | None:
        camera = self._cameras[column]
        return camera.key if camera.dtype == "image" else None

    @cached_property
    def _begin(self) -> float:
        """The earliest timestamp of an episode's first row; 0 in all that LeRobot writes."""
        first = self._read_scalars("timestamp")["timestamp"][self._spans[1][:-1]] if self._present("timestamp") else np.zeros(1)
        return max(0.0, float(np.nan_to_num(first).min()))

    def digest(self) -> int:
        metadata, everything = self.metadata, self.selection.of_a_row
        episodes = self._spans[0][self._spans[0] >= 0]
        digest = hashlib.blake2b(super().digest().to_bytes(8, "little"), digest_size=8)
        spans = [metadata.videos[camera.key] for camera in self.cameras if camera.dtype == "video"]
        facts = {
            "selection": everything.choices,
            "cameras": [camera.key for camera in self.cameras],
            "fps": metadata.info.fps,
            "tasks": sorted(self._texts.items()),
            "episodes": metadata.number[episodes].tolist(),
            "lengths": metadata.length[episodes].tolist(),
            "videos": [[span.start[episodes].tolist(), span.file[episodes].tolist()] for span in spans],
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


def _why_no_video(path: str) -> str | None:
    """Seen without opening it, as far as that goes."""
    if not os.path.isfile(path):
        return "no such file"
    return missing_content(path) if os.path.getsize(path) < SMALLEST_VIDEO else None


def _is_numeric(kind: pa.DataType) -> bool:
    """True for numbers, and for lists of them, however deep."""
    while is_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_prompt(kind: pa.DataType) -> bool:
    return is_text(kind) or _is_numeric(kind) or is_language(kind)


def _is_image(kind: pa.DataType) -> bool:
    """True for encoded images, as they are or as `datasets.Image` stores them."""
    if not pa.types.is_struct(kind):
        return is_binary(kind)
    parts = {field.name: field.type for field in kind}
    known = {"bytes": is_binary, "path": is_text}
    return all(name in parts and (matches(parts[name]) or pa.types.is_null(parts[name])) for name, matches in known.items())


def _number_lists(column: pa.Array) -> pa.Array:
    """Numbers, or lists of them, as lists of float32 or float64; [[x, y]] and [[x], [y]] are [x, y].

    Integers beyond 2^24 become the nearest float32, as numbers of float64 do.
    """
    if not is_list(column.type):
        return pa.FixedSizeListArray.from_arrays(column.cast(pa.float32(), safe=False), 1)
    while is_list(column.type.value_type):
        inner = column.flatten()
        ends = (np.cumsum([0, *lists.value_lengths().fill_null(0).to_numpy()], dtype=np.int32) for lists in (inner, column))
        column = pa.ListArray.from_arrays(next(ends)[next(ends)], inner.flatten())
    if pa.types.is_float32(column.type.value_type) or pa.types.is_float64(column.type.value_type):
        return column
    return column.cast(pa.list_(pa.float32()), safe=False)


def _join_lists(columns: Sequence[pa.Array], sizes: Sequence[int]) -> pa.Array:
    """The lists of several columns one after the other, row by row. One that is not of its size gives none of its numbers."""
    values = np.hstack([to_matrix(column, size) for column, size in zip(columns, sizes, strict=True)])
    lengths = [column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False) for column in columns]
    given = np.repeat(np.stack(lengths, axis=1) == sizes, sizes, axis=1)  # (R, P)
    ends = np.concatenate([[0], np.cumsum(given.sum(axis=1))])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values[given]))


class FramePictures(Pictures):
    """Frames of one camera's videos. column: struct of video, time, episode and frame. begin: the first timestamp of
    episodes. tolerance: in seconds."""

    def __init__(
        self, column: pa.Array, root: str, spans: VideoSpans, begin: float, tolerance: float, videos: VideoDecoders
    ) -> None:
        self.column, self.root, self.spans, self.begin = column, root, spans, begin
        self.tolerance, self.videos = tolerance, videos

    def present(self, row: int) -> bool:
        return True

    def frame(self, row: int) -> tuple[str, float]:
        wanted = self.column[row].as_py()
        return os.path.join(self.root, self.spans.files[wanted["video"]]), wanted["time"]

    def decode(self, row: int, side: int = 0) -> Pixels:
        wanted, (path, time) = self.column[row].as_py(), self.frame(row)
        first = float(self.spans.first[wanted["video"]]) + self.begin
        try:
            return self.videos.frame(path, time, self.tolerance, first)
        except Unusable as error:
            raise Unusable(error.kind, f"episode {wanted['episode']}, frame {wanted['frame']}: {error.text}") from error

    def encoded(self, row: int) -> bytes | None:
        return None


class StoredPictures(Pictures):
    """Images in a column of struct<bytes, path>: in the bytes, or in a file within the data set."""

    def __init__(self, column: pa.Array, root: str) -> None:
        self.column, self.root = column, root

    def present(self, row: int) -> bool:
        value = self.column[row]
        return bool(value.is_valid and (value["bytes"].is_valid or value["path"].is_valid))

    def decode(self, row: int, side: int = 0) -> Pixels:
        return decode(self.encoded(row), side)

    def encoded(self, row: int) -> bytes:
        data: bytes | None = self.column[row]["bytes"].as_py()
        if data is not None:
            return data
        name = self.column[row]["path"].as_py()
        path = os.path.abspath(os.path.join(self.root, name))
        # Of the name, not of the file: in a snapshot of the hub every file is a link to elsewhere.
        if not any(path.startswith(root(self.root) + os.sep) for root in (os.path.abspath, os.path.realpath)):
            raise Unusable(Kind.IMAGE, f"got the path {name!r}, expected one within the data set; mend it, or {LEAVE_OUT}")
        try:
            content = Path(path).read_bytes()
            if content.startswith(POINTER):
                raise OSError(POINTER_REMEDY)
            return content
        except (OSError, ValueError) as error:  # ValueError: of a name with a null byte
            raise Unusable(Kind.IMAGE, f"{path}: cannot be read ({first_line(error)}); restore it, or {LEAVE_OUT}") from error
