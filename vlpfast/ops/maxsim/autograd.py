"""The gradient of maxsim's kernels."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vlpfast.ops import backends


class MaxSim(torch.autograd.Function):
    """Arguments and results of maxsim_fwd or maxsim_fwd_triton (vlpfast/ops/_schemas.py); the scores have gradients.

    It has no jvp of its own (Dynamo refuses a Function that has one), so forward-mode differentiation ends in torch's error.
    """

    @staticmethod
    def forward(backend, x, y, x_start, y_start, x_keep, y_keep, x_longest, y_longest, candidates,
                want_x_to_y, want_y_to_x, mean, zero, keep):  # fmt: skip
        operator = torch.ops.vlpfast.maxsim_fwd_triton if backend == "triton" else torch.ops.vlpfast.maxsim_fwd
        return operator(
            x, y, x_start, y_start, x_keep, y_keep, x_longest, y_longest, candidates, want_x_to_y, want_y_to_x, mean, zero, keep
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, *tensors, ctx.x_longest, ctx.y_longest, ctx.candidates, _, _, ctx.mean, ctx.zero, _ = inputs
        winners = output[2:]
        ctx.save_for_backward(*tensors, *winners)
        ctx.mark_non_differentiable(*winners)
        ctx.set_materialize_grads(False)  # a direction without a gradient takes no part in the backward

    @staticmethod
    def backward(ctx: Any, grad_x_to_y: Tensor | None, grad_y_to_x: Tensor | None, *_: None) -> tuple:
        x, y, x_start, y_start, x_keep, y_keep, y_of_x, x_of_y = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[1:3]
        dx, dy = _Gradient.apply(
            ctx.backend, grad_x_to_y, grad_y_to_x, x, y, x_start, y_start, x_keep, y_keep, ctx.x_longest, ctx.y_longest,
            ctx.candidates, ctx.mean, ctx.zero, y_of_x, x_of_y, need_x, need_y,
        )  # fmt: skip
        return None, dx if need_x else None, dy if need_y else None, *[None] * 12

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"maxsim: results under vmap {backends.BY_REFERENCE}")


class _Gradient(torch.autograd.Function):
    """maxsim_bwd or maxsim_bwd_triton as a step of its own in the graph: a second derivative meets an error, never a silent zero.

    `once_differentiable` does not do that: inside torch.func.grad(torch.func.grad(f)) it lets a wrong result through.
    """

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(backend, grad_x_to_y, grad_y_to_x, x, y, x_start, y_start, x_keep, y_keep, x_longest, y_longest, candidates,
                mean, zero, y_of_x, x_of_y, need_x, need_y):  # fmt: skip
        operator = torch.ops.vlpfast.maxsim_bwd_triton if backend == "triton" else torch.ops.vlpfast.maxsim_bwd
        return operator(
            grad_x_to_y, grad_y_to_x, x, y, x_start, y_start, x_keep, y_keep, x_longest, y_longest, candidates,
            mean, zero, y_of_x, x_of_y, need_x, need_y,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"maxsim: second derivatives {backends.BY_REFERENCE}")
