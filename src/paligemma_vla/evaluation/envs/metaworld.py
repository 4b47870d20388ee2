"""MetaWorld 3 (a Sawyer arm over a table, MuJoCo physics) behind the `Environment` interface: its 50 tasks and experts.

The policy is shown one picture and where its own hand is; never where the object or the goal is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import SimulatorError, closest, needs_extra
from paligemma_vla.evaluation.envs import Control, EnvSpec, PromptKind, Resets, StepResult
from paligemma_vla.evaluation.envs.metaworld_tasks import (
    OPPOSITES,
    SCENES,
    SUITES,
    SWEEPS,
    TASKS,
    Scene,
    draw_start,
    move_hand_away,
    prompts,
)
from paligemma_vla.evaluation.envs.offscreen import OffscreenCamera, View, ensure_backend
from paligemma_vla.schema import DatasetMetadata, Observation

# MetaWorld's own `corner` cameras come upside down, and look at the arm rather than at what it works on.
VIEW = View(lookat=(0.02, 0.70, 0.12), distance=1.05, azimuth=135.0, elevation=-40.0)
STATE_DIM = 4  # of MetaWorld's 39 observed numbers, these say nothing about object and goal
HAND, HANDLE = slice(0, 3), slice(4, 7)  # of the 39: x, y, z in metres
DEMO_MAX_STEPS, MAX_STEPS = 150, 500  # MetaWorld refuses a 501st step
STROKE = 0.01  # metres per unit of a delta, and the furthest that the target moves in one step

METADATA = DatasetMetadata(
    robot="metaworld-sawyer",
    cameras=("table",),
    image_orientation="upright",
    state_names=("hand_x", "hand_y", "hand_z", "gripper_open"),
    state_units=("m", "m", "m", "normalised"),
    action_names=("delta_x", "delta_y", "delta_z", "gripper"),
    action_units=("cm", "cm", "cm", "normalised"),
    action_convention="hand target moves by 1 cm per unit in x, y, z (metres in the world frame); gripper +1 = close",
    action_representation="delta",
    control_hz=80.0,
)
ABSOLUTE_METADATA = replace(
    METADATA,
    action_names=("target_x", "target_y", "target_z", "gripper"),
    action_units=("m", "m", "m", "normalised"),
    action_convention="hand target in x, y, z (metres in the world frame), approached by 1 cm per step; gripper +1 = close",
    action_representation="absolute",
)
# As MT50 is published with pictures (LeRobot's environment): a camera of MetaWorld's, moved, its picture turned by 180 degrees.
PUBLISHED_CAMERA, PUBLISHED_PLACE = "corner2", (0.75, 0.075, 0.7)
PUBLISHED_ORIENTATION = "turned by 180 degrees ([::-1, ::-1])"
SPEC = EnvSpec(METADATA, image_size=64, action_low=(-1.0,) * 4, action_high=(1.0,) * 4, action_scale=(1.0,) * 4)
# Every task's workspace lies in this box; the tasks themselves keep the target in their own.
ABSOLUTE_SPEC = EnvSpec(
    ABSOLUTE_METADATA,
    image_size=64,
    action_low=(-0.5, 0.35, -0.15, -1.0),
    action_high=(0.5, 1.0, 0.6, 1.0),
    action_scale=(STROKE, STROKE, STROKE, 1.0),
)


def _repeated(spec: EnvSpec, repeat: int) -> EnvSpec:
    """The specification whose actions last `repeat` simulator steps."""
    scale = (*(repeat * stroke for stroke in spec.action_scale[:3]), *spec.action_scale[3:])
    spec = replace(spec, metadata=replace(spec.metadata, control_hz=spec.metadata.control_hz / repeat), action_scale=scale)
    if spec.metadata.action_representation == "absolute":
        return spec
    return replace(spec, action_low=tuple(-stroke for stroke in scale), action_high=scale)


class _Task:
    """One MetaWorld task in memory: simulator, expert, cameras by size."""

    def __init__(self, name: str, simulator: Any, expert: Any, published: bool) -> None:
        self.name, self.simulator, self.expert, self.published = name, simulator, expert, published
        self.cameras: dict[int, OffscreenCamera] = {}
        # MetaWorld writes positions of bodies and sites into the model itself; resetting the data leaves them as they are.
        self.pristine = simulator.model.body_pos.copy(), simulator.model.site_pos.copy()
        # Environments built directly ignore `reset(seed=)`; these make `seed()` count, and show some experts their goal.
        simulator._freeze_rand_vec, simulator.seeded_rand_vec = False, True
        simulator._set_task_called, simulator._partially_observable = True, False
        del simulator.sawyer_observation_space  # cached; it would clip the goal that the expert sees to zero
        if published:
            simulator.model.camera(PUBLISHED_CAMERA).pos[:] = PUBLISHED_PLACE

    def draw(self, size: int) -> NDArray[np.uint8]:
        if size not in self.cameras:
            view = PUBLISHED_CAMERA if self.published else VIEW
            self.cameras[size] = OffscreenCamera(self.simulator.model, size, view, sites=self.published)
        picture = self.cameras[size].render(self.simulator.data)
        return np.ascontiguousarray(picture[::-1, ::-1]) if self.published else picture


class MetaWorldEnvironment:
    """`Environment` over MetaWorld. Use it from one thread: MuJoCo's graphics contexts belong to the thread that made them.

    Goals are marked in MetaWorld by sites, which are not drawn. In tasks such as `reach` and `push` nothing else shows the
    goal, so there no policy can do better than guess it.

    image_size: of `observe`, pixels. published: as the benchmark MT50 is played: with its camera, which shows goals, with
    MetaWorld's own starts and 500 steps in all tasks. Raises `SimulatorError` when MetaWorld or graphics are missing.
    """

    def __init__(self, image_size: int = 64, published: bool = False) -> None:
        self._published = published
        self.spec = self._looking(replace(SPEC, image_size=image_size))
        ensure_backend()
        with needs_extra("MetaWorld cannot be imported", "metaworld", SimulatorError):
            import mujoco
            from metaworld.env_dict import ENV_CLS_MAP
            from metaworld.policies import ENV_POLICY_MAP
        self._mujoco: Any = mujoco
        self._classes: Any = ENV_CLS_MAP
        self._experts: Any = ENV_POLICY_MAP
        self._loaded: dict[str, _Task] = {}
        self._current: _Task | None = None
        self._observed: NDArray[np.float64] = np.zeros(0)
        self._repeat = 1
        self._gripper = 0.0  # commanded last

    def use_control(self, control: Control, action_repeat: int = 1) -> None:
        if control not in get_args(Control):
            raise SimulatorError(f"metaworld control: got '{control}'{closest(str(control), get_args(Control))}")
        if action_repeat < 1:
            raise SimulatorError(f"metaworld action_repeat: got {action_repeat}, expected at least 1")
        spec = self._looking(_repeated(SPEC if control == "delta" else ABSOLUTE_SPEC, action_repeat))
        self.spec, self._repeat = replace(spec, image_size=self.spec.image_size), action_repeat

    def _looking(self, spec: EnvSpec) -> EnvSpec:
        if not self._published:
            return spec
        looks = replace(spec.metadata, cameras=(PUBLISHED_CAMERA,), image_orientation=PUBLISHED_ORIENTATION)
        return replace(spec, metadata=looks)

    def _scene(self, task: str) -> Scene | None:
        """How this project's demonstrations of a task start; None: as MetaWorld starts them."""
        return None if self._published else SCENES.get(self.canonical(task))

    def tasks(self) -> tuple[str, ...]:
        return TASKS

    def suites(self) -> Mapping[str, tuple[str, ...]]:
        return SUITES

    def canonical(self, task: str) -> str:
        name = task.removesuffix("-v3")
        if name not in TASKS:
            raise SimulatorError(f"metaworld task: got '{task}'{closest(name, TASKS)}")
        return name

    def opposite(self, task: str) -> str | None:
        return OPPOSITES.get(self.canonical(task))

    def prompts(self, task: str, kind: PromptKind) -> tuple[str, ...]:
        return prompts(self.canonical(task), kind)

    def max_steps(self, task: str) -> int:
        return (MAX_STEPS if self._scene(task) is None else DEMO_MAX_STEPS) // self._repeat

    def longest_episode(self, task: str) -> int:
        return MAX_STEPS // self._repeat

    def can_start_done(self, task: str) -> bool:
        scene = self._scene(task)
        return scene is not None and scene.travel is not None

    def reset(
        self, task: str, seed: int, resets: Resets = "demo", *, start_away: bool = False, start_done: bool = False
    ) -> Observation:
        """See `Environment.reset`. The tasks without a `demo` distribution start from MetaWorld's own with either value."""
        name = self.canonical(task)
        if resets == "protocol" and not self._published:
            raise SimulatorError("metaworld resets: got protocol, expected demo or stock; metaworld:mt50 has a published one")
        if start_done and not (resets == "demo" and self.can_start_done(name)):
            raise SimulatorError(f"metaworld task '{name}' cannot start done with {resets} resets")
        loaded = self._load(name)
        simulator, scene = loaded.simulator, self._scene(name)
        # MetaWorld leaves the last episode's object in the model, where the hand meets it on its way home.
        simulator.model.body_pos[:], simulator.model.site_pos[:] = loaded.pristine
        self._mujoco.mj_resetData(simulator.model, simulator.data)
        simulator._freeze_rand_vec = False
        simulator.seed(seed)
        rng = np.random.default_rng(seed)
        if resets == "demo" and scene is not None:
            draw_start(simulator, scene, rng, start_done)
        else:
            simulator.reset()
        # MetaWorld moves bodies after its last forward pass: without this, picture and expert see the previous position.
        self._mujoco.mj_forward(simulator.model, simulator.data)
        if start_away:
            move_hand_away(simulator, rng)
        simulator._prev_obs = simulator._get_curr_obs_combined_no_goal()
        self._observed = simulator._get_obs()
        self._current, self._gripper = loaded, 0.0
        return self.observe()

    def step(self, action: NDArray[np.floating]) -> StepResult:
        task = self._task()
        limit = self.longest_episode(task.name)
        if task.simulator.curr_path_length >= limit * self._repeat:
            raise SimulatorError(f"metaworld task '{task.name}': the episode is over after {limit} steps; call reset")
        clipped = np.clip(np.asarray(action, np.float32), self.spec.action_low, self.spec.action_high)
        absolute = self.spec.metadata.action_representation == "absolute"
        for _ in range(self._repeat):
            move = (clipped[:3] - self._target()) / STROKE if absolute else clipped[:3] / self._repeat
            self._observed, _, _, _, info = task.simulator.step(np.append(move, clipped[3:]))
        done = task.simulator.curr_path_length >= self.max_steps(task.name) * self._repeat
        self._gripper = float(clipped[3])
        return StepResult(self._state(), success=bool(info["success"]), done=done)

    def observe(self) -> Observation:
        return {"image_1": self.render(self.spec.image_size), "state": self._state()}

    def _state(self) -> NDArray[np.float32]:
        return self._observed[:STATE_DIM].astype(np.float32)  # (4,)

    def hold_action(self) -> NDArray[np.float32]:
        absolute = self.spec.metadata.action_representation == "absolute"
        return np.append(self._target() if absolute else np.zeros(3), self._gripper).astype(np.float32)

    def expert_action(self) -> NDArray[np.float32]:
        """See `Environment.expert_action`. MetaWorld's expert, where there is none of ours."""
        task = self._task()
        if task.name in SWEEPS:
            action = SWEEPS[task.name].action(self._observed[HAND], self._observed[HANDLE])
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Constant")  # that actions get clipped is what comes next
                action = task.expert.get_action(self._observed)
        delta = np.clip(action, SPEC.action_low, SPEC.action_high).astype(np.float32)
        delta[:3] *= self._repeat
        if self.spec.metadata.action_representation == "delta":
            return delta
        target = np.clip(self._target() + delta[:3] * STROKE, task.simulator.mocap_low, task.simulator.mocap_high)
        return np.append(target, delta[3:]).astype(np.float32)

    def _target(self) -> NDArray[np.float64]:
        """Where the hand is being led to (3,), in metres."""
        target: NDArray[np.float64] = self._task().simulator.data.mocap_pos[0]
        return target

    def render(self, size: int) -> NDArray[np.uint8]:
        return self._task().draw(size)

    def close(self) -> None:
        for task in self._loaded.values():
            for camera in task.cameras.values():
                camera.close()
        self._loaded.clear()
        self._current = None

    def _load(self, name: str) -> _Task:
        if name not in self._loaded:
            simulator, expert = self._classes[f"{name}-v3"](), self._experts[f"{name}-v3"]()
            self._loaded[name] = _Task(name, simulator, expert, self._published)
        return self._loaded[name]

    def _task(self) -> _Task:
        assert self._current is not None, "call reset first"
        return self._current
