"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal) during training: the step is finished and saved before the process goes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from paligemma_vla.training.distributed import Distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A rank gets a signal from its terminal or scheduler, and soon after the same one from its launcher.
ECHO_SECONDS = 5.0


class StopRequest:
    """Within the block the first signal is only noted; a second one is delivered at once.

    Outside of the main thread, where Python has no signal handlers, it notes nothing.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.distributed = distributed
        self.number: int | None = None
        self.noted = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # One that was ignored from the start (nohup, a background job) stays so.
            numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if self.distributed.world_size > 1 and time.monotonic() - self.noted < ECHO_SECONDS:
                return
            self.__exit__(None, None, None)
            signal.raise_signal(number)
        self.number, self.noted = number, time.monotonic()
        # Not through logging or sys.stderr: the signal may have come in the middle of a line of theirs.
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; once more stops at once, unsaved\n")

    def anywhere(self) -> bool:
        """Whether any process was asked; each asks at the same step, so all of them stop after the same one."""
        return self.distributed.any(self.number is not None)

    @property
    def name(self) -> str:
        """`Ctrl-C` or `SIGTERM`, or that another process was asked."""
        if self.number is None:
            return "another process's signal"
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name

    def deliver(self) -> None:
        """After the block: end as the signal would have ended the process."""
        signal.raise_signal(self.number if self.number is not None else signal.SIGTERM)
