"""Argument checks of the contrastive operators, beside the shared ones of vlpfast/ops/_checks.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlpfast.ops import debug
from vlpfast.ops._checks import DTYPES, check_tensor
from vlpfast.ops._schemas import accumulate_dtype


def check_features(x: Tensor, y: Tensor) -> None:
    check_shapes(x, y)
    debug.check_finite("x", x)
    debug.check_finite("y", y)


def check_shapes(x: Tensor, y: Tensor) -> None:
    """`check_features` but for the values."""
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


def check_scale(scale: Any, x: Tensor, name: str = "scale") -> Tensor:
    """`scale` as a 0-d tensor of the dtype that sums beside x have."""
    dtype = accumulate_dtype(x.dtype)
    if isinstance(scale, Tensor):
        check_tensor(name, scale, x.device, DTYPES, None)
        debug.check_finite(name, scale)  # its sign is left alone: whatever is learned may change it
        return scale.to(dtype)
    if isinstance(scale, float | int) and not isinstance(scale, bool):
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {scale}")
        return torch.full((), scale, dtype=dtype, device=x.device)
    raise TypeError(f"{name}: expected a float or a 0-d tensor, got {type(scale).__name__}")


def check_loss_scale(scale: Any) -> None:
    """Of a loss, beside `check_scale`: a number that is 0 would make it a constant. Tensors may come to be anything."""
    if isinstance(scale, float | int) and not scale > 0:
        raise ValueError(f"scale: expected a number > 0, got {scale}")


def check_bias(bias: Tensor, x: Tensor, n: int, name: str = "bias") -> Tensor:
    """`bias`, 0-d or [n], in the dtype that sums beside x have."""
    check_tensor(name, bias, x.device, DTYPES, None if isinstance(bias, Tensor) and bias.ndim == 0 else n)
    debug.check_finite(name, bias)
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


def check_columns(own: Tensor, n: int, *, unique: bool) -> None:
    """Only where looking at values waits for nothing, and where there are some."""
    if own.numel() == 0 or not debug.readable(own):
        return
    low, high = (int(v) for v in own.aminmax())
    if low < 0 or high >= n:
        raise ValueError(f"own: expected columns in [0, {n}), got {low} to {high}")
    if unique and own.unique().numel() != own.numel():
        raise ValueError("own: expected every column at most once (it may repeat only with directions='rows'), got repeated ones")


def check_more_features(name: str, features: Any, x: Tensor) -> None:
    """Further rows [any number, D] beside x [..., D]."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(features).__name__}")
    if features.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {features.dtype}")
    if features.ndim != 2 or features.shape[1] != x.shape[-1]:
        raise ValueError(f"{name}: expected shape [rows, {x.shape[-1]}] beside x, got {tuple(features.shape)}")
    if features.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as x has, got {features.device}")
    debug.check_finite(name, features)


def check_rows(name: str, features: Any, rows: int, x: Tensor) -> None:
    """Features [rows, any width] beside x."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(features).__name__}")
    if features.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {features.dtype}")
    if features.ndim != 2 or features.shape[0] != rows:
        raise ValueError(f"{name}: expected shape [{rows}, width], got {tuple(features.shape)}")
    if features.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as x has, got {features.device}")
    debug.check_finite(name, features)


def check_same_length(x: Tensor, y: Tensor) -> None:
    """Row i of x belongs to row i of y."""
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"y: expected as many rows as x, {x.shape[0]}, got {y.shape[0]}")


def check_views(x: Any, y: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """x [N, D] or [V, N, D] and y [N, D] or [W, N, D] as their views, each [N, D]."""
    for name, features in (("x", x), ("y", y)):
        if isinstance(features, Tensor) and features.ndim == 3 and features.shape[0] == 0:
            raise ValueError(f"{name}: expected at least one view in [views, rows, width], got shape {tuple(features.shape)}")
    views = [(t.unbind() if isinstance(t, Tensor) and t.ndim == 3 else (t,)) for t in (x, y)]
    check_shapes(views[0][0], views[1][0])
    check_same_length(views[0][0], views[1][0])
    debug.check_finite("x", x)
    debug.check_finite("y", y)
    return views[0], views[1]


def check_view_weights(view_weights: Any, v: int, w: int) -> list[list[float]]:
    """[v][w] numbers; None: equal ones that sum to 1."""
    if view_weights is None:
        return [[1 / (v * w)] * w for _ in range(v)]
    sequences = isinstance(view_weights, list | tuple) and all(isinstance(row, list | tuple) for row in view_weights)
    if not sequences or not all(_is_number(weight) for row in view_weights for weight in row):
        raise TypeError(f"view_weights: expected {v} sequences of {w} finite numbers, got {view_weights!r}")
    if len(view_weights) != v or any(len(row) != w for row in view_weights):
        lengths = [len(row) for row in view_weights]
        raise ValueError(f"view_weights: expected {v} sequences of {w} numbers, got {len(lengths)} of lengths {lengths}")
    return [list(row) for row in view_weights]


def check_directions(directions: Any) -> tuple[float, float]:
    """The weights of the rows' mean and of the columns' mean."""
    named = {"both": (0.5, 0.5), "rows": (1.0, 0.0), "cols": (0.0, 1.0)}
    if isinstance(directions, str) and directions in named:
        return named[directions]
    two = isinstance(directions, list | tuple) and len(directions) == 2
    if two and all(_is_number(d) and d >= 0 for d in directions) and any(directions):
        return directions[0], directions[1]
    raise ValueError(f"directions: expected 'both', 'rows', 'cols' or two weights >= 0 that are not both 0, got {directions!r}")


def check_weights(name: str, weights: Any, x: Tensor) -> None:
    check_tensor(name, weights, x.device, DTYPES, x.shape[0])
    debug.check_within(name, weights, 0, torch.finfo(weights.dtype).max)


def check_smoothing(label_smoothing: Any, x: Tensor) -> None:
    if isinstance(label_smoothing, Tensor):
        check_tensor("label_smoothing", label_smoothing, x.device, DTYPES, None if label_smoothing.ndim == 0 else x.shape[0])
        debug.check_within("label_smoothing", label_smoothing, 0, 1)
    elif not _is_number(label_smoothing):
        raise TypeError(f"label_smoothing: expected a number or a tensor, got {type(label_smoothing).__name__}")
    elif not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")


def check_ids(name: str, ids: Any, device: torch.device, length: int) -> None:
    check_tensor(name, ids, device, (torch.int64,), length)


def check_unused(directions: tuple[float, float], **arguments: Any) -> None:
    """Arguments named `row_...` need the rows' direction, all others the columns'."""
    for name, value in arguments.items():
        side = 0 if name.startswith("row") else 1
        if value is not None and not directions[side]:
            raise ValueError(f"{name}: has no effect on the directions asked for, whose weights are {directions}")


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and -math.inf < value < math.inf


def check_nonnegative(name: str, value: Any, kinds: str = "a float") -> float:
    """kinds: what the message says the argument may be."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name}: expected {kinds}, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return float(value)


def check_alpha(alpha: Any, x: Tensor) -> None:
    if isinstance(alpha, Tensor):
        check_tensor("alpha", alpha, x.device, DTYPES, None)
        debug.check_within("alpha", alpha, 0, 1)
    elif not _is_number(alpha):
        raise TypeError(f"alpha: expected a number or a 0-d tensor, got {alpha!r}")
    elif not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
