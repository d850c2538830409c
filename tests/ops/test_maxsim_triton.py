"""maxsim's Triton kernels beyond the conformance table: chips, chunks, NaN, indices, offsets, torch's machinery, compiled code.

Without a GPU they run in Triton's interpreter (tests/conftest.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import mask, packed_sets, relative_error, token_sets
from test_maxsim import equal, on
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.maxsim import maxsim

pytestmark = [pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)
if not backends.available()["triton"]:
    from vlpfast.ops import _triton
    from vlpfast.ops.maxsim import triton_kernels

ROOT = Path(__file__).parents[2]
DEVICE = backends.device_type("triton")


def check(found: list[Tensor], x: Tensor, y: Tensor, tolerance: float = 1e-5, **arguments: Any) -> None:
    """Against the reference in float64."""
    for f, e in zip(found, on("reference", x.double(), y.double(), **arguments), strict=True):
        assert relative_error(f, e) < tolerance


def single(both: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: a.to(dtype) if name in ("x", "y") else a for name, a in both.items()}


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tiles_that_ship(chip: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of more units and blocks than one, and several that share a tile. On a GPU only the chip's own are sure to fit."""
    if DEVICE == "cuda" and chip != _triton.chip(torch.device("cuda")):
        pytest.skip("another chip's tiles")
    monkeypatch.setattr(_triton, "chip", lambda device: chip)
    for shapes in (((1, 140, 70), (2, 67, 70)), ((5, 20, 270), (1, 66, 270))):
        both = single(token_sets(*shapes), dtype)
        check(on("triton", **both), tolerance=8e-3 if dtype == torch.bfloat16 else 1e-5, **both)


def test_chunks_of_sets_and_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward's, whose partial results are bounded, and the backward's, which find winners again."""
    masks = {"x_mask": mask(3, 40), "y_mask": mask(3, 20, seed=2)}
    own = token_sets((3, 20, 8), (3, 2, 9, 8), pairs="own")
    starts = {"x_cu_seqlens": torch.tensor([0, 3, 3, 40]), "y_cu_seqlens": torch.tensor([0, 0, 13, 14])}
    packed = token_sets((40, 8), (14, 8), **starts)
    for both in map(single, (token_sets((3, 40, 8), (3, 20, 8), **masks), packed, own)):
        at_once = on("triton", **both)
        for partial, workspace in ((1, 1), (1 << 28, 400)):
            monkeypatch.setattr(triton_kernels, "PARTIAL_BYTES", partial)
            monkeypatch.setattr(triton_kernels, "WORKSPACE_BYTES", workspace)
            *scores, dx, dy = on("triton", **both, stash_bytes=0)
            assert equal(scores, at_once[:2])
            for f, e in zip((dx, dy), at_once[2:], strict=True):
                assert relative_error(f, e) < 1e-6
        monkeypatch.undo()


@pytest.mark.parametrize("both_ways", [True, False])
def test_workspaces_are_bounded(both_ways: bool) -> None:
    x, y = (torch.empty(1000 * 197, 256, dtype=torch.bfloat16, device="meta") for _ in range(2))
    start = torch.empty(1001, dtype=torch.int64, device="meta")
    problem = x, y, start, start, None, None, 197, 197, None
    with _triton.recording("sm_90") as launches:
        x_to_y, y_to_x, *winners = triton_kernels.forward(*problem, True, both_ways, True, False, False)
        triton_kernels.backward(x_to_y, y_to_x if both_ways else None, *problem, True, False, *winners, True, True)
    best = [found.arguments["column_best"] for found in launches if found.arguments.get("column_best") is not None]
    rows = [found.arguments["row_winners"] for found in launches if found.arguments.get("row_winners") is not None]
    assert bool(best) == both_ways and all(t.numel() * 5 <= triton_kernels.PARTIAL_BYTES for t in best)
    assert rows and all(t.numel() <= triton_kernels.WORKSPACE_BYTES for t in rows)


def test_a_grid_too_large_is_refused() -> None:
    x, start = torch.empty(1, 1, device="meta").expand(128 << 17, 1), torch.empty((1 << 17) + 1, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="x and y: expected less than 2147483648 pairs of tiles for a Triton kernel"):
        triton_kernels.forward(x, x, start, start, None, None, 128, 128, None, True, False, True, False, False)


@pytest.mark.parametrize("where", ["x", "y"])
def test_nan_reaches_its_pairs_and_no_others(where: str) -> None:
    both = token_sets((2, 37, 8), (2, 70, 8), x_mask=mask(2, 37, share=0.8, seed=3), y_mask=mask(2, 70, share=0.8, seed=2))
    both = single(both)
    both["x_mask"][:, 34] = both["y_mask"][:, 67] = True  # in the second unit and block
    masked = int(both[f"{where}_mask"][1].logical_not().nonzero()[0])
    other = "dy" if where == "x" else "dx"
    for place, reaches in ((34 if where == "x" else 67, True), (masked, False)):
        bad = both | {where: both[where].clone()}
        bad[where][1, place, 5] = torch.nan
        for options in ({}, {"masked": "zero"}, {"directions": "x_to_y"}, {"directions": "y_to_x"}):
            *scores, dx, dy = on("triton", **bad, **options)
            *expected, _, _ = on("reference", **both, **options)
            for f, e in zip(scores, expected, strict=True):
                if reaches:
                    line = (1,) if where == "x" else (slice(None), 1)
                    assert f[line].isnan().all()
                    e[line] = torch.nan
                torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6, equal_nan=True)
            assert reaches == {"dx": dx, "dy": dy}[other].isnan().any()


def test_nan_wins_both_ways() -> None:
    x, y = (t.float().to(DEVICE) for t in token_sets((37, 8), (70, 8)).values())
    x[34, 5] = y[67, 2] = torch.nan
    starts = torch.tensor([0, 37], device=DEVICE), torch.tensor([0, 70], device=DEVICE)
    *_, y_of_x, x_of_y = torch.ops.vlpfast.maxsim_fwd_triton(
        x, y, *starts, None, None, 37, 70, None, True, True, True, False, True
    )
    assert y_of_x[0].tolist() == [0 if i == 34 else 67 for i in range(37)]
    assert x_of_y[0].tolist() == [0 if i == 67 else 34 for i in range(70)]


@pytest.mark.parametrize(
    ("candidates", "dtype"),
    [
        (256, torch.uint8),
        (257, torch.int16),
        pytest.param(33_000, torch.int16, marks=pytest.mark.interpreter if DEVICE == "cpu" else []),
    ],
)
def test_indices_of_every_size(candidates: int, dtype: torch.dtype) -> None:
    x, y = torch.ones(1, 2, 1), torch.zeros(1, candidates, 1)
    y[0, candidates - 1] = 1
    kept = on("triton", x, y, directions="x_to_y", reduction="sum")
    assert kept[0].item() == 2 and kept[2].flatten().nonzero().item() == candidates - 1 and kept[2].sum() == 1
    starts = torch.tensor([0, 2], device=DEVICE), torch.tensor([0, candidates], device=DEVICE)
    raw = (x[0].to(DEVICE), y[0].to(DEVICE), *starts, None, None, 2, candidates, None, True, False, True, False, True)
    assert torch.ops.vlpfast.maxsim_fwd_triton(*raw)[2].dtype == dtype


def test_kept_winners_and_found_ones_give_the_same_bits_every_time() -> None:
    for options in ({}, {"directions": "y_to_x"}):
        both = single(token_sets((3, 40, 8), (3, 20, 8), y_mask=mask(3, 20)), torch.bfloat16)
        first = on("triton", **both, **options)
        assert equal(first, on("triton", **both, **options)) and equal(first, on("triton", **both, stash_bytes=0, **options))


def test_offsets_beyond_32_bits() -> None:
    row = 1 << 30
    x = torch.empty(2 * row + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 3, 8), (0, row, 1))  # pages stay untouched
    near, y = (t.to(DEVICE, torch.bfloat16) for t in token_sets((1, 3, 8), (2, 5, 8)).values())
    x.copy_(near)
    with backends.use("triton"):
        assert equal(list(maxsim(x, y)), list(maxsim(near, y))) and equal(list(maxsim(y, x)), list(maxsim(y, near)))
        leaves = x.requires_grad_(), y.requires_grad_()
        (dy,) = torch.autograd.grad(maxsim(*leaves)[0].sum(), leaves[1])
        assert torch.equal(dy, torch.autograd.grad(maxsim(near, leaves[1])[0].sum(), leaves[1])[0])


# --- torch's machinery ------------------------------------------------------------------------------------------------


def test_gradients_of_one_side_func_grad_and_autocast() -> None:
    x, y = (t.float().to(DEVICE) for t in token_sets((3, 5, 4), (4, 6, 4)).values())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return maxsim(x, y)[0].square().sum() + maxsim(x, y)[1].sum()

    leaves = [t.clone().requires_grad_() for t in (x, y)]
    with backends.use("triton"):
        value = loss(*leaves)
        expected = torch.autograd.grad(value, leaves, retain_graph=True)
        assert equal(list(expected), list(torch.autograd.grad(value, leaves)))
        assert equal(list(torch.func.grad(loss, argnums=(0, 1))(x, y)), list(expected))
        assert torch.equal(torch.autograd.grad(loss(leaves[0], y), leaves[0])[0], expected[0])
        assert torch.equal(torch.autograd.grad(loss(x, leaves[1]), leaves[1])[0], expected[1])
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(loss(x, y), loss(x.bfloat16(), y.bfloat16()))
        with pytest.raises(NotImplementedError, match="second derivatives are made by the reference backend alone"):
            torch.func.grad(lambda x: torch.func.grad(loss)(x, y).sum())(x)
        with pytest.raises(RuntimeError, match=r"is forced, but it has no kernels for torch\.float64"):
            maxsim(x.double(), y.double())


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    both, packed = single(token_sets((2, 5, 4), (3, 6, 4))), single(packed_sets())
    start = packed["x_cu_seqlens"].to(DEVICE)

    def function(x: Tensor, y: Tensor, packed_x: Tensor) -> Tensor:
        a, b = maxsim(x, y, normalize=True)
        c = maxsim(packed_x, packed_x, x_cu_seqlens=start, y_cu_seqlens=start, pairs="aligned", directions="x_to_y")
        return a.sum() + b.square().sum() + c.sum() + maxsim(packed_x, y[..., :1].expand(3, 6, 8), x_cu_seqlens=start)[1].sum()

    leaves = [t.to(DEVICE).requires_grad_() for t in (both["x"], both["y"], packed["x"])]
    with backends.use("triton"):
        expected = function(*leaves)
        found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)(*leaves)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        for f, e in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("candidates", "dtype"), [(None, torch.bfloat16), (2, torch.float32)])
def test_opcheck(candidates: int | None, dtype: torch.dtype) -> None:
    x, y = (t.to(DEVICE, dtype) for t in token_sets((40, 4), (71, 4)).values())
    starts = [torch.tensor(s, device=DEVICE) for s in ([0, 3, 3, 40], [0, 0, 13, 14, 50, 51, 71])]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for want, longest, keep, masks, needed in (
        ((True, True), (37, 300), True, (mask(40).to(DEVICE), None), (True, True)),
        ((False, True), (300, 70_000), False, (None, mask(71).to(DEVICE)), (False, True)),
    ):
        arguments = (x, y, *starts, *masks, *longest, candidates, *want, True, False, keep)
        torch.library.opcheck(torch.ops.vlpfast.maxsim_fwd_triton, arguments, test_utils=checks)
        *scores, y_of_x, x_of_y = torch.ops.vlpfast.maxsim_fwd_triton(*arguments)
        gradients = [torch.ones_like(s) if wanted else None for s, wanted in zip(scores, want, strict=True)]
        backward = (*gradients, *arguments[:9], True, False, y_of_x, x_of_y, *needed)
        torch.library.opcheck(torch.ops.vlpfast.maxsim_bwd_triton, backward, test_utils=checks)


def test_products_are_counted() -> None:
    """One-hot products too: one for each direction, and none for dx of x_to_y."""
    x, y = (t.float().to(DEVICE).requires_grad_() for t in token_sets((3, 5, 4), (3, 6, 4)).values())
    for options, pairs, products in (
        ({}, 9, 3),
        ({"stash_bytes": 0}, 9, 4),
        ({"directions": "x_to_y"}, 9, 2),
        ({"pairs": "aligned", "stash_bytes": 0}, 3, 6),
    ):
        with backends.use("triton"), FlopCounterMode(display=False) as counter:
            scores = maxsim(x, y, **options)
            sum(s.sum() for s in (scores if isinstance(scores, tuple) else [scores])).backward()
        assert counter.get_total_flops() == products * 2 * pairs * 5 * 6 * 4


# --- compiled ahead of time -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="waits for Triton's NVIDIA tools, on Linux alone")
def test_the_forward_compiles_to_tensor_core_instructions_without_spills() -> None:
    command = [
        sys.executable,
        "benchmarks/compiled_kernels.py",
        "--only",
        "maxsim",
        "--kernel",
        "_forward",
        "--dtype",
        "bfloat16",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [k["chip"] for k in kernels] == ["sm_80"] * 3 + ["sm_90"] * 3
    for place, k in enumerate(kernels):
        assert k["spills"] == 0 and k["registers"] <= 255
        # The last of each chip, one query beside its own candidates, has too few rows for a warp group's product.
        assert k["instructions"]["HGMMA" if k["chip"] == "sm_90" and place < 5 else "HMMA"] > 0
