"""Which action of which chunk a control step executes, when chunks arrive while the robot moves. No thread, no clock."""

from __future__ import annotations

import math

import numpy as np


class ChunkQueue:
    """The chunks of one robot.

        queue.ask()                 # take the observation now
        ...                         # next() goes on here while the answer is computed
        queue.put(actions)          # begins where the robot is by then
        action = queue.next()

    Action i of a chunk (K, A) is for control step i after its observation. Steps in which the robot held, because nothing was
    left, do not count: the robot did not move on.

    ensemble: where chunks overlap, a step's action is their average with weights exp(-ensemble * i), i = 0 for the oldest
    (temporal ensembling: ACT, arXiv 2304.13705). None: the newest chunk alone.

    unused: the answer to the last `ask` came too late and was left out (`put`).
    """

    def __init__(self, ensemble: float | None = None) -> None:
        if ensemble is not None and not math.isfinite(ensemble):
            raise ValueError(f"ensemble: got {ensemble}, expected a number")
        self.ensemble = ensemble
        self.unused = False
        self._step = 0  # the next to be executed
        self._asked: int | None = None  # the step at which the open question was asked
        self._chunks: list[tuple[int, np.ndarray]] = []  # (step of its first action, actions (K, A)), oldest first

    @property
    def since_chunk(self) -> int:
        """Control steps executed since the observation of the newest chunk: where in it the robot is. 0 without a chunk."""
        return self._step - self._chunks[-1][0] if self._chunks else 0

    @property
    def left(self) -> int:
        """Actions that can be executed without a new chunk."""
        return max([0, *(began + len(chunk) - self._step for began, chunk in self._chunks)])

    def next(self) -> np.ndarray | None:
        """The action (A,) of this control step, which counts as executed; None when nothing is left."""
        actions = [chunk[self._step - began] for began, chunk in self._chunks if self._step - began < len(chunk)]
        if not actions:
            return None
        predicted = np.stack(actions)  # (chunks, A), oldest first
        self._step += 1
        if self.ensemble is None:
            newest: np.ndarray = predicted[-1]
            return newest
        weights = np.exp(-self.ensemble * np.arange(len(predicted)))
        average: np.ndarray = (weights / weights.sum()) @ predicted
        return average.astype(predicted.dtype)

    def ask(self) -> int:
        """An observation is taken now. Returns `since_chunk`: with it the server finds the rest of the newest chunk."""
        self._asked = self._step
        return self.since_chunk

    def put(self, actions: np.ndarray, delay: int | None = None) -> bool:
        """The answer (K, A) to the last `ask`. Its first actions are dropped, as many as were executed since.

        delay: after how many control steps the answer was said to come, if the policy knew what is executed until then. An
        answer that comes later does not continue what was executed: it is not used while anything is left. None: it is used
        whenever it comes, but for one of which nothing remains.
        Returns True when the chunk is used; False also for an answer whose `ask` was before a `clear`.
        """
        actions = np.asarray(actions)
        if actions.ndim != 2 or not len(actions):
            raise ValueError(f"actions: got {actions.shape}, expected (K, A) with K at least 1")
        asked, self._asked = self._asked, None
        if asked is None:
            return False
        passed = self._step - asked
        late = passed >= len(actions) or (delay is not None and passed > delay)
        self.unused = late and self.left > 0
        if self.unused:
            return False
        older = [] if self.ensemble is None else [each for each in self._chunks if self._step - each[0] < len(each[1])]
        self._chunks = [*older, (asked, actions)]
        return True

    def clear(self) -> None:
        """Forget all chunks, and the open question: a new episode begins, or somebody else moves the robot."""
        self._chunks.clear()
        self._asked, self.unused = None, False
