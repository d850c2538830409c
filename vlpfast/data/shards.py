"""WebDataset shards: writing them, finding them, reading any sample of them, checking them.

A shard is a tar; the members of a sample follow each other and share their key: the path up to the first dot of the file name.
What comes after that dot, in lower case, says what the member is (`jpg`, `txt`, `json`, ...). Members without a dot, hidden
files, folders, links, devices and sparse files belong to no sample: they are passed over. Nothing is ever unpacked; a sample
whose name is absolute or has a part `..` is left out all the same, and so is one that has a member twice, since nobody can tell
which of the two goes with the rest (ShardSet.problem).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from vlpfast.data import _tar
from vlpfast.data.pictures import DamagedSample, decode_rgb, picture_size
from vlpfast.types import UserError

_log = logging.getLogger(__name__)

try:
    from vlpfast import _host as _native
except ImportError as error:
    _native = _tar
    _log.warning("the native shard reader is not built (%s): shards are read in plain Python, slower", error)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov")
AUDIO_EXTENSIONS = ("wav", "flac", "ogg", "opus", "mp3")

NOT_CLOSED = "lacks the two zero blocks at its end: it may have been cut short between two members"
_MAX_OPEN = 256  # descriptors that one ShardSet holds at most


def expand(patterns: str | Sequence[str]) -> list[str]:
    """The shards that the patterns name, in their order, each once: paths, globs (sorted), folders (every *.tar in them), and all
    of these with braces (`{000..009}`, `{a,b}`). Raises UserError for a pattern that matches nothing and for an empty file."""
    found = _match(patterns)
    for path in found:
        try:
            empty = os.path.getsize(path) == 0
        except OSError as error:
            raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
        if empty:
            raise UserError(f"shard {path} is empty (0 bytes)")
    return found


def _match(patterns: str | Sequence[str]) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise UserError("no shards: the list of patterns is empty")
    found: dict[str, None] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"patterns: expected strings, got {pattern!r}")
        literal = os.path.expanduser(pattern)
        for one in [literal] if os.path.exists(literal) else _braces(literal):
            if os.path.isdir(one):
                matches = sorted(glob.glob(os.path.join(glob.escape(one), "*.tar")))
                if not matches:
                    raise UserError(f"no shards: the folder {one} holds no .tar file")
            else:
                matches = [one] if os.path.exists(one) else sorted(glob.glob(one, recursive=True))
                if not matches:
                    raise UserError(f"no shards: {one} matches no file" + (f" (from {pattern})" if one != pattern else ""))
            found.update(dict.fromkeys(map(os.path.normpath, matches)))
    return list(found)


def _braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    if words is not None:
        choices = words.split(",")
    elif int(first) > int(last):
        raise UserError(f"pattern {pattern}: the range {match.group()} runs backwards")
    else:
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def index_path(shard: str) -> str:
    """Where the index of a shard lies: NAME.idx beside NAME.tar."""
    return os.path.splitext(shard)[0] + ".idx"


def _write_aside(path: str, content: bytes) -> None:
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


class ShardWriter:
    """Writes samples into FOLDER/PREFIX-000000.tar and so on, each with its index. A shard appears under its name only when it is
    whole. The bytes depend on nothing but what is written. As a context manager it finishes the last shard, or drops it when an
    exception passes through. `shards`: the paths of those that are finished. go_on: behind the shards that are there."""

    def __init__(
        self, folder: str | os.PathLike[str], prefix: str, *, samples_per_shard: int = 1000, go_on: bool = False
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard: expected at least 1, got {samples_per_shard}")
        if not re.fullmatch(r"[^\s/.{}*?\[\]]+", prefix):
            raise ValueError(f"prefix: expected a name without white space and / . {{ }} * ? [ ], got {prefix!r}")
        self.folder, self.prefix, self.samples_per_shard = os.fspath(folder), prefix, samples_per_shard
        self.shards: list[str] = []
        self._file: io.BufferedWriter | None = None
        os.makedirs(self.folder, exist_ok=True)
        old = sorted(glob.glob(os.path.join(glob.escape(self.folder), f"{prefix}-[0-9]*.tar")))
        if go_on:
            self.shards = old
        elif old:
            raise UserError(f"{self.folder} already holds {len(old)} shards named {prefix}: remove them or take another folder")

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """key: relative path without a dot in its last part, used once in a shard. members: extension (lower case, no leading
        dot) to content, stored in their order. Neither may hold white space, which an index cannot express."""
        if not re.fullmatch(r"(?:[^\s/]+/)*[^\s/.]+", key):
            raise ValueError(f"key: expected a relative path without white space whose last part has no dot, got {key!r}")
        if not members:
            raise ValueError(f"members: sample {key!r} has none")
        for extension, content in members.items():
            if not re.fullmatch(r"(?!\.)[^\s/A-Z]*[^\s/.A-Z]", extension):
                raise ValueError(f"members: expected lower-case extensions like 'jpg', got {extension!r} in sample {key!r}")
            if not isinstance(content, bytes):
                raise TypeError(f"members: expected bytes for {extension!r} in sample {key!r}, got {type(content).__name__}")
        if self._file is None:
            self._path = os.path.join(self.folder, f"{self.prefix}-{len(self.shards):06d}.tar")
            self._file = open(f"{self._path}.{os.getpid()}.tmp", "wb")  # noqa: SIM115 (open until the shard is full)
            self._keys: set[str] = set()
            self._members = _tar.Members()
        if key in self._keys:
            raise ValueError(f"key: {key!r} was written to this shard before")
        self._keys.add(key)
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")  # time, user and group are 0, the mode is 0644
            info.size = len(content)
            self._file.write(info.tobuf(tarfile.PAX_FORMAT))
            self._members.add(info.name.encode(), self._file.tell(), info.size)
            self._file.write(content)
            self._file.write(bytes(-info.size % tarfile.BLOCKSIZE))
        if len(self._keys) == self.samples_per_shard:
            self.close()

    def close(self) -> None:
        """Finishes the shard that is being written, if there is one."""
        if self._file is None:
            return
        with self._file as file:
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.flush()
            os.fsync(file.fileno())
        self._file = None
        os.replace(file.name, self._path)
        self.shards.append(self._path)
        _write_aside(index_path(self._path), _tar.index_text(self._members))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()
            os.unlink(self._file.name)
            self._file = None


class ShardSet:
    """Every sample of a set of shards, by number: the shards in the order of `expand`, the samples in the order of each shard.

    Opens the shards' index files, makes those that are missing or do not fit their tar (in parallel), and keeps one table in
    numpy arrays: 16 bytes and the key for a sample, 20 bytes for a member. Raises UserError for a shard that is truncated,
    damaged, unreadable or without samples."""

    def __init__(self, patterns: str | Sequence[str], *, threads: int = 4) -> None:
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        shards = expand(patterns)
        tables = _load(shards, threads)
        problems = ((path, _problem(path, table)) for path, table in zip(shards, tables, strict=True))
        if wrong := [f"shard {path} {problem}" for path, problem in problems if problem]:
            raise UserError(wrong[0] + (f" (and {len(wrong) - 1} more shards are unusable)" if wrong[1:] else ""))
        self._fill(shards, tables, threads)

    def _fill(self, shards: list[str], tables: list[_tar.Shard], threads: int) -> None:
        self.shards, self._threads = shards, threads
        self._names = [os.path.basename(shard) for shard in shards]
        if len(set(self._names)) < len(shards):
            whole = [os.path.abspath(shard) for shard in shards]
            self._names = [os.path.relpath(shard, os.path.commonpath(whole)) for shard in whole]
        self.shard_sizes = np.array([len(table.sample_ends) for table in tables], np.int64)  # [S]
        self._shard_ends = np.cumsum(self.shard_sizes)  # [S]
        self._file_sizes = [table.file_size for table in tables]
        self._offsets = np.concatenate([table.offsets for table in tables])  # [M]
        self._sizes = np.concatenate([table.sizes for table in tables])  # [M]
        self._ends = _shifted([table.sample_ends for table in tables], [len(table.offsets) for table in tables])  # [N]
        keys = [table.keys for table in tables]
        self._keys = b"".join(keys)
        self._key_ends = _shifted([table.key_ends for table in tables], [len(key) for key in keys])  # [N]
        ids: dict[str, int] = {}
        renamed = []
        for table in tables:
            names = np.array([ids.setdefault(extension, len(ids)) for extension in table.extensions], np.int32)
            renamed.append(names[table.extension_ids])
        self._extensions = list(ids)
        self._extension_ids = np.concatenate(renamed)  # [M]
        self._reader = _native.Reader(self.shards, _MAX_OPEN)

    def __len__(self) -> int:
        return len(self._ends)

    def _bounds(self, ends: np.ndarray, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return (int(ends[i - 1]) if i else 0), int(ends[i])

    @property
    def extension_names(self) -> list[str]:
        """All extensions that occur."""
        return list(self._extensions)

    def key(self, i: int) -> str:
        start, end = self._bounds(self._key_ends, i)
        return self._keys[start:end].decode("utf-8", "backslashreplace")

    def name(self, i: int) -> str:
        """`shard.tar:key`, for messages; as much of the shard's path as tells it from the others of the set."""
        return f"{self._names[int(np.searchsorted(self._shard_ends, i, 'right'))]}:{self.key(i)}"

    def extensions(self, i: int) -> tuple[str, ...]:
        start, end = self._bounds(self._ends, i)
        return tuple(self._extensions[e] for e in self._extension_ids[start:end].tolist())

    def problem(self, i: int) -> str:
        """Why a sample must not be used, whatever its members hold; empty: it may be."""
        start, end = self._bounds(self._ends, i)
        ids = self._extension_ids[start:end].tolist()
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            return f"it has the member {self._extensions[twice]} twice"
        start, end = self._bounds(self._key_ends, i)
        key = self._keys[start:end]
        if key.startswith(b"/") or b".." in key.split(b"/"):
            return "its name leads out of the shard"
        return ""

    def read(self, indices: Sequence[int] | np.ndarray, extensions: Sequence[str]) -> list[np.ndarray | None]:
        """For each sample the bytes (uint8) of its member with the first of these extensions that it has; None if it has none of
        them. Raises UserError if a shard cannot be read any more."""
        wanted = [self._extensions.index(extension) for extension in extensions if extension in self._extensions]
        places, members = [], []
        for place, i in enumerate(indices):
            start, end = self._bounds(self._ends, int(i))
            has = self._extension_ids[start:end].tolist()
            if (best := next((has.index(e) for e in wanted if e in has), None)) is not None:
                places.append(place)
                members.append(start + best)
        files = np.searchsorted(self._shard_ends, np.asarray(indices, np.int64)[places], "right").astype(np.int64)
        try:
            contents = self._reader.read(files, self._offsets[members], self._sizes[members], self._threads)
        except OSError as error:
            raise UserError(f"shard {error.filename} cannot be read: {error.strerror}") from error
        out: list[np.ndarray | None] = [None] * len(indices)
        for place, content in zip(places, contents, strict=True):
            out[place] = content
        return out

    def fingerprint(self) -> str:
        """Equal for two sets whose shards have the same names, lengths in bytes and numbers of samples, in the same order."""
        names = [os.path.basename(shard) for shard in self.shards]
        return hashlib.sha256(json.dumps([names, self._file_sizes, self.shard_sizes.tolist()]).encode()).hexdigest()[:32]


def _load(shards: list[str], threads: int) -> list[_tar.Shard]:
    try:
        tables = _native.load(shards, [index_path(shard) for shard in shards], threads)
    except OSError as error:
        raise UserError(f"shard {error.filename} cannot be read: {error.strerror}") from error
    for shard, table in zip(shards, tables, strict=True):
        if table.index is not None:
            try:
                _write_aside(index_path(shard), table.index)
            except OSError as error:
                _log.warning("the index of %s is kept in memory: %s", shard, error.strerror)
    return tables


def _shifted(ends: list[np.ndarray], lengths: list[int]) -> np.ndarray:
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
    return np.concatenate([end + start for end, start in zip(ends, starts, strict=True)])


def _problem(path: str, table: _tar.Shard) -> str:
    if table.problem:
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                return "is compressed with gzip: shards must be plain tar files"
        return f"is damaged: {table.problem}"
    return "" if len(table.sample_ends) else "holds no samples: no member whose name has an extension"


@dataclass
class ShardReport:
    """What `verify` found in one shard."""

    path: str
    samples: int = 0
    problem: str = ""  # of the file as a whole; empty: none
    damaged: list[tuple[str, str]] = field(default_factory=list)  # key of a sample, what is wrong with it
    bad: set[int] = field(default_factory=set)  # samples with something wrong beside their key
    repeated: set[int] = field(default_factory=set)  # samples with a key that one before them has


@dataclass
class Report:
    shards: list[ShardReport] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def damaged(self) -> int:
        """Samples with something wrong."""
        return sum(len({key for key, _ in shard.damaged}) for shard in self.shards)

    @property
    def ok(self) -> bool:
        return not any(shard.problem or shard.damaged for shard in self.shards)


def verify(
    patterns: str | Sequence[str],
    *,
    decode: bool = True,
    captions: bool = True,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Reads every shard from end to end, whatever its index says, and of every sample its picture (decoded; its header alone if
    decode is False), its caption (member `txt`, else "caption" in `json`; not asked for if captions is False) and its key (only
    one sample of the whole set may have it). Of shards without pictures: what content.needs says. Damage is reported, not raised;
    of a damaged shard, what comes before the damage is checked. progress(shards done, shards) is called after each."""
    paths = _match(patterns)
    report = Report()
    used: dict[str, str] = {}  # key -> the shard that has it
    with ThreadPoolExecutor(threads) as pool:
        for path in paths:
            report.shards.append(_verify_shard(path, decode, captions, threads, pool, used))
            if progress is not None:
                progress(len(report.shards), len(paths))
    return report


def _verify_shard(
    path: str, decode: bool, captions: bool, threads: int, pool: ThreadPoolExecutor, used: dict[str, str]
) -> ShardReport:
    from vlpfast.data import content  # which needs this module
    from vlpfast.data.media_info import MissingPackage

    report = ShardReport(path)
    try:
        table = _native.load([path], [""], 1)[0]  # the archive itself, not its index
        report.problem = _problem(path, table) if table.file_size else "is empty (0 bytes)"
        if not report.problem and not table.complete:
            report.problem = NOT_CLOSED
        shard = object.__new__(ShardSet)  # without the check that refuses damaged shards
        shard._fill([path], [table], threads)
        report.samples = len(shard)
        wanted = content.needs(shard, captions)
        for start in range(0, len(shard), 64):
            samples = range(start, min(start + 64, len(shard)))
            for i, wrong in zip(samples, content.problems(shard, samples, wanted, decode, pool), strict=True):
                key = shard.key(i)
                first = used.setdefault(key, f"{path}:{i}")
                report.damaged += [(key, problem) for problem in wrong]
                if wrong:
                    report.bad.add(i)
                if first != f"{path}:{i}":
                    report.damaged.append((key, f"its key is also in {first.rpartition(':')[0]}"))
                    report.repeated.add(i)
    except MissingPackage:
        raise
    except OSError as error:
        report.problem = f"cannot be read: {error.strerror}"
    except UserError as error:
        report.problem = str(error)
    return report


def _picture_problem(content: np.ndarray | None, decode: bool) -> str:
    if content is None:
        return f"no picture ({', '.join(IMAGE_EXTENSIONS)})"
    data = content.tobytes()
    try:
        picture_size(data)
        if decode:
            decode_rgb(data)
    except DamagedSample as error:
        return f"its picture is damaged: {error}"
    return ""


def _caption_problem(text: np.ndarray | None, meta: np.ndarray | None) -> str:
    try:
        if text is not None:
            text.tobytes().decode()
        elif meta is None:
            return 'no caption (a member txt, or "caption" in json)'
        else:
            captions = json.loads(meta.tobytes()).get("caption")  # a text, or a list of several
            captions = captions if isinstance(captions, list) else [captions]
            if not captions or not all(isinstance(caption, str) for caption in captions):
                return 'no caption: its json has no text under "caption"'
            "".join(captions).encode()
    except (ValueError, AttributeError, RecursionError) as error:
        return f"its caption cannot be read: {error}"
    return ""
