"""A look into shards: what they hold in numbers (`stats`) and in pictures (`preview`)."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlpfast.data.content import Needs, needs
from vlpfast.data.media_info import audio_info, require, video_info, volume_file
from vlpfast.data.pictures import DamagedSample, decode_rgb, picture_size
from vlpfast.data.shards import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardSet
from vlpfast.types import UserError

_BATCH = 256
TILE = 224  # pixels of a picture's longer side in a preview
_TEXT = 15  # height of a line
_COLOURS = ("#ff2d55", "#00c853", "#2979ff", "#ff9100", "#d500f9", "#00b8d4")


@dataclass
class Stats:
    """Numbers about a set of shards; all but the first three come from the `examined` samples."""

    shards: int
    samples: int
    tar_bytes: int
    examined: int = 0
    extensions: Counter[str] = field(default_factory=Counter)  # samples with such a member
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # width, height of the pictures or videos in pixels
    durations: list[float] = field(default_factory=list)  # seconds of the videos and sounds
    rates: Counter[int] = field(default_factory=Counter)  # Hz of the sounds
    volumes: Counter[tuple[int, ...]] = field(default_factory=Counter)  # depth, height, width in voxels
    documents: int = 0
    document_pictures: int = 0
    words: list[int] = field(default_factory=list)  # length of each caption or document
    vocabulary: Counter[str] = field(default_factory=Counter)  # lower case, without punctuation at the ends
    without_picture: int = 0  # missing or unreadable
    without_caption: int = 0
    damaged_media: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0  # in ShardSet.read alone: no decoding


def stats(
    patterns: str | Sequence[str],
    *,
    limit: int = 10_000,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Stats:
    """Numbers about the shards from at most `limit` samples, spread evenly. Only headers of pictures are read; videos and sounds
    are looked into where the JSON does not say how long they are. Raises UserError for what ShardSet refuses and for the package
    that is missing then."""
    if limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    shards = ShardSet(patterns, threads=threads)
    out = Stats(len(shards.shards), len(shards), sum(os.path.getsize(path) for path in shards.shards))
    chosen = _spread(len(shards), limit)
    wanted = needs(shards)
    for start in range(0, len(chosen), _BATCH):
        batch = chosen[start : start + _BATCH]
        began = time.perf_counter()
        pictures, texts, records = (shards.read(batch, names) for names in (IMAGE_EXTENSIONS, ("txt",), ("json",)))
        out.read_seconds += time.perf_counter() - began
        for i, picture, text, record in zip(batch, pictures, texts, records, strict=True):
            out.read_bytes += sum(len(part) for part in (picture, text, record) if part is not None)
            out.extensions.update(shards.extensions(i))
            found = _record(record)
            if isinstance(parts := found.get("parts"), list):
                _count_document(out, parts)
            else:
                _count(out, wanted, picture, _caption(text, found))
            _count_media(out, shards, i, found)
        out.examined += len(batch)
        if progress is not None:
            progress(out.examined, len(chosen))
    return out


def _count(out: Stats, wanted: Needs, picture: np.ndarray | None, caption: str | None) -> None:
    if wanted.picture:
        try:
            out.sizes[picture_size(b"" if picture is None else picture.tobytes())] += 1
        except DamagedSample:
            out.without_picture += 1
    if caption is not None:
        _count_words(out, caption)
    else:
        out.without_caption += wanted.caption


def _count_document(out: Stats, parts: list[Any]) -> None:
    out.documents += 1
    out.document_pictures += sum(isinstance(part, dict) and "image" in part for part in parts)
    _count_words(out, _text_of(parts))


def _text_of(parts: list[Any]) -> str:
    return " ".join(str(part["text"]) for part in parts if isinstance(part, dict) and "text" in part)


def _count_media(out: Stats, shards: ShardSet, i: int, record: dict[str, Any]) -> None:
    if "vol" in shards.extensions(i):
        (content,) = shards.read([i], ("vol",))
        out.read_bytes += len(content)
        try:
            out.volumes[volume_file().read_header(content).shape] += 1
        except DamagedSample:
            out.damaged_media += 1
    for kind, extensions, about in (("video", VIDEO_EXTENSIONS, video_info), ("audio", AUDIO_EXTENSIONS, audio_info)):
        if not set(extensions) & set(shards.extensions(i)):
            continue
        said = record.get(kind)
        if not isinstance(said, dict) or not isinstance(said.get("duration"), (int, float)):
            (content,) = shards.read([i], extensions)
            out.read_bytes += len(content)
            try:
                said = about(io.BytesIO(content))
            except DamagedSample:
                out.damaged_media += 1
                continue
        out.durations.append(float(said["duration"]))
        if kind == "video":
            out.sizes[said.get("width", 0), said.get("height", 0)] += 1
        else:
            out.rates[said.get("rate", 0)] += 1


def _count_words(out: Stats, caption: str) -> None:
    words = [word.strip(".,;:!?\"'()[]") for word in caption.lower().split()]
    out.words.append(len(words))
    out.vocabulary.update(word for word in words if word)


def preview(patterns: str | Sequence[str], path: str | os.PathLike[str], *, count: int = 24, threads: int = 4) -> int:
    """Writes a contact sheet (.png or .html) of `count` samples, spread evenly, with their captions, and with boxes where the
    JSON has `objects` with a `box` (x0, y0, x1, y1 in pixels). Of a video four frames, of a sound its spectrogram, of a volume
    its middle slices, of a document its first four pictures, of anything else the names of its members. -> how many samples are
    on it.

    The font of a .png knows Latin letters alone; an .html shows every script. Raises UserError for another kind of file, one
    that cannot be written, and what ShardSet refuses."""
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    path = Path(path)
    if path.suffix.lower() not in (".png", ".html"):
        raise UserError(f"preview: expected a file name that ends in .png or .html, got {path}")
    shards = ShardSet(patterns, threads=threads)
    chosen = _spread(len(shards), count)
    tiles = []
    for i in chosen:
        text, raw = (shards.read([i], names)[0] for names in (("txt",), ("json",)))
        record = _record(raw)
        parts = record.get("parts")
        caption = _text_of(parts) if isinstance(parts, list) else _caption(text, record)
        tiles.append((_tile(shards, i, record), caption or "(no caption)", shards.name(i)))
    content = sheet_png(tiles) if path.suffix.lower() == ".png" else _sheet_html(tiles)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"preview: {path} cannot be written: {error.strerror}") from error
    return len(chosen)


def _spread(available: int, wanted: int) -> list[int]:
    wanted = min(available, wanted)
    return [i * available // wanted for i in range(wanted)]


def _record(content: np.ndarray | None) -> dict[str, Any]:
    try:
        record = json.loads(content.tobytes()) if content is not None else {}
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _caption(text: np.ndarray | None, record: dict[str, Any]) -> str | None:
    if text is not None:
        return text.tobytes().decode("utf-8", "replace").strip()
    caption = record.get("caption")
    return caption if isinstance(caption, str) else None


def _tile(shards: ShardSet, i: int, record: dict[str, Any]) -> Image.Image:
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
        members = [name for name in shards.extensions(i) if name not in ("txt", "json")]
        raise DamagedSample(f"members: {', '.join(members)}" if members else "no picture")
    except DamagedSample as damage:
        tile = Image.new("RGB", (TILE, TILE), "#cccccc")
        ImageDraw.Draw(tile).text((8, 8), "\n".join(textwrap.wrap(str(damage), 28)), fill="black", font=_font())
        return tile


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
    tile, half = Image.new("RGB", (TILE, TILE), "white"), TILE // 2
    for place, picture in enumerate(pictures):
        tile.paste(_fitted(picture, half - 2), (place % 2 * half, place // 2 * half))
    return tile


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


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def sheet_png(tiles: Sequence[tuple[Image.Image, str, str]]) -> bytes:
    """Pictures of at most TILE pixels a side, captions, names (not shown) -> a PNG file."""
    columns = min(6, len(tiles))
    wrapped = [textwrap.wrap(caption, 36)[:6] for _, caption, _ in tiles]
    rows = [range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)]
    heights = [TILE + 12 + _TEXT * max(len(wrapped[i]) for i in row) for row in rows]
    sheet = Image.new("RGB", (columns * (TILE + 12), sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for row, height in zip(rows, heights, strict=True):
        for i in row:
            left = (i - row.start) * (TILE + 12) + 6
            sheet.paste(tiles[i][0], (left, top + 4))
            for line, text in enumerate(wrapped[i]):
                draw.text((left, top + TILE + 6 + line * _TEXT), text, fill="black", font=_font())
        top += height
    return _png(sheet)


def _sheet_html(tiles: Sequence[tuple[Image.Image, str, str]]) -> bytes:
    figures = [
        f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(_png(picture)).decode()}">'
        f'<figcaption dir="auto">{html.escape(caption)}<small>{html.escape(name)}</small></figcaption></figure>'
        for picture, caption, name in tiles
    ]
    return "\n".join(
        [
            '<!doctype html><html><head><meta charset="utf-8"><title>preview</title><style>',
            "body { font: 14px sans-serif; display: flex; flex-wrap: wrap; gap: 12px; margin: 12px }",
            f"figure {{ margin: 0; width: {TILE}px }} small {{ display: block; color: #777; overflow-wrap: anywhere }}",
            "</style></head><body>",
            *figures,
            "</body></html>\n",
        ]
    ).encode()


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
