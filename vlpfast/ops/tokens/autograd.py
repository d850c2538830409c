"""Gradients of the merging kernels."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def operator(name: str, backend: str) -> Any:
    return getattr(torch.ops.vlpfast, f"{name}_triton" if backend == "triton" else name)


def dense(x: Tensor) -> Tensor:
    """Any strides that the kernels read: elements of the last dimension are consecutive."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


class Merge(torch.autograd.Function):
    """merge_fwd (vlpfast/ops/_schemas.py). keep: x, which the gradient of weights and of largest values needs.

    It has no jvp (Dynamo refuses a Function that has one), so forward-mode differentiation ends in torch's error.
    """

    @staticmethod
    def forward(backend, x, kept, source, index, weight, divide, largest, keep):
        return operator("merge_fwd", backend)(dense(x), kept, source, index, weight, divide, largest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, x, *match, weight, ctx.divide, ctx.largest, keep = inputs
        ctx.save_for_backward(x if keep else None, *match, weight)
        ctx.set_materialize_grads(False)
        ctx.like = (*match[0].shape, x.shape[2]), x.dtype, x.device

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple:
        x, kept, source, index, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[1], ctx.needs_input_grad[5]
        if grad is None:
            shape, dtype, device = ctx.like
            grad = torch.zeros(shape, dtype=dtype, device=device)
        dx, dweight = MergeGradient.apply(
            ctx.backend, grad, grad_total, x, kept, source, index, weight, ctx.divide, ctx.largest, need_x, need_weight
        )
        return None, dx if need_x else None, None, None, None, dweight if need_weight else None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"merge: results under vmap {_BY_REFERENCE}")


class MergeGradient(torch.autograd.Function):
    """A step of its own in the graph: a second derivative meets an error, never a silent zero."""

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(backend, grad, grad_total, x, kept, source, index, weight, divide, largest, need_x, need_weight):
        return operator("merge_bwd", backend)(
            dense(grad), grad_total, None if x is None else dense(x), kept, source, index, weight, divide, largest, need_x,
            need_weight,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"merge: second derivatives {_BY_REFERENCE}")


class Unmerge(torch.autograd.Function):
    """The gradient of a sum, and its gradient the sum: derivatives of every order."""

    @staticmethod
    def forward(backend, y, kept, source, index):
        return operator("merge_bwd", backend)(dense(y), None, None, kept, source, index, None, False, False, True, False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend, _, *match = inputs
        ctx.save_for_backward(*match)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        dy, _ = Merge.apply(ctx.backend, grad, *ctx.saved_tensors, None, False, False, False)
        return None, dy, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"unmerge: results under vmap {_BY_REFERENCE}")


_BY_REFERENCE = 'are made by the reference backend alone: wrap the call in vlpfast.ops.backends.use("reference")'
