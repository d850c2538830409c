"""Tiles of the logits S = scale * x @ y.T + bias in Triton, and the dots of single pairs. Shared by the kernels of this room."""

from __future__ import annotations

from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops import _triton
from vlpfast.ops._triton import Tile, cdiv, dot, launch

TABLE = Path(__file__).with_name("tiles.json")

# Kinds of own pairs: none, column i + offset, column own[i]; LISTS: the rows of a column, several where own repeats
NO_OWN, OFFSET, INDEX, LISTS = 0, 1, 2, 3


def tile(kernel: str, x: Tensor) -> Tile:
    return _triton.tile(TABLE, kernel, x.dtype, x.device)


def precision(dtype: torch.dtype) -> str:
    """How products of features are made; half types have one way alone.

    float32: three tf32 products of the operands' high and low parts, error about 2^-22 of |x| |y|, where one would have 2^-11.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def products(
    x, y, rows, columns, M, N, D, x_row, x_column, y_row, y_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> for `rows` [BLOCK_M] and `columns` [BLOCK_N] in float32; past the last row or column, those of the last."""
    k = tl.arange(0, BLOCK_K)
    x_at = x + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * x_row + k.to(tl.int64)[None, :] * x_column
    y_at = y + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * y_row + k.to(tl.int64)[:, None] * y_column
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_at)
            b = tl.load(y_at)
        else:
            a = tl.load(x_at, mask=k[None, :] < D - start, other=0.0)
            b = tl.load(y_at, mask=k[:, None] < D - start, other=0.0)
        total = dot(a, b, total, PRECISION)
        x_at += BLOCK_K * x_column
        y_at += BLOCK_K * y_column
    return total


@triton.jit
def kept_pairs(
    rows, columns, M, N, own, own_stride, own_offset, row_ids, row_ids_stride, column_ids, column_ids_stride,
    OWN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] or broadcast to it: whether a pair is one of the matrix (EVEN: all are) and takes part in the sums."""
    inside_rows = rows < M
    inside_columns = columns < N
    if EVEN:
        kept = tl.full((1, 1), 1, tl.int1)
    else:
        kept = inside_rows[:, None] & inside_columns[None, :]
    if OWN == 1:
        kept = kept & (columns[None, :] != (rows + own_offset)[:, None])
    if OWN == 2:
        own_columns = tl.load(own + rows.to(tl.int64) * own_stride, mask=inside_rows, other=-1).to(tl.int32)
        kept = kept & (columns[None, :] != own_columns[:, None])
    if row_ids is not None:
        left = tl.load(row_ids + rows.to(tl.int64) * row_ids_stride, mask=inside_rows, other=0)
        right = tl.load(column_ids + columns.to(tl.int64) * column_ids_stride, mask=inside_columns, other=0)
        kept = kept & (left[:, None] != right[None, :])
    return kept


@triton.jit
def _own_logits(
    out, of_column, x, y, scale, bias, own, M, N, D, x_row, x_column, y_row, y_column, bias_stride, own_stride, own_offset,
    OWN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    if OWN == 1:
        columns = rows.to(tl.int64) + own_offset
    else:
        columns = tl.load(own + rows.to(tl.int64) * own_stride, mask=inside, other=0)
    there = inside & (columns >= 0) & (columns < N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + rows.to(tl.int64)[:, None] * x_row + k.to(tl.int64)[None, :] * x_column
    y_at = y + columns[:, None] * y_row + k.to(tl.int64)[None, :] * y_column
    total = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(0, D, BLOCK_K):
        mask = there[:, None] & (k[None, :] < D - start)
        a = tl.load(x_at, mask=mask, other=0.0).to(tl.float64)
        b = tl.load(y_at, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(a * b, 1)
        x_at += BLOCK_K * x_column
        y_at += BLOCK_K * y_column
    logits = total * tl.load(scale).to(tl.float64)
    if bias is not None:
        logits += tl.load(bias + columns * bias_stride, mask=there, other=0.0).to(tl.float64)
    tl.store(out + rows, tl.where(there, logits, float("nan")), mask=inside)
    tl.store(out + M + rows, total, mask=inside)
    tl.store(of_column + columns, logits, mask=there)
    tl.store(of_column + N + columns, total, mask=there)


def own_logits(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, own: Tensor | None, own_offset: int | None
) -> tuple[Tensor, Tensor]:
    """The own pairs' logits and their <x_i, y_j>, by row [2, M] and by column [2, N], summed in float64.

    0 for a column that is no row's own, the value of one of them where several own it; the logit is NaN for a row whose own
    column is not in [0, N): indices on a GPU are not checked beforehand.
    """
    m, n = x.shape[0], y.shape[0]
    out, of_column = x.new_zeros(2, m, dtype=torch.float64), x.new_zeros(2, n, dtype=torch.float64)
    if own is None and own_offset is None:
        return out, of_column
    chosen = tile("own_logits", x)
    launch(
        _own_logits, (cdiv(m, chosen["BLOCK_M"]),),
        out=out, of_column=of_column, x=x, y=y, scale=scale, bias=bias, own=own, M=m, N=n, D=x.shape[1],
        x_row=x.stride(0), x_column=x.stride(1), y_row=y.stride(0), y_column=y.stride(1), bias_stride=stride(bias),
        own_stride=stride(own), own_offset=own_offset or 0, OWN=own_kind(own, own_offset), **chosen,
    )  # fmt: skip
    return out, of_column


def own_kind(own: Tensor | None, own_offset: int | None) -> int:
    return INDEX if own is not None else NO_OWN if own_offset is None else OFFSET


def stride(vector: Tensor | None) -> int:
    """0 for a number that stands for a vector, and for nothing."""
    return 0 if vector is None or vector.ndim == 0 else vector.stride(0)
