"""pair_softplus in Triton: pair_softplus_triton of vlpfast/ops/_schemas.py; csrc/contrastive/softplus.cpp explains it.

Rows come in chunks: a tile of the logits gives its sums at once and leaves P = dLoss/dS = weight * sigmoid(S) in a workspace,
from which two products make the gradients as those of pair_logsumexp are made (triton_gradient.py). The gradients of scale and
bias are sums over the tile, in float32, before P is rounded: where they alone are wanted there is one product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._schemas import stash_dtype, stash_width
from vlpfast.ops._triton import cdiv, grouped, launch, narrow
from vlpfast.ops.contrastive.triton_gradient import WEIGHT_SCALE, Gradient, Side, Unit, own_of_columns, own_of_rows
from vlpfast.ops.contrastive.triton_sums import LOG2E, Pairs, chunks
from vlpfast.ops.contrastive.triton_tiles import kept_pairs, own_logits, precision, products, tile

WORKSPACE_BYTES = 256 << 20  # of P, and as much again of sums by tile; at least 128 rows at a time


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
def _halves(t):
    """[M, N] as its left and right half."""
    return tl.split(tl.permute(tl.reshape(t, (t.shape[0], 2, t.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _columns_of_tile(
    total, loss, dots, want_dots: tl.constexpr, column_partial, kept_rows, factor, weight, bias, own, row_ids, column_ids, rows,
    columns, block_row, M, N, kept_row, bias_stride, own_stride, own_offset, row_ids_stride, column_ids_stride, OWN: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Some columns of a tile: their losses and their P <x_i, y_j> are added by row, their P is summed by column and stored."""
    s = total * factor
    if bias is not None:
        s += tl.load(bias + columns.to(tl.int64) * bias_stride, mask=columns < N, other=0.0)[None, :]
    kept = kept_pairs(
        rows, columns, M, N, own, own_stride, own_offset, row_ids, row_ids_stride, column_ids, column_ids_stride, OWN, EVEN
    )
    # one exponential, never above 1, serves both: neither overflows, and both keep their precision where exp(s) is tiny
    e = tl.exp2(-tl.abs(s) * LOG2E)
    loss += tl.sum(tl.where(kept, tl.where(s > 0, s, 0.0) + _log1p(e), 0.0), 1)
    if want_dots or column_partial is not None or kept_rows is not None:
        larger = weight / (1.0 + e)  # of sigmoid(s) and sigmoid(-s)
        p = tl.where(kept, tl.where(s > 0, larger, larger * e), 0.0)
        if want_dots:
            dots += tl.sum(p * total, 1)
        if column_partial is not None:
            tl.store(column_partial + block_row.to(tl.int64) * N + columns, tl.sum(p, 0), mask=columns < N)
        if kept_rows is not None:
            first = kept_rows + block_row.to(tl.int64) * rows.shape[0] * kept_row
            at = first + (tl.arange(0, rows.shape[0])[:, None] * kept_row + columns[None, :])
            tl.store(at, narrow(p, kept_rows.dtype.element_ty), mask=(rows < M)[:, None] & (columns < kept_row)[None, :])
    return loss, dots


@triton.jit
def _softplus(
    loss_partial, dot_partial, column_partial, kept_rows, x, y, scale, bias, own, row_ids, column_ids, weight,
    M, N, D, x_row, x_column, y_row, y_column, kept_row, bias_stride, own_stride, own_offset, row_ids_stride, column_ids_stride,
    OWN: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile: the sum of softplus(S); of P = weight * sigmoid(S) the sum of P <x_i, y_j>, the column sums, itself.

    A wide tile is finished a quarter at a time: whole, the logits and what is made of them need more registers than there are.
    """
    block_row, block_column = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = block_row * BLOCK_M + tl.arange(0, BLOCK_M)
    total = products(
        x, y, rows, block_column * BLOCK_N + tl.arange(0, BLOCK_N), M, N, D, x_row, x_column, y_row, y_column,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    factor = tl.load(scale)
    loss = tl.zeros((BLOCK_M,), tl.float32)
    dots = tl.zeros((BLOCK_M,), tl.float32)
    if BLOCK_N >= 128:
        left, right = _halves(total)
        a, b = _halves(left)
        c, d = _halves(right)
        QUARTER: tl.constexpr = BLOCK_N // 4
        for i in tl.static_range(4):
            part = a if i == 0 else b if i == 1 else c if i == 2 else d
            columns = block_column * BLOCK_N + i * QUARTER + tl.arange(0, QUARTER)
            loss, dots = _columns_of_tile(
                part, loss, dots, dot_partial is not None, column_partial, kept_rows, factor, weight, bias, own, row_ids,
                column_ids, rows, columns, block_row, M, N, kept_row, bias_stride, own_stride, own_offset, row_ids_stride,
                column_ids_stride, OWN, EVEN,
            )  # fmt: skip
    else:
        loss, dots = _columns_of_tile(
            total, loss, dots, dot_partial is not None, column_partial, kept_rows, factor, weight, bias, own, row_ids, column_ids,
            rows, block_column * BLOCK_N + tl.arange(0, BLOCK_N), block_row, M, N, kept_row, bias_stride, own_stride, own_offset,
            row_ids_stride, column_ids_stride, OWN, EVEN,
        )  # fmt: skip
    tl.store(loss_partial + tl.program_id(0), tl.sum(loss, 0))
    if dot_partial is not None:
        tl.store(dot_partial + tl.program_id(0), tl.sum(dots, 0))


def _tiles(
    pairs: Pairs, begin: int, end: int, weight: float, kept: Tensor | None, need_scale: bool, need_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sums over rows [begin, end): losses by tile, P <x_i, y_j> by tile, P by block of rows and column; P into `kept`."""
    chosen = tile("pair_softplus", pairs.x)
    m, (n, d) = end - begin, pairs.y.shape
    blocks = cdiv(m, chosen["BLOCK_M"]), cdiv(n, chosen["BLOCK_N"])
    new = {"dtype": torch.float32}
    losses = pairs.x.new_empty(blocks[0] * blocks[1], **new)
    dots = torch.empty_like(losses) if need_scale else None
    columns = pairs.x.new_empty(blocks[0], n, **new) if need_bias else None
    launch(
        _softplus, (blocks[0] * blocks[1],),
        loss_partial=losses, dot_partial=dots, column_partial=columns, kept_rows=kept, weight=weight,
        kept_row=0 if kept is None else kept.stride(0), **pairs.arguments(begin, end),
        EVEN=m % chosen["BLOCK_M"] == 0 and n % chosen["BLOCK_N"] == 0, EVEN_K=d % chosen["BLOCK_K"] == 0,
        PRECISION=precision(pairs.x.dtype), **chosen,
    )  # fmt: skip
    return losses, dots, columns


def forward(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # []
    bias: Tensor | None,  # [] or [N]
    own: Tensor | None,  # [M]
    own_offset: int | None,
    row_ids: Tensor | None,  # [M]
    column_ids: Tensor | None,  # [N]
    negative_weight: float,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, n = x.shape[0], y.shape[0]
    pairs = Pairs(x, y, scale, bias, own, own_offset, row_ids, column_ids)
    power = 2.0 ** math.floor(math.log2(max(1.0, negative_weight)))
    unit = Unit(x.new_full((), power, dtype=torch.float64))

    own_of_row, own_dots = own_logits(x, y, scale, bias, own, own_offset)[0]  # [M] each
    has_own = own is not None or own_offset is not None
    loss = -F.logsigmoid(own_of_row).sum() if has_own else own_of_row.new_zeros(())  # float64
    own_slopes = torch.sigmoid(-own_of_row)  # [M] -dLoss / dS there
    dscale = -(own_slopes * own_dots).sum(0, keepdim=True)
    dbias = own_of_row.new_zeros(n if need_bias else 0)
    if need_bias and own is not None:
        # an index that is none (unchecked on a GPU) has a logit and so a slope that is NaN
        dbias.index_put_((own.clamp(0, max(0, n - 1)),), -own_slopes, accumulate=True)
    elif need_bias and has_own:
        dbias[own_offset : own_offset + m] -= own_slopes

    rows, columns = Side(x, None, own_slopes, unit), Side(y, None, own_of_row.new_zeros(n), unit)
    common = {"scale": scale, "unit": unit, "exact": None, "want_bias": False, "dtype": torch.float32}
    dx = Gradient(rows, columns, own_of_rows(own, own_offset), want_features=need_x, **common)
    dy = Gradient(columns, rows, own_of_columns(own, own_offset, n), want_features=need_y, **common)

    dtype, width = stash_dtype("triton", x.dtype), stash_width(n)
    product = (need_x or need_y) and x.shape[1] > 0
    bytes_of_a_row = max(
        width * dtype.itemsize if product else 0, 4 * n // tile("pair_softplus", x)["BLOCK_M"] if need_bias else 0
    )
    pieces = list(chunks(0, m, bytes_of_a_row, WORKSPACE_BYTES)) or [(0, 0)]
    workspace = x.new_empty(pieces[0][1], width, dtype=dtype) if product else None
    for i, (begin, end) in enumerate(pieces):
        kept = workspace[: end - begin] if product else None
        losses, dots, sums = _tiles(pairs, begin, end, negative_weight / power * WEIGHT_SCALE, kept, need_scale, need_bias)
        loss += negative_weight * losses.sum(dtype=torch.float64)
        if dots is not None:
            dscale += dots.sum(dtype=torch.float64) * (power / WEIGHT_SCALE)
        if sums is not None:
            dbias += sums.sum(0, dtype=torch.float64) * (power / WEIGHT_SCALE)
        if product:
            dx.add(kept, slice(begin, end), slice(0, n))
            dy.add(kept.T, slice(0, n), slice(begin, end), first=i == 0, last=i == len(pieces) - 1)
    return loss.float(), dx.out, dy.out, dscale[: 1 if need_scale else 0].float(), dbias.float()
