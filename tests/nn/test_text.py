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


# --- prompts ---------------------------------------------------------------------------------------------------------------


def prompts(tower: TextTower, prefixes: int = 1, classes: int = 5, own_tails: bool = False) -> list[torch.Tensor]:
    """prefix [T, 3, W], tails [(T,) C, 4, W], end [C] with every place in it."""
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randn(prefixes, 3, 16, generator=generator, requires_grad=True)
    tails = torch.randn(*[prefixes] * own_tails, classes, 4, 16, generator=generator, requires_grad=True)
    return [prefix, tails, torch.arange(classes) % 4]


def plainly(tower: TextTower, prefix: torch.Tensor, tails: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Every prompt whole, through the tower as it is."""
    count = len(prefix), len(end)
    x = torch.cat((prefix[:, None].expand(*count, -1, -1), tails.expand(*count, -1, -1)), 2)  # [T, C, P + L, W]
    tokens = tower.run(x.flatten(0, 1)).unflatten(0, count)
    return tower.norm(tokens[:, torch.arange(count[1]), prefix.shape[1] + end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [256, 2, 1])
@pytest.mark.parametrize(("prefixes", "own_tails"), [(1, False), (3, False), (3, True)])
def test_shared_prefix_is_naive_features_and_gradients(prefixes: int, own_tails: bool, chunk: int, dtype: torch.dtype) -> None:
    tower = make().to(dtype)
    for parameter in tower.parameters():  # norms and biases start at 1 and 0, which would hide a mix-up
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    prefix, tails, end = prompts(tower, prefixes, own_tails=own_tails)
    prefix, tails = (t.detach().to(dtype).requires_grad_() for t in (prefix, tails))
    towards = torch.randn(prefixes, 5, 16, generator=torch.Generator().manual_seed(3), dtype=dtype)
    inputs = [prefix, tails, *(p for name, p in tower.named_parameters() if name != "token_embed.weight")]
    expected = plainly(tower, prefix, tails, end)
    got = tower.encode_prompts(prefix, tails, end, chunk=chunk)
    tolerance = {"atol": 1e-12, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 2e-6, "rtol": 1e-4}
    torch.testing.assert_close(got, expected, **tolerance)
    gradients = [torch.autograd.grad((features * towards).sum(), inputs) for features in (got, expected)]
    torch.testing.assert_close(*gradients, **{**tolerance, "atol": 5e-5 if dtype == torch.float32 else 1e-11})


def test_what_follows_an_end_token_in_a_tail_changes_nothing() -> None:
    tower = make()
    prefix, tails, end = prompts(tower)
    behind = torch.arange(4) > end[:, None]  # [C, L]
    other = torch.where(behind[..., None], 3.0, tails)
    torch.testing.assert_close(tower.encode_prompts(prefix, other, end), tower.encode_prompts(prefix, tails, end))
    assert behind.any()


def test_trimmed_is_untrimmed() -> None:
    tower = make()
    text = torch.tensor([[1, 7, 2, 0, 0, 0, 0, 0], [1, 5, 9, 8, 2, 0, 2, 0]])
    trimmed = tower.trim(text)
    assert trimmed.shape == (2, 5) and tower.trim(text[:0]).shape == (0, 8)
    torch.testing.assert_close(tower.pool(tower(trimmed), trimmed), tower.pool(tower(text), text))


def test_prompts_compile_without_a_break() -> None:
    tower = make()
    prefix, tails, end = prompts(tower)
    encode = torch.compile(tower.encode_prompts, fullgraph=True, backend="aot_eager")
    expected, got = (f(prefix, tails, end, chunk=3) for f in (tower.encode_prompts, encode))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), [prefix]) for y in (got, expected)))


def test_prompts_in_bfloat16_keep_an_exact_softmax() -> None:
    tower = make()
    prefix, tails, end = prompts(tower)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tower.encode_prompts(prefix, tails, end)
        plain = plainly(tower, prefix, tails, end)
    expected = plainly(tower, prefix, tails, end)
    error, base = (((y.float() - expected).norm() / expected.norm()).item() for y in (rounded, plain))
    assert error < max(2 * base, 0.02)


def test_wrong_prompts_are_named() -> None:
    tower = make()
    prefix, tails, end = prompts(tower)
    with pytest.raises(ValueError, match=r"prefix, tails: expected .* with P \+ L at most 8, got \(1, 5, 16\) and \(5, 4, 16\)"):
        tower.encode_prompts(torch.zeros(1, 5, 16), tails, end)
    with pytest.raises(ValueError, match="chunk: expected at least 1, got 0"):
        tower.encode_prompts(prefix, tails, end, chunk=0)
