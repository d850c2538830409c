"""The definition of late interaction in plain torch: dense, any device, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype


def maxsim(
    x: Tensor,  # [M, P, D]
    y: Tensor,  # [N, T, D]; [M, K, T, D]: x[m] meets y[m, k] alone
    x_mask: Tensor,  # [M, P] bool, True: keep
    y_mask: Tensor,  # [N, T] or [M, K, T] bool
    *,
    reduction: str = "mean",
    masked: str = "ignore",
) -> tuple[Tensor, Tensor]:
    """x_to_y and y_to_x, [M, N] or [M, K], as the public function of this name defines them.

    float64 in float64, everything else in float32.
    """
    dtype = accumulate_dtype(x.dtype)
    # masked tokens may hold anything: a product of NaN and 0 would reach the gradients
    x, y = (tokens.to(dtype).masked_fill(~mask[..., None], 0) for tokens, mask in ((x, x_mask), (y, y_mask)))
    similarity = torch.einsum("mpd,ntd->mnpt" if y.ndim == 3 else "mpd,mktd->mkpt", x, y)  # [M, N or K, P, T]
    rows, columns = x_mask[:, None, :, None], (y_mask[None] if y.ndim == 3 else y_mask)[:, :, None]
    similarity = similarity.masked_fill(~(rows & columns), -torch.inf if masked == "ignore" else 0.0)
    return _reduce(similarity, rows, columns, reduction), _reduce(similarity.mT, columns.mT, rows.mT, reduction)


def _reduce(similarity: Tensor, rows: Tensor, columns: Tensor, reduction: str) -> Tensor:
    """The mean or sum over kept rows of the largest similarity of each; 0 where there are no rows or no columns."""
    if similarity.shape[-1] == 0:
        return similarity.sum((-2, -1))
    best = similarity.max(-1).values  # one winner, the lowest index on ties: amax would share the gradient
    there = rows[..., 0] & columns.any(-1)
    total = torch.where(there, best, 0).sum(-1)
    return total if reduction == "sum" else total / rows[..., 0].sum(-1).clamp_min(1)
