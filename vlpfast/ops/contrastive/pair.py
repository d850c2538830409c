"""pair_logsumexp: sums over all pairs of two sets of features, without their matrix of logits."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import check_stash_bytes, same_dtype
from vlpfast.ops._schemas import stash_dtype
from vlpfast.ops.contrastive import reference
from vlpfast.ops.contrastive._checks import check_bias, check_features, check_leave_out, check_own, check_scale
from vlpfast.ops.contrastive.autograd import PairLogsumexp

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type
STASH_BYTES = 4 << 30


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
        stash_bytes: the forward keeps as many of the M * N exponentials (of rows alone on a CPU: logits) for the backward as
            fit, the backward makes the others again: three matrix products if all fit, four (and no memory that grows with
            M * N) if none does.

    Returns:
        rows [M], cols [N] in float32 (float64 for float64 features); -inf where every pair is left out. On a GPU float32 products
        are sums of three tf32 products, and float64 runs on the reference backend, which holds the matrix whole.

    Raises:
        TypeError, ValueError: a wrong argument, named. The values in `own` are checked only where they are on the host (on a
            device under VLPFAST_DEBUG=1); on a GPU a column that does not exist gives NaN.
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
    backend = backends.choose("pair_logsumexp", KERNELS, x.device, x.dtype)
    if backend == "reference":
        rows, cols = reference.pair_logsumexp(x, y, scale, own=own, leave_out=leave_out, bias=bias)
    else:
        own_index, own_offset = (own, None) if isinstance(own, Tensor) else (None, own)
        row_ids, column_ids = leave_out if leave_out is not None else (None, None)
        # Dynamo refuses a Function that is given one tensor twice
        y = y.view_as(y) if y is x else y
        column_ids = column_ids.view_as(column_ids) if column_ids is not None and column_ids is row_ids else column_ids
        differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, scale, bias))
        keep = stash_bytes // stash_dtype(backend, x.dtype).itemsize if differentiable else 0
        rows, cols, *_ = PairLogsumexp.apply(
            backend, x, y, scale, bias, own_index, own_offset, row_ids, column_ids,
            directions != "cols", directions != "rows", differentiable and scale.requires_grad, keep,
        )  # fmt: skip
    return {"both": (rows, cols), "rows": rows, "cols": cols}[directions]


def _checked(x, y, scale, own, leave_out, bias, directions, stash_bytes) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x and y in one dtype, scale and bias as tensors of the accumulating dtype; raises on a wrong argument."""
    check_features(x, y)
    m, n = x.shape[0], y.shape[0]
    x, y = same_dtype(x, y)
    scale = check_scale(scale, x)
    check_own(own, m, n, x.device, unique=directions != "rows")
    if leave_out is not None:
        check_leave_out(leave_out, m, n, x.device)
    if bias is not None:
        bias = check_bias(bias, x, n)
    if directions not in ("both", "rows", "cols"):
        raise ValueError(f"directions: expected 'both', 'rows' or 'cols', got {directions!r}")
    check_stash_bytes(stash_bytes)
    return x, y, scale, bias
