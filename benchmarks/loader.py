"""Loading: samples a second of one process, two cameras, augmentation and tokens included; the first batch; indexing.

The naive loop is the specification's: it reads the whole Parquet file for each sample (as pandas does), and decodes a window of
8 steps. The limit is decoding alone: the pictures of as many samples, from memory, by the same decoder. Seconds are those
of the processor, with the files in memory.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.common import Row, Times, best_seconds, demo_config, interleaved, write_episodes
from paligemma_vla import schema
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.formats import pages
from paligemma_vla.data.images import decode, encode_image
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.loader import VLADataset, load_batches, start_forkserver
from paligemma_vla.data.order import RunSampler
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.model.tiny import TinySpec
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.schema import DatasetMetadata, Episode
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.preflight import prepare

SPEC = TinySpec(image_size=224, patch_size=14, width=32, vision_layers=1, text_layers=1, heads=2)
ALONE = Distributed(0, 1, torch.device("cpu"))
CAMERAS, BATCH, STEPS, WINDOW = 2, 32, 8, 8
SAMPLES, NAIVE_SAMPLES, REPEATS = BATCH * STEPS, 4, 3
LONG_EPISODES, LONG_STEPS, LONG_SIZE, GRAIN = 4, 390, (360, 480), 3
READY_SECONDS, FIRST_REPEATS = 6.0, 3


def measure() -> list[Row]:
    torch.set_num_threads(1)  # as in a loader process
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_episodes(folder / "episodes", episodes=60, length=100, side=224, cameras=CAMERAS, state_dim=14, action_dim=14)
        index = EpisodeIndex.build(str(folder / "episodes"))
        build = partial(EpisodeIndex.build, str(folder / "episodes"))
        count = partial(compute_statistics, str(folder / "episodes"), "benchmark")
        return [
            *measure_reading(folder),
            *measure_long_episodes(folder / "long"),
            *measure_first_batch(folder),
            Row("index", index.steps / best_seconds(build), "rows/s", "higher"),
            Row("statistics, 14 + 14 dimensions", index.steps / best_seconds(count), "rows/s", "higher"),
        ]


def measure_reading(folder: Path) -> list[Row]:
    """Small JPEGs in row groups of 32, in both orders."""
    runs: dict[str, Callable[[], object]] = {}
    for reading in ("random", "streamed"):
        config = demo_config(folder, SPEC, CAMERAS, data__batch_size=BATCH, data__reading=reading)
        _, data, _ = prepare(config, ALONE)
        runs[reading] = partial(load, data.train, RunSampler(data.order, 0, STEPS, 0, 1, 1), config)
    (path,) = data.train.index.paths
    rows = np.random.default_rng(0).integers(len(data.train) - WINDOW, size=SAMPLES)
    pictures = [encoded for row in rows.tolist() for encoded in pictures_of(data.train, row)]
    runs["decoding"] = partial(decode_all, pictures, data.train.preprocessor.image.decoded_side())
    runs["naive"] = lambda: [read_naively(path, row) for row in rows[:NAIVE_SAMPLES].tolist()]
    taken = interleaved(runs, REPEATS, time.process_time)
    naive = NAIVE_SAMPLES / taken["naive"].median
    title = "loader, 2 cameras at 224 px"
    return [
        Row(f"{title}: naive loop", naive, "samples/s per process", "higher"),
        samples_row(title, SAMPLES, taken["random"], naive, "naive loop", taken["decoding"], "JPEG decoding"),
        samples_row(f"{title}, streamed", SAMPLES, taken["streamed"], naive, "naive loop", taken["decoding"], "JPEG decoding"),
    ]


def measure_long_episodes(folder: Path) -> list[Row]:
    """PNGs of 360 x 480 in episodes of 390 steps, each of which is a row group, packed as LeRobot does."""
    write_long_episodes(folder / "episodes")
    steps = 2
    config = demo_config(folder, SPEC, CAMERAS, data__batch_size=BATCH)
    _, data, _ = prepare(config, ALONE)
    _, whole, _ = prepare(config, ALONE)
    refs = list(RunSampler(data.order, 0, steps, 0, 1, 1))
    pictures = [encoded for micro in refs for ref in micro for encoded in pictures_of(data.train, ref.sample)]

    def load_whole() -> None:
        with mock.patch.object(pages, "SMALLEST_CHUNK", 2**40):
            load(whole.train, [refs[0][:NAIVE_SAMPLES]], config)

    one_by_one, decoding = partial(load, data.train, refs, config), partial(decode_all, pictures, 0)
    taken = interleaved({"one by one": one_by_one, "decoding": decoding, "whole": load_whole}, REPEATS, time.process_time)
    before, title = NAIVE_SAMPLES / taken["whole"].median, "loader, episodes of 390 PNGs"
    found = taken["one by one"]
    return [
        Row(f"{title}: row groups as a whole", before, "samples/s per process", "higher"),
        samples_row(title, steps * BATCH, found, before, "row groups as a whole", taken["decoding"], "PNG decoding"),
    ]


def measure_first_batch(folder: Path) -> list[Row]:
    """Of a process that has imported a trainer and has nothing else to do."""
    rows = []
    for workers in (1, 2):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for early in (False, True) * FIRST_REPEATS:
            code = f"from benchmarks.loader import first_batch; print(first_batch({str(folder)!r}, {workers}, {early}))"
            run = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            seconds[early].append(float(run.stdout.split()[-1]))
        late, ready = (Times(tuple(seconds[early])) for early in (False, True))
        title, against = f"first batch, {workers} loader process{'es' * (workers > 1)}", "prepared when it is needed"
        rows.append(Row(f"{title}: {against}", *late.in_ms))
        rows.append(Row(title, *ready.in_ms, ratio=late.median / ready.median, against=against))
    return rows


def first_batch(folder: str, workers: int, early: bool) -> float:
    """Seconds to the first batch. early: as a trainer does, loader processes have been prepared while it loaded its model."""
    config = demo_config(Path(folder), SPEC, CAMERAS, data__batch_size=8, data__num_workers=workers)
    if early:
        start_forkserver()
    preprocessor, data, _ = prepare(config, ALONE)
    VLAModel(config, preprocessor.prompts, preprocessor.image)
    if early:
        time.sleep(READY_SECONDS)  # a model of 3 billion weights takes longer
    began = time.perf_counter()
    batches = load_batches(data.train, RunSampler(data.order, 0, 2, 0, 1, 1), config, pin_memory=False)
    next(batches)
    return time.perf_counter() - began


def samples_row(name: str, samples: int, taken: Times, slow: float, against: str, decoding: Times, limit: str) -> Row:
    """slow: samples a second of what it is compared with. decoding: seconds of as many samples."""
    speed = samples / taken.median
    return Row(
        name,
        speed,
        "samples/s per process",
        "higher",
        (samples / max(taken.seconds), samples / min(taken.seconds)),
        ratio=speed / slow,
        against=against,
        share=decoding.median / taken.median,
        limit=f"{limit}, {samples / decoding.median:.0f} samples/s per core",
    )


def load(dataset: VLADataset, sampler: object, config: VLAConfig) -> None:
    for _ in load_batches(dataset, sampler, config, pin_memory=False):  # type: ignore[arg-type]
        pass


def pictures_of(dataset: VLADataset, sample: int) -> list[bytes]:
    """The encoded pictures of a sample."""
    episode, step = dataset.locate(sample)
    group, number = dataset.reader.group_of(int(dataset.index.file[episode]), int(dataset.index.start[episode]) + step)
    return [picture.encoded() or b"" for picture in group.pictures(number) if picture is not None]


def decode_all(pictures: list[bytes], side: int) -> None:
    for picture in pictures:
        decode(picture, side)


def read_naively(path: str, row: int) -> list[np.ndarray]:
    """The window of steps that begins at a row, as the specification reads it."""
    table = pq.read_table(path).slice(row, WINDOW)
    columns = (table[schema.image_column(camera + 1)] for camera in range(CAMERAS))
    return [np.asarray(Image.open(io.BytesIO(image.as_py())).convert("RGB")) for column in columns for image in column]


def write_long_episodes(folder: Path) -> None:
    """Grained pictures of about 190 kB. That each is another is all that a dictionary of images needs: bytes after the end."""
    height, width = LONG_SIZE
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((2 * width, 2 * height))
    scene = np.asarray(small, np.int16) + rng.integers(-GRAIN, GRAIN + 1, (2 * height, 2 * width, 1))
    scene = scene.clip(0, 255).astype(np.uint8)
    corners = rng.integers(0, height, (16, 2)).tolist()
    pictures = [encode_image(scene[top : top + height, left : left + width], "png") for top, left in corners]
    with EpisodeWriter(folder, DatasetMetadata(robot="benchmark")) as writer:
        for episode in range(LONG_EPISODES):
            numbers = rng.standard_normal((LONG_STEPS, 14)).astype(np.float32)
            images = [
                [pictures[step % len(pictures)] + bytes([episode, camera, *divmod(step, 256)]) for step in range(LONG_STEPS)]
                for camera in range(CAMERAS)
            ]
            writer.write(Episode(images, numbers, numbers, "open the drawer"))
    (path,) = folder.glob("*.parquet")
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=LONG_STEPS, compression="snappy")
