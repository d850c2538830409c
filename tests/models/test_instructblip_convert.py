"""InstructBLIP and BLIP-2 under the names of others, and beside transformers' networks of the same random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from vlpfast.models.instructblip import InstructBLIP
from vlpfast.nn.lm import LMConfig
from vlpfast.nn.qformer import QFormerConfig
from vlpfast.nn.vit import ViTConfig
from vlpfast.types import DataSpec, ImageSpec, Progress, TextSpec, UserError

VOCAB, IMAGE = 60, 59  # the last id stands for a visual token in transformers
TINY = InstructBLIP.Config.tiny()
CONFIG = replace(
    TINY,
    vision=ViTConfig.deit(patch_size=7, width=24, layers=3, heads=2, mlp_ratio=4.3637),
    qformer=QFormerConfig(
        vocab_size=50,
        width=32,
        layers=4,
        heads=4,
        hidden=48,
        max_positions=16,
        dropout=0.0,
        cross_attention=[0, 2],
        context_width=24,
        queries=3,
    ),
    language=LMConfig("tiny-llama", {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}),
    stage1=False,
    train_vision=False,
    data=DataSpec(image=ImageSpec(size=28), text=replace(TINY.data.text, context_length=12), texts={"instruction": TextSpec(9)}),
)
T5 = replace(CONFIG, language=LMConfig("tiny-t5", {"vocab_size": VOCAB, "d_model": 32}))
BLIP2 = replace(CONFIG, instructed=False, qformer=replace(CONFIG.qformer, text="none"))


def official(config: InstructBLIP.Config) -> torch.nn.Module:
    """transformers' network of the same sizes, norms and biases too away from where they start."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "initializer_range": 0.3,
    }
    qformer = {
        **sizes,
        "vocab_size": 50,
        "max_position_embeddings": 16,
        "encoder_hidden_size": 24,
        "cross_attention_frequency": 2,
    }
    vision = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    vision |= {"intermediate_size": round(24 * 4.3637), "initializer_range": 0.3}
    language = InstructBLIP(config).language.lm.network.config
    pair = (InstructBlipConfig, InstructBlipForConditionalGeneration)
    config_class, model_class = pair if config.instructed else (Blip2Config, Blip2ForConditionalGeneration)
    about = config_class(
        vision_config=vision,
        qformer_config={**qformer, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        text_config=language.to_dict(),
        num_query_tokens=3,
        image_token_index=IMAGE,
    )
    theirs = model_class(about).eval()
    if theirs.language_model.get_output_embeddings().weight is theirs.language_model.get_input_embeddings().weight:
        head = theirs.language_model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return theirs


PROMPTS, ANSWERS = [3, 5, 1, 4], [2, 1, 3, 2]


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    position = torch.arange(12)
    lengths = torch.tensor([2 + p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)])[:, None]
    text = torch.randint(3, IMAGE, (4, 12), generator=generator)
    text[:, 0] = 1
    text = text.masked_fill(position == lengths - 1, 2).masked_fill(position >= lengths, 0)
    mask = position < lengths
    labels = text.masked_fill(~mask | (position <= torch.tensor(PROMPTS)[:, None]), -100)
    words = torch.arange(9) < torch.tensor([[9], [4], [6], [2]])
    return {
        "image": torch.randn(4, 3, 28, 28, generator=generator),
        "text": text,
        "text_mask": mask,
        "text_labels": labels,
        "instruction": torch.randint(1, 50, (4, 9), generator=generator).masked_fill(~words, 0),
        "instruction_mask": words,
    }


def theirs_on(theirs: torch.nn.Module, config: InstructBLIP.Config, made: dict[str, Tensor]):
    """Their outputs with the loss on the answers."""
    ids, mask = made["text"], made["text_mask"].long()
    slots = torch.full((4, 3), IMAGE)
    inputs = {"pixel_values": made["image"]}
    if config.instructed:
        inputs |= {"qformer_input_ids": made["instruction"], "qformer_attention_mask": made["instruction_mask"].long()}
    if config.language.architecture == "tiny-llama":
        labels = torch.cat((torch.full_like(slots, -100), made["text_labels"]), dim=1)
        text = torch.cat((slots, ids), dim=1)
        return theirs(**inputs, input_ids=text, attention_mask=F.pad(mask, (3, 0), value=1), labels=labels)
    length = torch.tensor(PROMPTS)[:, None] + 1
    position = torch.arange(12)
    prompts = ids.masked_fill(position == length, 2)[:, 1:]
    text = torch.cat((slots, prompts), dim=1)
    labels = torch.full((4, 4), -100)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        labels[row, : answer + 1] = ids[row, 1 + prompt : 2 + prompt + answer]
    seen = F.pad((position <= length)[:, 1:].long(), (3, 0), value=1)
    return theirs(**inputs, input_ids=text, attention_mask=seen, labels=labels)


@pytest.mark.parametrize("config", [CONFIG, T5, BLIP2], ids=["vicuna", "t5", "blip2"])
def test_equals_transformers(config: InstructBLIP.Config) -> None:
    """Tower, Q-Former, projection, language model: logits at the labelled positions, and the loss."""
    theirs, made = official(config), batch()
    ours = InstructBLIP(config).eval()
    ours.load_state_dict(ours.convert(theirs.state_dict()))
    with torch.no_grad():
        expected = theirs_on(theirs, config, made)
        visual = ours.visual_tokens(made)
        torch.testing.assert_close(visual, expected.qformer_outputs[0][:, :3], atol=1e-4, rtol=1e-4)
        loss = ours(made, Progress(0, 1))["answer"]
        torch.testing.assert_close(loss, expected.loss, atol=1e-4, rtol=1e-4)
        lm = ours.language.lm
        if not lm.is_encoder_decoder:
            embeds = torch.cat((ours.language.projector(visual), lm.embed(made["text"])), dim=1)
            logits = F.linear(lm(embeds), *lm.head)
            asked = F.pad(made["text_labels"][:, 1:] != -100, (3, 1))
            torch.testing.assert_close(logits[asked], expected.logits[asked], atol=1e-4, rtol=1e-4)
    assert expected.loss > 1


@pytest.mark.parametrize("config", [CONFIG, T5], ids=["vicuna", "t5"])
def test_writes_what_transformers_writes(config: InstructBLIP.Config) -> None:
    theirs, made = official(config), batch()
    ours = InstructBLIP(config).eval()
    ours.load_state_dict(ours.convert(theirs.state_dict()))
    got = ours.generate(made, max_new_tokens=6, repetition_penalty=1.0)
    encoder = ours.language.lm.is_encoder_decoder
    for row, prompt in enumerate(PROMPTS):
        ids = made["text"][row : row + 1, : 1 + prompt]
        ids = F.pad(ids[:, 1:], (0, 1), value=2) if encoder else ids
        ids = F.pad(ids, (3, 0), value=IMAGE)
        length = int(made["instruction_mask"][row].sum())
        expected = theirs.generate(
            pixel_values=made["image"][row : row + 1],
            qformer_input_ids=made["instruction"][row : row + 1, :length],
            qformer_attention_mask=torch.ones(1, length, dtype=torch.int64),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_beams=5,
            max_new_tokens=6,
            min_new_tokens=1,
            do_sample=False,
        )[0]
        written = expected[1:] if encoder else expected[ids.shape[1] :]
        assert torch.equal(got[row, : len(written)], written) and not got[row, len(written) :].any()


def lavis_names(model: InstructBLIP, stage1: bool = False) -> dict[str, Tensor]:
    """The model's weights as LAVIS names them, tower and language model with them."""
    names = {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        if name.startswith("reader.vision."):
            rest = name.removeprefix("reader.vision.")
            rest = rest.replace("transformer.", "").replace(".fc", ".mlp.fc").replace(".out_proj", ".proj")
            rest = {"class_token": "cls_token", "position": "pos_embed"}.get(
                rest, rest.replace("patch_embed", "patch_embed.proj")
            )
            if rest == "patch_embed.proj.weight":
                tensor = tensor.unflatten(1, (3, 7, 7))
            if rest == "cls_token":
                tensor = tensor[None, None]
            if rest == "pos_embed":
                tensor = tensor[None]
            if rest.endswith("attn.in_proj.bias"):
                q, k, v = tensor.chunk(3)
                stem = f"visual_encoder.{rest.removesuffix('in_proj.bias')}"
                names |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
                assert not k.any()
                continue
            names[f"visual_encoder.{rest.replace('in_proj', 'qkv')}"] = tensor
        elif name.startswith("reader.norm."):
            names[f"ln_vision.{name.rpartition('.')[2]}"] = tensor
        elif name.startswith("reader.qformer."):
            names |= qformer_names(name.removeprefix("reader.qformer."), tensor)
        elif name.startswith("language.projector."):
            names[f"llm_proj.{name.rpartition('.')[2]}"] = tensor
        elif part == "language":
            names[f"llm_model.{name.removeprefix('language.lm.network.')}"] = tensor
    return names


def qformer_names(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "query_tokens":
        return {name: tensor[None]}
    outside = {"token_embed": "word_embeddings", "position_embed": "position_embeddings", "norm": "LayerNorm"}
    stem, _, kind = name.rpartition(".")
    if stem in outside:
        return {f"Qformer.bert.embeddings.{outside[stem]}.{kind}": tensor}
    _, number, part = stem.split(".", 2)
    prefix = f"Qformer.bert.encoder.layer.{number}."
    parts = {
        "attn.out_proj": "attention.output.dense",
        "attn.norm": "attention.output.LayerNorm",
        "cross.q_proj": "crossattention.self.query",
        "cross.out_proj": "crossattention.output.dense",
        "cross.norm": "crossattention.output.LayerNorm",
        "feed_forward.fc1": "intermediate.dense",
        "feed_forward.fc2": "output.dense",
        "feed_forward.norm": "output.LayerNorm",
        "query_feed_forward.fc1": "intermediate_query.dense",
        "query_feed_forward.fc2": "output_query.dense",
        "query_feed_forward.norm": "output_query.LayerNorm",
    }
    joined = {"attn.in_proj": ("attention", ("query", "key", "value")), "cross.kv_proj": ("crossattention", ("key", "value"))}
    if part in joined:
        where, kinds = joined[part]
        chunks = tensor.chunk(len(kinds))
        return {f"{prefix}{where}.self.{one}.{kind}": chunk for one, chunk in zip(kinds, chunks, strict=True)}
    return {f"{prefix}{parts[part]}.{kind}": tensor}


def other_weights(seed: int) -> InstructBLIP:
    torch.manual_seed(seed)
    model = InstructBLIP(CONFIG)
    for block in model.reader.vision.transformer.blocks:
        for number in (0, 2):  # EVA's keys have no bias
            torch.nn.init.normal_(block.attn.in_proj.bias.data.chunk(3)[number])
    return model


def test_names_of_lavis() -> None:
    saved, model = other_weights(1), other_weights(2)
    state = lavis_names(saved)
    whole = model.convert(state)
    assert whole.keys() == saved.state_dict().keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in saved.state_dict().items())


def test_what_lavis_does_not_save_stays() -> None:
    """Its files hold what was trained: not the tower, not the language model."""
    saved, model = other_weights(1), other_weights(2)
    trained = {name: t for name, t in lavis_names(saved).items() if not name.startswith(("visual_encoder.", "llm_model."))}
    whole = model.convert(trained)
    for name, tensor in whole.items():
        frozen = name.startswith(("reader.vision.", "language.lm."))
        assert torch.equal(tensor, (model if frozen else saved).state_dict()[name]), name


def test_the_last_block_of_eva_is_left_out_and_positions_are_resized() -> None:
    saved, model = other_weights(1), other_weights(2)
    state = lavis_names(saved)
    state |= {name.replace("blocks.2.", "blocks.3."): t for name, t in state.items() if "blocks.2." in name}
    state |= {"visual_encoder.fc_norm.weight": torch.ones(24), "visual_encoder.head.weight": torch.ones(5, 24)}
    state["visual_encoder.pos_embed"] = torch.randn(1, 1 + 9, 24)
    whole = model.convert(state)
    assert whole["reader.vision.position"].shape == (17, 24)
    assert torch.equal(whole["reader.vision.position"][0], state["visual_encoder.pos_embed"][0, 0])


def test_what_does_not_fit_is_named() -> None:
    model = other_weights(2)
    state = lavis_names(model)
    with pytest.raises(UserError, match=r"extra\.weight has no place"):
        model.convert(state | {"extra.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"lm_head\.weight: expected \[60, 32\], got \[61, 32\]"):
        model.convert(state | {"llm_model.lm_head.weight": torch.zeros(61, 32)})
    with pytest.raises(UserError, match="v_bias is missing"):
        model.convert({name: t for name, t in state.items() if name != "visual_encoder.blocks.0.attn.v_bias"})
    with pytest.raises(UserError, match="expected an InstructBLIP's"):
        model.convert({"a.weight": torch.zeros(1)})
    assert model.convert(model.state_dict()).keys() == model.state_dict().keys()


def test_second_stage_checkpoints_of_blip2_lack_the_text_parts() -> None:
    """Easy to get wrong: text feed-forward parts are needed, and those checkpoints dropped them: load from stage 1."""
    state = lavis_names(other_weights(1))
    dropped = {name: t for name, t in state.items() if not any(part in name for part in (".intermediate.", "embeddings.word"))}
    with pytest.raises(UserError, match="is missing"):
        other_weights(2).convert(dropped)
