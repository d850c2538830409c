"""Which part of each picture is shown: crops and mirroring, decided on the host before a pixel is decoded."""

from __future__ import annotations

import numpy as np

from vlpfast.data.order import CROP, MIRROR, uniform
from vlpfast.types import ImageSpec

_TRIES = 10  # of RandomResizedCrop, before it falls back to a centre crop


def view_rectangles(
    spec: ImageSpec, sizes: np.ndarray, index: np.ndarray, *, train: bool, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """sizes [B, 2] width, height in pixels; index [B] -> rectangles int32 [B, 4] x0, y0, width, height in pixels; mirrored
    bool [B].

    In training RandomResizedCrop and a flip with probability `spec.mirror`, a function of (seed, epoch, index) alone. In
    evaluation the largest square in the middle, which is what resizing the shorter side and cutting out the middle shows.
    """
    sizes = sizes.astype(np.int64)
    if not train:
        side = sizes.min(axis=1)
        corner = (sizes - side[:, None]) // 2
        return np.column_stack([corner, side, side]).astype(np.int32), np.zeros(len(sizes), bool)
    mirrored = uniform(seed, epoch, index, MIRROR) < spec.mirror
    return random_resized_crop(spec, sizes, index, seed=seed, epoch=epoch).astype(np.int32), mirrored


def random_resized_crop(spec: ImageSpec, sizes: np.ndarray, index: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """RandomResizedCrop (Szegedy et al. 2015, "Going deeper with convolutions"; the rule torchvision documents).

    Up to ten times: an area of `scale` times the picture's, an aspect ratio log-uniform in `ratio`; the first such box that
    fits goes to a uniformly drawn place. If none fits: the largest centred box whose aspect lies within `ratio`.

    sizes [B, 2] int64 width, height -> int64 [B, 4] x0, y0, width, height.
    """
    width, height = sizes.T  # [B]
    draws = CROP + np.arange(4 * _TRIES).reshape(_TRIES, 4)
    u = uniform(seed, epoch, index[:, None, None], draws)  # [B, tries, 4]
    area = (width * height)[:, None] * (spec.scale[0] + u[..., 0] * (spec.scale[1] - spec.scale[0]))  # [B, tries]
    low, high = np.log(spec.ratio[0]), np.log(spec.ratio[1])
    aspect = np.exp(low + u[..., 1] * (high - low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # [B, tries]
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    first = fits.argmax(axis=1)  # [B]
    rows = np.arange(len(sizes))
    w, h = w[rows, first].astype(np.int64), h[rows, first].astype(np.int64)
    none = ~fits[rows, first]
    fallback_w = np.clip(np.rint(height * spec.ratio[1]).astype(np.int64), 1, width)
    fallback_h = np.clip(np.rint(width / spec.ratio[0]).astype(np.int64), 1, height)
    w, h = np.where(none, fallback_w, w), np.where(none, fallback_h, h)
    place = u[rows, first, 2:]  # [B, 2]
    x0 = np.where(none, (width - w) // 2, (place[:, 0] * (width - w + 1)).astype(np.int64))
    y0 = np.where(none, (height - h) // 2, (place[:, 1] * (height - h + 1)).astype(np.int64))
    return np.column_stack([x0, y0, w, h])


def crop_fractions(rectangles: np.ndarray, mirrored: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """-> float32 [B, 5]: x0, y0, width, height as fractions of the stored picture, then 1 if mirrored (Batch["crop"])."""
    return np.column_stack([rectangles / np.tile(sizes, 2), mirrored]).astype(np.float32)
