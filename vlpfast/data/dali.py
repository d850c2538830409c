"""Pixels by NVIDIA DALI: decoding of the crop alone, resizing, mirroring and normalising in native threads or on the GPU.

On the CPU decoding equals PIL's bit for bit, and the resized pixels lie within 2 of 255 levels of PIL's, 0.2 on average. They lie
further apart, up to some 10 levels, where PIL clips the overshoot of its first pass (black and white patterns under bicubic), and
along the border of a picture that is shrunk: beyond it DALI repeats the last pixel, PIL's filter ends there.
On a GPU nvJPEG decodes, whose rounding differs by a few levels more.
"""

from __future__ import annotations

import io
from collections import deque

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from vlpfast.data.pictures import DamagedBatch, DamagedSample, decode_rgb
from vlpfast.types import ImageSpec

_INTERPOLATION = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}


@pipeline_def(exec_dynamic=True)  # this execution model leaves outputs that are still referred to alone
def _pipeline(spec: ImageSpec, device: str):
    pictures = fn.external_source(name="pictures")
    corner = fn.external_source(name="corner")
    shape = fn.external_source(name="shape")
    mirrored = fn.external_source(name="mirrored")
    image = fn.decoders.image_slice(
        pictures,
        corner,
        shape,
        axis_names="WH",
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    image = fn.resize(image, size=[spec.size, spec.size], interp_type=_INTERPOLATION[spec.interpolation], antialias=True)
    return fn.crop_mirror_normalize(
        image,
        mirror=mirrored,
        mean=[255 * value for value in spec.mean],
        std=[255 * value for value in spec.std],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


class DaliDecoder:
    """submit() starts the work on a batch, receive() hands out the oldest one: [B, 3, size, size] float32, normalised.

    On a GPU the batch stays there, and receive() works on the current stream.
    """

    def __init__(self, spec: ImageSpec, threads: int, batch_size: int, device: torch.device):
        self._gpu = device.type == "cuda"
        self._options = {
            "spec": spec,
            "device": "mixed" if self._gpu else "cpu",
            "batch_size": batch_size,
            "num_threads": threads,
            "device_id": device.index if self._gpu else None,
            "prefetch_queue_depth": 1,  # with more, the first schedule_run() wants that many batches; batches queue up either way
        }
        self._submitted: deque[tuple[list[np.ndarray], np.ndarray, np.ndarray]] = deque()
        self._start()

    def submit(self, pictures: list[np.ndarray], rectangles: np.ndarray, mirrored: np.ndarray) -> None:
        """pictures: encoded bytes; rectangles int32 [B, 4] x0, y0, width, height; mirrored bool [B]."""
        pictures = [picture if _is_known(picture) else _as_bitmap(picture) for picture in pictures]
        self._submitted.append((pictures, rectangles, mirrored))
        self._feed(*self._submitted[-1])

    def receive(self) -> Tensor:
        """Raises DamagedBatch."""
        try:
            return self._receive()
        except RuntimeError:
            # DALI does not say which sample it was, and the pipeline is dead. PIL's verdict counts: what it decodes is given to
            # DALI decoded. The whole batch is, so that the same samples always make the same pixels.
            pictures, rectangles, mirrored = self._submitted[0]
            bitmaps, reasons = [], {}
            for position, picture in enumerate(pictures):
                try:
                    bitmaps.append(_bitmap(picture))
                except DamagedSample as error:
                    reasons[position] = str(error)
            if reasons:
                raise DamagedBatch(reasons) from None
            self._submitted[0] = bitmaps, rectangles, mirrored
            self._start()
            return self._receive()

    def reset(self) -> None:
        """Forgets what was submitted."""
        self._submitted.clear()
        self._start()

    def close(self) -> None:
        self._submitted.clear()
        self._pipeline = None

    def _start(self) -> None:
        self._pipeline = _pipeline(**self._options)
        self._pipeline.build()
        for batch in self._submitted:
            self._feed(*batch)

    def _feed(self, pictures: list[np.ndarray], rectangles: np.ndarray, mirrored: np.ndarray) -> None:
        self._pipeline.feed_input("pictures", pictures)
        self._pipeline.feed_input("corner", np.ascontiguousarray(rectangles[:, :2]))
        self._pipeline.feed_input("shape", np.ascontiguousarray(rectangles[:, 2:]))
        self._pipeline.feed_input("mirrored", mirrored.astype(np.int32))
        self._pipeline.schedule_run()

    def _receive(self) -> Tensor:
        (images,) = self._pipeline.share_outputs()  # waits for the batch
        image = torch.from_dlpack(images.as_tensor())
        if self._gpu:
            # DALI takes its buffer back when the last reference goes, which says nothing of work still queued on torch's streams.
            image = image.clone()
            torch.cuda.current_stream(image.device).synchronize()
        self._pipeline.release_outputs()
        self._submitted.popleft()
        return image


def _is_known(picture: np.ndarray) -> bool:
    """A format that DALI decodes and PIL too: JPEG, PNG, BMP, WebP. (A GIF under another name, say, is not.)"""
    return picture[:12].tobytes().startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF"))


def _bitmap(picture: np.ndarray) -> np.ndarray:
    """The same picture without compression: an encoding that holds what PIL decoded. Raises DamagedSample."""
    stream = io.BytesIO()
    decode_rgb(picture.tobytes()).save(stream, "BMP")
    return np.frombuffer(stream.getvalue(), np.uint8)


def _as_bitmap(picture: np.ndarray) -> np.ndarray:
    try:
        return _bitmap(picture)
    except DamagedSample:
        return picture  # receive() finds it again, with all others of its batch
