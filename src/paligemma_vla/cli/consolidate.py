"""`paligemma-vla consolidate`: a checkpoint in shards as the specification's single file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paligemma_vla.errors import ConfigError
from paligemma_vla.storage import is_url


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint_path", required=True, type=Path, metavar="P", help="a checkpoint_*.dcp of a training run")
    parser.add_argument("--output_path", required=True, metavar="P", help="the .pth.tar to write")


def main(args: argparse.Namespace) -> int:
    """Write the file."""
    from paligemma_vla.training.checkpoint import SUFFIX, consolidate, is_in_shards

    if not is_in_shards(args.checkpoint_path):
        raise ConfigError(f"--checkpoint_path {args.checkpoint_path}: no checkpoint in shards, expected a checkpoint_*.dcp")
    if not args.output_path.endswith(SUFFIX) or is_url(args.output_path):
        raise ConfigError(f"--output_path: got {args.output_path}, expected a path on this machine that ends with {SUFFIX}")
    if Path(args.output_path).is_dir() or Path(args.output_path).is_symlink():
        raise ConfigError(f"--output_path: {args.output_path} is a folder or a link; give another name")
    output = Path(args.output_path)
    consolidate(args.checkpoint_path, output)
    sys.stdout.write(f"{output}: {output.stat().st_size / 1e6:,.1f} MB\n")
    return 0
