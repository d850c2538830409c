"""The definition of matching and merging in plain torch: dense, any device; merging is differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.maxsim.maxsim import unit_tokens


def split(n: int, every: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The places of sets A and B, ascending: B has every `every`-th of n."""
    b = torch.arange(every - 1, n, every, device=device)
    a = torch.arange(n - b.shape[0], device=device)
    return a + a // (every - 1), b


def match(
    metric: Tensor,  # [B, N, C]
    a: Tensor,  # [Na] int64, places, ascending
    b: Tensor,  # [Nb] int64, the others, ascending
    protect: int,
    r: int,  # >= 1
    by_score: bool,
    mask: Tensor | None,  # [B, N] bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """index [B, N], kept [B, N - r], source [B, r], target [B, r]: Match of vlpfast/ops/tokens/matching.py."""
    batch, n, _ = metric.shape
    device = metric.device
    may = torch.arange(n, device=device) >= protect  # [N] be merged at all
    real = metric.new_ones((batch, n), dtype=torch.bool) if mask is None else mask
    unit = unit_tokens(metric.to(accumulate_dtype(metric.dtype)))
    similarity = unit[:, a] @ unit[:, b].mT  # [B, Na, Nb]
    real_b, padding_b = (may & real)[:, b], (may & ~real)[:, b]
    best, to = similarity.masked_fill(~real_b[:, None] | similarity.isnan(), -torch.inf).max(-1)  # the first on ties

    # What merges first: real tokens by similarity, those that have none, padding, what finds nothing of its own kind. Protected
    # ones lead, and are not taken.
    real_a, padding_a, none = real[:, a] & real_b.any(-1, keepdim=True), ~real[:, a] & padding_b.any(-1, keepdim=True), best < -2
    key = torch.where(real_a, torch.where(none, -3, best), torch.where(padding_a, -4, -5)).masked_fill(~may[a], torch.inf)
    order = key.argsort(dim=-1, descending=True, stable=True)  # [B, Na]
    places = torch.arange(len(a), device=device)
    first_other = (key > -5).sum(-1, keepdim=True)
    free = (~may[b]).to(torch.int8).argsort(stable=True)  # of B, before those that are protected
    in_turn = free[(places - first_other).clamp_min(0) % may[b].sum().clamp_min(1)]  # [B, Na] in the order of `order`
    to = torch.where(none, real_b.to(torch.int8).argmax(-1, keepdim=True), to)
    to = torch.where(real[:, a], to, padding_b.to(torch.int8).argmax(-1, keepdim=True)).gather(1, order)
    to = torch.where(places < first_other, to, in_turn)

    lead = (~may[a]).sum()  # protected tokens of A, a prefix of `order`; its rest is moved to the front, where shapes are known
    order, to = (t.gather(1, ((places + lead) % len(a)).expand(batch, -1)) for t in (order, to))
    source, rest = a[order[:, :r]], a[order[:, r:]]
    rest = torch.cat([rest, b.expand(batch, -1)], 1)
    # sorted by what comes first: protected tokens by place, then A by score or place, then B
    rank = torch.arange(rest.shape[1], device=device).expand(batch, -1)
    in_a = rank < len(a) - r
    if not by_score:
        rank = torch.where(in_a, rest - n, rank)
    rank = torch.where(rest < protect, rest - 2 * n, rank)
    kept = rest.gather(1, rank.argsort(dim=1, stable=True))
    index = torch.zeros(batch, n, dtype=torch.int64, device=device)
    index = index.scatter(1, kept, torch.arange(n - r, device=device).expand(batch, -1))
    target = index.gather(1, b[to[:, :r]])
    return index.scatter(1, source, target), kept, source, target


def merge(
    x: Tensor,  # [B, N, C]
    index: Tensor,  # [B, N] int64 in [0, count), each of them at least once
    count: int,
    weight: Tensor | None,  # [B, N], >= 0; of a mean
    *,
    mean: bool = False,
    largest: bool = False,
) -> tuple[Tensor, Tensor]:
    """[B, count, C]: the sum of the tokens that go to each place, or their mean or largest; [B, count]: the sum of their weights.

    float64 in float64, everything else in float32, rounded once. Without weights each is 1. The mean where all weights are 0 is
    0, and numbers that are none do not come through a weight of 0. The largest is that of the lowest place on ties.
    """
    batch, n, width = x.shape
    wide = x.to(accumulate_dtype(x.dtype))
    weight = wide.new_ones(batch, n) if weight is None else weight.to(wide.dtype)
    total = weight.new_zeros(batch, count).scatter_add(1, index, weight)
    to = index[..., None].expand(x.shape)
    if largest:
        start = wide.new_zeros(batch, count, width)
        best = start.scatter_reduce(1, to, wide.detach(), "amax", include_self=False).gather(1, to)
        is_best = (wide == best) | (wide.isnan() & best.isnan())
        place = torch.arange(n, device=x.device)[:, None].expand(x.shape).masked_fill(~is_best, n)
        winner = torch.full_like(start, n, dtype=torch.int64).scatter_reduce(1, to, place, "amin")
        return x.gather(1, winner), total
    if mean:
        own = total.gather(1, index)
        share = torch.where(own == 0, 0, weight / torch.where(own == 0, 1, own))
        wide = wide.masked_fill((weight == 0)[..., None] & ~wide.isfinite(), 0) * share[..., None]
    return wide.new_zeros(batch, count, width).scatter_add(1, to, wide).to(x.dtype), total


def add_merge_norm(
    x: Tensor,  # [B, N, C]
    delta: Tensor,
    index: Tensor,  # [B, N]
    count: int,
    size: Tensor | None,  # [B, N]
    weight: Tensor,  # [C]
    bias: Tensor,
    eps: float,
    weighted: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, count, C], the means of x + delta, rounded once; the sums of sizes [B, count]; the layer norm of y [B, count, C]."""
    dtype = accumulate_dtype(x.dtype)
    y, total = merge(x.to(dtype) + delta.to(dtype), index, count, size if weighted else None, mean=True)
    if size is not None and not weighted:
        total = size.new_zeros(total.shape).scatter_add(1, index, size)
    y = y.to(x.dtype)
    normed = torch.nn.functional.layer_norm(y.to(dtype), y.shape[-1:], weight, bias, eps)
    return y, total, normed if wide else normed.to(x.dtype)


def unmerge(y: Tensor, index: Tensor) -> Tensor:
    """[B, N, C]: each token gets what is at its place of y [B, N - r, C]."""
    return y.gather(1, index[..., None].expand(*index.shape, y.shape[2]))
