"""CLIP's text tower over the prompts of all classes: what CoOp's every step costs beside one picture.

    python benchmarks/prompts.py --device cpu --threads 1    ResNet-50's tower, 64 classes; and a thin one, 1,000 classes
    python benchmarks/prompts.py --device cuda               1,000 classes

Weights are frozen; the gradient is that of the P vectors that all prompts begin with. Tails have 3 to L tokens, the longest name
decides. One unit is the products of a block for P + C L tokens; the floor is one forward and the half of a backward that leads to
the vectors. The plain formulation is the official one: all 77 positions of every prompt in one go.
"""

from __future__ import annotations

from functools import cache

import torch
from _measure import Formulation, Inputs, Size, Subject, main
from torch import Tensor

from vlpfast.nn.text import TextConfig, TextTower

POSITIONS = 77
SIZES = {  # cpu, cuda, quick: classes, prefix, tail, width, blocks
    "tower": ({"c": 64}, {"c": 1000}, {"c": 8}),
    "thin": ({"c": 1000}, {"c": 1000}, {"c": 100}),
}
WIDTHS = {"tower": {"p": 17, "l": 8, "w": 512, "n": 12}, "thin": {"p": 17, "l": 8, "w": 64, "n": 2}}


@cache
def tower(width: int, blocks: int, dtype: torch.dtype, device: str) -> TextTower:
    torch.manual_seed(0)
    made = TextTower(TextConfig(width=width, layers=blocks, heads=width // 64, vocab_size=2), POSITIONS)
    return made.to(device, dtype).requires_grad_(False).train()


def inputs(size: Size, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    c, p, length, w = (size[key] for key in "cplw")
    end = torch.randint(2, length, (c,), generator=generator)
    end[0] = length - 1
    draw = lambda *shape: (0.02 * torch.randn(shape, generator=generator)).to(device, dtype)  # noqa: E731
    towards = torch.randn(c, w, generator=generator).to(device, dtype)
    return {"prefix": draw(1, p, w).requires_grad_(), "tails": draw(c, length, w), "end": end.to(device), "towards": towards}


def shared(blocks: int, chunk: int, prefix: Tensor, tails: Tensor, end: Tensor, towards: Tensor) -> Tensor:
    text = tower(prefix.shape[-1], blocks, prefix.dtype, prefix.device.type)
    return (text.encode_prompts(prefix, tails, end, chunk=chunk)[0] * towards).sum()


def whole(blocks: int, positions: int | None, prefix: Tensor, tails: Tensor, end: Tensor, towards: Tensor) -> Tensor:
    """Every prompt for itself; positions: padded to so many."""
    text = tower(prefix.shape[-1], blocks, prefix.dtype, prefix.device.type)
    x = torch.cat((prefix.expand(len(tails), -1, -1), tails), 1)
    if positions is not None:
        x = torch.nn.functional.pad(x, (0, 0, 0, positions - x.shape[1]))
    tokens = text.run(x)[torch.arange(len(tails), device=x.device), prefix.shape[1] + end]
    return (text.norm(tokens) * towards).sum()


def subject(name: str) -> Subject:
    widths = WIDTHS[name]
    p, length, blocks = widths["p"], widths["l"], widths["n"]
    cpu, cuda, quick = ({**size, **widths} for size in SIZES[name])

    def formulations(device: str) -> dict[str, Formulation]:
        c = (cuda if device == "cuda" else cpu)["c"]
        tokens = p + c * length
        return {
            "vlpfast": Formulation(lambda **x: shared(blocks, c, **x), 2 * blocks),
            "vlpfast, recomputed": Formulation(lambda **x: shared(blocks, 256 if c > 256 else c // 4, **x), 3 * blocks),
            "trimmed": Formulation(lambda **x: whole(blocks, None, **x), 2 * blocks * c * (p + length) / tokens),
            "plain": Formulation(lambda **x: whole(blocks, POSITIONS, **x), 2 * blocks * c * POSITIONS / tokens),
        }

    def unit(x: Inputs) -> Tensor:
        w = x["prefix"].shape[-1]
        tokens = torch.cat((x["prefix"][0], x["tails"].flatten(0, 1)))
        return tokens @ tokens.new_ones(w, 12 * w)

    return Subject(
        base="plain",
        inputs=inputs,
        formulations=formulations,
        sizes={"cpu": (cpu,), "cuda": (cuda,), "quick": (quick,), "small": ({**widths, "c": 6},)},
        unit=unit,
        unit_name="products",
        work=lambda size: 24 * size["w"] ** 2 * (size["p"] + size["c"] * size["l"]),
        floor=2 * blocks,
    )


if __name__ == "__main__":
    main("prompts", {name: subject(name) for name in WIDTHS}, __doc__ or "")
