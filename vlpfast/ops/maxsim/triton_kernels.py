"""maxsim in Triton: maxsim_fwd_triton and maxsim_bwd_triton of vlpfast/ops/_schemas.py.

Forward: the rows of a tile are tokens of one side in units of at most 128, each a set or a part of one, so that several short
sets share a tile; a program multiplies them with one set of the other side, block by block, and keeps the largest product and its
place for each row. If both directions of all pairs are wanted, the largest of each column within each unit come from the same
products, and those of a set's several units are merged afterwards, in order. One direction alone, or pairs with candidates, are
made with the wanted side in the rows: for both directions of candidates that is two passes. Sets that are one unit have their
scores from the first kernel; else a last one adds sums by unit in order, without atomics.

A largest value is found first, then the lowest place that has it. Lengths of packed sets are known on the device alone: the host
only bounds the number of units. Backward: triton_gradient.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._schemas import maxsim_index_dtype
from vlpfast.ops._triton import INTERPRETED, cdiv, dot, launch
from vlpfast.ops.maxsim.triton_gradient import add_gradients, weights
from vlpfast.ops.maxsim.triton_sets import ALL, OF_ROWS, OF_SETS, Problem, Side, number_kept, precision, rows_of_tile, tile

PARTIAL_BYTES = 256 << 20  # of largest values by unit: the forward takes the sets in the rows in chunks that need no more
WORKSPACE_BYTES = 256 << 20  # of winners that the backward finds again at once
MOST_WHOLE = 512  # bytes of a token up to which the rows' tile is loaded once and kept; float32 takes more registers, a quarter

NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(s, AXIS: tl.constexpr):
    """NaN where there is one."""
    if INTERPRETED:  # it would take the largest element by element, and versions differ about NaN
        bad = tl.sum((s != s).to(tl.int32), AXIS)
        return tl.where(bad > 0, float("nan"), tl.max(tl.where(s == s, s, float("-inf")), AXIS))
    else:
        return tl.reduce(s, AXIS, _larger)


@triton.jit
def _forward(
    row_sums, row_winners, column_sums, column_best, column_winners,
    x, y, x_start, y_start, x_keep, y_keep, units, unit_start, row_base, column_base,
    SETS, UNITS, BLOCKS, COLUMNS, CANDIDATES, D, x_row, x_column, y_row, y_column, x_keep_stride, y_keep_stride,
    row_width, column_width, sum_set, sum_column,
    DIRECT: tl.constexpr, MEAN: tl.constexpr, PARTNERS: tl.constexpr, ZERO: tl.constexpr, WANT_COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of x against the set of y that is their partner number `column`.

    row_sums, strides sum_set and sum_column: the sum of the largest of a unit's kept rows; if DIRECT a unit is a set, and its
    score is written. row_winners [COLUMNS, row_width]. Of WANT_COLUMNS column_winners [SETS, column_width] and column_sums (or
    scores, strides as row_sums) are final; with column_best there are several units to a set, and it and column_winners are
    theirs, [UNITS, column_width]. Winners stand in their row from its first token's place on: the tokens at row_base,
    column_base.
    """
    column = tl.program_id(0) % COLUMNS
    part = tl.program_id(0) // COLUMNS
    GROUP: tl.constexpr = BLOCK_M // UNIT
    place, token, inside = rows_of_tile(part, x_start, units, unit_start, SETS, UNITS, BLOCKS, UNIT, BLOCK_M)
    partner = column.to(tl.int64)
    if PARTNERS != 0:  # one unit to a tile: all rows are one set's
        if units is not None:
            only = tl.load(units + part)
        else:
            only = part // BLOCKS
        if only >= SETS:
            return
        if PARTNERS == 1:
            partner += only.to(tl.int64) * CANDIDATES
        else:
            partner += only // CANDIDATES
    first = tl.load(y_start + partner)
    length = (tl.load(y_start + partner + 1) - first).to(tl.int32)
    kept = inside
    if x_keep is not None:
        kept = inside & (tl.load(x_keep + token * x_keep_stride, mask=inside, other=0) != 0)
    k = tl.arange(0, BLOCK_K)
    x_at = x + token[:, None] * x_row + k.to(tl.int64)[None, :] * x_column
    if WHOLE:
        a_whole = tl.load(x_at, mask=inside[:, None] & (k < D)[None, :], other=0.0)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_M,), tl.int32)
    column_total = tl.zeros((GROUP,), tl.float32)
    y_number = tl.zeros((BLOCK_T,), tl.int32)
    group = tl.arange(0, GROUP)
    group_unit = part * GROUP + group
    group_there = group_unit < UNITS
    for start in range(0, length, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = t < length
        y_at = y + (first + t)[None, :] * y_row + k.to(tl.int64)[:, None] * y_column
        s = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
        if WHOLE:
            b = tl.load(y_at, mask=(k < D)[:, None] & there[None, :], other=0.0)
            s = dot(a_whole, b, s, PRECISION)
        else:
            x_part = x_at
            for d in range(0, D, BLOCK_K):
                a = tl.load(x_part, mask=inside[:, None] & (k < D - d)[None, :], other=0.0)
                b = tl.load(y_at, mask=(k < D - d)[:, None] & there[None, :], other=0.0)
                s = dot(a, b, s, PRECISION)
                x_part += BLOCK_K * x_column
                y_at += BLOCK_K * y_column
        y_kept = there
        if y_keep is not None:
            y_kept = there & (tl.load(y_keep + (first + t) * y_keep_stride, mask=there, other=0) != 0)
            if DIRECT:
                y_number += y_kept.to(tl.int32)
        if ZERO:
            s = tl.where(kept[:, None] & y_kept[None, :], s, 0.0)
            s = tl.where(inside[:, None] & there[None, :], s, float("-inf"))
        else:
            s = tl.where(kept[:, None] & y_kept[None, :], s, float("-inf"))
        block_best = _largest(s, 1)
        rises = (block_best > best) | ((block_best != block_best) & (best == best))
        if row_winners is not None:
            lowest = tl.where((s == block_best[:, None]) | (s != s), t[None, :], NOWHERE)
            winner = tl.where(rises, tl.min(lowest, 1), winner)
        best = tl.where(rises, block_best, best)
        if WANT_COLUMNS:
            by_unit = tl.reshape(s, (GROUP, UNIT, BLOCK_T))
            of_column = _largest(by_unit, 1)  # [GROUP, BLOCK_T]
            at = group_unit.to(tl.int64)[:, None] * column_width + (first - tl.load(column_base) + t)[None, :]
            written = group_there[:, None] & there[None, :]
            if column_winners is not None:
                row = tl.reshape(tl.where(inside, place, 0), (GROUP, UNIT))
                lowest = tl.where((by_unit == of_column[:, None, :]) | (by_unit != by_unit), row[:, :, None], NOWHERE)
                found = tl.where((of_column != float("-inf")) & y_kept[None, :], tl.min(lowest, 1), 0)
                tl.store(column_winners + at, found.to(column_winners.dtype.element_ty), mask=written)
            if column_best is not None:
                tl.store(column_best + at, of_column, mask=written)
            else:
                column_total += tl.sum(tl.where(y_kept[None, :], of_column, 0.0), 1)
    row_total = tl.sum(tl.reshape(tl.where(kept, best, 0.0), (GROUP, UNIT)), 1)
    if DIRECT:
        of_set = tl.sum(tl.reshape(kept.to(tl.int32), (GROUP, UNIT)), 1)
        of_partner = length
        if y_keep is not None:
            of_partner = tl.sum(y_number, 0)
        there = (of_set > 0) & (of_partner > 0)
        if MEAN:
            row_total = row_total / tl.maximum(of_set, 1).to(tl.float32)
            column_total = column_total / tl.maximum(of_partner, 1).to(tl.float32)
        row_total = tl.where(there, row_total, 0.0)
        column_total = tl.where(there, column_total, 0.0)
    sum_at = group_unit.to(tl.int64) * sum_set + column.to(tl.int64) * sum_column
    tl.store(row_sums + sum_at, row_total, mask=group_there)
    if row_winners is not None:
        at = column.to(tl.int64) * row_width + token - tl.load(row_base)
        tl.store(row_winners + at, tl.where(kept, winner, 0).to(row_winners.dtype.element_ty), mask=inside)
    if WANT_COLUMNS and column_best is None:
        tl.store(column_sums + sum_at, column_total, mask=group_there)


@triton.jit
def _units_of(owner, unit_start, BLOCKS, there):
    if unit_start is not None:
        first = tl.load(unit_start + owner, mask=there, other=0)
        last = tl.load(unit_start + owner + 1, mask=there, other=0)
    else:
        first = owner * BLOCKS
        last = first + BLOCKS
    return first, last


@triton.jit
def _merge(
    column_sums, column_winners, column_best, unit_winners, y_start, y_keep, unit_start, column_base,
    SETS, BLOCKS, y_keep_stride, column_width, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The largest of each column over the units of one set, in order, and their sum over the kept tokens of a set of y."""
    owner = tl.program_id(0) % SETS
    column = tl.program_id(0) // SETS
    first_unit, last_unit = _units_of(owner, unit_start, BLOCKS, owner < SETS)
    first = tl.load(y_start + column)
    length = (tl.load(y_start + column + 1) - first).to(tl.int32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, length, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = t < length
        at = first - tl.load(column_base) + t
        best = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        winner = tl.zeros((BLOCK_T,), tl.int32)
        offset = first_unit.to(tl.int64) * column_width + at
        for _ in range(first_unit, last_unit):
            b = tl.load(column_best + offset, mask=there, other=0.0)
            rises = (b > best) | ((b != b) & (best == best))
            if column_winners is not None:
                winner = tl.where(rises, tl.load(unit_winners + offset, mask=there, other=0).to(tl.int32), winner)
            best = tl.where(rises, b, best)
            offset += column_width
        kept = there
        if y_keep is not None:
            kept = there & (tl.load(y_keep + (first + t) * y_keep_stride, mask=there, other=0) != 0)
        total += tl.where(kept, best, 0.0)
        if column_winners is not None:
            winners = column_winners + owner.to(tl.int64) * column_width + at
            tl.store(winners, winner.to(column_winners.dtype.element_ty), mask=there)
    tl.store(column_sums + column.to(tl.int64) * SETS + owner, tl.sum(total, 0))


@triton.jit
def _finish(
    row_scores, column_scores, row_sums, column_sums, x_start, y_start, x_kept, y_kept, unit_start,
    SETS, UNITS, BLOCKS, COLUMNS, CANDIDATES, score_set, score_column,
    PARTNERS: tl.constexpr, MEAN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Scores from sums: of a set's units, added in order, and of column_sums [COLUMNS, SETS], by the sets' numbers of tokens."""
    parts = tl.cdiv(COLUMNS, BLOCK_C)
    owner = tl.program_id(0) // parts * BLOCK_S + tl.arange(0, BLOCK_S)
    column = tl.program_id(0) % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    is_set, is_column = owner < SETS, column < COLUMNS
    inside = is_set[:, None] & is_column[None, :]
    if PARTNERS == 0:
        partner = (owner * 0)[:, None] + column[None, :]
    elif PARTNERS == 1:
        partner = (owner * CANDIDATES)[:, None] + column[None, :]
    else:
        partner = (owner // CANDIDATES)[:, None] + (column * 0)[None, :]
    of_set = number_kept(x_start, x_kept, owner, is_set)
    of_partner = number_kept(y_start, y_kept, partner, inside)
    there = (of_set > 0)[:, None] & (of_partner > 0)
    first, last = _units_of(owner, unit_start, BLOCKS, is_set)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for number in range(0, tl.max(last - first, 0)):
        unit = first + number
        at = column.to(tl.int64)[None, :] * UNITS + unit[:, None]
        total += tl.load(row_sums + at, mask=inside & (unit < last)[:, None], other=0.0)
    at = owner.to(tl.int64)[:, None] * score_set + column.to(tl.int64)[None, :] * score_column
    if MEAN:
        total = total / tl.maximum(of_set, 1).to(tl.float32)[:, None]
    tl.store(row_scores + at, tl.where(there, total, 0.0), mask=inside)
    if column_scores is not None:
        total = tl.load(column_sums + column.to(tl.int64)[None, :] * SETS + owner[:, None], mask=inside, other=0.0)
        if MEAN:
            total = total / tl.maximum(of_partner, 1).to(tl.float32)
        tl.store(column_scores + at, tl.where(there, total, 0.0), mask=inside)


# --- launching --------------------------------------------------------------------------------------------------------


def _pass(
    rows: Side, others: Side, partners: int, candidates: int, mean: bool, zero: bool,
    row_scores: Tensor | None, column_scores: Tensor | None, row_winners: Tensor | None, column_winners: Tensor | None,
    want_columns: bool,
) -> None:  # fmt: skip
    """Writes the scores of the sets in the rows, row_scores [sets, columns] by its strides, and with want_columns (ALL) those of
    the columns, column_scores likewise.

    row_winners [columns, rows.width] and column_winners [sets in the rows, others.width] are written too. No scores: winners
    alone.
    """
    chosen = tile("maxsim", rows.tokens)
    block_t, d = chosen["BLOCK_T"], rows.tokens.shape[1]
    unit = _unit(rows.longest, chosen["BLOCK_M"], 32 if want_columns else 16)
    columns = {ALL: others.count, OF_SETS: candidates, OF_ROWS: 1}[partners]
    if partners != ALL:
        chosen["BLOCK_M"] = unit = max(16, unit)  # the rows of a tile have the same partners
    whole = d * rows.tokens.element_size() <= MOST_WHOLE // (4 if rows.tokens.dtype == torch.float32 else 1)
    if whole:
        chosen["BLOCK_K"] = max(16, triton.next_power_of_2(d))
    several = want_columns and (not rows.uniform or rows.longest > unit)
    bytes_of_a_set = cdiv(rows.longest, unit) * others.width * (4 + maxsim_index_dtype(rows.longest).itemsize)
    for begin, end in _chunks(rows.count, bytes_of_a_set, PARTIAL_BYTES) if several else [(0, rows.count)]:
        chunk = rows.part(begin, end)
        winners = None if column_winners is None else column_winners[begin:end]
        units, unit_start, count, blocks = chunk.units(unit)
        _check_grid(cdiv(count * unit, chosen["BLOCK_M"]) * columns)
        new = {"dtype": torch.float32}
        direct = row_scores is not None and units is None and blocks == 1
        if direct:
            row_sums, column_sums, sum_set, sum_column = row_scores, column_scores, *row_scores.stride()
        else:
            row_sums, sum_set, sum_column = rows.tokens.new_empty(columns, count, **new), 1, count
            column_sums = rows.tokens.new_empty(columns, chunk.count, **new) if want_columns else None
        column_best = rows.tokens.new_empty(count, others.width, **new) if several else None
        unit_winners = winners
        if several and winners is not None:
            unit_winners = winners.new_empty(count, others.width)
        launch(
            _forward, (cdiv(count * unit, chosen["BLOCK_M"]) * columns,),
            row_sums=row_sums, row_winners=row_winners, column_sums=None if several else column_sums, column_best=column_best,
            column_winners=unit_winners, x=chunk.tokens, y=others.tokens, x_start=chunk.start, y_start=others.start,
            x_keep=chunk.keep, y_keep=others.keep, units=units, unit_start=unit_start, row_base=rows.start,
            column_base=others.start, SETS=chunk.count, UNITS=count, BLOCKS=blocks, COLUMNS=columns, CANDIDATES=candidates, D=d,
            x_row=chunk.tokens.stride(0), x_column=chunk.tokens.stride(1),
            y_row=others.tokens.stride(0), y_column=others.tokens.stride(1),
            x_keep_stride=chunk.keep_stride, y_keep_stride=others.keep_stride,
            row_width=rows.width, column_width=others.width, sum_set=sum_set, sum_column=sum_column, DIRECT=direct, MEAN=mean,
            PARTNERS=partners, ZERO=zero, WANT_COLUMNS=want_columns,
            WHOLE=whole, PRECISION=precision(rows.tokens.dtype), UNIT=unit, **chosen,
        )  # fmt: skip
        if several:
            launch(
                _merge, (chunk.count * columns,), column_sums=column_sums, column_winners=winners, column_best=column_best,
                unit_winners=unit_winners, y_start=others.start, y_keep=others.keep, unit_start=unit_start,
                column_base=others.start, SETS=chunk.count, BLOCKS=blocks, y_keep_stride=others.keep_stride,
                column_width=others.width, BLOCK_T=block_t, num_warps=4,
            )  # fmt: skip
        if direct or row_scores is None:
            continue
        launch(
            _finish, (cdiv(chunk.count, 16) * cdiv(columns, 32),),
            row_scores=row_scores[begin:], column_scores=None if column_scores is None else column_scores[begin:],
            row_sums=row_sums, column_sums=column_sums, x_start=chunk.start, y_start=others.start, x_kept=chunk.kept,
            y_kept=others.kept, unit_start=unit_start, SETS=chunk.count, UNITS=count, BLOCKS=blocks, COLUMNS=columns,
            CANDIDATES=candidates, score_set=row_scores.stride(0), score_column=row_scores.stride(1), PARTNERS=partners,
            MEAN=mean, BLOCK_S=16, BLOCK_C=32, num_warps=4,
        )  # fmt: skip


def _unit(longest: int, most: int, least: int) -> int:
    """Rows to a unit: those that leave fewest of the rows empty, of these the most."""
    if longest <= least:
        return triton.next_power_of_2(max(1, longest))
    sizes = [least << i for i in range(most.bit_length()) if least << i <= most]
    return min(sizes, key=lambda size: (cdiv(longest, size) * size, -size))


def _chunks(count: int, bytes_of_one: int, most: int) -> list[tuple[int, int]]:
    size = max(1, most // max(1, bytes_of_one))
    return [(at, min(count, at + size)) for at in range(0, count, size)] or [(0, 0)]


def _check_grid(programs: int) -> None:
    if programs >= 1 << 31:
        raise ValueError(f"x and y: expected less than {1 << 31} pairs of tiles for a Triton kernel, got {programs}")


def _scores(
    p: Problem, want_x_to_y: bool, want_y_to_x: bool, mean: bool, zero: bool, x_to_y: Tensor | None, y_to_x: Tensor | None,
    y_of_x: Tensor | None, x_of_y: Tensor | None,
) -> None:  # fmt: skip
    """Writes scores [M, columns] and winners, or winners alone."""
    if p.candidates is None:
        if want_x_to_y:
            columns = x_of_y if want_y_to_x else None
            _pass(p.x, p.y, ALL, 1, mean, zero, x_to_y, y_to_x if want_y_to_x else None, y_of_x, columns, want_y_to_x)
        elif want_y_to_x:
            _pass(p.y, p.x, ALL, 1, mean, zero, None if y_to_x is None else y_to_x.T, None, x_of_y, None, False)
        return
    if want_x_to_y:
        _pass(p.x, p.y, OF_SETS, p.candidates, mean, zero, x_to_y, None, y_of_x, None, False)
    if want_y_to_x:
        scores = None if y_to_x is None else y_to_x.view(-1, 1)
        _pass(p.y, p.x, OF_ROWS, max(1, p.candidates), mean, zero, scores, None, x_of_y, None, False)


# --- operators --------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor, y: Tensor, x_start: Tensor, y_start: Tensor, x_keep: Tensor | None, y_keep: Tensor | None,
    x_longest: int, y_longest: int, candidates: int | None, want_x_to_y: bool, want_y_to_x: bool, mean: bool, zero: bool,
    keep_winners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    p = Problem(Side.of(x, x_start, x_keep, x_longest), Side.of(y, y_start, y_keep, y_longest), candidates)
    y_of_x = _winners(x, p.columns if keep_winners and want_x_to_y else 0, x.shape[0], y_longest)
    x_of_y = _winners(x, p.rows_of_y if keep_winners and want_y_to_x else 0, y.shape[0], x_longest)
    kept = (y_of_x if keep_winners and want_x_to_y else None), (x_of_y if keep_winners and want_y_to_x else None)
    scores = [x.new_empty((p.x.count * want, p.columns), dtype=torch.float32) for want in (want_x_to_y, want_y_to_x)]
    _scores(p, want_x_to_y, want_y_to_x, mean, zero, *scores, *kept)
    return *scores, y_of_x, x_of_y


def _winners(like: Tensor, rows: int, width: int, longest: int) -> Tensor:
    return like.new_empty((rows, width), dtype=maxsim_index_dtype(longest))


def backward(
    grad_x_to_y: Tensor | None, grad_y_to_x: Tensor | None, x: Tensor, y: Tensor, x_start: Tensor, y_start: Tensor,
    x_keep: Tensor | None, y_keep: Tensor | None, x_longest: int, y_longest: int, candidates: int | None,
    mean: bool, zero: bool, y_of_x: Tensor, x_of_y: Tensor, need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p = Problem(Side.of(x, x_start, x_keep, x_longest), Side.of(y, y_start, y_keep, y_longest), candidates)
    w_x, w_y = weights(p, grad_x_to_y, grad_y_to_x, mean)
    again = (w_x is not None and y_of_x.shape[0] < p.columns) or (w_y is not None and x_of_y.shape[0] < p.rows_of_y)
    pieces = _pieces(p, w_x is not None, w_y is not None) if again else [(0, p.x.count, 0, p.columns)]
    dx, dy = (
        # sums over several pieces in float32; where all sets are as long as the longest one piece writes every row
        (t.new_empty if len(pieces) == 1 and side.uniform else t.new_zeros)(
            (t.shape[0] if need else 0, t.shape[1]), dtype=t.dtype if len(pieces) == 1 else torch.float32
        )
        for t, side, need in ((x, p.x, need_x), (y, p.y, need_y))
    )
    for begin, end, first, last in pieces:
        piece = p.part(begin, end, first, last)
        some_y_of_x, some_x_of_y = y_of_x, x_of_y
        if again:
            some_y_of_x = _winners(x, piece.columns if w_x is not None else 0, piece.x.width, y_longest)
            some_x_of_y = _winners(x, piece.rows_of_y if w_y is not None else 0, piece.y.width, x_longest)
            found = (None if w_x is None else some_y_of_x), (None if w_y is None else some_x_of_y)
            _scores(piece, w_x is not None, w_y is not None, mean, zero, None, None, *found)
        w = [None if t is None else t[begin:end, first:last].contiguous() for t in (w_x, w_y)]
        add_gradients(piece, *w, some_y_of_x, some_x_of_y, dx if need_x else None, dy if need_y else None, len(pieces) > 1)
    return dx.to(x.dtype), dy.to(y.dtype)


def _pieces(p: Problem, want_x_to_y: bool, want_y_to_x: bool) -> list[tuple[int, int, int, int]]:
    """Sets of x and columns, begin and end each, whose winners need at most WORKSPACE_BYTES, one pair of sets at least."""
    x_size, y_size = (maxsim_index_dtype(longest).itemsize for longest in (p.y.longest, p.x.longest))
    if p.candidates is not None:
        x_bytes, y_bytes = p.candidates * p.x.longest * x_size, p.candidates * p.y.longest * y_size
        rows = _chunks(p.x.count, want_x_to_y * x_bytes + want_y_to_x * y_bytes, WORKSPACE_BYTES)
        return [(*part, 0, p.columns) for part in rows]
    pair = want_x_to_y * min(p.x.longest, p.x.width) * x_size + want_y_to_x * min(p.y.longest, p.y.width) * y_size
    columns = _chunks(p.columns, pair, WORKSPACE_BYTES)
    width = columns[0][1] - columns[0][0]
    rows = _chunks(p.x.count, pair * max(1, width), WORKSPACE_BYTES)
    return [(*r, *c) for r in rows for c in columns]
