"""CLIP's text tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlpfast.nn.transformer import Transformer, TransformerConfig


@dataclass
class TextConfig(TransformerConfig):
    """The defaults are CLIP's; eos_id is the end token of OpenAI's tokenizer."""

    vocab_size: int = 49408
    eos_id: int = 49407


class TextTower(nn.Module):
    """A causal transformer. A caption is read out at its end token, so nothing behind that counts, whatever it is padded with."""

    def __init__(self, config: TextConfig, context_length: int) -> None:
        super().__init__()
        self.eos_id = config.eos_id
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(0.01 * torch.randn(context_length, config.width))
        self.transformer = Transformer(config)
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embed.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """text [B, L] int64, L <= context_length -> tokens [B, L, width], not yet normalised; see `pool`."""
        if text.ndim != 2 or text.shape[1] > self.position.shape[0]:
            raise ValueError(f"text: expected [B, L] with L at most {self.position.shape[0]}, got {tuple(text.shape)}")
        x = self.token_embed(text) + self.position[: text.shape[1]]
        return self.transformer(x, "causal")

    def pool(self, tokens: Tensor, text: Tensor) -> Tensor:
        """tokens [B, L, width], text [B, L] -> [B, width], normalised: the token at each caption's first eos_id.

        ValueError: a caption without eos_id (another tokenizer's ids). On a GPU, where looking would mean waiting for it, such a
        caption is read out at its first token instead.
        """
        is_end = text == self.eos_id  # [B, L]
        if text.device.type == "cpu" and not torch.compiler.is_compiling() and not is_end.any(1).all():
            raise ValueError(
                f"text: expected the end token {self.eos_id} in every caption, got one without: made by another tokenizer?"
            )
        end = is_end.int().argmax(1)  # [B]
        return self.norm(tokens[torch.arange(text.shape[0], device=text.device), end])
