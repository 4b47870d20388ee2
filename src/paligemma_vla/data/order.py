"""Which sample stands at which position of a run.

Position = step * total batch + slot, for the whole run and all processes together. Everything random about a sample (which
one it is, its augmentation, its flow time and noise) is a function of (seed, position), so a run depends on neither the
number of workers nor of processes, and a resume is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.errors import ConfigError
from paligemma_vla.seeding import Indices, derive_seed, mix, permute, permute_each


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


LONGEST_PERIOD = 1024  # steps after which the shares of weighted sets have come out even
CHUNK = 2**18


@dataclass(frozen=True)
class _Streams:
    """Who draws from which set: a slot serves one set, or, where shares end within it, several in turn.

    Streams are the pairs of slot and set, by slot and then set; each goes through a lane of its own. Of each stream:
    slot, source, count (draws in a period of `period` steps), lane (first coordinate) and length (0 everywhere for a set
    that is too small for lanes). Of each slot: alone (its one stream, or -1 where sets take turns) and row (in the tables).
    Of each row: turn (the stream of each step of the period) and before (its draws earlier in the period), (rows, period).
    """

    period: int
    slot: Indices
    source: Indices
    count: Indices
    lane: Indices
    length: Indices
    alone: Indices
    row: Indices
    turn: Indices
    before: Indices

    def at(self, slots: Indices, clock: Indices) -> tuple[Indices, Indices]:
        """The stream that serves draw `clock` of each slot, and how many draws it has made before."""
        rounds, place = np.divmod(clock, self.period)
        row = self.row[slots]
        shared = row >= 0
        stream = np.where(shared, self.turn[row, place], self.alone[slots])
        return stream, np.where(shared, rounds * self.count[stream] + self.before[row, place], clock)

    def draws(self, source: int, clock: Indices) -> int:
        """How many draws all streams of a set have made when the slots stand at `clock` (B,)."""
        total = 0
        for stream in np.flatnonzero(self.source == source).tolist():
            rounds, place = divmod(int(clock[self.slot[stream]]), self.period)
            row = self.row[self.slot[stream]]
            here = place if row < 0 else int(np.count_nonzero(self.turn[row, :place] == stream))
            total += rounds * int(self.count[stream]) + here
        return total


class StreamedOrder:
    """The order of a run over one or several weighted data sets laid end to end, block by block.

    sets: per data set, the samples in each block. weights: share of each; None: all sets are one, and an epoch is one pass
    over it. With weights an epoch is as long as the sets together, and each set is gone through in passes of its own; over
    any `period` steps with whole batches the shares are the weights, to half a sample.
    window: blocks that a slot mixes at a time. Same face as `SampleOrder`.
    """

    keeps_slots = True

    def __init__(
        self, sets: Sequence[Indices], weights: Sequence[float] | None, batch_size: int, seed: int, window: int
    ) -> None:
        self.batch_size, self.seed, self.window = batch_size, seed, window
        self.blocks = [np.concatenate(sets)] if weights is None else [np.asarray(blocks, np.int64) for blocks in sets]
        self.starts = [np.concatenate([[0], np.cumsum(blocks)]) for blocks in self.blocks]
        self.sizes = np.array([starts[-1] for starts in self.starts], np.int64)
        self.epoch_size = int(self.sizes.sum())
        self.steps_per_epoch = -(-self.epoch_size // batch_size)
        self.period, units = _period([1.0] if weights is None else weights, batch_size)
        self.streams = _assign(units, self.period, self.sizes, batch_size, derive_seed(seed, "slots", 0))
        # Slots pass from one pass to the next at their own moments, so two passes of a set are in use at a time.
        self._line = lru_cache(maxsize=2 * len(self.blocks))(self._lay_out)

    def batch(self, step: int) -> tuple[Indices, Indices]:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        slots = np.arange(min(self.batch_size, self.epoch_size - step_in_epoch * self.batch_size), dtype=np.int64)
        clock = epoch * self._draws_per_epoch() + step_in_epoch
        stream, draw = self.streams.at(slots, clock[: len(slots)])
        source = self.streams.source[stream]
        samples = np.empty_like(slots)
        for number in np.unique(source).tolist():
            chosen = np.flatnonzero(source == number)
            if self.streams.length[stream[chosen[0]]]:
                within = self._in_lanes(number, stream[chosen], draw[chosen])
            else:
                within = self._scattered(number, self.streams.draws(number, clock) + np.arange(len(chosen)))
            samples[chosen] = within + self.sizes[:number].sum()
        return step * self.batch_size + slots, samples

    def _draws_per_epoch(self) -> Indices:
        """Of each slot: slots that the last batch of an epoch has not draw once less (B,)."""
        last = self.epoch_size - (self.steps_per_epoch - 1) * self.batch_size
        return self.steps_per_epoch - (np.arange(self.batch_size) >= last)

    def _in_lanes(self, source: int, stream: Indices, draw: Indices) -> Indices:
        """Samples of a set that some streams take at their `draw`s."""
        turns, steps = np.divmod(draw, self.streams.length[stream])
        samples = np.empty_like(draw)
        for turn in np.unique(turns).tolist():
            here = np.flatnonzero(turns == turn)
            samples[here] = self._on_line(source, turn, stream[here], steps[here])
        return samples

    def _on_line(self, source: int, turn: int, stream: Indices, step: Indices) -> Indices:
        """Samples of one pass over a set, at `step` of each stream's lane."""
        order, bounds = self._line(source, turn)
        first = self.streams.lane[stream]
        stop, place = first + self.streams.length[stream], first + step
        # Windows are whole blocks, so that none is needed in two. Slots begin theirs at different blocks, or all of them
        # would need new ones at the same step.
        shift = self.streams.slot[stream] * self.window // self.batch_size
        window = (np.searchsorted(bounds, place, side="right") - 1 + shift) // self.window
        begin = np.maximum(first, bounds[np.maximum(0, window * self.window - shift)])
        end = np.minimum(stop, bounds[np.minimum(len(order), (window + 1) * self.window - shift)])
        key = np.full(len(stream), derive_seed(self.seed, f"windows of set {source}", turn), np.uint64)
        keys = mix(mix(key, stream.astype(np.uint64)), window.astype(np.uint64))
        place = begin + permute_each(place - begin, end - begin, keys)
        block = np.searchsorted(bounds, place, side="right") - 1
        samples: Indices = self.starts[source][order[block]] + place - bounds[block]
        return samples

    def _lay_out(self, source: int, turn: int) -> tuple[Indices, Indices]:
        """The blocks of a set in the order of a pass (K,), and where each begins on the line, with its end (K + 1,)."""
        sizes, key = self.blocks[source], derive_seed(self.seed, f"blocks of set {source}", turn)
        places = np.arange(len(sizes))
        parts = [permute(places[first : first + CHUNK], len(sizes), key) for first in range(0, len(sizes), CHUNK)]
        order = np.concatenate(parts)
        return order, np.concatenate([[0], np.cumsum(sizes[order])])

    def _scattered(self, source: int, draw: Indices) -> Indices:
        """Samples of a set that has fewer than streams: permuted one by one, whoever draws."""
        turns, samples = np.divmod(draw, self.sizes[source])
        for turn in np.unique(turns).tolist():
            here = turns == turn
            samples[here] = permute(samples[here], int(self.sizes[source]), derive_seed(self.seed, f"set {source}", turn))
        return samples


def _period(weights: Sequence[float], batch_size: int) -> tuple[int, Indices]:
    """Steps after which shares come out even, as closely as `LONGEST_PERIOD` allows, and each set's draws in that time."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    best: tuple[float, int, Indices] | None = None
    for period in range(1, LONGEST_PERIOD + 1):
        units = apportion(shares, batch_size * period)
        error = round(float(np.abs(units / (batch_size * period) - shares).max()), 12)
        if units.min() > 0 and (best is None or error < best[0]):
            best = error, period, units
    if best is None:
        raise ConfigError(
            f"data.train_parquet_files: got weights of {min(weights):g} to {max(weights):g}, expected at least one sample of "
            f"each set in {LONGEST_PERIOD} batches of {batch_size}; raise the smallest weight, or leave that set out"
        )
    return best[1], best[2]


def _split(total: int, counts: Indices) -> Indices:
    """Whole numbers in proportion to `counts` that add up to `total`, by largest remainder; of equals the first have more."""
    whole, rest = np.divmod(counts * total, counts.sum())
    whole[np.argsort(-rest, kind="stable")[: total - whole.sum()]] += 1
    return whole


def _assign(units: Indices, period: int, sizes: Indices, slots: int, key: int) -> _Streams:
    """Lay the draws of a period, `units` per set, over the slots of a batch: a set gets whole slots, and the rest of one.

    Which slots is drawn by `key`, where there is a choice: processes are to have like shares of each set.
    """
    ends = np.cumsum(units)
    places = permute(np.arange(slots), slots, key) if len(units) > 1 else np.arange(slots)
    rows = [
        (slot, source, int(count))
        for slot, place in enumerate(places.tolist())
        for source, count in enumerate(np.diff(np.clip(np.concatenate([[0], ends]), place * period, (place + 1) * period)))
        if count
    ]
    slot, source, count = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    lane, length = np.zeros_like(slot), np.zeros_like(slot)
    for number, size in enumerate(sizes.tolist()):
        here = np.flatnonzero(source == number)
        lengths = _split(size, count[here])
        if lengths.all():
            lane[here], length[here] = np.cumsum(lengths) - lengths, lengths
    alone, row = np.full(slots, -1, np.int64), np.full(slots, -1, np.int64)
    turns: list[Indices] = []
    for number in range(slots):
        here = np.flatnonzero(slot == number)
        if len(here) == 1:
            alone[number] = here[0]
        else:
            row[number] = len(turns)
            turns.append(here[_take_turns(count[here], derive_seed(key, "turns", number))])
    turn = np.array(turns, np.int64).reshape(-1, period) if turns else np.zeros((1, period), np.int64)
    before = np.array([[np.count_nonzero(line[:n] == line[n]) for n in range(period)] for line in turn], np.int64)
    return _Streams(period, slot, source, count, lane, length, alone, row, turn, before)


def _take_turns(counts: Indices, seed: int) -> Indices:
    """A sequence in which number i comes `counts[i]` times, evenly spread from a random phase on."""
    phases = np.random.default_rng(seed).random(len(counts))
    moments = [(np.arange(count) + phase) / count for count, phase in zip(counts, phases, strict=True)]
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(np.concatenate(moments), kind="stable")]
