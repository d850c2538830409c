"""Which device a run is on and in which precision its products are made."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlpfast.training.config import TrainConfig
from vlpfast.types import UserError

_CPU_WORDS = {torch.bfloat16: {"amx_bf16", "avx512_bf16"}, torch.float16: {"amx_fp16", "avx512_fp16"}}
_PRECISIONS = {"bf16": torch.bfloat16, "bf16_params": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. UserError: no such device here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"train.device: expected auto, cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"train.device: expected auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"train.device: {name!r} asked for, {torch.cuda.device_count()} CUDA devices are here")
    return device


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of bfloat16 or float16 have instructions of their own: elsewhere they are emulated and several times
    slower than float32."""
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # no Linux
        return False
    return bool(words & _CPU_WORDS[dtype])


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """In which dtype forwards make their products (torch.autocast); None: float32, no autocast.

    Parameters, gradients and the optimiser are float32 in every precision, but see BFloat16Weights.
    """
    if precision == "auto":
        return torch.bfloat16 if is_fast(torch.bfloat16, device) else None
    dtype = _PRECISIONS.get(precision)
    if dtype is not None and not is_fast(dtype, device):
        short = precision.removesuffix("_params")
        warnings.warn(
            f"train.precision={precision}: this {device.type} has no {short} instructions; fp32 will be faster", stacklevel=2
        )
    return dtype


def loss_scaler(train: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """Keeps small gradients of fp16 products from becoming 0; with every other precision it does nothing.

    Losses times the scale, gradients divided by it. The scale is halved after a step whose gradients were not finite, and doubled
    after train.loss_scale_interval steps that were, all on the device.
    """
    return torch.amp.GradScaler(
        device.type,
        init_scale=train.loss_scale,
        growth_interval=train.loss_scale_interval,
        enabled=train.precision == "fp16",
    )


def working_weights(model: nn.Module, precision: str) -> AbstractContextManager[None]:
    """The context of every forward and backward of a stage, made once its trained parameters are selected.

    UserError: this model's parameters cannot be trained in this precision.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if precision in ("fp16", "bf16_params"):
        for name, parameter in trained.items():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise UserError(f"train.precision={precision}: expected float32 parameters, {name} is {parameter.dtype}")
            if precision == "bf16_params" and isinstance(parameter, DTensor):
                raise UserError("train.precision=bf16_params: FSDP keeps bf16 copies of its own: use train.precision=bf16")
    return BFloat16Weights(trained.values()) if precision == "bf16_params" else nullcontext()


class BFloat16Weights(AbstractContextManager[None]):
    """Within the context the matrices among the parameters are bf16, and so are their gradients; outside they are the float32
    masters again, bit for bit, with float32 gradients.

    The optimiser, the average, clipping and checkpoints thus know of float32 alone, and a checkpoint fits every precision.
    Entering rounds the masters; leaving adds the bf16 gradients to float32 ones that were there before (accumulation). Vectors
    and scalars stay float32: they are small, and the temperature's last digits count. The memory of the bf16 weights stays the
    same from one entering to the next.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.ndim > 1]
        self.masters = [parameter.data for parameter in self.parameters]
        self.rounded = [master.to(torch.bfloat16) for master in self.masters]
        self.sums: list[Tensor | None] = []

    def __enter__(self) -> None:
        torch._foreach_copy_(self.rounded, self.masters)
        self.sums = self._take_gradients()
        for parameter, rounded in zip(self.parameters, self.rounded, strict=True):
            parameter.data = rounded

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        grads = self._take_gradients()
        for parameter, master, grad, total in zip(self.parameters, self.masters, grads, self.sums, strict=True):
            parameter.data = master
            if grad is not None:
                grad = grad.float() if total is None else total.add_(grad)
            parameter.grad = total if grad is None else grad

    def _take_gradients(self) -> list[Tensor | None]:
        grads = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return grads
