"""What the server sends stays within the limits, on a real socket; what it cannot send, and whom it cannot answer, it says."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from websockets.sync.client import connect

from observations import draw, local
from paligemma_vla.errors import ConfigError
from paligemma_vla_client import pack, unpack


def ask(connection, message):
    connection.send(pack(message))
    reply = connection.recv()
    return reply if isinstance(reply, str) else unpack(reply)


def shift(server, monkeypatch, by):
    """The policy predicts other actions than it has learned."""
    infer = server.service.policy.infer_batch
    monkeypatch.setattr(server.service.policy, "infer_batch", lambda *arguments: infer(*arguments) + np.float32(by))


def test_actions_beyond_the_data_are_cut_counted_and_reported(serve, policy, monkeypatch, caplog):
    server, message = serve(seed=5), draw(policy)
    shift(server, monkeypatch, 100)
    statistics = policy.preprocessor.statistics.action
    with connect(server.url) as connection:
        connection.recv()
        actions = ask(connection, message)["actions"]
    np.testing.assert_array_equal(actions, np.broadcast_to(statistics.max.astype(np.float32), actions.shape))
    name, horizon = policy.metadata["action_names"][0], len(actions)
    assert server.service.limit_log.counts[name] == horizon
    assert f'paligemma_vla_limited_total{{name="{name}"}} {horizon}.0' in server.service.metrics.text().decode()
    assert f"action {name}: a limit changed {horizon} of its numbers" in caplog.text


def test_state_far_from_the_data_is_logged_once_for_a_client_and_answered(serve, policy, caplog):
    message, seen = draw(policy), policy.preprocessor.statistics.state
    width = np.asarray(seen.max) - np.asarray(seen.min)
    far = np.asarray(seen.mean) - 2.1 * width * (np.arange(len(width)) == 1)
    with connect(serve().url) as connection:
        connection.recv()
        ask(connection, message | {"state": np.asarray(seen.max) + 0.9 * width})
        assert "in the training data" not in caplog.text
        for _ in range(2):
            assert ask(connection, message | {"state": far})["actions"].size
    (text,) = [record.getMessage() for record in caplog.records if "in the training data" in record.getMessage()]
    assert f"state {policy.metadata['state_names'][1]} is {far[1]:g}" in text and "are units and order the same?" in text


def test_rate_holds_from_chunk_to_chunk_after_what_the_client_executed(serve, policy, monkeypatch):
    server, message = serve(seed=5, assignments=["control.action_rate=[0.01, 0.01]"]), draw(policy)
    with connect(server.url) as connection:
        connection.recv()
        first = ask(connection, message)["actions"]
        assert np.abs(np.diff(first, axis=0)).max() <= 0.01 + 1e-6
        shift(server, monkeypatch, -1)
        told = ask(connection, message | {"record": {"executed": first[:2]}})["actions"]
        assert np.abs(told[0] - first[1]).max() <= 0.01 + 1e-6
        untold = ask(connection, message)["actions"]  # what was executed is not known: no limit for the first
        np.testing.assert_allclose(untold[0], np.maximum(local(policy, message, 5)[0] - 1, low(policy)), atol=1e-6)


def low(policy):
    return np.asarray(policy.preprocessor.statistics.action.min, np.float32)


def test_all_of_a_roboarena_chunk_counts_as_executed(serve, policy, monkeypatch):
    server = serve(seed=5, execute=3, assignments=["control.action_rate=[0.01, 0.01]"])
    message = draw(policy) | {"endpoint": "infer"}
    with connect(server.url) as connection:
        connection.recv()
        first = ask(connection, message)
        shift(server, monkeypatch, -1)
        second = ask(connection, message)
        assert len(first) == 3
        assert np.abs(second[0] - first[-1]).max() <= 0.01 + 1e-6


@pytest.mark.parametrize(
    "told, said",
    [
        ({"executed": [1.0]}, "record/executed: got float64 (1,), expected finite numbers (2,), or (M, 2)"),
        ({"executed": [1.0, float("nan")]}, "record/executed: got float64 (2,)"),
        ({"executed": [[1.0, 2.0], [1.0]]}, "record/executed: got object"),
        ({"executed": "all"}, "record/executed: got <U3"),
        ({"actor": "human"}, "record/actor: got 'human'; known: intervention, policy"),
        ({"excuted": [1.0, 2.0]}, "record: got ['excuted'], expected a map of"),
        (3, "record: got int"),
    ],
)
def test_what_a_client_says_wrongly_of_what_it_did_is_refused(serve, policy, told, said):
    with connect(serve().url) as connection:
        connection.recv()
        assert said in ask(connection, draw(policy) | {"record": told})
        assert "actions" in ask(connection, draw(policy))


@pytest.mark.parametrize("limited", [True, False])
def test_actions_that_are_not_finite_are_never_sent(serve, policy, monkeypatch, limited):
    server = serve(limited=limited)
    shift(server, monkeypatch, [np.nan, 0])
    with connect(server.url) as connection:
        connection.recv()
        assert "not finite; nothing is sent" in ask(connection, draw(policy))


def test_without_limits_what_the_policy_predicts_is_sent(serve, policy, monkeypatch):
    server, message = serve(seed=5, limited=False), draw(policy)
    shift(server, monkeypatch, 100)
    with connect(server.url) as connection:
        connection.recv()
        np.testing.assert_array_equal(ask(connection, message)["actions"], local(policy, message, 5) + np.float32(100))


def test_observations_beyond_the_queue_are_refused_and_the_others_answered(serve, policy, monkeypatch):
    server, message = serve(max_queue=2, max_batch=1, limited=False), draw(policy)
    infer, go = server.service.policy.infer_batch, threading.Event()
    monkeypatch.setattr(server.service.policy, "infer_batch", lambda *arguments: go.wait(10) and infer(*arguments))

    def one(_):
        with connect(server.url) as connection:
            connection.recv()
            return ask(connection, message)

    with ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(one, number) for number in range(6)]
        until = time.monotonic() + 10
        while sum(reply.done() for reply in replies) < 3 and time.monotonic() < until:  # 1 computed, 2 wait
            time.sleep(0.01)
        go.set()
        found = [reply.result() for reply in replies]
    refused = [reply for reply in found if isinstance(reply, str)]
    assert len(refused) == 3 and all("2 observations wait, expected at most 2; send it again" in text for text in refused)
    assert 'paligemma_vla_dropped_total{reason="queue"} 3.0' in server.service.metrics.text().decode()


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("optimizer.lr=1", r"--set optimizer.lr: decided by training; expected a key of control\. or"),
        ("control.action_low=[1]", "control.action_low: got 1 numbers, expected per_action_dim, 2"),
    ],
)
def test_set_changes_limits_alone(checkpoint, assignment, message):
    from paligemma_vla.policy import Policy
    from paligemma_vla.serving.build import changed_config

    with pytest.raises(ConfigError, match=message):
        changed_config(Policy.from_checkpoint(checkpoint).config, [assignment])
