"""What the conformance table cannot say about pair_softplus and sigmoid_loss: precision, torch's machinery, threads, memory."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conformance import cone, duplicates, features, ids, pairs, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlpfast.ops import backends
from vlpfast.ops.contrastive import pair_softplus, sigmoid_loss
from vlpfast.ops.contrastive.softplus import PairSoftplus
from vlpfast.ops.flops import FlopCounterMode

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def dense_sigmoid_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's formulation: labels 1 on the diagonal, -1 elsewhere."""
    labels = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -F.logsigmoid(labels * (scale * x @ y.T + bias)).sum() / len(x)


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def inputs(m: int = 12, n: int = 12, d: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    both = features(m, n, d)
    numbers = both["x"], both["y"], torch.tensor(10.0), torch.tensor(-3.0)
    return tuple(t.to(dtype).requires_grad_() for t in numbers)  # type: ignore[return-value]


# --- the definition, precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("n", [1, 2, 50])
def test_sigmoid_loss_is_the_published_formula(n: int, backend: str) -> None:
    leaves = inputs(n, n, 9, torch.float64)
    with backends.use(backend):
        found = value_and_gradients(sigmoid_loss, *leaves)
    for ours, dense in zip(found, value_and_gradients(dense_sigmoid_loss, *leaves), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-14)


def test_every_part_of_the_sum_by_hand() -> None:
    """Two rows with one own column, which row 0's id leaves out (it counts all the same), as it does column 2 of row 0."""
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0], [-4.0]])
    found = pair_softplus(
        x, y, 0.5, own=torch.tensor([1, 1]), leave_out=(torch.tensor([7, 8]), torch.tensor([1, 7, 7])),
        bias=torch.tensor([0.1, 0.2, 0.3]), negative_weight=0.25,
    )  # fmt: skip

    def softplus(t: float) -> float:
        return math.log1p(math.exp(t))

    positives = softplus(-2.7) + softplus(-5.2)  # logits 1.6 2.7 -1.7 and 3.1 5.2 -3.7
    assert found.item() == pytest.approx(positives + 0.25 * (softplus(1.6) + softplus(3.1) + softplus(-3.7)), rel=1e-6)


REGIMES = {
    "initial scale and bias": lambda: pairs(300, 300, 64, scale=10.0, bias=torch.tensor(-10.0)),
    "all logits -10.3": lambda: pairs(300, 1024, 64, scale=0.0, bias=torch.tensor(-10.3)),
    "initial cone": lambda: cone(300, 64) | {"bias": torch.tensor(-10.0)},
    "late in training": lambda: pairs(300, 300, 512, noise=0.3, scale=112.0, bias=torch.tensor(-16.5)),
    "scale 100, bias -10": lambda: pairs(300, 300, 512, noise=0.2, scale=100.0, bias=torch.tensor(-10.0)),
    "near-zero loss": lambda: pairs(300, 300, 512, noise=0.2, scale=100.0, bias=torch.tensor(-50.0)),  # 8e-16
    "negatives at bias -80": lambda: pairs(100, 100, 512, scale=2.0, bias=torch.tensor(-80.0), own=None),  # 1e-33
    "near-duplicates": lambda: duplicates(300, 64) | {"bias": torch.tensor(-90.0)},
}


@pytest.mark.parametrize("regime", REGIMES)
def test_precision_in_float32(regime: str) -> None:
    arguments = REGIMES[regime]()
    own = arguments.pop("own", 0)
    numbers = [arguments[name].float() for name in ("x", "y", "scale", "bias")]

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(x, y, scale, bias, own=own)

    with backends.use("reference"):
        expected = value_and_gradients(loss, *[t.double() for t in numbers])
    value = 3e-6 if regime == "near-zero loss" else 1e-6  # its few largest logits, near -40, are rounded at 2e-6
    bounds = (value, 1e-5, 1e-5, 1e-5, 1e-5)
    for found, exact, bound in zip(value_and_gradients(loss, *numbers), expected, bounds, strict=True):
        assert relative_error(found, exact) < bound


def test_own_pairs_keep_their_digits() -> None:
    """The losses of own pairs alone: no negative, logits up to 88, in float32 and far above the precision of half products."""
    x = torch.linspace(1, 9.4, 50)[:, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers = [x.to(dtype), x.to(dtype), torch.tensor(1.0), torch.tensor(0.0)]

        def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return pair_softplus(x, y, scale, bias=bias, negative_weight=0)

        with backends.use("reference"):
            expected = value_and_gradients(loss, *[t.double() for t in numbers])
        for i, (found, exact) in enumerate(zip(value_and_gradients(loss, *numbers), expected, strict=True)):
            assert relative_error(found, exact) < (4e-3 if i in (1, 2) and dtype != torch.float32 else 2e-7)


def elements(s: Tensor) -> tuple[Tensor, Tensor]:
    """softplus and sigmoid of every element, in double, as the kernel makes them in a row of 17: 16 lanes and one beside them."""
    one, need_bias = torch.ones(1, 1, dtype=s.dtype), (False, False, False, True)
    results = [
        torch.ops.vlpfast.pair_softplus(one, logit.expand(17, 1), one[0, 0], None, None, None, None, None, 1.0, *need_bias)
        for logit in s
    ]
    slopes = torch.stack([dbias for *_, dbias in results]).double()
    return torch.stack([loss for loss, *_ in results]).double() / 17, slopes


def test_the_elementary_functions() -> None:
    s = torch.cat([torch.linspace(-87, 90, 3001), torch.linspace(-1, 1, 501), -torch.logspace(-30, 0, 31)])
    exact = s.double()
    for dtype, bound in ((torch.float32, 6 * 2**-24), (torch.float64, 1e-15)):
        values, slopes = elements(s.to(dtype))
        assert ((values / -F.logsigmoid(-exact) - 1).abs() < bound).all()
        assert ((slopes / exact.sigmoid()[:, None] - 1).abs() < bound).all()
    values, slopes = elements(torch.tensor([-87.4, -88.0, -150.0, -1e4, -3e38, -math.inf, 1e37]))
    assert torch.equal(values[:6], torch.zeros(6, dtype=torch.float64)) and values[6] == pytest.approx(1e37)
    assert slopes[:, 0].tolist() == slopes[:, 16].tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.double, requires_grad=True) for shape in ((6, 5), (9, 5), (9,))
    )
    scale = torch.tensor(2.0, dtype=torch.double, requires_grad=True)
    left_out = torch.arange(6) % 3, torch.arange(9) % 3
    for more in ({}, {"own": 2}, {"own": None}, {"own": torch.tensor([5, 0, 1, 5, 5, 3])}, {"negative_weight": 0.3}):
        for last in (bias, bias[0].detach().requires_grad_()):

            def function(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, more=more) -> Tensor:
                return pair_softplus(x, y, scale, leave_out=left_out, bias=bias, **more)

            assert torch.autograd.gradcheck(function, (x, y, scale, last))
    assert torch.autograd.gradcheck(lambda *a: pair_softplus(*a), (x, y, scale))


@pytest.mark.parametrize("weight", [1e-30, 1e30])
def test_small_and_large_weights_of_negatives(weight: float) -> None:
    """Without subnormal numbers: sigmoids of 1e-33 beside small features stay in float32's range."""
    both = features(30, 40, 16)
    numbers = [both["x"].float(), 1e-3 * both["y"].float(), torch.tensor(1.0), torch.tensor(-76.0)]

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return pair_softplus(x, y, scale, bias=bias, negative_weight=weight)

    with backends.use("reference"):
        expected = value_and_gradients(loss, *[t.double() for t in numbers])
    assert torch.set_flush_denormal(True)
    try:
        found = value_and_gradients(loss, *numbers)
    finally:
        torch.set_flush_denormal(False)
    for ours, exact in zip(found, expected, strict=True):
        assert relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize("factor", [2.0**-16, 2.0**16])
def test_float16_gradients_are_rounded_after_the_incoming_gradient(factor: float) -> None:
    """The sum's own gradients are above float16's range (or far below: then a loss scaler is at work)."""
    both = features(40, 40, 16)
    lift = 30.0 if factor < 1 else -19.0
    numbers = [(1e4 if factor < 1 else 1.0) * both["x"], both["y"]]
    numbers = [t.half() for t in numbers] + [torch.tensor(10.0 if factor < 1 else 1.0), torch.tensor(lift)]

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return factor * pair_softplus(x, y, scale, bias=bias, own=None)

    with backends.use("reference"):
        expected = value_and_gradients(loss, *[t.double() for t in numbers])
    assert (expected[2] / factor).abs().max() > 65504 if factor < 1 else (expected[2] / factor).abs().max() < 2.0**-24
    for found, exact in zip(value_and_gradients(loss, *numbers), expected, strict=True):
        assert relative_error(found, exact) < 2e-3


# --- threads, tiles, memory -------------------------------------------------------------------------------------------


def test_several_tiles_each_way() -> None:
    both, left_out = features(2100, 2100, 4), ids(2100, 2100, 50)
    numbers = [both["x"].float(), both["y"].float(), torch.tensor(14.3), torch.linspace(-12, -8, 2100)]

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return pair_softplus(x, y, scale, bias=bias, leave_out=left_out)

    with backends.use("reference"):
        expected = value_and_gradients(loss, *[t.double() for t in numbers])
    for found, exact in zip(value_and_gradients(loss, *numbers), expected, strict=True):
        assert relative_error(found, exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1024, 64), (11, 300, 9), (97, 111, 512), (300, 301, 7), (2100, 2100, 8)])
def test_two_threads_give_the_bits_of_one(shape: tuple[int, int, int], dtype: torch.dtype, two_threads: None) -> None:
    m, n, d = shape
    both = features(m, n, d)
    numbers = [both["x"].to(dtype), both["y"].to(dtype), torch.tensor(14.3), torch.linspace(-12, -8, n)]

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(x, y, scale, bias)

    on_two = value_and_gradients(loss, *numbers)
    torch.set_num_threads(1)
    for one, two in zip(value_and_gradients(loss, *numbers), on_two, strict=True):
        assert torch.equal(one, two)


def test_memory_does_not_grow_with_the_matrix() -> None:
    script = """
import resource, torch
from vlpfast.ops.contrastive import sigmoid_loss
torch.set_num_threads(1)
def step(n):
    x, y = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1).requires_grad_() for _ in range(2))
    sigmoid_loss(x, y, 10.0, torch.tensor(-10.0, requires_grad=True)).backward()
step(2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8192)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(out) < 16  # MiB; the matrix has 256


# --- autograd, function transforms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 2), (1, 3), (0, 1, 3)])
def test_gradients_of_some_inputs_alone(wanted: tuple[int, ...], vector: bool) -> None:
    leaves = [t.detach() for t in inputs(12, 17)]
    if vector:
        leaves[3] = torch.linspace(-3, 1, 17)

    def gradients(of: tuple[int, ...]) -> list[Tensor | None]:
        some = [t.clone().requires_grad_(i in of) for i, t in enumerate(leaves)]
        sigmoid_loss(*some).backward()
        return [t.grad for t in some]

    for i, (some, all_of_them) in enumerate(zip(gradients(wanted), gradients((0, 1, 2, 3)), strict=True)):
        assert (some is not None) == (i in wanted)
        if some is not None:
            torch.testing.assert_close(some, all_of_them, rtol=2e-6, atol=0)  # dscale is summed over x's or over y's rows


def test_only_what_is_needed_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = []
    right = PairSoftplus.apply
    monkeypatch.setattr(PairSoftplus, "apply", lambda *arguments: (needed.append(arguments[-4:]), right(*arguments))[1])
    x, y, scale, bias = inputs()
    sigmoid_loss(x, y.detach(), scale, bias)
    sigmoid_loss(x, y, 10.0, None)
    with torch.no_grad():
        sigmoid_loss(x, y, scale, bias)
    torch.func.grad(sigmoid_loss, argnums=1)(x.detach(), y.detach(), scale.detach(), bias.detach())
    assert needed[:3] == [(True, False, True, True), (True, True, False, False), (False, False, False, False)]
    assert set(needed[3:]) == {(False, True, False, False)}  # func.grad applies the function once a level


@pytest.mark.parametrize(("wanted", "products"), [((), 1), ((0,), 2), ((1,), 2), ((2,), 2), ((3,), 1), ((1, 2), 2), ((0, 1), 3)])
def test_one_product_and_one_for_each_gradient(wanted: tuple[int, ...], products: int) -> None:
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs(12, 17))]
    with FlopCounterMode(display=False) as counter:
        loss = sigmoid_loss(*leaves)
        if wanted:
            loss.backward()
    assert counter.get_total_flops() == products * 2 * 12 * 17 * 5


def test_backward_twice() -> None:
    leaves = inputs()
    loss = sigmoid_loss(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(3 * a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool) -> None:
    leaves = inputs()
    plain = torch.autograd.grad(sigmoid_loss(*leaves), leaves)
    checkpoint(sigmoid_loss, *leaves, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, leaves, strict=True))


def test_inference_mode() -> None:
    leaves = inputs()
    expected = sigmoid_loss(*leaves)
    with torch.inference_mode():
        loss = sigmoid_loss(*leaves)
    assert loss.is_inference() and torch.equal(loss, expected)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autocast_casts_features_alone(backend: str) -> None:
    x, y, _, _ = inputs()
    scale, bias = torch.tensor(10.003, requires_grad=True), torch.linspace(-3, 1.003, 12, requires_grad=True)
    with backends.use(backend):
        expected = sigmoid_loss(x.bfloat16(), y.bfloat16(), scale, bias)
        with torch.autocast("cpu", torch.bfloat16):
            found = sigmoid_loss(x, y, scale, bias)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        leaves = (x, y, scale, bias)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b)
        doubles = [t.double() for t in leaves]
        with torch.autocast("cpu", torch.bfloat16):
            in_autocast = sigmoid_loss(*doubles)
        assert in_autocast.dtype == torch.float64 and torch.equal(in_autocast, sigmoid_loss(*doubles))


def test_func_grad() -> None:
    leaves = inputs()
    expected = torch.autograd.grad(sigmoid_loss(*leaves), leaves)
    found = torch.func.grad(sigmoid_loss, argnums=(0, 1, 2, 3))(*[t.detach() for t in leaves])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_func_jacrev() -> None:
    x, y, scale, bias = (t.detach() for t in inputs(4, 6, 3, torch.float64))

    def losses(x: Tensor) -> Tensor:
        return torch.stack([sigmoid_loss(x, y, scale, bias), sigmoid_loss(x, y, scale, bias, own=2)])

    with backends.use("reference"):
        expected = torch.func.jacrev(losses)(x)
    torch.testing.assert_close(torch.func.jacrev(losses)(x), expected)


def test_what_the_kernel_cannot_differentiate_is_refused() -> None:
    x, *rest = inputs()
    rest = [t.detach() for t in rest]

    def loss(x: Tensor) -> Tensor:
        return sigmoid_loss(x, *rest)

    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are made by the reference backend alone"):
        (gradient.sum() + x.sum()).backward()
    with pytest.raises(NotImplementedError, match="second derivatives are made by the reference backend alone"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x.detach())
    with pytest.raises(NotImplementedError, match="under vmap are made by the reference backend alone"):
        torch.func.vmap(loss)(x.detach().expand(2, -1, -1))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (x.detach(),), (x.detach(),))


def test_second_derivatives_of_the_reference() -> None:
    with backends.use("reference"):
        leaves = inputs(4, 6, 3, torch.float64)
        left_out = torch.arange(4) % 3, torch.arange(6) % 3
        assert torch.autograd.gradgradcheck(lambda *a: sigmoid_loss(*a, own=1, leave_out=left_out), leaves)


# --- compilation, registration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    leaves = inputs(12, 17)
    left_out = torch.arange(12) % 5, torch.arange(17) % 5
    own = torch.arange(12) // 2

    def function(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        x, y = F.normalize(x + 0.1, dim=1), F.normalize(y + 0.1, dim=1)
        weighted = pair_softplus(x, y, scale.exp() / 1e3, own=own, leave_out=left_out, negative_weight=0.5)
        return weighted.square() + sigmoid_loss(x, y, scale, bias, own=2)

    with backends.use(backend):
        expected = function(*leaves)
        found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*leaves)
        assert torch.equal(found, expected)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            assert torch.equal(a, b)


def test_compiles_under_autocast_and_for_several_sizes() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def function(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sigmoid_loss(x, y, scale, bias)

    for n in (5, 9, 30):
        x, y, scale, bias = inputs(n, n)
        expected = torch.autograd.grad(sigmoid_loss(x.bfloat16(), y.bfloat16(), scale, bias), (x, y, scale, bias))
        function(x, y, scale, bias).backward()
        assert all(torch.equal(t.grad, e) for t, e in zip((x, y, scale, bias), expected, strict=True))


def test_opcheck() -> None:
    x, y, _, _ = (t.detach() for t in inputs(12, 17))
    left_out = torch.arange(12) % 5, torch.arange(17) % 5
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scale = torch.tensor(10.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        half = (x.to(dtype), y.to(dtype), scale)
        for options in (
            (torch.linspace(-1, 1, 17).to(scale.dtype), torch.arange(12) // 2, None, *left_out, 0.5, True, True, True, True),
            (None, None, 3, None, None, 1.0, False, True, True, False),
            (scale, None, None, None, None, 1.0, False, False, False, True),
        ):
            torch.library.opcheck(torch.ops.vlpfast.pair_softplus, (*half, *options))


def test_meta_tensors_take_shape_only() -> None:
    x = torch.empty(7, 3, device="meta", requires_grad=True)
    y = torch.empty(9, 3, device="meta", dtype=torch.bfloat16)
    loss = sigmoid_loss(x, y, 1.0, torch.empty(9, device="meta"))
    assert loss.shape == () and loss.is_meta and loss.dtype == torch.float32
    found = torch.ops.vlpfast.pair_softplus(
        x.detach().bfloat16(), y, torch.empty((), device="meta"), None, None, 0, None, None, 1.0, True, False, True, True
    )
    assert [t.shape for t in found] == [(), (7, 3), (0, 3), (1,), (9,)] and {t.dtype for t in found} == {torch.float32}


# --- bad numbers, wrong arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["x", "y", "scale", "bias"])
def test_numbers_that_are_none_reach_the_result(where: str) -> None:
    for own in (0, None):
        arguments = pairs(20, 30, 6) | {"bias": torch.zeros(30)}
        arguments = {name: t.float() for name, t in arguments.items()}
        arguments[where].view(-1)[0] = float("nan")
        leaves = {name: t.requires_grad_() for name, t in arguments.items()}
        loss = pair_softplus(**leaves, own=own)
        assert loss.isnan()
        loss.backward()
        assert leaves["x"].grad.sum().isnan() and leaves["y"].grad.sum().isnan()


WRONG = {
    "x: expected a tensor, got list": (TypeError, {"x": [[1.0]]}),
    "y: expected width 3 as x has, got 4": (ValueError, {"y": torch.ones(6, 4)}),
    "scale: expected a float or a 0-d tensor, got str": (TypeError, {"scale": "1"}),
    r"own: expected an offset in \[0, N - M\] with M = 4 rows of x and N = 6 rows of y, got 3": (ValueError, {"own": 3}),
    r"own: expected columns in \[0, 6\), got 0 to 6": (ValueError, {"own": torch.tensor([0, 1, 2, 6])}),
    "leave_out: expected a pair": (TypeError, {"leave_out": torch.arange(4)}),
    "bias: expected a vector of length 6": (ValueError, {"bias": torch.ones(4)}),
    "negative_weight: expected a float or None, got Tensor": (TypeError, {"negative_weight": torch.ones(())}),
    "negative_weight: expected a float or None, got bool": (TypeError, {"negative_weight": True}),
    "negative_weight: expected a finite number >= 0, got -0.5": (ValueError, {"negative_weight": -0.5}),
    "negative_weight: expected a finite number >= 0, got nan": (ValueError, {"negative_weight": float("nan")}),
    "negative_weight: expected a finite number >= 0, got inf": (ValueError, {"negative_weight": math.inf}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        pair_softplus(**({"x": torch.ones(4, 3), "y": torch.ones(6, 3), "scale": 1.0} | wrong))


def test_no_pair_is_loss_zero_with_zero_gradients() -> None:
    for m, n, own in ((0, 0, 0), (0, 5, 0), (5, 0, None)):
        leaves = [t.detach().requires_grad_() for t in inputs(m, n)]
        loss = sigmoid_loss(*leaves, own=own)
        loss.backward()
        assert loss.item() == 0 and all(t.grad.shape == t.shape and not t.grad.any() for t in leaves)


def test_two_dtypes_meet_in_the_wider() -> None:
    both = pairs(8, 9, 4)
    for first, second, wide in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ):
        x, y = both["x"].to(first).requires_grad_(), both["y"].to(second)
        loss = pair_softplus(x, y, both["scale"])
        assert loss.dtype == wide and torch.equal(loss, pair_softplus(x.to(wide), y.to(wide), both["scale"]))
        loss.backward()
        assert x.grad.dtype == first


def test_the_kernel_checks_what_only_it_can_see() -> None:
    """Compiled code skips the checks of values: an index out of range must not become a write out of range."""
    x, y, scale = torch.ones(4, 3), torch.ones(6, 3), torch.tensor(1.0)
    rest = (None, None, 1.0, True, True, True, True)
    with pytest.raises(RuntimeError, match="got 8589934592"):  # would be 0 if the offset were read as an int32
        torch.ops.vlpfast.pair_softplus(x, y, scale, None, None, 2**33, *rest)
    with pytest.raises(RuntimeError, match=r"expected columns in \[0, 6\), got 7"):
        torch.ops.vlpfast.pair_softplus(x, y, scale, None, torch.tensor([0, 1, 1, 7]), None, *rest)
