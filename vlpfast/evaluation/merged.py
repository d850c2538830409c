"""What a vision transformer that merges or selects patches has made of a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

LEFT_OUT = 128  # grey
BORDER = 255  # white


def draw_merged(image: Image.Image, place: Tensor, grid: int) -> Image.Image:
    """The picture with each group of merged patches in its mean colour and a white line between groups.

    As the figures of Bolya et al. 2023, "Token merging: your ViT but faster", show them.

    Args:
        image: what the model was shown, cropped as it was; any size from grid pixels on.
        place: [grid * grid] integers, row by row: patches of equal ones are a group, negative ones were left out (grey). A row of
            ViT.merged_patches.
        grid: patches in a row and in a column.

    Returns: a picture of the same size in RGB.
    Raises: ValueError, TypeError: a wrong argument, named.
    """
    if grid < 1 or min(image.size) < grid:
        raise ValueError(f"grid: expected 1 to as many patches as the picture of {image.size} has pixels, got {grid}")
    if place.shape != (grid**2,):
        raise ValueError(f"place: expected [{grid} * {grid}], got {tuple(place.shape)}")
    if place.is_floating_point() or place.is_complex():
        raise TypeError(f"place: expected integers, got {place.dtype}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)  # [H, W, 3]
    height, width = pixels.shape[:2]
    rows, columns = (np.arange(length) * grid // length for length in (height, width))
    places, groups = np.unique(place.cpu().numpy(), return_inverse=True)
    group = groups.reshape(grid, grid)[rows[:, None], columns]  # [H, W]
    count = np.bincount(group.ravel(), minlength=len(places))
    sums = [np.bincount(group.ravel(), pixels[..., channel].ravel(), len(places)) for channel in range(3)]
    colours = np.stack(sums, axis=1) / count[:, None]  # [groups, 3]
    colours[places < 0] = LEFT_OUT
    drawn = colours.round().astype(np.uint8)[group]
    drawn[1:][group[1:] != group[:-1]] = BORDER
    drawn[:, 1:][group[:, 1:] != group[:, :-1]] = BORDER
    return Image.fromarray(drawn)
