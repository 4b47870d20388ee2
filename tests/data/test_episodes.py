"""The index against a naive grouping of all rows; every broken file is refused with file, row and column."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episode_files import Columns, columns, flags, put, write

from paligemma_vla.data.formats import open_file, read_layout
from paligemma_vla.data.index import EpisodeIndex, Excluded, ExclusionList, expand_paths
from paligemma_vla.data.reader import EpisodeReader, iterate_numbers
from paligemma_vla.errors import DataError
from support import LENGTHS, METADATA, read_rows


def test_index_equals_a_naive_grouping_by_is_first(episode_dir: Path) -> None:
    index = EpisodeIndex.build(str(episode_dir))
    rows = read_rows(episode_dir)
    expected = []
    for row in rows:
        if row["is_first"]:
            expected.append([row["file"], row["row"], 0])
        expected[-1][2] += 1
    got = [[index.paths[f], s, n] for f, s, n in zip(index.file, index.start, index.length, strict=True)]
    assert got == expected
    assert index.length.tolist() == list(LENGTHS)
    assert (len(index), index.steps) == (len(LENGTHS), len(rows))
    assert (index.layout.cameras, index.layout.state_dim, index.layout.action_dim) == (1, 3, 2)
    assert index.layout.metadata == METADATA


def test_index_never_reads_image_bytes(tmp_path: Path, episode_dir: Path) -> None:
    """Image pages overwritten on disk disturb nothing before an image is asked for."""
    source = sorted(episode_dir.glob("*.parquet"))[0]
    content = bytearray(source.read_bytes())
    footer = pq.read_metadata(source)
    for group in range(footer.num_row_groups):
        column = footer.row_group(group).column(0)
        assert column.path_in_schema == "image_1_bytes"
        start = column.data_page_offset
        content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(content)
    index, whole = EpisodeIndex.build(str(broken)), EpisodeIndex.build(str(source))
    assert index.length.tolist() == whole.length.tolist()
    assert sum(len(state) for state, _ in iterate_numbers(index, 0)) == index.steps
    with pytest.raises(DataError, match=r"broken\.parquet: row 0: row group 0 \(rows 0 to \d+\) cannot be read"):
        EpisodeReader(index, 1, 2**20).group_of(0, 0)


@pytest.mark.parametrize(
    ("change", "message", "bad"),
    [
        (put("is_first", 0, False), "row 0, column is_first: got false", (0, 3)),
        (put("is_first", 2, True), "row 1, column is_last: got false, expected true, because row 2 has is_first", (0, 3)),
        (put("is_first", 4, False), "row 4, column is_first: got false, expected true, because row 3 has is_last", (4, 4)),
        (put("is_last", 2, False), "row 2, column is_last: got false, expected true, because row 3 has is_first", (0, 3)),
        (put("is_last", 5, True), "row 6, column is_first: got false, expected true, because row 5 has is_last", (4, 4)),
        (put("is_last", 7, False), "row 7, column is_last: got false, expected true, because it is the last row", (4, 4)),
        (put("is_first", 3, None), "row 3, column is_first: got null", (3, 1)),
        (put("is_last", 6, None), "row 6, column is_last: got null", (4, 4)),
        (put("is_terminal", 1, True), "row 1, column is_terminal: got true, expected false, because only the last", (0, 3)),
        (put("is_terminal", 2, None), "row 2, column is_terminal: got null", (0, 3)),
    ],
)
def test_broken_chain_names_file_row_and_column_and_is_usable_without_its_bad_episode(
    tmp_path: Path, change: Callable[[Columns], None], message: str, bad: tuple[int, int]
) -> None:
    path = write(tmp_path / "bad.parquet", flags(change))
    with pytest.raises(DataError, match=message) as caught:
        EpisodeIndex.build(path)
    assert str(caught.value).startswith(path)
    index = EpisodeIndex.build(path, "x", ExclusionList("list", [Excluded(os.path.realpath(path), *bad)]))
    whole = [(0, 3), (3, 1), (4, 4)]
    assert list(zip(index.start.tolist(), index.length.tolist(), strict=True)) == [each for each in whole if each != bad]


def test_file_without_rows_is_refused(tmp_path: Path) -> None:
    types = {"prompt": pa.string(), **dict.fromkeys(("is_first", "is_last", "is_terminal"), pa.bool_())}
    path = write(tmp_path / "empty.parquet", {name: [] for name in columns()}, types)
    with pytest.raises(DataError, match="0 rows"):
        EpisodeIndex.build(path)


@pytest.mark.parametrize(
    ("name", "values", "kind", "message"),
    [
        *((name, None, None, "missing; got ") for name in columns((1,))),
        ("image_1_bytes", ["a"] * 8, pa.string(), "got type .*, expected binary"),
        ("state", [[1, 2, 3]] * 8, pa.list_(pa.int64()), "got type .*, expected a list of float"),
        ("action", [1.0] * 8, pa.float32(), "got type .*, expected a list of float"),
        ("prompt", [1] * 8, pa.int64(), "got type .*, expected string"),
        ("is_first", [1] * 8, pa.int8(), "got type .*, expected bool"),
        ("is_terminal", ["no"] * 8, pa.string(), "got type .*, expected bool"),
    ],
)
def test_column_that_is_missing_or_of_another_type_is_named(
    tmp_path: Path, name: str, values: list[Any] | None, kind: pa.DataType, message: str
) -> None:
    content = {column: values if column == name else own for column, own in columns().items()}
    path = write(tmp_path / "x.parquet", {column: own for column, own in content.items() if own is not None}, {name: kind})
    with pytest.raises(DataError, match=f"column {name}: {message}"):
        EpisodeIndex.build(path)


@pytest.mark.parametrize(
    "make", [lambda n: pa.list_(pa.float32()), lambda n: pa.large_list(pa.float64()), lambda n: pa.list_(pa.float32(), n)]
)
def test_every_kind_of_list_reads_the_same(tmp_path: Path, make: Callable[[int], pa.DataType]) -> None:
    content = columns()
    path = write(tmp_path / "x.parquet", content, {"state": make(3), "action": make(2)}, row_group_size=3)
    index = EpisodeIndex.build(path)
    assert (index.layout.state_dim, index.layout.action_dim) == (3, 2)
    numbers = [np.concatenate(parts) for parts in zip(*iterate_numbers(index, 0, rows=3), strict=True)]
    np.testing.assert_array_equal(numbers[0], np.float32(content["state"]))
    np.testing.assert_array_equal(numbers[1], np.float32(content["action"]))
    reader = EpisodeReader(index, 1, 2**20)
    for row in range(8):
        rows, place = reader.group_of(0, row)
        np.testing.assert_array_equal(rows.state[place], np.float32(content["state"][row]))
    np.testing.assert_array_equal(reader.actions(0, 1, 8), np.float32(content["action"][1:8]))


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32())])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state", [1.0, 2.0], r"row 6, column state: got 2 numbers, expected 3"),
        ("action", None, r"row 6, column action: got null, expected 2"),
        ("action", [1.0, float("nan")], r"row 6, column action: dimension 1 is nan"),
        ("state", [1.0, None, 1.0], r"row 6, column state: dimension 1 is nan"),
        ("state", [float("inf"), 0.0, 1.0], r"row 6, column state: dimension 0 is inf"),
    ],
)
def test_bad_numbers_name_file_row_and_column(tmp_path: Path, name: str, value: Any, kind: pa.DataType, message: str) -> None:
    content = flags(put(name, 6, value))
    path = write(tmp_path / "bad.parquet", content, {"state": kind, "action": kind}, row_group_size=4)
    index = EpisodeIndex.build(path)
    with pytest.raises(DataError, match=message) as caught:
        list(iterate_numbers(index, 0, rows=5))
    assert str(caught.value).startswith(path)
    with pytest.raises(DataError, match=message):
        EpisodeReader(index, 1, 2**20).group_of(0, 6)


@pytest.mark.parametrize("keep", [0, 3, 100, -4])
def test_file_cut_short_is_refused(tmp_path: Path, episode_dir: Path, keep: int) -> None:
    source = sorted(episode_dir.glob("*.parquet"))[0].read_bytes()
    path = tmp_path / "cut.parquet"
    path.write_bytes(source[:keep])
    with pytest.raises(DataError, match=r"cut\.parquet: cannot be read as Parquet"):
        EpisodeIndex.build(str(path))


def test_data_of_two_robots_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", columns())
    content = columns()
    content["action"] = [[1.0, 2.0, 3.0]] * 8
    second = write(tmp_path / "b.parquet", content)
    message = r"b\.parquet: column action: got 3 numbers per row, expected 2 as in .*a\.parquet"
    with pytest.raises(DataError, match=message):
        EpisodeIndex.build([first, second])
    with pytest.raises(DataError, match=message):
        EpisodeIndex.concatenate([EpisodeIndex.build(first), EpisodeIndex.build(second)])


def test_cameras_are_counted_from_one_without_a_gap(tmp_path: Path) -> None:
    content = columns()
    for camera in (2, 3):
        content[f"image_{camera}_bytes"] = content["image_1_bytes"]
    path = write(tmp_path / "x.parquet", content, {f"image_{n}_bytes": pa.binary() for n in (2, 3)})
    assert EpisodeIndex.build(path).layout.cameras == 3
    with open_file(path) as file:
        assert read_layout(file).cameras == 3
    del content["image_2_bytes"]
    with pytest.raises(DataError, match="column image_2_bytes: missing, but image_3_bytes is there; number cameras without"):
        EpisodeIndex.build(write(tmp_path / "y.parquet", content))


def test_split_takes_whole_episodes_and_depends_on_the_seed_alone(episode_dir: Path) -> None:
    index = EpisodeIndex.build(str(episode_dir))

    def keys(part: EpisodeIndex) -> list[tuple[int, int, int]]:
        return list(zip(part.file.tolist(), part.start.tolist(), part.length.tolist(), strict=True))

    train, validation = index.split(0.3, seed=1)
    assert len(validation) == 3
    assert sorted(keys(train) + keys(validation)) == sorted(keys(index))
    again = index.split(0.3, seed=1)
    assert (keys(again[0]), keys(again[1])) == (keys(train), keys(validation))
    assert len({tuple(keys(index.split(0.3, seed)[1])) for seed in range(6)}) > 1
    assert len(index.split(0.001, seed=0)[1]) == 1


def test_concatenate_equals_building_at_once(episode_dir: Path) -> None:
    paths = expand_paths(str(episode_dir), "x")
    joined = EpisodeIndex.concatenate([EpisodeIndex.build(paths[:2]), EpisodeIndex.build(paths[2:])])
    whole = EpisodeIndex.build(paths)
    assert joined.paths == whole.paths
    for name in ("file", "start", "length", "groups", "group_offsets", "stamps", "digests"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert [joined.row_groups(n).tolist() for n in range(3)] == [whole.row_groups(n).tolist() for n in range(3)]


def test_expand_paths_takes_file_folder_glob_and_list(tmp_path: Path) -> None:
    for name in ("b/2.parquet", "b/1.parquet", "a.parquet", "b/.hidden.parquet", "b/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a, b1, b2 = (str(tmp_path / name) for name in ("a.parquet", "b/1.parquet", "b/2.parquet"))
    assert expand_paths(a, "x") == [a]
    assert expand_paths(str(tmp_path / "b"), "x") == [b1, b2]
    assert expand_paths(str(tmp_path), "x") == [a, b1, b2]
    assert expand_paths(f"{tmp_path}/**/*.parquet", "x") == [a, b1, b2]
    assert expand_paths([b2, str(tmp_path / "b"), a], "x") == [b2, b1, a]


NAS = ["nas/monday/1", "nas/monday/2", "nas/tuesday/1"]


@pytest.mark.parametrize(
    ("links", "pattern", "expected"),
    [
        ({"all/monday": "nas/monday", "all/tuesday": "nas/tuesday"}, "all", ["all/monday/1", "all/monday/2", "all/tuesday/1"]),
        ({"all/monday": "nas/monday"}, "all/*", ["all/monday/1", "all/monday/2"]),
        ({"all/deep": "nas"}, "all/**/monday/*.parquet", ["all/deep/monday/1", "all/deep/monday/2"]),
        (
            {"nas/latest": "nas/tuesday", "nas/back": "nas", "nas/up": "."},
            "nas",
            NAS,
        ),
        (
            {"nas/0": "nas/monday", "nas/0.parquet": "nas/tuesday/1.parquet"},
            "nas",
            NAS,
        ),
        (
            {"nas/monday/x": "nas/tuesday", "nas/tuesday/x": "nas/monday"},
            "nas/**",
            NAS,
        ),
        ({"all/one.parquet": "nas/.trash/x.parquet"}, "all", ["all/one"]),
        ({"lost": "nas/monday"}, ["nas/monday/1.parquet", "lost"], ["nas/monday/1", "lost/2"]),
    ],
)
def test_links_are_followed_and_each_file_is_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: dict[str, str], pattern: str | list[str], expected: list[str]
) -> None:
    """By a name without links where there is one: data that was read before links were followed keeps its names and order."""
    monkeypatch.chdir(tmp_path)
    for name in (*NAS, "nas/.trash/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{name}.parquet").touch()
    for link, target in links.items():
        Path(link).parent.mkdir(exist_ok=True)
        Path(link).symlink_to(Path(target).absolute())
    assert expand_paths(pattern, "x") == [f"{name}.parquet" for name in expected]


def test_link_that_leads_nowhere_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("monday", "1.parquet"):
        (tmp_path / name).symlink_to("/nas/is/not/mounted")
    assert expand_paths(str(tmp_path), "x") == [str(tmp_path / "1.parquet")]  # opening it fails
    assert f"{tmp_path / 'monday'}: this link leads nowhere" in caplog.text


@pytest.mark.parametrize("name", ["missing.parquet", "nothing*.parquet", "."])
def test_expand_paths_that_finds_nothing_names_the_key(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"^data\.train_parquet_files: .*no Parquet file there"):
        expand_paths(str(tmp_path / name), "data.train_parquet_files")
