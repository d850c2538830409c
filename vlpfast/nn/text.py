"""CLIP's text tower: captions, and many prompts that begin alike."""

from __future__ import annotations

from dataclasses import dataclass

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
        before = self._run_prefix(prefix + self.position[: prefix.shape[1]])
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

    def _run_prefix(self, x: Tensor) -> list[KeysValues]:
        """x [T, P, W] -> the keys and values of every block. Of the last block no more is needed."""
        made = []
        for i, block in enumerate(self.transformer.blocks):
            q, k, v = (part.transpose(1, 2) for part in _qkv(block, x))  # [T, H, P, Dh]
            made.append((k, v))
            if i < len(self.transformer.blocks) - 1:
                out = attention(q, k, v, mask="causal", backend=block.attn.backend)
                x = block.feed_forward(x + block.attn.out_proj(out.transpose(1, 2).flatten(2)))
        return made

    def _run_tails(self, x: Tensor, end: Tensor, before: list[KeysValues]) -> Tensor:
        """x [T, C, L, W] -> [T, C, W]: the end tokens behind the last block."""
        place = torch.arange(x.shape[2], device=x.device)
        seen = place[:, None] >= place  # [L, L]
        last = len(self.transformer.blocks) - 1
        for i, (block, (k_before, v_before)) in enumerate(zip(self.transformer.blocks, before, strict=True)):
            q, k, v = _qkv(block, x)  # [T, C, L, H, Dh]
            if i == last:
                here = end[:, None, None].expand(-1, 1, x.shape[-1])  # [C, 1, W]
                x = x.gather(2, here.expand(x.shape[0], -1, -1, -1))  # [T, C, 1, W]
                q = q.flatten(-2).gather(2, here.expand(q.shape[0], -1, -1, -1)).unflatten(-1, q.shape[-2:])
                seen = (place <= end[:, None])[:, None, None]  # [C, 1, 1, L]
            out = _attend(q, k, v, k_before, v_before, seen)
            x = block.feed_forward(x + block.attn.out_proj(out))
        return x.squeeze(2)


def _qkv(block: Block, x: Tensor) -> tuple[Tensor, ...]:
    """x [..., W] -> three of [..., H, Dh]."""
    return block.attn.in_proj(block.norm1(x)).unflatten(-1, (3, block.attn.heads, -1)).unbind(-3)


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
