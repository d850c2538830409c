"""What is hidden of a text and what is asked of it: masked tokens, words and spans; prefixes, answers.

All on the host, in numpy's int64 behind torch tensors; what is random is a function of (seed, epoch, index) alone. Labels stand
at the token they are the id of (whoever predicts the next token shifts them) and are IGNORED everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlpfast.data.order import uniform

IGNORED = -100

# Of a sample's draws, those from here on belong to its text; each purpose has a number for every token.
_DRAW = 1 << 22
_CHOICE, _KIND, _WORD, _LENGTH, _PREFIX = (_DRAW + (purpose << 18) for purpose in range(5))


def token_units(ids: Tensor, mask: Tensor, special_ids: Sequence[int]) -> Tensor:
    """Each token for itself: int64 [B, L] places, -1 at special tokens and padding. For `mask_tokens`, whose other `units` are
    the word_ids of TextTokenizer.encode_words (whole words) and `span_units` (entities)."""
    places = torch.arange(ids.shape[1]).expand_as(ids)
    return places.masked_fill(~mask | torch.isin(ids, torch.tensor(special_ids, dtype=ids.dtype)), -1)


def span_units(word_ids: Tensor, spans: Tensor, entities: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Units in which all tokens of an entity belong together, and outside of entities all of a word (ARL's masking). Entities
    that overlap become one.

    word_ids [B, L], spans [B, L, 2] as encode_words gives them; entities: for each text, characters (start, end) -> int64 [B,
    L]."""
    if len(entities) != len(word_ids):
        raise ValueError(f"entities: expected a list for each of the {len(word_ids)} texts, got {len(entities)}")
    units = word_ids.clone()
    for row, found in enumerate(entities):
        for start, end in found:
            if start >= end:
                raise ValueError(f"entities: expected start < end, got ({start}, {end}) in text {row}")
            inside = (word_ids[row] >= 0) & (spans[row, :, 0] < end) & (spans[row, :, 1] > start)  # [L]
            touched = units[row][inside].unique()
            units[row][torch.isin(units[row], touched)] = touched.min() if len(touched) else -1
    return units


def mask_tokens(
    ids: Tensor,
    units: Tensor,
    index: Tensor,
    *,
    mask_id: int,
    replacements: Tensor,
    seed: int,
    epoch: int,
    rate: float = 0.15,
    exact: bool = False,
    longest: int = 1,
    shares: tuple[float, float] = (0.8, 0.1),
) -> tuple[Tensor, Tensor]:
    """BERT's masked language model (Devlin et al. 2019): of the chosen tokens 80 % become `mask_id`, 10 % a random token, 10 %
    stay.

    ids [B, L] int64; units [B, L] int64: tokens of a row with the same number are chosen together, -1: never; index [B] int64,
    the samples' numbers -> masked ids and labels (the old id where chosen, IGNORED elsewhere), [B, L] int64 each.

    rate: share of the tokens that is chosen. exact=False: each unit for itself with this probability. exact=True: units in random
    order while they fit into round(rate * tokens), at least 1 token; one too long for what is left is passed over (as BERT does,
    so long words are chosen less often), except that a row never goes without: if none fits, the first is taken. longest (needs
    exact): instead of one unit, runs of 1 .. longest units, n of them with a probability proportional to 1 / n. replacements [R]:
    the ids a random token is drawn from. shares: of mask and random tokens among the chosen. A row's draws do not depend on the
    other rows."""
    if ids.shape != units.shape or index.shape != ids.shape[:1] or ids.ndim != 2:
        raise ValueError(
            f"expected ids [B, L], units [B, L] and index [B], got {list(ids.shape)}, {list(units.shape)}, {list(index.shape)}"
        )
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected 0 .. 1, got {rate}")
    if longest < 1 or (longest > 1 and not exact):
        raise ValueError(f"longest: expected 1, or more with exact=True, got {longest} with exact={exact}")
    if min(shares) < 0 or sum(shares) > 1:
        raise ValueError(f"shares: expected two of at least 0 that add up to at most 1, got {shares}")
    if not len(replacements):
        raise ValueError("replacements: expected at least one id, got none")
    rows = index.numpy()[:, None]  # [B, 1]
    number, sizes = _numbered(units.numpy())  # [B, L], [B, U]
    scores = uniform(seed, epoch, rows, _CHOICE + np.arange(sizes.shape[1]))  # [B, U]
    if exact:
        quota = np.rint(rate * sizes.sum(1)).astype(np.int64)
        quota = np.where(rate > 0, np.maximum(quota, 1), 0)
        lengths = _run_lengths(uniform(seed, epoch, rows, _LENGTH + np.arange(sizes.shape[1])), longest)
        taken = np.stack([_fill(*row) for row in zip(scores, sizes, lengths, quota, strict=True)]) if len(sizes) else sizes > 0
    else:
        taken = scores < rate
    taken = np.pad(taken, ((0, 0), (0, 1)))  # a last column for the tokens without a unit, number -1
    chosen = np.take_along_axis(taken, number, axis=1)  # [B, L]
    places = np.arange(ids.shape[1])
    kind = uniform(seed, epoch, rows, _KIND + places)
    drawn = (uniform(seed, epoch, rows, _WORD + places) * len(replacements)).astype(np.int64)
    old = ids.numpy()
    new = np.where(kind < shares[0], mask_id, np.where(kind < sum(shares), replacements.numpy()[drawn], old))
    return torch.from_numpy(np.where(chosen, new, old)), torch.from_numpy(np.where(chosen, old, IGNORED))


def _numbered(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Units in the order of their first tokens: their numbers [B, L] (-1 stays) and how many tokens each has, [B, U]."""
    number = np.full(units.shape, -1, np.int64)
    for row, unit in enumerate(units):
        known, first, inverse = np.unique(unit, return_index=True, return_inverse=True)
        first = np.where(known < 0, len(unit), first)  # the one that is none comes last
        number[row] = np.where(unit < 0, -1, np.argsort(np.argsort(first))[inverse])
    count = int(number.max(initial=-1)) + 1
    return number, np.stack([np.bincount(row[row >= 0], minlength=count) for row in number]) if len(units) else np.zeros((0, 0))


def _run_lengths(draws: np.ndarray, longest: int) -> np.ndarray:
    """uniform draws -> 1 .. longest, n with a probability proportional to 1 / n."""
    weights = 1 / np.arange(1, longest + 1)
    return 1 + np.searchsorted(np.cumsum(weights / weights.sum())[:-1], draws, "right")


def _fill(scores: np.ndarray, sizes: np.ndarray, lengths: np.ndarray, quota: int) -> np.ndarray:
    """Units of one row, [U] each -> bool [U]: runs from random starts while they fit into the quota of tokens."""
    real = int((sizes > 0).sum())  # the others belong to longer rows
    order, size, length = np.argsort(scores[:real], kind="stable").tolist(), sizes.tolist(), lengths.tolist()
    taken: set[int] = set()
    left = int(quota)
    for start in order:
        run = [unit for unit in range(start, min(start + length[start], real)) if unit not in taken]
        while run and sum(size[unit] for unit in run) > left:
            run.pop()
        taken.update(run)
        left -= sum(size[unit] for unit in run)
        if not left:
            break
    if quota and real and not taken:
        taken.add(order[0])
    return np.isin(np.arange(len(scores)), list(taken))


# --- prefixes and answers ----------------------------------------------------------------------------------------------------


def random_prefix(mask: Tensor, index: Tensor, *, seed: int, epoch: int, least: int = 1) -> Tensor:
    """How many tokens of each text are given and not asked for, drawn evenly: at least `least` (1: bos) and fewer than all, so
    that one is left to predict. mask [B, L] bool, index [B] int64 -> int64 [B]. PrefixLM (SimVLM, HiTeA, BUS)."""
    lengths = mask.sum(1).numpy()
    if least < 1:
        raise ValueError(f"least: expected at least 1, got {least}")
    choices = np.maximum(lengths - least, 1)  # least .. length - 1
    drawn = least + (uniform(seed, epoch, index.numpy(), _PREFIX) * choices).astype(np.int64)
    return torch.from_numpy(np.minimum(drawn, np.maximum(lengths - 1, 0)))


def prefix_labels(ids: Tensor, mask: Tensor, prefix: Tensor | int = 1) -> Tensor:
    """ids [B, L], mask [B, L] bool, prefix [B] or one number -> labels [B, L]: the ids, IGNORED at the first `prefix` tokens and
    at padding. 1: the plain language model, which does not predict bos."""
    prefix = torch.as_tensor(prefix).reshape(-1, 1)
    asked = mask & (torch.cumsum(mask, 1) > prefix)
    return torch.where(asked, ids, IGNORED)


def join_prompt_answer(
    prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], context_length: int, *, bos_id: int, eos_id: int, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """bos, prompt, answer, eos and padding in one row: text, text_mask and labels, [B, L] each. Asked for are the answer and its
    eos alone (InstructBLIP, and whatever is tuned to instructions).

    prompts, answers: int64 ids without special tokens, as TextTokenizer.pieces gives them. What is too long loses the beginning
    of its prompt; an answer that does not fit without any prompt loses its end and its eos. ValueError: an empty answer."""
    if len(prompts) != len(answers):
        raise ValueError(f"expected as many prompts as answers, got {len(prompts)} and {len(answers)}")
    if context_length < 3:
        raise ValueError(f"context_length: expected at least 3, got {context_length}")
    text = np.full((len(prompts), context_length), pad_id, np.int64)
    mask = np.zeros(text.shape, bool)
    labels = np.full(text.shape, IGNORED, np.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if not len(answer):
            raise ValueError(f"answers: text {row} is empty")
        answer = np.append(answer, eos_id)[: context_length - 1]
        room = context_length - 1 - len(answer)
        prompt = prompt[max(0, len(prompt) - room) :]
        begin, end = 1 + len(prompt), 1 + len(prompt) + len(answer)
        text[row, 0] = bos_id
        text[row, 1:begin], text[row, begin:end], labels[row, begin:end] = prompt, answer, answer
        mask[row, :end] = True
    return torch.from_numpy(text), torch.from_numpy(mask), torch.from_numpy(labels)
