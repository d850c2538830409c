"""Runs the conformance table."""

from __future__ import annotations

import pytest
import torch
from conformance import OPS, compare

from vlpfast.ops import backends

THERE = [name for name, reason in backends.available().items() if not reason]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTERPRETED = "triton" in THERE and not torch.cuda.is_available()


def taken(op: str, backend: str, dtype: torch.dtype) -> bool:
    if backend == "reference":  # what all is held against
        return dtype != torch.float64 and "stash" in op
    return backend in OPS[op].kernels and backends.takes(backend, dtype)


def marks(backend: str, dtype: torch.dtype, case: str) -> list[pytest.MarkDecorator]:
    """Triton's interpreter is slow: float32 and float16 take the layouts and precisions, not every size, without `-m slow`."""
    if backend != "triton":
        return []
    if not INTERPRETED:
        return [pytest.mark.gpu]
    return [pytest.mark.slow] if case in LARGE or (dtype != torch.bfloat16 and case not in EVERY_DTYPE) else []


TABLE = [
    pytest.param(
        op, backend, dtype, case, marks=marks(backend, dtype, case), id=f"{op}-{backend}-{str(dtype).removeprefix('torch.')}-{case}"
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
