"""Zero-shot classification: the class whose name, put into sentences, lies closest to the picture (Radford et al. 2021, 3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.evaluation.features import evaluating, require
from vlpfast.evaluation.retrieval import Ranking, rank
from vlpfast.types import Tokenizer


@dataclass
class ZeroShot:
    """N pictures classified into K classes. Tensors are on the CPU."""

    names: list[str]  # [K]
    labels: Tensor  # [N] int64
    ranking: Ranking  # pictures against classes: `best` [N, 5] holds the guesses

    @property
    def metrics(self) -> dict[str, float]:
        """zero_shot_top1, zero_shot_top5 and zero_shot_chance_top1, _top5 as fractions (ties as in retrieval)."""
        out = {f"zero_shot_top{k}": float(hits.mean()) for k, hits in self.ranking.recall.items()}
        return out | {f"zero_shot_chance_top{k}": value for k, value in self.ranking.chance.items()}

    def per_class(self) -> dict[str, tuple[float, int]]:
        """Name -> top-1 accuracy and number of pictures, for the classes that have any."""
        hits = torch.zeros(len(self.names), dtype=torch.float64).index_add_(0, self.labels, self.ranking.recall[1])
        counts = torch.bincount(self.labels, minlength=len(self.names))
        return {name: (float(hits[i] / counts[i]), int(counts[i])) for i, name in enumerate(self.names) if counts[i]}

    def confusions(self) -> list[tuple[str, str, int]]:
        """(class, what it was taken for, how often), the most frequent first."""
        pairs = zip(self.labels.tolist(), self.ranking.best[:, 0].tolist(), strict=True)
        count = Counter((label, guess) for label, guess in pairs if label != guess)
        return [(self.names[label], self.names[guess], times) for (label, guess), times in count.most_common()]


def class_embeddings(
    model: nn.Module,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str],
    context_length: int,
    device: torch.device | str,
    *,
    batch_size: int = 256,
) -> Tensor:
    """-> [K, D] float32 of unit length on `device`: for each name the mean over the templates ("a photo of a {}.") of its
    unit-length sentences, made unit length again. Raises TypeError when the model has no encode_text, ValueError for no names or
    templates, for a name that is listed twice and for a template without exactly one {}."""
    require(model, "text")
    if not names or not templates:
        raise ValueError(f"names and templates: expected at least one of each, got {len(names)} and {len(templates)}")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"names: {len(twice)} are listed more than once, such as {twice[0]!r}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates: expected exactly one {{}} in each, got {template!r}")
    sentences = [template.replace("{}", name) for name in names for template in templates]
    parts = []
    with evaluating(model):
        for start in range(0, len(sentences), batch_size):
            text, mask = tokenizer.encode(sentences[start : start + batch_size], context_length)
            parts.append(F.normalize(model.encode_text(text.to(device), mask.to(device)).float(), dim=-1))
        return F.normalize(torch.cat(parts).unflatten(0, (len(names), len(templates))).mean(1), dim=-1)  # [K, D]


def zero_shot(image: Tensor, labels: Tensor | Sequence[int], classes: Tensor, names: Sequence[str]) -> ZeroShot:
    """image [N, D] features, labels [N] int64 in 0 .. K - 1, classes [K, D] from class_embeddings, names [K]. Raises ValueError
    for shapes or labels that do not fit and for features that are not finite."""
    labels = torch.as_tensor(labels, dtype=torch.int64).cpu()
    if image.ndim != 2 or classes.ndim != 2 or image.shape[1] != classes.shape[1] or 0 in (*image.shape, len(classes)):
        raise ValueError(
            f"image and classes: expected [N, D] and [K, D], none empty, got {list(image.shape)} and {list(classes.shape)}"
        )
    if labels.shape != image.shape[:1]:
        raise ValueError(f"labels: expected one for each of the {len(image)} pictures, got shape {list(labels.shape)}")
    if len(names) != len(classes):
        raise ValueError(f"names: expected {len(classes)}, one for each class, got {len(names)}")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels: expected 0 .. {len(classes) - 1}, got {int(labels.min())} .. {int(labels.max())}")
    ranking = rank(image, classes, labels, torch.arange(len(classes)), ks=(1, 5), top=5, names=("image", "classes"))
    return ZeroShot(list(names), labels, ranking)
