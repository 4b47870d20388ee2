"""The tables of docs/performance.md, from benchmarks/results and arithmetic: `python -m benchmarks.tables` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import roofline

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
RESULTS = Path(__file__).parent / "results"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(?:.*?\n)??(<!-- end -->)", re.DOTALL)


def rows(name: str) -> str:
    """The rows of a result, below what they were measured on."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [measured_on(result), "", "| what | | fastest to slowest | beside | of the limit |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        spread = "" if row["spread"] is None else " to ".join(number(value) for value in sorted(row["spread"]))
        beside = "" if row["ratio"] is None else f"{row['ratio']:.2f} times {row['against']}"
        share = "" if row["share"] is None else f"{row['share']:.0%} of {row['limit']}"
        lines.append(f"| {row['name']} | {number(row['value'])} {row['unit']} | {spread} | {beside} | {share} |")
    return "\n".join(lines)


def measured_on(result: dict[str, Any]) -> str:
    return f"`{result['command']}`, {result['hardware']}, torch {result['versions']['torch']}, commit {result['commit']}:"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


TABLES: dict[str, Callable[[], str]] = {
    "roofline": roofline.table,
    "cpu_amx": lambda: rows("cpu_amx"),
    "cpu_avx512_bf16": lambda: rows("cpu_avx512_bf16"),
    "lerobot": lambda: rows("lerobot"),
}


def render(document: str) -> str:
    """The document with every table as it follows from the results."""
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", document)


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text()))
