"""Contrastive losses with several positives: by labels (UniCL, SupCon), by groups (KEEP, AdaSP), local to global (TCL).

Positives are listed one by one and their logits made beside the matrix product, in float32: near the minimum of such a loss its
gradient is the small difference of the positives' softmax and their targets, which a half-precision product does not have.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vlpfast.ops import debug
from vlpfast.ops._checks import check_count
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive._checks import (
    check_directions,
    check_features,
    check_ids,
    check_loss_scale,
    check_own,
    check_same_length,
    check_scale,
)
from vlpfast.ops.contrastive._parts import (
    LOWEST,
    columns_of_equal_id,
    common_dtype,
    listed_dots,
    mean,
    softplus,
    sums_of_equal_id,
)
from vlpfast.ops.contrastive.losses import Directions
from vlpfast.ops.contrastive.pair import STASH_BYTES, pair_logsumexp

LISTED_POSITIVES = 64  # with more positives to a row than these, all pairs go through the product in float32 instead


def supervised_contrastive_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    row_labels: Tensor,
    col_labels: Tensor,
    *,
    directions: Directions = "both",
    max_positives: int | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """The contrastive loss whose positives are all pairs of equal labels, each with the same share of the target (UniCL).

        rows: mean over i of the mean over positives j of [log sum_k exp(S_ik) - S_ij]      columns likewise

    The mean is over the rows (columns) that have a positive; the others only serve as negatives.

    Up to 64 positives to a row or column are listed and their logits made in float32 beside the product: each costs a pass over
    the features and the memory of one more copy of x in float32 at a time, and the loss is exact near its minimum (with one
    positive each: down to 1e-31, as `clip_loss`). If there can be more, all pairs go through one product in float32 whatever the
    features' dtype: slower on GPUs, and losses below about 1e-6 lose their digits.

    Args:
        x: [M, D]; y: [N, D]. See `pair_logsumexp` for dtypes, scale and stash_bytes.
        row_labels: [M] int64; col_labels: [N] int64. Samples without a class (captions) need labels of their own.
        directions: see `clip_loss`; "both" is half of the sum that UniCL takes.
        max_positives: the largest number of rows or of columns that have one label. None: counted, if the labels are on the
            host; else (on a GPU, under compilation) there may be as many as there are rows and columns. Too small a number is
            an error where the labels' values can be looked at, and makes the loss NaN where they cannot.

    Returns:
        A 0-d tensor, float32 (float64 for float64 features); 0 where no row and no column has a positive.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Yang et al. 2022, "Unified contrastive learning in image-text-label space".
    """
    check_features(x, y)
    check_ids("row_labels", row_labels, x.device, x.shape[0])
    check_ids("col_labels", col_labels, x.device, y.shape[0])
    return _supervised(x, y, scale, row_labels, col_labels, directions, max_positives, stash_bytes, with_itself=True)


def supcon_loss(
    z: Tensor, scale: float | Tensor, labels: Tensor, *, max_positives: int | None = None, stash_bytes: int = STASH_BYTES
) -> Tensor:
    """Supervised contrastive loss of rows among themselves: positives share the row's label, the row itself is left out.

    The "out" form of the paper, mean over the rows that have a positive. With two views of a sample both are rows, of one label;
    z: [N, D] (unit length in the paper), labels: [N] int64, scale: one over the temperature. `max_positives` counts the row
    itself; see `supervised_contrastive_loss` for it, what it costs and the result.
    Khosla et al. 2020, "Supervised contrastive learning".
    """
    check_features(z, z)
    check_ids("labels", labels, z.device, z.shape[0])
    return _supervised(z, z, scale, labels, labels, "rows", max_positives, stash_bytes, with_itself=False)


def _supervised(x, y, scale, row_labels, col_labels, directions, max_positives, stash_bytes, *, with_itself) -> Tensor:
    weights = check_directions(directions)
    if max_positives is not None:
        check_count("max_positives", max_positives, 1)
    x, y = common_dtype(x, y)
    check_loss_scale(scale)
    scale = check_scale(scale, x)
    listed = [_Listing(row_labels, col_labels, with_itself), _Listing(col_labels, row_labels, with_itself)]
    bound = max(x.shape[0], y.shape[0]) if max_positives is None else max_positives
    if debug.readable(row_labels) and debug.readable(col_labels):
        most = max(int(side.number.max()) if side.number.numel() else 0 for side in listed)
        if max_positives is not None and most > max_positives:
            raise ValueError(f"max_positives: expected at least {most}, as many as have one label, got {max_positives}")
        if row_labels.device.type == "cpu":  # else it was read for the check alone, which must not change what is computed
            bound = most
    beside = bound <= LISTED_POSITIVES
    if beside:
        out = (row_labels, col_labels)
    else:
        x, y = (t.to(accumulate_dtype(t.dtype)) for t in (x, y))
        out = None if with_itself else (torch.arange(x.shape[0], device=x.device),) * 2
    sums = _by_direction(weights, x, y, scale, leave_out=out, stash_bytes=stash_bytes)
    losses = []
    for weight, logsumexp, side, (own, others) in zip(weights, sums, listed, ((x, y), (y, x)), strict=True):
        if logsumexp is None:
            continue
        if beside:
            loss = _loss_beside(own, others, scale, logsumexp, side, bound)
            if max_positives is not None:
                loss = torch.where(side.number > max_positives, torch.nan, loss)
        else:
            total, _ = sums_of_equal_id(side.labels, side.other_labels, others)
            total = total if with_itself else total - others
            loss = logsumexp.clamp(min=LOWEST) - scale * (own * total).sum(1) / side.positives.clamp(min=1)
        has_any = side.positives > 0
        losses.append(weight * mean(torch.where(has_any, loss, 0), has_any))
    return sum(losses[1:], losses[0])


class _Listing:
    """Where to find the positives of each row: the columns in order of their labels, and a range of these."""

    def __init__(self, labels: Tensor, other_labels: Tensor, with_itself: bool) -> None:
        self.labels, self.other_labels, self.with_itself = labels, other_labels, with_itself
        self.order, self.first, self.number = columns_of_equal_id(labels, other_labels)  # [N], [M], [M]
        self.positives = self.number if with_itself else self.number - 1  # [M]

    def columns(self, count: int) -> tuple[Tensor, Tensor]:
        """The columns of at most `count` positives of each row, [M, K], and which of them are some."""
        n = self.order.shape[0]
        place = self.first[:, None] + torch.arange(min(count, n), device=self.order.device)
        columns = self.order[place.clamp(max=n - 1)]
        valid = place < (self.first + self.number)[:, None]
        if not self.with_itself:
            valid = valid & (columns != torch.arange(place.shape[0], device=columns.device)[:, None])
        return columns, valid


def _loss_beside(x: Tensor, y: Tensor, scale: Tensor, negatives: Tensor, listing: _Listing, count: int) -> Tensor:
    """log(exp(negatives) + sum over positives of exp(S)) - mean over positives of S: [M]. Any number where there is none."""
    columns, valid = listing.columns(count)
    dots = listed_dots(x, y, columns)  # [M, K]
    if not columns.shape[1]:
        return scale * dots.sum(1)  # zeros, with gradients
    kept = valid | (listing.positives == 0)[:, None]
    # An alias, so that the two gradients through it meet before that of `positives` is added: of a single positive they cancel,
    # and what is left may be 1e-31 of them.
    alias = dots.view_as(dots)
    average = torch.where(valid, alias, 0).sum(1, keepdim=True) / listing.positives.clamp(min=1)[:, None]
    spread = torch.where(kept, scale * (alias - average), -torch.inf).logsumexp(1)
    positives = torch.where(kept, scale * dots, -torch.inf).logsumexp(1)
    return softplus(negatives - positives) + spread


def _by_direction(weights: tuple[float, float], x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> tuple[Any, Any]:
    """Logsumexps of rows and of columns; None for a direction of weight 0."""
    if all(weights):
        return pair_logsumexp(x, y, scale, own=None, **options)
    if weights[0]:
        return pair_logsumexp(x, y, scale, own=None, directions="rows", **options), None
    return None, pair_logsumexp(x, y, scale, own=None, directions="cols", **options)


def group_contrastive_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    group_size: int,
    *,
    positives: Literal["hard", "least_hard", "adaptive"] = "least_hard",
    related: Tensor | None = None,
    directions: Directions = "both",
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """Contrast of groups: one positive, softly mined in the group's own block of pairs, against all pairs with other groups.

        loss = mean over groups g of log(1 + sum_{r in g, c not in g} exp(S_rc) / P_g)             columns likewise with S^T
        hard        P_g = 1 / sum_{r,c in g} exp(-S_rc)             the hardest pair of the block, softly
        least_hard  P_g = sum_{r in g} 1 / sum_{c in g} exp(-S_rc)  of each row the hardest, of these the easiest (KEEP)
        adaptive    P_g = hard^w * least_hard^(1 - w), w the harmonic mean of log(hard) / scale and log(least_hard) / scale, no
                    gradient, 0 where the first of the two is negative (AdaSP)

    The block's logits are made beside the product in float32.

    Args:
        x, y: [G * group_size, D], unit length in these papers; the rows of one group stand together, groups in the same order
            on both sides. See `pair_logsumexp` for dtypes, scale and stash_bytes.
        related: [G, G] bool: pairs of a row of group g with a column of group h are no negatives where related[g, h], such as
            ancestors and descendants in a hierarchy; those with the own group never are, whatever the diagonal says. Costs G
            more features in the product; exact for scales above 0.001.
        directions: see `clip_loss`.

    Returns:
        A 0-d tensor, float32 (float64 for float64 features); 0 for G = 0 and G = 1.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Zhou et al. 2023, "Adaptive sparse pairwise loss for object re-identification"; Zhou et al. 2024, "A knowledge-enhanced
    pathology vision-language foundation model for cancer diagnosis".
    """
    check_features(x, y)
    check_same_length(x, y)
    check_count("group_size", group_size, 1)
    if x.shape[0] % group_size:
        raise ValueError(f"group_size: expected a divisor of the {x.shape[0]} rows, got {group_size}")
    if positives not in ("hard", "least_hard", "adaptive"):
        raise ValueError(f"positives: expected 'hard', 'least_hard' or 'adaptive', got {positives!r}")
    weights = check_directions(directions)
    count = x.shape[0] // group_size
    if related is not None:
        if not isinstance(related, Tensor) or related.dtype != torch.bool:
            raise TypeError(f"related: expected a bool tensor, got {getattr(related, 'dtype', type(related).__name__)}")
        if related.shape != (count, count) or related.device != x.device:
            raise ValueError(f"related: expected [{count}, {count}] on {x.device}, got {list(related.shape)} on {related.device}")
    x, y = common_dtype(x, y)
    check_loss_scale(scale)
    scale = check_scale(scale, x)
    group = torch.arange(count, device=x.device).repeat_interleave(group_size)  # [M]
    far_x, far_y = (x, y) if related is None else _apart(x, y, scale, related[group].to(x.dtype), group)
    sums = _by_direction(weights, far_x, far_y, scale, leave_out=(group, group), stash_bytes=stash_bytes)
    members = group[:, None] * group_size + torch.arange(group_size, device=x.device)  # [M, K]
    block = scale * listed_dots(x, y, members).reshape(count, group_size, group_size)  # [G, rows, columns]
    losses = []
    for weight, logsumexp, logits in zip(weights, sums, (block, block.mT), strict=True):
        if logsumexp is not None:
            negatives = logsumexp.clamp(min=LOWEST).reshape(count, group_size).logsumexp(1)  # [G]
            hard = -(-logits).flatten(1).logsumexp(1)
            least_hard = (-(-logits).logsumexp(2)).logsumexp(1)
            h, e = hard.detach() / scale.detach(), least_hard.detach() / scale.detach()
            adaptive = torch.where(h > 0, 2 * h * e / (h + e), 0)
            w = {"hard": 1, "least_hard": 0, "adaptive": adaptive}[positives]
            positive = w * hard + (1 - w) * least_hard
            losses.append(weight * mean(softplus(negatives - positive)))
    return sum(losses[1:], losses[0])


def _apart(x: Tensor, y: Tensor, scale: Tensor, related: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """x and y with more features, by which the logits of related pairs fall so far that their exponentials are nothing.

    related: [M, G] in x's dtype. The others' logits do not change: their product over the new features is 0.
    """
    wide = accumulate_dtype(x.dtype)
    with torch.no_grad():
        longest = [torch.linalg.vector_norm(t, dim=1, dtype=wide).amax() if t.shape[0] else scale.new_zeros(()) for t in (x, y)]
        depth = 2 * longest[0] * longest[1] + (120 if wide == torch.float32 else 800) / scale
        fall = depth.clamp(max=1e6).sqrt()  # one half on either side
        others = (group[:, None] == torch.arange(related.shape[1], device=group.device)).to(wide)  # [M, G] one-hot
    return torch.cat([x, (-fall * related).to(x.dtype)], 1), torch.cat([y, (fall * others).to(y.dtype)], 1)


def local_global_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    mask: Tensor | None = None,
    *,
    own: int | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """Local-to-global mutual information (TCL's LMI): each local feature of a sample against those of all other samples.

        loss_il = log(1 + sum_{j != i, k} exp(S_i,jk) / exp(S_i,il)),     S_i,jk = scale * <x_i, y_jk>

    mean over a sample's locals l, then over the samples that have any. An InfoNCE estimate per local, with no negative from its
    own sample. One product of the x with all locals: nothing of the size of locals x locals is made.

    Args:
        x: [M, D] global features. See `pair_logsumexp` for dtypes, scale and stash_bytes.
        y: [N, L, D] local features of these samples and perhaps of others (TCL gives them no gradient: detach them).
        mask: [N, L] bool, True = keep; None: all.
        own: row i of x is of the sample of y[own + i], 0 <= own <= N - M: a rank's own samples among all ranks' locals. None:
            M = N, row i is of y[i].

    Returns:
        A 0-d tensor, float32 (float64 for float64 features); 0 for N = 0 and where all locals are masked.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Yang et al. 2022, "Vision-language pre-training with triple contrastive learning"; Hjelm et al. 2019, "Learning deep
    representations by mutual information estimation and maximization".
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor, got {type(y).__name__}")
    if y.ndim != 3:
        raise ValueError(f"y: expected 3 dimensions [rows, locals, width], got shape {tuple(y.shape)}")
    debug.check_finite("y", y)
    check_features(x, y[:, 0] if y.shape[1] else y.new_empty(y.shape[0], y.shape[2]))
    n, length = y.shape[:2]
    if own is None:
        check_same_length(x, y)
        own = 0
    elif isinstance(own, Tensor):
        raise TypeError("own: expected an int or None, got a tensor")
    check_own(own, x.shape[0], n, x.device, unique=False)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != y.shape[:2] or mask.device != x.device:
            raise ValueError(f"mask: expected [{n}, {length}] on {x.device}, got {list(mask.shape)} on {mask.device}")
    x, y = common_dtype(x, y)
    check_loss_scale(scale)
    scale = check_scale(scale, x)
    locals_ = y.flatten(0, 1)  # [N * L, D]
    sample = torch.arange(n, device=x.device)
    mine = sample[own : own + x.shape[0]]  # [M]
    index = mine[:, None] * length + torch.arange(length, device=x.device)
    # far enough down that no logit makes up for it, and finite: a row of nothing else still has a gradient, which is 0
    bias = None if mask is None else torch.where(mask, 0.0, -1e9).flatten().to(scale.dtype)
    negatives = pair_logsumexp(
        x,
        locals_,
        scale,
        own=None,
        leave_out=(mine, sample.repeat_interleave(length)),
        bias=bias,
        directions="rows",
        stash_bytes=stash_bytes,
    )
    loss = softplus(negatives[:, None] - scale * listed_dots(x, locals_, index))  # [M, L]
    if mask is None:
        return mean(loss)
    mask = mask[own : own + x.shape[0]]
    number = mask.sum(1)
    loss = torch.where(mask, loss, 0).sum(1) / number.clamp(min=1)
    return mean(loss, number > 0)
