"""What each rank sends and keeps on many GPUs: formulas, checked by tests/test_scaling.py, and docs/scaling.md made of them.

    python benchmarks/scaling.py

measures nothing: it evaluates the formulas for CLIP ViT-B/32 on 8, 64 and 1,024 ranks and writes the page from scaling.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlpfast.models.clip import CLIP
from vlpfast.training.parallel import blocks

ROOT = Path(__file__).resolve().parents[1]
RANKS = (8, 64, 1024)
LINK = 50e9  # bytes a second that a rank can send: an assumption (400 Gbit/s for each GPU)
WIDE = 4  # bytes of float32: parameters that are kept, optimiser state, sums and gradients on their way


@dataclass(frozen=True)
class Setting:
    """One rank of `ranks` equal ones."""

    ranks: int
    samples: int = 512  # of this rank
    width: int = 512  # of a feature
    tokens: int = 32  # of each sample on the side that travels (late interaction)
    item: int = 2  # bytes of a travelling feature
    weight_item: int = 2  # bytes of a parameter that FSDP2 sends: of the products' dtype
    parameters: int = 0  # all trained; those without dimensions are few enough not to count
    in_blocks: int = 0  # of them in repeated blocks
    largest_block: int = 0
    stash_item: int = 2  # bytes of a kept exponential: 2 on a GPU, 4 on a CPU
    stash_bytes: int = 4 << 30

    @property
    def batch(self) -> int:
        return self.ranks * self.samples


@dataclass(frozen=True)
class Collective:
    kind: str  # all_reduce, all_gather, reduce_scatter, all_to_all
    payload: float  # bytes: of the tensor that is reduced or scattered, of the gathered whole

    def sent(self, ranks: int) -> float:
        """By each rank, by ring algorithms and direct exchange: (W - 1) / W of the payload, an all-reduce twice that."""
        return self.payload * (ranks - 1) / ranks * (2 if self.kind == "all_reduce" else 1)


def ddp(s: Setting) -> list[Collective]:
    """Gradients in float32, once."""
    return [Collective("all_reduce", WIDE * s.parameters)]


def fsdp(s: Setting) -> list[Collective]:
    """Each group's parameters for its forward, those of blocks again for the backward, gradients in float32 once."""
    return [
        Collective("all_gather", s.weight_item * (s.parameters + s.in_blocks)),
        Collective("reduce_scatter", WIDE * s.parameters),
    ]


def sharded_clip_loss(s: Setting) -> list[Collective]:
    """Features of one side there, their gradient in float32 back; a number for each column to its owner and back."""
    return [*sharded_sigmoid_loss(s), Collective("all_to_all", 2 * WIDE * s.batch)]


def sharded_sigmoid_loss(s: Setting) -> list[Collective]:
    return [
        Collective("all_gather", s.item * s.batch * s.width),
        Collective("reduce_scatter", WIDE * s.batch * s.width),
    ]


def sharded_filip_loss(s: Setting) -> list[Collective]:
    """As sharded_clip_loss, with the features of every token."""
    return sharded_clip_loss(replace(s, width=s.tokens * s.width))[:-1] + sharded_clip_loss(s)[-1:]


def grad_cache(s: Setting) -> list[Collective]:
    """train.micro_batch under sharded_clip_loss and DDP: the loss is evaluated once, gradients are averaged once, however many
    parts there are."""
    return [*sharded_clip_loss(s), *ddp(s)]


TRAFFIC: dict[str, Callable[[Setting], list[Collective]]] = {
    "DDP": ddp,
    "FSDP2": fsdp,
    "sharded_clip_loss": sharded_clip_loss,
    "sharded_sigmoid_loss": sharded_sigmoid_loss,
    "sharded_filip_loss": sharded_filip_loss,
    "GradCache with sharded_clip_loss and DDP": grad_cache,
}


def states(s: Setting) -> float:
    """Bytes of a replica: parameters, gradients, AdamW's two moments, all in float32."""
    return 4 * WIDE * s.parameters


def fsdp_gathered(s: Setting) -> float:
    """Bytes of parameters that are whole at once: those outside of blocks, and of two blocks."""
    return s.weight_item * (s.parameters - s.in_blocks + 2 * s.largest_block)


def gathered(s: Setting, width: int) -> float:
    """Bytes of features from all ranks and their gradient before it is sent: in bf16 both, and the gradient in float32."""
    return (2 * s.item + (WIDE if s.item < WIDE else 0)) * s.batch * width


def loss_memory(s: Setting, width: int) -> float:
    """Bytes of the gathered side with its gradient, and of the kept exponentials."""
    return gathered(s, width) + min(s.stash_bytes, s.stash_item * s.samples * s.batch)


def filip_memory(s: Setting) -> float:
    """Bytes of the gathered tokens and their gradient; winners of the two directions (a byte each) within the budget."""
    winners = s.samples * s.batch * 2 * s.tokens
    return gathered(s, s.tokens * s.width) + min(s.stash_bytes, winners)


def grad_cache_memory(s: Setting) -> float:
    """As sharded_clip_loss and DDP, and the features of both sides with their gradients in float32."""
    return loss_memory(s, s.width) + states(s) + 2 * 2 * WIDE * s.samples * s.width


MEMORY: dict[str, Callable[[Setting], float]] = {
    "DDP": states,
    "FSDP2": lambda s: states(s) / s.ranks + fsdp_gathered(s),
    "sharded_clip_loss": lambda s: loss_memory(s, s.width),
    "sharded_sigmoid_loss": lambda s: gathered(s, s.width),
    "sharded_filip_loss": filip_memory,
    "GradCache with sharded_clip_loss and DDP": grad_cache_memory,
}


def clip_setting(ranks: int) -> Setting:
    return replace(_clip(), ranks=ranks)


@functools.cache
def _clip() -> Setting:
    with torch.device("meta"):
        model = CLIP(CLIP.Config())
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks(model)]
    whole = sum(parameter.numel() for parameter in model.parameters())
    return Setting(1, parameters=whole, in_blocks=sum(sizes), largest_block=max(sizes))


def page() -> str:
    """docs/scaling.md."""
    head = (
        "| a step of each rank | " + " | ".join(f"{ranks:,} ranks" for ranks in RANKS) + " |\n|---" + "|---:" * len(RANKS) + "|\n"
    )
    sent, kept = head, head
    for name, collectives in TRAFFIC.items():
        settings = [clip_setting(ranks) for ranks in RANKS]
        volumes = [sum(one.sent(s.ranks) for one in collectives(s)) for s in settings]
        sent += f"| {name} | " + " | ".join(f"{mib(v)}, {milliseconds(v / LINK)}" for v in volumes) + " |\n"
        kept += f"| {name} | " + " | ".join(mib(MEMORY[name](s)) for s in settings) + " |\n"
    s = clip_setting(8)
    facts = {
        "parameters": f"{s.parameters:,}",
        "in_blocks": f"{s.in_blocks:,}",
        "largest": f"{s.largest_block:,}",
        "samples": f"{s.samples}",
        "width": f"{s.width}",
        "tokens": f"{s.tokens}",
        "link": f"{LINK / 1e9:.0f}",
    }
    return (ROOT / "benchmarks/scaling.md").read_text().format(**facts, sent=sent, kept=kept)


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.1f} ms"


def main() -> None:
    path = ROOT / "docs/scaling.md"
    path.write_text(page())
    print(f"written: {path}")


if __name__ == "__main__":
    main()
