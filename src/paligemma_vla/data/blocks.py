"""Blocks: runs of consecutive whole episodes of one file, which are read by one request."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paligemma_vla.data.episodes import EpisodeIndex

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Of K blocks, in the order of the index.

    episodes: number of each block's first episode, and the number of episodes (K + 1,). samples: its first sample, and the
    number of samples (K + 1,). nbytes: about what reading it takes, whole row groups of the file that is (K,).
    """

    episodes: Numbers
    samples: Numbers
    nbytes: Numbers

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def sizes(self) -> Numbers:
        """Samples in each block (K,)."""
        return np.diff(self.samples)

    def of_samples(self, samples: Numbers) -> Numbers:
        """The blocks that hold some samples."""
        blocks: Numbers = np.searchsorted(self.samples, samples, side="right") - 1
        return blocks

    def of_episode(self, episode: int) -> int:
        """The block that holds an episode."""
        return int(np.searchsorted(self.episodes, episode, side="right")) - 1


def cut_blocks(index: EpisodeIndex, block_bytes: float) -> Blocks:
    """Cut the episodes of an index where each file passes a multiple of about `block_bytes`.

    A file is taken to be equally dense, so the cuts follow from sizes of files and rows of episodes, which the index has. An
    episode belongs to where it begins: episodes longer than a block are blocks of their own.
    """
    rows = index.groups[index.group_offsets[1:] - 1]
    size = index.stamps[:, 0]
    pieces = np.maximum(1, np.round(size / block_bytes)).astype(np.int64)
    piece = index.start * pieces[index.file] // rows[index.file]
    begins = np.ones(len(index), bool)
    begins[1:] = (np.diff(index.file) != 0) | (np.diff(piece) != 0)
    first = np.flatnonzero(begins)
    episodes = np.append(first, len(index))
    steps = np.concatenate([[0], np.cumsum(index.length, dtype=np.int64)])
    return Blocks(episodes, steps[episodes], _bytes_to_read(index, episodes, rows, size))


def _bytes_to_read(index: EpisodeIndex, episodes: Numbers, rows: Numbers, size: Numbers) -> Numbers:
    """Row groups that hold a row of a block, in bytes of a file that is equally dense."""
    first, last = episodes[:-1], episodes[1:] - 1
    file = index.file[first]
    before = np.concatenate([[0], np.cumsum(rows)])  # rows of the files before, so that one search serves all files
    groups = index.groups + np.repeat(before[:-1], np.diff(index.group_offsets))
    begin = np.searchsorted(groups, before[file] + index.start[first], side="right") - 1
    end = np.searchsorted(groups, before[file] + index.start[last] + index.length[last] - 1, side="right")
    nbytes: Numbers = np.ceil((groups[end] - groups[begin]) * (size / rows)[file]).astype(np.int64)
    return nbytes


def pool_bytes(blocks: Blocks, streams: int, window: int, ahead: int) -> int:
    """Memory for the blocks of so many streams (a slot that draws from a set) that are read `ahead` steps before their need.

    Of each stream a window of blocks, another one, and what it takes in those steps, twice: blocks leave the pool when they
    were not asked for longest, so what it has done with leaves only after what it has been promised. And room for a stream
    to be in two windows, with a block of any size.
    """
    each = window + 1 + 2 * ahead * len(blocks) / blocks.samples[-1]
    return int(blocks.nbytes.mean() * (streams * each + window) + blocks.nbytes.max())
