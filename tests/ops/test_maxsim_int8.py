"""int8 documents: scores against the definition in float64, what a scale does, and how the int8 numbers are made."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import mask, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlpfast.ops import backends
from vlpfast.ops.flops import FlopCounterMode
from vlpfast.ops.maxsim import maxsim, maxsim_int8, quantize_tokens
from vlpfast.ops.maxsim.maxsim import unit_tokens

needs_library = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")
BACKENDS = [pytest.param("cpp", marks=needs_library), "reference"]


def documents(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numbers from -128 to 127, both among them, and scales that differ a hundredfold."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    y.view(-1)[::5], y.view(-1)[1::7] = -128, 127
    return y, 10 ** (2 * torch.rand(shape[:-1], generator=generator) - 3)


def queries(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(
    x: Tensor, y: Tensor, y_scale: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None, *,
    reduction: str = "mean", unit: bool = False,
) -> Tensor:  # fmt: skip
    """Pair by pair in float64. unit: y at unit length, where no scale is negative or no number."""
    x, y = x.double(), y.double() * y_scale.double()[..., None]
    if unit:
        x, y = (t / t.norm(dim=-1, keepdim=True).clamp_min(1e-300) for t in (x, y))
    scores = torch.zeros(len(x), len(y), dtype=torch.float64)
    for m in range(len(x)):
        for n in range(len(y)):
            a = x[m] if x_mask is None else x[m][x_mask[m]]
            b = y[n] if y_mask is None else y[n][y_mask[n]]
            if a.shape[0] and b.shape[0]:
                best = (a @ b.T).amax(1)
                scores[m, n] = best.sum() if reduction == "sum" else best.mean()
    return scores


def error(found: Tensor, x: Tensor, y: Tensor, y_scale: Tensor, *masks: Tensor | None, **options: Any) -> float:
    """Relative to the scores, or to what they are of without cancellation over the width."""
    expected = exact(x, y, y_scale, *masks, **options)
    positive = exact(x.abs(), y.double().abs(), y_scale, *masks, **options)
    size = max(float(expected.norm()), float(positive.norm()) / max(1, x.shape[-1]) ** 0.5)
    return float((found - expected).norm()) / max(size, 1e-300)


# queries, tokens of each; documents, tokens of each
SIZES = [(1, 1, 1, 1), (3, 5, 4, 7), (1, 32, 9, 12), (2, 33, 5, 25), (5, 3, 2, 190), (40, 17, 3, 13)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 128, 513])
@pytest.mark.parametrize("sizes", SIZES)
def test_scores_in_float32_and_float64(sizes: tuple[int, ...], width: int, backend: str) -> None:
    m, p, n, t = sizes
    x, (y, scale) = queries(m, p, width), documents(n, t, width)
    with backends.use(backend):
        found = maxsim_int8(x, y, scale)
        double = maxsim_int8(x.double(), y, scale, reduction="sum")
    assert found.dtype == torch.float32 and error(found, x, y, scale) < 1e-6
    assert double.dtype == torch.float64 and error(double, x, y, scale, reduction="sum") < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_masks(reduction: str, backend: str) -> None:
    """The first query and the first document have no token; scores with them are 0, whatever their scales."""
    x, (y, scale) = queries(5, 40, 9), documents(6, 50, 9)
    masks = mask(5, 40), mask(6, 50, seed=2)
    scale = torch.where(masks[1], scale, math.nan)
    with backends.use(backend):
        for x_mask in (masks[0], None):
            found = maxsim_int8(x, y, scale, x_mask, masks[1], reduction=reduction)
            assert error(found, x, y, scale.nan_to_num(), x_mask, masks[1], reduction=reduction) < 1e-6
            assert not found[:, 0].any() and found[1:, 1:].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_padded(backend: str) -> None:
    lengths = torch.tensor([0, 13, 1, 36, 1, 9, 0])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    (y, scale), x = documents(60, 8), queries(21, 8)
    x_ends = torch.tensor([0, 2, 2, 21], dtype=torch.int32)
    padded_y, padded_scale = (
        torch.nn.utils.rnn.pad_sequence(list(s.split(lengths.tolist())), batch_first=True) for s in (y, scale)
    )
    padded_x = torch.nn.utils.rnn.pad_sequence(list(x.split([2, 0, 19])), batch_first=True)
    kept = [torch.arange(36) < lengths[:, None], torch.arange(19) < torch.tensor([2, 0, 19])[:, None]]
    with backends.use(backend):
        found = maxsim_int8(x, y, scale, x_cu_seqlens=x_ends, y_cu_seqlens=ends)
    assert found.shape == (3, 7) and error(found, padded_x, padded_y, padded_scale, kept[1], kept[0]) < 1e-6


@needs_library
def test_layouts_give_the_bits_of_dense_tokens() -> None:
    x, (y, scale) = queries(3, 20, 12), documents(5, 30, 12)
    expected = maxsim_int8(x, y, scale)
    wide, apart = torch.full((5, 60, 25), 99, dtype=torch.int8), torch.full((5, 60), math.nan)
    wide[:, ::2, 1::2], apart[:, 1::2] = y, scale
    strided = x.transpose(1, 2).contiguous().transpose(1, 2), wide[:, ::2, 1::2], apart[:, 1::2]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(maxsim_int8(*strided), expected)
    columns = y.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert columns.stride(2) != 1 and torch.equal(maxsim_int8(x, columns, scale), expected)
    packed = [t.flatten(0, 1) for t in (wide[:, ::2, 1::2], apart[:, 1::2])]
    ends = torch.arange(0, 151, 30)
    assert torch.equal(maxsim_int8(x, *packed, y_cu_seqlens=ends), expected)
    rows = wide[0, ::2, 1::2]  # packed rows apart, read where they are
    assert torch.equal(maxsim_int8(x, rows, apart[0, 1::2], y_cu_seqlens=torch.tensor([0, 30])), expected[:, :1])
    one = maxsim_int8(x, y[:1].expand(4, -1, -1), scale[:1].expand(4, -1))
    assert torch.equal(one, expected[:, :1].expand(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_score(backend: str) -> None:
    with backends.use(backend):
        for shapes, result in (
            (((0, 5, 4), (3, 6, 4)), (0, 3)),
            (((3, 5, 4), (0, 6, 4)), (3, 0)),
            (((3, 0, 4), (2, 6, 4)), (3, 2)),
            (((3, 5, 4), (2, 0, 4)), (3, 2)),
            (((3, 5, 0), (2, 6, 0)), (3, 2)),
        ):
            y = torch.ones(shapes[1], dtype=torch.int8)
            found = maxsim_int8(torch.ones(shapes[0]), y, torch.full(y.shape[:2], math.nan if not y.numel() else 1.0))
            assert found.shape == result and not found.any()


# --- what a scale does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_reaches_its_document_alone(value: float, normalize: bool, backend: str) -> None:
    """With products of either sign, so that an infinite one might also be the least of them."""
    (y, scale), x = documents(5, 40, 6), queries(3, 20, 6)
    y[2, 17] = 0
    with backends.use(backend):
        expected = maxsim_int8(x, y, scale, normalize=normalize)
        for document, token in ((2, 17), (3, 0), (4, 39)):
            wrong = scale.clone()
            wrong[document, token] = value
            found = maxsim_int8(x, y, wrong, normalize=normalize)
            rest = torch.arange(5) != document
            assert found[:, document].isnan().all() and torch.equal(found[:, rest], expected[:, rest])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_with_nan_has_nan_scores(backend: str) -> None:
    (y, scale), x = documents(5, 40, 6), queries(3, 20, 6)
    x[1, 19, 5] = math.nan
    with backends.use(backend):
        found = maxsim_int8(x, y, scale)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_and_negative_scales(backend: str) -> None:
    (y, scale), x = documents(4, 9, 5), queries(3, 7, 5)
    scale[:, ::3], scale[1, 1::3] = 0, -0.5
    scale[3] = 0
    with backends.use(backend):
        found = maxsim_int8(x, y, scale)
    assert error(found, x, y, scale) < 1e-6 and not found[:, 3].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 16, 37, 513])
def test_unit_length(width: int, backend: str) -> None:
    x, (y, scale) = 7 * queries(3, 20, width), documents(4, 30, width)
    y[1, 4] = 0
    scale[2, ::2], scale[3, 1::2] = 0, -3.0
    with backends.use(backend):
        found = maxsim_int8(x, y, scale, normalize=True)
        double = maxsim_int8(x.double(), y, scale, normalize=True)
        other = maxsim_int8(x, y, scale.sign() * 1e-44, normalize=True)  # whose square is 0 in float64 too
        masked = maxsim_int8(x, y, scale, None, mask(4, 30), normalize=True)
    assert error(found, x, y, scale, unit=True) < 1e-6 and error(double, x, y, scale, unit=True) < 1e-13
    assert torch.equal(found, other) and error(masked, x, y, scale, None, mask(4, 30), unit=True) < 1e-6


@pytest.mark.skipif(bool(backends.available()["triton"]), reason="waits for the package triton")
@pytest.mark.parametrize(
    "normalize", [pytest.param(n, marks=[pytest.mark.gpu] * torch.cuda.is_available()) for n in (False, True)]
)
def test_tokens_are_made_first_for_triton(normalize: bool) -> None:
    x, (y, scale) = queries(3, 20, 16), documents(5, 30, 16)
    device = backends.device_type("triton")
    with backends.use("triton"):
        found = maxsim_int8(*(t.to(device) for t in (x, y, scale)), y_mask=mask(5, 30).to(device), normalize=normalize).cpu()
    assert error(found, x, y, scale, None, mask(5, 30), unit=normalize) < 1e-5


def test_as_exact_as_tokens_made_first() -> None:
    """Their definition is one; the kernel rounds later, so that its error is not the larger one."""
    x, (y, scale) = queries(8, 32, 128), documents(40, 50, 128)
    made_first = maxsim(x, y * scale[..., None], directions="x_to_y")
    found = maxsim_int8(x, y, scale)
    assert relative_error(found, made_first) < 5e-7
    assert error(found, x, y, scale) < 1.1 * error(made_first, x, y, scale) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_queries_and_autocast(backend: str, dtype: torch.dtype) -> None:
    x, (y, scale) = queries(3, 20, 12), documents(5, 30, 12)
    with backends.use(backend):
        half = maxsim_int8(x.to(dtype), y, scale)
        with torch.autocast("cpu", dtype):
            cast, double = maxsim_int8(x, y, scale), maxsim_int8(x.double(), y, scale)
        with torch.autocast("cpu", dtype):
            unit = maxsim_int8(3 * x, y, scale, normalize=True)
    assert half.dtype == torch.float32 and error(half, x.to(dtype), y, scale) < 1e-6
    assert torch.equal(cast, half) and double.dtype == torch.float64 and error(double, x, y, scale) < 1e-13
    assert unit.dtype == torch.float32 and error(unit, unit_tokens(3 * x).to(dtype), y, 1 / y.double().norm(dim=-1)) < 1e-6


# --- threads, instruction sets, torch's machinery ---------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("normalize", [False, True])
def test_two_threads_and_parts_give_the_same_bits(normalize: bool) -> None:
    """Whichever documents come together, and whether in one task or many (600 tokens of 256 numbers fill two)."""
    x, (y, scale) = queries(9, 33, 256), documents(30, 40, 256)
    kept = mask(30, 40)
    expected = maxsim_int8(x, y, scale, None, kept, normalize=normalize)
    torch.set_num_threads(2)
    try:
        found = maxsim_int8(x, y, scale, None, kept, normalize=normalize)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, expected)
    parts = [maxsim_int8(x, y[i : i + 7], scale[i : i + 7], None, kept[i : i + 7], normalize=normalize) for i in range(0, 30, 7)]
    assert torch.equal(torch.cat(parts, 1), expected)
    rows = [maxsim_int8(x[i : i + 1], y, scale, None, kept, normalize=normalize) for i in range(9)]
    assert torch.equal(torch.cat(rows), expected)


SETS_CHECK = """
import sys
sys.path[:0] = ["tests/ops"]
import test_maxsim_int8 as module
for sizes in module.SIZES:
    for width in (1, 17, 513):
        module.test_scores_in_float32_and_float64(sizes, width, "cpp")
for value in (float("nan"), float("inf")):
    module.test_a_scale_that_is_no_number_reaches_its_document_alone(value, True, "cpp")
module.test_zero_and_negative_scales("cpp")
module.test_unit_length(37, "cpp")
"""


@needs_library
@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_other_instruction_sets(instructions: str) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SETS_CHECK], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr


@needs_library
def test_opcheck() -> None:
    (y, scale), x = documents(71, 4), queries(40, 4)
    starts = torch.tensor([0, 3, 3, 40]), torch.tensor([0, 0, 13, 14, 50, 51, 71])
    for masks, mean, unit in (((mask(40), None), True, False), ((None, mask(71)), False, True)):
        torch.library.opcheck(torch.ops.vlpfast.maxsim_int8, (x, y, scale, *starts, *masks, 37, 36, mean, unit))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend: str) -> None:
    torch._dynamo.reset()
    x, (y, scale) = queries(3, 20, 6), documents(5, 30, 6)
    (packed_y, packed_scale), ends = documents(40, 6), torch.tensor([0, 3, 3, 40])

    def function(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return (
            maxsim_int8(2 * x, y, scale, normalize=True),
            maxsim_int8(x, packed_y, packed_scale, reduction="sum", y_cu_seqlens=ends),
        )

    with backends.use(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for f, e in zip(compiled(x, y, scale), function(x, y, scale), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-6)


def test_meta_and_fake_tensors_take_shape_only() -> None:
    found = maxsim_int8(*(t.to("meta") for t in (queries(7, 5, 3).bfloat16(), *documents(9, 6, 3))))
    assert found.shape == (7, 9) and found.is_meta and found.dtype == torch.float32
    with FakeTensorMode():
        x, y, scale = torch.empty(7, 5, 3), torch.empty(20, 3, dtype=torch.int8), torch.empty(20)
        assert maxsim_int8(x, y, scale, y_cu_seqlens=torch.empty(4, dtype=torch.int64)).shape == (7, 3)
        with pytest.raises(ValueError, match="y_scale: expected shape"):
            maxsim_int8(x, y, torch.empty(19), y_cu_seqlens=torch.empty(4, dtype=torch.int64))


def test_there_is_no_gradient() -> None:
    x, (y, scale) = queries(3, 20, 6), documents(5, 30, 6)
    expected = maxsim_int8(x, y, scale)
    with pytest.raises(ValueError, match=r"x: expected no gradient to be asked for .* got requires_grad=True"):
        maxsim_int8(x.clone().requires_grad_(), y, scale)
    with pytest.raises(ValueError, match="x: expected no gradient to be asked for"):
        torch.func.grad(lambda x: maxsim_int8(x, y, scale).sum())(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = maxsim_int8(x.clone().requires_grad_(), y, scale)
        assert torch.equal(found, expected) and not found.requires_grad


@needs_library
def test_products_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        maxsim_int8(queries(3, 5, 4), *documents(7, 6, 4))
    assert counter.get_total_flops() == 2 * 21 * 5 * 6 * 4


# --- making int8 tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_no_number_is_further_than_half_a_step(dtype: torch.dtype) -> None:
    tokens = torch.cat([10.0**e * queries(50, 33, seed=3 + e) for e in (-3, 0, 3)]).reshape(3, 50, 33).to(dtype)
    codes, scale = quantize_tokens(tokens)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (3, 50)
    assert ((codes.double() * scale.double()[..., None] - tokens.double()).abs() <= scale.double()[..., None] / 2).all()
    torch.testing.assert_close(scale, tokens.abs().amax(-1).float() / 127, rtol=2e-7, atol=0)
    assert (codes.abs().amax(-1) == 127).all() and codes.min() == -127 and codes.max() == 127


def test_ties_go_to_even_and_numbers_stay() -> None:
    codes, scale = quantize_tokens(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]))
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -2, -127] and scale.item() == 1
    y = torch.randint(-127, 128, (40, 17), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    y[:, 3] = 127
    again, scale = quantize_tokens(y * 0.25)
    assert torch.equal(again, y) and (scale == 0.25).all()


def test_zeros_numbers_that_are_none_and_the_ends_of_float32() -> None:
    tokens = torch.zeros(5, 4)
    tokens[1, 2], tokens[2, 0], tokens[3, 3] = math.nan, math.inf, -math.inf
    codes, scale = quantize_tokens(tokens)
    assert not codes.any() and scale.isnan().tolist() == [False, True, True, True, False] and not scale[[0, 4]].any()
    found = maxsim_int8(torch.ones(1, 2, 4), codes[:, None], scale[:, None])
    assert found[0].isnan().tolist() == [False, True, True, True, False]
    _, scale = quantize_tokens(torch.tensor([[1e41], [1e40]], dtype=torch.float64))
    assert scale.isnan().tolist() == [True, False]
    for size in (1e-36, 1e-40, 3e-43, 1e-44, 1.4e-45):
        tokens = size * torch.linspace(-1, 1, 9)[None]
        codes, scale = quantize_tokens(tokens)
        assert ((codes.double() * scale.double() - tokens.double()).abs() <= max(float(scale) / 2, 1e-43)).all()


def test_tokens_without_numbers() -> None:
    for shape in ((0, 4), (3, 0), (2, 0, 5), (0,)):
        codes, scale = quantize_tokens(torch.ones(shape))
        assert codes.shape == shape and scale.shape == shape[:-1] and not scale.any()
    leaf = queries(2, 3).requires_grad_()
    assert not any(t.requires_grad for t in quantize_tokens(leaf))


def test_how_far_scores_are_off() -> None:
    """The bound of the docstring, and what unit vectors of width 128 have."""
    x, tokens = (
        torch.nn.functional.normalize(queries(*shape, 128, seed=s), dim=-1) for s, shape in ((1, (20, 8)), (2, (60, 40)))
    )
    codes, scale = quantize_tokens(tokens)
    products = torch.einsum("mpd,ntd->mnpt", x, tokens), torch.einsum("mpd,ntd->mnpt", x, codes * scale[..., None])
    off = (products[0] - products[1]).abs()
    assert (off <= scale[None, :, None] / 2 * x.abs().sum(-1)[:, None, :, None] + 1e-6).all()
    assert float(off.square().mean().sqrt()) < 2e-3
    found, expected = maxsim_int8(x, codes, scale), maxsim(x, tokens, directions="x_to_y")
    assert relative_error(found, expected) < 4e-3


# --- wrong arguments --------------------------------------------------------------------------------------------------

X, Y, SCALE = torch.ones(2, 5, 3), torch.ones(4, 6, 3, dtype=torch.int8), torch.ones(4, 6)
ENDS = torch.tensor([0, 6])
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "x: expected a tensor, got list": (TypeError, {"x": [[1.0]]}),
    "x: expected float32, float64, bfloat16 or float16, got torch.int8": (TypeError, {"x": X.to(torch.int8)}),
    r"x: expected shape \[M, P, D\], got \(2, 5\)": (ValueError, {"x": X[..., 0]}),
    "x_mask: expected torch.bool": (TypeError, {"x_mask": torch.ones(2, 5)}),
    "y: expected a tensor, got list": (TypeError, {"y": [[1]]}),
    "y: expected torch.int8, got torch.float32": (TypeError, {"y": Y.float()}),
    r"y: expected shape \[N, T, D\], got \(4, 6\)": (ValueError, {"y": Y[..., 0]}),
    r"y: expected shape \[L, D\] with y_cu_seqlens, got \(4, 6, 3\)": (ValueError, {"y_cu_seqlens": ENDS}),
    "y: expected width 3 as x has, got 2": (ValueError, {"y": Y[..., :2]}),
    "y: expected device cpu as x has, got meta": (ValueError, {"y": Y.to("meta"), "y_scale": SCALE.to("meta")}),
    "y_scale: expected a tensor, got float": (TypeError, {"y_scale": 1.0}),
    "y_scale: expected torch.float32, got torch.float16": (TypeError, {"y_scale": SCALE.half()}),
    r"y_scale: expected shape \(4, 6\), got \(4, 1\)": (ValueError, {"y_scale": SCALE[:, :1]}),
    "y_scale: expected device cpu as y has, got meta": (ValueError, {"y_scale": SCALE.to("meta")}),
    r"y_mask: expected shape \(4, 6\), got \(4,\)": (ValueError, {"y_mask": torch.ones(4, dtype=torch.bool)}),
    "y_mask: expected None with y_cu_seqlens, got a mask": (
        ValueError,
        {"y": Y[0], "y_scale": SCALE[0], "y_cu_seqlens": ENDS, "y_mask": torch.ones(6, dtype=torch.bool)},
    ),
    "y_cu_seqlens: expected numbers from 0 to 6 tokens, got 0 to 5": (
        ValueError,
        {"y": Y[0], "y_scale": SCALE[0], "y_cu_seqlens": torch.tensor([0, 5])},
    ),
    "reduction: expected 'mean' or 'sum', got 'max'": (ValueError, {"reduction": "max"}),
    "normalize: expected True or False, got 1": (TypeError, {"normalize": 1}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    kind, wrong = WRONG[message]
    with pytest.raises(kind, match=message):
        maxsim_int8(**({"x": X, "y": Y, "y_scale": SCALE} | wrong))


def test_wrong_tokens_are_named() -> None:
    wrong: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "tokens: expected a tensor, got list", lambda: quantize_tokens([1.0])),
        (TypeError, "tokens: expected float32, float64, bfloat16 or float16, got torch.int8", lambda: quantize_tokens(Y)),
        (ValueError, r"tokens: expected shape \[..., D\], got a 0-d tensor", lambda: quantize_tokens(torch.tensor(1.0))),
    ]
    for kind, message, call in wrong:
        with pytest.raises(kind, match=message):
            call()


@needs_library
def test_the_kernel_checks_what_only_it_can_see() -> None:
    def raw(y: Tensor, scale: Tensor, x: Tensor = X[0]) -> None:
        torch.ops.vlpfast.maxsim_int8(x, y, scale, torch.tensor([0, 5]), ENDS, None, None, 5, 6, True, False)

    raw(Y[0], SCALE[0])
    for message, arguments in {
        "y: expected int8, got Float": (Y[0].float(), SCALE[0]),
        "y_scale: expected 6 numbers, got 5": (Y[0], SCALE[0, :5]),
        "expected a floating dtype, got Char": (Y[0], SCALE[0], X[0].to(torch.int8)),
        "differ in width": (Y[0, :, :2], SCALE[0]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            raw(*arguments)
    with pytest.raises(RuntimeError, match="expected a floating dtype, got Char"):
        starts = torch.tensor([0, 5]), ENDS
        torch.ops.vlpfast.maxsim_fwd(X[0], Y[0], *starts, None, None, 5, 6, None, True, False, True, False, False)
