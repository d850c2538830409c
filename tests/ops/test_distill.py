"""What the conformance table cannot say about pair_distill and distilled_contrastive_loss: the published losses, precision,
plans, torch's machinery, threads, wrong arguments."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conformance import cone, distilled, duplicates, features, ids, pairs, permutation, relative_error, with_teacher
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vlpfast.ops import backends
from vlpfast.ops.contrastive import clip_loss, distilled_contrastive_loss, pair_distill
from vlpfast.ops.contrastive.distill import _merged
from vlpfast.ops.flops import FlopCounterMode

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = function(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


def assert_same(found: list[Tensor], expected: list[Tensor], value: float = 1e-12, gradient: float = 1e-11) -> None:
    for i, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        error = relative_error(ours, exact)
        assert error < (value if i == 0 else gradient), f"{'gradient ' * (i > 0)}{i}: relative error {error:.1e}"


# --- the published losses, dense --------------------------------------------------------------------------------------


def dense_side(x: Tensor, x_t: Tensor, keys: Tensor, keys_t: Tensor, queue: Tensor | None, scale, scale_t, alpha) -> Tensor:
    """ALBEF's: queues are concatenated, targets materialised; [N]."""
    if queue is not None:
        keys, keys_t = torch.cat([keys, queue]), torch.cat([keys_t, queue])
    with torch.no_grad():
        targets = alpha * F.softmax(scale_t * x_t @ keys_t.T, 1) + (1 - alpha) * torch.eye(len(x), len(keys)).double()
    return -(F.log_softmax(scale * x @ keys.T, 1) * targets).sum(1)


def dense_loss(x, y, x_t, y_t, scale, alpha, *, scale_t=None, keys="momentum", a=0.5, b=0.5, row_weights=None, col_weights=None,
               row_negatives=None, col_negatives=None) -> Tensor:  # fmt: skip
    scale_t = scale if scale_t is None else scale_t
    total = torch.zeros((), dtype=torch.float64)
    for weight, over, arguments in (
        (a, row_weights, (x, x_t, y if keys == "live" else y_t.detach(), y_t, row_negatives)),
        (b, col_weights, (y, y_t, x if keys == "live" else x_t.detach(), x_t, col_negatives)),
    ):
        losses = dense_side(*arguments, scale, scale_t, alpha)
        over = torch.ones_like(losses) if over is None else over
        total = total + weight * (over * losses).sum() / over.sum()
    return total


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # our options, the dense form's
    "momentum": ({}, {}),
    "live": ({"keys": "live"}, {"keys": "live"}),
    "a scale of its own": ({"keys": "live", "scale_t": 5.0}, {"keys": "live", "scale_t": 5.0}),
    "sum of both": ({"directions": (1, 1)}, {"a": 1, "b": 1}),
    "rows": ({"directions": "rows"}, {"a": 1, "b": 0}),
    "cols, live": ({"directions": "cols", "keys": "live"}, {"a": 0, "b": 1, "keys": "live"}),
    "weights": (
        weights := {"row_weights": torch.linspace(0, 1, 20).double(), "col_weights": torch.linspace(2, 1, 20).double()},
        weights,
    ),
    "queues": (queues := {"row_negatives": unit(70, 9, seed=8), "col_negatives": unit(50, 9, seed=9)}, queues),
    "queues, live": (queues | {"keys": "live"}, queues | {"keys": "live"}),
    "a queue shorter than the batch": (short := {"row_negatives": unit(3, 9, seed=8)}, short),
    "an empty queue": ({"row_negatives": torch.empty(0, 9).double()}, {}),
}


def inputs(n: int = 20, d: int = 9, scale: float = 14.3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, y, x_t, y_t, scale"""
    arguments = with_teacher(pairs(n, n, d, scale=scale, noise=0.7))
    return [arguments[name].to(dtype) for name in ("x", "y", "x_t", "y_t", "scale")]


@BACKENDS
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1, torch.tensor(0.25)])
@pytest.mark.parametrize("form", FORMS)
def test_albef(form: str, alpha: float | Tensor, backend: str) -> None:
    ours, dense = FORMS[form]
    with backends.use(backend):
        found = value_and_gradients(lambda *a: distilled_contrastive_loss(*a, alpha, **ours), *inputs())
    assert_same(found, value_and_gradients(lambda *a: dense_loss(*a, alpha, **dense), *inputs()))
    assert not found[3].any() and not found[4].any()  # the teacher's


def test_tcl() -> None:
    """Cross-modal with soft targets, intra-modal with hard ones (soft ones too, in its retrieval model), each with its queue."""
    v, t, v_t, t_t, scale = inputs()
    image_queue, text_queue, alpha = unit(60, 9, seed=8), unit(60, 9, seed=9), 0.4

    def ours(v: Tensor, t: Tensor, scale: Tensor, alpha_within: float) -> Tensor:
        across = distilled_contrastive_loss(
            v, t, v_t, t_t, scale, alpha, directions=(1, 1), row_negatives=text_queue, col_negatives=image_queue
        )
        within = [
            distilled_contrastive_loss(z, m, m, m, scale, alpha_within, directions="rows", row_negatives=queue)
            for z, m, queue in ((v, v_t, image_queue), (t, t_t, text_queue))
        ]
        return (across + within[0] + within[1]) / 6

    def published(v: Tensor, t: Tensor, scale: Tensor, alpha_within: float) -> Tensor:
        images, texts = torch.cat([v_t, image_queue]).T, torch.cat([t_t, text_queue]).T
        hard = torch.zeros(len(v), images.shape[1]).double().fill_diagonal_(1)
        total = torch.zeros(()).double()
        for z, z_t, keys, a in (
            (v, v_t, texts, alpha),
            (t, t_t, images, alpha),
            (v, v_t, images, alpha_within),
            (t, t_t, texts, alpha_within),
        ):
            with torch.no_grad():
                targets = a * F.softmax(z_t @ keys * scale, 1) + (1 - a) * hard
            total = total - (F.log_softmax(z @ keys * scale, 1) * targets).sum(1).mean()
        return total / 6

    for alpha_within in (0.0, 0.4):
        assert_same(
            value_and_gradients(lambda *a, w=alpha_within: ours(*a, w), v, t, scale),
            value_and_gradients(lambda *a, w=alpha_within: published(*a, w), v, t, scale),
        )


@BACKENDS
def test_dino(backend: str) -> None:
    """One pair of views against trainable prototypes: the teacher's logits are centred and sharper, its prototypes its own."""
    x, prototypes, x_t, prototypes_t, _ = inputs(40)
    centre, temperature, temperature_t = torch.linspace(-0.1, 0.1, 40).double(), 0.1, 0.04

    def ours(x: Tensor, prototypes: Tensor) -> Tensor:
        found = pair_distill(
            x, prototypes, x_t, prototypes_t, 1 / temperature, 1 / temperature_t, own=None, bias_t=-centre / temperature_t
        )
        return (found.student - found.cross).mean()

    def published(x: Tensor, prototypes: Tensor) -> Tensor:
        targets = F.softmax((x_t @ prototypes_t.T - centre) / temperature_t, -1)
        return -(targets * F.log_softmax(x @ prototypes.T / temperature, -1)).sum(-1).mean()

    with backends.use(backend):
        found = value_and_gradients(ours, x, prototypes)
    assert_same(found, value_and_gradients(published, x, prototypes))


def test_without_soft_targets_it_is_clip_loss() -> None:
    x, y, x_t, y_t, scale = inputs()
    queues = {"row_negatives": unit(70, 9, seed=8), "col_negatives": unit(50, 9, seed=9)}
    found = value_and_gradients(lambda x, y, s: distilled_contrastive_loss(x, y, x_t, y_t, s, 0.0, keys="live"), x, y, scale)
    assert_same(found, value_and_gradients(clip_loss, x, y, scale))
    found = value_and_gradients(
        lambda x, y, s: distilled_contrastive_loss(x, y, x_t, y_t, s, 0.0, keys="live", **queues), x, y, scale
    )
    assert_same(found, value_and_gradients(lambda *a: clip_loss(*a, **queues), x, y, scale))


@pytest.mark.parametrize("keys", ["momentum", "live"])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_a_student_that_is_its_teacher_rests(scale: float, keys: str) -> None:
    """At alpha = 1 the loss is least, to rounding, where both are the same."""
    x, y, _, _, scale = inputs(50, 32, scale, torch.float32)
    queue = unit(300, 32, seed=8).float()

    def gradients(alpha: float) -> list[Tensor]:
        loss = lambda x, y: distilled_contrastive_loss(x, y, x.detach(), y.detach(), scale, alpha, keys=keys, row_negatives=queue)  # noqa: E731
        return value_and_gradients(loss, x, y)[1:]

    for rest, unrest in zip(gradients(1.0), gradients(0.0), strict=True):
        assert rest.norm() < 2e-6 * scale / x.shape[0] ** 0.5 and rest.norm() < 1e-4 * unrest.norm()


def test_parts_of_the_columns_merge() -> None:
    """Two calls on parts are one on the whole: what makes a queue, or a shard, cheap."""
    x, y, x_t, y_t, scale = inputs()
    queue = unit(33, 9, seed=8)
    whole = pair_distill(x, torch.cat([y, queue]), x_t, torch.cat([y_t, queue]), scale, 5.0)
    own, more = pair_distill(x, y, x_t, y_t, scale, 5.0), pair_distill(x, queue, x_t, queue, scale, 5.0, own=None)
    for a, b in zip(whole, _merged(own, more, scale * (x * y).sum(1), 5 * (x_t * y_t).sum(1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- precision --------------------------------------------------------------------------------------------------------

REGIMES: dict[str, Callable[[], dict[str, Any]]] = {
    "random": lambda: pairs(200, 200, 64),
    "random, scale 100": lambda: pairs(200, 200, 64, scale=100.0),
    "initial cone": lambda: cone(200, 64),
    "low loss": lambda: pairs(200, 200, 64, noise=0.6, scale=50.0),
    "near-zero loss": lambda: pairs(200, 200, 256, noise=0.3, scale=100.0),
    "near-duplicates": lambda: duplicates(200, 64),
}


@pytest.mark.parametrize("plan", ["one pass", "kept", "made again"])
@pytest.mark.parametrize("regime", REGIMES)
def test_precision_of_the_primitive_in_float32(regime: str, plan: str) -> None:
    arguments = with_teacher(REGIMES[regime]())
    numbers = [arguments[name].float() for name in ("x", "y", "x_t", "y_t", "scale")]
    options = {"stash_bytes": 0} if plan == "made again" else {}

    for i in (0, 2):  # student, cross

        def loss(x: Tensor, y: Tensor, x_t: Tensor, y_t: Tensor, scale: Tensor, i: int = i) -> Tensor:
            y = y.detach() if plan == "one pass" else y
            return pair_distill(x, y, x_t, y_t, scale, scale.detach(), **options)[i].mean()

        with backends.use("reference"):
            expected = value_and_gradients(loss, *[t.double() for t in numbers])
        assert_same(value_and_gradients(loss, *numbers), expected, 1e-6, 1e-5)


@pytest.mark.parametrize("keys", ["momentum", "live"])
@pytest.mark.parametrize("queue", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("regime", REGIMES)
def test_precision_of_the_loss_in_float32(regime: str, alpha: float, queue: bool, keys: str) -> None:
    arguments = with_teacher(REGIMES[regime]())
    numbers = [arguments[name].float() for name in ("x", "y", "x_t", "y_t", "scale")]
    options: dict[str, Any] = {"keys": keys}
    if queue:
        options |= {"row_negatives": unit(300, numbers[0].shape[1], seed=8).float()}

    def loss(*numbers: Tensor) -> Tensor:
        return distilled_contrastive_loss(*numbers, alpha, **options)

    with backends.use("reference"):
        options |= {name: t.double() for name, t in options.items() if isinstance(t, Tensor)}
        expected = value_and_gradients(loss, *[t.double() for t in numbers])
    options |= {name: t.float() for name, t in options.items() if isinstance(t, Tensor)}
    assert_same(value_and_gradients(loss, *numbers), expected, 1e-6, 1e-5)


def test_one_term_that_outweighs_the_others_is_exact() -> None:
    """At scale 100 a float product near 1 is off by 1e-5; that is all of the error where the teacher looks at one column."""
    x, y = unit(60, 512, seed=0), unit(60, 512, seed=1)
    x_t = F.normalize(y.roll(1, 0) + 0.1 * unit(60, 512, seed=2), dim=1)
    x = F.normalize(x + y.roll(1, 0) + y, dim=1)
    numbers = [t.float() for t in (x, y, x_t)] + [torch.tensor(100.0)]

    def cross(x: Tensor, y: Tensor, x_t: Tensor, scale: Tensor) -> Tensor:
        return pair_distill(x, y, x_t, y, scale, 100.0).cross

    with backends.use("reference"):
        expected = cross(*[t.double() for t in numbers])
    assert ((cross(*numbers) - expected).abs() < 2e-7 * expected.abs() + 1e-8).all()


def test_small_gradients_without_subnormal_numbers() -> None:
    x, y, x_t, y_t, scale = inputs(30, 16, dtype=torch.float32)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        found = pair_distill(x, y, x_t.to(x.dtype), y_t.to(x.dtype), scale, 14.3)
        return 1e-33 * (found.student + found.cross).sum()

    with backends.use("reference"):
        expected = value_and_gradients(loss, *[t.double() for t in (x, y, scale)])
    assert torch.set_flush_denormal(True)
    try:
        found = value_and_gradients(loss, x, y, scale)
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, expected, 1e-6, 1e-5)


@pytest.mark.parametrize("own", [2, None, permutation(6, 9), torch.tensor([5, 0, 1, 5, 5, 3])])
def test_gradients_by_finite_differences(own: int | Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, x_t, y_t = (torch.randn(n, 5, generator=generator, dtype=torch.double) for n in (6, 9, 6, 9))
    scale, bias = torch.tensor(2.0, dtype=torch.double, requires_grad=True), torch.linspace(-1, 1, 9).double()
    options = {"own": own, "bias_t": bias, "leave_out": (torch.arange(6) % 4, torch.arange(9) % 4)}

    def both(*leaves: Tensor, x: Tensor, y: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        found = pair_distill(x, y, x_t, y_t, leaves[-1], 1.5, **options, **more)
        return found.student, found.cross

    leaf, keys = x.clone().requires_grad_(), y.clone().requires_grad_()
    for budget in (1 << 20, 400, 0):
        assert torch.autograd.gradcheck(lambda x, y, s, b=budget: both(s, x=x, y=y, stash_bytes=b), (leaf, keys, scale))
    assert torch.autograd.gradcheck(lambda x, s: both(s, x=x, y=y), (leaf, scale))
    assert torch.autograd.gradcheck(lambda y, s: both(s, x=x, y=y), (keys, scale))
    assert torch.autograd.gradcheck(lambda s: both(s, x=x, y=y), (scale,))


# --- plans, threads, memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "budget", "products"),
    [
        ((), 1 << 30, 2), ((0,), 1 << 30, 4), ((4,), 0, 2), ((0, 4), 0, 4), ((2, 3), 0, 2),
        ((0, 1), 1 << 30, 4), ((1,), 1 << 30, 3), ((1, 4), 1 << 30, 3), ((0, 1), 0, 6), ((1,), 0, 5),
    ],
)  # fmt: skip
def test_products_of_each_plan(wanted: tuple[int, ...], budget: int, products: int) -> None:
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs(20, 8))]
    with FlopCounterMode(display=False) as counter:
        found = pair_distill(*leaves, 2.0, stash_bytes=budget)
        if found.student.requires_grad:
            (found.student.sum() + found.cross.sum()).backward()
    assert counter.get_total_flops() == products * 2 * 20 * 20 * 8


def test_the_teacher_is_a_constant() -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    bias = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    for backend in ("cpp", "reference"):
        with backends.use(backend):
            found = pair_distill(*leaves, leaves[4] * 1.5, bias_t=bias)
        assert not found.teacher.requires_grad
        gradients = torch.autograd.grad(
            found.student.sum() + found.cross.sum(), [*leaves[2:4], bias, leaves[0]], allow_unused=True
        )
        assert gradients[:3] == (None,) * 3 and gradients[3] is not None
        assert not pair_distill(*[t.detach() for t in leaves[:2]], *leaves[2:4], 1.0, leaves[4]).student.requires_grad


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(((m, n, d), dtype) for m, n, d in ((1, 1, 1), (5, 1024, 64), (64, 5000, 40), (520, 530, 7)) for dtype in DTYPES),
        (
            (97, 111, 300),
            torch.float32,
        ),  # MKL's own products of this width in double have other bits where it may use two threads
    ],
)
def test_two_threads_give_the_bits_of_one(shape: tuple[int, int, int], dtype: torch.dtype, two_threads: None) -> None:
    m, n, d = shape
    arguments = with_teacher(features(m, n, d) | {"scale": torch.tensor(14.3)})
    x, y, x_t, y_t = (arguments[name].to(dtype) for name in ("x", "y", "x_t", "y_t"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(14.3, dtype=wide)

    def results() -> list[Tensor]:
        out = []
        for keys, keys_t, budget in ((y, y_t, 1 << 30), (y, y_t, m * n * 4), (y, y, 0)):
            for live in (True, False):

                def loss(x: Tensor, y: Tensor, s: Tensor, k=keys_t, b=budget, live=live, one=keys is keys_t) -> Tensor:
                    y = y if live else y.detach()
                    found = pair_distill(x, y, x_t, y if one else k, s, 10.0, stash_bytes=b)
                    return found.student.clamp(-1e3, 1e3).sum() + found.cross.sum()

                out += value_and_gradients(loss, x, keys, scale)
        return out

    on_two = results()
    torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(results(), on_two, strict=True))


class Sizes(TorchDispatchMode):
    """The sizes of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t._base is None and not func.is_view:
                self.largest = max(self.largest, t.numel())
        return out


def test_the_queue_is_read_where_it_lies() -> None:
    """Neither the matrix, nor a copy of the queue, nor anything else that grows with it."""
    x, y, x_t, y_t, scale = (t.float().requires_grad_() for t in inputs(16, 8))
    queue = unit(5000, 8, seed=8).float()
    with Sizes() as sizes:
        loss = distilled_contrastive_loss(x, y, x_t, y_t, scale, 0.4, row_negatives=queue, col_negatives=queue[:4000])
        loss.backward()
    assert 0 < sizes.largest <= 2 * 16 * 8
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


def test_memory_does_not_grow_with_the_matrix() -> None:
    script = """
import resource, torch
from vlpfast.ops.contrastive import pair_distill
torch.set_num_threads(1)
def step(n):
    x, y = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1).requires_grad_() for _ in range(2))
    for keys in (y, y.detach()):
        found = pair_distill(x, keys, x, keys, 10.0, 10.0, stash_bytes=0)
        (found.student.sum() + found.cross.sum()).backward()
step(1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(6144)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(out) < 16  # MiB; each matrix has 144


# --- autograd, function transforms, compilation -----------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.requires_grad_() for t in inputs(12, 5, 10.0, dtype)]


QUEUE = unit(17, 5, seed=8).float()
LOSSES: dict[str, Callable[..., Tensor]] = {
    "momentum": lambda *a: distilled_contrastive_loss(*a, 0.4, row_negatives=QUEUE.to(a[0].dtype)),
    "live": lambda *a: distilled_contrastive_loss(*a, 0.4, keys="live", col_negatives=QUEUE.to(a[0].dtype)),
    "primitive": lambda x, y, x_t, y_t, s: sum(
        (r * torch.linspace(0.5, 1.5, 12)).sum()
        for r in pair_distill(x, y, x_t, y_t, s, 0.7 * s, own=torch.arange(12) // 2, bias_t=torch.linspace(-1, 1, 12),
                              leave_out=(torch.arange(12) % 5,) * 2)
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", LOSSES)


def gradients_of(loss: Tensor, leaves: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True, **options)


@EACH
@pytest.mark.parametrize("wanted", [(0,), (1,), (4,), (0, 4), (1, 4), (0, 1)])
def test_gradients_of_some_inputs_alone(name: str, wanted: tuple[int, ...]) -> None:
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(small())]
    LOSSES[name](*some).backward()
    leaves = small()
    LOSSES[name](*leaves).backward()
    for i in range(5):
        assert (some[i].grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(some[i].grad, leaves[i].grad, rtol=1e-5, atol=1e-6)


def test_gradient_of_one_result_of_two() -> None:
    x, y, x_t, y_t, scale = small()
    for keys in (y, y.detach()):
        parts = [gradients_of(pair_distill(x, keys, x_t, y_t, scale, 5.0)[i].sum(), [x, scale]) for i in (0, 2)]
        both = pair_distill(x, keys, x_t, y_t, scale, 5.0)
        whole = gradients_of(both.student.sum() + both.cross.sum(), [x, scale])
        for a, b, both_ in zip(*parts, whole, strict=True):
            torch.testing.assert_close(a + b, both_)


@EACH
def test_backward_twice_checkpointing_inference(name: str) -> None:
    leaves = small()
    loss = LOSSES[name](*leaves)
    first = gradients_of(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients_of(loss, leaves), strict=True))
    for use_reentrant in (True, False):
        for t in leaves:
            t.grad = None
        checkpoint(LOSSES[name], *leaves, use_reentrant=use_reentrant).backward()
        assert all(torch.equal(a, t.grad if t.grad is not None else 0 * t) for a, t in zip(first, leaves, strict=True))
    with torch.inference_mode():
        assert torch.equal(LOSSES[name](*leaves), loss)


@EACH
@BACKENDS
def test_autocast_casts_features_alone(name: str, backend: str) -> None:
    leaves = small()
    with torch.no_grad():
        leaves[4] += 0.003
    with backends.use(backend):
        expected = LOSSES[name](*[t.bfloat16() for t in leaves[:4]], leaves[4])
        with torch.autocast("cpu", torch.bfloat16):
            found = LOSSES[name](*leaves)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(*(gradients_of(t, leaves) for t in (found, expected)), strict=True))
        doubles = [t.detach().double() for t in leaves]
        with torch.autocast("cpu", torch.bfloat16):
            in_autocast = LOSSES[name](*doubles)
        assert in_autocast.dtype == torch.float64 and torch.equal(in_autocast, LOSSES[name](*doubles))


@EACH
def test_func_grad(name: str) -> None:
    leaves = small()
    expected = gradients_of(LOSSES[name](*leaves), leaves)
    found = torch.func.grad(LOSSES[name], argnums=(0, 1, 2, 3, 4))(*[t.detach() for t in leaves])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_func_jacrev() -> None:
    x, y, x_t, y_t, scale = (t.detach() for t in small(torch.float64))

    def jacobians() -> list[Tensor]:
        return [
            torch.func.jacrev(lambda x: pair_distill(x, y, x_t, y_t, scale, 3.0).cross)(x),
            torch.func.jacrev(lambda y: pair_distill(x, y, x_t, y_t, scale, 3.0).student)(y),
        ]

    with backends.use("reference"):
        expected = jacobians()
    for a, b in zip(jacobians(), expected, strict=True):
        torch.testing.assert_close(a, b)


@EACH
def test_what_the_kernels_cannot_differentiate_is_refused(name: str) -> None:
    leaves = small()
    rest = [t.detach() for t in leaves[1:]]
    again = "second derivatives are made by the reference backend alone"
    for more in (leaves[1:], rest):  # with and without a gradient for y
        (gradient,) = torch.autograd.grad(LOSSES[name](leaves[0], *more), leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=again):
            gradient.sum().backward()
    with pytest.raises(NotImplementedError, match=again):
        torch.func.grad(lambda x: torch.func.grad(LOSSES[name])(x, *rest).sum())(leaves[0].detach())
    with pytest.raises(NotImplementedError, match="under vmap are made by the reference backend alone"):
        torch.func.vmap(lambda x: LOSSES[name](x, *rest))(leaves[0].detach().expand(2, -1, -1))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: LOSSES[name](x, *rest), (leaves[0].detach(),), (leaves[0].detach(),))


def test_second_derivatives_of_the_reference() -> None:
    with backends.use("reference"):
        x, y, x_t, y_t, scale = small(torch.float64)
        more = (x_t.detach(), y_t.detach())

        def cross(x: Tensor, scale: Tensor) -> Tensor:
            return pair_distill(x, y.detach()[:7], more[0], more[1][:7], scale, 3.0, own=None).cross

        assert torch.autograd.gradgradcheck(cross, (x, scale))


@pytest.mark.parametrize(
    ("name", "backend", "dynamic"),
    [("momentum", "cpp", False), ("live", "cpp", True), ("primitive", "cpp", True), ("primitive", "reference", False)],
)
def test_compiles_without_a_break(name: str, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    leaves = small()
    with backends.use(backend):
        expected = LOSSES[name](*leaves)
        found = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager", dynamic=dynamic)(*leaves)
        torch.testing.assert_close(found, expected)
        for a, b in zip(*(gradients_of(t, leaves) for t in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_one_compilation_for_a_ramp_and_one_tensor_on_all_sides() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def function(x: Tensor, alpha: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (
                distilled_contrastive_loss(x, x, x, x, 10.0, alpha, keys="live") + pair_distill(x, x, x, x, 1.0, 1.0).cross.sum()
            )

    x = small()[0]
    for alpha in (0.0, 0.1, 0.4):
        function(x, torch.tensor(alpha)).backward()
        half = x.detach().bfloat16().requires_grad_()
        expected = distilled_contrastive_loss(half, half, half, half, 10.0, alpha, keys="live")
        expected = expected + pair_distill(half, half, half, half, 1.0, 1.0).cross.sum()
        torch.testing.assert_close(function(x, torch.tensor(alpha)), expected)
    assert counter.frame_count == 1 and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, y, x_t, y_t, scale = (t.detach() for t in small())
    x, y, x_t, y_t = x.to(dtype), torch.cat([y, y])[:17].to(dtype), x_t.to(dtype), torch.cat([y_t, y_t])[:17].to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    numbers, bias = (scale.to(wide), 0.7 * scale.to(wide)), torch.linspace(-1, 1, 17).to(wide)
    left_out = torch.arange(12) % 5, torch.arange(17) % 5
    for keep, needed, tensors in (
        (1 << 30, (True, True), (x, y, x_t[:, :3], y_t[:, :3], *numbers, bias, torch.arange(12) // 2, None, *left_out)),
        (100, (False, True), (x, y, x_t, None, *numbers, None, None, 3, None, None)),
        (0, (True, False), (x, y, x_t, None, *numbers, None, None, None, None, None)),
    ):
        torch.library.opcheck(torch.ops.vlpfast.pair_distill_fwd, (*tensors, keep == 0, keep))
        student, _, cross, stats, slopes, stash = torch.ops.vlpfast.pair_distill_fwd(*tensors, False, keep)
        assert slopes.shape == (0, 12, 5) and stash.shape == (min(keep, 2 * 12 * 17),)
        gradients = torch.ones_like(student), torch.ones_like(cross)
        torch.library.opcheck(torch.ops.vlpfast.pair_distill_bwd, (*gradients, *tensors, stats, stash, *needed))


def test_meta_tensors_take_shape_only() -> None:
    x, y = torch.empty(7, 3, device="meta"), torch.empty(9, 3, device="meta", dtype=torch.bfloat16)
    x_t, y_t = (torch.empty(n, 4, device="meta") for n in (7, 9))
    found = pair_distill(x, y, x_t, y_t, 1.0, 2.0, bias_t=torch.empty(9, device="meta"))
    assert all(t.is_meta and t.shape == (7,) and t.dtype == torch.float32 for t in found)
    assert distilled_contrastive_loss(x, x, x, x, 1.0, 0.4, row_negatives=y).is_meta


# --- dtypes, bad numbers, wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_meet_in_the_widest(dtype: torch.dtype) -> None:
    x, y, x_t, y_t, scale = small()
    half = x.detach().to(dtype).requires_grad_()
    found = pair_distill(half, y, x_t, y_t.double(), scale, 5.0)
    assert found.student.dtype == torch.float64
    found.cross.sum().backward()
    assert half.grad.dtype == dtype
    queue = QUEUE.to(dtype)
    loss = distilled_contrastive_loss(x, y, x_t, y_t, scale, 0.4, row_negatives=queue)
    assert torch.equal(loss, distilled_contrastive_loss(x, y, x_t, y_t, scale, 0.4, row_negatives=queue.float()))


def test_nothing_costs_nothing() -> None:
    for arguments in (distilled(0, 5, 4), distilled(1, 5, 0)):
        leaves = [arguments[name].float().requires_grad_() for name in ("x", "y", "x_t", "y_t", "scale")]
        queues = {name: arguments[name].float() for name in ("row_negatives", "col_negatives")}
        for backend in ("cpp", "reference"):
            with backends.use(backend):
                loss = distilled_contrastive_loss(*leaves, 0.4, **queues)
                assert loss == 0 and not any(g.any() for g in gradients_of(loss, leaves))


@pytest.mark.parametrize("where", ["x", "y", "x_t", "y_t", "scale", "scale_t", "bias_t"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_reach_the_results(where: str, bad: float) -> None:
    for own in (0, None):
        arguments = with_teacher(pairs(20, 30, 6)) | {"bias_t": torch.zeros(30), "scale_t": torch.tensor(5.0)}
        arguments = {name: t.float() for name, t in arguments.items()}
        arguments[where].view(-1)[-1] = bad
        x = arguments["x"].requires_grad_()
        for keys in (arguments["y"], arguments["y"].clone().requires_grad_()):
            student, teacher, cross = pair_distill(**(arguments | {"y": keys}), own=own)
            reached = (student,) if where in ("x", "y", "scale") else (teacher, cross)
            assert not any(t.isfinite().all() for t in reached) or (where == "bias_t" and bad == math.inf)
            (gradient,) = torch.autograd.grad(student.sum() + cross.sum(), x)
            assert not gradient.isfinite().all()


@pytest.mark.parametrize("where", range(5))
@EACH
def test_a_nan_makes_the_loss_nan(name: str, where: int) -> None:
    leaves = [t.detach().clone() for t in small()]
    leaves[where].view(-1)[-1] = math.nan
    assert LOSSES[name](*leaves).isnan()


WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "x: expected a tensor, got list": (TypeError, {"x": [[1.0]]}),
    "y: expected width 3 as x has, got 4": (ValueError, {"y": torch.ones(6, 4)}),
    "x_t: expected a tensor, got NoneType": (TypeError, {"x_t": None}),
    "x_t: expected float32, float64, bfloat16 or float16, got torch.int64": (TypeError, {"x_t": torch.ones(4, 5).long()}),
    r"x_t: expected shape \[4, width\], got \(5, 5\)": (ValueError, {"x_t": torch.ones(5, 5)}),
    r"y_t: expected shape \[6, width\], got \(6,\)": (ValueError, {"y_t": torch.ones(6)}),
    "y_t: expected width 5 as x_t has, got 4": (ValueError, {"y_t": torch.ones(6, 4)}),
    "y_t: expected device cpu as x has, got meta": (ValueError, {"y_t": torch.ones(6, 5, device="meta")}),
    "scale: expected a float or a 0-d tensor, got str": (TypeError, {"scale": "1"}),
    "scale_t: expected a finite number >= 0, got -1.0": (ValueError, {"scale_t": -1.0}),
    "scale_t: expected a 0-d tensor, got 1 dimensions": (ValueError, {"scale_t": torch.ones(4)}),
    r"own: expected an offset in \[0, N - M\] with M = 4 rows of x and N = 6 rows of y, got 3": (ValueError, {"own": 3}),
    r"own: expected columns in \[0, 6\), got 0 to 6": (ValueError, {"own": torch.tensor([0, 1, 2, 6])}),
    "leave_out: expected a pair": (TypeError, {"leave_out": torch.arange(4)}),
    "bias_t: expected a vector of length 6": (ValueError, {"bias_t": torch.ones(4)}),
    "stash_bytes: expected >= 0, got -1": (ValueError, {"stash_bytes": -1}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, wrong = WRONG[message]
    right = {"x": torch.ones(4, 3), "y": torch.ones(6, 3), "x_t": torch.ones(4, 5), "y_t": torch.ones(6, 5)}
    with pytest.raises(error, match=message):
        pair_distill(**({**right, "scale": 1.0, "scale_t": 1.0} | wrong))


WRONG_LOSS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "y: expected as many rows as x, 4, got 6": (ValueError, {"y": torch.ones(6, 3)}),
    r"x_t: expected shape \[4, width\], got \(5, 3\)": (ValueError, {"x_t": torch.ones(5, 3)}),
    r"y_t: expected shape \[rows, 3\] beside x, got \(4, 5\)": (ValueError, {"y_t": torch.ones(4, 5)}),
    r"row_negatives: expected shape \[rows, 3\] beside x, got \(3, 8\)": (ValueError, {"row_negatives": torch.ones(3, 8)}),
    "col_negatives: expected float32, float64, bfloat16 or float16, got torch.int32": (
        TypeError,
        {"col_negatives": torch.ones(8, 3).int()},
    ),
    "col_negatives: expected device cpu as x has, got meta": (ValueError, {"col_negatives": torch.ones(8, 3, device="meta")}),
    "row_negatives: expected a tensor, got list": (TypeError, {"row_negatives": []}),
    "row_negatives: has no effect on the directions asked for": (
        ValueError,
        {"row_negatives": torch.ones(8, 3), "directions": "cols"},
    ),
    "col_weights: expected a vector of length 4": (ValueError, {"col_weights": torch.ones(5)}),
    r"alpha: expected a number in \[0, 1\], got 1.5": (ValueError, {"alpha": 1.5}),
    "alpha: expected a number or a 0-d tensor, got True": (TypeError, {"alpha": True}),
    "alpha: expected a number or a 0-d tensor, got nan": (TypeError, {"alpha": math.nan}),
    "alpha: expected a 0-d tensor, got 1 dimensions": (ValueError, {"alpha": torch.ones(4)}),
    "keys: expected 'momentum' or 'live', got 'queue'": (ValueError, {"keys": "queue"}),
    "directions: expected 'both', 'rows', 'cols' or two weights": (ValueError, {"directions": "all"}),
}


@pytest.mark.parametrize("message", WRONG_LOSS)
def test_wrong_arguments_of_the_loss_are_named(message: str) -> None:
    error, wrong = WRONG_LOSS[message]
    with pytest.raises(error, match=message):
        distilled_contrastive_loss(
            **({name: torch.ones(4, 3) for name in ("x", "y", "x_t", "y_t")} | {"scale": 1.0, "alpha": 0.4} | wrong)
        )


def test_the_kernel_checks_what_only_it_can_see() -> None:
    """Compiled code skips the checks of values: an index out of range must not become a read or write out of range."""
    x, y, scale = torch.ones(4, 3), torch.ones(6, 3), torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="got 8589934592"):  # would be 0 if the offset were read as an int32
        torch.ops.vlpfast.pair_distill_fwd(x, y, x, None, scale, scale, None, None, 2**33, None, None, True, 0)
    with pytest.raises(RuntimeError, match=r"expected columns in \[0, 6\), got 7"):
        own = torch.tensor([0, 1, 1, 7])
        torch.ops.vlpfast.pair_distill_fwd(x, y, x, None, scale, scale, None, own, None, None, None, True, 0)
    with pytest.raises(RuntimeError, match="expected the teacher's x_t and y_t to have 4 and 6 rows, got 4 and 5"):
        torch.ops.vlpfast.pair_distill_fwd(x, y, x, y[:5], scale, scale, None, None, None, None, None, False, 0)
    with pytest.raises(RuntimeError, match="expected 4 and 6 ids, got 4 and 5"):
        torch.ops.vlpfast.pair_distill_fwd(x, y, x, None, scale, scale, None, None, None, *ids(4, 5, 3), False, 2**40)
