"""A look into shards: what they hold in numbers (`stats`) and in pictures (`preview`)."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlpfast.data.content import Needs, needs
from vlpfast.data.media_info import audio_info, video_info, volume_file
from vlpfast.data.pictures import DamagedSample, picture_size
from vlpfast.data.points_file import describe
from vlpfast.data.shards import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardSet
from vlpfast.data.tiles import TILE, font, points_of, tile
from vlpfast.types import UserError

_BATCH = 256
_TEXT = 15  # height of a line


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
    points: list[int] = field(default_factory=list)  # of each cloud
    low: list[float] = field(default_factory=lambda: [math.inf] * 3)  # the box around all clouds, x, y, z
    high: list[float] = field(default_factory=lambda: [-math.inf] * 3)
    coloured: int = 0  # clouds
    colours: tuple[float, float] = (math.inf, -math.inf)  # the smallest and largest number among them
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
    _count_points(out, shards, i)
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


def _count_points(out: Stats, shards: ShardSet, i: int) -> None:
    try:
        numbers = points_of(shards, i)
    except DamagedSample:
        out.damaged_media += 1
        return
    if numbers is None:
        return
    out.read_bytes += numbers.nbytes
    about = describe(numbers)
    out.points.append(about["count"])
    out.low = [min(pair) for pair in zip(out.low, about["low"], strict=True)]
    out.high = [max(pair) for pair in zip(out.high, about["high"], strict=True)]
    if about["colors"]:
        out.coloured += 1
        out.colours = min(out.colours[0], float(numbers[:, 3:].min())), max(out.colours[1], float(numbers[:, 3:].max()))


def _count_words(out: Stats, caption: str) -> None:
    words = [word.strip(".,;:!?\"'()[]") for word in caption.lower().split()]
    out.words.append(len(words))
    out.vocabulary.update(word for word in words if word)


def preview(patterns: str | Sequence[str], path: str | os.PathLike[str], *, count: int = 24, threads: int = 4) -> int:
    """Writes a contact sheet (.png or .html) of `count` samples, spread evenly, with their captions, and with boxes where the
    JSON has `objects` with a `box` (x0, y0, x1, y1 in pixels). Of a video four frames, of a sound its spectrogram, of a volume
    its middle slices, of a point cloud three views, of a document its first four pictures, of anything else the names of its
    members. -> how many samples are on it.

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
        tiles.append((tile(shards, i, record), caption or "(no caption)", shards.name(i)))
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
    caption = caption[0] if isinstance(caption, list) and caption else caption  # of several, what evaluation takes
    return caption if isinstance(caption, str) else None


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
                draw.text((left, top + TILE + 6 + line * _TEXT), text, fill="black", font=font())
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
