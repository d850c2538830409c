"""pair_softplus, pair_distill and sample_hard_negatives in Triton beyond the conformance table; see test_triton.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import features, ids, pairs, permutation, relative_error
from test_triton import DEVICE, exact_values, problem, value_and_gradients
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.contrastive import distill, pair_distill, pair_softplus, sample_hard_negatives, sigmoid_loss
from vlpfast.ops.contrastive.reference import gumbel, random_bits
from vlpfast.ops.flops import FlopCounterMode

pytestmark = pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")
if not backends.available()["triton"]:
    import triton
    import triton.language as tl

    from vlpfast.ops import _triton
    from vlpfast.ops.contrastive import triton_distill, triton_sample, triton_softplus

ROOT = Path(__file__).parents[2]
SEED = torch.tensor(-0x123456789ABCDEF)  # both halves have something to say


def check(function, inputs: list[Tensor], value: float, gradient: float) -> None:
    found, expected = value_and_gradients(function, *inputs), exact_values(function, *inputs)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(f, e) < (gradient if i else value), f"{i}: {relative_error(f, e):.1e}"


def summed(results: tuple[Tensor, ...]) -> Tensor:
    """Of pair_distill's results."""
    return sum((r * torch.linspace(0.5, 1.5, len(r), device=r.device)).sum() for r in (results[0], results[2]))


def softplus_of(m: int, n: int):
    left_out, own = tuple(t.to(DEVICE) for t in ids(m, n, 11)), (torch.arange(m) // 2).to(DEVICE)

    def function(x, y, scale, bias):
        return pair_softplus(x, y, scale, own=own, leave_out=left_out, bias=bias, negative_weight=0.3)

    return function


def distill_of(m: int, n: int, one_y: bool = True, **more):
    left_out, own = tuple(t.to(DEVICE) for t in ids(m, n, 11)), permutation(m, n).to(DEVICE)

    def function(x, y, scale, bias):
        y_t = y if one_y else y.detach().roll(1, 1)
        return summed(pair_distill(x, y, x.detach().flip(1), y_t, scale, 9.0, own=own, leave_out=left_out, bias_t=bias.detach()))

    return function


def of_x(function):
    """As a function of x and scale alone."""

    def wrapped(x, y, scale, bias):
        return lambda x, scale: function(x, y.to(x.dtype), scale, bias.to(scale.dtype))

    return wrapped


# --- tiles, parts, chunks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", ["sm_90", "default"])
def test_softplus_by_the_tiles_that_ship(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda" and chip != _triton.chip(torch.device("cuda")):
        pytest.skip("another chip's tiles")
    monkeypatch.setattr(_triton, "chip", lambda device: chip)
    check(softplus_of(130, 135), problem(130, 135, 70), 1e-5, 8e-3)


@pytest.mark.parametrize("m", [130, 256])
def test_softplus_in_chunks_of_rows(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_softplus, "WORKSPACE_BYTES", 1)
    check(softplus_of(m, m + 3), problem(m, m + 3, 5, torch.float32), 1e-5, 1e-4)


def test_distillation_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_distill, "WORKSPACE_BYTES", 1)
    x, y, scale, bias = problem(130, 133, 5, torch.float32)

    def function(x, y, scale):
        return distill_of(130, 133)(x, y, scale, bias.to(scale.dtype))

    check(function, [x, y, scale], 1e-5, 1e-4)


@pytest.mark.parametrize("one_y", [True, False])
@pytest.mark.parametrize(("programs", "dtype"), [(1, torch.bfloat16), (3, torch.bfloat16), (1000, torch.float16)])
def test_distillation_in_parts_of_the_columns(programs: int, dtype: torch.dtype, one_y: bool, monkeypatch) -> None:
    """On fewer parts than tiles, on about as many, on one for each."""
    right = triton_distill.tile
    monkeypatch.setattr(triton_distill, "tile", lambda name, x: right(name, x) | {"PROGRAMS": programs})
    x, y, scale, bias = problem(20, 267, 33, dtype)
    function = of_x(distill_of(20, 267, one_y))(x, y, scale, bias)
    check(function, [x, scale], 1e-5, 8e-3 if dtype == torch.bfloat16 else 2e-3)


def test_wide_features_have_no_slopes_but_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, scale, bias = problem(20, 45, 40, torch.float32)
    function = of_x(distill_of(20, 45))(x, y, scale, bias)
    narrow = value_and_gradients(function, x, scale)
    for module in (distill, triton_distill):
        monkeypatch.setattr(module, "triton_width", lambda dtype: 39)
    with FlopCounterMode(display=False) as counter:
        wide = value_and_gradients(function, x, scale)
    assert counter.get_total_flops() == 5 * 2 * 20 * 45 * 40  # both products twice, one gradient
    for a, b in zip(narrow, wide, strict=True):
        assert relative_error(a, b) < 1e-5


def test_the_same_bits_every_time() -> None:
    inputs = problem(20, 131, 5)
    for function in (softplus_of(20, 131), lambda x, y, s, b: distill_of(20, 131)(x, y, s, b) + 0 * b.sum()):
        for a, b in zip(value_and_gradients(function, *inputs), value_and_gradients(function, *inputs), strict=True):
            assert torch.equal(a, b)


# --- precision --------------------------------------------------------------------------------------------------------

REGIMES = {
    "initial scale and bias": lambda: pairs(100, 100, 64, scale=10.0, bias=torch.tensor(-10.0)),
    "late in training": lambda: pairs(100, 100, 64, noise=0.3, scale=112.0, bias=torch.tensor(-16.5)),
    "near-zero loss": lambda: pairs(100, 100, 64, noise=0.1, scale=100.0, bias=torch.tensor(-50.0)),
    "negatives at bias -80": lambda: pairs(60, 60, 64, scale=2.0, bias=torch.tensor(-80.0), own=None),  # 1e-33
}


@pytest.mark.parametrize("regime", REGIMES)
def test_softplus_in_bfloat16_keeps_its_digits(regime: str) -> None:
    arguments = REGIMES[regime]()
    own = arguments.pop("own", 0)
    x, y, scale, bias = (arguments[name].to(DEVICE) for name in ("x", "y", "scale", "bias"))
    inputs = [x.bfloat16(), y.bfloat16(), scale.float(), bias.float()]
    check(lambda x, y, scale, bias: sigmoid_loss(x, y, scale, bias, own=own), inputs, 3e-6, 4e-3)


@pytest.mark.parametrize("weight", [0.0, 1e-30, 1e30])
def test_softplus_with_small_and_large_weights_of_negatives(weight: float) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, y, scale, bias = problem(20, 33, 8, dtype)
        check(
            lambda x, y, s, b: pair_softplus(x, y, s, bias=b, negative_weight=weight),
            [x.float(), y.float(), scale, bias],
            1e-5,
            1e-4,
        )
        with backends.use("triton"):
            loss = pair_softplus(x.requires_grad_(), y, scale, bias=bias, negative_weight=weight)
            factor = 1e-3 / max(1.0, weight)
            found = torch.autograd.grad(factor * loss, x)[0]
        with backends.use("reference"):
            exact = x.detach().double().requires_grad_()
            loss = pair_softplus(exact, y.double(), scale.double(), bias=bias.double(), negative_weight=weight)
            expected = torch.autograd.grad(factor * loss, exact)[0]
        assert relative_error(found, expected) < 8e-3


@pytest.mark.parametrize("size", [1e-33, 1e30])
def test_small_and_large_incoming_gradients_of_a_distillation(size: float) -> None:
    x, y, scale, bias = problem(20, 33, 8)

    def function(x, y):
        return size * distill_of(20, 33)(x, y, scale.to(torch.float64 if x.dtype == torch.float64 else torch.float32), bias)

    check(function, [x, y], 1e-4, 8e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", range(4))
def test_numbers_that_are_none_reach_the_result(where: int, value: float) -> None:
    inputs = problem(20, 33, 8)
    inputs[where].view(-1)[5 if where != 2 else 0] = value
    with backends.use("triton"):
        assert not pair_softplus(*inputs[:3], bias=inputs[3]).isfinite()
        x, y, scale, bias = inputs
        found = pair_distill(x, y, x, y, scale, scale, bias_t=bias)
    assert not torch.stack(found[:2]).isfinite().all()


def test_an_own_column_that_does_not_exist_gives_nan() -> None:
    own = torch.arange(20, device=DEVICE)
    own[3] = 99
    x, y, _, _ = problem(20, 33, 8)
    one = torch.ones((), device=DEVICE)
    options = (torch.zeros(33, device=DEVICE), own, None, None, None, 1.0, True, True, True, True)
    loss, dx, dy, _, dbias = torch.ops.vlpfast.pair_softplus_triton(x, y, one, *options)
    assert loss.isnan() and dx[:3].isfinite().all() and dy.isfinite().all() and dbias[:32].isfinite().all()
    student, _, cross, *_ = torch.ops.vlpfast.pair_distill_fwd_triton(
        x, y, x, None, one, one, None, own, None, None, None, True, 0
    )
    assert student[3].isnan() and cross[3].isnan() and student[:3].isfinite().all() and student[4:].isfinite().all()


# --- draws ------------------------------------------------------------------------------------------------------------

if not backends.available()["triton"]:

    @triton.jit
    def _bits(out, gumbels, seed, first_row, first_column, STREAM: tl.constexpr):
        rows = first_row + tl.arange(0, 4)
        bits = triton_sample.random_bits(rows, first_column, STREAM, tl.load(seed), 32)
        at = tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(out + at, bits.to(tl.int64))
        tl.store(gumbels + at, triton_sample.gumbel(bits))

    @triton.jit
    def _gumbels(out, bits):
        i = tl.arange(0, 16)
        tl.store(out + i, triton_sample.gumbel(tl.load(bits + i).to(tl.uint32)))


def test_random_bits_are_the_references() -> None:
    found, gumbels = torch.empty(4, 32, dtype=torch.int64, device=DEVICE), torch.empty(4, 32, device=DEVICE)
    for seed in (SEED, torch.tensor(7), torch.tensor(2**62 + 2**31)):
        for stream in (0, 1):
            _bits[(1,)](found, gumbels, seed.to(DEVICE), 40, 72, stream)
            expected = random_bits(44, 104, stream, seed)[40:, 72:]
            assert torch.equal(found.cpu(), expected)
            torch.testing.assert_close(gumbels.cpu().double(), gumbel(expected), rtol=2e-6, atol=2e-6)


def test_gumbels_at_the_ends() -> None:
    last = 2**32 - 1
    bits = torch.tensor(
        [0, 1, 2, 77, 2**23 + 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 << 30, last - 99, last - 3, last - 2, last - 1, last, 5]
    )
    found = torch.empty(16, device=DEVICE)
    _gumbels[(1,)](found, bits.to(DEVICE))
    torch.testing.assert_close(found.cpu().double(), gumbel(bits), rtol=1e-6, atol=1e-6)


def draws(backend: str, x: Tensor, y: Tensor, scale, count: int, **more) -> Tensor:
    with backends.use(backend):
        return sample_hard_negatives(x, y, scale, count, seed=SEED.to(x.device), **more).cpu()


@pytest.mark.parametrize("uniform", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["offset", "index", "leave out", "no own pair", "one column for all", "strided"])
def test_draws_are_the_references(case: str, dtype: torch.dtype, uniform: float) -> None:
    """Keys are rounded to float32: of 160 draws here no two are so close that it shows."""
    arguments = {
        "offset": lambda: {"own": 11},
        "index": lambda: {"own": permutation(20, 70)},
        "leave out": lambda: {"leave_out": ids(20, 70, 7)},
        "no own pair": lambda: {"own": None, "leave_out": ids(20, 70, 7)},
        "one column for all": lambda: {"own": torch.full((20,), 4)},
        "strided": lambda: {"own": permutation(40, 70)[::2]},
    }[case]()
    both = features(20, 70, 6)
    x, y = both["x"].to(dtype), both["y"].to(dtype)
    if case == "strided":
        x, y = x.T.contiguous().T, y.repeat(1, 2)[:, :6]
    expected = draws("reference", x.double(), y.double(), 14.3, 8, uniform=uniform, **arguments)
    at = {
        k: tuple(t.to(DEVICE) for t in v) if isinstance(v, tuple) else v.to(DEVICE) if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }
    for count in (1, 3, 8):
        assert torch.equal(draws("triton", x.to(DEVICE), y.to(DEVICE), 14.3, count, uniform=uniform, **at), expected[:, :count])


@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_draws_do_not_depend_on_parts_or_other_rows(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sample, "PROGRAMS", programs)
    both = features(70, 300, 6)
    x, y = both["x"].float().to(DEVICE), both["y"].float().to(DEVICE)
    for uniform in (0.0, 0.01):
        found = draws("triton", x, y, 14.3, 3, own=None, uniform=uniform)
        expected = draws("reference", x.double().cpu(), y.double().cpu(), 14.3, 3, own=None, uniform=uniform)
        assert torch.equal(found, expected)
        if programs == 4:
            assert torch.equal(draws("triton", x[:9], y, 14.3, 3, own=None, uniform=uniform), found[:9])


@pytest.mark.parametrize("uniform", [0.0, 0.1])
def test_draws_where_candidates_are_few_or_logits_are_none(uniform: float) -> None:
    x = torch.ones(5, 3, device=DEVICE)
    left_out = tuple(t.to(DEVICE) for t in (torch.tensor([1, 2, 3, 1, 1]), torch.tensor([1, 2, 1, 1, 1])))
    drawn = draws("triton", x, x, 1.0, 4, leave_out=left_out, uniform=uniform)
    assert [int((row >= 0).sum()) for row in drawn] == [1, 4, 4, 1, 1] and drawn[0].tolist() == [1, -1, -1, -1]
    y = x.repeat(2, 1)
    y[4, 0], y[7, 1], y[2, 0] = float("nan"), float("inf"), -float("inf")
    found = draws("triton", x, y, 1.0, 10, own=None, uniform=uniform)
    expected = draws("reference", x.double().cpu(), y.double().cpu(), 1.0, 10, own=None, uniform=uniform)
    assert torch.equal(found, expected) and found[:, :2].tolist() == [[4, 7]] * 5
    assert draws("triton", x[:0], x, 1.0, 2).shape == (0, 2)


def test_many_draws_are_not_tritons() -> None:
    x = torch.eye(70, device=DEVICE)
    with pytest.raises(RuntimeError, match="but sample_hard_negatives with count > 64 has no such kernel for"):
        draws("triton", x, x, 1.0, 65)
    assert (draws("triton", x, x, 1.0, 64).sort().values.diff() > 0).all()


# --- torch's machinery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "products"), [((), 1), ((0,), 2), ((1,), 2), ((2,), 1), ((3,), 1), ((1, 2), 2), ((0, 1, 2, 3), 3)]
)
def test_softplus_makes_what_is_wanted(wanted: tuple[int, ...], products: int) -> None:
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(problem(12, 17, 5, torch.float32))]
    with backends.use("triton"):
        with FlopCounterMode(display=False) as counter:
            loss = softplus_of(12, 17)(*leaves)
        assert counter.get_total_flops() == products * 2 * 12 * 17 * 5
        found = torch.autograd.grad(loss, [leaves[i] for i in wanted]) if wanted else ()
    expected = exact_values(softplus_of(12, 17), *leaves)
    assert relative_error(loss.detach(), expected[0]) < 1e-5
    for i, gradient in zip(wanted, found, strict=True):
        assert relative_error(gradient, expected[1 + i]) < 1e-4


@pytest.mark.parametrize(("wanted", "products"), [((), 2), ((0,), 4), ((1,), 5), ((2,), 2), ((0, 1), 6)])
def test_distillation_makes_what_is_wanted(wanted: tuple[int, ...], products: int) -> None:
    *leaves, bias = problem(12, 17, 5, torch.float32)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(leaves)]
    with backends.use("triton"), FlopCounterMode(display=False) as counter:
        loss = distill_of(12, 17)(*leaves, bias)
        found = torch.autograd.grad(loss, [leaves[i] for i in wanted]) if wanted else ()
    assert counter.get_total_flops() == products * 2 * 12 * 17 * 5
    expected = exact_values(lambda x, y, scale: distill_of(12, 17)(x, y, scale, bias.double()), *leaves)
    for i, gradient in zip(wanted, found, strict=True):
        assert relative_error(gradient, expected[1 + i]) < 1e-4


def test_func_grad_and_autocast() -> None:
    inputs = problem(12, 17, 5, torch.float32)
    functions = (
        softplus_of(12, 17),
        distill_of(12, 17),
        lambda x, y, s, b: sample_hard_negatives(x, y, s, 2, seed=SEED.to(DEVICE)),
    )
    for i, function in enumerate(functions):
        with backends.use("triton"):
            half = function(*(t.bfloat16() if k < 2 else t for k, t in enumerate(inputs)))
            with torch.autocast(DEVICE, torch.bfloat16):
                assert torch.equal(function(*inputs), half)
            if i < 2:
                found = torch.func.grad(function, argnums=(0, 2))(*inputs)
        if i < 2:
            expected = exact_values(lambda x, y, s, f=function: f(x, y, s, inputs[3].to(s.dtype)), *inputs[:3])
            for f, e in zip(found, (expected[1], expected[3]), strict=True):
                assert relative_error(f, e) < 1e-4


def test_compiles_without_a_break() -> None:
    softplus, distillation, seed = softplus_of(12, 17), distill_of(12, 17), SEED.to(DEVICE)

    def function(x, y, scale, bias):
        drawn = sample_hard_negatives(x, y, scale, 2, seed=seed, uniform=0.1)
        return softplus(x, y, scale, bias) + distillation(x, y, scale, bias) + drawn.sum()

    inputs = problem(12, 17, 5, torch.float32)
    with backends.use("triton"):
        expected = value_and_gradients(function, *inputs)
        found = value_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), *inputs)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_opcheck() -> None:
    x, y, scale, bias = problem(12, 17, 5)
    own, ops = (torch.arange(12) // 2).to(DEVICE), torch.ops.vlpfast
    left_out = tuple(t.to(DEVICE) for t in ids(12, 17, 5))
    torch.library.opcheck(ops.pair_softplus_triton, (x, y, scale, bias, own, None, *left_out, 0.5, True, True, True, True))
    torch.library.opcheck(ops.pair_softplus_triton, (x, y, scale, None, None, 3, None, None, 1.0, False, True, False, False))
    torch.library.opcheck(ops.sample_hard_negatives_triton, (x, y, scale, own, None, *left_out, 3, 0.1, SEED.to(DEVICE)))
    both = x, y, x, None, scale, scale, bias, own, None, *left_out
    for slopes in (True, False):
        torch.library.opcheck(ops.pair_distill_fwd_triton, (*both, slopes, 0))
    student, _, cross, stats, _, stash = ops.pair_distill_fwd_triton(*both, False, 0)
    torch.library.opcheck(ops.pair_distill_bwd_triton, (student, cross, *both, stats, stash, True, True))


# --- compiled ahead of time -------------------------------------------------------------------------------------------

COMPILE = """
import json, sys
import torch
sys.path.insert(0, "benchmarks")
import compiled_kernels as c
from vlpfast.ops import _triton
chip, half = sys.argv[1], (torch.bfloat16,)
main = ("pair_softplus", "_softplus"), ("negatives, uniform", "_draw"), ("distill, one pass", "_distilled_sums")
for operator, kernel in main:
    for k in c.table(chip, operator, half, kernel):
        print(json.dumps([k.kernel, k.spills, k.registers, k.instructions]))
if chip == "sm_80":
    raise SystemExit
c.N = c.D = 1  # sizes of 1 are constants, which have no methods
with _triton.recording(chip) as launches:
    for operator in ("pair_softplus", "sample_hard_negatives, uniform part", "pair_distill, recompute"):
        c.CALLS[operator](torch.float32)
for launch in {l.kernel.__name__: l for l in launches}.values():
    c.compile_launch(launch, chip)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="waits for Triton's NVIDIA tools, on Linux alone")
@pytest.mark.parametrize(("chip", "product"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_main_kernels_compile_to_tensor_core_instructions_without_spills(chip: str, product: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE, chip], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({name for name, *_ in kernels}) == 4
    for name, spills, registers, instructions in kernels:
        assert spills == 0 and registers <= 255, name
        # 32 rows are few for a warp group; what only merges draws has no product
        assert name == "merge_draws" or instructions["HMMA" if name == "distilled_sums" else product] > 0, name
