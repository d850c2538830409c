import itertools
import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlpfast.data import ShardWriter, make_loader
from vlpfast.data import volumes as volumes_module
from vlpfast.data.modality import Draws
from vlpfast.data.pictures import DamagedBatch, DamagedSample
from vlpfast.data.volume_file import MAGIC, PERCENTILES, encode_volume, read_header, read_labels, read_slices
from vlpfast.data.volumes import VolumeModality, plan_axis, plan_views
from vlpfast.types import DataSpec, UserError, VolumeSpec

SPACING = (2.5, 0.8, 0.7)  # D, H, W mm
FUZZ = int(os.environ.get("VLPFAST_FUZZ", "150"))  # bytes that are changed
RAW = [[0.5, 1.0]]  # a window in which 0 .. 1 stays as it is


def bytes_of(content):
    return np.frombuffer(content, np.uint8)


def affine_of(spacing=SPACING):
    return np.diag([*spacing[::-1], 1.0])


def volume(shape=(9, 12, 11), dtype=np.int16, seed=0, **options):
    """-> voxels, the member's bytes"""
    generator = np.random.default_rng(seed)
    if dtype == np.float32:
        voxels = generator.random(shape, np.float32)
    else:
        voxels = generator.integers(0, 200 if dtype == np.uint8 else 1500, shape).astype(dtype)
    return voxels, encode_volume(voxels, affine_of(options.pop("spacing", SPACING)), **options)


def draws(index=(0,), train=True, seed=3, epoch=1):
    return Draws(seed, epoch, np.array(index, np.int64), train)


def views(spec, contents, taken, threads=2):
    """One batch through the modality -> all its fields."""
    modality = VolumeModality(spec, threads, len(contents), torch.device("cpu"))
    try:
        contents = [bytes_of(content) for content in contents]
        infos = [modality.inspect(content, {}) for content in contents]
        fields = modality.submit(contents, infos, [{}] * len(contents), taken)
        return fields | modality.receive()
    finally:
        modality.close()


# --- the file ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.dtype(">i2")])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_file_round_trip(dtype, level):
    shape = (5, 6, 7)
    voxels = (np.random.default_rng(1).random(shape) * 255).astype(dtype)
    if np.dtype(dtype).itemsize == 2:
        voxels[0, 0, :2] = np.iinfo(dtype).min, np.iinfo(dtype).max
    labels = np.arange(210, dtype=np.uint8).reshape(shape)
    affine = np.array([[0.7, 0.1, 0, -20], [0, 0.8, 0, 3.5], [0, 0, 2.5, 1e3], [0, 0, 0, 1]])
    content = encode_volume(voxels, affine, slope=0.25, intercept=-7.0, modality="MR", labels=labels, level=level)
    assert content == encode_volume(voxels, affine, slope=0.25, intercept=-7.0, modality="MR", labels=labels, level=level)
    info = read_header(bytes_of(content))
    assert info.shape == shape and info.begin % 64 == 0 and (info.slope, info.intercept, info.modality) == (0.25, -7.0, "MR")
    assert np.array_equal(info.affine, affine) and np.allclose(info.spacing, (2.5, np.hypot(0.1, 0.8), 0.7))
    every = [np.arange(length) for length in shape]
    read = read_slices(bytes_of(content), info, *every)
    assert np.array_equal(read, voxels) and read.dtype.isnative
    some = [np.array([4, 1, 1, 3]), np.array([2, 3]), np.array([6, 0, 2])]
    assert np.array_equal(read_slices(bytes_of(content), info, *some), voxels[np.ix_(*some)])
    assert np.array_equal(read_labels(bytes_of(content), info, *some), labels[np.ix_(*some)])


def test_foreground_and_percentiles():
    voxels = np.full((6, 7, 8), -1000, np.int16)
    voxels[1:4, 2:6, 3:5] = np.arange(24).reshape(3, 4, 2)
    voxels[0, 0, 0] = -600
    info = read_header(bytes_of(encode_volume(voxels, affine_of(), modality="CT")))
    assert info.foreground == (1, 2, 3, 3, 4, 2)
    assert info.percentiles == tuple(np.percentile(np.arange(24.0), PERCENTILES, method="inverted_cdf"))
    info = read_header(bytes_of(encode_volume(voxels, affine_of(), slope=2.0, intercept=10.0)))
    assert info.foreground == (0, 0, 0, 4, 6, 5) and info.percentiles[0] == 2 * -600 + 10 and info.percentiles[-1] == 56
    info = read_header(bytes_of(encode_volume(voxels, affine_of(), slope=2.0, intercept=10.0, threshold=30.0)))
    assert info.foreground == (2, 2, 3, 2, 4, 2)  # 2 x + 10 > 30: from 11 on
    flat = read_header(bytes_of(encode_volume(np.zeros((2, 3, 4), np.uint8), affine_of())))
    assert flat.foreground == (0, 0, 0, 2, 3, 4) and set(flat.percentiles) == {0.0}


def test_only_the_slices_that_are_shown_are_unpacked(monkeypatch):
    _, content = volume((20, 10, 10))
    unpacked = []
    read = volumes_module.read_slices

    def spy(content, info, numbers, rows, columns):
        unpacked.append((numbers.tolist(), rows.tolist(), columns.tolist()))
        return read(content, info, numbers, rows, columns)

    monkeypatch.setattr(volumes_module, "read_slices", spy)
    views(VolumeSpec([4, 3, 2]), [content], draws(train=False))
    assert unpacked == [([8, 9, 10, 11], [3, 4, 5], [4, 5])]


def test_encode_refuses():
    voxels = np.zeros((2, 3, 4), np.int16)
    with pytest.raises(TypeError, match=r"voxels: expected one of uint8.* got float64"):
        encode_volume(voxels.astype(np.float64), np.eye(4))
    with pytest.raises(ValueError, match=r"voxels: expected shape \[D, H, W\]"):
        encode_volume(voxels[0], np.eye(4))
    with pytest.raises(ValueError, match="voxels: expected finite"):
        encode_volume(np.full((2, 3, 4), np.nan, np.float32), np.eye(4))
    with pytest.raises(ValueError, match="affine: expected an invertible"):
        encode_volume(voxels, np.diag([1.0, 0, 1, 1]))
    with pytest.raises(ValueError, match="slope: expected a positive"):
        encode_volume(voxels, np.eye(4), slope=0.0)
    with pytest.raises(ValueError, match="labels: expected uint8"):
        encode_volume(voxels, np.eye(4), labels=voxels)


def rewritten(content, **changes):
    """The member with another header."""
    info = read_header(bytes_of(content))
    header = json.loads(content[16 : info.begin])
    header.update(changes)
    text = json.dumps({name: value for name, value in header.items() if value is not None}).encode()
    return with_header(text) + content[info.begin :]


def with_header(text):
    return MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text


DAMAGES = {
    "empty": (lambda c: b"", "not a volume"),
    "another file": (lambda c: b"\x89PNG" + c[4:], "not a volume"),
    "header cut": (lambda c: c[:40], "cut short"),
    "cut": (lambda c: c[:-1], "bytes, its header says"),
    "more": (lambda c: c + b"x", "bytes, its header says"),
    "checksum": (lambda c: c[:20] + b"x" + c[21:], "header is damaged: its checksum"),
    "no json": (lambda c: with_header(b"{"), "header is damaged: JSONDecodeError"),
    "a list": (lambda c: with_header(b"[]"), "header is damaged: TypeError"),
    "key": (lambda c: rewritten(c, slope=None), "header is damaged: KeyError: 'slope'"),
    "dtype": (lambda c: rewritten(c, dtype="object"), "dtype 'object'"),
    "shape": (lambda c: rewritten(c, shape=[9, 12]), "expected 3 numbers"),
    "negative": (lambda c: rewritten(c, shape=[9, -12, -11]), "shape"),
    "huge": (lambda c: rewritten(c, shape=[9, 1 << 20, 1 << 20]), "shape"),
    "depth": (lambda c: rewritten(c, shape=[8, 12, 11]), "ends of slices"),
    "ends": (lambda c: rewritten(c, ends=[5, 4, *range(6, 13)]), "ends of slices"),
    "spacing": (lambda c: rewritten(c, spacing=[1, 0, 1]), "not positive"),
    "nan": (lambda c: rewritten(c, intercept=float("nan")), "numbers that are none"),
    "foreground": (lambda c: rewritten(c, foreground=[0, 0, 5, 1, 1, 7]), "foreground"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_headers(name):
    damage, message = DAMAGES[name]
    modality = VolumeModality(VolumeSpec(), 1, 1, torch.device("cpu"))
    with pytest.raises(DamagedSample, match=message):
        modality.inspect(bytes_of(damage(volume()[1])), {})
    modality.close()


def test_damaged_slices_and_missing_members():
    _, content = volume()
    modality = VolumeModality(VolumeSpec([9, 12, 11]), 1, 3, torch.device("cpu"))
    info = modality.inspect(bytes_of(content), {})
    flipped = bytearray(content)
    flipped[info.begin + info.ends[3] - 3] ^= 255  # in the checksum of slice 3
    short = zlib.compress(b"abc", 1)
    swapped = content[: info.begin + info.ends[7]] + short
    swapped = rewritten(content, ends=[*info.ends[:8], info.ends[7] + len(short)])[: -info.ends[-1]] + swapped[info.begin :]
    batch = [bytes_of(bytes(c)) for c in (flipped, content, swapped)]
    infos = [modality.inspect(c, {}) for c in batch]
    modality.submit(batch, infos, [{}] * 3, draws((0, 1, 2)))
    with pytest.raises(DamagedBatch) as error:
        modality.receive()
    assert set(error.value.reasons) == {0, 2}
    assert "slice 3 of the volume" in error.value.reasons[0] and "slice 8" in error.value.reasons[2]
    modality.reset()
    modality.submit(batch[1:2], infos[1:2], [{}], draws(train=False))
    assert modality.receive()["volume"].shape == (1, 1, 9, 12, 11)
    with pytest.raises(DamagedSample, match="no volume"):
        modality.inspect(None, {})
    modality.close()
    with_labels = VolumeModality(VolumeSpec(labels=True), 1, 1, torch.device("cpu"))
    with pytest.raises(DamagedSample, match="no label map"):
        with_labels.inspect(bytes_of(content), {})
    with_labels.close()


def test_a_slice_without_its_checksum_is_damaged():
    _, content = volume((2, 3, 4))
    info = read_header(bytes_of(content))
    cut = rewritten(content, ends=[info.ends[0], info.ends[1] - 4])[:-4]
    with pytest.raises(DamagedBatch, match="slice 1"):
        views(VolumeSpec([2, 3, 4]), [cut], draws())


def test_any_byte_that_is_changed_is_found_out():
    """Or says nothing: bits between two blocks of a compressed slice."""
    _, content = volume((3, 6, 5), labels=np.ones((3, 6, 5), np.uint8))
    spec = VolumeSpec([3, 6, 5], labels=True)
    expected = views(spec, [content], draws())
    generator = np.random.default_rng(0)
    found_out = 0
    for place in generator.choice(len(content), min(len(content), FUZZ), replace=False):
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(8))
        try:
            assert all(torch.equal(field, expected[name]) for name, field in views(spec, [bytes(changed)], draws()).items())
        except (DamagedSample, DamagedBatch):
            found_out += 1
    assert found_out > 0.95 * min(len(content), FUZZ)


# --- views ---------------------------------------------------------------------------------------------------------------


def test_middle_in_evaluation_is_an_exact_copy():
    voxels, content = volume((9, 12, 11), slope=0.5, intercept=-100.0)
    found = views(VolumeSpec([4, 4, 4], windows=[[0.0, 200.0], [150.0, 300.0]]), [content], draws(train=False))
    cut = 0.5 * voxels[2:6, 4:8, 3:7] - 100.0
    expected = np.stack([(cut + 100) / 200, cut / 300]).clip(0, 1).astype(np.float32)
    assert np.allclose(found["volume"][0].numpy(), expected, atol=1e-6) and found["volume"].dtype == torch.float32
    assert found["volume_box"].tolist() == [pytest.approx([2 / 9, 4 / 12, 3 / 11, 4 / 9, 4 / 12, 4 / 11, 0, 0, 0])]
    assert found.keys() == {"volume", "volume_box"}
    again = views(VolumeSpec([4, 4, 4], windows=[[0.0, 200.0], [150.0, 300.0]], flips=[1, 1, 1]), [content], draws(train=False))
    assert torch.equal(again["volume"], found["volume"])  # no random choice in evaluation


def test_padding_is_the_floor_of_the_window():
    voxels, content = volume((3, 12, 11))
    spec = VolumeSpec([5, 12, 14], windows=[[800.0, 1000.0], [-500.0, 200.0]], mean=[0.5], std=[0.25])
    for train in (False, True):
        found = views(spec, [content], draws(train=train))
        assert found["volume_box"][0].tolist() == pytest.approx([-1 / 3, 0, -2 / 11, 5 / 3, 1, 14 / 11, 0, 0, 0])
        view = found["volume"][0].numpy()
        inside = np.zeros((5, 12, 14), bool)
        inside[1:4, :, 2:13] = True
        assert (view[:, ~inside] == -2.0).all()
        shown = ((voxels - 300.0) / 1000).clip(0, 1)
        assert np.allclose(view[0][inside], (shown.ravel() - 0.5) / 0.25, atol=1e-5)
        assert (view[1][inside] == 2.0).all()


def test_random_crops_are_copies_and_depend_on_the_draws_alone():
    voxels, content = volume((9, 12, 11), np.float32)
    spec = VolumeSpec([4, 5, 6], windows=RAW, flips=[0.5, 0.5, 0.5])
    indices = tuple(range(40))
    first = views(spec, [content] * 40, draws(indices), threads=3)
    corners, flipped = set(), []
    for view, box in zip(first["volume"].numpy(), first["volume_box"].numpy(), strict=True):
        d, h, w = (box[:3] * [9, 12, 11]).round().astype(int)
        cut = voxels[d : d + 4, h : h + 5, w : w + 6]
        cut = np.flip(cut, [axis for axis in range(3) if box[6 + axis]])
        assert np.array_equal(view[0], cut)
        corners.add((d, h, w))
        flipped.append(box[6:])
    assert len(corners) > 20 and {c[0] for c in corners} == set(range(6)) and {c[2] for c in corners} == set(range(6))
    assert (np.abs(np.mean(flipped, 0) - 0.5) < 0.3).all() and len({tuple(row) for row in flipped}) == 8
    again = views(spec, [content] * 5, draws((30, 3, 7, 3, 0)), threads=1)
    assert all(torch.equal(again[name], first[name][[30, 3, 7, 3, 0]]) for name in first)
    for other in (draws(indices, epoch=2), draws(indices, seed=4)):
        assert not torch.equal(views(spec, [content] * 40, other)["volume_box"], first["volume_box"])


def trilinear(voxels, positions):
    """torch's own, in float64, the outermost voxels going on."""
    grids = [2 * torch.from_numpy(p.copy()) / (n - 1) - 1 for p, n in zip(positions, voxels.shape, strict=True)]
    grid = torch.stack(torch.meshgrid(*grids, indexing="ij")[::-1], -1)[None]
    source = torch.from_numpy(voxels.astype(np.float64))[None, None]
    return F.grid_sample(source, grid, padding_mode="border", align_corners=True)[0, 0]


@pytest.mark.parametrize("train", [False, True])
def test_resampling_to_a_spacing(train):
    """Parts of the same extent in mm, by trilinear interpolation; half of them reach beyond the volume."""
    spec = VolumeSpec([6, 5, 7], windows=RAW, spacing=[2.0, 0.5, 1.0], scale=[0.7, 1.4], flips=[0, 0.5, 0], antialias=False)
    contents, sources = [], []
    for seed in range(6):
        voxels, content = volume((6 + seed, 7, 8), np.float32, seed)
        contents.append(content)
        sources.append(voxels)
    taken = draws(tuple(range(6)), train)
    found = views(spec, contents, taken)
    planned = plan_views(spec, [read_header(bytes_of(c)) for c in contents], taken)
    padded = 0
    for voxels, view, box, (plan,) in zip(sources, found["volume"], found["volume_box"].double(), planned, strict=True):
        inside = np.ones(spec.size, bool)
        for axis, (at, length) in enumerate(zip(plan.positions, voxels.shape, strict=True)):
            corner, extent, flipped = box[axis] * length, box[3 + axis] * length, box[6 + axis]
            scale = extent * SPACING[axis] / (spec.size[axis] * spec.spacing[axis])
            assert 0.7 - 1e-6 < scale < 1.4 + 1e-6 if train else scale == pytest.approx(1)
            places = corner + (torch.arange(len(at)) + 0.5) * extent / len(at) - 0.5  # what the box says
            assert np.allclose(at[::-1] if flipped else at, places, atol=1e-5)
            beyond = (at < -0.5) | (at > length - 0.5)
            inside &= np.moveaxis(~beyond[:, None, None], 0, axis)
        expected = torch.where(torch.from_numpy(inside), trilinear(voxels, plan.positions), 0.0)
        assert torch.allclose(view[0].double(), expected, atol=2e-6)
        padded += int((~inside).sum())
    assert padded


def test_resize_shows_all_of_it():
    voxels, content = volume((8, 12, 10), np.float32)
    found = views(VolumeSpec([4, 4, 5], "resize", windows=RAW), [content], draws())
    means = F.avg_pool3d(torch.from_numpy(voxels)[None], (2, 3, 2))
    assert torch.allclose(found["volume"][0], means, atol=1e-6)
    assert found["volume_box"][0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    plain = views(VolumeSpec([4, 4, 5], "resize", windows=RAW, antialias=False), [content], draws())
    expected = trilinear(voxels, [np.arange(4) * 2 + 0.5, np.arange(4) * 3 + 1.0, np.arange(5) * 2 + 0.5])
    assert torch.allclose(plain["volume"][0, 0].double(), expected, atol=1e-6)
    larger = views(VolumeSpec([16, 12, 10], "resize", windows=RAW), [content], draws())
    expected = trilinear(voxels, [(np.arange(16) + 0.5) / 2 - 0.5, np.arange(12.0), np.arange(10.0)])
    assert torch.allclose(larger["volume"][0, 0].double(), expected, atol=1e-6)


@pytest.mark.parametrize("block", [2, 3, 5])
def test_averaged_axes_keep_their_places(block):
    """Averages of a ramp are the ramp, wherever the blocks lie."""
    for begin in (0.0, 1.3, 3.0, 11.7):
        positions = begin + np.arange(4) * block * 1.2
        axis = plan_axis(positions, 40, block)
        ramp = np.arange(40.0)[axis.taken].reshape(-1, axis.averaged).mean(1)
        found = np.interp(axis.at, np.arange(len(ramp)), ramp)
        far = (positions > block) & (positions < 40 - 2 * block)
        assert np.allclose(found[far], positions[far]) and far.any() and axis.inside.all()
        assert (np.abs(found - positions) < block).all()


def test_foreground_orientation_labels():
    voxels = np.zeros((8, 9, 10), np.float32)
    voxels[2:6, 1:5, 3:9] = np.random.default_rng(0).random((4, 4, 6), np.float32) + 0.01
    labels = np.random.default_rng(1).integers(0, 200, voxels.shape).astype(np.uint8)
    content = encode_volume(voxels, affine_of(), labels=labels)
    spec = VolumeSpec([4, 4, 6], "resize", windows=[[1.0, 2.0]], foreground=True, labels=True)
    found = views(spec, [content], draws())
    assert np.allclose(found["volume"][0, 0].numpy() * 2, voxels[2:6, 1:5, 3:9], atol=1e-6)
    assert np.array_equal(found["volume_labels"][0], labels[2:6, 1:5, 3:9]) and found["volume_labels"].dtype == torch.int64
    spec.orientation = "LPS"
    turned = views(spec, [content], draws())
    assert torch.equal(turned["volume"], found["volume"].flip(3, 4)) and turned["volume_box"][0, 6:].tolist() == [0, 1, 1]
    assert torch.equal(turned["volume_labels"], found["volume_labels"].flip(2, 3))
    spec.flips = [1.0, 1.0, 0.0]
    both = views(spec, [content], draws())
    assert torch.equal(both["volume"], found["volume"].flip(2, 4)) and both["volume_box"][0, 6:].tolist() == [1, 0, 1]
    padded = views(VolumeSpec([10, 9, 10], labels=True), [content], draws(train=False))["volume_labels"][0]
    assert (padded[[0, 9]] == -100).all() and np.array_equal(padded[1:9], labels)
    half = views(VolumeSpec([4, 3, 5], "resize", labels=True, scale=[1.0, 1.0]), [content], draws(train=False))["volume_labels"][
        0
    ]
    assert np.array_equal(half, labels[1::2, 1::3, 1::2])  # halfway between two: the later one


def test_percentiles():
    voxels, content = volume((5, 6, 7), np.uint16, slope=0.5, intercept=3.0)
    values = 0.5 * voxels[voxels > voxels.min()] + 3.0
    low, high = np.percentile(values, [5, 95], method="inverted_cdf")
    spec = VolumeSpec([5, 6, 7], percentiles=[[5, 95], [0.0, 100.0]], mean=[0.0, 0.5], std=[1.0, 0.5])
    view = views(spec, [content], draws())["volume"][0].numpy()
    assert np.allclose(view[0], ((0.5 * voxels + 3 - low) / (high - low)).clip(0, 1), atol=1e-5)
    assert view[1].max() == 1 and view[1].min() == -1
    flat = encode_volume(np.full((5, 6, 7), 9, np.uint8), affine_of())
    assert (views(spec, [flat], draws())["volume"][0, 0] == 0).all()


def test_slices_are_stacks_of_pictures():
    voxels, content = volume((13, 6, 8), np.float32)
    spec = VolumeSpec([4, 6, 8], slices=True, windows=[[0.5, 1.0], [1.0, 2.0]], neighbours=1, orientation="LPS", mean=[0.1] * 6)
    found = views(spec, [content], draws(train=False))
    assert found["volume"].shape == (1, 4, 6, 6, 8)
    numbers = [1, 4, 8, 11]
    assert found["volume_slices"].tolist() == [numbers]
    for place, number in enumerate(numbers):
        for channel, (half, near) in enumerate(itertools.product((1, 2), (-1, 0, 1))):
            expected = voxels[number + near][::-1, ::-1] / half - np.float32(0.1)
            assert np.allclose(found["volume"][0, place, channel], expected, atol=1e-6)
    seen = views(VolumeSpec([4, 3, 4], "resize", slices=True, windows=RAW), [content] * 30, draws(tuple(range(30))))
    chosen = seen["volume_slices"].numpy()
    edges = np.arange(5) * 13 // 4
    assert (chosen >= edges[:-1]).all() and (chosen < edges[1:]).all() and (np.ptp(chosen, 0) > 0).all()
    pooled = F.avg_pool2d(torch.from_numpy(voxels), 2)
    assert torch.allclose(seen["volume"][:, :, 0], pooled[chosen], atol=1e-6)
    few = views(VolumeSpec([16, 6, 8], slices=True, windows=RAW, neighbours=1), [content], draws())
    assert few["volume_slices"][0].tolist() == [*range(13), 12, 12, 12]
    assert np.array_equal(few["volume"][0, 0, 0], voxels[0]) and np.array_equal(few["volume"][0, 15, 2], voxels[12])


def test_local_views():
    voxels, content = volume((9, 12, 11), np.float32)
    spec = VolumeSpec([3, 4, 11], "resize", windows=RAW, local_views=3, local_size=[2, 3, 4])
    found = views(spec, [content] * 2, draws((4, 5)))
    assert found["volume_local"].shape == (2, 3, 1, 2, 3, 4) and found["volume_local_box"].shape == (2, 3, 9)
    boxes = found["volume_local_box"].flatten(0, 1)
    assert len({tuple(box.tolist()) for box in boxes}) == 6
    for view, box in zip(found["volume_local"].flatten(0, 1), boxes.numpy(), strict=True):
        d, h, w = (box[:3] * [9, 12, 11]).round().astype(int)
        assert np.array_equal(view[0], voxels[d : d + 2, h : h + 3, w : w + 4])
    assert views(spec, [content], draws(train=False)).keys() == {"volume", "volume_box"}


def test_the_device_may_do_the_work():
    """What a GPU is given to do, done here: the same batch."""
    contents = [volume((9, 12, 11), dtype)[1] for dtype in (np.uint8, np.uint16, np.float32)]
    spec = VolumeSpec([4, 5, 6], spacing=[2.0, 1.0, 1.0], windows=[[100.0, 150.0]], local_views=1, local_size=[3, 3, 3])
    expected = views(spec, contents, draws((0, 1, 2)))
    modality = VolumeModality(spec, 2, 3, torch.device("cuda"))
    contents = [bytes_of(content) for content in contents]
    modality.submit(contents, [modality.inspect(c, {}) for c in contents], [{}] * 3, draws((0, 1, 2)))
    assert all(type(f.result()).__name__ == "_Cut" for row in modality._submitted[0].views for f in row)
    modality._device = torch.device("cpu")
    found = modality.receive()
    modality.close()
    assert all(torch.equal(found[name], expected[name]) for name in ("volume", "volume_local"))


REFUSED = {
    "fit": ({"fit": "pad"}, "fit: expected"),
    "orientation": ({"orientation": "RAI"}, "orientation: expected"),
    "size": ({"size": [96, 96]}, "size: expected three"),
    "local_size": ({"local_size": [0, 1, 1]}, "local_size: expected three"),
    "spacing": ({"spacing": [1.0, -1.0, 1.0]}, "spacing: expected three lengths"),
    "spacing unused": ({"spacing": [1.0] * 3, "fit": "resize"}, "spacing: nothing is taken at it"),
    "scale": ({"scale": [1.2, 1.0]}, "scale: expected two"),
    "flips": ({"flips": [0.5, 0.5]}, "flips: expected three"),
    "width": ({"windows": [[40.0, 0.0]]}, "windows: expected"),
    "no windows": ({"windows": []}, "one of windows or percentiles"),
    "percentiles": ({"percentiles": [[0.3, 99.0]]}, "percentiles: expected"),
    "backwards": ({"percentiles": [[99.0, 1.0]]}, "percentiles: expected"),
    "neighbours": ({"neighbours": 1}, "neighbours"),
    "mean": ({"mean": [0.1, 0.2]}, "mean: expected one number"),
    "std": ({"std": [0.0]}, "std: expected positive"),
    "slices": ({"slices": True, "labels": True}, "slices: labels"),
    "local_views": ({"local_views": -1}, "local_views: expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_specs(name):
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        VolumeModality(VolumeSpec(**options), 1, 1, torch.device("cpu"))


def test_through_the_loader(tmp_path):
    """Damaged volumes are left out and named; a loader that goes on sees what the first one saw."""
    sources = {}
    with ShardWriter(tmp_path, "v", samples_per_shard=6) as writer:
        for i in range(12):
            voxels, content = volume((6, 7, 8), np.float32, i)
            sources[i] = voxels
            if i == 4:
                content = content[:-9]
            if i == 9:
                info = read_header(bytes_of(content))
                content = content[: info.begin + info.ends[2]] + bytes(9) + content[info.begin + info.ends[2] + 9 :]
            writer.write(f"{i:02d}", {"vol": content, "json": b"{}"})
    spec = DataSpec(None, None, volume=VolumeSpec([6, 4, 4], windows=RAW, flips=[0, 0, 0.5]))
    loader = make_loader(str(tmp_path), spec, None, 3, train=True)
    batches, states = [], []
    for batch in itertools.islice(loader, 7):
        batches.append(batch)
        states.append(json.dumps(loader.state_dict()))
        for index, view, box in zip(batch["index"].tolist(), batch["volume"], batch["volume_box"].numpy(), strict=True):
            h, w = (box[1:3] * [7, 8]).round().astype(int)
            cut = sources[index][:, h : h + 4, w : w + 4]
            assert np.array_equal(view[0], cut[:, :, ::-1] if box[8] else cut)
    assert set(loader.skipped) == {"v-000000.tar:04", "v-000001.tar:09"}
    assert "slice 3" in loader.skipped["v-000001.tar:09"] and "its header says" in loader.skipped["v-000000.tar:04"]
    again = make_loader(str(tmp_path), spec, None, 3, train=True, threads=1)
    again.load_state_dict(json.loads(states[2]))
    for batch, expected in zip(itertools.islice(again, 4), batches[3:], strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in ("index", "volume", "volume_box"))
    evaluation = list(make_loader(str(tmp_path), spec, None, 5, train=False))
    assert [i for batch in evaluation for i in batch["index"].tolist()] == [i for i in range(12) if i not in (4, 9)]
