"""HDF5 recordings of LIBERO, robomimic and ALOHA as episode files: `hdf5:PATH?cameras=front,wrist&orientation=flipped`.

LIBERO and robomimic keep many episodes in a file, as groups `data/demo_N`; ALOHA one, as `/observations` and `/action`. What is
where is said in docs/data_format.md. Pictures are read one by one, when they are needed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NoReturn, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.faults import LEAVE_OUT, Fault, FaultError, Kind, Unusable, file_faults
from paligemma_vla.data.formats import EpisodeFile, Pictures, parse_location
from paligemma_vla.data.formats.parquet import sample_digest
from paligemma_vla.data.images import decode
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, first_line, needs_extra
from paligemma_vla.schema import DatasetMetadata, Layout, Pixels, Rows
from paligemma_vla.storage import open_source

SUFFIXES = (".hdf5", ".h5")
EXPECTED = (
    "PATH?cameras=NAME,NAME&orientation=stored|flipped|rotated&state=NAME+NAME&action=NAME&prompt=WORDS&filter=NAME, "
    "each if wanted"
)
# How pictures are turned, and what that makes of those of robosuite, which come upside down.
TURNS: dict[str, tuple[slice, ...]] = {
    "stored": (),
    "flipped": (slice(None, None, -1),),
    "rotated": (slice(None, None, -1), slice(None, None, -1)),
}
MIRRORED = "upright and mirrored: as rendered, turned by 180 degrees ([::-1, ::-1])"
RENDERED = {"stored": "upside down, as rendered", "flipped": "upright: as rendered, flipped ([::-1])", "rotated": MIRRORED}
GROUP = re.compile(r"demo_([0-9]+)")
POSE_DELTA = ("delta_x", "delta_y", "delta_z", "delta_axis_angle_x", "delta_axis_angle_y", "delta_axis_angle_z", "gripper")
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
ARMS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in JOINTS)

LIBERO = DatasetMetadata(
    robot="libero-panda",
    cameras=("agentview", "wrist"),
    image_orientation=MIRRORED,
    state_names=("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"),
    state_units=("m", "m", "m", "rad", "rad", "rad", "m", "m"),
    action_names=POSE_DELTA,
    action_units=("normalised",) * 7,
    action_convention="OSC pose deltas: 1 is 5 cm, or 0.5 rad, in the frame of the base; gripper +1 = close, -1 = open",
    action_representation="delta",
    control_hz=20.0,
)
ROBOMIMIC = DatasetMetadata(
    state_names=("x", "y", "z", "quaternion_x", "quaternion_y", "quaternion_z", "quaternion_w", "finger_left", "finger_right"),
    action_names=POSE_DELTA,
)
ALOHA = DatasetMetadata(robot="aloha", state_names=ARMS, action_names=ARMS, action_representation="absolute", control_hz=50.0)


@dataclass(frozen=True)
class Recorder:
    """What a program writes. state: names that an episode's numbers are joined of; pictures: names of its cameras, and what
    they are called here (all others as they are stored); observations, actions: groups of an episode they are in; orientation:
    how pictures are turned unless it is said."""

    name: str
    metadata: DatasetMetadata
    state: tuple[str, ...]
    observations: str = "obs"
    images: str = "obs"
    action: str = "actions"
    orientation: str = "stored"
    pictures: Mapping[str, str] = field(default_factory=dict)


RECORDERS = (
    Recorder(
        "LIBERO",
        LIBERO,
        ("ee_pos", "ee_ori", "gripper_states"),
        orientation="rotated",
        pictures={"agentview_rgb": "agentview", "eye_in_hand_rgb": "wrist"},
    ),
    Recorder("robomimic", ROBOMIMIC, ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")),
    Recorder("ALOHA", ALOHA, ("qpos",), "observations", "observations/images", "action"),
)


@dataclass(frozen=True)
class Selection:
    """A file, folder or glob (`path`), and how it is read; None: as its recorder does. cameras: names as stored or as they are
    called here. state, action: names, the state's joined by `+`. filter: of `mask/`, episodes of which alone are read."""

    path: str
    cameras: tuple[str, ...] | None = None
    orientation: str | None = None
    state: str | None = None
    action: str | None = None
    prompt: str | None = None
    filter: str | None = None
    keys: ClassVar[tuple[str, ...]] = ("cameras", "orientation", "state", "action", "prompt", "filter")

    @classmethod
    def parse(cls, text: str, where: str = "hdf5") -> Self:
        """Raises `DataError` that begins with `where`."""
        path, values = parse_location(text, "hdf5", cls.keys, EXPECTED, where)
        if values.get("orientation", "stored") not in TURNS:
            got = f"orientation: got {values['orientation']}, expected one of {', '.join(TURNS)}"
            raise DataError(f"{where}: {text}: {got}")
        cameras = values.pop("cameras", None)
        return cls(path, None if cameras is None else tuple(cameras.split(",")), **values)

    @property
    def choices(self) -> str:
        """What is selected, as it is written behind a question mark."""
        given = {key: getattr(self, key) for key in self.keys if getattr(self, key) is not None}
        return "&".join(f"{key}={','.join(value) if key == 'cameras' else value}" for key, value in given.items())

    def __str__(self) -> str:
        return f"{self.path}?{self.choices}" if self.choices else self.path


class HDF5Format:
    """See `data.formats.Format`."""

    def list_files(self, location: str, where: str) -> list[str]:
        selection = Selection.parse(location, where)
        path = selection.path
        if os.path.isfile(path):
            return [location]
        pattern = os.path.join(glob.escape(path), "**", "*") if os.path.isdir(path) else path
        found = [name for name in sorted(glob.glob(pattern, recursive=True)) if name.endswith(SUFFIXES)]
        if not found:
            raise DataError(
                f"{where}: hdf5:{path}: no file {' or '.join(SUFFIXES)} there; expected a file, a folder, or a glob"
            )
        return [str(replace(selection, path=name)) for name in found]

    def open(self, name: str, location: str, stream: bool) -> EpisodeFile:
        return HDF5File(name, Selection.parse(location))

    def parts(self, location: str) -> list[str]:
        return [Selection.parse(location).path]

    def selected(self, location: str) -> tuple[str, int | None, int | None]:
        return Selection.parse(location).path, None, None


FORMAT = HDF5Format()


class HDF5File(EpisodeFile):
    """One HDF5 file; each of its episodes is a row group. Raises `FaultError` when it cannot be read, or holds no episodes."""

    def __init__(self, name: str, selection: Selection) -> None:
        self.path, self.selection = name, selection
        with needs_extra(name, "hdf5", DataError):
            import h5py
        try:
            with file_faults(name), open_source(selection.path):  # which tells a file that is not there, or a pointer to one
                self.file: Any = h5py.File(selection.path, "r", locking=False)
        except OSError as error:
            text = f"cannot be read as HDF5 ({first_line(error)}); restore it, or take it out of the data"
            raise FaultError(Fault(name, Kind.FILE, text)) from error
        self._dataset: Any = h5py.Dataset
        self.episodes = self._find_episodes()
        self.recorder = self._recognise()
        first = self.episodes[0]
        self.action_name = selection.action or self.recorder.action
        self.state_names = selection.state.split("+") if selection.state else list(self.recorder.state)
        lengths = [self._rows(episode) for episode in self.episodes]
        self.bounds = np.cumsum([0, *lengths], dtype=np.int64)
        self.stored = self._pictures_of(first)
        called = [self.recorder.pictures.get(each, each) for each in self.stored]
        self.cameras = self._wanted(called)
        self.called = [called[self.stored.index(each)] for each in self.cameras]
        self.compressed = self._find(first, f"{self.recorder.images}/{self.cameras[0]}").ndim == 2 if self.cameras else False
        images = [schema.image_column(n + 1) for n in range(len(self.cameras))]
        self.columns = [*images, schema.STATE, schema.ACTION, schema.PROMPT, *schema.FLAGS]
        used = {f"{self.recorder.observations}/{each}" for each in self.state_names} | {self.action_name}
        used |= {f"{self.recorder.images}/{each}" for each in self.cameras}
        self.unused = [each for each in self._names(first) if each not in used]
        self.nbytes = 2**16  # what the library keeps of an open file, about
        self.tells_success = self._success is not None

    # ---- what is in the file

    def _find_episodes(self) -> list[str]:
        """Groups of the episodes, by number."""
        if "action" in self.file and "observations" in self.file:
            return [""]
        found = [match for match in map(GROUP.fullmatch, self.file.get("data", ())) if match is not None]
        names = [f"data/{match[0]}" for match in sorted(found, key=lambda match: int(match[1]))]
        if self.selection.filter is not None:
            masks = self.file.get("mask", {})
            if self.selection.filter not in masks:
                known = ", ".join(masks) or "none"
                self._refuse(Kind.FILE, f"got no mask/{self.selection.filter}, expected a filter that is there ({known})")
            kept = {f"data/{each.decode() if isinstance(each, bytes) else each}" for each in masks[self.selection.filter][()]}
            names = [name for name in names if name in kept]
        if not names:
            there = ", ".join(list(self.file)[:20]) or "nothing"
            expected = "data/demo_N as of LIBERO and robomimic, or action and observations as of ALOHA"
            self._refuse(Kind.EMPTY, f"got {there}, expected {expected}; take the file out of the data")
        return names

    def _recognise(self) -> Recorder:
        first = self.episodes[0]
        for recorder in RECORDERS:
            if (recorder.name == "ALOHA") == (first == "") and self._has(first, recorder.observations, recorder.state):
                return recorder
        recorder = RECORDERS[2] if first == "" else RECORDERS[1]
        if self.selection.state is None:
            there = ", ".join(self.file.get(f"{first}/{recorder.observations}", ())) or "nothing"
            self._refuse(Kind.COLUMN, f"got {there} in {first}/{recorder.observations}; name the state's with ?state=NAME+NAME")
        return replace(recorder, metadata=DatasetMetadata())

    def _has(self, episode: str, group: str, names: Sequence[str]) -> bool:
        return all(f"{episode}/{group}/{name}" in self.file for name in names)

    def _names(self, episode: str) -> list[str]:
        """Of everything in an episode."""
        found: list[str] = []
        group = self.file[episode or "/"]
        group.visititems(lambda name, item: found.append(name) if isinstance(item, self._dataset) else None)
        return found

    def _pictures_of(self, episode: str) -> list[str]:
        """Cameras in the file: those that the recorder names, then others. A compressed picture is a row of bytes."""
        group = self.file.get(f"{episode}/{self.recorder.images}", {})
        whole = [name for name, item in group.items() if getattr(item, "ndim", 0) == 4 and item.shape[-1] == 3]
        packed = [name for name, item in group.items() if getattr(item, "ndim", 0) == 2 and item.dtype == np.uint8]
        known = list(self.recorder.pictures)
        return sorted(whole or packed, key=lambda name: known.index(name) if name in known else len(known))

    def _wanted(self, called: list[str]) -> list[str]:
        """Stored names of the cameras that are wanted."""
        found = []
        for name in self.selection.cameras or called:
            if name not in (*self.stored, *called):
                known = ", ".join(called) or "none"
                self._refuse(Kind.COLUMN, f"got no camera {name}, expected of {known}; choose others (?cameras=...)")
            found.append(name if name in self.stored else self.stored[called.index(name)])
        return found

    def _refuse(self, kind: Kind, text: str) -> NoReturn:
        raise FaultError(Fault(self.path, kind, text))

    def _find(self, episode: str, name: str) -> Any:
        """A dataset of an episode; raises `ValueError` where there is none."""
        found = self.file.get(f"{episode}/{name}")
        if not isinstance(found, self._dataset):
            raise ValueError(f"{episode}/{name}: got none, expected a dataset")
        return found

    def _rows(self, episode: str) -> int:
        try:
            shape = self._find(episode, self.action_name).shape
        except ValueError:
            shape = ()
        if len(shape) != 2 or shape[0] == 0:
            there = ", ".join(self.file[episode or "/"])
            got = f"got shape {shape} of {episode}/{self.action_name}, expected (steps, numbers); there are {there}"
            self._refuse(Kind.COLUMN, f"{got}; take it out of the file, or name another with ?action=NAME")
        return int(shape[0])

    @cached_property
    def _success(self) -> str | None:
        return next((name for name in ("dones", "rewards") if self._has(self.episodes[0], "", [name])), None)

    @cached_property
    def _prompt(self) -> str | None:
        """The instruction of the whole file, where it or the selection says one."""
        if self.selection.prompt is not None:
            return self.selection.prompt
        try:
            words = json.loads(self.file["data"].attrs["problem_info"])["language_instruction"]
        except (KeyError, TypeError, ValueError):
            return None
        return "".join(words).strip().strip('"')  # in some files it is a list of letters

    @property
    def orientation(self) -> str:
        return self.selection.orientation or self.recorder.orientation

    @property
    def outside(self) -> Rows:
        return np.empty((0, 2), np.int64)

    def survey(self) -> tuple[Layout, list[Fault]]:
        faults, sizes, first = [], {schema.STATE: 0, schema.ACTION: 0}, self.episodes[0]
        for column in sizes:
            try:
                sizes[column] = self._numbers(column, first).shape[1]
            except (ValueError, OSError) as error:
                faults.append(Fault(self.path, Kind.COLUMN, f"{first_line(error)}; choose another", column=column))
        if not self.cameras:
            text = f"got no pictures in {first}/{self.recorder.images}, expected uint8 (steps, height, width, 3)"
            faults.append(Fault(self.path, Kind.COLUMN, text, column=schema.image_column(1)))
        if self._prompt is None:
            text = "got no instruction in the file; say one: ?prompt=open the drawer"
            faults.append(Fault(self.path, Kind.PROMPT, text, column=schema.PROMPT))
        state, action = sizes[schema.STATE], sizes[schema.ACTION]
        return Layout(len(self.cameras), state, action, self._describe(state, action)), faults

    def _describe(self, state: int, action: int) -> DatasetMetadata:
        known = self.recorder.metadata
        hz = known.control_hz
        with suppress(KeyError, TypeError, ValueError):
            hz = float(json.loads(self.file["data"].attrs["env_args"])["env_kwargs"]["control_freq"])
        own_state, own_action = self.selection.state is None, self.selection.action is None
        fits_state, fits_action = (
            own_state and len(known.state_names) == state,
            own_action and len(known.action_names) == action,
        )
        is_rendered = self.recorder.name == "LIBERO"
        turned = self.orientation if self.selection.orientation else ""
        return replace(
            known,
            cameras=tuple(self.called),
            image_orientation=RENDERED[self.orientation] if is_rendered else turned and f"{turned}, of how it was stored",
            state_names=known.state_names if fits_state else (),
            state_units=known.state_units if fits_state else (),
            action_names=known.action_names if fits_action else (),
            action_units=known.action_units if fits_action else (),
            action_convention=known.action_convention if own_action else "",
            action_representation=known.action_representation if own_action else "",
            control_hz=hz,
        )

    # ---- rows

    def read(self, columns: Sequence[str]) -> pa.Table:
        return pa.concat_tables(self.read_groups(columns, range(len(self.episodes))))

    def read_groups(self, columns: Sequence[str], groups: Sequence[int]) -> Iterator[pa.Table]:
        for group in groups:
            yield pa.table({name: self._column(name, group) for name in columns})

    def batches(self, columns: Sequence[str], groups: Sequence[int], rows: int) -> Iterator[tuple[Rows, pa.RecordBatch]]:
        for group, table in zip(groups, self.read_groups(columns, groups), strict=True):
            first = int(self.bounds[group])
            for batch in table.to_batches(rows):
                yield np.arange(first, first + batch.num_rows), batch
                first += batch.num_rows

    def _column(self, name: str, group: int) -> pa.Array:
        episode, rows = self.episodes[group], int(np.diff(self.bounds)[group])
        if name in (schema.STATE, schema.ACTION):
            values = self._numbers(name, episode)
            return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        if name == schema.PROMPT:
            return pa.repeat(pa.scalar(self._prompt, pa.string()), rows)
        if name in schema.FLAGS:
            flags = np.zeros(rows, bool)
            flags[0 if name == schema.IS_FIRST else -1] = name != schema.IS_TERMINAL or self._succeeded(episode)
            return pa.array(flags)
        camera = int(name.split("_")[1]) - 1
        shape = self._find(episode, f"{self.recorder.images}/{self.cameras[camera]}").shape
        if shape[0] != rows:
            raise ValueError(
                f"{episode}/{self.recorder.images}/{self.cameras[camera]}: got {shape[0]} pictures of {rows} steps"
            )
        where = {"camera": np.full(rows, camera), "group": np.full(rows, group), "row": np.arange(rows)}
        return pa.StructArray.from_arrays(list(map(pa.array, where.values())), names=list(where))

    def _numbers(self, column: str, episode: str) -> NDArray[np.float32]:
        """State or action of an episode (R, P or A); raises `ValueError`."""
        names = self.state_names if column == schema.STATE else [self.action_name]
        within = f"{self.recorder.observations}/" if column == schema.STATE else ""
        rows, parts = self._rows(episode), []
        for name in names:
            values = np.asarray(self._find(episode, within + name)[()])
            if values.dtype.kind not in "fiub" or len(values) != rows or values.ndim > 2:
                got = f"got shape {values.shape} of {values.dtype}, expected {rows} rows of numbers"
                raise ValueError(f"{episode}/{within}{name}: {got}")
            parts.append(values.reshape(rows, -1).astype(np.float32))
        return np.concatenate(parts, axis=1)

    def _succeeded(self, episode: str) -> bool:
        return self._success is not None and bool(np.asarray(self._find(episode, self._success)[-1:]).any())

    def pictures(self, column: pa.Array, videos: VideoDecoders) -> Pictures:
        return StoredPictures(self, column)

    def picture(self, camera: int, group: int, row: int) -> NDArray[np.uint8]:
        """One as it is stored: pixels (H, W, 3), or bytes (L,)."""
        where = f"{self.episodes[group]}/{self.recorder.images}/{self.cameras[camera]}"
        try:
            return np.asarray(self.file[where][row])
        except (OSError, KeyError, ValueError) as error:
            raise Unusable(Kind.IMAGE, f"{where}: cannot be read ({first_line(error)}); restore it, or {LEAVE_OUT}") from error

    def loaded_bytes(self, cameras: int) -> Rows:
        layout, _ = self.survey()
        numbers: Rows = np.diff(self.bounds) * 4 * (layout.state_dim + layout.action_dim)
        return numbers

    def without(self, column: str) -> str:
        others = ",".join(each for n, each in enumerate(self.called) if schema.image_column(n + 1) != column)
        return f"?cameras={others}" if others else "the data has no other"

    def digest(self) -> int:
        digest = hashlib.blake2b(self.selection.choices.encode(), digest_size=8)
        with file_faults(self.path), open_source(self.selection.path) as source:
            digest.update(sample_digest(source))
        return int.from_bytes(digest.digest(), "little")

    def row_faults(self) -> list[Fault]:
        return []

    def flags_from_footer(self) -> list[Rows] | None:
        return None

    def close(self) -> None:
        self.file.close()


class StoredPictures(Pictures):
    """Pictures of one camera. column: struct of camera, group and row."""

    def __init__(self, file: HDF5File, column: pa.Array) -> None:
        self.file = file
        self.where = np.stack([column.field(name).to_numpy() for name in ("camera", "group", "row")], axis=1)

    def present(self, row: int) -> bool:
        return True

    def decode(self, row: int, side: int = 0) -> Pixels:
        stored = self.file.picture(*self.where[row].tolist())
        pixels = decode(stored.tobytes(), side) if self.file.compressed else stored
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            got = f"got shape {pixels.shape} of {pixels.dtype}, expected uint8 (height, width, 3)"
            raise Unusable(Kind.IMAGE, f"{got}; choose other cameras (?cameras=...)")
        return np.ascontiguousarray(pixels[TURNS[self.file.orientation]])

    def encoded(self, row: int) -> bytes | None:
        """A compressed picture that is not turned, without the bytes that fill it up to the longest."""
        if not self.file.compressed or TURNS[self.file.orientation]:
            return None
        return self.file.picture(*self.where[row].tolist()).tobytes().rstrip(b"\0")
