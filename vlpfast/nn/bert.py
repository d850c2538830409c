"""BERT with cross-attention: text encoder, fusion encoder and text decoder of the ALBEF, BLIP and BLIP-2 families."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlpfast.nn.attention import Backend, attention, require_installed
from vlpfast.nn.transformer import ACTIVATIONS
from vlpfast.ops.linear_cross_entropy import choose_rows, linear_cross_entropy
from vlpfast.types import UserError

KeysValues = tuple[Tensor, Tensor]  # k, v [B, H, L, Dh]


@dataclass
class BertConfig:
    """The defaults are BERT-base without cross-attention."""

    vocab_size: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072  # of the feed-forward part
    max_positions: int = 512
    type_vocab: int = 2  # segments; all tokens are of the first. 0: no table (BLIP, Q-Former)
    dropout: float = 0.1  # of embeddings, attention weights, and what each part adds
    norm_eps: float = 1e-12
    init_std: float = 0.02  # of all weights at the start: BERT's, for its width; narrower ones send next to nothing with it
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    pad_id: int = 0  # its embedding starts at 0 and gets no gradient
    cross_attention: list[int] = field(default_factory=list)  # layers that attend to a context too, counted from 0
    context_width: int = 768
    causal_attention: bool = False  # a self-attention of their own for causal texts; the rest of a layer serves both (BLIP)
    attention_backend: Backend = "auto"  # see vlpfast.nn.attention.attention
    checkpointing: bool = False  # recompute each layer's activations in the backward: less memory, a third more arithmetic


class Context(NamedTuple):
    """What a layer's cross-attention needs of a context."""

    k: Tensor  # [B', H, T, Dh]
    v: Tensor
    mask: Tensor | None  # [B', T] bool, True = seen, or float, added to the scores

    def take(self, rows: Tensor) -> Context:
        # Not index_select: on a GPU its gradient is added up in any order.
        return Context(self.k[rows], self.v[rows], None if self.mask is None else self.mask[rows])


class LayerCache(NamedTuple):
    """What a layer keeps of what it has seen: nothing before the first tokens."""

    tokens: KeysValues | None = None  # [B, H, L, Dh]
    context: Context | None = None


class BertCache:
    """Keys and values of the tokens that went through `Bert.run`, which appends to them; of a context once, at the first call.

    Has gradients where the tokens had. For beams: make it of the prompts, `reorder` it to as many rows as there are beams, then
    after each step to the beams that go on.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerCache] = {}
        self.prefix = 0  # so many at the front are queries (QFormer), which positions do not count

    def length(self, layer: int = 0) -> int:
        """Tokens of each row that have passed through a layer, the prefix among them."""
        tokens = self.layers.get(layer, LayerCache()).tokens
        return 0 if tokens is None else tokens[0].shape[2]

    def reorder(self, rows: Tensor, context_rows: Tensor | None = None) -> None:
        """rows [B] int64: row i goes on as what row rows[i] was.

        The context stays as it is, each of its B' rows for B / B' consecutive rows: beams may not leave their picture.
        context_rows [B'] int64: the context's rows that go on, where some pictures are done.
        """
        for i, (tokens, context) in self.layers.items():
            if tokens is not None:
                tokens = tokens[0][rows], tokens[1][rows]
            if context is not None and context_rows is not None:
                context = context.take(context_rows)
            self.layers[i] = LayerCache(tokens, context)

    def copy(self) -> BertCache:
        """Another one of the same tensors, which goes its own way."""
        found = BertCache()
        found.layers, found.prefix = dict(self.layers), self.prefix
        return found

    def of_context(self, rows: Tensor | None = None) -> BertCache:
        """A new one with the context alone, for another pass over it; rows [B'] int64: with these of its rows."""
        found = BertCache()
        for i, (_, context) in self.layers.items():
            if context is not None:
                found.layers[i] = LayerCache(context=context if rows is None else context.take(rows))
        return found


class SelfAttention(nn.Module):
    """norm(x + attention of x with itself and with what came before it)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, self.dropout, self.backend = config.heads, config.dropout, config.attention_backend
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(
        self, x: Tensor, mask: Tensor | Literal["causal"] | None, past: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """x [B, L, C], past [B, H, P, Dh] -> [B, L, C], keys and values [B, H, P + L, Dh]; mask as for `attention`."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, Dh]
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        dropout = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask=mask, dropout=dropout, backend=self.backend)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return self.norm(x + F.dropout(out, dropout)), (k, v)


class CrossAttention(nn.Module):
    """norm(x + attention of x with a context). One row of the context serves several consecutive rows of x without a copy."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, self.dropout, self.backend = config.heads, config.dropout, config.attention_backend
        self.q_proj = nn.Linear(config.width, config.width)
        self.kv_proj = nn.Linear(config.context_width, 2 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def read(self, context: Tensor, mask: Tensor | None) -> Context:
        """context [B', T, context_width], mask [B', T] -> its keys and values."""
        if mask is not None and mask.shape != context.shape[:2]:
            raise ValueError(f"context_mask: expected {list(context.shape[:2])}, got {list(mask.shape)}")
        k, v = self.kv_proj(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B', H, T, Dh]
        return Context(k, v, mask)

    def forward(self, x: Tensor, context: Context, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [B, L, C], B a multiple of the context's B' -> [B, L, C], and the weights [B', H, L B / B', T] where they
        are wanted.

        The queries of the B / B' rows that share a context are one long row: attention knows no difference.
        """
        (b, length, _), shared = x.shape, context.k.shape[0]
        if b % max(1, shared):
            raise ValueError(f"context: expected rows of which each serves as many of the {b} rows of x, got {shared}")
        q = self.q_proj(x).reshape(shared, -1, self.heads, context.k.shape[-1]).transpose(1, 2)  # [B', H, L B / B', Dh]
        dropout = self.dropout if self.training else 0.0
        mask = None if context.mask is None else context.mask[:, None, None]
        out = attention(q, context.k, context.v, mask=mask, dropout=dropout, need_weights=need_weights, backend=self.backend)
        out, weights = out if need_weights else (out, None)
        out = self.out_proj(out.transpose(1, 2).reshape(b, length, -1))
        return self.norm(x + F.dropout(out, dropout)), weights


class FeedForward(nn.Module):
    """norm(x + fc2(activation(fc1(x))))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.activation = ACTIVATIONS[config.activation]()
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.dropout(self.fc2(self.activation(self.fc1(x))), self.dropout, self.training))


class BertLayer(nn.Module):
    """Self-attention, attention to a context where this layer has it and there is one, feed-forward part: each post-norm."""

    def __init__(self, config: BertConfig, cross_attention: bool) -> None:
        super().__init__()
        self.attn = SelfAttention(config)
        self.causal_attn = SelfAttention(config) if config.causal_attention else None
        self.cross = CrossAttention(config) if cross_attention else None
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Literal["causal"] | None,
        causal: bool,
        context: Tensor | None,
        context_mask: Tensor | None,
        cache: LayerCache | None,
        need_weights: bool,
    ) -> tuple[Tensor, LayerCache | None, Tensor | None]:
        """-> x [B, L, C]; what `cache` becomes, None where it was None; the weights on the context where they are wanted."""
        past = cache or LayerCache()
        attn = self.causal_attn if causal and self.causal_attn is not None else self.attn
        x, tokens = attn(x, mask, past.tokens)
        weights, seen = None, past.context
        if self.cross is not None and (context is not None or seen is not None):
            seen = self.cross.read(context, context_mask) if seen is None else seen
            x, weights = self.cross(x, seen, need_weights)
        return self.feed_forward(x), None if cache is None else LayerCache(tokens, seen), weights


class Bert(nn.Module):
    """Token ids to states of all tokens (Devlin et al. 2019, arXiv 1810.04805), with cross-attention (Li et al. 2021, ALBEF).

    Post-norm layers, learned positions, weights from N(0, init_std), biases 0. `run` passes through some of the layers: ALBEF's
    text half is range(6), its fusion half range(6, 12). Layers with cross-attention leave it out where there is no context.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        self.position_embed = nn.Embedding(config.max_positions, config.width)
        self.type_embed = nn.Embedding(config.type_vocab, config.width) if config.type_vocab else None
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.layers = nn.ModuleList(BertLayer(config, i in config.cross_attention) for i in range(config.layers))
        self.apply(partial(initialize, std=config.init_std))

    def forward(self, text: Tensor, text_mask: Tensor | None = None, **options: Any) -> Any:
        """text [B, L] int64 -> what `run` gives for its embeddings; with a cache, positions go on from there."""
        past = options["cache"].length() if options.get("cache") is not None else 0
        return self.run(self.embed(text, positions_from(past, text, self.config.max_positions)), text_mask, **options)

    def embed(self, text: Tensor, positions: Tensor | None = None) -> Tensor:
        """text [B, L] int64, positions [L] or [B, L] int64 (0 .. L - 1 if None) -> [B, L, C], normalised."""
        x = embed_tokens(text, positions, self.token_embed, self.position_embed)
        if self.type_embed is not None:
            x = x + self.type_embed.weight[0]
        return F.dropout(self.norm(x), self.config.dropout, self.training)

    def run(
        self,
        x: Tensor,
        text_mask: Tensor | None = None,
        *,
        mask: Literal["joint", "causal"] | Tensor = "joint",
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        layers: range | None = None,
        cache: BertCache | None = None,
        need_weights: int | None = None,
    ) -> Any:
        """x [B, L, C] -> the states behind the last of `layers`, [B, L, C].

        Args:
            text_mask: [B, P + L] bool, True = token, at least one in each row, where P tokens are in the cache; None: all are
                tokens. Under a causal mask texts padded at their ends need none: no token sees the padding, and without a mask
                tensor attention is faster.
            mask: "joint": every token sees every other; "causal": itself and those before it; or [L, P + L] or [B, L, P + L]
                bool, True = seen. But under "joint" a token, padding too, always sees itself where there is a text_mask.
            context: [B', T, context_width], B a multiple of B'; each of its rows serves B / B' consecutive rows of x, for which
                nothing is copied. With a cache it and its mask are read at the first call alone.
            context_mask: [B', T] bool, True = seen, or float, added to the scores.
            layers: which to pass through; None: all.
            cache: keys and values so far, to which those of x are appended.
            need_weights: a layer, whose cross-attention weights [B', heads, L B / B', T] (before dropout) are returned behind the
                states; rows that share a context stand one after another. They are part of the graph: torch.autograd.grad of a
                score with respect to them passes through the layers above alone (GradCAM).

        Raises:
            ValueError: a wrong argument, named.
        """
        chosen = range(len(self.layers)) if layers is None else layers
        past = 0 if cache is None else cache.length(chosen[0])
        seen = self_mask(mask, text_mask, x.shape[0], x.shape[1], past, x.device)
        if context is not None and not any(self.layers[i].cross is not None for i in chosen):
            raise ValueError(f"context: expected None, because no layer of {chosen} has a cross-attention")
        if context is None and context_mask is not None and cache is None:
            raise ValueError("context_mask: expected None without a context, got one")
        if need_weights is not None and (need_weights not in chosen or self.layers[need_weights].cross is None):
            raise ValueError(f"need_weights: expected a layer with a cross-attention in {chosen}, got {need_weights}")
        weights, causal = None, isinstance(mask, str) and mask == "causal"
        for i in chosen:
            before = None if cache is None else cache.layers.get(i, LayerCache())
            inputs = x, seen, causal, context, context_mask, before, i == need_weights
            x, after, found = run_layer(self.layers[i], self.config, *inputs)
            weights = found if found is not None else weights
            if cache is not None:
                cache.layers[i] = after
        return x if need_weights is None else (x, weights)


class MaskedLMHead(nn.Module):
    """BERT's head over the vocabulary: dense, activation, norm, then the token embedding as decoder, with a bias of its own.

    The embedding is an argument, `weight` [V, C]: a head has no copy of it that could go its own way.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]()
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(partial(initialize, std=config.init_std))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], whose products with `weight` (+ bias) are the logits."""
        return self.norm(self.activation(self.dense(x)))

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., C] -> [..., V]; for a few rows."""
        return F.linear(self(x), weight, self.bias)

    def loss(self, x: Tensor, labels: Tensor, weight: Tensor, *, max_rows: int | None = None, **options: Any) -> Tensor:
        """x [B, L, C], labels [B, L] int64, -100: nothing is asked -> the cross-entropy; see linear_cross_entropy for the rest.

        Only the asked rows pass through the head. Options are those of linear_cross_entropy but `weights` and `ignore_index`.
        """
        rows = choose_rows(labels, -100, max_rows)
        if rows.index is None:
            return linear_cross_entropy(self(x), weight, labels, bias=self.bias, **options)
        asked = labels.flatten()[rows.index]
        count = None if rows.kept is None else len(rows.index)
        losses = linear_cross_entropy(self(rows.of(x.flatten(0, -2))), weight, asked, bias=self.bias, max_rows=count, **options)
        return rows.valid(rows.back(losses, labels) if losses.ndim else losses)


def run_layer(layer: nn.Module, config: BertConfig, *inputs: Any) -> Any:
    """layer(*inputs), checkpointed where the config wants it."""
    if config.checkpointing and layer.training:
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=config.dropout > 0)
    return layer(*inputs)


def positions_from(past: int, text: Tensor, limit: int) -> Tensor | None:
    """Of text [B, L] behind `past` other tokens: past .. past + L - 1; None: 0 .. L - 1. ValueError: more than there are."""
    if past and past + text.shape[1] > limit:
        raise ValueError(f"text: expected at most {limit} tokens with those in the cache, got {past} and {text.shape[1]}")
    return torch.arange(past, past + text.shape[1], device=text.device) if past else None


def embed_tokens(text: Tensor, positions: Tensor | None, token_embed: nn.Embedding, position_embed: nn.Embedding) -> Tensor:
    """[B, L] -> [B, L, C], not yet normalised; see Bert.embed."""
    if text.ndim != 2 or text.shape[1] > position_embed.num_embeddings:
        raise ValueError(f"text: expected [B, L] with L at most {position_embed.num_embeddings}, got {tuple(text.shape)}")
    return token_embed(text) + (position_embed.weight[: text.shape[1]] if positions is None else position_embed(positions))


def self_mask(
    mask: Literal["joint", "causal"] | Tensor, text_mask: Tensor | None, batch: int, length: int, past: int, device: torch.device
) -> Tensor | Literal["causal"] | None:
    """The mask of `length` tokens behind `past` others as `attention` takes it; see Bert.run."""
    if text_mask is not None and (text_mask.shape != (batch, past + length) or text_mask.dtype != torch.bool):
        got = f"{text_mask.dtype} {list(text_mask.shape)}"
        raise ValueError(f"text_mask: expected bool [{batch}, {past + length}], a column for each token so far, got {got}")
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool or mask.shape not in ((length, past + length), (batch, length, past + length)):
            got = f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"mask: expected bool [({batch},) {length}, {past + length}], got {got}")
        seen = mask
    elif mask not in ("joint", "causal"):
        raise ValueError(f"mask: expected 'joint', 'causal' or a tensor, got {mask!r}")
    elif mask == "joint":
        return None if text_mask is None else text_mask[:, None, None]
    elif text_mask is None and (length == 1 or not past):
        return None if length == 1 else "causal"
    else:
        seen = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    if text_mask is not None:
        itself = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past).triu(past)
        seen = (seen & text_mask[:, None]) | itself  # [B, L, P + L]
    return seen if seen.ndim == 2 else seen[:, None]


def check_config(config: BertConfig) -> None:
    """UserError: a field that does not fit."""
    if config.width % config.heads:
        raise UserError(f"heads: expected a divisor of the width {config.width}, got {config.heads}")
    if config.activation not in ACTIVATIONS:
        raise UserError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {config.activation!r}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout: expected a probability in [0, 1), got {config.dropout}")
    if not 0 <= config.pad_id < config.vocab_size:
        raise UserError(f"pad_id: expected an id below vocab_size {config.vocab_size}, got {config.pad_id}")
    wrong = [i for i in config.cross_attention if not 0 <= i < config.layers]
    if wrong:
        raise UserError(f"cross_attention: expected layers below {config.layers}, got {wrong[0]}")
    require_installed(config.attention_backend)


def initialize(module: nn.Module, std: float = 0.02) -> None:
    """BERT's: N(0, std), biases and the padding's embedding 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
