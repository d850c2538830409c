"""Bipartite matching and its variants: the published rule by loops, ties, NaN, padding, threads, arguments."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends, debug
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.tokens import Match, bipartite_match, kth_match, random_match_2d

needs_library = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
BACKENDS = [pytest.param("cpp", marks=needs_library), "reference"]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equal(found: Match, expected: Match) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def check_consistent(match: Match, n: int) -> None:
    """The fields of one match say the same."""
    index, kept, source, target = match
    batch = len(index)
    assert index.shape == (batch, n) and kept.shape[1] + source.shape[1] == n and source.shape == target.shape
    assert all(t.dtype == torch.int64 for t in match)
    assert torch.equal(torch.cat([kept, source], 1).sort(1).values, torch.arange(n).expand(batch, n))  # each token once
    assert torch.equal(index.gather(1, kept), torch.arange(kept.shape[1]).expand_as(kept))
    assert torch.equal(index.gather(1, source), target)


# --- the published rule -----------------------------------------------------------------------------------------------


def by_the_rule(metric: Tensor, in_b: list[int], r: int, protect: int, order: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Of one image [N, C]: the tokens of the output in order, and (source, destination) of what merges, most similar first."""
    in_a = [i for i in range(len(metric)) if i not in in_b]
    best = {}
    for i in in_a:
        if i < protect:
            continue
        for j in in_b:
            if j >= protect:
                similarity = float(metric[i] @ metric[j] / (metric[i].norm() * metric[j].norm()))
                if i not in best or similarity > best[i][0]:
                    best[i] = (similarity, j)
    ranked = sorted(best, key=lambda i: -best[i][0])
    rest = ranked[r:] if order == "score" else sorted(ranked[r:])
    return [*range(protect), *rest, *(j for j in in_b if j >= protect)], [(i, best[i][1]) for i in ranked[:r]]


def check_rule(metric: Tensor, match: Match, in_b: list[int], r: int, protect: int, order: str) -> None:
    check_consistent(match, metric.shape[1])
    for image, kept, source, target in zip(metric, match.kept, match.source, match.target, strict=True):
        output, merged = by_the_rule(image, in_b, r, protect, order)
        assert kept.tolist() == output
        assert source.tolist() == [i for i, _ in merged]
        assert kept[target].tolist() == [j for _, j in merged]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("protect", [0, 1, 2, 3])
@pytest.mark.parametrize(("n", "r"), [(3, 1), (4, 1), (17, 5), (30, 13), (70, 1)])
def test_the_rule(n: int, r: int, protect: int, order: str, backend: str) -> None:
    metric = tokens(3, n, 5, seed=n)
    with backends.use(backend):
        match = bipartite_match(metric, r, protect=protect, order=order)
    if n - protect > 1:
        check_rule(metric, match, list(range(1, n, 2)), min(r, (n - protect) // 2), protect, order)
    else:
        check_identity(match, n)


def check_identity(match: Match, n: int) -> None:
    check_consistent(match, n)
    assert torch.equal(match.index, torch.arange(n).expand_as(match.index)) and match.source.shape[1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "k"), [(12, 2), (12, 3), (13, 3), (14, 3), (40, 7), (5, 5)])
def test_every_kth_stays(n: int, k: int, backend: str) -> None:
    metric = tokens(3, n, 5)
    with backends.use(backend):
        match = kth_match(metric, k)
        check_identity(kth_match(metric, 1), n)
    check_rule(metric, match, list(range(k - 1, n, k)), n - n // k, 0, "position")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("h", "w", "sy", "sx", "protect"), [(4, 6, 2, 2, 0), (5, 7, 2, 3, 1), (3, 3, 3, 1, 2), (1, 9, 1, 4, 0)])
def test_one_of_each_cell_stays(h: int, w: int, sy: int, sx: int, protect: int, backend: str) -> None:
    metric = tokens(2, protect + h * w, 5)
    seen = set()
    for number in range(12):
        options = {"sy": sy, "sx": sx, "protect": protect, "seed": torch.tensor(number)}
        with backends.use(backend):
            everything = random_match_2d(metric, h, w, h * w, **options)
            match = random_match_2d(metric, h, w, 3, order="score", **options)
        in_b = everything.kept[0, protect:].tolist()
        assert torch.equal(everything.kept, everything.kept[:1].expand(2, -1))
        cells = [((i - protect) // w // sy, (i - protect) % w // sx) for i in in_b]
        assert sorted(cells) == [(y, x) for y in range(h // sy) for x in range(w // sx)]
        check_rule(metric, everything, in_b, h * w - len(in_b), protect, "position")
        check_rule(metric, match, in_b, 3, protect, "score")
        seen |= {i - in_b[0] for i in in_b[:1]} | {tuple(in_b)}
    assert len(seen) > 4  # draws differ


def test_draws_are_the_seeds() -> None:
    """Constants, so that a run that is resumed elsewhere or later draws what it would have drawn here."""
    metric = tokens(1, 24, 3)
    match = random_match_2d(metric, 4, 6, 18, seed=torch.tensor(5))
    assert match.kept.tolist() == [[2, 7, 11, 15, 16, 19]]
    torch.manual_seed(3)
    first = random_match_2d(metric, 4, 6, 18)
    state = torch.get_rng_state()
    second = random_match_2d(metric, 4, 6, 18)
    torch.set_rng_state(state)
    assert equal(random_match_2d(metric, 4, 6, 18), second) and not equal(first, second)
    counts = torch.zeros(24)
    for number in range(400):
        counts[random_match_2d(metric, 4, 6, 18, seed=torch.tensor(number)).kept] += 1
    assert (counts - 100).abs().max() < 4 * math.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_zero_vectors(backend: str) -> None:
    with backends.use(backend):
        same = bipartite_match(torch.ones(1, 9, 3), 3)
        zeros = bipartite_match(torch.zeros(1, 9, 3), 3)
        later = F.one_hot(torch.tensor([[0, 1, 0, 0, 2, 0, 1, 2, 2]])).float()  # the first of those equally near
        later = bipartite_match(later, 4, protect=0)
        between = torch.tensor([[[0.0, 0], [-1, 0], [1, 0], [0, 0], [-1, 0], [-1, 0]]])  # 0: nearer than what points away
        between = bipartite_match(between, 3, protect=0)
    for match in (same, zeros):  # the lowest places of A, into the lowest of B
        assert match.source.tolist() == [[2, 4, 6]] and match.kept[0, match.target[0]].tolist() == [1, 1, 1]
    assert between.source.tolist() == [[4, 0, 2]] and between.kept[0, between.target[0]].tolist() == [1, 1, 3]
    assert later.source.tolist() == [[0, 2, 4, 6]] and later.kept[0, later.target[0]].tolist() == [3, 3, 7, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_comes_last(bad: float, backend: str) -> None:
    metric = tokens(1, 12, 4)
    with backends.use(backend):
        before = bipartite_match(metric, 5, protect=0)
        first = before.source[0, 0].item()
        of_a, of_b, all_b = metric.clone(), metric.clone(), metric.clone()
        of_a[0, first, 2] = bad
        of_b[0, 3, 1] = bad
        all_b[0, 1::2, 0] = bad
        match = bipartite_match(of_a, 6, protect=0)
        assert match.source[0, -1] == first and match.kept[0, match.target[0, -1]] == 1  # to the lowest place
        assert bipartite_match(of_a, 5, protect=0).kept[0, 0] == first
        match = bipartite_match(of_b, 6, protect=0)
        assert 3 not in match.kept[0, match.target[0]]
        match = bipartite_match(all_b, 6, protect=0)
        assert match.source.tolist() == [[0, 2, 4, 6, 8, 10]] and set(match.kept[0, match.target[0]].tolist()) == {1}
    with debug.use(), pytest.raises(ValueError, match="metric: expected finite numbers"):
        bipartite_match(of_a, 5)
    with debug.use():  # what is masked may be anything
        bipartite_match(of_a, 5, mask=torch.arange(12)[None] != first)


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_meets_padding_alone(backend: str) -> None:
    lengths = torch.tensor([20, 19, 12, 7, 3, 2])
    mask = torch.arange(20) < lengths[:, None]
    metric = tokens(6, 20, 4).masked_fill(~mask[..., None], torch.nan)
    for protect in (0, 1):
        with backends.use(backend):
            match = bipartite_match(metric, 8, protect=protect, mask=mask)
            alone = [bipartite_match(metric[i : i + 1, :length], 8, protect=protect) for i, length in enumerate(lengths)]
        check_consistent(match, 20)
        assert torch.equal(mask.gather(1, match.source), mask.gather(1, match.kept.gather(1, match.target)))
        for i, one in enumerate(alone):  # the real ones merge as if there were no others
            count = one.source.shape[1]
            assert torch.equal(match.source[i, :count], one.source[0])
            assert torch.equal(match.kept[i, match.target[i, :count]], one.kept[0, one.target[0]])
            if count < 8 and lengths[i] > 2:
                padding = range(2 * ((lengths[i] + 1) // 2), 20, 2)
                more = [] if lengths[i] % 2 == 0 else [lengths[i].item() - 1]  # of A, it has a partner with protect = 0
                left = [p for p in more if p not in one.source[0]]
                assert match.source[i, count:].tolist() == [*left, *padding][: 8 - count]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_without_a_partner_goes_in_turn(backend: str) -> None:
    metric = tokens(3, 8, 4)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, 1::2] = False  # B is padding alone: no two real tokens may meet
    mask[1, 0::2] = False  # A is
    mask[2] = False
    with backends.use(backend):
        match = bipartite_match(metric, 4, protect=0, mask=mask)
        check_consistent(match, 8)
        assert match.source.tolist() == [[0, 2, 4, 6]] * 3
        assert match.target.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]]
        match = random_match_2d(metric, 1, 8, 6, sy=1, sx=4, mask=mask, seed=torch.tensor(0))
        check_consistent(match, 8)
        assert match.target[2].tolist() == [0] * 6


@needs_library
@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed: int) -> None:
    """Padding, NaN, ties, sizes around what the kernels take at once."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, n, c = rng.randint(1, 4), rng.choice([rng.randint(1, 60), rng.randint(60, 150)]), rng.choice([1, 3, 16, 17, 64, 70])
    metric = torch.randn(b, n, c, generator=generator, dtype=torch.float64)
    if rng.random() < 0.3:
        metric[torch.rand(b, n, generator=generator) < 0.3] = torch.nan
    if rng.random() < 0.3:
        metric = F.one_hot(torch.randint(c, (b, n), generator=generator), c).double()
    mask = rng.choice([None, torch.rand(b, n, generator=generator) < rng.choice([0.1, 0.5, 0.9])])
    more: dict[str, Any] = {"mask": mask}
    r, protect, order = rng.randint(0, n), rng.randint(0, 4), rng.choice(["position", "score"])
    grid = {"sy": 1, "sx": min(n, 3), "seed": torch.tensor(seed)}
    found, expected = [], []
    for backend, to in (("cpp", found), ("reference", expected)):
        with backends.use(backend):
            to.append(bipartite_match(metric, r, protect=protect, order=order, **more))
            to.append(kth_match(metric, min(n, protect + 1), **more))
            to.append(random_match_2d(metric, 1, n, r, order=order, **grid, **more))
    for f, e in zip(found, expected, strict=True):
        check_consistent(f, n)
        assert equal(f, e)


# --- sizes, dtypes, layouts, instruction sets, threads ----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_and_empty(backend: str) -> None:
    with backends.use(backend):
        for n in (0, 1, 2, 3):
            for protect in (0, 1, 5):
                for r in (0, 1, 9):
                    match = bipartite_match(tokens(2, n, 3), r, protect=protect)
                    check_consistent(match, n)
                    assert match.source.shape[1] == min(r, max(0, (n - protect) // 2))
        check_identity(bipartite_match(tokens(2, 7, 3), 3, protect=7), 7)
        check_identity(bipartite_match(tokens(2, 7, 3), 0), 7)
        check_consistent(bipartite_match(tokens(0, 7, 3), 2), 7)
        check_consistent(bipartite_match(tokens(2, 7, 0), 2), 7)
        check_consistent(kth_match(tokens(2, 0, 3), 2), 0)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """What counts is how near the numbers are, not how the dtype would round their similarities."""
    for n, r in ((197, 16), (50, 25), (98, 40)):
        metric = tokens(3, n, 64).to(dtype)
        assert equal(bipartite_match(metric, r), bipartite_match(metric.double(), r))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layouts(dtype: torch.dtype, backend: str) -> None:
    wide = tokens(30, 4, 12, dtype=dtype)
    mask = torch.rand(30, 4, generator=torch.Generator().manual_seed(1)) < 0.8
    with backends.use(backend):
        for view in (wide.transpose(0, 1), wide[1::2, :, ::2].transpose(0, 1), wide.permute(1, 2, 0), wide[:1].expand(3, -1, -1)):
            assert equal(bipartite_match(view, 3), bipartite_match(view.contiguous(), 3))
        turned = bipartite_match(wide.transpose(0, 1), 3, mask=mask.T)
        assert equal(turned, bipartite_match(wide.transpose(0, 1).contiguous(), 3, mask=mask.T.contiguous()))
        assert equal(
            bipartite_match(wide, 1, mask=mask[:1].expand(30, -1)), bipartite_match(wide, 1, mask=mask[:1].repeat(30, 1))
        )


@needs_library
def test_other_instruction_sets() -> None:
    """torch's own variable limits ours too."""
    code = 'import sys; sys.path[:0] = ["tests/ops"]; import torch, test_tokens_matching as t\nt.test_dtypes(torch.float32)'
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_two_threads_give_what_one_gives(dtype: torch.dtype, two_threads: None) -> None:
    metric = tokens(9, 101, 31, dtype=dtype)
    two = bipartite_match(metric, 30)
    torch.set_num_threads(1)
    assert equal(two, bipartite_match(metric, 30))


# --- torch's machinery, arguments -------------------------------------------------------------------------------------


@needs_library
def test_operator_checks() -> None:
    metric, mask = tokens(2, 9, 3), torch.ones(2, 9, dtype=torch.bool)
    a, b = torch.tensor([0, 1, 2, 4, 5, 7, 8]), torch.tensor([3, 6])
    for arguments in ((metric, None, None, 2, 1, 3, False, None), (metric.bfloat16(), a, b, 0, 0, 4, True, mask)):
        torch.library.opcheck(torch.ops.vlpfast.match_fwd, arguments)
    for wrong, message in (
        ((metric, a, None, 2, 1, 3, False, None), "a, b"),
        ((metric, a.flip(0), b, 2, 1, 3, False, None), "ascending"),
        ((metric, a[1:], b, 2, 1, 3, False, None), "expected 9 places"),
        ((metric, a, b + 6, 2, 1, 3, False, None), "each of 0 to 8 once"),
        ((metric, None, None, 2, 1, 5, False, None), "r: expected 1 to 4"),
        ((metric, None, None, 1, 1, 1, False, None), "every"),
        ((metric, None, None, 2, 10, 1, False, None), "protect"),
        ((metric, None, None, 2, 1, 1, False, mask[:, :5]), "mask"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vlpfast.match_fwd(*wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_and_fake(backend: str) -> None:
    metric, mask = tokens(2, 12, 3), torch.ones(2, 12, dtype=torch.bool)

    def both(metric: Tensor, mask: Tensor, seed: Tensor) -> tuple[Match, Match]:
        return bipartite_match(metric, 4, mask=mask), random_match_2d(metric, 3, 4, 5, seed=seed)

    with backends.use(backend):
        expected = both(metric, mask, torch.tensor(1))
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(metric, mask, torch.tensor(1))
        assert all(equal(f, e) for f, e in zip(compiled, expected, strict=True))
        with FakeTensorMode() as mode:  # nothing looks at a value
            fake = both(*(mode.from_tensor(t) for t in (metric, mask, torch.tensor(1))))
        assert [t.shape for m in fake for t in m] == [t.shape for m in expected for t in m]


@needs_library
def test_flops_autocast_and_gradients() -> None:
    metric = tokens(2, 11, 3, dtype=torch.float32).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        match = bipartite_match(metric, 4)
        kth_match(metric, 4)
    assert counter.get_total_flops() == 2 * 2 * 3 * (6 * 5 + 9 * 2)
    assert not any(t.requires_grad for t in match)
    for backend in ("cpp", "reference"):
        with backends.use(backend), torch.autocast("cpu", torch.bfloat16):
            assert equal(bipartite_match(metric, 4), match)


GOOD: dict[str, Any] = {"metric": tokens(2, 12, 3), "r": 3}
WRONG_ARGUMENTS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (bipartite_match, {"metric": 3}, TypeError, "metric: expected a tensor, got int"),
    (
        bipartite_match,
        {"metric": torch.ones(2, 12, 3, dtype=torch.int64)},
        TypeError,
        "metric: expected float32, .* got torch.int64",
    ),
    (bipartite_match, {"metric": torch.ones(12, 3)}, ValueError, r"metric: expected shape \[B, N, C\], got \(12, 3\)"),
    (bipartite_match, {"r": -1}, ValueError, "r: expected >= 0, got -1"),
    (bipartite_match, {"r": 2.0}, TypeError, "r: expected an int, got float"),
    (bipartite_match, {"protect": -1}, ValueError, "protect: expected >= 0, got -1"),
    (bipartite_match, {"protect": True}, TypeError, "protect: expected an int, got bool"),
    (bipartite_match, {"order": "rank"}, ValueError, "order: expected 'position' or 'score', got 'rank'"),
    (bipartite_match, {"mask": torch.ones(2, 12)}, TypeError, "mask: expected torch.bool"),
    (bipartite_match, {"mask": torch.ones(2, 11, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2, 12\)"),
    (kth_match, {"k": 0}, ValueError, "k: expected >= 1, got 0"),
    (kth_match, {"k": 13}, ValueError, "k: expected at most N = 12, the tokens of metric, got 13"),
    (random_match_2d, {"h": 3, "w": 5}, ValueError, r"metric: expected protect \+ h \* w = 15 tokens, got 12"),
    (random_match_2d, {"h": 3, "w": 4, "protect": 1}, ValueError, "metric: expected protect .* = 13 tokens, got 12"),
    (random_match_2d, {"h": 0, "w": 4}, ValueError, "h: expected >= 1, got 0"),
    (random_match_2d, {"h": 3, "w": 4, "sy": 4}, ValueError, "sy, sx: expected a cell within 3 x 4 tokens, got 4 x 2"),
    (random_match_2d, {"h": 3, "w": 4, "seed": 5}, TypeError, "seed: expected a tensor, got int"),
    (random_match_2d, {"h": 3, "w": 4, "seed": torch.ones(())}, TypeError, "seed: expected torch.int64"),
    (random_match_2d, {"h": 3, "w": 4, "order": 1}, ValueError, "order: expected 'position' or 'score', got 1"),
]


@pytest.mark.parametrize(("function", "wrong", "error", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments(function: Any, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"metric": GOOD["metric"]} if function is kth_match else GOOD
    with pytest.raises(error, match=message):
        function(**(good | wrong))
