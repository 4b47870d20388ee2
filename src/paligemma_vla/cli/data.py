"""`paligemma-vla data info | check | convert`: what is in episode files, what is wrong with it, and other formats of it.

`data check` exits with 0 when it finds nothing, 1 when it finds faults.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_vla.cli.arguments import add_workers, between
from paligemma_vla.config import DataConfig, VLAConfig, load_config
from paligemma_vla.data.convert import Conversion, Encoding, NativeOutput, OutputFormat
from paligemma_vla.data.convert import convert as run_conversion
from paligemma_vla.data.doctor import CheckOptions, Diagnosis, diagnose
from paligemma_vla.data.faults import Fault, FaultError
from paligemma_vla.data.formats import find_format, identify_file, open_file
from paligemma_vla.data.formats.lerobot_meta import Selection, find_root, parse_range
from paligemma_vla.data.formats.lerobot_writer import LeRobotOutput, camera_keys, plan_videos, tells_success
from paligemma_vla.data.index import EpisodeIndex, Excluded, ExclusionList, expand_paths, load_exclusions, local_bases
from paligemma_vla.data.reader import check_cameras, episode_prompts, instructions
from paligemma_vla.data.video import CODECS
from paligemma_vla.errors import ConfigError, DataError
from paligemma_vla.preprocess import ImageSpec, PromptEncoder, load_prompt_and_image_spec
from paligemma_vla.progress import progress_bar

NATIVE, LEROBOT, HDF5 = "native", "lerobot", "hdf5"
PREFIX = f"{LEROBOT}:"
EXCLUSION_LIST = "excluded_episodes.json"
KEPT_GROUPS = 32  # that data.cache_mb should hold, where it does not hold all
SHOWN_PER_FILE = SHOWN_INSTRUCTIONS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    info = actions.add_parser("info", help="episodes, steps, cameras, dimensions, instructions")
    check = actions.add_parser("check", help="find every fault, and list the episodes to leave out")
    convert = actions.add_parser("convert", help="episodes from one format to another (LeRobot, HDF5)")
    for action in (info, check):
        action.add_argument("path", nargs="+", help="files, folders, globs, URLs, lerobot:FOLDER, hdf5:PATH")
        action.add_argument("--json", action="store_true", help="print JSON, with all there is")
    check.add_argument(
        "--exclusion_list", metavar="FILE", help=f"list to change (default: --config_path's, or {EXCLUSION_LIST})"
    )
    check.add_argument("--config_path", help="also check dimensions, cameras and length of instructions against it")
    check.add_argument("--allow_prompt_changes", action="store_true", help="an instruction may change within an episode")
    text = "format of the input (default: as its name says)"
    convert.add_argument("--from", dest="source", choices=(NATIVE, LEROBOT, HDF5), help=text)
    text = "format of the output (default: native)"
    convert.add_argument("--to", dest="target", default=NATIVE, choices=(NATIVE, LEROBOT), help=text)
    convert.add_argument("--input", required=True, metavar="PATH", help="a LeRobot folder; of others a file, folder or glob")
    convert.add_argument("--output_dir", type=Path, required=True, metavar="D", help="repeat a killed call to continue it")
    convert.add_argument("--cameras", nargs="+", metavar="NAME", help="which, in the order image_1, image_2 ... (default: all)")
    convert.add_argument("--exclusion_list", metavar="FILE", help="episodes to leave out, as `data check` lists them")
    convert.add_argument("--episodes", metavar="FIRST:STOP", help="only these of the others, counted from 0")
    add_workers(convert)
    stored = convert.add_argument_group("images stored one by one", "Encoded ones are copied; frames of videos become PNG.")
    stored.add_argument("--image_format", choices=("png", "jpeg"), help="encode all of them so (png loses nothing)")
    stored.add_argument("--jpeg_quality", type=between(1, 100), default=95, metavar="Q", help="1 to 100 (default: %(default)s)")
    stored.add_argument("--resize", type=between(16, 4096), metavar="PX", help="to PX x PX, as training does (also for videos)")
    stored.add_argument("--image_resize", choices=("stretch", "pad"), default="stretch", help="as data.image_resize (stretch)")
    lerobot = convert.add_argument_group("to lerobot", "Video files of which all episodes are kept are copied.")
    lerobot.add_argument("--lerobot_version", choices=("v3.0", "v2.1"), default="v3.0", help="default: %(default)s")
    lerobot.add_argument(
        "--images", choices=("video", "parquet"), help="default: as the source has them; parquet loses nothing"
    )
    lerobot.add_argument(
        "--codec", choices=sorted(CODECS, reverse=True), help="encode videos of all cameras so (default: as the source)"
    )
    lerobot.add_argument("--crf", type=between(0, 51), help="the same, of this quality; smaller is better (default: 20)")
    lerobot.add_argument("--fps", type=float, help="steps per second, when the data does not say (control_hz)")


def main(args: argparse.Namespace) -> int:
    return {"info": info, "check": check, "convert": convert}[args.action](args)


def _printable(text: str) -> str:
    """Text from files and their names on one line, with control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# ---- data info


def describe(paths: list[str]) -> dict[str, Any]:
    """Facts about episode files from flags, footers and the prompt column; images are not read."""
    index = EpisodeIndex.build(paths, "data info")
    prompts: Counter[str] = Counter()
    for number in range(len(index.paths)):
        prompts.update(text for texts in episode_prompts(index, number) for text in texts)
    group_sizes = np.concatenate([np.diff(index.row_groups(file)) for file in range(len(index.paths))])
    loaded: list[int] = []
    for path in index.paths:
        with open_file(path) as file:
            loaded += file.loaded_bytes(index.layout.cameras).tolist()
            if path == index.paths[0]:
                left_out = tuple(file.unused)
    length, metadata = index.length, index.layout.metadata
    return {
        "files": len(index.paths),
        "episodes": len(index),
        "steps": index.steps,
        "episode_length": {"min": int(length.min()), "median": float(np.median(length)), "max": int(length.max())},
        "cameras": index.layout.cameras,
        "camera_names": metadata.cameras,
        "state_dim": index.layout.state_dim,
        "action_dim": index.layout.action_dim,
        **{name: value for name, value in vars(metadata).items() if name not in ("cameras", "extra")},
        "megabytes": round(int(index.stamps[:, 0].sum()) / 1e6, 1),
        "row_groups": len(group_sizes),
        "largest_row_group": int(group_sizes.max()),
        "loaded_megabytes": {"largest": round(max(loaded) / 1e6, 1), "all": round(sum(loaded) / 1e6, 1)},
        "left_out": left_out,
        "instructions": dict(prompts.most_common()),
    }


def info(args: argparse.Namespace) -> int:
    """Print facts about the files."""
    facts = describe(args.path)
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return 0
    instructions = facts.pop("instructions")
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {_printable(_shown(value))}" for name, value in facts.items()]
    largest, everything = facts["loaded_megabytes"].values()
    kept = DataConfig.model_fields["cache_mb"].default * 2**20 / 1e6
    if everything > kept < KEPT_GROUPS * largest:
        lines.append(
            f"note: one sample loads a row group, here up to {largest:g} MB; data.cache_mb keeps {kept:.0f} MB by default, of "
            f"{everything:g}. So random reading is slow: raise it, or write the images with `paligemma-vla data convert`"
        )
    lines.append(f"{len(instructions)} instructions (episodes each):")
    shown = list(instructions.items())[:SHOWN_INSTRUCTIONS]
    lines += [f"  {count:>6}  {_printable(prompt) or '(none: missing, empty, or not UTF-8)'}" for prompt, count in shown]
    if len(instructions) > SHOWN_INSTRUCTIONS:
        lines.append(f"  ... and {len(instructions) - SHOWN_INSTRUCTIONS} more; --json prints all")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {number:g}" for name, number in value.items())
    if isinstance(value, tuple):
        return ", ".join(value) or "-"
    return str(value) if value != "" else "-"


# ---- data check


def check(args: argparse.Namespace) -> int:
    """Find every fault; bring the exclusion list up to date for the episodes that were checked."""
    files = expand_paths(args.path, "data check")
    options, name = CheckOptions(allow_prompt_changes=args.allow_prompt_changes), args.exclusion_list
    if args.config_path is not None:
        config = load_config(args.config_path)
        options = CheckOptions(_prompts(config), config, args.allow_prompt_changes)
        name = name or config.data.exclude_episodes
    name = name or EXCLUSION_LIST
    _listed(name)  # a list that cannot be read ends the command before the work, not after it
    bar = progress_bar(sum(map(_size, files)), "check", "B", unit_scale=True)
    with warnings.catch_warnings(), bar as progress:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of it is a fault
        diagnosis = diagnose(files, options, progress.update)
    written = _update_list(name, diagnosis)
    if args.json:
        sys.stdout.write(json.dumps(_report(diagnosis, name if written else None), indent=1) + "\n")
    else:
        sys.stdout.write("\n".join([*_fault_lines(diagnosis), *map(_printable, written)]) + "\n")
    return 1 if diagnosis.faults else 0


def _prompts(config: VLAConfig) -> PromptEncoder:
    """The tokenizer of the policy that training begins with, or of the backbone."""
    if (name := config.training.init_from) is None:
        return load_prompt_and_image_spec(config)[0]
    from paligemma_vla.training.init_from import SourcePolicy  # imports torch

    return SourcePolicy(config, name).prompt_and_image_spec()[0]


def _listed(name: str) -> tuple[Excluded, ...]:
    """Entries of the exclusion list; none where there is no list yet."""
    found = load_exclusions(name, "--exclusion_list") if os.path.exists(name) else None
    return found.entries if found else ()


def _update_list(name: str, diagnosis: Diagnosis) -> list[str]:
    """Replace what the exclusion list says of the episodes that were checked. Returns lines that say so, if it changed."""
    earlier, found = [(entry, diagnosis.find_check(entry)) for entry in _listed(name)], diagnosis.excluded
    kept = [entry for entry, check in earlier if check is None]
    if not found and len(kept) == len(earlier):
        return []
    ExclusionList(name, [*kept, *found]).save()
    lines = ["", f"wrote {name}; to leave these out, add to the configuration", "  data:", f"    exclude_episodes: {name}"]
    if not kept and not found:
        lines = ["", f"wrote {name} anew, empty: there is nothing to leave out any more"]
    now = {(entry.file, entry.first_row) for entry in found}
    mended = Counter(check.path for entry, check in earlier if check and (entry.file, entry.first_row) not in now)
    lines += [f"taken off the list: {count} of {file}" for file, count in mended.items()]
    if kept:
        lines.append(f"on the list as before, since it was not checked now: {len(kept)} of other files or episodes")
    return lines


def _size(file: str) -> int:
    """Bytes of a file with all that belongs to it; 0 for a missing one, which is a fault like others."""
    try:
        return identify_file(file)[0]
    except FaultError:
        return 0


def _report(diagnosis: Diagnosis, exclusion_list: str | None) -> dict[str, Any]:
    faults: list[tuple[Fault, int | None]] = [(fault, None) for fault in diagnosis.misfits]
    faults += [(fault, next(iter(file.episodes_of(fault)), None)) for file in diagnosis.files for fault in file.faults]
    return {
        **{"files": len(diagnosis.files), "episodes": diagnosis.episodes, "steps": diagnosis.steps},
        "faults": [_entry(fault, episode) for fault, episode in faults],
        "copies": diagnosis.copies,
        "excluded_episodes": diagnosis.bad_episodes,
        "exclusion_list": exclusion_list,
    }


def _entry(fault: Fault, episode: int | None) -> dict[str, Any]:
    location = {"file": fault.file, "row": fault.row, "column": fault.column, "episode": episode}
    return {**location, "kind": fault.kind.value, "message": str(fault)}


def _fault_lines(diagnosis: Diagnosis) -> list[str]:
    """The first faults of each file, how many there are of each kind, and a summary."""
    lines = []
    for faults in (diagnosis.misfits, *(file.faults for file in diagnosis.files)):
        lines += [_printable(str(fault)) for fault in faults[:SHOWN_PER_FILE]]
        if len(faults) > SHOWN_PER_FILE:
            lines.append(f"{_printable(faults[0].file)}: {len(faults) - SHOWN_PER_FILE} more faults; --json prints all")
    lines += [
        f"{_printable(file)}: has the same content as {_printable(other)}, so its episodes count twice; take one of them out"
        for file, other in diagnosis.copies
    ]
    kinds = Counter(fault.kind.value for fault in diagnosis.faults)
    lines += ["" for _ in range(bool(kinds))] + [f"{count:>8}  {kind}" for kind, count in kinds.most_common()]
    bad_files = sum(bool(file.faults) for file in diagnosis.files)
    episodes = f"{diagnosis.bad_episodes} of {diagnosis.episodes} episodes, in {bad_files} of {len(diagnosis.files)} files"
    return [*lines, f"{episodes}, cannot be used; {diagnosis.steps} steps were checked"]


# ---- data convert


def convert(args: argparse.Namespace) -> int:
    """Convert, compare with the source, and print what was compared and left behind."""
    named = find_format(args.input)[0].removesuffix(":") or NATIVE
    if NATIVE != named != (args.source or named):
        raise ConfigError(f"--from: got {args.source}, expected {named} as --input says ({args.input}); leave it out")
    source = args.source or named
    _check_flags(args, source)
    name = args.input if source == named else f"{source}:{args.input}"
    _check_output(args, name)
    index = EpisodeIndex.build(name, "--input", load_exclusions(args.exclusion_list, "--exclusion_list"))
    names = _camera_names(index)
    cameras = _select_cameras(names, args.cameras)
    index = _select_episodes(index, args.episodes)
    check_cameras(index, cameras)
    with open_file(index.paths[int(index.file[0])]) as file:
        unused = [*file.unused, *(name for number, name in enumerate(names) if number not in cameras)]
    spec = ImageSpec(args.resize, (0.5,) * 3, (0.5,) * 3, resize=args.image_resize, resizer="torch") if args.resize else None
    form = _output_format(args, index, cameras)
    conversion = Conversion(index, cameras, form, args.output_dir, spec)
    if unused:
        sys.stdout.write(f"left behind: {', '.join(unused)}\n")
    if isinstance(form, LeRobotOutput):
        for key, videos in form.videos.items():
            sys.stdout.write(f"{key}: {videos} of {len(videos.files)} video files\n")
    sys.stdout.flush()
    compared = run_conversion(conversion, args.workers)
    if compared is None:
        sys.stdout.write(f"{args.output_dir}: is there already, converted and verified; nothing was done\n")
    else:
        sys.stdout.write(f"verified: {compared}\n{conversion.form.prefix}{args.output_dir}\n")
    return 0


def _check_flags(args: argparse.Namespace, source: str) -> None:
    if (source, args.target) == (NATIVE, NATIVE) and not args.resize and not args.image_format:
        others = f"--from {LEROBOT} or {HDF5}, --to {LEROBOT}, or other images: --resize, --image_format"
        raise ConfigError(f"data convert: got native to native, expected another format: {others}")
    if args.fps is not None and not 0 < args.fps < 1000:
        raise ConfigError(f"--fps: got {args.fps}, expected more than 0 and less than 1000")


def _check_output(args: argparse.Namespace, name: str) -> None:
    """Refuse an output within the input: it would be part of the data from then on."""
    form, _, location = find_format(name)
    found = [base for base, _ in local_bases(location.partition("?")[0] if form == f"{HDF5}:" else location)]
    if form == PREFIX:
        found = [find_root(Selection.parse(location, "--input").path)]
    output = Path(os.path.realpath(args.output_dir))
    for folder in filter(os.path.isdir, found):
        if output.is_relative_to(os.path.realpath(folder)):
            raise DataError(f"--output_dir: {args.output_dir}: got a folder within the input, {folder}; give one outside of it")


def _camera_names(index: EpisodeIndex) -> list[str]:
    """Names of the cameras; `image_N` where the data has none."""
    names, count = index.layout.metadata.cameras, index.layout.cameras
    return [names[number] if number < len(names) else f"image_{number + 1}" for number in range(count)]


def _select_cameras(known: list[str], names: list[str] | None) -> tuple[int, ...]:
    """Numbers of the cameras that are wanted, in their order; of all without `names`."""
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--cameras: got '{name}', expected of {', '.join(known)}")
    return tuple(known.index(name) for name in dict.fromkeys(known if names is None else names))


def _select_episodes(index: EpisodeIndex, text: str | None) -> EpisodeIndex:
    if text is None:
        return index
    first, stop = parse_range(text, "--episodes")
    first, stop = first or 0, len(index) if stop is None else stop
    if not first < stop <= len(index):
        raise ConfigError(f"--episodes: got {first}:{stop}, expected a range within 0:{len(index)}")
    return index.select(np.arange(first, stop))


def _output_format(args: argparse.Namespace, index: EpisodeIndex, cameras: Sequence[int]) -> OutputFormat:
    metadata = index.layout.metadata
    if metadata.cameras:
        names = _camera_names(index)
        metadata = replace(metadata, cameras=tuple(names[number] for number in cameras))
    encoding = Encoding(args.image_format, args.jpeg_quality)
    if args.target == NATIVE:
        return NativeOutput(metadata, encoding)
    fps = args.fps or metadata.control_hz
    if not fps:
        raise ConfigError("--fps: got none, and the data does not say it (control_hz 0); expected steps per second: give --fps")
    if metadata.control_hz and fps != metadata.control_hz:
        raise ConfigError(f"--fps: got {fps:g}, expected {metadata.control_hz:g} as the data says (control_hz); leave it out")
    layout = replace(index.layout, cameras=len(cameras), metadata=metadata)
    encode = args.codec is not None or args.crf is not None
    images = args.images or ("video" if encode else None)
    plans = plan_videos(index, cameras, args.lerobot_version, images, args.codec, not encode and args.resize is None)
    videos = {key: plan for key, plan in zip(camera_keys(layout), plans, strict=True) if plan is not None}
    crf = 20 if args.crf is None else args.crf
    tasks, success = tuple(instructions(index)), tells_success(index)
    return LeRobotOutput(args.lerobot_version, videos, encoding, crf, fps, layout, tasks, success)
