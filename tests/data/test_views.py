import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from vlpfast.data import ShardWriter, make_loader
from vlpfast.data.views import crop_fractions, random_resized_crop, view_rectangles
from vlpfast.types import DataSpec, ImageSpec


def transcription(width: int, height: int, scale: list[float], ratio: list[float], draw: random.Random) -> tuple[int, ...]:
    """RandomResizedCrop, one picture at a time."""
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, width - w), draw.randint(0, height - h), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("size", [(100, 80), (64, 64), (30, 200), (640, 31), (3, 2)])
@pytest.mark.parametrize("scale", [[0.08, 1.0], [0.9, 1.0]])
def test_random_resized_crop_has_the_published_distribution(size, scale):
    n = 6000
    spec = ImageSpec(scale=scale)
    ours = random_resized_crop(spec, np.tile(size, (n, 1)), np.arange(n), seed=1, epoch=2)
    draw = random.Random(0)
    theirs = np.array([transcription(*size, scale, spec.ratio, draw) for _ in range(n)])
    x0, y0, w, h = ours.T
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all() and (x0 + w <= size[0]).all() and (y0 + h <= size[1]).all()
    for column in range(4):  # two-sample Kolmogorov-Smirnov, critical value at p = 1e-4
        points = np.unique(np.concatenate([ours[:, column], theirs[:, column]]))
        a, b = (np.searchsorted(np.sort(sample[:, column]), points, "right") / n for sample in (ours, theirs))
        assert np.abs(a - b).max() < 2.23 * math.sqrt(2 / n)
    if w.std() and h.std():
        assert abs(np.corrcoef(w, h)[0, 1] - np.corrcoef(theirs[:, 2], theirs[:, 3])[0, 1]) < 0.06


def test_pictures_that_no_box_fits_get_the_centred_fallback():
    spec = ImageSpec(scale=[1.0, 1.0], ratio=[1.0, 1.0])
    boxes = random_resized_crop(spec, np.array([[10, 100], [100, 10], [1, 50]]), np.arange(3), seed=0, epoch=0)
    assert boxes.tolist() == [[0, 45, 10, 10], [45, 0, 10, 10], [0, 24, 1, 1]]


def test_views_are_a_function_of_seed_epoch_and_index():
    spec = ImageSpec(scale=[0.2, 1.0], mirror=0.5)
    sizes = np.tile([50, 60], (40, 1))
    index = np.arange(40)
    boxes, mirrored = view_rectangles(spec, sizes, index, train=True, seed=1, epoch=1)
    turned = np.arange(40)[::-1]
    again, mirrored_again = view_rectangles(spec, sizes, index[turned], train=True, seed=1, epoch=1)
    assert np.array_equal(boxes[turned], again) and np.array_equal(mirrored[turned], mirrored_again)
    for other in ({"seed": 2, "epoch": 1}, {"seed": 1, "epoch": 2}):
        assert not np.array_equal(boxes, view_rectangles(spec, sizes, index, train=True, **other)[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mirror_happens_as_often_as_asked(share):
    _, mirrored = view_rectangles(ImageSpec(mirror=share), np.full((4000, 2), 9), np.arange(4000), train=True, seed=0, epoch=0)
    assert abs(mirrored.mean() - share) <= 4 * math.sqrt(share * (1 - share) / 4000)


def test_evaluation_shows_the_square_in_the_middle():
    sizes = np.array([[100, 60], [60, 101], [5, 5], [1, 9]])
    boxes, mirrored = view_rectangles(ImageSpec(mirror=1.0), sizes, np.arange(4), train=False, seed=0, epoch=0)
    assert boxes.tolist() == [[20, 0, 60, 60], [0, 20, 60, 60], [0, 0, 5, 5], [0, 4, 1, 1]]
    assert not mirrored.any()
    assert crop_fractions(boxes, mirrored, sizes)[0].tolist() == [np.float32(0.2), 0, np.float32(0.6), 1, 0]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_recorded_crop_reproduces_the_picture(tmp_path, interpolation):
    draw = np.random.default_rng(0)
    with ShardWriter(tmp_path, "s") as writer:
        for i in range(12):
            stream = io.BytesIO()
            shape = (*draw.integers(20, 60, 2), 3)
            Image.fromarray(draw.integers(0, 256, shape, np.uint8)).save(stream, "PNG")
            writer.write(f"{i}", {"png": stream.getvalue()})
    spec = ImageSpec(size=24, scale=[0.2, 1.0], mirror=0.5, interpolation=interpolation)
    loader = make_loader(str(tmp_path), DataSpec(spec, None), None, 12, train=True, backend="plain")
    batch = next(iter(loader))
    assert 0 < batch["crop"][:, 4].sum() < 12
    pictures = loader._shards.read(batch["index"].tolist(), ("png",))
    for image, crop, picture in zip(batch["image"], batch["crop"].tolist(), pictures, strict=True):
        stored = Image.open(io.BytesIO(picture.tobytes()))
        x0, y0, w, h = (round(a * b) for a, b in zip(crop[:4], stored.size * 2, strict=True))
        view = stored.crop((x0, y0, x0 + w, y0 + h)).resize((24, 24), Image.Resampling[interpolation.upper()])
        expected = torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255  # [3, 24, 24]
        expected = expected.flip(2) if crop[4] else expected
        normalised = (expected - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
        torch.testing.assert_close(image, normalised, atol=2e-6, rtol=1e-5)
