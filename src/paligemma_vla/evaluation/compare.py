"""Two rollouts of the same starts: which starts failed, and how much better the second one was, with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paligemma_vla.errors import SimulatorError, first_line
from paligemma_vla.storage import read_json

SAME_STARTS = ("env", "seed", "resets")  # settings that, with task and index, decide how an episode begins
REMEDY = "give the rollout.json of a `paligemma-vla rollout`"
StartKey = tuple[str, int]  # task and index


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate; unlike the normal one it is right at 0 and 1."""
    from scipy.stats import binomtest  # takes most of a second

    interval = binomtest(successes, episodes).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def paired_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """95 % interval of rate(after) - rate(before) over the same episodes, in the same order.

    Newcombe's square-and-add interval from the Wilson intervals of both rates and their correlation (Statistics in Medicine
    17, 1998, method 10). Pairs that agree narrow it; it is right where a rate is 0 or 1.
    """
    n = len(after)
    first, second = sum(before), sum(after)
    both = sum(1 for pair in zip(before, after, strict=True) if all(pair))
    (low_1, high_1), (low_2, high_2) = wilson_interval(first, n), wilson_interval(second, n)
    # Of the four counts: both, only one of them, neither.
    product: float = both * (n - first - second + both) - (first - both) * (second - both)
    if product > 0:
        product = max(product - n / 2, 0)
    spread = math.sqrt(first * (n - first) * second * (n - second))
    correlation = product / spread if spread else 0.0
    p_1, p_2 = first / n, second / n
    difference = p_2 - p_1

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))

    return difference - reach(p_2 - low_2, high_1 - p_1), difference + reach(high_2 - p_2, p_1 - low_1)


def read_successes(path: Path) -> tuple[Mapping[str, Any], dict[StartKey, bool]]:
    """Settings of a rollout.json, and whether the policy solved each start alone. Raises `SimulatorError`."""
    raw = read_json(path, SimulatorError, REMEDY)
    try:
        return dict(raw["settings"]), {(one["task"], one["index"]): bool(one["success"]) for one in raw["episodes"]}
    except (KeyError, TypeError, ValueError) as error:
        raise SimulatorError(
            f"{path}: not a result of a rollout ({type(error).__name__}: {first_line(error)}); {REMEDY}"
        ) from error


def failed_starts(path: Path, settings: Mapping[str, Any]) -> frozenset[StartKey]:
    """The starts that failed in a rollout.json. settings: what they are now played with; raises `SimulatorError` for others."""
    before, successes = read_successes(path)
    for name in SAME_STARTS:
        if before.get(name) != settings[name]:
            got = f"got {settings[name]!r}, expected {before.get(name)!r} as there"
            raise SimulatorError(f"--failed_in {path}: other starts: {name}: {got}; give the same --{name}")
    return frozenset(start for start, solved in successes.items() if not solved)


def difference(before: Path, after: Path, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """How much better `after` is than `before` (rollout.json of the same starts), over some tasks together, or all.

    Returns {"episodes", "before", "after", "difference", "ci95"}. Raises `SimulatorError` when the starts are not the same.
    """
    (old, first), (new, second) = read_successes(before), read_successes(after)
    if first.keys() != second.keys() or any(old.get(name) != new.get(name) for name in SAME_STARTS):
        raise SimulatorError(f"{after}: other starts than in {before}; play both with the same tasks, --episodes and --seed")
    chosen = sorted(start for start in first if tasks is None or start[0] in tasks)
    if not chosen:
        raise SimulatorError(f"{before}: no episode of {', '.join(tasks or ())}; give one of its tasks")
    pairs = [first[start] for start in chosen], [second[start] for start in chosen]
    rates = [sum(solved) / len(solved) for solved in pairs]
    return {
        "episodes": len(chosen),
        "before": rates[0],
        "after": rates[1],
        "difference": rates[1] - rates[0],
        "ci95": list(paired_interval(*pairs)),
    }
