"""Pictures as a modality: what is seen of each is planned here, pixels come from a decoder (dali.py or plain.py)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlpfast.data.modality import Draws
from vlpfast.data.pictures import DamagedSample, picture_size
from vlpfast.data.shards import IMAGE_EXTENSIONS
from vlpfast.data.views import crop_fractions, view_rectangles
from vlpfast.types import ImageSpec, UserError


class ImageModality:
    """Batch["image"], and Batch["crop"] beside it. See modality.Modality. backend: "dali" or "plain"."""

    members = IMAGE_EXTENSIONS

    def __init__(self, spec: ImageSpec, threads: int, batch_size: int, device: torch.device, backend: str):
        _check(spec)
        self._spec, self._threads, self._batch_size, self._device, self._backend = spec, threads, batch_size, device, backend
        self._decoder = None

    def inspect(self, content: np.ndarray | None, record: dict[str, Any]) -> tuple[int, int]:
        """-> width, height in pixels"""
        if content is None:
            raise DamagedSample(f"no picture (a member {', '.join(IMAGE_EXTENSIONS)})")
        return picture_size(content.tobytes())

    def submit(self, contents: list[np.ndarray], infos: list[Any], records: list[dict[str, Any]], draws: Draws) -> dict[str, Any]:
        if self._decoder is None:
            self._decoder = self._make_decoder()
        sizes = np.array(infos)
        rectangles, mirrored = view_rectangles(
            self._spec, sizes, draws.index, train=draws.train, seed=draws.seed, epoch=draws.epoch
        )
        self._decoder.submit(contents, rectangles, mirrored)
        return {"crop": torch.from_numpy(crop_fractions(rectangles, mirrored, sizes))}

    def receive(self) -> dict[str, Tensor]:
        return {"image": self._decoder.receive()}

    def reset(self) -> None:
        self._decoder.reset()

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()

    def _make_decoder(self):
        if self._backend == "dali":
            dali = importlib.import_module("vlpfast.data.dali")
            return dali.DaliDecoder(self._spec, self._threads, self._batch_size, self._device)
        plain = importlib.import_module("vlpfast.data.plain")
        return plain.PlainDecoder(self._spec, self._threads)


def _check(spec: ImageSpec) -> None:
    if spec.interpolation not in ("bicubic", "bilinear"):
        raise UserError(f'interpolation: expected "bicubic" or "bilinear", got {spec.interpolation!r}')
    if spec.size < 1:
        raise UserError(f"size: expected at least 1 pixel, got {spec.size}")
    for name, (low, high) in (("scale", spec.scale), ("ratio", spec.ratio)):
        if not 0 < low <= high:
            raise UserError(f"{name}: expected two numbers, 0 < low <= high, got {[low, high]}")
