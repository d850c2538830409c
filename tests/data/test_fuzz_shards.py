"""Damaged, odd and hostile shards: no crash, no hang, no wrong pair, and every sample is handed out or named as left out.

`VLPFAST_FUZZ=10000 pytest tests/data/test_fuzz_shards.py` runs that many variants; each is a function of its number alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import signal
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlpfast.data import ShardSet, _tar, make_loader, shards
from vlpfast.data.shards import verify
from vlpfast.types import DataSpec, ImageSpec, TextSpec, UserError

try:
    from vlpfast import _host
except ImportError:
    _host = None

VARIANTS = int(os.environ.get("VLPFAST_FUZZ", 150))
PART = 50  # variants in one test
SECONDS = 20  # for one variant, which takes some milliseconds: more is a hang
SPEC = DataSpec(ImageSpec(size=4, mean=[0.0] * 3, std=[1.0] * 3, interpolation="bilinear"), TextSpec(40))
COUNT = 6  # samples of the whole shard


class Characters:
    """A tokenizer that can be undone. Like real ones, it takes no text that UTF-8 cannot express."""

    vocab_size, pad_id, bos_id, eos_id = 1 << 21, 0, 1, 2

    def encode(self, texts, context_length):
        for text in texts:
            text.encode()
        rows = [[3 + ord(c) for c in text[: context_length - 2]] for text in texts]
        ids = torch.tensor([[1, *row, 2, *[0] * (context_length - 2 - len(row))] for row in rows])
        return ids, ids != 0


def caption_of(ids: torch.Tensor) -> str:
    return "".join(chr(i - 3) for i in ids.tolist() if i > 2)


# --- samples that say who they are -------------------------------------------------------------------------------------
# A picture's colour and a caption's number carry a check, so that a pair of sound halves is told from one whose bytes changed.


def colour(number: int) -> tuple[int, int, int]:
    check = zlib.crc32(b"colour %d" % number)
    return number, check & 255, check >> 8 & 255


def key(number: int) -> str:
    """So far from one another that changed bits make none of another."""
    return f"k{number}-{zlib.crc32(b'key %d' % number):08x}"


def caption(number: int) -> str:
    return f"picture {number} {zlib.crc32(b'%d' % number):08x}"


def number_of_picture(image: torch.Tensor) -> int | None:
    levels = (image * 255).round().to(torch.int64)  # [3, 4, 4]
    if (levels != levels[:, :1, :1]).any():
        return None
    number = int(levels[0, 0, 0])
    return number if tuple(levels[:, 0, 0].tolist()) == colour(number) else None


def number_of_caption(text: str) -> int | None:
    words = text.split(" ")
    if len(words) != 3 or not words[1].isdigit() or text != caption(int(words[1])):
        return None
    return int(words[1])


def png(width: int, height: int, rows: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def picture(number: int) -> bytes:
    return png(9, 7, (b"\0" + bytes(colour(number)) * 9) * 7)


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), colour(number)).save(out, "JPEG", quality=95)
    return out.getvalue()


# --- archives, byte by byte ------------------------------------------------------------------------------------------------


def seal(block: bytearray) -> bytes:
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:512]) + 8 * 32)
    return bytes(block)


def header(name: bytes, size: int | bytes, kind: bytes = b"0", link: bytes = b"", prefix: bytes = b"") -> bytes:
    block = bytearray(512)
    block[: min(len(name), 100)] = name[:100]
    block[100:108] = b"0000644\0"
    field = size if isinstance(size, bytes) else b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    block[124 : 124 + len(field)] = field
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = b"ustar\x0000"
    block[345 : 345 + len(prefix)] = prefix
    return seal(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def member(name: bytes | str, content: bytes = b"", kind: bytes = b"0", **fields: object) -> bytes:
    name = name.encode() if isinstance(name, str) else name
    return header(name, fields.pop("size", len(content)), kind, **fields) + padded(content)


def record(key: str, value: bytes) -> bytes:
    text = key.encode() + b"=" + value
    length = len(text) + 3
    while len(b"%d %s\n" % (length, text)) != length:
        length += 1
    return b"%d %s\n" % (length, text)


def sample(number: int, chance: random.Random) -> list[bytes]:
    """Its members, in one of the forms that are in use."""
    name, text = key(number), caption(number)
    pair = [
        member(f"{name}.jpg", jpeg(number)) if number == COUNT - 1 else member(f"{name}.png", picture(number)),
        member(f"{name}.json", json.dumps({"caption": text}).encode()) if number == 1 else member(f"{name}.txt", text.encode()),
    ]
    return pair[::-1] if chance.random() < 0.3 else pair


END = bytes(1024)
Members = list[bytes]
Damage = Callable[[Members, random.Random], Members]


def insert(make: Callable[[random.Random], bytes]) -> Damage:
    def damage(members: Members, chance: random.Random) -> Members:
        at = chance.randrange(len(members) + 1)
        return [*members[:at], make(chance), *members[at:]]

    return damage


def replace(make: Callable[[bytes, random.Random], bytes]) -> Damage:
    def damage(members: Members, chance: random.Random) -> Members:
        at = chance.choice([i for i, data in enumerate(members) if any(data[:512])])
        return [*members[:at], make(members[at], chance), *members[at + 1 :]]

    return damage


def whole(make: Callable[[bytearray, random.Random], bytes | bytearray]) -> Damage:
    return lambda members, chance: [bytes(make(bytearray(b"".join(members)), chance))]


def flip(data: bytes, start: int, end: int, chance: random.Random, sealed: bool = False) -> bytes:
    out = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        if start < min(end, len(out)):
            out[chance.randrange(start, min(end, len(out)))] ^= 1 << chance.randrange(8)
    return seal(out[:512]) + bytes(out[512:]) if sealed else bytes(out)


def flip_padding(data: bytes, chance: random.Random) -> bytes:
    size = int(data[124:135], 8)
    return flip(data, 512 + size, len(data), chance)


def wrong_size(data: bytes, chance: random.Random) -> bytes:
    size = int(data[124:135], 8)
    new = chance.choice(
        [0, 1, size - 1, size + 1, size + 511, size + 512, size + 1024, size + 5120, 10**9, 8**11 - 1, 2**62, 2**63 - 1]
    )
    return header(data[:100].rstrip(b"\0"), new, data[156:157]) + data[512:]


def odd_size(data: bytes, chance: random.Random) -> bytes:
    field = chance.choice(
        [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000001\0", b"0x000000010\0", b"", b"9" * 12]
    )
    return header(data[:100].rstrip(b"\0"), field, data[156:157]) + data[512:]


def swap(members: Members, chance: random.Random) -> Members:
    i, j = chance.randrange(len(members)), chance.randrange(len(members))
    members[i], members[j] = members[j], members[i]
    return members


def shuffle(members: Members, chance: random.Random) -> Members:
    chance.shuffle(members)
    return members


def repeat(members: Members, chance: random.Random) -> Members:
    i, j = sorted((chance.randrange(len(members)), chance.randrange(len(members) + 1)))
    return members[:j] + members[i:j] * chance.randint(1, 2) + members[j:]


def remove(members: Members, chance: random.Random) -> Members:
    del members[chance.randrange(len(members))]
    return members


def same_key(members: Members, chance: random.Random) -> Members:
    """A second sample with the key of one that is there, whole or in part, in front of it, behind it or between its members."""
    number = chance.choice([0, 2, 3, 4])  # those with a png and a txt: a sample may have a caption in json and another in txt
    name = key(number)
    extra = [member(f"{name}.png", picture(100 + number)), member(f"{name}.txt", caption(100 + number).encode())]
    extra = extra[:: chance.choice([1, -1])][: chance.randint(1, 2)]
    for one in extra if chance.random() < 0.5 else [b"".join(extra)]:
        places = [i for i, data in enumerate(members) if data[: len(name) + 1] == name.encode() + b"."]
        at = chance.choice(places) + chance.randint(0, 1)
        members.insert(at, one)
    return members


def named(*names: bytes | str) -> Damage:
    """A whole sample of its own under such a name."""

    def damage(members: Members, chance: random.Random) -> Members:
        name, number = chance.choice(names), chance.randrange(50, 99)
        name = name.encode() if isinstance(name, str) else name
        at = chance.randrange(len(members) + 1)
        return [
            *members[:at],
            member(name + b".png", picture(number)),
            member(name + b".txt", caption(number).encode()),
            *members[at:],
        ]

    return damage


def instead(extension: bytes, *contents: Callable[[], bytes]) -> Damage:
    """Other content in a member of that kind."""

    def damage(members: Members, chance: random.Random) -> Members:
        places = [i for i, data in enumerate(members) if data[:100].rstrip(b"\0").endswith(b"." + extension)]
        if not places:
            return members
        at = chance.choice(places)
        members[at] = member(members[at][:100].rstrip(b"\0"), chance.choice(contents)())
        return members

    return damage


def long_name(name: bytes, kind: bytes = b"L", **fields: object) -> bytes:
    return member(b"././@LongLink", name + b"\0", kind, **fields)


def as_gnu(data: bytes, chance: random.Random) -> bytes:
    """The same member with a long GNU name, or with something wrong about that name."""
    name = data[:100].rstrip(b"\0")
    folder = b"d" * chance.choice([90, 200, 5000])
    good = long_name(folder + b"/" + name)
    wrong = chance.choice([
        good, good + good, good + long_name(b"link", b"K"), good + member("x.dir/", kind=b"5"), long_name(b"link", b"K"),
        long_name(b""), long_name(name, size=1 << 21), long_name(name, size=2**62), long_name(b"\0" + name),
        long_name(b"/".join([name] * 9)),
    ])  # fmt: skip
    return wrong + data


def as_pax(data: bytes, chance: random.Random) -> bytes:
    name, size = data[:100].rstrip(b"\0"), int(data[124:135], 8)
    records = chance.choice([
        record("path", name), record("path", b"\xff\0" + name), record("path", b""), record("path", b"../" + name),
        record("size", b"%d" % size), record("size", b"9" * 17), record("size", b"9" * 40), record("size", b"-1"),
        record("size", b""), record("comment", b"x" * 3000), record("GNU.sparse.major", b"1"), record("linkpath", b"/etc/passwd"),
        record("hdrcharset", b"BINARY"), b"12 path=a", b"9999999999 path=x\n", b"0 \n", b"\n" * 40, b"-5 a=b\n",
        b"7 a=b\n" + b"\0" * 20,
    ])  # fmt: skip
    return member("PaxHeaders/x", records, chance.choice([b"x", b"x", b"g"])) + data


TYPES = [bytes([kind]) for kind in b"\x00123567LKxgSMVDZ\xff"]


def another_type(data: bytes, chance: random.Random) -> bytes:
    return seal(bytearray(data[:156] + chance.choice(TYPES) + data[157:512])) + data[512:]


def link(chance: random.Random) -> bytes:
    name = f"{key(chance.randrange(COUNT))}.{chance.choice(['png', 'txt', 'jpg'])}"
    to = chance.choice([f"{key(0)}.png".encode(), b"../x", b"/etc/passwd", b""])
    return member(name, kind=chance.choice([b"1", b"2"]), link=to, size=chance.choice([0, 0, 700]))


def device(chance: random.Random) -> bytes:
    name = f"{key(chance.randrange(COUNT))}.{chance.choice(['png', 'txt'])}"
    return member(name, kind=chance.choice([b"3", b"4", b"5", b"6"]), size=chance.choice([0, 0, 512]))


def sparse(chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return member("sparse.png", bytes(512), b"S")
    return member("x", record("GNU.sparse.major", b"1"), b"x") + member("sparse.png", bytes(700))


DAMAGES: dict[str, Damage] = {
    "none": lambda members, chance: members,
    "cut short": whole(lambda data, chance: data[: chance.randrange(1, len(data))]),
    "flips anywhere": whole(lambda data, chance: flip(data, 0, len(data), chance)),
    "flips in a header": replace(lambda data, chance: flip(data, 0, 512, chance)),
    "flips in a sealed header": replace(lambda data, chance: flip(data, chance.choice([0, 100, 156, 345]), 512, chance, True)),
    "flips in data": replace(lambda data, chance: flip(data, 512, len(data), chance)),
    "flips in padding": replace(flip_padding),
    "another type": replace(another_type),
    "wrong size": replace(wrong_size),
    "size that is no number": replace(odd_size),
    "swapped": swap,
    "shuffled": shuffle,
    "repeated": repeat,
    "removed": remove,
    "key that is there": same_key,
    "upper case": lambda members, chance: same_key([data.replace(b".png", b".PNG", 1) for data in members], chance),
    "names that lead out": named("../k", "a/../../k", "/k", "/etc/k", "..", "a/..", "//k", "./../k"),
    "odd names": named(
        "a.b",
        "a..b",
        ".k",
        "",
        " ",
        "a b",
        "a\nb",
        b"\xff\xfe",
        "./k",
        "a//b",
        "-k",
        "k" * 96,
        "C:\\k",
        "\u202ek",
        "k/",
        "a.b/c.d",
    ),
    "links": insert(link),
    "devices": insert(device),
    "sparse": insert(sparse),
    "GNU names": replace(as_gnu),
    "PAX records": replace(as_pax),
    "zeros between": insert(lambda chance: bytes(512 * chance.randint(1, 4))),
    "block lost": whole(lambda data, chance: data[: (at := 512 * chance.randrange(len(data) // 512))] + data[at + 512 :]),
    "block twice": whole(
        lambda data, chance: data[: (at := 512 * chance.randrange(len(data) // 512))] + data[at : at + 512] + data[at:]
    ),
    "noise": whole(lambda data, chance: data[: (at := chance.randrange(len(data)))] + chance.randbytes(700) + data[at + 700 :]),
    "empty members": replace(lambda data, chance: member(data[:100].rstrip(b"\0"))),
    "picture": instead(
        b"png",
        lambda: png(60_000, 60_000, bytes(100)),
        lambda: png(0, 5, b""),
        lambda: png(9, 7, bytes(3)),
        lambda: png(9, 7, bytes(28 * 7), b"\0\x10\0\0zTXt"),
        lambda: picture(3)[:40],
        lambda: b"GIF89a" + bytes(40),
        lambda: b"II*\0\x08\0\0\0\xff\xff" + bytes(60),
        lambda: b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 40,
        lambda: b"BM" + b"\xff" * 60,
        lambda: b"\xff\xd8\xff" + bytes(60),
        lambda: b"<svg/>",
    ),
    "caption": instead(
        b"txt",
        lambda: b"long " * 100_000,
        lambda: b"\xff\xfe\x00",
        lambda: b"\xed\xa0\x80",
        lambda: b"\xc0\x80",
        lambda: b"",
        lambda: b"\0" * 50,
        lambda: "\ufeffmarked".encode(),
        lambda: "wide".encode("utf-16"),
    ),
    "json": instead(
        b"json",
        lambda: b"[" * 100_000,
        lambda: b'{"caption":' * 50_000,
        lambda: b'{"caption": ' + b"9" * 100_000 + b"}",
        lambda: b'{"caption": "\\ud800"}',
        lambda: b'{"caption": null}',
        lambda: b'{"caption": ["a"]}',
        lambda: b'{"caption": NaN}',
        lambda: b'{"caption": "a", "caption": "b"}',
        lambda: b"",
        lambda: b"null",
        lambda: '{"caption": "x"}'.encode("utf-16"),
        lambda: b'{"caption": "\xff"}',
    ),
}

SECOND = ["cut short", "flips anywhere", "zeros between", "noise", "links", "devices"]
ALONE = ["key that is there", "upper case"]  # with half of a second sample lost, the other would be taken for a part of the first


def variant(number: int) -> tuple[str, bytes]:
    """The names of its damages and the archive."""
    chance = random.Random(number)
    members = [part for i in range(COUNT) for part in sample(i, chance)] + [END]
    names = [list(DAMAGES)[number % len(DAMAGES)]]
    if chance.random() < 0.25 and names[0] not in ALONE:
        names.append(chance.choice(SECOND))
    for name in names:
        members = DAMAGES[name](members, chance)
    return " and ".join(names), b"".join(members)


@contextlib.contextmanager
def watched(what: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"{what} takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def keys_by_tarfile(content: bytes) -> list[str]:
    """Of the samples, as Python's own reader sees the archive."""
    keys: list[str] = []
    with (
        contextlib.suppress(tarfile.ReadError),  # when the padding of the last member is missing
        tarfile.open(fileobj=io.BytesIO(content), errors="surrogateescape") as tar,
    ):
        for info in tar:
            folder, slash, base = info.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if info.isreg() and not info.issparse() and stem not in ("", "sparse") and dot and extension:
                name = folder + slash + stem
                if not keys or keys[-1] != name:
                    keys.append(name)
    return [name.encode(errors="surrogateescape").decode("utf-8", "backslashreplace") for name in keys]


def fields(table: object) -> list[object]:
    arrays = [getattr(table, name).tolist() for name in ("offsets", "sizes", "extension_ids", "sample_ends", "key_ends")]
    return arrays + [getattr(table, name) for name in ("keys", "extensions", "file_size", "problem", "complete", "index")]


def check(number: int, folder: Path) -> str:
    """Runs one variant through everything that reads shards; -> what came of it, for the figures."""
    name, content = variant(number)
    path = folder / f"variant{number}.tar"
    path.write_bytes(content)
    native, plain = ((_host or _tar).load([str(path)], [""], 1)[0], _tar.load([str(path)], [""], 1)[0])
    assert fields(native) == fields(plain)
    report = verify(str(path), threads=1).shards[0]
    try:
        loader = make_loader(str(path), SPEC, Characters(), 4, train=False, backend="plain", threads=1)
    except UserError as error:
        assert path.name in str(error)
        assert report.problem and name != "none"
        return "refused"
    opened = ShardSet(str(path))  # now by its index
    keys = [opened.key(i) for i in range(len(opened))]
    theirs = keys_by_tarfile(content)
    # Python's reader takes a mode that is no number for the end of the archive, and of two long names for one member the
    # first; GNU tar takes the last, and so do we.
    assert keys == theirs or ("sealed" in name and keys[: len(theirs)] == theirs) or "GNU names and" in name
    assert report.samples == len(opened) and report.problem in ("", shards.NOT_CLOSED)
    pairs: list[tuple[int | None, int | None]] = []
    indices: list[int] = []
    try:
        for batch in loader:
            indices += batch["index"].tolist()
            assert batch["key"] == [keys[i] for i in batch["index"].tolist()]
            assert torch.isfinite(batch["image"]).all()
            pairs += zip(
                map(number_of_picture, batch["image"]), map(number_of_caption, map(caption_of, batch["text"])), strict=True
            )
    except UserError as error:
        assert path.name in str(error) and "too few samples" in str(error) and not pairs
        return "nothing to hand out"
    for of_picture, of_caption in pairs:
        assert of_picture is None or of_caption is None or of_picture == of_caption, f"{of_picture} with {of_caption}"
    left_out = [i for i in range(len(keys)) if i not in indices]
    assert indices == sorted(set(indices))
    assert loader.skipped.keys() == {f"{path.name}:{keys[i]}" for i in left_out}
    assert all(loader.skipped.values())
    wrong = {wrong_key for wrong_key, problem in report.damaged if not problem.startswith("its key is also in")}
    assert wrong == {keys[i] for i in left_out}
    sound = sum(None not in pair for pair in pairs)
    if name == "none":
        assert sound == COUNT - 1 and len(pairs) == COUNT  # a JPEG's colours are not exact
    return "whole" if sound == len(pairs) - any(pair[0] is None for pair in pairs) and not left_out else "in part"


@pytest.mark.parametrize(
    ("key", "extra", "reason"),
    [
        ("../a", b"", "leads out of the shard"),
        ("a/../b", b"", "leads out of the shard"),
        ("/etc/a", b"", "leads out of the shard"),
        ("a", member("a.txt", caption(9).encode()), "has the member txt twice"),
        ("a", member("a.PNG", picture(9)), "has the member png twice"),
        ("./a..b/c", b"", ""),
        ("a", member("a.txt", kind=b"2", link=b"/etc/passwd") + member("a.png", kind=b"1", link=b"b.png"), ""),
        ("a", member("a.txt", kind=b"3") + member("a.png", kind=b"6") + member("a.png/", kind=b"5"), ""),
    ],
)
def test_samples_that_are_left_out_for_their_names(tmp_path: Path, key: str, extra: bytes, reason: str) -> None:
    """And links, devices and folders among a sample's members, which are passed over."""
    pair = member(f"{key}.png", picture(7)) + member(f"{key}.txt", caption(7).encode())
    other = member("other.png", picture(8)) + member("other.txt", caption(8).encode())
    (tmp_path / "a.tar").write_bytes(pair + extra + other + END)
    loader = make_loader(str(tmp_path), SPEC, Characters(), 4, train=False, backend="plain", threads=1)
    (batch,) = loader
    assert list(map(number_of_picture, batch["image"])) == list(map(number_of_caption, map(caption_of, batch["text"])))
    assert len(batch["key"]) == (1 if reason else 2) and batch["key"][-1] == "other"
    assert len(loader.skipped) == bool(reason) and all(reason in found for found in loader.skipped.values())
    problems = [problem for _, problem in verify(str(tmp_path)).shards[0].damaged]
    assert len(problems) == bool(reason) and all(reason in problem for problem in problems)


@pytest.mark.parametrize("text", [b'{"caption": "\\ud800"}', b"[" * 100_000, b'{"caption":' * 100_000])
def test_json_that_is_no_caption(tmp_path: Path, text: bytes) -> None:
    content = member("a.png", picture(7)) + member("a.json", text)
    (tmp_path / "a.tar").write_bytes(content + member("b.png", picture(8)) + member("b.txt", caption(8).encode()) + END)
    loader = make_loader(str(tmp_path), SPEC, Characters(), 4, train=False, backend="plain", threads=1)
    assert [batch["key"] for batch in loader] == [["b"]]
    assert list(loader.skipped) == ["a.tar:a"]
    assert [name for name, _ in verify(str(tmp_path)).shards[0].damaged] == ["a"]


OUTCOMES: Counter[str] = Counter()


@pytest.mark.parametrize("first", range(0, VARIANTS, PART))
def test_damaged_shards(tmp_path: Path, first: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    wrong = []
    for number in range(first, min(first + PART, VARIANTS)):
        what = f"variant {number} ({variant(number)[0]})"
        try:
            with watched(what):
                OUTCOMES[check(number, tmp_path)] += 1
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    assert not wrong, "\n".join(wrong)


def test_variants_meet_every_outcome() -> None:
    assert {"refused", "whole", "in part"} <= OUTCOMES.keys() or VARIANTS < 150
    print(dict(OUTCOMES))
