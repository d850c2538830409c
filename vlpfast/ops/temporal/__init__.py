"""Frames and their tokens: moving parts of them by a frame, pooling over time and space, attention over few frames."""

from vlpfast.ops.temporal.attention import temporal_attention
from vlpfast.ops.temporal.pool import pool_tokens
from vlpfast.ops.temporal.segments import segment_pool
from vlpfast.ops.temporal.shift import channel_shift, token_roll

__all__ = ["channel_shift", "pool_tokens", "segment_pool", "temporal_attention", "token_roll"]
