import gzip
import json
import os
import subprocess
import sys

import pytest
import torch

from vlpfast.data import load_tokenizer, train_tokenizer
from vlpfast.types import UserError

COLOURS, THINGS = ["red", "blue", "small green", "large"], ["dog", "cat", "rocket", "pizza", "heart's pair", "house"]
CORPUS = [
    f"a {a} {x} above a {b} {y}, {n} times" for a in COLOURS for x in THINGS for b in COLOURS for y in THINGS for n in (1, 22)
]
TEXTS = [
    "a red dog above a small green cat, 1 times",
    "",
    "A RED dog!  and\na café's 🚀",
    "x" * 60,
    "日本語 text ß",
    "  ",
    "it's 2024",
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(CORPUS, 400)


def test_trained_tokenizer_keeps_to_the_protocol(trained):
    assert (trained.pad_id, trained.bos_id, trained.eos_id) == (0, 1, 2)
    assert 259 < trained.vocab_size <= 400
    ids, mask = trained.encode(TEXTS, 20)
    assert ids.shape == mask.shape == (len(TEXTS), 20) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids.max() < trained.vocab_size and (ids[:, 0] == 1).all() and (ids[~mask] == 0).all()
    for row, keep in zip(ids, mask, strict=True):
        length = int(keep.sum())
        assert keep[:length].all() and row[length - 1] == 2 and (row[: length - 1] != 2).all()
    assert ids[1, :3].tolist() == [1, 2, 0] and mask[1].sum() == 2  # an empty caption
    assert mask[3].all()  # "xxx...": cut, and ended by eos
    longer, _ = trained.encode(TEXTS, 80)
    assert torch.equal(ids[3, :19], longer[3, :19]) and ids[3, 19] == 2 != longer[3, 19]
    assert trained.encode(["a"], 2)[0].tolist() == [[1, 2]]
    assert trained.encode([], 5)[0].shape == (0, 5)
    with pytest.raises(ValueError, match="context_length"):
        trained.encode(["a"], 1)


def test_words_of_the_corpus_become_one_token_each(trained):
    _, mask = trained.encode(["a red dog above a blue cat"], 20)
    assert mask.sum() == 7 + 2


def test_nothing_is_out_of_vocabulary(trained):
    for text in TEXTS:
        ids, mask = trained.encode([text], 120)
        letters = "".join(trained.decode(ids[0][mask[0]].tolist()).split())
        assert letters == "".join(text.lower().split())


def test_case_white_space_and_composition_do_not_matter_but_word_borders_do(trained):
    same, _ = trained.encode(["A Red  dog\tcafé", "a red dog café"], 20)
    assert torch.equal(same[0], same[1])
    words, _ = trained.encode(["ab", "a b"], 20)
    assert not torch.equal(words[0], words[1])


def test_special_tokens_in_a_caption_are_text(trained, tmp_path):
    trained.save(str(tmp_path / "t.json"))
    for tokenizer in (trained, load_tokenizer(tmp_path / "t.json")):
        ids, mask = tokenizer.encode(["a <|endoftext|> b <|pad|><|startoftext|>"], 77)
        assert (ids[0] == 2).sum() == (ids[0] == 1).sum() == 1 and (ids[0][mask[0]] != 0).all()


def test_training_is_deterministic(trained):
    code = f"from vlpfast.data import train_tokenizer; print(train_tokenizer({CORPUS[::7]!r}, 350)._backend.to_str())"
    results = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "RAYON_NUM_THREADS": n}
        ).stdout
        for n in ("1", "3")
    }
    assert results == {train_tokenizer(iter(CORPUS[::7]), 350)._backend.to_str() + "\n"}


def test_vocabulary_too_small_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 259.*got 258"):
        train_tokenizer(["a"], 258)
    assert train_tokenizer(["a"], 259).vocab_size == 259


def test_save_and_load_round_trip(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        again = load_tokenizer(path)
        assert (again.pad_id, again.bos_id, again.eos_id, again.vocab_size) == (0, 1, 2, trained.vocab_size)
        for a, b in zip(again.encode(TEXTS, 30), trained.encode(TEXTS, 30), strict=True):
            assert torch.equal(a, b)


def test_a_failed_save_keeps_the_old_file(trained, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trained.save(str(path))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["tokenizer.json"]


# --- other people's tokenizers ------------------------------------------------------------------------------------------


def clip_vocabulary():
    """CLIP's layout in small: bytes, bytes that end a word, merges, specials."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("'", "s</w>")]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def clip(transformers):
    vocabulary, merges = clip_vocabulary()
    return transformers.CLIPTokenizerFast(vocab=vocabulary, merges=merges)


def bert(transformers):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "red",
        "dog",
        "##s",
        "cat",
        "!",
        "it",
        "'",
        "s",
        *"bcdefgx",
        "##x",
    ]
    return transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})


def roberta(transformers):
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("d", "o"), ("do", "g"), ("Ġ", "dog"), ("r", "e")]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, *("".join(merge) for merge in merges)]
    return transformers.RobertaTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


@pytest.mark.parametrize("make", [clip, bert, roberta])
def test_ids_equal_those_of_transformers(make, tmp_path):
    transformers = pytest.importorskip("transformers", reason="waits for the package transformers")
    theirs = make(transformers)
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (
        (theirs.cls_token_id, theirs.sep_token_id) if make is bert else (theirs.bos_token_id, theirs.eos_token_id)
    )
    assert ours.pad_id == theirs.pad_token_id and ours.vocab_size == len(theirs)
    for length in (77, 12):
        ids, mask = ours.encode(TEXTS, length)
        expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        assert torch.equal(ids, expected["input_ids"])
        assert torch.equal(mask, expected["attention_mask"].bool())


def test_transformers_reads_what_is_saved(trained, tmp_path):
    transformers = pytest.importorskip("transformers", reason="waits for the package transformers")
    trained.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids, mask = trained.encode([text], 100)
        assert theirs(text)["input_ids"] == ids[0][mask[0]].tolist()


def test_truncation_and_padding_of_the_file_are_not_taken_over(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = padding | {"pad_id": 5, "pad_type_id": 0, "pad_token": "!"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for a, b in zip(load_tokenizer(tmp_path).encode(TEXTS, 20), trained.encode(TEXTS, 20), strict=True):
        assert torch.equal(a, b)


def test_what_is_no_tokenizer_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(file)
    trained.save(str(file))
    file.write_text(file.read_text().replace("<|endoftext|>", "<|done|>"))
    with pytest.raises(UserError, match=r"lacks special tokens.*missing: <\|endoftext\|>; or \[CLS\], \[SEP\], \[PAD\]; or"):
        load_tokenizer(file)


@pytest.mark.parametrize("names", [("<s>", "</s>", None), ("</s>", "</s>", "<pad>"), ("<|begin|>", "<|end|>", "<|end|>")])
def test_special_tokens_that_the_configuration_names(names, tmp_path):
    """LLaMA's, OPT's and other language models': what their names say is not what they are."""
    transformers = pytest.importorskip("transformers", reason="waits for the package transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = ["<unk>", "<s>", "</s>", "<pad>", "<|begin|>", "<|end|>", "a", "red", "dog"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {name: token for name, token in zip(("bos_token", "eos_token", "pad_token"), names, strict=True) if token}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "theirs")
    ours = load_tokenizer(tmp_path / "theirs")
    bos, eos = (tokens.index(name) for name in names[:2])
    pad = tokens.index(names[2]) if names[2] else eos
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (bos, eos, pad)
    assert ours.encode(["a red dog"], 7)[0].tolist() == [[bos, 6, 7, 8, eos, pad, pad]]
    (tmp_path / "run").mkdir()
    ours.save(str(tmp_path / "run" / "tokenizer.json"))
    again = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert (again.bos_id, again.eos_id, again.pad_id) == (bos, eos, pad)
    config = tmp_path / "run" / "tokenizer_config.json"
    for content, message in (
        ('{"bos_token": "<x>", "eos_token": "</s>"}', "names the special token '<x>'"),
        ("[", "cannot be read"),
    ):
        config.write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / "run")


# --- CLIP's vocabulary files ----------------------------------------------------------------------------------------------


def clip_files(folder):
    """CLIP's three forms of one small vocabulary, in OpenAI's order of the bytes."""
    _, merges = clip_vocabulary()
    printable = [chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters = printable + [chr(256 + place) for place in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "bpe_simple.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return vocabulary, merges


@pytest.mark.parametrize("form", ["", "merges.txt", "bpe_simple.txt.gz"])
def test_clip_vocabulary_files_give_the_ids_of_transformers(form, tmp_path):
    transformers = pytest.importorskip("transformers", reason="waits for the package transformers")
    vocabulary, merges = clip_files(tmp_path)
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    ours = load_tokenizer(tmp_path / form)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (519, 520, 520) and ours.vocab_size == len(theirs) == 521
    assert ours.special_ids == [519, 520] and ours.ordinary_ids.tolist() == list(range(519)) and ours.mask_id is None
    texts = [*TEXTS, "dog's red  cat", "don't we'll 3x14 \u00a0\u3000é é ﬁ", "İstanbul ẞ", "a\x00b \u200b_ ---"]
    for length in (77, 12):
        ids, mask = ours.encode(texts, length)
        expected = theirs(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask, expected["attention_mask"].bool())
    ids, mask = ours.encode(["A dog's red cat!"], 20)
    assert vocabulary["dog</w>"] in ids and ours.decode(ids[0][mask[0]].tolist()) == "a dog 's red cat !"
    spelt, _ = ours.encode(["a <|endoftext|> b"], 40)
    assert (spelt == 520).sum() == 40 - (spelt != 520).sum() and spelt[0, 2] != 520  # text, not the token
    ours.save(str(tmp_path / "t.json"))
    again = load_tokenizer(tmp_path / "t.json")
    for a, b in zip(again.encode(texts, 30), ours.encode(texts, 30), strict=True):
        assert torch.equal(a, b)


def test_only_as_many_merges_as_clip_has_are_read(tmp_path, monkeypatch):
    clip_files(tmp_path)
    monkeypatch.setattr("vlpfast.data.tokenizer._CLIP_MERGES", 2)
    assert load_tokenizer(tmp_path / "merges.txt").vocab_size == 512 + 2 + 2
    monkeypatch.undo()
    pairs = [f"{a} {b}" for a in (chr(256 + i) for i in range(230)) for b in (chr(256 + i) for i in range(230))]
    (tmp_path / "many.txt").write_text("\n".join(["#version", *pairs]), encoding="utf-8")
    with pytest.raises(UserError, match="do not fit together"):  # these bytes are not in the alphabet
        load_tokenizer(tmp_path / "many.txt")
    letters = "".join(chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)])
    pairs = [f"{a}{b} {c}</w>" for a in letters[:40] for b in letters[:40] for c in letters[:40]]
    first = [f"{a} {b}" for a in letters[:40] for b in letters[:40]]
    (tmp_path / "many.txt").write_text("\n".join(["#version", *first, *pairs]), encoding="utf-8")
    assert len(first + pairs) > 49_000 and load_tokenizer(tmp_path / "many.txt").vocab_size == 49_408  # CLIP's published size


def test_clip_files_that_are_none(tmp_path):
    clip_files(tmp_path)
    whole = (tmp_path / "merges.txt").read_text()
    for content, message in (
        ("", "is no file of merges"),
        ("#version\na b c\n", "is no file of merges"),
        (whole + "do g</w>\n", "two merges make the same token"),
    ):
        (tmp_path / "m.txt").write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / "m.txt")
    (tmp_path / "m.txt.gz").write_bytes(b"no gzip")
    for name in ("m.txt.gz", "none.txt"):
        with pytest.raises(UserError, match="cannot be read"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "merges.txt").write_text("#version\nthis merge\n")
    with pytest.raises(UserError, match="do not fit together"):
        load_tokenizer(tmp_path)
    for content, message in (('{"<s>": 0}', "is not CLIP's"), ("[", "cannot be read"), ("[]", "cannot be read")):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no file .*tokenizer.json, nor vocab.json and merges.txt"):
        load_tokenizer(tmp_path / "empty")


# --- words -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [clip, bert, roberta])
def test_words_and_their_characters(make, tmp_path):
    transformers = pytest.importorskip("transformers", reason="waits for the package transformers")
    make(transformers).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    texts = ["red dogs, cat!", "", "dogs " * 20]
    ids, mask, word_ids, spans = tokenizer.encode_words(texts, 14)
    for a, b in zip((ids, mask), tokenizer.encode(texts, 14), strict=True):
        assert torch.equal(a, b)
    assert (word_ids >= 0).sum() == mask.sum() - 2 * 3  # all but bos and eos
    found = {}
    for word, (start, end) in zip(word_ids[0].tolist(), spans[0].tolist(), strict=True):
        low, high = found.get(word, (99, 0))
        found[word] = (min(low, start), max(high, end))
    found.pop(-1)
    assert [texts[0][start:end].strip() for start, end in found.values()] == ["red", "dogs", ",", "cat", "!"]
    assert list(found) == sorted(found) and (word_ids[1] == -1).all()
    assert (spans[word_ids < 0] == 0).all() and word_ids[2].max() < 12
    assert [piece.tolist() for piece in tokenizer.pieces(texts[:2])] == [ids[0, 1 : int(mask[0].sum()) - 1].tolist(), []]
    assert (tokenizer.mask_id is None) == (make is clip)
    assert set(tokenizer.special_ids).isdisjoint(tokenizer.ordinary_ids.tolist())
    assert {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} <= set(tokenizer.special_ids)
    assert len(tokenizer.special_ids) + len(tokenizer.ordinary_ids) == tokenizer.vocab_size


def test_a_mask_token_is_trained_when_asked_for(trained, tmp_path):
    assert trained.mask_id is None and trained.special_ids == [0, 1, 2]
    masked = train_tokenizer(CORPUS, 400, mask=True)
    assert masked.mask_id == 3 and masked.special_ids == [0, 1, 2, 3] and masked.ordinary_ids[0] == 4
    masked.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).mask_id == 3
    assert (masked.encode(["a <|mask|>"], 30)[0] != 3).all()
    with pytest.raises(ValueError, match=r"at least 260 \(256 bytes, 4 special tokens\), got 259"):
        train_tokenizer(["a"], 259, mask=True)
