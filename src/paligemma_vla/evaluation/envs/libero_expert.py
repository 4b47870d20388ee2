"""A scripted expert for LIBERO's tasks of picking up and placing: it sees where everything is, and acts as a policy does.

Each action follows from the present state and the phase of the movement, so that it also comes back after a disturbance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import SimulatorError

Vector = NDArray[np.float64]
METRES, RADIANS = 0.05, 0.5  # of a full stroke
GAIN, TURN_GAIN = 18.0, 2.5  # strokes per metre, and per radian, that are missing
AHEAD = 1.0  # steps for which the hand goes on as it moves
OPENING = 0.072  # m, what fits between the fingers
DEPTH = 0.035  # m below its top that something is grasped across its body
DEEPER = {"milk": 0.06, "orange_juice": 0.06}  # whose collision boxes wedge a finger higher up
RIM = 0.038  # m below its top that a wall is grasped
CLEARANCE = 0.07  # m above the grasp from which the hand comes down, and above what it carries things over
LIFT = 0.06  # m by which a thing is lifted before it is moved aside, unless something is in the way
STILL, STILL_STEPS = 5e-4, 8  # m in a step that are no movement; steps without one after which it is as near as it gets
ABOVE = 0.03  # m between what is carried and what it is carried over
LOST = 0.05  # m that a thing may slip in the hand
CLOSING, OPENING_STEPS = (5, 14), 4  # actions until the fingers have closed, or let go
# Where a wall is grasped: the turn of the hand, and the side. Always the first that is free: a policy that has seen the same
# bowl grasped on two sides grasps it in between.
SIDES = ((0.0, (0, 1, 0)), (np.pi / 2, (-1, 0, 0)), (0.0, (0, -1, 0)), (np.pi / 2, (1, 0, 0)))
PAUSE = 4  # steps in place before the fingers close or open: who imitates it may do so a little early
YAWS = np.deg2rad([0, 90, 45, -45, 22.5, -22.5, 67.5, -67.5])


@dataclass(frozen=True)
class Grasp:
    """Where the fingers close, relative to the object: offset of the hand from its body's origin (3,), m; yaw, rad. slack: how
    far beside that the hand may come down, m."""

    offset: Vector
    yaw: float
    cost: float
    slack: float = 0.01


class PickAndPlace:
    """Brings each thing of the task's goal where it belongs. env: robosuite's environment, at the beginning of an episode.

    Raises `SimulatorError` for a goal that needs anything else than that.
    """

    def __init__(self, env: Any, repeat: int = 1) -> None:
        import mujoco

        self._env, self._mujoco, self._repeat = env, mujoco, repeat
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._site = env.sim.model.site_name2id("gripper0_grip_site")
        self._fingers = env.robots[0]._ref_gripper_joint_pos_indexes
        across = self._turn()[:, 0] * [1, 1, 0]
        across /= np.linalg.norm(across)
        down = np.array([0.0, 0.0, -1.0])
        self._upright = np.stack(
            [across, np.cross(down, across), down], axis=1
        )  # the fingers point down, turned as at the start
        self._goals = [tuple(goal) for goal in env.parsed_problem["goal_state"]]
        for goal in self._goals:
            if goal[0] not in ("on", "in") or len(goal) != 3 or goal[1] not in env.obj_body_id:
                raise SimulatorError(f"libero: its expert only picks and places, got the goal {' '.join(goal)}")
        self._actions = self._solve()

    def action(self) -> NDArray[np.float32]:
        """The next one, (7,)."""
        return next(self._actions).astype(np.float32)

    def _solve(self) -> Iterator[Vector]:
        for goal in self._goals:
            yield from self._bring(goal)
        while True:
            yield self._wait(-1.0)

    def _bring(self, goal: tuple[str, ...]) -> Iterator[Vector]:
        """Until it is there; what failed twice is tried with the next best grasp."""
        _, thing, place = goal
        for attempt in count():
            turn = self._yawed(self._yaw())
            if not self._holds(thing):  # as it may where a policy began
                grasps = self._grasps(thing)
                grasp = grasps[attempt // 2 % len(grasps)]
                turn = self._yawed(grasp.yaw)
                yield from self._pick(thing, place, grasp, turn)
            if self._holds(thing):
                yield from self._place(thing, place, turn, self._hand() - self._position(thing))
            if self._env._eval_predicate(goal):
                return

    def _pick(self, thing: str, place: str, grasp: Grasp, turn: Vector) -> Iterator[Vector]:
        goal = self._position(thing) + grasp.offset
        clear = max(CLEARANCE, self._height_on_the_way(goal, self._obstacles(thing)) + 0.03 - goal[2])
        onto = partial(self._onto, thing, grasp, clear)
        yield from self._go(onto, turn, -1.0, tolerance=0.006, steps=80)
        yield from self._go(onto, turn, -1.0, tolerance=0.0, steps=PAUSE)
        yield from self._close(turn)
        if not self._holds(thing):
            return
        lift = max(LIFT, self._height_ahead(thing, place) + 0.03 - self._vertices(thing)[:, 2].min())
        yield from self._go(self._raised(lift), turn, 1.0, tolerance=0.02, steps=15 if lift == LIFT else 40)

    def _place(self, thing: str, place: str, turn: Vector, held: Vector) -> Iterator[Vector]:
        """held: the hand from the thing, when it was picked up (3,)."""
        below = self._position(thing)[2] - self._vertices(thing)[:, 2].min()
        carried = max(self._top(place) + below + held[2] + ABOVE, self._hand()[2])
        low = self._rest(place) + below + held[2] + 0.01

        def over() -> Vector:
            """The place; above it as long as the thing is beside it."""
            x, y = (self._target(place) + self._hand() - self._position(thing))[:2]
            beside = float(np.linalg.norm(self._hand()[:2] - [x, y]))
            return np.array([x, y, low + np.clip(2 * (beside - 0.02), 0, max(carried - low, 0))])

        def lost() -> bool:
            return bool(np.linalg.norm(self._hand() - self._position(thing) - held) > LOST)

        yield from self._go(over, turn, 1.0, tolerance=0.012, steps=100, unless=lost)
        yield from self._go(over, turn, 1.0, tolerance=0.0, steps=PAUSE, unless=lost)
        if lost():
            return
        for _ in range(OPENING_STEPS // self._repeat):
            yield self._wait(-1.0, turn)
        yield from self._go(self._raised(0.12), turn, -1.0, tolerance=0.02, steps=20)

    # ---- movements

    def _go(
        self,
        target: Callable[[], Vector],
        turn: Vector,
        gripper: float,
        tolerance: float,
        steps: int,
        unless: Callable[[], bool] = lambda: False,
    ) -> Iterator[Vector]:
        before, lasting, still = self._hand(), np.zeros(3), 0
        for _ in range(steps // self._repeat):
            here = self._hand()
            missing, rotation = target() - here, self._rotation(turn)
            if unless() or (np.linalg.norm(missing) < tolerance and np.linalg.norm(rotation) < 0.2):
                return
            still = still + 1 if np.linalg.norm(here - before) < STILL * self._repeat and np.linalg.norm(missing) < LOST else 0
            if still * self._repeat >= STILL_STEPS:
                return
            near = np.abs(missing) < 0.03
            lasting = np.where(near, np.clip(lasting + 0.1 * self._repeat * missing, -0.02, 0.02), 0.0)
            strokes = np.clip((missing - AHEAD * (here - before) / self._repeat + lasting) * GAIN, -1, 1)
            before = here
            yield np.concatenate([strokes, np.clip(rotation * TURN_GAIN, -1, 1), [gripper]])

    def _close(self, turn: Vector) -> Iterator[Vector]:
        """Until the fingers stand still."""
        before = np.inf
        for step in range(CLOSING[1] // self._repeat):
            fingers = float(np.abs(self._data.qpos[self._fingers]).sum())
            if step >= CLOSING[0] // self._repeat and before - fingers < 1e-3:
                return
            before = fingers
            yield self._wait(1.0, turn)

    def _wait(self, gripper: float, turn: Vector | None = None) -> Vector:
        rotation = np.zeros(3) if turn is None else np.clip(self._rotation(turn) * TURN_GAIN, -1, 1)
        return np.concatenate([np.zeros(3), rotation, [gripper]])

    def _raised(self, height: float) -> Callable[[], Vector]:
        """Above where the hand is now, m."""
        target = self._hand() + np.array([0.0, 0.0, height])
        return lambda: target

    def _onto(self, thing: str, grasp: Grasp, clear: float) -> Vector:
        """The grasp; above it, and above the thing, as long as the hand is beside it."""
        x, y, z = self._position(thing) + grasp.offset
        beside = float(np.linalg.norm(self._hand()[:2] - [x, y]))
        return np.array([x, y, z + np.clip(4 * (beside - grasp.slack), 0, clear)])

    # ---- what is where

    def _hand(self) -> Vector:
        return np.array(self._data.site_xpos[self._site])

    def _turn(self) -> Vector:
        return np.array(self._data.site_xmat[self._site]).reshape(3, 3)

    def _yawed(self, yaw: float) -> Vector:
        cos, sin = np.cos(yaw), np.sin(yaw)
        return np.asarray(np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ self._upright, np.float64)

    def _yaw(self) -> float:
        """By which the hand is turned about the vertical from how it is at the start, rad."""
        first, now = self._upright[:, 0], self._turn()[:, 0]
        return float(np.arctan2(first[0] * now[1] - first[1] * now[0], first[:2] @ now[:2]))

    def _rotation(self, turn: Vector) -> Vector:
        """The rotation vector from the hand's orientation to `turn`."""
        quaternion, vector = np.zeros(4), np.zeros(3)
        self._mujoco.mju_mat2Quat(quaternion, (turn @ self._turn().T).reshape(-1))
        self._mujoco.mju_quat2Vel(vector, quaternion, 1.0)
        return vector

    def _holds(self, thing: str) -> bool:
        """Whether both fingers touch it."""
        fingers = [self._env.robots[0].gripper.important_geoms[f"{side}_finger"] for side in ("left", "right")]
        return bool(self._env._check_grasp(gripper=fingers, object_geoms=self._env.objects_dict[thing].contact_geoms))

    def _position(self, thing: str) -> Vector:
        return np.array(self._data.xpos[self._env.obj_body_id[thing]])

    def _vertices(self, thing: str) -> Vector:
        """Corners of its meshes, or of its other shapes' boxes, in the world (V, 3)."""
        root, found = self._env.obj_body_id[thing], []
        for geom in range(self._model.ngeom):
            body = self._model.geom_bodyid[geom]
            while body not in (root, 0):
                body = self._model.body_parentid[body]
            if body != root:
                continue
            if self._model.geom_type[geom] == self._mujoco.mjtGeom.mjGEOM_MESH:
                mesh = self._model.geom_dataid[geom]
                first = self._model.mesh_vertadr[mesh]
                local = self._model.mesh_vert[first : first + self._model.mesh_vertnum[mesh]]
            else:
                centre, half = self._model.geom_aabb[geom, :3], self._model.geom_aabb[geom, 3:]
                local = centre + half * np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T
            found.append(local @ self._data.geom_xmat[geom].reshape(3, 3).T + self._data.geom_xpos[geom])
        return np.concatenate(found)

    def _obstacles(self, thing: str) -> Vector:
        """Points (V, 3) in the boxes around everything that a hand could meet on its way to a thing."""
        model, data, found = self._model, self._data, [np.empty((0, 3))]
        grid = np.array(np.meshgrid(*[np.linspace(-1, 1, 7)] * 3)).reshape(3, -1).T
        bodies = self._env.sim.model.body_name2id("robot0_base"), self._env.obj_body_id[thing]
        own = {0, *(int(model.body_rootid[body]) for body in bodies)}
        for geom in np.flatnonzero(model.geom_contype):
            if int(model.body_rootid[model.geom_bodyid[geom]]) in own:
                continue
            local = model.geom_aabb[geom, :3] + model.geom_aabb[geom, 3:] * grid
            found.append(local @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
        return np.concatenate(found)

    def _in_the_way(self, grasp: Grasp, origin: Vector, obstacles: Vector) -> int:
        """How many obstacles are where the hand and its fingers would be."""
        offset = obstacles - (origin + grasp.offset)
        along = np.abs(offset @ self._axis(grasp.yaw))
        across = np.abs(offset @ self._yawed(grasp.yaw)[:, 1])
        palm = (along < 0.11) & (across < 0.04) & (offset[:, 2] > 0.09) & (offset[:, 2] < 0.3)
        fingers = (along > 0.025) & (along < 0.055) & (across < 0.015) & (offset[:, 2] > -0.005) & (offset[:, 2] <= 0.09)
        return int((palm | fingers).sum())

    def _height_on_the_way(self, target: Vector, obstacles: Vector) -> float:
        """What is high near the straight way to a target, m."""
        start, way = self._hand()[:2], target[:2] - self._hand()[:2]
        share = np.clip((obstacles[:, :2] - start) @ way / max(float(way @ way), 1e-6), 0, 1)
        near = np.linalg.norm(obstacles[:, :2] - start - share[:, None] * way, axis=1) < 0.08
        return float(obstacles[near, 2].max(initial=0.0))

    def _height_ahead(self, thing: str, place: str) -> float:
        """What is high beside a thing, on the side of the place that it is brought to, m."""
        way = self._target(place)[:2] - self._position(thing)[:2]
        offset = self._obstacles(thing) - self._position(thing)
        along, across = offset[:, :2] @ way / np.linalg.norm(way), np.abs(offset[:, 0] * way[1] - offset[:, 1] * way[0])
        near = (along > 0) & (along < 0.15) & (across < 0.07 * np.linalg.norm(way))
        return float((offset[near, 2] + self._position(thing)[2]).max(initial=0.0))

    def _vertices_top(self, thing: str) -> float:
        return float(self._vertices(thing)[:, 2].max())

    def _target(self, place: str) -> Vector:
        """The middle of where something is to be."""
        if place in self._env.obj_body_id:
            return self._position(place)
        return np.array(self._data.site_xpos[self._env.sim.model.site_name2id(place)])

    def _rest(self, place: str) -> float:
        """Height at which the lowest point of what is placed is let go, m."""
        return float(self._target(place)[2])

    def _top(self, place: str) -> float:
        return self._vertices_top(place) if place in self._env.obj_body_id else self._rest(place) + 0.08

    def _grasps(self, thing: str) -> list[Grasp]:
        """Best first: across the body where that fits between the fingers, else over a wall."""
        points, origin = self._vertices(thing), self._position(thing)
        low, top = points[:, 2].min(), points[:, 2].max()
        middle = (points.max(0) + points.min(0)) / 2
        found = []
        depth = DEEPER.get(thing.rsplit("_", 1)[0], DEPTH)
        height = max(low + 0.012, top - depth) if top - low > 0.05 else max(low + 0.01, (low + top) / 2 - 0.005)
        for yaw in YAWS:
            axis = self._axis(yaw)
            spread = points @ axis
            width = spread.max() - spread.min()
            if width < OPENING:
                centre = middle + axis * ((spread.max() + spread.min()) / 2 - middle @ axis)
                slack = float(np.clip((OPENING - width) / 2, 0.002, 0.01))
                offset = np.array([*centre[:2], height]) - origin
                found.append(Grasp(offset, float(yaw), float(width) + 0.01 * abs(yaw), slack))
        if not found:
            rim = points[points[:, 2] > top - 0.012]
            for order, (yaw, side) in enumerate(SIDES):
                axis = self._axis(yaw)
                axis *= np.sign(axis @ side)
                edge = middle + axis * ((rim @ axis).max() - middle @ axis - 0.006)
                found.append(Grasp(np.array([*edge[:2], top - RIM]) - origin, yaw, float(order)))
        obstacles = self._obstacles(thing)
        return sorted(found, key=lambda grasp: grasp.cost + 0.05 * self._in_the_way(grasp, origin, obstacles))

    def _axis(self, yaw: float) -> Vector:
        """Along which the fingers close, (3,)."""
        return self._yawed(yaw)[:, 0] * [1, 1, 0]
