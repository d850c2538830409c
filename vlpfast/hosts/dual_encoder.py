"""Two towers that meet in one space: what CLIP and its descendants are composed with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.resnet import ResNet, ResNetConfig
from vlpfast.nn.text import TextConfig, TextTower
from vlpfast.nn.vit import ViT, ViTConfig
from vlpfast.types import Progress, UserError, Vocabulary

MAX_LOGIT_SCALE = 100.0


@dataclass
class DualEncoderConfig:
    """The defaults are CLIP's ViT-B/32: 151,277,313 parameters. One of vision and resnet is null."""

    vision: ViTConfig | None = field(default_factory=ViTConfig)
    resnet: ResNetConfig | None = None
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 512
    logit_scale_init: float = math.log(1 / 0.07)  # log of the factor on the cosines

    def vocabularies(self) -> dict[str, Vocabulary]:
        return {"": Vocabulary(self.text.vocab_size, eos_id=self.text.eos_id)}


class DualEncoder(nn.Module):
    """A vision tower, a text tower, a projection of each, and the log of the factor on their cosines.

    An image tower is a module with forward(image, need_size=True) -> (tokens [B, T, width], size) and pool(tokens, size) ->
    [B, width]. Models that stand on it are subclasses, so that its parts have the same names in all their state_dicts.
    """

    def __init__(self, config: DualEncoderConfig, image_size: int, context_length: int) -> None:
        super().__init__()
        if (config.vision is None) == (config.resnet is None):
            raise UserError(f"model: expected one of vision and resnet, got {'neither' if config.vision is None else 'both'}")
        tower = config.vision or config.resnet
        self.vision = ResNet(config.resnet, image_size) if config.vision is None else ViT(config.vision, image_size)
        self.text = TextTower(config.text, context_length)
        self.image_projection = nn.Linear(tower.width, config.embed_dim, bias=config.vision is None)
        self.text_projection = nn.Linear(config.text.width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init))
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def encode_image(self, image: Tensor) -> Tensor:
        """image [B, 3, S, S] -> [B, embed_dim] float32 of unit length."""
        tokens, size = self.vision(image, need_size=True)
        features = self.image_projection(self.vision.pool(tokens, size))
        return F.normalize(features.float(), dim=-1)

    def encode_text(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """text [B, L] int64, each row with its end token -> [B, embed_dim] float32 of unit length. text_mask changes nothing."""
        return self.project_text(self.text.pool(self.text(text), text))

    def project_text(self, pooled: Tensor) -> Tensor:
        """[..., text.width] as the tower reads out -> [..., embed_dim] float32 of unit length."""
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def before_step(self, progress: Progress) -> None:
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
