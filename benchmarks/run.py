"""Run every benchmark that needs no GPU; print one table and write benchmarks/results/cpu.json (`make bench`)."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import demo_model, loader, sampler
from benchmarks.common import Row
from paligemma_vla import versions

RESULTS = Path(__file__).parent / "results" / "cpu.json"


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    rows: list[Row] = []
    for benchmark in (loader, sampler, demo_model):
        rows += benchmark.measure()
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:<{width}}  {row.value:>12,.4g}  {row.unit}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "command": "make bench",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "hardware": f"{os.cpu_count()} cores, {processor()}, torch threads {torch.get_num_threads()}",
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(f"-> {RESULTS}")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
