"""Writing texts by beams and ranking given ones, over anything that reads tokens with a cache."""

from __future__ import annotations

import copy
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.nn.bert import Bert, BertCache, MaskedLMHead
from vlpfast.ops.linear_cross_entropy import token_logprob


class Decoding(Protocol):
    """N rows that have been read, and can be read on. nn/lm.py's Reading, and BertDecoding."""

    hidden: Tensor  # [N, C] behind the last token read: what predicts the next one

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, C] and bias [V] or None of the output layer."""
        ...

    def extend(self, tokens: Tensor) -> Tensor:
        """Reads tokens [N, A] int64 -> their hidden states [N, A, C]."""
        ...

    def select(self, rows: Tensor) -> Decoding:
        """rows [N'] int64 -> one of its own whose row i is row rows[i]. As many rows of each sample as of every other, in
        the order of the samples."""
        ...


class BertDecoding:
    """nn/bert.py's decoder behind a context (ALBEF's and BLIP's): the Decoding of its texts."""

    def __init__(
        self, bert: Bert, lm_head: MaskedLMHead, prompt: Tensor, context: Tensor, context_mask: Tensor | None = None
    ) -> None:
        """prompt [B, P] int64, the same number of tokens in each row (bos alone, or "a picture of"); context [B, T, Cc]."""
        self.bert, self.lm_head, self.cache = bert, lm_head, BertCache()
        self._read(prompt, context=context, context_mask=context_mask)

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.bert.token_embed.weight, self.lm_head.bias

    def extend(self, tokens: Tensor) -> Tensor:
        return self._read(tokens)

    @torch.no_grad()
    def _read(self, tokens: Tensor, **context: Tensor | None) -> Tensor:
        states = self.lm_head(self.bert(tokens, mask="causal", cache=self.cache, **context))
        self.hidden = states[:, -1]
        return states

    def select(self, rows: Tensor) -> BertDecoding:
        """The pictures' keys and values are not copied: each serves as many consecutive rows."""
        other = copy.copy(self)
        other.cache, other.hidden = BertCache(), self.hidden[rows]
        other.cache.layers = dict(self.cache.layers)
        other.cache.reorder(rows)
        return other


@torch.no_grad()
def generate(
    decoding: Decoding,
    *,
    eos_id: int,
    pad_id: int,
    beams: int = 1,
    max_new_tokens: int = 30,
    min_new_tokens: int = 1,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Goes on from `decoding`'s B rows -> ids [B, L] int64, each row up to its end token, then padding; L <= max_new_tokens.

    Beam search as transformers' `generate` does it: of `beams` running texts the 2 * beams best continuations are looked at,
    those that end among the first `beams` of these are kept, and the best by log-probability / length ** length_penalty is
    returned. It stops when no running text of the present length is better than the worst of `beams` finished ones. beams=1 is
    greedy search.

    length_penalty: above 0 favours long texts, below short ones. repetition_penalty p (Keskar et al. 2019): log-probabilities of
    tokens that a text has already are multiplied by p; the prompt does not count. min_new_tokens: before the end token.
    """
    if beams < 1 or not 0 <= min_new_tokens < max_new_tokens or repetition_penalty <= 0:
        raise ValueError(
            f"expected beams >= 1, 0 <= min_new_tokens < max_new_tokens and repetition_penalty > 0, got {beams}, "
            f"{min_new_tokens}, {max_new_tokens} and {repetition_penalty}"
        )
    weight, bias = decoding.head
    samples, device = len(decoding.hidden), decoding.hidden.device
    first = torch.arange(samples, device=device)[:, None] * beams  # [B, 1] each sample's first row
    decoding = decoding.select(torch.arange(samples, device=device).repeat_interleave(beams))
    running = torch.full((samples, beams), -torch.inf, device=device)  # [B, K] log-probabilities; at first the beams are alike
    running[:, 0] = 0
    texts = torch.full((samples, beams, max_new_tokens), pad_id, device=device)  # [B, K, L]
    finished, best = torch.full_like(running, -torch.inf), texts.clone()
    done = torch.zeros(samples, 1, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        scores = F.linear(decoding.hidden, weight, bias).float().log_softmax(-1)  # [B * K, V]
        if repetition_penalty != 1 and step:
            written = texts[..., :step].flatten(0, 1)
            scores = scores.scatter(1, written, scores.gather(1, written) * repetition_penalty)
        if step < min_new_tokens:
            scores[:, eos_id] = -torch.inf
        total = (running[..., None] + scores.unflatten(0, (samples, beams))).flatten(1)  # [B, K * V]
        scores, place = total.topk(min(2 * beams, total.shape[1]))  # [B, 2K]
        beam, token = place // weight.shape[0], place % weight.shape[0]
        longer = _rows(texts, beam)
        longer[..., step] = token
        ends = (token == eos_id) | (step + 1 == max_new_tokens)
        counts = ends & ~done & (torch.arange(scores.shape[1], device=device) < beams)
        complete = (scores / (step + 1) ** length_penalty).masked_fill(~counts, -torch.inf)
        finished, kept = torch.cat((finished, complete), dim=1).topk(beams)
        best = _rows(torch.cat((best, longer), dim=1), kept)
        running, kept = scores.masked_fill(ends, -torch.inf).topk(beams)
        texts = _rows(longer, kept)
        hope = running[:, :1] / (step + 1) ** length_penalty
        done |= (finished[:, -1:] > -torch.inf) & ((finished[:, -1:] >= hope) | (beams == 1))
        if done.all():  # for which the host waits, as for every token
            break
        if beams > 1:
            decoding = decoding.select((first + beam.gather(1, kept)).flatten())
        decoding.extend(texts[..., step].reshape(-1, 1))
    best = best[:, 0]  # [B, L]
    length = ((best != eos_id) & (best != pad_id)).int() * torch.arange(1, max_new_tokens + 1, device=device)
    return best[:, : int(length.max()) + 1]  # of the longest, and its end token


def _rows(texts: Tensor, chosen: Tensor) -> Tensor:
    """texts [B, K, L], chosen [B, N] -> [B, N, L]"""
    return texts.gather(1, chosen[..., None].expand(-1, -1, texts.shape[-1]))


@torch.no_grad()
def rank(
    decoding: Decoding,
    candidates: Tensor,
    candidate_mask: Tensor,
    *,
    by: Literal["sum", "mean"] = "sum",
    max_rows: int = 256,
) -> Tensor:
    """Log-likelihoods of given continuations: candidates [K, A] (of all samples) or [B, K, A] int64, candidate_mask the same
    bool, without a begin token, with an end token if it is to count -> [B, K] float32.

    The prefix has been read once for each sample; the candidates alone are read here, `max_rows` rows at a time. by: the sum over
    a candidate's tokens, or their mean, which does not favour short ones. Padding counts nothing either way.
    """
    if by not in ("sum", "mean"):
        raise ValueError(f"by: expected 'sum' or 'mean', got {by!r}")
    samples, device = len(decoding.hidden), decoding.hidden.device
    if candidates.ndim == 2:
        candidates, candidate_mask = (t.expand(samples, *t.shape) for t in (candidates, candidate_mask))
    if candidates.ndim != 3 or len(candidates) != samples or candidate_mask.shape != candidates.shape:
        got = f"{tuple(candidates.shape)} and {tuple(candidate_mask.shape)}"
        raise ValueError(f"candidates, candidate_mask: expected [K, A] or [{samples}, K, A] twice, got {got}")
    weight, bias = decoding.head
    parts = []
    each = max(1, max_rows // max(1, samples))
    for ids, mask in zip(candidates.split(each, dim=1), candidate_mask.split(each, dim=1), strict=True):
        rows = torch.arange(samples, device=device).repeat_interleave(ids.shape[1])
        ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)  # [B * k, A]
        states = decoding.hidden[rows][:, None]
        if ids.shape[1] > 1:
            states = torch.cat((states, decoding.select(rows).extend(ids[:, :-1])), dim=1)  # [B * k, A, C]
        found = token_logprob(states, weight, ids.masked_fill(~mask, -100), bias=bias).sum(1)
        found = found / mask.sum(1).clamp(min=1) if by == "mean" else found
        parts.append(found.unflatten(0, (samples, -1)))
    return torch.cat(parts, dim=1).float()
