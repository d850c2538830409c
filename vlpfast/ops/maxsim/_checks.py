"""Argument checks of late interaction: before dispatch, on real and fake tensors alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlpfast.ops import debug
from vlpfast.ops.contrastive._checks import DTYPES


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


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
        _check_mask(f"{name}_mask", mask, tokens)
    if cu_seqlens is not None:
        _check_cu_seqlens(f"{name}_cu_seqlens", cu_seqlens, tokens)


def _check_mask(name: str, mask: Any, tokens: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected torch.bool, got {mask.dtype}")
    if mask.shape != tokens.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(tokens.shape[:-1])}, got {tuple(mask.shape)}")
    if mask.device != tokens.device:
        raise ValueError(f"{name}: expected device {tokens.device} as the tokens have, got {mask.device}")


def _check_cu_seqlens(name: str, cu_seqlens: Any, tokens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name}: expected a vector of one number more than there are sets, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != tokens.device:
        raise ValueError(f"{name}: expected device {tokens.device} as the tokens have, got {cu_seqlens.device}")
    if not debug.readable(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens.shape[0]:
        raise ValueError(f"{name}: expected numbers from 0 to {tokens.shape[0]} tokens, got {first} to {last}")
    if (cu_seqlens.diff() < 0).any():
        raise ValueError(f"{name}: expected numbers that never fall, got {int(cu_seqlens.diff().min())} as a length")


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
