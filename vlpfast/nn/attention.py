"""Attention over several kernels, and the module around it."""

from __future__ import annotations

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
    cu_seqlens: Tensor | None = None,  # [S + 1]
    max_seqlen: int | None = None,
    need_weights: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(Dh) + mask) v, [B, H, Lq, Dh] in the dtype of q.

    Args:
        q, k, v: one floating dtype, any strides with a dense last dimension. Self- or cross-attention.
        mask: "causal" (query i sees keys 0 .. i; Lq = Lk), a bool tensor (True = seen) or a float tensor (added to the scores),
            either broadcastable to [B, H, Lq, Lk]. Every query must see at least one key.
        cu_seqlens: int32, on q's device. S sequences of different lengths lie one after another in one row (B = 1, Lq = Lk) and
            each sees itself alone: sequence s is positions cu_seqlens[s] .. cu_seqlens[s + 1] - 1, the last entry is Lq. mask may
            be "causal".
        max_seqlen: the longest of these sequences, where the caller knows it on the host; flash-attn sizes its grid by it.
        need_weights: returns (output, weights [B, H, Lq, Lk]) by plain products, whatever the backend; both have gradients.
        backend: "sdpa" is torch's scaled_dot_product_attention; for packed sequences it needs a mask of L^2 bytes. "auto" takes
            flash-attn for packed sequences if it is installed and fits, else sdpa: for the other cases torch has kernels of the
            same kind as flash-attn and xformers.

    Raises:
        UserError: a backend that is forced but not installed, or does not fit these tensors; it says why.
        ValueError, TypeError: a wrong argument, named.
    """
    _check(q, k, v, mask, cu_seqlens, backend)
    causal = isinstance(mask, str)
    if need_weights:
        return _explicit(q, k, v, _dense_mask(q, causal, cu_seqlens) if causal or cu_seqlens is not None else mask)
    chosen = choose_backend(q.device, q.dtype, q.shape[-1], mask, cu_seqlens is not None, backend)
    if chosen == "flash_attn":
        return _flash_attn(q, k, v, causal, cu_seqlens, max_seqlen)
    if chosen == "xformers":
        return _xformers(q, k, v, causal)
    if cu_seqlens is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_dense_mask(q, causal, cu_seqlens))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if causal else mask, is_causal=causal)


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


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | str | None, cu_seqlens: Tensor | None, backend: str) -> None:
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
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
            raise ValueError(f"cu_seqlens: expected int32 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
        if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
            raise ValueError(f"cu_seqlens: expected q and k [1, H, L, Dh], got {tuple(q.shape)} and {tuple(k.shape)}")
        if isinstance(mask, Tensor):
            raise ValueError("mask: expected None or 'causal' beside cu_seqlens, got a tensor")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def _dense_mask(q: Tensor, causal: bool, cu_seqlens: Tensor | None) -> Tensor:
    """[L, L] bool, True = seen, for causal and packed attention."""
    position = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    seen = position[:, None] >= position if causal else torch.ones((), dtype=torch.bool, device=q.device)
    if cu_seqlens is not None:
        sequence = torch.bucketize(position, cu_seqlens[1:], right=True)  # [L]
        seen = seen & (sequence[:, None] == sequence)
    return seen


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, Lq, Lk]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return weights @ v, weights


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Tensor:
    """flash-attn 2: heads after positions, packed sequences without the batch dimension."""
    if cu_seqlens is None:
        from flash_attn import flash_attn_func

        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal).transpose(1, 2)
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
        causal=causal,
    )
    return out.transpose(0, 1)[None]


def _xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if causal else None
    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=bias).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of x with itself or, given context_width, of x with a context; as torch.nn.MultiheadAttention.

    One product makes queries, keys and values (of a context: keys and values); in_proj holds MultiheadAttention's in_proj_weight
    and in_proj_bias. See `attention` for everything by keyword.
    """

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, backend: Backend = "auto") -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"heads: expected a divisor of the width {width}, got {heads}")
        require_installed(backend)
        self.heads = heads
        self.backend = backend
        self.takes_context = context_width is not None
        if context_width is None:
            self.in_proj = nn.Linear(width, 3 * width)
        else:
            self.q_proj = nn.Linear(width, width)
            self.kv_proj = nn.Linear(context_width, 2 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,  # [B, L, width]
        context: Tensor | None = None,  # [B, Lc, context_width]
        *,
        mask: Tensor | Literal["causal"] | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """-> [B, L, width], with need_weights also the weights [B, heads, L, L or Lc]."""
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
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            need_weights=need_weights,
            backend=self.backend,
        )
        out, *weights = out if need_weights else (out,)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return (out, *weights) if need_weights else out
