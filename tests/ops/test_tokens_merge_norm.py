"""add_merge_norm: the three calls that it stands for, gradients, rounding, what weighs nothing, dtypes, threads, arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance_tokens import add_merge_norm as by_index
from conformance_tokens import many_to_one, residuals, sizes
from test_tokens_merging import BACKENDS, equal, needs_library
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.tokens import Match, add_merge_norm, bipartite_match, merge, reference

CHANNELS = 23
FLOATING = ("x", "delta", "size", "weight", "bias")


def example(dtype: torch.dtype = torch.float64, delta: torch.dtype | None = None, **more: Any) -> dict[str, Any]:
    """Three images of 29 tokens, of which 9 merge, by twos and threes; sizes from 0 to 3."""
    given = residuals(3, 29, CHANNELS) | {"size": sizes(3, 29), "mode": "weighted"} | more
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = {"x": dtype, "delta": delta or dtype}
    return {
        name: value.to(dtypes.get(name, wide)) if name in FLOATING and isinstance(value, Tensor) else value
        for name, value in given.items()
    }


def match_of(given: dict[str, Any]) -> Match:
    return Match(*(given[name] for name in Match._fields))


def three_calls(index: Tensor, kept: Tensor, source: Tensor, target: Tensor, **given: Any) -> tuple[Tensor, ...]:
    match = Match(index, kept, source, target)
    y, size = merge(given["x"] + given["delta"], match, given["size"], mode=given["mode"])
    return y, size, F.layer_norm(y, (y.shape[-1],), given["weight"], given["bias"], given.get("eps", 1e-5))


def run(function: Any, given: dict[str, Any], wants: tuple[str, ...] = ("x", "delta", "weight", "bias")) -> list[Tensor]:
    """y, size, normed, and the gradients of a weighted sum of the first and the last."""
    leaves = {name: given[name].detach().requires_grad_() for name in wants}
    y, size, normed = function(**(given | leaves))
    total = sum((t.double() * torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)).sum() for t in (y, normed.square()))
    return [y.detach(), size, normed.detach(), *torch.autograd.grad(total, list(leaves.values()))]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["mean", "weighted"])
def test_the_three_calls(mode: str, backend: str) -> None:
    given = example(mode=mode, eps=0.01)
    with backends.use(backend):
        found = run(by_index, given)
    with backends.use("reference"):
        expected = run(three_calls, given)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-12)
    assert torch.equal(found[3], found[4])  # delta's gradient is x's


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition_token_by_token(backend: str) -> None:
    given = example()
    with backends.use(backend):
        y, size, normed = by_index(**given)
    merged = 0
    for i in range(3):
        for place in range(y.shape[1]):
            own = given["index"][i] == place
            rows, weighs = (given["x"] + given["delta"])[i, own], given["size"][i, own]
            mean = (rows * weighs[:, None]).sum(0) / weighs.sum() if weighs.sum() > 0 else torch.zeros(CHANNELS).double()
            torch.testing.assert_close(y[i, place], mean, rtol=1e-13, atol=1e-14)
            assert size[i, place] == weighs.sum()
            centred = mean - mean.mean()
            unit = centred / (centred.square().mean() + 1e-5).sqrt()
            torch.testing.assert_close(normed[i, place], unit * given["weight"] + given["bias"], rtol=1e-12, atol=1e-12)
            merged += int(own.sum() > 1)
    assert merged > 10 and (size == 0).any()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_merges_with_nothing_has_the_bits_of_a_sum(dtype: torch.dtype) -> None:
    given = example(dtype, size=sizes(3, 29) + 0.1)
    y, *_ = by_index(**given)
    alone = torch.zeros(y.shape[:2], dtype=torch.int64).scatter_add(1, given["index"], torch.ones_like(given["index"])) == 1
    sums = (given["x"] + given["delta"]).gather(1, given["kept"][..., None].expand(y.shape))
    assert 20 < alone.sum() < 60 and torch.equal(y[alone], sums[alone])


@needs_library
def test_the_norm_is_exact_far_from_zero() -> None:
    """Rows whose mean is 10,000 times their deviation: no difference of large sums."""
    given = example(torch.float32)
    given["x"] += 1e4
    y, _, normed = by_index(**given)
    rows = y.double()
    expected = F.layer_norm(rows, (CHANNELS,), given["weight"].double(), given["bias"].double(), 1e-5)
    assert (normed - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x", "delta", "result"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtypes_meet_as_in_a_sum(x: torch.dtype, delta: torch.dtype, result: torch.dtype, backend: str) -> None:
    given = example(x, delta)
    with backends.use(backend):
        found = run(by_index, given)
    with backends.use("reference"):
        expected = run(by_index, {k: v.double() if k in FLOATING else v for k, v in given.items()})
    assert [t.dtype for t in found[:1] + found[2:5]] == [result, result, x, delta]
    assert found[5].dtype == given["weight"].dtype
    for f, e in zip(found, expected, strict=True):
        rounding = torch.finfo(f.dtype).eps
        assert (f.double() - e).norm() < 4 * max(rounding, 1e-7) * e.norm()


@needs_library
def test_the_norm_in_the_accumulating_dtype() -> None:
    """What CUDA's autocast asks for."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        given = example(dtype)
        forward, weighs = torch.ops.vlpfast.add_merge_norm_fwd, (given["weight"], given["bias"], 1e-5, True)
        parts = given["x"], given["delta"], given["size"], given["kept"], given["source"], given["target"], *weighs
        y, _, normed, stats = forward(*parts, True)
        wanted = F.layer_norm(y.float(), (CHANNELS,), given["weight"], given["bias"])
        assert normed.dtype == torch.float32
        torch.testing.assert_close(normed, wanted, rtol=1e-5, atol=1e-5)
        backward, saved = torch.ops.vlpfast.add_merge_norm_bwd, (y, stats, given["size"], given["index"], given["kept"])
        g = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype)
        wide, narrow = (backward(g, of, *saved, given["weight"], None, True, True) for of in (g.float(), g))
        assert equal(list(wide), list(narrow))


# --- what weighs nothing, what is no number ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_weighs_nothing_may_hold_anything(bad: float, backend: str) -> None:
    given = example()
    nothing = (given["size"] == 0)[..., None]
    with backends.use(backend):
        found = run(by_index, given | {name: given[name].masked_fill(nothing, bad) for name in ("x", "delta")})
        expected = run(by_index, given)
    assert nothing.sum() > 5 and equal(found, expected) and not found[3][nothing[..., 0]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_with_its_row(backend: str) -> None:
    given = example(size=None, mode="mean")
    given["delta"][1, 7, 2] = torch.nan
    with backends.use(backend):
        y, _, normed = by_index(**given)
    place = int(given["index"][1, 7])
    assert y.isnan().nonzero().tolist() == [[1, place, 2]]
    assert torch.equal(normed.isnan().any(2).nonzero(), torch.tensor([[1, place]])) and normed[1, place].isnan().all()


# --- gradients, torch's machinery -------------------------------------------------------------------------------------


@needs_library
def test_gradients_by_finite_differences() -> None:
    for more in ({}, {"size": None, "mode": "mean"}):
        given = residuals(2, 9, 4, many_to_one(2, 9, 3)) | {"size": sizes(2, 9), "mode": "weighted"} | more
        leaves = [given.pop(name).requires_grad_() for name in ("x", "delta", "weight", "bias")]

        def function(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, given: dict[str, Any] = given) -> tuple[Tensor, ...]:
            y, _, normed = by_index(x=x, delta=delta, weight=weight, bias=bias, **given)
            return y, normed

        assert torch.autograd.gradcheck(function, leaves)
        with backends.use("reference"):
            assert torch.autograd.gradgradcheck(function, leaves)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_two_threads_give_the_bits_of_one(dtype: torch.dtype, two_threads: None) -> None:
    given = example(dtype) | residuals(7, 101, 31, many_to_one(7, 101, 4)) | {"size": sizes(7, 101)}
    given = {k: v.to(dtype) if k in ("x", "delta") else v for k, v in given.items()}
    two = run(by_index, given)
    torch.set_num_threads(1)
    assert equal(two, run(by_index, given))
    with backends.use("reference"):  # the sums over several parts are those over all rows
        expected = run(by_index, {k: v.double() if k in FLOATING else v for k, v in given.items()})
    for found, wanted in zip(two[5:], expected[5:], strict=True):
        assert (found.double() - wanted).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * wanted.norm()


@needs_library
def test_gradients_of_one_argument() -> None:
    given = example()
    whole = dict(zip(("x", "delta", "weight", "bias"), run(by_index, given)[3:], strict=True))
    for name, expected in whole.items():
        assert torch.equal(run(by_index, given, (name,))[3], expected)
    leaf = given["x"].clone().requires_grad_()
    y, size, normed = by_index(**(given | {"x": leaf}))
    assert y.requires_grad and normed.requires_grad and not size.requires_grad
    first = torch.autograd.grad(normed.sum(), leaf, retain_graph=True)
    assert equal(list(first), list(torch.autograd.grad(normed.sum(), leaf)))
    with torch.inference_mode():
        assert equal(list(by_index(**given)), [y.detach(), size, normed.detach()])


@needs_library
def test_transforms_and_what_is_refused() -> None:
    given = example()
    x = given.pop("x")

    def loss(x: Tensor) -> Tensor:
        y, _, normed = by_index(x=x, **given)
        return y.square().sum() + normed.pow(3).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected.detach(), rtol=1e-13, atol=1e-13)
    with pytest.raises(NotImplementedError, match="add_merge_norm: second derivatives are made by the reference backend alone"):
        torch.autograd.grad(expected.sum(), leaf)
    with pytest.raises(NotImplementedError, match="add_merge_norm: results under vmap are made by the reference backend alone"):
        torch.func.vmap(lambda x: by_index(x=x, **given))(x.expand(2, -1, -1, -1))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (x,), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_layer_norms(backend: str) -> None:
    """On the CPU it changes neither dtypes nor numbers."""
    for dtype, delta in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        given = example(dtype, delta)
        with backends.use(backend):
            expected = run(by_index, given)
            with torch.autocast("cpu", torch.bfloat16):
                assert equal(run(by_index, given), expected)
                normed = F.layer_norm(expected[0], (CHANNELS,), given["weight"], given["bias"])
        assert normed.dtype == expected[2].dtype


def test_autocast_on_cuda_asks_for_the_accumulating_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half types alone, and where it is on; on tensors that have a device and no memory."""
    monkeypatch.setattr(reference, "add_merge_norm", lambda *arguments: arguments[-1])
    with FakeTensorMode(), backends.use("reference"):
        match = Match(*(torch.empty(2, n, dtype=torch.int64, device="cuda") for n in (9, 6, 3, 3)))
        found = []
        for enabled in (False, True):
            before = torch.is_autocast_enabled("cuda")
            torch.set_autocast_enabled("cuda", enabled)
            for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
                x = torch.empty(2, 9, 4, device="cuda", dtype=dtype)
                found.append(add_merge_norm(x, x, match))
            torch.set_autocast_enabled("cuda", before)
    assert found == [False] * 4 + [True, True, False, False]


@needs_library
def test_operator_checks() -> None:
    forward, backward = torch.ops.vlpfast.add_merge_norm_fwd, torch.ops.vlpfast.add_merge_norm_bwd
    given = example(torch.float32, torch.bfloat16)
    x, delta, size, index, kept, source, target, weight, bias = (
        given[name] for name in ("x", "delta", "size", *Match._fields, "weight", "bias")
    )
    parts = kept, source, target, weight, bias, 1e-5
    for arguments in ((x, delta, size, *parts, True, False), (x.bfloat16(), delta, None, *parts, False, True)):
        torch.library.opcheck(forward, arguments)
    y, _, normed, stats = forward(x, delta, size, *parts, True, False)
    saved = y, stats, size, index, kept, weight
    for options in ((torch.bfloat16, True, True), (None, True, False), (torch.bfloat16, False, True)):
        torch.library.opcheck(backward, (y, normed, *saved, *options))
    dx, ddelta, dweight, _ = backward(y, normed, *saved, torch.bfloat16, False, True)
    assert dx.shape == ddelta.shape == (0, 29, CHANNELS) and dweight.shape == (CHANNELS,)
    for wrong, message in (
        ((x, delta[:, 1:], size, *parts, True, False), "delta: expected x's shape"),
        ((x, delta, None, *parts, True, False), "size: expected it"),
        ((x.double(), delta, None, *parts, False, False), "delta: expected x's dtype"),
        ((x, delta, size, kept, source, target + 1, *parts[3:], True, False), "places from 0 to 19"),
        ((x, delta, size, *parts[:3], weight[1:], bias, 1e-5, True, False), "weight, bias: expected vectors of 23"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*wrong)
    for wrong, message in (
        ((y[:, 1:], normed, *saved), "expected one shape"),
        ((y, normed.double(), *saved), "expected the forward pass's dtypes"),
        ((y, normed, y, stats[:2], *saved[2:]), "stats"),
        ((y, normed, y, stats, size, index - 1, *saved[4:]), "places from 0 to 19"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*wrong, None, True, True)


@needs_library
def test_compiled_and_counted() -> None:
    given = example()

    def loss(x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        match = bipartite_match(x, 6)
        y, size, normed = add_merge_norm(x, delta, match, weight=weight)
        y, _, again = add_merge_norm(y, normed, bipartite_match(y, 0), size, weight=weight, mode="weighted")
        return y.square().sum() + again.pow(3).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [given[name].clone().requires_grad_() for name in ("x", "delta", "weight")]
        total = function(*leaves)
        results.append([total.detach(), *torch.autograd.grad(total, leaves)])
    for f, e in zip(*results, strict=True):
        torch.testing.assert_close(f, e)
    tensors = [given[name] for name in ("x", "delta", "weight")]
    with FakeTensorMode() as mode:
        assert loss(*(mode.from_tensor(t) for t in tensors)).shape == ()
    with FlopCounterMode(display=False) as counter:
        run(by_index, given)
    assert counter.get_total_flops() == 0


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": 3}, TypeError, "x: expected a tensor, got int"),
        ({"delta": torch.ones(3, 29, 3)}, ValueError, r"delta: expected x's shape \(3, 29, 23\), got \(3, 29, 3\)"),
        ({"delta": torch.ones(3, 29, 23, dtype=torch.int64)}, TypeError, "delta: expected float32, .* got torch.int64"),
        ({"delta": torch.ones(3, 29, 23, device="meta")}, ValueError, "delta: expected device cpu as x has, got meta"),
        ({"match": 3}, TypeError, "match: expected a Match, got int"),
        ({"size": torch.ones(3, 28)}, ValueError, r"size: expected shape \(3, 29\) or \(3, 29, 1\), got \(3, 28\)"),
        ({"size": torch.ones(3, 29, requires_grad=True)}, ValueError, "size: expected a tensor that wants no gradient"),
        ({"weight": 1.0}, TypeError, "weight: expected a tensor or None, got float"),
        ({"weight": torch.ones(22)}, ValueError, r"weight: expected shape \(23,\), got \(22,\)"),
        ({"bias": torch.ones(23, dtype=torch.int32)}, TypeError, "bias: expected float32, .* got torch.int32"),
        ({"eps": "small"}, TypeError, "eps: expected a number, got str"),
        ({"eps": -1e-5}, ValueError, "eps: expected >= 0, got -1e-05"),
        ({"mode": "max"}, ValueError, "mode: expected 'mean' or 'weighted', got 'max'"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    given = example()
    good = {name: given[name] for name in ("x", "delta", "size", "weight", "bias")} | {"match": match_of(given)}
    with pytest.raises(error, match=message):
        add_merge_norm(**(good | wrong))


def test_size_wants_no_gradient_where_none_is_made() -> None:
    given = example(size=sizes(3, 29).requires_grad_())
    with torch.no_grad():
        assert by_index(**given)[0].isfinite().all()
