"""Loading from LeRobot data directly, and from its conversions: samples a second of one process, two cameras of 480 x 640.

`python -m benchmarks.lerobot` prints a table and writes benchmarks/results/lerobot.json. Where LEROBOT_PYTHON names the Python
of an environment with lerobot 0.6.1 (its torch is older than ours), LeRobot loads the same sets in the same rounds.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import Row, best_seconds, demo_config
from benchmarks.run import report
from paligemma_vla.cli.main import main as command
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.images import encode_image
from paligemma_vla.data.loader import VLADataset, load_batches
from paligemma_vla.data.order import RunSampler, SampleOrder
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.model.tiny import TinySpec
from paligemma_vla.schema import DatasetMetadata, Episode

RESULTS = Path(__file__).parent / "results" / "lerobot.json"
PEER = Path(__file__).with_name("lerobot_peer.py")
EPISODES, LENGTH, HEIGHT, WIDTH = 8, 50, 480, 640
BATCH, STEPS, ROUNDS = 32, 6, 5
SIZE, HORIZON = 224, 8
FORMS = {"video": "LeRobot v3.0, H.264", "stored": "LeRobot v3.0, JPEG in Parquet"}  # by folder


def write_moving(folder: Path) -> None:
    """Episodes in which a window wanders over a large smooth picture with some grain, as a camera on an arm sees it."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((1300, 1300), Image.Resampling.BICUBIC)
    scene = np.clip(np.asarray(small, np.int16) + rng.integers(-6, 7, (1300, 1300, 1)), 0, 255).astype(np.uint8)
    with EpisodeWriter(folder, DatasetMetadata(cameras=("front", "wrist"), control_hz=10)) as writer:
        for _ in range(EPISODES):
            begin, speed = rng.integers(0, 600, (2, 2)), rng.integers(-2, 6, (2, 2))
            corners = (begin[:, None] + speed[:, None] * np.arange(LENGTH)[None, :, None]).clip(
                0, (1300 - HEIGHT, 1300 - WIDTH)
            )
            images = [[_window(scene, *corner) for corner in camera] for camera in corners]
            numbers = rng.standard_normal((LENGTH, 14)).astype(np.float32)
            writer.write(Episode([list(camera) for camera in images], numbers, numbers, "open the drawer"))


def _window(scene: np.ndarray, top: int, left: int) -> bytes:
    return encode_image(scene[top : top + HEIGHT, left : left + WIDTH], "jpeg", 95)


def convert(*arguments: object) -> None:
    if command(["data", "convert", *map(str, arguments)]):
        raise SystemExit("the conversion failed")


def load(dataset: VLADataset, config: VLAConfig) -> None:
    """Read the first batches of a shuffled run."""
    sampler = RunSampler(SampleOrder([len(dataset)], None, BATCH, seed=0), 0, STEPS, 0, 1, 1)
    for _ in load_batches(dataset, sampler, config, pin_memory=False):
        pass


class LeRobot:
    """LeRobot in a process of its own; without augmentation and tokens, which ours has."""

    def __init__(self, python: str, cache: Path, workers: int) -> None:
        numbers = map(str, (workers, SIZE, HORIZON, BATCH, STEPS))
        self.process = subprocess.Popen(
            [python, "-P", str(PEER), *numbers],
            env={**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def load(self, root: Path) -> float:
        """Seconds that the first batches of a shuffled pass take, measured there."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{root}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"LEROBOT_PYTHON: the process ended with {self.process.wait()}")
        return float(answer)

    def close(self) -> None:
        self.process.communicate()


def measure_beside(python: str, folder: Path, config: VLAConfig, sets: dict[str, VLADataset], rounds: int) -> list[Row]:
    """Our loading and LeRobot's of the same sets, in turns, in this process alone and with two loader processes."""
    rows: list[Row] = []
    # One for each number of loader processes: they would inherit, and share, the open videos of a process that has read itself.
    peers = {workers: LeRobot(python, folder / "cache", workers) for workers in (0, 2)}
    for (kind, dataset), workers in product(sets.items(), peers):
        data = config.data.model_copy(update={"num_workers": workers})
        run = partial(load, dataset, config.model_copy(update={"data": data}))
        run(), peers[workers].load(folder / kind)
        ours, theirs = zip(*((best_seconds(run, 1), peers[workers].load(folder / kind)) for _ in range(rounds)), strict=True)
        title = f"{FORMS[kind]}, {workers} loader processes"
        for name, seconds in ((f"{title}: LeRobot 0.6.1", theirs), (title, ours)):
            speed = BATCH * STEPS / statistics.median(seconds)
            spread = (BATCH * STEPS / max(seconds), BATCH * STEPS / min(seconds))
            row = Row(name, speed, "samples/s", "higher", spread)
            if seconds is ours:
                row = replace(row, ratio=speed / rows[-1].value, against="LeRobot 0.6.1")
            rows.append(row)
    for peer in peers.values():
        peer.close()
    return rows


def measure(rounds: int, only_beside: bool) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_moving(folder / "episodes")
        convert("--to", "lerobot", "--images", "video", "--input", folder / "episodes", "--output_dir", folder / "video")
        convert("--to", "lerobot", "--images", "parquet", "--input", folder / "episodes", "--output_dir", folder / "stored")
        for kind in () if only_beside else ("png", "jpeg"):
            flags = ("--from", "lerobot", "--input", folder / "video", "--image_format", kind)
            convert(*flags, "--output_dir", folder / kind)
            convert(*flags, "--resize", SIZE, "--output_dir", folder / f"{kind}_224")
        spec = TinySpec(image_size=SIZE, patch_size=14, width=32, vision_layers=1, text_layers=1, heads=2)
        config = demo_config(folder, spec, cameras=2, data__batch_size=BATCH, model__action_head_config__horizon=HORIZON)
        direct = {f"{form}, directly": f"lerobot:{folder / kind}" for kind, form in FORMS.items()}
        places = (
            direct
            if only_beside
            else {
                **direct,
                "converted from H.264 to PNG": str(folder / "png"),
                "converted from H.264 to JPEG": str(folder / "jpeg"),
                "converted from H.264 to PNG, --resize 224": str(folder / "png_224"),
                "converted from H.264 to JPEG, --resize 224": str(folder / "jpeg_224"),
            }
        )
        sets = {label: VLADataset(place, str(folder / "backbone"), config, training=True) for label, place in places.items()}
        seconds = dict.fromkeys(places, float("inf"))
        for _ in range(0 if only_beside else rounds):  # in turns, since other work comes and goes on a shared machine
            for label, dataset in sets.items():
                seconds[label] = min(seconds[label], best_seconds(partial(load, dataset, config), 1))
        for label, place in () if only_beside else places.items():
            rows.append(Row(label, BATCH * STEPS / seconds[label], "samples/s per process", "higher"))
            size = sum(path.stat().st_size for path in Path(place.removeprefix("lerobot:")).rglob("*") if path.is_file())
            rows.append(Row(f"{label}: size", size / 1e6, "MB", "lower"))
        if python := os.environ.get("LEROBOT_PYTHON"):
            rows += measure_beside(
                python, folder, config, {kind: sets[f"{form}, directly"] for kind, form in FORMS.items()}, rounds
            )
    return rows


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only_beside", action="store_true", help="only the rows beside LeRobot")
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    # Every loader process imports the main module anew. This one is heavy; those of our commands are light.
    sys.modules["__main__"].__spec__ = None
    del sys.modules["__main__"].__file__
    args = arguments().parse_args()
    report(measure(args.rounds, args.only_beside), " ".join(["python -m benchmarks.lerobot", *sys.argv[1:]]), RESULTS)
