"""A control loop at a fixed rate that goes on while the policy thinks."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paligemma_vla_client.chunks import ChunkQueue
from paligemma_vla_client.errors import PolicyConnectionError, PolicyTimeout
from paligemma_vla_client.execution import Client, ExecutedLog, WhenLate
from paligemma_vla_client.rate import LoopReport, Ticker

log = logging.getLogger(__name__)
MODES = ("blocking", "asynchronous", "ensemble", "real_time")
ENSEMBLE = 0.01  # ACT's weight
RECENT_DELAYS = 10
QUEUED_VIEWS = 64  # of a record, while the policy thinks
LATE = (PolicyTimeout, PolicyConnectionError)

Observe = Callable[[], Mapping[str, Any]]
Act = Callable[[np.ndarray], object]
Intervene = Callable[[Mapping[str, Any]], "np.ndarray | None"]


class ControlLoop:
    """Moves a robot at a fixed rate, by a policy that answers with chunks of actions.

    client: a `PolicyClient`, or in the policy's own process `paligemma_vla.control.realtime.RealTimePolicy`.
    mode: what happens while the policy thinks. None: `real_time` with a policy that was trained for it, else `asynchronous`.

    - `blocking`: the robot waits.
    - `asynchronous`: it goes on with the last chunk. The new one begins where the robot is by then, whatever the old one was
      about to do.
    - `ensemble`: the same, and where chunks overlap their average is executed (temporal ensembling, ACT). It asks as often as
      it is answered, unless `execute` says otherwise.
    - `real_time`: real-time chunking (arXiv 2506.07339, 2512.05964). The policy learns what will have been executed when its
      answer is used, and continues it. For `paligemma-vla serve` and `RealTimePolicy`.

    execute: control steps from one chunk to the next; None: half of a chunk. It asks earlier when less is left of the chunk
    than an answer takes. hz: control steps per second; None: `control_hz` of the policy.
    when_late, representation, keep: what is executed when nothing is left, as in `ActionChunkBroker`. With `stop` the run ends.
    record: show the server every step, for `serve --record`; the thread that asks does it, so a view may reach the server an
    answer's time late.

    The delay of an answer, in control steps, is said to be the largest of the last 10, without the first of a run: that one
    connects and warms up. Twice as much is said until there is another. An answer that comes later than was said is used only
    where too little is left to wait for the next one.
    """

    def __init__(
        self,
        client: Client,
        mode: str | None = None,
        execute: int | None = None,
        hz: float | None = None,
        when_late: str = "stop",
        representation: str | None = None,
        keep: Sequence[int] | None = None,
        record: bool = False,
    ) -> None:
        metadata = client.metadata
        if mode is None:
            mode = "real_time" if metadata.get("rtc_max_delay") else "asynchronous"
        if mode not in MODES:
            raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
        if mode == "real_time" and "rtc_max_delay" not in metadata:
            raise ValueError("mode: got 'real_time', which this server does not know; take asynchronous or ensemble")
        if execute is not None and execute < 1:
            raise ValueError(f"execute: got {execute}, expected at least 1")
        hz = hz or metadata.get("control_hz")
        if not hz or not math.isfinite(hz) or hz < 0:
            raise ValueError(
                f"hz: got {hz}, and the policy does not know the rate of its data; give the control steps per second"
            )
        self.client, self.mode, self.execute, self.hz, self.record = client, mode, execute, float(hz), record
        self.when_late = WhenLate(metadata, when_late, representation, keep)
        self._executed = ExecutedLog(metadata)
        self._recent: deque[int] = deque(maxlen=RECENT_DELAYS)

    def run(
        self,
        observe: Observe,
        act: Act,
        steps: int | None = None,
        until: Callable[[], bool] | None = None,
        intervene: Intervene | None = None,
    ) -> LoopReport:
        """Move the robot, for `steps` control steps (None: without end), or until `until()` is true, asked before each.

        observe: returns an observation as `PolicyClient.infer` takes it; called when a chunk is asked for, and at every step
        with `record` or `intervene`. act: executes an action (A,). intervene: a person's action (A,) instead of the policy's,
        for this observation, or None; afterwards the policy begins anew.

        The robot waits for the first chunk of a run, and for that after an intervention. Nothing is executed after an error:
        `run` raises at once what `observe`, `act`, `until` and `intervene` raise, and what `infer` raises but for
        `PolicyTimeout` and `PolicyConnectionError` while anything is left to execute, or `when_late` covers them.
        """
        pool = ThreadPoolExecutor(1, "policy")
        run = _Run(self, pool, self._executed, self._recent)
        try:
            while (steps is None or run.steps < steps) and not (until is not None and until()):
                run.ticker.wait()
                action = run.step(observe, intervene)
                run.ticker.act()
                act(action.copy())
            report = run.finish()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the robot's program hears of it now, not after an answer
            raise
        pool.shutdown()
        return report

    def reset(self, success: bool | None = None) -> None:
        """Begin a new episode, and tell the server. success: of the one that ends."""
        self.client.reset(self._executed.end(success))


@dataclass
class _Question:
    """An observation that is being answered. step: of the observation. delay: control steps that were said to pass meanwhile.
    waits: the robot stands until the answer is there."""

    answer: Future[Mapping[str, Any]]
    step: int
    delay: int | None
    waits: bool
    began: float = field(default_factory=time.perf_counter)


class _Run:
    """One run of a loop. All but the calls of the client is in the robot's thread; `pool` makes those one after the other."""

    def __init__(self, loop: ControlLoop, pool: ThreadPoolExecutor, executed: ExecutedLog, recent: deque[int]) -> None:
        self.loop, self.pool, self.executed, self.recent = loop, pool, executed, recent
        self.ticker = Ticker(loop.hz)
        self.queue = ChunkQueue(ENSEMBLE if loop.mode == "ensemble" else None)
        self.steps = self.held = self.chunks = self.unused = 0
        self.execute = loop.execute or 1  # None: until a chunk says how long it is
        self.delays: list[int] = []
        self.guess = 0  # of the delay, before one is measured
        self.length = 0  # of the last chunk
        self.question: _Question | None = None
        self.views: deque[Future[None]] = deque()
        self.waits = True  # the robot, for the next chunk
        self.holds = False
        self.reason: Exception | None = None  # why the last question was not answered

    @property
    def delay(self) -> int:
        """Control steps that an answer is expected to take."""
        return max(self.recent, default=self.guess)

    def step(self, observe: Observe, intervene: Intervene | None) -> np.ndarray:
        """The action (A,) of this control step."""
        self._take_answer()
        self._check_views()
        observation = observe() if intervene is not None or self.loop.record else None
        if intervene is not None and observation is not None:
            theirs = intervene(observation)
            if theirs is not None:
                return self._take_over(observation, np.array(theirs, np.float32))
        if self._should_ask():
            self._ask(observe() if observation is None else observation)
        elif self.loop.record and observation is not None:
            self._show(observation)
        action = self.queue.next()
        if action is None:
            return self._executes(self._instead(), "policy")
        self.holds = False
        return self._executes(action, "policy")

    def finish(self) -> LoopReport:
        """Wait for what was shown last."""
        wait(self.views)
        self._check_views()
        p50, largest = np.percentile(self.delays or [0], [50, 100])
        return LoopReport(
            steps=self.steps,
            held=self.held,
            missed=self.ticker.missed,
            jitter_ms=self.ticker.jitter_ms(),
            delay=(float(p50), float(largest)),
            chunks=self.chunks,
            unused=self.unused,
        )

    def _executes(self, action: np.ndarray, actor: str) -> np.ndarray:
        self.steps += 1
        self.executed.add(action, actor)
        return action

    def _should_ask(self) -> bool:
        early = 0 if self.loop.mode == "blocking" else self.delay
        return self.question is None and (self.queue.since_chunk >= self.execute or self.queue.left <= early)

    def _ask(self, observation: Mapping[str, Any]) -> None:
        executed, delay = self.queue.ask(), None
        told: dict[str, Any] = {"record": self.executed.take()}
        if self.loop.mode == "real_time" and self.queue.left:
            delay = min(self.delay, self.length) if self.recent else min(self.guess, self.queue.left)
            told.update(executed=executed, delay=delay, unused=self.queue.unused)
        waits = self.waits or self.loop.mode == "blocking"
        answer = self.pool.submit(self.loop.client.infer, observation, **told)
        self.question = _Question(answer, self.steps, delay, waits)
        if waits:
            wait([answer])
            self.ticker.restart()
            self._take_answer()

    def _take_answer(self) -> None:
        """Use the answer, if it is there."""
        question = self.question
        if question is None or not question.answer.done():
            return
        self.question = None
        try:
            actions = np.asarray(question.answer.result()["actions"])
        except LATE as error:
            self.reason = error
            log.warning("no answer to the observation of step %d: %s", question.step, error)
            return
        self._measure(question)
        if self.execute > len(actions):
            text = f"execute: got {self.execute}, but the policy sends {len(actions)} actions; take at most as many"
            raise ValueError(text)
        if self.loop.execute is None and self.loop.mode != "ensemble":
            self.execute = max(1, len(actions) // 2)
        self.length = len(actions)
        may_wait = self.queue.left > self.delay  # for the next answer, in place of one that is too late
        used = self.queue.put(actions, question.delay if may_wait else None)
        self.chunks, self.unused = self.chunks + used, self.unused + (not used)
        self.waits, self.reason = False, None

    def _measure(self, question: _Question) -> None:
        waited = math.ceil((time.perf_counter() - question.began) * self.loop.hz)
        if not self.chunks:
            self.guess = 2 * waited + 1
            return
        delay = waited if question.waits else self.steps - question.step
        self.delays.append(delay)
        self.recent.append(delay)

    def _take_over(self, observation: Mapping[str, Any], action: np.ndarray) -> np.ndarray:
        if self.loop.record:
            self._show(observation)
        self.queue.clear()
        self.question, self.waits = None, True
        return self._executes(action, "intervention")

    def _show(self, observation: Mapping[str, Any]) -> None:
        if len(self.views) < QUEUED_VIEWS:
            self.views.append(self.pool.submit(self.loop.client.show, observation, self.executed.take()))
        else:
            log.warning("record: the view of step %d is left out; %d wait for the policy's answer", self.steps, QUEUED_VIEWS)

    def _check_views(self) -> None:
        while self.views and self.views[0].done():
            try:
                self.views.popleft().result()
            except LATE as error:
                log.warning("record: a view was not taken: %s", error)

    def _instead(self) -> np.ndarray:
        """The action of a step for which nothing is left."""
        if self.executed.last is None or self.loop.when_late.when_late == "stop":
            text = f"step {self.steps}: nothing is left to execute, and no answer yet after {self.delay} steps as expected"
            raise self.reason or PolicyTimeout(f"{text}; ask earlier (execute), or wait (when_late='hold')")
        if not self.holds:
            log.warning("step %d: nothing is left to execute (%s)", self.steps, self.loop.when_late.when_late)
        self.held += 1
        self.holds = True
        return self.loop.when_late.instead(self.executed.last)
