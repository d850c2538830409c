"""Few samples of each class, and classes to learn from apart from classes to be tried on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from vlpfast.data.order import random_bits

_DRAW = 1 << 32  # far from what views and orders draw
VALIDATION = 4  # shots at most


def few_shot_indices(labels: Sequence[int] | np.ndarray, shots: int, seed: int, *, validation: bool = False) -> np.ndarray:
    """`shots` samples of each class, drawn without replacement; all that a class has, where those are fewer.

    labels [N], whole numbers -> int64 [K], ascending. The same seed draws the same, and fewer shots are some of more. validation:
    min(shots, 4) of each class that the training draw leaves (of a split of its own, draw min(shots, 4) as for training).
    Zhou et al. 2022, "Learning to prompt for vision-language models": seeds 1, 2, 3 and shots 1, 2, 4, 8, 16.
    TypeError, ValueError: labels that are no whole numbers in one row, shots below 1.
    """
    labels = np.asarray(labels)
    if labels.size and not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels: expected whole numbers, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"labels: expected shape [N], got {labels.shape}")
    if shots < 1:
        raise ValueError(f"shots: expected at least 1, got {shots}")
    bits = random_bits(seed, 0, np.arange(len(labels)), _DRAW)
    order = np.lexsort((bits, labels))  # class by class, each class in its random order
    first = np.r_[True, labels[order][1:] != labels[order][:-1]][: len(labels)]
    starts = np.flatnonzero(first)
    place = np.arange(len(labels)) - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))  # among those of its class
    low, high = (shots, shots + min(shots, VALIDATION)) if validation else (0, shots)
    return np.sort(order[(place >= low) & (place < high)]).astype(np.int64)


def split_classes(names: Sequence[str], part: Literal["base", "new"]) -> list[str]:
    """ "base": the first ceil(n / 2) names, "new": the others, both in their order (Zhou et al. 2022, CoCoOp)."""
    if part not in ("base", "new"):
        raise ValueError(f"part: expected base or new, got {part!r}")
    half = (len(names) + 1) // 2
    return list(names[:half] if part == "base" else names[half:])
