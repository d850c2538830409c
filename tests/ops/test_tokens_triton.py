"""The Triton kernels of matching, merging, selection and masking: dtypes, tiles, offsets, torch's machinery, compiled code.

Without a GPU they run in Triton's interpreter (tests/conftest.py).
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import OPS, compare, mask
from conformance_tokens import add_merge_norm as add_merge_norm_by_index
from conformance_tokens import images, residuals
from test_tokens_masking import GOLDEN, SEED
from test_tokens_matching import check_consistent, check_rule
from test_tokens_merging import MODES, TOLERANCES, sizes, tokens
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.tokens import (
    Match,
    add_merge_norm,
    bipartite_match,
    gather_tokens,
    kth_match,
    merge,
    random_keep,
    random_mask,
    random_match_2d,
    restore,
    select,
    unmerge,
)

pytestmark = [pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

ROOT = Path(__file__).parents[2]
DEVICE = backends.device_type("triton")
OPERATORS = torch.ops.vlpfast
NAN, INF = math.nan, math.inf


def moved(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """Tensors of `value` on the device, floating ones in `dtype`; layouts stay where the device does."""
    if isinstance(value, Match):
        return Match(*(t.to(device) for t in value))
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def on(backend: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Tensor]:
    """The results on the CPU."""
    device = DEVICE if backend == "triton" else "cpu"
    with backends.use(backend):
        results = function(*(moved(a, device) for a in arguments), **{k: moved(v, device) for k, v in options.items()})
    return [t.detach().cpu() for t in (results if isinstance(results, tuple) else (results,))]


def both(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    return on("triton", function, *arguments, **options), on("reference", function, *arguments, **options)


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """By the norm; `expected` in float64."""
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * max(0.1, float(expected.norm()))


# --- matching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "r", "protect", "order", "dtype"),
    [
        (3, 5, 1, 0, "position", torch.float32),
        (50, 64, 25, 0, "score", torch.bfloat16),
        (139, 64, 16, 1, "position", torch.bfloat16),
        (131, 33, 40, 3, "position", torch.float16),
        (98, 70, 40, 2, "score", torch.float32),
    ],
)
def test_the_rule(n: int, c: int, r: int, protect: int, order: str, dtype: torch.dtype) -> None:
    """By how near the numbers are: the reference in float64 finds no other order."""
    metric = tokens(2, n, c, seed=n, dtype=dtype)
    found = on("triton", bipartite_match, metric, r, protect=protect, order=order)
    assert equal(found, on("reference", bipartite_match, metric.double(), r, protect=protect, order=order))
    check_rule(metric.double(), Match(*found), list(range(1, n, 2)), r, protect, order)


@pytest.mark.parametrize("seed", range(int(os.environ.get("VLPFAST_RANDOM_CASES", "4"))))
def test_random_matches(seed: int) -> None:
    """Padding, NaN, ties, sizes around a tile; every k-th, and random sets B, whose draws are equal on every backend."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, n, c = rng.randint(1, 3), rng.choice([rng.randint(1, 40), rng.randint(120, 140)]), rng.choice([1, 3, 16, 35])
    metric = torch.randn(b, n, c, generator=generator)
    if rng.random() < 0.3:
        metric[torch.rand(b, n, generator=generator) < 0.3] = rng.choice([NAN, INF])
    if rng.random() < 0.4:  # many exact ties
        metric = F.one_hot(torch.randint(c, (b, n), generator=generator), c).float()
    more: dict[str, Any] = {"mask": rng.choice([None, torch.rand(b, n, generator=generator) < rng.choice([0.1, 0.5, 0.9])])}
    r, protect, order = rng.randint(0, n), rng.randint(0, 4), rng.choice(["position", "score"])
    for function, arguments, options in (
        (bipartite_match, (metric, r), {"protect": protect, "order": order}),
        (kth_match, (metric, min(n, protect + 1)), {}),
        (random_match_2d, (metric, 1, n, r), {"order": order, "sy": 1, "sx": min(n, 3), "seed": torch.tensor(seed)}),
    ):
        found, expected = both(function, *arguments, **options, **more)
        check_consistent(Match(*found), n)
        assert equal(found, expected)


def test_ties_zero_vectors_and_what_is_no_number() -> None:
    def matched(metric: Tensor, r: int, protect: int = 0, **more: Any) -> tuple[list[int], list[int]]:
        """The sources of the first image, and the tokens that they merge into."""
        match = Match(*on("triton", bipartite_match, metric, r, protect=protect, **more))
        return match.source[0].tolist(), match.kept[0, match.target[0]].tolist()

    for equals in (torch.ones(1, 9, 3), torch.zeros(1, 9, 3)):  # the lowest places of A, into the lowest of B
        assert matched(equals, 3, 1) == ([2, 4, 6], [1, 1, 1])
    assert matched(torch.ones(1, 140, 3), 2, 1) == ([2, 4], [1, 1])  # of several blocks the first
    near = torch.tensor([[[0.0, 0], [-1, 0], [1, 0], [0, 0], [-1, 0], [-1, 0]]])  # 0: nearer than what points away
    assert matched(near, 3) == ([4, 0, 2], [1, 1, 3])
    metric = tokens(1, 12, 4, dtype=torch.float32)
    (first, *_), _ = matched(metric, 5)
    for bad in (NAN, INF, -INF):
        of_a, of_b, of_all_b = metric.clone(), metric.clone(), metric.clone()
        of_a[0, first, 2] = of_b[0, 3, 1] = bad
        of_all_b[0, 1::2, 0] = bad
        source, target = matched(of_a, 6)
        assert source[-1] == first and target[-1] == 1  # last, to the lowest place
        assert 3 not in matched(of_b, 6)[1]
        assert matched(of_all_b, 6) == ([0, 2, 4, 6, 8, 10], [1] * 6)
    padding = torch.ones(1, 8, dtype=torch.bool)
    padding[:, 1::2] = False  # B is padding alone: no two real tokens may meet
    assert matched(tokens(1, 8, 4, dtype=torch.float32), 4, mask=padding) == ([0, 2, 4, 6], [1, 3, 5, 7])
    padding = torch.tensor([[True, True, True, True, False, True, False, True]])  # of A alone: in turn
    source, target = matched(tokens(1, 8, 4, dtype=torch.float32), 4, mask=padding)
    assert source[2:] == [4, 6] and target[2:] == [1, 3]


# --- merging ----------------------------------------------------------------------------------------------------------


def merged(x: Tensor, match: Match, mode: dict[str, Any], size: Tensor) -> tuple[Tensor, ...]:
    """y, its sizes, and the gradients of a weighted sum of them by x and by what weighs."""
    leaves = [t.detach().requires_grad_() for t in (x, size)]
    y, total = merge(leaves[0], match, **({"weights": leaves[1]} if "weights" in mode else mode | {"size": leaves[1]}))
    weighed = sum((t.double() * torch.linspace(0.5, 1.5, t.numel(), device=x.device).reshape(t.shape)).sum() for t in (y, total))
    return y, total, *torch.autograd.grad(weighed, leaves)


@pytest.mark.parametrize(
    ("mode", "n", "c", "dtype"),
    [
        *((mode, 21, 17, torch.float32) for mode in MODES),
        ({"mode": "weighted"}, 2, 1, torch.float32),
        ({"weights": True}, 5, 0, torch.float16),
        ({"mode": "weighted"}, 35, 24, torch.bfloat16),
        ({"mode": "max"}, 5, 40, torch.float16),
    ],
    ids=str,
)
def test_merging_against_the_reference_in_float64(mode: dict[str, Any], n: int, c: int, dtype: torch.dtype) -> None:
    x, size = tokens(2, n, c, dtype=dtype), sizes(2, n).float()
    metric = tokens(2, n, 4)
    match = bipartite_match(metric, 9) if n == 35 else kth_match(metric, min(n, 4))  # pairs; or many that come together
    found = on("triton", merged, x, match, mode, size)
    assert found[0].dtype == found[2].dtype == dtype and found[1].dtype == found[3].dtype == torch.float32
    for f, e in zip(found, on("reference", merged, x.double(), match, mode, size.double()), strict=True):
        close(f, e, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(dtype: torch.dtype) -> None:
    x = tokens(2, 31, 7, dtype=dtype)
    x[0, 0, 0] = -0.0
    match = bipartite_match(x, 11)
    (y, _), (wanted, _) = both(merge, x, match)
    alone = torch.zeros(2, 20, dtype=torch.int64).scatter_add(1, match.index, torch.ones_like(match.index)) == 1
    assert torch.equal(y[alone], x.gather(1, match.kept[..., None].expand(-1, -1, 7))[alone]) and y[0, 0, 0].signbit()
    close(y, wanted.double(), TOLERANCES[dtype])
    (back,) = on("triton", unmerge, y, match)
    assert torch.equal(back, y.gather(1, match.index[..., None].expand(-1, -1, 7)))
    assert torch.equal(on("triton", merge, back, match, mode="max")[0], y)

    def gradient(y: Tensor, match: Match) -> Tensor:
        leaf = y.detach().requires_grad_()
        weights = torch.linspace(0.5, 1.5, 2 * 31 * 7, device=y.device).reshape(2, 31, 7).to(dtype)
        return torch.autograd.grad(unmerge(leaf, match), leaf, weights)[0]

    found, expected = both(gradient, y, match)
    close(found[0], expected[0].double(), TOLERANCES[dtype])


def test_the_largest_goes_to_the_lowest_place_and_nan_stays_with_its_group() -> None:
    x = torch.ones(1, 7, 3)
    x[0, 0, 1], x[0, 6, 2] = 0.5, 2.0
    match = Match(*(torch.tensor([t]) for t in ([1, 0, 1, 1, 1, 1, 1], [1, 5], [0, 2, 4, 3, 6], [1] * 5)))
    y, _, dx, _ = on("triton", merged, x, match, {"mode": "max"}, torch.ones(1, 7))
    weights, expected = torch.linspace(0.5, 1.5, 6).reshape(2, 3), torch.zeros(7, 3)
    expected[1], expected[0, 0], expected[2, 1], expected[6, 2] = weights[0], weights[1, 0], weights[1, 1], weights[1, 2]
    assert y.tolist() == [[[1, 1, 1], [1, 1, 2]]]
    torch.testing.assert_close(dx[0], expected)

    x, match = tokens(2, 12, 5, dtype=torch.float32), kth_match(tokens(2, 12, 5), 3)
    x[1, 7, 2] = NAN
    bad = torch.zeros(2, 4, 5, dtype=torch.bool)
    bad[1, match.index[1, 7], 2] = True
    for mode in ("mean", "sum"):
        assert torch.equal(on("triton", merge, x, match, mode=mode)[0].isnan(), bad)
    y, _, dx, _ = on("triton", merged, x, match, {"mode": "max"}, torch.ones(2, 12))
    assert torch.equal(y.isnan(), bad) and dx[1, 7, 2] != 0  # the number that is none has won


def test_what_weighs_nothing_may_hold_anything() -> None:
    x, weights, match = tokens(1, 16, 5, dtype=torch.float32), sizes(1, 16).float(), kth_match(tokens(1, 16, 4), 4)
    nothing = (weights == 0)[..., None]
    for mode, bad in (({"mode": "weighted"}, NAN), ({"weights": True}, -INF)):
        found = on("triton", merged, x.masked_fill(nothing, bad), match, mode, weights)
        assert nothing.sum() > 2 and all(t.isfinite().all() for t in found) and not found[2][weights == 0].any()
        assert equal(found, on("triton", merged, x.masked_fill(nothing, 0), match, mode, weights))


@pytest.mark.parametrize(("dtype", "delta"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_a_residual_in_another_dtype_between_merging_and_norm(dtype: torch.dtype, delta: torch.dtype) -> None:
    given = residuals(2, 19, 17) | {"size": sizes(2, 19), "mode": "weighted"}
    given = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    given |= {"x": given["x"].to(dtype), "delta": given["delta"].to(delta)}

    def function(**given: Any) -> tuple[Tensor, ...]:
        leaves = {name: given[name].detach().requires_grad_() for name in ("x", "delta", "weight", "bias")}
        y, size, normed = add_merge_norm_by_index(**(given | leaves))
        total = (y * torch.linspace(0.5, 1.5, y.numel(), device=y.device).reshape(y.shape) + normed.square()).sum()
        return y, size, normed, *torch.autograd.grad(total, list(leaves.values()))

    found, expected = both(function, **given)
    assert [t.dtype for t in found[:5]] == [torch.float32] * 3 + [dtype, delta]
    for f, e in zip(found, expected, strict=True):
        close(f, e.double(), TOLERANCES[f.dtype])


def test_two_programs_with_many_rows_of_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in turn and one that is not full, of places that tokens have come to; the norm in float32; gradients of one kind."""
    monkeypatch.setattr(import_module("vlpfast.ops.tokens.triton_merge_norm"), "PARTS", 2)
    given = {k: v.to(DEVICE) for k, v in residuals(3, 90, 5).items()}
    x, delta, weight, bias = (given[name].float() for name in ("x", "delta", "weight", "bias"))
    parts, norm = (given["kept"], given["source"], given["target"]), (weight, bias, 1e-5, False)
    y, _, normed, stats = OPERATORS.add_merge_norm_fwd_triton(x.bfloat16(), delta.bfloat16(), None, *parts, *norm, True)
    assert normed.dtype == torch.float32
    torch.testing.assert_close(normed, F.layer_norm(y.float(), (5,), weight, bias))
    saved = normed, y, stats, None, given["index"], given["kept"], weight, None
    whole = OPERATORS.add_merge_norm_bwd_triton(y, *saved, True, True)
    dx, _, nothing, _ = OPERATORS.add_merge_norm_bwd_triton(y, *saved, True, False)
    empty, _, *of_norm = OPERATORS.add_merge_norm_bwd_triton(y, *saved, False, True)
    assert equal([dx, *of_norm], [whole[0], *whole[2:]]) and nothing.numel() == empty.numel() == 0
    unit = (y.float() - stats[0, ..., None]) * stats[1, ..., None]
    torch.testing.assert_close(of_norm[0], (normed * unit).sum((0, 1)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(of_norm[1], normed.sum((0, 1)), rtol=1e-4, atol=1e-3)
    wide, place = torch.empty(1, 1, 8193, device=DEVICE), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    arguments = wide, wide, None, place, place[:, :0], place[:, :0], wide[0, 0], wide[0, 0], 0.0, False, False
    with pytest.raises(ValueError, match="x: expected at most 8192 channels, got 8193"):
        OPERATORS.add_merge_norm_fwd_triton(*arguments)


# --- selection, masks -------------------------------------------------------------------------------------------------

# the other cases and dtypes: pytest -m interpreter tests/ops/test_conformance.py
CASES = {
    "select": (
        "no image",
        "no token",
        "no channel",
        "one token, fused",
        "drop, by score",
        "fuse, masks, normalised",
        "all protected",
        "strided",
        "expanded",
        "fuse, by score",
    ),
    "add_merge_norm": (
        "no image",
        "no token",
        "no channel",
        "one channel",
        "one token",
        "nothing merges",
        "17, many to one",
        "all to one, plain mean, sizes",
        "no weight, no bias",
        "strided",
        "expanded",
        "16, sizes",
    ),
    "random_mask": ("no image", "no token", "no channel", "in random order", "everything masked", "strided", "expanded"),
}


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in CASES.items() for case in cases])
def test_against_the_reference_in_float64(op: str, case: str) -> None:
    compare(OPS[op], "triton", torch.float32, case)
    if case == CASES[op][-1]:
        compare(OPS[op], "triton", torch.float16, case)


def selected(x: Tensor, score: Tensor, k: int, **options: Any) -> tuple[Tensor, ...]:
    """kept, indices, and the gradients of x and score of a weighted sum."""
    leaves = [t.detach().requires_grad_() for t in (x, score)]
    kept, indices = select(*leaves, k, **options)
    weights = torch.linspace(0.5, 1.5, kept.numel(), dtype=kept.dtype, device=x.device).reshape(kept.shape)
    gradients = torch.autograd.grad((kept * weights).sum(), leaves, allow_unused=True)
    return kept, indices, *(g for g in gradients if g is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_ties_and_scores_that_are_no_number(dtype: torch.dtype) -> None:
    """Scores in a dtype of their own, compared in it."""
    score = torch.tensor([[1.0, NAN, -INF, 2.0, -0.0, INF, 0.0, 2.0, -NAN, 1.0, 9.0, NAN]], dtype=dtype)
    keep = torch.ones(1, 12, dtype=torch.bool)
    keep[:, 10:] = False
    order = [5, 3, 7, 0, 9, 4, 6, 2, 1, 8, 10, 11]
    x = torch.arange(12.0)[None, :, None]
    for k in (0, 1, 6, 9, 11, 12):
        kept, indices = on("triton", select, x, score, k, order="score", mask=keep)
        assert indices[0].tolist() == order[:k] == kept[0, :, 0].tolist()
        assert on("triton", select, x, score, k, mask=keep)[1][0].tolist() == sorted(order[:k])
    late = on("triton", select, x, score, 3, order="score", mask=keep, protect=6)[1]
    assert late[0].tolist() == [0, 1, 2, 3, 4, 5, 7, 9, 6]
    if dtype == torch.float64:
        apart = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 + 2e-12]], dtype=dtype)
        assert on("triton", select, torch.zeros(1, 3, 2), apart, 2, order="score")[1].tolist() == [[2, 1]]


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")
@pytest.mark.parametrize("seed", range(int(os.environ.get("VLPFAST_RANDOM_CASES", "4"))))
def test_random_selections(seed: int) -> None:
    """Many ties, some scores that are NaN or infinite; what is kept is the reference's, bit for bit."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, n, c = rng.choice([1, 2, 3]), rng.choice([rng.randint(0, 70), 150]), rng.randint(0, 40)
    x = torch.randn(b, n, c, generator=generator)
    score = torch.randint(-3, 4, (b, n), generator=generator).to(rng.choice([torch.float32, torch.bfloat16]))
    if rng.random() < 0.3:
        score[torch.rand(b, n, generator=generator) < 0.3] = rng.choice([NAN, INF, -INF])
    protect = rng.choice([0, 0, 1, n // 2]) if n else 0
    options: dict[str, Any] = {"order": rng.choice(["position", "score"]), "protect": protect}
    options["mask"] = rng.choice([None, torch.rand(b, n, generator=generator) < 0.7])
    if rng.random() < 0.7:
        options |= {"rest": "fuse", "normalize": rng.random() < 0.5}
    k = rng.randint(0, n - protect)
    (found, indices, *gradients), (expected, wanted, *expected_gradients) = both(selected, x, score, k, **options)
    assert torch.equal(indices, wanted) and torch.equal(found[:, : protect + k], expected[:, : protect + k])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    rounding = 0.02 if score.dtype == torch.bfloat16 else 1e-4
    for f, e, near in zip(gradients, expected_gradients, (1e-4, rounding), strict=False):  # dropping, of x alone
        torch.testing.assert_close(f, e, rtol=near, atol=near, equal_nan=True)


def test_nan_goes_where_it_belongs() -> None:
    x, score = (t.float() for t in images(4, 9, 5).values())
    score[:, 2] = 9.0  # kept
    score[:, 4] = 0.0  # fused
    score[0, 4] = NAN
    x[1, 4], x[2, 2] = NAN, NAN
    x[3, 7], score[3, 7] = NAN, NAN
    keep = torch.ones(4, 9, dtype=torch.bool)
    keep[3, 7] = False
    kept, _, dx, dscore = on("triton", selected, x, score, 3, rest="fuse", mask=keep)
    normalised, _ = on("triton", select, x, score, 3, rest="fuse", mask=keep, normalize=True)
    assert kept[:2, -1].isnan().all() and normalised[:2, -1].isnan().all()
    assert kept[2:, -1].isfinite().all() and normalised[2:, -1].isfinite().all()
    assert dx[1:].isfinite().all() and dx[0].isnan().all(1).tolist() == [n == 4 for n in range(9)]
    assert dscore[1, 4].isnan() and dscore.isnan().sum() == 1 and dscore[3, 7] == 0 and not dx[3, 7].any()
    nothing = torch.tensor([[5.0, 1.0, -1.0, 0.0], [5.0, 0.0, 0.0, 0.0]])  # weights that sum to nothing
    kept, _, dx, dscore = on("triton", selected, torch.randn(2, 4, 3), nothing, 1, rest="fuse", normalize=True)
    assert not kept[:, 1].any() and not dx[:, 1:].any() and not dscore.any()


@pytest.mark.parametrize("own", [False, True])
def test_every_backend_draws_the_same(own: bool) -> None:
    seed = torch.arange(-2, 0) * 0x1357924680ACE if own else SEED
    for n, protect, ratio, order in (
        (0, 0, 0.75, "position"),
        (5, 2, 0.3, "random"),
        (133, 1, 0.75, "position"),
        (33, 0, 0.0, "random"),
    ):
        found, expected = both(random_keep, seed, 2, n, ratio, protect=protect, order=order)
        assert equal(found, expected)
        if not backends.available()["cpp"]:
            assert equal(found, on("cpp", random_keep, seed, 2, n, ratio, protect=protect, order=order))
    if own:
        assert equal(*both(random_keep, torch.arange(4)[::2], 2, 20, 0.5))
    else:
        assert on("triton", random_keep, SEED, 2, 14, 0.5, protect=1)[0].tolist() == GOLDEN["one seed"]


def masked(x: Tensor, token: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    leaves = x.detach().requires_grad_(), token.detach().requires_grad_()
    kept, indices, inverse = random_mask(leaves[0], 0.6, seed, protect=1, order="random")
    back = restore(kept, inverse, leaves[1])
    weights = torch.linspace(0.5, 1.5, back.numel(), dtype=back.dtype, device=x.device).reshape(back.shape)
    return kept, back, indices, inverse, *torch.autograd.grad((back * weights).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masking_there_and_back_bit_for_bit(dtype: torch.dtype) -> None:
    x, token = images(3, 37, 5)["x"].to(dtype), torch.randn(5, generator=torch.Generator().manual_seed(1))
    x[:, :3, 1] = torch.tensor([NAN, INF, -0.0])
    found, expected = both(masked, x, token, SEED)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    kept, back, indices, inverse = found[:4]
    bits = x.view(integers)
    assert torch.equal(kept.view(integers), bits.gather(1, indices[..., None].expand(-1, -1, 5)))
    assert torch.equal(back.view(integers), torch.where((inverse < 0)[..., None], token.to(dtype).view(integers), bits))
    assert equal(found[2:5], expected[2:5])
    torch.testing.assert_close(found[5], expected[5], rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=0)


def test_the_mask_tokens_gradient_is_summed_in_float32() -> None:
    """3000 equal numbers in several parts: bfloat16 sums would stop at 256. Rows of no channel, of no image."""
    rows = torch.ones(20, 151, 3, dtype=torch.bfloat16)
    indices = torch.full((20, 151), -1)
    indices[:, 0] = 4
    with backends.use("triton"):
        total = OPERATORS.filled_rows_sum_triton(rows.to(DEVICE), indices.to(DEVICE))
        assert OPERATORS.filled_rows_sum_triton(rows[:, :, :0].to(DEVICE), indices.to(DEVICE)).shape == (0,)
        assert OPERATORS.filled_rows_sum_triton(rows[:0].to(DEVICE), indices[:0].to(DEVICE)).tolist() == [0] * 3
    assert total.dtype == torch.float32 and total.tolist() == [3000] * 3


def test_rows_out_of_range_are_nan() -> None:
    x = torch.ones(1, 4, 3, device=DEVICE)
    found = OPERATORS.gather_rows_triton(x, torch.tensor([[3, 4, -1, -2, 2**40]], device=DEVICE), None)[0, :, 0].cpu()
    assert found.isnan().tolist() == [False, True, False, True, True] and found[[0, 2]].tolist() == [1, 0]


# --- tiles, offsets ---------------------------------------------------------------------------------------------------


TILES = {
    "small": {
        "match": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
        "order": {"BLOCK_M": 8, "BLOCK_N": 16},
        "choose": {"BLOCK_M": 4, "BLOCK_N": 8},
        "places": {"BLOCK_M": 4, "BLOCK_N": 4},
        "fuse": {"BLOCK_M": 8, "BLOCK_N": 32},
        "merge": {"BLOCK": 32, "BLOCK_R": 2},
        "weights": {"BLOCK": 32, "BLOCK_R": 4},
        "rows": {"BLOCK": 32},
        "sum_rows": {"BLOCK": 32},
    },
    "large": {
        "match": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64},
        "order": {"BLOCK_M": 64, "BLOCK_N": 128},
        "choose": {"BLOCK_M": 64, "BLOCK_N": 128},
        "places": {"BLOCK_M": 64, "BLOCK_N": 64},
        "fuse": {"BLOCK_M": 64, "BLOCK_N": 64},
        "merge": {"BLOCK": 4096, "BLOCK_R": 64},
        "weights": {"BLOCK": 4096, "BLOCK_R": 64},
        "rows": {"BLOCK": 4096},
        "sum_rows": {"BLOCK": 4096},
    },
}


@pytest.mark.parametrize("size", list(TILES))
def test_tiles_small_and_large(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles everywhere, all ragged; and one tile for all."""
    asked = set()

    def tile(table: Path, kernel: str, *_: Any) -> dict[str, int]:
        asked.add(kernel)
        return TILES[size][kernel] | {"num_warps": 4}

    monkeypatch.setattr("vlpfast.ops._triton.tile", tile)
    metric, keep = tokens(2, 39, 21, dtype=torch.float32), mask(2, 39)
    assert equal(*both(random_match_2d, metric, 3, 13, 9, order="score", seed=torch.tensor(3), mask=keep))
    x, weight, match = tokens(1, 11, 37, dtype=torch.float32), sizes(1, 11).float(), bipartite_match(metric[:1, :11], 4)
    for mode in ({"mode": "weighted"}, {"mode": "max"}):
        for f, e in zip(*both(merged, x, match, mode, weight), strict=True):
            close(f, e.double(), 1e-6)
    for options in ({"rest": "fuse", "normalize": True, "mask": keep[1:, :11]}, {"order": "score"}):
        for f, e in zip(*both(selected, x, weight, 4, protect=2, **options), strict=True):
            close(f, e.double(), 1e-6)
    for f, e in zip(*both(masked, x, torch.ones(37), SEED), strict=True):
        close(f, e.double(), 1e-6)
    assert asked == TILES[size].keys()


def test_offsets_beyond_32_bits() -> None:
    image = 1 << 30
    base = torch.empty(2 * image + 1024, dtype=torch.bfloat16, device=DEVICE)  # pages stay untouched
    x = base.as_strided((3, 9, 8), (image, 8, 1))
    near = tokens(3, 9, 8).to(DEVICE, torch.bfloat16)
    x.copy_(near)
    score, indices = near[:, :, 0].float(), torch.tensor([[3, -1, 0]] * 3, device=DEVICE)
    with backends.use("triton"):
        match = bipartite_match(near, 3)
        assert all(map(torch.equal, bipartite_match(x, 3), match))
        for mode in ("mean", "max"):
            y, size = merge(near, match, mode=mode)
            assert all(map(torch.equal, merge(x, match, mode=mode), (y, size)))
        assert torch.equal(gather_tokens(x, indices[:, :1]), gather_tokens(near, indices[:, :1]))
        assert torch.equal(
            OPERATORS.filled_rows_sum_triton(x[:, :3], indices), OPERATORS.filled_rows_sum_triton(near[:, :3], indices)
        )
        expected = selected(near, score, 4, rest="fuse", normalize=True)
        assert all(map(torch.equal, selected(x, x[:, :, 0], 4, rest="fuse", normalize=True)[:3], expected[:3]))
        dense = select(near, score, 4, rest="fuse")
        assert all(map(torch.equal, select(near, x[:, :, 0], 4, rest="fuse"), dense))
        # gradients that lie far apart
        far, far_dense = x[:, :6], near[:, :6].contiguous()
        for arguments in ((None, None, None, False, False), (None, size, near, False, True)):
            weight, total, tokens_of, mean, largest = arguments
            found, wanted = (
                OPERATORS.merge_bwd_triton(g, None, match.index, weight, total, tokens_of, mean, largest, True, False)[0]
                for g in (far, far_dense)
            )
            assert torch.equal(found, wanted)
        places = torch.arange(5, device=DEVICE).expand(3, 5)
        found, wanted = (
            OPERATORS.select_bwd_triton(g, near, score, None, places, True, True, True, True) for g in (far, far_dense)
        )
        assert all(map(torch.equal, found, wanted))


# --- torch's machinery ------------------------------------------------------------------------------------------------


def layer(x: Tensor, score: Tensor, token: Tensor, seed: Tensor) -> Tensor:
    match = bipartite_match(x, 5)
    y, size = merge(x, match)
    second = kth_match(y, 3)
    y, _ = merge(y, second, size, mode="weighted")
    z, _ = select(unmerge(y, second), score, 4, rest="fuse", normalize=True)
    kept, _, inverse = random_mask(x, 0.5, seed, protect=1)
    back = restore(kept.square(), inverse, token)
    summed, _, normed = add_merge_norm(x, x.square(), match, weight=token)
    return y.square().sum() + z.square().sum() + back.square().sum() + (summed * normed).sum()


def inputs() -> list[Tensor]:
    x, score = images(1, 17, 6).values()
    return [t.float().to(DEVICE).requires_grad_() for t in (x, score[:, :12], torch.linspace(-1, 1, 6))]


def test_gradients_func_grad_autocast_and_compilation() -> None:
    torch._dynamo.reset()
    leaves, seed = inputs(), torch.tensor(5, device=DEVICE)
    with backends.use("reference"):
        wanted = torch.autograd.grad(layer(*leaves, seed), leaves)
    with backends.use("triton"):
        value = layer(*leaves, seed)
        expected = torch.autograd.grad(value, leaves, retain_graph=True)
        for found, e in zip(expected, wanted, strict=True):
            torch.testing.assert_close(found, e, rtol=1e-4, atol=1e-5)
        assert all(map(torch.equal, torch.autograd.grad(value, leaves), expected))
        found = torch.func.grad(layer, (0, 1, 2))(*(t.detach() for t in leaves), seed)
        assert all(map(torch.equal, found, expected))
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(layer(*leaves, seed), value)
        for refused in (lambda x: bipartite_match(x, 2), lambda x: select(x, x[..., 0], 2), lambda x: random_mask(x, 0.5)):
            with pytest.raises(RuntimeError, match=r"is forced, but it has no kernels for torch\.float64"):
                refused(leaves[0].double())
        with pytest.raises(NotImplementedError, match="second derivatives"):
            (first,) = torch.autograd.grad(
                select(leaves[0][:, :12], leaves[1], 3, rest="fuse")[0].sum(), leaves[:1], create_graph=True
            )
            first.sum().backward()
        found = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)(*leaves, seed)
        torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
        for f, e in zip(torch.autograd.grad(found, leaves), expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-6)


def test_opcheck() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")

    def check(operator: Any, *arguments: Any) -> Any:
        torch.library.opcheck(operator, arguments, test_utils=checks)
        return operator(*arguments)

    x, keep = tokens(2, 9, 4).to(DEVICE, torch.bfloat16), mask(2, 9).to(DEVICE)
    a, b = (torch.tensor(t, device=DEVICE) for t in ([0, 1, 2, 4, 5, 7, 8], [3, 6]))
    check(OPERATORS.match_fwd_triton, x[:, :, ::2], a, b, 0, 0, 4, True, keep)
    index, *parts = check(OPERATORS.match_fwd_triton, x, None, None, 2, 1, 3, False, None)
    weight = sizes(2, 9).to(DEVICE, torch.float32)
    check(OPERATORS.merge_fwd_triton, x, None, *parts, False, True)
    y, total = check(OPERATORS.merge_fwd_triton, x, weight, *parts, True, False)
    check(OPERATORS.merge_bwd_triton, y, total, index, weight, total, x, True, False, True, True)
    check(OPERATORS.merge_bwd_triton, y, None, index, None, None, None, False, False, True, False)
    norm = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE), 1e-5
    for residual, of_sizes, wide in ((x, weight, True), (x.float(), None, False)):
        y, _, normed, stats = check(OPERATORS.add_merge_norm_fwd_triton, residual, x, of_sizes, *parts, *norm, wide, wide)
        saved = y, stats, of_sizes, index, parts[0], norm[0]
        of_delta = None if wide else x.dtype
        check(OPERATORS.add_merge_norm_bwd_triton, y, normed, *saved, of_delta, True, wide)
        check(OPERATORS.add_merge_norm_bwd_triton, y, normed, *saved, of_delta, wide, True)
    for fuse, needed in ((True, (True, True)), (False, (True, False))):
        kept, indices = check(OPERATORS.select_fwd_triton, x, weight, keep, 4, 1, True, fuse, fuse)
        check(OPERATORS.select_bwd_triton, kept, x if fuse else None, weight, keep, indices, fuse, fuse, *needed)
    rows = torch.tensor([[0, -1, 8], [-1, -1, 7]], device=DEVICE)
    for fill in (None, torch.ones(4, device=DEVICE)):
        check(OPERATORS.gather_rows_triton, x, rows, fill)
    check(OPERATORS.filled_rows_sum_triton, x[:, :3], rows)
    for seed, shuffled in ((SEED, False), (torch.arange(2), True)):
        check(OPERATORS.random_keep_triton, seed.to(DEVICE), 2, 11, 4, 1, shuffled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA GPU")
def test_a_layer_is_captured_into_a_graph() -> None:
    """match, merge, select and masks, forward and backward, replayed on new numbers in the same memory."""
    leaves, seed = inputs(), torch.tensor(5, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        match = bipartite_match(leaves[0], 5)
        value = layer(*leaves, seed)
        return *match, value.detach(), *torch.autograd.grad(value, leaves)

    with backends.use("triton"):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        sources = []
        for number in (1, 2):
            with torch.no_grad():
                leaves[0].copy_(tokens(1, 17, 6, seed=number))
                leaves[1].copy_(sizes(1, 12, seed=number) + 0.1)
                leaves[2].fill_(number)
                seed.fill_(number)
            graph.replay()
            found = [t.clone() for t in results]
            assert all(map(torch.equal, found, step()))
            sources.append(found[2])
    assert not torch.equal(*sources)  # what merges is not what merged before


# --- compiled ahead of time -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="waits for Triton's NVIDIA tools, on Linux alone")
def test_it_compiles_without_spills() -> None:
    command = [
        sys.executable,
        "benchmarks/compiled_kernels.py",
        "--only",
        "random_mask",
        "--kernel",
        "choose",
        "--dtype",
        "bfloat16",
        "--chip",
        "sm_90",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [k["kernel"] for k in kernels] == ["choose"]
    assert all(k["spills"] == 0 and k["registers"] <= 168 for k in kernels)
