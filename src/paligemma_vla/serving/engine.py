"""Answers observations in a thread of its own, those of several clients at once, so that the event loop is never blocked."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import DataError
from paligemma_vla.observation import ParsedObservation
from paligemma_vla.policy import Continuation, Policy, RealTime
from paligemma_vla.serving.metrics import Metrics


@dataclass(eq=False)
class _Request:
    observation: ParsedObservation
    seed: int | None
    continuation: Continuation | None
    method: RealTime | None  # how the answer will continue
    answer: asyncio.Future[NDArray[np.float32]]
    arrived: float = field(default_factory=time.monotonic)


class Engine:
    """Batches what arrives within `wait_s` of the first waiting request, at most `max_batch` at once.

    Answers that continue a chunk in different ways are computed apart, since guidance takes longer; the first to come begins.
    It does not wait for clients that are not there: with as many requests as clients it begins at once. max_queue: requests
    that may wait; more are refused, because an answer that comes late moves a robot by what it saw long ago.
    """

    def __init__(
        self, policy: Policy, metrics: Metrics, max_batch: int, wait_s: float, max_queue: int, clients: Callable[[], int]
    ) -> None:
        self.policy, self.metrics, self.clients = policy, metrics, clients
        self.max_batch, self.wait_s, self.max_queue = max_batch, wait_s, max_queue
        self._queue: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "policy")
        self._task = asyncio.create_task(self._run())

    async def infer(
        self, observation: ParsedObservation, seed: int | None, continuation: Continuation | None = None
    ) -> NDArray[np.float32]:
        """Actions (K, A) in real units; continuation: what they continue. A cancelled call is not computed. Raises what
        `Policy.infer` raises, and `DataError` when too many wait."""
        if len(self._queue) >= self.max_queue:
            self.metrics.dropped.labels("queue").inc()
            raise DataError(f"server: {len(self._queue)} observations wait, expected at most {self.max_queue}; send it again")
        method = self.policy.realtime_method(continuation)
        request = _Request(observation, seed, continuation, method, asyncio.get_running_loop().create_future())
        self._queue.append(request)
        self.metrics.queue.set(len(self._queue))
        self._arrived.set()
        try:
            return await request.answer
        except asyncio.CancelledError:  # the client has gone
            if request in self._queue:
                self._queue.remove(request)
                self.metrics.queue.set(len(self._queue))
                self.metrics.dropped.labels("gone").inc()
            raise

    async def close(self) -> None:
        """Stop; what still waits is cancelled. What is being computed ends in its own time, and nobody hears of it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for request in self._queue:
            request.answer.cancel()
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        while True:
            batch = await self._next_batch()
            if batch:
                self.metrics.batch.observe(len(batch))
                await self._answer(batch)

    async def _next_batch(self) -> list[_Request]:
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        deadline = self._queue[0].arrived + self.wait_s
        while len(self._queue) < min(self.max_batch, self.clients()) and (left := deadline - time.monotonic()) > 0:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                break
        taken = [request for request in self._queue if request.method == self._queue[0].method][: self.max_batch]
        for request in taken:
            self._queue.remove(request)
        self.metrics.queue.set(len(self._queue))
        return taken

    async def _answer(self, batch: list[_Request]) -> None:
        """One call for all; when it fails, one call each, so that a client meets its own fault only.

        A request that fails alone, and one that is answered, may have lost its client meanwhile.
        """
        loop = asyncio.get_running_loop()
        parts = zip(*((request.observation, request.seed, request.continuation) for request in batch), strict=True)
        observations, seeds, continuations = map(list, parts)
        try:
            answers = await loop.run_in_executor(
                self._thread, self.policy.infer_batch, observations, seeds, None, continuations
            )
        except Exception as error:  # of any kind: the server goes on
            if len(batch) > 1:
                for request in batch:
                    if not request.answer.done():
                        await self._answer([request])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for request, answer in zip(batch, answers, strict=True):
            if not request.answer.done():
                request.answer.set_result(answer)
