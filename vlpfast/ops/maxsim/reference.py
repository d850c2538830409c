"""The definition of late interaction in plain torch: dense, any device, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive._parts import LOWEST, mean, softplus


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


def score_ce(
    x_to_y: Tensor,  # [M, N]
    y_to_x: Tensor,  # [M, N]
    scale: Tensor,
    own: int,
    labels: tuple[Tensor, Tensor] | None,
    label_smoothing: float | Tensor,
    row_weights: Tensor | None,
    col_weights: Tensor | None,
    weights: tuple[float, float],
) -> Tensor:
    """`score_contrastive_loss` with checked arguments; `weights`: of the rows' mean and of the columns' mean."""
    if labels is not None:
        positive = labels[0][:, None] == labels[1]  # [M, N] bool: the pairs that belong together
    else:
        m, n = x_to_y.shape
        positive = torch.arange(m, device=x_to_y.device)[:, None] + own == torch.arange(n, device=x_to_y.device)
    sides = []
    for weight, scores, targets, over in (
        (weights[0], x_to_y, positive, row_weights),
        (weights[1], y_to_x.T, positive.T, col_weights),
    ):
        if weight:
            sides.append(weight * _cross_entropy(scores, scale, targets, labels is None, label_smoothing, over))
    return sum(sides[1:], sides[0])


def _cross_entropy(scores, scale, positive, single, label_smoothing, weights) -> Tensor:
    """The mean over rows of scores [M, N] of the cross-entropy with equal shares of the target on the positives [M, N].

    single: every row has exactly one.
    """
    number = positive.sum(1)

    def above_positives(scores: Tensor) -> Tensor:
        """Logits relative to the mean over the row's positives: [M, N]."""
        average = torch.where(positive, scores, 0).sum(1) / number.clamp(min=1)
        return scale * (scores - average[:, None])

    relative = above_positives(scores)
    negatives = torch.where(positive, LOWEST, relative).logsumexp(1)
    if single:
        losses = softplus(negatives)
    else:
        # By an alias, so that what goes to the average and what to the positives meet before the negatives' part is added: of
        # a single positive they cancel, and what is left may be 1e-31 of them.
        spread = torch.where(positive, above_positives(scores.view_as(scores)), LOWEST).logsumexp(1)
        losses = spread + softplus(negatives - spread)
    if isinstance(label_smoothing, Tensor) or label_smoothing:
        losses = losses - label_smoothing * (relative.sum(1) / max(1, relative.shape[1]))
    if single:
        return mean(losses, weights)
    has_any = number > 0
    return mean(torch.where(has_any, losses, 0), has_any if weights is None else weights * has_any)
