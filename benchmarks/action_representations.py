"""Closed-loop success of each action representation on the demonstration's drawer pair, all from the same recordings.

`python -m benchmarks.action_representations` records absolute hand targets once, trains absolute, delta and chunk_relative from
them with configs/demo.yaml, plays both tasks in the simulator, and writes benchmarks/results/action_representations.json.
Recordings and checkpoints stay in --work_dir; another call takes the recordings as they are.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from paligemma_vla.actions import resolve_actions
from paligemma_vla.cli.demo import ACTION_REPEAT
from paligemma_vla.cli.train import train
from paligemma_vla.config import VLAConfig, load_config
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.evaluation.collect import CollectConfig, collect
from paligemma_vla.evaluation.compare import wilson_interval
from paligemma_vla.evaluation.rollout import RolloutConfig, RolloutPool
from paligemma_vla.model.tiny import write_tiny_paligemma
from paligemma_vla.training.checkpoint import LAST

TASKS = ("drawer-open", "drawer-close")
REPRESENTATIONS = ("absolute", "delta", "chunk_relative")
ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "action_representations.json"


def settings(args: argparse.Namespace, representation: str) -> VLAConfig:
    """The demonstration's configuration with another representation and a smaller budget."""
    overrides = {
        "data.train_parquet_files": str(args.work_dir / "episodes"),
        "data.normalization_stats_path": str(args.work_dir / f"stats_{representation}.json"),
        "data.actions.representation": representation,
        "model.vlm_config.model_name_or_path": str(args.work_dir / "tiny-paligemma"),
        "training.max_steps": args.steps,
        "training.validate_every_n_steps": args.steps,
        "training.stages": [{"train": "head", "steps": args.steps // 10}, {"train": "all"}],
        "training.checkpoint_dir": str(args.work_dir / "runs"),
        "training.experiment_name": representation,
        "training.seed": args.seed,
    }
    return load_config(ROOT.parent / "configs" / "demo.yaml", overrides)


def measure(args: argparse.Namespace, representation: str) -> dict[str, Any]:
    """Statistics, training, closed loop; one row of the results."""
    config = settings(args, representation)
    index = EpisodeIndex.build(config.data.train_parquet_files)
    layout = index.layout
    actions = resolve_actions(config, layout.metadata, layout.state_dim, layout.action_dim)
    compute_statistics(index, "benchmark", actions=actions).save(config.data.normalization_stats_path)
    began = time.monotonic()
    train(config, device="cpu")
    seconds = time.monotonic() - began
    with RolloutPool("metaworld", str(config.run_dir / "checkpoints" / LAST), workers=os.cpu_count() or 1) as pool:
        result = pool.run(RolloutConfig(tasks=TASKS, episodes=args.episodes, seed=args.seed))
    successes, episodes = (sum(entry[name] for entry in result["tasks"].values()) for name in ("successes", "episodes"))
    return {
        "representation": representation,
        "actions": actions.describe(layout.metadata),
        "rate": successes / episodes,
        "successes": successes,
        "episodes": episodes,
        "ci95": list(wilson_interval(successes, episodes)),
        "tasks": {
            task: {name: entry[name] for name in ("successes", "episodes", "ci95")} for task, entry in result["tasks"].items()
        },
        "training_seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--representations", nargs="+", choices=REPRESENTATIONS, default=REPRESENTATIONS)
    parser.add_argument("--demonstrations", type=int, default=200, help="per task")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps of each training")
    parser.add_argument("--episodes", type=int, default=20, help="played per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path, default=Path("experiments/action_representations"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_tiny_paligemma(args.work_dir / "tiny-paligemma")
    workers, episodes = os.cpu_count() or 1, args.work_dir / "episodes"
    job = CollectConfig("metaworld", TASKS, args.demonstrations, episodes, args.seed, workers)
    collect(replace(job, control="absolute", action_repeat=ACTION_REPEAT))
    rows = [measure(args, representation) for representation in args.representations]
    for row in rows:
        low, high = row["ci95"]
        print(
            f"{row['representation']:<16} {row['successes']:>3}/{row['episodes']:<3} {row['rate']:.2f}  [{low:.2f}, {high:.2f}]"
        )
    budget = ("demonstrations", "steps", "episodes", "seed")
    command = " ".join(["python -m benchmarks.action_representations", *(f"--{n} {getattr(args, n)}" for n in budget)])
    result = {**environment(command), "tasks": TASKS, "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
