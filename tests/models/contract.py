"""What the contract test knows of each model, and the batches it feeds them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlpfast import models
from vlpfast.types import Batch, DataSpec, ImageSpec, Progress, TakesClasses, TextSpec, ViewSpec, VolumeSpec

PAD, BOS, EOS, MASK, WORDS = 0, 1, 2, 3, range(4, 60)  # the ids of every tokenizer trained here, as the tiny presets expect them
CLASS_NAMES = ["ant", "brown_bear", "cat", "dog with a long tail", "elk"]  # of a TargetSpec that has none of its own
CLASSES = len(CLASS_NAMES)


@dataclass
class Case:
    """A row of the table: what is published of a model, and what its forward must return."""

    published_parameters: int  # of the Config's defaults, without momentum copies
    losses: set[str]
    copies: tuple[str, str] = ("", "")  # beginnings of names: parameters that before_step moves, and those that they follow
    by_heart: float = 0.1  # how far 20 steps on one batch bring the sum of its losses down
    lr: float = 1e-3  # of these steps
    alone: dict[str, Any] = field(default_factory=dict)  # changes of the config for them


COPIES = ("momentum.module.", "online.")
CASES = {
    "clip": Case(published_parameters=151_277_313, losses={"contrastive"}),  # ViT-B/32, the size of OpenAI's release
    # RN50 and 16 vectors; few vectors between towers of random weights that stay as they are learn little by heart
    "coop": Case(published_parameters=102_007_137 + 8_192, losses={"classification"}, by_heart=0.75, lr=1e-2),
    # with FlanT5-XL, as transformers counts its InstructBLIP, whose output layer is tied, and untied. A language model of random
    # weights that stays as it is says little by heart; see test_instructblip for one that has learnt to speak.
    "instructblip": Case(published_parameters=4_022_969_088, losses={"answer"}, by_heart=0.85, lr=3e-3),
    # ALBEF, which TCL takes its network from: 85.8 million parameters of vision, 123.7 million of BERT with its head. The queue
    # holds what the batch was before, which is the batch again: hence the short one, and the bounds of these losses.
    "tcl": Case(209_500_000, {"cma", "imc", "lmi", "itm", "mlm"}, copies=COPIES, by_heart=0.7),
    "tcl_retrieval": Case(209_500_000, {"cma", "imc", "lmi", "itm"}, COPIES, 0.8, 5e-4, {"momentum": 0.0, "queue_size": 8}),
    "tcl_vqa": Case(290_000_000, {"answer"}, copies=COPIES, by_heart=0.5),
    "tcl_nlvr2": Case(259_000_000, {"label"}, copies=COPIES),
    "tcl_assignment": Case(259_000_000, {"assign"}, by_heart=1.2),  # drawn anew at each step: no more than that it holds
    "tcl_entailment": Case(209_500_000, {"label"}, copies=COPIES),
}


class WordTokenizer:
    """A Tokenizer with an id for each word and mark, of its letters; words may share one."""

    vocab_size, bos_id, eos_id, pad_id = WORDS.stop, BOS, EOS, PAD

    def encode(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
        ids = torch.full((len(texts), context_length), PAD)
        for row, text in zip(ids, texts, strict=True):
            words = [WORDS[sum(word.encode()) % len(WORDS)] for word in re.findall(r"\w+|[^\w\s]", text)]
            tokens = [BOS, *words[: context_length - 2], EOS]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, ids != PAD

    def save(self, path: str) -> None:
        raise NotImplementedError


def build(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """The tiny preset, with changes, in training mode, always with the same weights, and with classes if it takes some."""
    model_class = models.get(name)
    torch.manual_seed(seed)
    model = model_class(replace(model_class.Config.tiny(), **changes))
    if isinstance(model, TakesClasses):
        model.set_classes(CLASS_NAMES, WordTokenizer())
    return model


def make_batch(data: DataSpec, size: int, *, seed: int = 0) -> Batch:
    """Random samples of every modality, as a training loader with this DataSpec would yield them: its fields, shapes and dtypes,
    but for `key`, the one that is no tensor. Texts are of random length."""
    known = {"image", "text", "texts", "targets", "video", "audio", "volume", "points"}
    unknown = {field.name for field in fields(data) if getattr(data, field.name)} - known
    assert not unknown, f"make_batch cannot make {unknown}: teach it"
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {"index": torch.arange(size)}
    if data.image is not None:
        batch.update(pictures(data.image, size, generator))
    for name, spec in texts_of(data).items():
        batch |= captions(name, spec, size, generator)
    for name, target in data.targets.items():
        if target.kind == "class":
            batch[name] = torch.randint(len(target.classes) or CLASSES, (size,), generator=generator)
        else:
            batch[name] = torch.rand((size, 4) if target.kind == "vector" else (size,), generator=generator)
    if (video := data.video) is not None:
        batch["video"] = torch.randn(size, video.frames, 3, video.size, video.size, generator=generator)
        batch["frame_times"] = torch.rand(size, video.frames, generator=generator).cumsum(1)
        if video.short_frames:
            batch["short_video"] = torch.randn(size, video.short_frames, 3, video.size, video.size, generator=generator)
            batch["short_times"] = torch.rand(size, video.short_frames, generator=generator).cumsum(1)
        batch["video_crop"] = cuts([size], 2, 1, generator)
    if (audio := data.audio) is not None:
        samples = round(audio.seconds * audio.sample_rate)
        frames = samples // audio.hop + (not audio.drop_last_frame)
        shape = (size, samples) if audio.features == "waveform" else (size, audio.n_mels, frames)
        batch["audio"] = torch.randn(shape, generator=generator)
        batch["audio_length"] = torch.randint(1, shape[-1] + 1, (size,), generator=generator)
    if data.volume is not None:
        batch.update(volumes(data.volume, size, generator))
    if (points := data.points) is not None:
        batch["points"] = torch.randn(size, points.count, 3 + 3 * points.colors, generator=generator)
        if points.colors:
            batch["points"][:, :, 3:] = torch.rand(size, points.count, 3, generator=generator)
        if points.height:
            above = batch["points"][:, :, ["xyz".index(points.up)]]
            batch["points"] = torch.cat([batch["points"], above - above.amin(1, keepdim=True)], 2)
        batch["points_transform"] = torch.eye(3, 4).repeat(size, 1, 1)
    batch["index"] = torch.arange(size)
    return batch


def cuts(shape: list[int], axes: int, flips: int, generator: torch.Generator) -> Tensor:
    """[..., 2 axes + flips] where parts of pictures or volumes begin, how long they are, then 0 or 1 for each flip."""
    begin, extent = torch.rand(2, *shape, axes, generator=generator) / 2
    return torch.cat([begin, extent + 0.01, torch.randint(2, (*shape, flips), generator=generator).float()], -1)


def pictures(spec: ImageSpec, size: int, generator: torch.Generator) -> Batch:
    """The views, or the one view; what lies in them, up to spec.max_boxes objects; the local views."""
    own = [ViewSpec(1, spec.scale, spec.ratio, spec.mirror, spec.augment)]
    views = [view for view in spec.views or own for _ in range(view.count)]
    samples = [size, spec.pictures] if spec.pictures > 1 else [size]
    shape = [*samples, len(views)] if len(views) > 1 else samples
    batch: Batch = {"image": torch.randn(*shape, 3, spec.size, spec.size, generator=generator)}
    batch["crop"] = cuts(shape, 2, 1, generator)
    if any(view.augment.rand_augment for view in views):
        batch["warp"] = torch.eye(2, 3).expand(*shape, 2, 3) + 0.1 * torch.randn(*shape, 2, 3, generator=generator)
    if local := sum(view.count for view in spec.local_views):
        batch["image_local"] = torch.randn(*samples, local, 3, spec.local_size, spec.local_size, generator=generator)
        batch["crop_local"] = cuts([*samples, local], 2, 1, generator)
    if spec.boxes:
        count = torch.randint(spec.max_boxes + 1, (size,), generator=generator).view(size, *[1] * len(shape))  # objects of each
        seen = torch.rand(*shape, spec.max_boxes, generator=generator) < 0.8
        batch["box_mask"] = seen & (torch.arange(spec.max_boxes) < count)
        corner, extent = torch.rand(2, *shape, spec.max_boxes, 2, generator=generator) / 2
        boxes = torch.cat([corner, (corner + extent + 1 / spec.size).clamp(max=1)], -1)
        batch["boxes"] = boxes * batch["box_mask"][..., None]
    if spec.masks:
        x0, y0, x1, y1 = batch["boxes"][..., None].unbind(-2)  # each [B, (V,) N, 1]
        middle = (torch.arange(spec.size) + 0.5) / spec.size  # [S] of each row or column
        rows, columns = (y0 <= middle) & (middle < y1), (x0 <= middle) & (middle < x1)
        batch["masks"] = rows[..., None] & columns[..., None, :]
    return batch


def volumes(spec: VolumeSpec, size: int, generator: torch.Generator) -> Batch:
    """The view, or the slices of it; labels, a tenth of them padding; the local views."""
    channels = len(spec.percentiles or spec.windows) * (2 * spec.neighbours + 1)
    depth, *plane = spec.size
    batch: Batch = {"volume_box": cuts([size], 3, 3, generator)}
    if spec.slices:
        batch["volume"] = torch.rand(size, depth, channels, *plane, generator=generator)
        batch["volume_slices"] = torch.randint(1, 4, (size, depth), generator=generator).cumsum(1) - 1
    else:
        batch["volume"] = torch.rand(size, channels, depth, *plane, generator=generator)
    if spec.labels:
        labels = torch.randint(4, (size, depth, *plane), generator=generator)
        batch["volume_labels"] = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.1, -100)
    if spec.local_views:
        batch["volume_local"] = torch.rand(size, spec.local_views, channels, *spec.local_size, generator=generator)
        batch["volume_local_box"] = cuts([size, spec.local_views], 3, 3, generator)
    return batch


def texts_of(data: DataSpec) -> dict[str, TextSpec]:
    return ({} if data.text is None else {"text": data.text}) | data.texts


def captions(name: str, spec: TextSpec, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Ids [rows, L] and mask [rows, L]: bos, 2 to L - 4 words, eos, so that at least two positions are padding everywhere."""
    fields = {}
    rows = size
    if spec.every:  # one to three rows a sample
        counts = torch.randint(1, 4, (size,), generator=generator)
        fields[f"{name}_of"] = torch.arange(size).repeat_interleave(counts)
        rows = len(fields[f"{name}_of"])
        fields[f"{name}_weight"] = torch.rand(rows, generator=generator)
    length = spec.context_length
    words = torch.randint(2, length - 3, (rows, 1), generator=generator)  # [rows, 1]
    position = torch.arange(length)  # [L]
    text = torch.randint(WORDS.start, WORDS.stop, (rows, length), generator=generator)
    text[:, 0] = BOS
    text = text.masked_fill(position == words + 1, EOS).masked_fill(position > words + 1, PAD)
    mask = position <= words + 1
    fields |= {name: text, f"{name}_mask": mask}
    if spec.mask is not None:
        ordinary = mask & (text >= WORDS.start)
        hidden = ordinary & (torch.rand(text.shape, generator=generator) < 0.3) | ordinary & (position == 1)
        fields[f"{name}_masked"] = text.masked_fill(hidden, MASK)
        fields[f"{name}_labels"] = text.masked_fill(~hidden, -100)
    if spec.answer:  # the second half of the words and eos
        fields[f"{name}_labels"] = text.masked_fill(~mask | (position <= (words + 1) // 2), -100)
    return fields


def pick(batch: Batch, samples: Tensor) -> Batch:
    """The batch of these samples, in this order; texts with any number of rows a sample with the rows of these."""
    ragged = {key.removesuffix("_of"): value for key, value in batch.items() if key.endswith("_of")}
    out: Batch = {}
    for key, value in batch.items():
        owner = next((of for name, of in ragged.items() if key == name or key.startswith(f"{name}_")), None)
        if owner is None:
            out[key] = value[samples]
            continue
        rows = torch.cat([(owner == sample).nonzero().flatten() for sample in samples])
        moved = (owner[rows][:, None] == samples).int().argmax(1)  # the new number of the sample that a row belongs to
        out[key] = moved if key.endswith("_of") else value[rows]
    return out


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


def is_moved(model: nn.Module, name: str, copies: tuple[str, str]) -> bool:
    """Whether steps move a parameter: because it is trained, or because it follows one that is."""
    copy, online = copies
    followed = online + name.removeprefix(copy) if copy and name.startswith(copy) else name
    return model.get_parameter(followed).requires_grad


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
