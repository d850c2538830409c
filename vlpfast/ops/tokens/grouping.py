"""Hard grouping of tokens: an assignment with a gradient, and the mean of what is assigned to each group."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vlpfast.ops._checks import check_flag, check_tensor
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive.reference import gumbel
from vlpfast.ops.tokens import reference_selection as reference
from vlpfast.ops.tokens.selection import check_tokens


def group_assign(logits: Tensor, tau: float = 1.0, *, hard: bool = True, seed: Tensor | None = None) -> Tensor:
    """Assigns every token to one group, or softly to all.

    soft = softmax(logits / tau) over the groups, with a seed softmax((logits + gumbel) / tau); hard: 1 for the group with the
    largest logit (with a seed, logit and Gumbel variable), the first on ties, 0 for the others, exactly, and the gradient is
    soft's (straight-through). GroupViT's grouping block trains with a seed and evaluates without one; a gate of two groups
    (keep, drop) is GeoX's sampler of patches.

    Args:
        logits: [B, G, N] float32, float64, bfloat16 or float16.
        tau: a float > 0.
        hard: False gives soft.
        seed: int64, 0-d or [B], on logits' device: the noise is a function of it, of the number of the sample (not with a seed
            for every sample), of group and token. None: no noise.

    Returns:
        [B, G, N] in the dtype of logits; sums and softmax in float32 (float64). A token with a NaN among its logits is assigned
        NaN throughout. Differentiable any number of times.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Xu et al. 2022, "GroupViT"; Jang et al. 2017, "Categorical reparameterization with Gumbel-softmax".
    """
    check_tokens("logits", logits, "[B, G, N]")
    check_flag("hard", hard)
    _check_number("tau", tau)
    if not 0 < tau < torch.inf:
        raise ValueError(f"tau: expected a number > 0, got {tau}")
    b, g, n = logits.shape
    if g == 0:
        raise ValueError(f"logits: expected at least one group, got shape {tuple(logits.shape)}")
    noisy = logits.to(accumulate_dtype(logits.dtype))
    if seed is not None:
        if not isinstance(seed, Tensor):
            raise TypeError(f"seed: expected a tensor or None, got {type(seed).__name__}")
        if seed.device != logits.device:
            raise ValueError(f"seed: expected device {logits.device} as logits has, got {seed.device}")
        check_tensor("seed", seed, seed.device, (torch.int64,), b if seed.ndim else None)
        bits = reference.random_bits(seed, b, g * n, reference.GROUP_STREAM).reshape(b, g, n)
        noisy = noisy + gumbel(bits).to(noisy.dtype)
    soft = (noisy / tau).softmax(1)
    if not hard:
        return soft.to(logits.dtype)
    winner = noisy.max(1, keepdim=True).indices  # [B, 1, N]
    one_hot = (winner == torch.arange(g, device=logits.device)[:, None]).to(soft.dtype)
    return (one_hot + (soft - soft.detach())).to(logits.dtype)  # the bracket is 0


def group_mean(assignment: Tensor, values: Tensor, eps: float = 1.0) -> Tensor:
    """The mean of the values of each group's tokens: the sum over n of a[g, n] * values[n] / (the sum over n of a[g, n] + eps).

    Args:
        assignment: [B, G, N], group_assign's.
        values: [B, N, C]; both float32, float64, bfloat16 or float16.
        eps: >= 0, beside the count; GroupViT's is 1, with which a group without tokens is 0. With 0 such a group is NaN.

    Returns:
        [B, G, C] in values' dtype, summed and divided in float32 (float64), whatever autocast says.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Xu et al. 2022, "GroupViT".
    """
    check_tokens("assignment", assignment, "[B, G, N]")
    check_tokens("values", values, "[B, N, C]")
    if (assignment.shape[0], assignment.shape[2]) != values.shape[:2]:
        expected = f"[{assignment.shape[0]}, {assignment.shape[2]}, C]"
        raise ValueError(f"values: expected shape {expected} as assignment has, got {tuple(values.shape)}")
    if values.device != assignment.device:
        raise ValueError(f"values: expected device {assignment.device} as assignment has, got {values.device}")
    _check_number("eps", eps)
    if not 0 <= eps < torch.inf:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    dtype, device = accumulate_dtype(torch.promote_types(assignment.dtype, values.dtype)), values.device.type
    assignment = assignment.to(dtype)
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        total = assignment @ values.to(dtype)
        return (total / (assignment.sum(2, keepdim=True) + eps)).to(values.dtype)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
