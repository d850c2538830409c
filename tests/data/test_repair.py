from __future__ import annotations

import io
import json
import os
import sys
import wave
from pathlib import Path

import pytest
from PIL import Image

from vlpfast.data import ShardSet, ShardWriter
from vlpfast.data import repair as repairing
from vlpfast.data.repair import repair
from vlpfast.data.shards import verify
from vlpfast.types import UserError


def picture(colour: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 16), (colour, 90, 200)).save(out, "JPEG")
    return out.getvalue()


def sound() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(2000))
    return out.getvalue()


def write(folder: Path, prefix: str, samples: dict[str, dict[str, bytes]]) -> Path:
    with ShardWriter(folder, prefix) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return Path(writer.shards[0])


def contents(path: Path) -> dict[str, dict[str, bytes]]:
    shards = ShardSet(str(path))
    return {
        shards.key(i): {name: shards.read([i], [name])[0].tobytes() for name in shards.extensions(i)} for i in range(len(shards))
    }


def ends(samples: dict[str, dict[str, bytes]]) -> list[int]:
    """The byte at which each sample of a shard ends."""
    position, found = 0, []
    for members in samples.values():
        position += sum(512 + -(-len(content) // 512) * 512 for content in members.values())
        found.append(position)
    return found


def pairs(count: int, **more: bytes) -> dict[str, dict[str, bytes]]:
    return {f"k{i}": {"jpg": picture(9 * i), "txt": b"number %d" % i, **more} for i in range(count)}


def test_damaged_samples_are_taken_out(tmp_path: Path) -> None:
    samples = pairs(5, json=b"{}")
    broken = {**samples, "k1": {**samples["k1"], "jpg": b"no picture"}, "k3": {"jpg": picture(), "json": b"{}"}}
    path = write(tmp_path, "a", broken)
    other = write(tmp_path, "b", {"x": samples["k0"]})
    before = other.read_bytes(), path.read_bytes()
    done = repair(str(tmp_path))
    assert done.kept == {str(path): 3} and done.left == [] and done.report.damaged == 2
    assert contents(path) == {key: samples[key] for key in ("k0", "k2", "k4")}
    assert (other.read_bytes(), Path(f"{path}.bad").read_bytes()) == before
    assert sorted(os.listdir(tmp_path)) == ["a-000000.idx", "a-000000.tar", "a-000000.tar.bad", "b-000000.idx", "b-000000.tar"]
    assert verify(str(tmp_path)).ok and repair(str(tmp_path)).kept == {}
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.idx")}
    ShardSet(str(tmp_path))
    assert stamps == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.idx")}  # they were right


@pytest.mark.parametrize("cut", range(0, 13))
def test_a_shard_cut_short_keeps_what_is_whole(tmp_path: Path, cut: int) -> None:
    """Cut within each block of the last two samples: what is kept is exactly the samples with all their members."""
    samples = pairs(4, json=b'{"a": 1}')
    path = write(tmp_path, "a", samples)
    whole = path.read_bytes()
    length = len(whole) - 1024 - 300 - 512 * cut  # a sample: three members of a header and a block or two each
    path.write_bytes(whole[:length])
    done = repair(str(path))
    found = contents(path)
    assert done.kept == {str(path): len(found)} and list(found) == [f"k{i}" for i in range(len(found))]
    assert found == {key: samples[key] for key in found}
    assert len(found) == sum(end - 512 < length for end in ends(samples))  # padding alone may be missing
    assert len(Path(f"{path}.bad").read_bytes()) == length


def test_a_sample_that_may_lack_a_member_is_left_out(tmp_path: Path) -> None:
    samples = pairs(2, json=b"{}")
    path = write(tmp_path, "a", samples)
    whole = path.read_bytes()
    at = whole.rindex(b"k1.json")
    path.write_bytes(whole[: at + 100])  # jpg and txt of k1 are whole
    assert repair(str(path)).kept == {str(path): 1} and list(contents(path)) == ["k0"]


@pytest.mark.parametrize("block", range(0, 24))
def test_what_lies_behind_a_damaged_header_is_kept(tmp_path: Path, block: int) -> None:
    """One block after the other is overwritten: the sample it is in is lost, or has all its members; the others are kept."""
    samples = {f"k{i}": {"jpg": picture(i), "txt": b"%d" % i, "json": b'{"a": 1}'} for i in range(4)}
    path = write(tmp_path, "a", samples)
    content = bytearray(path.read_bytes())
    content[512 * block : 512 * block + 512] = b"\xee" * 512
    hit = sum(512 * block >= end for end in ends(samples))
    path.write_bytes(content)
    damaged = not verify(str(path)).ok
    done = repair(str(path))
    found = contents(path)
    assert {key: found[key] for key in found if key != f"k{hit}"} == {key: samples[key] for key in samples if key != f"k{hit}"}
    assert f"k{hit}" not in found or set(found[f"k{hit}"]) == {"jpg", "txt", "json"}
    assert verify(str(path)).ok and bool(done.kept) == damaged


def test_keys_that_come_again_get_a_number(tmp_path: Path) -> None:
    first, second = (
        write(tmp_path, "a", pairs(2)),
        write(tmp_path, "b", {"k1": {"jpg": picture(5), "txt": b"x"}, "k1_2": pairs(1)["k0"]}),
    )
    assert repair(str(tmp_path)).kept == {str(second): 2}
    assert list(contents(first)) == ["k0", "k1"] and list(contents(second)) == ["k1_3", "k1_2"]
    assert contents(second)["k1_3"]["txt"] == b"x" and verify(str(tmp_path)).ok


def test_nothing_is_lost_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a", {**pairs(2), "bad": {"jpg": b"no", "txt": b"x"}})
    old = path.read_bytes()
    for name in ("link", "replace"):

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(repairing.os, name, fail)
            patch.setattr(repairing.shutil, "copy2", fail)
            with pytest.raises(UserError, match="No space left"):
                repair(str(path))
        assert path.read_bytes() == old and not (tmp_path / "a-000000.tar.repair").exists()
        if Path(f"{path}.bad").exists():
            assert Path(f"{path}.bad").read_bytes() == old
            with pytest.raises(UserError, match=r"tar.bad is there from an earlier repair"):
                repair(str(path))
            Path(f"{path}.bad").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(repairing.os, "link", fail)  # a file system without links
        assert repair(str(path)).kept == {str(path): 2}
    assert Path(f"{path}.bad").read_bytes() == old


def test_what_holds_nothing_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "a", {"k": {"jpg": b"no", "txt": b"x"}})
    (tmp_path / "b.tar").write_bytes(b"no archive" * 100)
    (tmp_path / "c.tar").touch()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(repair(str(tmp_path)).left) == [str(path), str(tmp_path / "b.tar"), str(tmp_path / "c.tar")]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_kinds_are_known_whole(tmp_path: Path) -> None:
    """Text, documents, sounds: no picture is asked for; each kind has damage of its own."""
    pytest.importorskip("soundfile", reason="waits for the package soundfile")
    text = write(tmp_path, "text", {"a": {"txt": b"words"}, "b": {"txt": b"\xff"}, "c": {"txt": b"words", "json": b"{}"}})
    parts = {"parts": [{"text": "see"}, {"image": "0.jpg"}]}

    def document(picture: bytes, **changes: object) -> dict[str, bytes]:
        return {"0.jpg": picture, "json": json.dumps({**parts, **changes}).encode()}

    documents = {
        "a": document(picture()),
        "b": document(picture()[:-2]),
        "c": document(picture(), parts=[{"image": "1.jpg"}]),
        "d": document(picture(), parts=[{"image": "json"}]),
        "e": document(picture(), parts="x"),
        "f": {"json": json.dumps({"parts": [{"text": "alone"}]}).encode()},
    }
    paper = write(tmp_path, "paper", documents)
    media = write(
        tmp_path,
        "media",
        {"a": {"wav": sound(), "json": b"{}"}, "b": {"wav": b"RIFF"}, "c": {"wav": b""}, "d": {"flac": sound()}},
    )
    odd = write(tmp_path, "odd", {"a": {"npy": b"1"}, "b": {"npy": b"2"}})
    bare = write(tmp_path, "bare", {"p": {"jpg": picture()}})
    assert {key for key, _ in verify(str(text)).shards[0].damaged} == {"b"}
    found = dict(verify(str(paper)).shards[0].damaged)
    assert set(found) == {"b", "c", "d", "e"}
    assert "0.jpg: its picture is damaged" in found["b"] and "no member '1.jpg'" in found["c"] and "no list" in found["e"]
    found = dict(verify(str(media)).shards[0].damaged)
    assert set(found) == {"b", "c"} and "cannot be read" in found["b"] and found["c"] == "its wav is empty"
    assert set(dict(verify(str(media), decode=False).shards[0].damaged)) == {"c"}
    assert verify(str(odd)).ok
    assert not verify(str(bare)).ok and verify(str(bare), captions=False).ok
    assert repair(str(paper)).kept == {str(paper): 2}
    assert contents(paper) == {"a": documents["a"], "f": documents["f"]}


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "media", {"a": {"wav": sound()}})
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for check in (verify, repair):
        with pytest.raises(UserError, match=r"needs the package soundfile: pip install 'vlpfast\[audio\]'"):
            check(str(path))
    assert verify(str(path), decode=False).ok
