"""FLOP formulas of the operators, for torch's counter.

Counting needs this module imported first; `vlpfast.ops` does not do it, because torch's counter loads triton where there is one.

    from vlpfast.ops.flops import FlopCounterMode
    with FlopCounterMode() as counter:
        ...
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from vlpfast.ops import _schemas  # noqa: F401  (the operators must exist)

__all__ = ["FlopCounterMode"]


def _product(x_shape, y_shape) -> int:
    return 2 * x_shape[0] * y_shape[0] * x_shape[1]


@register_flop_formula([torch.ops.vlpfast.pair_fwd, torch.ops.vlpfast.pair_fwd_triton])
def _(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    return _product(x_shape, y_shape)


@register_flop_formula(torch.ops.vlpfast.pair_bwd)
def _(grad_rows_shape, grad_columns_shape, x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    stash_shape, need_x, need_y, need_scale = args[11], args[12], args[13], args[14]
    recomputed = 2 * (x_shape[0] * y_shape[0] - math.prod(stash_shape)) * x_shape[1]
    return recomputed + _product(x_shape, y_shape) * ((need_x or (need_scale and not need_y)) + need_y)


@register_flop_formula(torch.ops.vlpfast.pair_bwd_triton)
def _(grad_rows_shape, grad_columns_shape, x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    """The scale's gradient is a matter of the forward; only a gradient of features or bias needs the exponentials again."""
    (kept_rows, _), need_x, need_y, need_bias = args[11], args[12], args[13], args[15]
    recomputed = 2 * (x_shape[0] - kept_rows) * y_shape[0] * x_shape[1] if need_x or need_y or need_bias else 0
    return recomputed + _product(x_shape, y_shape) * (need_x + need_y)


@register_flop_formula(torch.ops.vlpfast.pair_softplus_triton)
def _(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_y = args[7:9]
    return _product(x_shape, y_shape) * (1 + need_x + need_y)


@register_flop_formula(torch.ops.vlpfast.pair_softplus)
def _(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_y, need_scale = args[7:10]
    return _product(x_shape, y_shape) * (1 + (need_x or (need_scale and not need_y)) + need_y)


@register_flop_formula([torch.ops.vlpfast.sample_hard_negatives, torch.ops.vlpfast.sample_hard_negatives_triton])
def _(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    return _product(x_shape, y_shape)


@register_flop_formula([torch.ops.vlpfast.pair_distill_fwd, torch.ops.vlpfast.pair_distill_fwd_triton])
def _(x_shape, y_shape, x_t_shape, *args, out_shape=None, **kwargs) -> int:
    want_slopes = args[8]
    return _product(x_shape, y_shape) * (1 + 2 * want_slopes) + _product(x_t_shape, y_shape)


@register_flop_formula([torch.ops.vlpfast.pair_distill_bwd, torch.ops.vlpfast.pair_distill_bwd_triton])
def _(grad_student_shape, grad_cross_shape, x_shape, y_shape, x_t_shape, *args, out_shape=None, **kwargs) -> int:
    stash_shape, need_x, need_y = args[9:12]
    pairs = x_shape[0] * y_shape[0]
    recomputed = 2 * (pairs - math.prod(stash_shape) // 2) * (x_shape[1] + x_t_shape[1])
    return recomputed + _product(x_shape, y_shape) * (need_x + need_y)


def _token_pairs(x_shape, y_shape, x_start_shape, candidates) -> int:
    """Where a set of x meets its candidates alone: as if all sets of a side were equally long."""
    return x_shape[0] * y_shape[0] // (1 if candidates is None else max(1, x_start_shape[0] - 1))


@register_flop_formula(torch.ops.vlpfast.maxsim_fwd)
def _(x_shape, y_shape, x_start_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[1] * _token_pairs(x_shape, y_shape, x_start_shape, args[5])


@register_flop_formula(torch.ops.vlpfast.maxsim_fwd_triton)
def _(x_shape, y_shape, x_start_shape, *args, out_shape=None, **kwargs) -> int:
    """Both directions of candidates are two passes."""
    candidates, want_x_to_y, want_y_to_x = args[5:8]
    passes = want_x_to_y + want_y_to_x if candidates is not None else 1
    return passes * 2 * x_shape[1] * _token_pairs(x_shape, y_shape, x_start_shape, candidates)


@register_flop_formula(torch.ops.vlpfast.maxsim_bwd_triton)
def _(grad_x_to_y_shape, grad_y_to_x_shape, x_shape, y_shape, x_start_shape, *args, out_shape=None, **kwargs) -> int:
    """Winners that are found again, and the one-hot products of the side that the winners are on."""
    candidates, y_of_x_shape, x_of_y_shape, need_x, need_y = args[5], *args[8:12]
    wanted = [bool(grad and grad[0]) for grad in (grad_x_to_y_shape, grad_y_to_x_shape)]
    kept = all(not want or winners[0] for want, winners in zip(wanted, (y_of_x_shape, x_of_y_shape), strict=True))
    passes = 0 if kept else sum(wanted) if candidates is not None else 1
    passes += (wanted[0] and need_y) + (wanted[1] and need_x)
    return passes * 2 * x_shape[1] * _token_pairs(x_shape, y_shape, x_start_shape, candidates)


@register_flop_formula(torch.ops.vlpfast.maxsim_bwd)
def _(grad_x_to_y_shape, grad_y_to_x_shape, x_shape, y_shape, x_start_shape, *args, out_shape=None, **kwargs) -> int:
    """The products that are made again; what the gradient adds up grows with the tokens, not with their pairs."""
    y_of_x_shape, x_of_y_shape = args[8:10]
    kept = all(
        grad is None or winners[0] for grad, winners in ((grad_x_to_y_shape, y_of_x_shape), (grad_y_to_x_shape, x_of_y_shape))
    )
    return 0 if kept else 2 * x_shape[1] * _token_pairs(x_shape, y_shape, x_start_shape, args[5])


@register_flop_formula([getattr(torch.ops.vlpfast, f"frame_shift{suffix}") for suffix in ("", "_", "_triton", "__triton")])
def _(x_shape, *args, out_shape=None, **kwargs) -> int:
    return 0


def _window_cells(length: int, out: int) -> int:
    """Of all windows along an axis together."""
    return sum(-(-(i + 1) * length // out) - i * length // out for i in range(out))


@register_flop_formula([torch.ops.vlpfast.pool_tokens_fwd, torch.ops.vlpfast.pool_tokens_fwd_triton])
def _(x_shape, *args, out_shape=None, **kwargs) -> int:
    """One for each cell of each window: an addition or a comparison."""
    return x_shape[0] * x_shape[4] * math.prod(map(_window_cells, x_shape[1:4], args[:3]))


@register_flop_formula([torch.ops.vlpfast.pool_tokens_bwd, torch.ops.vlpfast.pool_tokens_bwd_triton])
def _(grad_shape, winners_shape, *args, out_shape=None, **kwargs) -> int:
    return grad_shape[0] * grad_shape[4] * math.prod(map(_window_cells, args[:3], grad_shape[1:4]))


@register_flop_formula(torch.ops.vlpfast.maxsim_int8)
def _(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    return _product(x_shape, y_shape)


@register_flop_formula([torch.ops.vlpfast.match_fwd, torch.ops.vlpfast.match_fwd_triton])
def _(metric_shape, a_shape, b_shape, every, *args, out_shape=None, **kwargs) -> int:
    """The similarities. Merging itself makes no products."""
    batch, n, width = metric_shape
    in_b = n // every if b_shape is None else b_shape[0]
    return 2 * batch * (n - in_b) * in_b * width


@register_flop_formula(
    [getattr(torch.ops.vlpfast, f"add_merge_norm_{way}{suffix}") for way in ("fwd", "bwd") for suffix in ("", "_triton")]
)
def _(*args, out_shape=None, **kwargs) -> int:
    """No product: torch's counter takes nothing for a sum or a layer norm either."""
    return 0


# --- tokens: selection and masking ------------------------------------------------------------------------------------


@register_flop_formula(
    [
        torch.ops.vlpfast.gather_rows, torch.ops.vlpfast.gather_rows_triton,
        torch.ops.vlpfast.filled_rows_sum, torch.ops.vlpfast.filled_rows_sum_triton,
        torch.ops.vlpfast.random_keep, torch.ops.vlpfast.random_keep_triton,
    ]
)  # fmt: skip
def _(*args, out_shape=None, **kwargs) -> int:
    """Copies and additions: no products."""
    return 0


@register_flop_formula([torch.ops.vlpfast.select_fwd, torch.ops.vlpfast.select_fwd_triton])
def _(x_shape, score_shape, mask_shape, k, protect, by_score, fuse, *args, out_shape=None, **kwargs) -> int:
    b, n, c = x_shape
    return 2 * b * (n - protect - k) * c * fuse


@register_flop_formula([torch.ops.vlpfast.select_bwd, torch.ops.vlpfast.select_bwd_triton])
def _(grad_shape, x_shape, score_shape, mask_shape, indices_shape, fuse, normalize, need_x, need_score, *args,
      out_shape=None, **kwargs) -> int:  # fmt: skip
    """For each fused token its share of the gradient, and a product with it."""
    return score_shape[0] * (score_shape[1] - indices_shape[1]) * grad_shape[2] * fuse * (need_x + 2 * need_score)


@register_flop_formula([torch.ops.vlpfast.score_ce_fwd, torch.ops.vlpfast.score_ce_fwd_triton])
def _(*args, out_shape=None, **kwargs) -> int:
    """No product."""
    return 0


@register_flop_formula([torch.ops.vlpfast.segment_pool_fwd, torch.ops.vlpfast.segment_pool_fwd_triton])
def _(x_shape, *args, out_shape=None, **kwargs) -> int:
    """One for each element: an addition or a comparison."""
    return x_shape[0] * x_shape[1]


@register_flop_formula([torch.ops.vlpfast.segment_pool_bwd, torch.ops.vlpfast.segment_pool_bwd_triton])
def _(grad_shape, x_shape, start_shape, score_shape, length, *args, out_shape=None, **kwargs) -> int:
    return length * grad_shape[1]


def _frame_pairs(q_shape, k_shape) -> int:
    return q_shape[0] * q_shape[2] * q_shape[1] * k_shape[1]


@register_flop_formula([torch.ops.vlpfast.temporal_attention_fwd, torch.ops.vlpfast.temporal_attention_fwd_triton])
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _frame_pairs(q_shape, k_shape) * (q_shape[3] + v_shape[3])


@register_flop_formula([torch.ops.vlpfast.temporal_attention_bwd, torch.ops.vlpfast.temporal_attention_bwd_triton])
def _(grad_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Scores again and three products of q and k, two of values."""
    return 2 * _frame_pairs(q_shape, k_shape) * (3 * q_shape[3] + 2 * v_shape[3])
