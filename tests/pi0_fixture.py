"""What LeRobot 0.6.1 wrote of pi0 and pi0.5: tiny random models with inputs and outputs, names and shapes of the real ones."""

from __future__ import annotations

import re
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures" / "pi0"
TENSOR = re.compile(r"(\S+) \((.*)\)(?:  x(\d+), i = .*)?")


def full_size_tensors(kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name of `pi0` or `pi05`. A published file has no embed_tokens, but its table as lm_head."""
    tensors: dict[str, tuple[int, ...]] = {}
    section = ""
    for line in (FIXTURES / "full_size_tensors.txt").read_text().splitlines():
        if line.startswith("#"):
            section = line.split()[1].rstrip(":")
        elif line and section == kind:
            match = TENSOR.fullmatch(line)
            assert match is not None, line
            shape = tuple(map(int, filter(None, match[2].replace(" ", "").split(","))))
            tensors.update((match[1].replace("{i}", str(number)), shape) for number in range(int(match[3] or 1)))
    return tensors
