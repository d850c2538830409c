"""What a build reads: files under one root, and the parts of samples made of them.

Nothing outside the root is ever read: a path that leads out of it, by `..` or by a link, damages its sample alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from vlpfast.data.pictures import DamagedSample, decode_rgb, picture_size
from vlpfast.types import UserError

LARGEST = 2 << 30  # bytes of one input, which is held in memory
_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"BM", "bmp"))


@dataclass(frozen=True)
class Options:
    """How sources are read; what a kind has no use for is refused by `build`."""

    captions: bool = True  # an input without a caption is skipped
    max_caption: int | None = None  # characters; None: the kind's own
    decode: bool = True  # pictures are decoded to see whether they are whole
    template: str = "a photo of a {}"  # the caption of a class
    picture: str = "image"  # columns of a table
    caption: str = "caption"  # column of a table, or field of a line of text
    key: str = ""  # column; empty: file and row
    drop: tuple[str, ...] = ()  # columns that do not go into the JSON
    pictures: str = ""  # the folder that paths in tables and documents start from; empty: that of the table
    min_similarity: float = 0.0  # pictures of an MMC4 document below it are left out
    points: int = 8192  # points drawn from a mesh
    labels: tuple[str, ...] = ()  # names of volumes, names of their label maps, {} for what they share; empty: none have any
    reports: str = ""  # a table of reports of DICOM series: `key`, empty: the column `by`, says of which, `caption` what
    by: str = "StudyInstanceUID"  # or another of tables.IDENTIFIERS
    only: str = ""  # the one file of the root that is read


class Task(NamedTuple):
    """One input. `source`: its name in messages. `payload`: what `make` needs, small unless it is a row of a table."""

    source: str
    payload: Any


class DamagedParts(DamagedSample):
    """Several samples of one input cannot be used, each for a reason of its own: `args`."""

    def __str__(self) -> str:
        return "; ".join(self.args)


# --- files -------------------------------------------------------------------------------------------------------------


def files(root: str, only: str = "") -> Iterator[str]:
    """Files under `root` as relative paths in a fixed order: those of a folder by name, then its folders. Hidden ones and links
    to folders are left out. only: this one alone."""
    if only:
        yield only
        return

    def refuse(error: OSError) -> None:
        raise UserError(f"build: {error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def shown(path: str) -> str:
    """A path as text: bytes that are not UTF-8 as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def inside(root: str, path: str) -> str:
    """The regular file that `path` (relative to root) leads to. Raises DamagedSample if it leads out of `root`."""
    try:
        real = os.path.realpath(os.path.join(root, path))
        if os.path.isabs(path) or os.path.commonpath([root, real]) != root:
            raise DamagedSample(f"{shown(path)} leads out of {shown(root)}")
        status = os.stat(real)
    except ValueError as error:
        raise DamagedSample(f"{path!r} is no path: {error}") from error
    except OSError as error:
        raise DamagedSample(f"{shown(path)} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DamagedSample(f"{shown(path)} is not a regular file")
    return real


def opened(root: str, path: str) -> BinaryIO:
    """A table or a file of lines: without it there is nothing to go on with."""
    try:
        return open(inside(root, path), "rb")
    except (DamagedSample, OSError) as error:
        raise UserError(f"build: {os.path.join(root, shown(path))} cannot be read: {error}") from error


def read(root: str, path: str) -> bytes:
    """Raises DamagedSample, also for what `inside` refuses."""
    real = inside(root, path)
    try:
        with open(real, "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > LARGEST:
                raise DamagedSample(f"{shown(path)} has {size} bytes, more than {LARGEST}")
            return file.read()
    except OSError as error:
        raise DamagedSample(f"{shown(path)} cannot be read: {error.strerror}") from error


def survey(root: str, only: str = "") -> tuple[str, Counter[str]]:
    """-> a fingerprint of the names and lengths of the files under `root`, and how many files have which extension."""
    digest = hashlib.sha256()
    extensions: Counter[str] = Counter()
    for path in files(root, only):
        digest.update(os.fsencode(path) + b"\0%d\0" % os.lstat(os.path.join(root, path)).st_size)
        extensions[extension(path) or "(none)"] += 1
    return digest.hexdigest()[:32], extensions


# --- parts of a sample ---------------------------------------------------------------------------------------------------


def picture(content: bytes, options: Options) -> tuple[str, bytes]:
    """-> extension by content, content. Raises DamagedSample for what the loaders would leave out."""
    kind = next((name for magic, name in _MAGIC if content.startswith(magic)), "")
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        kind = "webp"
    picture_size(content)
    if not kind:
        raise DamagedSample("the picture is none of JPEG, PNG, WebP and BMP")
    if options.decode:
        decode_rgb(content)
    return kind, content


def text(content: bytes | str, most: int) -> str:
    """Raises DamagedSample for what is not UTF-8, empty, or longer than `most` characters."""
    try:
        caption = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        caption.encode()
    except UnicodeError as error:
        raise DamagedSample(f"the caption is not UTF-8: {error}") from error
    caption = caption.strip()
    if not caption:
        raise DamagedSample("the caption is empty")
    if len(caption) > most:
        raise DamagedSample(f"the caption has {len(caption)} characters, more than {most} (--max-caption)")
    return caption


def parse(content: bytes | str) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedSample(f"the json cannot be parsed: {error}") from error
    if not isinstance(record, dict):
        raise DamagedSample(f"the json is a {type(record).__name__}, expected an object")
    return record


def dump(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps({name: _plain(name, value) for name, value in record.items()}, ensure_ascii=False).encode()
    except (UnicodeError, RecursionError) as error:
        raise DamagedSample(f"the json cannot be written: {error}") from error


def _plain(name: str, value: Any) -> Any:
    """JSON has no number that is none, no dates and no bytes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, bytes):
        raise UserError(f"build: the column {name!r} holds bytes, which JSON cannot: leave it out with --drop {name}")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def sidecars(root: str, path: str, notes: tuple[str, str], most: int, captions: bool) -> tuple[dict[str, bytes], dict[str, Any]]:
    """-> the member txt, if there is a caption, and the record of the json beside it."""
    record = parse(read(root, notes[1])) if notes[1] else {}
    caption = read(root, notes[0]) if notes[0] else record.get("caption")
    if caption is None and captions:
        raise DamagedSample('no caption: neither a .txt beside it nor "caption" in a .json (--no-captions takes it without)')
    if caption is None:
        return {}, record
    if not isinstance(caption, (bytes, str)):
        raise DamagedSample(f'the "caption" in the json is a {type(caption).__name__}, expected a text')
    return {"txt": text(caption, most).encode()}, record


def with_notes(root: str, extensions: tuple[str, ...]) -> Iterator[Task]:
    """Files of these extensions with the .txt and .json of the same name."""
    ordered = files(root)
    for folder, group in itertools.groupby(ordered, key=os.path.dirname):
        names = [os.path.basename(path) for path in group]
        notes: dict[str, str] = {}  # stem.txt -> the name as it is
        for name in names:
            if extension(name) in ("txt", "json"):
                notes.setdefault(f"{os.path.splitext(name)[0]}.{extension(name)}", name)
        for name in names:
            if extension(name) in extensions:
                stem = os.path.splitext(name)[0]
                found = (notes.get(f"{stem}.{kind}", "") for kind in ("txt", "json"))
                path = os.path.join(folder, name)
                yield Task(shown(path), (path, *(os.path.join(folder, note) if note else "" for note in found)))


def stem_of(path: str) -> str:
    return os.path.splitext(path)[0]


def linked(root: str, note: str, path: str, options: Options) -> bytes:
    """A file that a table or document names."""
    if re.match(r"[a-z][a-z0-9+.-]*://", path, re.IGNORECASE):
        raise DamagedSample(f"{path[:100]} is an address: download it beforehand, for instance with img2dataset")
    if options.pictures:
        return read(options.pictures, path)
    return read(root, os.path.join(os.path.dirname(note), path) if not os.path.isabs(path) else path)
