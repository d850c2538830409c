"""Which part of each picture is shown: crops, padding and mirroring, decided on the host before a pixel is decoded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vlpfast.data.modality import Draws
from vlpfast.data.order import CROP, MIRROR, uniform
from vlpfast.types import ImageSpec, ViewSpec

_TRIES = 10  # of RandomResizedCrop, before it falls back to a centre crop
VIEW_DRAWS = 1 << 16  # draws that are set aside for each view of a sample


class View(NamedTuple):
    """What one view shows of each picture of a batch. The mirroring comes last, after the padding."""

    size: int  # pixels of a side
    rectangles: np.ndarray  # int32 [B, 4] x0, y0, width, height of what is cut out, in pixels of the stored picture
    places: np.ndarray  # int32 [B, 4] x0, y0, width, height of where that goes, in pixels of the view
    mirrored: np.ndarray  # bool [B]

    def crop(self, sizes: np.ndarray) -> np.ndarray:
        """sizes [B, 2] width, height of the stored pictures -> Batch["crop"]."""
        corner = self.rectangles[:, :2] - self.places[:, :2] * (self.rectangles[:, 2:] / self.places[:, 2:])
        extent = self.rectangles[:, 2:] * (self.size / self.places[:, 2:])
        return crop_fractions(np.column_stack([corner, extent]), self.mirrored, sizes)


def view_specs(spec: ImageSpec, train: bool) -> tuple[list[ViewSpec], list[ViewSpec]]:
    """The views of a picture, one entry each, and the local ones."""
    own = [ViewSpec(1, spec.scale, spec.ratio, spec.mirror, spec.augment)]
    if not train:
        return own, []
    return tuple([view for view in views for _ in range(view.count)] for views in (spec.views or own, spec.local_views))


def plan_view(spec: ImageSpec, view: ViewSpec, number: int, size: int, sizes: np.ndarray, draws: Draws) -> View:
    """number: of the view among all views of a picture. sizes [B, 2] width, height in pixels."""
    options = {"train": draws.train, "seed": draws.seed, "epoch": draws.epoch, "first": number * VIEW_DRAWS}
    rectangles, mirrored = view_rectangles(view, sizes, draws.index, **options)
    places = np.tile(np.array([0, 0, size, size], np.int32), (len(sizes), 1))
    if not (draws.train and spec.random_crop):
        if spec.resize == "crop":
            rectangles = centre_squares(sizes)
        else:
            rectangles = np.column_stack([np.zeros_like(sizes), sizes]).astype(np.int32)
        if spec.resize == "pad":
            shown = np.maximum(1, np.rint(sizes * (size / sizes.max(axis=1, keepdims=True))))  # [B, 2]
            places = np.column_stack([(size - shown) // 2, shown]).astype(np.int32)
    return View(size, rectangles, places, mirrored)


def view_rectangles(
    spec: ImageSpec | ViewSpec, sizes: np.ndarray, index: np.ndarray, *, train: bool, seed: int, epoch: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """sizes [B, 2] width, height in pixels; index [B] -> rectangles int32 [B, 4] x0, y0, width, height in pixels; mirrored
    bool [B].

    In training RandomResizedCrop and a flip with probability `spec.mirror`, a function of (seed, epoch, index) alone. In
    evaluation the largest square in the middle, which is what resizing the shorter side and cutting out the middle shows.
    first: added to the numbers of the draws.
    """
    sizes = sizes.astype(np.int64)
    if not train:
        return centre_squares(sizes), np.zeros(len(sizes), bool)
    mirrored = uniform(seed, epoch, index, first + MIRROR) < spec.mirror
    return random_resized_crop(spec, sizes, index, seed=seed, epoch=epoch, first=first).astype(np.int32), mirrored


def centre_squares(sizes: np.ndarray) -> np.ndarray:
    """sizes [B, 2] width, height -> int32 [B, 4] x0, y0, width, height of the largest square in the middle"""
    side = sizes.min(axis=1)
    return np.column_stack([(sizes - side[:, None]) // 2, side, side]).astype(np.int32)


def random_resized_crop(
    spec: ImageSpec | ViewSpec, sizes: np.ndarray, index: np.ndarray, *, seed: int, epoch: int, first: int = 0
) -> np.ndarray:
    """RandomResizedCrop (Szegedy et al. 2015, "Going deeper with convolutions"; the rule torchvision documents).

    Up to ten times: an area of `scale` times the picture's, an aspect ratio log-uniform in `ratio`; the first such box that
    fits goes to a uniformly drawn place. If none fits: the largest centred box whose aspect lies within `ratio`.

    sizes [B, 2] int64 width, height -> int64 [B, 4] x0, y0, width, height.
    """
    width, height = sizes.T  # [B]
    draws = first + CROP + np.arange(4 * _TRIES).reshape(_TRIES, 4)
    u = uniform(seed, epoch, index[:, None, None], draws)  # [B, tries, 4]
    area = (width * height)[:, None] * (spec.scale[0] + u[..., 0] * (spec.scale[1] - spec.scale[0]))  # [B, tries]
    low, high = np.log(spec.ratio[0]), np.log(spec.ratio[1])
    aspect = np.exp(low + u[..., 1] * (high - low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # [B, tries]
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    taken = fits.argmax(axis=1)  # [B]
    rows = np.arange(len(sizes))
    w, h = w[rows, taken].astype(np.int64), h[rows, taken].astype(np.int64)
    none = ~fits[rows, taken]
    fallback_w = np.clip(np.rint(height * spec.ratio[1]).astype(np.int64), 1, width)
    fallback_h = np.clip(np.rint(width / spec.ratio[0]).astype(np.int64), 1, height)
    w, h = np.where(none, fallback_w, w), np.where(none, fallback_h, h)
    place = u[rows, taken, 2:]  # [B, 2]
    x0 = np.where(none, (width - w) // 2, (place[:, 0] * (width - w + 1)).astype(np.int64))
    y0 = np.where(none, (height - h) // 2, (place[:, 1] * (height - h + 1)).astype(np.int64))
    return np.column_stack([x0, y0, w, h])


def fill_level(spec: ImageSpec) -> list[int]:
    """The 8-bit RGB level around a padded picture: the nearest to the mean that pixels are normalised with."""
    return [int(np.clip(np.rint(255 * value), 0, 255)) for value in spec.mean]


def hull(views: list[View]) -> np.ndarray:
    """-> int32 [B, 4] x0, y0, width, height of the smallest rectangle around what all views show"""
    corner = np.min([view.rectangles[:, :2] for view in views], 0)
    end = np.max([view.rectangles[:, :2] + view.rectangles[:, 2:] for view in views], 0)
    return np.column_stack([corner, end - corner])


def crop_fractions(rectangles: np.ndarray, mirrored: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """-> float32 [B, 5]: x0, y0, width, height as fractions of the stored picture, then 1 if mirrored (Batch["crop"])."""
    return np.column_stack([rectangles / np.tile(sizes, 2), mirrored]).astype(np.float32)
