"""Limits on actions: of range and of rate, per dimension, in real units, after everything else.

Two ranges. The data's minimum and maximum are of what the model predicts: with `data.actions.representation` delta or
chunk_relative, of movements, so there they limit movements, before these become actions. The configuration's (`control`) are of
the actions that are sent; where a number of an action is sent as predicted, they take the place of the data's.

Rotations. Any three numbers are Euler angles or a rotation vector, so a range may cut them; a quaternion or a 6D rotation that
is cut number by number is none any more, so no range touches it. No rate touches a rotation: angles jump from pi to -pi.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.actions import ANGLES, ActionTransform, recorded_rotation
from paligemma_vla.errors import ConfigError

if TYPE_CHECKING:
    from paligemma_vla.config import VLAConfig
    from paligemma_vla.preprocess import Preprocessor
    from paligemma_vla.schema import DatasetMetadata

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]
LOG_SECONDS = 60.0
WITHOUT = {"action_low": -np.inf, "action_high": np.inf, "action_rate": np.inf}


@dataclass(frozen=True)
class ActionLimits:
    """names: of an action's numbers (A). predicted_low, predicted_high: range (A,) of what the model predicts, with
    `transform`. low, high: of what is sent (A,). rate: largest change from one action to the next (A,). All in real units;
    infinite where there is no limit."""

    names: tuple[str, ...]
    transform: ActionTransform
    predicted_low: Floats
    predicted_high: Floats
    low: Floats
    high: Floats
    rate: Floats

    def apply(self, actions: Floats, state: Floats, previous: Floats | None = None) -> tuple[Floats, Floats]:
        """Actions (K, A) within the limits, and by how much each number was moved (K, A), 0 where it was not.

        actions: finite, as `Policy.infer` returns them for the state (P,). previous: the action (A,) that was executed last;
        None where it is not known: the first action may then be any, since one that follows the wrong action is a jump. The
        range has the last word: after a previous action outside of it the first one is within it.
        """
        predicted = self.transform.encode(actions, state)
        within = np.clip(predicted, self.predicted_low, self.predicted_high)
        moved = np.abs(within - predicted)
        if moved.any():
            actions = self.transform.decode(within, state)
        limited = np.clip(actions, self.low, self.high)
        if np.isfinite(self.rate).any():
            last = limited[0] if previous is None else np.clip(previous, self.low, self.high)
            for step in range(len(limited)):
                last = limited[step] = np.clip(limited[step], last - self.rate, last + self.rate)
        return limited, np.maximum(moved, np.abs(limited - actions))


def build_limits(preprocessor: Preprocessor, robot: DatasetMetadata, config: VLAConfig) -> ActionLimits:
    """The limits of a policy. robot: what its data says of the actions. config: its own, or one with another `control`.

    Raises `ConfigError` for `control` that does not fit the policy's actions, and where nothing says which numbers of an action
    are a rotation that must not be cut.
    """
    statistics, transform = preprocessor.statistics.action, preprocessor.actions
    names = robot.action_names or tuple(map(str, range(preprocessor.action.dimension)))
    rotation, turned = recorded_rotation(config, robot, len(names))
    if rotation not in ("", *ANGLES) and not turned:
        raise ConfigError(
            f"control: the actions hold a rotation as {rotation}, and nothing says in which numbers: they must not be cut one "
            f"by one; name them with --set data.actions.rotation='{{representation: {rotation}, dimensions: [...]}}', or serve "
            f"with --no_limits"
        )
    whole = () if rotation in ANGLES else turned  # no range touches these
    own = {
        name: _own_limits(name, values, names, turned if name == "action_rate" else whole) for name, values in config.control
    }
    low, high = (np.array(values, np.float32) for values in (statistics.min, statistics.max))
    for bound, name, without in ((low, "action_low", -np.inf), (high, "action_high", np.inf)):
        replaced = np.isfinite(own[name])
        replaced[list(transform.dimensions)] = False
        bound[replaced] = without
        bound[list(whole)] = without
    sent = {name: np.where(np.isnan(own[name]), np.float32(none), own[name]) for name, none in WITHOUT.items()}
    return ActionLimits(names, transform, low, high, *sent.values())


def _own_limits(name: str, values: Sequence[float | None] | None, names: Sequence[str], rotation: Sequence[int]) -> Floats:
    """Numbers of the configuration (A,), NaN where it gives none. rotation: numbers of an action that may have none."""
    own = np.full(len(names), np.nan, np.float32) if values is None else np.array(values, np.float32)  # None becomes NaN
    if len(own) != len(names):
        raise ConfigError(f"control.{name}: got {len(own)} numbers, expected {len(names)}: {', '.join(names)} (null: no limit)")
    for number in rotation:
        if not np.isnan(own[number]):
            raise ConfigError(f"control.{name}.{number}: got {own[number]:g} for {names[number]}, of a rotation; expected null")
    return own


class LimitLog:
    """What limits have changed, by the name of the number: counts, and the most that one was moved. Logged at first, then at
    most once a minute for each name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.counts, self.largest = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
        self._logged: dict[str, tuple[float, int]] = {}  # when, and the count then

    def add(self, moved: Floats) -> None:
        """moved: by how much each number of a chunk was (K, A)."""
        for name, amounts in zip(self.names, moved.T, strict=True):
            if not (count := int(np.count_nonzero(amounts))):
                continue
            self.counts[name] += count
            self.largest[name] = max(self.largest[name], float(amounts.max()))
            when, before = self._logged.get(name, (-np.inf, 0))
            if time.monotonic() - when >= LOG_SECONDS:
                text = "action %s: a limit changed %d of its numbers (%d in all), this time by at most %.3g"
                log.warning(text, name, self.counts[name] - before, self.counts[name], amounts.max())
                self._logged[name] = time.monotonic(), self.counts[name]
