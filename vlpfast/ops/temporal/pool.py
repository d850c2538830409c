"""pool_tokens: adaptive pooling of video tokens over time, height and width, channels last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import check_choice, check_count
from vlpfast.ops.temporal import reference
from vlpfast.ops.temporal._checks import check_features
from vlpfast.ops.temporal.autograd import MaxPool, MeanPool

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type


def pool_tokens(x: Tensor, out: Sequence[int | None], mode: str = "avg") -> Tensor:
    """Adaptive pooling: the result has out = (t, h, w) places in time, height and width, whatever x has.

    x: [B, T, H, W, C] or [T, H, W, C]. Place i of n along an axis of length L covers [floor(i L / n), ceil((i + 1) L / n)), as in
        torch's adaptive pools: windows differ by one in length and overlap where n does not divide L; n > L repeats.
    out: three numbers >= 1; None keeps the axis as it is.
    mode: "avg", or "max": the gradient goes to the first of equal largest values (in order t, h, w); NaN counts as largest.

    Returns [B, t, h, w, C] or [t, h, w, C] of x's dtype (float32, float64, bfloat16, float16), contiguous; sums are made in
    float32, in float64 for float64, and rounded once. Gradients are gathered, each in one order: the same bits every time.

    Raises:
        TypeError, ValueError: a wrong argument, named; an axis of length 0 that is not kept.

    Xu et al. 2024, "PLLaVA: Parameter-free LLaVA Extension from Images to Videos", with out=(16, 12, 12) of (16, 24, 24).
    """
    check_features("x", x, (4, 5), "[B, T, H, W, C] or [T, H, W, C]")
    check_choice("mode", mode, ("avg", "max"))
    sizes = _sizes(x, out)
    pooled = _pool(x if x.ndim == 5 else x[None], sizes, mode)
    return pooled if x.ndim == 5 else pooled[0]


def _pool(x: Tensor, out: tuple[int, int, int], mode: str) -> Tensor:
    backend = backends.choose("pool_tokens", KERNELS, x.device, x.dtype)
    if backend == "reference":
        return reference.pool_tokens(x, out, mode)
    if mode == "avg":
        return MeanPool.apply(backend, x, out)
    return MaxPool.apply(backend, x, out, torch.is_grad_enabled() and x.requires_grad)[0]


def _sizes(x: Tensor, out: Any) -> tuple[int, int, int]:
    if not isinstance(out, Sequence) or isinstance(out, str):
        raise TypeError(f"out: expected three numbers (t, h, w), got {type(out).__name__}")
    if len(out) != 3:
        raise ValueError(f"out: expected three numbers (t, h, w), got {len(out)}")
    sizes = []
    for axis, (n, length) in enumerate(zip(out, x.shape[-4:-1], strict=True)):
        if n is not None:
            check_count(f"out[{axis}]", n, 1)
            if length == 0:
                raise ValueError(f"x: expected at least one of the {('frames', 'rows', 'columns')[axis]} to pool, got none")
        sizes.append(length if n is None else n)
    return tuple(sizes)
