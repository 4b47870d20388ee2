"""Real-time chunking: what a robot goes on executing while its policy thinks, from what its client says of it.

Both a server, for each connection, and `RealTimePolicy`, in the robot's own process, keep the chunks that a robot has and turn
`executed` and `delay` into a `Continuation`. `paligemma_vla_client.ControlLoop` says them to either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import DataError
from paligemma_vla.observation import whole_number
from paligemma_vla.policy import Continuation, Policy, RealTime

FIELDS = ("executed", "delay", "unused")


@dataclass(frozen=True)
class Progress:
    """Where a robot is in its last chunk when it observes.

    executed: control steps from the observation of that chunk to this one. delay: control steps until the answer is used.
    unused: the last chunk came too late and is not used; `executed` counts in the one before it.
    """

    executed: int
    delay: int
    unused: bool = False


def parse_progress(told: Mapping[str, Any], horizon: int) -> Progress | None:
    """What a client says in `FIELDS`; None without. horizon: actions of a chunk. Raises `DataError`."""
    executed, delay, unused = (told.get(name) for name in FIELDS)
    if executed is None and delay is None:
        return None
    if executed is None or delay is None:
        got, missing = ("delay", "executed") if executed is None else ("executed", "delay")
        raise DataError(f"{missing}: got none beside {got}, expected both: they say what the answer continues")
    if not isinstance(unused, (bool, np.bool_, type(None))):
        raise DataError(f"unused: got {unused!r:.40}, expected true or false")
    progress = Progress(whole_number("executed", executed, 0), whole_number("delay", delay, 0), bool(unused))
    if progress.delay > horizon:
        text = f"delay: got {progress.delay} control steps, expected at most the {horizon} actions of a chunk"
        raise DataError(f"{text}; an answer that late continues nothing")
    return progress


class RobotChunks:
    """The chunks that one robot has: the one that it was sent last, and the one that it executes."""

    def __init__(self) -> None:
        self._sent: NDArray[np.float32] | None = None
        self._used: NDArray[np.float32] | None = None

    def add(self, actions: NDArray[np.float32]) -> None:
        """Actions (N, A), as they are sent."""
        self._sent = actions

    def continuation(self, progress: Progress | None) -> Continuation | None:
        """What the robot goes on executing; None where it is not known, or nothing is."""
        if progress is None or not progress.unused:
            self._used = self._sent
        if progress is None or self._used is None:
            return None
        left = self._used[progress.executed :]
        return Continuation(left, progress.delay) if len(left) else None

    def clear(self) -> None:
        """A new episode begins."""
        self._sent = self._used = None


class RealTimePolicy:
    """A policy in the robot's own process, with the methods of `PolicyClient`; it keeps the chunks of one robot.

    realtime: how an answer continues the chunk before it, `prefix` or `guidance`; None: see `Policy.realtime_method`.
    seed: of the noise of every answer; None draws afresh.
    """

    def __init__(self, policy: Policy, realtime: RealTime | None = None, seed: int | None = None) -> None:
        self.policy, self.realtime, self.seed = policy, realtime, seed
        self._chunks = RobotChunks()

    @property
    def metadata(self) -> dict[str, Any]:
        return self.policy.metadata

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        executed: int | None = None,
        delay: int | None = None,
        unused: bool = False,
        seed: int | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Answer one observation, as `Policy.infer`: {"actions": (K, A) float32 in real units}.

        executed, delay, unused: as in `Progress`; without the first two the answer continues nothing. record: not used.
        Raises what `Policy.infer` raises.
        """
        told = {"executed": executed, "delay": delay, "unused": unused}
        continuation = self._chunks.continuation(parse_progress(told, self.metadata["horizon"]))
        seed = self.seed if seed is None else seed
        answer = self.policy.infer(observation, seed, continuation=continuation, realtime=self.realtime)
        self._chunks.add(answer["actions"])
        return answer

    def show(self, observation: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
        """Nothing: who has the policy in his process records himself."""

    def reset(self, record: Mapping[str, Any] | None = None) -> None:
        """Begin a new episode: what was executed before says nothing of what follows."""
        self._chunks.clear()
