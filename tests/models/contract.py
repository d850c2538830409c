"""What the contract test knows of each model, and the batches it feeds them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from vlpfast import models
from vlpfast.types import Batch, DataSpec, Progress, TextSpec

PAD, BOS, EOS, WORDS = 0, 1, 2, range(3, 60)  # the ids of every tokenizer trained here, as the tiny presets expect them


@dataclass
class Case:
    """A row of the table: what is published of a model, and what its forward must return."""

    published_parameters: int  # of the Config's defaults
    losses: set[str]


CASES = {
    "clip": Case(published_parameters=151_277_313, losses={"contrastive"}),  # ViT-B/32, the size of OpenAI's release
}


def build(name: str) -> nn.Module:
    """The tiny preset in training mode, always with the same weights."""
    model_class = models.get(name)
    torch.manual_seed(0)
    return model_class(model_class.Config.tiny())


def make_batch(data: DataSpec, size: int, *, seed: int = 0) -> Batch:
    """Random pictures, captions of random length, videos and sounds, as a loader with this DataSpec would yield them."""
    known = {"image", "text", "video", "audio"}
    unknown = {field.name for field in fields(data) if getattr(data, field.name) is not None} - known
    assert not unknown, f"make_batch cannot make {unknown}: teach it"
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {}
    if data.image is not None:
        batch["image"] = torch.randn(size, 3, data.image.size, data.image.size, generator=generator)
    if data.text is not None:
        batch["text"], batch["text_mask"] = captions(data.text, size, generator)
    if (video := data.video) is not None:
        batch["video"] = torch.randn(size, video.frames, 3, video.size, video.size, generator=generator)
        batch["frame_times"] = torch.rand(size, video.frames, generator=generator).cumsum(1)
        if video.short_frames:
            batch["short_video"] = torch.randn(size, video.short_frames, 3, video.size, video.size, generator=generator)
            batch["short_times"] = torch.rand(size, video.short_frames, generator=generator).cumsum(1)
    if (audio := data.audio) is not None:
        samples = round(audio.seconds * audio.sample_rate)
        frames = samples // audio.hop + (not audio.drop_last_frame)
        shape = (size, samples) if audio.features == "waveform" else (size, audio.n_mels, frames)
        batch["audio"] = torch.randn(shape, generator=generator)
        batch["audio_length"] = torch.randint(1, shape[-1] + 1, (size,), generator=generator)
    return batch


def captions(spec: TextSpec, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids [size, L] and mask [size, L]: bos, 1 to L - 4 words, eos, so that at least two positions are padding everywhere."""
    length = spec.context_length
    words = torch.randint(1, length - 3, (size, 1), generator=generator)  # [size, 1]
    position = torch.arange(length)  # [L]
    text = torch.randint(WORDS.start, WORDS.stop, (size, length), generator=generator)
    text[:, 0] = BOS
    text = text.masked_fill(position == words + 1, EOS).masked_fill(position > words + 1, PAD)
    return text, position <= words + 1


def optimizer_for(model: nn.Module, lr: float = 1e-3) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], first: int = 0, steps: int | None = None
) -> list[float]:
    """One step on each batch, as the trainer takes them: first, first + 1, ... of `steps`. The sum of the losses at each."""
    sums = []
    for step, batch in enumerate(batches, start=first):
        progress = Progress(step, steps or len(batches))
        if hasattr(model, "before_step"):
            model.before_step(progress)
        loss = torch.stack(list(model(batch, progress).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(model, "after_step"):
            model.after_step()
        sums.append(loss.item())
    return sums


def losses_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return model(batch, Progress(0, 10))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
