"""`paligemma-vla collect`: demonstrations by a simulator's scripted expert."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from paligemma_vla.cli.arguments import natural, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    from paligemma_vla.evaluation.envs import Control

    parser.add_argument("--env", default="metaworld", help="simulator (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="T", help="for example drawer-open drawer-close")
    parser.add_argument("--episodes", type=positive, required=True, metavar="N", help="kept per task")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="a killed call goes on in the same folder")
    parser.add_argument(
        "--control", choices=get_args(Control), default="delta", help="what is recorded as action (default: %(default)s)"
    )
    parser.add_argument("--seed", type=natural, default=0, help="default: %(default)s")
    parser.add_argument("--workers", type=natural, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--image_size", type=positive, default=64, metavar="PX", help="default: %(default)s")


def main(args: argparse.Namespace) -> int:
    """Collect, and say what was collected; returns the exit status."""
    from paligemma_vla.evaluation.collect import CollectConfig, collect

    config = CollectConfig(
        env=args.env,
        tasks=tuple(args.tasks),
        episodes=args.episodes,
        output_dir=args.output_dir,
        seed=args.seed,
        workers=args.workers,
        image_size=args.image_size,
        control=args.control,
    )
    summary = collect(config)
    lines = [f"{summary.episodes} episodes, {summary.frames} frames in {summary.seconds:.0f} s -> {args.output_dir}"]
    lines += [f"  {task:28s} expert succeeded in {rate:.0%} of its attempts" for task, rate in summary.expert_success.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
