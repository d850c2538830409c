"""Pixels by PIL in a pool of threads: where DALI is not installed, and what DALI's batches are checked against."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlpfast.data.pictures import decode_rgb, results
from vlpfast.data.views import View, fill_level, hull
from vlpfast.types import ImageSpec

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class PlainDecoder:
    """submit() starts the work on a batch, receive() hands out the oldest one: for each view [B, 3, size, size], float32 and
    normalised, or uint8 if `normalize` is off."""

    def __init__(self, spec: ImageSpec, threads: int, *, normalize: bool):
        self._filter = _FILTERS[spec.interpolation]
        self._fill = tuple(fill_level(spec))
        self._normalize = normalize
        self._mean = torch.tensor(spec.mean).view(1, 3, 1, 1) * 255
        self._inverse_std = 1 / (torch.tensor(spec.std).view(1, 3, 1, 1) * 255)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vlpfast-plain")
        self._submitted: deque[list[Future[list[np.ndarray]]]] = deque()

    def submit(self, pictures: list[np.ndarray], views: list[View]) -> None:
        """pictures: encoded bytes."""
        around = hull(views).tolist()
        self._submitted.append(
            [self._pool.submit(self._pixels, picture, around[row], views, row) for row, picture in enumerate(pictures)]
        )

    def receive(self) -> list[Tensor]:
        """Raises DamagedBatch."""
        rows = results(self._submitted.popleft())
        return [self._finish(np.stack(view)) for view in zip(*rows, strict=True)]

    def reset(self) -> None:
        """Forgets what was submitted."""
        for futures in self._submitted:
            for future in futures:
                future.cancel()
        self._submitted.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self, pixels: np.ndarray) -> Tensor:
        view = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # [B, 3, size, size]
        if not self._normalize:
            return view.contiguous()
        return view.to(torch.float32, memory_format=torch.contiguous_format).sub_(self._mean).mul_(self._inverse_std)

    def _pixels(self, picture: np.ndarray, around: list[int], views: list[View], row: int) -> list[np.ndarray]:
        """-> for each view uint8 [size, size, 3]"""
        image = decode_rgb(picture.tobytes(), tuple(around))
        seen = []
        for view in views:
            x0, y0, width, height = view.rectangles[row].tolist()
            left, top = x0 - around[0], y0 - around[1]
            at_x, at_y, shown_width, shown_height = view.places[row].tolist()
            shown = image.crop((left, top, left + width, top + height)).resize((shown_width, shown_height), self._filter)
            if (shown_width, shown_height) != (view.size, view.size):
                canvas = Image.new("RGB", (view.size, view.size), self._fill)
                canvas.paste(shown, (at_x, at_y))
                shown = canvas
            pixels = np.asarray(shown)
            seen.append(pixels[:, ::-1] if view.mirrored[row] else pixels)
        return seen
