"""What a run would take, without a step of it: parameters by module, FLOPs and memory for every way to spread it over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vlpfast.training.config import Stage, TrainConfig
from vlpfast.training.flops_count import Speed, StepCount, prefixed
from vlpfast.training.optim import build_optimizer
from vlpfast.training.parallel import blocks

RANKS = (8, 64)  # shown beside what is asked for


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Their sum is an upper bound of what tensors take at once: gradients come as activations go."""

    strategy: str
    ranks: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int  # of the rank's share of the batch, all kept
    gathered: int  # FSDP2: parameters that are whole for as long as they are used

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.gathered


def memory(speed: Speed, count: StepCount, samples: int, train: TrainConfig, name: str, stage: Stage, ranks: int) -> list[Memory]:
    """For one rank, for `ranks` of them, and for RANKS where the batch can be divided among them.

    speed, count: of the stage, counted on `samples` samples. The optimiser is built on shapes and its state measured. FSDP2
    keeps each rank's part; whole are the parameters outside of repeated blocks and those of two blocks, the one in use and the
    one that comes next, in the dtype of the products.
    """
    model = speed.skeleton.model
    with speed.skeleton.fake:
        optimizer = build_optimizer(model, train, name, stage)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = parameter.new_zeros(parameter.shape)
        optimizer.step()
    state = sum(value.nbytes for values in optimizer.state.values() for value in values.values() if hasattr(value, "nbytes"))
    whole = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    repeated = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks(model)]
    travels = speed.half.itemsize / 4 if speed.half is not None else 1.0  # of float32
    gathered = int((whole - sum(repeated) + 2 * max(repeated, default=0)) * travels)
    found = []
    for world in sorted({1, ranks, *RANKS}):
        if train.batch_size % world == 0:
            share = train.batch_size // world
            activations = count.saved_bytes * min(share, train.micro_batch or share) // samples
            found.append(Memory("ddp" if world > 1 else "one rank", world, whole, trained, state, activations, 0))
            if world > 1:
                parts = (-(-value // world) for value in (whole, trained, state))
                found.append(Memory("fsdp", world, *parts, activations, gathered))
    return found


def memory_table(found: Sequence[Memory]) -> list[list[str]]:
    head = ["strategy", "ranks", "parameters", "gradients", "optimiser", "activations", "gathered", "together"]
    rows = [
        [m.strategy, f"{m.ranks}", *map(mebibytes, (m.parameters, m.gradients, m.optimizer, m.activations, m.gathered, m.total))]
        for m in found
    ]
    return [head, *rows]


def parameter_table(model: nn.Module, count: StepCount | None, samples: int) -> list[list[str]]:
    """Two levels of modules with their parameters; forward FLOPs a sample for the first level."""
    rows = [["module", "kind", "parameters", "trained", "forward FLOP"]]

    def row(label: str, kind: str, parameters: Sequence[nn.Parameter], flops: str) -> list[str]:
        size = sum(parameter.numel() for parameter in parameters)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        share = "all" if trained == size else f"{trained:,}" if trained else "none"
        return [label, kind, f"{size:,}", share, flops]

    def level(module: nn.Module, indent: str, deeper: bool) -> None:
        for name, child in module.named_children():
            if parameters := list(child.parameters()):
                flops = prefixed(count.by_module[name] / samples).strip() if deeper and count is not None else ""
                rows.append(row(f"{indent}{name}", _kind(child), parameters, flops))
                if deeper:
                    level(child, indent + "  ", False)
        for name, parameter in module.named_parameters(recurse=False):
            rows.append(row(f"{indent}{name}", "x".join(map(str, parameter.shape)) or "number", [parameter], ""))

    level(model, "", True)
    total = prefixed(count.forward / samples).strip() if count is not None else ""
    rows.append(row("all", type(model).__name__, list(model.parameters()), total))
    return rows


def _kind(module: nn.Module) -> str:
    repeated = blocks(module)
    return type(module).__name__ + (f" of {len(repeated)} {type(repeated[0]).__name__}" if repeated else "")


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def as_text(rows: Sequence[Sequence[str]], left: int) -> str:
    """A table with its first `left` columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
