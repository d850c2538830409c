"""LoRA: low-rank additions to the linear layers of a network that is otherwise frozen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.types import UserError


@dataclass
class LoRAConfig:
    rank: int = 0  # 0: none
    alpha: float = 16.0  # the addition is multiplied by alpha / rank
    dropout: float = 0.0  # of its inputs
    targets: list[str] = field(default_factory=lambda: ["*.q_proj", "*.v_proj"])  # shell patterns on the names of linear layers


class LoRALinear(nn.Linear):
    """x W^T + b + alpha / rank * dropout(x) A^T B^T (Hu et al. 2022, arXiv 2106.09685). B starts at 0: at first nothing changes.

    W and b keep their names and are frozen; A and B are float32 whatever W is. alpha may be changed at any time.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)  # not Linear's, which would make weights of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        self.rank, self.alpha, self.dropout = config.rank, config.alpha, config.dropout
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(config.rank, linear.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.merged_alpha: float | None = None  # with which the addition has been put into W; None: it has not

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.merged_alpha is not None:
            return out
        down = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a.to(x.dtype))
        return out + F.linear(down, self.lora_b.to(x.dtype)) * (self.alpha / self.rank)

    @torch.no_grad()
    def merge(self) -> None:
        """Puts the addition into W: inference costs what it cost without. It has W's precision then."""
        if self.merged_alpha is None:
            self.weight += (self.lora_b @ self.lora_a * (self.alpha / self.rank)).to(self.weight.dtype)
            self.merged_alpha = self.alpha

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes it out again, which gives W back but for rounding."""
        if self.merged_alpha is not None:
            self.weight -= (self.lora_b @ self.lora_a * (self.merged_alpha / self.rank)).to(self.weight.dtype)
            self.merged_alpha = None

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        if self.merged_alpha is not None:
            raise RuntimeError(
                "a merged LoRA layer has no state of its own: unmerge it before saving, or export what it computes"
            )
        super()._save_to_state_dict(*args, **kwargs)


def add_lora(network: nn.Module, config: LoRAConfig, key: str = "lora") -> None:
    """Puts a LoRALinear in the place of every nn.Linear whose name in `network` matches a pattern. Nothing at rank 0.

    Before the network is spread over ranks or compiled. UserError, under the name `key`: a pattern that matches no linear layer.
    """
    if config.rank < 0 or not 0 <= config.dropout < 1:
        raise UserError(f"{key}: expected rank >= 0 and dropout in [0, 1), got {config.rank} and {config.dropout}")
    if not config.rank:
        return
    linears = {name: module for name, module in network.named_modules() if type(module) is nn.Linear}
    for pattern in config.targets:
        if not any(fnmatchcase(name, pattern) for name in linears):
            shown = ", ".join(list(linears)[:8]) + (", ..." if len(linears) > 8 else "")
            raise UserError(f"{key}.targets: pattern {pattern!r} matches no linear layer; they are {shown or 'none'}")
    for name, linear in linears.items():
        if any(fnmatchcase(name, pattern) for pattern in config.targets):
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, LoRALinear(linear, config))


def lora_layers(network: nn.Module) -> Iterator[LoRALinear]:
    return (module for module in network.modules() if isinstance(module, LoRALinear))


def set_lora_alpha(network: nn.Module, alpha: float) -> None:
    """Of all layers: PLLaVA answers with a smaller one than it was trained with (Xu et al. 2024). Merged layers change too."""
    for layer in lora_layers(network):
        merged = layer.merged_alpha is not None
        layer.unmerge()
        layer.alpha = alpha
        if merged:
            layer.merge()


def merge_lora(network: nn.Module) -> None:
    for layer in lora_layers(network):
        layer.merge()


def unmerge_lora(network: nn.Module) -> None:
    for layer in lora_layers(network):
        layer.unmerge()


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an addition's."""
    return name.endswith((".lora_a", ".lora_b"))


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """The additions alone, by their names in the network's state_dict: what is saved of a fine-tuned model."""
    return {name: tensor for name, tensor in network.state_dict().items() if is_adapter(name)}


def load_lora(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """What lora_state gave. UserError: a name or shape that is not this network's, or one that is missing."""
    own = lora_state(network)
    for name in sorted(set(own) ^ set(state)):
        raise UserError(f"lora weights: {name} is {'missing' if name in own else 'not of this network'}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"lora weights: {name}: expected {list(own[name].shape)}, got {list(tensor.shape)}")
    network.load_state_dict(dict(state), strict=False)
