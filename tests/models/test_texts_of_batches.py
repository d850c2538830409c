"""The contract's batches have the texts, targets and pictures that the loaders yield: fields, shapes, dtypes, what they hold."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from contract import BOS, EOS, MASK, PAD, make_batch, texts_of
from PIL import Image

from vlpfast.data import ShardWriter, make_loader, train_tokenizer
from vlpfast.types import ON_HOST, Batch, DataSpec, ImageSpec, MaskSpec, TargetSpec, TextSpec, ViewSpec

SIZE = 5
SPECS = {
    "text": DataSpec(None, TextSpec(24)),
    "masked": DataSpec(None, TextSpec(24, mask=MaskSpec(0.4))),
    "texts": DataSpec(
        None,
        None,
        texts={
            "a": TextSpec(24, ["{qa.question}"], answer=["{qa.answer}"]),
            "b": TextSpec(20, ["{qa.answer}"], every=True, drop="start"),
            "c": TextSpec(24, ["{qa.question}"], answer=["{qa.answer}"], every=True),
            "d": TextSpec(24, ["{qa.question}"], mask=MaskSpec(0.4, words=True, exact=True), every=True),
        },
    ),
    "targets": DataSpec(
        None,
        None,
        targets={
            "label": TargetSpec(classes=["red", "blue"]),
            "n": TargetSpec("n"),
            "x": TargetSpec("x", "number"),
            "box": TargetSpec("box", "vector"),
        },
    ),
    "two pictures": DataSpec(
        ImageSpec(16, pictures=2, views=[ViewSpec(2)], local_views=[ViewSpec(3)], local_size=8),
        TextSpec(24),
        texts={"s": TextSpec(20, ["{label} {label}"])},
        targets={"label": TargetSpec(classes=["red", "blue"])},
    ),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("all")
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(picture, "JPEG")
    with ShardWriter(folder, "x") as writer:
        for i in range(12):
            qa = [{"question": f"what is in picture {i}", "answer": "a red dog", "weight": 0.5}] * (1 + i % 3)
            record = {"qa": qa, "label": ["red", "blue"][i % 2], "n": i % 5, "x": i / 7, "box": [1, 2, 3, 4]}
            members = {"0.jpg": picture.getvalue(), "1.jpg": picture.getvalue(), "txt": b"a red dog in a picture"}
            writer.write(f"k{i}", members | {"json": json.dumps(record).encode()})
    return str(folder)


def described(batch: Batch, spec: DataSpec) -> dict[str, object]:
    """Of rows as many as there are, the number is left out."""
    rows = tuple(name for name, text in texts_of(spec).items() if text.every)
    fields = {key: value for key, value in batch.items() if key not in ON_HOST | {"key", "crop_local"}}
    ragged = {key for key in fields for name in rows if key == name or key.startswith(f"{name}_")}
    return {key: (list(value.shape[1:] if key in ragged else value.shape), value.dtype) for key, value in fields.items()}


@pytest.mark.parametrize("name", SPECS)
def test_batches_are_as_loaders_yield_them(shards: str, name: str) -> None:
    spec = SPECS[name]
    tokenizer = train_tokenizer(["what is in picture a red dog"] * 3, 300, mask=True)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (PAD, BOS, EOS, MASK)
    loader = make_loader(shards, spec, tokenizer, SIZE, train=True, backend="plain", threads=1)
    batch = next(iter(loader))
    loader.close()
    made = make_batch(spec, SIZE)
    assert described(made, spec) == described(batch, spec)
    for of in (made, batch):
        for text, about in texts_of(spec).items():
            ids, mask = of[text], of[f"{text}_mask"]
            assert (ids[:, 0] == BOS).all() and (ids[~mask] == PAD).all() and mask.any(1).all()
            assert ((ids == EOS).sum(1) == 1).all()
            if about.every:
                owner = of[f"{text}_of"]
                assert owner.unique().tolist() == list(range(SIZE)) and (owner.diff() >= 0).all()
                assert (of[f"{text}_weight"] >= 0).all()
            if about.mask is not None or about.answer:
                labels = of[f"{text}_labels"]
                asked = labels != -100
                assert torch.equal(labels[asked], ids[asked]) and asked.any() and not (asked & ~mask).any()
                assert about.mask is None or torch.equal(of[f"{text}_masked"][~asked], ids[~asked])
