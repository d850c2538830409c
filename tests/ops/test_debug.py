"""VLPFAST_DEBUG=1: what it finds, where it stays out of the way, and that without it a NaN reaches every loss. Loss scales."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import features
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vlpfast.ops import backends, contrastive, debug

N, D = 8, 5
LABELS = torch.arange(N) // 2
BOTH_LABELS = {"row_labels": LABELS, "col_labels": LABELS}
Inputs = dict[str, Any]


def sides(**more: Any) -> Inputs:
    both = features(N, N, D)
    return {"x": both["x"].float(), "y": both["y"].float(), "scale": torch.tensor(10.0), **more}


def with_bias() -> Inputs:
    return sides(bias=torch.linspace(-1, 1, N))


def wider() -> Inputs:
    return sides(row_negatives=torch.ones(3, D), col_negatives=torch.ones(2, D), bias=torch.zeros(N + 3))


def views() -> Inputs:
    return {"x": torch.rand(2, N, D), "y": torch.rand(3, N, D), "scale": torch.tensor(10.0)}


def locals_() -> Inputs:
    return sides() | {"y": torch.rand(N, 3, D)}


def teacher(**more: Any) -> Inputs:
    both = features(N, N, D, seed=1)
    return sides(x_t=both["x"].float(), y_t=both["y"].float(), scale_t=torch.tensor(8.0), **more)


def distilled() -> Inputs:
    return teacher(row_negatives=torch.ones(3, D), col_negatives=torch.ones(2, D))


def matryoshka(x: Tensor, y: Tensor, scale: Any) -> Tensor:
    return contrastive.matryoshka_loss(lambda a, b: contrastive.clip_loss(a, b, scale), (x, y), (2, D))


def supcon(x: Tensor, scale: Any) -> Tensor:
    return contrastive.supcon_loss(x, scale, LABELS)


# every public loss: function, inputs, the names that its errors have for some of them
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[], Inputs], dict[str, str]]] = {
    "clip_loss": (contrastive.clip_loss, with_bias, {}),
    "clip_loss, wider": (contrastive.clip_loss, wider, {}),
    "clip_loss, views": (contrastive.clip_loss, views, {}),
    "clip_loss, smoothed": (lambda **a: contrastive.clip_loss(**a, label_smoothing=0.1), with_bias, {}),
    "lit_loss": (lambda x, y, scale: contrastive.lit_loss(x, y, scale), sides, {}),
    "nt_xent_loss": (lambda x, y, scale: contrastive.nt_xent_loss(x, y, scale), sides, {}),
    "debiased_contrastive_loss": (lambda **a: contrastive.debiased_contrastive_loss(**a, class_prior=0.1), sides, {}),
    "matryoshka_loss": (matryoshka, sides, {"x": r"features\[0\]", "y": r"features\[1\]"}),
    "supervised_contrastive_loss": (lambda **a: contrastive.supervised_contrastive_loss(**a, **BOTH_LABELS), sides, {}),
    "supcon_loss": (supcon, lambda: {k: v for k, v in sides().items() if k != "y"}, {}),
    "group_contrastive_loss": (lambda **a: contrastive.group_contrastive_loss(**a, group_size=2), sides, {}),
    "group_contrastive_loss, adaptive": (
        lambda **a: contrastive.group_contrastive_loss(**a, group_size=2, positives="adaptive"), sides, {},
    ),
    "distilled_contrastive_loss": (lambda **a: contrastive.distilled_contrastive_loss(**a, alpha=0.4), distilled, {}),
    "local_global_loss": (contrastive.local_global_loss, locals_, {}),
    "sigmoid_loss": (contrastive.sigmoid_loss, with_bias, {}),
    "sharded_clip_loss": (contrastive.sharded_clip_loss, sides, {}),
    "sharded_sigmoid_loss": (contrastive.sharded_sigmoid_loss, lambda: sides(bias=torch.tensor(-3.0)), {}),
}  # fmt: skip
PRIMITIVES = {
    "pair_logsumexp": (lambda **a: torch.cat(contrastive.pair_logsumexp(**a)).sum(), with_bias, {}),
    "pair_softplus": (contrastive.pair_softplus, with_bias, {}),
    "pair_distill": (
        lambda **a: torch.cat(contrastive.pair_distill(**a)).sum(),
        lambda: teacher(bias_t=torch.linspace(-1, 1, N)),
        {},
    ),
    "sample_hard_negatives": (contrastive.sample_hard_negatives, sides, {}),
}
ALL = LOSSES | PRIMITIVES


def test_every_public_function_is_here() -> None:
    assert {name.partition(",")[0] for name in ALL} == set(contrastive.__all__) - {"KERNELS"}


@pytest.mark.parametrize("name", ALL)
def test_numbers_that_are_none(name: str) -> None:
    """Each argument in turn: refused with its name, number and place under debug; in the result without."""
    function, inputs, names = ALL[name]
    with debug.use():
        function(**inputs())
    for wrong, value in inputs().items():
        flat = value.clone().view(-1)
        at = [flat.numel() - 2, flat.numel() - 1] if value.ndim else [0]
        flat[at] = torch.nan
        bad = inputs() | {wrong: flat.view(value.shape)}
        if name != "sample_hard_negatives":  # its indices cannot be NaN: see test_sample.py
            assert function(**bad).isnan(), wrong
        first = bad[wrong].isnan().nonzero()[0].tolist()
        where = f"2 of {value.numel()} that are not, the first at {first}: nan" if value.ndim else "nan"
        message = f"^{names.get(wrong, wrong)}: expected finite numbers, got {re.escape(where)}"
        with debug.use(), pytest.raises(ValueError, match=message):
            function(**bad)
        bad[wrong] = torch.where(bad[wrong].isnan(), torch.inf, bad[wrong])
        with debug.use(), pytest.raises(ValueError, match=message.replace("nan", "inf")):
            function(**bad)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_features_that_are_none_reach_the_loss(backend: str) -> None:
    """On either backend, wherever they are, and in the gradients too."""
    if backends.available()[backend]:
        pytest.skip("waits for the compiled library vlpfast/_C.so")
    apart = {("distilled_contrastive_loss", "y")}  # compared with momentum keys alone: nothing of it reaches x
    for name, (function, inputs, _) in LOSSES.items():
        for wrong in ("x", "y"):
            for i in range(N) if wrong in inputs() else ():
                bad = inputs()
                bad[wrong].view(-1)[i * D] = torch.nan
                bad["x"].requires_grad_()
                with backends.use(backend):
                    loss = function(**bad)
                assert loss.isnan(), (name, wrong, i)
                if i == 0 and (name, wrong) not in apart and name != "lit_loss":
                    loss.backward()
                    assert bad["x"].grad.isnan().any(), (name, wrong)


def test_values_out_of_range() -> None:
    clip, numbers = contrastive.clip_loss, sides()
    wrong = (
        ({"row_weights": torch.tensor([1.0] * 7 + [-1.0])}, r"row_weights: expected numbers in \[0, 3.40282e\+38\], got 1 of 8"),
        ({"col_weights": torch.tensor([torch.nan] + [1.0] * 7)}, r"col_weights: .* the first at \[0\]: nan"),
        ({"label_smoothing": torch.tensor(1.5)}, r"label_smoothing: expected numbers in \[0, 1\], got 1.5"),
        ({"label_smoothing": torch.tensor([0.5] * 7 + [-0.5])}, r"label_smoothing: .* the first at \[7\]: -0.5"),
    )
    for options, message in wrong:
        assert clip(**numbers, **options).numel() == 1
        with debug.use(), pytest.raises(ValueError, match=message):
            clip(**numbers, **options)


@pytest.mark.parametrize("function", [contrastive.clip_loss, contrastive.sigmoid_loss])
def test_a_negative_scale_tensor_is_no_error(function: Callable[..., Tensor]) -> None:
    more = {"bias": None} if function is contrastive.sigmoid_loss else {}
    with debug.use():
        for value in (0.0, -3.0):
            assert function(**sides() | {"scale": torch.tensor(value)}, **more).isfinite()


def test_what_is_on_the_host_is_checked_anyway_and_on_a_device_under_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    """`readable` stands for the device: own columns and label counts are looked at where it says so."""
    numbers, repeated = sides(), torch.tensor([0, 0, *range(2, N)])
    many = torch.zeros(N, dtype=torch.long)

    def count() -> Tensor:
        return contrastive.supervised_contrastive_loss(**numbers, row_labels=many, col_labels=many, max_positives=2)

    with pytest.raises(ValueError, match="own: expected every column at most once"):
        contrastive.pair_logsumexp(**numbers, own=repeated)
    with pytest.raises(ValueError, match="max_positives: expected at least 8"):
        count()
    monkeypatch.setattr(debug, "readable", lambda tensor: False)
    assert count().isnan()
    with backends.use("reference"):
        contrastive.pair_logsumexp(**numbers, own=repeated)
    assert not debug.check_finite("x", torch.tensor(torch.nan))


class Elsewhere(Tensor):
    """On a device, as far as one can tell without looking at its values."""

    @staticmethod
    def __new__(cls) -> Elsewhere:
        return Tensor._make_wrapper_subclass(cls, (2,), dtype=torch.float32, device="xpu")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} waits for the device")


def test_readable() -> None:
    elsewhere = Elsewhere()
    assert not debug.readable(elsewhere)
    debug.check_finite("x", elsewhere)
    with debug.use():
        assert debug.readable(elsewhere)
        with pytest.raises(AssertionError, match="waits for the device"):
            debug.check_finite("x", elsewhere)
    host, meta = torch.ones(2), torch.ones(2, device="meta")
    with FakeTensorMode():
        fake = torch.ones(2)
    seen = []
    for on in (False, True):
        with debug.use(on):
            assert debug.readable(host) and not debug.readable(meta) and not debug.readable(fake)
            torch.func.grad(lambda t: (seen.append(debug.readable(t)), t.sum())[1])(host)
            torch.func.vmap(lambda t: (seen.append(debug.readable(t)), t)[1])(host)
    assert seen == [False] * 4


@pytest.mark.gpu
def test_on_a_device() -> None:
    numbers = {name: t.cuda() for name, t in with_bias().items()}
    own = torch.tensor([0, 0, *range(2, N)]).cuda()
    assert not debug.readable(own)
    with debug.use():
        with pytest.raises(ValueError, match="own: expected every column at most once"):
            contrastive.pair_logsumexp(**numbers, own=own)
        with pytest.raises(ValueError, match=r"own: expected columns in \[0, 8\), got 1 to 8"):
            contrastive.pair_logsumexp(**numbers, own=torch.arange(1, N + 1).cuda())
        numbers["y"][3, 2] = torch.nan
        with pytest.raises(ValueError, match=r"y: expected finite numbers, got 1 of 40 that are not, the first at \[3, 2\]: nan"):
            contrastive.clip_loss(**numbers)
    assert contrastive.clip_loss(**numbers).isnan()


def test_compilation_and_fake_tensors_meet_no_check() -> None:
    torch._dynamo.reset()
    numbers = with_bias()
    with debug.use():
        compiled = torch.compile(contrastive.clip_loss, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**numbers), contrastive.clip_loss(**numbers))
        numbers["x"][0, 0] = torch.nan
        assert compiled(**numbers).isnan()
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(t) for name, t in numbers.items()}
            assert contrastive.clip_loss(**fake).shape == ()
            assert contrastive.pair_logsumexp(**fake, own=mode.from_tensor(torch.arange(N)))[0].shape == (N,)


def test_the_environment_turns_it_on() -> None:
    script = """
import importlib, os
from vlpfast.ops import debug
for value in ("1", "0", ""):
    os.environ["VLPFAST_DEBUG"] = value
    print(importlib.reload(debug)._on)
del os.environ["VLPFAST_DEBUG"]
print(importlib.reload(debug)._on)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False", "False"]


# --- scales that are numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_losses_refuse_a_number_that_is_no_scale(name: str) -> None:
    function, inputs, _ = LOSSES[name]
    function(**inputs() | {"scale": 10})
    for scale in (0, 0.0, -1.0, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"scale: expected a number > 0, got {scale}"):
            function(**inputs() | {"scale": scale})
    with pytest.raises(ValueError, match="scale: expected a finite number >= 0, got inf"):
        function(**inputs() | {"scale": math.inf})
    with pytest.raises(TypeError, match="scale: expected a float or a 0-d tensor, got bool"):
        function(**inputs() | {"scale": True})


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_take_a_scale_of_zero(name: str) -> None:
    function, inputs, _ = PRIMITIVES[name]
    function(**inputs() | {"scale": 0.0})
    for scale in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"scale: expected a finite number >= 0, got {scale}"):
            function(**inputs() | {"scale": scale})


# --- other wrong arguments, of every loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_features_of_the_wrong_kind(name: str) -> None:
    function, inputs, _ = ALL[name]
    for wrong in ("x", "y"):
        good = inputs()
        if wrong not in good:
            continue
        for dtype in (torch.int64, torch.complex64):
            with pytest.raises(TypeError, match=r"expected .*float32, float64, bfloat16 or float16"):
                function(**good | {wrong: good[wrong].to(dtype)})
        if "y" in good:
            with pytest.raises(ValueError, match="width"):
                function(**good | {wrong: good[wrong][..., :3]})
            with pytest.raises(ValueError, match=r"expected device (cpu|meta) as x has, got (cpu|meta)"):
                function(**good | {wrong: good[wrong].to("meta")})


@pytest.mark.parametrize("length", [0, 3, N + 20])
def test_further_negatives_come_in_any_number(length: int) -> None:
    numbers = sides()
    queue = features(max(1, length), 1, D)["x"].float()[:length]
    loss = contrastive.clip_loss(**numbers, row_negatives=queue, directions="rows")
    logits = 10.0 * numbers["x"] @ torch.cat([numbers["y"], queue]).T
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.arange(N)))
