"""Signals during training (Ctrl-C, SIGTERM, SIGHUP of a closed terminal): the step is finished and saved before the end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from paligemma_vla.errors import Terminated
from paligemma_vla.training.distributed import Distributed

Result = TypeVar("Result")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A rank receives a signal from its terminal or scheduler, and soon after the same one from its launcher.
ECHO_SECONDS = 5.0
WAIT_SECONDS = 3.0  # for samples that may be on their way


class StopRequest:
    """Within the block the first signal is remembered; a second one is delivered at once. The first ends what is
    `interruptible`, unless that ends soon.

    Outside of the main thread, where Python has no signal handlers, nothing changes.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.distributed = distributed
        self.number: int | None = None
        self._received, self._waiting = 0.0, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # One that was ignored from the start (nohup, a background job) stays ignored.
            numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if self.distributed.world_size > 1 and time.monotonic() - self._received < ECHO_SECONDS:
                return
            self.__exit__()
            signal.raise_signal(number)
        self.number, self._received = number, time.monotonic()
        # Not through logging or sys.stderr: the signal may interrupt a line that they write.
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b"\nstopping after this step; once more stops at once, unsaved\n")
        if self._waiting:
            self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
            signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            raise Terminated

    def interruptible(self, action: Callable[[], Result]) -> Result | None:
        """What `action` returns; None when a signal came before, or it does not end soon after one: it waits for data, which
        may never come."""
        try:
            self._waiting = True
            try:
                return None if self.number is not None else action()
            finally:
                self._waiting = False
                if signal.SIGALRM in self._previous:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        except Terminated:
            return None

    def anywhere(self) -> bool:
        """True if any process has received a signal. All call it at the same step, so all stop after the same one."""
        return self.distributed.any(self.number is not None)

    @property
    def name(self) -> str:
        """`Ctrl-C`, `SIGTERM` or `SIGHUP`, or that another process has received it."""
        if self.number is None:
            return "another process's signal"
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name

    def deliver(self) -> None:
        """After the block: end as the signal would have ended the process."""
        signal.raise_signal(self.number if self.number is not None else signal.SIGTERM)
