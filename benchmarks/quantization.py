"""What int8 and int4 weights cost and save: `python -m benchmarks.quantization --checkpoint_path P --eval_data_path D`.

The first three rows are main_eval.py's own figures, with and without `--weights`. The others quantise the action head as well,
which the program does not offer: they say why.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import processor
from paligemma_vla import Policy, versions
from paligemma_vla.cli.main import script
from paligemma_vla.evaluation.open_loop import OpenLoopConfig, evaluate
from paligemma_vla.model.quantize import KINDS, quantize, weight_bytes

RESULTS = Path(__file__).parent / "results" / "quantization.json"


def by_main_eval(args: argparse.Namespace, weights: str | None) -> dict[str, Any]:
    """A row out of metrics.json."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--checkpoint_path", args.checkpoint_path, "--eval_data_path", args.eval_data_path, "--output_dir", folder]
        flags += ["--max_samples", str(args.max_samples), "--device", "cpu", *(["--weights", weights] if weights else [])]
        if script("evaluate", flags) != 0:
            sys.exit(1)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    return {"weights": weights or "full", **figures(metrics), "megabytes": metrics["checkpoint"]["weights_mb"]}


def with_head(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """A row with the action head quantised too."""
    policy = Policy.from_checkpoint(args.checkpoint_path, weights=kind)
    quantize(policy.model.action_head, kind, torch.device("cpu"))
    metrics = evaluate(policy, args.eval_data_path, OpenLoopConfig(max_samples=args.max_samples)).metrics
    return {"weights": f"{kind}, head too", **figures(metrics), "megabytes": round(weight_bytes(policy.model) / 1e6, 2)}


def figures(metrics: dict[str, Any]) -> dict[str, float]:
    (used,) = [row for row in metrics["euler_steps"] if row["used"]]
    return {
        "mae": metrics["mae"],
        "mse": metrics["mse"],
        "velocity_loss": metrics["velocity_loss"],
        "ms_per_observation": used["ms_per_observation"],
        "samples": metrics["samples"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy, size and time of quantised weights.")
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--eval_data_path", required=True)
    parser.add_argument("--max_samples", type=int, default=1024)
    args = parser.parse_args()
    rows = [by_main_eval(args, weights) for weights in (None, *KINDS)] + [with_head(args, kind) for kind in KINDS]
    for row in rows:
        print("  ".join(f"{name} {value:.5g}" if isinstance(value, float) else str(value) for name, value in row.items()))
    result = {
        "command": "python -m benchmarks.quantization --checkpoint_path P --eval_data_path D",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{os.cpu_count()} cores, {processor()}, torch threads {torch.get_num_threads()}",
        "versions": versions(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(f"-> {RESULTS}")


if __name__ == "__main__":
    main()
