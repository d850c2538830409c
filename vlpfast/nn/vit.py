"""Vision transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.transformer import Transformer, TransformerConfig
from vlpfast.types import UserError


@dataclass
class ViTConfig(TransformerConfig):
    """The defaults are ViT-B/32."""

    width: int = 768
    heads: int = 12
    patch_size: int = 32
    pool: Literal["class", "mean"] = "class"  # the class token, or the mean of the patch tokens, without a class token then
    patch_dropout: float = 0.0  # share of the patches left out in training, anew for each picture (FLIP, Li et al. 2023)


class ViT(nn.Module):
    """Square pictures to patch tokens, as in CLIP: learned positions, a norm before the blocks, no bias in the patch embedding.

    The patch embedding is one matrix product on unfolded patches; a row of its weight is a convolution's kernel [3, P, P], flat.
    """

    def __init__(self, config: ViTConfig, image_size: int) -> None:
        super().__init__()
        if image_size % config.patch_size:
            raise UserError(f"patch_size: expected a divisor of the picture size {image_size}, got {config.patch_size}")
        if config.pool not in ("class", "mean"):
            raise UserError(f"pool: expected class or mean, got {config.pool!r}")
        if not 0 <= config.patch_dropout < 1:
            raise UserError(f"patch_dropout: expected a share in [0, 1), got {config.patch_dropout}")
        self.image_size = image_size
        self.patch_size = config.patch_size
        self.grid = image_size // config.patch_size
        self.kept_patches = max(1, round(self.grid**2 * (1 - config.patch_dropout)))
        width = config.width
        self.patch_embed = nn.Linear(3 * config.patch_size**2, width, bias=False)
        self.class_token = nn.Parameter(width**-0.5 * torch.randn(width)) if config.pool == "class" else None
        prefix = 0 if self.class_token is None else 1
        self.position = nn.Parameter(width**-0.5 * torch.randn(prefix + self.grid**2, width))  # class token, then row by row
        self.norm_pre = nn.LayerNorm(width)
        self.transformer = Transformer(config)
        self.norm_post = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, 3, image_size, image_size] -> tokens [B, T, width], the class token first where there is one; see `pool`.

        T counts the patches that were kept: all but in training with patch dropout, which draws from torch's default generator.
        """
        if image.ndim != 4 or image.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"image: expected [B, 3, {self.image_size}, {self.image_size}], got {tuple(image.shape)}")
        batch, grid, size = image.shape[0], self.grid, self.patch_size
        patches = image.reshape(batch, 3, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)  # [B, grid, grid, 3, P, P]
        prefix = 0 if self.class_token is None else 1
        position = self.position[prefix:]  # [grid^2, width]
        if self.training and self.kept_patches < grid**2:
            kept = torch.rand(batch, grid**2, device=image.device).topk(self.kept_patches).indices  # [B, T]
            row = torch.arange(batch, device=image.device)[:, None]
            patches = patches[row, kept // grid, kept % grid]  # [B, T, 3, P, P]
            position = F.embedding(kept, position)  # [B, T, width]
        x = self.patch_embed(patches.reshape(batch, -1, 3 * size**2)) + position
        if self.class_token is not None:
            first = (self.class_token + self.position[0]).expand(batch, 1, -1)
            x = torch.cat((first, x), dim=1)
        return self.transformer(self.norm_pre(x))

    def pool(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, width] -> [B, width], normalised."""
        return self.norm_post(tokens.mean(1) if self.class_token is None else tokens[:, 0])


def resize_positions(table: Tensor, grid: int, prefix: int) -> Tensor:
    """A position table [prefix + n * n, width] for a grid of n x n patches -> [prefix + grid * grid, width], bicubically.

    The first `prefix` rows (class token) stay as they are. Going down, the filter is widened (antialiasing): no row is lost.
    """
    old = math.isqrt(table.shape[0] - prefix)
    if old * old != table.shape[0] - prefix:
        raise ValueError(f"table: expected {prefix} + n * n rows, got {table.shape[0]}")
    if old == grid:
        return table
    maps = table[prefix:].T.reshape(1, -1, old, old)  # [1, width, n, n]
    maps = F.interpolate(maps.float(), (grid, grid), mode="bicubic", antialias=True, align_corners=False).to(table.dtype)
    return torch.cat((table[:prefix], maps.reshape(-1, grid * grid).T))
