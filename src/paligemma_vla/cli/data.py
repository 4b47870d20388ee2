"""`paligemma-vla data info PATH`: what is in some episode files."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

import numpy as np

from paligemma_vla import schema
from paligemma_vla.data.episodes import EpisodeIndex
from paligemma_vla.data.files import open_parquet

SLOW_GROUP_ROWS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    info = actions.add_parser("info", help="episodes, steps, cameras, dimensions, instructions")
    info.add_argument("path", nargs="+", help="files, folders or globs")
    info.add_argument("--json", action="store_true", help="print JSON")


def describe(paths: list[str]) -> dict[str, Any]:
    """Facts about episode files from flags, footers and the prompt column; images are not read."""
    index = EpisodeIndex.build(paths, "data info")
    prompts: Counter[str] = Counter()
    image_bytes = 0
    for number, path in enumerate(index.paths):
        with open_parquet(path) as file:
            footer, column = file.metadata, file.read(columns=[schema.PROMPT])[schema.PROMPT]
        rows = index.start[index.file == number]
        prompts.update(str(value) for value in column.take(rows).to_pylist())
        image_bytes += sum(
            footer.row_group(group).column(leaf).total_compressed_size
            for group in range(footer.num_row_groups)
            for leaf in range(footer.num_columns)
            if footer.row_group(group).column(leaf).path_in_schema.startswith("image_")
        )
    group_sizes = np.concatenate([np.diff(index.row_groups(file)) for file in range(len(index.paths))])
    largest = int(group_sizes.max())
    metadata = index.layout.metadata
    return {
        "files": len(index.paths),
        "episodes": len(index),
        "steps": index.steps,
        "episode_length": {
            "min": int(index.length.min()),
            "median": float(np.median(index.length)),
            "max": int(index.length.max()),
        },
        "cameras": index.layout.cameras,
        "camera_names": list(metadata.cameras),
        "state_dim": index.layout.state_dim,
        "state_names": list(metadata.state_names),
        "action_dim": index.layout.action_dim,
        "action_names": list(metadata.action_names),
        "control_hz": metadata.control_hz,
        "image_orientation": metadata.image_orientation,
        "robot": metadata.robot,
        "image_megabytes": round(image_bytes / 1e6, 1),
        "row_groups": len(group_sizes),
        "largest_row_group": largest,
        "instructions": dict(prompts.most_common()),
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {number:g}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return str(value)


def main(args: argparse.Namespace) -> int:
    facts = describe(args.path)
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return 0
    instructions = facts.pop("instructions")
    width = max(map(len, facts))
    for name, value in facts.items():
        sys.stdout.write(f"{name:<{width}}  {_shown(value)}\n")
    if facts["largest_row_group"] > SLOW_GROUP_ROWS:
        sys.stdout.write(
            f"note: row groups of up to {facts['largest_row_group']} rows make reading single frames slow; "
            f"EpisodeWriter writes 32\n"
        )
    sys.stdout.write(f"{len(instructions)} instructions (episodes each):\n")
    for prompt, count in list(instructions.items())[:20]:
        sys.stdout.write(f"  {count:>6}  {prompt}\n")
    if len(instructions) > 20:
        sys.stdout.write(f"  ... and {len(instructions) - 20} more; --json prints all\n")
    return 0
