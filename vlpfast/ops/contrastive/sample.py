"""sample_hard_negatives: draws hard negatives for every row of a set of features, without its matrix of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import check_count, check_tensor, same_dtype
from vlpfast.ops.contrastive import reference
from vlpfast.ops.contrastive._checks import check_features, check_leave_out, check_nonnegative, check_own, check_scale

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type
TRITON_COUNT = 64  # the most columns for a row that Triton's kernels draw


def sample_hard_negatives(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    count: int = 1,
    *,
    own: int | Tensor | None = 0,
    leave_out: tuple[Tensor, Tensor] | None = None,
    uniform: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Draws `count` different columns for each row, likely those with large logits, never its own nor one that is left out.

    The logits are S = scale * x @ y.T, [M, N], and are never held whole: one matrix product, and memory for M * count. The first
    column of row i is j, among the candidates (the columns that are neither own nor left out), with probability

        P(i, j) = (softmax(S[i])[j] + uniform) / (the sum of this over row i's candidates)

    where the softmax is over all N columns, those that cannot be drawn included: this is what ALBEF does (softmax, own column
    set to zero, multinomial), and with uniform = 1e-4 BLIP. The second column follows the same weights among the candidates that
    are left, and so on: the first of three draws is that of one. For the other direction call it with x and y exchanged.

    Args:
        x: [M, D] float32, float64, bfloat16 or float16, any strides; half types are multiplied and summed in float32. Of two
            different dtypes the wider is used. Under autocast x and y (float64 apart) are cast to its dtype. No gradient.
        y: [N, D]
        scale: a float >= 0, or a 0-d tensor.
        count: columns for each row, 1 to N; above 64 on a GPU the reference draws, which holds the matrix of logits.
        own: offset (row i's own pair is column i + own; 0 <= own <= N - M), an int64 tensor [M] of columns (one column may be
            the own of several rows), or None: no row has an own pair.
        leave_out: (row_ids [M], column_ids [N]), int64: pairs with equal ids, known duplicates, are not drawn.
        uniform: a float >= 0, added to every candidate's softmax. With 0, columns of a logit more than 26 below the row's largest
            are only drawn when nothing else is left, and one of -inf never is.
        seed: 0-d int64 tensor on x's device. Equal seeds give equal draws, unless rounding decides between two columns: on any
            number of threads, on any backend, and for each row whatever rows there are beside it. None: drawn from torch's
            generator of the device, so that what restores the generator restores the draws.

    Returns:
        [M, count] int64, in the order of drawing, -1 in the last places of a row that has fewer candidates than `count`. A logit
        that is NaN or infinite is drawn before all others, the lowest column first, so that it shows in what is made of it.

    Raises:
        TypeError, ValueError: a wrong argument, named. The values in `own` are checked only where they are on the host (on a
            device under VLPFAST_DEBUG=1).

    Li et al. 2021, "Align before fuse"; Li et al. 2022, "BLIP"; drawing by keys: Kool et al. 2019, "Stochastic beams and where
    to find them".
    """
    x, y, scale, uniform, seed = _checked(x, y, scale, count, own, leave_out, uniform, seed)
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return _sample_hard_negatives(x, y, scale, count, own, leave_out, uniform, seed)
    if x.dtype != torch.float64:
        x, y = x.to(torch.get_autocast_dtype(device)), y.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _sample_hard_negatives(x, y, scale, count, own, leave_out, uniform, seed)


def _sample_hard_negatives(x, y, scale, count, own, leave_out, uniform, seed) -> Tensor:
    op, kernels = "sample_hard_negatives", KERNELS
    if count > TRITON_COUNT:
        op, kernels = f"{op} with count > {TRITON_COUNT}", {name: kind for name, kind in KERNELS.items() if name != "triton"}
    backend = backends.choose(op, kernels, x.device, x.dtype)
    if backend == "reference":
        return reference.sample_hard_negatives(x, y, scale, count, own=own, leave_out=leave_out, uniform=uniform, seed=seed)
    own_index, own_offset = (own, None) if isinstance(own, Tensor) else (None, own)
    row_ids, column_ids = leave_out if leave_out is not None else (None, None)
    operator = torch.ops.vlpfast.sample_hard_negatives_triton if backend == "triton" else torch.ops.vlpfast.sample_hard_negatives
    return operator(
        x, y, scale, own_index, own_offset, row_ids, column_ids, count, uniform, seed
    )  # fmt: skip


def _checked(x, y, scale, count, own, leave_out, uniform, seed) -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
    """x and y in one dtype, scale in the accumulating dtype, a seed; no gradient; raises on a wrong argument."""
    check_features(x, y)
    m, n = x.shape[0], y.shape[0]
    x, y = same_dtype(x.detach(), y.detach())
    scale = check_scale(scale, x).detach()
    check_count("count", count, 1)
    if m and count > n:
        raise ValueError(f"count: expected at most N = {n}, the rows of y, got {count}")
    check_own(own, m, n, x.device, unique=False)
    if leave_out is not None:
        check_leave_out(leave_out, m, n, x.device)
    uniform = check_nonnegative("uniform", uniform)
    if seed is None:
        seed = torch.randint(2**63 - 1, (), device=x.device)
    check_tensor("seed", seed, x.device, (torch.int64,), None)
    return x, y, scale, uniform, seed
