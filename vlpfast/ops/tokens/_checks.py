"""Argument checks of the token operators, beside the shared ones of vlpfast/ops/_checks.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlpfast.ops import debug
from vlpfast.ops._checks import DTYPES


def check_tokens(name: str, tokens: Any, shape: str = "[B, N, C]") -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tokens).__name__}")
    if tokens.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tokens.dtype}")
    if tokens.ndim != 3:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tokens.shape)}")
    debug.check_finite(name, tokens)


def check_of_tokens(name: str, values: Any, tokens: Tensor) -> None:
    """Numbers [B, N] beside tokens [B, N, C]."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(values).__name__}")
    if values.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {values.dtype}")
    if values.shape != tokens.shape[:2]:
        raise ValueError(f"{name}: expected shape {tuple(tokens.shape[:2])} as the tokens have, got {tuple(values.shape)}")
    if values.device != tokens.device:
        raise ValueError(f"{name}: expected device {tokens.device} as the tokens have, got {values.device}")
