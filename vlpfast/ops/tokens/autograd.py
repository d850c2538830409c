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


class AddMergeNorm(torch.autograd.Function):
    """Arguments and results of add_merge_norm_fwd (vlpfast/ops/_schemas.py). There is no jvp, as of Merge.

    Backward: the norm's gradient is added to y's, and that is spread over the tokens. It needs y, its rows' statistics, no token.
    """

    @staticmethod
    def forward(backend, x, delta, size, index, kept, source, target, weight, bias, eps, weighted, wide):
        forward = backends.operator("add_merge_norm_fwd", backend)
        return forward(x, delta, size, kept, source, target, weight, bias, eps, weighted, wide)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, x, delta, size, index, kept, _, _, weight, _, _, weighted, _ = inputs
        y, total, _, stats = output
        ctx.delta_dtype = delta.dtype if delta.dtype != x.dtype else None
        ctx.save_for_backward(y, stats, size if weighted else None, index, kept, weight)
        ctx.mark_non_differentiable(total, stats)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, _: Tensor, grad_normed: Tensor, __: Tensor) -> tuple:
        need_x, need_delta, need_weight, need_bias = (ctx.needs_input_grad[i] for i in (1, 2, 8, 9))
        dx, ddelta, dweight, dbias = _AddMergeNormGradient.apply(
            ctx.backend, grad_y, grad_normed, *ctx.saved_tensors, ctx.delta_dtype, need_x or need_delta, need_weight or need_bias
        )
        ddelta = dx if ctx.delta_dtype is None else ddelta
        of_tokens = dx if need_x else None, ddelta if need_delta else None
        return None, *of_tokens, *[None] * 5, dweight if need_weight else None, dbias if need_bias else None, *[None] * 3

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"add_merge_norm: results under vmap {backends.BY_REFERENCE}")


class _AddMergeNormGradient(torch.autograd.Function):
    """add_merge_norm_bwd as a step of its own, as _Gradient."""

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(backend, grad_y, grad_normed, y, stats, size, index, kept, weight, delta_dtype, need_x, need_weight):
        return backends.operator("add_merge_norm_bwd", backend)(
            grad_y, grad_normed, y, stats, size, index, kept, weight, delta_dtype, need_x, need_weight
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"add_merge_norm: second derivatives {backends.BY_REFERENCE}")


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
