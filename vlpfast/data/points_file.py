"""The member `points.npy`: a point cloud as a .npy file (no pickles), [M, 3] x, y, z or [M, 6] with red, green, blue in 0 .. 1,
of float16, float32 or float64."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vlpfast.data.pictures import DamagedSample

MEMBERS = ("points.npy", "npy")  # the second may also hold something else
_MAX_POINTS = 1 << 26


class PointsInfo(NamedTuple):
    shape: tuple[int, int]
    dtype: np.dtype
    begin: int  # of the numbers in the member


def read_header(content: np.ndarray) -> PointsInfo:
    """content: uint8 bytes of a .npy file. Raises DamagedSample."""
    stream = io.BytesIO(content[: 1 << 12].tobytes())
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(stream)
    except MemoryError:
        raise
    except Exception as error:  # numpy raises whatever parsing the header as Python runs into
        raise DamagedSample(f"the points are no .npy file: {error}") from error
    if by_columns or len(shape) != 2 or shape[1] not in (3, 6) or dtype.kind != "f" or dtype.itemsize > 8:
        raise DamagedSample(f"points: expected rows of 3 or 6 floating-point numbers, got {dtype} {shape}")
    if not 0 < shape[0] <= _MAX_POINTS:
        raise DamagedSample(f"points: expected 1 .. {_MAX_POINTS}, got {shape[0]}")
    if stream.tell() + shape[0] * shape[1] * dtype.itemsize != len(content):
        raise DamagedSample(f"the points have {len(content)} bytes, their header says otherwise")
    return PointsInfo(shape, dtype, stream.tell())


def read_points(content: np.ndarray, info: PointsInfo) -> np.ndarray:
    """-> [M, 3 or 6] as stored. Raises DamagedSample."""
    numbers = np.frombuffer(content[info.begin :], info.dtype).reshape(info.shape)
    if not np.isfinite(numbers).all():
        raise DamagedSample("points that are no finite numbers")
    return numbers


def holds_points(content: np.ndarray) -> bool:
    """Whether a .npy file can be one, to the header."""
    try:
        read_header(content)
    except DamagedSample:
        return False
    return True


def describe(numbers: np.ndarray) -> dict[str, Any]:
    """[M, 3 or 6] -> count, colors (whether there are any), low and high: the box around them, x, y, z."""
    return {
        "count": len(numbers),
        "colors": numbers.shape[1] == 6,
        "low": numbers[:, :3].min(0).tolist(),
        "high": numbers[:, :3].max(0).tolist(),
    }


def points_info(file: BinaryIO) -> dict[str, Any]:
    """As `describe`. Raises DamagedSample."""
    content = np.frombuffer(file.read(), np.uint8)
    return describe(read_points(content, read_header(content)))


def npy_info(file: BinaryIO) -> dict[str, Any]:
    """As points_info; {} if it holds something else."""
    content = np.frombuffer(file.read(), np.uint8)
    return describe(read_points(content, read_header(content))) if holds_points(content) else {}
