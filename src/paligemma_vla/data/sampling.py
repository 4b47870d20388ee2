"""Which sample stands at which position of a run.

Position = step * total batch + slot, for the whole run and all processes together. Everything random about a sample (which
one it is, its augmentation, its flow time and noise) is a function of (seed, position), so a run depends on neither the
number of workers nor of processes, and a resume is exact.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Keys = NDArray[np.uint64]
ROUNDS = 6


def derive_seed(seed: int, stream: str, position: int) -> int:
    """A 63-bit seed for one purpose (`stream`) at one position."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position) + stream.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permute(index: Indices, size: int, key: int) -> Indices:
    """A pseudo-random permutation of range(size), evaluated at `index` without holding it in memory."""
    rounds = np.array([derive_seed(key, "round", number) for number in range(ROUNDS)], np.uint64)
    return _walk(index, np.broadcast_to(np.int64(size), index.shape), np.broadcast_to(rounds[:, None], (ROUNDS, len(index))))


def permute_each(index: Indices, sizes: Indices, keys: Keys) -> Indices:
    """As `permute`, with a size and a key for each index."""
    return _walk(index, sizes, mix(keys[None], np.arange(ROUNDS, dtype=np.uint64)[:, None]))


def _walk(index: Indices, sizes: Indices, rounds: Keys) -> Indices:
    """A Feistel network over the next power of four, walked until the value falls into range (Black and Rogaway 2002).

    rounds: (ROUNDS, n) keys.
    """
    half = np.maximum(1, (np.frexp((sizes - 1).astype(np.float64))[1] + 1) // 2).astype(np.uint64)  # of the bits it takes
    value = index.astype(np.uint64)
    outside = np.arange(len(value))
    while len(outside):
        bits = half[outside]
        mask = (np.uint64(1) << bits) - np.uint64(1)
        left, right = value[outside] >> bits, value[outside] & mask
        for round_keys in rounds:
            left, right = right, left ^ (_finalise(right + round_keys[outside]) & mask)
        value[outside] = (left << bits) | right
        outside = outside[value[outside] >= sizes[outside].astype(np.uint64)]
    return value.astype(np.int64)


def mix(keys: Keys, numbers: Keys) -> Keys:
    """A key for each pair of a key and a number."""
    return _finalise(keys + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _finalise(value: Keys) -> Keys:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class SampleRef(NamedTuple):
    """One slot of a batch. `valid` is False for a filler that keeps a process in step and counts for nothing."""

    position: int
    sample: int
    valid: bool = True


class Order(Protocol):
    """The order of a run: what stands at each slot of each batch, as a function of the step alone.

    keeps_slots: samples that are near one another in a file come to the same slot, so each slot is better read by one process.
    """

    batch_size: int
    epoch_size: int
    steps_per_epoch: int
    keeps_slots: bool

    def batch(self, step: int) -> tuple[Indices, Indices]:
        """Positions and sample indices of optimiser step `step` (from 0); the last batch of an epoch may be smaller."""


class SampleOrder:
    """The order of a run over one or several weighted data sets laid end to end.

    sizes: samples per data set. weights: share of each; None: in proportion to size, so an epoch sees every sample once.
    With weights an epoch is as long as the sets together, and each set is gone through in passes of its own.
    """

    keeps_slots = False

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.sizes = np.asarray(sizes, np.int64)
        self.epoch_size = int(self.sizes.sum())
        share = np.asarray(sizes if weights is None else weights, np.float64)
        self.quota = apportion(share / share.sum(), self.epoch_size)
        self.steps_per_epoch = -(-self.epoch_size // batch_size)

    def batch(self, step: int) -> tuple[Indices, Indices]:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.batch_size
        slots = np.arange(min(self.batch_size, self.epoch_size - first), dtype=np.int64)
        place = permute(first + slots, self.epoch_size, derive_seed(self.seed, "epoch", epoch))
        return step * self.batch_size + slots, self._samples(epoch, place)

    def _samples(self, epoch: int, place: Indices) -> Indices:
        ends = np.cumsum(self.quota)
        source = np.searchsorted(ends, place, side="right")
        samples = np.empty_like(place)
        for number in np.unique(source):
            chosen = source == number
            # The how-many-th draw from this set since the run began; each pass over the set has an order of its own.
            draw = epoch * self.quota[number] + place[chosen] - (ends[number] - self.quota[number])
            rounds, rest = np.divmod(draw, self.sizes[number])
            for turn in np.unique(rounds):
                here = rounds == turn
                key = derive_seed(self.seed, f"pass of set {number}", int(turn))
                rest[here] = permute(rest[here], int(self.sizes[number]), key)
            samples[chosen] = rest + self.sizes[:number].sum()
        return samples


def apportion(shares: NDArray[np.float64], total: int) -> Indices:
    """Whole numbers that add up to `total`, by largest remainder."""
    exact = shares * total
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole


def share_out(
    positions: Indices, indices: Indices, parts: int, slots: int | None = None, wanted: slice = slice(None)
) -> list[list[SampleRef]]:
    """Cut one batch into `parts` consecutive slices (processes x accumulation), each with at least one entry.

    slots: cut where a batch of so many would be, so that a slot goes to the same part also when the batch is smaller.
    wanted: which slices to return; of hundreds of processes each needs its own alone.
    """
    slices = []
    for chosen in np.array_split(np.arange(slots or len(positions)), parts)[wanted]:
        refs = [SampleRef(int(positions[i]), int(indices[i])) for i in chosen if i < len(positions)]
        slices.append(refs or [SampleRef(int(positions[0]), int(indices[0]), valid=False)])
    return slices


class RunSampler:
    """Micro-batches of one process for optimiser steps [start, stop): `accumulation` lists of references per step."""

    def __init__(self, order: Order, start: int, stop: int, rank: int, world_size: int, accumulation: int) -> None:
        self.order, self.start, self.stop = order, start, stop
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.accumulation

    @property
    def width(self) -> int:
        """Most samples in a micro-batch."""
        return -(-self.order.batch_size // (self.world_size * self.accumulation))

    def __iter__(self) -> Iterator[list[SampleRef]]:
        slots = self.order.batch_size if self.order.keeps_slots else None
        wanted = slice(self.rank * self.accumulation, (self.rank + 1) * self.accumulation)
        for step in range(self.start, self.stop):
            yield from share_out(*self.order.batch(step), self.world_size * self.accumulation, slots, wanted)


class ValidationSampler:
    """The same `samples` indices every time, spread evenly over a set of `size`; one process takes every world_size-th batch.

    A sample's position is its index, so its flow time and noise never change (D8). Every process has as many batches: with
    shards no one passes through the model alone; a filler counts for nothing.
    """

    def __init__(self, size: int, samples: int, batch_size: int, rank: int, world_size: int) -> None:
        chosen = np.unique(np.linspace(0, size - 1, min(samples, size)).round().astype(np.int64))
        starts = range(0, len(chosen), batch_size)
        batches = [[SampleRef(i, i) for i in chosen[first : first + batch_size].tolist()] for first in starts]
        batches += [[SampleRef(int(chosen[0]), int(chosen[0]), valid=False)]] * (-len(batches) % world_size)
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        return iter(self.batches)
