"""What the model predicts of recorded actions: them as they are, or where they go from the state or from each other; and back.

With a chunk a_0 .. a_{K-1}, recorded after an observation with state s:

    absolute         a_k                        as recorded, whatever that is
    chunk_relative   a_k - s                    each from the state at the chunk's beginning
    delta            a_0 - s, a_k - a_{k-1}     each from the one before

Only some dimensions are converted; the others (the gripper) stay as recorded. A rotation is never subtracted number by number:
from R to R' it is R^-1 R', written as the rotation it came from. Everything is computed in float64 and inverted exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.config import Dimension, VLAConfig
from paligemma_vla.errors import ConfigError, DataError, closest
from paligemma_vla.schema import ROTATIONS, DatasetMetadata

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]
Numbers = tuple[int, ...]

SHORTEST = 1e-8  # below this length a vector has no direction
DEGREES = ("deg", "degree", "degrees", "°")
# No rotation, in each representation: what stands in for numbers that are none.
IDENTITY: dict[str, tuple[float, ...]] = {
    "euler_xyz": (0, 0, 0),
    "rotvec": (0, 0, 0),
    "quaternion_xyzw": (0, 0, 0, 1),
    "quaternion_wxyz": (1, 0, 0, 0),
    "rotation_6d": (1, 0, 0, 0, 1, 0),
}


@dataclass(frozen=True)
class ActionTransform:
    """How recorded actions become what the model predicts, and back. Made by `resolve_actions`.

    dimensions: numbers of an action that are converted. state_dimensions: of the state, what each of them starts from.
    rotation: representation of a rotation, a key of `ROTATIONS`, or empty; rotation_dimensions: those of the converted that
    hold it, one rotation after the other. horizon: actions in a chunk, which the statistics depend on.
    All are empty, or 0, with `absolute`.
    """

    representation: Literal["absolute", "chunk_relative", "delta"] = "absolute"
    dimensions: Numbers = ()
    state_dimensions: Numbers = ()
    rotation: str = ""
    rotation_dimensions: Numbers = ()
    horizon: int = 0

    @property
    def converts(self) -> bool:
        """Whether the model sees anything else than what was recorded."""
        return self.representation != "absolute"

    def encode(self, actions: Floats, state: Floats) -> Floats:
        """Recorded actions (..., K, A) after the state (..., P) to what the model predicts, (..., K, A) in real units.

        NaN where the numbers of a rotation are none, such as a quaternion of length 0.
        """
        if not self.converts:
            return actions
        encoded = actions.astype(np.float32)
        recorded, start = actions.astype(np.float64), state.astype(np.float64)[..., None, :]
        columns, state_columns = self._subtracted()
        target = recorded[..., columns]
        encoded[..., columns] = target - self._references(target, start[..., state_columns])
        for columns, state_columns in self._rotations():
            after = recorded[..., columns]
            before = self._references(after, start[..., state_columns])
            turned = _rotation(before, self.rotation).inv() * _rotation(after, self.rotation)
            usable = _is_rotation(before, self.rotation) & _is_rotation(after, self.rotation)
            encoded[..., columns] = _numbers(turned, self.rotation, usable)
        return encoded

    def decode(self, predicted: Floats, state: Floats) -> Floats:
        """The inverse of `encode`: what to do (..., K, A) in real units, float32, from a prediction after the state (..., P).

        A predicted quaternion or 6D rotation need not be one exactly: its length, or Gram-Schmidt, makes it one.
        """
        if not self.converts:
            return predicted
        decoded = predicted.astype(np.float32)
        wide, start = predicted.astype(np.float64), state.astype(np.float64)[..., None, :]
        columns, state_columns = self._subtracted()
        steps = wide[..., columns]
        if self.representation == "delta":
            steps = steps.cumsum(axis=-2)
        decoded[..., columns] = start[..., state_columns] + steps
        for columns, state_columns in self._rotations():
            decoded[..., columns] = self._turn(start[..., state_columns], wide[..., columns])
        return decoded

    def starts_from(self, state: NDArray[Any]) -> bool:
        """Whether a state (P,) holds the rotations that the actions start from."""
        return all(_is_rotation(state[columns].astype(np.float64), self.rotation) for _, columns in self._rotations())

    def canonical(self, actions: Floats) -> Floats:
        """Recorded actions (..., A) with rotations written as `decode` does: q and -q are one rotation."""
        written = actions.astype(np.float32)
        for columns, _ in self._rotations():
            values = actions[..., columns].astype(np.float64)
            usable = _is_rotation(values, self.rotation)
            written[..., columns] = _numbers(_rotation(values, self.rotation), self.rotation, usable)
        return written

    def _references(self, targets: Wide, start: Wide) -> Wide:
        """What each action (..., K, n) starts from: the state (..., 1, n), or the action before."""
        if self.representation == "chunk_relative":
            return start
        return np.concatenate([start, targets[..., :-1, :]], axis=-2)

    def _turn(self, start: Wide, turns: Wide) -> Wide:
        """Rotations (..., K, n) that turns lead to from the state's (..., 1, n)."""
        usable = _is_rotation(start, self.rotation) & _is_rotation(turns, self.rotation)
        pose = _rotation(start, self.rotation)
        if self.representation == "chunk_relative":
            return _numbers(pose * _rotation(turns, self.rotation), self.rotation, usable)
        usable = np.logical_and.accumulate(usable, axis=-1)  # what follows an impossible turn is lost as well
        poses = []
        for k in range(turns.shape[-2]):
            pose = pose * _rotation(turns[..., k : k + 1, :], self.rotation)
            poses.append(_numbers(pose, self.rotation, usable[..., k : k + 1]))
        return np.concatenate(poses, axis=-2)

    def _subtracted(self) -> tuple[list[int], list[int]]:
        """Columns of the action that are subtracted, and those of the state that they start from."""
        pairs = [pair for pair in self._pairs() if pair[0] not in self.rotation_dimensions]
        return [d for d, _ in pairs], [s for _, s in pairs]

    def _rotations(self) -> Iterator[tuple[list[int], list[int]]]:
        """The same of each rotation."""
        start, width = dict(self._pairs()), ROTATIONS.get(self.rotation, 1)
        for first in range(0, len(self.rotation_dimensions), width):
            columns = list(self.rotation_dimensions[first : first + width])
            yield columns, [start[d] for d in columns]

    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.dimensions, self.state_dimensions, strict=True))

    def check(self, where: str, state_dim: int, action_dim: int) -> None:
        """Raise `DataError` unless it fits data of these dimensions: what a file says of it may have been edited."""
        fits = (
            all(0 <= number < action_dim for number in self.dimensions)
            and all(0 <= number < state_dim for number in self.state_dimensions)
            and len(self.dimensions) == len(self.state_dimensions)
            and self.converts == bool(self.dimensions) == (self.horizon > 0)
            and set(self.rotation_dimensions) <= set(self.dimensions)
            and (self.rotation in ROTATIONS if self.rotation_dimensions else self.rotation == "")
            and len(self.rotation_dimensions) % ROTATIONS.get(self.rotation, 1) == 0
        )
        if not fits:
            got = f"got {self}, which does not fit {state_dim} state and {action_dim} action dimensions"
            raise DataError(f"{where}: {got}; compute the statistics again")

    def describe(self, metadata: DatasetMetadata) -> str:
        """In words: `delta in chunks of 8: x from hand_x, y from hand_y`."""
        pairs = [f"{_name(d, metadata.action_names)} from {_name(s, metadata.state_names)}" for d, s in self._pairs()]
        rotation = f"; rotation as {self.rotation}" if self.rotation else ""
        chunks = f" in chunks of {self.horizon}: " if self.converts else ""
        return f"{self.representation}{chunks}{', '.join(pairs)}{rotation}"


ABSOLUTE = ActionTransform()


def _name(number: int, names: tuple[str, ...]) -> str:
    """A dimension's name, or its number where it has none."""
    return names[number] if number < len(names) else f"[{number}]"


def _is_rotation(values: Wide, kind: str) -> NDArray[np.bool_]:
    """Which of (..., n) are numbers of a rotation (...)."""
    usable: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=-1))
    if kind.startswith("quaternion"):
        usable = usable & (np.linalg.norm(values, axis=-1) > SHORTEST)
    if kind == "rotation_6d":
        usable = usable & (np.linalg.norm(np.cross(values[..., :3], values[..., 3:]), axis=-1) > SHORTEST)
    return usable


def _rotation(values: Wide, kind: str) -> Rotation:
    """Numbers (..., n) as rotations; those that are none as no rotation at all."""
    from scipy.spatial.transform import Rotation  # slow to import, and most runs have no use for it

    values = np.where(_is_rotation(values, kind)[..., None], values, IDENTITY[kind])
    if kind == "euler_xyz":
        return Rotation.from_euler("xyz", values)
    if kind == "rotvec":
        return Rotation.from_rotvec(values)
    if kind == "rotation_6d":
        first = _unit(values[..., :3])
        second = _unit(values[..., 3:] - (first * values[..., 3:]).sum(-1, keepdims=True) * first)
        return Rotation.from_matrix(np.stack([first, second, np.cross(first, second)], axis=-1))
    return Rotation.from_quat(values, scalar_first=kind == "quaternion_wxyz")


def _unit(vectors: Wide) -> Wide:
    lengths: Wide = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / lengths


def _numbers(rotation: Rotation, kind: str, usable: NDArray[np.bool_]) -> Wide:
    """Rotations as numbers (..., n); NaN where they are not usable (...)."""
    numbers: Wide
    if kind == "euler_xyz":
        numbers = rotation.as_euler("xyz", suppress_warnings=True)  # in gimbal lock the angles are still those of the rotation
    elif kind == "rotvec":
        numbers = rotation.as_rotvec()
    elif kind == "rotation_6d":
        matrix = rotation.as_matrix()
        numbers = np.concatenate([matrix[..., 0], matrix[..., 1]], axis=-1)
    else:
        numbers = rotation.as_quat(canonical=True, scalar_first=kind == "quaternion_wxyz")
    return np.where(usable[..., None], numbers, np.nan)


def resolve_actions(config: VLAConfig, metadata: DatasetMetadata, state_dim: int, action_dim: int) -> ActionTransform:
    """What `data.actions` means for data of these dimensions. Raises `ConfigError` for what it cannot mean."""
    settings = config.data.actions
    action = _Column("action", metadata.action_names, metadata.action_units, action_dim)
    state = _Column("state", metadata.state_names, metadata.state_units, state_dim)
    rotation, turned = recorded_rotation(config, metadata, action_dim)
    if settings.representation == "absolute":
        return ABSOLUTE
    if rotation and not turned:
        held = f"the data's actions hold a rotation as {metadata.action_rotation}, which cannot be subtracted"
        raise ConfigError(f"data.actions.rotation: got null, but {held}; name its dimensions")
    if metadata.action_representation == "delta":
        got = f"got {settings.representation}, but the data's actions are deltas already"
        raise ConfigError(f"data.actions.representation: {got}; take absolute, which leaves them as recorded")
    dimensions = _converted(settings.dimensions, action)
    starts = _starts(settings.state_dimensions, dimensions, action, state)
    left = [action.name(number) for number in turned if number not in dimensions]
    if 0 < len(left) < len(turned):
        whole = "a rotation is converted as a whole, or not at all"
        raise ConfigError(f"data.actions.rotation.dimensions: {', '.join(left)} are not among those converted; {whole}")
    if left:  # named, and left as recorded
        rotation, turned = "", ()
    for number, start in zip(dimensions, starts, strict=True):
        name, unit, other = action.name(number), action.unit(number), state.unit(start)
        if unit and other and unit != other:
            differ = f"action {name} is in {unit}, state {state.name(start)} in {other}"
            raise ConfigError(f"data.actions.state_dimensions: {differ}; list dimensions of one unit, or leave it out")
        if number in turned and rotation in ANGLES and unit in DEGREES:
            raise ConfigError(f"data.actions.rotation: action {name} is in {unit}, expected rad; convert the data")
    horizon = config.model.action_head_config.horizon
    return ActionTransform(settings.representation, dimensions, starts, rotation, turned, horizon)


def recorded_rotation(config: VLAConfig, metadata: DatasetMetadata, action_dim: int) -> tuple[str, Numbers]:
    """How recorded actions of these dimensions write rotations, and in which dimensions, as `data.actions.rotation` says.

    Without that what the metadata says, and no dimensions: they are not known. Raises `ConfigError` where it cannot be so.
    """
    settings = config.data.actions
    if settings.rotation is None:
        return metadata.action_rotation, ()
    rotation = settings.rotation.representation
    if metadata.action_rotation not in ("", rotation):
        expected = f"expected {metadata.action_rotation} as the data says"
        raise ConfigError(f"data.actions.rotation.representation: got {rotation}, {expected}")
    action = _Column("action", metadata.action_names, metadata.action_units, action_dim)
    return rotation, action.numbers(settings.rotation.dimensions, "rotation.dimensions")


def matched_by_number(config: VLAConfig, metadata: DatasetMetadata) -> bool:
    """Whether actions and state have names and share none, so that only their numbers say what belongs together."""
    names = set(metadata.action_names), set(metadata.state_names)
    return config.data.actions.state_dimensions is None and all(names) and not names[0] & names[1]


ANGLES = ("euler_xyz", "rotvec")


@dataclass(frozen=True)
class _Column:
    """Names and units of the dimensions of `state` or `action`, where the data has them."""

    title: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    size: int

    def name(self, number: int) -> str:
        return _name(number, self.names)

    def unit(self, number: int) -> str:
        return self.units[number] if number < len(self.units) else ""

    def numbers(self, given: tuple[Dimension, ...], key: str) -> Numbers:
        """Dimensions given by number or name, as numbers."""
        known: dict[int | str, int] = {number: number for number in range(self.size)}
        known |= {name: number for number, name in enumerate(self.names) if self.names.count(name) == 1}
        for entry in given:
            if entry not in known:
                expected = f"one of the data's {self.size} {self.title} dimensions: its number (0 is the first), or its name"
                raise ConfigError(f"data.actions.{key}: got {entry!r}, expected {expected}{closest(str(entry), self.names)}")
        numbers = tuple(known[entry] for entry in given)
        if len(set(numbers)) < len(numbers):
            raise ConfigError(f"data.actions.{key}: got {list(given)}, expected each dimension once")
        return numbers


def _converted(given: tuple[Dimension, ...] | None, action: _Column) -> Numbers:
    """Dimensions of an action that are converted: those given, else all that are not named after a gripper."""
    if given is not None:
        return action.numbers(given, "dimensions")
    found = tuple(number for number, name in enumerate(action.names) if "gripper" not in name.casefold())
    if not found or len(action.names) != action.size:
        got = f"got null, but the data names no action dimensions besides a gripper's ({action.size} dimensions)"
        raise ConfigError(f"data.actions.dimensions: {got}; list the numbers of those to convert (0 is the first)")
    return found


def _starts(given: tuple[Dimension, ...] | None, dimensions: Numbers, action: _Column, state: _Column) -> Numbers:
    """For each converted dimension the one of the state that it starts from: of the same name, else of the same number."""
    if given is not None:
        return state.numbers(given, "state_dimensions")
    names = [action.name(number) for number in dimensions]
    missing = [name for name in names if state.names.count(name) != 1]
    if not missing:
        return tuple(state.names.index(name) for name in names)
    if len(missing) < len(names) or max(dimensions) >= state.size:
        got = f"got null, but the state has no dimension (or several) for {', '.join(missing)} of an action"
        has = f"it has {', '.join(state.names) or f'{state.size} numbers'}"
        raise ConfigError(f"data.actions.state_dimensions: {got}; {has}: list them, or leave it out of dimensions")
    return dimensions
