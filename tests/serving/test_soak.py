"""Half an hour of clients that come, ask, misbehave and go: memory stays flat. `SOAK_SECONDS` sets another duration."""

from __future__ import annotations

import os
import random
import statistics
import threading
import time

import msgpack
import numpy as np
import psutil
import pytest
from test_fuzz import Resources, small
from websockets.sync.client import connect

from hostile import FRAMES
from observations import draw, local
from paligemma_vla import Policy
from paligemma_vla_client import pack, unpack
from running_server import RunningServer

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
CLIENTS, GROWTH = 6, 30e6


def behave(server: RunningServer, policy: Policy, number: int, deadline: float, answered: list[int]) -> None:
    """One client after another, until the deadline. Some stay for a hundred answers, some send what they should not, some
    vanish while they are waited for."""
    rng = random.Random(number)
    observation = draw(policy, number) | {"seed": number}
    expected = local(policy, draw(policy, number), number)
    while time.monotonic() < deadline:
        with connect(server.url) as connection:
            connection.recv(30)
            for _ in range(rng.choice((1, 10, 100))):
                if rng.random() < 0.2:
                    connection.send(
                        rng.choice([*FRAMES, msgpack.packb({**small(policy), "state": rng.choice((None, [1], "x"))})])
                    )
                    assert isinstance(connection.recv(30), str)
                connection.send(pack(observation))
                if rng.random() < 0.01:
                    connection.socket.shutdown(2)
                    break
                np.testing.assert_allclose(unpack(connection.recv(30))["actions"], expected, atol=1e-5)
                answered[number] += 1


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 120)
def test_memory_is_flat_under_load(serve, policy):
    server = serve(limited=False, max_clients=4 * CLIENTS)  # one that vanishes is noticed later
    answered, failures = [0] * CLIENTS, []
    deadline = time.monotonic() + SECONDS

    def client(number: int) -> None:
        try:
            behave(server, policy, number, deadline, answered)
        except Exception as error:
            failures.append(error)

    before = Resources.take(server)
    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    samples = []
    while time.monotonic() < deadline and not failures:
        time.sleep(min(5.0, SECONDS / 30))
        samples.append(psutil.Process().memory_info().rss)
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert min(answered) > 0
    third = len(samples) // 3
    growth = statistics.median(samples[-third:]) - statistics.median(samples[third : 2 * third])
    assert growth < GROWTH, f"{growth / 1e6:.0f} MB more in the last third than in the second"
    after = Resources.take(server)
    assert before.are_held_by(after), f"{before} -> {after}"
    thirds = [round(statistics.median(part) / 1e6) for part in np.array_split(samples, 3)]
    print(f"{sum(answered)} answers; memory by third: {thirds} MB")
