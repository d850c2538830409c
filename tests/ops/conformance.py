"""The conformance table: every operator x backend x dtype x case, against its reference in float64 on the same numbers.

A new operator adds one `Op` to OPS; test_conformance.py runs the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops import backends, contrastive, maxsim, temporal
from vlpfast.ops.selfcheck import TOLERANCES

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Op:
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    kernels: dict[str, str]  # beside reference: backend -> device type
    features: tuple[str, ...]  # arguments that come in the dtype under test
    parameters: tuple[str, ...]  # differentiable arguments in the accumulating dtype
    cases: dict[str, Callable[[], Arguments]]
    logarithms: bool = False  # results are logarithms: errors count relative to 1 where the results are smaller


def run(op: Op, backend: str, arguments: Arguments) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The results, and the gradients of a fixed weighted sum of the finite ones, by argument."""
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in (*op.features, *op.parameters)
        if isinstance(arguments.get(name), Tensor)
    }
    with backends.use(backend):
        results = op.call(**(arguments | leaves))
    results = list(results) if isinstance(results, tuple) else [results]
    total = torch.zeros((), dtype=torch.float64, device=results[0].device)
    for result in results:
        weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=result.device).reshape(result.shape)
        total = total + torch.where(result.isfinite(), result * weights, 0).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [r.detach() for r in results], {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def convert(op: Op, arguments: Arguments, dtype: torch.dtype, device: str) -> Arguments:
    """Features in `dtype`, parameters in the accumulating one; layouts (strides, offsets) stay."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def one(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one("", v) for v in value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value.to(device) if isinstance(value, Tensor) else value
        target = dtype if name in op.features else wide
        base = value._base if value._base is not None else value
        base = base.to(device, target)
        return base.as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: one(name, value) for name, value in arguments.items()}


def relative_error(found: Tensor, expected: Tensor, floor: float = 1e-300) -> float:
    """Frobenius, over the finite entries (`floor`: their least typical size); infinite where the others are not the same."""
    assert found.shape == expected.shape
    found, expected = found.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(torch.where(finite, 0, found), torch.where(finite, 0, expected)):
        return torch.inf
    difference = torch.where(finite, found - expected, 0).norm()
    size = torch.where(finite, expected, 0).norm().clamp_min(max(1e-300, floor * expected.numel() ** 0.5))
    return float((difference / size).nan_to_num(torch.inf))


def compare(op: Op, backend: str, dtype: torch.dtype, case: str) -> None:
    arguments = convert(op, op.cases[case](), dtype, backends.device_type(backend))
    results, gradients = run(op, backend, arguments)
    expected, expected_gradients = run(op, "reference", convert(op, arguments, torch.float64, "cpu"))
    slack = 10 if backend == "reference" else 1  # dense sums in float32 are less exact
    value_tolerance, gradient_tolerance = (slack * tolerance for tolerance in TOLERANCES[dtype])
    for i, (found, wanted) in enumerate(zip(results, expected, strict=True)):
        error = relative_error(found.cpu(), wanted, 1.0 if op.logarithms else 1e-300)
        rounded = found.dtype in (torch.bfloat16, torch.float16)  # as gradients are
        assert error <= (gradient_tolerance if rounded else value_tolerance), f"result {i}: relative error {error:.1e}"
    assert gradients.keys() == expected_gradients.keys()
    for name, found in gradients.items():
        info = torch.finfo(found.dtype)  # where float16 gradients are subnormal, half their spacing is the least error there is
        error = relative_error(found.cpu(), expected_gradients[name], info.smallest_normal * info.eps / 2 / gradient_tolerance)
        assert error <= gradient_tolerance, f"gradient of {name}: relative error {error:.1e}"


# --- contrastive ------------------------------------------------------------------------------------------------------


def features(m: int, n: int, d: int, *, noise: float | None = None, seed: int = 0) -> Arguments:
    """Unit vectors; with `noise` row i of y is row i of x and so much of something else."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(m, d, generator=generator), torch.randn(n, d, generator=generator)
    if noise is not None:
        y = F.normalize(x, dim=1) + noise * F.normalize(y, dim=1)
    return {"x": F.normalize(x, dim=1).double(), "y": F.normalize(y, dim=1).double()}


def pairs(m: int, n: int, d: int, *, noise: float | None = None, **more: Any) -> Arguments:
    scale = more.pop("scale", 14.3)
    return features(m, n, d, noise=noise) | {"scale": torch.tensor(scale) if isinstance(scale, float) else scale[0]} | more


def ids(m: int, n: int, groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(groups, (m,), generator=generator), torch.randint(groups, (n,), generator=generator)


def permutation(m: int, n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(2))[:m]


def bias(n: int) -> Tensor:
    return torch.linspace(-3, 2, n)


def strided(m: int, n: int, d: int) -> Arguments:
    """x with transposed strides, y every second column of a wider matrix, from its third row on."""
    wide = features(d, n + 2, 2 * d)
    x, y = wide["x"][:, :m].T, wide["y"][2:, ::2]
    assert not x.is_contiguous() and y.storage_offset()
    return {"x": x, "y": y, "scale": torch.tensor(5.0), "bias": torch.linspace(-1, 1, 2 * n)[::2]}


def expanded(m: int, n: int, d: int) -> Arguments:
    both = features(1, n, d)
    return {"x": both["x"].expand(m, d), "y": both["y"], "scale": torch.tensor(5.0), "bias": torch.tensor(0.5).expand(n)}


def cone(n: int, d: int) -> Arguments:
    """Two narrow cones, as freshly initialised towers give: all logits large and nearly equal."""
    both = features(n, n, d)
    x, y = (F.normalize(0.1 * both[name] + both["x"][:1], dim=1) for name in ("x", "y"))
    return {"x": x, "y": y, "scale": torch.tensor(100.0)}


def duplicates(n: int, d: int) -> Arguments:
    """Every pair occurs twice, the cosine of the two 0.9999: the loss is about ln 2 however large the scale."""
    both, other = features(n, n, d, noise=0.05), features(n, n, d, seed=1)
    twins = {name: F.normalize(both[name][torch.arange(n) // 2] + 1e-2 * other[name], dim=1) for name in ("x", "y")}
    return twins | {"scale": torch.tensor(100.0)}


def long_vectors(n: int, d: int) -> Arguments:
    """One long vector each puts the bound on the logits far above most of them: the centred sums underflow."""
    both = features(n, n, d)
    for name in ("x", "y"):
        both[name][0] *= 30
    return both | {"scale": torch.tensor(1.0)}


def tall(arguments: Arguments, name: str) -> Arguments:
    return arguments | {name: arguments[name].repeat(60, 1)}


PAIR_CASES: dict[str, Callable[[], Arguments]] = {
    # sizes: nothing, one, around a strip (16 rows), around a tile (2048 rows, 1024 columns), primes; the width too
    "0x0x4": lambda: pairs(0, 0, 4),
    "0x5x4": lambda: pairs(0, 5, 4),
    "5x0x4": lambda: pairs(5, 0, 4, own=None),
    "3x4x0": lambda: pairs(3, 4, 0, bias=bias(4)),
    "1x1x1": lambda: pairs(1, 1, 1),
    "1x1x7, nothing left": lambda: pairs(1, 1, 7),
    "2x2x3": lambda: pairs(2, 2, 3),
    "15x15x8": lambda: pairs(15, 15, 8),
    "16x16x8": lambda: pairs(16, 16, 8),
    "17x17x8": lambda: pairs(17, 17, 8),
    "127x127x31": lambda: pairs(127, 127, 31),
    "257x509x67": lambda: pairs(257, 509, 67),
    "509x257x67": lambda: pairs(509, 257, 67, own=None),
    "3x1023x5": lambda: pairs(3, 1023, 5),
    "3x1024x5": lambda: pairs(3, 1024, 5),
    "3x1025x5": lambda: pairs(3, 1025, 5),
    "2047x3x5": lambda: pairs(2047, 3, 5, own=None),
    "2048x3x5": lambda: pairs(2048, 3, 5, own=None),
    "2049x3x5": lambda: pairs(2049, 3, 5, own=None),
    # own pair and what else stays out
    "offset": lambda: pairs(20, 33, 6, own=11),
    "index": lambda: pairs(20, 33, 6, own=permutation(20, 33)),
    "strided index": lambda: pairs(10, 33, 6, own=permutation(20, 33)[::2]),
    "no own pair": lambda: pairs(20, 33, 6, own=None),
    "leave out": lambda: pairs(40, 50, 6, leave_out=ids(40, 50, 7)),
    "leave out, no own pair": lambda: pairs(40, 50, 6, own=None, leave_out=ids(40, 50, 7)),
    "everything left out": lambda: pairs(9, 12, 6, leave_out=ids(9, 12, 1)),
    "some rows left out wholly": lambda: pairs(9, 12, 6, leave_out=(torch.arange(9) // 5, torch.zeros(12, dtype=torch.long))),
    "rows": lambda: pairs(20, 33, 6, directions="rows", bias=bias(33)),
    "rows, one column for all": lambda: pairs(20, 33, 6, directions="rows", own=torch.full((20,), 4)),
    "rows, few of them": lambda: pairs(
        5, 1100, 6, directions="rows", own=permutation(5, 1100), bias=bias(1100), leave_out=ids(5, 1100, 7)
    ),
    "rows, two tiles of them": lambda: pairs(2049, 3, 5, directions="rows", own=None),
    "rows, no column": lambda: pairs(5, 0, 4, directions="rows", own=None),
    "rows, none": lambda: pairs(0, 5, 4, directions="rows", bias=bias(5)),
    "rows, width 0": lambda: pairs(3, 700, 0, directions="rows", bias=bias(700)),
    "rows, strided": lambda: strided(20, 533, 6) | {"directions": "rows"},
    "rows, expanded": lambda: expanded(20, 533, 6) | {"directions": "rows"},
    "rows, long vectors": lambda: tall(long_vectors(40, 16), "y") | {"directions": "rows", "leave_out": ids(40, 2400, 9)},
    "cols": lambda: pairs(20, 33, 6, directions="cols", bias=bias(33)),
    # bias and scale
    "bias": lambda: pairs(20, 33, 6, bias=bias(33)),
    "0-d bias": lambda: pairs(20, 33, 6, bias=torch.tensor(-10.0)),
    "bias far down": lambda: pairs(20, 33, 6, bias=torch.tensor(-400.0)),
    "scale 0": lambda: pairs(20, 33, 6, scale=0.0),
    "scale 100": lambda: pairs(20, 33, 6, scale=100.0),
    "negative scale": lambda: pairs(20, 33, 6, scale=-20.0),
    "scale 0, a float": lambda: pairs(20, 33, 6, scale=(0.0,)),
    "scale 14.3, a float": lambda: pairs(20, 33, 6, scale=(14.3,)),
    "scale 100, an int": lambda: pairs(20, 33, 6, scale=(100,)),
    # layouts
    "strided": lambda: strided(20, 33, 6),
    "expanded": lambda: expanded(20, 33, 6),
    # regimes
    "random, scale 100": lambda: pairs(200, 200, 64, scale=100.0),
    "initial cone": lambda: cone(200, 64),
    "low loss": lambda: pairs(200, 200, 64, noise=0.6, scale=50.0),
    "near-zero loss": lambda: pairs(200, 200, 64, noise=0.2, scale=100.0),
    "centred sums underflow": lambda: long_vectors(40, 16),
    "centred sums underflow, all arguments": lambda: long_vectors(40, 16) | {"bias": bias(40), "leave_out": ids(40, 40, 9)},
    "centred sums underflow, rows": lambda: long_vectors(40, 16) | {"bias": bias(40), "directions": "rows"},
    "centred sums underflow, cols": lambda: long_vectors(40, 16) | {"directions": "cols"},
    "centred sums underflow, two tiles of rows": lambda: tall(long_vectors(40, 4), "x") | {"own": None},
    "centred sums underflow, two tiles of columns": lambda: tall(long_vectors(40, 4), "y"),
}
CLIP_CASES = {
    name: case
    for name, case in PAIR_CASES.items()
    if (arguments := case()).keys() == {"x", "y", "scale"} and len(arguments["x"]) == len(arguments["y"])
}


def with_budget(function: Callable[..., Any], stash_bytes: int) -> Callable[..., Any]:
    return lambda **arguments: function(**arguments, stash_bytes=stash_bytes)


OPS = {
    f"{function.__name__}, {plan}": Op(
        with_budget(function, budget), contrastive.pair.KERNELS, ("x", "y"), ("scale", "bias"), cases, logarithms
    )
    for function, cases, logarithms in (
        (contrastive.pair_logsumexp, PAIR_CASES, True),
        (contrastive.clip_loss, CLIP_CASES, False),
    )
    for plan, budget in (("stash", 4 << 30), ("recompute", 0))
}


# --- softplus over all pairs ------------------------------------------------------------------------------------------

SOFTPLUS_CASES: dict[str, Callable[[], Arguments]] = {
    name: case for name, case in PAIR_CASES.items() if "directions" not in case()
} | {
    "one column for all": lambda: pairs(20, 33, 6, own=torch.full((20,), 4), bias=bias(33)),
    "a column twice, leave out": lambda: pairs(20, 33, 6, own=torch.arange(20) // 2, leave_out=ids(20, 33, 7)),
    "negative weight 0.3": lambda: pairs(20, 33, 6, bias=bias(33), negative_weight=0.3),
    "negative weight 5, an int": lambda: pairs(20, 33, 6, own=permutation(20, 33), negative_weight=5),
    "negative weight 0": lambda: pairs(20, 33, 6, negative_weight=0.0),
    "initial scale and bias": lambda: pairs(200, 200, 64, scale=10.0, bias=torch.tensor(-10.0)),
    "initial cone, bias": lambda: cone(200, 64) | {"bias": torch.tensor(-10.0)},
    "near-zero loss, bias": lambda: pairs(200, 200, 64, noise=0.2, scale=60.0, bias=torch.tensor(-45.0)),
}
SIGMOID_CASES = {
    name: case
    for name, case in SOFTPLUS_CASES.items()
    if {"x", "y", "scale", "bias"} <= case().keys() and "negative_weight" not in case()
}
OPS |= {
    "pair_softplus": Op(contrastive.pair_softplus, contrastive.softplus.KERNELS, ("x", "y"), ("scale", "bias"), SOFTPLUS_CASES),
    "sigmoid_loss": Op(contrastive.sigmoid_loss, contrastive.softplus.KERNELS, ("x", "y"), ("scale", "bias"), SIGMOID_CASES),
}


# --- a student and a teacher ------------------------------------------------------------------------------------------


def with_teacher(arguments: Arguments) -> Arguments:
    """The teacher's features are the student's and some noise; its scale is 0.7 of the student's, a bias is its own."""
    generator = torch.Generator().manual_seed(3)
    for name in ("x", "y"):
        t = arguments[name]
        noise = torch.randn(t.shape, generator=generator, dtype=t.dtype) / max(1, t.shape[1]) ** 0.5
        arguments |= {f"{name}_t": arguments.get(f"{name}_t", t + 0.3 * noise)}
    if "bias" in arguments:
        arguments["bias_t"] = arguments.pop("bias")
    return {"scale_t": 0.7 * arguments["scale"]} | arguments


def other_layout(arguments: Arguments, other: Arguments) -> Arguments:
    return arguments | {"x_t": other["x"].flip(0) if other["x"].is_contiguous() else other["x"], "y_t": other["y"]}


DISTILL_CASES: dict[str, Callable[[], Arguments]] = {
    name: lambda case=case: with_teacher(case()) for name, case in SOFTPLUS_CASES.items() if "negative_weight" not in case()
} | {
    "strided": lambda: with_teacher(other_layout(strided(20, 33, 6), strided(20, 33, 6))),
    "expanded": lambda: with_teacher(other_layout(expanded(20, 33, 6), expanded(20, 33, 6))),
    "teacher's scale 0": lambda: with_teacher(pairs(20, 33, 6)) | {"scale_t": 0.0},
    "teacher's scale 100, an int": lambda: with_teacher(pairs(20, 33, 6)) | {"scale_t": 100},
    "teacher's bias leaves columns out": lambda: with_teacher(
        pairs(20, 33, 6, own=None, bias=torch.where(torch.arange(33) % 3 > 0, -torch.inf, 0.0))
    ),
    "strips and tiles, index": lambda: with_teacher(pairs(131, 1100, 7, own=permutation(131, 1100), leave_out=ids(131, 1100, 9))),
    "two blocks": lambda: with_teacher(pairs(530, 70, 7, own=permutation(530, 530) % 70, bias=bias(70))),
    "several tiles to a part": lambda: with_teacher(pairs(3, 16400, 3, own=16390)),
}


def distill_in_one_pass(y: Tensor, y_t: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    """Keys without a gradient, the same for student and teacher."""
    y = y.detach()
    return contrastive.pair_distill(y=y, y_t=y, **arguments)


def distill_shared(y: Tensor, y_t: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    return contrastive.pair_distill(y=y, y_t=y, **arguments)


OPS |= {
    name: Op(function, contrastive.distill.KERNELS, ("x", "y", "x_t", "y_t"), ("scale", "scale_t", "bias_t"), DISTILL_CASES, True)
    for name, function in (
        ("pair_distill, stash", contrastive.pair_distill),
        ("pair_distill, recompute", with_budget(contrastive.pair_distill, 0)),
        ("pair_distill, one y", with_budget(distill_shared, 1000)),
        ("pair_distill, one pass", distill_in_one_pass),
    )
}


def distilled(n: int, d: int, queue: int, **more: Any) -> Arguments:
    queues = features(queue, queue, d, seed=5)
    return with_teacher(pairs(n, n, d, **more)) | {
        "alpha": 0.4, "row_negatives": queues["x"], "col_negatives": queues["y"],
    }  # fmt: skip


DISTILLED_CASES: dict[str, Callable[[], Arguments]] = {
    "momentum, queue": lambda: distilled(30, 12, 70),
    "live, queue": lambda: distilled(30, 12, 70) | {"keys": "live"},
    "live": lambda: with_teacher(pairs(30, 30, 12)) | {"keys": "live", "alpha": 1.0},
    "one pair, queue of one": lambda: distilled(1, 3, 1),
    "nothing": lambda: distilled(0, 3, 5),
    "scale 100, near-zero loss": lambda: distilled(200, 64, 300, noise=0.2, scale=100.0) | {"alpha": 0.0},
}
OPS["distilled_contrastive_loss"] = Op(
    contrastive.distilled_contrastive_loss, contrastive.distill.KERNELS,
    ("x", "y", "x_t", "y_t", "row_negatives", "col_negatives"), ("scale",), DISTILLED_CASES,
)  # fmt: skip


# --- late interaction -------------------------------------------------------------------------------------------------


def token_sets(x_shape: tuple[int, ...], y_shape: tuple[int, ...], seed: int = 0, **more: Any) -> Arguments:
    """Vectors of unit length; the last number of both shapes is their width."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(torch.randn(*shape, generator=generator), dim=-1).double() for shape in (x_shape, y_shape))
    return {"x": x, "y": y} | more


def mask(*shape: int, share: float = 0.6, seed: int = 1) -> Tensor:
    """True for that share of tokens; the first set has none."""
    keep = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share
    return keep.index_fill_(0, torch.arange(min(1, shape[0])), False)


def strided_sets() -> Arguments:
    """x with its tokens the last dimension in memory, y every second number of every second token, from its third set on."""
    both = token_sets((4, 6, 9), (7, 20, 12))
    x, y = both["x"].transpose(1, 2), both["y"][2:, ::2, ::2]
    assert not x.is_contiguous() and y.storage_offset() and x.shape[2] == y.shape[2]
    return {"x": x, "y": y}


def masked_sets(**more: Any) -> Arguments:
    return token_sets((5, 40, 8), (6, 30, 8), x_mask=mask(5, 40), y_mask=mask(6, 30, seed=2), **more)


def packed_sets(**more: Any) -> Arguments:
    x_cu_seqlens, y_cu_seqlens = torch.tensor([0, 3, 3, 40, 57]), torch.tensor([0, 0, 13, 14, 50, 51, 60, 70, 71])
    return token_sets((57, 8), (71, 8), x_cu_seqlens=x_cu_seqlens, y_cu_seqlens=y_cu_seqlens, **more)


MAXSIM_CASES: dict[str, Callable[[], Arguments]] = {
    # sizes: nothing, one, around a vector of lanes (16), a panel (32) and a tile of rows (12), primes; the width too
    "no set of x": lambda: token_sets((0, 5, 4), (3, 6, 4)),
    "no set of y": lambda: token_sets((3, 5, 4), (0, 6, 4)),
    "no token in x": lambda: token_sets((3, 0, 4), (2, 6, 4)),
    "no token in y": lambda: token_sets((3, 5, 4), (2, 0, 4)),
    "width 0": lambda: token_sets((3, 5, 0), (2, 6, 0)),
    "one of each": lambda: token_sets((1, 1, 3), (1, 1, 3)),
    "one token in x": lambda: token_sets((40, 1, 5), (3, 37, 5)),
    "one token in y": lambda: token_sets((3, 37, 5), (40, 1, 5)),
    "15, 11": lambda: token_sets((2, 15, 15), (3, 11, 15)),
    "16, 12": lambda: token_sets((2, 16, 16), (3, 12, 16)),
    "17, 13": lambda: token_sets((2, 17, 17), (3, 13, 17)),
    "31, 23": lambda: token_sets((2, 31, 31), (3, 23, 31)),
    "32, 24": lambda: token_sets((2, 32, 32), (3, 24, 32)),
    "33, 25": lambda: token_sets((2, 33, 33), (3, 25, 33)),
    "197, 77": lambda: token_sets((2, 197, 64), (3, 77, 64)),
    "width 513": lambda: token_sets((2, 20, 513), (2, 30, 513)),
    "width 1031": lambda: token_sets((1, 17, 1031), (2, 13, 1031)),
    # what is asked for
    "x to y": lambda: token_sets((5, 40, 8), (6, 30, 8), directions="x_to_y"),
    "y to x": lambda: token_sets((5, 40, 8), (6, 30, 8), directions="y_to_x"),
    "sum": lambda: token_sets((5, 40, 8), (6, 30, 8), reduction="sum"),
    "aligned": lambda: token_sets((6, 40, 8), (6, 30, 8), pairs="aligned"),
    "own": lambda: token_sets((5, 40, 8), (5, 7, 30, 8), pairs="own"),
    "own, y to x": lambda: token_sets((5, 40, 8), (5, 7, 30, 8), pairs="own", directions="y_to_x"),
    "own, none": lambda: token_sets((5, 40, 8), (5, 0, 30, 8), pairs="own"),
    # masks, packed sets
    "masks": lambda: masked_sets(),
    "masks, x to y, sum": lambda: masked_sets(directions="x_to_y", reduction="sum"),
    "masks, y to x": lambda: masked_sets(directions="y_to_x"),
    "masks, zero": lambda: masked_sets(masked="zero"),
    "masks, zero, y to x, sum": lambda: masked_sets(masked="zero", directions="y_to_x", reduction="sum"),
    "everything masked": lambda: masked_sets() | {"y_mask": torch.zeros(6, 30, dtype=torch.bool)},
    "everything masked, zero": lambda: masked_sets(masked="zero") | {"y_mask": torch.zeros(6, 30, dtype=torch.bool)},
    "nothing masked": lambda: masked_sets() | {"x_mask": torch.ones(5, 40, dtype=torch.bool)},
    "own, masks": lambda: token_sets((5, 40, 8), (5, 3, 30, 8), pairs="own", x_mask=mask(5, 40), y_mask=mask(5, 3, 30, seed=2)),
    "packed": lambda: packed_sets(),
    "packed, y to x": lambda: packed_sets(directions="y_to_x"),
    "packed, own": lambda: packed_sets(pairs="own"),
    "packed x, padded y": lambda: token_sets(
        (40, 8), (6, 30, 8), x_cu_seqlens=torch.tensor([0, 3, 40], dtype=torch.int32), y_mask=mask(6, 30)
    ),
    # layouts
    "strided": lambda: strided_sets(),
    "expanded": lambda: token_sets((1, 20, 8), (6, 1, 8)) | {"x": token_sets((1, 20, 8), (1,))["x"].expand(5, 20, 8)},
}


OPS |= {
    f"maxsim, {plan}": Op(with_budget(maxsim.maxsim, budget), maxsim.KERNELS, ("x", "y"), (), MAXSIM_CASES)
    for plan, budget in (("stash", 1 << 30), ("recompute", 0))
}


# --- segments, attention over frames ----------------------------------------------------------------------------------


def segments(*lengths: int, width: int = 8, heads: int | None = None, **more: Any) -> Arguments:
    """With heads: scores, of which some tokens' are -inf, and all of the second segment's."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    found = {"x": 2 * torch.randn(total, width, generator=generator).double()}
    found["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    if heads is not None:
        score = 3 * torch.randn(total, heads, generator=generator).double()
        score[torch.rand(total, heads, generator=generator) < 0.2] = -torch.inf
        if len(lengths) > 1:
            score[lengths[0] : lengths[0] + lengths[1]] = -torch.inf
        found["score"] = score
    return found | more


def strided_segments(**more: Any) -> Arguments:
    """Every second channel of a wider matrix, from its third row on."""
    found = segments(3, 0, 9, 30, width=24, **more)
    x = torch.cat((found["x"][:2], found["x"]))[2:, ::2]
    assert x.stride(-1) == 2 and x.storage_offset()
    return found | {"x": x}


SEGMENT_CASES: dict[str, Callable[..., Arguments]] = {
    # sizes: none, one, around a sum's part (128 tokens), a block of channels (512), primes
    "no segment": lambda **m: segments(**m),
    "empty segments alone": lambda **m: segments(0, 0, **m),
    "empty ones between": lambda **m: segments(0, 3, 0, 0, 5, 0, **m),
    "one token each": lambda **m: segments(*[1] * 9, **m),
    "width 0": lambda **m: segments(3, 4, width=0, **m),
    "127, 128, 129": lambda **m: segments(127, 128, 129, **m),
    "one long one": lambda **m: segments(1000, **m),
    "width 1": lambda **m: segments(3, 2, 8, **(m | {"width": 1})) if "heads" not in m else segments(3, 2, 8, **m),
    "width 522": lambda **m: segments(3, 40, width=522, **m),
    "int32": lambda **m: segments(3, 2, 8, **m) | {"cu_seqlens": torch.tensor([0, 3, 5, 13], dtype=torch.int32)},
    "strided": strided_segments,
    "transposed": lambda **m: segments(3, 2, 8, **m) | {"x": segments(3, 5, width=13)["x"].T},
    "expanded": lambda **m: segments(3, 2, 8, **m) | {"x": segments(13, width=1)["x"].expand(13, 8)},
}


def positions(b: int, tq: int, t: int, p: int, dq: int, dv: int, heads: int, **more: Any) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (b, tq, p, heads * dq), "k": (b, t, p, heads * dq), "v": (b, t, p, heads * dv)}
    found = {name: torch.randn(*shape, generator=generator).double() for name, shape in shapes.items()}
    return found | {"heads": heads} | more


def shown(b: int, t: int) -> Tensor:
    """[B, T] bool; nothing of the first clip."""
    found = torch.rand(b, t, generator=torch.Generator().manual_seed(4)) < 0.6
    found[0] = False
    return found


def one_product(b: int, t: int, p: int, d: int, heads: int, **more: Any) -> Arguments:
    """Queries, keys and values are parts of one tensor, positions before frames in memory."""
    qkv = positions(b, p, t, t, 3 * d, 1, heads)["q"].transpose(1, 2)
    return dict(zip("qkv", qkv.chunk(3, -1), strict=True)) | {"heads": heads} | more


ATTENTION_CASES: dict[str, Callable[[], Arguments]] = {
    "no clip": lambda: positions(0, 3, 3, 4, 8, 8, 2),
    "no frame": lambda: positions(2, 0, 0, 4, 8, 8, 2),
    "no key": lambda: positions(2, 3, 0, 4, 8, 8, 2),
    "no query": lambda: positions(2, 0, 3, 4, 8, 8, 2),
    "no position": lambda: positions(2, 3, 3, 0, 8, 8, 2),
    "no value": lambda: positions(2, 3, 3, 4, 8, 0, 2),
    "one frame": lambda: positions(2, 1, 1, 5, 3, 3, 2),
    "two frames": lambda: positions(2, 2, 2, 5, 16, 16, 3),
    "4 frames, depth 17": lambda: positions(2, 4, 4, 5, 17, 17, 3),
    "7 frames, depth 15": lambda: positions(2, 7, 7, 3, 15, 15, 1),
    "8 frames, depth 64": lambda: positions(1, 8, 8, 4, 64, 64, 2),
    "31 frames": lambda: positions(1, 31, 31, 2, 6, 6, 2),
    "32 frames": lambda: positions(1, 32, 32, 2, 6, 6, 2),
    "33 frames": lambda: positions(2, 33, 33, 2, 6, 6, 2, mask=shown(2, 33)),
    "33 frames, causal": lambda: positions(1, 33, 33, 2, 6, 6, 2, causal=True),
    "33 frames, the first ones hidden, causal": lambda: positions(2, 33, 33, 2, 6, 6, 2, mask=shown(2, 33), causal=True),
    "one frame's queries": lambda: positions(2, 1, 7, 3, 8, 8, 2),
    "more queries than keys": lambda: positions(2, 9, 5, 3, 8, 8, 2),
    "wide values": lambda: positions(2, 4, 4, 3, 5, 67, 2, scale=0.3),
    "scale 0": lambda: positions(2, 4, 4, 3, 5, 5, 2, scale=0),
    "causal": lambda: positions(2, 6, 6, 3, 8, 8, 2, causal=True),
    "mask": lambda: positions(3, 6, 6, 3, 8, 8, 2, mask=shown(3, 6)),
    "mask, causal": lambda: positions(3, 5, 5, 2, 8, 8, 2, mask=shown(3, 5), causal=True),
    "everything masked": lambda: positions(2, 6, 6, 3, 8, 8, 2, mask=torch.zeros(2, 6, dtype=torch.bool)),
    "one product": lambda: one_product(2, 5, 7, 8, 2),
    "transposed": lambda: positions(2, 4, 4, 6, 3, 3, 2) | {"k": positions(2, 4, 4, 6, 3, 3, 2)["q"].mT.contiguous().mT},
    "expanded": lambda: positions(2, 4, 4, 6, 3, 3, 2) | {"q": positions(2, 4, 4, 1, 3, 3, 2)["q"].expand(2, 4, 6, 6)},
}


def segment_pool(mode: str) -> Callable[..., Tensor]:
    return lambda **arguments: temporal.segment_pool(**arguments, mode=mode)


def with_scores(case: Callable[..., Arguments]) -> Callable[[], Arguments]:
    return lambda: case(heads=2)


OPS |= {
    f"segment_pool, {mode}": Op(segment_pool(mode), temporal.segments.KERNELS, ("x",), (), SEGMENT_CASES)
    for mode in ("mean", "max", "logsumexp")
} | {
    "segment_pool, attention": Op(
        segment_pool("attention"), temporal.segments.KERNELS, ("x",), ("score",),
        {name: with_scores(case) for name, case in SEGMENT_CASES.items()},
    ),
    "temporal_attention": Op(temporal.temporal_attention, temporal.attention.KERNELS, ("q", "k", "v"), (), ATTENTION_CASES),
}  # fmt: skip
