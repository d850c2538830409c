"""sample_hard_negatives in Triton: sample_hard_negatives_triton of vlpfast/ops/_schemas.py; reference.py says what is drawn.

A program goes over some columns for a block of rows and keeps each row's best keys; a second kernel merges what the programs
found. Random bits are the reference's own; keys are float32 where the reference's are float64, so that two columns whose keys
differ by a few 1e-7 of themselves may change places.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._triton import cdiv, launch
from vlpfast.ops.contrastive.triton_sums import LOG2E, Pairs
from vlpfast.ops.contrastive.triton_tiles import kept_pairs, own_logits, precision, products, tile

PROGRAMS = 512  # that the first kernel aims at, by parts of the columns, where rows are few
MOST_FOUND = 4096  # keys of a row that the second kernel merges: they are held in registers at once

NOWHERE = tl.constexpr(2**31 - 1)  # above every column


@triton.jit
def _log_inverse(v):
    """-log(1 - v) for v in (0, 1/2], to a few roundings of itself however small v is: 2 atanh(v / (2 - v))."""
    z = v / (2.0 - v)
    z2 = z * z
    q = z2 * (1 / 13) + 1 / 11
    q = q * z2 + 1 / 9
    q = q * z2 + 1 / 7
    q = q * z2 + 1 / 5
    q = q * z2 + 1 / 3
    return 2.0 * z * (q * z2 + 1.0)


@triton.jit
def gumbel(bits):
    """-log(-log(1 - v)) of 32 random bits each, v = (bits + 1/2) / 2^32."""
    v = (bits.to(tl.float32) + 0.5) * (1 / 4294967296)
    rest = ((~bits).to(tl.float32) + 0.5) * (1 / 4294967296)  # 1 - v, exact where it is small
    return -tl.log(tl.where(v < 0.5, _log_inverse(tl.minimum(v, 0.5)), -tl.log(rest)))


@triton.jit
def random_bits(rows, first_column, stream, seed, BLOCK_N: tl.constexpr):
    """[rows, BLOCK_N] uint32, as in reference.random_bits; first_column is a multiple of 4."""
    counters = (first_column // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
    c0 = tl.zeros((rows.shape[0], BLOCK_N // 4), tl.uint32) + counters[None, :]
    c1 = tl.zeros((rows.shape[0], BLOCK_N // 4), tl.uint32) + rows.to(tl.uint32)[:, None]
    zero = tl.zeros((rows.shape[0], BLOCK_N // 4), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + stream, zero, 10)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], BLOCK_N))


@triton.jit
def _take(keys, columns, best, best_columns):
    """The best of both: `best` [rows, count] in no order, its columns differ; keys [rows, columns] of higher columns."""
    taken = 0
    while taken < best.shape[1]:
        high = tl.max(keys, 1)
        low = tl.min(best, 1)
        better = high > low  # of equal keys the lower column stays
        column = tl.min(tl.where(keys == high[:, None], columns[None, :], NOWHERE), 1)
        place = tl.max(tl.where(best == low[:, None], best_columns, -NOWHERE), 1)
        replaced = (best_columns == place[:, None]) & better[:, None]
        best = tl.where(replaced, high[:, None], best)
        best_columns = tl.where(replaced, column[:, None], best_columns)
        keys = tl.where(columns[None, :] == column[:, None], float("-inf"), keys)
        taken = tl.where(tl.max(better.to(tl.int32), 0) > 0, taken + 1, best.shape[1])
    return best, best_columns


@triton.jit
def _draw(
    keys_out, columns_out, sums_out, x, y, scale, bias, own, row_ids, column_ids, seed,
    M, N, D, PARTS, COLUMNS, key_list, sum_list, x_row, x_column, y_row, y_column, bias_stride, own_stride, own_offset,
    row_ids_stride, column_ids_stride,
    OWN: tl.constexpr, UNIFORM: tl.constexpr, COUNT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """COUNT best keys of each row among COLUMNS columns, [PARTS, M, COUNT]; UNIFORM: twice, by logit and by chance alone.

    sums_out [2, PARTS, M]: of exp(logit - shift) without the own pair, the shifts; where UNIFORM.
    """
    rows = tl.program_id(0) // PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) % PARTS
    slots = tl.arange(0, COUNT)
    empty = tl.zeros((BLOCK_M, COUNT), tl.int32) - 1 - slots[None, :]  # all different, all below 0
    best, best_columns = tl.full((BLOCK_M, COUNT), float("-inf"), tl.float32), empty
    chance, chance_columns = best, empty
    shift = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    factor = tl.load(scale)
    key = tl.load(seed)
    end = tl.minimum(N, (part + 1) * COLUMNS)
    for start in range(part * COLUMNS, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        s = factor * products(
            x, y, rows, columns, M, N, D, x_row, x_column, y_row, y_column, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
        )
        s = tl.where(s == s, s, float("inf"))
        kept = kept_pairs(
            rows, columns, M, N, own, own_stride, own_offset, row_ids, row_ids_stride, column_ids, column_ids_stride, OWN, False
        )
        if UNIFORM:
            summed = kept_pairs(
                rows, columns, M, N, own, own_stride, own_offset, None, row_ids_stride, column_ids, column_ids_stride, OWN, False
            )
            others = tl.where(summed, s, float("-inf"))
            raised = tl.maximum(shift, tl.max(others, 1))
            usable = tl.where(tl.abs(raised) == float("inf"), 0.0, raised)  # the difference of infinities is no number
            sums = sums * tl.exp2((shift - usable) * LOG2E) + tl.sum(tl.exp2((others - usable[:, None]) * LOG2E), 1)
            shift = raised
        keys = tl.where(kept, s + gumbel(random_bits(rows, start, 0, key, BLOCK_N)), float("-inf"))
        best, best_columns = _take(keys, columns, best, best_columns)
        if UNIFORM:
            keys = tl.where(kept, gumbel(random_bits(rows, start, 1, key, BLOCK_N)), float("-inf"))
            chance, chance_columns = _take(keys, columns, chance, chance_columns)
    inside = rows < M
    line = part.to(tl.int64) * M + rows
    at = line[:, None] * COUNT + slots[None, :]
    tl.store(keys_out + at, best, mask=inside[:, None])
    tl.store(columns_out + at, best_columns, mask=inside[:, None])
    if UNIFORM:
        tl.store(keys_out + key_list + at, chance, mask=inside[:, None])
        tl.store(columns_out + key_list + at, chance_columns, mask=inside[:, None])
        tl.store(sums_out + line, sums, mask=inside)
        tl.store(sums_out + sum_list + line, shift, mask=inside)


@triton.jit
def _merge_draws(
    out, keys_in, columns_in, sums_in, own_logits, log_uniform, M, PARTS, DRAWS, key_list, sum_list,
    HAS_OWN: tl.constexpr, UNIFORM: tl.constexpr, COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """DRAWS best of what the parts found for each row, in order; with UNIFORM keys by logit relative to the row's logsumexp."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, BLOCK_P * COUNT)
    at = (i // COUNT)[None, :].to(tl.int64) * M * COUNT + rows[:, None] * COUNT + (i % COUNT)[None, :]
    there = (rows < M)[:, None] & (i < PARTS * COUNT)[None, :]
    keys = tl.load(keys_in + at, mask=there, other=float("-inf"))
    columns = tl.load(columns_in + at, mask=there, other=-1)
    chance, chance_columns = keys, columns
    if UNIFORM:
        parts = tl.arange(0, BLOCK_P)
        sum_at = sums_in + parts.to(tl.int64)[None, :] * M + rows[:, None]
        there_sums = (rows < M)[:, None] & (parts < PARTS)[None, :]
        sums = tl.load(sum_at, mask=there_sums, other=0.0)
        shifts = tl.load(sum_at + sum_list, mask=there_sums, other=float("-inf"))
        largest = tl.max(shifts, 1)
        if HAS_OWN:
            own = tl.load(own_logits + rows, mask=rows < M, other=0.0)
            own = tl.where(own == own, own, float("inf"))
            largest = tl.maximum(largest, own)
        usable = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)
        shifts = tl.where(tl.abs(shifts) == float("inf"), 0.0, shifts)  # what the sums there are relative to
        total = tl.sum(sums * tl.exp2((shifts - usable[:, None]) * LOG2E), 1)
        if HAS_OWN:
            total += tl.exp2((own - usable) * LOG2E)
        logsumexp = tl.where(largest == float("inf"), largest, tl.log(total) + usable)
        keys = tl.where(tl.abs(keys) == float("inf"), keys, keys - logsumexp[:, None])
        chance = tl.load(keys_in + key_list + at, mask=there, other=float("-inf")) + log_uniform
        chance_columns = tl.load(columns_in + key_list + at, mask=there, other=-1)
    for k in range(0, DRAWS):
        high = tl.max(keys, 1)
        column = tl.min(tl.where(keys == high[:, None], columns, NOWHERE), 1)
        if UNIFORM:
            other = tl.max(chance, 1)
            other_column = tl.min(tl.where(chance == other[:, None], chance_columns, NOWHERE), 1)
            column = tl.where(other > high, other_column, tl.where(other == high, tl.minimum(column, other_column), column))
            high = tl.maximum(high, other)
            chance = tl.where(chance_columns == column[:, None], float("-inf"), chance)
        keys = tl.where(columns == column[:, None], float("-inf"), keys)
        drawn = tl.where(high == float("-inf"), -1, column)
        tl.store(out + rows * DRAWS + k, drawn.to(tl.int64), mask=rows < M)


def sample(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # []
    own: Tensor | None,  # [M]
    own_offset: int | None,
    row_ids: Tensor | None,  # [M]
    column_ids: Tensor | None,  # [N]
    count: int,
    uniform: float,
    seed: Tensor,  # []
) -> Tensor:
    (m, d), n = x.shape, y.shape[0]
    chosen = tile("sample", x)
    slots = triton.next_power_of_2(count)
    blocks = cdiv(m, chosen["BLOCK_M"]), cdiv(n, chosen["BLOCK_N"])
    parts = max(1, min(cdiv(PROGRAMS, max(1, blocks[0])), blocks[1], MOST_FOUND // slots))
    columns = cdiv(blocks[1], parts) * chosen["BLOCK_N"]
    parts = max(1, cdiv(n, columns)) if columns else 1
    lists, has_own = 2 if uniform else 1, own is not None or own_offset is not None
    keys = x.new_empty(lists, parts, m, slots, dtype=torch.float32)
    found = torch.empty_like(keys, dtype=torch.int32)
    sums = x.new_empty(2, parts, m, dtype=torch.float32) if uniform else None
    strides = {"key_list": keys.stride(0), "sum_list": 0 if sums is None else sums.stride(0)}
    pairs = Pairs(x, y, scale, None, own, own_offset, row_ids, column_ids)
    launch(
        _draw, (blocks[0] * parts,),
        keys_out=keys, columns_out=found, sums_out=sums, seed=seed, PARTS=parts, COLUMNS=columns, **strides, UNIFORM=uniform > 0,
        COUNT=slots, **pairs.arguments(0, m), EVEN_K=d % chosen["BLOCK_K"] == 0, PRECISION=precision(x.dtype), **chosen,
    )  # fmt: skip
    own_of_row = own_logits(x, y, scale, None, own, own_offset)[0][0].float() if uniform and has_own else None
    out = x.new_empty(m, count, dtype=torch.int64)
    together = triton.next_power_of_2(parts) * slots
    rows = min(64, max(1, 2048 // together))
    launch(
        _merge_draws, (cdiv(m, rows),),
        out=out, keys_in=keys, columns_in=found, sums_in=sums, own_logits=own_of_row,
        log_uniform=math.log(uniform) if uniform else 0.0, M=m, PARTS=parts, DRAWS=count, **strides,
        HAS_OWN=own_of_row is not None, UNIFORM=uniform > 0, COUNT=slots, BLOCK_P=triton.next_power_of_2(parts), BLOCK_M=rows,
        num_warps=4,
    )  # fmt: skip
    return out
