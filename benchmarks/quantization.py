"""What int8 and int4 weights cost and save: `python -m benchmarks.quantization --checkpoint_path P --eval_data_path D`.

mae, mse and velocity_loss are main_eval.py's own, with and without `--weights`. change: how far the actions lie from those of
the full weights, from the same noise. ms: one observation's answer. Rows with the head quantised as well are for comparison:
the program does not offer it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import environment
from paligemma_vla import Policy
from paligemma_vla.cli.main import script
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.loader import VLADataset
from paligemma_vla.evaluation.open_loop import predict, read_sample
from paligemma_vla.model.quantize import KINDS, quantize, weight_bytes

ROUNDS, COMPARED = 200, 256
RESULTS = Path(__file__).parent / "results" / "quantization.json"


def by_main_eval(args: argparse.Namespace, weights: str | None) -> dict[str, float]:
    """Figures out of metrics.json."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--checkpoint_path", args.checkpoint_path, "--eval_data_path", args.eval_data_path, "--output_dir", folder]
        flags += ["--max_samples", str(args.max_samples), "--device", "cpu", *(["--weights", weights] if weights else [])]
        if script("evaluate", flags) != 0:
            sys.exit(1)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    return {name: metrics[name] for name in ("mae", "mse", "velocity_loss", "samples")}


def changes(policies: list[Policy], data: str) -> list[float]:
    """How far each policy's actions lie from the first one's, from the same noise: mean absolute difference, real units."""
    dataset = VLADataset(EpisodeIndex.build(data), policies[0].preprocessor, policies[0].config)
    chosen = [read_sample(dataset, int(number)) for number in np.linspace(0, len(dataset) - 1, COMPARED)]
    answers = [predict(policy, chosen, 0, None) for policy in policies]
    return [float(np.abs(answer - answers[0]).mean()) for answer in answers]


def load(args: argparse.Namespace, kind: Any, head: bool) -> Policy:
    policy = Policy.from_checkpoint(args.checkpoint_path, weights=kind)
    if head:
        quantize(policy.model.action_head, kind, torch.device("cpu"))
    return policy


def milliseconds(policies: list[Policy]) -> list[float]:
    """Of one observation's answer, the least of many: asked in turn, so that other work on the machine troubles all alike."""
    side = policies[0].metadata["image_size"]
    observation = {
        "image_1": np.zeros((side, side, 3), np.uint8),
        "state": policies[0].preprocessor.statistics.state.mean,
        "prompt": "open the drawer",
    }
    times = np.full((len(policies), ROUNDS), np.inf)
    for turn in range(ROUNDS):
        for number, policy in enumerate(policies):
            began = time.perf_counter()
            policy.infer(observation, seed=0)
            times[number, turn] = time.perf_counter() - began
    return [float(value) for value in 1000 * times.min(axis=1)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy, size and time of quantised weights.")
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--eval_data_path", required=True)
    parser.add_argument("--max_samples", type=int, default=1024)
    args = parser.parse_args()
    kinds = [(None, False), *((kind, False) for kind in KINDS), *((kind, True) for kind in KINDS)]
    policies = [load(args, *kind) for kind in kinds]
    measured = zip(kinds, policies, changes(policies, args.eval_data_path), milliseconds(policies), strict=True)
    rows: list[dict[str, Any]] = []
    for (kind, head), policy, change, time_ms in measured:
        size = round(weight_bytes(policy.model) / 1e6, 2)
        row = {"weights": f"{kind or 'full'}{', head too' * head}", "megabytes": size, "change": change, "ms": time_ms}
        rows.append(row if head else {**row, **by_main_eval(args, kind)})
        print(rows[-1])
    command = "python -m benchmarks.quantization --checkpoint_path P --eval_data_path D"
    result = {**environment(command), "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(f"-> {RESULTS}")


if __name__ == "__main__":
    main()
