"""What we write, read by the real `LeRobotDataset`; skipped where lerobot, or a video decoder it can use, is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lerobot_sets import CAMERAS, LENGTHS, write_set
from paligemma_vla.cli.main import main
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import Recordings

pytest.importorskip(
    "lerobot", reason="the lerobot package is not installed (pip install lerobot, in an environment of its own)"
)


@pytest.mark.parametrize("images", ["parquet", "video"])
def test_real_lerobot_reads_what_we_write(images: str, tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import CODEBASE_VERSION, LeRobotDataset

    if images == "video" and importlib.util.find_spec("torchcodec") is None:
        pytest.skip("lerobot reads videos through torchcodec, which is not installed")
    truth = write_set(tmp_path / "toy", CODEBASE_VERSION, video=False)
    command = ["--from", "lerobot", "--to", "lerobot", "--lerobot_version", CODEBASE_VERSION, "--images", images]
    arguments = [*command, "--input", str(truth.root), "--output_dir", str(tmp_path / "out"), "--workers", "0"]
    assert main(["data", "convert", *arguments]) == 0
    dataset = LeRobotDataset("me/toy", root=tmp_path / "out")
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (len(LENGTHS), sum(LENGTHS), 10)
    assert dataset.meta.robot_type == "toy arm"
    ours = Recordings(EpisodeIndex.build(f"lerobot:{tmp_path / 'out'}"), range(2))
    row = 0
    for episode in range(len(LENGTHS)):
        recording = ours.read(episode)
        for step in range(recording.length):
            item = dataset[row]
            assert np.array_equal(item["observation.state"].numpy(), recording.state[step])
            assert np.array_equal(item["action"].numpy(), recording.action[step])
            assert item["task"] == recording.prompts[step]
            for camera, name in enumerate(CAMERAS):
                picture = recording.images[camera][step]
                assert picture is not None
                theirs = (item[f"observation.images.{name}"].permute(1, 2, 0).numpy() * 255).round()
                assert np.abs(theirs - np.asarray(picture.decode(), float)).max() <= (1 if images == "video" else 0)
            row += 1
