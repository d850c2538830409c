"""Pixels by NVIDIA DALI: decoding of what the views show, cutting, resizing, padding, mirroring and normalising in native threads
or on the GPU.

On the CPU decoding equals PIL's bit for bit, and the resized pixels lie within 2 of 255 levels of PIL's, 0.2 on average. They lie
further apart, up to some 10 levels, where PIL clips the overshoot of its first pass (black and white patterns under bicubic), and
along the border of a picture that is shrunk: beyond it DALI repeats the last pixel, PIL's filter ends there. In a padded view
that border lies inside.
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
from vlpfast.data.views import View, fill_level, hull
from vlpfast.types import ImageSpec

_INTERPOLATION = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}


@pipeline_def(exec_dynamic=True)  # this execution model leaves outputs that are still referred to alone
def _pipeline(spec: ImageSpec, device: str, sizes: list[int], padded: bool, normalize: bool):
    pictures = fn.external_source(name="pictures")
    corner = fn.external_source(name="corner")
    shape = fn.external_source(name="shape")
    decoded = fn.decoders.image_slice(
        pictures,
        corner,
        shape,
        axis_names="WH",
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    views = []
    for number, size in enumerate(sizes):
        image = decoded
        if len(sizes) > 1:
            start, extent = fn.external_source(name=f"start{number}"), fn.external_source(name=f"extent{number}")
            image = fn.slice(image, start=start, shape=extent, axis_names="WH")
        shown = fn.external_source(name=f"shown{number}") if padded else [size, size]
        image = fn.resize(image, size=shown, interp_type=_INTERPOLATION[spec.interpolation], antialias=True)
        if padded:
            before = fn.external_source(name=f"before{number}")
            image = fn.slice(
                image,
                start=before,
                shape=[size, size],
                axis_names="WH",
                out_of_bounds_policy="pad",
                fill_values=fill_level(spec),
            )
        image = fn.crop_mirror_normalize(
            image,
            mirror=fn.external_source(name=f"mirrored{number}"),
            mean=[255 * value for value in spec.mean] if normalize else [0.0],
            std=[255 * value for value in spec.std] if normalize else [1.0],
            dtype=types.FLOAT if normalize else types.UINT8,
            output_layout="CHW",
        )
        views.append(image)
    return tuple(views)


class DaliDecoder:
    """submit() starts the work on a batch, receive() hands out the oldest one: for each view [B, 3, size, size], float32 and
    normalised, or uint8 if `normalize` is off.

    sizes: of the views; padded: they leave a border around the pictures. On a GPU the batch stays there, and receive() works on
    the current stream.
    """

    def __init__(
        self,
        spec: ImageSpec,
        threads: int,
        batch_size: int,
        device: torch.device,
        *,
        sizes: list[int],
        padded: bool,
        normalize: bool,
    ):
        self._gpu = device.type == "cuda"
        self._padded = padded
        self._options = {
            "spec": spec,
            "device": "mixed" if self._gpu else "cpu",
            "sizes": sizes,
            "padded": padded,
            "normalize": normalize,
            "batch_size": batch_size,
            "num_threads": threads,
            "device_id": device.index if self._gpu else None,
            "prefetch_queue_depth": 1,  # with more, the first schedule_run() wants that many batches; batches queue up either way
        }
        self._submitted: deque[tuple[list[np.ndarray], list[View]]] = deque()
        self._start()

    def submit(self, pictures: list[np.ndarray], views: list[View]) -> None:
        """pictures: encoded bytes."""
        pictures = [picture if _is_known(picture) else _as_bitmap(picture) for picture in pictures]
        self._submitted.append((pictures, views))
        self._feed(*self._submitted[-1])

    def receive(self) -> list[Tensor]:
        """Raises DamagedBatch."""
        try:
            return self._receive()
        except RuntimeError:
            # DALI does not say which sample it was, and the pipeline is dead. PIL's verdict counts: what it decodes is given to
            # DALI decoded. The whole batch is, so that the same samples always make the same pixels.
            pictures, views = self._submitted[0]
            bitmaps, reasons = [], {}
            for position, picture in enumerate(pictures):
                try:
                    bitmaps.append(_bitmap(picture))
                except DamagedSample as error:
                    reasons[position] = str(error)
            if reasons:
                raise DamagedBatch(reasons) from None
            self._submitted[0] = bitmaps, views
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

    def _feed(self, pictures: list[np.ndarray], views: list[View]) -> None:
        around = hull(views)
        self._pipeline.feed_input("pictures", pictures)
        self._pipeline.feed_input("corner", np.ascontiguousarray(around[:, :2]))
        self._pipeline.feed_input("shape", np.ascontiguousarray(around[:, 2:]))
        for number, view in enumerate(views):
            if len(views) > 1:
                self._pipeline.feed_input(f"start{number}", view.rectangles[:, :2] - around[:, :2])
                self._pipeline.feed_input(f"extent{number}", np.ascontiguousarray(view.rectangles[:, 2:]))
            if self._padded:
                self._pipeline.feed_input(f"shown{number}", view.places[:, :1:-1].astype(np.float32))  # height, width
                self._pipeline.feed_input(f"before{number}", -view.places[:, :2])
            self._pipeline.feed_input(f"mirrored{number}", view.mirrored.astype(np.int32))
        self._pipeline.schedule_run()

    def _receive(self) -> list[Tensor]:
        outputs = self._pipeline.share_outputs()  # waits for the batch
        views = [torch.from_dlpack(images.as_tensor()) for images in outputs]
        if self._gpu:
            # DALI takes a buffer back when the last reference goes, which says nothing of work still queued on torch's streams.
            views = [view.clone() for view in views]
            torch.cuda.current_stream(views[0].device).synchronize()
        self._pipeline.release_outputs()
        self._submitted.popleft()
        return views


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
