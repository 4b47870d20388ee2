"""What every order of a run promises: coverage, shares, the same for any number of processes, and any step on its own."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from paligemma_vla.data.order import Order, RunSampler, SampleOrder, SampleRef, StreamedOrder

SETS = [[20, 3, 17, 40, 11, 9], [5, 4, 6, 8], [7, 7]]  # samples in each block of three data sets
SIZES = [sum(sizes) for sizes in SETS]
WEIGHTS = [1.0, 3.0, 0.5]  # of the small set a multiple of its size, of the large one a part
Make = Callable[[list[list[int]], list[float] | None, int, int], Order]


def random_order(sets: list[list[int]], weights: list[float] | None, batch: int, seed: int) -> Order:
    return SampleOrder([sum(sizes) for sizes in sets], weights, batch, seed)


def streamed_order(sets: list[list[int]], weights: list[float] | None, batch: int, seed: int) -> Order:
    return StreamedOrder([np.array(sizes) for sizes in sets], weights, batch, seed, window=3)


@pytest.fixture(params=[random_order, streamed_order])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param  # type: ignore[no-any-return]


def samples_of(order: Order, epoch: int) -> list[int]:
    first = epoch * order.steps_per_epoch
    return [int(sample) for step in range(first, first + order.steps_per_epoch) for sample in order.batch(step)[1]]


@pytest.mark.parametrize(
    ("sets", "batch"), [([[53]], 8), ([[10, 20, 23]], 53), ([[10, 20, 23]], 64), ([[10], [43, 1]], 7), ([[8]], 1), (SETS, 16)]
)
def test_every_sample_comes_once_per_epoch_each_in_another_order(make: Make, sets: list[list[int]], batch: int) -> None:
    total = sum(map(sum, sets))
    order = make(sets, None, batch, 3)
    assert (order.epoch_size, order.steps_per_epoch) == (total, -(-total // batch))
    epochs = [samples_of(order, epoch) for epoch in range(3)]
    assert all(sorted(samples) == list(range(total)) for samples in epochs)
    assert total <= max(10, batch) or epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("batch", [4, 7, 16])
def test_weights_are_the_shares_of_every_epoch_and_each_set_is_gone_through_evenly(
    make: Make, weights: list[float] | None, batch: int
) -> None:
    order, wanted = make(SETS, weights, batch, 0), np.array(weights or SIZES)
    ends = np.cumsum(SIZES)
    times: Counter[int] = Counter()
    for epoch in range(5):
        samples = samples_of(order, epoch)
        times.update(samples)
        shares = np.bincount(np.searchsorted(ends, samples, side="right"), minlength=3)
        assert len(samples) == order.epoch_size == sum(SIZES)
        assert np.abs(shares - wanted / wanted.sum() * len(samples)).max() < 1
        assert sum(a < ends[0] <= b for a, b in itertools.pairwise(samples)) > 10  # not one set after the other
    for stop, size in zip(ends.tolist(), SIZES, strict=True):
        counts = [times[sample] for sample in range(stop - size, stop)]
        assert max(counts) - min(counts) <= 1  # no sample comes again before all others of its set


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_run_goes_on_at_any_step_and_depends_on_the_seed_alone(make: Make, weights: list[float] | None) -> None:
    order = make(SETS, weights, 6, 5)
    run = [order.batch(step) for step in range(4 * order.steps_per_epoch)]
    for step in (len(run) - 1, 17, 60, 0):
        positions, samples = make(SETS, weights, 6, 5).batch(step)
        assert positions.tolist() == run[step][0].tolist() == [step * 6 + slot for slot in range(len(samples))]
        assert samples.tolist() == run[step][1].tolist()
    other = make(SETS, weights, 6, 6)
    assert [other.batch(step)[1].tolist() for step in range(9)] != [samples.tolist() for _, samples in run[:9]]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 2), (3, 1), (8, 1)])
def test_a_run_is_the_same_for_any_number_of_processes(
    make: Make, weights: list[float] | None, world: int, accumulation: int
) -> None:
    order = make(SETS, weights, 8, 0)
    steps = range(2, 2 * order.steps_per_epoch + 3)  # with the smaller last batch of two epochs
    samplers = [RunSampler(order, steps.start, steps.stop, rank, world, accumulation) for rank in range(world)]
    streams = [list(sampler) for sampler in samplers]
    slots = np.array_split(np.arange(8), world * accumulation)
    for number, step in enumerate(steps):
        parts = [micro for stream in streams for micro in stream[number * accumulation : (number + 1) * accumulation]]
        assert all(parts)  # a filler for a process that has nothing else
        together = [ref for micro in parts for ref in micro if ref.valid]
        assert together == [SampleRef(int(p), int(s)) for p, s in zip(*order.batch(step), strict=True)]
        if order.keeps_slots:
            for micro, own in zip(parts, slots, strict=True):
                assert {ref.position - step * 8 for ref in micro if ref.valid} <= set(own.tolist())
    for sampler, stream in zip(samplers, streams, strict=True):
        assert len(sampler) == len(stream) == len(steps) * accumulation
        assert max(map(len, stream)) <= sampler.width
