"""Permutations and seeds, and what validation takes; `contracts/test_orders.py` has the orders of a run."""

from __future__ import annotations

import numpy as np
import pytest

from paligemma_vla.data.order import SampleRef, ValidationSampler
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
