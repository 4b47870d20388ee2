"""One action a step, from a policy that answers with chunks of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_vla_client.chunks import ChunkQueue
from paligemma_vla_client.errors import PolicyConnectionError, PolicyTimeout
from paligemma_vla_client.execution import Client, ExecutedLog, WhenLate

log = logging.getLogger(__name__)


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
        self.record, self.late = record, 0
        self._when_late = WhenLate(client.metadata, when_late, representation, keep)
        self._executed = ExecutedLog(client.metadata)

    def step(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The action (A,) to execute now. observation: as `PolicyClient.infer` takes it; sent when a new chunk is needed.

        Raises what `infer` raises, but for what `when_late` covers.
        """
        try:
            action = self._next(observation)
        except (PolicyTimeout, PolicyConnectionError) as error:
            self.late += 1
            last = self._executed.last
            if self._when_late.when_late == "stop" or last is None:
                raise
            log.warning("late for the %d. time (%s): %s", self.late, self._when_late.when_late, error)
            action = self._when_late.instead(last)
            self._queue.next()  # its step is over
        self._executed.add(action)
        return action.copy()

    def intervene(self, observation: Mapping[str, Any], action: np.ndarray) -> None:
        """A person chose the action (A,) of this step instead of the policy, which is asked anew at the next `step`."""
        if self.record:
            self.client.show(observation, self._executed.take())
        self._queue.clear()
        self._executed.add(np.array(action, np.float32), "intervention")

    def reset(self, success: bool | None = None) -> None:
        """Begin a new episode: forget chunks and last action, and tell the server. success: of the one that ends."""
        self.late = 0
        self._queue.clear()
        self.client.reset(self._executed.end(success))

    def _next(self, observation: Mapping[str, Any]) -> np.ndarray:
        queue = self._queue
        done = self.execute is not None and queue.since_chunk >= self.execute
        if done or queue.ensemble is not None or not queue.left:
            self._ask(observation)
        elif self.record:
            self.client.show(observation, self._executed.take())
        action = queue.next()
        assert action is not None, "a chunk has at least one action"
        return action

    def _ask(self, observation: Mapping[str, Any]) -> None:
        self._queue.ask()
        actions = np.asarray(self.client.infer(observation, record=self._executed.take())["actions"])
        if self.execute is not None and self.execute > len(actions):
            raise ValueError(f"execute: got {self.execute}, but the server sends {len(actions)} actions; take at most as many")
        self._queue.put(actions)
