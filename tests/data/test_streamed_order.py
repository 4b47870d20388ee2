"""The streamed order: the contract of the random one (each sample once, any step on its own), and few blocks at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from paligemma_vla.data.order import RunSampler, SampleOrder, SampleRef, StreamedOrder
from paligemma_vla.errors import ConfigError
from paligemma_vla.seeding import permute_each

Rows = NDArray[np.int64]


def blocks(*sizes: int) -> Rows:
    return np.array(sizes, np.int64)


def uneven(count: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).integers(3, 40, count)


def table(order: StreamedOrder | SampleOrder, steps: Sequence[int] | range) -> list[list[int]]:
    return [order.batch(step)[1].tolist() for step in steps]


def epoch(order: StreamedOrder, number: int) -> list[list[int]]:
    return table(order, range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch))


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


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


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize(
    ("sizes", "batch"), [([53], 8), ([10, 20, 23], 53), ([5, 3], 64), ([10, 43, 1], 7), ([8], 1), ([4, 4, 4, 4], 4)]
)
def test_every_sample_comes_once_per_epoch(sizes: list[int], batch: int, window: int) -> None:
    order = StreamedOrder([blocks(*sizes)], None, batch, 3, window)
    same_face = SampleOrder(sizes, None, batch, 3)
    assert (order.epoch_size, order.steps_per_epoch) == (same_face.epoch_size, same_face.steps_per_epoch)
    epochs = [epoch(order, number) for number in range(4)]
    for batches in epochs:
        assert sorted(flat(batches)) == list(range(sum(sizes)))
        assert [len(b) for b in batches] == [len(b) for b in table(same_face, range(order.steps_per_epoch))]
    if len(epochs[0]) > 1 and sum(sizes) > 10 and window > 1:
        assert epochs[0] != epochs[1] != epochs[2]
    for step in (0, 3, order.steps_per_epoch):
        positions, samples = order.batch(step)
        assert positions.tolist() == [step * batch + slot for slot in range(len(samples))]


def test_slots_go_through_their_lanes_window_by_window() -> None:
    """Against lanes laid out by hand: which samples a slot takes, and in which stretch of its steps."""
    sizes, batch, window = uneven(60), 7, 4
    order = StreamedOrder([sizes], None, batch, 0, window)
    starts, total = np.cumsum(sizes) - sizes, int(sizes.sum())
    for number in range(3):
        batches = epoch(order, number)
        permuted, _ = order._line(0, number)
        assert sorted(permuted.tolist()) == list(range(60))
        line = [(int(place), int(starts[b]) + i) for place, b in enumerate(permuted) for i in range(sizes[b])]
        steps, last = order.steps_per_epoch, total - (order.steps_per_epoch - 1) * batch
        first = 0
        for slot in range(batch):
            lane = line[first : first + steps - (slot >= last)]
            first += len(lane)
            taken = of_slot(batches, slot)
            assert sorted(taken) == sorted(sample for _, sample in lane)
            windows: dict[int, list[int]] = {}
            for place, sample in lane:
                windows.setdefault((place + slot * window // batch) // window, []).append(sample)
            done = 0
            for samples in windows.values():
                assert sorted(taken[done : done + len(samples)]) == sorted(samples)
                done += len(samples)
            assert done == len(taken)
        assert first == total


def test_any_step_stands_alone() -> None:
    args = ([uneven(30), uneven(20, 1)], [2.0, 1.0], 6, 5, 3)
    before = StreamedOrder(*args)
    run = table(before, range(400))
    for step in (399, 17, 200, 0, 101):
        assert StreamedOrder(*args).batch(step)[1].tolist() == run[step]


def test_neighbours_in_a_batch_are_of_other_blocks_and_the_order_forgets_the_files() -> None:
    sizes, batch = uneven(400), 16
    order = StreamedOrder([sizes], None, batch, 0, 4)
    ends = np.cumsum(sizes)
    samples = epoch(order, 0)
    block = [np.searchsorted(ends, b, side="right") for b in samples]
    neighbours = np.mean([np.mean(row[1:] == row[:-1]) for row in block])
    assert neighbours < 0.01
    assert np.mean([len(set(row.tolist())) == len(row) for row in block]) > 0.95
    taken = np.array(flat(samples))
    assert abs(np.corrcoef(taken, np.arange(len(taken)))[0, 1]) < 0.15  # of 400 blocks: three times what is chance
    lane = np.array(of_slot(samples, 3))
    successive = np.mean(np.diff(lane) == 1)
    assert successive < 0.05  # within a window neither the order of the rows nor that of the blocks
    changes = np.mean(np.diff(np.searchsorted(ends, lane, side="right")) != 0)
    assert changes > 0.6


def test_slots_change_their_windows_at_different_steps() -> None:
    """Equal blocks and lanes of whole windows: without a shift every slot would need four new blocks in the same step."""
    order = StreamedOrder([np.full(8 * 32, 25)], None, 8, 0, 4)
    seen: set[int] = set()
    fresh = []
    for samples in epoch(order, 0):
        new = {sample // 25 for sample in samples} - seen
        seen |= new
        fresh.append(len(new))
    assert len(seen) == 256
    assert max(np.convolve(fresh, np.ones(10), "valid")[20:]) <= 20  # of 80 if all slots changed together


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (3, 1)])
def test_run_is_the_same_for_any_number_of_processes_and_accumulation(world: int, accumulation: int) -> None:
    order = StreamedOrder([uneven(11)], None, 8, 0, 2)
    samplers = [RunSampler(order, 2, 60, rank, world, accumulation) for rank in range(world)]
    streams = [list(sampler) for sampler in samplers]
    assert all(len(stream) == len(sampler) == 58 * accumulation for stream, sampler in zip(streams, samplers, strict=True))
    bounds = np.array_split(np.arange(8), world * accumulation)
    assert all(len(refs) <= sampler.width for sampler, stream in zip(samplers, streams, strict=True) for refs in stream)
    for number, step in enumerate(range(2, 60)):
        parts = [micro for stream in streams for micro in stream[number * accumulation : (number + 1) * accumulation]]
        together = [ref for micro in parts for ref in micro if ref.valid]
        assert together == [SampleRef(int(p), int(s)) for p, s in zip(*order.batch(step), strict=True)]
        assert all(parts)
        for micro, slots in zip(parts, bounds, strict=True):  # also of the smaller last batch of an epoch
            assert {ref.position - step * 8 for ref in micro if ref.valid} <= set(slots.tolist())


def shares(order: StreamedOrder, steps: range, sizes: list[int]) -> list[int]:
    ends = np.cumsum(sizes)
    counts = Counter(np.searchsorted(ends, flat(table(order, steps)), side="right").tolist())
    return [counts[number] for number in range(len(sizes))]


@pytest.mark.parametrize(
    ("weights", "batch", "period", "units"),
    [
        ([1.0, 1.0], 8, 1, [4, 4]),
        ([0.7, 0.3], 16, 5, [56, 24]),
        ([1.0, 1.0, 1.0], 8, 3, [8, 8, 8]),
        ([5.0, 1.0, 1.0, 1.0], 2, 4, [5, 1, 1, 1]),
    ],
)
def test_shares_are_exact_over_a_period(weights: list[float], batch: int, period: int, units: list[int]) -> None:
    sets = [uneven(20 + number, number) for number in range(len(weights))]
    order = StreamedOrder(sets, weights, batch, 1, 2)
    assert order.period == period
    sizes = [int(s.sum()) for s in sets]
    for first in range(0, order.steps_per_epoch - period - 1, period):
        assert shares(order, range(first, first + period), sizes) == units


def test_shares_of_odd_weights_are_as_close_as_a_period_allows() -> None:
    weights = [np.pi, np.e, 0.01]
    sets = [uneven(300), uneven(300, 1), uneven(40, 2)]
    order = StreamedOrder(sets, weights, 8, 1, 2)
    assert order.period <= 1024
    sizes = [int(s.sum()) for s in sets]
    got = np.array(shares(order, range(order.period), sizes)) / (8 * order.period)
    assert np.abs(got - np.array(weights) / sum(weights)).max() < 0.5 / (8 * 1024) * 2
    whole = np.array(shares(order, range(1024), sizes)) / 8192
    assert np.abs(whole - np.array(weights) / sum(weights)).max() < 3e-3


@pytest.mark.parametrize("batch", [4, 16, 7])
def test_weighted_sets_are_gone_through_pass_by_pass(batch: int) -> None:
    """Whatever the shares: no sample of a lane is drawn again before all others of it were, and all lanes make up the set."""
    sets = [blocks(10), uneven(9, 1), uneven(4, 2), blocks(2)]  # two are smaller than some batches
    order = StreamedOrder(sets, [3.0, 1.0, 1.0, 0.5], batch, 0, 2)
    sizes = [int(s.sum()) for s in sets]
    ends = np.cumsum(sizes)
    batches = table(order, range(25 * order.steps_per_epoch))
    assert len(flat(batches)) == 25 * sum(sizes)
    drawn: dict[int, list[list[int]]] = {number: [[] for _ in range(batch)] for number in range(4)}
    for samples in batches:
        for slot, sample in enumerate(samples):
            drawn[int(np.searchsorted(ends, sample, side="right"))][slot].append(sample)
    for number, size in enumerate(sizes):
        first = int(ends[number]) - size
        lanes = {
            int(order.streams.slot[s]): int(order.streams.length[s]) for s in np.flatnonzero(order.streams.source == number)
        }
        assert {slot for slot, samples in enumerate(drawn[number]) if samples} == set(lanes)
        if 0 in lanes.values():  # permuted one by one: in order of step and slot
            taken = [sample for samples in batches for sample in samples if first <= sample < first + size]
            for begin in range(0, len(taken) - size, size):
                assert sorted(taken[begin : begin + size]) == list(range(first, first + size))
            continue
        assert sum(lanes.values()) == size
        for turn in range(min(len(drawn[number][slot]) // length for slot, length in lanes.items())):
            union = [s for slot, length in lanes.items() for s in drawn[number][slot][turn * length : (turn + 1) * length]]
            assert sorted(union) == list(range(first, first + size))


def test_lanes_of_a_set_finish_a_pass_at_about_the_same_step() -> None:
    sets = [uneven(100), uneven(50, 1)]
    order = StreamedOrder(sets, [0.55, 0.45], 8, 0, 4)
    streams = order.streams
    for source in range(2):
        here = streams.source == source
        steps = streams.length[here] * order.period / streams.count[here]
        assert steps.max() - steps.min() <= order.period / streams.count[here].min()


def test_slots_of_a_set_are_spread_over_the_processes() -> None:
    order = StreamedOrder([uneven(100), uneven(100, 1)], [1.0, 1.0], 64, 0, 4)
    counts = [int(np.count_nonzero(part)) for part in np.array_split(order.streams.source == 0, 4)]
    assert sum(counts) == 32
    assert all(3 <= count <= 13 for count in counts)


def test_a_share_too_small_for_the_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights of 1e-06 to 1.*raise the smallest weight"):
        StreamedOrder([uneven(10), uneven(10)], [1.0, 1e-6], 8, 0, 4)


def test_a_slot_touches_the_blocks_of_its_lane_alone() -> None:
    sizes = uneven(200)
    order = StreamedOrder([sizes], None, 8, 0, 4)
    ends = np.cumsum(sizes)
    lane, batches = order.epoch_size / 8, epoch(order, 1)
    for slot in range(8):
        touched = {int(np.searchsorted(ends, s, side="right")) for s in of_slot(batches, slot)}
        assert len(touched) <= 200 / 8 + 2 + 3 * np.sqrt(200 / 8)
        covered = sizes[sorted(touched)].sum()
        assert lane <= covered <= lane + 2 * sizes.max()
