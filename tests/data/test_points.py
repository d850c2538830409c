import io
import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from vlpfast.data import ShardWriter, make_loader
from vlpfast.data import points as points_module
from vlpfast.data.modality import Draws
from vlpfast.data.pictures import DamagedBatch, DamagedSample
from vlpfast.data.points import PointsModality, farthest_points, mesh
from vlpfast.data.points_file import read_header
from vlpfast.types import DataSpec, PointsSpec, UserError

trimesh = pytest.importorskip("trimesh")


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return np.frombuffer(stream.getvalue(), np.uint8)


def cloud(count=200, columns=6, seed=0):
    generator = np.random.default_rng(seed)
    xyz = generator.normal([3, -2, 1], [1, 2, 3], (count, 3))
    return np.concatenate([xyz, generator.random((count, 3))], 1)[:, :columns].astype("f4")


def views(spec, contents, index=None, train=True, seed=3, epoch=1, threads=2):
    modality = PointsModality(spec, threads, len(contents), torch.device("cpu"))
    try:
        infos = [modality.inspect(content, {}) for content in contents]
        index = np.arange(len(contents)) if index is None else np.array(index)
        fields = modality.submit(contents, infos, [{}] * len(contents), Draws(seed, epoch, index, train))
        assert fields == {}
        return modality.receive()
    finally:
        modality.close()


FUZZ = int(os.environ.get("VLPFAST_FUZZ", "40"))  # bytes that are changed
PLAIN = {"normalize": "none"}


# --- which points --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_evaluation_takes_evenly_and_exactly(dtype):
    numbers = cloud(200).astype(dtype)
    found = views(PointsSpec(50, colors=True, **PLAIN), [npy(numbers)], train=False)
    assert found["points"].dtype == torch.float32 and found["points"].shape == (1, 50, 6)
    assert np.array_equal(found["points"][0], numbers[::4].astype(np.float32))
    assert np.array_equal(found["points_transform"][0], np.eye(3, 4))
    few = views(PointsSpec(450, **PLAIN), [npy(numbers)], train=False)["points"][0].numpy()
    assert np.array_equal(few, np.concatenate([numbers, numbers, numbers[:50]])[:, :3].astype(np.float32))


def rows_of(points, numbers):
    """Where each point stands in the file."""
    places = {tuple(row): place for place, row in enumerate(numbers[:, :3].tolist())}
    return np.array([places[tuple(row)] for row in points[:, :3].tolist()])


def test_random_points_depend_on_the_draws_alone():
    numbers = cloud(200)
    spec = PointsSpec(120, colors=True, **PLAIN)
    first = views(spec, [npy(numbers)] * 6)["points"]
    chosen = [rows_of(view, numbers) for view in first.numpy()]
    assert all(len(set(rows)) == 120 for rows in chosen) and len({tuple(rows) for rows in chosen}) == 6
    assert all(np.array_equal(view, numbers[rows]) for view, rows in zip(first.numpy(), chosen, strict=True))
    again = views(spec, [npy(numbers)] * 3, (5, 0, 2), threads=1)["points"]
    assert torch.equal(again, first[[5, 0, 2]])
    assert not torch.equal(views(spec, [npy(numbers)] * 6, epoch=2)["points"], first)
    assert not torch.equal(views(spec, [npy(numbers)] * 6, seed=4)["points"], first)
    more = rows_of(views(PointsSpec(500, **PLAIN), [npy(numbers)])["points"][0].numpy(), numbers)
    assert set(more) == set(range(200)) and sorted(more[:200].tolist()) == list(range(200))


def test_farthest_points():
    numbers = cloud(80, 3).astype(np.float64)
    for start in (None, 17):
        chosen = farthest_points(numbers, 30, start)
        assert chosen[0] == (start if start is not None else np.linalg.norm(numbers - numbers.mean(0), axis=1).argmax())
        for place in range(1, 30):
            distances = np.linalg.norm(numbers[:, None] - numbers[chosen[:place]], axis=2).min(1)
            assert chosen[place] == distances.argmax()
    same = np.zeros((5, 3))
    assert sorted(farthest_points(same, 5).tolist()) == [0, 1, 2, 3, 4]
    spec = PointsSpec(16, "farthest", **PLAIN)
    starts = {rows_of(view, cloud(80))[0] for view in views(spec, [npy(cloud(80))] * 12)["points"].numpy()}
    assert len(starts) > 6
    fixed = views(spec, [npy(cloud(80))], train=False)["points"][0].numpy()
    assert np.array_equal(rows_of(fixed, cloud(80)), farthest_points(cloud(80, 3).astype(np.float64), 16))


# --- where they are put ------------------------------------------------------------------------------------------------------


def placed(found, numbers, row=0):
    """What points_transform says of the points, which the JSON's boxes will follow."""
    transform = found["points_transform"][row].double().numpy()
    return numbers @ transform[:, :3].T + transform[:, 3]


def test_unit_sphere():
    numbers = cloud(60, 3)
    found = views(PointsSpec(60), [npy(numbers)], train=False)
    points = found["points"][0].numpy()
    assert np.allclose(points.mean(0), 0, atol=1e-6) and np.linalg.norm(points, axis=1).max() == pytest.approx(1, abs=1e-6)
    assert np.allclose(placed(found, numbers), points, atol=1e-6)
    centred = views(PointsSpec(60, normalize="centre"), [npy(numbers)], train=False)["points"][0].numpy()
    assert np.allclose(centred, numbers - numbers.mean(0), atol=1e-5)
    one = views(PointsSpec(4), [npy(np.ones((3, 3), "f4"))], train=False)["points"]
    assert (one == 0).all()


def test_axes():
    """ModelNet's turn of 90 degrees about x, then -90 degrees about y, of row vectors: (x, y, z) -> (y, z, x) up to signs."""
    numbers = cloud(40, 3)

    def turned(axis, degrees):
        c, s = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
        return np.array({"x": [[1, 0, 0], [0, c, -s], [0, s, c]], "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]]}[axis])

    expected = numbers @ turned("x", 90) @ turned("y", -90)
    found = views(PointsSpec(40, axes=["y", "z", "x"], **PLAIN), [npy(numbers)], train=False)["points"][0].numpy()
    assert np.array_equal(np.abs(found), np.abs(expected))
    signs = [("" if (found[:, axis] == expected[:, axis]).all() else "-") + name for axis, name in enumerate("yzx")]
    found = views(PointsSpec(40, axes=signs, **PLAIN), [npy(numbers)], train=False)["points"][0].numpy()
    assert np.array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("up", ["x", "y", "z"])
def test_rotation_about_the_up_axis(up):
    numbers = cloud(40, 3)
    axis = "xyz".index(up)
    found = views(PointsSpec(40, up=up, rotation=30.0, sampling="farthest", **PLAIN), [npy(numbers)] * 60)
    angles = []
    for row in range(60):
        turn = found["points_transform"][row].double().numpy()[:, :3]
        assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-6) and np.linalg.det(turn) == pytest.approx(1, abs=1e-6)
        assert turn[axis, axis] == 1
        angles.append(math.degrees(math.atan2(turn[(axis + 2) % 3, (axis + 1) % 3], turn[(axis + 1) % 3, (axis + 1) % 3])))
        points = found["points"][row].numpy()
        assert np.allclose(np.sort(points[:, axis]), np.sort(numbers[:, axis]), atol=1e-5)
        there = placed(found, numbers, row)
        assert np.linalg.norm(points[:, None] - there, axis=2).min(1).max() < 1e-5
    assert max(np.abs(angles)) <= 30.001 and max(angles) > 20 and min(angles) < -20


def test_scale_flips_shift():
    numbers = cloud(40, 3)
    spec = PointsSpec(40, scale=[0.5, 2.0], flips=[0.5, 0.5, 0.0], shift=3.0, **PLAIN)
    transforms = views(spec, [npy(numbers)] * 200)["points_transform"].double().numpy()
    scales = np.abs(np.diagonal(transforms, axis1=1, axis2=2))
    assert np.allclose(scales, scales[:, :1]) and 0.5 <= scales.min() < 0.6 and 1.9 < scales.max() <= 2
    signs = np.sign(np.diagonal(transforms, axis1=1, axis2=2))
    assert (signs[:, 2] == 1).all() and (np.abs(signs[:, :2].mean(0)) < 0.3).all() and len({tuple(s) for s in signs}) == 4
    assert np.abs(transforms[:, :, 3]).max() <= 3 and (np.ptp(transforms[:, :, 3], axis=0) > 5).all()
    still = views(spec, [npy(numbers)], train=False)["points_transform"][0]
    assert np.array_equal(still, np.eye(3, 4))


def test_jitter_and_dropout():
    numbers = cloud(2000, 3)
    found = views(PointsSpec(2000, "farthest", jitter=0.02, jitter_clip=0.03, **PLAIN), [npy(numbers[:300])], (7,))
    assert len(found["points"][0]) == 2000
    spec = PointsSpec(2000, jitter=0.02, jitter_clip=0.03, **PLAIN)
    found = views(spec, [npy(numbers)] * 2)
    chosen = rows_of(views(PointsSpec(2000, **PLAIN), [npy(numbers)] * 2)["points"][1].numpy(), numbers)
    noise = found["points"][1].numpy() - numbers[chosen]
    assert np.abs(noise).max() <= 0.03 + 1e-6 and 0.015 < noise.std() < 0.02 and np.abs(noise.mean()) < 1e-3
    dropped = views(PointsSpec(2000, dropout=0.5, **PLAIN), [npy(numbers)] * 20)["points"].numpy()
    shares = np.array([(view == view[0]).all(1).mean() for view in dropped])
    assert shares.max() < 0.55 and shares.max() > 0.35 and shares.min() < 0.15
    whole = views(PointsSpec(2000, jitter=0.02, dropout=0.5, **PLAIN), [npy(numbers)], train=False)["points"][0].numpy()
    assert np.array_equal(whole, numbers)


def test_height_and_colours():
    numbers = cloud(500)
    spec = PointsSpec(500, colors=True, height=True, up="y", **PLAIN)
    points = views(spec, [npy(numbers)], train=False)["points"][0].numpy()
    assert points.shape == (500, 7) and np.array_equal(points[:, 3:6], numbers[:, 3:])
    floor = np.percentile(numbers[:, 1].astype(np.float64), 0.99)
    assert np.allclose(points[:, 6], numbers[:, 1] - floor, atol=1e-6)


# --- damage --------------------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return print, ("never",)


BAD = {
    "none": (None, "no points"),
    "text": (np.frombuffer(b"not a .npy file", np.uint8), "no .npy file"),
    "pickle": (npy(np.array([Evil()], object), allow_pickle=True), "expected rows of 3 or 6"),
    "shape": (npy(cloud(9, 4)), "expected rows of 3 or 6"),
    "whole numbers": (npy(np.zeros((4, 3), np.int64)), "expected rows of 3 or 6"),
    "columns": (npy(np.asfortranarray(cloud(9, 3))), "expected rows of 3 or 6"),
    "empty": (npy(np.zeros((0, 3), "f4")), "got 0"),
    "cut": (npy(cloud(9, 3))[:-4], "header says otherwise"),
    "more": (np.concatenate([npy(cloud(9, 3)), [0]]).astype(np.uint8), "header says otherwise"),
    "version": (np.frombuffer(b"\x93NUMPY\x07\x00" + bytes(64), np.uint8), "no .npy file"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_members(name):
    content, message = BAD[name]
    with pytest.raises(DamagedSample, match=message):
        views(PointsSpec(), [content])


@pytest.mark.filterwarnings("ignore:Reading:UserWarning")  # numpy takes some of them for files of Python 2
def test_changed_bytes_of_headers():
    """Whatever stands there, the points are as they were, or damaged; among what numpy raises: TokenError, SyntaxError."""
    content = npy(cloud(9, 3))
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(20 * FUZZ):
        changed = content.copy()
        places = generator.integers(0, 128, generator.integers(1, 5))
        changed[places] = generator.choice([*b"'(){}[],:#\\\"\n 0-9eT<>f", generator.integers(256)], len(places))
        try:
            assert read_header(changed).shape in ((9, 3), (9, 6), (18, 3))
        except DamagedSample:
            refused += 1
    assert refused > 10 * FUZZ


def test_late_damage_and_missing_colours():
    holes = cloud(9)
    holes[4, 5] = np.inf
    with pytest.raises(DamagedBatch) as error:
        views(PointsSpec(4), [npy(cloud(9)), npy(holes)])
    assert error.value.reasons == {1: "points that are no finite numbers"}
    with pytest.raises(DamagedSample, match="no colours"):
        views(PointsSpec(4, colors=True), [npy(cloud(9, 3))])


REFUSED = {
    "count": ({"count": 0}, "count: expected at least 1"),
    "sampling": ({"sampling": "grid"}, "sampling: expected one of random, farthest"),
    "up": ({"up": "up"}, "up: expected one of"),
    "normalize": ({"normalize": "box"}, "normalize: expected one of"),
    "axes": ({"axes": ["x", "y", "-y"]}, "axes: expected x, y, z"),
    "scale": ({"scale": [0.0, 1.0]}, "scale: expected two"),
    "flips": ({"flips": [0.5, 2.0, 0.0]}, "flips: expected three"),
    "rotation": ({"rotation": 270.0}, r"rotation: expected 0 \.\. 180"),
    "jitter": ({"jitter": -0.1}, "jitter: expected"),
    "dropout": ({"dropout": 1.5}, r"dropout: expected 0 \.\. 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_specs(name):
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        PointsModality(PointsSpec(**options), 1, 1, torch.device("cpu"))


def test_through_the_loader(tmp_path):
    with ShardWriter(tmp_path, "p") as writer:
        for i in range(9):
            content = npy(np.full((6, 3), i, "f4") + np.eye(6, 3, dtype="f4") * (np.nan if i == 5 else 0.25))
            writer.write(f"{i}", {"npy" if i % 2 else "points.npy": content.tobytes()})
    spec = DataSpec(None, None, points=PointsSpec(4, jitter=0.01, **PLAIN))
    loader = make_loader(str(tmp_path), spec, None, 3, train=True)
    batches, states = [], []
    for batch in itertools.islice(loader, 5):
        assert torch.equal(batch["points"].mean((1, 2)).round().long(), batch["index"])
        batches.append(batch)
        states.append(json.dumps(loader.state_dict()))
    assert loader.skipped == {"p-000000.tar:5": "points that are no finite numbers"}
    again = make_loader(str(tmp_path), spec, None, 3, train=True)
    again.load_state_dict(json.loads(states[1]))
    for batch, expected in zip(itertools.islice(again, 3), batches[2:], strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in ("index", "points", "points_transform"))


# --- meshes --------------------------------------------------------------------------------------------------------------------


def sampled(path, count=4000):
    members = mesh(str(path), count)
    assert members == mesh(str(path), count)  # the same bytes
    assert list(members) == ["points.npy", "json"]
    return np.load(io.BytesIO(members["points.npy"]), allow_pickle=False), json.loads(members["json"])["points"]


@pytest.mark.parametrize("kind", ["obj", "ply", "stl", "off", "glb"])
def test_points_are_spread_by_area(tmp_path, kind):
    """A box of 1 x 2 x 3: every point on its surface, each side's share that of its area."""
    trimesh.creation.box((1, 2, 3)).export(tmp_path / f"box.{kind}")
    points, about = sampled(tmp_path / f"box.{kind}")
    assert points.shape == (4000, 3) and points.dtype == np.float32
    distance = np.abs(np.abs(points) - [0.5, 1.0, 1.5])  # to the planes of the sides
    assert distance.min(1).max() < 1e-5 and (np.abs(points) <= np.array([0.5, 1, 1.5]) + 1e-5).all()
    shares = np.bincount(distance.argmin(1), minlength=3) / 4000
    assert np.allclose(shares, np.array([6, 3, 2]) / 11, atol=0.03)
    assert about["count"] == 4000 and not about["colors"] and np.allclose(about["low"], [-0.5, -1, -1.5], atol=0.02)


def test_colours_of_vertices_and_faces(tmp_path):
    box = trimesh.creation.box((1, 1, 1))
    box.visual.vertex_colors = np.column_stack([(box.vertices + 0.5) * 255, np.full(len(box.vertices), 255)]).astype(np.uint8)
    box.export(tmp_path / "v.ply")
    points, about = sampled(tmp_path / "v.ply")
    assert about["colors"] and np.allclose(points[:, 3:], points[:, :3] + 0.5, atol=0.01)  # linear along each face
    box = trimesh.creation.box((1, 1, 1))
    box.visual.face_colors = np.where(box.face_normals[:, 2:] > 0.5, [[255, 0, 0, 255]], [[0, 51, 0, 255]]).astype(np.uint8)
    box.export(tmp_path / "f.ply")
    points, _ = sampled(tmp_path / "f.ply")
    top = points[:, 2] > 0.4999
    assert 0.1 < top.mean() < 0.25
    assert np.allclose(points[top, 3:], [1, 0, 0]) and np.allclose(points[~top & (points[:, 2] < 0.49), 3:], [0, 0.2, 0])


def test_scenes_are_put_together_where_they_stand(tmp_path):
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.creation.icosphere(2, 0.5))
    scene.add_geometry(trimesh.creation.icosphere(2, 0.5), transform=trimesh.transformations.translation_matrix([10, 0, 0]))
    scene.export(tmp_path / "two.glb")
    points, _ = sampled(tmp_path / "two.glb")
    far = points[:, 0] > 5
    assert 0.45 < far.mean() < 0.55 and np.allclose(np.linalg.norm(points[far] - [10, 0, 0], axis=1), 0.5, atol=0.03)


TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nf 1/1 2/2 3/3\n"


def test_each_part_of_a_scene_has_its_own_colours(tmp_path):
    scene = trimesh.Scene()
    for place, size in enumerate((0.5, 1.0)):
        box = trimesh.creation.box((size, 1, 1))
        reds = np.rint((box.vertices[:, 2] + 0.5) * 255)
        colours = np.column_stack([reds, np.full(len(reds), 255 * place), np.zeros(len(reds)), np.full(len(reds), 255)])
        box.visual.vertex_colors = colours.astype(np.uint8)
        scene.add_geometry(box, transform=trimesh.transformations.translation_matrix([10 * place, 0, 0]))
    scene.export(tmp_path / "two.glb")
    points, about = sampled(tmp_path / "two.glb", 400)
    assert about["colors"] and np.allclose(points[:, 3], points[:, 2] + 0.5, atol=0.01)
    assert np.array_equal(points[:, 4], points[:, 0] > 5)


def test_materials_and_textures(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "m.mtl").write_text("newmtl red\nKd 1 0 0\n")
    (folder / "t.obj").write_text("mtllib m.mtl\nusemtl red\n" + TRIANGLE)
    points, about = sampled(folder / "t.obj", 50)
    assert about["colors"] and np.allclose(points[:, 3:], [1, 0, 0], atol=0.01)
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64) * 4, np.arange(64)[::-1, None] * 4  # red grows along u, green along v
    Image.fromarray(ramp).save(folder / "p.png")
    (folder / "m.mtl").write_text("newmtl red\nKd 1 1 1\nmap_Kd p.png\n")
    points, _ = sampled(folder / "t.obj", 500)
    assert np.allclose(points[:, 3:5], points[:, :2] * 252 / 255, atol=0.02) and (points[:, 5] == 0).all()
    (folder / "plain.obj").write_text(TRIANGLE)
    assert sampled(folder / "plain.obj", 50)[0].shape == (50, 3)


def test_nothing_outside_the_folder_is_read(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (tmp_path / "m.mtl").write_text("newmtl red\nKd 1 0 0\n")
    (folder / "t.obj").write_text("mtllib ../m.mtl\nusemtl red\n" + TRIANGLE)
    assert sampled(folder / "t.obj", 50)[0].shape == (50, 3)
    trimesh.creation.box().export(folder / "box.gltf")
    assert sampled(folder / "box.gltf", 50)[0].shape == (50, 3)
    for buffer in list(folder.glob("*.bin")):
        buffer.rename(tmp_path / buffer.name)
        buffer.symlink_to(tmp_path / buffer.name)
    with pytest.raises(DamagedSample, match="cannot be read"):
        mesh(str(folder / "box.gltf"))


def test_clouds_without_faces(tmp_path):
    numbers = cloud(100)
    colours = np.column_stack([numbers[:, 3:] * 255, np.full(100, 255)]).astype(np.uint8)
    trimesh.PointCloud(numbers[:, :3], colours).export(tmp_path / "c.ply")
    points, about = sampled(tmp_path / "c.ply", 200)
    assert about["count"] == 100 and np.allclose(points[:, :3], numbers[:, :3], atol=1e-6)
    assert np.allclose(points[:, 3:], colours[:, :3] / 255)
    fewer, _ = sampled(tmp_path / "c.ply", 30)
    rows = rows_of(fewer, points)
    assert len(fewer) == 30 and (np.diff(rows) > 0).all() and np.array_equal(fewer, points[rows])


def test_bad_meshes(tmp_path, monkeypatch):
    (tmp_path / "empty.obj").write_text("")
    (tmp_path / "line.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    (tmp_path / "text.ply").write_text("this is no mesh")
    (tmp_path / "nan.obj").write_text("v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n")
    (tmp_path / "x.xyzw").write_text("0 0 0")
    trimesh.creation.box().export(tmp_path / "box.glb")
    (tmp_path / "cut.glb").write_bytes((tmp_path / "box.glb").read_bytes()[:300])
    for name, message in {
        "empty.obj": "mesh",
        "line.obj": "no area",
        "text.ply": "cannot be read",
        "nan.obj": "no finite numbers",
        "x.xyzw": "cannot be read",
        "cut.glb": "cannot be read",
        "absent.obj": "cannot be read",
    }.items():
        with pytest.raises(DamagedSample, match=message):
            mesh(str(tmp_path / name))
            pytest.fail(f"{name} was taken")
    with pytest.raises(ValueError, match="points: expected at least 1"):
        mesh(str(tmp_path / "box.glb"), 0)
    monkeypatch.setitem(points_module.importlib.sys.modules, "trimesh", None)
    with pytest.raises(UserError, match=r"meshes need trimesh: pip install vlpfast\[points\]"):
        mesh(str(tmp_path / "box.glb"))


@pytest.mark.parametrize("kind", ["ply", "glb", "obj", "stl", "off"])
def test_changed_bytes_of_meshes(tmp_path, kind):
    path = tmp_path / f"b.{kind}"
    trimesh.creation.box().export(path)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.choice(len(content), min(len(content), FUZZ), replace=False):
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        try:
            points, _ = sampled(path, 20)
            assert np.isfinite(points).all()
        except DamagedSample:
            pass
