"""Experts of our own for the tasks in which a hand sweeps something aside.

MetaWorld's experts go up and over to a point beside the handle, come down within 4 cm of it, and push. Whoever learns that from
pictures hovers: a few centimetres of doubt decide between "up" and "down". They also aim near an edge of what works. These
experts aim well behind the handle, from where any push along the sweep meets it, and come down wherever that is so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GAIN = 15.0  # action per metre of error; saturates at 6.7 cm


@dataclass(frozen=True)
class Sweep:
    """An expert: come down behind the handle and sweep it along x. Lengths in metres, from the handle's observed place.

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
