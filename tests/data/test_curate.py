from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlpfast.data import ShardSet, ShardWriter
from vlpfast.data import curate as curating
from vlpfast.data.curate import by_scores, near_duplicates
from vlpfast.data.hashing import phash
from vlpfast.types import UserError


def photo(seed: int, quality: int = 95, side: int = 96) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality)
    return out.getvalue()


def decisions(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "decisions.jsonl").read_text().splitlines()]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """a, b, a again, b smaller, damaged, c; in shards of four."""
    pictures = {"a": photo(1), "b": photo(2), "a2": photo(1), "b2": photo(2, 60, 70), "bad": photo(3)[:-2], "c": photo(4)}
    with ShardWriter(tmp_path / "in", "x", samples_per_shard=4) as writer:
        for key, content in pictures.items():
            writer.write(
                f"f/{key}", {"jpg": content, "txt": key.encode(), "json": b'{"key": "%s"}' % key.encode(), "0.npy": b"\0"}
            )
    return tmp_path / "in"


def test_near_duplicates(shards: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int | None]] = []
    report = near_duplicates(str(shards), tmp_path / "out", samples_per_shard=2, progress=lambda *step: steps.append(step))
    found = decisions(tmp_path / "out")
    assert [line["keep"] for line in found] == [True, True, False, False, False, True]
    assert found[0] == {"shard": "x-000000.tar", "key": "f/a", "keep": True}
    assert found[2]["duplicate_of"] == "x-000000.tar:f/a" and found[2]["distance"] == 0
    assert found[3]["duplicate_of"] == "x-000000.tar:f/b" and "truncated" in found[4]["damaged"]
    assert (report.samples, report.kept, report.left_out, report.damaged, report.shards) == (6, 3, 3, 1, 2)
    assert report.numbers == {"groups": 2, "largest_group": 2} and steps == [(6, 6)]
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["method"] == {"name": "near-duplicates", "by": "phash", "distance": 4} and saved["kept"] == 3
    before, after = ShardSet(str(shards)), ShardSet(str(tmp_path / "out"))
    assert [after.key(i) for i in range(len(after))] == ["f/a", "f/b", "f/c"]
    for i, j in enumerate((0, 1, 5)):
        assert after.extensions(i) == before.extensions(j) == ("jpg", "txt", "json", "0.npy")
        for name in after.extensions(i):
            assert after.read([i], [name])[0].tobytes() == before.read([j], [name])[0].tobytes()


def test_by_bytes_and_dry_run(shards: Path, tmp_path: Path) -> None:
    report = near_duplicates(str(shards), tmp_path / "out", by="bytes", dry_run=True)
    assert [line["keep"] for line in decisions(tmp_path / "out")] == [True, True, False, True, True, True]
    assert sorted(os.listdir(tmp_path / "out")) == ["decisions.jsonl", "report.json"] and report.shards == 0
    with ShardWriter(tmp_path / "texts", "x") as writer:
        for i, text in enumerate((b"one", b"two", b"one")):
            writer.write(f"k{i}", {"txt": text})
    assert near_duplicates(str(tmp_path / "texts"), tmp_path / "out2", by="bytes").kept == 2


@pytest.mark.parametrize("chunk", [1, 2, 7, 512])
def test_the_first_of_each_group_is_kept_whatever_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Against the plain definition, over hashes that form chains as well as groups."""
    rng = np.random.default_rng(0)
    hashes = [int(rng.integers(0, 2**63))]
    for _ in range(149):
        one = hashes[rng.integers(0, len(hashes))] if rng.random() < 0.8 else int(rng.integers(0, 2**63))
        for bit in rng.choice(64, rng.integers(0, 5), replace=False):
            one ^= 1 << int(bit)
        hashes.append(one)
    kept: list[int] = []
    first: list[int] = []
    for i, one in enumerate(hashes):
        first.append(next((k for k in kept if (one ^ hashes[k]).bit_count() <= 4), -1))
        if first[-1] < 0:
            kept.append(i)
    with ShardWriter(tmp_path / "in", "x") as writer:
        for i in range(150):
            writer.write(f"{i:03d}", {"jpg": b"%d" % i})
    monkeypatch.setattr(curating, "_CHUNK", chunk)
    monkeypatch.setattr(curating, "_hash", lambda content, by: np.uint64(hashes[int(content.tobytes())]))
    near_duplicates(str(tmp_path / "in"), tmp_path / "out", dry_run=True)
    found = decisions(tmp_path / "out")
    assert [int(line["duplicate_of"][-3:]) if "duplicate_of" in line else -1 for line in found] == first
    assert 20 < len(kept) < 120
    assert all(line["distance"] == (hashes[i] ^ hashes[first[i]]).bit_count() for i, line in enumerate(found) if first[i] >= 0)


def test_samples_that_no_loader_takes_are_left_out(tmp_path: Path) -> None:
    """A member that comes twice: nobody can tell which of the two is meant."""
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("k.jpg", photo(1)), ("k.jpg", photo(2)), ("l.jpg", photo(1))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    for by in ("phash", "bytes"):
        near_duplicates(str(tmp_path / "a.tar"), tmp_path / by, by=by)
        first, second = decisions(tmp_path / by)
        assert "twice" in first["damaged"] and second["keep"]  # and what is left out makes no other a duplicate


def test_by_scores(shards: Path, tmp_path: Path) -> None:
    scores = np.array([0.3, 0.1, 0.3, 0.5, np.nan, 0.2], np.float32)
    report = by_scores(str(shards), scores, tmp_path / "a", threshold=0.3, damaged={4: "cut"}, method={"name": "mine"})
    assert [line["keep"] for line in decisions(tmp_path / "a")] == [True, False, True, True, False, False]
    assert decisions(tmp_path / "a")[4]["damaged"] == "cut" and decisions(tmp_path / "a")[3]["score"] == 0.5
    assert (report.kept, report.damaged, report.method) == (3, 1, {"name": "mine"})
    assert report.numbers["scores"]["min"] == pytest.approx(0.1) and report.numbers["scores"]["50%"] == pytest.approx(0.3)
    report = by_scores(str(shards), scores, tmp_path / "b", top=0.4)  # of five: two, and of the equal ones the earlier
    assert [line["keep"] for line in decisions(tmp_path / "b")] == [True, False, False, True, False, False]
    assert report.numbers["threshold"] == pytest.approx(0.3)
    after = ShardSet(str(tmp_path / "b"))
    assert [after.key(i) for i in range(len(after))] == ["f/a", "f/b2"]
    assert by_scores(str(shards), scores, tmp_path / "c", top=0.01).kept == 1
    for arguments, message in (
        ({"top": 0.0}, "top: expected a share above 0 and up to 1, got 0"),
        ({"top": 1.1}, "got 1.1"),
        ({}, "either a threshold or a top share"),
        ({"top": 0.5, "threshold": 0.1}, "either a threshold"),
    ):
        with pytest.raises(UserError, match=message):
            by_scores(str(shards), scores, tmp_path / "d", **arguments)
    with pytest.raises(ValueError, match="one for each of the 6 samples, got 5"):
        by_scores(str(shards), scores[:5], tmp_path / "d", top=0.5)
    with pytest.raises(UserError, match="no sample has a score"):
        by_scores(str(shards), np.full(6, np.nan), tmp_path / "d", top=0.5)


def test_nothing_is_written_over_and_nothing_half_done_is_left(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="in exists: remove it"):
        near_duplicates(str(shards), shards)
    (tmp_path / "out").mkdir()  # an empty one may be there

    def stop(content: object, by: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(curating, "_hash", stop)
        near_duplicates(str(shards), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"] and not os.listdir(tmp_path / "out")
    killed = tmp_path / ".out.curating"
    killed.mkdir()
    (killed / "train-000009.tar").write_bytes(b"x")
    near_duplicates(str(shards), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"] and not (tmp_path / "out" / "train-000009.tar").exists()
    with pytest.raises(UserError, match="expected one of phash, dhash, bytes, got 'ahash'"):
        near_duplicates(str(shards), tmp_path / "out2", by="ahash")
    with pytest.raises(UserError, match=r"distance: expected 0 .. 11 bits of 64, got 12"):
        near_duplicates(str(shards), tmp_path / "out2", distance=12)


def test_keys_of_several_shards_may_be_equal(tmp_path: Path) -> None:
    for prefix in ("x", "y"):
        with ShardWriter(tmp_path / "in", prefix) as writer:
            writer.write("k", {"jpg": photo(ord(prefix))})
    assert near_duplicates(str(tmp_path / "in"), tmp_path / "out").kept == 2
    after = ShardSet(str(tmp_path / "out"))
    assert [after.key(0), after.key(1)] == ["k", "k_2"]
    assert phash(Image.open(io.BytesIO(after.read([1], ["jpg"])[0].tobytes()))) == phash(Image.open(io.BytesIO(photo(ord("y")))))
