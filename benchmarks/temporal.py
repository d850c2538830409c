"""Frames: vlpfast beside the formulations of the papers' code, with time, memory and errors.

    python benchmarks/temporal.py --device cpu --threads 1    every subject at its full size, float32
    python benchmarks/temporal.py --device cpu --quick        small sizes, in seconds
    python benchmarks/temporal.py --subject roll --n 577

The unit is a copy into new memory of half the bytes that a subject must read and write, so that it moves as many. GB/s are
counted for float32: with half types they are half of what is shown.
    pool          PLLaVA's pooling of tokens [B, T, H, W, C] to [B, T, H / 2, W / 2, C], forward alone
    pool, train   with its gradient
    shift         TSM's shift of images [B T, C, H, W], fold = C / 8, forward alone; "in place" touches a quarter of it
    shift, train  with its gradient
    roll          All-in-one's rolling of N tokens, fold = N / 8, forward alone
    roll, train   with its gradient
    attention           12 heads over T frames at each of P positions, from one product of queries, keys and values [B, T, P, 3 C]
    attention, train    with its gradient, which is one tensor again
    segments            the mean of segments of 48 to 96 tokens of C channels, L tokens together
    segments, train     with its gradient
    scores              their mean weighted by the softmax of scores, forward alone
    scores, train       with the tokens' gradient
How time, memory and errors are taken is told in benchmarks/_measure.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _measure
import torch
import torch.nn.functional as F
from _measure import Formulation, Inputs, Size, Subject
from torch import Tensor

from vlpfast.ops.temporal import channel_shift, pool_tokens, segment_pool, temporal_attention, token_roll

HEADS = 12


class _Taken(torch.autograd.Function):
    """The first number of x, with `grad` as x's gradient: that of a sum is one number seen everywhere, as no network has it."""

    @staticmethod
    def forward(x: Tensor, grad: Tensor) -> Tensor:
        return x.flatten()[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def trained(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, grad: _Taken.apply(function(x), grad)


def inputs(shape: tuple[int, ...], grad: tuple[int, ...] | None, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    if grad is None:
        return {"x": x}
    return {"x": x.requires_grad_(), "grad": torch.randn(grad, generator=generator).to(device, dtype)}


def lengths(tokens: int) -> list[int]:
    """Of segments: 3/4 of the longest on average, 96 tokens."""
    cycle = (96, 48, 72, 96, 60, 84, 48, 72)
    found: list[int] = []
    while sum(found) < tokens:
        found.append(min(cycle[len(found) % 8], tokens - sum(found)))
    return found


def starts(x: Tensor) -> Tensor:
    return torch.tensor([0, *lengths(len(x))], device=x.device).cumsum(0)


def scores(x: Tensor) -> Tensor:
    return torch.linspace(
        -20, 20, len(x), device=x.device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    ).sin()


# --- the papers' forms, written from their definitions ----------------------------------------------------------------


def pool_eager(x: Tensor) -> Tensor:
    """Channels first for torch's pool, and back."""
    _, t, h, w, _ = x.shape
    return F.adaptive_avg_pool3d(x.permute(0, 4, 1, 2, 3), (t, h // 2, w // 2)).permute(0, 2, 3, 4, 1).contiguous()


def shift_eager(x: Tensor) -> Tensor:
    frames, fold = x.unflatten(0, (-1, 8)), x.shape[1] // 8
    out = torch.zeros_like(frames)
    out[:, :-1, :fold] = frames[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = frames[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = frames[:, :, 2 * fold :]
    return out.flatten(0, 1)


def roll_eager(x: Tensor) -> Tensor:
    fold = x.shape[2] // 8
    first, before, middle, after = x.split([1, fold, x.shape[2] - 1 - 2 * fold, fold], 2)
    return torch.cat([first, before.roll(1, 1), middle, after.roll(-1, 1)], 2)


def attention_eager(x: Tensor) -> Tensor:
    """Positions among clips for torch's attention, and back."""
    batch, _, positions, _ = x.shape
    q, k, v = x.unflatten(-1, (3, HEADS, -1)).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [B * P, H, T, D] each
    out = F.scaled_dot_product_attention(q, k, v)
    return out.unflatten(0, (batch, positions)).permute(0, 3, 1, 2, 4).flatten(3)


def segments_eager(x: Tensor) -> Tensor:
    return torch.segment_reduce(x, "mean", lengths=torch.tensor(lengths(len(x)), device=x.device))


def scores_eager(x: Tensor) -> Tensor:
    """Softmax within segments by scattering, as graph libraries do it. (Padding by pad_sequence is far slower to train.)"""
    start, score = starts(x), scores(x)
    owner = torch.repeat_interleave(torch.arange(len(start) - 1, device=x.device), start.diff(), output_size=len(x))
    largest = score.new_full((len(start) - 1,), -torch.inf).scatter_reduce(0, owner, score, "amax")
    weight = (score - largest[owner]).exp()
    total = torch.zeros_like(largest).index_add(0, owner, weight)
    weighted = (weight / total[owner]).to(x.dtype)[:, None] * x
    return x.new_zeros(len(start) - 1, x.shape[1]).index_add(0, owner, weighted)


# --- subjects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    function: Callable[[Tensor], Tensor]  # vlpfast's
    eager: Callable[[Tensor], Tensor]
    shapes: Callable[[Size], tuple[tuple[int, ...], tuple[int, ...]]]  # of x and of the result
    moved: float  # numbers that are read and written by one forward, beside those of x
    moved_back: float | None = None  # by one backward, if it is another number


def tokens(s: Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (s["l"], s["c"]), (len(lengths(s["l"])), s["c"])


KINDS = {
    "pool": Kind(
        lambda x: pool_tokens(x, (None, x.shape[2] // 2, x.shape[3] // 2)),
        pool_eager,
        lambda s: ((s["b"], s["t"], s["h"], s["w"], s["c"]), (s["b"], s["t"], s["h"] // 2, s["w"] // 2, s["c"])),
        1.25,
    ),
    "shift": Kind(
        lambda x: channel_shift(x, x.shape[1] // 8, n_segment=8),
        shift_eager,
        lambda s: ((s["b"] * s["t"], s["c"], s["h"], s["w"]),) * 2,
        2,
    ),
    "roll": Kind(lambda x: token_roll(x, x.shape[2] // 8), roll_eager, lambda s: ((s["b"], s["t"], s["n"], s["c"]),) * 2, 2),
    "attention": Kind(
        lambda x: temporal_attention(*x.chunk(3, -1), HEADS),
        attention_eager,
        lambda s: ((s["b"], s["t"], s["p"], 3 * s["c"]), (s["b"], s["t"], s["p"], s["c"])),
        4 / 3,
        7 / 3,
    ),
    "segments": Kind(lambda x: segment_pool(x, starts(x)), segments_eager, tokens, 1),
    "scores": Kind(lambda x: segment_pool(x, starts(x), "attention", score=scores(x)), scores_eager, tokens, 1),
}


def formulations(kind: str, train: bool) -> dict[str, Formulation]:
    functions = {"vlpfast": KINDS[kind].function, "eager": KINDS[kind].eager}
    if torch.cuda.is_available():
        functions["eager, compiled"] = torch.compile(KINDS[kind].eager)
    if train:
        return {name: Formulation(trained(f), 2) for name, f in functions.items()}
    found = {name: Formulation(f, 1) for name, f in functions.items()}
    if kind == "shift":
        found["vlpfast, in place"] = Formulation(lambda x: channel_shift(x, x.shape[1] // 8, n_segment=8, inplace=True), 0.25)
    return found


def subject(kind: str, train: bool, cpu: Size, cuda: Size, quick: Size) -> Subject:
    shapes, moved, moved_back = KINDS[kind].shapes, KINDS[kind].moved, KINDS[kind].moved_back
    if train and moved_back is not None:
        moved = (moved + moved_back) / 2
    return Subject(
        "eager",
        lambda size, dtype, device: inputs(shapes(size)[0], shapes(size)[1] if train else None, dtype, device),
        lambda device: formulations(kind, train),
        {"cpu": (cpu,), "cuda": (cuda,), "quick": (quick,), "small": (quick,)},
        lambda found: found["x"].flatten()[: int(found["x"].numel() * moved / 2)].clone(),
        "copies",
        lambda size: int(4 * moved * math.prod(shapes(size)[0])),
        2 if train else 1,
    )


def size(**sides: int) -> Size:
    return sides


SIZES = {
    "pool": (
        size(b=1, t=16, h=24, w=24, c=1024),
        size(b=8, t=16, h=24, w=24, c=4096),
        size(b=1, t=2, h=12, w=16, c=512),
    ),
    "shift": (size(b=2, t=8, h=56, w=56, c=256), size(b=16, t=8, h=56, w=56, c=256), size(b=2, t=8, h=20, w=20, c=64)),
    "roll": (size(b=8, t=8, n=197, c=768), size(b=64, t=8, n=197, c=768), size(b=2, t=4, n=197, c=128)),
    "attention": (size(b=2, t=8, p=196, c=768), size(b=32, t=8, p=196, c=768), size(b=1, t=8, p=20, c=192)),
    "segments": (size(l=16384, c=768), size(l=262144, c=768), size(l=500, c=96)),
    "scores": (size(l=16384, c=768), size(l=262144, c=768), size(l=500, c=96)),
}
SUBJECTS = {
    f"{kind}, train" if train else kind: subject(kind, train, *sizes) for kind, sizes in SIZES.items() for train in (False, True)
}

if __name__ == "__main__":
    _measure.main("temporal", SUBJECTS, __doc__)
