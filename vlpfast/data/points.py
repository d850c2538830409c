"""Point clouds (points_file.py) as a modality, and meshes sampled to points for building shards."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlpfast.data.modality import Draws
from vlpfast.data.order import random_bits, uniform
from vlpfast.data.pictures import DamagedSample, results
from vlpfast.data.points_file import MEMBERS, PointsInfo, describe, read_header, read_points
from vlpfast.types import PointsSpec, UserError

_DRAW = 1 << 23  # of a sample's draws, those from here on belong to its points
_CHOICE, _SCALE, _FLIPS, _ROTATION, _SHIFT, _JITTER, _DROPOUT = (_DRAW + 8 * number for number in range(7))
_FLOOR = 0.99  # per cent of the points lie below the floor: VoteNet's
_SEED = 0  # of what is drawn from a mesh, so that its bytes depend on the mesh alone


class PointsModality:
    """Batch["points"], ["points_transform"]. See modality.Modality."""

    members = MEMBERS

    def __init__(self, spec: PointsSpec, threads: int, batch_size: int, device: torch.device):
        _check(spec)
        self._spec = spec
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vlpfast-points")
        self._submitted: deque[list[Future[tuple[np.ndarray, np.ndarray]]]] = deque()

    def inspect(self, content: np.ndarray | None, record: dict[str, Any]) -> PointsInfo:
        if content is None:
            raise DamagedSample(f"no points (a member {', '.join(self.members)})")
        info = read_header(content)
        if self._spec.colors and info.shape[1] != 6:
            raise DamagedSample("the points have no colours")
        return info

    def submit(
        self, contents: list[np.ndarray], infos: list[PointsInfo], records: list[dict[str, Any]], draws: Draws
    ) -> dict[str, Any]:
        rows = zip(contents, infos, draws.index, strict=True)
        self._submitted.append(
            [self._pool.submit(_view, self._spec, content, info, draws._replace(index=index)) for content, info, index in rows]
        )
        return {}

    def receive(self) -> dict[str, Tensor]:
        found = results(self._submitted.popleft())
        points, transforms = (torch.from_numpy(np.stack(column)) for column in zip(*found, strict=True))
        return {"points": points, "points_transform": transforms}

    def reset(self) -> None:
        for futures in self._submitted:
            for future in futures:
                future.cancel()
        self._submitted.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


# --- a view of one cloud ---------------------------------------------------------------------------------------------------


def _view(spec: PointsSpec, content: np.ndarray, info: PointsInfo, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """draws.index: of this sample alone. -> float32 [N, C] and the transform [3, 4]"""
    numbers = read_points(content, info)
    xyz = numbers[:, :3].astype(np.float64)
    chosen = _choose(spec, xyz, draws)  # [N]
    transform = np.column_stack([_axes(spec.axes), np.zeros(3)])  # [3, 4]
    if spec.normalize != "none":
        moved = xyz[chosen] @ transform[:, :3].T
        transform[:, 3] = -moved.mean(0)
        radius = np.linalg.norm(moved + transform[:, 3], axis=1).max()
        if spec.normalize == "sphere" and radius > 0:
            transform /= radius
    if draws.train:
        transform = _augment(spec, draws) @ np.vstack([transform, [0, 0, 0, 1]])
    placed = xyz[chosen] @ transform[:, :3].T + transform[:, 3]
    if draws.train and spec.jitter:
        noise = spec.jitter * _generator(draws, _JITTER).standard_normal(placed.shape)
        placed = placed + noise.clip(-spec.jitter_clip, spec.jitter_clip)
    columns = [placed]
    if spec.colors:
        columns.append(numbers[chosen, 3:].astype(np.float64))
    if spec.height:
        along = placed[:, "xyz".index(spec.up)]
        columns.append((along - np.percentile(along, _FLOOR))[:, None])
    points = np.concatenate(columns, 1).astype(np.float32)
    if draws.train and spec.dropout:
        share = spec.dropout * uniform(draws.seed, draws.epoch, draws.index, _DROPOUT)
        points[_generator(draws, _DROPOUT + 1).random(len(points)) < share] = points[0]
    return points, transform.astype(np.float32)


def _generator(draws: Draws, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(int(random_bits(draws.seed, draws.epoch, draws.index, number)[0])))


def _choose(spec: PointsSpec, xyz: np.ndarray, draws: Draws) -> np.ndarray:
    """-> int64 [count]; of a cloud that has fewer points, each is taken and then some again."""
    have = len(xyz)
    if have >= spec.count and spec.sampling == "farthest":
        start = None
        if draws.train:
            start = int(uniform(draws.seed, draws.epoch, draws.index, _CHOICE)[0] * have)
        return farthest_points(xyz, spec.count, start)
    if not draws.train:
        return np.arange(spec.count) * have // spec.count if have >= spec.count else np.arange(spec.count) % have
    generator = _generator(draws, _CHOICE)
    if have >= spec.count:
        return generator.choice(have, spec.count, replace=False)
    return np.concatenate([generator.permutation(have), generator.integers(0, have, spec.count - have)])


def farthest_points(xyz: np.ndarray, count: int, start: int | None = None) -> np.ndarray:
    """Farthest-point sampling (Eldar et al. 1997): each next point is the one farthest from those taken, the first of several.

    xyz [M, 3] -> int64 [count <= M]. start: the first one; None: the farthest from the mean.
    """
    chosen = np.empty(count, np.int64)
    chosen[0] = ((xyz - xyz.mean(0)) ** 2).sum(1).argmax() if start is None else start
    nearest = np.full(len(xyz), np.inf)  # squared distance to those taken
    for place in range(1, count):
        np.minimum(nearest, ((xyz - xyz[chosen[place - 1]]) ** 2).sum(1), out=nearest)
        nearest[chosen[place - 1]] = -1.0  # of points that coincide, none twice
        chosen[place] = nearest.argmax()
    return chosen


def _axes(names: list[str]) -> np.ndarray:
    """[3, 3] stored x, y, z -> x, y, z"""
    matrix = np.zeros((3, 3))
    for row, name in enumerate(names):
        matrix[row, "xyz".index(name[-1])] = -1.0 if name.startswith("-") else 1.0
    return matrix


def _augment(spec: PointsSpec, draws: Draws) -> np.ndarray:
    """[3, 4]: scaled, flipped, turned, then shifted."""

    def drawn(first: int, count: int) -> np.ndarray:
        return uniform(draws.seed, draws.epoch, draws.index, first + np.arange(count))

    low, high = spec.scale
    scale = low + drawn(_SCALE, 1) * (high - low)
    signs = np.where(drawn(_FLIPS, 3) < np.array(spec.flips), -1.0, 1.0)
    angle = math.radians(spec.rotation) * (2 * drawn(_ROTATION, 1)[0] - 1)
    up = "xyz".index(spec.up)
    first, second = (up + 1) % 3, (up + 2) % 3  # so that first x second = up
    turn = np.eye(3)
    turn[[first, second, first, second], [first, second, second, first]] = (
        np.cos(angle),
        np.cos(angle),
        -np.sin(angle),
        np.sin(angle),
    )
    return np.column_stack([turn @ np.diag(signs * scale), spec.shift * (2 * drawn(_SHIFT, 3) - 1)])


def _check(spec: PointsSpec) -> None:
    """Raises UserError."""
    if spec.count < 1:
        raise UserError(f"count: expected at least 1 point, got {spec.count}")
    for name, known in (
        ("sampling", ("random", "farthest")),
        ("up", ("x", "y", "z")),
        ("normalize", ("sphere", "centre", "none")),
    ):
        if getattr(spec, name) not in known:
            raise UserError(f"{name}: expected one of {', '.join(known)}, got {getattr(spec, name)!r}")
    if sorted(name.removeprefix("-") for name in spec.axes) != ["x", "y", "z"]:
        raise UserError(f"axes: expected x, y, z in some order, with - to turn one round, got {list(spec.axes)}")
    if len(spec.scale) != 2 or not 0 < spec.scale[0] <= spec.scale[1] < math.inf:
        raise UserError(f"scale: expected two numbers, 0 < low <= high, got {list(spec.scale)}")
    if len(spec.flips) != 3 or not all(0 <= prob <= 1 for prob in spec.flips):
        raise UserError(f"flips: expected three probabilities, got {list(spec.flips)}")
    for name, most in (
        ("rotation", 180.0),
        ("shift", math.inf),
        ("jitter", math.inf),
        ("jitter_clip", math.inf),
        ("dropout", 1.0),
    ):
        value = getattr(spec, name)
        if not 0 <= value <= most:
            raise UserError(f"{name}: expected 0 .. {most:g}, got {value}")


# --- meshes ------------------------------------------------------------------------------------------------------------


def mesh(path: str, points: int = 8192) -> dict[str, bytes]:
    """A mesh (obj, ply, stl, off, glb, gltf) -> members `points.npy` and `json`: points drawn evenly from its surface, float32,
    with the vertices', faces' or texture's colours if it has them. Of a file without faces, the vertices, `points` of them.

    Scenes are put together as they stand. Files beside the mesh (materials, buffers) are read, outside its folder none is.
    Raises UserError if trimesh is missing, ValueError if points < 1, DamagedSample.
    """
    if points < 1:
        raise ValueError(f"points: expected at least 1, got {points}")
    try:
        trimesh = importlib.import_module("trimesh")
    except ImportError as error:
        raise UserError(f"meshes need trimesh: pip install vlpfast[points] ({error})") from error
    try:
        with open(path, "rb") as file:
            kind = os.path.splitext(path)[1][1:].lower()
            beside = trimesh.resolvers.FilePathResolver(path)
            scene = trimesh.load_scene(file, file_type=kind, resolver=beside, allow_remote=False, process=False)
        found = _sampled(trimesh, scene, points)
    except (DamagedSample, MemoryError):
        raise
    except ImportError as error:  # trimesh imports what a format needs when it needs it ...
        if isinstance(error.__context__, UnicodeDecodeError):  # ... here to guess how a damaged text is encoded
            raise DamagedSample("the mesh cannot be read: it is not UTF-8") from error
        raise UserError(f"meshes like {os.path.basename(path)} need {error.name}: pip install {error.name} ({error})") from error
    except Exception as error:  # trimesh raises whatever its parsing runs into
        raise DamagedSample(f"the mesh cannot be read: {error or type(error).__name__}") from error
    stream = io.BytesIO()
    np.save(stream, found, allow_pickle=False)
    return {"points.npy": stream.getvalue(), "json": json.dumps({"points": describe(found)}).encode()}


def _sampled(trimesh: Any, scene: Any, count: int) -> np.ndarray:
    """-> float32 [count, 3 or 6]"""
    parts = []  # geometry, and its vertices where they stand in the scene
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        part = scene.geometry[name]
        if isinstance(part, (trimesh.Trimesh, trimesh.PointCloud)):
            vertices = trimesh.transformations.transform_points(part.vertices, transform)
            if not np.isfinite(vertices).all():
                raise DamagedSample("the mesh has vertices that are no finite numbers")
            parts.append((part, vertices))
    solid = [(part, vertices) for part, vertices in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    if not solid:
        clouds = [part for part, vertices in parts if isinstance(part, trimesh.PointCloud) and len(vertices)]
        if not clouds:
            raise DamagedSample("the mesh has neither faces nor points")
        xyz = np.concatenate([vertices for part, vertices in parts if any(part is cloud for cloud in clouds)])
        kept = np.arange(len(xyz))
        if len(xyz) > count:
            kept = np.sort(np.random.Generator(np.random.PCG64(_SEED)).choice(len(xyz), count, replace=False))
        coloured = all(cloud.colors is not None and len(cloud.colors) == len(cloud.vertices) for cloud in clouds)
        rgb = np.concatenate([cloud.colors[:, :3] / 255 for cloud in clouds])[kept] if coloured else None
        return _joined(xyz[kept], rgb)
    whole = trimesh.util.concatenate([trimesh.Trimesh(vertices, part.faces, process=False) for part, vertices in solid])
    if not whole.area > 0:
        raise DamagedSample("the mesh has no area")
    xyz, faces = trimesh.sample.sample_surface(whole, count, seed=_SEED)
    weights = trimesh.triangles.points_to_barycentric(whole.triangles[faces], xyz, method="cross")  # [count, 3]
    rgb, first = np.zeros((count, 3)), 0
    for part, _ in solid:
        here = (faces >= first) & (faces < first + len(part.faces))
        colours = _colours(trimesh, part, faces[here] - first, weights[here])
        if colours is None:  # a mesh whose parts do not all have colours has none
            return _joined(xyz, None)
        rgb[here] = colours[:, :3] / 255
        first += len(part.faces)
    return _joined(xyz, rgb.clip(0, 1))


def _colours(trimesh: Any, part: Any, faces: np.ndarray, weights: np.ndarray) -> np.ndarray | None:
    """Of points on these faces, weights [N, 3] of the corners -> [N, 3 or 4] in 0 .. 255"""
    corners = part.faces[faces]  # [N, 3]
    if part.visual.kind == "vertex":
        return (part.visual.vertex_colors[corners] * weights[:, :, None]).sum(1)
    if part.visual.kind == "face":
        return part.visual.face_colors[faces]
    if part.visual.kind != "texture":
        return None
    material = part.visual.material
    simple = isinstance(material, trimesh.visual.material.SimpleMaterial)
    picture = material.image if simple else getattr(material, "baseColorTexture", None)
    if not simple and not isinstance(material, trimesh.visual.material.PBRMaterial):
        return None
    if simple and not material.kwargs and (picture is None or picture.size == (2, 2)):
        return None  # trimesh makes a grey material up where the file has none
    factor = None if simple or material.baseColorFactor is None else np.asarray(material.baseColorFactor, np.float64)
    if picture is not None and part.visual.uv is not None:
        uv = (part.visual.uv[corners] * weights[:, :, None]).sum(1)
        colours = trimesh.visual.color.uv_to_color(uv, picture).astype(np.float64)
        return colours if factor is None else colours * factor / 255
    if simple:
        return np.tile(material.main_color, (len(faces), 1))
    return None if factor is None else np.tile(factor, (len(faces), 1))


def _joined(xyz: np.ndarray, rgb: np.ndarray | None) -> np.ndarray:
    found = np.ascontiguousarray(xyz if rgb is None else np.concatenate([xyz, rgb], 1), np.float32)
    if not np.isfinite(found).all():
        raise DamagedSample("the mesh has points that float32 cannot hold")
    return found
