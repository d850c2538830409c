"""Matching and merging tokens: the published rule, properties, gradients, order of what is no number, padding, arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import relative_error
from torch import Tensor

from vlpfast.ops import backends, debug
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.tokens import Match, bipartite_match, kth_match, merge, random_match_2d, track, unmerge

needs_library = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
BACKENDS = [pytest.param("cpp", marks=needs_library), "reference"]
MODES = ("mean", "weighted", "sum", "max", "weights")
SHAPES = [
    (2, 197, 64, 16),
    (3, 17, 5, 4),
    (1, 2, 3, 1),
    (1, 3, 3, 1),
    (2, 10, 33, 5),
    (0, 10, 4, 3),
    (2, 9, 0, 3),
    (2, 50, 768, 24),
]
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def options(mode: str, batch: int, n: int, wide: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What has a gradient beside x, and the rest."""
    generator = torch.Generator().manual_seed(1)
    numbers = {"size": torch.randint(1, 5, (batch, n), generator=generator).to(wide)}
    if mode == "weights":
        numbers["weights"] = torch.rand(batch, n, generator=generator).to(wide)
    return numbers, {"mode": "mean" if mode == "weights" else mode}


def run(backend: str, x: Tensor, match: Match, mode: str) -> list[Tensor]:
    """Merged, sizes, unmerged again, and the gradients of x and of what weighs it."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    numbers, rest = options(mode, *x.shape[:2], wide)
    leaves = [t.detach().requires_grad_() for t in (x, *numbers.values())]
    with backends.use(backend):
        y, size = merge(leaves[0], match, **dict(zip(numbers, leaves[1:], strict=True)), **rest)
        back = unmerge(y, match)
        total = sum(
            (t.to(wide) * torch.linspace(0.5, 1.5, t.numel(), dtype=wide).reshape(t.shape)).sum() for t in (y, size, back)
        )
        gradients = torch.autograd.grad(total, leaves)
    return [y.detach(), size.detach(), back.detach(), *gradients]


# --- the rule ---------------------------------------------------------------------------------------------------------


def published(metric: Tensor, r: int, protect: int) -> tuple[list[int], list[tuple[int, int]]]:
    """One image's rule, token by token: those that stay, in order, and (merged, into) by falling similarity."""
    unit = F.normalize(metric.double(), dim=1).tolist()
    n = len(unit)
    pairs = []
    for i in range(0, n, 2):
        if i >= protect:
            found = [(sum(p * q for p, q in zip(unit[i], unit[j], strict=True)), -j) for j in range(1, n, 2) if j >= protect]
            if found:
                similarity, j = max(found)
                pairs.append((-similarity, i, -j))
    merged = [(i, j) for _, i, j in sorted(pairs)[: min(r, max(0, n - protect) // 2)]]
    gone = {i for i, _ in merged}
    return [i for i in range(0, n, 2) if i not in gone] + list(range(1, n, 2)), merged


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n", "r", "protect"), [(197, 16, 1), (31, 4, 0), (32, 99, 1), (33, 99, 2), (7, 2, 3), (2, 5, 0), (3, 1, 1)]
)
def test_the_published_rule(n: int, r: int, protect: int, backend: str) -> None:
    metric = tokens(2, n, 7)
    with backends.use(backend):
        match = bipartite_match(metric, r, protect=protect)
    for b in range(2):
        kept, merged = published(metric[b], r, protect)
        assert match.kept[b].tolist() == kept
        assert match.source[b].tolist() == [i for i, _ in merged]
        assert [match.kept[b, match.index[b, i]].item() for i, _ in merged] == [j for _, j in merged]
        assert match.index[b, match.kept[b]].tolist() == list(range(len(kept)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_by_score(backend: str) -> None:
    """What is left of A goes on by falling similarity, as in networks without a class token."""
    metric = tokens(3, 40, 6)
    with backends.use(backend):
        match = bipartite_match(metric, 5, protect=0, order="score")
        everything = bipartite_match(metric, 20, protect=0)
    assert torch.equal(torch.cat((match.source, match.kept[:, :15]), 1), everything.source)
    assert torch.equal(match.kept[:, 15:], torch.arange(1, 40, 2).expand(3, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kth_stays(backend: str) -> None:
    metric = tokens(2, 23, 6)
    with backends.use(backend):
        match = kth_match(metric, 4)
    b = torch.arange(3, 23, 4)
    nearest = (F.normalize(metric, dim=2) @ F.normalize(metric[:, b], dim=2).transpose(1, 2)).argmax(2)
    nearest[:, b] = torch.arange(5)
    assert torch.equal(match.kept, b.expand(2, -1)) and torch.equal(match.index, nearest)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_each_cell_is_a_destination(backend: str) -> None:
    metric = tokens(2, 7 * 9, 6)
    with backends.use(backend):
        first, again, other = (
            random_match_2d(metric, 20, (7, 9), cell=(2, 3), generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
        )
        everything = random_match_2d(metric, 999, (7, 9), cell=(2, 3), generator=torch.Generator().manual_seed(5))
    assert torch.equal(first.index, again.index) and not torch.equal(first.kept, other.kept)
    chosen = everything.kept[0]
    assert everything.kept.shape == (2, 9) and torch.equal(first.kept[:, -9:], everything.kept)
    cells = {(int(c) // 9 // 2, int(c) % 9 // 3) for c in chosen}
    assert cells == {(i, j) for i in range(3) for j in range(3)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_random_token_is_any_of_its_cell(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    metric = tokens(1, 24 * 24, 2)
    with backends.use(backend):
        chosen = random_match_2d(metric, 999, (24, 24), generator=generator).kept[0]
    assert torch.bincount(chosen // 24 % 2 * 2 + chosen % 2, minlength=4).min() > 15  # of 144, 36 expected


# --- merging ----------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], mode: str, dtype: torch.dtype) -> None:
    """Against the reference in float64 on the same numbers. Few of them are distinct: largest values have ties."""
    *size, r = shape
    x = (tokens(*size) * 4).round().div(4).to(dtype) if mode == "max" else tokens(*size, dtype=dtype)
    match = bipartite_match(tokens(size[0], size[1], 8, seed=2), r)
    expected = run("reference", x.double(), match, mode)
    for found, e in zip(run("cpp", x, match, mode), expected, strict=True):
        assert relative_error(found, e) <= TOLERANCES[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make", [lambda m: bipartite_match(m, 9), lambda m: kth_match(m, 3), lambda m: random_match_2d(m, 12, (4, 6))]
)
def test_properties(make: Any, backend: str) -> None:
    x, size = tokens(3, 24, 5, dtype=torch.float64), torch.rand(3, 24, dtype=torch.float64)
    with backends.use(backend):
        match = make(tokens(3, 24, 4))
        y, merged = merge(x, match, size, mode="weighted")
        once = unmerge(y, match)
        twice = unmerge(merge(once, match)[0], match)
        torch.testing.assert_close((y * merged[..., None]).sum(1), (x * size[..., None]).sum(1))  # mass
        torch.testing.assert_close(merged.sum(1), size.sum(1))
        torch.testing.assert_close(twice, once)
        assert torch.equal(y[0, 0], x[0, match.kept[0, 0]]) or (match.index[0] == 0).sum() > 1
        order = torch.randperm(3)
        other = Match(*(t[order] for t in match))
        assert torch.equal(merge(x[order], other, size[order], mode="weighted")[0], y[order])
        ones, count = merge(torch.ones_like(x), match, mode="sum")
    assert torch.equal(ones[..., 0], count) and torch.equal(count.sum(1), torch.full((3,), 24.0, dtype=torch.float64))
    assert torch.equal(torch.cat((match.kept, match.source), 1).sort(1).values, torch.arange(24).expand(3, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tracking_through_layers(backend: str) -> None:
    """Each first token's place after three merges: where a mark on it has gone."""
    x, place = torch.eye(20, dtype=torch.float64).expand(2, 20, 20).clone(), None
    with backends.use(backend):
        for layer in range(3):
            match = bipartite_match(tokens(2, x.shape[1], 4, seed=layer), 4)
            x, _ = merge(x, match, mode="sum")
            place = track(place, match)
    assert torch.equal(x.argmax(1), place) and x.sum() == 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_token_is_unchanged_and_weights_of_zero_give_zero(backend: str) -> None:
    x = tokens(1, 6, 4) * 1e-3 + 1
    match = Match(torch.tensor([[0, 1, 3, 5]]), torch.tensor([[2, 4]]), torch.tensor([[0, 1, 2, 2, 1, 3]]))
    size = torch.tensor([[3.0, 0, 0, 7, 0, 0]])
    with backends.use(backend):
        y, merged = merge(x, match, size, mode="weighted")
    assert torch.equal(y[0, 0], x[0, 0]) and torch.equal(y[0, 3], x[0, 5])  # whatever they weigh
    assert not y[0, 1].any() and torch.equal(merged, torch.tensor([[3.0, 0, 7, 0]]))
    torch.testing.assert_close(y[0, 2], x[0, 3])


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_gradients_by_finite_differences(mode: str) -> None:
    numbers, rest = options(mode, 2, 9, torch.float64)
    match = bipartite_match(tokens(2, 9, 4), 3)
    leaves = [t.requires_grad_() for t in (tokens(2, 9, 3, dtype=torch.float64), *numbers.values())]

    def f(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        y, size = merge(x, match, **dict(zip(numbers, values, strict=True)), **rest)
        return y, size, unmerge(y, match)

    with backends.use("cpp"):
        assert torch.autograd.gradcheck(f, leaves)


# --- what is no number, padding -----------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("protect", [0, 1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_the_order_of_everything_else(masked: bool, protect: int) -> None:
    """NaN, infinite and zero vectors, padding: both backends agree on every place."""
    metric = tokens(5, 21, 6)
    metric[0, 3, 2], metric[1, 4, 0], metric[2], metric[4, 6:9] = torch.nan, torch.inf, 0, torch.nan
    mask = torch.rand(5, 21, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[3] = False
    for r in (3, 50):
        for order in ("position", "score")[: 2 - (protect > 0)]:
            arguments = {"r": r, "protect": protect, "order": order, "mask": mask if masked else None}
            with backends.use("cpp"):
                found = bipartite_match(metric, **arguments)
            with backends.use("reference"):
                expected = bipartite_match(metric, **arguments)
            assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_merged_last_and_ties_go_to_the_first(backend: str) -> None:
    metric = torch.ones(1, 12, 3)
    metric[0, 0] = torch.nan
    with backends.use(backend):
        match = bipartite_match(metric, 3, protect=0)
    assert match.source.tolist() == [[2, 4, 6]] and match.index[0, [2, 4, 6]].tolist() == [3, 3, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_merged_with_tokens(backend: str) -> None:
    """Of 30 tokens 20 and 11 are real; r = 7 needs padding in the second image."""
    x, metric = tokens(2, 30, 5), tokens(2, 30, 5, seed=1)
    mask = torch.arange(30) < torch.tensor([[20], [11]])
    with backends.use(backend):
        match = bipartite_match(metric, 7, mask=mask)
        y, size = merge(x, match, mask.float(), mode="weighted")
        short = bipartite_match(metric[:1, :20], 7)
        expected, _ = merge(x[:1, :20], short, torch.ones(1, 20), mode="weighted")
    for b in range(2):
        real = mask[b, match.kept[b]]
        assert torch.equal(mask[b, match.source[b]], real[match.index[b, match.source[b]]])
        assert torch.equal(size[b] > 0, real)
    assert torch.equal(y[0][size[0] > 0], expected[0])  # as without padding


# --- the rest -----------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_give_the_bits_of_one(dtype: torch.dtype, two_threads: None) -> None:
    x, metric = tokens(5, 67, 130, dtype=dtype), tokens(5, 67, 40, dtype=dtype)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        with backends.use("cpp"):
            match = bipartite_match(metric, 20)
        results.append([*match, *(t for mode in MODES for t in run("cpp", x, match, mode))])
    assert all(torch.equal(f, e) for other in results[1:] for f, e in zip(other, results[0], strict=True))


@needs_library
def test_strides() -> None:
    metric, x = tokens(40, 3, 21).permute(1, 2, 0), tokens(2, 3, 21, 40)[0].transpose(1, 2).contiguous().transpose(1, 2)
    wide = tokens(3, 21, 80)[..., ::2]
    one = tokens(1, 21, 40).expand(3, -1, -1)
    with backends.use("cpp"):
        for m, v in ((metric, x), (wide, one), (one, wide)):
            match = bipartite_match(m, 6)
            assert all(torch.equal(f, e) for f, e in zip(match, bipartite_match(m.contiguous(), 6), strict=True))
            assert torch.equal(merge(v, match)[0], merge(v.contiguous(), match)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_changes_no_shape(backend: str) -> None:
    with backends.use(backend):
        for dtype in (torch.bfloat16, torch.float16):
            match = bipartite_match(tokens(2, 50, 16, dtype=dtype), 11)
            y, size = merge(tokens(2, 50, 8, dtype=dtype), match)
            assert [t.shape[1] for t in match] == [39, 11, 50] and y.dtype == dtype and size.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_merge(backend: str) -> None:
    with backends.use(backend):
        for n, r, protect in ((5, 0, 1), (0, 3, 1), (1, 3, 1), (2, 3, 1), (4, 2, 4), (4, 2, 9)):
            x = tokens(2, n, 3)
            match = bipartite_match(x, r, protect=protect)
            y, size = merge(x, match)
            assert torch.equal(y, x) and torch.equal(size, torch.ones(2, n)) and torch.equal(unmerge(y, match), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    x, metric = tokens(2, 31, 8), tokens(2, 31, 8, seed=1)
    with backends.use(backend):
        match = bipartite_match(metric, 5)
        y, _ = merge(x, match)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(torch.equal(f, e) for f, e in zip(bipartite_match(metric, 5), match, strict=True))
            assert torch.equal(merge(x, match)[0], y)


@needs_library
def test_transforms_and_what_is_refused() -> None:
    x, size = tokens(2, 9, 3, dtype=torch.float64), torch.rand(2, 9, dtype=torch.float64)
    match = bipartite_match(tokens(2, 9, 4), 3)

    def f(x: Tensor) -> Tensor:
        return (unmerge(merge(x, match, size, mode="weighted")[0], match) ** 2).sum()

    with backends.use("cpp"):
        found = torch.func.grad(f)(x)
    with backends.use("reference"):
        torch.testing.assert_close(found, torch.func.grad(f)(x))
    leaf = x.clone().requires_grad_()
    with backends.use("cpp"), pytest.raises(NotImplementedError, match="second derivatives"):
        (dx,) = torch.autograd.grad(merge(leaf, match, size, mode="weighted")[0].square().sum(), leaf, create_graph=True)
        dx.sum().backward()
    y = tokens(2, 6, 3, dtype=torch.float64).requires_grad_()
    with backends.use("cpp"):  # linear: any order
        assert torch.autograd.gradgradcheck(lambda y: unmerge(y, match) ** 3, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend: str) -> None:
    def layer(x: Tensor, metric: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        match = bipartite_match(metric, 4)
        y, size = merge(x, match, size, mode="weighted")
        return y, size, unmerge(y, match)

    x, metric, size = tokens(2, 21, 6).requires_grad_(), tokens(2, 21, 4), torch.rand(2, 21)
    with backends.use(backend):
        expected = layer(x, metric, size)
        (dx,) = torch.autograd.grad(sum(t.square().sum() for t in expected), x)
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, metric, size)
        (compiled,) = torch.autograd.grad(sum(t.square().sum() for t in found), x)
    for f, e in zip((*found, compiled), (*expected, dx), strict=True):
        torch.testing.assert_close(f, e)


@needs_library
def test_opcheck() -> None:
    metric, x, mask = tokens(2, 11, 4), tokens(2, 11, 3), torch.ones(2, 11, dtype=torch.bool)
    places = torch.arange(11)
    match_tokens, merge_fwd, merge_bwd = (
        getattr(torch.ops.vlpfast, name).default for name in ("match_tokens", "merge_fwd", "merge_bwd")
    )
    torch.library.opcheck(match_tokens, (metric, places[::2], places[1::2], 3, 1, mask, False))
    match, weight = bipartite_match(metric, 3), torch.rand(2, 11)
    torch.library.opcheck(merge_fwd, (x, *match, weight, True, False))
    y, total = merge_fwd(x, *match, weight, True, False)
    torch.library.opcheck(merge_bwd, (y, total, x, *match, weight, True, False, True, True))
    torch.library.opcheck(merge_bwd, (y, None, x, *match, None, False, True, True, False))


def test_products_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        bipartite_match(tokens(2, 11, 4), 3)
    assert counter.get_total_flops() == 2 * 2 * 6 * 5 * 4


WRONG = {
    "metric: expected a tensor, got list": lambda x, m: bipartite_match([], 1),
    "metric: expected float32, float64, bfloat16 or float16, got torch.int64": lambda x, m: bipartite_match(x.long(), 1),
    "metric: expected shape [B, N, C], got (9, 3)": lambda x, m: bipartite_match(x[0], 1),
    "r: expected >= 0, got -1": lambda x, m: bipartite_match(x, -1),
    "r: expected an int, got float": lambda x, m: bipartite_match(x, 0.5),
    "protect: expected >= 0, got -2": lambda x, m: bipartite_match(x, 1, protect=-2),
    "order: expected 'position' or 'score', got 'size'": lambda x, m: bipartite_match(x, 1, order="size"),
    "order: expected 'position' with protected tokens, whose place would change, got 'score' and 1": lambda x, m: bipartite_match(
        x, 1, order="score"
    ),
    "mask: expected torch.bool, got torch.float32": lambda x, m: bipartite_match(x, 1, mask=x[..., 0]),
    "mask: expected shape (2, 9), got (2, 8)": lambda x, m: bipartite_match(x, 1, mask=x[:, 1:, 0] > 0),
    "k: expected >= 2, got 1": lambda x, m: kth_match(x, 1),
    "k: expected at most the 9 tokens, got 10": lambda x, m: kth_match(x, 10),
    "grid: expected h * w = 9 tokens, got 2 * 4": lambda x, m: random_match_2d(x, 1, (2, 4)),
    "cell: expected at most the grid (3, 3), got (4, 2)": lambda x, m: random_match_2d(x, 1, (3, 3), cell=(4, 2)),
    "cell[1]: expected >= 1, got 0": lambda x, m: random_match_2d(x, 1, (3, 3), cell=(2, 0)),
    "grid: expected two numbers, got 9": lambda x, m: random_match_2d(x, 1, 9),
    "x: expected shape [B, N, C], got (9, 3)": lambda x, m: merge(x[0], m),
    "x: expected [2, 9, C] for this match, got (2, 8, 3)": lambda x, m: merge(x[:, 1:], m),
    "y: expected [2, 6, C] for this match, got (2, 9, 3)": lambda x, m: unmerge(x, m),
    "match: expected a Match, got tuple": lambda x, m: merge(x, tuple(m)),
    "match.source: expected an int64 tensor, got torch.int32": lambda x, m: merge(x, m._replace(source=m.source.int())),
    "match: expected [B, N - r], [B, r] and [B, N], got (2, 5), (2, 3), (2, 9)": lambda x, m: merge(
        x, m._replace(kept=m.kept[:, 1:])
    ),
    "mode: expected 'mean', 'weighted', 'sum' or 'max', got 'median'": lambda x, m: merge(x, m, mode="median"),
    "size: expected shape (2, 9) as the tokens have, got (2, 9, 1)": lambda x, m: merge(x, m, x[..., :1]),
    "weights: expected None but with mode='mean', got weights and mode='sum'": lambda x, m: merge(
        x, m, weights=x[..., 0], mode="sum"
    ),
    "place: expected an int64 tensor or None, got torch.float32": lambda x, m: track(x[..., 0], m),
    "place: expected [2, tokens], got (1, 9)": lambda x, m: track(m.index[:1], m),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    x = tokens(2, 9, 3)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        WRONG[message](x, bipartite_match(x, 3))


def test_values_are_looked_at_when_debugging() -> None:
    metric = tokens(2, 9, 3)
    metric[1, 2, 0] = torch.nan
    bipartite_match(metric, 2)
    with debug.use(), pytest.raises(ValueError, match=r"metric: expected finite numbers, .* \[1, 2, 0\]"):
        bipartite_match(metric, 2)
    x = tokens(2, 9, 3)
    with debug.use(), pytest.raises(ValueError, match="weights: expected numbers in"):
        merge(x, bipartite_match(x, 2), weights=-x[..., 0].abs())


@needs_library
def test_a_match_that_is_none_is_refused_by_the_kernel() -> None:
    x = tokens(1, 4, 3)
    for kept, source, index in (
        ([0, 1, 1], [2], [0, 1, 1, 2]),
        ([0, 1, 3], [2], [0, 2, 1, 1]),
        ([0, 1, 3], [2], [0, 1, 3, 2]),
        ([0, 1, 9], [2], [0, 1, 1, 2]),
    ):
        with backends.use("cpp"), pytest.raises(RuntimeError, match="match: expected"):
            merge(x, Match(*(torch.tensor([t]) for t in (kept, source, index))))
