"""maxsim: late interaction between sets of tokens, without the products of all their tokens."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops import backends, debug
from vlpfast.ops._checks import check_choice, check_flag, check_stash_bytes
from vlpfast.ops._schemas import accumulate_dtype, maxsim_index_dtype
from vlpfast.ops.maxsim import reference
from vlpfast.ops.maxsim._checks import check_masked, check_sets, check_tokens
from vlpfast.ops.maxsim.autograd import MaxSim

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type
STASH_BYTES = 1 << 30


@overload
def maxsim(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    directions: Literal["both"] = "both",
    reduction: Literal["mean", "sum"] = "mean",
    pairs: Literal["all", "aligned", "own"] = "all",
    masked: Literal["ignore", "zero"] = "ignore",
    normalize: bool = False,
    x_cu_seqlens: Tensor | None = None,
    y_cu_seqlens: Tensor | None = None,
    stash_bytes: int = STASH_BYTES,
) -> tuple[Tensor, Tensor]: ...


@overload
def maxsim(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    directions: Literal["x_to_y", "y_to_x"],
    reduction: Literal["mean", "sum"] = "mean",
    pairs: Literal["all", "aligned", "own"] = "all",
    masked: Literal["ignore", "zero"] = "ignore",
    normalize: bool = False,
    x_cu_seqlens: Tensor | None = None,
    y_cu_seqlens: Tensor | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Tensor: ...


def maxsim(x, y, x_mask=None, y_mask=None, *, directions="both", reduction="mean", pairs="all", masked="ignore",
           normalize=False, x_cu_seqlens=None, y_cu_seqlens=None, stash_bytes=STASH_BYTES):  # fmt: skip
    """The mean over the tokens of one set of the largest product of each with a token of another set, for pairs of sets.

        x_to_y[m, n] = mean (or sum) over kept p of max over kept t of <x[m, p], y[n, t]>
        y_to_x[m, n] = mean (or sum) over kept t of max over kept p of <x[m, p], y[n, t]>

    ColBERT's score of a query x and a document y is x_to_y with reduction="sum", FILIP's two similarities are both with "mean".
    The products are never held: both directions come from one pass over them. The gradient goes to the winners alone, on ties
    to the lowest index.

    Args:
        x: M sets of tokens [M, P, D], float32, float64, bfloat16 or float16, any strides; half types are multiplied and summed
            in float32. Of two different dtypes the wider is used. Under autocast x and y (float64 apart) are cast to its dtype.
        y: N sets of tokens [N, T, D]; with pairs="own" K sets for each of x, [M, K, T, D].
        x_mask, y_mask: [M, P] and [N, T] (or [M, K, T]) bool, True = keep; None keeps all.
        directions: "both" -> (x_to_y, y_to_x); "x_to_y" or "y_to_x" -> that one alone.
        reduction: "mean" over the kept tokens of a set, or their "sum".
        pairs: "all" M x N; "aligned", x[n] with y[n] alone; "own", x[m] with its own candidates y[m, k] alone.
        masked: "ignore": masked tokens take no part, and a pair with a set without kept tokens scores 0, without gradient.
            "zero": the products of masked tokens are 0 and take part in the largest; where one is it, there is no gradient.
        normalize: tokens are brought to unit length first, in float32 and rounded to their dtype; gradients go through it.
            Zero vectors stay zero, without gradient.
        x_cu_seqlens: int32 or int64 [M + 1] for packed sets: x is [L, D] and set m has the tokens from x_cu_seqlens[m] to
            x_cu_seqlens[m + 1]; no mask then.
        y_cu_seqlens: likewise [N + 1], with pairs="own" [M * K + 1].
        stash_bytes: the forward keeps every token's winner for the backward (1, 2 or 4 bytes each) if all fit; otherwise the
            backward makes the products again.

    Returns:
        [M, N] ("aligned": [N], "own": [M, K]) in float32, float64 for float64 tokens. A NaN in a kept token makes the scores of
        its pairs NaN, no others.

    Raises:
        TypeError, ValueError: a wrong argument, named. Values of cu_seqlens are checked only where they are on the host (on a
            device under VLPFAST_DEBUG=1).

    Khattab and Zaharia 2020, "ColBERT"; Yao et al. 2022, "FILIP"; masked="zero" is how Wukong's code pads.
    """
    check_choice("directions", directions, ("both", "x_to_y", "y_to_x"))
    check_choice("reduction", reduction, ("mean", "sum"))
    check_choice("pairs", pairs, ("all", "aligned", "own"))
    check_masked(masked, x_cu_seqlens=x_cu_seqlens, y_cu_seqlens=y_cu_seqlens)
    check_flag("normalize", normalize)
    check_stash_bytes(stash_bytes)
    check_tokens("x", x, x_mask, x_cu_seqlens, "[M, P, D]")
    check_tokens("y", y, y_mask, y_cu_seqlens, "[M, K, T, D]" if pairs == "own" else "[N, T, D]")
    if normalize:
        x, y = unit_tokens(x), unit_tokens(y)
    a, b = token_sets(x, x_mask, x_cu_seqlens), token_sets(y, y_mask, y_cu_seqlens)
    check_sets(x, y, a.count, b.count, pairs)
    candidates = {"all": None, "aligned": 1, "own": y.shape[1] if y.ndim == 4 else b.count // max(1, a.count)}[pairs]
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        scores = _maxsim(a, b, candidates, directions, reduction, masked, stash_bytes)
    else:
        if torch.promote_types(x.dtype, y.dtype) != torch.float64:
            a, b = (s._replace(tokens=s.tokens.to(torch.get_autocast_dtype(device))) for s in (a, b))
        with torch.autocast(device, enabled=False):
            scores = _maxsim(a, b, candidates, directions, reduction, masked, stash_bytes)
    if pairs == "aligned":
        scores = (scores[0][:, 0], scores[1][:, 0])
    return {"both": scores, "x_to_y": scores[0], "y_to_x": scores[1]}[directions]


class _Sets(NamedTuple):
    """One side: set i has the rows start[i] to start[i + 1] of `tokens`, at most `longest`."""

    tokens: Tensor  # [L, D]
    start: Tensor  # [count + 1] int64
    keep: Tensor | None  # [L] bool
    count: int
    longest: int


def token_sets(tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> _Sets:
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        longest = int(lengths.max()) if debug.readable(cu_seqlens) and len(lengths) else tokens.shape[0]
        return _Sets(tokens, cu_seqlens.to(torch.int64), None, cu_seqlens.shape[0] - 1, longest)
    *sets, length, width = tokens.shape
    count = math.prod(sets)
    if length and not torch.compiler.is_compiling():  # one launch; compilers fuse the other form, whose shape is plainer
        start = torch.arange(0, count * length + 1, length, device=tokens.device)
    else:
        start = length * torch.arange(count + 1, device=tokens.device)
    keep = mask.reshape(count * length) if mask is not None else None
    return _Sets(tokens.reshape(count * length, width), start, keep, count, length)


def _maxsim(x: _Sets, y: _Sets, candidates: int | None, directions, reduction, masked, stash_bytes) -> tuple[Tensor, Tensor]:
    """x_to_y and y_to_x, [M, N] or [M, candidates]; nothing useful for a direction that is not asked for."""
    wide = torch.promote_types(x.tokens.dtype, y.tokens.dtype)
    backend = backends.choose("maxsim", KERNELS, x.tokens.device, wide)
    if backend != "cpp" or wide == torch.float64:  # C++ reads either side's half types where they are
        x, y = (s._replace(tokens=s.tokens.to(wide)) for s in (x, y))
    if backend == "reference":
        padded_x, x_mask = _padded(x)
        padded_y, y_mask = _padded(y)
        if candidates is not None:
            shape = (x.count, candidates, y_mask.shape[1])
            padded_y, y_mask = padded_y.reshape(*shape, padded_y.shape[-1]), y_mask.reshape(shape)
        return reference.maxsim(padded_x, padded_y, x_mask, y_mask, reduction=reduction, masked=masked)
    want_x, want_y = directions != "y_to_x", directions != "x_to_y"
    rows = y.count if candidates is None else candidates
    size = (
        want_x * rows * x.tokens.shape[0] * maxsim_index_dtype(y.longest).itemsize
        + want_y * (x.count if candidates is None else 1) * y.tokens.shape[0] * maxsim_index_dtype(x.longest).itemsize
    )
    # Dynamo refuses a Function that is given one tensor twice
    y_tokens, y_start = (b.view_as(b) if b is a else b for a, b in ((x.tokens, y.tokens), (x.start, y.start)))
    y_keep = y.keep.view_as(y.keep) if y.keep is not None and y.keep is x.keep else y.keep
    differentiable = torch.is_grad_enabled() and (x.tokens.requires_grad or y.tokens.requires_grad)
    return MaxSim.apply(
        backend, x.tokens, y_tokens, x.start, y_start, x.keep, y_keep, x.longest, y.longest, candidates,
        want_x, want_y, reduction == "mean", masked == "zero", differentiable and size <= stash_bytes,
    )[:2]  # fmt: skip


def _padded(sets: _Sets) -> tuple[Tensor, Tensor]:
    """[count, longest, D] with zeros after each set's end, and a mask of what is kept."""
    place = torch.arange(sets.longest, device=sets.start.device)
    index = sets.start[:-1, None] + place  # [count, longest]
    there = index < sets.start[1:, None]
    index = torch.where(there, index, sets.tokens.shape[0])
    tokens = F.pad(sets.tokens, (0, 0, 0, 1))[index]
    return tokens, there if sets.keep is None else F.pad(sets.keep, (0, 1))[index]


def unit_tokens(tokens: Tensor) -> Tensor:
    """Rows of unit length, made in the accumulating dtype; a zero row stays, without gradient."""
    wide = tokens.to(accumulate_dtype(tokens.dtype))
    square = wide.square().sum(-1, keepdim=True)
    length = torch.where(square > 0, square, 1).sqrt()
    return torch.where(square == 0, 0, wide / length).to(tokens.dtype)
