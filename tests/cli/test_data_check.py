"""`paligemma-vla data check`: what it prints, writes and exits with; and that training's statistics take the list."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paligemma_vla.data.index import load_exclusions
from paligemma_vla.normalization import DatasetStatistics
from support import LENGTHS, call

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
    capfd: pytest.CaptureFixture[str], episode_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capfd, "data", "check", episode_dir)
    assert (code, out) == (
        0,
        f"0 of {len(LENGTHS)} episodes, in 0 of 3 files, cannot be used; {sum(LENGTHS)} steps were checked\n",
    )
    assert "check: 100%" in err
    assert not list(tmp_path.iterdir())


def test_check_prints_each_fault_a_table_and_how_to_use_the_list(capfd: pytest.CaptureFixture[str], data: Path) -> None:
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
    raw = json.loads(Path("excluded_episodes.json").read_text())
    assert raw["version"] == 1
    (entry,) = raw["episodes"]
    digest = entry.pop("digest")
    assert len(digest) == 16
    assert entry == {
        "file": "data/episodes-00000.parquet",
        "first_row": 17,
        "rows": 40,
        "episode": 3,
        "reasons": ["wrong number of values"],
    }


def test_check_that_finds_nothing_any_more_empties_the_list(
    capfd: pytest.CaptureFixture[str], data: Path, episode_dir: Path
) -> None:
    call(capfd, "data", "check", data)
    shutil.copy(episode_dir / "episodes-00000.parquet", data)
    code, out, _ = call(capfd, "data", "check", data)
    assert code == 0
    assert out.endswith("\n\nwrote excluded_episodes.json anew, empty: there is nothing to leave out any more\n")
    assert json.loads(Path("excluded_episodes.json").read_text()) == {"version": 1, "episodes": []}
    _, out, _ = call(capfd, "data", "check", data, "--json")
    assert json.loads(out)["exclusion_list"] == "excluded_episodes.json"


def test_check_prints_odd_file_names_escaped(capfd: pytest.CaptureFixture[str], data: Path) -> None:
    for name in (b"a\x1b[2J\n.parquet", b"b\xff.parquet"):
        shutil.copy(data / "episodes-00000.parquet", os.fsencode(data) + b"/" + name)
    code, out, err = call(capfd, "data", "check", data)
    assert code == 1
    assert f"data/a\\x1b[2J\\n.parquet: row {ROW}, column state: got null" in out
    assert "data/b\\udcff.parquet: cannot be read as Parquet ('utf-8' codec can't encode" in out
    assert "internal error" not in err
    assert load_exclusions("excluded_episodes.json") is not None


def test_check_prints_json_alone_on_stdout(capfd: pytest.CaptureFixture[str], data: Path) -> None:
    code, out, err = call(capfd, "data", "check", data, "--json", "--exclusion_list", "bad.json")
    assert code == 1
    assert "check: 100%" in err
    report = json.loads(out)
    (fault,) = report.pop("faults")
    assert fault.pop("message").startswith(f"data/episodes-00000.parquet: row {ROW}, column state: got null")
    where = {"file": "data/episodes-00000.parquet", "row": ROW, "column": "state", "episode": 3}
    assert fault == {**where, "kind": "wrong number of values"}
    counts = {"files": 3, "episodes": len(LENGTHS), "steps": sum(LENGTHS), "excluded_episodes": 1}
    assert report == {**counts, "exclusion_list": "bad.json"}
    assert Path("bad.json").is_file()
    assert not Path("excluded_episodes.json").exists()


def test_check_shows_the_first_faults_of_a_file_and_counts_the_others(capfd: pytest.CaptureFixture[str], data: Path) -> None:
    change(data / "episodes-00000.parquet", "state", range(17, 47), None)
    _, out, _ = call(capfd, "data", "check", data)
    lines = out.splitlines()
    assert sum("column state: got null" in line for line in lines) == 20
    assert "data/episodes-00000.parquet: 10 more faults; --json prints all" in lines
    assert "      30  wrong number of values" in lines
    _, out, _ = call(capfd, "data", "check", data, "--json")
    assert len(json.loads(out)["faults"]) == 30


def test_check_against_a_configuration_and_what_does_not_fit_it(
    capfd: pytest.CaptureFixture[str], data: Path, tiny_config
) -> None:
    Path("config.yaml").write_text(tiny_config({"data.state_dim": 9}).to_yaml())
    change(data / "episodes-00001.parquet", "prompt", range(1), "word " * 60)
    code, out, _ = call(capfd, "data", "check", data, "--config_path", "config.yaml")
    assert code == 1
    assert "data.state_dim: got 9, expected 3 as in column state" in out
    assert "row 0, column prompt: prompt: got " in out
    assert "expected at most data.prompt_max_len = 32" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("check nowhere", "error: data check: nowhere: no Parquet file there"),
        ("check", "the following arguments are required: path"),
        ("check data --config_path nowhere.yaml", "nowhere.yaml"),
        ("check data --exclusion_list no/where.json", "no/where.json: cannot be written"),
    ],
)
def test_check_that_cannot_begin_or_write_exits_2(
    capfd: pytest.CaptureFixture[str], data: Path, arguments: str, message: str
) -> None:
    code, _, err = call(capfd, "data", *arguments.split())
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_info_of_a_damaged_instruction_column_is_one_message(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, episode_dir: Path
) -> None:
    path = tmp_path / "x.parquet"
    content = bytearray(sorted(episode_dir.glob("*.parquet"))[0].read_bytes())
    footer = pq.read_metadata(io.BytesIO(content)).row_group(0)
    leaf = next(footer.column(n) for n in range(footer.num_columns) if footer.column(n).path_in_schema == "prompt")
    content[leaf.dictionary_page_offset + leaf.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    code, _, err = call(capfd, "data", "info", path)
    assert code == 2
    assert f"error: {path}: column prompt: cannot be read" in err


def test_statistics_leave_out_what_the_configuration_names(capfd: pytest.CaptureFixture[str], data: Path, tiny_config) -> None:
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
    raw = json.loads(Path("s.json").read_text())
    del raw["digests"]
    Path("older.json").write_text(json.dumps(raw))
    assert DatasetStatistics.load("older.json").digests == ()
