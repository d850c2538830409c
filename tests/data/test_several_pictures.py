"""Samples of two pictures and more."""

import io
import json
from importlib.util import find_spec
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from vlpfast.data import ShardWriter, make_loader
from vlpfast.data.inspect import stats
from vlpfast.data.shards import verify
from vlpfast.types import AugmentSpec, DataSpec, ImageSpec, RandAugmentSpec, UserError, ViewSpec

HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
BACKENDS = [pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="waits for the package nvidia-dali")), "plain"]
LEVEL = 1 / 255 / min(ImageSpec().std)


def encoded(number, kind="JPEG"):
    draw = np.random.default_rng(number)
    y, x = np.mgrid[: 40 + number % 7, : 50 + number % 11]
    wave = [127 + 100 * np.sin(x / draw.uniform(3, 9)) * np.cos(y / draw.uniform(3, 9)) for _ in range(3)]
    stream = io.BytesIO()
    Image.fromarray(np.stack(wave, -1).astype(np.uint8)).save(stream, kind)
    return stream.getvalue()


def write(folder, change=lambda i, members: members, count=14, pictures=2):
    """Picture p of sample i is number 10 * i + p; and the same pictures as samples of their own."""
    with ShardWriter(folder / "pairs", "s", samples_per_shard=5) as pairs, ShardWriter(folder / "single", "s") as single:
        for i in range(count):
            names = [f"{p}.{'png' if (i + p) % 4 == 0 else 'jpg'}" for p in range(pictures)]
            members = {name: encoded(10 * i + p, "PNG" if "png" in name else "JPEG") for p, name in enumerate(names)}
            pairs.write(f"k{i:02d}", change(i, members) | {"json": json.dumps({"number": i}).encode()})
            for p, name in enumerate(names):
                single.write(f"k{i:02d}-{p}", {name.partition(".")[2]: members[name]})
    return str(folder / "pairs"), str(folder / "single")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pictures", [2, 3])
def test_each_picture_is_seen_as_it_would_be_alone(tmp_path, backend, pictures):
    pairs, single = write(tmp_path, pictures=pictures)
    options = {"train": False, "backend": backend}
    (batch,) = make_loader(pairs, DataSpec(ImageSpec(size=24, pictures=pictures), None), None, 14, **options)
    (alone,) = make_loader(single, DataSpec(ImageSpec(size=24), None), None, 14 * pictures, **options)
    assert batch["image"].shape == (14, pictures, 3, 24, 24) and batch["crop"].shape == (14, pictures, 5)
    assert torch.equal(batch["image"].flatten(0, 1), alone["image"]) and torch.equal(batch["crop"].flatten(0, 1), alone["crop"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_draws_for_each_picture(tmp_path, backend):
    def twice(i, members):  # both pictures are the same
        return {"0.jpg": encoded(i), "1.png": encoded(i, "PNG")}

    pairs, _ = write(tmp_path, twice)
    augment = AugmentSpec(rand_augment=RandAugmentSpec(2, 5))
    spec = DataSpec(ImageSpec(size=24, pictures=2, scale=[0.2, 0.8], mirror=0.5, augment=augment), None)
    loader = make_loader(pairs, spec, None, 4, train=True, backend=backend)
    batches = list(islice(loader, 6))
    for batch in batches:
        assert batch["image"].shape == (4, 2, 3, 24, 24) and batch["warp"].shape == (4, 2, 2, 3)
        assert (batch["crop"][:, 0] != batch["crop"][:, 1]).any(1).all()
    mirrored = torch.cat([batch["crop"][:, :, 4] for batch in batches])
    assert len({tuple(row) for row in mirrored.tolist()}) == 4  # independently
    again = make_loader(pairs, spec, None, 4, train=True, backend=backend)
    for _ in islice(again, 2):
        pass
    state = json.loads(json.dumps(again.state_dict()))
    resumed = make_loader(pairs, spec, None, 4, train=True, backend=backend)
    resumed.load_state_dict(state)
    for batch, other in zip(batches[2:], resumed, strict=False):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name
    one = make_loader(pairs, DataSpec(ImageSpec(size=24, pictures=1), None), None, 4, train=False, backend=backend)
    with pytest.raises(UserError, match="too few samples can be used"):  # they have no member jpg
        next(iter(one))


@pytest.mark.skipif(not HAS_DALI, reason="waits for the package nvidia-dali")
def test_back_ends_agree_and_views_stand_behind_the_pictures(tmp_path):
    pairs, _ = write(tmp_path)
    views = [ViewSpec(2, [0.5, 1.0]), ViewSpec(1, [0.2, 0.5], mirror=1.0)]
    image = ImageSpec(size=24, pictures=2, views=views, local_views=[ViewSpec(4, [0.1, 0.3])], local_size=12)
    both = [next(iter(make_loader(pairs, DataSpec(image, None), None, 5, train=True, backend=of))) for of in ("dali", "plain")]
    for batch in both:
        assert batch["image"].shape == (5, 2, 3, 3, 24, 24) and batch["image_local"].shape == (5, 2, 4, 3, 12, 12)
        assert batch["crop"].shape == (5, 2, 3, 5) and batch["crop_local"].shape == (5, 2, 4, 5)
        assert (batch["crop"][:, :, 2, 4] == 1).all() and (batch["crop"][:, :, :2, 4] == 0).all()
    a, b = both
    assert torch.equal(a["crop"], b["crop"]) and torch.equal(a["crop_local"], b["crop_local"])
    assert (a["image"] - b["image"]).abs().mean() < 0.5 * LEVEL
    assert (a["image"] - b["image"].flip(1)).abs().mean() > 20 * LEVEL


@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_names_the_picture(tmp_path, backend):
    def damage(i, members):
        names = list(members)
        if i == 2:
            return {names[0]: members[names[0]]}
        if i == 5:
            return members | {names[1]: b"no picture"}
        if i == 7:
            return members | {names[0]: members[names[0]][:-200]}
        if i == 9:  # a PNG, so that it is found when it is decoded
            return {"0.png": cut(encoded(1, "PNG")), "1.png": cut(encoded(2, "PNG"))}
        return members

    def cut(content):
        return content[: len(content) // 2]

    pairs, _ = write(tmp_path, damage)
    loader = make_loader(pairs, DataSpec(ImageSpec(size=24, pictures=2), None), None, 5, train=False, backend=backend)
    batches = list(loader)
    assert [index for batch in batches for index in batch["index"].tolist()] == [0, 1, 3, 4, 6, 8, 10, 11, 12, 13]
    assert [len(batch["image"]) for batch in batches] == [5, 5]
    reasons = {name.partition(":")[2]: reason for name, reason in loader.skipped.items()}
    assert reasons.keys() == {"k02", "k05", "k07", "k09"}
    assert reasons["k02"] == "no picture (a member 1.jpg, 1.jpeg, 1.png, 1.webp, 1.bmp)"
    assert reasons["k05"] == "picture 1: not a picture in a known format"
    assert reasons["k07"] == "picture 0: the JPEG file is cut short" and reasons["k09"].startswith("picture 0: ")


def test_specifications_that_make_no_sense(tmp_path):
    for spec, message in (
        (ImageSpec(pictures=0), "pictures: expected at least 1, got 0"),
        (ImageSpec(pictures=2, boxes="boxes"), "boxes: of several pictures, expected none"),
    ):
        with pytest.raises(UserError, match=message):
            make_loader("x", DataSpec(spec, None), None, 4, train=True, backend="plain")


def test_verify_looks_at_each_picture(tmp_path):
    def damage(i, members):
        last = list(members)[1]
        return members | {last: members[last][: len(members[last]) // 2]} if i in (3, 8) else members

    pairs, _ = write(tmp_path, damage)
    report = verify(pairs)
    found = [pair for shard in report.shards for pair in shard.damaged]
    assert [key for key, _ in found] == ["k03", "k08"] and all(reason.startswith("1.") for _, reason in found)


def test_captions_in_a_list(tmp_path):
    """stats and verify take them as the loader's evaluation does."""
    with ShardWriter(tmp_path, "s") as writer:
        for i, captions in enumerate((["one two", "three"], [], ["a", 3])):
            writer.write(f"k{i}", {"jpg": encoded(i), "json": json.dumps({"caption": captions}).encode()})
    found = [pair for shard in verify(str(tmp_path)).shards for pair in shard.damaged]
    assert [key for key, _ in found] == ["k1", "k2"] and all(reason.startswith("no caption") for _, reason in found)
    assert stats(str(tmp_path)).words == [2, 1]  # "one two", "a"
