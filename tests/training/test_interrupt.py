"""Signals while training: the first is noted, the second delivered, echoes of a launcher are neither."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest
import torch

from paligemma_vla.training import interrupt
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.interrupt import SIGNALS, StopRequest

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _usual_handlers() -> Iterator[None]:
    """Whoever started the tests may have had some signals ignored (nohup does), which the program honours."""
    before = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_noted_and_the_handlers_come_back(number: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest(Distributed(0, 1, CPU)) as asked:
        assert not asked.anywhere()
        signal.raise_signal(number)
        assert asked.anywhere()
    assert asked.number == number
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_second_signal_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest(Distributed(0, 1, CPU)):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_signal_that_was_ignored_from_the_start_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(Distributed(0, 1, CPU)) as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_ends_a_wait_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "WAIT_SECONDS", 0.1)
    with StopRequest(Distributed(0, 1, CPU)) as asked:
        assert asked.interruptible(lambda: "data") == "data"
        began = time.monotonic()
        assert asked.interruptible(lambda: (signal.raise_signal(signal.SIGTERM), time.sleep(60))) is None
        assert time.monotonic() - began < 30
        assert asked.anywhere() and asked.name == "SIGTERM"
        assert asked.interruptible(lambda: pytest.fail("it was told to stop before")) is None


def test_signal_leaves_time_to_a_wait_that_ends() -> None:
    with StopRequest(Distributed(0, 1, CPU)) as asked:
        assert asked.interruptible(lambda: (signal.raise_signal(signal.SIGTERM), "data")) == (None, "data")
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
