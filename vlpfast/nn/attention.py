"""Attention over several kernels, and the module around it."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.types import UserError

Backend = Literal["auto", "sdpa", "flash_attn", "xformers"]
BACKENDS = ("auto", "sdpa", "flash_attn", "xformers")
INSTALLED = {name: find_spec(name) is not None for name in ("flash_attn", "xformers")}


def attention(
    q: Tensor,  # [B, H, Lq, Dh]
    k: Tensor,  # [B, H, Lk, Dh]
    v: Tensor,  # [B, H, Lk, Dh]
    *,
    mask: Tensor | Literal["causal"] | None = None,
    key_bias: Tensor | None = None,  # [B, Lk]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    max_seqlen: int | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(Dh) + mask + key_bias) v, [B, H, Lq, Dh] in the dtype of q.

    Args:
        q, k, v: one floating dtype, any strides with a dense last dimension. Self- or cross-attention.
        mask: "causal" (query i sees keys 0 .. i; Lq = Lk), a bool tensor (True = seen) or a float tensor (added to the scores),
            either broadcastable to [B, H, Lq, Lk]. Every query must see at least one key.
        key_bias: floating, added to all scores of a key; -inf hides it. The log of the number of tokens that a merged one stands
            for makes attention proportional (ToMe, Bolya et al. 2023). Kernels without a mask (flash-attn, xformers, on CUDA
            torch's in half precision) get it as channels of k that meet ones in q: rounded and remainder, together right to
            2^-16 of it in bfloat16 and 2^-22 in float16 (of a bias from 0.1 on), then zeros up to a multiple of 8. Elsewhere it
            is a mask [B, 1, 1, Lk] in float32 (float64 for float64): at no cost in torch's CPU kernel, unless the bias needs a
            gradient, for which the weights are kept.
        cu_seqlens: int32, on q's device. S sequences of different lengths lie one after another in one row (B = 1, Lq = Lk) and
            each sees itself alone: sequence s is positions cu_seqlens[s] .. cu_seqlens[s + 1] - 1, the last entry is Lq. mask may
            be "causal".
        max_seqlen: the longest of these sequences, where the caller knows it on the host; flash-attn sizes its grid by it.
        dropout: probability with which each weight is set to 0, the others being scaled up; the caller gives 0 outside training.
        need_weights: returns (output, weights [B, H, Lq, Lk]) by plain products, whatever the backend; both have gradients. The
            weights are those before dropout.
        backend: "sdpa" is torch's scaled_dot_product_attention; for packed sequences it needs a mask of L^2 bytes. "auto" takes
            flash-attn for packed sequences if it is installed and fits, else sdpa: for the other cases torch has kernels of the
            same kind as flash-attn and xformers.

    Raises:
        UserError: a backend that is forced but not installed, or does not fit these tensors; it says why.
        ValueError, TypeError: a wrong argument, named.
    """
    _check(q, k, v, mask, key_bias, cu_seqlens, backend)
    if key_bias is not None:
        device = q.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast:
            q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
        half_on_gpu = device == "cuda" and q.dtype in (torch.float16, torch.bfloat16)
        if not need_weights and (half_on_gpu or backend in ("flash_attn", "xformers")):
            folded = _fold(q, k, v, key_bias)
            return _dispatch(*folded, mask, cu_seqlens, max_seqlen, dropout, backend, q.shape[-1] ** -0.5)[..., : q.shape[-1]]
        mask, cu_seqlens = _add_key_bias(q, mask, key_bias, cu_seqlens), None
        if not need_weights:
            with torch.autocast(device, enabled=False) if autocast else nullcontext():  # it would round the bias as it does q
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if need_weights:
        return _explicit(q, k, v, _dense_mask(q, mask, cu_seqlens), dropout)
    return _dispatch(q, k, v, mask, cu_seqlens, max_seqlen, dropout, backend, None)


def _dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | str | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    dropout: float,
    backend: Backend,
    scale: float | None,  # None: 1 / sqrt(Dh)
) -> Tensor:
    causal = isinstance(mask, str)
    chosen = choose_backend(q.device, q.dtype, q.shape[-1], mask, cu_seqlens is not None, backend)
    if chosen == "flash_attn":
        return _flash_attn(q, k, v, causal, cu_seqlens, max_seqlen, dropout, scale)
    if chosen == "xformers":
        return _xformers(q, k, v, causal, dropout, scale)
    if cu_seqlens is not None:
        mask, causal = _dense_mask(q, mask, cu_seqlens), False
    mask = None if causal else mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)


def choose_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, mask: Tensor | str | None, packed: bool, backend: Backend
) -> str:
    """ "sdpa", "flash_attn" or "xformers" for one call. UserError: the forced one is not installed or does not fit."""
    if backend == "auto":
        return "flash_attn" if packed and not _unfit("flash_attn", device, dtype, head_dim, mask, packed) else "sdpa"
    reason = _unfit(backend, device, dtype, head_dim, mask, packed)
    if reason:
        raise UserError(f"attention_backend: {backend!r} is forced, but {reason}")
    return backend


def require_installed(backend: Backend) -> None:
    """UserError if a backend is forced whose package is not there: known before the first batch."""
    if backend not in BACKENDS:
        raise UserError(f"attention_backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if not INSTALLED.get(backend, True):
        raise UserError(f"attention_backend: {backend!r} is forced, but the package {backend} is not installed")


def _unfit(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, mask: Tensor | str | None, packed: bool) -> str:
    """Why a backend cannot take such tensors; "" if it can."""
    if name == "sdpa":
        return ""
    if not INSTALLED[name]:
        return f"the package {name} is not installed"
    if device.type != "cuda":
        return f"it works on CUDA tensors alone, and these are on {device.type}"
    if isinstance(mask, Tensor):
        return "it takes no mask tensor, only None or 'causal'"
    if name == "xformers":
        return "its packed sequences need their lengths on the host" if packed else ""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16 alone, and these are {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"it takes heads of up to 256 channels in steps of 8, and these have {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return ""


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | str | None,
    key_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or v.shape != k.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k, v: expected [B, H, Lq, Dh] and twice [B, H, Lk, Dh], got {shapes}")
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"mask: expected a bool or float tensor, got {mask.dtype}")
    elif mask is not None:
        if mask != "causal":
            raise ValueError(f"mask: expected None, 'causal' or a tensor, got {mask!r}")
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"mask: 'causal' expects as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    if key_bias is not None:
        if not isinstance(key_bias, Tensor) or not key_bias.is_floating_point():
            raise TypeError(f"key_bias: expected a float tensor, got {getattr(key_bias, 'dtype', type(key_bias).__name__)}")
        if key_bias.shape != (k.shape[0], k.shape[2]):
            raise ValueError(f"key_bias: expected [B, Lk] = {(k.shape[0], k.shape[2])}, got {tuple(key_bias.shape)}")
        if key_bias.device != k.device:
            raise ValueError(f"key_bias: expected device {k.device} as k has, got {key_bias.device}")
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
            raise ValueError(f"cu_seqlens: expected int32 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
        if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
            raise ValueError(f"cu_seqlens: expected q and k [1, H, L, Dh], got {tuple(q.shape)} and {tuple(k.shape)}")
        if isinstance(mask, Tensor):
            raise ValueError("mask: expected None or 'causal' beside cu_seqlens, got a tensor")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def _dense_mask(q: Tensor, mask: Tensor | str | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """[L, L] bool, True = seen, for causal and packed attention; else the mask itself."""
    if cu_seqlens is None and not isinstance(mask, str):
        return mask
    position = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    seen = position[:, None] >= position if mask is not None else torch.ones((), dtype=torch.bool, device=q.device)
    if cu_seqlens is not None:
        sequence = torch.bucketize(position, cu_seqlens[1:], right=True)  # [L]
        seen = seen & (sequence[:, None] == sequence)
    return seen


def _add_key_bias(q: Tensor, mask: Tensor | str | None, key_bias: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B, 1 or H, 1 or Lq, Lk] float32, float64 for float64: the bias in a mask that is added to the scores."""
    bias = key_bias[:, None, None].to(torch.promote_types(q.dtype, torch.float32))
    mask = _dense_mask(q, mask, cu_seqlens)
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else (bias + mask).to(bias.dtype)


def _fold(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, L, Dh + ...], a multiple of 8, so that q k^T / sqrt(Dh) has the bias in it; v is 0 in the new channels."""
    head_dim = q.shape[-1]
    channels = -(-(head_dim + 2) // 8) * 8 - head_dim
    bias = key_bias.to(torch.promote_types(k.dtype, torch.float32)) * head_dim**0.5  # [B, Lk]
    high = bias.to(k.dtype)
    remainder = (bias - high).detach()  # the gradient goes through the high part alone
    low = torch.where(high.isfinite(), remainder, 0).to(k.dtype)  # -inf less -inf would be NaN
    more = F.pad(torch.stack((high, low), dim=-1), (0, channels - 2))  # [B, Lk, channels]
    k = torch.cat((k, more[:, None].expand(-1, k.shape[1], -1, -1)), dim=-1)
    return F.pad(q, (0, channels), value=1.0), k, F.pad(v, (0, channels))


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, Lq, Lk]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return F.dropout(weights, dropout) @ v, weights


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """flash-attn 2: heads after positions, packed sequences without the batch dimension."""
    if cu_seqlens is None:
        from flash_attn import flash_attn_func

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, L, H, Dh]
        out = flash_attn_func(q, k, v, dropout_p=dropout, softmax_scale=scale, causal=causal)
        return out.transpose(1, 2)
    from flash_attn import flash_attn_varlen_func

    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # [L, H, Dh]
    longest = q.shape[0] if max_seqlen is None else max_seqlen
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=causal,
    )
    return out.transpose(0, 1)[None]


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, scale: float | None) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    bias = LowerTriangularMask() if causal else None
    return memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scale).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of x with itself or, given context_width, of x with a context; as torch.nn.MultiheadAttention.

    One product makes queries, keys and values (of a context: keys and values); in_proj holds MultiheadAttention's in_proj_weight
    and in_proj_bias. See `attention` for everything by keyword.
    """

    def __init__(
        self, width: int, heads: int, *, context_width: int | None = None, bias: bool = True, backend: Backend = "auto"
    ) -> None:
        """bias: of queries, keys and values."""
        super().__init__()
        if width % heads:
            raise UserError(f"heads: expected a divisor of the width {width}, got {heads}")
        require_installed(backend)
        self.heads = heads
        self.backend = backend
        self.takes_context = context_width is not None
        if context_width is None:
            self.in_proj = nn.Linear(width, 3 * width, bias=bias)
        else:
            self.q_proj = nn.Linear(width, width, bias=bias)
            self.kv_proj = nn.Linear(context_width, 2 * width, bias=bias)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,  # [B, L, width]
        context: Tensor | None = None,  # [B, Lc, context_width]
        *,
        mask: Tensor | Literal["causal"] | None = None,
        key_bias: Tensor | None = None,  # [B, L or Lc]
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        need_weights: bool = False,
        need_qk: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """-> [B, L, width]; behind it with need_weights the weights [B, heads, L, L or Lc], with need_qk the queries and keys
        [B, heads, L or Lc, Dh]."""
        if (context is not None) != self.takes_context:
            raise ValueError(f"context: {'expected one, got None' if self.takes_context else 'this layer attends to x alone'}")
        if context is None:
            q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, L, H, Dh]
        else:
            q = self.q_proj(x).unflatten(-1, (self.heads, -1))
            k, v = self.kv_proj(context).unflatten(-1, (2, self.heads, -1)).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, L, Dh]
        out = attention(
            q,
            k,
            v,
            mask=mask,
            key_bias=key_bias,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            need_weights=need_weights,
            backend=self.backend,
        )
        out, *more = out if need_weights else (out,)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if need_qk:
            more += (q, k)
        return (out, *more) if more else out
