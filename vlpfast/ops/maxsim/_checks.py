"""Argument checks of late interaction, beside the shared ones of vlpfast/ops/_checks.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlpfast.ops._checks import DTYPES, check_choice, check_cu_seqlens, check_mask


def check_tokens(name: str, tokens: Any, mask: Any, cu_seqlens: Any, padded: str) -> None:
    """One side: tokens of shape `padded` ("[M, P, D]") with a mask of all its dimensions but the last, or packed ones."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tokens).__name__}")
    if tokens.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tokens.dtype}")
    expected = "[L, D]" if cu_seqlens is not None else padded
    if tokens.ndim != expected.count(",") + 1:
        packed = f" with {name}_cu_seqlens" if cu_seqlens is not None else ""
        raise ValueError(f"{name}: expected shape {expected}{packed}, got {tuple(tokens.shape)}")
    if mask is not None and cu_seqlens is not None:
        raise ValueError(f"{name}_mask: expected None with {name}_cu_seqlens, got a mask")
    if mask is not None:
        check_mask(f"{name}_mask", mask, tokens)
    if cu_seqlens is not None:
        check_cu_seqlens(f"{name}_cu_seqlens", cu_seqlens, tokens)


def check_masked(masked: Any, **packed: Any) -> None:
    check_choice("masked", masked, ("ignore", "zero"))
    for name, cu_seqlens in packed.items():
        if masked == "zero" and cu_seqlens is not None:
            raise ValueError(f"masked: expected 'ignore' with {name} (packed sets have no masked tokens), got 'zero'")


def check_sets(x: Tensor, y: Tensor, m: int, n: int, pairs: str) -> None:
    """m, n: how many sets of tokens there are on each side."""
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: expected width {x.shape[-1]} as x has, got {y.shape[-1]}")
    if y.device != x.device:
        raise ValueError(f"y: expected device {x.device} as x has, got {y.device}")
    if pairs == "aligned" and m != n:
        raise ValueError(f"y: expected as many sets as x for pairs='aligned', {m}, got {n}")
    if pairs == "own" and (y.shape[0] != m if y.ndim == 4 else n % m if m else n):
        raise ValueError(f"y: expected candidates for each of the {m} sets of x for pairs='own', got {_described(y, n)}")


def _described(y: Tensor, n: int) -> str:
    return f"shape {tuple(y.shape)}" if y.ndim == 4 else f"{n} sets"
