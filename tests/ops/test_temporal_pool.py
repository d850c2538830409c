"""What the conformance table cannot say about pool_tokens: torch's own pools, ties, NaN, indices, threads, gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import OPS, compare, relative_error
from conformance_frames import TIES, frames
from test_temporal_shift import BACKENDS, WITH_TRITON, needs_library, two_threads  # noqa: F401  (two_threads: a fixture)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.temporal import pool_tokens
from vlpfast.ops.temporal.autograd import MaxPool

MODES = ("avg", "max")
Size = tuple[int, int, int]


def torchs(x: Tensor, out: Size, mode: str) -> Tensor:
    """Channels first, and back."""
    pool = F.adaptive_avg_pool3d if mode == "avg" else F.adaptive_max_pool3d
    return pool(x.movedim(-1, 1), out).movedim(1, -1)


def with_gradient(function: Any, x: Tensor, *arguments: Any, **named: Any) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf, *arguments, **named)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64, device=y.device).to(y.dtype).reshape(y.shape)
    return [y.detach(), torch.autograd.grad(y, leaf, weights)[0]]


def on(backend: str, x: Tensor, out: Any, mode: str) -> list[Tensor]:
    with backends.use(backend):
        return [t.cpu() for t in with_gradient(pool_tokens, x.to(backends.device_type(backend)), out, mode)]


# --- the definition ---------------------------------------------------------------------------------------------------

SHAPES: list[tuple[Size, Size]] = [
    ((16, 24, 24), (16, 12, 12)),
    ((5, 7, 9), (3, 2, 4)),
    ((1, 2, 3), (4, 5, 7)),
    ((6, 5, 1), (4, 6, 3)),
    ((4, 4, 4), (1, 1, 1)),
    ((1, 1, 1), (1, 1, 1)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_torchs_adaptive_pools(shape: Size, out: Size, mode: str, backend: str) -> None:
    x = frames(2, *shape, 3)["x"]
    for found, expected in zip(on(backend, x, out, mode), with_gradient(torchs, x, out, mode), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    y, dx = on(backend, x[0].float(), out, mode)  # one clip, float32
    expected = with_gradient(torchs, x[:1], out, mode)
    torch.testing.assert_close(y, expected[0][0].float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, with_gradient(torchs, x[0, None], out, mode)[1][0].float(), rtol=1e-5, atol=1e-6)


@needs_library
@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape, out = ([rng.randint(1, 12) for _ in range(3)] for _ in range(2))
    x = torch.randn(rng.randint(1, 3), *shape, rng.choice([1, 2, 15, 64, 513]), generator=generator)
    if rng.random() < 0.5:
        x = x.round()  # ties
    mode = rng.choice(MODES)
    found, expected = on("cpp", x, out, mode), with_gradient(torchs, x.double(), out, mode)
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", WITH_TRITON)
def test_the_first_of_equals_gets_the_gradient(backend: str, dtype: torch.dtype) -> None:
    x = TIES["x"].to(dtype)
    y, dx = on(backend, x, TIES["out"], "max")
    expected = with_gradient(torchs, x.double(), TIES["out"], "max")
    assert torch.equal(y, expected[0].to(dtype))
    torch.testing.assert_close(dx.double(), expected[1], rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
    below = torch.full((1, 2, 2, 2, 3), -torch.inf, dtype=dtype)
    y, dx = on(backend, below, (1, 1, 1), "max")
    assert (y == -torch.inf).all() and dx.flatten(1, 3)[0, 0].all() and not dx.flatten(1, 3)[0, 1:].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", WITH_TRITON)
def test_nan_and_infinity_reach_their_windows_and_no_others(backend: str, mode: str) -> None:
    x = frames(1, 4, 5, 3, 2)["x"].float()
    x[0, 1, 2, 1, 0], x[0, 3, 4, 2, 1], x[0, 0, 0, 0, 1] = torch.nan, torch.nan, torch.inf
    y, dx = on(backend, x, (2, 2, 2), mode)
    expected = torchs(x.double(), (2, 2, 2), mode).float()
    assert expected.isnan().sum() > 1
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert dx.isfinite().all()
    if mode == "max":
        assert dx[0, 1, 2, 1, 0] > 0 and dx[0, 3, 4, 2, 1] > 0
        won = on(backend, torch.full_like(x, torch.nan), (2, 2, 2), mode)[1][0, ..., 0].nonzero().tolist()
        assert won == [[t, h, w] for t in (0, 2) for h in (0, 2) for w in (0, 1)]  # the first of each window
    grad = torch.full((1, 2, 2, 2, 2), 1.0)
    grad[0, 0, 0, 0, 0] = torch.nan
    leaf = frames(1, 4, 5, 3, 2)["x"].float().to(backends.device_type(backend)).requires_grad_()
    with backends.use(backend):
        (dx,) = torch.autograd.grad(pool_tokens(leaf, (2, 2, 2), mode), leaf, grad.to(leaf.device))
    touched = dx.cpu()[0].isnan()
    assert not touched[..., 1].any() and not touched[2:].any() and not touched[:, 3:].any()
    assert touched.sum() == (2 * 3 * 2 if mode == "avg" else 1)


@needs_library
@pytest.mark.parametrize("cells", [255, 256, 257, 65536, 65537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_winners_of_every_size(cells: int, dtype: torch.dtype) -> None:
    x = torch.zeros(1, cells, 1, 1, 2, dtype=dtype)
    x[0, cells - 1, 0, 0, 0], x[0, cells // 2, 0, 0, 1] = 1, 1
    y, dx = on("cpp", x, (1, None, None), "max")
    assert (y == 1).all() and dx.nonzero()[:, 1].tolist() == [cells // 2, cells - 1]
    winners = torch.ops.vlpfast.pool_tokens_fwd(x, 1, 1, 1, True, True)[1]
    assert winners.dtype == (torch.uint8 if cells <= 256 else torch.int16 if cells <= 65536 else torch.int32)


@needs_library
def test_winners_are_kept_for_a_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    apply = MaxPool.apply
    monkeypatch.setattr(MaxPool, "apply", lambda *arguments: kept.append(arguments[-1]) or apply(*arguments))
    x = frames(2, 2, 4, 4, 3)["x"].requires_grad_()
    pool_tokens(x.detach(), (1, 2, 2), "max"), pool_tokens(x, (1, 2, 2), "max")
    with torch.no_grad():
        pool_tokens(x, (1, 2, 2), "max")
    assert kept == [False, True, False]


# --- torch's machinery ------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_with_two_threads_and_every_time(mode: str, dtype: torch.dtype, two_threads: None) -> None:  # noqa: F811
    x = frames(2, 5, 14, 13, 70)["x"].to(dtype)
    for out in ((3, 4, 5), (7, 14, 20), (1, 1, 1)):
        torch.set_num_threads(2)
        found = on("cpp", x, out, mode)
        torch.set_num_threads(1)
        for _ in range(2):
            assert all(map(torch.equal, found, on("cpp", x, out, mode)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "out"), [((2, 3, 5), (3, 2, 2)), ((3, 1, 2), (1, None, 3))])
def test_gradients_of_every_order(shape: Size, out: Size, mode: str, backend: str) -> None:
    def function(x: Tensor) -> Tensor:
        return pool_tokens(x, out, mode)

    x = frames(2, *shape, 2)["x"].requires_grad_()
    with backends.use(backend):
        assert torch.autograd.gradcheck(function, x)
        value = function(x).square().sum()
        (expected,) = torch.autograd.grad(value, x, retain_graph=True)
        assert torch.equal(torch.autograd.grad(value, x)[0], expected)
        assert torch.equal(torch.func.grad(lambda x: function(x).square().sum())(x.detach()), expected)
        transposed = function(x.detach().movedim(-1, 1).contiguous().movedim(1, -1))
        assert torch.equal(transposed, function(x)) and transposed.is_contiguous()
        with torch.inference_mode():
            assert torch.equal(function(x), function(x.detach()))
        jacobian = torch.func.jacrev(function)(x.detach())
        torch.testing.assert_close(torch.einsum("...bthwc,bthwc->...", jacobian, x.detach()), function(x.detach()))
        if mode == "avg" or backend == "reference":
            assert torch.autograd.gradgradcheck(function, x)
            each = torch.func.vmap(function, in_dims=1)(torch.stack([x.detach(), 2 * x.detach()], 1))
            assert torch.equal(each, torch.stack([function(x), 2 * function(x)]))
            return
        with pytest.raises(NotImplementedError, match="pool_tokens: largest values under vmap are made by the reference backend"):
            torch.func.vmap(function)(x.detach()[None])
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="pool_tokens: second derivatives of largest values are made by the ref"):
            gradient.sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype(backend: str, mode: str) -> None:
    x = frames(2, 3, 5, 4, 8)["x"]
    with backends.use(backend):
        for dtype in (torch.float32, torch.float64, torch.float16):
            expected = pool_tokens(x.to(dtype), (2, 2, 3), mode)
            with torch.autocast("cpu", torch.bfloat16):
                found = pool_tokens(x.to(dtype), (2, 2, 3), mode)
            assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", WITH_TRITON)
def test_sums_are_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """To nearest: the result of the same numbers in float32, rounded. A running sum of ones in bfloat16 would end at 256."""
    device = backends.device_type(backend)
    x = frames(1, 3, 4, 5, 3)["x"].to(device, dtype)
    cases = [(x, (2, 3, 3)), (x[:, :1], (2, 3, 6)), (torch.ones_like(x).repeat(1, 1, 1, 60, 1), (3, 4, 1))]
    for tokens, out in cases[: 3 if backend != "triton" or device == "cuda" else 2]:  # the interpreter is slow
        results = []
        for leaf in (tokens.clone().requires_grad_(), tokens.float().requires_grad_()):
            with backends.use(backend):
                y = pool_tokens(leaf, out)
                grad = torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape).to(dtype).to(y.dtype)
                results.append((y, torch.autograd.grad(y, leaf, grad)[0]))
        for half, single in zip(*results, strict=True):
            assert torch.equal(half, single.to(dtype))


@pytest.mark.parametrize(
    ("backend", "dynamic"), [*(pytest.param("cpp", d, marks=needs_library) for d in (False, True)), ("reference", False)]
)
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(x: Tensor) -> Tensor:
        y = pool_tokens(x, (2, None, 3)).square().sum() + pool_tokens(x[0], (3, 2, 7), "max").sin().sum()
        return y + pool_tokens(x[:, :, :, :, ::2], (1, 2, 2), "max").sum()

    x = frames(2, 3, 5, 4, 6)["x"].requires_grad_()
    with backends.use(backend):
        expected = function(x)
        found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x), rtol=1e-12, atol=1e-14)


@needs_library
def test_opcheck() -> None:
    x = frames(2, 3, 5, 20, 6)["x"].bfloat16()
    for tokens, out, forms in (
        (x, (2, 5, 3), ((True, True), (True, False), (False, False))),
        (x[:, :, ::2, 1:].float(), (1, 1, 1), ((True, True),)),
    ):
        for largest, keep in forms:
            arguments = (tokens, *out, largest, keep)
            torch.library.opcheck(torch.ops.vlpfast.pool_tokens_fwd, arguments)
            pooled, winners = torch.ops.vlpfast.pool_tokens_fwd(*arguments)
            if keep or not largest:
                torch.library.opcheck(torch.ops.vlpfast.pool_tokens_bwd, (pooled, winners, *tokens.shape[1:4], largest))


def test_meta_and_fake_tensors_take_shape_only() -> None:
    y = pool_tokens(torch.empty(2, 16, 24, 24, 8, device="meta", dtype=torch.bfloat16), (16, 12, 12))
    assert y.shape == (2, 16, 12, 12, 8) and y.is_meta and y.dtype == torch.bfloat16
    with FakeTensorMode():
        x = torch.empty(3, 4, 5, 6, requires_grad=True)
        for mode in MODES:
            y = pool_tokens(x, (None, 2, 7), mode)
            assert y.shape == (3, 2, 7, 6) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
        with pytest.raises(ValueError, match=r"out\[1\]: expected >= 1, got 0"):
            pool_tokens(x, (None, 0, 7))


@needs_library
def test_what_is_counted() -> None:
    """Each cell of each window, forward and backward: along 5 to 3 windows of two or three cells."""
    x = frames(2, 4, 5, 6, 7)["x"].requires_grad_()
    for mode in MODES:
        with FlopCounterMode(display=False) as counter:
            pool_tokens(x, (2, 3, 6), mode).sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 7 * 4 * (2 + 3 + 2) * 6


# --- arguments --------------------------------------------------------------------------------------------------------

X = torch.ones(2, 3, 4, 5, 6)
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    r"x: expected a tensor, got NoneType": (TypeError, {"x": None}),
    r"x: expected float32, .* got torch\.int32": (TypeError, {"x": X.int()}),
    r"x: expected shape \[B, T, H, W, C\] or \[T, H, W, C\], got \(5, 6\)": (ValueError, {"x": X[0, 0, 0]}),
    r"x: expected at least one of the frames to pool, got none": (ValueError, {"x": X[:, :0]}),
    r"x: expected at least one of the columns to pool, got none": (ValueError, {"x": X[:, :, :, :0]}),
    r"out: expected three numbers \(t, h, w\), got int": (TypeError, {"out": 3}),
    r"out: expected three numbers \(t, h, w\), got str": (TypeError, {"out": "123"}),
    r"out: expected three numbers \(t, h, w\), got 2": (ValueError, {"out": (1, 2)}),
    r"out\[0\]: expected >= 1, got 0": (ValueError, {"out": (0, 2, 2)}),
    r"out\[2\]: expected >= 1, got -1": (ValueError, {"out": (1, 2, -1)}),
    r"out\[1\]: expected an int, got float": (TypeError, {"out": (1, 2.0, 2)}),
    r"mode: expected 'avg' or 'max', got 'mean'": (ValueError, {"mode": "mean"}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        pool_tokens(**({"x": X, "out": (1, 2, 2)} | wrong))


@needs_library
def test_the_kernel_checks_what_it_is_given() -> None:
    """A number of the wrong type must not pass as another."""
    forward, backward = torch.ops.vlpfast.pool_tokens_fwd, torch.ops.vlpfast.pool_tokens_bwd
    assert forward(X[:0], 2**32 + 1, 2, 3, False, False)[0].shape == (0, 2**32 + 1, 2, 3, 6)
    assert backward(X[:0], X[:0].byte(), 3, 2**32 + 2, 3, False).shape == (0, 3, 2**32 + 2, 3, 6)
    with pytest.raises(RuntimeError, match="expected a result of length >= 1 from at least one, got 0 from 4"):
        forward(X, 3, 0, 3, False, False)
    with pytest.raises(RuntimeError, match="expected a result of length >= 1 from at least one, got 2 from 0"):
        forward(X[:, :0], 2, 4, 5, False, False)
    with pytest.raises(RuntimeError, match="expected channels that are consecutive, got stride 5"):
        forward(X.mT.contiguous().mT, 1, 1, 1, False, False)
    with pytest.raises(RuntimeError, match="winners: expected those that the forward made of the same tokens"):
        backward(X, torch.zeros(2, 3, 4, 5, 5, dtype=torch.uint8), 6, 8, 10, True)
    with pytest.raises(RuntimeError, match="winners: expected those that the forward made of the same tokens"):
        backward(X, torch.zeros(X.shape, dtype=torch.int32), 6, 8, 10, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["pool_tokens, mean", "pool_tokens, largest"])
def test_the_reference_in_every_dtype(op: str, dtype: torch.dtype) -> None:
    for case in OPS[op].cases:
        compare(OPS[op], "reference", dtype, case)
