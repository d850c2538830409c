"""Argument checks of the temporal operators, beside the shared ones of vlpfast/ops/_checks.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlpfast.ops._checks import DTYPES


def check_features(name: str, x: Any, dimensions: tuple[int, ...] | None, shape: str, least: int = 0) -> None:
    """`dimensions`: how many there may be; None: `least` or more."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.ndim < least or (dimensions is not None and x.ndim not in dimensions):
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
