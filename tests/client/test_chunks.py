"""The queue of chunks against a table, written naively, of what was predicted for each control step."""

from __future__ import annotations

import numpy as np
import pytest

from paligemma_vla_client import ChunkQueue

K, A = 6, 3


def chunk(number: int, length: int = K) -> np.ndarray:
    """Chunk number n holds n + i / 100 in step i, so an action says where it comes from."""
    return np.repeat((number + np.arange(length, dtype=np.float32) / 100)[:, None], A, axis=1)


def started(ensemble: float | None = None) -> ChunkQueue:
    queue = ChunkQueue(ensemble)
    queue.ask()
    assert queue.put(chunk(0))
    return queue


def firsts(queue: ChunkQueue, steps: int) -> list[float]:
    return [round(float(queue.next()[0]), 2) for _ in range(steps)]


@pytest.mark.parametrize("ensemble", [None, 0.0, 0.3, -0.5])
@pytest.mark.parametrize("seed", range(5))
def test_queue_executes_what_a_table_of_all_predictions_says(ensemble, seed):
    """A robot that asks, executes and is answered in a random order, for 200 events."""
    rng, queue = np.random.default_rng(seed), ChunkQueue(ensemble)
    table: dict[int, list[np.ndarray]] = {}  # of each step that was executed or predicted, oldest first
    step, asked, newest, length = 0, None, None, 0
    for event in rng.choice(["next", "ask", "put"], 200, p=[0.6, 0.2, 0.2]):
        if event == "ask":
            asked = step
            assert queue.ask() == (0 if newest is None else step - newest)
        elif event == "put" and asked is not None:
            length, delay = int(rng.integers(2, 9)), rng.choice([None, 0, 1, 3])
            actions = rng.normal(size=(length, A)).astype(np.float32)
            late = step - asked >= length or (delay is not None and step - asked > delay)
            used = not (late and step in table)
            assert queue.put(actions, delay) == used and queue.unused == (not used)
            if used:
                if ensemble is None:
                    table = {}
                for i, action in enumerate(actions):
                    if asked + i >= step:
                        table.setdefault(asked + i, []).append(action)
                newest = asked
            asked = None
        elif event == "next":
            action = queue.next()
            assert (action is None) == (step not in table)
            if action is not None:
                weights = np.exp(-(ensemble or 0) * np.arange(len(table[step])))
                expected = table[step][-1] if ensemble is None else np.average(table[step], axis=0, weights=weights)
                np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-6)
                step += 1
        assert queue.left == sum(later >= step for later in table)
        assert queue.since_chunk == (0 if newest is None else step - newest)


def test_queue_drops_the_actions_whose_steps_are_over():
    queue = started()
    assert firsts(queue, 2) == [0.0, 0.01]
    assert queue.ask() == 2
    assert firsts(queue, 3) == [0.02, 0.03, 0.04]
    assert queue.put(chunk(1), delay=3)
    assert firsts(queue, 3) == [1.03, 1.04, 1.05]
    assert queue.next() is None and queue.ask() == 6


def test_steps_without_an_action_do_not_count():
    queue = started()
    firsts(queue, 5)
    queue.ask()
    firsts(queue, 1)
    assert [queue.next() for _ in range(4)] == [None] * 4
    queue.put(chunk(1), delay=1)
    assert firsts(queue, 1) == [1.01]


def test_answer_later_than_its_delay_is_left_out_while_anything_is_left():
    queue = started()
    queue.ask()
    firsts(queue, 3)
    assert not queue.put(chunk(1), delay=2)
    assert queue.unused and queue.left == 3 and queue.ask() == 3
    firsts(queue, 3)
    assert queue.put(chunk(2), delay=2), "nothing is left: a jump is better than to stand still"
    assert not queue.unused and firsts(queue, 1) == [2.03]


def test_answer_of_which_nothing_remains_does_not_replace_what_is_left():
    queue = started()
    queue.ask()
    firsts(queue, 4)
    assert not queue.put(chunk(1, length=4)) and firsts(queue, 2) == [0.04, 0.05]


def test_clear_forgets_the_chunks_and_the_question():
    queue = started()
    queue.ask()
    queue.clear()
    assert queue.left == 0 and queue.next() is None
    assert not queue.put(chunk(1)) and queue.next() is None
    assert queue.ask() == 0 and queue.put(chunk(2)) and firsts(queue, 1) == [2.0]


def test_action_of_the_queue_may_be_changed_by_its_caller():
    queue = ChunkQueue()
    queue.ask()
    actions = chunk(0)
    queue.put(actions)
    queue.next()[:] = 99
    np.testing.assert_array_equal(actions, chunk(0))


@pytest.mark.parametrize("shape", [(0, A), (A,), (1, K, A)])
def test_what_is_no_chunk_is_refused(shape):
    queue = ChunkQueue()
    queue.ask()
    with pytest.raises(ValueError, match=r"actions: got \(.*\), expected \(K, A\)"):
        queue.put(np.zeros(shape))
