"""Language models of `transformers` behind one face: causal ones, and those with an encoder and a decoder."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlpfast.nn.lora import LoRALinear, is_adapter
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy
from vlpfast.types import UserError, Vocabulary

# name -> architecture of transformers and what differs from the defaults of its config
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "flan-t5-xl": (
        "t5",
        {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "flan-t5-xxl": (
        "t5",
        {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "vicuna-7b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "pad_token_id": 0},
    ),
    "vicuna-13b": (
        "llama",
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
        | {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "pad_token_id": 0},
    ),
    "tiny-llama": (  # ids of a tokenizer trained here
        "llama",
        {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
        | {"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        # 1 / sqrt(hidden_size): from 0.02, as wide models start, so narrow a one learns no attention that a prefix could steer
        | {"initializer_range": 0.125},
    ),
    "tiny-t5": (
        "t5",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 512, "eos_token_id": 2}
        | {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False},
    ),
}


@dataclass
class LMConfig:
    """Written out: nothing is downloaded."""

    architecture: str = "flan-t5-xl"  # one of PRESETS, or a model_type of transformers: llama, mistral, qwen2, opt, t5, ...
    settings: dict[str, Any] = field(default_factory=dict)  # of its config in transformers, what differs from the preset
    weights: str = ""  # a Hugging Face folder with .safetensors files; "": random ones
    frozen: bool = True  # its weights get no gradient, and it stays in evaluation mode: no dropout
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights; a half type for frozen ones alone
    checkpointing: bool = False  # recompute each block's activations in the backward: less memory, a third more arithmetic


class LanguageModel(nn.Module):
    """A network of transformers that takes embeddings and gives hidden states, never the logits of all positions.

    Its weights are under `network.` by transformers' names. Frozen, it still lets gradients through to the embeddings. Not taken
    are networks that do something to their logits behind the output layer (Gemma 2, Cohere): UserError.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        if config.dtype != "float32" and not config.frozen:
            raise UserError(f"language.dtype: expected float32 for weights that are trained, got {config.dtype}")
        self.config = config
        self.network = _build(config)
        about = self.network.config
        self.is_encoder_decoder: bool = about.is_encoder_decoder
        self.width: int = self.network.get_input_embeddings().embedding_dim
        self.vocab_size: int = self.network.get_input_embeddings().num_embeddings
        self.eos_id: int = _first(about.eos_token_id)
        self.pad_id: int = about.pad_token_id
        self.start_id: int | None = getattr(about, "decoder_start_token_id", None)  # of a decoder
        if config.checkpointing:
            _checkpoint_blocks(self.network)
        self.freeze(config.frozen)

    def freeze(self, frozen: bool) -> None:
        """Frozen: nothing but adapters is trained; else all but these."""
        if not frozen and self.config.dtype != "float32":
            raise ValueError(f"language.dtype: expected float32 for weights that are trained, got {self.config.dtype}")
        self.frozen = frozen
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(is_adapter(name) == frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> LanguageModel:
        """A frozen network stays in evaluation mode; the adapters in it follow `mode`."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
            for module in self.network.modules():
                if isinstance(module, LoRALinear):
                    module.training = mode
        return self

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The output layer: weight [V, C] and bias [V] or None, for linear_cross_entropy and token_logprob."""
        linear = self.network.get_output_embeddings()
        return linear.weight, linear.bias

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, L] int64 -> [B, L, C]"""
        return self.network.get_input_embeddings()(ids)

    def forward(self, embeds: Tensor, mask: Tensor | None = None, decoder_ids: Tensor | None = None) -> Tensor:
        """embeds [B, T, C] (of an encoder, if there is one), mask [B, T] bool, True = token -> hidden states.

        Causal: [B, T, C]; rows that are padded at their ends need no mask, because no token sees the padding, and without one
        attention is faster. With an encoder: [B, A, C] behind the decoder's decoder_ids [B, A], likewise padded at their ends.
        """
        embeds = embeds.to(self.network.dtype)
        if not self.is_encoder_decoder:
            if mask is None:
                return self.network.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            out = self.network.base_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
            return out.last_hidden_state
        memory = self.encode(embeds, mask)
        out = self.network.get_decoder()(
            input_ids=decoder_ids, encoder_hidden_states=memory, encoder_attention_mask=mask, use_cache=False
        )
        return self._scaled(out.last_hidden_state)

    def encode(self, embeds: Tensor, mask: Tensor | None) -> Tensor:
        """The encoder's states [B, T, C]."""
        embeds = embeds.to(self.network.dtype)
        return self.network.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state

    def _scaled(self, hidden: Tensor) -> Tensor:
        """T5 with tied embeddings scales what goes into its output layer."""
        return hidden * self.width**-0.5 if getattr(self.network.config, "scale_decoder_outputs", False) else hidden

    def answer_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        weights: Tensor | None = None,
        max_rows: int | None = None,
    ) -> Tensor:
        """hidden [B, T, C], labels [B, T] int64: what each position is asked for, -100: nothing -> 0-d float32.

        The mean over all asked positions, of all ranks together (weighted by `weights` [B, T], if there are some): the mean of
        what the ranks return. Only the asked rows meet the vocabulary; max_rows: see linear_cross_entropy.
        """
        weight, bias = self.head
        total = linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            label_smoothing=label_smoothing,
            weights=weights,
            reduction="sum",
            max_rows=max_rows,
        )
        asked = labels != -100
        return mean_over_ranks(total, asked.sum() if weights is None else (weights * asked).sum())

    @torch.no_grad()
    def read(self, embeds: Tensor, mask: Tensor) -> Reading:
        """Reads a prefix [B, T, C], once: what generation and ranking go on from. mask [B, T] bool; causal: padded at the
        beginning (splice.left_padded)."""
        embeds = embeds.to(self.network.dtype)
        if self.is_encoder_decoder:
            reading = Reading(self, None, mask, self.encode(embeds, mask))
            reading.extend(torch.full_like(mask[:, :1], self.start_id, dtype=torch.int64))
            return reading
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.network.base_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True)
        return Reading(self, out.past_key_values, mask, None, out.last_hidden_state[:, -1])


class Reading:
    """N rows that a language model has read, with its cache of keys and values: nn/generation.py's Decoding."""

    def __init__(
        self, model: LanguageModel, cache: Any, mask: Tensor, memory: Tensor | None, hidden: Tensor | None = None
    ) -> None:
        self.model, self.cache = model, cache
        self.mask = mask  # [N, T] bool, of the prefix and what has been read since, or of the encoder's states
        self.memory = memory  # [N, T, C] the encoder's states
        self.hidden = hidden  # [N, C] behind the last token

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.model.head

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Reads tokens [N, A] -> their hidden states [N, A, C]."""
        network = self.model.network
        if self.memory is not None:
            out = network.get_decoder()(
                input_ids=tokens,
                encoder_hidden_states=self.memory,
                encoder_attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
            )
            states = self.model._scaled(out.last_hidden_state)
        else:
            count = self.mask.sum(1, keepdim=True)  # [N, 1]
            self.mask = torch.cat((self.mask, self.mask.new_ones(tokens.shape)), dim=1)
            out = network.base_model(
                inputs_embeds=self.model.embed(tokens),
                attention_mask=self.mask,
                position_ids=count + torch.arange(tokens.shape[1], device=tokens.device),
                past_key_values=self.cache,
                use_cache=True,
            )
            states = out.last_hidden_state
        self.cache, self.hidden = out.past_key_values, states[:, -1]
        return states

    def select(self, rows: Tensor) -> Reading:
        """rows [N'] int64 -> a reading of its own whose row i is row rows[i] of this one. As many rows of each sample as of every
        other, in their order: then as many rows as before see the same encoder's states, which are not copied."""
        if self.memory is None:
            return Reading(self.model, _picked(self.cache, rows), self.mask[rows], None, self.hidden[rows])
        cache, mask, memory = copy.copy(self.cache), self.mask, self.memory
        cache.is_updated = dict(cache.is_updated)
        cache.self_attention_cache = _picked(cache.self_attention_cache, rows)
        if len(rows) != len(mask):
            cache.cross_attention_cache = _picked(cache.cross_attention_cache, rows)
            mask, memory = mask[rows], memory[rows]
        return Reading(self.model, cache, mask, memory, self.hidden[rows])


def mean_over_ranks(total: Tensor, count: Tensor) -> Tensor:
    """total / count over the rows of all ranks: the mean of what the ranks return; 0 where there are none at all."""
    count = count.to(total.dtype)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        count = count.detach().clone()
        dist.all_reduce(count)
        total = total * dist.get_world_size()
    return total / torch.where(count > 0, count, 1)


def vocabulary_of(config: LMConfig) -> Vocabulary:
    """What the network asks of its tokenizer; a begin token it leaves to that."""
    about = _described(config)
    return Vocabulary(about.vocab_size, eos_id=_first(about.eos_token_id), pad_id=about.pad_token_id)


def _first(ids: int | list[int]) -> int:
    return ids[0] if isinstance(ids, list) else ids


def _described(config: LMConfig) -> Any:
    """The config of transformers. UserError: no such architecture, or settings that are not its."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        raise UserError(f"language models need the packages of `pip install vlpfast[llm]`: {error}") from error
    architecture, settings = PRESETS.get(config.architecture, (config.architecture, {}))
    settings = settings | config.settings
    if architecture not in CONFIG_MAPPING:
        raise UserError(
            f"language.architecture: expected one of {', '.join(PRESETS)} or a model_type of transformers, got {architecture!r}"
        )
    config_class = CONFIG_MAPPING[architecture]
    try:
        about = config_class(**settings)
    except Exception as error:  # transformers raises its own kinds for what a config does not take
        raise UserError(f"language.settings: {' '.join(str(error).split())}") from error
    known = set(config_class().to_dict()) | set(getattr(config_class, "attribute_map", {}))
    known |= {"decoder_start_token_id", "bos_token_id", "tie_word_embeddings", "dense_act_fn"}
    if unknown := sorted(set(settings) - known):
        raise UserError(f"language.settings: {config_class.__name__} has no {unknown[0]!r}")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(about, name, None) is not None:
            raise UserError(f"language.architecture: {architecture} changes its logits by {name}, which is not made here")
    if getattr(about, "eos_token_id", None) is None:
        raise UserError(f"language.settings: {architecture} needs eos_token_id")
    if getattr(about, "pad_token_id", None) is None:
        about.pad_token_id = _first(about.eos_token_id)
    if about.is_encoder_decoder and getattr(about, "decoder_start_token_id", None) is None:
        about.decoder_start_token_id = about.pad_token_id  # as T5 has it
    return about


def _build(config: LMConfig) -> nn.Module:
    """The network of transformers, with random weights or those of config.weights."""
    about = _described(config)
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if about.is_encoder_decoder else AutoModelForCausalLM
    options = {"attn_implementation": "sdpa", "dtype": getattr(torch, config.dtype)}
    untied = (PRESETS.get(config.architecture, ("", {}))[1] | config.settings).get("tie_word_embeddings") is False
    if config.weights and torch.empty(0).device.type != "meta":
        return _load(auto, about, Path(config.weights).expanduser(), options, untied)
    try:
        network = auto.from_config(about, **options)
    except ValueError as error:
        raise UserError(f"language.architecture: {about.model_type}: {str(error).splitlines()[0]}") from error
    return _untie(network) if untied else network


def _untie(network: nn.Module) -> nn.Module:
    """transformers ties the output layer of every T5 to its embeddings, unless a checkpoint says otherwise."""
    head = network.get_output_embeddings()
    if head.weight is network.get_input_embeddings().weight:
        head.weight = nn.Parameter(torch.empty_like(head.weight))
        nn.init.normal_(head.weight, std=head.weight.shape[1] ** -0.5)
    return network


def _load(auto: Any, about: Any, folder: Path, options: dict[str, Any], untied: bool) -> nn.Module:
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        raise UserError(f"language.weights: {folder} is no folder with .safetensors files, as save_pretrained writes them")
    try:
        network, found = auto.from_pretrained(
            folder,
            config=about,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **options,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"language.weights: {folder}: {' '.join(str(error).split())}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found.get(what):
            first = sorted(map(str, found[what]))[0]
            raise UserError(f"language.weights: {folder} does not fit language.settings: {what}: {first}, ...")
    if untied and network.get_output_embeddings().weight is network.get_input_embeddings().weight:
        raise UserError(f"language.weights: {folder} has no output layer of its own; use tie_word_embeddings: true")
    return network


def _checkpoint_blocks(network: nn.Module) -> None:
    """transformers' own checkpointing asks for training mode, in which a frozen network never is."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = _recomputing(module.forward)


def _recomputing(forward: Any) -> Any:
    @functools.wraps(forward)
    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    return run


def _picked(cache: Any, rows: Tensor) -> Any:
    """A copy of a cache of transformers with these rows; the original may go on being used."""
    picked = copy.copy(cache)
    picked.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in picked.layers:
        layer.batch_select_indices(rows)
    return picked
