"""match_fwd in Triton: match_fwd_triton of vlpfast/ops/_schemas.py; reference.py says what is matched.

The first kernel brings tokens to unit length and keeps, for each token of A, the largest product with one of B and its place:
products of float32 whatever the metric's dtype is, since the order of similarities decides. The second kernel, a program an
image, counts how many tokens of A merge before each: its place in the order, without a sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._triton import cdiv, dot, launch
from vlpfast.ops.tokens.triton_tiles import NOWHERE, strides, tile

# Where tokens without a similarity come in the order of merging, after all similarities and before each other
NO_SIMILARITY, PADDING, NO_PARTNER = tl.constexpr(-3.0), tl.constexpr(-4.0), tl.constexpr(-5.0)


@triton.jit
def _of_a(i, there, a, a_stride, EVERY):
    """The tokens at places i of set A."""
    if a is not None:
        return tl.load(a + i.to(tl.int64) * a_stride, mask=there, other=0).to(tl.int32)
    else:
        return i + i // (EVERY - 1)


@triton.jit
def _of_b(j, there, b, b_stride, EVERY):
    if b is not None:
        return tl.load(b + j.to(tl.int64) * b_stride, mask=there, other=0).to(tl.int32)
    else:
        return (j + 1) * EVERY - 1


@triton.jit
def _length(rows, there, C, of_channel, BLOCK_K: tl.constexpr):
    """Of rows [M, 1] of pointers: the length (infinite where it is 0), and whether every number is finite; [M] each."""
    k = tl.arange(0, BLOCK_K)
    square = tl.zeros((rows.shape[0],), tl.float32)
    bad = tl.zeros((rows.shape[0],), tl.int32)
    for start in range(0, C, BLOCK_K):
        inside = there[:, None] & (k < C - start)[None, :]
        value = tl.load(rows + (start + k).to(tl.int64)[None, :] * of_channel, mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(value * value, 1)
        bad += tl.sum(((value != value) | (tl.abs(value) == float("inf"))).to(tl.int32), 1)
    # a sum that overflows makes zeros of the row, one of squares that are too small too
    return tl.where(square == 0, float("inf"), tl.sqrt_rn(square)), bad == 0


@triton.jit
def _unit(at, there, length):
    """Numbers of rows of unit length, rounded as the reference's are: exact ties stay ties."""
    value = tl.load(at, mask=there, other=0.0).to(tl.float32)
    return tl.div_rn(value, tl.broadcast_to(length[:, None], value.shape))


@triton.jit
def _similarities(
    keys, to, metric, mask, a, b, NA, NB, C, PROTECT, EVERY, of_image, of_token, of_channel, mask_image, mask_token,
    a_stride, b_stride, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """keys, to [B, NA]: what BLOCK_M tokens of A merge by, the largest first, and the place in B that they merge into."""
    blocks = tl.cdiv(NA, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < NA
    token = _of_a(i, inside, a, a_stride, EVERY)
    real = inside
    if mask is not None:
        real = inside & (tl.load(mask + image * mask_image + token.to(tl.int64) * mask_token, mask=inside, other=0) != 0)
    rows = metric + image * of_image + token.to(tl.int64)[:, None] * of_token
    length, finite = _length(rows, real, C, of_channel, BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_M,), tl.int32)
    first_real, first_padding = NOWHERE, NOWHERE
    for start in range(0, NB, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        there = j < NB
        other = _of_b(j, there, b, b_stride, EVERY)
        there = there & (other >= PROTECT)
        real_b = there
        if mask is not None:
            real_b = there & (tl.load(mask + image * mask_image + other.to(tl.int64) * mask_token, mask=there, other=0) != 0)
        first_real = tl.minimum(first_real, tl.min(tl.where(real_b, j, NOWHERE), 0))
        first_padding = tl.minimum(first_padding, tl.min(tl.where(there & ~real_b, j, NOWHERE), 0))
        others = metric + image * of_image + other.to(tl.int64)[:, None] * of_token
        length_b, finite_b = _length(others, real_b, C, of_channel, BLOCK_K)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in range(0, C, BLOCK_K):
            channel = (c + k).to(tl.int64)[None, :] * of_channel
            within = (k < C - c)[None, :]
            u = _unit(rows + channel, real[:, None] & within, length)
            v = _unit(others + channel, real_b[:, None] & within, length_b)
            s = dot(u, tl.trans(v), s, PRECISION)
        s = tl.where((real & finite)[:, None] & (real_b & finite_b)[None, :], s, float("-inf"))
        block_best = tl.max(s, 1)
        lowest = tl.min(tl.where(s == block_best[:, None], j[None, :], NOWHERE), 1)
        winner = tl.where(block_best > best, lowest, winner)
        best = tl.maximum(block_best, best)
    none = best == float("-inf")
    of_real = tl.where(none, NO_SIMILARITY, best)
    key = tl.where(real, tl.where(first_real < NB, of_real, NO_PARTNER), tl.where(first_padding < NB, PADDING, NO_PARTNER))
    partner = tl.where(real, tl.where(none, first_real, winner), first_padding)
    tl.store(keys + image * NA + i, key, mask=inside)
    tl.store(to + image * NA + i, partner, mask=inside)


@triton.jit
def _order(
    index, kept, source, target, keys, to, a, b, N, NA, NB, PROTECT, R, EVERY, a_stride, b_stride,
    BY_SCORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Match of one image. The tokens of A from the first that may merge on: its number is what comes before it."""
    image = tl.program_id(0).to(tl.int64)
    index += image * N
    kept += image * (N - R)
    source += image * R
    target += image * R
    keys += image * NA
    to += image * NA
    if b is not None:
        b_first = 0
        for start in range(0, NB, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            b_first += tl.sum(((j < NB) & (_of_b(j, j < NB, b, b_stride, EVERY) < PROTECT)).to(tl.int32), 0)
    else:
        b_first = PROTECT // EVERY
    a_first = PROTECT - b_first
    b_place = PROTECT + NA - a_first - R  # of B's first in the output
    merged = 0  # of A, before the block
    for start in range(a_first, NA, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        inside = i < NA
        key = tl.load(keys + i, mask=inside, other=float("-inf"))
        rank = tl.zeros((BLOCK_M,), tl.int32)
        partners = 0  # tokens of A that have one
        for first in range(a_first, NA, BLOCK_N):
            j = first + tl.arange(0, BLOCK_N)
            other = tl.load(keys + j, mask=j < NA, other=float("-inf"))
            before = (other[None, :] > key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < i[:, None]))
            rank += tl.sum(before.to(tl.int32), 1)
            partners += tl.sum((other > NO_PARTNER).to(tl.int32), 0)
        token = _of_a(i, inside, a, a_stride, EVERY)
        merges = inside & (rank < R)
        stays = inside & (rank >= R)
        up_to = tl.cumsum(merges.to(tl.int32), 0)
        if BY_SCORE:
            place = PROTECT + rank - R
        else:
            place = PROTECT + i - a_first - merged - up_to  # one that stays is not among these
        merged += tl.sum(merges.to(tl.int32), 0)
        tl.store(kept + place, token.to(tl.int64), mask=stays)
        partner = tl.load(to + i, mask=merges, other=0) - b_first
        partner = tl.where(key == NO_PARTNER, (rank - partners) % (NB - b_first), partner)  # the others in turn
        goes = b_place + partner
        tl.store(source + rank, token.to(tl.int64), mask=merges)
        tl.store(target + rank, goes.to(tl.int64), mask=merges)
        tl.store(index + token, tl.where(stays, place, goes).to(tl.int64), mask=inside)
    for start in range(b_first, NB, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        token = _of_b(j, j < NB, b, b_stride, EVERY)
        place = b_place + j - b_first
        tl.store(kept + place, token.to(tl.int64), mask=j < NB)
        tl.store(index + token, place.to(tl.int64), mask=j < NB)
    for start in range(0, PROTECT, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        tl.store(kept + token, token.to(tl.int64), mask=token < PROTECT)
        tl.store(index + token, token.to(tl.int64), mask=token < PROTECT)


def match(
    metric: Tensor,  # [B, N, C]
    a: Tensor | None,
    b: Tensor | None,
    every: int,
    protect: int,
    r: int,
    by_score: bool,
    mask: Tensor | None,  # [B, N]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, c = metric.shape
    if n >= 2**30:
        raise ValueError(f"metric: expected less than 2^30 tokens, got {n}")
    nb = n // every if b is None else b.shape[0]
    na = n - nb
    keys = metric.new_empty((batch, na), dtype=torch.float32)
    to = metric.new_empty((batch, na), dtype=torch.int32)
    lists = {"a": a, "b": b, "EVERY": every, **strides("a_stride", a), **strides("b_stride", b)}
    chosen = tile("match", metric)
    launch(
        _similarities, (batch * cdiv(na, chosen["BLOCK_M"]),),
        keys=keys, to=to, metric=metric, mask=mask, NA=na, NB=nb, C=c, PROTECT=protect,
        **strides("of_image of_token of_channel", metric), **strides("mask_image mask_token", mask),
        PRECISION="tf32x3", **lists, **chosen,
    )  # fmt: skip
    index, kept, source, target = (metric.new_empty((batch, size), dtype=torch.int64) for size in (n, n - r, r, r))
    launch(
        _order, (batch,), index=index, kept=kept, source=source, target=target, keys=keys, to=to, N=n, NA=na, NB=nb,
        PROTECT=protect, R=r, BY_SCORE=by_score, **lists, **tile("order", metric),
    )  # fmt: skip
    return index, kept, source, target
