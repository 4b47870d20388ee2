"""The whole job on a simulator, with nothing but the project's own commands: demonstrations, statistics, training,
closed-loop evaluation under six conditions, report.

Every stage goes through the code and files that the 3-billion-parameter model takes; only configs/demo.yaml differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paligemma_vla.cli.arguments import natural, positive

logger = logging.getLogger(__name__)

ENVIRONMENT = "metaworld"
TASKS = ("faucet-open", "faucet-close", "window-open", "window-close", "drawer-open", "drawer-close")

# name in demo_summary.json, label, what it controls for, how it differs from the plain rollout, films per task and outcome
CONDITIONS: tuple[tuple[str, str, str, dict[str, str], int], ...] = (
    ("mean_success", "right instruction", "new starts, instructions worded as in training", {}, 1),
    (
        "wrong_prompt_mean_success",
        "opposite instruction",
        "success of the task it was told to undo: low if the instruction decides",
        {"prompts": "opposite"},
        1,
    ),
    (
        "unseen_prompt_mean_success",
        "unseen paraphrase",
        "verb, object and form never seen together",
        {"prompts": "unseen"},
        0,
    ),
    ("stock_reset_mean_success", "MetaWorld's own resets", "the benchmark's start positions", {"resets": "stock"}, 0),
    ("grey_image_mean_success", "grey image", "the scene hidden: low if the camera is used", {"image": "grey"}, 0),
    ("random_action_mean_success", "random actions", "what chance achieves", {"policy": "random"}, 0),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config_path", default="configs/demo.yaml")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="T")
    parser.add_argument(
        "--demonstrations", type=positive, default=340, help="episodes recorded per task (default: %(default)s)"
    )
    parser.add_argument("--episodes", type=positive, default=20, help="evaluation episodes per task (default: %(default)s)")
    parser.add_argument(
        "--control_episodes", type=positive, default=10, help="the same for the controls (default: %(default)s)"
    )
    parser.add_argument("--data_dir", type=Path, default=Path("experiments/demo_data"), help="kept between calls")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument(
        "--workers", type=natural, default=os.cpu_count() or 1, help="simulator processes (default: one per core)"
    )
    parser.add_argument("--install_seconds", type=float, default=0.0, help="recorded in the summary; `make demo` measures it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the configuration")


def main(args: argparse.Namespace) -> int:
    from paligemma_vla.cli.train import train
    from paligemma_vla.config import load_config, parse_assignments

    paths = {
        "data.train_parquet_files": str(args.data_dir / "episodes"),
        "data.normalization_stats_path": str(args.data_dir / "normalization_stats.json"),
        "model.vlm_config.model_name_or_path": str(args.data_dir / "tiny-paligemma"),
        "training.seed": args.seed,
    }
    config = load_config(args.config_path, {**paths, **parse_assignments(args.set)})
    wall: dict[str, float] = {"install": args.install_seconds}
    with _stage(wall, "demonstrations"):
        _demonstrations(args, config)
    with _stage(wall, "statistics"):
        _statistics(config)
    with _stage(wall, "training"):
        train(config, device="cpu")
    with _stage(wall, "evaluation"):
        conditions = _evaluate(args, config)
    summary = _summarise(conditions, wall)
    path = config.run_dir / "demo_summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    logger.info("\n%s\n%s", _table(conditions), path)
    logger.info("%s: open it in a browser", _report(config, conditions, wall))
    return 0


@contextmanager
def _stage(wall: dict[str, float], name: str) -> Iterator[None]:
    logger.info("\n=== %s", name)
    began = time.monotonic()
    yield
    wall[name] = round(time.monotonic() - began, 1)


def _demonstrations(args: argparse.Namespace, config: Any) -> None:
    from paligemma_vla.evaluation.collect import CollectConfig, collect
    from paligemma_vla.model.tiny import write_tiny_paligemma

    write_tiny_paligemma(config.model.vlm_config.model_name_or_path)
    episodes = Path(config.data.train_parquet_files)
    collect(CollectConfig(ENVIRONMENT, tuple(args.tasks), args.demonstrations, episodes, args.seed, args.workers))


def _statistics(config: Any) -> None:
    from paligemma_vla.action_settings import resolve_actions
    from paligemma_vla.data.index import EpisodeIndex
    from paligemma_vla.data.statistics import compute_statistics

    index = EpisodeIndex.build(config.data.train_parquet_files)
    layout = index.layout
    actions = resolve_actions(config, layout.metadata, layout.state_dim, layout.action_dim)
    statistics = compute_statistics(index, "data.train_parquet_files", actions=actions)
    statistics.save(config.data.normalization_stats_path)
    logger.info("%s: %d rows", config.data.normalization_stats_path, statistics.state.count)


def _evaluate(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Play every condition; results by their name in the summary."""
    from paligemma_vla.evaluation.rollout import RolloutConfig, RolloutPool
    from paligemma_vla.training.checkpoint import LAST

    checkpoint = config.run_dir / "checkpoints" / LAST
    results = {}
    with RolloutPool(ENVIRONMENT, str(checkpoint), workers=args.workers) as pool:
        for name, _, _, changes, films in CONDITIONS:
            count = args.episodes if name == "mean_success" else args.control_episodes
            settings: dict[str, Any] = {**changes, "tasks": tuple(args.tasks), "episodes": count, "seed": args.seed}
            output = config.run_dir / "rollouts" / name.removesuffix("_mean_success")
            results[name] = pool.run(RolloutConfig(**settings, max_videos=films, output_dir=output))
    return results


def _summarise(conditions: dict[str, Any], wall: dict[str, float]) -> dict[str, Any]:
    right = conditions["mean_success"]
    fields = ("successes", "episodes", "rate", "ci95")
    return {
        "tasks": {task: {field: entry[field] for field in fields} for task, entry in right.tasks.items()},
        **{name: result.mean_success for name, result in conditions.items()},
        "wall_s": wall,
    }


def _table(conditions: dict[str, Any]) -> str:
    rows = []
    for name, label, note, _, _ in CONDITIONS:
        tasks = conditions[name].tasks.values()
        successes, episodes = (sum(entry[field] for entry in tasks) for field in ("successes", "episodes"))
        rows.append(f"{label:<24} {successes:>4}/{episodes:<4} {conditions[name].mean_success:>5.2f}  {note}")
    return "\n".join(rows)


def _report(config: Any, conditions: dict[str, Any], wall: dict[str, float]) -> Path:
    from paligemma_vla import versions
    from paligemma_vla.data.index import EpisodeIndex
    from paligemma_vla.evaluation.open_loop import OpenLoopConfig, evaluate
    from paligemma_vla.evaluation.report import Report, write_report
    from paligemma_vla.policy import Policy
    from paligemma_vla.training.checkpoint import LAST

    policy = Policy.from_checkpoint(config.run_dir / "checkpoints" / LAST)
    index = EpisodeIndex.build(config.data.train_parquet_files)
    held_out = index.split(config.data.val_fraction, config.training.seed)[1]
    rollouts = [
        (label, note, config.run_dir / "rollouts" / name.removesuffix("_mean_success"))
        for name, label, note, _, _ in CONDITIONS
    ]
    report = Report(
        title="PaliGemma-VLA: the demonstration",
        subtitle="A tiny PaliGemma with a flow-matching head, trained from scratch on two CPU cores.",
        run_dir=config.run_dir,
        dataset=index,
        evaluation=evaluate(policy, held_out, OpenLoopConfig(max_samples=256)),
        rollouts=rollouts,
        facts={
            "wall_s": wall,
            "parameters": f"{sum(p.numel() for p in policy.model.parameters()) / 1e6:.1f} M",
            "hardware": f"{os.cpu_count()} CPU cores",
            "versions": versions(),
        },
    )
    return write_report(config.run_dir / "report.html", report)
