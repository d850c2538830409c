"""The tokenizers of a run, by name: given as files, or trained on what the run's texts say."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from vlpfast.data import ShardSet, load_tokenizer, train_tokenizer
from vlpfast.data.loader import parse_json, read_records
from vlpfast.data.mixture import open_sources
from vlpfast.data.pictures import DamagedSample
from vlpfast.data.texts import Texts, texts_of
from vlpfast.data.tokenizer import TextTokenizer
from vlpfast.training.config import DataConfig, RunConfig
from vlpfast.training.run_folder import has_begun
from vlpfast.types import DataSpec, TextSpec, UserError, Vocabulary

SAMPLES = 1_000_000  # a vocabulary learns nothing from more
_CHUNK = 4096


def build_tokenizers(
    config: RunConfig, patterns: list[str] | dict[str, list[str]], run_dir: Path, first: bool = True
) -> dict[str, TextTokenizer]:
    """A tokenizer for each vocabulary of the model, kept in run_dir as tokenizer.json ("") and tokenizer-NAME.json: the file that
    data.tokenizer and data.tokenizers name, or one trained on what the texts written with it say of the training samples.

    patterns: of the training shards, by source where there are several. first: False reads what another process has kept.
    UserError: its ids do not fit the model.
    """
    if not first or (has_begun(run_dir) and all(kept(run_dir, name).exists() for name in vocabularies(config))):
        return load_tokenizers(config, run_dir)
    tokenizers = {}
    for name, vocabulary in vocabularies(config).items():
        if path := _path(config.data, name):
            tokenizer = load_tokenizer(path)
            tokenizer.add_extra(vocabulary.extra)
        else:
            print(f"training the tokenizer{f' {name}' * bool(name)} on the texts", file=sys.stderr)
            tokenizer = _trained(config, name, vocabulary, patterns)
        _check(config, name, vocabulary, tokenizer)
        tokenizer.save(str(kept(run_dir, name)))
        tokenizers[name] = tokenizer
    return tokenizers


def load_tokenizers(config: RunConfig, run_dir: Path) -> dict[str, TextTokenizer]:
    """Those that a run has kept. UserError: one is missing, or does not fit the model."""
    tokenizers = {}
    for name, vocabulary in vocabularies(config).items():
        tokenizers[name] = load_tokenizer(kept(run_dir, name))
        tokenizers[name].add_extra(vocabulary.extra)
        _check(config, name, vocabulary, tokenizers[name])
    return tokenizers


def kept(run_dir: Path, name: str) -> Path:
    return run_dir / (f"tokenizer-{name}.json" if name else "tokenizer.json")


def vocabularies(config: RunConfig) -> dict[str, Vocabulary]:
    """What the model asks of its tokenizers, with what its texts ask. UserError: names that do not belong together."""
    asked = config.model.config.vocabularies()
    for name in config.data.tokenizers:
        if name not in asked or not name:
            near = get_close_matches(name, asked, n=1)
            hint = f"; did you mean {near[0]!r}?" if near and near[0] else ""
            known = ", ".join(filter(None, asked)) or "none with a name"
            raise UserError(f"data.tokenizers: {config.model.name} has no tokenizer {name!r}{hint} (it has {known})")
    masks = set()
    documents = config.model.config.data.documents
    if documents is not None and documents.tokenizer not in asked:
        raise UserError(f"model.data.documents.tokenizer: {config.model.name} has no tokenizer {documents.tokenizer!r}")
    for name, text in texts_of(config.model.config.data).items():
        if text.tokenizer not in asked:
            known = ", ".join(map(repr, asked)) or "none"
            raise UserError(
                f"model.data: the text {name!r} is written with the tokenizer {text.tokenizer!r}, the model has {known}"
            )
        masks |= {text.tokenizer} if text.mask is not None else set()
    return {name: replace(of, mask=of.mask or of.mask_id is not None or name in masks) for name, of in asked.items()}


def _path(data: DataConfig, name: str) -> str:
    return data.tokenizers.get(name, "") if name else data.tokenizer


def _key(name: str) -> str:
    return f"data.tokenizers.{name}" if name else "data.tokenizer"


def _check(config: RunConfig, name: str, vocabulary: Vocabulary, tokenizer: TextTokenizer) -> None:
    key, model = _key(name), config.model.name
    if tokenizer.vocab_size > vocabulary.size:
        ids = f"{tokenizer.vocab_size}, as many as the tokenizer has ids"
        raise UserError(f"{key}: expected a vocab_size of at least {ids}, the model {model} has {vocabulary.size}")
    if vocabulary.mask and tokenizer.mask_id is None:
        raise UserError(f"{key}: the model {model} hides words, the tokenizer has no mask token")
    for of in ("bos_id", "eos_id", "pad_id", "mask_id"):
        wanted, there = getattr(vocabulary, of), getattr(tokenizer, of)
        if wanted is not None and there != wanted:
            raise UserError(f"{key}: expected the {of} {there}, the tokenizer's, the model {model} has {wanted}")


def _trained(config: RunConfig, name: str, vocabulary: Vocabulary, patterns: list[str] | dict[str, list[str]]) -> TextTokenizer:
    options = {"mask": vocabulary.mask, "extra": vocabulary.extra}
    try:
        # One of bytes alone tells where templates spell special tokens.
        least = train_tokenizer([], 256 + 4 + len(vocabulary.extra), **options)
        said = texts_said(config, name, least, patterns)
        if (one := next(said, None)) is None:
            raise UserError(f"{_key(name)}: none is given, and the samples hold no text to train one on")
        return train_tokenizer(_with(one, said), vocabulary.size, **options)
    except ValueError as error:
        raise UserError(f"{_key(name)}: none is given, and none can be trained: {error}") from error


def _with(one: str, others: Iterator[str]) -> Iterator[str]:
    yield one
    yield from others


def texts_said(
    config: RunConfig, name: str, tokenizer: TextTokenizer, patterns: list[str] | dict[str, list[str]]
) -> Iterator[str]:
    """What the texts written with a tokenizer say of the training samples, in all their templates, in the shards' order; of at
    most SAMPLES samples, evenly spread. Captions, if no text is written with it. Unusable samples are passed over."""
    texts = {of: text for of, text in texts_of(config.model.config.data).items() if text.tokenizer == name}
    texts = {f"of_{of}": replace(text, tokenizer="", mask=None, every=False) for of, text in texts.items()}
    documents = config.model.config.data.documents
    of_documents = documents is not None and documents.tokenizer == name
    texts = texts or ({} if of_documents else {"of_": TextSpec()})
    sources = list(config.data.mixture.values()) if isinstance(patterns, Mapping) else []
    own = [
        [{f"of_{text}": ways for text, ways in getattr(source, of).items() if f"of_{text}" in texts} for source in sources]
        for of in ("templates", "answers")
    ]
    written = Texts(DataSpec(None, None, texts=texts), {"": tokenizer}, *own)
    if isinstance(patterns, Mapping):
        shards, mixture = open_sources(patterns, {}, threads=config.data.threads)
    else:
        shards, mixture = ShardSet(patterns, threads=config.data.threads), None
    chosen = np.linspace(0, len(shards), min(len(shards), SAMPLES), endpoint=False).astype(np.int64)
    for chunk in np.array_split(chosen, max(1, len(chosen) // _CHUNK)):
        numbers = np.zeros(len(chunk), np.int64) if mixture is None else mixture.source_of(chunk)
        yield from _said(written, shards, chunk, numbers)
        if of_documents:
            yield from _documents_said(shards, chunk)


def _said(written: Texts, shards: ShardSet, chunk: np.ndarray, sources: Sequence[int]) -> Iterator[str]:
    captions = shards.read(chunk, ("txt",)) if written.captions else [None] * len(chunk)
    wanted = [place for place, caption in enumerate(captions) if written.json or caption is None]
    records = dict(zip(wanted, shards.read(chunk[wanted], ("json",)), strict=True))
    for place, (caption, source) in enumerate(zip(captions, sources, strict=True)):
        try:
            info = written.inspect(caption, parse_json(records.get(place)), int(source))
        except DamagedSample:
            continue
        for said in written.say(info).values():
            yield from said


def _documents_said(shards: ShardSet, chunk: np.ndarray) -> Iterator[str]:
    """The texts of documents and of what is between their pictures."""
    for content, record in zip(shards.read(chunk, ("txt",)), read_records(shards, chunk), strict=True):
        try:
            parts = record.get("parts")
            if isinstance(parts, list):
                texts = [part["text"] for part in parts if "text" in part]
                "".join(texts).encode()
            else:
                texts = [] if content is None else [content.tobytes().decode("utf-8")]
        except (UnicodeError, TypeError, KeyError):  # what the loader will leave out
            continue
        yield from texts
