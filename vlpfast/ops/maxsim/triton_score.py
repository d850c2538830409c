"""score_ce in Triton: score_ce_fwd_triton of vlpfast/ops/_schemas.py; csrc/maxsim/score.cpp explains it.

Two launches: programs own some rows of x_to_y or some columns of y_to_x and leave what each gives to the loss, one program adds
that up in order. The host reads nothing and no shape depends on values, so that both can be captured into a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._triton import cdiv, launch
from vlpfast.ops.maxsim.triton_sets import tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _share(weights, lines, LINES, stride, direction, BLOCK: tl.constexpr):
    """What each line's loss counts in the whole: its weight's part of a direction's weight."""
    if weights is None:
        return tl.zeros(lines.shape, tl.float32) + direction / (LINES * 1.0)  # a size of 1 has no `to`
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, LINES, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(weights + at.to(tl.int64) * stride, mask=at < LINES, other=0.0).to(tl.float32)
        whole = tl.sum(total, 0)
        own = tl.load(weights + lines.to(tl.int64) * stride, mask=lines < LINES, other=0.0).to(tl.float32)
        return own * direction / tl.where(whole == 0, 1.0, whole)


@triton.jit
def _lines(
    losses, dscales, gradient, scores, scale, smoothing, weights, part, first, LINES, LENGTH, own, line, other, gradient_line,
    gradient_other, smoothing_stride, weights_stride, label_smoothing, direction, SMOOTHED: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_L lines of LENGTH scores: their parts of the loss and of its derivative by the scale, from `first` on; gradients."""
    lines = part * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = lines < LINES
    factor = tl.load(scale)
    at = scores + lines.to(tl.int64) * line
    origin = tl.load(at + (lines + own).to(tl.int64) * other, mask=inside, other=0.0)
    shift = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    weighted, plain = total, total
    for start in range(0, LENGTH, BLOCK_N):
        others = start + tl.arange(0, BLOCK_N)
        there = inside[:, None] & (others < LENGTH)[None, :]
        s = tl.load(at[:, None] + others.to(tl.int64)[None, :] * other, mask=there, other=0.0)
        d = tl.where(there, s - origin[:, None], 0.0)
        kept = there & (others[None, :] != (lines + own)[:, None])
        r = tl.where(kept, factor * d, float("-inf"))
        raised = tl.maximum(shift, tl.max(r, 1))
        usable = tl.where(tl.abs(raised) == float("inf"), 0.0, raised)
        lower = tl.exp2((shift - usable) * LOG2E)
        e = tl.exp2((r - usable[:, None]) * LOG2E)
        total = total * lower + tl.sum(e, 1)
        weighted = weighted * lower + tl.sum(e * d, 1)
        plain += tl.sum(d, 1)
        shift = raised
    usable = tl.where(tl.abs(shift) == float("inf"), 0.0, shift)
    negatives = usable + tl.log(total)
    small = tl.exp2(-tl.abs(negatives) * LOG2E)
    loss = tl.where(negatives > 0, negatives, 0.0) + _log1p(small)
    under = total + tl.exp2(-usable * LOG2E)  # softmax's denominator, with the own pair's 1
    share = _share(weights, lines, LINES, weights_stride, direction, BLOCK_N)
    slope = weighted / under
    even = tl.zeros((BLOCK_L,), tl.float32)
    if SMOOTHED:
        if smoothing is None:
            even += label_smoothing
        else:
            even += tl.load(smoothing + lines.to(tl.int64) * smoothing_stride, mask=inside, other=0.0).to(tl.float32)
        even = even / (LENGTH * 1.0)
        loss -= even * factor * plain
        slope -= even * plain
    tl.store(losses + first + lines, share * loss, mask=inside)
    if dscales is not None:
        tl.store(dscales + first + lines, share * slope, mask=inside)
    if gradient is not None:
        unit = share * factor
        a = unit / under
        out = gradient + lines.to(tl.int64) * gradient_line
        for start in range(0, LENGTH, BLOCK_N):
            others = start + tl.arange(0, BLOCK_N)
            there = inside[:, None] & (others < LENGTH)[None, :]
            s = tl.load(at[:, None] + others.to(tl.int64)[None, :] * other, mask=there, other=0.0)
            r = factor * (s - origin[:, None])
            g = a[:, None] * tl.exp2((r - usable[:, None]) * LOG2E) - (unit * even)[:, None]
            kept = there & (others[None, :] != (lines + own)[:, None])
            tl.store(out[:, None] + others.to(tl.int64)[None, :] * gradient_other, g, mask=kept)
        g = unit * even * ((LENGTH - 1) * 1.0) - a * total
        tl.store(out + (lines + own).to(tl.int64) * gradient_other, g, mask=inside)


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], to a few roundings of itself however small e is."""
    q = -3.318468533e-3 * e + 2.020456797e-2
    q = q * e - 5.766441459e-2
    q = q * e + 1.068055275e-1
    q = q * e - 1.535539483e-1
    q = q * e + 1.969540010e-1
    q = q * e - 2.495858735e-1
    q = q * e + 3.333051132e-1
    q = q * e - 4.999993276e-1
    return e * (q * e + 1.0)


@triton.jit
def _score_ce(
    losses, dscales, x_gradient, y_gradient, x_to_y, y_to_x, scale, smoothing, row_weights, col_weights, M, N, own, ROW_PARTS,
    COLUMNS_AT, x_row, x_column, y_row, y_column, smoothing_stride, row_weights_stride, col_weights_stride, label_smoothing,
    row_weight, col_weight, SMOOTHED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first ROW_PARTS programs take rows of x_to_y, the others columns of y_to_x, whose lines stand at COLUMNS_AT."""
    program = tl.program_id(0)
    if x_to_y is not None:
        if program < ROW_PARTS:
            _lines(
                losses, dscales, x_gradient, x_to_y, scale, smoothing, row_weights, program, 0, M, N, own, x_row, x_column, N, 1,
                smoothing_stride, row_weights_stride, label_smoothing, row_weight, SMOOTHED, BLOCK_L, BLOCK_N,
            )  # fmt: skip
    if y_to_x is not None:
        if program >= ROW_PARTS:
            _lines(
                losses, dscales, y_gradient, y_to_x, scale, smoothing, col_weights, program - ROW_PARTS, COLUMNS_AT, N, M, own,
                y_column, y_row, 1, N, smoothing_stride, col_weights_stride, label_smoothing, col_weight, SMOOTHED, BLOCK_L,
                BLOCK_N,
            )  # fmt: skip


@triton.jit
def _added(parts, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(parts + at, mask=at < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _add_lines(loss, dscale, losses, dscales, count, BLOCK: tl.constexpr):
    tl.store(loss, _added(losses, count, BLOCK).to(tl.float32))
    if dscale is not None:
        tl.store(dscale, _added(dscales, count, BLOCK).to(tl.float32))


def forward(
    x_to_y: Tensor | None, y_to_x: Tensor | None, scale: Tensor, smoothing: Tensor | None, row_weights: Tensor | None,
    col_weights: Tensor | None, own: int, label_smoothing: float, row_weight: float, col_weight: float,
    need_x_to_y: bool, need_y_to_x: bool, need_scale: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    m, n = (y_to_x if x_to_y is None else x_to_y).shape
    gradients = scale.new_empty((need_x_to_y + need_y_to_x) * m * n + need_scale)
    x_gradient = gradients if need_x_to_y else None
    y_gradient = gradients[m * n * need_x_to_y :] if need_y_to_x else None
    rows, columns = (0 if x_to_y is None else m), (0 if y_to_x is None else n)
    losses, loss = scale.new_empty(2 if need_scale else 1, rows + columns), scale.new_empty(())
    dscales = losses[1] if need_scale else None
    chosen = tile("score_ce", scale)
    chosen["BLOCK_N"] = min(chosen["BLOCK_N"], max(16, triton.next_power_of_2(n)))
    parts = cdiv(rows, chosen["BLOCK_L"])
    launch(
        _score_ce, (parts + cdiv(columns, chosen["BLOCK_L"]),),
        losses=losses, dscales=dscales, x_gradient=x_gradient, y_gradient=y_gradient, x_to_y=x_to_y, y_to_x=y_to_x, scale=scale,
        smoothing=smoothing, row_weights=row_weights, col_weights=col_weights, M=m, N=n, own=own, ROW_PARTS=parts,
        COLUMNS_AT=rows, x_row=_stride(x_to_y, 0), x_column=_stride(x_to_y, 1), y_row=_stride(y_to_x, 0),
        y_column=_stride(y_to_x, 1), smoothing_stride=_stride(smoothing, 0), row_weights_stride=_stride(row_weights, 0),
        col_weights_stride=_stride(col_weights, 0), label_smoothing=label_smoothing, row_weight=row_weight, col_weight=col_weight,
        SMOOTHED=smoothing is not None or label_smoothing != 0, **chosen,
    )  # fmt: skip
    dscale = gradients[gradients.shape[0] - 1 :] if need_scale else None
    launch(
        _add_lines, (1,), loss=loss, dscale=dscale, losses=losses, dscales=dscales, count=rows + columns, BLOCK=1024, num_warps=4
    )
    return loss, gradients


def _stride(t: Tensor | None, dimension: int) -> int:
    """0 for a number that stands for a vector, and for nothing."""
    return 0 if t is None or t.ndim == 0 else t.stride(dimension)
