"""Closed-loop evaluation: success rates of a checkpoint in a simulator, with intervals, controls and films.

`RolloutPool` keeps simulators and policy alive in worker processes, so that several conditions cost one start.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation import rollout_worker
from paligemma_vla.evaluation.envs import make_environment
from paligemma_vla.evaluation.episode import Condition, EpisodeOutcome, instructions
from paligemma_vla.evaluation.rollout_worker import PolicyFactory, load_checkpoint
from paligemma_vla.export.hub import local_copy
from paligemma_vla.workers import WorkerPool

if TYPE_CHECKING:
    from paligemma_vla.model.quantize import Weights

log = logging.getLogger(__name__)

VERSIONED = ("paligemma-vla", "metaworld", "mujoco", "torch", "numpy")


@dataclass(frozen=True)
class RolloutConfig(Condition):
    """A condition and how often to play it.

    episodes: per task.   max_videos: films per task of successes, and as many of failures (the first of each).
    output_dir: for `rollout.json` and `videos/`; None writes nothing, and then there are no films.
    """

    tasks: tuple[str, ...] = ()
    episodes: int = 20
    max_videos: int = 0
    output_dir: Path | None = None


@dataclass(frozen=True)
class RolloutResult:
    """What `rollout.json` holds; tasks, episodes and videos are in its form already."""

    settings: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    mean_success: float
    episodes: list[dict[str, Any]]
    videos: list[dict[str, Any]] = field(default_factory=list)
    wall_s: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def wilson_interval(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a success rate, 95 % by default; unlike the normal one it is right at 0 and 1."""
    if not 0 <= successes <= episodes or episodes == 0:
        raise ValueError(f"got {successes} successes of {episodes} episodes")
    rate = successes / episodes
    scale = 1 + z**2 / episodes
    centre = (rate + z**2 / (2 * episodes)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    # At the ends the bound is exact; rounding would leave 1e-16 of it.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == episodes else centre + half


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
            policy_factory = partial(load_checkpoint, local_copy(checkpoint_path), weights)
        self._has_policy = policy_factory is not None
        self._pool = WorkerPool(workers, rollout_worker.prepare, (env, image_size, policy_factory))

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()
        self._env.close()
        rollout_worker.forget()

    def run(self, config: RolloutConfig) -> RolloutResult:
        """Play one condition; episode k of a task is the same for any number of workers or tasks."""
        started = time.monotonic()
        tasks = self._check(config)
        if config.output_dir is not None:
            config.output_dir.mkdir(parents=True, exist_ok=True)
        films = config.max_videos if config.output_dir else 0
        jobs = ((task, index, config, films > 0) for task in tasks for index in range(config.episodes))
        outcomes: list[EpisodeOutcome] = []
        chosen: list[EpisodeOutcome] = []
        label = f"{config.prompts}/{config.resets}/{config.image}/{config.policy}"
        played = self._pool.map(rollout_worker.play_job, jobs)
        for outcome in tqdm(played, label, config.episodes * len(tasks), unit="episode", disable=None):
            alike = [other for other in chosen if (other.task, other.success) == (outcome.task, outcome.success)]
            if len(alike) < films:
                chosen.append(outcome)
            outcomes.append(_without_snapshots(outcome))
        videos = self._film(chosen, config.output_dir) if config.output_dir and chosen else []
        result = self._result(config, tasks, outcomes, videos, time.monotonic() - started)
        if config.output_dir is not None:
            (config.output_dir / "rollout.json").write_text(result.to_json())
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

    def _film(self, chosen: list[EpisodeOutcome], output_dir: Path) -> list[dict[str, Any]]:
        count: dict[tuple[str, bool], int] = {}
        jobs, videos = [], []
        for outcome in chosen:
            key = (outcome.task, outcome.success)
            count[key] = count.get(key, 0) + 1
            name = f"{outcome.task}_{'success' if outcome.success else 'failure'}_{count[key]}"
            path = Path("videos") / f"{name}.mp4"
            jobs.append((outcome, output_dir / path))
            videos.append(
                {
                    "task": outcome.task,
                    "success": outcome.success,
                    "prompt": outcome.prompt,
                    "path": path.as_posix(),
                    "poster": path.with_suffix(".jpg").as_posix(),
                }
            )
        for _ in self._pool.map(rollout_worker.film_job, jobs):
            pass
        return videos

    def _result(
        self,
        config: RolloutConfig,
        tasks: tuple[str, ...],
        outcomes: list[EpisodeOutcome],
        videos: list[dict[str, Any]],
        seconds: float,
    ) -> RolloutResult:
        by_task = {task: _task_result([o for o in outcomes if o.task == task]) for task in tasks}
        settings = asdict(config) | {
            "tasks": list(tasks),
            "output_dir": str(config.output_dir) if config.output_dir else None,
            "env": self.env_name,
            "image_size": self.image_size,
            "workers": self._pool.workers,
            "checkpoint_path": self.checkpoint_path,
            "checkpoint_sha256": _fingerprint(self.checkpoint_path),
            "weights": self.weights or "full",
            "versions": _versions(),
        }
        names = ("task", "index", "seed", "prompt", "success", "steps")
        return RolloutResult(
            settings=settings,
            tasks=by_task,
            mean_success=float(np.mean([entry["rate"] for entry in by_task.values()])),
            episodes=[{name: getattr(outcome, name) for name in names} for outcome in outcomes],
            videos=videos,
            wall_s=round(seconds, 2),
        )


def rollout(
    config: RolloutConfig,
    checkpoint_path: str | None = None,
    *,
    env: str = "metaworld",
    workers: int = 1,
    image_size: int = 64,
    weights: Weights | None = None,
) -> RolloutResult:
    """Play one condition with a pool of its own; see `RolloutPool` for several."""
    with RolloutPool(env, checkpoint_path, workers=workers, image_size=image_size, weights=weights) as pool:
        return pool.run(config)


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


def _without_snapshots(outcome: EpisodeOutcome) -> EpisodeOutcome:
    return EpisodeOutcome(outcome.task, outcome.index, outcome.seed, outcome.prompt, outcome.success, outcome.steps)


def _fingerprint(path: str | None) -> str | None:
    if path is None:
        return None
    from paligemma_vla.export.folder import fingerprint  # needs torch, which random actions do not

    return fingerprint(path)


def _versions() -> dict[str, str]:
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
