from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from vlpfast.data.hashing import HASHES, HammingIndex, hamming


def photo(seed: int, side: int = 256) -> Image.Image:
    """Something with low and high frequencies and colours, as photographs have."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    fine = np.random.default_rng(seed + 1).normal(0, 6, (side, side, 3))
    smooth = np.asarray(Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8))


def recompressed(picture: Image.Image) -> Image.Image:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=40)
    return Image.open(out)


@pytest.mark.parametrize("name", sorted(HASHES))
def test_what_hashes_withstand(name: str) -> None:
    changed = {
        "same": lambda p: p.copy(),
        "small": lambda p: p.resize((100, 90), Image.Resampling.BICUBIC),
        "compressed": recompressed,
        "blurred": lambda p: p.filter(ImageFilter.GaussianBlur(2)),
        "paler": lambda p: ImageEnhance.Contrast(p).enhance(0.8),
    }
    pictures = [photo(10 * seed) for seed in range(8)]
    hashes = np.array([HASHES[name](picture) for picture in pictures])
    assert hashes.dtype == np.uint64
    for kind, change in changed.items():
        again = np.array([HASHES[name](change(picture)) for picture in pictures])
        apart = hamming(hashes, again)
        assert apart.max() <= (0 if kind == "same" else 8), kind
    between = hamming(hashes[:, None], hashes)[np.triu_indices(8, 1)]
    assert between.min() >= 14 and 26 < between.mean() < 38
    mirrored = np.array([HASHES[name](picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for picture in pictures])
    assert hamming(hashes, mirrored).min() >= 14
    assert HASHES[name](Image.new("RGB", (50, 40), "red")) == HASHES[name](Image.new("L", (9, 9), 255)) == 0


def test_dhash_by_hand() -> None:
    rows = np.zeros((8, 9), np.uint8)
    rows[0] = np.arange(9)  # rises everywhere: bits 0 .. 7
    rows[7, 8] = 5  # rises at the end: bit 63
    rows[3] = np.arange(9)[::-1]  # falls: none
    assert HASHES["dhash"](Image.fromarray(rows)) == 0xFF | 1 << 63


def test_phash_is_the_cosine_transform() -> None:
    grey = np.asarray(photo(3).convert("L").resize((32, 32), Image.Resampling.BILINEAR), np.float64)
    n = np.arange(32)
    low = [
        [sum(grey[y, x] * np.cos(np.pi * u * (y + 0.5) / 32) * np.cos(np.pi * v * (x + 0.5) / 32) for y in n for x in n) / 16]
        for u in range(1, 9)
        for v in range(1, 9)
    ]
    bits = (np.ravel(low) > np.median(low)).tolist()
    assert HASHES["phash"](photo(3)) == sum(1 << i for i, bit in enumerate(bits) if bit)
    assert sum(bits) == 32


def test_hamming() -> None:
    a = np.array([0, 1, 2**64 - 1], np.uint64)
    assert hamming(a, np.array([0, 2, 0], np.uint64)).tolist() == [0, 2, 64]
    assert hamming(a[:, None], a).shape == (3, 3)


@pytest.mark.parametrize("distance", range(12))
def test_the_index_finds_what_a_search_through_all_finds(distance: int) -> None:
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 2**64, 40, dtype=np.uint64)

    def near(count: int) -> np.ndarray:
        hashes = centres[rng.integers(0, 40, count)]
        for row, flips in enumerate(rng.integers(0, 16, count)):
            for bit in rng.choice(64, flips, replace=False):
                hashes[row] ^= np.uint64(1) << np.uint64(bit)
        return hashes

    stored, queries = near(700), near(200)
    index = HammingIndex(distance)
    assert [part.tolist() for part in index.first_near(queries[:2])] == [[-1, -1], [-1, -1]]
    for part in np.array_split(stored, [1, 2, 5, 5, 60, 61, 300]):
        index.add(part)
    assert len(index) == 700
    apart = hamming(queries[:, None], stored)  # [200, 700]
    hit = (apart <= distance).any(1)
    first = np.where(hit, (apart <= distance).argmax(1), -1)
    found, far = index.first_near(queries)
    assert found.tolist() == first.tolist() and hit.any() and not hit.all()
    assert far.tolist() == np.where(hit, apart[np.arange(200), first], -1).tolist()


def test_distances_that_are_refused() -> None:
    for distance in (-1, 12):
        with pytest.raises(ValueError, match=rf"distance: expected 0 .. 11 bits, got {distance}"):
            HammingIndex(distance)
