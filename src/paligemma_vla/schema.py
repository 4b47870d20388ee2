"""Names shared by every floor: columns of an episode file, keys of an observation and of a batch.

Letters in shape comments, everywhere in this project:

    B  batch            S  frames in a window      C, H, W  image channels, height, width
    N  cameras          T  context tokens          E  context width
    K  action horizon   A  numbers in one action   P  numbers in the state
    M  flow samples per context                    D  width of the action head
"""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from paligemma_vla.errors import DataError

logger = logging.getLogger(__name__)
Rows = NDArray[np.int64]  # numbers of rows in a file
Pixels = NDArray[np.uint8]  # of an RGB picture: (H, W, 3) as it is taken and stored, (3, H, W) as the model has it

STATE, ACTION, PROMPT = "state", "action", "prompt"
IS_FIRST, IS_LAST, IS_TERMINAL = "is_first", "is_last", "is_terminal"
FLAGS = (IS_FIRST, IS_LAST, IS_TERMINAL)
METADATA_KEY = b"paligemma_vla"
# What EpisodeWriter says of a file as a whole: how many episodes it holds, and the digest of all their values.
EPISODES_KEY, CONTENT_KEY = b"episodes", b"content_digest"
# Columns of recorded episodes beside those of S1.1: who acted, unix time of the view in s, and whether the episode succeeded.
ACTOR, TIME, SUCCESS = "actor", "time", "success"
POLICY, INTERVENTION = "policy", "intervention"  # values of ACTOR
# What was executed where it is not `action` (A,), and the simulator's reset arguments as JSON, the same at every step.
EXECUTED, RESET = "executed_action", "reset"
LOG_SUFFIX = ".chunks.jsonl"  # of what `serve --record` writes where a client shows one view per chunk: no episodes
REPRESENTATIONS = ("absolute", "delta")  # of recorded actions
# What the metadata of one robot's files agree on, where they say it.
COMPARED = (
    *("cameras", "image_orientation", "control_hz", "action_convention", "action_representation", "action_rotation"),
    *("state_names", "action_names", "state_units", "action_units"),
)
ROTATIONS = {"euler_xyz": 3, "rotvec": 3, "quaternion_xyzw": 4, "quaternion_wxyz": 4, "rotation_6d": 6}  # numbers in each


def _one_of(names: Iterable[str]) -> str:
    return f"^({'|'.join(names)})?$"


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
    extra: further columns by name, a value per step.
    """

    images: list[list[bytes | None]]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    prompt: str
    is_terminal: bool = False
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.action)


@dataclass(frozen=True)
class DatasetMetadata:
    """What numbers and pixels mean; it travels from the episode file into the checkpoint and to the robot.

    cameras: a name per camera, in the order image_1, image_2, ...   state_names / action_names: one per dimension.
    state_units / action_units: one per dimension, e.g. `m`, `rad`; empty where a number has none.
    control_hz: control steps per second, 0 when unknown.   image_orientation: how pictures stand; empty: unknown.
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
    control_hz: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    image_orientation: str = ""
    action_convention: str = ""
    action_representation: Annotated[str, Field(pattern=_one_of(REPRESENTATIONS))] = ""
    action_rotation: Annotated[str, Field(pattern=_one_of(ROTATIONS))] = ""
    extra: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def misfits(self, state_dim: int, action_dim: int) -> list[str]:
        """Names and units that are not one per dimension: field, got, expected."""
        fields = {"state_names": state_dim, "state_units": state_dim, "action_names": action_dim, "action_units": action_dim}
        return [
            f"metadata {name}: got {len(getattr(self, name))}, expected {dimension}, one per dimension (or none)"
            for name, dimension in fields.items()
            if len(getattr(self, name)) not in (0, dimension)
        ]

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "metadata") -> DatasetMetadata:
        """Read what `to_json` wrote; raises `DataError` naming a field of another type. Unknown fields are ignored."""
        try:
            return _metadata_reader().validate_json(text, strict=True)
        except ValidationError as error:
            raise DataError(f"{where}: {first_fault(error)}") from error


def chunk_coverage(actions: int, control_hz: float) -> str:
    """How long a chunk of `actions` lasts, as `a chunk of 24 actions covers 0.30 s at 80 Hz`; empty at an unknown rate, 0."""
    return f"a chunk of {actions} actions covers {actions / control_hz:.2f} s at {control_hz:g} Hz" if control_hz else ""


def first_fault(error: ValidationError) -> str:
    """The first of pydantic's faults."""
    return describe_fault(error.errors(include_url=False)[0])


def describe_fault(fault: ErrorDetails) -> str:
    """One of pydantic's faults: dotted field, got, expected."""
    field = ".".join(map(str, fault["loc"]))
    expected = re.sub(r"^(Value error, |Input should be )", "", fault["msg"]).replace("a valid tuple", "a list")
    value = fault["input"]
    got = f"{value!r:.80}" if isinstance(value, str) else reprlib.repr(value)  # a YAML alias may unfold to billions of values
    return f"{field}: got {got}, expected: {expected[:1].lower()}{expected[1:]}".removeprefix(": ")


@lru_cache
def _metadata_reader() -> TypeAdapter[DatasetMetadata]:
    return TypeAdapter(DatasetMetadata)


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


def described_layout(policy: Mapping[str, Any]) -> Layout:
    """What `Policy.metadata` says of the robot, as a data set would say it."""
    rotation = (policy.get("rotation") or {}).get("representation", "")
    robot = {**policy, "cameras": policy["camera_names"], "action_rotation": rotation}
    metadata = DatasetMetadata.from_json(json.dumps(robot), "metadata of the policy")
    return Layout(len(policy["cameras"]), policy["state_dim"], policy["action_dim"], metadata)


def robot_differences(got: Layout, expected: Layout, cameras: int | None = 0) -> dict[str, str]:
    """In which columns or fields of metadata two robots differ: `got X, expected Y` by name.

    A field that one of them leaves empty cannot differ. cameras: how many of the first cameras' names are compared; None: all.
    """
    found = {}
    for column, numbers, wanted in (
        (STATE, got.state_dim, expected.state_dim),
        (ACTION, got.action_dim, expected.action_dim),
    ):
        if numbers != wanted:
            found[column] = f"got {numbers} numbers per row, expected {wanted}"
    first, second = ({**asdict(m), "cameras": m.cameras[:cameras]} for m in (got.metadata, expected.metadata))
    for name in COMPARED:
        if first[name] and second[name] and first[name] != second[name]:
            found[name] = f"got {first[name]!r}, expected {second[name]!r}"
    return found


def cameras_in_order(policy: Layout, here: Layout) -> bool:
    """Whether the cameras that are here are a policy's first ones, whatever it calls them, and it may have more.

    So it is of policies that name no robot, as published ones, whose cameras are slots; a difference is logged.
    """
    if policy.metadata.robot:
        return False
    called, found = policy.metadata.cameras, here.metadata.cameras
    if policy.cameras > here.cameras or (called and found and called[: len(found)] != found):
        shown = [", ".join(each.metadata.cameras) or f"{each.cameras} without names" for each in (policy, here)]
        logger.warning("cameras: what the checkpoint calls %s is here, in this order, %s", *shown)
    return True
