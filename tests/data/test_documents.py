from __future__ import annotations

import numpy as np
import pytest
import torch

from vlpfast.data import train_tokenizer
from vlpfast.data.documents import Document, chunk_labels, interleaved_document, pack, pack_rows, text_document, window
from vlpfast.data.masking import IGNORED
from vlpfast.data.pictures import DamagedSample

IMAGE, END = 900, 901


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four five six"] * 3, 300)


def made(length: int, slots: list[int] | None = None, number: int = 0) -> Document:
    slots = slots or []
    ids = np.arange(length) + 1000 * (number + 1)
    ids[slots] = IMAGE
    return Document(ids, np.array(slots, np.int64), [f"{i}.jpg" for i in range(len(slots))])


def test_text_documents(tokenizer):
    document = text_document("one two three", tokenizer)
    ids, mask = tokenizer.encode(["one two three"], 30)
    assert document.ids.tolist() == ids[0][mask[0]].tolist() and not len(document.slots) and document.members == []
    assert text_document("", tokenizer).ids.tolist() == [tokenizer.bos_id, tokenizer.eos_id]


def test_interleaved_documents(tokenizer):
    one, two, three = (piece.tolist() for piece in tokenizer.pieces(["one", "two", "three four"]))
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    parts = [{"text": "one"}, {"image": "0.jpg"}, {"image": "1.png"}, {"text": "two"}, {"text": "three four"}, {"image": "2.jpg"}]
    document = interleaved_document({"parts": parts}, tokenizer, image_id=IMAGE)
    assert document.ids.tolist() == [bos, *one, IMAGE, IMAGE, *two, *three, IMAGE, eos]
    assert document.members == ["0.jpg", "1.png", "2.jpg"] and (document.ids[document.slots] == IMAGE).all()
    record = {"parts": [*parts, {"text": "one"}]}
    document = interleaved_document(record, tokenizer, image_id=IMAGE, tokens_per_image=3, end_id=END)
    image = [IMAGE] * 3
    assert document.ids.tolist() == [bos, *one, *image, *image, *two, *three, END, *image, *one, END, eos]
    assert document.slots.tolist() == [1 + len(one), 4 + len(one), 8 + len(one) + len(two) + len(three)]
    document = interleaved_document(record, tokenizer, image_id=IMAGE, end_id=END, max_images=1)
    assert document.ids.tolist() == [bos, *one, IMAGE, *two, *three, *one, END, eos] and document.members == ["0.jpg"]
    for wrong in ({}, {"parts": "x"}, {"parts": [{"text": 1}]}, {"parts": [{"text": "a", "image": "b"}]}, {"parts": ["a"]}):
        with pytest.raises(DamagedSample, match='no list "parts"'):
            interleaved_document(wrong, tokenizer, image_id=IMAGE)
    with pytest.raises(ValueError, match="tokens_per_image: expected at least 1, got 0"):
        interleaved_document(record, tokenizer, image_id=IMAGE, tokens_per_image=0)


def test_windows_of_texts():
    document = made(100)
    assert window(document, 100, 0, seed=0, epoch=0, train=True) is document
    assert window(document, 30, 5, seed=0, epoch=0, train=False).ids.tolist() == document.ids[:30].tolist()
    starts = [int(window(document, 30, i, seed=0, epoch=0, train=True).ids[0]) - 1000 for i in range(2000)]
    assert min(starts) == 0 and max(starts) == 70 and len(set(starts)) == 71
    assert np.bincount(starts).max() < 60
    again = [int(window(document, 30, i, seed=0, epoch=0, train=True).ids[0]) - 1000 for i in range(50)]
    other = [int(window(document, 30, i, seed=0, epoch=1, train=True).ids[0]) - 1000 for i in range(50)]
    assert again == starts[:50] != other
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        window(document, 0, 0, seed=0, epoch=0, train=True)


def test_windows_begin_near_a_picture_and_cut_none():
    slots = [10, 40, 43, 90]
    document = made(120, slots)
    for slot in slots:
        document.ids[slot : slot + 3] = IMAGE
    chosen = set()
    for index in range(400):
        part = window(document, 32, index, seed=1, epoch=2, train=True, tokens_per_image=3, most_shift=5)
        assert 26 <= len(part.ids) <= 32
        places = np.flatnonzero(part.ids == IMAGE)
        assert places.tolist() == [slot + i for slot in part.slots for i in range(3)]  # whole pictures, each with its slot
        assert len(part.members) == len(part.slots) >= 1 and part.slots[0] <= 5
        chosen.add(part.members[0])
    assert chosen == {"0.jpg", "1.jpg", "2.jpg", "3.jpg"}
    part = window(document, 42, 0, seed=1, epoch=2, train=False, tokens_per_image=3)
    assert len(part.ids) == 40 and part.members == ["0.jpg"]  # the picture at 40 would have been cut


def test_rows_take_the_first_documents():
    row, start = pack_rows([5, 6, 3, 4, 2, 1], 2, 8)
    assert list(zip(row.tolist(), start.tolist(), strict=True)) == [(0, 0), (1, 0), (0, 5)]  # 4 has no room: the end
    assert [part.tolist() for part in pack_rows([8, 8, 8], 2, 8)] == [[0, 1], [0, 0]]
    assert len(pack_rows([], 2, 8)[0]) == 0
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"expected 1 .. 8, got {wrong} for document 1"):
            pack_rows([1, wrong], 2, 8)


def test_every_document_is_packed_once_whatever_the_lengths():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows, length = int(rng.integers(1, 5)), int(rng.integers(4, 30))
        documents = [made(int(n), number=i) for i, n in enumerate(rng.integers(1, length + 1, rng.integers(1, 60)))]
        done = 0
        while done < len(documents):
            batch, count = pack(documents[done:], rows, length, pad_id=7)
            assert count >= 1
            text, cu = batch["text"].flatten(), batch["cu_seqlens"].tolist()
            assert cu[0] == 0 and cu[-1] == rows * length and cu == sorted(set(cu)) and len(batch["document"]) == len(cu) - 1
            seen = []
            for begin, end, number in zip(cu, cu[1:], batch["document"].tolist(), strict=False):
                assert begin // length == (end - 1) // length  # no sequence crosses the end of a row
                if number < 0:
                    assert (text[begin:end] == 7).all() and not batch["text_mask"].flatten()[begin:end].any()
                    assert not batch["positions"].flatten()[begin:end].any()
                    continue
                seen.append(number)
                ids = documents[done + number].ids
                assert text[begin:end].tolist() == ids.tolist() and batch["text_mask"].flatten()[begin:end].all()
                assert batch["positions"].flatten()[begin:end].tolist() == list(range(len(ids)))
                assert batch["text_labels"].flatten()[begin:end].tolist() == [IGNORED, *ids[1:].tolist()]
            assert sorted(seen) == list(range(count))
            assert (batch["text_labels"][~batch["text_mask"]] == IGNORED).all()
            done += count


def test_pictures_are_found_again():
    documents = [made(7, [1, 4]), made(6, [], 1), made(5, [2], 2), made(9, [0], 3)]
    batch, count = pack(documents, 2, 12, pad_id=0)
    assert count == 3 and batch["document"].tolist() == [0, 2, 1, -1] and batch["cu_seqlens"].tolist() == [0, 7, 12, 18, 24]
    assert batch["image_slots"].tolist() == [1, 4, 9] and batch["image_of"].tolist() == [[0, 0], [0, 1], [2, 0]]
    assert (batch["text"].flatten()[batch["image_slots"]] == IMAGE).all()
    assert (batch["text_labels"].flatten()[batch["image_slots"]] == IGNORED).all()
    long = made(8, [2])
    long.ids[2:5] = IMAGE
    batch, _ = pack([long], 1, 8, pad_id=0, tokens_per_image=3)
    assert batch["text_labels"][0].tolist() == [IGNORED, 1001, IGNORED, IGNORED, IGNORED, 1005, 1006, 1007]
    empty, count = pack([], 2, 4, pad_id=3)
    assert count == 0 and empty["cu_seqlens"].tolist() == [0, 4, 8] and empty["image_of"].shape == (0, 2)


def test_attention_over_packed_rows_keeps_documents_apart():
    from vlpfast.nn.attention import attention

    documents = [made(5), made(7, number=1), made(3, number=2)]
    batch, _ = pack(documents, 2, 9, pad_id=0)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5000, 3 * 2 * 4, generator=generator)

    def attend(ids, **how):
        q, k, v = (part.transpose(1, 2) for part in table[ids].view(1, len(ids), 3, 2, 4).unbind(2))  # [1, 2, L, 4]
        return attention(q, k, v, mask="causal", **how)[0].transpose(0, 1)  # [L, 2, 4]

    packed = attend(batch["text"].flatten(), cu_seqlens=batch["cu_seqlens"])
    for begin, end, number in zip(
        batch["cu_seqlens"].tolist(), batch["cu_seqlens"][1:].tolist(), batch["document"].tolist(), strict=False
    ):
        if number >= 0:
            alone = attend(torch.from_numpy(documents[number].ids))
            torch.testing.assert_close(packed[begin:end], alone)


def test_labels_of_texts_that_belong_to_pictures():
    """CoSMo's rule on a sequence made by hand."""
    ids = [[1, 50, IMAGE, 51, END, 52, IMAGE, IMAGE, 53, END, 2], [1, 60, 2], [1, IMAGE, 61, 2]]
    slots = [[2, 6, 7], [], [1]]
    documents = [Document(np.array(i), np.array(s, np.int64), ["0.jpg"] * len(s)) for i, s in zip(ids, slots, strict=True)]
    batch, count = pack(documents, 2, 14, pad_id=0)
    assert count == 3
    labels = chunk_labels(batch, image_id=IMAGE, end_id=END)
    x = IGNORED
    assert labels.flatten().tolist() == [x, x, x, 51, END, x, x, x, 53, END, x, *[x] * 3, x, x, 61, 2, *[x] * 10]
    assert torch.equal(labels != IGNORED, (labels != IGNORED) & (batch["text_labels"] != IGNORED))
