"""merge and unmerge: the tokens that a Match brings together, and back; add_merge_norm: merge with what a block has around it;
track: where each token went."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vlpfast.ops import backends, debug
from vlpfast.ops._checks import DTYPES, check_choice, same_dtype
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.tokens import reference
from vlpfast.ops.tokens.autograd import AddMergeNorm, Merge, Unmerge
from vlpfast.ops.tokens.matching import Match

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type


def merge(
    x: Tensor,
    match: Match,
    size: Tensor | None = None,
    *,
    mode: Literal["mean", "weighted", "sum", "max"] = "mean",
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges tokens as `match` says, and adds up how many each stands for.

    Args:
        x: [B, N, C] float32, float64, bfloat16 or float16, any strides; summed in float32 (float64), rounded once.
        match: for B x N tokens.
        size: [B, N] or [B, N, 1], what each token weighs, >= 0: what this function returned in the layer before. None: 1 each.
        mode: of the tokens that come together
            "mean": their mean, whatever their sizes, as ToMe's "mean" and SimVLG; with `weights` the mean under these;
            "weighted": the mean under their sizes, sum(size * x) / sum(size): ToMe in all layers after one another;
            "sum": their sum; "max": the largest of each channel, the lowest place on ties (it gets the gradient).
        weights: [B, N] or [B, N, 1], >= 0; for "mean" alone. Where all that come together are 0, the mean is 0, without gradient.

    Returns:
        y: [B, N - r, C] in x's dtype. A token that nothing merges into is copied, bit for bit (unless it weighs 0: then 0).
        size: [B, N - r] in float32, float64 beside float64 tokens: the sums of `size`.

    Gradients go to x, and to size and weights if they want it. A NaN stays with the tokens it is merged with; a token that
    weighs 0 may hold anything.

    Raises:
        TypeError, ValueError: a wrong argument, named; negative weights under VLPFAST_DEBUG=1 alone.

    Bolya et al. 2023, "Token merging: your ViT but faster", section 3.
    """
    check_choice("mode", mode, ("mean", "weighted", "sum", "max"))
    _check_tokens("x", x)
    _check_match(match, x, "index")
    wide = accumulate_dtype(x.dtype)
    size = _checked_weights("size", size, x)
    if weights is not None and mode != "mean":
        raise ValueError(f"weights: expected None with mode={mode!r} (they are for 'mean'), got a tensor")
    weight = size if mode == "weighted" else _checked_weights("weights", weights, x)
    y, total = _merge(x, match, weight, mode in ("mean", "weighted"), mode == "max")
    if weight is not size:
        tokens = x.new_ones(x.shape[:2], dtype=wide) if size is None else size
        total = _merge(tokens[..., None], match, None, False, False)[0].squeeze(-1)
    return y, total


def add_merge_norm(
    x: Tensor,
    delta: Tensor,
    match: Match,
    size: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mode: Literal["mean", "weighted"] = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """merge between a residual and a layer norm, in one pass over the tokens.

    y, size = merge(x + delta, match, size, mode=mode); normed = layer_norm(y, C, weight, bias, eps): what a block of ToMe does
    between its attention, which gives delta, and its feed-forward part.

    Args:
        x: [B, N, C] float32, float64, bfloat16 or float16, any strides.
        delta: [B, N, C] likewise. Where the dtypes differ the sum has the wider one, as in torch.
        match, size, mode: as merge has them, but for size's gradient: there is none, and one that is asked for is an error.
        weight, bias: [C] of the norm, any of these dtypes; None: ones, zeros. They are read in the accumulating dtype.
        eps: >= 0, added to the variance.

    Returns:
        y: [B, N - r, C] in the dtype of x + delta: the means of the sums, which are made in float32 (float64) and rounded once.
        size: [B, N - r] as merge's.
        normed: [B, N - r, C] the layer norm of y, computed in float32 (float64). In y's dtype; under autocast as layer_norm: on
            CUDA in float32, float64 for float64.

    Gradients go to x, delta, weight and bias; the same bits for any number of threads.

    Raises:
        TypeError, ValueError: a wrong argument, named; on CUDA more than 8192 channels.

    Bolya et al. 2023, "Token merging: your ViT but faster", section 3; Ba et al. 2016, "Layer normalization".
    """
    check_choice("mode", mode, ("mean", "weighted"))
    _check_tokens("x", x)
    _check_tokens("delta", delta)
    if delta.shape != x.shape:
        raise ValueError(f"delta: expected x's shape {tuple(x.shape)}, got {tuple(delta.shape)}")
    if delta.device != x.device:
        raise ValueError(f"delta: expected device {x.device} as x has, got {delta.device}")
    _check_match(match, x, "index")
    if isinstance(size, Tensor) and size.requires_grad and torch.is_grad_enabled():
        raise ValueError("size: expected a tensor that wants no gradient (merge has one), got one that requires it")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps: expected >= 0, got {eps}")
    x, wider = same_dtype(x, delta)
    wide_dtype = accumulate_dtype(x.dtype)
    if x.dtype != torch.float32:  # beside it a half type is read as it is
        delta = wider
    size = _checked_weights("size", size, x)
    weight, bias = _checked_channels("weight", weight, x, 1), _checked_channels("bias", bias, x, 0)
    wide = x.is_cuda and torch.is_autocast_enabled("cuda") and wide_dtype != x.dtype
    weighted = mode == "weighted" and size is not None
    backend = backends.choose("merge", KERNELS, x.device, x.dtype)
    if backend == "reference":
        return reference.add_merge_norm(x, delta, match.index, match.kept.shape[1], size, weight, bias, eps, weighted, wide)
    y, total, normed, _ = AddMergeNorm.apply(backend, x, delta, size, *match, weight, bias, float(eps), weighted, wide)
    return y, total, normed


def unmerge(y: Tensor, match: Match) -> Tensor:
    """[B, N, C]: each of the N tokens gets what it was merged into, y [B, N - r, C], float32, float64, bfloat16 or float16.

    merge(mode="mean") of the result is y again. The gradient of a token of y is the sum of those that got it.

    Raises:
        TypeError, ValueError: a wrong argument, named; a match of another size.
    """
    _check_tokens("y", y)
    _check_match(match, y, "kept")
    backend = backends.choose("merge", KERNELS, y.device, y.dtype)
    if backend == "reference":
        return reference.unmerge(y, match.index)
    return Unmerge.apply(backend, y, match.index, match.kept, match.source, match.target)


def track(place: Tensor | None, match: Match) -> Tensor:
    """[B, N0] int64: the place in the present sequence of each of the N0 tokens there were at first, for pictures of what merged.

    place: what this function returned in the layer before, None in the first.

    Raises:
        TypeError, ValueError: a wrong argument, named.
    """
    if place is None:
        _check_match(match, None, "index")
        return match.index
    if not isinstance(place, Tensor):
        raise TypeError(f"place: expected a tensor or None, got {type(place).__name__}")
    if place.dtype != torch.int64:
        raise TypeError(f"place: expected torch.int64, got {place.dtype}")
    _check_match(match, None, "index")
    if place.ndim != 2 or place.shape[0] != match.index.shape[0]:
        raise ValueError(f"place: expected shape [{match.index.shape[0]}, N0], got {tuple(place.shape)}")
    if place.device != match.index.device:
        raise ValueError(f"place: expected device {match.index.device} as match has, got {place.device}")
    return match.index.gather(1, place)


def _merge(x: Tensor, match: Match, weight: Tensor | None, mean: bool, largest: bool) -> tuple[Tensor, Tensor]:
    backend = backends.choose("merge", KERNELS, x.device, x.dtype)
    if backend == "reference":
        return reference.merge(x, match.index, match.kept.shape[1], weight, mean=mean, largest=largest)
    of_weight = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    return Merge.apply(
        backend, x, weight, match.index, match.kept, match.source, match.target, mean, largest, largest or of_weight
    )


def _check_tokens(name: str, tokens: Any) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tokens).__name__}")
    if tokens.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tokens.dtype}")
    if tokens.ndim != 3:
        raise ValueError(f"{name}: expected shape [B, N, C], got {tuple(tokens.shape)}")


def _check_match(match: Any, tokens: Tensor | None, side: str) -> None:
    """side: "index", the tokens before merging, or "kept", those after it."""
    if not isinstance(match, Match):
        raise TypeError(f"match: expected a Match, got {type(match).__name__}")
    if tokens is None:
        return
    of = getattr(match, side)
    if of.shape != tokens.shape[:2]:
        expected = f"{tokens.shape[0]} x {tokens.shape[1]} tokens {'before' if side == 'index' else 'after'} merging"
        raise ValueError(f"match: expected one with {expected}, got {' x '.join(map(str, of.shape))}")
    if of.device != tokens.device:
        raise ValueError(f"match: expected device {tokens.device} as the tokens have, got {of.device}")


def _checked_weights(name: str, weights: Any, x: Tensor) -> Tensor | None:
    """[B, N] in the accumulating dtype."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(weights).__name__}")
    if weights.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {weights.dtype}")
    if weights.shape not in (x.shape[:2], (*x.shape[:2], 1)):
        b, n = x.shape[:2]
        raise ValueError(f"{name}: expected shape {(b, n)} or {(b, n, 1)}, got {tuple(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as x has, got {weights.device}")
    debug.check_within(name, weights, 0, torch.inf)
    return weights.reshape(x.shape[:2]).to(accumulate_dtype(x.dtype))


def _checked_channels(name: str, numbers: Any, x: Tensor, fill: float) -> Tensor:
    """[C] in the accumulating dtype; None: all `fill`."""
    dtype, channels = accumulate_dtype(x.dtype), x.shape[2]
    if numbers is None:
        return x.new_full((channels,), fill, dtype=dtype)
    if not isinstance(numbers, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(numbers).__name__}")
    if numbers.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {numbers.dtype}")
    if numbers.shape != (channels,):
        raise ValueError(f"{name}: expected shape {(channels,)}, got {tuple(numbers.shape)}")
    if numbers.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as x has, got {numbers.device}")
    return numbers.to(dtype)
