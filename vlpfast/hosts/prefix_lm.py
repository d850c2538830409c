"""A language model that reads visual tokens before or in its prompt: what such systems share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.nn import generation
from vlpfast.nn.lm import LanguageModel, LMConfig, Reading
from vlpfast.nn.lora import LoRAConfig, add_lora
from vlpfast.nn.splice import Spliced, answers_alone, cut_answers, left_padded, prompt_length, splice
from vlpfast.types import UserError


@dataclass
class PrefixLMConfig:
    language: LMConfig = field(default_factory=LMConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # adapters in a frozen language model
    projector: Literal["linear", "mlp"] = "linear"  # from the visual tokens to the language model's width; mlp: with one GELU
    answer_length: int = 256  # tokens of an answer that count, its end token among them
    rank_by: Literal["sum", "mean"] = "sum"  # how rank_answers adds up the log-probabilities of an answer's tokens


class Examples(NamedTuple):
    """What stands before a sample's own visual tokens."""

    embeds: Tensor  # [B, E, C]
    mask: Tensor  # [B, E] bool


class PrefixLM(nn.Module):
    """projector and lm. Texts come as the loader joins them (TextSpec.answer): bos, prompt, answer, eos, padding, with labels at
    the answer and its eos.

    Causal models read [visual | bos prompt answer eos | padding]. Encoders read [visual | prompt eos | padding], without the bos,
    and their decoders write the answer and its eos. The loss is asked at the answer's tokens alone, and its mean is one over all
    these tokens of the batch, of all ranks together.
    """

    def __init__(self, config: PrefixLMConfig, visual_width: int) -> None:
        super().__init__()
        if config.projector not in ("linear", "mlp"):
            raise UserError(f"projector: expected linear or mlp, got {config.projector!r}")
        if config.rank_by not in ("sum", "mean"):
            raise UserError(f"rank_by: expected sum or mean, got {config.rank_by!r}")
        if config.answer_length < 1:
            raise UserError(f"answer_length: expected at least 1, got {config.answer_length}")
        if config.lora.rank and not config.language.frozen:
            raise UserError("lora: expected rank 0 for a language model that is trained itself (language.frozen=false)")
        self.answer_length, self.rank_by = config.answer_length, config.rank_by
        self.lm = LanguageModel(config.language)
        add_lora(self.lm.network, config.lora, "lora")
        self.lm.freeze(config.language.frozen)
        width = self.lm.width
        if config.projector == "linear":
            self.projector: nn.Module = nn.Linear(visual_width, width)
        else:
            self.projector = nn.Sequential(nn.Linear(visual_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        text_mask: Tensor,
        labels: Tensor,
        *,
        slots: Tensor | None = None,
        before: Examples | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """visual [B, V, Cv] (or [B, S, V, Cv] for S placeholders, where slots [B, L] is true), text, text_mask, labels [B, L]
        -> the loss, 0-d float32.

        before: examples, for encoders alone. weights: [B, L] float32, a factor for each token that is asked for, causal models
        alone.
        """
        labels = cut_answers(labels, self.answer_length)
        rows = None
        if torch.compiler.is_compiling() or labels.device.type == "cuda":  # where the asked tokens cannot be counted first
            rows = labels.shape[0] * min(labels.shape[1], self.answer_length)
        if self.lm.is_encoder_decoder:
            if weights is not None:
                raise ValueError("weights: expected none for a model with an encoder")
            asked = answers_alone(labels, self.answer_length)  # [B, A]
            read = self._encoder_input(visual, text, text_mask, prompt_length(text_mask, labels), slots, before)
            start = asked.new_full((len(asked), 1), self.lm.start_id)
            decoder_ids = torch.cat((start, asked[:, :-1]), dim=1).clamp(min=0)  # what stands under -100 is seen by nobody
            return self.lm.answer_loss(self.lm(read.embeds, read.mask, decoder_ids), asked, max_rows=rows)
        if before is not None:
            raise ValueError("before: expected none for a causal model")
        read = splice(self.projector(visual), self.lm.embed(text), text_mask, labels, slots)
        if weights is not None:
            weights = splice(visual[..., :1], weights[..., None], text_mask, slots=slots).embeds[..., 0]  # [B, T]
            weights = F.pad(weights[:, 1:], (0, 1))
        asked = F.pad(read.labels[:, 1:], (0, 1), value=-100)  # each position predicts the next token
        return self.lm.answer_loss(self.lm(read.embeds), asked, weights=weights, max_rows=rows)

    def text_loss(self, text: Tensor, text_mask: Tensor, labels: Tensor) -> Tensor:
        """The language model's loss without anything visual: a causal one is asked for every token but bos, a decoder for the
        answers."""
        if self.lm.is_encoder_decoder:
            return self.answer_loss(text, text_mask, labels)
        asked = F.pad(text.masked_fill(~text_mask, -100)[:, 1:], (0, 1), value=-100)
        rows = asked.numel() if torch.compiler.is_compiling() or text.device.type == "cuda" else None
        return self.lm.answer_loss(self.lm(self.lm.embed(text)), asked, max_rows=rows)

    def answer_loss(self, text: Tensor, text_mask: Tensor, labels: Tensor) -> Tensor:
        """forward without anything visual: asked for the answers alone."""
        return self(text.new_zeros((len(text), 0, self._visual_width()), dtype=torch.float32), text, text_mask, labels)

    def read(
        self,
        visual: Tensor,
        text: Tensor,
        text_mask: Tensor,
        labels: Tensor | None = None,
        *,
        slots: Tensor | None = None,
        before: Examples | None = None,
    ) -> Reading:
        """Visual tokens and prompt, as for forward, read once: what is written or ranked goes on from there. labels: where the
        answer is that is not to be read; None: the text is bos, prompt, eos, whose eos a causal model does not read."""
        length = prompt_length(text_mask, labels)
        if self.lm.is_encoder_decoder:
            read = self._encoder_input(visual, text, text_mask, length, slots, before)
            return self.lm.read(read.embeds, read.mask)
        prompt = text_mask & (torch.arange(text.shape[1], device=text.device) < length)
        read = splice(self.projector(visual), self.lm.embed(text), prompt, slots=slots)
        return self.lm.read(*left_padded(read.embeds, read.mask))

    def generate(self, reading: Reading, **options) -> Tensor:
        """-> ids [B, L]; options as of nn/generation.generate. A model that pads with another id than 0 (Vicuna, whose 0 is
        <unk>) ends where it writes a 0, as the official code has it."""
        eos, pad = self.lm.eos_id, self.lm.pad_id
        ids = generation.generate(reading, eos_id=eos, pad_id=pad, **options)
        if pad == 0:
            return ids
        ids = ids.masked_fill(ids == 0, eos)
        ended = (ids == eos).int()
        return ids.masked_fill(ended.cumsum(1) - ended > 0, pad)

    def rank(self, reading: Reading, candidates: Tensor, candidate_mask: Tensor) -> Tensor:
        """candidates [K, L] or [B, K, L] as Tokenizer.encode makes them (bos, text, eos), candidate_mask -> [B, K] float32: the
        log-likelihoods of text and eos, by config.rank_by."""
        return generation.rank(reading, candidates[..., 1:], candidate_mask[..., 1:], by=self.rank_by)

    def _encoder_input(
        self,
        visual: Tensor,
        text: Tensor,
        text_mask: Tensor,
        length: Tensor,
        slots: Tensor | None,
        before: Examples | None,
    ) -> Spliced:
        """[examples | visual | prompt eos | padding], or with the visual tokens at their placeholders; T5 knows no bos."""
        position = torch.arange(text.shape[1], device=text.device)
        ids = torch.where(position == length, self.lm.eos_id, text)[:, 1:]
        mask = (position <= length)[:, 1:]
        slots = None if slots is None else slots[:, 1:] & mask
        read = splice(self.projector(visual), self.lm.embed(ids), mask, slots=slots)
        if before is None:
            return read
        embeds = torch.cat((before.embeds.to(read.embeds.dtype), read.embeds), dim=1)
        return Spliced(embeds, torch.cat((before.mask, read.mask), dim=1), None)

    def _visual_width(self) -> int:
        first = self.projector if isinstance(self.projector, nn.Linear) else self.projector[0]
        return first.in_features
