"""How wrong about the handle's place may an expert be, and still solve its task? Ours beside MetaWorld's.

`python -m benchmarks.expert_tolerance` prints, for each axis, the range of errors (cm) around zero with which at least nine in
ten starts were solved. No pictures are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from paligemma_vla.evaluation.envs.metaworld import HAND, HANDLE, MetaWorldEnvironment
from paligemma_vla.evaluation.envs.metaworld_tasks import SWEEPS

STARTS = 30
ERRORS = (-10, -8, -6, -5, -4, -3, -2, 0, 2, 3, 4, 5, 6, 8, 10)  # cm
Expert = Callable[[Any], Any]


class Unseen(MetaWorldEnvironment):
    """The simulator without its camera, which is what takes the time."""

    def observe(self) -> Any:
        return {}


def solved(env: Unseen, task: str, expert: Callable[[np.ndarray], np.ndarray], error: np.ndarray) -> float:
    """Share of the starts that an expert solves who believes the handle to be `error` (3,) metres away from where it is."""
    count = 0
    for seed in range(STARTS):
        env.reset(task, seed)
        for _ in range(env.max_steps(task)):
            believed = env._observed.copy()
            believed[HANDLE] += error
            if env.step(np.clip(expert(believed), -1, 1)).success:
                count += 1
                break
    return count / STARTS


def tolerated(env: Unseen, task: str, expert: Expert, axis: int) -> str:
    """The unbroken range of errors around zero that is solved nine times in ten, as text."""
    good = {cm for cm in ERRORS if solved(env, task, expert, np.eye(3)[axis] * cm / 100) >= 0.9}
    low = high = 0
    for cm in ERRORS[ERRORS.index(0) :]:
        if cm not in good:
            break
        high = cm
    for cm in reversed(ERRORS[: ERRORS.index(0) + 1]):
        if cm not in good:
            break
        low = cm
    return f"{low} to {high}" if 0 in good else "none"


def main() -> None:
    env = Unseen()
    for task, sweep in SWEEPS.items():
        env.reset(task, 0)
        experts: dict[str, Expert] = {
            "MetaWorld's": env._task().expert.get_action,
            "ours": lambda seen, sweep=sweep: sweep.action(seen[HAND], seen[HANDLE]),  # type: ignore[misc]
        }
        for name, expert in experts.items():
            print(f"{task:14s} {name:12s} x, y, z: ", ", ".join(tolerated(env, task, expert, axis) for axis in range(3)))
    env.close()


if __name__ == "__main__":
    main()
