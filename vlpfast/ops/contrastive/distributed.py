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

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops import debug
from vlpfast.ops._checks import DTYPES, check_tensor
from vlpfast.ops._shards import Shards, cast_for_autocast, shards_of, wide
from vlpfast.ops.contrastive._checks import check_features, check_leave_out, check_loss_scale, check_scale
from vlpfast.ops.contrastive.pair import STASH_BYTES, pair_logsumexp
from vlpfast.ops.contrastive.softplus import pair_softplus


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
    x_wide, y_wide = wide(x), wide(y)
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
    every_y, every_id = shards.gather(wide(y)), shards.gather_ids(leave_out)
    total = pair_softplus(x, every_y, scale, own=shards.offset, leave_out=every_id, bias=bias)
    return total / (max(1, shards.total) / len(shards.sizes))


def _whole_columns(cols: Tensor, own: Tensor, shards: Shards) -> Tensor:
    """[n] this rank's columns over all ranks' rows, minus the own logits [n]; `cols` [N]: all columns over this rank's rows.

    There pair_logsumexp has subtracted the own logit from this rank's columns already, and nothing from the others.
    """
    parts = shards.to_owners(cols)  # [world, n]
    elsewhere = torch.arange(len(parts), device=parts.device) != shards.rank
    parts = torch.where(elsewhere[:, None], parts - own, parts)
    return parts.clamp_min(torch.finfo(parts.dtype).min / 2).logsumexp(0)  # finite: of -inf alone its gradient is NaN


def _home_and_travelling(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    gather: str,
    leave_out: tuple[Tensor, Tensor] | None,
    group: dist.ProcessGroup | None,
    sizes: Sequence[int] | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, Shards]:
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
    x, y = cast_for_autocast(x, y)
    return x, y, leave_out, shards_of(y, leave_out is not None, group, sizes)
