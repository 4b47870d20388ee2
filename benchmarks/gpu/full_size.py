"""The real shapes on one GPU: correct first, then how fast, then in how much memory.

    benchmarks/gpu/full_size.sh            (which also brings what the machine lacks; see there)

1. The tiny model answers and learns on the GPU as it does on the CPU, or nothing is timed; graphs answer as the model does; a
   resumed run is the uninterrupted one; shards of one rank through NCCL train as one process alone.
2. PaliGemma 3B with random weights: latency of one observation, with 1 and 2 cameras, at 50 and 10 Euler steps, and with a
   prefix: eager, by CUDA graphs, and by graphs with the Euler step compiled.
3. Training on two cameras: samples per second and peak memory of everything, of adapters (LoRA), and of the head alone, beside
   what the memory plan says.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarks.common import Row, environment
from benchmarks.gpu import correct, speed
from benchmarks.gpu.shapes import shapes_of

from paligemma_vla.config import parse_assignments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="paligemma-3b-pt-224", help="a published name, or `tiny` to try the benchmark itself"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the configuration")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    device, shapes, common = torch.device(args.device), shapes_of(args.model), parse_assignments(args.set)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    result = {**environment("benchmarks/gpu/full_size.sh"), "model": args.model, "gpu": name}
    rows: list[Row] = []

    def report(measured: Iterator[Row]) -> None:
        for row in measured:
            rows.append(row)
            print(_line(row), flush=True)
            args.output.write_text(json.dumps({**result, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")

    def attempt(what: str, measured: Iterator[Row]) -> None:
        try:
            report(measured)
        except Exception as error:  # of any kind: time on such a machine is short, and the rest is measured
            traceback.print_exc()
            failures.append(f"{what}: {error}")
        print(f"-- {what}: {time.monotonic() - began:.0f} s since the beginning", flush=True)

    began, failures = time.monotonic(), []
    with correct.tiny_run() as config:
        report(correct.against_cpu(config, device))
        for check in (correct.resume, correct.graphed, correct.one_rank):
            attempt(check.__name__, check(config, device))
    limits = speed.Limits(device)
    report(limits.rows())
    how = shapes, device, common, args.repeats, limits
    attempt("latency, 2 cameras", speed.measure_latency(2, *how))
    attempt("training", speed.measure_training(*how))
    attempt("latency, 1 camera", speed.measure_latency(1, *how))
    for failure in failures:
        print(f"FAILED: {failure}")
    return int(bool(failures))


def _line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"{row.ratio:6.2f} x {row.against}"
    share = "" if row.share is None else f"  {row.share:.0%} of {row.limit}"
    return f"{row.name:<88}{row.value:>12,.4g}  {row.unit:10s}{ratio}{share}".rstrip()


if __name__ == "__main__":
    raise SystemExit(main())
