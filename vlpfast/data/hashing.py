"""Perceptual hashes of pictures, and which of many hashes lies near a new one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
from PIL import Image

MOST_DISTANCE = 11  # bits; two unrelated pictures differ in 32 on average

_BITS = np.array([number.bit_count() for number in range(256)], np.uint8)
_PLACES = np.uint64(1) << np.arange(64, dtype=np.uint64)
# The rows 1 to 8 of the orthonormal 32-point DCT-II: frequency, pixel.
_DCT = np.sqrt(2 / 32) * np.cos(np.pi / 32 * np.arange(1, 9)[:, None] * (np.arange(32) + 0.5))  # [8, 32] float64


def dhash(picture: Image.Image) -> np.uint64:
    """64 bits: is the picture, at 9 x 8 pixels of grey, lighter than its left neighbour? Blind to brightness and contrast."""
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BILINEAR), np.int16)  # [8, 9]
    return _packed(grey[:, 1:] > grey[:, :-1])


def phash(picture: Image.Image) -> np.uint64:
    """64 bits: which of the 8 x 8 lowest frequencies, without the means, are above their median (Zauner 2010, "Implementation and
    benchmarking of perceptual image hash functions"). Pictures without any pattern are all alike to both hashes."""
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR), np.float64)
    low = np.round(_DCT @ grey @ _DCT.T, 3)  # [8, 8]; rounded, so that a plain picture has 0 everywhere and not noise
    return _packed(low > np.median(low))


def _packed(bits: np.ndarray) -> np.uint64:
    return np.bitwise_or.reduce(_PLACES[bits.ravel()], initial=np.uint64(0))


HASHES: dict[str, Callable[[Image.Image], np.uint64]] = {"phash": phash, "dhash": dhash}


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits in which uint64 arrays, which broadcast, differ -> int64 of their common shape."""
    different = np.bitwise_xor(a, b)
    return _BITS[different.reshape(-1).view(np.uint8)].reshape(*different.shape, 8).sum(-1, dtype=np.int64)


class HammingIndex:
    """Hashes in the order they came, found again within `distance` bits: multi-index hashing (Norouzi, Punjani, Fleet 2012).

    The 64 bits are cut into bands. Hashes within `distance` differ in at most distance // bands bits of one band at least, so it
    is enough to look up, in each band's sorted table, the query's value and all values that near to it. Exact.
    Memory: 32 bytes for each hash (40 for a distance above 5), for a moment twice as much of a part when tables are merged."""

    def __init__(self, distance: int) -> None:
        if not 0 <= distance <= MOST_DISTANCE:
            raise ValueError(f"distance: expected 0 .. {MOST_DISTANCE} bits, got {distance}")
        self._distance, self._bands = distance, 3 if distance <= 5 else 4
        bounds = [64 * i // self._bands for i in range(self._bands + 1)]
        self._shifts = np.array(bounds[:-1], np.uint64)
        widths = np.diff(bounds)
        self._value_masks = np.array([(1 << int(width)) - 1 for width in widths], np.uint64)
        self._flips = [_flips(int(width), distance // self._bands) for width in widths]
        self._runs: list[_Run] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, hashes: np.ndarray) -> None:
        """hashes [N] uint64; they get the next N numbers."""
        if not len(hashes):
            return
        self._runs.append(_Run(self._size, hashes, self._values(hashes)))
        self._size += len(hashes)
        while len(self._runs) > 1 and len(self._runs[-2].hashes) <= 2 * len(self._runs[-1].hashes):
            last, before = self._runs.pop(), self._runs.pop()
            joined = np.concatenate([before.hashes, last.hashes])
            self._runs.append(_Run(before.first, joined, self._values(joined)))

    def first_near(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """hashes [Q] uint64 -> the lowest number within the distance, or -1, and that distance: int64 [Q] each."""
        best = np.full(len(hashes), np.iinfo(np.int64).max)
        far = np.full(len(hashes), -1)
        values = self._values(hashes)
        for run in self._runs:
            for band in range(self._bands):
                wanted = (values[band][:, None] ^ self._flips[band]).ravel()  # [Q * F]
                low = np.searchsorted(run.values[band], wanted, "left")
                counts = np.searchsorted(run.values[band], wanted, "right") - low  # [Q * F]
                which = np.repeat(np.arange(len(wanted)), counts)  # [C] the candidates' places in `wanted`
                inner = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
                found = run.order[band][low[which] + inner]  # [C] places in the run
                query = which // len(self._flips[band])
                apart = hamming(run.hashes[found], hashes[query])
                near = apart <= self._distance
                np.minimum.at(best, query[near], run.first + found[near])
        hit = best < np.iinfo(np.int64).max
        for run in self._runs:
            mine = hit & (best >= run.first) & (best < run.first + len(run.hashes))
            far[mine] = hamming(run.hashes[best[mine] - run.first], hashes[mine])
        return np.where(hit, best, -1), far

    def _values(self, hashes: np.ndarray) -> np.ndarray:
        """[N] -> the bands' values, uint32 [bands, N]"""
        return ((hashes >> self._shifts[:, None]) & self._value_masks[:, None]).astype(np.uint32)


class _Run:
    """Some hashes with consecutive numbers, sorted by each band."""

    def __init__(self, first: int, hashes: np.ndarray, values: np.ndarray) -> None:
        self.first, self.hashes = first, hashes
        self.order = np.argsort(values, axis=1, kind="stable").astype(np.int32)  # [bands, N]
        self.values = np.take_along_axis(values, self.order, axis=1)  # [bands, N]


def _flips(width: int, radius: int) -> np.ndarray:
    """All values of `width` bits of which at most `radius` are set, uint32."""
    chosen = [bits for count in range(radius + 1) for bits in combinations(range(width), count)]
    return np.array([sum(1 << bit for bit in bits) for bits in chosen], np.uint32)
