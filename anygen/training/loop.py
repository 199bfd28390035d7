"""The training loop that every learning stage shares: accelerate for device and precision, the rest in plain sight.

What is trained, and on what, is a `Trainee`. The stream of batches is a pure function of the trainee's state, and all
randomness inside a step comes from a seed of (run seed, step), so a resumed run equals one that was never stopped,
bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import nn

from anygen.config import Config
from anygen.errors import ConfigError, TrainingError
from anygen.seeding import borrowed_randomness, seed_of
from anygen.training import checkpoint
from anygen.training.averaging import WeightAverage
from anygen.training.interrupts import StopRequest
from anygen.training.metrics import MetricsLog, Progress
from anygen.training.schedule import OptimizerConfig, learning_rate, make_optimizer
from tokenizers_mm import compat  # noqa: F401  accelerate looks at the same fragile packages as transformers

CHECKPOINTS = "checkpoints"


class LoopConfig(Config):
    """How long and how to train."""

    steps: int = Field(ge=1)
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 is autocast: weights and their updates stay fp32."""
    device: Literal["auto", "cpu"] = "auto"
    optimizer: OptimizerConfig = OptimizerConfig()
    log_every: int = Field(20, ge=1)
    validate_every: int = Field(0, ge=0)
    """0 validates at the end only."""
    save_every: int = Field(200, ge=1)
    ema_decay: float = Field(0.0, ge=0, lt=1, exclude_if=lambda decay: decay == 0)
    """Validate and return a running mean of the weights, 0.99 for one over a hundred steps; 0 for the last weights."""
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


def train(trainee: Trainee, config: LoopConfig, folder: Path, *, title: str) -> dict[str, float]:
    """Train to the end, or go on from the newest checkpoint in `folder`; returns the last figures.

    With `ema_decay` the trainee's module has the averaged weights afterwards; checkpoints hold both.

    Raises:
        TrainingError: loss or gradient became NaN or infinite; no such update was applied.
        Interrupted: SIGTERM or SIGINT, after a checkpoint was saved.
    """
    accelerator = _accelerator(config)
    optimizer = make_optimizer(trainee.module, config.optimizer)
    restored = checkpoint.restore(folder / CHECKPOINTS, trainee.module, optimizer)
    start = restored.step if restored else 0
    if restored:
        trainee.load_state(restored.extra)
    if config.compile:
        trainee.compile()
    module, optimizer = accelerator.prepare(trainee.module, optimizer)
    average = WeightAverage(trainee.module, config.ema_decay) if config.ema_decay else None
    if average and restored:
        average.load(restored.averages)
    log = MetricsLog(folder, resume_step=start)
    progress = Progress(title, config.steps, start=start)
    meter = _Meter()
    values: dict[str, float] = {}

    def save(step: int) -> None:
        if accelerator.is_main_process:
            plain, averages = accelerator.unwrap_model(module), average.tensors if average else {}
            checkpoint.save(folder / CHECKPOINTS, step, plain, optimizer, trainee.state(), averages=averages)
        accelerator.wait_for_everyone()

    def validate() -> dict[str, float]:
        module.eval()
        with torch.no_grad(), average.applied() if average else contextlib.nullcontext():
            figures = trainee.validate(module, accelerator.device)
        module.train()
        return {f"validation_{name}": value for name, value in figures.items()}

    module.train()
    with StopRequest() as stop, borrowed_randomness():
        for step in range(start, config.steps):
            torch.manual_seed(seed_of(config.seed, step))
            batch = trainee.to_device(trainee.next_batch(), accelerator.device)
            loss, report = module(batch)
            accelerator.backward(loss)
            grad_norm = accelerator.clip_grad_norm_(module.parameters(), config.optimizer.max_grad_norm)
            _require_finite(step, loss, grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optimizer, step, config.steps) * group.get("lr_ratio", 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update(step)
            meter.add({"loss": loss, "grad_norm": grad_norm, **report})
            done = step + 1
            validates = done == config.steps or (config.validate_every and done % config.validate_every == 0)
            if validates or done % config.log_every == 0:
                values = meter.take() | {"lr": optimizer.param_groups[-1]["lr"]}
                if validates:
                    values |= validate()
                if accelerator.is_main_process:
                    log.write(step, values)
            progress.advance({k: values[k] for k in ("loss", "lr") if k in values})
            if stop.signal_number is not None or (done % config.save_every == 0 and done < config.steps):
                save(done)
                stop.check(f"step {done} of {config.steps} is saved in {folder}")
    progress.close()
    if start >= config.steps:  # a crash between the last step and the stage's end
        values = validate()
    save(config.steps)
    if average:
        average.apply()
    accelerator.unwrap_model(module, keep_fp32_wrapper=False)  # takes the autocast wrapper off forward, in place
    trainee.module.eval()
    return values


class _Meter:
    """Means of reported tensors since the last `take`; NaN, no data for it in this batch, is left out."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._since = time.monotonic()
        self._steps = 0

    def add(self, report: Mapping[str, torch.Tensor]) -> None:
        for name, value in report.items():
            value = value.detach().double()
            if torch.isnan(value):  # a figure that this batch had no data for
                continue
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._steps += 1

    def take(self) -> dict[str, float]:
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        elapsed = time.monotonic() - self._since
        means["step_s"] = elapsed / max(1, self._steps)
        if "tokens" in means:
            means["tokens_per_s"] = means["tokens"] / means["step_s"]
        self._sums, self._counts, self._steps, self._since = {}, {}, 0, time.monotonic()
        return means


def _require_finite(step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
    if not (math.isfinite(loss.item()) and math.isfinite(grad_norm.item())):
        raise TrainingError(
            f"step {step}: loss {loss.item()}, gradient norm {grad_norm.item()}; stopped before the update. "
            "The last checkpoint is good: lower the learning rate, or look at the data of this step"
        )


def _accelerator(config: LoopConfig) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("training runs in one process for now: start it without torchrun or accelerate launch")
    # accelerate keeps one global state per process; stages that run after one another differ in precision
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=config.device == "cpu", mixed_precision="bf16" if config.precision == "bf16" else "no")
