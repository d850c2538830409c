from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlpfast.data import _tar, shards
from vlpfast.data.shards import IMAGE_EXTENSIONS, ShardSet, ShardWriter, expand, index_path, verify
from vlpfast.types import UserError

try:
    from vlpfast import _host
except ImportError:
    _host = None

needs_native = pytest.mark.skipif(_host is None, reason="waits for the native library (a C++ compiler)")


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with the native reader and with its twin in Python."""
    monkeypatch.setattr(shards, "_native", _host if request.param == "native" else _tar)
    return request.param


def make_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT, **extra: object) -> str:
    with tarfile.open(path, "w", format=format, **extra) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def picture(colour: int = 0, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(out, kind)
    return out.getvalue()


def contents(samples: ShardSet) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (samples.key(i), {e: samples.read([i], (e,))[0].tobytes() for e in samples.extensions(i)}) for i in range(len(samples))
    ]


LONG = "folder.with.dots/" + "k" * 90 + "/" + "n" * 60
MEMBERS = [
    ("a.jpg", b"x" * 700),
    ("a.txt", b""),
    ("folder/", b""),
    ("folder/b.jpg", b"B" * 512),
    ("folder/b.seg.PNG", b"S"),
    (f"{LONG}.jpg", b"long"),
    (f"{LONG}.txt", b"long caption"),
    ("a.b/c.jpg", b"c" * 5000),
]
SAMPLES = [
    ("a", {"jpg": b"x" * 700, "txt": b""}),
    ("folder/b", {"jpg": b"B" * 512, "seg.png": b"S"}),
    (LONG, {"jpg": b"long", "txt": b"long caption"}),
    ("a.b/c", {"jpg": b"c" * 5000}),
]


# --- writing --------------------------------------------------------------------------------------------------------------


def test_written_samples_come_back(tmp_path: Path, reader: str) -> None:
    written = [(f"d/{'k' * (20 * i)}{i}", {"jpg": bytes([i]) * 300 * i, "txt": b"caption %d" % i}) for i in range(11)]
    with ShardWriter(tmp_path, "train", samples_per_shard=4) as writer:
        for key, members in written:
            writer.write(key, members)
    assert [os.path.basename(path) for path in writer.shards] == [f"train-00000{i}.tar" for i in range(3)]
    samples = ShardSet(str(tmp_path))
    assert samples.shard_sizes.tolist() == [4, 4, 3] and samples.shards == writer.shards
    assert contents(samples) == written
    assert samples.name(8) == f"train-000002.tar:{written[8][0]}"
    with tarfile.open(writer.shards[0]) as tar:
        assert tar.getnames() == [f"{key}.{e}" for key, members in written[:4] for e in members]
    # what the writer put beside the shard is what the reader would have made from it
    indexes = [Path(index_path(path)).read_bytes() for path in writer.shards]
    for path in writer.shards:
        os.unlink(index_path(path))
    ShardSet(str(tmp_path))
    assert [Path(index_path(path)).read_bytes() for path in writer.shards] == indexes


def test_shards_depend_on_nothing_but_their_samples(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        with ShardWriter(tmp_path / folder, "x") as writer:
            writer.write("k" * 120, {"jpg": b"1", "txt": b"2"})
            writer.write("b", {"jpg": b"3"})
    one, two = (sorted((tmp_path / folder).iterdir()) for folder in ("one", "two"))
    assert [p.name for p in one] == ["x-000000.idx", "x-000000.tar"]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_an_exception_leaves_only_whole_shards(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, "x", samples_per_shard=2) as writer:
        for i in range(3):
            writer.write(str(i), {"jpg": b"1"})
        raise RuntimeError("stop")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-000000.idx", "x-000000.tar"]


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        ("a.b", {"jpg": b""}, "key: .* no dot, got 'a.b'"),
        ("a b", {"jpg": b""}, "key: .* white space"),
        ("/a", {"jpg": b""}, "key: expected a relative path"),
        ("", {"jpg": b""}, "key"),
        ("a", {}, "members: sample 'a' has none"),
        ("a", {"JPG": b""}, "got 'JPG' in sample 'a'"),
        ("a", {".jpg": b""}, "got '.jpg'"),
        ("a", {"jpg.": b""}, "got 'jpg.'"),
        ("first", {"jpg": b""}, "key: 'first' was written"),
    ],
)
def test_the_writer_refuses(tmp_path: Path, key: str, members: dict[str, bytes], message: str) -> None:
    writer = ShardWriter(tmp_path, "x")
    writer.write("first", {"jpg": b""})
    with pytest.raises(ValueError, match=message):
        writer.write(key, members)
    with pytest.raises(TypeError, match="expected bytes for 'txt' in sample 'a', got str"):
        writer.write("a", {"txt": "text"})


def test_the_writer_does_not_mix_with_older_shards(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "x") as writer:
        writer.write("a", {"jpg": b""})
    with pytest.raises(UserError, match="already holds 1 shards named x"):
        ShardWriter(tmp_path, "x")
    ShardWriter(tmp_path, "y")


# --- finding --------------------------------------------------------------------------------------------------------------


def test_patterns(tmp_path: Path) -> None:
    names = ["t-008.tar", "t-009.tar", "t-010.tar", "v.tar"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    there = [str(tmp_path / name) for name in names]
    assert expand(str(tmp_path)) == there
    assert expand(f"{tmp_path}/t-*.tar") == there[:3]
    assert expand(f"{tmp_path}/t-{{008..010}}.tar") == there[:3]
    assert expand(f"{tmp_path}/{{v,t-00{{9,8}}}}.tar") == [there[3], there[1], there[0]]
    assert expand([there[2], f"{tmp_path}/*.tar"]) == [there[2], there[0], there[1], there[3]]
    odd = tmp_path / "odd[1]{a,b}"
    odd.mkdir()
    (odd / "x.tar").write_bytes(b"x")
    assert expand(str(odd)) == expand(str(odd / "x.tar")) == [str(odd / "x.tar")]


def test_patterns_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "t-000.tar").write_bytes(b"x")
    (tmp_path / "empty.tar").touch()
    (tmp_path / "folder").mkdir()
    for pattern, message in {
        f"{tmp_path}/q*.tar": r"q\*.tar matches no file",
        f"{tmp_path}/t-{{000..001}}.tar": "t-001.tar matches no file .from ",
        f"{tmp_path}/t-{{003..001}}.tar": "runs backwards",
        f"{tmp_path}/folder": "folder holds no .tar file",
        f"{tmp_path}/empty.tar": r"empty.tar is empty \(0 bytes\)",
    }.items():
        with pytest.raises(UserError, match=message):
            expand(pattern)
    with pytest.raises(UserError, match="list of patterns is empty"):
        expand([])
    with pytest.raises(TypeError, match="expected strings"):
        expand([Path("x.tar")])


# --- archives -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT], ids=["gnu", "pax", "ustar"])
def test_formats(tmp_path: Path, reader: str, format: int) -> None:
    hidden = [(".hidden.jpg", b"h"), ("folder/.hidden", b"h"), ("README", b"no extension")]
    path = make_tar(tmp_path / "a.tar", hidden + MEMBERS, format)
    for _ in range(2):  # from the archive, then from the index
        assert contents(ShardSet(path)) == SAMPLES


def test_numbers_and_records_of_pax_and_gnu(tmp_path: Path, reader: str) -> None:
    def header(name: str, size: int, kind: bytes = b"0", base_256: bool = False) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        if base_256:
            block[124:136] = b"\x80" + size.to_bytes(11, "big")
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
        return bytes(block)

    def record(text: bytes) -> bytes:
        length = len(text) + 3
        while len(b"%d %s\n" % (length, text)) != length:
            length += 1
        return b"%d %s\n" % (length, text)

    def padded(content: bytes) -> bytes:
        return content + bytes(-len(content) % 512)

    pax = record(b"comment=\xff=") + record(b"path=pax.jpg") + record(b"size=3")
    always = record(b"mtime=1.5")
    sparse = record(b"GNU.sparse.major=1")
    more = bytearray(header("old.jpg", 5, b"S"))
    more[482] = 1
    more[148:156] = b"%06o\0 " % (sum(more[:148]) + sum(more[156:]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(
        header("pax_global_header", len(always), b"g")
        + padded(always)
        + header("base.jpg", 700, base_256=True)
        + padded(b"7" * 700)
        + header("x", len(pax), b"x")
        + padded(pax)
        + header("short.txt", 0)
        + padded(b"pax")
        + header("x", len(sparse), b"x")
        + padded(sparse)
        + header("sparse.jpg", 4)
        + padded(b"hole")
        + bytes(more)
        + bytes(512)
        + padded(b"dense")
        + header("link.jpg", 9, b"1")
        + header("./last.jpg", 1, b"7")
        + padded(b"!")
        + bytes(1024)
    )
    expected = [("base", {"jpg": b"7" * 700}), ("pax", {"jpg": b"pax"}), ("./last", {"jpg": b"!"})]
    assert contents(ShardSet(str(tmp_path / "a.tar"))) == expected


def test_names_that_are_not_text(tmp_path: Path, reader: str) -> None:
    path = make_tar(tmp_path / "a.tar", [("b\udcff.jpg", b"1"), ("ü.jpg", b"2")], tarfile.GNU_FORMAT, errors="surrogateescape")
    assert contents(ShardSet(path)) == contents(ShardSet(path)) == [("b\\xff", {"jpg": b"1"}), ("ü", {"jpg": b"2"})]


def test_archives_that_cannot_be_used(tmp_path: Path, reader: str) -> None:
    def refused(content: bytes, message: str) -> None:
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=f"a.tar {message}"):
            ShardSet(str(tmp_path / "a.tar"))
        assert not os.path.exists(index_path(str(tmp_path / "a.tar")))

    whole = Path(make_tar(tmp_path / "b.tar", MEMBERS)).read_bytes()
    refused(b"x", "is damaged: not a tar archive; last whole member: none")
    refused(b"x" * 2000, "is damaged: not a tar archive")
    refused(b"\x1f\x8b" + bytes(2000), "is compressed with gzip")
    refused(bytes(10240), "holds no samples")
    refused(whole[:600], "is damaged: cut short inside the member at byte 0; last whole member: none")
    refused(whole[:3300], "is damaged: cut short inside the member at byte 2560; last whole member: a.txt")
    refused(whole[:1600], "is damaged: cut short inside the header at byte 1536; last whole member: a.jpg")
    refused(whole[:2560] + b"\1" + whole[2561:], "is damaged: damaged header at byte 2560; last whole member: a.txt")
    refused(whole[:2560] + bytes(512) + whole[3072:], "is damaged: damaged header at byte 2560")
    (tmp_path / "c.tar").symlink_to(tmp_path / "c.tar")
    (tmp_path / "d.tar").mkdir()
    with pytest.raises(UserError, match=r"c.tar cannot be read: Too many levels"):
        ShardSet(str(tmp_path / "c.tar"))
    with pytest.raises(UserError, match=r"d.tar cannot be read: Is a directory"):
        ShardSet(f"{tmp_path}/d*.tar")
    (tmp_path / "e.tar").write_bytes(whole[:3000])
    (tmp_path / "a.tar").write_bytes(whole[:3000])
    with pytest.raises(UserError, match=r"a.tar is damaged: .* \(and 1 more shards are unusable\)"):
        ShardSet(f"{tmp_path}/{{a,b,e}}.tar")


# --- index files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT], ids=["pax", "ustar"])
def test_index_is_that_of_dali(tmp_path: Path, reader: str, format: int) -> None:
    wds2idx = pytest.importorskip("wds2idx", reason="waits for nvidia-dali")
    path = make_tar(tmp_path / "a.tar", [(".hidden.jpg", b"h"), *MEMBERS], format)
    with wds2idx.IndexCreator(path, str(tmp_path / "theirs"), verbose=False) as creator:
        creator.create_index()
    ShardSet(path)
    assert Path(index_path(path)).read_text() == (tmp_path / "theirs").read_text()


def test_wrong_offsets_of_dali_for_long_gnu_names_are_noticed(tmp_path: Path, reader: str) -> None:
    wds2idx = pytest.importorskip("wds2idx", reason="waits for nvidia-dali")
    path = make_tar(tmp_path / "a.tar", MEMBERS, tarfile.GNU_FORMAT)
    with wds2idx.IndexCreator(path, index_path(path), verbose=False) as creator:
        creator.create_index()
    assert contents(ShardSet(path)) == SAMPLES


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT], ids=["gnu", "pax", "ustar"])
def test_dali_reads_with_our_index(tmp_path: Path, format: int) -> None:
    pytest.importorskip("nvidia.dali", reason="waits for nvidia-dali")
    from nvidia.dali import fn, pipeline_def

    path = make_tar(tmp_path / "a.tar", MEMBERS, format)
    samples = ShardSet(path)

    @pipeline_def(batch_size=len(samples), num_threads=1, device_id=None)
    def pipeline():
        return fn.readers.webdataset(
            paths=[path], index_paths=[index_path(path)], ext=["jpg"], missing_component_behavior="error"
        )

    (batch,) = pipeline().run()
    ours = samples.read(range(len(samples)), ("jpg",))
    assert [np.asarray(batch[i]).tobytes() for i in range(len(samples))] == [content.tobytes() for content in ours]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: b"",
        lambda text: b"v1.1" + text[4:],
        lambda text: text.replace(b"v1.2 4", b"v1.2 5"),
        lambda text: text[:-9],
        lambda text: b"v1.2 3\n" + b"\n".join(text.split(b"\n")[1:4]) + b"\n",  # a sample too few at the end
        lambda text: text.replace(b"jpg 512 700", b"jpg 512 699"),
        lambda text: text.replace(b"jpg 512 700", b"jpg 1024 188"),
        lambda text: text.replace(b" a.jpg", b" e.jpg").replace(b" a.txt", b" e.txt"),
        lambda text: text.replace(b" 5000 a.b", b" 500000 a.b"),
        lambda text: text.replace(b"jpg 512 700", b"jpg -512 700"),
        lambda text: text.replace(b"jpg 512 700", b"jpg 99999999999999999999999 700"),
        lambda text: text.replace(b"\n", b" \n"),
    ],
)
def test_an_index_that_does_not_fit_is_remade(tmp_path: Path, reader: str, spoil: Callable[[bytes], bytes]) -> None:
    path = make_tar(tmp_path / "a.tar", MEMBERS)
    ShardSet(path)
    right = Path(index_path(path)).read_bytes()
    assert spoil(right) != right
    Path(index_path(path)).write_bytes(spoil(right))
    assert contents(ShardSet(path)) == SAMPLES
    assert Path(index_path(path)).read_bytes() == right


def test_an_index_older_than_its_tar_is_remade(tmp_path: Path, reader: str) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"22"), ("c.jpg", b"3")])
    ShardSet(path)
    os.utime(index_path(path), ns=(0, 0))
    make_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("B.jpg", b"22"), ("c.jpg", b"3")])
    assert [key for key, _ in contents(ShardSet(path))] == ["a", "B", "c"]
    before = os.stat(index_path(path)).st_mtime_ns
    ShardSet(path)
    assert os.stat(index_path(path)).st_mtime_ns == before  # one that fits is left alone


def test_a_truncated_tar_is_found_though_its_index_is_whole(tmp_path: Path, reader: str) -> None:
    path = make_tar(tmp_path / "a.tar", MEMBERS)
    ShardSet(path)
    os.truncate(path, 8000)
    os.utime(path, ns=(0, 0))  # older than its index
    with pytest.raises(UserError, match=r"a.tar is damaged: cut short inside the .* last whole member: folder.with.dots/"):
        ShardSet(path)


def test_an_index_that_cannot_be_written_stays_in_memory(tmp_path: Path, reader: str, caplog: pytest.LogCaptureFixture) -> None:
    path = make_tar(tmp_path / "a.tar", MEMBERS)
    os.mkdir(index_path(path))  # in the way even of root
    assert contents(ShardSet(path)) == SAMPLES
    assert [record.message for record in caplog.records] == [f"the index of {path} is kept in memory: Is a directory"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.idx", "a.tar"]
    spaced = make_tar(tmp_path / "b.tar", [("white space.jpg", b"1")])
    assert contents(ShardSet(spaced)) == [("white space", {"jpg": b"1"})]
    assert not os.path.exists(index_path(spaced))


# --- reading --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path: Path, reader: str) -> ShardSet:
    with ShardWriter(tmp_path / "set", "x", samples_per_shard=3) as writer:
        for i in range(20):
            writer.write(f"k{i}", {("png" if i % 2 else "jpg"): b"%d" % i * 1000 * i} | ({"txt": b"t%d" % i} if i % 5 else {}))
    return ShardSet(str(tmp_path / "set"))


def test_read_takes_the_first_extension_that_a_sample_has(samples: ShardSet) -> None:
    order = np.random.default_rng(0).permutation(20)
    pictures = samples.read(order, IMAGE_EXTENSIONS)
    assert [p.tobytes() for p in pictures] == [b"%d" % i * 1000 * i for i in order]
    assert all(p.dtype == np.uint8 and p.ndim == 1 for p in pictures)
    assert [t if t is None else t.tobytes() for t in samples.read([5, 6, 5, 6], ("txt",))] == [None, b"t6", None, b"t6"]
    assert samples.read([1], ("txt", "png"))[0].tobytes() == b"t1"
    assert samples.read([1, 2], ("json",)) == [None, None] and samples.read([], ("jpg",)) == []
    assert samples.extensions(1) == ("png", "txt") and samples.extensions(5) == ("png",)
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match=f"sample {wrong} of 20"):
            samples.read([wrong], ("jpg",))
        with pytest.raises(IndexError, match=f"sample {wrong} of 20"):
            samples.key(wrong)


def test_read_from_shards_that_vanish_or_shrink(samples: ShardSet) -> None:
    os.truncate(samples.shards[4], 600)
    os.unlink(samples.shards[5])
    with pytest.raises(UserError, match=r"x-000004.tar cannot be read: the file ends \d+ bytes before the end of the range"):
        samples.read(range(20), IMAGE_EXTENSIONS)
    with pytest.raises(UserError, match=r"x-000005.tar cannot be read: No such file"):
        samples.read([15], IMAGE_EXTENSIONS)
    assert samples.read([3], IMAGE_EXTENSIONS)[0].tobytes() == b"3" * 3000


def test_fingerprint(tmp_path: Path, samples: ShardSet) -> None:
    os.rename(tmp_path / "set", tmp_path / "moved")
    assert ShardSet(str(tmp_path / "moved")).fingerprint() == samples.fingerprint()
    assert ShardSet(f"{tmp_path}/moved/x-00000[0-5].tar").fingerprint() != samples.fingerprint()
    os.rename(tmp_path / "moved/x-000000.tar", tmp_path / "moved/y-000000.tar")
    assert ShardSet(str(tmp_path / "moved")).fingerprint() != samples.fingerprint()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="waits for a system with /proc")
def test_few_files_stay_open(samples: ShardSet, reader: str) -> None:
    def ours() -> int:
        links = (Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
        return sum(os.path.exists(link) and os.readlink(link) in samples.shards for link in links)

    few = shards._native.Reader(samples.shards, 2)
    numbers = np.arange(len(samples.shards))
    offsets, sizes = np.full(len(numbers), 512), np.full(len(numbers), 8)
    for _ in range(3):
        assert len(few.read(numbers, offsets, sizes, 3)) == len(numbers)
        assert ours() == 2
    del few
    assert ours() == 0
    for wrong in ((99, 0, 1), (0, -1, 1), (0, 0, -1)):
        if reader == "native":
            with pytest.raises(ValueError, match="range 0 is not in the files"):
                shards._native.Reader(samples.shards, 2).read(*(np.array([n]) for n in wrong), 1)


# --- the native reader and its twin ---------------------------------------------------------------------------------------


def fields(table: object) -> list[object]:
    arrays = [getattr(table, name).tolist() for name in ("offsets", "sizes", "extension_ids", "sample_ends", "key_ends")]
    return arrays + [getattr(table, name) for name in ("keys", "extensions", "file_size", "problem", "complete", "index")]


@needs_native
def test_damaged_archives_read_alike_natively_and_in_python(tmp_path: Path) -> None:
    """Truncations and changed bytes, half of them with the header's checksum put right, so that wrong sizes and types count."""
    chance = random.Random(0)
    path, index = str(tmp_path / "a.tar"), str(tmp_path / "a.idx")
    problems = set()
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        make_tar(tmp_path / "a.tar", MEMBERS, format)
        whole = Path(path).read_bytes()[: 40 * 512]
        with tarfile.open(path) as tar:
            headers = sorted({member.offset for member in tar} | {member.offset_data - 512 for member in tar})
        for turn in range(400):
            data = bytearray(whole)
            for _ in range(chance.randint(0, 3)):
                at = chance.choice(headers)
                place = at + chance.choice([chance.randrange(512), 124 + chance.randrange(12), 156, chance.randrange(2048)])
                data[place % len(data)] = chance.choice([0, 32, 48, 49, 55, 76, 83, 120, 103, 128, 255, chance.randrange(256)])
                if chance.random() < 0.5:
                    data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 148]) + sum(data[at + 156 : at + 512]) + 256)
            if turn % 2:
                del data[chance.randrange(len(data)) :]
            Path(path).write_bytes(data)
            (native,), (plain,) = _host.load([path], [index], 1), _tar.load([path], [index], 1)
            assert fields(native) == fields(plain)
            assert all(o >= 0 and o + s <= len(data) for o, s in zip(native.offsets, native.sizes, strict=True))
            problems.add(native.problem.split(" at byte")[0].split(";")[0])
    assert len(problems) == 6  # none, not a tar, damaged header, cut short in a member, in a header, after a header


@needs_native
def test_damaged_indexes_read_alike_natively_and_in_python(tmp_path: Path) -> None:
    chance = random.Random(0)
    path, index = make_tar(tmp_path / "a.tar", MEMBERS), tmp_path / "a.idx"
    text = _tar.load([path], [""], 1)[0].index
    kept = 0
    for _ in range(500):
        data = bytearray(text)
        for _ in range(chance.randint(1, 2)):
            data[chance.randrange(len(data))] = chance.choice(b"0123456789 \n.-ajpgtx/\xff\0")
        index.write_bytes(data)
        (native,), (plain,) = _host.load([path], [str(index)], 1), _tar.load([path], [str(index)], 1)
        assert fields(native) == fields(plain)
        kept += native.index is None
    assert 0 < kept < 250


def test_without_the_native_library_shards_are_read_in_python_and_that_is_said_once(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", MEMBERS)
    code = f"""
import sys
sys.modules["vlpfast._host"] = None
from vlpfast.data.shards import ShardSet
for _ in range(2):
    print(len(ShardSet({str(tmp_path)!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "4"]
    assert done.stderr.count("shards are read in plain Python") == 1


# --- verify ---------------------------------------------------------------------------------------------------------------


def test_verify(tmp_path: Path, reader: str) -> None:
    good = {"jpg": picture(), "txt": b"a caption"}
    with ShardWriter(tmp_path, "a") as writer:
        writer.write("fine", good)
        writer.write("json", {"webp": picture(1, "WEBP"), "json": json.dumps({"caption": "x"}).encode()})
        writer.write("broken", {**good, "jpg": picture()[:-2]})
        writer.write("half", {"png": picture(0, "PNG")[:-30], "txt": b"x"})
        writer.write("not-a-picture", {**good, "jpg": b"text"})
        writer.write("blind", {"txt": b"x"})
        writer.write("silent", {"jpg": picture()})
        writer.write("latin", {**good, "txt": b"\xe9"})
        writer.write("no-caption", {"png": picture(0, "PNG"), "json": b'{"title": 1}'})
        writer.write("bad-json", {"png": picture(0, "PNG"), "json": b"[1"})
    with ShardWriter(tmp_path, "b") as writer:
        writer.write("fine", good)
        writer.write("other", good)
    whole = Path(writer.shards[0]).read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[:1000])
    (tmp_path / "d.tar").write_bytes(make_two(good))
    (tmp_path / "e.tar").touch()
    (tmp_path / "f.tar").mkdir()
    steps: list[tuple[int, int]] = []
    report = verify(f"{tmp_path}/*.tar", progress=lambda done, of: steps.append((done, of)))
    a, b, c, d, e, f = report.shards
    assert steps == [(i + 1, 6) for i in range(6)]
    assert (a.samples, a.problem, b.samples, b.problem) == (10, "", 2, "")
    found = dict(a.damaged)
    assert list(found) == ["broken", "half", "not-a-picture", "blind", "silent", "latin", "no-caption", "bad-json"]
    assert found["broken"] == "its picture is damaged: the JPEG file is cut short"
    assert found["half"].startswith("its picture is damaged: ")
    assert found["not-a-picture"].startswith("its picture is damaged: not a picture")
    assert found["blind"].startswith("no picture (jpg,") and found["silent"].startswith("no caption")
    assert "cannot be read: 'utf-8'" in found["latin"] and "no text" in found["no-caption"]
    assert found["bad-json"].startswith("its caption cannot be read")
    assert b.damaged == [("fine", f"its key is also in {a.path}")]
    assert c.problem.startswith("is damaged: cut short")
    assert (d.samples, d.problem[:24]) == (1, "lacks the two zero block")
    assert (e.problem, f.problem) == ("is empty (0 bytes)", "cannot be read: Is a directory")
    assert (report.samples, report.damaged, report.ok) == (13, 9, False)
    undecoded = verify(f"{tmp_path}/a-*.tar", decode=False).shards[0]
    assert [key for key, _ in a.damaged if key not in dict(undecoded.damaged)] == ["half"]
    assert verify(f"{tmp_path}/b-*.tar").ok


def make_two(members: dict[str, bytes]) -> bytes:
    """An archive of one sample without the zero blocks at its end."""
    out = b""
    for extension, content in members.items():
        info = tarfile.TarInfo(f"z.{extension}")
        info.size = len(content)
        out += info.tobuf() + content + bytes(-len(content) % 512)
    return out


def test_shards_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        with ShardWriter(tmp_path / folder, "train") as writer:
            writer.write("0", {"txt": folder.encode()})
    both = ShardSet([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [both.name(i) for i in range(2)] == [os.path.join("a", "train-000000.tar:0"), os.path.join("b", "train-000000.tar:0")]
    assert ShardSet(str(tmp_path / "b")).name(0) == "train-000000.tar:0"
