from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.nn.bert import Bert, BertConfig, MaskedLMHead
from vlpfast.nn.generation import BertDecoding, Decoding, generate, rank
from vlpfast.nn.lm import LanguageModel, LMConfig
from vlpfast.nn.splice import left_padded

VOCAB = 60
LLAMA, T5 = LMConfig("tiny-llama", {"vocab_size": VOCAB}), LMConfig("tiny-t5", {"vocab_size": VOCAB})
MISTRAL = LMConfig(
    "mistral",
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2, "sliding_window": 64},
)
KINDS = {"llama": LLAMA, "mistral": MISTRAL, "t5": T5}


def make(config: LMConfig) -> LanguageModel:
    """Random, but sure enough of itself that beams part and texts end at different lengths."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        model.head[0][0] = 0  # padding is never the best
    return model


def prefix(model: LanguageModel, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.tensor([5, 9, 7, 3])[:, None]
    return torch.randn(4, 9, model.width, generator=generator), mask


def read(model: LanguageModel, seed: int = 1) -> Decoding:
    embeds, mask = prefix(model, seed)
    return model.read(*(embeds, mask) if model.is_encoder_decoder else left_padded(embeds, mask))


def padded(texts: Tensor, length: int) -> Tensor:
    return F.pad(texts, (0, length - texts.shape[1]))


@pytest.mark.parametrize(
    "options",
    [
        {"beams": 1},
        {"beams": 3, "length_penalty": 1.0},
        {"beams": 4, "length_penalty": -1.0, "repetition_penalty": 1.5},
        {"beams": 3, "length_penalty": 0.0, "min_new_tokens": 4},
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()),
)
@pytest.mark.parametrize("kind", KINDS)
def test_writes_what_transformers_writes(kind: str, options: dict) -> None:
    model = make(KINDS[kind])
    theirs = {"num_beams" if key == "beams" else key: value for key, value in options.items()}
    lengths = set()
    for seed in range(3):
        got = generate(read(model, seed), eos_id=model.eos_id, pad_id=0, max_new_tokens=12, **{"min_new_tokens": 0, **options})
        embeds, mask = prefix(model, seed)
        for row, length in enumerate(mask.sum(1).tolist()):  # alone: behind left padding their penalty forgets the first tokens
            expected = model.network.generate(
                inputs_embeds=embeds[row : row + 1, :length],
                attention_mask=torch.ones(1, length),
                max_new_tokens=12,
                do_sample=False,
                **theirs,
            )
            expected = expected[0, 1:] if model.is_encoder_decoder else expected[0]
            written = got[row, : len(expected)]
            assert torch.equal(written, expected) and not got[row, len(expected) :].any()
            lengths.add(len(expected))
    assert len(lengths) > 1  # some ended before the others


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_batch_writes_what_each_row_writes_alone(kind: str, beams: int) -> None:
    model = make(KINDS[kind])
    embeds, mask = prefix(model)
    together = generate(read(model), eos_id=model.eos_id, pad_id=0, beams=beams, max_new_tokens=12)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model.read(embeds[row : row + 1, :length], mask[row : row + 1, :length])
        text = generate(alone, eos_id=model.eos_id, pad_id=0, beams=beams, max_new_tokens=12)
        assert torch.equal(padded(text, 12), padded(together[row : row + 1], 12))


def candidates(count: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Ids [K, A] and their mask; some of one token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.randint(1, 6, (count, 1), generator=generator)
    return torch.randint(3, VOCAB, (count, 5), generator=generator).masked_fill(~mask, 0), mask


def naive(model: LanguageModel, ids: Tensor, mask: Tensor, by: str) -> Tensor:
    """Each candidate of each sample in a pass of its own, by all logits."""
    embeds, seen = prefix(model)
    scores = torch.empty(len(embeds), ids.shape[-2])
    for row, length in enumerate(seen.sum(1).tolist()):
        before = embeds[row : row + 1, :length]
        for place in range(ids.shape[-2]):
            chosen = (ids, mask) if ids.ndim == 2 else (ids[row], mask[row])
            text = chosen[0][place][chosen[1][place]][None]
            if model.is_encoder_decoder:
                shifted = F.pad(text[:, :-1], (1, 0), value=model.start_id)
                logits = model.network(inputs_embeds=before, decoder_input_ids=shifted).logits[0]
            else:
                logits = model.network(inputs_embeds=torch.cat((before, model.embed(text)), dim=1)).logits[0, length - 1 : -1]
            found = logits.log_softmax(-1).gather(1, text.T)
            scores[row, place] = found.sum() if by == "sum" else found.mean()
    return scores


@pytest.mark.parametrize("max_rows", [1, 9, 256])
@pytest.mark.parametrize("by", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_ranking_with_shared_prefix_is_naive_ranking(kind: str, by: str, max_rows: int) -> None:
    model = make(KINDS[kind])
    ids, mask = candidates(7)
    got = rank(read(model), ids, mask, by=by, max_rows=max_rows)
    torch.testing.assert_close(got, naive(model, ids, mask, by), atol=1e-4, rtol=1e-4)
    more, more_mask = F.pad(ids, (0, 3), value=5), F.pad(mask, (0, 3))  # padding counts nothing, whatever it is
    torch.testing.assert_close(rank(read(model), more, more_mask, by=by), got, atol=1e-5, rtol=1e-5)


def test_candidates_of_each_sample() -> None:
    model = make(LLAMA)
    sets = [candidates(3, seed) for seed in range(4)]
    ids, mask = (torch.stack(parts) for parts in zip(*sets, strict=True))
    got = rank(read(model), ids, mask, max_rows=5)
    torch.testing.assert_close(got, naive(model, ids, mask, "sum"), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="candidates, candidate_mask: expected"):
        rank(read(model), ids[:3], mask[:3])
    with pytest.raises(ValueError, match="by: expected"):
        rank(read(model), ids, mask, by="max")


def test_the_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each candidate's tokens but the last once: 100 candidates cost no second prefix."""
    model = make(LLAMA)
    seen = []
    forward = model.network.model.layers[0].forward
    monkeypatch.setattr(
        model.network.model.layers[0], "forward", lambda x, **o: seen.append(x.shape[:2].numel()) or forward(x, **o)
    )
    ids, mask = candidates(100)
    rank(read(model), ids, mask, max_rows=64)
    assert sum(seen) == 4 * 9 + 4 * 100 * 4


def bert_decoder() -> tuple[Bert, MaskedLMHead]:
    torch.manual_seed(0)
    config = BertConfig(VOCAB, 32, 2, 4, 64, max_positions=40, cross_attention=[0, 1], context_width=24, dropout=0.0)
    bert, head = Bert(config).eval(), MaskedLMHead(config).eval()
    with torch.no_grad():
        for parameter in (*bert.parameters(), *head.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return bert, head


def test_bert_decoder_writes_as_without_a_cache() -> None:
    bert, head = bert_decoder()
    context, prompt = torch.randn(3, 6, 24), torch.tensor([[1, 7]] * 3)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 6])
    text, expected = prompt, []
    for _ in range(8):
        states = bert(text, mask="causal", context=context, context_mask=mask)
        expected.append(head.logits(states[:, -1], bert.token_embed.weight).argmax(-1))
        text = torch.cat((text, expected[-1][:, None]), dim=1)
    got = generate(BertDecoding(bert, head, prompt, context, mask), eos_id=VOCAB - 1, pad_id=0, max_new_tokens=8)
    assert torch.equal(got, torch.stack(expected, dim=1))
    beams = generate(BertDecoding(bert, head, prompt, context, mask), eos_id=VOCAB - 1, pad_id=0, max_new_tokens=8, beams=3)
    for row in range(3):
        alone = BertDecoding(bert, head, prompt[row : row + 1], context[row : row + 1], mask[row : row + 1])
        assert torch.equal(generate(alone, eos_id=VOCAB - 1, pad_id=0, max_new_tokens=8, beams=3)[0], beams[row])


def test_bert_decoder_ranks_as_without_a_cache() -> None:
    bert, head = bert_decoder()
    context, prompt = torch.randn(3, 6, 24), torch.tensor([[1, 7]] * 3)
    ids, mask = candidates(5)
    got = rank(BertDecoding(bert, head, prompt, context), ids, mask, max_rows=6)
    for row in range(3):
        for place in range(5):
            text = ids[place][mask[place]]
            whole = torch.cat((prompt[row], text))[None]
            logits = head.logits(bert(whole, mask="causal", context=context[row : row + 1]), bert.token_embed.weight)
            expected = logits[0, 1:-1].log_softmax(-1).gather(1, text[:, None]).sum()
            torch.testing.assert_close(got[row, place], expected, atol=1e-4, rtol=1e-4)


def test_padding_with_the_end_token() -> None:
    """Tokenizers without a padding token: rows end with one end token or more."""
    model = make(LLAMA)
    usual = generate(read(model), eos_id=model.eos_id, pad_id=0, max_new_tokens=12)
    got = generate(read(model), eos_id=model.eos_id, pad_id=model.eos_id, max_new_tokens=12)
    assert torch.equal(got, usual.masked_fill(usual == 0, model.eos_id))


def test_wrong_options_are_named() -> None:
    model = make(LLAMA)
    for wrong in ({"beams": 0}, {"min_new_tokens": -1}, {"min_new_tokens": 30}, {"repetition_penalty": 0.0}):
        with pytest.raises(ValueError, match="expected beams >= 1"):
            generate(read(model), eos_id=2, pad_id=0, **wrong)
