"""pair_logsumexp for rows alone, which has a kernel of its own: precision, ranges of columns, stash, threads, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conformance import cone, features, relative_error
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.contrastive import pair_logsumexp
from vlpfast.ops.flops import FlopCounterMode

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")

BUDGETS = [4 << 30, 0]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def problem(
    m: int, n: int, d: int, *, norm: float | Tensor = 1.0, scale: float = 1.0, noise: float | None = None
) -> dict[str, Tensor]:
    """Features of x times `norm`, a scale and a bias for each column, all in float32."""
    both = features(m, n, d, noise=noise)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3))
    return {"x": (both["x"] * norm).float(), "y": both["y"].float(), "scale": torch.tensor(scale), "bias": bias}


def labels(m: int, n: int) -> Tensor:
    """Columns of the rows, some of them twice."""
    return torch.randint(n, (m,), generator=torch.Generator().manual_seed(4))


def run(inputs: dict[str, Tensor], *, backend: str = "cpp", softplus: bool = False, **more) -> list[Tensor]:
    """rows, and the gradients of a weighted sum of them (of softplus of them) by x, y, scale, bias."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    with backends.use(backend):
        rows = pair_logsumexp(**leaves, directions="rows", **more)
    total = F.softplus(rows) if softplus else rows
    total = (total * torch.linspace(0.5, 1.5, len(rows), dtype=rows.dtype)).sum()
    return [rows.detach(), *torch.autograd.grad(total, list(leaves.values()))]


def exactly(inputs: dict[str, Tensor], **more) -> list[Tensor]:
    return run({name: t.double() for name, t in inputs.items()}, backend="reference", **more)


def check_float32(inputs: dict[str, Tensor], budget: int, **more) -> None:
    value, *gradients = run(inputs, stash_bytes=budget, **more)
    exact, *exact_gradients = exactly(inputs, **more)
    assert relative_error(value, exact) <= 1e-6
    for name, found, right in zip(inputs, gradients, exact_gradients, strict=True):
        assert relative_error(found, right) <= 1e-5, name


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", [(50, 3000, 64), (300, 1000, 64)], ids=["few rows", "many rows"])
@pytest.mark.parametrize("norm", [10.0, 100.0, 1e3, 1e4])
def test_logits_of_any_size_are_exact_in_float32(norm: float, shape: tuple[int, int, int], budget: int) -> None:
    inputs = problem(*shape, norm=norm)
    check_float32(inputs, budget, own=labels(*shape[:2]))
    check_float32(inputs, budget, own=None)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("m", [200, 300])
def test_rows_of_wildly_different_norm(m: int, budget: int) -> None:
    inputs = problem(m, 1000, 64, norm=torch.logspace(-3, 4, m, dtype=torch.double)[:, None])
    check_float32(inputs, budget, own=labels(m, 1000))
    found, exact = run(inputs, own=labels(m, 1000))[1], exactly(inputs, own=labels(m, 1000))[1]
    assert ((found - exact).norm(dim=1) <= 1e-5 * exact.norm(dim=1)).all()  # each row of dx by itself


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("n", [2, 127, 1000])
@pytest.mark.parametrize(("noise", "scale"), [(None, 14.3), (None, 100.0), (1.5, 50.0), (0.6, 40.0), (0.2, 70.0)])
def test_single_terms_and_losses_near_zero(n: int, noise: float | None, scale: float, budget: int) -> None:
    inputs = problem(n, n, 64, noise=noise, scale=scale)
    check_float32(inputs, budget)
    loss_gradients = run(inputs, softplus=True, stash_bytes=budget)[1:]
    for found, exact in zip(loss_gradients, exactly(inputs, softplus=True)[1:], strict=True):
        assert relative_error(found, exact) <= 1e-5


def test_a_narrow_cone_is_as_exact_as_dense_float32() -> None:
    """All logits near 100 and none of them a large share: what is left are the roundings of the products."""
    inputs = {name: t.float() for name, t in cone(300, 64).items()} | {"bias": torch.zeros(300)}
    for found, dense, exact in zip(run(inputs), run(inputs, backend="reference"), exactly(inputs), strict=True):
        assert relative_error(found, exact) <= max(1e-5, relative_error(dense, exact))


@pytest.mark.parametrize("shape", [(3, 1100, 5), (256, 530, 7), (257, 1030, 7), (2100, 300, 4), (1, 5, 3), (37, 11, 5)])
def test_float64_over_several_ranges_and_tiles(shape: tuple[int, int, int]) -> None:
    m, n, _ = shape
    inputs = {name: t.double() for name, t in problem(*shape, scale=20.0).items()}
    ids = labels(m, 7), labels(n, 9)
    for more in ({"own": labels(m, n)}, {"own": None, "leave_out": ids}):
        for budget in (4 << 30, 0, m * n * 8 // 2):
            for found, exact in zip(run(inputs, stash_bytes=budget, **more), exactly(inputs, **more), strict=True):
                torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)


# --- what stays out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", [(7, 700, 6), (300, 90, 6)])
def test_columns_with_a_bias_of_minus_infinity_are_not_there(shape: tuple[int, int, int], budget: int) -> None:
    inputs = problem(*shape, norm=30.0)
    there = torch.arange(shape[1]) % 3 != 1
    inputs["bias"][~there] = -torch.inf
    inputs["bias"][100:400] = -torch.inf  # a whole range of the columns
    there &= inputs["bias"].isfinite()
    value, dx, dy, dscale, dbias = run(inputs, own=None, stash_bytes=budget)
    cut = inputs | {"y": inputs["y"][there], "bias": inputs["bias"][there]}
    for found, exact in zip((value, dx, dy[there], dscale, dbias[there]), exactly(cut, own=None), strict=True):
        assert relative_error(found, exact) <= 1e-5
    assert not dy[~there].any() and not dbias[~there].any()
    inputs["bias"].fill_(-torch.inf)
    nothing, *gradients = run(inputs, own=None, stash_bytes=budget)
    assert (nothing == -torch.inf).all() and not any(g.any() for g in gradients)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", [(7, 700, 6), (300, 90, 6)])
def test_everything_left_out(shape: tuple[int, int, int], budget: int) -> None:
    m, n, _ = shape
    inputs = problem(*shape, norm=30.0)
    everything = torch.zeros(m, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    value, *gradients = run(inputs, own=None, leave_out=everything, stash_bytes=budget)
    assert (value == -torch.inf).all() and not any(g.any() for g in gradients)
    some = torch.arange(m) % 2, everything[1]  # every second row has nothing left
    value, dx, dy, dscale, dbias = run(inputs, own=None, leave_out=some, stash_bytes=budget)
    exact, *_ = exactly(inputs | {"x": inputs["x"][1::2]}, own=None)
    assert (value[::2] == -torch.inf).all() and relative_error(value[1::2], exact) <= 1e-6
    assert not dx[::2].any() and dx[1::2].any(1).all() and dy.any() and dscale.isfinite() and dbias.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "y", "scale", "bias"])
@pytest.mark.parametrize("shape", [(7, 700, 6), (300, 90, 6)])
def test_numbers_that_are_none_reach_the_result(shape: tuple[int, int, int], where: str, value: float) -> None:
    inputs = problem(*shape)
    inputs["x"][0, 0] = 0.5  # the first row's logit beside an infinite y is not -inf
    inputs[where].view(-1)[0] = value
    for budget in BUDGETS:
        rows, dx, dy, *_ = run(inputs, own=labels(*shape[:2]), stash_bytes=budget)
        assert not rows[0].isfinite() and not dx[0].isfinite().any() and not dy.isfinite().all()
        if where == "x":  # in the other rows all is well
            assert rows[1:].isfinite().all() and dx[1:].isfinite().all()


# --- stash, threads, memory, products ---------------------------------------------------------------------------------


def raw_forward(inputs: dict[str, Tensor], own: Tensor | None, keep: int) -> tuple[Tensor, ...]:
    return torch.ops.vlpfast.pair_fwd(*inputs.values(), own, None, None, None, True, False, keep)


def test_the_stash_holds_logits_and_the_sums_are_relative_to_the_largest() -> None:
    inputs = problem(5, 700, 8, norm=200.0)
    own, inputs["bias"][40] = labels(5, 700), -torch.inf
    x, y, _, bias = (t.double() for t in inputs.values())
    logits = (x @ y.T + bias).index_put((torch.arange(5), own), torch.tensor(-torch.inf, dtype=torch.double))
    rows, columns, (sums, shifts), column_stats, exact, stash = raw_forward(inputs, own, 5 * 700)
    tiles = [logits[:, :240], logits[:, 240:480], logits[:, 480:]]  # three ranges of columns, one tile each
    torch.testing.assert_close(stash.double(), torch.cat([t.flatten() for t in tiles]), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(shifts.double(), logits.amax(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.double().log() + shifts.double(), logits.logsumexp(1), rtol=1e-7, atol=0)
    assert exact and columns.numel() == 0 and not column_stats.any()
    part = raw_forward(inputs, own, 5 * 500)  # two tiles and a rest that is too small
    assert torch.equal(part[-1][: 5 * 480], stash[: 5 * 480]) and not part[-1][5 * 480 :].any()
    assert all(
        torch.equal(a, b)
        for a, b in zip(part[:-1], (rows, columns, torch.stack([sums, shifts]), column_stats, exact), strict=True)
    )


# in float32 the forward's sums, which refine more terms than the backward, meet products of another layout
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("shape", [(3, 3, 2), (40, 5000, 5), (2100, 2100, 4)])
def test_stash_and_recomputation_agree(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    m, n, _ = shape
    inputs = problem(*shape, norm=40.0)
    inputs |= {name: inputs[name].to(dtype) for name in ("x", "y")}
    recomputed = run(inputs, own=labels(m, n), stash_bytes=0)
    for budget in (4 << 30, m * n * 4 // 2):  # everything, and the tiles that fit
        for kept, again in zip(run(inputs, own=labels(m, n), stash_bytes=budget), recomputed, strict=True):
            assert relative_error(kept, again) <= tolerance


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 30011, 24), (3, 5000, 33), (17, 300, 65), (200, 9001, 16), (256, 700, 9), (300, 3001, 9)])
def test_two_threads_give_the_bits_of_one(
    shape: tuple[int, int, int], dtype: torch.dtype, budget: int, two_threads: None
) -> None:
    inputs = problem(*shape, norm=20.0)
    inputs |= {name: inputs[name].to(dtype) for name in ("x", "y")}
    own = labels(*shape[:2])
    on_two = run(inputs, own=own, stash_bytes=budget)
    torch.set_num_threads(1)
    for one, two in zip(run(inputs, own=own, stash_bytes=budget), on_two, strict=True):
        assert torch.equal(one, two)


def test_memory_without_a_stash_does_not_grow_with_the_matrix() -> None:
    script = """
import resource, torch
from vlpfast.ops.contrastive import pair_logsumexp
torch.set_num_threads(1)
def step(m, n):
    x, y = (torch.randn(size, 8).requires_grad_() for size in (m, n))
    pair_logsumexp(x, y, 1.0, own=torch.arange(m), directions="rows", stash_bytes=0).sum().backward()
step(2048, 2048)
step(200, 4096)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(4096, 8192)
step(200, 65536)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(out) < 16  # MiB; the matrices have 128 and 50


@pytest.mark.parametrize(("budget", "products"), [(4 << 30, 3), (0, 4)])
def test_three_products_with_the_stash_four_without(budget: int, products: int) -> None:
    inputs = problem(12, 700, 5, norm=1e3)
    with FlopCounterMode(display=False) as counter:
        run(inputs, stash_bytes=budget)
    assert counter.get_total_flops() == products * 2 * 12 * 700 * 5


# --- among torch's own machinery --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 2), (1, 3)])
@pytest.mark.parametrize("shape", [(12, 700, 5), (300, 90, 5)])
def test_gradients_of_some_inputs_alone(shape: tuple[int, int, int], wanted: tuple[int, ...], budget: int) -> None:
    inputs = list(problem(*shape, norm=5.0).values())

    def gradients(of: tuple[int, ...]) -> list[Tensor | None]:
        x, y, scale, bias = leaves = [t.clone().requires_grad_(i in of) for i, t in enumerate(inputs)]
        pair_logsumexp(
            x, y, scale, bias=bias, own=labels(*shape[:2]), directions="rows", stash_bytes=budget
        ).square().sum().backward()
        return [t.grad for t in leaves]

    for i, (some, all_of_them) in enumerate(zip(gradients(wanted), gradients((0, 1, 2, 3)), strict=True)):
        assert (some is not None) == (i in wanted)
        if some is not None:
            torch.testing.assert_close(some, all_of_them, rtol=2e-6, atol=0)  # dscale is summed over x's or over y's rows


def test_gradients_by_finite_differences_over_two_ranges() -> None:
    inputs = {name: t.double() for name, t in problem(3, 400, 2, norm=2.0).items()}
    ids = torch.arange(3), torch.arange(400) % 5
    for budget in BUDGETS:
        assert torch.autograd.gradcheck(
            lambda x, y, scale, bias, budget=budget: pair_logsumexp(
                x, y, scale, bias=bias, own=labels(3, 400), leave_out=ids, directions="rows", stash_bytes=budget
            ),
            [t.requires_grad_() for t in inputs.values()],
            fast_mode=True,
        )


def test_func_grad_compilation_and_autocast() -> None:
    torch._dynamo.reset()
    inputs = tuple(problem(5, 700, 6, norm=9.0).values())

    def total(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return pair_logsumexp(x, y, scale, bias=bias, own=3, directions="rows").square().sum()

    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(total(*leaves), leaves)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for found in (
        torch.func.grad(total, argnums=(0, 1, 2, 3))(*inputs),
        torch.autograd.grad(compiled(*leaves), leaves),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        cast = total(*leaves)
    by_hand = total(leaves[0].bfloat16(), leaves[1].bfloat16(), *leaves[2:])
    assert torch.equal(cast, by_hand)
    for a, b in zip(torch.autograd.grad(cast, leaves), torch.autograd.grad(by_hand, leaves), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("keep", [1 << 30, 5000, 0])
def test_opcheck(keep: int) -> None:
    inputs = problem(12, 700, 5)
    arguments = (*inputs.values(), labels(12, 700), None, labels(12, 7), labels(700, 7), True, False, keep)
    torch.library.opcheck(torch.ops.vlpfast.pair_fwd, arguments)
    rows, cols, *saved = torch.ops.vlpfast.pair_fwd(*arguments)
    for needed in ((True, True, True, True), (False, True, False, False)):
        torch.library.opcheck(torch.ops.vlpfast.pair_bwd, (torch.ones_like(rows), cols, *arguments[:-1], *saved, *needed))
