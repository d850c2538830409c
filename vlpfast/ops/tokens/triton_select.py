"""select and random_keep in Triton: the operators of these names in vlpfast/ops/_schemas.py; reference_selection.py defines them.

A program an image counts, for each of its tokens, how many come before it: that is its place among those that are kept, and every
token knows its own. What tokens are ordered by are integers, the smallest first, on ties the lower token. No atomics, no sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._triton import cdiv, launch, narrow
from vlpfast.ops.contrastive.triton_sample import random_bits
from vlpfast.ops.tokens.reference_selection import MASK_STREAM
from vlpfast.ops.tokens.triton_rows import take
from vlpfast.ops.tokens.triton_tiles import row_tile, rows_and_columns, strides, tile

# In the order of tokens after all numbers: a score that is NaN, padding, what takes no part
NAN, PADDING, NOTHING = tl.constexpr(2**63 - 3), tl.constexpr(2**63 - 2), tl.constexpr(2**63 - 1)
STREAM = tl.constexpr(MASK_STREAM)
# Places of tokens that are not kept: in the fused one, and not (padding, or nothing weighs anything)
FUSED, LEFT_OUT = tl.constexpr(-1), tl.constexpr(-2)


@triton.jit
def _descending(score):
    """int64 that fall where scores rise."""
    if score.dtype == tl.float64:
        bits = score.to(tl.int64, bitcast=True)
        size = bits & 0x7FFFFFFFFFFFFFFF
    else:
        score = score.to(tl.float32)
        bits = score.to(tl.int32, bitcast=True).to(tl.int64)
        size = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, size, -size)  # one zero
    return tl.where(score != score, tl.zeros_like(key) + NAN, key)


@triton.jit
def _keys(first, values, mask, seed, image, N, PROTECT, value_step, mask_step, BLOCK: tl.constexpr):
    """[BLOCK] int64 of the tokens from `first` on, a multiple of 4: their scores, or without `values` their random bits."""
    n = first + tl.arange(0, BLOCK)
    there = (n >= PROTECT) & (n < N)
    if values is not None:
        key = _descending(tl.load(values + n.to(tl.int64) * value_step, mask=there, other=0.0))
        if mask is not None:
            real = tl.load(mask + n.to(tl.int64) * mask_step, mask=there, other=0) != 0
            key = tl.where(real, key, tl.zeros_like(key) + PADDING)
    else:
        row = tl.zeros((1,), tl.int32) + image
        key = tl.reshape(random_bits(row, first, STREAM, seed, BLOCK), (BLOCK,)).to(tl.int64)
    return tl.where(there, key, tl.zeros_like(key) + NOTHING)


@triton.jit
def _choose(
    indices, inverse, values, mask, seeds, N, PROTECT, KEEP, value_image, value_step, mask_image, mask_step, seed_step,
    OWN_SEEDS: tl.constexpr, IN_ORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """indices [B, PROTECT + KEEP] of what is kept, IN_ORDER of the keys or of tokens, and its inverse [B, N], -1 for none."""
    number = tl.program_id(0)
    image = number.to(tl.int64)
    seed = 0
    if seeds is not None:
        seed = tl.load(seeds + image * seed_step)
        if OWN_SEEDS:
            number = 0
    if values is not None:
        values += image * value_image
    if mask is not None:
        mask += image * mask_image
    indices += image * (PROTECT + KEEP)
    inverse += image * N
    kept = PROTECT  # before the block
    for start in range(0, N, BLOCK_M):
        n = start + tl.arange(0, BLOCK_M)
        key = _keys(start, values, mask, seed, number, N, PROTECT, value_step, mask_step, BLOCK_M)
        rank = tl.zeros((BLOCK_M,), tl.int32)
        for first in range(0, N, BLOCK_N):
            j = first + tl.arange(0, BLOCK_N)
            other = _keys(first, values, mask, seed, number, N, PROTECT, value_step, mask_step, BLOCK_N)
            before = (other[None, :] < key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < n[:, None]))
            rank += tl.sum(before.to(tl.int32), 1)
        chosen = (n >= PROTECT) & (n < N) & (rank < KEEP)
        if IN_ORDER:
            place = PROTECT + rank
        else:
            place = kept + tl.cumsum(chosen.to(tl.int32), 0) - 1
        kept += tl.sum(chosen.to(tl.int32), 0)
        protected = (n < PROTECT) & (n < N)
        place = tl.where(protected, n, place)
        chosen = chosen | protected
        tl.store(indices + place, n.to(tl.int64), mask=chosen)
        tl.store(inverse + n, tl.where(chosen, place, -1).to(inverse.dtype.element_ty), mask=n < N)


@triton.jit
def _fuse(
    out, x, values, mask, inverse, N, C, out_image, x_image, x_token, x_channel, value_image, value_step, mask_image, mask_step,
    NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N channels of the sum of score * token over the tokens of an image that are neither kept nor padding."""
    columns = tl.cdiv(C, BLOCK_N)
    image = (tl.program_id(0) // columns).to(tl.int64)
    c = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    weights = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_M):
        n = start + tl.arange(0, BLOCK_M)
        token = n.to(tl.int64)
        rest = tl.load(inverse + image * N + n, mask=n < N, other=0) < 0
        if mask is not None:
            rest = rest & (tl.load(mask + image * mask_image + token * mask_step, mask=rest, other=0) != 0)
        weight = tl.load(values + image * value_image + token * value_step, mask=rest, other=0.0).to(tl.float32)
        at = x + image * x_image + token[:, None] * x_token + c.to(tl.int64)[None, :] * x_channel
        total += weight[:, None] * tl.load(at, mask=rest[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        weights += weight
    fused = tl.sum(total, 0)
    if NORMALIZE:
        of_all = tl.sum(weights, 0)
        fused = tl.where(of_all == 0, 0.0, fused / tl.where(of_all == 0, 1.0, of_all))
    tl.store(out + image * out_image + c, narrow(fused, out.dtype.element_ty), mask=c < C)


# --- gradients --------------------------------------------------------------------------------------------------------


@triton.jit
def _place(indices, n, K, step, BLOCK_N: tl.constexpr):
    """[M]: where tokens n [M] are among indices [K], FUSED for nowhere."""
    place = tl.zeros_like(n) + FUSED
    for start in range(0, K, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        index = tl.load(indices + k.to(tl.int64) * step, mask=k < K, other=-1)
        place = tl.maximum(place, tl.max(tl.where(index[None, :] == n[:, None], k[None, :], -1), 1))
    return place


@triton.jit
def _places(
    places, shares, inverses, indices, values, mask, N, K, indices_image, indices_row, value_image, value_step,
    mask_image, mask_step, FUSE: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of one image: what became of each token, its share of the fused one, 1 / total of the scores in that."""
    image = tl.program_id(0).to(tl.int64)
    indices += image * indices_image
    values += image * value_image
    total = tl.full((), 1.0, tl.float32)
    if NORMALIZE:
        sums = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, N, BLOCK_M):
            n = start + tl.arange(0, BLOCK_M)
            rest = (n < N) & (_place(indices, n, K, indices_row, BLOCK_N) == FUSED)
            if mask is not None:
                rest = rest & (tl.load(mask + image * mask_image + n.to(tl.int64) * mask_step, mask=rest, other=0) != 0)
            sums += tl.load(values + n.to(tl.int64) * value_step, mask=rest, other=0.0).to(tl.float32)
        total = tl.sum(sums, 0)
    inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    tl.store(inverses + image, inverse)
    for start in range(0, N, BLOCK_M):
        n = start + tl.arange(0, BLOCK_M)
        place = _place(indices, n, K, indices_row, BLOCK_N)
        rest = (n < N) & (place == FUSED)
        if FUSE:
            fused = rest & (tl.broadcast_to(total, (BLOCK_M,)) != 0)  # the interpreter spreads no comparison of scalars
            if mask is not None:
                fused = fused & (tl.load(mask + image * mask_image + n.to(tl.int64) * mask_step, mask=fused, other=0) != 0)
            weight = tl.load(values + n.to(tl.int64) * value_step, mask=fused, other=0.0).to(tl.float32)
            tl.store(shares + image * N + n, weight * inverse, mask=n < N)
            place = tl.where(rest & ~fused, LEFT_OUT, place)
        else:
            place = tl.where(rest, LEFT_OUT, place)
        tl.store(places + image * N + n, place, mask=n < N)


@triton.jit
def _spread(
    dx, grad, places, shares, N, K, C, grad_image, grad_row, grad_channel, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """BLOCK_N channels of BLOCK_M tokens: the gradient of what became of each."""
    image, n, c = rows_and_columns(N, C, BLOCK_M, BLOCK_N)
    place = tl.load(places + image * N + n, mask=n < N, other=LEFT_OUT)
    row = tl.where(place == FUSED, K, place)
    at = grad + image * grad_image + row.to(tl.int64)[:, None] * grad_row + c.to(tl.int64)[None, :] * grad_channel
    value = tl.load(at, mask=(row >= 0)[:, None] & (c < C)[None, :], other=0.0)
    if shares is not None:
        share = tl.load(shares + image * N + n, mask=place == FUSED, other=1.0)
        value = narrow(value.to(tl.float32) * share[:, None], dx.dtype.element_ty)
    tl.store(dx + (image * N + n)[:, None] * C + c[None, :], value, mask=(n < N)[:, None] & (c < C)[None, :])


@triton.jit
def _slopes(
    slopes, x, grad, places, N, C, x_image, x_token, x_channel, grad_image, grad_channel,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[B, N]: token . gradient (of the fused one), 0 for what is not in it."""
    blocks = tl.cdiv(N, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    fused = tl.load(places + image * N + n, mask=n < N, other=LEFT_OUT) == FUSED
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        g = tl.load(grad + image * grad_image + c.to(tl.int64) * grad_channel, mask=c < C, other=0.0).to(tl.float32)
        at = x + image * x_image + n.to(tl.int64)[:, None] * x_token + c.to(tl.int64)[None, :] * x_channel
        value = tl.load(at, mask=fused[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        total += tl.where(fused[:, None], value * g[None, :], 0.0)
    tl.store(slopes + image * N + n, tl.sum(total, 1), mask=n < N)


@triton.jit
def _score_gradient(dscore, slopes, places, shares, inverses, N, NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    mean = 0.0  # of the slopes by the tokens' shares
    if NORMALIZE:
        sums = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, N, BLOCK_M):
            n = start + tl.arange(0, BLOCK_M)
            fused = tl.load(places + image * N + n, mask=n < N, other=LEFT_OUT) == FUSED
            share = tl.load(shares + image * N + n, mask=fused, other=0.0)
            sums += share * tl.load(slopes + image * N + n, mask=fused, other=0.0)
        mean = tl.sum(sums, 0)
    inverse = tl.load(inverses + image)
    for start in range(0, N, BLOCK_M):
        n = start + tl.arange(0, BLOCK_M)
        fused = tl.load(places + image * N + n, mask=n < N, other=LEFT_OUT) == FUSED
        slope = tl.load(slopes + image * N + n, mask=fused, other=0.0)
        value = tl.where(fused, (slope - mean) * inverse, 0.0)
        tl.store(dscore + image * N + n, narrow(value, dscore.dtype.element_ty), mask=n < N)


# --- launching --------------------------------------------------------------------------------------------------------


def _choice(
    batch: int, n: int, protect: int, keep: int, values: Tensor | None, mask: Tensor | None, seed: Tensor | None, in_order: bool
) -> tuple[Tensor, Tensor]:
    """indices [B, protect + keep], inverse [B, N]: by scores or, with a seed, at random."""
    if n >= 2**30:
        raise ValueError(f"tokens: expected less than 2^30, got {n}")
    like = seed if values is None else values
    indices = like.new_empty(batch, protect + keep, dtype=torch.int64)
    inverse = like.new_empty(batch, n, dtype=torch.int64 if values is None else torch.int32)
    own = seed is not None and seed.ndim == 1
    launch(
        _choose, (batch,), indices=indices, inverse=inverse, values=values, mask=mask, seeds=seed,
        N=n, PROTECT=protect, KEEP=keep, **strides("value_image value_step", values), **strides("mask_image mask_step", mask),
        seed_step=seed.stride(0) if own else 0, OWN_SEEDS=own, IN_ORDER=in_order,
        **tile("choose", like),
    )  # fmt: skip
    return indices, inverse


def random_keep(seed: Tensor, batch: int, tokens: int, keep: int, protect: int, shuffled: bool) -> tuple[Tensor, Tensor]:
    return _choice(batch, tokens, protect, keep, None, None, seed, shuffled)


def forward(
    x: Tensor,  # [B, N, C]
    score: Tensor,  # [B, N]
    mask: Tensor | None,  # [B, N]
    k: int,
    protect: int,
    by_score: bool,
    fuse: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    batch, n, c = x.shape
    indices, inverse = _choice(batch, n, protect, k, score, mask, None, by_score)
    kept = x.new_empty(batch, protect + k + fuse, c)
    take(kept, x, indices, None)
    if fuse:
        chosen = tile("fuse", x)
        launch(
            _fuse, (batch * cdiv(c, chosen["BLOCK_N"]),), out=kept[:, protect + k], x=x, values=score, mask=mask, inverse=inverse,
            N=n, C=c, out_image=kept.stride(0), **strides("x_image x_token x_channel", x),
            **strides("value_image value_step", score), **strides("mask_image mask_step", mask), NORMALIZE=normalize, **chosen,
        )  # fmt: skip
    return kept, indices


def backward(
    grad: Tensor,  # [B, K (+ 1), C]
    x: Tensor | None,
    score: Tensor,
    mask: Tensor | None,
    indices: Tensor,  # [B, K]
    fuse: bool,
    normalize: bool,
    need_x: bool,
    need_score: bool,
) -> tuple[Tensor, Tensor]:
    (batch, n), k, c = score.shape, indices.shape[1], grad.shape[2]
    dx = grad.new_empty(batch if need_x else 0, n, c)
    dscore = score.new_empty(batch, n) if need_score and fuse else score.new_zeros(batch if need_score else 0, n)
    places = score.new_empty(batch, n, dtype=torch.int32)
    shares = score.new_empty(batch, n, dtype=torch.float32) if fuse else None
    inverses = score.new_empty(batch, dtype=torch.float32)
    launch(
        _places, (batch,), places=places, shares=shares, inverses=inverses, indices=indices, values=score, mask=mask, N=n, K=k,
        **strides("indices_image indices_row", indices), **strides("value_image value_step", score),
        **strides("mask_image mask_step", mask), FUSE=fuse, NORMALIZE=normalize,
        **tile("places", grad),
    )  # fmt: skip
    of_grad = strides("grad_image grad_row grad_channel", grad)
    if need_x:
        chosen = row_tile("rows", grad, c)
        launch(
            _spread, (batch * cdiv(n, chosen["BLOCK_M"]) * cdiv(c, chosen["BLOCK_N"]),), dx=dx, grad=grad, places=places,
            shares=shares, N=n, K=k, C=c, **of_grad, **chosen,
        )  # fmt: skip
    if need_score and fuse:
        slopes = score.new_empty(batch, n, dtype=torch.float32)
        chosen = tile("fuse", grad)
        of_grad.pop("grad_row")
        launch(
            _slopes, (batch * cdiv(n, chosen["BLOCK_M"]),), slopes=slopes, x=x, grad=grad[:, k], places=places, N=n, C=c,
            **strides("x_image x_token x_channel", x), **of_grad, **chosen,
        )  # fmt: skip
        launch(
            _score_gradient, (batch,), dscore=dscore, slopes=slopes, places=places, shares=shares, inverses=inverses, N=n,
            NORMALIZE=normalize, BLOCK_M=256, num_warps=4,
        )  # fmt: skip
    return dx, dscore
