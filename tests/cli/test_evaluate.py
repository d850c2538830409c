"""What evaluation measures follows from what a model can do and from what the samples' JSON says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vlpfast.cli.assemble import Sources
from vlpfast.cli.evaluate import evaluate, say
from vlpfast.data import ShardWriter, train_tokenizer
from vlpfast.training.config import DataConfig, EvaluationConfig, TrainConfig
from vlpfast.types import Batch, DataSpec, ImageSpec, TargetSpec, TextSpec, UserError

RECORDS = [{"qa": [{"question": f"what is {i}?", "answer": "even" if i % 2 == 0 else "odd"}], "label": i % 3} for i in range(6)]
CLASSES = ["zero", "one", "two"]


class Judge(nn.Module):
    """Answers and classes by the number in the question; wrong about the last one."""

    writes_with = ""

    def __init__(self, tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def numbers(self, batch: Batch) -> list[int]:
        return [int(self.tokenizer.decode(row)[8]) for row in batch["question"].tolist()]  # "what is 3?"

    def classify(self, batch: Batch) -> Tensor:
        named = [(i + (i == 5)) % 3 for i in self.numbers(batch)]
        return torch.eye(3)[named]

    def rank_answers(self, batch: Batch, candidates: Tensor, candidate_mask: Tensor) -> Tensor:
        return torch.eye(2)[[i % 2 if i < 5 else 0 for i in self.numbers(batch)]]

    def generate(self, batch: Batch, **options) -> Tensor:
        assert options == {"max_new_tokens": 7, "beams": 2, "length_penalty": -1.0}
        return self.tokenizer.encode(["even"] * len(batch["question"]), 7)[0][:, 1:]


@pytest.fixture
def held(tmp_path: Path) -> str:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with ShardWriter(tmp_path, "x") as writer:
        for number, record in enumerate(RECORDS):
            writer.write(f"k{number}", {"png": picture.getvalue(), "txt": b"a caption", "json": json.dumps(record).encode()})
    return str(tmp_path / "*.tar")


def settings(**evaluation) -> SimpleNamespace:
    texts = {"question": TextSpec(16, ["{qa.question}"]), "answer": TextSpec(8, ["{qa.answer}"])}
    spec = DataSpec(ImageSpec(8), None, texts=texts, targets={"label": TargetSpec(classes=CLASSES)})
    options = EvaluationConfig(batch_size=4, max_new_tokens=7, beams=2, length_penalty=-1.0, **evaluation)
    return SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(data=spec)),
        data=DataConfig(loader="plain", threads=1),
        train=TrainConfig(),
        evaluation=options,
    )


def test_classes_answers_and_texts(held: str) -> None:
    tokenizer = train_tokenizer(["what is 0 1 2 3 4 5?", "even odd"] * 3, 300)
    sources = Sources([held], [held], None, None, ["even", "odd"])
    found = evaluate(settings(), Judge(tokenizer), {"": tokenizer}, sources, torch.device("cpu"))
    metrics = found.metrics
    assert metrics["classification_top1"] == pytest.approx(5 / 6) and metrics["classification_samples"] == 6
    assert metrics["answers_accuracy"] == pytest.approx(5 / 6) and metrics["answers_chance_accuracy"] == 0.5
    assert metrics["written_accuracy"] == 0.5 and "written_CIDEr" in metrics
    assert found.pairs is None and found.classified is None
    answered = found.answered["answers"]
    assert answered.questions == [f"what is {i}?" for i in range(6)] and answered.answers[:3] == ["even", "odd", "even"]
    assert answered.references == [["even"], ["odd"]] * 3
    assert found.answered["classification"].answers == ["zero", "one", "two", "zero", "one", "zero"]


def test_references_can_be_named(held: str) -> None:
    tokenizer = train_tokenizer(["what is 0 1 2 3 4 5?", "even odd"] * 3, 300)
    config = settings(references=["{qa.answer}", "even"])
    found = evaluate(config, Judge(tokenizer), {"": tokenizer}, Sources([held], [held], None), torch.device("cpu"))
    assert found.metrics["written_accuracy"] == 1 and "answers_accuracy" not in found.metrics


def test_nothing_to_measure(held: str) -> None:
    tokenizer = train_tokenizer(["what is"] * 3, 300)
    with pytest.raises(UserError, match="Linear offers nothing that these data can measure"):
        evaluate(settings(), nn.Linear(1, 1), {"": tokenizer}, Sources([held], [held], None), torch.device("cpu"))
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(settings(), nn.Linear(1, 1), {"": tokenizer}, Sources([held], [], None), torch.device("cpu"))


def test_say() -> None:
    record = {"caption": "x", "variants": [{"caption": "y"}, {"caption": "z"}], "n": 3}
    assert say(record, "{caption} of {n}") == ["x of 3"]
    assert say(record, "a {variants.caption}") == ["a y", "a z"]
