"""Frames: vlpfast beside the formulations of the papers' code, with time, memory and errors.

    python benchmarks/temporal.py --device cpu --threads 1    every subject at its full size, float32
    python benchmarks/temporal.py --device cpu --quick        small sizes, in seconds
    python benchmarks/temporal.py --subject attention --t 16

The unit is a copy into new memory of half the bytes that a subject must read and write, so that it moves as many. GB/s are
counted for float32: with half types they are half of what is shown.
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

from vlpfast.ops.temporal import segment_pool, temporal_attention

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


# --- the usual forms, written from their definitions ------------------------------------------------------------------


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
    moved_back: float  # by one backward


def tokens(s: Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (s["l"], s["c"]), (len(lengths(s["l"])), s["c"])


KINDS = {
    "attention": Kind(
        lambda x: temporal_attention(*x.chunk(3, -1), HEADS),
        attention_eager,
        lambda s: ((s["b"], s["t"], s["p"], 3 * s["c"]), (s["b"], s["t"], s["p"], s["c"])),
        4 / 3,
        7 / 3,
    ),
    "segments": Kind(lambda x: segment_pool(x, starts(x)), segments_eager, tokens, 1, 1),
    "scores": Kind(lambda x: segment_pool(x, starts(x), "attention", score=scores(x)), scores_eager, tokens, 1, 1),
}


def formulations(kind: str, train: bool) -> dict[str, Formulation]:
    functions = {"vlpfast": KINDS[kind].function, "eager": KINDS[kind].eager}
    if torch.cuda.is_available():
        functions["eager, compiled"] = torch.compile(KINDS[kind].eager)
    if train:
        return {name: Formulation(trained(f), 2) for name, f in functions.items()}
    return {name: Formulation(f, 1) for name, f in functions.items()}


def subject(kind: str, train: bool, cpu: Size, cuda: Size, quick: Size) -> Subject:
    shapes = KINDS[kind].shapes
    moved = (KINDS[kind].moved + KINDS[kind].moved_back) / 2 if train else KINDS[kind].moved
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
    "attention": (size(b=2, t=8, p=196, c=768), size(b=32, t=8, p=196, c=768), size(b=1, t=8, p=20, c=192)),
    "segments": (size(l=16384, c=768), size(l=262144, c=768), size(l=500, c=96)),
    "scores": (size(l=16384, c=768), size(l=262144, c=768), size(l=500, c=96)),
}
SUBJECTS = {
    f"{kind}, train" if train else kind: subject(kind, train, *sizes) for kind, sizes in SIZES.items() for train in (False, True)
}

if __name__ == "__main__":
    _measure.main("temporal", SUBJECTS, __doc__)
