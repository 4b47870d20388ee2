"""Which action each control step executes when answers take time, against schedules written by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from paligemma_vla.errors import SimulatorError
from paligemma_vla.evaluation.envs.metaworld import METADATA, SPEC
from paligemma_vla.evaluation.execution import ENSEMBLE, Motion, Timing, execute_chunks, measure_motion

HOLD = -1


class Robot:
    """As much of an environment as execution needs; a held step is -1 in each number."""

    spec = SPEC

    def hold_action(self):
        return np.full(4, HOLD, np.float32)


def executed(timing: Timing, steps: int, horizon: int = 8):
    """What `steps` control steps execute: 100 * chunk + index, or HOLD; the steps that were asked at; what was to continue."""
    asked, continued, done = [], [], []

    def ask(continuation):
        asked.append(len(done))
        left = None if continuation is None else (continuation.actions[:, 0].tolist(), continuation.delay)
        continued.append(left)
        return np.repeat(100.0 * (len(asked) - 1) + np.arange(horizon)[:, None], 4, axis=1)

    for action in islice(execute_chunks(Robot(), ask, timing), steps):
        done.append(float(action[0]))
    return done, asked, continued


def test_blocking_robot_holds_until_its_answer_is_there():
    done, asked, _ = executed(Timing(delay=2, execute=3), 11)
    assert done == [HOLD, HOLD, 0, 1, 2, HOLD, HOLD, 100, 101, 102, HOLD]
    assert asked == [0, 5, 10]
    assert executed(Timing(execute=3), 7)[0] == [0, 1, 2, 100, 101, 102, 200]
    assert executed(Timing(), 5)[0] == [0, 1, 2, 3, 100]  # half of the chunk


def test_asynchronous_robot_goes_on_and_joins_the_new_chunk_where_it_is():
    done, asked, continued = executed(Timing("asynchronous", delay=2, execute=3), 13)
    assert done == [HOLD, HOLD, 0, 1, 2, 3, 4, 102, 103, 104, 202, 203, 204]
    assert asked == [0, 5, 8, 11]  # each three executed steps after the observation before
    assert continued == [None] * 4


def test_asynchronous_robot_holds_where_its_chunk_is_shorter_than_the_delay():
    done, _, _ = executed(Timing("asynchronous", delay=7, execute=3), 20)
    assert done == [HOLD] * 7 + list(range(8)) + [HOLD] * 2 + [105, 106, 107]


@pytest.mark.parametrize("execution", ["guidance", "prefix"])
def test_real_time_chunk_is_asked_to_continue_what_is_left_at_its_observation(execution):
    done, asked, continued = executed(Timing(execution, delay=2, execute=3), 13)
    assert (done, asked) == executed(Timing("asynchronous", delay=2, execute=3), 13)[:2]
    assert continued == [None, ([3, 4, 5, 6, 7], 2), ([103, 104, 105, 106, 107], 2), ([203, 204, 205, 206, 207], 2)]
    assert Timing(execution).realtime == execution


def test_ensemble_executes_the_average_of_chunks_that_overlap():
    done, _, _ = executed(Timing("ensemble", delay=1, execute=4), 7)
    older, newer = np.exp([0, -ENSEMBLE]) / np.exp([0, -ENSEMBLE]).sum()
    assert done[:6] == [HOLD, 0, 1, 2, 3, 4]
    assert done[6] == pytest.approx(older * 5 + newer * 101)


def test_more_actions_than_a_chunk_has_are_refused():
    with pytest.raises(SimulatorError, match="--execute: got 9, expected 1 to 8"):
        executed(Timing(execute=9), 1)


def test_motion_is_measured_by_the_derivatives_of_the_position():
    time = np.arange(50)[:, None] / METADATA.control_hz
    states = np.concatenate([2 * time**3 / 6, 0 * time, 3 * time**3 / 6, np.sin(99 * time)], axis=1).astype(np.float32)
    motion = measure_motion(list(states), METADATA)
    assert motion.jerk == pytest.approx(np.sqrt(2**2 + 3**2), rel=0.1)  # float32, differentiated three times
    middle = time[:-1, 0] + 0.5 / METADATA.control_hz
    np.testing.assert_allclose(motion.speed, np.sqrt(2**2 + 3**2) * middle**2 / 2, atol=1e-3)
    assert measure_motion(list(states[:3]), METADATA).jerk is None
    assert measure_motion(list(states), replace(METADATA, control_hz=0.0)) == Motion(0.0)
    assert measure_motion([], METADATA).speed == ()
