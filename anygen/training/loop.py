"""The training loop that every learning stage shares: accelerate for device and precision, the rest in plain sight.

What is trained, and on what, is a `Trainee`. The stream of batches is a pure function of the trainee's state, and all
randomness inside a step comes from a seed of (run seed, step), so a resumed run equals one that was never stopped,
bit for bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import nn

from anygen.config import Config
from anygen.errors import ConfigError, TrainingError
from anygen.seeding import borrowed_randomness, seed_of
from anygen.training import processes
from anygen.training.averaging import WeightAverage
from anygen.training.engine import Engine
from anygen.training.interrupts import StopRequest
from anygen.training.metrics import MetricsLog, Progress, read_metrics
from anygen.training.monitors import Monitors, peak_tflops_of
from anygen.training.schedule import OptimizerConfig, learning_rate
from anygen.training.trackers import TrackerName, Trackers

CHECKPOINTS = "checkpoints"
_STOPPED = (
    "; stopped before the update. The last checkpoint is good: "
    "lower the learning rate, or look at the data of this step"
)


class LoopConfig(Config):
    """How long and how to train."""

    steps: int = Field(ge=1)
    start_from: Path | None = Field(None, exclude_if=lambda folder: folder is None)
    """Folder of an earlier training of the same sizes (`runs/first/audio_tokenizer`): begin with its newest weights, or
    their running means where it kept these; steps, learning rate, optimizer and data are this recipe's."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 is autocast: weights and their updates stay fp32. A CPU without instructions for bf16 computes in fp32."""
    device: Literal["auto", "cpu"] = "auto"
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulate: int = Field(1, ge=1, exclude_if=lambda count: count == 1)
    """Batches whose gradients make one step: a larger batch than memory holds."""
    log_every: int = Field(20, ge=1)
    validate_every: int = Field(0, ge=0)
    """0 validates at the end only."""
    save_every: int = Field(200, ge=1)
    ema_decay: float = Field(0.0, ge=0, lt=1, exclude_if=lambda decay: decay == 0)
    """Validate and return a running mean of the weights, 0.99 for one over a hundred steps; 0 for the last weights."""
    norm_alarm: float = Field(3.0, gt=1, exclude_if=lambda growth: growth == 3)
    """Growth of the output norm over its level after warm-up that is worth a warning (`anygen.training.monitors`)."""
    peak_tflops: float | None = Field(None, gt=0, exclude=True)
    """Of one device in bf16, for `mfu` in the log; by the GPU's name where not given."""
    trackers: tuple[TrackerName, ...] = Field((), exclude=True)
    """Where the log goes beside `metrics.jsonl`: tensorboard, wandb, trackio."""
    compile: bool = False
    """torch.compile of the trainee's repeated blocks: about 1.4x faster after half a minute of compiling."""


class Trainee(Protocol):
    """What the loop trains."""

    module: nn.Module
    """`module(batch)` returns a loss and a dict of 0-d tensors to report."""

    def next_batch(self) -> Any:
        """The next batch, on the CPU."""
        ...

    def to_device(self, batch: Any, device: torch.device) -> Any:
        """The batch where the module is."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream of batches."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        ...

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures on held-out data; called in eval mode, without gradients."""
        ...

    def compile(self) -> None:
        """Compile the repeated blocks of `module`."""
        ...


@runtime_checkable
class Divided(Protocol):
    """A trainee that gives each process its own part of every batch."""

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The states of all processes as one, which `load_state` takes on any number of processes."""
        ...


def train(trainee: Trainee, config: LoopConfig, folder: Path, *, title: str) -> dict[str, float]:
    """Train to the end, or go on from the newest checkpoint in `folder`; returns the last figures.

    With `ema_decay` the trainee's module has the averaged weights afterwards; checkpoints hold both.

    Raises:
        ConfigError: several processes, and a trainee that does not divide its batches.
        TrainingError: loss or gradient became NaN or infinite; no such update was applied.
        Interrupted: SIGTERM or SIGINT, after a checkpoint was saved.
    """
    if processes.started_as_several() and not isinstance(trainee, Divided):
        raise ConfigError(f"{title} is trained in one process: start it without accelerate launch or torchrun")
    if config.compile:
        trainee.compile()
    run = _Run(trainee, config, folder, title)
    with contextlib.closing(run), StopRequest() as stop, borrowed_randomness():
        for step in range(run.start, config.steps):
            run.step(step)
            stop.agree(run.engine.device)
            if stop.signal_number is not None or ((step + 1) % config.save_every == 0 and step + 1 < config.steps):
                run.save(step + 1)
                stop.check(f"step {step + 1} of {config.steps} is saved in {folder}")
        return run.finish()


class _Run:
    def __init__(self, trainee: Trainee, config: LoopConfig, folder: Path, title: str) -> None:
        self._trainee, self._config = trainee, config
        bf16, cpu = config.precision == "bf16", config.device == "cpu"
        self.engine = Engine(
            trainee.module,
            config.optimizer,
            bf16=bf16,
            cpu=cpu,
            checkpoints=folder / CHECKPOINTS,
            start_from=config.start_from / CHECKPOINTS if config.start_from else None,
        )
        restored = self.engine.restored
        self.start = restored.step if restored else 0
        self._average = WeightAverage(trainee.module, config.ema_decay) if config.ema_decay else None
        if restored:
            trainee.load_state(restored.extra)
            if self._average:
                self._average.load(restored.averages)
        is_first = processes.rank() == 0
        self._log = MetricsLog(folder, resume_step=self.start) if is_first else None
        self._trackers = Trackers(config.trackers if is_first else (), folder, config=config.model_dump(mode="json"))
        self._monitors = Monitors(
            read_metrics(self._log.path) if self._log else (),
            warmup_steps=config.optimizer.warmup_steps,
            norm_alarm=config.norm_alarm,
            peak_tflops=config.peak_tflops or peak_tflops_of(self.engine.device),
            num_devices=processes.count(),
        )
        self._progress = Progress(title, config.steps, start=self.start, shown=is_first)
        self._meter = _Meter()
        self._values: dict[str, float] = {}
        self.engine.module.train()

    def step(self, step: int) -> None:
        config, engine, trainee = self._config, self.engine, self._trainee
        torch.manual_seed(seed_of(config.seed, step, *([processes.rank()] if processes.rank() else [])))
        batches = [trainee.to_device(trainee.next_batch(), engine.device) for _ in range(config.accumulate)]
        try:
            reports, grad_norm = engine.step(batches)
        except TrainingError as error:
            raise TrainingError(f"step {step}: {error}{_STOPPED}") from None
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.steps) * group.get("lr_ratio", 1.0)
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        if self._average:
            self._average.update(step)
        self._meter.add(reports, grad_norm)
        self._tell(step)

    def _tell(self, step: int) -> None:
        """Figures, where they are due after this step."""
        done = step + 1
        validates = done == self._config.steps or (
            self._config.validate_every and done % self._config.validate_every == 0
        )
        if validates or done % self._config.log_every == 0:
            self._values = self._meter.take() | {"lr": self.engine.optimizer.param_groups[-1]["lr"]}
            if validates:
                with self._meter.paused():
                    self._values |= self._validate()
            if self._log:
                self._values = self._monitors.update(step, self._values)
                self._log.write(step, self._values)
                self._trackers.log(step, self._values)
        self._progress.advance({k: self._values[k] for k in ("loss", "lr") if k in self._values})

    def _validate(self) -> dict[str, float]:
        module = self.engine.module
        module.eval()
        with torch.no_grad(), self._average.applied() if self._average else contextlib.nullcontext():
            figures = self._trainee.validate(module, self.engine.device)
        module.train()
        return {f"validation_{name}": value for name, value in figures.items()}

    def save(self, done: int) -> None:
        with self._meter.paused():
            states = processes.gathered(self._trainee.state())
            extra = self._trainee.joined(states) if isinstance(self._trainee, Divided) else states[0]
            self.engine.save(done, extra, self._average)

    def finish(self) -> dict[str, float]:
        """The last figures; the module has the weights that are to be used."""
        self._progress.close()
        if self.start >= self._config.steps:  # a crash between the last step and the stage's end
            self._values = self._validate()
        self.save(self._config.steps)
        if self._average:
            self._average.apply()
        self._trainee.module.eval()
        return self._values

    def close(self) -> None:
        self._trackers.close()
        self.engine.close()


class _Meter:
    """Means of reported tensors since the last `take`, over all processes; NaN, a batch without data, is left out."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._since = time.monotonic()
        self._steps = 0

    def add(self, reports: Sequence[Mapping[str, torch.Tensor]], grad_norm: torch.Tensor) -> None:
        for name, value in [*(pair for report in reports for pair in report.items()), ("grad_norm", grad_norm)]:
            value = value.detach().double()
            if torch.isnan(value):  # a figure that this batch had no data for
                continue
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (validation, a save) is no part of a step's time."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def take(self) -> dict[str, float]:
        sums = {name: float(total) for name, total in self._sums.items()}
        figures = processes.gathered((sums, self._counts))
        means = processes.mean_of(figures)
        means["step_s"] = (time.monotonic() - self._since) / max(1, self._steps)
        if "tokens" in means:
            tokens = sum(process_sums.get("tokens", 0.0) for process_sums, _ in figures)
            means["tokens_per_s"] = tokens / max(1, self._steps) / means["step_s"]
        self._sums, self._counts, self._steps, self._since = {}, {}, 0, time.monotonic()
        return means
