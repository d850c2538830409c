"""Fewer tokens: selection by score, random masking, hard grouping, and the attention of a few queries to score tokens by."""

from vlpfast.ops.tokens.grouping import group_assign, group_mean
from vlpfast.ops.tokens.masking import gather_tokens, patch_dropout, random_keep, random_mask, restore
from vlpfast.ops.tokens.selection import importance, select

__all__ = [
    "gather_tokens",
    "group_assign",
    "group_mean",
    "importance",
    "patch_dropout",
    "random_keep",
    "random_mask",
    "restore",
    "select",
]
