"""Why a replay goes another way than its recording: what can be measured of it.

A sign or a scale is found by trial: the actions are changed, a few episodes are played again, and what brings the state back to
the recorded one is named. How actions move the state, in the recording and in the replay, says which scales to try.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating]
Outcome = tuple[float, int]  # how far the states are from the recorded ones, as a mean share of their range; and successes

TRIALS = 4  # episodes that are played again with changed actions
HELPS, EXPLAINS = 0.8, 0.3  # a change that leaves less of the difference than this is tried with others, is named
SURE, STRONG = 4.0, 0.2  # of a slope: its t value, and the share of the change that its action explains; a trial decides
EQUAL = 1.5  # slopes that differ by less than this factor
MOST_BEYOND = 0.02  # share of actions out of the simulator's range that is not mentioned
LEAST_ROWS = 10


@dataclass(frozen=True)
class Finding:
    """What was found, as a sentence. kind: `sign` and `scale` of an action, actions beyond the simulator's `range`, the `start`
    of episodes, `label`s that are not what was executed. action: name of the number. factor: see the text."""

    kind: Literal["sign", "scale", "range", "start", "label"]
    text: str
    action: str = ""
    factor: float | None = None


class Trials(NamedTuple):
    """So many episodes were played again. before, after: outcomes without and with the change that helps most."""

    episodes: int
    before: Outcome
    after: Outcome = (np.inf, 0)


@dataclass(frozen=True)
class Slopes:
    """How actions move the state from step to step, by least squares on action, state and a constant.

    value (A, P): of the state's change, per unit of an action. t (A, P): value by its standard error. share (A, P): what one
    standard deviation of the action explains, in standard deviations of the change.
    """

    value: Numbers
    t: Numbers
    share: Numbers

    @property
    def clear(self) -> NDArray[np.bool_]:
        """Which of them are beyond doubt (A, P)."""
        found: NDArray[np.bool_] = (np.abs(self.t) > SURE) & (np.abs(self.share) > STRONG)
        return found


def fit_slopes(episodes: Sequence[tuple[Numbers, Numbers]]) -> Slopes:
    """Slopes of some episodes of actions (L, A) and states (L, P). Zero for an action that is always the same."""
    inputs = np.concatenate([np.concatenate([action[:-1], state[:-1]], axis=1) for action, state in episodes]).astype(float)
    change = np.concatenate([np.diff(state, axis=0) for _, state in episodes]).astype(float)
    actions, (rows, width) = episodes[0][0].shape[1], inputs.shape
    value, t, share = (np.zeros((width, change.shape[1])) for _ in range(3))
    spread, changes = inputs.std(axis=0), change.std(axis=0)
    kept = spread > 1e-9
    if rows > width + LEAST_ROWS:
        scaled = ((inputs - inputs.mean(axis=0)) / np.where(kept, spread, 1.0))[:, kept]
        change = change - change.mean(axis=0)
        found = np.linalg.lstsq(scaled, change, rcond=None)[0]
        variance = ((change - scaled @ found) ** 2).sum(axis=0) / (rows - width - 1)
        error = np.sqrt(np.outer(np.diag(np.linalg.pinv(scaled.T @ scaled)), variance))
        value[kept], share[kept] = found / spread[kept, None], found / np.maximum(changes, 1e-12)
        t[kept] = found / np.maximum(error, 1e-12)
    return Slopes(value[:actions], t[:actions], share[:actions])


def propose_factors(recorded: Slopes, replayed: Slopes) -> list[Numbers]:
    """Factors of the actions (A,) that are worth a trial, one of them not 1 in each: minus one; and where an action moves the
    number of the state that it moves most by another amount than in the recording, what makes it equal."""
    ones = np.ones(len(recorded.value))
    proposals = [np.where(np.arange(len(ones)) == action, -1.0, 1.0) for action in range(len(ones))]
    for action, number in enumerate(np.abs(recorded.share).argmax(axis=1).tolist()):
        if recorded.clear[action, number] and replayed.clear[action, number]:
            factor = float(recorded.value[action, number] / replayed.value[action, number])
            if not 1 / EQUAL < abs(factor) < EQUAL:
                proposals.append(np.where(np.arange(len(ones)) == action, factor, 1.0))
    return proposals


def find_factors(proposals: Sequence[Numbers], trials: Trials, play: Callable[[Numbers], Outcome]) -> tuple[Numbers, Trials]:
    """The factors of the actions (A,) that bring the state back to the recorded one; ones where none do.

    Each proposal is tried alone, then all that help are tried together. trials: what came of the actions as they are. play:
    what comes of actions that are multiplied by factors.
    """
    best = ones = np.ones_like(proposals[0])
    helping = ones
    for factors in proposals:
        outcome = play(factors)
        if outcome[0] < HELPS * trials.before[0]:
            helping = np.where(factors == 1, helping, factors)
        if outcome[0] < trials.after[0]:
            best, trials = factors, trials._replace(after=outcome)
    if (helping != 1).sum() > 1 and (outcome := play(helping))[0] < trials.after[0]:
        best, trials = helping, trials._replace(after=outcome)
    return (best if trials.after[0] < EXPLAINS * trials.before[0] else ones), trials


def describe_factors(factors: Numbers, trials: Trials, names: Sequence[str]) -> list[Finding]:
    """A finding for each factor that is not one."""
    changed = [(name, float(factor)) for name, factor in zip(names, factors, strict=True) if factor != 1]
    result = (
        f"{trials.after[1]} of {trials.episodes} episodes that were played again succeed, and their state differs by "
        f"{trials.after[0]:.1%} of its range instead of {trials.before[0]:.1%}"
    )
    together = " together with the other actions named here" if len(changed) > 1 else ""
    found = []
    for name, factor in changed:
        moves = f"action {name} moves the state"
        if factor == -1:
            text = f"{moves} the other way than in the recording: with its sign turned{together}, {result}"
            found.append(Finding("sign", text, name, factor))
        else:
            text = f"{moves} by another amount than in the recording: multiplied by about {factor:.2g}{together}, {result}"
            found.append(Finding("scale", text, name, factor))
    return found


def find_start(at_once: int, episodes: int) -> list[Finding]:
    """at_once: episodes whose state differs before the first action."""
    text = f"{at_once} of {episodes} episodes differ before the first action: the simulator does not start as it did then"
    return [Finding("start", f"{text} (another version of it?), or their first steps were cut off")] if at_once else []


def find_out_of_range(actions: Numbers, low: Sequence[float], high: Sequence[float], names: Sequence[str]) -> list[Finding]:
    """Actions (rows, A) beyond what the simulator executes; it clips them."""
    beyond = ((actions < np.asarray(low, np.float32)) | (actions > np.asarray(high, np.float32))).mean(axis=0)
    return [
        Finding(
            "range",
            f"action {name}: {share:.0%} of the values lie beyond the simulator's range, {least:g} to {most:g} (they go from "
            f"{smallest:g} to {largest:g}), so they are clipped: another unit, or another control",
            name,
        )
        for name, share, least, most, smallest, largest in zip(
            names, beyond.tolist(), low, high, actions.min(axis=0).tolist(), actions.max(axis=0).tolist(), strict=True
        )
        if share > MOST_BEYOND
    ]


def find_other_labels(episodes: Sequence[tuple[Numbers, Numbers]], names: Sequence[str]) -> list[Finding]:
    """Actions (L, A), which training learns, that are not what was executed (L, A) but for noise."""
    found = []
    labels, executed = (np.concatenate(columns).T.astype(float) for columns in zip(*episodes, strict=True))  # (A, rows)
    for name, label, done in zip(names, labels, executed, strict=True):
        if len(label) < LEAST_ROWS or label.std() < 1e-9:
            continue
        slope = float(np.cov(label, done)[0, 1] / label.var(ddof=1))
        if not 1 / EQUAL < slope < EQUAL:
            text = f"action {name}: 1 in column action, which training learns, was executed as {slope:.2g} (executed_action)"
            found.append(Finding("label", text, name, slope))
    return found
