"""temporal_attention in Triton: the operators temporal_attention_fwd and temporal_attention_bwd of vlpfast/ops/_schemas.py.

A program has one head at one position of one clip: its queries stay in registers while keys and values pass, frame by frame. The
frames are few and the products small, so there is no tensor core in it: what counts is that everything is read once (in the
backward, keys and values twice) where it lies.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops._triton import launch, narrow


@triton.jit
def _seen(keep, clip, j, i, keep_clip, keep_frame, CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr):
    """Whether frame j may be seen by anyone, 0 or 1, and by which queries i [BLOCK_T]."""
    shown = 1
    if keep is not None:
        shown = tl.load(keep + clip * keep_clip + j * keep_frame).to(tl.int32)
    seen = i < BLOCK_T * shown
    if CAUSAL:
        seen = seen & (i >= j)
    return shown, seen


@triton.jit
def _attend(
    out, q, k, v, keep, QUERIES, FRAMES, POSITIONS, HEADS, DEPTH, WIDE, scale,
    q_clip, q_frame, q_position, k_clip, k_frame, k_position, v_clip, v_frame, v_position, keep_clip, keep_frame,
    CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0) % HEADS
    position = (tl.program_id(0) // HEADS % POSITIONS).to(tl.int64)
    clip = (tl.program_id(0) // (HEADS * POSITIONS)).to(tl.int64)
    i = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    q_at = q + clip * q_clip + position * q_position + h * DEPTH + i.to(tl.int64)[:, None] * q_frame + d[None, :]
    a = tl.load(q_at, mask=(i < QUERIES)[:, None] & (d < DEPTH)[None, :], other=0.0).to(tl.float32) * scale
    k_at = k + clip * k_clip + position * k_position + h * DEPTH + d
    v_at = v + clip * v_clip + position * v_position + h * WIDE + e
    largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for j in range(0, FRAMES):
        shown, seen = _seen(keep, clip, j, i, keep_clip, keep_frame, CAUSAL, BLOCK_T)
        key = tl.load(k_at, mask=d < DEPTH * shown, other=0.0).to(tl.float32)
        value = tl.load(v_at, mask=e < WIDE * shown, other=0.0).to(tl.float32)
        s = tl.sum(a * key[None, :], 1)
        raised = tl.where(seen & ~(s <= largest), s, largest)
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        shrink = tl.exp(largest - shift)
        weight = tl.where(seen, tl.exp(s - shift), 0.0)
        total = total * shrink + weight
        weighted = weighted * shrink[:, None] + tl.where(seen[:, None], weight[:, None] * value[None, :], 0.0)
        largest = raised
        k_at += k_frame
        v_at += v_frame
    made = weighted / tl.where(total == 0, 1.0, total)[:, None]
    place = ((clip * QUERIES + i) * POSITIONS + position) * HEADS + h
    at = out + place[:, None] * WIDE + e[None, :]
    tl.store(at, narrow(made, out.dtype.element_ty), mask=(i < QUERIES)[:, None] & (e < WIDE)[None, :])


@triton.jit
def _attend_gradient(
    dq, dk, dv, grad, q, k, v, keep, QUERIES, FRAMES, POSITIONS, HEADS, DEPTH, WIDE, scale,
    q_clip, q_frame, q_position, k_clip, k_frame, k_position, v_clip, v_frame, v_position,
    grad_clip, grad_frame, grad_position, keep_clip, keep_frame,
    CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0) % HEADS
    position = (tl.program_id(0) // HEADS % POSITIONS).to(tl.int64)
    clip = (tl.program_id(0) // (HEADS * POSITIONS)).to(tl.int64)
    i = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    inside = (i < QUERIES)[:, None] & (d < DEPTH)[None, :]
    q_at = q + clip * q_clip + position * q_position + h * DEPTH + i.to(tl.int64)[:, None] * q_frame + d[None, :]
    g_at = grad + clip * grad_clip + position * grad_position + h * WIDE + i.to(tl.int64)[:, None] * grad_frame + e[None, :]
    a = tl.load(q_at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_at, mask=(i < QUERIES)[:, None] & (e < WIDE)[None, :], other=0.0).to(tl.float32)
    k_at = k + clip * k_clip + position * k_position + h * DEPTH + d
    v_at = v + clip * v_clip + position * v_position + h * WIDE + e
    # the weights' largest scores and sums, and the sum of each query's weights times their gradients
    largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    for j in range(0, FRAMES):
        shown, seen = _seen(keep, clip, j, i, keep_clip, keep_frame, CAUSAL, BLOCK_T)
        key = tl.load(k_at + j * k_frame, mask=d < DEPTH * shown, other=0.0).to(tl.float32)
        value = tl.load(v_at + j * v_frame, mask=e < WIDE * shown, other=0.0).to(tl.float32)
        s = tl.sum(a * key[None, :], 1) * scale
        slope = tl.sum(g * value[None, :], 1)
        raised = tl.where(seen & ~(s <= largest), s, largest)
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        shrink = tl.exp(largest - shift)
        weight = tl.where(seen, tl.exp(s - shift), 0.0)
        total = total * shrink + weight
        weighted = weighted * shrink + tl.where(seen, weight * slope, 0.0)
        largest = raised
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    whole = tl.where(total == 0, 1.0, total)
    mean = weighted / whole
    made = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for j in range(0, FRAMES):
        shown, seen = _seen(keep, clip, j, i, keep_clip, keep_frame, CAUSAL, BLOCK_T)
        seen = seen & (i < QUERIES)
        key = tl.load(k_at + j * k_frame, mask=d < DEPTH * shown, other=0.0).to(tl.float32)
        value = tl.load(v_at + j * v_frame, mask=e < WIDE * shown, other=0.0).to(tl.float32)
        s = tl.sum(a * key[None, :], 1) * scale
        weight = tl.where(seen, tl.exp(s - shift) / whole, 0.0)
        slope = tl.where(seen, scale * weight * (tl.sum(g * value[None, :], 1) - mean), 0.0)
        made += tl.where(seen[:, None], slope[:, None] * key[None, :], 0.0)
        of_key = tl.sum(tl.where(seen[:, None], slope[:, None] * a, 0.0), 0)
        of_value = tl.sum(tl.where(seen[:, None], weight[:, None] * g, 0.0), 0)
        place = ((clip * FRAMES + j) * POSITIONS + position) * HEADS + h
        tl.store(dk + place * DEPTH + d, narrow(of_key, dk.dtype.element_ty), mask=d < DEPTH)
        tl.store(dv + place * WIDE + e, narrow(of_value, dv.dtype.element_ty), mask=e < WIDE)
    place = ((clip * QUERIES + i) * POSITIONS + position) * HEADS + h
    tl.store(dq + place[:, None] * DEPTH + d[None, :], narrow(made, dq.dtype.element_ty), mask=inside)


def forward(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, heads: int, scale: float, causal: bool) -> Tensor:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    launch(_attend, _grid(q, heads), out=out, **_arguments(q, k, v, keep, heads, scale, causal, 1024))
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, heads: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    launch(
        _attend_gradient, _grid(q, heads), dq=dq, dk=dk, dv=dv, grad=grad, **_strides("grad", grad),
        **_arguments(q, k, v, keep, heads, scale, causal, 512),
    )  # fmt: skip
    return dq, dk, dv


def _grid(q: Tensor, heads: int) -> tuple[int]:
    return (q.shape[0] * q.shape[2] * heads,)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, heads: int, scale: float, causal: bool, share: int
) -> dict[str, Any]:
    """share: how many of a tile's elements a warp holds, of each of the tiles."""
    depth, wide = q.shape[3] // heads, v.shape[3] // heads
    blocks = [triton.next_power_of_2(max(1, n)) for n in (q.shape[1], depth, wide)]
    return {
        "q": q, "k": k, "v": v, "keep": None if keep is None else keep.view(torch.uint8),
        "QUERIES": q.shape[1], "FRAMES": k.shape[1], "POSITIONS": q.shape[2], "HEADS": heads, "DEPTH": depth, "WIDE": wide,
        "scale": scale, **_strides("q", q), **_strides("k", k), **_strides("v", v),
        "keep_clip": 0 if keep is None else keep.stride(0), "keep_frame": 0 if keep is None else keep.stride(1),
        "CAUSAL": causal, "BLOCK_T": blocks[0], "BLOCK_D": blocks[1], "BLOCK_V": blocks[2],
        "num_warps": min(8, max(1, blocks[0] * max(blocks[1:]) // share)), "num_stages": 2,
    }  # fmt: skip


def _strides(name: str, t: Tensor) -> dict[str, int]:
    return {f"{name}_clip": t.stride(0), f"{name}_frame": t.stride(1), f"{name}_position": t.stride(2)}
