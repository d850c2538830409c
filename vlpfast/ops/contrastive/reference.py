"""The definition of the contrastive operators in plain torch: dense, any device, differentiable any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype


def pair_logsumexp(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # []
    *,
    own: int | Tensor | None = 0,  # [M] int64
    leave_out: tuple[Tensor, Tensor] | None = None,  # [M], [N] int64
    bias: Tensor | None = None,  # [] or [N]
) -> tuple[Tensor, Tensor]:
    """rows [M] and cols [N] as the public function of this name defines them; float64 in float64, everything else in float32."""
    dtype = accumulate_dtype(x.dtype)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)  # [M, N]
    if bias is not None:
        logits = logits + bias.to(dtype)
    out = torch.zeros(logits.shape, dtype=torch.bool, device=x.device)  # [M, N] True: stays out of the sums
    if leave_out is not None:
        out = leave_out[0][:, None] == leave_out[1]
    if own is None:
        kept = logits.masked_fill(out, -torch.inf)
        return kept.logsumexp(1), kept.logsumexp(0)
    row = torch.arange(x.shape[0], device=x.device)
    column = row + own if not isinstance(own, Tensor) else own  # [M] the column of each row's own pair
    out = out.index_put((row, column), torch.ones((), dtype=torch.bool, device=x.device))
    kept = logits.masked_fill(out, -torch.inf)
    own_logits = logits[row, column]  # [M]
    own_of_column = torch.zeros_like(logits[:1].sum(0)).index_put((column,), own_logits)  # [N] 0 where a column is no row's own
    return kept.logsumexp(1) - own_logits, kept.logsumexp(0) - own_of_column


def pair_softplus(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # []
    *,
    own: int | Tensor | None = 0,  # [M] int64
    leave_out: tuple[Tensor, Tensor] | None = None,  # [M], [N] int64
    bias: Tensor | None = None,  # [] or [N]
    negative_weight: float = 1.0,
) -> Tensor:
    """The 0-d sum that the public function of this name defines; float64 in float64, everything else in float32."""
    dtype = accumulate_dtype(x.dtype)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)  # [M, N]
    if bias is not None:
        logits = logits + bias.to(dtype)
    out = torch.zeros(logits.shape, dtype=torch.bool, device=x.device)  # [M, N] True: no negative
    if leave_out is not None:
        out = leave_out[0][:, None] == leave_out[1]
    own_loss = logits.new_zeros(())
    if own is not None:
        row = torch.arange(x.shape[0], device=x.device)
        column = row + own if not isinstance(own, Tensor) else own  # [M] the column of each row's own pair
        out = out.index_put((row, column), torch.ones((), dtype=torch.bool, device=x.device))
        own_loss = -F.logsigmoid(logits[row, column]).sum()
    return own_loss - negative_weight * F.logsigmoid(-logits).masked_fill(out, 0).sum()


def pair_distill(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    x_t: Tensor,  # [M, E]
    y_t: Tensor,  # [N, E]
    scale: Tensor,  # []
    scale_t: Tensor,  # []
    *,
    own: int | Tensor | None = 0,  # [M] int64
    leave_out: tuple[Tensor, Tensor] | None = None,  # [M], [N] int64
    bias_t: Tensor | None = None,  # [] or [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """student, teacher, cross [M] as the public function of this name defines them; float64 in float64, else in float32."""
    dtype = accumulate_dtype(x.dtype)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)  # [M, N]
    with torch.no_grad():
        logits_t = scale_t.to(dtype) * (x_t.to(dtype) @ y_t.to(dtype).T)
        if bias_t is not None:
            logits_t = logits_t + bias_t.to(dtype)
    out = torch.zeros(logits.shape, dtype=torch.bool, device=x.device)  # [M, N] True: stays out of the sums
    if leave_out is not None:
        out = leave_out[0][:, None] == leave_out[1]
    if own is not None:
        row = torch.arange(x.shape[0], device=x.device)
        column = row + own if not isinstance(own, Tensor) else own  # [M] the column of each row's own pair
        out = out.index_put((row, column), torch.ones((), dtype=torch.bool, device=x.device))
        logits, logits_t = (s - s[row, column][:, None] for s in (logits, logits_t))
    kept, kept_t = (s.masked_fill(out, -torch.inf) for s in (logits, logits_t))
    student, teacher = kept.logsumexp(1), kept_t.logsumexp(1)
    lowest = torch.where(teacher == -torch.inf, 0, teacher)[:, None]  # a row with no sum has the softmax 0
    return student, teacher, ((kept_t - lowest).exp() * logits.masked_fill(out, 0)).sum(1)
