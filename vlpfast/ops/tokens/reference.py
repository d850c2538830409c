"""The definitions of merging in plain torch: any device, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype

# Instead of the cosines, which are at least -1: in this order tokens merge where those of real tokens do not suffice.
NAN, PADDING, MIXED, NEVER = -2.0, -3.0, -4.0, -5.0


def unit_rows(metric: Tensor) -> Tensor:
    """Rows of unit length in the accumulating dtype; zero rows stay."""
    wide = metric.to(accumulate_dtype(metric.dtype))
    length = wide.square().sum(-1, keepdim=True).sqrt()
    return wide / torch.where(length == 0, 1, length)


def match(
    metric: Tensor,  # [B, N, C]
    a: Tensor,  # [Na] int64, the tokens that may be merged away
    b: Tensor,  # [Nb] int64, those that they may be merged into: all others
    r: int,
    protect: int,
    mask: Tensor | None,  # [B, N]
    by_score: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """kept [B, N - r], source [B, r] and index [B, N] of vlpfast.ops.tokens.Match; 1 <= r <= Na, Nb >= 1."""
    unit = unit_rows(metric)
    similarity = unit[:, a] @ unit[:, b].transpose(1, 2)  # [B, Na, Nb]
    similarity = torch.where(similarity.isnan(), NAN, similarity)
    if mask is not None:
        real_a, real_b = mask[:, a, None], mask[:, None, b]
        similarity = torch.where(real_a & real_b, similarity, torch.where(real_a == real_b, PADDING, MIXED))
    similarity = torch.where((a[:, None] < protect) | (b < protect), NEVER, similarity)
    best, to = similarity.max(2)  # [B, Na]
    order = best.argsort(dim=1, descending=True, stable=True)
    rest = order[:, r:] if by_score else order[:, r:].sort(dim=1).values
    batch, n = metric.shape[:2]
    kept = torch.cat((a[rest], b.expand(batch, -1)), 1)
    source = a[order[:, :r]]
    target = len(a) - r + to.gather(1, order[:, :r])
    index = torch.empty(batch, n, dtype=torch.int64, device=metric.device)
    index = index.scatter(1, kept, torch.arange(n - r, device=metric.device).expand(batch, -1))
    return kept, source, index.scatter(1, source, target)


def merge(
    x: Tensor,  # [B, N, C]
    kept: Tensor,
    source: Tensor,
    index: Tensor,
    weight: Tensor | None,  # [B, N] in the accumulating dtype
    divide: bool,
    largest: bool,
) -> tuple[Tensor, Tensor]:
    """Merged tokens [B, N - r, C] and the sums of their weights [B, N - r] (None: how many tokens they are)."""
    wide = x.to(accumulate_dtype(x.dtype))
    rows = index[..., None].expand_as(x)
    single = torch.ones_like(kept).scatter_add(1, index.gather(1, source), torch.ones_like(source)) == 1
    weights = weight if weight is not None else wide.new_ones(index.shape)
    total = wide.new_zeros(kept.shape).scatter_add(1, index, weights)
    first = wide.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))  # [B, N - r, C]
    if largest:
        y = first
        for s in source.unbind(1):
            to = index.gather(1, s[:, None])[..., None].expand(-1, 1, x.shape[2])
            old, new = y.gather(1, to), wide.gather(1, s[:, None, None].expand_as(to))
            y = y.scatter(1, to, torch.where((new <= old) | old.isnan(), old, new))
    else:
        y = torch.zeros_like(first).scatter_add(1, rows, wide if weight is None else wide * weight[..., None])
        if divide:
            none = total == 0
            y = torch.where(none[..., None], 0, y / torch.where(none, 1, total)[..., None])
    return torch.where(single[..., None], first, y).to(x.dtype), total


def unmerge(y: Tensor, index: Tensor) -> Tensor:
    """y [B, N - r, C] -> [B, N, C]: what each token has become."""
    return y.gather(1, index[..., None].expand(-1, -1, y.shape[2]))
