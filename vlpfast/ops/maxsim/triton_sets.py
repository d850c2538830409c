"""Sets of tokens as Triton's kernels see them: units of rows, the pairs that are scored. Shared by the kernels of this room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.ops import _triton
from vlpfast.ops._triton import Tile, cdiv, launch

TABLE = Path(__file__).with_name("tiles.json")

# Partners of set i of the side in the rows: all sets, the sets i * candidates + column, the set i // candidates
ALL, OF_SETS, OF_ROWS = 0, 1, 2


def tile(kernel: str, tokens: Tensor) -> Tile:
    return _triton.tile(TABLE, kernel, tokens.dtype, tokens.device)


def precision(dtype: torch.dtype) -> str:
    """As in the contrastive room: float32 by three tf32 products, half types have one way alone."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def rows_of_tile(
    part, starts, units, unit_start, SETS, UNITS, BLOCKS, UNIT: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Of each row: its place in its set, its token (int64), whether there is one.

    `units` [UNITS] names each unit's set, SETS past the last; without it every set has BLOCKS units.
    """
    r = tl.arange(0, BLOCK_M)
    unit = part * (BLOCK_M // UNIT) + r // UNIT
    if units is not None:
        owner = tl.load(units + unit, mask=unit < UNITS, other=SETS)
        there = owner < SETS
        block = unit - tl.load(unit_start + owner, mask=there, other=0)
    else:
        owner = unit // BLOCKS
        there = owner < SETS
        block = unit % BLOCKS
    place = block * UNIT + r % UNIT
    first = tl.load(starts + owner, mask=there, other=0)
    inside = there & (place < tl.load(starts + owner + 1, mask=there, other=0) - first)
    return place, first + place, inside


@triton.jit
def number_kept(starts, kept, sets, there):
    """Of each set, int32: `kept` if that is given, else its length; 0 where there is none."""
    if kept is not None:
        return tl.load(kept + sets, mask=there, other=0)
    else:
        first = tl.load(starts + sets, mask=there, other=0)
        return (tl.load(starts + sets + 1, mask=there, other=0) - first).to(tl.int32)


@triton.jit
def _count_kept(out, starts, keep, stride, BLOCK: tl.constexpr):
    """One set."""
    owner = tl.program_id(0)
    first = tl.load(starts + owner)
    length = (tl.load(starts + owner + 1) - first).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        total += (tl.load(keep + (first + t) * stride, mask=t < length, other=0) != 0).to(tl.int32)
    tl.store(out + owner, tl.sum(total, 0))


@dataclass(frozen=True)
class Side:
    """Set i has the rows start[i] to start[i + 1] of `tokens`, at most `longest`; start is a part of the operator's argument."""

    tokens: Tensor  # [L, D]
    start: Tensor  # [count + 1] int64
    keep: Tensor | None  # [L] bool
    longest: int
    uniform: bool  # whether all sets are as long as the longest

    @classmethod
    def of(cls, tokens: Tensor, start: Tensor, keep: Tensor | None, longest: int) -> Side:
        uniform = longest * (start.shape[0] - 1) == tokens.shape[0]
        return cls(tokens, start.contiguous(), keep, longest, uniform)

    @property
    def count(self) -> int:
        return self.start.shape[0] - 1

    @property
    def width(self) -> int:
        """What a row of winners of these sets' tokens takes: where sets are packed, only a bound is known."""
        return min(self.tokens.shape[0], self.count * self.longest)

    @property
    def keep_stride(self) -> int:
        return 0 if self.keep is None else self.keep.stride(0)

    def part(self, begin: int, end: int) -> Side:
        return replace(self, start=self.start[begin : end + 1])

    @cached_property
    def kept(self) -> Tensor | None:
        """[count] int32; None: all tokens are."""
        if self.keep is None:
            return None
        out = self.start.new_empty(self.count, dtype=torch.int32)
        launch(
            _count_kept,
            (self.count,),
            out=out,
            starts=self.start,
            keep=self.keep,
            stride=self.keep_stride,
            BLOCK=256,
            num_warps=2,
        )
        return out

    def units(self, size: int) -> tuple[Tensor | None, Tensor | None, int, int]:
        """Units of `size` rows: the set of each and the first of each set, int32, None if uniform; how many; to a set."""
        blocks = max(1, cdiv(self.longest, size))
        if self.uniform:
            return None, None, self.count * blocks, blocks
        first = torch.nn.functional.pad(((self.start.diff() + size - 1) // size).cumsum(0), (1, 0)).to(torch.int32)
        count = min(self.count * blocks, self.count + self.tokens.shape[0] // size)
        owner = torch.searchsorted(first[1:], torch.arange(count, device=first.device, dtype=torch.int32), right=True)
        return owner.to(torch.int32), first, count, blocks


@dataclass(frozen=True)
class Problem:
    """Which sets are scored with which: `candidates` as in the operators' schema."""

    x: Side
    y: Side
    candidates: int | None

    @property
    def columns(self) -> int:
        return self.y.count if self.candidates is None else self.candidates

    @property
    def rows_of_y(self) -> int:
        """Rows of x_of_y."""
        return self.x.count if self.candidates is None else 1

    def part(self, begin: int, end: int, first: int, last: int) -> Problem:
        """The sets [begin, end) of x, with their columns [first, last): all of them if they have candidates."""
        if self.candidates is not None:
            first, last = begin * self.candidates, end * self.candidates
        return replace(self, x=self.x.part(begin, end), y=self.y.part(first, last))
