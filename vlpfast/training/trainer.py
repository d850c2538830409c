"""The loop: batches in, steps of the optimiser out, with nothing lost when it is stopped."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlpfast.training import checkpoint, feature_cache
from vlpfast.training.config import RunConfig, Stage, stage_train, to_dict
from vlpfast.training.ema import WeightAverage
from vlpfast.training.flops_count import Speed
from vlpfast.training.memory import keep_freed_memory
from vlpfast.training.metrics import Display, JsonLines, TensorBoard, WeightsAndBiases
from vlpfast.training.optim import build_optimizer, gradient_norm, learning_rate, set_learning_rate
from vlpfast.training.parallel import Spread, World
from vlpfast.training.precision import LossScale, autocast_dtype, working_weights
from vlpfast.training.profiling import Profiler
from vlpfast.training.rng import rng_state, seed_everything, set_rng_state
from vlpfast.training.run_folder import full_disk_named
from vlpfast.training.saver import Saver
from vlpfast.training.stages import select_trainable, set_mode, weighted_sum
from vlpfast.training.timing import LastGradient, Marks, peak_memory
from vlpfast.training.together import on_all
from vlpfast.types import ON_HOST, AfterStep, Batch, BeforeStep, Loader, PreparesEpoch, Progress, SplitsContrastive, UserError

EXIT_PREEMPTED = 75  # what a command ends with after SIGTERM or SIGUSR1, the position saved: start it again to go on
_RANK_SEEDS = 1_000_003  # between the seeds of two ranks


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0  # steps taken in the whole run; the first is step 1 in every log
    stage: str = ""
    stage_step: int = 0  # steps taken in this stage
    nonfinite: int = 0  # of all these, skipped because the loss or the gradient was not finite


@dataclass
class _Taken:
    """A step that was taken, its numbers perhaps still on their way from the device."""

    record: dict[str, Any]
    names: list[str]
    values: Tensor  # [len(names)] float32 on the host, means over ranks
    marks: Marks
    batch: Batch


class Trainer:
    """Trains a model through the stages of a configuration and goes on from the newest whole checkpoint of its run folder.

    loader_for_stage(name, stage) opens the training batches of a stage; the trainer closes them.
    on_evaluate(step) -> metrics; called with the model in evaluation mode every evaluation.every steps and at the end. The random
    numbers it uses are not missing in the training.
    profiler: told of every step; it chooses those that it looks at. One of the ranks has it.

    A step whose loss or gradient norm is not finite changes no parameter and no optimiser state: the optimiser learns of it
    from a flag on the device, so a GPU is never waited for. Its numbers are read at once on a CPU, one step later on a GPU, and
    always before an evaluation or a checkpoint; files and parameters are the same either way, only the end after
    train.max_nonfinite comes one step later on a GPU. The exception is a model with after_step, which is called only after
    steps that counted: there the flag is waited for. With train.precision=fp16 a gradient that is too large for its loss scale is
    skipped likewise and halves the scale; it counts as not finite only where the loss is not, or the scale is down to 1.

    Two starts of the same run give the same bits on a CPU, and on a GPU with train.deterministic. Every rank of `world` makes
    a Trainer and the same calls; the first one writes the logs, and a signal to any of them stops all.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        loader_for_stage: Callable[[str, Stage], Loader],
        world: World,
        on_evaluate: Callable[[int], dict[str, float]] | None = None,
        profiler: Profiler | None = None,
    ) -> None:
        self.config = config
        self.model = model.to(world.device)
        self.loader_for_stage = loader_for_stage
        self.world = world
        self.device = world.device
        self.on_evaluate = on_evaluate
        self.profiler = profiler
        self.run_dir = Path(config.train.run_dir)
        self.position = Position()
        self._offered = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._described = to_dict(config)["model"]
        self._dtype = autocast_dtype(config.train.precision, self.device)
        self._scale = LossScale(config.train, self.device)
        self._average: WeightAverage | None = None
        self._saved_step = 0
        self._received: list[signal.Signals] = []  # by this rank
        if self.device.type == "cpu" and not config.train.micro_batch:  # divided batches are for want of memory
            keep_freed_memory()
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if config.train.micro_batch and not isinstance(model, SplitsContrastive):
            raise UserError(
                f"train.micro_batch: {type(model).__name__} does not say which features its losses need (methods encode and "
                "contrast), so its batch cannot be divided; use 0"
            )
        self._samples = world.share(config.train.batch_size)
        self._speed = Speed(model, self.device, self._dtype)
        self._waits: LastGradient | None = None
        self._spread = Spread(model, config.train, world, self._dtype)

    def fit(self) -> bool:
        """Trains to the end and writes model.safetensors. False: SIGTERM or SIGUSR1 came; the step was finished and saved.

        UserError: none of the checkpoints there is whole, a checkpoint of another model, the disk is full, too many steps were
        not finite, a stage does not fit the model.
        """
        with full_disk_named(self.run_dir):
            return self._fit()

    def _fit(self) -> bool:
        folder = self.run_dir / "checkpoints"
        self.run_dir.mkdir(parents=True, exist_ok=True)
        newest, notes = checkpoint.find_newest(folder)
        stages = self.config.stage_list()
        names = [name for name, _ in stages]
        state = None
        if newest is not None:
            state = checkpoint.read_state(newest, self._described)
            self.position = Position(**state["position"])
            if self.position.stage not in names:
                raise UserError(f"{newest} was saved in stage {self.position.stage!r}; the configuration has {', '.join(names)}")
        checkpoint.set_aside(folder, newest)
        self._saved_step = start = self.position.step
        first = names.index(self.position.stage) if state else 0
        for name, stage in stages[:first]:  # a stage without a mode keeps that of the stage before
            self._offered = set_mode(self.model, name, stage, self._offered)
        steps = [self.config.stage_steps(stage) for _, stage in stages]
        self._total = start + sum(steps[first:]) - min(self.position.stage_step, steps[first])

        # The last evaluation is always made again: its settings may have changed.
        evaluated = min(start, self._total - 1)
        self._metrics = self._evaluations = self._board = self._display = _Silent()
        project = self.config.train.wandb if self.world.is_first else ""
        self._wandb = self.world.in_turn(lambda: WeightsAndBiases(project, self.run_dir, to_dict(self.config)))
        if self.world.is_first:
            self._metrics = JsonLines(self.run_dir / "metrics.jsonl", lambda line: line["step"] <= start)
            self._evaluations = JsonLines(self.run_dir / "evaluation.jsonl", lambda line: line["step"] <= evaluated)
            self._board = TensorBoard(self.run_dir / "tensorboard", self.config.train.tensorboard_every, start)
            self._display = Display(start, self._total, self.config.train.log_seconds)
        chosen = self.config.train.async_checkpoint
        in_background = self.device.type == "cuda" if chosen is None else chosen
        self._saver = Saver(folder, self.config.train.keep_checkpoints, in_background)
        try:
            for note in notes:
                self._display.say(note)
            self._say_start(newest)
            for index in range(first, len(stages)):
                if not self._run_stage(index, *stages[index], state if index == first else None, newest):
                    return False
            self._saver.wait()
            with self._evaluated_weights():
                checkpoint.export(self.model, self.run_dir / "model.safetensors")
            self._evaluate()
            return True
        finally:
            self._saver.close()
            for output in (self._display, self._board, self._metrics, self._evaluations, self._wandb):
                output.close()

    def _say_start(self, newest: Path | None) -> None:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        precision = str(self._dtype or torch.float32).removeprefix("torch.")
        ranks = f", {self.world.size} ranks ({self.config.train.strategy})" if self.world.size > 1 else ""
        say, left = self._display.say, self._total - self.position.step
        say(f"{self.config.model.name}: {count:,} parameters, {precision} on {self.device}{ranks}, run folder {self.run_dir}")
        if newest is not None:
            say(f"going on from {newest}: {left} steps left" if left else f"{newest}: all {self._total} steps are done")

    def _run_stage(self, index: int, name: str, stage: Stage, state: dict[str, Any] | None, saved: Path | None) -> bool:
        """state, saved: the checkpoint to go on from, when it is of this stage."""
        train, position = stage_train(self.config, name, stage), self.position
        self._train = train
        steps = self.config.stage_steps(stage)
        self.model.train()
        self._offered = set_mode(self.model, name, stage, self._offered)
        select_trainable(self.model, name, stage, self._offered)
        if state is None:
            position.stage, position.stage_step = name, 0
            if stage.init_from:
                source = checkpoint.load_weights(stage.init_from, self.model)
                self._display.say(f"stage {name}: weights from {source}")
        self._weights = working_weights(self.model, train.precision)
        with self._weights:
            self._spread.begin_stage()
        self._optimizer = build_optimizer(self.model, train, name, stage)
        self._average = WeightAverage(self.model, train.ema_decay) if train.ema_decay else None
        if state is not None:
            checkpoint.load(saved, self.model, self._optimizer, self._average_tensors())
            self._scale.load_state_dict(state.get("loss_scale", {}))
        if position.stage_step >= steps:
            return True
        with self._weights:
            self._waits = self._spread.waits()
        loader = self.loader_for_stage(name, stage)
        self._taken: deque[_Taken] = deque()
        self._stopped = False
        try:
            # Last, because opening the loader may itself draw random numbers.
            seed_everything(train.seed + index + _RANK_SEEDS * self.world.rank)
            if state is not None:
                self._go_on(loader, state["processes"])
            with _stop_signals(self._received):
                self._steps(name, stage, steps, loader)
            self._save(loader)
        finally:
            loader.close()
            if self._waits is not None:
                self._waits.close()
        if self._stopped:
            self._saver.wait()
            kind = self._received[0].name if self._received else "another rank was told to stop"
            self._display.say(f"{kind}: stopped after step {position.step} and saved; start again with this run folder to go on")
        return not self._stopped

    def _go_on(self, loader: Loader, processes: list[dict[str, Any]]) -> None:
        """processes: what each rank of the run that saved had."""
        states = [process["loader"] for process in processes]
        loader.load_state_dict(states[self.world.rank] if len(states) == self.world.size else states)
        if self.world.rank < len(processes):  # a rank that is new has drawn nothing yet
            set_rng_state(processes[self.world.rank]["rng"])

    def _steps(self, name: str, stage: Stage, steps: int, loader: Loader) -> None:
        train, position = self.config.train, self.position
        batches = iter(loader)
        self._epoch_steps = len(loader)
        lag = 1 if self.device.type == "cuda" else 0
        mark = time.perf_counter()
        while position.stage_step < steps and not self._stopped:
            if isinstance(self.model, PreparesEpoch) and position.stage_step % len(loader) == 0:
                self.model.prepare_epoch(loader)
            waited = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waited
            progress = Progress(position.stage_step, steps, position.stage_step / len(loader))
            if uncounted := self._speed.stage != name:
                self._speed.begin_stage(name, stage, batch, progress)
                mark = time.perf_counter() - waited
            taken = self._step(batch, name, stage, progress)
            if uncounted and self.world.is_first:
                self._display.say(self._speed.keep(self.run_dir, self._samples))
                if self._spread.unused:
                    self._display.say(f"stage {name}: {self._spread.about_unused()}")
            position.step += 1
            position.stage_step += 1
            now = time.perf_counter()
            taken.record.update(
                epoch=position.stage_step / len(loader),
                samples_per_s=train.batch_size / (now - mark),
                **self._speed.of_step(now - mark),
                memory_bytes=peak_memory(self.device),
                data_wait=waited / (now - mark),
                seconds={"data": waited},
                skipped_samples=len(loader.skipped),
            )
            mark = now
            self._taken.append(taken)
            del batch, taken  # the next batch need not find this one still in memory
            self._write_taken(lag)
            if self.profiler is not None:
                self.profiler.step()
                mark = time.perf_counter()  # writing its files is no part of a step
            # Many ranks stop at the same step: see _write_taken.
            self._stopped |= self.world.size == 1 and (bool(self._received) or self._saver.failed)
            due = position.step < self._total
            if due and self.config.evaluation.every and position.step % self.config.evaluation.every == 0:
                self._write_taken(0)
                self._evaluate()
                mark = time.perf_counter()
            if due and train.checkpoint_every and position.step % train.checkpoint_every == 0:
                self._save(loader)
                mark = time.perf_counter()

    def _step(self, batch: Batch, name: str, stage: Stage, progress: Progress) -> _Taken:
        model, optimizer, train, spread = self.model, self._optimizer, self._train, self._spread
        marks = Marks(self.device, self._waits)
        batch = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) and key not in ON_HOST else value
            for key, value in batch.items()
        }
        marks.passed("transfer")
        lr = learning_rate(progress.step, progress.steps, train, self._epoch_steps)
        set_learning_rate(optimizer, lr)
        if isinstance(model, BeforeStep):
            model.before_step(progress)
        divided = 0 < train.micro_batch < self._samples
        with self._weights, self._speed.counting():
            if divided:
                total = partial(weighted_sum, weights=stage.losses, name=name)
                loss, losses = feature_cache.backward(
                    spread, batch, train.micro_batch, lambda made: self._scale.scaled(total(made)), self._autocast
                )
                loss = loss / self._scale.scale
                marks.passed("forward and backward")  # they alternate
            else:
                with self._autocast():
                    losses = spread("__call__", batch, progress)
                    loss = weighted_sum(losses, stage.losses, name)
                marks.passed("forward")
                self._scale.scaled(loss).backward()
                marks.passed("backward")
        spread.finish(averaged=not divided)
        if self.world.size > 1:
            marks.passed("communication")
        self._scale.unscale_(model)
        norm = gradient_norm(model, train.clip_grad_norm, train.clip_grad_value)
        numbers = {"loss": loss, "grad_norm": norm, **{f"losses.{key}": value for key, value in losses.items()}}
        if isinstance(getattr(model, "logit_scale", None), Tensor):
            numbers["logit_scale"] = model.logit_scale.exp()
        if self._scale.enabled:
            numbers["loss_scale"] = self._scale.scale
        numbers["stop"] = loss.new_full((), float(bool(self._received) or self._saver.failed))
        marks.passed("optimizer")
        values = self.world.mean(torch.stack([value.detach().float() for value in numbers.values()]))
        if self.world.size > 1:
            marks.passed("communication")
        on_host = torch.empty(values.shape, pin_memory=self.device.type == "cuda").copy_(values, non_blocking=True)
        finite = torch.isfinite(values[:2]).all()
        optimizer.found_inf = found_inf = (~finite).float()  # every optimiser here leaves all as it is where this is 1
        optimizer.step()
        self._scale.update(found_inf)
        if self._average is not None:
            self._average.update(progress.step, found_inf)
        optimizer.zero_grad(set_to_none=True)
        if isinstance(model, AfterStep) and finite:
            model.after_step()
        marks.passed("optimizer")
        record = {"step": self.position.step + 1, "stage": name, "lr": lr}
        return _Taken(record, list(numbers), on_host, marks, batch)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None)

    def _write_taken(self, leave: int) -> None:
        """Writes the steps taken but for the newest `leave`, whose numbers may not have arrived."""
        while len(self._taken) > leave:
            taken = self._taken.popleft()
            values = dict(zip(taken.names, taken.values.tolist(), strict=True))
            self._stopped |= values.pop("stop") > 0
            # A gradient too large for fp16 halves the loss's scale: that is how it is found. At 1 it is the gradient's own fault.
            rescaled = values.get("loss_scale", 1.0) > 1.0
            finite = math.isfinite(values["loss"]) and (math.isfinite(values["grad_norm"]) or rescaled)
            self.position.nonfinite += not finite
            losses = {key.removeprefix("losses."): values.pop(key) for key in taken.names if key.startswith("losses.")}
            record = {**taken.record, **values, "losses": losses, "nonfinite_steps": self.position.nonfinite}
            record["seconds"].update(taken.marks.seconds())
            if self.profiler is not None:
                self.profiler.write(record)
            self._metrics.write(record)
            self._display.step(record, self.config.train.batch_size)
            if self._board.every and record["step"] % self._board.every == 0:
                self._board.write(record["step"], {key: value for key, value in record.items() if key != "step"})
            self._wandb.write(record["step"], {key: value for key, value in record.items() if key != "step"})
            if not finite:
                self._keep_nonfinite(record, taken.batch)

    def _keep_nonfinite(self, record: dict[str, Any], batch: Batch) -> None:
        rank = f"-rank{self.world.rank}" if self.world.size > 1 else ""
        path = self.run_dir / f"nonfinite-{record['step']}{rank}.pt"
        on_host = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()}
        torch.save({"step": record["step"], "losses": record["losses"], "grad_norm": record["grad_norm"], "batch": on_host}, path)
        what = f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}"
        self._display.say(f"{what}: skipped, its batch is in {path}")
        limit = self.config.train.max_nonfinite
        if self.position.nonfinite > limit:
            raise UserError(
                f"{what}: {self.position.nonfinite} steps of this run were not finite, more than train.max_nonfinite={limit}. "
                f"Their batches are in {self.run_dir}/nonfinite-*.pt. A smaller train.lr, a longer train.warmup_steps or "
                "train.precision=fp32 are the usual cures"
            )

    def _evaluate(self) -> None:
        if self.on_evaluate is None:
            return
        state = rng_state()
        self.model.eval()
        with self._evaluated_weights(), self._spread.gathered():
            metrics = self.on_evaluate(self.position.step)
        self.model.train()
        set_rng_state(state)
        self._evaluations.write({"step": self.position.step, **metrics})
        self._board.write(self.position.step, metrics, "evaluation")
        self._wandb.write(self.position.step, metrics, "evaluation")

    def _evaluated_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.applied()

    def _average_tensors(self) -> dict[str, Tensor]:
        return {} if self._average is None else self._average.tensors()

    def _save(self, loader: Loader) -> None:
        self._write_taken(0)
        if self.position.step == self._saved_step:
            return
        self._metrics.sync()
        self._evaluations.sync()
        state = {
            "position": asdict(self.position),
            "model": self._described,
            "loss_scale": self._scale.state_dict(),
            "processes": on_all(lambda: {"rng": rng_state(), "loader": loader.state_dict()}),
        }
        self._saver.save(self.position.step, self.model, self._optimizer, state, self._average_tensors())
        self._saved_step = self.position.step


class _Silent:
    """Where a rank that is not the first writes."""

    every = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@contextmanager
def _stop_signals(received: list[signal.Signals]) -> Iterator[None]:
    """Collects SIGTERM and SIGUSR1, which would end the process."""
    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = [signal.signal(kind, lambda number, _: received.append(signal.Signals(number))) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
