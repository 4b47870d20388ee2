"""What the event loop does while the model thinks, and how requests of several clients are computed together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from observations import draw, local
from paligemma_vla import Policy
from paligemma_vla_client import pack, unpack
from running_server import RunningServer

PATIENCE = 20.0


class Gate:
    """A model that begins to compute when it is told to. batches: the instructions of each call."""

    def __init__(self, policy: Policy) -> None:
        self.batches: list[list[str]] = []
        self.begun, self.open = threading.Event(), threading.Event()
        self._compute = policy.infer_batch

    def __call__(self, observations: list[Any], *others: Any) -> Any:
        self.batches.append([observation.prompt for observation in observations])
        self.begun.set()
        assert self.open.wait(PATIENCE)
        return self._compute(observations, *others)


@pytest.fixture
def clients() -> Iterator[Callable[[RunningServer, int], list[ClientConnection]]]:
    """`clients(server, number)`: connected, each with its contract read."""
    with ExitStack() as stack:

        def start(server: RunningServer, number: int) -> list[ClientConnection]:
            started = [stack.enter_context(connect(server.url)) for _ in range(number)]
            for connection in started:
                connection.recv(PATIENCE)
            return started

        yield start


def gated(server: RunningServer) -> Gate:
    gate = Gate(server.service.policy)
    server.service.policy.infer_batch = gate
    return gate


def waits_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def counted(server: RunningServer, name: str, **labels: str) -> float:
    return server.service.metrics.registry.get_sample_value(f"paligemma_vla_{name}", labels) or 0.0


def has_queued(server: RunningServer, number: int) -> None:
    waits_until(lambda: counted(server, "queue") == number)


def actions_of(connection: ClientConnection) -> np.ndarray:
    reply = connection.recv(PATIENCE)
    assert isinstance(reply, bytes), reply
    return unpack(reply)["actions"]


def test_keep_alive_is_answered_while_the_model_thinks(serve, policy):
    """In Python, which is worse than in torch: the thread gives way to the event loop only when the interpreter says so."""
    server = serve()
    compute = server.service.policy.infer_batch

    def think(*arguments: Any) -> Any:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            pass
        return compute(*arguments)

    server.service.policy.infer_batch = think
    with connect(server.url, ping_interval=0.1, ping_timeout=0.5) as asks, connect(server.url) as other:
        asks.recv()
        asks.send(pack(draw(policy)))
        time.sleep(0.1)
        began = time.monotonic()
        assert other.ping().wait(PATIENCE)
        assert time.monotonic() - began < 0.5
        actions_of(asks)


def test_requests_that_wait_are_computed_at_once_and_each_client_gets_its_own_answer(serve, policy, clients):
    server = serve(limited=False, max_batch=4)
    gate = gated(server)
    connections = clients(server, 6)
    observations = [draw(policy, number) | {"prompt": f"pick up block {number}"} for number in range(6)]
    for number, (connection, observation) in enumerate(zip(connections, observations, strict=True)):
        connection.send(pack(observation | {"seed": number}))
        if number == 0:
            assert gate.begun.wait(PATIENCE)
        else:
            has_queued(server, number)
    gate.open.set()
    answers = [actions_of(connection) for connection in connections]
    assert [len(batch) for batch in gate.batches] == [1, 4, 1]
    for number in (0, 5):
        np.testing.assert_array_equal(answers[number], local(policy, observations[number], number))
    for number in (1, 2, 3, 4):
        np.testing.assert_allclose(answers[number], local(policy, observations[number], number), atol=1e-5)
    assert not np.allclose(answers[1], answers[2], atol=1e-3), "a mix-up would not show"


def test_first_request_waits_for_others_until_the_deadline_and_no_longer(serve, policy, clients):
    server = serve(batch_wait_s=0.4)
    gate = gated(server)
    gate.open.set()
    first, second = clients(server, 2)
    first.send(pack(draw(policy)))
    time.sleep(0.1)
    second.send(pack(draw(policy)))
    began = time.monotonic()
    actions_of(first), actions_of(second)
    assert time.monotonic() - began < 0.3, "all who are connected have asked: nobody else is to be waited for"
    began = time.monotonic()
    first.send(pack(draw(policy)))
    actions_of(first)
    assert 0.4 <= time.monotonic() - began < 0.8
    assert [len(batch) for batch in gate.batches] == [2, 1]


@pytest.mark.parametrize("leave", ["closes", "vanishes"])
def test_request_whose_client_is_gone_is_not_computed(serve, policy, clients, leave):
    server = serve()
    gate = gated(server)
    stays, goes = clients(server, 2)
    stays.send(pack(draw(policy) | {"prompt": "stay"}))
    assert gate.begun.wait(PATIENCE)
    goes.send(pack(draw(policy) | {"prompt": "go"}))
    has_queued(server, 1)
    if leave == "closes":
        goes.close()
    else:
        goes.socket.shutdown(2)
    has_queued(server, 0)
    gate.open.set()
    actions_of(stays)
    stays.send(pack(draw(policy) | {"prompt": "stay"}))
    actions_of(stays)
    assert gate.batches == [["stay"], ["stay"]]
    assert counted(server, "dropped_total", reason="gone") == 1


def test_error_of_one_request_does_not_fail_those_computed_with_it(serve, policy, clients, caplog):
    server = serve(limited=False)
    compute = server.service.policy.infer_batch

    def fail(observations: list[Any], *others: Any) -> Any:
        if any(observation.prompt == "fail" for observation in observations):
            raise RuntimeError("/home/robot/secret.py has failed")
        return compute(observations, *others)

    server.service.policy.infer_batch = fail
    gate = gated(server)
    connections = clients(server, 4)
    prompts = ["first", "one", "fail", "two"]
    for number, (connection, prompt) in enumerate(zip(connections, prompts, strict=True)):
        connection.send(pack(draw(policy) | {"prompt": prompt, "seed": 1}))
        waits_until(gate.begun.is_set if number == 0 else lambda number=number: counted(server, "queue") == number)
    gate.open.set()
    for connection, prompt in zip(connections, prompts, strict=True):
        if prompt == "fail":
            assert connection.recv(PATIENCE) == "internal error: RuntimeError; the server's log says more"
        else:
            np.testing.assert_allclose(actions_of(connection), local(policy, draw(policy) | {"prompt": prompt}, 1), atol=1e-5)
    assert gate.batches == [["first"], ["one", "fail", "two"], ["one"], ["fail"], ["two"]]
    assert counted(server, "errors_total", protocol="openpi") == 1
    assert "/home/robot/secret.py has failed" in caplog.text


def test_requests_beyond_the_queue_are_refused(serve, policy, clients):
    server = serve(max_queue=1)
    gate = gated(server)
    computed, waits, refused = clients(server, 3)
    computed.send(pack(draw(policy)))
    assert gate.begun.wait(PATIENCE)
    waits.send(pack(draw(policy)))
    has_queued(server, 1)
    refused.send(pack(draw(policy)))
    assert "1 observations wait, expected at most 1" in refused.recv(PATIENCE)
    gate.open.set()
    actions_of(computed), actions_of(waits)
    assert counted(server, "dropped_total", reason="queue") == 1


def test_client_that_is_slow_to_send_or_to_read_holds_up_none(serve, policy, clients):
    server = serve(batch_wait_s=0)
    server.service.contract["padding"] = bytes(2**25)  # more than the buffers of both sides
    with connect(server.url, max_size=None) as reads_nothing, connect(server.url, max_size=None) as sends_half:
        sends_half.recv(PATIENCE)
        message = pack(draw(policy))
        sends_half.socket.sendall(b"\x82\xfe" + len(message).to_bytes(2, "big") + bytes(4) + message[: len(message) // 2])
        del server.service.contract["padding"]
        (other,) = clients(server, 1)
        for _ in range(5):
            began = time.monotonic()
            other.send(pack(draw(policy)))
            actions_of(other)
            assert time.monotonic() - began < 1
        for connection in (reads_nothing, sends_half):
            connection.socket.shutdown(2)


def test_flood_of_one_client_leaves_the_others_their_turns(serve, policy, clients):
    server = serve(batch_wait_s=0, max_batch=1)
    gate = gated(server)
    gate.open.set()
    floods, asks = clients(server, 2)
    message = pack(draw(policy) | {"prompt": "flood"})

    def flood() -> None:
        for _ in range(200):
            floods.send(message)

    with ThreadPoolExecutor(1) as executor:
        flooding = executor.submit(flood)
        waits_until(lambda: len(gate.batches) > 10)
        for _ in range(5):
            before = len(gate.batches)
            asks.send(pack(draw(policy) | {"prompt": "ask"}))
            actions_of(asks)
            assert len(gate.batches) - before <= 4, "one may be computed, one may wait"
        assert not flooding.done() or len(gate.batches) < 200
        for _ in range(200):
            actions_of(floods)
        flooding.result()


def test_answers_that_continue_a_chunk_are_computed_apart_and_in_their_turn(serve, policy, clients):
    """Guidance takes longer: who asks plainly does not wait for it in one batch."""
    server = serve(limited=False)
    connections = clients(server, 5)
    for connection in connections:
        connection.send(pack(draw(policy)))
        actions_of(connection)
    gate = gated(server)
    fields = [{}, {"executed": 1, "delay": 1}, {}, {"executed": 1, "delay": 1}, {}]
    for number, (connection, told) in enumerate(zip(connections, fields, strict=True)):
        connection.send(pack(draw(policy) | {"prompt": str(number)} | told))
        waits_until(gate.begun.is_set if number == 0 else lambda number=number: counted(server, "queue") == number)
    gate.open.set()
    for connection in connections:
        actions_of(connection)
    assert gate.batches == [["0"], ["1", "3"], ["2", "4"]]
