"""The readable family: contrastive losses of published systems on the operators of this package."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops.contrastive._checks import check_features
from vlpfast.ops.contrastive.pair import STASH_BYTES, pair_logsumexp


def clip_loss(x: Tensor, y: Tensor, scale: float | Tensor, *, stash_bytes: int = STASH_BYTES) -> Tensor:
    """CLIP's loss: the mean of the cross-entropies of rows and of columns of scale * x @ y.T, where row i belongs to column i.

    Exact in float32 down to a loss of 1e-31. x and y are [N, D], unit length in CLIP's use; see `pair_logsumexp` for dtypes,
    scale and stash_bytes. Returns a 0-d tensor, float32 (float64 for float64 features); 0 for N = 0.
    Radford et al. 2021, "Learning transferable visual models from natural language supervision".
    """
    check_features(x, y)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"y: expected as many rows as x, {x.shape[0]}, got {y.shape[0]}")
    rows, cols = pair_logsumexp(x, y, scale, stash_bytes=stash_bytes)
    # above its threshold torch takes softplus(t) = t: exp(-40) is below float64's precision too
    losses = F.softplus(rows, threshold=40).sum() + F.softplus(cols, threshold=40).sum()
    return losses / (2 * max(1, x.shape[0]))
