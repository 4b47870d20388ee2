"""`paligemma-vla data convert`: round trips, batches, an independent checker, kills, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_doctor.dataset_loader import load_dataset
from lerobot_doctor.runner import run_checks
from PIL import Image

from lerobot_sets import CAMERAS, LENGTHS, Truth, edit_json, edit_table, encode, picture, write_set, write_video
from paligemma_vla.cli.main import main
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.convert import Comparison, Conversion, Encoding, NativeOutput, compare_episode, convert, read_episodes
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.loader import Collator, VLADataset, build_preprocessor
from paligemma_vla.data.order import SampleRef
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import DataError
from paligemma_vla.preprocess import ImageSpec
from paligemma_vla.schema import DatasetMetadata, Episode
from support import METADATA, call, encode_image, identical
from zygote import Zygote

ConfigFactory = Callable[..., VLAConfig]
KINDS = [("v3.0", "video"), ("v3.0", "parquet"), ("v2.1", "video"), ("v2.1", "parquet")]


def episode(number: int, length: int, size: tuple[int, int] = (32, 48), prompt: str = "open the drawer") -> Episode:
    """Two cameras, smooth pictures."""
    rng = np.random.default_rng(number)
    images = [[encode(picture(camera, number, step)[: size[0], : size[1]]) for step in range(length)] for camera in range(2)]
    values = rng.normal(size=(length, 5)).astype(np.float32)
    return Episode([list(one) for one in images], values[:, :3], values[:, 3:], prompt, is_terminal=number % 2 == 0)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "data"
    with EpisodeWriter(folder, METADATA, episodes_per_file=2) as writer:
        for number, length in enumerate((12, 20, 15, 12, 30)):
            writer.write(episode(number, length, prompt=("open the drawer", "shut it")[number % 2]))
    return folder


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def exported(request: pytest.FixtureRequest, native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native episodes as LeRobot has them."""
    folder = tmp_path_factory.mktemp("exported") / "set"
    version, images = request.param
    flags = ("--lerobot_version", version, "--images", images)
    assert run("--to", "lerobot", *flags, "--input", native, "--output_dir", folder) == 0
    return folder


def run(*arguments: object) -> int:
    return main(["data", "convert", "--workers", "0", *map(str, arguments)])


def refuses(capfd: Any, message: str, *arguments: object) -> None:
    """The command ends with one message and exit status 2."""
    code, _, err = call(capfd, "data", "convert", "--workers", "0", *arguments)
    assert (code, message in err, "Traceback" in err) == (2, True, False), err


def same(first: str, second: str, exact: bool = True) -> None:
    """Hold every value of two sets against each other."""
    a, b = (EpisodeIndex.build(name) for name in (first, second))
    assert a.length.tolist() == b.length.tolist()
    for one, two in zip(*(read_episodes(index, range(2), range(len(a))) for index in (a, b)), strict=True):
        assert np.array_equal(one.state, two.state)
        assert np.array_equal(one.action, two.action)
        assert (one.prompts, one.is_terminal) == (two.prompts, two.is_terminal)
        for camera, step in product(range(2), range(one.length)):
            pictures = [each.pictures[camera][step] for each in (one, two)]
            if all(pictures):
                pixels = [picture.decode().astype(float) for picture in pictures if picture]
                assert np.array_equal(*pixels) if exact else np.abs(pixels[0] - pixels[1]).mean() < 4


def test_export_and_back_is_the_same_and_so_is_its_metadata(native: Path, exported: Path, tmp_path: Path) -> None:
    assert run("--from", "lerobot", "--input", exported, "--output_dir", tmp_path / "back") == 0
    same(f"lerobot:{exported}", str(tmp_path / "back"))
    same(str(native), str(tmp_path / "back"), exact=not list(exported.rglob("*.mp4")))
    assert EpisodeIndex.build(str(tmp_path / "back")).layout == EpisodeIndex.build(str(native)).layout
    if not list(exported.rglob("*.mp4")):
        stored = [pq.read_table(folder)["image_1_bytes"].to_pylist() for folder in (native, tmp_path / "back")]
        assert stored[0] == stored[1]


def test_export_passes_the_independent_checker(exported: Path) -> None:
    report = run_checks(load_dataset(str(exported)), checks=None, verbose=False)
    found = {result.name: result.severity.name for result in report.results}
    assert len(found) >= 8
    assert "FAIL" not in found.values()
    of_short_episodes = {"Episode Health", "Training Readiness", "Per-Episode Summary"}
    assert {name for name, severity in found.items() if severity == "WARN"} <= of_short_episodes


def test_export_counts_as_a_naive_pass_over_the_data_does(native: Path, exported: Path) -> None:
    stats, table = json.loads((exported / "meta/stats.json").read_text()), pq.read_table(native)
    action = np.array(table["action"].to_pylist(), np.float64)
    for name, expected in [("min", action.min(0)), ("max", action.max(0)), ("mean", action.mean(0)), ("std", action.std(0))]:
        assert np.allclose(stats["action"][name], expected, rtol=1e-10)
    images = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in table["image_1_bytes"].to_pylist()])
    pixels = images.reshape(-1, 3) / 255
    for name, expected in [("mean", pixels.mean(0)), ("std", pixels.std(0))]:
        assert np.allclose(stats["observation.images.front"][name], expected.reshape(3, 1, 1), atol=1e-9)
    info = json.loads((exported / "meta/info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"], info["fps"]) == (5, 89, 2, 12.5)


def test_exported_video_has_a_keyframe_at_every_second_frame(exported: Path) -> None:
    for path in exported.rglob("*.mp4"):
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
            assert [packet.is_keyframe for packet in packets] == [number % 2 == 0 for number in range(len(packets))]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Truth, Path]:
    """A LeRobot set written by hand, and its conversion."""
    folder = tmp_path_factory.mktemp("both")
    truth = write_set(folder / "toy", request.param[0], request.param[1] == "video")
    assert run("--from", "lerobot", "--input", truth.root, "--output_dir", folder / "converted") == 0
    return truth, folder / "converted"


def test_batches_of_the_conversion_are_those_of_the_source(both: tuple[Truth, Path], tiny_config: ConfigFactory) -> None:
    truth, converted = both
    config = tiny_config(cameras=2)
    preprocessor = build_preprocessor(config)
    refs = [SampleRef(*pair) for pair in enumerate(np.random.default_rng(0).permutation(sum(LENGTHS)).tolist())]
    datasets = [VLADataset(name, preprocessor, config, training=True) for name in (truth.name, str(converted))]
    assert identical(*(Collator(preprocessor.prompts)(dataset.__getitems__(refs)) for dataset in datasets))


def test_conversion_says_what_it_left_behind_and_compared(both: tuple[Truth, Path], capfd: Any, tmp_path: Path) -> None:
    truth, _ = both
    arguments = ["--from", "lerobot", "--input", truth.root, "--output_dir", tmp_path / "out", "--cameras", "wrist"]
    part = [*arguments, "--episodes", "1:4", "--workers", "0"]
    code, out, err = call(capfd, "data", "convert", *part)
    assert code == 0, err
    images = "15 images have the same bytes" if truth.stored["wrist"] else "10 frames were compared, every pixel is equal"
    assert out.splitlines() == [
        "left behind: observation.effort, front",
        f"verified: 3 episodes, 15 steps; state, action, instructions and flags are equal; {images}",
        str(tmp_path / "out"),
    ]
    assert "nothing was done" in call(capfd, "data", "convert", *part)[1]
    refuses(capfd, f"{tmp_path / 'out'}: is there already, and is not this conversion", *arguments)


def test_one_lerobot_version_becomes_the_other(tmp_path: Path) -> None:
    truth = write_set(tmp_path / "toy", "v2.1", video=False)
    flags = ["--from", "lerobot", "--to", "lerobot", "--images", "parquet"]
    assert run(*flags, "--input", truth.root, "--output_dir", tmp_path / "other") == 0
    same(truth.name, f"lerobot:{tmp_path / 'other'}")


def videos(root: Path, camera: str = "front") -> list[Path]:
    return [path for path in sorted(root.rglob("*.mp4")) if f"observation.images.{camera}" in path.parts]


# Versions of source and result, flags; of each video of the result, the source's video that it copies (None: it is encoded).
COPIES: dict[str, tuple[str, str, list[str], list[int | None]]] = {
    "all": ("v3.0", "v3.0", [], [0, 1]),
    "a file loses an episode": ("v3.0", "v3.0", ["--episodes", "0:3"], [0, None]),
    "the first file loses one": ("v3.0", "v3.0", ["--episodes", "1:4"], [None, 1]),
    "told another quality": ("v3.0", "v3.0", ["--crf", "20"], [None]),
    "told a codec": ("v3.0", "v3.0", ["--codec", "h264"], [None]),
    "files of episodes": ("v2.1", "v3.0", [], [0, 1, 2, 3]),
    "other numbers": ("v2.1", "v2.1", ["--episodes", "1:3"], [1, 2]),
    "several episodes in a file": ("v3.0", "v2.1", [], [None] * 4),
    "told videos, which they are": ("v3.0", "v3.0", ["--images", "video"], [0, 1]),
}


@pytest.mark.parametrize("case", COPIES)
def test_video_file_that_keeps_its_episodes_is_copied(case: str, tmp_path: Path, capfd: Any) -> None:
    version, target, flags, expected = COPIES[case]
    truth = write_set(tmp_path / "toy", version)
    flags = ["--to", "lerobot", "--lerobot_version", target, "--input", truth.name, "--cameras", "wrist", "front", *flags]
    code, out, err = call(capfd, "data", "convert", "--workers", "0", *flags, "--output_dir", tmp_path / "out")
    assert code == 0, err
    copied = sum(one is not None for one in expected)
    counts = [(copied, "copied"), (len(expected) - copied, "encoded (h264)")]
    said = ", ".join(f"{number} {what}" for number, what in counts if number)
    assert f"observation.images.front: {said} of {len(expected)} video files\n" in out
    for camera in CAMERAS:
        before, after = ([path.read_bytes() for path in videos(root, camera)] for root in (truth.root, tmp_path / "out"))
        assert [before.index(data) if data in before else None for data in after] == expected
    selected = flags[flags.index("--episodes") + 1] if "--episodes" in flags else ":"
    same(f"{truth.name}?cameras=wrist,front&episodes={selected}", f"lerobot:{tmp_path / 'out'}", exact=None not in expected)


def test_video_is_copied_that_has_the_episodes_of_several_data_files(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("paligemma_vla.data.formats.lerobot_writer.VIDEO_STEPS", 6)
    truth = write_set(tmp_path / "toy")
    for episodes, data, copied in [("0:4", 4, [0, 1]), ("0:3", 3, [0]), ("1:4", 3, [1])]:
        out = tmp_path / episodes
        flags = ["--to", "lerobot", "--input", truth.name, "--episodes", episodes]
        assert run(*flags, "--output_dir", out) == 0
        assert len(list((out / "data").rglob("*.parquet"))) == data
        before, after = ([path.read_bytes() for path in videos(root)] for root in (truth.root, out))
        assert [before.index(one) for one in after if one in before] == copied
        same(f"{truth.name}?episodes={episodes}", f"lerobot:{out}", exact=len(copied) == 2)


def test_copied_video_is_described_as_it_is(tmp_path: Path) -> None:
    truth = write_set(tmp_path / "toy")
    for path in truth.root.rglob("*.mp4"):
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        write_video(path, frames, "yuv444p")
    edit_json(
        truth.root / "meta/info.json",
        lambda info: info["features"]["observation.images.front"].update(info={"video.g": 6, "video.codec": "av1"}),
    )
    assert run("--to", "lerobot", "--input", truth.name, "--output_dir", tmp_path / "out") == 0
    info = json.loads((tmp_path / "out/meta/info.json").read_text())["features"]["observation.images.front"]["info"]
    assert info.items() >= {"video.g": 6, "video.codec": "h264", "video.pix_fmt": "yuv444p", "video.height": 32}.items()
    # The files of a camera are of one kind: no copy beside what is encoded otherwise.
    assert run("--to", "lerobot", "--input", truth.name, "--episodes", "0:3", "--output_dir", tmp_path / "part") == 0
    assert len(videos(tmp_path / "part")) == 1


def test_video_whose_times_are_not_those_of_the_rate_is_encoded(tmp_path: Path) -> None:
    truth = write_set(tmp_path / "toy")
    times = lambda columns: columns["timestamp"].__setitem__(2, 0.22)  # noqa: E731
    edit_table(truth.root / "data/chunk-000/file-001.parquet", times)
    assert run("--to", "lerobot", "--input", truth.name, "--output_dir", tmp_path / "out") == 0
    assert [
        one.read_bytes() == two.read_bytes() for one, two in zip(*map(videos, (truth.root, tmp_path / "out")), strict=True)
    ] == [
        True,
        False,
    ]


def test_video_whose_clock_begins_late_is_encoded(tmp_path: Path, capfd: Any) -> None:
    """In the result every frame is at its timestamp, as LeRobot asks for it."""
    truth = write_set(tmp_path / "toy")
    source = videos(truth.root)[1]
    with av.open(str(source)) as container:
        write_video(source, [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], form="mpegts")
    code, out, _ = call(capfd, "data", "convert", "--to", "lerobot", "--input", truth.name, "--output_dir", tmp_path / "out")
    assert (code, "front: 1 copied, 1 encoded (h264) of 2" in out, "wrist: 2 copied of 2" in out) == (0, True, True)
    with av.open(str(videos(tmp_path / "out")[1])) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert np.allclose(times, np.arange(sum(LENGTHS[2:])) / 10, atol=1e-4)
    same(truth.name, f"lerobot:{tmp_path / 'out'}", exact=False)


def test_each_camera_keeps_its_form(tmp_path: Path) -> None:
    """One camera in videos, the other in PNG beside the rows."""
    truth, stored = write_set(tmp_path / "toy"), write_set(tmp_path / "stored", video=False)
    for number in range(2):
        path = f"data/chunk-000/file-{number:03d}.parquet"
        images = pq.read_table(stored.root / path)["observation.images.front"]
        table = pq.read_table(truth.root / path)
        pq.write_table(table.append_column("observation.images.front", images), truth.root / path)
    edit_json(truth.root / "meta/info.json", lambda info: info["features"]["observation.images.front"].update(dtype="image"))
    assert run("--to", "lerobot", "--input", truth.name, "--output_dir", tmp_path / "out") == 0
    same(truth.name, f"lerobot:{tmp_path / 'out'}")
    assert [path.read_bytes() for path in videos(tmp_path / "out", "wrist")] == [
        path.read_bytes() for path in videos(truth.root, "wrist")
    ]
    rows = [row["bytes"] for row in pq.read_table(tmp_path / "out/data")["observation.images.front"].to_pylist()]
    assert (rows, videos(tmp_path / "out")) == (stored.stored["front"], [])


@pytest.mark.parametrize("target", ["native", "lerobot"])
@pytest.mark.parametrize("image_format", [None, "jpeg", "png"])
def test_stored_images_stay_as_they_are_unless_told(target: str, image_format: str | None, tmp_path: Path) -> None:
    """The first camera has PNG, the second JPEG."""
    truth = write_set(tmp_path / "toy", video=False)
    flags = ["--image_format", image_format] if image_format else []
    assert run("--to", target, "--input", truth.name, *flags, "--output_dir", tmp_path / "out") == 0
    result = str(tmp_path / "out") if target == "native" else f"lerobot:{tmp_path / 'out'}"
    index = EpisodeIndex.build(result)
    for slot, (camera, own) in enumerate(zip(CAMERAS, ("png", "jpeg"), strict=True)):
        got = [
            picture.encoded() for one in read_episodes(index, range(2), range(4)) for picture in one.pictures[slot] if picture
        ]
        if image_format in (None, own):
            assert got == truth.stored[camera]
        else:
            assert {Image.open(io.BytesIO(data)).format for data in got if data} == {str(image_format).upper()}
    same(truth.name, result, exact=image_format != "jpeg")


@pytest.mark.parametrize("mode", ["stretch", "pad"])
@pytest.mark.parametrize("target", ["native", "lerobot"])
def test_training_sees_in_resized_images_what_it_sees_in_their_source(mode: str, target: str, tmp_path: Path) -> None:
    """The source's pictures are turned by a tag, some of them; the result's stand as they are shown."""
    data, side = tmp_path / "data", 24
    with EpisodeWriter(data, METADATA) as writer:
        one = episode(0, 5)
        writer.write(replace(one, images=[[turned(image) for image in one.images[0]], one.images[1]]))
    flags = ["--to", target, "--resize", side, "--image_resize", mode]
    assert run(*flags, "--input", data, "--output_dir", tmp_path / "out") == 0
    spec = ImageSpec(side, (0.5,) * 3, (0.5,) * 3, resize=mode, resizer="torch")
    names = str(data), str(tmp_path / "out") if target == "native" else f"lerobot:{tmp_path / 'out'}"
    before, after = (next(read_episodes(EpisodeIndex.build(name), range(2), [0])) for name in names)
    for camera, step in product(range(2), range(5)):
        source, result = (one.pictures[camera][step].decode() for one in (before, after))
        assert (source.shape[:2], result.shape[:2]) == ((48, 32) if camera == 0 else (32, 48), (side, side))
        assert np.array_equal(spec.apply(result), spec.apply(source))


def turned(image: bytes | None) -> bytes:
    """A PNG whose EXIF says that it is to be turned by a quarter."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[274] = 6
    Image.open(io.BytesIO(image or b"")).save(stream, "PNG", exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("images", ["parquet", "video"])
def test_turned_pictures_are_turned_once_on_their_way(images: str, tmp_path: Path) -> None:
    with EpisodeWriter(tmp_path / "data", METADATA) as writer:
        one = episode(0, 5)
        writer.write(replace(one, images=[[turned(image) for image in camera] for camera in one.images]))
    out = tmp_path / "out"
    assert run("--to", "lerobot", "--images", images, "--input", tmp_path / "data", "--output_dir", out) == 0
    same(str(tmp_path / "data"), f"lerobot:{out}", exact=images == "parquet")
    shape = json.loads((out / "meta/info.json").read_text())["features"]["observation.images.front"]["shape"]
    assert shape == [48, 32, 3]


def count(folder: Path) -> int:
    """Files under a folder in which another process is at work."""
    return sum(len(files) for _, _, files in os.walk(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


LONG = pytest.mark.long  # the way to LeRobot has more to leave half done


@pytest.mark.parametrize(
    "direction", [pytest.param(("--from", "lerobot"), marks=LONG), ("--to", "lerobot", "--lerobot_version", "v2.1")]
)
def test_killed_conversion_goes_on_to_the_very_same_result(
    direction: tuple[str, ...], tmp_path: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paligemma_vla.data.formats.lerobot_writer.IMAGE_STEPS", 40)
    source, files = tmp_path / "source", 24
    with EpisodeWriter(source, DatasetMetadata(cameras=("a",), control_hz=5.0)) as writer:
        for number in range(files):
            one = episode(number, 6)
            writer.write(Episode(one.images[:1], one.state, one.action, one.prompt))
    if direction[0] == "--from":
        assert run("--to", "lerobot", "--images", "video", "--input", source, "--output_dir", tmp_path / "set") == 0
        source = tmp_path / "set"
    command = ["data", "convert", *direction, "--input", str(source), "--workers", "0", "--output_dir"]
    assert zygote.run([*command, "whole"], tmp_path).status == 0
    partial, kills = tmp_path / "killed.partial", 0
    for _ in range(2):
        child = zygote.start([*command, "killed"], tmp_path)
        before, deadline = count(partial), time.monotonic() + 20
        while count(partial) <= before + 2 and not (tmp_path / "killed").exists() and time.monotonic() < deadline:
            pass
        os.killpg(child.pid, signal.SIGKILL)
        kills += child.wait(30).status == -9 and not (tmp_path / "killed").exists()
    assert kills >= 1
    ended = zygote.run([*command, "killed"], tmp_path)
    assert ended.status == 0, ended.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not partial.exists()


def test_folder_of_something_else_or_with_lost_files_is_left_alone(native: Path, tmp_path: Path, capfd: Any) -> None:
    arguments = ["--to", "lerobot", "--input", native, "--output_dir", tmp_path / "out"]
    notes = tmp_path / "out.partial/notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    refuses(capfd, f"{notes.parent}: is there already, and is not what this conversion", *arguments)
    assert notes.read_text() == "mine"
    notes.unlink()
    assert run(*arguments) == 0
    next((tmp_path / "out").glob("data/*/*.parquet")).unlink()
    refuses(capfd, f"{tmp_path / 'out'}", *arguments)


def test_commands_take_a_lerobot_set_by_its_name(tmp_path: Path, capfd: Any) -> None:
    truth = write_set(tmp_path / "set", "v2.1")
    code, out, _ = call(capfd, "data", "info", f"{truth.name}?episodes=0:3", "--json")
    facts = json.loads(out)
    assert (code, facts["episodes"], facts["camera_names"], facts["control_hz"]) == (0, 3, list(CAMERAS), 10.0)
    arguments = ["--input", f"{truth.name}?episodes=0:3", "--output_dir", tmp_path / "out", "--episodes", "1:3"]
    assert run(*arguments, "--image_format", "jpeg") == 0
    assert EpisodeIndex.build(str(tmp_path / "out")).length.tolist() == list(LENGTHS[1:3])
    assert pq.read_table(tmp_path / "out")["image_1_bytes"][0].as_py().startswith(b"\xff\xd8\xff")
    refuses(capfd, f"--from: got native, expected lerobot as --input says ({truth.name}", *arguments, "--from", "native")
    (tmp_path / "hub/datasets--x--y/snapshots").mkdir(parents=True)
    (tmp_path / "hub/datasets--x--y/snapshots/abc").symlink_to(truth.root)
    for folder in (truth.root, tmp_path / "hub", tmp_path / "hub/*/snapshots"):
        code, _, err = call(capfd, "data", "info", folder)
        named = truth.root if folder == truth.root else tmp_path / "hub/datasets--x--y/snapshots/abc"
        assert (code, f"this is data of another format; write lerobot:{named}" in err) == (2, True)
    code, _, err = call(capfd, "data", "info", f"lerobot:{tmp_path / 'hub/datasets--x--y'}")
    assert (code, f"give one of its revisions: lerobot:{named}" in err) == (2, True)


@pytest.mark.parametrize(("source", "output"), [("native", "link/a/out"), ("lerobot", "data/out")])
def test_output_within_the_input_is_refused(source: str, output: str, native: Path, tmp_path: Path, capfd: Any) -> None:
    data = tmp_path / "data"
    if source == "native":
        shutil.copytree(native, data)
    else:
        write_set(data, "v2.1", video=False)
    (tmp_path / "link").symlink_to(data)
    before = contents(data)
    formats = ["--from", source, "--to", "lerobot"]
    message = f"--output_dir: {tmp_path / output}: got a folder within the input"
    refuses(capfd, message, *formats, "--input", data, "--output_dir", tmp_path / output)
    assert contents(data) == before


REFUSED: dict[str, tuple[list[str], str]] = {
    "same format": (["--input", "x"], "got native to native, expected another format"),
    "camera": (["--to", "lerobot", "--cameras", "top"], "--cameras: got 'top', expected of front, wrist"),
    "range": (["--to", "lerobot", "--episodes", "3:9"], "--episodes: got 3:9, expected a range within 0:5"),
    "fps": (["--to", "lerobot", "--fps", "10"], "--fps: got 10, expected 12.5 as the data says (control_hz)"),
    "no set": (["--from", "lerobot"], "got no meta/info.json there, expected a LeRobot data set"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_command_that_cannot_be_done_is_one_message(case: str, native: Path, tmp_path: Path, capfd: Any) -> None:
    flags, message = REFUSED[case]
    refuses(capfd, message, "--input", native, *flags, "--output_dir", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def odd(one: Episode) -> Episode:
    return replace(one, images=[[encode(picture(0, 0, step)[:31]) for step in range(one.length)] for _ in range(2)])


def absent(one: Episode) -> Episode:
    return replace(one, images=[one.images[0], [None, *one.images[1][1:]]])


def resized(one: Episode) -> Episode:
    return replace(one, images=[[*one.images[0][:-1], encode_image(np.random.default_rng(0))], one.images[1]])


@pytest.mark.parametrize(
    ("change", "images", "message"),
    [
        (odd, "video", "camera observation.images.front: got 48 x 31 pixels, expected even numbers"),
        (absent, "video", "camera observation.images.wrist: got no image"),
        (resized, "parquet", "got 40 x 28 pixels, expected 48 x 32 as before"),
    ],
)
def test_what_lerobot_cannot_hold_is_refused_and_nothing_is_in_the_way_of_the_remedy(
    change: Callable[[Episode], Episode], images: str, message: str, tmp_path: Path, capfd: Any
) -> None:
    with EpisodeWriter(tmp_path / "data", METADATA) as writer:
        writer.write(change(episode(0, 5)))
    arguments = ["--to", "lerobot", "--images", images, "--input", tmp_path / "data", "--output_dir", tmp_path / "out"]
    refuses(capfd, message, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("target", ["native", "lerobot"])
def test_episode_in_the_middle_is_left_out_as_the_error_says(target: str, tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    truth = write_set(tmp_path / "toy", video=False)
    bad = lambda columns: columns["observation.images.front"].__setitem__(3, {"bytes": b"x", "path": None})  # noqa: E731
    edit_table(truth.root / "data/chunk-000/file-001.parquet", bad)
    flags = ["--to", target, "--input", truth.name, "--image_format", "png", "--output_dir", tmp_path / "out"]
    refuses(capfd, "`data convert --exclusion_list`", *flags)
    assert main(["data", "check", truth.name]) == 1
    assert run(*flags, "--exclusion_list", "excluded_episodes.json") == 0
    result = EpisodeIndex.build(str(tmp_path / "out") if target == "native" else f"lerobot:{tmp_path / 'out'}")
    got = [one.state.tolist() for one in read_episodes(result, range(2), range(len(result)))]
    assert got == [truth.state[number].tolist() for number in (0, 1, 3)]


def test_rate_that_nobody_knows_must_be_given(tmp_path: Path, capfd: Any) -> None:
    with EpisodeWriter(tmp_path / "data", DatasetMetadata()) as writer:
        writer.write(episode(0, 5))
    arguments = ["--to", "lerobot", "--input", tmp_path / "data", "--output_dir", tmp_path / "out"]
    refuses(capfd, "--fps: got none, and the data does not say it", *arguments)
    assert run(*arguments, "--fps", "7.5") == 0
    meta = EpisodeIndex.build(f"lerobot:{tmp_path / 'out'}").layout.metadata
    assert (meta.control_hz, meta.cameras) == (7.5, ("image_1", "image_2"))


def shifted(one: Episode) -> Episode:
    return replace(one, images=[[*one.images[0][1:], one.images[0][-1]], one.images[1]])


def other_state(one: Episode) -> Episode:
    state = one.state.copy()
    state[2, 1] = np.nextafter(state[2, 1], np.float32(9))
    return replace(one, state=state)


def other_picture(one: Episode) -> Episode:
    return replace(one, images=[[encode(255 - picture(0, 0, step)) for step in range(one.length)], one.images[1]])


@pytest.mark.parametrize(
    ("change", "lossless", "message"),
    [
        (other_state, True, "state: got "),
        (other_picture, True, r"camera 1, step 0: got other pixels \(PSNR"),
        (shifted, False, "camera 1, step 0: got an image more like step 1 than its own"),
        (other_picture, False, r"camera 1, step 0: got PSNR .* dB, expected 20 dB at least"),
        (lambda one: replace(one, is_terminal=True), True, "is_terminal: got True, expected False"),
        (absent, True, "camera 2, step 0: an image is there in only one of them"),
    ],
)
def test_comparison_finds(change: Callable[[Episode], Episode], lossless: bool, message: str, tmp_path: Path) -> None:
    one = episode(1, 5)
    for name, written in (("a", one), ("b", change(one))):
        with EpisodeWriter(tmp_path / name, METADATA) as writer:
            writer.write(written)
    source, result = (next(read_episodes(EpisodeIndex.build(str(tmp_path / name)), range(2), range(1))) for name in ("a", "b"))
    assert compare_episode(source, source, lossless) == Comparison(10)
    with pytest.raises(DataError, match=message):
        compare_episode(source, result, lossless)


def test_result_that_lacks_an_episode_is_an_error_and_gets_no_name(native: Path, tmp_path: Path, monkeypatch: Any) -> None:
    write = NativeOutput.write
    monkeypatch.setattr(NativeOutput, "write", lambda *parts: write(*parts[:4], islice(parts[4], 1, None)))
    conversion = Conversion(
        EpisodeIndex.build(str(native)), (0, 1), NativeOutput(METADATA, Encoding("png", 90)), tmp_path / "out"
    )
    with pytest.raises(DataError, match="got 4 episodes of 77 steps, expected 5 of 89"):
        convert(conversion, 0)
    assert not (tmp_path / "out").exists()


def test_instruction_that_changes_within_an_episode_needs_the_data_itself(tmp_path: Path, capfd: Any) -> None:
    truth = write_set(tmp_path / "toy", "v2.1", video=False)
    edit_table(truth.root / "data/chunk-000/episode_000002.parquet", lambda columns: columns["task_index"].__setitem__(4, 1))
    arguments = ["--from", "lerobot", "--input", truth.root, "--output_dir", tmp_path / "out"]
    refuses(capfd, "step 4: got the instruction 'close the drawer', expected 'open the drawer'", *arguments)


def test_several_processes_write_what_one_does(native: Path, tmp_path: Path) -> None:
    files = ["--input", str(native), "--output_dir", str(tmp_path / "out")]
    arguments = ["data", "convert", "--to", "lerobot", *files, "--workers"]
    assert main([*arguments, "2"]) == 0
    shutil.move(tmp_path / "out", tmp_path / "by_two")
    assert main([*arguments, "0"]) == 0
    assert contents(tmp_path / "by_two") == contents(tmp_path / "out")
