"""Every operator on every backend that exists here, against the reference in float64 on the same numbers (a second)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.contrastive import (
    clip_loss,
    distill,
    distilled_contrastive_loss,
    pair,
    pair_distill,
    pair_logsumexp,
    pair_softplus,
    sample,
    sample_hard_negatives,
    sigmoid_loss,
    softplus,
)
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy
from vlpfast.ops.maxsim import KERNELS as MAXSIM_KERNELS
from vlpfast.ops.maxsim import maxsim, maxsim_int8, quantize_tokens, score_contrastive_loss
from vlpfast.ops.maxsim.score import KERNELS as SCORE_KERNELS
from vlpfast.ops.temporal import channel_shift, pool_tokens, segment_pool, temporal_attention, token_roll
from vlpfast.ops.temporal.attention import KERNELS as ATTENTION_KERNELS
from vlpfast.ops.temporal.pool import KERNELS as POOL_KERNELS
from vlpfast.ops.temporal.segments import KERNELS as SEGMENT_KERNELS
from vlpfast.ops.temporal.shift import KERNELS as SHIFT_KERNELS
from vlpfast.ops.tokens import (
    Match,
    add_merge_norm,
    bipartite_match,
    matching,
    merge,
    merging,
    random_mask,
    restore,
    select,
    selection,
    unmerge,
)

# Largest relative error of results and of gradients: some roundings of the dtype that each is returned in.
TOLERANCES = {
    torch.float32: (1e-5, 1e-4),
    torch.float64: (1e-12, 1e-10),
    torch.bfloat16: (1e-5, 8e-3),
    torch.float16: (1e-5, 2e-3),
}


@dataclass(frozen=True)
class Check:
    op: str
    backend: str
    dtype: torch.dtype | None  # None: this operator has no kernel of this backend, nothing was checked
    ok: bool
    detail: str  # the largest errors, or what was raised


def check() -> list[Check]:
    there = [name for name, reason in backends.available().items() if not reason]
    return [found for op in _CASES for backend in there for found in _checks(op, backend)]


def _checks(op: str, backend: str) -> list[Check]:
    kernels = _CASES[op][1]
    if backend != "reference" and backend not in kernels:
        return [Check(op, backend, None, True, f"{op} has no {backend} kernel")]
    return [_check(op, backend, backends.device_type(backend), dtype) for dtype in TOLERANCES if backends.takes(backend, dtype)]


def _pair_logsumexp(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.arange(max(len(x), len(y)), device=x.device) % 5
    return pair_logsumexp(x, y, scale, own=len(y) - len(x), leave_out=(ids[: len(x)], ids[: len(y)]), bias=bias)


def _clip_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (clip_loss(x, y[: len(x)], scale, stash_bytes=0),)


def _pair_softplus(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    ids = torch.arange(max(len(x), len(y)), device=x.device) % 5
    own = torch.arange(len(x), device=x.device) // 2  # columns repeat
    left_out = (ids[: len(x)], ids[: len(y)])
    return (pair_softplus(x, y, scale, own=own, leave_out=left_out, bias=bias - 3, negative_weight=0.5),)


def _sigmoid_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (sigmoid_loss(x, y, scale, bias[0] - 10, own=len(y) - len(x)),)


def _sample_hard_negatives(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    """The logits of what is drawn: other draws, other logits."""
    ids = torch.arange(max(len(x), len(y)), device=x.device) % 5
    columns = sample_hard_negatives(
        x, y, scale, 3, own=len(y) - len(x), leave_out=(ids[: len(x)], ids[: len(y)]), uniform=1e-2,
        seed=torch.tensor(5, device=x.device),
    )  # fmt: skip
    return (scale * (x[:, None].to(scale.dtype) * y[columns].to(scale.dtype)).sum(2),)


def _linear_cross_entropy(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    labels = torch.arange(len(x), device=x.device) % min(len(y), 5)  # 2 is ignored, the others repeat
    return (linear_cross_entropy(x, y, labels, bias=bias, ignore_index=2, label_smoothing=0.1, reduction="none"),)


def _pair_distill(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    ids = torch.arange(max(len(x), len(y)), device=x.device) % 5
    own = torch.arange(len(x), device=x.device) // 2  # columns repeat
    left_out = (ids[: len(x)], ids[: len(y)])
    x_t, y_t = x.flip(1), y.roll(1, 1)
    return pair_distill(x, y, x_t, y_t, scale, 0.7 * scale, own=own, leave_out=left_out, bias_t=bias)


def _distilled_contrastive_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    n, x_t = len(x), x.flip(1)
    return (distilled_contrastive_loss(x, y[:n], x_t, y[:n].roll(1, 1), scale, 0.4, row_negatives=y, col_negatives=x),)


def _maxsim(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x_sets, y_sets = (torch.tensor([0, len(t) // 2, len(t)], device=t.device) for t in (x, y))
    return maxsim(x, y, x_cu_seqlens=x_sets, y_cu_seqlens=y_sets)


def _maxsim_int8(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    """The scores have no gradient: they come as the bias's."""
    codes, y_scale = quantize_tokens(y.detach())
    x_sets, y_sets = (torch.tensor([0, len(t) // 2, len(t)], device=t.device) for t in (x, y))
    scores = maxsim_int8(x.detach(), codes, y_scale, x_cu_seqlens=x_sets, y_cu_seqlens=y_sets)
    return (bias[:1] * scores.flatten(),)


def _token_roll(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (token_roll(y[: len(y) // 4 * 4].reshape(1, -1, 2, y.shape[1]), 1, skip=0),)


def _channel_shift(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """In place too, of a copy."""
    fold = y.shape[1] // 3
    with torch.no_grad():
        in_place = channel_shift(y[None].clone(), fold, inplace=True)
    return channel_shift(y[None], fold), in_place


def _pool_tokens(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    tokens = y[: len(y) // 6 * 6].reshape(-1, 2, 3, y.shape[1])
    return pool_tokens(tokens, (3, 1, 2)), pool_tokens(tokens, (None, 3, 2), "max")


def _select(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The fused token is so small that its rounding to the tokens' dtype is below the tolerance of float32."""
    score = bias.abs()[None].expand(2, -1)
    kept, indices = select(torch.stack([y, y.flip(0)]), score, len(y) // 3, rest="fuse", normalize=True, protect=1)
    return torch.cat([kept[:, :-1].to(scale.dtype), 1e-3 * kept[:, -1:].to(scale.dtype)], 1), indices.to(scale.dtype)


def _random_mask(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    seed = torch.tensor([5, 6], device=x.device)
    kept, indices, inverse = random_mask(torch.stack([y, y.flip(0)]), 0.75, seed, protect=1, order="random")
    return kept, indices.to(scale.dtype), restore(kept, inverse, x[0])


def _bipartite_match(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    """What each token is merged into, and with whom: other places, other numbers."""
    metric = torch.cat([x, y])[None]
    index = bipartite_match(metric, len(x) // 2, protect=2).index
    return (scale * index.to(scale.dtype),)


def _thirds(y: Tensor) -> Match:
    """The same whatever the backend and its dtype."""
    with backends.use("reference"):
        return matching.kth_match(y.detach().double()[None], 3)


def _merge(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A mean in the accumulating dtype, in which nothing is rounded; what is largest, and unmerging, in the features' own."""
    match = _thirds(y)
    mean, size = merge(y.to(bias.dtype)[None], match, bias.exp()[None], mode="weighted")
    return mean, size, unmerge(merge(y[None], match, mode="max")[0], match)


def _add_merge_norm(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    match = _thirds(y)
    size, norm = bias.detach().exp()[None], scale / 14 * torch.linspace(0.5, 1.5, y.shape[1], dtype=scale.dtype, device=y.device)
    return add_merge_norm(y[None], y.flip(0)[None], match, size, weight=norm, bias=norm.flip(0), mode="weighted")


def _score_contrastive_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows further on, and both directions of a square."""
    scores = x.to(scale.dtype) @ y.to(scale.dtype).T
    square = scores[:, : len(x)]
    rows = score_contrastive_loss(scores, scores, scale, directions="rows", own=len(y) - len(x), label_smoothing=0.1)
    return rows, score_contrastive_loss(square, square.T, scale, col_weights=bias[: len(x)].detach().abs())


def _segment_pool(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """In every mode, of segments of which one is empty."""
    segments = torch.tensor([0, len(y) // 3, len(y) // 3, len(y)], device=y.device)
    pooled = [segment_pool(y, segments, mode) for mode in ("mean", "max", "logsumexp")]
    return *pooled, segment_pool(y, segments, "attention", score=bias)


def _temporal_attention(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    frames = y[: len(y) // 7 * 7].reshape(1, 7, -1, y.shape[1])
    return (
        temporal_attention(frames, frames.flip(1), frames.roll(1, 1), 1, scale=9.0),
        temporal_attention(frames, frames.flip(1), frames, 1, causal=True),
    )


# operator -> what is computed with it, and its kernels beside `reference`: backend -> device type
_CASES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], Mapping[str, str]]] = {
    "pair_logsumexp": (_pair_logsumexp, pair.KERNELS),
    "clip_loss": (_clip_loss, pair.KERNELS),
    "pair_softplus": (_pair_softplus, softplus.KERNELS),
    "sigmoid_loss": (_sigmoid_loss, softplus.KERNELS),
    "sample_hard_negatives": (_sample_hard_negatives, sample.KERNELS),
    "linear_cross_entropy": (_linear_cross_entropy, pair.KERNELS),
    "pair_distill": (_pair_distill, distill.KERNELS),
    "distilled_contrastive_loss": (_distilled_contrastive_loss, distill.KERNELS),
    "maxsim": (_maxsim, MAXSIM_KERNELS),
    "maxsim_int8": (_maxsim_int8, {"cpp": "cpu"}),
    "bipartite_match": (_bipartite_match, matching.KERNELS),
    "merge": (_merge, merging.KERNELS),
    "add_merge_norm": (_add_merge_norm, merging.KERNELS),
    "select": (_select, selection.KERNELS),
    "random_mask": (_random_mask, selection.KERNELS),
    "token_roll": (_token_roll, SHIFT_KERNELS),
    "channel_shift": (_channel_shift, SHIFT_KERNELS),
    "pool_tokens": (_pool_tokens, POOL_KERNELS),
    "score_contrastive_loss": (_score_contrastive_loss, SCORE_KERNELS),
    "segment_pool": (_segment_pool, SEGMENT_KERNELS),
    "temporal_attention": (_temporal_attention, ATTENTION_KERNELS),
}
_SHAPES = ((7, 7, 3), (33, 70, 24), (130, 131, 64))  # M, N, D


def _check(op: str, backend: str, device: str, dtype: torch.dtype) -> Check:
    errors, tolerances = torch.zeros(2), torch.tensor(TOLERANCES[dtype])
    try:
        for m, n, d in _SHAPES:
            inputs = _inputs(m, n, d, dtype, device)
            with backends.use("reference"):
                expected = _run(_CASES[op][0], [t.double() for t in inputs])
            with backends.use(backend):
                found = _run(_CASES[op][0], inputs)
            errors = errors.maximum(torch.tensor([_error(f, e) for f, e in zip(found, expected, strict=True)]))
            if found[0][0].dtype == dtype:  # results that are rounded to it are as exact as gradients, not as sums
                tolerances[0] = tolerances[1]
    except Exception as error:  # whatever goes wrong is the finding
        return Check(op, backend, dtype, False, f"{type(error).__name__}: {error}")
    ok = bool((errors <= tolerances).all())
    return Check(op, backend, dtype, ok, f"largest error {errors[0]:.0e}, of gradients {errors[1]:.0e}")


def _inputs(m: int, n: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(m)
    x, y = (torch.nn.functional.normalize(torch.randn(rows, d, generator=generator), dim=1) for rows in (m, n))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    features = [x.to(device, dtype), y.to(device, dtype)]
    return [*features, torch.tensor(14.3, dtype=wide, device=device), torch.randn(n, generator=generator).to(device, wide)]


def _run(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The function's results, and the gradients of a weighted sum of them."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = function(*leaves)
    total = sum((r * torch.linspace(0.5, 1.5, r.numel(), device=r.device).reshape(r.shape)).sum() for r in results)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [r.detach() for r in results], [g for g in gradients if g is not None]


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error (Frobenius) over pairs of tensors; infinite if there is a number that is none."""
    errors = [
        (f.double() - e).norm() / e.norm().clamp_min(torch.finfo(torch.float64).tiny)
        for f, e in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).nan_to_num(torch.inf).max())
