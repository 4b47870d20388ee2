"""What the footer of a Parquet file says about the flags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paligemma_vla import schema
from paligemma_vla.data.formats import open_file
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
