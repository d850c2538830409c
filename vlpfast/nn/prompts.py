"""Learned words around class names (CoOp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.types import Tokenizer, UserError


@dataclass
class PromptConfig:
    """The defaults are CoOp's."""

    tokens: int = 16  # M, learned vectors
    position: Literal["end", "middle", "front"] = "end"  # of the class name: behind them, in their middle, before them
    class_specific: int = 0  # > 0: vectors of its own for each of so many classes; 0: one set for all
    # Start from the embeddings of these words, as many as `tokens`, each one token; "": from N(0, 0.02^2)
    words: str = ""


class Prompts(NamedTuple):
    """What TextTower.encode_prompts takes."""

    prefix: Tensor  # [T, P, W]
    tails: Tensor  # [C, L, W]
    end: Tensor  # [C] int64


class PromptLearner(nn.Module):
    """Start token, M learned vectors and "NAME." for every class, in the order that `position` says.

    Zhou et al. 2022, "Learning to prompt for vision-language models", section 3.2. `ctx` is [M, W], or [C, M, W] class-specific.

    Prompts are put together from token ids, so no placeholder word is tokenised and none has to be one token. The ids follow from
    class list and tokenizer and are no part of the state_dict (the official checkpoints' token_prefix and token_suffix are such):
    a resumed run is given the same classes and goes on exactly, and learned vectors serve any other list.
    """

    token_ids: Tensor  # [C, 1 + M + L] int64; where a learned vector stands, any
    slots: Tensor  # [C, 1 + M + L] int64: which learned vector stands there, -1: the token
    end: Tensor  # [C] int64
    word_ids: Tensor  # [M] int64, of `words`

    def __init__(self, config: PromptConfig, width: int) -> None:
        super().__init__()
        if config.tokens < 1:
            raise UserError(f"prompt.tokens: expected at least 1, got {config.tokens}")
        if config.position not in ("end", "middle", "front"):
            raise UserError(f"prompt.position: expected end, middle or front, got {config.position!r}")
        if config.class_specific < 0:
            raise UserError(f"prompt.class_specific: expected a number of classes, or 0, got {config.class_specific}")
        if config.words and len(config.words.split()) != config.tokens:
            raise UserError(f"prompt.words: expected as many as prompt.tokens={config.tokens}, got {config.words!r}")
        if config.words and config.class_specific:
            raise UserError("prompt.words: they are one start for all classes; expected prompt.class_specific=0 with them")
        self.config = config
        shape = [config.class_specific] * (config.class_specific > 0) + [config.tokens, width]
        self.ctx = nn.Parameter(0.02 * torch.randn(shape))
        for name, size in (("token_ids", (0, 0)), ("slots", (0, 0)), ("end", (0,)), ("word_ids", (0,))):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64), persistent=False)

    def set_classes(self, names: Sequence[str], tokenizer: Tokenizer, context_length: int) -> None:
        """The classes to write prompts for, in their order; underscores in a name become spaces. Leaves the vectors as they are.

        UserError: no names, other than as many as there are class-specific vectors, a name that is nothing but spaces or does not
        fit into context_length beside the vectors, words that are not one token each.
        """
        config = self.config
        names = [" ".join(name.replace("_", " ").split()) for name in names]
        if not names or not all(names):
            raise UserError(f"classes: expected names, got {'none' if not names else 'an empty one'}")
        if config.class_specific and len(names) != config.class_specific:
            raise UserError(
                f"prompt.class_specific: expected as many as there are classes, {len(names)}, got {config.class_specific}"
            )
        alone, sentences = (_pieces(texts, tokenizer, context_length) for texts in (names, [f"{name}." for name in names]))
        rows = []  # for each class token ids, and below them slots
        vectors = range(self.before), range(self.before, config.tokens)
        for name, own, piece in zip(names, alone, sentences, strict=True):
            if piece[: len(own)] != own:
                raise UserError(f"classes: the tokenizer writes {name!r} otherwise where a full stop follows")
            if (length := 2 + config.tokens + len(piece)) > context_length:
                raise UserError(f"classes: the prompt of {name!r} has {length} tokens, expected at most {context_length}")
            rest = [*piece[len(own) :], tokenizer.eos_id]
            ids = [tokenizer.bos_id, *[0] * len(vectors[0]), *own, *[0] * len(vectors[1]), *rest]
            slots = [-1, *vectors[0], *[-1] * len(own), *vectors[1], *[-1] * len(rest)]
            rows.append((ids, slots))
        longest = max(len(ids) for ids, _ in rows)
        device = self.ctx.device
        self.token_ids = torch.tensor([ids + [tokenizer.pad_id] * (longest - len(ids)) for ids, _ in rows], device=device)
        self.slots = torch.tensor([slots + [-1] * (longest - len(slots)) for _, slots in rows], device=device)
        self.end = torch.tensor([len(ids) - 1 for ids, _ in rows], device=device)
        if config.words:
            pieces = _pieces(config.words.split(), tokenizer, context_length)
            together = _pieces([config.words], tokenizer, context_length)[0]
            if together != [piece[0] for piece in pieces if len(piece) == 1]:
                raise UserError(f"prompt.words: expected words of one token each, got {config.words!r} in {len(together)} tokens")
            self.word_ids = torch.tensor(together, device=device)

    @property
    def before(self) -> int:
        """How many vectors stand before the class name."""
        return {"end": self.config.tokens, "middle": self.config.tokens // 2, "front": 0}[self.config.position]

    @property
    def shared(self) -> int:
        """P: how many tokens the prompts of all classes begin with alike."""
        return 1 if self.config.class_specific else 1 + self.before

    def forward(self, table: Tensor, shift: Tensor | None = None) -> Prompts:
        """table [V, W], the token embeddings; shift [T, W], added to every learned vector, for T prefixes (position "end" and
        shared vectors alone) -> prompts of all classes, without positions."""
        self.check_classes()
        ctx, shared = self.ctx, self.shared
        start = table[self.token_ids[:1, 0]]  # [1, W]
        if shift is None:
            prefix = torch.cat((start, ctx[: shared - 1] if not self.config.class_specific else ctx[0, :0]))[None]  # [1, P, W]
        else:
            if self.config.class_specific or self.config.position != "end":
                raise ValueError('shift: expected position "end" and vectors that all classes share, got others')
            prefix = torch.cat((start.expand(shift.shape[0], 1, -1), ctx + shift[:, None]), 1)  # [T, P, W]
        tails = F.embedding(self.token_ids[:, shared:], table)  # [C, L, W]
        if shared <= self.config.tokens:  # some of the vectors stand in the tails
            slots = self.slots[:, shared:]
            place = slots.clamp(min=0)
            if self.config.class_specific:
                place = place + self.config.tokens * torch.arange(len(place), device=place.device)[:, None]
            tails = torch.where((slots >= 0)[..., None], F.embedding(place, ctx.reshape(-1, ctx.shape[-1])), tails)
        return Prompts(prefix, tails, self.end - shared)

    def check_classes(self) -> None:
        if not self.token_ids.shape[0]:
            raise UserError("classes: none are set; expected set_classes(names, tokenizer) before prompts are written")

    def start(self, table: Tensor) -> Tensor:
        """The vectors to begin with, [M, W]: the embeddings of `words` in table [V, W], or the vectors as they are.

        UserError: words, and no tokenizer to read them with yet.
        """
        if not self.config.words:
            return self.ctx.detach()
        self.check_classes()
        return table.detach()[self.word_ids.to(table.device)]


def _pieces(texts: Sequence[str], tokenizer: Tokenizer, context_length: int) -> list[list[int]]:
    """The ids of each text without start and end token; of one that is too long for the context, too many."""
    ids, mask = tokenizer.encode(texts, context_length + 3)
    return [row[1 : int(length) - 1].tolist() for row, length in zip(ids, mask.sum(1), strict=True)]
