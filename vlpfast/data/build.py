"""Shards from folders, tables, documents, media and volumes (sources.py): in parallel, the same bytes for any number of workers.

OUT/PREFIX-000000.tar ... hold the samples, OUT/skipped.jsonl names each input that gave none and why, OUT/build.json says what
was built and how far. A build that was interrupted goes on behind its last whole shard, to the same bytes as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlpfast.data import inputs, tables
from vlpfast.data.inputs import DamagedParts, Options, Task
from vlpfast.data.media_info import require
from vlpfast.data.pictures import DamagedSample
from vlpfast.data.shards import ShardSet, ShardWriter, _write_aside
from vlpfast.data.sources import KINDS, Sample, check_labels, classes
from vlpfast.types import UserError

try:
    import fcntl
except ImportError:
    fcntl = None

FORMAT = 1  # of what a build writes; another one is not gone on with
_FEW = 200  # pictures that are sooner read than workers are started


@dataclass
class Report:
    """What is in `out`."""

    samples: int = 0
    skipped: int = 0
    shards: int = 0
    files: Counter[str] = dataclasses.field(default_factory=Counter)  # of the source, by extension
    reasons: list[str] = dataclasses.field(default_factory=list)  # of the first few inputs that were skipped
    resumed: bool = False  # some of it was there before


class _Skip(NamedTuple):
    source: str
    reason: str


@dataclass
class _Journal:
    """How far a build has come: what its whole shards hold."""

    about: dict[str, Any]
    shards: int = 0
    samples: int = 0
    skipped: int = 0
    task: int = 0  # inputs behind us
    entry: int = 0  # samples and skips of the next input that are behind us as well
    skipped_bytes: int = 0  # of skipped.jsonl
    finished: bool = False


def build(
    kind: str,
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    prefix: str = "train",
    workers: int = 2,
    samples_per_shard: int = 1000,
    progress: Callable[[int, int | None], None] | None = None,
) -> Report:
    """Shards in `out` from `src`, a folder, or a file of kind table, text or documents. kind: one of sources.KINDS.

    Order, keys and bytes depend on the sources, the options and samples_per_shard alone. A key is the input's path without its
    extension; white space and dots in it become _, and one that came before gets a number (a_2). An input that cannot be used is
    skipped, counted and listed. An `out` with this very build, whole or begun, is gone on with, unless files of the source came,
    went or changed their length since. progress(inputs read, of so many or None) is called as inputs are written.

    Memory: the paths of a folder's files one folder at a time, 200 bytes for each key, 2 * workers chunks of samples, and in each
    worker the texts of options.reports.
    Raises UserError for a source or folder that cannot be used, a missing package, a full disk, and if no input could be used."""
    if kind not in KINDS:
        raise UserError(f"build: expected one of {', '.join(KINDS)}, got {kind!r}")
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if KINDS[kind].needs[0]:
        require(*KINDS[kind].needs)
    root, options = _root(kind, os.path.abspath(os.path.expanduser(src)), options or Options())
    out = os.path.abspath(os.path.expanduser(out))
    if os.path.commonpath([root, os.path.realpath(out)]) == root and not options.only:
        raise UserError(f"build: {out} lies in the source {root}: its shards would become a part of it")
    about = {
        "format": FORMAT,
        "kind": kind,
        "source": inputs.shown(os.path.join(root, options.only) if options.only else root),
        "options": json.loads(json.dumps(dataclasses.asdict(options))),
        "prefix": prefix,
        "samples_per_shard": samples_per_shard,
    }
    about["files"], extensions = inputs.survey(root, options.only)
    if options.reports:
        tables.reports(options)  # a table that cannot be used is told now
        about["reports"] = hashlib.sha256(Path(options.reports).read_bytes()).hexdigest()
    try:
        os.makedirs(out, exist_ok=True)
        with alone(out, "build"):
            report = _build(kind, root, out, options, about, extensions, workers, progress)
    except BrokenProcessPool as error:
        raise UserError(
            f"build: a worker was killed, perhaps for its memory; the same command goes on with {out}, fewer --workers need less"
        ) from error
    except OSError as error:
        raise UserError(f"build: {error.filename or out} cannot be written: {error.strerror or error}") from error
    return report


def _root(kind: str, src: str, options: Options) -> tuple[str, Options]:
    """The folder that nothing outside of is read, and the options with all that is implied."""
    changes: dict[str, Any] = {"max_caption": options.max_caption or KINDS[kind].max_caption}
    if options.max_caption is not None and options.max_caption < 1:
        raise UserError(f"build: --max-caption: expected at least 1, got {options.max_caption}")
    if "{}" not in options.template:
        raise UserError(f"build: --template: expected a text with {{}} for the name of the class, got {options.template!r}")
    known = {"captions", "max_caption", "only", *KINDS[kind].options}
    for field in dataclasses.fields(Options):
        if getattr(options, field.name) != field.default and field.name not in known:
            raise UserError(f"build: {kind} have no use for {field.name}={getattr(options, field.name)!r}")
    if options.labels:
        check_labels(options.labels)
    if options.reports:
        changes["reports"] = os.path.realpath(options.reports)
    elif kind == "dicom" and (options.by, options.key, options.caption) != (Options.by, Options.key, Options.caption):
        raise UserError("build: --by, --key and --caption say how --reports are to be read: name the table")
    if kind == "text" and options.caption == "caption":
        changes["caption"] = "text"
    if options.pictures:
        if not os.path.isdir(options.pictures):
            raise UserError(f"build: --pictures: there is no folder {options.pictures}")
        changes["pictures"] = os.path.realpath(options.pictures)
    src = os.path.realpath(src)
    if os.path.isfile(src) and kind in ("table", "text", "documents"):
        changes["only"], src = os.path.basename(src), os.path.dirname(src)
    elif not os.path.isdir(src):
        raise UserError(f"build: {src} is no folder" + (" and no file" if kind in ("table", "text", "documents") else ""))
    return src, dataclasses.replace(options, **changes)


@contextlib.contextmanager
def alone(out: str, what: str) -> Iterator[None]:
    """Two writers in one folder would mix their shards. (Windows knows no locks of folders.)"""
    if fcntl is None:
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"build: another {what} is writing to {out}") from error
        yield
    finally:
        os.close(handle)


def _build(
    kind: str,
    root: str,
    out: str,
    options: Options,
    about: dict[str, Any],
    extensions: Counter[str],
    workers: int,
    progress: Callable[[int, int | None], None] | None,
) -> Report:
    journal = _open(out, about)
    resumed = journal.shards > 0 or journal.finished
    if not journal.finished:
        plan = KINDS[kind].plan
        total = sum(1 for _ in plan(root, options)) if KINDS[kind].counted else None
        if kind == "classes":
            names = "".join(f"{name}\n" for name in classes(root).values())
            _write_aside(os.path.join(out, "classes.txt"), names.encode())
        _write(kind, root, out, options, journal, workers, total, progress)
    if not journal.samples:
        there = ", ".join(f"{name}: {count}" for name, count in extensions.most_common(6)) or "none"
        why = f"it holds no input of this kind; its files: {there}"
        if journal.skipped:
            why = f"all {journal.skipped} inputs were skipped ({'; '.join(_reasons(out))}, ...)"
        raise UserError(f"build: nothing was built from {about['source']}: {why}")
    return Report(journal.samples, journal.skipped, journal.shards, extensions, _reasons(out), resumed)


def _open(out: str, about: dict[str, Any]) -> _Journal:
    """The journal of the build in `out`, with everything behind its last whole shard taken away."""
    path = os.path.join(out, "build.json")
    prefix = about["prefix"]
    shards = sorted(glob.glob(os.path.join(glob.escape(out), f"{prefix}-[0-9]*.tar")))
    if not os.path.exists(path):
        if shards:
            raise UserError(f"build: {out} holds {len(shards)} shards named {prefix} that no build made: take another folder")
        journal = _Journal(about)
        _save(out, journal)
    else:
        try:
            with open(path, encoding="utf-8") as file:
                journal = _Journal(**json.load(file))
        except (ValueError, TypeError) as error:
            raise UserError(f"build: {path} is damaged: remove {out} and start anew") from error
        if not journal.samples:  # nothing would be lost
            journal = _Journal(about)
            _save(out, journal)
        elif journal.about != about:
            differs = [name for name in about if journal.about.get(name) != about[name]]
            raise UserError(
                f"build: {out} holds a build with another {', '.join(differs)}: remove it, or take another folder"
                + (" (the source's files have changed since)" if differs == ["files"] else "")
            )
    if len(shards) < journal.shards:
        raise UserError(
            f"build: {out} lacks {journal.shards - len(shards)} of the shards that were built: remove it and start anew"
        )
    leftovers = shards[journal.shards :] + glob.glob(os.path.join(glob.escape(out), f"{prefix}-[0-9]*.tmp"))
    for left in leftovers:
        os.unlink(left)
    with open(os.path.join(out, "skipped.jsonl"), "ab") as file:
        file.truncate(journal.skipped_bytes)
    return journal


def _save(out: str, journal: _Journal) -> None:
    text = json.dumps(dataclasses.asdict(journal), ensure_ascii=False, indent=1)
    _write_aside(os.path.join(out, "build.json"), (text + "\n").encode())


def _reasons(out: str, most: int = 3) -> list[str]:
    with open(os.path.join(out, "skipped.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in itertools.islice(file, most)]
    return [f"{line['source']}: {line['reason']}" for line in lines]


def _write(
    kind: str,
    root: str,
    out: str,
    options: Options,
    journal: _Journal,
    workers: int,
    total: int | None,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    about = journal.about
    keys = Keys(_keys_of(out, about["prefix"]) if journal.shards else ())
    tasks = itertools.islice(KINDS[kind].plan(root, options), journal.task, None)
    samples, skipped, entry = journal.samples, journal.skipped, journal.entry
    settings = {"samples_per_shard": about["samples_per_shard"], "go_on": True}
    made = _made(kind, root, options, tasks, workers)
    with (
        open(os.path.join(out, "skipped.jsonl"), "ab") as refused,
        ShardWriter(out, about["prefix"], **settings) as writer,
        contextlib.closing(made),
    ):

        def whole(task: int, entry: int) -> None:
            """A shard has been finished: from now on nothing before this point is made again."""
            refused.flush()
            os.fsync(refused.fileno())
            journal.shards, journal.samples, journal.skipped = len(writer.shards), samples, skipped
            journal.task, journal.entry, journal.skipped_bytes = task, entry, refused.tell()
            _save(out, journal)

        task = journal.task
        for entries in made:
            for place, one in enumerate(entries):
                if place < entry:
                    continue
                if isinstance(one, _Skip):
                    refused.write(json.dumps(one._asdict(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
                    skipped += 1
                else:
                    key, members = one
                    writer.write(keys.claim(key), members)
                    samples += 1
                    if len(writer.shards) > journal.shards:
                        whole(task, place + 1)
            task, entry = task + 1, 0
            if progress is not None:
                progress(task, total)
        writer.close()
        journal.finished = True
        whole(task, 0)
    if progress is not None and total is None:
        progress(task, task)


# --- keys ----------------------------------------------------------------------------------------------------------------


def clean_key(key: str) -> str:
    """A key that a shard can hold: its last 200 characters, without white space, control characters, dots in its last part, and
    parts that are empty or dots alone."""
    key = re.sub(r"[\s\x00-\x1f\x7f]", "_", key.encode("utf-8", "backslashreplace").decode())[-200:]
    parts = [part for part in key.split("/") if part.strip(".")]
    return "/".join([*parts[:-1], parts[-1].replace(".", "_")]) if parts else "_"


class Keys:
    """Gives each sample a key of its own: a, a_2, a_3, ..."""

    def __init__(self, used: Iterable[str] = ()) -> None:
        self._used = set(used)
        self._next: dict[str, int] = {}

    def held(self, key: str) -> str:
        """The key as it is, if a shard can hold it."""
        return key if key == clean_key(key) else self.claim(key)

    def claim(self, key: str) -> str:
        key = unique = clean_key(key)
        while unique in self._used:
            number = self._next.get(key, 2)
            self._next[key] = number + 1
            unique = f"{key}_{number}"
        self._used.add(unique)
        return unique


def _keys_of(out: str, prefix: str) -> Iterator[str]:
    shards = ShardSet(os.path.join(glob.escape(out), f"{prefix}-[0-9]*.tar"))
    return (shards.key(i) for i in range(len(shards)))


# --- making samples --------------------------------------------------------------------------------------------------------

Entry = Sample | _Skip


def _made(kind: str, root: str, options: Options, tasks: Iterator[Task], workers: int) -> Iterator[list[Entry]]:
    """The samples of each task, in the tasks' order."""
    chunk = KINDS[kind].chunk
    enough = _FEW * chunk // 32
    few = list(itertools.islice(tasks, enough)) if workers > 1 else []
    if workers == 1 or len(few) < enough:
        for task in itertools.chain(few, tasks):
            yield make(kind, root, options, task)
        return
    tasks = itertools.chain(few, tasks)
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads as they happen to be
    pool = ProcessPoolExecutor(workers, spawn, _start, (kind, root, options))
    try:
        waiting: deque[Future[list[list[Entry]]]] = deque()
        while part := list(itertools.islice(tasks, chunk)):
            waiting.append(pool.submit(_make_in_worker, part))
            if len(waiting) == 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def make(kind: str, root: str, options: Options, task: Task) -> list[Entry]:
    """The samples of one input; where it is damaged, a _Skip in the place of the rest, or one for each part that is."""
    entries: list[Entry] = []
    try:
        for key, members in KINDS[kind].make(root, task, options):
            entries.append((key, dict(members)))
    except DamagedSample as error:
        reasons = error.args if isinstance(error, DamagedParts) else [str(error)]
        entries += [_Skip(task.source, reason) for reason in reasons]
    return entries or [_Skip(task.source, "it holds no sample")]


_job: tuple[str, str, Options] | None = None


def _start(*job: Any) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's matter
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Workers of a process that was killed would wait for work for ever: each holds the others' queue open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_in_worker(tasks: list[Task]) -> list[list[Entry]]:
    assert _job is not None
    return [make(*_job, task) for task in tasks]
