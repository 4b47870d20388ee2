"""What we write as LeRobot data against what LeRobot 0.6 writes: columns, types, keys, numbers; and videos can be joined."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from lerobot_sets import CAMERAS, FPS, LENGTHS, column_types, edit_json, encode, picture, write_set
from paligemma_vla.cli.main import main
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.schema import DatasetMetadata, Episode

STEPS = (7, 1, 4)  # of each episode
CHANNELS = "list<list<list<double>>>"
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
STATISTICS = ("min", "max", "mean", "std", "count", *QUANTILES)
NUMBERS = ("observation.state", "action", "timestamp", "frame_index", "episode_index", "index", "task_index")
# What get_video_info of LeRobot 0.6.1 writes of a video by its own encoder; ours differ in quality and options.
VIDEO = {"video.codec": "h264", "video.pix_fmt": "yuv420p", "video.fps": FPS, "video.channels": 3, "has_audio": False}
VIDEO |= {"video.height": 32, "video.width": 48, "video.g": 2, "video.crf": 20, "video.preset": None, "video.fast_decode": 0}
VIDEO |= {"video.video_backend": "pyav", "video.extra_options": {"x264-params": "mbtree=0:rc-lookahead=0"}}


def convert(source: object, output: Path, *flags: str) -> Path:
    command = ["data", "convert", "--workers", "0", "--to", "lerobot", *flags]
    assert main([*command, "--input", str(source), "--output_dir", str(output)]) == 0
    return output


def write_native(folder: Path, terminal: bool = False) -> Path:
    """Three episodes of two cameras, two instructions."""
    metadata = DatasetMetadata(cameras=CAMERAS, control_hz=FPS, state_names=("x", "y", "z"))
    with EpisodeWriter(folder, metadata) as writer:
        for number, length in enumerate(STEPS):
            images: Any = [[encode(picture(camera, number, step)) for step in range(length)] for camera in range(2)]
            values = np.random.default_rng(number).normal(size=(length, 5)).astype(np.float32)
            prompt = ("open it", "shut it")[number % 2]
            writer.write(Episode(images, values[:, :3], values[:, 3:], prompt, is_terminal=terminal and number == 1))
    return folder


@pytest.fixture(scope="module", params=["video", "parquet"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    return convert(write_native(folder / "data"), folder / "set", "--images", request.param)


def episode_columns(cameras: list[str], video: bool) -> dict[str, str]:
    """Of meta/episodes, as LeRobot has them."""
    names = ["data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"]
    expected = {"episode_index": "int64", "tasks": "list<string>", "length": "int64", **dict.fromkeys(names, "int64")}
    for key in cameras if video else ():
        expected |= dict.fromkeys((f"videos/{key}/chunk_index", f"videos/{key}/file_index"), "int64")
        expected |= dict.fromkeys((f"videos/{key}/from_timestamp", f"videos/{key}/to_timestamp"), "double")
    for key in (*cameras, *NUMBERS):
        kinds = dict.fromkeys(STATISTICS, CHANNELS if key in cameras else "list<double>") | {"count": "list<int64>"}
        expected |= {f"stats/{key}/{name}": kind for name, kind in kinds.items()}
    return expected | dict.fromkeys(("meta/episodes/chunk_index", "meta/episodes/file_index"), "int64")


def test_metadata_has_the_columns_types_and_keys_of_lerobot(written: Path) -> None:
    cameras, video = [f"observation.images.{name}" for name in CAMERAS], bool(list(written.rglob("*.mp4")))
    found = column_types(written / "meta/episodes/chunk-000/file-000.parquet")
    assert list(found.items()) == list(episode_columns(cameras, video).items())
    assert column_types(written / "meta/tasks.parquet") == {"task_index": "int64", "task": "string"}
    pandas = json.loads(pq.read_schema(written / "meta/tasks.parquet").metadata[b"pandas"])
    assert pandas["index_columns"] == ["task"]
    info = json.loads((written / "meta/info.json").read_text())
    keys = ("codebase_version", "fps", "features", "total_episodes", "total_frames", "total_tasks", "chunks_size")
    sizes = ("data_files_size_in_mb", "video_files_size_in_mb", "data_path", "video_path", "robot_type", "splits")
    assert set(info) == {*keys, *sizes, "paligemma_vla"}
    assert list(info["features"]) == [*cameras, *NUMBERS]
    for key in cameras:
        shape = {"shape": [32, 48, 3], "names": ["height", "width", "channels"]}
        told = {"dtype": "video", "info": {**VIDEO, "is_depth_map": False}} if video else {"dtype": "image"}
        assert info["features"][key] == {**told, **shape}
    state = {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]}
    assert (info["features"]["observation.state"], info["features"]["index"]["names"]) == (state, None)


def naive(values: np.ndarray) -> dict[str, list[float]]:
    """Statistics of (L, D), one dimension after the other."""
    ordered = np.sort(values.astype(np.float64), axis=0)
    stats = {name: ordered[max(math.ceil(share * len(ordered)) - 1, 0)] for name, share in QUANTILES.items()}
    return {**stats, "min": ordered[0], "max": ordered[-1], "mean": ordered.mean(0), "std": ordered.std(0)}  # type: ignore[dict-item]


def test_statistics_are_those_of_a_naive_pass(tmp_path: Path) -> None:
    folder = convert(write_native(tmp_path / "data"), tmp_path / "set", "--images", "parquet")
    rows = pq.read_table(folder / "meta/episodes").to_pylist()
    table = pq.read_table(folder / "data")
    merged = json.loads((folder / "meta/stats.json").read_text())
    episodes = np.array(table["episode_index"])
    for key in ("action", "index", "observation.images.front"):
        for number, row in enumerate(rows):
            if "images" in key:
                values = np.stack([picture(0, number, step) for step in range(STEPS[number])]).reshape(-1, 3) / 255
            else:
                values = np.array(table[key].to_pylist())[episodes == number].reshape(STEPS[number], -1)
            for name, expected in naive(values).items():
                assert np.allclose(np.ravel(row[f"stats/{key}/{name}"]), expected, atol=1e-9), (key, number, name)
            assert row[f"stats/{key}/count"] == [STEPS[number]]
        for name in QUANTILES:  # LeRobot averages the quantiles of episodes
            average = sum(np.array(row[f"stats/{key}/{name}"]) * steps for row, steps in zip(rows, STEPS, strict=True))
            assert np.allclose(merged[key][name], average / sum(STEPS))


@pytest.mark.parametrize(("terminal", "told"), [(False, False), (True, True)])
def test_success_is_written_where_an_episode_had_one(terminal: bool, told: bool, tmp_path: Path) -> None:
    folder = convert(write_native(tmp_path / "data", terminal), tmp_path / "set", "--images", "parquet")
    assert ("next.success" in json.loads((folder / "meta/info.json").read_text())["features"]) == told
    assert ("stats/next.success/q50" in column_types(folder / "meta/episodes/chunk-000/file-000.parquet")) == told
    again = convert(f"lerobot:{folder}", tmp_path / "again", "--images", "parquet")
    names = column_types(again / "data/chunk-000/file-000.parquet")
    assert names.get("next.success") == ("bool" if told else None)


def test_success_that_the_source_tells_is_kept_where_no_episode_has_it(tmp_path: Path) -> None:
    truth = write_set(tmp_path / "toy", "v2.1", video=False)
    folder = convert(f"{truth.name}?episodes=1:3", tmp_path / "set", "--images", "parquet")
    assert truth.success[1:3] == [False, False]
    assert pq.read_table(folder / "data")["next.success"].to_pylist() == [False] * sum(LENGTHS[1:3])


def join(paths: list[Path], output: Path) -> list[np.ndarray]:
    """Join videos as LeRobot does, without encoding them; returns the frames."""
    listed = output.with_suffix(".ffconcat")
    listed.write_text("ffconcat version 1.0\n" + "".join(f"file '{path}'\n" for path in paths))
    with av.open(str(listed), format="concat", options={"safe": "0"}) as source, av.open(str(output), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        stream.time_base = source.streams.video[0].time_base
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return decoded(output)


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert [round(time * FPS, 3) for time, _ in frames if time is not None] == list(range(len(frames)))
    return [pixels for _, pixels in frames]


@pytest.mark.parametrize(("codec", "encoder", "options"), [("h264", "libx264", {}), ("av1", "libsvtav1", {"preset": "12"})])
def test_video_can_be_joined_with_one_that_lerobot_encoded(codec: str, encoder: str, options: Any, tmp_path: Path) -> None:
    folder = convert(write_native(tmp_path / "data"), tmp_path / "set", "--codec", codec)
    ours, theirs = folder / "videos/observation.images.front/chunk-000/file-000.mp4", tmp_path / "theirs.mp4"
    with av.open(str(theirs), "w") as container:
        stream = container.add_stream(encoder, FPS, options={"g": "2", "crf": "30", **options})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for step in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(1, 5, step), format="rgb24")))
        container.mux(stream.encode())
    for number, order in enumerate([(ours, theirs), (theirs, ours), (ours, ours)]):
        expected = [pixels for path in order for pixels in decoded(path)]
        joined = join(list(order), tmp_path / f"{number}.mp4")
        assert len(joined) == len(expected)
        assert all(map(np.array_equal, joined, expected))


def test_copied_video_is_described_with_the_keys_of_today(tmp_path: Path) -> None:
    truth = write_set(tmp_path / "toy", "v2.1")
    told = {"video.codec": "h264", "video.is_depth_map": False, "video.crf": 12, "has_audio": False}
    edit_json(truth.root / "meta/info.json", lambda info: info["features"]["observation.images.front"].update(info=told))
    folder = convert(truth.name, tmp_path / "set")
    copies = [path.read_bytes() for path in sorted(truth.root.rglob("observation.images.front/*.mp4"))]
    assert [path.read_bytes() for path in sorted((folder / "videos/observation.images.front").rglob("*.mp4"))] == copies
    found = json.loads((folder / "meta/info.json").read_text())["features"]["observation.images.front"]["info"]
    measured = {key: VIDEO[key] for key in ("video.pix_fmt", "video.fps", "video.channels", "video.height", "video.width")}
    assert found == {"video.codec": "h264", "video.crf": 12, "has_audio": False, "is_depth_map": False, **measured}
