"""Runs the conformance table."""

from __future__ import annotations

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


def marks(op: str, backend: str, dtype: torch.dtype, case: str) -> list[pytest.MarkDecorator]:
    if backend != "triton":
        return []
    if torch.cuda.is_available():
        return [pytest.mark.gpu]
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
