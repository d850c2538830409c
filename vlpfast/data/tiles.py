"""What a preview shows of a sample: its picture with boxes, frames, a spectrogram, slices, a point cloud."""

from __future__ import annotations

import io
import math
import textwrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlpfast.data.media_info import audio_info, require, video_info, volume_file
from vlpfast.data.pictures import DamagedSample, decode_rgb
from vlpfast.data.points_file import MEMBERS, holds_points, read_header, read_points
from vlpfast.data.shards import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardSet

TILE = 224  # pixels of a picture's longer side
_COLOURS = ("#ff2d55", "#00c853", "#2979ff", "#ff9100", "#d500f9", "#00b8d4")
_MOST = 100_000  # points that are drawn of a cloud


def tile(shards: ShardSet, i: int, record: dict[str, Any]) -> Image.Image:
    """The sample's picture, whatever it is a sample of; what is wrong with it, where there is none to show."""
    try:
        if isinstance(parts := record.get("parts"), list):
            names = [part["image"] for part in parts if isinstance(part, dict) and "image" in part][:4]
            contents = [shards.read([i], [str(name)])[0] for name in names]
            return _grid([decode_rgb(b"" if content is None else content.tobytes()) for content in contents])
        for extensions, show in ((IMAGE_EXTENSIONS, None), (VIDEO_EXTENSIONS, _frames), (AUDIO_EXTENSIONS, _spectrogram)):
            (content,) = shards.read([i], extensions)
            if content is not None:
                return _boxed(decode_rgb(content.tobytes()), record) if show is None else show(content.tobytes())
        (content,) = shards.read([i], ("vol",))
        if content is not None:
            return _middle_slices(content)
        if (numbers := points_of(shards, i)) is not None:
            return _cloud(numbers)
        members = [name for name in shards.extensions(i) if name not in ("txt", "json")]
        raise DamagedSample(f"members: {', '.join(members)}" if members else "no picture")
    except DamagedSample as damage:
        empty = Image.new("RGB", (TILE, TILE), "#cccccc")
        ImageDraw.Draw(empty).text((8, 8), "\n".join(textwrap.wrap(str(damage), 28)), fill="black", font=font())
        return empty


def _fitted(picture: Image.Image, side: int = TILE) -> Image.Image:
    scale = side / max(picture.size)
    return picture.resize(tuple(max(1, round(edge * scale)) for edge in picture.size), Image.Resampling.BICUBIC)


def _boxed(picture: Image.Image, record: dict[str, Any]) -> Image.Image:
    """The picture with its boxes, its longer side TILE pixels."""
    scale = TILE / max(picture.size)
    picture = _fitted(picture)
    draw = ImageDraw.Draw(picture)
    things = record.get("objects")
    for i, thing in enumerate(things if isinstance(things, list) else []):
        box = thing.get("box") if isinstance(thing, dict) else None
        if isinstance(box, list) and len(box) == 4 and all(isinstance(edge, (int, float)) for edge in box):
            x0, y0, x1, y1 = (edge * scale for edge in box)
            if x0 < x1 and y0 < y1:
                draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_COLOURS[i % len(_COLOURS)], width=2)
    return picture


def _grid(pictures: list[Image.Image]) -> Image.Image:
    """Up to four pictures, two beside each other."""
    if not pictures:
        raise DamagedSample("no pictures: text alone")
    whole, half = Image.new("RGB", (TILE, TILE), "white"), TILE // 2
    for place, picture in enumerate(pictures):
        whole.paste(_fitted(picture, half - 2), (place % 2 * half, place // 2 * half))
    return whole


def _frames(content: bytes) -> Image.Image:
    """The frames in the middle of each quarter of the video, or the key frame before where the file cannot be searched finely."""
    av = require("av", "video")
    duration = video_info(io.BytesIO(content))["duration"]
    frames = []
    try:
        with av.open(io.BytesIO(content)) as container:
            stream = container.streams.video[0]
            begin = float((stream.start_time or 0) * stream.time_base)
            for quarter in range(4):
                wanted = begin + duration * (quarter + 0.5) / 4
                container.seek(int(wanted / stream.time_base), stream=stream)
                frame = None
                for frame in container.decode(stream):
                    if frame.time is None or frame.time >= wanted:
                        break
                if frame is not None:
                    frames.append(frame.to_image())
    except (av.FFmpegError, ValueError) as error:
        raise DamagedSample(f"the video cannot be read: {error}") from error
    return _grid(frames)


def _middle_slices(content: np.ndarray) -> Image.Image:
    """From above, from the front and from the side, head and front upwards, between the foreground's lowest and highest
    percent."""
    store = volume_file()
    info = store.read_header(content)
    depth, height, width = map(np.arange, info.shape)
    low, high = (info.percentiles[store.PERCENTILES.index(share)] for share in (1.0, 99.0))
    middle = [places[len(places) // 2, None] for places in (depth, height, width)]
    planes = [
        store.read_slices(content, info, middle[0], height, width)[0],
        store.read_slices(content, info, depth, middle[1], width)[:, 0],
        store.read_slices(content, info, depth, height, middle[2])[:, :, 0],
    ]
    pictures = []
    for plane, (down, across) in zip(planes, ((1, 2), (0, 2), (0, 1)), strict=True):
        values = plane[::-1].astype(np.float64) * info.slope + info.intercept
        grey = ((values - low) / max(high - low, 1e-9)).clip(0, 1) * 255
        picture = Image.fromarray(grey.astype(np.uint8))
        edges = picture.width * info.spacing[across], picture.height * info.spacing[down]  # mm
        size = tuple(max(1, round(edge / max(edges) * TILE)) for edge in edges)
        pictures.append(picture.resize(size, Image.Resampling.BILINEAR).convert("RGB"))
    return _grid(pictures)


def points_of(shards: ShardSet, i: int) -> np.ndarray | None:
    """The sample's points as stored, [M, 3 or 6]; None if it has none. Raises DamagedSample."""
    (content,) = shards.read([i], MEMBERS)
    if content is None or (MEMBERS[0] not in shards.extensions(i) and not holds_points(content)):
        return None
    return read_points(content, read_header(content))


def _cloud(numbers: np.ndarray) -> Image.Image:
    """From above, from the front and from the side if z is up, all three to one scale, in the points' own colours; without any,
    the nearer the darker."""
    numbers = numbers[:: len(numbers) // _MOST + 1].astype(np.float64)
    low, high = numbers[:, :3].min(0) / 2, numbers[:, :3].max(0) / 2  # halved: float64 may not hold their distance
    places = (numbers[:, :3] / 2 - (low + high) / 2) / max((high - low).max(), 1e-300) + 0.5  # [M, 3] in 0 .. 1
    edge = TILE // 2 - 2
    dot = min(8, math.ceil(2.4 * edge / len(numbers) ** 0.5))  # a surface as large as the view then has few holes
    down, across = (around.ravel() for around in np.mgrid[:dot, :dot])  # pixels of a point
    pictures = []
    for right, up, depth, sign in ((0, 1, 2, 1), (0, 2, 1, -1), (1, 2, 0, 1)):
        order = np.argsort(sign * places[:, depth], kind="stable")  # nearer points come later, and over the others
        nearness = 0.5 + sign * (places[order, depth, None] - 0.5)  # [M, 1] in 0 .. 1
        colours = numbers[order, 3:].clip(0, 1) if numbers.shape[1] == 6 else 0.8 - 0.7 * nearness
        rows, columns = (((edge - dot) * at).round().astype(np.int64) for at in (1 - places[order, up], places[order, right]))
        canvas = np.full((edge, edge, 3), 255, np.uint8)
        canvas[rows[:, None] + down, columns[:, None] + across] = (255 * colours[:, None]).round().astype(np.uint8)
        pictures.append(Image.fromarray(canvas))
    return _grid(pictures)


def _spectrogram(content: bytes) -> Image.Image:
    """At most the first 30 seconds, time from left to right, frequencies upwards on the mel scale, 80 decibels from black to
    white."""
    import torch

    soundfile = require("soundfile", "audio")
    audio_info(io.BytesIO(content))
    with soundfile.SoundFile(io.BytesIO(content)) as sound:
        rate = sound.samplerate
        samples = torch.from_numpy(sound.read(30 * rate, dtype="float32", always_2d=True)).mean(1)  # [S]
    samples = torch.nn.functional.pad(samples, (0, max(0, 1024 - len(samples))))
    power = torch.stft(samples, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs() ** 2  # [513, T]
    mels = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), 128)
    rows = (700 * (10 ** (mels / 2595) - 1) / (rate / 2) * 512).round().astype(np.int64)[::-1].copy()
    level = 10 * power[torch.from_numpy(rows)].clamp(min=1e-10).log10()  # [128, T]
    grey = ((level - level.max()) / 80 + 1).clamp(0, 1).mul(255).byte().numpy()
    return Image.fromarray(grey).convert("RGB").resize((TILE, TILE // 2), Image.Resampling.BILINEAR)


def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)
