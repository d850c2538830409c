"""What a stage asks of the model: its mode, which parameters are trained, how the losses are added up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

from vlpfast.training.config import Stage
from vlpfast.types import HasModes, UserError


def matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(key: str, patterns: Collection[str], model: nn.Module) -> None:
    """UserError naming the first pattern that no parameter matches: a misspelt pattern would train or freeze nothing."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(f"{key}: pattern {pattern!r} matches no parameter; they are {shown}")


def set_mode(model: nn.Module, name: str, stage: Stage, offered: Collection[str]) -> Collection[str]:
    """-> the parameters that the model offers for training from here on: those `offered` so far, unless its set_mode freezes some
    of them or offers others by requires_grad. Without a mode all is as it was."""
    if not stage.mode:
        return offered
    if not isinstance(model, HasModes):
        raise UserError(f"stages.{name}.mode: {type(model).__name__} has no modes, got {stage.mode!r}")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in offered)
    try:
        model.set_mode(stage.mode)
    except ValueError as error:
        raise UserError(f"stages.{name}.mode: {error}") from error
    return {parameter_name for parameter_name, parameter in model.named_parameters() if parameter.requires_grad}


def select_trainable(model: nn.Module, name: str, stage: Stage, offered: Collection[str]) -> None:
    """Sets requires_grad: of the parameters `offered`, those that match `trainable` (all, if empty) and not `frozen`."""
    check_patterns(f"stages.{name}.trainable", stage.trainable, model)
    check_patterns(f"stages.{name}.frozen", stage.frozen, model)
    for parameter_name, parameter in model.named_parameters():
        wanted = not stage.trainable or matches(parameter_name, stage.trainable)
        parameter.requires_grad_(parameter_name in offered and wanted and not matches(parameter_name, stage.frozen))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"stages.{name}: its trainable and frozen patterns leave no parameter to train")


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float], name: str) -> Tensor:
    """Sum of the losses, each times its weight. A loss of weight 0 takes no part, so that it may be NaN."""
    unknown = [key for key in weights if key not in losses]
    if unknown:
        raise UserError(f"stages.{name}.losses: unknown loss {unknown[0]!r}; the model gives {', '.join(losses)}")
    terms = [
        loss if weights.get(key, 1.0) == 1.0 else loss * weights[key] for key, loss in losses.items() if weights.get(key, 1.0)
    ]
    if not terms:
        raise UserError(f"stages.{name}.losses: every loss of the model ({', '.join(losses)}) has weight 0")
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
