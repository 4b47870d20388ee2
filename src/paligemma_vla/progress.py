"""Progress of long work: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0


class ProgressOutput:
    """Standard error for a progress bar. When it cannot be written (full disk, closed terminal) the work goes on.

    Where it is no terminal, each state of the bar is a line of its own.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        if not sys.stderr.isatty():
            text = text.strip()
            text += "\n" if text else ""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def progress_bar(total: int, description: str | None, unit: str, *, initial: int = 0, hidden: bool = False, **more: Any) -> Any:
    """A tqdm bar on standard error. hidden: show nothing. more: further arguments of `tqdm`."""
    if not sys.stderr.isatty():
        more |= {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "delay": LINE_SECONDS, "ncols": 0}
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=hidden,
        file=ProgressOutput(),
        dynamic_ncols=sys.stderr.isatty(),
        **more,
    )
