"""Names shared by every floor: columns of an episode file, keys of an observation and of a batch.

Letters in shape comments, everywhere in this project:

    B  batch            S  frames in a window      C, H, W  image channels, height, width
    N  cameras          T  context tokens          E  context width
    K  action horizon   A  numbers in one action   P  numbers in the state
    M  flow samples per context                    D  width of the action head
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import DataError

Rows = NDArray[np.int64]  # numbers of rows in a file

STATE, ACTION, PROMPT = "state", "action", "prompt"
IS_FIRST, IS_LAST, IS_TERMINAL = "is_first", "is_last", "is_terminal"
FLAGS = (IS_FIRST, IS_LAST, IS_TERMINAL)
METADATA_KEY = b"paligemma_vla"
# What EpisodeWriter says of a file as a whole: how many episodes it holds, and the digest of all their values.
EPISODES_KEY, CONTENT_KEY = b"episodes", b"content_digest"
REPRESENTATIONS = ("absolute", "delta")  # of recorded actions
ROTATIONS = {"euler_xyz": 3, "rotvec": 3, "quaternion_xyzw": 4, "quaternion_wxyz": 4, "rotation_6d": 6}  # numbers in each


def image_column(camera: int) -> str:
    """Column of camera number `camera` (from 1) in an episode file."""
    return f"image_{camera}_bytes"


def image_key(camera: int) -> str:
    """Key of camera number `camera` (from 1) in an observation and in a batch."""
    return f"image_{camera}"


class Observation(TypedDict, total=False):
    """What a robot sends: `image_1 .. image_N` (H, W, 3) uint8 RGB, `state` (P,) in real units, `prompt`.

    Cameras beyond the second carry the same kind of key; a camera that is absent is left out.
    """

    image_1: NDArray[np.uint8]
    image_2: NDArray[np.uint8]
    state: NDArray[np.float32]
    prompt: str


@dataclass(frozen=True)
class Episode:
    """One episode, column by column, as it is written and read.

    images: one list per camera, each of `length` encoded JPEG or PNG images (None: camera absent at that step).
    state (length, P) and action (length, A): float32 in real units; `action[t]` is what followed observation t.
    prompt: the instruction. is_terminal: whether the episode ended by reaching a terminal state of the task.
    """

    images: list[list[bytes | None]]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    prompt: str
    is_terminal: bool = False

    @property
    def length(self) -> int:
        return len(self.action)


@dataclass(frozen=True)
class DatasetMetadata:
    """What numbers and pixels mean; it travels from the episode file into the checkpoint and to the robot.

    cameras: a name per camera, in the order image_1, image_2, ...   state_names / action_names: one per dimension.
    state_units / action_units: one per dimension, e.g. `m`, `rad`; empty where a number has none.
    control_hz: control steps per second, 0 when unknown.   image_orientation: `upright` unless said otherwise.
    action_convention: what an action means, e.g. `end-effector delta, +1 = 1 cm; gripper +1 = close`.
    action_representation: what the recorded actions are, `absolute` targets or `delta`s.
    action_rotation: how they write a rotation, one of `ROTATIONS`.   Of both, empty: unknown.
    """

    robot: str = ""
    cameras: tuple[str, ...] = ()
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    state_units: tuple[str, ...] = ()
    action_units: tuple[str, ...] = ()
    control_hz: float = 0.0
    image_orientation: str = "upright"
    action_convention: str = ""
    action_representation: str = ""
    action_rotation: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def misfits(self, state_dim: int, action_dim: int) -> list[str]:
        """Names and units that are not one per dimension: field, got, expected."""
        fields = [
            ("state_names", state_dim),
            ("state_units", state_dim),
            ("action_names", action_dim),
            ("action_units", action_dim),
        ]
        return [
            f"metadata {name}: got {len(getattr(self, name))}, expected {dimension}, one per dimension (or none)"
            for name, dimension in fields
            if getattr(self, name) and len(getattr(self, name)) != dimension
        ]

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "metadata") -> DatasetMetadata:
        """Read what `to_json` wrote; raises `DataError` when it is something else. Fields it does not know are left aside."""
        try:
            raw: Any = json.loads(text)
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
            raise DataError(f"{where}: not a JSON object of dataset metadata ({error})") from error
        if not isinstance(raw, dict):
            raise DataError(f"{where}: not a JSON object of dataset metadata (got {type(raw).__name__})")
        values: dict[str, Any] = {}
        for name in raw.keys() & {entry.name for entry in fields(cls)}:
            expected, matches = _METADATA_TYPES.get(name, ("a string", _is_text))
            if not matches(raw[name]):
                raise DataError(f"{where}: {name}: got {json.dumps(raw[name])[:80]}, expected {expected}")
            values[name] = tuple(raw[name]) if isinstance(raw[name], list) else raw[name]
        return cls(**values)


@dataclass(frozen=True)
class Layout:
    """What the columns hold: number of cameras, numbers in state (P) and action (A), and the writer's metadata."""

    cameras: int
    state_dim: int
    action_dim: int
    metadata: DatasetMetadata


def joint_layout(layouts: Sequence[Layout]) -> Layout:
    """Layout of files of one robot together: the first one's, with as many cameras as any of them has."""
    return replace(layouts[0], cameras=max(layout.cameras for layout in layouts))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _is_representation(value: Any) -> bool:
    return value in ("", *REPRESENTATIONS)


def _is_rotation(value: Any) -> bool:
    return value == "" or (_is_text(value) and value in ROTATIONS)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


# field -> what it holds in JSON; a string where nothing is said
_METADATA_TYPES = {
    **dict.fromkeys(
        ("cameras", "state_names", "action_names", "state_units", "action_units"), ("a list of strings", _is_texts)
    ),
    "action_representation": (f"one of {', '.join(REPRESENTATIONS)}, or nothing", _is_representation),
    "action_rotation": (f"one of {', '.join(ROTATIONS)}, or nothing", _is_rotation),
    "control_hz": ("a number of at least 0", _is_rate),
    "extra": ("an object of strings", _is_text_map),
}
