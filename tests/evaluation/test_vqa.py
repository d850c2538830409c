"""The VQA challenge's accuracy."""

from __future__ import annotations

import pytest

from vlpfast.evaluation.vqa import normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A Dog.", "dog"),
        ("the two  cats", "2 cats"),
        ("None", "0"),
        ("1,000 dollars", "1000 dollars"),
        ("3.5", "3.5"),
        ("dont know", "don't know"),
        ("black and white", "black and white"),
        ("red/blue", "red blue"),
        ("(yes)", "yes"),
        ("yes, sir", "yes sir"),
        ("", ""),
    ],
)
def test_normalize(answer: str, expected: str) -> None:
    assert normalize_answer(answer) == expected


def test_ten_people() -> None:
    people = ["yes"] * 2 + ["no"] * 8
    # Left out are, in turn, two of those who agree (1 other left: 1/3) and eight who do not (2 left: 2/3).
    assert vqa_accuracy(["Yes"], [people]) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy(["no"], [people]) == 1
    assert vqa_accuracy(["maybe"], [people]) == 0
    assert vqa_accuracy(["no", "maybe"], [people, people]) == 0.5


def test_few_references_are_matched_exactly() -> None:
    assert vqa_accuracy(["a dog", "cat"], [["dog"], ["dog", "cow"]]) == 0.5


@pytest.mark.parametrize(("answers", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_bad_input(answers: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="references"):
        vqa_accuracy(answers, references)
