from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vlpfast.nn.transformer import QuickGELU, Transformer, TransformerConfig
from vlpfast.types import UserError

SMALL = TransformerConfig(width=16, layers=3, heads=2)


def test_quick_gelu() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    torch.testing.assert_close(QuickGELU()(x), x * torch.sigmoid(1.702 * x))


def test_unknown_activation() -> None:
    with pytest.raises(UserError, match="activation: expected one of quick_gelu, gelu, got 'relu'"):
        Transformer(replace(SMALL, activation="relu"))


def test_causal_positions_do_not_see_later_ones() -> None:
    torch.manual_seed(0)
    stack = Transformer(SMALL)
    x = torch.randn(2, 7, 16)
    changed = torch.cat((x[:, :4], torch.randn(2, 3, 16)), dim=1)
    torch.testing.assert_close(stack(x, "causal")[:, :4], stack(changed, "causal")[:, :4])
    assert not torch.allclose(stack(x)[:, :4], stack(changed)[:, :4])


def test_checkpointing_changes_memory_alone() -> None:
    torch.manual_seed(0)
    plain = Transformer(SMALL)
    frugal = Transformer(replace(SMALL, checkpointing=True))
    frugal.load_state_dict(plain.state_dict())
    x = torch.randn(2, 7, 16)
    kept = []
    for stack in (plain, frugal):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = stack(x, "causal").square().sum()
        loss.backward()
        kept.append(sum(sizes))
    for expected, got in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=0)
    assert kept[1] < kept[0] / 4


def test_initial_spread() -> None:
    torch.manual_seed(0)
    stack = Transformer(TransformerConfig(width=128, layers=6, heads=2))
    block = stack.blocks[2]
    for weight, std in (
        (block.attn.in_proj.weight, 128**-0.5),
        (block.attn.out_proj.weight, (2 * 6 * 128) ** -0.5),
        (block.fc1.weight, (2 * 128) ** -0.5),
        (block.fc2.weight, (2 * 6 * 128) ** -0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert all((parameter == 0).all() for name, parameter in stack.named_parameters() if name.endswith("bias"))
