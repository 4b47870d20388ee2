"""Commands let OpenMP threads sleep at barriers, before torch is loaded, unless the user decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from paligemma_vla import SPIN_COUNT, SPIN_VARIABLES

SCRIPT = """
import os, sys
from paligemma_vla.cli.main import main, script
assert "torch" not in sys.modules
try:
    {call}
except SystemExit:
    pass
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("call", "name", "expected"),
    [
        ("main(['--help'])", "", SPIN_COUNT),
        ("script('train', ['--help'])", "", SPIN_COUNT),
        *(("main(['--help'])", name, "7" if name == "GOMP_SPINCOUNT" else "None") for name in SPIN_VARIABLES),
    ],
)
def test_commands_limit_spinning_unless_the_user_decided(call: str, name: str, expected: str) -> None:
    environment = {key: text for key, text in os.environ.items() if key not in SPIN_VARIABLES}
    if name:
        environment[name] = "7"
    command = [sys.executable, "-c", SCRIPT.format(call=call)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.split()[-1] == expected
