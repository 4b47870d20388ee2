"""MetaWorld's tasks: their instructions, how a demonstration of them starts, and our own experts for four of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.evaluation.envs import PromptKind

Range = tuple[float, float]

# Instructions. The six tasks in same-scene pairs get many from a grammar: verb x object x form. Some combinations are held
# out of training; each is made of a verb, an object and a form that training has seen in other combinations.

FORMS = (
    "{verb} the {thing}",
    "please {verb} the {thing}",
    "can you {verb} the {thing}",
    "{verb} the {thing} for me",
    "now {verb} the {thing}",
    "your task is to {verb} the {thing}",
)


@dataclass(frozen=True)
class Grammar:
    """Verbs and objects of one task; two of each, so that training meets every pair of them in several forms."""

    verbs: tuple[str, str]
    things: tuple[str, str]

    def prompts(self, kind: PromptKind) -> tuple[str, ...]:
        """The 18 instructions for training (`own`) or the 6 held out (`unseen`)."""
        chosen = []
        for number, form in enumerate(FORMS):
            pairs = [(verb, thing) for verb in self.verbs for thing in self.things]
            # Each form holds out one pair, a different one in turn: training loses no verb, object, form or pair.
            held_out = pairs.pop(number % len(pairs))
            chosen += [form.format(verb=v, thing=t) for v, t in (pairs if kind == "own" else [held_out])]
        return tuple(chosen)


GRAMMARS: dict[str, Grammar] = {
    "faucet-open": Grammar(("open", "turn on"), ("faucet", "tap")),
    "faucet-close": Grammar(("close", "turn off"), ("faucet", "tap")),
    "window-open": Grammar(("open", "slide open"), ("window", "glass window")),
    "window-close": Grammar(("close", "slide shut"), ("window", "glass window")),
    "drawer-open": Grammar(("open", "pull open"), ("drawer", "desk drawer")),
    "drawer-close": Grammar(("close", "push shut"), ("drawer", "desk drawer")),
}

OPPOSITES: dict[str, str] = {
    "faucet-open": "faucet-close",
    "window-open": "window-close",
    "drawer-open": "drawer-close",
}
OPPOSITES |= {close: open_ for open_, close in OPPOSITES.items()}

SENTENCES: dict[str, str] = {
    "assembly": "put the ring onto the peg",
    "basketball": "dunk the basketball into the basket",
    "bin-picking": "move the puck from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "reach over the wall and press the button from above",
    "button-press": "press the button",
    "button-press-wall": "reach around the wall and press the button",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "hammer": "hammer the nail into the block",
    "hand-insert": "put the hand into the hole",
    "handle-press-side": "press the handle down from the side",
    "handle-press": "press the handle down",
    "handle-pull-side": "pull the handle up from the side",
    "handle-pull": "pull the handle up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the hole",
    "peg-unplug-side": "unplug the peg",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place": "pick up the puck and carry it to the goal",
    "pick-place-wall": "pick up the puck and carry it over the wall to the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate back out of the cabinet",
    "plate-slide-back-side": "slide the plate out of the cabinet sideways",
    "plate-slide-side": "slide the plate into the cabinet sideways",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach for the goal",
    "reach-wall": "reach over the wall for the goal",
    "shelf-place": "put the block on the shelf",
    "soccer": "push the ball into the goal",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep": "sweep the block off the table",
    "sweep-into": "sweep the block into the hole",
}

TASKS: tuple[str, ...] = tuple(sorted([*GRAMMARS, *SENTENCES]))

# How hard they are, as results of MT50 are published (Seo et al. 2022, Masked world models for visual control).
MEDIUM = (
    *("basketball", "bin-picking", "box-close", "coffee-pull", "coffee-push", "hammer", "peg-insert-side", "push-wall"),
    *("soccer", "sweep", "sweep-into"),
)
HARD = ("assembly", "hand-insert", "pick-out-of-hole", "pick-place", "push", "push-back")
VERY_HARD = ("shelf-place", "disassemble", "stick-pull", "stick-push", "pick-place-wall")
SUITES = {
    "mt50": TASKS,
    "mt50_easy": tuple(task for task in TASKS if task not in (*MEDIUM, *HARD, *VERY_HARD)),
    "mt50_medium": MEDIUM,
    "mt50_hard": HARD,
    "mt50_very_hard": VERY_HARD,
}


def prompts(task: str, kind: PromptKind) -> tuple[str, ...]:
    """Instructions of a task by its name in `TASKS`; tasks without a grammar have one of their own and none held out."""
    if task in GRAMMARS:
        return GRAMMARS[task].prompts(kind)
    return (SENTENCES[task],) if kind == "own" else ()


# Demo starts. MetaWorld starts the two tasks of a pair differently: other ranges of positions, the drawer shut for one and
# out for the other. A policy could then read the task off the picture. Here both tasks of a pair draw the position from one
# box, wider than MetaWorld's, so that the policy must look. Drawer and window start along their travel, not solved yet.

# Share of demo starts at MetaWorld's own point of the travel. That point is an end of the travel: a policy that is unsure
# where the handle is guesses too far from the end, comes down on the wrong side, and misses.
STOCK_SHARE = 3 / 4
HOME_STEPS = 50  # simulator steps in which MetaWorld brings the hand home
AWAY_LOW, AWAY_HIGH = (-0.25, 0.40, 0.10), (0.25, 0.65, 0.40)  # metres: where a displaced hand may begin
AWAY_LEAST, AWAY_TRIES = 0.06, 20
SETTLE_STEPS = 4  # control steps after which a hand in an object's way has moved the object
UNTOUCHED = 2e-3  # metres or radians: an object that moved less was not pushed
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
    """The box of positions (x, y, z in metres; z at one of its ends) shared by a pair, and the travel of a sliding part."""

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


def draw_start(simulator: Any, scene: Scene, rng: np.random.Generator, done: bool) -> None:
    """Position the object, and set its sliding part, for one demo episode.

    The position goes in where MetaWorld keeps the random vector of a task, so its own reset derives target and success from
    it. MetaWorld normalises rewards by its own start, so they have no meaning afterwards; nothing here uses them.
    """
    position = rng.uniform(scene.low, scene.high)
    # MetaWorld plays each task of a pair at a height of its own; here both are played at either.
    position[2] = (scene.low, scene.high)[rng.integers(2)][2]
    simulator._last_rand_vec = position
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
    """Let the episode begin with the hand, open, at a random position that is not home; objects stay where they are.

    The hand moves as if nothing stood in its way, then the objects are put back. A position where the hand pushes them is
    drawn again; after `AWAY_TRIES` such draws the hand stays home.
    """
    import mujoco

    model, data = simulator.model, simulator.data
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    before = np.zeros(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, before, kind)
    start = _objects(simulator)
    # Some objects are dropped by a reset and still fall: where will they be without the hand?
    falling = _lead_hand(simulator, data.mocap_pos[0].copy(), SETTLE_STEPS)
    low, high = np.maximum(AWAY_LOW, simulator.mocap_low), np.minimum(AWAY_HIGH, simulator.mocap_high)
    for _ in range(AWAY_TRIES):
        mujoco.mj_setState(model, data, before, kind)
        target = rng.uniform(low, high)
        if np.linalg.norm(target - simulator.hand_init_pos) < AWAY_LEAST:
            continue
        _lead_hand(simulator, target, HOME_STEPS)
        for number, (position, velocity) in start.items():
            data.joint(number).qpos, data.joint(number).qvel = position, velocity
        after = _lead_hand(simulator, target, SETTLE_STEPS)
        if min(_distance(after, start), _distance(after, falling)) < UNTOUCHED:
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
    """The largest difference of a joint position (metres, radians or quaternion numbers)."""
    return max((float(np.abs(first[number][0] - second[number][0]).max()) for number in first), default=0.0)


def _lead_hand(simulator: Any, target: NDArray[np.float64], steps: int) -> Objects:
    """Lead the open hand towards `target` (3,) for some control steps; returns the objects."""
    for _ in range(steps):
        simulator.data.mocap_pos[0], simulator.data.mocap_quat[0] = target, (1, 0, 1, 0)
        simulator.do_simulation([-1, 1], simulator.frame_skip)
    return _objects(simulator)


# Experts for the tasks in which a hand sweeps something aside. MetaWorld's go up and over to a point beside the handle, come
# down within 4 cm of it, and push. A policy that learns this from pictures hovers: a few centimetres of doubt decide between
# "up" and "down". They also aim near an edge of what works. Ours aim well behind the handle, from where any push along the
# sweep meets it, and come down wherever that holds.

GAIN = 15.0  # action per metre of error; saturates at 6.7 cm


@dataclass(frozen=True)
class Sweep:
    """An expert: come down behind the handle and sweep it along x. Lengths in metres, from the handle's observed position.

    direction: +1 or -1, along x. start: x behind the handle, y and z from it, where the sweep begins. clearance: above that
    start, to travel at. push: action of the sweep in y. gripper: action held throughout.
    """

    direction: float
    start: tuple[float, float, float]
    clearance: float
    push: float = 0.0
    gripper: float = 1.0

    # Behind the handle, along x, the hand may come down from `FAR` to `NEAR`, and `ASIDE` to either side in y.
    FAR, NEAR, ASIDE, LOW = -0.13, -0.025, 0.05, 0.04

    def action(self, hand: NDArray[np.float64], handle: NDArray[np.float64]) -> NDArray[np.float64]:
        """Action (4,), not clipped, for hand and handle at (3,)."""
        behind, aside, level = self.start
        start = handle + np.array([-self.direction * behind, aside, level])
        along = self.direction * (hand[0] - handle[0])
        above = hand[2] - start[2]
        beside = self.FAR <= along <= self.NEAR and abs(hand[1] - start[1]) <= self.ASIDE
        sweeping = above <= self.LOW and self.FAR <= along <= -self.NEAR and abs(hand[1] - start[1]) <= self.ASIDE
        if sweeping:
            error = start - hand
            move = np.array([self.direction, GAIN * error[1] + self.push, GAIN * error[2]])
        elif beside:
            move = GAIN * (start - hand)
        else:
            move = np.clip(GAIN * (start + np.array([0.0, 0.0, self.clearance]) - hand), -1, 1)
            move[:2] *= np.clip(2 * above / self.clearance, 0, 1)  # up first: the handle may be in the way
        return np.append(move, self.gripper)


SWEEPS: dict[str, Sweep] = {
    "faucet-open": Sweep(1.0, start=(0.05, 0.035, -0.01), clearance=0.14, push=0.6),
    "faucet-close": Sweep(-1.0, start=(0.05, 0.035, -0.01), clearance=0.14, push=0.6),
    "window-open": Sweep(1.0, start=(0.05, -0.01, -0.07), clearance=0.2),
    "window-close": Sweep(-1.0, start=(0.05, -0.01, -0.07), clearance=0.2),
}
