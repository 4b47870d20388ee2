"""`paligemma-vla consolidate`: a checkpoint in shards as the specification's single file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paligemma_vla.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--checkpoint_path", required=True, type=Path, metavar="P", help="a checkpoint_*.dcp of a training run")
    parser.add_argument("--output_path", required=True, type=Path, metavar="P", help="the .pth.tar to write")


def main(args: argparse.Namespace) -> int:
    """Write the file; returns the exit status."""
    from paligemma_vla.training.checkpoint import SUFFIX, consolidate
    from paligemma_vla.training.sharded import is_in_shards

    if not is_in_shards(args.checkpoint_path):
        raise ConfigError(f"--checkpoint_path {args.checkpoint_path}: no checkpoint in shards, expected a checkpoint_*.dcp")
    if not args.output_path.name.endswith(SUFFIX):
        raise ConfigError(f"--output_path: got {args.output_path}, expected a name that ends with {SUFFIX}")
    consolidate(args.checkpoint_path, args.output_path)
    sys.stdout.write(f"{args.output_path}: {args.output_path.stat().st_size / 1e6:,.1f} MB\n")
    return 0
