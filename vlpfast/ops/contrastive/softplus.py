"""pair_softplus: the sigmoid loss over all pairs of two sets of features, without their matrix of logits."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import same_dtype
from vlpfast.ops.contrastive import reference
from vlpfast.ops.contrastive._checks import (
    check_bias,
    check_features,
    check_leave_out,
    check_loss_scale,
    check_nonnegative,
    check_own,
    check_scale,
)

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type


def pair_softplus(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    own: int | Tensor | None = 0,
    leave_out: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    negative_weight: float | None = None,
) -> Tensor:
    """The sum of softplus(-logit) over own pairs, plus negative_weight times the sum of softplus(logit) over all other pairs.

    The logits are S = scale * x @ y.T (+ bias), [M, N], and are never held whole: -log sigmoid(S) for pairs that belong
    together, -log sigmoid(-S) for pairs that do not. Where a gradient is wanted the forward makes it with the loss: three matrix
    products, and no memory that grows with M * N; else one.

    Args:
        x: [M, D] float32, float64, bfloat16 or float16, any strides; half types are multiplied and summed in float32. Of two
            different dtypes the wider is used. Under autocast x and y (float64 apart) are cast to its dtype, nothing else is.
        y: [N, D]
        scale: a float >= 0, or a 0-d tensor (its gradient is made).
        own: offset (row i's own pair is column i + own; 0 <= own <= N - M), an int64 tensor [M] of columns (one column may be
            the own of several rows), or None: no row has an own pair, all pairs are negatives.
        leave_out: (row_ids [M], column_ids [N]), int64: pairs with equal ids are no negatives. Own pairs count all the same.
        bias: 0-d or [N], added to the logits of every row (its gradient is made).
        negative_weight: a float >= 0; None is 1.

    Returns:
        0-d, float32 (float64 for float64 features), 0 where there is no pair. It keeps its relative precision near zero;
        in float32 negatives with logits below -87.3 count nothing.

    Raises:
        TypeError, ValueError: a wrong argument, named. The values in `own` are checked only where they are on the host (on a
            device under VLPFAST_DEBUG=1).
    """
    x, y, scale, bias, negative_weight = _checked(x, y, scale, own, leave_out, bias, negative_weight)
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return _pair_softplus(x, y, scale, own, leave_out, bias, negative_weight)
    if x.dtype != torch.float64:
        x, y = x.to(torch.get_autocast_dtype(device)), y.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _pair_softplus(x, y, scale, own, leave_out, bias, negative_weight)


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    *,
    own: int | Tensor | None = 0,
    leave_out: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """SigLIP's loss: -log sigmoid(+-(scale * x @ y.T + bias)), + for own pairs, summed over columns, the mean over rows.

    x is [M, D], y [N, D], unit length in SigLIP's use, where scale and bias are learned and start at 10 and -10; bias is 0-d, [N]
    or None; a scale that is a number must be > 0. See `pair_softplus` for all arguments. Returns a 0-d tensor, float32 (float64
    for float64 features); 0 for M = 0.
    Zhai et al. 2023, "Sigmoid loss for language image pre-training".
    """
    check_loss_scale(scale)
    return pair_softplus(x, y, scale, own=own, leave_out=leave_out, bias=bias) / max(1, x.shape[0])


def _pair_softplus(x, y, scale, own, leave_out, bias, negative_weight) -> Tensor:
    backend = backends.choose("pair_softplus", KERNELS, x.device, x.dtype)
    if backend == "reference":
        return reference.pair_softplus(x, y, scale, own=own, leave_out=leave_out, bias=bias, negative_weight=negative_weight)
    own_index, own_offset = (own, None) if isinstance(own, Tensor) else (None, own)
    row_ids, column_ids = leave_out if leave_out is not None else (None, None)
    need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, y, scale, bias)]
    return PairSoftplus.apply(backend, x, y, scale, bias, own_index, own_offset, row_ids, column_ids, negative_weight, *need)[0]


def _checked(x, y, scale, own, leave_out, bias, negative_weight) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """x and y in one dtype, scale and bias as tensors of the accumulating dtype; raises on a wrong argument."""
    check_features(x, y)
    m, n = x.shape[0], y.shape[0]
    x, y = same_dtype(x, y)
    scale = check_scale(scale, x)
    check_own(own, m, n, x.device, unique=False)
    if leave_out is not None:
        check_leave_out(leave_out, m, n, x.device)
    if bias is not None:
        bias = check_bias(bias, x, n)
    weight = 1.0 if negative_weight is None else check_nonnegative("negative_weight", negative_weight, "a float or None")
    return x, y, scale, bias, weight


class PairSoftplus(torch.autograd.Function):
    """Arguments and results of torch.ops.vlpfast.pair_softplus of one backend; the loss alone has gradients.

    They come with the loss, in the accumulating dtype: a half type's are rounded once, after the incoming gradient (a mean's
    small factor, a loss scaler's large one) has been multiplied in.
    """

    @staticmethod
    def forward(backend, x, y, scale, bias, own, own_offset, row_ids, column_ids, negative_weight, need_x, need_y, need_scale,
                need_bias):  # fmt: skip
        operator = torch.ops.vlpfast.pair_softplus_triton if backend == "triton" else torch.ops.vlpfast.pair_softplus
        return operator(
            x, y, scale, bias, own, own_offset, row_ids, column_ids, negative_weight, need_x, need_y, need_scale, need_bias
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        gradients = output[1:]
        ctx.save_for_backward(*inputs[1:5], *gradients)
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
        if grad is None:
            return (None,) * 14
        gradients = _Gradient.apply(grad, *ctx.saved_tensors)
        needed = ctx.needs_input_grad[1:5]
        return None, *[g if n else None for g, n in zip(gradients, needed, strict=True)], *[None] * 9

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"pair_softplus: results under vmap {backends.BY_REFERENCE}")


class _Gradient(torch.autograd.Function):
    """The incoming gradient times the saved ones, as a step of its own in the graph: a second derivative meets an error.

    x, y, scale and bias take part for that alone: a gradient that did not hang on them would silently be a constant.
    """

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(grad, x, y, scale, bias, dx, dy, dscale, dbias):
        if bias is not None and bias.ndim == 0:
            dbias = dbias.sum()
        return (grad * dx).to(x.dtype), (grad * dy).to(y.dtype), grad * dscale.sum(), grad * dbias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"pair_softplus: second derivatives {backends.BY_REFERENCE}")
