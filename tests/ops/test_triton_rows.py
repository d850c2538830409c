"""pair_logsumexp for rows alone in Triton, where each row has a shift for each ROW_BLOCK columns: precision, stash, chunks.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py).
"""

from __future__ import annotations

import pytest
import torch
from conformance import features, relative_error
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._schemas import ROW_BLOCK, stash_shape, stash_width
from vlpfast.ops.contrastive import pair_logsumexp

pytestmark = [pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)
if not backends.available()["triton"]:
    from vlpfast.ops import _triton
    from vlpfast.ops.contrastive import triton_pair, triton_tiles

DEVICE = backends.device_type("triton")
ALL = 4 << 30
# what rounded features leave is no error: results are compared with those of the same features in float64
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def problem(
    m: int, n: int, d: int, dtype: torch.dtype = torch.float32, norm: float | Tensor = 1.0, scale: float = 1.0
) -> dict[str, Tensor]:
    """Features, those of x times `norm`, a scale and a bias for each column."""
    both = features(m, n, d)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3))
    inputs = {"x": (both["x"] * norm).to(dtype), "y": both["y"].to(dtype), "scale": torch.tensor(scale), "bias": bias}
    return {name: t.to(DEVICE) for name, t in inputs.items()}


def labels(m: int, n: int) -> Tensor:
    """Columns of the rows, some of them twice."""
    return torch.randint(n, (m,), generator=torch.Generator().manual_seed(4)).to(DEVICE)


def run(inputs: dict[str, Tensor], backend: str = "triton", **more) -> list[Tensor]:
    """rows, and the gradients of a weighted sum of them by x, y, scale, bias."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    with backends.use(backend):
        rows = pair_logsumexp(**leaves, directions="rows", **more)
    weights = torch.linspace(0.5, 1.5, len(rows), dtype=rows.dtype, device=rows.device)
    return [rows.detach(), *torch.autograd.grad((rows * weights).sum(), list(leaves.values()))]


def exactly(inputs: dict[str, Tensor], **more) -> list[Tensor]:
    return run({name: t.double() for name, t in inputs.items()}, backend="reference", **more)


def check(inputs: dict[str, Tensor], **more) -> None:
    (value, *gradients), (exact, *exact_gradients) = run(inputs, **more), exactly(inputs, **more)
    assert relative_error(value, exact) < 1e-6
    for name, found, right in zip(inputs, gradients, exact_gradients, strict=True):
        assert relative_error(found, right) < TOLERANCES[inputs["x"].dtype], name


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("norm", [1.0, 100.0, 1e4])
def test_logits_of_any_size(norm: float, dtype: torch.dtype) -> None:
    inputs = problem(75, 300, 20, dtype, norm=norm)
    ids = labels(75, 7), labels(300, 9)
    check(inputs, own=labels(75, 300))
    check(inputs, own=None, leave_out=ids, stash_bytes=0)


def test_rows_of_wildly_different_norm() -> None:
    inputs = problem(70, 290, 24, norm=torch.logspace(-3, 4, 70, dtype=torch.double)[:, None])
    for budget in (ALL, 0):
        found, exact = (f(inputs, own=11, stash_bytes=budget)[1].double() for f in (run, exactly))
        assert ((found - exact).norm(dim=1) <= 1e-5 * exact.norm(dim=1)).all()  # each row of dx by itself


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tiles_that_ship(chip: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On more than one block each way. On a GPU only the chip's own tiles are sure to fit; the default is in the other tests."""
    if DEVICE == "cuda" and chip != _triton.chip(torch.device("cuda")):
        pytest.skip("another chip's tiles")
    monkeypatch.setattr(_triton, "chip", lambda device: chip)
    check(problem(130, 267, 70, dtype, norm=30.0), own=3)


def test_no_tile_of_the_gradient_lies_in_two_blocks_of_columns() -> None:
    for chip in _triton.read(triton_tiles.TABLE).values():
        for chosen in chip["pair_gradient"].values():
            assert ROW_BLOCK % chosen["BLOCK_L"] == 0 and ROW_BLOCK % chosen["BLOCK_K"] == 0
        for chosen in chip["pair_rows"].values():
            assert chosen["BLOCK_N"] in (ROW_BLOCK, 2 * ROW_BLOCK)  # the latter is finished in two halves


def test_weights_of_rounded_exponentials_sum_to_one() -> None:
    inputs = problem(60, 300, 20, torch.bfloat16, norm=20.0)
    for budget in (ALL, 0):
        dbias = run(inputs, own=None, stash_bytes=budget)[4]
        assert dbias.double().sum().item() == pytest.approx(60, rel=1e-6)


def test_any_strides() -> None:
    inputs = problem(20, 150, 6)
    inputs["x"] = inputs["x"].repeat_interleave(2, 1)[:, ::2]
    inputs["y"] = inputs["y"].T.contiguous().T
    inputs["bias"] = inputs["bias"][:1].expand(150)
    check(inputs, own=labels(20, 150))


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3), (1, 1, 1)])
@pytest.mark.parametrize("budget", [ALL, 0])
def test_nothing_to_sum(shape: tuple[int, int, int], budget: int) -> None:
    inputs = problem(*shape, torch.bfloat16)
    own = 0 if shape == (1, 1, 1) else None
    for found, exact in zip(run(inputs, own=own, stash_bytes=budget), exactly(inputs, own=own), strict=True):
        assert torch.equal(found.double(), exact)


# --- what stays out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [ALL, 0])
def test_columns_with_a_bias_of_minus_infinity_are_not_there(budget: int) -> None:
    inputs = problem(9, 400, 6, norm=30.0)
    there = torch.arange(400, device=DEVICE) % 3 != 1
    there[100:270] = False  # a whole block of the columns
    inputs["bias"][~there] = -torch.inf
    value, dx, dy, dscale, dbias = run(inputs, own=None, stash_bytes=budget)
    cut = inputs | {"y": inputs["y"][there], "bias": inputs["bias"][there]}
    for found, exact in zip((value, dx, dy[there], dscale, dbias[there]), exactly(cut, own=None), strict=True):
        assert relative_error(found, exact) < 1e-5
    assert not dy[~there].any() and not dbias[~there].any()
    nothing, *gradients = run(inputs | {"bias": torch.full_like(inputs["bias"], -torch.inf)}, own=None, stash_bytes=budget)
    assert (nothing == -torch.inf).all() and not any(g.any() for g in gradients)


@pytest.mark.parametrize("budget", [ALL, 0])
def test_everything_left_out_of_some_rows(budget: int) -> None:
    inputs = problem(10, 300, 6, norm=30.0)
    ids = torch.arange(10, device=DEVICE) % 2, torch.zeros(300, dtype=torch.long, device=DEVICE)
    value, dx, dy, dscale, dbias = run(inputs, own=None, leave_out=ids, stash_bytes=budget)
    exact = exactly(inputs | {"x": inputs["x"][1::2]}, own=None)[0]
    assert (value[::2] == -torch.inf).all() and relative_error(value[1::2], exact) < 1e-6
    assert not dx[::2].any() and dx[1::2].any(1).all() and dy.any() and dscale.isfinite() and dbias.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "y", "scale", "bias"])
def test_numbers_that_are_none_reach_the_result(where: str, value: float) -> None:
    inputs = problem(12, 270, 6)
    inputs["x"][0, 0] = 0.5  # the first row's logit beside an infinite y is not -inf
    inputs[where].view(-1)[0] = value
    for budget in (ALL, 0):
        rows, dx, dy, *_ = run(inputs, own=5, stash_bytes=budget)
        assert not rows[0].isfinite() and not dx[0].isfinite().any() and not dy.isfinite().all()
        if where == "x":  # in the other rows all is well
            assert rows[1:].isfinite().all() and dx[1:].isfinite().all()


# --- stash, chunks, launches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_stash_holds_exponentials_and_their_shifts(dtype: torch.dtype) -> None:
    x, y, scale, bias = problem(20, 300, 8, dtype, norm=200.0).values()
    bias[128:256] = -torch.inf
    own = labels(20, 300)
    logits = (x.double() @ y.double().T + bias).index_put(
        (torch.arange(20, device=DEVICE), own), torch.tensor(-torch.inf).double()
    )
    width = stash_shape(20, 300, 0, dtype, True)[1]
    assert width % 16 == 0 and stash_width(300) == 304
    for keep, rows in ((20 * width, 20), (20 * width - 1, 19), (width - 1, 0)):
        arguments = x, y, scale, bias, own, None, None, None, True, False, False, keep
        _, columns, (sums, row_shifts, _), column_stats, exact, stash = torch.ops.vlpfast.pair_fwd_triton(*arguments)
        assert stash.shape == (rows, width) and stash.dtype == dtype and exact
        assert columns.numel() == 0 and not column_stats[:2].any()
        torch.testing.assert_close(row_shifts.double(), logits.amax(1), rtol=1e-6, atol=0)
        assert relative_error(sums.double().log() + row_shifts, logits.logsumexp(1)) < (1e-4 if dtype == torch.bfloat16 else 1e-6)
        shifts = triton_pair.kept_shifts(stash, 300)
        by_block = [logits[:rows, at : at + ROW_BLOCK] for at in range(0, 300, ROW_BLOCK)]
        largest = torch.stack([block.amax(1) for block in by_block], 1)
        torch.testing.assert_close(shifts.double(), largest, rtol=1e-6, atol=0)
        usable = torch.where(largest == -torch.inf, 0, largest).repeat_interleave(ROW_BLOCK, 1)[:, :300]
        torch.testing.assert_close(
            stash[:, :300].double(), (logits[:rows] - usable).exp(), rtol=2**-8 if dtype == torch.bfloat16 else 1e-4, atol=1e-30
        )
        assert not stash[:, 300:304].any() and (stash[:, :300] <= 1.0001).all()


@pytest.mark.parametrize("wanted", [("x", "y", "scale", "bias"), ("y",), ("bias",)])
def test_chunks_of_rows(wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward's, whose sums are merged, and the backward's, which begin where the stash ends: the same exponentials."""
    inputs, own = problem(140, 265, 20, norm=50.0), labels(140, 265)

    def gradients(budget: int) -> dict[str, Tensor]:
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
        with backends.use("triton"):
            rows = pair_logsumexp(**leaves, own=own, directions="rows", stash_bytes=budget)
        found = torch.autograd.grad(rows.square().sum(), [leaves[name] for name in wanted])
        return dict(zip(wanted, found, strict=True)) | {"rows": rows.detach()}

    at_once = gradients(ALL)
    monkeypatch.setattr(triton_pair, "PARTIAL_BYTES", 1)
    monkeypatch.setattr(triton_pair, "WORKSPACE_BYTES", 1)
    for budget in (0, 100 * 288 * 4):
        for name, found in gradients(budget).items():
            same = name in ("rows", "x", "scale")
            assert torch.equal(found, at_once[name]) if same else relative_error(found, at_once[name]) < 1e-6, name


@pytest.mark.parametrize("keep", [1 << 40, 0])
def test_what_is_launched(keep: int) -> None:
    """No form with running maxima, and chunks of bounded memory."""
    x, y = (torch.empty(size, 64, dtype=torch.bfloat16, device="meta") for size in (9000, 50_000))
    own = torch.empty(9000, dtype=torch.long, device="meta")
    arguments = x, y, torch.empty((), device="meta"), None, own, None, None, None
    with _triton.recording("sm_90") as launches:
        rows, columns, *saved = triton_pair.forward(*arguments, True, False, True, keep)
        triton_pair.backward(rows, columns, *arguments, True, False, *saved, True, True, True, False)
    assert {t.kernel.__name__ for t in launches} == {"_centred", "_own_logits", "_centred_gradient"}
    made = [t.arguments for t in launches if t.kernel.__name__ == "_centred"]
    sums = [t["row_partial"] for t in made if t["row_partial"] is not None]
    assert sum(t.shape[2] for t in sums) == 9000 and max(t.numel() * 4 for t in sums) <= triton_pair.PARTIAL_BYTES
    kept = [t["kept_rows"] for t in made if t["kept_rows"] is not None]
    assert sum(len(t) for t in kept) == 9000
    assert keep or max(t.numel() * 2 for t in kept) <= triton_pair.WORKSPACE_BYTES


# --- torch's machinery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "dtype"), [(1 << 30, torch.bfloat16), (100, torch.float16), (0, torch.float32)])
def test_opcheck(keep: int, dtype: torch.dtype) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, y, scale, bias = problem(12, 140, 5, dtype).values()
    arguments = x, y, scale, bias, labels(12, 140), None, None, None, True, False, True, keep
    torch.library.opcheck(torch.ops.vlpfast.pair_fwd_triton, arguments, test_utils=checks)
    rows, columns, *saved = torch.ops.vlpfast.pair_fwd_triton(*arguments)
    *shared, _, _ = arguments
    backward = torch.ones_like(rows), columns, *shared, *saved, True, True, True, True
    torch.library.opcheck(torch.ops.vlpfast.pair_bwd_triton, backward, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compilation_func_grad_and_autocast(dynamic: bool) -> None:
    torch._dynamo.reset()
    inputs = tuple(problem(9, 140, 5, norm=9.0).values())

    def total(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return pair_logsumexp(x, y, scale, bias=bias, own=3, directions="rows").square().sum()

    leaves = [t.clone().requires_grad_() for t in inputs]
    with backends.use("triton"):
        expected = torch.autograd.grad(total(*leaves), leaves)
        compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for found in (
            torch.autograd.grad(compiled(*leaves), leaves),
            torch.func.grad(total, argnums=(0, 1, 2, 3))(*inputs),
        ):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        with torch.autocast(DEVICE, torch.bfloat16):
            cast = total(*inputs)
        assert torch.equal(cast, total(inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:]))
