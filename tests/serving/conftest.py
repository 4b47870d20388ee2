"""A server over the trained policy of the suite, in a thread of its own, on a free port of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from running_server import RunningServer

Serve = Callable[..., RunningServer]


@pytest.fixture
def serve(checkpoint: Path) -> Iterator[Serve]:
    """`serve(**changes)` starts one; changes are fields of `ServeSettings`, or arguments of `build_service`."""
    running: list[RunningServer] = []

    def start(**changes: Any) -> RunningServer:
        running.append(RunningServer(str(checkpoint), **changes))
        return running[-1]

    yield start
    for server in running:
        server.close()
