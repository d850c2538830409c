"""From shards to batches: order, position, damaged samples. What a batch holds is left to texts (texts.py) and modalities
(modality.py)."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlpfast.data.mixture import LOOK_AT, Mixture, check_members, open_sources
from vlpfast.data.modality import Draws, Modality
from vlpfast.data.order import epoch_order
from vlpfast.data.pictures import DamagedBatch, DamagedSample
from vlpfast.data.position import EpochCourse, Position, PureCourse, merge_positions
from vlpfast.data.shards import ShardSet
from vlpfast.data.subset import Subset
from vlpfast.data.texts import Texts
from vlpfast.types import Batch, DataSpec, Loader, Tokenizer, UserError

_log = logging.getLogger(__name__)
_MODALITIES = {  # field of DataSpec -> who makes it, loaded when it is asked for
    "image": "vlpfast.data.images:ImageModality",
    "video": "vlpfast.data.video:VideoModality",
    "audio": "vlpfast.data.audio:AudioModality",
    "volume": "vlpfast.data.volumes:VolumeModality",
    "points": "vlpfast.data.points:PointsModality",
}


@dataclass
class Sample:
    index: int
    texts: Any  # what its texts are made from: an Info, or a document (packing.py)
    meta: dict[str, Any]  # the JSON; {} if there is none or nobody asked for it
    contents: dict[str, np.ndarray]  # modality -> the member's bytes
    infos: dict[str, Any]  # modality -> what its inspect() told


@dataclass
class Plan:
    """A batch before its modalities are received: everything that is decided on the host."""

    start: Position
    end: Position
    samples: list[Sample]
    tickets: np.ndarray  # int64 [B] what random choices are made from (mixture.py)
    left_out: list[int]  # damaged samples between start and end
    batch: Batch


def make_loader(
    patterns: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    spec: DataSpec,
    tokenizer: Tokenizer | Mapping[str, Tokenizer] | None,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    threads: int = 2,
    window: int = 16,
    ahead: int = 2,
    with_meta: bool = False,
    weights: Mapping[str, float] | str | None = None,
    pure_batches: bool = False,
    templates: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    answers: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    subset: Sequence[int] | np.ndarray | None = None,
) -> Loader:
    """Batches from WebDataset shards.

    Training: endless; every epoch in a new order (order.py), of which each of `world_size` ranks takes as many samples; an
    incomplete last batch is dropped: at most world_size * batch_size - 1 samples an epoch. Evaluation: one pass in order for each
    iteration, the last batch short; the ranks' shares cover each sample once. The same seed gives the same samples, crops and
    order for every back end, device and number of threads. Ranks share samples, not shards: there may be fewer shards.

    Several sources: an epoch is as many samples as all of them have, divided by the weights to the sample, in random order. A
    source goes on from epoch to epoch where it stood, in a new order after each pass, so a small one with a large weight
    repeats. Batch["source"] numbers them in their order. pure_batches: each global batch (world_size * batch_size samples) is of
    one source; the weights then divide an epoch's batches, and no sample is dropped.

    A sample that lacks a modality, with a picture that PIL cannot decode or without what a text or target is made from is left
    out, logged and kept in `skipped`; the next one of the order takes its place. The caption is the member `txt`, or "caption" in
    the member `json`; all other fields are the JSON's.

    With spec.documents a batch is `batch_size` rows of packed documents instead, of any number of samples: see DocumentLoader in
    packing.py.

    patterns: shards as ShardSet takes them, or those of each source by its name. weights: share of the samples by source, of any
    sum; "sqrt": in proportion to the square roots of the sources' sizes; None: to the sizes. templates, answers: by source and
    text, in place of those of the TextSpec. subset: positions of the samples that count among all samples of the shards, which
    are then numbered anew; None: all. tokenizer: or several by name; None if there are no texts. backend: "dali", "plain", or
    "auto", which is DALI where it is installed (pictures alone). device: where the batch lies, but for what Batch says lies on
    the CPU ("cuda:1" also decodes there with DALI). window: shards that are shuffled together. ahead: batches that wait for the
    caller, and as many more, less one, that are being decoded: memory against stalls. with_meta: adds Batch["meta"], the
    sample's json member ({} if it has none).
    """
    for name, value in (("batch_size", batch_size), ("threads", threads), ("window", window), ("ahead", ahead)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 .. world_size - 1 = {world_size - 1}, got {rank}")
    if not any(getattr(spec, field.name) for field in fields(spec)):
        raise ValueError("spec: all modalities are None, there is nothing to load")
    if not isinstance(patterns, Mapping) and (weights or pure_batches or templates or answers):
        raise ValueError("weights, pure_batches, templates and answers need sources: expected patterns by name")
    names = list(patterns) if isinstance(patterns, Mapping) else []
    if unknown := {*(templates or {}), *(answers or {})} - set(names):
        raise ValueError(f"templates, answers: expected those of sources, got {min(unknown)!r}")
    if not train and (weights or pure_batches):
        raise ValueError("weights and pure_batches are for training: evaluation makes one pass in order")
    if backend not in ("auto", "dali", "plain"):
        raise UserError(f'loader: expected "auto", "dali" or "plain", got {backend!r}')
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    tokenizers = tokenizer if isinstance(tokenizer, Mapping) else {"": tokenizer}
    packing = None
    if spec.documents is not None:
        packing = importlib.import_module("vlpfast.data.packing")
        packing.check_documents(spec, tokenizers.get(spec.documents.tokenizer))
        if pure_batches:
            raise UserError("pure_batches: a batch of documents is of any number of samples, so it cannot be of one source each")
    own = [[(of or {}).get(name, {}) for name in names if templates or answers] for of in (templates, answers)]
    texts = Texts(spec, tokenizers, *own)
    modalities = _modalities(spec, threads, batch_size, device, backend)
    members = {}
    for name, make in modalities.items():
        modality = make()
        members[name] = modality.members
        modality.close()  # a spec that is refused, or a package that is missing, is told before the first batch
    mixture = None
    if isinstance(patterns, Mapping):
        shards, mixture = open_sources(patterns, weights or {}, threads=threads, subset=subset)
        members = {"documents": ("txt", "json")} if packing is not None else members
        check_members(shards, mixture, [members | texts.members(source) for source in range(len(names))])
    else:
        shards = ShardSet(patterns, threads=threads)
        shards = shards if subset is None else Subset(shards, subset)
    if texts.captions or texts.json:
        _look(texts, shards, mixture)
    if train and packing is None and len(shards) // world_size < batch_size:
        raise UserError(
            f"{len(shards)} samples in {len(shards.shards)} shards are fewer than one global batch of {world_size * batch_size}"
            + (f" ({world_size} ranks of {batch_size})" if world_size > 1 else "")
        )
    if pure_batches:
        course = PureCourse(mixture, seed, window, rank, world_size, batch_size)
    elif mixture is not None and train:
        mixture.quotas(mixture.total)  # a source that gets nothing is told now
        course = EpochCourse(lambda epoch: mixture.epoch_order(seed, epoch, window), len(shards), rank, world_size, equal=True)
    else:
        sizes = shards.shard_sizes
        order = (lambda epoch: epoch_order(sizes, seed, epoch, window)) if train else (lambda epoch: np.arange(len(shards)))
        course = EpochCourse(order, len(shards), rank, world_size, equal=train)
    identity = {
        "fingerprint": shards.fingerprint(),
        "seed": seed,
        "window": window,
        "samples": len(shards),
        "sources": [[name, size] for name, size in zip(mixture.names, mixture.sizes, strict=True)]
        if mixture is not None
        else None,
        "weights": mixture.weights if mixture is not None else None,
        "pure_batches": pure_batches,
        "world_size": world_size,
        "rank": rank,
    }
    made = (shards, mixture, course, identity, spec, texts, batch_size, modalities, train, seed, device, ahead, with_meta)
    if packing is not None:
        packed = {"documents": spec.documents, "image": spec.image, "tokenizer": tokenizers[spec.documents.tokenizer]}
        return packing.DocumentLoader(*made, **packed)
    return ShardLoader(*made)


def _modalities(
    spec: DataSpec, threads: int, batch_size: int, device: torch.device, backend: str
) -> dict[str, Callable[[], Modality]]:
    """Field name -> what makes the modality; one iteration makes it and closes it."""
    makers = {}
    for field in fields(spec):
        if field.name in _MODALITIES and (options := getattr(spec, field.name)) is not None:
            module, _, name = _MODALITIES[field.name].partition(":")
            made = partial(getattr(importlib.import_module(module), name), options, threads, batch_size, device)
            makers[field.name] = partial(made, _choose(backend)) if field.name == "image" else made
    return makers


@cache
def _choose(backend: str) -> str:
    """Cached, so that what "auto" came to is said once."""
    if backend == "plain":
        return backend
    try:
        importlib.import_module("vlpfast.data.dali")
    except ImportError as error:
        if backend == "dali":
            raise UserError(f"the DALI loader needs nvidia-dali: pip install vlpfast[dali] ({error})") from error
        _log.warning("DALI is not installed (pip install vlpfast[dali]): pictures are decoded with PIL, slower")
        return "plain"
    if backend == "auto":
        _log.info("pictures are decoded with DALI")
    return "dali"


class ShardLoader:
    """See make_loader. One iteration at a time: a new one ends the one before.

    A training loader goes on where it stands. An evaluation loader starts from the beginning with every iteration, except
    the first after load_state_dict, which goes on from there. A thread of its own works ahead while an iteration is alive;
    close(), or dropping the iterator, ends it.
    """

    def __init__(
        self,
        shards: ShardSet,
        mixture: Mixture | None,
        course: EpochCourse | PureCourse,
        identity: dict[str, Any],
        spec: DataSpec,
        texts: Texts,
        batch_size: int,
        modalities: dict[str, Callable[[], Modality]],
        train: bool,
        seed: int,
        device: torch.device,
        ahead: int,
        with_meta: bool,
    ):
        self.batch_size = batch_size
        self.sources = list(mixture.names) if mixture is not None else []  # what Batch["source"] numbers
        self.skipped: dict[str, str] = {}  # shard.tar:key of each damaged sample met so far -> what was wrong
        self._shards, self._mixture, self._course, self._identity = shards, mixture, course, identity
        self._texts, self._makers = texts, modalities
        self._train, self._seed, self._device, self._ahead, self._with_meta = train, seed, device, ahead, with_meta
        boxes = spec.image is not None and spec.image.boxes != ""
        self._wants_json = with_meta or texts.json or boxes or bool(modalities.keys() - {"image"})
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._position = course.start()
        self._loaded = False  # a position was loaded that the next iteration starts from
        self._damaged: dict[int, str] = {}  # known to the thread that works ahead
        self._left_out_last: list[int] = []  # damaged samples behind the last batch of an evaluation pass
        self._iteration: Callable[[], Any] = lambda: None  # weak reference

    def __len__(self) -> int:
        return self._course.batches(self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        iteration = self._iterate()
        self._iteration = weakref.ref(iteration)
        return iteration

    def state_dict(self) -> dict[str, Any]:
        position = {**self._position._asdict(), "remainders": self._course.remainders(self._position)}
        return {**self._identity, **position, "skipped": dict(self.skipped)}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """state: one that this rank saved, or those of all ranks in their order, whatever their number: with as many ranks as now
        each takes its own, else all of them go on together where those stopped (position.merge_positions). The batch size may be
        another (what a rank has left out of an epoch's last batch, at the old size, stays left out if it takes its own).

        Raises UserError if the position was saved for other data, sources, seed or window, or one alone by another rank.
        """
        if not isinstance(state, Mapping):
            same = len(state) == self._identity["world_size"]
            state = state[self._identity["rank"]] if same else merge_positions(state)
        for name, here in self._identity.items():
            if state[name] != here and not (name in ("world_size", "rank") and state[name] is None):  # None: merged
                raise UserError(f"the data position was saved with {name} {state[name]!r}, this run has {here!r}")
        self.close()
        self._course.restore(state["remainders"])
        self._position = Position(**{name: state[name] for name in Position._fields})
        self._loaded = True
        self._damaged = {}
        self.skipped = dict(state["skipped"])

    def close(self) -> None:
        iteration = self._iteration()
        if iteration is not None:
            iteration.close()

    def _iterate(self) -> Iterator[Batch]:
        if not self._train and not self._loaded:
            self._position = self._course.start()
        self._loaded, self._left_out_last = False, []
        produced = self._produce(self._position)
        pool = ThreadPoolExecutor(1, thread_name_prefix="vlpfast-loader")
        try:
            waiting = deque(pool.submit(next, produced, None) for _ in range(self._ahead))
            while (plan := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(next, produced, None))
                self._position = plan.end
                self._note(plan.left_out)
                if self._stream is not None:
                    for value in plan.batch.values():
                        if isinstance(value, Tensor) and value.is_cuda:
                            value.record_stream(torch.cuda.current_stream(self._device))
                handed_out = [plan.batch]
                del plan  # a large batch is not to be held here while the caller waits for the next
                yield handed_out.pop()
            self._note(self._left_out_last)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            produced.close()

    def _note(self, left_out: list[int]) -> None:
        for index in left_out:
            if (name := self._shards.name(index)) not in self.skipped:
                self.skipped[name] = self._damaged[index]
                _log.warning("left out %s: %s", name, self._damaged[index])

    def _produce(self, position: Position) -> Iterator[Plan]:
        """Plans with whole batches, from `position` on; runs in the thread that works ahead."""
        modalities = {}
        with contextlib.ExitStack() as stack:
            for name, make in self._makers.items():
                modalities[name] = stack.enter_context(contextlib.closing(make()))
            self._texts.reset()
            plans: deque[Plan] = deque()
            while True:
                while len(plans) < self._ahead and (plan := self._plan(modalities, position)) is not None:
                    self._submit(modalities, plan)
                    plans.append(plan)
                    position = plan.end
                if not plans:
                    return
                plan = plans.popleft()
                with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                    reasons: dict[int, str] = {}
                    received: dict[str, Tensor] = {}
                    for part in (self._texts, *modalities.values()):
                        try:
                            received |= part.receive()
                        except DamagedBatch as error:
                            reasons = error.reasons | reasons
                    if reasons:
                        for place, reason in reasons.items():
                            self._damaged[plan.samples[place].index] = reason
                        for part in (self._texts, *modalities.values()):
                            part.reset()
                        plans.clear()
                        position = plan.start
                        continue
                    plan.batch |= {name: value.to(self._device) for name, value in received.items()}
                if self._stream is not None:
                    self._stream.synchronize()
                yield plan

    def _submit(self, modalities: dict[str, Modality], plan: Plan) -> None:
        draws = Draws(self._seed, plan.end.epoch, plan.tickets, self._train)
        records = [sample.meta for sample in plan.samples]
        self._texts.submit([sample.texts for sample in plan.samples], draws)
        for name, modality in modalities.items():
            contents, infos = ([getattr(sample, of)[name] for sample in plan.samples] for of in ("contents", "infos"))
            plan.batch |= modality.submit(contents, infos, records, draws)

    # --- planning -----------------------------------------------------------------------------------------------------

    def _plan(self, modalities: dict[str, Modality], start: Position) -> Plan | None:
        """The next batch from `start` on; None at the end of an evaluation pass. What it holds does not depend on when
        damage is found.
        """
        position = start
        left_out: list[int] = []
        while True:
            begun, seen = position, 0
            samples: list[Sample] = []
            tickets: list[int] = []
            # The limit is met only where sources do not end, by one without enough whole samples for a batch.
            while (missing := self.batch_size - len(samples)) and seen <= len(self._shards) + self.batch_size:
                taken, position = self._course.take(position, missing)
                if not len(taken):
                    break
                seen += len(taken)
                indices = (taken % len(self._shards)).tolist()
                self._damaged |= {index: problem for index in indices if (problem := self._shards.problem(index))}
                samples += self._read(modalities, [index for index in indices if index not in self._damaged])
                good = [index not in self._damaged for index in indices]
                tickets += taken[good].tolist()
                left_out += [index for index in indices if index in self._damaged]
            if not missing or (samples and not self._train):
                end = self._course.finished(position)
                plan = self._assemble(Plan(start, end, samples, np.array(tickets), left_out, {}))
                if self._mixture is not None:
                    plan.batch["source"] = torch.from_numpy(self._mixture.source_of(plan.batch["index"].numpy()))
                return plan
            if seen and self._course.untouched(begun):
                reasons = "; ".join(f"{self._shards.name(index)}: {self._damaged[index]}" for index in left_out[:3])
                raise UserError(
                    f"too few samples can be used: {len(left_out)} of this rank's {seen} are damaged, "
                    f"a batch takes {self.batch_size if self._train else 'at least 1'} ({reasons})"
                )
            if not self._train:
                self._left_out_last = left_out
                return None
            position = self._course.next_epoch(begun)

    def _read(self, modalities: dict[str, Modality], indices: list[int]) -> list[Sample]:
        """Those of the samples that can be used, as far as can be told without decoding; the others are noted in _damaged."""
        members = {name: _contents(self._shards, indices, modality) for name, modality in modalities.items()}
        captioned = self._texts.captions
        captions = self._shards.read(indices, ("txt",)) if captioned else [None] * len(indices)
        sources = self._mixture.source_of(np.array(indices, np.int64)) if self._mixture is not None else [0] * len(indices)
        with_json = [place for place, text in enumerate(captions) if self._wants_json or (captioned and text is None)]
        records = dict(zip(with_json, self._shards.read([indices[place] for place in with_json], ("json",)), strict=True))
        samples = []
        for place, index in enumerate(indices):
            contents = {name: column[place] for name, column in members.items()}
            try:
                # Found before this run was resumed, perhaps by other draws.
                if (name := self._shards.name(index)) in self.skipped:
                    raise DamagedSample(self.skipped[name])
                record = parse_json(records.get(place))
                infos = {name: modality.inspect(contents[name], record) for name, modality in modalities.items()}
                said = self._texts.inspect(captions[place], record, int(sources[place]))
            except DamagedSample as error:
                self._damaged[index] = str(error)
            else:
                samples.append(Sample(index, said, record, contents, infos))
        return samples

    def _assemble(self, plan: Plan) -> Plan:
        index = np.array([sample.index for sample in plan.samples])
        batch: Batch = {"index": torch.from_numpy(index), "key": [self._shards.key(sample.index) for sample in plan.samples]}
        if self._with_meta:
            batch["meta"] = [sample.meta for sample in plan.samples]
        plan.batch = batch
        return plan


def parse_json(content: np.ndarray | None) -> dict[str, Any]:
    """The member json of a sample, {} for None. Raises DamagedSample."""
    if content is None:
        return {}
    try:
        record = json.loads(content.tobytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one; brackets within brackets without end
        raise DamagedSample(f"the json member cannot be parsed: {error}") from error
    if not isinstance(record, dict):
        raise DamagedSample(f"the json member is a {type(record).__name__}, expected an object")
    return record


def _look(texts: Texts, shards: ShardSet, mixture: Mixture | None) -> None:
    """At the first samples: a warning, hours before the end of an epoch, if none of them has what texts and targets name."""
    first = range(min(len(shards), LOOK_AT))
    records = read_records(shards, first)
    texts.targets.measure(records)
    sources = mixture.source_of(np.array(first)) if mixture is not None else [0] * len(first)
    captions = shards.read(first, ("txt",)) if texts.captions else [None] * len(first)
    reasons = []
    for caption, record, source in zip(captions, records, sources, strict=True):
        try:
            texts.inspect(caption, record, int(source))
        except DamagedSample as error:
            reasons.append(str(error))
    if len(reasons) == len(first):
        _log.warning("none of the first %d samples can be used: %s", len(first), reasons[0])


def read_records(shards: ShardSet, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
    """The JSON of samples, {} where there is none that can be read."""
    records = []
    for content in shards.read(indices, ("json",)):
        try:
            records.append(parse_json(content))
        except DamagedSample:
            records.append({})
    return records


def _contents(shards: ShardSet, indices: list[int], modality: Modality) -> list[Any]:
    """For each sample the member that the modality is made from, or a list of several."""
    groups = getattr(modality, "groups", None)
    if groups is None:
        return shards.read(indices, modality.members)
    return [list(of) for of in zip(*(shards.read(indices, group) for group in groups), strict=True)]
