"""What every way of executing chunks has in common: what a robot does without an action, and what its server learns of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

WHEN_LATE = ("stop", "hold", "zero")
UNLIKE_ZERO = ("quaternion_xyzw", "quaternion_wxyz", "rotation_6d")  # rotations whose identity is not all zeros


class Client(Protocol):
    """What broker and loop need of `PolicyClient`. In real time, `infer` takes `executed`, `delay` and `unused` too."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    def infer(self, observation: Mapping[str, Any], *, record: Mapping[str, Any] | None) -> Mapping[str, Any]: ...
    def show(self, observation: Mapping[str, Any], record: Mapping[str, Any] | None) -> None: ...
    def reset(self, record: Mapping[str, Any] | None) -> None: ...


class WhenLate:
    """What a robot does in a step for which there is no action; arguments as those of `ActionChunkBroker`.

    Raises `ValueError` for what would move the robot wrongly.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        when_late: str,
        representation: str | None = None,
        keep: Sequence[int] | None = None,
    ) -> None:
        self.when_late = when_late
        self.representation = representation or metadata.get("action_representation") or "unknown"
        names = metadata.get("action_names") or ()
        grippers = [index for index, name in enumerate(names) if "gripper" in str(name).lower()]
        self.keep = grippers if keep is None else list(keep)
        self._check(metadata.get("rotation"))

    def instead(self, last: np.ndarray) -> np.ndarray:
        """The action (A,) of a step that got none. last: the one that was executed before it."""
        if self.when_late == "hold" and self.representation == "absolute":
            return last
        action = np.zeros_like(last)
        action[self.keep] = last[self.keep]
        return action

    def _check(self, rotation: Any) -> None:
        if self.when_late not in WHEN_LATE:
            raise ValueError(f"when_late: got {self.when_late!r}, expected one of {', '.join(WHEN_LATE)}")
        if self.representation not in ("absolute", "delta", "unknown"):
            raise ValueError(f"representation: got {self.representation!r}, expected absolute or delta")
        if self.when_late == "hold" and self.representation == "unknown":
            text = "the server does not say what its actions are; give representation='absolute' or 'delta'"
            raise ValueError(f"when_late: got 'hold', but {text}")
        rotation = rotation.get("representation") if isinstance(rotation, Mapping) else None
        if self.when_late != "stop" and self.representation == "delta" and rotation in UNLIKE_ZERO:
            raise ValueError(f"when_late: got {self.when_late!r}, but zeros are no rotation as {rotation}; take stop")
        if self.when_late == "zero" and self.representation == "absolute":
            raise ValueError("when_late: got 'zero', but zeros are a position where actions are absolute; take hold or stop")


class ExecutedLog:
    """Actions of which the server was not told yet. Only `paligemma-vla serve` is told: its limits of rate and its record need
    them. last: the action (A,) executed last, None before the first."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.last: np.ndarray | None = None
        self._is_told = "server_versions" in metadata
        self._done: list[np.ndarray] = []
        self._actor = "policy"  # who chose the last of them

    def add(self, action: np.ndarray, actor: str = "policy") -> None:
        """An action (A,) is executed. actor: `policy` or `intervention`."""
        self.last, self._actor = action, actor
        if self._is_told:
            self._done.append(action)

    def take(self) -> dict[str, Any] | None:
        """What was executed since the last call, as `record` of `PolicyClient.infer` takes it."""
        done, self._done = self._done, []
        return {"executed": np.stack(done), "actor": self._actor} if done else None

    def end(self, success: bool | None) -> dict[str, Any] | None:
        """As `take`, at the end of an episode. success: how it ended, if that is known."""
        told = self.take()
        if told is not None and success is not None:
            told["success"] = success
        self.last = None
        return told
