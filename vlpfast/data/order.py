"""The order of an epoch, how it is dealt to ranks, and the counter-based random numbers that order and views are made from.

Nothing here has state: every number is a function of (seed, epoch, index, draw), so any position can be returned to at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# What the draws of one sample are for. CROP and the numbers after it belong to the crop.
SHARD_ORDER, SAMPLE_ORDER, MIRROR, CROP = range(4)

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), in place on uint64; products wrap."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def random_bits(seed: int, epoch: int, index: np.ndarray, draw: int | np.ndarray) -> np.ndarray:
    """64 random bits for each (index, draw): integer arrays that broadcast -> uint64 of their common shape."""
    key = np.array([(seed + _STEP) & _MASK], np.uint64)
    for word in (np.array([epoch], np.uint64), np.asarray(index).astype(np.uint64), np.asarray(draw).astype(np.uint64)):
        key = _mix((_mix(key.copy()) ^ word) + np.uint64(_STEP))
    return key


def uniform(seed: int, epoch: int, index: np.ndarray, draw: int | np.ndarray) -> np.ndarray:
    """As random_bits, but float64 in [0, 1)."""
    return (random_bits(seed, epoch, index, draw) >> np.uint64(11)) * 2.0**-53


def epoch_order(shard_sizes: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """The order of one training epoch, the same on every rank.

    Shards are permuted; samples are permuted within each run of `window` shards, so that reading stays local to `window`
    files and a window of all shards is a full shuffle.

    shard_sizes [S] samples in each shard -> int64 [sum(shard_sizes)], each sample's position once.
    """
    starts = np.cumsum(shard_sizes) - shard_sizes
    shards = np.argsort(random_bits(seed, epoch, np.arange(len(shard_sizes)), SHARD_ORDER), kind="stable")
    order = np.empty(int(shard_sizes.sum()), np.int64)
    filled = 0
    for first in range(0, len(shards), window):
        members = np.concatenate([np.arange(starts[s], starts[s] + shard_sizes[s]) for s in shards[first : first + window]])
        members = members[np.argsort(random_bits(seed, epoch, members, SAMPLE_ORDER), kind="stable")]
        order[filled : filled + len(members)] = members
        filled += len(members)
    return order


def rank_share(order: np.ndarray, rank: int, world_size: int, *, equal: bool) -> np.ndarray:
    """Every `world_size`-th entry, from `rank` on. equal=True leaves out the last few, so that all ranks have as many."""
    share = order[rank::world_size]
    return share[: len(order) // world_size].copy() if equal else share.copy()


class Remainder(NamedTuple):
    """What is left of a sequence 0, 1, 2, ... that was dealt to ranks, whatever their number: the entries from `start` on, less
    what each deal took. In a deal (taken by rank 0, taken by rank 1, ...) rank r of W gets every W-th entry of what was left
    then, from the r-th on, and takes as many of its first ones as stand there."""

    start: int = 0
    deals: Sequence[Sequence[int]] = ()


def gaps(remainder: Remainder, length: int | None = None) -> tuple[np.ndarray, int]:
    """int64 [G] and a number: entries that are left with others behind them taken, and where the untouched part begins.

    length: that of the sequence; None: it has no end.
    """
    entries, start = np.empty(0, np.int64), remainder.start
    for taken in remainder.deals:
        world_size = len(taken)
        more = max(0, world_size * max(taken) - len(entries))
        if length is not None:  # where shares differ in length, the last row of a deal is not full
            more = min(more, length - start)
        entries = np.concatenate([entries, np.arange(start, start + more)])
        start += more
        left = np.ones(len(entries), bool)
        for rank, count in enumerate(taken):
            left[rank : world_size * count : world_size] = False
        entries = entries[left]
    return entries, start


def deal(remainder: Remainder, taken: Sequence[int], length: int | None = None) -> Remainder:
    """What is left after one more deal. Deals that the ranks have all left behind are no longer kept."""
    entries, start = gaps(remainder, length)
    common = min(taken)  # rows of the deal that are wholly taken
    if len(taken) * common < len(entries):
        return Remainder(remainder.start, [*remainder.deals, list(taken)])
    start += len(taken) * common - len(entries)
    return Remainder(start, [[count - common for count in taken]] if max(taken) > common else [])
