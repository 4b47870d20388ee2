"""Lists of episodes to leave out: what is listed is as if it were not there, and a list that does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from episode_files import columns, flags, put, write

from paligemma_vla.data.index import EpisodeIndex, ExclusionList, load_exclusions
from paligemma_vla.data.reader import EpisodeReader
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.errors import DataError


def listed(path: Path, *episodes: dict[str, Any]) -> ExclusionList:
    """A list written by hand, loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": 1, "episodes": list(episodes)}))
    exclude = load_exclusions(str(path))
    assert exclude is not None
    return exclude


def entry(file: str, first_row: int | None, rows: int | None) -> dict[str, Any]:
    return {"file": file, "first_row": first_row, "rows": rows, "episode": None, "reasons": ["x"]}


def test_excluded_rows_are_in_neither_index_nor_statistics_nor_judged(tmp_path: Path) -> None:
    content = flags(put("state", 3, [float("nan")] * 3))
    content["action"][3] = None
    path = write(tmp_path / "x.parquet", content, row_group_size=3)
    exclude = listed(tmp_path / "list.json", entry("x.parquet", 3, 1))
    index = EpisodeIndex.build(path, "x", exclude)
    assert (index.start.tolist(), index.length.tolist(), index.excluded) == ([0, 4], [3, 4], 1)
    kept = [row for row in range(8) if row != 3]
    statistics = compute_statistics(path, "x", exclude=exclude)
    state = np.float32([content["state"][row] for row in kept])
    assert statistics.state.count == 7
    np.testing.assert_allclose(statistics.state.mean, state.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_array_equal(statistics.state.min, state.min(0))
    reader = EpisodeReader(index, 1, 2**20)
    for row in kept:  # row 3 shares its row group with rows 4 and 5
        group, place = reader.group_of(0, row)
        np.testing.assert_array_equal(group.state[place], np.float32(content["state"][row]))
    with pytest.raises(DataError, match="row 3, column state: dimension 0 is nan"):
        EpisodeReader(EpisodeIndex.build(path), 1, 2**20).group_of(0, 4)


@pytest.mark.parametrize(
    ("first_row", "rows", "message"),
    [
        (5, 2, r"row 4, column is_last: got false, expected true, because row 5 is excluded"),
        (4, 2, r"row 6, column is_first: got false, expected true, because row 5 is excluded"),
        (1, 1, r"row 0, column is_last: got false, expected true, because row 1 is excluded"),
        (0, 2, r"row 2, column is_first: got false, expected true, because row 1 is excluded"),
    ],
)
def test_list_that_cuts_an_episode_names_the_row_in_the_file(tmp_path: Path, first_row: int, rows: int, message: str) -> None:
    path = write(tmp_path / "x.parquet", columns())
    with pytest.raises(DataError, match=message):
        EpisodeIndex.build(path, "x", listed(tmp_path / "list.json", entry("x.parquet", first_row, rows)))


def test_list_finds_its_files_from_its_own_folder_and_moves_with_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "data").mkdir(parents=True)
    write(tmp_path / "here" / "data" / "x.parquet", columns())
    listed(tmp_path / "here" / "lists" / "l.json", entry("../data/x.parquet", 0, 3))
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there" / "data")
    exclude = load_exclusions("../lists/l.json")
    assert EpisodeIndex.build("x.parquet", "x", exclude).length.tolist() == [1, 4]
    ExclusionList("other.json", exclude.entries if exclude else ()).save()
    assert json.loads(Path("other.json").read_text())["episodes"][0]["file"] == "x.parquet"


def test_whole_file_is_left_out_unopened_and_unknown_files_do_not_matter(tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", columns())
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    exclude = listed(tmp_path / "l.json", entry("bad.parquet", None, None), entry("gone.parquet", 0, 5))
    index = EpisodeIndex.build(str(tmp_path), "x", exclude)
    assert (index.paths, len(index), index.excluded) == ((good,), 3, 1)


def test_excluded_survives_concatenate_and_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", columns())
    exclude = listed(tmp_path / "l.json", entry("a.parquet", 0, 3), entry("b.parquet", 3, 1), entry("b.parquet", 0, 3))
    parts = [EpisodeIndex.build(str(tmp_path / f"{name}.parquet"), "x", exclude) for name in ("a", "b")]
    joined = EpisodeIndex.concatenate(parts)
    assert [part.excluded for part in parts] == [1, 2]
    assert joined.excluded == joined.split(0.3, 0)[0].excluded == 3
    assert EpisodeIndex.build(str(tmp_path / "a.parquet")).excluded == 0


def test_list_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", columns())
    for entries in ([entry("x.parquet", None, None)], [entry("x.parquet", 0, 4), entry("x.parquet", 4, 4)]):
        exclude = listed(tmp_path / "l.json", *entries)
        with pytest.raises(DataError, match=r"^data\.val_parquet_files: every episode is left out by .*l\.json"):
            EpisodeIndex.build(path, "data.val_parquet_files", exclude)


def test_list_of_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", columns())
    with pytest.raises(DataError, match=r"rows 4 to 8 of .*x\.parquet: the file has 8 rows; run `paligemma-vla data check`"):
        EpisodeIndex.build(path, "x", listed(tmp_path / "l.json", entry("x.parquet", 4, 5)))
    digest = f"{int(EpisodeIndex.build(path).digests[0]):016x}"
    exclude = listed(tmp_path / "l.json", {**entry("x.parquet", 0, 3), "digest": digest})
    assert len(EpisodeIndex.build(path, "x", exclude)) == 2
    write(tmp_path / "x.parquet", flags(put("state", 7, [9.0, 9.0, 9.0])))
    with pytest.raises(
        DataError,
        match=r"rows 0 to 2 of .*x\.parquet: the file, or what is read of it, has changed since; run .*, or give no list",
    ):
        EpisodeIndex.build(path, "x", exclude)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"version": 2, "episodes": []}',
        b'{"version": 1, "episodes": {}}',
        b'{"version": 1, "episodes": [{"file": 3, "first_row": 0, "rows": 1}]}',
        b'{"version": 1, "episodes": [{"file": "\\ud800", "first_row": 0, "rows": 1}]}',
        b'{"version": 1, "episodes": [{"file": "x", "first_row": 0, "rows": null}]}',
        b'{"version": 1, "episodes": [{"file": "x", "first_row": -1, "rows": 1}]}',
        b'{"version": 1, "episodes": [{"file": "x", "first_row": true, "rows": 1}]}',
        b'{"version": 1, "episodes": [{"file": "x", "first_row": 0, "rows": 1, "digest": 5}]}',
    ],
)
def test_malformed_list_is_one_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "l.json").write_bytes(content)
    with pytest.raises(DataError, match=r"^data\.exclude_episodes: .*l\.json.*; correct it, or delete it and run .* again$"):
        load_exclusions(str(tmp_path / "l.json"))


def test_missing_list_names_the_key() -> None:
    assert load_exclusions(None) is None
    with pytest.raises(DataError, match=r"^data\.exclude_episodes: no\.json: no such file"):
        load_exclusions("no.json")


def test_list_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--exclusion_list FILE"):
        ExclusionList(str(tmp_path / "no" / "folder.json"), ()).save()
