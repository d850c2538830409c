"""Fewer tokens: vlpfast's merging, masking and selection beside their published formulations, with time, memory and errors.

    python benchmarks/tokens.py --device cpu --threads 1    every subject at its full size, float32
    python benchmarks/tokens.py --device cpu --quick        small sizes, in seconds
    python benchmarks/tokens.py --subject merge_forward --n 577 --r 23

B pictures of N tokens of width C, a class token among them. "eager" is what the papers describe, in torch. The unit is a plain
copy of all tokens (GB/s: if they are float32); the floor is the copies' worth of numbers that must be read and written.
    merge            ToMe: the R best pairs by the cosine of their metrics of width M, then means weighted by size
    merge_forward    the same without gradients
    add_merge_norm   what a block of ToMe does between its two parts: the residual, merge, a layer norm. "three calls": a sum, our
                     merge, a norm
    add_merge_norm_forward   the same without gradients
    mask             masked autoencoding: 25 % of the tokens, drawn at random, without gradients. A picture has equal tokens here:
                     errors do not depend on which ones were drawn
    select           EViT: the 70 % of the patches with the largest scores, and one token for the rest
    select_forward   the same without gradients
Goals on one CPU thread, at the full size: merge_forward takes 3 copies or fewer and is 8 times faster than eager, merge 5 times;
mask takes at most one and a half times what a copy of the tokens that are left takes, 0.38 copies.
How time, memory and errors are taken is told in benchmarks/_measure.py. Whole networks: benchmarks/vit.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import _measure
import torch
import torch.nn.functional as F
from _measure import Formulation, Inputs, Size, Subject
from torch import Tensor

from vlpfast.ops.tokens import add_merge_norm, bipartite_match, merge, random_mask, select

RATIO, KEEP = 0.75, 0.7  # of tokens masked, of patches selected


class Handed(torch.autograd.Function):
    """The last of some results, with a dense gradient for each: a sum's own is one number seen everywhere, which no network hands
    down."""

    @staticmethod
    def forward(*results_and_gradients: Tensor) -> Tensor:
        last = results_and_gradients[len(results_and_gradients) // 2 - 1]
        return last.view_as(last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[len(inputs) // 2 :])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, *[None] * len(ctx.saved_tensors)


Results = Tensor | tuple[Tensor, ...]


def trained(function: Callable[..., Results]) -> Callable[..., Tensor]:
    def run(**inputs: Tensor) -> Tensor:
        gradients = [inputs.pop(name) for name in ("grad", "grad_last") if name in inputs]
        results = function(**inputs)
        return Handed.apply(*(results if isinstance(results, tuple) else (results,)), *gradients)

    return run


def untrained(function: Callable[..., Results]) -> Callable[..., Tensor]:
    def run(**inputs: Tensor) -> Tensor:
        results = function(**inputs)
        return results[-1] if isinstance(results, tuple) else results

    return run


def table(
    ours: dict[str, Callable[..., Results]], eager: Callable[..., Results], device: str, units: float, train: bool
) -> dict[str, Formulation]:
    found = ours | {"eager": eager}
    if device == "cuda":
        found["eager, compiled"] = torch.compile(eager)
    return {name: Formulation((trained if train else untrained)(function), units) for name, function in found.items()}


# --- merging ------------------------------------------------------------------------------------------------------------


def merge_ours(x: Tensor, metric: Tensor, size: Tensor, r: Tensor) -> Tensor:
    return merge(x, bipartite_match(metric, len(r), protect=1), size=size, mode="weighted")[0]


def merge_eager(x: Tensor, metric: Tensor, size: Tensor, r: Tensor) -> Tensor:
    """Two sets by turns, the best partner of each token of the first, the r best of these, and their weighted means."""
    batch = len(x)
    with torch.no_grad():
        metric = metric / metric.norm(dim=-1, keepdim=True)
        cosine = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # [B, A, N - A]
        cosine[:, 0] = -torch.inf
        best, partner = cosine.max(-1)  # [B, A]
        order = best.argsort(dim=-1, descending=True)
        source, stays = order[:, : len(r), None], order[:, len(r) :].sort(dim=-1).values[..., None]
        target = partner[..., None].gather(1, source)  # [B, r, 1]

    def summed(t: Tensor) -> Tensor:
        first, second = t[:, ::2], t[:, 1::2]
        moved = first.gather(1, source.expand(batch, -1, t.shape[-1]))
        second = second.scatter_reduce(1, target.expand(batch, -1, t.shape[-1]), moved, "sum")
        return torch.cat((first.gather(1, stays.expand(batch, -1, t.shape[-1])), second), dim=1)

    size = size[..., None].to(x.dtype)
    return summed(x * size) / summed(size)


def merge_inputs(size: Size, dtype: torch.dtype, device: str, train: bool) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    b, n, c, m, r = (size[key] for key in "bncmr")
    found = {"x": torch.randn(b, n, c, generator=generator).to(device, dtype)}
    found["metric"] = torch.randn(b, n, m, generator=generator).to(device, dtype)
    found["size"] = torch.randint(1, 4, (b, n), generator=generator).to(device, torch.float32)
    found["r"] = torch.empty(r, device=device)  # its length alone counts: inputs are tensors
    if train:
        found["x"].requires_grad_()
        found["grad"] = torch.randn(b, n - r, c, generator=generator).to(device, dtype)
    return found


# --- merging, with what stands around it --------------------------------------------------------------------------------


def block_ours(
    x: Tensor, delta: Tensor, metric: Tensor, size: Tensor, weight: Tensor, bias: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    match = bipartite_match(metric, len(r), protect=1)
    y, _, normed = add_merge_norm(x, delta, match, size, weight=weight, bias=bias, mode="weighted")
    return y, normed


def block_in_three(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
    y = merge_ours(x + delta, **others)
    return y, F.layer_norm(y, y.shape[-1:], weight, bias)


def block_eager(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
    y = merge_eager(x + delta, **others)
    return y, F.layer_norm(y, y.shape[-1:], weight, bias)


def block_inputs(size: Size, dtype: torch.dtype, device: str, train: bool) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    b, n, c, r = (size[key] for key in "bncr")
    found = merge_inputs(size, dtype, device, train)
    found["delta"] = torch.randn(b, n, c, generator=generator).to(device, dtype)
    for name in ("weight", "bias"):
        found[name] = torch.randn(c, generator=generator).to(device, dtype)
    if train:
        for name in ("delta", "weight", "bias"):
            found[name].requires_grad_()
        found["grad_last"] = torch.randn(b, n - r, c, generator=generator).to(device, dtype)
    return found


# --- masking ------------------------------------------------------------------------------------------------------------


def mask_ours(x: Tensor) -> Tensor:
    return random_mask(x, RATIO, torch.zeros((), dtype=torch.int64, device=x.device))[0]


def mask_eager(x: Tensor) -> Tensor:
    """Noise, its order, the first of that, and the way back."""
    batch, length, width = x.shape
    kept = int(length * (1 - RATIO))
    order = torch.rand(batch, length, device=x.device).argsort(dim=1)
    restore = order.argsort(dim=1)
    masked = torch.ones(batch, length, device=x.device)
    masked[:, :kept] = 0
    masked.gather(1, restore)
    return x.gather(1, order[:, :kept, None].expand(-1, -1, width))


def mask_inputs(size: Size, dtype: torch.dtype, device: str, train: bool) -> Inputs:
    picture = torch.randn(size["b"], 1, size["c"], generator=torch.Generator().manual_seed(0))
    return {"x": picture.expand(-1, size["n"], -1).contiguous().to(device, dtype)}


# --- selection ----------------------------------------------------------------------------------------------------------


def select_ours(x: Tensor, score: Tensor) -> Tensor:
    return select(x, score, math.ceil(KEEP * (x.shape[1] - 1)), rest="fuse", protect=1)[0]


def select_eager(x: Tensor, score: Tensor) -> Tensor:
    """The patches with the largest scores in order of place, and the sum of the others weighted by theirs."""
    patches, score = x[:, 1:], score[:, 1:]
    count = math.ceil(KEEP * patches.shape[1])
    chosen = score.topk(count, dim=1).indices  # [B, count]
    others = torch.ones_like(score, dtype=torch.bool).scatter(1, chosen, False).int().topk(score.shape[1] - count, dim=1).indices
    chosen, width = chosen.sort(dim=1).values[..., None].expand(-1, -1, x.shape[2]), x.shape[2]
    rest = patches.gather(1, others[..., None].expand(-1, -1, width)) * score.gather(1, others)[..., None]
    return torch.cat((x[:, :1], patches.gather(1, chosen), rest.sum(1, keepdim=True)), dim=1)


def select_inputs(size: Size, dtype: torch.dtype, device: str, train: bool) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    b, n, c = (size[key] for key in "bnc")
    found = {"x": torch.randn(b, n, c, generator=generator).to(device, dtype)}
    found["score"] = F.softmax(torch.randn(b, n, generator=generator), dim=1).to(device, torch.float32).to(dtype)
    if train:
        for t in found.values():
            t.requires_grad_()
        found["grad"] = torch.randn(b, math.ceil(KEEP * (n - 1)) + 2, c, generator=generator).to(device, dtype)
    return found


# --- subjects -----------------------------------------------------------------------------------------------------------


def subject(
    ours: Callable[..., Results],
    eager: Callable[..., Results],
    inputs: Callable[..., Inputs],
    floor: float,  # copies of all tokens
    full: Size,
    quick: Size,
    train: bool = False,
    more: dict[str, Callable[..., Results]] | None = None,  # formulations of ours by name
) -> Subject:
    return Subject(
        "eager",
        lambda size, dtype, device: inputs(size, dtype, device, train),
        lambda device: table({"vlpfast": ours} | (more or {}), eager, device, floor, train),
        {"cpu": (full,), "cuda": (full | {"b": 4 * full["b"]},), "quick": (quick,), "small": (quick,)},
        lambda found: found["x"].clone(),
        "copies",
        lambda size: 2 * 4 * size["b"] * size["n"] * size["c"],
        floor,
    )


FULL, QUICK = {"b": 64, "n": 197, "c": 768}, {"b": 3, "n": 50, "c": 96}
MERGE, MERGE_QUICK = FULL | {"m": 64, "r": 16}, QUICK | {"m": 24, "r": 7}

SUBJECTS = {
    "merge": subject(merge_ours, merge_eager, merge_inputs, 2, MERGE, MERGE_QUICK, train=True),
    "merge_forward": subject(merge_ours, merge_eager, merge_inputs, 1, MERGE, MERGE_QUICK),
    "add_merge_norm": subject(
        block_ours, block_eager, block_inputs, 4, MERGE, MERGE_QUICK, train=True, more={"vlpfast, three calls": block_in_three}
    ),
    "add_merge_norm_forward": subject(
        block_ours, block_eager, block_inputs, 2, MERGE, MERGE_QUICK, more={"vlpfast, three calls": block_in_three}
    ),
    "mask": subject(mask_ours, mask_eager, mask_inputs, 1 - RATIO, FULL, QUICK),
    "select": subject(select_ours, select_eager, select_inputs, 1 + KEEP, FULL, QUICK, train=True),
    "select_forward": subject(select_ours, select_eager, select_inputs, (1 + KEEP) / 2, FULL, QUICK),
}

if __name__ == "__main__":
    _measure.main("tokens", SUBJECTS, __doc__)
