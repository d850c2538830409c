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

from vlpfast.data.pictures import DamagedSample, decode_rgb, picture_size
from vlpfast.data.shards import IMAGE_EXTENSIONS, ShardSet
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
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # width, height of the pictures in pixels
    words: list[int] = field(default_factory=list)  # length of each caption
    vocabulary: Counter[str] = field(default_factory=Counter)  # lower case, without punctuation at the ends
    without_picture: int = 0  # missing or unreadable
    without_caption: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0  # in ShardSet.read alone: no decoding


def stats(
    patterns: str | Sequence[str],
    *,
    limit: int = 10_000,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Stats:
    """Numbers about the shards from at most `limit` samples, spread evenly. Only headers of pictures are read. Raises UserError
    for what ShardSet refuses."""
    if limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    shards = ShardSet(patterns, threads=threads)
    out = Stats(len(shards.shards), len(shards), sum(os.path.getsize(path) for path in shards.shards))
    chosen = _spread(len(shards), limit)
    for start in range(0, len(chosen), _BATCH):
        batch = chosen[start : start + _BATCH]
        began = time.perf_counter()
        pictures, texts, records = (shards.read(batch, names) for names in (IMAGE_EXTENSIONS, ("txt",), ("json",)))
        out.read_seconds += time.perf_counter() - began
        for i, picture, text, record in zip(batch, pictures, texts, records, strict=True):
            out.read_bytes += sum(len(part) for part in (picture, text, record) if part is not None)
            out.extensions.update(shards.extensions(i))
            _count(out, picture, _caption(text, _record(record)))
        out.examined += len(batch)
        if progress is not None:
            progress(out.examined, len(chosen))
    return out


def _count(out: Stats, picture: np.ndarray | None, caption: str | None) -> None:
    try:
        out.sizes[picture_size(b"" if picture is None else picture.tobytes())] += 1
    except DamagedSample:
        out.without_picture += 1
    if caption is None:
        out.without_caption += 1
        return
    words = [word.strip(".,;:!?\"'()[]") for word in caption.lower().split()]
    out.words.append(len(words))
    out.vocabulary.update(word for word in words if word)


def preview(patterns: str | Sequence[str], path: str | os.PathLike[str], *, count: int = 24, threads: int = 4) -> int:
    """Writes a contact sheet (.png or .html) of `count` samples, spread evenly, with their captions, and with boxes where the
    JSON has `objects` with a `box` (x0, y0, x1, y1 in pixels). -> how many samples are on it.

    The font of a .png knows Latin letters alone; an .html shows every script. Raises UserError for another kind of file, one
    that cannot be written, and what ShardSet refuses."""
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    path = Path(path)
    if path.suffix.lower() not in (".png", ".html"):
        raise UserError(f"preview: expected a file name that ends in .png or .html, got {path}")
    shards = ShardSet(patterns, threads=threads)
    chosen = _spread(len(shards), count)
    pictures, texts, records = (shards.read(chosen, names) for names in (IMAGE_EXTENSIONS, ("txt",), ("json",)))
    tiles = []
    for i, picture, text, raw in zip(chosen, pictures, texts, records, strict=True):
        record = _record(raw)
        tiles.append((_picture(picture, record), _caption(text, record) or "(no caption)", shards.name(i)))
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


def _picture(content: np.ndarray | None, record: dict[str, Any]) -> Image.Image:
    """The picture with its boxes, its longer side TILE pixels."""
    try:
        picture = decode_rgb(b"" if content is None else content.tobytes())
    except DamagedSample as damage:
        picture = Image.new("RGB", (TILE, TILE), "#cccccc")
        ImageDraw.Draw(picture).text((8, 8), "\n".join(textwrap.wrap(str(damage), 28)), fill="black", font=_font())
        return picture
    scale = TILE / max(picture.size)
    picture = picture.resize(tuple(max(1, round(side * scale)) for side in picture.size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    things = record.get("objects")
    for i, thing in enumerate(things if isinstance(things, list) else []):
        box = thing.get("box") if isinstance(thing, dict) else None
        if isinstance(box, list) and len(box) == 4 and all(isinstance(edge, (int, float)) for edge in box):
            x0, y0, x1, y1 = (edge * scale for edge in box)
            if x0 < x1 and y0 < y1:
                draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_COLOURS[i % len(_COLOURS)], width=2)
    return picture


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
