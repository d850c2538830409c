from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlpfast.nn.splice import answers_alone, cut_answers, left_padded, prompt_length, splice

SLOT = 9


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Ids with placeholders in odd places, mask and labels: none, one, two beside each other, at both ends."""
    rows = [[1, 5, 6, 7, 2], [1, 4, SLOT, 5, 2, 3], [1, SLOT, SLOT, 2], [SLOT, 4, 5, 6, 7, 8, SLOT]]
    ids = torch.zeros(4, 7, dtype=torch.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    mask = ids != 0
    return ids, mask, ids.masked_fill(~mask | (torch.arange(7) < 2), -100)


def by_loop(visual: Tensor, embeds: Tensor, mask: Tensor, labels: Tensor, slots: Tensor) -> list[tuple[Tensor, list[int]]]:
    rows = []
    for row in range(len(mask)):
        found, asked, count = [], [], 0
        for place in range(int(mask[row].sum())):
            if slots[row, place]:
                found += list(visual[row, count])
                asked += [-100] * visual.shape[2]
                count += 1
            else:
                found.append(embeds[row, place])
                asked.append(int(labels[row, place]))
        rows.append((torch.stack(found), asked))
    return rows


@pytest.mark.parametrize("each", [1, 3])
def test_placeholders_give_way_to_visual_tokens(each: int) -> None:
    ids, mask, labels = texts()
    embeds, visual = torch.randn(4, 7, 5), torch.randn(4, 2, each, 5)
    got = splice(visual, embeds, mask, labels, ids == SLOT)
    assert got.embeds.shape == (4, 7 + 2 * (each - 1), 5)
    for row, (states, asked) in enumerate(by_loop(visual, embeds, mask, labels, ids == SLOT)):
        length = len(states)
        assert torch.equal(got.embeds[row, :length], states)
        assert got.labels[row].tolist() == asked + [-100] * (got.labels.shape[1] - length)
        assert got.mask[row].tolist() == [True] * length + [False] * (got.mask.shape[1] - length)


def test_gradients_go_where_the_tokens_came_from() -> None:
    ids, mask, labels = texts()
    embeds, visual = torch.randn(4, 7, 5, requires_grad=True), torch.randn(4, 2, 3, 5, requires_grad=True)
    got = splice(visual, embeds, mask, labels, ids == SLOT)
    (got.embeds * got.mask[..., None]).sum().backward()
    used = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 1]])  # which pictures have a placeholder
    assert torch.equal(visual.grad, used[..., None, None].expand(-1, -1, 3, 5).float())
    assert torch.equal(embeds.grad, (mask & (ids != SLOT))[..., None].expand(-1, -1, 5).float())


def test_before_the_text() -> None:
    _, mask, labels = texts()
    embeds, visual = torch.randn(4, 7, 5), torch.randn(4, 3, 5)
    got = splice(visual, embeds, mask, labels.masked_fill(~mask, 4))
    assert torch.equal(got.embeds, torch.cat((visual, embeds), dim=1))
    assert got.mask[:, :3].all() and torch.equal(got.mask[:, 3:], mask)
    assert (got.labels[:, :3] == -100).all() and torch.equal(got.labels[:, 3:], labels)
    assert splice(visual, embeds, mask).labels is None


def test_wrong_arguments_are_named() -> None:
    ids, mask, labels = texts()
    embeds, visual = torch.randn(4, 7, 5), torch.randn(4, 2, 3, 5)
    with pytest.raises(ValueError, match="slots: expected at most 1 in a row, as many as visual has, got 2"):
        splice(visual[:, :1], embeds, mask, labels, ids == SLOT)
    with pytest.raises(ValueError, match=r"visual: expected \[B, V, C\]"):
        splice(visual, embeds, mask, labels)
    with pytest.raises(ValueError, match=r"visual: expected \[B, S, V, C\]"):
        splice(visual[:, 0], embeds, mask, labels, ids == SLOT)
    with pytest.raises(ValueError, match="labels: expected"):
        splice(visual, embeds, mask, labels[:, 1:], ids == SLOT)


def test_compiles_without_a_break_or_a_wait() -> None:
    ids, mask, labels = texts()
    embeds, visual = torch.randn(4, 7, 5), torch.randn(4, 2, 3, 5)
    compiled = torch.compile(splice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        tuple(compiled(visual, embeds, mask, labels, ids == SLOT)), tuple(splice(visual, embeds, mask, labels, ids == SLOT))
    )


def test_left_padding() -> None:
    _, mask, _ = texts()
    embeds = torch.randn(4, 7, 5)
    moved, seen = left_padded(embeds, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        assert torch.equal(moved[row, 7 - length :], embeds[row, :length])
        assert seen[row].tolist() == [False] * (7 - length) + [True] * length


def test_answers() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, 2, -100], [-100, 7, 2, -100, -100, -100], [-100] * 6, [-100, -100, -100, 4, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]).bool()
    assert prompt_length(mask, labels).flatten().tolist() == [2, 1, 2, 3]
    assert prompt_length(mask, None).flatten().tolist() == [4, 2, 1, 5]  # all but the end token
    assert answers_alone(labels, 4)[:2].tolist() == [[5, 6, 2, -100], [7, 2, -100, -100]]
    assert answers_alone(labels, 9)[3].tolist() == [4, 5, 6, -100, -100, -100]
    assert (answers_alone(labels, 9)[2] == -100).all()
    assert cut_answers(labels, 2).tolist()[0] == [-100, -100, 5, 6, -100, -100]
    assert torch.equal(cut_answers(labels, 3), labels)
