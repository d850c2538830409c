"""One vector from many: slices of a volume, frames of a clip."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vlpfast.nn.attention import Attention, Backend
from vlpfast.ops.temporal import segment_pool
from vlpfast.types import UserError


class AttentionPool(nn.Module):
    """RadCLIP's slice pooling: slices attend to each other, V = attention(I + PE(position)), and V becomes one vector.

    Lu et al. 2024, "RadCLIP". The paper leaves open how: here a residual and a norm around the attention, and a learned query
    that weighs the slices of V by a softmax. It starts at zero, as their mean.

    positions: "sinusoidal" (Vaswani et al. 2017), or "none", with which the order of slices does not matter.
    pool: "query", or "mean".
    residual: False: V is the attention's output alone, as the paper prints it.
    """

    def __init__(
        self,
        width: int = 768,
        heads: int = 8,
        *,
        positions: Literal["sinusoidal", "none"] = "sinusoidal",
        pool: Literal["query", "mean"] = "query",
        residual: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if positions not in ("sinusoidal", "none"):
            raise UserError(f"positions: expected sinusoidal or none, got {positions!r}")
        if positions == "sinusoidal" and width % 2:
            raise UserError(f"width: expected an even number for sinusoidal positions, got {width}")
        if pool not in ("query", "mean"):
            raise UserError(f"pool: expected query or mean, got {pool!r}")
        self.positions = positions
        self.attn = Attention(width, heads, backend=backend)
        self.norm = nn.LayerNorm(width) if residual else None
        self.query = nn.Parameter(torch.zeros(width)) if pool == "query" else None

    def forward(self, x: Tensor, mask: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """x [B, N, width] slices or frames; mask [B, N] bool, True = there: the others do not count, whatever number they hold,
        and a volume without any gives 0; position [N] or [B, N], 0 to N - 1 unless given -> [B, width]."""
        batch, count, width = x.shape
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask: expected shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
        y = x
        if self.positions == "sinusoidal":
            place = torch.arange(count, device=x.device) if position is None else position
            y = x + sinusoids(place, width).to(x.dtype)
        elif position is not None:
            raise ValueError("position: expected None without positions, got a tensor")
        # a query must see something; what volumes without slices make of it is left out below
        seen = None if mask is None else (mask | ~mask.any(1, keepdim=True))[:, None, None]
        y = self.attn(y, mask=seen)
        if self.norm is not None:
            y = self.norm(x + y)
        score = torch.zeros(batch, count, device=x.device) if self.query is None else (y @ self.query) * width**-0.5  # [B, N]
        if mask is not None:
            score = score.masked_fill(~mask, -torch.inf)
        volumes = count * torch.arange(batch + 1, device=x.device)
        return segment_pool(y.flatten(0, 1), volumes, "attention", score=score.flatten())


def sinusoids(position: Tensor, width: int) -> Tensor:
    """[...] -> [..., width] float32: sines, then cosines, of wavelengths from 2 pi to 2e4 pi in a geometric row."""
    rate = 1e4 ** (-torch.arange(width // 2, device=position.device, dtype=torch.float32) / (width // 2))
    angle = position[..., None] * rate
    return torch.cat((angle.sin(), angle.cos()), -1)
