"""Every operator's schema and fake kernel; FLOP formulas are in flops.py.

Kernels register themselves on these names (csrc/*/*.cpp, from the library). They are the kernels' interface, without gradients
and without argument checks: call the public functions instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Logits S = scale * x @ y.T (+ bias), x [M, D], y [N, D]; own pair of row i: column own[i], or i + own_offset, or none.
# `row_stats` [2, M] and `column_stats` [2, N] hold the sums of exp(S - shift) and the shifts; `exact`: whether the shifts differ.
# `stash`: exp(S - shift), the first min(keep, M * N) in the kernel's own order; the backward makes the others again.
torch.library.define(
    "vlpfast::pair_fwd",
    "(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? own, SymInt? own_offset, Tensor? row_ids, Tensor? column_ids, "
    "bool want_rows, bool want_columns, SymInt keep) "
    "-> (Tensor rows, Tensor columns, Tensor row_stats, Tensor column_stats, Tensor exact, Tensor stash)",
    tags=torch.Tag.pt2_compliant_tag,
)
# What is not needed comes back empty. dscale has shape [1], dbias [N].
torch.library.define(
    "vlpfast::pair_bwd",
    "(Tensor grad_rows, Tensor grad_columns, Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? own, SymInt? own_offset, "
    "Tensor? row_ids, Tensor? column_ids, bool want_rows, bool want_columns, "
    "Tensor row_stats, Tensor column_stats, Tensor exact, Tensor stash, "
    "bool need_x, bool need_y, bool need_scale, bool need_bias) "
    "-> (Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)",
    tags=torch.Tag.pt2_compliant_tag,
)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, losses, scales and biases beside features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("vlpfast::pair_fwd")
def _(x: Tensor, y: Tensor, scale, bias, own, own_offset, row_ids, column_ids, want_rows, want_columns, keep):
    m, n = x.shape[0], y.shape[0]
    new = {"dtype": accumulate_dtype(x.dtype)}
    return (
        x.new_empty(m if want_rows else 0, **new),
        x.new_empty(n if want_columns else 0, **new),
        x.new_empty((2, m), **new),
        x.new_empty((2, n), **new),
        x.new_empty((), dtype=torch.bool),
        x.new_empty(torch.sym_min(keep, m * n), **new),
    )


@torch.library.register_fake("vlpfast::pair_bwd")
def _(grad_rows, grad_columns, x: Tensor, y: Tensor, scale, bias, own, own_offset, row_ids, column_ids, want_rows, want_columns,
      row_stats, column_stats, exact, stash, need_x, need_y, need_scale, need_bias):  # fmt: skip
    new = {"dtype": accumulate_dtype(x.dtype)}
    return (
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
        y.new_empty((y.shape[0] if need_y else 0, y.shape[1])),
        x.new_empty(1 if need_scale else 0, **new),
        x.new_empty(y.shape[0] if need_bias else 0, **new),
    )


# Arguments as pair_fwd's. The loss is 0-d; its gradients come with it, dx [M, D] and dy [N, D] in the accumulating dtype (so that
# half types are rounded after the incoming gradient is multiplied in), dscale [1], dbias [N]; what is not needed is empty.
torch.library.define(
    "vlpfast::pair_softplus",
    "(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? own, SymInt? own_offset, Tensor? row_ids, Tensor? column_ids, "
    "float negative_weight, bool need_x, bool need_y, bool need_scale, bool need_bias) "
    "-> (Tensor loss, Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("vlpfast::pair_softplus")
def _(x: Tensor, y: Tensor, scale, bias, own, own_offset, row_ids, column_ids, negative_weight,
      need_x, need_y, need_scale, need_bias):  # fmt: skip
    new = {"dtype": accumulate_dtype(x.dtype)}
    return (
        x.new_empty((), **new),
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1]), **new),
        x.new_empty((y.shape[0] if need_y else 0, x.shape[1]), **new),
        x.new_empty(1 if need_scale else 0, **new),
        x.new_empty(y.shape[0] if need_bias else 0, **new),
    )


# --- late interaction -------------------------------------------------------------------------------------------------

# Set i of a side has the tokens start[i] to start[i + 1] of x [Lx, D] or y [Ly, D], at most `longest` of them; `keep` [Lx], [Ly]
# says which count. candidates = None: every set of x (M) meets every set of y (N); else set m of x meets the sets
# m * candidates + k of y, k in [0, candidates). Scores are [M, N] or [M, candidates], [0, ...] for a direction not wanted.
# Winners, if `keep_winners`: y_of_x [N or candidates, Lx], for each token of x the place in the set of y of the token nearest to
# it, and x_of_y [M or 1, Ly] likewise; 0 for tokens that do not count. Their dtype is maxsim_index_dtype(longest).
torch.library.define(
    "vlpfast::maxsim_fwd",
    "(Tensor x, Tensor y, Tensor x_start, Tensor y_start, Tensor? x_keep, Tensor? y_keep, SymInt x_longest, SymInt y_longest, "
    "SymInt? candidates, bool want_x_to_y, bool want_y_to_x, bool mean, bool zero, bool keep_winners) "
    "-> (Tensor x_to_y, Tensor y_to_x, Tensor y_of_x, Tensor x_of_y)",
    tags=torch.Tag.pt2_compliant_tag,
)
# A direction without a gradient takes no part. Winners with no rows are found again. What is not needed comes back with no rows.
torch.library.define(
    "vlpfast::maxsim_bwd",
    "(Tensor? grad_x_to_y, Tensor? grad_y_to_x, Tensor x, Tensor y, Tensor x_start, Tensor y_start, Tensor? x_keep, "
    "Tensor? y_keep, SymInt x_longest, SymInt y_longest, SymInt? candidates, bool mean, bool zero, "
    "Tensor y_of_x, Tensor x_of_y, bool need_x, bool need_y) -> (Tensor dx, Tensor dy)",
    tags=torch.Tag.pt2_compliant_tag,
)


def maxsim_index_dtype(longest: int) -> torch.dtype:
    """What holds the places in a set of so many tokens; int16 holds the bits of an unsigned number."""
    return torch.uint8 if longest <= 1 << 8 else torch.int16 if longest <= 1 << 16 else torch.int32


@torch.library.register_fake("vlpfast::maxsim_fwd")
def _(x: Tensor, y: Tensor, x_start, y_start, x_keep, y_keep, x_longest, y_longest, candidates, want_x_to_y, want_y_to_x,
      mean, zero, keep_winners):  # fmt: skip
    m = x_start.shape[0] - 1
    columns = y_start.shape[0] - 1 if candidates is None else candidates
    new = {"dtype": accumulate_dtype(x.dtype)}
    y_of_x = (columns if keep_winners and want_x_to_y else 0, x.shape[0])
    x_of_y = ((m if candidates is None else 1) if keep_winners and want_y_to_x else 0, y.shape[0])
    return (
        x.new_empty((m if want_x_to_y else 0, columns), **new),
        x.new_empty((m if want_y_to_x else 0, columns), **new),
        x.new_empty(y_of_x, dtype=maxsim_index_dtype(y_longest)),
        x.new_empty(x_of_y, dtype=maxsim_index_dtype(x_longest)),
    )


@torch.library.register_fake("vlpfast::maxsim_bwd")
def _(grad_x_to_y, grad_y_to_x, x: Tensor, y: Tensor, x_start, y_start, x_keep, y_keep, x_longest, y_longest, candidates,
      mean, zero, y_of_x, x_of_y, need_x, need_y):  # fmt: skip
    return (
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
        y.new_empty((y.shape[0] if need_y else 0, y.shape[1])),
    )


# One-to-one partners of the largest sum: similarity [..., P, T], rows [..., P] and columns [..., T] bool, True: may have one.
# partner [..., T] int64: the row of each column, -1 for none; -1 throughout where something that counts is not finite. It is
# solved on the host (vlpfast/ops/maxsim/assignment.py), whatever the tensors' device.
torch.library.define(
    "vlpfast::assignment",
    "(Tensor similarity, Tensor rows, Tensor columns) -> Tensor partner",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("vlpfast::assignment")
def _(similarity: Tensor, rows: Tensor, columns: Tensor):
    return similarity.new_empty((*similarity.shape[:-2], similarity.shape[-1]), dtype=torch.int64)
