"""CLIP's ResNets."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.attention import attention
from vlpfast.types import UserError


@dataclass
class ResNetConfig:
    """The defaults are RN50 (embed_dim 1024, text width 512); RN101 has layers [3, 4, 23, 3] (embed_dim 512)."""

    layers: list[int] = field(default_factory=lambda: [3, 4, 6, 3])  # bottlenecks of each of the four stages
    channels: int = 64  # of the stem's output; the last map has 32 times as many

    @property
    def width(self) -> int:
        """Channels of what `pool` gives."""
        return 32 * self.channels


class FixedBatchNorm(nn.Module):
    """Batch norm whose statistics are those that were loaded, in training too: the forward changes no state and a picture depends
    on no other. Scale and shift are parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1. All convolutions have stride 1; where the map shrinks, an average over 2 x 2 stands before the last of
    them and before the shortcut's (Zhang 2019, "Making convolutional networks shift-invariant again")."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        after = 4 * channels
        self.conv1, self.norm1 = nn.Conv2d(before, channels, 1, bias=False), FixedBatchNorm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), FixedBatchNorm(channels)
        self.conv3, self.norm3 = nn.Conv2d(channels, after, 1, bias=False), FixedBatchNorm(after)
        self.shrink = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            parts = {"shrink": self.shrink, "conv": nn.Conv2d(before, after, 1, bias=False), "norm": FixedBatchNorm(after)}
            self.shortcut = nn.Sequential(OrderedDict(parts))
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, 4 * channels, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.shrink(F.relu(self.norm2(self.conv2(y))))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """CLIP's modified ResNet (Radford et al. 2021, section 2.4): a stem of three convolutions and an average pooling, strides by
    averages, and an attention pooling whose query is the mean of the map.

    As an image tower: forward gives the last map's places, `pool` one vector, whose projection is the host's (OpenAI's c_proj,
    with a bias). Made to be loaded: its batch norms keep the statistics that the weights came with (FixedBatchNorm), so one from
    nothing has none.
    """

    def __init__(self, config: ResNetConfig, image_size: int) -> None:
        super().__init__()
        if len(config.layers) != 4 or min(config.layers) < 1:
            raise UserError(f"resnet.layers: expected numbers of blocks for four stages, got {config.layers}")
        if config.channels < 2 or config.channels % 2:
            raise UserError(f"resnet.channels: expected an even number, got {config.channels}")
        if image_size % 32:
            raise UserError(f"resnet: expected a picture size in multiples of 32, got {image_size}")
        self.image_size = image_size
        self.heads = max(1, config.width // 64)
        half, width = config.channels // 2, config.width
        stem = []
        for before, after, stride in ((3, half, 2), (half, half, 1), (half, config.channels, 1)):
            stem += [nn.Conv2d(before, after, 3, stride, 1, bias=False), FixedBatchNorm(after), nn.ReLU()]
        self.stem = nn.Sequential(*stem, nn.AvgPool2d(2))
        self.stages = nn.ModuleList()
        before = config.channels
        for number, depth in enumerate(config.layers):
            channels = config.channels * 2**number
            strides = [1 if number == 0 else 2] + [1] * (depth - 1)
            blocks = []
            for stride in strides:
                blocks.append(Bottleneck(before, channels, stride))
                before = 4 * channels
            self.stages.append(nn.Sequential(*blocks))
        self.position = nn.Parameter(width**-0.5 * torch.randn((image_size // 32) ** 2 + 1, width))  # mean, then row by row
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        for linear in (self.q_proj, self.kv_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, image: Tensor, *, need_size: bool = False) -> Tensor | tuple[Tensor, None]:
        """image [B, 3, image_size, image_size] -> tokens [B, T, width], row by row; with need_size (tokens, None), as ViT."""
        if image.ndim != 4 or image.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"image: expected [B, 3, {self.image_size}, {self.image_size}], got {tuple(image.shape)}")
        x = self.stem(image.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens, None) if need_size else tokens

    def pool(self, tokens: Tensor, size: None = None) -> Tensor:
        """tokens [B, T, width] -> [B, width]: what the mean's query gathers, its heads side by side."""
        x = torch.cat((tokens.mean(1, keepdim=True), tokens), 1) + self.position  # [B, 1 + T, width]
        q = self.q_proj(x[:, :1]).unflatten(-1, (self.heads, -1))
        k, v = self.kv_proj(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return attention(*(part.transpose(1, 2) for part in (q, k, v))).flatten(1)
