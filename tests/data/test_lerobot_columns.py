"""Which columns of a LeRobot data set are cameras, state, action and instruction, and what the selection says of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
import torch

from lerobot_sets import CAMERAS, FPS, HEIGHT, LENGTHS, WIDTH, Truth, add_feature, encode, picture, write_set
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.convert import Recording, read_episodes
from paligemma_vla.data.doctor import CheckOptions, diagnose
from paligemma_vla.data.faults import Kind
from paligemma_vla.data.formats import open_file
from paligemma_vla.data.index import EpisodeIndex, expand_paths
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import DataError, VLAError
from paligemma_vla.schema import DatasetMetadata, Episode
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.preflight import prepare
from support import call

ConfigFactory = Callable[..., VLAConfig]
ONE_CHANNEL = {"dtype": "image", "shape": [HEIGHT, WIDTH, 1], "names": ["height", "width", "channels"]}
DEPTH = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 40


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    return write_set(tmp_path / "toy", "v2.1", video=False)


def read_all(name: str, cameras: int = 2) -> list[Recording]:
    index = EpisodeIndex.build(name)
    return list(read_episodes(index, range(cameras), range(len(index))))


def add_camera(truth: Truth, name: str, image: bytes, **feature: Any) -> None:
    def stored(episode: int) -> pa.Array:
        return pa.array([{"bytes": image, "path": None}] * LENGTHS[episode])

    add_feature(truth, f"observation.images.{name}", ONE_CHANNEL | feature, stored)


def add_grey_video(truth: Truth, pixels: str, **feature: Any) -> None:
    """A camera `deep` with lossless videos of a pixel format of FFmpeg."""
    key = "observation.images.deep"
    add_feature(truth, key, ONE_CHANNEL | {"dtype": "video"} | feature)
    for episode, length in enumerate(LENGTHS):
        path = truth.root / f"videos/chunk-000/{key}/episode_{episode:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", format="matroska") as container:
            stream = container.add_stream("ffv1", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
            for _ in range(length):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(DEPTH, format="gray16le").reformat(format=pixels)))
            container.mux(stream.encode())


TAGS: list[tuple[str, dict[str, Any]]] = [
    ("deep", {"info": {"is_depth_map": True, "depth_unit": "mm"}}),
    ("deep", {"info": {"video.is_depth_map": True}}),
    ("deep", {"video_info": {"video.is_depth_map": True}}),
    ("deep", {"is_depth_map": True}),
    ("deep", {"dtype": "video", "info": {"video.pix_fmt": "gray12le"}}),
    ("deep", {"names": ["height", "width", "depth"]}),
    ("head_depth", {}),
]


@pytest.mark.parametrize(("name", "tag"), TAGS)
def test_depth_map_that_the_metadata_tells_is_no_camera(truth: Truth, name: str, tag: dict[str, Any], caplog: Any) -> None:
    add_camera(truth, name, encode(DEPTH), **tag)
    with caplog.at_level(logging.INFO, "paligemma_vla"):
        indices = [EpisodeIndex.build(truth.name) for _ in range(2)]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{truth.root}: {name} is left out: a depth map is no colour camera"]
    assert indices[0].layout.metadata.cameras == CAMERAS
    with open_file(indices[0].paths[0]) as file:
        assert f"observation.images.{name} (depth map)" in file.unused
    recording = read_all(truth.name)[2]
    assert np.array_equal(np.asarray(recording.pictures[0][4].decode()), picture(0, 2, 4))
    message = rf"cameras: got '{name}': a depth map, no colour image; leave this camera out: \?cameras=front,wrist"
    with pytest.raises(DataError, match=message):
        EpisodeIndex.build(f"{truth.name}?cameras=front,{name}")


def test_set_with_depth_alone_is_refused(truth: Truth) -> None:
    add_camera(truth, "deep", encode(DEPTH), is_depth_map=True)
    info = truth.root / "meta/info.json"
    info.write_text(info.read_text().replace('"dtype": "image", "shape": [32, 48, 3]', '"dtype": "string", "shape": [1]'))
    with pytest.raises(DataError, match="got 1 depth maps, expected a colour camera"):
        EpisodeIndex.build(truth.name)


def test_grey_camera_of_8_bits_is_a_camera(truth: Truth) -> None:
    grey = (DEPTH % 256).astype(np.uint8)
    add_camera(truth, "grey", encode(grey), info={"is_depth_map": False})
    recording = read_all(truth.name, 3)[0]
    assert EpisodeIndex.build(truth.name).layout.metadata.cameras == ("grey", *CAMERAS)
    assert np.array_equal(np.asarray(recording.pictures[0][2].decode()), np.repeat(grey[..., None], 3, axis=2))


def train(config: VLAConfig) -> None:
    prepare(config, Distributed(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "gray12le", "gray16le"])
def test_depth_map_without_a_tag_is_told_before_training_and_costs_no_episode(
    truth: Truth, kind: str, tiny_config: ConfigFactory, tmp_path: Path, capfd: Any
) -> None:
    if kind.startswith("gray"):
        add_grey_video(truth, kind)
    else:
        add_camera(truth, "deep", encode(DEPTH, kind))
    remedy = "a depth map, no colour image; leave this camera out: ?cameras=front,wrist"
    settings = {"data.train_parquet_files": truth.name, "data.allow_other_statistics": True}
    with pytest.raises(VLAError) as refused:
        train(tiny_config(settings, cameras=3))
    assert remedy in str(refused.value)
    diagnosis = diagnose(expand_paths(truth.name, "test"), CheckOptions(), lambda size: None)
    assert [(fault.kind, fault.row, fault.column) for fault in diagnosis.faults] == [(Kind.DEPTH, None, "image_1_bytes")] * 4
    assert all(remedy in str(fault) for fault in diagnosis.faults)
    assert diagnosis.excluded == []
    code, _, err = call(capfd, "data", "convert", "--input", truth.name, "--output_dir", tmp_path / "out", "--workers", "0")
    assert (code, remedy in err) == (2, True)
    train(tiny_config(settings | {"data.train_parquet_files": f"{truth.name}?cameras=front,wrist"}, cameras=2))


def test_depth_map_in_an_episode_file_is_told_for_what_it_is(tmp_path: Path, tiny_config: ConfigFactory) -> None:
    numbers = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    colour, depth = (encode(pixels) for pixels in (picture(0, 0, 0), DEPTH))
    with EpisodeWriter(tmp_path / "data", DatasetMetadata()) as writer:
        writer.write(Episode([[colour] * 20, [None, *[depth] * 19]], numbers[:, :3], numbers[:, 3:], "open"))
        writer.write(Episode([[colour] * 20, [depth] * 20], numbers[:, :3], numbers[:, 3:], "open"))
    diagnosis = diagnose([str(path) for path in (tmp_path / "data").glob("*.parquet")], CheckOptions(), lambda size: None)
    text = "column image_2_bytes: got more than 8 bits per channel: a depth map, no colour image; leave this camera out"
    assert [str(fault).partition(": ")[2] for fault in diagnosis.faults] == [f"{text}: write the files without image_2_bytes"]
    assert diagnosis.excluded == []
    settings = {"data.train_parquet_files": str(tmp_path / "data"), "data.allow_other_statistics": True}
    with pytest.raises(VLAError, match="a depth map, no colour image"):
        train(tiny_config(settings, cameras=2))
    train(tiny_config(settings, cameras=1))
