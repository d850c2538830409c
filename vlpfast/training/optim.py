"""The optimiser and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlpfast.training.config import Group, Stage, TrainConfig
from vlpfast.training.stages import check_patterns, matches


def build_optimizer(model: nn.Module, train: TrainConfig, name: str, stage: Stage) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters, grouped by learning-rate factor and weight decay.

    Parameters of fewer than two dimensions (biases, norms, logit_scale) are never decayed, whatever their group says.
    Each group carries `factor`, its factor on the schedule's learning rate.
    """
    check_patterns(f"stages.{name}.groups", stage.groups, model)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}  # kernels take whole tensors or spread ones
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = next((group for pattern, group in stage.groups.items() if matches(parameter_name, [pattern])), Group())
            decay = train.weight_decay if group.weight_decay is None else group.weight_decay
            key = (group.lr, decay if parameter.ndim > 1 else 0.0, is_spread(parameter))
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "factor": factor, "weight_decay": decay} for (factor, decay, _), params in groups.items()],
        lr=train.lr,
        betas=(train.betas[0], train.betas[1]),
        eps=train.eps,
        fused=True,
    )


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """The rate of step 0 .. steps - 1 of a stage: up in a line to train.lr over warmup_steps, then down to 0 or level.

    A function of its arguments alone: a run that is given more steps follows the longer schedule from there on.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, steps - train.warmup_steps)
    if train.schedule == "cosine":
        return train.lr * 0.5 * (1 + math.cos(math.pi * done))
    return train.lr * (1 - done) if train.schedule == "linear" else train.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def gradient_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Norm of all gradients together (0-d float32), which are then scaled to at most max_norm (0: left as they are).

    Of parameters that are spread over ranks it is the norm of the whole, on every rank.
    """
    kinds: dict[bool, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            kinds.setdefault(is_spread(parameter), []).append(parameter)
    norms = [torch.nn.utils.get_total_norm([parameter.grad for parameter in kind]) for kind in kinds.values()]
    norms = [norm.full_tensor() if is_spread(norm) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        for kind in kinds.values():
            torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def is_spread(tensor: Tensor) -> bool:
    """Whether this rank has but a part of it (a DTensor)."""
    return hasattr(tensor, "full_tensor")
