"""Captions to token ids, by the Hugging Face `tokenizers` library: trained here, or read from any tokenizer.json."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlpfast.types import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_PAD, _BOS, _EOS = "<|pad|>", "<|startoftext|>", "<|endoftext|>"

# bos, eos, and the names that padding may have. CLIP's vocabulary has no token for it and pads with eos, as transformers does.
_FAMILIES = (
    (_BOS, _EOS, (_PAD, _EOS)),  # CLIP
    ("[CLS]", "[SEP]", ("[PAD]",)),  # BERT
    ("<s>", "</s>", ("<pad>",)),  # RoBERTa, BART
)

# CLIP's words: contractions, runs of letters, single digits, runs of anything else (Radford et al. 2021, the released tokenizer).
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class TextTokenizer:
    """The Tokenizer of vlpfast.types over a `tokenizers.Tokenizer`.

    bos and eos are put in here, once, whatever the file's own post-processor would add. Text that spells a special token
    ("<|endoftext|>") is text, not that token.
    """

    def __init__(self, backend: Backend, bos: str, eos: str, pad: str):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self.bos_id, self.eos_id, self.pad_id = (backend.token_to_id(token) for token in (bos, eos, pad))

    def encode(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
        """-> ids [B, context_length] int64 and mask bool (True = token): bos + text + eos + padding; text too long loses its
        end.
        """
        if context_length < 2:
            raise ValueError(f"context_length: expected at least 2 (bos and eos), got {context_length}")
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [[self.bos_id, *encoding.ids[: context_length - 2], self.eos_id] for encoding in encodings]
        lengths = np.array([len(row) for row in rows], np.int64)
        mask = np.arange(context_length) < lengths[:, None]  # [B, L]
        ids = np.full(mask.shape, self.pad_id, np.int64)
        ids[mask] = np.array([token for row in rows for token in row], np.int64)
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, without special tokens; lower-cased by a tokenizer trained here."""
        return self._backend.decode(list(ids), skip_special_tokens=True).strip()

    def save(self, path: str) -> None:
        """Writes a tokenizer.json that transformers reads too. It appears under its name only when it is whole."""
        aside = f"{path}.{os.getpid()}.tmp"
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(self._backend.to_str(pretty=True))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of at most `vocab_size` ids, trained on the texts: NFC, lower case, CLIP's words. pad 0, bos 1, eos 2.

    All 256 bytes have an id, so no text is out of its vocabulary. Each word carries its leading space (GPT-2's way), where CLIP
    marks the word's end. The same texts in the same order give the same tokenizer. Pairs that occur once are not merged.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [_PAD, _BOS, _EOS]
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size: expected at least {len(alphabet) + len(special)} (256 bytes, 3 special tokens), got {vocab_size}"
        )
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
    return TextTokenizer(backend, _BOS, _EOS, _PAD)


def load_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer:
    """Any Hugging Face tokenizer.json, or the folder that holds one. The special tokens are found by their names in CLIP's,
    BERT's and RoBERTa's vocabularies. Raises UserError if the file cannot be read or has none of these.
    """
    from tokenizers import Tokenizer

    path = os.fspath(path)
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise UserError(f"tokenizer: there is no file {file}")
    try:
        backend = Tokenizer.from_file(file)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"tokenizer: {file} cannot be read as a tokenizer.json: {error}") from error
    missing = []
    for bos, eos, pads in _FAMILIES:
        absent = [token for token in (bos, eos) if backend.token_to_id(token) is None]
        pad = next((token for token in pads if backend.token_to_id(token) is not None), None)
        if not absent and pad is not None:
            return TextTokenizer(backend, bos, eos, pad)
        missing.append(", ".join(absent if pad is not None else [*absent, pads[0]]))
    raise UserError(f"tokenizer: {file} lacks special tokens; one of these sets is needed and missing: {'; or '.join(missing)}")
