from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vlpfast.objectives.matching import hard_negatives, matching_loss


def test_negatives_are_drawn_by_their_similarity() -> None:
    torch.manual_seed(0)
    x, y, scale = F.normalize(torch.randn(6, 4), dim=1), F.normalize(torch.randn(6, 4), dim=1), torch.tensor(4.0)
    draws = torch.stack([hard_negatives(x, y, scale) for _ in range(4000)])  # [4000, 6]
    weights = (scale * x @ y.T).softmax(1).fill_diagonal_(0)
    for i in range(6):
        found = torch.bincount(draws[:, i], minlength=6) / len(draws)
        torch.testing.assert_close(found, weights[i] / weights[i].sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize("drawn", [True, False])
def test_never_the_own_pair_nor_one_of_equal_id(drawn: bool) -> None:
    x = F.normalize(torch.randn(6, 4), dim=1)
    ids = torch.tensor([1, 2, 1, 3, 2, 1])
    for _ in range(30 if drawn else 1):
        chosen = hard_negatives(x, x, torch.tensor(50.0), ids, drawn=drawn)
        assert (ids[chosen] != ids).all()
        assert (hard_negatives(x, x, torch.tensor(50.0), drawn=drawn) != torch.arange(6)).all()
    assert hard_negatives(x, x, torch.tensor(50.0), torch.ones(6, dtype=torch.int64), drawn=drawn).tolist() == [-1] * 6
    assert hard_negatives(x[:1], x[:1], torch.tensor(50.0), drawn=drawn).tolist() == [-1]


def test_where_all_weights_are_zero_one_is_drawn_all_the_same() -> None:
    x = torch.eye(5)  # at this scale every softmax weight but the own pair's is 0 in float32
    assert (100.0 * 10 * x @ x.T).softmax(1).fill_diagonal_(0).sum() == 0
    chosen = torch.stack([hard_negatives(x, x, torch.tensor(1000.0)) for _ in range(200)])
    assert ((chosen >= 0) & (chosen != torch.arange(5))).all()
    assert all(len(chosen[:, i].unique()) == 4 for i in range(5))


def test_not_drawn_it_is_the_likeliest_whatever_the_order() -> None:
    x, y = F.normalize(torch.randn(7, 4), dim=1), F.normalize(torch.randn(7, 4), dim=1)
    chosen = hard_negatives(x, y, torch.tensor(3.0), drawn=False)
    assert chosen.tolist() == (x @ y.T).fill_diagonal_(-2).argmax(1).tolist()
    order = torch.randperm(7)
    assert torch.equal(order[hard_negatives(x[order], y[order], torch.tensor(3.0), drawn=False)], chosen[order])


def test_matching_loss_is_a_cross_entropy_over_what_is_there() -> None:
    positive, negative = torch.randn(3, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    there = torch.tensor([True, True, False, True, True, True])
    labels = torch.tensor([1] * 3 + [0] * 5)
    expected = F.cross_entropy(torch.cat((positive, negative[there])), labels)
    found = matching_loss(positive, negative, there)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, negative)
    assert (gradient[2] == 0).all() and (gradient[there] != 0).all()
    assert matching_loss(positive[:1], negative[:2], torch.zeros(2, dtype=torch.bool)).isfinite()
