"""Weights of the official code, made up, and of one model of the family for another."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from contract import build, make_batch
from torch import Tensor, nn

from vlpfast.models.tcl import TCL
from vlpfast.models.tcl_finetune import TCLVQA
from vlpfast.nn.vit import ViTConfig, resize_positions
from vlpfast.types import ImageSpec, Progress, UserError

NOW = Progress(0, 10)


def plain(kind: type, **changes: Any) -> nn.Module:
    """The tiny model with a patch embedding as the official code has it."""
    torch.manual_seed(0)
    vision = ViTConfig.deit(patch_size=16, width=128, layers=2, heads=2)
    return kind(dataclasses.replace(kind.Config.tiny(), **{"vision": vision, **changes})).eval()


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def official(model: nn.Module) -> dict[str, Tensor]:
    """A state under the names of uta-smile/TCL's ALBEF: written out here, not derived from the converter's table."""
    found: dict[str, Tensor] = {}
    for start, suffix in (("online.", ""), ("momentum.module.", "_m")):
        vision = f"visual_encoder{suffix}."
        for name, tensor in model.state_dict().items():
            if not name.startswith(start):
                continue
            name = name.removeprefix(start)
            part, _, rest = name.partition(".")
            if part == "vision":
                if rest == "class_token":
                    found[f"{vision}cls_token"] = tensor[None, None]
                elif rest == "position":
                    found[f"{vision}pos_embed"] = tensor[None]
                elif rest.startswith("patch_embed"):
                    kernel = tensor.reshape(-1, 3, 16, 16) if rest.endswith("weight") else tensor
                    found[f"{vision}patch_embed.proj.{rest.split('.')[1]}"] = kernel
                elif rest.startswith("norm_post"):
                    found[f"{vision}norm.{rest.split('.')[1]}"] = tensor
                else:
                    rest = rest.removeprefix("transformer.").replace("in_proj", "qkv").replace("out_proj", "proj")
                    found[vision + rest.replace("fc1", "mlp.fc1").replace("fc2", "mlp.fc2")] = tensor
            elif part in ("text", "decoder"):
                found |= bert_names(rest, tensor, f"text_{'encoder' if part == 'text' else 'decoder'}{suffix}.bert.")
            elif part == "mlm_head":
                begin = f"text_{'decoder' if hasattr(model.online, 'decoder') else 'encoder'}{suffix}.cls.predictions."
                own = rest.replace("dense", "transform.dense").replace("norm", "transform.LayerNorm")
                found[begin + own] = tensor
                if rest == "bias":
                    embedded = model.state_dict()[start + ("decoder" if "decoder" in begin else "text") + ".token_embed.weight"]
                    found |= {begin + "decoder.bias": tensor, begin + "decoder.weight": embedded}
            elif part in ("image_projection", "text_projection"):
                found[f"{'vision' if part[0] == 'i' else 'text'}_proj{suffix}.{rest}"] = tensor
            else:
                found[f"cls_head{suffix}.{rest}"] = tensor
    state = model.state_dict()
    if "queue.image" in state:
        found |= {
            "temp": state["temperature"],
            "itm_head.weight": state["itm_head.weight"],
            "itm_head.bias": state["itm_head.bias"],
        }
        found |= {"image_queue": state["queue.image"].T, "text_queue": state["queue.text"].T}
        found["queue_ptr"] = state["queue.pointer"][None]
    return found


def bert_names(rest: str, tensor: Tensor, begin: str) -> dict[str, Tensor]:
    if not rest.startswith("layers."):
        own = rest.replace("token_embed", "word_embeddings").replace("position_embed", "position_embeddings")
        return {f"{begin}embeddings.{own.replace('type_embed', 'token_type_embeddings').replace('norm', 'LayerNorm')}": tensor}
    _, number, part, what = rest.split(".", 3)
    layer = f"{begin}encoder.layer.{number}."
    kind = what.rsplit(".", 1)[-1]
    if part == "feed_forward":
        names = {"fc1": "intermediate.dense", "fc2": "output.dense", "norm": "output.LayerNorm"}
        return {f"{layer}{names[what.split('.')[0]]}.{kind}": tensor}
    attention = layer + ("attention." if part == "attn" else "crossattention.")
    if what.startswith(("out_proj", "norm")):
        return {f"{attention}output.{'dense' if what[0] == 'o' else 'LayerNorm'}.{kind}": tensor}
    if what.startswith("q_proj"):
        return {f"{attention}self.query.{kind}": tensor}
    names = ("query", "key", "value") if what.startswith("in_proj") else ("key", "value")
    return {f"{attention}self.{name}.{kind}": one for name, one in zip(names, tensor.chunk(len(names)), strict=True)}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_pretraining_checkpoint(prefix: str) -> None:
    model = randomized(plain(TCL))
    model.queue.pointer.fill_(7)
    theirs = {prefix + name: tensor for name, tensor in official(model).items()}
    theirs[f"{prefix}text_encoder.bert.embeddings.position_ids"] = torch.arange(64)[None]
    other = plain(TCL)
    other.load_state_dict(other.convert(theirs))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_positions_are_resized_and_a_missing_copy_or_queue_begins_anew() -> None:
    model = randomized(plain(TCL))
    theirs = {name: t for name, t in official(model).items() if "_m." not in name and "queue" not in name}
    larger = dataclasses.replace(TCL.Config.tiny().data, image=ImageSpec(size=96))
    other = plain(TCL, data=larger)
    fresh = other.queue.image.clone()
    other.load_state_dict(other.convert(theirs))
    assert torch.equal(other.online.vision.position, resize_positions(model.online.vision.position, 6, 1))
    for name, parameter in other.online.named_parameters():
        assert torch.equal(parameter, other.momentum.module.get_parameter(name)), name
    assert torch.equal(other.queue.image, fresh) and int(other.queue.pointer) == 0


def test_what_does_not_fit_is_named() -> None:
    model = plain(TCL)
    theirs = official(model)
    with pytest.raises(UserError, match=r"TCL: online\.text_projection\.bias is missing"):
        model.convert({name: t for name, t in theirs.items() if name != "text_proj.bias"})
    with pytest.raises(UserError, match=r"what\.weight has no place in this model"):
        model.convert({**theirs, "what.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"itm_head\.weight has shape \[3, 128\], expected \[2, 128\]"):
        model.convert({**theirs, "itm_head.weight": torch.zeros(3, 128)})


@pytest.mark.parametrize("name", ["tcl_retrieval", "tcl_entailment", "tcl_nlvr2", "tcl_assignment", "tcl_vqa"])
@pytest.mark.parametrize("from_official", [False, True])
def test_pretrained_weights_start_the_others(name: str, from_official: bool) -> None:
    kind = type(build(name))
    source, model = randomized(plain(TCL)), plain(kind)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.load_state_dict(model.convert(official(source) if from_official else source.state_dict()))
    ours, theirs = model.state_dict(), source.state_dict()
    for start in ("online.", "momentum.module.")[: 1 if name == "tcl_assignment" else 2]:
        for key in ("vision.position", "text.layers.1.attn.in_proj.weight", "text.layers.2.cross.kv_proj.weight"):
            assert torch.equal(ours[start + key], theirs[start + key])
        if name == "tcl_vqa":
            for i in range(2):
                for part in ("cross.q_proj.bias", "attn.in_proj.weight", "feed_forward.fc1.weight"):
                    assert torch.equal(ours[f"{start}decoder.layers.{i}.{part}"], theirs[f"{start}text.layers.{i + 2}.{part}"])
            assert torch.equal(ours[f"{start}decoder.token_embed.weight"], theirs[f"{start}text.token_embed.weight"])
            assert torch.equal(ours[f"{start}mlm_head.dense.weight"], theirs[f"{start}mlm_head.dense.weight"])
        if name in ("tcl_nlvr2", "tcl_assignment"):
            for i, layer in enumerate((2, 2, 3, 3), start=2):
                part = "attn.in_proj.weight"
                assert torch.equal(ours[f"{start}text.layers.{i}.{part}"], theirs[f"{start}text.layers.{layer}.{part}"])
    for head in ("online.head.0.weight", "online.assign_head.weight"):
        if head in ours:
            assert torch.equal(ours[head], before[head])
    assert all(loss.isfinite() for loss in model(make_batch(model.config.data, 3), NOW).values())
    again = model.convert(model.state_dict())  # its own weights are taken as they are
    assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())


def test_the_step_from_assignment_to_two_pictures() -> None:
    source = randomized(build("tcl_assignment"))
    model = build("tcl_nlvr2")
    before = model.online.head[0].weight.clone()
    model.load_state_dict(model.convert(source.state_dict()))
    for i in range(6):
        name = f"text.layers.{i}.attn.in_proj.weight"
        assert torch.equal(model.online.get_parameter(name), source.online.get_parameter(name))
        assert torch.equal(model.momentum.module.get_parameter(name), source.online.get_parameter(name))
    assert torch.equal(model.online.head[0].weight, before)


def test_official_finetuned_answers() -> None:
    model = randomized(plain(TCLVQA))
    other = plain(TCLVQA)
    other.load_state_dict(other.convert(official(model)))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
