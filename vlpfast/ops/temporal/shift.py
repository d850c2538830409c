"""token_roll and channel_shift: parts of each frame are exchanged with the frames beside it, without parameters."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import check_count, check_flag
from vlpfast.ops.temporal import reference
from vlpfast.ops.temporal._checks import check_features
from vlpfast.ops.temporal.autograd import FrameShift

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type


def token_roll(x: Tensor, fold: int, *, skip: int = 1, both_ways: bool = True) -> Tensor:
    """All-in-one's token rolling: `fold` tokens of each frame come from the frame before, `fold` from the one after.

    x: [B, F, N, C], frame t of F in order of time, N tokens each, of which the first `skip` (class tokens) stay. Tokens skip to
    skip + fold - 1 of frame t are those of frame t - 1; with both_ways the last `fold` are those of frame t + 1. Frames are taken
    in a circle: the first one's predecessor is the last. All other tokens stay. All-in-one has fold = N // 8.

    Returns [B, F, N, C] of x's dtype (float32, float64, bfloat16, float16), contiguous: a permutation, whose gradient is the
    inverse one.

    Raises:
        TypeError, ValueError: a wrong argument, named; fold is too large where the parts that move would overlap.

    Wang et al. 2023, "All in One: Exploring Unified Video-Language Pre-training".
    """
    check_features("x", x, (4,), "[B, F, N, C]")
    check_count("fold", fold, 0)
    check_count("skip", skip, 0)
    check_flag("both_ways", both_ways)
    n, c = x.shape[2:]
    if skip + fold * (1 + both_ways) > n:
        most = max(0, n - skip) // (1 + both_ways)
        raise ValueError(f"fold: expected at most {most} with {n} tokens and skip={skip}, got {fold}")
    last = n - fold if both_ways else n
    rows = x.flatten(2).unsqueeze(2)
    return _shift("token_roll", rows, (skip * c, (skip + fold) * c), (last * c, n * c), True).view(x.shape)


def channel_shift(x: Tensor, fold: int, *, n_segment: int | None = None, inplace: bool = False) -> Tensor:
    """TSM's temporal shift: the first `fold` channels come from the next frame, the `fold` after them from the one before.

    x: with n_segment=None [B, F, ..., C], channels last (tokens, [B, F, H, W, C]); with n_segment=F [B * F, C, ...], TSM's own
        layout, the F frames of a clip one after another, contiguous or in torch's channels_last, which the result keeps.
    fold: channels; TSM has fold = C // 8. The last frame has no next one and the first none before it: zeros.
    inplace: writes into x and returns it; only the 2 * fold channels are touched.

    Returns x's shape and dtype (float32, float64, bfloat16, float16). Gradients are shifted back.

    Raises:
        TypeError, ValueError: a wrong argument, named; inplace with an x that needs a gradient, that overlaps itself in memory
            (expanded), or whose frames do not lie in memory dimension by dimension.

    Lin, Gan and Han 2019, "TSM: Temporal Shift Module for Efficient Video Understanding".
    """
    if n_segment is None:
        check_features("x", x, None, "[B, F, ..., C]", least=3)
    else:
        check_features("x", x, None, "[B * F, C, ...]", least=2)
        check_count("n_segment", n_segment, 1)
        if x.shape[0] % n_segment:
            raise ValueError(f"n_segment: expected a divisor of x's first dimension, {x.shape[0]}, got {n_segment}")
    check_count("fold", fold, 0)
    check_flag("inplace", inplace)
    channels = x.shape[-1] if n_segment is None else x.shape[1]
    if 2 * fold > channels:
        raise ValueError(f"fold: expected at most {channels // 2} with {channels} channels, got {fold}")
    frames = x if n_segment is None else x.unflatten(0, (x.shape[0] // n_segment, n_segment))
    channels_last = n_segment is None or (not x.is_contiguous() and x.movedim(1, -1).is_contiguous())
    if n_segment is not None and channels_last:
        frames = frames.movedim(2, -1)
    if channels_last:  # [B, F, ..., C]
        rows, joined = frames if frames.ndim > 3 else frames.unsqueeze(2), (2, -2)
    else:  # [B, F, 1, C, ...]: the channels that move are one piece of a row
        rows, joined = frames.unsqueeze(2), (3, -1)
        fold *= math.prod(frames.shape[3:])
    if inplace:
        _check_inplace(x, rows, *joined)
        _shift_in_place("channel_shift", rows.flatten(*joined), fold)
        return x
    shifted = _shift("channel_shift", rows.flatten(*joined), (fold, 2 * fold), (0, fold), False).view(frames.shape)
    if n_segment is None:
        return shifted
    return (shifted.movedim(-1, 2) if channels_last else shifted).flatten(0, 1)


def _shift(name: str, x: Tensor, back: reference.Span, ahead: reference.Span, cyclic: bool) -> Tensor:
    backend = backends.choose(name, KERNELS, x.device, x.dtype)
    if backend == "reference":
        return reference.frame_shift(x, back, ahead, cyclic)
    return FrameShift.apply(backend, x, *back, *ahead, cyclic)


def _shift_in_place(name: str, x: Tensor, fold: int) -> None:
    backend = backends.choose(name, KERNELS, x.device, x.dtype)
    if backend == "reference":
        x.copy_(reference.frame_shift(x, (fold, 2 * fold), (0, fold), False))
        return
    if not (torch.compiler.is_compiling() or x.is_inference()):
        torch.autograd.graph.increment_version(x)  # who has saved x for a backward is told
    backends.operator("frame_shift_", backend)(x, fold, 2 * fold, 0, fold)


def _check_inplace(x: Tensor, rows: Tensor, first: int, last: int) -> None:
    """rows: a view of x whose dimensions first to last are to be one."""
    if torch.is_grad_enabled() and x.requires_grad:
        what = "a leaf that requires one" if x.is_leaf else "one that requires one"
        raise ValueError(f"x: expected a tensor without a gradient for inplace=True (or torch.no_grad()), got {what}")
    dims = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(dims):  # a step must go beyond all that the smaller ones reach; no sort, which Dynamo refuses
        reach = sum(s * (size - 1) for j, (s, size) in enumerate(dims) if s < stride or (s == stride and j < i))
        if stride <= reach:
            raise ValueError(f"x: expected memory that does not overlap for inplace=True, got strides {x.stride()}")
    last %= rows.ndim
    joined = [(rows.stride(i), rows.shape[i]) for i in range(first, last + 1) if rows.shape[i] > 1]
    apart = any(outer[0] != inner[0] * inner[1] for outer, inner in pairwise(joined))
    if apart or ((flat := rows.flatten(first, last)).shape[-1] > 1 and flat.stride(-1) != 1):
        raise ValueError(f"x: expected frames that lie in memory row by row for inplace=True, got strides {x.stride()}")
