"""What commands change of the C libraries, unless the user decided otherwise: waiting at barriers, keeping of freed memory."""

from __future__ import annotations

import os
import platform
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


ALLOCATE = """
import resource, torch
from paligemma_vla import keep_freed_memory
keep_freed_memory()
for _ in range(4):
    pieces = [torch.zeros(2**18) for _ in range(64)]  # of 1 MB
    del pieces
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept_unless_the_user_decided() -> None:
    """64 MB are 16,384 pages: taken once, or at every step."""
    for tunables, least, most in (("", 0, 500), ("glibc.malloc.mmap_threshold=65536", 16_000, 40_000)):
        environment = {key: text for key, text in os.environ.items() if key != "GLIBC_TUNABLES"}
        environment |= {"GLIBC_TUNABLES": tunables} if tunables else {}
        command = [sys.executable, "-c", ALLOCATE]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        *_, before, after = map(int, printed.split())
        assert least <= after - before <= most
