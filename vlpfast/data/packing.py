"""Documents packed into the rows of batches: the loader of DataSpec.documents. What a document is, and how it is cut and packed,
is in documents.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlpfast.data.documents import Document, chunk_labels, interleaved_document, pack, pack_rows, text_document, window
from vlpfast.data.images import PICTURE_DRAWS
from vlpfast.data.loader import Plan, Sample, ShardLoader, parse_json
from vlpfast.data.modality import Draws, Modality
from vlpfast.data.pictures import DamagedBatch, DamagedSample
from vlpfast.data.position import Position
from vlpfast.data.tokenizer import TextTokenizer
from vlpfast.types import Batch, DataSpec, DocumentSpec, ImageSpec, UserError

_LOOK_AT = 64  # documents whose lengths say how many batches an epoch has


class _Read(NamedTuple):
    """A document that can be used."""

    index: int
    ticket: int
    consumed: int  # tickets up to this one, from where its batch begins
    record: dict[str, Any]
    document: Document


def check_documents(spec: DataSpec, tokenizer: TextTokenizer | None) -> None:
    """Raises UserError, or ValueError for a missing tokenizer."""
    own = spec.documents
    if tokenizer is None:
        raise ValueError(f"tokenizer: the documents are written with {own.tokenizer!r}, there is none")
    beside = [name for name in ("text", "texts", "targets", "video", "audio", "volume", "points") if getattr(spec, name)]
    if beside:
        raise UserError(f"documents: packed rows hold nothing else, expected data.{beside[0]} to be empty (null)")
    if (image := spec.image) is not None and (image.pictures > 1 or image.boxes or image.views or image.local_views):
        raise UserError("documents: expected one view of each picture (data.image.views, local_views, pictures) and no boxes")
    if own.tokens_per_image < 1:
        raise UserError(f"documents.tokens_per_image: expected at least 1, got {own.tokens_per_image}")
    if own.length < max(4, 2 * own.tokens_per_image):
        least = max(4, 2 * own.tokens_per_image)
        raise UserError(f"documents.length: expected at least {least} (4, and two pictures), got {own.length}")
    for name in ("max_images", "most_shift"):
        if getattr(own, name) < 0:
            raise UserError(f"documents.{name}: expected 0 or more, got {getattr(own, name)}")
    for name in ("image_token", "end_token"):
        token = getattr(own, name)
        if token not in tokenizer.extra and (token or (name == "image_token" and spec.image is not None)):
            known = ", ".join(tokenizer.extra) or "(none)"
            raise UserError(f"documents.{name}: expected a special token of the model, one of {known}, got {token!r}")
    if own.asked not in ("all", "pictured"):
        raise UserError(f'documents.asked: expected "all" or "pictured", got {own.asked!r}')
    if own.asked == "pictured" and (spec.image is None or not own.end_token):
        raise UserError("documents.asked=pictured needs pictures and an end_token, which says where a picture's text ends")


class DocumentLoader(ShardLoader):
    """Batches of `batch_size` rows, each with as many whole documents as fit; Batch["index"] and ["key"] are theirs, as
    Batch["document"] numbers them. Training drops what does not fill the last batch of an epoch. The position is the number of
    documents behind it, as exact as any loader's. len() is an estimate from the first documents' lengths."""

    def __init__(self, *arguments: Any, documents: DocumentSpec, image: ImageSpec | None, tokenizer: TextTokenizer) -> None:
        super().__init__(*arguments)
        self._own, self._tokenizer = documents, tokenizer
        self._texts = _Packed()
        self._pictured = "image" in self._makers
        self._makers = {name: lambda make=make: _Pictures(make(), self.batch_size, image) for name, make in self._makers.items()}
        looked_at = list(range(min(len(self._shards), _LOOK_AT)))
        lengths = [len(read.document.ids) for read in self._documents(np.array(looked_at), Position(), 0)]
        self._damaged.clear()
        tokens = np.mean(lengths) if lengths else 1.0
        of_rank = len(self._shards) / self._identity["world_size"]
        self._batches = max(1, round(of_rank * tokens / (self.batch_size * documents.length)))

    def __len__(self) -> int:
        return self._batches

    def _plan(self, modalities: dict[str, Modality], start: Position) -> Plan | None:
        position = start
        left_out: list[int] = []
        rows, length = self.batch_size, self._own.length
        while True:
            begun, seen, packed, full = position, 0, 0, False
            found: list[_Read] = []
            taken = np.empty(0, np.int64)
            while not full and seen <= len(self._shards) + rows * length:
                more, position = self._course.take(position, rows)
                if not len(more):
                    break
                taken = np.concatenate([taken, more])
                found += self._documents(more, begun, seen)
                seen += len(more)
                lengths = [len(read.document.ids) for read in found]
                packed = len(pack_rows(lengths, rows, length)[0])
                full = packed < len(found) or rows * length - sum(lengths) < 2 * rows  # bos and eos fit nowhere
            if full or (found and not self._train):
                found = found[:packed]
                consumed = found[-1].consumed if full else seen
                _, position = self._course.take(begun, consumed)
                behind = (taken[:consumed] % len(self._shards)).tolist()
                left_out += [index for index in behind if index in self._damaged]
                return self._packed(start, self._course.finished(position), found, left_out)
            left_out += [index for index in (taken % len(self._shards)).tolist() if index in self._damaged]
            if seen and self._course.untouched(begun):
                reasons = "; ".join(f"{self._shards.name(index)}: {self._damaged[index]}" for index in left_out[:3])
                raise UserError(
                    f"the documents do not fill one batch of {rows} rows of {length} tokens: {len(found)} of this rank's {seen} "
                    f"can be used, {len(left_out)} are damaged ({reasons})"
                )
            if not self._train:
                self._left_out_last = left_out
                return None
            position = self._course.next_epoch(begun)

    def _packed(self, start: Position, end: Position, found: Sequence[_Read], left_out: list[int]) -> Plan:
        index = np.array([read.index for read in found])
        batch: Batch = {"index": torch.from_numpy(index), "key": [self._shards.key(read.index) for read in found]}
        if self._with_meta:
            batch["meta"] = [read.record for read in found]
        if self._mixture is not None:
            batch["source"] = torch.from_numpy(self._mixture.source_of(index))
        samples = [Sample(read.index, read.document, read.record, {}, {}) for read in found]
        return Plan(start, end, samples, np.array([read.ticket for read in found]), left_out, batch)

    def _submit(self, modalities: dict[str, Modality], plan: Plan) -> None:
        own, tokenizer = self._own, self._tokenizer
        documents = [sample.texts for sample in plan.samples]
        options = {"pad_id": tokenizer.pad_id, "tokens_per_image": own.tokens_per_image}
        fields, _ = pack(documents, self.batch_size, own.length, **options)
        if own.asked == "pictured":
            ids = {"image_id": tokenizer.extra[own.image_token], "end_id": tokenizer.extra[own.end_token]}
            fields["text_labels"] = chunk_labels(fields, **ids)
        self._texts.submit(fields)
        if not self._pictured:
            return
        where = fields["image_of"].tolist()  # [P] of document, number
        contents = [self._picture(plan.samples[of].index, documents[of].members[number]) for of, number in where]
        index = np.array([plan.tickets[of] + number * PICTURE_DRAWS for of, number in where], np.int64)
        draws = Draws(self._seed, plan.end.epoch, index, self._train)
        plan.batch |= modalities["image"].submit(contents, [of for of, _ in where], [], draws)

    def _picture(self, index: int, member: str) -> np.ndarray | None:
        return self._shards.read([index], (member,))[0]

    def _documents(self, tickets: np.ndarray, position: Position, before: int) -> list[_Read]:
        """Those that can be used, as far as can be told without decoding; the others are noted in _damaged."""
        indices = (tickets % len(self._shards)).tolist()
        texts, records = self._shards.read(indices, ("txt",)), self._shards.read(indices, ("json",))
        found = []
        for place, (index, ticket) in enumerate(zip(indices, tickets.tolist(), strict=True)):
            try:
                if index in self._damaged:
                    continue
                if problem := self._shards.problem(index):
                    raise DamagedSample(problem)
                if (name := self._shards.name(index)) in self.skipped:
                    raise DamagedSample(self.skipped[name])
                record = parse_json(records[place])
                document = self._cut(self._document(index, texts[place], record), ticket, position)
            except DamagedSample as error:
                self._damaged[index] = str(error)
            else:
                found.append(_Read(index, ticket, before + place + 1, record, document))
        return found

    def _document(self, index: int, text: np.ndarray | None, record: dict[str, Any]) -> Document:
        own, extra = self._own, self._tokenizer.extra
        if "parts" not in record:
            if text is None:
                raise DamagedSample('no document (a member txt, or a member json with "parts")')
            try:
                return text_document(text.tobytes().decode("utf-8"), self._tokenizer)
            except UnicodeDecodeError as error:
                raise DamagedSample(f"the text is not UTF-8: {error}") from error
        document = interleaved_document(
            record,
            self._tokenizer,
            image_id=extra.get(own.image_token, -1),
            tokens_per_image=own.tokens_per_image,
            end_id=extra.get(own.end_token),
            max_images=(own.max_images or None) if self._pictured else 0,
        )
        if missing := [member for member in document.members if member not in self._shards.extensions(index)]:
            raise DamagedSample(f"it has no member {missing[0]!r}, which its parts name")
        return document

    def _cut(self, document: Document, ticket: int, position: Position) -> Document:
        own = self._own
        options = {"tokens_per_image": own.tokens_per_image, "most_shift": own.most_shift}
        where = {"seed": self._seed, "epoch": position.epoch, "train": self._train}
        return window(document, own.length, ticket, **where, **options)


class _Packed:
    """In the place of the texts: tokens that need no more work."""

    captions, json = False, True

    def __init__(self) -> None:
        self._submitted: deque[dict[str, Tensor]] = deque()

    def submit(self, fields: dict[str, Tensor]) -> None:
        self._submitted.append(fields)

    def receive(self) -> dict[str, Tensor]:
        return dict(self._submitted.popleft())

    def reset(self) -> None:
        self._submitted.clear()


class _Pictures:
    """A modality over the pictures of a batch, which are any number: in parts of at most `most`. infos: the document of each."""

    def __init__(self, pictures: Modality, most: int, spec: ImageSpec) -> None:
        self._pictures, self._most, self._spec = pictures, most, spec
        self._submitted: deque[tuple[int, list[int], dict[int, str]]] = deque()  # parts, documents, what the headers told

    def submit(self, contents: list[np.ndarray], infos: list[int], records: list[Any], draws: Draws) -> dict[str, Tensor]:
        damaged: dict[int, str] = {}
        sizes: list[Any] = []
        for content, of in zip(contents, infos, strict=True):
            try:
                sizes.append(self._pictures.inspect(content, {}))
            except DamagedSample as error:
                damaged.setdefault(of, str(error))
        starts = range(0, len(contents), self._most) if not damaged else range(0)
        parts: list[dict[str, Tensor]] = []
        for start in starts:
            part = slice(start, start + self._most)
            own = draws._replace(index=draws.index[part])
            parts.append(self._pictures.submit(contents[part], sizes[part], [], own))
        self._submitted.append((len(parts), infos, damaged))
        none = {"crop": torch.empty(0, 5)}
        if draws.train and self._spec.augment.rand_augment is not None:
            none["warp"] = torch.empty(0, 2, 3)
        return _joined(parts) if parts else none

    def receive(self) -> dict[str, Tensor]:
        parts, documents, damaged = self._submitted.popleft()
        made = []
        for number in range(parts):
            try:
                made.append(self._pictures.receive())
            except DamagedBatch as error:
                damaged |= {documents[number * self._most + place]: reason for place, reason in error.reasons.items()}
        if damaged:
            raise DamagedBatch(damaged)
        return _joined(made) if made else {"image": torch.empty(0, 3, self._spec.size, self._spec.size)}

    def reset(self) -> None:
        self._submitted.clear()
        self._pictures.reset()

    def close(self) -> None:
        self._pictures.close()


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
