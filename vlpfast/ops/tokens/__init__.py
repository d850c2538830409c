"""Fewer tokens: merging alike ones and undoing it; selection by score, random masking, hard grouping, and the attention of a few
queries to score tokens by."""

from vlpfast.ops.tokens.grouping import group_assign, group_mean
from vlpfast.ops.tokens.masking import gather_tokens, patch_dropout, random_keep, random_mask, restore
from vlpfast.ops.tokens.matching import Match, bipartite_match, kth_match, random_match_2d
from vlpfast.ops.tokens.merging import add_merge_norm, merge, track, unmerge
from vlpfast.ops.tokens.selection import importance, select

__all__ = [
    "Match",
    "add_merge_norm",
    "bipartite_match",
    "gather_tokens",
    "group_assign",
    "group_mean",
    "importance",
    "kth_match",
    "merge",
    "patch_dropout",
    "random_keep",
    "random_mask",
    "random_match_2d",
    "restore",
    "select",
    "track",
    "unmerge",
]
