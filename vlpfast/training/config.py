"""The configuration of a run: typed dataclasses filled from a YAML file and `key=value` overrides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from vlpfast.types import UserError


@dataclass
class Group:
    """An optimiser group: the parameters whose names match its pattern."""

    lr: float = 1.0  # factor on train.lr
    weight_decay: float | None = None  # null: train.weight_decay
    layer_decay: float | None = None  # null: train.layer_decay


@dataclass
class Stage:
    """A part of a run with its own objectives, trained parameters and data. Patterns are shell patterns on parameter names."""

    steps: int | None = None  # null: train.steps
    mode: str = ""  # handed to the model's set_mode; "": as it was before the stage
    trainable: list[str] = field(default_factory=list)  # only these are trained; empty: all that the model itself does not freeze
    frozen: list[str] = field(default_factory=list)  # these are not
    losses: dict[str, float] = field(default_factory=dict)  # weight by loss name; a loss not named here has weight 1
    groups: dict[str, Group] = field(default_factory=dict)  # pattern -> group; the first that matches counts
    data: dict[str, Any] = field(default_factory=dict)  # what differs from the data section
    train: dict[str, Any] = field(default_factory=dict)  # what differs from the train section, of STAGE_TRAIN
    init_from: str = ""  # weights to start this stage from: a run folder, a checkpoint or a .safetensors file


@dataclass
class Source:
    """One of several sources of training samples."""

    shards: list[str] = field(default_factory=list)  # patterns of tar files
    weight: float | None = None  # share of the samples, of any sum; null, in all sources: as data.weights says
    templates: dict[str, list[str]] = field(
        default_factory=dict
    )  # by text, in place of the model's: {question: ["{qa.question}"]}
    answers: dict[str, list[str]] = field(default_factory=dict)  # likewise what its prompts are answered with


@dataclass
class DataConfig:
    source: Literal["emojiworld", "shards"] = "emojiworld"  # the embedded data, or WebDataset shards of your own
    train: list[str] = field(default_factory=list)  # shards: patterns of tar files, e.g. "data/cc3m-{000..331}.tar"
    mixture: dict[str, Source] = field(default_factory=dict)  # shards: several sources by name, in place of train
    weights: Literal["size", "sqrt"] = "size"  # mixture: shares go by the sources' sizes, or by the square roots of these
    pure_batches: bool = False  # mixture: every batch, over all processes, is of one source
    heldout: list[str] = field(default_factory=list)  # shards: the same for evaluation; empty: no evaluation
    num_scenes: int = 20_000  # emojiworld: training pictures
    num_heldout: int = 1_000  # emojiworld: held-out pictures of two objects (retrieval), and as many of one (zero-shot)
    world: dict[str, Any] = field(default_factory=dict)  # emojiworld: options of its World (seed, size, language, ...)
    cache_dir: str = ".cache/vlpfast"  # emojiworld: where the shards are kept
    shots: int = 0  # training samples of each class (the target "label", or evaluation.label_field), drawn by train.seed; 0: all
    classes: Literal["all", "base", "new"] = "all"  # only the first half of the classes, the larger one; or only the others
    tokenizer: str = ""  # a Hugging Face tokenizer.json or its folder; "": train one on the training texts
    tokenizers: dict[str, str] = field(default_factory=dict)  # the same for each further one that the model has, by name
    loader: Literal["auto", "dali", "plain"] = "auto"
    threads: int = 2
    ahead: int = 2  # batches that are ready before they are asked for, and decoded behind those; 1 where a batch is large
    window: int = 16  # shards whose samples are mixed with one another; all of them: a full shuffle


@dataclass
class TrainConfig:
    run_dir: str = "runs/train"  # everything about the run; starting again with the same folder goes on where it stopped
    steps: int = 1_000
    batch_size: int = 256  # of all ranks together
    micro_batch: int = 0  # samples that each rank encodes at a time, under one loss of the whole batch; 0: all at once
    seed: int = 0
    optimizer: Literal["adamw", "lamb", "lion", "adafactor", "sgd"] = "adamw"
    optimizer_backend: Literal["auto", "torch", "apex"] = "auto"  # adamw, lamb: NVIDIA apex's; auto: where a GPU and apex are
    lr: float = 1e-3
    warmup_steps: int = 100  # linear
    warmup_lr: float | None = None  # where the warm-up starts; null: lr / warmup_steps
    # after the warm-up; cosine_by_epoch: one rate for each epoch, warmup_lr for the first warmup_epochs
    schedule: Literal["cosine", "linear", "polynomial", "steps", "constant", "cosine_by_epoch"] = "cosine"
    warmup_epochs: int = 0  # cosine_by_epoch, in place of warmup_steps
    min_lr: float = 0.0  # where the cosines, linear and polynomial end, and what steps do not fall below
    power: float = 1.0  # polynomial: of the share of the way that is left
    cycle_steps: int = 0  # cosine: begin anew so often (warm restarts); 0: one cosine
    decay_at: list[float] = field(default_factory=list)  # steps: shares of the stage at which the rate falls: [0.67, 0.89]
    decay_every: int = 0  # steps: the rate falls after each so many steps too; 0: only at decay_at
    decay_factor: float = 0.1  # steps: what the rate is multiplied by each time
    layer_decay: float = 1.0  # factor on the rate for each block further from a tower's output; 1: one rate for all
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # adamw, lamb, lion
    eps: float = 1e-6  # adamw, lamb
    momentum: float = 0.9  # sgd
    weight_decay: float = 0.2  # on matrices alone: never on biases, norms and scalars
    clip_grad_norm: float = 1.0  # 0: no clipping
    clip_grad_value: float = 0.0  # each entry of a gradient, after clip_grad_norm; 0: no clipping
    ema_decay: float = 0.0  # evaluate and export an exponential moving average of the weights; 0: the weights themselves
    # auto: bf16 where the hardware multiplies it natively. All but bf16_params, whose forwards hold bf16 copies of the matrices,
    # are autocast over float32 parameters; with fsdp forwards hold the parameters in bf16 or fp16 in every one but fp32
    precision: Literal["auto", "fp32", "bf16", "fp16", "bf16_params"] = "auto"
    loss_scale: float = 65536.0  # fp16: the first
    loss_scale_interval: int = 2_000  # fp16: finite steps after which it is doubled
    device: str = "auto"  # auto: the GPU where there is one
    strategy: Literal["ddp", "fsdp"] = "ddp"  # of many ranks: all of the model on each, or a part of it
    find_unused: bool = False  # ddp: a trained parameter may be without a gradient in some steps, or on some ranks, alone
    activation_checkpointing: bool = False  # recompute each block's activations in the backward
    compile: Literal["none", "block", "step"] = "none"  # torch.compile: each repeated block, or the model's whole forward
    timeout_minutes: float = 10.0  # after which a rank that waits for another gives up
    deterministic: bool = False  # deterministic algorithms on a GPU too: slower, and a resumed run is equal bit for bit there
    checkpoint_every: int = 500  # steps; 0: only at the end
    keep_checkpoints: int = 2
    async_checkpoint: bool | None = None  # written while training goes on, from a copy in host memory; null: on a GPU
    max_nonfinite: int = 10  # steps skipped for a loss or gradient that is not finite before the run stops
    log_seconds: float = 10.0  # between lines where stderr is no terminal
    tensorboard_every: int = 10  # steps; 0: none
    wandb: str = ""  # a project of Weights & Biases that gets every step's numbers; "": none


@dataclass
class EvaluationConfig:
    every: int = 0  # steps; 0: only at the end
    batch_size: int = 256
    zero_shot: bool = True
    rerank: int = 128  # best candidates of each query that a model which reads pairs together puts in order; 0: none
    answers: str = ""  # shards: a text file with one answer a line, from which a model that ranks answers chooses
    references: list[str] = field(default_factory=list)  # templates of all that is right to write; empty: the model's own answer
    max_new_tokens: int = 30  # of a text that is written
    beams: int = 3
    length_penalty: float = 1.0  # of the beams: the sum of log probabilities is divided by length ** this
    class_names: str = ""  # shards: a text file with one class name a line; "": no zero-shot classification
    label_field: str = (
        "label"  # shards: the field of the sample's JSON that holds the class, as its name or its line number from 0
    )
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])  # shards: what a class name is put into


@dataclass
class ModelSection:
    """`model:` of the file, which is flat there: name, preset, and the fields of the model's Config."""

    name: str
    preset: str  # "": the Config's defaults
    config: Any  # the model's Config


@dataclass
class RunConfig:
    model: ModelSection
    data: DataConfig
    train: TrainConfig
    stages: dict[str, Stage]
    evaluation: EvaluationConfig

    def stage_list(self) -> list[tuple[str, Stage]]:
        """Stages in order. A configuration without stages is one stage called "train"."""
        return list(self.stages.items()) or [("train", Stage())]

    def stage_steps(self, stage: Stage) -> int:
        return self.train.steps if stage.steps is None else stage.steps

    def total_steps(self) -> int:
        return sum(self.stage_steps(stage) for _, stage in self.stage_list())


# What may differ when a run is gone on with: how long, how often, where. All else would make it another run.
MAY_CHANGE = (
    "train.run_dir",
    "train.steps",
    "train.micro_batch",
    "train.strategy",
    "train.find_unused",
    "train.activation_checkpointing",
    "train.timeout_minutes",
    "train.device",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.async_checkpoint",
    "train.max_nonfinite",
    "train.log_seconds",
    "train.tensorboard_every",
    "train.wandb",
    "stages.*.steps",
    "data.threads",
    "data.ahead",
    "data.cache_dir",
    "evaluation.*",
)


def load_config(path: str | Path, overrides: Sequence[str], model_class: Callable[[str], type]) -> RunConfig:
    """The run that a YAML file and overrides such as `train.steps=100` describe, checked.

    model_class(name) gives the model's class, whose Config is the schema of the model section.
    UserError: the file cannot be read, a key is unknown, a value has the wrong type or makes no sense.
    """
    sources = [(str(path), _read(path))] + [(f"override {text!r}", _parse_override(text)) for text in overrides]
    model = {"name": "", "preset": ""}
    for source, node in sources:
        section = node.get("model", OmegaConf.create())
        if not isinstance(section, DictConfig):
            raise UserError(f"{source}: model: expected a section with at least a name, got {section!r}")
        for key in model:
            if key in section:
                if not isinstance(section[key], str):
                    raise UserError(f"{source}: model.{key}: expected a string, got {section[key]!r}")
                model[key] = section[key]
    if not model["name"]:
        raise UserError(f"{path}: model.name is missing: expected the name of a model, for example `model: {{name: clip}}`")
    config = _preset(model_class(model["name"]), model["preset"], model["name"])

    # The section is flat in the file, so its schema is the Config with the two names beside its fields.
    section_class = make_dataclass("Model", [("name", str, ""), ("preset", str, "")], bases=(type(config),))
    section = section_class(**{f.name: getattr(config, f.name) for f in fields(config)}, **model)
    sections = [section_class, DataConfig, TrainConfig, dict[str, Stage], EvaluationConfig]
    schema = make_dataclass("Run", zip(("model", "data", "train", "stages", "evaluation"), sections, strict=True))
    merged = OmegaConf.structured(schema(section, DataConfig(), TrainConfig(), {}, EvaluationConfig()))
    for source, node in sources:
        merged = _merge(merged, node, source)
    loaded = _to_object(merged, str(path))
    config = type(config)(**{f.name: getattr(loaded.model, f.name) for f in fields(config)})
    run = RunConfig(ModelSection(**model, config=config), loaded.data, loaded.train, loaded.stages, loaded.evaluation)
    _validate(run)
    return run


def stage_data(config: RunConfig, name: str, stage: Stage) -> DataConfig:
    """The data section as the stage changes it."""
    base = OmegaConf.structured(config.data)
    merged = _merge(base, OmegaConf.create(stage.data), f"stages.{name}.data")
    return _to_object(merged, f"stages.{name}.data")


# What a stage may have of its own: the optimiser, its rates, the clipping of gradients.
STAGE_TRAIN = (
    *("optimizer", "optimizer_backend", "lr", "layer_decay", "betas", "eps", "momentum", "weight_decay"),
    *("warmup_steps", "warmup_lr", "warmup_epochs", "schedule", "min_lr", "power", "cycle_steps"),
    *("decay_at", "decay_every", "decay_factor", "clip_grad_norm", "clip_grad_value"),
)


def stage_train(config: RunConfig, name: str, stage: Stage) -> TrainConfig:
    """The train section as the stage changes it. UserError: a key that is not one of STAGE_TRAIN."""
    merged = _merge(OmegaConf.structured(config.train), OmegaConf.create(stage.train), f"stages.{name}.train")
    for key in stage.train:
        if key not in STAGE_TRAIN:
            raise UserError(f"stages.{name}.train: {key} is of the whole run; a stage may change {', '.join(STAGE_TRAIN)}")
    return _to_object(merged, f"stages.{name}.train")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain values in the shape of the file."""
    plain = json.loads(json.dumps(asdict(config)))
    model = plain["model"]
    plain["model"] = {"name": model["name"], "preset": model["preset"], **model["config"]}
    return plain


def to_yaml(config: RunConfig) -> str:
    """Every key with its value; loads again to the same configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def differences(old: dict[str, Any], new: dict[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """ "key: old -> new" for every dotted key whose values differ, but for those that match a pattern of `ignore`."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in {**before, **after}
        if before.get(key, ...) != after.get(key, ...) and not any(fnmatchcase(key, pattern) for pattern in ignore)
    ]


def _flatten(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(path: str | Path) -> DictConfig:
    try:
        node = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: is not valid YAML: {_one_line(error)}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path}: expected sections such as `model:` and `train:`, got a list")
    return node


def _parse_override(text: str) -> DictConfig:
    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {text!r}: expected key=value, for example train.steps=100")
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        hint = "; text with braces needs quotes" if "{" in text else ""
        raise UserError(f"override {text!r}: the value is not valid YAML{hint}: {_one_line(error)}") from error


def _preset(model_class: type, preset: str, name: str) -> Any:
    config_class = model_class.Config
    if not preset:
        return config_class()
    known = [key for key, value in vars(config_class).items() if isinstance(value, (staticmethod, classmethod))]
    if preset not in known:
        raise UserError(f"model.preset: {name} has no preset {preset!r}; expected one of {', '.join(known) or '(none)'}")
    return getattr(config_class, preset)()


def _merge(base: DictConfig, node: DictConfig, source: str) -> DictConfig:
    try:
        return OmegaConf.merge(base, node)
    except ConfigKeyError as error:
        raise UserError(f"{source}: unknown key {error.full_key!r}{_suggest(base, str(error.full_key))}") from error
    except OmegaConfBaseException as error:
        key = error.full_key or _not_a_section(base, node)
        raise UserError(f"{source}: {key}: {_one_line(error)}") from error


def _to_object(merged: DictConfig, source: str) -> Any:
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {error.full_key}: {_one_line(error)}") from error
    except (ValueError, TypeError) as error:  # a dataclass that checks its values
        raise UserError(f"{source}: {error}") from error


def _suggest(base: DictConfig, unknown: str) -> str:
    known = [key for key, _ in _flatten(OmegaConf.to_container(base, resolve=False))]
    if unknown.startswith("stages."):  # the stage itself may be new
        known += [".".join([*unknown.split(".")[:2], key]) for key, _ in _flatten(asdict(Stage()))]
    sections = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    parent, _, leaf = unknown.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in [*known, *sections] if key.rpartition(".")[0] == parent}
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    near = [siblings[name] for name in get_close_matches(leaf, siblings, n=1)] or same_leaf
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known here: {', '.join(sorted(siblings))}"


def _not_a_section(base: DictConfig, node: DictConfig, prefix: str = "") -> str:
    """The key at which a plain value stands where a section is expected: OmegaConf does not say."""
    for key, value in node.items_ex(resolve=False):
        if key in base and isinstance(base._get_node(key), DictConfig):
            if not isinstance(value, DictConfig):
                return f"{prefix}{key}"
            inner = _not_a_section(base[key], value, f"{prefix}{key}.")
            if inner:
                return inner
    return ""


def _one_line(error: Exception) -> str:
    if isinstance(error, OmegaConfBaseException):
        return str(error).splitlines()[0]
    return " ".join(str(error).split())


_POSITIVE = {
    "train": [
        "steps",
        "batch_size",
        "lr",
        "power",
        "decay_factor",
        "layer_decay",
        "eps",
        "loss_scale",
        "loss_scale_interval",
        "keep_checkpoints",
        "log_seconds",
        "timeout_minutes",
    ],
    "data": ["num_scenes", "num_heldout", "threads", "ahead", "window"],
    "evaluation": ["batch_size"],
}
_NOT_NEGATIVE = {
    "train": [
        "micro_batch",
        "seed",
        "warmup_steps",
        "warmup_epochs",
        "min_lr",
        "cycle_steps",
        "decay_every",
        "weight_decay",
        "clip_grad_norm",
        "clip_grad_value",
        "checkpoint_every",
        "max_nonfinite",
        "tensorboard_every",
    ],
    "data": ["shots"],
    "evaluation": ["every"],
}


def _validate(config: RunConfig) -> None:
    for table, fits, expected in (
        (_POSITIVE, lambda x: x > 0, "a number above 0"),
        (_NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
    ):
        for section, keys in table.items():
            for key in keys:
                value = getattr(getattr(config, section), key)
                if not fits(value):
                    raise UserError(f"{section}.{key}: expected {expected}, got {value}")
        for name, stage in config.stages.items():
            for key, value in stage.train.items():
                if key in table["train"] and not fits(getattr(stage_train(config, name, stage), key)):
                    raise UserError(f"stages.{name}.train.{key}: expected {expected}, got {value}")
    for name, stage in config.stages.items():
        if stage.steps is not None and stage.steps <= 0:
            raise UserError(f"stages.{name}.steps: expected a number above 0, got {stage.steps}")
        for pattern, group in stage.groups.items():
            if group.layer_decay is not None and not 0 < group.layer_decay <= 1:
                key = f"stages.{name}.groups.{pattern}.layer_decay"
                raise UserError(f"{key}: expected a number above 0 and at most 1, got {group.layer_decay}")
    _validate_optimizer(config.train)
    if config.train.find_unused and config.train.strategy != "ddp":
        raise UserError("train.find_unused belongs to train.strategy=ddp: FSDP2 wants every rank to use the same parameters")
    if not config.train.run_dir:
        raise UserError("train.run_dir: expected a folder, got an empty string")
    for name, stage in config.stage_list():
        _validate_data(stage_data(config, name, stage))
        try:
            _validate_optimizer(stage_train(config, name, stage))
        except UserError as error:
            raise UserError(f"stages.{name}, with its train: {error}") from error


def _validate_data(data: DataConfig) -> None:
    if data.source == "shards" and not data.train and not data.mixture:
        raise UserError('data.train: expected patterns of tar files such as ["data/train-{000..009}.tar"], got none')
    if data.source == "emojiworld" and (data.train or data.heldout or data.mixture):
        raise UserError("data.train, data.mixture and data.heldout name your own shards: set data.source=shards with them")
    if data.train and data.mixture:
        raise UserError("data.train and data.mixture: expected one of them, got both")
    if data.pure_batches and not data.mixture:
        raise UserError("data.pure_batches: batches of one source each need data.mixture, which is empty")
    if data.shots < 0:  # of a stage
        raise UserError(f"data.shots: expected 0 or more, got {data.shots}")
    weighted = [name for name, source in data.mixture.items() if source.weight is not None]
    if data.weights != "size" and (weighted or not data.mixture):
        why = f"data.mixture.{weighted[0]} has a weight of its own" if weighted else "data.mixture is empty"
        raise UserError(f"data.weights={data.weights}: {why}")
    for name, source in data.mixture.items():
        if not source.shards:
            others = [other for other in data.mixture if other != name]
            near = get_close_matches(name, others, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"data.mixture.{name}.shards: expected patterns of tar files, got none{hint}")
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise UserError(f"data.mixture.{name}.weight: expected a number above 0, got {source.weight}")
    without = [name for name, source in data.mixture.items() if source.weight is None]
    if 0 < len(without) < len(data.mixture):
        raise UserError(f"data.mixture.{without[0]}.weight: expected a weight for every source or for none, got none here")


def _validate_optimizer(train: TrainConfig) -> None:
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas: expected two numbers from 0 to below 1, got {train.betas}")
    for key in ("momentum", "ema_decay"):
        if not 0 <= getattr(train, key) < 1:
            raise UserError(f"train.{key}: expected a number from 0 to below 1, got {getattr(train, key)}")
    for key in ("layer_decay", "decay_factor"):
        if getattr(train, key) > 1:
            raise UserError(f"train.{key}: expected a number above 0 and at most 1, got {getattr(train, key)}")
    for key in ("min_lr", "warmup_lr"):
        if not 0 <= (getattr(train, key) or 0.0) <= train.lr:
            raise UserError(f"train.{key}: expected a number from 0 to train.lr={train.lr}, got {getattr(train, key)}")
    if not all(0 < share < 1 for share in train.decay_at) or sorted(set(train.decay_at)) != train.decay_at:
        raise UserError(f"train.decay_at: expected growing shares of the stage between 0 and 1, got {train.decay_at}")
    # A key of another schedule would be ignored without a word.
    defaults = TrainConfig()
    schedules = {
        "power": "polynomial",
        "cycle_steps": "cosine",
        "decay_at": "steps",
        "decay_every": "steps",
        "warmup_epochs": "cosine_by_epoch",
    }
    for key, schedule in schedules.items():
        if getattr(train, key) != getattr(defaults, key) and train.schedule != schedule:
            raise UserError(f"train.{key} belongs to train.schedule={schedule}, got train.schedule={train.schedule}")
    if train.schedule == "cosine_by_epoch":
        if train.warmup_steps not in (0, defaults.warmup_steps):
            raise UserError(f"train.warmup_steps={train.warmup_steps}: train.schedule=cosine_by_epoch has train.warmup_epochs")
        if train.warmup_epochs and train.warmup_lr is None:
            raise UserError("train.warmup_lr: expected the rate of the first train.warmup_epochs epochs, got null")
    if train.schedule == "steps" and not train.decay_at and not train.decay_every:
        raise UserError("train.schedule=steps: expected train.decay_at or train.decay_every, got neither")
    if train.optimizer_backend == "apex" and train.optimizer not in ("adamw", "lamb"):
        raise UserError(f"train.optimizer_backend=apex: apex has adamw and lamb, got train.optimizer={train.optimizer}")
