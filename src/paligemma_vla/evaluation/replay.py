"""Recorded actions, played open loop: do they do with the robot what the recording says?

The first thing to try when the loss is fine and the robot is not. If the recorded actions do not do the task, no policy that
learned them can: their meaning, their units or their timing are not what was thought.

`replay` plays episodes whose start is stored (column `reset`) in a simulator. `replay_episode` plays one with anything else: a
robot, or another simulator, moved by functions of the caller.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.envs import Environment, Start, make_environment, match_control, named_tasks, package_versions
from paligemma_vla.evaluation.recorded import RecordedEpisode, read_recorded
from paligemma_vla.evaluation.replay_findings import (
    TRIALS,
    Numbers,
    Trials,
    describe_factors,
    find_factors,
    find_other_labels,
    find_out_of_range,
    find_start,
    fit_slopes,
    propose_factors,
)
from paligemma_vla.progress import progress_bar
from paligemma_vla.schema import DatasetMetadata
from paligemma_vla.storage import atomic_write
from paligemma_vla.workers import WorkerPool

log = logging.getLogger(__name__)

Column = Literal["executed_action", "action"]
LEAST_RANGE = 1e-4  # of a number that is the same in the whole recording


@dataclass(frozen=True)
class Replayed:
    """What happened: state (L, P) before each action; success: an action solved the task, None: nobody said it."""

    state: NDArray[np.float32]
    success: bool | None


def replay_episode(
    actions: NDArray[np.float32],
    act: Callable[[NDArray[np.float32]], bool | None],
    state: Callable[[], NDArray[np.floating]],
    hz: float | None = None,
) -> Replayed:
    """Play actions (L, A), at least one, with a robot that stands where the recording began.

    act: executes one action (A,), as it was recorded; returns whether the task is solved now, None where nobody can say it.
    state: returns the present state (P,), in the units of the recording. hz: actions per second, `control_hz` of the data;
    None: as fast as `act` returns.
    """
    seen, success = [], None
    began = time.perf_counter()
    for number, action in enumerate(actions, start=1):
        seen.append(np.array(state(), np.float32))
        solved = act(action)
        if solved is not None:
            success = bool(solved or success)
        if hz is not None:
            time.sleep(max(0.0, began + number / hz - time.perf_counter()))
    return Replayed(np.stack(seen), success)


def describe_difference(recorded: Numbers, replayed: Numbers, tolerance: Numbers, metadata: DatasetMetadata) -> dict[str, Any]:
    """How a replayed state (L, P) differs from the recorded one (at least as long), by name and in the units of the data.

    tolerance (P,): more than this is a deviation. `deviation`: the first one, or None. `largest_difference`: of each number.
    """
    names, units = _names(metadata.state_names, schema.STATE, len(tolerance)), metadata.state_units or ("",) * len(tolerance)
    difference = np.abs(replayed - recorded[: len(replayed)])  # (L, P)
    deviation = None
    if (beyond := (difference > tolerance).any(axis=1)).any():
        step = int(beyond.argmax())
        number = int((difference[step] / tolerance).argmax())
        deviation = {
            "step": step,
            "dimension": names[number],
            "unit": units[number],
            "recorded": float(recorded[step, number]),
            "replayed": float(replayed[step, number]),
            "tolerance": float(tolerance[number]),
        }
    return {"deviation": deviation, "largest_difference": dict(zip(names, difference.max(axis=0).tolist(), strict=True))}


def _names(names: Sequence[str], column: str, dimension: int) -> Sequence[str]:
    """Names of the numbers in a column; their numbers where the data has no names."""
    return names or [f"{column}[{number}]" for number in range(dimension)]


@dataclass(frozen=True)
class ReplayConfig:
    """What to replay in a simulator.

    data: names of episode files, as training takes them. tasks: only these. episodes: the first ones of each task, None: all.
    column: the actions to play, None: what was executed. tolerance: of the state, as a share of what each of its numbers ranges
    over in the episodes that are played. workers: processes; 0 is this process.
    """

    env: str
    data: tuple[str, ...]
    output_dir: Path
    tasks: tuple[str, ...] | None = None
    episodes: int | None = None
    column: Column | None = None
    tolerance: float = 0.01
    workers: int = 0


def replay(config: ReplayConfig) -> dict[str, Any]:
    """Play recorded episodes in a simulator, open loop; returns what `replay.json` holds, and writes it.

    That is: the settings; by task how many episodes there are, how many succeed and how many did in the recording; findings:
    what may be wrong with the actions; and each episode, with where its state leaves the recorded one.

    Raises `SimulatorError` where data and simulator do not fit, and where no episode says how it starts; `DataError` for data
    that cannot be read.
    """
    began = time.monotonic()
    index = EpisodeIndex.build(config.data, "--data")
    metadata = index.layout.metadata
    simulator = _Simulator(config.env, metadata.action_representation, metadata.control_hz)
    episodes, unknown = _select(config, index, _environment(simulator))
    scale = np.maximum(np.ptp(np.concatenate([one.state for one in episodes]), axis=0), LEAST_RANGE)  # (P,)
    with WorkerPool(config.workers) as pool:
        played = _play_all(pool, simulator, episodes, config.column)
        entries = [_entry(one, config.tolerance * scale, metadata) for one in played]
        away = [one for one, entry in zip(played, entries, strict=True) if entry["deviation"] is not None]
        names = _names(metadata.action_names, schema.ACTION, index.layout.action_dim)
        factors = describe_factors(*_find_factors(pool, away, scale), names) if away else []
    actions = np.concatenate([one.job.actions for one in played])
    spec = _environment(simulator).spec
    findings = [
        *find_start(sum(entry["deviation"]["step"] == 0 for entry in entries if entry["deviation"]), len(entries)),
        *factors,
        *find_out_of_range(actions, spec.action_low, spec.action_high, names),
        *find_other_labels([(one.action, one.executed) for one in episodes], names),
    ]
    result = {
        "settings": {**asdict(config), "output_dir": str(config.output_dir)},
        "tasks": {task: _count(entries, task) for task in sorted({entry["task"] for entry in entries})},
        "findings": [asdict(finding) for finding in findings],
        "without_start": unknown,
        "episodes": entries,
        "versions": package_versions(),
        "wall_s": round(time.monotonic() - began, 2),
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(config.output_dir / "replay.json", json.dumps(result, indent=2) + "\n")
    return result


def _select(config: ReplayConfig, index: EpisodeIndex, env: Environment) -> tuple[list[RecordedEpisode], int]:
    """The episodes to play, and how many of the data do not say how they start."""
    differences = schema.robot_differences(index.layout, env.spec.layout)
    differences.pop("image_orientation", None)  # no picture is looked at
    if differences:
        faults = [f"{name}: {text}" for name, text in differences.items()]
        raise SimulatorError("\n  ".join([f"the data does not fit the environment '{config.env}':", *faults]))
    tasks = None if config.tasks is None else set(named_tasks(env, config.tasks))
    count: Counter[str] = Counter()
    chosen, found, unknown = [], set(), 0
    for episode in read_recorded(index):
        if episode.start is None:
            unknown += 1
            continue
        task = env.canonical(episode.start.task)
        found.add(task)
        if (tasks is None or task in tasks) and (config.episodes is None or count[task] < config.episodes):
            count[task] += 1
            chosen.append(episode)
    data = ", ".join(config.data)
    if not found:
        raise SimulatorError(
            f"{data}: got no column '{schema.RESET}', so how its episodes start is not known; a robot or a simulator of your "
            "own can play them, moved by functions of yours: paligemma_vla.evaluation.replay.replay_episode, see docs/replay.md"
        )
    if not chosen:
        raise SimulatorError(f"--tasks: got {', '.join(config.tasks or ())}, expected some of {', '.join(sorted(found))}")
    if unknown:
        log.warning("%s: %d episodes do not say how they start, and are left out", data, unknown)
    return chosen, unknown


class _Simulator(NamedTuple):
    """Which simulator, and how it takes actions: the arguments of `make_environment` and `match_control`."""

    env: str
    representation: str
    control_hz: float


class _Job(NamedTuple):
    """What a worker process plays. actions (L, A)."""

    simulator: _Simulator
    start: Start
    actions: NDArray[np.float32]


class _Played(NamedTuple):
    recorded: RecordedEpisode
    job: _Job
    replayed: Replayed


def _play_all(
    pool: WorkerPool, simulator: _Simulator, episodes: Sequence[RecordedEpisode], column: Column | None
) -> list[_Played]:
    """Play every episode; those that do not say how they start are not among them."""
    actions = [one.action if column == schema.ACTION else one.executed for one in episodes]
    jobs = [_Job(simulator, one.start, its) for one, its in zip(episodes, actions, strict=True) if one.start is not None]
    played = []
    with progress_bar(len(jobs), "replay", "episode") as bar:
        for episode, job, replayed in zip(episodes, jobs, pool.map(_replay_job, jobs), strict=True):
            played.append(_Played(episode, job, replayed))
            bar.update()
    return played


def _entry(played: _Played, tolerance: Numbers, metadata: DatasetMetadata) -> dict[str, Any]:
    """What `replay.json` says of one episode."""
    recorded, start = played.recorded, played.job.start
    return {
        **{"file": recorded.file, "row": recorded.row, "task": start.task, "seed": start.seed, "steps": len(recorded.action)},
        **{"recorded_success": recorded.success, "success": bool(played.replayed.success)},
        **describe_difference(recorded.state, played.replayed.state, tolerance, metadata),
    }


def _count(entries: Sequence[dict[str, Any]], task: str) -> dict[str, int]:
    own = [entry for entry in entries if entry["task"] == task]
    return {
        "episodes": len(own),
        "recorded_successes": sum(entry["recorded_success"] for entry in own),
        "successes": sum(entry["success"] for entry in own),
        "both": sum(entry["success"] and entry["recorded_success"] for entry in own),
        "deviations": sum(entry["deviation"] is not None for entry in own),
    }


def _find_factors(pool: WorkerPool, away: Sequence[_Played], scale: Numbers) -> tuple[Numbers, Trials]:
    """`find_factors` for episodes that leave the recorded state; some of them, over all tasks, are played again for it."""
    some = away[:: -(-len(away) // TRIALS)]

    def play(factors: Numbers) -> tuple[float, int]:
        jobs = (one.job._replace(actions=(one.job.actions * factors).astype(np.float32)) for one in some)
        return outcome(list(pool.map(_replay_job, jobs)))

    def outcome(replayed: Sequence[Replayed]) -> tuple[float, int]:
        pairs = [(after.state, one.recorded.state) for one, after in zip(some, replayed, strict=True)]
        away = [np.abs(state - recorded[: len(state)]).mean(axis=0) / scale for state, recorded in pairs]
        return float(np.mean(away)), sum(bool(after.success) for after in replayed)

    recorded = fit_slopes([(one.job.actions, one.recorded.state) for one in away])
    now = fit_slopes([(one.job.actions[: len(one.replayed.state)], one.replayed.state) for one in away])
    return find_factors(propose_factors(recorded, now), Trials(len(some), outcome([one.replayed for one in some])), play)


@lru_cache(maxsize=1)
def _environment(simulator: _Simulator) -> Environment:
    """The simulator of this process, kept from job to job."""
    env = make_environment(simulator.env)
    match_control(env, simulator.representation, simulator.control_hz)
    return env


def _replay_job(job: _Job) -> Replayed:
    env = _environment(job.simulator)
    state = job.start.reset(env)["state"]

    def act(action: NDArray[np.float32]) -> bool:
        nonlocal state
        result = env.step(action)
        state = result.state
        return result.success

    return replay_episode(job.actions[: env.longest_episode(job.start.task)], act, lambda: state)
