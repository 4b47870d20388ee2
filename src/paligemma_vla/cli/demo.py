"""`paligemma-vla demo`: demonstrations, statistics, training, closed-loop evaluation under six conditions, report.

Every stage goes through the code and files that the 3-billion-parameter model takes; only configs/demo.yaml differs.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from paligemma_vla.cli.arguments import add_config_arguments, add_workers, configured, natural, positive
from paligemma_vla.cli.pipeline import NamedCondition, keys_of, play_conditions, stage, train_on_cpu, write_page, write_summary

ENVIRONMENT = "metaworld"
ACTION_REPEAT = 4  # 20 Hz instead of the simulator's 80: of four pictures in a row, one says as much and costs a quarter
TASKS = ("faucet-open", "faucet-close", "window-open", "window-close", "drawer-open", "drawer-close")
OPPOSITE = "success of the opposite task: low if the instruction decides"
UNSEEN = "a known verb and object in a carrier phrase that they were not trained in"
CONDITIONS = (
    NamedCondition("mean_success", "right instruction", "new starts, instructions worded as in training", videos=1),
    NamedCondition("wrong_prompt_mean_success", "opposite instruction", OPPOSITE, {"prompts": "opposite"}, videos=1),
    NamedCondition("unseen_prompt_mean_success", "unseen wording", UNSEEN, {"prompts": "unseen"}),
    NamedCondition(
        "stock_reset_mean_success", "MetaWorld's own resets", "the benchmark's start positions", {"resets": "stock"}
    ),
    NamedCondition("grey_image_mean_success", "grey image", "the scene hidden: low if the camera is used", {"image": "grey"}),
    NamedCondition("random_action_mean_success", "random actions", "what chance achieves", {"policy": "random"}),
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

    config = configured(args, keys_of(args.data_dir, args.seed))
    wall: dict[str, float] = {"install": args.install_seconds}
    with stage(wall, "demonstrations"):
        write_tiny_paligemma(config.model.vlm_config.model_name_or_path)
        episodes = args.data_dir / "episodes"
        job = CollectConfig(ENVIRONMENT, tuple(args.tasks), args.demonstrations, episodes, args.seed, args.workers)
        collect(replace(job, action_repeat=ACTION_REPEAT))
    with stage(wall, "statistics"):
        write_statistics(lambda: config, config.data.normalization_stats_path, Distributed(0, 1, choose_device("cpu")))
    with stage(wall, "training"):
        train_on_cpu(config, args.workers)
    with stage(wall, "evaluation"):
        common = {"tasks": tuple(args.tasks), "seed": args.seed, "episodes": args.control_episodes}
        plain, *controls = CONDITIONS
        conditions = (plain._replace(changes={"episodes": args.episodes}), *controls)
        results = play_conditions(config, conditions, ENVIRONMENT, common, workers=args.workers)
    subtitle = f"A tiny PaliGemma with a flow-matching head, trained from scratch on {os.cpu_count()} CPU cores."
    page = write_page(config, CONDITIONS, wall, "PaliGemma-VLA: the demonstration", subtitle)
    write_summary(config.run_dir / "demo_summary.json", CONDITIONS, results, wall, page)
    return 0
