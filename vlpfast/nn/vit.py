"""Vision transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.reduction import MergeConfig, ReducingTransformer, SelectConfig, has_schedule
from vlpfast.nn.transformer import Transformer, TransformerConfig
from vlpfast.types import UserError


@dataclass
class ViTConfig(TransformerConfig):
    """The defaults are ViT-B/32, as in CLIP; `deit` makes those of ALBEF and its descendants."""

    width: int = 768
    heads: int = 12
    patch_size: int = 32
    pool: Literal["class", "mean"] = "class"  # the class token, or the mean of the patch tokens, without a class token then
    # Empty: a patch is embedded by one product. Channels of 3 x 3 convolutions of stride 2, which another one of `width` channels
    # follows: together they make the patches, so patch_size is 2 ** (len(stem) + 1). Learns faster from few pictures.
    stem: list[int] = field(default_factory=list)
    norm_pre: bool = True  # a norm before the blocks
    patch_bias: bool = False
    patch_dropout: float = 0.0  # share of the patches left out in training, anew for each picture (FLIP, Li et al. 2023)
    merge: MergeConfig = field(default_factory=MergeConfig)  # fewer tokens from block to block, in training and after it;
    select: SelectConfig = field(default_factory=SelectConfig)  # one of the two

    @classmethod
    def deit(cls, **changes: Any) -> ViTConfig:
        """ViT-B/16 as DeiT and timm have it: no norm before the blocks, exact GELU, a bias in the patch embedding, eps 1e-6."""
        values: dict[str, Any] = {
            "patch_size": 16,
            "activation": "gelu",
            "norm_pre": False,
            "patch_bias": True,
            "norm_eps": 1e-6,
            **changes,
        }
        return cls(**values)


class PatchEmbed(nn.Linear):
    """One matrix product on unfolded patches; a row of its weight is a convolution's kernel [3, P, P], flat."""

    def __init__(self, patch_size: int, width: int, bias: bool = False) -> None:
        super().__init__(3 * patch_size**2, width, bias=bias)
        self.patch_size = patch_size

    def forward(self, image: Tensor, kept: Tensor | None = None) -> Tensor:
        """image [B, 3, S, S] -> [B, T, width], row by row. kept [B, T]: the patches that are wanted; the others cost nothing."""
        batch, size, grid = image.shape[0], self.patch_size, image.shape[-1] // self.patch_size
        patches = image.reshape(batch, 3, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)  # [B, grid, grid, 3, P, P]
        if kept is not None:
            patches = patches[torch.arange(batch, device=image.device)[:, None], kept // grid, kept % grid]  # [B, T, 3, P, P]
        return super().forward(patches.reshape(batch, -1, 3 * size**2))


class ConvStem(nn.Sequential):
    """Convolutions of stride 2 in place of the patch embedding (Xiao et al. 2021, "Early convolutions help transformers see
    better"), with group norms, which unlike the paper's batch norms let no picture depend on others."""

    def __init__(self, channels: list[int], width: int) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise([3, *channels]):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.GELU()]
        super().__init__(*layers, nn.Conv2d(channels[-1], width, 3, 2, 1))

    def forward(self, image: Tensor, kept: Tensor | None = None) -> Tensor:
        """As PatchEmbed; patches that are not kept are computed too, because their neighbours' convolutions reach into them."""
        patches = super().forward(image.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)  # [B, N, width]
        return patches if kept is None else patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))


class ViT(nn.Module):
    """Square pictures to patch tokens, with learned positions; a norm stands behind the blocks: `pool` and `norm_tokens`."""

    def __init__(self, config: ViTConfig, image_size: int) -> None:
        super().__init__()
        if image_size % config.patch_size:
            raise UserError(f"patch_size: expected a divisor of the picture size {image_size}, got {config.patch_size}")
        if config.pool not in ("class", "mean"):
            raise UserError(f"pool: expected class or mean, got {config.pool!r}")
        if config.stem and config.patch_size != 2 ** (len(config.stem) + 1):
            raise UserError(
                f"stem: {len(config.stem)} convolutions and the last one make patches of {2 ** (len(config.stem) + 1)} pixels, "
                f"got patch_size {config.patch_size}"
            )
        if config.stem and config.patch_bias:
            raise UserError("patch_bias: the convolutions of a stem have biases of their own, expected False beside stem")
        if any(channels < 8 or channels % 8 for channels in config.stem):
            raise UserError(f"stem: expected channels in multiples of 8, got {config.stem}")
        if not 0 <= config.patch_dropout < 1:
            raise UserError(f"patch_dropout: expected a share in [0, 1), got {config.patch_dropout}")
        self.image_size = image_size
        self.grid = image_size // config.patch_size
        self.kept_patches = max(1, round(self.grid**2 * (1 - config.patch_dropout)))
        width = config.width
        self.patch_embed = (
            ConvStem(config.stem, width) if config.stem else PatchEmbed(config.patch_size, width, config.patch_bias)
        )
        self.class_token = nn.Parameter(width**-0.5 * torch.randn(width)) if config.pool == "class" else None
        prefix = 0 if self.class_token is None else 1
        self.position = nn.Parameter(width**-0.5 * torch.randn(prefix + self.grid**2, width))  # class token, then row by row
        self.norm_pre = nn.LayerNorm(width, config.norm_eps) if config.norm_pre else None
        self.reduces = has_schedule(config.layers, config.merge, config.select)
        self.merges = self.reduces and not config.select.layers
        if self.reduces:
            self.transformer = ReducingTransformer(config, config.merge, config.select, protect=prefix)
        else:
            self.transformer = Transformer(config)
        self.norm_post = nn.LayerNorm(width, config.norm_eps)

    def forward(self, image: Tensor, *, need_size: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """image [B, 3, image_size, image_size] -> tokens [B, T, width], the class token first where there is one; see `pool`.

        need_size returns (tokens, size [B, T]): how many patches each token stands for where they merge, else None.
        T counts the patches that were kept: all but in training with patch dropout, which draws from torch's default generator,
        and what merging or selection leaves of them.
        """
        x, _ = self._embed(image)
        tokens, size = self.transformer(x)[:2] if self.reduces else (self.transformer(x), None)
        return (tokens, size) if need_size else tokens

    def merged_patches(self, image: Tensor) -> Tensor:
        """image as for forward -> [B, grid^2] int64: the place among the tokens at which each patch has ended; -1: left out."""
        if not self.reduces:
            raise ValueError("merged_patches: expected a vision transformer that merges or selects, got one without")
        x, kept = self._embed(image)
        place = self.transformer(x, trace=True).place[:, 0 if self.class_token is None else 1 :]  # [B, T]
        return place if kept is None else place.new_full((place.shape[0], self.grid**2), -1).scatter(1, kept, place)

    def _embed(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> what enters the blocks [B, T, width], and the patches that were kept [B, T]; None: all, in order."""
        if image.ndim != 4 or image.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"image: expected [B, 3, {self.image_size}, {self.image_size}], got {tuple(image.shape)}")
        batch = image.shape[0]
        position = self.position[0 if self.class_token is None else 1 :]  # [grid^2, width]
        kept = None
        if self.training and self.kept_patches < self.grid**2:
            kept = torch.rand(batch, self.grid**2, device=image.device).topk(self.kept_patches).indices  # [B, T]
            position = F.embedding(kept, position)  # [B, T, width]
        x = self.patch_embed(image, kept) + position
        if self.class_token is not None:
            first = (self.class_token + self.position[0]).expand(batch, 1, -1)
            x = torch.cat((first, x), dim=1)
        return x if self.norm_pre is None else self.norm_pre(x), kept

    def norm_tokens(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, width] as forward gives them -> [B, T, width], every one normalised, as ALBEF's fusion sees them."""
        return self.norm_post(tokens)

    def pool(self, tokens: Tensor, size: Tensor | None = None) -> Tensor:
        """tokens [B, T, width], size [B, T] as forward gives it -> [B, width], normalised. The mean is one over patches."""
        if self.class_token is not None:
            return self.norm_post(tokens[:, 0])
        if size is None:
            if self.merges:
                raise ValueError("size: expected [B, T] as forward(need_size=True) gives it, because tokens merge, got None")
            return self.norm_post(tokens.mean(1))
        return self.norm_post((tokens * (size / size.sum(1, keepdim=True))[..., None]).sum(1))


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


_TIMM = {  # timm's and DeiT's names of what stands around the blocks, and in one -> the names here
    "cls_token": "class_token",
    "pos_embed": "position",
    "patch_embed.proj.weight": "patch_embed.weight",
    "patch_embed.proj.bias": "patch_embed.bias",
    "norm.weight": "norm_post.weight",
    "norm.bias": "norm_post.bias",
}
_TIMM_BLOCK = {"attn.qkv": "attn.in_proj", "attn.proj": "attn.out_proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}


def convert_timm(state_dict: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """A vision transformer's weights under the names of timm, DeiT and ALBEF -> under those of a ViT of grid x grid patches.

    The position table is resized where it is of another grid; a classifier ("head.") is left out; names that are not timm's stay
    as they are, for a strict loading to find.
    """
    converted = {}
    for name, tensor in state_dict.items():
        if name.startswith("head."):
            continue
        own = _TIMM.get(name, name)
        if name.startswith("blocks."):
            _, number, part = name.split(".", 2)
            module, _, kind = part.rpartition(".")
            own = f"transformer.blocks.{number}.{_TIMM_BLOCK.get(module, module)}.{kind}"
        if own == "class_token":
            tensor = tensor.reshape(-1)
        elif own == "position":
            tensor = resize_positions(tensor.flatten(0, -2), grid, 1 if "cls_token" in state_dict else 0)
        elif own == "patch_embed.weight":
            tensor = tensor.flatten(1)
        converted[own] = tensor
    return converted
