"""pair_distill in Triton: pair_distill_fwd_triton and pair_distill_bwd_triton of vlpfast/ops/_schemas.py.

See csrc/contrastive/distill.cpp for the form of the sums. Rows may be few and columns many: a program goes over some columns for
a block of rows, with running maxima, and a second kernel merges what the programs found. Of narrow features (triton_width) a tile
of y is read once, for student and teacher and, where only x needs a gradient, for the sums E_s y and E_t y that make it: the
backward then has no product. Otherwise the backward makes P = dLoss/dS again, some rows at a time, and multiplies it as
pair_logsumexp's weights are multiplied (triton_gradient.py); nothing is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._schemas import stash_dtype, stash_width
from vlpfast.ops._triton import cdiv, dot, grouped, launch, narrow
from vlpfast.ops.contrastive.distill import triton_width
from vlpfast.ops.contrastive.triton_gradient import Gradient, Side, Unit, own_of_columns, own_of_rows, times
from vlpfast.ops.contrastive.triton_sums import LOG2E, Pairs, chunks
from vlpfast.ops.contrastive.triton_tiles import kept_pairs, own_logits, precision, products, tile

WORKSPACE_BYTES = 256 << 20  # of P; at least 128 rows at a time
MOST_PARTS = 512  # of the columns: the second kernel holds a number of each at once


@triton.jit
def _whole(features, lines, LINES, WIDTH, row, column, BLOCK: tl.constexpr):
    """[lines, BLOCK] with the width as a whole, zeros outside."""
    d = tl.arange(0, BLOCK)
    at = features + lines.to(tl.int64)[:, None] * row + d.to(tl.int64)[None, :] * column
    return tl.load(at, mask=(lines < LINES)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _raise(shift, s):
    """The larger shift [rows] that logits s [rows, columns] need, as a number where all are -inf, and exp(s - it)."""
    raised = tl.maximum(shift, tl.max(s, 1))
    usable = tl.where(raised == float("-inf"), 0.0, raised)
    return raised, tl.exp2((shift - usable) * LOG2E), tl.exp2((s - usable[:, None]) * LOG2E)


@triton.jit
def _distilled_sums(
    sums_out, weighted_out, x, y, x_t, y_t, scale, scale_t, bias, origin, origin_t, own, row_ids, column_ids,
    M, N, D, E, PARTS, COLUMNS, sum_list, x_row, x_column, y_row, y_column, x_t_row, x_t_column, y_t_row, y_t_column,
    bias_stride, own_stride, own_offset, row_ids_stride, column_ids_stride,
    OWN: tl.constexpr, WHOLE: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Over COLUMNS columns, sums_out [6, PARTS, M]: the student's shift and sum, the teacher's, the sums of E_s and E_t times
    <x_i, y_j>.

    weighted_out [PARTS, 2, M, D]: E_s y and E_t y. Products are relative to the rounded own one. No y_t: y.
    """
    rows = tl.program_id(0) // PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) % PARTS
    inside = rows < M
    base = tl.load(origin + rows, mask=inside, other=0.0)[:, None]
    base_t = tl.load(origin_t + rows, mask=inside, other=0.0)[:, None]
    factor, factor_t = tl.load(scale), tl.load(scale_t)
    shift = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    shift_t = shift
    total = tl.zeros((BLOCK_M,), tl.float32)
    total_t, mean, mean_t = total, total, total
    if WHOLE:
        mine = _whole(x, rows, M, D, x_row, x_column, BLOCK_D)
        mine_t = _whole(x_t, rows, M, E, x_t_row, x_t_column, BLOCK_E)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if weighted_out is not None:
        weighted = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        weighted_t = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(part * COLUMNS, tl.minimum(N, (part + 1) * COLUMNS), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        if WHOLE:
            f = _whole(y, columns, N, D, y_row, y_column, BLOCK_D)
            s = dot(mine, tl.trans(f), zero, PRECISION)
            if y_t is None:
                t = dot(mine_t, tl.trans(f), zero, PRECISION)
            else:
                t = dot(mine_t, tl.trans(_whole(y_t, columns, N, E, y_t_row, y_t_column, BLOCK_E)), zero, PRECISION)
        else:
            s = products(
                x, y, rows, columns, M, N, D, x_row, x_column, y_row, y_column, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, PRECISION
            )
            if y_t is None:
                t = products(
                    x_t, y, rows, columns, M, N, E, x_t_row, x_t_column, y_row, y_column, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_E,
                    PRECISION,
                )  # fmt: skip
            else:
                t = products(
                    x_t, y_t, rows, columns, M, N, E, x_t_row, x_t_column, y_t_row, y_t_column, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_E,
                    PRECISION,
                )  # fmt: skip
        kept = kept_pairs(
            rows, columns, M, N, own, own_stride, own_offset, row_ids, row_ids_stride, column_ids, column_ids_stride, OWN, False
        )
        s -= base
        t = factor_t * (t - base_t)
        if bias is not None:
            t += tl.load(bias + columns.to(tl.int64) * bias_stride, mask=columns < N, other=0.0)[None, :]
        shift_t, lower_t, e_t = _raise(shift_t, tl.where(kept, t, float("-inf")))
        total_t = total_t * lower_t + tl.sum(e_t, 1)
        mean_t = mean_t * lower_t + tl.sum(e_t * s, 1)
        shift, lower, e = _raise(shift, tl.where(kept, factor * s, float("-inf")))
        total = total * lower + tl.sum(e, 1)
        mean = mean * lower + tl.sum(e * s, 1)
        if weighted_out is not None:
            weighted = times(e, f, weighted * lower[:, None])
            weighted_t = times(e_t, f, weighted_t * lower_t[:, None])
    at = sums_out + part.to(tl.int64) * M + rows
    tl.store(at, shift, mask=inside)
    tl.store(at + sum_list, total, mask=inside)
    tl.store(at + 2 * sum_list, shift_t, mask=inside)
    tl.store(at + 3 * sum_list, total_t, mask=inside)
    tl.store(at + 4 * sum_list, mean, mask=inside)
    tl.store(at + 5 * sum_list, mean_t, mask=inside)
    if weighted_out is not None:
        d = tl.arange(0, BLOCK_D)
        there = inside[:, None] & (d < D)[None, :]
        out = weighted_out + (2 * part.to(tl.int64) * M + rows)[:, None] * D + d[None, :]
        tl.store(out, weighted, mask=there)
        out = weighted_out + ((2 * part.to(tl.int64) + 1) * M + rows)[:, None] * D + d[None, :]
        tl.store(out, weighted_t, mask=there)


@triton.jit
def _merged_shift(shifts, PARTS, M, BLOCK_P: tl.constexpr):
    """The largest of the parts' shifts and what each part's sums are to be multiplied by."""
    parts = tl.arange(0, BLOCK_P)
    shift = tl.load(shifts + parts.to(tl.int64) * M, mask=parts < PARTS, other=float("-inf"))
    largest = tl.max(shift, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.exp2((shift - largest) * LOG2E).to(tl.float64)


@triton.jit
def _merged_sum(sums, factors, PARTS, M, BLOCK_P: tl.constexpr):
    parts = tl.arange(0, BLOCK_P)
    return tl.sum(factors * tl.load(sums + parts.to(tl.int64) * M, mask=parts < PARTS, other=0.0), 0)


@triton.jit
def _slope(
    slopes, weighted, shifts, largest, total, y, column, there, PARTS, M, N, D, d, y_row, y_column,
    STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum over parts of the weighted rows of y over `total`, minus the row `column` of y where it is `there`."""
    out = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, PARTS, STEP):
        parts = start + tl.arange(0, STEP)
        shift = tl.load(shifts + parts.to(tl.int64) * M, mask=parts < PARTS, other=float("-inf"))
        at = weighted + parts.to(tl.int64)[:, None] * (2 * D) * M + d[None, :]
        rows = tl.load(at, mask=(parts < PARTS)[:, None] & (d < D)[None, :], other=0.0)
        out += tl.sum(tl.exp2((shift - largest) * LOG2E)[:, None] * rows, 0)
    out = tl.where(total == 0, 0.0, out / total.to(tl.float32))
    out -= tl.load(y + column * y_row + d.to(tl.int64) * y_column, mask=d < tl.where(there, D, 0), other=0.0).to(tl.float32)
    tl.store(slopes + d, out, mask=d < D)


@triton.jit
def _merge_distilled(
    student, teacher, cross, stats, slopes, sums, weighted, logits, logits_t, products, origin, origin_t, scale, scale_t, y, own,
    M, N, D, PARTS, sum_list, y_row, y_column, own_stride, own_offset,
    OWN: tl.constexpr, BLOCK_P: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row's results from the parts' sums, and BLOCK_D of its slopes."""
    row = tl.program_id(0).to(tl.int64)
    at = sums + row
    shift, factors = _merged_shift(at, PARTS, M, BLOCK_P)
    total = _merged_sum(at + sum_list, factors, PARTS, M, BLOCK_P)
    shift_t, factors_t = _merged_shift(at + 2 * sum_list, PARTS, M, BLOCK_P)
    total_t = _merged_sum(at + 3 * sum_list, factors_t, PARTS, M, BLOCK_P)
    if tl.program_id(1) == 0:
        # products are relative to the rounded own one, results to the exact one
        factor = tl.load(scale).to(tl.float64)
        exact = tl.load(products + row)
        logit = tl.load(logits + row)
        rounding = tl.where(logit == logit, tl.load(origin + row) - exact, logit)  # an own column that is none: NaN
        correction = factor * tl.load(origin + row) - logit
        correction_t = tl.load(scale_t).to(tl.float64) * tl.load(origin_t + row) - tl.load(logits_t + row)
        mean = _merged_sum(at + 4 * sum_list, factors, PARTS, M, BLOCK_P) / tl.where(total == 0, 1.0, total)
        mean_t = _merged_sum(at + 5 * sum_list, factors_t, PARTS, M, BLOCK_P) / tl.where(total_t == 0, 1.0, total_t)
        mean = tl.where(total == 0, -exact, mean + rounding)
        mean_t = tl.where(total_t == 0, 0.0, mean_t + rounding)
        tl.store(student + row, (tl.log(total) + shift + correction).to(tl.float32))
        tl.store(teacher + row, (tl.log(total_t) + shift_t + correction_t).to(tl.float32))
        tl.store(cross + row, (factor * mean_t).to(tl.float32))
        tl.store(stats + row, total.to(tl.float32))
        tl.store(stats + M + row, shift)
        tl.store(stats + 2 * M + row, total_t.to(tl.float32))
        tl.store(stats + 3 * M + row, shift_t)
        tl.store(stats + 4 * M + row, mean.to(tl.float32))
        tl.store(stats + 5 * M + row, mean_t.to(tl.float32))
    if slopes is not None:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        column = row + own_offset
        if OWN == 2:
            column = tl.load(own + row * own_stride)
        there = (column >= 0) & (column < N)
        if OWN == 0:
            there = column < 0
        line = row * D
        _slope(
            slopes + line, weighted + line, at, shift, total, y, column, there, PARTS, M, N, D, d, y_row, y_column,
            STEP, BLOCK_D,
        )  # fmt: skip
        line = (M + row) * D
        _slope(
            slopes + line, weighted + line, at + 2 * sum_list, shift_t, total_t, y, column, there & (total_t != 0), PARTS, M, N,
            D, d, y_row, y_column, STEP, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _distilled_weights(
    kept_rows, x, y, x_t, y_t, scale, scale_t, bias, origin, origin_t, own, row_ids, column_ids, weights, weights_t,
    shifts, shifts_t,
    M, N, D, E, kept_row, x_row, x_column, y_row, y_column, x_t_row, x_t_column, y_t_row, y_t_column,
    bias_stride, own_stride, own_offset, row_ids_stride, column_ids_stride,
    OWN: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of P = weight * E_s + weight_t * E_t."""
    block_row, block_column = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = block_row * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < M
    t = products(
        x_t, y_t, rows, columns, M, N, E, x_t_row, x_t_column, y_t_row, y_t_column, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_E, PRECISION
    )
    t = tl.load(scale_t) * (t - tl.load(origin_t + rows, mask=inside, other=0.0)[:, None])
    if bias is not None:
        t += tl.load(bias + columns.to(tl.int64) * bias_stride, mask=columns < N, other=0.0)[None, :]
    kept = kept_pairs(
        rows, columns, M, N, own, own_stride, own_offset, row_ids, row_ids_stride, column_ids, column_ids_stride, OWN, False
    )
    weight = tl.load(weights_t + rows, mask=inside, other=0.0)[:, None]
    p = weight * tl.exp2((tl.where(kept, t, float("-inf")) - tl.load(shifts_t + rows, mask=inside, other=0.0)[:, None]) * LOG2E)
    s = products(x, y, rows, columns, M, N, D, x_row, x_column, y_row, y_column, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, PRECISION)
    s -= tl.load(origin + rows, mask=inside, other=0.0)[:, None]
    weight = tl.load(weights + rows, mask=inside, other=0.0)[:, None]
    shift = tl.load(shifts + rows, mask=inside, other=0.0)[:, None]
    p += weight * tl.exp2((tl.where(kept, tl.load(scale) * s, float("-inf")) - shift) * LOG2E)
    at = kept_rows + rows.to(tl.int64)[:, None] * kept_row + columns[None, :]
    tl.store(at, narrow(p, kept_rows.dtype.element_ty), mask=inside[:, None] & (columns < kept_row)[None, :])


@dataclass(frozen=True)
class Distillation:
    """Both matrices of logits, and the own pairs' logits and products [2, M] of each in float64, zeros without own pairs."""

    student: Pairs
    teacher: Pairs  # its y is the student's where the two have one
    shared: bool
    own: Tensor
    own_t: Tensor

    @staticmethod
    def of(x, y, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids) -> Distillation:
        others = y if y_t is None else y_t
        student = Pairs(x, y, scale, None, own, own_offset, row_ids, column_ids)
        teacher = Pairs(x_t, others, scale_t, bias_t, own, own_offset, row_ids, column_ids)
        logits = own_logits(x, y, scale, None, own, own_offset)[0], own_logits(x_t, others, scale_t, bias_t, own, own_offset)[0]
        return Distillation(student, teacher, y_t is None, *logits)

    def arguments(self, begin: int, end: int) -> dict[str, object]:
        t = self.teacher.arguments(begin, end)
        return self.student.arguments(begin, end) | {
            "x_t": t["x"], "y_t": t["y"], "scale_t": t["scale"], "bias": t["bias"], "bias_stride": t["bias_stride"], "E": t["D"],
            "x_t_row": t["x_row"], "x_t_column": t["x_column"], "y_t_row": t["y_row"], "y_t_column": t["y_column"],
            "origin": self.own[1, begin:end].float(), "origin_t": self.own_t[1, begin:end].float(),
            "PRECISION": precision(self.student.x.dtype),
        }  # fmt: skip


def forward(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    x_t: Tensor,  # [M, E]
    y_t: Tensor | None,  # [N, E]
    scale: Tensor,  # []
    scale_t: Tensor,  # []
    bias_t: Tensor | None,  # [] or [N]
    own: Tensor | None,  # [M]
    own_offset: int | None,
    row_ids: Tensor | None,  # [M]
    column_ids: Tensor | None,  # [N]
    want_slopes: bool,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (m, d), n, e = x.shape, y.shape[0], x_t.shape[1]
    whole = max(d, e) <= triton_width(x.dtype)
    if keep or (want_slopes and not whole):
        raise ValueError(
            f"pair_distill_fwd_triton: expected keep = 0, slopes of narrow features alone, got {keep}, {d} and {e} wide"
        )
    pairs = Distillation.of(x, y, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids)
    chosen = tile("distill_slopes" if want_slopes else "distill_sums", x)
    programs = chosen.pop("PROGRAMS")
    chosen |= {"BLOCK_D": max(16, triton.next_power_of_2(d)), "BLOCK_E": max(16, triton.next_power_of_2(e))} if whole else {
        "BLOCK_D": 16, "BLOCK_E": 16,
    }  # fmt: skip
    blocks = cdiv(m, chosen["BLOCK_M"]), cdiv(n, chosen["BLOCK_N"])
    columns = max(1, cdiv(blocks[1], max(1, min(cdiv(programs, max(1, blocks[0])), MOST_PARTS)))) * chosen["BLOCK_N"]
    parts = max(1, cdiv(n, columns))
    new = {"dtype": torch.float32}
    sums = x.new_empty(6, parts, m, **new)
    weighted = x.new_empty(parts, 2, m, d, **new) if want_slopes else None
    arguments = pairs.arguments(0, m)
    launch(
        _distilled_sums, (blocks[0] * parts,),
        sums_out=sums, weighted_out=weighted, PARTS=parts, COLUMNS=columns, sum_list=sums.stride(0),
        **(arguments | ({"y_t": None} if pairs.shared else {})), WHOLE=whole, EVEN_D=d % chosen["BLOCK_K"] == 0,
        EVEN_E=e % chosen["BLOCK_K"] == 0, **chosen,
    )  # fmt: skip
    student, teacher, cross = (x.new_empty(m, **new) for _ in range(3))
    stats, slopes = x.new_empty(6, m, **new), x.new_empty(2 if want_slopes else 0, m, d, **new)
    taken = (
        "origin", "origin_t", "scale", "scale_t", "y", "own", "M", "N", "D", "y_row", "y_column", "own_stride", "own_offset",
        "OWN",
    )  # fmt: skip
    launch(
        _merge_distilled, (m, max(1, cdiv(d, 64)) if want_slopes else 1),
        student=student, teacher=teacher, cross=cross, stats=stats, slopes=slopes if want_slopes else None, sums=sums,
        weighted=weighted, logits=pairs.own[0], logits_t=pairs.own_t[0], products=pairs.own[1], PARTS=parts,
        sum_list=sums.stride(0), **{name: arguments[name] for name in taken}, BLOCK_P=triton.next_power_of_2(parts), STEP=32,
        BLOCK_D=64, num_warps=4,
    )  # fmt: skip
    return student, teacher, cross, stats, slopes, x.new_empty(0, **new)


def backward(
    grad_student: Tensor,  # [M]
    grad_cross: Tensor,  # [M]
    x: Tensor,
    y: Tensor,
    x_t: Tensor,
    y_t: Tensor | None,
    scale: Tensor,
    scale_t: Tensor,
    bias_t: Tensor | None,
    own: Tensor | None,
    own_offset: int | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    stats: Tensor,  # [6, M]
    stash: Tensor,  # [0]
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    (m, d), n, e = x.shape, y.shape[0], x_t.shape[1]
    pairs = Distillation.of(x, y, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids)
    unit = Unit.of(grad_student, grad_cross)
    sums, shifts, sums_t, shifts_t = stats[:4]
    grad_cross = torch.where(sums_t == 0, 0, grad_cross)
    weights = torch.where(sums == 0, 0, unit.lift(grad_student) / sums).float()
    weights_t = torch.where(sums_t == 0, 0, unit.lift(grad_cross) / sums_t).float()
    slopes = (grad_student.double() + grad_cross).contiguous()  # [M] -dLoss / dS of the own pairs
    rows, columns = Side(x, None, slopes, unit), Side(y, None, slopes.new_zeros(n), unit)
    dx = Gradient(rows, columns, own_of_rows(own, own_offset), scale, unit, None, need_x, False)
    dy = Gradient(columns, rows, own_of_columns(own, own_offset, n), scale, unit, None, need_y, False)
    chosen = tile("distill_weights", x)
    dtype, width = stash_dtype("triton", x.dtype), stash_width(n)
    pieces = list(chunks(0, m, width * dtype.itemsize, WORKSPACE_BYTES)) or [(0, 0)]
    workspace = x.new_empty(pieces[0][1], width, dtype=dtype)
    for i, (begin, end) in enumerate(pieces if d else []):
        kept = workspace[: end - begin]
        launch(
            _distilled_weights, (cdiv(end - begin, chosen["BLOCK_M"]) * cdiv(n, chosen["BLOCK_N"]),),
            kept_rows=kept, kept_row=width, weights=weights[begin:end], weights_t=weights_t[begin:end],
            shifts=shifts[begin:end], shifts_t=shifts_t[begin:end], **pairs.arguments(begin, end),
            EVEN_D=d % chosen["BLOCK_K"] == 0, EVEN_E=e % chosen["BLOCK_K"] == 0, **chosen,
        )  # fmt: skip
        dx.add(kept, slice(begin, end), slice(0, n))
        dy.add(kept.T, slice(0, n), slice(begin, end), first=i == 0, last=i == len(pieces) - 1)
    return dx.out, dy.out
