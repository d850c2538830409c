"""Fewer vectors from many: one of a volume's slices or a clip's frames, a smaller grid of a video's tokens."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.attention import Attention, Backend
from vlpfast.ops import temporal
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
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
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
        return temporal.segment_pool(y.flatten(0, 1), volumes, "attention", score=score.flatten())


def sinusoids(position: Tensor, width: int) -> Tensor:
    """[...] -> [..., width] float32: sines, then cosines, of wavelengths from 2 pi to 2e4 pi in a geometric row."""
    rate = 1e4 ** (-torch.arange(width // 2, device=position.device, dtype=torch.float32) / (width // 2))
    angle = position[..., None] * rate
    return torch.cat((angle.sin(), angle.cos()), -1)


class PoolingProjector(nn.Module):
    """PLLaVA's projector of video tokens (Xu et al. 2024): linear, GELU, linear, and adaptive mean pooling to the places `out`.

    A mean commutes with a linear layer, so the pooling stands before the second one, which then has fewer rows (a quarter in
    PLLaVA's setting, 16 x 24 x 24 to 16 x 12 x 12). The activation must stay before it.
    """

    def __init__(self, width: int, out_width: int, out: tuple[int | None, int | None, int | None] = (16, 12, 12)) -> None:
        """out: (t, h, w), None keeps an axis as it is."""
        super().__init__()
        self.out = out
        self.fc1 = nn.Linear(width, out_width)
        self.fc2 = nn.Linear(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H, W, width] -> [B, t * h * w, out_width], in this order."""
        return self.fc2(temporal.pool_tokens(F.gelu(self.fc1(x)), self.out).flatten(1, 3))
