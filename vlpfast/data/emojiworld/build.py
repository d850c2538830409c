"""Writes a world as WebDataset shards: KEY.jpg (or .png; KEY.0.jpg and KEY.1.jpg of two pictures), KEY.txt (the caption),
KEY.json (see truth.py), and world.json about them all."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlpfast.data.emojiworld.captions import captions
from vlpfast.data.emojiworld.questions import answers
from vlpfast.data.emojiworld.scenes import Scene, draw_scene
from vlpfast.data.emojiworld.sprites import Word, package_versions, vocabulary
from vlpfast.data.emojiworld.truth import FORMAT, joint_truth, picture_and_truth
from vlpfast.data.emojiworld.world import Split, World
from vlpfast.data.shards import ShardWriter
from vlpfast.types import UserError

try:
    import fcntl
except ImportError:
    fcntl = None

_CHUNK = 50  # scenes a worker makes at a time
_FEW = 500  # scenes that are sooner made than workers are started
_MAX_ATTEMPTS = 2000


def build(
    folder: str | os.PathLike[str],
    world: World,
    splits: Mapping[str, Split],
    *,
    workers: int = 2,
    samples_per_shard: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Makes the world's splits in `folder` -> for each split the pattern of its shards.

    The folder appears when it is whole. One that holds this very world is used as it is; whoever comes while another process
    makes it waits. The bytes depend on world, splits and samples_per_shard alone, and on the versions of the packages, not on
    `workers`. progress(done, total) is called as scenes are written. Raises UserError for a folder with something else in it,
    a damaged world, a missing package, more distinct held-out scenes than the vocabulary has, and a full disk."""
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if not splits or not all(re.fullmatch(r"[a-z0-9_]+", name) for name in splits):
        raise UserError(f"emojiworld: splits need names of letters, digits and _, got {sorted(splits)}")
    odd = [name for name, split in splits.items() if split.num_scenes % world.pictures]
    if odd:
        raise UserError(f"emojiworld: num_scenes of the split {odd[0]} must be even where a sample has two pictures")
    words = vocabulary(world)
    about = describe(world, splits, samples_per_shard)
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    patterns = {name: str(folder / f"{name}-*.tar") for name in splits}
    if _is_built(folder, about):
        return patterns
    try:
        with _aside(folder) as temporary:
            if _is_built(folder, about):  # by the process that was waited for
                return patterns
            for left in temporary.iterdir():  # by a build that was killed
                left.unlink()
            _write(temporary, _plan(world, words, splits), workers, samples_per_shard, progress)
            about["shards"] = {path.name: path.stat().st_size for path in sorted(temporary.glob("*.tar"))}
            (temporary / "world.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            os.rename(temporary, folder)
    except OSError as error:
        raise UserError(f"emojiworld: {folder} cannot be written: {error.strerror or error}") from error
    return patterns


def describe(world: World, splits: Mapping[str, Split], samples_per_shard: int = 1000) -> dict[str, Any]:
    """What decides the content of a folder, as plain JSON values."""
    about = {
        "format": FORMAT,
        "world": asdict(world),
        "splits": {name: asdict(split) for name, split in splits.items()},
        "samples_per_shard": samples_per_shard,
        "packages": package_versions(world.domain),
        "classes": class_names(world),
    }
    return json.loads(json.dumps(about))


def class_names(world: World) -> list[str]:
    """The names of the world's objects, in its language: the values of "label"."""
    return [word.name for word in vocabulary(world)]


def answer_names(world: World) -> list[str]:
    """Every answer that a question about this world ("qa" of the JSON) can have."""
    return answers(world, vocabulary(world))


def _is_built(folder: Path, about: dict[str, Any]) -> bool:
    """Whether the folder holds this world. Raises UserError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "world.json").read_text(encoding="utf-8"))
        shards = found.pop("shards")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(
            f"emojiworld: {folder} exists and is not a finished emojiworld; remove it or choose another folder"
        ) from None
    if found != about:
        raise UserError(
            f"emojiworld: {folder} holds another world ({_difference(found, about)}); remove it or choose another folder"
        )
    for name, size in shards.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            state = f"has {path.stat().st_size} bytes instead of {size}" if path.is_file() else "is missing"
            raise UserError(f"emojiworld: {path} {state}; remove {folder}, it will be made anew")
    return True


def _difference(found: Any, wanted: Any, name: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        parts = [
            _difference(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
            for key in [*wanted, *(key for key in found if key not in wanted)]
            if found.get(key) != wanted.get(key)
        ]
        return "; ".join(parts)
    return f"{name} differs" if isinstance(found, list) else f"{name} is {found!r} there, {wanted!r} was asked for"


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that this process alone may fill: others wait. Afterwards it is gone, unless it was renamed.
    (Windows knows no locks of folders: there two builds of the same folder must not run at once.)"""
    temporary = folder.parent / f".{folder.name}.building"
    handle = _lock(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        if fcntl is None:
            return None
        with suppress(FileNotFoundError):  # whoever held it has renamed or removed it
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            ours = False
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                ours = os.path.samestat(os.fstat(handle), os.stat(folder))
            finally:
                if not ours:
                    os.close(handle)
            if ours:
                return handle


# --- which scenes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What a worker must know. The splits that others have to keep clear of are decided beforehand; the last one is drawn by
    the workers."""

    world: World
    splits: dict[str, Split]
    attempts: dict[str, list[int]]  # split -> the attempt of each of its scenes
    taken: set[str]  # keys of those splits


def _plan(world: World, words: Sequence[Word], splits: Mapping[str, Split]) -> _Plan:
    """Held-out splits first, then the others from the smallest to the largest; each keeps clear of those before it."""
    order = sorted(splits, key=lambda name: (not splits[name].heldout, splits[name].num_scenes, name))
    if not splits[order[-1]].heldout:
        order.pop()
    attempts: dict[str, list[int]] = {}
    taken: set[str] = set()
    texts: set[str] = set()
    for name in order:
        split, own, attempts[name] = splits[name], set(), []
        for number in range(split.num_scenes):
            for scene in _candidates(world, words, name, split, number):
                key = scene.key(words)
                if key in taken or (split.heldout and key in own):
                    continue
                if split.heldout and (text := next(captions(scene, world, words)).text) in texts:
                    continue
                break
            else:
                raise _too_small(name, split, number)
            own.add(key)
            attempts[name].append(scene.name[3])
            if split.heldout:
                texts.add(text)
        taken |= own
    return _Plan(world, dict(splits), attempts, taken)


def _candidates(world: World, words: Sequence[Word], name: str, split: Split, number: int) -> Iterator[Scene]:
    for attempt in range(_MAX_ATTEMPTS):
        if (scene := draw_scene(world, words, name, split.objects or world.objects, number, attempt)) is not None:
            yield scene


def _too_small(name: str, split: Split, number: int) -> UserError:
    return UserError(
        f"emojiworld: no new scene was found for number {number} of the split {name}: {split.num_scenes} scenes that occur "
        "nowhere else are too many for this vocabulary and these numbers of objects; ask for fewer or a larger vocabulary"
    )


# --- making them -------------------------------------------------------------------------------------------------------

Chunk = tuple[str, int, int]  # split, first scene, end
Sample = tuple[str, dict[str, bytes]]  # key, members


def _write(folder: Path, plan: _Plan, workers: int, samples_per_shard: int, progress: Callable[[int, int], None] | None) -> None:
    total, done = sum(split.num_scenes for split in plan.splits.values()), 0
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads as they happen to be
    pool = ProcessPoolExecutor(workers, spawn, _start, (plan,)) if workers > 1 and total >= _FEW else None
    try:
        for name, split in plan.splits.items():
            chunks = [(name, start, min(start + _CHUNK, split.num_scenes)) for start in range(0, split.num_scenes, _CHUNK)]
            made = _in_order(pool, chunks, 4 * workers) if pool else (_make(plan, chunk) for chunk in chunks)
            with ShardWriter(folder, name, samples_per_shard=samples_per_shard) as writer:
                for samples in made:
                    for key, members in samples:
                        writer.write(key, members)
                    done += len(samples)
                    if progress is not None:
                        progress(done, total)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Sequence[Chunk], ahead: int) -> Iterator[list[Sample]]:
    """What the workers make of the chunks, in their order; never more than `ahead` of them wait in memory."""
    waiting: deque[Future[list[Sample]]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_make_in_worker, chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_worker_plan: _Plan | None = None


def _start(plan: _Plan) -> None:
    global _worker_plan
    _worker_plan = plan
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's matter
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Workers of a process that was killed would wait for work for ever: each holds the others' queue open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_in_worker(chunk: Chunk) -> list[Sample]:
    assert _worker_plan is not None
    return _make(_worker_plan, chunk)


def _make(plan: _Plan, chunk: Chunk) -> list[Sample]:
    name, start, end = chunk
    world = plan.world
    if world.pictures == 1:
        scenes = (_scene(plan, name, number) for number in range(start, end))
        return [_sample(truth, {world.format: _encoded(picture, world)}) for picture, truth in scenes]
    samples = []
    for first in range(start, end, world.pictures):
        pictures, truths = zip(*(_scene(plan, name, first + place) for place in range(world.pictures)), strict=True)
        truth = joint_truth(truths, first // world.pictures, world, vocabulary(world))
        members = {f"{place}.{world.format}": _encoded(picture, world) for place, picture in enumerate(pictures)}
        samples.append(_sample(truth, members))
    return samples


def _sample(truth: dict[str, Any], pictures: dict[str, bytes]) -> Sample:
    return truth["key"], {
        **pictures,
        "txt": truth["caption"].encode(),
        "json": json.dumps(truth, ensure_ascii=False, separators=(",", ":")).encode(),
    }


def _scene(plan: _Plan, name: str, number: int) -> tuple[np.ndarray, dict[str, Any]]:
    world, split, words = plan.world, plan.splits[name], vocabulary(plan.world)
    if name in plan.attempts:
        scene = draw_scene(world, words, name, split.objects or world.objects, number, plan.attempts[name][number])
    else:
        scene = next((s for s in _candidates(world, words, name, split, number) if s.key(words) not in plan.taken), None)
    if scene is None:
        raise _too_small(name, split, number)
    return picture_and_truth(scene, world, words)


def _encoded(picture: np.ndarray, world: World) -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(picture)
    if world.format == "png":
        image.save(out, "PNG")
    else:
        image.save(out, "JPEG", quality=world.quality, subsampling=0)  # tints of small objects need the full resolution of colour
    return out.getvalue()
