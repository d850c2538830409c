"""What a sample must hold to be whole, for shards of every kind: pictures, documents, text, video, audio, volumes, points."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from vlpfast.data import shards as store
from vlpfast.data.media_info import audio_info, video_info, volume_info
from vlpfast.data.pictures import DamagedSample
from vlpfast.data.points_file import npy_info, points_info
from vlpfast.data.shards import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, ShardSet

_NUMBERED_PICTURE = re.compile(rf"\d+\.({'|'.join(IMAGE_EXTENSIONS)})")

_MEDIA: dict[str, Callable[[BinaryIO], Any]] = {
    **dict.fromkeys(VIDEO_EXTENSIONS, video_info),
    **dict.fromkeys(AUDIO_EXTENSIONS, audio_info),
    "vol": volume_info,
    "points.npy": points_info,
    "npy": npy_info,  # which may also hold something else
}


class Needs(NamedTuple):
    picture: bool
    caption: bool


def needs(shards: ShardSet, captions: bool = True) -> Needs:
    """What each sample of a shard must have, going by what is in it at all: where one has a picture, all must; likewise a txt; a
    caption goes with a picture, and is all there is without other members. captions=False: none is needed anywhere."""
    names = set(shards.extension_names)
    picture = bool(names & set(IMAGE_EXTENSIONS))
    only_text = names <= {"txt", "json"}
    return Needs(picture, captions and (picture or only_text or "txt" in names))


def problems(shards: ShardSet, samples: Sequence[int], wanted: Needs, decode: bool, pool: ThreadPoolExecutor) -> list[list[str]]:
    """For each of the samples what is wrong with it. decode: pictures are decoded, of videos the first frame, of sounds the end,
    volumes and point clouds whole. Raises UserError where the package for that is missing."""
    records = [_parts(content) for content in shards.read(samples, ("json",))]
    pictures = shards.read(samples, IMAGE_EXTENSIONS) if wanted.picture else [None] * len(samples)
    wrong = pool.map(lambda content: store._picture_problem(content, decode), pictures)
    texts, metas = (shards.read(samples, (name,)) for name in ("txt", "json"))
    found: list[list[str]] = []
    for i, parts, picture, text, meta in zip(samples, records, wrong, texts, metas, strict=True):
        if parts is not None:
            own = [shards.problem(i), *_document_problems(shards, i, parts, decode)]
            found.append([problem for problem in own if problem])
            continue
        own = [shards.problem(i)] + ([picture] if wanted.picture else [])
        own += [store._caption_problem(text, meta)] if wanted.caption else []
        for name in shards.extensions(i):
            if name in _MEDIA:
                own.append(_media_problem(shards, i, name, _MEDIA[name], decode))
            elif _NUMBERED_PICTURE.fullmatch(name) and (problem := _numbered_problem(shards, i, name, decode)):
                own.append(problem)
        found.append([problem for problem in own if problem])
    return found


def _parts(meta: Any) -> Any:
    """The "parts" of a document's json; None if it is no document."""
    try:
        return json.loads(meta.tobytes()).get("parts") if meta is not None else None
    except (ValueError, AttributeError, RecursionError):
        return None


def _document_problems(shards: ShardSet, i: int, parts: Any, decode: bool) -> list[str]:
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return ['its "parts" are no list of objects']
    found = []
    for name in [part["image"] for part in parts if "image" in part]:
        if not isinstance(name, str) or not _NUMBERED_PICTURE.fullmatch(name) or name not in shards.extensions(i):
            found.append(f"it has no member {name!r}, which its parts name")
        elif problem := _numbered_problem(shards, i, name, decode):
            found.append(problem)
    return found


def _numbered_problem(shards: ShardSet, i: int, name: str, decode: bool) -> str:
    """Of one of the pictures of a document, or of a sample of several (ImageSpec.pictures)."""
    problem = store._picture_problem(shards.read([i], [name])[0], decode)
    return f"{name}: {problem}" if problem else ""


def _media_problem(shards: ShardSet, i: int, name: str, about: Callable[[BinaryIO], Any], decode: bool) -> str:
    content = shards.read([i], [name])[0]
    if content is None or not len(content):
        return f"its {name} is empty"
    try:
        if decode:
            about(io.BytesIO(content))
    except DamagedSample as error:
        return f"its {name} is damaged: {error}"
    return ""
