"""The streaming pass that computes normalisation statistics from the numeric columns (S1.2)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from paligemma_vla.data.episodes import EpisodeIndex
from paligemma_vla.data.exclusions import ExclusionList, hex_digest
from paligemma_vla.data.reader import iterate_numbers
from paligemma_vla.normalization import Accumulator, DatasetStatistics


def compute_statistics(
    parquet_files: str | Sequence[str] | EpisodeIndex,
    where: str,
    progress: Callable[[int], object] | None = None,
    exclude: ExclusionList | None = None,
) -> DatasetStatistics:
    """Exact statistics of every row of every episode, read once, in parallel, touching state and action only.

    progress: called with the number of rows of each finished file. exclude: episodes to leave out (an index has left them
    out already). Raises `DataError` naming file, row and column.
    """
    index = parquet_files
    if not isinstance(index, EpisodeIndex):
        index = EpisodeIndex.build(index, where, exclude)
    state, action = _accumulators(index)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # map keeps the files' order, so the floating-point result does not depend on timing
        for part_state, part_action in pool.map(partial(_file_statistics, index), range(len(index.paths))):
            state.merge(part_state)
            action.merge(part_action)
            if progress is not None:
                progress(part_state.count)
    digests = tuple(hex_digest(digest) for digest in index.digests.tolist())
    return DatasetStatistics(state.result(), action.result(), index.paths, digests)


def _accumulators(index: EpisodeIndex) -> tuple[Accumulator, Accumulator]:
    """For state and action."""
    return Accumulator(index.layout.state_dim, index.steps), Accumulator(index.layout.action_dim, index.steps)


def _file_statistics(index: EpisodeIndex, file: int) -> tuple[Accumulator, Accumulator]:
    state, action = _accumulators(index)
    for states, actions in iterate_numbers(index, file):
        if len(states):
            state.add(states)
            action.add(actions)
    return state, action
