"""add_merge_norm_fwd and add_merge_norm_bwd in Triton: the operators of these names in vlpfast/ops/_schemas.py.

A program has whole rows: what the norm needs of one stays in registers. Forward a row is a place's. Backward it is a token's,
which gathers the gradients of its place; where tokens have come together each makes their place's gradient again, and the token
that the place is named after counts for the gradients of weight and bias. These are summed by a fixed number of programs, then
over the programs: no atomics, one order of every sum.

Numbers out of range, which nothing checks on a device, are not followed: what has such a place is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._triton import Tile, cdiv, launch, narrow
from vlpfast.ops.tokens import triton_merge
from vlpfast.ops.tokens.triton_merge import mixed, share_of
from vlpfast.ops.tokens.triton_rows import sum_parts
from vlpfast.ops.tokens.triton_tiles import rows_and_columns, strides, tile

MOST_CHANNELS = 8192  # 16 numbers of a row in each thread
PARTS = 512  # programs that add up the gradients of weight and bias


@triton.jit
def _merge_norm(
    y, totals, normed, stats, x, delta, size, kept, source, target, weight, bias, N, PLACES, R, C, OF_RSTD, OF_WEIGHTS, eps,
    x_image, x_token, x_channel, delta_image, delta_token, delta_channel, size_image, size_token,
    kept_image, kept_step, source_image, source_step, target_image, target_step, weight_step, bias_step,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_M places; BLOCK_N channels are all. No totals: they are made elsewhere."""
    image, m, c = rows_and_columns(PLACES, C, BLOCK_M, BLOCK_N)
    result, total = mixed(
        stats + OF_WEIGHTS, True, x, delta, size, kept, source, target, image, m, c, N, PLACES, R, C, x_image, x_token, x_channel,
        delta_image, delta_token, delta_channel, size_image, size_token, kept_image, kept_step, source_image, source_step,
        target_image, target_step, True, False, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    inside = m < PLACES
    row = image * PLACES + m
    at = row[:, None] * C + c[None, :]
    columns = (c < C)[None, :]
    rounded = narrow(result, y.dtype.element_ty)
    tl.store(y + at, rounded, mask=inside[:, None] & columns)
    value = rounded.to(tl.float32)
    width = tl.maximum(C, 1)
    mean = tl.sum(tl.where(columns, value, 0.0), 1) / width
    difference = tl.where(columns, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(difference * difference, 1) / width + eps)
    scale = tl.load(weight + c * weight_step, mask=c < C, other=0.0)
    shift = tl.load(bias + c * bias_step, mask=c < C, other=0.0)
    out = difference * rstd[:, None] * scale[None, :] + shift[None, :]
    tl.store(normed + at, narrow(out, normed.dtype.element_ty), mask=inside[:, None] & columns)
    tl.store(stats + row, mean, mask=inside)
    tl.store(stats + OF_RSTD + row, rstd, mask=inside)
    if totals is not None:
        tl.store(totals + row, total, mask=inside)


@triton.jit
def _norm_gradient(
    dx, ddelta, partial, grad_y, grad_normed, y, stats, size, index, kept, weight, TOKENS, PER_PART, N, PLACES, C,
    OF_RSTD, OF_WEIGHTS, grad_image, grad_place, grad_channel, normed_image, normed_place, normed_channel,
    y_image, y_place, y_channel, size_image, size_token, index_image, index_token, kept_image, kept_step, weight_step,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """PER_PART of all images' tokens, BLOCK_M at a time; partial [parts, 2, C]: what their places add to weight's and bias's."""
    part = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_N)
    channel = c.to(tl.int64)[None, :]
    columns = (c < C)[None, :]
    scale = tl.load(weight + c * weight_step, mask=c < C, other=0.0)[None, :]
    width = tl.maximum(C, 1)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, PER_PART, BLOCK_M):
        within = start + tl.arange(0, BLOCK_M)
        token = part * PER_PART + within
        inside = (within < PER_PART) & (token < TOKENS)
        image, n = token // N, token % N
        place = tl.load(index + image * index_image + n * index_token, mask=inside, other=-1)
        there = inside & (place >= 0) & (place < PLACES)
        mask = there[:, None] & columns
        at = grad_normed + (image * normed_image + place * normed_place)[:, None] + channel * normed_channel
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at = y + (image * y_image + place * y_place)[:, None] + channel * y_channel
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        row = image * PLACES + place
        mean = tl.load(stats + row, mask=there, other=0.0)[:, None]
        rstd = tl.load(stats + OF_RSTD + row, mask=there, other=0.0)[:, None]
        unit = tl.where(mask, (value - mean) * rstd, 0.0)
        if partial is not None:
            own = tl.load(kept + image * kept_image + place * kept_step, mask=there, other=-1)
            counts = (there & (own == n))[:, None]
            dweight += tl.where(counts, g * unit, 0.0)
            dbias += tl.where(counts, g, 0.0)
        if dx is not None:
            at = grad_y + (image * grad_image + place * grad_place)[:, None] + channel * grad_channel
            of_y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            product = g * scale
            sums = (tl.sum(product, 1) / width)[:, None]
            slope = (tl.sum(product * unit, 1) / width)[:, None]
            total = tl.load(stats + OF_WEIGHTS + row, mask=there, other=0.0)
            weighs = there.to(tl.float32)
            if size is not None:
                weighs = tl.load(size + image * size_image + n * size_token, mask=there, other=0.0)
            share = share_of(weighs, total)[:, None]
            result = tl.where(share == 0, 0.0, (of_y + rstd * (product - sums - unit * slope)) * share)
            result = tl.where(there[:, None], result, float("nan"))
            at = token[:, None] * C + channel
            tl.store(dx + at, narrow(result, dx.dtype.element_ty), mask=inside[:, None] & columns)
            if ddelta is not None:
                tl.store(ddelta + at, narrow(result, ddelta.dtype.element_ty), mask=inside[:, None] & columns)
    if partial is not None:
        partial += part * 2 * C
        tl.store(partial + c, tl.sum(dweight, 0), mask=c < C)
        tl.store(partial + C + c, tl.sum(dbias, 0), mask=c < C)


# --- launching --------------------------------------------------------------------------------------------------------


def _whole_rows(kernel: str, x: Tensor, width: int) -> Tile:
    """The tile of `kernel` with rows of all channels, more warps for wide ones."""
    if width > MOST_CHANNELS:
        raise ValueError(f"x: expected at most {MOST_CHANNELS} channels, got {width} (merge and layer_norm take more)")
    chosen = tile(kernel, x)
    columns = max(16, triton.next_power_of_2(width))
    chosen["BLOCK_M"] = max(1, min(64, chosen.pop("BLOCK") // columns))
    chosen["num_warps"] = max(chosen["num_warps"], min(16, columns // 256))
    return chosen | {"BLOCK_N": columns}


def forward(
    x: Tensor,  # [B, N, C]
    delta: Tensor,  # [B, N, C]
    size: Tensor | None,  # [B, N] float32
    kept: Tensor,
    source: Tensor,
    target: Tensor,
    weight: Tensor,  # [C] float32
    bias: Tensor,
    eps: float,
    weighted: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, n, c), (_, places), sums = x.shape, kept.shape, {"dtype": torch.float32}
    chosen = _whole_rows("merge_norm", x, c)
    y = x.new_empty(batch, places, c)
    normed = x.new_empty(y.shape, dtype=torch.float32 if wide else x.dtype)
    stats = x.new_empty(3, batch, places, **sums)
    counted = size is not None and not weighted  # sizes that do not weigh are summed on their own
    if counted:
        total = triton_merge.forward(size[..., None], None, kept, source, target, False, False)[0].squeeze(-1)
        size = None
    else:
        total = x.new_empty(batch, places, **sums)
    launch(
        _merge_norm, (batch * cdiv(places, chosen["BLOCK_M"]),),
        y=y, totals=None if counted else total, normed=normed, stats=stats, x=x, delta=delta, size=size, kept=kept,
        source=source, target=target, weight=weight, bias=bias, N=n, PLACES=places, R=source.shape[1], C=c,
        OF_RSTD=batch * places, OF_WEIGHTS=2 * batch * places, eps=eps, **strides("x_image x_token x_channel", x),
        **strides("delta_image delta_token delta_channel", delta),
        **strides("size_image size_token", size), **strides("kept_image kept_step", kept),
        **strides("source_image source_step", source), **strides("target_image target_step", target),
        **strides("weight_step", weight), **strides("bias_step", bias), **chosen,
    )  # fmt: skip
    return y, total, normed, stats


def backward(
    grad_y: Tensor,  # [B, N - r, C]
    grad_normed: Tensor,
    y: Tensor,
    stats: Tensor,  # [3, B, N - r]
    size: Tensor | None,
    index: Tensor,  # [B, N]
    kept: Tensor,
    weight: Tensor,
    delta_dtype: torch.dtype | None,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, places, c), n = y.shape, index.shape[1]
    chosen = _whole_rows("norm_gradient", y, c)
    dx = y.new_empty(batch if need_x else 0, n, c)
    ddelta = y.new_empty(batch if need_x and delta_dtype else 0, n, c, dtype=delta_dtype or y.dtype)
    if batch * n == 0:
        return dx, ddelta, *(weight.new_zeros(c if need_weight else 0) for _ in range(2))
    blocks = cdiv(batch * n, chosen["BLOCK_M"])
    per_part = cdiv(blocks, PARTS) * chosen["BLOCK_M"]
    parts = cdiv(batch * n, per_part)
    partial = weight.new_empty(parts, 2 * c) if need_weight else None
    launch(
        _norm_gradient, (parts,), dx=dx if need_x else None, ddelta=ddelta if need_x and delta_dtype else None, partial=partial,
        grad_y=grad_y, grad_normed=grad_normed, y=y, stats=stats, size=size, index=index, kept=kept, weight=weight,
        TOKENS=batch * n, PER_PART=per_part, N=n, PLACES=places, C=c,
        OF_RSTD=batch * places, OF_WEIGHTS=2 * batch * places,
        **strides("grad_image grad_place grad_channel", grad_y),
        **strides("normed_image normed_place normed_channel", grad_normed),
        **strides("y_image y_place y_channel", y), **strides("size_image size_token", size),
        **strides("index_image index_token", index), **strides("kept_image kept_step", kept), **strides("weight_step", weight),
        **chosen,
    )  # fmt: skip
    if partial is None:
        return dx, ddelta, weight.new_empty(0), weight.new_empty(0)
    dweight, dbias = sum_parts(partial).reshape(2, c).unbind(0)
    return dx, ddelta, dweight, dbias.clone()
