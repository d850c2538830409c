"""Which implementations of the operators exist here, which one is used, and how to force one.

`reference` is the definition in plain torch and runs on every device; `cpp` is the compiled library on the CPU; `triton` and
`cuda` are for NVIDIA GPUs. Unless one is forced, an operator takes the fastest it has for the tensors' device. Force one for a
whole process by the environment (`VLPFAST_BACKEND=reference`), or for a few lines:

    with backends.use("reference"):
        loss = clip_loss(image, text, scale)

Triton's kernels take float32, bfloat16 and float16; float64 on a GPU is the reference's. Under TRITON_INTERPRET=1 (set before
triton is first imported) they run on the CPU too, slowly and only where they are forced: for tests.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from vlpfast.ops import _library

NAMES = ("reference", "cpp", "triton", "cuda")
_forced: str | None = os.environ.get("VLPFAST_BACKEND") or None
_told: set[tuple[str, torch.dtype | None]] = set()


def available() -> dict[str, str]:
    """Every backend's name, with "" where it can be used here, else the reason why it cannot."""
    return {name: _missing(name) for name in NAMES}


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Forces one backend for every operator called inside, in all threads; None goes back to the automatic choice."""
    global _forced
    if name is not None:
        _require(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(op: str, kernels: Mapping[str, str], device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend for one call of `op`, whose kernels beside `reference` are {backend: device type}, fastest first.

    dtype: of the features, for operators that some backend may not take in every dtype.
    """
    if _forced is not None:
        _require(_forced)
        if not takes(_forced, dtype):
            raise RuntimeError(
                f"backend {_forced!r} is forced, but it has no kernels for {dtype}; the reference backend has them"
            )
        if _forced != "reference" and device.type not in _devices(_forced, kernels):
            has = ", ".join(["reference", *(f"{name} ({kind})" for name, kind in kernels.items())])
            raise RuntimeError(
                f"backend {_forced!r} is forced, but {op} has no such kernel for {device.type} tensors; it has {has}"
            )
        return _forced
    for name, kind in kernels.items():
        if kind == device.type and not _missing(name) and takes(name, dtype):
            return name
    if device.type not in ("cpu", "meta") and not torch.compiler.is_compiling() and (op, dtype) not in _told:
        _told.add((op, dtype))
        what = f"{dtype} tensors on {device.type}" if dtype == torch.float64 else f"{device.type} tensors"
        warnings.warn(f"{op} has no kernel for {what} here: the slow `reference` backend is used", stacklevel=4)
    return "reference"


def takes(name: str, dtype: torch.dtype | None) -> bool:
    """Whether a backend has kernels for features of `dtype`; None is any."""
    return name != "triton" or dtype != torch.float64


def device_type(name: str) -> str:
    """Where a backend that is available runs here."""
    return "cuda" if name == "cuda" or (name == "triton" and torch.cuda.is_available()) else "cpu"


def interpreted() -> bool:
    """Whether Triton's kernels are to run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")


def operator(name: str, backend: str) -> Any:
    """torch.ops.vlpfast's of that name; those of Triton have a suffix, in other libraries torch chooses by the device."""
    return getattr(torch.ops.vlpfast, f"{name}_triton" if backend == "triton" else name)


# How an error ends that says what a kernel's autograd does not do.
BY_REFERENCE = 'are made by the reference backend alone: wrap the call in vlpfast.ops.backends.use("reference")'


def _devices(name: str, kernels: Mapping[str, str]) -> tuple[str, ...]:
    if name not in kernels:
        return ()
    return (kernels[name], "cpu") if name == "triton" and interpreted() else (kernels[name],)


def _require(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend (VLPFAST_BACKEND or backends.use): expected one of {', '.join(NAMES)}, got {name!r}")
    reason = _missing(name)
    if reason:
        raise RuntimeError(f"backend {name!r} is forced, but it is not there: {reason}")


def _missing(name: str) -> str:
    if name == "cpp":
        return _library.MISSING
    if name == "triton":
        if find_spec("triton") is None:
            return "the package triton is not installed"
        if not (torch.cuda.is_available() or interpreted()):
            return "torch sees no CUDA device"
    if name == "cuda":
        return "the library was built without CUDA kernels"
    return ""
