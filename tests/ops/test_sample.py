"""sample_hard_negatives: its random bits, the distribution it draws, equal draws from every backend, torch's machinery."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import PAIR_CASES, Arguments, Op, convert, features, ids, pairs, permutation
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vlpfast.ops import backends
from vlpfast.ops.contrastive import sample_hard_negatives
from vlpfast.ops.contrastive.reference import gumbel, philox, random_bits
from vlpfast.ops.contrastive.sample import KERNELS
from vlpfast.ops.flops import FlopCounterMode

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
THERE = ["reference", *(name for name in KERNELS if name != "triton" and not backends.available()[name])]  # test_triton_family.py
SEED = torch.tensor(-0x123456789ABCDEF)  # both halves have something to say


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


# --- random bits ------------------------------------------------------------------------------------------------------

ONES, PI = (0xFFFFFFFF,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN = [  # counter, key -> words: the test vectors for philox4x32-10 that come with Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (ONES, ONES[:2], (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    found = philox(*map(torch.tensor, counter), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(int(word) for word in found) == words


def test_which_bits_belong_to_which_pair() -> None:
    bits = random_bits(5, 11, 1, SEED)
    key = tuple(torch.tensor(half) for half in (0x76543211, 0xFEDCBA98))  # -0x0123456789ABCDEF in two's complement
    for row, column in ((0, 0), (0, 3), (3, 4), (4, 10)):
        words = philox(*map(torch.tensor, (column // 4, row, 1, 0)), key)
        assert bits[row, column] == words[column % 4]
    assert torch.equal(random_bits(3, 6, 1, SEED), bits[:3, :6])
    for other in (random_bits(5, 11, 0, SEED), random_bits(5, 11, 1, SEED + 1), random_bits(5, 11, 1, SEED + (1 << 32))):
        assert not (other == bits).any()


def test_gumbels_are_finite_and_fine_where_they_are_large() -> None:
    last = 2**32 - 1
    ends = gumbel(torch.tensor([0, 1, last - 1, last]))
    large, next_to_it = 33 * math.log(2), 33 * math.log(2) - math.log(3)
    assert ends.tolist() == pytest.approx([large, next_to_it, -math.log(next_to_it), -math.log(large)], rel=1e-7)
    spread = gumbel(torch.arange(0, 2**32, 4099))
    assert spread.isfinite().all() and (spread.diff() < 0).all()
    assert spread.mean().item() == pytest.approx(0.577216, abs=1e-4)
    assert spread.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=1e-3)


# --- the distribution -------------------------------------------------------------------------------------------------


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Of a chi-square test; cells that are expected fewer than 5 times are taken together."""
    counts, expected = counts.double().flatten(), (probabilities * counts.sum()).flatten()
    assert not counts[expected == 0].any()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    some = expected > 0
    statistic = ((observed - expected).square() / expected)[some].sum()
    return float(torch.special.gammaincc((some.sum() - 1) / 2, statistic / 2))


def published(x: Tensor, y: Tensor, scale: float, own: int, uniform: float, left_out: Tensor | None = None) -> Tensor:
    """The dense formulation: softmax over all columns, a constant added, zeroes where nothing is to be drawn, normalised."""
    weights = F.softmax(scale * x.double() @ y.double().T, dim=1) + uniform
    weights[:, own] = 0
    if left_out is not None:
        weights[:, left_out] = 0
    return weights / weights.sum(1, keepdim=True)


def histogram(draws: Tensor, n: int) -> Tensor:
    return draws.flatten().bincount(minlength=n)


def one_row_many_times(m: int, n: int = 9, own: int = 4, scale: float = 4.0) -> Arguments:
    """Every row is the same, and its own column nearly so: the softmax of the others is small, which `uniform` is beside."""
    both = features(1, n, 5, seed=3)
    both["y"][own] = both["x"][0]
    return {
        "x": both["x"].float().expand(m, 5),
        "y": both["y"].float(),
        "scale": scale,
        "own": torch.full((m,), own),
        "seed": SEED,
    }


@pytest.mark.parametrize("backend", THERE)
@pytest.mark.parametrize("uniform", [0.0, 1e-4, 1e-2, 0.5])
def test_one_draw_follows_the_published_distribution(uniform: float, backend: str) -> None:
    m, n = 40_000, 9
    arguments = one_row_many_times(m)
    row_ids, column_ids = torch.zeros(m, dtype=torch.long), (torch.arange(n) != 7).long()
    for left_out in (None, torch.tensor([7])):
        with backends.use(backend):
            drawn = sample_hard_negatives(
                **arguments, uniform=uniform, leave_out=None if left_out is None else (row_ids, column_ids)
            )
        wanted = published(arguments["x"][:1], arguments["y"], 4.0, 4, uniform, left_out)[0]
        assert p_value(histogram(drawn, n), wanted) > 1e-3


def test_the_own_column_and_those_left_out_are_in_the_normaliser() -> None:
    """Each of the two has nearly half of the softmax; without either of them `uniform` would weigh half as much."""
    m, n, own, twin, uniform = 40_000, 9, 4, 7, 1e-2
    arguments = one_row_many_times(m, scale=6.0)
    x, y = arguments["x"][:1], arguments["y"]
    y[twin] = y[own]
    left_out = torch.zeros(m, dtype=torch.long), (torch.arange(n) != twin).long()
    for backend in THERE:
        with backends.use(backend):
            counts = histogram(sample_hard_negatives(**arguments, uniform=uniform, leave_out=left_out), n)
        assert p_value(counts, published(x, y, 6.0, own, uniform, torch.tensor([twin]))[0]) > 1e-3
        logits = 6.0 * (x @ y.T)[0].double()
        wrong = logits.masked_fill(torch.arange(n) == own, -torch.inf).softmax(0) + uniform
        wrong[[own, twin]] = 0
        assert p_value(counts, wrong / wrong.sum()) < 1e-6


@pytest.mark.parametrize("backend", THERE)
@pytest.mark.parametrize("uniform", [0.0, 1e-4, 0.1])
def test_two_draws_are_without_replacement(uniform: float, backend: str) -> None:
    m, n = 40_000, 7
    arguments = one_row_many_times(m, n)
    with backends.use(backend):
        drawn = sample_hard_negatives(**arguments, count=2, uniform=uniform)
        first = sample_hard_negatives(**arguments, uniform=uniform)
    assert torch.equal(drawn[:, :1], first)
    p = published(arguments["x"][:1], arguments["y"], 4.0, 4, uniform)[0]
    both = p[:, None] * p / (1 - p)[:, None]  # the second among what the first has left
    both.fill_diagonal_(0)
    assert p_value(histogram(drawn[:, 0] * n + drawn[:, 1], n * n), both) > 1e-3


def test_rows_and_seeds_are_independent() -> None:
    m, n = 30_000, 5
    arguments = one_row_many_times(m, n) | {"uniform": 0.2}
    p = published(arguments["x"][:1], arguments["y"], 4.0, 4, 0.2)[0]
    joint = p[:, None] * p
    drawn = sample_hard_negatives(**arguments)[:, 0]
    other = sample_hard_negatives(**arguments | {"seed": SEED + 1})[:, 0]
    high = sample_hard_negatives(**arguments | {"seed": SEED + (1 << 32)})[:, 0]
    for a, b in ((drawn[:-1:2], drawn[1::2]), (drawn, other), (drawn, high)):
        assert p_value(histogram(a * n + b, n * n), joint) > 1e-3
    few = arguments | {"x": arguments["x"][:1], "own": arguments["own"][:1]}
    torch.manual_seed(0)
    across = torch.cat([sample_hard_negatives(**few | {"seed": None}) for _ in range(2000)])
    assert p_value(histogram(across, n), p) > 1e-3


@pytest.mark.parametrize("backend", THERE)
def test_equal_logits_are_equally_likely(backend: str) -> None:
    m, n = 40_000, 6
    with backends.use(backend):
        drawn = sample_hard_negatives(torch.ones(m, 2), torch.ones(n, 2), 100.0, 2, own=None, seed=SEED)
    equal = (1 - torch.eye(n)) / (n * (n - 1))
    assert p_value(histogram(drawn[:, 0] * n + drawn[:, 1], n * n), equal) > 1e-3


# --- every backend draws the same -------------------------------------------------------------------------------------

CASES: dict[str, Callable[[], Arguments]] = {
    name: case for name, case in PAIR_CASES.items() if case().keys() <= {"x", "y", "scale", "own", "leave_out"}
} | {"one column for all": lambda: pairs(20, 33, 6, own=torch.full((20,), 4))}
OP = Op(sample_hard_negatives, KERNELS, ("x", "y"), ("scale",), CASES)


def draws_by(backend: str, arguments: Arguments, **more: Any) -> Tensor:
    with backends.use(backend):
        return sample_hard_negatives(**(arguments | {"seed": SEED.to(arguments["x"].device)} | more)).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference_in_float64(case: str, dtype: torch.dtype) -> None:
    for backend in THERE if dtype != torch.float64 else THERE[1:]:
        arguments = convert(OP, CASES[case](), dtype, KERNELS.get(backend, "cpu"))
        exact = convert(OP, arguments, torch.float64, "cpu")
        m, n = len(arguments["x"]), len(arguments["y"])
        if m and not n:
            with pytest.raises(ValueError, match="count: expected at most N = 0"):
                draws_by(backend, arguments)
            continue
        # all columns in their order say most, but where there are many of them rounding decides the order of some
        whole = m * n < 1000 or dtype == torch.float64
        counts = {1, min(3, n), n} if whole else {1, 3}
        for uniform in (0.0, 1e-4, 0.3):
            expected = draws_by("reference", exact, uniform=uniform, count=max(1, *counts))
            for count in counts - {0}:
                found = draws_by(backend, arguments, uniform=uniform, count=count)
                assert torch.equal(found, expected[:, :count]), (backend, uniform, count)


def test_several_tiles_each_way() -> None:
    arguments = {name: t.float() for name, t in pairs(2060, 1040, 8).items()} | {"own": None, "leave_out": ids(2060, 1040, 50)}
    for uniform in (0.0, 1e-3):
        expected = draws_by("reference", arguments | {"x": arguments["x"].double()}, uniform=uniform, count=2)
        assert torch.equal(draws_by("cpp", arguments, uniform=uniform, count=2), expected)


@pytest.mark.parametrize("backend", THERE)
def test_what_must_not_be_drawn_never_is(backend: str) -> None:
    left_out = ids(300, 300, 4)
    for own in (0, None, permutation(300, 300)):
        for uniform in (0.0, 1e-2):
            arguments = {name: t.float() for name, t in pairs(300, 300, 8).items()} | {"own": own, "leave_out": left_out}
            drawn = draws_by(backend, arguments, uniform=uniform, count=300)
            allowed = left_out[0][:, None] != left_out[1]
            if own is not None:
                allowed[torch.arange(300), torch.arange(300) if isinstance(own, int) else own] = False
            for columns, row in zip(drawn, allowed, strict=True):
                number = int(row.sum())  # all that may be drawn, each once, and then nothing
                assert torch.equal(columns[:number].sort().values, row.nonzero()[:, 0]) and (columns[number:] == -1).all()


@pytest.mark.parametrize("backend", THERE)
def test_too_few_candidates(backend: str) -> None:
    one, five = torch.ones(1, 3), torch.ones(5, 3)
    assert draws_by(backend, {"x": one, "y": one, "scale": 1.0}).tolist() == [[-1]]
    assert draws_by(backend, {"x": one, "y": one, "scale": 1.0, "own": None}).tolist() == [[0]]
    nothing = draws_by(backend, {"x": torch.ones(0, 3), "y": torch.ones(0, 3), "scale": 1.0}, count=2)
    assert nothing.shape == (0, 2) and nothing.dtype == torch.int64
    left_out = torch.tensor([1, 2, 3, 1, 1]), torch.tensor([1, 2, 1, 1, 1])
    drawn = draws_by(backend, {"x": five, "y": five, "scale": 1.0, "leave_out": left_out}, count=4)
    assert [int((row >= 0).sum()) for row in drawn] == [1, 4, 4, 1, 1] and drawn[0].tolist() == [1, -1, -1, -1]


@pytest.mark.parametrize("backend", THERE)
def test_a_row_draws_the_same_beside_other_rows(backend: str) -> None:
    arguments: Arguments = features(2100 if backend == "cpp" else 400, 1100, 6) | {"scale": 14.3, "own": None}
    for uniform in (0.0, 0.01):
        all_rows = draws_by(backend, arguments, count=3, uniform=uniform)
        for m in (1, 17, 300):
            fewer = draws_by(backend, arguments | {"x": arguments["x"][:m]}, count=3, uniform=uniform)
            assert torch.equal(fewer, all_rows[:m])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (11, 300, 9), (300, 301, 7), (2100, 2100, 8)])
def test_two_threads_draw_what_one_does(shape: tuple[int, int, int], dtype: torch.dtype, two_threads: None) -> None:
    arguments = convert(OP, pairs(*shape, leave_out=ids(shape[0], shape[1], 9)), dtype, "cpu")
    for more in ({}, {"uniform": 1e-3}):
        torch.set_num_threads(2)
        on_two = draws_by("cpp", arguments, count=min(5, shape[1]), **more)
        torch.set_num_threads(1)
        assert torch.equal(draws_by("cpp", arguments, count=min(5, shape[1]), **more), on_two)


@pytest.mark.parametrize("backend", THERE)
def test_logits_far_apart(backend: str) -> None:
    """400 below the others are drawn when nothing else is left; -inf only for the sake of `uniform`."""
    y = torch.tensor([[0.0], [-400.0], [-400.5], [-torch.inf], [-1.0]])
    arguments = {"x": torch.ones(200, 1), "y": y, "scale": 1.0, "own": None}
    drawn = draws_by(backend, arguments, count=5)
    assert {tuple(row) for row in drawn.sort().values.tolist()} == {(-1, 0, 1, 2, 4)} and (drawn[:, 4] == -1).all()
    assert {tuple(row) for row in drawn[:, :2].sort().values.tolist()} == {(0, 4)}
    assert {tuple(row) for row in drawn[:, 2:4].sort().values.tolist()} == {(1, 2)}
    drawn = draws_by(backend, arguments, count=5, uniform=1e-3)
    assert (drawn.sort().values == torch.arange(5)).all() and (drawn[:, 0] == 3).sum() <= 2 and (drawn[:, 3] == 3).any()


@pytest.mark.parametrize("backend", THERE)
@pytest.mark.parametrize("uniform", [0.0, 0.1])
def test_numbers_that_are_none_are_drawn_first(backend: str, uniform: float) -> None:
    arguments = {name: t.float() for name, t in pairs(30, 80, 6).items()}
    nan, infinite = arguments["y"].clone(), arguments["y"].clone()
    nan[[70, 65]], infinite[75] = torch.nan, torch.inf * arguments["x"][0].sign()
    drawn = draws_by(backend, arguments | {"y": nan}, count=3, uniform=uniform)
    assert (drawn[:, :2] == torch.tensor([65, 70])).all() and (drawn[:, 2] < 80).all() and (drawn >= 0).all()
    assert draws_by(backend, arguments | {"y": infinite}, uniform=uniform)[0].item() == 75
    rows = arguments["x"].clone()
    rows[[0, 4]] = torch.nan
    drawn = draws_by(backend, arguments | {"x": rows}, count=2, uniform=uniform)
    assert drawn[0].tolist() == [1, 2] and drawn[4].tolist() == [0, 1]  # their own columns are 0 and 4
    clean = draws_by(backend, arguments, count=2, uniform=uniform)
    assert torch.equal(drawn[5:], clean[5:]) and torch.equal(drawn[1:4], clean[1:4])
    arguments["scale"] = torch.tensor(torch.nan)
    assert draws_by(backend, arguments, uniform=uniform)[:, 0].tolist() == [1] + 29 * [0]


def test_memory_does_not_grow_with_the_matrix() -> None:
    script = """
import resource, torch
from vlpfast.ops.contrastive import sample_hard_negatives
torch.set_num_threads(1)
def step(n):
    x, y = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for _ in range(2))
    sample_hard_negatives(x, y, 10.0, 2, uniform=1e-4)
step(2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8192)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(out) < 16  # MiB; the matrix has 256


# --- seeds, torch's machinery -----------------------------------------------------------------------------------------


def inputs(m: int = 12, n: int = 17, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    both = features(m, n, 5)
    return both["x"].to(dtype), both["y"].to(dtype), torch.tensor(3.0)


def test_seeds() -> None:
    numbers = inputs(200, 201)
    torch.manual_seed(3)
    first, second = (sample_hard_negatives(*numbers) for _ in range(2))
    torch.manual_seed(3)
    again = sample_hard_negatives(*numbers)
    assert torch.equal(first, again) and (first != second).any()
    fixed = [sample_hard_negatives(*numbers, seed=torch.tensor(seed)) for seed in (5, 5, 6, 5 + (1 << 32), -5)]
    assert torch.equal(fixed[0], fixed[1]) and all((fixed[0] != other).any() for other in fixed[2:])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_there_is_no_gradient_and_transforms_work() -> None:
    x, y, scale = (t.requires_grad_() for t in inputs())
    for backend in THERE:
        with backends.use(backend):
            drawn = sample_hard_negatives(x, y, scale, uniform=0.1, seed=SEED)
            assert not drawn.requires_grad

            def hardest(x: Tensor, y: Tensor) -> Tensor:
                columns = sample_hard_negatives(x, y, scale.detach(), uniform=0.1, seed=SEED)[:, 0]
                return (x * y[columns]).sum()

            found = torch.func.grad(hardest)(x.detach(), y.detach())
            assert torch.equal(found, y[drawn[:, 0]])
            batched = torch.func.vmap(lambda x: sample_hard_negatives(x, y.detach(), 3.0, uniform=0.1, seed=SEED))
            assert torch.equal(batched(x.detach().expand(2, -1, -1)), drawn.expand(2, -1, -1))
    with torch.inference_mode():
        assert torch.equal(sample_hard_negatives(x, y, scale, uniform=0.1, seed=SEED), drawn)


@pytest.mark.parametrize("backend", THERE)
def test_autocast_casts_features_alone(backend: str) -> None:
    x, y, _ = inputs(300, 301)
    scale = torch.tensor(10.003)
    with backends.use(backend):
        expected = sample_hard_negatives(x.bfloat16(), y.bfloat16(), scale, 3, uniform=1e-3, seed=SEED)
        with torch.autocast("cpu", torch.bfloat16):
            found = sample_hard_negatives(x, y, scale, 3, uniform=1e-3, seed=SEED)
            doubles = sample_hard_negatives(x.double(), y.double(), scale, 3, uniform=1e-3, seed=SEED)
        assert torch.equal(found, expected)
        assert torch.equal(doubles, sample_hard_negatives(x.double(), y.double(), scale, 3, uniform=1e-3, seed=SEED))
        assert (doubles != expected).any()


def test_two_dtypes_meet_in_the_wider() -> None:
    x, y, scale = inputs(300, 301)
    expected = sample_hard_negatives(x.bfloat16().float(), y, scale, 3, seed=SEED)
    assert torch.equal(sample_hard_negatives(x.bfloat16(), y, scale, 3, seed=SEED), expected)


def test_one_product() -> None:
    with FlopCounterMode(display=False) as counter:
        sample_hard_negatives(*inputs(), uniform=1e-4)
    assert counter.get_total_flops() == 2 * 12 * 17 * 5


@pytest.mark.parametrize(("backend", "dynamic"), [*((name, False) for name in THERE), ("cpp", True)])
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    left_out = torch.arange(12) % 5, torch.arange(17) % 5

    def function(x: Tensor, y: Tensor, scale: Tensor, seed: Tensor | None) -> Tensor:
        columns = sample_hard_negatives(x, y, scale.exp(), 3, own=2, leave_out=left_out, uniform=1e-2, seed=seed)
        return (x[:, None] * y[columns]).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with backends.use(backend):
        x, y, scale = (t.requires_grad_() for t in inputs())
        assert torch.equal(compiled(x, y, scale, SEED), function(x, y, scale, SEED))
        if backend != "reference":  # it takes seconds to trace
            torch.manual_seed(0)
            found = compiled(x, y, scale, None)
            torch.manual_seed(0)
            assert torch.equal(found, function(x, y, scale, None))


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, y, scale = inputs(dtype=dtype)
        scale = scale.to(torch.float64 if dtype == torch.float64 else torch.float32)
        left_out = torch.arange(12) % 5, torch.arange(17) % 5
        for options in ((torch.arange(12) // 2, None, *left_out, 3, 0.1), (None, 3, None, None, 1, 0.0)):
            torch.library.opcheck(torch.ops.vlpfast.sample_hard_negatives, (x, y, scale, *options, SEED))


def test_meta_tensors_take_shape_only() -> None:
    x, y = torch.empty(7, 3, device="meta"), torch.empty(9, 3, device="meta", dtype=torch.bfloat16)
    drawn = sample_hard_negatives(x, y, 1.0, 4, uniform=1e-4)
    assert drawn.shape == (7, 4) and drawn.is_meta and drawn.dtype == torch.int64


@pytest.mark.parametrize("backend", THERE)
def test_nothing_waits_for_a_device(backend: str) -> None:
    """Fake tensors have no values: whatever looked at one would raise."""
    with FakeTensorMode(), backends.use(backend):
        device = torch.device(KERNELS.get(backend, "cpu"))
        x, y, scale, seed = (torch.empty(size, device=device) for size in ((7, 3), (9, 3), (), ()))
        row_ids, column_ids, own = (torch.empty(size, dtype=torch.int64, device=device) for size in (7, 9, 7))
        drawn = sample_hard_negatives(x, y, scale, 4, own=own, leave_out=(row_ids, column_ids), uniform=1e-4, seed=seed.long())
        assert drawn.shape == (7, 4) and drawn.device.type == device.type and drawn.dtype == torch.int64
        assert sample_hard_negatives(x, y, 3.0).shape == (7, 1)


WRONG = {
    "x: expected a tensor, got list": (TypeError, {"x": [[1.0]]}),
    "x: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"x": torch.ones(4, 3).long()}),
    "y: expected width 3 as x has, got 4": (ValueError, {"y": torch.ones(6, 4)}),
    "scale: expected a finite number >= 0, got -1.0": (ValueError, {"scale": -1.0}),
    "count: expected an int, got float": (TypeError, {"count": 1.0}),
    "count: expected >= 1, got 0": (ValueError, {"count": 0}),
    "count: expected at most N = 6, the rows of y, got 7": (ValueError, {"count": 7}),
    r"own: expected an offset in \[0, N - M\] with M = 4 rows of x and N = 6 rows of y, got 3": (ValueError, {"own": 3}),
    r"own: expected columns in \[0, 6\), got 0 to 6": (ValueError, {"own": torch.tensor([0, 1, 2, 6])}),
    "leave_out: expected a pair": (TypeError, {"leave_out": torch.arange(4)}),
    r"leave_out\[1\]: expected a vector of length 6": (ValueError, {"leave_out": (torch.arange(4), torch.arange(4))}),
    "uniform: expected a float, got Tensor": (TypeError, {"uniform": torch.ones(())}),
    "uniform: expected a finite number >= 0, got -0.1": (ValueError, {"uniform": -0.1}),
    "uniform: expected a finite number >= 0, got nan": (ValueError, {"uniform": math.nan}),
    "seed: expected a tensor, got int": (TypeError, {"seed": 3}),
    "seed: expected torch.int64, got torch.int32": (TypeError, {"seed": torch.tensor(3, dtype=torch.int32)}),
    "seed: expected a 0-d tensor, got 1 dimensions": (ValueError, {"seed": torch.tensor([3])}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        sample_hard_negatives(**({"x": torch.ones(4, 3), "y": torch.ones(6, 3), "scale": 1.0} | wrong))


def test_the_kernel_checks_what_only_it_can_see() -> None:
    x, y, scale = torch.ones(4, 3), torch.ones(6, 3), torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="got 8589934592"):  # would be 0 if the offset were read as an int32
        torch.ops.vlpfast.sample_hard_negatives(x, y, scale, None, 2**33, None, None, 1, 0.0, SEED)
    with pytest.raises(RuntimeError, match=r"expected columns in \[0, 6\), got 7"):
        torch.ops.vlpfast.sample_hard_negatives(x, y, scale, torch.tensor([0, 1, 1, 7]), None, None, None, 1, 0.0, SEED)
    with pytest.raises(RuntimeError, match="count: expected >= 1, got 0"):
        torch.ops.vlpfast.sample_hard_negatives(x, y, scale, None, 0, None, None, 0, 0.0, SEED)
