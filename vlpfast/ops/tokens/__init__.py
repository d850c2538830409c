"""Fewer tokens: merging alike ones, and undoing it."""

from vlpfast.ops.tokens.matching import Match, bipartite_match, kth_match, random_match_2d
from vlpfast.ops.tokens.merging import merge, track, unmerge

__all__ = ["Match", "bipartite_match", "kth_match", "merge", "random_match_2d", "track", "unmerge"]
