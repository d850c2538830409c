"""contract.make_batch makes what the loaders yield: the same fields, shapes and dtypes for every modality."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from contract import make_batch
from PIL import Image

from vlpfast.data import ShardWriter, make_loader
from vlpfast.data.emojiworld import rle
from vlpfast.data.volume_file import encode_volume
from vlpfast.types import (
    AudioSpec,
    AugmentSpec,
    DataSpec,
    ImageSpec,
    PointsSpec,
    RandAugmentSpec,
    TextSpec,
    VideoSpec,
    ViewSpec,
    VolumeSpec,
)

SIZE = 3  # of a batch


class Bytes:
    """A tokenizer."""

    vocab_size, pad_id, bos_id, eos_id = 300, 0, 1, 2

    def encode(self, texts, context_length):
        ids = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text) + 2] = torch.tensor([1, *text.encode(), 2])
        return ids, ids > 0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four samples with a member of every modality."""
    av = pytest.importorskip("av", reason="waits for the package av")
    soundfile = pytest.importorskip("soundfile", reason="waits for the package soundfile")
    draw = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("all")
    with ShardWriter(folder, "x") as writer:
        for number in range(4):
            picture, sound, clip, cloud = (io.BytesIO() for _ in range(4))
            Image.fromarray(draw.integers(0, 256, (40, 50, 3), np.uint8)).save(picture, "JPEG")
            soundfile.write(sound, draw.uniform(-0.5, 0.5, 16000), 16000, format="FLAC")
            with av.open(clip, "w", format="mp4") as container:
                stream = container.add_stream("mpeg4", rate=10)
                stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
                for level in range(16):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9 * level, np.uint8))))
                container.mux(stream.encode())
            voxels = draw.integers(-500, 500, (10, 12, 14)).astype(np.int16)
            np.save(cloud, draw.uniform(0, 1, (50, 6)).astype(np.float32))
            mask = np.zeros((40, 50), bool)
            mask[5:20, 5:25] = True
            objects = [{"box": [5, 5, 25, 20], "mask": rle.encode(mask)}] * number
            members = {
                "jpg": picture.getvalue(),
                "flac": sound.getvalue(),
                "mp4": clip.getvalue(),
                "vol": encode_volume(voxels, np.eye(4), labels=(voxels > 0).astype(np.uint8)),
                "points.npy": cloud.getvalue(),
                "txt": b"number %d" % number,
                "json": json.dumps({"objects": objects}).encode(),
            }
            writer.write(f"k{number}", members)
    return str(folder)


BOXES = {"boxes": "objects.box", "max_boxes": 5}
MASKS = {**BOXES, "masks": "objects.mask"}
TURNED = AugmentSpec(rand_augment=RandAugmentSpec())
VIEWS = {"views": [ViewSpec(2), ViewSpec(1, augment=TURNED)], "local_views": [ViewSpec(1), ViewSpec(3)], "local_size": 8}
SMALL = {"size": [4, 6, 5]}
SPECS = {
    "picture": DataSpec(ImageSpec(16), None),
    "picture, boxes": DataSpec(ImageSpec(16, **BOXES), None),
    "picture, masks, turned": DataSpec(ImageSpec(16, augment=TURNED, **MASKS), None),
    "views": DataSpec(ImageSpec(16, **VIEWS), None),
    "views, boxes, masks": DataSpec(ImageSpec(16, **VIEWS, **MASKS), None),
    "one view of a list": DataSpec(ImageSpec(16, views=[ViewSpec(1)], local_views=[ViewSpec(1)], **BOXES), None),
    "text": DataSpec(None, TextSpec(12)),
    "video": DataSpec(None, None, video=VideoSpec(4, size=16)),
    "two views of a video": DataSpec(None, None, video=VideoSpec(4, short_frames=2, size=16)),
    "log-mel": DataSpec(None, None, audio=AudioSpec(seconds=0.5, n_mels=20)),
    "log-mel without its last frame": DataSpec(None, None, audio=AudioSpec(seconds=0.5, n_mels=20, drop_last_frame=True)),
    "waveform": DataSpec(None, None, audio=AudioSpec(seconds=0.5, features="waveform")),
    "volume": DataSpec(None, None, volume=VolumeSpec(**SMALL)),
    "volume, windows, labels": DataSpec(None, None, volume=VolumeSpec(**SMALL, windows=[[0, 9], [1, 8]], labels=True)),
    "volume, percentiles, local": DataSpec(
        None, None, volume=VolumeSpec(**SMALL, percentiles=[[1, 99]], labels=True, local_views=2, local_size=[2, 3, 4])
    ),
    "slices": DataSpec(None, None, volume=VolumeSpec(**SMALL, slices=True)),
    "slices, neighbours": DataSpec(
        None, None, volume=VolumeSpec(**SMALL, slices=True, neighbours=1, windows=[[0, 9], [1, 8]], foreground=True)
    ),
    "points": DataSpec(None, None, points=PointsSpec(20)),
    "points, colours": DataSpec(None, None, points=PointsSpec(20, colors=True)),
    "points, height": DataSpec(None, None, points=PointsSpec(20, height=True)),
    "points, colours, height": DataSpec(None, None, points=PointsSpec(20, colors=True, height=True, up="y")),
    "everything": DataSpec(
        ImageSpec(16, **VIEWS, **MASKS),
        TextSpec(12),
        video=VideoSpec(4, size=16),
        audio=AudioSpec(seconds=0.5),
        volume=VolumeSpec(**SMALL, labels=True, local_views=1, local_size=[2, 2, 2]),
        points=PointsSpec(20, colors=True, height=True),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_fields_shapes_and_dtypes_are_those_of_the_loader(shards: str, name: str) -> None:
    spec = SPECS[name]
    loader = make_loader(shards, spec, Bytes(), SIZE, train=True, backend="plain", threads=1)
    batch = next(iter(loader))
    loader.close()
    assert isinstance(batch.pop("key"), list)
    made = make_batch(spec, SIZE)
    described, expected = (
        {name: (tuple(value.shape), value.dtype, value.is_contiguous()) for name, value in each.items()} for each in (made, batch)
    )
    assert described == expected
    assert all(value.isfinite().all() for value in made.values())
    again = make_batch(spec, SIZE)
    assert all(torch.equal(again[name], value) for name, value in made.items())


def test_objects_of_a_made_batch_fit_each_other() -> None:
    batch = make_batch(SPECS["views, boxes, masks"], 50)
    seen, boxes, masks = batch["box_mask"], batch["boxes"], batch["masks"]
    assert 0.2 < seen.float().mean() < 0.6 and (boxes[~seen] == 0).all() and not masks[~seen].any()
    assert (boxes[seen][:, :2] < boxes[seen][:, 2:]).all() and boxes.min() == 0 and boxes.max() <= 1
    area = (boxes[seen][:, 2:] - boxes[seen][:, :2]).prod(1) * 16 * 16  # pixels
    assert masks[seen].any((1, 2)).all() and torch.allclose(masks[seen].sum((1, 2)).float(), area, atol=18, rtol=0)


def test_every_modality_of_a_data_spec_is_compared() -> None:
    everything = SPECS["everything"]
    others = {"texts", "targets", "documents"}  # test_texts_of_batches.py; packed rows are no model's yet
    assert all(getattr(everything, name) for name in DataSpec.__dataclass_fields__.keys() - others)
    for values in ("volume_slices", "volume_labels", "volume_local", "short_video", "warp", "image_local", "masks"):
        assert any(values in make_batch(spec, 1) for spec in SPECS.values())
