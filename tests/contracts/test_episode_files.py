"""What index, readers and `data check` ask of an episode file holds for every format: the same episodes, written in each."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from lerobot_sets import CAMERAS, LENGTHS, Truth, edit_table, encode, write_set
from paligemma_vla import schema
from paligemma_vla.data.convert import read_episodes
from paligemma_vla.data.doctor import CheckOptions, diagnose
from paligemma_vla.data.faults import Unusable
from paligemma_vla.data.formats import EpisodeFile, identify_file, open_file, read_columns, read_layout
from paligemma_vla.data.index import EpisodeIndex, ExclusionList, find_flags, load_exclusions, read_flags
from paligemma_vla.data.reader import EpisodeReader, iterate_numbers
from paligemma_vla.data.video import VideoDecoders
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import DataError, VLAError
from paligemma_vla.schema import DatasetMetadata, Episode

METADATA = DatasetMetadata(
    robot="toy arm", cameras=CAMERAS, state_names=("x", "y", "z"), action_names=("dx", "dy"), control_hz=10.0
)
FORMATS = ("parquet", "url", "lerobot-v3.0-video", "lerobot-v3.0-image", "lerobot-v2.1-video", "lerobot-v2.1-image")
IN_LAST_FILE = {2: 2, 4: 1}  # episodes in the last of so many files
IMAGE_COLUMNS = [schema.image_column(number + 1) for number in range(len(CAMERAS))]


@dataclass(frozen=True)
class Data:
    """name: of the data, as in a configuration. folder: where its files lie on this machine (those of a URL are copied)."""

    name: str
    folder: Path
    truth: Truth

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0] if ":" in self.name else "parquet"

    def at(self, folder: Path) -> Data:
        """A copy in another folder."""
        shutil.copytree(self.folder, folder)
        copy = replace(self, folder=folder, name={"parquet": str(folder), "lerobot": f"lerobot:{folder}"}.get(self.kind, ""))
        return replace(copy, name=upload(folder)) if self.kind == "memory" else copy

    def refresh(self) -> None:
        """Make what was changed in the folder known where the data is read."""
        if self.kind == "memory":
            upload(self.folder)


def upload(folder: Path) -> str:
    """The files of a folder in fsspec's store in memory."""
    for path in folder.glob("*.parquet"):
        fsspec.filesystem("memory").pipe(f"/{folder}/{path.name}", path.read_bytes())
    return f"memory:/{folder}"


def write_native(folder: Path, truth: Truth, change: Callable[[Episode], Episode] = lambda episode: episode) -> None:
    """The episodes of `write_set` as EpisodeWriter writes them, two to a file, after a change of each."""
    with EpisodeWriter(folder, METADATA, episodes_per_file=2) as writer:
        starts = np.cumsum([0, *LENGTHS])
        for number, (start, stop) in enumerate(pairwise(starts.tolist())):
            images = [list(truth.stored[camera][start:stop]) for camera in CAMERAS]
            action, task = truth.action[number], truth.tasks[number]
            writer.write(change(Episode(images, truth.state[number], action, task, truth.success[number])))


@pytest.fixture(scope="module", params=FORMATS)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("contract") / "toy"
    form, _, rest = request.param.partition("-")
    if form == "lerobot":
        version, _, kind = rest.partition("-")
        return Data(f"lerobot:{folder}", folder, write_set(folder, version, kind == "video"))
    truth = write_set(folder.with_name("lerobot"), "v2.1", video=False)
    write_native(folder, truth)
    return Data(upload(folder) if form == "url" else str(folder), folder, truth)


@pytest.fixture
def index(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EpisodeIndex:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return EpisodeIndex.build(data.name)


def column(file: EpisodeFile, name: str) -> list[object]:
    return list(read_columns(file, [name])[name].to_pylist())


def test_rows_are_those_that_were_written(data: Data, index: EpisodeIndex) -> None:
    truth, last = data.truth, np.cumsum(LENGTHS) - 1
    found: dict[str, list[object]] = {name: [] for name in (schema.STATE, schema.ACTION, schema.PROMPT, *schema.FLAGS)}
    for path in index.paths:
        with open_file(path) as file:
            assert set(file.columns) == {*found, *IMAGE_COLUMNS}
            for name in found:
                found[name] += column(file, name)
    assert np.array_equal(np.array(found[schema.STATE], np.float32), np.concatenate(truth.state))
    assert np.array_equal(np.array(found[schema.ACTION], np.float32), np.concatenate(truth.action))
    assert found[schema.PROMPT] == [task for task, length in zip(truth.tasks, LENGTHS, strict=True) for _ in range(length)]
    assert np.flatnonzero(found[schema.IS_FIRST]).tolist() == [0, *(last[:-1] + 1)]
    assert np.flatnonzero(found[schema.IS_LAST]).tolist() == last.tolist()
    assert np.flatnonzero(found[schema.IS_TERMINAL]).tolist() == [
        row for row, won in zip(last, truth.success, strict=True) if won
    ]


def test_row_groups_and_batches_are_parts_of_the_columns(data: Data, index: EpisodeIndex) -> None:
    names = [schema.STATE, schema.PROMPT, schema.IS_LAST]
    for path in index.paths:
        with open_file(path) as file, open_file(path, stream=True) as stream:
            every = read_columns(file, names)
            groups = range(len(file.bounds) - 1)
            assert every.num_rows == file.bounds[-1]
            for group, (first, stop) in enumerate(pairwise(file.bounds.tolist())):
                assert next(file.read_groups(names, [group])).to_pylist() == every.slice(first, stop - first).to_pylist()
            numbers, batches = zip(*stream.batches(names, groups, 3), strict=True)
            assert np.concatenate(numbers).tolist() == list(range(every.num_rows))
            assert max(batch.num_rows for batch in batches) <= 3
            assert pa.Table.from_batches(batches).to_pylist() == every.to_pylist()


def test_pictures_are_those_that_were_written(data: Data, index: EpisodeIndex) -> None:
    for camera, name in zip(CAMERAS, IMAGE_COLUMNS, strict=True):
        pixels, stored = [], []
        for path in index.paths:
            with open_file(path) as file:
                pictures = file.pictures(read_columns(file, [name])[name].combine_chunks(), VideoDecoders())
                rows = range(int(file.bounds[-1]))
                assert all(map(pictures.present, rows))
                pixels += [np.asarray(pictures.decode(row)) for row in rows]
                stored += [pictures.encoded(row) for row in rows]
        assert all(map(np.array_equal, pixels, data.truth.pixels[camera]))
        assert stored == (data.truth.stored[camera] or [None] * len(pixels))


def pixels(index: EpisodeIndex, camera: int) -> list[np.ndarray]:
    """Pictures of one camera, of all episodes."""
    recordings = read_episodes(index, range(len(CAMERAS)), range(len(index)))
    return [one.decode() for recording in recordings for one in recording.pictures[camera] if one is not None]


def add_strangers(folder: Path) -> None:
    """What other programs leave beside the files of a data set: copies and pieces of them."""
    for path in sorted(folder.rglob("*.parquet")):
        for name in (".ipynb_checkpoints", ".Trash-1000/files", ".cache/huggingface/download", "$RECYCLE.BIN/S-1", "@eaDir"):
            (path.parent / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, path.parent / name)
        (path.parent / "__MACOSX").mkdir(exist_ok=True)
        for name in (f"._{path.name}", f"__MACOSX/{path.name}"):
            (path.parent / name).write_bytes(b"\0\5\x16\7")


def link_folders(folder: Path, target: Path) -> None:
    """A folder of links to what the other holds, and links in all folders that lead back."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    for path in [target, *(path for path in folder.rglob("*") if path.is_dir())]:
        (path / "back").symlink_to(target)


def link_deep_folders(folder: Path, target: Path) -> None:
    """The innermost folders are links."""
    for path in [path for path in folder.rglob("*") if path.is_dir() and not any(one.is_dir() for one in path.iterdir())]:
        inner = target / path.relative_to(folder)
        inner.parent.mkdir(parents=True, exist_ok=True)
        inner.symlink_to(path)
    for path in [path for path in folder.rglob("*") if path.is_file() and not (target / path.relative_to(folder)).exists()]:
        (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.relative_to(folder))


def link_blobs(folder: Path, target: Path) -> None:
    """A snapshot in a cache of the hub: every file is a link into a folder of contents."""
    (target.parent / "blobs").mkdir()
    for number, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
        shutil.move(path, target.parent / "blobs" / str(number))
        link = target / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target.parent / "blobs" / str(number), link.parent))


@pytest.mark.parametrize("link", [link_folders, link_deep_folders, link_blobs])
def test_links_and_strangers_change_nothing(
    data: Data, index: EpisodeIndex, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    hidden = tmp_path / ".cache" / "huggingface" / "datasets--me--toy" / "snapshots"
    hidden.mkdir(parents=True)
    source, target = tmp_path / "source", hidden / "abc"  # the folder that was named may be hidden
    copy = data.at(source)
    if copy.kind == "memory":
        store = fsspec.filesystem("memory")
        for path in source.glob("*.parquet"):
            for name in (f"._{path.name}", f".cache/{path.name}", f"__MACOSX/{path.name}"):
                store.pipe(f"/{source}/{name}", path.read_bytes())
        name = copy.name
    else:
        link(source, target)
        add_strangers(target)
        name = copy.name.replace(str(source), str(target))
    linked = EpisodeIndex.build(name)
    assert (linked.fingerprint, linked.length.tolist()) == (index.fingerprint, list(LENGTHS))
    for number, camera in enumerate(CAMERAS):
        assert all(map(np.array_equal, pixels(linked, number), data.truth.pixels[camera]))
    diagnosis = diagnose(linked.paths, CheckOptions(), lambda size: None)
    assert (diagnosis.faults, diagnosis.copies) == ([], [])


@pytest.mark.parametrize("name", ["run:3", "b\udcff", "数据 [1]*"])
def test_any_name_of_a_folder_will_do(
    data: Data, index: EpisodeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also one with a colon, which is no URL, and one that is not UTF-8."""
    if data.kind == "memory":
        pytest.skip("a URL has no relative path")
    monkeypatch.chdir(tmp_path)
    copy = data.at(Path(name))
    found = EpisodeIndex.build(copy.name)
    assert found.fingerprint == index.fingerprint
    for number, camera in enumerate(CAMERAS):
        assert all(map(np.array_equal, pixels(found, number), data.truth.pixels[camera]))
    assert diagnose(found.paths, CheckOptions(), lambda size: None).faults == []


def test_layout_says_cameras_dimensions_names_and_rate(data: Data, index: EpisodeIndex) -> None:
    assert index.layout == schema.Layout(cameras=2, state_dim=3, action_dim=2, metadata=METADATA)
    for path in index.paths:
        with open_file(path) as file:
            assert read_layout(file) == index.layout


def test_flags_that_a_footer_gives_are_those_of_the_rows(index: EpisodeIndex) -> None:
    for path in index.paths:
        with open_file(path) as file:
            found, expected = find_flags(file), read_flags(file)
            assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in vars(expected))


def test_reader_takes_rows_in_any_order_and_after_pickling(data: Data, index: EpisodeIndex) -> None:
    reader = pickle.loads(pickle.dumps(EpisodeReader(index, 2, 2**14)))  # noqa: S301 - what a loader's worker gets
    order = np.random.default_rng(0).permutation(sum(LENGTHS))
    starts, state = np.cumsum([0, *LENGTHS]), np.concatenate(data.truth.state)
    for row in [*order.tolist(), 3, 3, 2, 4]:
        episode = int(np.searchsorted(starts, row, side="right")) - 1
        group, slot = reader.group_of(int(index.file[episode]), int(index.start[episode]) + row - int(starts[episode]))
        assert np.array_equal(group.state[slot], state[row])
        for pictures, camera in zip(group.images, CAMERAS, strict=True):
            assert np.array_equal(np.asarray(pictures.decode(slot)), data.truth.pixels[camera][row])


def test_numbers_are_streamed_without_pictures(data: Data, index: EpisodeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideoDecoders, "frame", None)
    parts = [part for file in range(len(index.paths)) for part in iterate_numbers(index, file, 3)]
    state, action = (np.concatenate(values) for values in zip(*parts, strict=True))
    assert np.array_equal(state, np.concatenate(data.truth.state))
    assert np.array_equal(action, np.concatenate(data.truth.action))


def test_check_finds_nothing_in_good_data(data: Data, index: EpisodeIndex) -> None:
    done: list[int] = []
    diagnosis = diagnose(index.paths, CheckOptions(), done.append)
    assert (diagnosis.faults, diagnosis.excluded) == ([], [])
    assert (diagnosis.episodes, diagnosis.steps) == (len(LENGTHS), sum(LENGTHS))
    assert sum(done) == sum(identify_file(path)[0] for path in index.paths)


def test_identity_and_digest_stay_until_the_content_changes(data: Data, index: EpisodeIndex, tmp_path: Path) -> None:
    """The digest is of the content, wherever it lies; the identity of a file is that of all that belongs to it."""
    for path in index.paths:
        with open_file(path) as file:
            assert file.identity() == identify_file(path)
    copy = data.at(tmp_path / "elsewhere")
    copied = EpisodeIndex.build(copy.name)
    assert copied.fingerprint == index.fingerprint
    for change in changes(copy):
        indexed = EpisodeIndex.build(copy.name)
        change()
        copy.refresh()
        with pytest.raises(DataError, match="changed since it was indexed"):
            [indexed.check_unchanged(file) for file in range(len(indexed.paths))]
        assert EpisodeIndex.build(copy.name).fingerprint != indexed.fingerprint


def changes(data: Data) -> list[Callable[[], object]]:
    """Changes of what belongs to a data set, each of which makes other training data of it."""

    def write_anew(change: Callable[[Episode], Episode]) -> Callable[[], None]:
        def write() -> None:
            shutil.rmtree(data.folder)
            write_native(data.folder, data.truth, change)

        return write

    if data.kind != "lerobot":  # the same numbers and pictures in another order too
        return [
            write_anew(lambda episode: replace(episode, action=episode.action + 1)),
            write_anew(lambda episode: replace(episode, action=episode.action[::-1])),
            write_anew(lambda episode: replace(episode, images=[images[::-1] for images in episode.images])),
        ]
    table = sorted(data.folder.glob("data/*/*.parquet"))[0]

    def other_action() -> None:
        edit_table(table, lambda columns: columns["action"].__setitem__(0, [9.0, 9.0]))

    def other_task() -> None:
        path = next(data.folder.glob("meta/tasks.*"))
        if path.suffix == ".jsonl":
            path.write_text(path.read_text().replace("open", "shut"))
        else:
            edit_table(path, lambda columns: columns["__index_level_0__"].__setitem__(0, "shut the drawer"))

    def other_frame() -> None:
        path = next(data.folder.rglob("*.mp4"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def other_picture() -> None:
        image = {"bytes": encode(np.zeros((8, 8, 3), np.uint8)), "path": None}
        edit_table(table, lambda columns: columns["observation.images.front"].__setitem__(0, image))

    return [other_action, other_task, other_frame if list(data.folder.rglob("*.mp4")) else other_picture]


def test_file_that_is_gone_is_named(data: Data, index: EpisodeIndex, tmp_path: Path) -> None:
    copy = data.at(tmp_path / "elsewhere")
    indexed = EpisodeIndex.build(copy.name)
    for path in copy.folder.rglob("*.parquet"):
        if path.parent.name != "meta" and "episodes" not in path.parts:
            path.unlink()
    if copy.kind == "memory":
        fsspec.filesystem("memory").rm(f"/{copy.folder}", recursive=True)
    with pytest.raises(DataError, match="gone since it was indexed"):
        indexed.check_unchanged(0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def put_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(cut, "its footer is missing: the recording was not finalized"), (put_pointer, "a pointer of git-lfs, .* `git lfs pull`")],
)
@pytest.mark.parametrize("kind", ["parquet", "mp4"])
def test_file_that_is_not_all_there_is_left_out_and_the_others_stay(
    data: Data, index: EpisodeIndex, tmp_path: Path, damage: Callable[[Path], None], reason: str, kind: str
) -> None:
    copy = data.at(tmp_path / "elsewhere")
    files = sorted(path for path in copy.folder.rglob(f"*.{kind}") if "meta" not in path.parts)
    if not files:
        pytest.skip("this format has no videos")
    paths = EpisodeIndex.build(copy.name).paths
    damage(files[-1])
    copy.refresh()
    diagnosis = diagnose(paths, CheckOptions(), lambda size: None)
    assert all(re.search(reason, fault.text) for fault in diagnosis.faults)
    ExclusionList(str(tmp_path / "list.json"), diagnosis.excluded).save()
    usable = EpisodeIndex.build(copy.name, exclude=load_exclusions(str(tmp_path / "list.json")))
    assert 0 < len(usable) == len(LENGTHS) - IN_LAST_FILE[len(paths)]
    state = [values for file in range(len(usable.paths)) for values, _ in iterate_numbers(usable, file, 3)]
    assert np.array_equal(np.concatenate(state), np.concatenate(data.truth.state[: len(usable)]))


@pytest.mark.parametrize("seed", range(6))
def test_damaged_file_is_read_or_refused(data: Data, index: EpisodeIndex, tmp_path: Path, seed: int) -> None:
    """Bytes changed or cut off anywhere in the data files: an error names the file, and nothing else comes out."""
    rng = np.random.default_rng(seed)
    copy = data.at(tmp_path / "damaged")
    for path in copy.folder.rglob("*.parquet"):
        content = bytearray(path.read_bytes())
        for place in rng.integers(0, len(content), rng.integers(1, 20)):
            content[place] = rng.integers(256)
        path.write_bytes(content[: rng.integers(len(content))] if rng.random() < 0.2 else content)
    copy.refresh()
    try:
        damaged = EpisodeIndex.build(copy.name)
        reader = EpisodeReader(damaged, 2, 2**20)
        for file, start, length in zip(damaged.file.tolist(), damaged.start.tolist(), damaged.length.tolist(), strict=True):
            for row in range(start, start + length):
                group, slot = reader.group_of(file, row)
                [pictures.decode(slot) for pictures in group.images if pictures is not None and pictures.present(slot)]
    except (VLAError, Unusable) as error:
        assert len(str(error)) < 1500
