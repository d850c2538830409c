"""What the conformance table cannot say about temporal_attention: torch's own attention, NaN, torch's machinery, arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import relative_error
from conformance_frames import one_product, positions, shown
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.temporal import attention, temporal_attention

needs_library = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
needs_triton = pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")
BACKENDS = [
    pytest.param("cpp", marks=needs_library),
    "reference",
    pytest.param("triton", marks=[needs_triton, *[pytest.mark.gpu] * torch.cuda.is_available()]),
]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def run(backend: str, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> list[Tensor]:
    """The result and the gradients of q, k and v of a weighted sum of it, back on the CPU."""
    device = backends.device_type(backend)
    leaves = [t.detach().to(device).requires_grad_() for t in (q, k, v)]
    arguments = {name: a.to(device) if isinstance(a, Tensor) else a for name, a in arguments.items()}
    with backends.use(backend):
        out = temporal_attention(*leaves, **arguments)
        weights = torch.linspace(0.5, 1.5, out.numel(), device=device).reshape(out.shape).to(out.dtype)
        gradients = torch.autograd.grad((out * weights).nan_to_num(0.0).sum(), leaves)
    return [t.detach().cpu() for t in (out, *gradients)]


def inputs(*sizes: int, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return {name: a.to(dtype) if name in "qkv" else a for name, a in positions(*sizes, **more).items()}


def permuted(q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
    """By torch's scaled_dot_product_attention over [B, P, H, T, D]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).permute(0, 3, 1, 2, 4).flatten(3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_attention_at_each_position(backend: str) -> None:
    both = inputs(2, 4, 4, 2, 8, 8, 2)
    keep = torch.tensor([[True, False, True, True], [True, True, True, False]])
    for options, sdpa in (
        ({"causal": True}, {"is_causal": True}),
        ({"mask": keep, "scale": 0.7}, {"attn_mask": keep[:, None, None, None], "scale": 0.7}),
    ):
        found = run(backend, **both, **options)
        leaves = [both[name].double().requires_grad_() for name in "qkv"]
        expected = permuted(*leaves, 2, **sdpa)
        weights = torch.linspace(0.5, 1.5, expected.numel()).reshape(expected.shape).double()
        for f, e in zip(found, (expected.detach(), *torch.autograd.grad((expected * weights).sum(), leaves)), strict=True):
            torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_frames_may_hold_anything_and_a_query_that_sees_none_gives_0(backend: str) -> None:
    both = inputs(2, 4, 4, 1, 4, 4, 2, mask=shown(2, 4), causal=True)
    expected = run(backend, **both)
    hidden = ~both["mask"][..., None, None]
    bad = both | {name: torch.where(hidden, torch.nan, both[name]) for name in "kv"}
    found = run(backend, **bad)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)
    assert not found[0][0].any() and all(not f[0].any() for f in found[1:])
    assert all(not f[hidden.expand_as(f)].any() for f in found[2:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_stays_at_its_position_and_head(where: str, backend: str) -> None:
    both = inputs(1, 3, 3, 2, 4, 4, 2)
    expected = run(backend, **both)[0]
    both[where][0, 2, 1, 5] = torch.nan  # the second head's
    found = run(backend, **both)[0]
    reached = torch.zeros_like(expected, dtype=torch.bool)
    reached[0, 2 if where == "q" else slice(None), 1, 5 if where == "v" else slice(4, 8)] = True
    assert found[reached].isnan().all() and torch.equal(found[~reached], expected[~reached])


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_library), BACKENDS[2]])
def test_a_later_frame_does_not_reach_an_earlier_one(backend: str) -> None:
    """With causal, not even as NaN."""
    both = inputs(1, 4, 4, 2, 4, 4, 1, causal=True)
    expected = run(backend, **both)
    both["k"][:, 2], both["v"][:, 2], both["q"][:, 2] = torch.nan, torch.nan, torch.nan
    found = run(backend, **both)
    assert torch.equal(found[0][:, :2], expected[0][:, :2]) and found[0][:, 2:].isnan().all()


@needs_library
def test_large_scores() -> None:
    both = inputs(2, 6, 6, 3, 8, 8, 2, scale=200.0)
    for f, e in zip(run("cpp", **both), run("reference", **positions(2, 6, 6, 3, 8, 8, 2, scale=200.0)), strict=True):
        assert f.isfinite().all() and relative_error(f, e) < 1e-4


@needs_library
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": shown(2, 5)}])
def test_gradcheck_on_the_kernels_themselves(options: dict[str, Any]) -> None:
    both = positions(2, 5, 5, 2, 3, 4, 2)
    leaves = [both[name].requires_grad_() for name in "qkv"]
    with backends.use("cpp"):
        assert torch.autograd.gradcheck(lambda q, k, v: temporal_attention(q, k, v, 2, **options), leaves)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time_and_with_two_threads(dtype: torch.dtype, two_threads: None) -> None:
    both = inputs(3, 7, 7, 37, 24, 40, 3, dtype=dtype, mask=shown(3, 7))
    first, again = run("cpp", **both), run("cpp", **both)
    torch.set_num_threads(1)
    for f, a, s in zip(first, again, run("cpp", **both), strict=True):
        assert torch.equal(f, a) and torch.equal(f, s)


@needs_library
def test_strides_change_no_bit() -> None:
    views = one_product(2, 5, 7, 8, 2)
    views = {name: t.float() if name in "qkv" else t for name, t in views.items()}
    dense = views | {name: views[name].contiguous() for name in "qkv"}
    for f, e in zip(run("cpp", **views), run("cpp", **dense), strict=True):
        assert torch.equal(f, e)


@needs_library
def test_longer_clips_go_through_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(attention, "_permuted", lambda *a: called.append(a[0].shape[1]) or torch.zeros(()))
    for frames in (32, 33):
        temporal_attention(**inputs(1, frames, frames, 1, 2, 2, 1))
        temporal_attention(**inputs(1, 1, frames, 1, 2, 2, 1))
    assert called == [33, 1]
    with pytest.raises(RuntimeError, match="expected at most 32 frames"):
        torch.ops.vlpfast.temporal_attention_fwd(*(torch.zeros(1, 33, 1, 4) for _ in "qkv"), None, 1, 1.0, False)


@needs_library
def test_function_transforms() -> None:
    both = inputs(2, 3, 3, 2, 4, 4, 2)
    q, k, v = (both[name] for name in "qkv")

    def loss(q: Tensor) -> Tensor:
        return temporal_attention(q, k, v, 2).square().sum()

    expected = torch.autograd.grad(loss(q.requires_grad_()), q)[0]
    assert torch.equal(torch.func.grad(loss)(q.detach()), expected)
    with pytest.raises(NotImplementedError, match="temporal_attention: second derivatives"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q.detach())
    with pytest.raises(NotImplementedError, match="temporal_attention: results under vmap"):
        torch.func.vmap(lambda q: temporal_attention(q, k, v, 2))(q.detach()[None])
    with backends.use("reference"):
        assert torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q.detach()).isfinite().all()


@needs_library
def test_compiled_without_a_break() -> None:
    """One tensor as queries, keys and values too."""
    torch._dynamo.reset()
    compiled = torch.compile(temporal_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ((2, 5, 5, 3, 4, 4, 2), (3, 4, 4, 7, 4, 4, 2)):
        x = inputs(*sizes)["q"].requires_grad_()
        for options in ({"causal": True}, {"mask": shown(*x.shape[:2])}):
            found, expected = (f(x, x, x, 2, **options) for f in (compiled, temporal_attention))
            assert torch.equal(found, expected)
            assert torch.equal(*(torch.autograd.grad(r.square().sum(), x)[0] for r in (found, expected)))


@needs_library
def test_opcheck() -> None:
    both = inputs(2, 5, 5, 3, 4, 6, 2, dtype=torch.bfloat16)
    q, k, v = (both[name] for name in "qkv")
    for keep, causal in ((None, True), (shown(2, 5), False)):
        arguments = q, k, v, keep, 2, 0.5, causal
        torch.library.opcheck(torch.ops.vlpfast.temporal_attention_fwd, arguments)
        out = torch.ops.vlpfast.temporal_attention_fwd(*arguments)
        torch.library.opcheck(torch.ops.vlpfast.temporal_attention_bwd, (out, *arguments))


@needs_library
def test_autocast_and_mixed_dtypes() -> None:
    both = inputs(2, 3, 3, 2, 8, 8, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = temporal_attention(**both)
        doubles = temporal_attention(**positions(2, 3, 3, 2, 8, 8, 2))
    assert found.dtype == torch.bfloat16 and doubles.dtype == torch.float64
    assert torch.equal(found, temporal_attention(**inputs(2, 3, 3, 2, 8, 8, 2, dtype=torch.bfloat16)))
    assert temporal_attention(**(both | {"k": both["k"].bfloat16()})).dtype == torch.float32


@needs_library
def test_products_are_counted() -> None:
    both = inputs(2, 3, 3, 5, 4, 6, 2)
    both["q"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        temporal_attention(**both).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * 9 * (8 + 12) + 2 * 2 * 5 * 9 * (3 * 8 + 2 * 12)


def test_fake_tensors_take_shape_only() -> None:
    with FakeTensorMode():
        q, v = torch.empty(2, 1, 5, 8, requires_grad=True), torch.empty(2, 4, 5, 12, requires_grad=True)
        k = torch.empty(2, 4, 5, 8, requires_grad=True)
        out = temporal_attention(q, k, v, 4, mask=torch.empty(2, 4, dtype=torch.bool))
        assert out.shape == (2, 1, 5, 12)
        assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
        long = torch.empty(2, 40, 5, 8)
        assert temporal_attention(long, long, long, 4, mask=torch.empty(2, 40, dtype=torch.bool)).shape == long.shape


Q, V = torch.ones(2, 3, 5, 8), torch.ones(2, 3, 5, 12)
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "q: expected a tensor, got list": (TypeError, {"q": [1.0]}),
    "k: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"k": Q.long()}),
    r"v: expected shape \[B, T, P, H \* D\], got \(2, 3, 5\)": (ValueError, {"v": V[..., 0]}),
    "k: expected device cpu as q has, got meta": (ValueError, {"k": Q.to("meta")}),
    r"k: expected clips, positions and width as q \(2, 3, 5, 8\) has, got \(2, 3, 4, 8\)": (ValueError, {"k": Q[:, :, :4]}),
    r"v: expected clips, frames and positions as k \(2, 3, 5, 8\) has, got \(2, 2, 5, 12\)": (ValueError, {"v": V[:, :2]}),
    "heads: expected >= 1, got 0": (ValueError, {"heads": 0}),
    "heads: expected an int, got float": (TypeError, {"heads": 2.0}),
    "heads: expected a divisor of q's width 8, got 3": (ValueError, {"heads": 3}),
    "heads: expected a divisor of v's width 12, got 8": (ValueError, {"heads": 8}),
    "causal: expected True or False, got 1": (TypeError, {"causal": 1}),
    "causal: expected as many frames in q as in k, got 2 and 3": (ValueError, {"q": Q[:, :2], "causal": True}),
    "mask: expected a tensor or None, got str": (TypeError, {"mask": "causal"}),
    "mask: expected torch.bool, got torch.float32": (TypeError, {"mask": torch.ones(2, 3)}),
    r"mask: expected shape \(2, 3\), got \(3, 2\)": (ValueError, {"mask": torch.ones(3, 2, dtype=torch.bool)}),
    "mask: expected device cpu as q has, got meta": (ValueError, {"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}),
    "scale: expected a number or None, got str": (TypeError, {"scale": "1"}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str) -> None:
    error, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        temporal_attention(**({"q": Q, "k": Q, "v": V, "heads": 4} | wrong))
