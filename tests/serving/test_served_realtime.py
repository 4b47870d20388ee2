"""Real-time chunking over the wire: the server continues what its client is executing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import pytest

from observations import draw, local
from paligemma_vla import Policy
from paligemma_vla.policy import Continuation
from paligemma_vla_client import ControlLoop, PolicyClient, PolicyServerError
from running_server import RunningServer


def continued(policy: Policy, observation: dict, seed: int, left: np.ndarray, delay: int) -> np.ndarray:
    return policy.infer(observation, seed=seed, continuation=Continuation(left, delay))["actions"]


def test_answer_continues_what_the_client_has_left_to_the_last_bit(server, policy):
    views = [draw(policy, number) for number in range(4)]
    with PolicyClient(server.url) as client:
        first = client.infer(views[0], seed=1)["actions"]
        second = client.infer(views[1], seed=2, executed=1, delay=1)["actions"]
        np.testing.assert_array_equal(second, continued(policy, views[1], 2, first[1:], 1))
        assert not np.array_equal(second, local(policy, views[1], 2))
        third = client.infer(views[2], seed=3, executed=2, delay=1, unused=True)["actions"]
        np.testing.assert_array_equal(third, continued(policy, views[2], 3, first[2:], 1))
        plain = client.infer(views[3], seed=4)["actions"]
        np.testing.assert_array_equal(plain, local(policy, views[3], 4))


def test_nothing_is_continued_after_a_reset_and_for_another_connection(server, policy):
    view = draw(policy)
    with PolicyClient(server.url) as client, PolicyClient(server.url) as other:
        client.infer(view, seed=1)
        np.testing.assert_array_equal(other.infer(view, seed=2, executed=1, delay=1)["actions"], local(policy, view, 2))
        client.reset()
        np.testing.assert_array_equal(client.infer(view, seed=2, executed=1, delay=1)["actions"], local(policy, view, 2))


def test_what_is_continued_is_what_was_sent(serve, policy):
    """After limits, and the first actions alone where `--execute` says so."""
    low = [0.0] * policy.metadata["action_dim"]
    server = serve(execute=3, assignments=[f"control.action_low={low}"])
    asked: list[Continuation] = []
    compute = server.service.policy.infer_batch

    def spy(observations: list, seeds: list, num_steps: None, continuations: list) -> np.ndarray:
        asked.extend(continuations)
        return compute(observations, seeds, num_steps, continuations)

    server.service.policy.infer_batch = spy
    with PolicyClient(server.url) as client:
        first = client.infer(draw(policy), seed=1)["actions"]
        client.infer(draw(policy), executed=1, delay=1)
    assert not np.array_equal(first, local(policy, draw(policy), 1)[:3]), "nothing was limited"
    assert asked[0] is None and asked[1].delay == 1
    np.testing.assert_array_equal(asked[1].actions, first[1:])


@pytest.mark.parametrize("told, said", [({"executed": 1}, "delay: got none"), ({"executed": 1, "delay": 999}, "at most the")])
def test_what_cannot_be_continued_is_refused_and_the_client_goes_on(server, policy, told, said):
    with PolicyClient(server.url) as client:
        with pytest.raises(PolicyServerError, match=said):
            client.infer(draw(policy), **told)
        assert client.infer(draw(policy))["actions"].ndim == 2


def slowed(server: RunningServer, seconds: Callable[[], float]) -> None:
    compute = server.service.policy.infer_batch

    def think(*arguments: object) -> np.ndarray:
        time.sleep(seconds())
        return compute(*arguments)

    server.service.policy.infer_batch = think


def test_robot_of_a_slow_server_moves_on_and_what_it_executes_was_known_to_the_policy(serve, policy):
    """The check is on the wire: each continuation of the server is what the robot executed from that observation on."""
    server = serve(limited=False)
    slowed(server, lambda: 0.03)
    compute, asked, seen, executed = server.service.policy.infer_batch, [], [], []

    def spy(observations: list, seeds: list, num_steps: None, continuations: list) -> np.ndarray:
        asked.extend(continuations)
        return compute(observations, seeds, num_steps, continuations)

    def observe() -> dict:
        seen.append(len(executed))
        return draw(policy, len(executed))

    server.service.policy.infer_batch = spy
    with PolicyClient(server.url) as client:
        loop = ControlLoop(client, "real_time", hz=50, when_late="zero")
        report = loop.run(observe, executed.append, steps=40)
        loop.reset(success=True)
    assert report.steps == len(executed) == 40 and len(asked) == len(seen) >= 3
    checked = 0
    for step, after, continuation in zip(seen, [*seen[1:], 40], asked, strict=True):
        if continuation is not None:
            count = min(continuation.delay, after - step, len(continuation.actions))
            np.testing.assert_array_equal(continuation.actions[:count], executed[step : step + count])
            checked += count
    assert checked >= 2


def test_server_says_that_a_robot_stands(serve, policy, caplog):
    server, horizon, hz = serve(limited=False), policy.metadata["horizon"], policy.metadata["control_hz"]
    seconds = [0.0]
    slowed(server, lambda: seconds[0])
    with caplog.at_level(logging.WARNING), PolicyClient(server.url) as client:
        for _ in range(2):
            client.infer(draw(policy))
        client.infer(draw(policy), executed=horizon - 1, delay=1)
        assert "it has" not in caplog.text
        client.infer(draw(policy), executed=horizon - 1, delay=2)
        assert "is used after 2 control steps, and it has 1 left until then" in caplog.text
        seconds[0] = 1.1 * horizon / hz
        client.infer(draw(policy))
        client.infer(draw(policy))
    assert caplog.text.count(f"a chunk of {horizon} actions covers {horizon / hz:.2f} s at {hz:g} Hz: the robot stands") == 1
