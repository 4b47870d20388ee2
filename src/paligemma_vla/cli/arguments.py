"""Types of command-line numbers: what a flag cannot mean is refused before any work is done."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number, at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """A whole number, at least 0."""
    return _at_least(0, text)


def add_policy_arguments(parser: argparse.ArgumentParser, required: bool, note: str = "") -> None:
    """`--checkpoint_path` and `--weights`: which policy, and how its weights are kept."""
    parser.add_argument(
        "--checkpoint_path",
        required=required,
        metavar="P",
        help=f"a .pth.tar of a training run, an exported folder, or org/name on the Hugging Face hub{note}",
    )
    parser.add_argument("--weights", choices=("int8", "int4"), help="quantise the backbone (default: as it was trained)")


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**63:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least {least} (and below 2**63)")
    return value
