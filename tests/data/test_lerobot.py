"""LeRobot data sets, written by hand straight from the format, against what is read from them."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import lerobot_sets as sets
from lerobot_sets import LENGTHS, Truth, edit_json, edit_table, write_set
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.convert import Recording, read_episodes
from paligemma_vla.data.doctor import CheckOptions, diagnose
from paligemma_vla.data.formats.lerobot_meta import Selection
from paligemma_vla.data.index import EpisodeIndex, ExclusionList, expand_paths, load_exclusions
from paligemma_vla.data.reader import iterate_numbers
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.errors import DataError, VLAError
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.preflight import prepare

ConfigFactory = Callable[..., VLAConfig]
KINDS = [("v3.0", True), ("v3.0", False), ("v2.1", True), ("v2.1", False)]
DATA = "data/chunk-000/"


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{'video' if kind[1] else 'parquet'}")
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    version, video = request.param
    return write_set(tmp_path_factory.mktemp("sets") / "toy", version, video)


@pytest.fixture(scope="module")
def video_set(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return write_set(tmp_path_factory.mktemp("sets") / "toy")


@pytest.fixture
def copied(video_set: Truth, tmp_path: Path) -> Truth:
    """A v3.0 set with videos, of one's own."""
    shutil.copytree(video_set.root, tmp_path / "toy")
    return replace(video_set, root=tmp_path / "toy")


def read_all(name: str, cameras: int = 2, exclude: ExclusionList | None = None) -> list[Recording]:
    index = EpisodeIndex.build(name, exclude=exclude)
    return list(read_episodes(index, range(cameras), range(len(index))))


def pixels(recordings: list[Recording], camera: int) -> list[np.ndarray]:
    return [picture.decode() for one in recordings for picture in one.pictures[camera] if picture is not None]


def test_decoders_keep_no_more_videos_open_than_they_may(video_set: Truth) -> None:
    decoders = VideoDecoders(limit=1)
    for path in sorted(video_set.root.rglob("*.mp4")) * 2:
        decoders.frame(str(path), 0.1, 0.05, 0.0)
        assert list(decoders._open) == [str(path)]


def test_selection_takes_cameras_by_name_in_the_order_given_and_a_range_of_episodes(truth: Truth) -> None:
    name = f"{truth.name}?cameras=wrist,front&episodes=1:3"
    index, recordings = EpisodeIndex.build(name), read_all(name)
    assert index.length.tolist() == list(LENGTHS[1:3])
    assert index.layout.metadata.cameras == ("wrist", "front")
    assert index.layout.metadata.image_orientation == "", "LeRobot does not say it"
    rows = range(LENGTHS[0], sum(LENGTHS[:3]))
    assert all(map(np.array_equal, pixels(recordings, 0), (truth.pixels["wrist"][row] for row in rows)))
    assert np.array_equal(np.concatenate([one.state for one in recordings]), np.concatenate(truth.state[1:3]))
    numbers = [states for file in range(len(index.paths)) for states, _ in iterate_numbers(index, file)]
    assert np.array_equal(np.concatenate(numbers), np.concatenate(truth.state[1:3]))
    others = [
        EpisodeIndex.build(name) for name in (truth.name, f"{truth.name}?cameras=front,wrist", f"{truth.name}?cameras=wrist")
    ]
    assert len({one.fingerprint for one in (index, *others)}) == 4


def test_selection_is_written_as_it_is_read_and_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "data/pusht?cameras=a,b&episodes=2:&state=s&action=actions"
    parsed = Selection.parse(text)
    assert parsed == Selection("data/pusht", ("a", "b"), (2, None), "s", "actions")
    assert (str(parsed), str(Selection.parse("data/pusht"))) == (text, "data/pusht")
    monkeypatch.setenv("HOME", "/home/me")
    assert Selection.parse("~/pusht?episodes=1:") == Selection("/home/me/pusht", episodes=(1, None))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lerobot:", "expected a path after lerobot:"),
        ("lerobot:someone/pusht", "hf download NAME --repo-type dataset"),
        ("cameras=top", r"cameras: got 'top', expected of front, wrist"),
        ("cameras=front,front", "expected different names"),
        ("camera=front", "got 'camera=front', expected PATH"),
        ("episodes=3", "episodes: got '3', expected FIRST:STOP"),
        ("episodes=2:9", "episodes: got 2:9, expected a range within 0:4"),
        ("state=qpos", r"features.qpos: got no 'qpos', expected .* for the state.*observation.effort"),
        ("action=observation.images.front", "expected 1 to 4096 numbers in a row"),
    ],
)
def test_name_or_selection_that_cannot_be_is_told(video_set: Truth, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        EpisodeIndex.build(name if name.startswith("lerobot:") else f"{video_set.name}?{name}")


def test_single_numbers_and_other_features_do_for_state_and_action(copied: Truth) -> None:
    name = f"{copied.name}?state=observation.effort&action=observation.state"
    index, recording = EpisodeIndex.build(name), read_all(name)[2]
    assert (index.layout.state_dim, index.layout.action_dim, index.layout.metadata.state_names) == (1, 3, ())
    assert recording.state.shape == (LENGTHS[2], 1)
    assert np.array_equal(recording.action, copied.state[2])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b", "c"], ("a", "b", "c")),
        ({"axes": ["a"], "gripper": ["b", "c"]}, ("a", "b", "c")),
        ({"c": 2, "a": 0, "b": 1}, ("a", "b", "c")),
        ([["a", "b", "c"]], ("a", "b", "c")),
        (["too", "few"], ()),
        (None, ()),
    ],
)
def test_names_of_dimensions_come_in_many_shapes(copied: Truth, names: Any, expected: tuple[str, ...]) -> None:
    edit_json(copied.root / "meta/info.json", lambda info: info["features"]["observation.state"].update(names=names))
    assert EpisodeIndex.build(copied.name).layout.metadata.state_names == expected


def test_tasks_may_be_an_index_with_a_name(copied: Truth) -> None:
    sets.write_tasks(copied.root / "meta/tasks.parquet", "task")
    assert [one.prompts[0] for one in read_all(copied.name)] == copied.tasks


def test_images_beside_the_rows_are_read_within_the_data_set_only(tmp_path: Path) -> None:
    truth = write_set(tmp_path / "toy", "v2.1", video=False)
    data, key = truth.root / f"{DATA}episode_000000.parquet", "observation.images.front"
    (truth.root / "images").mkdir()
    (truth.root / "images/a.png").write_bytes(truth.stored["front"][0])

    def point(path: str) -> None:
        edit_table(data, lambda columns: columns[key].__setitem__(0, {"bytes": None, "path": path}))

    point("images/a.png")
    assert np.array_equal(pixels(read_all(truth.name), 0)[0], truth.pixels["front"][0])
    for path, message in [("../secret.png", "expected one within the data set"), ("images/b.png", "cannot be read")]:
        point(path)
        with pytest.raises(DataError, match=rf"episode_000000.parquet: row 0, column image_1_bytes: .*{message}"):
            pixels(read_all(truth.name), 0)


def info(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda root: edit_json(root / "meta/info.json", change)


def rows(change: Callable[[dict[str, list[Any]]], object]) -> Callable[[Path], None]:
    return lambda root: edit_table(root / f"{DATA}file-001.parquet", change)


def gone(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {  # what is done, and what the message names
    "no info": (gone("meta/info.json"), "got no meta/info.json"),
    "no tasks": (gone("meta/tasks.parquet"), "meta/tasks.parquet: cannot be read"),
    "no episodes": (gone("meta/episodes/chunk-000/file-000.parquet"), "meta/episodes: got no Parquet file"),
    "no data": (gone(f"{DATA}file-001.parquet"), "file-001.parquet.*No such file"),
    "no video": (gone("videos/observation.images.wrist/chunk-000/file-001.mp4"), "got no video .*wrist/chunk-000/file-001.mp4"),
    "json": (lambda root: (root / "meta/info.json").write_text("{"), "meta/info.json: cannot be read as JSON"),
    "v1.6": (info(lambda i: i.update(codebase_version="v1.6")), "codebase_version: got v1.6, expected v2.x or v3.x"),
    "template": (info(lambda i: i.update(data_path="data/{nothing}")), "data_path: got 'data/{nothing}'"),
    "outside": (info(lambda i: i.update(data_path="../{chunk_index}")), "expected a path within the data set"),
    "feature": (
        info(lambda i: i["features"].update(action={"dtype": "float32"})),
        "action: got dtype float32, shape None",
    ),
    "rows": (
        rows(lambda c: [values.pop() for values in c.values()]),
        "row 9: got 3 rows, expected 4, the length of episode 3",
    ),
    "episode": (rows(lambda c: c["episode_index"].__setitem__(5, 1)), "row 5, column episode_index: got 1, expected 2"),
    "column": (rows(lambda c: c.pop("action")), "column action: got no column action, expected one"),
    "task": (rows(lambda c: c["task_index"].__setitem__(0, 7)), "row 0, column prompt: got null .*task_index without a task"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_with_its_place_and_a_remedy(copied: Truth, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(copied.root)
    with pytest.raises(DataError, match=message):
        for recording in read_all(copied.name):
            assert recording.length


def test_broken_video_is_a_fault_of_its_frames(copied: Truth) -> None:
    path = copied.root / "videos/observation.images.wrist/chunk-000/file-001.mp4"
    path.write_bytes(path.read_bytes()[:-1000])
    where = "file-001.parquet: row 0, column image_2_bytes: episode 2, frame 0: .*wrist/.*file-001.mp4: cannot be decoded"
    with pytest.raises(DataError, match=where):
        pixels(read_all(copied.name), 1)
    assert len(pixels(read_all(f"{copied.name}?episodes=0:2"), 1)) == LENGTHS[0] + LENGTHS[1]


def test_episodes_of_a_session_that_was_cut_are_left_out(copied: Truth, caplog: pytest.LogCaptureFixture) -> None:
    """A second recording went on in files of its own, and none of them has a footer."""
    listed = copied.root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(listed)
    pq.write_table(table.slice(0, 2), listed)
    pq.write_table(table.slice(2), listed.with_name("file-001.parquet"))
    videos = [copied.root / f"videos/observation.images.{camera}/chunk-000/file-001.mp4" for camera in sets.CAMERAS]
    for path in (listed.with_name("file-001.parquet"), copied.root / f"{DATA}file-001.parquet", *videos):
        path.write_bytes(path.read_bytes()[:-8])
    recordings = read_all(copied.name)
    assert [recording.length for recording in recordings] == list(LENGTHS[:2])
    assert np.array_equal(np.concatenate([one.state for one in recordings]), np.concatenate(copied.state[:2]))
    assert "file-001.parquet: its footer is missing" in caplog.text and "; what it lists is left out" in caplog.text
    listed.write_bytes(listed.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"file-000\.parquet: cannot be read as a table \(its footer is missing"):
        read_all(copied.name)


def test_check_finds_all_faults_and_its_list_leaves_them_out(copied: Truth, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    edit_table(copied.root / f"{DATA}file-000.parquet", lambda columns: columns["action"].__setitem__(1, [np.inf, 0.0]))
    path = copied.root / "videos/observation.images.front/chunk-000/file-001.mp4"
    sets.write_video(path, [sets.picture(0, 2, step) for step in range(11)])
    diagnosis = diagnose(expand_paths("lerobot:toy", "test"), CheckOptions(), lambda size: None)
    faults = [(Path(fault.file).name, fault.row, fault.column) for fault in diagnosis.faults]
    last = [("file-001.parquet", row, "image_1_bytes") for row in (11, 12)]
    assert faults == [("file-000.parquet", 1, "action"), *last]
    assert (diagnosis.episodes, diagnosis.steps, diagnosis.bad_episodes) == (4, sum(LENGTHS), 2)
    assert "episode 3, frame 2: " in str(diagnosis.faults[1])
    part = diagnose(expand_paths("lerobot:toy?episodes=1:2", "test"), CheckOptions(), lambda size: None)
    assert (part.faults, part.episodes, part.steps) == ([], 1, LENGTHS[1])
    ExclusionList("list.json", diagnosis.excluded).save()
    assert json.loads(Path("list.json").read_text())["episodes"][0]["file"] == "lerobot:toy/data/chunk-000/file-000.parquet"
    exclude = load_exclusions("list.json")
    index = EpisodeIndex.build("lerobot:toy", exclude=exclude)
    assert index.length.tolist() == [LENGTHS[1], LENGTHS[2]]
    assert len(pixels(read_all("lerobot:toy", exclude=exclude), 0)) == LENGTHS[1] + LENGTHS[2]
    with pytest.raises(DataError, match=r"the file, or what is read of it, has changed since"):
        EpisodeIndex.build("lerobot:toy?cameras=wrist", exclude=exclude)


def test_one_set_held_out_by_another_name_is_not_trained_on(video_set: Truth, tiny_config: ConfigFactory) -> None:
    twice = [video_set.name, f"{video_set.name}?cameras=wrist,front"]
    settings = {"data.train_parquet_files": twice, "data.val_fraction": 0.25, "data.allow_other_statistics": True}
    config = tiny_config(settings, cameras=2)
    _, data, _ = prepare(config, Distributed(0, 1, torch.device("cpu")))
    assert data.validation is not None
    held_out, trained = (
        {(one.paths[file].partition("?")[0], row) for file, row in zip(one.file.tolist(), one.start.tolist(), strict=True)}
        for one in (data.validation.index, data.train.index)
    )
    assert held_out
    assert not held_out & trained


def test_large_lists_and_whole_numbers_are_read_as_float32(tmp_path: Path) -> None:
    truth = write_set(tmp_path / "toy", "v2.1")
    path = truth.root / f"{DATA}episode_000002.parquet"
    table = pq.read_table(path)
    values = pa.array([[1, 2]] * LENGTHS[2], pa.large_list(pa.int64()))
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", values), path)
    assert read_all(truth.name)[2].action.tolist() == [[1.0, 2.0]] * LENGTHS[2]


WHOLE = [2**24 + 1, 2**24 + 3, 2**53 + 1, -(2**60) - 12345]  # of float64 too some lie between two numbers


@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.int64()), pa.list_(pa.float64())], ids=str)
def test_numbers_beyond_float32_are_read_as_the_nearest(tmp_path: Path, kind: pa.DataType) -> None:
    truth = write_set(tmp_path / "toy", "v2.1", video=False)
    path = truth.root / f"{DATA}episode_000003.parquet"
    table = pq.read_table(path)
    values = pa.array(WHOLE if kind == pa.int64() else [[value] for value in WHOLE]).cast(kind, safe=False)
    pq.write_table(table.set_column(table.schema.get_field_index("observation.effort"), "observation.effort", values), path)
    name = f"{truth.name}?state=observation.effort&episodes=3:4"
    expected = np.array(WHOLE, np.float64 if "double" in str(kind) else np.int64).astype(np.float32)
    assert read_all(name)[0].state[:, 0].tolist() == expected.tolist()
    assert diagnose(expand_paths(name, "test"), CheckOptions(), lambda size: None).faults == []


@pytest.mark.parametrize("word", ["open", "打开\u2028Ö\u0085🤖", "<image> <loc0001> <bos>", "open\n"])
@pytest.mark.parametrize(("start", "end"), [("", "\n"), ("\ufeff", "\r\n")])
def test_instructions_are_read_as_they_are_written(tmp_path: Path, word: str, start: str, end: str) -> None:
    truth, tasks = write_set(tmp_path / "toy", "v2.1", video=False), (f"{word} the drawer", "close")
    lines = [json.dumps({"task_index": n, "task": task}, ensure_ascii=False) + end for n, task in enumerate(tasks)]
    (truth.root / "meta/tasks.jsonl").write_bytes(f"{start}{''.join(lines)}".encode())
    assert [one.prompts for one in read_all(truth.name)] == [[tasks[n % 2]] * length for n, length in enumerate(LENGTHS)]


def test_images_beside_the_rows_are_read_through_links_that_leave_the_data_set(tmp_path: Path) -> None:
    """As in a snapshot of the hub, whose files are links into a folder of contents."""
    truth = write_set(tmp_path / "toy", "v2.1", video=False)
    (tmp_path / "blobs").mkdir()
    (truth.root / "images").mkdir()
    for episode, (start, length) in enumerate(zip(np.cumsum([0, *LENGTHS]), LENGTHS, strict=False)):
        names = [f"images/{start + step}.png" for step in range(length)]
        for row, name in enumerate(names, start):
            (tmp_path / "blobs" / str(row)).write_bytes(truth.stored["front"][row])
            (truth.root / name).symlink_to(f"../../blobs/{row}")
        column = [{"bytes": None, "path": name} for name in names]
        path = truth.root / f"{DATA}episode_{episode:06d}.parquet"
        edit_table(path, lambda columns, column=column: columns.update({"observation.images.front": column}))
    assert all(map(np.array_equal, pixels(read_all(truth.name), 0), truth.pixels["front"]))


VALUES: list[Any] = [None, -1, 0, 1.5, 2**70, float("nan"), "", "../x", "{", "a\0b", [], {}, [None], {"a": 1}, True]
TOKEN = re.compile(r'"[^"]*"|-?\d+(?:\.\d+)?|true|false|null')


@pytest.mark.parametrize("seed", range(5))
def test_mutated_metadata_is_read_or_refused_with_a_message(truth: Truth, tmp_path: Path, seed: int) -> None:
    """A value, or a key, of a JSON file is changed, or some bytes of any other."""
    rng = random.Random(seed)
    shutil.copytree(truth.root, tmp_path / "toy")
    path = rng.choice(sorted(path for path in (tmp_path / "toy/meta").rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    if path.suffix == ".parquet":
        for _ in range(rng.choice([1, 3, 20])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    else:
        token = rng.choice(list(TOKEN.finditer(content.decode())))
        content[token.start() : token.end()] = json.dumps(rng.choice(VALUES)).encode()
    path.write_bytes(content)
    try:
        recordings = read_all(f"lerobot:{tmp_path / 'toy'}")
        assert len(pixels(recordings, 0)) == sum(one.length for one in recordings)
    except VLAError as error:
        assert len(str(error)) < 1500
