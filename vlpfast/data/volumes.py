"""Volumes as a modality: which part of each is shown is planned on the host, threads unpack no more slices than that, and the
resampling is done where the batch lies.

A view is a product of three rows of positions, one for each axis, in voxels of the stored volume (0 is the first one's centre).
Flips and the orientation only turn these rows round, so that an even grid on the stored voxels is an exact copy of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.data.frames import segment_frames, uniform_frames
from vlpfast.data.modality import Draws
from vlpfast.data.order import uniform
from vlpfast.data.pictures import DamagedBatch, DamagedSample
from vlpfast.data.volume_file import PERCENTILES, VolumeInfo, read_header, read_labels, read_slices
from vlpfast.types import UserError, VolumeSpec

_DRAW = 1 << 22  # of a sample's draws, those from here on belong to its volume: a view has scale, places, flips
_VIEW_DRAWS = 16
_EDGE = 1e-6  # voxels; a position this far beyond the outermost voxels still lies within
_IGNORED = -100  # label of what is padded


class View(NamedTuple):
    """What is shown of one volume. `positions` are D, H, W; `averaged`: so many voxels of each axis are made one first."""

    positions: tuple[np.ndarray, np.ndarray, np.ndarray]  # float64
    averaged: tuple[int, int, int]
    box: np.ndarray  # float32 [9], see Batch["volume_box"]


class _Axis(NamedTuple):
    """One axis of a view as it is computed: `taken` voxels are read, blocks of `averaged` made one, and these interpolated."""

    taken: np.ndarray  # int64
    averaged: int
    at: np.ndarray  # float64 [n] places in what remains of them
    inside: np.ndarray  # bool [n]


class _Cut(NamedTuple):
    """The voxels of one view, as stored, and how the view is made of them."""

    axes: tuple[_Axis, _Axis, _Axis]
    voxels: np.ndarray
    info: VolumeInfo


@dataclass
class _Batch:
    views: list[list[Future[Any]]]  # [B][view] Tensor, or _Cut where the device makes it
    labels: list[Future[np.ndarray]]


class VolumeModality:
    """Batch["volume"], ["volume_box"] and what else the spec asks for. See modality.Modality."""

    members = ("vol",)

    def __init__(self, spec: VolumeSpec, threads: int, batch_size: int, device: torch.device):
        _check(spec)
        self._spec, self._device = spec, device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vlpfast-volumes")
        self._submitted: deque[_Batch] = deque()

    def inspect(self, content: np.ndarray | None, record: dict[str, Any]) -> VolumeInfo:
        if content is None:
            raise DamagedSample("no volume (a member vol)")
        info = read_header(content)
        if self._spec.labels and not info.labels:
            raise DamagedSample("the volume has no label map")
        return info

    def submit(
        self, contents: list[np.ndarray], infos: list[VolumeInfo], records: list[dict[str, Any]], draws: Draws
    ) -> dict[str, Any]:
        views = plan_views(self._spec, infos, draws)  # [B][view]
        futures = [
            [self._pool.submit(self._view, content, info, view, number == 0) for number, view in enumerate(seen)]
            for content, info, seen in zip(contents, infos, views, strict=True)
        ]
        labels = []
        if self._spec.labels:
            shown = zip(contents, infos, views, strict=True)
            labels = [self._pool.submit(_labels, content, info, seen[0]) for content, info, seen in shown]
        self._submitted.append(_Batch(futures, labels))
        boxes = torch.from_numpy(np.stack([[view.box for view in seen] for seen in views]))  # [B, views, 9]
        fields = {"volume_box": boxes[:, 0].contiguous()}
        if boxes.shape[1] > 1:
            fields["volume_local_box"] = boxes[:, 1:].contiguous()
        if self._spec.slices:
            fields["volume_slices"] = torch.from_numpy(np.stack([seen[0].positions[0] for seen in views]).astype(np.int64))
        return fields

    def receive(self) -> dict[str, Tensor]:
        batch = self._submitted.popleft()
        reasons: dict[int, str] = {}
        rows: list[list[Tensor]] = []
        labels: list[np.ndarray] = []
        for position, futures in enumerate(batch.views):
            try:
                found = [future.result() for future in futures]
                labels += [batch.labels[position].result()] if batch.labels else []
            except DamagedSample as error:
                reasons[position] = str(error)
            else:
                rows.append([self._finish(made, v == 0) if isinstance(made, _Cut) else made for v, made in enumerate(found)])
        if reasons:
            raise DamagedBatch(reasons)
        fields = {"volume": torch.stack([row[0] for row in rows])}
        if len(rows[0]) > 1:
            fields["volume_local"] = torch.stack([torch.stack(row[1:]) for row in rows])
        if labels:
            fields["volume_labels"] = torch.from_numpy(np.stack(labels))
        return fields

    def reset(self) -> None:
        for batch in self._submitted:
            for future in [*batch.labels, *(future for futures in batch.views for future in futures)]:
                future.cancel()
        self._submitted.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _view(self, content: np.ndarray, info: VolumeInfo, view: View, main: bool) -> Tensor | _Cut:
        positions = list(view.positions)
        if main and self._spec.slices:
            around = np.arange(-self._spec.neighbours, self._spec.neighbours + 1)
            positions[0] = (positions[0][:, None] + around).ravel().clip(0, info.shape[0] - 1)  # [D * (2 n + 1)]
        axes = tuple(plan_axis(at, length, block) for at, length, block in zip(positions, info.shape, view.averaged, strict=True))
        cut = _Cut(axes, read_slices(content, info, *(axis.taken for axis in axes)), info)
        return cut if self._device.type == "cuda" else self._finish(cut, main)

    def _finish(self, cut: _Cut, main: bool) -> Tensor:
        """-> [C, D, H, W], or [D, C, H, W] of slices, float32 on the device"""
        stored = cut.voxels.astype(np.int32) if cut.voxels.dtype == np.uint16 else cut.voxels  # torch computes with none
        x = resample(torch.from_numpy(stored).to(self._device), cut.axes) * cut.info.slope + cut.info.intercept
        outside = torch.from_numpy(~_inside(cut.axes)).to(self._device)
        ranges = limits(self._spec, cut.info)
        channels = [((x - low) / (high - low)).clamp_(0, 1).masked_fill_(outside, 0.0) for low, high in ranges]
        if main and self._spec.slices:
            stacked = 2 * self._spec.neighbours + 1
            view = torch.stack([channel.unflatten(0, (-1, stacked)) for channel in channels], 1).flatten(1, 2)
            shape = (-1, 1, 1)
        else:
            view = torch.stack(channels)
            shape = (-1, 1, 1, 1)
        mean, std = (torch.tensor(values, device=self._device).view(shape) for values in (self._spec.mean, self._spec.std))
        return view.sub_(mean).div_(std)


# --- planning --------------------------------------------------------------------------------------------------------


def plan_views(spec: VolumeSpec, infos: list[VolumeInfo], draws: Draws) -> list[list[View]]:
    """For each volume its view, then in training the local ones."""
    sizes = [spec.size, *([spec.local_size] * (spec.local_views if draws.train else 0))]
    views = [_plan_view(spec, infos, draws, number, size) for number, size in enumerate(sizes)]
    return [list(seen) for seen in zip(*views, strict=True)]


def _plan_view(spec: VolumeSpec, infos: list[VolumeInfo], draws: Draws, number: int, size: list[int]) -> list[View]:
    """number: 0 is the view, the others are local."""
    shapes = np.array([info.shape for info in infos], np.float64)  # [B, 3]
    counts = np.array(size)
    regions = np.array([info.foreground if spec.foreground else (0, 0, 0, *info.shape) for info in infos])  # [B, 6]
    begin, room = regions[:, :3], regions[:, 3:]
    steps = np.ones_like(shapes)  # voxels of the volume to a voxel of the view
    if number == 0 and spec.fit == "resize":
        steps = room / counts
    elif spec.spacing:
        steps = np.array(spec.spacing) / np.array([info.spacing for info in infos])
    first = _DRAW + number * _VIEW_DRAWS
    u = uniform(draws.seed, draws.epoch, draws.index[:, None], first + np.arange(7))  # [B, 7]
    flipped = np.zeros(shapes.shape, bool)
    if draws.train:
        low, high = spec.scale
        steps = steps * (low + u[:, :1] * (high - low))
        flipped = u[:, 4:] < np.array(spec.flips)
    if spec.orientation == "LPS":
        flipped = flipped ^ np.array([False, True, True])
    extents = counts * steps  # [B, 3] voxels of the volume
    free = room - extents
    whole = np.abs(extents - np.rint(extents)) < _EDGE  # of these, the voxels of the view should be those of the volume
    place = np.where(free > 0, u[:, 1:4] if draws.train else 0.5, 0.5)
    offset = np.where(whole, np.floor(place * (np.rint(free) + (free > 0) * draws.train)), place * free)
    corner = begin + offset
    sliced = number == 0 and spec.slices
    if sliced:
        corner[:, 0], extents[:, 0] = begin[:, 0], room[:, 0]
        numbers = uniform_frames(room[:, 0], size[0])
        if draws.train:
            numbers = segment_frames(room[:, 0], draws.index, size[0], seed=draws.seed, epoch=draws.epoch)
    views = []
    for row in range(len(infos)):
        positions = [corner[row, axis] + (np.arange(size[axis]) + 0.5) * steps[row, axis] - 0.5 for axis in range(3)]
        positions = [_snapped(at) for at in positions]
        averaged = [max(1, math.floor(step + _EDGE)) if spec.antialias else 1 for step in steps[row]]
        if sliced:
            positions[0], averaged[0] = (begin[row, 0] + numbers[row]).astype(np.float64), 1
        positions = [at[::-1] if flip else at for at, flip in zip(positions, flipped[row], strict=True)]
        box = np.concatenate([corner[row] / shapes[row], extents[row] / shapes[row], flipped[row]]).astype(np.float32)
        views.append(View(tuple(positions), tuple(averaged), box))
    return views


def _snapped(positions: np.ndarray) -> np.ndarray:
    """Without the rounding that would make an interpolation of a copy."""
    nearest = np.rint(positions)
    return np.where(np.abs(positions - nearest) < _EDGE, nearest, positions)


def plan_axis(positions: np.ndarray, length: int, averaged: int) -> _Axis:
    """positions float64 [n] in voxels of an axis of `length` voxels, which goes on with its outermost ones on either side."""
    inside = (positions > -0.5 - _EDGE) & (positions < length - 0.5 + _EDGE)
    at = positions.clip(0, length - 1)
    if averaged == 1:
        low = np.floor(at).astype(np.int64)
        taken = np.unique(np.concatenate([low, np.ceil(at).astype(np.int64)]))
        return _Axis(taken, 1, np.searchsorted(taken, low) + (at - low), inside)
    middle = (averaged - 1) / 2
    first = math.floor(at.min() - middle)
    at = (at - middle - first) / averaged
    taken = first + np.arange((math.floor(at.max()) + 2) * averaged)
    return _Axis(taken.clip(0, length - 1), averaged, at, inside)


def limits(spec: VolumeSpec, info: VolumeInfo) -> list[tuple[float, float]]:
    """The values that become 0 and 1 in each channel."""
    if not spec.percentiles:
        return [(centre - width / 2, centre + width / 2) for centre, width in spec.windows]
    found = []
    for low, high in spec.percentiles:
        bottom, top = (info.percentiles[PERCENTILES.index(share)] for share in (low, high))
        found.append((bottom, top if top > bottom else bottom + 1.0))  # a volume of one value is at the floor
    return found


# --- voxels ------------------------------------------------------------------------------------------------------------


def resample(voxels: Tensor, axes: tuple[_Axis, _Axis, _Axis]) -> Tensor:
    """voxels [len(taken) of each axis] -> float32 [D, H, W]: blocks averaged, then linear along each axis (trilinear)."""
    x = voxels.float()
    averaged = tuple(axis.averaged for axis in axes)
    if max(averaged) > 1:
        x = F.avg_pool3d(x[None], averaged)[0]
    for dim, axis in enumerate(axes):
        low = np.floor(axis.at).astype(np.int64)
        share = axis.at - low
        lower = x.index_select(dim, torch.from_numpy(low).to(x.device))
        if share.any():
            upper = x.index_select(dim, torch.from_numpy(np.minimum(low + 1, x.shape[dim] - 1)).to(x.device))
            weight = torch.from_numpy(share.astype(np.float32)).to(x.device)
            lower = torch.lerp(lower, upper, weight.view([-1 if d == dim else 1 for d in range(3)]))
        x = lower
    return x


def _labels(content: np.ndarray, info: VolumeInfo, view: View) -> np.ndarray:
    """-> int64 [D, H, W]"""
    along = list(zip(view.positions, info.shape, strict=True))
    axes = [plan_axis(np.floor(at + 0.5), length, 1) for at, length in along]
    read = read_labels(content, info, *(axis.taken for axis in axes)).astype(np.int64)
    found = read[np.ix_(*(axis.at.astype(np.int64) for axis in axes))]
    return np.where(_inside([plan_axis(at, length, 1) for at, length in along]), found, _IGNORED)


def _inside(axes: Sequence[_Axis]) -> np.ndarray:
    """bool [D, H, W]"""
    d, h, w = (axis.inside for axis in axes)
    return d[:, None, None] & h[:, None] & w


def _check(spec: VolumeSpec) -> None:
    """Raises UserError."""
    if spec.fit not in ("crop", "resize"):
        raise UserError(f'fit: expected "crop" or "resize", got {spec.fit!r}')
    if spec.orientation not in ("RAS", "LPS"):
        raise UserError(f'orientation: expected "RAS" or "LPS", got {spec.orientation!r}')
    for name in ("size", "local_size"):
        value = getattr(spec, name)
        if len(value) != 3 or min(value) < 1:
            raise UserError(f"{name}: expected three numbers of voxels, at least 1, got {list(value)}")
    if spec.spacing and (len(spec.spacing) != 3 or not all(0 < length < math.inf for length in spec.spacing)):
        raise UserError(f"spacing: expected three lengths in mm, or none, got {list(spec.spacing)}")
    if spec.spacing and spec.fit == "resize" and not spec.local_views:
        raise UserError('spacing: nothing is taken at it with fit "resize" and without local views')
    if len(spec.scale) != 2 or not 0 < spec.scale[0] <= spec.scale[1] < math.inf:
        raise UserError(f"scale: expected two numbers, 0 < low <= high, got {list(spec.scale)}")
    if len(spec.flips) != 3 or not all(0 <= prob <= 1 for prob in spec.flips):
        raise UserError(f"flips: expected three probabilities, got {list(spec.flips)}")
    for window in spec.windows:
        if len(window) != 2 or not math.isfinite(window[0]) or not 0 < window[1] < math.inf:
            raise UserError(f"windows: expected [centre, width] with a positive width, got {list(window)}")
    for pair in spec.percentiles:
        if len(pair) != 2 or not pair[0] < pair[1] or not all(share in PERCENTILES for share in pair):
            known = ", ".join(f"{share:g}" for share in PERCENTILES)
            raise UserError(f"percentiles: expected [low, high] of {known}, got {list(pair)}")
    channels = len(spec.percentiles or spec.windows) * (2 * spec.neighbours + 1)
    if channels < 1 or spec.neighbours < 0 or (spec.neighbours and not spec.slices):
        raise UserError("a volume needs one of windows or percentiles, and neighbours >= 0, which are of slices")
    for name in ("mean", "std"):
        if len(getattr(spec, name)) not in (1, channels):
            raise UserError(f"{name}: expected one number, or {channels}, one for each channel, got {list(getattr(spec, name))}")
    if not all(std > 0 for std in spec.std):
        raise UserError(f"std: expected positive numbers, got {list(spec.std)}")
    if spec.slices and (spec.labels or spec.local_views):
        raise UserError("slices: labels and local views go with whole volumes")
    if spec.local_views < 0:
        raise UserError(f"local_views: expected at least 0, got {spec.local_views}")
