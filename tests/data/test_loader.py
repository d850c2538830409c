import gc
import io
import json
import logging
import struct
import subprocess
import sys
import threading
import time
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from vlpfast.data import ShardSet, ShardWriter, make_loader
from vlpfast.data import loader as loader_module
from vlpfast.data.order import epoch_order
from vlpfast.types import DataSpec, ImageSpec, Loader, TextSpec, UserError

HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="waits for the package nvidia-dali")
BACKENDS = [pytest.param("dali", marks=needs_dali), "plain"]
SPEC = DataSpec(ImageSpec(size=32, scale=[0.3, 1.0], mirror=0.5), TextSpec(12))
LEVEL = 1 / 255 / min(SPEC.image.std)  # one 8-bit level, in normalised pixels


class Characters:
    """A tokenizer small enough to be its own specification: one id a character."""

    vocab_size, pad_id, bos_id, eos_id = 300, 0, 1, 2

    def encode(self, texts, context_length):
        rows = [[1, *(3 + ord(c) % 256 for c in text[: context_length - 2]), 2] for text in texts]
        ids = torch.tensor([row + [0] * (context_length - len(row)) for row in rows])
        return ids, torch.tensor([[i < len(row) for i in range(context_length)] for row in rows])


def pixels(draw, width, height):
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(x / draw.uniform(3, 9)) * np.cos(y / draw.uniform(3, 9)) for _ in range(3)]
    return (np.stack(waves, -1) + draw.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def sample(draw, i):
    image = Image.fromarray(pixels(draw, *draw.integers(40, 90, 2)))
    name, kind = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP")][i % 4 if i % 3 == 0 else 0]
    return {name: encode(image, kind), "txt": f"picture {i}".encode(), "json": json.dumps({"number": i}).encode()}


def write(folder, samples, per_shard=8):
    with ShardWriter(folder, "s", samples_per_shard=per_shard) as writer:
        for i, members in enumerate(samples):
            writer.write(f"{i:04d}", members)
    return str(folder)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    draw = np.random.default_rng(0)
    return write(tmp_path_factory.mktemp("clean"), [sample(draw, i) for i in range(45)])


def cut_short(data, share):
    return data[: int(len(data) * share)]


DAMAGES = {
    "JPEG half": (lambda m: m | {"jpg": cut_short(m["jpg"], 0.5)}, "cut short"),
    "JPEG nearly whole": (lambda m: m | {"jpg": m["jpg"][:-1]}, "cut short"),
    "JPEG header": (lambda m: m | {"jpg": m["jpg"][:40]}, ""),
    "JPEG without a marker": (lambda m: m | {"jpg": b"\xff\xd8\xff" + bytes(500)}, ""),
    "PNG half": (lambda m: {"png": cut_short(to(m, "PNG"), 0.5), "txt": m["txt"]}, ""),
    "PNG checksum": (lambda m: {"png": flipped(to(m, "PNG")), "txt": m["txt"]}, ""),
    "WebP half": (lambda m: {"webp": cut_short(to(m, "WEBP"), 0.5), "txt": m["txt"]}, ""),
    "BMP half": (lambda m: {"bmp": cut_short(to(m, "BMP"), 0.5), "txt": m["txt"]}, ""),
    "progressive half": (lambda m: m | {"jpg": cut_short(to(m, "JPEG", progressive=True), 0.7)}, "cut short"),
    "empty": (lambda m: m | {"jpg": b""}, "empty"),
    "garbage": (lambda m: m | {"jpg": np.random.default_rng(1).bytes(700)}, "not a picture"),
    "text file": (lambda m: m | {"jpg": b"404 not found"}, "not a picture"),
    "bomb": (lambda m: {"png": bomb(), "txt": m["txt"]}, "MAX_IMAGE_PIXELS"),
    "no picture": (lambda m: {"txt": m["txt"]}, "no picture"),
    "no caption": (lambda m: {"jpg": m["jpg"]}, "no caption"),
    "caption not a text": (lambda m: {"jpg": m["jpg"], "json": b'{"caption": 3}'}, "no caption"),
    "caption not UTF-8": (lambda m: m | {"txt": b"caf\xe9"}, "not UTF-8"),
    "json broken": (lambda m: {"jpg": m["jpg"], "json": b'{"caption": '}, "json"),
    "json a list": (lambda m: {"jpg": m["jpg"], "json": b'["caption"]'}, "list"),
}


def to(members, kind, **options):
    return encode(Image.open(io.BytesIO(members["jpg"])), kind, **options)


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def png_chunks(width, height, bits, colour, rows):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bomb():
    return png_chunks(60_000, 60_000, 8, 2, bytes(100))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Every damage among whole samples, at the front, in the middle and at the end; and sound ones that look odd."""
    draw = np.random.default_rng(1)
    samples, bad = [], {}
    for name, (damage, reason) in DAMAGES.items():
        members = {"jpg": encode(Image.fromarray(pixels(draw, 70, 60)), "JPEG"), "txt": name.encode()}
        bad[len(samples)] = reason
        samples.append(damage(members))
        samples += [sample(draw, 4 * i) for i in range(len(bad) % 3 + 1)]
    samples.append({"jpg": encode(Image.fromarray(pixels(draw, 50, 50)), "JPEG"), "txt": b""})  # an empty caption is a caption
    samples.append({"jpg": encode(Image.fromarray(pixels(draw, 50, 50)), "JPEG"), "json": '{"caption": "aus é"}'.encode()})
    bad[len(samples)] = "cut short"
    samples.append({"jpg": samples[-1]["jpg"][:-100], "txt": b"last"})
    return write(tmp_path_factory.mktemp("damaged"), samples), bad, len(samples)


def take(loader, count):
    return [batch for _, batch in zip(range(count), loader, strict=False)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


def assert_close_pixels(a, b):
    """The tolerance that dali.py states. A wrong crop, mirror, filter or colour conversion is off by ten times as much."""
    difference = (a - b).abs() / LEVEL
    assert difference.mean() < 0.5
    assert difference[..., 2:-2, 2:-2].max() < 2.5
    assert difference.max() < 12


# --- what a batch holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_holds_the_documented_fields(clean, backend):
    loader = make_loader(clean, SPEC, Characters(), 8, train=False, backend=backend, with_meta=True)
    assert isinstance(loader, Loader) and len(loader) == 6 and loader.batch_size == 8
    batches = list(loader)
    assert [len(batch["key"]) for batch in batches] == [8, 8, 8, 8, 8, 5]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(45))
    for batch in batches:
        size = len(batch["key"])
        assert batch.keys() == {"image", "text", "text_mask", "index", "crop", "key", "meta"}
        assert batch["image"].shape == (size, 3, 32, 32) and batch["image"].dtype == torch.float32
        assert batch["image"].is_contiguous()
        assert batch["crop"].shape == (size, 5) and batch["crop"].dtype == torch.float32
        assert batch["index"].dtype == torch.int64
        assert batch["key"] == [f"{i:04d}" for i in batch["index"].tolist()]
        assert batch["meta"] == [{"number": i} for i in batch["index"].tolist()]
        ids, mask = Characters().encode([f"picture {i}" for i in batch["index"].tolist()], 12)
        assert torch.equal(batch["text"], ids) and torch.equal(batch["text_mask"], mask)
    assert loader.skipped == {}


@needs_dali
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [16, 32, 112])
@pytest.mark.parametrize("train", [True, False])
def test_back_ends_agree(clean, train, size, interpolation):
    spec = DataSpec(ImageSpec(size=size, scale=[0.3, 1.0], mirror=0.5, interpolation=interpolation), TextSpec(12))
    pairs = zip(
        *(make_loader(clean, spec, Characters(), 8, train=train, backend=backend) for backend in ("dali", "plain")),
        range(9),
        strict=False,
    )
    for dali, plain, _ in pairs:
        assert_close_pixels(dali.pop("image"), plain.pop("image"))
        assert_same(dali, plain)


def odd_pictures():
    draw = np.random.default_rng(2)
    rgb = Image.fromarray(pixels(draw, 61, 47))
    alpha = Image.fromarray(np.concatenate([np.asarray(rgb), draw.integers(0, 256, (47, 61, 1), np.uint8)], -1))
    exif = Image.Exif()
    exif[0x112] = 6  # to be shown turned by 90 degrees
    yield "grey jpg", "jpg", encode(rgb.convert("L"), "JPEG")
    yield "cmyk jpg", "jpg", encode(rgb.convert("CMYK"), "JPEG")
    yield "progressive jpg", "jpg", encode(rgb, "JPEG", progressive=True)
    yield "turned jpg", "jpg", encode(rgb, "JPEG", exif=exif)
    yield "turned png", "png", encode(rgb, "PNG", exif=exif)
    yield "turned webp", "webp", encode(rgb, "WEBP", exif=exif)
    yield "jpg with bytes behind it", "jpg", encode(rgb, "JPEG") + bytes(300)
    yield "grey png", "png", encode(rgb.convert("L"), "PNG")
    yield "black and white png", "png", encode(rgb.convert("1"), "PNG")
    yield "palette png", "png", encode(rgb.convert("P"), "PNG")
    yield "palette png with transparency", "png", encode(rgb.convert("P"), "PNG", transparency=3)
    yield "grey png with alpha", "png", encode(alpha.convert("LA"), "PNG")
    yield "png with alpha", "png", encode(alpha, "PNG")
    yield "16-bit grey png", "png", encode(Image.fromarray(draw.integers(0, 2**16, (47, 61), np.uint16)), "PNG")
    for colour, channels in ((2, 3), (6, 4)):
        rows = b"".join(b"\0" + draw.bytes(2 * channels * 61) for _ in range(47))
        yield f"16-bit png, {channels} channels", "png", png_chunks(61, 47, 16, colour, rows)
    yield "png without its last bytes", "png", encode(rgb, "PNG")[:-6]
    yield "lossless webp with alpha", "webp", encode(alpha, "WEBP", lossless=True, exact=True)
    yield "animated webp", "webp", encode(rgb, "WEBP", save_all=True, append_images=[alpha.convert("RGB")])
    yield "palette bmp", "bmp", encode(rgb.convert("P"), "BMP")
    yield "grey bmp", "bmp", encode(rgb.convert("L"), "BMP")
    yield "png named jpg", "jpg", encode(rgb, "PNG")
    yield "gif named jpg", "jpg", encode(rgb, "GIF")
    yield "tiff named jpg", "jpg", encode(rgb, "TIFF")
    for kind in ("JPEG", "PNG", "BMP"):
        yield f"one pixel, {kind}", "png", encode(rgb.crop((0, 0, 1, 1)), kind)
    yield "one row", "png", encode(rgb.crop((0, 0, 61, 1)), "PNG")


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_pictures_are_decoded(tmp_path, backend):
    """All formats as PIL reads them, in the orientation that is stored."""
    names, kinds, contents = zip(*odd_pictures(), strict=True)
    folder = write(tmp_path, [{kind: content} for kind, content in zip(kinds, contents, strict=True)])
    spec = ImageSpec(size=20)
    loader = make_loader(folder, DataSpec(spec, None), None, 5, train=False, backend=backend)
    images = torch.cat([batch["image"] for batch in loader])
    assert loader.skipped == {}
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    for name, content, image in zip(names, contents, images, strict=True):
        stored = Image.open(io.BytesIO(content))
        values = np.asarray(stored)
        if values.dtype == np.uint16:
            stored = Image.fromarray(np.rint(values / 257).astype(np.uint8))
        side = min(stored.size)
        x0, y0 = (stored.width - side) // 2, (stored.height - side) // 2
        view = stored.crop((x0, y0, x0 + side, y0 + side)).convert("RGB").resize((20, 20), Image.Resampling.BICUBIC)
        expected = (torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255 - mean) / std
        difference = (image - expected).abs() / LEVEL
        assert difference.mean() < 1 and difference.max() < 12, name


@needs_dali
def test_dali_starts_anew_for_unreadable_files_only(tmp_path, monkeypatch):
    from vlpfast.data.dali import DaliDecoder

    starts = []
    start = DaliDecoder._start
    monkeypatch.setattr(DaliDecoder, "_start", lambda self: (starts.append(1), start(self)))
    names, kinds, contents = zip(*odd_pictures(), strict=True)
    folder = write(tmp_path, [{kind: content} for kind, content in zip(kinds, contents, strict=True)])
    assert len(list(make_loader(folder, DataSpec(SPEC.image, None), None, 1, train=False, backend="dali"))) == len(names)
    assert len(starts) == 2  # the first one, and the PNG without its last bytes, which PIL takes for whole


# --- damage ----------------------------------------------------------------------------------------------------------


def expected_keys(count, bad, seed, batch_size, epochs, shard_sizes):
    """The training order without the damaged samples, in whole batches an epoch."""
    for epoch in range(epochs):
        good = [i for i in epoch_order(shard_sizes, seed, epoch, 16).tolist() if i not in bad]
        for at in range(0, len(good) - batch_size + 1, batch_size):
            yield [f"{i:04d}" for i in good[at : at + batch_size]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_samples_are_left_out_named_and_counted(damaged, backend, caplog):
    folder, bad, count = damaged
    loader = make_loader(folder, SPEC, Characters(), 7, train=True, seed=3, backend=backend)
    sizes = ShardSet(folder).shard_sizes
    expected = list(expected_keys(count, bad, 3, 7, 3, sizes))
    with caplog.at_level(logging.WARNING, "vlpfast.data.loader"):
        batches = take(loader, len(expected))
    assert [batch["key"] for batch in batches] == expected
    names = {ShardSet(folder).name(i): reason for i, reason in bad.items()}
    assert loader.skipped.keys() == names.keys()
    for name, reason in names.items():
        assert reason in loader.skipped[name]
        assert sum(f"{name}: " in message for message in caplog.messages) == 1
    pictures = [image for batch in batches for image in batch["image"]]
    assert all(image.std() > 0.1 for image in pictures)


@needs_dali
def test_back_ends_leave_out_the_same_samples_for_the_same_reasons(damaged):
    folder, bad, _ = damaged
    loaders = [make_loader(folder, SPEC, Characters(), 6, train=False, backend=backend) for backend in ("dali", "plain")]
    dali, plain = map(list, loaders)
    assert [batch["key"] for batch in dali] == [batch["key"] for batch in plain]
    assert loaders[0].skipped == loaders[1].skipped and len(loaders[0].skipped) == len(bad)


@needs_dali
def test_back_ends_agree_on_random_damage(tmp_path):
    """Cut, zeroed, shortened and flipped files of every kind: the same verdict, and the same pixels where there are any."""
    draw = np.random.default_rng(5)
    samples = []
    for kind, name, options in (
        ("JPEG", "jpg", {}), ("JPEG", "jpg", {"progressive": True}), ("PNG", "png", {}), ("WEBP", "webp", {}),
        ("WEBP", "webp", {"lossless": True}), ("BMP", "bmp", {}),
    ):  # fmt: skip
        for turn in range(24):
            data = bytearray(encode(Image.fromarray(pixels(draw, 60, 50)), kind, **options))
            at = int(draw.integers(2, len(data)))
            if turn % 4 == 0:
                del data[at:]
            elif turn % 4 == 1:
                data[at : at + 40] = bytes(len(data[at : at + 40]))
            elif turn % 4 == 2:
                del data[at : at + 40]
            else:
                data[at] ^= 1 << int(draw.integers(8))
            samples.append({name: bytes(data)})
    folder = write(tmp_path, samples, per_shard=100)
    spec = DataSpec(SPEC.image, None)
    loaders = [make_loader(folder, spec, None, 1, train=False, backend=backend) for backend in ("dali", "plain")]
    dali, plain = map(list, loaders)
    assert loaders[0].skipped.keys() == loaders[1].skipped.keys() and 40 < len(loaders[0].skipped) < 130
    for a, b in zip(dali, plain, strict=True):
        difference = (a["image"] - b["image"]).abs() / LEVEL
        assert difference.mean() < 1


def test_an_epoch_of_damage_is_an_error(tmp_path):
    folder = write(tmp_path, [{"jpg": b"nothing", "txt": b"x"}] * 9)
    for train in (True, False):
        with pytest.raises(UserError, match=r"9 damaged|9 of|s-000000.tar:\d{4}: not a picture"):
            next(iter(make_loader(folder, SPEC, Characters(), 4, train=train, backend="plain")))


def test_too_much_damage_for_a_batch_is_an_error(clean, tmp_path):
    draw = np.random.default_rng(0)
    folder = write(tmp_path, [sample(draw, i) for i in range(3)] + [{"jpg": b"", "txt": b""}] * 3)
    with pytest.raises(UserError, match="too few samples"):
        next(iter(make_loader(folder, SPEC, Characters(), 4, train=True, backend="plain")))
    assert len(take(make_loader(folder, SPEC, Characters(), 4, train=False, backend="plain"), 9)) == 1


# --- position --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("data", ["clean", "damaged"])
def test_resuming_gives_the_rest_exactly(request, data, backend):
    folder = request.getfixturevalue(data)
    folder = folder if data == "clean" else folder[0]

    def loader():
        return make_loader(folder, SPEC, Characters(), 6, train=True, seed=9, backend=backend)

    first = loader()
    steps = int(2.3 * len(first))
    states, batches, iterator = [json.dumps(first.state_dict())], [], iter(first)
    for _ in range(steps):
        batches.append(next(iterator))
        states.append(json.dumps(first.state_dict()))
        if len(batches) == 4:
            time.sleep(0.3)  # let the work run ahead of the position
    assert len({json.loads(state)["epoch"] for state in states}) >= 3
    for cut in (0, 1, 4, len(first) - 1, len(first), len(first) + 2, steps - 1):
        again = loader()
        again.load_state_dict(json.loads(states[cut]))
        assert json.dumps(again.state_dict()) == states[cut]
        iterator = iter(again)
        for batch, state in zip(batches[cut:], states[cut + 1 :], strict=True):
            assert_same(batch, next(iterator))
            assert json.dumps(again.state_dict()) == state


def test_position_counts_batches_handed_out(clean):
    loader = make_loader(clean, SPEC, Characters(), 5, train=True, backend="plain")
    iterator = iter(loader)
    for step in range(1, 13):
        next(iterator)
        time.sleep(0.02)
        state = loader.state_dict()
        assert (state["epoch"], state["cursor"]) == ((step - 1) // 9, 5 * ((step - 1) % 9 + 1))


def test_training_goes_on_and_evaluation_begins_anew(clean):
    train = make_loader(clean, SPEC, Characters(), 6, train=True, backend="plain")
    whole = take(train, 6)
    train = make_loader(clean, SPEC, Characters(), 6, train=True, backend="plain")
    halves = [next(iter(train)) for _ in range(6)]
    for a, b in zip(whole, halves, strict=True):
        assert_same(a, b)
    evaluation = make_loader(clean, SPEC, Characters(), 6, train=False, backend="plain")
    next(iter(evaluation))
    assert len(list(evaluation)) == len(list(evaluation)) == 8
    take(evaluation, 3)
    state = evaluation.state_dict()
    assert state["cursor"] == 18
    evaluation.load_state_dict(state)
    assert [len(batch["key"]) for batch in evaluation] == [6, 6, 6, 6, 3]
    assert len(list(evaluation)) == 8


def test_a_state_of_other_data_is_refused(clean, tmp_path):
    state = make_loader(clean, SPEC, Characters(), 6, train=True, seed=1, backend="plain").state_dict()
    draw = np.random.default_rng(0)
    other = write(tmp_path, [sample(draw, i) for i in range(20)])
    with pytest.raises(UserError, match="fingerprint"):
        make_loader(other, SPEC, Characters(), 6, train=True, seed=1, backend="plain").load_state_dict(state)
    with pytest.raises(UserError, match=r"seed 1\b.* 2\b"):
        make_loader(clean, SPEC, Characters(), 6, train=True, seed=2, backend="plain").load_state_dict(state)
    with pytest.raises(UserError, match=r"world_size 1\b.* 2\b"):
        make_loader(clean, SPEC, Characters(), 6, train=True, seed=1, world_size=2, backend="plain").load_state_dict(state)
    with pytest.raises(UserError, match=r"window 16\b.* 3\b"):
        make_loader(clean, SPEC, Characters(), 6, train=True, seed=1, window=3, backend="plain").load_state_dict(state)


def test_every_epoch_has_its_own_crops(clean):
    loader = make_loader(clean, SPEC, Characters(), 45, train=True, backend="plain")
    first, second = ({key: crop for key, crop in zip(batch["key"], batch["crop"], strict=True)} for batch in take(loader, 2))
    assert first.keys() == second.keys()
    assert sum(torch.equal(first[key], second[key]) for key in first) < 5


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_data(clean, world_size):
    def loaders(train, batch_size):
        return [
            make_loader(clean, SPEC, Characters(), batch_size, train=train, rank=rank, world_size=world_size, backend="plain")
            for rank in range(world_size)
        ]

    parts = loaders(True, 4)
    assert len({len(part) for part in parts}) == 1
    seen = [key for part in parts for batch in take(part, len(part)) for key in batch["key"]]
    assert len(seen) == len(set(seen)) == 45 // world_size // 4 * 4 * world_size
    seen = [key for part in loaders(False, 4) for batch in part for key in batch["key"]]
    assert sorted(seen) == [f"{i:04d}" for i in range(45)]


# --- options, errors, threads ------------------------------------------------------------------------------------------


def test_modalities_are_left_out(clean):
    text = next(iter(make_loader(clean, DataSpec(None, TextSpec(12)), Characters(), 4, train=True)))
    assert text.keys() == {"text", "text_mask", "index", "key"}
    image = next(iter(make_loader(clean, DataSpec(SPEC.image, None), None, 4, train=True, backend="plain")))
    assert image.keys() == {"image", "crop", "index", "key"}


def test_wrong_calls_are_refused(clean):
    with pytest.raises(UserError, match="nearest"):
        make_loader(clean, DataSpec(ImageSpec(interpolation="nearest"), None), None, 4, train=True)
    with pytest.raises(UserError, match="scale"):
        make_loader(clean, DataSpec(ImageSpec(scale=[1.0, 0.5]), None), None, 4, train=True)
    with pytest.raises(UserError, match="fastest"):
        make_loader(clean, SPEC, Characters(), 4, train=True, backend="fastest")
    with pytest.raises(UserError, match=r"45 samples .* 46"):
        make_loader(clean, SPEC, Characters(), 46, train=True)
    with pytest.raises(UserError, match=r"2 ranks of 23"):
        make_loader(clean, SPEC, Characters(), 23, train=True, world_size=2)
    with pytest.raises(UserError, match="absent"):
        make_loader(clean + "/absent*.tar", SPEC, Characters(), 4, train=True)
    with pytest.raises(ValueError, match="rank"):
        make_loader(clean, SPEC, Characters(), 4, train=True, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size"):
        make_loader(clean, SPEC, Characters(), 0, train=True)
    with pytest.raises(ValueError, match="tokenizer"):
        make_loader(clean, SPEC, None, 4, train=True)
    with pytest.raises(ValueError, match="modalities"):
        make_loader(clean, DataSpec(None, None), None, 4, train=True)


def test_without_dali(clean, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vlpfast.data.dali", None)
    loader_module._choose.cache_clear()
    try:
        with pytest.raises(UserError, match=r"pip install vlpfast\[dali\]"):
            make_loader(clean, SPEC, Characters(), 4, train=True, backend="dali")
        for _ in range(2):
            assert next(iter(make_loader(clean, SPEC, Characters(), 4, train=True, backend="auto")))["image"].std() > 0.1
        assert sum("DALI is not installed" in message for message in caplog.messages) == 1
    finally:
        loader_module._choose.cache_clear()


def test_import_is_light():
    code = "import sys, vlpfast.data; print(sorted({'nvidia', 'tokenizers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_end_with_the_iteration(clean, backend):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("vlpfast")]

    loader = make_loader(clean, SPEC, Characters(), 4, train=True, backend=backend)
    assert not threads()
    iterator = iter(loader)
    next(iterator)
    assert threads()
    loader.close()
    assert not threads() and next(iterator, None) is None
    next(iter(loader))
    assert not threads()
    for _ in loader:
        break
    assert not threads()
    iterator, loader = iter(loader), None
    next(iterator)
    assert threads()
    del iterator
    gc.collect()
    assert not threads()


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_the_working_thread_reach_the_caller(clean, backend):
    class Breaking(Characters):
        calls = 0

        def encode(self, texts, context_length):
            self.calls += 1
            if self.calls == 3:
                raise ZeroDivisionError("in the tokenizer")
            return super().encode(texts, context_length)

    seen = 0
    with pytest.raises(ZeroDivisionError, match="in the tokenizer"):
        for _ in make_loader(clean, SPEC, Breaking(), 4, train=True, backend=backend):
            seen += 1
    assert seen < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlpfast")]


@needs_dali
def test_batches_kept_by_the_caller_stay_as_they_are(clean):
    kept = [(batch["image"], batch["image"].clone()) for batch in take(make_loader(clean, SPEC, Characters(), 4, train=True), 20)]
    assert all(torch.equal(image, copy) for image, copy in kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_may_end_in_the_middle_of_an_iteration(clean, backend):
    code = f"""
from vlpfast.data import make_loader
from vlpfast.types import DataSpec, ImageSpec
iterator = iter(make_loader({clean!r}, DataSpec(ImageSpec(32), None), None, 4, train=True, backend={backend!r}))
next(iterator)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_on_a_gpu(clean, device):
    """The samples and crops of the CPU; nvJPEG's pixels differ by a few levels, and stay while later batches come."""
    loader = make_loader(clean, SPEC, Characters(), 4, train=True, backend="dali", device=device)
    batches = take(loader, 12)
    copies = [batch["image"].cpu() for batch in batches]
    for batch, copy, other in zip(
        batches, copies, make_loader(clean, SPEC, Characters(), 4, train=True, backend="dali"), strict=False
    ):
        assert batch["image"].device == batch["text"].device == torch.device("cuda:0")
        assert batch["index"].device == batch["crop"].device == torch.device("cpu")
        assert torch.equal(batch["image"].cpu(), copy)
        assert (copy - other["image"]).abs().mean() < 2 * LEVEL
        assert torch.equal(batch["text"].cpu(), other["text"]) and torch.equal(batch["crop"], other["crop"])


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_made_ahead_are_the_same(clean, ahead):
    def indices(**options):
        loader = make_loader(clean, SPEC, Characters(), 4, train=True, backend="plain", **options)
        found = [batch["index"].tolist() for batch, _ in zip(loader, range(9), strict=False)]
        loader.close()
        return found

    assert indices(ahead=ahead) == indices()
    with pytest.raises(ValueError, match="ahead: expected at least 1, got 0"):
        make_loader(clean, SPEC, Characters(), 4, train=True, ahead=0)
