"""Prompts of CoOp against what is put together by hand here, position by position."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vlpfast.nn.prompts import PromptConfig, PromptLearner
from vlpfast.types import UserError

NAMES = ["ant", "big_brown  bear", "cat fish"]
WORDS = ["<pad>", "<bos>", "<eos>", ".", "ant", "big", "brown", "bear", "cat", "fish", "a", "photo", "of"]
TABLE = torch.randn(len(WORDS) + 3, 8, generator=torch.Generator().manual_seed(0))


class Tokenizer:
    """Whole words; "antique" is two tokens, and `glued` makes one token of a name's last word and a full stop."""

    vocab_size, bos_id, eos_id, pad_id = len(WORDS) + 3, 1, 2, 0

    def __init__(self, glued: bool = False) -> None:
        self.glued = glued

    def encode(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            words = re.findall(r"\w+\." if self.glued and text.endswith(".") else r"\w+|\.", text.replace("antique", "ant cat"))
            inner = [WORDS.index(word) if word in WORDS else len(WORDS) for word in words]
            tokens = [1, *inner[: context_length - 2], 2]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, ids != 0

    def save(self, path: str) -> None:
        raise NotImplementedError


def make(names: Sequence[str] = NAMES, tokenizer: Tokenizer | None = None, length: int = 16, **settings) -> PromptLearner:
    torch.manual_seed(1)
    learner = PromptLearner(PromptConfig(**{"tokens": 4, **settings}), 8)
    learner.set_classes(names, tokenizer or Tokenizer(), length)
    return learner


def whole(learner: PromptLearner) -> list[Tensor]:
    """The prompt of each class, prefix and tail together, up to its end token: [length, W] each."""
    prefix, tails, end = learner(TABLE)
    return [torch.cat((prefix[0], tail[: last + 1])) for tail, last in zip(tails, end, strict=True)]


def by_hand(ctx: Tensor, name: str, position: str) -> Tensor:
    embed = lambda words: TABLE[[WORDS.index(word) for word in words]]  # noqa: E731
    words = embed(name.replace("_", " ").split())
    middle = {
        "end": [ctx, words],
        "middle": [ctx[: len(ctx) // 2], words, ctx[len(ctx) // 2 :]],
        "front": [words, ctx],
    }[position]
    return torch.cat((embed(["<bos>"]), *middle, embed([".", "<eos>"])))


@pytest.mark.parametrize("tokens", [1, 4, 5])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [0, 3])
def test_order_of_tokens(tokens: int, position: str, class_specific: int) -> None:
    learner = make(tokens=tokens, position=position, class_specific=class_specific, length=20)
    assert learner.ctx.shape == ((3, tokens, 8) if class_specific else (tokens, 8))
    for number, (prompt, name) in enumerate(zip(whole(learner), NAMES, strict=True)):
        own = learner.ctx[number] if class_specific else learner.ctx
        assert torch.equal(prompt, by_hand(own, name, position)), name
    prefix, tails, end = learner(TABLE)
    assert (
        prefix.shape[1]
        == learner.shared
        == (1 if class_specific else 1 + {"end": tokens, "middle": tokens // 2, "front": 0}[position])
    )
    assert tails.shape[1] == end.max() + 1  # nothing behind the longest name's end token


def test_end_middle_front_give_the_same_multiset_of_tokens() -> None:
    def multiset(prompt: Tensor) -> list[list[float]]:
        return sorted(prompt.tolist())

    prompts = [list(map(multiset, whole(make(position=position)))) for position in ("end", "middle", "front")]
    assert prompts[0] == prompts[1] == prompts[2]


def test_vectors_start_small_or_from_words() -> None:
    torch.manual_seed(0)
    drawn = PromptLearner(PromptConfig(tokens=64), 512).ctx
    assert abs(drawn.mean()) < 1e-3 and drawn.std().item() == pytest.approx(0.02, rel=0.02)
    learner = make(words="a photo of a")
    assert torch.equal(learner.start(TABLE), TABLE[[10, 11, 12, 10]])
    assert torch.equal(make().start(TABLE), make().ctx)


def test_class_list_is_no_part_of_the_state() -> None:
    learner = make()
    assert list(learner.state_dict()) == ["ctx"]
    other = make(["fish", "brown bear"])
    other.load_state_dict(learner.state_dict())
    assert torch.equal(whole(other)[0], by_hand(learner.ctx, "fish", "end"))
    before = learner.ctx.clone()
    learner.set_classes(["cat"], Tokenizer(), 16)
    assert torch.equal(learner.ctx, before) and len(whole(learner)) == 1


def test_shift_moves_every_vector_of_a_prefix() -> None:
    learner = make()
    shift = torch.randn(5, 8)
    prefix, tails, _ = learner(TABLE, shift)
    plain, same, _ = learner(TABLE)
    assert prefix.shape == (5, 5, 8) and torch.equal(tails, same)
    torch.testing.assert_close(prefix[:, 1:], learner.ctx + shift[:, None])
    assert torch.equal(prefix[:, 0], plain[:, 0].expand(5, -1))
    for settings in ({"position": "front"}, {"class_specific": 3}):
        with pytest.raises(ValueError, match='shift: expected position "end" and vectors that all classes share'):
            make(**settings)(TABLE, shift)


def test_a_name_that_just_fits_and_one_that_does_not() -> None:
    assert make(["big brown bear"], length=4 + 3 + 3).token_ids.shape == (1, 10)
    with pytest.raises(UserError, match=r"classes: the prompt of 'big brown bear' has 10 tokens, expected at most 9"):
        make(["big brown bear"], length=9)
    with pytest.raises(UserError, match=r"classes: the prompt of 'ant ant .*' has \d+ tokens, expected at most 9"):
        make(["ant " * 40], length=9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, r"prompt\.tokens: expected at least 1, got 0"),
        ({"position": "start"}, r"prompt\.position: expected end, middle or front, got 'start'"),
        ({"class_specific": -1}, r"prompt\.class_specific: expected a number of classes, or 0, got -1"),
        ({"class_specific": 2}, r"prompt\.class_specific: expected as many as there are classes, 3, got 2"),
        ({"words": "a photo"}, r"prompt\.words: expected as many as prompt\.tokens=4, got 'a photo'"),
        ({"words": "a photo of a", "class_specific": 3}, r"prompt\.words: they are one start for all classes"),
        (
            {"words": "a photo of antique"},
            r"prompt\.words: expected words of one token each, got 'a photo of antique' in 5 tokens",
        ),
        ({"names": []}, "classes: expected names, got none"),
        ({"names": ["ant", " _ "]}, "classes: expected names, got an empty one"),
        ({"tokenizer": Tokenizer(glued=True)}, "classes: the tokenizer writes 'ant' otherwise where a full stop follows"),
    ],
)
def test_what_makes_no_sense_is_named(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**settings)


def test_no_classes_yet() -> None:
    learner = PromptLearner(PromptConfig(), 8)
    with pytest.raises(UserError, match="classes: none are set; expected set_classes"):
        learner(TABLE)
    with pytest.raises(UserError, match="classes: none are set"):
        PromptLearner(PromptConfig(tokens=1, words="a"), 8).start(TABLE)
