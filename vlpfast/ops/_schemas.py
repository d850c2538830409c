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
# wanted each has its own shift, `exact` is true, and the stash holds S itself. In pair_fwd_triton rows: `stash_shape`,
# `stash_dtype`; where rows alone are wanted `exact` is true too, and a row's exponentials have a shift for each ROW_BLOCK
# columns, its largest logit there (-inf where all are left out), kept beside them.
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


ROW_BLOCK = 128  # columns that have one shift in each row, in pair_fwd_triton for rows alone


def stash_width(n: int) -> int:
    """Triton's exponentials of one row, padded to a multiple of 16 elements, with which loads are aligned."""
    return (n + 15) // 16 * 16


def stash_shape(m: int, n: int, keep: int, dtype: torch.dtype, rows_alone: bool) -> tuple[int, int]:
    """Triton's: as many whole rows as fit. With rows_alone a row's shifts, float32, follow its exponentials, padded likewise."""
    width = stash_width(n)
    if rows_alone:
        width += stash_width((n // ROW_BLOCK + 1) * (4 // dtype.itemsize))  # never empty, which no view as float32 would take
    return torch.sym_min(m, keep // torch.sym_max(1, width)), width


@torch.library.register_fake("vlpfast::pair_fwd_triton")
def _(x: Tensor, y: Tensor, scale, bias, own, own_offset, row_ids, column_ids, want_rows, want_columns, want_scale, keep):
    m, n = x.shape[0], y.shape[0]
    new, kept = {"dtype": torch.float32}, stash_dtype("triton", x.dtype)
    return (
        x.new_empty(m if want_rows else 0, **new),
        x.new_empty(n if want_columns else 0, **new),
        x.new_empty((3, m), **new),
        x.new_empty((3, n), **new),
        x.new_empty((), dtype=torch.bool),
        x.new_empty(stash_shape(m, n, keep, kept, want_rows and not want_columns), dtype=kept),
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


# --- late interaction -------------------------------------------------------------------------------------------------

# Set i of a side has the tokens start[i] to start[i + 1] of x [Lx, D] or y [Ly, D], at most `longest` of them; `keep` [Lx], [Ly]
# says which count. candidates = None: every set of x (M) meets every set of y (N); else set m of x meets the sets
# m * candidates + k of y, k in [0, candidates). Scores are [M, N] or [M, candidates], [0, ...] for a direction not wanted.
# Winners, if `keep_winners`: y_of_x [N or candidates, Lx], for each token of x the place in the set of y of the token nearest to
# it, and x_of_y [M or 1, Ly] likewise; 0 for tokens that do not count. Their dtype is maxsim_index_dtype(longest).
_MAXSIM_FWD = (
    "(Tensor x, Tensor y, Tensor x_start, Tensor y_start, Tensor? x_keep, Tensor? y_keep, SymInt x_longest, SymInt y_longest, "
    "SymInt? candidates, bool want_x_to_y, bool want_y_to_x, bool mean, bool zero, bool keep_winners) "
    "-> (Tensor x_to_y, Tensor y_to_x, Tensor y_of_x, Tensor x_of_y)"
)
# A direction without a gradient takes no part. Winners with no rows are found again. What is not needed comes back with no rows.
_MAXSIM_BWD = (
    "(Tensor? grad_x_to_y, Tensor? grad_y_to_x, Tensor x, Tensor y, Tensor x_start, Tensor y_start, Tensor? x_keep, "
    "Tensor? y_keep, SymInt x_longest, SymInt y_longest, SymInt? candidates, bool mean, bool zero, "
    "Tensor y_of_x, Tensor x_of_y, bool need_x, bool need_y) -> (Tensor dx, Tensor dy)"
)
for _suffix in ("", "_triton"):
    torch.library.define(f"vlpfast::maxsim_fwd{_suffix}", _MAXSIM_FWD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"vlpfast::maxsim_bwd{_suffix}", _MAXSIM_BWD, tags=torch.Tag.pt2_compliant_tag)


def maxsim_index_dtype(longest: int) -> torch.dtype:
    """What holds the places in a set of so many tokens; int16 holds the bits of an unsigned number."""
    return torch.uint8 if longest <= 1 << 8 else torch.int16 if longest <= 1 << 16 else torch.int32


@torch.library.register_fake("vlpfast::maxsim_fwd")
@torch.library.register_fake("vlpfast::maxsim_fwd_triton")
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
@torch.library.register_fake("vlpfast::maxsim_bwd_triton")
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


# --- segments, attention over frames ----------------------------------------------------------------------------------

SEGMENT_MODES = ("mean", "max", "logsumexp", "attention")  # `mode` is the place here

# x [L, C]; start [S + 1] int64; score [L, H] contiguous in the accumulating dtype, with "attention" alone. pooled [S, C] in x's
# dtype. In the backward grad has x's dtype, x is absent for "mean", `length` is L; what is not needed comes back empty.
_SEGMENT_POOL_FWD = "(Tensor x, Tensor start, Tensor? score, int mode) -> Tensor pooled"
_SEGMENT_POOL_BWD = (
    "(Tensor grad, Tensor? x, Tensor start, Tensor? score, SymInt length, int mode, bool need_x, bool need_score) "
    "-> (Tensor dx, Tensor dscore)"
)
# q [B, Tq, P, H * Dq], k [B, T, P, H * Dq], v [B, T, P, H * Dv], out and grad [B, Tq, P, H * Dv], all of one dtype, their last
# dimension dense; Tq and T at most 32; keep [B, T] bool, True: seen.
_TEMPORAL_ATTENTION_FWD = "(Tensor q, Tensor k, Tensor v, Tensor? keep, SymInt heads, float scale, bool causal) -> Tensor out"
_TEMPORAL_ATTENTION_BWD = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? keep, SymInt heads, float scale, bool causal) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)
for _suffix in ("", "_triton"):
    for _name, _schema in (
        ("segment_pool_fwd", _SEGMENT_POOL_FWD),
        ("segment_pool_bwd", _SEGMENT_POOL_BWD),
        ("temporal_attention_fwd", _TEMPORAL_ATTENTION_FWD),
        ("temporal_attention_bwd", _TEMPORAL_ATTENTION_BWD),
    ):
        torch.library.define(f"vlpfast::{_name}{_suffix}", _schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("vlpfast::segment_pool_fwd")
@torch.library.register_fake("vlpfast::segment_pool_fwd_triton")
def _(x: Tensor, start, score, mode):
    return x.new_empty((start.shape[0] - 1, x.shape[1]))


@torch.library.register_fake("vlpfast::segment_pool_bwd")
@torch.library.register_fake("vlpfast::segment_pool_bwd_triton")
def _(grad: Tensor, x, start, score, length, mode, need_x, need_score):
    dscore = (length, score.shape[1]) if need_score else (0, 0)
    return grad.new_empty((length if need_x else 0, grad.shape[1])), grad.new_empty(dscore, dtype=accumulate_dtype(grad.dtype))


@torch.library.register_fake("vlpfast::temporal_attention_fwd")
@torch.library.register_fake("vlpfast::temporal_attention_fwd_triton")
def _(q: Tensor, k, v: Tensor, keep, heads, scale, causal):
    return q.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.register_fake("vlpfast::temporal_attention_bwd")
@torch.library.register_fake("vlpfast::temporal_attention_bwd_triton")
def _(grad, q: Tensor, k: Tensor, v: Tensor, keep, heads, scale, causal):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
