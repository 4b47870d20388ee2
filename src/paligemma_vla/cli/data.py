"""`paligemma-vla data info PATH`, `data check PATH` and `data convert`: what is in episode files, what is wrong with it.

`data check` exits with 0 when it finds nothing, 1 when it finds faults.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from typing import Any

import numpy as np
from tqdm import tqdm

from paligemma_vla.cli import convert
from paligemma_vla.config import load_config
from paligemma_vla.data.doctor import CheckOptions, Diagnosis, diagnose
from paligemma_vla.data.faults import Fault, FaultError
from paligemma_vla.data.formats import identify_file
from paligemma_vla.data.index import EpisodeIndex, ExclusionList, expand_paths
from paligemma_vla.data.reader import episode_prompts
from paligemma_vla.preprocess import configured_prompt_and_image_spec

SLOW_GROUP_ROWS = 512
SHOWN_PER_FILE = 20
BAR: Any = {"unit": "B", "unit_scale": True, "desc": "check", "dynamic_ncols": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    info = actions.add_parser("info", help="episodes, steps, cameras, dimensions, instructions")
    info.add_argument("path", nargs="+", help="files, folders, globs, URLs, lerobot:FOLDER")
    info.add_argument("--json", action="store_true", help="print JSON")
    check = actions.add_parser("check", help="find every fault, and list the episodes to leave out")
    check.add_argument("path", nargs="+", help="files, folders, globs, URLs, lerobot:FOLDER")
    check.add_argument("--json", action="store_true", help="print JSON, with every fault")
    check.add_argument("--exclusion_list", default="excluded_episodes.json", metavar="FILE", help="where to write the list")
    check.add_argument("--config_path", help="also check dimensions, cameras and length of instructions against it")
    check.add_argument("--allow_prompt_changes", action="store_true", help="an instruction may change within an episode")
    convert.add_arguments(actions.add_parser("convert", help="episodes from one format to another (LeRobot)"))


def describe(paths: list[str]) -> dict[str, Any]:
    """Facts about episode files from flags, footers and the prompt column; images are not read."""
    index = EpisodeIndex.build(paths, "data info")
    prompts: Counter[str] = Counter()
    for number in range(len(index.paths)):
        prompts.update(episode_prompts(index, number))
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
        "state_units": list(metadata.state_units),
        "action_dim": index.layout.action_dim,
        "action_names": list(metadata.action_names),
        "action_units": list(metadata.action_units),
        "action_representation": metadata.action_representation,
        "action_rotation": metadata.action_rotation,
        "control_hz": metadata.control_hz,
        "image_orientation": metadata.image_orientation,
        "robot": metadata.robot,
        "megabytes": round(int(index.stamps[:, 0].sum()) / 1e6, 1),
        "row_groups": len(group_sizes),
        "largest_row_group": largest,
        "instructions": dict(prompts.most_common()),
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {number:g}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return str(value) if value != "" else "-"


def main(args: argparse.Namespace) -> int:
    return {"info": info, "check": check, "convert": convert.main}[args.action](args)


def check(args: argparse.Namespace) -> int:
    """Find every fault; write the exclusion list when there is something to leave out, or one of before is out of date."""
    files = expand_paths(args.path, "data check")
    options = _check_options(args)
    with warnings.catch_warnings(), tqdm(total=sum(map(_bytes_of, files)), **BAR) as bar:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of it is a fault
        diagnosis = diagnose(files, options, bar.update)
    excluded = diagnosis.excluded
    emptied = not diagnosis.faults and os.path.isfile(args.exclusion_list)
    written = args.exclusion_list if excluded or emptied else None
    if written is not None:
        ExclusionList(written, excluded).save()
    if args.json:
        sys.stdout.write(json.dumps(_check_report(diagnosis, written), indent=1) + "\n")
        return 1 if diagnosis.faults else 0
    _print_faults(diagnosis)
    name = _on_one_line(args.exclusion_list)
    if excluded:
        sys.stdout.write(
            f"\nwrote {name}; to leave these out, add to the configuration\n  data:\n    exclude_episodes: {name}\n"
        )
    elif emptied:
        sys.stdout.write(f"\nwrote {name} anew, empty: there is nothing to leave out any more\n")
    return 1 if diagnosis.faults else 0


def _bytes_of(file: str) -> int:
    """Size of a file with all that belongs to it; of one that is not there 0, since that is a fault like others."""
    try:
        return identify_file(file)[0]
    except FaultError:
        return 0


def _on_one_line(text: str) -> str:
    """What comes out of files and their names, with what could move a terminal's cursor, or has no encoding, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _check_options(args: argparse.Namespace) -> CheckOptions:
    if args.config_path is None:
        return CheckOptions(allow_prompt_changes=args.allow_prompt_changes)
    config = load_config(args.config_path)
    prompts, _ = configured_prompt_and_image_spec(config)
    return CheckOptions(prompts, config, args.allow_prompt_changes)


def _check_report(diagnosis: Diagnosis, exclusion_list: str | None) -> dict[str, Any]:
    faults: list[tuple[Fault, int | None]] = [(fault, None) for fault in diagnosis.misfits]
    faults += [(fault, next(iter(file.episodes_of(fault)), None)) for file in diagnosis.files for fault in file.faults]
    return {
        "files": len(diagnosis.files),
        "episodes": diagnosis.episodes,
        "steps": diagnosis.steps,
        "faults": [
            {
                "file": fault.file,
                "row": fault.row,
                "column": fault.column,
                "episode": episode,
                "kind": fault.kind.value,
                "message": str(fault),
            }
            for fault, episode in faults
        ],
        "excluded_episodes": diagnosis.bad_episodes,
        "exclusion_list": exclusion_list,
    }


def _print_faults(diagnosis: Diagnosis) -> None:
    for faults in (diagnosis.misfits, *(file.faults for file in diagnosis.files)):
        for fault in faults[:SHOWN_PER_FILE]:
            sys.stdout.write(f"{_on_one_line(str(fault))}\n")
        if len(faults) > SHOWN_PER_FILE:
            more = f"{len(faults) - SHOWN_PER_FILE} more faults; --json prints all"
            sys.stdout.write(f"{_on_one_line(faults[0].file)}: {more}\n")
    kinds = Counter(fault.kind.value for fault in diagnosis.faults)
    if kinds:
        sys.stdout.write("\n")
    for kind, count in kinds.most_common():
        sys.stdout.write(f"{count:>8}  {kind}\n")
    bad_files = sum(bool(file.faults) for file in diagnosis.files)
    sys.stdout.write(
        f"{diagnosis.bad_episodes} of {diagnosis.episodes} episodes, in {bad_files} of {len(diagnosis.files)} files, "
        f"cannot be used; {diagnosis.steps} steps were checked\n"
    )


def info(args: argparse.Namespace) -> int:
    """Print facts about the files."""
    facts = describe(args.path)
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return 0
    instructions = facts.pop("instructions")
    width = max(map(len, facts))
    for name, value in facts.items():
        sys.stdout.write(f"{name:<{width}}  {_on_one_line(_shown(value))}\n")
    if facts["largest_row_group"] > SLOW_GROUP_ROWS:
        sys.stdout.write(
            f"note: row groups of up to {facts['largest_row_group']} rows make reading single frames slow; "
            f"EpisodeWriter writes 32\n"
        )
    sys.stdout.write(f"{len(instructions)} instructions (episodes each):\n")
    for prompt, count in list(instructions.items())[:20]:
        sys.stdout.write(f"  {count:>6}  {_on_one_line(prompt)}\n")
    if len(instructions) > 20:
        sys.stdout.write(f"  ... and {len(instructions) - 20} more; --json prints all\n")
    return 0
