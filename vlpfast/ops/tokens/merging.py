"""Merging tokens as a `Match` says, undoing it, and following patches through several merges."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlpfast.ops import backends, debug
from vlpfast.ops._checks import check_choice
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.tokens import reference
from vlpfast.ops.tokens._checks import check_of_tokens, check_tokens
from vlpfast.ops.tokens.autograd import Merge, Unmerge
from vlpfast.ops.tokens.matching import Match

KERNELS = {"cpp": "cpu"}  # beside `reference`: backend -> device type


def merge(
    x: Tensor,
    match: Match,
    size: Tensor | None = None,
    *,
    mode: Literal["mean", "weighted", "sum", "max"] = "mean",
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merged tokens and how many of the first tokens each of them stands for.

    Args:
        x: [B, N, C] float32, float64, bfloat16 or float16.
        match: of N tokens.
        size: [B, N] how many tokens each one stands for already; None: one.
        mode: what becomes of the tokens that are merged into one: their "mean"; "weighted", their mean weighted by size
            (sum of size * x over sum of size, ToMe's); their "sum"; of each channel the largest ("max", whose gradient goes to
            the first of equal ones: the token that stays, then the others in the order of match.source).
        weights: [B, N] >= 0, with mode="mean" alone: the mean weighted by them.

    Returns:
        y [B, N - r, C] of x's dtype, sums made in float32 (float64) and rounded once, and size [B, N - r] float32 (float64).
        Tokens that nothing is merged into are unchanged. A mean whose weights (or sizes) are all 0 is 0.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Gradients reach x, weights and size: gathers, of the same bits every time. Bolya et al. 2023, "Token merging".
    """
    check_tokens("x", x)
    _check_match(match, x, "x", 1)
    check_choice("mode", mode, ("mean", "weighted", "sum", "max"))
    if size is not None:
        check_of_tokens("size", size, x)
    if weights is not None:
        check_of_tokens("weights", weights, x)
        debug.check_within("weights", weights, 0, torch.finfo(weights.dtype).max)
        if mode != "mean":
            raise ValueError(f"weights: expected None but with mode='mean', got weights and mode={mode!r}")
    weight = size if mode == "weighted" else weights
    y, total = _merge(x, match, weight, mode in ("mean", "weighted"), mode == "max")
    if weight is not size:
        _, total = _merge(x[..., :0], match, size, False, False)
    return y, total


def unmerge(y: Tensor, match: Match) -> Tensor:
    """Gives every token what it was merged into: y [B, N - r, C] -> [B, N, C], of the same dtype.

    Raises: TypeError, ValueError: a wrong argument, named; a match of another number of tokens.
    """
    check_tokens("y", y, "[B, N - r, C]")
    _check_match(match, y, "y", 0)
    backend = backends.choose("unmerge", KERNELS, y.device, y.dtype)
    if backend == "reference":
        return reference.unmerge(y, match.index)
    return Unmerge.apply(backend, y, *match)


def track(place: Tensor | None, match: Match) -> Tensor:
    """Where each of the first tokens is after a further merge, [B, N0] int64: for pictures of what was merged.

    place: what `track` gave for the merge before, with values in [0, N) for this match of N tokens; None: this is the first one.
    """
    if place is None:
        return match.index
    if not isinstance(place, Tensor) or place.dtype != torch.int64:
        raise TypeError(f"place: expected an int64 tensor or None, got {getattr(place, 'dtype', type(place).__name__)}")
    if place.ndim != 2 or place.shape[0] != match.index.shape[0]:
        raise ValueError(f"place: expected [{match.index.shape[0]}, tokens], got {tuple(place.shape)}")
    return match.index.gather(1, place)


def _merge(x: Tensor, match: Match, weight: Tensor | None, divide: bool, largest: bool) -> tuple[Tensor, Tensor]:
    if weight is not None:
        weight = weight.to(accumulate_dtype(x.dtype))
    backend = backends.choose("merge", KERNELS, x.device, x.dtype)
    if backend == "reference":
        return reference.merge(x, *match, weight, divide, largest)
    keep = torch.is_grad_enabled() and (largest or (weight is not None and weight.requires_grad))
    return Merge.apply(backend, x, *match, weight, divide, largest, keep)


def _check_match(match: Match, tokens: Tensor, name: str, which: int) -> None:
    """which: whether `tokens` are those before (1) or after (0) merging."""
    if not isinstance(match, Match):
        raise TypeError(f"match: expected a Match, got {type(match).__name__}")
    for field, value in match._asdict().items():
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            raise TypeError(f"match.{field}: expected an int64 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.device != tokens.device:
            raise ValueError(f"match.{field}: expected device {tokens.device} as {name} has, got {value.device}")
        if value.ndim != 2:
            raise ValueError(f"match.{field}: expected two dimensions, got shape {tuple(value.shape)}")
    kept, source, index = match
    batch, n = index.shape
    if kept.shape[0] != batch or source.shape[0] != batch or kept.shape[1] + source.shape[1] != n:
        shapes = ", ".join(str(tuple(value.shape)) for value in match)
        raise ValueError(f"match: expected [B, N - r], [B, r] and [B, N], got {shapes}")
    expected = (batch, (kept.shape[1], n)[which])
    if tuple(tokens.shape[:2]) != expected:
        raise ValueError(f"{name}: expected [{expected[0]}, {expected[1]}, C] for this match, got {tuple(tokens.shape)}")
