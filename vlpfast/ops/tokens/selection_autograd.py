"""The gradients of the kernels of selection and masking."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vlpfast.ops import backends


class Select(torch.autograd.Function):
    """Arguments and results of select_fwd or select_fwd_triton (vlpfast/ops/_schemas.py); score has a gradient with `fuse` alone.

    It has no jvp of its own (Dynamo refuses a Function that has one), so forward-mode differentiation ends in torch's error.
    """

    @staticmethod
    def forward(backend, x, score, mask, k, protect, by_score, fuse, normalize):
        return backends.operator("select_fwd", backend)(x, score, mask, k, protect, by_score, fuse, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, x, score, mask, *_, ctx.fuse, ctx.normalize = inputs
        indices = output[1]
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, score, mask, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple:
        need_x, need_score = ctx.needs_input_grad[1:3]
        dx, dscore = _SelectGradient.apply(ctx.backend, grad, *ctx.saved_tensors, ctx.fuse, ctx.normalize, need_x, need_score)
        return None, dx if need_x else None, dscore if need_score else None, *[None] * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"select: results under vmap {backends.BY_REFERENCE}")


class _SelectGradient(torch.autograd.Function):
    """select_bwd or select_bwd_triton as a step of its own in the graph: a second derivative meets an error, never a silent zero.

    `once_differentiable` does not do that: inside torch.func.grad(torch.func.grad(f)) it lets a wrong result through.
    """

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(backend, grad, x, score, mask, indices, fuse, normalize, need_x, need_score):
        return backends.operator("select_bwd", backend)(grad, x, score, mask, indices, fuse, normalize, need_x, need_score)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"select: second derivatives {backends.BY_REFERENCE}")


class GatherRows(torch.autograd.Function):
    """gather_rows(x, indices, fill); back [B, N] is the inverse of indices. Its gradient is one more of it, in any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend, x, indices, fill, back):
        return backends.operator("gather_rows", backend)(x, indices, fill)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend, _, indices, fill, back = inputs
        ctx.fill_dtype = None if fill is None else fill.dtype
        ctx.save_for_backward(indices, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        indices, back = ctx.saved_tensors
        _, need_x, _, need_fill, _ = ctx.needs_input_grad
        dx = GatherRows.apply(ctx.backend, grad, back, None, indices) if need_x else None
        dfill = FilledRowsSum.apply(ctx.backend, grad, indices).to(ctx.fill_dtype) if need_fill else None
        return None, dx, None, dfill, None


class FilledRowsSum(torch.autograd.Function):
    """filled_rows_sum(x, indices)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend, x, indices):
        return backends.operator("filled_rows_sum", backend)(x, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, x, indices = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (indices,) = ctx.saved_tensors
        return None, torch.where((indices < 0)[..., None], grad, 0).to(ctx.dtype), None
