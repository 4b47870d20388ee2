"""Steps at a fixed rate, and what a run of them was like."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LoopReport:
    """What a run of the loop was like.

    steps: control steps. held: those without an action of the policy. missed: steps that took longer than their time, so that
    the next began late. jitter_ms: 50 %, 95 % and the largest of how far the time between two actions was from 1 / hz.
    delay: control steps from observation to chunk, median and largest, without the first of a run. chunks: those that were
    used; unused: those that came too late.
    """

    steps: int
    held: int
    missed: int
    jitter_ms: tuple[float, float, float]
    delay: tuple[float, float]
    chunks: int
    unused: int

    def __str__(self) -> str:
        p50, p95, largest = self.jitter_ms
        typical, longest = self.delay
        return (
            f"{self.steps} steps, {self.held} held, {self.missed} deadlines missed; "
            f"jitter {p50:.1f} ms (95 %: {p95:.1f}, at most {largest:.1f}); "
            f"{self.chunks} chunks, {self.unused} not used; delay {typical:g} steps (at most {longest:g})"
        )


class Ticker:
    """Waits for the steps of a fixed rate. hz: steps per second. now, sleep: of the clock, in seconds.

    A step that begins late moves all that follow: two actions at once would be a jump. missed: how many did. gaps: seconds
    between actions.
    """

    def __init__(
        self, hz: float, now: Callable[[], float] = time.perf_counter, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self.period, self.missed = 1 / hz, 0
        self.gaps: list[float] = []
        self._now, self._sleep = now, sleep
        self._due: float | None = None  # of the next step
        self._acted: float | None = None

    def wait(self) -> None:
        """Return when the next step is due: the first at once."""
        now = self._now()
        if self._due is None or now > self._due:
            self.missed += self._due is not None
            self._due = now
        else:
            self._sleep(self._due - now)
        self._due += self.period

    def restart(self) -> None:
        """The robot stood within its step until now: the next one is due a period later, or two actions would be too near."""
        now = self._now()
        self.missed += self._acted is not None and self._due is not None and now > self._due
        self._due = now + self.period

    def act(self) -> None:
        """An action is sent now."""
        now = self._now()
        if self._acted is not None:
            self.gaps.append(now - self._acted)
        self._acted = now

    def jitter_ms(self) -> tuple[float, float, float]:
        """As in `LoopReport`; zeros before the second action."""
        p50, p95, largest = np.percentile(1000 * np.abs(np.array(self.gaps or [self.period]) - self.period), [50, 95, 100])
        return float(p50), float(p95), float(largest)
