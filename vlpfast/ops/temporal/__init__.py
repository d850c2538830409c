"""Frames and their tokens: pooling of segments of any length, attention over the frames at each position."""

from vlpfast.ops.temporal.attention import temporal_attention
from vlpfast.ops.temporal.segments import segment_pool

__all__ = ["segment_pool", "temporal_attention"]
