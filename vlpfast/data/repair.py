"""Takes out of damaged shards what is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from vlpfast.data import _tar, content
from vlpfast.data import shards as store
from vlpfast.data.build import Keys
from vlpfast.data.curate import copied
from vlpfast.data.shards import Report, ShardReport, ShardSet, ShardWriter, index_path
from vlpfast.types import UserError

_BLOCK = 512


@dataclass
class Repair:
    """What verify found, and what became of the damaged shards."""

    report: Report
    kept: dict[str, int] = field(default_factory=dict)  # shard -> samples in its new form
    left: list[str] = field(default_factory=list)  # shards with nothing whole in them, left as they are


def repair(
    patterns: str | Sequence[str],
    *,
    decode: bool = True,
    captions: bool = True,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Repair:
    """verify, and then each damaged shard anew with its whole samples, in their order; the old one is kept as NAME.tar.bad.

    Of a shard that is cut short, what comes before; of one with damaged headers, also what comes behind them. A sample beside
    such a gap is left out if it lacks a member that most have. A sample whose key another had before gets a number. A new shard
    is written aside and renamed: at any time NAME.tar is the old one or the new one, whole. Raises UserError if a NAME.tar.bad is
    in the way, before anything is changed, and for a folder that cannot be written."""
    paths = store._match(patterns)
    out = Repair(Report())
    used: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for path in paths:
            out.report.shards.append(store._verify_shard(path, decode, captions, threads, pool, used))
            if progress is not None:
                progress(len(out.report.shards), len(paths))
        damaged = [shard for shard in out.report.shards if shard.problem or shard.damaged]
        if there := [shard.path for shard in damaged if os.path.lexists(f"{shard.path}.bad")]:
            raise UserError(f"repair: {there[0]}.bad is there from an earlier repair: remove it or move it away")
        keys = Keys(used)
        for shard in damaged:
            if kept := _rewrite(shard, keys, decode, captions, threads, pool):
                out.kept[shard.path] = kept
            else:
                out.left.append(shard.path)
    return out


def _rewrite(report: ShardReport, keys: Keys, decode: bool, captions: bool, threads: int, pool: ThreadPoolExecutor) -> int:
    """-> samples in the new shard; 0: there are none, and nothing was changed."""
    folder = f"{report.path}.repair"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
        table, torn = _salvage(report.path)
        shard = object.__new__(ShardSet)  # without the check that refuses damaged shards
        shard._fill([report.path], [table], threads)
        names = [frozenset(shard.extensions(i)) for i in range(len(shard))]
        usual = Counter(names).most_common(1)[0][0] if names else frozenset()
        bad = report.bad | {i for i in torn if not names[i] >= usual}
        wanted = content.needs(shard, captions)
        later = range(max(0, report.samples - 1), len(shard))  # what verify has not seen, and what it saw the beginning of
        for start in range(0, len(later), 64):
            part = later[start : start + 64]
            wrong = content.problems(shard, part, wanted, decode, pool)
            bad |= {i for i, found in zip(part, wrong, strict=True) if found}
        good = [i for i in range(len(shard)) if i not in bad]
        kept = 0
        if not good:
            return 0
        with ShardWriter(folder, "new", samples_per_shard=len(good)) as writer:
            for i, members in copied(shard, good):
                key = shard.key(i)
                again = i in report.repeated or i >= report.samples
                with contextlib.suppress(ValueError):  # a member whose name no shard of ours can hold
                    writer.write(keys.claim(key) if again else keys.held(key), members)
                    kept += 1
        if not kept:
            return 0
        try:
            os.link(report.path, f"{report.path}.bad")
        except OSError:  # a file system without links
            shutil.copy2(report.path, f"{report.path}.bad")
        os.replace(writer.shards[0], report.path)
        os.replace(index_path(writer.shards[0]), index_path(report.path))
        os.utime(index_path(report.path))  # not older than its tar
    except OSError as error:
        raise UserError(f"repair: {error.filename or report.path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return kept


def _salvage(path: str) -> tuple[_tar.Shard, set[int]]:
    """The table of all members whose header and content are whole, also of those behind damage, and the samples beside a gap,
    which may lack members."""
    members = _tar.Members()
    gaps: list[int] = []  # members before each gap
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at: int | None = 0
        while at is not None and at < size:
            known = len(members.names)
            try:
                if not _tar._scan(file, size, at, members):
                    gaps.append(len(members.names))  # the end is missing, and perhaps members with it
                break
            except _tar._Damage:
                if len(members.names) > known:
                    at = members.offsets[-1] + members.sizes[-1]
                gaps.append(len(members.names))
                at = _next_header(file, at + 1, size)
    table = _tar._table(members, size, "", True, None)
    beside = [place for gap in gaps for place in (gap - 1, gap) if 0 <= place < len(members.names)]
    return table, set(np.searchsorted(table.sample_ends, beside, "right").tolist())


def _next_header(file: BinaryIO, at: int, size: int) -> int | None:
    """Where, from byte `at` on, the next block is that can only be a header; None: nowhere."""
    for block in range(-(-at // _BLOCK) * _BLOCK, size - _BLOCK + 1, _BLOCK):
        head = _tar._read(file, block, _BLOCK)
        if head[257:262] == b"ustar" and _tar._parse_header(head) is not None:
            return block
    return None
