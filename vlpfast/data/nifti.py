"""Volumes from NIfTI, for building shards; and what every volume goes through before it is written: its axes, its type, its
JSON. Layout: volume_file.py."""

from __future__ import annotations

import importlib
import json
import math
from typing import Any

import numpy as np

from vlpfast.data.pictures import DamagedSample
from vlpfast.data.volume_file import MAX_VOXELS, encode_volume
from vlpfast.types import UserError

_SAME_PLACE = 0.1  # of a voxel: headers are rounded, and programs round what they write


def require(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs {name}: pip install vlpfast[medical] ({error})") from error


def said(error: Exception) -> str:
    return f"cannot be read ({type(error).__name__})"  # without its words, which may repeat what the file says of a patient


def nifti(
    path: str, *, labels: str | None = None, fill: float | None = None, modality: str = "", threshold: float | None = None
) -> dict[str, bytes]:
    """A .nii or .nii.gz -> members `vol` and `json`, brought to the axes that are closest to RAS.

    labels: a file of whole numbers 0 .. 255, of the same shape, and the same affine to a tenth of a voxel. fill: the value of
    voxels that are no number; None refuses them. modality, threshold: as encode_volume takes them. Raises UserError if nibabel
    is missing, DamagedSample.
    """
    nibabel = require("nibabel", "NIfTI")
    stored, affine, slope, intercept = _read_nifti(nibabel, path)
    if stored.dtype.kind == "f":
        holes = ~np.isfinite(stored)
        if holes.any():
            if fill is None:
                raise DamagedSample(f"{int(holes.sum())} voxels are no finite number")
            stored = np.where(holes, (fill - intercept) / slope, stored)
    drawn = None
    if labels is not None:
        try:
            drawn, other, label_slope, label_intercept = _read_nifti(nibabel, labels)
        except DamagedSample as error:
            raise DamagedSample(f"the label map: {error}") from error
        drawn = drawn * np.float64(label_slope) + label_intercept
        if drawn.shape != stored.shape:
            raise DamagedSample(f"the label map lies on another grid: {drawn.shape} voxels, the volume has {stored.shape}")
        if (apart := _apart(affine, other, stored.shape)) > _SAME_PLACE * np.linalg.norm(affine[:3, :3], axis=0).min():
            raise DamagedSample(f"the label map lies elsewhere: its affine puts voxels up to {apart:.4g} mm from the volume's")
        if not ((drawn == np.rint(drawn)) & (drawn >= 0) & (drawn <= 255)).all():
            raise DamagedSample("the label map holds something else than whole numbers 0 .. 255")
        drawn = drawn.astype(np.uint8).T
    return volume_members(stored.T, affine, slope, intercept, modality, None, threshold, drawn)


def _apart(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """The largest distance in mm between what two affines make of the same voxel: that of a corner."""
    corners = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)])  # [8, 4]
    return float(np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1).max())


def _read_nifti(nibabel: Any, path: str) -> tuple[np.ndarray, np.ndarray, float, float]:
    """-> numbers as stored [X, Y, Z], affine in mm, slope, intercept"""
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise DamagedSample(f"a {type(image).__name__}, expected a NIfTI file (.nii, .nii.gz)")
        header = image.header
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3:
            raise DamagedSample(f"{len(shape)} dimensions {shape}, expected one volume of three: split it beforehand")
        if not 0 < math.prod(shape) <= MAX_VOXELS:
            raise DamagedSample(f"shape {shape}: expected 1 .. {MAX_VOXELS} voxels")
        if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
            raise DamagedSample("it does not say how it lies (sform and qform codes are 0): the affine is unknown")
        if header.get_data_dtype().kind not in "iuf":
            raise DamagedSample(f"voxels of the type {header.get_data_dtype()}, expected numbers")
        unit = {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)
        affine = np.diag([unit, unit, unit, 1.0]) @ image.affine
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise DamagedSample(f"the affine is singular: {affine[:3].round(4).tolist()}")
        slope, intercept = (float(value) for value in (image.dataobj.slope, image.dataobj.inter))
        stored = np.asarray(image.dataobj.get_unscaled()).reshape(shape)
    except (DamagedSample, MemoryError):
        raise
    except Exception as error:  # nibabel raises whatever its parsing runs into
        raise DamagedSample(said(error)) from error
    if slope <= 0:
        stored, slope, intercept = stored * np.float64(slope) + intercept, 1.0, 0.0
    return stored, affine, slope, intercept


# --- members ----------------------------------------------------------------------------------------------------------


def volume_members(
    stored: np.ndarray,
    affine: np.ndarray,
    slope: float,
    intercept: float,
    modality: str,
    dicom: dict[str, Any] | None,
    threshold: float | None = None,
    labels: np.ndarray | None = None,
) -> dict[str, bytes]:
    """stored [D, H, W], affine w, h, d, 1 -> RAS mm; in any orientation."""
    stored, turned = to_ras(stored, affine)
    if labels is not None:
        labels, _ = to_ras(labels, affine)
    try:
        vol = encode_volume(
            _compact(stored), turned, slope=slope, intercept=intercept, modality=modality, threshold=threshold, labels=labels
        )
    except ValueError as error:
        raise DamagedSample(str(error)) from error
    about = {
        "shape": list(stored.shape),
        "spacing": [round(float(length), 6) for length in np.linalg.norm(turned[:3, 2::-1], axis=0)],
        "orientation": "RAS",
        "modality": modality,
        "labels": labels is not None,
    }
    return {"vol": vol, "json": json.dumps({"volume": about} | ({"dicom": dicom} if dicom is not None else {})).encode()}


def to_ras(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """voxels [D, H, W] and affine w, h, d, 1 -> RAS mm of any orientation -> the same with the axes, exchanged and turned round,
    that are closest to RAS; no voxel is interpolated."""
    nibabel = require("nibabel", "NIfTI")
    turns = nibabel.orientations.io_orientation(affine)  # [3, 2]
    turned = affine @ nibabel.orientations.inv_ornt_aff(turns, voxels.T.shape)
    return np.ascontiguousarray(nibabel.orientations.apply_orientation(voxels.T, turns).T), turned


def _compact(voxels: np.ndarray) -> np.ndarray:
    """As the smallest of volume_file.DTYPES that holds every value; floating point as float32."""
    if voxels.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return voxels.astype(np.float32)
    low, high = int(voxels.min()), int(voxels.max())
    for dtype in (np.uint8, np.int16, np.uint16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return voxels.astype(dtype)
    if max(abs(low), abs(high)) <= 1 << 24:  # exact in float32
        return voxels.astype(np.float32)
    raise DamagedSample(f"whole numbers from {low} to {high}, which no type of voxels holds")
