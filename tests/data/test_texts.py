"""Texts by name and targets, alone and through the loader."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from vlpfast.data import ShardWriter, load_tokenizer, make_loader, train_tokenizer
from vlpfast.data.masking import IGNORED, join_prompt_answer
from vlpfast.data.modality import Draws
from vlpfast.data.pictures import DamagedBatch, DamagedSample
from vlpfast.data.texts import Texts
from vlpfast.types import DataSpec, MaskSpec, TargetSpec, TextSpec, UserError

CORPUS = ["what is in the picture? a red dog, a blue cat; two green birds over one house. yes no how many are there"] * 3
QA = [
    {"question": f"how many {name}?", "answer": name, "kind": kind, "weight": 0.25 + i}
    for i, (name, kind) in enumerate([("dogs", "count"), ("cats", "count"), ("birds", "name"), ("houses", "name")])
]
RECORD = {"caption": "A red dog.", "captions": ["one", "two", "three"], "qa": QA, "label": "dog", "inner": {"deep": "word"}}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, 400, mask=True, extra=["[DEC]", "<image>"])


def draws(train=True, epoch=0, count=1, first=0, seed=0):
    return Draws(seed, epoch, np.arange(first, first + count), train)


def made(texts, records, how):
    """texts: a DataSpec's, or Texts."""
    texts.submit([texts.inspect(None, record) for record in records], how)
    return texts.receive()


def words(tokenizer, ids, mask=None):
    return tokenizer.decode(ids[mask].tolist() if mask is not None else ids.tolist())


def only(tokenizer, targets=None, **specs):
    return Texts(DataSpec(None, None, texts=specs, targets=targets or {}), {"": tokenizer, "other": tokenizer})


# --- what is written -----------------------------------------------------------------------------------------------------


def test_templates_fields_and_lists(tokenizer):
    texts = only(
        tokenizer,
        plain=TextSpec(40, ["{caption}"]),
        deep=TextSpec(40, ["{{a}} {inner.deep} and {label}"]),
        listed=TextSpec(40, ["{captions}"]),
        question=TextSpec(40, ["{qa.question}"]),
        reply=TextSpec(40, ["{qa.answer} {qa.kind}"]),
    )
    fields = made(texts, [RECORD], draws(train=False))
    assert fields.keys() == {name + end for name in ("plain", "deep", "listed", "question", "reply") for end in ("", "_mask")}
    said = {name: words(tokenizer, fields[name][0]) for name in texts.specs}
    assert said == {
        "plain": "a red dog .",
        "deep": "{ a } word and dog",
        "listed": "one",
        "question": "how many dogs ?",
        "reply": "dogs count",
    }
    ids, mask = tokenizer.encode(["A red dog."], 40)
    assert torch.equal(fields["plain"], ids) and torch.equal(fields["plain_mask"], mask)

    pairs, heard = set(), set()
    for epoch in range(60):
        fields = made(texts, [RECORD] * 3, draws(epoch=epoch, count=3))
        for row in range(3):
            question, reply = words(tokenizer, fields["question"][row]), words(tokenizer, fields["reply"][row])
            assert reply.split()[0] == question.split()[2]  # the same element
            pairs.add(reply)
            heard.add((reply, words(tokenizer, fields["listed"][row])))
    assert len(pairs) == 4 and len(heard) == 12  # another list is drawn for itself
    again = made(texts, [RECORD] * 3, draws(epoch=59, count=3))
    assert all(torch.equal(again[name], fields[name]) for name in fields)
    alone = made(texts, [RECORD], draws(epoch=59, count=1, first=2))
    assert all(torch.equal(alone[name][0], fields[name][2]) for name in fields)  # of (seed, epoch, index) alone


def test_several_templates_are_drawn_each_epoch_and_evaluation_takes_the_first(tokenizer):
    texts = only(
        tokenizer, one=TextSpec(20, ["a {label}", "the {label}", "no {label}"]), two=TextSpec(20, ["x {label}", "y {label}"])
    )
    fields = made(texts, [RECORD] * 300, draws(count=300))
    said = [(words(tokenizer, one), words(tokenizer, two)) for one, two in zip(fields["one"], fields["two"], strict=True)]
    counts = {pair: said.count(pair) for pair in set(said)}
    assert len(counts) == 6 and min(counts.values()) > 25
    other = made(texts, [RECORD] * 300, draws(count=300, epoch=1))
    assert not torch.equal(other["one"], fields["one"])
    assert not torch.equal(made(texts, [RECORD] * 300, draws(count=300, seed=1))["one"], fields["one"])
    first = made(texts, [RECORD] * 9, draws(train=False, count=9, epoch=3))
    assert {words(tokenizer, row) for row in first["one"]} == {"a dog"} and {words(tokenizer, row) for row in first["two"]} == {
        "x dog"
    }


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Red-haired man/woman, (smiling)!", "a red haired man woman smiling"),
        ('  it\'s   "10:30"; ~#*? ', "its 1030"),
        ("no change", "no change"),
    ],
)
def test_cleaned_as_albef_does(tokenizer, text, cleaned):
    texts = only(
        tokenizer, one=TextSpec(40, ["Q: {caption}"], clean="albef"), two=TextSpec(40, ["{caption}"], clean="albef", max_words=3)
    )
    fields = made(texts, [{"caption": text}], draws())
    assert torch.equal(fields["one"], tokenizer.encode([f"Q: {cleaned}"], 40)[0])  # the template's own words stay
    assert torch.equal(fields["two"], tokenizer.encode([" ".join(cleaned.split()[:3])], 40)[0])


def test_cut_at_the_end_or_at_the_start(tokenizer):
    texts = only(tokenizer, end=TextSpec(6, ["{caption}"]), start=TextSpec(6, ["{caption}"], drop="start"))
    text = "one red dog two blue cat"
    (ids,) = tokenizer.pieces([text])
    fields = made(texts, [{"caption": text}, {"caption": "dog"}], draws(count=2))
    assert fields["end"][0].tolist() == [1, *ids[:4], 2] and fields["start"][0].tolist() == [1, *ids[-4:], 2]
    assert torch.equal(fields["end"][1], fields["start"][1]) and torch.equal(fields["end_mask"][1], fields["start_mask"][1])


def test_special_tokens_only_where_the_template_spells_them(tokenizer):
    dec, image = (tokenizer.extra[token] for token in ("[DEC]", "<image>"))
    assert (dec, image) == (4, 5)
    texts = only(tokenizer, one=TextSpec(40, ["[DEC] a {caption}<image>"]), two=TextSpec(40, ["<|endoftext|>{caption}"]))
    fields = made(texts, [{"caption": "[DEC] dog <image> <|endoftext|>"}], draws())
    a, said = tokenizer.pieces([" a [DEC] dog <image> <|endoftext|>", ""])
    assert fields["one"][0][fields["one_mask"][0]].tolist() == [1, dec, *a, image, 2] and not len(said)
    assert (fields["one"][0] == dec).sum() == (fields["one"][0] == image).sum() == 1
    assert (fields["two"][0] == tokenizer.eos_id).sum() == 1  # not a token that the model adds


def test_answers_are_joined_to_their_prompts(tokenizer):
    spec = TextSpec(9, ["question: {qa.question} answer:"], answer=["{qa.answer}", "it is {qa.answer}"])
    texts = only(tokenizer, both=spec)
    fields = made(texts, [RECORD] * 40, draws(count=40))
    seen = set()
    for ids, mask, labels in zip(fields["both"], fields["both_mask"], fields["both_labels"], strict=True):
        answer = words(tokenizer, labels[labels != IGNORED])
        seen.add(answer)
        name = answer.split()[-1]
        pieces = (tokenizer.pieces([text]) for text in (f"question: how many {name}? answer:", answer))
        expected = join_prompt_answer(*pieces, 9, bos_id=1, eos_id=2, pad_id=0)
        assert all(torch.equal(got, row[0]) for got, row in zip((ids, mask, labels), expected, strict=True))
    assert len(seen) == 8
    assert "both_labels" in made(texts, [RECORD], draws(train=False))  # asked for in evaluation too
    with pytest.raises(DamagedBatch) as damaged:
        made(
            only(tokenizer, both=replace(spec, answer=["{label}"], clean="albef")),
            [RECORD, {**RECORD, "label": "?!"}],
            draws(count=2),
        )
    assert damaged.value.reasons.keys() == {1} and "nothing is left of an answer" in damaged.value.reasons[1]


def test_every_element_is_a_row(tokenizer):
    texts = only(
        tokenizer,
        all=TextSpec(20, ["{qa.question}"], answer=["{qa.answer}"], every=True),
        names=TextSpec(20, ["a {captions}", "the {captions}"], every=True),
        one=TextSpec(20, ["{qa.question}"]),
    )
    few = {**RECORD, "qa": [{"question": "how many birds?", "answer": "birds"}]}
    for train in (True, False):
        fields = made(texts, [RECORD, few, RECORD], draws(train, count=3))
        assert fields["all_of"].tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2] and fields["all_of"].dtype == torch.int64
        assert fields["all_weight"].tolist() == [0.25, 1.25, 2.25, 3.25, 1.0, 0.25, 1.25, 2.25, 3.25]
        asked = [words(tokenizer, row).split()[2] for row in fields["all"]]
        assert asked == ["dogs", "cats", "birds", "houses", "birds", "dogs", "cats", "birds", "houses"]
        answers = [words(tokenizer, row[row != IGNORED]) for row in fields["all_labels"]]
        assert answers == asked
        assert len(fields["one"]) == 3 and fields["names_of"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert fields["names_weight"].tolist() == [1.0] * 9
        said = [words(tokenizer, row) for row in fields["names"][:3]]
        assert said in ([f"a {x}" for x in RECORD["captions"]], [f"the {x}" for x in RECORD["captions"]])


def test_lists_in_lists(tokenizer):
    """Questions with several weighted answers each: the question is drawn, its answers are rows."""
    questions = [
        {"question": f"how many {name}?", "answers": [{"text": f"{name} {i}", "weight": i + 1} for i in range(count)]}
        for name, count in (("dogs", 2), ("cats", 3))
    ]
    texts = only(tokenizer, question=TextSpec(20, ["{qa.question}"]), answers=TextSpec(20, ["{qa.answers.text}"], every=True))
    seen = set()
    for epoch in range(20):
        fields = made(texts, [{"qa": questions}], draws(epoch=epoch))
        name = words(tokenizer, fields["question"][0]).split()[2]
        assert [words(tokenizer, row) for row in fields["answers"]] == [f"{name} {i}" for i in range(2 if name == "dogs" else 3)]
        assert fields["answers_weight"].tolist() == [1.0, 2.0, 3.0][: len(fields["answers"])]
        seen.add(name)
    assert seen == {"dogs", "cats"}


# --- what is hidden --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_words", [False, True])
def test_masks(tokenizer, by_words):
    mask = MaskSpec(rate=0.4, words=by_words, exact=True, shares=[1.0, 0.0])
    texts = only(tokenizer, a=TextSpec(40, ["[DEC] {caption}"], mask=mask), b=TextSpec(40, ["[DEC] {caption}"], mask=mask))
    records = [{"caption": "an unheardof word and one red dog over unbelievables"}] * 50
    fields = made(texts, records, draws(count=50))
    hidden = fields["a_labels"] != IGNORED
    assert torch.equal(torch.where(hidden, fields["a_labels"], fields["a_masked"]), fields["a"])
    assert (fields["a_masked"][hidden] == tokenizer.mask_id).all() and not hidden[:, :2].any()  # bos, [DEC]
    assert not (hidden & (~fields["a_mask"] | (fields["a"] == tokenizer.eos_id))).any()
    length = int(fields["a_mask"][0].sum()) - 3
    if by_words:
        ids, parts = tokenizer.piece_words([f" {records[0]['caption']}"])[0]
        assert len(ids) == length and len(np.unique(parts)) < length
        for row in hidden[:, 2 : 2 + length].numpy():
            for word in np.unique(parts):
                assert len(set(row[parts == word].tolist())) == 1  # whole words
        assert len({tuple(row) for row in hidden.tolist()}) > 5
    else:
        assert (hidden.sum(1) == round(0.4 * length)).all()
    assert torch.equal(fields["a"], fields["b"]) and not torch.equal(fields["a_labels"], fields["b_labels"])  # independent
    assert made(texts, records[:1], draws(train=False)).keys() == {"a", "a_mask", "b", "b_mask"}
    again = made(texts, records[:1], draws(first=7))
    assert torch.equal(again["a_labels"][0], fields["a_labels"][7])
    assert not torch.equal(made(texts, records, draws(count=50, epoch=1))["a_labels"], fields["a_labels"])
    first = made(texts, records, draws(train=False, count=50))
    assert torch.equal(first["a"], fields["a"])


@pytest.mark.parametrize("by_words", [False, True])
def test_the_token_of_what_is_unknown_is_not_hidden(tmp_path, by_words):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate([*special, "red", "dog"])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.save(str(tmp_path / "tokenizer.json"))
    mask = MaskSpec(1.0, words=by_words, shares=[1.0, 0.0])
    fields = made(only(load_tokenizer(tmp_path), a=TextSpec(9, mask=mask)), [{"caption": "red zebra dog"}], draws())
    assert fields["a"].tolist() == [[1, 5, 4, 6, 2, 0, 0, 0, 0]] and fields["a_masked"].tolist() == [[1, 3, 4, 3, 2, 0, 0, 0, 0]]


def test_rows_of_a_sample_are_hidden_independently(tokenizer):
    texts = only(tokenizer, a=TextSpec(24, ["one red dog two blue cat {captions}"], every=True, mask=MaskSpec(0.5)))
    fields = made(texts, [{"captions": ["x"] * 12}] * 2, draws(count=2))
    hidden = fields["a_labels"] != IGNORED
    assert len({tuple(row) for row in hidden.tolist()}) > 20
    assert torch.equal(made(texts, [{"captions": ["x"] * 12}], draws(first=1))["a_labels"], fields["a_labels"][12:])


# --- targets ---------------------------------------------------------------------------------------------------------------


def test_targets(tokenizer):
    targets = {
        "label": TargetSpec(classes=["cat", "dog"]),
        "kind": TargetSpec("qa.kind", classes=["count", "name"]),
        "number": TargetSpec("qa.weight", "number"),
        "true": TargetSpec("truth", classes=["false", "true"]),
        "from_one": TargetSpec("stars", classes=["bad", "fair", "good"], first=1),
        "plain": TargetSpec("stars"),
        "box": TargetSpec("boxes.box", "vector"),
    }
    texts = only(tokenizer, targets, reply=TextSpec(20, ["{qa.answer}"]))
    record = {**RECORD, "truth": True, "stars": 3, "boxes": [{"box": [1, 2, 3.5, 4]}, {"box": [5, 6, 7, 8]}]}
    fields = made(texts, [record, {**record, "label": 0, "truth": False}], draws(train=False, count=2))
    assert {name: fields[name].tolist() for name in targets} == {
        "label": [1, 0],
        "kind": [0, 0],
        "number": [0.25, 0.25],
        "true": [1, 0],
        "from_one": [2, 2],
        "plain": [3, 3],
        "box": [[1, 2, 3.5, 4]] * 2,
    }
    dtypes = {name: torch.float32 if name in ("number", "box") else torch.int64 for name in targets}
    assert {name: fields[name].dtype for name in targets} == dtypes
    fields = made(texts, [record] * 50, draws(count=50))
    weights = {answer["answer"]: answer["weight"] for answer in QA}
    assert [weights[words(tokenizer, row)] for row in fields["reply"]] == fields["number"].tolist()  # of the same element
    assert len(set(fields["number"].tolist())) == 4 and len(set(map(tuple, fields["box"].tolist()))) == 2


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        (TargetSpec(classes=["cat"]), {}, "target x: \"label\" in the json member is 'dog', none of the 1 class names"),
        (TargetSpec(), {}, "'dog', a name, and no class names are known"),
        (TargetSpec(classes=["a", "b"]), {"label": 2}, "is 2, expected a class name or its number, 0 .. 1"),
        (TargetSpec(classes=["a", "b"], first=1), {"label": 0}, "is 0, expected a class name or its number, 1 .. 2"),
        (TargetSpec(), {"label": -1}, "is -1, expected a number"),
        (TargetSpec(), {"label": 10**30}, "expected a number"),
        (TargetSpec(), {"label": 1.0}, "is 1.0, expected a number"),
        (TargetSpec(), {"label": None}, "is None, expected a number"),
        (TargetSpec(), {"label": []}, 'the list "label" in the json member is empty'),
        (TargetSpec("no.where"), {}, 'target x: there is no "no.where" in the json member'),
        (TargetSpec("caption", "number"), {}, "expected a number"),
        (TargetSpec("x", "number"), {"x": True}, "is True, expected a number"),
        (TargetSpec("x", "number"), {"x": float("nan")}, "is nan, expected a number"),
        (TargetSpec("x", "number"), {"x": 10**400}, "expected a number"),
        (TargetSpec("x", "vector"), {"x": 3}, "is no list of numbers"),
        (TargetSpec("x", "vector"), {"x": [1, 2, "a"]}, "expected a number"),
        (TargetSpec("x", "vector"), {"x": [1, 2]}, "has 2 numbers, the other samples' 3"),
    ],
)
def test_damaged_targets(tokenizer, target, change, message):
    texts = only(tokenizer, {"x": target})
    texts.targets.measure([{"x": "no"}, {"x": [1, 2, 3]}])
    with pytest.raises(DamagedSample) as damaged:
        texts.inspect(None, {**RECORD, **change})
    assert message in str(damaged.value)


def test_vectors_that_no_sample_has(tokenizer):
    with pytest.raises(UserError, match="the first 2 samples have no target 'x': target x: there is no \"x\""):
        only(tokenizer, {"x": TargetSpec("x", "vector")}).targets.measure([{}, {}])


# --- damage and mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("templates", "change", "message"),
    [
        (["{caption}"], {"caption": 3}, "no caption (a member txt"),
        (["{nothing}"], {}, 'there is no "nothing" in the json member'),
        (["{inner.none}"], {}, 'there is no "inner.none" in the json member'),
        (["{label.deep}"], {}, 'there is no "label.deep" in the json member'),
        (["{label}"], {"label": 3}, '"label" in the json member is a int, expected a text'),
        (["{label}"], {"label": None}, "is a NoneType, expected a text"),
        (["{label}"], {"label": "  "}, '"label" in the json member is empty'),
        (["{captions}"], {"captions": []}, 'the list "captions" in the json member is empty'),
        (["{captions}"], {"captions": [["a"]]}, 'the list "captions" in the json member has lists as its elements'),
        (["{captions}"], {"captions": ["a", 1]}, '"captions" in the json member is a int'),
        (["a {label}", "{qa.answer}"], {"qa": [{"answer": "a"}, {}]}, 'there is no "qa.answer"'),  # whatever is drawn
        (["{label}"], {"label": "\ud800"}, "is not a text"),
        (["{captions}"], {"captions": ["a", "\ud800"]}, "is not a text"),
    ],
)
def test_damaged_fields(tokenizer, templates, change, message):
    texts = only(tokenizer, one=TextSpec(20, templates))
    with pytest.raises(DamagedSample) as damaged:
        texts.inspect(None, {**RECORD, **change})
    assert message in str(damaged.value)


@pytest.mark.parametrize(
    ("templates", "change", "message"),
    [
        (["{label}"], {}, "one: expected the elements of one list in its fields, got none"),
        (["{captions} {qa.answer}"], {}, "got those of captions and qa"),
        (
            ["{qa.answer}"],
            {"qa": [{"answer": "a", "weight": "much"}]},
            "\"qa.weight\" in the json member is 'much', expected a number",
        ),
        (["{qa.answer}"], {"qa": [{"answer": "a", "weight": -1}]}, "is -1, expected a number"),
    ],
)
def test_damaged_lists_of_rows(tokenizer, templates, change, message):
    texts = only(tokenizer, one=TextSpec(20, templates, every=True))
    with pytest.raises(DamagedSample) as damaged:
        texts.inspect(None, {**RECORD, **change})
    assert message in str(damaged.value)


@pytest.mark.parametrize(
    ("texts", "targets", "message"),
    [
        ({"a": TextSpec(20, ["{label"])}, {}, "a.templates: '{label' is no template"),
        ({"a": TextSpec(20, ["{}"])}, {}, "a.templates: expected fields of the sample's JSON such as"),
        ({"a": TextSpec(20, ["{label:>3}"])}, {}, "expected fields"),
        ({"a": TextSpec(20, ["{qa..x}"])}, {}, "expected fields"),
        ({"a": TextSpec(20, ["{qa[0]}"])}, {}, "expected fields"),
        ({"a": TextSpec(20, [])}, {}, "a.templates: expected at least one, got none"),
        ({"a": TextSpec(1)}, {}, r"a.context_length: expected at least 2 \(bos and eos\), got 1"),
        ({"a": TextSpec(2, answer=["x"])}, {}, r"a.context_length: expected at least 3 \(bos, an answer and eos\), got 2"),
        ({"a": TextSpec(20, clean="bert")}, {}, 'a.clean: expected "" or "albef"'),
        ({"a": TextSpec(20, drop="middle")}, {}, 'a.drop: expected "end" or "start"'),
        ({"a": TextSpec(20, max_words=-1)}, {}, "a.max_words: expected 0 or more"),
        ({"a": TextSpec(20, answer=["x"], mask=MaskSpec())}, {}, "a: answer and mask both say what a_labels asks for"),
        ({"a": TextSpec(20, mask=MaskSpec(1.5))}, {}, "a.mask.rate"),
        ({"a": TextSpec(20, mask=MaskSpec(longest=2))}, {}, "a.mask.longest"),
        ({"a": TextSpec(20, mask=MaskSpec(shares=[0.9, 0.2]))}, {}, "a.mask.shares"),
        ({"image": TextSpec(20)}, {}, "two fields of a batch would have the name 'image'"),
        ({"a": TextSpec(20)}, {"a_mask": TargetSpec()}, "would have the name 'a_mask'"),
        ({"A b": TextSpec(20)}, {}, "expected a name of small letters"),
        ({"text": TextSpec(20)}, {}, "is the text that data.text describes"),
        ({}, {"a": TargetSpec(kind="classes")}, 'a.kind: expected "class", "number" or "vector"'),
        ({}, {"a": TargetSpec("x.")}, "a.key: expected a field"),
        ({}, {"a": TargetSpec(classes=["x", "x"])}, "a.classes: expected each name once"),
    ],
)
def test_mistakes_in_the_specification(tokenizer, texts, targets, message):
    with pytest.raises(UserError, match=message):
        only(tokenizer, targets, **texts)


def test_tokenizers_by_name(tokenizer):
    other = train_tokenizer(["an entirely different corpus of words"] * 2, 300)
    spec = DataSpec(None, TextSpec(20), texts={"b": TextSpec(20, tokenizer="other")})
    texts = Texts(spec, {"": tokenizer, "other": other})
    fields = made(texts, [RECORD], draws())
    for name, of in (("text", tokenizer), ("b", other)):
        assert torch.equal(fields[name], of.encode(["A red dog."], 20)[0])
    with pytest.raises(ValueError, match="tokenizer: the text 'b' is written with 'other', there is ''"):
        Texts(spec, {"": tokenizer})
    with pytest.raises(UserError, match=r"a\.mask: the tokenizer '' has no mask token"):
        Texts(DataSpec(None, None, texts={"a": TextSpec(20, mask=MaskSpec())}), {"": other})

    class Least:
        vocab_size, pad_id, bos_id, eos_id = 9, 0, 1, 2

        def encode(self, texts, context_length):
            return tokenizer.encode(texts, context_length)

    assert torch.equal(made(only(Least(), a=TextSpec(20)), [RECORD], draws())["a"], fields["text"])
    with pytest.raises(ValueError, match="needs pieces and words of a TextTokenizer, Least has none"):
        only(Least(), a=TextSpec(20, drop="start"))


# --- through the loader ------------------------------------------------------------------------------------------------------


SPEC = DataSpec(
    None,
    TextSpec(16, mask=MaskSpec(0.3)),
    texts={
        "question": TextSpec(16, ["{qa.question}", "please: {qa.question}"], answer=["{qa.answer}"]),
        "answers": TextSpec(12, ["{qa.answer}"], every=True),
    },
    targets={"label": TargetSpec(classes=["dog", "cat"]), "weight": TargetSpec("qa.weight", "number")},
)


def write(folder, count=30, bad=(), txt=True):
    with ShardWriter(folder, "s", samples_per_shard=8) as writer:
        for i in range(count):
            record = {**RECORD, "caption": f"dog number {i}", "label": ["dog", "cat"][i % 2], "qa": QA[: 1 + i % 4]}
            record = {**record, "qa": []} if i in bad else record
            members = {"json": json.dumps(record).encode()} | ({"txt": f"a red dog {i}".encode()} if txt else {})
            writer.write(f"k{i:03d}", members)
    return str(folder)


def equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


def test_a_batch_holds_every_text_and_target(tmp_path, tokenizer):
    loader = make_loader(write(tmp_path), SPEC, tokenizer, 7, train=True)
    batch = next(iter(loader))
    assert batch.keys() == {
        "index", "key", "text", "text_mask", "text_masked", "text_labels", "question", "question_mask", "question_labels",
        "answers", "answers_mask", "answers_of", "answers_weight", "label", "weight",
    }  # fmt: skip
    rows = sum(1 + i % 4 for i in batch["index"].tolist())
    assert batch["answers"].shape == (rows, 12) and batch["answers_of"].max() == 6
    assert batch["label"].tolist() == [i % 2 for i in batch["index"].tolist()]
    for row, index in enumerate(batch["index"].tolist()):
        assert words(tokenizer, batch["text"][row]).replace(" ", "") == f"areddog{index}"  # the txt before the JSON's caption
    evaluated = list(make_loader(str(tmp_path), SPEC, tokenizer, 7, train=False))
    assert {key for batch in evaluated for key in batch} == batch.keys() - {"text_masked", "text_labels"}
    assert torch.cat([batch["weight"] for batch in evaluated]).unique().tolist() == [0.25]
    without = write(tmp_path / "without", txt=False)
    first = next(iter(make_loader(without, SPEC, tokenizer, 3, train=False)))
    assert words(tokenizer, first["text"][2]).replace(" ", "") == "dognumber2"


def test_damage_is_named_and_made_up_for(tmp_path, tokenizer):
    folder = write(tmp_path, bad={3, 11, 29})
    loader = make_loader(folder, SPEC, tokenizer, 4, train=False)
    seen = [index for batch in loader for index in batch["index"].tolist()]
    assert seen == [i for i in range(30) if i not in (3, 11, 29)]
    assert loader.skipped == dict.fromkeys(
        ("s-000000.tar:k003", "s-000001.tar:k011", "s-000003.tar:k029"), 'the list "qa" in the json member is empty'
    )
    # found only when it is tokenised
    spec = DataSpec(None, None, texts={"a": TextSpec(9, ["x"], answer=["{qa.answer}"], clean="albef")})
    with ShardWriter(tmp_path / "late", "s") as writer:
        for i in range(12):
            writer.write(f"k{i}", {"json": json.dumps({"qa": {"answer": "?!" if i in (0, 5, 11) else "dog"}}).encode()})
    loader = make_loader(str(tmp_path / "late"), spec, tokenizer, 4, train=False)
    assert [batch["index"].tolist() for batch in loader] == [[1, 2, 3, 4], [6, 7, 8, 9], [10]]
    assert len(loader.skipped) == 3


def test_a_field_that_no_sample_has_is_told_at_once(tmp_path, tokenizer, caplog):
    folder = write(tmp_path)
    spec = DataSpec(None, TextSpec(9), texts={"a": TextSpec(9, ["{qa.questoin}"])})
    loader = make_loader(folder, spec, tokenizer, 4, train=True)
    assert caplog.messages == ['none of the first 8 samples can be used: there is no "qa.questoin" in the json member']
    with pytest.raises(UserError, match=r"too few samples can be used: 30 of this rank's 30 are damaged.*qa.questoin"):
        next(iter(loader))
    caplog.clear()
    make_loader(write(tmp_path / "b", bad=range(7)), SPEC, tokenizer, 4, train=True)
    assert not caplog.messages


def test_the_position_is_exact_and_ranks_share(tmp_path, tokenizer):
    folder = write(tmp_path, bad={4})
    whole = make_loader(folder, SPEC, tokenizer, 4, train=True, seed=5)
    batches = list(islice(whole, 20))
    for at in (0, 1, 6, 7, 13):
        first = make_loader(folder, SPEC, tokenizer, 4, train=True, seed=5)
        for _ in zip(range(at), first, strict=False):
            pass
        state = json.loads(json.dumps(first.state_dict()))
        second = make_loader(folder, SPEC, tokenizer, 4, train=True, seed=5)
        second.load_state_dict(state)
        for batch, other in zip(batches[at:], second, strict=False):
            equal(batch, other)
    halves = [make_loader(folder, SPEC, tokenizer, 2, train=True, seed=5, rank=rank, world_size=2) for rank in range(2)]
    alone = {}
    for batch, _ in zip(whole_again := make_loader(folder, SPEC, tokenizer, 4, train=True, seed=5), range(6), strict=False):
        alone |= {i: (batch["text"][row], batch["question"][row]) for row, i in enumerate(batch["index"].tolist())}
    whole_again.close()
    met = set()
    for half in halves:
        for batch in islice(half, 6):
            for row, index in enumerate(batch["index"].tolist()):
                assert index not in met
                met.add(index)
                if index in alone:
                    assert torch.equal(alone[index][0], batch["text"][row]) and torch.equal(
                        alone[index][1], batch["question"][row]
                    )
    assert len(met & alone.keys()) > 15


def test_templates_of_a_source(tmp_path, tokenizer):
    sources = {"a": write(tmp_path / "a", 12), "b": write(tmp_path / "b", 12), "c": write(tmp_path / "c", 12)}
    spec = DataSpec(None, None, texts={"t": TextSpec(20, ["{caption}"], answer=["yes"]), "u": TextSpec(20, ["u {label}"])})
    options = {
        "templates": {"b": {"t": ["b {label}"]}, "c": {"u": ["c"], "t": ["{captions}"]}},
        "answers": {"c": {"t": ["{qa.kind}"]}},
    }
    (batch,) = make_loader(sources, spec, tokenizer, 36, train=False, **options)
    said = [
        [words(tokenizer, batch["t"][row]), words(tokenizer, batch["u"][row]), int(batch["source"][row])] for row in (0, 13, 24)
    ]
    assert said == [["a red dog 0 yes", "u dog", 0], ["b cat yes", "u cat", 1], ["one count", "c", 2]]
    for wrong, message, kind in (
        ({"templates": {"x": {}}}, "templates, answers: expected those of sources, got 'x'", ValueError),
        ({"templates": {"a": {"x": ["y"]}}}, "templates of an unknown text 'x'; the texts are t, u", UserError),
        ({"answers": {"a": {"x": ["y"]}}}, "answers of an unknown text 'x'", UserError),
        ({"answers": {"a": {"u": ["y"]}}}, "u.answer: expected one in every source or in none", UserError),
        ({"templates": {"a": {"t": []}}}, "t.templates: expected at least one", UserError),
    ):
        with pytest.raises(kind, match=message):
            make_loader(sources, spec, tokenizer, 4, train=False, **wrong)
    with pytest.raises(ValueError, match="need sources"):
        make_loader(sources["a"], spec, tokenizer, 4, train=False, templates={"a": {}})
    with ShardWriter(tmp_path / "d", "d") as writer:
        writer.write("k", {"txt": b"a dog"})
    with pytest.raises(UserError, match=r"source d: its first 1 samples have nothing to make 'u' from \(a member json\)"):
        make_loader({**sources, "d": str(tmp_path / "d")}, spec, tokenizer, 4, train=False)
    fine = {"templates": {"d": {"u": ["nothing"], "t": ["{caption}"]}}}
    assert len(make_loader({**sources, "d": str(tmp_path / "d")}, spec, tokenizer, 4, train=False, **fine)) == 10
