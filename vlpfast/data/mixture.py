"""Several sources in one ShardSet: which of their samples an epoch holds, and in which order.

A sample stands in an order as a ticket: its index in the set, plus the size of the set for each time that it came before. So a
ticket comes once in an epoch, and random choices made from tickets differ from pass to pass of a source that repeats.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from itertools import pairwise

import numpy as np

from vlpfast.data.order import epoch_order, random_bits
from vlpfast.data.shards import ShardSet, expand
from vlpfast.data.subset import Subset
from vlpfast.types import UserError

LOOK_AT = 8  # samples of each source that are looked at when it is opened
_SOURCE_SEED, _SOURCE_ORDER = 1 << 32, (1 << 32) + 1  # numbers of draws, far from those that views use


def expand_sources(patterns: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    """Source -> its shards. UserError: no sources, patterns that match nothing, a shard in two sources."""
    if not patterns:
        raise UserError("no sources: the mixture is empty")
    found: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for name, wanted in patterns.items():
        try:
            found[name] = expand(wanted)
        except UserError as error:
            raise UserError(f"source {name}: {error}") from error
        for path in found[name]:
            if owner.setdefault(path, name) != name:
                raise UserError(f"shard {path} is in two sources, {owner[path]} and {name}")
    return found


def open_sources(
    patterns: Mapping[str, str | Sequence[str]],
    weights: Mapping[str, float] | str,
    *,
    threads: int,
    subset: Sequence[int] | np.ndarray | None = None,
) -> tuple[ShardSet, Mixture]:
    """One set of all shards, and which of them are whose. weights: of every source, or none; "sqrt": the square roots of their
    sizes (InstructBLIP's). subset: the samples that count, of those of all sources; None: all.

    UserError: as expand_sources and ShardSet; a weight of no source, a source without a weight, a weight that is not above 0; a
    source of which no sample counts.
    """
    if isinstance(weights, str):
        if weights != "sqrt":
            raise ValueError(f'weights: expected a number for each source or "sqrt", got {weights!r}')
        shards, mixture = open_sources(patterns, {}, threads=threads, subset=subset)
        return shards, Mixture(mixture.names, mixture.shard_sizes, [math.sqrt(size) for size in mixture.sizes])
    for name, weight in weights.items():
        if name not in patterns:
            near = get_close_matches(name, patterns, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the sources are {', '.join(patterns)}"
            raise UserError(f"weight of an unknown source {name!r}; {hint}")
        if not 0 < weight < math.inf:
            raise UserError(f"source {name}: expected a weight above 0, got {weight}")
    if weights and (without := [name for name in patterns if name not in weights]):
        raise UserError(f"source {without[0]} has no weight: expected one for every source, or for none")
    paths = expand_sources(patterns)
    shards = ShardSet([path for found in paths.values() for path in found], threads=threads)
    shards = shards if subset is None else Subset(shards, subset)
    sizes = np.split(shards.shard_sizes, np.cumsum([len(found) for found in paths.values()])[:-1])
    if empty := [name for name, of in zip(paths, sizes, strict=True) if not of.sum()]:
        raise UserError(f"source {empty[0]} has none of the chosen samples")
    return shards, Mixture(list(paths), sizes, [float(weights[name]) for name in paths] if weights else None)


def check_members(shards: ShardSet, mixture: Mixture, members: Sequence[Mapping[str, Sequence[str]]]) -> None:
    """UserError for a source whose first samples all lack what a batch is made of: a mistake in the configuration, not damage.

    members: of each source modality or text -> extensions, one of which a sample must have.
    """
    for name, size, end, needed in zip(mixture.names, mixture.sizes, np.cumsum(mixture.sizes).tolist(), members, strict=True):
        looked_at = [set(shards.extensions(index)) for index in range(end - size, end - size + min(size, LOOK_AT))]
        for modality, wanted in needed.items():
            if not any(found & set(wanted) for found in looked_at):
                raise UserError(
                    f"source {name}: its first {len(looked_at)} samples have nothing to make {modality!r} from (a member "
                    f"{', '.join(wanted)}), which the model asks for; the first one has {', '.join(sorted(looked_at[0]))}"
                )


class Mixture:
    """Sources that share a ShardSet: the shards of the first, then those of the second, ...

    shard_sizes: for each source int64 [its shards]. weights: shares of the samples, of any sum; None: as many as each has.
    """

    def __init__(self, names: Sequence[str], shard_sizes: Sequence[np.ndarray], weights: Sequence[float] | None) -> None:
        self.names, self.shard_sizes, self.weights = list(names), list(shard_sizes), weights
        self.sizes = [int(sizes.sum()) for sizes in shard_sizes]
        self.total = sum(self.sizes)
        self._ends = np.cumsum(self.sizes)  # [sources]
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()  # (source, pass) -> positions in the source

    def source_of(self, index: np.ndarray) -> np.ndarray:
        """index int64 [B] in the set -> int64 [B] numbers of the sources."""
        return np.searchsorted(self._ends, index, "right")

    def quotas(self, total: int, what: str = "samples") -> list[int]:
        """`total` divided by the weights: rounded down, then one more for the largest remainders, of equal ones the first.
        UserError: a source gets none."""
        weights = [Fraction(weight) for weight in self.weights or self.sizes]
        exact = [total * weight / sum(weights) for weight in weights]
        quotas = [int(share) for share in exact]
        for s in sorted(range(len(exact)), key=lambda s: quotas[s] - exact[s])[: total - sum(quotas)]:
            quotas[s] += 1
        if 0 in quotas:
            s = quotas.index(0)
            raise UserError(f"source {self.names[s]} gets none of the {total} {what} of an epoch: give it a larger weight")
        return quotas

    def schedule(self, quotas: Sequence[int], seed: int, epoch: int) -> np.ndarray:
        """int64 [sum(quotas)]: the number of each source as often as its quota says, in random order."""
        sources = np.repeat(np.arange(len(quotas)), quotas)
        return sources[np.argsort(random_bits(seed, epoch, np.arange(len(sources)), _SOURCE_ORDER), kind="stable")]

    def epoch_order(self, seed: int, epoch: int, window: int) -> np.ndarray:
        """int64 [samples of all sources]: tickets of an epoch, the same on every rank, of each source exactly its quota, at
        random places. A source goes on where it stood at the end of the epoch before, in a new permutation after each pass, so
        each of its samples comes before any comes again."""
        quotas = self.quotas(self.total)
        schedule = self.schedule(quotas, seed, epoch)
        order = np.empty(self.total, np.int64)
        for source, quota in enumerate(quotas):
            first = epoch * quota
            tickets = self.tickets(source, np.arange(first, first + quota), seed, window)
            order[schedule == source] = tickets - first // self.sizes[source] * self.total  # counted from the epoch's first pass
        return order

    def tickets(self, source: int, places: np.ndarray, seed: int, window: int) -> np.ndarray:
        """What stands at `places` int64 [B], ascending, of a source repeated without end -> int64 [B], every pass counted."""
        size = self.sizes[source]
        passes = places // size
        tickets = np.empty_like(places)
        seams = np.flatnonzero(np.diff(passes, prepend=-1)).tolist()
        for first, end in pairwise([*seams, len(places)]):
            here, number = slice(first, end), int(passes[first])
            order = self._order(source, number, seed, window)
            tickets[here] = order[places[here] - number * size] + (int(self._ends[source]) - size + number * self.total)
        return tickets

    def _order(self, source: int, number: int, seed: int, window: int) -> np.ndarray:
        """Those used last are kept, two for each source: what is asked for may lie on both sides of a seam."""
        order = self._orders.pop((source, number), None)
        if order is None:
            # Sources of the same shape would else be permuted alike.
            own_seed = int(random_bits(seed, 0, np.array([source]), _SOURCE_SEED)[0])
            order = epoch_order(self.shard_sizes[source], own_seed, number, window)
        self._orders[source, number] = order
        if len(self._orders) > 2 * len(self.sizes):
            self._orders.popitem(last=False)
        return order
