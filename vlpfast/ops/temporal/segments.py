"""segment_pool: packed tokens of segments of any length to one vector a segment."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import DTYPES, check_choice, check_cu_seqlens
from vlpfast.ops._schemas import SEGMENT_MODES, accumulate_dtype
from vlpfast.ops.temporal import reference

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type


def segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", *, score: Tensor | None = None) -> Tensor:
    """One vector for each segment of packed tokens: their mean, largest values, log of summed exponentials, or weighted mean.

    Args:
        x: [L, C] float32, float64, bfloat16 or float16, any strides.
        cu_seqlens: int32 or int64 [S + 1] from 0 to L, never falling: segment s has the tokens from cu_seqlens[s] to
            cu_seqlens[s + 1].
        mode: all are made channel by channel.
            "mean".
            "max": the gradient goes to the first of equal largest values; NaN counts as largest.
            "logsumexp": as HD-VILA merges clips; a segment of one token gives the token, of two equal ones log 2 more.
            "attention": the mean weighted by the softmax of `score` within the segment.
        score: with mode="attention", [L] or [L, H], H a divisor of C: column h weighs channels h C / H to (h + 1) C / H. Any
            floating dtype; used in the accumulating one. A token with score -inf takes no part, whatever it holds.

    Returns:
        [S, C] of x's dtype; sums are made in float32 (float64: in float64) and rounded once. A segment without tokens, or without
        one that takes part, gives 0 in every mode, without gradient. Gradients are gathered, each in one order: the same bits
        every time. The backward reads x again and keeps nothing beside it ("mean": not even x).

    Raises:
        TypeError, ValueError: a wrong argument, named. Values of cu_seqlens are checked only where they are on the host (on a
            device under VLPFAST_DEBUG=1).

    Xue et al. 2022, "Advancing High-Resolution Video-Language Representation with Large-Scale Video Transcriptions".
    """
    check_choice("mode", mode, SEGMENT_MODES)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"x: expected shape [L, C], got {tuple(x.shape)}")
    check_cu_seqlens("cu_seqlens", cu_seqlens, x)
    score = _checked_score(x, mode, score)
    start = cu_seqlens.to(torch.int64)
    backend = backends.choose("segment_pool", KERNELS, x.device, x.dtype)
    if backend == "reference":
        return reference.segment_pool(x, start, mode, score)
    return SegmentPool.apply(backend, x, start, score, SEGMENT_MODES.index(mode))


def _checked_score(x: Tensor, mode: str, score: Any) -> Tensor | None:
    """[L, H] in the accumulating dtype, contiguous."""
    if mode != "attention":
        if score is not None:
            raise ValueError(f"score: expected None with mode={mode!r}, got a {type(score).__name__}")
        return None
    if not isinstance(score, Tensor):
        raise TypeError(f"score: expected a tensor with mode='attention', got {type(score).__name__}")
    if score.dtype not in DTYPES:
        raise TypeError(f"score: expected float32, float64, bfloat16 or float16, got {score.dtype}")
    if score.ndim not in (1, 2) or score.shape[0] != x.shape[0]:
        raise ValueError(f"score: expected shape [{x.shape[0]}] or [{x.shape[0]}, H], got {tuple(score.shape)}")
    if score.device != x.device:
        raise ValueError(f"score: expected device {x.device} as x has, got {score.device}")
    if score.ndim == 1:
        score = score[:, None]
    if score.shape[1] == 0 or x.shape[1] % score.shape[1]:
        raise ValueError(f"score: expected a number of heads that divides x's width {x.shape[1]}, got {score.shape[1]}")
    return score.to(accumulate_dtype(x.dtype)).contiguous()


class SegmentPool(torch.autograd.Function):
    """segment_pool_fwd or segment_pool_fwd_triton (vlpfast/ops/_schemas.py).

    It has no jvp of its own (Dynamo refuses a Function that has one), so forward-mode differentiation ends in torch's error.
    """

    @staticmethod
    def forward(backend, x, start, score, mode):
        return backends.operator("segment_pool_fwd", backend)(x, start, score, mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend, x, start, score, ctx.mode = inputs
        ctx.length = x.shape[0]
        ctx.save_for_backward(None if SEGMENT_MODES[ctx.mode] == "mean" else x, start, score)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, start, score = ctx.saved_tensors
        _, need_x, _, need_score, _ = ctx.needs_input_grad
        dx, dscore = _Gradient.apply(ctx.backend, grad, x, start, score, ctx.length, ctx.mode, need_x, need_score)
        return None, dx if need_x else None, None, dscore if need_score else None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"segment_pool: results under vmap {backends.BY_REFERENCE}")


class _Gradient(torch.autograd.Function):
    """A step of its own in the graph: a second derivative meets an error, never a silent zero."""

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(backend, grad, x, start, score, length, mode, need_x, need_score):
        return backends.operator("segment_pool_bwd", backend)(grad, x, start, score, length, mode, need_x, need_score)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"segment_pool: second derivatives {backends.BY_REFERENCE}")
