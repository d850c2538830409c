"""Image-text matching: hard negatives, and the loss of pairs that fit or do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops.contrastive import sample_hard_negatives


def hard_negatives(x: Tensor, y: Tensor, scale: Tensor, ids: Tensor | None = None, *, drawn: bool = True) -> Tensor:
    """A row of y for each row of x, hard to tell from the own one: [n] int64, -1 where there is none.

    drawn: with probability softmax(scale * <x_i, y_j>) over all j but i, from torch's generator; where all of these weights are
    0 in float32 still one of them. Else, for an evaluation that gives the same twice, the likeliest. ids [n] int64: rows of equal
    ids are no negatives of each other, such as captions of one picture.
    """
    if drawn:
        return sample_hard_negatives(x, y, scale, own=0, leave_out=None if ids is None else (ids, ids))[:, 0]
    with torch.no_grad():
        alike = torch.eye(len(x), dtype=torch.bool, device=x.device)
        if ids is not None:
            alike = alike | (ids[:, None] == ids)
        best = (x @ y.T).masked_fill(alike, -torch.inf).max(1)
        return best.indices.masked_fill(alike.all(1), -1)


def matching_loss(positive: Tensor, negative: Tensor, there: Tensor) -> Tensor:
    """Cross-entropy of two classes, the second being "fits": positive [n, 2] logits of pairs that do, negative [m, 2] of pairs
    that do not, of which those count that are there [m] bool. 0-d float32, the mean over all that count."""
    fits = F.logsigmoid((positive[:, 1] - positive[:, 0]).float())
    fits_not = F.logsigmoid((negative[:, 0] - negative[:, 1]).float())
    return -(fits.sum() + torch.where(there, fits_not, 0).sum()) / (len(positive) + there.sum()).clamp(min=1)
