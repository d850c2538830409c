"""Builds of volumes with what belongs to them: label maps beside NIfTI files, reports from a table for DICOM series."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlpfast.cli import data
from vlpfast.data import ShardSet, make_loader
from vlpfast.data.build import build
from vlpfast.data.inputs import Options
from vlpfast.data.sources import partner
from vlpfast.data.volume_file import read_header, read_labels
from vlpfast.types import DataSpec, UserError, VolumeSpec

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

AFFINE = np.diag([-0.8, 0.8, 2.0, 1.0])  # from right to left


def contents(out: Path) -> dict[str, dict[str, bytes]]:
    shards = ShardSet(str(out))
    return {
        shards.key(i): {name: shards.read([i], [name])[0].tobytes() for name in shards.extensions(i)} for i in range(len(shards))
    }


def skipped(out: Path) -> list[tuple[str, str]]:
    lines = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    return [(line["source"], line["reason"]) for line in lines]


# --- label maps ------------------------------------------------------------------------------------------------------------


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def volume_and_labels(number: int) -> tuple[np.ndarray, np.ndarray]:
    """int16 and uint8 [4, 5, 6]; no two label maps are the same."""
    voxels = np.random.default_rng(number).integers(-900, 900, (4, 5, 6)).astype(np.int16)
    return voxels, ((voxels > 0) * (number + 1)).astype(np.uint8)


def labels_of(members: dict[str, bytes]) -> np.ndarray:
    """-> [D, H, W]"""
    content = np.frombuffer(members["vol"], np.uint8)
    info = read_header(content)
    assert info.labels
    return read_labels(content, info, *(np.arange(n) for n in info.shape))


LAYOUTS = {
    "nnU-Net": ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"),
    "MSD": ("imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz"),
    "beside": ("{}.nii.gz", "{}_seg.nii.gz"),
    "a folder each": ("{}/{}_ct.nii", "{}/{}_mask.nii.gz"),
    "folders of masks": ("{}/ct.nii.gz", "masks/{}/liver.nii"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("folder", ["", "deep/set.1/"])
def test_layouts_of_label_maps(tmp_path: Path, name: str, folder: str) -> None:
    """Each volume gets its own label map, in the volume's orientation, and no label map becomes a volume."""
    volumes, maps = LAYOUTS[name]
    cases = {f"case (1).{number}": volume_and_labels(number) for number in range(3)}
    for case, (voxels, labels) in cases.items():
        save(tmp_path / "src" / folder / volumes.replace("{}", case), voxels)
        save(tmp_path / "src" / folder / maps.replace("{}", case), labels)
    report = build("nifti", tmp_path / "src", tmp_path / "out", Options(captions=False, labels=(volumes, maps)))
    assert (report.samples, report.skipped) == (3, 0)
    for members, (_, labels) in zip(contents(tmp_path / "out").values(), cases.values(), strict=True):
        assert np.array_equal(labels_of(members), labels[::-1].T)
        assert json.loads(members["json"])["volume"]["labels"] is True


def test_label_maps_reach_the_batch(tmp_path: Path) -> None:
    for number in range(2):
        voxels, labels = volume_and_labels(number)
        save(tmp_path / "src" / f"images/{number}.nii.gz", voxels)
        save(tmp_path / "src" / f"labels/{number}.nii.gz", labels)
    command = ["build", "nifti", str(tmp_path / "src"), str(tmp_path / "out"), "--no-captions", "--workers", "1"]
    assert data.main([*command, "--labels", "images/{}.nii.gz", "labels/{}.nii.gz"]) == 0
    spec = DataSpec(None, None, volume=VolumeSpec([6, 5, 4], labels=True, windows=[[0.0, 2.0]]))
    (batch,) = make_loader(str(tmp_path / "out"), spec, None, 2, train=False)
    assert [int(labels.max()) for labels in batch["volume_labels"]] == [1, 2]
    assert ((batch["volume"][:, 0] > 0.5) == (batch["volume_labels"] > 0)).all()  # labelled where voxels are positive


def test_volumes_without_their_label_map_are_skipped(tmp_path: Path) -> None:
    voxels, labels = volume_and_labels(0)
    src = tmp_path / "src"
    for name in ("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTr/b_0000.nii.gz", "imagesTs/t_0000.nii.gz"):
        save(src / name, voxels)
    save(src / "labelsTr/a.nii.gz", labels)
    save(src / "labelsTr/lonely.nii.gz", labels)
    for case, (drawn, affine) in {
        "shape": (labels[:3], AFFINE),
        "place": (labels, AFFINE + 0.3 * np.eye(4, k=3)),
        "number": (labels.astype(np.int16) * 300, AFFINE),
    }.items():
        save(src / f"imagesTr/{case}_0000.nii.gz", voxels)
        save(src / f"labelsTr/{case}.nii.gz", drawn, affine)
    save(src / "imagesTr/out_0000.nii.gz", voxels)
    save(tmp_path / "secret.nii.gz", labels)
    (src / "labelsTr/out.nii.gz").symlink_to(tmp_path / "secret.nii.gz")
    report = build("nifti", src, tmp_path / "out", Options(captions=False, labels=LAYOUTS["nnU-Net"]))
    assert (report.samples, report.skipped) == (1, 8) and list(contents(tmp_path / "out")) == ["imagesTr/a_0000"]
    reasons = dict(skipped(tmp_path / "out"))
    misfit = "its name does not fit imagesTr/{}_0000.nii.gz (--labels)"
    for name in ("imagesTr/a_0001.nii.gz", "imagesTs/t_0000.nii.gz", "labelsTr/lonely.nii.gz"):
        assert reasons.pop(name) == misfit
    assert reasons.pop("imagesTr/b_0000.nii.gz") == "it has no label map labelsTr/b.nii.gz"
    for case, reason in {
        "shape": "lies on another grid: (3, 5, 6) voxels, the volume has (4, 5, 6)",
        "place": "puts voxels up to 0.3 mm",
        "number": "something else than whole numbers 0 .. 255",
        "out": "leads out of",
    }.items():
        assert reason in reasons.pop(f"imagesTr/{case}_0000.nii.gz")
    assert not reasons


def test_names_of_partners() -> None:
    assert partner("{}.nii", "{}_seg.nii", "a/b_seg.nii") == "a/b_seg_seg.nii"
    assert partner("x/{}.nii", "y/{}.nii", "ax/b.nii") == ""  # whole names of folders
    assert partner("x/{}.nii", "y/{}.nii", "x/b/c.nii") == ""
    assert partner("{}/{}.nii", "{}.nii", "a/b.nii") == "" and partner("{}/{}.nii", "{}.nii", "d/a/a.nii") == "d/a.nii"
    assert partner("{}.nii", "{}.nii.gz", ".nii") == ""


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("{}.nii",), "expected two names of files"),
        (("x.nii", "{}.nii"), r"expected two names of files .* got 'x.nii' '\{\}.nii'"),
        (("{}.nii", "{}_seg"), "expected two names of files"),
        (("{}.nii", "{}.nii"), "names both the volume and its label map"),
    ],
)
def test_patterns_that_are_refused(tmp_path: Path, labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=f"--labels: .*{message}"):
        build("nifti", tmp_path, tmp_path.parent / "out", Options(labels=labels))
    with pytest.raises(UserError, match="meshes have no use for labels="):
        build("meshes", tmp_path, tmp_path.parent / "out", Options(labels=LAYOUTS["MSD"]))
