from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.nn.lm import PRESETS, LanguageModel, LMConfig
from vlpfast.nn.splice import left_padded
from vlpfast.types import UserError

OPT = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
OPT |= {"vocab_size": 90, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2}
GROUPED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
GROUPED |= {"vocab_size": 90, "pad_token_id": 0, "eos_token_id": 2}
CAUSAL = {
    "llama": LMConfig("tiny-llama", {"vocab_size": 90}),
    "opt": LMConfig("opt", OPT),
    "mistral": LMConfig("mistral", GROUPED | {"sliding_window": 64}),
    "qwen2": LMConfig("qwen2", GROUPED),
}
T5 = LMConfig("tiny-t5", {"vocab_size": 90})


def make(config: LMConfig) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config)
    with torch.no_grad():  # biases and norms start at 0 and 1; outputs of random networks are small
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rows(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Embeddings [B, T, C] and their mask, padded at the ends."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(*mask.shape, width, generator=torch.Generator().manual_seed(1)), mask


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_states_are_those_of_transformers_at_every_kind_of_padding(name: str) -> None:
    model = make(CAUSAL[name])
    embeds, mask = rows([5, 9, 7], model.width)
    right = model(embeds)
    left = model(*left_padded(embeds, mask))
    masked = model(embeds, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model.network(inputs_embeds=embeds[row : row + 1, :length]).logits
        for states in (right[row, :length], masked[row, :length], left[row, -length:]):
            logits = F.linear(states, *model.head)
            torch.testing.assert_close(logits, alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_answer_loss_is_that_of_transformers(name: str) -> None:
    model = make(CAUSAL[name])
    embeds, mask = rows([5, 9, 7], model.width)
    labels = torch.randint(3, 90, mask.shape).masked_fill(~mask | (torch.arange(9) < 3), -100)
    expected = model.network(inputs_embeds=embeds, attention_mask=mask.long(), labels=labels).loss
    asked = F.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model.answer_loss(model(embeds), asked), expected)
    torch.testing.assert_close(model.answer_loss(model(embeds), asked, max_rows=25), expected)


def test_encoder_decoder_is_that_of_transformers() -> None:
    model = make(T5)
    embeds, mask = rows([5, 9, 7], model.width)
    labels = torch.randint(3, 90, (3, 4))
    labels[1, 2:] = -100
    expected = model.network(inputs_embeds=embeds, attention_mask=mask.long(), labels=labels)
    decoder_ids = F.pad(labels[:, :-1], (1, 0), value=model.start_id).clamp(min=0)
    hidden = model(embeds, mask, decoder_ids)
    torch.testing.assert_close(F.linear(hidden, *model.head)[0], expected.logits[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.answer_loss(hidden, labels), expected.loss)


def test_tied_t5_scales_its_output() -> None:
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 90}
    model = make(LMConfig("t5", settings))
    assert model.head[0] is model.network.get_input_embeddings().weight
    embeds, mask = rows([5, 4], model.width)
    labels = torch.randint(3, 90, (2, 4))
    expected = model.network(inputs_embeds=embeds, attention_mask=mask.long(), labels=labels).loss
    decoder_ids = F.pad(labels[:, :-1], (1, 0), value=model.start_id)
    torch.testing.assert_close(model.answer_loss(model(embeds, mask, decoder_ids), labels), expected)
    assert make(T5).head[0] is not make(T5).network.get_input_embeddings().weight


def test_smoothing_and_weights() -> None:
    model = make(CAUSAL["llama"])
    hidden, labels = torch.randn(2, 5, model.width), torch.randint(0, 90, (2, 5))
    labels[0, 2:] = -100
    weights = torch.rand(2, 5)
    logits = F.linear(hidden, *model.head).transpose(1, 2)
    smooth = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(model.answer_loss(hidden, labels, label_smoothing=0.1), smooth)
    each = F.cross_entropy(logits, labels, reduction="none")
    expected = (weights * each).sum() / (weights * (labels >= 0)).sum()
    torch.testing.assert_close(model.answer_loss(hidden, labels, weights=weights), expected)
    nothing = model.answer_loss(hidden.requires_grad_(), torch.full_like(labels, -100))
    nothing.backward()
    assert nothing == 0 and hidden.grad.abs().max() == 0


@pytest.mark.parametrize("config", [CAUSAL["llama"], T5], ids=["llama", "t5"])
def test_frozen_lets_gradients_through_to_the_prefix_alone(config: LMConfig) -> None:
    model = make(config).train()
    assert not any(module.training for module in model.network.modules())
    embeds, mask = rows([5, 6], model.width)
    embeds.requires_grad_()
    labels = torch.randint(3, 90, mask.shape)
    ids = None if not model.is_encoder_decoder else labels
    first, second = (model.answer_loss(model(embeds, mask, ids), labels) for _ in range(2))
    assert first == second  # no dropout, although T5 has it
    first.backward()
    assert embeds.grad[mask].abs().min() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = LanguageModel(LMConfig(config.architecture, config.settings, frozen=False)).train()
    assert all(parameter.requires_grad for parameter in trained.parameters()) and trained.network.training


@pytest.mark.parametrize("config", [CAUSAL["llama"], T5], ids=["llama", "t5"])
def test_checkpointing_keeps_less_and_changes_nothing(config: LMConfig) -> None:
    def run(checkpointing: bool) -> tuple[Tensor, int]:
        model = make(LMConfig(config.architecture, config.settings, checkpointing=checkpointing)).train()
        embeds, mask = rows([40, 40], model.width)
        embeds.requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            out = model(embeds, mask, torch.ones(2, 5, dtype=torch.int64) if model.is_encoder_decoder else None)
        out.square().sum().backward()
        return embeds.grad, sum(kept)

    (plain, much), (recomputed, little) = run(False), run(True)
    torch.testing.assert_close(recomputed, plain)
    assert little < much / 3


def test_encoder_decoder_compiles_without_a_break() -> None:
    """Causal ones do so in the contract test."""
    model = make(LMConfig("tiny-t5", {"vocab_size": 90, "num_layers": 1}))
    embeds, mask = rows([5, 6], model.width)
    labels = torch.randint(3, 90, mask.shape)

    def loss(embeds: Tensor) -> Tensor:
        return model.answer_loss(model(embeds, mask, labels), labels, max_rows=12)

    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(embeds), loss(embeds))


def test_presets_have_the_published_sizes() -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in LanguageModel(LMConfig(name)).parameters()) for name in PRESETS if "tiny" not in name
        }
    assert sizes == {
        "flan-t5-xl": 2_849_757_184,
        "flan-t5-xxl": 11_135_332_352,
        "vicuna-7b": 6_738_415_616,
        "vicuna-13b": 13_015_864_320,
    }


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_weights_of_a_folder(kind: str, tmp_path) -> None:
    config = CAUSAL["llama"] if kind == "llama" else T5
    saved = make(config)
    saved.network.save_pretrained(tmp_path / kind, max_shard_size="20KB")
    assert len(list((tmp_path / kind).glob("*.safetensors"))) > 1
    loaded = LanguageModel(LMConfig(config.architecture, config.settings, weights=str(tmp_path / kind), dtype="bfloat16"))
    for (name, mine), (other, theirs) in zip(loaded.state_dict().items(), saved.state_dict().items(), strict=True):
        assert name == other and mine.dtype == torch.bfloat16 and torch.equal(mine, theirs.bfloat16())


def test_bad_weights_and_settings_are_named(tmp_path) -> None:
    def message(config: LMConfig) -> str:
        with pytest.raises(UserError) as raised:
            LanguageModel(config)
        return str(raised.value)

    assert "is no folder with .safetensors files" in message(LMConfig("tiny-llama", weights=str(tmp_path / "none")))
    make(CAUSAL["llama"]).network.save_pretrained(tmp_path / "other")
    short = LMConfig("tiny-llama", {"num_hidden_layers": 3, "vocab_size": 90}, weights=str(tmp_path / "other"))
    assert "missing_keys: model.layers.2" in message(short)
    assert "mismatched_keys" in message(LMConfig("tiny-llama", weights=str(tmp_path / "other")))  # of another vocabulary
    assert "expected one of flan-t5-xl" in message(LMConfig("lama"))
    assert "LlamaConfig has no 'hidden'" in message(LMConfig("llama", {"hidden": 3}))
    assert "final_logit_softcapping" in message(LMConfig("gemma2", GROUPED))
    assert "expected float32" in message(LMConfig("tiny-llama", frozen=False, dtype="bfloat16"))


def test_half_weights_take_float_embeddings() -> None:
    model = LanguageModel(LMConfig("tiny-llama", dtype="bfloat16"))
    embeds = torch.randn(2, 5, model.width, requires_grad=True)
    loss = model.answer_loss(model(embeds), torch.ones(2, 5, dtype=torch.int64))
    loss.backward()
    assert loss.dtype == torch.float32 and embeds.grad.dtype == torch.float32
