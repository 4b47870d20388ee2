"""`paligemma-vla rollout`: success rates of a checkpoint in a simulator."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from paligemma_vla.cli.arguments import add_policy_arguments, add_simulator_arguments, from_flags, natural, positive
from paligemma_vla.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from paligemma_vla.evaluation.envs import PROTOCOLS
    from paligemma_vla.evaluation.episode import Actor, ImageSource, Prompts, TakeOver
    from paligemma_vla.evaluation.execution import Execution

    add_policy_arguments(parser, required=False, note="; needed unless --policy random")
    add_simulator_arguments(parser, "per task", "for rollout.json and videos/")
    parser.add_argument("--prompts", choices=get_args(Prompts), default="own", help="whose instructions (default: %(default)s)")
    parser.add_argument("--resets", choices=("demo", "stock"), default="demo", help="how episodes start (default: %(default)s)")
    text = "play as published results are made: starts in their order, instead of --resets"
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), help=text)
    parser.add_argument("--num_steps", type=positive, metavar="N", help="Euler steps (default: the checkpoint's)")
    parser.add_argument("--execute", type=positive, metavar="M", help="actions taken of each chunk (default: half the horizon)")
    text = "control steps between an observation and the use of its answer (default: %(default)s)"
    parser.add_argument("--delay", type=natural, default=0, metavar="N", help=text)
    text = "what the robot does meanwhile: hold, or go on with its chunk (docs/realtime.md; default: %(default)s)"
    parser.add_argument("--execution", choices=get_args(Execution), default="blocking", help=text)
    parser.add_argument("--max_steps", type=positive, metavar="N", help="actions per episode (default: the simulator's)")
    parser.add_argument(
        "--image", choices=get_args(ImageSource), default="camera", help="grey is a control: it hides the scene"
    )
    parser.add_argument("--policy", choices=get_args(Actor), default="checkpoint", help="random is a control")
    text = "folder for what was seen and done at every step, as episodes; slower, since every step is rendered"
    parser.add_argument("--record", type=Path, metavar="D", help=text)
    text = "let the simulator's expert go on where the policy has not solved the task; a success is not the policy's then"
    parser.add_argument("--take_over", choices=get_args(TakeOver), help=text)
    text = "actions of the policy before that (default: the episode's limit; the expert then has as many)"
    parser.add_argument("--take_over_after", type=natural, metavar="N", help=text)
    text = "a rollout.json; play only the starts that the policy failed there, with the same --seed"
    parser.add_argument("--failed_in", type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--max_videos", type=natural, default=1, help="successes, and failures, filmed per task (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    """Evaluate, and print a table of success rates."""
    from paligemma_vla.evaluation.envs import PROTOCOLS
    from paligemma_vla.evaluation.rollout import RolloutConfig, RolloutPool

    if args.protocol is not None:
        if args.env not in (known := PROTOCOLS[args.protocol]):
            raise ConfigError(f"--protocol {args.protocol}: got --env {args.env}, expected {' or '.join(known)}")
        args.resets = "protocol"
    options = {"workers": args.workers, "image_size": args.image_size, "weights": args.weights}
    with RolloutPool(args.env, args.checkpoint_path, **options) as pool:
        result = pool.run(from_flags(RolloutConfig, args))
    lines: list[str] = []
    for task, entry in result["tasks"].items():
        low, high = entry["ci95"]
        count = f"{entry['successes']}/{entry['episodes']}"
        helped = f"  with help {entry['solved_with_help']}/{entry['taken_over']}" if args.take_over else ""
        lines.append(f"{task:28s} {count:>9s} {entry['rate']:.2f}  [{low:.2f}, {high:.2f}]{helped}")
    lines.append(f"{'mean':28s} {'':9s} {result['mean_success']:.2f}  -> {args.output_dir / 'rollout.json'}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
