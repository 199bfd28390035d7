"""Training on one GPU, all figures that need one, in about ten minutes; written before a GPU was at hand.

    python benchmarks/gpu_training.py OUT.json [--parts attention mfu packed fsdp] [--dry-run]

- attention: the packed kernel that `anygen.model.attention` takes, against SDPA per segment in fp32: output and
  gradients (bf16 tolerance), and the time of both.
- mfu: a training step at 0.1, 0.35 and 1.1 B parameters, eager and with compiled blocks: real tokens/s, MFU of the
  data sheet (989 TFLOP/s, H100 and H200) and of the fastest matrix product of this run, peak memory.
- packed: `anygen bench train --size gpu` at both utilisations: packed against padded, with peak memory.
- fsdp: the training loop with FSDP2 over one process and compiled blocks; a resumed run must equal one that was never
  stopped, bit for bit.

It writes OUT.json after each part, so a later failure loses nothing. `--dry-run` runs every part on a CPU in tiny
sizes; its figures mean nothing.

Dimension key: T packed ids, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from anygen.bench.machine import machine_facts, measure_limits, timed
from anygen.bench.samples import COMPOSITIONS, synthetic_samples
from anygen.bench.train import Setup, TrainBenchConfig, bench_train, lines
from anygen.errors import TrainingError
from anygen.files import write_json
from anygen.model import attention, attention_kernels
from anygen.model.attention import Segments
from anygen.model.causal import ModelConfig, create_model, num_parameters
from anygen.model.cost import TrainingCost
from anygen.model.loss import LossWeights, NextTokenLoss, TensorBatch
from anygen.training import processes, sharding
from anygen.training.loop import CHECKPOINTS, LoopConfig, train
from anygen.training.metrics import read_metrics
from anygen.training.schedule import OptimizerConfig, make_optimizer
from anygen.vocabulary import Vocabulary

PEAK_TFLOPS = 989.0
TOLERANCE = 2e-2
"""Largest error over the largest value: bf16 has eight bits."""
_CONTROL_IDS = Vocabulary.create(text=0).used


@dataclass(frozen=True)
class Scale:
    """What the parts run at."""

    device: torch.device
    models: dict[str, tuple[ModelConfig, int]]
    """Name to model and rows a step."""
    row_length: int
    vocabulary_size: int
    length_factor: int
    attention_lengths: tuple[int, ...]
    steps: int
    setup: Setup | None
    """Of part `packed`; None is that of `--size gpu`."""
    rounds: int
    compiler: str
    """Of compiled blocks: inductor, or eager, which only traces them."""


def _scale(*, dry: bool) -> Scale:
    if dry:
        smoke = ModelConfig(size="smoke")
        return Scale(
            torch.device("cpu"), {"smoke": (smoke, 1)}, 512, 1024, 1, (17, 1, 130, 64), 2,
            Setup(smoke, 1024, 512, 1), 1, "eager",
        )  # fmt: skip
    models = {
        "0.1 B": (ModelConfig(size="small"), 8),
        "0.35 B": (ModelConfig(size="base"), 4),
        "1.1 B": (ModelConfig(size="large", tie_embeddings=False), 2),
    }
    lengths = (1, 33, 4095, 1024, 2, 700, 8192, 2337)  # 16,384 in all
    return Scale(torch.device("cuda"), models, 8192, 32_768, 16, lengths, 10, None, 6, "inductor")


# -- attention


def attention_part(scale: Scale) -> dict[str, Any]:
    """Both rooms against SDPA in fp32 on the same (bf16) numbers."""
    segments, generator = Segments(scale.attention_lengths, scale.device), torch.Generator().manual_seed(0)
    shapes = ((16, 64), (4, 64), (4, 64), (16, 64))  # 16 heads over 4 of keys and values; the last is the gradient
    inputs = [
        torch.randn(sum(segments.lengths), *shape, generator=generator).to(scale.device, torch.bfloat16)
        for shape in shapes
    ]

    def both_ways(room: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
        out = room(q, k, v, segments)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype))]

    expected = both_ways(attention.attend_sdpa, torch.float32)
    part: dict[str, Any] = {"kernel": str(attention_kernels.resolve()), "lengths": segments.lengths}
    for name, room in {"packed": attention.attend_packed, "sdpa": attention.attend_sdpa}.items():
        found = both_ways(room, torch.bfloat16)
        errors = {
            what: float((a.float() - b).abs().max() / b.abs().max())
            for what, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True)
        }
        if not max(errors.values()) <= TOLERANCE:
            raise TrainingError(f"attention room {name} differs from SDPA in fp32: {errors}")
        windows = [timed(lambda room=room: both_ways(room, torch.bfloat16), scale.device) for _ in range(5)]  # type: ignore[misc]
        part[name] = {"errors": errors, "ms": 1e3 * min(window.wall_s for window in windows)}
    return part


# -- a model and its batches


class Training:
    """A model with its loss and batches: a trainee of the training loop, and a step of its own to be timed."""

    def __init__(self, scale: Scale, name: str) -> None:
        config, num_rows = scale.models[name]
        vocabulary = Vocabulary.create(text=scale.vocabulary_size - _CONTROL_IDS)
        self.model = create_model(config, vocabulary, seed=0)
        self.module: nn.Module = NextTokenLoss(self.model, vocabulary, z_loss=1e-4)
        samples = synthetic_samples(
            COMPOSITIONS[0.5], vocabulary_size=scale.vocabulary_size, seed=0, length_factor=scale.length_factor
        )
        self.rounds = samples.rounds(scale.steps, row_length=scale.row_length, num_rows=num_rows, seed=0)
        weights = LossWeights(vocabulary, {}, inputs=1.0)
        self.batches: list[TensorBatch] = [weights.batch(r.packed) for r in self.rounds]
        self._position, self._backend = 0, scale.compiler

    def next_batch(self) -> TensorBatch:
        """The batches over and over."""
        self._position += 1
        return self.batches[(self._position - 1) % len(self.batches)]

    def to_device(self, batch: TensorBatch, device: torch.device) -> TensorBatch:
        """As it says."""
        return batch.to(device)

    def state(self) -> dict[str, Any]:
        """Position in the batches."""
        return {"position": self._position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        self._position = state["position"]

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """Nothing is held out."""
        return {}

    def compile(self) -> None:
        """Compile the repeated blocks, in place."""
        for layer in self.model.model.layers:
            layer.compile(backend=self._backend)

    def step(self, optimizer: torch.optim.Optimizer, batch: TensorBatch) -> None:
        """One update, as the training loop makes it."""
        with torch.autocast(batch.ids_T.device.type, torch.bfloat16):
            loss, _ = self.module(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def mfu_part(scale: Scale) -> dict[str, Any]:
    """Every model, eager and compiled."""
    limits = measure_limits(scale.device, clock="wall", repeats=5, small=scale.device.type == "cpu")
    fastest = max(limits["gemm_bf16_tflops"].values())
    part: dict[str, Any] = {"limits": limits}
    for name in scale.models:
        part[name] = {"eager": _speed(scale, name, fastest), "compiled": _speed(scale, name, fastest, compiled=True)}
    return part


def _speed(scale: Scale, name: str, fastest: float, *, compiled: bool = False) -> dict[str, Any]:
    training = Training(scale, name)
    if compiled:
        torch.compiler.reset()
        training.compile()
    training.module.to(scale.device)
    optimizer = make_optimizer(training.module, OptimizerConfig(lr=1e-4))
    batches = [batch.to(scale.device) for batch in training.batches]
    for batch in batches[:2]:
        training.step(optimizer, batch)
    windows = [timed(lambda b=b: training.step(optimizer, b), scale.device) for b in batches]  # type: ignore[misc]
    cost = TrainingCost.of_config(training.model.config)
    pairs = list(zip(training.rounds, windows, strict=True))
    tflops = statistics.median(
        cost.of(map(len, r.documents), num_predicted=r.num_labels) / w.wall_s / 1e12 for r, w in pairs
    )
    return {
        "parameters": num_parameters(training.model),
        "ids_per_step": len(training.batches[0].ids_T),
        "real_tokens_per_s": statistics.median(r.num_real / w.wall_s for r, w in pairs),
        "tflops": tflops,
        "mfu": tflops / PEAK_TFLOPS,
        "mfu_of_measured_gemm": tflops / fastest,
        "peak_bytes": windows[-1].peak_bytes,
    }


def packed_part(scale: Scale) -> dict[str, Any]:
    """`anygen bench train` at both utilisations."""
    part = {}
    for utilisation in COMPOSITIONS:
        config = TrainBenchConfig(
            size="gpu", utilisation=utilisation, rounds=scale.rounds, device=scale.device.type,
            compile=scale.compiler == "inductor", peak_tflops=PEAK_TFLOPS,
        )  # fmt: skip
        torch.compiler.reset()
        part[str(utilisation)] = bench_train(config, setup=scale.setup)
        print(*lines(part[str(utilisation)]), sep="\n", flush=True)
    return part


# -- FSDP2


def fsdp_part(scale: Scale) -> dict[str, Any]:
    """The training loop over four steps; then again from the checkpoint before the third."""
    name = next(iter(scale.models))
    config = LoopConfig(
        steps=4, save_every=2, log_every=1, compile=True, device="cpu" if scale.device.type == "cpu" else "auto"
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary, _launched_with_fsdp():
        through, resumed = Path(temporary) / "through", Path(temporary) / "resumed"
        expected = _trained(scale, name, config, through)
        kept = f"{CHECKPOINTS}/step-00000002"
        shutil.copytree(through / kept, resumed / kept)
        found = _trained(scale, name, config, resumed)
        losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (through, resumed)]
    unequal = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
    if unequal or losses[0][2:] != losses[1]:
        raise TrainingError(f"a resumed sharded run differs: {unequal[:3]} and others; losses {losses}")
    return {"losses": losses[0], "losses_resumed": losses[1], "weights_equal": len(expected)}


def _trained(scale: Scale, name: str, config: LoopConfig, folder: Path) -> dict[str, Tensor]:
    """Weights after the run."""
    torch.compiler.reset()
    training = Training(scale, name)
    folder.mkdir(exist_ok=True)
    train(training, config, folder, title="fsdp")
    if not all(isinstance(p, DTensor) for p in training.module.parameters()):
        raise TrainingError("the training loop did not shard the model over its one process")
    return sharding.whole_state(training.module)


@contextlib.contextmanager
def _launched_with_fsdp() -> Iterator[None]:
    """What `accelerate launch --num_processes 1` with a configuration of type FSDP sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launched |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ.update(launched)
    try:
        yield
    finally:
        processes.leave()
        for key in launched:
            del os.environ[key]


PARTS: dict[str, Callable[[Scale], dict[str, Any]]] = {
    "attention": attention_part,
    "mfu": mfu_part,
    "packed": packed_part,
    "fsdp": fsdp_part,
}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run runs every part on a CPU in tiny sizes")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    scale = _scale(dry=arguments.dry_run)
    report: dict[str, Any] = {"command": shlex.join(sys.argv), "machine": machine_facts(scale.device)}
    for name in arguments.parts:
        report[name] = PARTS[name](scale)
        write_json(arguments.out, report)
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
