"""Random numbers as functions of (seed, position), and permutations that are evaluated one index at a time.

Nothing here keeps a state: that is what makes a resume exact, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Keys = NDArray[np.uint64]
ROUNDS = 6


def derive_seed(seed: int, stream: str, position: int) -> int:
    """A 63-bit seed for one purpose (`stream`) at one position of the run."""
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
    half = np.maximum(1, (np.frexp((sizes - 1).astype(np.float64))[1] + 1) // 2).astype(np.uint64)  # of the bits of an index
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
