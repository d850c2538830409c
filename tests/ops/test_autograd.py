"""pair_logsumexp among torch's own machinery: autograd, func, compile, autocast, checkpointing, operator checks, FLOP counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conformance import features
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from vlpfast.ops import backends
from vlpfast.ops.contrastive import clip_loss, pair_logsumexp
from vlpfast.ops.flops import FlopCounterMode

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")


def inputs(m: int = 12, n: int = 12, d: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    both = features(m, n, d)
    return tuple(t.to(dtype).requires_grad_() for t in (both["x"], both["y"], torch.tensor(10.0)))  # type: ignore[return-value]


def weighted(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, cols = pair_logsumexp(x, y, scale, bias=bias)
    return rows.square().sum() + F.softplus(cols).sum()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 2), (1, 3), (0, 1, 3)])
@pytest.mark.parametrize("budget", [0, 4 << 30])
def test_gradients_of_some_inputs_alone(wanted: tuple[int, ...], budget: int) -> None:
    leaves = [t.detach() for t in (*inputs(12, 17), torch.linspace(-1, 1, 17))]

    def gradients(of: tuple[int, ...]) -> list[Tensor | None]:
        own = [t.clone().requires_grad_(i in of) for i, t in enumerate(leaves)]
        rows, cols = pair_logsumexp(*own[:3], bias=own[3], stash_bytes=budget)
        (rows.square().sum() + cols.square().sum()).backward()
        return [t.grad for t in own]

    for i, (some, all_of_them) in enumerate(zip(gradients(wanted), gradients((0, 1, 2, 3)), strict=True)):
        assert (some is not None) == (i in wanted)
        if some is not None:
            torch.testing.assert_close(some, all_of_them, rtol=2e-6, atol=0)  # dscale is summed over x's or over y's rows


def test_gradient_of_one_direction_of_two() -> None:
    x, y, scale = inputs(12, 17)
    for i, name in enumerate(("rows", "cols")):
        both = torch.autograd.grad(pair_logsumexp(x, y, scale)[i].sum(), (x, y, scale))
        alone = torch.autograd.grad(pair_logsumexp(x, y, scale, directions=name).sum(), (x, y, scale))
        for a, b in zip(both, alone, strict=True):
            torch.testing.assert_close(a, b)


def test_backward_twice() -> None:
    x, y, scale = inputs()
    loss = clip_loss(x, y, scale)
    first = torch.autograd.grad(loss, (x, y, scale), retain_graph=True)
    second = torch.autograd.grad(loss, (x, y, scale))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool) -> None:
    leaves = inputs()
    plain = torch.autograd.grad(clip_loss(*leaves), leaves)
    checkpoint(clip_loss, *leaves, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, leaves, strict=True))


def test_inference_mode() -> None:
    x, y, scale = inputs()
    expected = clip_loss(x, y, scale)
    with torch.inference_mode():
        loss = clip_loss(x, y, scale)
    assert loss.is_inference() and torch.equal(loss, expected)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autocast_casts_features_alone(backend: str) -> None:
    x, y, scale = inputs()
    bias = torch.linspace(-1, 1.003, 12, requires_grad=True)
    with backends.use(backend):
        expected = weighted(x.bfloat16(), y.bfloat16(), scale, bias)
        with torch.autocast("cpu", torch.bfloat16):
            found = weighted(x, y, scale, bias)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        for a, b in zip(
            torch.autograd.grad(found, (x, y, scale, bias)), torch.autograd.grad(expected, (x, y, scale, bias)), strict=True
        ):
            assert a.dtype == torch.float32 and torch.equal(a, b)
        doubles = [t.double() for t in (x, y, scale)]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(clip_loss(*doubles), clip_loss(*doubles)) and clip_loss(*doubles).dtype == torch.float64


# --- function transforms, higher derivatives --------------------------------------------------------------------------


def test_func_grad() -> None:
    leaves = inputs()
    expected = torch.autograd.grad(clip_loss(*leaves), leaves)
    found = torch.func.grad(clip_loss, argnums=(0, 1, 2))(*[t.detach() for t in leaves])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_func_jacrev() -> None:
    x, y, _ = inputs(4, 6, 3, torch.float64)

    def jacobian() -> Tensor:
        return torch.func.jacrev(lambda x: pair_logsumexp(x, y.detach(), 3.0)[0])(x.detach())

    with backends.use("reference"):
        expected = jacobian()
    torch.testing.assert_close(jacobian(), expected)


def test_what_the_kernels_cannot_differentiate_is_refused() -> None:
    x, y, scale = inputs()

    def loss(x: Tensor) -> Tensor:
        return clip_loss(x, y.detach(), scale.detach())

    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are made by the reference backend alone"):
        torch.autograd.grad(gradient.sum(), x)
    with pytest.raises(NotImplementedError, match="second derivatives are made by the reference backend alone"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x.detach())
    with pytest.raises(NotImplementedError, match="under vmap are made by the reference backend alone"):
        torch.func.vmap(loss)(x.detach().expand(2, -1, -1))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (x.detach(),), (x.detach(),))


def test_second_derivatives_of_the_reference() -> None:
    with backends.use("reference"):
        x, y, scale = inputs(4, 6, 3, torch.float64)
        ids = torch.arange(4) % 3, torch.arange(6) % 3
        assert torch.autograd.gradgradcheck(lambda *a: pair_logsumexp(*a, own=1, leave_out=ids), (x, y, scale))


# --- compilation, registration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    x, y, scale = inputs(12, 17)
    bias = torch.linspace(-1, 1, 17, requires_grad=True)
    ids = torch.arange(12) % 5, torch.arange(17) % 5

    def function(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        rows, cols = pair_logsumexp(x, y, scale, own=2, leave_out=ids, bias=bias)
        return rows.sum() + cols.square().sum() + clip_loss(x, y[:12], 10.0)

    with backends.use(backend):
        expected = function(x, y, scale, bias)
        found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x, y, scale, bias)
        assert torch.equal(found, expected)
        leaves = (x, y, scale, bias)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            assert torch.equal(a, b)


def test_compiles_under_autocast_and_for_several_sizes() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def function(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return clip_loss(x, y, 10.0)

    for n in (5, 9, 30):
        x, y, _ = inputs(n, n)
        loss = function(x, y)
        assert torch.equal(loss, clip_loss(x.bfloat16(), y.bfloat16(), 10.0))
        loss.backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("keep", [1 << 30, 100, 0])
def test_opcheck(keep: int) -> None:
    x, y, scale = (t.detach() for t in inputs(12, 17))
    ids = torch.arange(12) % 5, torch.arange(17) % 5
    options = (torch.linspace(-1, 1, 17), torch.randperm(17)[:12], None, *ids)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        half = (x.to(dtype), y.to(dtype), scale.to(torch.float64 if dtype == torch.float64 else torch.float32))
        for arguments in ((*half, *options, True, True, keep), (*half, None, None, 3, None, None, False, True, keep)):
            torch.library.opcheck(torch.ops.vlpfast.pair_fwd, arguments)
            rows, cols, *saved = torch.ops.vlpfast.pair_fwd(*arguments)
            gradients = torch.ones_like(rows), torch.ones_like(cols)
            for needed in ((True, True, True, True), (False, True, False, False)):
                torch.library.opcheck(torch.ops.vlpfast.pair_bwd, (*gradients, *arguments[:-1], *saved, *needed))


def test_meta_tensors_take_shape_only() -> None:
    x = torch.empty(7, 3, device="meta")
    rows, cols = pair_logsumexp(x, torch.empty(9, 3, device="meta"), 1.0)
    assert rows.shape == (7,) and cols.shape == (9,) and rows.is_meta


def test_fake_tensors_have_no_values_to_check() -> None:
    with FakeTensorMode():
        own = torch.zeros(7, dtype=torch.int64)
        rows = pair_logsumexp(torch.empty(7, 3), torch.empty(9, 3), 1.0, own=own, directions="rows")
    assert rows.shape == (7,) and rows.dtype == torch.float32


@pytest.mark.parametrize(("budget", "products"), [(4 << 30, 3), (0, 4)])
def test_three_products_with_the_stash_four_without(budget: int, products: int) -> None:
    x, y, scale = inputs(12, 17)
    with FlopCounterMode(display=False) as counter:
        rows, cols = pair_logsumexp(x, y, scale, stash_bytes=budget)
        (rows.sum() + cols.sum()).backward()
    assert counter.get_total_flops() == products * 2 * 12 * 17 * 5
    with FlopCounterMode(display=False) as counter:
        pair_logsumexp(x, y.detach(), scale.detach(), stash_bytes=budget)[0].sum().backward()
    assert counter.get_total_flops() == (products - 1) * 2 * 12 * 17 * 5
