"""What carries out a training step, on one process or several: devices, precision, gradients, saved states.

`accelerate` chooses the device, joins the processes and does mixed precision; several processes replicate the module
(DDP), or slice it where the launcher's configuration is of type FSDP (`anygen.training.sharding`).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from anygen.errors import ConfigError, TrainingError
from anygen.training import checkpoint, processes, sharding
from anygen.training.averaging import WeightAverage
from anygen.training.checkpoint import Restored
from anygen.training.parts import Sparing, parts_of
from anygen.training.precision import is_bf16_fast
from anygen.training.schedule import OptimizerConfig, make_optimizer
from tokenizers_mm import compat  # noqa: F401  accelerate looks at the same fragile packages as transformers

logger = logging.getLogger("anygen")


@runtime_checkable
class Weighted(Protocol):
    """A batch whose loss is a weighted mean: with a common denominator parts of a batch add up to the whole."""

    @property
    def total_weight(self) -> Tensor:
        """The denominator that the batch alone would have."""
        ...

    def divided_by(self, normaliser: Tensor) -> Any:
        """The same batch with another denominator."""
        ...


class Engine:
    """A module ready to be trained, and its optimizer.

    Args:
        module: `module(batch)` returns a loss and a dict of 0-d tensors.
        optimizer: its configuration.
        bf16: autocast; sharded modules compute in bf16 instead. Weights and their updates stay fp32.
        cpu: even where there is a GPU.
        checkpoints: folder; training goes on from the newest one in it.
        start_from: such a folder of another training, whose weights this one begins with.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        *,
        bf16: bool,
        cpu: bool,
        checkpoints: Path,
        start_from: Path | None = None,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState

        processes.join(cpu=cpu)
        if bf16 and not is_bf16_fast(torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")):
            if processes.rank() == 0:
                logger.info("this CPU has no instructions for bf16: fp32 is faster, and is taken")
            bf16 = False
        # accelerate keeps one global state per process; stages that run after one another differ in precision
        AcceleratorState._reset_state(reset_partial_state=True)
        # Buffers are the same on every process, or are made so where they change (`tokenizers_mm.together`).
        spares = isinstance(module, Sparing) and module.spares_parameters
        replicas = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=spares)
        self._accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if bf16 else "no", kwargs_handlers=[replicas])
        self.device: torch.device = self._accelerator.device
        self._sharded = sharding.is_asked_for() and torch.distributed.is_initialized()
        self._max_grad_norm = optimizer.max_grad_norm
        self._folder, self.plain = checkpoints, module
        if self._sharded:
            if isinstance(module, Sparing):
                raise ConfigError("only the stage pretrain is sharded (FSDP); start this one with type MULTI_GPU")
            if optimizer.kind == "muon":
                raise ConfigError("optimizer.kind: muon needs whole matrices; with FSDP use adamw")
            sharding.shard(module, self.device, bf16=bf16)
        self.optimizer = make_optimizer(module, optimizer)
        self.restored: Restored | None = checkpoint.restore(checkpoints, module, self.optimizer, sharded=self._sharded)
        if start_from is not None and self.restored is None:
            checkpoint.start_from(start_from, module, sharded=self._sharded)
        self.module = module
        if not self._sharded:
            self.module, self.optimizer = self._accelerator.prepare(module, self.optimizer)

    def step(self, batches: Sequence[Any]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Gradients of the mean loss over `batches` on all processes; what each batch reported, and the norm.

        Raises:
            TrainingError: loss or gradient is NaN or infinite; nothing was updated.
        """
        reports = []
        for place, batch in enumerate(self._balanced(batches)):
            with self._local() if place + 1 < len(batches) else contextlib.nullcontext():
                loss, report = self.module(batch)
                self._accelerator.backward(loss / len(batches) if len(batches) > 1 else loss)
            reports.append({"loss": loss.detach(), **report})
        norms = [
            sharding.whole(nn.utils.clip_grad_norm_(part.parameters, self._max_grad_norm))
            for part in parts_of(self.plain)
        ]
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        losses = [report["loss"].item() for report in reports]
        if not all(map(math.isfinite, [*losses, norm.item()])):
            raise TrainingError(f"loss {sum(losses) / len(losses)}, gradient norm {norm.item()}")
        return reports, norm

    def _balanced(self, batches: Sequence[Any]) -> Sequence[Any]:
        """Weighted batches with one denominator, so that parts on several processes are one large batch."""
        parts = len(batches) * processes.count()
        if parts == 1 or not all(isinstance(batch, Weighted) for batch in batches):
            return batches
        weight = processes.total(torch.stack([batch.total_weight for batch in batches]).sum()) / parts
        return [batch.divided_by(weight) for batch in batches]

    def _local(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, gradients are added up without telling the other processes."""
        if not self._sharded:
            return self._accelerator.no_sync(self.module)

        @contextlib.contextmanager
        def unsynchronised() -> Any:
            self.module.set_requires_gradient_sync(False)  # type: ignore[operator]
            yield
            self.module.set_requires_gradient_sync(True)  # type: ignore[operator]

        return unsynchronised()

    def save(self, step: int, extra: dict[str, Any], average: WeightAverage | None) -> None:
        """Publish a checkpoint; returns on every process when it is there."""
        if self._sharded or processes.rank() == 0:
            averages = average.tensors if average else {}
            checkpoint.save(
                self._folder, step, self.plain, self.optimizer, extra, averages=averages, sharded=self._sharded
            )
        processes.wait()

    def close(self) -> None:
        """Take accelerate's wrappers off the module; a second time it does nothing."""
        if not self._sharded:
            self._accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)  # off forward, in place
        self.module = self.plain  # a DDP wrapper must not outlive its process group
        self._accelerator.free_memory()
