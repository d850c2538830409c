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
