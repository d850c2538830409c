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


# Student's logits S = scale * x @ y.T, teacher's T = scale_t * x_t @ y_t.T (+ bias_t), x_t [M, E], y_t [N, E]; no y_t: y.
# `stats` [6, M]: sum of exp(S - shift) and shift, then T's, where S and T are relative to the own logit, rounded; then
# d student / d scale and d cross / d scale.
# `slopes` [2, M, D] ([0, M, D] unless wanted): what y's rows average to under softmax(S) and softmax(T), minus the own row.
# `stash`: the products, the first min(keep, 2 * M * N) in the kernel's own order; the backward makes the others again.
torch.library.define(
    "vlpfast::pair_distill_fwd",
    "(Tensor x, Tensor y, Tensor x_t, Tensor? y_t, Tensor scale, Tensor scale_t, Tensor? bias_t, "
    "Tensor? own, SymInt? own_offset, Tensor? row_ids, Tensor? column_ids, bool want_slopes, SymInt keep) "
    "-> (Tensor student, Tensor teacher, Tensor cross, Tensor stats, Tensor slopes, Tensor stash)",
    tags=torch.Tag.pt2_compliant_tag,
)
# What is not needed comes back empty; the gradient of scale is in the stats.
torch.library.define(
    "vlpfast::pair_distill_bwd",
    "(Tensor grad_student, Tensor grad_cross, Tensor x, Tensor y, Tensor x_t, Tensor? y_t, Tensor scale, Tensor scale_t, "
    "Tensor? bias_t, Tensor? own, SymInt? own_offset, Tensor? row_ids, Tensor? column_ids, Tensor stats, Tensor stash, "
    "bool need_x, bool need_y) -> (Tensor dx, Tensor dy)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("vlpfast::pair_distill_fwd")
def _(x: Tensor, y: Tensor, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids, want_slopes, keep):
    (m, d), n = x.shape, y.shape[0]
    new = {"dtype": accumulate_dtype(x.dtype)}
    return (
        x.new_empty(m, **new),
        x.new_empty(m, **new),
        x.new_empty(m, **new),
        x.new_empty((6, m), **new),
        x.new_empty((2 if want_slopes else 0, m, d), **new),
        x.new_empty(torch.sym_min(keep, 2 * m * n), **new),
    )


@torch.library.register_fake("vlpfast::pair_distill_bwd")
def _(grad_student, grad_cross, x: Tensor, y: Tensor, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids,
      stats, stash, need_x, need_y):  # fmt: skip
    return x.new_empty((x.shape[0] if need_x else 0, x.shape[1])), y.new_empty((y.shape[0] if need_y else 0, y.shape[1]))
