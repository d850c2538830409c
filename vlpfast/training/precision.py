"""Which device a run is on and in which precision its products are made."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlpfast.training.config import TrainConfig
from vlpfast.training.optimizers import local
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

    Parameters, gradients and the optimiser are float32 in every precision, but see BFloat16Weights, and Spread for what FSDP2's
    forwards hold.
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


class LossScale:
    """Keeps small gradients of fp16 products from becoming 0: losses are multiplied by a scale, and gradients divided by it.

    The rule of torch.amp.GradScaler, by its own kernel: halved after a step that was not finite, doubled after
    train.loss_scale_interval steps that were, all on the device. GradScaler itself looks for what is not finite rank by rank,
    and takes no mixture of FSDP's parameters with whole ones. In every other precision than fp16 all this does nothing.
    """

    def __init__(self, train: TrainConfig, device: torch.device) -> None:
        self.enabled = train.precision == "fp16"
        self.interval = train.loss_scale_interval
        self.scale = torch.full((), train.loss_scale if self.enabled else 1.0, device=device)  # 0-d float32
        self.streak = torch.zeros((), dtype=torch.int32, device=device)  # finite steps since it changed

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale if self.enabled else loss

    def unscale_(self, model: nn.Module) -> None:
        """Divides every gradient of the model."""
        if self.enabled:
            grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            torch._foreach_mul_(local(grads), self.scale.double().reciprocal().float())

    def update(self, found_inf: Tensor) -> None:
        """found_inf: 0-d float32, 1 where the step was not finite on any rank."""
        if self.enabled:
            torch._amp_update_scale_(self.scale, self.streak, found_inf, 2.0, 0.5, self.interval)

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "streak": self.streak.item()} if self.enabled else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.enabled:
            self.scale.fill_(state["scale"])
            self.streak.fill_(state["streak"])


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
                raise UserError("train.precision=bf16_params: FSDP's forwards hold bf16 weights anyway: use train.precision=bf16")
    return BFloat16Weights(model) if precision == "bf16_params" else nullcontext()


class BFloat16Weights(AbstractContextManager[None]):
    """Within the context the trained matrices of the model are bf16, and so are their gradients; outside they are the float32
    masters again, with float32 gradients.

    The optimiser, the average, clipping and checkpoints thus know of float32 alone, and a checkpoint fits every precision.
    Entering rounds the masters; leaving adds the bf16 gradients to float32 ones that were there before (accumulation). Vectors
    and scalars stay float32: they are small, and the temperature's last digits count.

    The bf16 parameters are the same from one entering to the next, in the same memory. DistributedDataParallel, which holds on to
    the parameters it finds, must be made within the context; it then sends bf16 gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        masters = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
        self.rounded = {master: nn.Parameter(master.detach().to(torch.bfloat16)) for master in masters}
        # Every place, for tied weights have several.
        self.places = [(m, key, p) for m in model.modules() for key, p in m._parameters.items() if p in self.rounded]

    def __enter__(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.rounded.values()), list(self.rounded))
        for module, key, master in self.places:
            setattr(module, key, self.rounded[master])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for module, key, master in self.places:
            setattr(module, key, master)
        for master, rounded in self.rounded.items():
            if rounded.grad is not None:
                master.grad = rounded.grad.float() if master.grad is None else master.grad.add_(rounded.grad)
                rounded.grad = None
