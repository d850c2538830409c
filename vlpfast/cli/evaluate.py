"""What is measured of a model: everything that it can do (protocols of types.py) and that the held-out data can tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlpfast.cli.assemble import ClassSource, Sources, data_spec, loader_spec
from vlpfast.data import ShardSet, make_loader
from vlpfast.data.subset import Subset
from vlpfast.data.templates import leaves, parse_template, resolve
from vlpfast.data.texts import texts_of
from vlpfast.evaluation.answers import (
    Answered,
    answer_metrics,
    choose_answers,
    classification_metrics,
    classify,
    write_texts,
    written_metrics,
)
from vlpfast.evaluation.contact_sheet import Classified, Pairs
from vlpfast.evaluation.features import Collected, encode_images, encode_pairs
from vlpfast.evaluation.rerank import encode_states, two_stage_retrieval
from vlpfast.evaluation.retrieval import retrieval
from vlpfast.evaluation.zero_shot import class_embeddings, zero_shot
from vlpfast.training.config import RunConfig
from vlpfast.types import (
    Answers,
    Classifies,
    DataSpec,
    EncodesImages,
    EncodesTexts,
    Generates,
    Loader,
    ScoresPairs,
    TakesClasses,
    TextSpec,
    Tokenizer,
    UserError,
)

Progressed = Callable[[int, int], None] | None


@dataclasses.dataclass
class Evaluation:
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # text_to_image_R@1, zero_shot_top1, ... as fractions
    pairs: Pairs | None = None
    classified: Classified | None = None
    answered: dict[str, Answered] = dataclasses.field(default_factory=dict)  # task of the report -> what was answered

    def sheets(self) -> dict[str, Any]:
        """For write_report."""
        return {"pairs": self.pairs, "zero_shot": self.classified, "answered": self.answered}


def evaluate(
    config: RunConfig,
    model: nn.Module,
    tokenizers: Mapping[str, Tokenizer],
    sources: Sources,
    device: torch.device,
    progress: Progressed = None,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> Evaluation:
    """Retrieval over the held-out pairs, reordered where the model scores pairs; zero-shot classification where classes are
    known; classification of the model's own target or classes; answers chosen from a list; texts written.

    progress(batches done, batches in all) is called during each pass. Of several ranks each works on its share, and all have the
    result. UserError: there is nothing to evaluate."""
    if not sources.heldout:
        raise UserError("data.heldout: nothing to evaluate, expected patterns of tar files")
    settings, found = config.evaluation, Evaluation()
    spec, _ = loader_spec(config, dataclasses.replace(config.data, shots=0, classes="all"), sources)

    def loader(
        patterns: list[str],
        wanted: DataSpec = spec,
        *,
        subset: np.ndarray | None = None,
        with_meta: bool = False,
        whole: bool = False,
    ) -> Loader:
        share = {"rank": 0, "world_size": 1} if whole else {"rank": rank, "world_size": ranks}
        options = {"backend": config.data.loader, "device": device, "threads": config.data.threads, "with_meta": with_meta}
        return make_loader(patterns, wanted, tokenizers, settings.batch_size, train=False, subset=subset, **options, **share)

    def over(make: Callable[[Loader], Any], *arguments: Any, **options: Any) -> Any:
        batches = loader(*arguments, **options)
        try:
            return make(batches)
        finally:
            batches.close()

    encodes = isinstance(model, EncodesImages) and isinstance(model, EncodesTexts)
    pictures = dataclasses.replace(spec, text=None, texts={}, targets={})
    if encodes and spec.text is not None and spec.image is not None:
        pairs = dataclasses.replace(pictures, text=dataclasses.replace(spec.text, mask=None))
        features = over(lambda batches: encode_pairs(model, batches, device, progress, ranks), sources.heldout, pairs)
        ranked = retrieval(features.image, features.text)
        found.metrics |= {**ranked.metrics, "retrieval_samples": len(features)}
        if isinstance(model, ScoresPairs) and settings.rerank:
            states = over(lambda batches: encode_states(model, batches, device, progress), sources.heldout, pairs, whole=True)
            ranked = two_stage_retrieval(
                model,
                states,
                features.image,
                features.text,
                device,
                candidates=settings.rerank,
                ranks=ranks,
                rank_of=rank,
                progress=progress,
            )
            found.metrics |= {f"reranked_{name}": value for name, value in ranked.metrics.items()}
        found.pairs = Pairs(features, ranked, ShardSet(sources.heldout))
    if (classes := sources.classes) is not None and isinstance(model, TakesClasses):
        model.set_classes(classes.names, tokenizers[""])
        made = over(
            lambda batches: classify(model, batches, device, None, progress, ranks),
            classes.patterns,
            pictures,
            subset=classes.subset,
            with_meta=True,
        )
        labels = torch.tensor([label_of(record, classes, key) for record, key in zip(made.meta, made.keys, strict=True)])
        _classified(found, made, labels, classes.names, [""] * len(labels), _of_classes(classes))
    elif isinstance(model, Classifies):
        for name, target in spec.targets.items():
            if target.kind == "class":
                made = over(
                    lambda batches, name=name: classify(model, batches, device, name, progress, ranks),
                    sources.heldout,
                    with_meta=True,
                )
                shards = ShardSet(sources.heldout)
                _classified(found, made, made.values["labels"], target.classes, _asked(made, spec, shards), shards)
    if classes is not None and encodes and spec.text is not None:
        features = over(
            lambda batches: encode_images(model, batches, device, progress, ranks),
            classes.patterns,
            pictures,
            subset=classes.subset,
            with_meta=True,
        )
        labels = [label_of(record, classes, key) for record, key in zip(features.meta, features.keys, strict=True)]
        tokenizer, length = tokenizers[spec.text.tokenizer], spec.text.context_length
        embedded = class_embeddings(model, tokenizer, classes.names, classes.templates, length, device)
        result = zero_shot(features.image, labels, embedded, classes.names)
        found.metrics |= result.metrics
        found.classified = Classified(features, result, _of_classes(classes))
    if isinstance(model, Answers) and sources.answers:
        length, tokenizer = _answering(spec).context_length, tokenizers[model.writes_with]
        answers, made = over(
            lambda batches: choose_answers(model, batches, device, sources.answers, tokenizer, length, progress, ranks),
            sources.heldout,
            with_meta=True,
        )
        _answered(found, "answers", answer_metrics, answers, made, config, sources)
    if isinstance(model, Generates):
        options = {"max_new_tokens": settings.max_new_tokens, "beams": settings.beams, "length_penalty": settings.length_penalty}
        tokenizer = tokenizers[model.writes_with]
        texts, made = over(
            lambda batches: write_texts(model, batches, device, tokenizer, progress=progress, ranks=ranks, **options),
            sources.heldout,
            with_meta=True,
        )
        _answered(found, "written", written_metrics, texts, made, config, sources)
    if not found.metrics:
        raise UserError(
            f"evaluation: {type(model).__name__} offers nothing that these data can measure; its classes or answers may be "
            "missing (evaluation.class_names, evaluation.answers)"
        )
    return found


def _classified(
    found: Evaluation, made: Collected, labels: Tensor, names: Sequence[str], questions: list[str], shards: ShardSet
) -> None:
    logits, labels = made.values["logits"].cpu(), labels.cpu()
    found.metrics |= classification_metrics(logits, labels)
    named = list(names) or [str(number) for number in range(logits.shape[1])]
    answers = [named[place] for place in logits.argmax(1).tolist()]
    references = [[named[place]] for place in labels.tolist()]
    found.answered["classification"] = Answered(made.index, questions, answers, references, made.skipped, shards)


def _answered(
    found: Evaluation,
    task: str,
    metrics: Callable[[Sequence[str], Sequence[Sequence[str]], str], dict[str, float]],
    answers: list[str],
    made: Collected,
    config: RunConfig,
    sources: Sources,
) -> None:
    spec, shards = data_spec(config), ShardSet(sources.heldout)
    records = _records(made, shards)
    if wanted := config.evaluation.references:
        references = [[text for template in wanted for text in say(record, template)] for record in records]
    else:
        answering = _answering(spec)
        references = [say(record, (answering.answer or answering.templates)[0])[:1] for record in records]
    found.metrics |= metrics(answers, references, task)
    found.answered[task] = Answered(made.index, _asked(made, spec, shards), answers, references, made.skipped, shards)


def _answering(spec: DataSpec) -> TextSpec:
    """The text that says what is right: one with an answer, else the one called "answer", else the caption."""
    texts = texts_of(spec)
    with_answer = [text for text in texts.values() if text.answer]
    text = with_answer[0] if with_answer else texts.get("answer", texts.get("text"))
    if text is None:
        raise UserError(
            "evaluation: the model writes answers, and none of its texts says what is right; see evaluation.references"
        )
    return text


def _asked(made: Collected, spec: DataSpec, shards: ShardSet) -> list[str]:
    """What each sample was asked, for the report: the prompt of a text with an answer, else the first text that is no answer."""
    texts = texts_of(spec)
    with_answer = [text for text in texts.values() if text.answer]
    others = [text for name, text in texts.items() if name != "answer" and text.templates != TextSpec().templates]
    asking = (with_answer + others)[:1]
    if not asking or not asking[0].templates[0].strip():
        return [""] * len(made.keys)
    return [say(record, asking[0].templates[0])[0] for record in _records(made, shards)]


def _records(made: Collected, shards: ShardSet) -> list[dict[str, Any]]:
    """The samples' JSON, with the caption of the member txt where there is one."""
    captions = shards.read(made.index.tolist(), ("txt",))
    return [
        record if text is None else {**record, "caption": text.tobytes().decode()}
        for record, text in zip(made.meta, captions, strict=True)
    ]


def say(record: dict[str, Any], template: str) -> list[str]:
    """What a template (TextSpec) says about a sample; one text for each element of the longest list among its fields."""
    parts = [part if isinstance(part, str) else leaves(resolve(record, part, str)) for part in parse_template(template, {}, "")]
    count = max((len(part) for part in parts if isinstance(part, list)), default=1)
    return ["".join(part if isinstance(part, str) else part[number % len(part)] for part in parts) for number in range(count)]


def _of_classes(classes: ClassSource) -> ShardSet | Subset:
    shards = ShardSet(classes.patterns)
    return shards if classes.subset is None else Subset(shards, classes.subset)


def label_of(record: dict[str, Any], classes: ClassSource, key: str) -> int:
    value = record.get(classes.label_field)
    if isinstance(value, str) and value in classes.names:
        return classes.names.index(value)
    if isinstance(value, int) and 0 <= value - classes.first < len(classes.names):
        return value - classes.first
    raise UserError(
        f"evaluation.label_field: sample {key} has {classes.label_field!r}: {value!r} in its JSON; "
        f"expected one of the {len(classes.names)} class names, or a number from {classes.first} to "
        f"{classes.first + len(classes.names) - 1}"
    )
