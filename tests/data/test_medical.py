import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from vlpfast.data import ShardWriter, make_loader
from vlpfast.data import medical as medical_module
from vlpfast.data.medical import KEPT, dicom_series, nifti, series_key, stack_order
from vlpfast.data.pictures import DamagedSample
from vlpfast.data.volume_file import read_header, read_labels, read_slices
from vlpfast.types import DataSpec, ImageSpec, UserError, VolumeSpec

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

from pydicom.datadict import tag_for_keyword  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLSLossless, RLELossless, generate_uid  # noqa: E402

SECRETS = ("DOE^JANE", "ID-4711", "19610203", "St. Elsewhere", "Dr. House", "call Jane Doe", "PRIVATE-JANE")
FUZZ = int(os.environ.get("VLPFAST_FUZZ", "60"))  # bytes that are changed
AXIAL = [1, 0, 0, 0, 1, 0]  # columns to the patient's left, rows to the back


def picture(voxels, series="1.2.3", number=0, **changes):
    """A data set with everything that says who the patient is. Values None delete what is there."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.Modality = series, "1.2", "CT"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.InstitutionName, ds.ReferringPhysicianName = SECRETS[:5]
    ds.SeriesDescription, ds.PatientComments, ds.StudyDate = SECRETS[5], SECRETS[5], SECRETS[2]
    ds.private_block(0x0099, "VENDOR", create=True).add_new(1, "LO", SECRETS[6])
    ds.BodyPartExamined, ds.KVP, ds.ConvolutionKernel, ds.SliceThickness = "CHEST", "120", "B30f", "2.5"
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = [-10, 20, 2.5 * number], AXIAL, [0.8, 0.7]
    ds.Rows, ds.Columns = voxels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(voxels.dtype == np.int16)
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.PixelData = voxels.tobytes()
    for name, value in changes.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
    return ds


def save(ds, path):
    ds.save_as(path, enforce_file_format=True)


def stack(shape=(6, 5, 4), seed=0, dtype=np.uint16):
    return np.random.default_rng(seed).integers(0, 2000, shape).astype(dtype)


def write_series(folder, voxels, names=None, **changes):
    for number, plane in enumerate(voxels):
        save(picture(plane, number=number, **changes), folder / (names[number] if names else f"{9 - number}.dcm"))


def numbers(members):
    """-> values [D, H, W], VolumeInfo"""
    content = np.frombuffer(members["vol"], np.uint8)
    info = read_header(content)
    return read_slices(content, info, *(np.arange(n) for n in info.shape)) * info.slope + info.intercept, info


# --- series ----------------------------------------------------------------------------------------------------------------


def test_a_series_comes_back_exactly_in_ras(tmp_path):
    voxels = stack()
    write_series(tmp_path, voxels)
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / ".hidden.dcm").write_bytes(b"x")
    shutil.copy(tmp_path / "7.dcm", tmp_path / "the same slice again.dcm")
    ((key, members),) = dicom_series(str(tmp_path))
    assert key == series_key("1.2.3") and list(members) == ["vol", "json"]
    values, info = numbers(members)
    # files in reverse order; DICOM's x and y grow to the left and the back, RAS's to the right and the front
    assert np.array_equal(values, voxels[:, ::-1, ::-1].astype(float) - 1024)
    assert info.modality == "CT" and np.allclose(info.spacing, (2.5, 0.8, 0.7))
    # the first pixel of the file lies at (10, -20, 0) in RAS
    assert np.allclose(np.array(info.affine) @ [3, 4, 0, 1], [10, -20, 0, 1])
    assert np.allclose(np.array(info.affine)[:3, :3], np.diag([0.7, 0.8, 2.5]))
    about = json.loads(members["json"])
    assert about["volume"] == {
        "shape": [6, 5, 4],
        "spacing": [2.5, 0.8, 0.7],
        "orientation": "RAS",
        "modality": "CT",
        "labels": False,
    }
    assert about["dicom"] == {
        "Modality": "CT",
        "BodyPartExamined": "CHEST",
        "SliceThickness": 2.5,
        "KVP": 120.0,
        "ConvolutionKernel": "B30f",
    }


def test_nothing_says_who_the_patient_is(tmp_path):
    write_series(tmp_path, stack(), BodyPartExamined="CHEST")
    save(
        picture(stack()[0], "1.2.9", 0, Modality="DX", ImagePositionPatient=None, ImageOrientationPatient=None),
        tmp_path / "x.dcm",
    )
    save(picture(stack()[1], "1.2.8", 0, ImagePositionPatient=None), tmp_path / "w.dcm")
    for key, members in dicom_series(str(tmp_path)):
        everything = key.encode() + b"".join(members.values())
        for secret in (*SECRETS, "1.2.3", "1.2.9", "1.2.8", "DOE", "Jane"):
            assert secret.encode() not in everything
        assert set(json.loads(members["json"])["dicom"]) <= set(KEPT)
    assert all(tag_for_keyword(name) is not None for name in KEPT)


def test_what_does_not_look_like_a_code_is_left_out(tmp_path):
    write_series(tmp_path, stack(), ConvolutionKernel="Müller^Eva", KVP="90", ScanningSequence=["SE", "IR"], EchoTime="12.5")
    ((_, members),) = dicom_series(str(tmp_path))
    about = json.loads(members["json"])["dicom"]
    assert about["ScanningSequence"] == ["SE", "IR"] and about["EchoTime"] == 12.5 and "ConvolutionKernel" not in about


@pytest.mark.parametrize(
    "orientation", [AXIAL, [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1], [-1, 0, 0, 0, 1, 0], [0.8, 0.6, 0, 0.6, -0.8, 0]]
)
def test_any_orientation(tmp_path, orientation):
    """Every voxel keeps its place in the patient."""
    voxels = stack((4, 3, 5))
    columns, rows = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(columns, rows)
    origin = np.array([-7.0, 11.0, 13.0])
    for number in range(4):
        position = (origin + 2.5 * number * normal).tolist()
        save(
            picture(voxels[number], number=number, ImagePositionPatient=position, ImageOrientationPatient=orientation),
            tmp_path / f"{(number * 3) % 4}.dcm",
        )
    ((_, members),) = dicom_series(str(tmp_path))
    values, info = numbers(members)
    affine = np.array(info.affine)
    assert (np.abs(affine[:3, :3]).argmax(0) == [0, 1, 2]).all() and (np.diag(affine)[:3] > 0).all()
    seen = 0
    for number, row, column in np.ndindex(voxels.shape):
        place = origin + column * 0.7 * columns + row * 0.8 * rows + 2.5 * number * normal
        w, h, d = np.rint(np.linalg.solve(affine, [-place[0], -place[1], place[2], 1])[:3]).astype(int)
        assert values[d, h, w] == float(voxels[number, row, column]) - 1024
        seen += 1
    assert seen == values.size


def test_two_series_and_one_that_is_damaged(tmp_path):
    """What is whole comes out, then the damage is told."""
    write_series(tmp_path, stack(), [f"a{i}" for i in range(6)])
    write_series(
        tmp_path,
        stack((5, 5, 4), 1)[[0, 1, 2, 2, 3]],
        [f"b{i}" for i in range(5)],
        series="1.2.4",
        ImagePositionPatient=[0, 0, 0],
    )
    write_series(tmp_path, stack((3, 5, 4), 2), [f"c{i}" for i in range(3)], series="1.2.5", Modality="MR")
    (tmp_path / "d.dcm").write_bytes(b"no DICOM at all")
    (tmp_path / "e").write_bytes((tmp_path / "a0").read_bytes()[:300])
    found = []
    with pytest.raises(DamagedSample) as error:
        for key, members in dicom_series(str(tmp_path)):
            found.append((key, numbers(members)[0].shape))
    assert found == [(series_key("1.2.3"), (6, 5, 4)), (series_key("1.2.5"), (3, 5, 4))]
    assert "d.dcm: not a DICOM file" in str(error.value) and f"series {series_key('1.2.4')} (b0 and 4 more)" in str(error.value)
    assert "where another one does" in str(error.value)


def damaged(folder):
    with pytest.raises(DamagedSample) as error:
        list(dicom_series(str(folder)))
    return str(error.value)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([0, 1, 2, 4, 5, 6], "slices are missing: 1 of 7, 2.5 mm apart"),
        ([0, 1, 2, 3, 4, 7], "slices are missing: 2 of 8"),
        ([0, 1, 2, 3.5, 4, 5], "unequal gaps between its slices: 1.25 to 3.75 mm"),
        ([0, 1, 2, 3, 4, 5.1], "unequal gaps"),
        ([0, 1, 2, 3, 3, 4], "1 slices lie where another one does"),
    ],
)
def test_gaps(tmp_path, places, message):
    for number, (place, plane) in enumerate(zip(places, stack(), strict=True)):
        save(picture(plane, number=number, ImagePositionPatient=[0, 0, 2.5 * place]), tmp_path / f"{number}.dcm")
    assert message in damaged(tmp_path)


CHANGES = {
    "orientations": ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "different orientations"),
    "spacings": ({"PixelSpacing": [0.8, 0.9]}, "different pixel spacings"),
    "tilted": ({"ImagePositionPatient": [-10, 26, 2.5]}, "shifted sideways by up to 6.00 mm"),
    "no position": ({"ImagePositionPatient": None}, "some of its slices have no position"),
    "no spacing": ({"PixelSpacing": None}, "no PixelSpacing"),
    "colours": ({"PhotometricInterpretation": "RGB"}, "colours (RGB)"),
    "table": ({"ModalityLUTSequence": Sequence([Dataset()])}, "go through a table"),
    "burned": ({"BurnedInAnnotation": "YES"}, "annotations burned in"),
    "position": ({"ImagePositionPatient": [0, 1]}, "ImagePositionPatient: expected 3 numbers"),
    "cut": ({"PixelData": b"\0" * 10}, "its pixels cannot be decoded"),
    "size": ({"Rows": 4}, "slices of (4, 4) and of (5, 4) pixels"),
    "one frame's position": ({"NumberOfFrames": 3}, "3 frames with one position"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_slice_that_does_not_fit(tmp_path, name):
    changes, message = CHANGES[name]
    write_series(tmp_path, stack())
    save(picture(stack()[1], number=1, **changes), tmp_path / "8.dcm")
    assert message in damaged(tmp_path)


def test_orientations_that_are_none(tmp_path):
    write_series(tmp_path, stack(), ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
    assert "is no pair of directions" in damaged(tmp_path)


def test_single_slices_and_links(tmp_path):
    (tmp_path / "in").mkdir()
    save(picture(stack()[0]), tmp_path / "in" / "0.dcm")
    assert "a single slice is no volume" in damaged(tmp_path / "in")
    (tmp_path / "in" / "0.dcm").rename(tmp_path / "0.dcm")
    (tmp_path / "in" / "0.dcm").symlink_to(tmp_path / "0.dcm")
    assert "0.dcm: leads out of the folder" in damaged(tmp_path / "in")
    (tmp_path / "in" / "0.dcm").unlink()
    assert list(dicom_series(str(tmp_path / "in"))) == []


def test_signed_compressed_and_monochrome1(tmp_path):
    voxels = stack(dtype=np.int16) - 900
    for number, plane in enumerate(voxels):
        ds = picture(plane, number=number, PhotometricInterpretation="MONOCHROME1", RescaleSlope=0.5, RescaleIntercept=3)
        if number % 2:
            ds.compress(RLELossless, generate_instance_uid=False)
        save(ds, tmp_path / f"{number}.dcm")
    ((_, members),) = dicom_series(str(tmp_path))
    values, info = numbers(members)
    assert np.array_equal(values, (-1.0 - voxels[:, ::-1, ::-1]) * 0.5 + 3) and (info.slope, info.dtype) == (0.5, "int16")


def test_slopes_of_each_slice(tmp_path):
    """As PET has them."""
    voxels = stack()
    for number, plane in enumerate(voxels):
        save(
            picture(plane, number=number, Modality="PT", RescaleSlope=number + 0.5, RescaleIntercept=1),
            tmp_path / f"{number}.dcm",
        )
    ((_, members),) = dicom_series(str(tmp_path))
    values, info = numbers(members)
    scaled = voxels[:, ::-1, ::-1] * (np.arange(6)[:, None, None] + 0.5) + 1
    assert np.array_equal(values, scaled.astype(np.float32)) and info.dtype == "float32"


def test_a_decoder_that_is_missing_is_named(tmp_path, monkeypatch):
    ds = picture(stack()[0])
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8 not decoded"])
    ds["PixelData"].is_undefined_length = True
    save(ds, tmp_path / "0.dcm")
    save(picture(stack()[1], number=1), tmp_path / "1.dcm")
    decoder = pydicom.pixels.get_decoder(JPEGLSLossless)
    monkeypatch.setattr(type(decoder), "is_available", property(lambda self: False))
    with pytest.raises(UserError, match=r"JPEG-LS Lossless.*needs a decoder: .*pyjpegls"):
        list(dicom_series(str(tmp_path)))


def test_enhanced_multi_frame(tmp_path):
    voxels = stack()
    order = [3, 0, 5, 1, 4, 2]
    ds = picture(voxels[order], ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None, NumberOfFrames=6)

    def group(**items):
        inner = Dataset()
        for name, value in items.items():
            setattr(inner, name, value)
        return Sequence([inner])

    shared = Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = (
        group(ImageOrientationPatient=AXIAL),
        group(PixelSpacing=[0.8, 0.7]),
    )
    frames = []
    for number in order:
        frame = Dataset()
        frame.PlanePositionSequence = group(ImagePositionPatient=[0, 0, 2.5 * number])
        frame.PixelValueTransformationSequence = group(RescaleSlope=2, RescaleIntercept=-5)
        frames.append(frame)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = Sequence([shared]), Sequence(frames)
    save(ds, tmp_path / "all.dcm")
    ((_, members),) = dicom_series(str(tmp_path))
    values, info = numbers(members)
    assert np.array_equal(values, voxels[:, ::-1, ::-1] * 2.0 - 5) and np.allclose(info.spacing, (2.5, 0.8, 0.7))
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames[:4])
    save(ds, tmp_path / "all.dcm")
    assert "6 frames, but positions of 4" in damaged(tmp_path)


def test_xrays_are_pictures(tmp_path):
    levels = np.arange(20, dtype=np.uint16).reshape(4, 5) * 100
    plain = {"Modality": "DX", "ImagePositionPatient": None, "ImageOrientationPatient": None, "RescaleIntercept": 0}
    save(picture(levels, "1.5", 0, **plain), tmp_path / "0.dcm")
    save(picture(levels, "1.5", 1, **plain, WindowCenter=1000.5, WindowWidth=801), tmp_path / "1.dcm")
    save(
        picture(
            levels, "1.5", 2, **plain, PhotometricInterpretation="MONOCHROME1", WindowCenter=[1000.5, 7], WindowWidth=[801, 9]
        ),
        tmp_path / "2.dcm",
    )
    found = dict(dicom_series(str(tmp_path)))
    assert len(found) == 3
    grey = [np.asarray(Image.open(io.BytesIO(members["png"]))).astype(np.int64) for members in found.values()]
    assert np.array_equal(grey[0], np.rint(levels / 1900 * 65535))
    assert np.array_equal(grey[1], np.rint(((levels - 600.0) / 800).clip(0, 1) * 65535))
    assert np.abs(grey[2] - (65535 - grey[1])).max() <= 1
    assert json.loads(next(iter(found.values()))["json"])["xray"] == {"shape": [4, 5], "spacing": [0.8, 0.7]}
    with ShardWriter(tmp_path / "out", "x") as writer:
        for key, members in found.items():
            writer.write(key, members)
    spec = DataSpec(ImageSpec(4, [0.0] * 3, [1.0] * 3), None)
    (batch,) = make_loader(str(tmp_path / "out"), spec, None, 3, train=False, backend="plain")
    assert batch["image"].shape == (3, 3, 4, 4) and not batch["image"][0].equal(batch["image"][1])
    save(picture(np.stack([levels] * 3), "1.6", 0, **plain, NumberOfFrames=3), tmp_path / "3.dcm")
    assert "3 frames without positions: a film" in damaged(tmp_path)


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(medical_module.importlib.sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"DICOM needs pydicom: pip install vlpfast\[medical\]"):
        list(dicom_series(str(tmp_path)))
    monkeypatch.setitem(medical_module.importlib.sys.modules, "nibabel", None)
    with pytest.raises(UserError, match=r"NIfTI needs nibabel: pip install vlpfast\[medical\]"):
        nifti("x.nii")


def test_stack_order_takes_steps_along_the_normal():
    cut = medical_module._Slice
    slices = [cut("", i, np.array([0.0, -0.02 * i, 1.5 * i]), np.array(AXIAL, float), (1.0, 1.0), 1.0, 0.0) for i in (2, 0, 3, 1)]
    ordered, affine = stack_order(slices)
    assert [s.frame for s in ordered] == [0, 1, 2, 3] and np.allclose(np.diag(affine), [-1, -1, 1.5, 1])


def test_changed_bytes_damage_one_series_at_most(tmp_path):
    """Whatever is wrong with a file, what comes out is whole, and what does not is named."""
    (tmp_path / "a").mkdir()
    write_series(tmp_path / "a", stack((3, 3, 2)), ["0", "1", "2"])
    write_series(tmp_path / "a", stack((3, 3, 2), 1), ["3", "4", "5"], series="1.2.4")
    ((_, whole), (other, _)) = dicom_series(str(tmp_path / "a"))
    content = (tmp_path / "a" / "4").read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.choice(len(content) - 128, min(len(content) - 128, FUZZ), replace=False) + 128:
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(8))
        (tmp_path / "a" / "4").write_bytes(changed)
        found, message = {}, ""
        try:
            for key, members in dicom_series(str(tmp_path / "a")):
                found[key] = members
        except (DamagedSample, UserError) as error:
            message = str(error)
        assert found.get(series_key("1.2.3")) == whole or "needs a decoder" in message
        assert other in found or message


# --- NIfTI -------------------------------------------------------------------------------------------------------------------


AFFINES = {
    "RAS": np.array([[0.7, 0, 0, -30], [0, 0.8, 0, 5], [0, 0, 2.5, 9], [0, 0, 0, 1.0]]),
    "LPI": np.array([[-0.7, 0, 0, 30], [0, -0.8, 0, 5], [0, 0, -2.5, 9], [0, 0, 0, 1.0]]),
    "SAR, oblique": np.array([[0.05, 0.1, 2.4, -3], [0.02, 0.8, -0.1, 5], [0.7, 0, 0.2, 9], [0, 0, 0, 1.0]]),
}


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_nifti_round_trip(tmp_path, name, dtype):
    """Every voxel keeps its value and its place."""
    voxels = (np.random.default_rng(0).random((4, 5, 6)) * 250).astype(dtype)
    image = nibabel.Nifti1Image(voxels, AFFINES[name])
    path = tmp_path / ("v.nii.gz" if dtype == np.int16 else "v.nii")
    nibabel.save(image, path)
    members = nifti(str(path), modality="MR")
    values, info = numbers(members)
    assert info.modality == "MR" and json.loads(members["json"])["volume"]["orientation"] == "RAS"
    affine = np.array(info.affine)
    assert nibabel.aff2axcodes(affine) == ("R", "A", "S")
    for place in np.ndindex(voxels.shape):
        w, h, d = np.rint(np.linalg.solve(affine, AFFINES[name] @ [*place, 1])[:3]).astype(int)
        assert values[d, h, w] == np.float32(voxels[place])
    assert np.allclose(sorted(info.spacing), sorted(nibabel.affines.voxel_sizes(AFFINES[name])), atol=1e-6)


def save_nifti(path, voxels, affine=None, slope=None, units="mm", codes=(1, 1)):
    image = nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units(units)
    image.set_sform(image.affine, codes[0])
    image.set_qform(image.affine if codes[1] else None, codes[1])
    if slope is not None:
        image.header.set_slope_inter(*slope)
    nibabel.save(image, path)
    return str(path)


def test_nifti_scale_units_labels_and_trailing_axes(tmp_path):
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5, 1)
    path = save_nifti(tmp_path / "v.nii", voxels, np.diag([1e-3, 2e-3, 3e-3, 1]), units="meter")
    labels = (voxels[..., 0] % 3).astype(np.int16)
    drawn = save_nifti(tmp_path / "l.nii.gz", labels, np.diag([1e-3, 2e-3, 3e-3, 1]), units="meter")
    members = nifti(path, labels=drawn)
    values, info = numbers(members)
    assert np.array_equal(values, voxels[..., 0].T) and np.allclose(info.spacing, (3, 2, 1)) and info.dtype == "uint8"
    content = np.frombuffer(members["vol"], np.uint8)
    assert np.array_equal(read_labels(content, info, *(np.arange(n) for n in info.shape)), labels.T)
    scaled = nibabel.Nifti1Image(np.linspace(0, 1, 60).reshape(3, 4, 5), np.eye(4))
    scaled.set_data_dtype(np.int16)  # nibabel then chooses slope and intercept
    nibabel.save(scaled, tmp_path / "s.nii")
    values, info = numbers(nifti(str(tmp_path / "s.nii")))
    assert info.slope != 1 and np.allclose(values, nibabel.load(tmp_path / "s.nii").get_fdata().T, atol=1e-12)


def test_nifti_holes(tmp_path):
    voxels = np.ones((3, 4, 5), np.float32)
    voxels[1, 2, 3], voxels[0, 0, 0] = np.nan, np.inf
    path = save_nifti(tmp_path / "v.nii", voxels)
    with pytest.raises(DamagedSample, match="2 voxels are no finite number"):
        nifti(path)
    values, _ = numbers(nifti(path, fill=-7.0))
    assert values[3, 2, 1] == -7 and values[0, 0, 0] == -7 and (values == 1).sum() == 58
    header = bytearray((tmp_path / "v.nii").read_bytes())
    header[112:120] = np.array([2, 5], "<f4").tobytes()  # scl_slope, scl_inter
    (tmp_path / "v.nii").write_bytes(header)
    values, _ = numbers(nifti(path, fill=-7.0))
    assert values[3, 2, 1] == -7 and (values == 7).sum() == 58


def bad_nifti(tmp_path):
    voxels = np.zeros((3, 4, 5), np.int16)
    whole = save_nifti(tmp_path / "whole.nii.gz", np.random.default_rng(0).integers(0, 999, (9, 9, 9)).astype(np.int16))
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes((tmp_path / "whole.nii.gz").read_bytes()[:-200])
    (tmp_path / "text.nii").write_text("not a volume at all " * 50)
    nibabel.save(nibabel.MGHImage(voxels, np.eye(4)), tmp_path / "v.mgz")
    shutil.copy(tmp_path / "v.mgz", tmp_path / "m.mgz")
    colours = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header["sform_code"] = image.header["qform_code"] = 0
    image.to_filename(tmp_path / "lost.nii")
    raw = bytearray((tmp_path / "lost.nii").read_bytes())
    raw[252:256] = bytes(4)  # qform_code, sform_code
    (tmp_path / "lost.nii").write_bytes(raw)
    raw = bytearray(save_nifti(tmp_path / "flat.nii", voxels) and (tmp_path / "flat.nii").read_bytes())
    raw[280:296] = bytes(16)  # srow_x
    (tmp_path / "flat.nii").write_bytes(raw)
    return {
        "cut.nii.gz": (str(cut), "cannot be read"),
        "text": (str(tmp_path / "text.nii"), "cannot be read|not a NIfTI"),
        "absent": (str(tmp_path / "absent.nii"), "cannot be read"),
        "mgh": (str(tmp_path / "m.mgz"), "a MGHImage, expected a NIfTI file"),
        "4-D": (save_nifti(tmp_path / "four.nii", np.zeros((3, 4, 5, 2), np.int16)), "4 dimensions .* split it"),
        "2-D": (save_nifti(tmp_path / "two.nii", np.zeros((3, 4), np.int16)), "2 dimensions"),
        "no affine": (str(tmp_path / "lost.nii"), "does not say how it lies"),
        "singular": (str(tmp_path / "flat.nii"), "affine is singular"),
        "complex": (save_nifti(tmp_path / "c.nii", voxels.astype(np.complex64)), "voxels of the type complex64"),
        "colours": (save_nifti(tmp_path / "rgb.nii", colours), "voxels of the type"),
        "large": (
            save_nifti(
                tmp_path / "i.nii", np.full((3, 4, 5), 1 << 30, np.int32) + voxels + np.eye(3, dtype=np.int32)[:, :1, None]
            ),
            "whole numbers from",
        ),
        "whole": (whole, None),
    }


def test_bad_nifti(tmp_path):
    for name, (path, message) in bad_nifti(tmp_path).items():
        if message is None:
            nifti(path)
            continue
        with pytest.raises(DamagedSample, match=message):
            nifti(path)
            pytest.fail(f"{name} was taken")
    other = save_nifti(tmp_path / "other.nii", np.zeros((9, 9, 8), np.int16))
    with pytest.raises(DamagedSample, match=r"label map lies on another grid: \(9, 9, 8\) voxels, the volume has \(9, 9, 9\)"):
        nifti(str(tmp_path / "whole.nii.gz"), labels=other)
    for change, apart in (
        (np.diag([1.02, 1, 1, 1]), "0.16"),
        (np.eye(4) + 0.2 * np.eye(4, k=3), "0.2"),
        (np.eye(4)[[1, 0, 2, 3]], "11.31"),
    ):
        other = save_nifti(tmp_path / "other.nii", np.zeros((9, 9, 9), np.int16), change)
        with pytest.raises(DamagedSample, match=rf"label map lies elsewhere: .* {apart} mm"):
            nifti(str(tmp_path / "whole.nii.gz"), labels=other)
    other = save_nifti(tmp_path / "other.nii", np.zeros((9, 9, 9), np.int16), np.diag([1.005, 1, 1, 1]))  # 0.04 at most
    nifti(str(tmp_path / "whole.nii.gz"), labels=other)
    with pytest.raises(DamagedSample, match="the label map: cannot be read"):
        nifti(str(tmp_path / "whole.nii.gz"), labels=str(tmp_path / "cut.nii.gz"))
    halves = save_nifti(tmp_path / "halves.nii", np.full((9, 9, 9), 0.5, np.float32))
    with pytest.raises(DamagedSample, match="something else than whole numbers"):
        nifti(str(tmp_path / "whole.nii.gz"), labels=halves)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_changed_bytes_of_nifti(tmp_path, name):
    path = save_nifti(tmp_path / name, np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    content = (tmp_path / name).read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for place in generator.choice(len(content), min(len(content), FUZZ), replace=False):
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(8))
        (tmp_path / name).write_bytes(changed)
        try:
            nifti(path)
        except DamagedSample:
            refused += 1
    assert refused


def test_from_dicom_to_batches(tmp_path):
    """A lung window of both series, at 2.5 mm."""
    (tmp_path / "in").mkdir()
    voxels = stack((6, 8, 8))
    write_series(tmp_path / "in", voxels, PixelSpacing=[2.5, 2.5])
    with ShardWriter(tmp_path / "out", "ct") as writer:
        for key, members in dicom_series(str(tmp_path / "in")):
            writer.write(key, members)
    spec = VolumeSpec([4, 6, 6], spacing=[2.5] * 3, windows=[[-600.0, 1500.0]], orientation="LPS")
    (batch,) = make_loader(str(tmp_path / "out"), DataSpec(None, None, volume=spec), None, 1, train=False)
    expected = ((voxels[1:5, 1:7, 1:7] - 1024.0 + 1350) / 1500).clip(0, 1)
    assert np.allclose(batch["volume"][0, 0], expected, atol=1e-5)
