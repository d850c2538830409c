"""Videos and sounds of known content, for the tests of both: frame n is grey, of level 4 n."""

import io
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

CONTAINERS = [
    ("mp4", "libx264"),
    ("mp4", "mpeg4"),
    ("mov", "mjpeg"),
    ("matroska", "libx264"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("avi", "libx264"),
]


def grey(n, width=64, height=48):
    return np.full((height, width, 3), 4 * n, np.uint8)


def clip(
    frames=60,
    container="mp4",
    codec="libx264",
    *,
    rate=10,
    times=None,
    rotation=None,
    sound=None,
    options=None,
    path=None,
    movflags="",
):
    """frames: how many grey ones, or uint8 [H, W, 3] each. times: in ms. sound: (float [n], rate, codec). path: written there."""
    frames = [grey(n) for n in range(frames)] if isinstance(frames, int) else frames
    file = io.BytesIO()
    with av.open(str(path) if path else file, "w", format=container, options={"movflags": movflags} if movflags else {}) as out:
        stream = out.add_stream(codec, rate=1000 if times else rate)
        stream.height, stream.width = frames[0].shape[:2] if frames else (48, 64)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size, stream.bit_rate = 12, 4_000_000
        stream.options = options or {}
        if rotation is not None:
            stream.set_display_rotation(rotation)
        track = out.add_stream(sound[2], rate=sound[1], layout="mono") if sound else None
        for n, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (times[n], Fraction(1, 1000)) if times else (n, Fraction(1, rate))
            out.mux(stream.encode(frame))
        if frames:
            out.mux(stream.encode())
        if sound:
            mux_sound(out, track, *sound[:2])
    return file.getvalue()


def mux_sound(out, track, samples, rate, layout="mono"):
    """samples: float [n] or [channels, n]."""
    samples = np.atleast_2d(samples)
    for first in range(0, samples.shape[1], 1000):
        block = np.ascontiguousarray(samples[:, first : first + 1000].T.reshape(1, -1), np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
        out.mux(track.encode(frame))
    out.mux(track.encode())


def sound_file(samples, rate, container="mp4", codec="aac"):
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        mux_sound(out, out.add_stream(codec, rate=rate, layout="mono"), samples, rate)
    return file.getvalue()


def wave(count, rate, seed=0):
    """Tones of seven frequencies under a slow swell, float64 [count]."""
    draw = np.random.default_rng(seed)
    t = np.arange(count) / rate
    tones = sum(np.sin(2 * np.pi * f * t + p) for f, p in zip(draw.uniform(100, 2500, 7), draw.uniform(0, 6, 7), strict=True))
    return 0.1 * tones * (0.6 + 0.4 * np.sin(2 * np.pi * 0.7 * t))


def damaged_copies(data, draw, count):
    """Bytes overwritten here and there, one stretch overwritten, or the end cut off."""
    for _ in range(count):
        copy = bytearray(data)
        kind = draw.integers(3)
        if kind == 0:
            for place in draw.integers(0, len(copy), draw.integers(1, 20)):
                copy[place] = draw.integers(256)
        elif kind == 1:
            place, length = draw.integers(0, len(copy)), draw.integers(1, 200)
            copy[place : place + length] = draw.integers(0, 256, length, dtype=np.uint8).tobytes()
        else:
            copy = copy[: draw.integers(0, len(copy))]
        yield np.frombuffer(bytes(copy), np.uint8)
