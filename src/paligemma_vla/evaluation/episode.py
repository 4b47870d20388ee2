"""One closed-loop episode: a policy acts in an environment until the task is solved or time is up."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.envs import Environment, EnvSpec, Resets
from paligemma_vla.schema import Observation

Prompts = Literal["own", "opposite", "unseen"]
ImageSource = Literal["camera", "grey"]
Actor = Literal["checkpoint", "random"]

SEED_DOMAIN = 2  # `collect` has another, so no evaluation starts where a demonstration of the same seed did
GREY = 127
SNAPSHOT_EVERY = 2  # steps; at 20 frames a second, films of an 80 Hz robot run at half speed


class ActingPolicy(Protocol):
    """What is asked of a policy here; `paligemma_vla.Policy` is one."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def infer(
        self, observation: Mapping[str, Any], *, seed: int | None = None, num_steps: int | None = None
    ) -> Mapping[str, Any]:
        """`actions` (K, A) in real units, for an observation with images, `state` and `prompt`."""
        ...


@dataclass(frozen=True)
class Condition:
    """What an episode is played with, besides task and number.

    prompts: whose instructions. resets: see `Environment.reset`. image: `grey` replaces every picture by a uniform one.
    policy: `random` plays uniform actions. num_steps: Euler steps, None for the checkpoint's own number.
    execute: actions taken of each chunk before the policy is asked again, None for half of them.
    """

    seed: int = 0
    prompts: Prompts = "own"
    resets: Resets = "demo"
    image: ImageSource = "camera"
    policy: Actor = "checkpoint"
    num_steps: int | None = None
    execute: int | None = None


@dataclass(frozen=True)
class EpisodeOutcome:
    """How an episode went. seed: of its reset. steps: until success, or all of them. snapshots: for a film, if asked for."""

    task: str
    index: int
    seed: int
    prompt: str
    success: bool
    steps: int
    snapshots: list[object] = field(default_factory=list, repr=False)


def check_compatible(metadata: Mapping[str, Any], spec: EnvSpec) -> None:
    """Raise `SimulatorError` naming the fields in which a policy's metadata and an environment differ."""
    got, expected = schema.described_layout(metadata), spec.layout
    faults = [f"{name}: {text}" for name, text in schema.robot_differences(got, expected, cameras=None).items()]
    if not got.metadata.cameras and got.cameras != expected.cameras:
        faults.append(f"cameras: got {got.cameras}, expected {expected.cameras}")
    if faults:
        raise SimulatorError("\n  ".join(["the checkpoint does not fit the environment:", *faults]))


def instructions(env: Environment, task: str, kind: Prompts) -> tuple[str, ...]:
    """The instructions that `kind` stands for; raises `SimulatorError` when the task has none of that kind."""
    if kind != "opposite":
        found = env.prompts(task, kind)
    else:
        opposite = env.opposite(task)
        found = env.prompts(opposite, "own") if opposite else ()
    if not found:
        raise SimulatorError(f"--prompts {kind}: task '{task}' has none of these; expected --prompts own")
    return found


def play(
    env: Environment, policy: ActingPolicy | None, task: str, index: int, condition: Condition, record: bool = False
) -> EpisodeOutcome:
    """Play episode number `index` of `task`; start and instruction depend on (seed, task, index) alone.

    The same start is met under every condition, so conditions can be compared episode by episode.
    """
    seeds = np.random.SeedSequence([SEED_DOMAIN, condition.seed, zlib.crc32(task.encode()), index])
    reset_seed, choice, noise_seed = (int(word) for word in seeds.generate_state(3))
    prompts = instructions(env, task, condition.prompts)
    prompt = prompts[choice % len(prompts)]
    view: Observation | None = env.reset(task, reset_seed, condition.resets)
    actor = _Actor(env.spec, policy, condition, prompt, noise_seed)
    snapshots = [env.snapshot()] if record else []
    steps, done, success = 0, False, False
    while not (done or success):
        if actor.wants_observation:
            actor.see(view if view is not None else env.observe())
        view = None
        result = env.step(actor.next_action())
        steps, done, success = steps + 1, result.done, result.success
        if record and (steps % SNAPSHOT_EVERY == 0 or done or success):
            snapshots.append(env.snapshot())
    return EpisodeOutcome(task, index, reset_seed, prompt, success, steps, snapshots)


class _Actor:
    """Asks the policy for a chunk, hands out its first actions, asks again; or draws random actions."""

    def __init__(self, spec: EnvSpec, policy: ActingPolicy | None, condition: Condition, prompt: str, noise_seed: int) -> None:
        self._spec, self._policy, self._condition, self._prompt = spec, policy, condition, prompt
        self._rng = np.random.default_rng(noise_seed)
        self._queue: deque[NDArray[np.floating]] = deque()

    @property
    def wants_observation(self) -> bool:
        return self._condition.policy == "checkpoint" and not self._queue

    def see(self, view: Observation) -> None:
        assert self._policy is not None
        observation: dict[str, Any] = {**view, schema.PROMPT: self._prompt}
        if self._condition.image == "grey":
            cameras = [schema.image_key(number + 1) for number in range(len(self._spec.metadata.cameras))]
            observation |= {key: np.full_like(observation[key], GREY) for key in cameras if key in observation}
        seed = int(self._rng.integers(2**31))
        actions = np.asarray(self._policy.infer(observation, seed=seed, num_steps=self._condition.num_steps)["actions"])
        self._queue.extend(actions[: _executed(self._condition.execute, len(actions))])  # (M, A) of (K, A)

    def next_action(self) -> NDArray[np.floating]:
        if self._condition.policy == "random":
            return self._rng.uniform(self._spec.action_low, self._spec.action_high)
        return self._queue.popleft()


def _executed(execute: int | None, horizon: int) -> int:
    if execute is None:
        return max(1, horizon // 2)
    if not 1 <= execute <= horizon:
        raise SimulatorError(f"--execute: got {execute}, expected 1 to {horizon}, the policy's horizon")
    return execute
