from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlpfast.data import ShardSet
from vlpfast.data import build as building
from vlpfast.data.build import Keys, build, clean_key
from vlpfast.data.inputs import Options
from vlpfast.data.sources import KINDS
from vlpfast.types import UserError


def encoded(colour=(9, 99, 199), format="JPEG", size=(20, 16)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, format)
    return out.getvalue()


def put(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def contents(out: Path) -> dict[str, dict[str, bytes]]:
    shards = ShardSet(str(out))
    return {
        shards.key(i): {name: shards.read([i], [name])[0].tobytes() for name in shards.extensions(i)} for i in range(len(shards))
    }


def skipped(out: Path) -> dict[str, str]:
    return {line["source"]: line["reason"] for line in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())}


def everything(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures, of which one has no caption and one is broken."""
    src = tmp_path / "photos"
    for i in range(8):
        put(src, f"{'sub/' * (i % 2)}p{i}.jpg", encoded((30 * i, 0, 0)))
        put(src, f"{'sub/' * (i % 2)}p{i}.txt", f"caption {i}\n")
    put(src, "p1.jpg", encoded()[:-2])
    put(src, "p1.txt", "broken")
    put(src, "p3.jpg", encoded())
    return src


def test_pictures_with_what_is_beside_them(tmp_path: Path) -> None:
    src = tmp_path / "src"
    put(src, "b/one two.v1.JPG", encoded(format="PNG"))  # the content says what it is
    put(src, "b/one two.v1.txt", "\ufeff  eins \n")
    put(src, "a.webp", encoded(format="WEBP"))
    put(src, "a.json", '{"caption": "from json", "score": NaN, "ü": [1, {"x": null}]}')
    put(src, "both.bmp", encoded(format="BMP"))
    put(src, "both.json", '{"caption": "not this", "id": 3}')
    put(src, "both.TXT", "this")
    put(src, ".hidden/x.jpg", encoded())
    put(src, "notes.tif", b"II*")
    report = build("pictures", src, tmp_path / "out")
    assert (report.samples, report.skipped, report.shards, report.resumed) == (3, 0, 1, False)
    assert report.files == {"webp": 1, "json": 2, "bmp": 1, "txt": 2, "jpg": 1, "tif": 1}
    found = contents(tmp_path / "out")
    assert list(found) == ["a", "both", "b/one_two_v1"]  # a folder's files by name, then its folders
    assert found["a"]["txt"] == b"from json" and found["b/one_two_v1"] == {"png": encoded(format="PNG"), "txt": b"eins"}
    assert json.loads(found["a"]["json"]) == {"caption": "from json", "score": None, "ü": [1, {"x": None}]}
    assert found["both"]["txt"] == b"this" and json.loads(found["both"]["json"])["id"] == 3


@pytest.mark.parametrize(
    "name, content, note, reason",
    [
        ("x.jpg", encoded()[:-2], b"c", "cut short"),
        ("x.png", b"", b"c", "the picture is empty"),
        ("x.png", encoded(format="GIF"), b"c", "none of JPEG, PNG, WebP and BMP"),
        ("x.jpg", encoded(), b"\xff", "not UTF-8"),
        ("x.jpg", encoded(), b" \n", "the caption is empty"),
        ("x.jpg", encoded(), b"123456", r"has 6 characters, more than 5 \(--max-caption\)"),
        ("x.jpg", encoded(), None, "no caption: neither"),
        ("x.jpg", encoded(), {"caption": 3}, "is a int, expected a text"),
        ("x.jpg", encoded(), [1], "is a list, expected an object"),
        ("x.jpg", encoded(), {"caption": "\ud800"}, "not UTF-8"),
        ("x.jpg", encoded(), "[" * 100_000, "cannot be parsed"),
        ("x.jpg", encoded(), {"caption": "c", "deep": "\udc00"}, "cannot be written"),
    ],
)
def test_damaged_inputs_are_skipped_with_the_reason(tmp_path: Path, name, content, note, reason) -> None:
    src = tmp_path / "src"
    put(src, name, content)
    if isinstance(note, bytes):
        put(src, "x.txt", note)
    elif note is not None:
        put(src, "x.json", note if isinstance(note, str) else json.dumps(note))
    put(src, "y.jpg", encoded())
    put(src, "y.txt", "good")
    assert build("pictures", src, tmp_path / "out", Options(max_caption=5)).skipped == 1
    assert list(contents(tmp_path / "out")) == ["y"]
    assert re.search(reason, skipped(tmp_path / "out")[name])


def test_no_path_leads_out_of_the_source(tmp_path: Path) -> None:
    src, outside = tmp_path / "src", put(tmp_path, "secret.jpg", encoded())
    put(tmp_path, "secret.txt", "secret")
    put(src, "in.jpg", encoded())
    put(src, "in.txt", "in")
    for name in ("file", "sidecar", "fifo", "loop"):
        put(src, f"{name}.txt", name)
    (src / "file.jpg").symlink_to(outside)
    put(src, "sidecar.jpg", encoded())
    (src / "sidecar.txt").unlink()
    (src / "sidecar.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(src / "fifo.jpg")
    (src / "loop.jpg").symlink_to("loop.jpg")
    (src / "folder").symlink_to(tmp_path)  # would be endless as well
    (src / "within.jpg").symlink_to("in.jpg")
    put(src, "within.txt", "a link inside is a file like any other")
    assert build("pictures", src, tmp_path / "out").samples == 2
    assert set(contents(tmp_path / "out")) == {"in", "within"}
    reasons = skipped(tmp_path / "out")
    assert set(reasons) == {"file.jpg", "sidecar.jpg", "fifo.jpg", "loop.jpg"}
    assert "leads out of" in reasons["file.jpg"] and "sidecar.txt leads out of" in reasons["sidecar.jpg"]
    assert "not a regular file" in reasons["fifo.jpg"]
    rows = ["image,caption", "in.jpg,a", "../secret.jpg,b", f"{outside},c", "folder/secret.jpg,d", "https://x.org/y.jpg,e", ",f"]
    put(src, "t.csv", "\n".join(rows))
    assert build("table", src / "t.csv", tmp_path / "table").samples == 1
    reasons = skipped(tmp_path / "table")
    assert all("leads out of" in reasons[f"t.csv:{i}"] for i in (2, 3, 4))
    assert "download it beforehand" in reasons["t.csv:5"] and "is empty or" in reasons["t.csv:6"]


def test_keys_are_cleaned_and_numbered(tmp_path: Path) -> None:
    assert [clean_key(key) for key in ("a/b.c d", "../../x", "/abs", "..", "", "tab\there\0", "a//b", "caf\udce9")] == [
        "a/b_c_d",
        "x",
        "abs",
        "_",
        "_",
        "tab_here_",
        "a/b",
        "caf\\udce9",
    ]
    assert len(clean_key("x" * 10_000)) == 200
    keys = Keys(["a", "a_2"])
    assert [keys.claim("a") for _ in range(3)] == ["a_3", "a_4", "a_5"] and keys.claim("a_4") == "a_4_2"
    src = tmp_path / "src"
    for name in ("a b.jpg", "a.b.jpg", "a_b.jpg", "a_b.png"):
        put(src, name, encoded(format=name[-3:].upper().replace("JPG", "JPEG")))
    build("pictures", src, tmp_path / "out", Options(captions=False), samples_per_shard=1)
    assert set(contents(tmp_path / "out")) == {"a_b", "a_b_2", "a_b_3", "a_b_4"}


def test_any_number_of_workers_makes_the_same_bytes(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_FEW", 1)
    monkeypatch.setitem(KINDS, "pictures", dataclasses.replace(KINDS["pictures"], chunk=1))  # ten chunks
    steps: list[tuple[int, int | None]] = []
    build("pictures", photos, tmp_path / "one", samples_per_shard=3, workers=1, progress=lambda *step: steps.append(step))
    assert steps == [(i + 1, 10) for i in range(10)]
    build("pictures", photos, tmp_path / "two", samples_per_shard=3, workers=2)
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert set(skipped(tmp_path / "one")) == {"p1.jpg", "p3.jpg"}
    assert not list(tmp_path.glob("*/*.tmp"))


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_an_interrupted_build_goes_on_to_the_same_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    settings = {"samples_per_shard": 3, "workers": 1}
    build("pictures", photos, tmp_path / "whole", **settings)
    made = []
    make = building.make

    def stop(*arguments: object) -> list:
        if len(made) == fails_at:
            raise KeyboardInterrupt
        made.append(arguments)
        return make(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building, "make", stop)
        build("pictures", photos, tmp_path / "out", **settings)
    journal = json.loads((tmp_path / "out" / "build.json").read_text())
    assert journal["shards"] == len(list((tmp_path / "out").glob("*.tar"))) and not journal["finished"]
    (tmp_path / "out" / "train-000007.tar").write_bytes(b"renamed, but not in the journal yet")
    with open(tmp_path / "out" / "skipped.jsonl", "a") as file:
        file.write('{"source": "cut')
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(building, "make", lambda *arguments: made.append(arguments) or make(*arguments))
        report = build("pictures", photos, tmp_path / "out", **settings)
    assert len(made) == 10 - journal["task"]  # nothing in a whole shard is made again
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert report.samples == 8 and report.resumed == (journal["shards"] > 0)
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(building, "make", lambda *arguments: made.append(arguments))
        assert build("pictures", photos, tmp_path / "out", **settings).samples == 8 and not made  # it was finished


def test_keys_are_numbered_as_if_there_had_been_no_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tmp_path / "src"
    for name in ("a b.jpg", "a.b.jpg", "a_b.jpg", "a~b.jpg"):
        put(src, name, encoded())
    make = building.make

    def stop(kind: str, root: str, options: Options, task: object) -> list:
        if "a_b.jpg" in task.source:
            raise KeyboardInterrupt
        return make(kind, root, options, task)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building, "make", stop)
        build("pictures", src, tmp_path / "out", Options(captions=False), samples_per_shard=1, workers=1)
    assert set(contents(tmp_path / "out")) == {"a_b", "a_b_2"}
    build("pictures", src, tmp_path / "out", Options(captions=False), samples_per_shard=1, workers=1)
    assert set(contents(tmp_path / "out")) == {"a_b", "a_b_2", "a_b_3", "a~b"}


def test_a_killed_build_goes_on(photos: Path, tmp_path: Path) -> None:
    """Killed between the rename of a shard and the journal's line about it."""
    settings = {"samples_per_shard": 3, "workers": 1}
    build("pictures", photos, tmp_path / "whole", **settings)
    code = f"""
import os
from vlpfast.data import build as building
save = building._save
building._save = lambda out, journal: os._exit(9) if journal.shards == 2 else save(out, journal)
building.build("pictures", {str(photos)!r}, {str(tmp_path / "out")!r}, **{settings!r})
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    assert build("pictures", photos, tmp_path / "out", **settings).resumed
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_what_is_refused(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fails(message: str, *arguments: object, **settings: object) -> None:
        with pytest.raises(UserError, match=message):
            build(*arguments, **settings)

    fails("expected one of pictures, classes, .* got 'movies'", "movies", photos, out)
    fails("is no folder", "pictures", tmp_path / "none", out)
    fails("is no folder", "pictures", photos / "p0.jpg", out)
    fails("is no folder and no file", "table", tmp_path / "none", out)
    fails("lies in the source", "pictures", photos, photos / "out")
    fails("pictures have no use for template='x {}'", "pictures", photos, out, Options(template="x {}"))
    fails(r"--template: expected a text with \{\}", "classes", photos, out, Options(template="x"))
    fails("--max-caption: expected at least 1", "pictures", photos, out, Options(max_caption=-1))
    fails("there is no folder nowhere", "table", photos, out, Options(pictures="nowhere"))
    (tmp_path / "empty").mkdir()
    fails("nothing was built from .*: it holds no input of this kind; its files: none", "pictures", tmp_path / "empty", out)
    fails("no input of this kind; its files: (jpg|txt): 10, ", "audio", photos, out)
    put(tmp_path, "bad/x.jpg", b"no")
    fails(r"all 1 inputs were skipped \(x.jpg: ", "pictures", tmp_path / "bad", tmp_path / "out2", Options(captions=False))
    assert skipped(tmp_path / "out2")
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        build("pictures", photos, out, workers=0)
    build("pictures", photos, tmp_path / "done")
    fails("holds a build with another options", "pictures", photos, tmp_path / "done", Options(decode=False))
    put(photos, "new.jpg", encoded())
    fails("another files.* have changed since", "pictures", photos, tmp_path / "done")
    (photos / "new.jpg").unlink()
    (tmp_path / "done" / "train-000000.tar").unlink()
    fails("lacks 1 of the shards", "pictures", photos, tmp_path / "done")
    (tmp_path / "done" / "build.json").write_text("{")
    fails("build.json is damaged", "pictures", photos, tmp_path / "done")
    put(tmp_path, "foreign/train-000000.tar", b"x")
    fails("that no build made", "pictures", photos, tmp_path / "foreign")
    with building.alone(str(tmp_path / "empty"), "build"):
        fails("another build is writing", "pictures", photos, tmp_path / "empty")


def test_classes(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for name in ("snow_owl/b.jpg", "snow_owl/deep/a.jpg", "Ara/1.jpg"):
        put(src, name, encoded())
    put(src, "stray.jpg", encoded())
    build("classes", src, tmp_path / "out", Options(template="a {}, a bird"))
    found = contents(tmp_path / "out")
    assert list(found) == ["Ara/1", "snow_owl/b", "snow_owl/deep/a"]
    assert found["snow_owl/b"]["txt"] == b"a snow owl, a bird"
    assert json.loads(found["snow_owl/b"]["json"]) == {"label": "snow owl", "class": 1}
    assert (tmp_path / "out" / "classes.txt").read_text() == "Ara\nsnow owl\n"
    put(src, "snow owl/c.jpg", encoded())
    with pytest.raises(UserError, match=r"several folders .* name the class 'snow owl'"):
        build("classes", src, tmp_path / "out2")


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_text_tables(tmp_path: Path, kind: str) -> None:
    tab = "\t" if kind == "tsv" else ","
    rows = [
        ["id", "path", "title", "score"],
        ["k 1", "p/a.jpg", '"two\nlines, ""quoted"""', "1.5"],
        ["x", "p/none.jpg", "c", "2"],
        ["only"],
        [" ", "p/a.jpg", "c", "2"],
    ]
    put(tmp_path, f"t.{kind}", "\ufeff" + "\r\n".join(tab.join(row) for row in rows))
    put(tmp_path, "p/a.jpg", encoded())
    options = Options(picture="path", caption="title", key="id", drop=("score",))
    report = build("table", tmp_path / f"t.{kind}", tmp_path / "out", options)
    assert (report.samples, report.skipped) == (1, 3)
    assert contents(tmp_path / "out") == {"k_1": {"jpg": encoded(), "txt": b'two\nlines, "quoted"'}}
    reasons = skipped(tmp_path / "out")
    assert "No such file" in reasons[f"t.{kind}:2"] and "has 1 columns, the head has 4" in reasons[f"t.{kind}:3"]
    assert "'id' is empty" in reasons[f"t.{kind}:4"]
    build("table", tmp_path / f"t.{kind}", tmp_path / "kept", Options(picture="path", caption="title"))
    (key, members), *_ = contents(tmp_path / "kept").items()
    assert key == "t/00000000" and json.loads(members["json"]) == {"id": "k 1", "score": "1.5"}
    for changes in ({"picture": "image"}, {"caption": "text"}, {"key": "none"}, {"drop": ("score", "none")}):
        with pytest.raises(UserError, match=r"has no column '(image|text|none)' \(--\w+\); it has id, path, title, score"):
            options = {"picture": "path", "caption": "title", **changes}
            build("table", tmp_path / f"t.{kind}", tmp_path / "wrong", Options(**options))


def test_parquet_tables(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="waits for the package pyarrow")
    import datetime

    from pyarrow import parquet

    pictures = [encoded((i, 0, 0)) for i in range(70)]
    table = {
        "image": [{"bytes": content, "path": None} for content in pictures[:69]] + [None],
        "caption": [f"number {i}" for i in range(70)],
        "when": [datetime.date(2024, 1, 2)] * 70,
        "box": [[1.0, float("nan")]] * 70,
        "raw": [b"x"] * 70,
    }
    src = tmp_path / "src"
    src.mkdir()
    parquet.write_table(pyarrow.table(table), src / "a.parquet")
    put(src, "b.csv", "image,caption\nx.png,last\n")
    put(src, "x.png", encoded(format="PNG"))
    with pytest.raises(UserError, match=r"'raw' holds bytes.*--drop raw"):
        build("table", src / "a.parquet", tmp_path / "out0")
    report = build("table", src / "a.parquet", tmp_path / "out", Options(drop=("raw",)), samples_per_shard=30)
    assert (report.samples, report.skipped, report.shards) == (69, 1, 3)
    found = contents(tmp_path / "out")
    assert found["a/00000065"]["jpg"] == pictures[65] and found["a/00000065"]["txt"] == b"number 65"
    assert json.loads(found["a/00000065"]["json"]) == {"when": "2024-01-02", "box": [1.0, None]}
    with pytest.raises(UserError, match=r"b.csv has no column 'raw'"):
        build("table", src, tmp_path / "out2", Options(drop=("raw",)))
    put(src, "a.parquet", b"PAR1 not really")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        build("table", src / "a.parquet", tmp_path / "out3")


def test_text(tmp_path: Path) -> None:
    src = tmp_path / "src"
    put(src, "a.txt", "a document")
    put(src, "b.jsonl", '{"text": "first", "url": "u"}\n\n{"text": 3}\nnot json\n{"text": "last"}')
    with gzip.open(src / "c.jsonl.gz", "wb") as file:
        file.write(b'{"text": "packed"}\n')
    report = build("text", src, tmp_path / "out")
    assert (report.samples, report.skipped) == (4, 2)
    found = contents(tmp_path / "out")
    assert [members["txt"] for members in found.values()] == [b"a document", b"first", b"last", b"packed"]
    assert json.loads(found["b/00000000"]["json"]) == {"url": "u"} and "json" not in found["b/00000003"]
    assert "is int, expected a text" in skipped(tmp_path / "out")["b.jsonl:2"]
    put(src, "c.jsonl.gz", gzip.compress(b'{"text": "packed"}\n' * 9)[:-9])
    with pytest.raises(UserError, match=r"c.jsonl.gz cannot be read"):
        build("text", src / "c.jsonl.gz", tmp_path / "out2", Options(caption="text"))


def test_documents(tmp_path: Path) -> None:
    src = tmp_path / "src"
    put(src, "i/x.jpg", encoded())
    put(src, "i/y.png", encoded(format="PNG"))
    mmc4 = {
        "text_list": ["one", "two"],
        "image_info": [
            {"image_name": "i/x.jpg", "matched_text_index": 1, "matched_sim": 0.3},
            {"image_name": "i/y.png", "matched_text_index": 0, "matched_sim": 0.1},
        ],
        "similarity_matrix": [[0.1, 0.3]],
        "url": "u",
    }
    obelics = {"texts": [None, "words", None], "images": ["i/x.jpg", None, "i/y.png"]}
    own = {"parts": [{"text": "words"}, {"image": "i/y.png"}, {"text": ""}]}
    wrong = [
        {"parts": 3},
        {"texts": ["a"], "images": []},
        {"text_list": ["a"], "image_info": [{"image_name": "i/x.jpg", "matched_text_index": 5}]},
        {"parts": [{"image": "../x.jpg"}]},
        {"parts": [{"text": 1}]},
        {"parts": []},
        {},
    ]
    put(src, "d.jsonl", "\n".join(map(json.dumps, [mmc4, obelics, own, *wrong])))
    report = build("documents", src / "d.jsonl", tmp_path / "out", Options(min_similarity=0.2))
    assert (report.samples, report.skipped) == (3, len(wrong))
    a, b, c = contents(tmp_path / "out").values()
    assert json.loads(a["json"]) == {"url": "u", "parts": [{"text": "one"}, {"image": "0.jpg"}, {"text": "two"}]}
    assert json.loads(b["json"])["parts"] == [{"image": "0.jpg"}, {"text": "words"}, {"image": "1.png"}]
    assert set(b) == {"0.jpg", "1.png", "json"} and b["1.png"] == encoded(format="PNG")
    assert json.loads(c["json"])["parts"] == [{"text": "words"}, {"image": "0.png"}]


def test_audio_and_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av", reason="waits for the package av")
    pytest.importorskip("soundfile", reason="waits for the package soundfile")
    src = tmp_path / "src"
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(4 * 4000))
    put(src, "a.wav", sound.getvalue())
    put(src, "a.txt", "silence")
    put(src, "bad.wav", sound.getvalue()[:20])
    put(src, "bad.txt", "x")
    with av.open(str(src / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(15):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    put(src, "v.json", '{"caption": "getting brighter", "id": 1}')
    put(src, "w.mp4", (src / "v.mp4").read_bytes()[:200])
    put(src, "w.txt", "x")
    assert build("audio", src, tmp_path / "audio", workers=1).skipped == 1
    (members,) = contents(tmp_path / "audio").values()
    assert members["wav"] == sound.getvalue() and members["txt"] == b"silence"
    assert json.loads(members["json"]) == {"audio": {"duration": 0.5, "rate": 8000, "channels": 2}}
    assert build("videos", src, tmp_path / "video", workers=1).skipped == 1
    (members,) = contents(tmp_path / "video").values()
    assert set(members) == {"mp4", "txt", "json"}
    about = {"duration": 1.5, "width": 64, "height": 48, "fps": 10.0, "frames": 15}
    assert json.loads(members["json"]) == {"caption": "getting brighter", "id": 1, "video": about}
    assert "cannot be read" in skipped(tmp_path / "video")["w.mp4"] and "bad.wav" in skipped(tmp_path / "audio")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"needs the package av: pip install 'vlpfast\[video\]'"):
        build("videos", src, tmp_path / "video2")


def test_volumes_and_meshes_come_from_their_own_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which function is called with what, and what becomes of its members; the readers have tests of their own."""
    import types

    from vlpfast.data.pictures import DamagedSample

    def nifti(path: str) -> dict[str, bytes]:
        if path.endswith("bad.nii"):
            raise DamagedSample("no affine")
        return {"vol": Path(path).read_bytes(), "json": b'{"spacing": [1, 2, 3]}'}

    def dicom_series(folder: str, reports: None):
        yield "s/1", {"vol": b"1", "json": b"{}"}
        yield "s/1", {"vol": b"2", "json": b"{}"}
        raise DamagedSample("slices are missing")

    medical = types.SimpleNamespace(nifti=nifti, dicom_series=dicom_series)
    meshes = types.SimpleNamespace(mesh=lambda path, points: {"pts": f"{points}".encode()})
    for name, module in (("medical", medical), ("points", meshes)):
        monkeypatch.setitem(sys.modules, f"vlpfast.data.{name}", module)
    for package in ("pydicom", "nibabel", "trimesh"):
        monkeypatch.setitem(sys.modules, package, types.SimpleNamespace())
    src = tmp_path / "src"
    put(src, "a.nii.gz", b"volume")
    put(src, "a.json", '{"caption": "a head", "age": 3}')
    put(src, "bad.nii", b"")
    put(src, "bad.txt", "x")
    put(src, "m.OBJ", b"v 0 0 0")
    put(src, "m.txt", "a mesh")
    build("nifti", src, tmp_path / "nifti")
    ((key, members),) = contents(tmp_path / "nifti").items()
    assert key == "a" and members["vol"] == b"volume" and members["txt"] == b"a head"
    assert json.loads(members["json"]) == {"caption": "a head", "age": 3, "spacing": [1, 2, 3]}
    assert skipped(tmp_path / "nifti") == {"bad.nii": "no affine"}
    build("meshes", src, tmp_path / "meshes", Options(points=77))
    assert contents(tmp_path / "meshes") == {"m": {"pts": b"77", "txt": b"a mesh"}}
    report = build("dicom", src, tmp_path / "dicom", samples_per_shard=1)
    assert (report.samples, report.skipped) == (2, 1)  # what came before the damage is kept
    assert [members["vol"] for members in contents(tmp_path / "dicom").values()] == [b"1", b"2"]


def test_the_command_knows_every_kind() -> None:
    from vlpfast.cli import data

    assert tuple(KINDS) == data._KINDS
