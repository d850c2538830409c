"""The other reducers of late interaction against their formulas, written out here pair by pair in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import relative_error
from test_maxsim_losses import Largest, assert_same, mask, tokens, value_and_gradients
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.maxsim import assignment_sim, attention_sim, maxsim, score_contrastive_loss, topk_mean_sim, xtr_sim
from vlpfast.ops.maxsim.assignment import assignment

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def pairwise(one: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """From the score of one pair, of its kept tokens alone, to [M, N]; 0 where there are none."""

    def dense(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
        x_sets = [a if x_mask is None else a[x_mask[i]] for i, a in enumerate(x)]
        y_sets = [b if y_mask is None else b[y_mask[j]] for j, b in enumerate(y)]
        return torch.stack(
            [torch.stack([one(a, b) if len(a) and len(b) else x.new_zeros(()) for b in y_sets]) for a in x_sets]
        )  # fmt: skip

    return dense


def dense_topk(k: int | float) -> Callable[..., Tensor]:
    def one(a: Tensor, b: Tensor) -> Tensor:
        count = min(k, len(b)) if isinstance(k, int) else math.ceil(k * len(b))
        return (a @ b.T).sort(1, descending=True).values[:, :count].mean()

    return pairwise(one)


def dense_attention(temp1=4.0, temp2: float | None = 5.0, double_softmax=False, top_k=None) -> Callable[..., Tensor]:
    def one(words: Tensor, regions: Tensor) -> Tensor:
        s = words @ regions.T
        logits = temp1 * (s.softmax(0) if double_softmax else s)
        if top_k is not None:
            count = min(top_k, len(regions)) if isinstance(top_k, int) else math.ceil(top_k * len(regions))
            logits = logits.masked_fill(s < s.sort(1, descending=True).values[:, count - 1 : count], -math.inf)
        cosine = F.cosine_similarity(words, logits.softmax(1) @ regions, dim=1)
        return cosine.mean() if temp2 is None else (temp2 * cosine).exp().sum().log()

    return pairwise(one)


def best_matching(s: Tensor) -> Tensor:
    """The largest sum over all one-to-one matchings of [P, T]."""
    s = s if s.shape[0] >= s.shape[1] else s.T
    return torch.stack(
        [s[list(rows), range(s.shape[1])].sum() for rows in itertools.permutations(range(len(s)), s.shape[1])]
    ).max()


def dense_assignment(a: Tensor, b: Tensor) -> Tensor:
    return best_matching(a @ b.T) / len(b)


def dense_sinkhorn(eps: float, iterations: int) -> Callable[..., Tensor]:
    def one(a: Tensor, b: Tensor) -> Tensor:
        s = a @ b.T
        k = (s.detach() / eps).exp()
        k = k.T if len(a) < len(b) else k  # columns have mass 1, rows at most 1
        u = torch.ones(len(k), 1).double()
        v = 1 / (k * u).sum(0)
        for _ in range(iterations):
            u = (1 / (k * v).sum(1, keepdim=True)).clamp(max=1)
            v = 1 / (k * u).sum(0)
        plan = u * k * v
        return ((plan.T if len(a) < len(b) else plan) * s).sum() / len(b)

    return pairwise(one)


Reducer = tuple[Callable[..., Tensor], Callable[..., Tensor]]
REDUCERS: dict[str, Reducer] = {
    "topk 1": (lambda x, y, *m, **o: topk_mean_sim(x, y, 1, *m, **o), dense_topk(1)),
    "topk 3": (lambda x, y, *m, **o: topk_mean_sim(x, y, 3, *m, **o), dense_topk(3)),
    "topk of all": (lambda x, y, *m, **o: topk_mean_sim(x, y, 100, *m, **o), dense_topk(100)),
    "topk half": (lambda x, y, *m, **o: topk_mean_sim(x, y, 0.5, *m, **o), dense_topk(0.5)),
    "attention": (attention_sim, dense_attention()),
    "attention, double softmax": (
        lambda x, y, *m, **o: attention_sim(x, y, *m, double_softmax=True, **o),
        dense_attention(double_softmax=True),
    ),
    "attention, mean of cosines": (
        lambda x, y, *m, **o: attention_sim(x, y, *m, temp1=0, temp2=None, **o),
        dense_attention(temp1=0, temp2=None),
    ),
    "attention, best 2": (lambda x, y, *m, **o: attention_sim(x, y, *m, top_k=2, **o), dense_attention(top_k=2)),
    "attention, best half, double softmax": (
        lambda x, y, *m, **o: attention_sim(x, y, *m, top_k=0.5, double_softmax=True, temp2=1.5, **o),
        dense_attention(top_k=0.5, double_softmax=True, temp2=1.5),
    ),
    "assignment, exact": (
        lambda x, y, *m, **o: assignment_sim(x, y, *m, method="exact", **o),
        pairwise(dense_assignment),
    ),
    "assignment, sinkhorn": (
        lambda x, y, *m, **o: assignment_sim(x, y, *m, eps=0.1, iterations=7, **o),
        dense_sinkhorn(0.1, 7),
    ),
    "assignment, 0 rounds": (
        lambda x, y, *m, **o: assignment_sim(x, y, *m, eps=0.1, iterations=0, **o),
        dense_sinkhorn(0.1, 0),
    ),
}
WEIGHTS = torch.linspace(0.5, 1.5, 20).double().reshape(4, 5)
MASKS = mask(4, 4, 2), mask(5, 6, 3)


def weighted(score: Callable[..., Tensor], *masks: Tensor | None, **options: Any) -> Callable[..., Tensor]:
    return lambda x, y: (s := score(x, y, *masks, **options)).mul(WEIGHTS.to(s)).sum()


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 1 << 26])
@pytest.mark.parametrize("masks", [(), MASKS])
@pytest.mark.parametrize("sides", [(4, 6), (6, 4)])
@pytest.mark.parametrize("name", REDUCERS)
def test_reducers_are_their_formulas(name: str, sides: tuple[int, int], masks: tuple[Tensor, ...], chunk_bytes: int) -> None:
    score, dense = REDUCERS[name]
    x, y = tokens(4, sides[0], 7, 0), tokens(5, sides[1], 7, 1)
    masks = masks and (mask(4, sides[0], 2), mask(5, sides[1], 3))
    torch.testing.assert_close(score(x, y, *masks, chunk_bytes=chunk_bytes), dense(x, y, *masks), rtol=1e-10, atol=1e-12)
    found = value_and_gradients(weighted(score, *masks, chunk_bytes=chunk_bytes), x, y)
    assert_same(found, value_and_gradients(weighted(dense, *masks), x, y), 1e-10)


@pytest.mark.parametrize("name", [n for n in REDUCERS if n not in ("assignment, sinkhorn", "assignment, 0 rounds")])
def test_gradients_by_finite_differences(name: str) -> None:
    x, y = tokens(2, 4, 2, 0).requires_grad_(), (2 * tokens(2, 5, 2, 1)).requires_grad_()
    masks = mask(2, 4, 2), torch.tensor([[True] * 4 + [False], [True, False, True, True, True]])
    assert torch.autograd.gradcheck(lambda x, y: REDUCERS[name][0](x, y, *masks, chunk_bytes=300), (x, y))


# --- of published systems ---------------------------------------------------------------------------------------------


def test_one_best_is_maxsim() -> None:
    x, y = tokens(4, 4, 7, 0), tokens(5, 6, 7, 1)
    for reduction in ("mean", "sum"):
        found = value_and_gradients(weighted(REDUCERS["topk 1"][0], *MASKS, reduction=reduction), x, y)
        expected = weighted(maxsim, *MASKS, directions="x_to_y", reduction=reduction)
        assert_same(found, value_and_gradients(expected, x, y))


def test_conceptclip_local_score() -> None:
    classes, patches = tokens(3, 1, 7, 0), tokens(5, 40, 7, 1)
    local = torch.einsum("cd,npd->cnp", classes[:, 0], patches).topk(13).values.mean(2)
    torch.testing.assert_close(topk_mean_sim(classes, patches, 13), local)


def test_hitea_moment_of_half_the_words() -> None:
    video, words, kept = tokens(4, 1, 7, 0)[:, 0], tokens(5, 6, 7, 1), MASKS[1]
    expected = torch.zeros(4, 5).double()
    for i, j in itertools.product(range(4), range(5)):
        those = words[j][kept[j]]
        a = those @ video[i]
        best = a.topk(math.ceil(0.5 * len(a))).indices
        expected[i, j] = video[i] @ F.normalize((a[best] / 0.07).softmax(0) @ those[best], dim=0)
    found = attention_sim(video[:, None], words, None, kept, temp1=1 / 0.07, temp2=None, top_k=0.5)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("double_softmax", [False, True])
def test_gloria_loss(double_softmax: bool) -> None:
    """Temperatures 4, 5, 10 on volumes [B, D, x, y, z] and padded words, as VELVET-Med has them."""
    volumes, words = 2 * torch.randn(4, 7, 2, 2, 3, generator=torch.Generator().manual_seed(0)).double(), 3 * tokens(4, 6, 7, 1)
    kept = mask(4, 6, 3)

    def dense(volumes: Tensor, words: Tensor) -> Tensor:
        v = F.normalize(volumes.flatten(2), dim=1)  # [B, D, X]
        z = []
        for i in range(4):
            t = F.normalize(words[i][kept[i]], dim=1)  # [n, D]
            a = t @ v  # [B, n, X]
            a = (4 * (a.softmax(1) if double_softmax else a)).softmax(2)
            c = torch.einsum("bnx,bdx->bnd", a, v)
            z.append(10 * (5 * F.cosine_similarity(t[None], c, dim=2)).exp().sum(1).log())
        z = torch.stack(z, 1)  # [volumes, texts]
        labels = torch.arange(4)
        return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2

    def ours(volumes: Tensor, words: Tensor) -> Tensor:
        s = attention_sim(words, volumes.flatten(2).mT, kept, None, double_softmax=double_softmax, normalize=True)
        return score_contrastive_loss(s, s, 10.0)

    assert_same(value_and_gradients(ours, volumes, words), value_and_gradients(dense, volumes, words), 1e-10)


def test_simcrop_regions_of_the_best_patches() -> None:
    sentences, patches, seen = tokens(4, 3, 7, 0), tokens(5, 9, 7, 1), mask(5, 9, 3)

    def one(s: Tensor, p: Tensor) -> Tensor:
        return torch.stack([F.cosine_similarity(a, p[(p @ a).topk(min(2, len(p))).indices].mean(0), dim=0) for a in s]).mean()

    found = attention_sim(sentences, patches, None, seen, temp1=0, temp2=None, top_k=2)
    torch.testing.assert_close(found, pairwise(one)(sentences, patches, None, seen))


@pytest.mark.parametrize("chunk_bytes", [1, 4000, 1 << 26])
@pytest.mark.parametrize("k", [1, 4, 15, 100])
@pytest.mark.parametrize("masks", [(), MASKS])
def test_xtr_scores_what_is_retrieved(masks: tuple[Tensor, ...], k: int, chunk_bytes: int) -> None:
    x, y = tokens(4, 4, 7, 0), tokens(5, 6, 7, 1)

    def dense(x: Tensor, y: Tensor) -> Tensor:
        x_mask, y_mask = masks or (torch.ones(4, 4).bool(), torch.ones(5, 6).bool())
        scores = []
        for a, a_kept in zip(x, x_mask, strict=True):
            s = torch.einsum("pd,ntd->pnt", a[a_kept], y).masked_fill(~y_mask, -math.inf)
            least = s.flatten(1).sort(1, descending=True).values[:, min(k, int(y_mask.sum())) - 1]
            best = s.masked_fill(s < least[:, None, None], -math.inf).amax(2)  # [P, N]
            there = best > -math.inf
            scores.append(torch.where(there, best, 0).sum(0) / there.sum(0).clamp(min=1))
        return torch.stack(scores)

    torch.testing.assert_close(xtr_sim(x, y, k, *masks, chunk_bytes=chunk_bytes), dense(x, y))
    found = value_and_gradients(weighted(lambda x, y: xtr_sim(x, y, k, *masks, chunk_bytes=chunk_bytes)), x, y)
    assert_same(found, value_and_gradients(weighted(dense), x, y))
    if k == 100:  # everything is
        torch.testing.assert_close(xtr_sim(x, y, k, *masks), maxsim(x, y, *masks, directions="x_to_y"))


def test_xtr_ties_and_nothing() -> None:
    x, y = torch.ones(1, 1, 2), torch.ones(3, 2, 2, requires_grad=True)
    scores = xtr_sim(x, y, 3)
    assert scores.tolist() == [[2, 2, 0]]
    (gradient,) = torch.autograd.grad(scores.sum(), y)
    assert gradient[..., 0].tolist() == [[1, 0], [1, 0], [0, 0]]
    nothing = xtr_sim(x, y, 3, None, torch.zeros(3, 2).bool())
    assert not nothing.any() and not torch.autograd.grad(nothing.sum(), y)[0].any()
    for m, p, n, t in ((0, 1, 3, 2), (1, 0, 3, 2), (1, 1, 0, 2), (1, 1, 3, 0)):
        assert torch.equal(xtr_sim(torch.ones(m, p, 2), torch.ones(n, t, 2), 1), torch.zeros(m, n))


# --- one-to-one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("p", "t"), [(1, 1), (5, 3), (3, 5), (4, 4), (1, 6), (6, 1), (0, 3), (3, 0)])
def test_exact_assignment_is_the_best_of_all(p: int, t: int, dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(p * 7 + t)
    s = torch.randn(3, 4, p, t, generator=generator).to(dtype)
    rows, columns = torch.rand(3, 1, p, generator=generator) < 0.8, torch.rand(1, 4, t, generator=generator) < 0.8
    with backends.use(backend):
        plan = assignment(s, rows, columns)
    assert plan.dtype == dtype and not (plan * ~(rows[..., None] & columns[:, :, None])).any()
    assert (plan.sum(2) <= 1).all() and (plan.sum(3) <= 1).all()
    assert torch.equal(plan.sum((2, 3)).long(), torch.minimum(rows.sum(2), columns.sum(2)))
    for i, j in itertools.product(range(3), range(4)):
        kept = s[i, j][rows[i, 0]][:, columns[0, j]]
        torch.testing.assert_close((plan * s)[i, j].sum(), best_matching(kept) if kept.numel() else s.new_zeros(()))


def test_the_two_solvers_agree() -> None:
    """On ties too, where one answer of several is given; 70 problems are several threads' shares."""
    generator = torch.Generator().manual_seed(0)
    for p, t in ((30, 49), (49, 30), (20, 20)):
        s = torch.randn(7, 10, p, t, generator=generator)
        s[:4] = s[:4].round()
        every = torch.ones(7, 1, p).bool(), torch.rand(1, 10, t, generator=generator) < 0.9
        with backends.use("reference"):
            expected = assignment(s, *every)
        assert torch.equal(assignment(s, *every), expected)
        planted = torch.randperm(max(p, t), generator=generator)[: min(p, t)]
        rows, columns = (planted, torch.arange(t)) if p >= t else (torch.arange(p), planted)
        noise = torch.rand(1, 1, p, t, generator=generator)
        noise[..., rows, columns] += 10
        assert (assignment(noise, torch.ones(1, 1, p).bool(), torch.ones(1, 1, t).bool())[..., rows, columns] == 1).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_extreme_similarities_end() -> None:
    every = torch.ones(1, 1, 6).bool(), torch.ones(1, 1, 6).bool()
    for s in (torch.full((1, 1, 6, 6), 1e38), torch.zeros(1, 1, 6, 6), 3e38 * torch.linspace(-1, 1, 36).reshape(1, 1, 6, 6)):
        assert assignment(s, *every).sum() == 6
    huge = torch.linspace(-1, 1, 36).double().reshape(1, 1, 6, 6) * 1.7e308
    for backend in ("cpp", "reference"):
        with backends.use(backend):
            assert assignment(huge, *every).sum() <= 6


def test_operator_is_registered_as_torch_wants_it() -> None:
    s, rows, columns = torch.randn(2, 3, 4, 5), torch.ones(2, 3, 4).bool(), torch.rand(2, 3, 5) < 0.7
    torch.library.opcheck(torch.ops.vlpfast.assignment.default, (s, rows, columns))
    torch.library.opcheck(torch.ops.vlpfast.assignment.default, (s.mT.double(), columns, rows))
    half = s.half()
    with pytest.raises(TypeError, match="assign"):
        torch.ops.vlpfast.assignment(half, rows, columns)


def plan_of(x_count: int, y: Tensor, **options: Any) -> Tensor:
    """The plan [N, P, T], read off the gradient: x is the identity, so that the products are y itself."""
    y = y.clone().requires_grad_()
    s = assignment_sim(torch.eye(x_count)[None].double(), y, reduction="sum", **options)
    return torch.autograd.grad(s.sum(), y)[0].mT


@pytest.mark.parametrize("t", [3, 5, 8])
def test_plans_have_their_masses(t: int) -> None:
    y = torch.rand(4, t, 5, generator=torch.Generator().manual_seed(t)).double()
    for options in ({"method": "exact"}, {"eps": 0.1, "iterations": 1000}):
        plan = plan_of(5, y, **options)
        assert (plan >= 0).all() and (plan.sum(1) < 1 + 1e-6).all() and (plan.sum(2) < 1 + 1e-6).all()
        torch.testing.assert_close(plan.sum(1 if t <= 5 else 2), torch.ones(4, min(t, 5)).double())


def test_sinkhorn_between_maxsim_and_the_exact_matching() -> None:
    x, y = tokens(4, 6, 7, 0), tokens(5, 4, 7, 1)
    exact = assignment_sim(x, y, method="exact")
    best = maxsim(x, y, directions="y_to_x")
    near = assignment_sim(x, y, eps=1e-3, iterations=3000)
    torch.testing.assert_close(near, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(assignment_sim(x, y, eps=1e-4, iterations=0), best, rtol=0, atol=1e-6)
    assert (exact <= best + 1e-12).all() and (exact < best - 1e-3).any()
    distinct = torch.eye(6)[None].double(), torch.eye(6)[None, [4, 1, 3]].double()
    assert assignment_sim(*distinct, method="exact") == maxsim(*distinct, directions="y_to_x") == 1


# --- what holds for all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCERS)
def test_padding_order_and_length_do_not_matter(name: str) -> None:
    score = REDUCERS[name][0]
    x, y = tokens(4, 4, 7, 0), tokens(5, 6, 7, 1)
    expected = score(x, y, *MASKS)
    padded = [F.pad(t, (0, 0, 0, 3), value=math.nan) for t in (x, y)]
    torch.testing.assert_close(score(*padded, *(F.pad(m, (0, 3)) for m in MASKS)), expected)
    found = value_and_gradients(weighted(score, *(F.pad(m, (0, 3)) for m in MASKS)), *padded)
    assert found[0].isfinite() and all(not g[:, -3:].any() for g in found[1:])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(score(x, y[:, order], MASKS[0], MASKS[1][:, order]), expected)
    torch.testing.assert_close(score(x / 3, 2 * y, *MASKS, normalize=True), expected)
    wide = torch.zeros(4, 4, 14).double()
    wide[..., ::2] = x
    torch.testing.assert_close(score(wide[..., ::2], y.mT.contiguous().mT, *MASKS), expected)
    torch.testing.assert_close(
        score(x[:1].expand(4, -1, -1), y, MASKS[0][:1].expand(4, -1), MASKS[1]), expected[:1].expand(4, -1)
    )


@pytest.mark.parametrize("name", REDUCERS)
def test_sets_without_tokens_score_nothing(name: str) -> None:
    score = REDUCERS[name][0]
    x, y = tokens(4, 4, 7, 0), tokens(5, 6, 7, 1)
    masks = MASKS[0].clone(), MASKS[1].clone()
    masks[0][1], masks[1][2] = False, False
    found = score(x, y, *masks)
    expected = score(x, y, *MASKS)
    expected[1], expected[:, 2] = 0, 0
    torch.testing.assert_close(found, expected)
    _, dx, dy = value_and_gradients(weighted(score, *masks), x, y)
    assert dx.isfinite().all() and dy.isfinite().all() and not dx[1].any() and not dy[2].any()
    for m, p, n, t, d in ((0, 4, 5, 6, 7), (4, 4, 0, 6, 7), (4, 0, 5, 6, 7), (4, 4, 5, 0, 7), (0, 0, 0, 0, 0)):
        a, b = torch.zeros(m, p, d, requires_grad=True), torch.zeros(n, t, d, requires_grad=True)
        empty = score(a, b)
        assert torch.equal(empty, torch.zeros(m, n))
        assert [g.shape for g in torch.autograd.grad(empty.sum(), (a, b))] == [a.shape, b.shape]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", REDUCERS)
def test_what_is_no_number_reaches_its_pairs_alone(name: str, bad: float) -> None:
    score = REDUCERS[name][0]
    x, y = tokens(4, 4, 7, 0), tokens(5, 6, 7, 1)
    expected = score(x, y)
    y[3, 2, 1] = bad
    found = score(x, y)
    others = [0, 1, 2, 4]
    torch.testing.assert_close(found[:, others], expected[:, others])
    assert not found[:, 3].isfinite().any()


@pytest.mark.parametrize("name", REDUCERS)
def test_half_types_and_autocast(name: str) -> None:
    score = REDUCERS[name][0]
    x, y = tokens(4, 4, 7, 0).bfloat16(), tokens(5, 6, 7, 1).bfloat16()
    found = value_and_gradients(weighted(score, *MASKS), x, y)
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    expected = value_and_gradients(weighted(score, *MASKS), x.double(), y.double())
    for ours, exact, bound in zip(found, expected, (1e-5, 8e-3, 8e-3), strict=True):
        assert relative_error(ours, exact) < bound
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_gradients(weighted(score, *MASKS), x.float(), y.float())
    assert torch.equal(cast[0], found[0]) and cast[1].dtype == torch.float32
    assert torch.equal(cast[1].bfloat16(), found[1])


@pytest.mark.parametrize("name", ["topk 3", "attention, best half, double softmax", "assignment, exact", "assignment, sinkhorn"])
def test_products_of_all_tokens_are_not_held(name: str) -> None:
    x, y = (t.float().requires_grad_() for t in (tokens(12, 20, 8, 0), tokens(12, 30, 8, 1)))
    everything, chunk_bytes = 12 * 12 * 20 * 30 * 4, 20_000
    with Largest() as largest:
        REDUCERS[name][0](x, y, chunk_bytes=chunk_bytes).sum().backward()
    features = max(x.numel(), y.numel()) * 4
    assert largest.bytes <= max(2 * chunk_bytes, features) and 8 * largest.bytes < everything


@pytest.mark.parametrize(
    "name", ["topk half", "attention, best half, double softmax", "assignment, exact", "assignment, sinkhorn"]
)
def test_torchs_machinery(name: str) -> None:
    torch._dynamo.reset()
    score = REDUCERS[name][0]
    leaves = [t.float() for t in (tokens(4, 4, 7, 0), tokens(5, 6, 7, 1))]
    function = weighted(score, *MASKS)
    expected = value_and_gradients(function, *leaves)
    if name != "assignment, sinkhorn":  # its rounds alone are new, and take long
        compiled = value_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), *leaves)
        assert_same(compiled, expected, 1e-6)
    transformed = torch.func.grad(function, argnums=(0, 1))(*leaves)
    assert all(torch.equal(a, b) for a, b in zip(transformed, expected[1:], strict=True))
    x, y = (t.requires_grad_() for t in leaves)
    (gradient,) = torch.autograd.grad(function(x, y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not made"):
        gradient.sum().backward()
    assert torch.equal(score(x, x), score(x, x.clone()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["topk 3", "attention, double softmax", "assignment, exact"])
def test_other_derivatives(name: str) -> None:
    x, y = tokens(2, 4, 3, 0), tokens(3, 5, 3, 1)

    def scores(x: Tensor) -> Tensor:
        return REDUCERS[name][0](x, y)

    torch.testing.assert_close(torch.func.jacrev(scores)(x), torch.autograd.functional.jacobian(scores, x))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(scores, (x,), (x,))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(scores)(x.expand(2, -1, -1, -1))


@pytest.mark.parametrize("name", ["topk 3", "attention", "assignment, exact", "assignment, sinkhorn"])
def test_two_threads_give_the_bits_of_one(name: str, two_threads: None) -> None:
    x, y = tokens(4, 30, 33, 0).float(), tokens(5, 40, 33, 1).float()
    on_two = value_and_gradients(weighted(REDUCERS[name][0]), x, y)
    torch.set_num_threads(1)
    for one, two in zip(value_and_gradients(weighted(REDUCERS[name][0]), x, y), on_two, strict=True):
        assert torch.equal(one, two)


def test_ties_go_to_the_lowest_index() -> None:
    x, y = torch.ones(1, 1, 2), torch.ones(1, 5, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(topk_mean_sim(x, y, 2).sum(), y)
    assert gradient[0, :, 0].tolist() == [0.5, 0.5, 0, 0, 0]


ONES = torch.ones(4, 2, 3)
WRONG: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    r"k: expected an int >= 1 or a float in \(0, 1\], got 0": (ValueError, lambda: topk_mean_sim(ONES, ONES, 0)),
    r"k: expected an int >= 1 or a float in \(0, 1\], got 1.5": (ValueError, lambda: topk_mean_sim(ONES, ONES, 1.5)),
    "k: expected an int or a float, got bool": (TypeError, lambda: topk_mean_sim(ONES, ONES, True)),
    "reduction: expected 'mean' or 'sum', got 'max'": (ValueError, lambda: topk_mean_sim(ONES, ONES, 1, reduction="max")),
    "k: expected an int, got float": (TypeError, lambda: xtr_sim(ONES, ONES, 0.5)),
    r"y: expected shape \[N, T, D\], got \(4, 3\)": (ValueError, lambda: attention_sim(ONES, ONES[:, 0])),
    "y: expected width 3 as x has, got 2": (ValueError, lambda: attention_sim(ONES, ONES[..., :2])),
    r"y_mask: expected shape \(4, 2\), got \(4, 3\)": (
        ValueError,
        lambda: attention_sim(ONES, ONES, None, torch.ones(4, 3).bool()),
    ),
    "temp1: expected a finite number >= 0, got -1": (ValueError, lambda: attention_sim(ONES, ONES, temp1=-1)),
    "temp2: expected a finite number > 0, got 0": (ValueError, lambda: attention_sim(ONES, ONES, temp2=0)),
    "temp2: expected a number, got Tensor": (TypeError, lambda: attention_sim(ONES, ONES, temp2=torch.tensor(1.0))),
    "double_softmax: expected True or False, got 1": (TypeError, lambda: attention_sim(ONES, ONES, double_softmax=1)),
    "top_k: expected an int >= 1": (ValueError, lambda: attention_sim(ONES, ONES, top_k=-3)),
    "normalize: expected True or False, got None": (TypeError, lambda: attention_sim(ONES, ONES, normalize=None)),
    "chunk_bytes: expected >= 1, got 0": (ValueError, lambda: attention_sim(ONES, ONES, chunk_bytes=0)),
    "method: expected 'sinkhorn' or 'exact', got 'auction'": (ValueError, lambda: assignment_sim(ONES, ONES, method="auction")),
    "eps: expected a finite number > 0, got 0": (ValueError, lambda: assignment_sim(ONES, ONES, eps=0)),
    "iterations: expected >= 0, got -1": (ValueError, lambda: assignment_sim(ONES, ONES, iterations=-1)),
    "iterations: expected an int, got float": (TypeError, lambda: assignment_sim(ONES, ONES, iterations=1.0)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, call = WRONG[message]
    with pytest.raises(error, match=message):
        call()
