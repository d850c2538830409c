"""Volumes and X-rays from DICOM, for building shards; `nifti` beside them. Axes and layout: volume_file.py.

Files of patients say who they are. What goes into a shard is therefore listed here, and nothing else is taken: no name, number,
date, free text, private tag, and no UID but as a hash (series_key), by which reports can be joined to the samples.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlpfast.data.inputs import DamagedParts
from vlpfast.data.nifti import nifti, require, said, volume_members
from vlpfast.data.pictures import DamagedSample
from vlpfast.data.tables import Reports
from vlpfast.data.volume_file import MAX_VOXELS
from vlpfast.types import UserError

__all__ = ["KEPT", "dicom_series", "nifti", "series_key", "stack_order"]

# Numbers of the machine and codes of fixed meaning. Manufacturer, institution and all descriptions are left out on purpose.
KEPT = (
    "Modality",
    "BodyPartExamined",
    "Laterality",
    "ViewPosition",
    "PatientPosition",
    "SliceThickness",
    "KVP",
    "ConvolutionKernel",
    "MagneticFieldStrength",
    "RepetitionTime",
    "EchoTime",
    "InversionTime",
    "FlipAngle",
    "ScanningSequence",
    "SequenceVariant",
    "MRAcquisitionType",
)
_CODES = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 _-./+"
_PARALLEL = 1e-3  # how far two slices' direction cosines may be apart
_EQUAL_GAPS = 0.02  # of the gap: rounded positions and machines' tolerances
_HEADER_TAGS = [
    *KEPT,
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "BurnedInAnnotation",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]


class _Slice(NamedTuple):
    """One slice of a series, before its pixels are read."""

    path: str
    frame: int  # in the file
    position: np.ndarray  # [3] mm, LPS, of the first pixel's centre
    orientation: np.ndarray  # [6] direction in which columns follow each other, then rows
    spacing: tuple[float, float]  # mm between rows, between columns
    slope: float
    intercept: float


def series_key(uid: str) -> str:
    """SeriesInstanceUID (of X-rays: SOPInstanceUID) -> the sample's key."""
    return hashlib.sha256(uid.encode()).hexdigest()[:24]


def dicom_series(folder: str, reports: Reports | None = None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every series of the DICOM files in a folder, not in the folders within -> series_key, members.

    Series of slices become one `vol`, brought to the axes that are closest to RAS; pictures without a place in space (X-rays)
    one 16-bit `png` each: their linear window, if they have one, else from the darkest to the brightest pixel. `json` holds
    "volume" or "xray", and "dicom": what KEPT lists. Files that are not DICOM, and objects without pixels, are passed over.
    reports: each series' goes into `txt`; the identifier that it is found by goes nowhere.

    Raises UserError if pydicom or a decoder of a compressed transfer syntax is missing; DamagedParts, after all that is whole,
    that names each series which is not: missing or doubled slices, unequal gaps, different orientations, a tilted gantry, no
    report, ...
    """
    pydicom, _ = require("pydicom", "DICOM"), require("nibabel", "DICOM")
    root = os.path.realpath(folder)
    files: dict[str, list[tuple[str, Any]]] = defaultdict(list)  # SeriesInstanceUID -> path, header
    problems: list[str] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if not entry.is_file() or entry.name.startswith(".") or entry.name == "DICOMDIR":
            continue
        if os.path.commonpath([root, os.path.realpath(entry.path)]) != root:
            problems.append(f"{entry.name}: leads out of the folder")
            continue
        try:
            uid, header = _header(pydicom, entry.path, [reports.by] if reports else [])
        except DamagedSample as damage:
            problems.append(f"{entry.name}: {damage}")
            continue
        if header is not None:
            files[uid].append((entry.path, header))
    for uid, members in files.items():
        names = (
            f"{os.path.basename(members[0][0])} and {len(members) - 1} more" if members[1:] else os.path.basename(members[0][0])
        )
        try:
            yield from _series(pydicom, uid, members, reports)
        except DamagedSample as damage:
            problems.append(f"series {series_key(uid)} ({names}): {damage}")
    if problems:
        raise DamagedParts(*problems)


def _header(pydicom: Any, path: str, more: list[str]) -> tuple[str, Any]:
    """-> SeriesInstanceUID, the data set without its pixels; "", None if the file is not DICOM or holds no picture."""
    try:
        with open(path, "rb") as file:
            file.seek(128)
            is_dicom = file.read(4) == b"DICM"
        if not is_dicom:
            if path.lower().endswith((".dcm", ".dicom")):
                raise DamagedSample("not a DICOM file, whatever its name says")
            return "", None
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*_HEADER_TAGS, *more])
        return str(header.get("SeriesInstanceUID", "")), header if "Rows" in header and "Columns" in header else None
    except (DamagedSample, MemoryError):
        raise
    except Exception as error:  # pydicom raises whatever its parsing runs into
        raise DamagedSample(said(error)) from error


def _series(
    pydicom: Any, uid: str, files: list[tuple[str, Any]], reports: Reports | None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    if not uid:
        raise DamagedSample("no SeriesInstanceUID")
    try:
        once = {str(header.get("SOPInstanceUID", path)): (path, header) for path, header in reversed(files)}
        files = list(once.values())[::-1]  # a file that lies there twice is the same slice
        if any(str(header.get("BurnedInAnnotation", "")).upper() == "YES" for _, header in files):
            raise DamagedSample("its pictures have annotations burned in, which may name the patient")
        report = {}
        if reports is not None:
            report = reports.member({str(header.get(reports.by) or "").strip() for _, header in files})
        slices = [cut for path, header in files for cut in _slices(path, header)]
        if slices:
            if len(slices) != sum(_frames(header) for _, header in files):
                raise DamagedSample("some of its slices have no position")
            yield series_key(uid), {**_volume(pydicom, slices, files[0][1]), **report}
            return
        for path, header in files:
            yield series_key(str(header.get("SOPInstanceUID", uid))), {**_xray(pydicom, path, header), **report}
    except (DamagedSample, UserError, MemoryError):
        raise
    except Exception as error:
        raise DamagedSample(said(error)) from error


def _frames(header: Any) -> int:
    return int(header.get("NumberOfFrames", 1) or 1)


def _slices(path: str, header: Any) -> Iterator[_Slice]:
    """Those of the file's slices that have a place in space. Enhanced objects say it in functional groups, for each frame."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(frames) not in (0, _frames(header)):
        raise DamagedSample(f"{_frames(header)} frames, but positions of {len(frames)}")
    for number in range(_frames(header)):
        groups = [group for group in (frames[number] if frames else None, shared) if group is not None]

        def find(sequence: str, name: str, groups: list[Any] = groups) -> Any:
            for group in groups:
                if sequence in group and name in group[sequence].value[0]:
                    return group[sequence].value[0].get(name)
            return header.get(name)

        position = find("PlanePositionSequence", "ImagePositionPatient")
        orientation = find("PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = find("PixelMeasuresSequence", "PixelSpacing")
        if position is None or orientation is None:
            continue
        if not frames and _frames(header) > 1:
            raise DamagedSample(f"{_frames(header)} frames with one position")
        if spacing is None:
            raise DamagedSample("no PixelSpacing")
        slope, intercept = (find("PixelValueTransformationSequence", name) for name in ("RescaleSlope", "RescaleIntercept"))
        yield _Slice(
            path,
            number,
            _finite(position, 3, "ImagePositionPatient"),
            _finite(orientation, 6, "ImageOrientationPatient"),
            tuple(_finite(spacing, 2, "PixelSpacing").tolist()),
            1.0 if slope is None else float(slope),
            0.0 if intercept is None else float(intercept),
        )


def _finite(values: Any, count: int, name: str) -> np.ndarray:
    numbers = np.array([float(value) for value in values])
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise DamagedSample(f"{name}: expected {count} numbers")
    return numbers


def _volume(pydicom: Any, slices: list[_Slice], header: Any) -> dict[str, bytes]:
    ordered, affine = stack_order(slices)
    height, width = int(header.Rows), int(header.Columns)
    if len(ordered) * height * width > MAX_VOXELS:
        raise DamagedSample(f"{len(ordered)} x {height} x {width} voxels, more than {MAX_VOXELS}")
    stored: list[np.ndarray | None] = [None] * len(ordered)
    by_path = defaultdict(list)
    for place, cut in enumerate(ordered):
        by_path[cut.path].append((place, cut.frame))
    for path, wanted in by_path.items():
        pixels = _pixels(pydicom, path)  # [frames, H, W]
        for place, frame in wanted:
            if pixels[frame].shape != (height, width):
                raise DamagedSample(f"slices of {pixels[frame].shape} and of {(height, width)} pixels")
            stored[place] = pixels[frame]
    scales = {(cut.slope, cut.intercept) for cut in ordered}
    (slope, intercept) = scales.pop() if len(scales) == 1 else (1.0, 0.0)
    if scales or slope <= 0:  # each slice has its own (PET)
        stored = [plane * np.float64(cut.slope) + cut.intercept for plane, cut in zip(stored, ordered, strict=True)]
        slope, intercept = 1.0, 0.0
    return volume_members(np.stack(stored), affine, slope, intercept, str(header.get("Modality", "")), _kept(header))


def stack_order(slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """-> the slices along their common normal, and the affine [4, 4] of column, row, slice, 1 -> RAS mm. Raises DamagedSample
    where they are not an even stack."""
    first = slices[0]
    along_columns, along_rows = first.orientation[:3], first.orientation[3:]
    lengths = np.linalg.norm(along_columns), np.linalg.norm(along_rows)
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(along_columns @ along_rows)) > 1e-2:
        raise DamagedSample(f"ImageOrientationPatient {first.orientation.tolist()} is no pair of directions")
    if any(np.abs(cut.orientation - first.orientation).max() > _PARALLEL for cut in slices):
        raise DamagedSample("its slices have different orientations (a scout, or several series in one)")
    if any(np.abs(np.subtract(cut.spacing, first.spacing)).max() > 1e-3 * min(first.spacing) for cut in slices):
        raise DamagedSample("its slices have different pixel spacings")
    if min(first.spacing) <= 0:
        raise DamagedSample(f"PixelSpacing {first.spacing} is not positive")
    normal = np.cross(along_columns, along_rows)
    ordered = sorted(slices, key=lambda cut: float(cut.position @ normal))
    positions = np.array([cut.position for cut in ordered])  # [D, 3]
    if len(ordered) == 1:
        raise DamagedSample("a single slice is no volume")
    gaps = np.diff(positions @ normal)
    gap = float(np.median(gaps))
    if gaps.min() < 1e-3 * max(gap, 1e-3):
        raise DamagedSample(
            f"{int((gaps < 1e-3 * max(gap, 1e-3)).sum())} slices lie where another one does (several phases in one?)"
        )
    if (wrong := np.abs(gaps - gap) > _EQUAL_GAPS * gap).any():
        ratios = gaps[wrong] / gap
        if np.abs(ratios - np.rint(ratios)).max() < 0.1 and ratios.min() > 1.5:
            missing = int(np.rint(ratios).sum() - len(ratios))
            raise DamagedSample(f"slices are missing: {missing} of {len(ordered) + missing}, {gap:g} mm apart")
        raise DamagedSample(f"unequal gaps between its slices: {gaps.min():g} to {gaps.max():g} mm")
    line = positions[0] + np.outer((positions - positions[0]) @ normal, normal)
    if (aside := np.linalg.norm(positions - line, axis=1).max()) > 0.5 * min(first.spacing):
        raise DamagedSample(f"its slices are shifted sideways by up to {aside:.2f} mm (a tilted gantry)")
    step = (positions[-1] - positions[0]) @ normal / (len(ordered) - 1)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_columns * first.spacing[1], along_rows * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = normal * step, positions[0]
    return ordered, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS -> RAS


def _pixels(pydicom: Any, path: str, *, turn: bool = True) -> np.ndarray:
    """-> [frames, H, W] as stored; turn: MONOCHROME1 so that more is brighter, as in MONOCHROME2."""
    dataset = pydicom.dcmread(path)
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise DamagedSample("no transfer syntax")
    if syntax.is_compressed and syntax.name != "Deflated Explicit VR Little Endian":
        _check_decoder(syntax)
    if "ModalityLUTSequence" in dataset:
        raise DamagedSample("its values go through a table (ModalityLUTSequence), not through slope and intercept")
    kind = str(dataset.get("PhotometricInterpretation", ""))
    if int(dataset.get("SamplesPerPixel", 1)) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise DamagedSample(f"colours ({kind}), expected grey levels")
    try:
        pixels = np.asarray(dataset.pixel_array)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they run into
        raise DamagedSample(f"its pixels cannot be decoded: {error}") from error
    pixels = pixels if _frames(dataset) > 1 else pixels[None]
    if kind == "MONOCHROME1" and turn:
        bits = int(dataset.BitsStored)
        pixels = (-1 if int(dataset.PixelRepresentation) else (1 << bits) - 1) - pixels.astype(np.int64)
    return pixels


def _check_decoder(syntax: Any) -> None:
    pixels = importlib.import_module("pydicom.pixels")
    try:
        decoder = pixels.get_decoder(syntax)
    except NotImplementedError as error:
        raise DamagedSample(f"the transfer syntax {syntax.name} holds no pictures that can be read") from error
    if not decoder.is_available:
        raise UserError(f"DICOM: the transfer syntax {syntax.name} needs a decoder: {'; or '.join(decoder.missing_dependencies)}")


def _kept(header: Any) -> dict[str, Any]:
    """Numbers as they are, codes only if they look like codes."""
    record: dict[str, Any] = {}
    for name in KEPT:
        if (value := header.get(name)) in (None, ""):
            continue
        values = list(value) if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else [value]
        plain = [float(item) if isinstance(item, (int, float)) else str(item)[:32] for item in values]
        if all(math.isfinite(item) if isinstance(item, float) else set(item) <= set(_CODES) for item in plain):
            record[name] = plain if len(plain) > 1 else plain[0]
    return record


def _xray(pydicom: Any, path: str, header: Any) -> dict[str, bytes]:
    if _frames(header) > 1:
        raise DamagedSample(f"{_frames(header)} frames without positions: a film, not a volume")
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    levels = _pixels(pydicom, path, turn=False)[0] * slope + intercept
    low, high = levels.min(), levels.max()
    centre, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if centre is not None and width is not None and dataset.get("VOILUTFunction", "LINEAR") == "LINEAR":
        centre, width = (float(value[0] if type(value).__name__ == "MultiValue" else value) for value in (centre, width))
        if width > 1:  # PS3.3 C.11.2.1.2.1
            low, high = centre - width / 2, centre + width / 2 - 1
    shown = ((levels - low) / max(high - low, 1e-9)).clip(0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    grey = np.rint(65535 * shown).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG")
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    about = {"shape": list(grey.shape), "spacing": [float(value) for value in spacing] if spacing else None}
    return {"png": stream.getvalue(), "json": json.dumps({"xray": about, "dicom": _kept(header)}).encode()}
