"""Late interaction's losses of a batch that is sharded over ranks: those of the whole batch, each pair of sets scored once.

Every rank scores its own sets of one side with all sets of the other, whose tokens are gathered, in both directions from one
pass: of its rows all columns are there, the columns are put together from every rank's rows. What crosses ranks is said in
vlpfast/ops/contrastive/distributed.py, with n * T * D numbers in the place of n * D; the mean over ranks of losses and of
gradients is that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops._checks import check_choice
from vlpfast.ops._shards import Shards, cast_for_autocast, shards_of, wide
from vlpfast.ops.contrastive._checks import check_scale
from vlpfast.ops.maxsim._checks import check_sets, check_tokens
from vlpfast.ops.maxsim.losses import filip_loss, maxsim_sigmoid_loss, score_contrastive_loss
from vlpfast.ops.maxsim.maxsim import STASH_BYTES, maxsim


def sharded_filip_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    gather: Literal["x", "y"] = "y",
    sizes: Sequence[int] | None = None,
    masked: Literal["ignore", "zero"] = "ignore",
    normalize: bool = False,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """This rank's share of `filip_loss` of the batch that all ranks hold together; the mean over ranks is that loss.

    Args:
        x, y: this rank's tokens [n, P, D] and [n, T, D], set i of x with set i of y; n may be 0 and may differ between ranks, P,
            T, D and whether there are masks may not. See `filip_loss` for the rest.
        group, gather, sizes: see `sharded_clip_loss`. The side with fewer tokens, or without a gradient, is the better one to
            gather.

    Returns, Raises: see `sharded_clip_loss`.
    """
    check_tokens("x", x, x_mask, None, "[M, P, D]")
    check_tokens("y", y, y_mask, None, "[N, T, D]")
    check_sets(x, y, x.shape[0], y.shape[0], "aligned")
    check_choice("gather", gather, ("x", "y"))
    check_scale(scale, x)
    if gather == "x":  # the loss is the same for exchanged sides
        x, y, x_mask, y_mask = y, x, y_mask, x_mask
    x, y = cast_for_autocast(x, y)
    shards = shards_of(y.flatten(1), y_mask is not None, group, sizes)
    options = {"masked": masked, "normalize": normalize, "stash_bytes": stash_bytes}
    if shards.alone:
        return filip_loss(x, y, scale, x_mask, y_mask, **options)
    x_to_y, y_to_x = maxsim(x, _gather_tokens(y, shards), x_mask, shards.gather_mask(y_mask), **options)  # [n, N]
    scale = check_scale(scale, x_to_y)
    rows, cols = scale * x_to_y, scale * y_to_x
    here = torch.arange(x.shape[0], device=x.device)
    own = here, here + shards.offset  # left out of the sums: the loss stays exact however small it is
    without = torch.zeros_like(rows, dtype=torch.bool).index_put(own, torch.ones((), dtype=torch.bool, device=x.device))
    rows_rest = _logsumexp(rows.masked_fill(without, -torch.inf), 1)  # [n]
    cols_rest = _logsumexp(shards.to_owners(_logsumexp(cols.masked_fill(without, -torch.inf), 0)), 0)  # [n]
    threshold = 40  # above it softplus is the identity: see clip_loss
    losses = F.softplus(rows_rest - rows[own], threshold=threshold) + F.softplus(cols_rest - cols[own], threshold=threshold)
    return losses.sum() / (2 * shards.total / len(shards.sizes))


def sharded_query_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    labels: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """The contrast of a Q-Former's queries with one vector of each text, by the best query for it, of the whole batch.

        s[m, n] = max over q of <x[m, q], y[n]>;  score_contrastive_loss(s, s, scale, ...)

    The vectors y travel, then the scores, N numbers from each pair: every rank has them all, and the same loss, whose gradient
    reaches all of x and y. (BLIP-2's code stops it at what comes from other ranks.)

    Args:
        x, y: this rank's queries [n, Q, D] and vectors [n, D], row i of one with row i of the other; n may differ between ranks.
        labels: [n] int64; rows of equal labels, on whatever rank, belong together. None: row i to row i.
        scale: see `score_contrastive_loss`. label_smoothing: likewise, a number or this rank's [n], one for each pair.
        group, sizes: see `sharded_clip_loss`. stash_bytes: see `maxsim`.

    Returns, Raises: see `sharded_clip_loss`.

    Li et al. 2023, "BLIP-2: bootstrapping language-image pre-training with frozen image encoders and large language models".
    """
    check_tokens("x", x, None, None, "[M, Q, D]")
    if y.ndim != 2 or len(y) != len(x):
        raise ValueError(f"y: expected [{len(x)}, D] beside x, got {tuple(y.shape)}")
    check_scale(scale, x)
    x, y = cast_for_autocast(x, y)
    shards = shards_of(y, labels is not None, group, sizes)
    s = maxsim(x, shards.gather(wide(y))[:, None], directions="y_to_x", stash_bytes=stash_bytes)  # [n, N]
    exact = replace(shards, dtype=s.dtype)
    s = exact.gather(s)  # [N, N]
    if isinstance(label_smoothing, Tensor):
        label_smoothing = exact.gather(label_smoothing[:, None])[:, 0]
    ids = shards.gather_ids(None if labels is None else (labels, labels))
    both = None if ids is None else (ids[1], ids[1])
    return score_contrastive_loss(s, s, scale, labels=both, label_smoothing=label_smoothing)


def sharded_maxsim_sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    owner: Tensor | None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    normalize: bool = False,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """This rank's share of `maxsim_sigmoid_loss` of the batch that all ranks hold together; the mean over ranks is that loss.

    Args:
        x, y: this rank's patches [m, P, D] and concepts [c, D], which are gathered; m and c may differ between ranks.
        owner: [c] int64, the row of this rank's x that each concept is of; any other number for none.
        group: see `sharded_clip_loss`. sizes: c of every rank. For the rest see `maxsim_sigmoid_loss`.

    Returns, Raises: see `sharded_clip_loss`.
    """
    check_tokens("x", x, x_mask, None, "[M, P, D]")
    check_tokens("y", y, y_mask, None, "[C, D]")
    check_scale(scale, x)
    x, y = cast_for_autocast(x, y)
    shards = shards_of(y, y_mask is not None, group, sizes)
    if not shards.alone:
        if owner is not None:
            nobody = owner.new_full((shards.total,), -1)
            owner = torch.cat([nobody[: shards.offset], owner, nobody[shards.offset + len(owner) :]])
        y, y_mask = shards.gather(wide(y)), shards.gather_mask(y_mask)
    loss = maxsim_sigmoid_loss(x, y, scale, bias, owner, x_mask, y_mask, normalize=normalize, stash_bytes=stash_bytes)
    return loss * len(shards.sizes)


def _gather_tokens(tokens: Tensor, shards: Shards) -> Tensor:
    """[n, T, D] -> [N, T, D]"""
    return shards.gather(wide(tokens).flatten(1)).unflatten(1, tokens.shape[1:])


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    """Finite where there is nothing to add up: of -inf alone its gradient would be NaN."""
    return logits.clamp_min(torch.finfo(logits.dtype).min / 2).logsumexp(dim)
