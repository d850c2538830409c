"""merge_fwd and merge_bwd in Triton: the operators of these names in vlpfast/ops/_schemas.py, as reference.py defines them.

A program makes rows of the result that nobody else writes. Most places have one token; where more come together, the program
finds them one by one, by rising number, in the list of what merges: no atomics, one order of every sum. Forward: rows are places,
the backward of sums and means is a gather by `index`. Only the gradients of the largest and of weights need the others of a
place: they are made by place again, and write the rows of its tokens.

Numbers out of range, which nothing checks on a device, are not followed: what has such a place is NaN, a sum goes without the
token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._triton import cdiv, launch, narrow
from vlpfast.ops.tokens.triton_tiles import NOWHERE, row_tile, rows_and_columns, strides


@triton.jit
def _next(last, place, source, target, target_step, source_step, COUNT, BLOCK_R: tl.constexpr):
    """[M]: of the tokens that go to `place` [M] the lowest above `last`, NOWHERE for none. No source: tokens are numbered."""
    found = tl.zeros_like(last) + NOWHERE
    for start in range(0, COUNT, BLOCK_R):
        entry = start + tl.arange(0, BLOCK_R)
        there = entry < COUNT
        goes = tl.load(target + entry.to(tl.int64) * target_step, mask=there, other=-1).to(tl.int32)
        token = entry
        if source is not None:
            token = tl.load(source + entry.to(tl.int64) * source_step, mask=there, other=0).to(tl.int32)
        fits = there[None, :] & (goes[None, :] == place[:, None]) & (token[None, :] > last[:, None])
        found = tl.minimum(found, tl.min(tl.where(fits, token[None, :], NOWHERE), 1))
    return found


@triton.jit
def _weight(weight, token, there, step):
    if weight is not None:
        return tl.load(weight + token.to(tl.int64) * step, mask=there, other=0.0)
    else:
        return there.to(tl.float32)


@triton.jit
def share_of(weight, total):
    """Of a mean, where weights add up to total; exactly 1 for one alone."""
    return tl.where(total == 0, 0.0, tl.div_rn(weight, tl.where(total == 0, 1.0, total)))


@triton.jit
def mixed(
    totals, writes, x, delta, weight, kept, source, target, image, m, c, N, PLACES, R, C, x_image, x_token, x_channel,
    delta_image, delta_token, delta_channel, weight_image, weight_token, kept_image, kept_step, source_image, source_step,
    target_image, target_step,
    MEAN: tl.constexpr, LARGEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Channels c of places m: what the tokens of each become [M, N], the sum of their weights [M].

    delta: added to x. writes: whether the program stores the sums in `totals`.
    """
    inside = m < PLACES
    x += image * x_image
    source += image * source_image
    target += image * target_image
    if delta is not None:
        delta += image * delta_image
    if weight is not None:
        weight += image * weight_image
    own = tl.load(kept + image * kept_image + m.to(tl.int64) * kept_step, mask=inside, other=0)
    right = (own >= 0) & (own < N)
    own = tl.where(inside & right, own, NOWHERE).to(tl.int32)
    total = _weight(weight, own, own != NOWHERE, weight_token)
    last = tl.full((BLOCK_M,), -1, tl.int32)
    other = _next(last, m, source, target, target_step, source_step, R, BLOCK_R)
    first_other = other
    while tl.min(other, 0) < NOWHERE:
        total += _weight(weight, other, other < N, weight_token)
        other = _next(other, m, source, target, target_step, source_step, R, BLOCK_R)
    if writes:
        tl.store(totals + image * PLACES + m, tl.where(right, total, float("nan")), mask=inside)
    # a token alone keeps the sign of its zeros; a place out of range stays NaN, whatever comes to it
    result = tl.where(right[:, None], -0.0, tl.full((BLOCK_M, BLOCK_N), float("nan"), tl.float32))
    other = first_other
    token = tl.minimum(own, other)
    begun = ~right
    while tl.min(token, 0) < NOWHERE:
        there = token < N
        mask = there[:, None] & (c < C)[None, :]
        at = x + token.to(tl.int64)[:, None] * x_token + c.to(tl.int64)[None, :] * x_channel
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if delta is not None:
            at = delta + token.to(tl.int64)[:, None] * delta_token + c.to(tl.int64)[None, :] * delta_channel
            value += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if LARGEST:
            larger = (value > result) | ((value != value) & (result == result)) | ~begun[:, None]
            result = tl.where(there[:, None] & larger, value, result)
            begun = begun | there
        else:
            if MEAN:
                share = share_of(_weight(weight, token, there, weight_token), total)
                there = there & (share != 0)  # what weighs nothing may hold anything
                value = value * share[:, None]
            result = tl.where(there[:, None], result + value, result)
            begun = begun | there
        own = tl.where(own == token, NOWHERE, own)
        if tl.max((other == token).to(tl.int32), 0) > 0:
            other = tl.where(other == token, _next(token, m, source, target, target_step, source_step, R, BLOCK_R), other)
        token = tl.minimum(own, other)
    return tl.where(begun[:, None], result, 0.0), total


@triton.jit
def _merge(
    y, totals, x, weight, kept, source, target, N, PLACES, R, C, x_image, x_token, x_channel, weight_image, weight_token,
    kept_image, kept_step, source_image, source_step, target_image, target_step,
    MEAN: tl.constexpr, LARGEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_N channels of BLOCK_M places, and the sums of their weights."""
    image, m, c = rows_and_columns(PLACES, C, BLOCK_M, BLOCK_N)
    writes = tl.program_id(0) % tl.maximum(tl.cdiv(C, BLOCK_N), 1) == 0
    result, _ = mixed(
        totals, writes, x, None, weight, kept, source, target, image, m, c, N, PLACES, R, C, x_image, x_token, x_channel, 0, 0, 0,
        weight_image, weight_token, kept_image, kept_step, source_image, source_step, target_image, target_step,
        MEAN, LARGEST, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    inside = m < PLACES
    at = image * PLACES + m
    tl.store(y + at[:, None] * C + c[None, :], narrow(result, y.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def _spread(
    dx, grad, index, weight, totals, N, PLACES, C, grad_image, grad_place, grad_channel, index_image, index_token,
    weight_image, weight_token, total_image, total_place, MEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N channels of BLOCK_M tokens: those of their places, for a mean times their share of it."""
    image, n, c = rows_and_columns(N, C, BLOCK_M, BLOCK_N)
    inside = n < N
    place = tl.load(index + image * index_image + n.to(tl.int64) * index_token, mask=inside, other=0)
    there = inside & (place >= 0) & (place < PLACES)
    at = grad + image * grad_image + place[:, None] * grad_place + c.to(tl.int64)[None, :] * grad_channel
    value = tl.load(at, mask=there[:, None] & (c < C)[None, :], other=float("nan"))
    if MEAN:
        total = tl.load(totals + image * total_image + place * total_place, mask=there, other=float("nan"))
        own = inside.to(tl.float32)
        if weight is not None:
            own = tl.load(weight + image * weight_image + n.to(tl.int64) * weight_token, mask=inside, other=0.0)
        share = share_of(own, total)[:, None]
        value = narrow(tl.where(share == 0, 0.0, value.to(tl.float32) * share), dx.dtype.element_ty)
    at = dx + (image * N + n)[:, None] * C + c[None, :]
    tl.store(at, value, mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def _spread_largest(
    dx, grad, index, x, N, PLACES, C, grad_image, grad_place, grad_channel, index_image, index_token, x_image, x_token, x_channel,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M places the rows of dx of their tokens: the gradient where the token is the first of the largest, else 0."""
    image, m, c = rows_and_columns(PLACES, C, BLOCK_M, BLOCK_N)
    inside = m < PLACES
    index += image * index_image
    columns = (c < C)[None, :]
    channel = c.to(tl.int64)[None, :]
    at = grad + image * grad_image + m.to(tl.int64)[:, None] * grad_place + channel * grad_channel
    g = tl.load(at, mask=inside[:, None] & columns, other=0.0)
    x += image * x_image
    start = tl.full((BLOCK_M,), -1, tl.int32)
    first = tl.where(inside, _next(start, m, None, index, index_token, 0, N, BLOCK_R), NOWHERE)
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_M, BLOCK_N), tl.int32) + first[:, None]
    token = first
    while tl.min(token, 0) < NOWHERE:
        there = (token < NOWHERE)[:, None] & columns
        at = x + token.to(tl.int64)[:, None] * x_token + channel * x_channel
        value = tl.load(at, mask=there, other=0.0).to(tl.float32)
        larger = there & ((value > best) | ((value != value) & (best == best)))
        best = tl.where(larger, value, best)
        winner = tl.where(larger, token[:, None], winner)
        token = tl.where(token < NOWHERE, _next(token, m, None, index, index_token, 0, N, BLOCK_R), token)
    token = first
    while tl.min(token, 0) < NOWHERE:
        there = (token < NOWHERE)[:, None] & columns
        at = dx + (image * N + token)[:, None] * C + channel
        tl.store(at, tl.where(winner == token[:, None], g, tl.zeros_like(g)), mask=there)
        token = tl.where(token < NOWHERE, _next(token, m, None, index, index_token, 0, N, BLOCK_R), token)


@triton.jit
def _rise(
    x, grad, token, base, there, guard, base_guard, C, x_token, x_channel, grad_channel,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[M]: (x of token - x of base) . gradient; what weighs nothing (guard) may hold anything: what is no number counts as 0."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, C, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        mask = there[:, None] & (c < C)[None, :]
        at = x + c.to(tl.int64)[None, :] * x_channel
        value = tl.load(at + token.to(tl.int64)[:, None] * x_token, mask=mask, other=0.0).to(tl.float32)
        from_base = tl.load(at + base.to(tl.int64)[:, None] * x_token, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + c.to(tl.int64)[None, :] * grad_channel, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(guard[:, None] & ~(tl.abs(value) < float("inf")), 0.0, value)
        from_base = tl.where(base_guard[:, None] & ~(tl.abs(from_base) < float("inf")), 0.0, from_base)
        total += tl.sum((value - from_base) * g, 1)
    return total


@triton.jit
def _weight_gradient(
    dweight, grad, grad_totals, index, weight, totals, x, N, PLACES, C, grad_image, grad_place, grad_channel,
    index_image, index_token, weight_image, weight_token, total_image, total_place, grad_total_image, grad_total_place,
    x_image, x_token, x_channel, MEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of the tokens of BLOCK_M places: grad_total, for a mean of several also (x - mean) . gradient / total.

    Products are made with the difference from the place's first token, which is small where alike tokens come together.
    """
    blocks = tl.cdiv(PLACES, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < PLACES
    index += image * index_image
    place = m.to(tl.int64)
    of_total = tl.load(grad_totals + image * grad_total_image + place * grad_total_place, mask=inside, other=0.0)
    start = tl.full((BLOCK_M,), -1, tl.int32)
    first = tl.where(inside, _next(start, m, None, index, index_token, 0, N, BLOCK_R), NOWHERE)
    several = first < NOWHERE
    mean = tl.zeros((BLOCK_M,), tl.float32)  # less the first token's
    total = mean + 1.0
    guard = several
    if MEAN:
        x += image * x_image
        grad += image * grad_image + place[:, None] * grad_place
        if weight is not None:
            weight += image * weight_image
        total = tl.load(totals + image * total_image + place * total_place, mask=inside, other=0.0)
        token = tl.where(several, _next(first, m, None, index, index_token, 0, N, BLOCK_R), NOWHERE)
        several = (token < NOWHERE) & (total != 0)  # alone a token is its own mean, whatever it weighs
        guard = _weight(weight, first, several, weight_token) == 0
        token = tl.where(several, token, NOWHERE)
        while tl.min(token, 0) < NOWHERE:
            there = token < NOWHERE
            own = _weight(weight, token, there, weight_token)
            share = share_of(own, total)
            rise = _rise(x, grad, token, first, there, own == 0, guard, C, x_token, x_channel, grad_channel, BLOCK_M, BLOCK_N)
            mean += tl.where(there & (share != 0), share * rise, 0.0)
            token = tl.where(there, _next(token, m, None, index, index_token, 0, N, BLOCK_R), token)
    token = first
    while tl.min(token, 0) < NOWHERE:
        there = token < NOWHERE
        value = of_total
        if MEAN:
            slopes = there & several
            own = _weight(weight, token, slopes, weight_token)
            rise = _rise(x, grad, token, first, slopes, own == 0, guard, C, x_token, x_channel, grad_channel, BLOCK_M, BLOCK_N)
            value += tl.where(several, (rise - mean) / tl.where(total == 0, 1.0, total), 0.0)
        tl.store(dweight + image * N + token, value, mask=there)
        token = tl.where(there, _next(token, m, None, index, index_token, 0, N, BLOCK_R), token)


# --- launching --------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,  # [B, N, C]
    weight: Tensor | None,  # [B, N] float32
    kept: Tensor,
    source: Tensor,
    target: Tensor,
    mean: bool,
    largest: bool,
) -> tuple[Tensor, Tensor]:
    (batch, n, c), places, r = _checked("x", x), kept.shape[1], source.shape[1]
    y = x.new_empty(batch, places, c)
    total = x.new_empty(batch, places, dtype=torch.float32)
    chosen = row_tile("merge", x, c)
    launch(
        _merge, (batch * cdiv(places, chosen["BLOCK_M"]) * max(1, cdiv(c, chosen["BLOCK_N"])),),
        y=y, totals=total, x=x, weight=weight, kept=kept, source=source, target=target, N=n, PLACES=places, R=r, C=c,
        **strides("x_image x_token x_channel", x), **strides("weight_image weight_token", weight),
        **strides("kept_image kept_step", kept), **strides("source_image source_step", source),
        **strides("target_image target_step", target), MEAN=mean, LARGEST=largest, **chosen,
    )  # fmt: skip
    return y, total


def backward(
    grad_y: Tensor,  # [B, N - r, C]
    grad_total: Tensor | None,
    index: Tensor,  # [B, N]
    weight: Tensor | None,
    total: Tensor | None,
    x: Tensor | None,
    mean: bool,
    largest: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    (batch, places, c), n = _checked("grad_y", grad_y), index.shape[1]
    dx = grad_y.new_empty(batch if need_x else 0, n, c)
    dweight = grad_y.new_empty((batch if need_weight else 0, n), dtype=torch.float32)
    common = {"grad": grad_y, "index": index, "N": n, "PLACES": places, "C": c}
    common |= strides("grad_image grad_place grad_channel", grad_y) | strides("index_image index_token", index)
    of_x = strides("x_image x_token x_channel", x)
    weights = {"weight": weight, "totals": total, "MEAN": mean}
    weights |= strides("weight_image weight_token", weight) | strides("total_image total_place", total)
    chosen = row_tile("merge", grad_y, c)
    block_m, columns = chosen["BLOCK_M"], max(1, cdiv(c, chosen["BLOCK_N"]))
    if need_x and largest:
        launch(_spread_largest, (batch * cdiv(places, block_m) * columns,), dx=dx, x=x, **common, **of_x, **chosen)
    elif need_x:
        chosen.pop("BLOCK_R")
        launch(_spread, (batch * cdiv(n, block_m) * columns,), dx=dx, **common, **weights, **chosen)
    if need_weight:
        chosen = row_tile("weights", grad_y, min(c, 128))  # it goes through the channels: rather more places at once
        launch(
            _weight_gradient, (batch * cdiv(places, chosen["BLOCK_M"]),), dweight=dweight, grad_totals=grad_total, x=x,
            **common, **weights, **of_x, **strides("grad_total_image grad_total_place", grad_total), **chosen,
        )  # fmt: skip
    return dx, dweight


def _checked(name: str, x: Tensor) -> torch.Size:
    if x.shape[1] >= 2**30:
        raise ValueError(f"{name}: expected less than 2^30 tokens, got {x.shape[1]}")
    return x.shape
