"""Numbers and pictures of shards that hold other things than pictures with captions."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlpfast.cli import data
from vlpfast.data import ShardSet, ShardWriter
from vlpfast.data.inspect import preview, stats
from vlpfast.data.shards import verify
from vlpfast.types import UserError

TOP = 4  # pixels above a tile on the sheet
LEFT = 6


def picture(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (60, 60), colour).save(out, "PNG")
    return out.getvalue()


def sound(seconds: float, hertz: float) -> bytes:
    soundfile = pytest.importorskip("soundfile", reason="waits for the package soundfile")
    out = io.BytesIO()
    times = np.arange(int(16000 * seconds)) / 16000
    soundfile.write(out, 0.5 * np.sin(2 * np.pi * hertz * times), 16000, format="FLAC")
    return out.getvalue()


def clip(levels: list[int]) -> bytes:
    """A video of grey frames, ten a second."""
    av = pytest.importorskip("av", reason="waits for the package av")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 64, "yuv420p", 5
        for level in levels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8))))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.fixture
def media(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "m", "x") as writer:
        writer.write("low", {"flac": sound(2, 300), "txt": b"a low tone"})
        writer.write("high", {"flac": sound(1, 5000), "txt": b"a high tone", "json": b'{"audio": {"duration": 7, "rate": 8000}}'})
        writer.write("clip", {"mp4": clip([30] * 10 + [90] * 10 + [150] * 10 + [210] * 10), "txt": b"it gets lighter"})
        writer.write("cut", {"mp4": clip([30] * 10)[:300], "txt": b"cut"})
        writer.write("other", {"npy": b"123"})
    return tmp_path / "m"


def test_stats_of_media(media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = stats(str(media))
    assert found.durations == [pytest.approx(2, abs=0.01), 7.0, pytest.approx(4, abs=0.11)]  # the JSON's word is taken
    assert found.rates == {16000: 1, 8000: 1} and found.sizes == {(64, 64): 1} and found.damaged_media == 1
    assert (found.without_picture, found.without_caption, found.examined) == (0, 1, 5)
    assert data.main(["stats", str(media)]) == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["rates"] == "16000 Hz: 1, 8000 Hz: 1" and lines["pictures"] == "64 x 64: 1"
    assert lines["seconds"] == "2.0 to 7.0, median 4.0, together 0.00 hours"
    assert lines["damaged"] == "1 videos, sounds, volumes or point clouds that cannot be read"


def test_a_package_that_is_missing_is_named(media: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for look in (lambda: stats(str(media)), lambda: preview(str(media), tmp_path / "x.png")):
        with pytest.raises(UserError, match=r"pip install 'vlpfast\[video\]'"):
            look()


def test_stats_of_documents_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [{"text": "one two"}, {"image": "0.png"}, {"text": "three"}, {"image": "1.png"}]
    with ShardWriter(tmp_path / "d", "x") as writer:
        writer.write("a", {"0.png": picture("red"), "1.png": picture("blue"), "json": json.dumps({"parts": parts}).encode()})
        writer.write("b", {"json": json.dumps({"parts": parts[:1]}).encode()})
    found = stats(str(tmp_path / "d"))
    assert (found.documents, found.document_pictures, found.words) == (2, 2, [3, 2])
    assert (found.without_picture, found.without_caption) == (0, 0)
    assert data.main(["stats", str(tmp_path / "d")]) == 0
    assert "documents   2, with 1.0 pictures each" in capsys.readouterr().out
    with ShardWriter(tmp_path / "t", "x") as writer:
        writer.write("a", {"txt": b"just words"})
    found = stats(str(tmp_path / "t"))
    assert (found.without_picture, found.without_caption, found.words) == (0, 0, [2])
    assert data.main(["stats", str(tmp_path / "t")]) == 0
    assert "damaged" not in capsys.readouterr().out


def tile(sheet: Image.Image, place: int) -> np.ndarray:
    left = LEFT + place * 236
    return np.asarray(sheet.convert("RGB").crop((left, TOP, left + 224, TOP + 224)))


def test_previews_of_media(media: Path, tmp_path: Path) -> None:
    assert preview(str(media), tmp_path / "sheet.png") == 5
    sheet = Image.open(tmp_path / "sheet.png")
    low, high = (tile(sheet, place)[:112, 20:-20, 0].astype(int).sum(1) for place in (0, 1))  # [112] by height, the top first
    assert low.argmax() - high.argmax() > 40 and low.max() > 3 * np.median(low)  # a low tone is a bright line further down
    frames = tile(sheet, 2)
    for (y, x), level in zip(((50, 50), (50, 160), (160, 50), (160, 160)), (30, 90, 150, 210), strict=True):
        assert abs(int(frames[y, x, 1]) - level) < 8
    assert (tile(sheet, 3)[200, 200] == 204).all() and (tile(sheet, 4)[200, 200] == 204).all()  # grey: cut, and unknown


def test_previews_of_documents(tmp_path: Path) -> None:
    parts = [{"text": "see"}, {"image": "0.png"}, {"image": "1.png"}, {"text": "and <hear>"}]
    with ShardWriter(tmp_path / "d", "x") as writer:
        writer.write("a", {"0.png": picture("red"), "1.png": picture("blue"), "json": json.dumps({"parts": parts}).encode()})
        writer.write("b", {"json": json.dumps({"parts": parts[:1]}).encode()})
        writer.write("c", {"json": json.dumps({"parts": parts[1:2]}).encode()})  # lacks its picture
    assert preview(str(tmp_path / "d"), tmp_path / "sheet.png") == 3
    first = tile(Image.open(tmp_path / "sheet.png"), 0)
    assert first[50, 50].tolist() == [255, 0, 0] and first[50, 160].tolist() == [0, 0, 255] and (first[160, 50] == 255).all()
    preview(str(tmp_path / "d"), tmp_path / "sheet.html")
    assert "see and &lt;hear&gt;" in (tmp_path / "sheet.html").read_text()


def test_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = pytest.importorskip("vlpfast.data.volume_file", reason="waits for the reader of volumes")
    voxels = np.zeros((8, 20, 16), np.int16)
    voxels[5:] = 100  # the upper part; rows of a slice run to the front, columns to the right
    voxels[:, 12:, :] += 50
    content = store.encode_volume(voxels, np.diag([1.0, 1.0, 2.0, 1.0]), threshold=-1.0)
    with ShardWriter(tmp_path / "v", "x") as writer:
        writer.write("a", {"vol": content, "json": b"{}"})
        writer.write("b", {"vol": content[:-5]})
    found = stats(str(tmp_path / "v"))
    assert found.volumes == {(8, 20, 16): 1} and found.damaged_media == 1
    assert data.main(["stats", str(tmp_path / "v")]) == 0 and "voxels      8 x 20 x 16: 1" in capsys.readouterr().out
    damaged = verify(str(tmp_path / "v")).shards[0].damaged
    assert [key for key, _ in damaged] == ["b"] and "its vol is damaged" in damaged[0][1]
    preview(str(tmp_path / "v"), tmp_path / "sheet.png")
    first = tile(Image.open(tmp_path / "sheet.png"), 0)[..., 0].astype(int)
    above, front, side = first[:110, :110], first[:110, 114:], first[114:, :110]
    assert above[10, 40] - above[90, 40] == pytest.approx(255 / 3, abs=10)  # the middle slice: the front is lighter
    assert front[10, 50] - front[90, 50] == pytest.approx(2 * 255 / 3, abs=10)  # seen from the front: the head is
    assert side[10, 100] - side[10, 10] == pytest.approx(255 / 3, abs=10)  # from the side: the front is on the right


def npy(numbers: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(numbers))
    return out.getvalue()


@pytest.fixture
def clouds(tmp_path: Path) -> Path:
    """Two that are whole, one of each kind that is not, and an .npy file that holds something else."""
    generator = np.random.default_rng(0)
    whole = generator.uniform(-1, 1, (300, 3)).astype(np.float32)
    whole[:2] = [[-1, -3, 0], [1, 1, 2]]
    holes = np.concatenate([whole, whole * 0 + np.nan], 1)
    with ShardWriter(tmp_path / "p", "x") as writer:
        writer.write("plain", {"points.npy": npy(whole)})
        writer.write("holes", {"points.npy": npy(holes)})
        writer.write("cut", {"points.npy": npy(whole)[:-4]})
        writer.write("coloured", {"npy": npy(np.concatenate([whole[:100] * 0.5, generator.uniform(0.1, 0.9, (100, 3))], 1))})
        writer.write("features", {"npy": npy(np.zeros((4, 512), np.float32)), "txt": b"not a cloud"})
        writer.write("other", {"points.npy": b"no points"})
    return tmp_path / "p"


def test_stats_of_points(clouds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = stats(str(clouds))
    assert found.points == [300, 100] and found.low[:2] == [-1, -3] and found.high == [1, 1, 2]
    assert (found.coloured, found.damaged_media) == (1, 3)
    assert data.main(["stats", str(clouds)]) == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["points"].startswith("100 to 300, median 300, in 2 clouds, 1 with colours 0.1")
    assert lines["bounds"].startswith("x -1 to 1, y -3 to ") and lines["bounds"].endswith(" to 2")
    assert lines["damaged"] == "3 videos, sounds, volumes or point clouds that cannot be read"


def test_damaged_points_are_found_and_taken_out(clouds: Path) -> None:
    reasons = {
        "holes": "its points.npy is damaged: points that are no finite numbers",
        "cut": "its points.npy is damaged: the points have",
        "other": "its points.npy is damaged: the points are no .npy file",
    }
    damaged = dict(verify(str(clouds), captions=False).shards[0].damaged)
    assert damaged.keys() == reasons.keys() and all(damaged[key].startswith(reason) for key, reason in reasons.items())
    assert verify(str(clouds), captions=False, decode=False).ok
    assert data.main(["verify", str(clouds), "--no-captions", "--repair"]) == 0
    shards = ShardSet(str(clouds))
    assert [shards.key(i) for i in range(len(shards))] == ["plain", "coloured", "features"]
    assert verify(str(clouds), captions=False).ok


def test_previews_of_points(clouds: Path, tmp_path: Path) -> None:
    """A blue plate low in space, a red pole on it at the right and towards the front, a green ball at the left and the back."""
    generator = np.random.default_rng(0)
    across = np.linspace(-1, 1, 150)
    plate = np.array([[x, y, -1] for x in across for y in across])
    pole = np.column_stack([np.full(4000, 0.8), np.full(4000, -0.8), generator.uniform(-1, 1, 4000)])
    ball = np.array([-0.8, 0.8, 0.0]) + 0.1 * generator.standard_normal((4000, 3)).clip(-1, 1)
    colours = np.repeat(np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]]), [len(plate), len(pole), len(ball)], axis=0)
    scene = np.concatenate([np.concatenate([plate, pole, ball]), colours], 1)
    line = np.column_stack([np.zeros(50), np.zeros(50), np.linspace(0, 1e300, 50)])
    with ShardWriter(tmp_path / "s", "x") as writer:
        writer.write("scene", {"points.npy": npy(scene)})
        writer.write("again", {"points.npy": npy(scene[::-1])})
        writer.write("plain", {"points.npy": npy(plate[:, ::-1].astype(np.float32))})  # a plate upright
        writer.write("line", {"points.npy": npy(line)})
        writer.write("point", {"points.npy": npy(np.full((1, 3), 7, np.float16))})
        writer.write("slope", {"points.npy": npy(plate[:, [0, 1, 0]])})  # it rises to the right
    preview(str(tmp_path / "s"), tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    blue, red, green = [0, 0, 255], [255, 0, 0], [0, 255, 0]
    for place in (0, 1):  # whatever the order of the points, the nearer ones are over the others
        shown = tile(sheet, place)
        above, front, side = shown[:110, :110], shown[:110, 112:222], shown[112:222, :110]
        assert above[98, 98].tolist() == red and above[11, 11].tolist() == green and above[11, 98].tolist() == blue
        assert front[50, 98].tolist() == red and front[55, 11].tolist() == green and front[109, 50].tolist() == blue
        assert side[50, 11].tolist() == red and side[55, 98].tolist() == green and (side[50, 50] == 255).all()
        assert (shown[112:, 112:] == 255).all()
    plain = tile(sheet, 2)
    assert (plain[112:222, :110] == 115).all()  # the side sees the plate, all of it equally far
    for view in (plain[:110, :110, 0], plain[:110, 112:222, 0]):  # from above and from the front it is a line
        assert (np.delete(view, [54, 55], 1) == 255).all() and (view[:, 54:56].min(1) == 26).all()
    slope = tile(sheet, 5)[..., 0]
    assert np.allclose(slope[55, :110], np.linspace(204, 26, 110), atol=4)  # from above: the higher, the darker
    assert np.allclose(slope[112 + np.arange(110), 55], np.linspace(26, 204, 110), atol=4)  # from the side: the more to the right
    line = tile(sheet, 3)
    assert (line[:110, 112:222, 0] < 255).any(1).sum() > 90 and (line[:110, :110, 0] < 255).any(1).sum() < 10
    assert (tile(sheet, 4)[:110, :110, 0] < 255).sum() == 64
    preview(str(clouds), tmp_path / "clouds.png")
    grey = [(tile(Image.open(tmp_path / "clouds.png"), place)[200, 200] == 204).all() for place in range(6)]
    assert grey == [False, True, True, False, True, True]
