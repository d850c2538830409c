"""The kinds of sources that shards are built from. Each names its inputs in a fixed order (`plan`) and makes samples of one
(`make`)."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from vlpfast.data import tables
from vlpfast.data.inputs import (
    Options,
    Task,
    dump,
    extension,
    files,
    inside,
    linked,
    parse,
    picture,
    read,
    shown,
    sidecars,
    stem_of,
    text,
    with_notes,
)
from vlpfast.data.media_info import audio_info, video_info
from vlpfast.data.pictures import DamagedSample
from vlpfast.data.shards import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from vlpfast.types import UserError

_MESHES = ("obj", "ply", "stl", "off", "glb", "gltf")

Sample = tuple[str, dict[str, bytes]]  # key (not yet cleaned), members


@dataclass(frozen=True)
class Kind:
    plan: Callable[[str, Options], Iterator[Task]]
    make: Callable[[str, Task, Options], Iterator[Sample]]
    chunk: int  # inputs that a worker takes at a time
    max_caption: int
    options: tuple[str, ...]  # that it understands, beside `captions` and `max_caption`
    needs: tuple[str, str] = ("", "")  # package to import, pip extra that brings it
    counted: bool = True  # planning is cheap enough to be done beforehand, for the total


# --- pictures, classes -----------------------------------------------------------------------------------------------------


def _plan_pictures(root: str, options: Options) -> Iterator[Task]:
    return with_notes(root, IMAGE_EXTENSIONS)


def _make_picture(root: str, task: Task, options: Options) -> Iterator[Sample]:
    path, *notes = task.payload
    kind, content = picture(read(root, path), options)
    members, record = sidecars(root, path, notes, options.max_caption, options.captions)
    yield stem_of(path), {kind: content, **members, **({"json": dump(record)} if record else {})}


def classes(root: str) -> dict[str, str]:
    """Folder -> name of its class (underscores are spaces), in the order of the folders' names."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False) and entry.name[0] != ".")
    names = {folder: " ".join(shown(folder).replace("_", " ").split()) for folder in folders}
    if not names:
        raise UserError(f"build: {root} has no folders: expected one for each class")
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise UserError(f"build: several folders in {root} name the class {twice[0]!r}")
    return names


def _plan_classes(root: str, options: Options) -> Iterator[Task]:
    for number, (folder, name) in enumerate(classes(root).items()):
        for path in files(os.path.join(root, folder)):
            if extension(path) in IMAGE_EXTENSIONS:
                path = os.path.join(folder, path)
                yield Task(shown(path), (path, name, number))


def _make_classified(root: str, task: Task, options: Options) -> Iterator[Sample]:
    path, name, number = task.payload
    kind, content = picture(read(root, path), options)
    caption = text(options.template.replace("{}", name), options.max_caption)
    yield stem_of(path), {kind: content, "txt": caption.encode(), "json": dump({"label": name, "class": number})}


# --- tables ----------------------------------------------------------------------------------------------------------------


def _plan_table(root: str, options: Options) -> Iterator[Task]:
    wanted = [("--picture", options.picture), *(("--drop", name) for name in options.drop)]
    wanted += [("--caption", options.caption)] * options.captions + [("--key", options.key)] * bool(options.key)
    for path in files(root, options.only):
        if extension(path) not in tables.TABLES:
            continue
        for number, (columns, row) in enumerate(tables.rows(root, path)):
            if number == 0:
                tables.check_columns(os.path.join(root, path), columns, wanted)
            yield Task(f"{shown(path)}:{number + 1}", (path, number, row))


def _make_row(root: str, task: Task, options: Options) -> Iterator[Sample]:
    path, number, row = task.payload
    if isinstance(row, str):
        raise DamagedSample(row)
    record = {name: value for name, value in row.items() if name not in (options.picture, options.caption, *options.drop)}
    kind, content = picture(_cell_picture(root, path, row[options.picture], options), options)
    members = {kind: content}
    caption = row.get(options.caption)
    if isinstance(caption, str) and (caption.strip() or options.captions):
        members["txt"] = text(caption, options.max_caption).encode()
    elif options.captions:
        raise DamagedSample(f"the column {options.caption!r} is {type(caption).__name__}, expected a text")
    key = f"{stem_of(path)}/{number:08d}"
    if options.key:
        record.pop(options.key, None)
        key = "" if row[options.key] is None else str(row[options.key])
        if not key.strip():
            raise DamagedSample(f"the column {options.key!r} is empty, it should hold the key")
    yield key, {**members, **({"json": dump(record)} if record else {})}


def _cell_picture(root: str, table: str, cell: Any, options: Options) -> bytes:
    if isinstance(cell, dict):  # Hugging Face's column of pictures
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str) or not cell:
        raise DamagedSample(f"the column {options.picture!r} is empty or no bytes and no path ({type(cell).__name__})")
    return linked(root, table, cell, options)


# --- text and documents ------------------------------------------------------------------------------------------------------


def _plan_lines(whole: tuple[str, ...]) -> Callable[[str, Options], Iterator[Task]]:
    """.jsonl(.gz) files: an input for each line; files with the extensions `whole`: one each."""

    def plan(root: str, options: Options) -> Iterator[Task]:
        for path in files(root, options.only):
            if path.endswith(tables.JSONL):
                for number, line in enumerate(tables.lines(root, path)):
                    stem = path.removesuffix(".gz").removesuffix(".jsonl")
                    yield Task(f"{shown(path)}:{number + 1}", (path, f"{stem}/{number:08d}", line))
            elif extension(path) in whole:
                yield Task(shown(path), (path, stem_of(path), None))

    return plan


def _make_text(root: str, task: Task, options: Options) -> Iterator[Sample]:
    path, key, line = task.payload
    if line is None:
        yield key, {"txt": text(read(root, path), options.max_caption).encode()}
        return
    record = parse(line)
    content = record.pop(options.caption, None)
    if not isinstance(content, str):
        raise DamagedSample(f"its {options.caption!r} is {type(content).__name__}, expected a text (--caption names another)")
    members = {"txt": text(content, options.max_caption).encode()}
    yield key, {**members, **({"json": dump(record)} if record else {})}


def _make_document(root: str, task: Task, options: Options) -> Iterator[Sample]:
    """-> members 0.jpg, 1.png, ... and the json, whose "parts" are {"text": ...} and {"image": "0.jpg"} in reading order."""
    path, key, line = task.payload
    record = parse(read(root, path) if line is None else line)
    pieces = _pieces(record, options)
    members: dict[str, bytes] = {}
    parts: list[dict[str, str]] = []
    length = 0
    for piece in pieces:
        if "text" in piece:
            parts.append({"text": piece["text"]})
            length += len(piece["text"])
            continue
        kind, content = picture(linked(root, path, piece["image"], options), options)
        name = f"{len(members)}.{kind}"
        members[name] = content
        parts.append({"image": name})
    if not parts:
        raise DamagedSample("the document has neither text nor pictures")
    if length > options.max_caption:
        raise DamagedSample(f"the document has {length} characters, more than {options.max_caption} (--max-caption)")
    yield key, {**members, "json": dump({**record, "parts": parts})}


def _pieces(record: dict[str, Any], options: Options) -> list[dict[str, str]]:
    """The document's parts, taken out of the record: our own form, MMC4's (Zhu et al. 2023), OBELICS' (Laurencon et al. 2023)."""
    try:
        if "parts" in record:
            pieces = [{name: part[name]} for part in record.pop("parts") for name in ("text", "image") if name in part]
        elif "text_list" in record:
            record.pop("similarity_matrix", None)
            before: dict[int, list[str]] = {}
            sentences = record.pop("text_list")
            for info in record.pop("image_info"):
                if info.get("matched_sim", 1.0) >= options.min_similarity:
                    before.setdefault(info["matched_text_index"], []).append(info["image_name"])
            if wrong := [place for place in before if not 0 <= place < len(sentences)]:
                raise DamagedSample(f"a picture is matched to sentence {wrong[0]} of {len(sentences)}")
            pieces = []
            for place, sentence in enumerate(sentences):
                pieces += [{"image": name} for name in before.get(place, ())] + [{"text": sentence}]
        elif "texts" in record and "images" in record:
            pairs = list(zip(record.pop("texts"), record.pop("images"), strict=True))
            pieces = [{"image": image} if image is not None else {"text": words} for words, image in pairs if words or image]
        else:
            raise DamagedSample('expected "parts", MMC4\'s "text_list" and "image_info", or OBELICS\' "texts" and "images"')
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DamagedSample(f"the document's parts are malformed: {type(error).__name__}: {error}") from error
    if wrong := [value for piece in pieces for value in piece.values() if not isinstance(value, str)]:
        raise DamagedSample(f"a part of the document is {wrong[0]!r}, expected a text")
    return [piece for piece in pieces if next(iter(piece.values()))]


# --- video and audio ---------------------------------------------------------------------------------------------------------


def _plan_videos(root: str, options: Options) -> Iterator[Task]:
    return with_notes(root, VIDEO_EXTENSIONS)


def _plan_audio(root: str, options: Options) -> Iterator[Task]:
    return with_notes(root, AUDIO_EXTENSIONS)


def _make_media(about: Callable[[BinaryIO], dict[str, Any]], name: str) -> Callable[[str, Task, Options], Iterator[Sample]]:
    def make(root: str, task: Task, options: Options) -> Iterator[Sample]:
        path, *notes = task.payload
        content = read(root, path)
        found = about(io.BytesIO(content))
        members, record = sidecars(root, path, notes, options.max_caption, options.captions)
        yield stem_of(path), {extension(path): content, **members, "json": dump({**record, name: found})}

    return make


# --- volumes and meshes --------------------------------------------------------------------------------------------------------


def _function(module: str, name: str, what: str) -> Callable[..., Any]:
    try:
        return getattr(importlib.import_module(f"vlpfast.data.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"build: this version of vlpfast cannot read {what}: {error}") from error


def _plan_files(extensions: tuple[str, ...]) -> Callable[[str, Options], Iterator[Task]]:
    def plan(root: str, options: Options) -> Iterator[Task]:
        for path in files(root):
            if path.lower().endswith(tuple(f".{name}" for name in extensions)):
                stem = next(path[: -len(name) - 1] for name in extensions if path.lower().endswith(f".{name}"))
                notes = (
                    f"{stem}.{kind}" if os.path.isfile(os.path.join(root, f"{stem}.{kind}")) else "" for kind in ("txt", "json")
                )
                yield Task(shown(path), (path, stem, *notes))

    return plan


def _plan_nifti(root: str, options: Options) -> Iterator[Task]:
    """Every NIfTI file, but for the label maps of others. The payload's last part is the volume's label map, "" without
    options.labels."""
    volumes, maps = options.labels or ("", "")
    for task in _plan_files(("nii.gz", "nii"))(root, options):
        path = task.payload[0]
        if options.labels and (of := partner(maps, volumes, path)) and os.path.isfile(os.path.join(root, of)):
            continue
        yield Task(task.source, (*task.payload, partner(volumes, maps, path) if options.labels else ""))


def check_labels(patterns: tuple[str, ...]) -> None:
    if len(patterns) != 2 or not all("{}" in name and name.endswith((".nii", ".nii.gz")) for name in patterns):
        raise UserError(
            "build: --labels: expected two names of files with {} for what a volume's and its label map's have in common, as "
            f"imagesTr/{{}}_0000.nii.gz labelsTr/{{}}.nii.gz, got {' '.join(map(repr, patterns))}"
        )
    if patterns[0] == patterns[1]:
        raise UserError(f"build: --labels: {patterns[0]!r} names both the volume and its label map")


def partner(ours: str, theirs: str, path: str) -> str:
    """The file whose name is to the pattern `theirs` what the end of `path` is to the pattern `ours`; "" if that does not fit.

    {} in a pattern stands for the same characters each time, without a slash; at least one."""
    first, *rest = (re.escape(part) for part in ours.split("{}"))
    fits = re.fullmatch(r"((?:.*/)?)" + first + "([^/]+)" + r"\2".join(rest), path, re.DOTALL)
    return fits[1] + theirs.replace("{}", fits[2]) if fits else ""


def _plan_dicom(root: str, options: Options) -> Iterator[Task]:
    """An input for each folder that holds files."""
    for folder, _ in itertools.groupby(files(root), key=os.path.dirname):
        yield Task(shown(folder) or ".", folder)


def _with_sidecars(root: str, task: Task, options: Options, made: Mapping[str, bytes]) -> Sample:
    path, stem, *notes = task.payload[:4]
    members, record = sidecars(root, path, notes, options.max_caption, options.captions)
    if "json" in made:
        record = {**record, **parse(made["json"])}
    kept = {name: content for name, content in made.items() if name != "json"}
    return stem, {**kept, **members, **({"json": dump(record)} if record else {})}


def _make_nifti(root: str, task: Task, options: Options) -> Iterator[Sample]:
    convert = _function("medical", "nifti", "NIfTI")
    volume, _, _, _, labels = task.payload
    if not options.labels:
        yield _with_sidecars(root, task, options, convert(inside(root, volume)))
        return
    if not labels:
        raise DamagedSample(f"its name does not fit {options.labels[0]} (--labels)")
    if not os.path.lexists(os.path.join(root, labels)):
        raise DamagedSample(f"it has no label map {shown(labels)}")
    yield _with_sidecars(root, task, options, convert(inside(root, volume), labels=inside(root, labels)))


def _make_mesh(root: str, task: Task, options: Options) -> Iterator[Sample]:
    convert = _function("points", "mesh", "meshes")
    yield _with_sidecars(root, task, options, convert(inside(root, task.payload[0]), options.points))


def _make_dicom(root: str, task: Task, options: Options) -> Iterator[Sample]:
    convert = _function("medical", "dicom_series", "DICOM")
    yield from convert(os.path.join(root, task.payload), tables.reports(options) if options.reports else None)


KINDS = {
    "pictures": Kind(_plan_pictures, _make_picture, 32, 10_000, ("decode",)),
    "classes": Kind(_plan_classes, _make_classified, 32, 10_000, ("decode", "template")),
    "table": Kind(_plan_table, _make_row, 32, 10_000, ("decode", "picture", "caption", "key", "drop", "pictures"), counted=False),
    "text": Kind(_plan_lines(("txt",)), _make_text, 64, 10_000_000, ("caption",), counted=False),
    "documents": Kind(
        _plan_lines(("json",)), _make_document, 8, 1_000_000, ("decode", "pictures", "min_similarity"), counted=False
    ),
    "videos": Kind(_plan_videos, _make_media(video_info, "video"), 1, 10_000, (), ("av", "video")),
    "audio": Kind(_plan_audio, _make_media(audio_info, "audio"), 4, 10_000, (), ("soundfile", "audio")),
    "dicom": Kind(_plan_dicom, _make_dicom, 1, 10_000, ("reports", "by", "key", "caption"), ("pydicom", "medical")),
    "nifti": Kind(_plan_nifti, _make_nifti, 1, 10_000, ("labels",), ("nibabel", "medical")),
    "meshes": Kind(_plan_files(_MESHES), _make_mesh, 4, 10_000, ("points",), ("trimesh", "points")),
}
