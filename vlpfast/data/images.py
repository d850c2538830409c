"""Pictures as a modality: what is seen of each is planned here, pixels come from a decoder (dali.py or plain.py), colours and
warps from augment.py, boxes and masks from boxes.py."""

from __future__ import annotations

import importlib
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlpfast.data import augment
from vlpfast.data.boxes import Objects, read_objects, view_boxes, view_masks
from vlpfast.data.modality import Draws
from vlpfast.data.pictures import DamagedBatch, DamagedSample, picture_size
from vlpfast.data.shards import IMAGE_EXTENSIONS
from vlpfast.data.views import VIEW_DRAWS, View, plan_view, view_specs
from vlpfast.types import ImageSpec, UserError, ViewSpec

PICTURE_DRAWS = 1 << 48  # picture p of sample i draws what sample i + p * this would


class _Info(NamedTuple):
    sizes: list[tuple[int, int]]  # width, height in pixels of each picture
    objects: Objects | None


class _Submitted(NamedTuple):
    """What is known of a batch before its pixels are there. The views come first in the lists, then the local ones."""

    views: int  # how many are not local
    steps: list[list[augment.Step]]
    boxes: dict[str, Tensor]


class ImageModality:
    """Batch["image"], ["crop"] and what else the spec asks for. See modality.Modality. backend: "dali" or "plain"."""

    members = IMAGE_EXTENSIONS

    def __init__(self, spec: ImageSpec, threads: int, batch_size: int, device: torch.device, backend: str):
        _check(spec)
        if spec.pictures > 1:
            self.groups = tuple(tuple(f"{p}.{extension}" for extension in IMAGE_EXTENSIONS) for p in range(spec.pictures))
            self.members = self.groups[0]
        self._spec, self._threads, self._device, self._backend = spec, threads, device, backend
        self._batch_size = batch_size * spec.pictures
        self._submitted: deque[_Submitted] = deque()
        self._decoder = None

    def inspect(self, content: np.ndarray | list[np.ndarray | None] | None, record: dict[str, Any]) -> _Info:
        pictures = content if self._spec.pictures > 1 else [content]
        sizes = []
        for number, picture in enumerate(pictures):
            if picture is None:
                members = self.groups[number] if self._spec.pictures > 1 else IMAGE_EXTENSIONS
                raise DamagedSample(f"no picture (a member {', '.join(members)})")
            try:
                sizes.append(picture_size(picture.tobytes()))
            except DamagedSample as error:
                raise DamagedSample(self._of_picture(number, str(error))) from error
        return _Info(sizes, read_objects(self._spec, record, sizes[0]) if self._spec.boxes else None)

    def _of_picture(self, number: int, reason: str) -> str:
        return f"picture {number}: {reason}" if self._spec.pictures > 1 else reason

    def submit(self, contents: list[Any], infos: list[_Info], records: list[dict[str, Any]], draws: Draws) -> dict[str, Any]:
        sizes = np.array([size for info in infos for size in info.sizes], np.int64)  # [B * pictures, 2]
        if self._spec.pictures > 1:  # all are decoded as if each were a sample
            contents = [picture for pictures in contents for picture in pictures]
            index = draws.index[:, None] + np.arange(self._spec.pictures) * PICTURE_DRAWS  # [B, pictures]
            draws = draws._replace(index=index.ravel())
        plain, local = view_specs(self._spec, draws.train)
        pixels = [self._spec.size] * len(plain) + [self._spec.local_size] * len(local)
        views, steps = [], []
        for number, (view, size) in enumerate(zip(plain + local, pixels, strict=True)):
            views.append(plan_view(self._spec, view, number, size, sizes, draws))
            steps.append(augment.draw_steps(view.augment, size, draws, number * VIEW_DRAWS) if draws.train else [])
        if self._decoder is None:
            self._augments = draws.train and not all(augment.is_empty(view.augment) for view in plain + local)
            self._decoder = self._make_decoder(
                pixels, padded=self._spec.resize == "pad" and not (draws.train and self._spec.random_crop)
            )
        self._decoder.submit(contents, views)
        boxes = self._boxes(views[: len(plain)], steps, infos) if self._spec.boxes else {}
        self._submitted.append(_Submitted(len(plain), steps, boxes))
        crops = [torch.from_numpy(view.crop(sizes)) for view in views]
        fields = {"crop": _joined(crops[: len(plain)])}
        if local:
            fields["crop_local"] = torch.stack(crops[len(plain) :], 1)
        if draws.train and any(view.augment.rand_augment is not None for view in plain):
            warps = [augment.total_warp(todo, len(sizes), self._spec.size) for todo in steps[: len(plain)]]
            fields["warp"] = _joined([torch.from_numpy(warp) for warp in warps])
        return self._divided(fields)

    def receive(self) -> dict[str, Tensor]:
        try:
            views = self._decoder.receive()
        except DamagedBatch as error:
            pictures = self._spec.pictures
            reasons = {}
            for place, reason in sorted(error.reasons.items(), reverse=True):  # the first picture's has the last word
                reasons[place // pictures] = self._of_picture(place % pictures, reason)
            raise DamagedBatch(reasons) from error
        plain, steps, fields = self._submitted.popleft()
        if self._augments:
            views = [
                self._normalize(augment.apply_steps(view.to(self._device), todo)) for view, todo in zip(views, steps, strict=True)
            ]
        fields["image"] = _joined(views[:plain])
        if views[plain:]:
            fields["image_local"] = torch.stack(views[plain:], 1)
        if "masks" in fields:
            masks = fields["masks"].to(self._device)  # [B, V, N, S, S]
            warped = [augment.warp_masks(masks[:, v], steps[v]) for v in range(plain)]
            fields["masks"] = _joined(warped)
        return self._divided(fields)

    def _divided(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """[B * pictures, ...] -> [B, pictures, ...]"""
        pictures = self._spec.pictures
        return {name: value.unflatten(0, (-1, pictures)) for name, value in fields.items()} if pictures > 1 else fields

    def reset(self) -> None:
        self._submitted.clear()
        if self._decoder is not None:
            self._decoder.reset()

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()

    def _make_decoder(self, sizes: list[int], *, padded: bool):
        if self._backend == "dali":
            dali = importlib.import_module("vlpfast.data.dali")
            return dali.DaliDecoder(
                self._spec,
                self._threads,
                self._batch_size,
                self._device,
                sizes=sizes,
                padded=padded,
                normalize=not self._augments,
            )
        plain = importlib.import_module("vlpfast.data.plain")
        return plain.PlainDecoder(self._spec, self._threads, normalize=not self._augments)

    def _normalize(self, view: Tensor) -> Tensor:
        """view [B, 3, S, S] in [0, 1], in place"""
        mean, std = (torch.tensor(value, device=view.device)[:, None, None] for value in (self._spec.mean, self._spec.std))
        return view.sub_(mean).div_(std)

    def _boxes(self, views: list[View], steps: list[list[augment.Step]], infos: list[_Info]) -> dict[str, Tensor]:
        objects = [info.objects for info in infos]
        found = [
            view_boxes(self._spec, objects, view, augment.warps(todo, len(objects)))
            for view, todo in zip(views, steps, strict=False)
        ]
        boxes, seen = ([torch.from_numpy(part) for part in parts] for parts in zip(*found, strict=True))
        fields = {"boxes": _joined(boxes), "box_mask": _joined(seen)}
        if self._spec.masks:
            fields["masks"] = torch.stack([torch.from_numpy(view_masks(self._spec, objects, view)) for view in views], 1)
        return fields


def _joined(views: list[Tensor]) -> Tensor:
    """One view as it is, several stacked behind the batch."""
    return views[0] if len(views) == 1 else torch.stack(views, 1)


def _check(spec: ImageSpec) -> None:
    """Raises UserError."""
    if spec.interpolation not in ("bicubic", "bilinear"):
        raise UserError(f'interpolation: expected "bicubic" or "bilinear", got {spec.interpolation!r}')
    if spec.resize not in ("crop", "squash", "pad"):
        raise UserError(f'resize: expected "crop", "squash" or "pad", got {spec.resize!r}')
    for name in ("size", "local_size"):
        if getattr(spec, name) < 1:
            raise UserError(f"{name}: expected at least 1 pixel, got {getattr(spec, name)}")
    own = ViewSpec(1, spec.scale, spec.ratio, spec.mirror, spec.augment)
    named = [("", own, spec.size), *((f"views[{i}].", view, spec.size) for i, view in enumerate(spec.views))]
    named += [(f"local_views[{i}].", view, spec.local_size) for i, view in enumerate(spec.local_views)]
    for place, view, size in named:
        try:
            _check_view(view, size)
        except UserError as error:
            raise UserError(f"{place}{error}") from None
    if spec.masks and not spec.boxes:
        raise UserError(f"masks: {spec.masks!r} needs boxes, the field that says which objects there are")
    if spec.boxes and spec.max_boxes < 1:
        raise UserError(f"max_boxes: expected at least 1, got {spec.max_boxes}")
    if spec.pictures < 1:
        raise UserError(f"pictures: expected at least 1, got {spec.pictures}")
    if spec.pictures > 1 and spec.boxes:
        raise UserError("boxes: of several pictures, expected none: the JSON does not say which picture they are in")
    if not 0 <= spec.min_visible <= 1:
        raise UserError(f"min_visible: expected a share, 0 to 1, got {spec.min_visible}")


def _check_view(view: ViewSpec, size: int) -> None:
    if view.count < 1:
        raise UserError(f"count: expected at least 1, got {view.count}")
    for name, value in (("scale", view.scale), ("ratio", view.ratio)):
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise UserError(f"{name}: expected two numbers, 0 < low <= high, got {list(value)}")
    if not 0 <= view.mirror <= 1:
        raise UserError(f"mirror: expected a probability, got {view.mirror}")
    augment.check(view.augment, size)
