"""One action a step, from a policy that answers with chunks of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from paligemma_vla_client.chunks import ChunkQueue
from paligemma_vla_client.errors import PolicyConnectionError, PolicyTimeout

log = logging.getLogger(__name__)
WHEN_LATE = ("stop", "hold", "zero")
UNLIKE_ZERO = ("quaternion_xyzw", "quaternion_wxyz", "rotation_6d")  # rotations whose identity is not all zeros


class Client(Protocol):
    """What the broker needs of `PolicyClient`."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    def infer(self, observation: Mapping[str, Any], *, record: Mapping[str, Any] | None) -> Mapping[str, Any]: ...
    def show(self, observation: Mapping[str, Any], record: Mapping[str, Any] | None) -> None: ...
    def reset(self, record: Mapping[str, Any] | None) -> None: ...


class ActionChunkBroker:
    """Executes the first actions of each chunk, or the average of all that were predicted for a step.

    client: its `timeout_s` is how long a step may take, so how long the robot may wait for an action.
    execute: actions of a chunk (K, A) that are used before the next one is asked for; None: all K.
    ensemble: temporal ensembling (ACT, arXiv 2304.13705): every step asks, and averages what the last K chunks predict for it
    with weights exp(-ensemble * i), i = 0 for the oldest. 0.01 is ACT's. Numbers are averaged, so use it with representations
    in which the average of two rotations is a rotation between them.
    when_late: what a step returns when no answer came in time (`PolicyTimeout`, `PolicyConnectionError`); the next one asks
    again.

    - `stop`: nothing, it raises.
    - `hold`: the robot stays where it is. With absolute actions, the last action again. With deltas, zeros: the last delta
      again would move it on, unseen.
    - `zero`: zeros, for deltas and velocities. Refused for absolute actions, where zeros are a position to go to.

    An episode's first step raises in any case: there is nothing to hold yet.

    representation: `absolute` or `delta`; None: what the server says. `hold` is refused where neither says it.
    keep: dimensions that repeat their last value where others become zero. A gripper is told how wide to be even where the arm
    is told how far to move, and must not drop what it has. None: those that have `gripper` in the server's `action_names`.

    record: show the server every step, and what was executed, for `serve --record`; each step costs sending its pictures then.

    late: steps without an answer in time, since the last `reset`.
    """

    def __init__(
        self,
        client: Client,
        execute: int | None = None,
        ensemble: float | None = None,
        when_late: str = "stop",
        representation: str | None = None,
        keep: Sequence[int] | None = None,
        record: bool = False,
    ) -> None:
        if execute is not None and (execute < 1 or ensemble is not None):
            raise ValueError(f"execute: got {execute}, expected at least 1, and none with ensemble, which asks every step")
        self.client, self.execute, self._queue = client, execute, ChunkQueue(ensemble)
        self.when_late, self.keep, self.record = when_late, keep, record
        self.representation = representation or client.metadata.get("action_representation") or "unknown"
        self._check_when_late()
        if keep is None:
            names = client.metadata.get("action_names") or ()
            self.keep = [index for index, name in enumerate(names) if "gripper" in str(name).lower()]
        self._last: np.ndarray | None = None
        self._done: list[np.ndarray] = []  # actions of which the server was not told yet
        self._actor = "policy"  # who chose the last of them
        self._forget()

    def step(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The action (A,) to execute now. observation: as `PolicyClient.infer` takes it; sent when a new chunk is needed.

        Raises what `infer` raises, but for what `when_late` covers.
        """
        try:
            action = self._next(observation)
        except (PolicyTimeout, PolicyConnectionError) as error:
            self.late += 1
            if self.when_late == "stop" or self._last is None:
                raise
            log.warning("late for the %d. time (%s): %s", self.late, self.when_late, error)
            action = self._instead(self._last)
            self._queue.next()  # its step is over
        self._count(action, "policy")
        return action.copy()

    def intervene(self, observation: Mapping[str, Any], action: np.ndarray) -> None:
        """A person chose the action (A,) of this step instead of the policy, which is asked anew at the next `step`."""
        if self.record:
            self.client.show(observation, self._executed())
        self._queue.clear()
        self._count(np.array(action, np.float32), "intervention")

    def reset(self, success: bool | None = None) -> None:
        """Begin a new episode: forget chunks and last action, and tell the server. success: of the one that ends."""
        told = self._executed()
        if told is not None and success is not None:
            told["success"] = success
        self._forget()
        self.client.reset(told)

    def _count(self, action: np.ndarray, actor: str) -> None:
        self._last, self._actor = action, actor
        if "server_versions" in self.client.metadata:  # `paligemma-vla serve`, whose limits of rate and record need it
            self._done.append(action)

    def _executed(self) -> dict[str, Any] | None:
        """What was executed since the server was told last."""
        done, self._done = self._done, []
        return {"executed": np.stack(done), "actor": self._actor} if done else None

    def _forget(self) -> None:
        self.late = 0
        self._last = None
        self._queue.clear()

    def _next(self, observation: Mapping[str, Any]) -> np.ndarray:
        queue = self._queue
        done = self.execute is not None and queue.since_chunk >= self.execute
        if done or queue.ensemble is not None or not queue.left:
            self._ask(observation)
        elif self.record:
            self.client.show(observation, self._executed())
        action = queue.next()
        assert action is not None, "a chunk has at least one action"
        return action

    def _ask(self, observation: Mapping[str, Any]) -> None:
        self._queue.ask()
        actions = np.asarray(self.client.infer(observation, record=self._executed())["actions"])
        if self.execute is not None and self.execute > len(actions):
            raise ValueError(f"execute: got {self.execute}, but the server sends {len(actions)} actions; take at most as many")
        self._queue.put(actions)

    def _instead(self, last: np.ndarray) -> np.ndarray:
        """The action of a step that got none."""
        if self.when_late == "hold" and self.representation == "absolute":
            return last
        action = np.zeros_like(last)
        action[list(self.keep or ())] = last[list(self.keep or ())]
        return action

    def _check_when_late(self) -> None:
        if self.when_late not in WHEN_LATE:
            raise ValueError(f"when_late: got {self.when_late!r}, expected one of {', '.join(WHEN_LATE)}")
        if self.representation not in ("absolute", "delta", "unknown"):
            raise ValueError(f"representation: got {self.representation!r}, expected absolute or delta")
        if self.when_late == "hold" and self.representation == "unknown":
            text = "the server does not say what its actions are; give representation='absolute' or 'delta'"
            raise ValueError(f"when_late: got 'hold', but {text}")
        rotation = self.client.metadata.get("rotation")
        rotation = rotation.get("representation") if isinstance(rotation, Mapping) else None
        if self.when_late != "stop" and self.representation == "delta" and rotation in UNLIKE_ZERO:
            raise ValueError(f"when_late: got {self.when_late!r}, but zeros are no rotation as {rotation}; take stop")
        if self.when_late == "zero" and self.representation == "absolute":
            raise ValueError("when_late: got 'zero', but zeros are a position where actions are absolute; take hold or stop")
