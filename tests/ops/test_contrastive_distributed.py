"""Sharded losses over gloo: N processes against one process with the whole batch.

Every check below runs on all ranks of a world, in the order of CHECKS. Between its collectives it asserts only what fails on
all ranks or on none, for one that left early would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conformance import PAIR_CASES, Arguments, cone, duplicates, ids, pairs, relative_error
from ranks import run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlpfast.ops import _shards, backends
from vlpfast.ops.contrastive import clip_loss, pair_logsumexp, sharded_clip_loss, sharded_sigmoid_loss, sigmoid_loss
from vlpfast.ops.flops import FlopCounterMode

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")

WIDTH = 6
Loss = Callable[..., Tensor]


def equal(world: int) -> list[int]:
    return [5] * world


def unequal(world: int) -> list[int]:
    return [7, 2, 5, 3][:world]


def one_without(world: int) -> list[int]:
    return [6, 0, 3, 4][:world]


SIZES = (equal, unequal, one_without)


# --- the losses as functions of the whole batch, by all ranks and by one ------------------------------------------------


def convert(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: (v.to(dtype if name in ("x", "y") else wide) if isinstance(v, Tensor) else v) for name, v in arguments.items()}


def leaves_of(arguments: Arguments) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_() for name, t in arguments.items() if isinstance(t, Tensor)}


def by_one(loss: Loss, arguments: Arguments, **options: Any) -> dict[str, Tensor]:
    """The loss and its gradients, by name, in one process."""
    leaves = leaves_of(arguments)
    value = loss(**(arguments | leaves), **options)
    return {"loss": value.detach()} | dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def part(whole: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    return whole[sum(sizes[:rank]) :][: sizes[rank]]


def by_all(loss: Loss, arguments: Arguments, split: Sequence[int], rank: int, **options: Any) -> dict[str, Tensor]:
    """The same by all ranks: their losses and the gradients of what they share averaged, features' gradients put together."""
    if "leave_out" in options:
        options["leave_out"] = tuple(part(i, split, rank) for i in options["leave_out"])
    leaves = leaves_of(arguments | {name: part(arguments[name], split, rank) for name in ("x", "y")})
    value = loss(**(arguments | leaves), **options)
    found = {"loss": value.detach()} | dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    return joined(found, split, rank)


def joined(found: dict[str, Tensor], sizes: Sequence[int], rank: int) -> dict[str, Tensor]:
    out = {}
    for name, t in found.items():
        whole = t.double()
        if name in ("x", "y"):
            whole = torch.zeros(sum(sizes), *t.shape[1:], dtype=torch.float64)
            part(whole, sizes, rank).copy_(t)
        dist.all_reduce(whole)
        out[name] = whole / len(sizes)
    return out


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        error = relative_error(found[name].double(), expected[name].double())
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def masked_clip_loss(x: Tensor, y: Tensor, scale: Tensor, leave_out: tuple[Tensor, Tensor]) -> Tensor:
    rows, cols = pair_logsumexp(x, y, scale, leave_out=leave_out)
    return (F.softplus(rows, threshold=40).mean() + F.softplus(cols, threshold=40).mean()) / 2


sigmoid, sharded_sigmoid = partial(sigmoid_loss, bias=None), partial(sharded_sigmoid_loss, bias=None)


# --- checks -----------------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[int, int], None]] = {}


def check(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CHECKS[function.__name__] = function
    return function


# the errors of one process against double are 2e-7 (scale 14.3) and 7e-7 (scale 100) in float32, 2e-3 in bfloat16
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 4e-3}


@check
def clip_loss_of_the_whole_batch(rank: int, world: int) -> None:
    found, expected = [], []
    for dtype in TOLERANCES:
        for sizes in SIZES:
            n = sum(sizes(world))
            for scale, options in ((14.3, {}), (14.3, {"gather": "x"}), (100.0, {"stash_bytes": 0, "sizes": sizes(world)})):
                arguments = convert(pairs(n, n, WIDTH, scale=scale), dtype)
                found.append((dtype, scale, by_all(sharded_clip_loss, arguments, sizes(world), rank, **options)))
                with backends.use("reference"):
                    expected.append(by_one(clip_loss, convert(arguments, torch.float64)))
    for (dtype, scale, f), e in zip(found, expected, strict=True):
        assert_near(f, e, TOLERANCES[dtype] * (2 if scale > 50 else 1))


@check
def sigmoid_loss_of_the_whole_batch(rank: int, world: int) -> None:
    found, expected = [], []
    for dtype in TOLERANCES:
        for sizes in SIZES:
            n = sum(sizes(world))
            for options in ({}, {"gather": "x"}, {"sizes": sizes(world)}, {"leave_out": ids(n, n, 4)}):
                arguments = convert(pairs(n, n, WIDTH, scale=10.0, bias=torch.tensor(-3.0)), dtype)
                found.append((dtype, by_all(sharded_sigmoid_loss, arguments, sizes(world), rank, **options)))
                with backends.use("reference"):
                    out = options.get("leave_out")
                    expected.append(by_one(sigmoid_loss, convert(arguments, torch.float64), leave_out=out))
    for (dtype, f), e in zip(found, expected, strict=True):
        assert_near(f, e, TOLERANCES[dtype])


@check
def pairs_left_out(rank: int, world: int) -> None:
    found, expected = [], []
    for groups in (1, 4):  # everything left out, some
        for gather in ("x", "y"):
            sizes = unequal(world)
            arguments = convert(pairs(sum(sizes), sum(sizes), WIDTH), torch.float64)
            out = ids(sum(sizes), sum(sizes), groups)
            found.append(by_all(sharded_clip_loss, arguments, sizes, rank, leave_out=out, gather=gather))
            expected.append(by_one(masked_clip_loss, arguments, leave_out=out))
    for f, e in zip(found, expected, strict=True):
        assert_near(f, e, 1e-10)


@check
def no_rows_at_all(rank: int, world: int) -> None:
    arguments = convert(pairs(0, 0, WIDTH), torch.float32)
    for loss in (sharded_clip_loss, sharded_sigmoid):
        found = by_all(loss, arguments, [0] * world, rank)
        assert found["loss"] == 0 and found["scale"] == 0 and found["x"].shape == (0, WIDTH)


@check
def precision_by_regime(rank: int, world: int) -> None:
    """Never worse than one process with the dense loss in the same dtype; near it everywhere but in the initial cone."""
    n = 12 * world
    regimes = {
        "initial cone": cone(n, 64),
        "low loss": pairs(n, n, 64, noise=0.6, scale=50.0),
        "near-zero loss": pairs(n, n, 512, noise=0.2, scale=100.0),
        "near-duplicates": duplicates(n, 64),
    }
    for regime, arguments in regimes.items():
        for dtype in (torch.float32, torch.bfloat16):
            numbers = convert(arguments, dtype)
            found = by_all(sharded_clip_loss, numbers, [12] * world, rank)
            with backends.use("reference"):
                expected = by_one(clip_loss, convert(numbers, torch.float64))
            alone, dense = by_one(clip_loss, numbers), by_one(dense_clip_loss, numbers)
            for name in ("loss", "x", "y"):
                sharded, one, eager = (relative_error(r[name], expected[name]) for r in (found, alone, dense))
                slack = 10 if (regime, dtype) == ("initial cone", torch.bfloat16) else 2
                what = f"{regime}, {dtype}, {name}: {sharded:.1e}, one process {one:.1e}, dense {eager:.1e}"
                assert sharded <= slack * one + 1e-5, what
                assert sharded <= 1.2 * max(one, eager) + 1e-5, what


def dense_clip_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale.to(x.dtype) * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(9, WIDTH), nn.Linear(7, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1), self.log_scale.exp()


@check
def one_step_of_distributed_data_parallel(rank: int, world: int) -> None:
    for sizes in (equal(world), one_without(world)):
        n = sum(sizes)
        generator = torch.Generator().manual_seed(1)
        image, text = torch.randn(n, 9, generator=generator), torch.randn(n, 7, generator=generator)
        parallel, alone = nn.parallel.DistributedDataParallel(Towers()), Towers()
        sharded_clip_loss(*parallel(part(image, sizes, rank), part(text, sizes, rank))).backward()
        clip_loss(*alone(image, text)).backward()
        for model in (parallel, alone):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        for (name, p), q, start in zip(
            parallel.module.named_parameters(), alone.parameters(), Towers().parameters(), strict=True
        ):
            assert (p - start).norm() > 1e-3, f"{name} did not move"
            step, expected = p.detach() - start.detach(), q.detach() - start.detach()
            error = relative_error(step, expected)
            assert error <= 2e-6 and relative_error(p.detach(), q.detach()) <= 1e-6, f"{name}: {error:.1e}"


class Traffic(TorchDispatchMode):
    """(name, bytes that a rank hands over) of the collectives inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            self.seen.append((func._schema.name.removeprefix("c10d::").strip("_"), args[1].numel() * args[1].itemsize))
        return func(*args, **(kwargs or {}))


@check
def what_travels_and_what_is_computed(rank: int, world: int) -> None:
    n, whole = 5, 5 * world
    arguments = convert(pairs(whole, whole, WIDTH), torch.float32)
    runs = []
    for features, budget, products, wants in (
        (torch.float32, 4 << 30, 3, "xy"),
        (torch.float32, 0, 4, "xy"),
        (torch.bfloat16, 4 << 30, 3, "xy"),
        (torch.float32, 4 << 30, 2, "x"),
    ):
        x, y = (part(arguments[name], [n] * world, rank).to(features).requires_grad_(name in wants) for name in ("x", "y"))
        with FlopCounterMode(display=False) as counter, Traffic() as traffic:
            loss = sharded_clip_loss(x, y, 14.3, sizes=[n] * world, stash_bytes=budget)
            forward = len(traffic.seen)
            loss.backward()
        sums = ("alltoall_base", whole * 4)
        there = [("allgather_base", n * WIDTH * features.itemsize), sums]
        back = [sums, ("reduce_scatter_base", whole * WIDTH * 4)][: 1 + ("y" in wants)]
        runs.append((traffic.seen[:forward], there, traffic.seen[forward:], back, counter.get_total_flops(), products))
    with Traffic() as traffic, torch.autocast("cpu", torch.bfloat16):
        sharded_clip_loss(x, y, 14.3)
    with FlopCounterMode(display=False) as counter, Traffic() as of_sigmoid:
        sharded_sigmoid_loss(x.requires_grad_(), y.requires_grad_(), 10.0, None, sizes=[n] * world).backward()
    for seen, there, seen_back, back, flops, products in runs:
        assert seen == there and seen_back == back
        assert flops == products * 2 * n * whole * WIDTH
    assert traffic.seen == [("allgather_base", 32), ("allgather_base", n * WIDTH * 2), ("alltoall_base", whole * 4)]
    assert of_sigmoid.seen == [("allgather_base", n * WIDTH * 4), ("reduce_scatter_base", whole * WIDTH * 4)]
    assert counter.get_total_flops() == 3 * 2 * n * whole * WIDTH


@check
def autocast(rank: int, world: int) -> None:
    sizes = unequal(world)
    arguments = convert(pairs(sum(sizes), sum(sizes), WIDTH), torch.float32)
    for sharded, alone in ((sharded_clip_loss, clip_loss), (sharded_sigmoid, sigmoid)):
        with torch.autocast("cpu", torch.bfloat16):
            found = by_all(sharded, arguments, sizes, rank)
            expected = by_one(alone, arguments)
            doubles = by_all(sharded, convert(arguments, torch.float64), sizes, rank)
        assert_near(found, expected, TOLERANCES[torch.bfloat16])
        assert_near({"loss": found["loss"]}, {"loss": expected["loss"]}, 1e-6)
        assert_near(doubles, by_one(alone, convert(arguments, torch.float64)), 1e-10)


@check
def two_dtypes(rank: int, world: int) -> None:
    sizes = unequal(world)
    arguments = convert(pairs(sum(sizes), sum(sizes), WIDTH), torch.float32)
    for side in ("x", "y"):
        for sharded, alone in ((sharded_clip_loss, clip_loss), (sharded_sigmoid, sigmoid)):
            mixed = arguments | {side: arguments[side].bfloat16()}
            found, expected = by_all(sharded, mixed, sizes, rank), by_one(alone, mixed)
            assert_near(found, expected, TOLERANCES[torch.bfloat16])
            assert_near({"loss": found["loss"]}, {"loss": expected["loss"]}, 1e-6)


@check
def backward_twice(rank: int, world: int) -> None:
    arguments = convert(pairs(5 * world, 5 * world, WIDTH), torch.float32)
    x, y = (part(arguments[name], equal(world), rank).requires_grad_() for name in ("x", "y"))
    loss = sharded_clip_loss(x, y, 14.3)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    second = torch.autograd.grad(loss, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@check
def losses_that_count_differently_on_each_rank(rank: int, world: int) -> None:
    """The adjoints deliver the gradient of the sum over ranks, whatever each rank does with its loss."""
    sizes, n = unequal(world), sum(unequal(world))
    arguments = convert(pairs(n, n, WIDTH), torch.float64)
    found = by_all(lambda **a: sharded_clip_loss(**a) * (rank + 1), arguments, sizes, rank)
    weights = torch.repeat_interleave(torch.arange(world) + 1.0, torch.tensor(sizes))

    def weighted(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        rows, cols = pair_logsumexp(x, y, scale)
        return ((F.softplus(rows) + F.softplus(cols)) * weights).mean() / 2

    assert_near(found, by_one(weighted, arguments), 1e-10)


@check
def second_derivatives_by_the_reference(rank: int, world: int) -> None:
    sizes, n = unequal(world), sum(unequal(world))
    arguments = convert(pairs(n, n, WIDTH), torch.float64)

    def slope(loss: Loss) -> Loss:
        def function(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            dx, dy = torch.autograd.grad(loss(x, y, scale), (x, y), create_graph=True)
            return dx.square().sum() + (dy * x.detach()).sum()

        return function

    with backends.use("reference"):
        for sharded, alone in ((sharded_clip_loss, clip_loss), (sharded_sigmoid, sigmoid)):
            found = by_all(slope(sharded), arguments, sizes, rank)
            expected = by_one(slope(lambda *a, alone=alone: alone(*a) * world), arguments)  # the sum of all ranks' losses
            assert_near(found, {name: t / world for name, t in expected.items()}, 1e-10)


@check
def a_number_that_is_none_reaches_all_ranks(rank: int, world: int) -> None:
    found = []
    for where in ("x", "y"):
        arguments = convert(pairs(5 * world, 5 * world, WIDTH), torch.float32)
        mine = {name: part(arguments[name], equal(world), rank).clone() for name in ("x", "y")}
        if rank == world - 1:
            mine[where][1, 2] = torch.nan
        found.append(sharded_clip_loss(**mine, scale=14.3))
    assert all(loss.isnan() for loss in found)


@check
def a_group_of_some_ranks(rank: int, world: int) -> None:
    members = list(range(1, world))
    group = dist.new_group(members)
    arguments = convert(pairs(12, 12, WIDTH), torch.float64)
    if rank == 0:
        with pytest.raises(ValueError, match="group: expected one that this process belongs to"):
            sharded_clip_loss(arguments["x"], arguments["y"], 14.3, group=group)
        return
    sizes = [12 // len(members)] * len(members)
    leaves = {name: part(arguments[name], sizes, rank - 1).requires_grad_() for name in ("x", "y")}
    sharded_clip_loss(**leaves, scale=arguments["scale"], group=group).backward()
    expected = by_one(clip_loss, arguments)
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad / len(members), part(expected[name], sizes, rank - 1)) <= 1e-10


@check
def a_group_of_one(rank: int, world: int) -> None:
    groups = [dist.new_group([r]) for r in range(world)]
    arguments = convert(pairs(9, 9, WIDTH), torch.bfloat16)
    for sharded, alone in ((sharded_clip_loss, clip_loss), (sharded_sigmoid, sigmoid)):
        with Traffic() as traffic:
            found = by_one(sharded, arguments, group=groups[rank])
        expected = by_one(alone, arguments)
        assert not traffic.seen and all(torch.equal(found[name], expected[name]) for name in expected)


@check
def compilation_without_a_break(rank: int, world: int) -> None:
    if world > 2:
        return
    sizes = unequal(world)
    arguments = convert(pairs(sum(sizes), sum(sizes), WIDTH), torch.float32)
    for sharded in (sharded_clip_loss, sharded_sigmoid):
        expected = by_all(sharded, arguments, sizes, rank, sizes=sizes)
        compiled = torch.compile(sharded, fullgraph=True, backend="aot_eager")
        assert_near(by_all(compiled, arguments, sizes, rank, sizes=sizes), expected, 1e-7)


@check
def disagreement_is_named_on_all_ranks(rank: int, world: int) -> None:
    odd = rank == world - 1
    x = torch.ones(3, 5 if odd else 4)
    with pytest.raises(ValueError, match=r"y: expected one width on all ranks, got, by rank, 4, .*5"):
        sharded_clip_loss(x, x, 1.0)
    x = torch.ones(3, 4, dtype=torch.bfloat16 if odd else torch.float32)
    with pytest.raises(ValueError, match=r"y: expected one dtype on all ranks, got, by rank, torch.float32, .*torch.bfloat16"):
        sharded_clip_loss(x, x, 1.0)
    x, out = torch.ones(3, 4), torch.arange(3)
    with pytest.raises(ValueError, match=r"leave_out: expected ids or none on all ranks, got, by rank, False, .*True"):
        sharded_clip_loss(x, x, 1.0, leave_out=(out, out) if odd else None)
    for sizes in ([3] * (world + 1), [4] * world, [3] * (world - 1) + [-1], [3.0] * world):
        with pytest.raises(ValueError, match=rf"sizes: expected {world} ints >= 0, 3 \(the rows here\) at rank {rank}, got"):
            sharded_clip_loss(x, x, 1.0, sizes=sizes)


# --- running them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_equal_one_process(world: int, tmp_path: Path) -> None:
    run(world, tmp_path, list(CHECKS.values()))


@pytest.mark.gpu
def test_over_nccl(tmp_path: Path) -> None:
    run(min(4, torch.cuda.device_count()), tmp_path, [on_gpus], "nccl")


def on_gpus(rank: int, world: int) -> None:
    """All collectives, also where there is one GPU, and both losses where there are more."""
    shards = _shards.Shards(None, rank, tuple(unequal(world)), torch.float32)
    rows = torch.arange(7.0 * WIDTH, device="cuda").view(7, WIDTH)[: unequal(world)[rank]] + 100 * rank
    everything = _shards._gather(rows, shards)
    assert everything.shape == (sum(unequal(world)), WIDTH) and torch.equal(part(everything, unequal(world), rank), rows)
    assert torch.equal(_shards._reduce(everything, shards), rows * world)
    columns = everything[:, 0].contiguous()
    assert torch.equal(_shards._to_owners(columns, shards), rows[:, 0].expand(world, -1))
    assert torch.equal(_shards._from_owners(_shards._to_owners(columns, shards), shards), columns)
    for sizes, given in ((equal(world), None), (unequal(world), unequal(world))):
        whole = convert(pairs(sum(sizes), sum(sizes), WIDTH), torch.float32)
        for sharded, alone in ((sharded_clip_loss, clip_loss), (sharded_sigmoid, sigmoid)):
            mine = {name: part(whole[name], sizes, rank).cuda() for name in ("x", "y")} | {"scale": whole["scale"].cuda()}
            found = by_one(sharded, mine, sizes=given)
            expected = by_one(alone, whole)
            dist.all_reduce(found["loss"])
            dist.all_reduce(found["scale"])
            expected |= {name: part(expected[name], sizes, rank) for name in ("x", "y")}
            assert_near({name: t.cpu() / world for name, t in found.items()}, expected, 1e-5)


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name, make in PAIR_CASES.items() if make().keys() == {"x", "y", "scale"}])
def test_without_a_process_group_they_are_the_losses_of_one_process(case: str) -> None:
    arguments = PAIR_CASES[case]()
    if len(arguments["x"]) != len(arguments["y"]):
        with pytest.raises(ValueError, match="y: expected as many rows as x"):
            sharded_clip_loss(**arguments)
        return
    for dtype in TOLERANCES:
        both = convert(arguments, dtype)
        for sharded, alone in ((sharded_clip_loss, clip_loss), (sharded_sigmoid, sigmoid)):
            found, expected = by_one(sharded, both), by_one(alone, both)
            few = 4 * torch.finfo(dtype).eps  # clip_loss sums in another order
            for name in expected:
                assert relative_error(found[name], expected[name]) <= few, name


def test_func_grad() -> None:
    both = convert(pairs(9, 9, WIDTH), torch.float32)
    leaves = [t.requires_grad_() for t in both.values()]
    expected = torch.autograd.grad(clip_loss(*leaves), leaves)
    found = torch.func.grad(sharded_clip_loss, argnums=(0, 1, 2))(*[t.detach() for t in leaves])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


WRONG: dict[str, tuple[type[Exception], Arguments]] = {
    "x: expected a tensor, got list": (TypeError, {"x": [[1.0]]}),
    "y: expected as many rows as x, 4, got 6": (ValueError, {"y": torch.ones(6, 3)}),
    "y: expected width 3 as x has, got 4": (ValueError, {"y": torch.ones(4, 4)}),
    "scale: expected a float or a 0-d tensor, got str": (TypeError, {"scale": "1"}),
    "gather: expected 'x' or 'y', got 'text'": (ValueError, {"gather": "text"}),
    r"leave_out\[0\]: expected a vector of length 4": (ValueError, {"leave_out": (torch.arange(5), torch.arange(4))}),
    r"sizes: expected 1 ints >= 0, 4 \(the rows here\) at rank 0, got \[3\]": (ValueError, {"sizes": [3]}),
    "stash_bytes: expected >= 0, got -1": (ValueError, {"stash_bytes": -1}),
}


def test_the_bias_has_no_columns() -> None:
    with pytest.raises(ValueError, match="bias: expected a 0-d tensor, got 1 dimensions and 4 elements"):
        sharded_sigmoid_loss(torch.ones(4, 3), torch.ones(4, 3), 1.0, torch.ones(4))


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        sharded_clip_loss(**({"x": torch.ones(4, 3), "y": torch.ones(4, 3), "scale": 1.0} | wrong))
