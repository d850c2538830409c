"""Runs the conformance table."""

from __future__ import annotations

import conformance_frames  # noqa: F401  (these add their rows)
import conformance_tokens  # noqa: F401
import pytest
import torch
from conformance import OPS, compare

from vlpfast.ops import backends

THERE = [name for name, reason in backends.available().items() if not reason]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def taken(op: str, backend: str, dtype: torch.dtype) -> bool:
    if backend == "reference":  # what all is held against
        return dtype != torch.float64 and "stash" in op
    return backend in OPS[op].kernels and backends.takes(backend, dtype)


# What Triton's interpreter runs by default, slow as it is: for bfloat16 all of pair_logsumexp's cases but the large ones, ...
LARGE = {
    "257x509x67", "509x257x67", "3x1023x5", "3x1024x5", "2047x3x5", "2048x3x5", "2049x3x5", "random, scale 100", "low loss",
    "centred sums underflow, two tiles of rows", "centred sums underflow, two tiles of columns",
}  # fmt: skip
# ... for the other dtypes and for clip_loss these, ...
SOME = {"3x4x0", "1x1x7, nothing left", "17x17x8", "2x2x3", "index", "bias", "leave out", "rows, one column for all", "strided"}
SOME |= {"centred sums underflow, all arguments"}
# ... and of the other operators, in bfloat16 and one of each kind in the other dtypes, these.
MAIN = ("pair_logsumexp", "clip_loss", "pair_softplus", "pair_distill, one pass")
FEW = {"17x17x8", "index", "strided", "some rows left out wholly", "momentum, queue"}
# Late interaction: these in float32, some with winners that are found again, some in the half types.
MAXSIM = {"no token in x", "no token in y", "no set of y", "width 0", "one of each", "17, 13", "33, 25", "aligned", "own, masks"}
MAXSIM |= {"masks, zero", "masks, y to x", "packed", "packed, own", "packed, y to x", "width 1031", "197, 77", "strided"}
MAXSIM_AGAIN = {"no token in x", "own, masks", "packed, y to x", "strided"}
HALF_MAXSIM = {"33, 25", "packed, own"}
# Segments and attention over frames: these in float32, some in bfloat16.
FRAMES = {"empty ones between", "strided", "width 1", "no key", "one frame's queries", "wide values", "mask, causal"}
HALF_FRAMES = {"empty ones between", "mask, causal"}


def marks(op: str, backend: str, dtype: torch.dtype, case: str) -> list[pytest.MarkDecorator]:
    if backend != "triton":
        return []
    if torch.cuda.is_available():
        return [pytest.mark.gpu]
    if op.startswith("maxsim"):
        chosen = (MAXSIM if "stash" in op else MAXSIM_AGAIN) if dtype == torch.float32 else HALF_MAXSIM
        return [] if case in chosen else [pytest.mark.interpreter]
    if op.startswith(("segment_pool", "temporal_attention")):
        chosen = {torch.float32: FRAMES, torch.bfloat16: HALF_FRAMES}.get(dtype, set())
        return [] if case in chosen else [pytest.mark.interpreter]
    usual = "pair_logsumexp" in op and dtype == torch.bfloat16 and case not in LARGE
    older = op.startswith(("pair_logsumexp", "clip_loss"))
    wanted = SOME if older or (op.startswith(MAIN) and dtype == torch.bfloat16) else FEW
    if not older and dtype != torch.bfloat16 and not op.startswith(MAIN):
        wanted = set()
    return [] if usual or case in wanted else [pytest.mark.interpreter]


TABLE = [
    pytest.param(
        op,
        backend,
        dtype,
        case,
        marks=marks(op, backend, dtype, case),
        id=f"{op}-{backend}-{str(dtype).removeprefix('torch.')}-{case}",
    )
    for op in OPS
    for backend in THERE
    for dtype in DTYPES
    for case in OPS[op].cases
    if taken(op, backend, dtype)
]


@pytest.mark.parametrize(("op", "backend", "dtype", "case"), TABLE)
def test_against_the_reference_in_float64(op: str, backend: str, dtype: torch.dtype, case: str) -> None:
    compare(OPS[op], backend, dtype, case)
