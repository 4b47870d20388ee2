"""How a robot executes chunks whose computation takes time, in the simulator's steps: the same for any speed of this machine.

An answer is used `delay` control steps after its observation. Meanwhile the robot waits, or goes on with the chunk it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.envs import Environment
from paligemma_vla.schema import DatasetMetadata
from paligemma_vla_client.chunks import ChunkQueue

if TYPE_CHECKING:
    from paligemma_vla.policy import Continuation, RealTime

Execution = Literal["blocking", "asynchronous", "ensemble", "guidance", "prefix"]
ENSEMBLE = 0.01  # ACT's weight of older chunks (arXiv 2304.13705)
Floats = NDArray[np.floating]
Ask = Callable[["Continuation | None"], Floats]  # the chunk (K, A) for what is seen now


@dataclass(frozen=True)
class Timing:
    """execution: `blocking`: the robot holds until the answer is there. `asynchronous`: it goes on with its chunk, and joins
    the new one where it is by then. `ensemble`: so, and where chunks overlap it executes their average. `guidance`, `prefix`:
    real-time chunking, the new chunk continues the old one (`Policy.realtime_method`).

    delay: control steps between an observation and the use of its answer. execute: actions between two observations; None: half
    the chunk.
    """

    execution: Execution = "blocking"
    delay: int = 0
    execute: int | None = None

    @property
    def realtime(self) -> RealTime | None:
        return self.execution if self.execution in ("guidance", "prefix") else None


def execute_chunks(env: Environment, ask: Ask, timing: Timing) -> Iterator[Floats]:
    """Endless actions (A,), one for each control step. Raises `SimulatorError` where a chunk has less than `execute`."""
    from paligemma_vla.policy import Continuation  # needs torch, which `rollout --help` does not

    queue = ChunkQueue(ENSEMBLE if timing.execution == "ensemble" else None)
    newest: Floats = np.zeros((0, env.spec.action_dim))
    waiting: list[Floats] = []  # an answer that is not there yet
    since_ask = 0
    execute = 0  # of the first chunk: ask at once
    while True:
        if not waiting and (queue.since_chunk >= execute or not queue.left):
            if timing.execution == "blocking":
                queue.clear()
            left = newest[queue.ask() :]
            answer = ask(Continuation(left.astype(np.float32), timing.delay) if timing.realtime and len(left) else None)
            execute = _checked(timing.execute, len(answer))
            waiting, since_ask = [answer], 0
        if waiting and since_ask >= timing.delay and queue.put(answer := waiting.pop()):
            newest = answer
        action = queue.next()
        yield env.hold_action() if action is None else action
        since_ask += 1


def _checked(execute: int | None, horizon: int) -> int:
    if execute is None:
        return max(1, horizon // 2)
    if not 1 <= execute <= horizon:
        raise SimulatorError(f"--execute: got {execute}, expected 1 to {horizon}, the policy's horizon")
    return execute


@dataclass(frozen=True)
class Motion:
    """How a robot moved. control_hz: control steps per second. speed: from each step to the next, m/s. jerk: root mean square
    of the third derivative of its position, m/s^3; None where it took under four steps.

    Without numbers where no state is in metres, or the rate is unknown.
    """

    control_hz: float
    speed: tuple[float, ...] = ()
    jerk: float | None = None


def measure_motion(states: Sequence[NDArray[np.float32]], metadata: DatasetMetadata) -> Motion:
    """states: (P,) after each control step."""
    position = [n for n, unit in enumerate(metadata.state_units) if unit == "m"]
    hz = metadata.control_hz
    if not position or not hz or not states:
        return Motion(hz)
    path = np.stack(states)[:, position].astype(np.float64)
    speed = hz * np.linalg.norm(np.diff(path, axis=0), axis=1)
    jerk = hz**3 * np.diff(path, 3, axis=0)
    rms = float(np.sqrt(np.square(jerk).sum(axis=1).mean())) if len(jerk) else None
    return Motion(hz, tuple(round(float(value), 4) for value in speed), rms)
