"""The streaming pass over files against numpy over all rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.errors import DataError
from support import read_rows, write_episodes


def test_compute_statistics_equals_numpy_over_every_row_of_every_file(episode_dir: Path) -> None:
    rows = read_rows(episode_dir)
    seen: list[int] = []
    got = compute_statistics(str(episode_dir), "x", seen.append)
    for name in ("state", "action"):
        data = np.array([row[name] for row in rows], np.float64)
        part = getattr(got, name)
        assert part.count == len(rows)
        np.testing.assert_array_equal(part.min, data.min(0))
        np.testing.assert_array_equal(part.max, data.max(0))
        np.testing.assert_allclose(part.mean, data.mean(0), rtol=1e-12)
        np.testing.assert_allclose(part.std, data.std(0), rtol=1e-9)
        np.testing.assert_allclose(part.q01, np.quantile(data, 0.01, axis=0), rtol=1e-9)
        np.testing.assert_allclose(part.q99, np.quantile(data, 0.99, axis=0), rtol=1e-9)
    assert list(got.datasets) == sorted(str(path) for path in episode_dir.glob("*.parquet"))
    assert sum(seen) == len(rows)


def test_compute_statistics_of_parts_in_any_number_of_files_agrees(tmp_path: Path) -> None:
    write_episodes(tmp_path / "one", per_file=100)
    write_episodes(tmp_path / "many", per_file=1)
    one, many = (compute_statistics(str(tmp_path / name), "x").to_dict() for name in ("one", "many"))
    for name in ("state", "action"):
        for field in ("min", "max", "q01", "q99", "count"):
            assert one[name][field] == many[name][field]
        np.testing.assert_allclose(one[name]["std"], many[name]["std"], rtol=1e-12)


def test_compute_statistics_names_where_there_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--train_data_override: "):
        compute_statistics(str(tmp_path), "--train_data_override")
