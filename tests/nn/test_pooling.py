from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlpfast.nn.pooling import AttentionPool, PoolingProjector, sinusoids
from vlpfast.ops import temporal
from vlpfast.types import UserError


def pool(**options: Any) -> AttentionPool:
    torch.manual_seed(0)
    module = AttentionPool(16, 4, **options)
    if module.query is not None:
        torch.nn.init.normal_(module.query)
    return module


@pytest.mark.parametrize("kind", ["query", "mean"])
def test_equal_slices_without_positions_are_one_slice(kind: str) -> None:
    module = pool(positions="none", pool=kind, residual=False)
    x = torch.randn(3, 1, 16)
    value = module.attn.in_proj(x[:, 0])[:, 32:]
    torch.testing.assert_close(module(x.expand(3, 7, 16)), module.attn.out_proj(value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["query", "mean"])
@pytest.mark.parametrize("residual", [True, False])
def test_padded_slices_have_no_weight(kind: str, residual: bool) -> None:
    module = pool(pool=kind, residual=residual)
    x, mask = torch.randn(3, 6, 16), torch.arange(6) < torch.tensor([[6], [4], [0]])
    padded = x.masked_fill(~mask[..., None], 1e4).requires_grad_()
    pooled = module(padded, mask)
    torch.testing.assert_close(pooled[1], module(x[1:2, :4])[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled[0], module(x[:1])[0], rtol=1e-5, atol=1e-6)
    assert not pooled[2].any()
    (gradient,) = torch.autograd.grad(pooled.square().sum(), padded)
    assert gradient.isfinite().all() and gradient[0].any() and not gradient[~mask].any()


def test_order_matters_with_positions_alone() -> None:
    x = torch.randn(2, 5, 16)
    turned = x.flip(1)
    without, positioned = pool(positions="none"), pool()
    torch.testing.assert_close(without(turned), without(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(positioned(turned), positioned(x), atol=1e-2)
    places = torch.arange(5).flip(0)
    torch.testing.assert_close(positioned(turned, position=places), positioned(x), rtol=1e-5, atol=1e-6)


def test_it_starts_as_the_mean() -> None:
    module = pool()
    torch.nn.init.zeros_(module.query)
    mean = pool(pool="mean")
    mean.load_state_dict({name: t for name, t in module.state_dict().items() if name != "query"})
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(module(x), mean(x))
    module(x).square().sum().backward()
    assert module.query.grad.abs().max() > 1e-4
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_sinusoids() -> None:
    table = sinusoids(torch.tensor([0, 3]), 6)
    rate = torch.tensor([1.0, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3)])
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(table[1], torch.cat(((3 * rate).sin(), (3 * rate).cos())))


def test_autocast_and_compilation() -> None:
    module, x = pool(), torch.randn(2, 5, 16)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = module(x, mask)
    torch.testing.assert_close(half.float(), module(x, mask), rtol=5e-2, atol=5e-2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), module(x, mask))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("positions: expected sinusoidal or none, got 'learned'", {"positions": "learned"}),
        ("pool: expected query or mean, got 'max'", {"pool": "max"}),
        ("heads: expected a divisor of the width 16, got 3", {"heads": 3}),
        ("width: expected an even number for sinusoidal positions, got 15", {"width": 15, "heads": 3}),
    ],
)
def test_wrong_settings(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=message):
        AttentionPool(**({"width": 16, "heads": 4} | options))


def test_wrong_arguments() -> None:
    x = torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 5\), got \(5, 2\)"):
        pool()(x, torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask: expected torch\.bool, got torch\.float32"):
        pool()(x, torch.ones(2, 5))
    with pytest.raises(ValueError, match="position: expected None without positions"):
        pool(positions="none")(x, position=torch.arange(5))


@pytest.mark.skipif(not hasattr(temporal, "pool_tokens"), reason="waits for vlpfast.ops.temporal.pool_tokens")
@pytest.mark.parametrize("out", [(4, 2, 3), (2, 3, 5), (None, 3, None)])
def test_pooling_projector(out: tuple[int | None, ...]) -> None:
    """Pooling after the second layer, as the paper has it, is the same."""
    torch.manual_seed(0)
    projector, x = PoolingProjector(8, 12, out), torch.randn(2, 4, 6, 6, 8)
    projected = projector.fc2(F.gelu(projector.fc1(x))).permute(0, 4, 1, 2, 3)
    expected = F.adaptive_avg_pool3d(projected, out).flatten(2).transpose(1, 2)
    torch.testing.assert_close(projector(x), expected, rtol=1e-5, atol=1e-6)
