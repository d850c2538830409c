"""The temporal Triton kernels beyond the conformance table: dtypes, tiles, offsets, torch's machinery, compiled code.

Without a GPU they run in Triton's interpreter (tests/conftest.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import OPS, compare
from conformance_frames import frames
from test_temporal_pool import on
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.temporal import channel_shift, pool_tokens, token_roll

pytestmark = [pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)
if not backends.available()["triton"]:
    from vlpfast.ops.temporal import triton_kernels

ROOT = Path(__file__).parents[2]
DEVICE = backends.device_type("triton")
OPERATORS = torch.ops.vlpfast


# the other cases and dtypes: pytest -m interpreter tests/ops/test_conformance.py
CASES = {
    "token_roll": ("no frame", "no token", "two frames", "one way", "every token moves", "expanded", "transposed"),
    "channel_shift": ("no channel", "one frame", "tokens", "wide", "images", "images, channels last", "images, strided"),
    "pool_tokens, mean": ("no clip", "no frame, kept", "no channel", "halves", "one more, one less", "one cell to many"),
    "pool_tokens, largest": ("no clip", "no frame, kept", "ties", "one more, one less", "one clip"),
}


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in CASES.items() for case in cases])
def test_against_the_reference_in_float64(op: str, case: str) -> None:
    compare(OPS[op], "triton", torch.float32, case)
    if case == CASES[op][-1]:
        compare(OPS[op], "triton", torch.float16, case)


def test_tiles_of_one_row_and_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a row, several rows to a tile, both ragged."""
    for block in (64, 1024):
        monkeypatch.setattr(triton_kernels._triton, "tile", lambda *_, block=block: {"BLOCK": block, "num_warps": 4})
        for op, case in (
            ("token_roll", "all but the class token"),
            ("channel_shift", "tokens"),
            ("pool_tokens, mean", "one clip"),
        ):
            compare(OPS[op], "triton", torch.float32, case)
        x = frames(1, 3, 5, 37)["x"].float().to(DEVICE)
        with backends.use("triton"):
            expected = channel_shift(x, 18)
            assert torch.equal(channel_shift(x, 18, inplace=True), expected)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_numbers_that_need_64_bits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = frames(1, 3, 4, 5, 6)["x"].float()
    narrow = on("triton", x, (2, 5, 3), mode)
    assert not triton_kernels._wide(8, (16, 24, 24), (16, 12, 12)) and triton_kernels._wide(1, (50_000, 1, 1), (50_000, 1, 1))
    assert triton_kernels._wide(1 << 20, (8, 24, 24), (1, 1, 1))
    monkeypatch.setattr(triton_kernels, "_wide", lambda *_: True)
    assert all(map(torch.equal, on("triton", x, (2, 5, 3), mode), narrow))


def test_offsets_beyond_32_bits() -> None:
    frame = 1 << 30
    base = torch.empty(2 * frame + 64, dtype=torch.bfloat16, device=DEVICE)  # pages stay untouched
    x = base.as_strided((1, 3, 4, 8), (0, frame, 8, 1))
    near = frames(1, 3, 4, 8)["x"].to(DEVICE, torch.bfloat16)
    x.copy_(near)
    with backends.use("triton"):
        assert torch.equal(token_roll(x, 1), token_roll(near, 1))
        assert torch.equal(pool_tokens(x[:, :, None], (2, 1, 3)), pool_tokens(near[:, :, None], (2, 1, 3)))
        expected = channel_shift(near, 3)
        assert torch.equal(channel_shift(x, 3, inplace=True), expected)


# --- torch's machinery ------------------------------------------------------------------------------------------------


def function(x: Tensor) -> Tensor:
    y = channel_shift(token_roll(x, 1), 1).unflatten(2, (3, 2))
    return pool_tokens(y, (2, 2, 1)).square().sum() + pool_tokens(y, (1, None, 3), "max").sum()


def test_gradients_func_grad_autocast_and_compilation() -> None:
    torch._dynamo.reset()
    x = frames(1, 3, 6, 2)["x"].float().to(DEVICE).requires_grad_()
    with backends.use("reference"):
        (wanted,) = torch.autograd.grad(function(x), x)
    with backends.use("triton"):
        value = function(x)
        (expected,) = torch.autograd.grad(value, x, retain_graph=True)
        torch.testing.assert_close(expected, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(torch.autograd.grad(value, x)[0], expected)
        assert torch.equal(torch.func.grad(function)(x.detach()), expected)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(function(x), value)
        with pytest.raises(RuntimeError, match=r"is forced, but it has no kernels for torch\.float64"):
            token_roll(x.double(), 1)
        found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)(x)
        torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, x)[0], expected, rtol=1e-6, atol=1e-7)


def test_opcheck() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x = frames(2, 3, 5, 8)["x"].to(DEVICE, torch.bfloat16)
    spans = 1, 3, 5, 8
    torch.library.opcheck(OPERATORS.frame_shift_triton, (x[:, :2, ::2], *spans, True), test_utils=checks)
    torch.library.opcheck(OPERATORS.frame_shift__triton, (x.clone(), *spans), test_utils=checks)
    for largest, keep in ((True, True), (True, False), (False, False)):
        arguments = x[:, :, None], 2, 1, 3, largest, keep
        torch.library.opcheck(OPERATORS.pool_tokens_fwd_triton, arguments, test_utils=checks)
        if keep or not largest:
            results = OPERATORS.pool_tokens_fwd_triton(*arguments)
            torch.library.opcheck(OPERATORS.pool_tokens_bwd_triton, (*results, 3, 1, 5, largest), test_utils=checks)


# --- compiled ahead of time -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="waits for Triton's NVIDIA tools, on Linux alone")
def test_it_compiles_without_spills() -> None:
    command = [
        sys.executable,
        "benchmarks/compiled_kernels.py",
        "--only",
        "channel_shift",
        "--dtype",
        "bfloat16",
        "--chip",
        "sm_90",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [k["kernel"] for k in kernels] == ["shift", "shift_in_place"]
    assert all(k["spills"] == 0 and k["registers"] <= 128 for k in kernels)
