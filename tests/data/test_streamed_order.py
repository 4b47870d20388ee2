"""The streamed order beyond the contract of all orders: few blocks at a time for each slot, and each block once in a pass."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from paligemma_vla.data.order import StreamedOrder
from paligemma_vla.seeding import permute_each


def uneven(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Samples in some blocks."""
    return np.random.default_rng(seed).integers(3, 40, count)


def epoch(order: StreamedOrder, number: int) -> list[list[int]]:
    steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
    return [order.batch(step)[1].tolist() for step in steps]


def of_slot(batches: list[list[int]], slot: int) -> list[int]:
    return [batch[slot] for batch in batches if slot < len(batch)]


@pytest.mark.parametrize("size", [1, 2, 3, 17, 200])
def test_permute_each_is_a_permutation_for_every_key(size: int) -> None:
    keys = np.arange(5, dtype=np.uint64)
    index, numbers = np.tile(np.arange(size), 5), np.repeat(keys, size)
    got = permute_each(index, np.full(5 * size, size), numbers).reshape(5, size)
    assert all(sorted(row) == list(range(size)) for row in got.tolist())
    assert size < 17 or len({tuple(row) for row in got.tolist()}) == 5
    mixed = permute_each(np.array([0, 5, 4]), np.array([1, 10, 7]), numbers[:1].repeat(3))
    alone = [permute_each(np.array([i]), np.array([n]), numbers[:1])[0] for i, n in ((0, 1), (5, 10), (4, 7))]
    assert mixed.tolist() == alone  # each on its own, whatever stands beside it


@pytest.mark.parametrize("weights", [None, [2.0, 1.0]])
def test_slots_go_through_their_lanes_window_by_window(weights: list[float] | None) -> None:
    """Against lanes laid out by hand: which samples a slot takes, and in which stretch of its steps."""
    batch, window = 7, 4
    order = StreamedOrder([uneven(40), uneven(20, 1)], weights, batch, 0, window)
    for number in range(3):
        batches = epoch(order, number)
        pieces, bounds = order._line(number)
        line = [
            (place, first + i)
            for place, (first, size) in enumerate(zip(pieces.tolist(), np.diff(bounds).tolist(), strict=True))
            for i in range(size)
        ]
        steps, last = order.steps_per_epoch, order.epoch_size - (order.steps_per_epoch - 1) * batch
        first = 0
        for slot in range(batch):
            lane = line[first : first + steps - (slot >= last)]
            first += len(lane)
            taken = of_slot(batches, slot)
            windows: dict[int, list[int]] = {}
            for place, sample in lane:
                windows.setdefault((place + slot * window // batch) // window, []).append(sample)
            done = 0
            for samples in windows.values():
                assert sorted(taken[done : done + len(samples)]) == sorted(samples)
                done += len(samples)
            assert done == len(taken) == len(lane)
        assert first == order.epoch_size


def test_an_epoch_takes_up_the_blocks_of_a_set_where_the_last_one_left_them() -> None:
    """Repeated by weight, each block comes once in a pass; only where an epoch ends is one cut."""
    sizes = [uneven(30), uneven(9, 1)]
    order = StreamedOrder(sizes, [1.0, 2.0], 8, 0, 4)
    first = int(sizes[0].sum())
    starts = first + np.cumsum(sizes[1]) - sizes[1]
    drawn: list[int] = []
    for number in range(6):
        pieces, bounds = order._line(number)
        whole = np.isin(pieces, starts) & (np.diff(bounds) == sizes[1][np.searchsorted(starts, pieces, side="right") - 1])
        cut = np.count_nonzero((pieces >= first) & ~whole)
        assert cut <= 2
        drawn += pieces[whole].tolist()
    counts = np.array([drawn.count(start) for start in starts])
    passes = 6 * order.quota[1] / sizes[1].sum()
    assert passes - 3 <= counts.min()
    assert counts.max() <= np.ceil(passes)


def test_neighbours_in_a_batch_are_of_other_blocks_and_the_order_forgets_the_files() -> None:
    sizes, batch = uneven(400), 16
    order = StreamedOrder([sizes], None, batch, 0, 4)
    ends = np.cumsum(sizes)
    samples = epoch(order, 0)
    block = [np.searchsorted(ends, b, side="right") for b in samples]
    neighbours = np.mean([np.mean(row[1:] == row[:-1]) for row in block])
    assert neighbours < 0.01
    assert np.mean([len(set(row.tolist())) == len(row) for row in block]) > 0.95
    taken = np.array([sample for row in samples for sample in row])
    assert abs(np.corrcoef(taken, np.arange(len(taken)))[0, 1]) < 0.15  # of 400 blocks: three times what is chance
    lane = np.array(of_slot(samples, 3))
    successive = np.mean(np.diff(lane) == 1)
    assert successive < 0.05  # within a window neither the order of the rows nor that of the blocks
    changes = np.mean(np.diff(np.searchsorted(ends, lane, side="right")) != 0)
    assert changes > 0.6
