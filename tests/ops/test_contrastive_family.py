"""The contrastive losses against their formulas, written out here on dense matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlpfast.ops import backends
from vlpfast.ops.contrastive import (
    clip_loss,
    debiased_contrastive_loss,
    group_contrastive_loss,
    lit_loss,
    local_global_loss,
    matryoshka_loss,
    nt_xent_loss,
    pair_logsumexp,
    supcon_loss,
    supervised_contrastive_loss,
)
from vlpfast.ops.contrastive import _parts, supervised

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")

Inputs = dict[str, Tensor]
INF = math.inf


def unit(*shape: int, seed: int, like: Tensor | None = None, noise: float = 1.0) -> Tensor:
    """Unit vectors in float64; with `like` these and so much noise."""
    t = F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)
    return t if like is None else F.normalize(like + noise * t, dim=-1)


def integers(count: int, below: int, seed: int) -> Tensor:
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(seed))


def pairs(n: int, d: int, *, scale: float = 14.3, noise: float = 1.0, **more: Tensor) -> Inputs:
    x = unit(n, d, seed=0)
    return {"x": x, "y": unit(n, d, seed=1, like=x, noise=noise), "scale": torch.tensor(scale).double()} | more


# --- the formulas -----------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Row-wise with targets of probability; weighted mean over the rows. -inf: no candidate."""
    losses = logits.logsumexp(1) - torch.where(targets > 0, targets * logits, 0).sum(1)
    weights = torch.ones_like(losses) if weights is None else weights
    return (weights * losses).sum() / weights.sum()


def dense_side(logits: Tensor, more: Tensor | None, ids: Any, smoothing: Any, weights: Tensor | None) -> Tensor:
    """Rows of [N, N] with the own pair on the diagonal, `more` [N, Q] further negatives; ids: of rows, of all columns."""
    n = len(logits)
    logits = logits if more is None else torch.cat([logits, more], 1)
    own = torch.eye(n, logits.shape[1], dtype=torch.bool)
    if ids is not None:
        logits = logits.masked_fill((ids[0][:n, None] == ids[1]) & ~own, -INF)
    candidates = logits > -INF
    smoothing = torch.as_tensor(smoothing, dtype=torch.float64).expand(n)[:, None]
    targets = (1 - smoothing) * own + smoothing * candidates / candidates.sum(1, keepdim=True)
    return cross_entropy(logits, targets, weights)


def dense_clip(x, y, scale, *, a=0.5, b=0.5, row_weights=None, col_weights=None, label_smoothing=0.0, leave_out=None, bias=None,
               row_negatives=None, col_negatives=None):  # fmt: skip
    n = len(x)
    columns = torch.cat([y, row_negatives]) if row_negatives is not None else y
    rows = torch.cat([x, col_negatives]) if col_negatives is not None else x
    bias = torch.zeros(len(columns)).double() if bias is None else bias.expand(len(columns))
    s = scale * rows @ columns.T + bias
    ids = (leave_out, leave_out[::-1]) if leave_out is not None else (None, None)
    by_row = dense_side(s[:n, :n], s[:n, n:], ids[0], label_smoothing, row_weights)
    by_col = dense_side(s[:n, :n].T, s[n:, :n].T, ids[1], label_smoothing, col_weights)
    return a * by_row + b * by_col


def dense_nt_xent(z1, z2, scale):
    z = torch.cat([z1, z2])
    s = (scale * z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -INF)
    return F.cross_entropy(s, torch.arange(len(z)).roll(len(z1)))


def dense_debiased(x, y, scale, *, prior, both_sides=False):
    total, count = 0.0, (2 if both_sides else 1) * (len(x) - 1)
    for own, others in ((x, y), (y, x)):
        s = (scale * own @ others.T).exp()
        negatives = s.sum(1) - s.diagonal()
        if both_sides:
            same = (scale * own @ own.T).exp()
            negatives = negatives + same.sum(1) - same.diagonal()
        positive = s.diagonal()
        g = ((negatives / count - prior * positive) / (1 - prior)).maximum((-scale).exp())
        total = total - (positive / (positive + count * g)).log().mean() / 2
    return total


def dense_supervised(x, y, scale, row_labels, col_labels, *, a=0.5, b=0.5, itself=True):
    s = scale * x @ y.T
    positive = row_labels[:, None] == col_labels
    if not itself:
        me = torch.eye(len(x), dtype=torch.bool)
        s, positive = s.masked_fill(me, -INF), positive & ~me
    total = 0.0
    for weight, logits, mask in ((a, s, positive), (b, s.T, positive.T)):
        has = mask.any(1)
        if has.any():
            total = total + weight * cross_entropy(logits[has], (mask.double() / mask.sum(1, keepdim=True))[has])
    return total


def dense_group(x, y, scale, size, *, positives="least_hard", related=None, a=0.5, b=0.5):
    """As the papers have it: plain sums of exponentials, loops over groups."""
    s = scale * x @ y.T
    count, total = len(x) // size, 0.0
    for weight, logits, other in ((a, s, related), (b, s.T, None if related is None else related.T)):
        for g in range(count):
            own = logits[g * size : (g + 1) * size]
            block = own[:, g * size : (g + 1) * size]
            hard, least = 1 / (-block).exp().sum(), (1 / (-block).exp().sum(1)).sum()
            h, e = hard.detach().log() / scale.detach(), least.detach().log() / scale.detach()
            w = {"hard": 1.0, "least_hard": 0.0, "adaptive": 2 * h * e / (h + e) if h > 0 else 0.0}[positives]
            p = (w * hard.log() + (1 - w) * least.log()).exp()
            negatives = [
                own[:, k * size : (k + 1) * size].exp().sum()
                for k in range(count)
                if k != g and (other is None or not other[g, k])
            ]
            total = total - weight * (p / (p + sum(negatives))).log() / count
    return total


def dense_local(x, y, scale, mask=None):
    n, length, _ = y.shape
    mask = torch.ones(n, length, dtype=torch.bool) if mask is None else mask
    total, count = 0.0, int(mask.any(1).sum())
    for i in range(n):
        others = torch.cat([y[j][mask[j]] for j in range(n) if j != i])
        negatives = scale * others @ x[i]
        for k in range(length):
            if mask[i, k]:
                positive = scale * y[i, k] @ x[i]
                total = total + (torch.cat([positive[None], negatives]).logsumexp(0) - positive) / mask[i].sum() / count
    return total


# --- cases: inputs in float64, the loss, the formula -------------------------------------------------------------------

Case = tuple[Callable[[], Inputs], Callable[..., Tensor], Callable[..., Tensor]]
ROW_IDS, COLUMN_IDS = integers(23 + 5, 9, 2), integers(23 + 8, 9, 3)
SOME, SMOOTH = torch.linspace(0, 2, 23).double(), torch.linspace(0, 0.6, 23).double()
QUEUES = {"row_negatives": unit(8, 7, seed=5), "col_negatives": unit(5, 7, seed=6)}
IDS = {"leave_out": (ROW_IDS[:23], COLUMN_IDS[:23])}
ALL_IDS = {"leave_out": (ROW_IDS, COLUMN_IDS)}
LABELS = {"row_labels": integers(23, 6, 7), "col_labels": integers(31, 6, 8)}


def clip_case(directions: Any = "both", inputs: Callable[[], Inputs] = lambda: pairs(23, 7), **options: Any) -> Case:
    a, b = {"both": (0.5, 0.5), "rows": (1.0, 0.0), "cols": (0.0, 1.0)}.get(directions, directions)
    fixed = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    more = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    return (
        lambda: inputs() | more,
        lambda x, y, scale, **rest: clip_loss(x, y, scale, directions=directions, **fixed, **rest),
        lambda x, y, scale, **rest: dense_clip(x, y, scale, a=a, b=b, **fixed, **rest),
    )


def supervised_case(m: int, n: int, d: int = 7, *, labels: tuple[Tensor, Tensor], noise: float | None = None, scale=14.3) -> Case:
    def inputs() -> Inputs:
        centres = unit(40, d, seed=3)
        x, y = unit(m, d, seed=0), unit(n, d, seed=1)
        if noise is not None:
            x, y = (F.normalize(centres[ids] + noise * t, dim=1) for ids, t in zip(labels, (x, y), strict=True))
        return {"x": x, "y": y, "scale": torch.tensor(scale).double()}

    return (
        inputs,
        lambda **all_of_them: supervised_contrastive_loss(**all_of_them, row_labels=labels[0], col_labels=labels[1]),
        lambda **all_of_them: dense_supervised(**all_of_them, row_labels=labels[0], col_labels=labels[1]),
    )


def group_case(g: int, k: int, scale: float = 14.3, noise: float = 1.0, related: Tensor | None = None, **options: Any) -> Case:
    def inputs() -> Inputs:
        centres = unit(g, 7, seed=3).repeat_interleave(k, 0)
        x, y = (unit(g * k, 7, seed=s, like=centres, noise=noise) for s in (0, 1))
        return {"x": x, "y": y, "scale": torch.tensor(scale).double()}

    return (
        inputs,
        lambda x, y, scale: group_contrastive_loss(x, y, scale, k, related=related, **options),
        lambda x, y, scale: dense_group(x, y, scale, k, related=related, **options),
    )


def local_case(n: int, length: int, mask: Tensor | None = None) -> Case:
    return (
        lambda: {"x": unit(n, 7, seed=0), "y": unit(n, length, 7, seed=1), "scale": torch.tensor(14.3).double()},
        lambda x, y, scale: local_global_loss(x, y, scale, mask),
        lambda x, y, scale: dense_local(x, y, scale, mask),
    )


def supcon_case(labels: Tensor) -> Case:
    return (
        lambda: {"z": unit(len(labels), 7, seed=0), "scale": torch.tensor(10.0).double()},
        lambda z, scale: supcon_loss(z, scale, labels),
        lambda z, scale: dense_supervised(z, z, scale, labels, labels, itself=False),
    )


def two_views(n: int) -> Inputs:
    p = pairs(n, 7)
    return {"z1": p["x"], "z2": p["y"], "scale": p["scale"]}


def debiased_case(prior: float, both_sides: bool, **inputs: float) -> Case:
    return (
        lambda: pairs(23, 7, **inputs),
        lambda x, y, scale: debiased_contrastive_loss(x, y, scale, prior, both_sides=both_sides),
        lambda x, y, scale: dense_debiased(x, y, scale, prior=prior, both_sides=both_sides),
    )


def views(v: int, w: int, weights: Any) -> Case:
    table = [[1 / (v * w)] * w] * v if weights is None else weights
    return (
        lambda: {"x": unit(v, 23, 7, seed=0), "y": unit(w, 23, 7, seed=1), "scale": torch.tensor(5.0).double()},
        lambda x, y, scale: clip_loss(x, y, scale, view_weights=weights, label_smoothing=0.1, **IDS),
        lambda x, y, scale: sum(
            table[i][j] * dense_clip(x[i], y[j], scale, label_smoothing=0.1, **IDS) for i in range(v) for j in range(w)
        ),
    )


def matryoshka_case(normalize: bool, weights: Any) -> Case:
    widths = (2, 5, 7)
    table = [1 / 3] * 3 if weights is None else weights

    def dense(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        cut = [[t[:, :w] / (t[:, :w].norm(dim=1, keepdim=True) if normalize else 1) for t in (x, y)] for w in widths]
        return sum(weight * dense_clip(*both, scale) for weight, both in zip(table, cut, strict=True))

    return (
        lambda: pairs(23, 7),
        lambda x, y, scale: matryoshka_loss(
            lambda x, y: clip_loss(x, y, scale), (x, y), widths, weights=weights, normalize=normalize
        ),
        dense,
    )


RELATED = (lambda t: t | t.T)(torch.rand(9, 9, generator=torch.Generator().manual_seed(9)) < 0.3)
LOPSIDED = torch.rand(9, 9, generator=torch.Generator().manual_seed(9)) < 0.3
MASK = torch.arange(5) < torch.tensor([5, 1, 0, 3, 4, 5, 2])[:, None]
MANY = torch.arange(70) // 67  # 67 rows of one label, 3 of another
CASES: dict[str, Case] = {
    "clip": clip_case(),
    "clip, 1 pair": clip_case(inputs=lambda: pairs(1, 7)),
    "clip, 127 pairs": clip_case(inputs=lambda: pairs(127, 31)),
    "clip, rows": clip_case("rows"),
    "clip, cols": clip_case("cols"),
    "clip, weighted directions": clip_case((0.75, 0.5)),
    "clip, weights": clip_case(row_weights=SOME, col_weights=SOME.flip(0)),
    "clip, weights of rows": clip_case("rows", row_weights=SOME),
    "clip, smoothing": clip_case(label_smoothing=0.1),
    "clip, smoothing 1": clip_case(label_smoothing=1.0),
    "clip, smoothing by pair": clip_case(label_smoothing=SMOOTH, row_weights=SOME),
    "clip, smoothing, cols": clip_case("cols", label_smoothing=0.1, **IDS),
    "clip, left out": clip_case(**IDS),
    "clip, smoothing, left out": clip_case(label_smoothing=0.2, **IDS),
    "clip, smoothing, all left out": clip_case(label_smoothing=0.2, leave_out=(torch.zeros(23).long(), torch.zeros(23).long())),
    "clip, smoothing, bias": clip_case(label_smoothing=0.2, bias=torch.linspace(-1, 2, 23).double(), **IDS),
    "clip, 0-d bias": clip_case(label_smoothing=0.2, bias=torch.tensor(-3.0).double(), **QUEUES),
    "clip, queues": clip_case(**QUEUES),
    "clip, queues, near-zero loss": clip_case(inputs=lambda: pairs(23, 7, scale=60.0, noise=0.02), **QUEUES),
    "clip, one pair and queues": clip_case(inputs=lambda: pairs(1, 7), **QUEUES),
    "clip, queue of rows": clip_case((1, 1), row_negatives=QUEUES["row_negatives"], label_smoothing=0.1),
    "clip, queue of cols": clip_case("cols", col_negatives=QUEUES["col_negatives"]),
    "clip, queues, all options": clip_case(
        label_smoothing=0.3, bias=torch.linspace(-1, 2, 31).double(), row_weights=SOME, col_weights=SOME.flip(0), **QUEUES, **ALL_IDS
    ),
    "clip, queues wholly left out": clip_case(
        **QUEUES, leave_out=(torch.zeros(28).long(), torch.cat([torch.ones(22), torch.zeros(9)]).long())
    ),
    "clip, empty queues": clip_case(row_negatives=torch.zeros(0, 7).double(), col_negatives=torch.zeros(0, 7).double()),
    "clip, views": views(2, 3, None),
    "clip, weighted views": views(3, 3, [[1 / 6, 0, 1 / 6], [0, 0.5, 1], [1 / 6, 1 / 6, 0]]),
    "clip, views of one side": views(1, 2, None),
    "nt-xent": (lambda: two_views(23), nt_xent_loss, dense_nt_xent),
    "nt-xent, 1 pair": (lambda: two_views(1), nt_xent_loss, dense_nt_xent),
    "nt-xent, 2 pairs": (lambda: two_views(2), nt_xent_loss, dense_nt_xent),
    "debiased": debiased_case(0.1, False),
    "debiased, both sides": debiased_case(0.1, True),
    "debiased, prior 0": debiased_case(0.0, False),
    "debiased, all at the least value": debiased_case(0.5, True, noise=0.1, scale=2.0),
    "debiased, some at the least value": debiased_case(0.1, False, noise=1.0, scale=8.0),
    "matryoshka": matryoshka_case(True, None),
    "matryoshka, weights, as they are": matryoshka_case(False, (1.0, 0.5, 2.0)),
    "supervised": supervised_case(23, 31, labels=tuple(LABELS.values())),
    "supervised, one label": supervised_case(5, 7, labels=(torch.zeros(5).long(), torch.zeros(7).long())),
    "supervised, no positive": supervised_case(5, 7, labels=(torch.zeros(5).long(), torch.ones(7).long())),
    "supervised, some without positive": supervised_case(5, 7, labels=(torch.arange(5), torch.arange(7) + 3)),
    "supervised, all distinct": supervised_case(23, 23, labels=(torch.arange(23), torch.arange(23).flip(0))),
    "supervised, solved": supervised_case(40, 50, labels=(integers(40, 9, 1), integers(50, 9, 2)), noise=0.3, scale=50.0),
    "supervised, many": supervised_case(70, 70, labels=(MANY, MANY)),
    "supervised, many, no match for some": supervised_case(70, 70, labels=(MANY, MANY.clone().clamp(max=0) + (MANY == 1) * 5)),
    "supcon": supcon_case(integers(23, 6, 3)),
    "supcon, some alone": supcon_case(torch.arange(23) // 2 * (torch.arange(23) > 8)),
    "supcon, many": supcon_case(MANY),
    "group": group_case(9, 4),
    "group, hard": group_case(9, 4, positives="hard"),
    "group, adaptive, some weights 0": group_case(9, 3, positives="adaptive", noise=0.8),
    "group, adaptive": group_case(9, 3, positives="adaptive", noise=0.2, scale=25.0),
    "group, of one": group_case(9, 1),
    "group, one group": group_case(1, 4),
    "group, related": group_case(9, 4, related=RELATED, scale=25.0),
    "group, all related": group_case(9, 2, related=torch.ones(9, 9, dtype=torch.bool)),
    "local": local_case(7, 5),
    "local, masked": local_case(7, 5, MASK),
    "local, one local": local_case(7, 1),
    "local, all others masked": local_case(3, 2, torch.tensor([[True, True], [False, False], [False, False]])),
}  # fmt: skip


def value_and_gradients(function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    """features of two or three dimensions in `dtype`, all else in the accumulating one"""
    wide = torch.float64 if dtype in (None, torch.float64) else torch.float32
    leaves = {k: t.detach().to((dtype or wide) if t.ndim > 1 else wide).requires_grad_() for k, t in inputs.items()}
    value = function(**leaves)
    assert value.ndim == 0 and value.dtype == wide
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


def close(found: Tensor, expected: Tensor, bound: float, floor: float) -> bool:
    """`floor`: differences below this share of what is summed up do not count (gradients of 0 by cancellation)."""
    return relative_error(found, expected) < bound or bool((found.double() - expected).norm() < floor)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_against_the_formula(case: str, backend: str) -> None:
    inputs, loss, dense = CASES[case]
    expected = value_and_gradients(lambda **a: torch.as_tensor(dense(**a)) + 0 * sum(t.sum() for t in a.values()), inputs())
    with backends.use(backend):
        for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-6)):
            value, *gradients = value_and_gradients(loss, inputs(), dtype)
            assert close(value, expected[0], bound, bound / 100 if "near-zero" not in case else 0), dtype
            for name, found, exact in zip(inputs(), gradients, expected[1:], strict=True):
                size = 1 if exact.ndim == 0 else float(exact.norm())
                assert close(found, exact, 10 * bound, 10 * bound * max(size, 1e-3)), (dtype, name)
