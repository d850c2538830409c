"""What the losses are made of beside `pair_logsumexp`: logits of single pairs, sums by id, means. Nothing here is M x N."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype

LOWEST = -1e30  # beside logits this is -inf, but its gradient through a logsumexp is 0 where that of -inf is NaN


def common_dtype(x: Tensor, *more: Tensor | None) -> tuple[Any, ...]:
    """All in the widest of their dtypes, or in autocast's where that is on (float64 stays): what the operators would cast to."""
    dtype, device = x.dtype, x.device.type
    for features in more:
        if features is not None:
            dtype = torch.promote_types(dtype, features.dtype)
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return tuple(None if features is None else features.to(dtype) for features in (x, *more))


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> for all i: [N, D], [N, D] -> [N] in the accumulating dtype, and never by a reduced-precision product."""
    dtype = accumulate_dtype(x.dtype)
    return (x.to(dtype) * y.to(dtype)).sum(-1)


class ListedDots(torch.autograd.Function):
    """<x_i, y_index[i, k]>: [M, D], [N, D], index [M, K] -> [M, K] in the accumulating dtype; K steps that need [M, D] each."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        dots = [row_dots(x, y[column]) for column in index.unbind(1)]
        return torch.stack(dots, 1) if dots else x.new_zeros(index.shape, dtype=accumulate_dtype(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, y, index = ctx.saved_tensors
        dx = torch.zeros_like(x, dtype=grad.dtype) if ctx.needs_input_grad[0] else None
        dy = torch.zeros_like(y, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for k, column in enumerate(index.unbind(1)):
            weight = grad[:, k, None]
            if dx is not None:
                dx += weight * y[column]
            if dy is not None:
                dy.index_add_(0, column, weight * x)
        return None if dx is None else dx.to(x.dtype), None if dy is None else dy.to(y.dtype), None


def listed_dots(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """See `ListedDots`."""
    return ListedDots.apply(x, y.view_as(y) if y is x else y, index)  # Dynamo refuses a Function that is given one tensor twice


def columns_of_equal_id(row_ids: Tensor, column_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns in order of their ids [N], and for each row the first place in that order with its id, and how many there are [M].

    By sorting: no shape depends on the ids, so nothing waits for a GPU.
    """
    order = column_ids.argsort(stable=True)
    ordered, row_ids = column_ids[order], row_ids.contiguous()
    first = torch.searchsorted(ordered, row_ids)
    return order, first, torch.searchsorted(ordered, row_ids, right=True) - first


def sums_of_equal_id(row_ids: Tensor, column_ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the sum [M, D] and the number [M] of the values [N, D] whose column has the row's id."""
    n = column_ids.shape[0]
    ordered, row_ids, column_ids = column_ids.sort().values, row_ids.contiguous(), column_ids.contiguous()
    group = torch.searchsorted(ordered, column_ids)  # [N] the first place of each id stands for it
    sums = values.new_zeros(n + 1, values.shape[1]).index_add(0, group, values)  # row n: no column has that id
    first = torch.searchsorted(ordered, row_ids)
    number = torch.searchsorted(ordered, row_ids, right=True) - first
    return sums[torch.where(number > 0, first, n)], number


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)) with gradient 0 where both are -inf."""
    return torch.logaddexp(a.clamp(min=LOWEST), b.clamp(min=LOWEST))


def softplus(t: Tensor) -> Tensor:
    """log(1 + exp(t)). Above its threshold torch takes t itself: exp(-40) is below float64's precision too."""
    return torch.nn.functional.softplus(t, threshold=40)


def mean(losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum(weights * losses) / sum(weights), 0 where there is nothing to average."""
    if weights is None:
        return losses.sum() / max(1, losses.numel())
    weights = weights.to(losses.dtype)
    total = weights.sum()
    return (weights * losses).sum() / torch.where(total == 0, 1, total)
