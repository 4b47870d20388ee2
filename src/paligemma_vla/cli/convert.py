"""`paligemma-vla data convert`: episodes from one format to another."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from paligemma_vla.cli.arguments import natural
from paligemma_vla.data.convert import Conversion, LeRobotTarget, NativeTarget, Target, convert
from paligemma_vla.data.formats import find_source, open_file
from paligemma_vla.data.formats.lerobot_meta import Place, find_root, parse_range
from paligemma_vla.data.formats.lerobot_writer import Format
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import Recordings
from paligemma_vla.data.video import CODECS
from paligemma_vla.errors import ConfigError, DataError
from paligemma_vla.schema import DatasetMetadata

NATIVE, LEROBOT = "native", "lerobot"
FORMATS = (NATIVE, LEROBOT)
PREFIX = f"{LEROBOT}:"
BAR: Any = {"unit": " steps", "desc": "convert", "dynamic_ncols": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", choices=FORMATS, help="format of the input (default: as its name says)")
    parser.add_argument("--to", dest="target", choices=FORMATS, default=NATIVE, help="format of the output (default: native)")
    parser.add_argument("--input", required=True, metavar="PATH", help="a LeRobot folder; for native: file, folder or glob")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="a killed call goes on when it is repeated")
    parser.add_argument("--cameras", nargs="+", metavar="NAME", help="which, in the order image_1, image_2 ... (default: all)")
    parser.add_argument("--episodes", metavar="FIRST:STOP", help="only these, counted from 0")
    parser.add_argument("--workers", type=natural, default=os.cpu_count() or 1, help="processes (default: one per core)")
    native = parser.add_argument_group("to native", "Encoded images are copied as they are. Frames of videos are encoded:")
    native.add_argument("--image_format", choices=("png", "jpeg"), default="png", help="png loses nothing (default: png)")
    native.add_argument("--jpeg_quality", type=natural, default=95, metavar="Q", help="1 to 100 (default: %(default)s)")
    lerobot = parser.add_argument_group("to lerobot")
    lerobot.add_argument("--lerobot_version", choices=("v3.0", "v2.1"), default="v3.0", help="default: %(default)s")
    lerobot.add_argument("--images", choices=("video", "parquet"), default="video", help="parquet loses nothing")
    lerobot.add_argument("--codec", choices=sorted(CODECS, reverse=True), default="h264", help="of videos (default: h264)")
    lerobot.add_argument("--crf", type=natural, default=20, help="of videos: quality, smaller is better (default: 20)")
    lerobot.add_argument("--fps", type=float, help="steps per second, when the data does not say (control_hz)")


def main(args: argparse.Namespace) -> int:
    """Convert, and say what was converted, compared and left behind; returns the exit status."""
    args.source = _source_format(args)
    _check_flags(args)
    name = _source_name(args)
    _check_output(args)
    index = EpisodeIndex.build(name, "--input")
    cameras = tuple(range(index.layout.cameras))
    if args.source == NATIVE:
        index, cameras = _native_episodes(index, args.episodes), _native_cameras(index, args.cameras)
    target = _target(args, index, cameras)
    conversion = Conversion(index, cameras, target, args.output_dir)
    sys.stdout.write(_left_behind(index, cameras))
    sys.stdout.flush()
    found = convert(conversion, args.workers, lambda total: tqdm(total=total, **BAR))
    if found is None:
        sys.stdout.write(f"{args.output_dir}: is there already, converted and verified; nothing was done\n")
    else:
        sys.stdout.write(f"verified: {found}\n{target.place(args.output_dir)}\n")
    return 0


def _source_format(args: argparse.Namespace) -> str:
    """Format of the input: what --from says, else the prefix of its name. Raises `ConfigError` when they contradict."""
    named = LEROBOT if find_source(args.input)[1] is not None else NATIVE
    if args.source == NATIVE != named:
        raise ConfigError(f"--from: got {args.source}, expected {named} as --input says ({args.input}); leave it out")
    return args.source or named


def _check_flags(args: argparse.Namespace) -> None:
    if (args.source, args.target) == (NATIVE, NATIVE):
        raise ConfigError(f"data convert: got native to native, expected another format: --from {LEROBOT}, or --to {LEROBOT}")
    if not 1 <= args.jpeg_quality <= 100:
        raise ConfigError(f"--jpeg_quality: got {args.jpeg_quality}, expected 1 to 100")
    if not args.crf <= 51:
        raise ConfigError(f"--crf: got {args.crf}, expected 0 to 51")
    if args.fps is not None and not 0 < args.fps < 1000:
        raise ConfigError(f"--fps: got {args.fps}, expected more than 0 and less than 1000")


def _check_output(args: argparse.Namespace) -> None:
    """Refuse an output within the data itself: it would be a part of it from then on. Raises `DataError`."""
    if args.source == LEROBOT:
        folders = [find_root(Place.parse(args.input.removeprefix(PREFIX), "--input").path)]
    else:
        found = [args.input] if os.path.exists(args.input) else glob.glob(args.input, recursive=True)
        folders = [path for path in found if os.path.isdir(path)]
    output = Path(os.path.realpath(args.output_dir))
    for folder in folders:
        if output.is_relative_to(os.path.realpath(folder)):
            raise DataError(f"--output_dir: {args.output_dir}: got a folder within the input, {folder}; give one outside of it")


def _source_name(args: argparse.Namespace) -> str:
    """What the input is called in a configuration."""
    if args.source == NATIVE:
        return str(args.input)
    place = Place.parse(args.input.removeprefix(PREFIX), "--input")
    selection = place.selection
    if args.cameras:
        selection = replace(selection, cameras=tuple(args.cameras))
    if args.episodes:
        selection = replace(selection, episodes=parse_range(args.episodes, "--episodes"))
    return f"{PREFIX}{replace(place, selection=selection)}"


def _native_episodes(index: EpisodeIndex, text: str | None) -> EpisodeIndex:
    if text is None:
        return index
    first, stop = parse_range(text, "--episodes")
    first, stop = first or 0, len(index) if stop is None else stop
    if not first < stop <= len(index):
        raise ConfigError(f"--episodes: got {first}:{stop}, expected a range within 0:{len(index)}")
    return index.select(np.arange(first, stop))


def _native_cameras(index: EpisodeIndex, names: list[str] | None) -> tuple[int, ...]:
    if names is None:
        return tuple(range(index.layout.cameras))
    known = {camera: number for number, camera in enumerate(_camera_names(index, range(index.layout.cameras)))}
    for name in names:
        if name not in known:
            raise ConfigError(f"--cameras: got '{name}', expected of {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def _camera_names(index: EpisodeIndex, cameras: Any) -> tuple[str, ...]:
    """Names of some cameras; `image_N` where the data says none."""
    names = index.layout.metadata.cameras
    return tuple(names[number] if number < len(names) else f"image_{number + 1}" for number in cameras)


def _metadata(index: EpisodeIndex, cameras: tuple[int, ...]) -> DatasetMetadata:
    metadata = index.layout.metadata
    names = _camera_names(index, cameras) if metadata.cameras else ()
    return replace(metadata, cameras=names)


def _target(args: argparse.Namespace, index: EpisodeIndex, cameras: tuple[int, ...]) -> Target:
    metadata = _metadata(index, cameras)
    if args.target == NATIVE:
        return NativeTarget(metadata, args.image_format, args.jpeg_quality)
    fps = args.fps or metadata.control_hz
    if not fps:
        raise ConfigError("--fps: got none, and the data does not say it (control_hz 0); expected steps per second: give --fps")
    if metadata.control_hz and fps != metadata.control_hz:
        raise ConfigError(f"--fps: got {fps:g}, expected {metadata.control_hz:g} as the data says (control_hz); leave it out")
    layout = replace(index.layout, cameras=len(cameras), metadata=metadata)
    form = Format(args.lerobot_version, args.images == "video", args.codec, args.crf, fps, layout)
    return LeRobotTarget(form, tuple(Recordings(index, cameras).instructions()))


def _left_behind(index: EpisodeIndex, cameras: tuple[int, ...]) -> str:
    """What the source has and the result will not, in one line."""
    with open_file(index.paths[int(index.file[0])]) as file:
        unused = list(file.unused)
    unused += [name for number, name in enumerate(_camera_names(index, range(index.layout.cameras))) if number not in cameras]
    return f"left behind: {', '.join(unused)}\n" if unused else ""
