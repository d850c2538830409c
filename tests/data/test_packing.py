"""Batches of packed documents through the loader."""

import io
import json
from importlib.util import find_spec
from itertools import islice

import pytest
import torch
from PIL import Image

from vlpfast.data import ShardWriter, make_loader, train_tokenizer
from vlpfast.data.documents import interleaved_document, pack_rows, text_document
from vlpfast.data.masking import IGNORED
from vlpfast.types import AugmentSpec, DataSpec, DocumentSpec, ImageSpec, Loader, RandAugmentSpec, TextSpec, UserError

HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
WORDS = "one two three four five six seven eight nine ten".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 3, 400, extra=["<image>", "<end>"])


def picture(number, kind="JPEG"):
    out = io.BytesIO()
    Image.new("RGB", (30 + number % 5, 40), (number * 3 % 256, 255 - number % 256, 128)).save(out, kind)
    return out.getvalue()


def text_of(i):
    return " ".join(WORDS[(i + k) % 10] for k in range(1 + 3 * i % 17))


def write_texts(folder, count=40, bad=()):
    with ShardWriter(folder, "t", samples_per_shard=9) as writer:
        for i in range(count):
            writer.write(f"k{i:03d}", {"txt": b"\xff" if i in bad else text_of(i).encode()})
    return str(folder)


def parts_of(i):
    pictures = i % 4
    parts = [{"text": text_of(i)}]
    for p in range(pictures):
        parts += [{"image": f"{p}.{'png' if p % 2 else 'jpg'}"}, {"text": " ".join(WORDS[: 1 + (i + p) % 5])}]
    return parts


def write_documents(folder, count=40, change=lambda i, members: members):
    with ShardWriter(folder, "d", samples_per_shard=9) as writer:
        for i in range(count):
            members = {}
            for part in parts_of(i):
                if name := part.get("image"):
                    members[name] = picture(4 * i + len(members), "PNG" if "png" in name else "JPEG")
            members["json"] = json.dumps({"parts": parts_of(i), "number": i}).encode()
            writer.write(f"k{i:03d}", change(i, members))
    return str(folder)


TEXTS = DataSpec(None, None, documents=DocumentSpec(24))
PICTURES = DataSpec(ImageSpec(16), None, documents=DocumentSpec(40, tokens_per_image=3, end_token="<end>", asked="pictured"))


def equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


def documents_in(batch):
    """index -> ids of each."""
    text, cu = batch["text"].flatten(), batch["cu_seqlens"].tolist()
    return {
        int(batch["index"][number]): text[begin:end].tolist()
        for begin, end, number in zip(cu, cu[1:], batch["document"].tolist(), strict=False)
        if number >= 0
    }


def test_texts_in_order_each_once(tmp_path, tokenizer):
    loader = make_loader(write_texts(tmp_path, bad={7, 39}), TEXTS, tokenizer, 3, train=False)
    assert isinstance(loader, Loader)
    batches = list(loader)
    keys = {"index", "key", "text", "text_mask", "text_labels", "positions", "cu_seqlens", "document", "image_slots", "image_of"}
    whole = [i for i in range(40) if i not in (7, 39)]
    assert [index for batch in batches for index in batch["index"].tolist()] == whole
    assert loader.skipped.keys() == {"t-000000.tar:k007", "t-000004.tar:k039"}
    for batch in batches:
        assert batch.keys() == keys and batch["text"].shape == (3, 24) and batch["key"] == [f"k{i:03d}" for i in batch["index"]]
        for index, ids in documents_in(batch).items():
            assert ids == text_document(text_of(index), tokenizer).ids.tolist()[:24]
    lengths = [min(24, len(text_document(text_of(i), tokenizer).ids)) for i in whole]
    at = 0
    for batch in batches:  # as many as fit
        count = len(pack_rows(lengths[at:], 3, 24)[0])
        assert len(batch["index"]) == count
        at += count
    assert 0.5 * len(batches) <= len(loader) <= 2 * len(batches)


def test_training_has_each_document_at_most_once_an_epoch(tmp_path, tokenizer):
    loader = make_loader(write_texts(tmp_path, bad={7}), TEXTS, tokenizer, 3, train=True, seed=2)
    epochs = {}
    for batch in islice(loader, 30):
        epochs.setdefault(loader.state_dict()["epoch"], []).extend(batch["index"].tolist())
        assert batch["text_mask"].float().mean() > 0.5
    assert len(epochs) > 3
    for seen in list(epochs.values())[:-1]:
        assert len(set(seen)) == len(seen) >= 30 and 7 not in seen
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", ["texts", "pictures"])
def test_the_position_is_exact_over_packing(tmp_path, tokenizer, kind):
    if kind == "texts":
        folder, spec = write_texts(tmp_path, bad={3, 20}), TEXTS
    else:
        broken = lambda i, members: members | {"0.jpg": members["0.jpg"][:-60]} if i in (5, 22) else members  # noqa: E731
        folder, spec = write_documents(tmp_path, change=broken), PICTURES

    def opened(world=1, rank=0):
        return make_loader(folder, spec, tokenizer, 4 // world, train=True, seed=1, backend="plain", world_size=world, rank=rank)

    whole = opened()
    batches, states = [], [json.loads(json.dumps(whole.state_dict()))]
    for batch in islice(whole, 14):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state_dict())))
    whole.close()
    for at in range(0, 13, 2):
        again = opened()
        again.load_state_dict(states[at])
        for batch, other in zip(batches[at : at + 3], again, strict=False):
            equal(batch, other)
        again.close()
    # by two ranks from there on: what is left of the epoch, none twice
    at = next(i for i, state in enumerate(states) if state["epoch"] == 1 and state["cursor"] > 0)
    before = {
        i
        for batch, state in zip(batches[:at], states[1 : at + 1], strict=True)
        if state["epoch"] == 1
        for i in batch["index"].tolist()
    }
    seen = []
    for rank in range(2):
        loader = opened(2, rank)
        loader.load_state_dict([states[at]])
        for batch in loader:
            if loader.state_dict()["epoch"] > 1:
                break
            seen += batch["index"].tolist()
        loader.close()
    assert len(set(seen)) == len(seen) and not before & set(seen) and len(seen) + len(before) > 20


@pytest.mark.parametrize("train", [True, False])
def test_pictures_between_texts(tmp_path, tokenizer, train):
    folder = write_documents(tmp_path)
    loader = make_loader(folder, PICTURES, tokenizer, 3, train=train, backend="plain", with_meta=True)
    image, end = tokenizer.extra["<image>"], tokenizer.extra["<end>"]
    met = set()
    for batch in islice(loader, 9):
        slots, of = batch["image_slots"], batch["image_of"]
        assert len(batch["image"]) == len(batch["crop"]) == len(slots) == len(of) and batch["image"].shape[1:] == (3, 16, 16)
        text = batch["text"].flatten()
        for place in range(3):
            assert (text[slots + place] == image).all()
        assert (text == image).sum() == 3 * len(slots)
        for number, (document, place) in enumerate(of.tolist()):
            index = int(batch["index"][document])
            met.add((index, place))
            if not train:
                assert batch["meta"][document]["number"] == index
                # the first window holds the first pictures
                level = torch.tensor([(4 * index + place) * 3 % 256, 255 - (4 * index + place) % 256, 128]) / 255
                shown = batch["image"][number].mean((1, 2)) * torch.tensor(ImageSpec().std) + torch.tensor(ImageSpec().mean)
                assert (shown - level).abs().max() < 0.03
        labels = batch["text_labels"].flatten()
        assert (labels[text == image] == IGNORED).all() and (labels[text == end] == end).all()
        first = {int(document): int(slot) for slot, (document, _) in reversed(list(zip(slots, of.tolist(), strict=True)))}
        cu = batch["cu_seqlens"].tolist()
        for begin, stop, document in zip(cu, cu[1:], batch["document"].tolist(), strict=False):
            asked = labels[begin : first.get(document, stop)] if document >= 0 else labels[begin:stop]
            assert (asked == IGNORED).all()  # before its first picture
        if not train:
            for index, ids in documents_in(batch).items():
                record = {"parts": parts_of(index)}
                document = interleaved_document(record, tokenizer, image_id=image, tokens_per_image=3, end_id=end)
                assert document.ids.tolist()[: len(ids)] == ids
    assert len(met) > 20


def test_without_pictures_and_with_fewer(tmp_path, tokenizer):
    folder = write_documents(tmp_path)
    spec = DataSpec(None, None, documents=DocumentSpec(40, image_token=""))
    for batch in make_loader(folder, spec, tokenizer, 3, train=False):
        assert "image" not in batch and not len(batch["image_slots"])
        for index, ids in documents_in(batch).items():
            joined = [
                token for part in parts_of(index) if "text" in part for token in tokenizer.pieces([part["text"]])[0].tolist()
            ]
            assert ids == [1, *joined, 2][:40]
    spec = DataSpec(ImageSpec(16), None, documents=DocumentSpec(60, max_images=1))
    batches = list(make_loader(folder, spec, tokenizer, 3, train=False, backend="plain"))
    assert all((batch["image_of"][:, 1] == 0).all() for batch in batches)
    assert sum(len(batch["image"]) for batch in batches) == 30
    augment = AugmentSpec(rand_augment=RandAugmentSpec())
    for train in (True, False):  # not one picture
        spec = DataSpec(ImageSpec(16, augment=augment), None, documents=DocumentSpec(24))
        batch = next(iter(make_loader(write_texts(tmp_path / f"t{train}"), spec, tokenizer, 3, train=train, backend="plain")))
        assert batch["image"].shape == (0, 3, 16, 16) and batch["crop"].shape == (0, 5) and ("warp" in batch) == train


@pytest.mark.skipif(not HAS_DALI, reason="waits for the package nvidia-dali")
def test_dali_shows_the_same(tmp_path, tokenizer):
    spec = DataSpec(ImageSpec(16, mirror=0.5, scale=[0.3, 1.0]), None, documents=DocumentSpec(40))
    folder = write_documents(tmp_path)
    made = [islice(make_loader(folder, spec, tokenizer, 3, train=True, backend=of), 6) for of in ("dali", "plain")]
    for a, b in zip(*made, strict=True):
        assert len(a["image"]) > 3 and (a["image"] - b["image"]).abs().max() < 0.06
        equal({name: value for name, value in a.items() if name != "image"}, {k: v for k, v in b.items() if k != "image"})


def test_damage(tmp_path, tokenizer):
    def change(i, members):
        if i == 1:
            return {name: content for name, content in members.items() if name == "json"}
        if i == 2:
            return members | {"1.png": b"no picture"}
        if i == 3:  # found when it is decoded
            return members | {"1.png": members["1.png"][: len(members["1.png"]) // 2]}
        if i == 4:
            return members | {"json": b'{"parts": [{"text": 1}]}'}
        if i == 6:
            return {"json": b"{}"}
        if i == 8:
            return members | {"json": b'{"parts": [{"text": "\\ud800"}]}'}
        return members

    loader = make_loader(write_documents(tmp_path, change=change), PICTURES, tokenizer, 3, train=False, backend="plain")
    seen = [index for batch in loader for index in batch["index"].tolist()]
    assert seen == [i for i in range(40) if i not in (1, 2, 3, 4, 6, 8)]
    reasons = {name[-3:]: reason for name, reason in loader.skipped.items()}
    assert (
        reasons["001"] == "it has no member '0.jpg', which its parts name" and reasons["002"] == "not a picture in a known format"
    )
    assert reasons["003"] and reasons["004"].startswith('the json has no list "parts"')
    assert reasons["006"].startswith("no document (a member txt") and "not a text" in reasons["008"]
    with pytest.raises(
        UserError, match=r"the documents do not fill one batch of 90 rows of 40 tokens: 36 of this rank's 40 can be used, 4"
    ):
        next(iter(make_loader(str(tmp_path), PICTURES, tokenizer, 90, train=True, backend="plain")))


def test_damage_among_many_pictures_is_that_of_its_document(tmp_path, tokenizer):
    """Pictures are decoded in parts of as many as there are rows."""

    def change(i, members):
        return members | {"1.png": members["1.png"][: len(members["1.png"]) // 2]} if i in (6, 15, 22) else members

    spec = DataSpec(ImageSpec(16), None, documents=DocumentSpec(150))
    loader = make_loader(write_documents(tmp_path, change=change), spec, tokenizer, 2, train=False, backend="plain")
    batches = list(loader)
    assert {name[-3:] for name in loader.skipped} == {"006", "015", "022"} and max(len(batch["image"]) for batch in batches) > 10
    assert [i for batch in batches for i in batch["index"].tolist()] == [i for i in range(40) if i not in (6, 15, 22)]


def test_mixtures_of_documents(tmp_path, tokenizer):
    patterns = {"a": write_texts(tmp_path / "a"), "b": write_documents(tmp_path / "b")}
    loader = make_loader(patterns, PICTURES, tokenizer, 4, train=True, backend="plain", weights={"a": 1, "b": 3})
    counts = torch.cat([batch["source"] for batch in islice(loader, 30)]).bincount()
    assert 2 < counts[1] / counts[0] < 4.5
    with pytest.raises(UserError, match="pure_batches: a batch of documents is of any number of samples"):
        make_loader(patterns, PICTURES, tokenizer, 4, train=True, pure_batches=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec(None, TextSpec(20), documents=DocumentSpec(20)), r"expected data.text to be empty \(null\)"),
        (DataSpec(ImageSpec(16, pictures=2), None, documents=DocumentSpec(20)), "one view of each picture"),
        (DataSpec(None, None, documents=DocumentSpec(3)), "documents.length: expected at least 4"),
        (DataSpec(None, None, documents=DocumentSpec(20, tokens_per_image=11)), "documents.length: expected at least 22"),
        (DataSpec(None, None, documents=DocumentSpec(20, tokens_per_image=0)), "documents.tokens_per_image"),
        (DataSpec(None, None, documents=DocumentSpec(20, max_images=-1)), "documents.max_images: expected 0 or more"),
        (DataSpec(None, None, documents=DocumentSpec(20, image_token="<x>")), "documents.image_token: expected a special token"),
        (
            DataSpec(ImageSpec(16), None, documents=DocumentSpec(20, image_token="")),
            "documents.image_token: expected a special token",
        ),
        (DataSpec(None, None, documents=DocumentSpec(20, end_token="<x>")), "one of <image>, <end>, got '<x>'"),
        (DataSpec(None, None, documents=DocumentSpec(20, asked="none")), 'documents.asked: expected "all" or "pictured"'),
        (DataSpec(ImageSpec(16), None, documents=DocumentSpec(20, asked="pictured")), "needs pictures and an end_token"),
    ],
)
def test_specifications_that_make_no_sense(tokenizer, spec, message):
    with pytest.raises(UserError, match=message):
        make_loader("x", spec, tokenizer, 4, train=True, backend="plain")
    with pytest.raises(ValueError, match="tokenizer: the documents are written with 'lm', there is none"):
        make_loader("x", DataSpec(None, None, documents=DocumentSpec(tokenizer="lm")), tokenizer, 4, train=True)
