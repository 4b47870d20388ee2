"""`paligemma-vla data check`: what it prints, writes and exits with; and that training's statistics take the list."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_sets import edit_table, write_set
from paligemma_vla.data.index import load_exclusions
from paligemma_vla.normalization import DatasetStatistics
from support import LENGTHS, call

Capture = pytest.CaptureFixture[str]
ROW = 20  # of the first file: in its fourth episode, after 6 + 2 + 9 rows


def change(path: Path, name: str, rows: range, value: Any) -> None:
    """Put a value into some rows of a column."""
    table = pq.read_table(path)
    values = table[name].to_pylist()
    values[rows.start : rows.stop] = [value] * len(rows)
    place = table.schema.get_field_index(name)
    kind = pa.list_(pa.float32()) if name == "state" else table.schema.field(name).type
    pq.write_table(table.set_column(place, name, pa.array(values, kind)), path, row_group_size=16)


@pytest.fixture
def data(tmp_path: Path, episode_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The synthetic episodes in a folder `data` of the current folder, with one bad state."""
    shutil.copytree(episode_dir, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    change(tmp_path / "data" / "episodes-00000.parquet", "state", range(ROW, ROW + 1), None)
    return Path("data")


def test_check_of_good_data_exits_0_and_writes_nothing(
    capfd: Capture, episode_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capfd, "data", "check", episode_dir, "--exclusion_list", tmp_path / "list.json")
    summary = f"0 of {len(LENGTHS)} episodes, in 0 of 3 files, cannot be used; {sum(LENGTHS)} steps were checked\n"
    assert (code, out) == (0, summary)
    assert err == ""
    assert not list(tmp_path.iterdir())


def test_check_prints_each_fault_a_table_and_how_to_use_the_list(capfd: Capture, data: Path) -> None:
    code, out, _ = call(capfd, "data", "check", data)
    assert code == 1
    assert out == (
        f"data/episodes-00000.parquet: row {ROW}, column state: got null, expected 3 numbers; "
        "mend it, or leave the episode out\n"
        "\n"
        "       1  wrong number of values\n"
        f"1 of {len(LENGTHS)} episodes, in 1 of 3 files, cannot be used; {sum(LENGTHS)} steps were checked\n"
        "\n"
        "wrote excluded_episodes.json; to leave these out, add to the configuration\n"
        "  data:\n"
        "    exclude_episodes: excluded_episodes.json\n"
    )
    (entry,) = json.loads(Path("excluded_episodes.json").read_text())["episodes"]
    assert len(entry.pop("digest")) == 16
    where = {"file": "data/episodes-00000.parquet", "first_row": 17, "rows": 40, "episode": 3}
    assert entry == {**where, "reasons": ["wrong number of values"]}


def test_check_that_finds_nothing_any_more_empties_the_list(capfd: Capture, data: Path, episode_dir: Path) -> None:
    call(capfd, "data", "check", data)
    shutil.copy(episode_dir / "episodes-00000.parquet", data)
    code, out, _ = call(capfd, "data", "check", data)
    assert (code, "wrote excluded_episodes.json anew, empty" in out) == (0, True)
    assert json.loads(Path("excluded_episodes.json").read_text()) == {"version": 1, "episodes": []}


def test_check_changes_the_entries_of_what_it_looked_at_alone(capfd: Capture, data: Path, episode_dir: Path) -> None:
    """Wherever it is run for other data: a list in one place may be of several data sets."""
    shutil.copytree(data, "other")
    for folder in ("data", "other"):
        assert call(capfd, "data", "check", folder, "--exclusion_list", "list.json")[0] == 1
    both = Path("list.json").read_bytes()
    files = [entry["file"] for entry in json.loads(both)["episodes"]]
    assert files == ["data/episodes-00000.parquet", "other/episodes-00000.parquet"]
    code, out, _ = call(capfd, "data", "check", episode_dir, "--exclusion_list", "list.json")
    assert (code, "list.json" in out, Path("list.json").read_bytes()) == (0, False, both)
    shutil.copy(episode_dir / "episodes-00000.parquet", data)
    code, out, _ = call(capfd, "data", "check", data, "--exclusion_list", "list.json")
    assert (code, out.count("taken off the list: 1 of data/episodes-00000.parquet")) == (0, 1)
    assert "on the list as before, since it was not checked now: 1 of other files or episodes" in out
    assert json.loads(Path("list.json").read_text())["episodes"] == json.loads(both)["episodes"][1:]


def test_check_of_some_episodes_of_a_file_keeps_what_is_listed_of_the_others(
    capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(Path("toy"), "v3.0", video=False)  # two episodes of 5 and 2 rows in the first file
    edit_table(Path("toy/data/chunk-000/file-000.parquet"), lambda columns: columns["action"].__setitem__(1, [np.inf, 0.0]))
    assert call(capfd, "data", "check", "lerobot:toy")[0] == 1
    listed = Path("excluded_episodes.json").read_bytes()
    assert [entry["episode"] for entry in json.loads(listed)["episodes"]] == [0]
    assert call(capfd, "data", "check", "lerobot:toy?episodes=1:")[0] == 0
    assert Path("excluded_episodes.json").read_bytes() == listed


def test_check_changes_the_list_of_the_configuration_and_refuses_one_that_it_cannot_read(
    capfd: Capture, data: Path, tiny_config: Any
) -> None:
    Path("lists").mkdir()
    Path("config.yaml").write_text(tiny_config({"data.exclude_episodes": "lists/mine.json"}).to_yaml())
    assert call(capfd, "data", "check", data, "--config_path", "config.yaml")[0] == 1
    assert not Path("excluded_episodes.json").exists()
    assert [entry.first_row for entry in load_exclusions("lists/mine.json").entries] == [17]
    Path("lists/mine.json").write_text("by hand")
    code, out, err = call(capfd, "data", "check", data, "--config_path", "config.yaml")
    assert (code, out, Path("lists/mine.json").read_text()) == (2, "", "by hand")
    assert "--exclusion_list: lists/mine.json: cannot be read as JSON" in err


def test_check_tells_files_that_are_copies(capfd: Capture, episode_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(episode_dir, tmp_path / "data")
    names = [str(tmp_path / "data" / name) for name in ("episodes-00000 (copy).parquet", "episodes-00000.parquet")]
    shutil.copy(names[1], names[0])
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")  # the same files: no copies
    code, out, _ = call(capfd, "data", "check", tmp_path / "data")
    assert (code, f"{names[1]}: has the same content as {names[0]}" in out, out.count("same content")) == (0, True, 1)
    assert json.loads(call(capfd, "data", "check", tmp_path / "data", "--json")[1])["copies"] == [names[::-1]]


def test_check_prints_odd_file_names_escaped(capfd: Capture, data: Path) -> None:
    for name in (b"a\x1b[2J\n.parquet", b"b\xff.parquet"):
        shutil.copy(data / "episodes-00000.parquet", os.fsencode(data) + b"/" + name)
    code, out, err = call(capfd, "data", "check", data)
    assert code == 1
    assert f"data/a\\x1b[2J\\n.parquet: row {ROW}, column state: got null" in out
    assert f"data/b\\udcff.parquet: row {ROW}, column state: got null" in out
    assert "internal error" not in err
    assert load_exclusions("excluded_episodes.json") is not None


def test_check_prints_json_alone_on_stdout(capfd: Capture, data: Path) -> None:
    code, out, err = call(capfd, "data", "check", data, "--json", "--exclusion_list", "bad.json")
    assert code == 1
    assert err == ""
    report = json.loads(out)
    (fault,) = report.pop("faults")
    assert fault.pop("message").startswith(f"data/episodes-00000.parquet: row {ROW}, column state: got null")
    where = {"file": "data/episodes-00000.parquet", "row": ROW, "column": "state", "episode": 3}
    assert fault == {**where, "kind": "wrong number of values"}
    counts = {"files": 3, "episodes": len(LENGTHS), "steps": sum(LENGTHS), "copies": [], "excluded_episodes": 1}
    assert report == {**counts, "exclusion_list": "bad.json"}
    assert Path("bad.json").is_file()
    assert not Path("excluded_episodes.json").exists()


def test_check_shows_the_first_faults_of_a_file_and_counts_the_others(capfd: Capture, data: Path) -> None:
    change(data / "episodes-00000.parquet", "state", range(17, 47), None)
    lines = call(capfd, "data", "check", data)[1].splitlines()
    assert sum("column state: got null" in line for line in lines) == 20
    assert "data/episodes-00000.parquet: 10 more faults; --json prints all" in lines
    assert "      30  wrong number of values" in lines


def test_check_against_a_configuration_and_prompts_that_may_change(capfd: Capture, data: Path, tiny_config: Any) -> None:
    Path("config.yaml").write_text(tiny_config({"data.state_dim": 9}).to_yaml())
    change(data / "episodes-00001.parquet", "prompt", range(1), "word " * 60)
    change(data / "episodes-00000.parquet", "prompt", range(ROW, ROW + 1), "another")
    flags: list[str] = []
    for changes in (2, 0):  # to another and back; the other faults stay
        code, out, _ = call(capfd, "data", "check", data, "--config_path", "config.yaml", *flags)
        assert (code, out.count("--allow_prompt_changes")) == (1, changes)
        assert "data.state_dim: got 9, expected 3 as in column state" in out
        assert "expected at most data.prompt_max_len = 32" in out
        flags = ["--allow_prompt_changes"]
    listed = json.loads(Path("excluded_episodes.json").read_text())["episodes"]  # what fits nothing cannot be left out
    assert [entry["reasons"] for entry in listed] == [["wrong number of values"], ["instruction too long"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("check nowhere", "error: data check: nowhere: no Parquet file there"),
        ("check", "the following arguments are required: path"),
        ("check data --config_path nowhere.yaml", "nowhere.yaml"),
        ("check data --exclusion_list no/where.json", "no/where.json: cannot be written"),
    ],
)
def test_check_that_cannot_begin_or_write_exits_2(capfd: Capture, data: Path, arguments: str, message: str) -> None:
    code, _, err = call(capfd, "data", *arguments.split())
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_statistics_leave_out_what_the_configuration_names(capfd: Capture, data: Path, tiny_config) -> None:
    overrides = {"data.train_parquet_files": str(data)}
    Path("plain.yaml").write_text(tiny_config(overrides).to_yaml())
    code, _, err = call(capfd, "stats", "--config_path", "plain.yaml", "--output_path", "s.json")
    assert code == 2
    assert f"episodes-00000.parquet: row {ROW}, column state: got null" in err
    assert "`paligemma-vla data check` finds every fault" in err
    call(capfd, "data", "check", data)
    Path("without.yaml").write_text(tiny_config({**overrides, "data.exclude_episodes": "excluded_episodes.json"}).to_yaml())
    code, _, err = call(capfd, "stats", "--config_path", "without.yaml", "--output_path", "s.json")
    assert code == 0, err
    assert "excluded_episodes.json: 1 episodes (or whole files) left out" in err
    statistics = DatasetStatistics.load("s.json")
    assert statistics.state.count == sum(LENGTHS) - 40
    assert len(statistics.digests) == len(statistics.datasets) == 3
