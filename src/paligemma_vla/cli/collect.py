"""`paligemma-vla collect`: demonstrations by a simulator's scripted expert."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from paligemma_vla.cli.arguments import add_simulator_arguments, from_flags, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from paligemma_vla.evaluation.envs import Control

    add_simulator_arguments(parser, "recorded per task", "a killed call continues in the same folder")
    parser.add_argument(
        "--control", choices=get_args(Control), default="delta", help="what is recorded as action (default: %(default)s)"
    )
    text = "simulator steps per recorded action (default: %(default)s)"
    parser.add_argument("--action_repeat", type=positive, default=1, metavar="N", help=text)


def main(args: argparse.Namespace) -> int:
    """Collect, and print what was collected."""
    from paligemma_vla.evaluation.collect import CollectConfig, collect

    summary = collect(from_flags(CollectConfig, args))
    lines = [f"{summary.episodes} episodes, {summary.frames} frames in {summary.seconds:.0f} s -> {args.output_dir}"]
    lines += [f"  {task:28s} expert succeeded in {rate:.0%} of its attempts" for task, rate in summary.expert_success.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
