"""Which sample stands at which position of a run.

Position = step * total batch + slot, for the whole run and all processes together. Everything random about a sample (which
one it is, its augmentation, its flow time and noise) is a function of (seed, position), so a run depends on neither the
number of workers nor of processes, and a resume is exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.seeding import Indices, derive_seed, mix, permute, permute_each


class SampleRef(NamedTuple):
    """One slot of a batch. `valid` is False for a filler that keeps a process in step and counts for nothing."""

    position: int
    sample: int
    valid: bool = True


class Order(ABC):
    """The order of a run over one or several weighted data sets laid end to end, as a function of the step alone.

    sizes: samples per data set. weights: share of each; None: in proportion to size, so an epoch sees every sample once.
    With weights an epoch is as long as the sets together; its shares are the weights, and each set is gone through in passes
    of its own: no sample comes again before all others of its set.
    keeps_slots: neighbours in a file come to the same slot, so each slot is better read by one process. version: stored with
    a checkpoint where the order has changed since older ones.
    """

    keeps_slots = False
    version: str | None = None

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.sizes = np.asarray(sizes, np.int64)
        self.epoch_size = int(self.sizes.sum())
        self.steps_per_epoch = -(-self.epoch_size // batch_size)
        share = np.asarray(sizes if weights is None else weights, np.float64)
        self.quota = apportion(share / share.sum(), self.epoch_size)  # samples of each set in an epoch

    def batch(self, step: int) -> tuple[Indices, Indices]:
        """Positions and sample indices of optimiser step `step` (from 0); the last batch of an epoch may be smaller."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        slots = np.arange(min(self.batch_size, self.epoch_size - step_in_epoch * self.batch_size), dtype=np.int64)
        return step * self.batch_size + slots, self._samples(epoch, step_in_epoch, slots)

    @abstractmethod
    def _samples(self, epoch: int, step: int, slots: Indices) -> Indices:
        """The samples at some slots of a step of an epoch."""


class SampleOrder(Order):
    """Samples in random order, one by one."""

    def _samples(self, epoch: int, step: int, slots: Indices) -> Indices:
        ranks = permute(step * self.batch_size + slots, self.epoch_size, derive_seed(self.seed, "epoch", epoch))
        ends = np.cumsum(self.quota)
        source = np.searchsorted(ends, ranks, side="right")
        samples = np.empty_like(ranks)
        for number in np.unique(source):
            chosen = source == number
            # The how-many-th draw from this set since the run began; each pass over the set has an order of its own.
            draw = epoch * self.quota[number] + ranks[chosen] - (ends[number] - self.quota[number])
            passes, rest = np.divmod(draw, self.sizes[number])
            for turn in np.unique(passes):
                here = passes == turn
                key = derive_seed(self.seed, f"pass of set {number}", int(turn))
                rest[here] = permute(rest[here], int(self.sizes[number]), key)
            samples[chosen] = rest + self.sizes[:number].sum()
        return samples


class StreamedOrder(Order):
    """Samples in an order that reads the data block by block.

    For each epoch the blocks are permuted and laid on a line, those of a set as often as its weight asks for. The line is cut
    into lanes, one for each slot of the batch. A slot goes along its lane through windows of a few blocks, each of them
    shuffled. So a batch holds samples from as many blocks as it has slots, and whoever reads a slot needs few blocks at a
    time. Where a slot stands at a step is computed, not counted: a run goes on from any step.

    blocks: per data set, the samples in each block. window: blocks that a slot mixes at a time.
    """

    keeps_slots = True

    def __init__(
        self, blocks: Sequence[Indices], weights: Sequence[float] | None, batch_size: int, seed: int, window: int
    ) -> None:
        self.blocks = [np.concatenate(blocks)] if weights is None else [np.asarray(sizes, np.int64) for sizes in blocks]
        super().__init__([int(sizes.sum()) for sizes in self.blocks], weights, batch_size, seed)
        self.window = window
        self.version = None if weights is None else "streamed by weight, 2"
        self._line = lru_cache(maxsize=2)(self._lay_out)  # reading ahead looks into the next epoch

    def _samples(self, epoch: int, step: int, slots: Indices) -> Indices:
        pieces, bounds = self._line(epoch)
        length, longer = divmod(self.epoch_size, self.batch_size)
        first = slots * length + np.minimum(slots, longer)
        stop, place = first + length + (slots < longer), first + step
        # Windows are whole blocks, so that none is needed in two. Slots begin theirs at different blocks, or all of them
        # would need new ones at the same step.
        shift = slots * self.window // self.batch_size
        window = (np.searchsorted(bounds, place, side="right") - 1 + shift) // self.window
        begin = np.maximum(first, bounds[np.maximum(0, window * self.window - shift)])
        end = np.minimum(stop, bounds[np.minimum(len(pieces), (window + 1) * self.window - shift)])
        key = np.full(len(slots), derive_seed(self.seed, "windows of set 0", epoch), np.uint64)
        keys = mix(mix(key, slots.astype(np.uint64)), window.astype(np.uint64))
        place = begin + permute_each(place - begin, end - begin, keys)
        piece = np.searchsorted(bounds, place, side="right") - 1
        samples: Indices = pieces[piece] + place - bounds[piece]
        return samples

    def _lay_out(self, epoch: int) -> tuple[Indices, Indices]:
        """First samples of the blocks of an epoch in their order (M,), and where each begins on the line, with its end."""
        parts = [self._draw(source, epoch) for source in range(len(self.blocks))]
        first, size = (np.concatenate(column) for column in zip(*parts, strict=True))
        if len(parts) > 1:
            mixed = permute(np.arange(len(first)), len(first), derive_seed(self.seed, "line", epoch))
            first, size = first[mixed], size[mixed]
        return first, np.concatenate([[0], np.cumsum(size)])

    def _draw(self, source: int, epoch: int) -> tuple[Indices, Indices]:
        """First sample and size of the blocks that an epoch takes of a set: the next of its endless row of passes.

        Where an epoch ends within a block, the next one has the rest of it.
        """
        blocks, total, quota = self.blocks[source], int(self.sizes[source]), int(self.quota[source])
        begin, end = epoch * quota, (epoch + 1) * quota
        passes = range(begin // total, -(-end // total))
        keys = [derive_seed(self.seed, f"blocks of set {source}", number) for number in passes]
        order = np.concatenate([np.empty(0, np.int64), *(permute(np.arange(len(blocks)), len(blocks), key) for key in keys)])
        stops = passes.start * total + np.cumsum(blocks[order])
        starts = stops - blocks[order]
        first, size = np.maximum(starts, begin), np.minimum(stops, end) - np.maximum(starts, begin)
        samples = self.sizes[:source].sum() + (np.cumsum(blocks) - blocks)[order] + first - starts
        return samples[size > 0], size[size > 0]


def apportion(shares: NDArray[np.float64], total: int) -> Indices:
    """Whole numbers that add up to `total`, by largest remainder."""
    exact = shares * total
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole


class RunSampler:
    """Micro-batches of one process for optimiser steps [start, stop): `accumulation` lists of references per step.

    A batch is cut into consecutive slices, one for each process and micro-batch; one that has no sample gets a filler. Where
    slots are kept, they are cut as in a whole batch, so that a slot goes to the same process also when a batch is smaller.
    """

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
        parts = self.world_size * self.accumulation
        own = slice(self.rank * self.accumulation, (self.rank + 1) * self.accumulation)
        for step in range(self.start, self.stop):
            positions, samples = self.order.batch(step)
            slots = self.order.batch_size if self.order.keeps_slots else len(positions)
            for chosen in np.array_split(np.arange(slots), parts)[own]:
                refs = [SampleRef(int(positions[slot]), int(samples[slot])) for slot in chosen if slot < len(positions)]
                yield refs or [SampleRef(int(positions[0]), int(samples[0]), valid=False)]


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
