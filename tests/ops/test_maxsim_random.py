"""maxsim of random problems; a file of its own, so that the others run where hypothesis is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import relative_error
from test_maxsim import equal, needs_library, on
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Sizes up to 200 and widths up to 512, of which one problem has no more products than a test affords."""
    most = 4_000_000
    sizes = {}
    for name in draw(st.permutations(["m", "n", "p", "t", "d"])):  # the first drawn may be the largest
        sizes[name] = draw(st.integers(1, max(1, min(512 if name == "d" else 200, most))))
        most //= sizes[name]
    m, n, p, t, d = (sizes[name] for name in "mnptd")
    pairs = draw(st.sampled_from(["all", "aligned", "own"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(m, p, d, generator=generator)
    y = torch.randn(*{"all": (n, t, d), "aligned": (m, t, d), "own": (m, min(n, 5), t, d)}[pairs], generator=generator)
    masks = {}
    for name, tokens in (("x_mask", x), ("y_mask", y)):
        share = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 0.9]))
        masks[name] = None if share is None else torch.rand(tokens.shape[:-1], generator=generator) < share
    return (
        x,
        y,
        masks
        | {
            "pairs": pairs,
            "masked": draw(st.sampled_from(["ignore", "zero"])),
            "reduction": draw(st.sampled_from(["mean", "sum"])),
            "directions": draw(st.sampled_from(["both", "x_to_y", "y_to_x"])),
        },
    )


@needs_library
@settings(max_examples=100, deadline=None, derandomize=True)
@given(problem=problems(), stash_bytes=st.sampled_from([0, 1 << 30]))
def test_random_shapes(problem: tuple[Tensor, Tensor, dict[str, Any]], stash_bytes: int) -> None:
    """In float32 against float64, and twice the same bits. Errors count beside scores without cancellation: one token's sum may
    be near 0."""
    x, y, arguments = problem
    found = on("cpp", x, y, stash_bytes=stash_bytes, **arguments)
    assert equal(on("cpp", x, y, stash_bytes=stash_bytes, **arguments), found)
    expected = on("reference", x.double(), y.double(), **arguments)
    positive = on("reference", x.double().abs(), y.double().abs(), **arguments)
    for f, e, size in zip(found[:-2], expected[:-2], positive[:-2], strict=True):
        assert (f - e).norm() <= 1e-6 * max(e.norm(), size.norm() / x.shape[-1] ** 0.5)
    for f, e in zip(found[-2:], expected[-2:], strict=True):
        assert relative_error(f, e) <= 1e-5
