"""The named colours of objects and backgrounds. Whole-number arithmetic, so that every platform gets the same pixels."""

from __future__ import annotations

import numpy as np

Colour = tuple[int, int, int]  # RGB, 0 .. 255

TINTS: dict[str, Colour] = {
    "red": (226, 38, 38),
    "yellow": (250, 214, 30),
    "green": (40, 168, 64),
    "blue": (44, 96, 226),
    "purple": (140, 62, 196),
    "pink": (250, 120, 186),
}
BACKGROUNDS: dict[str, Colour] = {
    "red": (206, 62, 62),
    "orange": (240, 150, 62),
    "yellow": (245, 221, 92),
    "green": (92, 172, 92),
    "blue": (84, 134, 216),
    "purple": (150, 102, 192),
    "pink": (245, 172, 204),
    "brown": (140, 96, 62),
    "grey": (150, 150, 150),
    "black": (34, 34, 38),
    "white": (243, 243, 243),
}

_TINT_VISIBLE = 130  # least mean difference to an object's own colours, summed over R, G, B


def tinted(pixels: np.ndarray, colour: Colour) -> np.ndarray:
    """pixels [H, W, 4] uint8 RGBA painted in shades of one colour by their brightness, with a tenth of their own colours left."""
    rgb = pixels[..., :3].astype(np.int32)
    light = (77 * rgb[..., 0] + 150 * rgb[..., 1] + 29 * rgb[..., 2]) >> 8  # [H, W] 0 .. 255
    levels = np.arange(256)[:, None]
    full = np.array(colour)
    dark, pale = full * 30 // 100, (full * 62 + 255 * 38) // 100
    shades = np.where(
        levels < 105, dark + (full - dark) * levels // 105, full + (pale - full) * (levels - 105) // 150
    )  # [256, 3]
    out = pixels.copy()
    out[..., :3] = (shades[light] * 9 + rgb) // 10
    return out


def is_visible(own: np.ndarray, changed: np.ndarray) -> bool:
    """Whether two RGBA pictures of the same shape differ beyond doubt in colour, weighted by alpha."""
    alpha = own[..., 3].astype(np.int64)
    difference = np.abs(own[..., :3].astype(np.int64) - changed[..., :3]).sum(axis=-1)
    return int((difference * alpha).sum()) >= _TINT_VISIBLE * int(alpha.sum())


def distance(a: Colour, b: Colour) -> int:
    return sum(abs(p - q) for p, q in zip(a, b, strict=True))
