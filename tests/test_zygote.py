"""The process that forks commands."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from zygote import Zygote


@pytest.fixture
def slow(tiny_config, tmp_path: Path) -> list[str]:
    """A training run that takes far longer than any test waits."""
    path = tmp_path / "config.yaml"
    path.write_text(tiny_config({"training.epochs": 100_000}).to_yaml(), encoding="utf-8")
    return ["train", "--config_path", str(path), "--device", "cpu"]


def test_zygote_returns_status_and_output_of_a_command_in_its_folder(zygote: Zygote, tmp_path: Path) -> None:
    helped = zygote.run(["--help"], tmp_path)
    assert (helped.status, helped.stderr, helped.hung) == (0, "", False)
    assert helped.stdout.startswith("usage: paligemma-vla")
    (tmp_path / "here.yaml").write_text("- a", encoding="utf-8")
    refused = zygote.run(["stats", "--config_path", "here.yaml", "--output_path", "x.json"], tmp_path)
    assert (refused.status, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: here.yaml: ")
    assert 10e6 < refused.peak_bytes < 1.5e9


def test_zygote_children_run_side_by_side_and_end_by_signals(zygote: Zygote, slow: list[str], tmp_path: Path) -> None:
    first, second = zygote.start(slow, tmp_path), zygote.start(["--help"], tmp_path)
    assert second.wait(30).status == 0
    os.kill(first.pid, signal.SIGKILL)
    result = first.wait(30)
    assert (result.status, result.hung) == (-signal.SIGKILL, False)


def test_zygote_kills_what_hangs(zygote: Zygote, slow: list[str], tmp_path: Path) -> None:
    result = zygote.run(slow, tmp_path, timeout=0.5)
    assert (result.status, result.hung) == (-signal.SIGKILL, True)
    assert result.seconds >= 0.5
