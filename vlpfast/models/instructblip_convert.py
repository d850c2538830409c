"""InstructBLIP's and BLIP-2's weights under the names of LAVIS and of transformers.

Everything works on plain state dicts and is strict: a left-over, missing or wrongly shaped tensor is a UserError that names it.
LAVIS saves what was trained alone: tower and language model then stay what the model has (language.weights, an earlier file).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlpfast.hosts.qformer import convert_lavis
from vlpfast.nn.qformer import convert_qformer
from vlpfast.nn.vit import convert_timm
from vlpfast.types import UserError

if TYPE_CHECKING:
    from vlpfast.models.instructblip import InstructBLIP

StateDict = Mapping[str, Tensor]

_LANGUAGE = re.compile(r"(?:llm_model|t5_model|opt_model|language_model)\.(.*)")  # LAVIS', then transformers'
_HEADS = ("image_projection.", "text_projection.", "itm_head.", "lm_head.", "temperature")
_VISION = [  # transformers' names in vision_model. -> timm's
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("encoder.layers.", "blocks."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
]


def convert_any(state_dict: StateDict, model: InstructBLIP) -> dict[str, Tensor]:
    """From whichever naming it is -> a whole state for `model`: what the file does not have is the model's own."""
    if any(name.startswith("reader.") for name in state_dict):
        return dict(state_dict)
    own = model.state_dict()
    found = _from_lavis(state_dict, model) if any(name.startswith("Qformer.") for name in state_dict) else None
    if found is None and any(name.startswith("qformer.") for name in state_dict):
        found = _from_transformers(state_dict, model)
    if found is None:
        shown = ", ".join(sorted(state_dict)[:3]) or "nothing"
        raise UserError(f"weights: expected an InstructBLIP's, with reader.*, Qformer.* (LAVIS) or qformer.*; got {shown}, ...")
    for name, tensor in found.items():
        if name not in own:
            raise UserError(f"weights: {name} has no place in this model")
        if tensor.shape != own[name].shape:
            raise UserError(f"weights: {name}: expected {list(own[name].shape)}, got {list(tensor.shape)}")
    return own | found


def _from_lavis(state_dict: StateDict, model: InstructBLIP) -> dict[str, Tensor]:
    config = model.config
    found, vision, others = {}, {}, {}
    for name, tensor in state_dict.items():
        if name.startswith("visual_encoder."):
            vision[name.removeprefix("visual_encoder.")] = tensor
        elif match := _LANGUAGE.fullmatch(name):
            found[f"language.lm.network.{match[1]}"] = tensor
        else:
            others[name] = tensor
    known = ("Qformer.", "query_tokens", "ln_vision.", "vision_proj.", "text_proj.", "itm_head.", "temp")
    projections = ("llm_proj.", "t5_proj.", "opt_proj.")
    for name in others:
        if not name.startswith((*known, *projections)):
            raise UserError(f"weights: {name} has no place in this model")
    for name, tensor in convert_lavis(others, config.qformer).items():
        if name.startswith("projection."):
            found[f"language.projector.{name.removeprefix('projection.')}"] = tensor
        elif config.stage1 or not name.startswith(_HEADS):
            found[f"reader.{name}"] = tensor
    if vision:
        found |= _vision(_eva(vision, config.vision.layers), model)
    return found


def _from_transformers(state_dict: StateDict, model: InstructBLIP) -> dict[str, Tensor]:
    found = {f"reader.qformer.{name}": t for name, t in convert_qformer(state_dict, model.config.qformer).items()}
    vision = {}
    for name, tensor in state_dict.items():
        if name.startswith("vision_model.post_layernorm."):
            found[f"reader.norm.{name.rpartition('.')[2]}"] = tensor
        elif name.startswith("vision_model."):
            own = name.removeprefix("vision_model.")
            for theirs, timm in _VISION:
                own = own.replace(theirs, timm)
            vision[own] = tensor
        elif name.startswith("language_projection."):
            found[f"language.projector.{name.rpartition('.')[2]}"] = tensor
        elif match := _LANGUAGE.fullmatch(name):
            found[f"language.lm.network.{match[1]}"] = tensor
        elif not name.startswith(("qformer.", "query_tokens", "embeddings.")):
            raise UserError(f"weights: {name} has no place in this model")
    return found | _vision(vision, model)


def _eva(vision: StateDict, layers: int) -> dict[str, Tensor]:
    """EVA's tower under timm's names: its queries and values have biases, its keys none; the blocks behind the last of `layers`,
    the norm and the classifier behind them are not BLIP-2's."""
    found = {}
    for name, tensor in vision.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        if name.startswith(("norm.", "fc_norm.", "head.")) or (block and int(block[1]) >= layers) or name.endswith(".v_bias"):
            continue
        if name.endswith(".q_bias"):
            stem = name.removesuffix("q_bias")
            if f"{stem}v_bias" not in vision:
                raise UserError(f"weights: visual_encoder.{stem}v_bias is missing")
            found[f"{stem}qkv.bias"] = torch.cat((tensor, torch.zeros_like(tensor), vision[f"{stem}v_bias"]))
        else:
            found[name] = tensor
    return found


def _vision(tensors: StateDict, model: InstructBLIP) -> dict[str, Tensor]:
    grid = model.reader.vision.grid
    return {f"reader.vision.{name}": tensor for name, tensor in convert_timm(tensors, grid).items()}
