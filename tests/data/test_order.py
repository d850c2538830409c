from itertools import pairwise

import numpy as np
import pytest

from vlpfast.data.order import Remainder, deal, epoch_order, gaps, random_bits, rank_share, uniform

SIZES = np.array([7, 1, 12, 5, 9, 3, 8])
N = int(SIZES.sum())


def splitmix64(x: int) -> int:
    """The published finaliser in plain integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_random_bits_match_plain_integers():
    step = 0x9E3779B97F4A7C15
    for seed, epoch, index, draw in [(0, 0, 0, 0), (3, 1, 10**9, 42), (2**63 + 5, 7, 123, 3), (2**64 - 1, 0, 1, 1)]:
        key = (seed + step) % 2**64
        for word in (epoch, index, draw):
            key = splitmix64(((splitmix64(key) ^ word) + step) % 2**64)
        assert random_bits(seed, epoch, np.array([index]), draw).tolist() == [key]


def test_uniform_is_uniform_and_every_counter_matters():
    index = np.arange(20_000)
    draws = {(seed, epoch, draw): uniform(seed, epoch, index, draw) for seed in (0, 1) for epoch in (0, 1) for draw in (0, 1)}
    for values in draws.values():
        assert values.min() >= 0 and values.max() < 1
        histogram = np.histogram(values, 20, (0, 1))[0]
        assert ((histogram - 1000) ** 2 / 1000).sum() < 45  # chi-square with 19 degrees of freedom: p = 0.0007
    table = np.corrcoef(np.stack(list(draws.values())))
    assert np.abs(table - np.eye(len(draws))).max() < 0.03
    assert np.abs(np.corrcoef(uniform(0, 0, index, 0)[1:], uniform(0, 0, index, 0)[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_order_holds_every_sample_once_and_mixes_within_its_windows_only(window):
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    for epoch in range(3):
        order = epoch_order(SIZES, 5, epoch, window)
        assert sorted(order.tolist()) == list(range(N))
        shards = shard_of[order].tolist()
        cuts = [at for at in range(N + 1) if not set(shards[:at]) & set(shards[at:])]  # no shard lies on both sides
        members = [set(shards[a:b]) for a, b in pairwise(cuts)]
        assert max(map(len, members)) == min(window, len(SIZES))
        for a, b in pairwise(cuts):
            assert b - a < 4 or (np.diff(order[a:b]) < 0).any()  # shuffled inside


def test_order_depends_on_seed_and_epoch_alone():
    same = epoch_order(SIZES, 5, 2, 3)
    assert np.array_equal(same, epoch_order(SIZES, 5, 2, 3))
    assert not np.array_equal(same, epoch_order(SIZES, 6, 2, 3))
    assert not np.array_equal(same, epoch_order(SIZES, 5, 3, 3))
    assert not np.array_equal(same, np.arange(N))


def test_full_window_is_a_fair_shuffle():
    sizes = np.array([10] * 10)
    places = np.stack([np.argsort(epoch_order(sizes, 0, epoch, 10)) for epoch in range(400)])  # [epochs, sample]
    deviation = 99 / np.sqrt(12) / np.sqrt(400)
    assert np.abs(places.mean(0) - 49.5).max() < 4.5 * deviation


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_an_epoch(world_size):
    order = epoch_order(SIZES, 0, 0, 3)
    equal = [rank_share(order, rank, world_size, equal=True) for rank in range(world_size)]
    assert {len(share) for share in equal} == {N // world_size}
    assert len(np.unique(np.concatenate(equal))) == N // world_size * world_size
    exact = [rank_share(order, rank, world_size, equal=False) for rank in range(world_size)]
    assert sorted(np.concatenate(exact).tolist()) == list(range(N))
    assert np.array_equal(np.stack(equal, 1).ravel(), order[: N // world_size * world_size])


@pytest.mark.parametrize("length", [None, 1, 23, 60])
def test_what_deals_leave_is_what_lists_leave(length):
    """Random deals to 1 .. 6 ranks, with shares of unequal length at the end of a sequence, against plain lists."""
    draw = np.random.default_rng(0)
    kept = set()
    for _ in range(150):
        left, remainder = list(range(400 if length is None else length)), Remainder()
        for _ in range(int(draw.integers(1, 6))):
            world_size = int(draw.integers(1, 7))
            shares = [left[rank::world_size] for rank in range(world_size)]
            most = int(draw.choice([3, 12]))
            taken = [min(len(share), int(draw.integers(0, most))) for share in shares]
            gone = {entry for share, count in zip(shares, taken, strict=True) for entry in share[:count]}
            left = [entry for entry in left if entry not in gone]
            remainder = deal(remainder, taken, length)
            entries, start = gaps(remainder, length)
            assert [*entries.tolist(), *range(start, 400 if length is None else length)] == left
            kept.add(len(remainder.deals))
    assert {0, 1}.issubset(kept) and (length == 1 or max(kept) > 1)


def test_deals_that_all_ranks_left_behind_are_not_kept():
    remainder = deal(Remainder(), [5, 3, 5])
    assert remainder == Remainder(9, [[2, 0, 2]])
    assert deal(remainder, [4, 4]) == Remainder(21, [])  # the gaps 10 and 13, then 15 .. 20
    assert deal(Remainder(), [4, 4]) == Remainder(8, [])
    assert len(deal(remainder, [0, 1]).deals) == 2
