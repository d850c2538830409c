"""Some of the samples of a set of shards, as a set of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from vlpfast.data.shards import ShardSet
from vlpfast.types import UserError


class Subset(ShardSet):
    """The samples at `indices` of `whole`, numbered 0, 1, ... in their order there. Everything that works on a ShardSet works on
    it, positions included. UserError: none; ValueError: indices that are not ascending positions in `whole`."""

    def __init__(self, whole: ShardSet, indices: Sequence[int] | np.ndarray) -> None:
        self._whole, self._indices = whole, np.asarray(indices, np.int64)
        if not len(self._indices):
            raise UserError(f"none of the {len(whole)} samples is chosen")
        if (np.diff(self._indices) <= 0).any() or self._indices[0] < 0 or self._indices[-1] >= len(whole):
            raise ValueError(f"indices: expected ascending positions of {len(whole)} samples")
        self.shards = whole.shards
        ends = np.searchsorted(self._indices, np.cumsum(whole.shard_sizes))
        self.shard_sizes = np.diff(ends, prepend=0).astype(np.int64)  # [S], 0 of a shard without any

    def __len__(self) -> int:
        return len(self._indices)

    def _of(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(self._indices[i])

    @property
    def extension_names(self) -> list[str]:
        return self._whole.extension_names

    def key(self, i: int) -> str:
        return self._whole.key(self._of(i))

    def name(self, i: int) -> str:
        return self._whole.name(self._of(i))

    def extensions(self, i: int) -> tuple[str, ...]:
        return self._whole.extensions(self._of(i))

    def problem(self, i: int) -> str:
        return self._whole.problem(self._of(i))

    def read(self, indices: Sequence[int] | np.ndarray, extensions: Sequence[str]) -> list[np.ndarray | None]:
        return self._whole.read([self._of(int(i)) for i in indices], extensions)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._whole.fingerprint().encode() + self._indices.tobytes()).hexdigest()[:32]
