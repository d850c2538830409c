"""Captions to token ids, by the Hugging Face `tokenizers` library: trained here, read from any tokenizer.json, or made from
CLIP's vocabulary files."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlpfast.types import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_PAD, _BOS, _EOS, _MASK = "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|mask|>"
_CONFIG = "tokenizer_config.json"
_MASKS = (_MASK, "[MASK]", "<mask>")  # ours, BERT's, RoBERTa's

# bos, eos, and the names that padding may have. CLIP's vocabulary has no token for it and pads with eos, as transformers does.
_FAMILIES = (
    (_BOS, _EOS, (_PAD, _EOS)),  # CLIP
    ("[CLS]", "[SEP]", ("[PAD]",)),  # BERT
    ("<s>", "</s>", ("<pad>",)),  # RoBERTa, BART
    ("<pad>", "</s>", ("<pad>",)),  # T5, whose decoder begins with padding and whose encoder reads no begin token
)

# CLIP's words: contractions, runs of letters, single digits, runs of anything else (Radford et al. 2021, the released tokenizer).
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Words(NamedTuple):
    """Token ids with the words they are parts of. B texts of L tokens."""

    ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool, True = token
    word_ids: Tensor  # [B, L] int64, 0 for all parts of the first word and so on; -1 at special tokens and padding
    spans: Tensor  # [B, L, 2] int64, the characters start .. end - 1 of the text; 0, 0 at special tokens and padding


class TextTokenizer:
    """The Tokenizer of vlpfast.types over a `tokenizers.Tokenizer`.

    bos and eos are put in here, once, whatever the file's own post-processor would add. Text that spells a special token
    ("<|endoftext|>") is text, not that token.
    """

    def __init__(self, backend: Backend, bos: str, eos: str, pad: str, *, named: bool = False):
        """named: the special tokens cannot be told by their names alone, so `save` writes them down."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad} if named else None
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self.bos_id, self.eos_id, self.pad_id = (backend.token_to_id(token) for token in (bos, eos, pad))
        self.mask_id: int | None = next((i for i in map(backend.token_to_id, _MASKS) if i is not None), None)
        special = {self.bos_id, self.eos_id, self.pad_id, self.mask_id} - {None}
        self.special_ids = sorted(special | {i for i, token in backend.get_added_tokens_decoder().items() if token.special})
        self.extra: dict[str, int] = {}  # special tokens that a template may spell (add_extra)

    def add_extra(self, tokens: Sequence[str]) -> None:
        """Special tokens of a model, such as "[DEC]": those that are missing get the next ids. UserError: one is an ordinary
        token here."""
        from tokenizers import AddedToken

        for token in tokens:
            found = self._backend.token_to_id(token)
            if found is None:
                self._backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
                found = self._backend.token_to_id(token)
                self.vocab_size = max(self.vocab_size, found + 1)
                self.special_ids = sorted({*self.special_ids, found})
            elif found not in self.special_ids:
                raise UserError(f"tokenizer: {token!r} is an ordinary token of its vocabulary, the model needs a special one")
            self.extra[token] = found

    @property
    def ordinary_ids(self) -> Tensor:
        """The ids of all tokens that are not special, int64 ascending: what a masked token may be replaced by."""
        ids = torch.tensor(sorted(set(self._backend.get_vocab().values()) - set(self.special_ids)))
        return ids.to(torch.int64)

    def encode(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
        """-> ids [B, context_length] int64 and mask bool (True = token): bos + text + eos + padding; text too long loses its
        end.
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids, mask = self._rows([encoding.ids for encoding in encodings], context_length)
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def encode_words(self, texts: Sequence[str], context_length: int) -> Words:
        """As `encode`, with the words as the tokenizer's pre-tokenizer cuts them, so byte-pair vocabularies have whole words
        too."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        ids, mask = self._rows([encoding.ids for encoding in encodings], context_length)
        word_ids = np.full(ids.shape, -1, np.int64)
        spans = np.zeros((*ids.shape, 2), np.int64)
        for row, encoding in enumerate(encodings):
            count = min(len(encoding.ids), context_length - 2)
            # A tokenizer without a pre-tokenizer knows no words: then each token is one.
            words = [place if word is None else word for place, word in enumerate(encoding.word_ids[:count])]
            word_ids[row, 1 : count + 1] = words
            spans[row, 1 : count + 1] = encoding.offsets[:count] or np.empty((0, 2), np.int64)
        return Words(*map(torch.from_numpy, (ids, mask, word_ids, spans)))

    def pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int64, uncut and without bos and eos: for prompts and documents."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def piece_words(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `pieces`, each with the number of the word that each token is a part of, int64; None, where the tokenizer knows no
        words, counts as a word of its own."""
        found = []
        for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False):
            words = [place if word is None else word for place, word in enumerate(encoding.word_ids)]
            found.append((np.array(encoding.ids, np.int64), np.array(words, np.int64)))
        return found

    def _rows(self, pieces: list[list[int]], context_length: int) -> tuple[np.ndarray, np.ndarray]:
        if context_length < 2:
            raise ValueError(f"context_length: expected at least 2 (bos and eos), got {context_length}")
        rows = [[self.bos_id, *piece[: context_length - 2], self.eos_id] for piece in pieces]
        lengths = np.array([len(row) for row in rows], np.int64)
        mask = np.arange(context_length) < lengths[:, None]  # [B, L]
        ids = np.full(mask.shape, self.pad_id, np.int64)
        ids[mask] = np.array([token for row in rows for token in row], np.int64)
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, without special tokens; lower-cased by a tokenizer trained here."""
        return self._backend.decode(list(ids), skip_special_tokens=True).strip()

    def save(self, path: str) -> None:
        """Writes a tokenizer.json that transformers reads too. It appears under its name only when it is whole. If the special
        tokens were named by a tokenizer_config.json, one appears beside it (NAME_config.json beside a NAME.json)."""
        if self._names is not None:
            _write(_config_path(path), json.dumps(self._names, ensure_ascii=False, indent=1) + "\n")
        _write(path, self._backend.to_str(pretty=True))


def _config_path(file: str) -> str:
    """Where the special tokens of a tokenizer's file are named: several of a run lie in one folder."""
    folder, name = os.path.split(file)
    return os.path.join(folder, f"{name.removesuffix('.json')}_config.json" if name.startswith("tokenizer-") else _CONFIG)


def _write(path: str, text: str) -> None:
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, mask: bool = False, extra: Sequence[str] = ()) -> TextTokenizer:
    """A byte-level BPE of at most `vocab_size` ids, trained on the texts: NFC, lower case, CLIP's words. pad 0, bos 1, eos 2, and
    mask 3 if it is asked for; the ids of further special tokens, `extra`, follow.

    All 256 bytes have an id, so no text is out of its vocabulary. Each word carries its leading space (GPT-2's way), where CLIP
    marks the word's end. The same texts in the same order give the same tokenizer. Pairs that occur once are not merged.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [_PAD, _BOS, _EOS] + [_MASK] * mask + list(extra)
    if len(set(special)) < len(special):
        raise ValueError(f"extra: expected special tokens that differ from one another and from {special[:4]}, got {list(extra)}")
    if vocab_size < (least := len(alphabet) + len(special)):
        raise ValueError(f"vocab_size: expected at least {least} (256 bytes, {len(special)} special tokens), got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(  # for those who open the file with another library
        single=f"{_BOS} $A {_EOS}", special_tokens=[(_BOS, special.index(_BOS)), (_EOS, special.index(_EOS))]
    )
    tokenizer = TextTokenizer(backend, _BOS, _EOS, _PAD)
    tokenizer.add_extra(extra)
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer:
    """Any Hugging Face tokenizer.json, or the folder that holds one; CLIP's vocabulary as vocab.json and merges.txt in a folder,
    or as the file of merges alone, as OpenAI released it (bpe_simple_vocab_16e6.txt, also .gz). The special tokens are those that
    a tokenizer_config.json beside it names (bos or cls, eos or sep, pad or else eos), else they are found by their names in
    CLIP's, BERT's and RoBERTa's vocabularies. Raises UserError if the file cannot be read or has none of these.
    """
    path = os.fspath(path)
    if path.endswith((".txt", ".txt.gz")):
        return _clip_from_merges(path)
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        if os.path.isfile(os.path.join(path, "vocab.json")) and os.path.isfile(os.path.join(path, "merges.txt")):
            return _clip_from_folder(path)
        raise UserError(f"tokenizer: there is no file {file}" + ", nor vocab.json and merges.txt" * os.path.isdir(path))
    return _from_json(file)


def _from_json(file: str) -> TextTokenizer:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(file)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"tokenizer: {file} cannot be read as a tokenizer.json: {error}") from error
    if (names := _special_names(_config_path(file), backend)) is not None:
        return TextTokenizer(backend, *names, named=True)
    missing = []
    for bos, eos, pads in _FAMILIES:
        absent = [token for token in (bos, eos) if backend.token_to_id(token) is None]
        pad = next((token for token in pads if backend.token_to_id(token) is not None), None)
        if not absent and pad is not None:
            return TextTokenizer(backend, bos, eos, pad)
        missing.append(", ".join(absent if pad is not None else [*absent, pads[0]]))
    raise UserError(f"tokenizer: {file} lacks special tokens; one of these sets is needed and missing: {'; or '.join(missing)}")


def _special_names(path: str, backend: Backend) -> tuple[str, str, str] | None:
    """bos, eos, pad as the configuration beside a tokenizer.json names them; None if it does not. Where it names no pad, eos
    pads."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        found = {name: config.get(f"{name}_token") for name in ("bos", "cls", "eos", "sep", "pad")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"tokenizer: {path} cannot be read: {error}") from error
    names = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    bos, eos = names["bos"] or names["cls"], names["eos"] or names["sep"]
    if not bos or not eos:
        return None
    special = bos, eos, names["pad"] or eos
    if absent := [token for token in special if backend.token_to_id(token) is None]:
        raise UserError(
            f"tokenizer: {path} names the special token {absent[0]!r}, which the tokenizer.json beside it does not have"
        )
    return special


# --- CLIP's files --------------------------------------------------------------------------------------------------------

_CLIP_MERGES = 49_408 - 2 * 256 - 2  # the released file has more lines; the first so many are used


def _clip_from_merges(path: str) -> TextTokenizer:
    """The vocabulary follows from the merges: bytes, bytes that end a word, what each merge makes, the two special tokens."""
    merges = _merges(path)[:_CLIP_MERGES]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), _BOS, _EOS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise UserError(f"tokenizer: {path}: two merges make the same token, so it is not a file of CLIP's merges")
    return _clip(vocabulary, merges, path)


def _clip_from_folder(folder: str) -> TextTokenizer:
    path = os.path.join(folder, "vocab.json")
    try:
        with open(path, encoding="utf-8") as file:
            vocabulary = json.load(file)
        right = all(isinstance(i, int) for i in vocabulary.values()) and _BOS in vocabulary and _EOS in vocabulary
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"tokenizer: {path} cannot be read: {error}") from error
    if not right:
        raise UserError(
            f"tokenizer: {path} is not CLIP's: expected tokens with their ids, {_BOS} and {_EOS} among them. Other tokenizers "
            "are read from a tokenizer.json, which transformers' save_pretrained writes"
        )
    return _clip(vocabulary, _merges(os.path.join(folder, "merges.txt")), folder)


def _merges(path: str) -> list[tuple[str, str]]:
    """The pairs of a file of merges: one in a line, behind a first line that is none."""
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            lines = file.read().decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer: {path} cannot be read: {error}") from error
    pairs = [tuple(line.split()) for line in lines[1:] if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UserError(f"tokenizer: {path} is no file of merges: expected a first line, then two words in each")
    return pairs


def _clip(vocabulary: dict[str, int], merges: list[tuple[str, str]], path: str) -> TextTokenizer:
    """CLIP's tokenizer without the cleaning of web text (ftfy, html.unescape) that OpenAI's code begins with; as transformers has
    it, except that a text cannot spell a special token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=_EOS, end_of_word_suffix="</w>"))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"tokenizer: the vocabulary and the merges in {path} do not fit together: {error}") from error
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (_BOS, _EOS)])
    return TextTokenizer(backend, _BOS, _EOS, _EOS)
