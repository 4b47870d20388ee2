"""What the footer of a Parquet file says about the flags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from episode_files import columns, write

from paligemma_vla import schema
from paligemma_vla.data.doctor import CheckOptions, diagnose
from paligemma_vla.data.formats import open_file
from paligemma_vla.data.formats.parquet import ParquetEpisodes, flag_rows
from paligemma_vla.data.index import find_flags, read_flags
from support import write_episodes


def told(path: Path) -> list[list[int]] | None:
    with open_file(str(path)) as file:
        rows = file.flags_from_footer()
        return None if rows is None else [part.tolist() for part in rows]


def test_footer_tells_the_flags_of_our_files(tmp_path: Path) -> None:
    write_episodes(tmp_path, lengths=(40, 1, 32, 33, 64, 2), per_file=6)
    (path,) = tmp_path.glob("*.parquet")
    with open_file(str(path)) as file:
        expected, got = read_flags(file), find_flags(file)
    assert told(path) is not None
    for name in ("first", "last", "terminal", "null"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def rewrite(path: Path, group: int, change: dict[int, tuple[bool, bool]] | None = None, **options: object) -> Path:
    """As pyarrow writes it from a table of our file, whose metadata the table keeps. change: row -> is_first, is_last."""
    table = pq.read_table(path)
    for row, flags in (change or {}).items():
        for name, value in zip((schema.IS_FIRST, schema.IS_LAST), flags, strict=True):
            values = table[name].to_pylist()
            values[row] = value
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(place), pa.array(values))
    assert schema.EPISODES_KEY in table.schema.metadata
    pq.write_table(table, path, row_group_size=group, **options)
    return path


@pytest.mark.parametrize(
    ("group", "change", "options"),
    [
        (1000, None, {}),
        (16, None, {}),
        (32, {40: (True, False), 39: (False, True)}, {}),
        (32, None, {"write_statistics": False}),
    ],
    ids=["one group", "smaller groups", "an episode cut in two", "no statistics"],
)
def test_footer_of_a_file_written_anew_settles_nothing_that_is_not_so(
    tmp_path: Path, group: int, change: dict[int, tuple[bool, bool]] | None, options: dict[str, object]
) -> None:
    write_episodes(tmp_path, lengths=(64, 96))
    (path,) = tmp_path.glob("*.parquet")
    rewrite(path, group, change, **options)
    assert told(path) is None
    with open_file(str(path)) as file:
        assert len(find_flags(file).first) == (3 if change else 2)


def test_check_tells_flags_that_the_footer_contradicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_episodes(tmp_path, lengths=(5, 6))
    (path,) = tmp_path.glob("*.parquet")
    wrong = [np.array(rows) for rows in ([0, 4], [3, 10], [10])]
    assert not diagnose([str(path)], CheckOptions(), lambda size: None).faults
    monkeypatch.setattr(ParquetEpisodes, "flags_from_footer", lambda self: wrong)
    (fault,) = diagnose([str(path)], CheckOptions(), lambda size: None).faults
    assert "the footer's statistics contradict them" in str(fault)


def test_files_of_other_writers_tell_no_flags(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "x.parquet", columns((3, 4))))
    metadata = pq.read_metadata(path)
    assert flag_rows(metadata, np.array([0, metadata.num_rows])) is None
