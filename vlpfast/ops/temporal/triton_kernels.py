"""frame_shift and pool_tokens in Triton: the operators of these names in vlpfast/ops/_schemas.py.

All of them only move memory: a program makes a tile of the result, which nobody else writes, from what it reads in one order; no
atomics. A tile is so many consecutive elements of rows, or channels of cells, that loads are wide; the rest of it are further
rows or cells.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops import _triton
from vlpfast.ops._schemas import maxsim_index_dtype, pool_longest
from vlpfast.ops._triton import Tile, cdiv, launch, narrow

TABLE = Path(__file__).with_name("tiles.json")


def tile(kernel: str, x: Tensor, width: int) -> Tile:
    """The tile's elements as rows of at most `width`: BLOCK_M x BLOCK_N."""
    chosen = _triton.tile(TABLE, kernel, x.dtype, x.device)
    elements = chosen.pop("BLOCK")
    columns = min(elements, triton.next_power_of_2(max(1, width)))
    return {"BLOCK_M": elements // columns, "BLOCK_N": columns} | chosen


# --- shifting by a frame ----------------------------------------------------------------------------------------------


@triton.jit
def _shift(
    out, x, FRAMES, ROWS, ELEMENTS, x_clip, x_frame, x_row, back_begin, back_end, ahead_begin, ahead_end,
    CYCLIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N elements of BLOCK_M rows of one frame."""
    columns = tl.cdiv(ELEMENTS, BLOCK_N)
    blocks = tl.cdiv(ROWS, BLOCK_M) * columns
    block = tl.program_id(0) % blocks
    frame = tl.program_id(0) // blocks  # of all clips
    clip = x + (frame // FRAMES).to(tl.int64) * x_clip
    t = frame % FRAMES
    r = (block // columns * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    e = (block % columns * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (r < ROWS) & (e < ELEMENTS)
    back = (e >= back_begin) & (e < back_end)
    ahead = (e >= ahead_begin) & (e < ahead_end)
    at = r.to(tl.int64) * x_row + e
    if CYCLIC:
        before = tl.where(t == 0, FRAMES - 1, t - 1)
        after = tl.where(t == FRAMES - 1, 0, t + 1)
    else:  # where there is none, any frame's: it is not used
        before = tl.maximum(t - 1, 0)
        after = tl.minimum(t + 1, FRAMES - 1)
    # three loads, of which each element is in one: the frames' offsets are numbers, so that the loads stay wide
    here = tl.load(clip + t.to(tl.int64) * x_frame + at, mask=inside & ~(back | ahead), other=0.0)
    moved_back = tl.load(clip + before.to(tl.int64) * x_frame + at, mask=inside & back, other=0.0)
    moved_ahead = tl.load(clip + after.to(tl.int64) * x_frame + at, mask=inside & ahead, other=0.0)
    if not CYCLIC:
        moved_back = tl.where(t > 0, moved_back, 0.0)
        moved_ahead = tl.where(t < FRAMES - 1, moved_ahead, 0.0)
    value = tl.where(back, moved_back, tl.where(ahead, moved_ahead, here))
    tl.store(out + (frame.to(tl.int64) * ROWS + r) * ELEMENTS + e, value, mask=inside)


@triton.jit
def _shift_in_place(x, FRAMES, ROWS, x_clip, step, x_row, first, begin, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Elements begin to end of BLOCK_M rows, frame by frame in the order in which none is read after it was written.

    first: where the first frame to be written lies in its clip; step: from there to the next one.
    """
    columns = tl.cdiv(end - begin, BLOCK_N)
    blocks = tl.cdiv(ROWS, BLOCK_M) * columns
    block = tl.program_id(0) % blocks
    r = (block // columns * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    e = (begin + block % columns * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (r < ROWS) & (e < end)
    at = x + (tl.program_id(0) // blocks).to(tl.int64) * x_clip + first + r.to(tl.int64) * x_row + e
    for _ in range(FRAMES - 1):
        source = at + step
        tl.store(at, tl.load(source, mask=inside, other=0.0), mask=inside)
        at = source
    tl.store(at, tl.zeros((BLOCK_M, BLOCK_N), x.dtype.element_ty), mask=inside)


def frame_shift(x: Tensor, back_begin: int, back_end: int, ahead_begin: int, ahead_end: int, cyclic: bool) -> Tensor:
    _, frames, rows, elements = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chosen = tile("frame_shift", x, elements)
    grid = x.shape[0] * frames * cdiv(rows, chosen["BLOCK_M"]) * cdiv(elements, chosen["BLOCK_N"])
    launch(
        _shift, (grid,), out=out, x=x, FRAMES=frames, ROWS=rows, ELEMENTS=elements,
        x_clip=x.stride(0), x_frame=x.stride(1), x_row=x.stride(2), back_begin=back_begin, back_end=back_end,
        ahead_begin=ahead_begin, ahead_end=ahead_end, CYCLIC=cyclic, **chosen,
    )  # fmt: skip
    return out


def frame_shift_(x: Tensor, back_begin: int, back_end: int, ahead_begin: int, ahead_end: int) -> None:
    clips, frames, rows, _ = x.shape
    frame = x.stride(1)
    for first, step, begin, end in (
        (max(0, frames - 1) * frame, -frame, back_begin, back_end),
        (0, frame, ahead_begin, ahead_end),
    ):
        chosen = tile("frame_shift_in_place", x, end - begin)
        grid = clips * min(1, frames) * cdiv(rows, chosen["BLOCK_M"]) * cdiv(end - begin, chosen["BLOCK_N"])
        launch(
            _shift_in_place, (grid,), x=x, FRAMES=frames, ROWS=rows, x_clip=x.stride(0), step=step, x_row=x.stride(2),
            first=first, begin=begin, end=end, **chosen,
        )  # fmt: skip


# --- pooling ----------------------------------------------------------------------------------------------------------


@triton.jit
def _window(i, LENGTH, OUT):
    """What place i of OUT covers of an axis: begin, and how many."""
    begin = i * LENGTH // OUT
    return begin, ((i + 1) * LENGTH + OUT - 1) // OUT - begin


@triton.jit
def _cells(T, H, W, CLIPS, CHANNEL_BLOCKS, WIDE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The program's cells of a [CLIPS, T, H, W] result: number, clip and place, whether there is one; all [BLOCK_M, 1]."""
    cell = (tl.program_id(0) // CHANNEL_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    if WIDE:
        cell = (tl.program_id(0) // CHANNEL_BLOCKS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    row = cell // W
    frame = row // H
    clip = frame // T
    return cell.to(tl.int64), clip, frame % T, row % H, cell % W, clip < CLIPS


@triton.jit
def _offset(clip, t, h, w, of_clip, of_frame, of_row, of_column):
    return clip.to(tl.int64) * of_clip + t.to(tl.int64) * of_frame + h.to(tl.int64) * of_row + w.to(tl.int64) * of_column


@triton.jit
def _pool(
    out, winners, x, CLIPS, T_IN, H_IN, W_IN, T, H, W, C, LONGEST_T, LONGEST_H, LONGEST_W,
    x_clip, x_frame, x_row, x_column, LARGEST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N channels of BLOCK_M cells; windows that are shorter than the longest end early."""
    channel_blocks = tl.cdiv(C, BLOCK_N)
    cell, clip, t, h, w, there = _cells(T, H, W, CLIPS, channel_blocks, WIDE, BLOCK_M)
    c = (tl.program_id(0) % channel_blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = there & (c < C)
    t_begin, t_count = _window(t, T_IN, T)
    h_begin, h_count = _window(h, H_IN, H)
    w_begin, w_count = _window(w, W_IN, W)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if LARGEST:
        total += float("-inf")
    winner = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for i in range(LONGEST_T):
        for j in range(LONGEST_H):
            for k in range(LONGEST_W):
                covered = inside & (i < t_count) & (j < h_count) & (k < w_count)
                at = c + _offset(clip, t_begin + i, h_begin + j, w_begin + k, x_clip, x_frame, x_row, x_column)
                if LARGEST:
                    value = tl.load(x + at, mask=covered, other=float("-inf")).to(tl.float32)
                    larger = (value > total) | ((value != value) & (total == total))
                    total = tl.where(larger, value, total)
                    winner = tl.where(larger, ((i * h_count + j) * w_count + k).to(tl.int32), winner)
                else:
                    total += tl.load(x + at, mask=covered, other=0.0).to(tl.float32)
    if not LARGEST:
        total *= 1.0 / (t_count * h_count * w_count).to(tl.float32)
    tl.store(out + cell * C + c, narrow(total, out.dtype.element_ty), mask=inside)
    if winners is not None:
        tl.store(winners + cell * C + c, winner.to(winners.dtype.element_ty), mask=inside)


@triton.jit
def _pool_gradient(
    dx, grad, winners, CLIPS, T_IN, H_IN, W_IN, T, H, W, C, LONGEST_T, LONGEST_H, LONGEST_W,
    grad_clip, grad_frame, grad_row, grad_column, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N channels of BLOCK_M cells of dx: what the windows that hold a cell hand down, in order. Longest: of such runs."""
    channel_blocks = tl.cdiv(C, BLOCK_N)
    cell, clip, t, h, w, there = _cells(T_IN, H_IN, W_IN, CLIPS, channel_blocks, WIDE, BLOCK_M)
    c = (tl.program_id(0) % channel_blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = there & (c < C)
    t_first, t_windows = _window(t, T, T_IN)  # the windows that hold a place: the same formula the other way round
    h_first, h_windows = _window(h, H, H_IN)
    w_first, w_windows = _window(w, W, W_IN)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(LONGEST_T):
        for j in range(LONGEST_H):
            for k in range(LONGEST_W):
                t_begin, t_count = _window(t_first + i, T_IN, T)
                h_begin, h_count = _window(h_first + j, H_IN, H)
                w_begin, w_count = _window(w_first + k, W_IN, W)
                covered = inside & (i < t_windows) & (j < h_windows) & (k < w_windows)
                at = c + _offset(clip, t_first + i, h_first + j, w_first + k, grad_clip, grad_frame, grad_row, grad_column)
                value = tl.load(grad + at, mask=covered, other=0.0).to(tl.float32)
                if winners is not None:
                    place = ((t - t_begin) * h_count + h - h_begin) * w_count + w - w_begin
                    window = ((clip.to(tl.int64) * T + t_first + i) * H + h_first + j) * W + w_first + k
                    won = tl.load(winners + window * C + c, mask=covered, other=0)
                    total += tl.where(covered & (won == place.to(winners.dtype.element_ty)), value, 0.0)
                else:
                    total += value * (1.0 / (t_count * h_count * w_count).to(tl.float32))
    tl.store(dx + cell * C + c, narrow(total, dx.dtype.element_ty), mask=inside)


def _longest(length: int, out: int) -> int:
    return pool_longest((length,), (out,))


def _wide(clips: int, lengths: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Whether numbers of cells (of a whole tile) or products of lengths (a little past the last window) need 64 bits."""
    cells = clips * max(math.prod(lengths), math.prod(out)) + 2**16
    return max(cells, *((a + 4) * (b + 4) for a, b in zip(lengths, out, strict=True))) >= 2**31


def pool_tokens_fwd(x: Tensor, t: int, h: int, w: int, largest: bool, keep_winners: bool) -> tuple[Tensor, Tensor]:
    clips, *lengths, channels = x.shape
    out = torch.empty(clips, t, h, w, channels, dtype=x.dtype, device=x.device)
    dtype = maxsim_index_dtype(pool_longest(tuple(lengths), (t, h, w)))
    winners = torch.empty((clips if largest and keep_winners else 0, t, h, w, channels), dtype=dtype, device=x.device)
    chosen = tile("pool", x, channels)
    grid = cdiv(clips * t * h * w, chosen["BLOCK_M"]) * cdiv(channels, chosen["BLOCK_N"])
    launch(
        _pool, (grid,), out=out, winners=winners if largest and keep_winners else None, x=x, CLIPS=clips,
        T_IN=lengths[0], H_IN=lengths[1], W_IN=lengths[2], T=t, H=h, W=w, C=channels,
        LONGEST_T=_longest(lengths[0], t), LONGEST_H=_longest(lengths[1], h), LONGEST_W=_longest(lengths[2], w),
        x_clip=x.stride(0), x_frame=x.stride(1), x_row=x.stride(2), x_column=x.stride(3), LARGEST=largest,
        WIDE=_wide(clips, tuple(lengths), (t, h, w)), **chosen,
    )  # fmt: skip
    return out, winners


def pool_tokens_bwd(grad: Tensor, winners: Tensor, frames: int, height: int, width: int, largest: bool) -> Tensor:
    clips, t, h, w, channels = grad.shape
    dx = torch.empty(clips, frames, height, width, channels, dtype=grad.dtype, device=grad.device)
    chosen = tile("pool", grad, channels)
    grid = cdiv(clips * frames * height * width, chosen["BLOCK_M"]) * cdiv(channels, chosen["BLOCK_N"])
    launch(
        _pool_gradient, (grid,), dx=dx, grad=grad, winners=winners if largest else None, CLIPS=clips,
        T_IN=frames, H_IN=height, W_IN=width, T=t, H=h, W=w, C=channels,
        LONGEST_T=_longest(t, frames), LONGEST_H=_longest(h, height), LONGEST_W=_longest(w, width),
        grad_clip=grad.stride(0), grad_frame=grad.stride(1), grad_row=grad.stride(2), grad_column=grad.stride(3),
        WIDE=_wide(clips, (frames, height, width), (t, h, w)), **chosen,
    )  # fmt: skip
    return dx
