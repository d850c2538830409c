"""Fewer tokens: vlpfast's merging, masking and selection beside their published formulations, with time, memory and errors.

    python benchmarks/tokens.py --device cpu --threads 1    every subject at its full size, float32
    python benchmarks/tokens.py --device cpu --quick        small sizes, in seconds
    python benchmarks/tokens.py --subject merge_forward --n 577 --r 23

B pictures of N tokens of width C, a class token among them. "eager" is what the papers describe, in torch. The unit is a plain
copy of all tokens (GB/s: if they are float32); the floor is the copies' worth of numbers that must be read and written.
    merge            ToMe: the R best pairs by the cosine of their metrics of width M, then means weighted by size
    merge_forward    the same without gradients
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

from vlpfast.ops.tokens import bipartite_match, merge, random_mask, select

RATIO, KEEP = 0.75, 0.7  # of tokens masked, of patches selected


class Handed(torch.autograd.Function):
    """x, with a dense gradient: a sum's own is one number seen everywhere, which no network hands down."""

    @staticmethod
    def forward(x: Tensor, grad: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def trained(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda grad, **inputs: Handed.apply(function(**inputs), grad)


def table(
    ours: Callable[..., Tensor], eager: Callable[..., Tensor], device: str, units: float, train: bool
) -> dict[str, Formulation]:
    found = {"vlpfast": ours, "eager": eager}
    if device == "cuda":
        found["eager, compiled"] = torch.compile(eager)
    return {name: Formulation(trained(function) if train else function, units) for name, function in found.items()}


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
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: Callable[..., Inputs],
    floor: float,  # copies of all tokens
    full: Size,
    quick: Size,
    train: bool = False,
) -> Subject:
    return Subject(
        "eager",
        lambda size, dtype, device: inputs(size, dtype, device, train),
        lambda device: table(ours, eager, device, floor, train),
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
    "mask": subject(mask_ours, mask_eager, mask_inputs, 1 - RATIO, FULL, QUICK),
    "select": subject(select_ours, select_eager, select_inputs, 1 + KEEP, FULL, QUICK, train=True),
    "select_forward": subject(select_ours, select_eager, select_inputs, (1 + KEEP) / 2, FULL, QUICK),
}

if __name__ == "__main__":
    _measure.main("tokens", SUBJECTS, __doc__)
