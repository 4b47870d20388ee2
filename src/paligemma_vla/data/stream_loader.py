"""Micro-batches of a streamed run: each slot is read by the same process from beginning to end, and blocks come ahead of need.

Torch hands one piece of work after the other to its workers in turn. So each micro-batch is cut into as many parts as there
are workers, always between the same slots, and put together again in the training process: bit for bit what one process
alone would have made of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from paligemma_vla.config import VLAConfig
from paligemma_vla.data.block_reader import BlockReader
from paligemma_vla.data.blocks import Blocks
from paligemma_vla.data.loader import Batch, Collator, Item, VLADataset, batches, build_loader, stack
from paligemma_vla.data.loader_processes import start_loader
from paligemma_vla.data.sampling import RunSampler, SampleRef
from paligemma_vla.errors import VLAError

AHEAD = 16  # optimiser steps


class Part(NamedTuple):
    """Work for one worker: its slots of a micro-batch (none, perhaps, of a small last one), and the blocks it is to read ahead
    for those that follow, the soonest first."""

    refs: list[SampleRef]
    ahead: list[int]


class PartSampler:
    """The micro-batches of a `RunSampler`, each as `parts` parts in the order of its slots."""

    def __init__(self, run: RunSampler, parts: int, blocks: Blocks) -> None:
        self.run, self.parts, self.blocks = run, parts, blocks

    def __len__(self) -> int:
        return len(self.run) * self.parts

    def __iter__(self) -> Iterator[Part]:
        bounds = [0, *np.cumsum([len(slots) for slots in np.array_split(np.arange(self.run.width), self.parts)]).tolist()]
        cut = ([refs[first:stop] for first, stop in pairwise(bounds)] for refs in self.run)
        coming = deque(islice(cut, AHEAD * self.run.accumulation))
        ahead = [[block for micro in coming for block in self._blocks(micro[number])] for number in range(self.parts)]
        while coming:
            now = coming.popleft()
            if following := next(cut, None):
                coming.append(following)
                ahead = [known + self._blocks(refs) for known, refs in zip(ahead, following, strict=True)]
            yield from map(Part, now, ahead)
            ahead = [[] for _ in range(self.parts)]

    def _blocks(self, refs: list[SampleRef]) -> list[int]:
        blocks: list[int] = np.unique(self.blocks.of_samples(np.array([ref.sample for ref in refs], np.int64))).tolist()
        return blocks


class _Parts(Dataset[Any]):
    """A data set as `Part`s."""

    def __init__(self, dataset: VLADataset, reader: BlockReader) -> None:
        self.dataset, self.reader = dataset, reader

    def __getitems__(self, part: Part) -> list[Item] | VLAError:
        self.reader.prefetch(part.ahead)
        return self.dataset.__getitems__(part.refs)


class StreamLoader:
    """Whole micro-batches out of the parts that workers make; iterate it through `batches`, as any loader."""

    def __init__(
        self, dataset: VLADataset, reader: BlockReader, sampler: RunSampler, config: VLAConfig, pin_memory: bool
    ) -> None:
        self.reader, self.parts = reader, max(1, config.data.num_workers)
        self.pin_memory = pin_memory and config.data.pin_memory
        self.collator = Collator(dataset.preprocessor.prompts)
        parts = PartSampler(sampler, self.parts, reader.blocks)
        self.loader: DataLoader[Any] = start_loader(_Parts(dataset, reader), parts, config, _stack_part, pin_memory=False)

    def __iter__(self) -> Iterator[Batch | VLAError]:
        stream = iter(self.loader)
        try:
            while pieces := list(islice(stream, self.parts)):
                yield self._together(pieces)
        finally:
            self.reader.close()

    def _together(self, pieces: list[Batch | VLAError | None]) -> Batch | VLAError:
        parts: list[Batch] = []
        for piece in pieces:
            if isinstance(piece, VLAError):
                return piece
            if piece is not None:
                parts.append(piece)
        batch: Batch = {}
        for key, value in parts[0].items():
            values = [part[key] for part in parts]
            batch[key] = torch.cat(values) if isinstance(value, torch.Tensor) else list(chain.from_iterable(values))
        batch = self.collator.lay_out(batch)
        if self.pin_memory:
            return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        return batch


def run_batches(dataset: VLADataset, sampler: RunSampler, config: VLAConfig, pin_memory: bool) -> Iterator[Batch]:
    """Micro-batches of a run, in the way that its data is read."""
    if isinstance(dataset.reader, BlockReader):
        return batches(StreamLoader(dataset, dataset.reader, sampler, config, pin_memory))
    return batches(build_loader(dataset, sampler, config, pin_memory))


def _stack_part(items: list[Item] | VLAError) -> Batch | VLAError | None:
    return items if isinstance(items, VLAError) else stack(items) if items else None
