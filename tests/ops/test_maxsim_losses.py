"""The losses of late interaction against their formulas, written out here on all products of tokens in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlpfast.ops import backends
from vlpfast.ops.contrastive import clip_loss, sigmoid_loss
from vlpfast.ops.maxsim import filip_loss, maxsim, maxsim_sigmoid_loss, score_contrastive_loss, token_filter

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")

BACKENDS = ["cpp", "reference"]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.numel() * t.itemsize)
        return out


def tokens(n: int, length: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, length, width, generator=generator, dtype=torch.float64), dim=-1)


def mask(n: int, length: int, seed: int) -> Tensor:
    """Every set has a token at least, the last set one alone."""
    kept = torch.rand(n, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    kept[:, length // 2] = True
    kept[-1] = torch.arange(length) == length // 2
    return kept


def batch(n: int = 7, p: int = 5, t: int = 6, width: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    return tokens(n, p, width, 0), tokens(n, t, width, 1), torch.tensor(14.3).double()


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_same(found: list[Tensor], expected: list[Tensor], bound: float = 1e-12) -> None:
    for ours, dense in zip(found, expected, strict=True):
        assert relative_error(ours, dense, 1e-3) < bound


# --- the formulas -----------------------------------------------------------------------------------------------------


def dense_scores(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    s = torch.einsum("ipd,jtd->ijpt", x, y)
    x_mask = torch.ones(x.shape[:2], dtype=torch.bool) if x_mask is None else x_mask
    y_mask = torch.ones(y.shape[:2], dtype=torch.bool) if y_mask is None else y_mask
    by_x = s.masked_fill(~y_mask[None, :, None], -math.inf).max(3).values
    by_y = s.masked_fill(~x_mask[:, None, :, None], -math.inf).max(2).values
    a = (by_x * x_mask[:, None]).sum(2) / x_mask.sum(1)[:, None]
    b = (by_y * y_mask).sum(2) / y_mask.sum(1)
    return a, b


def dense_side(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    losses = -(targets * logits.log_softmax(1)).sum(1)
    weights = (targets.sum(1) > 0).to(losses.dtype) * (1 if weights is None else weights)
    return (weights * losses).sum() / weights.sum()


def dense_loss(a, b, scale, *, positive=None, both=(0.5, 0.5), label_smoothing=0.0, row_weights=None, col_weights=None):
    positive = torch.eye(*a.shape, dtype=torch.bool) if positive is None else positive
    total = 0.0
    for weight, s, p, w in ((both[0], a, positive, row_weights), (both[1], b.T, positive.T, col_weights)):
        if weight:
            e = torch.as_tensor(label_smoothing, dtype=torch.float64).expand(len(s))[:, None]
            some = p.any(1, keepdim=True)
            targets = ((1 - e) * p / p.sum(1, keepdim=True).clamp(min=1) + e / s.shape[1]) * some
            total = total + weight * dense_side(scale * s, targets, w)
    return total


MASKS = mask(7, 5, 2), mask(7, 6, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masks", [(None, None), (None, MASKS[1]), (MASKS[0], None), MASKS])
def test_filip_is_the_published_formula(masks: tuple[Any, Any], backend: str) -> None:
    def dense(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        a, b = dense_scores(x, y, *masks)
        labels = torch.arange(7)
        return (F.cross_entropy(scale * a, labels) + F.cross_entropy(scale * b.T, labels)) / 2

    with backends.use(backend):
        found = value_and_gradients(lambda x, y, scale: filip_loss(x, y, scale, *masks), *batch())
    assert_same(found, value_and_gradients(dense, *batch()))


SMOOTH = torch.linspace(0, 0.5, 7).double()
WEIGHTS = torch.linspace(0, 2, 7).double()
IDS = torch.tensor([3, 1, 3, 3, 5, 1, 8])
SAME = IDS[:, None] == IDS
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rows": ({"directions": "rows"}, {"both": (1, 0)}),
    "cols": ({"directions": "cols", "col_weights": WEIGHTS}, {"both": (0, 1), "col_weights": WEIGHTS}),
    "weighted directions": ({"directions": (0.75, 0.5)}, {"both": (0.75, 0.5)}),
    "weights": ({"row_weights": WEIGHTS, "col_weights": WEIGHTS.flip(0)},) * 2,
    "smoothing": ({"label_smoothing": 0.1},) * 2,
    "smoothing by pair": ({"label_smoothing": SMOOTH, "row_weights": WEIGHTS},) * 2,
    "labels": ({"labels": (IDS, IDS)}, {"positive": SAME}),
    "labels, smoothing, weights": (
        {"labels": (IDS, IDS), "label_smoothing": SMOOTH, "row_weights": WEIGHTS, "col_weights": WEIGHTS},
        {"positive": SAME, "label_smoothing": SMOOTH, "row_weights": WEIGHTS, "col_weights": WEIGHTS},
    ),
    "labels, some without positive": (
        {"labels": (IDS, IDS.flip(0) % 4)},
        {"positive": IDS[:, None] == IDS.flip(0) % 4},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_their_dense_formulas(name: str) -> None:
    ours, dense = OPTIONS[name]
    found = value_and_gradients(lambda x, y, scale: filip_loss(x, y, scale, *MASKS, **ours), *batch())
    expected = value_and_gradients(lambda x, y, scale: dense_loss(*dense_scores(x, y, *MASKS), scale, **dense), *batch())
    assert_same(found, expected)


@pytest.mark.parametrize("own", [0, 2, 4])
def test_own_columns_further_on(own: int) -> None:
    x, y, scale = tokens(3, 5, 9, 0), tokens(7, 6, 9, 1), torch.tensor(14.3).double()
    found = value_and_gradients(
        lambda *t: filip_loss(*t, None, MASKS[1], directions="rows", own=own, label_smoothing=0.1), x, y, scale
    )

    def dense(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(scale * dense_scores(x, y, None, MASKS[1])[0], torch.arange(3) + own, label_smoothing=0.1)

    assert_same(found, value_and_gradients(dense, x, y, scale))


def test_ranks_with_their_own_rows_are_one_process() -> None:
    x, y, scale = tokens(6, 5, 9, 0), tokens(6, 4, 9, 1), torch.tensor(14.3).double()

    def sharded(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        halves = []
        for rank in range(3):
            home = slice(2 * rank, 2 * rank + 2)
            for own, others in ((x, y), (y, x)):
                halves.append(filip_loss(own[home], others, scale, directions="rows", own=2 * rank))
        return sum(halves) / len(halves)

    assert_same(value_and_gradients(sharded, x, y, scale), value_and_gradients(filip_loss, x, y, scale))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_token_each_is_clip(dtype: torch.dtype) -> None:
    x, y, scale = batch(23, 1, 1)
    x, y, scale = x.to(dtype), y.to(dtype), scale.to(torch.float64 if dtype == torch.float64 else torch.float32)
    found = value_and_gradients(filip_loss, x, y, scale)
    expected = value_and_gradients(lambda x, y, scale: clip_loss(x[:, 0], y[:, 0], scale), x, y, scale)
    assert_same(found, expected, {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype])


def test_what_does_not_change_scores() -> None:
    x, y, scale = batch()
    expected = filip_loss(x, y, scale, *MASKS)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(4))
    same = {
        "tokens in another order": filip_loss(x[:, order], y, scale, MASKS[0][:, order], MASKS[1]),
        "padding": filip_loss(x, F.pad(y, (0, 0, 0, 3), value=math.nan), scale, MASKS[0], F.pad(MASKS[1], (0, 3))),
        "every token twice": filip_loss(x.repeat(1, 2, 1), y, scale, MASKS[0].repeat(1, 2), MASKS[1]),
        "length": filip_loss(3 * x, y / 7, scale, *MASKS, normalize=True),
        "packed": filip_loss(
            x, y[MASKS[1]], scale, MASKS[0], y_cu_seqlens=F.pad(MASKS[1].sum(1).cumsum(0), (1, 0))
        ),
    }  # fmt: skip
    for found in same.values():
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    floor = filip_loss(-x.abs(), y.abs(), scale, None, MASKS[1], masked="zero")
    assert (floor - filip_loss(-x.abs(), y.abs(), scale, None, MASKS[1])).abs() > 1e-3


@pytest.mark.parametrize("labels", [None, (torch.arange(8), torch.arange(8))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_near_its_minimum(dtype: torch.dtype, labels: Any) -> None:
    """Losses of 5e-30: what is left of the own pair's gradient is so small a part of what cancels."""
    x = torch.eye(8)[:, None].to(dtype)
    numbers = x, x.clone(), torch.tensor(70.0)
    found = value_and_gradients(lambda *t: filip_loss(*t, labels=labels), *numbers)
    expected = value_and_gradients(filip_loss, *(t.double() for t in numbers))
    assert 1e-30 < expected[0] < 1e-29
    for i, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(ours, exact) < (8e-3 if dtype == torch.bfloat16 and i in (1, 2) else 1e-5)


def test_gradients_by_finite_differences() -> None:
    leaves = [t.requires_grad_() for t in batch(4, 3, 5, 2)]
    masks = mask(4, 3, 2), mask(4, 5, 3)
    for more in ({}, {"labels": (IDS[:4], IDS[:4]), "label_smoothing": 0.1}):
        assert torch.autograd.gradcheck(lambda *t, more=more: filip_loss(*t, *masks, **more), leaves)


# --- losses of published systems --------------------------------------------------------------------------------------


def queries_and_texts(n: int = 7, count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return tokens(n, count, 9, 0), tokens(n, 1, 9, 1)[:, 0], torch.tensor(1 / 0.07).double()


def best_query(queries: Tensor, text: Tensor) -> Tensor:
    return maxsim(queries, text[:, None], directions="y_to_x")


def test_geox_targets_by_image() -> None:
    def dense(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        s = torch.stack([torch.stack([(q @ t).max() for t in text]) for q in queries]) * scale
        targets = 0.9 * SAME.double() / SAME.sum(1, keepdim=True) + 0.1 / 7
        by_image = -(targets * s.log_softmax(1)).sum(1).mean()
        by_text = -(targets * s.T.log_softmax(1)).sum(1).mean()
        return (by_image + by_text) / 2

    def ours(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        s = best_query(queries, text)
        return score_contrastive_loss(s, s, scale, labels=(IDS, IDS), label_smoothing=0.1)

    assert_same(value_and_gradients(ours, *queries_and_texts()), value_and_gradients(dense, *queries_and_texts()))


@pytest.mark.parametrize("weighting", [False, True])
def test_nevlp_omega_by_pair(weighting: bool) -> None:
    """omega goes to the other candidates of the pair's row and column, or is taken off the pair's weight."""
    omega = torch.linspace(0, 0.5, 7).double()

    def dense(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        s = torch.einsum("iqd,jd->ijq", queries, text).max(2).values * scale
        total = 0.0
        for logits in (s, s.T):
            for i in range(7):
                p = logits[i].log_softmax(0)
                others = p.sum() - p[i]
                total = total - (1 - omega[i]) * p[i] - (0 if weighting else omega[i] / 6 * others)
        return total / 14

    def ours(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        s = best_query(queries, text)
        if weighting:
            w = 1 - omega
            return w.mean() * score_contrastive_loss(s, s, scale, row_weights=w, col_weights=w)
        return score_contrastive_loss(s, s, scale, label_smoothing=omega * 7 / 6)

    assert_same(value_and_gradients(ours, *queries_and_texts()), value_and_gradients(dense, *queries_and_texts()))


def test_mplug_video_contrast() -> None:
    """Rows of one rank of two against all columns, smoothed; with one query the score is the product."""
    queries, text, scale = queries_and_texts(6, 128)

    def dense(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(3) + 3
        to_text = torch.einsum("iqd,jd->ijq", queries[3:], text).max(2).values
        to_video = torch.einsum("jqd,id->ijq", queries, text[3:]).max(2).values
        return sum(F.cross_entropy(scale * s, labels, label_smoothing=0.1) for s in (to_text, to_video)) / 2

    def ours(queries: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        both = best_query(queries[3:], text), best_query(queries, text[3:]).T
        return sum(score_contrastive_loss(s, s, scale, directions="rows", own=3, label_smoothing=0.1) for s in both) / 2

    assert_same(value_and_gradients(ours, queries, text, scale), value_and_gradients(dense, queries, text, scale))
    torch.testing.assert_close(best_query(queries[:, :1], text), queries[:, 0] @ text.T)
    halves = torch.tensor([4, 4, 7])  # one video twice: its columns share the probability
    s = queries[:3, 0] @ text[:3].T
    expected = -(torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]) * (scale * s).log_softmax(1)).sum(1).mean()
    found = score_contrastive_loss(s, s, scale, directions="rows", labels=(halves, halves))
    torch.testing.assert_close(found, expected)


def test_gloria_gives_one_matrix_twice() -> None:
    s = tokens(1, 7, 7, 5)[0]
    labels = torch.arange(7)
    expected = (F.cross_entropy(10 * s, labels) + F.cross_entropy(10 * s.T, labels)) / 2
    torch.testing.assert_close(score_contrastive_loss(s, s, 10.0), expected)
    half = score_contrastive_loss(s.bfloat16(), s.bfloat16(), 10.0)
    assert half.dtype == torch.float32 and relative_error(half, score_contrastive_loss(*[s.bfloat16().float()] * 2, 10.0)) == 0


# --- the sigmoid loss of patches and concepts -------------------------------------------------------------------------


def concepts(count: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tokens(4, 5, 9, 0), tokens(1, count, 9, 1)[0], torch.tensor(14.3).double(), torch.tensor(-3.0).double()


OWNER = torch.tensor([0, 0, 1, 3, 3, 3, -1, 0, 1, 3, 3])  # image 2 has no concept
KEPT_CONCEPTS = torch.arange(11) % 4 > 0


def dense_sigmoid(x, y, scale, bias, owner=OWNER, x_mask=None, y_mask=None):
    s = torch.einsum("ipd,kd->ikp", x, y)
    if x_mask is not None:
        s = s.masked_fill(~x_mask[:, None], -math.inf)
    s = scale * s.max(2).values + bias
    sign = 2 * (torch.arange(len(x))[:, None] == owner).double() - 1
    losses = -F.logsigmoid(sign * s).sum(0)
    return losses.mean() if y_mask is None else losses[y_mask].mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masks", [(None, None), (mask(4, 5, 2), None), (mask(4, 5, 2), KEPT_CONCEPTS)])
def test_sigmoid_loss_is_the_published_formula(masks: tuple[Any, Any], backend: str) -> None:
    with backends.use(backend):
        found = value_and_gradients(lambda *t: maxsim_sigmoid_loss(*t, OWNER, *masks), *concepts())
    assert_same(found, value_and_gradients(lambda *t: dense_sigmoid(*t, OWNER, *masks), *concepts()))


def test_one_patch_and_one_concept_are_siglip() -> None:
    x, y, scale, bias = concepts(4)
    found = value_and_gradients(lambda *t: maxsim_sigmoid_loss(*t, torch.arange(4)), x[:, :1], y, scale, bias)
    assert_same(found, value_and_gradients(lambda x, *t: sigmoid_loss(x[:, 0], *t), x[:, :1], y, scale, bias))
    orthogonal = maxsim_sigmoid_loss(torch.eye(8)[:4, None], torch.eye(8)[4:], 14.3, torch.tensor(-10.0), torch.arange(4))
    assert orthogonal == pytest.approx(math.log1p(math.exp(10)) + 3 * math.log1p(math.exp(-10)), rel=1e-6)


def test_blocks_of_other_ranks_are_negatives() -> None:
    x, y, scale, bias = concepts()
    blocks = [
        maxsim_sigmoid_loss(x, y[:4], scale, bias, OWNER[:4]) * 4,
        maxsim_sigmoid_loss(x, y[4:6], scale, bias, OWNER[4:6]) * 2,
        maxsim_sigmoid_loss(x, y[6:], scale, bias, None) * 5,
    ]
    torch.testing.assert_close(sum(blocks) / 11, dense_sigmoid(x, y, scale, bias, torch.where(torch.arange(11) < 6, OWNER, -1)))


def test_patches_that_do_not_win_get_nothing() -> None:
    x, y, scale, bias = concepts()
    gradient = value_and_gradients(lambda *t: maxsim_sigmoid_loss(*t, OWNER), x, y, scale, bias)[1]
    winners = torch.zeros(4, 5).bool().scatter(1, torch.einsum("ipd,kd->ikp", x, y).argmax(2), True)
    assert torch.equal((gradient != 0).any(2), winners) and not winners.all()


def test_no_concept_costs_nothing() -> None:
    x, y, scale, bias = concepts()
    masked = y.clone().fill_(math.nan)
    for many in ((y[:0], OWNER[:0], None), (masked, OWNER, torch.zeros(11).bool())):
        found = value_and_gradients(
            lambda x, y, s, b, many=many: maxsim_sigmoid_loss(x, y, s, b, many[1], None, many[2]), x, many[0], scale, bias
        )
        assert all(torch.equal(t, torch.zeros_like(t)) for t in found)
    kept = value_and_gradients(
        lambda *t: maxsim_sigmoid_loss(*t, OWNER, None, KEPT_CONCEPTS), x, y.where(KEPT_CONCEPTS[:, None], math.nan), scale, bias
    )
    assert all(t.isfinite().all() for t in kept)


# --- the selection of tokens ------------------------------------------------------------------------------------------


def chosen(best: Tensor, kept: Tensor, count: int) -> Tensor:
    """By a plain sort of (masked, -score, place)."""
    rows = [
        sorted(sorted(range(len(b)), key=lambda i: (not bool(k[i]), -float(b[i]), i))[:count])
        for b, k in zip(best, kept, strict=True)
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("chunk_bytes", [1, 700, 1 << 26])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_token_filter_keeps_those_that_come_nearest(dtype: torch.dtype, chunk_bytes: int) -> None:
    x, y = tokens(4, 12, 9, 0).to(dtype).requires_grad_(), tokens(5, 21, 9, 1).to(dtype).requires_grad_()
    x_mask, y_mask = mask(4, 12, 2), mask(5, 21, 3)
    kept_x, kept_y = token_filter(x, y, x_mask, y_mask, chunk_bytes=chunk_bytes)
    s = torch.einsum("mpd,ntd->mpnt", *(t.detach().to(torch.promote_types(dtype, torch.float32)) for t in (x, y)))
    s = s.masked_fill(~(x_mask[:, :, None, None] & y_mask), -math.inf)
    for kept, features, m, best, count in ((kept_x, x, x_mask, s.amax((2, 3)), 3), (kept_y, y, y_mask, s.amax((0, 1)), 5)):
        assert torch.equal(kept.indices, chosen(best, m, count))
        assert torch.equal(kept.mask, m.gather(1, kept.indices)) and torch.equal(kept.mask.sum(1), m.sum(1).clamp(max=count))
        rows = torch.arange(len(features))[:, None]
        assert torch.equal(kept.tokens, features[rows, kept.indices])
        (gradient,) = torch.autograd.grad(kept.tokens.sum(), features)
        expected = torch.zeros(features.shape[:2]).scatter(1, kept.indices, 1)
        assert torch.equal(gradient, expected[..., None].expand(gradient.shape).to(dtype))


def test_token_filter_keeps_the_winners_of_rows() -> None:
    """A set's best token over the batch stays, so the largest product of any pair of sets is not lost."""
    x, y = tokens(4, 12, 9, 0), tokens(5, 21, 9, 1)
    kept_x, kept_y = token_filter(x, y, keep=0.05)
    assert kept_x.tokens.shape == (4, 1, 9) and kept_y.tokens.shape == (5, 1, 9)
    s = torch.einsum("mpd,ntd->mnpt", x, y)
    torch.testing.assert_close(torch.einsum("md,ntd->mnt", kept_x.tokens[:, 0], y).amax((1, 2)), s.amax((1, 2, 3)))
    torch.testing.assert_close(torch.einsum("mpd,nd->mnp", x, kept_y.tokens[:, 0]).amax((0, 2)), s.amax((0, 2, 3)))


def test_token_filter_of_all_is_none() -> None:
    x, y, scale = batch()
    kept_x, kept_y = token_filter(x, y, *MASKS, keep=1)
    assert torch.equal(kept_x.tokens, x) and torch.equal(kept_y.mask, MASKS[1])
    found = filip_loss(kept_x.tokens, kept_y.tokens, scale, kept_x.mask, kept_y.mask)
    assert torch.equal(found, filip_loss(x, y, scale, *MASKS))


def test_token_filter_ties_shares_and_nothing() -> None:
    same = torch.ones(2, 8, 3)
    kept, _ = token_filter(same, same)
    assert kept.indices.tolist() == [[0, 1]] * 2
    for length, share, count in ((77, 0.25, 19), (49, 0.25, 12), (100, 0.29, 29), (3, 0.01, 1)):
        assert token_filter(torch.ones(1, length, 2), same[..., :2], keep=share)[0].indices.shape == (1, count)
    for m, p, n, t in ((0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (2, 5, 2, 0)):
        kept_x, kept_y = token_filter(torch.ones(m, p, 3), torch.ones(n, t, 3))
        assert kept_x.tokens.shape == (m, min(p, 1), 3) and kept_y.tokens.shape == (n, min(t, 2), 3)
    nothing = torch.tensor([[False] * 7 + [True]] * 2)
    kept, _ = token_filter(same, same, nothing, torch.zeros(2, 8).bool())
    assert kept.indices.tolist() == [[0, 7]] * 2 and kept.mask.tolist() == [[False, True]] * 2


# --- torch's machinery, memory ----------------------------------------------------------------------------------------


def test_products_of_tokens_are_not_held() -> None:
    x, y = (t.float().requires_grad_() for t in (tokens(20, 50, 8, 0), tokens(20, 40, 8, 1)))
    owner = torch.arange(20)
    everything = 20 * 20 * 50 * 40 * 4
    with Largest() as largest:
        filip_loss(x, y, 14.3).backward()
        maxsim_sigmoid_loss(x, y[:, 0], 14.3, None, owner).backward()
        token_filter(x, y, chunk_bytes=100_000)
    assert largest.bytes <= max(20 * 20 * 50, 100_000) and largest.bytes * 30 < everything


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    x, y, scale = (t.float() for t in batch())
    owner = torch.arange(7)

    def function(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        a, b = token_filter(x, y, *MASKS, keep=0.5)
        loss = filip_loss(a.tokens, b.tokens, scale, a.mask, b.mask, labels=(IDS, IDS), label_smoothing=0.1)
        return loss + maxsim_sigmoid_loss(x, y[:, 0], scale, scale, owner, MASKS[0], MASKS[1][:, 0])

    expected = value_and_gradients(function, x, y, scale)
    found = value_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), x, y, scale)
    assert_same(found, expected, 1e-6)


def test_compiles_for_several_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(filip_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 8, 9):
        inputs = [t.float() for t in batch(n, n + 1, n + 2)]
        assert_same(value_and_gradients(compiled, *inputs), value_and_gradients(filip_loss, *inputs), 1e-6)


def test_function_transforms() -> None:
    leaves = batch()
    expected = value_and_gradients(lambda *t: filip_loss(*t, *MASKS), *leaves)[1:]
    found = torch.func.grad(lambda *t: filip_loss(*t, *MASKS), argnums=(0, 1, 2))(*leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast() -> None:
    x, y, scale = (t.float() for t in batch())
    owner = torch.arange(7)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(filip_loss, x, y, scale)
        sigmoid = maxsim_sigmoid_loss(x, y[:, 0], scale, scale, owner)
        indices = token_filter(x, y, keep=0.5)[0].indices
    expected = value_and_gradients(lambda x, y, s: filip_loss(x.bfloat16(), y.bfloat16(), s), x, y, scale)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(sigmoid, maxsim_sigmoid_loss(x.bfloat16(), y[:, 0].bfloat16(), scale, scale, owner))
    assert torch.equal(indices, token_filter(x, y, keep=0.5)[0].indices)


def test_two_threads_give_the_bits_of_one(two_threads: None) -> None:
    x, y, scale = (t.float() for t in batch(40, 30, 20))
    on_two = value_and_gradients(filip_loss, x, y, scale)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(value_and_gradients(filip_loss, x, y, scale), on_two, strict=True))


def test_half_types() -> None:
    x, y, scale = batch()
    for dtype, bound in ((torch.bfloat16, 8e-3), (torch.float16, 2e-3)):
        a, b, s = x.to(dtype), y.to(dtype), scale.float()
        expected = value_and_gradients(filip_loss, a.double(), b.double(), scale)
        found = value_and_gradients(filip_loss, a, b, s)
        assert [t.dtype for t in found] == [torch.float32, dtype, dtype, torch.float32]
        assert relative_error(found[0], expected[0]) < 1e-6
        assert_same(found[1:], expected[1:], bound)


def test_nothing_costs_nothing() -> None:
    scale = torch.tensor(10.0, requires_grad=True)
    for p, t in ((3, 4), (0, 4), (3, 0)):
        x, y = torch.zeros(0, p, 5, requires_grad=True), torch.zeros(0, t, 5, requires_grad=True)
        for more in ({}, {"directions": "rows", "label_smoothing": 0.1}, {"labels": (torch.zeros(0).long(),) * 2}):
            loss = filip_loss(x, y, scale, **more)
            assert loss == 0 and torch.autograd.grad(loss, scale)[0] == 0
    x, y, _ = (t.requires_grad_() for t in batch(1))
    apart = batch(2)
    for loss, leaves in (
        (filip_loss(x, y, scale), (x, y)),
        (filip_loss(x, y, scale, row_weights=torch.zeros(1), directions="rows"), (x, y)),
        (filip_loss(x, apart[1], scale, labels=(torch.zeros(1).long(), torch.ones(2).long())), (x,)),
    ):
        assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_what_is_no_number_makes_none(argument: int, bad: float) -> None:
    leaves = [t.clone() for t in batch()]
    leaves[argument].view(-1)[-1] = bad
    assert not filip_loss(*leaves).isfinite()
    assert not filip_loss(*leaves, labels=(IDS, IDS)).isfinite()
    assert not maxsim_sigmoid_loss(leaves[0], leaves[1][:, -1], leaves[2], None, torch.arange(7)).isfinite()


ONES, SCORES, LONG = torch.ones(4, 2, 3), torch.ones(4, 4), torch.zeros(4).long()
WRONG: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    r"x: expected shape \[M, P, D\], got \(4, 3\)": (ValueError, lambda: filip_loss(ONES[:, 0], ONES, 1.0)),
    "y: expected width 3 as x has, got 2": (ValueError, lambda: filip_loss(ONES, ONES[..., :2], 1.0)),
    "directions: expected 'both', .*, got 'x_to_y'": (ValueError, lambda: filip_loss(ONES, ONES, 1.0, directions="x_to_y")),
    "masked: expected 'ignore' or 'zero', got 'none'": (ValueError, lambda: filip_loss(ONES, ONES, 1.0, masked="none")),
    "directions: expected 'rows' with 2 rows and 4 columns": (ValueError, lambda: filip_loss(ONES[:2], ONES, 1.0)),
    r"own: expected an offset in \[0, N - M\] with M = 4 rows and N = 4 columns, got 1": (
        ValueError,
        lambda: filip_loss(ONES, ONES, 1.0, own=1, directions="rows"),
    ),
    "own: expected an int, got float": (TypeError, lambda: filip_loss(ONES, ONES, 1.0, own=1.0)),
    "own: expected 0 with labels, .*, got 1": (ValueError, lambda: filip_loss(ONES, ONES, 1.0, own=1, labels=(LONG, LONG))),
    r"labels: expected a pair \(row_labels, col_labels\), got Tensor": (
        TypeError,
        lambda: filip_loss(ONES, ONES, 1.0, labels=LONG),
    ),
    r"labels\[1\]: expected a vector of length 4": (ValueError, lambda: filip_loss(ONES, ONES, 1.0, labels=(LONG, LONG[:3]))),
    "row_weights: has no effect": (ValueError, lambda: filip_loss(ONES, ONES, 1.0, directions="cols", row_weights=torch.ones(4))),
    "col_weights: expected a vector of length 4": (ValueError, lambda: filip_loss(ONES, ONES, 1.0, col_weights=torch.ones(5))),
    r"label_smoothing: expected a number in \[0, 1\], got -1": (
        ValueError,
        lambda: filip_loss(ONES, ONES, 1.0, label_smoothing=-1),
    ),
    "label_smoothing: expected a number with 2 rows and 4 columns": (
        ValueError,
        lambda: filip_loss(ONES[:2], ONES, 1.0, labels=(LONG[:2], LONG), label_smoothing=torch.ones(2)),
    ),
    "scale: expected a finite number >= 0, got nan": (ValueError, lambda: filip_loss(ONES, ONES, math.nan)),
    r"y_to_x: expected shape \(4, 4\) as x_to_y has, got \(4, 3\)": (
        ValueError,
        lambda: score_contrastive_loss(SCORES, SCORES[:, :3], 1.0),
    ),
    "y_to_x: expected a tensor, got NoneType": (TypeError, lambda: score_contrastive_loss(SCORES, None, 1.0)),
    "x_to_y: expected float32, .*, got torch.int64": (TypeError, lambda: score_contrastive_loss(SCORES.long(), SCORES, 1.0)),
    "x_to_y: expected 2 dimensions": (ValueError, lambda: score_contrastive_loss(ONES, ONES, 1.0)),
    r"y: expected 2 dimensions \[concepts, width\], got shape \(4, 2, 3\)": (
        ValueError,
        lambda: maxsim_sigmoid_loss(ONES, ONES, 1.0, None, LONG),
    ),
    "owner: expected a vector of length 4": (ValueError, lambda: maxsim_sigmoid_loss(ONES, SCORES[:, :3], 1.0, None, LONG[:2])),
    "owner: expected a tensor, got int": (TypeError, lambda: maxsim_sigmoid_loss(ONES, SCORES[:, :3], 1.0, None, 0)),
    "bias: expected a tensor, got float": (TypeError, lambda: maxsim_sigmoid_loss(ONES, SCORES[:, :3], 1.0, 1.0, LONG)),
    r"y_mask: expected shape \(4,\), got \(2,\)": (
        ValueError,
        lambda: maxsim_sigmoid_loss(ONES, SCORES[:, :3], 1.0, None, LONG, None, torch.ones(2).bool()),
    ),
    r"keep: expected a number in \(0, 1\], got 0": (ValueError, lambda: token_filter(ONES, ONES, keep=0)),
    "keep: expected a number, got str": (TypeError, lambda: token_filter(ONES, ONES, keep="all")),
    "x_mask: expected torch.bool, got torch.float32": (TypeError, lambda: token_filter(ONES, ONES, torch.ones(4, 2))),
    "chunk_bytes: expected >= 1, got 0": (ValueError, lambda: token_filter(ONES, ONES, chunk_bytes=0)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, call = WRONG[message]
    with pytest.raises(error, match=message):
        call()
