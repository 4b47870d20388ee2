"""`paligemma-vla export`: a policy as a Hugging Face folder, which `Policy.from_checkpoint` takes as it takes a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma_vla.errors import ConfigError

if TYPE_CHECKING:
    from paligemma_vla.export.card import Measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint_path", required=True, metavar="P", help="a .pth.tar of a training run, or an export")
    parser.add_argument("--output_dir", required=True, type=Path, metavar="D", help="new, empty, or an earlier export")
    parser.add_argument(
        "--format",
        choices=("paligemma_vla", "lerobot"),
        default="paligemma_vla",
        help="of the folder; lerobot: as LeRobot 0.6 loads a pi0 or pi0.5 (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights in the file (default: %(default)s)"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="figures for the model card: metrics.json, rollout.json, demo_summary.json",
    )
    parser.add_argument(
        "--torch_export",
        nargs="?",
        const="sampler",
        choices=("sampler", "model"),
        help="also write sampler.pt2, or model.pt2 with the backbone, for torch.export.load",
    )
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="also put the folder on the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="with --push_to_hub: nobody else sees it")


def main(args: argparse.Namespace) -> int:
    """Export, and print where to."""
    if args.private and args.push_to_hub is None:
        raise ConfigError("--private: means something with --push_to_hub ORG/NAME only")
    from paligemma_vla.export.card import read_measurement
    from paligemma_vla.export.folder import check_replaceable, write_export
    from paligemma_vla.hub import check_can_push, push
    from paligemma_vla.policy import Policy, load_trained

    if args.format == "lerobot":
        return _to_lerobot(args)
    # What can be refused is refused before gigabytes are read.
    check_replaceable(args.output_dir)
    if args.push_to_hub is not None:
        check_can_push(args.push_to_hub)
    measurements = [read_measurement(path) for path in args.metrics]
    _check_measured(args.metrics, measurements, args.checkpoint_path)

    policy = Policy(load_trained(args.checkpoint_path), args.checkpoint_path)
    output = write_export(args.output_dir, policy, args.dtype, args.torch_export, measurements)
    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    sys.stdout.write(f"{output}: {size:,.1f} MB, step {policy.metadata['training']['step']:,}\n")
    if args.push_to_hub is not None:
        sys.stdout.write(f"{push(output, args.push_to_hub, args.private)}\n")
    return 0


def _to_lerobot(args: argparse.Namespace) -> int:
    from paligemma_vla.export.folder import check_replaceable
    from paligemma_vla.export.lerobot import write_lerobot
    from paligemma_vla.policy import Policy, load_trained

    ours = {"--torch_export": args.torch_export, "--metrics": args.metrics, "--push_to_hub": args.push_to_hub}
    if given := [flag for flag, value in ours.items() if value]:
        raise ConfigError(f"{', '.join(given)}: means nothing with --format lerobot; leave it out")
    check_replaceable(args.output_dir)
    output = write_lerobot(args.output_dir, Policy(load_trained(args.checkpoint_path), args.checkpoint_path), args.dtype)
    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    sys.stdout.write(f"{output}: {size:,.1f} MB, for LeRobot\n")
    return 0


def _check_measured(paths: list[Path], measurements: list[Measurement], checkpoint_path: str) -> None:
    """Raise `ConfigError` for figures of another checkpoint: a card must not praise a policy for what another did."""
    from paligemma_vla.policy import fingerprint

    if not any(measurement.checkpoint for measurement in measurements):
        return
    exported = fingerprint(checkpoint_path)
    for path, measurement in zip(paths, measurements, strict=True):
        if measurement.checkpoint not in (None, exported):
            raise ConfigError(
                f"--metrics {path}: measured with another checkpoint (sha256 {str(measurement.checkpoint)[:16]}..., this one "
                f"is {str(exported)[:16]}...); evaluate {checkpoint_path} again"
            )
