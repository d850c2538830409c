"""Cross-entropy and log-probabilities of a linear layer over a vocabulary, without its matrix of logits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vlpfast.ops import debug
from vlpfast.ops._checks import DTYPES, check_count, check_tensor
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.contrastive._checks import check_smoothing
from vlpfast.ops.contrastive._parts import common_dtype, listed_dots, mean, row_dots, softplus
from vlpfast.ops.contrastive.pair import STASH_BYTES, pair_logsumexp


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    max_rows: int | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """Cross-entropy of the logits h @ weight.T (+ bias) with the labels; tokens under `ignore_index` are left out beforehand.

    Masked and causal language models, losses on answers alone, captions with a weight for each token. For the next token shift
    the labels instead of cutting h: `F.pad(labels[:, 1:], (0, 1), value=-100)` costs nothing. Sums for each sequence:
    `reduction="none"` and `.sum(-1)`; weighted answers: `weights=w[:, None].expand_as(labels)`, `reduction="sum"`.

    A label's logit is made beside the matrix product, in float32: the loss is exact down to 1e-31.

    Args:
        h: [..., D]; see `pair_logsumexp` (h and weight are its x and y) for dtypes, autocast and stash_bytes. Within it (4 GiB)
            the forward keeps its logits, float32 [kept tokens, V]; `stash_bytes=0` keeps nothing of the kind and costs one
            product more, four in place of three.
        weight: [V, D], V >= 1, any strides: tied embeddings as they are.
        labels: [...] int64, in [0, V) or `ignore_index`.
        bias: [V], added to the logits of every token (its gradient is made).
        label_smoothing: e in [0, 1]: targets are 1 - e on the label plus e / V everywhere, as in torch's cross_entropy. With it
            half types are multiplied in float32, from copies of h and weight (slower on GPUs): a gradient has several parts then,
            and rounded before they meet it would be less exact than eager code's.
        weights: [...] >= 0, one factor for each token; its gradient is made.
        reduction: "mean": sum(weights * losses) / sum(weights) over the kept tokens; "sum": their weighted sum; "none": [...].
        max_rows: how many tokens are computed, whatever the labels: for torch.compile and CUDA graphs, where no shape may
            depend on values. Kept tokens move to the front, and what is left of the rows counts nothing. More kept tokens than
            that are an error where the labels' values can be looked at; elsewhere (on a GPU, under compilation) result and
            gradients are NaN. None: as many as are kept, for which the host waits for a GPU; under compilation all of them.

    Returns:
        float32 (float64 for float64 features): 0-d, or [...] with 0 for tokens that are ignored. Where none is kept (or all
        weights are 0) the mean is 0 with gradients 0; torch's cross_entropy makes it NaN.

    Raises:
        TypeError, ValueError: a wrong argument, named. The values in `labels` are checked only where they are on the host (on
            a device under VLPFAST_DEBUG=1).
    """
    _check(h, weight, labels, bias, ignore_index, max_rows)
    if isinstance(label_smoothing, Tensor):
        raise TypeError("label_smoothing: expected a number, got a tensor")
    check_smoothing(label_smoothing, h)
    if weights is not None:
        _check_per_token("weights", weights, h, DTYPES)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    rows = choose_rows(labels, ignore_index, max_rows)
    losses = _losses(h, weight, labels, bias, label_smoothing, rows, stash_bytes)  # [K]
    if weights is not None:
        weights = rows.of(weights.reshape(-1)).to(losses.dtype)
    if reduction == "mean":
        return rows.valid(mean(losses, rows.kept if weights is None else weights))
    losses = losses if weights is None else weights * losses
    return rows.valid(losses.sum() if reduction == "sum" else rows.back(losses, labels))


def token_logprob(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    max_rows: int | None = None,
    stash_bytes: int = STASH_BYTES,
) -> Tensor:
    """log p(label) of every token under softmax(h @ weight.T + bias): what scores of sequences and ranking of candidates take.

    `.sum(-1)` is the log-likelihood of a sequence. Exact near 0, down to -1e-31; differentiable; without gradients one matrix
    product and no memory of tokens x vocabulary. Arguments and errors as in `linear_cross_entropy`.
    Returns [...], float32 (float64 for float64 features), 0 where the label is `ignore_index`.
    """
    _check(h, weight, labels, bias, ignore_index, max_rows)
    rows = choose_rows(labels, ignore_index, max_rows)
    return rows.valid(rows.back(-_losses(h, weight, labels, bias, 0.0, rows, stash_bytes), labels))


class Rows(NamedTuple):
    """Which K of the tokens are computed, and which of these count."""

    index: Tensor | None = None  # [K] places among all tokens, none twice; None: all tokens, in order
    kept: Tensor | None = None  # [K] bool, False: a row that counts nothing; None: all of them count
    factor: Tensor | None = None  # 0-d, 1, or NaN where there are more kept tokens than rows

    def of(self, values: Tensor) -> Tensor:
        """[tokens, ...] -> [K, ...], 0 in the rows that count nothing: whatever stands there (NaN) goes nowhere."""
        values = values if self.index is None else values.index_select(0, self.index)
        if self.kept is None:
            return values
        return torch.where(self.kept.reshape(-1, *[1] * (values.ndim - 1)), values, 0)

    def back(self, values: Tensor, labels: Tensor) -> Tensor:
        """[K] -> the shape of labels, 0 elsewhere"""
        if self.index is not None:
            values = values.new_zeros(labels.numel()).index_copy(0, self.index, values)
        return values.reshape(labels.shape)

    def valid(self, result: Tensor) -> Tensor:
        """NaN with NaN gradients where there are more kept tokens than rows."""
        return result if self.factor is None else result * self.factor.to(result.dtype)


def choose_rows(labels: Tensor, ignore_index: int, max_rows: int | None) -> Rows:
    """Which of the tokens linear_cross_entropy computes, for what else only they need."""
    kept = (labels != ignore_index).reshape(-1)
    if max_rows is not None:
        count = kept.sum()
        if debug.readable(labels) and count > max_rows:
            raise ValueError(f"max_rows: expected at least {int(count)}, as many as labels has tokens to keep, got {max_rows}")
        index = (~kept).byte().argsort(stable=True)[:max_rows]
        return Rows(index, kept[index], torch.where(count > max_rows, torch.nan, 1.0))
    if not debug.has_values(labels):
        return Rows(kept=kept)
    index = kept.nonzero().squeeze(1)
    return Rows(index) if index.shape[0] < kept.shape[0] else Rows()


def _losses(h, weight, labels, bias, label_smoothing, rows, stash_bytes) -> Tensor:
    """The cross-entropy of each row: [K], 0 for one that counts nothing."""
    x, weight = common_dtype(rows.of(h.reshape(labels.numel(), h.shape[-1])), weight)
    labels = rows.of(labels.reshape(-1))
    if label_smoothing:  # the parts of a gradient meet before it is rounded to a half type
        x, weight = (t.to(accumulate_dtype(t.dtype)) for t in (x, weight))
    device = x.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        losses = softplus(pair_logsumexp(x, weight, 1.0, own=labels, bias=bias, directions="rows", stash_bytes=stash_bytes))
        if label_smoothing:
            losses = losses + label_smoothing * _own_above_mean(x, weight, labels, bias)
    return losses if rows.kept is None else torch.where(rows.kept, losses, 0)


def _own_above_mean(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    """Each row's own logit minus the mean of its V logits: [K]. No other logit is made."""
    above = listed_dots(x, weight, labels[:, None])[:, 0] - row_dots(x, weight.mean(0))
    if bias is None:
        return above
    bias = bias.to(x.dtype)
    average = bias.expand(2, -1).mean(1)[0]  # two rows: the sum of a single long one depends on the number of threads
    return above + bias[labels] - average


def _check(h: Any, weight: Any, labels: Any, bias: Any, ignore_index: Any, max_rows: Any) -> None:
    for name, features in (("h", h), ("weight", weight)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(features).__name__}")
        if features.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {features.dtype}")
    if not h.ndim:
        raise ValueError("h: expected at least 1 dimension [..., width], got a 0-d tensor")
    if weight.ndim != 2 or weight.shape[1] != h.shape[-1] or not weight.shape[0]:
        raise ValueError(f"weight: expected shape [V >= 1, {h.shape[-1]}] beside h, got {tuple(weight.shape)}")
    _check_device("weight", weight, h)
    _check_per_token("labels", labels, h, (torch.int64,))
    if bias is not None:
        check_tensor("bias", bias, getattr(bias, "device", None), DTYPES, weight.shape[0])
        _check_device("bias", bias, h)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if max_rows is not None:
        check_count("max_rows", max_rows, 1)
    if debug.readable(labels):
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))]
        if wrong.numel():
            raise ValueError(
                f"labels: expected values in [0, V) with V = {weight.shape[0]} rows of weight, or ignore_index {ignore_index}, "
                f"got {int(wrong[0])}"
            )


def _check_per_token(name: str, values: Any, h: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(values).__name__}")
    if values.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(dtype) for dtype in dtypes)}, got {values.dtype}")
    if values.shape != h.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(h.shape[:-1])}, that of h without its width, got {tuple(values.shape)}")
    _check_device(name, values, h)


def _check_device(name: str, value: Tensor, h: Tensor) -> None:
    if value.device != h.device:
        raise ValueError(f"{name}: expected device {h.device} as h has, got {value.device}")
