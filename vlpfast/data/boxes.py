"""Boxes and masks of the objects in a picture, as they lie in its views."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from vlpfast.data.emojiworld import rle
from vlpfast.data.pictures import DamagedSample
from vlpfast.data.views import View
from vlpfast.types import ImageSpec


class Objects(NamedTuple):
    boxes: np.ndarray  # float64 [n, 4] x0, y0, x1, y1 in pixels of the stored picture
    masks: list[dict[str, Any]]  # n run lengths, whole ones of the picture's size; [] if none were asked for


def read_objects(spec: ImageSpec, record: dict[str, Any], size: tuple[int, int]) -> Objects:
    """record: the sample's JSON; size: width, height of the picture. Raises DamagedSample."""
    try:
        boxes = np.array(_lookup(record, spec.boxes))
    except (ValueError, OverflowError) as error:
        raise DamagedSample(f'boxes: expected lists of four numbers in the JSON field "{spec.boxes}"') from error
    boxes = boxes.reshape(0, 4) if boxes.shape == (0,) else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or (len(boxes) and boxes.dtype.kind not in "iuf"):
        raise DamagedSample(f'boxes: expected lists of four numbers in the JSON field "{spec.boxes}"')
    boxes = boxes.astype(np.float64)
    wrong = ~(np.isfinite(boxes).all(1) & (boxes[:, :2] <= boxes[:, 2:]).all(1))
    if wrong.any():
        raise DamagedSample(f"boxes: expected x0 <= x1 and y0 <= y1, got {boxes[wrong][0].tolist()}")
    if len(boxes) > spec.max_boxes:
        raise DamagedSample(f"boxes: {len(boxes)}, more than max_boxes: {spec.max_boxes}")
    masks = _read_masks(spec, record, size, len(boxes)) if spec.masks else []
    return Objects(boxes, masks)


def _read_masks(spec: ImageSpec, record: dict[str, Any], size: tuple[int, int], count: int) -> list[dict[str, Any]]:
    masks = _lookup(record, spec.masks)
    if not isinstance(masks, list) or len(masks) != count:
        got = len(masks) if isinstance(masks, list) else type(masks).__name__
        raise DamagedSample(f'masks: expected {count} in the JSON field "{spec.masks}", as many as boxes, got {got}')
    width, height = size
    read = []
    for i, mask in enumerate(masks):
        if not isinstance(mask, dict) or mask.get("size") != [height, width]:
            raise DamagedSample(f"masks: number {i} is not for a picture of {width} x {height} pixels")
        counts = mask.get("counts")
        # an exact type: True is an int too, and numpy would cut 1.5
        if not isinstance(counts, list) or not all(type(run) is int and 0 <= run <= height * width for run in counts):
            raise DamagedSample(f"masks: number {i} has no list of run lengths")
        if sum(counts) != height * width:
            raise DamagedSample(f"masks: the runs of number {i} fill {sum(counts)} of {height * width} pixels")
        read.append({"size": [height, width], "counts": np.array(counts, np.int64)})
    return read


def _lookup(record: dict[str, Any], path: str) -> Any:
    """The field `path` of the JSON; after a dot, the field of each object of a list."""
    value: Any = record
    try:
        for name in path.split("."):
            value = [item[name] for item in value] if isinstance(value, list) else value[name]
    except (KeyError, TypeError) as error:
        raise DamagedSample(f'the JSON has no field "{path}"') from error
    return value


def view_boxes(spec: ImageSpec, objects: list[Objects], view: View, warps: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """-> boxes float32 [B, max_boxes, 4] x0, y0, x1, y1 as fractions of the view, seen bool [B, max_boxes].

    What lies outside of the cut-out rectangle or of the view is not seen. Under a warp a box is the smallest upright one around
    what is seen of the warped box. Unseen ones and the padding are 0. warps: augment.warps.
    """
    batch, size = len(objects), view.size
    boxes = np.zeros((batch, spec.max_boxes, 4))
    for row, each in enumerate(objects):
        boxes[row, : len(each.boxes)] = each.boxes
    x0, y0, width, height = view.rectangles.astype(np.float64)[:, :, None, None].swapaxes(0, 1)  # each [B, 1, 1]
    at_x, at_y, shown_width, shown_height = view.places.astype(np.float64)[:, :, None, None].swapaxes(0, 1)
    x = (boxes[:, :, 0::2] - x0) * (shown_width / width) + at_x  # [B, N, 2] in pixels of the view
    y = (boxes[:, :, 1::2] - y0) * (shown_height / height) + at_y
    area = np.diff(x)[..., 0] * np.diff(y)[..., 0]  # [B, N]
    x, y = x.clip(at_x, at_x + shown_width), y.clip(at_y, at_y + shown_height)
    x = np.where(view.mirrored[:, None, None], size - x[:, :, ::-1], x)
    left = np.diff(x)[..., 0] * np.diff(y)[..., 0]
    moved = [row for row in range(batch) if any(not np.array_equal(warp[row], np.eye(2, 3)) for warp in warps)]
    for row in moved:
        for i in np.flatnonzero(left[row] > 0):
            polygon = np.array([[x[row, i, a], y[row, i, b]] for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))])  # [4, 2]
            for warp in warps:
                polygon = _cut(polygon @ warp[row, :, :2].T + warp[row, :, 2], size)
            left[row, i] = _area(polygon)
            if len(polygon):
                (x[row, i, 0], y[row, i, 0]), (x[row, i, 1], y[row, i, 1]) = polygon.min(0), polygon.max(0)
    share = np.divide(left, area, out=np.zeros_like(left), where=area > 0)
    seen = (share > 0) & (share >= spec.min_visible - 1e-9)  # a box that is wholly in view has share 1 but for rounding
    out = np.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1) / size
    return np.where(seen[..., None], out, 0).astype(np.float32), seen


def _cut(polygon: np.ndarray, size: int) -> np.ndarray:
    """What of a convex polygon [k, 2] lies in the square from 0 to size (Sutherland, Hodgman 1974)."""
    for axis, sign, border in ((0, 1, 0), (0, -1, -size), (1, 1, 0), (1, -1, -size)):
        depth = sign * polygon[:, axis] - border  # [k] >= 0 inside
        kept = []
        for k in range(len(polygon)):
            before, here = depth[k - 1], depth[k]
            if (before < 0) != (here < 0):
                kept.append(polygon[k - 1] + (polygon[k] - polygon[k - 1]) * (before / (before - here)))
            if here >= 0:
                kept.append(polygon[k])
        polygon = np.array(kept).reshape(-1, 2)
    return polygon


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return 0.5 * abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))))


def view_masks(spec: ImageSpec, objects: list[Objects], view: View) -> np.ndarray:
    """-> bool [B, max_boxes, S, S], by nearest neighbours, before any warp."""
    size = view.size
    masks = np.zeros((len(objects), spec.max_boxes, size, size), bool)
    for row, each in enumerate(objects):
        x0, y0, width, height = view.rectangles[row].tolist()
        left, top, shown_width, shown_height = view.places[row].tolist()
        columns = x0 + (2 * np.arange(shown_width) + 1) * width // (2 * shown_width)  # that holds the middle of the view's pixel
        rows = y0 + (2 * np.arange(shown_height) + 1) * height // (2 * shown_height)
        for i, mask in enumerate(each.masks):
            masks[row, i, top : top + shown_height, left : left + shown_width] = rle.decode(mask)[np.ix_(rows, columns)]
        if view.mirrored[row]:
            masks[row] = masks[row, :, :, ::-1]
    return masks
