"""Contrastive losses of a batch that is sharded over ranks: exactly the losses of the whole batch, each pair computed once.

Every rank computes its own rows of one side against all columns of the other, which is gathered: rows are whole on their rank,
columns are sums over parts. What crosses ranks is

    forward   the gathered side, once (all-gather), and for clip_loss N log-sums, one for each column (to the column's owner)
    backward  the gradient of the gathered side, once (reduce-scatter), and for clip_loss N numbers back from the owners

The features travel in their own dtype (under autocast, in its dtype); their gradient is summed over ranks in float32 (float64
for float64), for sums in half precision would grow less exact with every rank. The collectives' adjoints are sums over ranks,
so that every rank's gradients are those of the sum of all ranks' losses. Rank r with n_r of the N rows returns

    loss_r = world / N * (sum of the loss terms of its n_r rows and n_r columns)

The mean over ranks of these losses is the loss of the whole batch, and the mean over ranks of their gradients, which is what
DistributedDataParallel makes, is its gradient: `world` ranks equal one rank with the whole batch, whatever the sizes n_r.

All ranks of the group make the same calls in the same order, backward passes included; whether y (or x) needs a gradient
must not differ between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops import debug
from vlpfast.ops._checks import DTYPES, check_tensor
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive._checks import check_features, check_leave_out, check_loss_scale, check_scale
from vlpfast.ops.contrastive.pair import STASH_BYTES, pair_logsumexp
from vlpfast.ops.contrastive.softplus import pair_softplus

# the new and the old name, neither in a torch that was built without torch.distributed
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def sharded_clip_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    gather: Literal["x", "y"] = "y",
    leave_out: tuple[Tensor, Tensor] | None = None,
    sizes: Sequence[int] | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """This rank's share of `clip_loss` of the batch that all ranks hold together; the mean over ranks is that loss.

    Args:
        x: [n, D] this rank's rows; row i belongs to row i of y. n may be 0 and may differ between ranks. See `pair_logsumexp`
            for dtypes and for what autocast does.
        y: [n, D]
        scale: a float > 0, or a 0-d tensor: the same on all ranks (its gradient is made, to be averaged like all others).
        group: the ranks that share the batch; None: all. Without an initialised process group there is one rank.
        gather: the side that travels, the other stays home. A side without a gradient (a locked tower) is the better one:
            nothing of size n * D comes back in the backward.
        leave_out: (row_ids [n], column_ids [n]), int64, of this rank's rows of x and of y: pairs of the whole batch with equal
            ids stay out of the sums (own pairs do not).
        sizes: n of every rank. None: on the host the ranks tell each other (and check that width and dtype agree); on other
            devices, where reading them would wait for the device, all ranks promise to have the same n. On the host
            `torch.compile(fullgraph=True)` needs them given.
        stash_bytes: as in `pair_logsumexp`, for this rank's n * N exponentials: three products of n x N x D, four without.

    Returns:
        0-d, float32 (float64 for float64 features); 0 if no rank has rows. Not finite on all ranks if a feature is not on one.

    Raises:
        TypeError, ValueError: a wrong argument, named.
    """
    x, y, leave_out, shards = _home_and_travelling(x, y, scale, gather, leave_out, group, sizes)
    x_wide, y_wide = _wide(x), _wide(y)
    rows, cols = pair_logsumexp(
        x_wide.to(x.dtype), shards.gather(y_wide), scale,
        own=shards.offset, leave_out=shards.gather_ids(leave_out), stash_bytes=stash_bytes,
    )  # fmt: skip
    if not shards.alone:
        own = check_scale(scale, x_wide) * (x_wide * y_wide).sum(1)  # [n]
        cols = _whole_columns(cols, own, shards)
    losses = F.softplus(rows, threshold=40).sum() + F.softplus(cols, threshold=40).sum()  # the threshold: see clip_loss
    return losses / (2 * max(1, shards.total) / len(shards.sizes))


def sharded_sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    *,
    group: dist.ProcessGroup | None = None,
    gather: Literal["x", "y"] = "y",
    leave_out: tuple[Tensor, Tensor] | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """This rank's share of `sigmoid_loss` of the batch that all ranks hold together; the mean over ranks is that loss.

    bias is 0-d or None. For all other arguments, dtypes and errors see `sharded_clip_loss`; three products of n x N x D, made in
    the forward. A feature that is not finite shows in this rank's loss alone if it is one of the side that stays home, and in
    everyone's gradients once they are averaged.
    """
    x, y, leave_out, shards = _home_and_travelling(x, y, scale, gather, leave_out, group, sizes)
    if bias is not None:
        check_tensor("bias", bias, x.device, DTYPES, None)
        debug.check_finite("bias", bias)
    every_y, every_id = shards.gather(_wide(y)), shards.gather_ids(leave_out)
    total = pair_softplus(x, every_y, scale, own=shards.offset, leave_out=every_id, bias=bias)
    return total / (max(1, shards.total) / len(shards.sizes))


def _wide(features: Tensor) -> Tensor:
    """In the accumulating dtype: what is used here and there adds up its gradients in that, and is rounded once."""
    return features.to(accumulate_dtype(features.dtype))


def _whole_columns(cols: Tensor, own: Tensor, shards: _Shards) -> Tensor:
    """[n] this rank's columns over all ranks' rows, minus the own logits [n]; `cols` [N]: all columns over this rank's rows.

    There pair_logsumexp has subtracted the own logit from this rank's columns already, and nothing from the others.
    """
    parts = shards.to_owners(cols)  # [world, n]
    elsewhere = torch.arange(len(parts), device=parts.device) != shards.rank
    parts = torch.where(elsewhere[:, None], parts - own, parts)
    return parts.clamp_min(torch.finfo(parts.dtype).min / 2).logsumexp(0)  # finite: of -inf alone its gradient is NaN


# --- who has which rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shards:
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

    def to_owners(self, columns: Tensor) -> Tensor:
        """[N] -> [world, n]: what every rank has for this rank's columns."""
        return _Collective.apply(columns, self, _to_owners, _from_owners)


def _home_and_travelling(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    gather: str,
    leave_out: tuple[Tensor, Tensor] | None,
    group: dist.ProcessGroup | None,
    sizes: Sequence[int] | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, _Shards]:
    """The side that stays and the side that travels, both as autocast wants them, ids in the same order, and the shards."""
    check_features(x, y)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"y: expected as many rows as x, {x.shape[0]}, got {y.shape[0]}")
    check_loss_scale(scale)
    check_scale(scale, x)  # before this rank takes part in anything that the others wait for
    if leave_out is not None:
        check_leave_out(leave_out, x.shape[0], x.shape[0], x.device)
    if gather not in ("x", "y"):
        raise ValueError(f"gather: expected 'x' or 'y', got {gather!r}")
    if gather == "x":
        x, y = y, x
        leave_out = leave_out and (leave_out[1], leave_out[0])
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if torch.promote_types(x.dtype, y.dtype) != torch.float64:  # before y travels
            x, y = x.to(dtype), y.to(dtype)
    return x, y, leave_out, _shards(y, leave_out is not None, group, sizes)


def _shards(y: Tensor, has_ids: bool, group: dist.ProcessGroup | None, sizes: Sequence[int] | None) -> _Shards:
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
    return _Shards(group, rank, tuple(sizes), y.dtype)


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
    def forward(tensor: Tensor, shards: _Shards, collective: Callable, adjoint: Callable) -> Tensor:
        return collective(tensor, shards)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.shards, ctx.collective, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _Collective.apply(grad, ctx.shards, ctx.adjoint, ctx.collective), None, None, None


def _gather_features(rows: Tensor, shards: _Shards) -> Tensor:
    return _gather(rows.to(shards.dtype), shards)


def _reduce_features(grads: Tensor, shards: _Shards) -> Tensor:
    return _reduce(_wide(grads), shards)


# all-gather and reduce-scatter want equal parts: unequal ones are filled up to the largest
def _gather(rows: Tensor, shards: _Shards) -> Tensor:
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


def _reduce(grads: Tensor, shards: _Shards) -> Tensor:
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


def _to_owners(columns: Tensor, shards: _Shards) -> Tensor:
    """[N] -> [world, n]"""
    world, n = len(shards.sizes), shards.sizes[shards.rank]
    parts = columns.new_empty(world * n)
    dist.all_to_all_single(parts, columns.contiguous(), [n] * world, list(shards.sizes), group=shards.group)
    return parts.view(world, n)


def _from_owners(parts: Tensor, shards: _Shards) -> Tensor:
    """[world, n] -> [N]"""
    world, n = parts.shape
    columns = parts.new_empty(shards.total)
    dist.all_to_all_single(columns, parts.contiguous().view(-1), list(shards.sizes), [n] * world, group=shards.group)
    return columns
