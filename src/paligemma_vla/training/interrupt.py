"""Signals during training (Ctrl-C, SIGTERM, SIGHUP of a closed terminal): the step is finished and saved before the end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from paligemma_vla.training.distributed import Distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A rank receives a signal from its terminal or scheduler, and soon after the same one from its launcher.
ECHO_SECONDS = 5.0


class StopRequest:
    """Within the block the first signal is remembered; a second one is delivered at once.

    Outside of the main thread, where Python has no signal handlers, nothing changes.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.distributed = distributed
        self.number: int | None = None
        self._received = 0.0
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
