"""The gradient of pair_logsumexp's kernels."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vlpfast.ops import backends


class PairLogsumexp(torch.autograd.Function):
    """Arguments and results of pair_fwd or pair_fwd_triton (vlpfast/ops/_schemas.py); rows and columns have gradients.

    It has no jvp of its own (Dynamo refuses a Function that has one), so forward-mode differentiation ends in torch's error.
    """

    @staticmethod
    def forward(backend, x, y, scale, bias, own, own_offset, row_ids, column_ids, want_rows, want_columns, want_scale, keep):
        problem = x, y, scale, bias, own, own_offset, row_ids, column_ids, want_rows, want_columns
        if backend == "triton":
            return torch.ops.vlpfast.pair_fwd_triton(*problem, want_scale, keep)
        return torch.ops.vlpfast.pair_fwd(*problem, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, x, y, scale, bias, own, ctx.own_offset, row_ids, column_ids, ctx.want_rows, ctx.want_columns, _, _ = inputs
        saved = output[2:]  # row_stats, column_stats, exact, stash
        ctx.save_for_backward(x, y, scale, bias, own, row_ids, column_ids, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # else zeros would be made for the stash

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, grad_columns: Tensor | None, *_: None) -> tuple:
        x, y, scale, bias, own, row_ids, column_ids, row_stats, column_stats, exact, stash = ctx.saved_tensors
        if grad_rows is None:
            grad_rows = row_stats.new_zeros(x.shape[0] if ctx.want_rows else 0)
        if grad_columns is None:
            grad_columns = column_stats.new_zeros(y.shape[0] if ctx.want_columns else 0)
        need_x, need_y, need_scale, need_bias = ctx.needs_input_grad[1:5]
        dx, dy, dscale, dbias = _Gradient.apply(
            ctx.backend, grad_rows, grad_columns, x, y, scale, bias, own, ctx.own_offset, row_ids, column_ids,
            ctx.want_rows, ctx.want_columns,
            row_stats, column_stats, exact, stash, need_x, need_y, need_scale, need_bias,
        )  # fmt: skip
        if need_bias and bias.ndim == 0:
            dbias = dbias.sum()
        return (
            None,
            dx if need_x else None,
            dy if need_y else None,
            dscale.reshape(()) if need_scale else None,
            dbias if need_bias else None,
            *[None] * 8,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"pair_logsumexp: results under vmap {backends.BY_REFERENCE}")


class _Gradient(torch.autograd.Function):
    """torch.ops.vlpfast.pair_bwd as a step of its own in the graph: a second derivative meets an error, never a silent zero.

    `once_differentiable` does not do that: inside torch.func.grad(torch.func.grad(f)) it lets a wrong result through.
    """

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(backend, grad_rows, grad_columns, x, y, scale, bias, own, own_offset, row_ids, column_ids,
                want_rows, want_columns, row_stats, column_stats, exact, stash,
                need_x, need_y, need_scale, need_bias):  # fmt: skip
        operator = torch.ops.vlpfast.pair_bwd_triton if backend == "triton" else torch.ops.vlpfast.pair_bwd
        return operator(
            grad_rows, grad_columns, x, y, scale, bias, own, own_offset, row_ids, column_ids, want_rows, want_columns,
            row_stats, column_stats, exact, stash, need_x, need_y, need_scale, need_bias,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"pair_logsumexp: second derivatives {backends.BY_REFERENCE}")
