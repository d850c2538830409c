"""The gradients of merging's kernels."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vlpfast.ops import backends


class Merge(torch.autograd.Function):
    """Arguments and results of merge_fwd or merge_fwd_triton (vlpfast/ops/_schemas.py).

    keep: whether the gradient needs x: that of the weights, and that of the largest. There is no jvp (Dynamo refuses a Function
    that has one), so forward-mode differentiation ends in torch's error.
    """

    @staticmethod
    def forward(backend, x, weight, index, kept, source, target, mean, largest, keep):
        return backends.operator("merge_fwd", backend)(x, weight, kept, source, target, mean, largest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, x, weight, index, *_, ctx.mean, ctx.largest, keep = inputs
        total = output[1]
        ctx.save_for_backward(index, weight, total if ctx.mean else None, x if keep else None)
        if weight is None:
            ctx.mark_non_differentiable(total)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_total: Tensor) -> tuple:
        need_x, need_weight = ctx.needs_input_grad[1:3]
        dx, dweight = _Gradient.apply(
            ctx.backend, grad_y, grad_total, *ctx.saved_tensors, ctx.mean, ctx.largest, need_x, need_weight
        )
        return None, dx if need_x else None, dweight if need_weight else None, *[None] * 7

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"merge: results under vmap {backends.BY_REFERENCE}")


class _Gradient(torch.autograd.Function):
    """merge_bwd or merge_bwd_triton as a step of its own: a second derivative meets an error, never a silent zero."""

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(backend, grad_y, grad_total, index, weight, total, x, mean, largest, need_x, need_weight):
        return backends.operator("merge_bwd", backend)(
            grad_y, grad_total, index, weight, total, x, mean, largest, need_x, need_weight
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"merge: second derivatives {backends.BY_REFERENCE}")


class Unmerge(torch.autograd.Function):
    """merge's gradient under a sum: its own gradient is that sum."""

    @staticmethod
    def forward(backend, y, index, kept, source, target):
        return backends.operator("merge_bwd", backend)(y, None, index, None, None, None, False, False, True, False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend, _, *indices = inputs
        ctx.save_for_backward(*indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        dy, _ = Merge.apply(ctx.backend, grad, None, *ctx.saved_tensors, False, False, False)
        return None, dy, *[None] * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"unmerge: results under vmap {backends.BY_REFERENCE}")
