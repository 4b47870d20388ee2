"""LeRobot data as other programs left it: what is not needed is no hindrance, what is wrong costs its episode only."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_sets import CAMERAS, LENGTHS, TASKS, Truth, edit_json, edit_table, write_set
from paligemma_vla.cli.main import main
from paligemma_vla.data.convert import read_episodes
from paligemma_vla.data.formats import lerobot_meta
from paligemma_vla.data.index import EpisodeIndex, load_exclusions
from paligemma_vla.errors import DataError
from paligemma_vla.storage import POINTER

Change = Callable[[Path], object]
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    folder = tmp_path_factory.mktemp("sets")
    kinds = {"v2.1": False, "v3.0": False, "v3.0-video": True}
    return {kind: write_set(folder / kind, kind[:4], video) for kind, video in kinds.items()}


@pytest.fixture
def copy(written: dict[str, Truth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Truth]]:
    """A set of one's own, in a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    lerobot_meta._said.clear()

    def copied(kind: str) -> Truth:
        return replace(written[kind], root=copytree(written[kind].root, tmp_path / kind))

    return copied


def info(**values: Any) -> Change:
    return lambda root: edit_json(root / "meta/info.json", lambda content: content.update(values))


def features(**values: Any) -> Change:
    """Features of info.json, each with some of its entries changed."""

    def change(content: dict[str, Any]) -> None:
        for key, entries in values.items():
            known = content["features"].get(key.replace("__", "."), {})
            content["features"][key.replace("__", ".")] = {**known, **entries} if isinstance(entries, dict) else entries

    return lambda root: edit_json(root / "meta/info.json", change)


def column(name: str, change: Callable[[pa.ChunkedArray], Any] | None, where: str = "data/**/*.parquet") -> Change:
    """Another column in some tables, with a type of its own; without `change` it is gone."""

    def edit(root: Path) -> None:
        for path in root.glob(where):
            table = pq.read_table(path)
            number = table.schema.get_field_index(name)
            rest = table.remove_column(number)
            pq.write_table(rest if change is None else rest.add_column(number, name, change(table[name])), path)

    return edit


def value(name: str, row: int, entry: Any) -> Change:
    """One entry in the second data file of a v3.0 set, which holds episodes 2 and 3."""
    return lambda root: edit_table(root / "data/chunk-000/file-001.parquet", lambda c: c[name].__setitem__(row, entry))


def lines(change: Callable[[bytes], bytes]) -> Change:
    def edit(root: Path) -> None:
        for path in root.glob("meta/*.jsonl"):
            path.write_bytes(change(path.read_bytes()))

    return edit


def two_lists(root: Path) -> None:
    """Lists of episodes by two writers, with other widths and another order of columns."""
    table = pq.read_table(root / EPISODES)
    other = table.slice(2).select(table.column_names[::-1])
    other = other.set_column(other.schema.get_field_index("length"), "length", other["length"].cast(pa.int16()))
    pq.write_table(table.slice(0, 2), root / EPISODES)
    pq.write_table(other, root / "meta/episodes/chunk-000/file-001.parquet")
    (root / "meta/episodes/chunk-000/._file-001.parquet").write_bytes(b"of another program")


def other_tasks(root: Path) -> None:
    (root / "meta/tasks.parquet").unlink()
    rows = [{"task_index": number, "task": task} for number, task in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def swap_episodes(root: Path) -> None:
    path = root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(LENGTHS[2]), table.slice(0, LENGTHS[2])]), path)


def unlisted(root: Path) -> None:
    """Rows of an episode that was recorded, and not listed before the recorder died."""
    path = root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    more = table.slice(0, 3).set_column(table.schema.get_field_index("episode_index"), "episode_index", pa.array([4] * 3))
    pq.write_table(pa.concat_tables([table, more]), path)


def numbers(kind: pa.DataType) -> Callable[[pa.ChunkedArray], pa.Array]:
    return lambda old: pa.array(old.to_pylist(), kind)


def lists(old: pa.ChunkedArray) -> pa.Array:
    return pa.array([[one] for one in old.to_pylist()])


FILE_INDEX, BEGIN = "data/file_index", "videos/observation.images.front/from_timestamp"
READ_ALL_THE_SAME: dict[str, tuple[str, Change, str]] = {  # version, what is other, what is logged of it
    "v2.0": ("v2.1", info(codebase_version="v2.0"), ""),
    "v2.1.0": ("v2.1", info(codebase_version="v2.1.0"), ""),
    "2.1": ("v2.1", info(codebase_version=2.1), ""),
    "v3.1": ("v3.0", info(codebase_version="v3.1"), ""),
    "byte order mark": ("v2.1", lines(lambda text: b"\xef\xbb\xbf" + text), ""),
    "line ends": ("v2.1", lines(lambda text: text.replace(b"\n", b"\r\n")), ""),
    "whole floats in lines": ("v2.1", lines(lambda text: re.sub(rb"(index|length)\": (\d+)", rb'\1": \2.0', text)), ""),
    "fps as text": ("v3.0", info(fps="10"), ""),
    "unused entries": ("v3.0", info(video_path=7, splits=None, total_tasks="x", robot_type=["toy arm"], chunks_size=None), ""),
    "totals": ("v3.0", info(total_episodes=7, total_frames="many"), "total_episodes: got 7, expected 4"),
    "unused features": (
        "v3.0",
        features(
            a={"dtype": "float32", "shape": None}, b={"shape": "auto"}, c=3, d={"dtype": ["x"], "shape": [None, 3]}, e={"f": {}}
        ),
        "",
    ),
    "shape of floats": ("v3.0", features(observation__state={"shape": [3.0]}), ""),
    "shape 1 x N": ("v3.0", features(observation__state={"shape": [1, 3]}), ""),
    "rows of 1 x N": ("v3.0", column("observation.state", lists), ""),
    "large lists": ("v3.0", column("action", numbers(pa.large_list(pa.float64()))), ""),
    "no frame_index": ("v3.0", column("frame_index", None), "no column frame_index of numbers; it is taken from the order"),
    "no timestamp": ("v2.1", column("timestamp", None), "no column timestamp"),
    "timestamps as text": ("v3.0", column("timestamp", lambda old: pa.array(map(str, old.to_pylist()))), "no column timestamp"),
    "no episode_index v2.1": ("v2.1", column("episode_index", None), "no column episode_index"),
    "no episode_index v3.0": ("v3.0", column("episode_index", None), "no column episode_index"),
    **{
        f"{name} all {empty} {kind}": (
            kind,
            column(name, lambda old, empty=empty: pa.array([empty] * len(old), pa.float32())),
            f"no column {name} of numbers",
        )
        for name in ("timestamp", "frame_index", "episode_index")
        for empty, kind in ((None, "v3.0-video"), (np.nan, "v2.1"))
    },
    "no index": ("v3.0", column("index", None), ""),
    "frames from 1": ("v2.1", column("frame_index", lambda old: pa.array(old.to_numpy() + 1)), ""),
    "frames of the file": ("v3.0", column("frame_index", lambda old: pa.array(np.arange(len(old)))), ""),
    "float indices": ("v3.0", column("episode_index", numbers(pa.float64())), ""),
    "narrow indices": ("v3.0", column("task_index", numbers(pa.uint8())), ""),
    "indices in lists": ("v3.0", column("frame_index", lists), ""),
    "float file index": ("v3.0", column(FILE_INDEX, numbers(pa.float64()), EPISODES), ""),
    "one file index missing": (
        "v3.0",
        column(FILE_INDEX, lambda _: pa.array([0, None, 1, 1]), EPISODES),
        "1 episodes lie",
    ),
    "no file index": ("v3.0", column(FILE_INDEX, None, EPISODES), "4 episodes lie in another data file"),
    "stale file index": ("v3.0", column(FILE_INDEX, lambda _: pa.array([0, 0, 0, 1]), EPISODES), "1 episodes lie"),
    "all in the first file": ("v3.0", column(FILE_INDEX, lambda _: pa.array([0, 0, 0, 0]), EPISODES), "2 episodes lie"),
    **{
        f"length {entry} v3.0": (
            "v3.0",
            column("length", lambda _, entry=entry: pa.array([5, 2, entry, 4]), EPISODES),
            "1 episodes are listed without a length; their rows are counted",
        )
        for entry in (None, -9, 2.5)
    },
    "no length v3.0": ("v3.0", column("length", None, EPISODES), "4 episodes are listed without a length"),
    "length null v2.1": ("v2.1", lines(lambda text: text.replace(b'"length": 9', b'"length": null')), "1 episodes are listed"),
    "no length v2.1": ("v2.1", lines(lambda text: text.replace(b'"length"', b'"frames"')), "4 episodes are listed"),
    "tasks in lines v3.0": ("v3.0", other_tasks, "meta/tasks.parquet: is missing; the tasks are those of meta/tasks.jsonl"),
    "two lists of episodes": ("v3.0", two_lists, ""),
    "another order of rows": ("v3.0", swap_episodes, ""),
    "rows that are not listed": ("v3.0", unlisted, "rows of episodes that meta does not list; they are left out"),
    "slow loop": (
        "v3.0",
        column("timestamp", lambda old: pa.array(old.to_numpy() * 1.7)),
        "timestamps are not those of fps 10",
    ),
    "images as bytes": (
        "v3.0",
        column("observation.images.front", lambda old: pa.array([one["bytes"] for one in old.to_pylist()], pa.large_binary())),
        "",
    ),
    "29.97 as 30": ("v3.0-video", column("timestamp", lambda old: pa.array(old.to_numpy() * 1.001)), ""),
    "video within half a frame": ("v3.0-video", column("timestamp", lambda old: pa.array(old.to_numpy() + 0.04)), ""),
    "video without times": ("v3.0-video", column("timestamp", None), "no column timestamp"),
    "fps of video": ("v3.0-video", info(fps=30), "timestamps are not those of fps 30"),
}


@pytest.mark.parametrize("name", READ_ALL_THE_SAME)
def test_what_is_not_needed_or_can_be_rebuilt_changes_nothing(
    copy: Callable[[str], Truth], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, change, logged = READ_ALL_THE_SAME[name]
    truth = copy(kind)
    change(truth.root)
    with caplog.at_level(logging.WARNING):
        index = EpisodeIndex.build(truth.name)
    texts = [record.getMessage() for record in caplog.records]
    assert [logged in text for text in texts] == [True] * bool(logged) if name != "totals" else logged in texts[0]
    check_read(truth, index, list(range(len(LENGTHS))))


def check_read(truth: Truth, index: EpisodeIndex, episodes: list[int]) -> None:
    """The episodes of an index are those of the source, in whatever order, with every number and pixel."""
    ends = np.cumsum(LENGTHS)
    recordings = {one.state.tobytes(): one for one in read_episodes(index, range(2), range(len(index)))}
    assert recordings.keys() == {truth.state[episode].tobytes() for episode in episodes}
    for episode in episodes:
        one = recordings[truth.state[episode].tobytes()]
        assert (one.length, set(one.prompts)) == (LENGTHS[episode], {truth.tasks[episode]})
        assert np.array_equal(one.action, truth.action[episode])
        assert one.is_terminal == truth.success[episode]
        for camera, pictures in zip(CAMERAS, one.pictures, strict=True):
            expected = truth.pixels[camera][ends[episode] - LENGTHS[episode] : ends[episode]]
            assert all(np.array_equal(picture.decode(), pixels) for picture, pixels in zip(pictures, expected, strict=True))


def test_selected_episode_is_found_in_another_file_than_listed(copy: Callable[[str], Truth]) -> None:
    truth = copy("v3.0")
    column(FILE_INDEX, lambda _: pa.array([0, 0, 0, 1]), EPISODES)(truth.root)
    check_read(truth, EpisodeIndex.build(f"{truth.name}?episodes=2:3"), [2])


def test_only_task_needs_no_task_index(copy: Callable[[str], Truth]) -> None:
    truth = copy("v2.1")
    column("task_index", None)(truth.root)
    with pytest.raises(DataError, match=r"column prompt: got no column task_index, expected one; .* leave one task"):
        EpisodeIndex.build(truth.name)
    (truth.root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 4, "task": TASKS[0]}))
    check_read(replace(truth, tasks=[TASKS[0]] * 4), EpisodeIndex.build(truth.name), [0, 1, 2, 3])


ONE_BAD = {  # in row 5 of file-001.parquet, of episode 2: kind, what is done, what the message says
    "timestamp": ("v3.0", value("timestamp", 5, 9.9), "row 6, column timestamp: got 0.6 s, 9.9 s in the row before"),
    "endless time": ("v3.0-video", value("timestamp", 5, 1e38), "row 5, column timestamp: got 1e+38 s"),
    "null time": ("v3.0", value("timestamp", 5, None), "row 5, column timestamp: got nan s"),
    "frame_index": ("v3.0", value("frame_index", 5, 77), "row 5, column frame_index: got 77, expected 5"),
    "episode_index": ("v3.0", value("episode_index", 5, 3), "row 5, column episode_index: got 3, expected 2"),
    "unknown episode": ("v3.0", value("episode_index", 0, 99), "row 0, column episode_index: got 99, expected 2"),
    "null episode": ("v3.0", value("episode_index", 5, None), "row 5, column episode_index: got nan, expected 2"),
    "task_index": ("v3.0", value("task_index", 5, 9), "row 5, column prompt: got null"),
    "null task": ("v3.0", value("task_index", 5, None), "row 5, column prompt: got null"),
    "nan": ("v3.0", value("action", 5, [np.nan, 0.0]), "row 5, column action: dimension 0 is nan"),
    "short": ("v3.0", value("action", 5, [1.0]), "row 5, column action: got 1 numbers, expected 2"),
    "pointer": (
        "v3.0",
        value("observation.images.front", 5, {"bytes": POINTER + b"\noid sha256:0\nsize 9\n", "path": None}),
        "(it is a pointer of git-lfs, not the file: run `git lfs pull`",
    ),
    "picture": ("v3.0", value("observation.images.front", 5, {"bytes": b"x", "path": None}), "row 5, column image_1_bytes: "),
    "rows are gone": (
        "v3.0",
        lambda root: edit_table(root / "data/chunk-000/file-001.parquet", lambda c: [values.pop(5) for values in c.values()]),
        "row 0: got 8 rows, expected 9, the length of episode 2",
    ),
    "time of the next episode": (
        "v3.0-video",
        value("timestamp", 8, 0.9),
        "row 8, column timestamp: got 0.9 s, expected it within",
    ),
    "video is gone": (
        "v3.0-video",
        column("videos/observation.images.front/file_index", lambda _: pa.array([0, 0, None, 1]), EPISODES),
        "row 0, column image_1_bytes: got no video",
    ),
    **{
        f"begin in the video is {begin}": (
            "v3.0-video",
            column(BEGIN, lambda _, begin=begin: pa.array([0, 0.5, begin, 0.9]), EPISODES),
            "(no file_index or from_timestamp in meta/episodes)",
        )
        for begin in (None, -3.0)
    },
    "name of a picture": (
        "v3.0",
        value("observation.images.front", 5, {"bytes": None, "path": "a\0.png"}),
        "row 5, column image_1_bytes: ",
    ),
}


@pytest.mark.parametrize("name", ONE_BAD)
def test_bad_value_leaves_out_its_episode_only(copy: Callable[[str], Truth], name: str, capsys) -> None:
    kind, change, message = ONE_BAD[name]
    truth = copy(kind)
    change(truth.root)
    assert main(["data", "check", truth.name]) == 1
    assert message in capsys.readouterr().out
    rows = LENGTHS[2] - (name == "rows are gone")
    listed = json.loads(Path("excluded_episodes.json").read_text())["episodes"]
    assert [(one["first_row"], one["rows"], one["episode"]) for one in listed] == [(0, rows, 0)]
    check_read(truth, EpisodeIndex.build(truth.name, exclude=load_exclusions("excluded_episodes.json")), [0, 1, 3])
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=re.escape(message)):
            check_read(truth, EpisodeIndex.build(truth.name), [0, 1, 2, 3])


def test_episodes_with_one_begin_in_a_video_are_all_left_out(copy: Callable[[str], Truth], capsys) -> None:
    truth = copy("v3.0-video")
    column(BEGIN, lambda _: pa.array([0.3, 0.3, 0, 0.9]), EPISODES)(truth.root)
    assert main(["data", "check", truth.name]) == 1
    out = capsys.readouterr().out
    for row in (0, LENGTHS[0]):
        assert f"row {row}, column image_1_bytes: got the from_timestamp of another episode in " in out
    exclude = load_exclusions("excluded_episodes.json")
    check_read(truth, EpisodeIndex.build(truth.name, exclude=exclude), [2, 3])


OTHER_TYPES: dict[str, Callable[[pa.ChunkedArray], Any] | None] = {
    "gone": None,
    "null": lambda old: pa.nulls(len(old)),
    "text": lambda old: pa.array(["x"] * len(old)),
    "texts": lambda old: pa.array([["1", "2"]] * len(old)),
    "float": lambda old: pa.array(np.arange(len(old)) + 0.5),
    "largest numbers": lambda old: pa.array([2**64 - 1] * len(old), pa.uint64()),
    "empty lists": lambda old: pa.array([[]] * len(old), pa.list_(pa.int64())),
    "struct": lambda old: pa.array([{"bytes": 1, "path": 2}] * len(old)),
    "date": lambda old: pa.array([0] * len(old), pa.timestamp("s")),
}
DATA = "data/chunk-000/file-000.parquet"
RETYPED = [(table, kind) for kind in OTHER_TYPES for table in (DATA, EPISODES) if table == DATA or kind in ("gone", "texts")]


@pytest.mark.parametrize(("table", "kind"), RETYPED)
def test_column_that_is_missing_or_of_another_type_is_no_internal_error(
    copy: Callable[[str], Truth], table: str, kind: str, capsys
) -> None:
    truth = copy("v3.0-video" if table == EPISODES else "v3.0")
    path = truth.root / table
    content = path.read_bytes()
    for name in pq.read_schema(path).names:
        column(name, OTHER_TYPES[kind], table)(truth.root)
        check_commands(truth.name, capsys)
        path.write_bytes(content)


@pytest.mark.parametrize("entry", [None, "x"], ids=str)
def test_entry_of_metadata_of_another_kind_is_no_internal_error(
    copy: Callable[[str], Truth], written: dict[str, Truth], entry: Any, capsys
) -> None:
    truth = copy("v3.0")
    content = json.loads((truth.root / "meta/info.json").read_text())
    feature = content["features"]["observation.state"]
    changes = [{**content, key: entry} for key in content]
    changes += [{**content, "features": {**content["features"], key: entry}} for key in content["features"]]
    changes += [
        {**content, "features": {**content["features"], "observation.state": {**feature, key: entry}}} for key in feature
    ]
    for change in changes:
        (truth.root / "meta/info.json").write_text(json.dumps(change))
        check_commands(truth.name, capsys)


def check_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`data check` and `data info` read the data, or say why not."""
    for command, statuses in (("check", (0, 1, 2)), ("info", (0, 2))):
        assert main(["data", command, name]) in statuses
        assert "internal error" not in capsys.readouterr().err
