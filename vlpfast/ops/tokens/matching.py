"""Which tokens merge into which: ToMe's bipartite matching and its variants, without the similarities of all pairs."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vlpfast.ops import backends, debug
from vlpfast.ops._checks import DTYPES, check_choice, check_count, check_mask, check_tensor
from vlpfast.ops.contrastive.reference import random_bits
from vlpfast.ops.tokens import reference

KERNELS = {"cpp": "cpu", "triton": "cuda"}  # beside `reference`: backend -> device type


class Match(NamedTuple):
    """N tokens that become N - r, in int64: what merge, unmerge and track need, and a network can hand on.

    index: [B, N] the place of each token in the output, 0 .. N - r - 1.
    kept: [B, N - r] the token that each place of the output had been: index.gather(1, kept) is 0 .. N - r - 1.
    source: [B, r] the tokens that are merged away, the most similar first.
    target: [B, r] the place in the output that each of them goes to: index.gather(1, source).
    """

    index: Tensor
    kept: Tensor
    source: Tensor
    target: Tensor


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    protect: int = 1,
    mask: Tensor | None = None,
    order: Literal["position", "score"] = "position",
) -> Match:
    """ToMe's matching: the r tokens at even places that are most similar to one at an odd place merge into that one.

    Set A has the even places and set B the odd ones. Each token of A has one destination: the token of B with the largest
    cosine similarity, the lowest place on ties. The r tokens of A with the largest similarities are merged away, on ties the
    lowest places. The output has the protected tokens, then the rest of A, then the rest of B. r = 0 leaves everything in place.

    Args:
        metric: [B, N, C] float32, float64, bfloat16 or float16, any strides; what tokens are compared by, in ToMe the mean of
            the attention's keys over the heads. Multiplied and summed in float32, float64 for float64. No gradient.
        r: tokens to merge away, >= 0; at most (N - protect) // 2 are, as published.
        protect: the first so many tokens are neither merged away nor merged into, and stay first in their order. 1 is ToMe with
            a class token, 2 with a distillation token too; 0 for networks without one (published: with order="score").
        mask: [B, N] bool, True = keep; None keeps all. See below.
        order: of the rest of A: "position" as they were, "score" by falling similarity. B stays in order either way.

    Returns:
        Match of int64 tensors on metric's device, whose shapes depend on N and r alone.

    Similarities are -1 to 1, and 0 beside a zero vector. One that is NaN is never the largest; a token of A that has no other
    goes to the lowest place of B, and merges after all that have one (VLPFAST_DEBUG=1 names numbers that are not finite).

    Padding (mask False): real tokens merge with real ones alone, and r counts these. Where an image has too few of them, padding
    tokens of A merge, the lowest places first, into the first padding token of B. Only where that too is not enough (B has real
    tokens alone, or padding alone: images of few tokens) the rest of A goes to the tokens of B in turn. With
    `size = mask.float()` for merge(mode="weighted") padding weighs nothing, so that it is mixed into nothing even then; the sizes
    that come out are 0 at padding, 'size > 0' is the output's mask, and their logarithm what proportional attention adds.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Bolya et al. 2023, "Token merging: your ViT but faster", section 3 and appendix D.
    """
    _check_metric(metric, mask)
    check_count("r", r, 0)
    check_count("protect", protect, 0)
    check_choice("order", order, ("position", "score"))
    r = max(0, min(r, (metric.shape[1] - protect) // 2))
    return _match(metric, None, None, 2, protect, r, order, mask)


def kth_match(metric: Tensor, k: int, *, mask: Tensor | None = None) -> Match:
    """Every k-th token (places k - 1, 2k - 1, ...) stays, all others merge into the most similar one of these.

    N tokens become N // k; k = 1 leaves everything in place. The last N mod k tokens, which the published code leaves out,
    merge too. Arguments, ties, NaN and padding as in bipartite_match.

    Raises:
        TypeError, ValueError: a wrong argument, named; k > N, with which no token would stay.

    Bolya et al. 2023, "Token merging: your ViT but faster", appendix D ("k-th").
    """
    _check_metric(metric, mask)
    check_count("k", k, 1)
    n = metric.shape[1]
    if n and k > n:
        raise ValueError(f"k: expected at most N = {n}, the tokens of metric, got {k}")
    return _match(metric, None, None, k, 0, n - n // k, "position", mask)


def random_match_2d(
    metric: Tensor,
    h: int,
    w: int,
    r: int,
    *,
    sy: int = 2,
    sx: int = 2,
    protect: int = 0,
    seed: Tensor | None = None,
    mask: Tensor | None = None,
    order: Literal["position", "score"] = "position",
) -> Match:
    """Set B has one token of each sy x sx cell of an image, drawn at random, the same for the whole batch; A has the others.

    Everything else as in bipartite_match, which this is with another set B: r tokens of A merge into B.

    Args:
        metric: [B, protect + h * w, C]: after the protected tokens the image's, row by row.
        h, w: the image's height and width in tokens, >= 1.
        r: tokens to merge away, >= 0; at most all of A that is not protected is.
        sy, sx: height and width of a cell, >= 1. There are (h // sy) * (w // sx) whole cells, at least one; tokens outside of
            them are in A.
        seed: 0-d int64 tensor on metric's device: equal seeds give equal sets on every device. None: drawn from torch's generator
            of the device.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Bolya and Hoffman 2023, "Token merging for fast Stable Diffusion"; there the rest of A has order="score".
    """
    _check_metric(metric, mask)
    for name, value in (("h", h), ("w", w), ("sy", sy), ("sx", sx)):
        check_count(name, value, 1)
    check_count("r", r, 0)
    check_count("protect", protect, 0)
    check_choice("order", order, ("position", "score"))
    n, device = metric.shape[1], metric.device
    if n != protect + h * w:
        raise ValueError(f"metric: expected protect + h * w = {protect + h * w} tokens, got {n}")
    if sy > h or sx > w:
        raise ValueError(f"sy, sx: expected a cell within {h} x {w} tokens, got {sy} x {sx}")
    if seed is None:
        seed = torch.randint(2**63 - 1, (), device=device)
    check_tensor("seed", seed, device, (torch.int64,), None)
    rows, columns = h // sy, w // sx
    drawn = random_bits(rows, columns, 0, seed) * (sy * sx) >> 32  # [rows, columns] the place in each cell
    row = sy * torch.arange(rows, device=device)[:, None] + drawn // sx
    column = sx * torch.arange(columns, device=device) + drawn % sx
    b = (protect + w * row + column).flatten().sort().values
    in_b = torch.zeros(n, dtype=torch.bool, device=device).index_fill(0, b, True)
    a = in_b.to(torch.int8).argsort(stable=True)[: n - rows * columns]  # those that are not in B, in order
    return _match(metric, a, b, 0, protect, min(r, h * w - rows * columns), order, mask)


def _match(metric, a, b, every, protect, r, order, mask) -> Match:
    if r == 0:
        n = metric.shape[1]
        index = torch.arange(n, device=metric.device).expand(metric.shape[0], n)
        return Match(index, index.view_as(index), index[:, :0], index[:, :0])  # Dynamo refuses one tensor twice in a Function
    device = metric.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # similarities are not rounded
            return _match(metric, a, b, every, protect, r, order, mask)
    metric = metric.detach()
    backend = backends.choose("match", KERNELS, metric.device, metric.dtype)
    if backend == "reference":
        if a is None:
            a, b = reference.split(metric.shape[1], every, metric.device)
        return Match(*reference.match(metric, a, b, protect, r, order == "score", mask))
    return Match(*backends.operator("match_fwd", backend)(metric, a, b, every, protect, r, order == "score", mask))


def _check_metric(metric: Any, mask: Any) -> None:
    if not isinstance(metric, Tensor):
        raise TypeError(f"metric: expected a tensor, got {type(metric).__name__}")
    if metric.dtype not in DTYPES:
        raise TypeError(f"metric: expected float32, float64, bfloat16 or float16, got {metric.dtype}")
    if metric.ndim != 3:
        raise ValueError(f"metric: expected shape [B, N, C], got {tuple(metric.shape)}")
    if mask is not None:
        check_mask("mask", mask, metric)
    debug.check_finite("metric", metric if mask is None else metric.masked_fill(~mask[..., None], 0))
