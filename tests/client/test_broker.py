"""The broker: which action of which chunk, and what happens when none comes. A stand-in client writes the chunks."""

from __future__ import annotations

import numpy as np
import pytest

from paligemma_vla_client import ActionChunkBroker, PolicyConnectionError, PolicyServerError, PolicyTimeout

K, A = 6, 3


class Chunks:
    """Answers request number n with chunk n, or fails as `failures` says."""

    def __init__(self, failures: dict[int, Exception] | None = None, **metadata: object) -> None:
        self.metadata = metadata
        self.failures, self.asked, self.resets = failures or {}, [], 0
        self.chunks = np.random.default_rng(0).normal(size=(50, K, A)).astype(np.float32)

    def infer(self, observation: dict, record: dict | None) -> dict:
        self.asked.append(observation["step"])
        if error := self.failures.get(len(self.asked) - 1):
            raise error
        return {"actions": self.chunks[len(self.asked) - 1]}

    def reset(self, record: dict | None) -> None:
        self.resets += 1


def play(broker: ActionChunkBroker, steps: int) -> np.ndarray:
    return np.stack([broker.step({"step": step}) for step in range(steps)])


@pytest.mark.parametrize("execute", [1, 2, 4, 6, None])
def test_first_actions_of_each_chunk_are_executed(execute):
    client = Chunks()
    got = play(ActionChunkBroker(client, execute=execute), 13)
    m = execute or K
    np.testing.assert_array_equal(got, [client.chunks[step // m][step % m] for step in range(13)])
    assert client.asked == list(range(0, 13, m))


@pytest.mark.parametrize("weight", [0.0, 0.01, 1.0, -0.5])
def test_ensembling_is_the_papers_table(weight):
    """ACT keeps a table of what was predicted for each step, and averages its column, oldest first."""
    client, steps = Chunks(), 15
    got = play(ActionChunkBroker(client, ensemble=weight), steps)
    table = np.full((steps, steps + K, A), np.nan)  # (asked at, predicted for, A)
    for step in range(steps):
        table[step, step : step + K] = client.chunks[step]
        column = table[:, step][~np.isnan(table[:, step]).any(axis=1)]
        weights = np.exp(-weight * np.arange(len(column)))
        expected = (column * (weights / weights.sum())[:, None]).sum(axis=0)
        np.testing.assert_allclose(got[step], expected, rtol=1e-5, atol=1e-6)
    assert got.dtype == np.float32 and client.asked == list(range(steps))


def test_ensembling_goes_on_over_a_step_without_an_answer():
    client = Chunks({1: PolicyTimeout("late")}, action_representation="absolute")
    got = play(ActionChunkBroker(client, ensemble=0.0, when_late="hold"), 3)
    np.testing.assert_array_equal(got[1], got[0])
    np.testing.assert_allclose(got[2], (client.chunks[0][2] + client.chunks[2][0]) / 2, rtol=1e-6)


@pytest.mark.parametrize("error", [PolicyTimeout("late"), PolicyConnectionError("gone")])
@pytest.mark.parametrize(
    "when_late, metadata, expected",
    [
        ("hold", {"action_representation": "absolute"}, [1, 1, 1]),
        ("hold", {"action_representation": "delta"}, [0, 0, 0]),
        ("zero", {"action_representation": "delta"}, [0, 0, 0]),
        ("zero", {}, [0, 0, 0]),
        ("hold", {"action_representation": "delta", "action_names": ["x", "y", "Gripper"]}, [0, 0, 1]),
        ("zero", {"action_representation": "delta", "action_names": ["x", "y", "gripper_width"]}, [0, 0, 1]),
        ("hold", {"action_representation": "absolute", "action_names": ["x", "y", "gripper"]}, [1, 1, 1]),
    ],
)
def test_late_step_holds_or_stands_still_and_the_next_one_asks_again(error, when_late, metadata, expected):
    client = Chunks({1: error, 2: error}, **metadata)
    broker = ActionChunkBroker(client, execute=2, when_late=when_late)
    got = play(broker, 6)
    last = client.chunks[0][1]
    first_late = last * expected
    np.testing.assert_array_equal(got[2], first_late)
    np.testing.assert_array_equal(got[3], first_late)
    np.testing.assert_array_equal(got[4:], client.chunks[3][:2])
    assert broker.late == 2 and client.asked == [0, 2, 3, 4]


def test_what_to_hold_and_to_keep_can_be_said_where_the_server_does_not():
    client = Chunks({1: PolicyTimeout("late")})
    broker = ActionChunkBroker(client, execute=1, when_late="hold", representation="delta", keep=[0])
    np.testing.assert_array_equal(play(broker, 2)[1], client.chunks[0][0] * [1, 0, 0])


def test_stop_raises_and_so_does_the_first_step_of_an_episode():
    late = PolicyTimeout("late")
    stopping = ActionChunkBroker(Chunks({1: late}), execute=1)
    stopping.step({"step": 0})
    with pytest.raises(PolicyTimeout):
        stopping.step({"step": 1})
    assert stopping.late == 1
    holding = ActionChunkBroker(Chunks({0: late}), when_late="zero")
    with pytest.raises(PolicyTimeout):
        holding.step({"step": 0})


def test_refusal_of_the_server_is_not_a_late_answer():
    broker = ActionChunkBroker(Chunks({1: PolicyServerError("state: missing")}), execute=1, when_late="zero")
    broker.step({"step": 0})
    with pytest.raises(PolicyServerError):
        broker.step({"step": 1})


def test_reset_forgets_the_chunk_and_the_last_action_and_tells_the_server():
    client = Chunks({1: PolicyTimeout("late")})
    broker = ActionChunkBroker(client, when_late="zero")
    broker.step({"step": 0})
    broker.reset()
    assert client.resets == 1
    with pytest.raises(PolicyTimeout):
        broker.step({"step": 0})
    np.testing.assert_array_equal(broker.step({"step": 0}), client.chunks[2][0])


def test_action_may_be_changed_by_the_caller():
    client = Chunks({1: PolicyTimeout("late")}, action_representation="absolute")
    broker = ActionChunkBroker(client, execute=1, when_late="hold")
    first = client.chunks[0][0].copy()
    broker.step({"step": 0})[:] = 99
    np.testing.assert_array_equal(broker.step({"step": 1}), first)


@pytest.mark.parametrize(
    "metadata, arguments, said",
    [
        ({}, {"execute": 0}, "execute: got 0"),
        ({}, {"execute": 2, "ensemble": 0.01}, "none with ensemble"),
        ({}, {"ensemble": float("nan")}, "ensemble: got nan"),
        ({}, {"when_late": "wait"}, "when_late: got 'wait', expected one of stop, hold, zero"),
        ({}, {"when_late": "hold"}, "does not say what its actions are"),
        ({}, {"representation": "relative"}, "representation: got 'relative'"),
        ({"action_representation": "absolute"}, {"when_late": "zero"}, "zeros are a position"),
        (
            {"action_representation": "delta", "rotation": {"representation": "quaternion_xyzw"}},
            {"when_late": "hold"},
            "zeros are no rotation as quaternion_xyzw",
        ),
    ],
)
def test_what_would_move_the_robot_wrongly_is_refused_before_it_moves(metadata, arguments, said):
    with pytest.raises(ValueError, match=said):
        ActionChunkBroker(Chunks(**metadata), **arguments)


def test_chunk_shorter_than_execute_is_refused():
    with pytest.raises(ValueError, match="execute: got 7, but the server sends 6 actions"):
        ActionChunkBroker(Chunks(), execute=7).step({"step": 0})
