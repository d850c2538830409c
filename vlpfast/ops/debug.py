"""Checks of values that cost a pass over the data or a wait for the device: made under VLPFAST_DEBUG=1 alone.

Shapes, dtypes, devices and what is on the host anyway are checked at every call. Without these further checks a number that is
none goes through to the result. Where there are no values to look at (compilation, fake tensors, function transforms, the
capture of a CUDA graph) nothing is checked either way. For a few lines:

    with debug.use():
        loss = clip_loss(image, text, scale)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_on = os.environ.get("VLPFAST_DEBUG", "") not in ("", "0")


@contextmanager
def use(on: bool = True) -> Iterator[None]:
    """Turns the checks on (off) for everything called inside, in all threads."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def has_values(tensor: Tensor) -> bool:
    """False under compilation, for meta and fake tensors, and inside function transforms."""
    there = not (torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor))
    return there and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def readable(tensor: Tensor) -> bool:
    """Whether its values may be looked at: on the host always, on a device if it may be waited for."""
    if not has_values(tensor):
        return False
    if tensor.device.type == "cpu":
        return True
    return _on and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError on NaN and infinite numbers, with their number and the first one's place."""
    if _on and readable(tensor):
        _refuse(name, "finite numbers", tensor, ~tensor.isfinite())


def check_within(name: str, tensor: Tensor, least: float, most: float) -> None:
    """Raises ValueError on numbers outside [least, most] and NaN, with their number and the first one's place."""
    if _on and readable(tensor):
        _refuse(name, f"numbers in [{least:g}, {most:g}]", tensor, ~((tensor >= least) & (tensor <= most)))


def _refuse(name: str, expected: str, tensor: Tensor, wrong: Tensor) -> None:
    if not wrong.any():
        return
    first = wrong.nonzero()[0].tolist()
    where = f"{int(wrong.sum())} of {wrong.numel()} that are not, the first at {first}: " if first else ""
    raise ValueError(f"{name}: expected {expected}, got {where}{tensor[tuple(first)].item()}")
