"""The words that every layer shares: what a batch holds, what a model may offer, what it wants from the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:  # torch takes seconds to load, and `--help` should not wait for it
    from torch import Tensor


class UserError(Exception):
    """A mistake that the user can mend: commands print its message alone, without a traceback, and exit with 2."""


class Batch(TypedDict, total=False):
    """One batch, as every loader yields it and every model's forward takes it. Fields a model does not ask for are absent."""

    image: Tensor  # [B, 3, H, W] float32, normalised with the DataSpec's mean and std
    text: Tensor  # [B, L] int64 token ids, padded with the tokenizer's pad id
    text_mask: Tensor  # [B, L] bool, True = token
    index: Tensor  # [B] int64 position of the sample in its source, on the CPU
    crop: Tensor  # [B, 5] float32 x0, y0, width, height as fractions of the stored picture, then 1 if mirrored; on the CPU
    key: list[str]  # [B] WebDataset keys
    meta: list[dict[str, Any]]  # [B] the sample's JSON; only when the loader was asked for it


@dataclass(frozen=True)
class Progress:
    """Where training stands: `step` of `steps`, counted within the stage, before the step is taken (0 .. steps - 1)."""

    step: int
    steps: int

    @property
    def fraction(self) -> float:
        return self.step / max(1, self.steps)


# --- what a model wants from the data ---------------------------------------------------------------------------------


@dataclass
class ImageSpec:
    """Pictures: decoded to RGB, cropped, resized to `size` x `size`, mirrored, normalised. Evaluation takes the centre crop."""

    size: int = 224
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])  # RandomResizedCrop: share of the picture's area
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])  # RandomResizedCrop: width over height
    mirror: float = 0.0  # probability of a left-right flip in training
    interpolation: str = "bicubic"  # or "bilinear"


@dataclass
class TextSpec:
    """Captions: tokenised, cut to `context_length` with the end token kept, padded."""

    context_length: int = 77


@dataclass
class DataSpec:
    """Ties a model to its pipeline. A modality set to None is neither read nor yielded."""

    image: ImageSpec | None = field(default_factory=ImageSpec)
    text: TextSpec | None = field(default_factory=TextSpec)


class Tokenizer(Protocol):
    """Text to ids. `vocab_size` counts every id; ids of the special tokens are plain ints."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    def encode(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
        """-> ids [B, L] int64, mask [B, L] bool (True = token), L = context_length; bos + text + eos, cut text keeps its eos."""
        ...

    def save(self, path: str) -> None: ...


@runtime_checkable
class Loader(Protocol):
    """Batches with a position that can be saved. A training loader never ends; an evaluation loader makes one pass in order."""

    batch_size: int
    skipped: dict[str, str]  # shard.tar:key of each damaged sample met so far -> what was wrong

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int:
        """Batches in one epoch of this rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out; plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


# --- what a model may offer beside forward(batch, progress) -> dict[str, Tensor] -----------------------------------------


@runtime_checkable
class BeforeStep(Protocol):
    def before_step(self, step: int) -> None:
        """Called before the forward of every step: clamps, ramps, moving averages. The only places where state changes are
        this and after_step; forward changes none."""
        ...


@runtime_checkable
class AfterStep(Protocol):
    def after_step(self) -> None:
        """Called after the optimiser's step: queues."""
        ...


@runtime_checkable
class PreparesEpoch(Protocol):
    def prepare_epoch(self, loader: Loader) -> None: ...


@runtime_checkable
class HasModes(Protocol):
    def set_mode(self, mode: str) -> None:
        """Switches to the objective set of a stage; raises ValueError naming the known modes."""
        ...


@runtime_checkable
class LayerDepths(Protocol):
    def layer_depth(self, name: str) -> tuple[int, int]:
        """Where a parameter stands for layer_decay: its depth in its tower and the tower's last depth. Its learning rate is
        multiplied by layer_decay ** (last - depth). Without this method depths are read from the names."""
        ...


@runtime_checkable
class EncodesImages(Protocol):
    def encode_image(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> [B, D] of unit length."""
        ...


@runtime_checkable
class EncodesTexts(Protocol):
    def encode_text(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """text [B, L] -> [B, D] of unit length."""
        ...


@runtime_checkable
class SplitsContrastive(Protocol):
    """Lets a large batch be encoded in micro-batches and contrasted once."""

    def encode(self, batch: Batch) -> dict[str, Tensor]: ...
    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]: ...
