"""Every operator's schema and fake kernel; FLOP formulas are in flops.py.

Kernels register themselves on these names (csrc/*/*.cpp, from the library). They are the kernels' interface, without gradients
and without argument checks: call the public functions instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Logits S = scale * x @ y.T (+ bias), x [M, D], y [N, D]; own pair of row i: column own[i], or i + own_offset, or none.
# `row_stats` [2, M] and `column_stats` [2, N] hold the sums of exp(S - shift) and the shifts (nothing for what is not wanted);
# `exact`: whether the shifts differ. `stash`: exp(S - shift), the first min(keep, M * N) in the kernel's own order; the backward
# makes the others again. Where rows alone are wanted each has its own shift, `exact` is true, and the stash holds S itself.
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


# Arguments as pair_fwd's; seed is 0-d int64. The columns drawn for each row, [M, count] int64, -1 where there are too few.
torch.library.define(
    "vlpfast::sample_hard_negatives",
    "(Tensor x, Tensor y, Tensor scale, Tensor? own, SymInt? own_offset, Tensor? row_ids, Tensor? column_ids, "
    "SymInt count, float uniform, Tensor seed) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("vlpfast::sample_hard_negatives")
def _(x: Tensor, y: Tensor, scale, own, own_offset, row_ids, column_ids, count, uniform, seed):
    return x.new_empty((x.shape[0], count), dtype=torch.int64)
