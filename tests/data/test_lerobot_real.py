"""What the real library writes, read by us, and the other way round; skipped where the one or the other is not there."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lerobot_sets import CAMERAS, LENGTHS, column_types, picture, write_set
from paligemma_vla.cli.main import main
from paligemma_vla.data.convert import read_episodes
from paligemma_vla.data.doctor import CheckOptions, diagnose
from paligemma_vla.data.index import EpisodeIndex, expand_paths

SETS = Path(os.environ.get("LEROBOT_SETS", Path(__file__).parents[3] / "shared" / "lerobot_sets"))
# Written by lerobot 0.6.1 (v3.0: images, AV1, H.264, HEVC, merged sets) and 0.3.3 (v2.1): episodes, steps, selection.
WRITTEN = {
    "one_img": (4, 68, ""),
    "three_av1": (6, 133, ""),
    "h264_480": (4, 195, ""),
    "hevc_g30": (3, 128, ""),
    "depth_img": (2, 22, ""),  # the depth camera, in TIFF, is left out
    "lang": (3, 60, ""),
    "merged": (12, 243, ""),
    "v21_img": (3, 55, ""),
    "v21_vid": (4, 85, ""),
}


NEEDS_SETS = pytest.mark.skipif(not SETS.is_dir(), reason=f"no data sets of the real library in {SETS} (LEROBOT_SETS)")


@NEEDS_SETS
@pytest.mark.parametrize("name", WRITTEN)
def test_every_row_and_frame_of_the_real_library_is_read(name: str) -> None:
    episodes, steps, selection = WRITTEN[name]
    diagnosis = diagnose(expand_paths(f"lerobot:{SETS / name}{selection}", "test"), CheckOptions(), lambda size: None)
    assert diagnosis.faults == []
    assert (diagnosis.episodes, diagnosis.steps) == (episodes, steps)


@NEEDS_SETS
@pytest.mark.parametrize(("name", "flags"), [("one_img", ["--images", "parquet"]), ("three_av1", ["--codec", "av1"])])
def test_conversion_of_a_real_set_has_the_same_metadata(name: str, flags: list[str], tmp_path: Path) -> None:
    real, ours = SETS / name, tmp_path / "set"
    command = ["data", "convert", "--to", "lerobot", "--workers", "0", *flags]
    assert main([*command, "--input", f"lerobot:{real}", "--output_dir", str(ours)]) == 0
    for file in ("meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"):
        assert list(column_types(ours / file).items()) == list(column_types(real / file).items())
    infos = [json.loads((folder / "meta/info.json").read_text()) for folder in (ours, real)]
    assert infos[0].pop("paligemma_vla")
    for info in infos:
        del info["data_files_size_in_mb"], info["video_files_size_in_mb"]  # of the user's choice, as are the next three
        for feature in info["features"].values():
            for key in ("crf", "preset", "extra_options") if "info" in feature else ():
                del feature["info"][f"video.{key}"]
    assert infos[0] == infos[1]
    got, expected = statistics(ours), statistics(real)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key].shape, got[key].dtype) == (value.shape, value.dtype)
        feature = key.rpartition("/")[0]
        if name == "one_img" or "images" not in key:  # a frame that is encoded again is another
            bins = (expected[f"{feature}/max"] - expected[f"{feature}/min"]) / 5000  # in which LeRobot counts, in float32
            assert np.allclose(got[key], value, rtol=1e-5, atol=bins.max() + 1e-6), key


def statistics(folder: Path) -> dict[str, np.ndarray]:
    """Of the whole set and of every episode, by feature and name."""
    features = json.loads((folder / "meta/stats.json").read_text())
    found = {f"set/{key}/{name}": np.array(value) for key, stats in features.items() for name, value in stats.items()}
    for row in pq.read_table(folder / "meta/episodes").to_pylist():
        own = {key: np.array(value) for key, value in row.items() if key.startswith("stats/")}
        found |= {f"{row['episode_index']}/{key}": value for key, value in own.items()}
    return found


NEEDS_LEROBOT = pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="the lerobot package is not installed")


@NEEDS_LEROBOT
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
    row = 0
    for recording in read_episodes(EpisodeIndex.build(f"lerobot:{tmp_path / 'out'}"), range(2), range(len(LENGTHS))):
        for step in range(recording.length):
            item = dataset[row]
            assert np.array_equal(item["observation.state"].numpy(), recording.state[step])
            assert np.array_equal(item["action"].numpy(), recording.action[step])
            assert item["task"] == recording.prompts[step]
            for camera, name in enumerate(CAMERAS):
                found = recording.pictures[camera][step]
                assert found is not None
                theirs = (item[f"observation.images.{name}"].permute(1, 2, 0).numpy() * 255).round()
                assert np.abs(theirs - found.decode().astype(float)).max() <= (1 if images == "video" else 0)
            row += 1


@NEEDS_LEROBOT
@pytest.mark.parametrize("flags", [["--images", "parquet"], ["--codec", "av1"]])
def test_real_lerobot_goes_on_from_what_we_write(flags: list[str], tmp_path: Path) -> None:
    """An episode is added, one deleted, and the rest merged with what we wrote."""
    from lerobot.datasets.dataset_tools import delete_episodes, merge_datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    truth = write_set(tmp_path / "toy", video=False)
    ours, root = tmp_path / "ours", tmp_path / "resumed"
    command = ["data", "convert", "--to", "lerobot", "--workers", "0", *flags, "--output_dir", str(ours)]
    assert main([*command, "--input", truth.name]) == 0
    shutil.copytree(ours, root)
    writer = LeRobotDataset.resume("me/toy", root=root)
    state, action = np.arange(9, dtype=np.float32).reshape(3, 3), np.arange(6, dtype=np.float32).reshape(3, 2)
    for step in range(3):
        frame = {f"observation.images.{name}": picture(0, 9, step) for name in CAMERAS}
        frame |= {"observation.state": state[step], "action": action[step], "next.success": np.array([False]), "task": "wait"}
        writer.add_frame(frame)
    writer.save_episode()
    writer.finalize()
    left = delete_episodes(LeRobotDataset("me/toy", root=root), [1], output_dir=tmp_path / "left", repo_id="me/left")
    merge_datasets([left, LeRobotDataset("me/toy", root=ours)], "me/merged", output_dir=tmp_path / "merged")
    index = EpisodeIndex.build(f"lerobot:{tmp_path / 'merged'}")
    expected = [truth.state[0], *truth.state[2:], state, *truth.state]
    for recording, values in zip(read_episodes(index, range(2), range(len(index))), expected, strict=True):
        assert np.array_equal(recording.state, values)
        assert all(one is not None and one.decode().shape == (32, 48, 3) for camera in recording.pictures for one in camera)
