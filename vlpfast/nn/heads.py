"""What stands on a network's last tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Linear):
    """Into the space where features are compared: a linear layer, then unit length, in float32."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., width] -> [..., embed_dim] float32 of unit length."""
        return F.normalize(super().forward(tokens).float(), dim=-1)


class MLPHead(nn.Sequential):
    """Linear, ReLU, linear: width -> width -> classes. ALBEF's on the fused class token."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
