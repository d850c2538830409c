from __future__ import annotations

import pytest
import torch

from vlpfast.nn.text import TextConfig, TextTower

CONFIG = TextConfig(width=16, layers=2, heads=2, vocab_size=50, eos_id=2)


def make() -> TextTower:
    torch.manual_seed(0)
    return TextTower(CONFIG, context_length=8)


def test_pool_takes_the_first_end_token() -> None:
    tower = make()
    text = torch.tensor([[1, 7, 2, 0, 0, 0], [1, 2, 9, 2, 2, 0], [49, 48, 47, 46, 45, 2]])
    tokens = tower(text)
    assert tokens.shape == (3, 6, 16)
    expected = tower.norm(torch.stack((tokens[0, 2], tokens[1, 1], tokens[2, 5])))
    torch.testing.assert_close(tower.pool(tokens, text), expected)


def test_what_follows_the_end_changes_nothing() -> None:
    tower = make()
    short = torch.tensor([[1, 7, 8, 2]])
    padded = torch.tensor([[1, 7, 8, 2, 0, 0, 0, 0]])
    other = torch.tensor([[1, 7, 8, 2, 5, 2, 9, 3]])
    features = [tower.pool(tower(text), text) for text in (short, padded, other)]
    torch.testing.assert_close(features[1], features[0])
    torch.testing.assert_close(features[2], features[0])


def test_wrong_captions_are_named() -> None:
    tower = make()
    with pytest.raises(ValueError, match=r"text: expected \[B, L\] with L at most 8, got \(1, 9\)"):
        tower(torch.ones(1, 9, dtype=torch.int64))
    text = torch.tensor([[1, 7, 2], [1, 7, 7]])
    with pytest.raises(ValueError, match="text: expected the end token 2 in every caption"):
        tower.pool(tower(text), text)
