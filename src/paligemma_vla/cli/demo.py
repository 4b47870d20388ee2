"""`paligemma-vla demo`: demonstrations, statistics, training, closed-loop evaluation under six conditions, report.

Every stage goes through the code and files that the 3-billion-parameter model takes; only configs/demo.yaml differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paligemma_vla.cli.arguments import add_config_arguments, add_workers, configured, natural, positive

if TYPE_CHECKING:
    from paligemma_vla.config import VLAConfig

logger = logging.getLogger(__name__)

ENVIRONMENT = "metaworld"
ACTION_REPEAT = 4  # 20 Hz instead of the simulator's 80: of four pictures in a row, one says as much and costs a quarter
MAX_PROCESSES = 8  # of training: with more, each has too few of the 128 samples of a step
TASKS = ("faucet-open", "faucet-close", "window-open", "window-close", "drawer-open", "drawer-close")


class DemoCondition(NamedTuple):
    """One way of playing the policy. key: in demo_summary.json; note: what it controls for; changes: of the plain rollout;
    videos: per task and outcome."""

    key: str
    label: str
    note: str
    changes: Mapping[str, Any] = {}
    videos: int = 0

    def output(self, config: VLAConfig) -> Path:
        return config.run_dir / "rollouts" / self.key.removesuffix("_mean_success")


OPPOSITE = "success of the opposite task: low if the instruction decides"
UNSEEN = "a known verb and object in a carrier phrase that they were not trained in"
CONDITIONS = (
    DemoCondition("mean_success", "right instruction", "new starts, instructions worded as in training", videos=1),
    DemoCondition("wrong_prompt_mean_success", "opposite instruction", OPPOSITE, {"prompts": "opposite"}, videos=1),
    DemoCondition("unseen_prompt_mean_success", "unseen wording", UNSEEN, {"prompts": "unseen"}),
    DemoCondition("stock_reset_mean_success", "MetaWorld's own resets", "the benchmark's start positions", {"resets": "stock"}),
    DemoCondition("grey_image_mean_success", "grey image", "the scene hidden: low if the camera is used", {"image": "grey"}),
    DemoCondition("random_action_mean_success", "random actions", "what chance achieves", {"policy": "random"}),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, "configs/demo.yaml")
    add_workers(parser)
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="T")
    parser.add_argument("--demonstrations", type=positive, default=340, help="recorded per task (default: %(default)s)")
    parser.add_argument("--episodes", type=positive, default=20, help="evaluation episodes per task (default: %(default)s)")
    parser.add_argument("--control_episodes", type=positive, default=10, help="for the controls (default: %(default)s)")
    parser.add_argument("--data_dir", type=Path, default=Path("experiments/demo_data"), help="kept between calls")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--install_seconds", type=float, default=0.0, help="recorded in the summary; `make demo` measures it")


def main(args: argparse.Namespace) -> int:
    from paligemma_vla.cli.stats import write_statistics
    from paligemma_vla.evaluation.collect import CollectConfig, collect
    from paligemma_vla.model.tiny import write_tiny_paligemma
    from paligemma_vla.training.distributed import Distributed, choose_device

    config = configured(
        args,
        {
            "data.train_parquet_files": str(args.data_dir / "episodes"),
            "data.normalization_stats_path": str(args.data_dir / "normalization_stats.json"),
            "model.vlm_config.model_name_or_path": str(args.data_dir / "tiny-paligemma"),
            "training.seed": args.seed,
        },
    )
    wall: dict[str, float] = {"install": args.install_seconds}
    with _stage(wall, "demonstrations"):
        write_tiny_paligemma(config.model.vlm_config.model_name_or_path)
        episodes = args.data_dir / "episodes"
        job = CollectConfig(ENVIRONMENT, tuple(args.tasks), args.demonstrations, episodes, args.seed, args.workers)
        collect(replace(job, action_repeat=ACTION_REPEAT))
    with _stage(wall, "statistics"):
        write_statistics(lambda: config, config.data.normalization_stats_path, Distributed(0, 1, choose_device("cpu")))
    with _stage(wall, "training"):
        _train(config, args.workers)
    with _stage(wall, "evaluation"):
        results = _evaluate(args, config)
    fields = ("successes", "episodes", "rate", "ci95")
    summary = {
        "tasks": {task: {name: entry[name] for name in fields} for task, entry in results["mean_success"]["tasks"].items()},
        **{key: result["mean_success"] for key, result in results.items()},
        "wall_s": wall,
    }
    path = config.run_dir / "demo_summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    logger.info("\n%s\n%s", _table(results), path)
    logger.info("%s: open it in a browser", _report(config, wall))
    return 0


@contextmanager
def _stage(wall: dict[str, float], name: str) -> Iterator[None]:
    logger.info("\n=== %s", name)
    began = time.monotonic()
    yield
    wall[name] = round(time.monotonic() - began, 1)


def _train(config: VLAConfig, workers: int) -> None:
    """In as many processes as there are workers: at this size, processes use cores better than threads do."""
    from paligemma_vla.cli.train import run_rank, train
    from paligemma_vla.training.distributed import launch

    job = partial(train, config, device="cpu")
    processes = min(workers, MAX_PROCESSES)
    if processes > 1:
        launch(run_rank, job, processes)
    else:
        job()


def _evaluate(args: argparse.Namespace, config: VLAConfig) -> dict[str, dict[str, Any]]:
    """Play every condition; results by their name in the summary."""
    from paligemma_vla.evaluation.rollout import RolloutConfig, RolloutPool
    from paligemma_vla.training.checkpoint import LAST

    checkpoint = config.run_dir / "checkpoints" / LAST
    results = {}
    with RolloutPool(ENVIRONMENT, str(checkpoint), workers=args.workers) as pool:
        for condition in CONDITIONS:
            count = args.episodes if condition.key == "mean_success" else args.control_episodes
            rollout = RolloutConfig(
                tasks=tuple(args.tasks),
                episodes=count,
                seed=args.seed,
                max_videos=condition.videos,
                output_dir=condition.output(config),
                **condition.changes,
            )
            results[condition.key] = pool.run(rollout)
    return results


def _table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for condition in CONDITIONS:
        result = results[condition.key]
        successes, episodes = (sum(entry[field] for entry in result["tasks"].values()) for field in ("successes", "episodes"))
        rows.append(f"{condition.label:<24} {successes:>4}/{episodes:<4} {result['mean_success']:>5.2f}  {condition.note}")
    return "\n".join(rows)


def _report(config: VLAConfig, wall: dict[str, float]) -> Path:
    from paligemma_vla import versions
    from paligemma_vla.config import source_paths
    from paligemma_vla.data.index import EpisodeIndex
    from paligemma_vla.evaluation.open_loop import OpenLoopConfig, evaluate
    from paligemma_vla.evaluation.report import Report, write_report
    from paligemma_vla.policy import Policy
    from paligemma_vla.training.checkpoint import LAST

    policy = Policy.from_checkpoint(config.run_dir / "checkpoints" / LAST)
    index = EpisodeIndex.build(source_paths(config.data.train_parquet_files))
    held_out = index.split(config.data.val_fraction, config.training.seed)[1]
    report = Report(
        title="PaliGemma-VLA: the demonstration",
        subtitle=f"A tiny PaliGemma with a flow-matching head, trained from scratch on {os.cpu_count()} CPU cores.",
        run_dir=config.run_dir,
        dataset=index,
        evaluation=evaluate(policy, held_out, OpenLoopConfig(max_samples=256, euler_samples=64)),
        rollouts=[(condition.label, condition.note, condition.output(config)) for condition in CONDITIONS],
        facts={
            "wall_s": wall,
            "parameters": f"{sum(p.numel() for p in policy.model.parameters()) / 1e6:.1f} M",
            "hardware": f"{os.cpu_count()} CPU cores",
            "versions": versions(),
        },
    )
    return write_report(config.run_dir / "report.html", report)
