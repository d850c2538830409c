"""A transformer whose sequence gets shorter from block to block: similar tokens merge, or only those attended to go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlpfast.nn.transformer import Block, Transformer, TransformerConfig
from vlpfast.ops.tokens import bipartite_match, importance, merge, select, track
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


class ReducingBlock(Block):
    """A block with `reduce(tokens, q, k) -> tokens` between its two parts."""

    def __init__(self, config: TransformerConfig, reduce: Callable[[Tokens, Tensor, Tensor], Tokens] | None, proportional: bool):
        super().__init__(config)
        self.reduce = reduce
        self.proportional = proportional

    def forward(self, tokens: Tokens) -> Tokens:
        key_bias = tokens.size.log() if self.proportional and tokens.size is not None else None  # [B, T]
        out, q, k = self.attn(self.norm1(tokens.x), key_bias=key_bias, need_qk=True)
        tokens = tokens._replace(x=tokens.x + out)
        if self.reduce is not None:
            tokens = self.reduce(tokens, q, k)
        return tokens._replace(x=self.feed_forward(tokens.x))


class ReducingTransformer(Transformer):
    """A Transformer without a mask, of the same parameters. `protect`: so many tokens, the first ones, are left as they are."""

    def __init__(self, config: TransformerConfig, merging: MergeConfig, selection: SelectConfig, protect: int) -> None:
        schedule: list[Callable[[Tokens, Tensor, Tensor], Tokens] | None] = [None] * config.layers
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


def merge_similar(tokens: Tokens, q: Tensor, k: Tensor, *, r: int, mode: str, protect: int) -> Tokens:
    """k [B, H, T, Dh]: the keys of the attention before. The sequence gets r shorter, or by what half of it allows."""
    match = bipartite_match(k.detach().mean(1), r, protect=protect)
    x, size = merge(tokens.x, match, size=tokens.size, mode=mode)
    return Tokens(x, size, None if tokens.place is None else track(tokens.place, match))


def select_attended(tokens: Tokens, q: Tensor, k: Tensor, *, keep: float, rest: str, protect: int) -> Tokens:
    """q, k [B, H, T, Dh]: of the attention before. Of the T - protect others ceil(keep * (T - protect)) go on, in order."""
    batch, length = tokens.x.shape[:2]
    count = math.ceil(keep * (length - protect))
    if count == length - protect:
        return tokens
    score = importance(q, k, 0 if protect else None).mean(1)  # [B, T]
    x, indices = select(tokens.x, score, count, rest=rest, protect=protect)  # indices [B, protect + count]
    if tokens.place is None:
        return Tokens(x, None, None)
    place = indices.new_full((batch, length), -1 if rest == "drop" else x.shape[1] - 1)
    place = place.scatter(1, indices, torch.arange(indices.shape[1], device=place.device).expand(batch, -1))
    return Tokens(x, None, torch.where(tokens.place < 0, -1, place.gather(1, tokens.place.clamp(min=0))))


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
