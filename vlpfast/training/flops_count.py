"""What a step costs, counted without taking it, and what the device could do: together the model FLOPs utilisation (MFU).

MFU is the term of Chowdhery et al. 2022, "PaLM", appendix B: floating-point operations that the model needs for forward and
backward over seconds times the device's peak. Operations are those of products, convolutions and attention, a multiply and an
add as two, by the formulas of torch and vlpfast.ops.flops: a causal mask halves nothing, and attention's scores, which its
kernels make again in the backward, count twice. What is made again to save memory (activation checkpointing, a feature cache)
does not count, nor does the optimiser. With many ranks they are those of one rank's own samples, without the pairs that a
sharded loss makes of them and other ranks' samples.
"""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vlpfast.training.config import Stage
from vlpfast.training.run_folder import replace
from vlpfast.training.stages import select_trainable, set_mode, weighted_sum
from vlpfast.types import Batch, Progress, UserError


@dataclass(frozen=True)
class StepCount:
    """One forward and backward of a whole batch."""

    forward: int  # FLOPs
    backward: int
    by_module: dict[str, int]  # of the forward, by the name of the model's direct children; "": outside of them
    saved_bytes: int  # kept from forward to backward, beyond parameters and batch

    @property
    def flops(self) -> int:
        return self.forward + self.backward


class Skeleton:
    """A model without its data: the structure and the shapes of its parameters, to be run on what has shapes alone.

    Taken from a model before it is spread over ranks; takes no memory. `model` is the module, whose parameters may be frozen and
    whose mode may be set as those of the real one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        tensors = [*model.parameters(), *model.buffers()]
        self.model: nn.Module = copy.deepcopy(model, {id(tensor): self.fake.from_tensor(tensor) for tensor in tensors})
        self._own = {_storage(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}

    def count(self, batch: Batch, loss: Callable[[nn.Module, Batch], Tensor]) -> StepCount:
        """loss(model, batch) -> 0-d, with gradients. batch: real tensors, which are not read.

        Raises what torch raises where shapes depend on the values of the batch.
        """
        batch = {key: self.fake.from_tensor(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
        known = self._own | {_storage(value) for value in batch.values() if isinstance(value, Tensor)}
        saved: dict[int, Tensor] = {}  # the tensor too, so that its storage's address is not given to another

        def pack(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in known:
                saved[_storage(tensor)] = tensor
            return tensor

        for parameter in self.model.parameters():
            parameter.grad = None
        with _alone(), torch.random.fork_rng(devices=[]), self.fake, _ChecksPass(), _counter() as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = loss(self.model, batch)
            forward, found = counter.get_total_flops(), counter.get_flop_counts()
            root, names = type(self.model).__name__, [name for name, _ in self.model.named_children()]
            by_module = {name: sum(found.get(f"{root}.{name}", {}).values()) for name in names}
            by_module[""] = forward - sum(by_module.values())
            saved_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
            value.backward()
        return StepCount(forward, counter.get_total_flops() - forward, by_module, saved_bytes)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _counter() -> Any:
    """Torch's counter with the library's formulas, and with torch's own formula where it forgets a kernel: attention on a CPU.

    Imported at need: it loads triton where there is one."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    from vlpfast.ops.flops import FlopCounterMode

    def forward(q: tuple, k: tuple, v: tuple, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: tuple, q: tuple, k: tuple, v: tuple, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {kernel: forward, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    return FlopCounterMode(display=False, custom_mapping=mapping)


class _ChecksPass(TorchDispatchMode):
    """Where a model looks at the batch on the host to check it, the answer is yes; other values cannot be read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, there seem to be no other ranks: nothing that is not there can travel."""
    is_initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = is_initialized


# --- what the device could do -----------------------------------------------------------------------------------------

# Dense TFLOP/s of the makers' data sheets (without sparsity), the first name that the device's contains: bf16 (fp16 where there
# is no bf16), TF32, fp32
_DATA_SHEETS = {
    "GB200": (2500, 1250, 80),
    "B200": (2250, 1125, 75),
    "H200": (989, 495, 67),
    "H100 NVL": (835, 418, 60),
    "H100 PCIe": (756, 378, 51),
    "H100": (989, 495, 67),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "A10G": (70, 35, 35),
    "V100": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1),
}


@dataclass(frozen=True)
class Peak:
    flops_per_s: float
    source: str  # for people


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Of products in `dtype` (float32, bfloat16, float16): by data sheet where the device is known, else measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((rates for part, rates in _DATA_SHEETS.items() if part in name), None)
        if known is not None:
            tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
            kind = 1 if tf32 else 2 if dtype == torch.float32 else 0
            return Peak(known[kind] * 1e12, f"{name}, data sheet, {('half precision', 'TF32', 'fp32')[kind]}")
    return _measured(device, dtype)


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of several products of square matrices."""
    n, rounds = (8192, 10) if device.type == "cuda" else (1024, 5)
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    where = f"here, {torch.get_num_threads()} threads" if device.type == "cpu" else "here"
    return Peak(2 * n**3 / min(seconds), f"a product of {n:,} x {n:,} in {str(dtype).removeprefix('torch.')}, measured {where}")


# --- both, for a run --------------------------------------------------------------------------------------------------


class Speed:
    """FLOPs of the steps of a stage and the device's peak: what a trainer needs to tell its MFU.

    Made before the model is spread or compiled. half: the dtype of autocast, None without. Where a step cannot be counted by
    shapes alone, the first one is counted as it is taken (`counting`), whatever it makes twice included.
    """

    def __init__(self, model: nn.Module, device: torch.device, half: torch.dtype | None) -> None:
        self.device, self.half = device, half
        self.peak = peak(device, half or torch.float32)
        self.stage = ""  # the last that has begun
        self.flops: int | None = None  # of one rank's step; None: not known yet
        self.why_not = ""  # shapes alone did not do
        self.skeleton: Skeleton | None = None
        try:
            self.skeleton = Skeleton(model)
        except Exception as error:  # a model may hold what cannot be copied: that must not end a run
            self.why_not = _first_line(error)
        else:
            self._offered = {name for name, parameter in self.skeleton.model.named_parameters() if parameter.requires_grad}

    def begin_stage(self, name: str, stage: Stage, batch: Batch, progress: Progress) -> StepCount | None:
        """Counts a step of the stage on its first batch. None: it has to be counted as it is taken, for the reason why_not."""
        self.stage, self.flops = name, None
        if self.skeleton is None:
            return None
        model = self.skeleton.model.train()
        self._offered = set_mode(model, name, stage, self._offered)
        select_trainable(model, name, stage, self._offered)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
                return weighted_sum(model(batch, progress), stage.losses, name)

        try:
            count = self.skeleton.count(batch, loss)
        except UserError:
            raise
        except Exception as error:  # shapes that depend on values, operators without a rule for shapes
            self.why_not = _first_line(error)
            return None
        self.flops, self.why_not = count.flops, ""
        return count

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around forward and backward of a step: counts what is done, if the stage's step is not known yet."""
        if self.flops is not None:
            yield
            return
        with _counter() as counter:
            yield
        self.flops = counter.get_total_flops()

    def of_step(self, seconds: float) -> dict[str, float]:
        """Fields of a step's record: flops of this rank, mfu as a fraction. None of a model without products."""
        return {"flops": self.flops, "mfu": self.flops / (seconds * self.peak.flops_per_s)} if self.flops else {}

    def keep(self, run_dir: Path, samples: int) -> str:
        """Adds the stage to run_dir/speed.json and says what is in it. samples: of one rank's step."""
        path = run_dir / "speed.json"
        each = self.flops / samples
        counted = f"as the first step was taken ({self.why_not})" if self.why_not else "by shapes"
        facts = {
            "flops_per_sample": each,
            "counted": counted,
            "peak_flops_per_s": self.peak.flops_per_s,
            "peak": self.peak.source,
        }
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            before = {}
        replace(path, json.dumps({**before, self.stage: facts}, indent=1) + "\n")
        return (
            f"stage {self.stage}: {prefixed(each)}FLOP a sample, forward and backward, counted {counted}; "
            f"peak {prefixed(self.peak.flops_per_s)}FLOP/s ({self.peak.source})"
        )


def prefixed(value: float) -> str:
    """Three digits and a prefix: 44.4 G, 1.2 T."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(prefixes) > 1:
        prefixes.pop(0)
        value /= 1000
    return f"{value:.3g} {prefixes[0]}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
