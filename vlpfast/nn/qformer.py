"""Q-Former: learned queries that read a picture by cross-attention and share BERT's self-attention with a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.bert import (
    BertCache,
    BertConfig,
    CrossAttention,
    FeedForward,
    LayerCache,
    SelfAttention,
    check_config,
    embed_tokens,
    initialize,
    positions_from,
    run_layer,
    self_mask,
)
from vlpfast.nn.bert_convert import StateDict, convert_bert
from vlpfast.types import UserError

ContextMask = Tensor | Mapping[int, Tensor]


@dataclass
class QFormerConfig(BertConfig):
    """The defaults are BLIP-2's: BERT-base, one token more ([DEC]), a picture's tokens of ViT-g."""

    vocab_size: int = 30523
    type_vocab: int = 0
    cross_attention: list[int] = field(default_factory=lambda: [0, 2, 4, 6, 8, 10])
    context_width: int = 1408
    queries: int = 32
    # "full": text enters and its states come out; "input": it enters and only the queries come out (InstructBLIP), so that the
    # last layer has no feed-forward part for it; "none": queries alone, without embeddings of tokens
    text: Literal["full", "input", "none"] = "full"


class QFormerLayer(nn.Module):
    """BERT's layer with cross-attention for queries alone, and a feed-forward part each for queries and for text."""

    def __init__(self, config: QFormerConfig, cross_attention: bool, text: bool) -> None:
        super().__init__()
        self.attn = SelfAttention(config)
        self.cross = CrossAttention(config) if cross_attention else None
        self.query_feed_forward = FeedForward(config)
        self.feed_forward = FeedForward(config) if text else None

    def forward(
        self,
        queries: Tensor | None,  # [B, Q, C]
        text: Tensor | None,  # [B, L, C]
        mask: Tensor | Literal["causal"] | None,
        context: Tensor | None,
        context_mask: Tensor | None,
        cache: LayerCache,
        need_text: bool,
    ) -> tuple[Tensor | None, Tensor | None, LayerCache]:
        """One self-attention over [queries, text], either of which may be missing -> both of them, what the cache becomes.

        They stay apart between layers and are joined for the products of self-attention alone. Without need_text, or a
        feed-forward part for it, None comes out for the text.
        """
        parts = [part for part in (queries, text) if part is not None]
        x, tokens = self.attn(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], mask, cache.tokens)
        parts = list(x.split([part.shape[1] for part in parts], dim=1))
        seen = cache.context
        if queries is not None:
            queries = parts.pop(0)
            if self.cross is not None:
                seen = self.cross.read(context, context_mask) if seen is None else seen
                queries, _ = self.cross(queries, seen)
            queries = self.query_feed_forward(queries)
        text = self.feed_forward(parts.pop()) if parts and need_text and self.feed_forward is not None else None
        return queries, text, LayerCache(tokens, seen)


class QFormer(nn.Module):
    """The Q-Former of BLIP-2 (Li et al. 2023, arXiv 2301.12597), section 3.1, and of InstructBLIP (Dai et al. 2023, 2305.06500).

    Three ways in which queries and text see each other, made not by masks but by what passes through together:

        contrast    not at all: `encode_queries`, `encode_text`
        matching    each the other, all of it; so too with an instruction: `encode_pairs`
        generation  text sees queries and the text before it: `encode_queries` with a cache, `encode_text` with that cache, causal

    The queries have no positions; those of the text begin at 0. One norm serves both. Queries and weights start from N(0, 0.02),
    biases at 0; BLIP-2 starts from BERT-base, with its feed-forward parts for queries as for text (`copy_text_parts`). A picture
    may stand for several consecutive rows: see Bert.run's `context`.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        check_config(config)
        if config.text not in ("full", "input", "none"):
            raise UserError(f"text: expected full, input or none, got {config.text!r}")
        if config.type_vocab:
            raise UserError(f"type_vocab: expected 0, a Q-Former has no segments, got {config.type_vocab}")
        if config.causal_attention:
            raise UserError("causal_attention: expected false, a Q-Former has one self-attention for all, got true")
        if config.queries < 1:
            raise UserError(f"queries: expected at least 1, got {config.queries}")
        self.config = config
        self.query_tokens = nn.Parameter(0.02 * torch.randn(config.queries, config.width))
        has_text = config.text != "none"
        self.token_embed = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id) if has_text else None
        self.position_embed = nn.Embedding(config.max_positions, config.width) if has_text else None
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        last = config.layers - 1
        self.layers = nn.ModuleList(
            QFormerLayer(config, i in config.cross_attention, config.text == "full" or (has_text and i < last))
            for i in range(config.layers)
        )
        self.apply(initialize)

    def forward(
        self,
        context: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        mode: Literal["contrast", "matching", "generation"] = "matching",
        queries: Tensor | None = None,
        context_mask: ContextMask | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """context [B, T, context_width], text [B, L] int64 or none, text_mask [B, L] bool -> states [B, Q, C], [B, L, C] or None.

        For the rest see the methods that this calls.
        """
        if mode not in ("contrast", "matching", "generation"):
            raise ValueError(f"mode: expected contrast, matching or generation, got {mode!r}")
        if text is not None and mode == "matching":
            return self.encode_pairs(text, text_mask, context, queries=queries, context_mask=context_mask)
        cache = BertCache() if mode == "generation" else None
        states = self.encode_queries(context, queries=queries, context_mask=context_mask, cache=cache)
        return states, None if text is None else self.encode_text(text, text_mask, cache=cache)

    def encode_queries(
        self,
        context: Tensor | BertCache,
        *,
        queries: Tensor | None = None,
        context_mask: ContextMask | None = None,
        cache: BertCache | None = None,
    ) -> Tensor:
        """context [B', T, context_width] -> states of the queries [B, Q, C].

        Args:
            context: or a cache that has read it, and its mask, in another pass (`BertCache.of_context`).
            queries: [B, Q', C] in place of the learned ones, from before the norm (GeoX adds a vector of the picture to them);
                B may be a multiple of B'. None: B = B'.
            context_mask: [B', T] bool, True = seen, or float, added to the scores (GeoX's gates); or such by layer,
                {4: ..., 6: ...}, and the other layers see everything.
            cache: an empty one, which then has the queries' keys and values for `encode_text`, and the context's.
        """
        x = self._embed_queries(queries, _rows(context) if queries is None else queries.shape[0])
        if cache is not None:
            cache.prefix = x.shape[1]
        return self._run(x, None, None, context, context_mask, cache)[0]

    def encode_text(self, text: Tensor, text_mask: Tensor | None = None, *, cache: BertCache | None = None) -> Tensor:
        """text [B, L] int64, text_mask [B, L] bool, True = token -> [B, L, C]: all tokens see each other, and no picture.

        With the cache of `encode_queries` a token sees the queries and what is before it, and the cache grows by the text;
        text_mask then has a column for each token of the text so far. Texts padded at their ends need none. Beams: see BertCache.
        """
        self._check_full()
        if cache is None:
            return self._run(None, self._embed_text(text), self_mask("joint", text_mask, *text.shape, 0, text.device), None)[1]
        if not cache.prefix:
            raise ValueError("cache: expected one that encode_queries has filled, got an empty one")
        past = cache.length()
        if text_mask is not None:
            text_mask = F.pad(text_mask, (cache.prefix, 0), value=True)
        mask = self_mask("causal", text_mask, *text.shape, past, text.device)
        return self._run(None, self._embed_text(text, past - cache.prefix), mask, None, None, cache)[1]

    def encode_pairs(
        self,
        text: Tensor,
        text_mask: Tensor | None,
        context: Tensor | BertCache,
        *,
        queries: Tensor | None = None,
        context_mask: ContextMask | None = None,
        need_text: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """text [B, L] int64, text_mask [B, L] bool, context [B', T, context_width] -> states [B, Q, C], [B, L, C].

        Queries and text see each other, the queries the picture too. B may be a multiple of B'. For the rest see
        `encode_queries`. need_text: False leaves out what only the text's states take, and None comes in their place.
        """
        x = self._embed_queries(queries, text.shape[0])
        if text_mask is not None:
            text_mask = F.pad(text_mask, (x.shape[1], 0), value=True)
        mask = self_mask("joint", text_mask, text.shape[0], x.shape[1] + text.shape[1], 0, text.device)
        return self._run(x, self._embed_text(text), mask, context, context_mask, need_text=need_text)

    def copy_text_parts(self) -> None:
        """The queries' feed-forward parts become what the text's are: BLIP-2's start, once BERT's weights are loaded."""
        self._check_full()
        for layer in self.layers:
            layer.query_feed_forward.load_state_dict(layer.feed_forward.state_dict())

    def _run(
        self,
        queries: Tensor | None,
        text: Tensor | None,
        mask: Tensor | Literal["causal"] | None,
        context: Tensor | BertCache | None,
        context_mask: ContextMask | None = None,
        cache: BertCache | None = None,
        need_text: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        if isinstance(context, BertCache) and context_mask is not None:
            raise ValueError("context_mask: expected None beside a context that was read with its own, got one")
        context, read = (None, context) if isinstance(context, BertCache) else (context, cache)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            context_mask_here = context_mask.get(i) if isinstance(context_mask, Mapping) else context_mask
            before = LayerCache() if read is None else read.layers.get(i, LayerCache())
            wanted = need_text or i < last
            queries, text, after = run_layer(layer, self.config, queries, text, mask, context, context_mask_here, before, wanted)
            if cache is not None:
                cache.layers[i] = after
        return queries, text

    def _embed_queries(self, queries: Tensor | None, batch: int) -> Tensor:
        """-> [B, Q, C], normalised"""
        x = self.norm(self.query_tokens).expand(batch, -1, -1) if queries is None else self.norm(queries)
        return F.dropout(x, self.config.dropout, self.training)

    def _embed_text(self, text: Tensor, past: int = 0) -> Tensor:
        """[B, L] -> [B, L, C], normalised"""
        if self.token_embed is None:
            raise ValueError("text: expected none, this Q-Former was made without (text=none)")
        positions = positions_from(past, text, self.config.max_positions)
        x = self.norm(embed_tokens(text, positions, self.token_embed, self.position_embed))
        return F.dropout(x, self.config.dropout, self.training)

    def _check_full(self) -> None:
        if self.config.text != "full":
            raise ValueError(f"text: expected a Q-Former whose last layer has a part for it, got text={self.config.text}")


def convert_qformer(state_dict: StateDict, config: QFormerConfig) -> dict[str, Tensor]:
    """A Q-Former's weights in a whole model's state dict, under LAVIS' names ("Qformer.bert.") or transformers' ("qformer."), for
    QFormer(config). What of them a Q-Former of config.text has no place for is left out.

    UserError: a tensor is missing or too many. Checkpoints of BLIP-2's second stage have no text parts: of those text="none".
    """
    prefix = "Qformer.bert." if any(name.startswith("Qformer.") for name in state_dict) else "qformer."
    own = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    # transformers' BLIP-2 keeps the embeddings beside the Q-Former
    own |= {f"{prefix}{name}": tensor for name, tensor in state_dict.items() if name.startswith("embeddings.")}
    found = convert_bert(own, prefix)
    if "query_tokens" not in state_dict:
        raise UserError("weights: expected query_tokens [1, Q, C], got none")
    found["query_tokens"] = state_dict["query_tokens"].flatten(0, -2)
    with torch.device("meta"):
        wanted = QFormer(config).state_dict().keys()
        known = QFormer(replace(config, text="full")).state_dict().keys()
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} has no place" for name in found if name not in known]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"weights under {prefix}* do not fit this Q-Former: {'; '.join(problems[:5])}{more}")
    return {name: found[name] for name in wanted}


def _rows(context: Tensor | BertCache) -> int:
    if isinstance(context, Tensor):
        return context.shape[0]
    return next(cache.context.k.shape[0] for cache in context.layers.values() if cache.context is not None)
