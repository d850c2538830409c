from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vlpfast.nn.bert import Bert, BertConfig, MaskedLMHead
from vlpfast.nn.heads import MLPHead, Projection
from vlpfast.nn.momentum import FeatureQueue, Momentum
from vlpfast.types import UserError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm, self.dropout = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.last(self.norm(self.first(x))))


def test_momentum_is_a_lerp_to_the_bit() -> None:
    torch.manual_seed(0)
    model = Tied()
    momentum = Momentum(model)
    old = copy.deepcopy(dict(momentum.module.named_parameters()))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    momentum.update(model, 0.995)
    for name, parameter in model.named_parameters():
        now = momentum.module.get_parameter(name)
        assert torch.equal(now, torch.lerp(old[name], parameter, 1 - 0.995))
        torch.testing.assert_close(now, 0.995 * old[name] + 0.005 * parameter)


def test_momentum_follows_tied_weights_once_and_copies_buffers() -> None:
    model = Tied()
    momentum = Momentum(model)
    copied = momentum.module
    assert copied.last.weight is copied.first.weight is not model.first.weight
    assert not any(parameter.requires_grad for parameter in momentum.parameters())
    model(torch.randn(8, 4))  # moves the norm's statistics
    with torch.no_grad():
        copied.first.weight.zero_(), model.first.weight.fill_(1)
    momentum.update(model, 0.75)
    assert (copied.first.weight == 0.25).all()
    assert torch.equal(copied.norm.running_mean, model.norm.running_mean) and copied.norm.num_batches_tracked == 1


def test_momentum_is_in_the_mode_of_its_model() -> None:
    model = nn.Sequential(Tied())
    model.append(Momentum(model[0]))
    x = torch.randn(64, 4)
    assert not torch.equal(model.train()[1](x), model[1](x))  # dropout acts
    assert torch.equal(model.eval()[1](x), model[1](x))


def rows(start: int, count: int, width: int = 3) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(count, width).contiguous()


def test_queue_pointer_wraps() -> None:
    queue = FeatureQueue(12, {"image": 3, "text": 3}, with_ids=True)
    assert queue.image.norm(dim=1).allclose(torch.ones(12)) and (queue.ids == -100).all() and not queue.image.equal(queue.text)
    for step in range(5):
        ids = torch.arange(4 * step, 4 * step + 4)
        queue.enqueue(image=rows(4 * step, 4), text=-rows(4 * step, 4), ids=ids)
        assert int(queue.pointer) == 4 * (step + 1) % 12
    assert queue.ids.tolist() == [*range(12, 20), *range(8, 12)]  # the newest three batches
    assert torch.equal(queue.image[:, 0], queue.ids.float()) and torch.equal(queue.text, -queue.image)
    again = FeatureQueue(12, {"image": 3, "text": 3}, with_ids=True)
    again.load_state_dict(queue.state_dict())
    assert int(again.pointer) == 8


def test_queue_of_a_batch_that_does_not_divide_it() -> None:
    queue = FeatureQueue(12, {"image": 3})
    before = queue.image.clone()
    with pytest.raises(UserError, match="queue_size: expected a multiple of the 5 samples of a batch of all ranks, got 12"):
        queue.enqueue(image=rows(0, 5))
    with pytest.raises(UserError, match="multiple of the 24"):
        queue.enqueue(image=rows(0, 24))
    with pytest.raises(ValueError, match="features: expected image, got text"):
        queue.enqueue(text=rows(0, 4))
    with pytest.raises(ValueError, match="ids: expected None"):
        queue.enqueue(image=rows(0, 4), ids=torch.arange(4))
    assert torch.equal(queue.image, before) and int(queue.pointer) == 0
    with pytest.raises(UserError, match="queue_size: expected at least 1, got 0"):
        FeatureQueue(0, {"image": 3})


def test_projection_is_of_unit_length_in_float32() -> None:
    head = Projection(8, 4)
    x = torch.randn(5, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = head(x)
    assert y.dtype == torch.float32 and y.shape == (5, 3, 4)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(5, 3))
    torch.testing.assert_close(head(x), nn.functional.normalize(x @ head.weight.T + head.bias, dim=-1))
    assert MLPHead(8, 3)(x).shape == (5, 3, 3)


def test_a_copy_of_a_bert_with_its_head_predicts_what_it_does() -> None:
    config = BertConfig(vocab_size=11, width=8, layers=1, heads=2, hidden=16, max_positions=6, dropout=0.0)
    model = nn.ModuleDict({"bert": Bert(config), "head": MaskedLMHead(config)})
    momentum = Momentum(model)
    text = torch.randint(4, 11, (2, 5))

    def logits(network: nn.Module) -> torch.Tensor:
        return network["head"].logits(network["bert"](text), network["bert"].token_embed.weight)

    assert torch.equal(logits(model), logits(momentum.module))
    with torch.no_grad():
        model["bert"].token_embed.weight.add_(torch.randn(11, 8))
    assert not torch.allclose(logits(model), logits(momentum.module))
    momentum.update(model, 0.0)
    torch.testing.assert_close(logits(model), logits(momentum.module))
