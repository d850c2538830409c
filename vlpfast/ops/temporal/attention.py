"""temporal_attention: every position attends to itself in the other frames of its clip."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import DTYPES, check_count, check_flag
from vlpfast.ops.temporal import reference
from vlpfast.ops.temporal.autograd import dense

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type
MOST_FRAMES = 32  # that the kernels take


def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention over the frames of a clip at each position by itself, channels last, without permutes.

        out[b, i, p, h] = sum over j of softmax_j(scale * <q[b, i, p, h], k[b, j, p, h]>) v[b, j, p, h]

    Args:
        q: [B, Tq, P, H * Dq]: frames, positions, H heads side by side; float32, float64, bfloat16 or float16. Half types are
            multiplied and summed in float32. Strided views (parts of one product of queries, keys and values) are read where they
            lie; only a last dimension that is not dense is copied. Of different dtypes the widest is used; under autocast all
            (float64 apart) are cast to its dtype.
        k: [B, T, P, H * Dq]; T need not be Tq (one frame's queries alone).
        v: [B, T, P, H * Dv]; Dv need not be Dq.
        heads: H.
        mask: [B, T] bool, True = the frame may be seen; what the others hold does not matter. A query that sees none gives 0,
            without gradient.
        causal: frame i sees frames 0 to i; Tq = T.
        scale: Dq ** -0.5 unless given.

    Returns:
        [B, Tq, P, H * Dv], contiguous. The kernels take up to 32 frames on both sides, and their backward makes the weights
        again; longer clips go through torch's scaled_dot_product_attention on permuted views.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Bertasius, Wang and Torresani 2021, "Is Space-Time Attention All You Need for Video Understanding?".
    """
    _check(q, k, v, heads, mask, causal, scale)
    dtype = torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    scale = max(1, q.shape[3] // heads) ** -0.5 if scale is None else float(scale)
    backend = backends.choose("temporal_attention", KERNELS, q.device, dtype)
    if backend == "reference":
        return reference.temporal_attention(q, k, v, heads, mask, scale, causal)
    if max(q.shape[1], k.shape[1]) > MOST_FRAMES:
        return _permuted(q, k, v, heads, mask, scale, causal)
    if k is q:  # Dynamo refuses a Function that is given one tensor twice
        k = k.view_as(k)
    if v is q or v is k:
        v = v.view_as(v)
    return TemporalAttention.apply(backend, dense(q), dense(k), dense(v), mask, heads, scale, causal)


def _permuted(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    batch, frames, positions, _ = q.shape
    seen = torch.ones(frames, k.shape[1], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & mask[:, None]  # [B, Tq, T]
        k, v = (torch.where(mask[:, :, None, None], t, 0) for t in (k, v))
        none = ~seen.any(-1)  # [B, Tq]
        seen = (seen | none[..., None]).repeat_interleave(positions, 0)[:, None]  # [B * P, 1, Tq, T]
    q, k, v = (t.unflatten(-1, (heads, t.shape[-1] // heads)).permute(0, 2, 3, 1, 4).flatten(0, 1) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale)  # [B * P, H, Tq, Dv]
    out = out.unflatten(0, (batch, positions)).permute(0, 3, 1, 2, 4).flatten(3)
    return out if mask is None else torch.where(none[..., None, None], 0, out)


def _check(q: Any, k: Any, v: Any, heads: Any, mask: Any, causal: Any, scale: Any) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {t.dtype}")
        if t.ndim != 4:
            raise ValueError(f"{name}: expected shape [B, T, P, H * D], got {tuple(t.shape)}")
        if t.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q has, got {t.device}")
    check_count("heads", heads, 1)
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"k: expected clips, positions and width as q {tuple(q.shape)} has, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected clips, frames and positions as k {tuple(k.shape)} has, got {tuple(v.shape)}")
    for name, t in (("q", q), ("v", v)):
        if t.shape[3] % heads:
            raise ValueError(f"heads: expected a divisor of {name}'s width {t.shape[3]}, got {heads}")
    check_flag("causal", causal)
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal: expected as many frames in q as in k, got {q.shape[1]} and {k.shape[1]}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a tensor or None, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
        if mask.shape != k.shape[:2]:
            raise ValueError(f"mask: expected shape {tuple(k.shape[:2])}, got {tuple(mask.shape)}")
        if mask.device != q.device:
            raise ValueError(f"mask: expected device {q.device} as q has, got {mask.device}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")


class TemporalAttention(torch.autograd.Function):
    """temporal_attention_fwd or temporal_attention_fwd_triton (vlpfast/ops/_schemas.py).

    It has no jvp of its own (Dynamo refuses a Function that has one), so forward-mode differentiation ends in torch's error.
    """

    @staticmethod
    def forward(backend, q, k, v, keep, heads, scale, causal):
        return backends.operator("temporal_attention_fwd", backend)(q, k, v, keep, heads, scale, causal)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend, *tensors, ctx.heads, ctx.scale, ctx.causal = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        gradients = _Gradient.apply(ctx.backend, dense(grad), *ctx.saved_tensors, ctx.heads, ctx.scale, ctx.causal)
        needed = ctx.needs_input_grad[1:4]
        return None, *[g if n else None for g, n in zip(gradients, needed, strict=True)], *[None] * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError(f"temporal_attention: results under vmap {backends.BY_REFERENCE}")


class _Gradient(torch.autograd.Function):
    """A step of its own in the graph: a second derivative meets an error, never a silent zero."""

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(backend, grad, q, k, v, keep, heads, scale, causal):
        return backends.operator("temporal_attention_bwd", backend)(grad, q, k, v, keep, heads, scale, causal)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"temporal_attention: second derivatives {backends.BY_REFERENCE}")
