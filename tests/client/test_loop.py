"""The control loop: what it executes, step by step, while a policy thinks as long as the test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from paligemma_vla_client import ControlLoop, PolicyConnectionError, PolicyServerError, PolicyTimeout
from paligemma_vla_client.rate import Ticker

K, A, HZ = 12, 2, 250.0


class Robot:
    """Counts control steps, and those in which it moved: holding, it stays. last: step of a run. due: step by which the policy
    answers; the robot waits for it there, so that a busy machine makes no answer later."""

    def __init__(self) -> None:
        self.last, self.position, self.due = 10**9, 0, 10**9
        self.executed: list[np.ndarray] = []
        self.moved = threading.Condition()

    def observe(self) -> dict:
        return {"step": len(self.executed), "position": self.position}

    def act(self, action: np.ndarray) -> None:
        with self.moved:
            self.position += not self.executed or not np.array_equal(action, self.executed[-1])
            self.executed.append(action)
            self.moved.notify_all()
            assert self.moved.wait_for(lambda: len(self.executed) < self.due, 20)

    @contextmanager
    def answered_by(self, step: int) -> Iterator[None]:
        """Waits for the step; the next one waits for the block."""
        with self.moved:
            self.due = min(step, self.last)
            assert self.moved.wait_for(lambda: len(self.executed) >= self.due, 20)
        try:
            yield
        finally:
            with self.moved:
                self.due = 10**9
                self.moved.notify_all()


class SlowPolicy:
    """Answers with chunks that name question and position, as many control steps after observation n as `delays[n]` says (the
    last number holds for those that follow). In real time it keeps its chunks as a server does, and continues them.

    said: what it was told beside the observation. failures: by question. first_s: seconds of the first answer.
    """

    def __init__(
        self,
        robot: Robot,
        delays: list[int],
        failures: dict[int, Exception] | None = None,
        first_s: float = 0,
        **metadata: object,
    ) -> None:
        self.robot, self.delays, self.failures, self.first_s = robot, delays, failures or {}, first_s
        self.metadata = {"action_representation": "absolute", "rtc_max_delay": 0, "server_versions": {}, **metadata}
        self.asked: list[int] = []
        self.said: list[dict] = []
        self.chunks: list[np.ndarray] = []
        self.shown: list[tuple[int, dict | None]] = []
        self.resets: list[dict | None] = []
        self.used = self.sent = np.zeros((0, A), np.float32)

    def infer(self, observation: dict, **said: object) -> dict:
        number, step = len(self.asked), observation["step"]
        self.asked.append(step)
        self.said.append(said)
        self.shown.append((step, said["record"]))
        if number == 0:
            time.sleep(self.first_s)
        with self.robot.answered_by(step + self.delays[min(number, len(self.delays) - 1)] if number else 0):
            return self.answer(number, observation["position"], said)

    def answer(self, number: int, position: int, said: dict) -> dict:
        if error := self.failures.get(number):
            raise error
        actions = np.stack([np.full(K, number), position + np.arange(K)], axis=1).astype(np.float32)
        if "executed" in said:
            self.used = self.used if said["unused"] else self.sent
            known = self.used[said["executed"] :][: said["delay"]]
            actions[: len(known)] = known
        self.sent = actions
        self.chunks.append(actions)
        return {"actions": actions}

    def show(self, observation: dict, record: dict | None) -> None:
        self.shown.append((observation["step"], record))

    def reset(self, record: dict | None) -> None:
        self.resets.append(record)


def play(policy: SlowPolicy, steps: int, mode: str, intervene: Callable | None = None, **options: object):
    loop = ControlLoop(policy, mode, hz=HZ, **options)
    policy.robot.last = steps
    report = loop.run(policy.robot.observe, policy.robot.act, steps, intervene=intervene)
    return np.stack(policy.robot.executed), report


@pytest.mark.parametrize("mode", ["blocking", "asynchronous", "real_time"])
def test_loop_executes_of_each_chunk_the_action_of_the_step(mode):
    """The second number of an action is the position it was predicted for; the first says by which chunk."""
    policy = SlowPolicy(Robot(), [0] if mode == "blocking" else [3])
    executed, report = play(policy, 60, mode, execute=5)
    np.testing.assert_array_equal(executed[:, 1], np.arange(60))
    assert (np.diff(executed[:, 0]) >= 0).all(), "an older chunk was executed after a newer one"
    assert report.steps == 60 and report.held == 0 and report.chunks >= 5
    if mode == "blocking":
        assert policy.asked == list(range(0, 60, 5))
        np.testing.assert_array_equal(executed[:, 0], np.arange(60) // 5)


def test_in_real_time_what_is_executed_is_what_the_policy_was_told():
    """Of every chunk that is used, the first `delay` actions are executed by the old one: the new one must hold the same."""
    policy = SlowPolicy(Robot(), [4], first_s=0.05)
    executed, report = play(policy, 80, "real_time", execute=6)
    assert policy.said[0].keys() == {"record"}, "there is nothing to continue at first"
    for number, (step, after) in enumerate(zip(policy.asked[1:], [*policy.asked[2:], len(executed)], strict=True), start=1):
        end = min(step + policy.said[number]["delay"], after)
        np.testing.assert_array_equal(policy.chunks[number][: end - step], executed[step:end])
    assert report.delay[0] >= 4 and max(said.get("delay", 0) for said in policy.said) >= 4


def test_answer_that_is_later_than_was_said_is_not_used_and_the_next_one_continues_what_was():
    policy = SlowPolicy(Robot(), [1, 1, 1, 4, 1])
    executed, report = play(policy, 60, "real_time", execute=3)
    np.testing.assert_array_equal(executed[:, 1], np.arange(60))
    assert report.unused >= 1 and sum(said.get("unused", False) for said in policy.said) == report.unused
    assert set(executed[:, 0]) < set(range(len(policy.chunks)))


def test_answer_that_is_later_than_was_said_is_used_where_nothing_is_left_to_wait_with():
    policy = SlowPolicy(Robot(), [1, 1, K - 4, 1])
    executed, report = play(policy, 30, "real_time", execute=2)
    np.testing.assert_array_equal(executed[:, 1], np.arange(30))
    assert report.unused == 0 and report.held == 0


def test_ensemble_averages_what_is_predicted_for_a_step():
    policy = SlowPolicy(Robot(), [1])
    executed, _ = play(policy, 30, "ensemble")
    np.testing.assert_allclose(executed[:, 1], np.arange(30), rtol=1e-6)
    assert any(number % 1 for number in executed[:, 0]), "no step is an average of chunks"


def test_robot_holds_while_nothing_is_left_and_goes_on_with_the_answer():
    policy = SlowPolicy(Robot(), [0, K + 5, 1])
    executed, report = play(policy, 50, "asynchronous", execute=K, when_late="hold")
    held = np.flatnonzero(np.diff(executed[:, 1]) == 0)
    assert report.held == len(held) >= 5
    np.testing.assert_array_equal(np.delete(executed[:, 1], held + 1), np.arange(50 - len(held)))


def test_run_that_may_not_hold_ends_with_what_was_late():
    policy = SlowPolicy(Robot(), [10**6])
    with pytest.raises(PolicyTimeout, match=r"step 12: nothing is left to execute.*when_late='hold'"):
        play(policy, 50, "asynchronous", execute=4)
    assert len(policy.robot.executed) == K
    policy.robot.due = 0  # the thread of the question ends
    with policy.robot.moved:
        policy.robot.moved.notify_all()


@pytest.mark.parametrize("error", [PolicyTimeout("late"), PolicyConnectionError("gone")])
def test_lost_answer_is_asked_again_while_the_robot_goes_on(error):
    policy = SlowPolicy(Robot(), [2], {2: error})
    executed, report = play(policy, 40, "asynchronous", execute=4)
    np.testing.assert_array_equal(executed[:, 1], np.arange(40))
    assert report.held == 0 and report.chunks >= 3


def test_first_answer_that_is_lost_ends_the_run():
    with pytest.raises(PolicyTimeout, match="late"):
        play(SlowPolicy(Robot(), [0], {0: PolicyTimeout("late")}), 5, "real_time", when_late="hold")


@pytest.mark.parametrize("where", ["observe", "act", "until", "infer"])
def test_nothing_is_executed_after_an_error(where):
    robot = Robot()
    policy = SlowPolicy(robot, [1], {2: PolicyServerError("broken")} if where == "infer" else {})

    def fail(step: int) -> None:
        if len(robot.executed) >= step:
            raise PolicyServerError("broken")

    def act(action: np.ndarray) -> None:
        robot.act(action)
        if where == "act":
            fail(7)

    def observe() -> dict:
        if where == "observe":
            fail(7)
        return robot.observe()

    def until() -> bool:
        if where == "until":
            fail(7)
        return len(robot.executed) > 500

    with pytest.raises(PolicyServerError, match="broken"):
        ControlLoop(policy, "asynchronous", execute=3, hz=HZ).run(observe, act, until=until)
    count = len(robot.executed)
    time.sleep(0.02)
    assert len(robot.executed) == count < 500


def test_loop_ends_when_it_is_told():
    robot = Robot()
    loop = ControlLoop(SlowPolicy(robot, [1]), hz=HZ)
    assert loop.run(robot.observe, robot.act, until=lambda: len(robot.executed) == 9).steps == 9
    loop.reset(success=True)
    told = loop.client.resets[0]
    assert told["success"] is True and told["executed"].shape[1] == A


def test_first_answer_does_not_count_as_delay():
    policy = SlowPolicy(Robot(), [1], first_s=0.4)
    _, report = play(policy, 60, "real_time")
    assert policy.said[1]["delay"] == K - policy.asked[1], "as much as is left: nothing better is known"
    assert report.delay[1] < 0.4 * HZ and policy.said[-1]["delay"] < K // 2


def test_person_takes_over_and_the_policy_begins_anew():
    """Also while a question is open: its answer, of before, is not executed."""
    policy = SlowPolicy(Robot(), [0, 3, 0])
    theirs = {5: np.full(A, -1.0), 6: np.full(A, -2.0)}
    executed, _ = play(policy, 30, "real_time", intervene=lambda seen: theirs.get(seen["step"]), execute=4, record=True)
    np.testing.assert_array_equal(executed[5:7], [[-1, -1], [-2, -2]])
    np.testing.assert_array_equal(executed[7:, 1], np.arange(7, 30))
    assert policy.asked[:3] == [0, 4, 7] and not (executed[:, 0] == 1).any()
    assert "executed" not in policy.said[2] and policy.said[2]["record"]["actor"] == "intervention"


def test_recorded_steps_reach_the_server_in_order_each_with_what_was_executed_before():
    policy = SlowPolicy(Robot(), [3])
    executed, _ = play(policy, 30, "real_time", execute=5, record=True)
    assert [step for step, _ in policy.shown] == list(range(30))
    np.testing.assert_array_equal(np.concatenate([told["executed"] for _, told in policy.shown[1:]]), executed[:29])


def test_ticker_keeps_the_rate_and_never_hurries_to_catch_up():
    clock, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    ticker = Ticker(10, now=lambda: clock[0], sleep=sleep)
    for work in (0.02, 0.03, 0.25, 0.0, 0.05):  # of each step
        ticker.wait()
        ticker.act()
        clock[0] += work
    ticker.wait()
    np.testing.assert_allclose(slept, [0.08, 0.07, 0.1, 0.05])
    np.testing.assert_allclose(ticker.gaps, [0.1, 0.1, 0.25, 0.1])
    assert ticker.missed == 1
    np.testing.assert_allclose(ticker.jitter_ms(), np.percentile([0, 0, 150, 0], [50, 95, 100]), atol=1e-9)


@pytest.mark.parametrize("waits, missed, gap", [(0.04, 0, 0.14), (0.3, 1, 0.4)])
def test_ticker_gives_an_action_its_time_after_the_robot_stood(waits, missed, gap):
    clock = [5.0]
    ticker = Ticker(10, now=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    for stands in (0.7, 0.0, waits, 0.0):  # the first chunk of a run is waited for: no deadline is missed
        ticker.wait()
        if stands:
            clock[0] += stands
            ticker.restart()
        ticker.act()
    np.testing.assert_allclose(ticker.gaps, [0.1, gap, 0.1])
    assert ticker.missed == missed


@pytest.mark.parametrize(
    "metadata, options, said",
    [
        ({}, {"mode": "fast"}, "mode: got 'fast', expected one of blocking, asynchronous, ensemble, real_time"),
        ({}, {"execute": 0}, "execute: got 0"),
        ({}, {"hz": None}, "hz: got None, and the policy does not know"),
        ({"control_hz": 0.0}, {"hz": None}, "hz: got 0.0"),
        ({}, {"when_late": "zero"}, "zeros are a position"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_moves(metadata, options, said):
    with pytest.raises(ValueError, match=said):
        ControlLoop(SlowPolicy(Robot(), [0], **metadata), **{"hz": HZ, **options})


def test_server_without_real_time_chunking_is_refused_with_what_to_take():
    policy = SlowPolicy(Robot(), [0])
    del policy.metadata["rtc_max_delay"]
    with pytest.raises(ValueError, match="this server does not know; take asynchronous or ensemble"):
        ControlLoop(policy, "real_time", hz=HZ)
    assert ControlLoop(policy, hz=HZ).mode == "asynchronous"


@pytest.mark.parametrize("trained, mode", [(0, "asynchronous"), (3, "real_time")])
def test_chunks_are_continued_by_itself_only_where_the_policy_was_trained_for_it(trained, mode):
    assert ControlLoop(SlowPolicy(Robot(), [0], rtc_max_delay=trained), hz=HZ).mode == mode


def test_execute_beyond_a_chunk_is_refused():
    with pytest.raises(ValueError, match="execute: got 13, but the policy sends 12 actions"):
        play(SlowPolicy(Robot(), [0]), 5, "blocking", execute=K + 1)
