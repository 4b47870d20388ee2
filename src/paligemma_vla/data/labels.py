"""Which recorded steps are labels: all, or only those of an intervention, where a file says who acted (`data.labels`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.faults import actor_faults, raise_first
from paligemma_vla.data.formats import open_file, read_columns
from paligemma_vla.data.index import REQUESTS, EpisodeIndex, ExclusionList
from paligemma_vla.errors import DataError
from paligemma_vla.storage import is_url

Labels = Literal["all", "interventions"]
Runs = NDArray[np.int64]  # (R, 3): first row, number of rows, and how many of them are no labels
logger = logging.getLogger(__name__)


def build_index(paths: Sequence[str], where: str, exclude: ExclusionList | None, labels: Labels, horizon: int) -> EpisodeIndex:
    """`EpisodeIndex.build`, then `keep_interventions` where `labels` says so. Raises `DataError` when nothing is left."""
    index = EpisodeIndex.build(paths, where, exclude)
    if labels == "all":
        return index
    kept = keep_interventions(index, horizon)
    if len(kept) == 0:
        remedy = "record some, give other data, or set data.labels: all"
        raise DataError(f"{where}: data.labels: interventions: none in {len(index)} episodes of {index.paths[0]}; {remedy}")
    return kept


def keep_interventions(index: EpisodeIndex, horizon: int) -> EpisodeIndex:
    """An index whose episodes are the interventions of recorded ones, each with the steps from which a chunk reaches it.

    A file without the column `actor` keeps its episodes: demonstrations are labels. Of the others each unbroken run of
    interventions becomes an episode. The up to `horizon` - 1 steps of the policy before it belong to it as well, as
    `EpisodeIndex.unlabelled`: an observation there has a label in its chunk. So every sample has at least one.

    Raises `DataError` for an actor that is neither `policy` nor `intervention`.
    """
    files = range(len(index.paths))
    with ThreadPoolExecutor(REQUESTS if any(map(is_url, index.paths)) else os.cpu_count()) as pool:
        parts = list(pool.map(lambda file: _cut_file(index, file, horizon), files))
    runs = np.concatenate(parts)
    file = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    start, length, unlabelled = runs[:, 0], runs[:, 1].astype(np.int32), runs[:, 2].astype(np.int32)
    logger.info("data.labels: interventions: %d of %d steps are labels", int((length - unlabelled).sum()), index.steps)
    return replace(index, file=file, start=start, length=length, unlabelled=unlabelled)


def _cut_file(index: EpisodeIndex, file: int, horizon: int) -> Runs:
    """The runs of one file."""
    own = index.file == file
    starts, lengths = index.start[own], index.length[own].astype(np.int64)
    with open_file(index.paths[file]) as source:
        if schema.ACTOR not in source.columns:
            return np.stack([starts, lengths, np.zeros_like(lengths)], axis=1)
        column = read_columns(source, [schema.ACTOR])[schema.ACTOR]
    inside = np.flatnonzero(index.has_rows(file, np.arange(len(column))))
    raise_first(actor_faults(index.paths[file], column.take(pa.array(inside)), inside))
    acted = pc.equal(column, schema.INTERVENTION).fill_null(False).to_numpy()
    episodes = zip(starts.tolist(), lengths.tolist(), strict=True)
    runs = [run for start, length in episodes for run in find_runs(acted[start : start + length], start, horizon)]
    return np.array(runs, np.int64).reshape(-1, 3)


def find_runs(acted: NDArray[np.bool_], start: int, horizon: int) -> list[tuple[int, int, int]]:
    """The interventions of one episode that begins at row `start`: see `Runs`. acted: which of its steps are such (L,)."""
    edges = np.flatnonzero(np.diff(acted, prepend=False, append=False)).tolist()
    runs, before = [], 0
    for first, stop in zip(edges[::2], edges[1::2], strict=True):
        lead = min(horizon - 1, first - before)
        runs.append((start + first - lead, stop - first + lead, lead))
        before = stop
    return runs
