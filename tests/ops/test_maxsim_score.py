"""The loss of scores as one operator: score_ce_fwd beyond the conformance table; how many kernels a step of late interaction is.

Without a GPU the Triton kernels run in Triton's interpreter (tests/conftest.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import mask, relative_error, scores, token_sets
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.maxsim import filip_loss, maxsim, score_contrastive_loss
from vlpfast.ops.maxsim.score import ScoreCE

needs_triton = pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")
pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
KERNELS = ["cpp", pytest.param("triton", marks=[needs_triton, *[pytest.mark.gpu] * torch.cuda.is_available()])]
if not backends.available()["triton"]:
    from vlpfast.ops import _triton
    from vlpfast.ops.maxsim import triton_gradient, triton_kernels, triton_score, triton_sets

ROOT = Path(__file__).parents[2]
SMOOTH, WEIGHTS = torch.linspace(0, 0.5, 19).double(), torch.linspace(0, 3, 19).double()
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"directions": "rows", "label_smoothing": 0.1},
    "cols": {"directions": "cols", "col_weights": WEIGHTS},
    "all": {"directions": (0.3, 1.5), "label_smoothing": SMOOTH, "row_weights": WEIGHTS, "col_weights": WEIGHTS.flip(0)},
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def inputs(n: int = 19, dtype: torch.dtype = torch.float32, device: str = "cpu", **more: Any) -> list[Tensor]:
    return [t.to(device, dtype).requires_grad_() for t in scores(n, n, **more).values()]


def moved(options: dict[str, Any], device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: o.to(device, dtype) if isinstance(o, Tensor) else o for name, o in options.items()}


def on(backend: str, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """The loss, and its gradients for those that have one."""
    device = backends.device_type(backend)
    leaves = [t.detach().to(device).requires_grad_() for t in leaves]
    with backends.use(backend):
        loss = score_contrastive_loss(*leaves, **moved(options, device, leaves[0].dtype))
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach().cpu(), *[g.cpu() for g in gradients if g is not None]]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", OPTIONS)
def test_both_forms_agree(name: str, backend: str) -> None:
    """The operator, torch's operators (the reference, and labels in which every id occurs once)."""
    leaves = inputs(dtype=torch.float64)
    expected = on("reference", leaves, **OPTIONS[name])
    for found in (
        on(backend, [t.float() for t in leaves], **OPTIONS[name]),
        on("cpp", leaves, **OPTIONS[name]),
        by_labels(leaves, **OPTIONS[name]),
    ):
        for ours, exact in zip(found, expected, strict=True):
            assert relative_error(ours, exact) < (3e-6 if ours.dtype == torch.float32 else 1e-13)


def by_labels(leaves: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    loss = score_contrastive_loss(*leaves, labels=(torch.arange(19), torch.arange(19)), **options)
    return [loss.detach(), *(g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None)]


@pytest.mark.parametrize("backend", KERNELS)
def test_cross_entropy_over_several_blocks(backend: str) -> None:
    """Scores that rise and fall along a line, and the own one in every block."""
    own = 290
    rising = torch.linspace(-1, 1, 300, dtype=torch.float64)
    s = torch.stack([rising, rising.flip(0), rising.sin(), rising.roll(130), rising.square()]).requires_grad_()
    leaves = s, torch.tensor(40.0, dtype=torch.float64, requires_grad=True)
    for target in (0, 127, 130, own):
        rows = s[:, torch.arange(300).roll(own - target)] if target != own else s
        labels = torch.arange(5) + own
        exact = F.cross_entropy(leaves[1] * rows, labels, label_smoothing=0.2)
        with backends.use(backend):
            ours, scale = (t.to(backends.device_type(backend), torch.float32) for t in (rows, leaves[1]))
            loss = score_contrastive_loss(ours, ours, scale, directions="rows", own=own, label_smoothing=0.2)
            found = loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)
        for f, e in zip(found, (exact.detach(), *torch.autograd.grad(exact, leaves, retain_graph=True)), strict=True):
            assert relative_error(f.cpu(), e) < 5e-6


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("scale", [30.0, 70.0])
def test_exact_near_its_minimum(scale: float, backend: str) -> None:
    """Losses down to 1e-29, each element of the gradients by itself."""
    leaves = [torch.eye(8), torch.eye(8), torch.tensor(scale)]
    expected = on("reference", [t.double() for t in leaves])
    assert 1e-31 < expected[0] < 1e-11
    for ours, exact in zip(on(backend, leaves), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=0)


def test_gradients_by_finite_differences() -> None:
    for options in OPTIONS.values():
        options = {name: o[:5] if isinstance(o, Tensor) else o for name, o in options.items()}
        leaves = inputs(5, torch.float64)
        used = leaves if not isinstance(options.get("directions"), str) else [leaves[options["directions"] == "cols"], leaves[2]]

        def loss(*of: Tensor, options: dict[str, Any] = options) -> Tensor:
            x_to_y, y_to_x, scale = of if len(of) == 3 else (of[0], of[0], of[1])
            return score_contrastive_loss(x_to_y, y_to_x, scale, **options)

        with backends.use("cpp"):
            assert torch.autograd.gradcheck(loss, used)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_nan_reaches_the_loss(argument: int, backend: str) -> None:
    for place in (0, -1):
        leaves = inputs()
        with torch.no_grad():
            leaves[argument].view(-1)[place] = torch.nan
        found, expected = on(backend, leaves), on("reference", leaves)
        assert found[0].isnan()
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")
@pytest.mark.parametrize("backend", KERNELS)
def test_infinite_scores(backend: str) -> None:
    """-inf, as a mask gives it, is a candidate without share; +inf is an infinite loss."""
    x_to_y, _, scale = (t.detach() for t in inputs())
    x_to_y[:, 3] = -torch.inf
    x_to_y[3, 3] = 1.0
    device = backends.device_type(backend)

    def loss_and_gradient(backend: str, device: str) -> tuple[Tensor, Tensor]:
        leaf = x_to_y.to(device, copy=True).requires_grad_()
        with backends.use(backend):
            loss = score_contrastive_loss(leaf, leaf, scale.to(device), directions="rows")
        return loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()

    for ours, theirs in zip(loss_and_gradient(backend, device), loss_and_gradient("reference", "cpu"), strict=True):
        assert theirs.isfinite().all() and relative_error(ours, theirs) < 3e-6
    x_to_y[5, 7] = torch.inf
    assert loss_and_gradient(backend, device)[0] == torch.inf


@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_beyond_32_bits(backend: str) -> None:
    row, device = 1 << 30, backends.device_type(backend)
    far = torch.empty(2 * row + 64, device=device).as_strided((3, 8), (row, 1))  # pages stay untouched
    near = scores(3, 8)["x_to_y"].to(device, torch.float32)
    far.copy_(near)
    with backends.use(backend):
        for turned in (False, True):
            found, expected = (
                score_contrastive_loss(t[:, :3].T if turned else t, t[:, :3].T if turned else t, 5.0, directions="rows")
                for t in (far, near)
            )
            assert torch.equal(found, expected)


def test_two_threads_give_the_bits_of_one(two_threads: None) -> None:
    leaves = inputs(133)
    on_two = on("cpp", leaves, label_smoothing=0.1)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(on("cpp", leaves, label_smoothing=0.1), on_two, strict=True))


# --- torch's machinery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_gradients_of_some_inputs_alone(wanted: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    right = ScoreCE.apply
    monkeypatch.setattr(ScoreCE, "apply", lambda *arguments: (made.append(right(*arguments)[1]), right(*arguments))[1])
    leaves = inputs(device=backends.device_type(backend))
    everything = on(backend, leaves)[1:]
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
    with backends.use(backend):
        loss = score_contrastive_loss(*some)
    assert made[-1].numel() == 361 * sum(i in wanted for i in (0, 1)) + (2 in wanted)
    if wanted:
        loss.backward()
    for i, (leaf, expected) in enumerate(zip(some, everything, strict=True)):
        assert (leaf.grad is not None) == (i in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad.cpu(), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_autograd_and_function_transforms(backend: str) -> None:
    leaves = inputs(device=backends.device_type(backend))
    with backends.use(backend):
        loss = score_contrastive_loss(*leaves)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        tripled = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
        for a, b, c in zip(first, tripled, again, strict=True):
            torch.testing.assert_close(3 * a, b, rtol=1e-6, atol=0)
            assert torch.equal(a, c)
        plain = [t.detach() for t in leaves]
        found = torch.func.grad(score_contrastive_loss, argnums=(0, 1, 2))(*plain)
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
        twice = torch.autograd.grad(score_contrastive_loss(leaves[0], leaves[0], leaves[2]), leaves[0])[0]
        halves = torch.autograd.grad(score_contrastive_loss(leaves[0], leaves[0].detach(), leaves[2]), leaves[0])[0]
        other = torch.autograd.grad(score_contrastive_loss(leaves[0].detach(), leaves[0], leaves[2]), leaves[0])[0]
        assert torch.equal(twice, halves + other)
        (gradient,) = torch.autograd.grad(score_contrastive_loss(*leaves), leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives are made by the reference backend alone"):
            gradient.square().sum().backward()
        with pytest.raises(NotImplementedError, match="second derivatives are made by the reference backend alone"):
            torch.func.grad(lambda x: torch.func.grad(score_contrastive_loss)(x, *plain[1:]).sum())(plain[0])
        with pytest.raises(NotImplementedError, match="under vmap are made by the reference backend alone"):
            torch.func.vmap(lambda x: score_contrastive_loss(x, x, 5.0))(plain[0].expand(2, -1, -1))
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(lambda x: score_contrastive_loss(x, *plain[1:]), (plain[0],), (plain[0],))
        with torch.autocast(plain[0].device.type, torch.bfloat16):
            assert torch.equal(score_contrastive_loss(*leaves), loss)
            half = score_contrastive_loss(leaves[0].bfloat16(), leaves[1], leaves[2])
        assert half.dtype == torch.float32
        assert torch.equal(half, score_contrastive_loss(leaves[0].bfloat16().float(), *leaves[1:]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_jacobians_and_second_derivatives_of_the_reference() -> None:
    x_to_y, y_to_x, scale = (t.detach() for t in inputs(4, torch.float64))

    def losses(x: Tensor) -> Tensor:
        return torch.stack([score_contrastive_loss(x, y_to_x, scale), score_contrastive_loss(y_to_x, x, scale)])

    with backends.use("reference"):
        expected = torch.func.jacrev(losses)(x_to_y)
        assert torch.autograd.gradgradcheck(score_contrastive_loss, inputs(4, torch.float64))
    torch.testing.assert_close(torch.func.jacrev(losses)(x_to_y), expected)


@pytest.mark.parametrize("name", ["label_smoothing", "row_weights", "col_weights"])
def test_what_the_operator_has_no_gradient_for(name: str) -> None:
    """Smoothing and weights that want one take torch's operators; inside of a transform that hides this they are refused."""
    numbers = torch.linspace(0.1, 0.9, 19, dtype=torch.float64)
    leaves, wanted = inputs(dtype=torch.float64), numbers.clone().requires_grad_()
    found = score_contrastive_loss(*leaves, **{name: wanted})
    torch.testing.assert_close(found, score_contrastive_loss(*leaves, **{name: numbers}), rtol=1e-13, atol=0)

    def loss(numbers: Tensor) -> Tensor:
        return score_contrastive_loss(*(t.detach() for t in leaves), **{name: numbers})

    assert torch.autograd.gradcheck(loss, numbers[:19].clone().requires_grad_())
    torch.testing.assert_close(torch.func.grad(loss)(numbers), torch.autograd.grad(found, wanted)[0])
    arguments = {"label_smoothing": None, "row_weights": None, "col_weights": None} | {name: wanted}
    refused = ScoreCE.apply("cpp", *leaves, *arguments.values(), 0, 0.0, 0.5, 0.5, True, True, True)[0]
    with pytest.raises(NotImplementedError, match="gradients of label_smoothing and of weights are made by the reference"):
        refused.backward()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool, backend: str) -> None:
    torch._dynamo.reset()
    device = backends.device_type(backend)
    leaves, options = inputs(device=device), moved(OPTIONS["all"], device)

    def function(x_to_y: Tensor, y_to_x: Tensor, scale: Tensor) -> Tensor:
        some = score_contrastive_loss(x_to_y[:7], x_to_y[:7], 5.0, directions="rows", own=3)
        return score_contrastive_loss(x_to_y, y_to_x, scale.exp() / 1e5, **options) + some + 2 * gloria(x_to_y)

    def gloria(s: Tensor) -> Tensor:
        return score_contrastive_loss(s, s, 10.0, row_weights=options["row_weights"], col_weights=options["row_weights"])

    with backends.use(backend):
        expected = function(*leaves)
        found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*leaves)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str) -> None:
    operator = torch.ops.vlpfast.score_ce_fwd if backend == "cpp" else torch.ops.vlpfast.score_ce_fwd_triton
    x_to_y, y_to_x, scale = (t.detach() for t in inputs(device=backends.device_type(backend)))
    numbers = torch.linspace(0, 1, 19, device=scale.device)
    for arguments in (
        (x_to_y, y_to_x.T, scale, numbers, numbers, None, 0, 0.0, 0.5, 0.5, True, True, True),
        (x_to_y[:5], None, scale, None, None, None, 3, 0.1, 1.0, 0.0, True, False, False),
        (None, y_to_x, scale, scale, None, numbers, 0, 0.0, 0.0, 1.0, False, False, True),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
        with FlopCounterMode(display=False) as counter:
            operator(*arguments)
        assert counter.get_total_flops() == 0


def test_the_kernel_checks_what_only_it_can_see() -> None:
    s, scale = torch.ones(4, 6), torch.tensor(1.0)
    rest = (0.1, 1.0, 0.0, True, False, True)
    operator = torch.ops.vlpfast.score_ce_fwd
    with pytest.raises(RuntimeError, match=r"offset in \[0, 2\], got 8589934592"):  # would be 0 if it were read as an int32
        operator(s, None, scale, None, None, None, 2**33, *rest)
    with pytest.raises(RuntimeError, match="expected scores of dtype Float, got Double"):
        operator(s.double(), None, scale, None, None, None, 0, *rest)
    with pytest.raises(RuntimeError, match="row_weights: expected 4 numbers, got 6"):
        operator(s, None, scale, None, torch.ones(6), None, 0, *rest)
    with pytest.raises(RuntimeError, match="smoothing: expected 4 numbers, got 6"):
        operator(s, None, scale, torch.ones(6), None, None, 0, *rest)
    with pytest.raises(RuntimeError, match="expected x_to_y or y_to_x, got neither"):
        operator(None, None, scale, None, None, None, 0, *rest)


# --- launches ---------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """The names of torch's operators that read or write memory, those inside the project's own operators included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        free = "empty", "new_empty", "detach", "promote_types"
        if function.namespace == "aten" and not function.is_view and function.overloadpacket.__name__ not in free:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Counted:
    """Inside: the kernels that are launched and torch's operators, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels: list[str] = []
        self.operators = Operators()
        for module in (triton_kernels, triton_gradient, triton_score, triton_sets):
            monkeypatch.setattr(module, "launch", self.launch)
        for module, name in ((triton_kernels, "forward"), (triton_kernels, "backward"), (triton_score, "forward")):
            monkeypatch.setattr(module, name, self.listening(getattr(module, name)))

    def launch(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        before = len(self.operators.names)
        _triton.launch(kernel, grid, **arguments)
        del self.operators.names[before:]  # the interpreter's own
        if 0 not in grid:
            self.kernels.append(kernel.__name__)

    def listening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A mode is off inside of an operator that it was told of."""

        def inside(*arguments: Any) -> Any:
            with self.operators:
                return function(*arguments)

        return inside

    def step(self, loss: Callable[..., Tensor], *leaves: Tensor) -> tuple[list[str], list[str]]:
        self.kernels.clear()
        self.operators.names.clear()
        with backends.use("triton"), self.operators:
            torch.autograd.grad(loss(*leaves), leaves)
        return list(self.kernels), list(self.operators.names)


def colbert_loss(x: Tensor, y: Tensor, scale: Tensor, y_mask: Tensor | None = None) -> Tensor:
    s = maxsim(x, y, None, y_mask, directions="x_to_y", reduction="sum")
    return score_contrastive_loss(s, s, scale, directions="rows")


def step_inputs(device: str, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> list[Tensor]:
    sets = token_sets(x_shape, y_shape)
    return [t.to(device, torch.float32).requires_grad_() for t in (sets["x"], sets["y"], torch.tensor(14.3))]


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is counted is the same, in the interpreter alone")
def test_how_many_kernels_a_step_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: five or six of ours and four of torch's (places of both sides' sets; one and its product, backward).

    The number does not depend on how many sets there are. Sets longer than a tile of rows take one more, both ways two, and a
    mask two in the backward (with longer sets one in the forward too).
    """
    counted = Counted(monkeypatch)
    score, back = ["_score_ce", "_add_lines"], ["_gradient", "_gradient"]
    plain = ["arange", "arange", "ones_like", "mul"]
    for sets in (3, 9):
        leaves = step_inputs("cpu", (sets, 32, 4), (sets, 80, 4))
        assert counted.step(colbert_loss, *leaves) == (["_forward", *score, *back], plain)
        assert counted.step(filip_loss, *leaves) == (["_forward", *score, "_weights", *back], plain)
    y_mask = mask(3, 80)
    found = counted.step(lambda *t: colbert_loss(*t, y_mask), *step_inputs("cpu", (3, 32, 4), (3, 80, 4)))
    assert found == (["_forward", *score, "_count_kept", "_weights", *back], plain)
    leaves = step_inputs("cpu", (2, 197, 4), (2, 77, 4))
    assert counted.step(colbert_loss, *leaves) == (["_forward", "_finish", *score, *back], plain)
    assert counted.step(filip_loss, *leaves) == (["_forward", "_merge", "_finish", *score, "_weights", *back], plain)


@needs_triton
@pytest.mark.parametrize(("sets", "p", "t"), [(32, 32, 80), (128, 32, 300)])
def test_launches_at_the_sizes_of_training(sets: int, p: int, t: int) -> None:
    """What would be launched on a GPU, by size: nothing in chunks."""
    x, y = (torch.empty(sets * length, 128, dtype=torch.bfloat16, device="meta") for length in (p, t))
    start, scale = torch.empty(sets + 1, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
    for both, mean in ((False, False), (True, True)):
        problem = x, y, start, start, None, None, p, t, None
        with _triton.recording("sm_90") as launches:
            x_to_y, y_to_x, *winners = triton_kernels.forward(*problem, True, both, mean, False, True)
            second = y_to_x if both else None
            triton_score.forward(x_to_y, second, scale, None, None, None, 0, 0.0, 0.5, 0.5, True, both, True)
            triton_kernels.backward(x_to_y, second, *problem, mean, False, *winners, True, True)
        names = [launch.kernel.__name__ for launch in launches]
        assert names == ["_forward", "_score_ce", "_add_lines", *["_weights"] * mean, "_gradient", "_gradient"]


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", [colbert_loss, filip_loss])
def test_a_step_is_captured_into_a_graph(loss: Callable[..., Tensor], masked: bool) -> None:
    """Forward, loss and backward, replayed on new numbers in the same memory."""
    y_mask = mask(32, 80).cuda() if masked else None
    masks = (None, y_mask) if loss is filip_loss else (y_mask,)
    leaves = step_inputs("cuda", (32, 32, 64), (32, 80, 64))

    def step() -> tuple[Tensor, ...]:
        value = loss(*leaves, *masks)
        return value.detach(), *torch.autograd.grad(value, leaves)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in (1, 2):
        new = token_sets((32, 32, 64), (32, 80, 64), seed)
        with torch.no_grad():
            for leaf, numbers in zip(leaves, (new["x"], new["y"], torch.tensor(5.0 * seed)), strict=True):
                leaf.copy_(numbers)
            if y_mask is not None:
                y_mask.copy_(mask(32, 80, seed=seed + 5))
        graph.replay()
        found = [t.clone() for t in results]
        assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))
        with backends.use("reference"):
            value, *_, dscale = step()
        assert relative_error(found[0], value) < 1e-4 and relative_error(found[-1], dscale) < 1e-4


# --- compiled ahead of time -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="waits for Triton's NVIDIA tools, on Linux alone")
@needs_triton
def test_the_kernels_compile_without_spills() -> None:
    command = [sys.executable, "benchmarks/compiled_kernels.py", "--only", "score_contrastive_loss", "--chip", "sm_80"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [k["kernel"] for k in kernels] == ["score_ce", "add_lines", "score_ce"]
    assert all(k["spills"] == 0 and k["registers"] <= 255 for k in kernels)
