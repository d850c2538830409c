"""linear_cross_entropy and token_logprob against torch's cross_entropy on the whole matrix of logits, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import relative_error
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vlpfast.ops import backends, debug
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy, token_logprob

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")

Arguments = dict[str, Any]
DIFFERENTIABLE = ("h", "weight", "bias", "weights")
KEPT, IGNORED = slice(0, None, 2), slice(1, None, 2)


def normal(*shape: int, seed: int) -> Tensor:
    """Numbers that float32 holds, in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def problem(*tokens: int, v: int, d: int, ignored: float = 0.4, scale: float = 1.0, **more: Any) -> Arguments:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(v, tokens, generator=generator)
    labels = torch.where(torch.rand(tokens, generator=generator) < ignored, more.get("ignore_index", -100), labels)
    return {"h": scale * normal(*tokens, d, seed=0), "weight": normal(v, d, seed=1) / d**0.5, "labels": labels} | more


def dense(h, weight, labels, *, bias=None, ignore_index=-100, label_smoothing=0.0, weights=None, reduction="mean") -> Tensor:
    """torch's cross_entropy, weighted by hand; 0 where nothing is kept."""
    logits = h @ weight.T if bias is None else h @ weight.T + bias
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    losses = F.cross_entropy(logits.reshape(-1, weight.shape[0]), labels.reshape(-1), **options).reshape(labels.shape)
    factors = (labels != ignore_index).to(losses.dtype) * (1 if weights is None else weights)
    total = (factors * losses).sum()
    return {"none": factors * losses, "sum": total, "mean": total / (factors.sum() if factors.any() else 1)}[reduction]


def value_and_gradients(function: Callable[..., Tensor], arguments: Arguments, dtype: torch.dtype) -> list[Tensor]:
    """h and weight in `dtype`, bias and weights in the accumulating one; gradients of a weighted sum. Layouts stay."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves, given = {}, dict(arguments)
    for name in DIFFERENTIABLE:
        if name in arguments:
            t = arguments[name]
            base = (t if t._base is None else t._base).to(dtype if name in ("h", "weight") else wide)
            leaves[name] = base.detach().requires_grad_()
            given[name] = leaves[name].as_strided(t.shape, t.stride(), t.storage_offset())
    value = function(**given)
    assert value.dtype == wide
    total = (value * torch.linspace(0.5, 1.5, value.numel(), dtype=wide).reshape(value.shape)).sum()
    return [value.detach(), *torch.autograd.grad(total, list(leaves.values()))]


def tied(arguments: Arguments, d: int) -> Arguments:
    """The weight as every second row of a transposed table, h transposed too."""
    v, tokens = arguments["weight"].shape[0], arguments["h"].shape[:2]
    return arguments | {
        "h": normal(tokens[1], tokens[0], d, seed=5).transpose(0, 1),
        "weight": normal(d, 2 * v, seed=6).T[::2],
        "labels": arguments["labels"].repeat_interleave(2, 1)[:, ::2],
    }


BIAS = {"bias": torch.linspace(-2, 1, 11).float().double()}
WEIGHTS = {"weights": torch.linspace(0, 2, 15).reshape(3, 5).float().double()}
CASES: dict[str, Callable[[], Arguments]] = {
    "plain": lambda: problem(3, 5, v=11, d=7),
    "one token, without dimensions": lambda: problem(v=11, d=7, ignored=0),
    "one class": lambda: problem(3, 5, v=1, d=7),
    "one class, smoothing, bias": lambda: problem(3, 5, v=1, d=7, label_smoothing=0.3, bias=torch.ones(1).double()),
    "two classes, width 1": lambda: problem(3, 5, v=2, d=1),
    "width 0": lambda: problem(3, 5, v=11, d=1) | {"h": normal(3, 5, 0, seed=0), "weight": normal(11, 0, seed=1)} | BIAS,
    "primes": lambda: problem(7, 19, v=257, d=31),
    "few classes": lambda: problem(131, v=5, d=8),
    "many classes": lambda: problem(5, v=1031, d=8),
    "many tokens": lambda: problem(2203, v=17, d=3, ignored=0.05),
    "four dimensions": lambda: problem(2, 3, 1, 5, v=11, d=7),
    "no tokens": lambda: problem(0, v=11, d=7, label_smoothing=0.1) | BIAS,
    "no tokens in three dimensions": lambda: problem(3, 0, 2, v=11, d=7, reduction="none"),
    "none ignored": lambda: problem(3, 5, v=11, d=7, ignored=0),
    "all ignored": lambda: problem(3, 5, v=11, d=7, ignored=1, label_smoothing=0.1) | BIAS | WEIGHTS,
    "all ignored, none": lambda: problem(3, 5, v=11, d=7, ignored=1, reduction="none"),
    "a class is ignored": lambda: problem(3, 5, v=11, d=7, ignore_index=4, label_smoothing=0.1),
    "ignored beyond the classes": lambda: problem(3, 5, v=11, d=7, ignore_index=11),
    "sum": lambda: problem(3, 5, v=11, d=7, reduction="sum"),
    "none": lambda: problem(3, 5, v=11, d=7, reduction="none"),
    "bias": lambda: problem(3, 5, v=11, d=7) | BIAS,
    "smoothing": lambda: problem(3, 5, v=11, d=7, label_smoothing=0.1),
    "smoothing 1, an int": lambda: problem(3, 5, v=11, d=7, label_smoothing=1, ignored=0),
    "weights": lambda: problem(3, 5, v=11, d=7) | WEIGHTS,
    "weights, sum": lambda: problem(3, 5, v=11, d=7, reduction="sum") | WEIGHTS,
    "weights of 0": lambda: problem(3, 5, v=11, d=7, weights=torch.zeros(3, 5).double()),
    "all options": lambda: problem(3, 5, v=11, d=7, label_smoothing=0.3) | BIAS | WEIGHTS,
    "all options, none": lambda: problem(3, 5, v=11, d=7, label_smoothing=0.3, reduction="none") | BIAS | WEIGHTS,
    "tied": lambda: tied(problem(3, 5, v=11, d=7, label_smoothing=0.1), 7),
    "expanded": lambda: problem(3, 5, v=11, d=7, bias=normal(1, seed=2).expand(11))
    | {"h": normal(1, 5, 7, seed=8).expand(3, 5, 7)},
    "large logits": lambda: problem(3, 5, v=11, d=7, scale=30.0),
    "extreme logits": lambda: problem(3, 5, v=11, d=7, scale=3e4, label_smoothing=0.1) | BIAS,
    "some long vectors": lambda: problem(3, 5, v=11, d=7)
    | {"h": normal(3, 5, 7, seed=0) * torch.tensor([1, 1, 300.0])[:, None, None]},
    "a class is far below": lambda: problem(3, 5, v=11, d=7, ignored=0, bias=torch.tensor([-1e9, *[0.0] * 10]).double())
    | {"labels": torch.arange(15).reshape(3, 5) % 10 + 1},
}  # fmt: skip
# How rows are chosen: exactly, as where no value can be looked at, a fixed number.
PLANS = ("exact", "all rows", "max_rows", "more max_rows", "max_rows beyond all")


def planned(function: Callable[..., Tensor], plan: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    if plan == "all rows":
        monkeypatch.setattr(debug, "has_values", lambda t: False)

    def call(labels: Tensor, ignore_index: int = -100, **rest: Any) -> Tensor:
        kept = max(1, int((labels != ignore_index).sum()))
        rows = {"max_rows": kept, "more max_rows": kept + 2, "max_rows beyond all": labels.numel() + 3}.get(plan)
        return function(labels=labels, ignore_index=ignore_index, **rest, max_rows=rows)

    return call


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_against_torch(case: str, backend: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = CASES[case]()
    expected = value_and_gradients(dense, arguments, torch.float64)
    function = planned(linear_cross_entropy, plan, monkeypatch)
    with backends.use(backend):
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            slack = 10 if backend == "reference" and "extreme" in case else 1  # dense sums in float32 are less exact
            value, *gradients = value_and_gradients(function, arguments, dtype)
            assert value.shape == expected[0].shape and relative_error(value, expected[0]) <= slack * bound
            for name, found, exact in zip([n for n in DIFFERENTIABLE if n in arguments], gradients, expected[1:], strict=True):
                assert relative_error(found, exact) <= 10 * slack * bound or (found - exact).norm() <= bound / 10, (dtype, name)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", ["plain", "none ignored", "all ignored", "no tokens", "one token, without dimensions", "bias"])
def test_log_probabilities(case: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {name: value for name, value in CASES[case]().items() if name in ("h", "weight", "labels", "bias")}
    expected = value_and_gradients(lambda **a: -dense(**a, reduction="none"), arguments, torch.float64)
    found = value_and_gradients(planned(token_logprob, plan, monkeypatch), arguments, torch.float32)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape and relative_error(ours, exact) <= 1e-6


def test_the_mean_is_torchs() -> None:
    h, weight, labels = (problem(3, 5, v=11, d=7)[name] for name in ("h", "weight", "labels"))
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy((h @ weight.T).flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
        torch.testing.assert_close(linear_cross_entropy(h, weight, labels, label_smoothing=smoothing), expected)


def test_as_systems_call_it() -> None:
    """Padding, sums for each sequence, weighted answers, weights for each token, ranking."""
    h, weight, _ = problem(4, 6, v=11, d=7).values()
    ids = torch.arange(24).reshape(4, 6) * 7 % 11
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    loss = linear_cross_entropy(h, weight, shifted)
    torch.testing.assert_close(loss, linear_cross_entropy(h[:, :-1], weight, ids[:, 1:]))
    padded, labels = F.pad(h, (0, 0, 0, 3), value=math.nan), F.pad(shifted, (0, 3), value=-100)
    assert torch.equal(linear_cross_entropy(padded, weight, labels), loss)
    log_p = (h @ weight.T).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # [4, 5]
    scores = token_logprob(h, weight, shifted).sum(-1)
    torch.testing.assert_close(scores, log_p.sum(-1))
    torch.testing.assert_close(torch.stack([token_logprob(h[i], weight, shifted[i]).sum() for i in range(4)]), scores)
    answers = torch.tensor([0.5, 0.5, 1.0, 0.3]).double()
    each = answers[:, None].expand_as(shifted)
    found = linear_cross_entropy(h, weight, shifted, weights=each, reduction="sum")
    torch.testing.assert_close(found, -(answers * log_p.sum(-1)).sum())
    raw = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)).double()
    raw[:, -1] = math.nan  # where the label is ignored
    normalised = raw / raw[:, :-1].mean(1, keepdim=True)  # each caption's weights have the mean 1
    found = linear_cross_entropy(h, weight, shifted, weights=normalised)
    torch.testing.assert_close(found, -(normalised[:, :-1] * log_p).mean())


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [20.0, 30.0, 60.0])
def test_a_certain_label_keeps_its_digits(margin: float, dtype: torch.dtype) -> None:
    """Losses of 1e-8, 1e-12 and 1e-25; the other logits are 1, 0.5, 0.25 and so on."""
    weight = torch.eye(6)
    h = torch.tensor([[margin, 1, 0.5, 0.25, 0, -2]])
    others = h[0, 1:].double().exp()
    exact = torch.log1p(others.sum() * math.exp(-margin))
    leaves = [t.detach().to(dtype).requires_grad_() for t in (h, weight)]
    label = torch.zeros(1, dtype=torch.long)
    for factor, function in ((1, linear_cross_entropy), (-1, token_logprob)):
        value = function(*leaves, label)
        assert relative_error(value.detach(), factor * exact.reshape(value.shape)) < 5e-6  # 60 roundings of float32
        dh, dw = torch.autograd.grad(value.sum(), leaves)
        p = others / (others.sum() + math.exp(margin))
        expected = torch.cat([-p.sum()[None], p])  # of the logits
        bound = 5e-6 if dtype == torch.float32 else 4e-3
        assert (
            relative_error(dh[0], factor * expected) < bound
            and relative_error(dw, factor * expected[:, None] * h.double()) < bound
        )


@pytest.mark.parametrize("margin", [None, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("options", [{}, {"bias": normal(301, seed=4).float().double()}, {"label_smoothing": 0.1}])
def test_bfloat16_is_no_worse_than_eager_bfloat16(margin: float | None, options: Arguments) -> None:
    """At random and as far as learned: each h leans on its label's row so much. Frequent labels sum up many rows."""
    arguments = problem(40, 20, v=301, d=64, ignored=0.3, scale=0.5) | options
    arguments["labels"] = torch.where(arguments["labels"] > 150, 7, arguments["labels"])
    if margin is not None:
        rows = arguments["weight"][arguments["labels"].clamp(min=0)]
        arguments["h"] = arguments["h"] + margin * rows / rows.square().sum(-1, keepdim=True)
    for name in ("h", "weight"):
        arguments[name] = arguments[name].bfloat16().double()

    def eager(h, weight, labels, bias=None, label_smoothing=0.0) -> Tensor:
        logits = F.linear(h, weight, None if bias is None else bias.bfloat16())
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing)

    exact = value_and_gradients(dense, arguments, torch.float64)
    found = value_and_gradients(linear_cross_entropy, arguments, torch.bfloat16)
    theirs = value_and_gradients(eager, arguments, torch.bfloat16)
    for i, (ours, e, t) in enumerate(zip(found, exact, theirs, strict=True)):
        assert relative_error(ours, e) <= (1e-6 if i == 0 or e.ndim < 2 else 4e-3), i  # sums in float32; rounded once
        assert relative_error(ours, e) <= relative_error(t, e), i


# --- rows that are not computed, memory -------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("options", [{}, {"max_rows": 400}, {"label_smoothing": 0.1}], ids=str)
def test_the_matrix_of_logits_is_never_held(options: Arguments) -> None:
    arguments = problem(512, v=600, d=8, bias=normal(600, seed=2))
    h, weight, bias = (arguments[name].float().requires_grad_() for name in ("h", "weight", "bias"))
    with Largest() as largest:
        linear_cross_entropy(h, weight, arguments["labels"], bias=bias, stash_bytes=0, **options).backward()
    assert 0 < largest.elements <= 600 * 8 and h.grad.isfinite().all()
    with Largest() as largest, torch.no_grad():
        token_logprob(h, weight, arguments["labels"], bias=bias)
    assert 0 < largest.elements <= 600 * 8


@pytest.mark.parametrize(("budget", "products"), [(4 << 30, 3), (0, 4)])
def test_masked_rows_are_no_part_of_the_products(budget: int, products: int) -> None:
    arguments = problem(3, 5, v=11, d=7)
    h, weight, labels = arguments["h"].requires_grad_(), arguments["weight"].requires_grad_(), arguments["labels"]
    kept = int((labels != -100).sum())
    assert 0 < kept < 15
    for rows, max_rows in ((kept, None), (kept, kept), (kept + 1, kept + 1), (15, 40)):
        for frozen in (False, True):
            with FlopCounterMode(display=False) as counter:
                w = weight.detach() if frozen else weight
                linear_cross_entropy(h, w, labels, max_rows=max_rows, stash_bytes=budget).backward()
            assert counter.get_total_flops() == (products - frozen) * 2 * rows * 11 * 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_logprob(h, weight, labels, stash_bytes=budget)
    assert counter.get_total_flops() == 2 * kept * 11 * 7


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_makes_none_unless_it_is_ignored(bad: float, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(16, v=11, d=7, ignored=0, label_smoothing=0.1) | BIAS | {"weights": torch.ones(16).double()}
    arguments["labels"][IGNORED] = -100
    function = planned(linear_cross_entropy, plan, monkeypatch)

    def run(change: str | None = None, rows: Any = None) -> list[Tensor]:
        changed = {name: t.clone() if isinstance(t, Tensor) else t for name, t in arguments.items()}
        if change is not None:
            changed[change][rows] = bad
        return value_and_gradients(function, changed, torch.float32)

    clean = run()
    for name in ("h", "weights"):
        assert all(torch.equal(a, b) for a, b in zip(run(name, IGNORED), clean, strict=True))
        assert not run(name, 2)[0].isfinite()
    for name in ("weight", "bias"):
        assert not run(name, 3)[0].isfinite()


def test_a_bias_of_minus_infinity_takes_a_class_out(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(16, v=11, d=7) | {"bias": torch.tensor([-math.inf, *[0.5] * 10]).double()}
    arguments["labels"] = torch.where(arguments["labels"] == 0, 1, arguments["labels"])
    lower = torch.where(arguments["labels"] == -100, -100, arguments["labels"] - 1)
    fewer = {"h": arguments["h"], "weight": arguments["weight"][1:], "labels": lower}
    expected = value_and_gradients(dense, fewer, torch.float64)
    for plan in PLANS:  # the rows that count nothing have the label 0
        function = planned(linear_cross_entropy, plan, monkeypatch)
        *found, _ = value_and_gradients(function, arguments, torch.float32)
        for ours, exact in zip(found, expected, strict=True):  # the gradient of all of weight: 0 in that row
            assert relative_error(ours, exact) < 1e-6
        monkeypatch.undo()


# --- max_rows too small -----------------------------------------------------------------------------------------------


REDUCED: dict[str, Callable[..., Tensor]] = {
    "mean": lambda *a, **k: linear_cross_entropy(*a, **k),
    "sum": lambda *a, **k: linear_cross_entropy(*a, reduction="sum", **k),
    "none": lambda *a, **k: linear_cross_entropy(*a, reduction="none", **k),
    "log-probabilities": token_logprob,
}


@pytest.mark.parametrize("name", REDUCED)
def test_too_few_rows_are_refused_or_make_nan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(3, 5, v=11, d=7)
    h, weight, labels = arguments["h"].requires_grad_(), arguments["weight"].requires_grad_(), arguments["labels"]
    kept = int((labels != -100).sum())
    message = f"max_rows: expected at least {kept}, as many as labels has tokens to keep, got {kept - 1}"
    with pytest.raises(ValueError, match=message):
        REDUCED[name](h, weight, labels, max_rows=kept - 1)
    monkeypatch.setattr(debug, "readable", lambda t: False)  # as on a GPU
    result = REDUCED[name](h, weight, labels, max_rows=kept - 1)
    assert result.isnan().all()
    result.sum().backward()
    assert weight.grad.isnan().any() and h.grad.isnan().any()
    assert REDUCED[name](h, weight, labels, max_rows=kept).isfinite().all()


# --- among torch's machinery ------------------------------------------------------------------------------------------


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, weight, bias, weights, labels"""
    arguments = problem(3, 5, v=11, d=7) | BIAS | WEIGHTS
    return *(arguments[name].to(dtype).requires_grad_() for name in DIFFERENTIABLE), arguments["labels"]  # type: ignore[return-value]


def smoothed(h: Tensor, weight: Tensor, bias: Tensor, weights: Tensor, labels: Tensor, max_rows: int | None = None) -> Tensor:
    """Every option; both functions."""
    loss = linear_cross_entropy(h, weight, labels, bias=bias, label_smoothing=0.1, weights=weights, max_rows=max_rows)
    return loss + token_logprob(h, weight, labels, bias=bias, max_rows=max_rows).square().sum()


@pytest.mark.parametrize("max_rows", [None, 12])
@pytest.mark.parametrize("budget", [0, 4 << 30])
def test_gradcheck(budget: int, max_rows: int | None) -> None:
    *some, labels = leaves(torch.float64)

    def function(h: Tensor, weight: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        options: Arguments = {"bias": bias, "max_rows": max_rows, "stash_bytes": budget}
        each = linear_cross_entropy(h, weight, labels, weights=weights, label_smoothing=0.1, reduction="none", **options)
        return torch.stack([each, token_logprob(h, weight, labels, **options)])

    assert torch.autograd.gradcheck(function, some)


@pytest.mark.parametrize("max_rows", [None, 12])
def test_func_grad(max_rows: int | None) -> None:
    *some, labels = leaves()
    expected = torch.autograd.grad(smoothed(*some, labels, max_rows), some)
    found = torch.func.grad(smoothed, argnums=(0, 1, 2, 3))(*(t.detach() for t in some), labels, max_rows)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(
    ("dynamic", "max_rows", "backend"), [(False, None, "cpp"), (False, 12, "reference"), (True, None, "cpp"), (True, 12, "cpp")]
)
def test_compiles_without_a_break(dynamic: bool, max_rows: int | None, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(smoothed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    h, weight, bias, weights, labels = leaves()
    with backends.use(backend):
        for n in (3, 2) if dynamic else (3,):
            cut = [t.detach().clone().requires_grad_() for t in (h[:n], weight, bias, weights[:n])]
            expected, found = (function(*cut, labels[:n], max_rows) for function in (smoothed, compiled))
            torch.testing.assert_close(found, expected)
            for ours, exact in zip(*(torch.autograd.grad(t, cut) for t in (found, expected)), strict=True):
                torch.testing.assert_close(ours, exact)
        assert compiled(h, weight, bias, weights, labels.clamp(min=0), max_rows).isnan() == (max_rows is not None)


def test_one_tensor_as_h_and_weight() -> None:
    torch._dynamo.reset()
    table, labels = normal(11, 7, seed=0).requires_grad_(), torch.arange(11)

    def function(table: Tensor) -> Tensor:
        return linear_cross_entropy(table, table, labels, label_smoothing=0.1)

    (expected,) = torch.autograd.grad(dense(table, table, labels, label_smoothing=0.1), table)
    for each in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(torch.autograd.grad(each(table), table)[0], expected)


@pytest.mark.parametrize("label_smoothing", [None, 0.0, 0.1])
def test_autocast_casts_h_and_weight_alone(label_smoothing: float | None) -> None:
    h, weight, bias, weights, labels = leaves()

    def function(h: Tensor, weight: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        if label_smoothing is None:
            return (weights * token_logprob(h, weight, labels, bias=bias)).sum()
        return linear_cross_entropy(h, weight, labels, bias=bias, weights=weights, label_smoothing=label_smoothing)

    expected = function(h.bfloat16(), weight.bfloat16(), bias, weights)
    doubles = [t.detach().double() for t in (h, weight, bias, weights)]
    with torch.autocast("cpu", torch.bfloat16):
        found = function(h, weight, bias, weights)
        in_double = function(*doubles)
    assert torch.equal(found, expected) and found.dtype == torch.float32
    for ours, exact in zip(*(torch.autograd.grad(t, (h, weight, bias, weights)) for t in (found, expected)), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, exact)
    assert torch.equal(in_double, function(*doubles)) and in_double.dtype == torch.float64


@pytest.mark.parametrize("names", ["bfloat16 float32", "float32 float16", "float32 float64"])
def test_two_dtypes_meet_in_the_wider(names: str) -> None:
    dtypes = tuple(getattr(torch, name) for name in names.split())
    h, weight, bias, weights, labels = leaves()
    h, weight = (t.detach().to(dtype).requires_grad_() for t, dtype in zip((h, weight), dtypes, strict=True))
    wide = torch.promote_types(*dtypes)
    found, expected = (smoothed(*pair, bias, weights, labels) for pair in ((h, weight), (h.to(wide), weight.to(wide))))
    assert torch.equal(found, expected) and found.dtype == wide
    gradients = torch.autograd.grad(found, (h, weight))
    assert tuple(g.dtype for g in gradients) == dtypes and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("v", "d"), [(70, 33), (50021, 2)])
def test_one_thread_or_two(v: int, d: int) -> None:
    arguments = problem(150, v=v, d=d, label_smoothing=1, bias=normal(v, seed=2) + 99.9)

    def run() -> list[Tensor]:
        return value_and_gradients(linear_cross_entropy, arguments, torch.float32)

    one = run()
    torch.set_num_threads(2)
    try:
        two = run()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_backward_twice_and_second_derivatives_are_refused() -> None:
    *some, labels = leaves()
    loss = smoothed(*some, labels)
    first = torch.autograd.grad(loss, some, retain_graph=True)
    second = torch.autograd.grad(loss, some, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(NotImplementedError, match="second derivatives are made by the reference backend alone"):
        second[1].sum().backward()


@pytest.mark.parametrize("max_rows", [None, 4])
def test_meta_and_fake_tensors_take_shape_only(max_rows: int | None) -> None:
    def results(device: str) -> list[Tensor]:
        h, weight = (torch.empty(*shape, device=device) for shape in ((3, 5, 7), (11, 7)))
        labels = torch.empty(3, 5, dtype=torch.int64, device=device)
        return [
            linear_cross_entropy(h, weight, labels, label_smoothing=0.1, max_rows=max_rows),
            token_logprob(h.bfloat16(), weight, labels, max_rows=max_rows),
        ]

    assert [t.shape for t in results("meta")] == [(), (3, 5)]
    with FakeTensorMode():
        assert [t.shape for t in results("cpu")] == [(), (3, 5)]


H, W, LABELS = torch.ones(2, 3, 4), torch.ones(6, 4), torch.zeros(2, 3, dtype=torch.long)
WRONG: dict[str, tuple[type[Exception], Arguments]] = {
    "h: expected a tensor, got list": (TypeError, {"h": [1.0]}),
    "h: expected float32, .*, got torch.int64": (TypeError, {"h": H.long()}),
    "h: expected at least 1 dimension": (ValueError, {"h": torch.tensor(1.0)}),
    "weight: expected a tensor, got NoneType": (TypeError, {"weight": None}),
    r"weight: expected shape \[V >= 1, 4\] beside h, got \(6, 5\)": (ValueError, {"weight": torch.ones(6, 5)}),
    r"weight: expected shape \[V >= 1, 4\] beside h, got \(4,\)": (ValueError, {"weight": torch.ones(4)}),
    r"weight: expected shape \[V >= 1, 4\] beside h, got \(0, 4\)": (ValueError, {"weight": torch.ones(0, 4)}),
    "weight: expected device cpu as h has, got meta": (ValueError, {"weight": W.to("meta")}),
    "labels: expected torch.int64, got torch.int32": (TypeError, {"labels": LABELS.int()}),
    r"labels: expected shape \(2, 3\), that of h without its width, got \(6,\)": (ValueError, {"labels": LABELS.flatten()}),
    r"labels: expected values in \[0, V\) with V = 6 rows of weight, or ignore_index -100, got 6": (
        ValueError,
        {"labels": LABELS + 6},
    ),
    r"labels: expected values in \[0, V\) with V = 6 rows of weight, or ignore_index -1, got -100": (
        ValueError,
        {"labels": LABELS - 100, "ignore_index": -1},
    ),
    "bias: expected a tensor, got float": (TypeError, {"bias": 1.0}),
    "bias: expected a vector of length 6": (ValueError, {"bias": torch.ones(())}),
    "bias: expected device cpu as h has, got meta": (ValueError, {"bias": torch.ones(6, device="meta")}),
    "ignore_index: expected an int, got float": (TypeError, {"ignore_index": -100.0}),
    "max_rows: expected an int, got float": (TypeError, {"max_rows": 2.0}),
    "max_rows: expected >= 1, got 0": (ValueError, {"max_rows": 0}),
    "stash_bytes: expected >= 0, got -1": (ValueError, {"stash_bytes": -1}),
    "label_smoothing: expected a number, got a tensor": (TypeError, {"label_smoothing": torch.tensor(0.1)}),
    r"label_smoothing: expected a number in \[0, 1\], got -0.1": (ValueError, {"label_smoothing": -0.1}),
    "weights: expected a tensor, got list": (TypeError, {"weights": [1.0]}),
    r"weights: expected shape \(2, 3\), that of h without its width, got \(2, 1\)": (ValueError, {"weights": torch.ones(2, 1)}),
    "weights: expected torch.float32 .*, got torch.bool": (TypeError, {"weights": LABELS.bool()}),
    "reduction: expected 'mean', 'sum' or 'none', got 'max'": (ValueError, {"reduction": "max"}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        linear_cross_entropy(**({"h": H, "weight": W, "labels": LABELS} | wrong))
    if not {"label_smoothing", "weights", "reduction"} & wrong.keys():
        with pytest.raises(error, match=message):
            token_logprob(**({"h": H, "weight": W, "labels": LABELS} | wrong))
