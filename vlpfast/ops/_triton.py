"""What all Triton kernels share: tiles by chip and dtype, launching, the order of the grid, products. Loads triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from vlpfast.ops import backends

Tile = dict[str, int]  # the kernel's block sizes by the names of its constants, num_warps, num_stages

INTERPRETED = tl.constexpr(backends.interpreted())


@dataclass(frozen=True)
class Launch:
    """What a call would launch: for compiling ahead of time, and for tests."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors on the meta device, numbers, constants, num_warps, num_stages


_recorded: tuple[str, list[Launch]] | None = None


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Kernels called inside with meta tensors are listed, with the tiles of `architecture` ("sm_90"), and do not run."""
    global _recorded
    before, _recorded = _recorded, (architecture, [])
    try:
        yield _recorded[1]
    finally:
        _recorded = before


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """kernel[grid](...), unless the grid is empty."""
    arguments["enable_fp_fusion"] = True  # the default differs between versions of Triton
    if _recorded is not None:
        _recorded[1].append(Launch(kernel, grid, arguments))
    elif 0 not in grid:
        kernel[grid](**arguments)


def tile(table: Path, kernel: str, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of `kernel` for features of `dtype`, from a JSON file {chip or "default": {kernel: {dtype or "default": tile}}}.

    Chips are named by compute capability ("sm_90"); those that the file does not name take "default".
    """
    chips = read(table)
    kernels = chips.get(_recorded[0] if _recorded else chip(device), chips["default"])
    by_dtype = kernels.get(kernel) or chips["default"][kernel]
    return dict(by_dtype.get(str(dtype).removeprefix("torch."), by_dtype["default"]))


@cache
def read(table: Path) -> dict[str, dict[str, dict[str, Tile]]]:
    return json.loads(table.read_text())


@cache
def chip(device: torch.device) -> str:
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def grouped(program, rows, columns, GROUP: tl.constexpr):
    """The place (row, column) of a program in a grid of blocks: GROUP rows of blocks, column by column, then the next ones.

    Programs that run at the same time then share blocks of both operands in the second-level cache.
    """
    group = program // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, summed in float32."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def to_tf32(t):
    """Rounded to the ten mantissa bits that a tf32 product reads; it would cut the others off, always towards zero."""
    bits = (t.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(t == t, bits.to(tl.float32, bitcast=True), t)  # a NaN could come out as a number


@triton.jit
def narrow(t, DTYPE: tl.constexpr):
    """float32 in another dtype, rounded to nearest."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter would cut the low bits off
        bits = t.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        t = tl.where(t == t, rounded.to(tl.float32, bitcast=True), t)
    return t.to(DTYPE)
