"""Pixels by PIL in a pool of threads: where DALI is not installed, and what DALI's batches are checked against."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlpfast.data.pictures import DamagedBatch, DamagedSample, decode_rgb
from vlpfast.types import ImageSpec

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class PlainDecoder:
    """submit() starts the work on a batch, receive() hands out the oldest one: [B, 3, size, size] float32, normalised."""

    def __init__(self, spec: ImageSpec, threads: int):
        self._size = spec.size
        self._filter = _FILTERS[spec.interpolation]
        self._mean = torch.tensor(spec.mean).view(1, 3, 1, 1) * 255
        self._inverse_std = 1 / (torch.tensor(spec.std).view(1, 3, 1, 1) * 255)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vlpfast-plain")
        self._submitted: deque[list[Future[np.ndarray]]] = deque()

    def submit(self, pictures: list[np.ndarray], rectangles: np.ndarray, mirrored: np.ndarray) -> None:
        """pictures: encoded bytes; rectangles int32 [B, 4] x0, y0, width, height; mirrored bool [B]."""
        views = zip(pictures, rectangles.tolist(), mirrored.tolist(), strict=True)
        self._submitted.append([self._pool.submit(self._pixels, *view) for view in views])

    def receive(self) -> Tensor:
        """Raises DamagedBatch."""
        rows: list[np.ndarray] = []
        reasons: dict[int, str] = {}
        for position, future in enumerate(self._submitted.popleft()):
            try:
                rows.append(future.result())
            except DamagedSample as error:
                reasons[position] = str(error)
        if reasons:
            raise DamagedBatch(reasons)
        pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)  # [B, 3, size, size]
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(self._mean).mul_(self._inverse_std)

    def reset(self) -> None:
        """Forgets what was submitted."""
        for futures in self._submitted:
            for future in futures:
                future.cancel()
        self._submitted.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _pixels(self, picture: np.ndarray, rectangle: list[int], mirrored: bool) -> np.ndarray:
        """-> uint8 [size, size, 3]"""
        view = decode_rgb(picture.tobytes(), tuple(rectangle)).resize((self._size, self._size), self._filter)
        pixels = np.asarray(view)
        return pixels[:, ::-1] if mirrored else pixels
