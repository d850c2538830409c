"""CLIP's weights under the names of open_clip (OpenAI's too) and of transformers, and back; a CLIP with a ResNet has the
first alone.

Everything works on plain state dicts and is strict: a missing, left-over or wrongly shaped tensor is a UserError that names it.
Every direction only renames, transposes, cuts or joins, so a round trip gives the same bits. Three things are not in the weights
and must be right in the config: the number of heads, the activation (OpenAI's weights need "quick_gelu" in both towers, most of
open_clip's own need "gelu"), and the end token's id.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlpfast.models.clip import CLIP
from vlpfast.nn.vit import resize_positions
from vlpfast.types import UserError

StateDict = Mapping[str, Tensor]


class Rule(NamedTuple):
    own: str
    theirs: tuple[str, ...]
    how: str = "same"  # "transpose"; "conv": their patch embedding is a convolution's; "split": they keep q, k, v or k, v apart


MARKS = {  # naming -> a tensor that only this naming has
    "vlpfast": "text.token_embed.weight",
    "open_clip": "token_embedding.weight",
    "transformers": "text_model.embeddings.token_embedding.weight",
}
IGNORED = {  # constants that some versions saved beside the weights
    "input_resolution",
    "context_length",
    "vocab_size",
    "vision_model.embeddings.position_ids",
    "text_model.embeddings.position_ids",
}


def from_open_clip(state_dict: StateDict, config: CLIP.Config) -> dict[str, Tensor]:
    return _import(state_dict, "open_clip", config)


def to_open_clip(state_dict: StateDict, config: CLIP.Config) -> dict[str, Tensor]:
    return _export(state_dict, "open_clip", config)


def from_transformers(state_dict: StateDict, config: CLIP.Config) -> dict[str, Tensor]:
    """From the names of transformers.CLIPModel."""
    return _import(state_dict, "transformers", config)


def to_transformers(state_dict: StateDict, config: CLIP.Config) -> dict[str, Tensor]:
    """To the names of transformers.CLIPModel."""
    return _export(state_dict, "transformers", config)


def convert_any(state_dict: StateDict, config: CLIP.Config) -> dict[str, Tensor]:
    """From whichever of the three namings it is, for a model of this config.

    The one liberty: a vision position table made for another picture size is resized bicubically.
    """
    for naming, mark in MARKS.items():
        if mark in state_dict:
            return _import(state_dict, naming, config, resize=True)
    found = ", ".join(sorted(state_dict)[:3]) or "nothing"
    raise UserError(f"weights: expected a CLIP's, with one of {', '.join(MARKS.values())}; got {found}, ...")


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """UserError: the file is not there or not whole."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as a .safetensors file: {error}") from error


def save_safetensors(state_dict: StateDict, path: str | Path) -> None:
    """Writes the file aside and renames it. UserError: it cannot be written; what was there before is untouched."""
    path = Path(path)
    aside = path.with_name(f"{path.name}.tmp")
    # Copies: tensors that share memory cannot be saved.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    try:
        save_file(tensors, aside, metadata={"format": "pt"})
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error}") from error


def _import(state_dict: StateDict, naming: str, config: CLIP.Config, *, resize: bool = False) -> dict[str, Tensor]:
    shapes = _own_shapes(config)
    rules = _rules(naming, config, shapes)
    if resize:
        state_dict = _resize_positions(state_dict, rules, config)
    expected = {
        name: part.shape
        for rule in rules
        for name, part in zip(rule.theirs, _to_theirs(rule, shapes[rule.own], config), strict=True)
    }
    _check(state_dict, expected, naming)
    return {rule.own: _to_own(rule, [state_dict[name] for name in rule.theirs]) for rule in rules}


def _export(state_dict: StateDict, naming: str, config: CLIP.Config) -> dict[str, Tensor]:
    shapes = _own_shapes(config)
    _check(state_dict, {name: tensor.shape for name, tensor in shapes.items()}, "vlpfast")
    return {
        name: part
        for rule in _rules(naming, config, shapes)
        for name, part in zip(rule.theirs, _to_theirs(rule, state_dict[rule.own], config), strict=True)
    }


def _own_shapes(config: CLIP.Config) -> dict[str, Tensor]:
    with torch.device("meta"):
        return CLIP(config).state_dict()


def _check(state_dict: StateDict, expected: Mapping[str, torch.Size], naming: str) -> None:
    problems = [f"{name} is missing" for name in expected if name not in state_dict]
    problems += [f"{name} has no place in this model" for name in state_dict if name not in expected and not _is_ignored(name)]
    problems += [
        f"{name} has shape {list(state_dict[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in state_dict and state_dict[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"weights under {naming}'s names do not fit this CLIP: {'; '.join(problems[:5])}{more}")


def _is_ignored(name: str) -> bool:
    return name in IGNORED or name.endswith(".num_batches_tracked")  # batch norms' count of steps


def _resize_positions(state_dict: StateDict, rules: list[Rule], config: CLIP.Config) -> StateDict:
    name = next(rule.theirs[0] for rule in rules if rule.own == "vision.position")
    table = state_dict.get(name)
    prefix = 1 if config.vision is None or config.vision.pool == "class" else 0
    if table is None or table.ndim != 2 or not _is_square(table.shape[0] - prefix):
        return state_dict  # the check that follows names it
    assert config.data.image is not None
    patch_size = 32 if config.vision is None else config.vision.patch_size
    return {**state_dict, name: resize_positions(table, config.data.image.size // patch_size, prefix)}


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _to_theirs(rule: Rule, tensor: Tensor, config: CLIP.Config) -> tuple[Tensor, ...]:
    if rule.how == "transpose":
        return (tensor.T.contiguous(),)
    if rule.how == "conv":
        assert config.vision is not None
        return (tensor.reshape(-1, 3, config.vision.patch_size, config.vision.patch_size),)
    return tensor.chunk(len(rule.theirs)) if rule.how == "split" else (tensor,)


def _to_own(rule: Rule, tensors: list[Tensor]) -> Tensor:
    if rule.how == "transpose":
        return tensors[0].T.contiguous()
    if rule.how == "conv":
        return tensors[0].flatten(1)
    return torch.cat(tensors) if rule.how == "split" else tensors[0]


def _rules(naming: str, config: CLIP.Config, own: StateDict) -> list[Rule]:
    if naming == "vlpfast":
        return [Rule(name, (name,)) for name in own]
    if config.vision is None:
        if naming != "open_clip":
            raise UserError(f"resnet: {naming} has no counterpart of a CLIP with a ResNet")
        return _open_clip(config)
    if config.vision.pool != "class":
        raise UserError(f"vision.pool: {naming} has no counterpart of a CLIP with pool={config.vision.pool!r}")
    if config.vision.stem:
        raise UserError(f"vision.stem: {naming} has no counterpart of a CLIP with a convolutional stem")
    return _open_clip(config) if naming == "open_clip" else _transformers(config)


def _open_clip(config: CLIP.Config) -> list[Rule]:
    rules = [
        Rule("logit_scale", ("logit_scale",)),
        Rule("text.token_embed.weight", ("token_embedding.weight",)),
        Rule("text.position", ("positional_embedding",)),
        Rule("text_projection.weight", ("text_projection",), "transpose"),
    ]
    pairs = {"text.norm": "ln_final"}
    towers = [("text", "", config.text.layers)]
    if config.vision is None:
        rules += _open_clip_resnet(config)
    else:
        rules += [
            Rule("vision.patch_embed.weight", ("visual.conv1.weight",), "conv"),
            Rule("vision.class_token", ("visual.class_embedding",)),
            Rule("vision.position", ("visual.positional_embedding",)),
            Rule("image_projection.weight", ("visual.proj",), "transpose"),
        ]
        pairs |= {"vision.norm_pre": "visual.ln_pre", "vision.norm_post": "visual.ln_post"}
        towers.append(("vision", "visual.", config.vision.layers))
    for tower, prefix, layers in towers:
        for i in range(layers):
            mine, theirs = f"{tower}.transformer.blocks.{i}", f"{prefix}transformer.resblocks.{i}"
            rules += [Rule(f"{mine}.attn.in_proj.{part}", (f"{theirs}.attn.in_proj_{part}",)) for part in ("weight", "bias")]
            pairs |= {
                f"{mine}.norm1": f"{theirs}.ln_1",
                f"{mine}.attn.out_proj": f"{theirs}.attn.out_proj",
                f"{mine}.norm2": f"{theirs}.ln_2",
                f"{mine}.fc1": f"{theirs}.mlp.c_fc",
                f"{mine}.fc2": f"{theirs}.mlp.c_proj",
            }
    return rules + _weights_and_biases(pairs)


def _open_clip_resnet(config: CLIP.Config) -> list[Rule]:
    assert config.resnet is not None
    rules = [Rule("vision.position", ("visual.attnpool.positional_embedding",))]
    for part in ("weight", "bias"):
        theirs = [f"visual.attnpool.{which}_proj.{part}" for which in "qkvc"]
        rules += [Rule(f"vision.q_proj.{part}", (theirs[0],)), Rule(f"vision.kv_proj.{part}", (theirs[1], theirs[2]), "split")]
        rules.append(Rule(f"image_projection.{part}", (theirs[3],)))
    convs = {f"vision.stem.{3 * i}": f"visual.conv{i + 1}" for i in range(3)}
    norms = {f"vision.stem.{3 * i + 1}": f"visual.bn{i + 1}" for i in range(3)}
    for number, depth in enumerate(config.resnet.layers):
        for i in range(depth):
            own, theirs = f"vision.stages.{number}.{i}", f"visual.layer{number + 1}.{i}"
            convs |= {f"{own}.conv{k}": f"{theirs}.conv{k}" for k in (1, 2, 3)}
            norms |= {f"{own}.norm{k}": f"{theirs}.bn{k}" for k in (1, 2, 3)}
        first = f"vision.stages.{number}.0.shortcut", f"visual.layer{number + 1}.0.downsample"  # the block that changes the width
        convs[f"{first[0]}.conv"] = f"{first[1]}.0"
        norms[f"{first[0]}.norm"] = f"{first[1]}.1"
    rules += [Rule(f"{own}.weight", (f"{theirs}.weight",)) for own, theirs in convs.items()]
    statistics = {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return rules + [Rule(f"{own}.{a}", (f"{theirs}.{b}",)) for own, theirs in norms.items() for a, b in statistics.items()]


def _transformers(config: CLIP.Config) -> list[Rule]:
    assert config.vision is not None
    rules = [
        Rule("logit_scale", ("logit_scale",)),
        Rule("vision.patch_embed.weight", ("vision_model.embeddings.patch_embedding.weight",), "conv"),
        Rule("vision.class_token", ("vision_model.embeddings.class_embedding",)),
        Rule("vision.position", ("vision_model.embeddings.position_embedding.weight",)),
        Rule("image_projection.weight", ("visual_projection.weight",)),
        Rule("text.token_embed.weight", ("text_model.embeddings.token_embedding.weight",)),
        Rule("text.position", ("text_model.embeddings.position_embedding.weight",)),
        Rule("text_projection.weight", ("text_projection.weight",)),
    ]
    pairs = {
        "vision.norm_pre": "vision_model.pre_layrnorm",  # their spelling
        "vision.norm_post": "vision_model.post_layernorm",
        "text.norm": "text_model.final_layer_norm",
    }
    for tower, layers in (("vision", config.vision.layers), ("text", config.text.layers)):
        for i in range(layers):
            mine, theirs = f"{tower}.transformer.blocks.{i}", f"{tower}_model.encoder.layers.{i}"
            rules += [
                Rule(f"{mine}.attn.in_proj.{part}", tuple(f"{theirs}.self_attn.{x}_proj.{part}" for x in "qkv"), "split")
                for part in ("weight", "bias")
            ]
            pairs |= {
                f"{mine}.norm1": f"{theirs}.layer_norm1",
                f"{mine}.attn.out_proj": f"{theirs}.self_attn.out_proj",
                f"{mine}.norm2": f"{theirs}.layer_norm2",
                f"{mine}.fc1": f"{theirs}.mlp.fc1",
                f"{mine}.fc2": f"{theirs}.mlp.fc2",
            }
    return rules + _weights_and_biases(pairs)


def _weights_and_biases(pairs: Mapping[str, str]) -> list[Rule]:
    return [Rule(f"{own}.{part}", (f"{theirs}.{part}",)) for own, theirs in pairs.items() for part in ("weight", "bias")]
