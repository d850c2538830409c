from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlpfast.nn.lm import LanguageModel, LMConfig
from vlpfast.nn.lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    load_lora,
    lora_layers,
    lora_state,
    merge_lora,
    set_lora_alpha,
    unmerge_lora,
)
from vlpfast.types import UserError

CONFIG = LoRAConfig(rank=3, alpha=6.0, targets=["*.q_proj", "*.v_proj"])


def make(config: LoRAConfig = CONFIG, dtype: str = "float32") -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(LMConfig("tiny-llama", {"vocab_size": 60}, dtype=dtype))
    add_lora(model.network, config)
    return model


def trained(model: LanguageModel) -> LanguageModel:
    """Additions that are not 0."""
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model):
        layer.lora_b.data = 0.1 * torch.randn(layer.lora_b.shape, generator=generator)
    return model


def embeds() -> Tensor:
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))


def test_at_first_nothing_changes_and_names_stay() -> None:
    plain = make(LoRAConfig())
    model = make()
    assert not any(isinstance(module, LoRALinear) for module in plain.modules())
    assert sum(1 for _ in lora_layers(model)) == 4
    model.load_state_dict(plain.state_dict(), strict=False)
    assert set(model.state_dict()) - set(plain.state_dict()) == set(lora_state(model))
    assert torch.equal(model(embeds()), plain(embeds()))


def test_the_addition_is_the_formula() -> None:
    model = trained(make())
    layer = next(iter(lora_layers(model)))
    x = torch.randn(4, 64)
    expected = x @ (layer.weight + 2.0 * layer.lora_b @ layer.lora_a).T
    torch.testing.assert_close(layer(x), expected)


def test_only_the_additions_are_trained() -> None:
    model = trained(make())
    model(embeds()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == name.endswith(("lora_a", "lora_b")), name
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0


def test_merge_and_unmerge() -> None:
    model = trained(make())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(embeds())
    merge_lora(model)
    merge_lora(model)  # once is enough
    torch.testing.assert_close(model(embeds()), expected)
    with pytest.raises(RuntimeError, match="unmerge it before saving"):
        model.state_dict()
    unmerge_lora(model)
    unmerge_lora(model)
    torch.testing.assert_close(model.state_dict(), before)
    torch.testing.assert_close(model(embeds()), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_another_alpha_at_inference(merged: bool) -> None:
    model = trained(make())
    half = trained(make(LoRAConfig(rank=3, alpha=3.0, targets=CONFIG.targets)))
    if merged:
        merge_lora(model)
    set_lora_alpha(model, 3.0)
    torch.testing.assert_close(model(embeds()), half(embeds()))
    assert not torch.allclose(model(embeds()), trained(make())(embeds()))


def test_dropout_works_in_a_frozen_network() -> None:
    model = trained(make(LoRAConfig(rank=3, dropout=0.5)))
    assert torch.equal(model.eval()(embeds()), model(embeds()))
    assert not torch.equal(model.train()(embeds()), model(embeds()))


def test_state_of_its_own() -> None:
    model = trained(make())
    state = {name: tensor.clone() for name, tensor in lora_state(model).items()}
    assert len(state) == 8 and all("lora" in name for name in state)
    other = make()
    load_lora(other, state)
    assert torch.equal(other(embeds()), model(embeds()))
    name = next(iter(state))
    with pytest.raises(UserError, match="is missing"):
        load_lora(other, {key: value for key, value in state.items() if key != name})
    with pytest.raises(UserError, match="not of this network"):
        load_lora(other, state | {"x.lora_a": torch.zeros(1)})
    with pytest.raises(UserError, match="expected"):
        load_lora(other, state | {name: torch.zeros(1, 2)})


def test_bad_configs_are_named() -> None:
    with pytest.raises(UserError, match=r"lora.targets: pattern '\*.wq' matches no linear layer; they are model"):
        make(LoRAConfig(rank=2, targets=["*.wq"]))
    with pytest.raises(UserError, match="expected rank >= 0"):
        make(LoRAConfig(rank=-1))


def test_half_weights_and_compilation() -> None:
    model = trained(make(dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    layer = next(iter(lora_layers(model)))
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_other_kinds_of_linear_layers_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    network = nn.ModuleDict({"a": nn.Linear(3, 4), "b": Own(3, 4)})
    add_lora(network, LoRAConfig(rank=2, targets=["*"]))
    assert isinstance(network["a"], LoRALinear) and type(network["b"]) is Own
