"""Random masks: which tokens stay, how often, whatever stands beside them; the way back; copies bit by bit; torch's machinery."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance_tokens import images, strided_images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.tokens import gather_tokens, patch_dropout, random_keep, random_mask, restore, select
from vlpfast.ops.tokens.reference_selection import MASK_STREAM, random_bits

needs_library = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
BACKENDS = [pytest.param("cpp", marks=needs_library), "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEED = torch.tensor(-0x123456789ABCDEF)  # both halves have something to say


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# --- which tokens stay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_masks_of_a_seed_never_change(backend: str) -> None:
    """What a run of last year has drawn is drawn again."""
    with backends.use(backend):
        assert random_keep(SEED, 2, 14, 0.5, protect=1)[0].tolist() == GOLDEN["one seed"]
        assert random_keep(SEED, 2, 14, 0.5, protect=1, order="random")[0].tolist() == GOLDEN["one seed, random order"]
        seeds = torch.tensor([0, 2**63 - 1, -1])
        assert random_keep(seeds, 3, 200, 0.97)[0].tolist() == GOLDEN["own seeds"]


GOLDEN = {
    "one seed": [[0, 4, 5, 6, 8, 9, 13], [0, 2, 3, 4, 6, 7, 10]],
    "one seed, random order": [[0, 8, 13, 6, 9, 4, 5], [0, 7, 2, 3, 10, 6, 4]],
    "own seeds": [[16, 51, 95, 112, 138, 141], [10, 40, 127, 147, 164, 188], [17, 70, 131, 135, 150, 159]],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "protect", "ratio", "stay"),
    [(196, 0, 0.75, 49), (197, 1, 0.75, 50), (324, 0, 0.75, 81), (2744, 0, 0.75, 686), (10, 0, 0.9, 0), (10, 0, 0.89, 1),
     (7, 2, 0, 7), (7, 0, 0.5, 3), (1, 0, 0.5, 0), (1, 1, 0.5, 1), (0, 0, 0.5, 0),
     (50, 3, 0.9999, 3), (50, 50, 0.3, 50), (65, 0, 1e-9, 64)],
)  # fmt: skip
def test_exact_counts_and_permutations(tokens: int, protect: int, ratio: float, stay: int, backend: str) -> None:
    with backends.use(backend):
        for order in ("position", "random"):
            indices, inverse = random_keep(SEED, 3, tokens, ratio, protect=protect, order=order)
            assert indices.shape == (3, stay) and inverse.shape == (3, tokens)
            assert indices[:, :protect].tolist() == [list(range(protect))] * 3
            assert ((inverse >= 0).sum(1) == stay).all() and (inverse[inverse < 0] == -1).all()
            assert torch.equal(inverse.gather(1, indices), torch.arange(stay).expand(3, -1))  # each the other's inverse
            if order == "position":
                assert (indices.diff() > 0).all()
                in_order = indices
        assert torch.equal(indices.sort(1).values, in_order)  # the same tokens


@needs_library
@pytest.mark.parametrize("own", [False, True])
def test_every_backend_draws_the_same(own: bool) -> None:
    seed = torch.arange(-3, 4) * 0x1357924680ACE if own else SEED
    for tokens in (0, 1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 500):
        for protect, ratio, order in ((0, 0.75, "position"), (min(2, tokens), 0.3, "random"), (min(1, tokens), 0.0, "random")):
            found = random_keep(seed, 7, tokens, ratio, protect=protect, order=order)
            with backends.use("reference"):
                assert equal(found, random_keep(seed, 7, tokens, ratio, protect=protect, order=order))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_bits_stay(backend: str) -> None:
    bits = random_bits(SEED, 3, 40, MASK_STREAM)
    with backends.use(backend):
        indices, _ = random_keep(SEED, 3, 40, 0.75, order="random")
        assert torch.equal(indices, bits.argsort(dim=1)[:, :10])
        assert torch.equal(random_keep(SEED, 3, 40, 0.75, protect=5, order="random")[0][:, 5:], bits[:, 5:].argsort(1)[:, :8] + 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_with_its_own_seed_has_its_own_mask(backend: str) -> None:
    seeds = torch.tensor([5, 1 << 40, -7, 5, 12345])
    with backends.use(backend):
        indices, inverse = random_keep(seeds, 5, 90, 0.6, order="random")
        order = torch.tensor([4, 2, 0, 1, 3])
        assert torch.equal(random_keep(seeds[order], 5, 90, 0.6, order="random")[0], indices[order])
        for b in range(5):
            assert equal(random_keep(seeds[b : b + 1], 1, 90, 0.6, order="random"), (indices[b : b + 1], inverse[b : b + 1]))
            assert torch.equal(random_keep(seeds[b], 1, 90, 0.6, order="random")[0], indices[b : b + 1])  # the first of a batch
        assert torch.equal(indices[0], indices[3]) and not torch.equal(indices[0], indices[1])
        assert torch.equal(random_keep(torch.arange(10)[::2], 5, 9, 0.5)[0], random_keep(torch.arange(0, 10, 2), 5, 9, 0.5)[0])
        batch = random_keep(SEED, 5, 90, 0.6)[0]
        assert len({tuple(row) for row in batch.tolist()}) == 5  # of one seed every sample has another
        assert torch.equal(random_keep(SEED, 3, 90, 0.6)[0], batch[:3])


def p_value(counts: Tensor) -> float:
    """Of a chi-square test against equal probabilities."""
    expected = counts.sum() / counts.numel()
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2).double(), statistic.double() / 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [SEED, torch.arange(20_000)], ids=["one seed", "seeds in a row"])
def test_every_set_and_every_order_is_equally_likely(seed: Tensor, backend: str) -> None:
    with backends.use(backend):
        indices, _ = random_keep(seed, 20_000, 6, 0.5, protect=1, order="random")  # two of the tokens 1 to 5
        ordered = (6 * indices[:, 1] + indices[:, 2]).bincount(minlength=36)
        sets, _ = random_keep(seed, 20_000, 7, 0.5)  # three of seven
    assert (ordered > 0).sum() == 20 and p_value(ordered[ordered > 0].double()) > 1e-3
    subsets = (49 * sets[:, 0] + 7 * sets[:, 1] + sets[:, 2]).bincount()
    assert (subsets > 0).sum() == 35 and p_value(subsets[subsets > 0].double()) > 1e-3


def test_masks_of_many_tokens_are_uniform_and_independent() -> None:
    """How often each of 196 tokens stays, and neighbours stay together: not more spread than a draw without replacement."""
    _, inverse = random_keep(SEED, 4000, 196, 0.75)
    there = (inverse >= 0).double()
    z = (there.mean(0) - 0.25) / math.sqrt(0.25 * 0.75 / 4000)
    assert z.abs().max() < 4.5 and 0.7 < z.square().mean() < 1.35
    together = (there[:, :-1] * there[:, 1:]).mean(0)
    p = 49 / 196 * 48 / 195
    assert ((together - p) / math.sqrt(p * (1 - p) / 4000)).abs().max() < 4.5
    assert abs((there[:-1] * there[1:]).mean() - 0.25**2) < 4.5 * 0.25 * 0.75 / math.sqrt(3999 * 196)  # one sample and the next


def test_a_seed_is_drawn_from_the_generator() -> None:
    x = torch.randn(3, 40, 2)
    torch.manual_seed(3)
    first, state = random_mask(x, 0.5)[1], torch.get_rng_state()
    second = patch_dropout(x, 0.5)
    assert not torch.equal(second, gather_tokens(x, first))
    torch.set_rng_state(state)
    assert torch.equal(patch_dropout(x, 0.5), second)


# --- what is done with them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["position", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(dtype: torch.dtype, order: str, backend: str) -> None:
    layouts = images(4, 37, 5), strided_images(4, 37, 6), {"x": images(1, 30, 4)["x"].expand(3, 30, 4)}, images(3, 30, 1)
    for x in (layout["x"] for layout in layouts):
        base = x if x._base is None else x._base
        x = base.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())
        token = torch.arange(x.shape[2], dtype=dtype) + 100
        with backends.use(backend):
            kept, indices, inverse = random_mask(x, 0.6, SEED, protect=1, order=order)
            back, zeros = restore(kept, inverse, token), restore(kept, inverse)
            assert torch.equal(gather_tokens(x, indices), kept)
            assert torch.equal(patch_dropout(x, 0.6, SEED, 1), gather_tokens(x, indices.sort(1).values))
        masked = (inverse < 0)[..., None]
        assert torch.equal(back, torch.where(masked, token, x)) and torch.equal(zeros, torch.where(masked, 0, x))
        assert back.dtype == kept.dtype == dtype and kept.is_contiguous()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_have_the_same_bits(dtype: torch.dtype) -> None:
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    bits = torch.randint(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1) - 1, (3, 20, 9), dtype=integers)
    for layout in (bits, bits.mT.contiguous().mT):
        kept, indices, _ = random_mask(layout.view(dtype), 0.5, SEED)
        assert torch.equal(kept.view(integers), bits.gather(1, indices[..., None].expand(-1, -1, 9)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_masked_may_hold_anything(backend: str) -> None:
    _, inverse = random_keep(SEED, 3, 20, 0.5)
    x = torch.randn(3, 20, 4).masked_fill((inverse < 0)[..., None], math.nan).requires_grad_()
    with backends.use(backend):
        kept, _, _ = random_mask(x, 0.5, SEED)
        (gradient,) = torch.autograd.grad(kept.square().sum(), x)
    assert kept.isfinite().all() and gradient.isfinite().all() and not gradient[inverse < 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_restoring_what_select_keeps(backend: str) -> None:
    """Rows in any order; the fused token has no place, and no gradient."""
    x, score = images(3, 12, 4).values()
    with backends.use(backend):
        kept, indices = select(x, score, 5, rest="fuse", order="score")
        inverse = torch.full((3, 12), -1).scatter(1, indices, torch.arange(5).expand(3, -1))
        leaf = kept.requires_grad_()
        back = restore(leaf, inverse)
        (gradient,) = torch.autograd.grad(back.sum(), leaf)
    assert torch.equal(back, torch.where((inverse < 0)[..., None], 0, x))
    assert (gradient[:, :5] == 1).all() and not gradient[:, 5].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_tokens_gradient_is_summed_in_float32(backend: str) -> None:
    """3000 equal numbers: bfloat16 sums would stop at 256."""
    inverse = torch.full((20, 150), -1)
    kept, token = torch.zeros(20, 0, 3, dtype=torch.bfloat16), torch.zeros(1, 1, 3, requires_grad=True)
    with backends.use(backend):
        restored = restore(kept, inverse, token)
        restored.sum((0, 1)).sum().backward()
    assert restored.dtype == torch.bfloat16 and token.grad.dtype == torch.float32
    tolerance = 0 if backend == "cpp" else 8  # the reference rounds the sum to the tokens' dtype
    assert (token.grad - 3000).abs().max() <= tolerance and token.grad.shape == (1, 1, 3)


# --- gradients, torch's machinery -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_finite_differences_of_first_and_second_order(backend: str) -> None:
    x, token = images(2, 7, 3)["x"].requires_grad_(), torch.randn(3, dtype=torch.float64, requires_grad=True)
    strided = strided_images(2, 7, 4)["x"].requires_grad_()

    def there_and_back(x: Tensor, token: Tensor) -> Tensor:
        kept, _, inverse = random_mask(x, 0.5, SEED, protect=1, order="random")
        return restore(kept * kept, inverse, token).tanh()

    with backends.use(backend):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(there_and_back, (x, token))
            assert check(lambda x: random_mask(x, 0.3, SEED)[0], (strided,))
            assert check(lambda x: gather_tokens(x, torch.tensor([[3, 0], [6, 2]])), (x,))
            assert check(lambda x: restore(x, torch.tensor([[3, -1, 0], [6, 5, -1]])), (x,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@needs_library
def test_transforms() -> None:
    x, token = images(3, 9, 4)["x"], torch.randn(4, dtype=torch.float64)

    def loss(x: Tensor, token: Tensor) -> Tensor:
        kept, _, inverse = random_mask(x, 0.5, SEED)
        return (restore(kept, inverse, token) ** 3).sum()

    leaves = x.clone().requires_grad_(), token.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert equal(torch.func.grad(loss, (0, 1))(x, token), expected)
    hessian = torch.func.jacrev(torch.func.grad(loss, 1), 1)(x, token)
    assert torch.allclose(hessian, torch.diag(6 * token * (random_keep(SEED, 3, 9, 0.5)[1] < 0).sum()))
    many = torch.stack([x, 2 * x])
    inverse = random_keep(SEED, 3, 9, 0.5)[1]
    mapped = torch.func.vmap(lambda x: restore(gather_tokens(x, torch.arange(9).expand(3, -1)), inverse.clamp(max=5)))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: loss(x, token), (x,), (x,))
    with torch.no_grad():  # rows may come twice
        assert torch.equal(mapped(many)[1], restore(2 * x, inverse.clamp(max=5)))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_threads_give_the_bits_of_one(dtype: torch.dtype, two_threads: None) -> None:
    x, token = images(40, 99, 65)["x"].to(dtype).requires_grad_(), torch.randn(65).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        kept, indices, inverse = random_mask(x, 0.7, SEED, order="random")
        back = restore(kept, inverse, token)
        weights = torch.linspace(-1, 1, back.numel(), dtype=torch.float64).to(dtype).reshape(back.shape)
        return kept, indices, inverse, back, *torch.autograd.grad((back * weights).sum(), (x, token))

    found = run()
    torch.set_num_threads(1)
    assert equal(found, run())


@needs_library
def test_backward_twice_inference_mode_and_autocast() -> None:
    x, token = images(3, 9, 4)["x"].float().requires_grad_(), torch.randn(4, requires_grad=True)
    kept, _, inverse = random_mask(x, 0.5, SEED)
    back = restore(kept, inverse, token)
    first = torch.autograd.grad(back.sum(), (x, token), retain_graph=True)
    assert equal(first, torch.autograd.grad(back.sum(), (x, token)))
    with torch.inference_mode():
        assert torch.equal(restore(random_mask(x, 0.5, SEED)[0], inverse, token), back)
    for backend in ("cpp", "reference"):
        with backends.use(backend), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(restore(random_mask(x, 0.5, SEED)[0], inverse, token), back)  # nothing is cast
            half = restore(kept.bfloat16(), inverse, token)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, torch.where((inverse < 0)[..., None], token, x).bfloat16())


@pytest.mark.parametrize(
    ("backend", "dynamic"), [*(pytest.param("cpp", d, marks=needs_library) for d in (False, True)), ("reference", False)]
)
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    x, token = images(3, 41, 8)["x"].float().requires_grad_(), torch.randn(1, 1, 8, requires_grad=True)

    def function(x: Tensor, token: Tensor, seed: Tensor) -> Tensor:
        kept, indices, inverse = random_mask(x, 0.75, seed, protect=1, order="random")
        back = restore(kept.square(), inverse, token)
        early, _ = random_keep(seed, x.shape[0], x.shape[1], 0.5)
        more = gather_tokens(x, early).sum() + patch_dropout(x, 0.3, seed).sum() + indices.sum()
        return back.square().mean(-1)[:, 1:].sum() + more

    with backends.use(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for seed in (SEED, SEED + 1):
            expected, found = function(x, token, seed), compiled(x, token, seed)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
            for f, e in zip(torch.autograd.grad(found, (x, token)), torch.autograd.grad(expected, (x, token)), strict=True):
                torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, indices = images(3, 11, 4)["x"].to(dtype), torch.tensor([[0, -1, 10], [3, 2, -1], [-1, -1, 7]])
    for fill in (None, torch.ones(4)):
        torch.library.opcheck(torch.ops.vlpfast.gather_rows, (x, indices, fill))
    torch.library.opcheck(torch.ops.vlpfast.filled_rows_sum, (x[:, :3], indices))
    for seed, shuffled in ((SEED, False), (torch.arange(3), True)):
        torch.library.opcheck(torch.ops.vlpfast.random_keep, (seed, 3, 11, 4, 1, shuffled))


def test_meta_and_fake_tensors_take_shape_only() -> None:
    kept, indices, inverse = random_mask(torch.empty(3, 9, 4, device="meta"), 0.5, protect=1)
    assert kept.shape == (3, 5, 4) and indices.shape == (3, 5) and inverse.shape == (3, 9) and inverse.is_meta
    with FakeTensorMode():
        x, token = torch.empty(3, 9, 4, requires_grad=True), torch.empty(4, requires_grad=True)
        kept, _, inverse = random_mask(x, 0.5, torch.empty(3, dtype=torch.int64))
        back = restore(kept, inverse, token)
        assert back.shape == x.shape
        assert [g.shape for g in torch.autograd.grad(back.sum(), (x, token))] == [x.shape, token.shape]
        with pytest.raises(ValueError, match="mask_token: expected shape"):
            restore(kept, inverse, token[:3])


@needs_library
def test_copies_are_no_products() -> None:
    x, token = torch.ones(3, 9, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        kept, _, inverse = random_mask(x, 0.5, SEED)
        restore(kept, inverse, token).sum().backward()
    assert counter.get_total_flops() == 0


# --- wrong arguments --------------------------------------------------------------------------------------------------

X, INVERSE = torch.ones(2, 5, 3), torch.tensor([[0, -1, 4], [2, 1, -1]])
WRONG_MASK: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "x: expected a tensor, got list": (TypeError, {"x": [[[1.0]]]}),
    "x: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"x": X.long()}),
    r"x: expected shape \[B, N, C\], got \(2, 5\)": (ValueError, {"x": X[..., 0]}),
    "ratio: expected a float, got str": (TypeError, {"ratio": "0.5"}),
    "ratio: expected 0 <= ratio < 1, got 1.0": (ValueError, {"ratio": 1.0}),
    "ratio: expected 0 <= ratio < 1, got -0.1": (ValueError, {"ratio": -0.1}),
    "ratio: expected 0 <= ratio < 1, got nan": (ValueError, {"ratio": math.nan}),
    "seed: expected a tensor, got int": (TypeError, {"seed": 3}),
    "seed: expected torch.int64, got torch.int32": (TypeError, {"seed": torch.tensor(3).int()}),
    "seed: expected a vector of length 2, got 1 dimensions and 3 elements": (ValueError, {"seed": torch.arange(3)}),
    "seed: expected device cpu as x has, got meta": (ValueError, {"seed": SEED.to("meta")}),
    "protect: expected >= 0, got -1": (ValueError, {"protect": -1}),
    "protect: expected at most N = 5, the tokens of an image, got 6": (ValueError, {"protect": 6}),
    "order: expected 'position' or 'random', got 'score'": (ValueError, {"order": "score"}),
}
WRONG_RESTORE: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    r"kept: expected shape \[B, N, C\], got \(2, 5\)": (ValueError, {"kept": X[..., 0]}),
    "inverse: expected a tensor, got list": (TypeError, {"inverse": [[0]]}),
    "inverse: expected torch.int64, got torch.int32": (TypeError, {"inverse": INVERSE.int()}),
    r"inverse: expected shape \[2, any\], got \(1, 3\)": (ValueError, {"inverse": INVERSE[:1]}),
    "inverse: expected device cpu as the tokens have, got meta": (ValueError, {"inverse": INVERSE.to("meta")}),
    "inverse: expected -1 to 4, got -2 to 4": (ValueError, {"inverse": INVERSE.clamp(max=4).where(INVERSE >= 0, -2)}),
    "inverse: expected -1 to 4, got -1 to 5": (ValueError, {"inverse": INVERSE.where(INVERSE < 4, 5)}),
    "inverse: expected every row of an image at most once": (ValueError, {"inverse": INVERSE.where(INVERSE > 1, 1)}),
    "mask_token: expected a tensor or None, got float": (TypeError, {"mask_token": 0.0}),
    "mask_token: expected float32, float64, bfloat16 or float16": (TypeError, {"mask_token": torch.ones(3).long()}),
    r"mask_token: expected shape \(3,\) or \(1, 1, 3\), got \(1, 3\)": (ValueError, {"mask_token": torch.ones(1, 3)}),
    "mask_token: expected device cpu as kept has, got meta": (ValueError, {"mask_token": torch.ones(3, device="meta")}),
}


@pytest.mark.parametrize("message", WRONG_MASK)
def test_wrong_arguments_of_a_mask_are_named(message: str) -> None:
    error, wrong = WRONG_MASK[message]
    with pytest.raises(error, match=message):
        random_mask(**({"x": X, "ratio": 0.5, "seed": SEED} | wrong))


@pytest.mark.parametrize("message", WRONG_RESTORE)
def test_wrong_arguments_of_the_way_back_are_named(message: str) -> None:
    error, wrong = WRONG_RESTORE[message]
    with pytest.raises(error, match=message):
        restore(**({"kept": X, "inverse": INVERSE} | wrong))


def test_other_wrong_arguments_are_named() -> None:
    for error, message, arguments in (
        (TypeError, "batch: expected an int, got float", (SEED, 2.0, 5, 0.5)),
        (ValueError, "tokens: expected >= 0, got -1", (SEED, 2, -1, 0.5)),
        (TypeError, "seed: expected a tensor, got NoneType", (None, 2, 5, 0.5)),
    ):
        with pytest.raises(error, match=message):
            random_keep(*arguments)
    with pytest.raises(ValueError, match="indices: expected 0 to 4, got -1 to 4"):
        gather_tokens(X, INVERSE)
    with pytest.raises(ValueError, match="indices: expected every row of an image at most once"):
        gather_tokens(X, INVERSE.clamp(min=2))


@needs_library
def test_the_kernel_checks_what_only_it_can_see() -> None:
    """A number of the wrong type or an index out of range must not read what is not there."""
    for arguments in ((2, 5, 6, 0), (2, 5, 2**32, 0), (2, 5, 1, 2**32 + 1), (2, 5, 3, 3), (2, 5, -1, 2), (-1, 5, 1, 1)):
        with pytest.raises(RuntimeError, match="expected at most as many tokens to keep as there are"):
            torch.ops.vlpfast.random_keep(SEED, *arguments, False)
    for seed in (torch.arange(3), SEED.double(), torch.zeros(1, 1, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="seed: expected int64, one number or one for each of 2 samples"):
            torch.ops.vlpfast.random_keep(seed, 2, 5, 1, 0, False)
    with pytest.raises(RuntimeError, match=r"expected less than 2\^32 samples and tokens, got 0 and 4294967296"):
        torch.ops.vlpfast.random_keep(SEED, 0, 2**32, 1, 0, False)
    for wrong in (5, -2, 2**32):
        with pytest.raises(RuntimeError, match=f"indices: expected -1 to 4, got {wrong}"):
            torch.ops.vlpfast.gather_rows(X, torch.tensor([[0], [wrong]]), None)
    with pytest.raises(RuntimeError, match="fill: expected 3 numbers"):
        torch.ops.vlpfast.gather_rows(X, INVERSE, torch.ones(2))
    with pytest.raises(RuntimeError, match="indices: expected shape"):
        torch.ops.vlpfast.filled_rows_sum(X, INVERSE)
