"""What a model answers, writes and decides about samples, and how much of it is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlpfast.data.shards import ShardSet
from vlpfast.evaluation.captioning import caption_metrics
from vlpfast.evaluation.features import Collected, collect
from vlpfast.evaluation.vqa import normalize_answer, vqa_accuracy
from vlpfast.types import Answers, Batch, Classifies, Generates, Loader, Tokenizer


@dataclass
class Answered:
    """Row i: the i-th sample of the loader."""

    index: Tensor  # [N] int64 position in `shards`
    questions: list[str]  # [N], "" where nothing was asked
    answers: list[str]  # [N]
    references: list[list[str]]  # [N] right answers
    skipped: dict[str, str]  # damaged samples that were left out -> what was wrong
    shards: ShardSet

    @property
    def right(self) -> list[bool]:
        """[N] whether each answer is one of its references, but for articles, punctuation and case."""
        return [
            normalize_answer(answer) in map(normalize_answer, group)
            for answer, group in zip(self.answers, self.references, strict=True)
        ]


def answer_metrics(answers: Sequence[str], references: Sequence[Sequence[str]], prefix: str) -> dict[str, float]:
    """{prefix}_accuracy (vqa.py), {prefix}_chance_accuracy: of always giving the commonest reference, {prefix}_samples."""
    counts = Counter(normalize_answer(one) for group in references for one in {*group})
    commonest = counts.most_common(1)[0][0]
    return {
        f"{prefix}_accuracy": vqa_accuracy(answers, references),
        f"{prefix}_chance_accuracy": vqa_accuracy([commonest] * len(answers), references),
        f"{prefix}_samples": len(answers),
    }


def written_metrics(texts: Sequence[str], references: Sequence[Sequence[str]], prefix: str) -> dict[str, float]:
    """answer_metrics, and BLEU-1, BLEU-4, ROUGE-L and CIDEr (captioning.py) of texts with several words."""
    found = caption_metrics(texts, references)
    kept = ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr")
    return answer_metrics(texts, references, prefix) | {f"{prefix}_{name}": found[name] for name in kept}


def classification_metrics(logits: Tensor, labels: Tensor, prefix: str = "classification") -> dict[str, float]:
    """logits [N, K], labels [N] -> {prefix}_top1, _top5 (of more than five classes), _chance_top1: of always naming the commonest
    class, _samples. Classes with equal logits share the hit."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits and labels: expected [N, K] and [N], got {list(logits.shape)} and {list(labels.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(f"labels: expected 0 .. {logits.shape[1] - 1}, got {int(labels.min())} .. {int(labels.max())}")
    own = logits.gather(1, labels[:, None])  # [N, 1]
    above = (logits > own).sum(1).double()  # [N]
    tied = (logits == own).sum(1).double()  # [N] with the right one itself
    out = {f"{prefix}_top{k}": float(((k - above) / tied).clamp(0, 1).mean()) for k in (1, 5) if k == 1 or logits.shape[1] > k}
    commonest = labels.bincount().max() / len(labels)
    return out | {f"{prefix}_chance_top1": float(commonest), f"{prefix}_samples": len(labels)}


Progressed = Callable[[int, int], None] | None


def classify(
    model: nn.Module, loader: Loader, device: torch.device | str, label: str | None, progress: Progressed = None, ranks: int = 1
) -> Collected:
    """ "logits" [N, K] of one pass, and "labels" [N]; label: their field of the batches, None: there is none.

    TypeError: the model does not classify."""
    if not isinstance(model, Classifies):
        raise TypeError(f"model: {type(model).__name__} has no method classify")

    def make(batch: Batch) -> dict[str, Tensor]:
        made = {"logits": model.classify(batch).float()}
        return made if label is None else {**made, "labels": batch[label]}

    return collect(model, loader, device, make, progress, ranks)


def choose_answers(
    model: nn.Module,
    loader: Loader,
    device: torch.device | str,
    candidates: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    progress: Progressed = None,
    ranks: int = 1,
) -> tuple[list[str], Collected]:
    """The candidate that the model ranks first, for each sample of one pass. length: that candidates are cut to."""
    if not isinstance(model, Answers):
        raise TypeError(f"model: {type(model).__name__} has no method rank_answers")
    if not candidates or len(set(candidates)) < len(candidates):
        raise ValueError(
            f"candidates: expected answers, each once, got {len(candidates)}, {len(set(candidates))} of them distinct"
        )
    ids, mask = (part.to(device) for part in tokenizer.encode(list(candidates), length))
    longest = int(mask.sum(1).max())
    ids, mask = ids[:, :longest], mask[:, :longest]
    made = collect(model, loader, device, lambda batch: {"scores": model.rank_answers(batch, ids, mask).float()}, progress, ranks)
    return [candidates[place] for place in made.values["scores"].argmax(1).tolist()], made


def write_texts(
    model: nn.Module,
    loader: Loader,
    device: torch.device | str,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    beams: int,
    length_penalty: float,
    progress: Progressed = None,
    ranks: int = 1,
) -> tuple[list[str], Collected]:
    """What the model writes about each sample of one pass."""
    if not isinstance(model, Generates):
        raise TypeError(f"model: {type(model).__name__} has no method generate")

    def make(batch: Batch) -> dict[str, Tensor]:
        ids = model.generate(batch, max_new_tokens=max_new_tokens, beams=beams, length_penalty=length_penalty)  # [B, L]
        room = max_new_tokens + 1 - ids.shape[1]  # with the end token
        return {"ids": torch.nn.functional.pad(ids, (0, max(0, room)), value=tokenizer.pad_id)}

    made = collect(model, loader, device, make, progress, ranks)
    return [tokenizer.decode(row) for row in made.values["ids"].tolist()], made
