"""What all protocols have in common: a client's message in, a chunk of actions out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from paligemma_vla import __version__
from paligemma_vla.control.limits import ActionLimits, LimitLog
from paligemma_vla.control.realtime import Progress, RobotChunks
from paligemma_vla.errors import DataError, NotFiniteError, VLAError
from paligemma_vla.observation import ParsedObservation
from paligemma_vla.policy import Continuation, Policy
from paligemma_vla.schema import chunk_coverage
from paligemma_vla.serving.engine import Engine
from paligemma_vla.serving.keys import KeyMap
from paligemma_vla.serving.metrics import Metrics
from paligemma_vla.serving.record import Event, Executed, Recorder
from paligemma_vla_client.codec import CodecError

log = logging.getLogger(__name__)
T = TypeVar("T")
NUMBERS = count(1)
MAX_PIXELS = 4096 * 4096  # of all pictures of one message
READERS = 2  # threads that read messages; a hostile one keeps one of them busy
RECENT_ANSWERS, RECENT_FAULTS = 1000, 20
LONGEST_REFUSAL = 2000  # letters


class RefusalError(VLAError):
    """What a client is told in place of actions. It holds no path, and nothing of the inside of the server."""


@dataclass(frozen=True)
class Said:
    """What a client says beside its observation: the seed of the noise, what it executed since its message before, and where it
    is in its last chunk."""

    seed: int | None = None
    executed: Executed | None = None
    progress: Progress | None = None


@dataclass
class Session:
    """One connection. observation, actions, seconds: of its last answer. sent: those of the actions that were sent (N, A).

    seen_at: when the observation was. chunks: what it has to execute. executes_all: set by a protocol whose clients execute all
    that is sent before they observe again. action_repeat: observations that get the same action, of vla-eval. events: how many
    of it there were to record. warned: what was logged of it once.
    """

    protocol: str
    peer: str
    number: int = field(default_factory=lambda: next(NUMBERS))
    since: float = field(default_factory=time.time)
    answered: int = 0
    executes_all: bool = False
    action_repeat: int = 1
    sent: NDArray[np.float32] | None = None
    events: int = 0
    chunks: RobotChunks = field(default_factory=RobotChunks)
    warned: set[str] = field(default_factory=set)
    observation: ParsedObservation | None = None
    seen_at: float = 0.0
    actions: NDArray[np.float32] | None = None
    seconds: float = 0.0

    def implied(self) -> Executed | None:
        """What its client has executed since the last answer, where the protocol says so."""
        return Executed(self.sent) if self.executes_all and self.sent is not None else None


@dataclass(frozen=True)
class Fault:
    """A message that was not answered, and what its client was told. client: None before it has a number."""

    when: float
    protocol: str
    client: int | None
    text: str


class PolicyService:
    """A policy, what it may send, and who asks.

    contract: what a client learns when it connects. limits: None where they are switched off. seed: of the noise of every
    answer; None draws afresh. key_maps: by protocol. greeting: what openpi's clients get instead of the contract. record:
    folder for what clients show and do. recent: when the last answers were given, and the seconds they took.
    """

    def __init__(
        self,
        policy: Policy,
        contract: dict[str, Any],
        limits: ActionLimits | None,
        seed: int | None,
        key_maps: dict[str, KeyMap],
        greeting: dict[str, Any] | None = None,
        record: Path | None = None,
    ) -> None:
        self.policy, self.contract, self.limits, self.seed, self.key_maps = policy, contract, limits, seed, key_maps
        self.greeting = greeting or contract
        self.metrics = Metrics()
        self.limit_log = LimitLog(() if limits is None else limits.names)
        self.sessions: dict[int, Session] = {}
        self.engine: Engine | None = None
        self.started = time.time()
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT_ANSWERS)
        self.faults: deque[Fault] = deque(maxlen=RECENT_FAULTS)
        about = {"recorded_by": f"paligemma-vla {__version__} serve", "fingerprint": str(contract["fingerprint"])}
        self.recorder = None if record is None else Recorder(record, policy, about, self.metrics)
        self._readers = ThreadPoolExecutor(READERS, "reader")

    def start(self, max_batch: int, wait_s: float, max_queue: int) -> None:
        """Begin to answer; call it in the event loop that will ask."""
        self.engine = Engine(self.policy, self.metrics, max_batch, wait_s, max_queue, lambda: len(self.sessions))

    async def close(self) -> None:
        """Stop answering, and finish what is recorded."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self.engine is not None:
            await self.engine.close()
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.close)

    def open_session(self, protocol: str, peer: str) -> Session:
        session = Session(protocol, peer)
        self.sessions[session.number] = session
        self.metrics.clients.labels(protocol).inc()
        log.info("%s: client %d connected from %s", protocol, session.number, peer)
        return session

    def close_session(self, session: Session) -> None:
        if self.sessions.pop(session.number, None) is not None:
            session.events += 1
            self._record(session, gone=True)
            self.metrics.clients.labels(session.protocol).dec()
            log.info("%s: client %d left after %d answers", session.protocol, session.number, session.answered)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of what takes long for the event loop: reading what came from outside."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    @contextmanager
    def refusals(self, protocol: str, client: int | None = None) -> Iterator[None]:
        """Turn any error in the block into a `RefusalError`, counted and remembered once. A client learns what it did wrong;
        what went wrong inside the server is for the log. client: its number, where it is known."""
        try:
            yield
        except RefusalError:
            raise
        except Exception as error:  # of any kind: the server goes on
            refusal = RefusalError(f"{error!s:.{LONGEST_REFUSAL}}")
            if not isinstance(error, (CodecError, DataError, NotFiniteError)):
                log.error("%s: client %s: no answer", protocol, client, exc_info=error)
                refusal = RefusalError(f"internal error: {type(error).__name__}; the server's log says more")
            self.metrics.errors.labels(protocol).inc()
            self.faults.append(Fault(time.time(), protocol, client, f"{refusal!s:.1000}"))
            raise refusal from error

    async def answer(
        self,
        session: Session,
        message: Mapping[str, Any],
        said: Said = Said(),
        execute: int | None = None,
    ) -> NDArray[np.float32]:
        """The actions (N, A) to send for a client's message, all of the chunk or the first `execute`. Raises `RefusalError`."""
        assert self.engine is not None, "call start first"
        arrived, when = time.monotonic(), time.time()
        session.events += 1  # one that fails is missing in the record
        with self.refusals(session.protocol, session.number):
            parsed = await self.in_thread(self._parse, session.protocol, message)
            self._warn_of_units(session, parsed.state)
            going_on = session.chunks.continuation(said.progress)
            actions = await self.engine.infer(parsed, self.seed if said.seed is None else said.seed, going_on)
            executed = said.executed or session.implied()
            if self.limits is not None:
                previous = None if executed is None else executed.actions[-1]
                actions, moved = self.limits.apply(actions, parsed.state, previous)
                self._count_limited(moved)
            if not np.isfinite(actions).all():
                raise NotFiniteError("the policy's actions are not finite; nothing is sent")
        session.observation, session.seen_at = parsed, when
        session.actions, session.sent = actions, actions[:execute]
        session.chunks.add(session.sent)
        self._record(session, executed=executed, view=parsed, sent=session.sent, when=when)
        session.answered, session.seconds = session.answered + 1, time.monotonic() - arrived
        self._warn_of_delay(session, said.progress, going_on)
        self.recent.append((time.time(), session.seconds))
        self.metrics.latency.labels(session.protocol).observe(session.seconds)
        return session.sent

    async def observe(self, session: Session, message: Mapping[str, Any], executed: Executed | None = None) -> None:
        """Take an observation that asks for no new chunk. Raises `RefusalError`."""
        session.events += 1
        when, executed = time.time(), executed or session.implied()
        session.sent = None
        with self.refusals(session.protocol, session.number):
            session.observation = await self.in_thread(self._parse, session.protocol, message)
        session.seen_at = when
        self._record(session, executed=executed, view=session.observation, when=when)

    def end_episode(self, session: Session, executed: Executed | None = None, success: bool | None = None) -> None:
        """The client begins anew: what was sent before says nothing about what follows. executed: since its last message."""
        session.events += 1
        self._record(session, executed=executed or session.implied(), success=success)
        session.sent = None
        session.chunks.clear()

    def _record(self, session: Session, **facts: Any) -> None:
        if self.recorder is not None:
            self.recorder.add(Event(session.number, session.events, session.protocol, **facts))

    def _parse(self, protocol: str, message: Mapping[str, Any]) -> ParsedObservation:
        check_pixels(message)
        return self.policy.parse(self.key_maps[protocol].translate(message))

    def _warn_of_units(self, session: Session, state: NDArray[np.float32]) -> None:
        """Log, once for each client, a number of its state (P,) that is outside of the training data by more than their range:
        degrees for radians, millimetres for metres, another order. It is answered: limits are there for the actions."""
        statistics, names = self.policy.preprocessor.statistics.state, self.contract["state_names"]
        low, high = np.asarray(statistics.min), np.asarray(statistics.max)
        far = np.flatnonzero((high > low) & (np.maximum(low - state, state - high) > high - low))
        if len(far) and "units" not in session.warned:
            session.warned.add("units")
            n = far[0]
            got = f"state {names[n] if names else n} is {state[n]:g}, in the training data {low[n]:g} to {high[n]:g}"
            log.warning("%s: client %d: %s; are units and order the same?", session.protocol, session.number, got)

    def _warn_of_delay(self, session: Session, progress: Progress | None, going_on: Continuation | None) -> None:
        """Log, once for each client, what makes its robot stand: an answer that took longer than the actions last which it got,
        and a delay that is longer than what it has left to execute."""
        if session.sent is None or session.answered < 2:  # the first answer may be slow
            return
        coverage = chunk_coverage(len(session.sent), hz := self.contract["control_hz"])
        if session.seconds * hz > len(session.sent) and "latency" not in session.warned:
            session.warned.add("latency")
            text = "%s: client %d: an answer took %.2f s, and %s: the robot stands meanwhile"
            log.warning(text, session.protocol, session.number, session.seconds, coverage)
        left = 0 if going_on is None else len(going_on.actions)
        if progress is not None and progress.delay > left > 0 and "delay" not in session.warned:
            session.warned.add("delay")
            text = "%s: client %d: an answer is used after %d control steps, and it has %d left until then (%s)"
            log.warning(
                f"{text}: the robot stands; see docs/realtime.md",
                session.protocol,
                session.number,
                progress.delay,
                left,
                coverage,
            )

    def _count_limited(self, moved: NDArray[np.float32]) -> None:
        self.limit_log.add(moved)
        for name, changed in zip(self.limit_log.names, np.count_nonzero(moved, axis=0).tolist(), strict=True):
            if changed:
                self.metrics.limited.labels(name).inc(changed)


def check_pixels(message: Mapping[str, Any]) -> None:
    """Refuse an array larger than any picture, before anything is made of it. Raises `DataError`."""
    for key, value in message.items():
        if isinstance(value, Mapping):
            check_pixels(value)
        elif isinstance(value, np.ndarray) and value.size > 3 * MAX_PIXELS:
            raise DataError(f"{key:.80}: got {value.shape}, expected at most {MAX_PIXELS} pixels")
