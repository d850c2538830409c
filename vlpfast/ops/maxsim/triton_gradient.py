"""Gradients of maxsim in Triton, from the winners. A program owns a block of tokens of one set in a slice of the width.

What its own winners give is gathered; what it gets where it is itself the winner is a product with one-hot rows, exact in any
dtype because the pair's weight multiplies the sum in float32. Partners are taken in order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._triton import cdiv, dot, launch, narrow
from vlpfast.ops.maxsim.triton_sets import Problem, number_kept, precision, rows_of_tile, tile


@triton.jit
def _places(at, mask):
    """Unsigned, whatever the dtype."""
    place = tl.load(at, mask=mask, other=0)
    if place.dtype == tl.int16:
        return place.to(tl.int32) & 0xFFFF
    else:
        return place.to(tl.int32)


@triton.jit
def _gradient(
    out, own_winners, other_winners, own_weights, other_weights, others, own_start, other_start, own_keep, other_keep,
    units, unit_start, SETS, UNITS, BLOCKS, OTHERS, COLUMNS, D, other_row, other_column, own_keep_stride, other_keep_stride,
    own_width, other_width,
    OWN_Y: tl.constexpr, CANDIDATES: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weights are [sets of x, COLUMNS]; OTHERS: how many partners a set has. ADD: to what `out` holds."""
    slices = tl.cdiv(D, BLOCK_D)
    part = tl.program_id(0) // slices
    d = tl.program_id(0) % slices * BLOCK_D + tl.arange(0, BLOCK_D)
    if units is not None:
        owner = tl.load(units + part)
    else:
        owner = part // BLOCKS
    if owner >= SETS:
        return
    place, token, inside = rows_of_tile(part, own_start, units, unit_start, SETS, UNITS, BLOCKS, BLOCK_M, BLOCK_M)
    kept = inside
    if own_keep is not None:
        kept = inside & (tl.load(own_keep + token * own_keep_stride, mask=inside, other=0) != 0)
    own_base = tl.load(own_start)
    other_base = tl.load(other_start)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    UNROLL: tl.constexpr = 4 if other_winners is None else 1  # gathers wait for places: several at once
    for number in tl.range(0, OTHERS, loop_unroll_factor=UNROLL):
        j = number + 0 * owner  # a tensor in the interpreter too
        # the pair (m, column) of the scores, the rows of both sides' winners
        if OWN_Y:
            if CANDIDATES:
                partner = owner // COLUMNS
                m, column = partner, owner % COLUMNS
            else:
                partner = j
                m, column = j, owner
        else:
            m, column = owner, j
            if CANDIDATES:
                partner = owner * COLUMNS + j
            else:
                partner = j
        line = m
        if CANDIDATES:
            line = 0
        pair = m.to(tl.int64) * COLUMNS + column
        first = tl.load(other_start + partner)
        length = (tl.load(other_start + partner + 1) - first).to(tl.int32)
        if own_winners is not None:
            if OWN_Y:
                own_line = line
            else:
                own_line = column
            weight = tl.load(own_weights + pair)
            winner = _places(own_winners + own_line.to(tl.int64) * own_width + token - own_base, kept)
            from_token = first + winner
            won = kept & (winner < length)
            if other_keep is not None:
                won = won & (tl.load(other_keep + from_token * other_keep_stride, mask=won, other=0) != 0)
            at = others + from_token[:, None] * other_row + d.to(tl.int64)[None, :] * other_column
            f = tl.load(at, mask=won[:, None] & (d < D)[None, :], other=0.0)
            total += tl.where(won, weight, 0.0)[:, None] * f.to(tl.float32)
        if other_winners is not None:
            if OWN_Y:
                other_line = column
            else:
                other_line = line
            weight = tl.load(other_weights + pair)
            product = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for start in range(0, length, BLOCK_T):
                t = start + tl.arange(0, BLOCK_T)
                counted = t < length
                if other_keep is not None:
                    counted = counted & (tl.load(other_keep + (first + t) * other_keep_stride, mask=counted, other=0) != 0)
                to = _places(other_winners + other_line.to(tl.int64) * other_width + first - other_base + t, counted)
                hot = to[None, :] == place[:, None]  # tokens that do not count are zeros
                b_at = others + (first + t)[:, None] * other_row + d.to(tl.int64)[None, :] * other_column
                b = tl.load(b_at, mask=counted[:, None] & (d < D)[None, :], other=0.0)
                product = dot(narrow(hot.to(tl.float32), b.dtype), b, product, PRECISION)
            total += weight * product
    written = inside[:, None] & (d < D)[None, :]
    at = out + token[:, None] * D + d[None, :]
    total = tl.where(kept[:, None], total, 0.0)
    if ADD:
        total += tl.load(at, mask=written, other=0.0)
    tl.store(at, narrow(total, out.dtype.element_ty), mask=written)


@triton.jit
def _weights(
    x_weights, y_weights, x_gradient, y_gradient, x_start, y_start, x_kept, y_kept, M, COLUMNS, x_row, x_column, y_row, y_column,
    CANDIDATES: tl.constexpr, MEAN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(COLUMNS, BLOCK_C)
    m = tl.program_id(0) // parts * BLOCK_S + tl.arange(0, BLOCK_S)
    column = tl.program_id(0) % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (m < M)[:, None] & (column < COLUMNS)[None, :]
    if CANDIDATES:
        partner = (m * COLUMNS)[:, None] + column[None, :]
    else:
        partner = (m * 0)[:, None] + column[None, :]
    of_x = number_kept(x_start, x_kept, m, m < M)
    of_y = number_kept(y_start, y_kept, partner, inside)
    there = (of_x > 0)[:, None] & (of_y > 0)
    m, column = m.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    if x_gradient is not None:
        weight = tl.load(x_gradient + m * x_row + column * x_column, mask=inside, other=0.0).to(tl.float32)
        if MEAN:
            weight = weight / tl.maximum(of_x, 1).to(tl.float32)[:, None]
        tl.store(x_weights + m * COLUMNS + column, tl.where(there, weight, 0.0), mask=inside)
    if y_gradient is not None:
        weight = tl.load(y_gradient + m * y_row + column * y_column, mask=inside, other=0.0).to(tl.float32)
        if MEAN:
            weight = weight / tl.maximum(of_y, 1).to(tl.float32)
        tl.store(y_weights + m * COLUMNS + column, tl.where(there, weight, 0.0), mask=inside)


def weights(p: Problem, grad_x_to_y: Tensor | None, grad_y_to_x: Tensor | None, mean: bool) -> list[Tensor | None]:
    """What each winner's product weighs in the loss, [M, columns] float32; 0 where a set has no kept token.

    Gradients of scores with no rows, as compiled code gives them for a direction that was not wanted, are none.
    """
    gradients = [None if g is None or g.shape[0] != p.x.count else g for g in (grad_x_to_y, grad_y_to_x)]
    if not mean and all(side.keep is None and side.uniform and side.longest for side in (p.x, p.y)):
        return [None if g is None else g.float().contiguous() for g in gradients]
    out = [None if g is None else g.new_empty(g.shape, dtype=torch.float32) for g in gradients]
    strides = [stride for g in gradients for stride in ((0, 0) if g is None else g.stride())]
    launch(
        _weights, (cdiv(p.x.count, 16) * cdiv(p.columns, 32),),
        x_weights=out[0], y_weights=out[1], x_gradient=gradients[0], y_gradient=gradients[1], x_start=p.x.start,
        y_start=p.y.start, x_kept=p.x.kept, y_kept=p.y.kept, M=p.x.count, COLUMNS=p.columns, x_row=strides[0],
        x_column=strides[1], y_row=strides[2], y_column=strides[3], CANDIDATES=p.candidates is not None, MEAN=mean, BLOCK_S=16,
        BLOCK_C=32, num_warps=4,
    )  # fmt: skip
    return out


def add_gradients(
    p: Problem, w_x: Tensor | None, w_y: Tensor | None, y_of_x: Tensor, x_of_y: Tensor, dx: Tensor | None, dy: Tensor | None,
    add: bool,
) -> None:  # fmt: skip
    """Into dx and dy, of all tokens: what the problem's pairs give. w_x and w_y are contiguous [M, columns]."""
    x, y = (p.x, w_x, None if w_x is None else y_of_x), (p.y, w_y, None if w_y is None else x_of_y)
    for out, (own, own_weights, own_winners), (other, other_weights, other_winners) in ((dx, x, y), (dy, y, x)):
        if out is None:
            continue
        chosen = tile("maxsim_gather" if other_winners is None else "maxsim_gradient", own.tokens)
        if own.longest <= chosen["BLOCK_M"] // 2:
            chosen["BLOCK_M"] = max(16, triton.next_power_of_2(max(1, own.longest)))
        units, unit_start, count, blocks = own.units(chosen["BLOCK_M"])
        of_y, d = own is p.y, out.shape[1]
        others = other.count if p.candidates is None else 1 if of_y else p.candidates
        launch(
            _gradient, (count * cdiv(d, chosen["BLOCK_D"]),),
            out=out, own_winners=own_winners, other_winners=other_winners, own_weights=own_weights, other_weights=other_weights,
            others=other.tokens, own_start=own.start, other_start=other.start, own_keep=own.keep, other_keep=other.keep,
            units=units, unit_start=unit_start, SETS=own.count, UNITS=count, BLOCKS=blocks, OTHERS=others, COLUMNS=p.columns, D=d,
            other_row=other.tokens.stride(0), other_column=other.tokens.stride(1),
            own_keep_stride=own.keep_stride, other_keep_stride=other.keep_stride,
            own_width=own.width, other_width=other.width, OWN_Y=of_y, CANDIDATES=p.candidates is not None, ADD=add,
            PRECISION=precision(own.tokens.dtype), **chosen,
        )  # fmt: skip
