"""The process that forks commands: what it tells of their end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from zygote import Zygote


@pytest.fixture
def slow(tiny_config, tmp_path: Path) -> list[str]:
    """A training run that takes far longer than any test waits."""
    path = tmp_path / "config.yaml"
    path.write_text(tiny_config({"training.epochs": 100_000}).to_yaml(), encoding="utf-8")
    return ["train", "--config_path", str(path), "--device", "cpu"]


def test_zygote_gives_status_and_output(zygote: Zygote, tmp_path: Path) -> None:
    told = zygote.run(["--help"], tmp_path)
    assert (told.status, told.stderr, told.hung) == (0, "", False)
    assert told.stdout.startswith("usage: paligemma-vla")
    refused = zygote.run(["stats", "--config_path", "none.yaml", "--output_path", "x.json"], tmp_path)
    assert (refused.status, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: none.yaml: cannot read")
    assert 10e6 < refused.peak_bytes < 1.5e9


def test_zygote_runs_in_the_given_folder(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "here.yaml").write_text("- a", encoding="utf-8")
    assert "got list" in zygote.run(["stats", "--config_path", "here.yaml", "--output_path", "x"], tmp_path).stderr


def test_zygote_tells_a_signal_as_subprocess_does(zygote: Zygote, slow: list[str], tmp_path: Path) -> None:
    child = zygote.start(slow, tmp_path)
    os.kill(child.pid, signal.SIGKILL)
    result = child.wait(10)
    assert (result.status, result.hung) == (-signal.SIGKILL, False)


def test_zygote_kills_what_hangs(zygote: Zygote, slow: list[str], tmp_path: Path) -> None:
    began = time.monotonic()
    result = zygote.run(slow, tmp_path, timeout=0.5)
    assert (result.status, result.hung) == (-signal.SIGKILL, True)
    assert 0.5 <= result.seconds <= time.monotonic() - began < 10


def test_zygote_children_run_side_by_side(zygote: Zygote, slow: list[str], tmp_path: Path) -> None:
    first, second = zygote.start(slow, tmp_path), zygote.start(["--help"], tmp_path)
    assert second.wait(10).status == 0
    os.killpg(first.pid, signal.SIGTERM)
    assert first.wait(10).status in (143, -signal.SIGTERM)
