"""Answers, written texts and classes of a model over a loader, and how much of it is right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from vlpfast.evaluation.answers import (
    answer_metrics,
    choose_answers,
    classification_metrics,
    classify,
    write_texts,
    written_metrics,
)
from vlpfast.types import Batch


class Samples:
    """Three batches; sample i holds the number i."""

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Batch]:
        for rows in torch.arange(10).split(4):
            yield {"image": rows.float(), "label": rows % 3, "index": rows, "key": [f"k{i}" for i in rows.tolist()]}


class Words:
    """Ids are letters of an alphabet."""

    pad_id, bos_id, eos_id = 0, 1, 2

    def encode(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        rows = [[1, *(ord(letter) - 87 for letter in text), 2][:length] for text in texts]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return ids, ids > 0

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i + 87) for i in ids if i > 2)


class Model(nn.Module):
    writes_with = ""

    def classify(self, batch: Batch) -> Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        return torch.nn.functional.one_hot((batch["image"].long() + (batch["image"] > 5)) % 3, 3).float()

    def rank_answers(self, batch: Batch, candidates: Tensor, candidate_mask: Tensor) -> Tensor:
        assert candidates.shape == candidate_mask.shape == (3, 4)  # cut to the longest
        return -(candidates.sum(1) - 30 - batch["image"][:, None]).abs()  # the candidate nearest to the number

    def generate(self, batch: Batch, *, max_new_tokens: int, beams: int, length_penalty: float) -> Tensor:
        assert (max_new_tokens, beams, length_penalty) == (5, 2, 1.0)
        return torch.stack([batch["image"].long() + 10, torch.full_like(batch["index"], 2)], 1)


def test_classify() -> None:
    made = classify(Model(), Samples(), "cpu", "label")
    assert made.index.tolist() == list(range(10)) and made.values["labels"].tolist() == [i % 3 for i in range(10)]
    found = classification_metrics(made.values["logits"], made.values["labels"])
    assert found == {"classification_top1": 0.6, "classification_chance_top1": pytest.approx(0.4), "classification_samples": 10}


def test_equal_logits_share_the_hit() -> None:
    found = classification_metrics(torch.zeros(4, 10), torch.tensor([0, 3, 3, 9]))
    assert found == pytest.approx(
        {"classification_top1": 0.1, "classification_top5": 0.5, "classification_chance_top1": 0.5, "classification_samples": 4}
    )


def test_choose_answers() -> None:
    candidates = ["mm", "ab", "xy"]
    ids, _ = Words().encode(candidates, 9)
    answers, made = choose_answers(Model(), Samples(), "cpu", candidates, Words(), 9)
    sums = ids.sum(1)
    assert answers == [candidates[int((sums - 30 - i).abs().argmin())] for i in range(10)]
    assert made.keys == [f"k{i}" for i in range(10)]


def test_write_texts() -> None:
    texts, _ = write_texts(Model(), Samples(), "cpu", Words(), max_new_tokens=5, beams=2, length_penalty=1.0)
    assert texts == [chr(97 + i) for i in range(10)]


def test_answer_metrics() -> None:
    found = answer_metrics(["A dog.", "two", "no"], [["dog"], ["2"], ["dog"]], "answers")
    assert found == pytest.approx({"answers_accuracy": 2 / 3, "answers_chance_accuracy": 2 / 3, "answers_samples": 3})
    written = written_metrics(["a b c d", "e f g h"], [["a b c d"], ["e f g x"]], "written")
    assert written["written_accuracy"] == 0.5 and written["written_BLEU-1"] == pytest.approx(7 / 8)
    assert {"written_BLEU-4", "written_ROUGE-L", "written_CIDEr", "written_samples"} < set(written)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="Linear has no method classify"):
        classify(nn.Linear(1, 1), Samples(), "cpu", "label")
    with pytest.raises(TypeError, match="rank_answers"):
        choose_answers(nn.Linear(1, 1), Samples(), "cpu", ["a"], Words(), 4)
    with pytest.raises(TypeError, match="generate"):
        write_texts(nn.Linear(1, 1), Samples(), "cpu", Words(), max_new_tokens=5, beams=2, length_penalty=1.0)
    with pytest.raises(ValueError, match="candidates: expected answers, each once, got 2, 1"):
        choose_answers(Model(), Samples(), "cpu", ["a", "a"], Words(), 4)
    with pytest.raises(ValueError, match=r"labels: expected 0 \.\. 2, got 0 \.\. 3"):
        classification_metrics(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="logits and labels"):
        classification_metrics(torch.zeros(2, 3), torch.tensor([0]))
