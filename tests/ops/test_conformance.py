"""Runs the conformance table."""

from __future__ import annotations

import pytest
import torch
from conformance import OPS, compare

from vlpfast.ops import backends

THERE = [name for name, reason in backends.available().items() if not reason]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TABLE = [
    pytest.param(op, backend, dtype, case, id=f"{op}-{backend}-{str(dtype).removeprefix('torch.')}-{case}")
    for op in OPS
    for backend in THERE
    for dtype in DTYPES
    for case in OPS[op].cases
    if backend == "reference" or backend in OPS[op].kernels
    if backend != "reference" or (dtype != torch.float64 and "stash" in op)  # the reference is what all is held against
]


@pytest.mark.parametrize(("op", "backend", "dtype", "case"), TABLE)
def test_against_the_reference_in_float64(op: str, backend: str, dtype: torch.dtype, case: str) -> None:
    compare(OPS[op], backend, dtype, case)
