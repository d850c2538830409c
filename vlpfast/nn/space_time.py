"""Transformers of clips: divided space-time attention, attention over frames alone, frames first and time after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.attention import Attention
from vlpfast.nn.transformer import Block, Stack, Transformer, TransformerConfig
from vlpfast.nn.vit import ViT, ViTConfig
from vlpfast.ops.temporal import temporal_attention
from vlpfast.types import UserError

ClassToken = Literal["clip", "frame", "none"]


class DividedBlock(nn.Module):
    """TimeSformer's block (Bertasius et al. 2021): attention over the frames at each patch, then a block over each frame.

    The attention over frames ends in a linear layer that starts at zero: the block starts as `spatial` on every frame by itself.

    class_token: what place 0 of each frame is.
        "clip": the clip's class token, the same in all frames. It takes no part in the attention over frames, attends to every
            frame, and is updated by the mean over the frames (ALPRO, Youku-mPLUG).
        "frame": the frame's own class token, which takes no part in the attention over frames (SurgCLIP).
        "none": a patch as the others (HD-VILA).
    """

    def __init__(self, config: TransformerConfig, spatial: Block, class_token: ClassToken = "clip") -> None:
        super().__init__()
        if class_token not in ("clip", "frame", "none"):
            raise UserError(f"class_token: expected clip, frame or none, got {class_token!r}")
        self.class_token = class_token
        self.spatial = spatial
        self.temporal_norm = nn.LayerNorm(config.width)
        self.temporal_attn = Attention(config.width, config.heads)
        self.temporal_fc = nn.Linear(config.width, config.width)
        nn.init.zeros_(self.temporal_fc.weight)
        nn.init.zeros_(self.temporal_fc.bias)
        self.start_from_spatial()

    def start_from_spatial(self) -> None:
        """Copies the spatial attention and its norm to those over frames; again after pictures' weights have been loaded."""
        self.temporal_attn.load_state_dict(self.spatial.attn.state_dict())
        self.temporal_norm.load_state_dict(self.spatial.norm1.state_dict())

    def forward(self, x: Tensor, frame: int | None = None) -> Tensor:
        """x [B, T, N, width] -> the same; with `frame` that frame alone, [B, 1, N, width], without the cost of the others'
        queries, spatial attention and feed-forward part."""
        if frame is not None and self.class_token == "clip":
            raise ValueError("frame: expected None with class_token='clip', which needs every frame")
        first = 0 if self.class_token == "none" else 1
        patches = self.temporal_norm(x[:, :, first:])
        if frame is not None:
            x = x.narrow(1, frame, 1)
        update = self.temporal_fc(self._over_frames(patches, frame))
        x = torch.cat((x[:, :, :first], x[:, :, first:] + update), 2) if first else x + update
        frames = x.flatten(0, 1)  # [B * T, N, width]
        update = self.spatial.attn(self.spatial.norm1(frames)).unflatten(0, x.shape[:2])
        if self.class_token == "clip":
            of_clip = update[:, :, :1].mean(1, keepdim=True).expand(-1, x.shape[1], -1, -1)
            update = torch.cat((of_clip, update[:, :, 1:]), 2)
        x = x + update
        return self.spatial.feed_forward(x)

    def _over_frames(self, x: Tensor, frame: int | None) -> Tensor:
        attn, width = self.temporal_attn, x.shape[3]
        if frame is None:
            q, k, v = attn.in_proj(x).chunk(3, -1)
        else:
            weight, bias = attn.in_proj.weight, attn.in_proj.bias
            q = F.linear(x.narrow(1, frame, 1), weight[:width], bias[:width])
            k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, -1)
        return attn.out_proj(temporal_attention(q, k, v, attn.heads))


class SpaceTimeTransformer(Stack):
    """`stack`'s blocks (a new Transformer's unless given), each with attention over frames before it."""

    def __init__(self, config: TransformerConfig, class_token: ClassToken = "clip", stack: Transformer | None = None) -> None:
        spatial = (stack or Transformer(config)).blocks
        super().__init__((DividedBlock(config, block, class_token) for block in spatial), config.checkpointing)

    def start_from_spatial(self) -> None:
        for block in self.blocks:
            block.start_from_spatial()

    def forward(self, x: Tensor, frame: int | None = None) -> Tensor:
        """x [B, T, N, width] -> the same; with `frame` that frame alone, [B, 1, N, width]: the last block makes no other."""
        for i, block in enumerate(self.blocks):
            x = self.run(block, x, frame if i == len(self.blocks) - 1 else None)
        return x


@dataclass
class SpaceTimeConfig(ViTConfig):
    """`pool` says whether there is a class token, `class_token` whose it is ("none" without one)."""

    patch_size: int = 16
    frames: int = 8  # time embeddings; for another number of frames the nearest are taken
    class_token: ClassToken = "clip"


class SpaceTimeViT(ViT):
    """TimeSformer: a ViT whose blocks are divided ones, with an embedding of time that starts at zero.

    Weights of a ViT go to patch_embed, class_token, position, the norms and transformer.blocks.N.spatial; then
    transformer.start_from_spatial().
    """

    def __init__(self, config: SpaceTimeConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        if (config.class_token == "none") != (config.pool == "mean"):
            raise UserError(f"class_token: expected none with pool mean and only there, got {config.class_token!r}")
        if self.reduces:
            raise UserError("merge, select: expected no schedule (positions attend over frames), got one")
        if config.patch_dropout:
            raise UserError(f"patch_dropout: expected 0 (positions attend over frames), got {config.patch_dropout}")
        self.transformer = SpaceTimeTransformer(config, config.class_token, self.transformer)
        self.time = nn.Parameter(torch.zeros(config.frames, config.width))

    def forward(self, video: Tensor) -> Tensor:
        """video [B, T, 3, image_size, image_size] -> tokens [B, T, N, width], class tokens first where there are any, not yet
        normalised: see clip_tokens, frame_features and all_tokens. A single frame gets no embedding of time."""
        if video.ndim != 5 or video.shape[2:] != (3, self.image_size, self.image_size):
            raise ValueError(f"video: expected [B, T, 3, {self.image_size}, {self.image_size}], got {tuple(video.shape)}")
        batch, frames = video.shape[:2]
        first = 0 if self.class_token is None else 1
        x = self.patch_embed(video.flatten(0, 1)) + self.position[first:]  # [B * T, P, width]
        x = x.unflatten(0, (batch, frames))
        if frames > 1:
            x = x + resize_times(self.time, frames)[:, None]
        if self.class_token is not None:
            token = (self.class_token + self.position[0]).expand(batch, frames, 1, -1)
            x = torch.cat((token, x), 2)
        return self.transformer(self.norm_pre(x))

    def clip_tokens(self, tokens: Tensor) -> Tensor:
        """[B, T, N, width] -> [B, N, width]: normalised, the mean over the frames at each place (ALPRO)."""
        return self.norm_post(tokens).mean(1)

    def frame_features(self, tokens: Tensor) -> Tensor:
        """[B, T, N, width] -> [B, T, width]: the mean of each frame's patches, normalised (SurgCLIP)."""
        return self.norm_post(tokens[:, :, 0 if self.class_token is None else 1 :].mean(2))

    def all_tokens(self, tokens: Tensor) -> Tensor:
        """[B, T, N, width] -> normalised, the clip's class token (the mean of the frames') and all patches, frame by frame,
        [B, 1 + T * P, width] (Youku-mPLUG); without class tokens [B, T * P, width]."""
        tokens = self.norm_post(tokens)
        if self.class_token is None:
            return tokens.flatten(1, 2)
        return torch.cat((tokens[:, :, 0].mean(1, keepdim=True), tokens[:, :, 1:].flatten(1, 2)), 1)


def resize_times(table: Tensor, frames: int, mode: Literal["nearest", "linear"] = "nearest") -> Tensor:
    """Embeddings of time [T, width] for another number of frames -> [frames, width]; HD-VILA's are linear."""
    if table.shape[0] == frames:
        return table
    return F.interpolate(table.T[None], frames, mode=mode, align_corners=False if mode == "linear" else None)[0].T


class FrameTransformer(nn.Module):
    """Time after space: a transformer over the vectors that another encoder makes of each frame."""

    def __init__(self, config: TransformerConfig, frames: int) -> None:
        super().__init__()
        self.time = nn.Parameter(torch.zeros(frames, config.width))
        self.transformer = Transformer(config)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, width]; mask [B, T] bool, True = a frame (one in every clip at least) -> normalised [B, T, width]."""
        x = x + resize_times(self.time, x.shape[1])
        return self.norm(self.transformer(x, None if mask is None else mask[:, None, None]))


class FactorisedViT(nn.Module):
    """Every frame by a ViT, then a transformer over the frames' vectors (Arnab et al. 2021, "ViViT", model 2)."""

    def __init__(self, spatial: ViTConfig, temporal: TransformerConfig, image_size: int, frames: int) -> None:
        super().__init__()
        if temporal.width != spatial.width:
            raise UserError(f"temporal.width: expected the width {spatial.width} of the frames' encoder, got {temporal.width}")
        self.spatial = ViT(spatial, image_size)
        self.temporal = FrameTransformer(temporal, frames)

    def forward(self, video: Tensor) -> Tensor:
        """video [B, T, 3, image_size, image_size] -> a vector for each frame, normalised, [B, T, width]."""
        if video.ndim != 5:
            raise ValueError(f"video: expected [B, T, 3, S, S], got {tuple(video.shape)}")
        frames = self.spatial.pool(self.spatial(video.flatten(0, 1)))  # [B * T, width]
        return self.temporal(frames.unflatten(0, video.shape[:2]))


class FrameMixer(nn.Module):
    """SimVLG's merging of frames, for a frozen encoder's blocks: x + alpha * (x averaged over the frames by attention).

    Queries and keys are projected to `inner` channels, values are the input's own channels, head by head; the scale is
    inner ** -0.5, not a head's. alpha starts at 0. A single frame gives (1 + alpha) x.
    Jian et al. 2024, "Expedited Training of Visual Conditioned Language Generation via Redundancy Reduction".
    """

    def __init__(self, width: int, inner: int = 256, heads: int = 8) -> None:
        super().__init__()
        for name, number in (("width", width), ("inner", inner)):
            if number % heads:
                raise UserError(f"heads: expected a divisor of {name} {number}, got {heads}")
        self.heads = heads
        self.qk_proj = nn.Linear(width, 2 * inner)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, N, width] -> the same."""
        q, k = self.qk_proj(x).chunk(2, -1)
        return x + self.alpha * temporal_attention(q, k, x, self.heads, scale=q.shape[-1] ** -0.5)
