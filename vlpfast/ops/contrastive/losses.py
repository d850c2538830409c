"""The readable family: contrastive losses of published systems on the operators of this package, one positive to each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops import debug
from vlpfast.ops._checks import DTYPES
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive._checks import (
    check_bias,
    check_directions,
    check_features,
    check_leave_out,
    check_loss_scale,
    check_more_features,
    check_same_length,
    check_scale,
    check_smoothing,
    check_unused,
    check_view_weights,
    check_views,
    check_weights,
)
from vlpfast.ops.contrastive._parts import common_dtype, logaddexp, mean, row_dots, softplus, sums_of_equal_id
from vlpfast.ops.contrastive.pair import STASH_BYTES, pair_logsumexp

Directions = Literal["both", "rows", "cols"] | tuple[float, float]


def clip_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    directions: Directions = "both",
    row_weights: Tensor | None = None,
    col_weights: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    leave_out: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    row_negatives: Tensor | None = None,
    col_negatives: Tensor | None = None,
    view_weights: Sequence[Sequence[float]] | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """CLIP's loss: the mean of the cross-entropies of rows and of columns of scale * x @ y.T, where row i belongs to column i.

    Exact in float32 down to a loss of 1e-31. Every option leaves the others' meaning as it is; without any, and x and y [N, D]:

        loss = (mean_i CE(S[i, :], i) + mean_j CE(S[:, j], j)) / 2,     S = scale * x @ y.T

    Args:
        x: [N, D], unit length in CLIP's use; see `pair_logsumexp` for dtypes, scale and stash_bytes (which counts for each
            matrix of logits). Or V views of the same N samples, [V, N, D]. Of all losses a scale that is a number must be > 0.
        y: [N, D] or [W, N, D]
        directions: "both", "rows", "cols", or the weights of the rows' mean and of the columns' mean: "both" is (0.5, 0.5);
            (1, 1) sums them; (0.75, 0.25) is ConVIRT's. A direction of weight 0 is not computed.
        row_weights: [N] >= 0: the mean over rows becomes sum(w * CE) / sum(w); times row_weights.mean() it is sum(w * CE) / N.
        col_weights: [N], likewise.
        label_smoothing: e in [0, 1], a number, 0-d or [N] (one for each pair, both of its directions): targets are 1 - e on the
            own pair plus e / C on each of the C candidates, the own one included, as in torch's cross_entropy. For a mass a that
            only the C - 1 others share, e = a * C / (C - 1).
        leave_out: (row_ids, column_ids), int64: pairs with equal ids, known duplicates, are no negatives (own pairs stay).
            With further negatives the ids go on over them: [N + len(col_negatives)] and [N + len(row_negatives)].
        bias: 0-d, or [N] added to the logits of every row; [N + len(row_negatives)] with these. Its gradient is made.
        row_negatives: [Q, D]: further negatives of every row beside the columns: a queue of momentum features, read in place,
            or captions that were made wrong on purpose (NegCLIP). Any Q: that a queue holds a batch is for the queue to see to.
            Gradients are made if they are asked for.
        col_negatives: [P, D]: further negatives of every column beside the rows.
        view_weights: [V][W] numbers: the loss is the weighted sum of the losses of the pairs of views (weights are not
            normalised; pairs of weight 0 cost nothing). Default: their mean. Everything else holds for each pair of views.

    Returns:
        A 0-d tensor, float32 (float64 for float64 features); 0 for N = 0, and where all weights are 0.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Radford et al. 2021, "Learning transferable visual models from natural language supervision"; queues: He et al. 2020,
    "Momentum contrast for unsupervised visual representation learning"; composed negatives: Yuksekgonul et al. 2023, "When and
    why vision-language models behave like bags-of-words"; view weights: Gao et al. 2022, "PyramidCLIP".
    """
    x_views, y_views = check_views(x, y)
    weights = check_view_weights(view_weights, len(x_views), len(y_views))
    direction_weights = check_directions(directions)
    check_smoothing(label_smoothing, x_views[0])
    check_unused(
        direction_weights,
        row_weights=row_weights,
        col_weights=col_weights,
        row_negatives=row_negatives,
        col_negatives=col_negatives,
    )
    for name, value in (("row_weights", row_weights), ("col_weights", col_weights)):
        if value is not None:
            check_weights(name, value, x_views[0])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        problem = _Pairs(x, y, scale, direction_weights, leave_out, bias, row_negatives, col_negatives, stash_bytes)
        sides = []
        for side, logsumexp, over in ((0, problem.rows, row_weights), (1, problem.cols, col_weights)):
            if logsumexp is not None:
                losses = softplus(logsumexp)
                if isinstance(label_smoothing, Tensor) or label_smoothing:
                    losses = losses + label_smoothing * problem.own_above_mean(side)
                sides.append(direction_weights[side] * mean(losses, over))
        return sum(sides[1:], sides[0])

    losses = [
        weights[v][w] * loss(x_view, y_view) if weights[v][w] != 1 else loss(x_view, y_view)
        for v, x_view in enumerate(x_views)
        for w, y_view in enumerate(y_views)
        if weights[v][w]
    ]
    if not losses:
        raise ValueError("view_weights: expected one that is not 0")
    return sum(losses[1:], losses[0])


def lit_loss(locked: Tensor, y: Tensor, scale: float | Tensor, **options: Any) -> Tensor:
    """`clip_loss` of a locked tower and one that is trained: nothing is differentiated for `locked` [N, D], the rows.

    Two matrix products with the stash where CLIP takes three, three without where it takes four. The options are those of
    `clip_loss`. Zhai et al. 2022, "LiT: zero-shot transfer with locked-image text tuning".
    """
    if not isinstance(locked, Tensor):
        raise TypeError(f"locked: expected a tensor, got {type(locked).__name__}")
    return clip_loss(locked.detach(), y, scale, **options)


def nt_xent_loss(z1: Tensor, z2: Tensor, scale: float | Tensor, *, stash_bytes: int = STASH_BYTES) -> Tensor:
    """SimCLR's loss: each of the 2N views against the 2N - 1 others of both sides, of which one is its own other view.

    z1, z2: [N, D], unit length in SimCLR's use; scale is one over the temperature; the rest is as in `clip_loss`, of which this
    is the form with the view's own side as further negatives: three of the four quarters of the 2N x 2N matrix of logits.
    Returns a 0-d tensor; 0 for N = 0. Chen et al. 2020, "A simple framework for contrastive learning of visual representations".
    """
    check_features(z1, z2)
    check_same_length(z1, z2)
    return clip_loss(z1, z2, scale, **_both_sides(z1, z2), stash_bytes=stash_bytes)


def debiased_contrastive_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    class_prior: float,
    *,
    both_sides: bool = False,
    directions: Directions = "both",
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """The contrastive loss corrected for negatives that are of the anchor's own class with probability `class_prior`.

        loss_i = -log(exp(S_ii) / (exp(S_ii) + C g_i))       g_i = max((mean_j exp(S_ij) - p exp(S_ii)) / (1 - p), exp(-scale))

    over the C negatives j of i, with p = class_prior. At p = 0 it is CLIP's loss, for unit vectors.

    Args:
        x, y: [N, D], unit length (the least value of g supposes it); row i belongs to column i. See `clip_loss`.
        class_prior: p in [0, 1)
        both_sides: False: the negatives of a row are the N - 1 other columns; True: the other rows of its own side as well,
            2N - 2 in all, as with SimCLR's two views in the paper.
        directions: see `clip_loss`.

    Returns:
        A 0-d tensor; 0 for N = 0, and for N = 1, where there is no negative.

    Chuang et al. 2020, "Debiased contrastive learning".
    """
    check_features(x, y)
    check_same_length(x, y)
    weights = check_directions(directions)
    if isinstance(class_prior, bool) or not isinstance(class_prior, float | int):
        raise TypeError(f"class_prior: expected a number, got {type(class_prior).__name__}")
    if not 0 <= class_prior < 1:
        raise ValueError(f"class_prior: expected a number in [0, 1), got {class_prior}")
    extra: dict[str, Any] = _both_sides(x, y) if both_sides else dict.fromkeys(("leave_out", "row_negatives", "col_negatives"))
    pairs = _Pairs(x, y, scale, weights, bias=None, stash_bytes=stash_bytes, **extra)
    count = max(1, (2 if both_sides else 1) * (x.shape[0] - 1))
    least = math.log(count) - pairs.scale - pairs.own_logits()
    sides = []
    for weight, logsumexp in zip(weights, (pairs.rows, pairs.cols), strict=True):
        if logsumexp is not None:
            gap = (math.log(class_prior * count) if class_prior else -math.inf) - logsumexp  # log of what is subtracted / sum
            positive = ~(gap >= 0)  # NaN goes on
            corrected = logsumexp + torch.log(-torch.expm1(torch.where(positive, gap, -1.0))) - math.log1p(-class_prior)
            corrected = torch.where(positive, torch.maximum(corrected, least), least)
            sides.append(weight * mean(softplus(corrected) if x.shape[0] > 1 else 0 * softplus(logsumexp)))
    return sum(sides[1:], sides[0])


def matryoshka_loss(
    loss: Callable[..., Tensor],
    features: Sequence[Tensor],
    widths: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
) -> Tensor:
    """The weighted sum of loss(*features) over prefixes of the features' width, so that each prefix is an embedding of its own.

        matryoshka_loss(lambda x, y: clip_loss(x, y, scale), (image, text), widths=(64, 128, 256, 512))

    Args:
        loss: from features to a 0-d tensor.
        features: tensors [..., D] of one width D: all that the loss compares, a queue too.
        widths: prefixes, each in [1, D].
        weights: one for each width; default: equal ones that sum to 1.
        normalize: bring each prefix to unit length (in float32 for half features, rounded once).

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Kusupati et al. 2022, "Matryoshka representation learning".
    """
    if not features or not all(isinstance(t, Tensor) and t.dtype in DTYPES and t.ndim for t in features):
        raise TypeError("features: expected one tensor or more, float32, float64, bfloat16 or float16, [..., width]")
    width = features[0].shape[-1]
    if any(t.shape[-1] != width for t in features):
        raise ValueError(f"features: expected one width, got {[t.shape[-1] for t in features]}")
    for i, t in enumerate(features):
        debug.check_finite(f"features[{i}]", t)
    if not widths or not all(isinstance(w, int) and 1 <= w <= width for w in widths):
        raise ValueError(f"widths: expected one int or more in [1, {width}], got {widths!r}")
    if weights is None:
        weights = [1 / len(widths)] * len(widths)
    if len(weights) != len(widths):
        raise ValueError(f"weights: expected {len(widths)} numbers as widths has, got {len(weights)}")

    def prefix(t: Tensor, w: int) -> Tensor:
        part = t[..., :w]
        return F.normalize(part.to(accumulate_dtype(t.dtype)), dim=-1).to(t.dtype) if normalize else part

    losses = [weight * loss(*(prefix(t, w) for t in features)) for w, weight in zip(widths, weights, strict=True)]
    return sum(losses[1:], losses[0])


class _Pairs:
    """N pairs of rows and columns with further negatives: what each has to beat, relative to its own logit.

    rows [N], cols [N]: as `pair_logsumexp` has them, over the further negatives too; None for a direction of weight 0.
    """

    def __init__(
        self,
        x: Tensor,  # [N, D]
        y: Tensor,  # [N, D]
        scale: float | Tensor,
        directions: tuple[float, float],
        leave_out: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
        row_negatives: Tensor | None,  # [Q, D]
        col_negatives: Tensor | None,  # [P, D]
        stash_bytes: int,
    ) -> None:
        check_loss_scale(scale)
        n = x.shape[0]
        for name, negatives in (("row_negatives", row_negatives), ("col_negatives", col_negatives)):
            if negatives is not None:
                check_more_features(name, negatives, x)
        total_rows, total_columns = (n + (0 if t is None else t.shape[0]) for t in (col_negatives, row_negatives))
        if leave_out is not None:
            check_leave_out(leave_out, total_rows, total_columns, x.device)
        x, y, row_negatives, col_negatives = common_dtype(x, y, row_negatives, col_negatives)
        if bias is not None:
            bias = check_bias(bias, x, total_columns)
        self.x, self.y, self.scale, self.bias, self.leave_out = x, y, check_scale(scale, x), bias, leave_out
        self.negatives = row_negatives, col_negatives
        row_ids, column_ids = leave_out if leave_out is not None else (None, None)

        def relative(x: Tensor, y: Tensor, own: int | None, rows: slice, columns: slice, names: str) -> Any:
            ids = None if row_ids is None or column_ids is None else (row_ids[rows], column_ids[columns])
            part = bias[columns] if bias is not None and bias.ndim else bias
            return pair_logsumexp(x, y, self.scale, own=own, leave_out=ids, bias=part, directions=names, stash_bytes=stash_bytes)  # type: ignore[call-overload]

        batch, beyond = slice(n), slice(n, None)
        name = "both" if all(directions) else "rows" if directions[0] else "cols"
        found = relative(x, y, 0, batch, batch, name)
        self.rows, self.cols = {"both": found, "rows": (found, None), "cols": (None, found)}[name]
        own = None if row_negatives is None and col_negatives is None else self.own_logits()
        if row_negatives is not None:
            self.rows = logaddexp(self.rows, relative(x, row_negatives, None, batch, beyond, "rows") - own)
        if col_negatives is not None:
            self.cols = logaddexp(self.cols, relative(col_negatives, y, None, beyond, batch, "cols") - own)

    def own_logits(self) -> Tensor:
        """[N], beside the matrix product"""
        own = self.scale * row_dots(self.x, self.y)
        if self.bias is None:
            return own
        return own + (self.bias[: self.x.shape[0]] if self.bias.ndim else self.bias)

    def own_above_mean(self, side: int) -> Tensor:
        """Each own logit minus the mean over its row's candidates (side 0), its column's (side 1): [N]. No logit is made."""
        own, others, negatives = (self.x, self.y, self.negatives[0]) if side == 0 else (self.y, self.x, self.negatives[1])
        dtype = accumulate_dtype(own.dtype)
        left = self.scale * own.to(dtype)
        right = others.to(dtype)  # [N, D]
        more = None if negatives is None else negatives.to(dtype)
        if (
            side == 0 and self.bias is not None and self.bias.ndim
        ):  # one more feature; of one column all logits have the same bias
            n = own.shape[0]
            left = torch.cat([left, torch.ones_like(left[:, :1])], 1)
            right = torch.cat([right, self.bias[:n, None]], 1)
            more = None if more is None else torch.cat([more, self.bias[n:, None]], 1)
        candidates = right if more is None else torch.cat([right, more])
        if self.leave_out is None:
            return (left * (right - candidates.sum(0) / max(1, candidates.shape[0]))).sum(1)
        own_ids, ids = self.leave_out if side == 0 else self.leave_out[::-1]
        own_ids = own_ids[: own.shape[0]]
        out, number = sums_of_equal_id(own_ids, ids, candidates)
        own_is_out = own_ids == ids[: own.shape[0]]  # the own pair stays
        total = candidates.sum(0) - out + torch.where(own_is_out[:, None], right, 0)
        number = candidates.shape[0] - number + own_is_out
        return (left * (right - total / number[:, None])).sum(1)


def _both_sides(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Each side's rows as further negatives of itself, a row beside itself left out."""
    ids = torch.arange(x.shape[0], device=x.device).repeat(2)
    return {"row_negatives": x, "col_negatives": y, "leave_out": (ids, ids)}
