from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from largest import Largest
from torch import Tensor

from vlpfast.objectives.queue_contrast import mean_of_equal_id, queue_contrastive_loss
from vlpfast.ops.contrastive import clip_loss, distilled_contrastive_loss


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def dense(x, keys, queue, scale, *, own=0, teacher=None, alpha=0.0, ids=None) -> Tensor:
    """As the paper's code: all logits, all targets."""
    candidates = torch.cat((keys, queue))
    logits = scale * x @ candidates.T  # [n, N + K]
    if ids is None:
        hard = F.one_hot(own + torch.arange(len(x)), len(candidates)).to(x.dtype)
    else:
        equal = (ids[0][:, None] == torch.cat(ids[1:])).to(x.dtype)
        hard = equal / equal.sum(1, keepdim=True)
    targets = hard
    if teacher is not None:
        targets = (1 - alpha) * hard + alpha * (scale.detach() * teacher @ candidates.T).softmax(1)
    torch.testing.assert_close(targets.sum(1), torch.ones(len(x), dtype=x.dtype))  # target rows sum to 1
    return -(targets * logits.log_softmax(1)).sum(1).mean()


IDS = (torch.tensor([3, 5, 3, 9]), torch.tensor([1, 3, 5, 3, 9, 2]), torch.tensor([5, -100, 9, 9, -100, 7, 3]))


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_streaming_loss_equals_the_dense_one_and_its_gradients(teacher: bool, ids: tuple | None, scale: float) -> None:
    x, s = unit(4, 5).requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    options = {"own": 1, "ids": ids} | ({"teacher": unit(4, 5, seed=1), "alpha": 0.4} if teacher else {})
    keys, queue = unit(6, 5, seed=2), unit(7, 5, seed=3)
    with torch.no_grad():
        keys[1:5] = F.normalize(x + 0.5 * keys[1:5], dim=1)
    found = [loss(x, keys, queue, s, **options) for loss in (queue_contrastive_loss, dense)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(torch.autograd.grad(found[0], (x, s)), torch.autograd.grad(found[1], (x, s)))


def test_on_one_rank_it_is_the_operators_loss() -> None:
    x, y, x_t, y_t = (unit(6, 5, seed=seed, dtype=torch.float32) for seed in range(4))
    images, texts, scale = unit(9, 5, seed=5).float(), unit(9, 5, seed=6).float(), torch.tensor(14.0)
    mine = (
        queue_contrastive_loss(x, y_t, texts, scale, teacher=x_t, alpha=0.3)
        + queue_contrastive_loss(y, x_t, images, scale, teacher=y_t, alpha=0.3)
    ) / 2
    theirs = distilled_contrastive_loss(x, y, x_t, y_t, scale, 0.3, row_negatives=texts, col_negatives=images)
    torch.testing.assert_close(mine, theirs)
    expected = clip_loss(x, x_t, scale, directions="rows", row_negatives=images)
    torch.testing.assert_close(queue_contrastive_loss(x, x_t, images, scale), expected)


def test_gradients_are_the_online_features_alone() -> None:
    leaves = [unit(4, 5, seed=seed).requires_grad_() for seed in range(4)]
    x, keys, queue, teacher = leaves
    queue_contrastive_loss(x, keys.detach(), queue.detach(), torch.tensor(14.0), teacher=teacher.detach(), alpha=0.4).backward()
    assert x.grad is not None and keys.grad is None


def test_near_zero_it_keeps_its_digits() -> None:
    # one pair, apart from all else by 2 * scale = 60: a loss of about e^-60 times the number of negatives
    x = torch.tensor([[1.0, 0.0]])
    away = torch.tensor([[-1.0, 0.0]]).repeat(3, 1)
    expected = 3 * torch.exp(torch.tensor(-60.0))
    for options in ({}, {"teacher": x, "alpha": 0.0}):
        loss = queue_contrastive_loss(x, x, away, torch.tensor(30.0), **options)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_mean_of_equal_id() -> None:
    ids = torch.tensor([4, 2, 4, 8])
    values = torch.randn(5, 3), torch.randn(300, 3)
    keys = torch.tensor([2, 4, 4, 7, 2]), torch.randint(9, 12, (300,))
    keys[1][[0, 299]] = torch.tensor([2, 4])
    expected = [torch.cat(values)[torch.cat(keys) == i] for i in ids]
    expected = torch.stack([rows.mean(0) if len(rows) else torch.zeros(3) for rows in expected])
    torch.testing.assert_close(mean_of_equal_id(ids, *zip(keys, values, strict=True)), expected)
    assert mean_of_equal_id(ids[:0], *zip(keys, values, strict=True)).shape == (0, 3)


@pytest.mark.parametrize("ids", [False, True])
def test_no_tensor_of_rows_times_queue(ids: bool) -> None:
    n, size, width = 512, 20000, 16
    x = unit(n, width, dtype=torch.float32).requires_grad_()
    keys, queue = unit(n, width, seed=1).float(), unit(size, width, seed=2).float()
    scale = torch.tensor(14.0, requires_grad=True)
    chosen = (torch.arange(n) // 2, torch.arange(n) // 2, torch.randint(n, (size,))) if ids else None
    with Largest() as largest:
        queue_contrastive_loss(x, keys, queue, scale, teacher=keys, alpha=0.4, ids=chosen).backward()
        queue_contrastive_loss(x, keys, queue, scale, ids=chosen).backward()
    assert largest.elements <= 2 * n * n  # the queue's own size is 320,000; rows times queue would be 10,240,000
