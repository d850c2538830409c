"""Hard grouping: exact one-hots, the softmax's gradient, noise of a seed, means of groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops.tokens import group_assign, group_mean

SEED = torch.tensor(11)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_soft_and_hard() -> None:
    logits = numbers(3, 4, 11)
    torch.testing.assert_close(group_assign(logits, 0.3, hard=False), (logits / 0.3).softmax(1), rtol=1e-12, atol=0)
    hard = group_assign(logits, 0.3)
    assert torch.equal(hard, F.one_hot(logits.argmax(1), 4).mT.double())
    ties = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.5, 2.0]])[None]
    assert group_assign(ties).tolist() == [[[1, 0], [0, 1], [0, 0]]]
    assert group_assign(numbers(2, 1, 5)).eq(1).all() and group_assign(numbers(2, 3, 0)).shape == (2, 3, 0)


@pytest.mark.parametrize("seed", [None, SEED])
def test_the_gradient_of_the_hard_is_the_softs(seed: Tensor | None) -> None:
    logits = numbers(2, 3, 5).requires_grad_()
    weights = numbers(2, 3, 5, seed=1)
    hard, soft = (
        torch.autograd.grad((group_assign(logits, 0.7, hard=h, seed=seed) * weights).sum(), logits)[0] for h in (True, False)
    )
    assert torch.equal(hard, soft) and hard.any()
    assert torch.autograd.gradcheck(lambda x: group_assign(x, 0.7, hard=False, seed=seed), logits)
    assert torch.autograd.gradgradcheck(lambda x: group_assign(x, 0.7, hard=False, seed=seed), logits)
    assert torch.equal(torch.func.grad(lambda x: (group_assign(x, 0.7, seed=seed) * weights).sum())(logits.detach()), hard)


def test_noise_draws_groups_by_their_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    drawn = group_assign(logits[None, :, None].expand(400, 4, 50), 0.1, seed=SEED)
    counts, expected = drawn.sum((0, 2)).double(), 20_000 * logits.double().softmax(0)
    statistic = ((counts - expected).square() / expected).sum()
    assert torch.special.gammaincc(torch.tensor(1.5).double(), statistic / 2) > 1e-3
    assert torch.equal(drawn.sum(1), torch.ones(400, 50))


def test_noise_is_a_function_of_the_seed() -> None:
    logits = torch.zeros(3, 4, 20)
    one = group_assign(logits, seed=SEED)
    assert torch.equal(group_assign(logits, seed=SEED), one) and not torch.equal(group_assign(logits, seed=SEED + 1), one)
    assert not torch.equal(one[0], one[1])
    seeds = torch.tensor([5, 6, 7])
    own = group_assign(logits, seed=seeds)
    assert torch.equal(group_assign(logits, seed=seeds.flip(0)), own.flip(0)) and not torch.equal(own[0], own[1])
    assert own.argmax(1).tolist()[0] == GOLDEN


GOLDEN = [3, 0, 1, 0, 1, 3, 0, 3, 1, 0, 1, 3, 3, 3, 2, 1, 3, 0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    logits, values = numbers(3, 4, 50).to(dtype), numbers(3, 50, 6, seed=1).to(dtype)
    hard, soft = group_assign(logits, 0.5), group_assign(logits, 0.5, hard=False)
    eps = torch.finfo(dtype).eps
    assert hard.dtype == soft.dtype == dtype and torch.equal(hard.double(), group_assign(logits.double(), 0.5))
    torch.testing.assert_close(soft.double(), group_assign(logits.double(), 0.5, hard=False), rtol=eps + 1e-6, atol=1e-7)
    mean = group_mean(soft, values)
    wanted = group_mean(soft.double(), values.double())
    torch.testing.assert_close(mean.double(), wanted, rtol=0.51 * eps, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(group_mean(soft, values), mean) and torch.equal(group_assign(logits, 0.5), hard)
    assert group_mean(hard, values.double()).dtype == torch.float64


def test_means_of_groups() -> None:
    values = numbers(2, 7, 3)
    group = torch.tensor([[0, 1, 1, 0, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1]])
    hard = F.one_hot(group, 3).mT.double()
    for eps in (1.0, 0.0):
        found = group_mean(hard, values, eps)
        for b in range(2):
            for g in range(3):
                own = values[b, group[b] == g]
                expected = own.sum(0) / (len(own) + eps) if len(own) or eps else torch.full((3,), math.nan)
                torch.testing.assert_close(found[b, g], expected.double(), equal_nan=True)
    inputs = numbers(2, 3, 5).softmax(1).requires_grad_(), numbers(2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(group_mean, inputs) and torch.autograd.gradgradcheck(group_mean, inputs)


def test_nan_stays_with_its_token() -> None:
    logits = numbers(2, 3, 5)
    logits[0, 1, 2] = math.nan
    for hard in (True, False):
        found = group_assign(logits, hard=hard)
        assert found[0, :, 2].isnan().all() and found.isnan().sum() == 3


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    logits, values = numbers(2, 3, 9).float().requires_grad_(), numbers(2, 9, 4).float().requires_grad_()

    def function(logits: Tensor, values: Tensor, seed: Tensor) -> Tensor:
        return group_mean(group_assign(logits, 0.5, seed=seed), values).square().sum()

    expected = function(logits, values, SEED)
    found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(logits, values, SEED)
    torch.testing.assert_close(found, expected)
    both = (torch.autograd.grad(r, (logits, values)) for r in (found, expected))
    for f, e in zip(*both, strict=True):
        torch.testing.assert_close(f, e)


LOGITS, VALUES = torch.ones(2, 3, 5), torch.ones(2, 5, 4)
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "logits: expected a tensor, got list": (TypeError, {"logits": [1.0]}),
    r"logits: expected shape \[B, G, N\], got \(2, 3\)": (ValueError, {"logits": LOGITS[..., 0]}),
    "logits: expected at least one group": (ValueError, {"logits": LOGITS[:, :0]}),
    "tau: expected a float, got NoneType": (TypeError, {"tau": None}),
    "tau: expected a number > 0, got 0.0": (ValueError, {"tau": 0.0}),
    "tau: expected a number > 0, got nan": (ValueError, {"tau": math.nan}),
    "hard: expected True or False, got 1": (TypeError, {"hard": 1}),
    "seed: expected a tensor or None, got int": (TypeError, {"seed": 1}),
    "seed: expected torch.int64, got torch.float32": (TypeError, {"seed": torch.tensor(1.0)}),
    "seed: expected a vector of length 2, got 1 dimensions and 3 elements": (ValueError, {"seed": torch.arange(3)}),
    "seed: expected device cpu as logits has, got meta": (ValueError, {"seed": SEED.to("meta")}),
}
WRONG_MEAN: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    r"assignment: expected shape \[B, G, N\], got \(2, 3\)": (ValueError, {"assignment": LOGITS[..., 0]}),
    "values: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"values": VALUES.long()}),
    r"values: expected shape \[2, 5, C\] as assignment has, got \(2, 4, 4\)": (ValueError, {"values": VALUES[:, 1:]}),
    "values: expected device cpu as assignment has, got meta": (ValueError, {"values": VALUES.to("meta")}),
    "eps: expected a float, got str": (TypeError, {"eps": "1"}),
    "eps: expected a number >= 0, got -1": (ValueError, {"eps": -1}),
}


@pytest.mark.parametrize("message", [*WRONG, *WRONG_MEAN])
def test_wrong_arguments_are_named(message: str) -> None:
    error, wrong = (WRONG | WRONG_MEAN)[message]
    with pytest.raises(error, match=message):
        if message in WRONG:
            group_assign(**({"logits": LOGITS} | wrong))
        else:
            group_mean(**({"assignment": LOGITS, "values": VALUES} | wrong))
