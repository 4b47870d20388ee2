"""SO-101 (a hobby arm of five joints over a table, MuJoCo) behind the `Environment` interface: the third robot, and the example
of how little another simulator takes.

The simulator, its task and its expert are lerobot-env-so101's. It does not draw where the cube has to go, so here a disc lies
there: a policy can see it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import SimulatorError, closest, needs_extra
from paligemma_vla.evaluation.envs import Control, EnvSpec, PromptKind, Resets, StepResult
from paligemma_vla.evaluation.envs.offscreen import Disc, OffscreenCamera, ensure_backend
from paligemma_vla.schema import DatasetMetadata, Observation

TASK, MAX_STEPS = "pick-place", 300
STROKE = 0.025  # m, of an action of 1: as its expert and its own policies are made for
DRIFT = 6  # actions at random, where the hand is to start away from home
GREEN = (0.1, 0.7, 0.2, 1.0)
PROMPTS: Mapping[PromptKind, tuple[str, ...]] = {
    "own": ("put the cube on the green disc", "pick up the cube and place it on the disc", "move the cube onto the green disc"),
    "unseen": ("pick up the cube and move it onto the green disc",),
}
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")
METADATA = DatasetMetadata(
    robot="so101",
    cameras=("front",),
    image_orientation="upright",
    state_names=(*JOINTS, *(f"{joint}_velocity" for joint in JOINTS), "gripper", "hand_x", "hand_y", "hand_z"),
    state_units=(*("rad",) * 5, *("rad/s",) * 5, "normalised", "m", "m", "m"),
    action_names=("delta_x", "delta_y", "delta_z", "gripper"),
    action_units=("normalised",) * 4,
    action_convention="the point between the jaws moves by 2.5 cm per unit in x, y, z; gripper 1 = open, 0 = closed",
    action_representation="delta",
    control_hz=10.0,
)
SPEC = EnvSpec(METADATA, 64, action_low=(-1.0, -1.0, -1.0, 0.0), action_high=(1.0,) * 4, action_scale=(1.0,) * 4)


class SO101Environment:
    """`Environment` over SO101PickPlace-v0. Use it from one thread. image_size: of `observe`, pixels.

    Raises `SimulatorError` when the simulator or graphics are missing.
    """

    def __init__(self, image_size: int = 64) -> None:
        self.spec = replace(SPEC, image_size=image_size)
        ensure_backend()
        with needs_extra("SO-101 cannot be imported", "so101", SimulatorError):
            from lerobot_env_so101 import SO101PickPlaceGymEnv
            from lerobot_env_so101.scripted.pick_place import PickPlaceController
        self._env: Any = SO101PickPlaceGymEnv(random_block_position=True, action_scale=STROKE)
        self._expert: Any = PickPlaceController(STROKE)
        self._cameras: dict[int, OffscreenCamera] = {}
        self._steps, self._gripper = 0, 1.0

    def use_control(self, control: Control, action_repeat: int = 1) -> None:
        if (control, action_repeat) != ("delta", 1):
            got = f"'{control}' with {action_repeat} simulator steps per action"
            raise SimulatorError(f"so101 control: got {got}, expected 'delta' with 1")

    def tasks(self) -> tuple[str, ...]:
        return (TASK,)

    def suites(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def canonical(self, task: str) -> str:
        if task != TASK:
            raise SimulatorError(f"so101 task: got '{task}'{closest(task, (TASK,))}")
        return task

    def opposite(self, task: str) -> str | None:
        return None

    def prompts(self, task: str, kind: PromptKind) -> tuple[str, ...]:
        return PROMPTS[kind]

    def max_steps(self, task: str) -> int:
        return MAX_STEPS

    def longest_episode(self, task: str) -> int:
        return MAX_STEPS

    def can_start_done(self, task: str) -> bool:
        return False

    def reset(
        self, task: str, seed: int, resets: Resets = "demo", *, start_away: bool = False, start_done: bool = False
    ) -> Observation:
        """See `Environment.reset`. There is one distribution of starts."""
        self.canonical(task)
        if start_done or resets == "protocol":
            raise SimulatorError("so101: got a start that is done, or a published one; it has neither")
        self._env.reset(seed=seed)
        self._expert.reset()
        drift = np.random.default_rng(seed).uniform(-1, 1, 3)
        for _ in range(DRIFT if start_away else 0):
            self._env.step(np.append(drift, 1.0))
        self._steps, self._gripper = 0, 1.0
        return self.observe()

    def step(self, action: NDArray[np.floating]) -> StepResult:
        if self._steps >= MAX_STEPS:
            raise SimulatorError(f"so101 task '{TASK}': the episode is over after {MAX_STEPS} steps; call reset")
        clipped = np.clip(np.asarray(action, np.float32), self.spec.action_low, self.spec.action_high)
        *_, info = self._env.step(clipped)
        self._steps, self._gripper = self._steps + 1, float(clipped[3])
        return StepResult(self._state(), success=bool(info["succeed"]), done=self._steps >= MAX_STEPS)

    def observe(self) -> Observation:
        return {"image_1": self.render(self.spec.image_size), "state": self._state()}

    def hold_action(self) -> NDArray[np.float32]:
        return np.array([0, 0, 0, self._gripper], np.float32)

    def expert_action(self) -> NDArray[np.float32]:
        block = np.array(self._env.data.sensor("block_pos").data)
        action: NDArray[np.float32] = self._expert.act(self._env.ik_point_pos, block, self._env.goal_pos)
        return np.clip(action, self.spec.action_low, self.spec.action_high).astype(np.float32)

    def render(self, size: int) -> NDArray[np.uint8]:
        if size not in self._cameras:
            self._cameras[size] = OffscreenCamera(self._env.model, size, "front")
        x, y = self._env.goal_pos[:2]
        return self._cameras[size].render(self._env.data, Disc((x, y, 0.001), 0.03, GREEN))

    def close(self) -> None:
        for camera in self._cameras.values():
            camera.close()
        self._cameras.clear()

    def _state(self) -> NDArray[np.float32]:
        return np.asarray(self._env.get_robot_state(), np.float32)  # (14,)
