"""Frames and their tokens: moving parts of them by a frame, pooling over time and space."""

from vlpfast.ops.temporal.pool import pool_tokens
from vlpfast.ops.temporal.shift import channel_shift, token_roll

__all__ = ["channel_shift", "pool_tokens", "token_roll"]
