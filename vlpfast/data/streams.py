"""Containers of video and sound by PyAV (FFmpeg): what a stream holds, frames at chosen places, a stretch of a sound track.

Packets are read to know the frames, which costs little; decoded is only what lies between a chosen frame and the key frame
before it. Nothing is held but the file's bytes, a few numbers for each packet and the frame at hand. Frames are turned as their
file says, but not mirrored. A sound's zero is the container's, a video's is its first frame; containers that count milliseconds
place a stretch of sound to the millisecond.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vlpfast.data.pictures import DamagedSample
from vlpfast.types import UserError

try:
    import av
except ImportError:
    av = None

_T = TypeVar("_T")
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}  # counter-clockwise
_MAY_SHOW_NOTHING = ("vp8", "vp9", "av1", "mpeg4")  # codecs with packets that are no frame to be shown, or repeat the last one
_LEAD = 0.25  # seconds of sound decoded before what is asked for: codecs need some packets until they are right after a jump


class VideoTrack(NamedTuple):
    """What the packets of a video stream tell."""

    width: int  # pixels, as shown: after the rotation
    height: int
    times: np.ndarray  # float64 [F] seconds from the first frame on, ascending; NaN where the container does not tell
    rotation: int  # 0, 90, 180 or 270 degrees counter-clockwise
    pts: np.ndarray | None  # int64 [F] in the stream's time base; None: frames can only be counted (AVI)
    key_pts: np.ndarray  # int64 [K] of the key frames, ascending
    key_dts: np.ndarray  # int64 [K]


class SoundTrack(NamedTuple):
    rate: int  # Hz
    samples: int  # of each channel


def need_av() -> None:
    if av is None:
        raise UserError("videos, and sounds in the containers of videos, need PyAV: pip install vlpfast[video]")


def json_number(record: dict[str, Any], name: str) -> float:
    """A field of a sample's JSON. Raises DamagedSample if it is no number, or one that no time or rate can be."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise DamagedSample(f"the json member's {name!r} is {value!r}, expected a number")
    return float(value)


def json_interval(record: dict[str, Any], names: list[str]) -> tuple[float, float]:
    """The seconds in the two named fields of a sample's JSON; (0, inf) for no names. Raises DamagedSample."""
    if not names:
        return 0.0, float("inf")
    begin, end = (json_number(record, name) for name in names)
    if not 0 <= begin < end:
        raise DamagedSample(f"the interval {begin} .. {end} s is empty")
    return begin, end


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """The container. What FFmpeg says against it is a DamagedSample."""
    if not data:
        raise DamagedSample("the file is empty")
    try:
        with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
            yield container
    except av.FFmpegError as error:
        raise DamagedSample(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, av.FFmpegError) and error.errno is not None:
        return f"FFmpeg: {error.strerror or os.strerror(error.errno)}"
    return str(error) or type(error).__name__


def _video_stream(container: Any) -> Any:
    """The first one that is not a cover picture, with a decoder."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return _with_decoder(stream)
    raise DamagedSample("no video stream")


def _with_decoder(stream: Any) -> Any:
    if stream.codec_context is None:
        raise DamagedSample("the stream's codec is not known to this FFmpeg")
    stream.codec_context.thread_count = 1  # the threads are those over samples
    return stream


# --- pictures ---------------------------------------------------------------------------------------------------------------


def video_track(data: bytes) -> VideoTrack:
    """Reads all packets and decodes the first frame. Raises DamagedSample: no video stream, no frame, a file cut short."""
    with _opened(data) as container:
        stream = _video_stream(container)
        packets: list[tuple[int | None, int | None, bool, bool]] = []  # pts, dts, a key frame, shown
        first, ends = None, 0.0
        _check_size(stream.codec_context.width, stream.codec_context.height)
        for packet in container.demux():
            if packet.size == 0:
                continue
            if packet.pts is not None and packet.stream.type in ("video", "audio"):
                ends = max(ends, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is not stream:
                continue
            if packet.is_corrupt:
                raise DamagedSample("the file is cut short within a frame")
            packets.append((packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard))
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            first = next(iter(stream.codec_context.decode(None)), None) if packets else None
        shown = sum(packet[3] for packet in packets)
        if first is None or not shown:
            raise DamagedSample("the video stream has no frame")
        if len(packets) < stream.frames:
            raise DamagedSample(f"the file is cut short: {len(packets)} of {stream.frames} frames are there")
        if container.format.name.startswith("matroska") and container.duration is not None:
            stated = container.duration / av.time_base
            if ends < 0.95 * stated - 0.25:
                raise DamagedSample(f"the file is cut short: {stated:.2f} s are stated, its packets end at {ends:.2f} s")
        _check_size(first.width, first.height)
        rotation = round(first.rotation) % 360
        if rotation % 90:
            raise DamagedSample(f"the frames are to be shown turned by {rotation} degrees, expected a multiple of 90")
        width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
        if container.format.name == "avi" or any(packet[0] is None for packet in packets):
            # AVI has no times of presentation, and FFmpeg's guesses are out of order where frames depend on later ones
            rate = stream.average_rate or stream.guessed_rate
            times = np.arange(shown) / float(rate) if rate else np.full(shown, np.nan)
            return VideoTrack(width, height, times, rotation, None, np.empty(0, np.int64), np.empty(0, np.int64))
        pts = np.unique(np.array([packet[0] for packet in packets if packet[3]], np.int64))
        keys = sorted((packet[0], packet[0] if packet[1] is None else packet[1]) for packet in packets if packet[2])
        key_pts, key_dts = np.array(keys, np.int64).reshape(-1, 2).T
        return VideoTrack(width, height, (pts - pts[0]) * float(stream.time_base), rotation, pts, key_pts, key_dts)


def _check_size(width: int, height: int) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise DamagedSample(f"the frames have {width} x {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS allows")


def video_frames(data: bytes, track: VideoTrack, places: np.ndarray, show: Callable[[Image.Image], _T]) -> dict[int, _T]:
    """Decodes frames one after the other and keeps of each only what `show` makes of it (RGB, as shown).

    places: int64 numbers of frames. A packet without a frame of its own stands for the frame that is on display at its time.
    Raises DamagedSample if a frame that is needed cannot be decoded, or FFmpeg marks it as patched up.
    """
    wanted = np.unique(places)
    if track.pts is None:
        return _count_frames(data, track, wanted, show)
    with contextlib.suppress(DamagedSample):
        # where key frames are not what they are said to be a jump may go wrong: decoding from the start on has the last word
        if (shown := _seek_frames(data, track, wanted, show, jump=True)) is not None:
            return shown
    return _seek_frames(data, track, wanted, show, jump=False)


def _seek_frames(
    data: bytes, track: VideoTrack, wanted: np.ndarray, show: Callable[[Image.Image], _T], *, jump: bool
) -> dict[int, _T] | None:
    """None: a jump landed behind the frame."""
    keys = np.searchsorted(track.key_pts, track.pts[wanted], side="right") - 1  # the key frame before each
    with _opened(data) as container:
        stream = _video_stream(container)
        frames = container.decode(stream)
        current = following = None
        reached = -1
        shown = {}
        for place, key in zip(wanted.tolist(), keys.tolist(), strict=True):
            pts = int(track.pts[place])
            if jump and key > max(reached, 0):
                container.seek(int(track.key_dts[key]), stream=stream, backward=True)
                frames, current, following = container.decode(stream), None, None
                reached = key
            while current is None or current.pts < pts:
                following = following or next(frames, None)
                if following is None:
                    raise DamagedSample(f"the video ends before frame {place} of {len(track.pts)}")
                if following.pts is None:
                    raise DamagedSample("a decoded frame has no time")
                if following.is_corrupt and (reached < 0 or following.pts >= track.key_pts[reached]):
                    raise DamagedSample(f"a frame before frame {place} is damaged")
                if following.pts > pts:
                    break
                current, following = following, None
            if current is None and jump and reached > 0:
                return None
            if (current is None or current.pts != pts) and stream.codec_context.codec.canonical_name not in _MAY_SHOW_NOTHING:
                raise DamagedSample(f"frame {place} cannot be decoded")
            shown[place] = show(_picture(following if current is None else current, track))
        return shown


def _count_frames(data: bytes, track: VideoTrack, wanted: np.ndarray, show: Callable[[Image.Image], _T]) -> dict[int, _T]:
    shown, left = {}, set(wanted.tolist())
    with _opened(data) as container:
        for place, frame in enumerate(container.decode(_video_stream(container))):
            if frame.is_corrupt:
                raise DamagedSample(f"frame {place} is damaged")
            if place in left:
                shown[place] = show(_picture(frame, track))
                left.remove(place)
                if not left:
                    return shown
        raise DamagedSample(f"the video ends before frame {min(left)} of {len(track.times)}")


def _picture(frame: Any, track: VideoTrack) -> Image.Image:
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    if track.rotation:
        image = image.transpose(_TURNS[track.rotation])
    if image.size != (track.width, track.height):
        raise DamagedSample(f"the frames' size changes from {track.width} x {track.height} to {image.width} x {image.height}")
    return image


# --- sound ------------------------------------------------------------------------------------------------------------------


def sound_track(data: bytes) -> SoundTrack:
    """Of the first sound stream, by its packets. Raises DamagedSample if there is none, or no sound in it."""
    with _opened(data) as container:
        stream = _sound_stream(container)
        end = 0.0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise DamagedSample("the file is cut short within a packet of sound")
            if packet.size and packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        rate = stream.codec_context.sample_rate
        return SoundTrack(rate, round(end * rate))


def _sound_stream(container: Any) -> Any:
    if not container.streams.audio:
        raise DamagedSample("no sound track")
    return _with_decoder(container.streams.audio[0])


def sound(data: bytes, track: SoundTrack, first: int, count: int) -> np.ndarray:
    """`count` samples from `first` on, the mean of all channels, float32 [count]. Where the stream has a gap: zeros."""
    out = np.zeros(count, np.float32)
    with _opened(data) as container:
        stream = _sound_stream(container)
        if (begin := first / track.rate - _LEAD) > 0:
            container.seek(int(begin / stream.time_base), stream=stream, backward=True)
        resampler = av.AudioResampler(format="flt")
        place = None  # of the next frame's first sample
        for frame in container.decode(stream):
            if frame.sample_rate != track.rate:
                raise DamagedSample(f"the sample rate changes from {track.rate} to {frame.sample_rate} Hz")
            told = place if frame.pts is None else round(float(frame.pts * frame.time_base) * track.rate)
            if place is None or abs(told - place) > 0.02 * track.rate:  # less is rounding: some containers count milliseconds
                place = told or 0
            samples = _mono(resampler, frame)
            low, high = max(place, first), min(place + len(samples), first + count)
            if low < high:
                out[low - first : high - first] = samples[low - place : high - place]
            place += len(samples)
            if place >= first + count:
                break
    return out


def any_sound(data: bytes) -> bool:
    """Whether one sample of the first sound stream is not zero. Decodes until there is one."""
    with _opened(data) as container:
        resampler = av.AudioResampler(format="flt")
        return any(_mono(resampler, frame).any() for frame in container.decode(_sound_stream(container)))


def _mono(resampler: Any, frame: Any) -> np.ndarray:
    """The mean of all channels, float32 [samples]."""
    # interleaved by FFmpeg first: PyAV counts the planes of eight channels and more wrongly, and reads beyond them
    channels = frame.layout.nb_channels
    try:
        parts = [part.to_ndarray().reshape(-1, channels) for part in resampler.resample(frame)]
    except ValueError as error:
        raise DamagedSample(f"the format of the sound changes, or is not known: {error}") from error
    return np.concatenate(parts).mean(axis=1) if parts else np.empty(0, np.float32)
