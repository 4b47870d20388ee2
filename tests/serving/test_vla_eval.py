"""vla-eval's wire, spoken by hand: its own client and its benchmarks are in `test_stock_clients.py`."""

from __future__ import annotations

import json
import time
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from observations import draw, local
from paligemma_vla_client import pack, unpack


def to_wire(observation: dict) -> dict:
    images = {"agentview": observation["image_1"], "wrist": observation["image_2"]}
    return {"images": images, "states": observation["state"], "task_description": observation["prompt"]}


def send(connection: ClientConnection, kind: str, payload: object, seq: int) -> None:
    connection.send(pack({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}, "vla-eval"))


def ask(connection: ClientConnection, kind: str, payload: object, seq: int) -> dict:
    send(connection, kind, payload, seq)
    reply = unpack(connection.recv(timeout=20))
    assert reply["seq"] == seq
    return reply


def test_hello_says_what_the_policy_needs_and_gives(serve, policy):
    with connect(serve().url + "/vla-eval") as connection:
        reply = ask(connection, "hello", {"harness_version": "0.8.0", "protocol_version": 1}, 1)
    told = reply["payload"]
    assert (reply["type"], told["protocol_version"], told["model_server"]) == ("hello", 1, "paligemma-vla")
    assert told["observation_params"] == {"send_state": True, "send_wrist_image": True}
    assert {name: part["format"] for name, part in told["observation_spec"].items()} == {
        "agentview": "rgb_hwc_uint8",
        "wrist": "rgb_hwc_uint8",
        "state": "raw",
        "language": "language",
    }
    assert told["action_spec"] == {
        "actions": {"name": "actions", "dims": 2, "format": "raw", "description": "dx, dy; delta, +1 = 1 cm"}
    }
    assert told["contract"]["horizon"] == policy.metadata["horizon"]


def test_each_observation_gets_one_action_of_a_chunk_which_ends_with_the_episode(serve, policy):
    seen = [draw(policy, seed) for seed in range(4)]
    first, third = local(policy, seen[0], 5), local(policy, seen[2], 5)
    with connect(serve(seed=5, limited=False).url + "/vla-eval") as connection:
        send(connection, "episode_start", {"task": {}}, 1)
        for seq, expected in enumerate((first[0], first[1], third[0]), 2):  # half of the horizon of 4 is played
            reply = ask(connection, "observation", to_wire(seen[seq - 2]), seq)
            assert reply["type"] == "action"
            np.testing.assert_array_equal(reply["payload"]["actions"], expected)
        send(connection, "episode_end", {}, 5)
        send(connection, "episode_start", {"task": {}}, 6)
        reply = ask(connection, "observation", to_wire(seen[0]), 7)
        np.testing.assert_array_equal(reply["payload"]["actions"], first[0])


def test_an_action_can_be_given_to_several_observations_in_a_row(serve, policy):
    seen = draw(policy, 0)
    first = local(policy, seen, 5)
    with connect(serve(seed=5, limited=False, execute=2, action_repeat=2).url + "/vla-eval") as connection:
        send(connection, "episode_start", {"task": {}}, 1)
        for seq, expected in enumerate((first[0], first[0], first[1], first[1], first[0]), 2):
            reply = ask(connection, "observation", to_wire(seen), seq)
            np.testing.assert_array_equal(reply["payload"]["actions"], expected)


@pytest.mark.parametrize(
    "kind, payload, said",
    [
        ("observation", {"images": {}}, "images/front: missing (image_1 of the policy, or images/agentview"),
        ("observation", {"state": np.zeros(1), "image_1": "a picture"}, "image_1: got str"),
        ("observation", [], "payload: got list, expected a map"),
        ("observe", {}, "type: got 'observe'"),
        (np.zeros(2), {}, "type: got ndarray"),
    ],
)
def test_wrong_message_is_an_error_and_the_connection_lives_on(serve, policy, kind, payload, said):
    with connect(serve().url + "/vla-eval") as connection:
        good = to_wire(draw(policy))
        if isinstance(payload, dict) and "image_1" in payload:
            payload = {"images": {"wrist": good["images"]["wrist"]}, "task_description": "go", **payload}
        reply = ask(connection, kind, payload, 1)
        assert reply["type"] == "error"
        assert said in reply["payload"]["error"]
        assert ask(connection, "observation", good, 2)["type"] == "action"
        assert ask(connection, kind, payload, 3)["type"] == "error"  # also while a chunk is played


def test_pages_of_the_protocol(serve):
    url = serve(max_batch=3).url.replace("ws", "http", 1)
    with urlopen(f"{url}/health") as page:
        assert page.status == 200
    with urlopen(f"{url}/config") as page:
        assert json.load(page)["config"] == {"max_batch_size": 3, "max_wait_time": 0.005}
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{url}/config?max_batch_size=8")
    with refused.value as page:
        assert page.status == 422
