"""pair_distill: a student's and a teacher's softmax over the same pairs at once, without their matrices of logits."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import check_stash_bytes
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive import reference
from vlpfast.ops.contrastive._checks import (
    check_alpha,
    check_bias,
    check_directions,
    check_features,
    check_leave_out,
    check_loss_scale,
    check_more_features,
    check_own,
    check_rows,
    check_same_length,
    check_scale,
    check_unused,
    check_weights,
)
from vlpfast.ops.contrastive._parts import common_dtype, logaddexp, mean, row_dots, softplus
from vlpfast.ops.contrastive.losses import Directions
from vlpfast.ops.contrastive.pair import STASH_BYTES

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type


class Distilled(NamedTuple):
    """What `pair_distill` returns: [M] each."""

    student: Tensor
    teacher: Tensor
    cross: Tensor


def pair_distill(
    x: Tensor,
    y: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    scale: float | Tensor,
    scale_t: float | Tensor,
    *,
    own: int | Tensor | None = 0,
    leave_out: tuple[Tensor, Tensor] | None = None,
    bias_t: Tensor | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Distilled:
    """For each row the logsumexps of a student's and of a teacher's logits, and the student's mean logit under the teacher.

    The logits are S = scale * x @ y.T and T = scale_t * x_t @ y_t.T (+ bias_t), [M, N], and are never held whole. With the own
    pair of row i in column o(i), the sums over all j but o(i):

        student[i] = log sum_j exp(S[i, j]) - S[i, o(i)]
        teacher[i] = log sum_j exp(T[i, j]) - T[i, o(i)]
        cross[i]   = sum_j softmax_j(T[i, :]) (S[i, j] - S[i, o(i)])

    and without one nothing is subtracted. The cross-entropy of S against alpha * softmax(T) + (1 - alpha) * one-hot(own) is then

        softplus(student) - alpha * sigmoid(teacher) * cross            without own pairs, alpha = 1: student - cross

    which needs no target pair in a sum. The teacher's side gets no gradient: x_t, y_t, scale_t and bias_t are constants, and so
    is `teacher`.

    Args:
        x: [M, D] float32, float64, bfloat16 or float16, any strides; half types are multiplied and summed in float32. Of
            different dtypes the widest is used. Under autocast features (float64 apart) are cast to its dtype, nothing else is.
        y: [N, D]
        x_t: [M, E], the teacher's features of the same rows; E may differ from D.
        y_t: [N, E]. If it is the object y (momentum keys for both), y is read once for both.
        scale: a float >= 0, or a 0-d tensor (its gradient is made).
        scale_t: likewise, without a gradient.
        own: offset (row i's own pair is column i + own; 0 <= own <= N - M), an int64 tensor [M] of columns (one column may be
            the own of several rows), or None: no row has an own pair.
        leave_out: (row_ids [M], column_ids [N]), int64: pairs with equal ids stay out of all sums as well.
        bias_t: 0-d or [N], added to the teacher's logits of every row (minus a centre over its temperature, for DINO).
        stash_bytes: where y needs a gradient, the forward keeps as many of the 2 * M * N products for the backward as fit, and
            the backward makes the others again. Where only x or scale needs one it is made in the forward, and nothing is kept.
            Triton's kernels never keep any, and make the gradient of x in the forward for features up to 256 wide (float32: 128).

    Returns:
        (student, teacher, cross), [M] each, in float32 (float64 for float64 features); -inf, -inf and 0 where every pair is left
        out.

    Raises:
        TypeError, ValueError: a wrong argument, named. The values in `own` are checked only where they are on the host.
    """
    check_features(x, y)
    m, n = x.shape[0], y.shape[0]
    check_rows("x_t", x_t, m, x)
    check_rows("y_t", y_t, n, x)
    if y_t.shape[1] != x_t.shape[1]:
        raise ValueError(f"y_t: expected width {x_t.shape[1]} as x_t has, got {y_t.shape[1]}")
    one_y = y_t is y
    x, y, x_t, other_y = common_dtype(x, y, x_t, None if one_y else y_t)
    scale, scale_t = check_scale(scale, x), check_scale(scale_t, x, "scale_t")
    check_own(own, m, n, x.device, unique=False)
    if leave_out is not None:
        check_leave_out(leave_out, m, n, x.device)
    if bias_t is not None:
        bias_t = check_bias(bias_t, x, n, "bias_t")
    check_stash_bytes(stash_bytes)
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return _pair_distill(x, y, x_t, other_y, scale, scale_t, own, leave_out, bias_t, stash_bytes)
    with torch.autocast(device, enabled=False):
        return _pair_distill(x, y, x_t, other_y, scale, scale_t, own, leave_out, bias_t, stash_bytes)


def _pair_distill(x, y, x_t, y_t, scale, scale_t, own, leave_out, bias_t, stash_bytes) -> Distilled:
    backend = backends.choose("pair_distill", KERNELS, x.device, x.dtype)
    if backend == "reference":
        y_t = y if y_t is None else y_t
        return Distilled(*reference.pair_distill(x, y, x_t, y_t, scale, scale_t, own=own, leave_out=leave_out, bias_t=bias_t))
    own_index, own_offset = (own, None) if isinstance(own, Tensor) else (None, own)
    row_ids, column_ids = leave_out if leave_out is not None else (None, None)
    # Dynamo refuses a Function that is given one tensor twice
    y = y.view_as(y) if y is x else y
    column_ids = column_ids.view_as(column_ids) if column_ids is not None and column_ids is row_ids else column_ids
    x_t, y_t, scale_t, bias_t = (None if t is None else t.detach() for t in (x_t, y_t, scale_t, bias_t))
    need_x, need_y = (torch.is_grad_enabled() and t.requires_grad for t in (x, y))
    triton = backend == "triton"  # keeps no products, and makes slopes of narrow features alone
    in_one_pass = need_x and not need_y and not (triton and max(x.shape[1], x_t.shape[1]) > triton_width(x.dtype))
    keep = stash_bytes // accumulate_dtype(x.dtype).itemsize if need_y and not triton else 0
    student, teacher, cross, *_ = PairDistill.apply(
        backend, x, y, x_t, y_t, scale, scale_t, bias_t, own_index, own_offset, row_ids, column_ids, in_one_pass, keep
    )
    return Distilled(student, teacher, cross)


def distilled_contrastive_loss(
    x: Tensor,
    y: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    scale: float | Tensor,
    alpha: float | Tensor,
    *,
    scale_t: float | Tensor | None = None,
    keys: Literal["momentum", "live"] = "momentum",
    directions: Directions = "both",
    row_weights: Tensor | None = None,
    col_weights: Tensor | None = None,
    row_negatives: Tensor | None = None,
    col_negatives: Tensor | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """The contrastive loss with a momentum teacher's soft targets (ALBEF): a row's cross-entropy against

        alpha * softmax(teacher's logits) + (1 - alpha) * one-hot(own pair)

    With momentum keys and queues:

        rows: student x_i, teacher x_t_i, both against [y_t; row_negatives]     columns: y_j, y_t_j against [x_t; col_negatives]

    Nothing of the size N x (N + Q) is made or kept, queues are read where they lie, and for alpha = 0 a loss near zero keeps its
    digits as in `clip_loss`.

    Args:
        x, y: [N, D], the student's features; row i of x belongs to row i of y. See `pair_distill` for dtypes and scale.
        x_t, y_t: [N, D], the teacher's; no gradient. For a term within one modality (TCL: x against another view's momentum
            features), x_t and y_t are both the momentum features, and directions is "rows".
        alpha: the soft targets' share in [0, 1], a number or a 0-d tensor (which may ramp without a new compilation).
        scale_t: the teacher's scale; None: the student's, without gradient.
        keys: what the student's rows are compared with beside the queue: "momentum": the teacher's features of the other side (y
            gets its gradient from the columns' direction alone), "live": the student's own, as in plain in-batch distillation.
        directions: see `clip_loss`: "both" is the half of the sum, as in ALBEF.
        row_weights, col_weights: see `clip_loss`.
        row_negatives, col_negatives: [Q, D], [P, D]: queues of momentum features of y's and of x's kind, for student and teacher
            alike; no gradient. A ring buffer in rows is read in place.
        stash_bytes: see `pair_distill`; counts for each direction's batch, with live keys.

    Returns:
        A 0-d tensor, float32 (float64 for float64 features); 0 for N = 0.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Li et al. 2021, "Align before fuse: vision and language representation learning with momentum distillation"; Yang et al.
    2022, "Vision-language pre-training with triple contrastive learning".
    """
    check_features(x, y)
    check_same_length(x, y)
    for name, features in (("x_t", x_t), ("y_t", y_t)):
        check_rows(name, features, x.shape[0], x)
        check_more_features(name, features, x)
    for name, features in (("row_negatives", row_negatives), ("col_negatives", col_negatives)):
        if features is not None:
            check_more_features(name, features, x)
    check_alpha(alpha, x)
    if keys not in ("momentum", "live"):
        raise ValueError(f"keys: expected 'momentum' or 'live', got {keys!r}")
    weights = check_directions(directions)
    check_unused(
        weights, row_weights=row_weights, col_weights=col_weights, row_negatives=row_negatives, col_negatives=col_negatives
    )
    for name, value in (("row_weights", row_weights), ("col_weights", col_weights)):
        if value is not None:
            check_weights(name, value, x)
    x, y, x_t, y_t, row_queue, col_queue = common_dtype(x, y, x_t, y_t, row_negatives, col_negatives)
    x_t, y_t, row_queue, col_queue = (None if t is None else t.detach() for t in (x_t, y_t, row_queue, col_queue))
    check_loss_scale(scale)
    scale = check_scale(scale, x)
    scale_t = scale.detach() if scale_t is None else check_scale(scale_t, x, "scale_t").detach()

    def losses(x: Tensor, y: Tensor, x_t: Tensor, y_t: Tensor, queue: Tensor | None) -> Tensor:
        found = pair_distill(x, y, x_t, y_t, scale, scale_t, stash_bytes=stash_bytes)
        if queue is not None:
            more = pair_distill(x, queue, x_t, queue, scale, scale_t, own=None)
            # in double: of a loss near zero the rounding of own logits would be all of the error
            own, own_t = (s * row_dots(a.double(), b.double()) for s, a, b in ((scale, x, y), (scale_t, x_t, y_t)))
            found = _merged(found, more, own, own_t)
        return (softplus(found.student) - alpha * found.teacher.sigmoid() * found.cross).to(scale.dtype)  # [N]

    sides = []
    for side, (weight, over) in enumerate(zip(weights, (row_weights, col_weights), strict=True)):
        if weight:
            mine, other, mine_t, other_t, queue = (x, y, x_t, y_t, row_queue) if side == 0 else (y, x, y_t, x_t, col_queue)
            found = losses(mine, other if keys == "live" else other_t, mine_t, other_t, queue)
            sides.append(weight * mean(found, over))
    return sum(sides[1:], sides[0])


def _merged(own: Distilled, more: Distilled, own_logits: Tensor, own_logits_t: Tensor) -> Distilled:
    """Over the columns of both, `own` with own pairs and `more` without; own_logits: the student's and the teacher's, [M]."""
    beside = more.teacher - own_logits_t
    teacher = logaddexp(own.teacher, beside)
    share = (own.teacher - teacher).exp()  # of the first columns in the teacher's sum
    cross = share * own.cross + (beside - teacher).exp() * (more.cross - own_logits)
    return Distilled(logaddexp(own.student, more.student - own_logits), teacher, cross)


def triton_width(dtype: torch.dtype) -> int:
    """The width of features up to which Triton has sums E y in registers, and so makes the gradient of x in the forward."""
    return 128 if dtype == torch.float32 else 256


class PairDistill(torch.autograd.Function):
    """Arguments and results of torch.ops.vlpfast.pair_distill_fwd of one backend; student and cross have gradients."""

    @staticmethod
    def forward(backend, x, y, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids, want_slopes, keep):
        operator = torch.ops.vlpfast.pair_distill_fwd_triton if backend == "triton" else torch.ops.vlpfast.pair_distill_fwd
        return operator(x, y, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids, want_slopes, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, *tensors, ctx.own_offset, row_ids, column_ids, _, _ = inputs
        _, teacher, _, *saved = output  # stats, slopes, stash
        ctx.save_for_backward(*tensors, row_ids, column_ids, *saved)
        ctx.mark_non_differentiable(teacher, *saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_student: Tensor | None, grad_teacher: None, grad_cross: Tensor | None, *_: None) -> tuple:
        x, y, x_t, y_t, scale, scale_t, bias_t, own, row_ids, column_ids, stats, slopes, stash = ctx.saved_tensors
        grad_student = stats.new_zeros(x.shape[0]) if grad_student is None else grad_student
        grad_cross = stats.new_zeros(x.shape[0]) if grad_cross is None else grad_cross
        dx, dy, dscale = _Gradient.apply(
            ctx.backend, grad_student, grad_cross, x, y, x_t, y_t, scale, scale_t, bias_t, own, ctx.own_offset, row_ids,
            column_ids, stats, slopes, stash, *ctx.needs_input_grad[1:3],
        )  # fmt: skip
        need_x, need_y, _, _, need_scale = ctx.needs_input_grad[1:6]
        return None, dx if need_x else None, dy if need_y else None, None, None, dscale if need_scale else None, *[None] * 8

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"pair_distill: results under vmap {backends.BY_REFERENCE}")


class _Gradient(torch.autograd.Function):
    """The gradients as a step of their own in the graph: a second derivative meets an error, never a silent zero.

    dx comes from the slopes where the forward has made them, dx and dy from torch.ops.vlpfast.pair_distill_bwd else.
    """

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(backend, grad_student, grad_cross, x, y, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids,
                stats, slopes, stash, need_x, need_y):  # fmt: skip
        dscale = (grad_student * stats[4] + grad_cross * stats[5]).sum()
        if slopes.shape[0]:
            dx = scale * (grad_student[:, None] * slopes[0] + grad_cross[:, None] * slopes[1])
            return dx.to(x.dtype), y.new_empty(0), dscale
        if not need_x and not need_y:
            return x.new_empty(0), y.new_empty(0), dscale
        operator = torch.ops.vlpfast.pair_distill_bwd_triton if backend == "triton" else torch.ops.vlpfast.pair_distill_bwd
        dx, dy = operator(
            grad_student, grad_cross, x, y, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids,
            stats, stash, need_x, need_y,
        )  # fmt: skip
        return dx, dy, dscale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"pair_distill: second derivatives {backends.BY_REFERENCE}")
