"""Videos as a modality: which frames are shown, and of them which part, is planned on the host; threads decode no more than that.

The member is a video file, or a `zip` of pictures: one frame each, in the order of their names (pack_frames). The JSON's "fps"
gives a zip's frames their times. The shape of pixels is taken as square.

Decoding is FFmpeg's on the host for every device, so that a run sees the same frames wherever it is trained: DALI's decoder does
not turn frames as their file wants them shown, does not say which sample of a batch is damaged, and its CPU half knows no H.264.
To the GPU go the cut and resized frames, one byte a channel, and are normalised there.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlpfast.data import frames, streams
from vlpfast.data.modality import Draws
from vlpfast.data.pictures import DamagedSample, decode_rgb, picture_size, results
from vlpfast.data.shards import IMAGE_EXTENSIONS
from vlpfast.data.views import crop_fractions, view_rectangles
from vlpfast.types import ImageSpec, UserError, VideoSpec

SAMPLINGS = ("uniform", "segment", "head_tail", "dense", "middle")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_LARGEST_PICTURE = 1 << 28  # bytes of one encoded picture of a zip, so that a small file cannot ask for all memory


class PictureTrack(NamedTuple):
    """The frames of a zip of pictures."""

    width: int
    height: int
    times: np.ndarray  # float64 [F] seconds; NaN without "fps"
    names: list[str]  # [F]


class ClipInfo(NamedTuple):
    track: streams.VideoTrack | PictureTrack
    first: int  # of the frames, the clip's begin ...
    count: int  # ... and how many are its own


def pack_frames(pictures: Iterable[bytes], extension: str = "jpg") -> bytes:
    """Encoded pictures in the order of time -> the member `zip` of a sample. extension: jpg, png, webp, ..."""
    if extension not in IMAGE_EXTENSIONS:
        raise ValueError(f"extension: expected one of {', '.join(IMAGE_EXTENSIONS)}, got {extension!r}")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for place, picture in enumerate(pictures):
            archive.writestr(f"{place:06d}.{extension}", picture)
    return stream.getvalue()


class VideoModality:
    """Batch["video"] with "frame_times" and "video_crop", and "short_video" with "short_times". See modality.Modality."""

    members = ("mp4", "webm", "mkv", "avi", "mov", "zip")

    def __init__(self, spec: VideoSpec, threads: int, batch_size: int, device: torch.device):
        _check(spec)
        streams.need_av()
        self._spec, self._device = spec, device
        self._view = ImageSpec(size=spec.size, scale=list(spec.scale), ratio=list(spec.ratio), mirror=spec.mirror)
        # made on the host: receive() may run on another stream than this
        self._mean = (torch.tensor(spec.mean).view(3, 1, 1) * 255).to(device)
        self._inverse_std = (1 / (torch.tensor(spec.std).view(3, 1, 1) * 255)).to(device)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vlpfast-video")
        self._submitted: deque[list[Future[np.ndarray]]] = deque()

    def inspect(self, content: np.ndarray | None, record: dict[str, Any]) -> ClipInfo:
        if content is None:
            raise DamagedSample(f"no video (a member {', '.join(self.members)})")
        begin, end = streams.json_interval(record, self._spec.interval)
        data = content.tobytes()
        track = _picture_track(data, record) if _is_zip(data) else streams.video_track(data)
        if not self._spec.interval:
            return ClipInfo(track, 0, len(track.times))
        if np.isnan(track.times).any():
            raise DamagedSample("the times of the frames are not known, and the clip is an interval of them")
        first, last = np.searchsorted(track.times, [begin, end]).tolist()
        if first == last:
            raise DamagedSample(f"no frame in {begin} .. {end} s: the video ends at {track.times[-1]:.3f} s")
        return ClipInfo(track, first, last - first)

    def submit(
        self, contents: list[np.ndarray], infos: list[ClipInfo], records: list[dict[str, Any]], draws: Draws
    ) -> dict[str, Any]:
        sizes = np.array([(info.track.width, info.track.height) for info in infos])
        rectangles, mirrored = view_rectangles(
            self._view, sizes, draws.index, train=draws.train, seed=draws.seed, epoch=draws.epoch
        )
        if self._spec.resize == "squash":
            rectangles = np.column_stack([np.zeros_like(sizes), sizes]).astype(np.int32)
        firsts = np.array([[info.first] for info in infos])
        long, short = self._choose(np.array([info.count for info in infos]), draws)
        places = firsts + (long if short is None else np.concatenate([long, short], axis=1))  # [B, T + T']
        views = zip(contents, infos, places, rectangles.tolist(), mirrored.tolist(), strict=True)
        self._submitted.append([self._pool.submit(self._pixels, *view) for view in views])
        times = np.stack([info.track.times[row] for info, row in zip(infos, places, strict=True)]).astype(np.float32)
        fields = {
            "frame_times": torch.from_numpy(times[:, : self._spec.frames].copy()),
            "video_crop": torch.from_numpy(crop_fractions(rectangles, mirrored, sizes)),
        }
        if short is not None:
            fields["short_times"] = torch.from_numpy(times[:, self._spec.frames :].copy())
        return fields

    def receive(self) -> dict[str, Tensor]:
        rows = results(self._submitted.popleft())
        pixels = torch.from_numpy(np.stack(rows)).to(self._device).permute(0, 1, 4, 2, 3)  # uint8 [B, T + T', 3, size, size]
        parts = {"video": pixels[:, : self._spec.frames]}
        if self._spec.short_frames:
            parts["short_video"] = pixels[:, self._spec.frames :]
        return {name: self._normalised(part) for name, part in parts.items()}

    def reset(self) -> None:
        for futures in self._submitted:
            for future in futures:
                future.cancel()
        self._submitted.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _normalised(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(self._mean).mul_(self._inverse_std)

    def _choose(self, lengths: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray | None]:
        """lengths [B] -> the frames' places in their clips, [B, T], and those of the short view, [B, T']."""
        spec = self._spec
        seeds = {"seed": draws.seed, "epoch": draws.epoch}
        if spec.short_frames and draws.train:
            return frames.two_views(lengths, draws.index, spec.frames, spec.short_frames, tuple(spec.short_share), **seeds)
        if spec.sampling == "middle" or (spec.sampling == "dense" and not draws.train):
            long = frames.middle_frames(lengths, spec.frames, spec.stride)
        elif spec.sampling == "uniform" or not draws.train:
            long = frames.uniform_frames(lengths, spec.frames)
        elif spec.sampling == "segment":
            long = frames.segment_frames(lengths, draws.index, spec.frames, **seeds)
        elif spec.sampling == "head_tail":
            long = frames.head_tail_frames(lengths, draws.index, spec.frames, **seeds)
        else:
            long = frames.dense_frames(lengths, draws.index, spec.frames, spec.stride, **seeds)
        if not spec.short_frames:
            return long, None
        moment = np.rint(lengths * np.mean(spec.short_share)).astype(np.int64)
        moment = np.minimum(np.maximum(moment, spec.short_frames), lengths)
        return long, (lengths - moment)[:, None] // 2 + frames.uniform_frames(moment, spec.short_frames)

    def _pixels(
        self, content: np.ndarray, info: ClipInfo, places: np.ndarray, rectangle: list[int], mirrored: bool
    ) -> np.ndarray:
        """-> uint8 [T + T', size, size, 3]"""
        x0, y0, width, height = rectangle
        size = self._spec.size

        def show(image: Image.Image) -> np.ndarray:
            # cut first, as the picture loaders do: what lies outside the crop does not shine into it
            view = image.crop((x0, y0, x0 + width, y0 + height))
            pixels = np.asarray(view.resize((size, size), _FILTERS[self._spec.interpolation]))
            return pixels[:, ::-1] if mirrored else pixels

        decode = _zip_frames if isinstance(info.track, PictureTrack) else streams.video_frames
        shown = decode(content.tobytes(), info.track, places, show)
        return np.stack([shown[place] for place in places.tolist()])


def _check(spec: VideoSpec) -> None:
    for name, known in (("sampling", SAMPLINGS), ("resize", ("crop", "squash")), ("interpolation", tuple(_FILTERS))):
        if getattr(spec, name) not in known:
            raise UserError(f"video.{name}: expected one of {', '.join(known)}, got {getattr(spec, name)!r}")
    for name, least in (("frames", 1), ("stride", 1), ("short_frames", 0), ("size", 1)):
        if getattr(spec, name) < least:
            raise UserError(f"video.{name}: expected at least {least}, got {getattr(spec, name)}")
    for name, most in (("short_share", 1.0), ("scale", float("inf")), ("ratio", float("inf"))):
        low, high = pair = getattr(spec, name)
        if not 0 < low <= high <= most:
            raise UserError(
                f"video.{name}: expected two numbers, 0 < low <= high{' <= 1' if most == 1 else ''}, got {list(pair)}"
            )
    if spec.short_frames and spec.sampling != "segment":
        raise UserError(f'video.sampling: expected "segment" with short_frames, got {spec.sampling!r}')
    if len(spec.interval) not in (0, 2):
        raise UserError(f"video.interval: expected the names of two fields of the JSON, got {list(spec.interval)}")


# --- a zip of pictures ------------------------------------------------------------------------------------------------------


def _is_zip(data: bytes) -> bool:
    return data.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def _picture_track(data: bytes, record: dict[str, Any]) -> PictureTrack:
    fps = streams.json_number(record, "fps") if "fps" in record else None
    if fps is not None and fps <= 0:
        raise DamagedSample(f"the json member's 'fps' is {fps}, expected more than 0 frames a second")
    with _zip(data) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith(tuple("." + e for e in IMAGE_EXTENSIONS)))
        if not names:
            raise DamagedSample(f"no picture in the zip ({', '.join(IMAGE_EXTENSIONS)})")
        width, height = picture_size(_member(archive, names[0]))
    return PictureTrack(width, height, np.arange(len(names)) / fps if fps else np.full(len(names), np.nan), names)


def _zip_frames(
    data: bytes, track: PictureTrack, places: np.ndarray, show: Callable[[Image.Image], np.ndarray]
) -> dict[int, np.ndarray]:
    shown = {}
    with _zip(data) as archive:
        for place in np.unique(places).tolist():
            try:
                picture = _member(archive, track.names[place])
                if (size := picture_size(picture)) != (track.width, track.height):
                    raise DamagedSample(f"{size[0]} x {size[1]} pixels, the first one has {track.width} x {track.height}")
                shown[place] = show(decode_rgb(picture))
            except DamagedSample as error:
                raise DamagedSample(f"{track.names[place]}: {error}") from error
    return shown


def _zip(data: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise DamagedSample(f"the zip cannot be read: {error}") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    if (size := archive.getinfo(name).file_size) > _LARGEST_PICTURE:
        raise DamagedSample(f"a picture of {size} bytes in the zip")
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError, ValueError, IndexError) as error:
        raise DamagedSample(f"the zip cannot be read: {error}") from error
