"""What the conformance table cannot say about select, and importance: the definition by loops, ties, NaN, torch's machinery."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import mask
from conformance_tokens import images, strided_images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends, debug
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.tokens import importance, select
from vlpfast.ops.tokens.selection_autograd import Select

needs_library = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
BACKENDS = [pytest.param("cpp", marks=needs_library), "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAN, INF = math.nan, math.inf


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def run(x: Tensor, score: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    """kept, indices, and the gradients of x and score of a weighted sum."""
    leaves = [t.detach().requires_grad_() for t in (x, score)]
    kept, indices = select(*leaves, *arguments, **options)
    weights = torch.linspace(0.5, 1.5, kept.numel(), dtype=kept.dtype).reshape(kept.shape)
    return [kept.detach(), indices, *torch.autograd.grad((kept * weights).sum(), leaves)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# --- select: the definition -------------------------------------------------------------------------------------------


def one_image(x: Tensor, score: Tensor, k: int, protect: int, keep: list[bool], by_score: bool) -> tuple[Tensor, list[int]]:
    """kept, with the sum of the others last, and indices, token by token."""

    def rank(n: int) -> tuple[int, float, int]:
        value = float(score[n])
        return (2, 0, n) if not keep[n] else (1, 0, n) if math.isnan(value) else (0, -value, n)

    chosen = sorted(range(protect, len(x)), key=rank)[:k]
    indices = [*range(protect), *(chosen if by_score else sorted(chosen))]
    fused = sum((float(score[n]) * x[n] for n in range(len(x)) if n not in indices and keep[n]), torch.zeros_like(x[0]))
    return torch.stack([*(x[n] for n in indices), fused]), indices


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["position", "score"])
def test_the_definition_token_by_token(order: str, backend: str) -> None:
    x, score, keep = *images(4, 17, 3).values(), mask(4, 17)
    score = score - 1  # of both signs
    for k, protect in ((0, 0), (5, 0), (5, 2), (17, 0), (14, 3), (0, 17)):
        with backends.use(backend):
            kept, indices = select(x, score, k, rest="fuse", order=order, protect=protect, mask=keep)
            dropped, same = select(x, score, k, order=order, protect=protect, mask=keep)
            mean, _ = select(x, score, k, rest="fuse", order=order, protect=protect, normalize=True)
        assert torch.equal(dropped, kept[:, :-1]) and torch.equal(same, indices)
        for b in range(4):
            wanted, places = one_image(x[b], score[b], k, protect, keep[b].tolist(), order == "score")
            assert indices[b].tolist() == places
            torch.testing.assert_close(kept[b], wanted, rtol=1e-13, atol=1e-14)
            wanted, places = one_image(x[b], score[b], k, protect, [True] * 17, order == "score")
            total = score[b].sum() - score[b, places].sum()
            expected = wanted[-1] / total if len(places) < 17 else wanted[-1]
            torch.testing.assert_close(mean[b, -1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_what_is_no_number(dtype: torch.dtype, backend: str) -> None:
    score = torch.tensor([[1.0, NAN, -INF, 2.0, -0.0, INF, 0.0, 2.0, -NAN, 1.0, 9.0, NAN]], dtype=dtype)
    keep = torch.ones(1, 12, dtype=torch.bool)
    keep[:, 10:] = False
    order = [5, 3, 7, 0, 9, 4, 6, 2, 1, 8, 10, 11]
    x = torch.arange(12.0, dtype=dtype)[None, :, None]
    with backends.use(backend):
        for k in range(13):
            kept, indices = select(x, score, k, order="score", mask=keep)
            assert indices[0].tolist() == order[:k] == kept[0, :, 0].tolist()
            assert select(x, score, k, mask=keep)[1][0].tolist() == sorted(order[:k])
        assert select(x, score, 3, order="score", mask=keep, protect=6)[1][0].tolist() == [0, 1, 2, 3, 4, 5, 7, 9, 6]


@needs_library
@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed: int) -> None:
    """Many ties, some scores that are NaN or infinite; what is kept is the reference's, bit for bit."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, n, c = rng.choice([1, 2, 5]), rng.randint(0, 70), rng.randint(0, 40)
    x = torch.randn(b, n, c, generator=generator)
    score = torch.randint(-3, 4, (b, n), generator=generator).float()
    if rng.random() < 0.3:
        score[torch.rand(b, n, generator=generator) < 0.3] = rng.choice([NAN, INF, -INF])
    protect = rng.choice([0, 0, 1, n // 2]) if n else 0
    options: dict[str, Any] = {"order": rng.choice(["position", "score"]), "protect": protect}
    options["mask"] = rng.choice([None, torch.rand(b, n, generator=generator) < 0.7])
    if rng.random() < 0.7:
        options |= {"rest": "fuse", "normalize": rng.random() < 0.5}
    k = rng.randint(0, n - protect)
    found, indices = select(x, score, k, **options)
    with backends.use("reference"):
        expected, wanted = select(x, score, k, **options)
    assert torch.equal(indices, wanted) and torch.equal(found[:, : protect + k], expected[:, : protect + k])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_compared_in_their_own_dtype(backend: str) -> None:
    score = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 + 2e-12]], dtype=torch.float64)
    with backends.use(backend):
        assert select(torch.zeros(1, 3, 2), score, 1)[1].tolist() == [[2]]
        assert select(torch.zeros(1, 3, 2, dtype=torch.bfloat16), score, 2, order="score")[1].tolist() == [[2, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_goes_where_it_belongs(backend: str) -> None:
    x, score = (t.float() for t in images(4, 9, 5).values())
    score[:, 2] = 9.0  # kept
    score[:, 4] = 0.0  # fused
    score[0, 4] = NAN
    x[1, 4], x[2, 2] = NAN, NAN
    x[3, 7], score[3, 7] = NAN, NAN
    keep = torch.ones(4, 9, dtype=torch.bool)
    keep[3, 7] = False
    with backends.use(backend):
        kept, _, dx, dscore = run(x, score, 3, rest="fuse", mask=keep)
        dropped, _ = select(x, score, 3, mask=keep)
        normalised, _ = select(x, score, 3, rest="fuse", mask=keep, normalize=True)
    assert kept[:2, -1].isnan().all() and normalised[:2, -1].isnan().all()
    assert kept[2:, -1].isfinite().all() and normalised[2:, -1].isfinite().all()
    assert dropped[[0, 1, 3]].isfinite().all() and dropped[2].isnan().any(1).sum() == 1
    assert dx[1:].isfinite().all() and dx[0].isnan().all(1).tolist() == [n == 4 for n in range(9)]
    assert dscore[1, 4].isnan() and dscore.isnan().sum() == 1 and dscore[3, 7] == 0 and not dx[3, 7].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_sum_to_nothing(backend: str) -> None:
    x, score = torch.randn(2, 4, 3), torch.tensor([[5.0, 1.0, -1.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    with backends.use(backend):
        kept, _, dx, dscore = run(x, score, 1, rest="fuse", normalize=True)
    assert not kept[:, 1].any() and not dx[:, 1:].any() and not dscore.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_token_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    both = images(2, 400, 20)
    x, score = both["x"].to(dtype), both["score"].to(dtype)
    for normalize in (False, True):
        with backends.use(backend):
            kept, indices, dx, dscore = run(x, score, 100, rest="fuse", normalize=normalize)
        with backends.use("reference"):
            expected, _, _, expected_dscore = run(x.double(), score.double(), 100, rest="fuse", normalize=normalize)
        assert torch.equal(kept[:, :100], x.gather(1, indices[..., None].expand(-1, -1, 20)))
        eps, sums = torch.finfo(dtype).eps, 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(kept[:, 100].double(), expected[:, 100], rtol=0.51 * eps, atol=sums)
        error = (dscore.double() - expected_dscore).norm() / expected_dscore.norm()
        assert kept.dtype == dx.dtype == dtype and dscore.dtype == dtype and error < 2 * eps + 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_does_not_matter(backend: str) -> None:
    """Three images of different lengths, padded with anything, and each alone."""
    lengths, (x, score) = (20, 31, 9), (t.float() for t in images(3, 31, 6).values())
    keep = torch.arange(31) < torch.tensor(lengths)[:, None]
    padded, scores = x.masked_fill(~keep[..., None], NAN), score.masked_fill(~keep, INF)
    with backends.use(backend):
        found = run(padded, scores, 8, rest="fuse", protect=1, mask=keep)
        for b, n in enumerate(lengths):
            alone = select(x[b : b + 1, :n], score[b : b + 1, :n], 8, rest="fuse", protect=1)
            assert torch.equal(alone[1][0], found[1][b])
            torch.testing.assert_close(alone[0][0], found[0][b], rtol=1e-6, atol=1e-6)
    assert not found[2][~keep].any() and not found[3][~keep].any()


# --- select: gradients, torch's machinery -----------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_by_finite_differences(normalize: bool) -> None:
    x, score = (t.requires_grad_() for t in images(3, 7, 3).values())
    for options in ({}, {"protect": 2, "order": "score"}, {"mask": mask(3, 7)}):
        assert torch.autograd.gradcheck(
            lambda x, score, o=options: select(x, score, 3, rest="fuse", normalize=normalize, **o)[0], (x, score)
        )
    strided = strided_images(3, 7, 4)
    inputs = strided["x"].requires_grad_(), strided["score"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, score: select(x, score, 3, rest="fuse", normalize=normalize)[0], inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_some_inputs_alone(backend: str) -> None:
    x, score = images(3, 9, 4).values()
    with backends.use(backend):
        *_, dx, dscore = run(x, score, 4, rest="fuse")
        for wanted in (0, 1):
            leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, score))]
            kept, _ = select(*leaves, 4, rest="fuse")
            weights = torch.linspace(0.5, 1.5, kept.numel(), dtype=kept.dtype).reshape(kept.shape)
            (kept * weights).sum().backward()
            assert torch.equal(leaves[wanted].grad, (dx, dscore)[wanted]) and leaves[1 - wanted].grad is None
        kept, indices = select(x, score.requires_grad_(), 4)
        assert not kept.requires_grad and not indices.requires_grad  # what is chosen has no gradient
        leaf = x.clone().requires_grad_()
        select(leaf, score, 4)[0].sum().backward()  # a gradient of no strides
        assert torch.equal(leaf.grad[..., 0].nonzero()[:, 1].reshape(3, 4), indices) and leaf.grad.sum() == 3 * 4 * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x_dtype", "score_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float16)]
)
def test_scores_have_a_dtype_of_their_own(x_dtype: torch.dtype, score_dtype: torch.dtype, backend: str) -> None:
    x, score = images(3, 30, 12).values()
    x, score = x.to(x_dtype), score.to(score_dtype)
    for options in ({}, {"normalize": True}):
        with backends.use(backend):
            kept, indices, dx, dscore = run(x, score, 9, rest="fuse", **options)
        with backends.use("reference"):
            _, same, _, expected = run(x.double(), score.double(), 9, rest="fuse", **options)
        assert (kept.dtype, dx.dtype, dscore.dtype) == (x_dtype, x_dtype, score_dtype) and torch.equal(indices, same)
        error = (dscore.double() - expected).norm() / expected.norm()
        assert error < 2 * max(torch.finfo(dtype).eps for dtype in (x_dtype, score_dtype))


@needs_library
def test_transforms_and_what_is_refused() -> None:
    x, score = images(3, 7, 4).values()

    def loss(score: Tensor) -> Tensor:
        return select(x, score, 3, rest="fuse", normalize=True)[0].square().sum()

    leaf = score.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(score), expected) and expected.any()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="select: second derivatives are made by the reference backend alone"):
        torch.autograd.grad(gradient.sum(), leaf)
    with pytest.raises(NotImplementedError, match="select: second derivatives are made by the reference backend alone"):
        torch.func.grad(lambda s: torch.func.grad(loss)(s).sum())(score)
    with pytest.raises(NotImplementedError, match="select: results under vmap are made by the reference backend alone"):
        torch.func.vmap(loss)(score.expand(2, -1, -1))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (score,), (score,))
    with backends.use("reference"):
        inputs = x[:1, :4].clone().requires_grad_(), score[:1, :4].clone().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x, s: select(x, s, 1, rest="fuse", normalize=True)[0], inputs)


@needs_library
def test_backward_twice_inference_mode_and_autocast() -> None:
    x, score = (t.float().requires_grad_() for t in images(3, 9, 4).values())
    kept, _ = select(x, score, 4, rest="fuse")
    first = torch.autograd.grad(kept.sum(), (x, score), retain_graph=True)
    assert equal(list(first), list(torch.autograd.grad(kept.sum(), (x, score))))
    with torch.inference_mode():
        assert torch.equal(select(x, score, 4, rest="fuse")[0], kept)
    for backend in ("cpp", "reference"):
        with backends.use(backend), torch.autocast("cpu", torch.bfloat16):
            found = run(x, score, 4, rest="fuse")
            assert found[0].dtype == torch.float32  # nothing is cast
        with backends.use(backend):
            assert equal(found, run(x, score, 4, rest="fuse"))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_threads_give_the_bits_of_one(dtype: torch.dtype, two_threads: None) -> None:
    x, score = (t.to(dtype) for t in images(9, 100, 65).values())
    found = run(x, score, 30, rest="fuse", protect=1, normalize=True)
    torch.set_num_threads(1)
    assert equal(found, run(x, score, 30, rest="fuse", protect=1, normalize=True))


@pytest.mark.parametrize(
    ("backend", "dynamic"), [*(pytest.param("cpp", d, marks=needs_library) for d in (False, True)), ("reference", False)]
)
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    x, score = (t.float().requires_grad_() for t in images(3, 41, 8).values())
    keep = mask(3, 41)

    def function(x: Tensor, score: Tensor) -> Tensor:
        q = x[:, None].expand(-1, 2, -1, -1)
        a, indices = select(x, score, 13, rest="fuse", protect=1, mask=keep, normalize=True)
        b, _ = select(x, importance(q, q, mask=keep)[:, 0], x.shape[1] // 2, order="score")
        return a.square().sum() + b.sum() + keep.gather(1, indices).sum()

    with backends.use(backend):
        expected = function(x, score)
        found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x, score)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        for f, e in zip(torch.autograd.grad(found, (x, score)), torch.autograd.grad(expected, (x, score)), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, score = (t.to(dtype) for t in images(3, 11, 4).values())
    for keep, fuse, normalize, needed in ((mask(3, 11), True, True, (True, True)), (None, False, False, (True, False))):
        torch.library.opcheck(torch.ops.vlpfast.select_fwd, (x, score, keep, 4, 1, True, fuse, normalize))
        kept, indices = torch.ops.vlpfast.select_fwd(x, score, keep, 4, 1, True, fuse, normalize)
        backward = (kept, x if fuse else None, score, keep, indices, fuse, normalize, *needed)
        torch.library.opcheck(torch.ops.vlpfast.select_bwd, backward)


def test_meta_and_fake_tensors_take_shape_only() -> None:
    x, score = torch.empty(3, 9, 4, device="meta", dtype=torch.float16), torch.empty(3, 9, device="meta")
    kept, indices = select(x, score, 4, protect=1)
    assert kept.shape == (3, 5, 4) and kept.dtype == torch.float16 and indices.shape == (3, 5) and indices.dtype == torch.int64
    with FakeTensorMode():
        x, score = torch.empty(3, 9, 4, requires_grad=True), torch.empty(3, 9, requires_grad=True)
        kept, _ = select(x, score, 4, rest="fuse")
        assert kept.shape == (3, 5, 4)
        assert [g.shape for g in torch.autograd.grad(kept.sum(), (x, score))] == [x.shape, score.shape]
        with pytest.raises(ValueError, match="k: expected at most 9"):
            select(x, score, 10)


@needs_library
def test_x_is_kept_only_for_the_gradient_of_score() -> None:
    x, score = images(3, 9, 4).values()
    for x_needs, score_needs, kept in ((True, False, False), (True, True, True)):
        a, b = x.clone().requires_grad_(x_needs), score.clone().requires_grad_(score_needs)
        result = Select.apply("cpp", a, b, None, 4, 0, False, True, False)[0]
        assert any(t is not None and t.shape == x.shape for t in result.grad_fn.saved_tensors) == kept


@needs_library
def test_products_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        run(*images(3, 9, 4).values(), 4, rest="fuse", protect=1)
    assert counter.get_total_flops() == 3 * 4 * 4 * (2 + 1 + 2)


def test_a_score_that_is_none_is_named_under_debug() -> None:
    x, score = torch.zeros(1, 3, 2), torch.tensor([[1.0, NAN, -INF]])
    assert select(x, score, 2)[1].tolist() == [[0, 2]]
    with debug.use(), pytest.raises(ValueError, match=r"score: expected numbers in .* the first at \[0, 1\]: nan"):
        select(x, score, 2)
    with debug.use():
        select(x, score.nan_to_num(0, neginf=-INF), 2)


X, SCORE = torch.ones(2, 5, 3), torch.ones(2, 5)
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "x: expected a tensor, got list": (TypeError, {"x": [[[1.0]]]}),
    "x: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"x": X.long()}),
    r"x: expected shape \[B, N, C\], got \(2, 5\)": (ValueError, {"x": X[..., 0]}),
    "score: expected a tensor, got list": (TypeError, {"score": [[1.0]]}),
    "score: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"score": SCORE.long()}),
    r"score: expected shape \(2, 5\), got \(5, 2\)": (ValueError, {"score": SCORE.T}),
    "score: expected device cpu as x has, got meta": (ValueError, {"score": SCORE.to("meta")}),
    "k: expected an int, got float": (TypeError, {"k": 2.0}),
    "k: expected >= 0, got -1": (ValueError, {"k": -1}),
    "k: expected at most 5, the tokens that are not protected, got 6": (ValueError, {"k": 6}),
    "k: expected at most 3, the tokens that are not protected, got 4": (ValueError, {"k": 4, "protect": 2}),
    "protect: expected an int, got bool": (TypeError, {"protect": True}),
    "protect: expected >= 0, got -1": (ValueError, {"protect": -1}),
    "protect: expected at most N = 5, the tokens of an image, got 6": (ValueError, {"protect": 6}),
    "mask: expected torch.bool, got torch.float32": (TypeError, {"mask": SCORE}),
    r"mask: expected shape \(2, 5\), got \(2, 4\)": (ValueError, {"mask": SCORE[:, 1:].bool()}),
    "rest: expected 'drop' or 'fuse', got 'keep'": (ValueError, {"rest": "keep"}),
    "order: expected 'position' or 'score', got None": (ValueError, {"order": None}),
    "normalize: expected True or False, got 1": (TypeError, {"normalize": 1}),
    "normalize: expected False with rest='drop'": (ValueError, {"normalize": True}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        select(**({"x": X, "score": SCORE, "k": 2} | wrong))


@needs_library
def test_the_kernel_checks_what_only_it_can_see() -> None:
    """A number of the wrong type or an index out of range must not read what is not there."""
    forward, backward = torch.ops.vlpfast.select_fwd, torch.ops.vlpfast.select_bwd
    for k, protect in ((2**32 + 1, 0), (1, 2**32), (-1, 2), (4, 2)):
        with pytest.raises(RuntimeError, match="k: expected 0 to 5 with what is protected"):
            forward(X, SCORE, None, k, protect, False, False, False)
    with pytest.raises(RuntimeError, match="score: expected shape"):
        forward(X, SCORE[:1], None, 1, 0, False, False, False)
    with pytest.raises(RuntimeError, match="mask: expected bool"):
        forward(X, SCORE, SCORE, 1, 0, False, False, False)
    indices = torch.tensor([[0, 5], [1, 2]])
    with pytest.raises(RuntimeError, match="indices: expected 0 to 4, got 5"):
        backward(X[:, :2], None, SCORE, None, indices, False, False, True, False)
    with pytest.raises(RuntimeError, match="indices: expected 0 to 4, got -1"):
        backward(X[:, :2], None, SCORE, None, indices.where(indices < 5, -1), False, False, True, False)
    with pytest.raises(RuntimeError, match="grad: expected shape"):
        backward(X[:, :2], X, SCORE, None, indices % 5, True, False, True, True)
    with pytest.raises(RuntimeError, match="x: expected tokens in the dtype of grad"):
        backward(X[:, :3], X.double(), SCORE, None, indices % 5, True, False, True, True)


# --- importance -------------------------------------------------------------------------------------------------------


def queries(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rows_of_the_attention_matrix() -> None:
    q, k = queries(3, 4, 9, 5), queries(3, 4, 13, 5, seed=1)
    attention = (q @ k.mT / 5**0.5).softmax(-1)  # [B, H, Nq, N]
    own = torch.tensor([[1, 8], [0, 3], [4, 4]])
    for rows, wanted in (
        (0, attention[:, :, :1]),
        (-1, attention[:, :, -1:]),
        (torch.tensor([7, 2, 2]), attention[:, :, [7, 2, 2]]),
        (own, torch.stack([attention[b, :, own[b]] for b in range(3)])),
        (None, attention),
    ):
        for heads, reduced in (("each", wanted), ("mean", wanted.mean(1)), ("max", wanted.amax(1))):
            torch.testing.assert_close(importance(q, k, rows, heads=heads), reduced, rtol=1e-12, atol=1e-14)
    scaled = importance(q, k, scale=0.3, heads="each")
    torch.testing.assert_close(scaled, (0.3 * q[:, :, :1] @ k.mT).softmax(-1), rtol=1e-12, atol=1e-14)
    kept, _ = select(k[:, 0], importance(q, k)[:, 0], 4, rest="fuse", normalize=True)
    assert kept.shape == (3, 5, 5)


def test_importance_of_masked_keys_and_with_a_normaliser_given() -> None:
    q, k, keep = queries(3, 2, 5, 4), queries(3, 2, 9, 4, seed=1), mask(3, 9)
    anything = k.masked_fill(~keep[:, None, :, None], NAN).requires_grad_()
    leaf = q.clone().requires_grad_()
    found = importance(leaf, anything, None, mask=keep, heads="each")
    for b in (1, 2):
        wanted = (q[b] @ k[b][:, keep[b]].mT / 2).softmax(-1)
        torch.testing.assert_close(found[b][..., keep[b]], wanted, rtol=1e-12, atol=1e-14)
    assert not found[0].any() and not found.masked_select(~keep[:, None, None]).any()  # the first image has no key
    gradients = torch.autograd.grad(found.square().sum(), (leaf, anything))
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][0].any()
    nothing = torch.full((3, 2, 5), -INF)  # what fused attention returns where no key is kept
    found = importance(leaf, anything, None, mask=torch.zeros_like(keep), lse=nothing)
    assert not found.any() and not torch.autograd.grad(found.sum(), leaf)[0].any()
    lse = (q @ k.mT / 2).logsumexp(-1)
    part = importance(q, k[:, :, :4], torch.tensor([3, 1]), lse=lse, heads="each")
    torch.testing.assert_close(part, (q @ k.mT / 2).softmax(-1)[:, :, [3, 1], :4], rtol=1e-12, atol=1e-14)
    whole = importance(q, k, -1, lse=lse, mask=keep)
    torch.testing.assert_close(whole, (q @ k.mT / 2).softmax(-1)[:, :, -1:].mean(1) * keep[:, None], rtol=1e-12, atol=1e-14)


def test_importance_has_gradients() -> None:
    q, k = queries(2, 2, 3, 4).requires_grad_(), queries(2, 2, 5, 4, seed=1).requires_grad_()
    for heads in ("mean", "max", "each"):
        assert torch.autograd.gradcheck(lambda q, k, h=heads: importance(q, k, 1, heads=h, mask=mask(2, 5)), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: importance(q, k, torch.tensor([0, 2])), (q, k))


def test_importance_is_made_in_float32() -> None:
    q, k = queries(2, 3, 4, 8).bfloat16(), queries(2, 3, 50, 8, seed=1).bfloat16()
    found = importance(q, k)
    torch.testing.assert_close(found.double(), importance(q.double(), k.double()), rtol=2e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(importance(q.float(), k.float()), found) and found.dtype == torch.float32
    assert importance(q[:, :, :0], k, None).shape == (2, 0, 50) and importance(q, k[:, :, :0]).shape == (2, 1, 0)
    assert F.softmax(queries(2, 3), -1).dtype == importance(q.double(), k.double()).dtype


Q, K = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 6, 5)
WRONG_QUERIES: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "q: expected a tensor, got float": (TypeError, {"q": 1.0}),
    r"q: expected shape \[B, H, N, Dh\], got \(2, 3, 4\)": (ValueError, {"q": Q[..., 0]}),
    "q: expected at least one head": (ValueError, {"q": Q[:, :0], "k": K[:, :0]}),
    "k: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"k": K.long()}),
    r"k: expected shape \[2, 3, N, 5\], got \(2, 1, 6, 5\)": (ValueError, {"k": K[:, :1]}),
    "k: expected torch.float32 as q has, got torch.float64": (TypeError, {"k": K.double()}),
    "k: expected device cpu as q has, got meta": (ValueError, {"k": K.to("meta")}),
    "rows: expected -4 to 3, got 4": (ValueError, {"rows": 4}),
    "rows: expected an int, an int64 tensor or None, got bool": (TypeError, {"rows": True}),
    "rows: expected an int, an int64 tensor or None, got torch.int32": (TypeError, {"rows": torch.tensor([1]).int()}),
    r"rows: expected shape \[R\] or \[2, R\], got \(3, 1\)": (ValueError, {"rows": torch.zeros(3, 1, dtype=torch.long)}),
    "rows: expected 0 to 3, got -1 to 4": (ValueError, {"rows": torch.tensor([-1, 4])}),
    "rows: expected device cpu as q has, got meta": (ValueError, {"rows": torch.tensor([1], device="meta")}),
    "scale: expected a float or None, got str": (TypeError, {"scale": "1"}),
    "lse: expected a floating tensor or None, got float": (TypeError, {"lse": 1.0}),
    "lse: expected device cpu as q has, got meta": (ValueError, {"lse": Q[..., 0].to("meta")}),
    r"lse: expected shape \(2, 3, 4\), got \(2, 3, 6\)": (ValueError, {"lse": K[..., 0]}),
    r"mask: expected shape \(2, 6\), got \(2, 4\)": (ValueError, {"mask": torch.ones(2, 4, dtype=torch.bool)}),
    "heads: expected 'mean', 'max' or 'each', got 'sum'": (ValueError, {"heads": "sum"}),
}


@pytest.mark.parametrize("message", WRONG_QUERIES)
def test_wrong_queries_are_named(message: str) -> None:
    error, wrong = WRONG_QUERIES[message]
    with pytest.raises(error, match=message):
        importance(**({"q": Q, "k": K} | wrong))
