"""openpi's wire, spoken by hand: what stock clients get is tested in `test_stock_clients.py`."""

from __future__ import annotations

import numpy as np
import pytest
from websockets.sync.client import connect

from paligemma_vla import Policy
from paligemma_vla_client import pack, unpack

IMAGES = {"observation/image": "image_1", "observation/wrist_image": "image_2"}


def observation(policy: Policy, seed: int = 0) -> dict:
    """A message of LIBERO's names."""
    rng = np.random.default_rng(seed)
    pictures = {name: rng.integers(0, 255, (40, 50, 3), np.uint8) for name in IMAGES}
    state = np.asarray(policy.preprocessor.statistics.state.mean) + rng.normal(0, 0.01, policy.metadata["state_dim"])
    return {**pictures, "observation/state": state, "prompt": "open the drawer"}


def local(policy: Policy, message: dict, seed: int) -> np.ndarray:
    images = {ours: message[name] for name, ours in IMAGES.items()}
    return policy.infer({**images, "state": message["observation/state"], "prompt": message["prompt"]}, seed=seed)["actions"]


def test_openpi_client_learns_the_contract_and_gets_the_local_action(serve, policy):
    server = serve(seed=5, limited=False)
    message = observation(policy)
    with connect(server.url) as connection:
        contract = unpack(connection.recv())
        assert {key: contract[key] for key in ("cameras", "horizon", "state_dim", "action_names")} == {
            key: policy.metadata[key] for key in ("cameras", "horizon", "state_dim", "action_names")
        }
        assert len(contract["fingerprint"]) == 64
        connection.send(pack(message))
        reply = unpack(connection.recv())
        np.testing.assert_array_equal(reply["actions"], local(policy, message, 5))
        assert reply["server_timing"]["infer_ms"] > 0
        connection.send(pack(message | {"seed": 6}))
        np.testing.assert_array_equal(unpack(connection.recv())["actions"], local(policy, message, 6))


def test_roboarena_messages_get_a_bare_array_and_a_reset(serve, policy):
    message = observation(policy) | {"session_id": "a", "endpoint": "infer"}
    with connect(serve(seed=5, limited=False, execute=2).url) as connection:
        connection.recv()
        connection.send(pack(message))
        np.testing.assert_array_equal(unpack(connection.recv()), local(policy, message, 5)[:2])
        connection.send(pack({"endpoint": "reset", "session_id": "a"}))
        assert connection.recv() == "reset successful"
        connection.send(pack(message | {"endpoint": "infr"}))
        assert "endpoint: got 'infr'; did you mean 'infer'?" in connection.recv()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"observation/state": np.zeros(1)}, "state: got float64 (1,), expected"),
        ({"observation/image": "a picture"}, "image_1: got str, expected an RGB picture"),
        ({"prompt": ""}, "prompt: got an empty instruction"),
        ({"observation/state": None, "observation/stat": 1}, "did you mean 'observation/stat'"),
    ],
)
def test_wrong_observation_is_refused_by_name_and_the_connection_lives_on(serve, policy, change, said):
    message = observation(policy)
    with connect(serve().url) as connection:
        connection.recv()
        wrong = {key: value for key, value in (message | change).items() if value is not None}
        connection.send(pack(wrong))
        refusal = connection.recv()
        assert said in refusal and "Traceback" not in refusal
        connection.send(pack(message))
        assert unpack(connection.recv())["actions"].shape == (policy.metadata["horizon"], policy.metadata["action_dim"])
