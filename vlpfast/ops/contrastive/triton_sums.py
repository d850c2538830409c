"""The sums of pair_logsumexp in Triton: exponentials tile by tile, and the exact form with running maxima.

Tiles have the same shift (centred), or, for rows alone, each row of a tile its largest logit there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._triton import INTERPRETED, cdiv, grouped, launch, narrow
from vlpfast.ops.contrastive.triton_tiles import kept_pairs, own_kind, precision, products, stride, tile

MAX_EXPONENT = 87.0  # centred exponentials stay below exp of it, as in csrc/contrastive/problem.h

LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def sums(a, b, c, AXIS: tl.constexpr, TWO: tl.constexpr, THREE: tl.constexpr):
    """Sums of a, b and c, of the second and third only if TWO and THREE. Made together they need fewer registers."""
    if INTERPRETED or not (TWO or THREE):
        return tl.sum(a, AXIS), tl.sum(b, AXIS), tl.sum(c, AXIS)
    elif THREE:
        return tl.reduce((a, b, c), AXIS, _add_three)
    else:
        a_sum, b_sum = tl.reduce((a, b), AXIS, _add_two)
        return a_sum, b_sum, b_sum


@triton.jit
def _sum_tile(
    total, row_partial, column_partial, row_shifts, kept_rows, factor, shift, bias, own, row_ids, column_ids, rows, columns, part,
    block_row, parts, blocks_down, M, N, KEPT, KEPT_COLUMNS, kept_row, bias_stride, own_stride, own_offset, row_ids_stride,
    column_ids_stride,
    OWN: tl.constexpr, PRODUCTS: tl.constexpr, ROUNDED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """E = exp(factor * total + bias - shift), its sums by row and by column; `part`: which of the `parts` of all columns this is.

    With `row_shifts` the shift of a row is its largest logit here, -inf where nothing is kept, and is written there.
    """
    kept = kept_pairs(
        rows, columns, M, N, own, own_stride, own_offset, row_ids, row_ids_stride, column_ids, column_ids_stride, OWN, EVEN
    )
    if row_shifts is not None:
        s = total * factor
        if bias is not None:
            s += tl.load(bias + columns.to(tl.int64) * bias_stride, mask=columns < N, other=0.0)[None, :]
        s = tl.where(kept, s, float("-inf"))
        largest = tl.max(s, 1)
        tl.store(row_shifts + part.to(tl.int64) * M + rows, largest, mask=rows < M)
        e = tl.exp2((s - tl.where(largest == float("-inf"), 0.0, largest)[:, None]) * LOG2E)  # -inf - (-inf) is no number
    else:
        offset = -shift
        if bias is not None:
            offset += tl.load(bias + columns.to(tl.int64) * bias_stride, mask=columns < N, other=0.0)[None, :]
        e = tl.where(kept, tl.exp2(total * (factor * LOG2E) + offset * LOG2E), 0.0)
    product = e * total
    if row_partial is not None:
        sum_e, sum_product, sum_rounded = sums(e, product, narrow(e, tl.bfloat16).to(tl.float32), 1, PRODUCTS, ROUNDED)
        at = row_partial + part.to(tl.int64) * M + rows
        tl.store(at, sum_e, mask=rows < M)
        if PRODUCTS:
            tl.store(at + parts.to(tl.int64) * M, sum_product, mask=rows < M)
        if ROUNDED:
            tl.store(at + 2 * parts.to(tl.int64) * M, sum_rounded, mask=rows < M)
    if column_partial is not None:
        column_sum, column_product, _ = sums(e, product, product, 0, PRODUCTS, False)
        at = column_partial + block_row.to(tl.int64) * N + columns
        tl.store(at, column_sum, mask=columns < N)
        if PRODUCTS:
            tl.store(at + blocks_down.to(tl.int64) * N, column_product, mask=columns < N)
    if kept_rows is not None:
        first = kept_rows + block_row.to(tl.int64) * rows.shape[0] * kept_row
        at = first + (tl.arange(0, rows.shape[0])[:, None] * kept_row + columns[None, :])
        tl.store(at, narrow(e, kept_rows.dtype.element_ty), mask=(rows < KEPT)[:, None] & (columns < KEPT_COLUMNS)[None, :])


@triton.jit
def _centred(
    row_partial, column_partial, row_shifts, kept_rows, exact, x, y, scale, bias, shift, own, row_ids, column_ids,
    M, N, D, KEPT, KEPT_COLUMNS, x_row, x_column, y_row, y_column, kept_row, bias_stride, own_stride, own_offset, row_ids_stride,
    column_ids_stride,
    OWN: tl.constexpr, PRODUCTS: tl.constexpr, ROUNDED: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of E = exp(S - shift): sums of rows and of columns, itself into the first KEPT rows of `kept_rows`.

    With `row_shifts` [parts, M], and no `shift`, each row of a part of the columns has its own.
    PRODUCTS: the sums of E <x_i, y_j> as well; ROUNDED: those of E in bfloat16, by row. A wide tile is finished in two halves:
    whole, E and the products that it is made of need more registers than there are.
    """
    if exact is not None:
        if tl.load(exact) != 0:
            return
    blocks_down = tl.cdiv(M, BLOCK_M)
    blocks_across = tl.cdiv(N, BLOCK_N)
    block_row, block_column = grouped(tl.program_id(0), blocks_down, blocks_across, GROUP)
    rows = block_row * BLOCK_M + tl.arange(0, BLOCK_M)
    total = products(
        x, y, rows, block_column * BLOCK_N + tl.arange(0, BLOCK_N), M, N, D, x_row, x_column, y_row, y_column,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    factor = tl.load(scale)
    c = shift
    if shift is not None:
        c = tl.load(shift)
    if BLOCK_N >= 256:
        left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        columns = block_column * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _sum_tile(
            left, row_partial, column_partial, row_shifts, kept_rows, factor, c, bias, own, row_ids, column_ids, rows, columns,
            2 * block_column, block_row, 2 * blocks_across, blocks_down, M, N, KEPT, KEPT_COLUMNS, kept_row, bias_stride,
            own_stride, own_offset, row_ids_stride, column_ids_stride, OWN, PRODUCTS, ROUNDED, EVEN,
        )  # fmt: skip
        columns += BLOCK_N // 2
        _sum_tile(
            right, row_partial, column_partial, row_shifts, kept_rows, factor, c, bias, own, row_ids, column_ids, rows, columns,
            2 * block_column + 1, block_row, 2 * blocks_across, blocks_down, M, N, KEPT, KEPT_COLUMNS, kept_row, bias_stride,
            own_stride, own_offset, row_ids_stride, column_ids_stride, OWN, PRODUCTS, ROUNDED, EVEN,
        )  # fmt: skip
    else:
        columns = block_column * BLOCK_N + tl.arange(0, BLOCK_N)
        _sum_tile(
            total, row_partial, column_partial, row_shifts, kept_rows, factor, c, bias, own, row_ids, column_ids, rows, columns,
            block_column, block_row, blocks_across, blocks_down, M, N, KEPT, KEPT_COLUMNS, kept_row, bias_stride, own_stride,
            own_offset, row_ids_stride, column_ids_stride, OWN, PRODUCTS, ROUNDED, EVEN,
        )  # fmt: skip


@triton.jit
def _exact_sums(
    sums, shifts, exact, x, y, scale, bias, own, row_ids, column_ids,
    M, N, D, x_row, x_column, y_row, y_column, bias_stride, own_stride, own_offset, row_ids_stride, column_ids_stride,
    OWN: tl.constexpr, ALONG: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of E = exp(S - shift) along axis ALONG, the shift being the largest logit there; only where `exact` is set.

    The sums of E <x_i, y_j> follow behind them, and the first ones once more where rows have sums of rounded E.
    """
    if tl.load(exact) == 0:
        return
    LINES: tl.constexpr = BLOCK_M if ALONG == 1 else BLOCK_N
    largest = tl.full((LINES,), float("-inf"), tl.float32)
    total = tl.zeros((LINES,), tl.float64)
    product_total = tl.zeros((LINES,), tl.float64)
    factor = tl.load(scale)
    for start in range(0, N if ALONG == 1 else M, BLOCK_N if ALONG == 1 else BLOCK_M):
        if ALONG == 1:
            rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
        else:
            rows, columns = start + tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        product = products(
            x, y, rows, columns, M, N, D, x_row, x_column, y_row, y_column, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
        )
        s = factor * product
        if bias is not None:
            s += tl.load(bias + columns.to(tl.int64) * bias_stride, mask=columns < N, other=0.0)[None, :]
        kept = kept_pairs(
            rows, columns, M, N, own, own_stride, own_offset, row_ids, row_ids_stride, column_ids, column_ids_stride, OWN, False
        )
        s = tl.where(kept, s, float("-inf"))
        raised = tl.maximum(largest, tl.max(s, ALONG))
        usable = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - (-inf) is no number
        e = tl.exp2((s - tl.expand_dims(usable, ALONG)) * LOG2E)
        down = tl.exp2((largest - usable) * LOG2E).to(tl.float64)
        total = total * down + tl.sum(e, ALONG).to(tl.float64)
        product_total = product_total * down + tl.sum(e * product, ALONG).to(tl.float64)
        largest = raised
    lines = tl.program_id(0) * LINES + tl.arange(0, LINES)
    size = M if ALONG == 1 else N
    inside = lines < size
    tl.store(sums + lines, total, mask=inside)
    tl.store(sums + size + lines, product_total, mask=inside)
    tl.store(sums + 2 * size + lines, total, mask=inside)
    tl.store(shifts + lines, tl.where(largest == float("-inf"), 0.0, largest), mask=inside)


@dataclass(frozen=True)
class Pairs:
    """The matrix of logits that the kernels are about; the arguments of pair_fwd_triton."""

    x: Tensor  # [M, D]
    y: Tensor  # [N, D]
    scale: Tensor  # []
    bias: Tensor | None  # [] or [N]
    own: Tensor | None  # [M]
    own_offset: int | None
    row_ids: Tensor | None  # [M]
    column_ids: Tensor | None  # [N]

    def centre(self) -> Tensor:
        """[1]: c = max(0, B - MAX_EXPONENT + ln max(M, N) + 1) where B bounds the logits: no exponential and no sum overflows."""
        m, n = self.x.shape[0], self.y.shape[0]
        if m == 0 or n == 0:
            return self.x.new_zeros(1, dtype=torch.float32)
        norms = [torch.linalg.vector_norm(t, dim=1, dtype=torch.float32).amax(0, keepdim=True) for t in (self.x, self.y)]
        bound = self.scale.abs() * norms[0] * norms[1]
        if self.bias is not None:
            bound = bound + self.bias.amax()
        return (bound - MAX_EXPONENT + math.log(max(m, n)) + 1).clamp(min=0)  # keeps NaN

    def centred(
        self, shift: Tensor | None, begin: int, end: int, kept: Tensor, sum_rows: bool = False, sum_columns: bool = False,
        products: bool = False, exact: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Sums of exp(S - shift) over rows [begin, end), by tile: [3, blocks, end - begin], [3, blocks, N].

        With `products` those of exp(S - shift) <x_i, y_j> follow them: [2, ...].
        The first len(kept) rows of the exponentials themselves are written into `kept`; nothing is done where `exact` is set.
        Without `shift` each row has in each ROW_BLOCK columns its largest logit for one; they come third, [blocks, end - begin].
        """
        chosen = tile("pair_rows" if shift is None else "pair_centred" if kept.shape[0] else "pair_centred_sums", self.x)
        m, (n, d) = end - begin, self.y.shape
        blocks = cdiv(m, chosen["BLOCK_M"]), cdiv(n, chosen["BLOCK_N"])
        parts = blocks[1] * (2 if chosen["BLOCK_N"] >= 256 else 1)
        new = {"dtype": torch.float32}
        row_partial = self.x.new_empty(3, parts, m, **new) if sum_rows else None
        column_partial = self.x.new_empty(3, blocks[0], n, **new) if sum_columns else None
        row_shifts = self.x.new_empty(parts, m, **new) if shift is None else None
        launch(
            _centred, (blocks[0] * blocks[1],),
            row_partial=row_partial, column_partial=column_partial, row_shifts=row_shifts,
            kept_rows=kept if kept.shape[0] else None, exact=exact, shift=shift,
            KEPT=kept.shape[0], KEPT_COLUMNS=kept.shape[1], kept_row=kept.stride(0), **self.arguments(begin, end),
            PRODUCTS=products, ROUNDED=self.x.dtype == torch.bfloat16,
            EVEN=m % chosen["BLOCK_M"] == 0 and n % chosen["BLOCK_N"] == 0,
            EVEN_K=d % chosen["BLOCK_K"] == 0, PRECISION=precision(self.x.dtype), **chosen,
        )  # fmt: skip
        return row_partial, column_partial, row_shifts

    def exact_sums(self, sums: Tensor, shifts: Tensor, exact: Tensor, along: int) -> None:
        """Where `exact` is set: `sums` ([3, lines] float64) along axis 1 or 0, each line with its own of `shifts`."""
        chosen = tile("pair_exact", self.x)
        m, d = self.x.shape
        grid = (cdiv(m, chosen["BLOCK_M"]) if along else cdiv(self.y.shape[0], chosen["BLOCK_N"]),)
        launch(
            _exact_sums, grid, sums=sums, shifts=shifts, exact=exact, **self.arguments(0, m), ALONG=along,
            EVEN_K=d % chosen["BLOCK_K"] == 0, PRECISION=precision(self.x.dtype), **chosen,
        )  # fmt: skip

    def arguments(self, begin: int, end: int) -> dict[str, object]:
        x, own, row_ids = (None if t is None else t[begin:end] for t in (self.x, self.own, self.row_ids))
        y = self.y
        return {
            "x": x, "y": y, "scale": self.scale, "bias": self.bias, "own": own, "row_ids": row_ids, "column_ids": self.column_ids,
            "M": end - begin, "N": y.shape[0], "D": y.shape[1],
            "x_row": x.stride(0), "x_column": x.stride(1), "y_row": y.stride(0), "y_column": y.stride(1),
            "bias_stride": stride(self.bias), "own_stride": stride(own), "own_offset": (self.own_offset or 0) + begin,
            "row_ids_stride": stride(row_ids), "column_ids_stride": stride(self.column_ids),
            "OWN": own_kind(own, self.own_offset),
        }  # fmt: skip


def chunks(begin: int, end: int, bytes_of_a_row: int, most: int) -> Iterator[tuple[int, int]]:
    """[begin, end) in parts of at most `most` bytes, each a multiple of 128 rows long but the last."""
    size = max(128, most // max(1, bytes_of_a_row) // 128 * 128)
    for at in range(begin, end, size):
        yield at, min(end, at + size)
