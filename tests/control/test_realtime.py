"""Where a robot is in its chunks, and what its policy therefore continues."""

from __future__ import annotations

import numpy as np
import pytest

from paligemma_vla.control.realtime import Progress, RealTimePolicy, RobotChunks, parse_progress
from paligemma_vla.errors import DataError
from paligemma_vla.policy import Continuation
from paligemma_vla_client import ControlLoop

CHUNKS = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)


def seen(policy, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    pictures = {key: rng.integers(0, 255, (32, 32, 3), np.uint8) for key in policy.metadata["cameras"]}
    return {**pictures, "state": rng.normal(0, 0.01, policy.metadata["state_dim"]), "prompt": "open the drawer"}


@pytest.mark.parametrize("executed, left", [(0, 6), (4, 2), (5, 1)])
def test_robot_goes_on_with_the_rest_of_its_last_chunk(executed, left):
    chunks = RobotChunks()
    chunks.add(CHUNKS[0])
    chunks.add(CHUNKS[1])
    got = chunks.continuation(Progress(executed, 2))
    np.testing.assert_array_equal(got.actions, CHUNKS[1][executed:])
    assert len(got.actions) == left and got.delay == 2


def test_chunk_that_is_not_used_is_none_that_the_robot_goes_on_with():
    chunks = RobotChunks()
    for number, progress in enumerate([None, Progress(2, 1), Progress(4, 1, unused=True), Progress(5, 1, unused=True)]):
        got = chunks.continuation(progress)
        if progress is not None:
            np.testing.assert_array_equal(got.actions, CHUNKS[0][progress.executed :])
        chunks.add(CHUNKS[number])
    np.testing.assert_array_equal(chunks.continuation(Progress(3, 1)).actions, CHUNKS[3][3:])


def test_nothing_is_continued_before_a_chunk_after_its_end_and_after_a_clear():
    chunks = RobotChunks()
    assert chunks.continuation(Progress(0, 1)) is None
    chunks.add(CHUNKS[0])
    assert chunks.continuation(None) is None
    assert chunks.continuation(Progress(6, 1)) is None
    chunks.clear()
    assert chunks.continuation(Progress(0, 1)) is None


def test_progress_is_read_as_a_client_says_it():
    assert parse_progress({}, 8) is None
    assert parse_progress({"executed": np.int64(3), "delay": 8}, 8) == Progress(3, 8)
    assert parse_progress({"executed": 0, "delay": 0, "unused": True}, 8) == Progress(0, 0, unused=True)


@pytest.mark.parametrize(
    "told, said",
    [
        ({"executed": 3}, "delay: got none beside executed, expected both"),
        ({"delay": 3}, "executed: got none beside delay, expected both"),
        ({"executed": -1, "delay": 1}, "executed: got -1, expected a whole number from 0"),
        ({"executed": 1, "delay": 0.5}, "delay: got 0.5, expected a whole number from 0"),
        ({"executed": "1", "delay": 1}, "executed: got '1', expected a whole number"),
        ({"executed": 1, "delay": 9}, "delay: got 9 control steps, expected at most the 8 actions of a chunk"),
        ({"executed": 1, "delay": 1, "unused": "no"}, "unused: got 'no', expected true or false"),
    ],
)
def test_progress_that_cannot_be_is_refused(told, said):
    with pytest.raises(DataError, match=said):
        parse_progress(told, 8)


def test_policy_in_the_robots_process_continues_its_last_chunk(policy):
    robot = RealTimePolicy(policy, seed=7)
    first = robot.infer(seen(policy))["actions"]
    np.testing.assert_array_equal(first, policy.infer(seen(policy), seed=7)["actions"])
    second = robot.infer(seen(policy, 1), executed=2, delay=1)["actions"]
    expected = policy.infer(seen(policy, 1), seed=7, continuation=Continuation(first[2:], 1))["actions"]
    np.testing.assert_array_equal(second, expected)
    assert not np.array_equal(second, policy.infer(seen(policy, 1), seed=7)["actions"])
    robot.reset()
    afresh = robot.infer(seen(policy, 1), executed=2, delay=1)["actions"]
    np.testing.assert_array_equal(afresh, policy.infer(seen(policy, 1), seed=7)["actions"])


def test_loop_moves_a_robot_by_a_policy_in_its_own_process(policy):
    robot, executed = RealTimePolicy(policy), []
    report = ControlLoop(robot, "real_time", hz=50, when_late="zero").run(lambda: seen(policy), executed.append, steps=20)
    assert np.shape(executed) == (20, policy.metadata["action_dim"]) and report.steps == 20
    assert report.chunks >= 2 and report.held < 20
