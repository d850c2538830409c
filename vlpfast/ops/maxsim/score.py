"""score_ce: the cross-entropies of score matrices and their gradients in one operator."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.maxsim import reference

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type


def score_ce(
    x_to_y: Tensor,
    y_to_x: Tensor,
    scale: Tensor,
    own: int,
    labels: tuple[Tensor, Tensor] | None,
    label_smoothing: float | Tensor,
    row_weights: Tensor | None,
    col_weights: Tensor | None,
    weights: tuple[float, float],
) -> Tensor:
    """The arguments of `reference.score_ce`: checked, scores and scale in the accumulating dtype.

    A step at 32 x 32 scores is bound by launches: loss and gradients, M * N numbers each, are made in two, and the backward
    multiplies them in one. What the operator does not cover (labels, gradients of smoothing and weights) is the reference's.
    """
    others = [t for t in (label_smoothing, row_weights, col_weights) if isinstance(t, Tensor)]
    backend = "reference"
    if labels is None and not (torch.is_grad_enabled() and any(t.requires_grad for t in others)):
        backend = backends.choose("score_contrastive_loss", KERNELS, scale.device, scale.dtype)
    if backend == "reference":
        return reference.score_ce(x_to_y, y_to_x, scale, own, labels, label_smoothing, row_weights, col_weights, weights)
    if y_to_x is x_to_y:
        y_to_x = y_to_x.view_as(y_to_x)  # Dynamo refuses a Function that is given one tensor twice
    smoothing, number = (label_smoothing, 0.0) if isinstance(label_smoothing, Tensor) else (None, float(label_smoothing))
    x_to_y, y_to_x = (s if weight else None for s, weight in zip((x_to_y, y_to_x), weights, strict=True))
    need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x_to_y, y_to_x, scale)]
    return ScoreCE.apply(
        backend, x_to_y, y_to_x, scale, smoothing, row_weights, _other_than(row_weights, col_weights), own, number,
        *map(float, weights), *need,
    )[0]  # fmt: skip


def _other_than(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second.view_as(second) if second is not None and second is first else second


class ScoreCE(torch.autograd.Function):
    """Arguments and results of torch.ops.vlpfast.score_ce_fwd of one backend; the loss alone has gradients, made with it."""

    @staticmethod
    def forward(backend, x_to_y, y_to_x, scale, smoothing, row_weights, col_weights, own, label_smoothing, row_weight, col_weight,
                need_x_to_y, need_y_to_x, need_scale):  # fmt: skip
        operator = torch.ops.vlpfast.score_ce_fwd_triton if backend == "triton" else torch.ops.vlpfast.score_ce_fwd
        return operator(
            x_to_y, y_to_x, scale, smoothing, row_weights, col_weights, own, label_smoothing, row_weight, col_weight,
            need_x_to_y, need_y_to_x, need_scale,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.need = inputs[-3:]
        ctx.save_for_backward(*inputs[1:4], output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
        if any(ctx.needs_input_grad[4:7]):
            raise NotImplementedError(
                f"score_contrastive_loss: gradients of label_smoothing and of weights {backends.BY_REFERENCE}"
            )
        if grad is None:
            return (None,) * 14
        return None, *_Gradient.apply(grad, *ctx.saved_tensors, *ctx.need), *[None] * 10

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"score_contrastive_loss: results under vmap {backends.BY_REFERENCE}")


class _Gradient(torch.autograd.Function):
    """The incoming gradient times the saved ones, as a step of its own in the graph: a second derivative meets an error.

    Scores and scale take part for that alone: a gradient that did not hang on them would silently be a constant.
    """

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(grad, x_to_y, y_to_x, scale, gradients, need_x_to_y, need_y_to_x, need_scale):
        m, n = (y_to_x if x_to_y is None else x_to_y).shape
        sizes = m * n * need_x_to_y, m * n * need_y_to_x, int(need_scale)
        dx, dy, dscale = (grad * gradients).split(sizes)
        return (
            dx.view(m, n) if need_x_to_y else None,
            dy.view(m, n) if need_y_to_x else None,
            dscale.view(()) if need_scale else None,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"score_contrastive_loss: second derivatives {backends.BY_REFERENCE}")
