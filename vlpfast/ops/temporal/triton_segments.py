"""segment_pool in Triton: the operators segment_pool_fwd and segment_pool_bwd of vlpfast/ops/_schemas.py.

A program makes a block of channels of one segment, its tokens tile by tile; the backward makes again what it needs. With scores
a block lies within a head, and in the backward it is a whole head, because a score's gradient is a sum over it. No atomics.
"""

from __future__ import annotations

from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops import _triton
from vlpfast.ops._schemas import SEGMENT_MODES
from vlpfast.ops._triton import Tile, cdiv, launch, narrow

TABLE = Path(__file__).with_name("tiles.json")
MEAN, MAX, LOGSUMEXP, ATTENTION = (tl.constexpr(i) for i in range(len(SEGMENT_MODES)))


def tile(kernel: str, x: Tensor, width: int) -> Tile:
    """The tile's elements as tokens of at most `width` channels: BLOCK_M x BLOCK_N."""
    chosen = _triton.tile(TABLE, kernel, x.dtype, x.device)
    elements = chosen.pop("BLOCK")
    columns = min(chosen.pop("MOST_N"), triton.next_power_of_2(max(1, width)))
    return {"BLOCK_M": elements // columns, "BLOCK_N": columns} | chosen


@triton.jit
def _tokens(x, i, end, c, last, row, column):
    """Tokens i [BLOCK_M] below `end`, channels c [BLOCK_N] below `last`, as float32; and which are there."""
    there = (i < end)[:, None] & (c < last)[None, :]
    return tl.load(x + i[:, None] * row + c.to(tl.int64)[None, :] * column, mask=there, other=0.0).to(tl.float32), there


@triton.jit
def _largest(best):
    """Of each column; NaN where there is one."""
    there = tl.max((best != best).to(tl.int32), 0) > 0
    return tl.where(there, float("nan"), tl.max(tl.where(best != best, float("-inf"), best), 0))


@triton.jit
def _raised(best, t):
    """The larger: a NaN wins and stays, and on ties the first stays."""
    return tl.where((t <= best) | (best != best), best, t)


@triton.jit
def _shift_and_total(x, begin, end, c, last, row, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of exponentials: the sum of exp(x - shift), shift the largest of each channel where that is not -inf."""
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    for first in range(begin, end, BLOCK_M):
        t, there = _tokens(x, first + tl.arange(0, BLOCK_M), end, c, last, row, column)
        best = _raised(best, tl.where(there, t, float("-inf")))
    shift = _largest(best)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(begin, end, BLOCK_M):
        t, there = _tokens(x, first + tl.arange(0, BLOCK_M), end, c, last, row, column)
        total += tl.where(there, tl.exp(t - shift[None, :]), 0.0)
    return shift, tl.where(shift == float("inf"), shift, tl.sum(total, 0))


@triton.jit
def _scores(score, i, end, HEADS):
    """Scores of one head's tokens i, and which take part."""
    s = tl.load(score + i * HEADS, mask=i < end, other=float("-inf"))
    return s, s != float("-inf")


@triton.jit
def _score_shift(score, begin, end, HEADS, BLOCK_M: tl.constexpr):
    best = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    for first in range(begin, end, BLOCK_M):
        s, _ = _scores(score, first + tl.arange(0, BLOCK_M), end, HEADS)
        best = _raised(best, s[:, None])
    return tl.max(_largest(best), 0)  # of one number


@triton.jit
def _pool_segments(
    out, x, start, score, WIDTH, HEADS, DEPTH, row, column,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DEPTH: a head's channels; without scores there is one head."""
    blocks = tl.cdiv(DEPTH, BLOCK_N)
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % HEADS
    segment = tl.program_id(0) // (blocks * HEADS)
    begin = tl.load(start + segment)
    end = tl.load(start + segment + 1)
    c = h * DEPTH + block * BLOCK_N + tl.arange(0, BLOCK_N)
    last = (h + 1) * DEPTH
    if MODE == MEAN:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(begin, end, BLOCK_M):
            t, _ = _tokens(x, first + tl.arange(0, BLOCK_M), end, c, last, row, column)
            total += t
        pooled = tl.sum(total, 0) / tl.maximum(end - begin, 1).to(tl.float32)
    elif MODE == MAX:
        best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
        for first in range(begin, end, BLOCK_M):
            t, there = _tokens(x, first + tl.arange(0, BLOCK_M), end, c, last, row, column)
            best = _raised(best, tl.where(there, t, float("-inf")))
        pooled = tl.where(end > begin, _largest(best), 0.0)
    elif MODE == LOGSUMEXP:
        shift, total = _shift_and_total(x, begin, end, c, last, row, column, BLOCK_M, BLOCK_N)
        pooled = tl.where(end > begin, tl.log(total) + shift, 0.0)
    else:
        shift = _score_shift(score + h, begin, end, HEADS, BLOCK_M)
        total = tl.zeros((BLOCK_M,), tl.float32)
        weighted = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(begin, end, BLOCK_M):
            i = first + tl.arange(0, BLOCK_M)
            s, seen = _scores(score + h, i, end, HEADS)
            weight = tl.where(seen, tl.exp(s - shift), 0.0)
            t, _ = _tokens(x, i, end, c, last, row, column)
            total += weight
            weighted += tl.where(seen[:, None], weight[:, None] * t, 0.0)
        whole = tl.sum(total, 0)
        pooled = tl.sum(weighted, 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out + segment.to(tl.int64) * WIDTH + c, narrow(pooled, out.dtype.element_ty), mask=c < last)


@triton.jit
def _segments_gradient(
    dx, grad, x, start, WIDTH, row, column, grad_row, grad_column,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(WIDTH, BLOCK_N)
    segment = tl.program_id(0) // blocks
    begin = tl.load(start + segment)
    end = tl.load(start + segment + 1)
    c = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    g_at = grad + segment.to(tl.int64) * grad_row + c.to(tl.int64) * grad_column
    g = tl.load(g_at, mask=c < WIDTH, other=0.0).to(tl.float32)
    if MODE == MEAN:
        g = g / tl.maximum(end - begin, 1).to(tl.float32)
    elif MODE == MAX:
        best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
        place = begin + tl.arange(0, BLOCK_M)[:, None] + tl.zeros((BLOCK_M, BLOCK_N), tl.int64)
        for first in range(begin, end, BLOCK_M):
            i = first + tl.arange(0, BLOCK_M)
            t, there = _tokens(x, i, end, c, WIDTH, row, column)
            raised = _raised(best, tl.where(there, t, float("-inf")))
            changed = (raised != best) & ~((raised != raised) & (best != best))
            place = tl.where(changed, i[:, None], place)
            best = raised
        largest = _largest(best)[None, :]
        wins = (best == largest) | (best != best)
        winner = tl.min(tl.where(wins, place, end), 0)
    elif MODE == LOGSUMEXP:
        shift, total = _shift_and_total(x, begin, end, c, WIDTH, row, column, BLOCK_M, BLOCK_N)
    for first in range(begin, end, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        if MODE == MEAN:
            made = g[None, :] + tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        elif MODE == MAX:
            made = tl.where(i[:, None] == winner[None, :], g[None, :], 0.0)
        else:
            t, _ = _tokens(x, i, end, c, WIDTH, row, column)
            made = g[None, :] * (tl.exp(t - shift[None, :]) / total[None, :])
        written = (i < end)[:, None] & (c < WIDTH)[None, :]
        tl.store(dx + i[:, None] * WIDTH + c[None, :], narrow(made, dx.dtype.element_ty), mask=written)


@triton.jit
def _slopes(x, grad, i, end, h, DEPTH, row, column, grad_column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """<grad, x_i> over one head's channels."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    last = (h + 1) * DEPTH
    for first in range(0, DEPTH, BLOCK_N):
        c = h * DEPTH + first + tl.arange(0, BLOCK_N)
        g = tl.load(grad + c.to(tl.int64) * grad_column, mask=c < last, other=0.0).to(tl.float32)
        t, _ = _tokens(x, i, end, c, last, row, column)
        total += t * g[None, :]
    return tl.sum(total, 1)


@triton.jit
def _attention_gradient(
    dx, dscore, grad, x, start, score, WIDTH, HEADS, DEPTH, row, column, grad_row, grad_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx, dscore: None where not needed."""
    h = tl.program_id(0) % HEADS
    segment = tl.program_id(0) // HEADS
    begin = tl.load(start + segment)
    end = tl.load(start + segment + 1)
    grad += segment.to(tl.int64) * grad_row
    shift = _score_shift(score + h, begin, end, HEADS, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(begin, end, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        s, seen = _scores(score + h, i, end, HEADS)
        weight = tl.where(seen, tl.exp(s - shift), 0.0)
        total += weight
        if dscore is not None:
            slope = _slopes(x, grad, i, end, h, DEPTH, row, column, grad_column, BLOCK_M, BLOCK_N)
            weighted += tl.where(seen, weight * slope, 0.0)
    whole = tl.sum(total, 0)
    mean = tl.sum(weighted, 0) / whole
    for first in range(begin, end, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        s, seen = _scores(score + h, i, end, HEADS)
        weight = tl.exp(s - shift) / whole
        if dscore is not None:
            slope = _slopes(x, grad, i, end, h, DEPTH, row, column, grad_column, BLOCK_M, BLOCK_N)
            tl.store(dscore + i * HEADS + h, tl.where(seen, weight * (slope - mean), 0.0), mask=i < end)
        if dx is not None:
            last = (h + 1) * DEPTH
            for d in range(0, DEPTH, BLOCK_N):
                c = h * DEPTH + d + tl.arange(0, BLOCK_N)
                g = tl.load(grad + c.to(tl.int64) * grad_column, mask=c < last, other=0.0).to(tl.float32)
                made = tl.where(seen[:, None], weight[:, None] * g[None, :], 0.0)
                written = (i < end)[:, None] & (c < last)[None, :]
                tl.store(dx + i[:, None] * WIDTH + c[None, :], narrow(made, dx.dtype.element_ty), mask=written)


def forward(x: Tensor, start: Tensor, score: Tensor | None, mode: int) -> Tensor:
    segments, width = start.shape[0] - 1, x.shape[1]
    heads = 1 if score is None else score.shape[1]
    out = x.new_empty(segments, width)
    chosen = tile("segment_pool", x, width // heads)
    launch(
        _pool_segments, (segments * heads * cdiv(width // heads, chosen["BLOCK_N"]),),
        out=out, x=x, start=start, score=score, WIDTH=width, HEADS=heads, DEPTH=width // heads,
        row=x.stride(0), column=x.stride(1), MODE=mode, **chosen,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor | None, start: Tensor, score: Tensor | None, length: int, mode: int, need_x: bool, need_score: bool
) -> tuple[Tensor, Tensor]:
    segments, width = grad.shape
    dx = grad.new_empty(length if need_x else 0, width)
    x_strides = (0, 0) if x is None else x.stride()
    common = {
        "grad": grad, "x": x, "start": start, "WIDTH": width, "row": x_strides[0], "column": x_strides[1],
        "grad_row": grad.stride(0), "grad_column": grad.stride(1),
    }  # fmt: skip
    if score is None:
        chosen = tile("segment_pool", grad, width)
        if need_x:
            grid = (segments * cdiv(width, chosen["BLOCK_N"]),)
            launch(_segments_gradient, grid, dx=dx, MODE=mode, **common, **chosen)
        return dx, grad.new_empty(0, 0, dtype=torch.float32)
    heads = score.shape[1]
    dscore = grad.new_empty((length, heads) if need_score else (0, 0), dtype=torch.float32)
    launch(
        _attention_gradient, (segments * heads,), dx=dx if need_x else None, dscore=dscore if need_score else None, score=score,
        HEADS=heads, DEPTH=width // heads, **common, **tile("segment_pool", grad, width // heads),
    )  # fmt: skip
    return dx, dscore
