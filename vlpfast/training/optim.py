"""Which optimiser, with which rate for which parameter at which step; the norm of the gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vlpfast.training.apex_optimizers import CLASSES, build_apex, find_apex
from vlpfast.training.config import Group, Stage, TrainConfig
from vlpfast.training.optimizers import LAMB, SGD, Adafactor, Lion
from vlpfast.training.stages import check_patterns, matches
from vlpfast.types import LayerDepths, UserError


def build_optimizer(model: nn.Module, train: TrainConfig, name: str, stage: Stage) -> torch.optim.Optimizer:
    """train.optimizer over the trained parameters, grouped by learning-rate factor and weight decay.

    Parameters of fewer than two dimensions (biases, norms, logit_scale) are never decayed, whatever their group says.
    Each group carries `factor`, its factor on the schedule's learning rate: that of the stage's group times the layer's, which is
    layer_decay ** layers_above. The optimiser obeys `found_inf` (optimizers.py).
    UserError: a pattern fits nothing, layer_decay is set and no layers are found, apex is asked for and not here.
    """
    check_patterns(f"stages.{name}.groups", stage.groups, model)
    above = layers_above(model)
    decays = {train.layer_decay, *(group.layer_decay for group in stage.groups.values())} - {None, 1.0}
    if decays and not above:
        raise UserError(
            f"layer_decay={min(decays)}: no parameter of {type(model).__name__} has a numbered block in its name (blocks.0., "
            "layers.0., ...): expected 1, or a model with a method layer_depth"
        )
    collected: dict[tuple[float, float, bool], list[nn.Parameter]] = {}  # kernels take whole tensors or spread ones
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = next((group for pattern, group in stage.groups.items() if matches(parameter_name, [pattern])), Group())
            decay = train.weight_decay if group.weight_decay is None else group.weight_decay
            layer_decay = train.layer_decay if group.layer_decay is None else group.layer_decay
            factor = group.lr * layer_decay ** above.get(parameter_name, 0)
            key = (factor, decay if parameter.ndim > 1 else 0.0, is_spread(parameter))
            collected.setdefault(key, []).append(parameter)
    groups = [{"params": params, "factor": factor, "weight_decay": decay} for (factor, decay, _), params in collected.items()]
    betas = (train.betas[0], train.betas[1])
    if _use_apex(train, [parameter for params in collected.values() for parameter in params]):
        return build_apex(train.optimizer, groups, train.lr, betas, train.eps)
    if train.optimizer == "lamb":
        return LAMB(groups, lr=train.lr, betas=betas, eps=train.eps)
    if train.optimizer == "lion":
        return Lion(groups, lr=train.lr, betas=betas)
    if train.optimizer == "adafactor":
        if any(is_spread(parameter) for parameter in model.parameters()):
            raise UserError("train.optimizer=adafactor: torch's does not take FSDP's parameters; adamw, lamb, lion and sgd do")
        return Adafactor(groups, lr=train.lr)
    if train.optimizer == "sgd":
        return SGD(groups, lr=train.lr, momentum=train.momentum)
    return torch.optim.AdamW(groups, lr=train.lr, betas=betas, eps=train.eps, fused=True)


def _use_apex(train: TrainConfig, parameters: list[nn.Parameter]) -> bool:
    if train.optimizer_backend == "torch" or train.optimizer not in CLASSES:
        return False
    reasons = {
        "apex.optimizers of NVIDIA apex, built with its CUDA extensions, is not here": find_apex(train.optimizer) is None,
        "its kernels need a GPU": any(parameter.device.type != "cuda" for parameter in parameters),
        "its kernels need float32 parameters": any(parameter.dtype != torch.float32 for parameter in parameters),
        "it does not know FSDP's parameters": any(is_spread(parameter) for parameter in parameters),
    }
    missing = [reason for reason, holds in reasons.items() if holds]
    if missing and train.optimizer_backend == "apex":
        raise UserError(f"train.optimizer_backend=apex: {missing[0]}; expected auto or torch")
    return not missing


_BLOCK = re.compile(r"(?:(.*?)\.)?(?:blocks|layers|layer|resblocks)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|position|patch|stem|(cls|class|mask)_token|(norm|ln)_pre")


def layers_above(model: nn.Module) -> dict[str, int]:
    """Layers between each parameter and the output of its tower, by name, for every parameter that stands in one.

    Depths are the model's own (LayerDepths) or read from the names. A tower is what has numbered blocks (blocks.N, layers.N,
    layer.N, resblocks.N): its embeddings, and what else stands before its blocks, have depth 0, block N has N + 1, and the rest
    of the tower (last norm, pooling, head) one more than the last block. What is in no tower (logit_scale) keeps its rate.

    Clark et al. 2020, "ELECTRA", arXiv 2003.10555; with these depths Bao et al. 2022, "BEiT", arXiv 2106.08254.
    """
    names = [name for name, _ in model.named_parameters()]
    depths = {name: model.layer_depth(name) for name in names} if isinstance(model, LayerDepths) else _depths(names)
    return {name: last - depth for name, (depth, last) in depths.items()}


def _depths(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """name -> depth in its tower, the tower's last depth; without the names that are in no tower."""
    blocks = {name: (match[1] or "", int(match[2])) for name in names if (match := _BLOCK.match(name))}
    last: dict[str, int] = {}  # by tower: what stands before "blocks" in the names of its blocks
    for tower, block in blocks.values():
        last[tower] = max(last.get(tower, 0), block + 2)
    depths = {}
    for name in names:
        if name in blocks:
            tower, block = blocks[name]
            depths[name] = (block + 1, last[tower])
            continue
        # vision.patch_embed is of the tower vision.transformer: the one that shares the most leading words, if it is one alone.
        shared = {tower: _shared(name, tower) for tower in last}
        nearest = [tower for tower, words in shared.items() if words == max(shared.values()) and (words or not tower)]
        if len(nearest) == 1:
            depths[name] = (0 if _EMBEDDING.search(name) else last[nearest[0]], last[nearest[0]])
    return depths


def _shared(name: str, tower: str) -> int:
    count = 0
    for a, b in zip(name.split("."), tower.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count


def learning_rate(step: int, steps: int, train: TrainConfig, epoch_steps: int = 1) -> float:
    """The rate of step 0 .. steps - 1 of a stage: up in a line to train.lr over warmup_steps, then as train.schedule says.

    epoch_steps: steps of an epoch, which the schedule cosine_by_epoch goes by: epoch e of T has warmup_lr for e < warmup_epochs,
    else half of lr times 1 + cos(pi (e - warmup_epochs) / T), as CoOp's recipe (Zhou et al. 2022).
    A function of its arguments alone: a run that is given more steps follows the longer schedule from there on.
    """
    if train.schedule == "cosine_by_epoch":
        epoch = step // epoch_steps
        if epoch < train.warmup_epochs and train.warmup_lr is not None:
            return train.warmup_lr
        left = 0.5 * (1 + math.cos(math.pi * (epoch - train.warmup_epochs) / math.ceil(steps / epoch_steps)))
        return train.min_lr + (train.lr - train.min_lr) * left
    if step < train.warmup_steps:
        if train.warmup_lr is None:
            return train.lr * (step + 1) / train.warmup_steps
        return train.warmup_lr + (train.lr - train.warmup_lr) * step / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "steps":
        times = sum(step >= round(share * steps) for share in train.decay_at)
        times += step // train.decay_every if train.decay_every else 0
        return max(train.min_lr, train.lr * train.decay_factor**times)
    after = step - train.warmup_steps
    done = after / max(1, steps - train.warmup_steps)
    if train.schedule == "cosine":
        # Loshchilov and Hutter 2017, "SGDR: stochastic gradient descent with warm restarts", arXiv 1608.03983, with equal periods
        done = after % train.cycle_steps / train.cycle_steps if train.cycle_steps else done
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = (1 - done) ** (train.power if train.schedule == "polynomial" else 1.0)
    return train.min_lr + (train.lr - train.min_lr) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def gradient_norm(model: nn.Module, max_norm: float, max_value: float = 0.0) -> Tensor:
    """Norm of all gradients together (0-d float32), which are then scaled to at most max_norm (0: left as they are).

    max_value: each entry is then brought to within [-max_value, max_value] (0: left as it is). Of parameters that are spread over
    ranks it is the norm of the whole, on every rank.
    """
    kinds: dict[bool, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            kinds.setdefault(is_spread(parameter), []).append(parameter)
    norms = [torch.nn.utils.get_total_norm([parameter.grad for parameter in kind]) for kind in kinds.values()]
    norms = [norm.full_tensor() if is_spread(norm) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds.values():
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
        if max_value > 0:
            torch.nn.utils.clip_grad_value_(kind, max_value)
    return norm


def is_spread(tensor: Tensor) -> bool:
    """Whether this rank has but a part of it (a DTensor)."""
    return hasattr(tensor, "full_tensor")
