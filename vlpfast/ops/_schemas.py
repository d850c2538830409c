"""Every operator's schema and fake kernel; FLOP formulas are in flops.py.

Kernels register themselves on these names (csrc/*/*.cpp, from the library). They are the kernels' interface, without gradients
and without argument checks: call the public functions instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Logits S = scale * x @ y.T (+ bias), x [M, D], y [N, D]; own pair of row i: column own[i], or i + own_offset, or none.
# `row_stats` [2, M] and `column_stats` [2, N] hold the sums of exp(S - shift) and the shifts (in pair_fwd nothing for what is not
# wanted); `exact`: whether the shifts differ. `stash`: exp(S - shift) as far as `keep` elements reach, the backward makes the
# others again. In pair_fwd the first min(keep, M * N) in the kernel's own order, in the accumulating dtype; where rows alone are
# wanted each has its own shift, `exact` is true, and the stash holds S itself. In pair_fwd_triton rows: `stash_shape`, `stash_dtype`.
_PAIR_FWD = (
    "(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? own, SymInt? own_offset, Tensor? row_ids, Tensor? column_ids, "
    "bool want_rows, bool want_columns, SymInt keep) "
    "-> (Tensor rows, Tensor columns, Tensor row_stats, Tensor column_stats, Tensor exact, Tensor stash)"
)
# What is not needed comes back empty. dscale has shape [1], dbias [N].
_PAIR_BWD = (
    "(Tensor grad_rows, Tensor grad_columns, Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? own, SymInt? own_offset, "
    "Tensor? row_ids, Tensor? column_ids, bool want_rows, bool want_columns, "
    "Tensor row_stats, Tensor column_stats, Tensor exact, Tensor stash, "
    "bool need_x, bool need_y, bool need_scale, bool need_bias) "
    "-> (Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)"
)
torch.library.define("vlpfast::pair_fwd", _PAIR_FWD, tags=torch.Tag.pt2_compliant_tag)
torch.library.define("vlpfast::pair_bwd", _PAIR_BWD, tags=torch.Tag.pt2_compliant_tag)
# want_scale: the derivatives of rows and columns by the scale stand in row 2 of the stats [3, M] and [3, N]. The sums of rows in
# `row_stats` are those of the exponentials as they are kept, in bfloat16 for bfloat16 features.
torch.library.define(
    "vlpfast::pair_fwd_triton", _PAIR_FWD.replace("SymInt keep", "bool want_scale, SymInt keep"), tags=torch.Tag.pt2_compliant_tag
)
torch.library.define("vlpfast::pair_bwd_triton", _PAIR_BWD, tags=torch.Tag.pt2_compliant_tag)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, losses, scales and biases beside features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stash_dtype(backend: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the exponentials that `backend` keeps beside features of `dtype`."""
    return torch.bfloat16 if backend == "triton" and dtype == torch.bfloat16 else accumulate_dtype(dtype)


def stash_shape(m: int, n: int, keep: int) -> tuple[int, int]:
    """Triton's: as many whole rows as fit, each padded to a multiple of 16 elements, with which loads are aligned."""
    width = (n + 15) // 16 * 16
    return torch.sym_min(m, keep // torch.sym_max(1, width)), width


@torch.library.register_fake("vlpfast::pair_fwd_triton")
def _(x: Tensor, y: Tensor, scale, bias, own, own_offset, row_ids, column_ids, want_rows, want_columns, want_scale, keep):
    m, n = x.shape[0], y.shape[0]
    new = {"dtype": torch.float32}
    return (
        x.new_empty(m if want_rows else 0, **new),
        x.new_empty(n if want_columns else 0, **new),
        x.new_empty((3, m), **new),
        x.new_empty((3, n), **new),
        x.new_empty((), dtype=torch.bool),
        x.new_empty(stash_shape(m, n, keep), dtype=stash_dtype("triton", x.dtype)),
    )


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
@torch.library.register_fake("vlpfast::pair_bwd_triton")
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
_PAIR_SOFTPLUS = (
    "(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? own, SymInt? own_offset, Tensor? row_ids, Tensor? column_ids, "
    "float negative_weight, bool need_x, bool need_y, bool need_scale, bool need_bias) "
    "-> (Tensor loss, Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)"
)
for _suffix in ("", "_triton"):
    torch.library.define(f"vlpfast::pair_softplus{_suffix}", _PAIR_SOFTPLUS, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("vlpfast::pair_softplus")
@torch.library.register_fake("vlpfast::pair_softplus_triton")
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
_SAMPLE_HARD_NEGATIVES = (
    "(Tensor x, Tensor y, Tensor scale, Tensor? own, SymInt? own_offset, Tensor? row_ids, Tensor? column_ids, "
    "SymInt count, float uniform, Tensor seed) -> Tensor"
)
for _suffix in ("", "_triton"):
    torch.library.define(f"vlpfast::sample_hard_negatives{_suffix}", _SAMPLE_HARD_NEGATIVES, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("vlpfast::sample_hard_negatives")
@torch.library.register_fake("vlpfast::sample_hard_negatives_triton")
def _(x: Tensor, y: Tensor, scale, own, own_offset, row_ids, column_ids, count, uniform, seed):
    return x.new_empty((x.shape[0], count), dtype=torch.int64)


# Student's logits S = scale * x @ y.T, teacher's T = scale_t * x_t @ y_t.T (+ bias_t), x_t [M, E], y_t [N, E]; no y_t: y.
# `stats` [6, M]: sum of exp(S - shift) and shift, then T's, where S and T are relative to the own logit, rounded; then
# d student / d scale and d cross / d scale.
# `slopes` [2, M, D] ([0, M, D] unless wanted): what y's rows average to under softmax(S) and softmax(T), minus the own row.
# `stash`: the products, the first min(keep, 2 * M * N) in the kernel's own order; the backward makes the others again.
_PAIR_DISTILL_FWD = (
    "(Tensor x, Tensor y, Tensor x_t, Tensor? y_t, Tensor scale, Tensor scale_t, Tensor? bias_t, "
    "Tensor? own, SymInt? own_offset, Tensor? row_ids, Tensor? column_ids, bool want_slopes, SymInt keep) "
    "-> (Tensor student, Tensor teacher, Tensor cross, Tensor stats, Tensor slopes, Tensor stash)"
)
# What is not needed comes back empty; the gradient of scale is in the stats.
_PAIR_DISTILL_BWD = (
    "(Tensor grad_student, Tensor grad_cross, Tensor x, Tensor y, Tensor x_t, Tensor? y_t, Tensor scale, Tensor scale_t, "
    "Tensor? bias_t, Tensor? own, SymInt? own_offset, Tensor? row_ids, Tensor? column_ids, Tensor stats, Tensor stash, "
    "bool need_x, bool need_y) -> (Tensor dx, Tensor dy)"
)
for _suffix in ("", "_triton"):
    torch.library.define(f"vlpfast::pair_distill_fwd{_suffix}", _PAIR_DISTILL_FWD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"vlpfast::pair_distill_bwd{_suffix}", _PAIR_DISTILL_BWD, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("vlpfast::pair_distill_fwd")
@torch.library.register_fake("vlpfast::pair_distill_fwd_triton")
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
@torch.library.register_fake("vlpfast::pair_distill_bwd_triton")
def _(grad_student, grad_cross, x: Tensor, y: Tensor, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids,
      stats, stash, need_x, need_y):  # fmt: skip
    return x.new_empty((x.shape[0] if need_x else 0, x.shape[1])), y.new_empty((y.shape[0] if need_y else 0, y.shape[1]))
