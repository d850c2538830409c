from __future__ import annotations

import numpy as np
import pytest
import torch

from vlpfast.data.masking import (
    IGNORED,
    join_prompt_answer,
    mask_tokens,
    prefix_labels,
    random_prefix,
    span_units,
    token_units,
)

PAD, BOS, EOS, MASK = 0, 1, 2, 3
REPLACEMENTS = torch.arange(10, 60)


def texts(rows: int, length: int = 20, seed: int = 0):
    """bos, words of 100 and more, eos, padding."""
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(rng.integers(3, length + 1, (rows, 1)))
    places = torch.arange(length)
    ids = torch.from_numpy(rng.integers(100, 200, (rows, length)))
    ids = ids.masked_fill(places == 0, BOS).masked_fill(places == lengths - 1, EOS).masked_fill(places >= lengths, PAD)
    return ids, places < lengths


def masked(ids, units, index=None, **settings):
    index = torch.arange(len(ids)) if index is None else index
    return mask_tokens(ids, units, index, **{"mask_id": MASK, "replacements": REPLACEMENTS, "seed": 0, "epoch": 0, **settings})


def test_shares_of_bert():
    ids, mask = texts(4000)
    units = token_units(ids, mask, [PAD, BOS, EOS, MASK])
    assert ((units >= 0) == (ids >= 100)).all() and (units[ids >= 100] == torch.arange(20).expand_as(ids)[ids >= 100]).all()
    new, labels = masked(ids, units)
    chosen = labels != IGNORED
    assert (labels[chosen] == ids[chosen]).all() and (new[~chosen] == ids[~chosen]).all()
    assert (ids[chosen] >= 100).all()  # special tokens never
    total, count = int((ids >= 100).sum()), int(chosen.sum())
    assert count / total == pytest.approx(0.15, abs=0.006)
    hidden, random, kept = ((new == MASK) & chosen).sum(), ((new >= 10) & (new < 60)).sum(), (new == ids)[chosen].sum()
    assert hidden + random + kept == count
    assert hidden / count == pytest.approx(0.8, abs=0.015) and random / count == pytest.approx(0.1, abs=0.012)
    drawn = new[(new >= 10) & (new < 60)]
    assert drawn.unique().numel() == 50 and drawn.float().mean() == pytest.approx(34.5, abs=2)
    per_place = (chosen & (ids >= 100)).sum(0)[1:10] / (ids >= 100).sum(0)[1:10]
    assert per_place.max() < 0.19 and per_place.min() > 0.11  # no place is favoured


def test_a_function_of_seed_epoch_and_index_alone():
    ids, mask = texts(30)
    units = token_units(ids, mask, [PAD, BOS, EOS])
    for settings in ({"rate": 0.3}, {"rate": 0.3, "exact": True}, {"rate": 0.3, "exact": True, "longest": 3}):
        new, labels = masked(ids, units, **settings)
        order = torch.tensor([7, 3, 29, 0])
        some = masked(ids[order], units[order], order, **settings)
        assert torch.equal(some[0], new[order]) and torch.equal(some[1], labels[order])
        wide = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(units, (0, 5), value=-1)
        assert torch.equal(masked(*wide, **settings)[1][:, :20], labels)
        for other in ({"seed": 1}, {"epoch": 1}, {"index": torch.arange(1, 31)}):
            assert not torch.equal(masked(ids, units, **{**settings, **other})[1], labels)
    same = masked(ids[:1].expand(40, -1), units[:1].expand(40, -1))[1]
    assert same.unique(dim=0).shape[0] > 10  # equal texts are masked each in its own way


def test_whole_words():
    ids = torch.arange(100, 130).expand(600, -1)
    words = torch.tensor([-1, 0, 0, 1, 2, 2, 2, 3] + [4 + i // 2 for i in range(20)] + [-1, -1])[None].expand(600, -1)
    for settings in ({}, {"exact": True}):
        chosen = masked(ids, words, rate=0.2, **settings)[1] != IGNORED
        assert not chosen[:, [0, 28, 29]].any()
        for word in range(14):
            parts = chosen[:, words[0] == word]
            assert (parts.all(1) == parts.any(1)).all() and 0.02 < parts.any(1).float().mean() < 0.5
            assert settings or parts.any(1).float().mean() == pytest.approx(0.2, abs=0.05)  # by words, whatever their length
        count = chosen.sum(1)
        assert count.max() == round(0.2 * 27) if settings else count.max() > 8


def test_exact_count():
    ids, mask = texts(300)
    units = token_units(ids, mask, [PAD, BOS, EOS])
    for rate in (0.0, 0.15, 0.5, 1.0):
        count = (masked(ids, units, rate=rate, exact=True)[1] != IGNORED).sum(1)
        words = (units >= 0).sum(1)
        expected = torch.from_numpy(np.rint(rate * words.numpy())).clamp(min=1 if rate else 0)
        assert torch.equal(count, expected.to(count.dtype))
    long = torch.zeros(1, 6, dtype=torch.int64)  # one word of six parts, more than the quota: a row never goes without
    assert (masked(long + 100, long, exact=True)[1] != IGNORED).all()
    nothing = torch.full((2, 6), -1)
    for settings in ({}, {"exact": True}):
        assert (masked(nothing, nothing, **settings)[1] == IGNORED).all()
        assert masked(ids[:0], units[:0], **settings)[0].shape == (0, 20)


def test_spans():
    ids = torch.arange(100, 200).expand(400, -1)
    units = torch.arange(100).expand(400, -1)
    chosen = (masked(ids, units, exact=True, longest=3)[1] != IGNORED).int()
    assert (chosen.sum(1) == 15).all()
    starts = (torch.nn.functional.pad(chosen, (1, 0)).diff(dim=1) == 1).sum()
    single = (masked(ids, units, exact=True)[1] != IGNORED).int()
    single_starts = (torch.nn.functional.pad(single, (1, 0)).diff(dim=1) == 1).sum()
    mean = 18 / 11  # of 1, 2, 3 with weights 1, 1/2, 1/3
    assert single_starts / starts == pytest.approx(mean * 0.97, abs=0.12)


def test_units_of_entities():
    #        bos  0    0    1    2    3    3    eos
    words = torch.tensor([[-1, 0, 0, 1, 2, 3, 3, -1]] * 3)
    spans = torch.tensor([[[0, 0], [0, 2], [2, 4], [5, 6], [7, 9], [10, 12], [12, 14], [0, 0]]] * 3)
    units = span_units(words, spans, [[(5, 9)], [(3, 6), (8, 11)], [(4, 5), (40, 50)]])
    assert units.tolist() == [[-1, 0, 0, 1, 1, 3, 3, -1], [-1, 0, 0, 0, 2, 2, 2, -1], words[2].tolist()]
    assert span_units(words[:1], spans[:1], [[(0, 6), (5, 9)]]).tolist() == [[-1, 0, 0, 0, 0, 3, 3, -1]]  # overlap: one
    with pytest.raises(ValueError, match="a list for each of the 3 texts, got 1"):
        span_units(words, spans, [[]])
    with pytest.raises(ValueError, match=r"start < end, got \(3, 3\) in text 0"):
        span_units(words, spans, [[(3, 3)], [], []])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rate": 1.1}, "rate: expected 0 .. 1, got 1.1"),
        ({"longest": 2}, "longest: expected 1, or more with exact=True, got 2"),
        ({"longest": 0, "exact": True}, "longest: expected 1"),
        ({"shares": (0.9, 0.2)}, "shares: expected two"),
        ({"replacements": torch.empty(0, dtype=torch.int64)}, "replacements: expected at least one id"),
        ({"index": torch.arange(3)}, r"index \[B\], got \[2, 4\], \[2, 4\], \[3\]"),
    ],
)
def test_arguments_that_are_refused(changes, message):
    ids = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        masked(ids, ids, **changes)


def test_prefixes():
    mask = torch.arange(10) < torch.tensor([[10], [5], [2], [1], [0]])
    many = mask[:2].repeat(500, 1)
    prefix = random_prefix(many, torch.arange(1000), seed=0, epoch=0)
    for row, length in ((0, 10), (1, 5)):
        counts = torch.bincount(prefix[row::2], minlength=length)
        assert (counts[1:length] > 500 / (length - 1) * 0.6).all() and counts[0] == 0 and len(counts) == length
    assert random_prefix(mask, torch.arange(5), seed=0, epoch=0)[2:].tolist() == [1, 0, 0]
    assert random_prefix(mask, torch.arange(5), seed=0, epoch=0, least=4)[:2].min() >= 4
    assert not torch.equal(prefix, random_prefix(many, torch.arange(1000), seed=0, epoch=1))
    ids = torch.arange(100, 110).expand(5, -1)
    assert prefix_labels(ids, mask)[1].tolist() == [IGNORED, 101, 102, 103, 104] + [IGNORED] * 5
    labels = prefix_labels(ids, mask, torch.tensor([9, 3, 1, 1, 1]))
    assert labels[0].tolist() == [IGNORED] * 9 + [109] and labels[1, 3] == 103 and (labels[3:] == IGNORED).all()
    left = prefix_labels(ids[:1], ~mask[1:2])  # padded on the left: the first token is still the first
    assert left[0].tolist() == [IGNORED] * 6 + [106, 107, 108, 109]
    with pytest.raises(ValueError, match="least: expected at least 1, got 0"):
        random_prefix(mask, torch.arange(5), seed=0, epoch=0, least=0)


def test_answers():
    def join(prompts, answers, length=8):
        arrays = [[np.array(piece, np.int64) for piece in pieces] for pieces in (prompts, answers)]
        return [part.tolist() for part in join_prompt_answer(*arrays, length, bos_id=BOS, eos_id=EOS, pad_id=PAD)]

    text, mask, labels = join([[10, 11], [10, 11, 12, 13, 14, 15], [], [10] * 9], [[20], [20, 21], [20, 21], [20] * 7])
    assert text == [
        [BOS, 10, 11, 20, EOS, PAD, PAD, PAD],
        [BOS, 12, 13, 14, 15, 20, 21, EOS],  # the prompt loses its beginning
        [BOS, 20, 21, EOS, PAD, PAD, PAD, PAD],
        [BOS, 20, 20, 20, 20, 20, 20, 20],  # the answer its end
    ]
    assert [sum(row) for row in mask] == [5, 8, 4, 8]
    assert labels[0] == [IGNORED] * 3 + [20, EOS] + [IGNORED] * 3 and labels[1] == [IGNORED] * 5 + [20, 21, EOS]
    for row in range(4):
        assert [t for t, label in zip(text[row], labels[row], strict=True) if label != IGNORED] == [
            label for label in labels[row] if label != IGNORED
        ]
    with pytest.raises(ValueError, match="answers: text 1 is empty"):
        join([[1], [1]], [[2], []])
    with pytest.raises(ValueError, match="as many prompts as answers, got 1 and 2"):
        join([[1]], [[2], [2]])
    with pytest.raises(ValueError, match="context_length: expected at least 3, got 2"):
        join([[1]], [[2]], 2)
