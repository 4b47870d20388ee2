"""Run every benchmark that needs no GPU; print one table and write a file in benchmarks/results (`make bench`).

`python -m benchmarks.run loader` runs one of them anew; the rows of the others stay as they were measured. Each kind of
processor has a file of its own: cpu_amx.json, cpu_avx512_bf16.json, or cpu_float32.json where nothing computes in bfloat16.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import answers, loader, sampler, training
from benchmarks.common import Row, environment

RESULTS = Path(__file__).parent / "results"


def kind_of_processor() -> str:
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    known = {"sampler": sampler, "training": training, "answers": answers, "loader": loader}
    rows = [row for name in sys.argv[1:] or known for row in known[name].measure()]
    command, path = "make bench", RESULTS / f"cpu_{kind_of_processor()}.json"
    if sys.argv[1:]:
        before = json.loads(path.read_text())
        command = f"{before['command']} at {before['commit']}, then python -m benchmarks.run {' '.join(sys.argv[1:])}"
        measured = {row.name: row for row in rows}
        rows = [measured.pop(row["name"], Row(**row)) for row in before["rows"]] + list(measured.values())
    report(rows, command, path)


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
