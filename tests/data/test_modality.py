import io
import itertools
import json
import sys
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vlpfast.data import ShardWriter, make_loader
from vlpfast.data import loader as loader_module
from vlpfast.data.order import epoch_order, uniform
from vlpfast.data.pictures import DamagedBatch, DamagedSample
from vlpfast.types import DataSpec, ImageSpec, TextSpec, UserError


@dataclass
class NumberSpec:
    refused: bool = False
    fails_late: list[int] = field(default_factory=list)  # numbers that turn out damaged when they are received


class NumberModality:
    """A file with a number in it. Keeps what it was asked, for the tests."""

    members = ("num", "number")
    made: list["NumberModality"] = []  # noqa: RUF012

    def __init__(self, spec, threads, batch_size, device):
        if spec.refused:
            raise UserError("numbers: refused")
        self.spec, self.options, self.batches, self.events = spec, (threads, batch_size, device), [], []
        self.made.append(self)

    def inspect(self, content, record):
        if content is None:
            raise DamagedSample("no number")
        text = content.tobytes()
        if not text.isdigit():
            raise DamagedSample(f"not a number: {text!r}")
        return int(text)

    def submit(self, contents, infos, records, draws):
        assert [int(content.tobytes()) for content in contents] == infos
        assert [record["number"] for record in records] == infos
        assert threading.current_thread().name.startswith("vlpfast-loader")
        self.batches.append((infos, draws))
        noise = uniform(draws.seed, draws.epoch, draws.index, 9) if draws.train else np.zeros(len(infos))
        return {"noise": torch.from_numpy(noise)}

    def receive(self):
        infos, _ = self.batches.pop(0)
        late = {place: f"number {n} fails late" for place, n in enumerate(infos) if n in self.spec.fails_late}
        if late:
            raise DamagedBatch(late)
        return {"number": torch.tensor(infos)}

    def reset(self):
        self.batches.clear()
        self.events.append("reset")

    def close(self):
        self.events.append("close")


@dataclass
class WithNumbers(DataSpec):
    number: NumberSpec | None = field(default_factory=NumberSpec)


class Lengths:
    vocab_size, pad_id, bos_id, eos_id = 300, 0, 1, 2

    def encode(self, texts, context_length):
        ids = torch.tensor([[len(text)] * context_length for text in texts])
        return ids, ids > 0


@pytest.fixture
def numbers(monkeypatch):
    monkeypatch.setitem(loader_module._MODALITIES, "number", "numbers_for_this_test:NumberModality")
    monkeypatch.setitem(sys.modules, "numbers_for_this_test", SimpleNamespace(NumberModality=NumberModality))
    NumberModality.made.clear()
    return NumberModality.made


def png(level, cut=False):
    stream = io.BytesIO()
    Image.fromarray(np.full((12, 12, 3), level, np.uint8)).save(stream, "PNG", compress_level=0)
    return stream.getvalue()[:-200] if cut else stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty samples whose picture, number, text and JSON say which they are. 3 and 13 lack a good number, 5 a whole picture."""
    path = tmp_path_factory.mktemp("numbers")
    with ShardWriter(path, "s", samples_per_shard=10) as writer:
        for i in range(30):
            members = {"png": png(8 * i, cut=i == 5), "json": json.dumps({"number": i}).encode(), "txt": b"x" * i}
            if i == 3:
                members["num"] = b"three"
            elif i != 13:
                members["num" if i % 2 else "number"] = str(i).encode()
            writer.write(f"{i:02d}", members)
    return str(path)


IMAGE = ImageSpec(8, [0.0] * 3, [1.0] * 3)


def check_pairs(batch):
    index = batch["index"]
    assert torch.equal(batch["number"], index)
    assert torch.equal((255 * batch["image"]).round().long(), (8 * index)[:, None, None, None].expand(-1, 3, 8, 8))
    assert torch.equal(batch["text"][:, 0], index)


def test_modalities_side_by_side(numbers, folder):
    spec = WithNumbers(IMAGE, TextSpec(4), number=NumberSpec(fails_late=[8, 20]))
    loader = make_loader(folder, spec, Lengths(), 4, train=True, seed=2, threads=3, backend="plain")
    assert [made.events for made in numbers] == [["close"]]  # made once, so that what it refuses is told at once
    batches = list(itertools.islice(loader, 11))
    bad = {3, 5, 8, 13, 20}
    expected = []
    for epoch in (0, 1):
        good = [i for i in epoch_order(np.array([10, 10, 10]), 2, epoch, 16).tolist() if i not in bad]
        expected += [(epoch, good[at : at + 4]) for at in range(0, len(good) - 3, 4)]
    for batch, (epoch, index) in zip(batches, expected, strict=False):
        assert batch.keys() == {"image", "crop", "number", "noise", "text", "text_mask", "index", "key"}
        assert batch["index"].tolist() == index
        check_pairs(batch)
        assert np.array_equal(batch["noise"].numpy(), uniform(2, epoch, np.array(index), 9))
    reasons = {name[-2:]: reason for name, reason in loader.skipped.items()}
    assert reasons.pop("05") and reasons == {
        "03": "not a number: b'three'",
        "08": "number 8 fails late",
        "13": "no number",
        "20": "number 20 fails late",
    }
    (_, used) = numbers
    assert used.options == (3, 4, torch.device("cpu")) and used.events.count("reset") >= 2 and used.events[-1] == "close"


def test_two_modalities_damaged_in_one_batch(numbers, folder):
    """The picture of 5 and the number 6 are found out together: both are left out, each with its own reason."""
    spec = WithNumbers(IMAGE, None, number=NumberSpec(fails_late=[6]))
    loader = make_loader(folder, spec, None, 4, train=False, backend="plain")
    batches = list(loader)
    assert [i for batch in batches for i in batch["index"].tolist()] == [i for i in range(30) if i not in (3, 5, 6, 13)]
    assert "number 6" in loader.skipped["s-000000.tar:06"] and "number" not in loader.skipped["s-000000.tar:05"]
    assert all((batch["noise"] == 0).all() for batch in batches)
    assert numbers[1].events == ["reset", "close"]


def test_a_modality_alone_and_resuming(numbers, folder):
    spec = WithNumbers(None, None, number=NumberSpec(fails_late=[9]))

    def loader():
        return make_loader(folder, spec, None, 3, train=True)

    first = loader()
    states, batches = [], []
    for batch in itertools.islice(first, 14):
        assert batch.keys() == {"number", "noise", "index", "key"}
        batches.append(batch)
        states.append(json.dumps(first.state_dict()))
    again = loader()
    again.load_state_dict(json.loads(states[3]))
    for batch, expected in zip(itertools.islice(again, 10), batches[4:], strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in ("number", "noise", "index"))


def test_what_a_modality_refuses_is_told_at_once(numbers, folder):
    with pytest.raises(UserError, match="numbers: refused"):
        make_loader(folder, WithNumbers(None, None, number=NumberSpec(refused=True)), None, 3, train=True)
    with pytest.raises(ValueError, match="all modalities are None"):
        make_loader(folder, WithNumbers(None, None, number=None), None, 3, train=True)
    assert not numbers


def test_errors_of_a_modality_reach_the_caller_and_close_the_others(numbers, folder, monkeypatch):
    def fail(self):
        raise ZeroDivisionError("in receive")

    monkeypatch.setattr(NumberModality, "receive", fail)
    with pytest.raises(ZeroDivisionError, match="in receive"):
        next(iter(make_loader(folder, WithNumbers(IMAGE, None), None, 3, train=True, backend="plain")))
    assert numbers[-1].events == ["close"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlpfast")]
