"""What a worker process of a `RolloutPool` does: it keeps one simulator and one policy, plays episodes and films them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paligemma_vla import quiet_libraries
from paligemma_vla.evaluation.envs import Environment, make_environment
from paligemma_vla.evaluation.episode import ActingPolicy, Condition, EpisodeOutcome, check_compatible, play
from paligemma_vla.evaluation.videos import caption, write_video

if TYPE_CHECKING:
    from paligemma_vla.model.quantize import Weights

PolicyFactory = Callable[[Environment], ActingPolicy]
VIDEO_SIZE = 256


def load_checkpoint(path: str, weights: Weights | None, env: Environment) -> ActingPolicy:
    """The default `PolicyFactory`: a checkpoint on one CPU thread, which a result's bits would otherwise depend on."""
    quiet_libraries()
    import torch

    from paligemma_vla.policy import Policy

    torch.set_num_threads(1)
    policy: ActingPolicy = Policy.from_checkpoint(path, device="cpu", weights=weights)
    return policy


@dataclass
class _Worker:
    """What a worker process keeps from job to job: how to build its simulator and policy, and both once they are built."""

    env_name: str
    image_size: int
    factory: PolicyFactory | None
    env: Environment | None = None
    policy: ActingPolicy | None = None

    def environment(self) -> Environment:
        if self.env is None:
            self.env = make_environment(self.env_name, self.image_size)
        return self.env

    def actor(self) -> ActingPolicy:
        assert self.factory is not None
        if self.policy is None:
            env = self.environment()
            policy = self.factory(env)
            if control := policy.metadata.get("action_representation"):
                env.use_control(control)
            check_compatible(policy.metadata, env.spec)
            self.policy = policy
        return self.policy


_here: list[_Worker] = []  # the worker that this process is; none in the process that started the pool


def prepare(env_name: str, image_size: int, factory: PolicyFactory | None) -> None:
    """Note what this worker is for; nothing is built before the first job, where an error can be reported."""
    _here[:] = [_Worker(env_name, image_size, factory)]


def forget() -> None:
    """End of a pool in this process (`workers=0`)."""
    for worker in _here:
        if worker.env is not None:
            worker.env.close()
    _here.clear()


def play_job(job: tuple[str, int, Condition, bool]) -> EpisodeOutcome:
    """Play one episode: (task, number, condition, whether to take snapshots for a film)."""
    (worker,) = _here
    task, index, condition, record = job
    # With a policy at hand, random actions are of its kind, whichever condition is played first.
    policy = worker.actor() if worker.factory is not None else None
    return play(worker.environment(), policy, task, index, condition, record)


def film_job(job: tuple[EpisodeOutcome, Path]) -> None:
    """Film an episode from its snapshots, larger than the policy saw it."""
    (worker,) = _here
    outcome, path = job
    env, frames = worker.environment(), []
    for snapshot in outcome.snapshots:
        env.restore(snapshot)
        # Drawn at twice the size and averaged: the camera has no antialiasing.
        picture = env.render(2 * VIDEO_SIZE).reshape(VIDEO_SIZE, 2, VIDEO_SIZE, 2, 3).mean((1, 3)).astype(np.uint8)
        frames.append(caption(picture, outcome.prompt, outcome.success))
    write_video(path, frames)
