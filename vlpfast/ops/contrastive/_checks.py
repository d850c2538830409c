"""Argument checks of the contrastive operators: before dispatch, on real and fake tensors alike."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlpfast.ops._schemas import accumulate_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_features(x: Tensor, y: Tensor) -> None:
    for name, features in (("x", x), ("y", y)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(features).__name__}")
        if features.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {features.dtype}")
        if features.ndim != 2:
            raise ValueError(f"{name}: expected 2 dimensions [rows, width], got shape {tuple(features.shape)}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: expected width {x.shape[1]} as x has, got {y.shape[1]}")
    if y.device != x.device:
        raise ValueError(f"y: expected device {x.device} as x has, got {y.device}")


def same_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def check_scale(scale: Any, x: Tensor) -> Tensor:
    """`scale` as a 0-d tensor of the dtype that sums beside x have."""
    dtype = accumulate_dtype(x.dtype)
    if isinstance(scale, Tensor):
        check_tensor("scale", scale, x.device, DTYPES, None)
        return scale.to(dtype)
    if isinstance(scale, float | int) and not isinstance(scale, bool):
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale: expected a finite number >= 0, got {scale}")
        return torch.full((), scale, dtype=dtype, device=x.device)
    raise TypeError(f"scale: expected a float or a 0-d tensor, got {type(scale).__name__}")


def check_bias(bias: Tensor, x: Tensor, n: int) -> Tensor:
    """`bias`, 0-d or [n], in the dtype that sums beside x have."""
    check_tensor("bias", bias, x.device, DTYPES, None if isinstance(bias, Tensor) and bias.ndim == 0 else n)
    return bias.to(accumulate_dtype(x.dtype))


def check_own(own: Any, m: int, n: int, device: torch.device, *, unique: bool) -> None:
    """unique: no column may be the own one of two rows."""
    if isinstance(own, Tensor):
        check_tensor("own", own, device, (torch.int64,), m)
        check_columns(own, n, unique=unique)
    elif isinstance(own, int | torch.SymInt) and not isinstance(own, bool):
        if not 0 <= own <= n - m:
            raise ValueError(f"own: expected an offset in [0, N - M] with M = {m} rows of x and N = {n} rows of y, got {own}")
    elif own is not None:
        raise TypeError(f"own: expected an int, an int64 tensor or None, got {type(own).__name__}")


def check_leave_out(leave_out: Any, m: int, n: int, device: torch.device) -> None:
    if not (isinstance(leave_out, tuple | list) and len(leave_out) == 2):
        raise TypeError(f"leave_out: expected a pair (row_ids, column_ids), got {type(leave_out).__name__}")
    for name, ids, count in (("leave_out[0]", leave_out[0], m), ("leave_out[1]", leave_out[1], n)):
        check_tensor(name, ids, device, (torch.int64,), count)


def check_stash_bytes(stash_bytes: Any) -> None:
    if isinstance(stash_bytes, bool) or not isinstance(stash_bytes, int):
        raise TypeError(f"stash_bytes: expected an int, got {type(stash_bytes).__name__}")
    if stash_bytes < 0:
        raise ValueError(f"stash_bytes: expected >= 0, got {stash_bytes}")


def check_tensor(name: str, value: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], length: int | None) -> None:
    """`length`: of a vector; None: a 0-d tensor is expected."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(dtype) for dtype in dtypes)}, got {value.dtype}")
    if value.ndim != (0 if length is None else 1) or (length is not None and value.shape[0] != length):
        expected = "a 0-d tensor" if length is None else f"a vector of length {length}"
        raise ValueError(f"{name}: expected {expected}, got {value.ndim} dimensions and {value.numel()} elements")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} as x has, got {value.device}")


def check_columns(own: Tensor, n: int, *, unique: bool) -> None:
    """Host tensors alone: on a GPU looking at values would wait for it, under compilation there are none yet."""
    if own.device.type != "cpu" or own.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(v) for v in own.aminmax())
    if low < 0 or high >= n:
        raise ValueError(f"own: expected columns in [0, {n}), got {low} to {high}")
    if unique and own.unique().numel() != own.numel():
        raise ValueError("own: expected every column at most once (it may repeat only with directions='rows'), got repeated ones")


def check_negative_weight(negative_weight: Any) -> float:
    if isinstance(negative_weight, bool) or not isinstance(negative_weight, float | int):
        raise TypeError(f"negative_weight: expected a float or None, got {type(negative_weight).__name__}")
    if not (math.isfinite(negative_weight) and negative_weight >= 0):
        raise ValueError(f"negative_weight: expected a finite number >= 0, got {negative_weight}")
    return float(negative_weight)
