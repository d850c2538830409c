"""A stack of pre-norm transformer blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlpfast.nn.attention import Attention, Backend
from vlpfast.types import UserError


@dataclass
class TransformerConfig:
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0  # hidden width of the feed-forward part over `width`
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    attention_backend: Backend = "auto"  # see vlpfast.nn.attention.attention
    checkpointing: bool = False  # recompute each block's activations in the backward: less memory, a third more arithmetic


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), OpenAI's approximation of GELU. As a scaled SiLU it keeps one tensor for the backward, not two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) * (1 / 1.702)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise UserError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {config.activation!r}")
        hidden = round(config.width * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config.width, config.heads, bias=config.qkv_bias, backend=config.attention_backend)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.fc1 = nn.Linear(config.width, hidden)
        self.activation = ACTIVATIONS[config.activation]()
        self.fc2 = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor, mask: Tensor | Literal["causal"] | None = None) -> Tensor:
        """[B, L, width] -> the same."""
        return self.feed_forward(x + self.attn(self.norm1(x), mask=mask))

    def feed_forward(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """The second half: x + mlp(norm(x)). normed: norm2(x), where it has been made already."""
        return x + self.fc2(self.activation(self.fc1(self.norm2(x) if normed is None else normed)))


class Stack(nn.Module):
    """Blocks, and how each of them is run."""

    def __init__(self, blocks: Iterable[nn.Module], checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(blocks)

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """block(*inputs), checkpointed where it is wanted."""
        if self.checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # no randomness in a block
        return block(*inputs)


class Transformer(Stack):
    """`layers` blocks of one mask, with CLIP's initialisation: the deeper the stack, the less each block adds at first."""

    def __init__(self, config: TransformerConfig, blocks: Iterable[Block] | None = None) -> None:
        """blocks: in place of Block(config)."""
        super().__init__(blocks or (Block(config) for _ in range(config.layers)), config.checkpointing)
        residual_std = (2 * config.width * config.layers) ** -0.5
        for block in self.blocks:
            nn.init.normal_(block.attn.in_proj.weight, std=config.width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.fc1.weight, std=(2 * config.width) ** -0.5)
            nn.init.normal_(block.fc2.weight, std=residual_std)
            for linear in (block.attn.in_proj, block.attn.out_proj, block.fc1, block.fc2):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor | Literal["causal"] | None = None) -> Tensor:
        """[B, L, width] -> the same."""
        for block in self.blocks:
            x = self.run(block, x, mask)
        return x
