from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlpfast.hosts.prefix_lm import PrefixLM, PrefixLMConfig
from vlpfast.nn.generation import generate
from vlpfast.nn.lm import LMConfig
from vlpfast.nn.lora import LoRAConfig
from vlpfast.types import UserError

VOCAB, WIDTH, EOS = 60, 12, 2
CONFIGS = {
    "causal": PrefixLMConfig(LMConfig("tiny-llama", {"vocab_size": VOCAB}), answer_length=6),
    "t5": PrefixLMConfig(LMConfig("tiny-t5", {"vocab_size": VOCAB}), answer_length=6, projector="mlp"),
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


def make(config: PrefixLMConfig) -> PrefixLM:
    torch.manual_seed(0)
    model = PrefixLM(config, WIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


PROMPTS, ANSWERS = [3, 5, 1, 4], [2, 1, 3, 2]  # words


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """visual [4, 3, Cv]; bos, prompt, answer, eos with mask and labels."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, VOCAB, (4, 10), generator=generator)
    lengths = torch.tensor([2 + p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)])[:, None]
    position = torch.arange(10)
    mask = position < lengths
    text[:, 0] = 1
    text = text.masked_fill(position == lengths - 1, EOS).masked_fill(~mask, 0)
    asked = mask & (position > torch.tensor(PROMPTS)[:, None])
    return torch.randn(4, 3, WIDTH, generator=generator), text, mask, text.masked_fill(~asked, -100)


def log_likelihoods(model: PrefixLM, visual: Tensor, prompt: Tensor, answer: Tensor) -> Tensor:
    """One row alone, without padding, by transformers' own logits: log p of each token of answer, eos with it."""
    lm = model.lm
    states = model.projector(visual)[None]
    if lm.is_encoder_decoder:
        read = torch.cat((prompt[1:], torch.tensor([EOS])))  # without bos, with an end token
        embeds = torch.cat((states, lm.embed(read[None])), dim=1)
        shifted = F.pad(answer[None, :-1], (1, 0), value=lm.start_id)
        logits = lm.network(inputs_embeds=embeds, decoder_input_ids=shifted).logits[0]
    else:
        embeds = torch.cat((states, lm.embed(torch.cat((prompt, answer))[None])), dim=1)
        logits = lm.network(inputs_embeds=embeds).logits[0, len(visual) + len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def row(text: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """prompt with bos, answer with eos"""
    end = 1 + PROMPTS[number]
    return text[number, :end], text[number, end : end + ANSWERS[number] + 1]


@every_kind
def test_only_answer_tokens_count(kind: str) -> None:
    """The labels mask: the mean over the answers' tokens of the whole batch, each row as if it were alone."""
    model = make(CONFIGS[kind])
    visual, text, mask, labels = batch()
    each = [log_likelihoods(model, visual[i], *row(text, i)) for i in range(4)]
    torch.testing.assert_close(model(visual, text, mask, labels), -torch.cat(each).mean(), atol=1e-5, rtol=1e-5)


@every_kind
def test_loss_is_invariant_to_extra_padding(kind: str) -> None:
    model = make(CONFIGS[kind])
    visual, text, mask, labels = batch()
    expected = model(visual, text, mask, labels)
    longer = [F.pad(t, (0, 5), value=value) for t, value in ((text, 7), (mask, False), (labels, -100))]
    torch.testing.assert_close(model(visual, *longer), expected)
    torch.testing.assert_close(model(visual, text.masked_fill(~mask, 9), mask, labels), expected)


@every_kind
def test_frozen_parameters_have_no_gradient_while_the_projector_has(kind: str) -> None:
    model = make(CONFIGS[kind]).train()
    model(*batch()).backward()
    assert all(parameter.grad is None for parameter in model.lm.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in model.projector.parameters())


@every_kind
def test_long_answers_are_cut(kind: str) -> None:
    model = make(replace(CONFIGS[kind], answer_length=2))
    visual, text, mask, labels = batch()
    each = [log_likelihoods(model, visual[i], *row(text, i))[:2] for i in range(4)]
    torch.testing.assert_close(model(visual, text, mask, labels), -torch.cat(each).mean(), atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements that a tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@every_kind
def test_the_vocabulary_meets_the_asked_tokens_alone(kind: str) -> None:
    """No tensor of rows x vocabulary, in neither direction: at 2 x 203 rows and 40,000 ids it would have 16 million elements."""
    size = 40_000
    base = CONFIGS[kind]
    model = make(replace(base, language=LMConfig(base.language.architecture, {"vocab_size": size})))
    visual = torch.randn(2, 3, WIDTH)
    text = torch.randint(3, size, (2, 200))
    labels = text.masked_fill(torch.arange(200) < 195, -100)
    with Largest() as largest:
        model(visual, text, torch.ones_like(text, dtype=torch.bool), labels).backward()
    assert 10 * size <= largest.numel <= size * model.lm.width


def test_placeholders_in_the_text() -> None:
    """Two pictures of three tokens each where the text has its placeholders, as if they had been written out there."""
    model = make(CONFIGS["causal"])
    _, text, mask, labels = batch()
    text[0, 1], text[1, 2], text[1, 4], text[3, 1], text[3, 3] = 50, 50, 50, 50, 50
    visual = torch.randn(4, 2, 3, WIDTH)
    each = []
    for i in range(4):
        prompt, answer = row(text, i)
        states, parts, count = model.projector(visual[i]), [], 0
        for token in torch.cat((prompt, answer)):
            parts.append(states[count] if token == 50 else model.lm.embed(token[None]))
            count += int(token == 50)
        logits = model.lm.network(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(answer) - 1 : -1]
        each.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0])
    got = model(visual, text, mask, labels, slots=text == 50)
    torch.testing.assert_close(got, -torch.cat(each).mean(), atol=1e-5, rtol=1e-5)


def test_weights_of_tokens() -> None:
    model = make(CONFIGS["causal"])
    visual, text, mask, labels = batch()
    weights = torch.rand(text.shape, generator=torch.Generator().manual_seed(2))
    each = torch.cat([log_likelihoods(model, visual[i], *row(text, i)) for i in range(4)])
    of_each = weights[labels != -100]
    got = model(visual, text, mask, labels, weights=weights)
    torch.testing.assert_close(got, -(of_each * each).sum() / of_each.sum(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="weights: expected none"):
        make(CONFIGS["t5"])(visual, text, mask, labels, weights=weights)


@every_kind
def test_text_alone(kind: str) -> None:
    model = make(CONFIGS[kind]).eval()
    model.lm.freeze(False)
    _, text, mask, labels = batch()
    each = []
    for i in range(4):
        prompt, answer = row(text, i)
        if kind == "causal":  # is asked for the prompt as well
            each.append(log_likelihoods(model, torch.zeros(0, WIDTH), prompt[:1], torch.cat((prompt[1:], answer))))
        else:
            each.append(log_likelihoods(model, torch.zeros(0, WIDTH), prompt, answer))
    got = model.text_loss(text, mask, labels)
    torch.testing.assert_close(got, -torch.cat(each).mean(), atol=1e-5, rtol=1e-5)
    got.backward()
    assert all(parameter.grad is not None for parameter in model.lm.parameters())


def candidates() -> tuple[Tensor, Tensor]:
    """As Tokenizer.encode makes them: bos, words, eos."""
    ids = torch.tensor([[1, 7, EOS, 0, 0], [1, 8, 9, 10, EOS], [1, 7, 9, EOS, 0]])
    return ids, ids != 0


@every_kind
@pytest.mark.parametrize("by", ["sum", "mean"])
def test_ranking_with_shared_prefix_is_naive_ranking(kind: str, by: str) -> None:
    model = make(replace(CONFIGS[kind], rank_by=by))
    visual, text, mask, labels = batch()
    ids, seen = candidates()
    got = model.rank(model.read(visual, text, mask, labels), ids, seen)
    for i in range(4):
        for k in range(3):
            each = log_likelihoods(model, visual[i], row(text, i)[0], ids[k][seen[k]][1:])
            expected = each.sum() if by == "sum" else each.mean()
            torch.testing.assert_close(got[i, k], expected, atol=1e-4, rtol=1e-4)


@every_kind
def test_reading_a_prompt_with_and_without_its_answer(kind: str) -> None:
    """A batch of prompts alone, bos prompt eos, reads what a batch with answers does."""
    model = make(CONFIGS[kind])
    visual, text, mask, labels = batch()
    position = torch.arange(10)
    ends = 1 + torch.tensor(PROMPTS)[:, None]
    alone = text.masked_fill(position == ends, EOS).masked_fill(position > ends, 0)
    one, other = model.read(visual, text, mask, labels), model.read(visual, alone, position <= ends)
    torch.testing.assert_close(one.hidden, other.hidden, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(one, beams=2, max_new_tokens=5), model.generate(other, beams=2, max_new_tokens=5))


def test_generated_id_0_ends_the_text_where_it_is_no_padding() -> None:
    """Vicuna's <unk>, which its decoding would fail on: id 0 becomes 2."""
    model = make(PrefixLMConfig(LMConfig("tiny-llama", {"vocab_size": VOCAB, "pad_token_id": 59})))
    with torch.no_grad():
        model.lm.head[0][0] = 1.1 * model.lm.head[0][56]  # which it writes often
    visual, text, mask, labels = batch()
    reading = model.read(visual, text, mask, labels)
    raw = generate(reading, eos_id=EOS, pad_id=59, max_new_tokens=8)
    got = model.generate(reading, max_new_tokens=8)
    assert (raw == 0).any() and not (got == 0).any()
    first = ((raw == 0) | (raw == EOS)).int().argmax(1)
    for i, end in enumerate(first.tolist()):
        if raw[i, end] == 0:
            assert got[i, end] == EOS and torch.equal(got[i, :end], raw[i, :end]) and (got[i, end + 1 :] == 59).all()


def test_lora_inside() -> None:
    model = make(replace(CONFIGS["causal"], lora=LoRAConfig(rank=2)))
    model(*batch()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora" in name or name.startswith("projector")), name
    with pytest.raises(UserError, match="lora: expected rank 0"):
        PrefixLM(replace(CONFIGS["causal"], lora=LoRAConfig(rank=2), language=LMConfig("tiny-llama", frozen=False)), WIDTH)


def test_bad_configs_are_named() -> None:
    for change in ({"projector": "cubic"}, {"rank_by": "max"}, {"answer_length": 0}):
        with pytest.raises(UserError, match=next(iter(change))):
            PrefixLM(replace(CONFIGS["causal"], **change), WIDTH)
