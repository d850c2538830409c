"""BERT's weights under the official names, those of transformers, ALBEF, BLIP and LAVIS, to this package's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vlpfast.types import UserError

StateDict = Mapping[str, Tensor]

_RULES = [  # theirs -> ours; several of theirs with one of ours are joined in this order
    (r"(?:embeddings\.)?word_embeddings", "token_embed"),
    (r"(?:embeddings\.)?position_embeddings", "position_embed"),
    (r"(?:embeddings\.)?token_type_embeddings", "type_embed"),
    (r"(?:embeddings\.)?(?:LayerNorm|layernorm)", "norm"),
    (r"encoder\.layer\.(\d+)\.attention\.(?:self|attention)\.query", r"layers.\1.attn.in_proj"),
    (r"encoder\.layer\.(\d+)\.attention\.(?:self|attention)\.key", r"layers.\1.attn.in_proj"),
    (r"encoder\.layer\.(\d+)\.attention\.(?:self|attention)\.value", r"layers.\1.attn.in_proj"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"layers.\1.attn.out_proj"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", r"layers.\1.attn.norm"),
    (r"encoder\.layer\.(\d+)\.crossattention\.(?:self|attention)\.query", r"layers.\1.cross.q_proj"),
    (r"encoder\.layer\.(\d+)\.crossattention\.(?:self|attention)\.key", r"layers.\1.cross.kv_proj"),
    (r"encoder\.layer\.(\d+)\.crossattention\.(?:self|attention)\.value", r"layers.\1.cross.kv_proj"),
    (r"encoder\.layer\.(\d+)\.crossattention\.output\.dense", r"layers.\1.cross.out_proj"),
    (r"encoder\.layer\.(\d+)\.crossattention\.output\.LayerNorm", r"layers.\1.cross.norm"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense", r"layers.\1.feed_forward.fc1"),
    (r"encoder\.layer\.(\d+)\.output\.dense", r"layers.\1.feed_forward.fc2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm", r"layers.\1.feed_forward.norm"),
    (r"encoder\.layer\.(\d+)\.intermediate_query\.dense", r"layers.\1.query_feed_forward.fc1"),
    (r"encoder\.layer\.(\d+)\.output_query\.dense", r"layers.\1.query_feed_forward.fc2"),
    (r"encoder\.layer\.(\d+)\.output_query\.LayerNorm", r"layers.\1.query_feed_forward.norm"),
]
_HEAD_RULES = [
    (r"transform\.dense", "dense"),
    (r"transform\.LayerNorm", "norm"),
]
_PARTS = {"in_proj": 3, "kv_proj": 2}  # of how many of theirs these are joined
_IGNORED = re.compile(r"(embeddings\.)?position_ids|pooler\..*")
_HEAD_IGNORED = re.compile(r"decoder\.(weight|bias)")  # the token embedding and the bias again


def convert_bert(state_dict: StateDict, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix` ("bert." of most), for vlpfast.nn.bert.Bert or vlpfast.nn.qformer.QFormer.

    The pooler is left out, all else has a place. UserError: a name without one, a query without its key, nothing at all.
    """
    return _convert(state_dict, prefix, _RULES, _IGNORED)


def convert_blip(state_dict: StateDict) -> dict[str, Tensor]:
    """BLIP's text encoder and decoder, for one Bert with causal_attention: the decoder's own are its self-attentions, all else it
    shares with the encoder. UserError: see convert_bert."""
    encoder, decoder = convert_bert(state_dict, "text_encoder."), convert_bert(state_dict, "text_decoder.bert.")
    return encoder | {name.replace(".attn.", ".causal_attn."): tensor for name, tensor in decoder.items() if ".attn." in name}


def convert_lm_head(state_dict: StateDict, prefix: str = "cls.predictions.") -> dict[str, Tensor]:
    """The same for vlpfast.nn.bert.MaskedLMHead. The decoder's weight is the token embedding and stays with that."""
    bias = state_dict.get(f"{prefix}bias", state_dict.get(f"{prefix}decoder.bias"))
    if bias is None:
        raise UserError(f"weights: expected {prefix}bias or {prefix}decoder.bias, got neither")
    others = {name: tensor for name, tensor in state_dict.items() if name != f"{prefix}bias"}
    return {**_convert(others, prefix, _HEAD_RULES, _HEAD_IGNORED), "bias": bias}


def _convert(state_dict: StateDict, prefix: str, rules: list[tuple[str, str]], ignored: re.Pattern[str]) -> dict[str, Tensor]:
    parts: dict[str, dict[int, Tensor]] = {}  # ours -> number of the rule -> theirs
    for name, tensor in state_dict.items():
        if not name.startswith(prefix) or ignored.fullmatch(name[len(prefix) :]):
            continue
        stem, _, kind = name[len(prefix) :].rpartition(".")
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)  # the first PyTorch versions' names
        for number, (theirs, ours) in enumerate(rules):
            match = re.fullmatch(theirs, stem)
            if match and kind in ("weight", "bias"):
                parts.setdefault(f"{match.expand(ours)}.{kind}", {})[number] = tensor
                break
        else:
            raise UserError(f"weights: {name} has no place in this model")
    if not parts:
        found = ", ".join(sorted(state_dict)[:3]) or "nothing"
        raise UserError(f"weights: expected names that begin with {prefix!r}, got {found}, ...")
    for name, tensors in parts.items():
        wanted = _PARTS.get(name.rsplit(".", 2)[-2], 1)
        if len(tensors) != wanted:
            raise UserError(f"weights: {name} is made of {wanted} tensors (queries, keys, values), got {len(tensors)}")
    return {name: torch.cat([tensors[i] for i in sorted(tensors)]) for name, tensors in parts.items()}
