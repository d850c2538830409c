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


# --- frames -----------------------------------------------------------------------------------------------------------

# x [B, F, R, E], elements of a row consecutive: of each row of frame t, elements back_begin to back_end come from frame t - 1,
# ahead_begin to ahead_end from frame t + 1, the others stay. The first and the last frame: in a circle if cyclic, else (and in
# frame_shift_, which writes into x) zeros.
_SPANS = "SymInt back_begin, SymInt back_end, SymInt ahead_begin, SymInt ahead_end"
# Place i of n along an axis of length L covers [floor(i L / n), ceil((i + 1) L / n)); means, or the largest. winners
# [B or 0, t, h, w, C]: the place of the largest in its window, counted in order; their dtype is
# maxsim_index_dtype(pool_longest((T, H, W), (t, h, w))).
_POOL_FWD = "(Tensor x, SymInt t, SymInt h, SymInt w, bool largest, bool keep_winners) -> (Tensor pooled, Tensor winners)"
_POOL_BWD = "(Tensor grad, Tensor winners, SymInt frames, SymInt height, SymInt width, bool largest) -> Tensor dx"
for _suffix in ("", "_triton"):
    for _name, _schema in (
        ("frame_shift", f"(Tensor x, {_SPANS}, bool cyclic) -> Tensor"),
        ("frame_shift_", f"(Tensor(a!) x, {_SPANS}) -> ()"),
        ("pool_tokens_fwd", _POOL_FWD),
        ("pool_tokens_bwd", _POOL_BWD),
    ):
        torch.library.define(f"vlpfast::{_name}{_suffix}", _schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("vlpfast::frame_shift")
@torch.library.register_fake("vlpfast::frame_shift_triton")
def _(x: Tensor, back_begin, back_end, ahead_begin, ahead_end, cyclic):
    return x.new_empty(x.shape)


@torch.library.register_fake("vlpfast::frame_shift_")
@torch.library.register_fake("vlpfast::frame_shift__triton")
def _(x: Tensor, back_begin, back_end, ahead_begin, ahead_end):
    return None


def pool_longest(lengths: tuple[int, ...], out: tuple[int, ...]) -> int:
    """No window has more cells."""
    longest = 1
    for length, n in zip(lengths, out, strict=True):
        longest *= length // max(1, n) + (2 if length % max(1, n) else 0)
    return longest


@torch.library.register_fake("vlpfast::pool_tokens_fwd")
@torch.library.register_fake("vlpfast::pool_tokens_fwd_triton")
def _(x: Tensor, t, h, w, largest, keep_winners):
    shape = (t, h, w, x.shape[4])
    dtype = maxsim_index_dtype(pool_longest(x.shape[1:4], shape[:3]))
    return x.new_empty((x.shape[0], *shape)), x.new_empty((x.shape[0] if largest and keep_winners else 0, *shape), dtype=dtype)


@torch.library.register_fake("vlpfast::pool_tokens_bwd")
@torch.library.register_fake("vlpfast::pool_tokens_bwd_triton")
def _(grad: Tensor, winners, frames, height, width, largest):
    return grad.new_empty((grad.shape[0], frames, height, width, grad.shape[4]))


# --- late interaction with int8 documents -----------------------------------------------------------------------------

# Arguments as maxsim_fwd's, y int8 and y_scale [Ly] float32: token t of y stands for y_scale[t] * y[t], with `unit` for that
# token at unit length. x_to_y [M, N] alone, without gradient.
torch.library.define(
    "vlpfast::maxsim_int8",
    "(Tensor x, Tensor y, Tensor y_scale, Tensor x_start, Tensor y_start, Tensor? x_keep, Tensor? y_keep, SymInt x_longest, "
    "SymInt y_longest, bool mean, bool unit) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("vlpfast::maxsim_int8")
def _(x: Tensor, y, y_scale, x_start, y_start, x_keep, y_keep, x_longest, y_longest, mean, unit):
    return x.new_empty((x_start.shape[0] - 1, y_start.shape[0] - 1), dtype=accumulate_dtype(x.dtype))


# --- merging of tokens ------------------------------------------------------------------------------------------------

# Which of the tokens of metric [B, N, C] merge (vlpfast/ops/tokens/matching.py): set B has the places every - 1, 2 * every - 1,
# ..., set A the others; or with index tensors, each ascending, those of a [Na] and b [Nb]. Places below `protect` take no part.
# r, at least 1, is at most the number of places in A from `protect` on; B has such a place too. mask [B, N]: True is real.
# index [B, N], kept [B, N - r], source [B, r], target [B, r], all int64 (Match).
_MATCH_FWD = (
    "(Tensor metric, Tensor? a, Tensor? b, SymInt every, SymInt protect, SymInt r, bool by_score, Tensor? mask) "
    "-> (Tensor index, Tensor kept, Tensor source, Tensor target)"
)
# x [B, N, C]: place i of y [B, N - r, C] has the token kept[i] and those of source whose target is i; their sum, or their mean
# under weight [B, N] (in the accumulating dtype; None: 1 each), or of each channel the largest. total [B, N - r]: the sums of
# weight.
_MERGE_FWD = (
    "(Tensor x, Tensor? weight, Tensor kept, Tensor source, Tensor target, bool mean, bool largest) -> (Tensor y, Tensor total)"
)
# grad_y [B, N - r, C] in x's dtype. weight and total are needed for a mean, x for `largest` and need_weight, grad_total for
# need_weight. What is not needed comes back empty, [0, N, C] and [0, N]. With index alone, not mean, this is unmerge.
_MERGE_BWD = (
    "(Tensor grad_y, Tensor? grad_total, Tensor index, Tensor? weight, Tensor? total, Tensor? x, "
    "bool mean, bool largest, bool need_x, bool need_weight) -> (Tensor dx, Tensor dweight)"
)
# y, the means of x + delta, which is not rounded, under size [B, N] if weighted, else of equal weights; total [B, N - r] the sums
# of size (None: 1 each); normed [B, N - r, C] y's layer norm under weight and bias [C], in y's dtype or the accumulating one
# (wide). delta is in x's dtype, or in a half type beside float32. stats [3, B, N - r]: mean and reciprocal deviation of y's rows,
# then the sums of what tokens weigh. size, weight, bias, total and stats are in the accumulating dtype.
_ADD_MERGE_NORM_FWD = (
    "(Tensor x, Tensor delta, Tensor? size, Tensor kept, Tensor source, Tensor target, Tensor weight, Tensor bias, float eps, "
    "bool weighted, bool wide) -> (Tensor y, Tensor total, Tensor normed, Tensor stats)"
)
# size: of a mean under sizes, else None. ddelta: dx in delta's dtype where that is another than x's, else empty, as is what is
# not needed.
_ADD_MERGE_NORM_BWD = (
    "(Tensor grad_y, Tensor grad_normed, Tensor y, Tensor stats, Tensor? size, Tensor index, Tensor kept, Tensor weight, "
    "ScalarType? delta_dtype, bool need_x, bool need_weight) -> (Tensor dx, Tensor ddelta, Tensor dweight, Tensor dbias)"
)
for _suffix in ("", "_triton"):
    torch.library.define(f"vlpfast::match_fwd{_suffix}", _MATCH_FWD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"vlpfast::merge_fwd{_suffix}", _MERGE_FWD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"vlpfast::merge_bwd{_suffix}", _MERGE_BWD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"vlpfast::add_merge_norm_fwd{_suffix}", _ADD_MERGE_NORM_FWD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"vlpfast::add_merge_norm_bwd{_suffix}", _ADD_MERGE_NORM_BWD, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("vlpfast::match_fwd")
@torch.library.register_fake("vlpfast::match_fwd_triton")
def _(metric: Tensor, a, b, every, protect, r, by_score, mask):
    batch, n, _ = metric.shape
    return tuple(metric.new_empty((batch, length), dtype=torch.int64) for length in (n, n - r, r, r))


@torch.library.register_fake("vlpfast::merge_fwd")
@torch.library.register_fake("vlpfast::merge_fwd_triton")
def _(x: Tensor, weight, kept: Tensor, source, target, mean, largest):
    return x.new_empty((*kept.shape, x.shape[2])), x.new_empty(kept.shape, dtype=accumulate_dtype(x.dtype))


@torch.library.register_fake("vlpfast::merge_bwd")
@torch.library.register_fake("vlpfast::merge_bwd_triton")
def _(grad_y: Tensor, grad_total, index: Tensor, weight, total, x, mean, largest, need_x, need_weight):
    batch, n = index.shape
    return (
        grad_y.new_empty((batch if need_x else 0, n, grad_y.shape[2])),
        grad_y.new_empty((batch if need_weight else 0, n), dtype=accumulate_dtype(grad_y.dtype)),
    )


@torch.library.register_fake("vlpfast::add_merge_norm_fwd")
@torch.library.register_fake("vlpfast::add_merge_norm_fwd_triton")
def _(x: Tensor, delta, size, kept: Tensor, source, target, weight, bias, eps, weighted, wide):
    sums = {"dtype": accumulate_dtype(x.dtype)}
    shape = (*kept.shape, x.shape[2])
    normed = x.new_empty(shape, **sums) if wide else x.new_empty(shape)
    return x.new_empty(shape), x.new_empty(kept.shape, **sums), normed, x.new_empty((3, *kept.shape), **sums)


@torch.library.register_fake("vlpfast::add_merge_norm_bwd")
@torch.library.register_fake("vlpfast::add_merge_norm_bwd_triton")
def _(grad_y, grad_normed, y: Tensor, stats, size, index: Tensor, kept, weight, delta_dtype, need_x, need_weight):
    (batch, n), c = index.shape, y.shape[2]
    norm = {"size": (c if need_weight else 0,), "dtype": accumulate_dtype(y.dtype)}
    return (
        y.new_empty((batch if need_x else 0, n, c)),
        y.new_empty((batch if need_x and delta_dtype is not None else 0, n, c), dtype=delta_dtype or y.dtype),
        y.new_empty(**norm),
        y.new_empty(**norm),
    )


# --- tokens: selection and masking ------------------------------------------------------------------------------------

# out [B, K, C]: row j of image b is row indices[b, j] of x[b], x [B, N, C], indices [B, K] int64; where the index is -1 it is
# `fill` [C] (any floating dtype), zeros without one. Its own gradient, by the inverse permutation: row n of x gets the row of
# the gradient that was made of it, -1 stands for none.
_GATHER_ROWS = "(Tensor x, Tensor indices, Tensor? fill) -> Tensor"
# The sum of the rows of x [B, K, C] whose index is -1, [C] in the accumulating dtype: the gradient of `fill`.
_FILLED_ROWS_SUM = "(Tensor x, Tensor indices) -> Tensor"
# seed [] or [B] int64. indices [B, protect + keep] of what stays, the first `protect` tokens before the others; inverse
# [B, tokens]: the place of every token among these, -1 for none.
_RANDOM_KEEP = (
    "(Tensor seed, SymInt batch, SymInt tokens, SymInt keep, SymInt protect, bool shuffled) -> (Tensor indices, Tensor inverse)"
)
# x [B, N, C], score [B, N] in any floating dtype, mask [B, N] bool. kept [B, protect + k (+ 1 with fuse), C], indices
# [B, protect + k] int64.
_SELECT_FWD = (
    "(Tensor x, Tensor score, Tensor? mask, SymInt k, SymInt protect, bool by_score, bool fuse, bool normalize) "
    "-> (Tensor kept, Tensor indices)"
)
# x is looked at only for the gradient of score. What is not needed comes back empty.
_SELECT_BWD = (
    "(Tensor grad, Tensor? x, Tensor score, Tensor? mask, Tensor indices, bool fuse, bool normalize, "
    "bool need_x, bool need_score) -> (Tensor dx, Tensor dscore)"
)
for _suffix in ("", "_triton"):
    torch.library.define(f"vlpfast::gather_rows{_suffix}", _GATHER_ROWS, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"vlpfast::filled_rows_sum{_suffix}", _FILLED_ROWS_SUM, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"vlpfast::random_keep{_suffix}", _RANDOM_KEEP, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"vlpfast::select_fwd{_suffix}", _SELECT_FWD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(f"vlpfast::select_bwd{_suffix}", _SELECT_BWD, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("vlpfast::gather_rows")
@torch.library.register_fake("vlpfast::gather_rows_triton")
def _(x: Tensor, indices: Tensor, fill):
    return x.new_empty((*indices.shape, x.shape[2]))


@torch.library.register_fake("vlpfast::filled_rows_sum")
@torch.library.register_fake("vlpfast::filled_rows_sum_triton")
def _(x: Tensor, indices):
    return x.new_empty(x.shape[2], dtype=accumulate_dtype(x.dtype))


@torch.library.register_fake("vlpfast::random_keep")
@torch.library.register_fake("vlpfast::random_keep_triton")
def _(seed: Tensor, batch, tokens, keep, protect, shuffled):
    return seed.new_empty((batch, protect + keep)), seed.new_empty((batch, tokens))


@torch.library.register_fake("vlpfast::select_fwd")
@torch.library.register_fake("vlpfast::select_fwd_triton")
def _(x: Tensor, score, mask, k, protect, by_score, fuse, normalize):
    b, _, c = x.shape
    return x.new_empty((b, protect + k + fuse, c)), x.new_empty((b, protect + k), dtype=torch.int64)


@torch.library.register_fake("vlpfast::select_bwd")
@torch.library.register_fake("vlpfast::select_bwd_triton")
def _(grad: Tensor, x, score: Tensor, mask, indices, fuse, normalize, need_x, need_score):
    b, n = score.shape
    return grad.new_empty((b if need_x else 0, n, grad.shape[2])), score.new_empty((b if need_score else 0, n))


# --- the loss of scores of late interaction ---------------------------------------------------------------------------

# row_weight * mean over i of CE(scale * x_to_y[i, :], i + own) + col_weight * mean over j of CE(scale * y_to_x[:, j], j), of the
# matrices [M, N] that are there (M = N with y_to_x). Label smoothing: `smoothing`, 0-d or [M], or else the number; the means are
# weighted by row_weights [M] and col_weights [N]. `gradients`: d loss / d x_to_y, d loss / d y_to_x, each M * N numbers row by
# row, and d loss / d scale, as many of them as are needed, one after the other: multiplied at once.
_SCORE_CE_FWD = (
    "(Tensor? x_to_y, Tensor? y_to_x, Tensor scale, Tensor? smoothing, Tensor? row_weights, Tensor? col_weights, SymInt own, "
    "float label_smoothing, float row_weight, float col_weight, bool need_x_to_y, bool need_y_to_x, bool need_scale) "
    "-> (Tensor loss, Tensor gradients)"
)
for _suffix in ("", "_triton"):
    torch.library.define(f"vlpfast::score_ce_fwd{_suffix}", _SCORE_CE_FWD, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("vlpfast::score_ce_fwd")
@torch.library.register_fake("vlpfast::score_ce_fwd_triton")
def _(x_to_y, y_to_x, scale: Tensor, smoothing, row_weights, col_weights, own, label_smoothing, row_weight, col_weight,
      need_x_to_y, need_y_to_x, need_scale):  # fmt: skip
    m, n = (y_to_x if x_to_y is None else x_to_y).shape
    return scale.new_empty(()), scale.new_empty((need_x_to_y + need_y_to_x) * m * n + need_scale)


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
