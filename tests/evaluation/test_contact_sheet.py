"""The first batch as a picture."""

from __future__ import annotations

import io

import torch
from PIL import Image

from vlpfast.data.inspect import TILE
from vlpfast.evaluation.contact_sheet import batch_sheet
from vlpfast.types import Batch, DataSpec, ImageSpec

SPEC = DataSpec(image=ImageSpec(size=32))
COLUMN = TILE + 12


class Words:
    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def normalised(*colours: tuple[int, int, int], size: int = 32) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SPEC.image.mean, SPEC.image.std))
    return torch.stack([(torch.tensor(c).view(3, 1, 1) / 255).expand(3, size, size).sub(mean).div(std) for c in colours])


def tile(png: bytes, number: int, x: float = 0.5, y: float = 0.5) -> tuple[int, int, int]:
    """The pixel at fractions of a tile of the first row."""
    return Image.open(io.BytesIO(png)).getpixel((int(number * COLUMN + 6 + x * TILE), int(4 + y * TILE)))


def test_colours_and_boxes() -> None:
    colours = (200, 100, 50), (20, 130, 240)
    boxes = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.0, 0.0, 0.1, 0.1]]).repeat(2, 1, 1)
    shown = torch.tensor([[True, False], [False, False]])
    batch = Batch(image=normalised(*colours), boxes=boxes, box_mask=shown, text=torch.tensor([[3], [4]]), key=["a", "b"])
    png = batch_sheet(batch, SPEC, Words())
    assert [tile(png, n) for n in range(2)] == list(colours)
    assert tile(png, 0, x=0.253) == (255, 0, 0) and tile(png, 0, x=0.05, y=0.02) == colours[0]
    assert tile(png, 1, x=0.253) == colours[1]


def test_every_view_has_a_tile_and_no_more_than_count() -> None:
    a, b, c = (10, 20, 30), (40, 50, 60), (70, 80, 90)
    views = torch.stack([normalised(a, b), normalised(c, a)])  # [2, V, 3, 32, 32]
    local = torch.stack([normalised(c, size=16), normalised(b, size=16)])
    batch = Batch(image=views, image_local=local, key=["a", "b"])
    png = batch_sheet(batch, SPEC, None)
    assert [tile(png, n) for n in range(6)] == [a, b, c, c, a, b]
    assert Image.open(io.BytesIO(batch_sheet(batch, SPEC, None, count=4))).width == 4 * COLUMN


def test_without_pictures() -> None:
    assert tile(batch_sheet(Batch(text=torch.tensor([[3]]), key=["a"]), SPEC, Words()), 0) == (204, 204, 204)
