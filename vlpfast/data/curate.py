"""Leaving samples out of shards: near-duplicate pictures, pairs that do not belong together.

OUT/decisions.jsonl has a line for each sample, OUT/report.json the numbers, OUT/PREFIX-000000.tar ... what was kept, unless it is
a dry run. OUT appears when all of it is whole; a curation that was interrupted starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vlpfast.data.build import Keys, alone
from vlpfast.data.hashing import HASHES, MOST_DISTANCE, HammingIndex, hamming
from vlpfast.data.pictures import DamagedSample, decode_rgb
from vlpfast.data.shards import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardSet, ShardWriter
from vlpfast.types import UserError

_CHUNK = 512  # samples decided at a time


@dataclass
class Report:
    method: dict[str, Any]  # and its settings
    samples: int = 0
    kept: int = 0
    left_out: int = 0
    damaged: int = 0  # left out because they cannot be read
    shards: int = 0  # written
    numbers: dict[str, Any] = field(default_factory=dict)  # of the method


def near_duplicates(
    patterns: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    by: str = "phash",
    distance: int = 4,
    dry_run: bool = False,
    prefix: str = "train",
    samples_per_shard: int = 1000,
    threads: int = 4,
    progress: Callable[[int, int | None], None] | None = None,
) -> Report:
    """Leaves out each picture that has a kept one before it within `distance` bits of its hash. by: "phash", "dhash", or "bytes",
    which means equal bytes of the picture (or video, sound, text, where there is no picture) and knows no distance.

    So a chain of small changes keeps more than its first picture: what counts is how far one is from what was kept. Damaged
    pictures are left out. One pass; memory: about 40 bytes for each picture that is kept, 150 by bytes, and the shards' table.
    Raises UserError for `out` if it exists and what ShardSet refuses."""
    if by not in (*HASHES, "bytes"):
        raise UserError(f"near-duplicates: expected one of {', '.join(HASHES)}, bytes, got {by!r}")
    if not 0 <= distance <= MOST_DISTANCE:
        raise UserError(f"near-duplicates: distance: expected 0 .. {MOST_DISTANCE} bits of 64, got {distance}")
    shards = ShardSet(patterns, threads=threads)
    settings = {"by": by} if by == "bytes" else {"by": by, "distance": distance}
    report = Report({"name": "near-duplicates", **settings})
    decide = _same_bytes(shards) if by == "bytes" else _near(shards, by, distance, threads)
    repeats: Counter[str] = Counter()

    def counted(start: int, stop: int) -> list[dict[str, Any]]:
        decisions = decide(start, stop)
        repeats.update(decision["duplicate_of"] for decision in decisions if "duplicate_of" in decision)
        report.numbers = {"groups": len(repeats), "largest_group": 1 + max(repeats.values(), default=0)}
        return decisions

    return _curate(shards, out, report, counted, dry_run, prefix, samples_per_shard, progress)


def by_scores(
    patterns: str | Sequence[str],
    scores: np.ndarray,
    out: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    top: float | None = None,
    damaged: Mapping[int, str] | None = None,
    method: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    prefix: str = "train",
    samples_per_shard: int = 1000,
    threads: int = 4,
    progress: Callable[[int, int | None], None] | None = None,
) -> Report:
    """Keeps the samples whose score is at least `threshold`, or the `top` share of those that have one (on ties the earlier).

    scores [N] float, NaN: none, for the N samples of the shards; damaged: why a sample has none; method: for the report."""
    shards = ShardSet(patterns, threads=threads)
    if len(scores) != len(shards):
        raise ValueError(f"scores: expected one for each of the {len(shards)} samples, got {len(scores)}")
    scored = np.flatnonzero(~np.isnan(scores))
    if not len(scored):
        raise UserError("curate: no sample has a score")
    if (threshold is None) == (top is None):
        raise UserError("curate: expected either a threshold or a top share")
    if top is not None:
        if not 0 < top <= 1:
            raise UserError(f"curate: top: expected a share above 0 and up to 1, got {top:g}")
        best = scored[np.argsort(-scores[scored], kind="stable")[: max(1, round(top * len(scored)))]]
        keep = np.zeros(len(scores), bool)
        keep[best] = True
        threshold = float(scores[best[-1]])
    else:
        keep = scores >= threshold  # False for NaN
    quantiles = np.quantile(scores[scored], (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1))
    names = ("min", "1%", "10%", "25%", "50%", "75%", "90%", "99%", "max")
    numbers = {"threshold": threshold, "scores": {n: round(float(q), 6) for n, q in zip(names, quantiles, strict=True)}}
    report = Report(dict(method or {"name": "scores"}), numbers=numbers)

    def decide(start: int, stop: int) -> list[dict[str, Any]]:
        return [
            {"keep": False, "damaged": (damaged or {}).get(i, "no score")}
            if np.isnan(scores[i])
            else {"keep": bool(keep[i]), "score": round(float(scores[i]), 6)}
            for i in range(start, stop)
        ]

    return _curate(shards, out, report, decide, dry_run, prefix, samples_per_shard, progress)


# --- what is decided ---------------------------------------------------------------------------------------------------------

Decide = Callable[[int, int], list[dict[str, Any]]]  # first sample, end -> a decision for each


def _near(shards: ShardSet, by: str, distance: int, threads: int) -> Decide:
    index, kept = HammingIndex(distance), _Numbers()

    def decide(start: int, stop: int) -> list[dict[str, Any]]:
        decisions: list[dict[str, Any]] = [{"keep": True} for _ in range(start, stop)]
        hashes, places = [], []
        with ThreadPoolExecutor(threads) as pool:
            made = pool.map(lambda content: _hash(content, by), shards.read(range(start, stop), IMAGE_EXTENSIONS))
            for place, one in enumerate(made):
                one = shards.problem(start + place) or one
                if isinstance(one, str):
                    decisions[place] = {"keep": False, "damaged": one}
                else:
                    hashes.append(one)
                    places.append(place)
        found = np.array(hashes, np.uint64)
        before, apart = index.first_near(found)
        between = hamming(found[:, None], found)  # [n, n]
        new: list[int] = []  # rows of `found` that are kept
        for row, place in enumerate(places):
            first, far = kept[before[row]] if before[row] >= 0 else -1, int(apart[row])
            if first < 0 and (near := np.flatnonzero(between[row, new] <= distance)).size:
                first, far = start + places[new[near[0]]], int(between[row, new[near[0]]])
            if first < 0:
                new.append(row)
            else:
                decisions[place] = {"keep": False, "duplicate_of": shards.name(first), "distance": far}
        index.add(found[new])
        kept.add(np.array([start + places[row] for row in new], np.int64))
        return decisions

    return decide


class _Numbers:
    """A growing array of int64."""

    def __init__(self) -> None:
        self._values, self._size = np.empty(1024, np.int64), 0

    def add(self, values: np.ndarray) -> None:
        end = self._size + len(values)
        if end > len(self._values):
            self._values = np.resize(self._values, max(end, 2 * len(self._values)))
        self._values[self._size : end] = values
        self._size = end

    def __getitem__(self, place: int) -> int:
        return int(self._values[place])


def _hash(content: np.ndarray | None, by: str) -> np.uint64 | str:
    try:
        if content is None:
            return "no picture"
        return HASHES[by](decode_rgb(content.tobytes()))
    except DamagedSample as error:
        return str(error)


def _same_bytes(shards: ShardSet) -> Decide:
    first: dict[bytes, int] = {}

    def decide(start: int, stop: int) -> list[dict[str, Any]]:
        decisions: list[dict[str, Any]] = []
        contents = shards.read(range(start, stop), (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, *AUDIO_EXTENSIONS, "txt"))
        for i, content in enumerate(contents, start):
            problem = shards.problem(i) or ("neither picture nor video, sound, text" if content is None else "")
            if problem:
                decisions.append({"keep": False, "damaged": problem})
                continue
            before = first.setdefault(hashlib.blake2b(content, digest_size=16).digest(), i)
            decisions.append({"keep": True} if before == i else {"keep": False, "duplicate_of": shards.name(before)})
        return decisions

    return decide


# --- what becomes of it --------------------------------------------------------------------------------------------------------


def _curate(
    shards: ShardSet,
    out: str | os.PathLike[str],
    report: Report,
    decide: Decide,
    dry_run: bool,
    prefix: str,
    samples_per_shard: int,
    progress: Callable[[int, int | None], None] | None,
) -> Report:
    with _aside(os.path.abspath(os.path.expanduser(out))) as folder, contextlib.ExitStack() as stack:
        lines = stack.enter_context(open(os.path.join(folder, "decisions.jsonl"), "w", encoding="utf-8"))
        writer, keys = None, Keys()
        if not dry_run:
            writer = stack.enter_context(ShardWriter(folder, prefix, samples_per_shard=samples_per_shard))
        for start in range(0, len(shards), _CHUNK):
            stop = min(start + _CHUNK, len(shards))
            decisions = decide(start, stop)
            for i, decision in enumerate(decisions, start):
                key = shards.key(i)
                where = {"shard": shards.name(i)[: -len(key) - 1], "key": key}
                lines.write(json.dumps({**where, **decision}, ensure_ascii=False) + "\n")
                report.kept += decision["keep"]
                report.damaged += "damaged" in decision
            if writer is not None:
                for i, members in copied(shards, [i for i, decision in enumerate(decisions, start) if decision["keep"]]):
                    writer.write(keys.claim(shards.key(i)), members)
            if progress is not None:
                progress(stop, len(shards))
        report.samples, report.left_out = len(shards), len(shards) - report.kept
        if writer is not None:
            writer.close()
            report.shards = len(writer.shards)
        with open(os.path.join(folder, "report.json"), "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(report), ensure_ascii=False, indent=1) + "\n")
    return report


def copied(shards: ShardSet, indices: Sequence[int]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """The samples with all their members, 64 samples in memory at a time."""
    for begin in range(0, len(indices), 64):
        part = indices[begin : begin + 64]
        names = [shards.extensions(i) for i in part]
        contents: dict[tuple[int, str], bytes] = {}
        for name in dict.fromkeys(name for one in names for name in one):
            having = [i for i, one in zip(part, names, strict=True) if name in one]
            for i, content in zip(having, shards.read(having, [name]), strict=True):
                contents[i, name] = content.tobytes()
        for i, one in zip(part, names, strict=True):
            yield i, {name: contents[i, name] for name in one}


def check_out(out: str | os.PathLike[str]) -> None:
    """UserError if there is something that a curation would write over."""
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"curate: {out} exists: remove it, or take another folder")


@contextlib.contextmanager
def _aside(out: str) -> Iterator[str]:
    """A folder beside `out` that becomes `out` when all went well."""
    folder = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.curating")
    try:
        check_out(out)
        os.makedirs(folder, exist_ok=True)
        with alone(folder, "curation"):
            for left in os.listdir(folder):  # by one that was killed
                os.unlink(os.path.join(folder, left))
            try:
                yield folder
                os.replace(folder, out)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        raise UserError(f"curate: {error.filename or out} cannot be written: {error.strerror or error}") from error
