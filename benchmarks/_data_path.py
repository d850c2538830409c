"""Samples a second from shards to batches: make_loader's two ways, and torch's DataLoader with Pillow, on the same crops.

The DataLoader stands for what training scripts do (open_clip's webdataset pipeline without its own reader): each of its worker
processes decodes, crops, resizes, normalises and tokenises one sample after the other. It reads with our index, and its crops are
ours, so that order, pixels and words are the same: that is checked on the first batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vlpfast.data import ShardSet, emojiworld, make_loader, train_tokenizer
from vlpfast.data.order import epoch_order
from vlpfast.data.pictures import decode_rgb, picture_size
from vlpfast.data.shards import IMAGE_EXTENSIONS
from vlpfast.data.views import view_rectangles
from vlpfast.types import Batch, DataSpec, Tokenizer

WINDOW = 16
NAMES = ("vlpfast, DALI", "vlpfast, plain", "torch DataLoader, Pillow")


class Pillow(Dataset):
    """The samples of the first epoch, in make_loader's order."""

    def __init__(self, patterns: list[str], spec: DataSpec, tokenizer: Tokenizer, epochs: int) -> None:
        shards = ShardSet(patterns)
        self.order = [(e, int(i)) for e in range(epochs) for i in epoch_order(shards.shard_sizes, 0, e, WINDOW)]
        self.patterns, self.spec, self.tokenizer, self.shards = patterns, spec, tokenizer, None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        if self.shards is None:  # each worker opens its own
            self.shards = ShardSet(self.patterns, threads=1)
        epoch, index = self.order[place]
        picture, text = (self.shards.read([index], names)[0] for names in (IMAGE_EXTENSIONS, ("txt",)))
        spec, content = self.spec.image, picture.tobytes()
        size = np.array([picture_size(content)])
        rectangles, _ = view_rectangles(spec, size, np.array([index]), train=True, seed=0, epoch=epoch)
        view = decode_rgb(content, tuple(rectangles[0].tolist())).resize((spec.size, spec.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).float().div_(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
        ids, _ = self.tokenizer.encode([text.tobytes().decode()], self.spec.text.context_length)
        return {"image": pixels.sub_(mean).div_(std), "text": ids[0], "index": torch.tensor(index)}


def measure(
    spec: DataSpec, batch_size: int, batches: int, scenes: int, repeats: int, device: str, threads: int, cache: Path
) -> list[dict[str, Any]]:
    """One row for each way. Of each round the first two batches, in which the ways start up, do not count."""
    size = max(64, min(1024, spec.image.size * 5 // 4))
    world = emojiworld.World(size=size)
    splits = {"train": replace(emojiworld.default_splits(scenes, 16)["train"])}
    folder = cache / f"emojiworld-bench-{scenes}-{size}"
    patterns = [emojiworld.build(folder, world, splits, workers=threads)["train"]]
    shards = ShardSet(patterns)
    tokenizer = train_tokenizer((text.tobytes().decode() for text in shards.read(range(len(shards)), ("txt",))), 1024)
    epochs = -(-(batches + 2) * batch_size // scenes) + 1

    def ways(name: str) -> Iterator[Batch]:
        if name == NAMES[2]:
            data = Pillow(patterns, spec, tokenizer, epochs)
            for batch in DataLoader(data, batch_size, num_workers=threads, drop_last=True, pin_memory=device == "cuda"):
                yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            return
        backend = "dali" if name == NAMES[0] else "plain"
        loader = make_loader(
            patterns, spec, tokenizer, batch_size, train=True, backend=backend, device=device, threads=threads, window=WINDOW
        )
        try:
            yield from loader
        finally:
            loader.close()

    names = [name for name in NAMES if name != NAMES[0] or find_spec("nvidia.dali")]
    first = {name: next(iter(ways(name))) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            found[name].append(_seconds(ways(name), batches, device))
    base = first[NAMES[1]]
    rows = []
    for name in names:
        batch = first[name]
        same = torch.equal(batch["index"].cpu(), base["index"].cpu()) and torch.equal(batch["text"].cpu(), base["text"].cpu())
        off = float((batch["image"].cpu() - base["image"].cpu()).abs().mean() * np.mean(spec.image.std))
        if not same or off > 0.02:
            raise SystemExit(f"{name}: another batch than {NAMES[1]}'s (pixels are off by {off:.3f} of their range on average)")
        rate = batches * batch_size / min(found[name])
        rows.append(
            {
                "name": name,
                "picture": size,
                "view": spec.image.size,
                "batch": batch_size,
                "samples_per_s": rate,
                "pixels_off": off,
            }
        )
    return rows


def _seconds(way: Iterator[Batch], batches: int, device: str) -> float:
    for number, _ in enumerate(way, start=1):
        if number == 2:
            started = time.perf_counter()
        if number == batches + 2:
            break
    else:
        raise SystemExit("the data are fewer than what is measured on")
    if device == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    way.close()
    return took
