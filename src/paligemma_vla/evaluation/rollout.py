"""Closed-loop evaluation: success rates of a policy in a simulator, with intervals, controls and videos.

`RolloutPool` keeps simulators and policy alive in worker processes, so that several conditions cost one start.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from paligemma_vla import quiet_libraries, schema
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.compare import StartKey, failed_starts, wilson_interval
from paligemma_vla.evaluation.envs import (
    Environment,
    Resets,
    file_prefix,
    make_environment,
    match_control,
    named_tasks,
    package_versions,
)
from paligemma_vla.evaluation.episode import (
    Condition,
    EpisodeOutcome,
    check_compatible,
    instructions,
    play,
    write_video,
)
from paligemma_vla.hub import download_policy
from paligemma_vla.progress import progress_bar
from paligemma_vla.storage import atomic_write
from paligemma_vla.workers import WorkerPool

if TYPE_CHECKING:
    from paligemma_vla.model.quantize import Weights
    from paligemma_vla.policy import Policy

log = logging.getLogger(__name__)

EPISODE = ("task", "index", "seed", "prompt", "success", "steps", "jerk")  # what rollout.json says of one
HELPED = ("taken_over_at", "solved_with_help")  # and of one in which the expert may take over
# Columns beside those that training reads.
RECORDED = {schema.SUCCESS: pa.bool_(), schema.ACTOR: pa.string(), schema.RESET: pa.string()}

PolicyFactory = Callable[[Environment], "Policy"]


@dataclass(frozen=True)
class RolloutConfig(Condition):
    """A condition and how often to play it.

    episodes: per task.   max_videos: per task, of successes and as many of failures (the first of each).
    output_dir: for `rollout.json` and `videos/`; None writes nothing, and then there are no videos.
    failed_in: a former rollout.json; only the starts that the policy failed there are played.
    """

    tasks: tuple[str, ...] = ()
    episodes: int = 20
    max_videos: int = 0
    output_dir: Path | None = None
    failed_in: Path | None = None


@dataclass(frozen=True)
class _Player:
    """What plays: names of a simulator and a policy. The arguments of `RolloutPool`, which go to a worker with each job."""

    env: str
    image_size: int
    checkpoint_path: str | None
    weights: Weights | None
    policy_factory: PolicyFactory | None


class RolloutPool:
    """Workers with a simulator and a policy each.

    env: name of the environment.   checkpoint_path: what `Policy.from_checkpoint` takes; None allows only random actions.
    workers: processes; 0 is this process.   image_size: of the observations, pixels.   weights: as in `from_checkpoint`.
    policy_factory: replaces the checkpoint; called in each worker with its environment, so it must be picklable.

    `run` raises `SimulatorError` when the policy does not fit the environment, before an episode is played.
    """

    def __init__(
        self,
        env: str,
        checkpoint_path: str | None = None,
        *,
        workers: int = 1,
        image_size: int = 64,
        weights: Weights | None = None,
        policy_factory: PolicyFactory | None = None,
    ) -> None:
        self.checkpoint_path = checkpoint_path
        here = None if checkpoint_path is None else download_policy(checkpoint_path)
        self._player = _Player(env, image_size, here, weights, policy_factory)
        self._env = _environment(self._player)
        self._pool = WorkerPool(workers)

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.close()
        self._env.close()
        _environment.cache_clear()
        _policy.cache_clear()

    def run(self, config: RolloutConfig) -> dict[str, Any]:
        """Play one condition; episode k of a task is the same for any number of workers or tasks.

        Returns what `rollout.json` holds: settings; by task its successes, episodes, rate and 95 % interval; mean_success over
        the tasks; the episodes; the videos; seconds.
        """
        started = time.monotonic()
        starts = self._starts(config, self._check(config))
        tasks = tuple(dict.fromkeys(task for task, _ in starts))
        folder = config.output_dir
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        jobs = ((self._player, config, *start) for start in starts)
        label = f"{config.prompts}/{config.resets}/{config.image}/{config.policy}"
        outcomes: list[EpisodeOutcome] = []
        videos, video_jobs = [], []
        count: Counter[str] = Counter()
        with progress_bar(len(starts), label, "episode") as bar, ExitStack() as record:
            for outcome in self._recorded(config, self._pool.map(_play_job, jobs), record):
                bar.update()
                kind = f"{file_prefix(outcome.task)}_{'success' if outcome.success else 'failure'}"
                count[kind] += 1
                if folder is not None and count[kind] <= config.max_videos:
                    path = f"videos/{kind}_{count[kind]}.mp4"
                    described = {"task": outcome.task, "success": outcome.success, "prompt": outcome.prompt}
                    described["motion"] = {"control_hz": outcome.motion.control_hz, "speed": outcome.motion.speed}
                    videos.append({**described, "path": path, "poster": path.replace(".mp4", ".jpg")})
                    video_jobs.append((self._player, outcome, config.resets, folder / path))
                outcomes.append(outcome)
        list(self._pool.map(_video_job, video_jobs))
        helps = config.take_over is not None
        by_task = {task: _task_result([outcome for outcome in outcomes if outcome.task == task], helps) for task in tasks}
        names = EPISODE + HELPED if helps else EPISODE
        mean = float(np.mean([entry["rate"] for entry in by_task.values()]))
        result = {
            "settings": self._settings(config, tasks),
            "tasks": by_task,
            "mean_success": mean,
            "episodes": [{name: getattr(outcome, name) for name in names} for outcome in outcomes],
            "videos": videos,
            "wall_s": round(time.monotonic() - started, 2),
        }
        if folder is not None:
            atomic_write(folder / "rollout.json", json.dumps(result, indent=2) + "\n")
        log.info("%s: mean success %.3f, %.0f s", label, mean, result["wall_s"])
        return result

    def played(self, config: RolloutConfig) -> dict[str, Any] | None:
        """The rollout.json in `output_dir`, where it is of this very checkpoint and condition; else None."""
        path = (config.output_dir or Path()) / "rollout.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            wanted = json.loads(json.dumps(self._settings(config, self._check(config))))
            same = all(found["settings"].get(name) == value for name, value in wanted.items() if name != "workers")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return found if same else None

    def _recorded(
        self, config: RolloutConfig, outcomes: Iterable[EpisodeOutcome], files: ExitStack
    ) -> Iterator[EpisodeOutcome]:
        """The same outcomes, once their episodes are written into `config.record`, one file prefix per task."""
        writers: dict[str, EpisodeWriter] = {}
        for outcome in outcomes:
            if config.record is not None and outcome.recorded is not None:
                episode, metadata = outcome.recorded
                if outcome.task not in writers:
                    about = {"recorded_by": "paligemma-vla rollout", "fingerprint": str(self._fingerprint)}
                    described = replace(metadata, extra=about)
                    writer = EpisodeWriter(config.record, described, file_prefix(outcome.task), extra=RECORDED)
                    writers[outcome.task] = files.enter_context(writer)
                writers[outcome.task].write(episode)
            yield replace(outcome, recorded=None)

    @cached_property
    def _fingerprint(self) -> str | None:
        """Of the checkpoint, where there is one."""
        if self.checkpoint_path is None:
            return None
        from paligemma_vla.policy import fingerprint  # needs torch, which random actions do not

        return fingerprint(self.checkpoint_path)

    def _check(self, config: RolloutConfig) -> tuple[str, ...]:
        """Task names as the environment spells them; everything that can be refused early is refused here."""
        tasks = named_tasks(self._env, config.tasks)
        if not tasks or config.episodes < 1:
            raise SimulatorError(f"rollout: got {len(tasks)} tasks, {config.episodes} episodes, expected at least 1 of each")
        if config.policy == "checkpoint" and not (self._player.checkpoint_path or self._player.policy_factory):
            raise SimulatorError("rollout: got no checkpoint; give --checkpoint_path, or --policy random")
        if config.take_over_after is not None and config.take_over is None:
            raise SimulatorError("--take_over_after: got a number without --take_over expert; give both")
        for task in tasks:
            instructions(self._env, task, config.prompts)
            for found in config.record.glob(f"{file_prefix(task)}-?????.parquet") if config.record is not None else ():
                raise SimulatorError(f"--record {found.parent}: {found.name} is there already; give another folder")
        return tasks

    def _starts(self, config: RolloutConfig, tasks: tuple[str, ...]) -> list[StartKey]:
        """Task and index of every episode to play."""
        starts = [(task, index) for task in tasks for index in range(config.episodes)]
        if config.failed_in is not None:
            failed = failed_starts(config.failed_in, vars(config) | {"env": self._player.env})
            starts = [start for start in starts if start in failed]
            if not starts:
                asked = f"{config.episodes} episodes of {', '.join(tasks)}"
                raise SimulatorError(f"--failed_in {config.failed_in}: the policy failed in none of {asked}; give others")
        return starts

    def _settings(self, config: RolloutConfig, tasks: tuple[str, ...]) -> dict[str, Any]:
        return asdict(config) | {
            "tasks": list(tasks),
            "output_dir": str(config.output_dir) if config.output_dir else None,
            "record": str(config.record) if config.record else None,
            "failed_in": str(config.failed_in) if config.failed_in else None,
            "env": self._player.env,
            "image_size": self._player.image_size,
            "workers": self._pool.workers,
            "checkpoint_path": self.checkpoint_path,
            "checkpoint_sha256": self._fingerprint,
            "weights": self._player.weights or "full",
            "versions": package_versions(),
        }


def _task_result(outcomes: list[EpisodeOutcome], helps: bool) -> dict[str, Any]:
    """Of one task. successes are the policy's alone; with helps, those after the expert took over are counted beside them."""
    solved = [outcome.steps for outcome in outcomes if outcome.success]
    taken_over = [outcome for outcome in outcomes if outcome.taken_over_at is not None]
    help_given = {"taken_over": len(taken_over), "solved_with_help": sum(outcome.solved_with_help for outcome in taken_over)}
    return {
        "successes": len(solved),
        "episodes": len(outcomes),
        "rate": len(solved) / len(outcomes),
        "ci95": list(wilson_interval(len(solved), len(outcomes))),
        "mean_steps_to_success": float(np.mean(solved)) if solved else None,
        "mean_jerk": float(np.mean(jerks)) if (jerks := [each.jerk for each in outcomes if each.jerk is not None]) else None,
        "prompts_used": sorted({outcome.prompt for outcome in outcomes}),
        **(help_given if helps else {}),
    }


# What a worker process does: it keeps one simulator and one policy from job to job. The first job that needs them builds them,
# where an error can be reported.


@lru_cache(maxsize=1)
def _environment(player: _Player) -> Environment:
    return make_environment(player.env, player.image_size)


@lru_cache(maxsize=1)
def _policy(player: _Player) -> Policy | None:
    env = _environment(player)
    if player.policy_factory is not None:
        policy = player.policy_factory(env)
    elif player.checkpoint_path is not None:
        policy = load_checkpoint(player.checkpoint_path, player.weights)
    else:
        return None
    match_control(env, policy.metadata.get("action_representation") or "", policy.metadata.get("control_hz") or 0.0)
    check_compatible(policy.metadata, env.spec)
    return policy


def _play_job(job: tuple[_Player, Condition, str, int]) -> EpisodeOutcome:
    player, condition, task, index = job
    # The policy first: random actions, too, are of its kind of control, whichever condition is played first.
    policy = _policy(player)
    return play(_environment(player), policy, task, index, condition)


def _video_job(job: tuple[_Player, EpisodeOutcome, Resets, Path]) -> None:
    player, outcome, resets, path = job
    _policy(player)  # its kind of control
    write_video(path, _environment(player), outcome, resets)


def load_checkpoint(path: str, weights: Weights | None) -> Policy:
    """A checkpoint on one CPU thread, since the bits of a result depend on their number."""
    quiet_libraries()
    import torch

    from paligemma_vla.policy import Policy

    torch.set_num_threads(1)
    return Policy.from_checkpoint(path, device="cpu", weights=weights)
