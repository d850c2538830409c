"""Tar shards and their index files in plain Python: the twin of csrc/host, used where that is not built.

Format of an index: DALI's wds2idx v1.2. A first line `v1.2 SAMPLES`, then a line for each sample with `extension offset size
name` for each of its members. It has no way to write a name with white space: such a shard's index stays in memory.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

_BLOCK = 512
_LONGEST_EXTENDED = 1 << 20  # bytes of a long-name or PAX record; a larger one is damage


@dataclass
class Shard:
    """What one tar holds: M members in S samples; of a damaged one, what comes before the damage."""

    offsets: np.ndarray  # [M] int64 byte position of each member's data
    sizes: np.ndarray  # [M] int64
    extension_ids: np.ndarray  # [M] int32 position in `extensions`
    extensions: list[str]  # lower case
    sample_ends: np.ndarray  # [S] int64 members up to and with each sample
    keys: bytes  # all keys, one after the other
    key_ends: np.ndarray  # [S] int64
    file_size: int
    problem: str  # empty: the archive is sound
    complete: bool  # ends with the two zero blocks that close an archive
    index: bytes | None  # what its index file should hold; None when the one beside it is right already or none can be written


@dataclass
class Members:
    """The members of an archive that belong to samples, in its order."""

    names: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, name: bytes, offset: int, size: int) -> None:
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)


class _Damage(Exception):
    pass


def load(tars: Sequence[str], indexes: Sequence[str], threads: int) -> list[Shard]:
    """The table of each tar, from the index file where that fits, else from the archive itself. OSError: a tar cannot be read."""
    return [_load(tar, index) for tar, index in zip(tars, indexes, strict=True)]


def _load(tar: str, index: str) -> Shard:
    with open(tar, "rb") as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        members = parse_index(_read_index(index, status.st_mtime_ns))
        if members is not None and (complete := _fits(members, file, size)) is not None:
            return _table(members, size, "", complete, None)
        members = Members()
        try:
            complete = _scan(file, size, 0, members)
        except _Damage as damage:
            last = _show(members.names[-1]) if members.names else "none"
            return _table(members, size, f"{damage}; last whole member: {last}", False, None)
        return _table(members, size, "", complete, index_text(members))


def _read_index(path: str, oldest: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read() if os.fstat(file.fileno()).st_mtime_ns >= oldest else b""
    except OSError:
        return b""


def _split(name: bytes) -> tuple[bytes, bytes] | None:
    """Key and extension of a member; None for one that belongs to no sample: a hidden file, or a name without an extension."""
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    return None if dot <= base or dot == len(name) - 1 else (name[:dot], name[dot + 1 :])


def index_text(members: Members) -> bytes | None:
    """The index file for these members; None if there are none or a name has white space."""
    lines: list[bytes] = []
    previous = None
    for name, offset, size in zip(members.names, members.offsets, members.sizes, strict=True):
        if re.search(rb"\s", name):
            return None
        key, extension = _split(name)
        member = b"%s %d %d %s" % (extension, offset, size, name)
        if key == previous:
            lines[-1] += b" " + member
        else:
            lines.append(member)
        previous = key
    return b"v1.2 %d\n" % len(lines) + b"".join(line + b"\n" for line in lines) if lines else None


def parse_index(text: bytes) -> Members | None:
    """Members of an index file; None if it is not one of version 1.2 or contradicts itself."""
    lines = text.split(b"\n")
    head = lines[0].split(b" ")
    if len(head) != 2 or head[0] != b"v1.2" or head[1] != b"%d" % (len(lines) - 2) or lines[-1] or len(lines) < 3:
        return None
    members = Members()
    previous = None
    for line in lines[1:-1]:
        words = line.split(b" ")
        for i in range(0, len(words), 4):
            if i + 4 > len(words):
                return None
            extension, offset, size, name = words[i], _decimal(words[i + 1]), _decimal(words[i + 2]), words[i + 3]
            parts = _split(name)
            if parts is None or parts[1] != extension or (parts[0] == previous) != (i > 0) or offset is None or size is None:
                return None
            previous = parts[0]
            members.add(name, offset, size)
    return members


def _decimal(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) <= 18 else None


def _fits(members: Members, file: BinaryIO, size: int) -> bool | None:
    """Whether the archive is complete, for an index that fits it; None for one that does not: members outside the file, other
    members at the first or the last place, or more members behind the last. Names over 100 bytes are all looked at, because
    DALI's tool places those of GNU archives wrongly."""
    end = 0
    for i, (name, offset, length) in enumerate(zip(members.names, members.offsets, members.sizes, strict=True)):
        if offset < end + _BLOCK or offset % _BLOCK or offset > size or length > size - offset:
            return None
        end = offset + length
        if i in (0, len(members.names) - 1) or len(name) > 100:
            header = _parse_header(_read(file, offset - _BLOCK, _BLOCK))
            if header is None or header[1] not in b"07\0" or (length < 1 << 33 and header[2] != length):
                return None
            if len(name) <= 100 and name.isascii() and header[0] != name:
                return None
    rest = Members()
    try:
        complete = _scan(file, size, (end + _BLOCK - 1) // _BLOCK * _BLOCK, rest)
    except _Damage:
        return None
    return None if rest.names else complete


def _scan(file: BinaryIO, size: int, at: int, members: Members) -> bool:
    """Appends the members of samples from byte `at` on; whether the archive ends with its two zero blocks. Raises _Damage."""
    always: dict[bytes, bytes | int] = {}  # PAX records for all members to come
    once: dict[bytes, bytes | int] = {}  # for the next one
    long_name: bytes | None = None
    while at < size:
        block = _read(file, at, _BLOCK)
        if not any(block):
            rest = _read(file, at + _BLOCK, _BLOCK)
            if any(rest):
                raise _Damage(f"damaged header at byte {at}")
            return len(block) == len(rest) == _BLOCK
        if len(block) < _BLOCK and at > 0:
            raise _Damage(f"cut short inside the header at byte {at}")
        header = _parse_header(block)
        if header is None:
            raise _Damage("not a tar archive" if at == 0 else f"damaged header at byte {at}")
        name, kind, length = header
        data = at + _BLOCK
        while kind in b"S" and block[482 if data == at + _BLOCK else 504]:  # the map of an old GNU sparse file goes on
            block = _read(file, data, _BLOCK)
            if len(block) < _BLOCK:
                raise _Damage(f"cut short inside the header at byte {at}")
            data += _BLOCK
        if kind in b"07\0" and any(record.startswith(b"GNU.sparse.") for record in once):
            kind = b"S"  # its data is not the file's bytes
        if kind in b"123456":
            length = 0
        elif kind not in b"xgLK" and (record := once.get(b"size", always.get(b"size"))) is not None:
            length = record
        if length > size - data:
            raise _Damage(f"cut short inside the member at byte {at}")
        at = data + (length + _BLOCK - 1) // _BLOCK * _BLOCK
        if kind in b"xgLK":
            if length > _LONGEST_EXTENDED:
                raise _Damage(f"damaged header at byte {data - _BLOCK}")
            content = _read(file, data, length)
            if kind == b"L":
                long_name = content.split(b"\0", 1)[0]
            elif kind in b"xg":
                records = _pax(content)
                if records is None:
                    raise _Damage(f"damaged header at byte {data - _BLOCK}")
                (once if kind == b"x" else always).update(records)
            continue
        name = once.get(b"path", long_name if long_name is not None else always.get(b"path", name))
        if kind in b"07\0" and _split(name) is not None:
            members.add(name, data, length)
        once.clear()
        long_name = None
    if once or long_name is not None:
        raise _Damage(f"cut short after the header at byte {at - _BLOCK}")
    return False


def _read(file: BinaryIO, at: int, length: int) -> bytes:
    file.seek(at)
    return file.read(length)


def _parse_header(block: bytes) -> tuple[bytes, bytes, int] | None:
    """Name, type and size of a header block; None if its checksum or its size is wrong."""
    stated = _number(block[148:156])
    if len(block) < _BLOCK or stated is None:
        return None
    summed = sum(block) - sum(block[148:156]) + 8 * 32
    signed = summed - 256 * sum(byte > 127 for byte in block[:148] + block[156:])  # what some old programs wrote
    size = _number(block[124:136])
    if stated not in (summed, signed) or size is None:
        return None
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name), block[156:157], size


def _number(text: bytes) -> int | None:
    if text[:1] == b"\x80":
        value = int.from_bytes(text[1:], "big")
        return value if value < 1 << 63 else None
    digits = text.strip(b" \0")
    if any(byte not in b"01234567" for byte in digits):
        return None
    return int(digits or b"0", 8)


def _pax(content: bytes) -> dict[bytes, bytes | int] | None:
    """The records of a PAX header that matter here: path, size, and that there is a sparse map; None if they are malformed."""
    records: dict[bytes, bytes | int] = {}
    while content:
        space = content.find(b" ", 0, 10)
        length = _decimal(content[: max(space, 0)])
        if length is None or length > len(content):
            return None
        record, content = content[:length], content[length:]
        name, equals, value = record[space + 1 :].partition(b"=")
        if not equals or value[-1:] != b"\n":
            return None
        if name == b"size":
            if (size := _decimal(value[:-1])) is None:
                return None
            records[name] = size
        elif name == b"path" or name.startswith(b"GNU.sparse."):
            records[name] = value[:-1]
    return records


def _table(members: Members, file_size: int, problem: str, complete: bool, index: bytes | None) -> Shard:
    ids: dict[str, int] = {}
    extension_ids, sample_ends, keys = [], [], []
    for i, name in enumerate(members.names):
        key, extension = _split(name)
        if not keys or key != keys[-1]:
            keys.append(key)
            sample_ends.append(i)
        sample_ends[-1] = i + 1
        extension_ids.append(ids.setdefault(_lower(extension), len(ids)))
    return Shard(
        np.array(members.offsets, np.int64),
        np.array(members.sizes, np.int64),
        np.array(extension_ids, np.int32),
        list(ids),
        np.array(sample_ends, np.int64),
        b"".join(keys),
        np.cumsum([len(key) for key in keys], dtype=np.int64),
        file_size,
        problem,
        complete,
        index,
    )


def _lower(extension: bytes) -> str:
    return _show(extension.lower())


def _show(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


class Reader:
    """Byte ranges of many files. Keeps up to `max_open` of them open."""

    def __init__(self, paths: Sequence[str], max_open: int) -> None:
        self._paths, self._max_open = list(paths), max_open
        self._open: dict[int, BinaryIO] = {}
        self._lock = threading.Lock()

    def read(self, files: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, threads: int) -> list[np.ndarray]:
        """files, offsets, sizes: int64 [N]. N uint8 arrays; OSError with the path where a range cannot be read whole."""
        with self._lock:
            return [self._one(*where) for where in zip(files.tolist(), offsets.tolist(), sizes.tolist(), strict=True)]

    def _one(self, file: int, offset: int, size: int) -> np.ndarray:
        path = self._paths[file]
        if (handle := self._open.pop(file, None)) is None:
            handle = open(path, "rb", buffering=0)  # noqa: SIM115 (open until others push it out)
            while len(self._open) >= self._max_open:
                self._open.pop(next(iter(self._open))).close()
        self._open[file] = handle  # at the end: the one used last
        out = np.empty(size, np.uint8)
        handle.seek(offset)
        done = 0
        while done < size:
            got = handle.readinto(memoryview(out)[done:])
            if not got:
                raise OSError(5, f"the file ends {size - done} bytes before the end of the range at byte {offset}", path)
            done += got
        return out
