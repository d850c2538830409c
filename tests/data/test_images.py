import io
import itertools
import json
import logging
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from vlpfast.data import ShardWriter, make_loader
from vlpfast.data import plain as plain_module
from vlpfast.data.images import ImageModality
from vlpfast.data.modality import Draws, Modality
from vlpfast.data.views import plan_view
from vlpfast.types import AugmentSpec, ColorJitterSpec, DataSpec, ImageSpec, RandAugmentSpec, UserError, ViewSpec

HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="waits for the package nvidia-dali")
BACKENDS = [pytest.param("dali", marks=needs_dali), "plain"]
LEVEL = 1 / 255 / min(ImageSpec().std)  # one 8-bit level, in normalised pixels

STRONG = AugmentSpec(ColorJitterSpec(), grayscale=0.2, blur=0.5, solarize=0.2, rand_augment=RandAugmentSpec(2, 7, "albef"))
WEAK, WIDE = ViewSpec(1, [0.5, 1.0]), ViewSpec(2, [0.2, 1.0], mirror=0.5, augment=STRONG)
SMALL = ViewSpec(3, [0.05, 0.4], mirror=0.5, augment=AugmentSpec(blur=0.5, blur_sigma=[0.1, 1.0]))
MANY = ImageSpec(size=32, views=[WEAK, WIDE], local_views=[SMALL], local_size=16)


def encode(pixels, kind, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def waves(draw, width, height):
    y, x = np.mgrid[:height, :width]
    colours = [127 + 100 * np.sin(x / draw.uniform(3, 9)) * np.cos(y / draw.uniform(3, 9)) for _ in range(3)]
    return (np.stack(colours, -1) + draw.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)


def write(folder, samples):
    with ShardWriter(folder, "s", samples_per_shard=10) as writer:
        for i, members in enumerate(samples):
            writer.write(f"{i:03d}", members)
    return str(folder)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    draw = np.random.default_rng(0)
    kinds = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
    samples = []
    for i in range(24):
        width, height = draw.integers(40, 90, 2).tolist()
        name, kind = kinds[i % 3]
        record = {"boxes": [[0, 0, width, height]] * (i % 3)}
        samples.append({name: encode(waves(draw, width, height), kind), "json": json.dumps(record).encode()})
    return write(tmp_path_factory.mktemp("clean"), samples)


def take(spec, folder, count, *, batch_size=8, train=True, **options):
    loader = make_loader(folder, DataSpec(spec, None), None, batch_size, train=train, **options)
    return list(itertools.islice(loader, count))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


def assert_close_pixels(a, b, crop):
    """The tolerance that dali.py states: a few levels more along the border of what was cut out, wherever it lies."""
    difference = ((a - b).abs() / LEVEL).flatten(0, -4)  # [n, 3, S, S]
    assert difference.mean() < 0.5
    assert difference.max() < 12
    size = difference.shape[-1]
    for one, (x0, y0, w, h, flipped) in zip(difference, crop.flatten(0, -2).tolist(), strict=True):
        ends = []
        for low, extent in ((y0, h), (x0, w)):
            # in a padded view [0, 1] of the picture ends inside of the view, of a crop nothing does
            ends.append((round(max(0, -low / extent) * size), round(min(1, (1 - low) / extent) * size)))
        (top, bottom), (left, right) = ends
        one = one.flip(2) if flipped else one
        assert one[:, top + 2 : bottom - 2, left + 2 : right - 2].max() < 2.5


# --- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_views(clean, backend):
    (batch,) = take(MANY, clean, 1, backend=backend)
    assert batch.keys() == {"image", "image_local", "crop", "crop_local", "warp", "index", "key"}
    assert batch["image"].shape == (8, 3, 3, 32, 32) and batch["image"].dtype == torch.float32
    assert batch["image_local"].shape == (8, 3, 3, 16, 16)
    assert batch["crop"].shape == batch["crop_local"].shape == (8, 3, 5) and batch["warp"].shape == (8, 3, 2, 3)
    assert (batch["warp"][:, 0] == torch.eye(2, 3)).all() and (batch["warp"][:, 1:] != torch.eye(2, 3)).any()
    for name in ("image", "image_local", "crop", "crop_local"):
        views = batch[name].flatten(2)
        for a, b in itertools.combinations(range(3), 2):
            assert (views[:, a] != views[:, b]).any(1).all(), name
    areas = [batch[name][..., 2] * batch[name][..., 3] for name in ("crop", "crop_local")]
    assert areas[0][:, 0].min() > 0.45 and areas[0].min() > 0.18 and areas[1].max() < 0.45  # pixels are whole


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_view_is_the_view_alone(clean, backend):
    """Further views change nothing about it: not its draws, nor its pixels, whatever part of the picture is decoded."""
    alone = ImageSpec(size=32, scale=[0.2, 0.6], mirror=0.5)
    among = ImageSpec(size=32, views=[ViewSpec(1, [0.2, 0.6], mirror=0.5), WEAK], local_views=[ViewSpec(2)], local_size=8)
    for a, b in zip(take(alone, clean, 4, backend=backend), take(among, clean, 4, backend=backend), strict=True):
        assert torch.equal(a["image"], b["image"][:, 0]) and torch.equal(a["crop"], b["crop"][:, 0])


def test_views_are_a_function_of_seed_epoch_and_index(clean):
    def by_index(batches):
        return {int(i): (batch["image"][row], batch["crop"][row]) for batch in batches for row, i in enumerate(batch["index"])}

    here = by_index(take(MANY, clean, 3, backend="plain", seed=1))
    other_batches = by_index(take(MANY, clean, 4, batch_size=6, backend="plain", seed=1, threads=1))
    assert here.keys() == other_batches.keys() == set(range(24))
    for i, (image, crop) in here.items():
        assert torch.equal(crop, other_batches[i][1])
        assert torch.equal(image, other_batches[i][0])
    next_epoch = by_index(take(MANY, clean, 6, backend="plain", seed=1)[3:])
    other_seed = by_index(take(MANY, clean, 3, backend="plain", seed=2))
    for other in (next_epoch, other_seed):
        assert sum(torch.equal(here[i][1], other[i][1]) for i in range(24)) < 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_resuming_in_the_middle_gives_the_same_bits(clean, backend):
    spec = ImageSpec(size=32, views=[WEAK, WIDE], local_views=[SMALL], local_size=16, boxes="boxes")

    def loader():
        return make_loader(clean, DataSpec(spec, None), None, 5, train=True, seed=4, backend=backend)

    first = loader()
    states, batches = [], []
    for batch in itertools.islice(first, 9):
        batches.append(batch)
        states.append(json.dumps(first.state_dict()))
    assert json.loads(states[-1])["epoch"] == 2
    for cut in (1, 5, 7):
        again = loader()
        again.load_state_dict(json.loads(states[cut]))
        for batch, expected in zip(again, batches[cut + 1 :], strict=False):
            assert_same(batch, expected)


def test_evaluation_shows_one_view_without_random_choices(clean):
    spec = ImageSpec(32, views=[WIDE], local_views=[SMALL], local_size=16, augment=STRONG, mirror=1.0)
    for batch, expected in zip(
        take(spec, clean, 3, train=False, backend="plain"),
        take(ImageSpec(32), clean, 3, train=False, backend="plain"),
        strict=True,
    ):
        assert_same(batch, expected)


def test_a_picture_is_decoded_once(clean, monkeypatch):
    calls = []
    decode = plain_module.decode_rgb
    monkeypatch.setattr(plain_module, "decode_rgb", lambda *given: (calls.append(1), decode(*given))[1])
    assert len(take(MANY, clean, 3, train=True, backend="plain")) == 3
    assert 24 <= len(calls) <= 24 + 4 * 8  # those in flight beside


# --- back ends --------------------------------------------------------------------------------------------------------


@needs_dali
@pytest.mark.parametrize(
    "train, spec",
    [
        (True, ImageSpec(32, views=[ViewSpec(2, [0.2, 1.0], mirror=0.5)], local_views=[ViewSpec(3, [0.05, 0.4])], local_size=16)),
        (True, ImageSpec(33, resize="pad", random_crop=False, mirror=0.5)),
        (True, ImageSpec(32, resize="squash", random_crop=False, views=[ViewSpec(1), ViewSpec(1, mirror=1.0)])),
        (True, ImageSpec(32, resize="crop", random_crop=False)),
        (False, ImageSpec(33, resize="pad", interpolation="bilinear")),
        (False, ImageSpec(100, resize="pad")),
        (False, ImageSpec(32, resize="squash")),
        (True, ImageSpec(32, scale=[0.3, 1.0], augment=AugmentSpec(grayscale=0.5))),
        (True, ImageSpec(32, resize="pad", random_crop=False, augment=AugmentSpec(blur=0.5), boxes="boxes")),
    ],
)
def test_back_ends_agree(clean, train, spec):
    for dali, plain in zip(*(take(spec, clean, 3, train=train, backend=backend) for backend in ("dali", "plain")), strict=True):
        for name, crop in (("image", "crop"), ("image_local", "crop_local")):
            if name in plain:
                assert_close_pixels(dali.pop(name), plain.pop(name), plain[crop])
        assert_same(dali, plain)


@needs_dali
def test_back_ends_agree_under_strong_augmentation(clean):
    """One code augments what both decode. It multiplies the few levels that the decoders differ by, more where it equalises."""
    for dali, plain in zip(*(take(MANY, clean, 3, backend=backend) for backend in ("dali", "plain")), strict=True):
        for name in ("image", "image_local"):
            difference = (dali.pop(name) - plain.pop(name)).abs() / LEVEL
            assert difference.mean() < 1.5 and (difference > 12).float().mean() < 0.01
        assert_same(dali, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unaugmented_samples_of_an_augmented_batch(clean, backend):
    """Pixels that nothing is done to are those of a loader without augmentation, but for rounding."""
    pair = [take(ImageSpec(32, augment=spec), clean, 2, backend=backend) for spec in (AugmentSpec(grayscale=1e-9), AugmentSpec())]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a["image"], b["image"], atol=1e-5, rtol=0)


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding(tmp_path, backend):
    """The longer side fills the view, the colour around is the mean's nearest level, a flip takes the border along."""
    white = (
        {"png": encode(np.full((20, 61, 3), 255, np.uint8), "PNG")},
        {"png": encode(np.full((61, 9, 3), 255, np.uint8), "PNG")},
    )
    folder = write(tmp_path, white)
    spec = ImageSpec(32, resize="pad")
    (batch,) = take(spec, folder, 1, batch_size=2, train=False, backend=backend)
    levels = (batch["image"] * torch.tensor(spec.std)[:, None, None] + torch.tensor(spec.mean)[:, None, None]) * 255
    around = torch.tensor(spec.mean) * 255
    for image, (x0, y0, w, h) in zip(levels, ([0, 11, 32, 10], [13, 0, 5, 32]), strict=True):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[y0 : y0 + h, x0 : x0 + w] = True
        assert (image[:, inside] - 255).abs().max() < 1
        assert (image[:, ~inside] - around[:, None]).abs().max() < 0.51
    expected = [[0, -11 / 10, 1, 32 / 10, 0], [-13 / 5, 0, 32 / 5, 1, 0]]
    torch.testing.assert_close(batch["crop"], torch.tensor(expected))
    flipped = ImageSpec(32, resize="pad", random_crop=False, mirror=1.0)
    (other,) = take(flipped, folder, 1, batch_size=2, backend=backend)
    assert torch.equal(other["image"][other["index"].argsort()], batch["image"].flip(3))
    assert (other["crop"][:, 4] == 1).all()


def test_a_thin_picture_keeps_a_pixel():
    sizes = np.array([[5000, 1], [1, 5000], [3, 3]])
    view = plan_view(ImageSpec(32, resize="pad"), ViewSpec(), 0, 32, sizes, Draws(0, 0, np.arange(3), False))
    assert view.places.tolist() == [[0, 15, 32, 1], [15, 0, 1, 32], [0, 0, 32, 32]]
    assert view.rectangles.tolist() == [[0, 0, 5000, 1], [0, 0, 1, 5000], [0, 0, 3, 3]]


def test_without_random_crops_training_shows_what_evaluation_does(clean):
    for resize in ("crop", "squash", "pad"):
        spec = ImageSpec(32, resize=resize, random_crop=False)
        (train,) = take(spec, clean, 1, batch_size=24, backend="plain")
        (evaluation,) = take(spec, clean, 1, batch_size=24, train=False, backend="plain")
        order = train["index"].argsort()
        for name in ("image", "crop"):
            assert torch.equal(train[name][order], evaluation[name])


def test_squashing_shows_all_of_the_picture(clean):
    spec = ImageSpec(24, resize="squash")
    loader = make_loader(clean, DataSpec(spec, None), None, 8, train=False, backend="plain")
    batch = next(iter(loader))
    assert (batch["crop"] == torch.tensor([0.0, 0, 1, 1, 0])).all()
    for image, picture in zip(batch["image"], loader._shards.read(range(8), ("jpg", "png", "webp")), strict=True):
        view = Image.open(io.BytesIO(picture.tobytes())).convert("RGB").resize((24, 24), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255
        expected = (expected - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
        torch.testing.assert_close(image, expected, atol=2e-6, rtol=1e-5)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_with_several_views(tmp_path, backend, caplog):
    """Each picture has a colour of its own, so that a wrong pair would be seen."""
    samples = []
    for i in range(20):
        data = encode(np.full((40, 50, 3), 10 * i, np.uint8) ^ np.uint8(1), "PNG", compress_level=0)
        samples.append({"png": data[:-400] if i in (0, 5, 6, 19) else data})
    header = bytearray(samples[11]["png"])
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # an image bomb
    samples[11]["png"] = bytes(header)
    spec = ImageSpec(16, [0.0] * 3, [1.0] * 3, views=[ViewSpec(2, [0.2, 1.0])], local_views=[ViewSpec(1)], local_size=8)
    folder = write(tmp_path, samples)
    loader = make_loader(folder, DataSpec(spec, None), None, 4, train=True, backend=backend)
    with caplog.at_level(logging.ERROR):
        batches = list(itertools.islice(loader, 6))
    for batch in batches:
        assert not set(batch["index"].tolist()) & {0, 5, 6, 11, 19}
        level = ((10 * batch["index"]) ^ 1).float()
        for name in ("image", "image_local"):
            assert ((255 * batch[name]).flatten(1) - level[:, None]).abs().max() < 1.5
    assert len(loader.skipped) == 5 and any("MAX_IMAGE_PIXELS" in reason for reason in loader.skipped.values())


# --- options ----------------------------------------------------------------------------------------------------------


def test_it_is_a_modality():
    modality: Modality = ImageModality(MANY, 1, 2, torch.device("cpu"), "plain")
    modality.reset()
    modality.close()


def test_options_come_from_yaml():
    text = """
    size: 64
    augment: {color_jitter: {brightness: 0.2, prob: 0.5}, grayscale: 0.2}
    views:
      - {scale: [0.5, 1.0]}
      - {count: 2, scale: [0.08, 1.0], mirror: 0.5, augment: {blur: 0.5, rand_augment: {magnitude: 7, recipe: albef}}}
    local_views: [{count: 6, scale: [0.05, 0.4]}]
    """
    spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ImageSpec), OmegaConf.create(text)))
    strong = AugmentSpec(blur=0.5, rand_augment=RandAugmentSpec(magnitude=7, recipe="albef"))
    assert spec == ImageSpec(
        64,
        augment=AugmentSpec(ColorJitterSpec(0.2, prob=0.5), grayscale=0.2),
        views=[ViewSpec(1, [0.5, 1.0]), ViewSpec(2, [0.08, 1.0], mirror=0.5, augment=strong)],
        local_views=[ViewSpec(6, [0.05, 0.4])],
    )
    with pytest.raises(Exception, match="colour_jitter"):
        OmegaConf.merge(OmegaConf.structured(ImageSpec), OmegaConf.create("augment: {colour_jitter: {}}"))


@pytest.mark.parametrize(
    "spec, message",
    [
        (ImageSpec(resize="stretch"), 'resize: expected "crop", "squash" or "pad", got \'stretch\''),
        (ImageSpec(size=0), "size: "),
        (ImageSpec(local_size=0), "local_size: "),
        (ImageSpec(scale=[0.5]), r"^scale: .*\[0\.5\]"),
        (ImageSpec(mirror=1.5), "^mirror: "),
        (ImageSpec(views=[ViewSpec(), ViewSpec(count=0)]), r"^views\[1\]\.count: .*0"),
        (ImageSpec(local_views=[ViewSpec(ratio=[2.0, 1.0])]), r"^local_views\[0\]\.ratio: "),
        (
            ImageSpec(local_views=[ViewSpec(augment=AugmentSpec(blur=1, blur_sigma=[1.0, 4.0]))], local_size=12),
            r"^local_views.*12",
        ),
        (ImageSpec(masks="m"), "masks: 'm' needs boxes"),
        (ImageSpec(boxes="b", max_boxes=0), "max_boxes: "),
        (ImageSpec(boxes="b", min_visible=2.0), "min_visible: "),
    ],
)
def test_wrong_specs_are_refused_at_once(clean, spec, message):
    with pytest.raises(UserError, match=message):
        make_loader(clean, DataSpec(spec, None), None, 4, train=True, backend="plain")


@needs_dali
@pytest.mark.gpu
def test_on_a_gpu(clean):
    """The views and augmentations of the CPU; nvJPEG's pixels differ by a few levels."""
    spec = ImageSpec(size=32, views=[WEAK, WIDE], local_views=[SMALL], local_size=16, boxes="boxes")
    batches = take(spec, clean, 4, backend="dali", device="cuda")
    for batch, other in zip(batches, take(spec, clean, 4, backend="dali"), strict=True):
        for name in ("image", "image_local"):
            assert batch[name].is_cuda
            assert ((batch[name].cpu() - other[name]).abs() / LEVEL).mean() < 4
        for name in ("crop", "crop_local", "warp"):
            assert torch.equal(batch[name], other[name])
        assert torch.equal(batch["boxes"].cpu(), other["boxes"]) and batch["boxes"].is_cuda
