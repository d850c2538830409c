"""Operators whose kernels are Python: their modules, and triton with them, are imported at the first call."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

# operator -> module below vlpfast.ops, function with the arguments of the operator's schema
KERNELS = {
    "pair_fwd_triton": ("contrastive.triton_pair", "forward"),
    "pair_bwd_triton": ("contrastive.triton_pair", "backward"),
    "sample_hard_negatives_triton": ("contrastive.triton_sample", "sample"),
    "pair_distill_fwd_triton": ("contrastive.triton_distill", "forward"),
    "pair_distill_bwd_triton": ("contrastive.triton_distill", "backward"),
    "pair_softplus_triton": ("contrastive.triton_softplus", "forward"),
    "maxsim_fwd_triton": ("maxsim.triton_kernels", "forward"),
    "maxsim_bwd_triton": ("maxsim.triton_kernels", "backward"),
    "frame_shift_triton": ("temporal.triton_kernels", "frame_shift"),
    "frame_shift__triton": ("temporal.triton_kernels", "frame_shift_"),
    "pool_tokens_fwd_triton": ("temporal.triton_kernels", "pool_tokens_fwd"),
    "pool_tokens_bwd_triton": ("temporal.triton_kernels", "pool_tokens_bwd"),
    "score_ce_fwd_triton": ("maxsim.triton_score", "forward"),
    "segment_pool_fwd_triton": ("temporal.triton_segments", "forward"),
    "segment_pool_bwd_triton": ("temporal.triton_segments", "backward"),
    "temporal_attention_fwd_triton": ("temporal.triton_attention", "forward"),
    "temporal_attention_bwd_triton": ("temporal.triton_attention", "backward"),
    "match_fwd_triton": ("tokens.triton_match", "match"),
    "merge_fwd_triton": ("tokens.triton_merge", "forward"),
    "merge_bwd_triton": ("tokens.triton_merge", "backward"),
    "add_merge_norm_fwd_triton": ("tokens.triton_merge_norm", "forward"),
    "add_merge_norm_bwd_triton": ("tokens.triton_merge_norm", "backward"),
    "gather_rows_triton": ("tokens.triton_rows", "gather_rows"),
    "filled_rows_sum_triton": ("tokens.triton_rows", "filled_rows_sum"),
    "random_keep_triton": ("tokens.triton_select", "random_keep"),
    "select_fwd_triton": ("tokens.triton_select", "forward"),
    "select_bwd_triton": ("tokens.triton_select", "backward"),
}


def _register(op: str, module: str, function: str) -> None:
    @torch.library.impl(f"vlpfast::{op}", ("cpu", "cuda"))
    def run(*arguments: Any, **named: Any) -> Any:
        kernel = getattr(import_module(f"vlpfast.ops.{module}"), function)
        first = next(a for a in arguments if isinstance(a, torch.Tensor))
        with torch.cuda.device_of(first):  # Triton launches on the current device
            return kernel(*arguments, **named)


for _op, (_module, _function) in KERNELS.items():
    _register(_op, _module, _function)
