"""The state dicts are made by hand under the official names and shapes, so that no rule is checked against itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from vlpfast.models import clip_convert as convert
from vlpfast.models.clip import CLIP
from vlpfast.nn.text import TextConfig
from vlpfast.nn.vit import ViTConfig, resize_positions
from vlpfast.types import DataSpec, ImageSpec, TextSpec, UserError

CONFIG = CLIP.Config(
    vision=ViTConfig(patch_size=8, width=16, layers=2, heads=2),
    text=TextConfig(vocab_size=40, eos_id=39, width=12, layers=1, heads=2),
    embed_dim=10,
    data=DataSpec(image=ImageSpec(size=24), text=TextSpec(context_length=9)),
)


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def open_clip_state() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (9, 12),
        "text_projection": (12, 10),
        "logit_scale": (),
        "visual.class_embedding": (16,),
        "visual.positional_embedding": (10, 16),
        "visual.proj": (16, 10),
        "visual.conv1.weight": (16, 3, 8, 8),
        "visual.ln_pre.weight": (16,),
        "visual.ln_pre.bias": (16,),
        "visual.ln_post.weight": (16,),
        "visual.ln_post.bias": (16,),
        "token_embedding.weight": (40, 12),
        "ln_final.weight": (12,),
        "ln_final.bias": (12,),
    }
    for prefix, width in (
        ("visual.transformer.resblocks.0", 16),
        ("visual.transformer.resblocks.1", 16),
        ("transformer.resblocks.0", 12),
    ):
        for name, shape in {
            "ln_1": (width,),
            "attn.out_proj": (width, width),
            "ln_2": (width,),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }.items():
            shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
        shapes |= {f"{prefix}.attn.in_proj_weight": (3 * width, width), f"{prefix}.attn.in_proj_bias": (3 * width,)}
    return filled(shapes)


def transformers_state() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "text_model.embeddings.token_embedding.weight": (40, 12),
        "text_model.embeddings.position_embedding.weight": (9, 12),
        "text_model.final_layer_norm.weight": (12,),
        "text_model.final_layer_norm.bias": (12,),
        "vision_model.embeddings.class_embedding": (16,),
        "vision_model.embeddings.patch_embedding.weight": (16, 3, 8, 8),
        "vision_model.embeddings.position_embedding.weight": (10, 16),
        "vision_model.pre_layrnorm.weight": (16,),
        "vision_model.pre_layrnorm.bias": (16,),
        "vision_model.post_layernorm.weight": (16,),
        "vision_model.post_layernorm.bias": (16,),
        "visual_projection.weight": (10, 16),
        "text_projection.weight": (10, 12),
    }
    for prefix, width in (
        ("vision_model.encoder.layers.0", 16),
        ("vision_model.encoder.layers.1", 16),
        ("text_model.encoder.layers.0", 12),
    ):
        for name, shape in {
            "self_attn.k_proj": (width, width),
            "self_attn.v_proj": (width, width),
            "self_attn.q_proj": (width, width),
            "self_attn.out_proj": (width, width),
            "layer_norm1": (width,),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
            "layer_norm2": (width,),
        }.items():
            shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
    return filled(shapes)


STATES = {"open_clip": open_clip_state, "transformers": transformers_state}
FROM = {"open_clip": convert.from_open_clip, "transformers": convert.from_transformers}
TO = {"open_clip": convert.to_open_clip, "transformers": convert.to_transformers}
POSITIONS = {"open_clip": "visual.positional_embedding", "transformers": "vision_model.embeddings.position_embedding.weight"}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("naming", STATES)
def test_round_trips_are_exact(naming: str) -> None:
    theirs = STATES[naming]()
    own = FROM[naming](theirs, CONFIG)
    model = CLIP(CONFIG)
    model.load_state_dict(own)
    assert_same(TO[naming](own, CONFIG), theirs)
    assert_same(FROM[naming](TO[naming](model.state_dict(), CONFIG), CONFIG), own)


def test_hand_made_names_are_those_of_transformers() -> None:
    theirs = CLIPModel(
        CLIPConfig(
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 24,
                "patch_size": 8,
            },
            text_config={
                "hidden_size": 12,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 40,
                "max_position_embeddings": 9,
                "eos_token_id": 39,
                "bos_token_id": 1,
            },
            projection_dim=10,
        )
    ).state_dict()
    assert {name: tensor.shape for name, tensor in theirs.items()} == {n: t.shape for n, t in transformers_state().items()}


def test_what_each_rule_does() -> None:
    theirs = open_clip_state()
    own = convert.from_open_clip(theirs, CONFIG)
    assert torch.equal(own["text_projection.weight"], theirs["text_projection"].T)
    assert torch.equal(own["image_projection.weight"], theirs["visual.proj"].T)
    assert torch.equal(own["vision.patch_embed.weight"][3], theirs["visual.conv1.weight"][3].reshape(-1))
    assert torch.equal(own["text.transformer.blocks.0.fc2.bias"], theirs["transformer.resblocks.0.mlp.c_proj.bias"])
    theirs = transformers_state()
    own = convert.from_transformers(theirs, CONFIG)
    assert torch.equal(own["text_projection.weight"], theirs["text_projection.weight"])
    assert torch.equal(
        own["vision.transformer.blocks.1.attn.in_proj.weight"][16:32],
        theirs["vision_model.encoder.layers.1.self_attn.k_proj.weight"],
    )


@pytest.mark.parametrize("naming", STATES)
def test_missing_left_over_and_wrongly_shaped_are_named(naming: str) -> None:
    state = STATES[naming]()
    name = list(state)[-1]
    with pytest.raises(UserError, match=f"{naming}'s names .*{name} is missing"):
        FROM[naming]({key: value for key, value in state.items() if key != name}, CONFIG)
    with pytest.raises(UserError, match=r"extra\.weight has no place in this model"):
        FROM[naming]({**state, "extra.weight": torch.zeros(1)}, CONFIG)
    with pytest.raises(UserError, match=rf"{name} has shape \[2, 2\], expected \[.*\]"):
        FROM[naming]({**state, name: torch.zeros(2, 2)}, CONFIG)
    position = POSITIONS[naming]
    with pytest.raises(UserError, match=rf"{position} has shape \[17, 16\], expected \[10, 16\]"):
        FROM[naming]({**state, position: torch.zeros(17, 16)}, CONFIG)
    own = FROM[naming](state, CONFIG)
    del own["text.norm.bias"]
    with pytest.raises(UserError, match=r"text\.norm\.bias is missing"):
        TO[naming](own, CONFIG)


def test_a_wholly_different_model_is_a_short_message() -> None:
    with pytest.raises(UserError, match=r"and [0-9]+ more$") as caught:
        convert.from_open_clip(open_clip_state(), CLIP.Config())
    assert len(str(caught.value)) < 1000


def test_constants_beside_the_weights_are_no_left_overs() -> None:
    constants = {"input_resolution": torch.tensor(24), "context_length": torch.tensor(9), "vocab_size": torch.tensor(40)}
    assert_same(
        convert.from_open_clip({**open_clip_state(), **constants}, CONFIG), convert.from_open_clip(open_clip_state(), CONFIG)
    )
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("vision", "text")}
    assert_same(
        convert.from_transformers({**transformers_state(), **ids}, CONFIG),
        convert.from_transformers(transformers_state(), CONFIG),
    )


def test_convert_any_recognises_the_naming() -> None:
    model = CLIP(CONFIG)
    assert_same(model.convert(open_clip_state()), convert.from_open_clip(open_clip_state(), CONFIG))
    assert_same(model.convert(transformers_state()), convert.from_transformers(transformers_state(), CONFIG))
    assert_same(model.convert(model.state_dict()), model.state_dict())
    tiny = CLIP(CLIP.Config.tiny())  # whose patches are made by convolutions
    assert_same(tiny.convert(tiny.state_dict()), tiny.state_dict())
    with pytest.raises(UserError, match=r"expected a CLIP's, with one of .*token_embedding\.weight.*; got encoder\.weight"):
        model.convert({"encoder.weight": torch.zeros(1)})


@pytest.mark.parametrize("naming", STATES)
def test_convert_any_resizes_the_position_table(naming: str) -> None:
    state = STATES[naming]()
    larger = replace(CONFIG, data=replace(CONFIG.data, image=ImageSpec(size=40)))
    own = convert.convert_any(state, larger)
    assert torch.equal(own["vision.position"], resize_positions(state[POSITIONS[naming]], 5, prefix=1))
    CLIP(larger).load_state_dict(own)
    with pytest.raises(UserError, match=rf"{POSITIONS[naming]} has shape \[12, 16\]"):
        convert.convert_any({**state, POSITIONS[naming]: torch.zeros(12, 16)}, larger)


def test_no_counterpart_of_mean_pooling() -> None:
    config = replace(CONFIG, vision=replace(CONFIG.vision, pool="mean"))
    model = CLIP(config)
    with pytest.raises(UserError, match=r"vision\.pool: open_clip has no counterpart"):
        convert.to_open_clip(model.state_dict(), config)
    assert_same(model.convert(model.state_dict()), model.state_dict())


def test_safetensors(tmp_path: Path) -> None:
    theirs = convert.to_transformers(CLIP(CONFIG).state_dict(), CONFIG)  # q, k and v share memory
    path = tmp_path / "model.safetensors"
    convert.save_safetensors(theirs, path)
    assert_same(convert.load_safetensors(path), theirs)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read as a \.safetensors file"):
        convert.load_safetensors(path)
    with pytest.raises(UserError, match=r"absent\.safetensors: cannot be read"):
        convert.load_safetensors(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be written"):
        convert.save_safetensors(theirs, tmp_path / "no" / "model.safetensors")
