"""Rates, differences and their intervals, against published values and against coverage by simulation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.compare import difference, failed_starts, paired_interval, wilson_interval


def pairs(both: int, before: int, after: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + before) + [False] * (after + neither)
    second = [True] * both + [False] * before + [True] * after + [False] * neither
    return first, second


def write(path: Path, solved: dict[str, list[bool]], **settings: object) -> Path:
    starts = [{"task": task, "index": n, "success": one} for task, found in solved.items() for n, one in enumerate(found)]
    path.write_text(json.dumps({"settings": {"env": "metaworld", "seed": 0, "resets": "demo", **settings}, "episodes": starts}))
    return path


def test_wilson_interval_matches_published_values() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(115, 120) == pytest.approx((0.9062, 0.9821), abs=1e-4)


def test_paired_interval_matches_published_values() -> None:
    """Airway hyper-responsiveness before and after stem cell transplantation (Fagerland, Lydersen and Laake 2014)."""
    assert paired_interval(*pairs(1, 7, 1, 12)) == pytest.approx((-0.507, -0.026), abs=1e-3)


def test_paired_interval_covers_the_true_difference() -> None:
    """In 95 of 100 experiments, with pairs that agree far more often than chance."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        before = rng.random(120) < 0.6
        after = np.where(rng.random(120) < 0.7, before, rng.random(120) < 0.8)
        low, high = paired_interval(before.tolist(), after.tolist())
        covered.append(low <= 0.06 <= high)
    assert 0.91 <= np.mean(covered) <= 0.99
    assert low < after.mean() - before.mean() < high


def test_paired_interval_of_no_change_contains_zero() -> None:
    for solved in ([True] * 30, [False] * 30, [True, False] * 15):
        low, high = paired_interval(solved, solved)
        assert low == pytest.approx(-high) and low <= 0 <= high


def test_difference_is_of_the_same_starts_over_some_tasks(tmp_path: Path) -> None:
    before = write(tmp_path / "before.json", {"open": [False, False, True, True], "close": [True, True, False, True]})
    after = write(tmp_path / "after.json", {"close": [True, False, True, True], "open": [True, True, True, True]})
    found = difference(before, after, ["open"])
    assert (found["episodes"], found["before"], found["after"], found["difference"]) == (4, 0.5, 1.0, 0.5)
    assert tuple(found["ci95"]) == paired_interval([False, False, True, True], [True] * 4)
    assert difference(before, after)["difference"] == 0.25
    other = write(tmp_path / "other.json", {"open": [True] * 4}, seed=1)
    with pytest.raises(SimulatorError, match=r"other.json: other starts than in .*before.json; play both with the same tasks"):
        difference(before, other)
    with pytest.raises(SimulatorError, match="no episode of push; give one of its tasks"):
        difference(before, after, ["push"])


def test_failed_starts_are_those_of_the_same_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "rollout.json", {"open": [False, True], "close": [True, False]})
    settings = {"env": "metaworld", "seed": 0, "resets": "demo"}
    assert failed_starts(path, settings) == {("open", 0), ("close", 1)}
    with pytest.raises(SimulatorError, match="other starts: resets: got 'stock', expected 'demo' as there"):
        failed_starts(path, settings | {"resets": "stock"})
    path.write_text('{"settings": {}}')
    with pytest.raises(SimulatorError, match=r"not a result of a rollout \(KeyError: 'episodes'\); give the rollout.json"):
        failed_starts(path, settings)
