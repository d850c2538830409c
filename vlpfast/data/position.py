"""Positions in the data: what each rank gets next, and how positions pass over to another number of ranks.

A course hands out tickets (mixture.py) from a position and says what the position is then; it has no other state than what an
earlier number of ranks left over. Two kinds: an order for each epoch, and pure batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlpfast.data.mixture import Mixture
from vlpfast.data.order import Remainder, deal, gaps, rank_share
from vlpfast.types import UserError

_KEPT_ENDS = 64  # finished epochs that a position remembers
_OWN = ("rank", "epoch", "cursor", "ends", "taken", "remainders", "skipped")  # what differs from rank to rank


class Position(NamedTuple):
    epoch: int = 0
    cursor: int = 0  # samples of this rank's share of the epoch that are behind us; with pure batches, of all ranks' together
    ends: Sequence[Sequence[int]] = ()  # (epoch, cursor after its last whole batch) of the epochs finished last
    taken: Sequence[int] = ()  # pure batches: how many of its share of each source this rank took


class EpochCourse:
    """Every epoch has an order, of which rank r of W takes every W-th entry.

    order: epoch -> int64 [length] tickets. equal: the last few are left out, so that all ranks have as many.
    """

    def __init__(self, order: Callable[[int], np.ndarray], length: int, rank: int, world_size: int, *, equal: bool) -> None:
        self._order, self._length, self._rank, self._world_size, self._equal = order, length, rank, world_size, equal
        self._remainders: dict[int, Remainder] = {}  # epoch -> what other numbers of ranks left of it; not there: all
        self._share: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # epoch, this rank's tickets

    def batches(self, batch_size: int) -> int:
        """Of this rank in an epoch."""
        if self._equal:
            return self._length // self._world_size // batch_size
        return -(-len(range(self._rank, self._length, self._world_size)) // batch_size)

    def start(self) -> Position:
        self.restore([])
        return Position()

    def take(self, position: Position, count: int) -> tuple[np.ndarray, Position]:
        """The next `count` tickets, fewer at the end of the epoch."""
        if self._share[0] != position.epoch:
            order = self._order(position.epoch)
            if (remainder := self._remainders.get(position.epoch)) is not None:
                entries, start = gaps(remainder, self._length)
                order = np.concatenate([order[entries], order[start:]])
            self._share = position.epoch, rank_share(order, self._rank, self._world_size, equal=self._equal)
        tickets = self._share[1][position.cursor : position.cursor + count]
        return tickets, position._replace(cursor=position.cursor + len(tickets))

    def finished(self, position: Position) -> Position:
        """After a whole batch."""
        return position

    def next_epoch(self, begun: Position) -> Position:
        """begun: after the last batch, or at the beginning of an epoch that gave none."""
        return Position(begun.epoch + 1, 0, [*begun.ends, [begun.epoch, begun.cursor]][-_KEPT_ENDS:])

    def untouched(self, position: Position) -> bool:
        """Whether a whole epoch lies ahead."""
        return position.cursor == 0 and position.epoch not in self._remainders

    def remainders(self, position: Position) -> list[list[Any]]:
        return [[epoch, *remainder] for epoch, remainder in self._remainders.items() if epoch >= position.epoch]

    def restore(self, remainders: Sequence[Sequence[Any]]) -> None:
        self._remainders = {epoch: Remainder(start, deals) for epoch, start, deals in remainders}
        self._share = (-1, np.empty(0, np.int64))


class PureCourse:
    """Global batches of one source each. An epoch is as many of them as there are samples for, divided by the weights.

    A source is repeated without end, each pass in a new order, and dealt to the ranks; what of a batch is damaged is replaced
    from the same source, so ranks stay in the same place of the schedule, and no sample is left out at the end of an epoch.
    """

    def __init__(self, mixture: Mixture, seed: int, window: int, rank: int, world_size: int, batch_size: int) -> None:
        self._mixture, self._seed, self._window = mixture, seed, window
        self._rank, self._world_size, self._global_batch = rank, world_size, world_size * batch_size
        self._quotas = mixture.quotas(mixture.total // self._global_batch, "pure batches")
        self._schedule: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # epoch, sources of its batches
        self.restore([])

    def batches(self, batch_size: int) -> int:
        return sum(self._quotas)

    def start(self) -> Position:
        self.restore([])
        return Position(taken=[0] * len(self._quotas))

    def take(self, position: Position, count: int) -> tuple[np.ndarray, Position]:
        """The next `count` tickets of the source whose turn it is."""
        # Rounded up: a batch of another size may have ended within one of ours.
        place = -(-position.cursor // self._global_batch)
        if place >= sum(self._quotas):
            place, position = 0, position._replace(epoch=position.epoch + 1, cursor=0)
        if self._schedule[0] != position.epoch:
            self._schedule = position.epoch, self._mixture.schedule(self._quotas, self._seed, position.epoch)
        source = int(self._schedule[1][place])
        entries, start = self._gaps[source]
        dealt = self._rank + self._world_size * (position.taken[source] + np.arange(count))
        ahead = dealt >= len(entries)
        places = np.concatenate([entries[dealt[~ahead]], dealt[ahead] - len(entries) + start])
        taken = [number + count * (s == source) for s, number in enumerate(position.taken)]
        return self._mixture.tickets(source, places, self._seed, self._window), position._replace(taken=taken)

    def finished(self, position: Position) -> Position:
        place = -(-position.cursor // self._global_batch)
        return position._replace(cursor=(place + 1) * self._global_batch)

    def untouched(self, position: Position) -> bool:
        """Always, as sources do not end: a batch that cannot be filled has met the whole of one."""
        return True

    def remainders(self, position: Position) -> list[list[Any]]:
        return [[source, *remainder] for source, remainder in enumerate(self._remainders)]

    def restore(self, remainders: Sequence[Sequence[Any]]) -> None:
        self._remainders = [Remainder()] * len(self._quotas)
        for source, start, deals in remainders:
            self._remainders[source] = Remainder(start, deals)
        self._gaps = [gaps(remainder) for remainder in self._remainders]


def merge_positions(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks, in their order, as one for any number of ranks: what no rank has handed out, in its order.

    Exact: of every epoch that some rank has not finished, each sample that no rank has handed out or found damaged comes once
    more, those included that a rank in a later epoch left out of its last batch. Ranks stand in different epochs where damaged
    samples have made some faster; the new ranks first finish the earliest of these epochs, then what is left of the next. (Of
    ranks more than 64 epochs apart, the share of the leading ones counts as handed out whole.)

    With pure batches, the schedule is gone on with at the same share of the epoch; where the global batch changes within an
    epoch, the shares of the sources in that epoch are not exact.
    """
    for rank, state in enumerate(states):
        if (state["rank"], state["world_size"]) != (rank, len(states)):
            raise ValueError(
                f"states: expected those of ranks 0 .. {len(states) - 1} in their order, "
                f"got that of rank {state['rank']} of {state['world_size']} at place {rank}"
            )
        for name in state.keys() - set(_OWN):
            if state[name] != states[0][name]:
                raise ValueError(f"states: rank {rank} has {name} {state[name]!r}, rank 0 has {states[0][name]!r}")
    merged = {**min(states, key=lambda state: state["epoch"]), "world_size": None, "rank": None, "ends": []}
    merged["skipped"] = {name: reason for state in states for name, reason in state["skipped"].items()}
    remainders = {key: Remainder(start, deals) for key, start, deals in merged["remainders"]}
    if merged["pure_batches"]:
        if len({(state["epoch"], state["cursor"]) for state in states}) > 1:
            raise UserError("the ranks' data positions are not of the same step")
        for source in remainders:
            remainders[source] = deal(remainders[source], [state["taken"][source] for state in states])
        merged["taken"] = [0] * len(remainders)
    else:
        merged["cursor"] = 0
        for epoch in range(merged["epoch"], max(state["epoch"] for state in states) + 1):
            taken = [_taken(state, epoch) for state in states]
            before = remainders.get(epoch, Remainder())
            if None in taken:
                entries, start = gaps(before, merged["samples"])
                share = (len(entries) + merged["samples"] - start) // len(states)
                taken = [share if count is None else count for count in taken]
            remainders[epoch] = deal(before, taken, merged["samples"])
    merged["remainders"] = [[key, *remainder] for key, remainder in remainders.items() if remainder.start or remainder.deals]
    return merged


def _taken(state: Mapping[str, Any], epoch: int) -> int | None:
    """How many of its share of the epoch a rank has behind it; None: all, and no one remembers more."""
    if state["epoch"] > epoch:
        return dict(state["ends"]).get(epoch)
    return state["cursor"] if state["epoch"] == epoch else 0
