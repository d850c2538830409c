from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from vlpfast.models.clip import CLIP
from vlpfast.models.clip_convert import from_transformers
from vlpfast.nn.reduction import MergeConfig
from vlpfast.nn.resnet import ResNetConfig
from vlpfast.nn.text import TextConfig
from vlpfast.nn.vit import ViTConfig
from vlpfast.training.config import load_config, to_yaml
from vlpfast.types import DataSpec, ImageSpec, Progress, TextSpec, UserError

SMALL = CLIP.Config(
    vision=ViTConfig(patch_size=8, width=32, layers=2, heads=2),
    text=TextConfig(vocab_size=60, eos_id=50, width=24, layers=2, heads=3),
    embed_dim=20,
    data=DataSpec(image=ImageSpec(size=24), text=TextSpec(context_length=12)),
)
B32_CUT = CLIP.Config(  # ViT-B/32's widths, heads and picture size; fewer layers and ids
    vision=ViTConfig(layers=3),
    text=TextConfig(layers=3, vocab_size=2048, eos_id=2047),
)


def make(config: CLIP.Config = SMALL) -> CLIP:
    torch.manual_seed(0)
    return CLIP(config)


def captions(config: CLIP.Config, lengths: list[int]) -> torch.Tensor:
    """[B, context_length]: bos, words, the end token, then padding with 0."""
    generator = torch.Generator().manual_seed(1)
    text = torch.zeros(len(lengths), config.data.text.context_length, dtype=torch.int64)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = torch.randint(3, config.text.eos_id, (length,), generator=generator)
        row[length - 1] = config.text.eos_id
    return text


def batch_of(config: CLIP.Config, lengths: list[int]) -> dict[str, torch.Tensor]:
    size = config.data.image.size
    image = torch.randn(len(lengths), 3, size, size, generator=torch.Generator().manual_seed(2))
    return {"image": image, "text": captions(config, lengths)}


def their_config(config: CLIP.Config) -> CLIPConfig:
    def tower(ours: ViTConfig | TextConfig) -> dict:
        return {
            "hidden_size": ours.width,
            "intermediate_size": round(ours.width * ours.mlp_ratio),
            "num_hidden_layers": ours.layers,
            "num_attention_heads": ours.heads,
            "hidden_act": ours.activation,
        }

    return CLIPConfig(
        vision_config={**tower(config.vision), "image_size": config.data.image.size, "patch_size": config.vision.patch_size},
        text_config={
            **tower(config.text),
            "vocab_size": config.text.vocab_size,
            "max_position_embeddings": config.data.text.context_length,
            "eos_token_id": config.text.eos_id,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        projection_dim=config.embed_dim,
    )


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("config", [SMALL, B32_CUT], ids=["small", "b32_cut"])
def test_equals_transformers(config: CLIP.Config, activation: str) -> None:
    config = replace(
        config, vision=replace(config.vision, activation=activation), text=replace(config.text, activation=activation)
    )
    torch.manual_seed(0)
    theirs = CLIPModel(their_config(config)).eval()
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide a mix-up
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 1 and name != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    ours = CLIP(config)
    ours.load_state_dict(from_transformers(theirs.state_dict(), config))
    batch = batch_of(config, [5, 12, 3, 9])
    with torch.no_grad():
        expected = theirs(input_ids=batch["text"], pixel_values=batch["image"], return_loss=True)
        image, text = ours.encode_image(batch["image"]), ours.encode_text(batch["text"])
        loss = ours(batch, Progress(0, 1))["contrastive"]
        logits = ours.logit_scale.exp() * image @ text.T
    pairs = [
        (image, expected.image_embeds),
        (text, expected.text_embeds),
        (logits, expected.logits_per_image),
        (loss, expected.loss),
    ]
    for got, want in pairs:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_paper_scale() -> None:
    with torch.device("meta"):
        model = CLIP(CLIP.Config.paper())
    assert sum(parameter.numel() for parameter in model.parameters()) == 151_277_313
    assert CLIP.Config.paper() == CLIP.Config()


def test_tiny_scale() -> None:
    with torch.device("meta"):
        model = CLIP(CLIP.Config.tiny())
    assert 0.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6


def test_loss_is_the_plain_formulation_and_reaches_every_parameter() -> None:
    model = make()
    batch = batch_of(SMALL, [5, 12, 3, 9, 4])
    losses = model(batch, Progress(0, 1))
    assert set(losses) == {"contrastive"} and losses["contrastive"].shape == ()
    losses["contrastive"].backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model.logit_scale.exp() * model.encode_image(batch["image"]) @ model.encode_text(batch["text"]).T
    own = torch.arange(5)
    plain = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    plain.backward()
    torch.testing.assert_close(losses["contrastive"], plain)
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_logit_scale_is_clamped_before_a_step() -> None:
    model = make()
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)
    model.before_step(Progress(0, 2))
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)
    model.logit_scale.data.fill_(5.0)
    model.before_step(Progress(1, 2))
    assert model.logit_scale.item() == pytest.approx(math.log(100), rel=1e-6)
    assert model.logit_scale.requires_grad


def test_features_are_float32_under_autocast() -> None:
    model = make()
    batch = batch_of(SMALL, [5, 12])
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encode(batch)
    for kind in ("image", "text"):
        assert features[kind].dtype == torch.float32
        torch.testing.assert_close(features[kind].norm(dim=-1), torch.ones(2))


def test_patch_dropout_is_for_training_alone() -> None:
    plain = make()
    dropping = CLIP(replace(SMALL, vision=replace(SMALL.vision, patch_dropout=0.5)))
    dropping.load_state_dict(plain.state_dict())
    image = batch_of(SMALL, [5, 12])["image"]
    assert torch.equal(dropping.eval().encode_image(image), plain.encode_image(image))
    assert not torch.allclose(dropping.train().encode_image(image), plain.encode_image(image))


def test_merging_weighs_the_mean_by_size() -> None:
    config = replace(SMALL, vision=replace(SMALL.vision, pool="mean", merge=MergeConfig(r=2)))
    model = make(config)
    image = batch_of(SMALL, [5, 12])["image"]
    tokens, size = model.vision(image, need_size=True)
    assert tokens.shape == (2, 5, 32) and (size.sum(1) == 9).all() and size.max() > 1
    mean = (tokens * size[..., None]).sum(1) / 9
    expected = F.normalize(model.image_projection(model.vision.norm_post(mean)), dim=-1)
    torch.testing.assert_close(model.encode_image(image), expected)


def test_config_without_a_modality() -> None:
    with pytest.raises(UserError, match=r"model\.data: clip needs both image and text"):
        CLIP(replace(SMALL, data=DataSpec(text=None)))


def test_a_resnet_in_place_of_the_vision_transformer_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: clip, vision: null, resnet: {layers: [3, 4, 23, 3]}}\n")
    run = load_config(path, [], lambda name: CLIP)
    assert run.model.config == CLIP.Config(vision=None, resnet=ResNetConfig(layers=[3, 4, 23, 3]))
    path.write_text(to_yaml(run))
    assert load_config(path, [], lambda name: CLIP) == run
    changed = load_config(path, ["model.resnet.channels=32", "model.data.image.size=96"], lambda name: CLIP)
    assert CLIP(changed.model.config).image_projection.weight.shape == (512, 1024)
