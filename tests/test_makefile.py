"""`make install`, with a stand-in for Python: what an interrupted installation left is repaired."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# `-m venv` makes an environment of this same file; it ends as if killed when `dies` names what it is asked.
PYTHON = """#!/bin/sh
case "$3" in
  --version) test -e .venv/pip; exit ;;
  install) asked=install ;;
  *) asked=venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
esac
echo $asked >> asked
test $asked != "$(cat dies)" || exit 1
touch .venv/pip
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "packages" / "client").mkdir(parents=True)
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "packages/client/pyproject.toml"):
        shutil.copy(Path(__file__).parents[1] / name, tmp_path / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o700)
    return tmp_path


def install(project: Path, dies: str = "never") -> list[str]:
    """What Python was asked by `make install`, which is killed when it is asked `dies`."""
    (project / "dies").write_text(dies)
    (project / "asked").write_text("")
    done = subprocess.run(["make", "install", "PYTHON=./python"], cwd=project, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (dies == "never"), done.stderr
    return (project / "asked").read_text().split()


def change_lock(project: Path) -> None:
    """As if the lock were written later than the installation; two writes at once may have the same date."""
    os.utime(project / ".venv" / ".installed", (1, 1))


def test_install_runs_once_until_the_lock_changes(project: Path) -> None:
    assert install(project) == ["venv", "install"]
    assert (project / ".venv" / ".installed").read_text().strip().isdigit()
    assert install(project) == []
    change_lock(project)
    assert install(project) == ["install"]
    assert not (project / ".venv.installing").exists()


@pytest.mark.parametrize("dies", ["venv", "install"])
@pytest.mark.parametrize("installed", [False, True])
def test_install_that_was_interrupted_is_made_anew(project: Path, dies: str, installed: bool) -> None:
    if installed:
        install(project)
        change_lock(project)
        if dies == "venv":
            (project / ".venv" / "pip").unlink()
    install(project, dies)
    (project / ".venv" / "left").touch()
    assert install(project) == ["venv", "install"]
    assert not (project / ".venv" / "left").exists()
    assert install(project) == []


def test_environment_without_pip_is_made_anew(project: Path) -> None:
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to("/no/such/python")
    assert install(project) == ["venv", "install"]
