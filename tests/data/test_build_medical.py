"""Builds of volumes with what belongs to them: label maps beside NIfTI files, reports from a table for DICOM series."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlpfast.cli import data
from vlpfast.data import ShardSet, make_loader
from vlpfast.data import build as building
from vlpfast.data.build import build
from vlpfast.data.inputs import Options
from vlpfast.data.medical import series_key
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


# --- reports ---------------------------------------------------------------------------------------------------------------


def series(folder: Path, number: int, *, slices: int = 3, **changes: str | None) -> str:
    """Slices of a CT series, all voxels `number`, in the study 1.7 -> its key. changes: of what identifies them, None: absent."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = f"1.2.46.{number}"
    for place in range(slices):
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = pydicom.uid.CTImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = f"{uid}.{place}"
        ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.Modality = uid, f"1.7.{number}", "CT"
        ds.PatientID, ds.AccessionNumber, ds.PatientName = f"ID-{number}", f"ACC-{number}", "DOE^JANE"
        ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = [0, 0, place], [1, 0, 0, 0, 1, 0], [1, 1]
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 2, 2, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.PixelData = np.full((2, 2), number, np.uint16).tobytes()
        for name, value in changes.items():
            setattr(ds, name, value)
            if value is None:
                del ds[name]
        ds.save_as(folder / f"{number}_{place}.dcm", enforce_file_format=True)
    return series_key(uid)


def put(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


VALUES = {"StudyInstanceUID": "1.7.{}", "SeriesInstanceUID": "1.2.46.{}", "AccessionNumber": "ACC-{}", "PatientID": "ID-{}"}


@pytest.mark.parametrize("by", VALUES)
def test_reports_by_each_identifier(tmp_path: Path, by: str) -> None:
    """Each series gets its own, and nothing of the identifier."""
    keys = {number: series(tmp_path / "src" / f"{number}", number) for number in (1, 2, 3)}
    rows = [f'{VALUES[by].format(number)} ,"Findings, ""{number}""\n none."' for number in (3, 1, 2, 9)]
    table = put(tmp_path / "reports.csv", "\n".join([f"{by},caption", *rows]))
    report = build("dicom", tmp_path / "src", tmp_path / "out", Options(reports=table, by=by))
    assert (report.samples, report.skipped) == (3, 0)
    found = contents(tmp_path / "out")
    assert {key: members["txt"].decode() for key, members in found.items()} == {
        keys[number]: f'Findings, "{number}"\n none.' for number in (1, 2, 3)
    }
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    for number in (1, 2, 3):
        for value in VALUES.values():
            assert value.format(number).encode() not in everything
    assert set(found[keys[1]]) == {"vol", "txt", "json"}


def test_reports_of_every_kind_of_table(tmp_path: Path) -> None:
    """Identifiers that a table holds as numbers are found, a text that looks like one is not taken for it."""
    pyarrow = pytest.importorskip("pyarrow", reason="waits for the package pyarrow")
    import gzip

    from pyarrow import parquet

    for number, accession in ((1, "17"), (2, "0017")):
        series(tmp_path / "src" / f"{number}", number, AccessionNumber=accession)
    options = {"by": "AccessionNumber", "key": "acc", "caption": "text"}
    lines = '{"acc": 17, "text": "seventeen"}\n\n{"acc": "0017", "text": "another"}\n{"acc": null, "text": "of none"}\n'
    tables = {
        "tsv": lambda path: put(path, "acc\ttext\n17\tseventeen\n0017\tanother\n"),
        "jsonl": lambda path: put(path, lines),
        "jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines.encode())),
        "parquet": lambda path: parquet.write_table(
            pyarrow.table({"acc": [17.0, float("nan"), None], "text": ["seventeen", None, "of none"]}), path
        ),
    }
    for kind, write in tables.items():
        path = tmp_path / f"reports.{kind}"
        write(path)
        build("dicom", tmp_path / "src", tmp_path / kind, Options(reports=str(path), **options))
        texts = [members["txt"] for members in contents(tmp_path / kind).values()]
        assert texts == ([b"seventeen", b"another"] if kind != "parquet" else [b"seventeen"]), kind


def test_studies_without_a_report(tmp_path: Path) -> None:
    """Each is counted, also where several lie in one folder; with --no-captions they are taken, but none that is ambiguous."""
    src = tmp_path / "src"
    keys = [series(src / ("a" if number < 4 else "b"), number) for number in range(6)]
    mixed = series(src / "b", 6)
    series(src / "b", 6, slices=1, StudyInstanceUID="1.8")
    absent = series(src / "c", 7, StudyInstanceUID=None)
    rows = [
        "1.7.0,whole",
        "1.7.1, ",
        "1.7.3,one",
        "1.7.3,another",
        "1.7.4,same",
        "1.7.4,same",
        "1.7.5,much too long",
        ",nobody's",
    ]
    table = put(tmp_path / "reports.csv", "\n".join(["StudyInstanceUID,caption", *rows]))
    report = build("dicom", src, tmp_path / "out", Options(reports=table, max_caption=8))
    assert (report.samples, report.skipped) == (2, 6)
    assert {key: members["txt"] for key, members in contents(tmp_path / "out").items()} == {keys[0]: b"whole", keys[4]: b"same"}
    reasons = {
        keys[1]: "its report is empty",
        keys[2]: "no report for its StudyInstanceUID",
        keys[3]: "the table has several reports for its StudyInstanceUID",
        keys[5]: "the caption has 13 characters, more than 8 (--max-caption)",
        mixed: "its files have 2 different StudyInstanceUID",
        absent: "it has no StudyInstanceUID, by which its report would be found",
    }
    found = skipped(tmp_path / "out")
    assert [source for source, _ in found] == ["a", "a", "a", "b", "b", "c"]
    for (key, reason), (_, said) in zip(reasons.items(), found, strict=True):
        assert said.startswith(f"series {key} (") and said.endswith(f"): {reason}")
    command = ["build", "dicom", str(src), str(tmp_path / "all"), "--reports", table, "--no-captions", "--workers", "1"]
    assert data.main([*command, "--by", "StudyInstanceUID"]) == 0
    found = contents(tmp_path / "all")
    assert set(found) == {keys[i] for i in (0, 1, 2, 4, 5)} | {absent}
    assert [keys.index(key) for key, members in found.items() if "txt" in members] == [0, 4, 5]


def test_any_number_of_workers_joins_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpfast.data.build._FEW", 64)  # two inputs are enough for workers
    for number in range(4):
        series(tmp_path / "src" / f"{number}", number)
    table = put(tmp_path / "reports.csv", "\n".join(["PatientID,caption", *(f"ID-{n},report {n}" for n in (0, 1, 3))]))
    for workers in (1, 2):
        build("dicom", tmp_path / "src", tmp_path / f"{workers}", Options(reports=table, by="PatientID"), workers=workers)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("1", "2"))
    assert first == second and len(contents(tmp_path / "2")) == 3


def test_xrays_have_reports_too(tmp_path: Path) -> None:
    plain = {"Modality": "DX", "ImagePositionPatient": None, "ImageOrientationPatient": None}
    series(tmp_path / "src", 1, slices=2, **plain)
    series(tmp_path / "src", 2, slices=1, **plain)
    table = put(tmp_path / "reports.csv", "AccessionNumber,caption\nACC-1,two views\n")
    report = build("dicom", tmp_path / "src", tmp_path / "out", Options(reports=table, by="AccessionNumber"))
    assert (report.samples, report.skipped) == (2, 1)
    for members in contents(tmp_path / "out").values():
        assert set(members) == {"png", "json", "txt"} and members["txt"] == b"two views"


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("samples_per_shard", [1, 3])
def test_an_interrupted_build_counts_each_study_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, samples_per_shard: int
) -> None:
    for number, folder in enumerate("aaaabbbc"):
        series(tmp_path / "src" / folder, number)
    table = put(tmp_path / "r.csv", "\n".join(["PatientID,caption", *(f"ID-{number},x" for number in (0, 2, 5, 6, 7))]))
    settings = {"options": Options(reports=table, by="PatientID"), "samples_per_shard": samples_per_shard, "workers": 1}
    build("dicom", tmp_path / "src", tmp_path / "whole", **settings)
    made = []
    make = building.make

    def stop(*arguments: object) -> list:
        if len(made) == fails_at:
            raise KeyboardInterrupt
        made.append(arguments)
        return make(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building, "make", stop)
        build("dicom", tmp_path / "src", tmp_path / "out", **settings)
    report = build("dicom", tmp_path / "src", tmp_path / "out", **settings)
    assert (report.samples, report.skipped) == (5, 3)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out"))
    assert first == second


def test_a_table_that_has_changed_is_another_build(tmp_path: Path) -> None:
    for number in range(3):
        series(tmp_path / "src" / f"{number}", number)
    table = put(tmp_path / "reports.csv", "StudyInstanceUID,caption\n1.7.0,one\n1.7.1,two\n")
    build("dicom", tmp_path / "src", tmp_path / "out", Options(reports=table))
    put(tmp_path / "reports.csv", "StudyInstanceUID,caption\n1.7.0,two\n1.7.1,one\n")
    with pytest.raises(UserError, match="holds a build with another reports"):
        build("dicom", tmp_path / "src", tmp_path / "out", Options(reports=table))
    build("dicom", tmp_path / "src", tmp_path / "new", Options(reports=table))
    assert [members["txt"] for members in contents(tmp_path / "new").values()] == [b"two", b"one"]


def test_tables_that_are_refused(tmp_path: Path) -> None:
    series(tmp_path / "src", 1)

    def fails(message: str, content: str = "", name: str = "r.csv", **options: object) -> None:
        if content:
            put(tmp_path / name, content)
        with pytest.raises(UserError, match=message):
            build("dicom", tmp_path / "src", tmp_path / "out", Options(**{"reports": str(tmp_path / name), **options}))

    good = "StudyInstanceUID,caption\n1.7.1,fine\n"
    fails(r"--reports: .*none.csv cannot be read: No such file", name="none.csv")
    fails(r"--reports: expected a CSV, TSV, Parquet or JSONL file, got .*r.txt", good, "r.txt")
    fails("--by: expected one of StudyInstanceUID, .*, PatientID, got 'StudyID'", good, by="StudyID")
    fails(r"has no column 'PatientID' \(--key, --by\); it has StudyInstanceUID, caption", good, by="PatientID")
    fails(r"has no column 'study' \(--key\)", good, key="study")
    fails(r"has no column 'text' \(--caption\)", good, caption="text")
    fails("several columns 'caption'", "StudyInstanceUID,caption,caption\n1,2,3\n")
    fails("r.csv, row 2: the row has 3 columns, the head has 2", good + "1,2,3\n")
    fails("r.jsonl, row 2: the json cannot be parsed", '{"StudyInstanceUID": "1", "caption": "x"}\n{', "r.jsonl")
    fails("r.jsonl, row 1, has no column 'caption'", '{"StudyInstanceUID": "1"}\n', "r.jsonl")
    fails("r.jsonl, row 1: 'caption' is list", '{"StudyInstanceUID": "1", "caption": []}\n', "r.jsonl")
    fails("r.jsonl.gz cannot be read", "no gzip", "r.jsonl.gz")
    fails("nothing was built .* no report for its", good.replace("1.7.1", "1.7.2"))
    fails("--by, --key and --caption say how --reports are to be read", reports="", by="PatientID")
    with pytest.raises(UserError, match="nifti have no use for reports="):
        build("nifti", tmp_path / "src", tmp_path / "out", Options(reports=str(tmp_path / "r.csv")))
