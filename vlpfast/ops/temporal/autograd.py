"""Gradients of the temporal kernels. What is linear has derivatives of every order; none has a jvp (Dynamo refuses those)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vlpfast.ops import backends


def dense(x: Tensor) -> Tensor:
    """Any strides that the kernels read: elements of the last dimension are consecutive."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


class FrameShift(torch.autograd.Function):
    """frame_shift (vlpfast/ops/_schemas.py); the gradient is shifted the other way."""

    @staticmethod
    def forward(backend, x, back_begin, back_end, ahead_begin, ahead_end, cyclic):
        return backends.operator("frame_shift", backend)(dense(x), back_begin, back_end, ahead_begin, ahead_end, cyclic)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend, _, *ctx.spans, ctx.cyclic = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        back_begin, back_end, ahead_begin, ahead_end = ctx.spans
        dx = FrameShift.apply(ctx.backend, grad, ahead_begin, ahead_end, back_begin, back_end, ctx.cyclic)
        return None, dx, *[None] * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        return _over_clips(FrameShift, in_dims, *arguments)


class MeanPool(torch.autograd.Function):
    """pool_tokens_fwd without `largest`."""

    @staticmethod
    def forward(backend, x, out):
        return backends.operator("pool_tokens_fwd", backend)(dense(x), *out, False, False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend, x, ctx.out = inputs
        ctx.lengths = x.shape[1:4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, _MeanGradient.apply(ctx.backend, grad, ctx.out, ctx.lengths), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        return _over_clips(MeanPool, in_dims, *arguments)


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(backend, grad, out, lengths):
        none = grad.new_empty((0, *out, grad.shape[4]), dtype=torch.uint8)
        return backends.operator("pool_tokens_bwd", backend)(dense(grad), none, *lengths, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend, _, ctx.out, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, MeanPool.apply(ctx.backend, grad, ctx.out), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        return _over_clips(_MeanGradient, in_dims, *arguments)


class MaxPool(torch.autograd.Function):
    """pool_tokens_fwd with `largest`: the pooled tokens, which have a gradient where winners were kept, and the winners."""

    @staticmethod
    def forward(backend, x, out, keep_winners):
        return backends.operator("pool_tokens_fwd", backend)(dense(x), *out, True, keep_winners)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.backend, x, _, _ = inputs
        ctx.lengths = x.shape[1:4]
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        return None, _MaxGradient.apply(ctx.backend, grad, *ctx.saved_tensors, ctx.lengths), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"pool_tokens: largest values under vmap {backends.BY_REFERENCE}")


class _MaxGradient(torch.autograd.Function):
    """A step of its own in the graph: a second derivative meets an error, never a silent zero."""

    @staticmethod
    def forward(backend, grad, winners, lengths):
        return backends.operator("pool_tokens_bwd", backend)(dense(grad), winners, *lengths, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise NotImplementedError(f"pool_tokens: second derivatives of largest values {backends.BY_REFERENCE}")

    @staticmethod
    def vmap(info: Any, in_dims: Any, backend: str, grad: Tensor, winners: Tensor, lengths: Any) -> tuple[Tensor, int]:
        """torch.func.jacrev: several gradients of the same results."""
        winners = winners.expand(info.batch_size, *winners.shape).flatten(0, 1)
        return _over_clips(_MaxGradient, in_dims, backend, grad, winners, lengths)


def _over_clips(function: Any, in_dims: Any, backend: str, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """vmap: one more dimension of clips."""
    x = x.movedim(in_dims[1], 0)
    return function.apply(backend, x.flatten(0, 1), *rest).unflatten(0, x.shape[:2]), 0
