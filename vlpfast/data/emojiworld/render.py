"""A scene's pixels and what is true about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from vlpfast.data.emojiworld.draws import Draws
from vlpfast.data.emojiworld.scenes import Background, Scene
from vlpfast.data.emojiworld.sprites import Sprite, Word, sprite
from vlpfast.data.emojiworld.world import World

_OPAQUE = 128  # alpha from which a pixel belongs to an object
_NOISE_CELLS = 10


@dataclass(frozen=True)
class Outline:
    """Where an object is to be seen."""

    visible: np.ndarray  # [H, W] bool, after occlusion
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 of the visible part in pixels, x1 and y1 exclusive
    full_box: tuple[int, int, int, int]  # of the whole object
    visibility: float  # share of the object's pixels that is visible


@dataclass(frozen=True)
class _Layer:
    pixels: np.ndarray  # [h, w, 4] uint16 RGBA, alpha multiplied in
    window: tuple[slice, slice]  # rows and columns of the picture


def render(scene: Scene, world: World, words: Sequence[Word]) -> tuple[np.ndarray, list[Outline]]:
    """The picture [H, W, 3] uint8 and the outline of each of scene.things."""
    layers = []
    for thing in scene.things:
        group = scene.groups[thing.group]
        own = sprite(world.domain, words[group.word].code, group.tint)
        layers.append(
            _layer(own, thing.x * world.size, thing.y * world.size, thing.side * world.size, thing.rotation, world.size)
        )
    canvas = paint(scene.background, world.size, Draws(*scene.name, "background")).astype(np.uint16)
    for i in scene.order:
        rgba, window = layers[i].pixels, layers[i].window
        canvas[window] = np.minimum(rgba[..., :3] + (canvas[window] * (255 - rgba[..., 3:]) + 127) // 255, 255)
    return canvas.astype(np.uint8), _outlines(layers, scene.order, world.size)


def _layer(own: Sprite, x: float, y: float, side: float, degrees: int, size: int) -> _Layer:
    """Turned at the artwork's resolution, then reduced with antialiasing: no edge is sampled twice at the picture's."""
    turned = own.image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    scale = side / len(own.pixels)
    width, height = round(turned.width * scale), round(turned.height * scale)
    pixels = np.asarray(turned.resize((width, height), Image.Resampling.BICUBIC)).astype(np.uint16)
    left, top = round(x - width / 2), round(y - height / 2)
    rows, columns = slice(max(top, 0), min(top + height, size)), slice(max(left, 0), min(left + width, size))
    return _Layer(pixels[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left], (rows, columns))


def _outlines(layers: Sequence[_Layer], order: Sequence[int], size: int) -> list[Outline]:
    covered = np.zeros((size, size), bool)
    outlines: dict[int, Outline] = {}
    for i in reversed(order):
        window = layers[i].window
        own = layers[i].pixels[..., 3] >= _OPAQUE
        seen = own & ~covered[window]
        covered[window] |= own
        visible = np.zeros((size, size), bool)
        visible[window] = seen
        outlines[i] = Outline(visible, _box(seen, window), _box(own, window), int(seen.sum()) / int(own.sum()))
    return [outlines[i] for i in range(len(layers))]


def _box(mask: np.ndarray, window: tuple[slice, slice]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    y, x = window[0].start, window[1].start
    return x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1


def paint(background: Background, size: int, draws: Draws) -> np.ndarray:
    """[size, size, 3] uint8."""
    first, last = np.array(background.rgb[0], np.int32), np.array(background.rgb[-1], np.int32)
    if background.kind == "plain":
        return np.broadcast_to(first.astype(np.uint8), (size, size, 3))
    if background.kind == "gradient":
        along = _along(size, background.direction)
        weight = (along - along.min()) / (along.max() - along.min())
    elif background.kind == "stripes":
        weight = 0.5 + 0.5 * _wave(size, background, background.direction)
    elif background.kind == "checks":
        other = (background.direction + 90) % 180
        weight = 0.5 + 0.5 * _wave(size, background, background.direction) * _wave(size, background, other)
    else:
        cells = np.round(draws.reals(_NOISE_CELLS, _NOISE_CELLS) * 255).astype(np.uint8)
        weight = np.asarray(Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)) / 255
    share = np.round(weight * 256).astype(np.int32)[..., None]  # [H, W, 1]
    return ((first * (256 - share) + last * share + 128) >> 8).astype(np.uint8)


@lru_cache(maxsize=16)
def _along(size: int, degrees: int) -> np.ndarray:
    """[size, size] float64: position of each pixel's centre along a direction, in sides of the picture."""
    centres = (np.arange(size) + 0.5) / size
    x, y = {0: (1.0, 0.0), 45: (0.5**0.5, 0.5**0.5), 90: (0.0, 1.0), 135: (-(0.5**0.5), 0.5**0.5)}[degrees]
    return x * centres[None, :] + y * centres[:, None]


def _wave(size: int, background: Background, degrees: int) -> np.ndarray:
    """[size, size] float64 from -1 to 1: a square wave with edges one pixel wide."""
    cycle = (_along(size, degrees) / background.period + background.phase) % 1
    return np.clip((0.25 - np.abs(cycle - 0.5)) * (2 * background.period * size), -1, 1)
