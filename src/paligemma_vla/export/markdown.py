"""The little Markdown that a model card needs, with what others wrote escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence

SPECIAL = re.compile(r"([\\`*_\[\]<>#|~$&@])")


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


def text(value: object) -> str:
    """On one line, with everything escaped that Markdown or HTML would take for more than text."""
    return SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table; cells are escaped."""
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return lines + [f"| {' | '.join(text(cell) for cell in row)} |" for row in rows]
