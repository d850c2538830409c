"""What BLIP-2 and its descendants share: a frozen image tower, a trained norm, a Q-Former, and the losses of its first stage.

Li et al. 2023, "BLIP-2: bootstrapping language-image pre-training with frozen image encoders and large language models",
arXiv 2301.12597.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn.bert import BertCache, MaskedLMHead
from vlpfast.nn.bert_convert import StateDict, convert_lm_head
from vlpfast.nn.heads import Projection
from vlpfast.nn.qformer import ContextMask, QFormer, QFormerConfig, convert_qformer
from vlpfast.objectives.matching import hard_negatives, matching_loss
from vlpfast.objectives.token_loss import mean_over_asked
from vlpfast.ops.maxsim import maxsim, sharded_query_loss
from vlpfast.types import UserError


class VisualQueries(nn.Module):
    """Pictures to a few vectors: a frozen tower's tokens, a norm of them that is trained, a Q-Former that reads them, and for a
    language model a linear layer to its width."""

    def __init__(self, vision: nn.Module, config: QFormerConfig, out_width: int = 0) -> None:
        """vision: pictures [B, 3, S, S] to tokens [B, T, config.context_width]. out_width: the language model's; 0: none."""
        super().__init__()
        self.vision = vision.requires_grad_(False)
        self.norm = nn.LayerNorm(config.context_width)
        self.qformer = QFormer(config)
        self.projection = nn.Linear(config.width, out_width) if out_width else None
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=0.02)
            nn.init.zeros_(self.projection.bias)
        self.train()

    def train(self, mode: bool = True) -> VisualQueries:
        """The tower stays in evaluation mode for good."""
        super().train(mode)
        self.vision.eval()
        return self

    def image_tokens(self, image: Tensor) -> Tensor:
        """image [B, 3, S, S] -> [B, T, context_width], normalised; no graph reaches into the tower."""
        with torch.no_grad():
            tokens = self.vision(image)
        return self.norm(tokens)

    def forward(self, image: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """image [B, 3, S, S] -> [B, Q, C], C the language model's width, where there is one.

        A video [B, F, 3, S, S] -> [B, F Q, C]: its frames are pictures of one batch. text [B, L] int64, text_mask [B, L]: an
        instruction, which the queries see (InstructBLIP).
        """
        frames = image.shape[1] if image.ndim == 5 else 1
        tokens = self.image_tokens(image.flatten(0, -4))
        if text is None:
            states = self.qformer.encode_queries(tokens)
        else:
            text, text_mask = (t if t is None else t.repeat_interleave(frames, 0) for t in (text, text_mask))
            states, _ = self.qformer.encode_pairs(text, text_mask, tokens, need_text=False)
        states = states.unflatten(0, (-1, frames)).flatten(1, 2)
        return states if self.projection is None else self.projection(states)


class Encoded(NamedTuple):
    """Pictures and texts, pair by pair, each seen without the other."""

    cache: BertCache  # keys and values of queries and pictures
    queries: Tensor | None  # [B, Q, C] in place of the learned ones
    text: Tensor  # [B, L]
    text_mask: Tensor  # [B, L]
    image_features: Tensor  # [B, Q, D] unit length
    text_features: Tensor  # [B, D]


class AlignedQueries(VisualQueries):
    """BLIP-2's first stage (section 3.2): contrast, matching and captions, three passes over one reading of the picture.

    A model gives image, text and text_mask to `encode` and adds up what it wants of `contrast`, `match` and `caption`. Of several
    ranks `contrast` is that of the whole batch, and `match` finds its negatives among the rank's own pairs (BLIP-2's code among
    all ranks' pairs, for which it gathers the pictures' tokens). The temperature is not clamped, as there.
    """

    def __init__(
        self, vision: nn.Module, config: QFormerConfig, *, dec_id: int, embed_dim: int = 256, temperature_init: float = 0.07
    ) -> None:
        """dec_id: the token [DEC] that captions begin with."""
        super().__init__(vision, config)
        if config.text != "full":
            raise UserError(f"model.qformer.text: expected full, got {config.text!r}")
        if not 0 <= dec_id < config.vocab_size:
            raise UserError(f"dec_id: expected an id below vocab_size {config.vocab_size}, got {dec_id}")
        self.dec_id = dec_id
        self.image_projection = Projection(config.width, embed_dim)
        self.text_projection = Projection(config.width, embed_dim)
        self.itm_head = nn.Linear(config.width, 2)  # of each query: does not fit, fits
        self.lm_head = MaskedLMHead(config)
        self.temperature = nn.Parameter(torch.tensor(temperature_init))

    def encode(
        self,
        tokens: Tensor,
        text: Tensor,
        text_mask: Tensor,
        *,
        queries: Tensor | None = None,
        context_mask: ContextMask | None = None,
    ) -> Encoded:
        """tokens [B, T, context_width] of `image_tokens`, text [B, L] int64 padded at its end, text_mask [B, L] bool.

        queries, context_mask: see QFormer.encode_queries. Where queries depend on the picture (GeoX), those of the picture that
        is looked at go wherever it goes: a pair that does not fit cannot be told by queries that do not either.
        """
        cache = BertCache()
        states = self.qformer.encode_queries(tokens, queries=queries, context_mask=context_mask, cache=cache)
        first = self.qformer.encode_text(text, text_mask)[:, 0]
        return Encoded(cache, queries, text, text_mask, self.image_projection(states), self.text_projection(first))

    def contrast(self, encoded: Encoded, *, ids: Tensor | None = None, label_smoothing: float | Tensor = 0.1) -> Tensor:
        """A picture and a text are as near as the best query is to the text. ids [B] int64: equal ones belong together.

        label_smoothing: one number, or [B], one for each pair (NEVLP's noise).
        """
        return sharded_query_loss(
            encoded.image_features,
            encoded.text_features,
            1 / self.temperature,
            labels=ids,
            label_smoothing=label_smoothing,
        )

    def match(self, encoded: Encoded, *, ids: Tensor | None = None) -> Tensor:
        """Of each text with its picture and a hard negative, and of each picture with a hard negative: the cross-entropy of the
        mean of all queries' logits. ids: no pair with equal ones is a negative.

        A picture's own text and its negative share its keys and values; only texts' negatives, other pictures, are copies.
        """
        e = encoded
        picture, other = self._hard_negatives(e, ids)
        chosen = other.clamp(min=0)
        texts = torch.stack((e.text, e.text[chosen]), 1).flatten(0, 1)  # [2B, L]
        masks = torch.stack((e.text_mask, e.text_mask[chosen]), 1).flatten(0, 1)
        queries = None if e.queries is None else e.queries.repeat_interleave(2, 0)
        here = self._itm_logits(texts, masks, e.cache.of_context(), queries).unflatten(0, (-1, 2))  # [B, 2, 2]
        chosen = picture.clamp(min=0)
        queries = None if e.queries is None else e.queries[chosen]
        wrong = self._itm_logits(e.text, e.text_mask, e.cache.of_context(chosen), queries)  # [B, 2]
        return matching_loss(here[:, 0], torch.cat((here[:, 1], wrong)), torch.cat((other, picture)) >= 0)

    def caption(
        self, encoded: Encoded, *, labels: Tensor | None = None, label_smoothing: float = 0.1, max_rows: int | None = None
    ) -> Tensor:
        """The cross-entropy of each token of the text given the queries and what is before it; [DEC] stands for the first one.

        labels [B, L] int64: what is asked for at each token, -100: nothing; None: every token but the first. max_rows: see
        linear_cross_entropy. Of several ranks the mean over ranks is that over all their tokens.
        """
        text = encoded.text.index_fill(1, torch.zeros(1, dtype=torch.int64, device=encoded.text.device), self.dec_id)
        labels = encoded.text.masked_fill(~encoded.text_mask, -100) if labels is None else labels
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # of the token that each one predicts
        states = self.qformer.encode_text(text, cache=encoded.cache.copy())
        losses = self.lm_head.loss(
            states,
            labels,
            self.qformer.token_embed.weight,
            label_smoothing=label_smoothing,
            max_rows=max_rows,
            reduction="none",
        )
        return mean_over_asked(losses, labels)

    def score_pairs(self, tokens: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """tokens [P', T, context_width], text [P, L], text_mask [P, L] -> [P] float32, the logit of "fits"."""
        return self._itm_logits(text, text_mask, tokens, None)[:, 1].float()

    def _itm_logits(self, text: Tensor, text_mask: Tensor, context: Tensor | BertCache, queries: Tensor | None) -> Tensor:
        """-> [N, 2]"""
        states, _ = self.qformer.encode_pairs(text, text_mask, context, queries=queries, need_text=False)
        return self.itm_head(states).mean(1)

    @torch.no_grad()
    def _hard_negatives(self, encoded: Encoded, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """For each text a picture, for each picture a text: [B] int64, -1 where there is none."""
        scores = maxsim(encoded.image_features, encoded.text_features[:, None], directions="y_to_x")  # [B, B]
        scale = 1 / self.temperature
        one = torch.eye(len(scores), device=scores.device)
        with torch.autocast(scores.device.type, enabled=False):  # the sampler takes features: scores are those of unit vectors
            picture = hard_negatives(scores.T, one, scale, ids, drawn=self.training)
            return picture, hard_negatives(scores, one, scale, ids, drawn=self.training)


def convert_lavis(state_dict: StateDict, config: QFormerConfig) -> dict[str, Tensor]:
    """LAVIS' names, of BLIP-2's first stage or of InstructBLIP, to those of a host here, but for the image tower's.

    UserError: what QFormer(config) needs is missing.
    """
    found = {f"qformer.{name}": tensor for name, tensor in convert_qformer(state_dict, config).items()}
    if any(name.startswith("Qformer.cls.") for name in state_dict):
        found |= {f"lm_head.{name}": t for name, t in convert_lm_head(state_dict, "Qformer.cls.predictions.").items()}
    for name, tensor in state_dict.items():
        stem, _, kind = name.rpartition(".")
        if stem in _LAVIS:
            found[f"{_LAVIS[stem]}.{kind}"] = tensor
    if "temp" in state_dict:
        found["temperature"] = state_dict["temp"].reshape(())
    return found


_LAVIS = {
    "ln_vision": "norm",
    "vision_proj": "image_projection",
    "text_proj": "text_projection",
    "itm_head": "itm_head",
    "opt_proj": "projection",
    "t5_proj": "projection",
    "llm_proj": "projection",
}
