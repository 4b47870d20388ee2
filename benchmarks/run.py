"""Run every benchmark that needs no GPU; print one table and write benchmarks/results/cpu.json (`make bench`).

`python -m benchmarks.run loader` runs one of them anew; the rows of the others stay as they were measured.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import answers, loader, sampler, training
from benchmarks.common import Row, environment

RESULTS = Path(__file__).parent / "results" / "cpu.json"


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    known = {"sampler": sampler, "training": training, "answers": answers, "loader": loader}
    rows = [row for name in sys.argv[1:] or known for row in known[name].measure()]
    command = "make bench"
    if sys.argv[1:]:
        before = json.loads(RESULTS.read_text())
        command = f"{before['command']} at {before['commit']}, then python -m benchmarks.run {' '.join(sys.argv[1:])}"
        measured = {row.name: row for row in rows}
        rows = [measured.pop(row["name"], Row(**row)) for row in before["rows"]] + list(measured.values())
    report(rows, command, RESULTS)


def report(rows: list[Row], command: str, path: Path) -> None:
    """Print a table, and write it to a file with what it was measured on."""
    width = max(len(row.name) for row in rows)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:5.2f} x {row.against}"
        share = "" if row.share is None else f"  {row.share:.0%} of {row.limit}"
        print(f"{row.name:<{width}}  {row.value:>10,.4g}  {row.unit:22s} {ratio}{share}".rstrip())
    result = {**environment(command), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"-> {path}")


if __name__ == "__main__":
    main()
