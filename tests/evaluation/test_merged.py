from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vlpfast.evaluation.merged import BORDER, LEFT_OUT, draw_merged


def picture(grid: int, side: int, colours: list[tuple[int, int, int]]) -> Image.Image:
    """Each patch in one colour of its own."""
    patches = np.array(colours, dtype=np.uint8).reshape(grid, grid, 3)
    return Image.fromarray(patches.repeat(side, 0).repeat(side, 1))


def inside(drawn: Image.Image, grid: int, patch: int) -> tuple[int, ...]:
    """The colour in the middle of a patch."""
    x, y = ((n + 0.5) / grid for n in (patch % grid, patch // grid))
    return drawn.getpixel((int(x * drawn.width), int(y * drawn.height)))


COLOURS = [(10 * i, 200 - 7 * i, (50 * i) % 251) for i in range(9)]


def test_groups_have_their_mean_colour_and_lines_between_them() -> None:
    place = torch.tensor([4, 4, 0, 4, 2, 0, 1, 1, -1])
    drawn = draw_merged(picture(3, 8, COLOURS), place, 3)
    assert drawn.size == (24, 24) and drawn.mode == "RGB"
    for number in (0, 1, 2, 4):
        members = [i for i in range(9) if place[i] == number]
        mean = np.mean([COLOURS[i] for i in members], axis=0).round()
        assert all(inside(drawn, 3, i) == tuple(mean.astype(int)) for i in members)
    assert inside(drawn, 3, 8) == (LEFT_OUT,) * 3
    pixels = np.asarray(drawn)
    white = (pixels == BORDER).all(2)
    expected = np.zeros((24, 24), dtype=bool)
    labels = place.reshape(3, 3).numpy().repeat(8, 0).repeat(8, 1)
    for y in range(24):
        for x in range(24):
            expected[y, x] = (y > 0 and labels[y, x] != labels[y - 1, x]) or (x > 0 and labels[y, x] != labels[y, x - 1])
    assert (white == expected).all()
    assert not white[:8, 8].any() and white[:8, 16].all()  # patches 0 and 1 are one group, 2 is another


def test_sizes_that_the_grid_does_not_divide() -> None:
    image = Image.new("L", (23, 11), 90)
    drawn = draw_merged(image, torch.zeros(9, dtype=torch.int32), 3)
    assert drawn.size == (23, 11)
    assert (np.asarray(drawn) == 90).all()  # one group, no line
    lines = np.asarray(draw_merged(image, torch.arange(9), 3)) == BORDER
    assert lines[:, :, 0].all(0).sum() == 2 and lines[:, :, 0].all(1).sum() == 2


def test_wrong_arguments_are_named() -> None:
    image = Image.new("RGB", (24, 24))
    with pytest.raises(ValueError, match=r"place: expected \[3 \* 3\], got \(8,\)"):
        draw_merged(image, torch.zeros(8, dtype=torch.int64), 3)
    with pytest.raises(TypeError, match=r"place: expected integers, got torch\.float32"):
        draw_merged(image, torch.zeros(9), 3)
    with pytest.raises(ValueError, match=r"grid: expected 1 to as many patches as the picture of \(24, 24\) has pixels, got 25"):
        draw_merged(image, torch.zeros(625, dtype=torch.int64), 25)
