"""Statistics against numpy over all rows at once; normalise then invert is the identity."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_vla.errors import DataError
from paligemma_vla.normalization import Accumulator, DatasetStatistics, Normalizer, Statistics

COLUMNS = 4


def values(rows: int, seed: int = 0) -> np.ndarray:
    """Columns of different character: skewed, far from zero, few distinct values, heavy-tailed."""
    rng = np.random.default_rng(seed)
    columns = [rng.exponential(2, rows), rng.normal(1e3, 0.5, rows), rng.integers(0, 2, rows), rng.standard_t(2, rows)]
    return np.stack(columns, axis=1).astype(np.float32)


def accumulate(parts: list[np.ndarray], total: int) -> Accumulator:
    accumulator = Accumulator(COLUMNS, total)
    for part in parts:
        accumulator.add(part)
    return accumulator


def statistics_of(data: np.ndarray) -> Statistics:
    accumulator = Accumulator(data.shape[1], len(data))
    accumulator.add(data)
    return accumulator.result()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 99, 100, 101, 5000])
def test_statistics_equal_numpy_over_all_rows(rows: int, merged: bool) -> None:
    """Added piece by piece, or each piece counted alone and merged. Only the tails are kept."""
    data = values(rows)
    cuts = np.sort(np.random.default_rng(1).integers(0, rows, min(7, rows - 1)))
    parts = [part for part in np.split(data, cuts) if len(part)]
    accumulator = accumulate([] if merged else parts, rows)
    for part in parts if merged else []:
        accumulator.merge(accumulate([part], rows))
    got, wide = accumulator.result(), data.astype(np.float64)
    assert len(accumulator.low) + len(accumulator.high) <= 0.02 * rows + 6
    assert got.count == rows
    np.testing.assert_array_equal([got.min, got.max], [wide.min(0), wide.max(0)])
    np.testing.assert_allclose(got.mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.std, wide.std(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose([got.q01, got.q99], np.quantile(wide, [0.01, 0.99], axis=0), rtol=1e-12, atol=1e-12)


def test_statistics_of_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="0 rows"):
        Accumulator(2, 0).result()


@pytest.mark.parametrize("kind", ["min_max", "quantile", "mean_std"])
def test_normalizer_inverse_is_the_identity(kind: str) -> None:
    data = values(500)
    normalizer = Normalizer(statistics_of(data), kind, "state")
    normalized = normalizer.normalize(data)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalizer.denormalize(normalized), data, rtol=1e-6, atol=2e-6 * np.abs(data).max(0).max())


def test_normalizer_kinds_map_what_they_promise() -> None:
    data = values(2000)[:, [0, 3]]
    statistics = statistics_of(data)
    min_max = Normalizer(statistics, "min_max", "state").normalize(data)
    np.testing.assert_allclose(min_max.min(0), -1, atol=1e-6)
    np.testing.assert_allclose(min_max.max(0), 1, atol=1e-6)
    mean_std = Normalizer(statistics, "mean_std", "state").normalize(data).astype(np.float64)
    np.testing.assert_allclose(mean_std.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(mean_std.std(0), 1, atol=1e-5)
    quantile = Normalizer(statistics, "quantile", "state").normalize(np.stack([statistics.q01, statistics.q99]).astype("f4"))
    np.testing.assert_allclose(quantile, [[-1, -1], [1, 1]], atol=1e-6)


@pytest.mark.parametrize("kind", ["min_max", "quantile", "mean_std"])
@pytest.mark.parametrize("constant", [0.0, 5.0, -1e6])
def test_normalizer_constant_dimension_maps_to_zero_and_back(kind: str, constant: float) -> None:
    data = np.stack([np.full(100, constant), np.linspace(0, 1, 100)], axis=1).astype(np.float32)
    normalizer = Normalizer(statistics_of(data), kind, "action")
    normalized = normalizer.normalize(data)
    assert np.isfinite(normalized).all()
    np.testing.assert_array_equal(normalized[:, 0], 0)
    np.testing.assert_array_equal(normalizer.denormalize(normalized)[:, 0], np.float32(constant))
    # A model's small error must stay small, and a robot slightly off the constant must not see a huge number.
    assert abs(normalizer.denormalize(np.array([0.01, 0.0], np.float32))[0] - constant) <= max(0.0101, 1e-6 * abs(constant))


def test_normalizer_tiny_quantile_range_uses_the_full_range_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    gripper = np.zeros(1000)
    gripper[[3, 7]] = [1.0, -1.0]  # moves twice in a thousand steps
    data = np.stack([np.random.default_rng(0).normal(size=1000), gripper], axis=1).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        normalizer = Normalizer(statistics_of(data), "quantile", "action")
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["action[1]"]
    normalized = normalizer.normalize(data)
    assert np.abs(normalized[:, 1]).max() == 1.0
    assert np.abs(normalized[:, 0]).max() > 1.0


def dataset_statistics(rows: int = 50) -> DatasetStatistics:
    return DatasetStatistics(statistics_of(values(rows)), statistics_of(values(rows, seed=1)[:, :2]), ("a.parquet",))


def test_statistics_file_round_trip_is_exact_and_holds_the_promised_keys(tmp_path: Path) -> None:
    path = tmp_path / "new" / "normalization_stats.json"
    statistics = dataset_statistics()
    statistics.save(path)
    raw = json.loads(path.read_text())
    assert set(raw) == {"version", "state", "action", "datasets", "digests", "actions"}
    assert set(raw["state"]) == set(raw["action"]) == {"min", "max", "mean", "std", "q01", "q99", "count"}
    assert DatasetStatistics.load(path).to_dict() == statistics.to_dict()
    del raw["digests"], raw["actions"]  # as the first files had neither
    assert DatasetStatistics.from_dict(raw, "x").to_dict() == statistics.to_dict()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("keys", "value", "where"),
    [
        ("version", 99, "version"),
        ("state", [1, 2], "state"),
        ("action", {"min": [0.0]}, "action.max"),
        ("state.min", [1.0], "state: .*one length"),
        ("state.max", "high", "state.max"),
        ("action.std", [float("nan"), 1.0], "action.std.0: got nan"),
        ("action.std", [1.0, -1e-30], "action.std.1: got -1e-30"),
        ("action.count", -5, "action.count: got -5"),
        ("action.min", [0.0, True], "action.min.1: got True"),
        ("action.max", [1e300, 10.0], r"action.max.0: got 1e\+300"),
        ("action.min", [-50.0, 5e3], "action: q01, dimension 1: got .*, expected at least min = 5000;"),
        ("action.mean", [0.1, 1e6], r"action: max, dimension 1: got .*, expected at least mean = 1e\+06;"),
        ("digests", [1], "digests.0: got 1"),
        ("actions", None, "actions: got None"),
        ("actions.representation", "relative", "actions.representation: got 'relative'"),
        ("actions.horizon", 3, "actions: got .*horizon=3"),
    ],
)
def test_statistics_file_faults_name_file_and_section(tmp_path: Path, keys: str, value: Any, where: str) -> None:
    path, raw = tmp_path / "s.json", dataset_statistics().to_dict()
    section, _, key = keys.rpartition(".")
    (raw[section] if section else raw)[key] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=rf"^{path}: {where}.*compute the statistics again"):
        DatasetStatistics.load(path)


def test_statistics_file_missing_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"paligemma-vla stats --config_path CONFIG --output_path"):
        DatasetStatistics.load(tmp_path / "s.json")
