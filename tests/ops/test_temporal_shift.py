"""What the conformance table cannot say about token_roll and channel_shift: the papers' forms, permutations, writing in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conformance import OPS, compare
from conformance_frames import frames, strided_frames
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.temporal import channel_shift, token_roll

needs_library = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
BACKENDS = [pytest.param("cpp", marks=needs_library), "reference"]
needs_triton = pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")
WITH_TRITON = [*BACKENDS, pytest.param("triton", marks=[needs_triton, *[pytest.mark.gpu] * torch.cuda.is_available()])]
FRAME_SHIFT = torch.ops.vlpfast.frame_shift


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


# --- the definitions --------------------------------------------------------------------------------------------------


def rolled(x: Tensor, fold: int, skip: int, both_ways: bool) -> Tensor:
    """Token by token."""
    out, (clips, length, n, _) = x.clone(), x.shape
    for b in range(clips):
        for t in range(length):
            for i in range(n):
                if skip <= i < skip + fold:
                    out[b, t, i] = x[b, (t - 1) % length, i]
                elif both_ways and i >= n - fold:
                    out[b, t, i] = x[b, (t + 1) % length, i]
    return out


def shifted(x: Tensor, fold: int) -> Tensor:
    """TSM's slices, of [B, F, ..., C]."""
    out = torch.zeros_like(x)
    out[:, :-1, ..., :fold] = x[:, 1:, ..., :fold]
    out[:, 1:, ..., fold : 2 * fold] = x[:, :-1, ..., fold : 2 * fold]
    out[..., 2 * fold :] = x[..., 2 * fold :]
    return out


@pytest.mark.parametrize("backend", WITH_TRITON)
@pytest.mark.parametrize(
    ("length", "fold", "skip", "both_ways"),
    [(3, 2, 1, True), (1, 4, 1, True), (2, 3, 3, True), (4, 9, 0, False), (5, 0, 9, True), (3, 3, 2, False)],
)
def test_tokens_one_by_one(length: int, fold: int, skip: int, both_ways: bool, backend: str) -> None:
    x = frames(2, length, 9, 3)["x"].float()
    with backends.use(backend):
        found = token_roll(x.to(backends.device_type(backend)), fold, skip=skip, both_ways=both_ways)
    assert torch.equal(found.cpu(), rolled(x, fold, skip, both_ways))


@pytest.mark.parametrize("backend", WITH_TRITON)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_channels_by_slices(length: int, backend: str) -> None:
    x = frames(2, length, 3, 2, 11)["x"].float()
    images = x.flatten(0, 1).movedim(-1, 1).to(backends.device_type(backend))  # [B * F, C, H, W], channels last in memory
    with backends.use(backend):
        for fold in (0, 2, 5):
            expected = shifted(x, fold)
            assert torch.equal(channel_shift(x.to(images.device), fold).cpu(), expected)
            assert torch.equal(channel_shift(x[:, :, 0, 0].to(images.device), fold).cpu(), expected[:, :, 0, 0])
            as_images = expected.flatten(0, 1).movedim(-1, 1)
            last = channel_shift(images, fold, n_segment=length)
            first = channel_shift(images.contiguous(), fold, n_segment=length)
            assert torch.equal(last.cpu(), as_images) and torch.equal(first.cpu(), as_images)
            assert first.is_contiguous() and last.stride() == images.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_roll_is_a_permutation(dtype: torch.dtype, backend: str) -> None:
    x = frames(2, 3, 9, 5)["x"].to(dtype)
    with backends.use(backend):
        once = token_roll(x, 2)
        assert once.dtype == dtype and not torch.equal(once, x)
        assert torch.equal(once.sort(1).values, x.sort(1).values) and torch.equal(once[:, :, 0], x[:, :, 0])
        assert torch.equal(token_roll(token_roll(once, 2), 2), x)  # three frames
        assert torch.equal(token_roll(x[:, :1], 2), x[:, :1])
        assert torch.equal(token_roll(x.transpose(0, 1), 2), rolled(x.transpose(0, 1), 2, 1, True))
        assert token_roll(x.transpose(0, 1), 2).is_contiguous() and channel_shift(x.transpose(0, 1), 2).is_contiguous()
        leaf = once.clone().requires_grad_()
        (back,) = torch.autograd.grad(token_roll(leaf, 2), leaf, x)
    assert torch.equal(token_roll(back, 2), x)


@pytest.mark.parametrize("backend", WITH_TRITON)
def test_nan_and_infinity_move_with_their_tokens(backend: str) -> None:
    x = frames(1, 3, 5, 4)["x"].float()
    x[0, 0, 1], x[0, 1, 3], x[0, 2, 4] = torch.nan, torch.inf, torch.nan
    with backends.use(backend):
        y = x.to(backends.device_type(backend))
        torch.testing.assert_close(token_roll(y, 1).cpu(), rolled(x, 1, 1, True), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(channel_shift(y, 2).cpu(), shifted(x, 2), rtol=0, atol=0, equal_nan=True)


# --- in place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", WITH_TRITON)
def test_in_place(backend: str) -> None:
    device = backends.device_type(backend)
    cases = {
        "rows": (frames(2, 4, 3, 37)["x"], None),
        "one frame": (frames(2, 1, 37)["x"], None),
        "strided": (strided_frames()["x"][:, :, 0], None),
        "nothing": (frames(2, 0, 3, 37)["x"], None),
        "images": (frames(8, 9, 5, 7)["x"], 4),
        "channels last": (frames(8, 9, 5, 7)["x"].to(memory_format=torch.channels_last), 4),
        "more than a chunk": (frames(4, 6, 40, 30)["x"], 2),
    }
    for name, (x, n_segment) in cases.items():
        base = x if x._base is None else x._base
        base = base.to(device, torch.float32, copy=True)
        y = base.as_strided(x.shape, x.stride(), x.storage_offset())
        kept = base.clone()
        for fold in (0, 1, 3):
            with backends.use(backend):
                expected = channel_shift(y, fold, n_segment=n_segment)
                found = channel_shift(y, fold, n_segment=n_segment, inplace=True)
            assert found is y and torch.equal(y, expected), name
        if name == "strided":
            y.zero_(), kept.as_strided(x.shape, x.stride(), x.storage_offset()).zero_()
            assert torch.equal(base, kept)  # what lies between was not touched


def test_in_place_without_a_gradient_alone() -> None:
    x = frames(2, 3, 8)["x"].requires_grad_()
    with pytest.raises(
        ValueError, match=r"x: expected a tensor without a gradient for inplace=True .*, got a leaf that requires"
    ):
        channel_shift(x, 2, inplace=True)
    with pytest.raises(ValueError, match=r"for inplace=True .*, got one that requires one"):
        channel_shift(2 * x, 2, inplace=True)
    with pytest.raises(ValueError, match="without a gradient for inplace=True"):
        torch.func.grad(lambda x: channel_shift(x, 2, inplace=True).sum())(x.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_is_known_to_the_backward(backend: str) -> None:
    x = frames(2, 3, 8)["x"].requires_grad_()
    with backends.use(backend):
        with torch.inference_mode():
            y = x * 2
            assert torch.equal(channel_shift(y, 2, inplace=True), shifted(2 * x, 2))
        y = x.sigmoid()  # keeps its result for the backward
        with torch.no_grad():
            channel_shift(y, 2, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_in_place_where_memory_allows_it_alone() -> None:
    for x in (
        frames(1, 3, 1, 8)["x"].expand(2, 3, 4, 8),
        frames(12, 1)["x"].expand(12, 8)[:, None, None].expand(12, 3, 4, 8),
        frames(40)["x"].as_strided((2, 3, 8), (8, 4, 1)),
    ):
        with pytest.raises(ValueError, match="x: expected memory that does not overlap for inplace=True, got strides"):
            channel_shift(x, 2, inplace=True)
    for x, n_segment in (
        (frames(2, 3, 8, 4)["x"].mT, None),  # the last dimension is not dense
        (frames(2, 3, 4, 5, 8)["x"][:, :, :, :4], None),  # rows and columns do not make one dimension
        (frames(6, 8, 5, 7)["x"][..., :6], 3),
        (frames(6, 4, 8)["x"][..., ::2].mT, 3),
        (frames(6, 8, 2)["x"][..., :1], 3),
    ):
        with pytest.raises(ValueError, match="x: expected frames that lie in memory row by row for inplace=True, got strides"):
            channel_shift(x, 2, n_segment=n_segment, inplace=True)
        assert channel_shift(x, 2, n_segment=n_segment).shape == x.shape


# --- torch's machinery ------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_give_the_bits_of_one(dtype: torch.dtype, two_threads: None) -> None:
    x = frames(2, 3, 40, 900)["x"].to(dtype)
    both = [token_roll(x, 5), channel_shift(x, 100), channel_shift(x.clone(), 100, inplace=True)]
    torch.set_num_threads(1)
    for found, expected in zip(both, [token_roll(x, 5), channel_shift(x, 100), channel_shift(x, 100)], strict=True):
        assert torch.equal(found, expected)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: token_roll(x, 2),
    "shift": lambda x: channel_shift(x, 2),
    "images": lambda x: channel_shift(x.flatten(0, 1), 2, n_segment=x.shape[1]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_every_order(name: str, backend: str) -> None:
    function, x = FUNCTIONS[name], frames(2, 3, 5, 4)["x"].requires_grad_()
    with backends.use(backend):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
        value = function(x).square().sum()
        (expected,) = torch.autograd.grad(value, x, retain_graph=True)
        assert torch.equal(torch.autograd.grad(value, x)[0], expected)
        assert torch.equal(torch.func.grad(lambda x: function(x).square().sum())(x.detach()), expected)
        each = torch.func.vmap(function, in_dims=2)(x.detach().expand(2, -1, -1, -1, -1).movedim(0, 2))
        assert torch.equal(each, function(x.detach()).expand(2, *each.shape[1:]))
        jacobian = torch.func.jacrev(function)(x.detach())
        assert torch.equal(torch.einsum("...bfnc,bfnc->...", jacobian, x.detach()), function(x.detach()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_dtype(backend: str) -> None:
    x = frames(2, 3, 5, 8)["x"].float()
    with backends.use(backend), torch.autocast("cpu", torch.bfloat16):
        for found, expected in ((token_roll(x, 2), rolled(x, 2, 1, True)), (channel_shift(x, 2), shifted(x, 2))):
            assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("backend", "dynamic"), [*(pytest.param("cpp", d, marks=needs_library) for d in (False, True)), ("reference", False)]
)
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(x: Tensor, y: Tensor) -> Tensor:
        z = channel_shift(token_roll(x, 2), 1)
        with torch.no_grad():
            channel_shift(y, 1, inplace=True)
        return z.square().sum() + channel_shift(x.flatten(0, 1), 2, n_segment=3).sin().sum() + (x * y).sum()

    x, y = frames(2, 3, 5, 4)["x"].requires_grad_(), frames(2, 3, 5, 4)["x"]
    with backends.use(backend):
        other = y.clone()
        expected = function(x, other)
        found = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x, y)
        assert torch.equal(y, other) and torch.equal(y, shifted(frames(2, 3, 5, 4)["x"], 1))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x), rtol=1e-12, atol=0)


@needs_library
def test_opcheck() -> None:
    x = frames(2, 3, 5, 8)["x"].bfloat16()
    for arguments in ((1, 3, 5, 8, True), (3, 6, 0, 3, False), (0, 0, 2, 2, False)):
        torch.library.opcheck(
            FRAME_SHIFT, (x.clone().requires_grad_(), *arguments), test_utils=("test_schema", "test_faketensor")
        )
        torch.library.opcheck(FRAME_SHIFT, (x[:, :2, ::2], *arguments))
        torch.library.opcheck(torch.ops.vlpfast.frame_shift_, (x.clone(), *arguments[:4]))


def test_meta_and_fake_tensors_take_shape_only() -> None:
    found = token_roll(torch.empty(2, 3, 9, 4, device="meta", dtype=torch.bfloat16), 2)
    assert found.shape == (2, 3, 9, 4) and found.is_meta and found.dtype == torch.bfloat16
    with FakeTensorMode():
        x = torch.empty(6, 9, 4, 5, requires_grad=True)
        y = channel_shift(x.to(memory_format=torch.channels_last), 2, n_segment=3)
        assert y.shape == x.shape and y.stride() == (180, 1, 45, 9)
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
        with pytest.raises(ValueError, match="fold: expected at most 4 with 9 channels, got 5"):
            channel_shift(x, 5, n_segment=3)
        with pytest.raises(ValueError, match="x: expected memory that does not overlap"):
            channel_shift(torch.empty(1, 3, 8).expand(2, 3, 8), 2, inplace=True)


def test_no_operation_is_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        x = frames(2, 3, 9, 8)["x"].requires_grad_()
        (token_roll(x, 2).sum() + channel_shift(x, 2).sum()).backward()
        channel_shift(x.detach(), 2, inplace=True)
    assert counter.get_total_flops() == 0


# --- arguments --------------------------------------------------------------------------------------------------------

X = torch.ones(2, 3, 9, 8)
WRONG: dict[str, tuple[type[Exception], Callable[..., Any], dict[str, Any]]] = {
    r"x: expected a tensor, got list": (TypeError, token_roll, {"x": [1]}),
    r"x: expected float32, .* got torch\.int64": (TypeError, token_roll, {"x": X.long()}),
    r"x: expected shape \[B, F, N, C\], got \(2, 3, 9\)": (ValueError, token_roll, {"x": X[..., 0]}),
    r"fold: expected an int, got float": (TypeError, token_roll, {"fold": 2.0}),
    r"fold: expected >= 0, got -1": (ValueError, token_roll, {"fold": -1}),
    r"fold: expected at most 4 with 9 tokens and skip=1, got 5": (ValueError, token_roll, {"fold": 5}),
    r"fold: expected at most 7 .* skip=2, got 8": (ValueError, token_roll, {"fold": 8, "skip": 2, "both_ways": False}),
    r"fold: expected at most 0 with 9 tokens and skip=10, got 0": (ValueError, token_roll, {"fold": 0, "skip": 10}),
    r"skip: expected >= 0, got -1": (ValueError, token_roll, {"skip": -1}),
    r"both_ways: expected True or False, got 1": (TypeError, token_roll, {"both_ways": 1}),
    r"x: expected shape \[B, F, \.\.\., C\], got \(2, 3\)": (ValueError, channel_shift, {"x": X[..., 0, 0]}),
    r"x: expected shape \[B \* F, C, \.\.\.\], got \(2,\)": (ValueError, channel_shift, {"x": X[..., 0, 0, 0], "n_segment": 1}),
    r"n_segment: expected >= 1, got 0": (ValueError, channel_shift, {"n_segment": 0}),
    r"n_segment: expected a divisor of x's first dimension, 2, got 3": (ValueError, channel_shift, {"n_segment": 3}),
    r"fold: expected at most 4 with 8 channels, got 5": (ValueError, channel_shift, {"fold": 5}),
    r"fold: expected at most 1 with 3 channels, got 2": (ValueError, channel_shift, {"n_segment": 1}),
    r"inplace: expected True or False, got None": (TypeError, channel_shift, {"inplace": None}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, function, wrong = WRONG[message]
    with pytest.raises(error, match=message):
        function(**({"x": X, "fold": 2} | wrong))


@needs_library
def test_the_kernel_checks_what_it_is_given() -> None:
    """A number of the wrong type must not pass as another."""
    for message, arguments in {
        "back: expected a part of 8 elements, got 4294967297 to 4294967298": (2**32 + 1, 2**32 + 2, 0, 0),
        "back: expected a part of 8 elements, got 3 to 2": (3, 2, 0, 0),
        "ahead: expected a part of 8 elements, got 0 to 9": (0, 0, 0, 9),
        "ahead: expected a part of 8 elements, got -1 to 4": (0, 0, -1, 4),
        "back and ahead: expected parts that do not overlap": (0, 3, 2, 5),
    }.items():
        for operator, more in ((FRAME_SHIFT, (True,)), (torch.ops.vlpfast.frame_shift_, ())):
            with pytest.raises(RuntimeError, match=message):
                operator(X.clone(), *arguments, *more)
    with pytest.raises(RuntimeError, match="x: expected rows of consecutive elements, got stride 9"):
        FRAME_SHIFT(X.mT.contiguous().mT, 0, 0, 0, 0, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["token_roll", "channel_shift"])
def test_the_reference_in_every_dtype(op: str, dtype: torch.dtype) -> None:
    for case in OPS[op].cases:
        compare(OPS[op], "reference", dtype, case)
