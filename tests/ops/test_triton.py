"""The Triton backend beyond the conformance table: chips, chunks, precision by regime, torch's machinery, compiled code.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py), which multiplies in float32: what tensor cores do to
float32 products shows on a GPU alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conformance import cone, duplicates, features, ids, long_vectors, pairs, permutation, relative_error
from torch import Tensor

from vlpfast.ops import _lazy, backends
from vlpfast.ops.contrastive import clip_loss, pair_logsumexp
from vlpfast.ops.flops import FlopCounterMode

pytestmark = [pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)
if not backends.available()["triton"]:
    from vlpfast.ops import _triton
    from vlpfast.ops.contrastive import triton_pair

ROOT = Path(__file__).parents[2]
DEVICE = backends.device_type("triton")


def value_and_gradients(function, *inputs: Tensor, backend: str = "triton") -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    with backends.use(backend):
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]


def weighted(results: tuple[Tensor, Tensor]) -> Tensor:
    return sum((r * torch.linspace(0.5, 1.5, len(r), device=r.device)).sum() for r in results)


def exact_values(function, *inputs: Tensor) -> list[Tensor]:
    return value_and_gradients(function, *[t.double() for t in inputs], backend="reference")


def problem(m: int, n: int, d: int, dtype: torch.dtype = torch.bfloat16, noise: float | None = None) -> list[Tensor]:
    """x, y, scale, bias"""
    both = features(m, n, d, noise=noise)
    parts = [both["x"].to(dtype), both["y"].to(dtype), torch.tensor(14.3), torch.linspace(-1, 1, n)]
    return [t.to(DEVICE) for t in parts]


# --- choice -----------------------------------------------------------------------------------------------------------


def test_triton_is_never_the_automatic_choice_on_a_cpu() -> None:
    kernels = {"triton": "cuda"}
    assert backends.choose("an op", kernels, torch.device("cpu")) == "reference"
    with backends.use("triton"):
        assert backends.choose("an op", kernels, torch.device("cuda")) == "triton"


def test_the_interpreter_takes_cpu_tensors_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.available()["triton"] == ""
    with backends.use("triton"):
        assert backends.choose("an op", {"triton": "cuda"}, torch.device("cpu")) == "triton"
        with pytest.raises(RuntimeError, match="an op has no such kernel for cpu tensors; it has reference, cpp"):
            backends.choose("an op", {"cpp": "cpu"}, torch.device("cpu"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backends.available()["triton"] == "torch sees no CUDA device"


def test_float64_is_the_references() -> None:
    kernels, cuda = {"triton": "cuda"}, torch.device("cuda")
    with pytest.warns(UserWarning, match="float64 op has no kernel for torch.float64 tensors on cuda here: the slow"):
        assert backends.choose("float64 op", kernels, cuda, torch.float64) == "reference"
    x = torch.ones(2, 3, dtype=torch.float64, device=DEVICE)
    with backends.use("triton"), pytest.raises(RuntimeError, match="is forced, but it has no kernels for torch"):
        clip_loss(x, x, 1.0)


def test_triton_is_imported_at_the_first_call() -> None:
    script = """
import sys, torch
from vlpfast.ops import backends, contrastive
before = "triton" in sys.modules
with backends.use("triton"):
    loss = contrastive.clip_loss(torch.eye(3), torch.eye(3), 10.0)
print(before, "triton" in sys.modules, round(float(loss), 8))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.stdout.split() == ["False", "True", "9.08e-05"], done.stderr


def test_every_lazy_operator_has_its_function() -> None:
    for op, (module, function) in _lazy.KERNELS.items():
        assert hasattr(torch.ops.vlpfast, op)
        assert callable(getattr(__import__(f"vlpfast.ops.{module}", fromlist=[function]), function))


# --- tiles, chunks, offsets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [("sm_80", torch.bfloat16), ("sm_90", torch.bfloat16), ("default", torch.bfloat16), ("default", torch.float32)],
)
def test_the_tiles_that_ship(chip: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On more than one block each way. On a GPU only the chip's own tiles are sure to fit."""
    if DEVICE == "cuda" and chip != _triton.chip(torch.device("cuda")):
        pytest.skip("another chip's tiles")
    monkeypatch.setattr(_triton, "chip", lambda device: chip)
    inputs, left_out = problem(130, 267, 70, dtype), tuple(t.to(DEVICE) for t in ids(130, 267, 11))

    def function(x, y, scale, bias):
        return weighted(pair_logsumexp(x, y, scale, own=3, leave_out=left_out, bias=bias))

    # sums that were not written would look like underflow, and the exact form would make them good
    assert not torch.ops.vlpfast.pair_fwd_triton(*inputs, None, 3, *left_out, True, True, True, 0)[4]
    for found, exact in zip(value_and_gradients(function, *inputs), exact_values(function, *inputs), strict=True):
        assert relative_error(found, exact) < (4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("own", "wanted", "stash_bytes"),
    [("offset", (0, 1, 2, 3), 100 * 272 * 2), ("index", (0, 1, 2, 3), 0), ("offset", (3,), 0)],
)
def test_chunks_of_rows(own: str, wanted: tuple[int, ...], stash_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward's, whose sums by tile are added, and the backward's, which begin where the stash ends."""
    leaves = problem(260, 265, 20)
    column = 5 if own == "offset" else permutation(260, 265).to(DEVICE)

    def run(stash_bytes: int) -> list[Tensor]:
        def function(*some: Tensor) -> Tensor:
            x, y, scale, bias = (some[wanted.index(i)] if i in wanted else leaf for i, leaf in enumerate(leaves))
            return weighted(pair_logsumexp(x, y, scale, own=column, bias=bias, stash_bytes=stash_bytes))

        return value_and_gradients(function, *[leaves[i] for i in wanted])

    at_once = run(4 << 30)
    monkeypatch.setattr(triton_pair, "PARTIAL_BYTES", 1)
    monkeypatch.setattr(triton_pair, "WORKSPACE_BYTES", 1)
    for found, expected in zip(run(stash_bytes), at_once, strict=True):
        assert relative_error(found, expected) < 2e-3  # bfloat16 results: sums in another order, rounded once


def test_the_workspace_is_bounded_and_covers_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(30_000, 64, dtype=torch.bfloat16, device="meta")
    arguments = x, x, torch.empty((), device="meta"), None, None, 0, None, None
    with _triton.recording("sm_90") as launches:
        rows, columns, *saved = triton_pair.forward(*arguments, True, True, True, 0)
        triton_pair.backward(rows, columns, *arguments, True, True, *saved, True, True, True, False)
    kept = [t.arguments["kept_rows"] for t in launches if t.arguments.get("kept_rows") is not None]
    assert sum(len(t) for t in kept) == 30_000
    assert max(t.numel() * t.element_size() for t in kept) <= triton_pair.WORKSPACE_BYTES
    partial = [t.arguments["column_partial"] for t in launches if t.arguments.get("column_partial") is not None]
    assert max(t.numel() * 4 for t in partial) <= triton_pair.PARTIAL_BYTES
    with pytest.raises(ValueError, match="y: expected less than 16777216 rows for a Triton kernel, got 16777216"):
        triton_pair.forward(x, torch.empty(1 << 24, 64, device="meta"), *arguments[2:], True, True, True, 0)


def test_offsets_beyond_32_bits() -> None:
    row = 1 << 30
    x = torch.empty(2 * row + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 64), (row, 1))  # its pages stay untouched
    near, y, scale, _ = problem(3, 40, 64)
    x.copy_(near)
    with backends.use("triton"):
        for far, expected in zip(pair_logsumexp(x, y, scale), pair_logsumexp(near, y, scale), strict=True):
            assert torch.equal(far, expected)


def test_the_stash_is_whole_rows_of_half_precision() -> None:
    x, y, scale, _ = problem(20, 33, 8)
    for dtype, stash in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)):
        for keep, rows in ((20 * 48, 20), (20 * 48 - 1, 19), (47, 0), (10**9, 20)):
            arguments = x.to(dtype), y.to(dtype), scale, None, None, 0, None, None, True, True, False, keep
            found = torch.ops.vlpfast.pair_fwd_triton(*arguments)[-1]
            assert found.shape == (rows, 48) and found.dtype == stash
            assert (found[:, 33:] == 0).all() and (found.diagonal() == 0).all()


def test_the_same_bits_every_time() -> None:
    inputs = problem(150, 140, 33)

    def function(x, y, scale, bias):
        return weighted(pair_logsumexp(x, y, scale, own=None, bias=bias))

    first = value_and_gradients(function, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, value_and_gradients(function, *inputs), strict=True))


# --- precision --------------------------------------------------------------------------------------------------------

REGIMES = {
    "random, scale 14.3": lambda: pairs(140, 140, 64),
    "random, scale 100": lambda: pairs(140, 140, 64, scale=100.0),
    "initial cone": lambda: cone(140, 64),
    "low loss": lambda: pairs(140, 140, 64, noise=0.6, scale=50.0),
    "near-zero loss": lambda: pairs(140, 140, 256, noise=0.2, scale=100.0),
    "near-duplicates": lambda: duplicates(140, 64),
    "2 % noisy pairs": lambda: noisy(140, 64),
}


def noisy(n: int, d: int) -> dict[str, Tensor]:
    """A solved batch in which every fiftieth row has another one's text."""
    arguments = pairs(n, n, d, noise=0.3, scale=50.0)
    wrong = torch.arange(0, n, 50)
    arguments["y"][wrong] = arguments["y"][wrong.roll(1)]
    return arguments


def dense_clip_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scale * x @ y.T, labels) + F.cross_entropy(scale * y @ x.T, labels)) / 2


@pytest.mark.parametrize("regime", REGIMES)
def test_errors_in_bfloat16_are_not_above_eager_ones(regime: str) -> None:
    arguments = REGIMES[regime]()
    inputs = [arguments["x"].bfloat16().to(DEVICE), arguments["y"].bfloat16().to(DEVICE), arguments["scale"].to(DEVICE)]
    exact = exact_values(clip_loss, *inputs)
    found = value_and_gradients(clip_loss, *inputs)
    eager = value_and_gradients(lambda x, y, scale: dense_clip_loss(x, y, scale.bfloat16()).float(), *inputs, backend="reference")
    for ours, theirs, right in zip(found, eager, exact, strict=True):
        assert relative_error(ours, right) <= relative_error(theirs, right)
    assert relative_error(found[0], exact[0]) < 2e-5


@pytest.mark.parametrize("size", [1e-33, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_and_large_incoming_gradients(size: float, dtype: torch.dtype) -> None:
    """The gradients of float16 features would leave its range, so they are looked at by the scale's."""
    arguments = cone(40, 16)
    inputs = [arguments["x"].to(DEVICE, dtype), arguments["y"].to(DEVICE, dtype), arguments["scale"].to(DEVICE)]

    def total(x, y, scale):
        rows, cols = pair_logsumexp(x, y, scale)
        return (size * torch.linspace(-1, 2, 40, device=DEVICE) * (rows + cols)).sum()

    found, exact = value_and_gradients(total, *inputs), exact_values(total, *inputs)
    assert relative_error(found[3], exact[3]) < 1e-3  # a difference of terms fifty times larger
    if dtype == torch.bfloat16:
        for ours, right in zip(found[1:3], exact[1:3], strict=True):
            assert relative_error(ours, right) < 8e-3


def test_the_exact_form_is_taken_when_sums_underflow_and_only_then() -> None:
    for arguments, expected in ((pairs(40, 40, 16, scale=100.0), False), (long_vectors(40, 16), True)):
        x, y, scale = (arguments[name].float().to(DEVICE) for name in ("x", "y", "scale"))
        exact = torch.ops.vlpfast.pair_fwd_triton(x, y, scale, None, None, 0, None, None, True, True, True, 0)[4]
        assert bool(exact) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_exact_form_over_several_blocks(dtype: torch.dtype) -> None:
    """The long vectors come last, so that maxima rise from block to block."""
    arguments = long_vectors(100, 16)
    x, y = (arguments[name].flip(0).to(DEVICE, dtype) for name in ("x", "y"))
    inputs = [x[20:], y, arguments["scale"].to(DEVICE), torch.linspace(-1, 1, 100, device=DEVICE)]
    assert torch.ops.vlpfast.pair_fwd_triton(*inputs, None, 20, None, None, True, True, True, 0)[4]

    def function(x, y, scale, bias):
        return weighted(pair_logsumexp(x, y, scale, own=20, bias=bias))

    for found, exact in zip(value_and_gradients(function, *inputs), exact_values(function, *inputs), strict=True):
        assert relative_error(found, exact) < (8e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", range(4))
def test_numbers_that_are_none_reach_the_result(where: int, value: float) -> None:
    leaves = problem(20, 30, 6, torch.float32)
    leaves[where].view(-1)[0] = value
    leaves = [t.requires_grad_() for t in leaves]
    with backends.use("triton"):
        rows, cols = pair_logsumexp(*leaves[:3], bias=leaves[3])
        assert not rows.sum().isfinite() and not cols.sum().isfinite()
        (rows.sum() + cols.sum()).backward()
    assert not leaves[0].grad.sum().isfinite()


def test_an_own_column_that_does_not_exist_gives_nan_and_touches_nothing() -> None:
    """Indices on a GPU are not looked at beforehand."""
    x, y, scale, _ = problem(4, 6, 3, torch.float32)
    own = torch.tensor([0, 1, 2**33, -1], device=DEVICE)
    arguments = x, y, scale, None, own, None, None, None
    rows, cols, *saved = torch.ops.vlpfast.pair_fwd_triton(*arguments, True, True, True, 1000)
    assert rows.isfinite().tolist() == [True, True, False, False] and cols.isfinite().all()
    torch.ops.vlpfast.pair_bwd_triton(rows, cols, *arguments, True, True, *saved, True, True, True, True)


def test_rounding_of_what_products_read() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def rounded(out, tf32, t, N: tl.constexpr):
        at = tl.arange(0, N)
        value = tl.load(t + at)
        tl.store(out + at, _triton.narrow(value, tl.bfloat16))
        tl.store(tf32 + at, _triton.to_tf32(value))

    t = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 1024)
    t[:4] = torch.tensor([float("nan"), float("inf"), 0.0, 1 + 2**-8 + 2**-9])
    t = t.to(DEVICE)
    half, ten_bits = torch.empty_like(t, dtype=torch.bfloat16), torch.empty_like(t)
    rounded[(1,)](half, ten_bits, t, N=1024)
    assert torch.equal(half.nan_to_num(7.0), t.bfloat16().nan_to_num(7.0)) and half[0].isnan() and ten_bits[0].isnan()
    assert ((ten_bits[2:] - t[2:]).abs() <= 2**-11 * t[2:].abs()).all()
    assert (ten_bits[1:].view(torch.int32) & 0x1FFF == 0).all()


# --- torch's machinery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
@pytest.mark.parametrize("directions", ["both", "rows", "cols"])
def test_gradients_of_some_inputs_alone(wanted: tuple[int, ...], directions: str) -> None:
    leaves = problem(12, 17, 5, torch.float32)

    def gradients(of: tuple[int, ...]) -> list[Tensor | None]:
        own = [t.clone().requires_grad_(i in of) for i, t in enumerate(leaves)]
        with backends.use("triton"):
            results = pair_logsumexp(*own[:3], bias=own[3], directions=directions)
            weighted(results if directions == "both" else (results,)).backward()
        return [t.grad for t in own]

    for i, (some, everything) in enumerate(zip(gradients(wanted), gradients((0, 1, 2, 3)), strict=True)):
        assert (some is not None) == (i in wanted)
        assert some is None or torch.equal(some, everything)


def test_backward_twice_func_grad_and_autocast() -> None:
    leaves = [t.requires_grad_() for t in problem(12, 12, 5, torch.float32)[:3]]
    with backends.use("triton"):
        loss = clip_loss(*leaves)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))
        found = torch.func.grad(clip_loss, argnums=(0, 1, 2))(*[t.detach() for t in leaves])
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(clip_loss(*leaves), clip_loss(leaves[0].bfloat16(), leaves[1].bfloat16(), leaves[2]))
        with pytest.raises(NotImplementedError, match="second derivatives are made by the reference backend alone"):
            torch.func.grad(lambda x: torch.func.grad(clip_loss)(x, *leaves[1:]).sum())(leaves[0].detach())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    leaves = [t.requires_grad_() for t in problem(12, 17, 5)]

    def function(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        rows, cols = pair_logsumexp(x, y, scale, own=2, bias=bias)
        return rows.sum() + cols.square().sum() + clip_loss(x, y[:12], 10.0, stash_bytes=0)

    with backends.use("triton"):
        expected = function(*leaves)
        found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*leaves)
        assert torch.equal(found, expected)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("keep", "checks"),
    [
        (100, ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")),
        (1 << 30, ("test_schema", "test_faketensor")),
        (0, ("test_schema", "test_faketensor")),
    ],
)
def test_opcheck(keep: int, checks: tuple[str, ...]) -> None:
    x, y, scale, bias = problem(12, 17, 5)
    own, left_out = permutation(12, 17).to(DEVICE), (t.to(DEVICE) for t in ids(12, 17, 5))
    for arguments in (
        (x, y, scale, bias, own, None, *left_out, True, True, True, keep),
        (x.float(), y.float(), scale, None, None, 3, None, None, False, True, False, keep),
    ):
        torch.library.opcheck(torch.ops.vlpfast.pair_fwd_triton, arguments, test_utils=checks)
        rows, cols, *saved = torch.ops.vlpfast.pair_fwd_triton(*arguments)
        *shared, _, _ = arguments
        for needed in ((True, True, True, True), (False, True, False, False)):
            backward = torch.ones_like(rows), torch.ones_like(cols), *shared, *saved, *needed
            torch.library.opcheck(torch.ops.vlpfast.pair_bwd_triton, backward, test_utils=checks)


@pytest.mark.parametrize(("budget", "products"), [(4 << 30, 3), (0, 4)])
def test_three_products_with_the_stash_four_without(budget: int, products: int) -> None:
    x, y, scale = (t.requires_grad_() for t in problem(12, 17, 5)[:3])
    with backends.use("triton"):
        with FlopCounterMode(display=False) as counter:
            rows, cols = pair_logsumexp(x, y, scale, stash_bytes=budget)
            (rows.sum() + cols.sum()).backward()
        assert counter.get_total_flops() == products * 2 * 12 * 17 * 5
        with FlopCounterMode(display=False) as counter:
            pair_logsumexp(x, y.detach(), scale.detach(), stash_bytes=budget)[0].sum().backward()
        assert counter.get_total_flops() == (products - 1) * 2 * 12 * 17 * 5


# --- compiled ahead of time -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="waits for Triton's NVIDIA tools, on Linux alone")
@pytest.mark.parametrize(("chip", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_the_main_kernel_compiles_to_tensor_core_instructions_without_spills(chip: str, instruction: str) -> None:
    command = [sys.executable, "benchmarks/compiled_kernels.py", "--only", "pair_logsumexp, stash", "--kernel", "_centred"]
    command += ["--dtype", "bfloat16", "--chip", chip]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} == {"centred, summed, kept", "centred_gradient (rows)", "centred_gradient (columns)"}
    for k in kernels:
        assert k["spills"] == 0 and k["registers"] <= 255 and k["instructions"][instruction] > 0
