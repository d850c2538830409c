"""Random numbers as a pure function of a name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draws:
    """The stream that belongs to a name such as (seed, split, scene number, attempt). Philox's raw words, whose sequence
    numpy keeps for good, and whole-number arithmetic: the same on every platform, whatever was drawn before for other
    names."""

    def __init__(self, *name: int | str) -> None:
        digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64))
        self._ahead: list[int] = []

    def whole(self, low: int, high: int) -> int:
        """low <= value <= high."""
        if not self._ahead:
            self._ahead = self._bits.random_raw(64).tolist()[::-1]
        return low + (self._ahead.pop() * (high - low + 1) >> 64)

    def chance(self, percent: int) -> bool:
        return self.whole(1, 100) <= percent

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.whole(0, len(choices) - 1)]

    def real(self, low: float, high: float) -> float:
        return low + (high - low) * (self.whole(0, 2**53 - 1) * 2.0**-53)

    def reals(self, *shape: int) -> np.ndarray:
        """float64 of that shape, 0 <= value < 1."""
        words = self._bits.random_raw(int(np.prod(shape)))
        return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)
