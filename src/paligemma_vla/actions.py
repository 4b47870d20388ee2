"""What the model predicts of recorded actions: them as they are, or where they go from the state or from each other; and back.

With a chunk a_0 .. a_{K-1}, recorded after an observation with state s:

    absolute         a_k                        as recorded, whatever that is
    chunk_relative   a_k - s                    each from the state at the chunk's beginning
    delta            a_0 - s, a_k - a_{k-1}     each from the one before

Only some dimensions are converted; the others (the gripper) stay as recorded. A rotation is never subtracted number by number:
from R to R' it is R^-1 R', written as the rotation it came from. Everything is computed in float64 and inverted exactly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import DataError
from paligemma_vla.schema import ROTATIONS, DatasetMetadata

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]

LONGEST_HORIZON = 1024  # as in the configuration
SHORTEST = 1e-8  # below this length a vector has no direction
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

    representation: str = "absolute"
    dimensions: tuple[int, ...] = ()
    state_dimensions: tuple[int, ...] = ()
    rotation: str = ""
    rotation_dimensions: tuple[int, ...] = ()
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
        for columns, state_columns in self._plain():
            target = recorded[..., columns]
            encoded[..., columns] = target - self._references(target, start[..., state_columns])
        for columns, state_columns in self._rotations():
            after = recorded[..., columns]
            before = self._references(after, start[..., state_columns])
            turned = _rotation(before, self.rotation).inv() * _rotation(after, self.rotation)
            encoded[..., columns] = _numbers(turned, self.rotation, _usable(before, after, self.rotation))
        return encoded

    def decode(self, predicted: Floats, state: Floats) -> Floats:
        """The inverse of `encode`: what to do (..., K, A) in real units, float32, from a prediction after the state (..., P).

        A predicted quaternion or 6D rotation need not be one exactly: its length, or Gram-Schmidt, makes it one.
        """
        if not self.converts:
            return predicted
        decoded = predicted.astype(np.float32)
        wide, start = predicted.astype(np.float64), state.astype(np.float64)[..., None, :]
        for columns, state_columns in self._plain():
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
        usable = _usable(start, turns, self.rotation)
        if self.representation == "chunk_relative":
            return _numbers(_rotation(start, self.rotation) * _rotation(turns, self.rotation), self.rotation, usable)
        usable = np.logical_and.accumulate(usable, axis=-1)  # what follows an impossible turn is lost as well
        place, places = _rotation(start, self.rotation), []
        for k in range(turns.shape[-2]):
            place = place * _rotation(turns[..., k : k + 1, :], self.rotation)
            places.append(_numbers(place, self.rotation, usable[..., k : k + 1]))
        return np.concatenate(places, axis=-2)

    def _plain(self) -> list[tuple[list[int], list[int]]]:
        """Columns of the action that are subtracted, and those of the state that they start from."""
        pairs = [pair for pair in self._pairs() if pair[0] not in self.rotation_dimensions]
        return [([d for d, _ in pairs], [s for _, s in pairs])] if pairs else []

    def _rotations(self) -> list[tuple[list[int], list[int]]]:
        """The same of each rotation."""
        if not self.rotation:
            return []
        start, width = dict(self._pairs()), ROTATIONS[self.rotation]
        starts = range(0, len(self.rotation_dimensions), width)
        each = [list(self.rotation_dimensions[first : first + width]) for first in starts]
        return [(columns, [start[d] for d in columns]) for columns in each]

    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.dimensions, self.state_dimensions, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and for the checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: Any, where: str, state_dim: int, action_dim: int) -> ActionTransform:
        """What `to_dict` gave, of data of these dimensions; raises `DataError` for anything else."""
        try:
            values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
            made = cls(**values)
            sound = made._is_sound(state_dim, action_dim)
        except (AttributeError, TypeError):
            sound = False
        if not sound:
            raise DataError(f"{where}: got {str(raw)[:80]}, expected how actions are represented; compute the statistics again")
        return made

    def _is_sound(self, state_dim: int, action_dim: int) -> bool:
        numbers = [(number, action_dim) for number in self.dimensions]
        numbers += [*((number, state_dim) for number in self.state_dimensions), (self.horizon, LONGEST_HORIZON + 1)]
        return (
            self.representation in ("absolute", "chunk_relative", "delta")
            and all(type(number) is int and 0 <= number < end for number, end in numbers)
            and len(self.dimensions) == len(self.state_dimensions)
            and self.converts == bool(self.dimensions) == bool(self.horizon)
            and set(self.rotation_dimensions) <= set(self.dimensions)
            and (self.rotation in ROTATIONS if self.rotation_dimensions else self.rotation == "")
            and len(self.rotation_dimensions) % ROTATIONS.get(self.rotation, 1) == 0
        )

    def describe(self, metadata: DatasetMetadata) -> str:
        """In words: `delta in chunks of 8: x from hand_x, y from hand_y`."""
        pairs = [f"{called(d, metadata.action_names)} from {called(s, metadata.state_names)}" for d, s in self._pairs()]
        rotation = f"; rotation as {self.rotation}" if self.rotation else ""
        chunks = f" in chunks of {self.horizon}: " if self.converts else ""
        return f"{self.representation}{chunks}{', '.join(pairs)}{rotation}"


ABSOLUTE = ActionTransform()


def called(number: int, names: tuple[str, ...]) -> str:
    """A dimension's name, or its number where it has none."""
    return names[number] if number < len(names) else f"[{number}]"


def _usable(before: Wide, after: Wide, kind: str) -> NDArray[np.bool_]:
    """Where both of (..., n) are numbers of a rotation (...)."""
    return _is_rotation(before, kind) & _is_rotation(after, kind)


def _is_rotation(values: Wide, kind: str) -> NDArray[np.bool_]:
    usable: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=-1))
    if kind.startswith("quaternion"):
        usable = usable & (np.linalg.norm(values, axis=-1) > SHORTEST)
    if kind == "rotation_6d":
        usable = usable & (np.linalg.norm(np.cross(values[..., :3], values[..., 3:]), axis=-1) > SHORTEST)
    return usable


def _rotation(values: Wide, kind: str) -> Rotation:
    """Numbers (..., n) as rotations, one after the other; those that are none as no rotation at all."""
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
