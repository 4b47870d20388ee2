"""How an episode of a MetaWorld task begins when nothing but the instruction may tell what to do.

MetaWorld starts the two tasks of a pair differently: other ranges of places, the drawer shut for one and out for the other.
A policy could then read the task off the picture. Here both tasks of a pair draw the place from one box, wider than
MetaWorld's, so that it must be seen and cannot be guessed; drawer and window start along their travel, where the task is not
solved yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Range = tuple[float, float]

# Of demo resets, those that start at MetaWorld's own point of the travel. It is an end of the travel: a policy that is unsure
# where the handle is guesses too far from it, comes down on the wrong side, and misses.
STOCK_SHARE = 3 / 4
HOME_STEPS = 50  # simulator steps in which MetaWorld brings the hand home
AWAY_LOW, AWAY_HIGH = (-0.25, 0.40, 0.10), (0.25, 0.65, 0.40)  # metres: where a displaced hand may begin
AWAY_LEAST, AWAY_TRIES = 0.06, 20
HOLD_STEPS = 4  # control steps in which a hand that is in an object's way shows it
OBJECT_UNTOUCHED = 2e-3  # metres or radians by which it may
ROBOT_JOINTS = (*(f"right_j{number}" for number in range(7)), "r_close", "l_close")


@dataclass(frozen=True)
class Travel:
    """Where along its slide (metres) a part may start: `unsolved` and `done` ranges of a task, and MetaWorld's point."""

    joint: str
    stock: float
    unsolved: Range
    done: Range


@dataclass(frozen=True)
class Scene:
    """The box of places (x, y, z in metres; z at one of its ends) shared by a pair, and the travel of a sliding part."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    travel: Travel | None = None


FAUCET = Scene((-0.175, 0.78, 0.0), (0.175, 0.85, 0.0))
WINDOW_BOX = ((-0.1, 0.7, 0.16), (0.1, 0.9, 0.2))  # MetaWorld opens windows at z = 0.16 and closes them at z = 0.2
DRAWER_BOX = ((-0.32, 0.9, 0.0), (0.32, 0.9, 0.0))

# The ranges keep at least 1 cm from the point where the success test turns (`test_demo_starts_are_unsolved` measures it);
# drawers 3 cm and more, because random pushes move them that far.
SCENES: dict[str, Scene] = {
    "faucet-open": FAUCET,
    "faucet-close": FAUCET,
    "window-open": Scene(*WINDOW_BOX, Travel("window_slide", stock=0.0, unsolved=(0.0, 0.18), done=(0.195, 0.2))),
    "window-close": Scene(*WINDOW_BOX, Travel("window_slide", stock=0.2, unsolved=(0.05, 0.2), done=(0.0, 0.03))),
    "drawer-open": Scene(*DRAWER_BOX, Travel("goal_slidey", stock=0.0, unsolved=(-0.13, 0.0), done=(-0.1606, -0.1604))),
    "drawer-close": Scene(*DRAWER_BOX, Travel("goal_slidey", stock=-0.15, unsolved=(-0.16, -0.07), done=(-0.02, 0.0))),
}


@dataclass(frozen=True)
class ModelPositions:
    """Places that MetaWorld writes into the MuJoCo model itself, where resetting the data does not reach them."""

    bodies: NDArray[np.float64]
    sites: NDArray[np.float64]

    @classmethod
    def of(cls, model: Any) -> ModelPositions:
        return cls(model.body_pos.copy(), model.site_pos.copy())

    def apply(self, model: Any) -> None:
        model.body_pos[:], model.site_pos[:] = self.bodies, self.sites


def draw_start(simulator: Any, scene: Scene, rng: np.random.Generator, done: bool) -> None:
    """Place the object, and set its sliding part, for one demo episode.

    The place goes in where MetaWorld keeps the random vector of a task, so its own reset derives target and success from
    it. Rewards, which it normalises by its own start, are not meaningful afterwards; nothing here uses them.
    """
    place = rng.uniform(scene.low, scene.high)
    # MetaWorld plays each task of a pair at a height of its own; here both are played at either.
    place[2] = (scene.low, scene.high)[rng.integers(2)][2]
    simulator._last_rand_vec = place
    simulator._freeze_rand_vec = True
    simulator.reset()
    if scene.travel is not None:
        joint = simulator.data.joint(scene.travel.joint)
        joint.qpos[:], joint.qvel[:] = _draw_travel(scene.travel, rng, done), 0.0


def _draw_travel(travel: Travel, rng: np.random.Generator, done: bool) -> float:
    if done:
        # Half of them at the very end: there MetaWorld starts the opposite task.
        end = max(travel.done, key=lambda point: abs(point - np.mean(travel.unsolved)))
        return float(end if rng.random() < 0.5 else rng.uniform(*travel.done))
    return float(travel.stock if rng.random() < STOCK_SHARE else rng.uniform(*travel.unsolved))


def move_hand_away(simulator: Any, rng: np.random.Generator) -> None:
    """Let the episode begin with the hand, open, at a random place that is not home; objects stay where they are.

    The hand goes there as if nothing stood in its way, then the objects are put back. A place where it pushes them is drawn
    again; the hand stays home if all are.
    """
    import mujoco

    model, data = simulator.model, simulator.data
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    before = np.zeros(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, before, kind)
    start = _objects(simulator)
    # Some objects are dropped by a reset and still fall: where will they be without the hand?
    falling = _hold(simulator, data.mocap_pos[0].copy(), HOLD_STEPS)
    low, high = np.maximum(AWAY_LOW, simulator.mocap_low), np.minimum(AWAY_HIGH, simulator.mocap_high)
    for _ in range(AWAY_TRIES):
        mujoco.mj_setState(model, data, before, kind)
        place = rng.uniform(low, high)
        if np.linalg.norm(place - simulator.hand_init_pos) < AWAY_LEAST:
            continue
        _hold(simulator, place, HOME_STEPS)
        for number, (position, velocity) in start.items():
            data.joint(number).qpos, data.joint(number).qvel = position, velocity
        after = _hold(simulator, place, HOLD_STEPS)
        if min(_distance(after, start), _distance(after, falling)) < OBJECT_UNTOUCHED:
            break
    else:
        mujoco.mj_setState(model, data, before, kind)
    mujoco.mj_forward(model, data)


Objects = dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]


def _objects(simulator: Any) -> Objects:
    """Position and velocity of every joint that is not the robot's, by its number in the model."""
    joints = [simulator.data.joint(number) for number in range(simulator.model.njnt)]
    return {j.id: (j.qpos.copy(), j.qvel.copy()) for j in joints if j.name not in ROBOT_JOINTS}


def _distance(first: Objects, second: Objects) -> float:
    """The most that a joint position (metres, radians or quaternion numbers) differs."""
    return max((float(np.abs(first[number][0] - second[number][0]).max()) for number in first), default=0.0)


def _hold(simulator: Any, place: NDArray[np.float64], steps: int) -> Objects:
    """Let the open hand go to `place` (3,) and stay there, for so many control steps; returns the objects."""
    for _ in range(steps):
        simulator.data.mocap_pos[0], simulator.data.mocap_quat[0] = place, (1, 0, 1, 0)
        simulator.do_simulation([-1, 1], simulator.frame_skip)
    return _objects(simulator)
