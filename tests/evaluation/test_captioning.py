"""BLEU, ROUGE-L, CIDEr-D. The pinned figures are those of the pycocoevalcap package 1.2 on the same words."""

from __future__ import annotations

import random

import pytest

from vlpfast.evaluation.captioning import caption_metrics, cider_d, rouge_l, words

VOCABULARY = ["a", "the", "dog", "cat", "on", "in", "red", "blue", "picture", "of", "one", "two"]
VOCABULARY += ["left", "right", "below", "above"]


def made() -> tuple[list[str], list[list[str]]]:
    rng = random.Random(0)

    def sentence(length: int) -> str:
        return " ".join(rng.choice(VOCABULARY) for _ in range(length))

    references = [[sentence(rng.randint(3, 12)) for _ in range(rng.randint(1, 5))] for _ in range(30)]
    texts = [rng.choice(group) if rng.random() < 0.4 else sentence(rng.randint(1, 12)) for group in references]
    return texts, references


def test_figures_of_the_coco_evaluation() -> None:
    found = caption_metrics(*made())
    bleu = [0.7138954522828459, 0.5622605836552543, 0.4934543385439057, 0.4554366638386381]
    expected = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
    expected |= {"ROUGE-L": 0.5666338367832681, "CIDEr": 1.6440381050764339}
    assert found == pytest.approx(expected, rel=1e-9)


def test_words() -> None:
    assert words("It's a well-known dog; isn't it? Don’t!") == [
        "it",
        "'s",
        "a",
        "well-known",
        "dog",
        "is",
        "n't",
        "it",
        "do",
        "n't",
    ]
    assert words("3.5 cats, 1,000 birds... THE_END") == ["3.5", "cats", "1,000", "birds", "the", "end"]
    assert words(" -- ") == []


def test_a_reference_itself_is_best() -> None:
    texts, references = made()
    long = [text for group in references for text in group if len(text.split()) >= 4]  # fewer have no 4-grams
    perfect = caption_metrics(long, [[one] for one in long])
    assert perfect["BLEU-4"] == pytest.approx(1) and perfect["ROUGE-L"] == pytest.approx(1)
    assert perfect["CIDEr"] == pytest.approx(10)
    assert caption_metrics(texts, references)["CIDEr"] < 10


def test_empty_and_foreign_texts_score_nothing() -> None:
    references = [["a dog"], ["two cats on a mat"]]
    found = caption_metrics(["", "xyz"], references)
    assert all(value < 1e-4 for value in found.values())
    assert rouge_l([], [["a"]]) == 0 and rouge_l(["a"], [[]]) == 0


def test_rare_words_count_more() -> None:
    references = [["the", "red", "dog"], ["the", "red", "cat"], ["the", "blue", "cow"]]
    common, rare = (cider_d([text, *references[1:]], [[one] for one in references])[0] for text in (["the"], ["dog"]))
    assert common == 0 < rare  # every sample has "the"


@pytest.mark.parametrize(("texts", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_bad_input(texts: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="references"):
        caption_metrics(texts, references)
