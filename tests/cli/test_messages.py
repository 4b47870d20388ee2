"""What `guarded` tells of an error, whatever the error quotes."""

from __future__ import annotations

import argparse
import errno

import pytest

from paligemma_vla.cli.main import guarded
from paligemma_vla.errors import DataError


def told(error: Exception, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def run(args: argparse.Namespace) -> int:
        raise error

    status = guarded(run, argparse.Namespace(debug=False))
    return status, capfd.readouterr().err


def test_message_shows_no_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    assert told(DataError("a\x1b[31m\0b\n  é 🤖\ud800"), capfd) == (2, "error: a\\x1b[31m\\x00b\n  é 🤖\\ud800\n")


def test_message_is_no_longer_than_a_screen(capfd: pytest.CaptureFixture[str]) -> None:
    status, message = told(DataError("\n  ".join(["x" * 100_000] * 1000)), capfd)
    assert (status, len(message.splitlines())) == (2, 41)
    assert max(map(len, message.splitlines())) == 503
    assert message.endswith("  ... and 960 more\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.ESTALE])
def test_message_of_a_path_that_cannot_be_used_has_a_remedy(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    status, message = told(OSError(number, "reason", "file"), capfd)
    assert (status, message.startswith("error: file: reason; ")) == (2, True)


def test_message_of_exhausted_memory_has_a_remedy(capfd: pytest.CaptureFixture[str]) -> None:
    status, message = told(MemoryError(), capfd)
    assert (status, message.startswith("error: out of memory; lower data.batch_size")) == (2, True)


def test_message_of_a_defect_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    status, message = told(KeyError("x"), capfd)
    assert (status, message.splitlines()[0]) == (1, "internal error: KeyError: 'x'")
