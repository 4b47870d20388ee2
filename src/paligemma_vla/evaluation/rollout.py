"""Closed-loop evaluation: success rates of a policy in a simulator, with intervals, controls and videos.

`RolloutPool` keeps simulators and policy alive in worker processes, so that several conditions cost one start.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from paligemma_vla import quiet_libraries
from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.envs import Environment, make_environment
from paligemma_vla.evaluation.episode import (
    ActingPolicy,
    Condition,
    EpisodeOutcome,
    check_compatible,
    instructions,
    play,
    write_video,
)
from paligemma_vla.hub import download_policy
from paligemma_vla.storage import atomic_write
from paligemma_vla.workers import WorkerPool

if TYPE_CHECKING:
    from paligemma_vla.model.quantize import Weights

log = logging.getLogger(__name__)

VERSIONED = ("paligemma-vla", "metaworld", "mujoco", "torch", "numpy")

PolicyFactory = Callable[[Environment], ActingPolicy]


@dataclass(frozen=True)
class RolloutConfig(Condition):
    """A condition and how often to play it.

    episodes: per task.   max_videos: per task, of successes and as many of failures (the first of each).
    output_dir: for `rollout.json` and `videos/`; None writes nothing, and then there are no videos.
    """

    tasks: tuple[str, ...] = ()
    episodes: int = 20
    max_videos: int = 0
    output_dir: Path | None = None


@dataclass(frozen=True)
class RolloutResult:
    """What `rollout.json` holds; tasks, episodes and videos have its form already."""

    settings: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    mean_success: float
    episodes: list[dict[str, Any]]
    videos: list[dict[str, Any]] = field(default_factory=list)
    wall_s: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate; unlike the normal one it is right at 0 and 1."""
    from scipy.stats import binomtest  # takes most of a second

    interval = binomtest(successes, episodes).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


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
        self.env_name, self.checkpoint_path, self.image_size, self.weights = env, checkpoint_path, image_size, weights
        self._env = make_environment(env, image_size)
        if policy_factory is None and checkpoint_path is not None:
            policy_factory = partial(load_checkpoint, download_policy(checkpoint_path), weights)
        self._has_policy = policy_factory is not None
        self._pool = WorkerPool(workers, _start_worker, (env, image_size, policy_factory))

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.close()
        self._env.close()
        for worker in _this_worker:  # with `workers=0`
            worker.env.close()
        _this_worker.clear()

    def run(self, config: RolloutConfig) -> RolloutResult:
        """Play one condition; episode k of a task is the same for any number of workers or tasks."""
        started = time.monotonic()
        tasks = self._check(config)
        if config.output_dir is not None:
            config.output_dir.mkdir(parents=True, exist_ok=True)
        most = config.max_videos if config.output_dir else 0
        jobs = ((task, index, config, most > 0) for task in tasks for index in range(config.episodes))
        label = f"{config.prompts}/{config.resets}/{config.image}/{config.policy}"
        outcomes: list[EpisodeOutcome] = []
        recorded: dict[str, EpisodeOutcome] = {}  # by the name of the video
        count: Counter[str] = Counter()
        played = self._pool.map(_play_job, jobs)
        for outcome in tqdm(played, label, config.episodes * len(tasks), unit="episode", disable=None):
            kind = f"{outcome.task}_{'success' if outcome.success else 'failure'}"
            count[kind] += 1
            if count[kind] <= most:
                recorded[f"{kind}_{count[kind]}"] = outcome
            outcomes.append(replace(outcome, snapshots=[]))
        videos = self._write_videos(recorded, config.output_dir) if config.output_dir else []
        by_task = {task: _task_result([outcome for outcome in outcomes if outcome.task == task]) for task in tasks}
        names = ("task", "index", "seed", "prompt", "success", "steps")
        result = RolloutResult(
            settings=self._settings(config, tasks),
            tasks=by_task,
            mean_success=float(np.mean([entry["rate"] for entry in by_task.values()])),
            episodes=[{name: getattr(outcome, name) for name in names} for outcome in outcomes],
            videos=videos,
            wall_s=round(time.monotonic() - started, 2),
        )
        if config.output_dir is not None:
            atomic_write(config.output_dir / "rollout.json", result.to_json())
        log.info("%s: mean success %.3f, %.0f s", label, result.mean_success, result.wall_s)
        return result

    def _check(self, config: RolloutConfig) -> tuple[str, ...]:
        """Task names as the environment spells them; everything that can be refused early is refused here."""
        tasks = tuple(dict.fromkeys(self._env.canonical(task) for task in config.tasks))
        if not tasks or config.episodes < 1:
            raise SimulatorError(f"rollout: got {len(tasks)} tasks, {config.episodes} episodes, expected at least 1 of each")
        if config.policy == "checkpoint" and not self._has_policy:
            raise SimulatorError("rollout: got no checkpoint; give --checkpoint_path, or --policy random")
        for task in tasks:
            instructions(self._env, task, config.prompts)
        return tasks

    def _write_videos(self, recorded: dict[str, EpisodeOutcome], folder: Path) -> list[dict[str, Any]]:
        videos: list[dict[str, Any]] = []
        for name, outcome in recorded.items():
            described = {"task": outcome.task, "success": outcome.success, "prompt": outcome.prompt}
            videos.append({**described, "path": f"videos/{name}.mp4", "poster": f"videos/{name}.jpg"})
        jobs = [(folder / video["path"], outcome) for video, outcome in zip(videos, recorded.values(), strict=True)]
        list(self._pool.map(_video_job, jobs))
        return videos

    def _settings(self, config: RolloutConfig, tasks: tuple[str, ...]) -> dict[str, Any]:
        sha256 = None
        if self.checkpoint_path is not None:
            from paligemma_vla.policy import fingerprint  # needs torch, which random actions do not

            sha256 = fingerprint(self.checkpoint_path)
        return asdict(config) | {
            "tasks": list(tasks),
            "output_dir": str(config.output_dir) if config.output_dir else None,
            "env": self.env_name,
            "image_size": self.image_size,
            "workers": self._pool.workers,
            "checkpoint_path": self.checkpoint_path,
            "checkpoint_sha256": sha256,
            "weights": self.weights or "full",
            "versions": dict(_versions()),
        }


def _task_result(outcomes: list[EpisodeOutcome]) -> dict[str, Any]:
    solved = [outcome.steps for outcome in outcomes if outcome.success]
    return {
        "successes": len(solved),
        "episodes": len(outcomes),
        "rate": len(solved) / len(outcomes),
        "ci95": list(wilson_interval(len(solved), len(outcomes))),
        "mean_steps_to_success": float(np.mean(solved)) if solved else None,
        "prompts_used": sorted({outcome.prompt for outcome in outcomes}),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONED:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


# What a worker process does: it keeps one simulator and one policy from job to job.


class _Worker:
    """One simulator and one policy. The first job that needs them builds them, where an error can be reported."""

    def __init__(self, env_name: str, image_size: int, factory: PolicyFactory | None) -> None:
        self.env_name, self.image_size, self.factory = env_name, image_size, factory

    @cached_property
    def env(self) -> Environment:
        return make_environment(self.env_name, self.image_size)

    @cached_property
    def policy(self) -> ActingPolicy | None:
        if self.factory is None:
            return None
        policy = self.factory(self.env)
        if control := policy.metadata.get("action_representation"):
            self.env.use_control(control)
        check_compatible(policy.metadata, self.env.spec)
        return policy


_this_worker: list[_Worker] = []  # one in a worker process; none in the process that started the pool


def _start_worker(env_name: str, image_size: int, factory: PolicyFactory | None) -> None:
    _this_worker[:] = [_Worker(env_name, image_size, factory)]


def _play_job(job: tuple[str, int, Condition, bool]) -> EpisodeOutcome:
    """Play one episode: (task, number, condition, whether to take snapshots for a video)."""
    (worker,) = _this_worker
    task, index, condition, record = job
    # The policy first: random actions, too, are of its kind of control, whichever condition is played first.
    policy = worker.policy
    return play(worker.env, policy, task, index, condition, record)


def _video_job(job: tuple[Path, EpisodeOutcome]) -> None:
    (worker,) = _this_worker
    path, outcome = job
    write_video(path, worker.env, outcome)


def load_checkpoint(path: str, weights: Weights | None, env: Environment) -> ActingPolicy:
    """The default `PolicyFactory`: a checkpoint on one CPU thread, since the bits of a result depend on their number."""
    quiet_libraries()
    import torch

    from paligemma_vla.policy import Policy

    torch.set_num_threads(1)
    policy: ActingPolicy = Policy.from_checkpoint(path, device="cpu", weights=weights)
    return policy
