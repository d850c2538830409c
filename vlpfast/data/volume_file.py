"""The member `vol`: a volume that can be cut without unpacking all of it, and without pickles.

    8 bytes     VLPVOL1 and a line feed
    4 bytes     length of the header, unsigned, little-endian
    4 bytes     zlib.crc32 of the header, unsigned, little-endian
    header      JSON, UTF-8, padded with spaces so that the slices begin at a multiple of 64 bytes
    slices      each by itself through zlib, first those of the voxels, then those of the label map if there is one

A slice is [H, W] of little-endian numbers, without gaps. The header:

    shape       [D, H, W]; D grows towards the patient's head, H to the front, W to the right (the axes of RAS, in reverse)
    dtype       "uint8", "int16", "uint16" or "float32"; labels are uint8
    slope, intercept    a voxel's value (Hounsfield units in CT) is slope * number + intercept
    spacing     [D, H, W] mm
    affine      4 x 4: w, h, d, 1 -> x, y, z, 1 in mm, RAS
    modality    "CT", "MR", ..., "" if unknown
    foreground  [d, h, w, depth, height, width] of the smallest box around the voxels above the foreground's threshold
    percentiles values of those voxels at PERCENTILES
    ends        where each slice ends, counted from the first one's begin; D numbers, or 2 D with labels
    labels      whether there is a label map

Slices that are stored (zlib's level 0) unpack at the speed of memory; either way zlib's checksums tell damage.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlpfast.data.pictures import DamagedSample

MAGIC = b"VLPVOL1\n"
DTYPES = ("uint8", "int16", "uint16", "float32")
MAX_VOXELS = 1 << 30
PERCENTILES = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)
_CT_BACKGROUND = -500.0  # HU; below lie air, lungs and clothes
_ALIGNMENT = 64
_HEAD = struct.Struct("<8sII")


class VolumeInfo(NamedTuple):
    shape: tuple[int, int, int]
    dtype: str
    slope: float
    intercept: float
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]
    modality: str
    foreground: tuple[int, ...]
    percentiles: tuple[float, ...]
    ends: tuple[int, ...]
    labels: bool
    begin: int  # of the first slice in the member


def encode_volume(
    voxels: np.ndarray,
    affine: np.ndarray,
    *,
    slope: float = 1.0,
    intercept: float = 0.0,
    modality: str = "",
    threshold: float | None = None,
    labels: np.ndarray | None = None,
    level: int = 1,
) -> bytes:
    """voxels [D, H, W] of one of DTYPES, axes as the header says; affine [4, 4] w, h, d, 1 -> RAS mm; labels uint8 [D, H, W].

    threshold: value above which a voxel is foreground; None: -500 in CT, else the volume's lowest value. level: zlib's, 0 .. 9.
    Raises ValueError, TypeError.
    """
    if voxels.dtype.name not in DTYPES:
        raise TypeError(f"voxels: expected one of {', '.join(DTYPES)}, got {voxels.dtype}")
    if voxels.ndim != 3 or not 0 < voxels.size <= MAX_VOXELS:
        raise ValueError(f"voxels: expected shape [D, H, W] of 1 .. {MAX_VOXELS} voxels, got {voxels.shape}")
    if voxels.dtype == np.float32 and not np.isfinite(voxels).all():
        raise ValueError("voxels: expected finite values")
    if not slope > 0:
        raise ValueError(f"slope: expected a positive number, got {slope}")
    affine = np.asarray(affine, np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError(f"affine: expected an invertible 4 x 4 matrix, got {affine.tolist()}")
    if labels is not None and (labels.dtype != np.uint8 or labels.shape != voxels.shape):
        raise ValueError(f"labels: expected uint8 {voxels.shape}, got {labels.dtype} {labels.shape}")
    box, percentiles = _foreground(voxels, slope, intercept, _CT_BACKGROUND if modality == "CT" else None, threshold)
    arrays = [voxels.astype(voxels.dtype.newbyteorder("<"), copy=False)] + ([labels] if labels is not None else [])
    packed = [zlib.compress(np.ascontiguousarray(plane), level) for array in arrays for plane in array]
    header = {
        "shape": list(voxels.shape),
        "dtype": voxels.dtype.name,
        "slope": float(slope),
        "intercept": float(intercept),
        "spacing": [float(length) for length in np.linalg.norm(affine[:3, 2::-1], axis=0)],
        "affine": affine.tolist(),
        "modality": modality,
        "foreground": box,
        "percentiles": percentiles,
        "labels": labels is not None,
        "ends": np.cumsum([len(plane) for plane in packed]).tolist(),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_HEAD.size + len(text)) % _ALIGNMENT)
    return b"".join([_HEAD.pack(MAGIC, len(text), zlib.crc32(text)), text, *packed])


def _foreground(
    voxels: np.ndarray, slope: float, intercept: float, usual: float | None, threshold: float | None
) -> tuple[list[int], list[float]]:
    """-> box and percentiles; those of the whole volume if nothing is above the threshold."""
    limit = threshold if threshold is not None else usual
    above = voxels > (voxels.min() if limit is None else (limit - intercept) / slope)  # [D, H, W]
    if not above.any():
        above = np.ones_like(above)
    box = []
    for axis in range(3):
        places = np.flatnonzero(above.any(axis=tuple({0, 1, 2} - {axis})))
        box.append((int(places[0]), int(places[-1] - places[0] + 1)))
    numbers = np.percentile(voxels[above], PERCENTILES, method="inverted_cdf")
    return [begin for begin, _ in box] + [extent for _, extent in box], (numbers.astype(np.float64) * slope + intercept).tolist()


def read_header(content: np.ndarray) -> VolumeInfo:
    """content: uint8 bytes of the member. Raises DamagedSample."""
    head = content[: _HEAD.size].tobytes()
    if not head.startswith(MAGIC) or len(head) < _HEAD.size:
        raise DamagedSample("not a volume of vlpfast")
    _, length, checksum = _HEAD.unpack(head)
    begin = _HEAD.size + length
    if begin > len(content):
        raise DamagedSample("the volume is cut short")
    text = content[_HEAD.size : begin].tobytes()
    if zlib.crc32(text) != checksum:
        raise DamagedSample("the volume's header is damaged: its checksum is another")
    try:
        header = json.loads(text)
        info = VolumeInfo(
            shape=_numbers(header["shape"], int, 3),
            dtype=header["dtype"],
            slope=float(header["slope"]),
            intercept=float(header["intercept"]),
            spacing=_numbers(header["spacing"], float, 3),
            affine=tuple(_numbers(row, float, 4) for row in header["affine"]),
            modality=str(header["modality"]),
            foreground=_numbers(header["foreground"], int, 6),
            percentiles=_numbers(header["percentiles"], float, len(PERCENTILES)),
            ends=tuple(int(end) for end in header["ends"]),
            labels=bool(header["labels"]),
            begin=begin,
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DamagedSample(f"the volume's header is damaged: {type(error).__name__}: {error}") from error
    if problem := _problem(info):
        raise DamagedSample(f"the volume's header is damaged: {problem}")
    if begin + info.ends[-1] != len(content):
        raise DamagedSample(f"the volume has {len(content)} bytes, its header says {begin + info.ends[-1]}")
    return info


def _numbers(values: Sequence[float], kind: type, count: int) -> tuple:
    if len(values) != count:
        raise ValueError(f"expected {count} numbers, got {values!r}")
    return tuple(kind(value) for value in values)


def _problem(info: VolumeInfo) -> str:
    depth, height, width = info.shape
    if info.dtype not in DTYPES:
        return f"dtype {info.dtype!r}"
    if min(info.shape) < 1 or depth * height * width > MAX_VOXELS:
        return f"shape {info.shape}"
    numbers = [info.slope, info.intercept, *info.spacing, *info.percentiles, *np.ravel(info.affine)]
    if not np.isfinite(numbers).all() or info.slope <= 0 or min(info.spacing) <= 0:
        return "numbers that are none, or not positive"
    if len(info.ends) != depth * (1 + info.labels) or any(np.diff((0, *info.ends)) <= 0):
        return f"{len(info.ends)} ends of slices that do not fit a depth of {depth}"
    corner, extent = np.array(info.foreground[:3]), np.array(info.foreground[3:])
    if (corner < 0).any() or (extent < 1).any() or (corner + extent > info.shape).any():
        return f"foreground {info.foreground}"
    return ""


def read_slices(content: np.ndarray, info: VolumeInfo, numbers: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """-> [len(numbers), len(rows), len(columns)] voxels as stored, in the machine's byte order. Raises DamagedSample."""
    return _read(content, info, numbers, rows, columns, np.dtype(info.dtype), 0)


def read_labels(content: np.ndarray, info: VolumeInfo, numbers: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """As read_slices; uint8."""
    return _read(content, info, numbers, rows, columns, np.dtype(np.uint8), info.shape[0])


def _read(
    content: np.ndarray,
    info: VolumeInfo,
    numbers: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    dtype: np.dtype,
    first: int,
) -> np.ndarray:
    block = np.empty((len(numbers), len(rows), len(columns)), dtype)
    size = info.shape[1] * info.shape[2] * dtype.itemsize
    done: dict[int, int] = {}  # a slice that is asked for several times is unpacked once
    for place, number in enumerate(numbers.tolist()):
        if number in done:
            block[place] = block[done[number]]
            continue
        begin, end = (0, *info.ends)[first + number : first + number + 2]
        unpacker = zlib.decompressobj()
        try:
            plane = unpacker.decompress(content[info.begin + begin : info.begin + end], size + 1)
        except zlib.error as error:
            raise DamagedSample(f"slice {number} of the volume is damaged: {error}") from error
        if len(plane) != size or not unpacker.eof:
            raise DamagedSample(f"slice {number} of the volume is damaged: it does not hold {size} bytes")
        whole = np.frombuffer(plane, dtype.newbyteorder("<")).reshape(info.shape[1:])
        block[place] = whole[_span(rows)][:, _span(columns)]
        done[number] = place
    return block


def _span(places: np.ndarray) -> slice | np.ndarray:
    """Places that follow each other as a slice, which is copied many times faster."""
    if (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places
