"""Documents: long texts, and texts with pictures in between, cut to windows and packed into the rows of a batch.

A document sample of a shard has a json member with "parts", {"text": ...} or {"image": MEMBER} in reading order, and a member for
each picture (0.jpg, 1.png, ...), as `vlpfast-data build documents` writes them. A text sample has the member txt.

From samples to a batch: `text_document` or `interleaved_document` for each, `window`, then `pack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vlpfast.data.masking import IGNORED
from vlpfast.data.order import uniform
from vlpfast.data.pictures import DamagedSample
from vlpfast.data.tokenizer import TextTokenizer
from vlpfast.types import Batch

_DRAW = 1 << 23  # of a sample's draws, those from here on belong to its window
_PICTURE, _SHIFT, _START = range(_DRAW, _DRAW + 3)


class Document(NamedTuple):
    """L tokens with P pictures among them."""

    ids: np.ndarray  # [L] int64
    slots: np.ndarray  # [P] int64 place of each picture's first token, ascending
    members: list[str]  # [P] extension of the member that holds it


def text_document(text: str, tokenizer: TextTokenizer) -> Document:
    """bos, the text uncut, eos."""
    (ids,) = tokenizer.pieces([text])
    return Document(np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]), np.empty(0, np.int64), [])


def interleaved_document(
    record: dict[str, Any],
    tokenizer: TextTokenizer,
    *,
    image_id: int,
    tokens_per_image: int = 1,
    end_id: int | None = None,
    max_images: int | None = None,
) -> Document:
    """bos, the parts, eos; each picture is `tokens_per_image` times `image_id` (whose embeddings the model puts its features
    over).

    record: the sample's JSON. end_id: closes a picture's text, before the next picture and at the document's end (Flamingo's
    <|endofchunk|>). max_images: those after it are left out, their text stays. Raises DamagedSample for malformed parts."""
    if tokens_per_image < 1:
        raise ValueError(f"tokens_per_image: expected at least 1, got {tokens_per_image}")
    parts = record.get("parts")
    if not isinstance(parts, list) or not all(_is_part(part) for part in parts):
        raise DamagedSample('the json has no list "parts" of {"text": ...} and {"image": ...}')
    texts = [part["text"] for part in parts if "text" in part]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # "\ud800": JSON can say what no text may hold, and tokenizers refuse
        raise DamagedSample(f'"parts" in the json member hold what is not a text: {error}') from error
    words = iter(tokenizer.pieces(texts))
    ids: list[int] = [tokenizer.bos_id]
    slots: list[int] = []
    members: list[str] = []
    open_text = False  # text since a picture that no end_id has closed
    for part in parts:
        if "text" in part:
            tokens = next(words).tolist()
            ids += tokens
            open_text = bool(slots) and (open_text or bool(tokens))
        elif max_images is None or len(slots) < max_images:
            if open_text and end_id is not None:
                ids.append(end_id)
            open_text = False
            slots.append(len(ids))
            members.append(part["image"])
            ids += [image_id] * tokens_per_image
    if open_text and end_id is not None:
        ids.append(end_id)
    return Document(np.array([*ids, tokenizer.eos_id], np.int64), np.array(slots, np.int64), members)


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and len(part) == 1 and isinstance(part.get("text", part.get("image")), str)


def window(
    document: Document,
    length: int,
    index: int,
    *,
    seed: int,
    epoch: int,
    train: bool,
    tokens_per_image: int = 1,
    most_shift: int = 20,
) -> Document:
    """At most `length` tokens of the document in a row, and the pictures that are whole in them; a shorter one is left as it is.

    Training: of a document with pictures, the window begins at a random one of them or up to `most_shift` tokens before it
    (CoSMo), of a text anywhere, evenly; what is drawn is a function of (seed, epoch, index) alone. Evaluation: the beginning. No
    picture is cut: the window gets shorter instead."""
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    total = len(document.ids)
    if total <= length:
        return document

    def draw(below: int, which: int) -> int:
        return int(uniform(seed, epoch, np.array([index]), which)[0] * below)

    start = 0
    if train and len(document.slots):
        start = int(document.slots[draw(len(document.slots), _PICTURE)]) - draw(most_shift + 1, _SHIFT)
    elif train:
        start = draw(total - length + 1, _START)
    start = min(max(start, 0), total - length)
    end = start + length
    ends = document.slots + tokens_per_image
    if (cut := (document.slots < start) & (start < ends)).any():
        start = int(ends[cut][0])
    if (cut := (document.slots < end) & (end < ends)).any():
        end = int(document.slots[cut][0])
    inside = (document.slots >= start) & (ends <= end)
    members = [member for member, keep in zip(document.members, inside.tolist(), strict=True) if keep]
    return Document(document.ids[start:end], document.slots[inside] - start, members)


def pack_rows(lengths: Sequence[int], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Each document goes into the first of `rows` rows of `length` tokens that has room for it, until one has no room anywhere.

    -> row and first place of those that were packed, int64 [K] each. They are the first K documents, so a reader's position stays
    one number: the next batch begins with document K. K >= 1 unless there are none. ValueError: a document longer than a row."""
    room = [length] * rows
    places: list[tuple[int, int]] = []
    for number, needed in enumerate(lengths):
        if not 1 <= needed <= length:
            raise ValueError(f"lengths: expected 1 .. {length}, got {needed} for document {number}")
        row = next((row for row, free in enumerate(room) if free >= needed), None)
        if row is None:
            break
        places.append((row, length - room[row]))
        room[row] -= needed
    packed = np.array(places, np.int64).reshape(-1, 2)
    return packed[:, 0], packed[:, 1]


def pack(documents: Sequence[Document], rows: int, length: int, *, pad_id: int, tokens_per_image: int = 1) -> tuple[Batch, int]:
    """Documents of at most `length` tokens in `rows` rows -> fields of a batch, and K: the first K documents are in it.

    text [B, L] int64, text_mask [B, L] bool; positions [B, L] int64, counted from 0 in each document, 0 at padding; cu_seqlens [S
    + 1] int32: in text.flatten() the documents one after the other, and a row's padding as a sequence of its own, so that
    attention over text.flatten() with it keeps all apart; labels [B, L]: the ids, IGNORED at the first token of each document, at
    pictures and padding; document [S] int64: which one each sequence is, -1: padding; image_slots [P] int64: the place in
    text.flatten() of each picture's first token, ascending; image_of [P, 2] int64: its document and its number in it."""
    row, start = pack_rows([len(document.ids) for document in documents], rows, length)
    text = np.full(rows * length, pad_id, np.int64)
    mask = np.zeros(rows * length, bool)
    positions = np.zeros(rows * length, np.int64)
    labels = np.full(rows * length, IGNORED, np.int64)
    filled = np.zeros(rows, np.int64)
    begins: list[tuple[int, int]] = []  # first place, document
    slots: list[tuple[int, int, int]] = []  # place, document, number in it
    for number, (at_row, at) in enumerate(zip(row.tolist(), start.tolist(), strict=True)):
        ids, own, _ = documents[number]
        begin, end = at_row * length + at, at_row * length + at + len(ids)
        text[begin:end], mask[begin:end], positions[begin:end] = ids, True, np.arange(len(ids))
        labels[begin + 1 : end] = ids[1:]
        labels[begin + (own[:, None] + np.arange(tokens_per_image)).ravel()] = IGNORED
        filled[at_row] = at + len(ids)
        begins.append((begin, number))
        slots += [(begin + int(slot), number, place) for place, slot in enumerate(own)]
    begins += [(at_row * length + int(at), -1) for at_row, at in enumerate(filled) if at < length]
    begins.sort()
    slots.sort()
    places = np.array(slots, np.int64).reshape(-1, 3)
    batch: Batch = {
        "text": torch.from_numpy(text.reshape(rows, length)),
        "text_mask": torch.from_numpy(mask.reshape(rows, length)),
        "positions": torch.from_numpy(positions.reshape(rows, length)),
        "text_labels": torch.from_numpy(labels.reshape(rows, length)),
        "cu_seqlens": torch.tensor([*(begin for begin, _ in begins), rows * length], dtype=torch.int32),
        "document": torch.tensor([number for _, number in begins], dtype=torch.int64),
        "image_slots": torch.from_numpy(places[:, 0].copy()),
        "image_of": torch.from_numpy(places[:, 1:].copy()),
    }
    return batch, len(row)


def chunk_labels(batch: Batch, *, image_id: int, end_id: int) -> torch.Tensor:
    """The labels of a packed batch, without the text that belongs to no picture: what comes before a document's first picture,
    and after an end_id up to the next one (Flamingo, CoSMo). -> [B, L] int64."""
    ids = batch["text"].numpy().ravel()
    place = np.arange(len(ids))
    first = place - batch["positions"].numpy().ravel()  # of the document that a token is in
    picture = np.maximum.accumulate(np.where(ids == image_id, place, -1))  # the last one so far
    closed = np.maximum.accumulate(np.where(ids == end_id, place, -1))
    closed = np.concatenate([[-1], closed[:-1]])  # before this token: the end_id itself is asked for
    belongs = (picture >= first) & (closed < picture)
    labels = batch["text_labels"]
    return torch.where(torch.from_numpy(belongs).view_as(labels), labels, IGNORED)
