"""Losses of late interaction: cross-entropies and sigmoid losses of score matrices, and FILIP's selection of tokens.

Score matrices come in the accumulating dtype and are held; nothing here is of the size of the products of tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vlpfast.ops._checks import DTYPES, check_count, check_tensor, same_dtype
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive._checks import check_directions, check_ids, check_scale, check_smoothing, check_unused, check_weights
from vlpfast.ops.contrastive._parts import mean, softplus
from vlpfast.ops.maxsim._checks import check_sets, check_tokens
from vlpfast.ops.maxsim.maxsim import STASH_BYTES, maxsim
from vlpfast.ops.maxsim.score import score_ce

Directions = Literal["both", "rows", "cols"] | tuple[float, float]


def filip_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    directions: Directions = "both",
    masked: Literal["ignore", "zero"] = "ignore",
    normalize: bool = False,
    x_cu_seqlens: Tensor | None = None,
    y_cu_seqlens: Tensor | None = None,
    stash_bytes: int = STASH_BYTES,
    **options: Any,
) -> Tensor:
    """FILIP's loss: the mean of the cross-entropies of two different score matrices, row i of which belongs to column i.

        x_to_y[i, j] = mean over kept p of max over kept t of <x[i, p], y[j, t]>;  y_to_x: mean over t of max over p
        loss = (mean_i CE(scale * x_to_y[i, :], i) + mean_j CE(scale * y_to_x[:, j], j)) / 2

    With one token each it is CLIP's loss. Both matrices come from one pass over the products of tokens, which are not held.
    Where tokens are gathered over ranks and each rank has its own rows alone, the two halves are two calls of
    directions="rows", own=rank * B, the other one with the sides exchanged.

    Args:
        x, y: tokens [N, P, D] and [N, T, D], unit length in FILIP's use. For them, masks, normalize, cu_seqlens, stash_bytes
            and masked ("zero" is what Wukong's published weights were scored with) see `maxsim`.
        scale, directions, options: see `score_contrastive_loss`; a direction of weight 0 is not computed.

    Returns, Raises: see `score_contrastive_loss`.

    Yao et al. 2022, "FILIP: fine-grained interactive language-image pre-training"; Gu et al. 2022, "Wukong".
    """
    weights = check_directions(directions)
    name: Any = "both" if all(weights) else "x_to_y" if weights[0] else "y_to_x"
    found = maxsim(
        x, y, x_mask, y_mask, directions=name, masked=masked, normalize=normalize,
        x_cu_seqlens=x_cu_seqlens, y_cu_seqlens=y_cu_seqlens, stash_bytes=stash_bytes,
    )  # fmt: skip
    x_to_y, y_to_x = found if name == "both" else (found, found)
    return score_contrastive_loss(x_to_y, y_to_x, scale, directions=directions, **options)


def score_contrastive_loss(
    x_to_y: Tensor,
    y_to_x: Tensor,
    scale: float | Tensor,
    *,
    directions: Directions = "both",
    own: int = 0,
    labels: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float | Tensor = 0.0,
    row_weights: Tensor | None = None,
    col_weights: Tensor | None = None,
) -> Tensor:
    """The contrastive loss of scores that are there already: softmax over the rows of one matrix, the columns of the other.

        loss = (mean_i CE(scale * x_to_y[i, :], target) + mean_j CE(scale * y_to_x[:, j], target)) / 2

    Targets are left out of the sums of exponentials and added beside them: with one positive each the loss is exact down to
    1e-31. With `own` loss and gradients are made at once, in two launches on a GPU; with labels, and where label_smoothing,
    row_weights or col_weights have a gradient, torch's operators make them, on every backend. Of one matrix for both
    (GLoRIA's) give it twice. The contrast of a Q-Former's queries [M, Q, D] with one text vector [N, D], which takes the best
    query for each text (BLIP-2, GeoX, mPLUG-video), is

        s = maxsim(queries, text[:, None], directions="y_to_x")
        score_contrastive_loss(s, s, scale, label_smoothing=0.1, labels=(image_ids, image_ids))

    Args:
        x_to_y: [M, N] float32 or float64 (half types are converted), whose rows are normalised.
        y_to_x: [M, N] whose columns are; not looked at with a weight of 0.
        scale: a float >= 0, or a 0-d tensor (its gradient is made).
        directions: "both", "rows", "cols", or two weights, as in `clip_loss`.
        own: row i belongs to column i + own, 0 <= own <= N - M. Directions with columns need M = N, or labels.
        labels: (row_labels [M], col_labels [N]) int64 instead of `own`: all pairs of equal labels are positives, each with the
            same share of the target; the means are over rows and columns that have one.
        label_smoothing: e in [0, 1], a number, 0-d or [M] (one for each pair, both of its directions; M = N then): targets are
            1 - e on the positives plus e / C on each of the C candidates, as in torch's cross_entropy. For a mass a that only
            the C - 1 others share (NEVLP's omega), e = a * C / (C - 1).
        row_weights: [M] >= 0: the mean over rows becomes sum(w * CE) / sum(w). col_weights: [N], likewise.

    Returns:
        A 0-d tensor, float32 (float64 for float64 scores); 0 where there is no row and no column to average.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Li et al. 2023, "BLIP-2"; labels: Xia et al. 2024, "GeoX"; smoothing by pair: "NEVLP: noise-robust framework for
    efficient vision-language pre-training", 2024.
    """
    _check_scores(x_to_y, y_to_x)
    weights = check_directions(directions)
    m, n = x_to_y.shape
    x_to_y, y_to_x = (s.to(accumulate_dtype(s.dtype)) for s in same_dtype(x_to_y, y_to_x))
    scale = check_scale(scale, x_to_y)
    check_smoothing(label_smoothing, x_to_y)
    check_unused(weights, row_weights=row_weights, col_weights=col_weights)
    if row_weights is not None:
        check_weights("row_weights", row_weights, x_to_y)
    if col_weights is not None:
        check_weights("col_weights", col_weights, y_to_x.T)
    if isinstance(label_smoothing, Tensor) and label_smoothing.ndim and weights[1] and m != n:
        raise ValueError(f"label_smoothing: expected a number with {m} rows and {n} columns, got a vector")
    _check_own(own, labels, m, n, x_to_y.device, columns=bool(weights[1]))
    return score_ce(x_to_y, y_to_x, scale, own, labels, label_smoothing, row_weights, col_weights, weights)


def _check_scores(x_to_y: Any, y_to_x: Any) -> None:
    for name, scores in (("x_to_y", x_to_y), ("y_to_x", y_to_x)):
        if not isinstance(scores, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(scores).__name__}")
        if scores.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {scores.dtype}")
        if scores.ndim != 2:
            raise ValueError(f"{name}: expected 2 dimensions [rows, columns], got shape {tuple(scores.shape)}")
    if y_to_x.shape != x_to_y.shape:
        raise ValueError(f"y_to_x: expected shape {tuple(x_to_y.shape)} as x_to_y has, got {tuple(y_to_x.shape)}")
    if y_to_x.device != x_to_y.device:
        raise ValueError(f"y_to_x: expected device {x_to_y.device} as x_to_y has, got {y_to_x.device}")


def _check_own(own: Any, labels: Any, m: int, n: int, device: torch.device, *, columns: bool) -> None:
    if labels is not None:
        if not (isinstance(labels, tuple | list) and len(labels) == 2):
            raise TypeError(f"labels: expected a pair (row_labels, col_labels), got {type(labels).__name__}")
        check_ids("labels[0]", labels[0], device, m)
        check_ids("labels[1]", labels[1], device, n)
        if own != 0:
            raise ValueError(f"own: expected 0 with labels, which say what belongs together, got {own!r}")
        return
    check_count("own", own, 0)
    if own > n - m:
        raise ValueError(f"own: expected an offset in [0, N - M] with M = {m} rows and N = {n} columns, got {own}")
    if columns and m != n:
        raise ValueError(f"directions: expected 'rows' with {m} rows and {n} columns, of which some have no row of their own")


def maxsim_sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    owner: Tensor | None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """ConceptCLIP's loss of patches and concepts: the sigmoid loss of each image with each concept, by its best patch.

        z[i, k] = scale * max over kept p of <x[i, p], y[k]> + bias
        loss = (1 / C) sum over i, k of -log sigmoid(z[i, k] if owner[k] = i else -z[i, k])

    C is the number of kept concepts. The gradient goes to the best patch of each pair alone, on ties to the lowest index.

    Args:
        x: patches [M, P, D], y: concepts [C, D], unit length in the paper's use; dtypes, normalize and stash_bytes as in
            `maxsim`. Concepts padded by sample, [M, K, D], are y.flatten(0, 1) with arange(M).repeat_interleave(K) as owner.
        scale: a float >= 0, or a 0-d tensor; bias: a 0-d tensor or None (their gradients are made).
        owner: [C] int64, the row of x that concept k is of; any other number (-1) for none of them. None: all pairs are
            negatives, as those with another rank's concepts are.
        x_mask: [M, P] bool, True = keep; an image without patches scores 0. y_mask: [C] bool.

    Returns:
        A 0-d tensor, float32 (float64 for float64 features); 0 where there is no concept.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Nie et al. 2025, "An explainable biomedical foundation model via large-scale concept-enhanced vision-language pre-training".
    """
    if isinstance(y, Tensor) and y.ndim != 2:
        raise ValueError(f"y: expected 2 dimensions [concepts, width], got shape {tuple(y.shape)}")
    check_tokens("y", y, y_mask, None, "[C, D]")
    if owner is not None:
        check_ids("owner", owner, y.device, y.shape[0])
    if bias is not None:
        check_tensor("bias", bias, y.device, DTYPES, None)
    mask = None if y_mask is None else y_mask[:, None]
    best = maxsim(x, y[:, None], x_mask, mask, directions="y_to_x", normalize=normalize, stash_bytes=stash_bytes)  # [M, C]
    logits = check_scale(scale, best) * best
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if owner is not None:
        logits = torch.where(torch.arange(x.shape[0], device=y.device)[:, None] == owner, -logits, logits)
    losses = softplus(logits).sum(0)
    return mean(losses) if y_mask is None else mean(torch.where(y_mask, losses, 0), y_mask)


class Kept(NamedTuple):
    """The tokens of one side that a selection has kept, in their order: K of each set."""

    tokens: Tensor  # [N, K, D]
    mask: Tensor  # [N, K] bool; False where a set has fewer tokens than K
    indices: Tensor  # [N, K] int64 places in the set


def token_filter(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    keep: float = 0.25,
    chunk_bytes: int = 1 << 26,
) -> tuple[Kept, Kept]:
    """FILIP's selection before features are gathered: of each set the share of tokens that come nearest to any of the other side.

    A token's score is its largest product with all kept tokens of the other side, so that the tokens which win the rows and
    columns of `maxsim` over this batch tend to stay; on ties the lower index stays. Shapes depend on those of the input alone:
    K = max(1, round(keep * length)). The choice has no gradient, the tokens kept have theirs.

        image, text = token_filter(image, text, None, text_mask)
        loss = filip_loss(image.tokens, text.tokens, scale, image.mask, text.mask)

    Args:
        x, y: [M, P, D] and [N, T, D], masks [M, P] and [N, T] bool, True = keep, as for `maxsim`.
        keep: the share in (0, 1] of each side's tokens, masked ones counted; 1 keeps all.
        chunk_bytes: products of tokens are made in float32 (float64 for float64) and held in pieces of about so many bytes.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Yao et al. 2022, "FILIP: fine-grained interactive language-image pre-training".
    """
    check_tokens("x", x, x_mask, None, "[M, P, D]")
    check_tokens("y", y, y_mask, None, "[N, T, D]")
    check_sets(x, y, x.shape[0], y.shape[0], "all")
    if isinstance(keep, bool) or not isinstance(keep, float | int):
        raise TypeError(f"keep: expected a number, got {type(keep).__name__}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a number in (0, 1], got {keep}")
    check_count("chunk_bytes", chunk_bytes, 1)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        best = _token_maxima(x, y, x_mask, y_mask, chunk_bytes)
    return _keep(x, x_mask, best[0], keep), _keep(y, y_mask, best[1], keep)


def _token_maxima(x, y, x_mask, y_mask, chunk_bytes) -> tuple[Tensor, Tensor]:
    """Each token's largest product with all kept tokens of the other side, [M, P] and [N, T]; -inf for masked ones."""
    dtype = accumulate_dtype(torch.promote_types(x.dtype, y.dtype))
    (m, p), (n, t) = x.shape[:2], y.shape[:2]
    a, b = x.reshape(m * p, x.shape[2]).to(dtype), y.reshape(n * t, y.shape[2]).to(dtype)
    a_mask, b_mask = (None if mask is None else mask.flatten() for mask in (x_mask, y_mask))
    rows = max(1, chunk_bytes // (max(1, n * t) * dtype.itemsize))
    x_best, y_best = [], b.new_full((n * t,), -math.inf)
    for start in range(0, m * p if n * t else 0, rows):
        product = a[start : start + rows] @ b.T
        if b_mask is not None:
            product = product.masked_fill_(~b_mask, -math.inf)
        if a_mask is not None:
            product = product.masked_fill_(~a_mask[start : start + rows, None], -math.inf)
        x_best.append(product.amax(1))
        y_best = torch.maximum(y_best, product.amax(0))
    return (torch.cat(x_best) if x_best else a.new_full((m * p,), -math.inf)).reshape(m, p), y_best.reshape(n, t)


def _keep(tokens: Tensor, mask: Tensor | None, best: Tensor, share: float) -> Kept:
    count = min(tokens.shape[1], max(1, round(share * tokens.shape[1])))
    order = best.sort(dim=1, descending=True, stable=True).indices
    if mask is not None:  # masked ones after those that are kept but met nothing
        order = order.gather(1, mask.gather(1, order).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices)
    indices = order[:, :count].sort(1).values
    mask = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask.gather(1, indices)
    return Kept(tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[2])), mask, indices)
