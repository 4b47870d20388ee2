"""What all protocols have in common: a client's message in, a chunk of actions out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.control.limits import ActionLimits
from paligemma_vla.errors import DataError, VLAError
from paligemma_vla.observation import ParsedObservation
from paligemma_vla.policy import Policy
from paligemma_vla.serving.engine import Engine
from paligemma_vla.serving.keys import KeyMap
from paligemma_vla.serving.metrics import Metrics

log = logging.getLogger(__name__)
NUMBERS = count(1)
MAX_PIXELS = 4096 * 4096  # of one picture


@dataclass
class Session:
    """One connection. executed: its last action (A,), where the client says so. observation, actions, seconds: of its last
    answer."""

    protocol: str
    peer: str
    number: int = field(default_factory=lambda: next(NUMBERS))
    since: float = field(default_factory=time.time)
    answered: int = 0
    executed: NDArray[np.float32] | None = None
    observation: ParsedObservation | None = None
    actions: NDArray[np.float32] | None = None
    seconds: float = 0.0


class PolicyService:
    """A policy, what it may send, and who asks.

    contract: what a client learns when it connects. limits: None where they are switched off. seed: of the noise of every
    answer; None draws afresh. key_maps: by protocol. greeting: what openpi's clients get instead of the contract.
    """

    def __init__(
        self,
        policy: Policy,
        contract: dict[str, Any],
        limits: ActionLimits | None,
        seed: int | None,
        key_maps: dict[str, KeyMap],
        greeting: dict[str, Any] | None = None,
    ) -> None:
        self.policy, self.contract, self.limits, self.seed, self.key_maps = policy, contract, limits, seed, key_maps
        self.greeting = greeting or contract
        self.metrics = Metrics()
        self.sessions: dict[int, Session] = {}
        self.engine: Engine | None = None

    def start(self, max_batch: int, wait_s: float, max_queue: int) -> None:
        """Begin to answer; call it in the event loop that will ask."""
        self.engine = Engine(self.policy, self.metrics, max_batch, wait_s, max_queue, lambda: len(self.sessions))

    def open_session(self, protocol: str, peer: str) -> Session:
        session = Session(protocol, peer)
        self.sessions[session.number] = session
        self.metrics.clients.labels(protocol).inc()
        log.info("%s: client %d connected from %s", protocol, session.number, peer)
        return session

    def close_session(self, session: Session) -> None:
        if self.sessions.pop(session.number, None) is not None:
            self.metrics.clients.labels(session.protocol).dec()
            log.info("%s: client %d left after %d answers", session.protocol, session.number, session.answered)

    async def answer(self, session: Session, message: Mapping[str, Any], seed: int | None = None) -> NDArray[np.float32]:
        """The chunk (K, A) for a client's message. Raises `VLAError` that may be shown to the client."""
        assert self.engine is not None, "call start first"
        arrived = time.monotonic()
        with self._faults(session):
            parsed = await self._parse(session, message)
            actions = await self.engine.infer(parsed, self.seed if seed is None else seed)
            if self.limits is not None:
                actions, changed = self.limits.apply(actions, session.executed)
                self.metrics.limited.inc(changed)
        session.observation, session.actions = parsed, actions
        session.answered, session.seconds = session.answered + 1, time.monotonic() - arrived
        self.metrics.latency.labels(session.protocol).observe(session.seconds)
        return actions

    async def observe(self, session: Session, message: Mapping[str, Any]) -> None:
        """Take an observation that is answered from an earlier chunk. Raises as `answer` does."""
        with self._faults(session):
            session.observation = await self._parse(session, message)

    async def _parse(self, session: Session, message: Mapping[str, Any]) -> ParsedObservation:
        check_pixels(message)
        key_map = self.key_maps[session.protocol]
        return await asyncio.to_thread(lambda: self.policy.parse(key_map.translate(message)))

    @contextmanager
    def _faults(self, session: Session) -> Iterator[None]:
        """Count them; what is not meant for a client is logged, and becomes a `VLAError` that says no more than its type."""
        try:
            yield
        except VLAError:
            self.metrics.errors.labels(session.protocol).inc()
            raise
        except Exception as error:  # of any kind
            self.metrics.errors.labels(session.protocol).inc()
            log.exception("%s: client %d: internal error", session.protocol, session.number)
            raise VLAError(f"internal error: {type(error).__name__}; the server's log says more") from error


def check_pixels(message: Mapping[str, Any]) -> None:
    """Refuse an array larger than any picture, before anything is made of it. Raises `DataError`."""
    for key, value in message.items():
        if isinstance(value, Mapping):
            check_pixels(value)
        elif isinstance(value, np.ndarray) and value.size > 3 * MAX_PIXELS:
            raise DataError(f"{key:.80}: got {value.shape}, expected at most {MAX_PIXELS} pixels")
