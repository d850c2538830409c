"""CLIP's text tower: captions, and many prompts that begin alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlpfast.nn.attention import attention
from vlpfast.nn.transformer import Block, Transformer, TransformerConfig

KeysValues = tuple[Tensor, Tensor]  # each [T, H, P, Dh]


@dataclass
class TextConfig(TransformerConfig):
    """The defaults are CLIP's; eos_id is the end token of OpenAI's tokenizer."""

    vocab_size: int = 49408
    eos_id: int = 49407


class TextBlock(Block):
    """A Block that can also run what many prompts begin with and what they go on with apart. All ways are its forward, so that
    whatever wraps blocks (FSDP2, compilation, recomputation) sees them."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Literal["causal"] | None = None,
        part: Literal["all", "prefix", "tails"] = "all",
        before: KeysValues | None = None,
        end: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KeysValues]:
        """part "all": as Block. "prefix": x [T, P, W] -> the same, and its keys and values. "tails": x [T, C, L, W] behind the
        prefix of these keys and values -> the same; with end [C] int64 of the tokens at these places alone, [T, C, 1, W]."""
        if part == "all":
            return super().forward(x, mask)
        q, k, v = self.attn.in_proj(self.norm1(x)).unflatten(-1, (3, self.attn.heads, -1)).unbind(-3)  # [..., H, Dh]
        if part == "prefix":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [T, H, P, Dh]
            out = attention(q, k, v, mask="causal", backend=self.attn.backend).transpose(1, 2).flatten(2)
            return self.feed_forward(x + self.attn.out_proj(out)), (k, v)
        place = torch.arange(x.shape[2], device=x.device)
        if end is None:
            seen = place[:, None] >= place  # [L, L]
        else:
            x, q = _take(x, end), _take(q.flatten(-2), end).unflatten(-1, q.shape[-2:])
            seen = (place <= end[:, None])[:, None, None]  # [C, 1, 1, L]
        assert before is not None
        return self.feed_forward(x + self.attn.out_proj(_attend(q, k, v, *before, seen)))


class TextTower(nn.Module):
    """A causal transformer. A caption is read out at its end token, so nothing behind that counts, whatever it is padded with."""

    def __init__(self, config: TextConfig, context_length: int) -> None:
        super().__init__()
        self.eos_id = config.eos_id
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(0.01 * torch.randn(context_length, config.width))
        self.transformer = Transformer(config, [TextBlock(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embed.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """text [B, L] int64, L <= context_length -> tokens [B, L, width], not yet normalised; see `pool`."""
        if text.ndim != 2 or text.shape[1] > self.position.shape[0]:
            raise ValueError(f"text: expected [B, L] with L at most {self.position.shape[0]}, got {tuple(text.shape)}")
        return self.run(self.token_embed(text))

    def run(self, x: Tensor) -> Tensor:
        """x [B, L, width], token embeddings without positions -> tokens [B, L, width]."""
        return self.transformer(x + self.position[: x.shape[1]], "causal")

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

    def trim(self, text: Tensor) -> Tensor:
        """text [B, L] without the columns behind the last of the rows' first end tokens: the same features for less. A GPU is
        waited for."""
        ends = (text == self.eos_id).int().argmax(1)
        return text[:, : int(ends.max()) + 1] if text.shape[0] else text

    # --- prompts: what is the same in all of them is computed once -------------------------------------------------------

    def encode_prompts(self, prefix: Tensor, tails: Tensor, end: Tensor, *, chunk: int = 256) -> Tensor:
        """What `run` and a read-out would make of T x C prompts, prompt (t, c) being prefix t and then tail c; exact.

        Under a causal mask the prefix is the same in every prompt it begins, layer by layer: it runs once, and the tails attend
        to its keys and values, which are not copied; their gradients are sums over the tails. The last block runs for the end
        tokens alone. CoOp (Zhou et al. 2022): one prefix, start token and context, for all class names. CoCoOp: one for each
        picture.

        prefix [T, P, width] and tails [C, L, width], or [T, C, L, width] where they differ too: token embeddings without
        positions, P + L at most context_length; end [C] int64: the place of each end token in its tail.
        chunk: of more prompts than so many, so many are made at a time and once more in the backward, for memory.
        -> [T, C, width], normalised.
        """
        length = prefix.shape[1] + tails.shape[-2]
        if prefix.ndim != 3 or tails.ndim not in (3, 4) or length > self.position.shape[0]:
            expected = f"[T, P, W] and [(T,) C, L, W] with P + L at most {self.position.shape[0]}"
            raise ValueError(f"prefix, tails: expected {expected}, got {tuple(prefix.shape)} and {tuple(tails.shape)}")
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1, got {chunk}")
        before = []
        x = prefix + self.position[: prefix.shape[1]]
        for block in self.transformer.blocks:
            x, keys_values = block(x, part="prefix")
            before.append(keys_values)
        tails = tails + self.position[prefix.shape[1] : length]
        if tails.ndim == 3:
            tails = tails.expand(prefix.shape[0], -1, -1, -1)
        if tails.shape[0] * tails.shape[1] <= chunk:
            return self.norm(self._run_tails(tails, end, before))
        chunk = max(1, chunk // tails.shape[0])
        parts = zip(tails.split(chunk, 1), end.split(chunk), strict=True)
        made = [
            checkpoint(self._run_tails, part, ends, before, use_reentrant=False, preserve_rng_state=False) for part, ends in parts
        ]
        return self.norm(torch.cat(made, 1))

    def _run_tails(self, x: Tensor, end: Tensor, before: list[KeysValues]) -> Tensor:
        """x [T, C, L, W] -> [T, C, W]: the end tokens behind the last block."""
        blocks = self.transformer.blocks
        for block, keys_values in zip(blocks, before, strict=True):
            x = block(x, part="tails", before=keys_values, end=end if block is blocks[-1] else None)
        return x.squeeze(2)


def _take(x: Tensor, place: Tensor) -> Tensor:
    """x [T, C, L, W], place [C] -> [T, C, 1, W]."""
    return x.gather(2, place[:, None, None].expand(x.shape[0], -1, 1, x.shape[-1]))


def _attend(q: Tensor, k: Tensor, v: Tensor, k_before: Tensor, v_before: Tensor, seen: Tensor) -> Tensor:
    """One softmax over a prefix, of which queries see all, and a tail of their own: two products each for scores and values.

    q [T, C, Q, H, Dh], k and v [T, C, L, H, Dh]; k_before, v_before [T, H, P, Dh]; seen bool, broadcastable to [T, C, H, Q, L].
    -> [T, C, Q, H * Dh]
    """
    shape = q.shape[1:3]  # C, Q
    q = q * q.shape[-1] ** -0.5
    joint = q.flatten(1, 2).transpose(1, 2)  # [T, H, C * Q, Dh]: all tails at once against the prefix
    scores_before = (joint @ k_before.transpose(-1, -2)).unflatten(2, shape).transpose(1, 2)  # [T, C, H, Q, P]
    scores = q.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2)  # [T, C, H, Q, L]
    both = torch.cat((scores_before, scores.masked_fill(~seen, -torch.inf)), -1)
    weights = both.softmax(-1, dtype=torch.promote_types(both.dtype, torch.float32)).to(v.dtype)
    of_before, of_tail = weights.split((k_before.shape[2], k.shape[2]), -1)
    out_before = (of_before.transpose(1, 2).flatten(2, 3) @ v_before).unflatten(2, shape)  # [T, H, C, Q, Dh]
    out = of_tail @ v.transpose(2, 3)  # [T, C, H, Q, Dh]
    return (out.transpose(2, 3) + out_before.permute(0, 2, 3, 1, 4)).flatten(3)
