"""What `test_processes.py` runs in two real processes over gloo, and alone: python several_processes.py FOLDER."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from anygen.errors import AnyGenError
from anygen.files import read_json
from anygen.model.causal import ModelConfig, create_model
from anygen.model.loss import LossWeights, NextTokenLoss, TensorBatch
from anygen.model.recompute import Recompute, recompute_activations
from anygen.packing import collate
from anygen.sequence import Sequence
from anygen.training import processes
from anygen.training.interrupts import Interrupted
from anygen.training.loop import LoopConfig, train
from anygen.training.schedule import OptimizerConfig
from anygen.training.sharding import whole_state
from anygen.vocabulary import Vocabulary

ROWS, ROW_LENGTH, STEPS = 4, 48, 6


class Recorded(nn.Module):
    """Notes every training loss to the last bit; the last process's may be NaN at a step."""

    def __init__(self, module: nn.Module, *, nan_at: int | None) -> None:
        super().__init__()
        self.module, self.losses, self.nan_at = module, [], nan_at

    def forward(self, batch: TensorBatch) -> Any:
        loss, report = self.module(batch)
        if self.training:
            if len(self.losses) == self.nan_at and processes.rank() == processes.count() - 1:
                loss = loss * float("nan")
            self.losses.append(loss.item())
        return loss, report


class Trainee:
    """A tiny Qwen3 on random packed rows; a process takes its share of the rows of every batch."""

    def __init__(
        self,
        folder: Path,
        *,
        parts: int,
        stop_at: int | None = None,
        nan_at: int | None = None,
        recompute: Recompute = "none",
    ) -> None:
        self.vocabulary = Vocabulary.from_manifest(read_json(folder / "vocabulary.json"))
        config = ModelConfig(size="smoke", width=32, head_width=16, mlp_width=48, max_positions=64)
        self.model = create_model(config, self.vocabulary, seed=0)
        self.weights = LossWeights(self.vocabulary, {"text": 3.0}, inputs=0.2)
        recompute_activations(self.model, recompute)
        self.module: nn.Module = Recorded(NextTokenLoss(self.model, self.vocabulary, z_loss=1e-4), nan_at=nan_at)
        self.parts, self.position, self.stop_at = parts, 0, stop_at

    def row(self, number: int) -> list[Sequence]:
        random = np.random.default_rng(number)
        lengths = random.permutation([3 + number % 7, 11, 17])
        ids = [random.integers(0, self.vocabulary.size, length) for length in lengths]
        return [Sequence(i, random.random(len(i)) < 0.5, ()) for i in ids]

    def next_batch(self) -> TensorBatch:
        if self.position == self.stop_at and processes.rank() == processes.count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        size = ROWS // self.parts // processes.count()
        step, part = divmod(self.position, self.parts)
        start = step * ROWS + (part * processes.count() + processes.rank()) * size
        self.position += 1
        rows = [self.row(number) for number in range(start, start + size)]
        return self.weights.batch(collate(rows, ROW_LENGTH, pad_id=self.vocabulary.control("pad")))

    def to_device(self, batch: TensorBatch, device: torch.device) -> TensorBatch:
        return batch.to(device)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        assert all(state == states[0] for state in states)
        return states[0]

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        return {"loss": float(module(self.to_device(self.weights.batch(self.held_out()), device))[0])}

    def held_out(self) -> Any:
        return collate([self.row(10_000)], ROW_LENGTH, pad_id=self.vocabulary.control("pad"))

    def compile(self) -> None:
        for layer in self.model.model.layers:
            layer.compile(backend="eager")


def run(
    folder: Path,
    name: str,
    *,
    stop_at: int | None = None,
    nan_at: int | None = None,
    parts: int = 1,
    recompute: Recompute = "none",
    **changes: Any,
) -> None:
    """Train in `folder/name`, or go on there; writes losses, figures and whole weights of this part beside it."""
    trainee = Trainee(folder, parts=parts, stop_at=stop_at, nan_at=nan_at, recompute=recompute)
    values: dict[str, Any] = {"steps": STEPS, "precision": "fp32", "device": "cpu", "log_every": 2, "save_every": 50}
    optimizer = OptimizerConfig(**{"lr": 1e-2, "warmup_steps": 0, **changes.pop("optimizer", {})})
    config = LoopConfig(**{**values, "optimizer": optimizer, "accumulate": parts, **changes})
    figures: dict[str, Any] = {}
    try:
        figures = train(trainee, config, folder / name, title="toy")
    except Interrupted as stopped:
        figures = {"exit_code": float(stopped.exit_code)}
    except AnyGenError as error:
        figures = {"error": f"{type(error).__name__}: {error}"}
    weights = whole_state(trainee.module)
    prefix = f"{name}-{processes.rank()}-of-{processes.count()}"
    facts = {"losses": trainee.module.losses, "figures": figures, "position": trainee.position}  # type: ignore[union-attr]
    (folder / f"{prefix}.json").write_text(json.dumps(facts))
    names = dict(trainee.module.named_parameters())
    save_file({n: t.contiguous().clone() for n, t in weights.items() if n in names}, folder / f"{prefix}.safetensors")


def main(folder: Path) -> None:
    """Every scenario, one after the other, in this process group."""
    run(folder, "replicated")
    run(folder, "replicated-compiled", compile=True, steps=2)
    run(folder, "replicated-muon", optimizer={"kind": "muon"})
    run(folder, "replicated-nan", nan_at=2)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    run(folder, "sharded", ema_decay=0.5)
    run(folder, "sharded-bf16", precision="bf16", steps=2)
    run(folder, "sharded-accumulated", parts=2)
    run(folder, "sharded-compiled", compile=True, recompute="selective", steps=2)
    run(folder, "sharded-muon", optimizer={"kind": "muon"})
    run(folder, "sharded-nan", nan_at=2)
    for name in ("resumed", "resharded"):
        run(folder, name, stop_at=2, ema_decay=0.5)
    run(folder, "resumed", ema_decay=0.5)
    run(folder, "grown", ema_decay=0.5)  # begun by one
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
