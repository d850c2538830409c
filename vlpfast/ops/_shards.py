"""N rows spread over the ranks of a group, in the order of ranks, and the collectives of sharded losses with their adjoints.

All ranks of the group make the same calls in the same order, backward passes included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlpfast.ops._checks import DTYPES
from vlpfast.ops._schemas import accumulate_dtype

# the new and the old name, neither in a torch that was built without torch.distributed
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def wide(features: Tensor) -> Tensor:
    """In the accumulating dtype: what is used here and there adds up its gradients in that, and is rounded once."""
    return features.to(accumulate_dtype(features.dtype))


def cast_for_autocast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both as autocast wants them, float64 apart: before one of them travels."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if torch.promote_types(x.dtype, y.dtype) != torch.float64:
            return x.to(dtype), y.to(dtype)
    return x, y


@dataclass(frozen=True)
class Shards:
    """N rows over the ranks of a group, in the order of ranks; this is rank `rank`."""

    group: dist.ProcessGroup | None
    rank: int
    sizes: tuple[int, ...]
    dtype: torch.dtype  # in which features travel

    @property
    def offset(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def alone(self) -> bool:
        """Nothing needs to travel."""
        return len(self.sizes) == 1 or self.total == 0

    def gather(self, rows: Tensor) -> Tensor:
        """[n, D] -> [N, D] in the travelling dtype"""
        return rows.to(self.dtype) if self.alone else _Collective.apply(rows, self, _gather_features, _reduce_features)

    def gather_ids(self, leave_out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        if leave_out is None or self.alone:
            return leave_out
        return leave_out[0], _gather(leave_out[1], self)

    def gather_mask(self, mask: Tensor | None) -> Tensor | None:
        """bool [n, ...] -> [N, ...]"""
        return mask if mask is None or self.alone else _gather(mask.to(torch.uint8), self).bool()

    def to_owners(self, columns: Tensor) -> Tensor:
        """[N] -> [world, n]: what every rank has for this rank's columns."""
        return _Collective.apply(columns, self, _to_owners, _from_owners)


def shards_of(y: Tensor, has_ids: bool, group: dist.ProcessGroup | None, sizes: Sequence[int] | None) -> Shards:
    """y [n, width]: this rank's rows of what travels. sizes, group: see sharded_clip_loss."""
    n = y.shape[0]
    rank, world = 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("group: expected one that this process belongs to, got one of other processes")
    if sizes is not None:
        whole = all(isinstance(size, int) and size >= 0 for size in sizes)
        if not (whole and len(sizes) == world and sizes[rank] == n):
            raise ValueError(f"sizes: expected {world} ints >= 0, {n} (the rows here) at rank {rank}, got {list(sizes)}")
    elif world > 1 and y.device.type == "cpu":
        sizes = _exchange_sizes(y, has_ids, group, world)
    else:
        sizes = [n] * world
    return Shards(group, rank, tuple(sizes), y.dtype)


def _exchange_sizes(y: Tensor, has_ids: bool, group: dist.ProcessGroup | None, world: int) -> list[int]:
    here = torch.tensor([y.shape[0], y.shape[1], DTYPES.index(y.dtype), has_ids])
    everywhere = here.new_empty(world * 4)
    _all_gather(everywhere, here, group=group)
    sizes, widths, dtypes, ids = everywhere.view(world, 4).T.tolist()
    for what, values in (
        ("y: expected one width", widths),
        ("y: expected one dtype", [DTYPES[i] for i in dtypes]),
        ("leave_out: expected ids or none", [bool(i) for i in ids]),
    ):
        if len(set(values)) > 1:
            raise ValueError(f"{what} on all ranks, got, by rank, {', '.join(map(str, values))}")
    return sizes


# --- collectives ------------------------------------------------------------------------------------------------------


class _Collective(torch.autograd.Function):
    """A collective that is linear in the tensors of all ranks, and its adjoint: gradients of the sum of all ranks' losses."""

    @staticmethod
    def forward(tensor: Tensor, shards: Shards, collective: Callable, adjoint: Callable) -> Tensor:
        return collective(tensor, shards)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.shards, ctx.collective, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _Collective.apply(grad, ctx.shards, ctx.adjoint, ctx.collective), None, None, None


def _gather_features(rows: Tensor, shards: Shards) -> Tensor:
    return _gather(rows.to(shards.dtype), shards)


def _reduce_features(grads: Tensor, shards: Shards) -> Tensor:
    return _reduce(wide(grads), shards)


# all-gather and reduce-scatter want equal parts: unequal ones are filled up to the largest
def _gather(rows: Tensor, shards: Shards) -> Tensor:
    """[n, ...] -> [N, ...]"""
    largest = max(shards.sizes)
    part = rows.contiguous()
    if len(rows) < largest:
        part = torch.cat([rows, rows.new_zeros(largest - len(rows), *rows.shape[1:])])
    parts = rows.new_empty(len(shards.sizes) * largest, *rows.shape[1:])
    _all_gather(parts, part, group=shards.group)
    if largest * len(shards.sizes) == shards.total:
        return parts
    return torch.cat([part[:size] for part, size in zip(parts.split(largest), shards.sizes, strict=True)])


def _reduce(grads: Tensor, shards: Shards) -> Tensor:
    """[N, ...] -> [n, ...]: the sum over ranks."""
    largest = max(shards.sizes)
    parts = grads.contiguous()
    if largest * len(shards.sizes) != shards.total:
        parts = grads.new_zeros(len(shards.sizes), largest, *grads.shape[1:])
        for part, grad in zip(parts, grads.split(shards.sizes), strict=True):
            part[: len(grad)] = grad
        parts = parts.flatten(0, 1)
    total = grads.new_empty(largest, *grads.shape[1:])
    _reduce_scatter(total, parts, group=shards.group)
    return total[: shards.sizes[shards.rank]]


def _to_owners(columns: Tensor, shards: Shards) -> Tensor:
    """[N] -> [world, n]"""
    world, n = len(shards.sizes), shards.sizes[shards.rank]
    parts = columns.new_empty(world * n)
    dist.all_to_all_single(parts, columns.contiguous(), [n] * world, list(shards.sizes), group=shards.group)
    return parts.view(world, n)


def _from_owners(parts: Tensor, shards: Shards) -> Tensor:
    """[world, n] -> [N]"""
    world, n = parts.shape
    columns = parts.new_empty(shards.total)
    dist.all_to_all_single(columns, parts.contiguous().view(-1), list(shards.sizes), [n] * world, group=shards.group)
    return columns
