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


def rewrite(path: Path, group: int, cut: bool, **options: object) -> None:
    """As pyarrow writes it from a table of our file, whose metadata the table keeps. cut: an episode in two, at row 40."""
    table = pq.read_table(path)
    for name, row in ((schema.IS_LAST, 39), (schema.IS_FIRST, 40)) if cut else ():
        values = table[name].to_pylist()
        values[row] = True
        column = table.schema.get_field_index(name)
        table = table.set_column(column, table.schema.field(column), pa.array(values))
    assert schema.EPISODES_KEY in table.schema.metadata
    pq.write_table(table, path, row_group_size=group, **options)


@pytest.mark.parametrize(
    ("group", "cut", "options"),
    [(0, False, {}), (1000, False, {}), (16, False, {}), (32, True, {}), (32, False, {"write_statistics": False})],
    ids=["ours", "one group", "smaller groups", "an episode cut in two", "no statistics"],
)
def test_footer_gives_the_flags_of_our_files_and_of_none_that_was_written_anew(
    tmp_path: Path, group: int, cut: bool, options: dict[str, object]
) -> None:
    write_episodes(tmp_path, lengths=(64, 1, 32, 33, 40, 2), per_file=6)
    (path,) = tmp_path.glob("*.parquet")
    if group:
        rewrite(path, group, cut, **options)
    with open_file(str(path)) as file:
        assert (file.flags_from_footer() is None) == bool(group)
        expected, got = read_flags(file), find_flags(file)
    assert len(expected.first) == 6 + cut
    for name, rows in vars(expected).items():
        np.testing.assert_array_equal(getattr(got, name), rows)
