"""The definition of late interaction in plain torch: dense, any device, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype


def maxsim(
    x: Tensor,  # [M, P, D]
    y: Tensor,  # [N, T, D]; "own": [M, K, T, D]
    x_mask: Tensor | None = None,  # [M, P] bool, True: keep
    y_mask: Tensor | None = None,  # [N, T]; "own": [M, K, T]
    *,
    reduction: str = "mean",
    pairs: str = "all",
    masked: str = "ignore",
) -> tuple[Tensor, Tensor]:
    """x_to_y and y_to_x as the public function of this name defines them; float64 in float64, everything else in float32."""
    dtype = accumulate_dtype(x.dtype)
    x_mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if x_mask is None else x_mask
    y_mask = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device) if y_mask is None else y_mask
    # masked tokens may hold anything: a product of NaN and 0 would reach the gradients
    x, y = (tokens.to(dtype).masked_fill(~mask[..., None], 0) for tokens, mask in ((x, x_mask), (y, y_mask)))
    if pairs == "aligned":
        y, y_mask = y[:, None], y_mask[:, None]
    products = "mpd,ntd->mnpt" if pairs == "all" else "mpd,mktd->mkpt"
    similarity = torch.einsum(products, x, y)  # [M, N, P, T]; [M, K, P, T]; "aligned": K = 1
    rows, columns = x_mask[:, None, :, None], (y_mask[None] if pairs == "all" else y_mask)[:, :, None]
    similarity = similarity.masked_fill(~(rows & columns), -torch.inf if masked == "ignore" else 0.0)
    x_to_y = _reduce(similarity, rows, columns, reduction)
    y_to_x = _reduce(similarity.mT, columns.mT, rows.mT, reduction)
    return (x_to_y[:, 0], y_to_x[:, 0]) if pairs == "aligned" else (x_to_y, y_to_x)


def _reduce(similarity: Tensor, rows: Tensor, columns: Tensor, reduction: str) -> Tensor:
    """The mean or sum over kept rows of the largest similarity of each; 0 where there are no rows or no columns."""
    if similarity.shape[-1] == 0:
        return similarity.sum((-2, -1))
    best = similarity.max(-1).values  # one winner, the lowest index on ties: amax would share the gradient
    there = rows[..., 0] & columns.any(-1)
    total = torch.where(there, best, 0).sum(-1)
    return total if reduction == "sum" else total / rows[..., 0].sum(-1).clamp_min(1)
