"""Masks as run lengths, in COCO's uncompressed form: column after column, beginning with a run of zeros (which may be 0 long)."""

from __future__ import annotations

from typing import Any

import numpy as np


def encode(mask: np.ndarray) -> dict[str, Any]:
    """mask [H, W] bool -> {"size": [H, W], "counts": [...]}."""
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(changes, prepend=0, append=flat.size).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat.size and flat[0] else counts}


def decode(rle: dict[str, Any]) -> np.ndarray:
    """The mask [H, W] bool. Raises ValueError if the runs do not fill it."""
    height, width = rle["size"]
    counts = np.asarray(rle["counts"], np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(f"counts: expected runs of {height * width} pixels together, got {int(counts.sum())}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T
