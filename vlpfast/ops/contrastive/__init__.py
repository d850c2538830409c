"""Contrastive losses on one primitive: sums over all pairs of two sets of features, without their matrix of logits.

The rule behind every function here: the target pair never enters the sums over the matrix product. It is left out of them and
added beside them, so that a loss near zero keeps its full relative precision (subtracting it afterwards does not).
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive import reference
from vlpfast.ops.contrastive.autograd import PairLogsumexp

__all__ = ["KERNELS", "clip_loss", "pair_logsumexp"]

KERNELS = {"cpp": "cpu"}  # beside `reference`: backend -> device type
STASH_BYTES = 4 << 30
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@overload
def pair_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    own: int | Tensor | None = 0,
    leave_out: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    directions: Literal["both"] = "both",
    stash_bytes: int = STASH_BYTES,
) -> tuple[Tensor, Tensor]: ...


@overload
def pair_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    own: int | Tensor | None = 0,
    leave_out: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    directions: Literal["rows", "cols"],
    stash_bytes: int = STASH_BYTES,
) -> Tensor: ...


def pair_logsumexp(x, y, scale, *, own=0, leave_out=None, bias=None, directions="both", stash_bytes=STASH_BYTES):
    """For each row the logsumexp of its logits against all columns but its own, minus its own logit; for each column likewise.

    The logits are S = scale * x @ y.T (+ bias), [M, N], and are never held whole. With the own pair of row i in column o(i):

        rows[i] = log sum_{j != o(i)} exp(S[i, j]) - S[i, o(i)]        softplus(rows) is the cross-entropy of the rows
        cols[j] = log sum_{i: o(i) != j} exp(S[i, j]) - S[o^-1(j), j]  nothing is subtracted for a column that is no row's own

    Args:
        x: [M, D] float32, float64, bfloat16 or float16, any strides; half types are multiplied and summed in float32. Of two
            different dtypes the wider is used. Under autocast x and y (float64 apart) are cast to its dtype, nothing else is.
        y: [N, D]
        scale: a float >= 0, or a 0-d tensor (its gradient is made).
        own: offset (row i's own pair is column i + own; 0 <= own <= N - M), an int64 tensor [M] of columns (no column twice,
            unless directions is "rows"), or None: no row has an own pair, and rows and cols are plain logsumexps.
        leave_out: (row_ids [M], column_ids [N]), int64: pairs with equal ids stay out of both sums as well.
        bias: 0-d or [N], added to the logits of every row (its gradient is made).
        directions: "both" -> (rows, cols); "rows" or "cols" -> that one alone.
        stash_bytes: the forward keeps as many of the M * N exponentials for the backward as fit, the backward makes the
            others again: three matrix products if all fit, four (and no memory that grows with M * N) if none does.

    Returns:
        rows [M], cols [N] in float32 (float64 for float64 features); -inf where every pair is left out.

    Raises:
        TypeError, ValueError: a wrong argument, named. The values in `own` are checked only where they are on the host.
    """
    x, y, scale, bias = _checked(x, y, scale, own, leave_out, bias, directions, stash_bytes)
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return _pair_logsumexp(x, y, scale, own, leave_out, bias, directions, stash_bytes)
    if x.dtype != torch.float64:
        x, y = x.to(torch.get_autocast_dtype(device)), y.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _pair_logsumexp(x, y, scale, own, leave_out, bias, directions, stash_bytes)


def _pair_logsumexp(x, y, scale, own, leave_out, bias, directions, stash_bytes):
    if backends.choose("pair_logsumexp", KERNELS, x.device) == "reference":
        rows, cols = reference.pair_logsumexp(x, y, scale, own=own, leave_out=leave_out, bias=bias)
    else:
        own_index, own_offset = (own, None) if isinstance(own, Tensor) else (None, own)
        row_ids, column_ids = leave_out if leave_out is not None else (None, None)
        differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, scale, bias))
        keep = stash_bytes // accumulate_dtype(x.dtype).itemsize if differentiable else 0
        rows, cols, *_ = PairLogsumexp.apply(
            x, y, scale, bias, own_index, own_offset, row_ids, column_ids,
            directions != "cols", directions != "rows", keep,
        )  # fmt: skip
    return {"both": (rows, cols), "rows": rows, "cols": cols}[directions]


def clip_loss(x: Tensor, y: Tensor, scale: float | Tensor, *, stash_bytes: int = STASH_BYTES) -> Tensor:
    """CLIP's loss: the mean of the cross-entropies of rows and of columns of scale * x @ y.T, where row i belongs to column i.

    Exact in float32 down to a loss of 1e-31. x and y are [N, D], unit length in CLIP's use; see `pair_logsumexp` for dtypes,
    scale and stash_bytes. Returns a 0-d tensor, float32 (float64 for float64 features); 0 for N = 0.
    Radford et al. 2021, "Learning transferable visual models from natural language supervision".
    """
    _check_features(x, y)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"y: expected as many rows as x, {x.shape[0]}, got {y.shape[0]}")
    rows, cols = pair_logsumexp(x, y, scale, stash_bytes=stash_bytes)
    # above its threshold torch takes softplus(t) = t: exp(-40) is below float64's precision too
    losses = F.softplus(rows, threshold=40).sum() + F.softplus(cols, threshold=40).sum()
    return losses / (2 * max(1, x.shape[0]))


def _check_features(x: Tensor, y: Tensor) -> None:
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


def _checked(x, y, scale, own, leave_out, bias, directions, stash_bytes) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x and y in one dtype, scale and bias as tensors of the accumulating dtype; raises on a wrong argument."""
    _check_features(x, y)
    m, n = x.shape[0], y.shape[0]
    if x.dtype != y.dtype:
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    dtype = accumulate_dtype(x.dtype)

    if isinstance(scale, Tensor):
        _check_tensor("scale", scale, x.device, DTYPES, None)
        scale = scale.to(dtype)
    elif isinstance(scale, float | int) and not isinstance(scale, bool):
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale: expected a finite number >= 0, got {scale}")
        scale = torch.full((), scale, dtype=dtype, device=x.device)
    else:
        raise TypeError(f"scale: expected a float or a 0-d tensor, got {type(scale).__name__}")

    if isinstance(own, Tensor):
        _check_tensor("own", own, x.device, (torch.int64,), m)
        _check_columns(own, n, unique=directions != "rows")
    elif isinstance(own, int | torch.SymInt) and not isinstance(own, bool):
        if not 0 <= own <= n - m:
            raise ValueError(f"own: expected an offset in [0, N - M] with M = {m} rows of x and N = {n} rows of y, got {own}")
    elif own is not None:
        raise TypeError(f"own: expected an int, an int64 tensor or None, got {type(own).__name__}")

    if leave_out is not None:
        if not (isinstance(leave_out, tuple | list) and len(leave_out) == 2):
            raise TypeError(f"leave_out: expected a pair (row_ids, column_ids), got {type(leave_out).__name__}")
        for name, ids, count in (("leave_out[0]", leave_out[0], m), ("leave_out[1]", leave_out[1], n)):
            _check_tensor(name, ids, x.device, (torch.int64,), count)
    if bias is not None:
        _check_tensor("bias", bias, x.device, DTYPES, None if isinstance(bias, Tensor) and bias.ndim == 0 else n)
        bias = bias.to(dtype)
    if directions not in ("both", "rows", "cols"):
        raise ValueError(f"directions: expected 'both', 'rows' or 'cols', got {directions!r}")
    if isinstance(stash_bytes, bool) or not isinstance(stash_bytes, int):
        raise TypeError(f"stash_bytes: expected an int, got {type(stash_bytes).__name__}")
    if stash_bytes < 0:
        raise ValueError(f"stash_bytes: expected >= 0, got {stash_bytes}")
    return x, y, scale, bias


def _check_tensor(name: str, value: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], length: int | None) -> None:
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


def _check_columns(own: Tensor, n: int, *, unique: bool) -> None:
    """Host tensors alone: on a GPU looking at values would wait for it, under compilation there are none yet."""
    if own.device.type != "cpu" or own.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(v) for v in own.aminmax())
    if low < 0 or high >= n:
        raise ValueError(f"own: expected columns in [0, {n}), got {low} to {high}")
    if unique and own.unique().numel() != own.numel():
        raise ValueError("own: expected every column at most once (it may repeat only with directions='rows'), got repeated ones")
