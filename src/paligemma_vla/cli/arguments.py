"""What commands share: groups of flags, and the numbers that a flag takes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from paligemma_vla.config import VLAConfig, load_config, parse_assignments

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Made = TypeVar("Made", bound="DataclassInstance")


def between(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """Type of a flag: a whole number within limits."""

    def whole_number(text: str) -> int:
        with suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        limit = f" and at most {most}" if most < 2**63 - 1 else ""
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least {least}{limit}")

    return whole_number


positive, natural = between(1), between(0)


def share(text: str) -> float:
    """Type of a flag: a number above 0 and at most 1."""
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0 and at most 1")


def from_flags(kind: type[Made], args: argparse.Namespace, **others: Any) -> Made:
    """A dataclass whose fields are named as flags are. others: what no flag gives."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items()}
    return kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given}, **others)


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """`--config_path` and `--set`; `configured` reads what they say."""
    parser.add_argument("--config_path", required=default is None, default=default, help="YAML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, e.g. data.num_workers=4")


def configured(args: argparse.Namespace, overrides: Mapping[str, object | None]) -> VLAConfig:
    """The configuration file; over it `overrides` by key (None: not given), over these --set."""
    given = {key: value for key, value in overrides.items() if value is not None}
    return load_config(args.config_path, {**given, **parse_assignments(args.set)})


def add_policy_arguments(parser: argparse.ArgumentParser, required: bool, note: str = "") -> None:
    """`--checkpoint_path` and `--weights`: which policy, and the type of its weights."""
    parser.add_argument(
        "--checkpoint_path",
        required=required,
        metavar="P",
        help=f"a .pth.tar of a training run, an exported folder, or org/name on the Hugging Face hub{note}",
    )
    parser.add_argument("--weights", choices=("int8", "int4"), help="quantise the backbone (default: as it was trained)")


def add_simulator_arguments(parser: argparse.ArgumentParser, episodes: str, output: str) -> None:
    """What `collect` and `rollout` ask of a simulator. episodes, output: help of these flags."""
    parser.add_argument("--env", default="metaworld", help="simulator (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="T", help="for example drawer-open drawer-close")
    parser.add_argument("--episodes", type=positive, required=True, metavar="N", help=episodes)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help=output)
    parser.add_argument("--seed", type=natural, default=0, help="of starts and instructions (default: %(default)s)")
    parser.add_argument("--image_size", type=positive, default=64, metavar="PX", help="of the images (default: %(default)s)")
    add_workers(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=natural, default=os.cpu_count() or 1, help="processes (default: one per core)")
