"""What the room's Triton kernels share: their tiles, tiles of rows and columns, strides by name. Loads triton."""

from __future__ import annotations

from pathlib import Path

import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops import _triton
from vlpfast.ops._triton import Tile

TABLE = Path(__file__).with_name("tiles.json")

NOWHERE = tl.constexpr(2**31 - 1)  # above every token


def tile(kernel: str, x: Tensor) -> Tile:
    return _triton.tile(TABLE, kernel, x.dtype, x.device)


def row_tile(kernel: str, x: Tensor, width: int) -> Tile:
    """The tile's elements as rows of at most `width`: BLOCK_M x BLOCK_N."""
    chosen = tile(kernel, x)
    elements = chosen.pop("BLOCK")
    columns = min(elements, max(16, triton.next_power_of_2(width)))
    return {"BLOCK_M": min(64, elements // columns), "BLOCK_N": columns} | chosen


@triton.jit
def rows_and_columns(ROWS, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's tile of [B, ROWS, C]: image (int64), rows [BLOCK_M], columns [BLOCK_N]. One block at least of columns."""
    columns = tl.maximum(tl.cdiv(C, BLOCK_N), 1)
    blocks = tl.cdiv(ROWS, BLOCK_M) * columns
    block = tl.program_id(0) % blocks
    rows = block // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    return (tl.program_id(0) // blocks).to(tl.int64), rows, block % columns * BLOCK_N + tl.arange(0, BLOCK_N)


def strides(names: str, t: Tensor | None) -> dict[str, int]:
    """The strides of t by name, 0 for nothing."""
    return dict.fromkeys(names.split(), 0) if t is None else dict(zip(names.split(), t.stride(), strict=True))
