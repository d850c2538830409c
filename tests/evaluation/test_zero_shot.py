from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.evaluation.zero_shot import class_embeddings, zero_shot


class Letters:
    """Each letter is an id."""

    vocab_size, pad_id, bos_id, eos_id = 128, 0, 1, 2

    def encode(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            cut = [1, *text.encode()[: context_length - 2], 2]
            ids[row, : len(cut)] = torch.tensor(cut)
        return ids, ids != 0


class Texts(nn.Module):
    """The mean of the letters' vectors over the mask, through dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(128, 16)
        self.dropout = nn.Dropout(0.5)

    def encode_text(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        rows = self.dropout(self.table(text)) * text_mask[..., None]
        return F.normalize(rows.sum(1), dim=-1)


NAMES = ["cat", "dog", "fire engine", "owl", "moon"]
TEMPLATES = ["a photo of a {}.", "{}", "the {} at night"]


def test_class_embeddings_are_averaged_and_made_unit_length_again() -> None:
    model, tokenizer = Texts(), Letters()
    got = class_embeddings(model, tokenizer, NAMES, TEMPLATES, 40, "cpu")
    assert model.training and model.dropout.training
    model.eval()
    for name, row in zip(NAMES, got, strict=True):
        sentences = [template.format(name) for template in TEMPLATES]
        each = [model.encode_text(*tokenizer.encode([sentence], 40))[0] for sentence in sentences]
        mean = torch.stack(each).double().mean(0)
        torch.testing.assert_close(row.double(), mean / mean.norm(), atol=1e-6, rtol=0)
    for batch_size in (1, 4, 1000):
        again = class_embeddings(model, tokenizer, NAMES, TEMPLATES, 40, "cpu", batch_size=batch_size)
        torch.testing.assert_close(again, got, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "names,templates,message",
    [
        ([], TEMPLATES, "at least one of each, got 0 and 3"),
        (NAMES, [], "got 5 and 0"),
        (["cat", "cat"], TEMPLATES, "more than once, such as 'cat'"),
        (NAMES, ["a photo"], "exactly one {} in each, got 'a photo'"),
        (NAMES, ["{} and {}"], "exactly one {}"),
    ],
)
def test_wrong_names_and_templates(names, templates, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_embeddings(Texts(), Letters(), names, templates, 40, "cpu")


def test_model_without_texts_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no method encode_text"):
        class_embeddings(nn.Linear(2, 2), Letters(), NAMES, TEMPLATES, 40, "cpu")


def test_figures_match_brute_force() -> None:
    torch.manual_seed(0)
    classes = F.normalize(torch.randn(7, 12), dim=1)
    labels = torch.randint(0, 6, (203,))  # class 6 has no picture
    image = F.normalize(classes[labels] + 0.5 * torch.randn(203, 12), dim=1)
    names = list("abcdefg")
    result = zero_shot(image, labels.tolist(), classes, names)
    order = (image.double() @ classes.double().T).argsort(1, descending=True)
    top = {k: (order[:, :k] == labels[:, None]).any(1).double() for k in (1, 5)}
    assert 0.2 < top[1].mean() < 0.95
    assert result.metrics["zero_shot_top1"] == pytest.approx(top[1].mean().item())
    assert result.metrics["zero_shot_top5"] == pytest.approx(top[5].mean().item())
    assert result.metrics["zero_shot_chance_top1"] == pytest.approx(1 / 7)
    assert result.metrics["zero_shot_chance_top5"] == pytest.approx(5 / 7)
    shares = result.per_class()
    assert list(shares) == names[:6]
    for c in range(6):
        assert shares[names[c]] == pytest.approx((top[1][labels == c].mean().item(), int((labels == c).sum())))
    counts = {}
    for label, guess in zip(labels.tolist(), order[:, 0].tolist(), strict=True):
        if label != guess:
            counts[names[label], names[guess]] = counts.get((names[label], names[guess]), 0) + 1
    got = result.confusions()
    assert {(label, guess): times for label, guess, times in got} == counts
    assert [times for *_, times in got] == sorted(counts.values(), reverse=True)


def test_fewer_than_five_classes() -> None:
    result = zero_shot(torch.eye(3), [0, 2, 2], torch.eye(3), ["a", "b", "c"])
    assert result.metrics["zero_shot_top1"] == pytest.approx(2 / 3)
    assert result.metrics["zero_shot_top5"] == result.metrics["zero_shot_chance_top5"] == 1
    assert result.confusions() == [("c", "b", 1)]


def test_constant_classes_score_chance() -> None:
    result = zero_shot(F.normalize(torch.randn(50, 8), dim=1), [i % 10 for i in range(50)], torch.ones(10, 8), list("abcdefghij"))
    assert result.metrics["zero_shot_top1"] == pytest.approx(0.1)
    assert result.metrics["zero_shot_top5"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "image,labels,classes,names,message",
    [
        (torch.ones(2, 3), [0, 2], torch.eye(3)[:2], ["a", "b"], r"labels: expected 0 .. 1, got 0 .. 2"),
        (torch.ones(2, 3), [0, -1], torch.eye(3)[:2], ["a", "b"], r"got -1 .. 0"),
        (torch.ones(2, 3), [0], torch.eye(3)[:2], ["a", "b"], "one for each of the 2 pictures"),
        (torch.ones(2, 3), [0, 1], torch.eye(3), ["a"], "names: expected 3"),
        (torch.ones(2, 4), [0, 1], torch.eye(3), list("abc"), r"got \[2, 4\] and \[3, 3\]"),
        (torch.ones(0, 3), [], torch.eye(3), list("abc"), "none empty"),
        (torch.full((2, 3), math.nan), [0, 1], torch.eye(3), list("abc"), "image: 2 of 2 features are not finite"),
        (torch.ones(2, 3), [0, 1], torch.full((3, 3), math.nan), list("abc"), "classes: 3 of 3 features are not finite"),
    ],
)
def test_wrong_calls(image, labels, classes, names, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zero_shot(image, labels, classes, names)
