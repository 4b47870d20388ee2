"""GR00T's wire, by a client written from its description: a REQ socket, msgpack, arrays as .npy."""

from __future__ import annotations

import io
import json
import sys
import threading
import time

import msgpack
import numpy as np
import pytest
import zmq

from observations import draw, local
from paligemma_vla.errors import ConfigError
from paligemma_vla.serving.protocols.groot import require_zmq

PARTS = ("groot:action=arm:1+gripper:1",)


def encode(value: object) -> object:
    stream = io.BytesIO()
    np.save(stream, value, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": stream.getvalue()}


def encode_as_msgpack_numpy(value: np.ndarray) -> object:
    kind = {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape}
    return {**kind, b"data": value.tobytes()}


def decode(found: dict) -> object:
    if "__ndarray_class__" in found:
        return np.load(io.BytesIO(found["as_npy"]), allow_pickle=False)
    return found


class Client:
    """As GR00T's `PolicyClient` does it."""

    def __init__(self, port: int, token: str | None = None, encode=encode) -> None:
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.token, self.encode = token, encode

    def call(self, endpoint: str | None, data: object = None) -> object:
        request = {"endpoint": endpoint, "data": data, "api_token": self.token}
        self.socket.send(
            msgpack.packb({name: value for name, value in request.items() if value is not None}, default=self.encode)
        )
        return msgpack.unpackb(self.socket.recv(), object_hook=decode)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def to_wire(observation: dict) -> dict:
    """N1.6 and later: nested, with leading (B, T)."""
    return {
        "video": {"front": observation["image_1"][None, None], "wrist": observation["image_2"][None, None]},
        "state": {"state": observation["state"][None, None].astype(np.float32)},
        "language": {"annotation.human.task_description": [[observation["prompt"]]]},
    }


def in_float32(observation: dict) -> dict:
    return {**observation, "state": observation["state"].astype(np.float32)}


@pytest.mark.parametrize("encoding", [encode, encode_as_msgpack_numpy])
def test_action_is_the_local_one_by_name(serve, policy, encoding):
    observation = draw(policy)
    with Client(serve(zmq_port=0, seed=5, limited=False, keys=PARTS).zmq_port, encode=encoding) as client:
        action, info = client.call("get_action", {"observation": to_wire(observation), "options": None})
        assert info == {}
        expected = local(policy, in_float32(observation), 5)
        np.testing.assert_array_equal(action["arm"], expected[None, :, :1])
        np.testing.assert_array_equal(action["gripper"], expected[None, :, 1:])
        assert action["arm"].dtype == np.float32


def test_n15_sends_flat_names_and_gets_the_action_alone(serve, policy):
    observation = draw(policy)
    flat = {
        "video.front": observation["image_1"][None],
        "video.wrist": observation["image_2"][None],
        "state.state": observation["state"][None],
        "annotation.human.task_description": [observation["prompt"]],
    }
    with Client(serve(zmq_port=0, seed=5, limited=False, execute=3).zmq_port) as client:
        action = client.call("get_action", flat)
        np.testing.assert_array_equal(action["action.action"], local(policy, observation, 5)[:3])


def test_other_endpoints(serve, policy):
    with Client(serve(zmq_port=0).zmq_port) as client:
        pong = client.call("ping")
        assert (pong["status"], pong["contract"]["horizon"]) == ("ok", policy.metadata["horizon"])
        assert client.call("reset", {"options": None}) == {}
        config = client.call("get_modality_config")
        assert config["video"]["as_json"] == {"delta_indices": [0], "modality_keys": ["front", "wrist"]}
        assert config["action"]["as_json"] == {"delta_indices": [0, 1, 2, 3], "modality_keys": ["action"]}
        assert config["language"]["as_json"]["modality_keys"] == ["annotation.human.task_description"]
        assert "kill is refused" in client.call("kill")["error"]
        assert "did you mean 'get_action'" in client.call("getaction")["error"]
        assert client.call("ping")["status"] == "ok"


def test_what_is_recorded_of_chunks_is_a_log_with_the_ends_of_episodes(serve, policy, tmp_path):
    server = serve(zmq_port=0, execute=2, record=tmp_path / "D")
    with Client(server.zmq_port) as client:
        for _ in range(2):
            action = client.call("get_action", {"observation": to_wire(draw(policy))})[0]["action"]
            client.call("reset", {"options": None})
    server.close()
    (log,) = (tmp_path / "D").glob("*.chunks.jsonl")
    head, *entries = map(json.loads, log.read_text().splitlines())
    assert head["protocol"] == "groot" and [entry.get("episode_ends") for entry in entries] == [None, True] * 2
    np.testing.assert_array_equal(np.float32(entries[2]["sent"]), action[0])


def test_faults_are_answered_and_the_client_may_go_on(serve, policy):
    good = to_wire(draw(policy))
    with Client(serve(zmq_port=0).zmq_port) as client:
        for change, said in (
            ({"video": {"front": good["video"]["front"]}}, "video/wrist: missing"),
            ({"state": {"state": np.zeros((1, 2, 3))}}, "state: got float64 (2, 3), expected 3 numbers"),
            ({"language": {"task": [["one"], ["two"]]}}, "prompt: got list"),
            ({"video": {"front": np.zeros((1, 2, 8, 8, 3), np.uint8)} | good["video"]}, None),
        ):
            reply = client.call("get_action", {"observation": {**good, **change}})
            assert said is None or said in reply["error"], reply
        assert "expected a map" in client.call("get_action", {"observation": 3})["error"]
        client.socket.send(b"\xc1 no msgpack")
        assert "not a msgpack message" in msgpack.unpackb(client.socket.recv())["error"]
        assert len(client.call("get_action", {"observation": good})) == 2


def test_api_token_is_asked_for_everything(serve):
    port = serve(zmq_port=0, api_key="secret").zmq_port
    with Client(port) as client, Client(port, "wrong") as liar, Client(port, "secret") as friend:
        assert "api_token" in client.call("ping")["error"]
        assert "api_token" in liar.call("get_modality_config")["error"]
        assert friend.call("ping")["status"] == "ok"


def test_one_slow_client_holds_up_none_and_only_as_many_as_agreed_are_served(serve, policy):
    server = serve(zmq_port=0, max_clients=2)
    begin, answer = threading.Event(), server.service.policy.infer_batch

    def slow(*arguments):
        begin.wait(20)
        return answer(*arguments)

    server.service.policy.infer_batch = slow
    with Client(server.zmq_port) as waiting, Client(server.zmq_port) as other, Client(server.zmq_port) as third:
        done: list = []
        thread = threading.Thread(
            target=lambda: done.append(waiting.call("get_action", {"observation": to_wire(draw(policy))}))
        )
        thread.start()
        try:
            deadline = time.monotonic() + 10
            while not server.service.sessions and time.monotonic() < deadline:
                time.sleep(0.01)
            assert other.call("ping")["status"] == "ok"
            assert not done
            assert "2 clients are connected" in third.call("ping").get("error", "none")
        finally:
            begin.set()
            thread.join(20)
        assert len(done[0]) == 2


def test_missing_package_and_taken_port_are_named(serve, monkeypatch):
    port = serve(zmq_port=0).zmq_port
    with pytest.raises(ConfigError, match=f"--zmq_port {port}: Address already in use.*take another port"):
        serve(zmq_port=port)
    monkeypatch.setitem(sys.modules, "zmq.asyncio", None)
    with pytest.raises(ConfigError, match=r"--zmq_port: .*pip install 'paligemma-vla\[zmq\]'"):
        require_zmq()


@pytest.mark.parametrize("given", ["groot:action=arm:1", "groot:action=arm+gripper", "groot:action=arm:x+gripper:1"])
def test_parts_of_an_action_that_do_not_add_up_are_refused(serve, given):
    with pytest.raises(ConfigError, match="add up to the 2 numbers of an action"):
        serve(keys=(given,))
