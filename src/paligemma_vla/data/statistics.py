"""The streaming pass that computes normalisation statistics from the numeric columns (S1.2)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from paligemma_vla.data.episodes import EpisodeIndex, Layout
from paligemma_vla.data.reader import iterate_numbers
from paligemma_vla.normalization import Accumulator, DatasetStatistics


def compute_statistics(
    parquet_files: str | Sequence[str], where: str, progress: Callable[[int], object] | None = None
) -> DatasetStatistics:
    """Exact statistics of every row of some files, read once, in parallel, touching state and action only.

    progress: called with the number of rows of each finished file. Raises `DataError` naming file, row and column.
    """
    index = EpisodeIndex.build(parquet_files, where)
    total = int(sum(groups[-1] for groups in index.groups))
    layout = index.layout
    state, action = Accumulator(layout.state_dim, total), Accumulator(layout.action_dim, total)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # map keeps the files' order, so the floating-point result does not depend on timing
        for part_state, part_action in pool.map(lambda path: _file_statistics(path, layout, total), index.paths):
            state.merge(part_state)
            action.merge(part_action)
            if progress is not None:
                progress(part_state.count)
    return DatasetStatistics(state.result(), action.result(), index.paths)


def _file_statistics(path: str, layout: Layout, total: int) -> tuple[Accumulator, Accumulator]:
    state, action = Accumulator(layout.state_dim, total), Accumulator(layout.action_dim, total)
    for states, actions in iterate_numbers(path, layout):
        state.add(states)
        action.add(actions)
    return state, action
