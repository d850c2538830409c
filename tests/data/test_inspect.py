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
from vlpfast.data import ShardWriter
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
    assert lines["damaged"] == "1 videos, sounds or volumes that cannot be read"


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
