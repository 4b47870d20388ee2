"""The streaming pass that computes normalisation statistics from the numeric columns (S1.2)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.actions import ABSOLUTE, ActionTransform
from paligemma_vla.data.faults import FaultError, no_rotation
from paligemma_vla.data.index import EpisodeIndex, ExclusionList, hex_digest
from paligemma_vla.data.reader import iterate_numbers
from paligemma_vla.normalization import Accumulator, DatasetStatistics
from paligemma_vla.schema import ACTION
from paligemma_vla.storage import is_url

Floats = NDArray[np.float32]
BLOCK_ROWS = 65536
STORE_FILES = 16  # read at a time from a store


def compute_statistics(
    parquet_files: str | Sequence[str] | EpisodeIndex,
    where: str,
    progress: Callable[[int], object] | None = None,
    exclude: ExclusionList | None = None,
    actions: ActionTransform = ABSOLUTE,
) -> DatasetStatistics:
    """Exact statistics of every row of every episode, read once, in parallel, touching state and action only.

    progress: called with the number of rows of each finished file. exclude: episodes to leave out (an index has left them
    out already). actions: what the model sees of them; unless they are absolute, statistics are over every step of every
    chunk, as far as it lies within its episode. Raises `DataError` naming file, row and column.
    """
    index = parquet_files
    if not isinstance(index, EpisodeIndex):
        index = EpisodeIndex.build(index, where, exclude)
    return merge_parts(index, actions, [compute_part(index, actions, range(len(index.paths)), progress)])


@dataclass(frozen=True)
class Part:
    """What some files hold. moments: of each, for state and action, without tails. tails: of all of them, for both."""

    moments: dict[int, tuple[Accumulator, Accumulator]]
    tails: tuple[Accumulator, Accumulator]


def compute_part(
    index: EpisodeIndex, actions: ActionTransform, files: Sequence[int], progress: Callable[[int], object] | None = None
) -> Part:
    """Read some files of an index once, in parallel; the rest as `compute_statistics`."""
    part = Part({}, _accumulators(index, actions))
    with ThreadPoolExecutor(STORE_FILES if any(map(is_url, index.paths)) else os.cpu_count()) as pool:
        for file, seen in zip(files, pool.map(partial(_file_statistics, index, actions), files), strict=True):
            state, action = seen
            part.moments[file] = state.without_tails(), action.without_tails()
            for tails, accumulator in zip(part.tails, seen, strict=True):
                tails.merge_tails(accumulator)
            if progress is not None:
                progress(state.count)
    return part


def merge_parts(index: EpisodeIndex, actions: ActionTransform, parts: Iterable[Part]) -> DatasetStatistics:
    """Statistics of an index out of parts that hold each of its files once: the same to the last bit, whatever the parts.

    Moments are merged in the order of files, since a floating-point sum depends on its order.
    """
    state, action = _accumulators(index, actions)
    moments: dict[int, tuple[Accumulator, Accumulator]] = {}
    for part in parts:
        moments.update(part.moments)
        state.merge_tails(part.tails[0])
        action.merge_tails(part.tails[1])
    for file in range(len(index.paths)):
        state.merge(moments[file][0])
        action.merge(moments[file][1])
    digests = tuple(hex_digest(digest) for digest in index.digests.tolist())
    return DatasetStatistics(state.result(), action.result(), index.paths, digests, actions)


def _accumulators(index: EpisodeIndex, actions: ActionTransform) -> tuple[Accumulator, Accumulator]:
    """For state and action."""
    seen = _steps_in_chunks(index.length, actions.horizon) if actions.converts else index.steps
    return Accumulator(index.layout.state_dim, index.steps), Accumulator(index.layout.action_dim, seen)


def _steps_in_chunks(lengths: NDArray[np.int32], horizon: int) -> int:
    """How many (t, k) have k < horizon and t + k within an episode, over all episodes."""
    whole = np.minimum(lengths.astype(np.int64), horizon)
    return int((whole * (lengths - whole) + whole * (whole + 1) // 2).sum())


def _file_statistics(index: EpisodeIndex, actions: ActionTransform, file: int) -> tuple[Accumulator, Accumulator]:
    state, action = _accumulators(index, actions)
    for states, seen in model_numbers(index, file, actions):
        if len(states):
            state.add(states)
            action.add(seen)
    return state, action


def model_numbers(
    index: EpisodeIndex, file: int, actions: ActionTransform, rows: int = BLOCK_ROWS
) -> Iterator[tuple[Floats, Floats]]:
    """Stream (state (R, P), actions as the model sees them (R', A)) of a file's episodes, in real units, `rows` or so at once.

    With absolute actions R' = R; else there is one for every step of the chunk of every row that lies within the episode.
    """
    if not actions.converts:
        yield from iterate_numbers(index, file, rows)
        return
    states: list[Floats] = []
    seen: list[Floats] = []
    for row, state, action in _episodes(index, file):
        per_block = max(1, rows // actions.horizon)
        for first in range(0, len(state), per_block):
            states.append(state[first : first + per_block])
            steps = first + np.arange(len(states[-1]))[:, None] + np.arange(actions.horizon)  # (R, K)
            chunks = actions.encode(action[np.minimum(steps, len(action) - 1)], states[-1])
            for bad in np.flatnonzero(~np.isfinite(chunks).all(axis=(1, 2))):
                raise FaultError(no_rotation().at(index.paths[file], row + first + int(bad), ACTION))
            seen.append(chunks[steps < len(action)])
            if sum(map(len, seen)) >= rows:
                yield np.concatenate(states), np.concatenate(seen)
                states, seen = [], []
    if states:
        yield np.concatenate(states), np.concatenate(seen)


def _episodes(index: EpisodeIndex, file: int) -> Iterator[tuple[int, Floats, Floats]]:
    """First row, states (L, P) and actions (L, A) of each episode of a file, in order."""
    held = index.file == file
    state, action = np.empty((0, index.layout.state_dim), np.float32), np.empty((0, index.layout.action_dim), np.float32)
    numbers = iterate_numbers(index, file)
    for start, length in zip(index.start[held].tolist(), index.length[held].tolist(), strict=True):
        while len(state) < length:
            states, actions = next(numbers)
            state, action = np.concatenate([state, states]), np.concatenate([action, actions])
        yield start, state[:length], action[:length]
        state, action = state[length:], action[length:]
