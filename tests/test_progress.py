"""Progress where there is no terminal: lines, not a bar that overwrites itself."""

import sys

import pytest

from paligemma_vla import progress


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def count_to(total: int) -> None:
    with progress.progress_bar(total, "count", "step") as bar:
        for _ in range(total):
            bar.update()


def test_progress_without_a_terminal_is_a_line_each_interval(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e-9)
    count_to(3)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    assert len(lines) >= 3 and all(line.startswith("count: ") and line.endswith("\n") for line in lines)
    assert "3/3" in lines[-1] and not any("\r" in line for line in lines)


def test_progress_without_a_terminal_is_silent_when_the_work_is_short(capsys):
    count_to(3)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    count_to(3)
    assert "\rcount: 100%|" in terminal.text


@pytest.mark.parametrize("isatty", [True, False])
def test_progress_goes_on_when_nothing_can_be_written(monkeypatch, isatty):
    class Full(Terminal):
        def isatty(self) -> bool:
            return isatty

        def write(self, text: str) -> None:
            raise OSError("no space left on device")

    monkeypatch.setattr(progress, "LINE_SECONDS", 1e-9)
    monkeypatch.setattr(sys, "stderr", Full())
    count_to(3)
