"""The order of a run: a permutation per epoch, shares as asked for, and the same whoever takes part."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from paligemma_vla.data.order import RunSampler, SampleOrder, SampleRef, ValidationSampler, share_out
from paligemma_vla.seeding import derive_seed, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025, 5000])
def test_permute_is_a_permutation(size: int) -> None:
    for key in range(3):
        got = permute(np.arange(size), size, key)
        assert sorted(got.tolist()) == list(range(size))


def test_permute_depends_on_its_key_and_mixes() -> None:
    size = 2000
    first, second = (permute(np.arange(size), size, key) for key in (1, 2))
    assert (first == second).mean() < 0.01
    for shuffled in (first, second):
        assert abs(np.corrcoef(shuffled, np.arange(size))[0, 1]) < 0.1
        assert abs(np.corrcoef(shuffled[1:], shuffled[:-1])[0, 1]) < 0.1  # neighbours do not stay neighbours


def test_permute_evaluates_single_indices() -> None:
    whole = permute(np.arange(50), 50, 7)
    assert [int(permute(np.array([i]), 50, 7)[0]) for i in range(50)] == whole.tolist()


def test_derive_seed_differs_by_seed_stream_and_position_and_never_changes() -> None:
    seeds = {derive_seed(s, name, p) for s in range(10) for name in ("a", "b") for p in range(100)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "training flow", 0) == derive_seed(0, "training flow", 0)


def epoch_samples(order: SampleOrder, epoch: int) -> list[int]:
    first = epoch * order.steps_per_epoch
    return [int(i) for step in range(first, first + order.steps_per_epoch) for i in order.batch(step)[1]]


@pytest.mark.parametrize(("sizes", "batch"), [([53], 8), ([53], 53), ([53], 64), ([10, 43, 1], 7), ([8], 1)])
def test_order_without_weights_sees_every_sample_once_per_epoch(sizes: list[int], batch: int) -> None:
    order = SampleOrder(sizes, None, batch, seed=3)
    assert order.steps_per_epoch == -(-sum(sizes) // batch)
    epochs = [epoch_samples(order, epoch) for epoch in range(3)]
    for samples in epochs:
        assert sorted(samples) == list(range(sum(sizes)))
    if sum(sizes) > 10:
        assert epochs[0] != epochs[1] != epochs[2]


def test_order_positions_are_step_times_batch_plus_slot() -> None:
    order = SampleOrder([53], None, 8, seed=0)
    for step in (0, 5, 6, 7, 100):
        positions, samples = order.batch(step)
        last = step % order.steps_per_epoch == order.steps_per_epoch - 1
        assert positions.tolist() == [step * 8 + slot for slot in range(53 % 8 if last else 8)]
        assert len(samples) == len(positions)


def test_order_depends_on_the_seed_alone() -> None:
    assert epoch_samples(SampleOrder([53], None, 8, 1), 1) == epoch_samples(SampleOrder([53], None, 8, 1), 1)
    assert epoch_samples(SampleOrder([53], None, 8, 1), 1) != epoch_samples(SampleOrder([53], None, 8, 2), 1)


def test_order_weights_give_the_shares_and_go_through_each_set_evenly() -> None:
    sizes, weights = [10, 90, 40], [3.0, 1.0, 1.0]
    order = SampleOrder(sizes, weights, 16, seed=0)
    epochs = 5
    counts: Counter[int] = Counter()
    for epoch in range(epochs):
        samples = epoch_samples(order, epoch)
        assert len(samples) == 140
        per_set = [sum(first <= s < first + size for s in samples) for first, size in ((0, 10), (10, 90), (100, 40))]
        assert per_set == [84, 28, 28]
        counts.update(samples)
    for first, size in ((0, 10), (10, 90), (100, 40)):
        times = [counts[sample] for sample in range(first, first + size)]
        assert max(times) - min(times) <= 1  # passes of its own: no sample is drawn again before all others were


@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
def test_order_mixes_its_sets_anew_in_every_epoch(weights: list[float] | None) -> None:
    order = SampleOrder([60, 60], weights, 16, seed=0)
    pattern = [[sample < 60 for sample in epoch_samples(order, epoch)] for epoch in range(2)]
    assert pattern[0] != pattern[1]
    for epoch in pattern:
        switches = sum(a != b for a, b in itertools.pairwise(epoch))
        assert switches > 30  # not one set after the other


def test_order_weights_that_do_not_divide_evenly_still_fill_the_epoch() -> None:
    order = SampleOrder([3, 5, 9], [1.0, 1.0, 1.0], 4, seed=0)
    assert order.quota.sum() == order.epoch_size == 17
    assert max(order.quota) - min(order.quota) <= 1
    assert len(epoch_samples(order, 0)) == 17


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_share_out_cuts_in_order_and_leaves_nobody_without(parts: int, size: int) -> None:
    positions, samples = np.arange(100, 100 + size), np.arange(size)[::-1].copy()
    slices = share_out(positions, samples, parts)
    assert len(slices) == parts
    assert all(slices)
    valid = [ref for part in slices for ref in part if ref.valid]
    assert valid == [SampleRef(int(p), int(s)) for p, s in zip(positions, samples, strict=True)]
    assert sum(not ref.valid for part in slices for ref in part) == max(0, parts - size)
    lengths = [sum(ref.valid for ref in part) for part in slices]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_run_is_the_same_for_any_number_of_processes_and_accumulation(world: int, accumulation: int) -> None:
    order = SampleOrder([53], None, 8, seed=0)
    samplers = [RunSampler(order, 2, 16, rank, world, accumulation) for rank in range(world)]
    streams = [list(sampler) for sampler in samplers]
    assert all(len(stream) == len(sampler) == 14 * accumulation for stream, sampler in zip(streams, samplers, strict=True))
    for number, step in enumerate(range(2, 16)):
        together = [
            ref
            for stream in streams
            for micro in stream[number * accumulation : (number + 1) * accumulation]
            for ref in micro
            if ref.valid
        ]
        assert together == [SampleRef(int(p), int(s)) for p, s in zip(*order.batch(step), strict=True)]


@pytest.mark.parametrize(("size", "samples"), [(100, 2048), (1000, 37), (5, 5), (1, 10)])
def test_validation_takes_the_same_spread_whatever_the_processes(size: int, samples: int) -> None:
    def taken(world: int) -> list[SampleRef]:
        return sorted(
            ref
            for rank in range(world)
            for batch in ValidationSampler(size, samples, 8, rank, world)
            for ref in batch
            if ref.valid
        )

    one = taken(1)
    assert one == taken(2) == taken(3)
    assert len(one) == min(size, samples)
    assert all(ref.position == ref.sample and ref.valid for ref in one)
    assert (one[0].sample, one[-1].sample) == (0, size - 1) or size == 1
    gaps = np.diff([ref.sample for ref in one])
    assert len(gaps) == 0 or max(gaps) - min(gaps) <= 1


def test_validation_batches_are_shared_out_without_overlap() -> None:
    parts = [list(ValidationSampler(50, 50, 8, rank, 2)) for rank in range(2)]
    assert [len(part) for part in parts] == [4, 4]  # seven batches: the last is a filler, so that no one passes alone
    assert [ref.valid for ref in parts[1][-1]] == [False]
    assert sorted(ref.sample for part in parts for batch in part for ref in batch if ref.valid) == list(range(50))
