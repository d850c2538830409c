"""Sharded losses of late interaction over gloo: N processes against one process with the whole batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conformance import relative_error
from ranks import run
from test_contrastive_distributed import SIZES, TOLERANCES, Traffic, assert_near, by_all, by_one, convert, part, unequal
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.maxsim import (
    filip_loss,
    maxsim,
    maxsim_sigmoid_loss,
    score_contrastive_loss,
    sharded_filip_loss,
    sharded_maxsim_sigmoid_loss,
    sharded_query_loss,
)

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")

P, T, D = 5, 3, 7


def sets(n: int, scale: float = 10.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {
        "x": torch.nn.functional.normalize(torch.randn(n, P, D, generator=generator, dtype=torch.float64), dim=-1),
        "y": torch.nn.functional.normalize(torch.randn(n, T, D, generator=generator, dtype=torch.float64), dim=-1),
        "scale": torch.tensor(scale, dtype=torch.float64),
    }


def masks(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, y = torch.rand(n, P, generator=generator) < 0.7, torch.rand(n, T, generator=generator) < 0.7
    x[:1] = False  # a set without tokens
    return x, y


def with_masks(sharded: bool, n: int, sizes: list[int], rank: int, **options: Any) -> Any:
    """filip_loss or its sharded twin with this rank's masks."""
    x_mask, y_mask = masks(n)
    if not sharded:
        return partial(filip_loss, x_mask=x_mask, y_mask=y_mask, **options)
    return partial(sharded_filip_loss, x_mask=part(x_mask, sizes, rank), y_mask=part(y_mask, sizes, rank))


def filip_loss_of_the_whole_batch(rank: int, world: int) -> None:
    found, expected = [], []
    for dtype in TOLERANCES:
        for sizes in SIZES:
            split = sizes(world)
            n = sum(split)
            for options in ({}, {"gather": "x"}, {"sizes": split}, {"normalize": True, "stash_bytes": 0}):
                if "normalize" in options and dtype == torch.bfloat16:
                    continue  # rounded to unit length, other tokens win
                arguments = convert(sets(n), dtype)
                found.append((dtype, by_all(sharded_filip_loss, arguments, split, rank, **options)))
                more = {"normalize": True} if "normalize" in options else {}
                with backends.use("reference"):
                    expected.append(by_one(filip_loss, convert(arguments, torch.float64), **more))
            arguments = convert(sets(n), dtype)
            found.append((dtype, by_all(with_masks(True, n, split, rank), arguments, split, rank)))
            with backends.use("reference"):
                expected.append(by_one(with_masks(False, n, split, rank), convert(arguments, torch.float64)))
    for (dtype, f), e in zip(found, expected, strict=True):
        assert_near(f, e, TOLERANCES[dtype] * 2)


def filip_loss_exact_where_it_is_small(rank: int, world: int) -> None:
    """Own pairs alike, all others unlike: the loss is some 1e-20, which subtracting from a sum would lose."""
    split = [3] * world
    n = 3 * world
    tokens = torch.eye(n, dtype=torch.float64)[:, None]  # [n, 1, n]
    arguments = {"x": tokens, "y": tokens.clone(), "scale": torch.tensor(50.0, dtype=torch.float64)}
    found = by_all(sharded_filip_loss, convert(arguments, torch.float32), split, rank)
    expected = (n - 1) * torch.tensor(-50.0, dtype=torch.float64).exp()
    assert relative_error(found["loss"], expected) < 1e-5


def no_sets_at_all(rank: int, world: int) -> None:
    found = by_all(sharded_filip_loss, sets(0), [0] * world, rank)
    assert found["loss"] == 0 and found["scale"] == 0


def sigmoid_of_concepts(rank: int, world: int) -> None:
    """Concepts are of other numbers than patches, some masked, some of nobody."""
    images, concepts = unequal(world), [n + 1 for n in reversed(unequal(world))]
    generator = torch.Generator().manual_seed(3)
    whole = convert(sets(sum(images)), torch.float64)
    y = torch.randn(sum(concepts), D, generator=generator, dtype=torch.float64)
    mask = torch.rand(sum(concepts), generator=generator) < 0.8
    owner = torch.cat([torch.randint(-1, i, (c,), generator=generator) for i, c in zip(images, concepts, strict=True)])
    first = torch.repeat_interleave(torch.tensor([sum(images[:r]) for r in range(world)]), torch.tensor(concepts))
    everyone = torch.where(owner < 0, owner, owner + first)
    leaves = [whole["x"].requires_grad_(), y.clone().requires_grad_(), whole["scale"].requires_grad_()]
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    for with_mask in (False, True):
        expected_loss = maxsim_sigmoid_loss(*leaves, bias, everyone, y_mask=mask if with_mask else None)
        expected = torch.autograd.grad(expected_loss, [*leaves, bias])
        mine = [
            part(whole["x"].detach(), images, rank).clone().requires_grad_(),
            part(y, concepts, rank).clone().requires_grad_(),
            whole["scale"].detach().clone().requires_grad_(),
        ]
        slope = bias.detach().clone().requires_grad_()
        own = part(mask, concepts, rank) if with_mask else None
        loss = sharded_maxsim_sigmoid_loss(*mine, slope, part(owner, concepts, rank), y_mask=own)
        found = torch.autograd.grad(loss, [*mine, slope])
        total = loss.detach().clone()
        shared = [total, found[2].clone(), found[3].clone()]
        for t in shared:
            dist.all_reduce(t)
            t /= world
        assert relative_error(shared[0], expected_loss.detach()) < 1e-10
        assert relative_error(shared[1], expected[2]) < 1e-10 and relative_error(shared[2], expected[3]) < 1e-10
        assert relative_error(found[0] / world, part(expected[0], images, rank)) < 1e-10
        assert relative_error(found[1] / world, part(expected[1], concepts, rank)) < 1e-10


def what_travels_and_what_is_computed(rank: int, world: int) -> None:
    n = 4
    x, y = (part(sets(n * world)[name].float(), [n] * world, rank).requires_grad_() for name in ("x", "y"))
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        loss = sharded_filip_loss(x, y, 10.0, sizes=[n] * world)
        forward = counter.get_total_flops()
        there = list(traffic.seen)
        loss.backward()
    assert there == [("allgather_base", n * T * D * 4), ("alltoall_base", n * world * 4)]
    assert traffic.seen[2:] == [("alltoall_base", n * world * 4), ("reduce_scatter_base", n * world * T * D * 4)]
    assert forward == 2 * n * n * world * P * T * D  # both directions from one product


def disagreement_is_named(rank: int, world: int) -> None:
    odd = rank == world - 1
    x = torch.ones(2, P, D)
    with pytest.raises(ValueError, match="y: expected one width on all ranks"):
        sharded_filip_loss(x, torch.ones(2, T + odd, D), 1.0)
    with pytest.raises(ValueError, match="expected ids or none on all ranks"):
        sharded_filip_loss(x, torch.ones(2, T, D), 1.0, None, torch.ones(2, T, dtype=torch.bool) if odd else None)


def query_loss_of_the_whole_batch(rank: int, world: int) -> None:
    found, expected = [], []
    for dtype in TOLERANCES:
        for sizes in SIZES:
            split = sizes(world)
            n = sum(split)
            arguments = convert(queries(n), dtype)
            ids = torch.arange(n) % 4
            smoothing = torch.linspace(0, 0.4, n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            for own, whole in (
                ({}, {}),
                ({"label_smoothing": 0.1, "sizes": split}, {"label_smoothing": 0.1}),
                ({"label_smoothing": part(smoothing, split, rank)}, {"label_smoothing": smoothing}),
                ({"labels": part(ids, split, rank)}, {"labels": (ids, ids)}),
            ):
                found.append((dtype, by_all(sharded_query_loss, arguments, split, rank, **own)))
                expected.append(by_one(query_loss, arguments, **whole))
    for (dtype, f), e in zip(found, expected, strict=True):
        assert_near(f, e, TOLERANCES[dtype] * 2)


def queries(n: int) -> dict[str, Tensor]:
    arguments = sets(n)
    return arguments | {"y": arguments["y"][:, 0]}


def query_loss(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    s = maxsim(x, y[:, None], directions="y_to_x")
    return score_contrastive_loss(s, s, scale, **options)


CHECKS = [
    query_loss_of_the_whole_batch,
    filip_loss_of_the_whole_batch,
    filip_loss_exact_where_it_is_small,
    no_sets_at_all,
    sigmoid_of_concepts,
    what_travels_and_what_is_computed,
    disagreement_is_named,
]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_equal_one_process(world: int, tmp_path: Path) -> None:
    run(world, tmp_path, CHECKS)


def test_without_a_process_group_they_are_the_losses_of_one_process() -> None:
    arguments = sets(6)
    for found, expected in (
        (by_one(sharded_filip_loss, arguments), by_one(filip_loss, arguments)),
        (by_one(sharded_filip_loss, arguments, gather="x"), by_one(filip_loss, arguments)),
    ):
        assert_near(found, expected, 1e-12)


@pytest.mark.parametrize(
    ("message", "wrong"),
    {
        "y: expected as many sets as x": {"y": torch.ones(3, T, D)},
        "x_mask: expected": {"x_mask": torch.ones(2, P + 1, dtype=torch.bool)},
        "gather: expected": {"gather": "both"},
    }.items(),
)
def test_wrong_arguments_are_named(message: str, wrong: dict[str, Any]) -> None:
    arguments = {"x": torch.ones(2, P, D), "y": torch.ones(2, T, D), "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        sharded_filip_loss(**(arguments | wrong))


def test_query_loss_in_one_process() -> None:
    """Each text meets its best query: the gradient of a picture goes to the winners alone."""
    x, y = queries(5)["x"].requires_grad_(), queries(5)["y"]
    scores = 10 * torch.einsum("mqd,nd->mqn", x, y).amax(1)
    both = (torch.nn.functional.cross_entropy(s, torch.arange(5), label_smoothing=0.1) for s in (scores, scores.T))
    expected = sum(both) / 2
    loss = sharded_query_loss(x, y, 10.0, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, x)[0] for t in (loss, expected)))
    with pytest.raises(ValueError, match=r"y: expected \[5, D\] beside x, got \(5, 3, 7\)"):
        sharded_query_loss(x, sets(5)["y"], 10.0)
