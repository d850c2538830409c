"""Gradients of pair_logsumexp in Triton: P @ features, where P = E * (a_i + b_j) is formed as a tile of E is loaded.

One kernel makes dx and dy, each program the gradient of some lines (rows of the logits for dx, columns for dy) in a part of the
width; E comes transposed for the columns. Own pairs are zeros in E: what they give is added to the accumulator in float32.

P is bfloat16 for bfloat16 features. For float16 it is rounded to tf32, which has float16's ten mantissa bits and the range that
weights need, at half the speed; for float32 the product is the sum of three tf32 products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._schemas import ROW_BLOCK
from vlpfast.ops._triton import cdiv, dot, launch, narrow, to_tf32
from vlpfast.ops.contrastive.triton_sums import LOG2E, Pairs
from vlpfast.ops.contrastive.triton_tiles import INDEX, LISTS, NO_OWN, OFFSET, kept_pairs, precision, products, stride, tile

WEIGHT_SCALE = 2.0**40  # how far weights are lifted, so that small ones stay normal numbers; as in csrc/contrastive/pair.cpp


@triton.jit
def times(p, features, total):
    """total + p @ features with p in a dtype that the features' product takes."""
    if features.dtype == tl.bfloat16:
        if p.dtype != tl.bfloat16:
            p = narrow(p, tl.bfloat16)
        return dot(p, features, total, "tf32")
    elif features.dtype == tl.float16:
        return dot(to_tf32(p), features.to(tl.float32), total, "tf32")
    else:
        return dot(p, features, total, "tf32x3")


@triton.jit
def _add_own(total, sums, grads, partner, d, partners, partner_grads, PARTNERS, D, partner_row, partner_column):
    there = (partner >= 0) & (partner < PARTNERS)
    weight = tl.where(there, -(grads + tl.load(partner_grads + partner, mask=there, other=0.0)), 0.0)
    at = partners + partner[:, None] * partner_row + d.to(tl.int64)[None, :] * partner_column
    f = tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)
    return total + weight[:, None] * f.to(tl.float32), sums + weight


@triton.jit
def _own_part(
    lines, d, partners, line_grads, partner_grads, own, own_starts, LINES, PARTNERS, D, partner_row, partner_column, own_stride,
    own_offset, OWN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What own pairs give: dLoss / dS there is -(g_i + h_j). Sums begin with it: at their end registers are scarce."""
    total = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_L,), tl.float32)
    if OWN != 0:
        inside = lines < LINES
        grads = tl.load(line_grads + lines, mask=inside, other=0.0)
        if OWN == 3:
            first = tl.load(own_starts + lines, mask=inside, other=0)
            count = tl.load(own_starts + lines + 1, mask=inside, other=0) - first
            for i in range(0, tl.max(count, 0)):
                partner = tl.load(own + first + i, mask=i < count, other=-1)
                total, sums = _add_own(
                    total, sums, grads, partner, d, partners, partner_grads, PARTNERS, D, partner_row, partner_column
                )
        else:
            partner = lines.to(tl.int64) + own_offset
            if OWN == 2:
                partner = tl.load(own + lines.to(tl.int64) * own_stride, mask=inside, other=-1)
            partner = tl.where(inside, partner, -1)
            total, sums = _add_own(
                total, sums, grads, partner, d, partners, partner_grads, PARTNERS, D, partner_row, partner_column
            )
    return total, sums


@triton.jit
def _finish(total, sums, out, line_sums, scale, power, part, lines, d, LINES, D):
    """Out of their unit: the gradient of the features and, in the first slice of the width, that of the bias."""
    inside = (lines < LINES)[:, None] & (d < D)[None, :]
    if line_sums is not None:
        tl.store(line_sums + lines, sums, mask=lines < tl.where(part == 0, LINES, 0))
    if out is not None:
        # two factors: one alone could leave float32's range
        total = total * (tl.load(scale) * (1 / 1099511627776)) * tl.load(power)
        at = out + lines.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(at, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _centred_gradient(
    out, buffer, line_sums, exact, kept, features, line_weights, other_weights, partners, line_grads,
    partner_grads, own, own_starts, scale, power,
    LINES, OTHERS, PARTNERS, D, KEPT_LINES, KEPT_OTHERS, kept_line, kept_other, feature_row, feature_column,
    partner_row, partner_column, own_stride, own_offset,
    OWN: tl.constexpr, FIRST: tl.constexpr, WHOLE: tl.constexpr, PRODUCT: tl.constexpr, EVEN: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_L lines in BLOCK_D of D columns from exponentials [lines, others].

    WHOLE: there are no others than these; else sums go to `buffer` and, where FIRST is not set, begin with it. Without weights
    what is kept are the weights themselves. COLUMNS: rows of the logits alone have weights, others for each so many columns:
    line_weights [blocks of others, LINES] where lines are rows, other_weights [blocks of lines, OTHERS] where they are columns.
    """
    if exact is not None:
        if tl.load(exact) != 0:
            return
    slices = tl.maximum(tl.cdiv(D, BLOCK_D), 1) if PRODUCT else 1
    part = tl.program_id(0) % slices
    lines = tl.program_id(0) // slices * BLOCK_L + tl.arange(0, BLOCK_L)
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    kept_at = kept + lines.to(tl.int64)[:, None] * kept_line + k.to(tl.int64)[None, :] * kept_other
    feature_at = features + k.to(tl.int64)[:, None] * feature_row + d.to(tl.int64)[None, :] * feature_column
    inside = (lines < LINES)[:, None] & (d < D)[None, :]
    if FIRST:
        total, sums = _own_part(
            lines, d, partners, line_grads, partner_grads, own, own_starts, LINES, PARTNERS, D, partner_row, partner_column,
            own_stride, own_offset, OWN, BLOCK_L, BLOCK_D,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
        sums = tl.zeros((BLOCK_L,), tl.float32)
        if PRODUCT:
            total = tl.load(buffer + lines.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
        if line_sums is not None:
            sums = tl.load(line_sums + lines, mask=lines < LINES, other=0.0)
    if line_weights is not None and COLUMNS == 0:
        a = tl.load(line_weights + lines, mask=lines < LINES, other=0.0)
    if COLUMNS != 0 and other_weights is not None:
        other_weights += (tl.program_id(0) // slices * BLOCK_L // COLUMNS).to(tl.int64) * OTHERS
    for start in range(0, OTHERS, BLOCK_K):
        if EVEN:
            p = tl.load(kept_at)
        else:
            p = tl.load(kept_at, mask=(lines < KEPT_LINES)[:, None] & (k < KEPT_OTHERS - start)[None, :], other=0.0)
        if other_weights is not None:
            if EVEN:
                b = tl.load(other_weights + start + k)
            else:
                b = tl.load(other_weights + start + k, mask=k < OTHERS - start, other=0.0)
        if COLUMNS != 0:
            if line_weights is not None:
                at = line_weights + tl.cast(start // COLUMNS, tl.int64) * LINES + lines
                p = p.to(tl.float32) * tl.load(at, mask=lines < LINES, other=0.0)[:, None]
            else:
                p = p.to(tl.float32) * b[None, :]
        elif line_weights is not None:
            p = p.to(tl.float32) * (a[:, None] + b[None, :])
        if line_sums is not None:
            sums += tl.sum(p.to(tl.float32), 1)
        if PRODUCT:
            if EVEN:
                f = tl.load(feature_at)
            else:
                f = tl.load(feature_at, mask=(k < OTHERS - start)[:, None] & (d < D)[None, :], other=0.0)
            total = times(p, f, total)
        kept_at += BLOCK_K * kept_other
        feature_at += BLOCK_K * feature_row
    if WHOLE:
        _finish(total, sums, out, line_sums, scale, power, part, lines, d, LINES, D)
    else:
        if PRODUCT:
            tl.store(buffer + lines.to(tl.int64)[:, None] * D + d[None, :], total, mask=inside)
        if line_sums is not None:
            tl.store(line_sums + lines, sums, mask=lines < tl.where(part == 0, LINES, 0))


@triton.jit
def _exact_gradient(
    out, line_sums, exact, x, y, scale, bias, own, row_ids, column_ids, row_weights, column_weights, row_shifts,
    column_shifts, line_grads, partner_grads, line_own, line_own_starts, power,
    M, N, D, x_row, x_column, y_row, y_column, bias_stride, own_stride, own_offset, row_ids_stride, column_ids_stride,
    line_own_stride, line_own_offset,
    OWN: tl.constexpr, LINE_OWN: tl.constexpr, ALONG: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same where every row and column has its own shift: each program makes the logits that it needs.

    ALONG: the axis that is summed.
    """
    if tl.load(exact) == 0:
        return
    slices = tl.maximum(tl.cdiv(D, BLOCK_D), 1)
    part = tl.program_id(0) % slices
    block = tl.program_id(0) // slices
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    BLOCK_L: tl.constexpr = BLOCK_M if ALONG == 1 else BLOCK_N
    lines = block * BLOCK_L + tl.arange(0, BLOCK_L)
    if ALONG == 1:
        total, sums = _own_part(
            lines, d, y, line_grads, partner_grads, line_own, line_own_starts, M, N, D, y_row, y_column, line_own_stride,
            line_own_offset, LINE_OWN, BLOCK_L, BLOCK_D,
        )  # fmt: skip
    else:
        total, sums = _own_part(
            lines, d, x, line_grads, partner_grads, line_own, line_own_starts, N, M, D, x_row, x_column, line_own_stride,
            line_own_offset, LINE_OWN, BLOCK_L, BLOCK_D,
        )  # fmt: skip
    factor = tl.load(scale)
    for start in range(0, N if ALONG == 1 else M, BLOCK_N if ALONG == 1 else BLOCK_M):
        if ALONG == 1:
            rows, columns = lines, start + tl.arange(0, BLOCK_N)
        else:
            rows, columns = start + tl.arange(0, BLOCK_M), lines
        s = factor * products(
            x, y, rows, columns, M, N, D, x_row, x_column, y_row, y_column, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
        )
        if bias is not None:
            s += tl.load(bias + columns.to(tl.int64) * bias_stride, mask=columns < N, other=0.0)[None, :]
        kept = kept_pairs(
            rows, columns, M, N, own, own_stride, own_offset, row_ids, row_ids_stride, column_ids, column_ids_stride, OWN, False
        )
        s = tl.where(kept, s, float("-inf"))
        a = tl.load(row_weights + rows, mask=rows < M, other=0.0)[:, None]
        b = tl.load(column_weights + columns, mask=columns < N, other=0.0)[None, :]
        row_shift = tl.load(row_shifts + rows, mask=rows < M, other=0.0)[:, None]
        column_shift = tl.load(column_shifts + columns, mask=columns < N, other=0.0)[None, :]
        p = a * tl.exp2((s - row_shift) * LOG2E) + b * tl.exp2((s - column_shift) * LOG2E)
        sums += tl.sum(p, ALONG)
        others = columns if ALONG == 1 else rows
        if ALONG == 1:
            at = y + others.to(tl.int64)[:, None] * y_row + d.to(tl.int64)[None, :] * y_column
            f = tl.load(at, mask=(others < N)[:, None] & (d < D)[None, :], other=0.0)
            total = times(p, f, total)
        else:
            at = x + others.to(tl.int64)[:, None] * x_row + d.to(tl.int64)[None, :] * x_column
            f = tl.load(at, mask=(others < M)[:, None] & (d < D)[None, :], other=0.0)
            total = times(tl.trans(p), f, total)
    if ALONG == 1:
        _finish(total, sums, out, line_sums, scale, power, part, lines, d, M, D)
    else:
        _finish(total, sums, out, line_sums, scale, power, part, lines, d, N, D)


@dataclass(frozen=True)
class Unit:
    """What weights are divided by: a power of two, over WEIGHT_SCALE."""

    power: Tensor  # [] float64

    @staticmethod
    def of(*gradients: Tensor) -> Unit:
        """The power below the largest incoming gradient."""
        largest = torch.cat([*gradients, gradients[0].new_zeros(1)]).abs().amax().double()
        largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        return Unit(largest / torch.frexp(largest).mantissa / 2)  # exact

    def lift(self, t: Tensor) -> Tensor:
        return t.double() * (WEIGHT_SCALE / self.power)


class Side:
    """Rows or columns: features [L, D], incoming gradients [L], and the weights of their exponentials [L], in units.

    Without `stats` the exponentials have no weights: they are the whole of dLoss / dS.
    """

    def __init__(self, features: Tensor, stats: Tensor | None, gradients: Tensor, unit: Unit) -> None:
        lifted = unit.lift(gradients)
        self.features, self.gradients = features, lifted.float()
        self.shifts = None if stats is None else stats[1]
        self.weights = None if stats is None else torch.where(stats[0] == 0, 0, lifted / stats[0].double()).float()


def part(vector: Tensor | None, lines: slice) -> Tensor | None:
    return None if vector is None else vector[lines]


Own = tuple[int, Tensor | None, Tensor | None, int]  # its kind, indices, where each line's begin (LISTS), offset


def own_of_rows(own: Tensor | None, own_offset: int | None) -> Own:
    """Each row's own column."""
    return (INDEX, own, None, 0) if own is not None else (NO_OWN if own_offset is None else OFFSET, None, None, own_offset or 0)


def own_of_columns(own: Tensor | None, own_offset: int | None, n: int) -> Own:
    """The rows of which each column is the own one."""
    if own is None:
        return NO_OWN if own_offset is None else OFFSET, None, None, -(own_offset or 0)
    ordered, order = own.sort(stable=True)
    return LISTS, order, torch.searchsorted(ordered, torch.arange(n + 1, device=own.device)), 0


class Gradient:
    """The gradient of one side's features and of the bias (a matter of the columns), as far as they are wanted."""

    def __init__(
        self, lines: Side, others: Side, own: Own, scale: Tensor, unit: Unit, exact: Tensor | None,
        want_features: bool, want_bias: bool, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.lines, self.others, self.own, self.scale, self.unit, self.exact = lines, others, own, scale, unit, exact
        count, width = lines.features.shape
        self.out = lines.features.new_empty((count if want_features else 0, width), dtype=dtype)
        self.sums = others.gradients.new_empty(count if want_bias else 0)
        self.want_features, self.want_bias = want_features, want_bias
        self.buffer: Tensor | None = None

    def add(
        self, kept: Tensor, lines: slice, others: slice, first: bool = True, last: bool = True,
        row_weights: Tensor | None = None, along: int = 1,
    ) -> None:  # fmt: skip
        """The part of exponentials kept [lines, others]; `others` in several parts, `first` to `last`.

        row_weights: [blocks, rows], contiguous, where rows alone have weights, others for each ROW_BLOCK columns; `along` says
            whether lines are the rows.
        """
        if not (self.want_features or self.want_bias):
            return
        mine, features = self.lines.features[lines], self.others.features[others]
        chosen = tile("pair_gradient", mine)
        (count, d), total = mine.shape, features.shape[0]
        kind, own, starts, offset = self.own
        if kind == INDEX:
            own = own[lines]
        widest = 128 if kind == LISTS else chosen["BLOCK_D"]  # the loop over a column's rows needs registers too
        chosen["BLOCK_D"] = min(chosen["BLOCK_D"], widest, max(16, triton.next_power_of_2(d)))
        grid = (cdiv(count, chosen["BLOCK_L"]) * (max(1, cdiv(d, chosen["BLOCK_D"])) if self.want_features else 1),)
        if not (first and last) and self.buffer is None and self.want_features:
            whole = self.out.dtype == torch.float32 and count == self.out.shape[0]
            self.buffer = self.out if whole else kept.new_empty((count, d), dtype=torch.float32)
        line_weights, other_weights = part(self.lines.weights, lines), part(self.others.weights, others)
        if row_weights is not None:
            line_weights, other_weights = (row_weights, None) if along else (None, row_weights)
        even = count % chosen["BLOCK_L"] == 0 and total % chosen["BLOCK_K"] == 0 and d % chosen["BLOCK_D"] == 0
        launch(
            _centred_gradient, grid,
            out=self.out[lines] if self.want_features else None, buffer=self.buffer,
            line_sums=self.sums if self.want_bias else None,
            exact=self.exact, kept=kept, features=features, line_weights=line_weights, other_weights=other_weights,
            partners=self.others.features,
            line_grads=self.lines.gradients[lines], partner_grads=self.others.gradients, own=own, own_starts=starts,
            scale=self.scale, power=self.unit.power.float(), LINES=count, OTHERS=total, PARTNERS=self.others.features.shape[0],
            D=d, KEPT_LINES=kept.shape[0], KEPT_OTHERS=kept.shape[1], kept_line=kept.stride(0), kept_other=kept.stride(1),
            feature_row=features.stride(0), feature_column=features.stride(1), partner_row=self.others.features.stride(0),
            partner_column=self.others.features.stride(1), own_stride=stride(own), own_offset=offset + lines.start,
            OWN=kind, FIRST=first, WHOLE=first and last, PRODUCT=self.want_features, EVEN=even,
            COLUMNS=0 if row_weights is None else ROW_BLOCK, **chosen,
        )  # fmt: skip
        if last and not first and self.want_features:
            self.buffer *= self.scale / WEIGHT_SCALE
            self.buffer *= self.unit.power.float()  # two factors: one alone could leave float32's range
            self.out.copy_(self.buffer)

    def add_exact(self, pairs: Pairs, along: int) -> None:
        """The whole gradient where `exact` is set; `along`: the axis of the logits that is summed."""
        if not (self.want_features or self.want_bias):
            return
        chosen = tile("pair_exact_gradient", pairs.x)
        count, d = self.lines.features.shape
        chosen["BLOCK_D"] = min(chosen["BLOCK_D"], max(16, triton.next_power_of_2(d)))
        grid = (cdiv(count, chosen["BLOCK_M" if along else "BLOCK_N"]) * max(1, cdiv(d, chosen["BLOCK_D"])),)
        rows, columns = (self.lines, self.others) if along else (self.others, self.lines)
        kind, own, starts, offset = self.own
        launch(
            _exact_gradient, grid,
            out=self.out if self.want_features else None, line_sums=self.sums if self.want_bias else None, exact=self.exact,
            row_weights=rows.weights, column_weights=columns.weights, row_shifts=rows.shifts, column_shifts=columns.shifts,
            line_grads=self.lines.gradients, partner_grads=self.others.gradients, line_own=own, line_own_starts=starts,
            power=self.unit.power.float(), line_own_stride=stride(own), line_own_offset=offset, LINE_OWN=kind,
            ALONG=along, EVEN_K=d % chosen["BLOCK_K"] == 0, PRECISION=precision(pairs.x.dtype),
            **pairs.arguments(0, pairs.x.shape[0]), **chosen,
        )  # fmt: skip

    def bias_gradient(self) -> Tensor:
        """[L], empty where it is not wanted"""
        return (self.sums.double() * (self.unit.power / WEIGHT_SCALE)).float()
