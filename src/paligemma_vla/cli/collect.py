"""`paligemma-vla collect`: demonstrations by a simulator's scripted expert."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from paligemma_vla.cli.arguments import add_simulator_arguments, from_flags, positive, share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from paligemma_vla.evaluation.envs import Control

    add_simulator_arguments(parser, "recorded per task", "a killed call continues in the same folder")
    parser.add_argument(
        "--control", choices=get_args(Control), default="delta", help="what is recorded as action (default: %(default)s)"
    )
    text = "simulator steps per recorded action (default: %(default)s)"
    parser.add_argument("--action_repeat", type=positive, default=1, metavar="N", help=text)
    text = "range of the noise's standard deviation, of a full stroke (default: %(default)s)"
    parser.add_argument("--noise_scale", nargs=2, type=share, default=(0.1, 0.3), metavar=("LOW", "HIGH"), help=text)
    text = "share of episodes in which the gripper does the opposite for a moment (default: %(default)s)"
    parser.add_argument("--slip_share", type=share, default=0.0, metavar="SHARE", help=text)
    text = "share of an episode's limit in which the expert has to succeed; slower ones are not kept (default: %(default)s)"
    parser.add_argument("--within", type=share, default=1.0, metavar="SHARE", help=text)


def main(args: argparse.Namespace) -> int:
    """Collect, and print what was collected."""
    from paligemma_vla.evaluation.collect import CollectConfig, collect

    summary = collect(from_flags(CollectConfig, args))
    lines = [f"{summary.episodes} episodes, {summary.frames} frames in {summary.seconds:.0f} s -> {args.output_dir}"]
    lines += [f"  {task:28s} expert succeeded in {rate:.0%} of its attempts" for task, rate in summary.expert_success.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
