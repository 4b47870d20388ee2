"""Which columns of a LeRobot data set are cameras, state, action and instruction, and what the selection says of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lerobot_sets import (
    CAMERAS,
    FPS,
    HEIGHT,
    LENGTHS,
    TASKS,
    WIDTH,
    Truth,
    add_feature,
    edit_json,
    edit_table,
    encode,
    picture,
    write_set,
)
from paligemma_vla.cli.main import main
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.convert import Recording, read_episodes
from paligemma_vla.data.doctor import CheckOptions, diagnose
from paligemma_vla.data.faults import Kind
from paligemma_vla.data.formats import open_file
from paligemma_vla.data.index import EpisodeIndex, expand_paths
from paligemma_vla.data.statistics import compute_statistics
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
    assert np.array_equal(recording.pictures[0][4].decode(), picture(0, 2, 4))
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
    assert np.array_equal(recording.pictures[0][2].decode(), np.repeat(grey[..., None], 3, axis=2))


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


def add_numbers(truth: Truth, key: str, shape: list[int], names: Any = None, kind: str = "f4") -> np.ndarray:
    """A feature of random numbers; returns them as they are stored (R, *shape)."""
    values = (np.random.default_rng(len(key)).normal(size=(sum(LENGTHS), *shape)) * 9).astype(kind)
    starts = np.cumsum([0, *LENGTHS])
    feature = {"dtype": str(values.dtype), "shape": shape, "names": names}
    add_feature(truth, key, feature, lambda episode: pa.array(values[starts[episode] : starts[episode + 1]].tolist()))
    return values


JOINED: list[tuple[str, list[str], list[str]]] = [  # what is asked for, the features, names of the numbers
    ("arm+grip", ["arm", "grip"], ["x", "y", "w", "grip"]),
    ("grip+arm", ["grip", "arm"], ["grip", "x", "y", "w"]),
    (
        "observation.state+arm",
        ["observation.state", "arm"],
        ["observation.state.x", "observation.state.y", "z", "arm.x", "arm.y", "w"],
    ),
    ("pose+one", ["pose", "one"], ["pose[0,0]", "pose[0,1]", "pose[1,0]", "pose[1,1]", "one[0]", "one[1]"]),
    ("pose", ["pose"], ["pose[0,0]", "pose[0,1]", "pose[1,0]", "pose[1,1]"]),
    ("left+right", ["left+right"], []),
]


@pytest.fixture
def parts(truth: Truth) -> tuple[Truth, dict[str, np.ndarray]]:
    """A set whose numbers are in many columns, and the numbers in each (R, n)."""
    arrays = {
        "arm": add_numbers(truth, "arm", [3], {"motors": ["x", "y", "w"]}),
        "grip": add_numbers(truth, "grip", [], kind="i8"),
        "pose": add_numbers(truth, "pose", [2, 2], ["row", "column"], kind="f8"),
        "one": add_numbers(truth, "one", [1, 2]),
        "left+right": add_numbers(truth, "left+right", [2]),
        "observation.state": np.concatenate(truth.state),
    }
    return truth, {key: values.reshape(sum(LENGTHS), -1) for key, values in arrays.items()}


@pytest.mark.parametrize(("asked", "keys", "names"), JOINED, ids=[one[0] for one in JOINED])
def test_state_and_action_are_columns_joined_in_the_order_asked_for(
    parts: tuple[Truth, dict[str, np.ndarray]], asked: str, keys: list[str], names: list[str], tmp_path: Path
) -> None:
    truth, arrays = parts
    expected = np.hstack([arrays[key] for key in keys]).astype(np.float32)
    name = f"{truth.name}?state={asked}&action=action+{asked}"
    index = EpisodeIndex.build(name)
    assert list(index.layout.metadata.state_names) == names
    assert (index.layout.state_dim, index.layout.action_dim) == (expected.shape[1], expected.shape[1] + 2)
    recordings = read_all(name)
    assert np.array_equal(np.concatenate([one.state for one in recordings]), expected)
    assert np.array_equal(np.concatenate([one.action for one in recordings])[:, 2:], expected)
    statistics = compute_statistics(index, "test")
    assert np.array_equal(statistics.state.max, expected.max(axis=0))
    assert main(["data", "convert", "--input", name, "--output_dir", str(tmp_path / "native"), "--workers", "0"]) == 0
    converted = EpisodeIndex.build(str(tmp_path / "native"))
    assert converted.layout == index.layout
    assert converted.layout.metadata.extra.get("state_columns") == (None if names == [] else asked)
    assert np.array_equal(np.concatenate([one.state for one in read_all(str(tmp_path / "native"))]), expected)


def test_selection_of_columns_is_part_of_what_the_data_is(parts: tuple[Truth, dict[str, np.ndarray]]) -> None:
    name = parts[0].name
    asked = ["", "?state=observation.state&action=action", "?state=arm+grip", "?state=grip+arm", "?action=arm+grip"]
    prints = [EpisodeIndex.build(name + one).fingerprint for one in asked]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "state=arm+claw",
            r"features.claw: got no 'claw', expected .*name others: \?state=FEATURE\+FEATURE; known: .*grip",
        ),
        ("state=arm+observation.images.front", "features.observation.images.front: got dtype image"),
        ("state=arm+", "features.: got no ''"),
        ("action=arm+grip+arm", r"action=arm\+grip\+arm: got a column twice, expected each once"),
    ],
)
def test_columns_that_cannot_be_joined_are_told(parts: tuple[Truth, Any], asked: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        EpisodeIndex.build(f"{parts[0].name}?{asked}")


def test_rows_of_numbers_are_joined_only_when_asked_for(truth: Truth) -> None:
    edit_json(truth.root / "meta/info.json", lambda info: info["features"].pop("observation.state"))
    for path in truth.root.glob("data/*/*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("observation.state"), path)
    values = add_numbers(truth, "observation.state", [2, 3])
    remedy = r"shape \[2, 3\], expected one row of numbers; to have its rows joined, ask: \?state=observation.state"
    with pytest.raises(DataError, match=remedy):
        EpisodeIndex.build(truth.name)
    state = np.concatenate([one.state for one in read_all(f"{truth.name}?state=observation.state")])
    assert np.array_equal(state, values.reshape(-1, 6))


def test_part_that_is_too_short_is_a_fault_of_its_row(parts: tuple[Truth, Any]) -> None:
    truth, _ = parts
    path = truth.root / "data/chunk-000/episode_000002.parquet"
    edit_table(path, lambda columns: columns["arm"].__setitem__(4, [1.0]))
    edit_table(path, lambda columns: columns["grip"].__setitem__(5, None))
    diagnosis = diagnose(expand_paths(f"{truth.name}?state=arm+grip", "test"), CheckOptions(), lambda size: None)
    found = [(fault.row, fault.column, fault.text.partition(";")[0]) for fault in diagnosis.faults]
    assert found == [
        (4, "state", "got 1 numbers, expected 4 numbers"),
        (5, "state", "dimension 3 is nan, expected a finite float32"),
    ]


def rows_of(style: str, *texts: tuple[float, str | None]) -> list[dict[str, Any]]:
    """Entries of a column of dtype `language`, with the times they begin at."""
    return [{"role": "assistant", "content": text, "style": style, "timestamp": time, "camera": None} for time, text in texts]


def add_language(truth: Truth, key: str, entries: Callable[[int, int], list[dict[str, Any]]]) -> None:
    """A column of texts by style. entries: of a row, by episode and step."""
    add_feature(
        truth,
        key,
        {"dtype": "language", "shape": [1], "names": None},
        lambda episode: pa.array([entries(episode, step) for step in range(LENGTHS[episode])]),
    )


def prompts(name: str) -> list[list[str]]:
    return [one.prompts for one in read_all(name)]


@pytest.fixture
def annotated(truth: Truth) -> Truth:
    """Ten steps a second. A subtask begins at step 1 and another at step 3; episode 1 has the first one only."""
    later = [(np.float32(0.3), "pull"), (np.float32(0.1), "reach")]  # in any order
    plan = rows_of("plan", (0.0, "reach, then pull"))

    def persistent(episode: int, step: int) -> list[dict[str, Any]]:
        return [*plan, *rows_of("subtask", *(later[1:] if episode == 1 else later)), *rows_of("subtask", (0.0, None))]

    def events(episode: int, step: int) -> list[dict[str, Any]]:
        entries = rows_of("interjection", (0.0, "stop")) if step == 2 else rows_of("vqa", (0.0, "how many?"))
        return [{name: value for name, value in entry.items() if name != "timestamp"} for entry in entries]

    add_language(truth, "language_persistent", persistent)
    add_language(truth, "language_events", events)
    text = {"dtype": "string", "shape": [1], "names": None}
    add_feature(truth, "caption", text, lambda episode: pa.array([f"step {step}" for step in range(LENGTHS[episode])]))
    whole = {"dtype": "int64", "shape": [1], "names": None}
    for key in ("subtask_index", "annotation.task"):
        add_feature(truth, key, whole, lambda episode: pa.array([step % 2 for step in range(LENGTHS[episode])]))
    names = pa.table({"subtask_index": [0, 1], "__index_level_0__": ["lift", "lower"]})
    pq.write_table(names, truth.root / "meta/subtasks.parquet")
    return truth


def in_force(task: str, step: int, episode: int) -> str:
    return task if step < 1 else "reach" if step < 3 or episode == 1 else "pull"


EXPECTED: list[tuple[str, Callable[[str, int, int], str]]] = [  # by task, step, episode
    ("caption", lambda task, step, episode: f"step {step}"),
    ("subtask_index", lambda task, step, episode: ("lift", "lower")[step % 2]),
    ("annotation.task", lambda task, step, episode: TASKS[step % 2]),
    ("task_index", lambda task, step, episode: task),
    ("language_persistent", in_force),
    ("language_persistent:subtask", in_force),
    ("language_persistent:plan", lambda task, step, episode: "reach, then pull"),
    ("language_events:vqa", lambda task, step, episode: "how many?" if step != 2 else task),
]


@pytest.mark.parametrize(("asked", "expected"), EXPECTED, ids=[one[0] for one in EXPECTED])
def test_instruction_of_a_row_is_that_of_the_column_asked_for(
    annotated: Truth, asked: str, expected: Callable[[str, int, int], str]
) -> None:
    name = f"{annotated.name}?prompt={asked}"
    wanted = [
        [expected(task, step, episode) for step in range(LENGTHS[episode])] for episode, task in enumerate(annotated.tasks)
    ]
    assert prompts(name) == wanted
    index = EpisodeIndex.build(name)
    assert index.layout.metadata.extra == {"prompt_column": asked}
    assert index.fingerprint != EpisodeIndex.build(annotated.name).fingerprint
    diagnosis = diagnose(index.paths, CheckOptions(), lambda size: None)
    assert diagnosis.faults == []


def test_texts_are_those_in_force_without_timestamps_too(annotated: Truth) -> None:
    for path in annotated.root.glob("data/*/*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("timestamp"), path)
    assert prompts(f"{annotated.name}?prompt=language_persistent")[2] == [in_force(TASKS[0], step, 2) for step in range(9)]


def test_texts_of_subtasks_are_part_of_what_the_data_is(annotated: Truth) -> None:
    names = [f"{annotated.name}?prompt=subtask_index", annotated.name]
    before = [EpisodeIndex.build(name).fingerprint for name in names]
    edit_table(annotated.root / "meta/subtasks.parquet", lambda columns: columns["__index_level_0__"].__setitem__(0, "raise"))
    after = [EpisodeIndex.build(name).fingerprint for name in names]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("subtask", r"prompt: got no 'subtask', expected a column of texts, .*did you mean 'subtask_index'"),
        (
            "observation.images.front",
            r"column prompt: observation.images.front: got type struct.*name another with \?prompt=COLUMN",
        ),
        (
            "language_persistent:memory",
            r"got no text of style memory, expected of plan, subtask; .*\?prompt=language_persistent:STYLE",
        ),
        ("calls", r"column prompt: calls: got type list.*lists of texts by style"),
    ],
)
def test_column_without_instructions_is_told(annotated: Truth, asked: str, message: str) -> None:
    add_language(annotated, "calls", lambda episode, step: [{"role": "assistant", "content": None, "style": None}])
    with pytest.raises(DataError, match=message):
        EpisodeIndex.build(f"{annotated.name}?prompt={asked}")


def test_episode_without_a_text_and_empty_texts_are_faults_of_their_rows(annotated: Truth) -> None:
    path = annotated.root / "data/chunk-000/episode_000001.parquet"
    edit_table(path, lambda columns: columns.update(language_persistent=[[]] * LENGTHS[1], caption=["", "go"]))
    found = [
        [(Path(fault.file).name.partition("?")[0], fault.row, fault.kind) for fault in diagnosis.faults]
        for column in ("language_persistent", "caption")
        for diagnosis in [
            diagnose(expand_paths(f"{annotated.name}?prompt={column}", "test"), CheckOptions(), lambda size: None)
        ]
    ]
    assert found[1] == [("episode_000001.parquet", 0, Kind.PROMPT)]
    assert found[0] == [("episode_000001.parquet", None, Kind.PROMPT)]
