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
    _parts,
    clip_loss,
    debiased_contrastive_loss,
    group_contrastive_loss,
    lit_loss,
    local_global_loss,
    matryoshka_loss,
    nt_xent_loss,
    pair_logsumexp,
    supcon_loss,
    supervised,
    supervised_contrastive_loss,
)

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
    losses = logits.logsumexp(1) - (targets * torch.where(logits > -INF, logits, 0)).sum(1)
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


RELATED = torch.rand(9, 9, generator=torch.Generator().manual_seed(9)) < 0.3
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
        label_smoothing=0.3,
        bias=torch.linspace(-1, 2, 31).double(),
        row_weights=SOME,
        col_weights=SOME.flip(0),
        **QUEUES,
        **ALL_IDS,
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
    make, loss, dense = CASES[case]
    inputs = {name: t.float().double() for name, t in make().items()}
    expected = value_and_gradients(lambda **a: torch.as_tensor(dense(**a)) + 0 * sum(t.sum() for t in a.values()), inputs)
    with backends.use(backend):
        for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-5 if "near-zero" in case else 1e-6)):
            value, *gradients = value_and_gradients(loss, inputs, dtype)
            assert close(value, expected[0], bound, 0 if "near-zero" in case else bound / 100), dtype
            for name, found, exact in zip(inputs, gradients, expected[1:], strict=True):
                assert close(found, exact, 10 * bound, bound * max(1.0 if exact.ndim == 0 else 0.3, float(exact.norm()))), (
                    dtype,
                    name,
                )


def test_identities_of_the_papers() -> None:
    """Closed forms, which no formula written here can share a mistake with."""
    same = torch.ones(32 * 4, 3).double() / 3**0.5
    assert float(group_contrastive_loss(same, same, 25.0, 4)) == pytest.approx(math.log(1 + 16 * 31))
    assert float(clip_loss(same, same, 25.0)) == pytest.approx(math.log(128))
    labels = torch.arange(128) // 4
    assert float(supervised_contrastive_loss(same, same, 25.0, labels, labels)) == pytest.approx(math.log(128))
    assert float(supcon_loss(same, 25.0, labels)) == pytest.approx(math.log(127))
    assert float(nt_xent_loss(same, same, 25.0)) == pytest.approx(math.log(255))
    assert float(debiased_contrastive_loss(same, same, 25.0, 0.1)) == pytest.approx(math.log(128))
    assert float(local_global_loss(same, same[:, None].expand(-1, 5, -1), 25.0)) == pytest.approx(math.log(1 + 127 * 5))
    x, y = unit(12, 5, seed=0), unit(12, 5, seed=1)
    plain = clip_loss(x, y, 10.0)
    distinct = torch.randperm(12) * 7 - 40
    torch.testing.assert_close(supervised_contrastive_loss(x, y, 10.0, distinct, distinct), plain)
    torch.testing.assert_close(group_contrastive_loss(x, y, 10.0, 1), plain)
    torch.testing.assert_close(local_global_loss(x, y[:, None], 10.0), clip_loss(x, y, 10.0, directions="rows"))
    torch.testing.assert_close(supcon_loss(torch.cat([x, y]), 10.0, torch.arange(24) % 12), nt_xent_loss(x, y, 10.0))
    torch.testing.assert_close(debiased_contrastive_loss(x, y, 10.0, 0, both_sides=True), nt_xent_loss(x, y, 10.0))
    torch.testing.assert_close(group_contrastive_loss(x, y, 10.0, 3), group_contrastive_loss(y, x, 10.0, 3))
    # PyramidCLIP's targets: 1 - a on the pair, a / (N - 1) on the others; as printed in the paper, also on the pair
    logits, a, n = 10.0 * x @ y.T, 0.2, 12
    for own, e, factor in ((1 - a, a * n / (n - 1), 1.0), (1 - a + a / (n - 1), a * n / (n - 1 + a), 1 + a / (n - 1))):
        targets = torch.full((n, n), a / (n - 1)).double().fill_diagonal_(own)
        expected = -(targets * logits.log_softmax(1) + targets * logits.log_softmax(0)).sum() / (2 * n)
        torch.testing.assert_close(factor * clip_loss(x, y, 10.0, label_smoothing=e), expected)


def test_directions_are_parts_of_both() -> None:
    inputs, labels = pairs(12, 5), integers(12, 4, 1)
    related = RELATED[:4, :4]
    for loss in (
        clip_loss,
        lambda **a: supervised_contrastive_loss(**a, row_labels=labels, col_labels=labels.flip(0)),
        lambda **a: group_contrastive_loss(**a, group_size=3, positives="adaptive"),
        lambda **a: debiased_contrastive_loss(**a, class_prior=0.1),
    ):
        both, rows, cols, three = (loss(**inputs, directions=d) for d in ("both", "rows", "cols", (2, 1)))
        torch.testing.assert_close(both, (rows + cols) / 2)
        torch.testing.assert_close(three, 2 * rows + cols)
        assert rows != cols
    one_way = group_contrastive_loss(**inputs, group_size=3, related=related, directions="rows")
    torch.testing.assert_close(one_way, dense_group(*inputs.values(), 3, related=related, a=1, b=0))


def test_lit_trains_one_tower() -> None:
    x, y, scale = (t.requires_grad_() for t in pairs(12, 5).values())
    expected = torch.autograd.grad(clip_loss(x, y, scale, label_smoothing=0.1), (y, scale))
    loss = lit_loss(x, y, scale, label_smoothing=0.1)
    loss.backward()
    assert x.grad is None
    torch.testing.assert_close((y.grad, scale.grad), expected)
    with pytest.raises(TypeError, match="locked: expected a tensor, got list"):
        lit_loss([1.0], y, scale)


# --- precision --------------------------------------------------------------------------------------------------------


def test_a_loss_of_1e_31_keeps_its_digits() -> None:
    x = torch.eye(40)[:30]
    shared = dict.fromkeys(("row_labels", "col_labels"), torch.randperm(30, generator=torch.Generator().manual_seed(0)))
    exact = torch.tensor(-75.0, dtype=torch.float64).exp()
    for negatives, function in (
        (29, lambda x, scale: supervised_contrastive_loss(x, x, scale, **shared)),
        (29, lambda x, scale: group_contrastive_loss(x, x, scale, 1)),
        (29, lambda x, scale: local_global_loss(x, x[:, None], scale)),
        (29 + 10, lambda x, scale: clip_loss(x, x, scale, row_negatives=torch.eye(40)[30:], col_negatives=torch.eye(40)[30:])),
        (29 + 29, lambda x, scale: nt_xent_loss(x, x, scale)),
        (29 + 29, lambda x, scale: supcon_loss(torch.cat([x, x]), scale, torch.arange(60) % 30)),
    ):
        value, dx, dscale = value_and_gradients(function, {"x": x, "scale": torch.tensor(75.0)}, torch.float32)
        assert relative_error(value, negatives * exact) < 1e-5
        assert relative_error(dscale, -negatives * exact) < 1e-5
        if negatives == 29:  # x is on both sides, each gives 75 / 30 * exp(-75) * (the sum of the others - 29 * own)
            assert relative_error(dx, 2 * 75 / 30 * exact * (x.sum(0) - 30 * x)) < 1e-5


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.3, 1.0])
def test_several_positives_near_the_minimum_in_bfloat16(noise: float) -> None:
    """The solved regime: the gradient is what is left of softmax minus targets."""
    labels = torch.arange(60) // 3
    centres = F.one_hot(labels, 32).double()
    inputs = {"x": unit(60, 32, seed=0, like=centres, noise=noise), "y": unit(60, 32, seed=1, like=centres, noise=noise)}
    inputs = {name: t.bfloat16().double() for name, t in inputs.items()} | {"scale": torch.tensor(60.0).double()}
    expected = value_and_gradients(lambda **a: dense_supervised(**a, row_labels=labels, col_labels=labels), inputs)
    found = value_and_gradients(
        lambda **a: supervised_contrastive_loss(**a, row_labels=labels, col_labels=labels), inputs, torch.bfloat16
    )
    for ours, exact, bound in zip(found, expected, (1e-5, 1e-2, 1e-2, 1e-2), strict=True):
        assert relative_error(ours, exact) < bound


EAGER = [
    case for case in CASES if case.split(",")[0] in ("clip", "nt-xent", "supervised", "supcon", "group", "local", "debiased")
]


@pytest.mark.parametrize("case", [case for case in EAGER if "1 pair" not in case])
def test_bfloat16_is_no_worse_than_the_formula_in_bfloat16(case: str) -> None:
    make, loss, dense = CASES[case]
    inputs = {name: t.bfloat16().double() if t.ndim > 1 else t.float().double() for name, t in make().items()}

    def with_all(**a: Tensor) -> Tensor:
        return torch.as_tensor(dense(**a)) + 0 * sum(t.sum() for t in a.values())

    def eager(**a: Tensor) -> Tensor:
        """bfloat16 matrix products and their results, all else in float32"""
        return with_all(**{name: t.bfloat16() for name, t in a.items()}).float()

    exact = value_and_gradients(with_all, inputs)
    found = value_and_gradients(loss, inputs, torch.bfloat16)
    half = {name: t.bfloat16().double() for name, t in inputs.items()}
    theirs = value_and_gradients(eager, half, torch.float32)
    for i, (name, ours, e, t) in enumerate(zip(["loss", *inputs], found, exact, theirs, strict=True)):
        slack = 1e-5 if i == 0 or e.ndim < 2 else 1.2e-2  # of gradients: three roundings of bfloat16
        assert close(ours, e, max(slack, relative_error(t, e)), slack * 0.1), name


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor made, and the largest number that was made in several dimensions."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


N, D = 512, 8
PLACES = torch.arange(N)
WITHOUT_THE_MATRIX: dict[str, Callable[..., Tensor]] = {
    "clip": lambda x, y, **k: clip_loss(
        x,
        y,
        10.0,
        label_smoothing=0.1,
        row_negatives=x.flip(0),
        col_negatives=y.flip(0),
        leave_out=(torch.arange(2 * N) % 300, torch.arange(2 * N) % 200),
        row_weights=torch.ones(N),
        **k,
    ),
    "views": lambda x, y, **k: clip_loss(torch.stack([x, y]), torch.stack([y, x]), 10.0, **k),
    "nt-xent": lambda x, y, **k: nt_xent_loss(x, y, 10.0, **k),
    "debiased": lambda x, y, **k: debiased_contrastive_loss(x, y, 10.0, 0.1, both_sides=True, **k),
    "supervised": lambda x, y, **k: supervised_contrastive_loss(x, y, 10.0, PLACES // 3, PLACES // 2, **k),
    "supervised, many": lambda x, y, **k: supervised_contrastive_loss(x, y, 10.0, PLACES // 100, PLACES // 100, **k),
    "supcon": lambda x, y, **k: supcon_loss(torch.cat([x, y]), 10.0, torch.arange(2 * N) // 4, **k),
    "group": lambda x, y, **k: group_contrastive_loss(x, y, 10.0, 4, related=torch.eye(N // 4, dtype=torch.bool), **k),
    "local": lambda x, y, **k: local_global_loss(
        x, y[:, None].expand(-1, 6, -1), 10.0, (PLACES % 7 < 6)[:, None].expand(-1, 6), **k
    ),
}


@pytest.mark.parametrize("name", WITHOUT_THE_MATRIX)
def test_the_matrix_of_logits_is_never_held(name: str) -> None:
    x, y = (unit(N, D, seed=s).float().requires_grad_() for s in (0, 1))
    with Largest() as largest:
        WITHOUT_THE_MATRIX[name](x, y, stash_bytes=0).backward()
    assert 0 < largest.elements < N * N / 3
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


def test_positives_are_not_all_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 positives to each row: no [M, 30, D]."""
    x, y = (unit(600, 64, seed=s).float().requires_grad_() for s in (0, 1))
    labels = torch.arange(600) // 30
    with Largest() as largest:
        supervised_contrastive_loss(x, y, 10.0, labels, labels, stash_bytes=0).backward()
    assert largest.elements <= 601 * 64
    monkeypatch.setattr(supervised, "LISTED_POSITIVES", 29)  # the other way is as right
    in_the_product = supervised_contrastive_loss(x, y, 10.0, labels, labels)
    monkeypatch.undo()
    torch.testing.assert_close(in_the_product, supervised_contrastive_loss(x, y, 10.0, labels, labels))


# --- among torch's machinery -----------------------------------------------------------------------------------------


def small() -> tuple[Tensor, Tensor, Tensor]:
    inputs = pairs(12, 5)
    return tuple(t.float().requires_grad_() for t in inputs.values())  # type: ignore[return-value]


IDS_12 = torch.arange(12) % 5
FAMILY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "clip": lambda x, y, s: clip_loss(
        x, y, s, label_smoothing=0.1, row_negatives=y.flip(0) / 2, leave_out=(IDS_12, torch.cat([IDS_12, IDS_12]))
    ),
    "views": lambda x, y, s: clip_loss(torch.stack([x, y]), y, s, view_weights=[[0.3], [0.7]]),
    "lit": lambda x, y, s: lit_loss(x, y, s),
    "nt-xent": nt_xent_loss,
    "debiased": lambda x, y, s: debiased_contrastive_loss(x, y, s, 0.1),
    "matryoshka": lambda x, y, s: matryoshka_loss(lambda x, y: clip_loss(x, y, s), (x, y), (2, 5)),
    "supervised": lambda x, y, s: supervised_contrastive_loss(x, y, s, IDS_12, IDS_12.flip(0), max_positives=4),
    "supervised, in the product": lambda x, y, s: supervised_contrastive_loss(x, y, s, IDS_12, IDS_12, max_positives=65),
    "supcon": lambda x, y, s: supcon_loss(torch.cat([x, y]), s, torch.arange(24) % 5, max_positives=5),
    "group": lambda x, y, s: group_contrastive_loss(x, y, s, 3, positives="adaptive", related=RELATED[:4, :4]),
    "local": lambda x, y, s: local_global_loss(x, torch.stack([y, x], 1), s, torch.arange(24).reshape(12, 2) % 3 > 0),
}


@pytest.mark.parametrize("name", FAMILY)
def test_func_grad(name: str) -> None:
    leaves = small()
    expected = torch.autograd.grad(FAMILY[name](*leaves), leaves, allow_unused=True, materialize_grads=True)
    found = torch.func.grad(FAMILY[name], argnums=(0, 1, 2))(*(t.detach() for t in leaves))
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, False) for name in FAMILY), *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("clip", "supervised"))],
)
def test_compiles_without_a_break(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    leaves = small()
    expected = FAMILY[name](*leaves)
    found = torch.compile(FAMILY[name], fullgraph=True, backend="aot_eager", dynamic=dynamic)(*leaves)
    torch.testing.assert_close(found, expected)
    for ours, exact in zip(*(torch.autograd.grad(t, leaves, allow_unused=True) for t in (found, expected)), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("name", FAMILY)
def test_autocast_casts_features_alone(name: str) -> None:
    x, y, scale = small()
    expected = FAMILY[name](x.bfloat16(), y.bfloat16(), scale)
    with torch.autocast("cpu", torch.bfloat16):
        found = FAMILY[name](x, y, scale)
        doubles = FAMILY[name](x.double(), y.double(), scale.double())
    assert found.dtype == torch.float32 and doubles.dtype == torch.float64
    tolerance = 5e-3 if name == "matryoshka" else 1e-6  # prefixes have unit length before the cast
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    for ours, exact, leaf in zip(
        *(torch.autograd.grad(t, (x, y, scale), allow_unused=True) for t in (found, expected)), (x, y, scale), strict=True
    ):
        if exact is not None:
            assert ours.dtype == leaf.dtype and relative_error(ours, exact) < 2e-2
    assert torch.equal(doubles, FAMILY[name](x.double(), y.double(), scale.double()))


@pytest.mark.parametrize("name", FAMILY)
def test_backward_twice_and_second_derivatives_are_refused(name: str) -> None:
    leaves = small()
    loss = FAMILY[name](*leaves)
    first = torch.autograd.grad(loss, leaves[1:], retain_graph=True)
    second = torch.autograd.grad(loss, leaves[1:], create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(NotImplementedError, match="second derivatives are made by the reference backend alone"):
        second[0].sum().backward()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_gradients_have_the_dtype_of_their_inputs(name: str, dtype: torch.dtype) -> None:
    x, y, scale = small()
    x, y = (t.detach().to(dtype).requires_grad_() for t in (x, y))
    scale = scale.detach().to(dtype).requires_grad_()
    loss = FAMILY[name](x, y, scale)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert y.grad.dtype == scale.grad.dtype == dtype and y.grad.isfinite().all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FAMILY)
def test_one_thread_or_two(name: str) -> None:
    """Any memory layout too."""
    x, y, scale = (t.detach() for t in small())

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
        views = leaves[0].T.contiguous().T, leaves[1][:, None].expand(-1, 2, -1)[:, 1]
        loss = FAMILY[name](*views, leaves[2])
        return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]

    one = run()
    torch.set_num_threads(2)
    try:
        two = run()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_strided_ids_are_read_as_they_are() -> None:
    x, y, scale = small()
    wide = torch.stack([IDS_12, IDS_12 + 100], 1)
    for loss in (
        lambda ids: clip_loss(x, y, scale, label_smoothing=0.1, leave_out=(ids, ids)),
        lambda ids: supervised_contrastive_loss(x, y, scale, ids, ids),
    ):
        assert torch.equal(loss(wide[:, 0]), loss(IDS_12))


def test_meta_tensors_take_shape_only() -> None:
    x = torch.empty(12, 5, device="meta")
    ids = torch.empty(12, dtype=torch.int64, device="meta")
    assert clip_loss(x, x, 1.0, label_smoothing=0.1, leave_out=(ids, ids)).is_meta
    assert supervised_contrastive_loss(x, x, 1.0, ids, ids).is_meta
    assert group_contrastive_loss(x, x, 1.0, 3).is_meta


def test_gradients_of_listed_dots() -> None:
    x, y = (unit(n, 4, seed=n).requires_grad_() for n in (5, 7))
    index = integers(15, 7, 1).reshape(5, 3)
    expected = (x[:, None] * y[index]).sum(-1)
    torch.testing.assert_close(_parts.listed_dots(x, y, index), expected)
    assert torch.autograd.gradcheck(_parts.listed_dots, (x, y, index))
    assert torch.autograd.gradgradcheck(_parts.listed_dots, (x, y, index))


# --- empty and broken input, arguments --------------------------------------------------------------------------------


EMPTY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "clip": lambda x, y, s: clip_loss(x, y, s, label_smoothing=0.1, row_negatives=torch.ones(3, 5), row_weights=torch.ones(0)),
    "clip, ids": lambda x, y, s: clip_loss(x, y, s, label_smoothing=0.1, leave_out=(torch.arange(0), torch.arange(0))),
    "views": lambda x, y, s: clip_loss(x[None], y[None].expand(2, -1, -1), s),
    "nt-xent": nt_xent_loss,
    "debiased": lambda x, y, s: debiased_contrastive_loss(x, y, s, 0.1),
    "matryoshka": FAMILY["matryoshka"],
    "supervised": lambda x, y, s: supervised_contrastive_loss(x, y, s, torch.arange(0), torch.arange(0)),
    "supervised, bound": lambda x, y, s: supervised_contrastive_loss(x, y, s, torch.arange(0), torch.arange(0), max_positives=3),
    "supervised, no rows": lambda x, y, s: supervised_contrastive_loss(
        x, torch.cat([y, torch.ones(4, 5)]), s, torch.arange(0), torch.arange(4)
    ),
    "supervised, no columns": lambda x, y, s: supervised_contrastive_loss(
        torch.cat([x, torch.ones(4, 5)]), y, s, torch.arange(4), torch.arange(0)
    ),
    "supcon": lambda x, y, s: supcon_loss(x + y, s, torch.arange(0)),
    "group": lambda x, y, s: group_contrastive_loss(x, y, s, 3, positives="adaptive", related=torch.ones(0, 0).bool()),
    "local": lambda x, y, s: local_global_loss(x, y[:, None].expand(-1, 4, -1), s, torch.ones(0, 4).bool()),
    "local, no locals": lambda x, y, s: local_global_loss(
        torch.ones(4, 5) + x.sum(), (y.sum() + torch.ones(4, 5))[:, None][:, :0], s
    ),
}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_costs_nothing(name: str, backend: str) -> None:
    leaves = [
        torch.zeros(0, 5, requires_grad=True),
        torch.zeros(0, 5, requires_grad=True),
        torch.tensor(10.0, requires_grad=True),
    ]
    with backends.use(backend):
        loss = EMPTY[name](*leaves)
        assert loss.ndim == 0 and loss == 0
        assert torch.autograd.grad(loss, leaves[2])[0] == 0


def test_local_global_of_some_of_the_samples() -> None:
    """As ranks do it: each its own rows against the locals of all; the mean over them is the loss of all."""
    x, y = unit(6, 7, seed=0), unit(6, 3, 7, seed=1)
    mask = torch.rand(6, 3, generator=torch.Generator().manual_seed(2)) < 0.8
    mask[:, 0] = True
    parts = [local_global_loss(x[i : i + 2], y, 14.3, mask, own=i) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), dense_local(x, y, torch.tensor(14.3).double(), mask))
    with pytest.raises(ValueError, match="own: expected an offset in"):
        local_global_loss(x[:2], y, 14.3, own=5)
    with pytest.raises(ValueError):
        local_global_loss(x[:2], y, 14.3)


def test_one_group_and_one_sample_cost_nothing() -> None:
    x, y, scale = (t.float().requires_grad_() for t in pairs(4, 5).values())
    for loss in (
        group_contrastive_loss(x, y, scale, 4),
        group_contrastive_loss(x, y, scale, 2, related=torch.ones(2, 2).bool()),
        clip_loss(x, y, scale, row_weights=torch.zeros(4), col_weights=torch.zeros(4)),
        local_global_loss(x[:1], y[None], scale),
        debiased_contrastive_loss(x[:1], y[:1], scale, 0.1),
        debiased_contrastive_loss(x[:1], y[:1], scale, 0.0, both_sides=True),
        local_global_loss(x, y[:, None], scale, torch.zeros(4, 1).bool()),
    ):
        gradients = torch.autograd.grad(loss, (x, y, scale))
        assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_what_is_no_number_makes_none(name: str, bad: float, argument: int) -> None:
    leaves = [t.detach().clone() for t in small()]
    leaves[argument].view(-1)[-1] = bad
    assert not FAMILY[name](*leaves).isfinite() or (name == "matryoshka" and bad == INF)


def test_too_many_positives_where_nobody_looks() -> None:
    """Compiled code cannot refuse: the loss is NaN."""
    torch._dynamo.reset()
    x, y, scale = small()

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return supervised_contrastive_loss(x, y, scale, labels, labels, max_positives=3)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, torch.arange(12) // 3), loss(x, torch.arange(12) // 3))
    assert compiled(x, torch.arange(12) // 4).isnan()
    with pytest.raises(ValueError, match="max_positives: expected at least 4, as many as have one label, got 3"):
        loss(x, torch.arange(12) // 4)


ONES, LONG = torch.ones(4, 3), torch.zeros(4).long()
WRONG: dict[str, tuple[type[Exception], Callable[[], Tensor]]] = {
    "y: expected as many rows as x, 4, got 6": (ValueError, lambda: clip_loss(ONES, torch.ones(6, 3), 1.0)),
    r"x: expected 2 dimensions \[rows, width\], got shape \(4,\)": (ValueError, lambda: clip_loss(ONES[:, 0], ONES, 1.0)),
    r"x: expected at least one view": (ValueError, lambda: clip_loss(torch.ones(0, 4, 3), ONES, 1.0)),
    "x: expected a tensor, got list": (TypeError, lambda: clip_loss([1.0], ONES, 1.0)),
    "row_weights: expected a vector of length 4": (ValueError, lambda: clip_loss(ONES, ONES, 1.0, row_weights=torch.ones(5))),
    "col_weights: expected .*, got torch.int64": (TypeError, lambda: clip_loss(ONES, ONES, 1.0, col_weights=LONG)),
    "row_weights: has no effect": (ValueError, lambda: clip_loss(ONES, ONES, 1.0, directions="cols", row_weights=torch.ones(4))),
    "col_negatives: has no effect": (ValueError, lambda: clip_loss(ONES, ONES, 1.0, directions="rows", col_negatives=ONES)),
    r"row_negatives: expected shape \[rows, 3\] beside x, got \(4, 2\)": (
        ValueError,
        lambda: clip_loss(ONES, ONES, 1.0, row_negatives=torch.ones(4, 2)),
    ),
    "row_negatives: expected a tensor, got int": (TypeError, lambda: clip_loss(ONES, ONES, 1.0, row_negatives=3)),
    "col_negatives: expected float32, .*, got torch.int64": (
        TypeError,
        lambda: clip_loss(ONES, ONES, 1.0, col_negatives=torch.ones(2, 3).long()),
    ),
    r"leave_out\[1\]: expected a vector of length 8": (
        ValueError,
        lambda: clip_loss(ONES, ONES, 1.0, row_negatives=ONES, leave_out=(LONG, LONG)),
    ),
    "bias: expected a vector of length 8": (
        ValueError,
        lambda: clip_loss(ONES, ONES, 1.0, row_negatives=ONES, bias=torch.ones(4)),
    ),
    r"label_smoothing: expected a number in \[0, 1\], got 1.5": (
        ValueError,
        lambda: clip_loss(ONES, ONES, 1.0, label_smoothing=1.5),
    ),
    "label_smoothing: expected a number or a tensor, got str": (
        TypeError,
        lambda: clip_loss(ONES, ONES, 1.0, label_smoothing="a"),
    ),
    "label_smoothing: expected a vector of length 4": (
        ValueError,
        lambda: clip_loss(ONES, ONES, 1.0, label_smoothing=torch.ones(3)),
    ),
    r"directions: expected 'both', .*, got \(0, 0\)": (ValueError, lambda: clip_loss(ONES, ONES, 1.0, directions=(0, 0))),
    "directions: expected 'both', .*, got 'columns'": (ValueError, lambda: clip_loss(ONES, ONES, 1.0, directions="columns")),
    r"directions: expected 'both', .*, got \(1, -1\)": (ValueError, lambda: clip_loss(ONES, ONES, 1.0, directions=(1, -1))),
    "view_weights: expected 1 sequences of 1 finite numbers": (TypeError, lambda: clip_loss(ONES, ONES, 1.0, view_weights=[1.0])),
    r"view_weights: expected 1 sequences of 1 numbers, got 1 of lengths \[2\]": (
        ValueError,
        lambda: clip_loss(ONES, ONES, 1.0, view_weights=[[1.0, 2.0]]),
    ),
    "view_weights: expected one that is not 0": (ValueError, lambda: clip_loss(ONES, ONES, 1.0, view_weights=[[0.0]])),
    r"class_prior: expected a number in \[0, 1\), got 1": (ValueError, lambda: debiased_contrastive_loss(ONES, ONES, 1.0, 1)),
    "class_prior: expected a number, got str": (TypeError, lambda: debiased_contrastive_loss(ONES, ONES, 1.0, "a")),
    r"widths: expected one int or more in \[1, 3\]": (ValueError, lambda: matryoshka_loss(torch.sub, [ONES], [4])),
    "weights: expected 1 numbers as widths has, got 2": (
        ValueError,
        lambda: matryoshka_loss(torch.sub, [ONES], [2], weights=[1, 1]),
    ),
    r"features: expected one width, got \[3, 2\]": (ValueError, lambda: matryoshka_loss(torch.sub, [ONES, ONES[:, :2]], [2])),
    "features: expected one tensor or more": (TypeError, lambda: matryoshka_loss(torch.sub, [], [2])),
    "row_labels: expected a vector of length 4": (
        ValueError,
        lambda: supervised_contrastive_loss(ONES, ONES, 1.0, LONG[:3], LONG),
    ),
    "col_labels: expected torch.int64, got torch.float32": (
        TypeError,
        lambda: supervised_contrastive_loss(ONES, ONES, 1.0, LONG, torch.ones(4)),
    ),
    "max_positives: expected >= 1, got 0": (ValueError, lambda: supcon_loss(ONES, 1.0, LONG, max_positives=0)),
    "max_positives: expected an int, got float": (TypeError, lambda: supcon_loss(ONES, 1.0, LONG, max_positives=2.0)),
    "labels: expected a vector of length 4": (ValueError, lambda: supcon_loss(ONES, 1.0, LONG[:2])),
    "group_size: expected a divisor of the 4 rows, got 3": (ValueError, lambda: group_contrastive_loss(ONES, ONES, 1.0, 3)),
    "group_size: expected >= 1, got 0": (ValueError, lambda: group_contrastive_loss(ONES, ONES, 1.0, 0)),
    "positives: expected 'hard', .*, got 'all'": (
        ValueError,
        lambda: group_contrastive_loss(ONES, ONES, 1.0, 2, positives="all"),
    ),
    "related: expected a bool tensor, got torch.float32": (
        TypeError,
        lambda: group_contrastive_loss(ONES, ONES, 1.0, 2, related=torch.ones(2, 2)),
    ),
    r"related: expected \[2, 2\] on cpu, got \[4, 4\]": (
        ValueError,
        lambda: group_contrastive_loss(ONES, ONES, 1.0, 2, related=torch.ones(4, 4).bool()),
    ),
    r"y: expected 3 dimensions \[rows, locals, width\]": (ValueError, lambda: local_global_loss(ONES, ONES, 1.0)),
    "y: expected as many rows as x, 4, got 2": (ValueError, lambda: local_global_loss(ONES, torch.ones(2, 5, 3), 1.0)),
    r"mask: expected \[4, 2\] on cpu, got \[4, 3\]": (
        ValueError,
        lambda: local_global_loss(ONES, torch.ones(4, 2, 3), 1.0, torch.ones(4, 3).bool()),
    ),
    "mask: expected a bool tensor, got torch.int64": (
        TypeError,
        lambda: local_global_loss(ONES, torch.ones(4, 2, 3), 1.0, torch.ones(4, 2).long()),
    ),
    "scale: expected a number > 0, got -1": (ValueError, lambda: group_contrastive_loss(ONES, ONES, -1, 2)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, call = WRONG[message]
    with pytest.raises(error, match=message):
        call()


def test_a_far_bias_leaves_columns_out() -> None:
    """What local_global_loss masks locals with."""
    x, y = unit(6, 5, seed=0), unit(9, 5, seed=1)
    kept = torch.arange(9) % 3 > 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        a, b = x.to(dtype), y.to(dtype)
        bias = torch.where(kept, 0.0, -1e9).to(torch.float64 if dtype == torch.float64 else torch.float32)
        found = pair_logsumexp(a, b, 10.0, own=None, bias=bias, directions="rows")
        torch.testing.assert_close(found, pair_logsumexp(a, b[kept], 10.0, own=None, directions="rows"))
