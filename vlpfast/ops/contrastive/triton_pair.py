"""pair_logsumexp in Triton: pair_fwd_triton and pair_bwd_triton of vlpfast/ops/_schemas.py, after csrc/contrastive/pair.cpp.

What differs from the C++ kernels:
- sums by tile are written and added afterwards in a fixed order: no atomics, the same bits every time;
- the exponentials that are kept are whole rows, in bfloat16 for bfloat16 features, else in float32;
- the scale's gradient takes no product: the forward sums E <x_i, y_j> too, in float32, where P in half precision would show;
- whether sums underflowed is known on the device alone: the exact form is always launched, and leaves at once if not needed;
- for rows alone (vocabularies, queues) the shift is the largest logit of a row in each ROW_BLOCK columns, of which the row's is
  made afterwards: nothing underflows and there is no exact form. Chunks that are made again are so in the same way, bit for bit;
- float32: products are sums of three tf32 products, and no term is made again in double.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops._schemas import ROW_BLOCK, stash_dtype, stash_shape, stash_width
from vlpfast.ops._triton import cdiv
from vlpfast.ops.contrastive.triton_gradient import Gradient, Side, Unit, own_of_columns, own_of_rows
from vlpfast.ops.contrastive.triton_sums import Pairs, chunks
from vlpfast.ops.contrastive.triton_tiles import own_logits, tile

SMALLEST_SUM = 1e-25  # sums below it have lost too much to flushed terms, as in csrc/contrastive/problem.h
MOST_COLUMNS = 1 << 24  # a tile of 128 rows of exponentials is addressed by 32-bit offsets from its first
PARTIAL_BYTES = 64 << 20  # of sums by tile: the forward takes rows in chunks that need no more
WORKSPACE_BYTES = 256 << 20  # of exponentials that the backward makes again, chunk by chunk, at least 128 rows at a time


def forward(
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # []
    bias: Tensor | None,  # [] or [N]
    own: Tensor | None,  # [M]
    own_offset: int | None,
    row_ids: Tensor | None,  # [M]
    column_ids: Tensor | None,  # [N]
    want_rows: bool,
    want_columns: bool,
    want_scale: bool,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, n = x.shape[0], y.shape[0]
    if n >= MOST_COLUMNS:
        raise ValueError(f"y: expected less than {MOST_COLUMNS} rows for a Triton kernel, got {n}")
    rows_alone, kept = want_rows and not want_columns, stash_dtype("triton", x.dtype)
    stash = x.new_empty(stash_shape(m, n, keep, kept, rows_alone), dtype=kept)
    pairs = Pairs(x, y, scale, bias, own, own_offset, row_ids, column_ids)
    rounded = x.dtype == torch.bfloat16
    row_sums, column_sums = (x.new_zeros(3, size, dtype=torch.float64) for size in (m, n))
    if rows_alone:
        row_shifts, column_shifts = _sum_rows(pairs, row_sums, want_scale, stash), x.new_zeros(n, dtype=torch.float32)
        exact = x.new_ones((), dtype=torch.bool)
    else:
        row_shifts, column_shifts, exact = _sum_both(pairs, row_sums, column_sums, want_rows, want_columns, want_scale, stash)
    sides = ((want_rows, row_sums, row_shifts, 1), (want_columns, column_sums, column_shifts, 0))
    own_values = own_logits(x, y, scale, bias, own, own_offset)
    results, stats = [], []
    for (wanted, sums, shifts, along), (logits, dots) in zip(sides, own_values, strict=True):
        results.append((sums[0].log() + shifts - logits).float() if wanted else x.new_empty(0, dtype=torch.float32))
        by_scale = torch.where(sums[0] == 0, 0, sums[1] / sums[0]) - dots
        weighed_by = sums[2 if rounded and along else 0]  # so that weights of rounded exponentials sum to one
        stats.append(torch.stack([weighed_by.float(), shifts, by_scale.float()]))
    return *results, *stats, exact, stash


def _wanted_sums(x: Tensor, want_scale: bool) -> list[int]:
    """Which of a row's sums are made: of E, of E <x_i, y_j>, of E as it is kept."""
    return [0, *([1] if want_scale else []), *([2] if x.dtype == torch.bfloat16 else [])]


def _sum_rows(pairs: Pairs, sums: Tensor, want_scale: bool, stash: Tensor) -> Tensor:
    """Fills sums [3, M] and the stash; the rows' shifts [M]. Blocks of columns are added in a fixed order."""
    m, n = pairs.x.shape[0], pairs.y.shape[0]
    shifts, kept = sums.new_zeros(m, dtype=torch.float32), stash[:, : stash_width(n)]
    for begin, end in chunks(0, m if n else 0, 16 * n // ROW_BLOCK, PARTIAL_BYTES):
        partial, _, by_block = pairs.centred(None, begin, end, kept[begin:end], sum_rows=True, products=want_scale)
        largest = by_block.amax(0)
        shifts[begin:end] = torch.where(largest == -torch.inf, 0, largest)
        down = (by_block - shifts[begin:end]).exp()
        for i in _wanted_sums(pairs.x, want_scale):
            sums[i, begin:end] = (partial[i] * down).sum(0, dtype=torch.float64)
        beside = kept_shifts(stash[begin:end], n)
        beside.copy_(by_block[: beside.shape[1], : beside.shape[0]].T)
    return shifts


def kept_shifts(stash: Tensor, n: int) -> Tensor:
    """[rows, blocks] float32: those behind the exponentials of N columns, for rows alone."""
    return stash[:, stash_width(n) :].view(torch.float32)[:, : cdiv(n, ROW_BLOCK)]


def _sum_both(
    pairs: Pairs, row_sums: Tensor, column_sums: Tensor, want_rows: bool, want_columns: bool, want_scale: bool, stash: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills sums [3, M] and [3, N] and the stash; shifts [M] and [N], and whether they differ."""
    x = pairs.x
    m, n = len(row_sums[0]), len(column_sums[0])
    shift = pairs.centre()
    chosen = tile("pair_centred", x)
    bytes_of_a_row = 8 * n // chosen["BLOCK_M"] + 8 * n // min(128, chosen["BLOCK_N"])
    for begin, end in chunks(0, m, bytes_of_a_row, PARTIAL_BYTES):
        row_partial, column_partial, _ = pairs.centred(shift, begin, end, stash[begin:end], want_rows, want_columns, want_scale)
        for i in _wanted_sums(x, want_scale):
            if want_rows:
                row_sums[i, begin:end] = row_partial[i].sum(0, dtype=torch.float64)
            if want_columns and i < 2:
                column_sums[i] += column_partial[i].sum(0, dtype=torch.float64)
    row_shifts, column_shifts = shift.repeat(m), shift.repeat(n)
    sides = ((want_rows, row_sums, row_shifts, 1), (want_columns, column_sums, column_shifts, 0))
    exact = torch.stack([(sums[0] < SMALLEST_SUM).any() & wanted for wanted, sums, _, _ in sides]).any()  # NaN: no
    for wanted, sums, shifts, along in sides:
        if wanted:
            pairs.exact_sums(sums, shifts, exact, along)
    return row_shifts, column_shifts, exact


# --- backward ---------------------------------------------------------------------------------------------------------


def backward(
    grad_rows: Tensor,  # [M], empty unless want_rows
    grad_columns: Tensor,  # [N]
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    own: Tensor | None,
    own_offset: int | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    want_rows: bool,
    want_columns: bool,
    row_stats: Tensor,  # [3, M]
    column_stats: Tensor,  # [3, N]
    exact: Tensor,  # []
    stash: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = x.shape[0], y.shape[0]
    pairs = Pairs(x, y, scale, bias, own, own_offset, row_ids, column_ids)
    unit = Unit.of(grad_rows, grad_columns)
    rows = Side(x, row_stats, grad_rows if want_rows else grad_rows.new_zeros(m), unit)
    columns = Side(y, column_stats, grad_columns if want_columns else grad_columns.new_zeros(n), unit)
    rows_alone = want_rows and not want_columns
    gate = None if rows_alone else exact
    dx = Gradient(rows, columns, own_of_rows(own, own_offset), scale, unit, gate, need_x, False)
    dy = Gradient(columns, rows, own_of_columns(own, own_offset, n), scale, unit, gate, need_y, need_bias)

    kept_rows, width = stash.shape[0], stash_width(n)
    pieces = [(0, kept_rows)] if kept_rows or m == 0 else []
    if need_x or need_y or need_bias:
        pieces += chunks(kept_rows, m, width * stash.element_size(), WORKSPACE_BYTES)
    workspace = None
    for i, (begin, end) in enumerate(pieces):
        kept, by_block = stash[:, :width], kept_shifts(stash, n).T if rows_alone else None
        if end > kept_rows:
            workspace = stash.new_empty(end - begin, width) if workspace is None else workspace[: end - begin]
            kept = workspace
            *_, by_block = pairs.centred(None if rows_alone else row_stats[1], begin, end, kept, exact=gate)
        weights = None
        if by_block is not None:
            weights = (rows.weights[begin:end] * (by_block - row_stats[1, begin:end]).exp()).contiguous()
        dx.add(kept, slice(begin, end), slice(0, n), row_weights=weights)
        dy.add(kept.T, slice(0, n), slice(begin, end), first=i == 0, last=i == len(pieces) - 1, row_weights=weights, along=0)
    if not rows_alone:
        dx.add_exact(pairs, 1)
        dy.add_exact(pairs, 0)
    dscale = x.new_empty(0, dtype=torch.float32)
    if need_scale:
        sides = ((want_rows, grad_rows, row_stats), (want_columns, grad_columns, column_stats))
        dscale = sum((g.double() * stats[2]).sum(0, keepdim=True).float() for wanted, g, stats in sides if wanted)
    return dx.out, dy.out, dscale, dy.bias_gradient()
