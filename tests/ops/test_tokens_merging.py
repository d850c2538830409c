"""merge, unmerge, track: the definition by loops, what merging keeps, gradients, weights of zero, layouts, threads, arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends, debug
from vlpfast.ops.tokens import Match, bipartite_match, kth_match, merge, track, unmerge

needs_library = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
BACKENDS = [pytest.param("cpp", marks=needs_library), "reference"]
MODES: list[dict[str, Any]] = [{}, {"mode": "weighted"}, {"mode": "sum"}, {"mode": "max"}, {"weights": True}]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sizes(*shape: int, seed: int = 1) -> Tensor:
    """Some are 0."""
    size = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return size.masked_fill(size < 0.6, 0)


def arguments(mode: dict[str, Any], size: Tensor) -> dict[str, Any]:
    """`size` as what weighs in this mode."""
    return {"weights": size} if "weights" in mode else mode | {"size": size}


def run(x: Tensor, match: Match, **options: Any) -> list[Tensor]:
    """y, its size, and the gradients of a weighted sum of them by x and by what weighs."""
    leaves = {"x": x} | {name: value for name, value in options.items() if isinstance(value, Tensor)}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    y, size = merge(match=match, **(options | leaves))
    total = sum((t.to(torch.float64) * torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)).sum() for t in (y, size))
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [y.detach(), size.detach(), *(g for g in gradients if g is not None)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# --- the definition, what merging keeps -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["mean", "weighted", "sum", "max", "weights"])
def test_the_definition_token_by_token(mode: str, backend: str) -> None:
    x, size = tokens(3, 20, 5), sizes(3, 20)
    match = kth_match(tokens(3, 20, 4, seed=3), 3)
    options = {"weights": size} if mode == "weights" else {"mode": mode, "size": size}
    with backends.use(backend):
        y, size_out = merge(x, match, **options)
    for i in range(3):
        for place in range(6):
            own = [t for t in range(20) if match.index[i, t] == place]
            rows, weight = x[i, own], size[i, own]
            counted = torch.tensor(float(len(own)), dtype=torch.float64) if mode == "weights" else weight.sum()
            expected = {
                "mean": rows.mean(0),
                "sum": rows.sum(0),
                "max": rows.max(0).values,
            }.get(mode, (weight[:, None] * rows).sum(0) / weight.sum())
            torch.testing.assert_close(y[i, place], expected, rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(size_out[i, place], counted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_twelve_layers_keep_the_mass(dtype: torch.dtype, backend: str) -> None:
    """257 tokens to 29; the class token is never moved nor mixed; equal tokens stay what they are."""
    first = tokens(2, 257, 9, dtype=dtype)
    x, size, place = first, None, None
    same = first[:, :1].expand(-1, 257, -1)
    with backends.use(backend):
        for layer in range(12):
            match = bipartite_match(x, 19)
            same = merge(same, match, size, mode="weighted")[0]
            x, size = merge(x, match, size, mode="weighted")
            place = track(place, match)
            assert x.shape == (2, 257 - 19 * (layer + 1), 9) and x.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert size.dtype == wide and torch.equal(size.sum(1), torch.full((2,), 257.0, dtype=wide))
    assert torch.equal(x[:, 0], first[:, 0]) and torch.equal(size[:, 0], torch.ones(2, dtype=wide))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    total = (size[..., None] * x.to(wide)).sum(1)
    torch.testing.assert_close(total, first.to(wide).sum(1), rtol=tolerance, atol=40 * tolerance)
    torch.testing.assert_close(same, first[:, :1].expand(-1, 29, -1), rtol=tolerance, atol=tolerance)
    groups = torch.zeros(2, 29, dtype=wide).scatter_add(1, place, torch.ones(2, 257, dtype=wide))
    assert torch.equal(groups, size)  # where the first tokens are says how many came together
    mean = torch.zeros(2, 29, 9, dtype=wide).scatter_add(1, place[..., None].expand(-1, -1, 9), first.to(wide)) / size[..., None]
    torch.testing.assert_close(x.to(wide), mean, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_unmerge(dtype: torch.dtype, backend: str) -> None:
    x = tokens(3, 31, 7, dtype=dtype)
    match = bipartite_match(x, 11)
    with backends.use(backend):
        y, size = merge(x, match)
        back = unmerge(y, match)
        again, _ = merge(back, match)
        assert equal([merge(back, match, mode="max")[0], unmerge(y, match)], [y, back])
        leaf = y.clone().requires_grad_()
        weights = tokens(3, 31, 7, seed=2, dtype=dtype)
        (gradient,) = torch.autograd.grad(unmerge(leaf, match), leaf, weights)
    for i in range(3):
        assert torch.equal(back[i], y[i, match.index[i]])
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(gradient, merge(weights, match, mode="sum")[0])
    assert torch.equal(back.gather(1, match.kept[..., None].expand(-1, -1, 7)), y)
    assert torch.equal(size, (match.index[:, None] == torch.arange(20)[:, None]).sum(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_merges_with_nothing_is_copied(dtype: torch.dtype, backend: str) -> None:
    x, size = tokens(2, 31, 7, dtype=dtype), sizes(2, 31) + 0.1
    match = bipartite_match(x, 6)
    own = match.index[:, None] == torch.arange(25)[:, None]
    alone = own.sum(2) == 1
    with backends.use(backend):
        for mode in MODES:
            y, _, dx, *_ = run(x, match, **arguments(mode, size))
            assert torch.equal(y[alone], x.gather(1, match.kept[..., None].expand(-1, -1, 7))[alone])
            g = torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape).to(dtype)
            assert torch.equal(dx.gather(1, match.kept[..., None].expand(-1, -1, 7))[alone], g[alone])
    assert 10 < alone.sum() < 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_goes_to_the_lowest_place(backend: str) -> None:
    x = torch.ones(1, 7, 3, dtype=torch.float64)
    x[0, 0, 1], x[0, 6, 2] = 0.5, 2.0
    match = Match(*(torch.tensor([t]) for t in ([1, 0, 1, 1, 1, 1, 1], [1, 5], [0, 2, 4, 3, 6], [1] * 5)))
    with backends.use(backend):
        y, _, dx = run(x, match, mode="max")
    weights = torch.linspace(0.5, 1.5, 6).reshape(2, 3)
    assert y.tolist() == [[[1, 1, 1], [1, 1, 2]]]
    expected = torch.zeros(7, 3)
    expected[1], expected[0, 0], expected[2, 1], expected[6, 2] = weights[0], weights[1, 0], weights[1, 1], weights[1, 2]
    torch.testing.assert_close(dx[0], expected.double())


# --- what is no number, what weighs nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_with_its_group(backend: str) -> None:
    x, match = tokens(2, 20, 5), kth_match(tokens(2, 20, 5), 3)
    x[1, 7, 2] = torch.nan
    with backends.use(backend):
        for mode in MODES:
            y, _, *_ = run(x, match, **arguments(mode, sizes(2, 20) + 1))
            expected = torch.zeros(2, 6, 5, dtype=torch.bool)
            expected[1, match.index[1, 7], 2] = True
            assert torch.equal(y.isnan(), expected)
        dx = run(x, match, mode="max")[2]
        assert dx[1, 7, 2] != 0  # the number that is none has won


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend: str) -> None:
    mask = torch.arange(20) < torch.tensor([20, 13, 6, 2])[:, None]
    x = tokens(4, 20, 5)
    with backends.use(backend):
        match = bipartite_match(x, 9, mask=mask)
        for bad in (torch.nan, torch.inf):
            results = []
            for filled in (x.masked_fill(~mask[..., None], bad), x.masked_fill(~mask[..., None], 0)):
                results.append(run(filled, match, size=mask.double(), mode="weighted"))
            assert all(t.isfinite().all() for t in results[0]) and equal(results[0][:3], results[1][:3])
            torch.testing.assert_close(results[0][3], results[1][3])
            y, size, dx, _ = results[0]
            assert not dx[~mask].any() and not y[size == 0].any()
            torch.testing.assert_close(size.sum(1), mask.sum(1).double())
            assert torch.equal((size > 0).sum(1), torch.tensor([11, 7, 4, 2]))
        y, size = merge(x, match, mask.double(), mode="weighted")
        torch.testing.assert_close((size[..., None] * y).sum(1), (x * mask[..., None]).sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_weighs_nothing_may_hold_anything(bad: float, backend: str) -> None:
    """Beside tokens that weigh something; then it holds zeros."""
    x, weights, match = tokens(2, 40, 19), sizes(2, 40), kth_match(tokens(2, 40, 4), 5)
    nothing = (weights == 0)[..., None]
    with backends.use(backend):
        for name in ("size", "weights"):
            options = {name: weights} | ({"mode": "weighted"} if name == "size" else {})
            found = run(x.masked_fill(nothing, bad), match, **options)
            assert nothing.sum() > 5 and found[3][weights == 0].all()
            assert all(t.isfinite().all() for t in found) and equal(found, run(x.masked_fill(nothing, 0), match, **options))


# --- gradients, against the reference ---------------------------------------------------------------------------------


TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@needs_library
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("n", "c"), [(2, 1), (33, 17), (70, 64), (9, 0)])
def test_against_the_reference_in_float64(n: int, c: int, mode: dict[str, Any], dtype: torch.dtype) -> None:
    x, size = tokens(3, n, c, dtype=dtype), sizes(3, n).to(torch.float64 if dtype == torch.float64 else torch.float32)
    for match in (kth_match(tokens(3, n, 4), 2), bipartite_match(tokens(3, n, 4), n // 4, protect=0)):
        found = run(x, match, **arguments(mode, size))
        with backends.use("reference"):
            expected = run(x.double(), match, **arguments(mode, size.double()))
        assert found[0].dtype == dtype and found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for f, e in zip(found, expected, strict=True):
            assert f.shape == e.shape  # the gradient by the weight of a token that merges with none is 0
            assert (f.double() - e).norm() <= TOLERANCES[dtype] * max(0.1, e.norm())


@needs_library
def test_gradients_by_finite_differences() -> None:
    x, match = tokens(2, 9, 3).requires_grad_(), kth_match(tokens(2, 9, 3), 3)
    size = (sizes(2, 9) + 0.3).requires_grad_()
    for mode in MODES:
        assert torch.autograd.gradcheck(lambda x, s, m=mode: merge(x, match, **arguments(m, s)), (x, size))
    assert torch.autograd.gradcheck(lambda x: merge(x, match)[0], (x,))
    assert torch.autograd.gradcheck(lambda y: unmerge(y, match), (x[:, :3].detach().requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda y: unmerge(y, match), (x[:, :3].detach().requires_grad_(),))
    with backends.use("reference"):
        assert torch.autograd.gradgradcheck(lambda x, s: merge(x, match, s, mode="weighted"), (x, size))


@needs_library
def test_gradients_of_one_argument_or_one_result() -> None:
    x, size, match = tokens(2, 19, 3), sizes(2, 19), bipartite_match(tokens(2, 19, 3), 7)
    *_, dx, dsize = run(x, match, size=size, mode="weighted")
    for of_x in (True, False):
        leaves = x.clone().requires_grad_(of_x), size.clone().requires_grad_(not of_x)
        y, size_out = merge(leaves[0], match, leaves[1], mode="weighted")
        total = sum((t * torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape)).sum() for t in (y, size_out))
        total.backward()
        assert torch.equal(leaves[0].grad if of_x else leaves[1].grad, dx if of_x else dsize)
    leaf = size.clone().requires_grad_()
    merge(x, match, leaf, mode="weighted")[1].sum().backward()
    assert torch.equal(leaf.grad, torch.ones(2, 19, dtype=torch.float64))
    y, size_out = merge(x.requires_grad_(), match)
    assert y.requires_grad and not size_out.requires_grad


@needs_library
def test_transforms_and_what_is_refused() -> None:
    x, match = tokens(2, 9, 3), kth_match(tokens(2, 9, 3), 3)
    leaf = x.clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        inner = bipartite_match(x, 2)
        y, size = merge(x, inner, x[..., 0].square(), mode="weighted")
        return merge(y, kth_match(y, 2))[0].square().sum() + size.sum() + unmerge(y, inner).pow(3).sum()

    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=1e-14, atol=0)
    with backends.use("reference"):
        torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    (gradient,) = torch.autograd.grad(merge(leaf, match)[0].square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="merge: second derivatives are made by the reference backend alone"):
        torch.autograd.grad(gradient.sum(), leaf)
    with pytest.raises(NotImplementedError, match="merge: second derivatives are made by the reference backend alone"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)
    with pytest.raises(NotImplementedError, match="merge: results under vmap are made by the reference backend alone"):
        torch.func.vmap(lambda x: merge(x, match)[0])(x.expand(2, -1, -1, -1))
    with pytest.raises(NotImplementedError, match="unmerge: results under vmap are made by the reference backend alone"):
        torch.func.vmap(lambda x: unmerge(x, match))(x[:, :3].expand(2, -1, -1, -1))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: merge(x, match)[0], (x,), (x,))


@needs_library
def test_backward_twice_and_inference_mode() -> None:
    x, match = tokens(2, 9, 3).requires_grad_(), kth_match(tokens(2, 9, 3), 3)
    y, _ = merge(x, match, mode="max")
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert equal(list(first), list(torch.autograd.grad(y.sum(), x)))
    with torch.inference_mode():
        assert equal([merge(x, match, mode="max")[0], unmerge(y, match)], [y.detach(), unmerge(y.detach(), match)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    x, size, match = tokens(2, 9, 3).float(), sizes(2, 9), kth_match(tokens(2, 9, 3), 3)
    with backends.use(backend):
        expected = run(x, match, size=size, mode="weighted")
        with torch.autocast("cpu", torch.bfloat16):
            found = run(x, match, size=size, mode="weighted")
            assert unmerge(found[0], match).dtype == torch.float32
    assert equal(found, expected)


# --- layouts, threads, torch's machinery ---------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype: torch.dtype, backend: str) -> None:
    wide, weights = tokens(12, 4, 14, dtype=dtype), sizes(12, 4)
    with backends.use(backend):
        for view in (wide.transpose(0, 1), wide[2:, :, ::2].transpose(0, 1), wide.permute(1, 2, 0), wide[:1].expand(5, -1, -1)):
            match = kth_match(tokens(*view.shape[:2], 3), 2)
            turned = Match(*(t.T.contiguous().T for t in match))
            size = weights.T if view.shape[:2] == (4, 12) else sizes(view.shape[1]).expand(view.shape[:2])
            for mode in MODES:
                found = run(view, turned, **arguments(mode, size))
                assert equal(found, run(view.contiguous(), match, **arguments(mode, size.contiguous())))
            y = view[:, : match.kept.shape[1]]
            assert torch.equal(unmerge(y, turned), unmerge(y.contiguous(), match))
        leaf, match = wide.clone().requires_grad_(), kth_match(tokens(12, 4, 3), 2)
        y, size = merge(leaf, match)
        y.sum().backward()  # the gradient that comes in is expanded
        expected = (1 / size).gather(1, match.index)[..., None].expand(leaf.shape)
        assert torch.equal(leaf.grad, expected.to(dtype))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_two_threads_give_the_bits_of_one(dtype: torch.dtype, two_threads: None) -> None:
    x, size, match = tokens(5, 101, 31, dtype=dtype), sizes(5, 101), kth_match(tokens(5, 101, 3), 4)
    for mode in MODES:
        two = run(x, match, **arguments(mode, size))
        torch.set_num_threads(1)
        assert equal(two, run(x, match, **arguments(mode, size)))
        torch.set_num_threads(2)


@needs_library
def test_operator_checks() -> None:
    x, weight, match = tokens(2, 9, 3), sizes(2, 9), kth_match(tokens(2, 9, 3), 3)
    index, *parts = match
    forward, backward = torch.ops.vlpfast.merge_fwd, torch.ops.vlpfast.merge_bwd
    y, total = forward(x, weight, *parts, True, False)
    torch.library.opcheck(forward, (x, weight, *parts, True, False))
    torch.library.opcheck(forward, (x.bfloat16(), None, *parts, False, True))
    torch.library.opcheck(backward, (y, total, index, weight, total, x, True, False, True, True))
    torch.library.opcheck(backward, (y, None, index, None, None, None, False, False, True, False))
    kept, source, target = parts
    for wrong, message in (
        ((x, None, kept, source, target + 1, False, False), "places from 0 to 2"),
        ((x, None, kept + 1, source, target, False, False), "places from 0 to 2"),
        ((x, None, kept, source[:, 1:], target, False, False), "expected the 9 tokens of x"),
        ((x, None, kept, source, target[:, 1:], False, False), "target"),
        ((x, weight[:1], *parts, True, False), "weight"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*wrong)
    for wrong, message in (
        ((y, None, index - 1, None, None, None, False, False, True, False), "places from 0 to 2"),
        ((y, None, index, None, None, None, True, False, True, False), "total"),
        ((y, None, index, None, total, x, True, False, True, True), "grad_total"),
        ((y, total, index, None, total, None, True, False, True, True), "x: expected it"),
        ((y, total, index, None, total, x[:, 1:], True, False, True, True), "x: expected the forward"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*wrong)


@needs_library
def test_compiled() -> None:
    x = tokens(2, 12, 3)

    def loss(x: Tensor, size: Tensor) -> Tensor:
        match = bipartite_match(x, 4)
        y, size = merge(x, match, size, mode="weighted")
        return unmerge(y, match).square().sum() + merge(y, bipartite_match(y, 2), size, mode="max")[0].sum() + size.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = x.clone().requires_grad_(), (sizes(2, 12) + 1).requires_grad_()
        total = function(*leaves)
        results.append([total.detach(), *torch.autograd.grad(total, leaves)])
    for f, e in zip(*results, strict=True):
        torch.testing.assert_close(f, e)
    nothing = torch.compile(lambda x: merge(x, bipartite_match(x, 0))[0].sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(nothing(x), x.sum())
    with FakeTensorMode() as mode:
        assert loss(mode.from_tensor(x), mode.from_tensor(sizes(2, 12))).shape == ()


# --- arguments --------------------------------------------------------------------------------------------------------


X = tokens(2, 12, 3)
MATCH = bipartite_match(X, 4)
OTHER = bipartite_match(X, 3)
WRONG_ARGUMENTS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (merge, {"x": 3}, TypeError, "x: expected a tensor, got int"),
    (merge, {"x": X.long()}, TypeError, "x: expected float32, .* got torch.int64"),
    (merge, {"x": X[0]}, ValueError, r"x: expected shape \[B, N, C\], got \(12, 3\)"),
    (merge, {"match": MATCH.index}, TypeError, "match: expected a Match, got Tensor"),
    (merge, {"x": X[:, 1:]}, ValueError, "match: expected one with 2 x 11 tokens before merging, got 2 x 12"),
    (merge, {"mode": "least"}, ValueError, "mode: expected 'mean', 'weighted', 'sum' or 'max', got 'least'"),
    (merge, {"size": [1.0]}, TypeError, "size: expected a tensor or None, got list"),
    (merge, {"size": torch.ones(2, 12, dtype=torch.bool)}, TypeError, "size: expected float32, .* got torch.bool"),
    (merge, {"size": torch.ones(2, 11)}, ValueError, r"size: expected shape \(2, 12\) or \(2, 12, 1\), got \(2, 11\)"),
    (merge, {"weights": torch.ones(2, 12, 3)}, ValueError, r"weights: expected shape \(2, 12\) or \(2, 12, 1\), got"),
    (merge, {"weights": torch.ones(2, 12), "mode": "sum"}, ValueError, "weights: expected None with mode='sum'"),
    (unmerge, {"y": X}, ValueError, "match: expected one with 2 x 12 tokens after merging, got 2 x 8"),
    (unmerge, {"y": X[:, :8], "match": OTHER}, ValueError, "match: expected one with 2 x 8 tokens after merging, got 2 x 9"),
    (unmerge, {"y": X[:, :8].int()}, TypeError, "y: expected float32"),
    (track, {"place": 3}, TypeError, "place: expected a tensor or None, got int"),
    (track, {"place": torch.ones(2, 3)}, TypeError, "place: expected torch.int64, got torch.float32"),
    (track, {"place": MATCH.index[:1]}, ValueError, r"place: expected shape \[2, N0\], got \(1, 12\)"),
    (track, {"place": None, "match": 3}, TypeError, "match: expected a Match, got int"),
]


@pytest.mark.parametrize(("function", "wrong", "error", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments(function: Any, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {merge: {"x": X}, unmerge: {"y": X[:, :8]}, track: {"place": MATCH.index}}[function]
    with pytest.raises(error, match=message):
        function(**(good | {"match": MATCH} | wrong))


def test_negative_weights_under_debug() -> None:
    weights = torch.ones(2, 12)
    weights[1, 4] = -1
    with debug.use(), pytest.raises(ValueError, match=r"weights: expected numbers in \[0, inf\]"):
        merge(X, MATCH, weights=weights)
