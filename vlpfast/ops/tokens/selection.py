"""select: the tokens with the highest scores, and one made of the others; importance: what a few queries attend to."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from vlpfast.ops import backends, debug
from vlpfast.ops._checks import DTYPES, check_choice, check_count, check_flag, check_mask
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.tokens import reference_selection as reference
from vlpfast.ops.tokens.selection_autograd import Select

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type


def select(
    x: Tensor,
    score: Tensor,
    k: int,
    *,
    rest: Literal["drop", "fuse"] = "drop",
    order: Literal["position", "score"] = "position",
    protect: int = 0,
    mask: Tensor | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k tokens with the highest scores of every image, and with rest="fuse" one token made of all others.

    The fused token is EViT's: the sum of score * token over the tokens that are not kept, and with `normalize` this divided by
    the sum of their scores. BUS and TRIPS select with a class token protected and the rest fused: the next layer sees
    [class, kept, fused].

    Args:
        x: [B, N, C] float32, float64, bfloat16 or float16, any strides.
        score: [B, N], one of these dtypes, of its own. On ties the lower index goes first; NaN comes after all numbers (-inf
            too). Its gradient comes through the fused token alone: what is chosen has none. Scores of protected tokens are not
            looked at.
        k: 0 to N - protect.
        rest: "drop" what is not kept, or "fuse" it.
        order: the k tokens by "position", or by "score", the highest first.
        protect: so many tokens at the front are kept whatever their scores, beside k, and come first.
        mask: [B, N] bool, True = keep, False = padding: it comes after all tokens that are none, NaN too, so that it is kept only
            where k is more than there are of these (the first of it then; mask.gather(1, indices) tells), and it is never fused.
            Protected tokens are kept whatever their mask.
        normalize: with rest="fuse", the weights are divided by their sum. Where this is 0 the token is 0, without gradient.

    Returns:
        kept [B, protect + k, C] in x's dtype, with rest="fuse" [B, protect + k + 1, C], the fused token last (summed in float32,
        float64 for float64 tokens; 0 if all are kept; NaN if a score or token in it is), and indices [B, protect + k] int64 of
        what is kept.

    Raises:
        TypeError, ValueError: a wrong argument, named; a score that is NaN under VLPFAST_DEBUG=1 alone.

    Liang et al. 2022, "Not all patches are what you need" (EViT); Jiang et al. 2023, "BUS"; Ye et al. 2024, "TRIPS".
    """
    check_choice("rest", rest, ("drop", "fuse"))
    check_choice("order", order, ("position", "score"))
    check_flag("normalize", normalize)
    if normalize and rest == "drop":
        raise ValueError("normalize: expected False with rest='drop' (there is no fused token), got True")
    check_tokens("x", x)
    _check_score(score, x)
    check_protect(protect, x.shape[1])
    check_count("k", k, 0)
    if k > x.shape[1] - protect:
        raise ValueError(f"k: expected at most {x.shape[1] - protect}, the tokens that are not protected, got {k}")
    if mask is not None:
        check_mask("mask", mask, x)
    debug.check_within("score", score, -torch.inf, torch.inf)
    fuse, by_score = rest == "fuse", order == "score"
    score = score if fuse else score.detach()
    backend = backends.choose("select", KERNELS, x.device, x.dtype)
    if backend == "reference":
        return reference.select(x, score, k, protect=protect, mask=mask, by_score=by_score, fuse=fuse, normalize=normalize)
    return Select.apply(backend, x, score, mask, k, protect, by_score, fuse, normalize)


def importance(
    q: Tensor,
    k: Tensor,
    rows: int | Tensor | None = 0,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    mask: Tensor | None = None,
    heads: Literal["mean", "max", "each"] = "mean",
) -> Tensor:
    """What a few queries attend to: their rows of the attention matrix, without the others, so that attention itself stays fused.

    EViT scores tokens by the class token's row (rows=0, heads="mean"), FastV by the last token's (rows=-1). It is a product of
    R queries with all keys and a softmax, which torch does well: R * N numbers a head are nothing beside the keys themselves.

    Args:
        q: [B, H, Nq, Dh] float32, float64, bfloat16 or float16, any strides.
        k: [B, H, N, Dh] in q's dtype.
        rows: which queries: one, from the end if negative; int64 [R] (0 to Nq - 1), or [B, R], every sample's own; None: all.
        scale: of the products; None: Dh ** -0.5.
        lse: [B, H, Nq], the logarithm of the sum of exponentials of every query's scaled products, as fused attention returns
            it: the rows are exp(product - lse) then, parts of softmaxes over more keys than are given here.
        mask: [B, N] bool, True = keep: masked keys have importance 0, all of them where none is kept. Whether they are in the sum
            is lse's matter where it is given.
        heads: the "mean" over heads, their "max" (the gradient goes to the first that has it), or "each".

    Returns:
        [B, R, N], with heads="each" [B, H, R, N]; products, softmax and result in float32, float64 for float64 (autocast changes
        nothing). Differentiable any number of times.

    Raises:
        TypeError, ValueError: a wrong argument, named. Values of rows are checked only where they are on the host (on a device
        under VLPFAST_DEBUG=1).

    Liang et al. 2022, "Not all patches are what you need" (EViT); Chen et al. 2024, "An image is worth 1/2 tokens after layer 2"
    (FastV).
    """
    check_choice("heads", heads, ("mean", "max", "each"))
    _check_queries(q, k, scale)
    q, lse = _pick(q, lse, rows)
    keep = None
    if mask is not None:
        check_mask("mask", mask, k[:, 0])
        keep = mask[:, None, None]  # [B, 1, 1, N]
        k = k.masked_fill(~keep.mT, 0)  # masked keys may hold anything: a product of NaN and 0 would reach the gradient of q
    dtype, device = accumulate_dtype(q.dtype), q.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        logits = (q.to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.to(dtype).mT  # [B, H, R, N]
        if lse is not None:
            logits = logits - lse.to(dtype)[..., None]
        if keep is not None:
            logits = torch.where(keep, logits, -torch.inf)
        if lse is not None:
            attention = logits.exp()
        elif keep is None:
            attention = logits.softmax(-1)
        else:  # a softmax of -inf throughout, where no key is kept, would be NaN
            attention = torch.where(keep, logits.where(keep.any(-1, keepdim=True), 0).softmax(-1), 0)
        if heads == "each":
            return attention
        return attention.mean(1) if heads == "mean" else attention.max(1).values


def _pick(q: Tensor, lse: Tensor | None, rows: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
    """q [B, H, R, Dh] and lse [B, H, R] of the rows."""
    b, h, n, d = q.shape
    if lse is not None:
        if not isinstance(lse, Tensor) or not lse.is_floating_point():
            raise TypeError(f"lse: expected a floating tensor or None, got {_described(lse)}")
        if lse.shape != (b, h, n):
            raise ValueError(f"lse: expected shape {(b, h, n)}, got {tuple(lse.shape)}")
        if lse.device != q.device:
            raise ValueError(f"lse: expected device {q.device} as q has, got {lse.device}")
    if rows is None:
        return q, lse
    if isinstance(rows, int) and not isinstance(rows, bool):
        if not -n <= rows < n:
            raise ValueError(f"rows: expected {-n} to {n - 1}, got {rows}")
        return q[:, :, rows, None], None if lse is None else lse[:, :, rows, None]
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        raise TypeError(f"rows: expected an int, an int64 tensor or None, got {_described(rows)}")
    if rows.ndim not in (1, 2) or (rows.ndim == 2 and rows.shape[0] != b):
        raise ValueError(f"rows: expected shape [R] or [{b}, R], got {tuple(rows.shape)}")
    if rows.device != q.device:
        raise ValueError(f"rows: expected device {q.device} as q has, got {rows.device}")
    if debug.readable(rows) and rows.numel() and (rows.min() < 0 or rows.max() >= n):
        raise ValueError(f"rows: expected 0 to {n - 1}, got {int(rows.min())} to {int(rows.max())}")
    index = rows.expand(b, -1)[:, None].expand(-1, h, -1)  # [B, H, R]
    return q.gather(2, index[..., None].expand(-1, -1, -1, d)), None if lse is None else lse.gather(2, index)


def check_tokens(name: str, x: Any, shape: str = "[B, N, C]") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.ndim != 3:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")


def check_protect(protect: Any, tokens: int) -> None:
    check_count("protect", protect, 0)
    if protect > tokens:
        raise ValueError(f"protect: expected at most N = {tokens}, the tokens of an image, got {protect}")


def _check_score(score: Any, x: Tensor) -> None:
    if not isinstance(score, Tensor):
        raise TypeError(f"score: expected a tensor, got {type(score).__name__}")
    if score.dtype not in DTYPES:
        raise TypeError(f"score: expected float32, float64, bfloat16 or float16, got {score.dtype}")
    if score.shape != x.shape[:2]:
        raise ValueError(f"score: expected shape {tuple(x.shape[:2])}, got {tuple(score.shape)}")
    if score.device != x.device:
        raise ValueError(f"score: expected device {x.device} as x has, got {score.device}")


def _check_queries(q: Any, k: Any, scale: Any) -> None:
    for name, value in (("q", q), ("k", k)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")
        if value.ndim != 4:
            raise ValueError(f"{name}: expected shape [B, H, N, Dh], got {tuple(value.shape)}")
    b, h, _, d = q.shape
    if h == 0 or d == 0:
        raise ValueError(f"q: expected at least one head of at least one channel, got {tuple(q.shape)}")
    if (k.shape[0], k.shape[1], k.shape[3]) != (b, h, d):
        raise ValueError(f"k: expected shape [{b}, {h}, N, {d}], got {tuple(k.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected {q.dtype} as q has, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"k: expected device {q.device} as q has, got {k.device}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")


def _described(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
