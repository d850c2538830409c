"""What the conformance table cannot say about maxsim: its definition by loops, ties, NaN, indices, threads, memory, arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import mask, masked_sets, packed_sets, relative_error, token_sets
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.maxsim import maxsim
from vlpfast.ops.maxsim.autograd import MaxSim

needs_library = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
BACKENDS = [pytest.param("cpp", marks=needs_library), "reference"]
needs_triton = pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")
WITH_TRITON = [*BACKENDS, pytest.param("triton", marks=[needs_triton, *[pytest.mark.gpu] * torch.cuda.is_available()])]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def run(x: Tensor, y: Tensor, **arguments: Any) -> list[Tensor]:
    """The scores and the gradients of x and y of a weighted sum of them."""
    leaves = [t.detach().requires_grad_() for t in (x, y)]
    scores = maxsim(*leaves, **arguments)
    scores = list(scores) if isinstance(scores, tuple) else [scores]
    weights = [torch.linspace(0.5, 1.5, s.numel(), dtype=s.dtype, device=s.device).reshape(s.shape) for s in scores]
    total = sum((s * w).sum() for s, w in zip(scores, weights, strict=True))
    return [s.detach() for s in scores] + list(torch.autograd.grad(total, leaves))


def on(backend: str, *tensors: Tensor, **arguments: Any) -> list[Tensor]:
    """Where the backend runs; the results are back on the CPU."""
    device = backends.device_type(backend)
    arguments = {name: a.to(device) if isinstance(a, Tensor) else a for name, a in arguments.items()}
    with backends.use(backend):
        return [t.cpu() for t in run(*(t.to(device) for t in tensors), **arguments)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# --- the definition ---------------------------------------------------------------------------------------------------


def one_score(x: Tensor, y: Tensor, x_keep: Tensor, y_keep: Tensor, reduction: str, masked: str) -> Tensor:
    """x_to_y of one pair, token by token."""
    total, count = torch.zeros((), dtype=x.dtype), 0
    for token in x[x_keep]:
        products = [token @ other if keep else torch.zeros((), dtype=x.dtype) for other, keep in zip(y, y_keep, strict=True)]
        if masked == "ignore":
            products = [product for product, keep in zip(products, y_keep, strict=True) if keep]
        if y_keep.any():
            total = total + torch.stack(products).max()
        count += 1
    return total / max(1, count) if reduction == "mean" else total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", ["ignore", "zero"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_definition_token_by_token(reduction: str, masked: str, backend: str) -> None:
    options = {"reduction": reduction, "masked": masked}
    both = token_sets((3, 5, 4), (4, 6, 4)) | {"x_mask": mask(3, 5), "y_mask": mask(4, 6, seed=3)}
    both["x"][:, :, 0], both["y"][:, :, 0] = -2.0, 1.0  # many negative products: a zero is larger
    x, y, x_mask, y_mask = (both[name] for name in ("x", "y", "x_mask", "y_mask"))
    found = on(backend, **both, **options)
    expected = [
        torch.stack([one_score(x[m], y[n], x_mask[m], y_mask[n], **options) for m in range(3) for n in range(4)]).reshape(3, 4),
        torch.stack([one_score(y[n], x[m], y_mask[n], x_mask[m], **options) for m in range(3) for n in range(4)]).reshape(3, 4),
    ]
    assert (expected[0][0] == 0).all() and (expected[1][:, 0] == 0).all()  # sets without kept tokens
    for f, e in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-13, atol=1e-14)
    assert not found[2][~x_mask].any() and not found[3][~y_mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", WITH_TRITON)
def test_ties_go_to_the_lowest_index(backend: str, dtype: torch.dtype) -> None:
    if not backends.takes(backend, dtype):
        pytest.skip("float64 is not Triton's")
    x, y = torch.ones(2, 70, 3, dtype=dtype), torch.ones(2, 40, 3, dtype=dtype)
    y[1, :13] = 0.5  # of set 1 the tokens from 13 on are equally near, of x all
    *_, dx, dy = on(backend, x, y, reduction="sum")
    weights = torch.linspace(0.5, 1.5, 4, dtype=dtype).reshape(2, 2)
    expected_dx, expected_dy = torch.zeros_like(x), torch.zeros_like(y)
    expected_dx += weights.sum(1)[:, None, None]  # x to y: every token of x, its winner a token of ones
    expected_dy[0, 0] += 70 * weights[:, 0].sum()
    expected_dy[1, 13] += 70 * weights[:, 1].sum()
    expected_dy += weights.sum(0)[:, None, None]  # y to x: every token of y, its winner token 0
    expected_dx[:, 0] += (weights * torch.tensor([40, 27 + 13 * 0.5])).sum(1)[:, None]
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(dy, expected_dy)


@pytest.mark.parametrize("backend", WITH_TRITON)
def test_a_zero_of_a_masked_token_wins_and_gets_nothing(backend: str) -> None:
    x = torch.tensor([[[1.0], [2.0], [-3.0]]])
    y = torch.tensor([[[-1.0], [9.0], [-2.0]]])
    keep = torch.tensor([[True, False, True]])
    score, dx, dy = on(backend, x, y, y_mask=keep, masked="zero", reduction="sum", directions="x_to_y")
    assert score.item() == 6.0 and dx.flatten().tolist() == [0, 0, -1.0] and dy.flatten().tolist() == [0, 0, -1.5]
    for y, y_keep, winner in (
        ([5.0, 0.0, -5.0], [False, True, True], None),  # 0 and 0: the lower index wins, here the masked token
        ([5.0, 0.0, 5.0], [False, True, False], None),
        ([-5.0, 0.0, 5.0], [True, True, False], 1),
    ):
        arguments = {"y_mask": torch.tensor([y_keep]), "masked": "zero", "directions": "x_to_y"}
        score, _, dy = on(backend, torch.ones(1, 1, 1), torch.tensor(y)[None, :, None], **arguments)
        assert score.item() == 0 and dy.flatten().nonzero().flatten().tolist() == ([] if winner is None else [winner])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_padded(backend: str) -> None:
    packed = packed_sets()
    packed |= {name: packed[name].float() for name in ("x", "y")}
    padded, masks, places = {}, {}, {}
    for name in ("x", "y"):
        start = packed[f"{name}_cu_seqlens"]
        lengths = start.diff()
        masks[f"{name}_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
        places[name] = masks[f"{name}_mask"].nonzero(as_tuple=True)
        padded[name] = torch.full((*masks[f"{name}_mask"].shape, 8), torch.nan).index_put(places[name], packed[name])
    for options in ({}, {"pairs": "own"}, {"directions": "y_to_x", "reduction": "sum"}):
        own = {"y": padded["y"].reshape(4, 2, -1, 8), "y_mask": masks["y_mask"].reshape(4, 2, -1)} if "pairs" in options else {}
        *scores, dx, dy = on(backend, **(padded | masks | own), **options)
        expected = on(backend, **packed, **options)
        assert equal([*scores, dx[places["x"]], dy.reshape(padded["y"].shape)[places["y"]]], expected)
        assert dx.isfinite().all() and dy.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs(backend: str) -> None:
    """In double: the reference's products may be taken by another routine for another shape."""
    options = {"x_mask": mask(5, 40), "stash_bytes": 0}
    x, y = token_sets((5, 40, 8), (5, 30, 8)).values()
    y_mask = mask(5, 30, seed=2)
    with backends.use(backend):
        everything = maxsim(x, y, y_mask=y_mask, **options)
        aligned = maxsim(x, y, y_mask=y_mask, pairs="aligned", **options)
        own = maxsim(x, y.expand(5, 5, 30, 8), y_mask=y_mask.expand(5, 5, 30), pairs="own", **options)
        for i in range(2):
            torch.testing.assert_close(aligned[i], everything[i].diagonal(), rtol=1e-14, atol=0)
            torch.testing.assert_close(own[i], everything[i], rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normalize(dtype: torch.dtype, backend: str) -> None:
    both = masked_sets()
    x, y = (3 * both.pop(name).to(dtype) for name in ("x", "y"))
    x[1, 2] = y[2, 3] = 0  # stay zero, without gradient

    def first(x: Tensor, y: Tensor, **arguments: Any) -> Any:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return maxsim(*(F.normalize(t.to(wide), dim=-1).to(dtype) for t in (x, y)), **arguments)

    with backends.use(backend):
        *scores, dx, dy = run(x, y, **both, normalize=True)
        leaves = [t.detach().requires_grad_() for t in (x, y)]
        expected = first(*leaves, **both)
        total = sum((s * torch.linspace(0.5, 1.5, 30, dtype=s.dtype).reshape(5, 6)).sum() for s in expected)
        expected_gradients = torch.autograd.grad(total, leaves)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for f, e in zip(scores, expected, strict=True):
        assert relative_error(f, e.detach()) <= tolerance
    assert not dx[1, 2].any() and not dy[2, 3].any()
    for f, e in zip((dx, dy), expected_gradients, strict=True):
        e = torch.where((x if f is dx else y).any(-1, keepdim=True), e, 0)
        assert relative_error(f, e) <= 4 * tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["x", "y"])
def test_nan_reaches_its_pairs_and_no_others(where: str, backend: str) -> None:
    both = token_sets((5, 70, 8), (6, 50, 8), x_mask=mask(5, 70, share=0.9), y_mask=mask(6, 50, share=0.9, seed=2))
    both |= {name: both[name].float() for name in ("x", "y")}
    both["x_mask"][:, 1::66], both["y_mask"][:, 1::46] = True, True  # the second token and the last but two, of all sets
    masked = both[f"{where}_mask"][3].logical_not().nonzero()[0]
    for place, reaches in ((1, True), (67 if where == "x" else 47, True), (masked, False)):
        bad = both | {where: both[where].clone()}
        bad[where][3, place, 5] = torch.nan
        for options in ({}, {"masked": "zero"}, {"directions": "x_to_y"}, {"directions": "y_to_x"}):
            *scores, dx, dy = on(backend, **bad, **options)
            *expected, _, _ = on(backend, **both, **options)
            for f, e in zip(scores, expected, strict=True):
                line, others = (f[3], e.clone()) if where == "x" else (f[:, 3], e.clone())
                if reaches:
                    assert line.isnan().all()
                    others[(3,) if where == "x" else (slice(None), 3)] = torch.nan
                torch.testing.assert_close(f, others, rtol=1e-6, atol=1e-7, equal_nan=True)
            assert reaches == (dy if where == "x" else dx).isnan().any()


def test_infinite_products() -> None:
    x, y = torch.full((1, 20, 2), -torch.inf), torch.ones(1, 15, 2)
    for backend in ("cpp", "reference"):
        with backends.use(backend):
            assert all((s == -torch.inf).all() for s in maxsim(x, y))
            assert all(s.isnan().all() for s in maxsim(x, torch.zeros(1, 15, 2)))  # inf * 0


# --- winners: kept, found again, their indices ------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_winners_and_found_ones_give_the_same_bits(dtype: torch.dtype) -> None:
    x, y = (t.to(dtype) for t in token_sets((128, 64, 4), (400, 32, 4)).values())  # found again in several ranges of x
    for options in ({}, {"directions": "x_to_y"}, {"directions": "y_to_x"}):
        assert equal(run(x, y, **options), run(x, y, stash_bytes=0, **options))
    x, y = (t.to(dtype) for t in token_sets((9, 40, 4), (9, 5, 30, 4)).values())
    assert equal(run(x, y, pairs="own"), run(x, y, pairs="own", stash_bytes=0))


@needs_library
@pytest.mark.parametrize("candidates", [255, 256, 257, 65535, 65536, 65537])
def test_indices_of_every_size(candidates: int) -> None:
    x, y = torch.ones(1, 2, 1), torch.zeros(3, candidates, 1)
    winners = torch.tensor([candidates - 1, candidates // 2, 0])
    y[torch.arange(3), winners] = 1
    expected = torch.ops.vlpfast.maxsim_fwd(
        x[0], y.reshape(-1, 1), torch.tensor([0, 2]), candidates * torch.arange(4), None, None, 2, candidates, None,
        True, True, True, False, True,
    )  # fmt: skip
    assert expected[2].dtype == (torch.uint8 if candidates <= 256 else torch.int16 if candidates <= 65536 else torch.int32)
    assert expected[3].dtype == torch.uint8
    for arguments in ((x, y), (y, x)):
        _, _, *gradients = run(*arguments, reduction="sum", directions="both")
        again = run(*arguments, reduction="sum", directions="both", stash_bytes=0)[2:]
        assert equal(gradients, again)
        direction = "x_to_y" if arguments[0] is x else "y_to_x"
        *_, dx, dy = run(*arguments, reduction="sum", directions=direction)
        long = dy if arguments[0] is x else dx
        assert torch.equal(long.squeeze(-1).nonzero()[:, 1], winners) and torch.equal(
            long.sum((1, 2)), 2 * torch.linspace(0.5, 1.5, 3)
        )


@needs_library
def test_nothing_is_kept_without_gradients_or_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (t.float().requires_grad_() for t in token_sets((3, 10, 4), (5, 300, 4)).values())
    keep = []
    right = MaxSim.apply
    monkeypatch.setattr(MaxSim, "apply", lambda *arguments: (keep.append(arguments[-1]), right(*arguments))[1])
    size = 5 * 3 * 10 * 2 + 3 * 5 * 300  # int16 for 300 candidates, uint8 for 10
    with torch.no_grad():
        maxsim(x, y)
    maxsim(x, y.detach(), stash_bytes=size)
    maxsim(x, y, stash_bytes=size - 1)
    maxsim(x, y, stash_bytes=size - 1, directions="x_to_y")
    maxsim(x.detach(), y.detach())
    assert keep == [False, True, False, True, False]


# --- threads, instruction sets, memory --------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [((1, 32, 64), (90, 70, 64)), ((33, 20, 16), (50, 31, 16)), ((3, 5, 8), (200, 1, 8))])
def test_two_threads_give_the_bits_of_one(shape: tuple[Any, Any], dtype: torch.dtype, two_threads: None) -> None:
    x, y = (t.to(dtype) for t in token_sets(*shape).values())
    for options in ({}, {"directions": "y_to_x", "stash_bytes": 0}):
        two, again = run(x, y, **options), run(x, y, **options)
        torch.set_num_threads(1)
        assert equal(two, again) and equal(two, run(x, y, **options))
        torch.set_num_threads(2)


@needs_library
def test_one_direction_gives_the_bits_of_both() -> None:
    """Whichever side lies in the lanes: many sets beside few, long beside short."""
    for shapes in (((1, 32, 9), (40, 50, 9)), ((40, 50, 9), (1, 32, 9)), ((70, 3, 9), (5, 40, 9)), ((5, 33, 9), (6, 33, 9))):
        x, y = (t.float() for t in token_sets(*shapes).values())
        both = maxsim(x, y)
        assert equal(list(both), [maxsim(x, y, directions="x_to_y"), maxsim(x, y, directions="y_to_x")])
        assert equal(list(both), [t.T for t in maxsim(y, x)[::-1]])


SETS_CHECK = """
import sys, torch
sys.path[:0] = ["tests/ops"]
import conformance, test_maxsim
for case in conformance.MAXSIM_CASES:
    conformance.compare(conformance.OPS["maxsim, stash"], "cpp", torch.float32, case)
test_maxsim.test_ties_go_to_the_lowest_index("cpp", torch.float32)
for where in ("x", "y"):
    test_maxsim.test_nan_reaches_its_pairs_and_no_others(where, "cpp")
"""


@needs_library
@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_other_instruction_sets(instructions: str) -> None:
    """torch's own variable limits ours too; where a set is not there the next narrower is tested twice."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SETS_CHECK], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr


@needs_library
def test_more_panels_than_are_made_at_once() -> None:
    x, y = torch.ones(9, 1_000_000, 1), torch.full((1, 1, 1), 2.0)
    x *= torch.arange(9.0)[:, None, None]
    assert maxsim(x, y, directions="x_to_y").flatten().tolist() == [2.0 * m for m in range(9)]


def resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


@needs_library
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="waits for Linux, where peaks of memory can be read")
@pytest.mark.parametrize("stash_bytes", [0, 1 << 30])
def test_the_products_are_never_held(stash_bytes: int) -> None:
    x, y = (t.float() for t in token_sets((128, 32, 8), (128, 64, 8)).values())  # 134 MB of products
    run(x[:2], y[:2])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = resident("VmRSS")
    run(x, y, stash_bytes=stash_bytes)
    assert resident("VmHWM") - before < 20 << 20  # winners 1.5 MB, again found ones 6 MB, panels and gradients 1 MB


# --- gradients, torch's machinery -------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("stash_bytes", [0, 1 << 30])
def test_gradients_by_finite_differences(stash_bytes: int) -> None:
    x, y = (t.requires_grad_() for t in token_sets((3, 5, 4), (3, 6, 4)).values())
    masks = {"x_mask": mask(3, 5), "y_mask": mask(3, 6, seed=2)}
    for options in (
        {},
        {"directions": "x_to_y", "reduction": "sum"},
        {"directions": "y_to_x"},
        {"pairs": "aligned"} | masks,
        {"normalize": True} | masks,
        {"masked": "zero"} | masks,
    ):
        assert torch.autograd.gradcheck(lambda x, y, o=options: maxsim(x, y, stash_bytes=stash_bytes, **o), (x, y))
    own = token_sets((2, 5, 4), (2, 3, 4, 4))["y"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: maxsim(x, y, pairs="own", stash_bytes=stash_bytes), (x[:2], own))


@needs_library
def test_gradients_of_one_side_or_one_direction() -> None:
    x, y = (t.float() for t in token_sets((5, 20, 8), (6, 30, 8)).values())
    *_, dx, dy = run(x, y)
    for side, expected in ((0, dx), (1, dy)):
        leaves = [t.clone().requires_grad_(i == side) for i, t in enumerate((x, y))]
        scores = maxsim(*leaves)
        sum((s * torch.linspace(0.5, 1.5, 30).reshape(5, 6)).sum() for s in scores).backward()
        assert torch.equal(leaves[side].grad, expected) and leaves[1 - side].grad is None
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    for i, direction in enumerate(("x_to_y", "y_to_x")):
        of_both = torch.autograd.grad(maxsim(*leaves)[i].sum(), leaves)
        assert equal(list(of_both), list(torch.autograd.grad(maxsim(*leaves, directions=direction).sum(), leaves)))


@needs_library
def test_transforms_and_what_is_refused() -> None:
    x, y = token_sets((3, 5, 4), (4, 6, 4)).values()

    def loss(x: Tensor) -> Tensor:
        return maxsim(x, y)[0].square().sum() + maxsim(x, y)[1].sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(x), expected)
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="maxsim: second derivatives are made by the reference backend alone"):
        torch.autograd.grad(gradient.sum(), leaf)
    with pytest.raises(NotImplementedError, match="maxsim: second derivatives are made by the reference backend alone"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)
    with pytest.raises(NotImplementedError, match="maxsim: results under vmap are made by the reference backend alone"):
        torch.func.vmap(loss)(x.expand(2, -1, -1, -1))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (x,), (x,))
    with backends.use("reference"):
        inputs = leaf[:2, :2].detach().requires_grad_(), y[:2, :3].clone().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x, y: maxsim(x, y, normalize=True), inputs)


@needs_library
def test_backward_twice_and_inference_mode() -> None:
    x, y = (t.float().requires_grad_() for t in token_sets((3, 5, 4), (4, 6, 4)).values())
    scores = maxsim(x, y, directions="x_to_y")
    first = torch.autograd.grad(scores.sum(), (x, y), retain_graph=True)
    assert equal(list(first), list(torch.autograd.grad(scores.sum(), (x, y))))
    with torch.inference_mode():
        assert torch.equal(maxsim(x, y, directions="x_to_y"), scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_tokens_alone(backend: str) -> None:
    x, y = (t.float() for t in token_sets((3, 5, 4), (4, 6, 4)).values())
    leaves = [x.requires_grad_(), y.requires_grad_()]
    with backends.use(backend):
        expected = sum(s.square().sum() for s in maxsim(x.bfloat16(), y.bfloat16()))
        unit = maxsim(F.normalize(x, dim=-1).bfloat16(), F.normalize(y, dim=-1).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            found = sum(s.square().sum() for s in maxsim(x, y))
            doubles = maxsim(x.double(), y.double())
            assert equal(list(maxsim(2 * x, 2 * y, normalize=True)), list(unit))
    assert torch.equal(found, expected) and found.dtype == torch.float32 and doubles[0].dtype == torch.float64
    assert equal(list(torch.autograd.grad(found, leaves)), list(torch.autograd.grad(expected, leaves)))


def test_two_dtypes_meet_in_the_wider() -> None:
    both = token_sets((3, 5, 4), (4, 6, 4))
    for first, second, wide in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float16, torch.float64),
    ):
        x, y = both["x"].to(first), both["y"].to(second)
        *scores, dx, dy = run(x, y)
        assert equal(scores, run(x.to(wide), y.to(wide))[:2]) and scores[0].dtype == wide
        assert dx.dtype == first and dy.dtype == second


@pytest.mark.parametrize(
    ("backend", "dynamic"), [*(pytest.param("cpp", d, marks=needs_library) for d in (False, True)), ("reference", False)]
)
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    both, packed = masked_sets(), packed_sets()
    x, y, packed_x, packed_y = (t.float() for t in (both["x"], both["y"], packed.pop("x"), packed.pop("y")))
    x_mask, y_mask = both["x_mask"], both["y_mask"]

    def function(x: Tensor, y: Tensor, packed_x: Tensor, packed_y: Tensor) -> Tensor:
        a, b = maxsim(x, y, x_mask, y_mask, masked="zero", normalize=True)
        start = packed["x_cu_seqlens"]
        c = maxsim(packed_x, packed_x, x_cu_seqlens=start, y_cu_seqlens=start, pairs="aligned", directions="x_to_y")
        d, e = maxsim(packed_x, packed_y, **packed)
        return a.sum() + b.square().sum() + c.sum() + d.sum() + e.sum()

    leaves = [t.requires_grad_() for t in (x, y, packed_x, packed_y)]
    with backends.use(backend):
        expected = function(*leaves)
        found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*leaves)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        for f, e in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-7)


@needs_library
@pytest.mark.parametrize(("candidates", "dtype"), [(None, torch.bfloat16), (2, torch.float32)])
def test_opcheck(candidates: int | None, dtype: torch.dtype) -> None:
    x, y = (t.to(dtype) for t in token_sets((40, 4), (71, 4)).values())
    starts = torch.tensor([0, 3, 3, 40]), torch.tensor([0, 0, 13, 14, 50, 51, 71])
    for want, longest, keep, masks, needed in (
        ((True, True), (37, 300), True, (mask(40), None), (True, True)),
        ((False, True), (300, 70_000), False, (None, mask(71)), (False, True)),
    ):
        sets = (x, y, *starts, *masks, *longest, candidates)
        torch.library.opcheck(torch.ops.vlpfast.maxsim_fwd, (*sets, *want, True, False, keep))
        *scores, y_of_x, x_of_y = torch.ops.vlpfast.maxsim_fwd(*sets, *want, True, False, keep)
        gradients = [torch.ones_like(s) if wanted else None for s, wanted in zip(scores, want, strict=True)]
        torch.library.opcheck(torch.ops.vlpfast.maxsim_bwd, (*gradients, *sets, True, False, y_of_x, x_of_y, *needed))


def test_meta_and_fake_tensors_take_shape_only() -> None:
    x, y = torch.empty(7, 5, 3, device="meta"), torch.empty(9, 6, 3, device="meta", dtype=torch.bfloat16)
    scores = maxsim(x, y)
    assert all(s.shape == (7, 9) and s.is_meta and s.dtype == torch.float32 for s in scores)
    packed = maxsim(x[0], y, x_cu_seqlens=torch.empty(4, device="meta", dtype=torch.int32), directions="y_to_x")
    assert packed.shape == (3, 9)
    with FakeTensorMode():
        x, y, start = torch.empty(7, 5, 3), torch.empty(20, 3, requires_grad=True), torch.empty(4, dtype=torch.int64)
        scores = maxsim(x, y, torch.ones(7, 5, dtype=torch.bool), y_cu_seqlens=start, reduction="sum")
        assert [s.shape for s in scores] == [(7, 3), (7, 3)]
        (gradient,) = torch.autograd.grad(scores[0].sum() + scores[1].sum(), y)
        assert gradient.shape == y.shape
        with pytest.raises(ValueError, match="x_mask: expected shape"):
            maxsim(x, y, torch.ones(7, 4, dtype=torch.bool), y_cu_seqlens=start)


@needs_library
@pytest.mark.parametrize(("stash_bytes", "products"), [(1 << 30, 1), (0, 2)])
def test_products_are_counted(stash_bytes: int, products: int) -> None:
    for shapes, options, pairs in (
        (((3, 5, 4), (7, 6, 4)), {}, 21),
        (((3, 5, 4), (3, 7, 6, 4)), {"pairs": "own", "directions": "x_to_y"}, 21),
        (((3, 5, 4), (3, 6, 4)), {"pairs": "aligned"}, 3),
    ):
        with FlopCounterMode(display=False) as counter:
            run(*token_sets(*shapes).values(), stash_bytes=stash_bytes, **options)
        assert counter.get_total_flops() == products * 2 * pairs * 5 * 6 * 4


# --- wrong arguments --------------------------------------------------------------------------------------------------

X, Y = torch.ones(2, 5, 3), torch.ones(4, 6, 3)
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "x: expected a tensor, got list": (TypeError, {"x": [[1.0]]}),
    "y: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"y": Y.long()}),
    r"x: expected shape \[M, P, D\], got \(2, 5\)": (ValueError, {"x": X[..., 0]}),
    r"y: expected shape \[M, K, T, D\], got \(4, 6, 3\)": (ValueError, {"pairs": "own"}),
    r"x: expected shape \[L, D\] with x_cu_seqlens, got \(2, 5, 3\)": (ValueError, {"x_cu_seqlens": torch.tensor([0, 10])}),
    "y: expected width 3 as x has, got 2": (ValueError, {"y": Y[..., :2]}),
    "y: expected device cpu as x has, got meta": (ValueError, {"y": Y.to("meta")}),
    "x_mask: expected a tensor or None, got list": (TypeError, {"x_mask": [True]}),
    "x_mask: expected torch.bool, got torch.int64": (TypeError, {"x_mask": torch.ones(2, 5, dtype=torch.long)}),
    r"x_mask: expected shape \(2, 5\), got \(5, 2\)": (ValueError, {"x_mask": torch.ones(5, 2, dtype=torch.bool)}),
    r"y_mask: expected shape \(4, 6\), got \(4,\)": (ValueError, {"y_mask": torch.ones(4, dtype=torch.bool)}),
    "y_mask: expected device cpu as the tokens have": (ValueError, {"y_mask": torch.ones(4, 6, dtype=torch.bool, device="meta")}),
    "x_mask: expected None with x_cu_seqlens, got a mask": (
        ValueError,
        {"x": X[0], "x_mask": torch.ones(5, dtype=torch.bool), "x_cu_seqlens": torch.tensor([0, 5])},
    ),
    "x_cu_seqlens: expected a tensor or None, got list": (TypeError, {"x": X[0], "x_cu_seqlens": [0, 5]}),
    "x_cu_seqlens: expected torch.int32 or torch.int64, got torch.float32": (
        TypeError,
        {"x": X[0], "x_cu_seqlens": torch.tensor([0.0, 5.0])},
    ),
    r"x_cu_seqlens: expected a vector of one number more than there are sets, got \(0,\)": (
        ValueError,
        {"x": X[0], "x_cu_seqlens": torch.tensor([], dtype=torch.long)},
    ),
    "x_cu_seqlens: expected device cpu as the tokens have, got meta": (
        ValueError,
        {"x": X[0], "x_cu_seqlens": torch.tensor([0, 5], device="meta")},
    ),
    "x_cu_seqlens: expected numbers from 0 to 5 tokens, got 1 to 5": (
        ValueError,
        {"x": X[0], "x_cu_seqlens": torch.tensor([1, 5])},
    ),
    "y_cu_seqlens: expected numbers from 0 to 6 tokens, got 0 to 5": (
        ValueError,
        {"y": Y[0], "y_cu_seqlens": torch.tensor([0, 5])},
    ),
    "y_cu_seqlens: expected numbers that never fall, got -2 as a length": (
        ValueError,
        {"y": Y[0], "y_cu_seqlens": torch.tensor([0, 5, 3, 6])},
    ),
    "masked: expected 'ignore' with y_cu_seqlens": (
        ValueError,
        {"y": Y[0], "y_cu_seqlens": torch.tensor([0, 6]), "masked": "zero"},
    ),
    "y: expected as many sets as x for pairs='aligned', 2, got 4": (ValueError, {"pairs": "aligned"}),
    "y: expected candidates for each of the 2 sets of x for pairs='own', got shape": (
        ValueError,
        {"pairs": "own", "y": torch.ones(3, 4, 6, 3)},
    ),
    "y: expected candidates for each of the 2 sets of x for pairs='own', got 3 sets": (
        ValueError,
        {"pairs": "own", "y": Y[0], "y_cu_seqlens": torch.tensor([0, 2, 4, 6])},
    ),
    "directions: expected 'both', 'x_to_y' or 'y_to_x', got 'rows'": (ValueError, {"directions": "rows"}),
    "reduction: expected 'mean' or 'sum', got None": (ValueError, {"reduction": None}),
    "pairs: expected 'all', 'aligned' or 'own', got 'each'": (ValueError, {"pairs": "each"}),
    "masked: expected 'ignore' or 'zero', got True": (ValueError, {"masked": True}),
    "normalize: expected True or False, got 1": (TypeError, {"normalize": 1}),
    "stash_bytes: expected >= 0, got -1": (ValueError, {"stash_bytes": -1}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        maxsim(**({"x": X, "y": Y} | wrong))


@needs_library
def test_the_kernel_checks_what_only_it_can_see() -> None:
    """Compiled code skips the checks of values; and a number of the wrong type must not pass as another."""

    def raw(x_start: list[int], x_longest: int = 5, candidates: int | None = None, y_longest: int = 6) -> None:
        starts = torch.tensor(x_start), torch.tensor([0, 6])
        rest = (candidates, True, True, True, False, True)
        torch.ops.vlpfast.maxsim_fwd(X[0], Y[0], *starts, None, None, x_longest, y_longest, *rest)

    raw([0, 2, 5])
    for message, arguments in {
        "x_start: expected numbers from 0 to 5 tokens": ([0, 2, 7],),
        "x_start: expected 0 to 5 tokens in a set, got -1": ([0, 3, 2, 5],),
        "x_start: expected 0 to 2 tokens in a set, got 3": ([0, 2, 5], 2),
        "expected sets of less than 2.31 tokens, got 8589934597 and 6": ([0, 2, 5], 2**33 + 5),
        "expected sets of less than 2.31 tokens, got 5 and 8589934598": ([0, 2, 5], 5, None, 2**33 + 6),
        "candidates: expected 1 sets of y for 1 sets of x, got 4294967297 each": ([0, 5], 5, 2**32 + 1),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            raw(*arguments)
    with pytest.raises(RuntimeError, match="differ in width"):
        arguments = (X[0], Y[0, :, :2], torch.tensor([0, 5]), torch.tensor([0, 6]), None, None, 5, 6, None)
        torch.ops.vlpfast.maxsim_fwd(*arguments, True, True, True, False, True)
    starts = torch.tensor([0, 5]), torch.tensor([0, 6])
    for y_of_x in (torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(1, 5, dtype=torch.int32)):
        winners = y_of_x, torch.zeros(0, 6, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="expected the winners that the forward made of the same tokens"):
            arguments = (torch.ones(1, 1), None, X[0], Y[0], *starts, None, None, 5, 6, None, True, False)
            torch.ops.vlpfast.maxsim_bwd(*arguments, *winners, True, True)
