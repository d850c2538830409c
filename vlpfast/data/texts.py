"""The texts and targets of a sample: templates over its JSON, written out, tokenised, hidden in parts; classes and numbers.

What a sample must hold is looked at as a whole when it is read (`inspect`), whatever is drawn later, so the same samples count as
damaged in every epoch. All choices are functions of (seed, epoch, index); evaluation makes none: it takes the first of every list
and hides nothing.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from vlpfast.data.masking import join_prompt_answer, mask_tokens
from vlpfast.data.modality import Draws
from vlpfast.data.order import random_bits, uniform
from vlpfast.data.pictures import DamagedBatch, DamagedSample
from vlpfast.data.targets import Targets
from vlpfast.data.templates import CAPTION, Path, Template, Tree, innermost, leaf, leaves, parse_template, resolve
from vlpfast.types import Batch, DataSpec, TextSpec, Tokenizer, UserError

_DRAW = 1 << 40  # far from what pictures, masks and orders draw; the lists' and texts' checksums count on from here
_REMOVED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")


class Info(NamedTuple):
    """What a sample says."""

    source: int
    fields: dict[Path, Tree]
    targets: dict[str, Tree]


class _Written(NamedTuple):
    """The rows of a text in a batch."""

    sample: np.ndarray  # int64 [A] whose row it is
    weight: list[float]
    prompts: list[Template]  # without fields: texts and ids
    answers: list[Template]


class Texts:
    """Every text and target that a DataSpec names, in the place of a modality (modality.Modality): inspect, submit, receive.

    tokenizers: by name, "" the default. templates, answers: what TextSpec.templates and .answer are in samples of a source, by
    its number, then by the text's name. Raises UserError for a specification that makes no sense, ValueError for a missing
    tokenizer.
    """

    def __init__(
        self,
        spec: DataSpec,
        tokenizers: Mapping[str, Tokenizer],
        templates: Sequence[Mapping[str, Sequence[str]]] = (),
        answers: Sequence[Mapping[str, Sequence[str]]] = (),
    ) -> None:
        self.specs = texts_of(spec)
        self.targets = Targets(spec.targets)
        _check_names(self.specs, spec)
        self._texts = {}
        for name, text in self.specs.items():
            if text.tokenizer not in tokenizers or tokenizers[text.tokenizer] is None:
                known = ", ".join(repr(known) for known, tokenizer in tokenizers.items() if tokenizer is not None) or "none"
                raise ValueError(f"tokenizer: the text {name!r} is written with {text.tokenizer!r}, there is {known}")
            own = [(of.get(name), to.get(name)) for of, to in zip(templates, answers, strict=True)]
            self._texts[name] = _Text(name, text, tokenizers[text.tokenizer], own)
        for what, named in (("templates", templates), ("answers", answers)):
            if unknown := {name for of in named for name in of} - self.specs.keys():
                raise UserError(f"{what} of an unknown text {min(unknown)!r}; the texts are {', '.join(self.specs) or '(none)'}")
        self.sources = max(1, len(templates))
        self._paths = [
            {path: None for text in self._texts.values() for path in text.paths(source)} for source in range(self.sources)
        ]
        self._in_rows = [text for text in self._texts.values() if text.spec.every]
        self._submitted: deque[tuple[list[Info], Draws]] = deque()

    @property
    def captions(self) -> bool:
        """Whether the member txt is wanted."""
        return any(CAPTION in paths for paths in self._paths)

    @property
    def json(self) -> bool:
        """Whether the member json is wanted even of samples with a txt."""
        return bool(self.targets.names) or any(paths.keys() - {CAPTION} for paths in self._paths)

    def members(self, source: int) -> dict[str, tuple[str, ...]]:
        """What each text and target of a source is made from: members of which a sample must have one."""
        found = {name: text.paths(source) for name, text in self._texts.items()}
        wanted = {name: ("json",) if paths - {CAPTION} else ("txt", "json") for name, paths in found.items() if paths}
        return wanted | dict.fromkeys(self.targets.names, ("json",))

    def inspect(self, caption: np.ndarray | None, record: dict[str, Any], source: int = 0) -> Info:
        """caption: the bytes of the member txt, None if there is none or nobody asked for it; record: the JSON. Raises
        DamagedSample."""
        source = source if self.sources > 1 else 0
        found = {}
        for path in self._paths[source]:
            if caption is None or path != CAPTION:
                found[path] = _text_field(record, path)
                continue
            try:
                found[path] = caption.tobytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise DamagedSample(f"the caption is not UTF-8: {error}") from error
        for text in self._in_rows:
            text.check(found, source)
        return Info(source, found, self.targets.inspect(record) if self.targets.names else {})

    def submit(self, infos: list[Info], draws: Draws) -> None:
        self._submitted.append((infos, draws))

    def receive(self) -> dict[str, Tensor]:
        """The fields of the oldest batch. Raises DamagedBatch."""
        infos, draws = self._submitted.popleft()
        choice = _Choice(draws)
        fields: dict[str, Tensor] = {}
        for text in self._texts.values():
            fields |= text.fields(infos, choice)
        return fields | self.targets.fields([info.targets for info in infos], choice.pick)

    def reset(self) -> None:
        self._submitted.clear()

    def say(self, info: Info) -> dict[str, list[str]]:
        """Every text of a sample in all its templates and with every element of its lists: what a tokenizer is trained on."""
        return {name: text.say(info) for name, text in self._texts.items()}


class _Choice:
    """The draws of a batch: one of `count`, for each sample and purpose."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self._drawn: dict[str, np.ndarray] = {}  # purpose -> float64 [B]

    def pick(self, row: int, purpose: str, count: int) -> int:
        if count == 1 or not self.draws.train:
            return 0
        if purpose not in self._drawn:
            number = _DRAW + crc32(purpose.encode())
            self._drawn[purpose] = uniform(self.draws.seed, self.draws.epoch, self.draws.index, number)
        return int(self._drawn[purpose][row] * count)


class _Text:
    """One text. own: for each source its templates and answers, None where they are the specification's."""

    def __init__(
        self,
        name: str,
        spec: TextSpec,
        tokenizer: Tokenizer,
        own: Sequence[tuple[Sequence[str] | None, Sequence[str] | None]],
    ) -> None:
        _check(name, spec)
        self.name, self.spec, self.tokenizer = name, spec, tokenizer
        special = getattr(tokenizer, "extra", {})

        def parsed(of: str, texts: Sequence[str]) -> list[Template]:
            return [parse_template(text, special, f"{name}.{of}") for text in texts]

        both = [(spec.templates if of is None else of, spec.answer if to is None else to) for of, to in own or [(None, None)]]
        self._templates = [parsed("templates", of) for of, _ in both]  # [sources][templates]
        self._answers = [parsed("answer", to) for _, to in both]
        for templates, answers in zip(self._templates, self._answers, strict=True):
            if not templates:
                raise UserError(f"{name}.templates: expected at least one, got none")
            if bool(answers) != bool(self._answers[0]):
                raise UserError(f"{name}.answer: expected one in every source or in none")
        self._answered = bool(self._answers[0])
        if self._answered and spec.mask is not None:
            raise UserError(f"{name}: answer and mask both say what {name}_labels asks for, expected one of them")
        if spec.context_length < 2 + self._answered:
            least = f"{2 + self._answered} (bos{', an answer' * self._answered} and eos)"
            raise UserError(f"{name}.context_length: expected at least {least}, got {spec.context_length}")
        ids = any(isinstance(part, int) for templates in self._templates for template in templates for part in template)
        # Without any of these the tokenizer's own encode does it all, whatever kind of tokenizer it is.
        self._plain = not (ids or self._answered or spec.mask is not None or spec.drop == "start")
        if not self._plain and not hasattr(tokenizer, "pieces"):
            raise ValueError(
                f"tokenizer: the text {name!r} needs pieces and words of a TextTokenizer, {type(tokenizer).__name__} has none"
            )
        if spec.mask is not None:
            if tokenizer.mask_id is None:
                raise UserError(f"{name}.mask: the tokenizer {spec.tokenizer!r} has no mask token")
            self._replacements = tokenizer.ordinary_ids

    def _of(self, source: int) -> tuple[list[Template], list[Template]]:
        source = min(source, len(self._templates) - 1)
        return self._templates[source], self._answers[source]

    def paths(self, source: int) -> set[Path]:
        templates, answers = self._of(source)
        return {part for template in (*templates, *answers) for part in template if isinstance(part, tuple)}

    def check(self, found: Mapping[Path, Tree], source: int) -> None:
        """Raises DamagedSample for a sample whose rows this text cannot be made from (TextSpec.every), whatever is drawn."""
        lists = {one.path: one for path in self.paths(source) for one in innermost(found[path])}
        if len(lists) != 1:
            got = f"those of {' and '.join(sorted(lists))}" if lists else "none"
            raise DamagedSample(f"{self.name}: expected the elements of one list in its fields, got {got}")
        for path in self.paths(source):
            for one in innermost(found[path]):
                one.weights()

    def fields(self, infos: Sequence[Info], choice: _Choice) -> dict[str, Tensor]:
        written = self._write(infos, choice)
        name, train = self.name, choice.draws.train
        made: dict[str, Tensor] = {}
        if self._plain:
            texts = ["".join(parts) for parts in written.prompts]
            made[name], made[f"{name}_mask"] = self.tokenizer.encode(texts, self.spec.context_length)
        elif self._answered:
            made = self._join(written)
        else:
            ids, mask, units = self._rows(written.prompts)
            made = {name: ids, f"{name}_mask": mask}
            if self.spec.mask is not None and train:
                made[f"{name}_masked"], made[f"{name}_labels"] = self._mask(ids, units, written, choice.draws)
        if self.spec.every:
            made[f"{name}_of"] = torch.from_numpy(written.sample)
            made[f"{name}_weight"] = torch.tensor(written.weight, dtype=torch.float32)
        return made

    # --- words ------------------------------------------------------------------------------------------------------------

    def _write(self, infos: Sequence[Info], choice: _Choice) -> _Written:
        sample, weight, prompts, answered = [], [], [], []
        for row, info in enumerate(infos):
            templates, answers = self._of(info.source)
            # One template for all rows of a sample: they are one question, asked once.
            template = templates[choice.pick(row, f"template {self.name}", len(templates))]
            answer = answers[choice.pick(row, f"answer {self.name}", len(answers))] if answers else ()

            def drawn(path: str, count: int, row: int = row) -> int:
                return choice.pick(row, f"list {path}", count)

            elements, weights = [drawn], [1.0]
            if self.spec.every:
                elements, weights = self._elements(info, drawn)
            for choose, own in zip(elements, weights, strict=True):
                sample.append(row)
                weight.append(own)
                prompts.append(self._fill(template, info, choose))
                answered.append(self._fill(answer, info, choose))
        return _Written(np.array(sample, np.int64), weight, prompts, answered)

    def _elements(self, info: Info, drawn: Any) -> tuple[list[Any], list[float]]:
        """A way to choose for each element of the list whose elements are rows, and their weights."""
        for path in sorted(self.paths(info.source)):
            _, lists = leaf(info.fields[path], drawn)
            if lists:
                break
        mine = lists[-1]
        ways = [
            lambda path, count, element=element: element if path == mine.path else drawn(path, count)
            for element in range(len(mine.items))
        ]
        return ways, mine.weights()

    def _fill(self, template: Template, info: Info, choose: Any) -> Template:
        """Fields become texts, and what stands side by side one text."""
        parts: list[str | int] = []
        for part in template:
            if isinstance(part, tuple):
                part = self._cleaned(leaf(info.fields[part], choose)[0])
            if parts and isinstance(part, str) and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
        return parts

    def _cleaned(self, text: str) -> str:
        if self.spec.clean:
            text = " ".join(text.lower().translate(_REMOVED).split())
        if self.spec.max_words:
            words = list(re.finditer(r"\S+", text))
            text = text[: words[self.spec.max_words - 1].end()] if len(words) > self.spec.max_words else text
        return text

    def say(self, info: Info) -> list[str]:
        said = []
        for template in (way for of in self._of(info.source) for way in of):
            fields = [part for part in template if isinstance(part, tuple)]
            count = max((len(leaves(info.fields[path])) for path in fields), default=1)
            for number in range(count):
                texts = [""]
                for part in template:
                    if isinstance(part, int):  # a special token divides the text
                        texts.append("")
                    elif isinstance(part, tuple):
                        values = leaves(info.fields[part])
                        texts[-1] += self._cleaned(values[number % len(values)])
                    else:
                        texts[-1] += part
                said += [text for text in texts if text.strip()]
        return said

    # --- tokens -----------------------------------------------------------------------------------------------------------

    def _pieces(self, rows: Sequence[Template]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of each row without bos and eos, and which tokens are one unit to hide: its numbers, -1 at special tokens."""
        texts = [part for parts in rows for part in parts if isinstance(part, str)]
        words = self.spec.mask is not None and self.spec.mask.words
        found = self.tokenizer.piece_words(texts) if words else [(ids, None) for ids in self.tokenizer.pieces(texts)]
        given = iter(found)
        made = []
        for parts in rows:
            ids, units = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
            first = 0
            for part in parts:
                if isinstance(part, int):
                    ids.append(np.array([part], np.int64))
                    units.append(np.array([-1], np.int64))
                    continue
                piece, own = next(given)
                own = np.arange(len(piece)) if own is None else own
                ids.append(piece)
                units.append(own + first)
                first += int(own.max(initial=-1)) + 1
            made.append((np.concatenate(ids), np.concatenate(units)))
        return made

    def _rows(self, rows: Sequence[Template]) -> tuple[Tensor, Tensor, Tensor]:
        """-> ids, mask and units [A, L]"""
        tokenizer, length = self.tokenizer, self.spec.context_length
        ids = np.full((len(rows), length), tokenizer.pad_id, np.int64)
        mask = np.zeros(ids.shape, bool)
        units = np.full(ids.shape, -1, np.int64)
        for row, (piece, own) in enumerate(self._pieces(rows)):
            kept = slice(max(0, len(piece) - length + 2), None) if self.spec.drop == "start" else slice(length - 2)
            piece, own = piece[kept], own[kept]
            end = len(piece) + 1
            ids[row, 0], ids[row, 1:end], ids[row, end] = tokenizer.bos_id, piece, tokenizer.eos_id
            units[row, 1:end] = own
            mask[row, : end + 1] = True
        # An unknown character's token, say, is special too.
        units[np.isin(ids, tokenizer.special_ids)] = -1
        return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(units)

    def _join(self, written: _Written) -> dict[str, Tensor]:
        prompts, answers = ([ids for ids, _ in self._pieces(rows)] for rows in (written.prompts, written.answers))
        empty = {int(written.sample[row]) for row, answer in enumerate(answers) if not len(answer)}
        if empty:
            raise DamagedBatch({sample: f"{self.name}: nothing is left of an answer when it is tokenised" for sample in empty})
        special = {of: getattr(self.tokenizer, of) for of in ("bos_id", "eos_id", "pad_id")}
        ids, mask, labels = join_prompt_answer(prompts, answers, self.spec.context_length, **special)
        return {self.name: ids, f"{self.name}_mask": mask, f"{self.name}_labels": labels}

    def _mask(self, ids: Tensor, units: Tensor, written: _Written, draws: Draws) -> tuple[Tensor, Tensor]:
        mask = self.spec.mask
        # Texts of a sample, and rows of a text, are hidden independently.
        seed = int(random_bits(draws.seed, 0, np.array([crc32(self.name.encode())]), _DRAW)[0])
        index = draws.index[written.sample]
        if self.spec.every:
            starts = np.searchsorted(written.sample, written.sample)
            number = np.arange(len(starts)) - starts  # of the row in its sample
            index = (random_bits(seed, 0, index, number) >> np.uint64(1)).astype(np.int64)
        return mask_tokens(
            ids,
            units,
            torch.from_numpy(index),
            mask_id=self.tokenizer.mask_id,
            replacements=self._replacements,
            seed=seed,
            epoch=draws.epoch,
            rate=mask.rate,
            exact=mask.exact,
            longest=mask.longest,
            shares=tuple(mask.shares),
        )


def texts_of(spec: DataSpec) -> dict[str, TextSpec]:
    """All texts by name."""
    return ({} if spec.text is None else {"text": spec.text}) | spec.texts


def _text_field(record: dict[str, Any], path: Path) -> Tree:
    if path == CAPTION and not isinstance(record.get("caption"), str | list):
        raise DamagedSample('no caption (a member txt, or a member json with a text "caption")')
    dotted = ".".join(path)

    def text(value: Any) -> str:
        if not isinstance(value, str):
            raise DamagedSample(f'"{dotted}" in the json member is a {type(value).__name__}, expected a text')
        # The caption may be empty: so a sample says that there is nothing to say.
        if path != CAPTION and not value.strip():
            raise DamagedSample(f'"{dotted}" in the json member is empty')
        try:
            value.encode()
        except UnicodeEncodeError as error:  # "\ud800": JSON can say what no text may hold, and tokenizers refuse
            raise DamagedSample(f'"{dotted}" in the json member is not a text: {error}') from error
        return value

    return resolve(record, path, text)


def _check_names(texts: Mapping[str, TextSpec], spec: DataSpec) -> None:
    """Raises UserError for names that two fields of a batch would have."""
    taken = dict.fromkeys(Batch.__annotations__.keys() - {name for name in Batch.__annotations__ if name.split("_")[0] == "text"})
    for name in (*texts, *spec.targets):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"expected a name of small letters, digits and _ for a text or target, got {name!r}")
    if "text" in spec.texts:
        raise UserError('texts: "text" is the text that data.text describes')
    made = [f"{name}{end}" for name in texts for end in ("", "_mask", "_masked", "_labels", "_of", "_weight")]
    for name in (*made, *spec.targets):
        if name in taken:
            raise UserError(f"two fields of a batch would have the name {name!r}: give the text or target another one")
        taken[name] = None


def _check(name: str, spec: TextSpec) -> None:
    if spec.clean not in ("", "albef"):
        raise UserError(f'{name}.clean: expected "" or "albef", got {spec.clean!r}')
    if spec.drop not in ("end", "start"):
        raise UserError(f'{name}.drop: expected "end" or "start", got {spec.drop!r}')
    if spec.max_words < 0:
        raise UserError(f"{name}.max_words: expected 0 or more, got {spec.max_words}")
    if (mask := spec.mask) is None:
        return
    if not 0 <= mask.rate <= 1:
        raise UserError(f"{name}.mask.rate: expected a share, 0 to 1, got {mask.rate}")
    if mask.longest < 1 or (mask.longest > 1 and not mask.exact):
        raise UserError(f"{name}.mask.longest: expected 1, or more with exact: true, got {mask.longest}")
    if len(mask.shares) != 2 or min(mask.shares) < 0 or sum(mask.shares) > 1:
        raise UserError(f"{name}.mask.shares: expected two shares that add up to at most 1, got {mask.shares}")
