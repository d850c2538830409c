"""Rows of images that are taken by index, in Triton: gather_rows_triton and filled_rows_sum_triton of vlpfast/ops/_schemas.py.

A program makes a tile of the result that nobody else writes. An index out of range, which nothing checks on a device, makes its
row NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._triton import Tile, cdiv, launch, narrow
from vlpfast.ops.tokens.triton_tiles import row_tile, rows_and_columns, strides

PARTS = 256  # programs that add up rows, of each block of channels


@triton.jit
def _take(
    out, x, indices, fill, N, K, C, out_image, x_image, x_token, x_channel, indices_image, indices_row, fill_channel,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N channels of BLOCK_M rows."""
    image, k, c = rows_and_columns(K, C, BLOCK_M, BLOCK_N)
    index = tl.load(indices + image * indices_image + k.to(tl.int64) * indices_row, mask=k < K, other=-1)
    there = (index >= 0) & (index < N)
    at = x + image * x_image + index[:, None] * x_token + c.to(tl.int64)[None, :] * x_channel
    inside = (k < K)[:, None] & (c < C)[None, :]
    value = tl.load(at, mask=inside & there[:, None], other=float("nan"))
    if fill is not None:
        filling = tl.load(fill + c.to(tl.int64) * fill_channel, mask=c < C, other=0.0).to(tl.float32)
    else:
        filling = tl.zeros((BLOCK_N,), tl.float32)
    value = tl.where((index == -1)[:, None], narrow(filling, out.dtype.element_ty)[None, :], value)
    tl.store(out + image * out_image + k.to(tl.int64)[:, None] * C + c[None, :], value, mask=inside)


def take(out: Tensor, x: Tensor, indices: Tensor, fill: Tensor | None) -> None:
    """The first K rows of out [B, K or more, C], dense: rows `indices` [B, K] of x, `fill` (zeros) where the index is -1."""
    batch, n, c = x.shape
    k = indices.shape[1]
    chosen = row_tile("rows", x, c)
    launch(
        _take, (batch * cdiv(k, chosen["BLOCK_M"]) * cdiv(c, chosen["BLOCK_N"]),),
        out=out, x=x, indices=indices, fill=fill, N=n, K=k, C=c, out_image=out.stride(0),
        **strides("x_image x_token x_channel", x), **strides("indices_image indices_row", indices),
        **strides("fill_channel", fill), **chosen,
    )  # fmt: skip


def gather_rows(x: Tensor, indices: Tensor, fill: Tensor | None) -> Tensor:
    out = x.new_empty(*indices.shape, x.shape[2])
    take(out, x, indices, fill)
    return out


@triton.jit
def _add_rows(
    out, x, indices, ROWS, K, C, PER_PART, x_image, x_token, x_channel, indices_image, indices_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [parts, C]: the sum of PER_PART of all images' rows, with indices of those whose index is -1."""
    columns = tl.cdiv(C, BLOCK_N)
    part = (tl.program_id(0) // columns).to(tl.int64)
    c = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, PER_PART, BLOCK_M):
        within = start + tl.arange(0, BLOCK_M)
        row = part * PER_PART + within
        image, k = row // K, row % K
        there = (within < PER_PART) & (row < ROWS)
        if indices is not None:
            there = there & (tl.load(indices + image * indices_image + k * indices_row, mask=there, other=0) == -1)
        at = x + (image * x_image + k * x_token)[:, None] + c.to(tl.int64)[None, :] * x_channel
        total += tl.load(at, mask=there[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    tl.store(out + part * C + c, tl.sum(total, 0), mask=c < C)


def add_rows(out: Tensor, x: Tensor, indices: Tensor | None, chosen: Tile) -> None:
    """out [parts, C] float32: the sums of x's rows [B, K, C], which the parts have in equal numbers, with indices [B, K] of those
    whose index is -1."""
    rows, c = x.shape[0] * x.shape[1], x.shape[2]
    launch(
        _add_rows, (out.shape[0] * cdiv(c, chosen["BLOCK_N"]),), out=out, x=x, indices=indices,
        ROWS=rows, K=x.shape[1], C=c, PER_PART=cdiv(rows, out.shape[0]),
        **strides("x_image x_token x_channel", x), **strides("indices_image indices_row", indices), **chosen,
    )  # fmt: skip


def filled_rows_sum(x: Tensor, indices: Tensor) -> Tensor:
    batch, k, c = x.shape
    if batch * k == 0:
        return x.new_zeros(c, dtype=torch.float32)
    chosen = row_tile("sum_rows", x, c)
    parts = x.new_empty(min(PARTS, cdiv(batch * k, chosen["BLOCK_M"])), c, dtype=torch.float32)
    add_rows(parts, x, indices, chosen)
    return sum_parts(parts)


def sum_parts(parts: Tensor) -> Tensor:
    """[C]: the sum of parts [P, C] float32. Few rows: many programs, each of few channels."""
    total = torch.empty_like(parts[0])
    add_rows(total[None], parts[None], None, row_tile("sum_rows", parts, 32))
    return total
