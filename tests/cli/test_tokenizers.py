"""The tokenizers of a run, by name: trained on what its texts say, loaded, checked, kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlpfast.cli import assemble
from vlpfast.cli.tokenizers import build_tokenizers, load_tokenizers, texts_said
from vlpfast.data import ShardWriter, load_tokenizer, train_tokenizer
from vlpfast.types import DataSpec, MaskSpec, TextSpec, UserError, Vocabulary

CLIP = str(Path(__file__).parents[2] / "configs" / "clip.yaml")
TEXTS = {
    "question": TextSpec(16, ["[ASK] {qa.question} so", "Q: {qa.question}"], answer=["{qa.answer}"], tokenizer="lm"),
    "other": TextSpec(16, ["{label}"], clean="albef", tokenizer="lm"),
}


@pytest.fixture
def shards(tmp_path: Path) -> str:
    with ShardWriter(tmp_path / "shards", "s", samples_per_shard=8) as writer:
        for i in range(20):
            qa = [{"question": f"zebra {x}", "answer": x} for x in ("yes", "no")][: 1 + i % 2]
            record = {"qa": qa, "label": "big-dog"} if i != 3 else {"qa": []}
            writer.write(f"k{i}", {"txt": b"a caption", "json": json.dumps(record).encode()})
    return str(tmp_path / "shards")


def config_of(
    shards: str, vocabularies: dict[str, Vocabulary], *overrides: str, text: TextSpec | None = None, texts=TEXTS, mixture=False
):
    where = f"data.mixture.a.shards=['{shards}']" if mixture else f"data.train=['{shards}']"
    config = assemble.load_config(CLIP, ["data.source=shards", where, *overrides])
    model = SimpleNamespace(data=DataSpec(None, text, texts=texts), vocabularies=lambda: vocabularies)
    return replace(config, model=replace(config.model, config=model))


TWO = {"": Vocabulary(300, eos_id=2), "lm": Vocabulary(400, bos_id=1, eos_id=2, pad_id=0, extra=["[ASK]", "[DEC]"])}


def test_each_is_trained_on_what_its_texts_say(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(shards, TWO, text=TextSpec(16, mask=MaskSpec()))
    byte_level = train_tokenizer([], 261, extra=["[ASK]"])
    assert list(texts_said(config, "", byte_level, [shards])) == ["a caption"] * 20
    said = list(texts_said(config, "lm", byte_level, [shards]))
    assert len(said) == 9 * 3 * 2 + 10 * 3 + 19 and set(said) == {
        " zebra yes so", " zebra no so", "Q: zebra yes", "Q: zebra no", "yes", "no", "big dog",
    }  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    made = build_tokenizers(config, [shards], run)
    assert "training the tokenizer on the texts\ntraining the tokenizer lm on the texts\n" in capsys.readouterr().err
    assert made.keys() == {"", "lm"} and {path.name for path in run.iterdir()} == {"tokenizer.json", "tokenizer-lm.json"}
    assert made[""].mask_id == 3 and made["lm"].mask_id is None  # a text written with it hides words
    assert made["lm"].extra == {"[ASK]": 3, "[DEC]": 4} and made["lm"].vocab_size <= 400
    assert len(made["lm"].pieces(["zebra"])[0]) == 1 < len(made[""].pieces(["zebra"])[0])
    again = build_tokenizers(config, [shards], run, first=False)
    kept = load_tokenizers(config, run)
    for name, tokenizer in made.items():
        for other in (again[name], kept[name]):
            assert other.extra == tokenizer.extra and other.vocab_size == tokenizer.vocab_size
            assert other.encode(["zebra [ASK] yes"], 20)[0].tolist() == tokenizer.encode(["zebra [ASK] yes"], 20)[0].tolist()


def test_sources_say_their_own(shards: str) -> None:
    own = ['data.mixture.a.templates={other: ["a {label} here"]}', 'data.mixture.a.answers={question: ["it is {qa.answer}"]}']
    config = config_of(shards, TWO, *own, mixture=True)
    said = set(texts_said(config, "lm", train_tokenizer([], 261), {"a": [shards]}))
    assert {"it is yes", "it is no", "a big dog here", "Q: zebra yes"} <= said and not {"yes", "big dog"} & said


def test_without_a_text_it_is_trained_on_captions(shards: str, tmp_path: Path) -> None:
    config = config_of(shards, {"": Vocabulary(300)}, texts={})
    assert set(texts_said(config, "", train_tokenizer([], 259), [shards])) == {"a caption"}
    with ShardWriter(tmp_path / "none", "s") as writer:
        writer.write("k", {"cls": b"3"})
    with pytest.raises(UserError, match=r"data.tokenizer: none is given, and the samples hold no text to train one on"):
        build_tokenizers(config, [str(tmp_path / "none")], tmp_path)


def test_given_ones_get_the_tokens_of_the_model(shards: str, tmp_path: Path) -> None:
    train_tokenizer(["red zebra dog"] * 3, 300, mask=True).save(str(tmp_path / "given.json"))
    given = load_tokenizer(tmp_path / "given.json")
    config = config_of(shards, TWO, f"data.tokenizers={{lm: '{tmp_path}/given.json'}}")
    run = tmp_path / "run"
    run.mkdir()
    made = build_tokenizers(config, [shards], run)["lm"]
    assert made.extra == {"[ASK]": given.vocab_size, "[DEC]": given.vocab_size + 1} and made.vocab_size == given.vocab_size + 2
    assert load_tokenizers(config, run)["lm"].extra == made.extra
    (piece,) = made.pieces(["zebra [ASK]"])
    assert made.extra["[ASK]"] not in piece and made.decode([*piece, made.extra["[ASK]"]]) == made.decode(piece)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (Vocabulary(300, eos_id=7), "data.tokenizers.lm: expected the eos_id 2, the tokenizer's, the model clip has 7"),
        (Vocabulary(300, eos_id=0), "expected the eos_id 2"),
        (Vocabulary(300, bos_id=2), "expected the bos_id 1"),
        (Vocabulary(300, pad_id=2), "expected the pad_id 0"),
        (Vocabulary(300, mask_id=4), "data.tokenizers.lm: the model clip hides words, the tokenizer has no mask token"),
        (Vocabulary(300, mask=True), "hides words"),
        (Vocabulary(200), r"expected a vocab_size of at least \d+, as many as the tokenizer has ids, the model clip has 200"),
        (Vocabulary(300, extra=["zebra"]), "'zebra' is an ordinary token"),
    ],
)
def test_given_ones_that_do_not_fit(shards: str, tmp_path: Path, vocabulary: Vocabulary, message: str) -> None:
    from tokenizers import Tokenizer

    trained = train_tokenizer(["red zebra dog"] * 3, 290)
    trained.save(str(tmp_path / "given.json"))
    backend = Tokenizer.from_file(str(tmp_path / "given.json"))
    backend.add_tokens(["zebra"])
    backend.save(str(tmp_path / "given.json"))
    config = config_of(shards, {"lm": vocabulary}, f"data.tokenizers={{lm: '{tmp_path}/given.json'}}")
    with pytest.raises(UserError, match=message):
        build_tokenizers(config, [shards], tmp_path)
    assert not (tmp_path / "tokenizer-lm.json").exists()


def test_names_that_do_not_belong_together(shards: str, tmp_path: Path) -> None:
    for name, hint in (("llm", r"; did you mean 'lm'\? \(it has lm\)"), ("x", r" \(it has lm\)"), ("''", r" \(it has lm\)")):
        with pytest.raises(UserError, match=rf"data.tokenizers: clip has no tokenizer '{name.strip(chr(39))}'{hint}"):
            build_tokenizers(config_of(shards, TWO, f"data.tokenizers={{{name}: x.json}}"), [shards], tmp_path)
    with pytest.raises(UserError, match="the text 'question' is written with the tokenizer 'lm', the model has ''"):
        build_tokenizers(config_of(shards, {"": Vocabulary(300)}), [shards], tmp_path)
    too_small = {"": Vocabulary(300), "lm": Vocabulary(100)}
    with pytest.raises(
        UserError, match=r"data.tokenizers.lm: none is given, and none can be trained: vocab_size: expected at least"
    ):
        build_tokenizers(config_of(shards, too_small), [shards], tmp_path)
    with pytest.raises(UserError, match=r"there is no file .*tokenizer.json"):
        load_tokenizers(config_of(shards, TWO), tmp_path / "none")


def test_names_of_special_tokens_lie_beside_each_tokenizer(tmp_path: Path) -> None:
    """Two tokenizers of a run in one folder, whose special tokens are named differently."""
    from tokenizers import Tokenizer, models

    for folder, names in (("a", ("<a>", "<b>")), ("b", ("<b>", "<a>"))):
        (tmp_path / folder).mkdir()
        Tokenizer(models.WordLevel({"<a>": 0, "<b>": 1, "x": 2}, unk_token="x")).save(str(tmp_path / folder / "tokenizer.json"))
        config = {"bos_token": names[0], "eos_token": names[1], "pad_token": names[1]}
        (tmp_path / folder / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(tmp_path / "a").save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path / "b").save(str(tmp_path / "tokenizer-lm.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").bos_id == 0 and load_tokenizer(tmp_path / "tokenizer-lm.json").bos_id == 1


def test_yaml_of_nested_texts(shards: str, tmp_path: Path) -> None:
    from vlpfast.training.config import to_yaml

    overrides = [
        f"data.mixture.a.shards=['{shards}']",
        "data.mixture.a.templates={text: ['{label}']}",
        "data.mixture.a.answers={question: ['{x}']}",
        "data.source=shards",
        "data.weights=sqrt",
        "data.shots=4",
        "data.classes=base",
        "data.tokenizers={lm: x.json}",
        "model.data.text.mask={rate: 0.3, words: true}",
        "model.data.texts={question: {templates: ['{qa.question}'], answer: ['{qa.answer}'], every: true, tokenizer: lm}}",
        "model.data.targets={label: {classes: [a, b], first: 1}, box: {key: objects.box, kind: vector}}",
        "model.data.image.pictures=2",
    ]
    config = assemble.load_config(CLIP, overrides)
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    again = assemble.load_config(tmp_path / "printed.yaml")
    assert again == config and type(again.model.config.data.texts["question"]) is TextSpec
    assert again.model.config.data.text.mask == MaskSpec(0.3, words=True) and again.data.mixture["a"].templates == {
        "text": ["{label}"]
    }
    for wrong, message in (
        ("model.data.texts={question: {template: [x]}}", "unknown key .*template"),
        ("model.data.targets={label: {kind: [x]}}", "kind"),
        ("data.shots=-1", "data.shots: expected 0 or more, got -1"),
        ("data.classes=half", "data.classes"),
        ("data.mixture.a.weight=2", "data.weights=sqrt: data.mixture.a has a weight of its own"),
    ):
        with pytest.raises(UserError, match=message):
            assemble.load_config(CLIP, [*overrides, wrong])
    with pytest.raises(UserError, match=r"data.weights=sqrt: data.mixture is empty"):
        assemble.load_config(CLIP, ["data.weights=sqrt"])
