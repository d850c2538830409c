"""Documents kept as int8 with a scale for each token: how they are made, and their late-interaction scores."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import DTYPES, check_choice, check_cu_seqlens, check_flag, check_mask
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.maxsim._checks import check_sets, check_tokens
from vlpfast.ops.maxsim.maxsim import KERNELS, maxsim, token_sets, unit_tokens


def quantize_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as int8 numbers in [-127, 127] and one scale for each token: symmetric, rounded to nearest, ties to even.

        scale = max |tokens| / 127,  codes = round(tokens / scale)

    No number of scale * codes is further from the token's than scale / 2, that is max |token| / 254 (1e-43 where the largest is
    below 1e-36 and float32 has no accurate scale). The product of a token with a query is off by at most scale / 2 times the sum
    of the query's magnitudes; at width 128 and unit length usually by 0.2 %.

    Args:
        tokens: [..., D], float32, float64, bfloat16 or float16. Nothing is differentiated.

    Returns:
        codes [..., D] int8 and scale [...] float32. A token of zeros has the scale 0; one with a number that is not finite (or
        beyond 127 times float32's range) has codes 0 and the scale NaN, which its document's scores then show.

    Raises:
        TypeError, ValueError: a wrong argument, named.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: expected a tensor, got {type(tokens).__name__}")
    if tokens.dtype not in DTYPES:
        raise TypeError(f"tokens: expected float32, float64, bfloat16 or float16, got {tokens.dtype}")
    if tokens.ndim == 0:
        raise ValueError("tokens: expected shape [..., D], got a 0-d tensor")
    with torch.no_grad():
        if tokens.shape[-1] == 0:
            return tokens.to(torch.int8), tokens.new_zeros(tokens.shape[:-1], dtype=torch.float32)
        exact = tokens.double()  # a quotient rounded in float32 could tip a number that lies in the middle
        scale = (exact.abs().amax(-1) / 127).float()
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        codes = (exact / scale[..., None]).round_().clamp_(-127, 127)
        return torch.where((scale > 0)[..., None], codes, 0).to(torch.int8), scale


def maxsim_int8(
    x: Tensor,
    y: Tensor,
    y_scale: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    normalize: bool = False,
    x_cu_seqlens: Tensor | None = None,
    y_cu_seqlens: Tensor | None = None,
) -> Tensor:
    """x_to_y of `maxsim` for documents that are kept as int8 (`quantize_tokens`), without a gradient: for search.

        x_to_y[m, n] = mean (or sum) over kept p of max over kept t of y_scale[n, t] * <x[m, p], y[n, t]>

    On a CPU the compiled kernel reads the int8 numbers where they are, in a memory-mapped file too, and holds 256 KiB of them (or
    one document) in float32 at a time; elsewhere all tokens are made first, y_scale * y, for `maxsim`. The kernel makes <x, y> of
    the int8 numbers themselves and multiplies by the scale afterwards: one rounding in place of one for each number, and results
    that differ from those of tokens made first by about 1e-7. Before the scale nothing may overflow: in float32 |x| |y| < 3e38.

    Args:
        x: M sets of query tokens [M, P, D] or packed [L, D], as in `maxsim`. Under autocast x alone (not float64) is cast.
        y: N documents [N, T, D] int8, any strides (or packed [L, D]).
        y_scale: [N, T] (or [L]) float32. A scale that is not finite makes its document's scores NaN, unless masked.
        x_mask, y_mask, reduction, x_cu_seqlens, y_cu_seqlens: as in `maxsim`.
        normalize: tokens of both sides at unit length. A document's token is then y / |y|, exact but for one rounding, with the
            scale's sign; of the scale nothing else counts but that 0 makes a token of zeros.

    Returns:
        [M, N] in float32, float64 for float64 x.

    Raises:
        TypeError, ValueError: a wrong argument, named; an x that requires a gradient where gradients are enabled.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    check_flag("normalize", normalize)
    check_tokens("x", x, x_mask, x_cu_seqlens, "[M, P, D]")
    _check_int8(y, y_scale, y_mask, y_cu_seqlens)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x: expected no gradient to be asked for (torch.no_grad()): there is none; got requires_grad=True")
    if normalize:
        x = unit_tokens(x)
    arguments = (y, y_scale, x_mask, y_mask, x_cu_seqlens, y_cu_seqlens, reduction, normalize)
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return _scores(x, *arguments)
    if x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _scores(x, *arguments)


def _scores(x, y, y_scale, x_mask, y_mask, x_cu_seqlens, y_cu_seqlens, reduction, normalize) -> Tensor:
    a, b = token_sets(x, x_mask, x_cu_seqlens), token_sets(y, y_mask, y_cu_seqlens)
    check_sets(x, y, a.count, b.count, "all")
    if backends.choose("maxsim", KERNELS, x.device, x.dtype) != "cpp":
        return maxsim(
            x, _tokens(y, y_scale, normalize, accumulate_dtype(x.dtype)), x_mask, y_mask, directions="x_to_y",
            reduction=reduction, x_cu_seqlens=x_cu_seqlens, y_cu_seqlens=y_cu_seqlens,
        )  # fmt: skip
    return torch.ops.vlpfast.maxsim_int8(
        a.tokens, b.tokens, y_scale.reshape(-1), a.start, b.start, a.keep, b.keep, a.longest, b.longest,
        reduction == "mean", normalize,
    )  # fmt: skip


def _tokens(codes: Tensor, scale: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    """What int8 numbers stand for: the definition."""
    finite = torch.where(scale.isfinite(), scale, torch.nan)[..., None].to(dtype)
    if not normalize:
        return codes.to(dtype) * finite
    return unit_tokens(codes.to(dtype)) * (finite.sign() + 0 * finite)  # the sign of NaN is 0


def _check_int8(y: Any, y_scale: Any, mask: Any, cu_seqlens: Any) -> None:
    for name, value, dtype in (("y", y, torch.int8), ("y_scale", y_scale, torch.float32)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    expected = "[L, D] with y_cu_seqlens" if cu_seqlens is not None else "[N, T, D]"
    if y.ndim != (2 if cu_seqlens is not None else 3):
        raise ValueError(f"y: expected shape {expected}, got {tuple(y.shape)}")
    if y_scale.shape != y.shape[:-1]:
        raise ValueError(f"y_scale: expected shape {tuple(y.shape[:-1])}, got {tuple(y_scale.shape)}")
    if y_scale.device != y.device:
        raise ValueError(f"y_scale: expected device {y.device} as y has, got {y_scale.device}")
    if mask is not None and cu_seqlens is not None:
        raise ValueError("y_mask: expected None with y_cu_seqlens, got a mask")
    if mask is not None:
        check_mask("y_mask", mask, y)
    if cu_seqlens is not None:
        check_cu_seqlens("y_cu_seqlens", cu_seqlens, y)
