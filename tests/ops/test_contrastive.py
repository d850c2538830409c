"""What the conformance table cannot say about pair_logsumexp and clip_loss: precision by regime, threads, memory, arguments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conformance import cone, duplicates, features, long_vectors, pairs, relative_error
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.contrastive import clip_loss, pair_logsumexp
from vlpfast.ops.contrastive.autograd import PairLogsumexp

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def dense_clip_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """open_clip's formulation: two matrices of logits, two cross-entropies."""
    labels = torch.arange(len(x))
    return (F.cross_entropy(scale * x @ y.T, labels) + F.cross_entropy(scale * y @ x.T, labels)) / 2


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


# --- precision --------------------------------------------------------------------------------------------------------

REGIMES = {
    "random, scale 14.3": lambda: pairs(300, 300, 64),
    "random, scale 100": lambda: pairs(300, 300, 64, scale=100.0),
    "initial cone": lambda: cone(300, 64),
    "low loss": lambda: pairs(300, 300, 64, noise=0.6, scale=50.0),
    "near-zero loss": lambda: pairs(300, 300, 512, noise=0.2, scale=100.0),
    "near-duplicates": lambda: duplicates(300, 64),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_precision_of_clip_loss_in_float32(regime: str) -> None:
    arguments = REGIMES[regime]()
    inputs = [arguments[name].float() for name in ("x", "y", "scale")]
    with backends.use("reference"):
        expected = value_and_gradients(clip_loss, *[t.double() for t in inputs])
    found, dense = value_and_gradients(clip_loss, *inputs), value_and_gradients(dense_clip_loss, *inputs)
    if regime == "near-duplicates":  # gradients are small differences of large terms for everyone
        for ours, theirs, exact in zip(found[:3], dense[:3], expected[:3], strict=True):
            assert relative_error(ours, exact) <= max(relative_error(theirs, exact), 1e-6)
        terms = expected[0] / inputs[2]  # the size of what cancels in the gradient of the scale
        assert (found[3] - expected[3]).abs() < 1e-6 * terms
    else:
        for ours, exact, bound in zip(found, expected, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
            assert relative_error(ours, exact) < bound


def test_a_loss_of_1e_31_keeps_its_digits() -> None:
    x = torch.eye(40)[:30]
    value, dx, _, dscale = value_and_gradients(clip_loss, x, x, torch.tensor(75.0))
    exact = 29 * torch.tensor(-75.0, dtype=torch.float64).exp()  # log1p(29 exp(-75))
    assert 1e-32 < exact < 1e-31
    assert relative_error(value, exact) < 1e-5
    assert relative_error(dscale, -exact) < 1e-5
    # dL/dx_i = 75 / (2 * 30) * 2 * exp(-75) * (sum of the others - 29 * own)
    expected = 75 / 30 * torch.tensor(-75.0, dtype=torch.float64).exp() * (x.sum(0) - 30 * x)
    assert relative_error(dx, expected) < 1e-5


@pytest.mark.parametrize("size", [1e-33, 1e30])
def test_small_and_large_incoming_gradients(size: float) -> None:
    """Beside sums of 1e35, as narrow cones give at scale 100: no product of the two may leave float32's range."""
    arguments = cone(100, 16)
    inputs = [arguments[name].float() for name in ("x", "y", "scale")]

    def total(x, y, scale):
        rows, cols = pair_logsumexp(x, y, scale)
        return (size * torch.linspace(-1, 2, 100) * (rows + cols)).sum()

    with backends.use("reference"):
        expected = value_and_gradients(total, *[t.double() for t in inputs])
    assert torch.set_flush_denormal(True)
    try:
        found = value_and_gradients(total, *inputs)
    finally:
        torch.set_flush_denormal(False)
    for ours, exact in zip(found[1:], expected[1:], strict=True):
        assert relative_error(ours, exact) < 1e-4


def test_small_sums_do_not_lose_flushed_terms() -> None:
    """The bound on the logits, 100, puts the shift at 21: here exp(-54 - 21) is a number, a thousand exp(-67.6 - 21) are 0."""
    x = torch.tensor([-100.0, -54.0] + [-67.6] * 1000)[:, None]
    cols = pair_logsumexp(x, torch.ones(1, 1), 1.0, own=None, directions="cols")
    assert relative_error(cols.exp(), x.double().logsumexp(0).exp()) < 1e-5


def test_clip_loss_is_the_cross_entropy() -> None:
    inputs = [features(50, 50, 9)["x"], features(50, 50, 9)["y"], torch.tensor(20.0, dtype=torch.float64)]
    for ours, dense in zip(value_and_gradients(clip_loss, *inputs), value_and_gradients(dense_clip_loss, *inputs), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-11, atol=1e-13)


def test_the_exponential_function() -> None:
    """As the stash of the centred form holds it: of one column, none of whose terms is large enough to be made in double."""
    x = torch.linspace(-50, 70, 200001)[:, None]
    _, _, _, stats, exact, stash = torch.ops.vlpfast.pair_fwd(
        x, torch.ones(1, 1), torch.tensor(1.0), None, None, None, None, None, False, True, len(x)
    )
    assert not exact and (stats[1] == 0).all()
    assert ((stash.double() / x[:, 0].double().exp() - 1).abs() < 2**-23).all()  # 1 ulp at worst, 2 at the start of a binade


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.double, requires_grad=True) for shape in ((6, 5), (9, 5), (9,))
    )
    scale = torch.tensor(2.0, dtype=torch.double, requires_grad=True)
    ids = torch.arange(6) % 3, torch.arange(9) % 3
    for more in ({}, {"directions": "rows"}, {"directions": "cols"}, {"own": None}, {"own": torch.tensor([5, 0, 1, 2, 8, 3])}):
        for budget in (0, 4 << 30):

            def function(x, y, scale, bias, more=more, budget=budget):
                return pair_logsumexp(x, y, scale, **({"own": 2} | more), leave_out=ids, bias=bias, stash_bytes=budget)

            assert torch.autograd.gradcheck(function, (x, y, scale, bias))
    with torch.no_grad():
        bias -= 3000  # the exact form: every centred exponential is 0
    assert torch.autograd.gradcheck(
        lambda *a: pair_logsumexp(a[0], a[1], a[2], own=2, leave_out=ids, bias=a[3]), (x, y, scale, bias)
    )


# --- the two forms, threads, memory -----------------------------------------------------------------------------------


def raw_forward(x: Tensor, y: Tensor, scale: Tensor, *, own_offset: int | None = 0, keep: int = 0) -> tuple[Tensor, ...]:
    return torch.ops.vlpfast.pair_fwd(x, y, scale, None, None, own_offset, None, None, True, True, keep)


def test_the_exact_form_is_taken_when_sums_underflow_and_only_then() -> None:
    usual, odd = pairs(40, 40, 16, scale=100.0), long_vectors(40, 16)
    assert not raw_forward(usual["x"].float(), usual["y"].float(), usual["scale"])[4]
    assert raw_forward(odd["x"].float(), odd["y"].float(), odd["scale"])[4]


# in float32 the forward refines a few more terms than the backward, which knows the whole sums
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("shape", [(3, 3, 2), (130, 257, 33), (2100, 2100, 4)])
def test_stash_and_recomputation_agree(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    m, n, d = shape
    both = features(m, n, d)
    inputs = [both["x"].to(dtype), both["y"].to(dtype), torch.tensor(14.3), torch.linspace(-1, 1, n)]

    def total(budget: int):
        return lambda x, y, scale, bias: sum(
            F.softplus(t).sum() for t in pair_logsumexp(x, y, scale, bias=bias, stash_bytes=budget)
        )

    recomputed = value_and_gradients(total(0), *inputs)
    for budget in (4 << 30, m * n * 4 // 2):  # everything, and the tiles that fit
        for kept, again in zip(value_and_gradients(total(budget), *inputs), recomputed, strict=True):
            assert relative_error(kept, again) <= tolerance


@pytest.mark.parametrize("lift", [0.0, -300.0])
def test_several_tiles_each_way(lift: float) -> None:
    """In both forms: a bias far down makes the centred sums underflow."""
    both, scale, bias = features(2100, 2100, 4), torch.tensor(14.3), torch.linspace(-1, 1, 2100) + lift
    inputs = [both["x"].float(), both["y"].float(), scale, bias]

    def total(x, y, scale, bias):
        weights = torch.linspace(0, 1, 2100)
        return sum((F.softplus(t) * weights).mean() for t in pair_logsumexp(x, y, scale, bias=bias))

    exact = torch.ops.vlpfast.pair_fwd(*inputs, None, 0, None, None, True, True, 0)[4]
    assert exact == (lift < 0)
    with backends.use("reference"):
        expected = value_and_gradients(total, *[t.double() for t in inputs])
    for found, right in zip(value_and_gradients(total, *inputs), expected, strict=True):
        assert relative_error(found, right) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 1024, 64), (11, 300, 9), (33, 33, 64), (97, 11, 512), (300, 301, 7), (2100, 2100, 8)]
)
def test_two_threads_give_the_bits_of_one(shape: tuple[int, int, int], dtype: torch.dtype, two_threads: None) -> None:
    m, n, d = shape
    both = features(m, n, d)
    inputs = [both["x"].to(dtype), both["y"].to(dtype), torch.tensor(14.3), torch.linspace(-1, 1, n)]

    def total(x, y, scale, bias):
        return sum(t.square().sum() for t in pair_logsumexp(x, y, scale, own=None, bias=bias, stash_bytes=0))

    on_two = value_and_gradients(total, *inputs)
    torch.set_num_threads(1)
    for one, two in zip(value_and_gradients(total, *inputs), on_two, strict=True):
        assert torch.equal(one, two)


def test_memory_without_a_stash_does_not_grow_with_the_matrix() -> None:
    script = """
import resource, torch
from vlpfast.ops.contrastive import clip_loss
torch.set_num_threads(1)
def step(n):
    x, y = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1).requires_grad_() for _ in range(2))
    clip_loss(x, y, 14.3, stash_bytes=0).backward()
step(2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8192)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(out) < 16  # MiB; the matrix has 256


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    both = features(10, 10, 4)
    x, y = both["x"].float(), both["y"].float().requires_grad_()
    assert max(t.numel() for t in saved_tensors(clip_loss(x, y, 10.0, stash_bytes=400))) == 100
    assert max(t.numel() for t in saved_tensors(clip_loss(x, y, 10.0, stash_bytes=399))) == 99
    assert max(t.numel() for t in saved_tensors(clip_loss(x, y, 10.0, stash_bytes=0))) == 40
    keep = []
    right = PairLogsumexp.apply
    monkeypatch.setattr(PairLogsumexp, "apply", lambda *arguments: (keep.append(arguments[-1]), right(*arguments))[1])
    with torch.no_grad():
        clip_loss(x, y, 10.0)
    clip_loss(x, y.detach(), 10.0)
    clip_loss(x, y, 10.0)
    assert keep == [0, 0, (4 << 30) // 4]


def saved_tensors(loss: Tensor) -> list[Tensor]:
    nodes, found = [loss.grad_fn], []
    while nodes:
        node = nodes.pop()
        found += [t for t in getattr(node, "saved_tensors", ()) if t is not None]
        nodes += [n for n, _ in node.next_functions if n is not None]
    return found


# --- bad numbers, wrong arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "y", "scale", "bias"])
def test_numbers_that_are_none_reach_the_result(where: str, value: float) -> None:
    arguments = pairs(20, 30, 6) | {"bias": torch.zeros(30)}
    arguments = {name: t.float() for name, t in arguments.items()}
    arguments[where].view(-1)[0] = value
    leaves = {name: t.requires_grad_() for name, t in arguments.items()}
    rows, cols = pair_logsumexp(**leaves)
    assert not rows.sum().isfinite() and not cols.sum().isfinite()
    (rows.sum() + cols.sum()).backward()
    assert not leaves["x"].grad.sum().isfinite()


WRONG = {
    "x: expected a tensor, got list": (TypeError, {"x": [[1.0]]}),
    "x: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"x": torch.ones(4, 3, dtype=torch.long)}),
    "y: expected float32, float64, bfloat16 or float16, got torch.complex64": (
        TypeError,
        {"y": torch.ones(6, 3, dtype=torch.complex64)},
    ),
    "y: expected 2 dimensions": (ValueError, {"y": torch.ones(3)}),
    "y: expected width 3 as x has, got 4": (ValueError, {"y": torch.ones(6, 4)}),
    "y: expected device cpu as x has, got meta": (ValueError, {"y": torch.ones(6, 3, device="meta")}),
    "scale: expected a float or a 0-d tensor, got str": (TypeError, {"scale": "1"}),
    "scale: expected a float or a 0-d tensor, got bool": (TypeError, {"scale": True}),
    "scale: expected a finite number >= 0, got -1.0": (ValueError, {"scale": -1.0}),
    "scale: expected a finite number >= 0, got nan": (ValueError, {"scale": float("nan")}),
    "scale: expected a 0-d tensor, got 1 dimensions": (ValueError, {"scale": torch.ones(1)}),
    "scale: expected torch.float32 or .*, got torch.int64": (TypeError, {"scale": torch.tensor(1)}),
    r"own: expected an offset in \[0, N - M\] with M = 4 rows of x and N = 6 rows of y, got 3": (ValueError, {"own": 3}),
    "own: expected an offset in .*, got -1": (ValueError, {"own": -1}),
    "own: expected an int, an int64 tensor or None, got float": (TypeError, {"own": 1.0}),
    "own: expected torch.int64, got torch.int32": (TypeError, {"own": torch.arange(4, dtype=torch.int32)}),
    "own: expected a vector of length 4, got 1 dimensions and 5 elements": (ValueError, {"own": torch.arange(5)}),
    r"own: expected columns in \[0, 6\), got 0 to 6": (ValueError, {"own": torch.tensor([0, 1, 2, 6])}),
    "own: expected every column at most once": (ValueError, {"own": torch.tensor([0, 1, 2, 2])}),
    "leave_out: expected a pair": (TypeError, {"leave_out": torch.arange(4)}),
    r"leave_out\[0\]: expected a vector of length 4": (ValueError, {"leave_out": (torch.arange(5), torch.arange(6))}),
    r"leave_out\[1\]: expected torch.int64": (TypeError, {"leave_out": (torch.arange(4), torch.ones(6))}),
    "bias: expected a tensor, got float": (TypeError, {"bias": 1.0}),
    "bias: expected a vector of length 6": (ValueError, {"bias": torch.ones(4)}),
    "directions: expected 'both', 'rows' or 'cols', got 'columns'": (ValueError, {"directions": "columns"}),
    "stash_bytes: expected an int, got float": (TypeError, {"stash_bytes": 1e9}),
    "stash_bytes: expected >= 0, got -1": (ValueError, {"stash_bytes": -1}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        pair_logsumexp(**({"x": torch.ones(4, 3), "y": torch.ones(6, 3), "scale": 1.0} | wrong))


def test_clip_loss_needs_as_many_rows_on_both_sides() -> None:
    with pytest.raises(ValueError, match="y: expected as many rows as x, 4, got 6"):
        clip_loss(torch.ones(4, 3), torch.ones(6, 3), 1.0)
    with pytest.raises(ValueError, match="y: expected as many rows as x, 6, got 4"):
        clip_loss(torch.ones(6, 3), torch.ones(4, 3), 1.0)


def test_two_dtypes_meet_in_the_wider() -> None:
    both = pairs(8, 9, 4)
    for first, second, wide in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ):
        x, y = both["x"].to(first).requires_grad_(), both["y"].to(second)
        rows, cols = pair_logsumexp(x, y, both["scale"])
        expected, _ = pair_logsumexp(x.to(wide), y.to(wide), both["scale"])
        assert torch.equal(rows, expected) and rows.dtype == cols.dtype == wide
        rows.sum().backward()
        assert x.grad.dtype == first


def test_the_kernel_checks_what_only_it_can_see() -> None:
    """Compiled code skips the checks of values: an index out of range must not become a write out of range."""
    x, y, scale = torch.ones(4, 3), torch.ones(6, 3), torch.tensor(1.0)
    rest = (None, None, True, True, False)
    with pytest.raises(RuntimeError, match="got 8589934592"):  # would be 0 if the offset were read as an int32
        raw_forward(x, y, scale, own_offset=2**33)
    with pytest.raises(RuntimeError, match=r"expected columns in \[0, 6\), got 7"):
        torch.ops.vlpfast.pair_fwd(x, y, scale, None, torch.tensor([0, 1, 2, 7]), None, *rest)
    with pytest.raises(RuntimeError, match="column 2 is the own pair of two rows"):
        torch.ops.vlpfast.pair_fwd(x, y, scale, None, torch.tensor([0, 1, 2, 2]), None, *rest)
    with pytest.raises(RuntimeError, match="differ in width"):
        raw_forward(x, torch.ones(6, 2), scale)


@pytest.mark.parametrize("stash_bytes", [0, 4 << 30])
@pytest.mark.parametrize("n", [2, 3, 127, 1000])
@pytest.mark.parametrize(("noise", "scale"), [(None, 14.3), (None, 100.0), (1.5, 14.3), (1.5, 50.0), (0.6, 40.0)])
def test_float32_is_exact_where_single_terms_dominate(n: int, noise: float | None, scale: float, stash_bytes: int) -> None:
    arguments = features(n, n, 64, noise=noise, seed=n)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        x, y = (arguments[name].float().to(dtype).requires_grad_() for name in ("x", "y"))
        with backends.use(backend):
            loss = clip_loss(x, y, scale, stash_bytes=stash_bytes)
        return [loss.detach(), *torch.autograd.grad(loss, (x, y))]

    loss, *gradients = run("cpp", torch.float32)
    exact_loss, *exact_gradients = run("reference", torch.float64)
    assert relative_error(loss, exact_loss) <= 1e-6
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact) <= 1e-5
