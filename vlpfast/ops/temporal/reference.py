"""The definitions of the temporal operators in plain torch: any device, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype

Span = tuple[int, int]  # begin, end


def frame_shift(x: Tensor, back: Span, ahead: Span, cyclic: bool) -> Tensor:
    """Elements `back` of each row come from the frame before, elements `ahead` from the frame after; the others stay.

    x [B, F, R, E]. At the first and the last frame: from the other end if cyclic, else zeros.
    """
    before, after = x.roll(1, 1), x.roll(-1, 1)
    if not cyclic:
        frame = torch.arange(x.shape[1], device=x.device)[:, None, None]
        before, after = before.masked_fill(frame == 0, 0), after.masked_fill(frame == x.shape[1] - 1, 0)
    element = torch.arange(x.shape[3], device=x.device)
    moved = torch.where((back[0] <= element) & (element < back[1]), before, x)
    return torch.where((ahead[0] <= element) & (element < ahead[1]), after, moved).contiguous()


def pool_tokens(x: Tensor, out: tuple[int, int, int], mode: str) -> Tensor:
    """x [B, T, H, W, C] -> [B, *out, C]; sums in float32 (float64: in float64), rounded once."""
    pooled = x.to(accumulate_dtype(x.dtype))
    for axis in (3, 2, 1):  # the earliest winner along w, then h, then t is the earliest of all
        pooled = _pool_axis(pooled, axis, out[axis - 1], mode)
    return pooled.to(x.dtype).contiguous()


def _pool_axis(x: Tensor, axis: int, count: int, mode: str) -> Tensor:
    """Window i of an axis of length L is [floor(i L / count), ceil((i + 1) L / count))."""
    length = x.shape[axis]
    if count == length:
        return x
    i = torch.arange(count, device=x.device)
    start, end = i * length // count, -(-(i + 1) * length // count)
    place = start[:, None] + torch.arange(length // count + 2, device=x.device)  # [count, longest]
    windows = x.movedim(axis, 0)[place.clamp_max(length - 1)]  # [count, longest, ...]
    inside = (place < end[:, None]).reshape(*place.shape, *[1] * (x.ndim - 1))
    if mode == "max":
        # not amax: of equal ones it would share the gradient out
        pooled = torch.where(inside, windows, -torch.inf).max(1).values
    else:
        pooled = torch.where(inside, windows, 0).sum(1) / (end - start).reshape(-1, *[1] * (x.ndim - 1))
    return pooled.movedim(0, axis)


def segment_pool(x: Tensor, start: Tensor, mode: str, score: Tensor | None) -> Tensor:
    """x [L, C], start [S + 1] int64, score [L, H] in the accumulating dtype -> [S, C]; made in that dtype, rounded once."""
    length, width = x.shape
    segments = start.shape[0] - 1
    wide = x.to(accumulate_dtype(x.dtype))
    owner = torch.bucketize(torch.arange(length, device=x.device), start[1:], right=True)  # [L]: whose token it is
    if mode == "mean":
        total = wide.new_zeros(segments, width).index_add(0, owner, wide)
        return (total / start.diff().clamp_min(1)[:, None]).to(x.dtype)
    if mode == "max":
        return _first_largest(wide, owner, segments).to(x.dtype)
    if mode == "logsumexp":
        shift = _largest(wide, owner, segments)
        shift = torch.where(shift.isfinite(), shift, 0)  # [S, C]
        total = wide.new_zeros(segments, width).index_add(0, owner, (wide - shift[owner]).exp())
        return (torch.where(start.diff()[:, None] > 0, total, 1).log() + shift).to(x.dtype)
    heads = score.shape[1]
    seen = score != -torch.inf  # [L, H]
    shift = _largest(score, owner, segments)[owner]
    weight = torch.where(seen, (torch.where(seen, score - shift, 0)).exp(), 0)
    total = weight.new_zeros(segments, heads).index_add(0, owner, weight)
    # what is not seen may hold anything: a product of NaN and 0 would reach the sums
    weighted = weight[..., None] * torch.where(seen[..., None], wide.unflatten(1, (heads, width // heads)), 0)
    pooled = weighted.new_zeros(segments, heads, width // heads).index_add(0, owner, weighted)
    return (pooled / torch.where(total == 0, 1, total)[..., None]).flatten(1).to(x.dtype)


def _largest(x: Tensor, owner: Tensor, segments: int) -> Tensor:
    """Of each segment and column, without a gradient; -inf where there is none, NaN where there is one."""
    empty = x.new_full((segments, x.shape[1]), -torch.inf)
    return empty.scatter_reduce(0, owner[:, None].expand_as(x), x.detach(), "amax")


def _first_largest(x: Tensor, owner: Tensor, segments: int) -> Tensor:
    """As _largest, with a gradient to the first of equal ones; 0 where there is none."""
    largest = _largest(x, owner, segments)[owner]
    place = torch.arange(x.shape[0], device=x.device)[:, None]
    place = torch.where((x.detach() == largest) | x.isnan(), place, x.shape[0])  # [L, C]
    first = place.new_full((segments, x.shape[1]), x.shape[0]).scatter_reduce(0, owner[:, None].expand_as(place), place, "amin")
    return torch.cat((x, x.new_zeros(1, x.shape[1]))).gather(0, first)


def temporal_attention(
    q: Tensor,  # [B, Tq, P, H * Dq]
    k: Tensor,  # [B, T, P, H * Dq]
    v: Tensor,  # [B, T, P, H * Dv]
    heads: int,
    keep: Tensor | None,  # [B, T] bool, True: seen
    scale: float,
    causal: bool,
) -> Tensor:
    """[B, Tq, P, H * Dv], as the public function of this name defines it; float64 in float64, everything else in float32."""
    dtype = accumulate_dtype(q.dtype)
    q, wide_k, wide_v = (t.to(dtype).unflatten(-1, (heads, t.shape[-1] // heads)) for t in (q, k, v))
    seen = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)  # [1 or B, Tq, T]
    if causal:
        seen = seen.tril()
    if keep is not None:
        seen = seen & keep[:, None]
        # what nobody sees may hold anything: a product of NaN and 0 would reach the sums
        wide_k, wide_v = (torch.where(keep[:, :, None, None, None], t, 0) for t in (wide_k, wide_v))
    seen = seen[:, None, None]
    scores = torch.einsum("biphd,bjphd->bphij", q, wide_k) * scale  # [B, P, H, Tq, T]
    if k.shape[1] == 0:
        return torch.einsum("bphij,bjphd->biphd", scores, wide_v).flatten(3).to(v.dtype)
    scores = torch.where(seen, scores, -torch.inf)
    shift = scores.detach().amax(-1, keepdim=True)
    weight = torch.where(seen, torch.where(seen, scores - shift, 0).exp(), 0)
    total = weight.sum(-1, keepdim=True)
    weight = weight / torch.where(total == 0, 1, total)
    return torch.einsum("bphij,bjphd->biphd", weight, wide_v).flatten(3).to(v.dtype)
