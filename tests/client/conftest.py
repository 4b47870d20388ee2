"""A server of the suite's trained policy, one for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from running_server import RunningServer


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    from running_server import RunningServer

    running = RunningServer(str(checkpoint), limited=False)
    yield running
    running.close()
