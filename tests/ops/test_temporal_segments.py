"""What the conformance table cannot say about segment_pool: its definition by loops, ties, NaN, precision, torch's machinery."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance import relative_error
from conformance_frames import segments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.temporal import segment_pool

needs_library = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
needs_triton = pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")
BACKENDS = [
    pytest.param("cpp", marks=needs_library),
    "reference",
    pytest.param("triton", marks=[needs_triton, *[pytest.mark.gpu] * torch.cuda.is_available()]),
]
MODES = ("mean", "max", "logsumexp", "attention")


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def pool(x: Tensor, cu_seqlens: Tensor, mode: str, score: Tensor | None = None) -> Tensor:
    return segment_pool(x, cu_seqlens, mode, score=score if mode == "attention" else None)


def run(x: Tensor, cu_seqlens: Tensor, mode: str, score: Tensor, backend: str = "cpp") -> list[Tensor]:
    """The result and the gradients of x and score of a weighted sum of it, back on the CPU."""
    device = backends.device_type(backend)
    leaves = [t.detach().to(device).requires_grad_() for t in (x, score)]
    with backends.use(backend):
        pooled = pool(leaves[0], cu_seqlens.to(device), mode, leaves[1])
        weights = torch.linspace(0.5, 1.5, pooled.numel(), device=device).reshape(pooled.shape).to(pooled.dtype)
        found = torch.autograd.grad((pooled * weights).sum(), leaves, allow_unused=True)
    return [t.detach().cpu() for t in (pooled, *found) if t is not None]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, cu_seqlens, score of two heads."""
    both = segments(3, 2, 0, 40, 7, width=6, heads=2)
    return both["x"].to(dtype), both["cu_seqlens"], both["score"].to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition_segment_by_segment(backend: str) -> None:
    x, cu_seqlens, score = inputs()
    score = score.clamp_min(-9.0)  # finite
    lengths = cu_seqlens.diff().tolist()
    whole = [(part.double(), s.double()) for part, s in zip(x.split(lengths), score.split(lengths), strict=True) if len(part)]
    expected = {
        "mean": [part.mean(0) for part, _ in whole],
        "max": [part.max(0).values for part, _ in whole],
        "logsumexp": [part.logsumexp(0) for part, _ in whole],
        "attention": [(s.softmax(0)[..., None] * part.unflatten(1, (2, 3))).sum(0).flatten() for part, s in whole],
    }
    for mode in MODES:
        pooled = run(x, cu_seqlens, mode, score, backend)[0]
        assert not pooled[2].any()  # no token: 0
        torch.testing.assert_close(pooled[[0, 1, 3, 4]].double(), torch.stack(expected[mode]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logsumexp_of_one_token_and_of_two_equal_ones(backend: str) -> None:
    x = torch.tensor([[0.3, -200.0], [90.0, 1.0], [90.0, 1.0]])
    pooled = run(x, torch.tensor([0, 1, 3]), "logsumexp", x, backend)[0]
    torch.testing.assert_close(pooled, torch.stack((x[0], x[1] + torch.tensor(2.0).log())), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_goes_to_the_first_of_the_largest(backend: str) -> None:
    x = torch.tensor([[1.0, 5.0, -torch.inf], [2.0, 5.0, -torch.inf], [2.0, 5.0, -torch.inf]]).repeat(30, 1)
    pooled, dx = run(x, torch.tensor([0, 90]), "max", x, backend)
    assert pooled.tolist() == [[2.0, 5.0, -torch.inf]]
    assert dx.nonzero().tolist() == [[0, 1], [0, 2], [1, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_nan_reaches_its_segment_and_channel_and_no_other(mode: str, backend: str) -> None:
    x, cu_seqlens, score = inputs()
    score = score.clamp_min(-9.0)
    expected = run(x, cu_seqlens, mode, score, backend)[0]
    x[30, 4] = torch.nan
    pooled, dx, *_ = run(x, cu_seqlens, mode, score, backend)
    expected[3, 4] = torch.nan
    torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    if mode == "max":
        assert dx[5:45, 4].nonzero().tolist() == [[25]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_score_minus_infinity_may_hold_anything(backend: str) -> None:
    x, cu_seqlens, score = inputs()
    expected = run(x, cu_seqlens, "attention", score, backend)
    hidden = score == -torch.inf
    bad = torch.where(hidden.repeat_interleave(3, 1), torch.nan, x)
    found = run(bad, cu_seqlens, "attention", score, backend)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)
    assert not found[0][1].any() and not found[1][hidden.repeat_interleave(3, 1)].any() and not found[2][hidden].any()


@needs_library
def test_infinite_numbers() -> None:
    x = torch.tensor([[torch.inf, -torch.inf], [1.0, -torch.inf], [2.0, 0.0]])
    for mode in ("max", "logsumexp"):
        found, expected = (run(x, torch.tensor([0, 2, 3]), mode, x, backend) for backend in ("cpp", "reference"))
        assert found[0].tolist() == [[torch.inf, -torch.inf], [2.0, 0.0]] == expected[0].tolist()
        torch.testing.assert_close(found[1], expected[1], equal_nan=True)
    score = torch.tensor([torch.inf, 0.0, 0.0])
    assert torch.equal(run(x[1:], torch.tensor([0, 2]), "attention", score[:2])[0].isnan(), torch.tensor([[True, True]]))


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_long_segments_keep_their_precision(mode: str) -> None:
    x = torch.rand(100_000, 2, generator=torch.Generator().manual_seed(0)) + 1
    arguments = x, torch.tensor([0, 100_000]), mode
    found = run(*arguments, x)
    expected = run(x.double(), *arguments[1:], x.double(), "reference")
    assert relative_error(found[0], expected[0]) < 1e-6


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_on_the_kernels_themselves(mode: str) -> None:
    x, cu_seqlens, score = inputs(torch.float64)
    leaves = [t[:20].clone().requires_grad_() for t in (x, score.clamp_min(-2.0))]
    with backends.use("cpp"):
        chosen = leaves if mode == "attention" else leaves[:1]
        assert torch.autograd.gradcheck(lambda x, *s: pool(x, cu_seqlens.clamp_max(20), mode, *s), chosen)


@needs_library
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time_and_with_two_threads(mode: str, dtype: torch.dtype, two_threads: None) -> None:
    both = segments(3, 700, 0, 1, 90, width=1030, heads=2)
    arguments = both["x"].to(dtype), both["cu_seqlens"], mode, both["score"].float()
    first, again = run(*arguments), run(*arguments)
    torch.set_num_threads(1)
    for f, a, s in zip(first, again, run(*arguments), strict=True):
        assert torch.equal(f, a) and torch.equal(f, s)


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_function_transforms(mode: str) -> None:
    x, cu_seqlens, score = inputs()

    def loss(x: Tensor, score: Tensor) -> Tensor:
        return pool(x, cu_seqlens, mode, score).square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_(), score), x)[0]
    assert torch.equal(torch.func.grad(loss)(x.detach(), score), expected)
    with pytest.raises(NotImplementedError, match="segment_pool: second derivatives"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, score).sum())(x.detach())
    with pytest.raises(NotImplementedError, match="segment_pool: results under vmap"):
        torch.func.vmap(lambda x: pool(x, cu_seqlens, mode, score))(x.detach()[None])
    with backends.use("reference"):
        assert torch.func.grad(lambda x: torch.func.grad(loss)(x, score).sum())(x.detach()).isfinite().all()


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_compiled_without_a_break(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager", dynamic=mode != "max")
    for end in (52, 30):
        x, cu_seqlens, score = inputs()
        cu_seqlens = cu_seqlens.clamp_max(end)
        leaves = [t[:end].clone().requires_grad_() for t in (x, score)]
        results = [f(leaves[0], cu_seqlens, mode, leaves[1]) for f in (compiled, pool)]
        gradients = [torch.autograd.grad(r.square().sum(), leaves, allow_unused=True) for r in results]
        assert torch.equal(*results)
        for found, expected in zip(*gradients, strict=True):
            assert (found is None and expected is None) or torch.equal(found, expected)


@needs_library
@pytest.mark.parametrize("mode", range(4))
def test_opcheck(mode: int) -> None:
    x, cu_seqlens, score = inputs(torch.bfloat16)
    score = score if mode == 3 else None
    torch.library.opcheck(torch.ops.vlpfast.segment_pool_fwd, (x, cu_seqlens, score, mode))
    grad = torch.randn(5, 6).bfloat16()
    for need_x, need_score in ((True, mode == 3), (False, mode == 3)):
        arguments = grad, x if mode else None, cu_seqlens, score, 52, mode, need_x, need_score
        torch.library.opcheck(torch.ops.vlpfast.segment_pool_bwd, arguments)


@needs_library
def test_what_is_kept_for_the_backward() -> None:
    x, cu_seqlens, score = inputs()
    for mode, most in (("mean", 6), ("max", 6 + x.numel()), ("attention", 6 + x.numel() + score.numel())):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            pool(x.requires_grad_(), cu_seqlens, mode, score)
        assert sum(sizes) == most


@needs_library
def test_autocast_leaves_dtypes_alone() -> None:
    x, cu_seqlens, score = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pool(x, cu_seqlens, "attention", score).dtype == torch.float32
    half = pool(x.bfloat16(), cu_seqlens, "attention", score.double())
    assert half.dtype == torch.bfloat16
    assert relative_error(half, pool(x.bfloat16().double(), cu_seqlens, "attention", score.double())) < 3e-3


def test_fake_tensors_take_shape_only() -> None:
    with FakeTensorMode():
        x = torch.empty(9, 6, requires_grad=True)
        score = torch.empty(9, requires_grad=True)
        pooled = segment_pool(x, torch.empty(4, dtype=torch.int32), "attention", score=score)
        assert pooled.shape == (3, 6)
        assert [g.shape for g in torch.autograd.grad(pooled.sum(), (x, score))] == [(9, 6), (9,)]
    assert segment_pool(torch.empty(9, 6, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")).shape == (3, 6)


@needs_library
def test_operations_are_counted() -> None:
    x, cu_seqlens, _ = inputs()
    with FlopCounterMode(display=False) as counter:
        segment_pool(x.requires_grad_(), cu_seqlens, "max").sum().backward()
    assert counter.get_total_flops() == 2 * x.numel()


X, SEGMENTS = torch.ones(5, 6), torch.tensor([0, 2, 5])
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "mode: expected 'mean', 'max', 'logsumexp' or 'attention', got 'sum'": (ValueError, {"mode": "sum"}),
    "x: expected a tensor, got list": (TypeError, {"x": [1.0]}),
    "x: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"x": X.long()}),
    r"x: expected shape \[L, C\], got \(5,\)": (ValueError, {"x": X[:, 0]}),
    "cu_seqlens: expected a tensor or None, got list": (TypeError, {"cu_seqlens": [0, 5]}),
    "cu_seqlens: expected torch.int32 or torch.int64, got torch.float32": (TypeError, {"cu_seqlens": SEGMENTS.float()}),
    r"cu_seqlens: expected a vector .*, got \(0,\)": (ValueError, {"cu_seqlens": SEGMENTS[:0]}),
    "cu_seqlens: expected device cpu as the tokens have, got meta": (ValueError, {"cu_seqlens": SEGMENTS.to("meta")}),
    "cu_seqlens: expected numbers from 0 to 5 tokens, got 0 to 4": (ValueError, {"cu_seqlens": torch.tensor([0, 4])}),
    "cu_seqlens: expected numbers that never fall, got -1 as a length": (ValueError, {"cu_seqlens": torch.tensor([0, 3, 2, 5])}),
    "score: expected None with mode='mean', got a Tensor": (ValueError, {"score": X[:, 0]}),
    "score: expected a tensor with mode='attention', got NoneType": (TypeError, {"mode": "attention"}),
    "score: expected float32, .* got torch.int64": (TypeError, {"mode": "attention", "score": X[:, 0].long()}),
    r"score: expected shape \[5\] or \[5, H\], got \(4,\)": (ValueError, {"mode": "attention", "score": X[:4, 0]}),
    "score: expected a number of heads that divides x's width 6, got 4": (ValueError, {"mode": "attention", "score": X[:, :4]}),
    "score: expected a number of heads .* got 0": (ValueError, {"mode": "attention", "score": X[:, :0]}),
    "score: expected device cpu as x has, got meta": (ValueError, {"mode": "attention", "score": X.to("meta")}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str) -> None:
    error, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        segment_pool(**({"x": X, "cu_seqlens": SEGMENTS} | wrong))


@needs_library
def test_the_kernel_checks_segments_where_their_values_were_hidden() -> None:
    for start in ([0, 6], [1, 5], [0, 4], [0, 3, 2, 5]):
        with pytest.raises(RuntimeError, match="cu_seqlens: expected numbers from 0"):
            torch.ops.vlpfast.segment_pool_fwd(X, torch.tensor(start), None, 0)
