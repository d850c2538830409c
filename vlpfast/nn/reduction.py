"""A transformer whose sequence gets shorter from block to block: similar tokens merge, or only those attended to go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlpfast.nn.transformer import Block, Transformer, TransformerConfig
from vlpfast.ops.tokens import add_merge_norm, bipartite_match, importance, select, track
from vlpfast.types import UserError


@dataclass
class MergeConfig:
    """Token merging: between attention and feed-forward part, r tokens join the ones that they are most similar to.

    Bolya et al. 2023, "Token merging: your ViT but faster", arXiv 2210.09461. Similar are tokens whose keys, averaged over heads,
    have a large cosine. A block merges at most half of its tokens; a class token is never merged.
    """

    r: int = 0  # tokens merged away in each block; 0: none
    per_layer: list[int] = field(default_factory=list)  # r of each block in turn, in place of one for all
    mode: Literal["weighted", "mean"] = "weighted"  # the mean of the patches that tokens stand for, or of the tokens themselves
    proportional: bool = True  # attention counts a token as often as it stands for patches


@dataclass
class SelectConfig:
    """Token selection: between attention and feed-forward part, the patches that the class token attends to most go on.

    Liang et al. 2022, "Not all patches are what you need" (EViT), arXiv 2202.07800. Without a class token those go on that all
    tokens attend to most, on average, as in VisionZip (Yang et al. 2024, arXiv 2412.04467): that takes the matrix of weights.
    """

    layers: list[int] = field(default_factory=list)  # the blocks that select, counted from 0; EViT's: [3, 6, 9]; empty: none
    keep: float = 0.7  # share of the patches that each of them keeps, rounded up
    rest: Literal["fuse", "drop"] = "fuse"  # the others become one token, their sum weighted by attention, or are lost


class Tokens(NamedTuple):
    x: Tensor  # [B, T, width]
    size: Tensor | None  # [B, T] how many of the first tokens each one stands for; None: all alike
    place: Tensor | None  # [B, T0] int64, where each of the first tokens is now, -1 if it was dropped; None: not traced


Reduce = Callable[[Tokens, Tensor, Tensor, Tensor, nn.LayerNorm], tuple[Tokens, Tensor | None]]


class ReducingBlock(Block):
    """A block with `reduce(tokens, delta, q, k, norm) -> tokens, norm of their x or None` between its two parts.

    tokens and delta are what stood before the attention, and what it adds.
    """

    def __init__(self, config: TransformerConfig, reduce: Reduce | None, proportional: bool):
        super().__init__(config)
        self.reduce = reduce
        self.proportional = proportional

    def forward(self, tokens: Tokens) -> Tokens:
        key_bias = tokens.size.log() if self.proportional and tokens.size is not None else None  # [B, T]
        delta, q, k = self.attn(self.norm1(tokens.x), key_bias=key_bias, need_qk=True)
        if self.reduce is None:
            return tokens._replace(x=self.feed_forward(tokens.x + delta))
        tokens, normed = self.reduce(tokens, delta, q, k, self.norm2)
        return tokens._replace(x=self.feed_forward(tokens.x, normed))


class ReducingTransformer(Transformer):
    """A Transformer without a mask, of the same parameters. `protect`: so many tokens, the first ones, are left as they are."""

    def __init__(self, config: TransformerConfig, merging: MergeConfig, selection: SelectConfig, protect: int) -> None:
        schedule: list[Reduce | None] = [None] * config.layers
        for layer, r in enumerate(merging.per_layer or [merging.r] * config.layers):
            if r:
                schedule[layer] = partial(merge_similar, r=r, mode=merging.mode, protect=protect)
        for layer in selection.layers:
            schedule[layer] = partial(select_attended, keep=selection.keep, rest=selection.rest, protect=protect)
        super().__init__(config, (ReducingBlock(config, reduce, merging.proportional) for reduce in schedule))

    def forward(self, x: Tensor, *, trace: bool = False) -> Tokens:
        """x [B, T0, width] -> what is left of it; with trace also where each token has gone."""
        place = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if trace else None
        tokens = Tokens(x, None, place)
        for block in self.blocks:
            tokens = self.run(block, tokens)
        return tokens


def merge_similar(
    tokens: Tokens, delta: Tensor, q: Tensor, k: Tensor, norm: nn.LayerNorm, *, r: int, mode: str, protect: int
) -> tuple[Tokens, Tensor]:
    """k [B, H, T, Dh]: the keys of the attention before. The sequence gets r shorter, or by what half of it allows."""
    match = bipartite_match(k.detach().mean(1), r, protect=protect)
    x, size, normed = add_merge_norm(
        tokens.x, delta, match, tokens.size, weight=norm.weight, bias=norm.bias, eps=norm.eps, mode=mode
    )
    return Tokens(x, size, None if tokens.place is None else track(tokens.place, match)), normed


def select_attended(
    tokens: Tokens, delta: Tensor, q: Tensor, k: Tensor, norm: nn.LayerNorm, *, keep: float, rest: str, protect: int
) -> tuple[Tokens, None]:
    """q, k [B, H, T, Dh]: of the attention before. Of the T - protect others ceil(keep * (T - protect)) go on, in order."""
    tokens = tokens._replace(x=tokens.x + delta)
    batch, length = tokens.x.shape[:2]
    count = math.ceil(keep * (length - protect))
    if count == length - protect:
        return tokens, None
    score = importance(q, k, 0 if protect else None).mean(1)  # [B, T]
    x, indices = select(tokens.x, score, count, rest=rest, protect=protect)  # indices [B, protect + count]
    if tokens.place is None:
        return Tokens(x, None, None), None
    place = indices.new_full((batch, length), -1 if rest == "drop" else x.shape[1] - 1)
    place = place.scatter(1, indices, torch.arange(indices.shape[1], device=place.device).expand(batch, -1))
    return Tokens(x, None, torch.where(tokens.place < 0, -1, place.gather(1, tokens.place.clamp(min=0)))), None


def has_schedule(layers: int, merging: MergeConfig, selection: SelectConfig) -> bool:
    """Whether `layers` blocks merge or select. UserError: settings that make no sense."""
    merges = bool(merging.r or any(merging.per_layer))
    if merges and selection.layers:
        raise UserError("merge and select: expected one of them, got both")
    if merging.r and merging.per_layer:
        raise UserError(f"merge: expected r or per_layer, got both, {merging.r} and {merging.per_layer}")
    if merging.per_layer and len(merging.per_layer) != layers:
        raise UserError(f"merge.per_layer: expected a number for each of the {layers} blocks, got {merging.per_layer}")
    if merging.r < 0 or any(r < 0 for r in merging.per_layer):
        raise UserError(f"merge: expected 0 or more tokens to merge, got {merging.per_layer or merging.r}")
    if merging.mode not in ("weighted", "mean"):
        raise UserError(f"merge.mode: expected weighted or mean, got {merging.mode!r}")
    if len(set(selection.layers)) < len(selection.layers) or any(not 0 <= layer < layers for layer in selection.layers):
        raise UserError(f"select.layers: expected blocks from 0 to {layers - 1}, each once, got {selection.layers}")
    if not 0 < selection.keep <= 1:
        raise UserError(f"select.keep: expected a share in (0, 1], got {selection.keep}")
    if selection.rest not in ("fuse", "drop"):
        raise UserError(f"select.rest: expected fuse or drop, got {selection.rest!r}")
    return merges or bool(selection.layers)
