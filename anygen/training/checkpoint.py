"""Training state on disk: atomic, checked, without pickle.

A checkpoint is a folder `step-00001234` with every tensor of module and optimizer in one safetensors file, everything
else in JSON, and a manifest of checksums (`anygen.files.publishing`). Loading takes the newest one that verifies.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from anygen.errors import CheckpointError
from anygen.files import publishing, read_json, remove_leftovers, verify, write_json

logger = logging.getLogger("anygen")
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Restored:
    """Where training goes on."""

    step: int
    """The next step to do."""
    extra: dict[str, Any]
    averages: dict[str, torch.Tensor]
    """Both as they were passed to `save`."""


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    *,
    averages: Mapping[str, torch.Tensor] | None = None,
    keep: int = 2,
) -> Path:
    """Publish the state before step `step`; older checkpoints beyond `keep` are deleted only after that.

    Args:
        folder: of the checkpoints.
        step: the next one to do.
        module: what is trained.
        optimizer: of its weights.
        extra: JSON-able state of the rest.
        averages: means of the module's weights, by name.
        keep: checkpoints that stay.

    Raises:
        CheckpointError: the disk is full or not writable; what was there before is intact.
    """
    path = folder / f"step-{step:08d}"
    try:
        with publishing(path) as temporary:
            means = {f"average.{name}": tensor.contiguous() for name, tensor in (averages or {}).items()}
            tensors = {**_module_tensors(module), **_optimizer_tensors(optimizer), **means}
            save_file(tensors, temporary / "state.safetensors")
            write_json(temporary / "state.json", {"step": step, "extra": extra})
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free // 2**20 if folder.exists() else 0
        raise CheckpointError(f"cannot save {path} ({free} MiB free): {error}") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def restore(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Restored | None:
    """Load the newest undamaged checkpoint; None where there is none.

    Raises:
        CheckpointError: it is undamaged but does not fit this module or optimizer.
    """
    remove_leftovers(folder)
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
            continue
        return _load(path, module, optimizer)
    return None


def _load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Restored:
    state = read_json(path / "state.json")
    try:
        tensors = load_file(path / "state.safetensors")
        expected = _module_tensors(module)
        found = {name: tensor for name, tensor in tensors.items() if name.startswith("module.")}
        if expected.keys() != found.keys():
            odd = sorted(expected.keys() ^ found.keys())
            raise CheckpointError(f"{path} is of another model: {len(odd)} tensors differ, {odd[0]!r} first")
        module.load_state_dict({name.removeprefix("module."): t for name, t in found.items()}, strict=False)
        _load_optimizer(optimizer, {name: t for name, t in tensors.items() if name.startswith("optimizer.")})
        means = {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
        return Restored(int(state["step"]), dict(state["extra"]), means)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not fit this run: {error}") from error


def _module_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """State by name; of tensors that share memory (tied embeddings) only the first."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        tensors[f"module.{name}"] = tensor.detach().contiguous()
    return tensors


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": value.detach().contiguous()
        for index, slots in state.items()
        for name, value in slots.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        _, index, name = key.split(".")
        state.setdefault(int(index), {})[name] = tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, slots in state.items():  # a parameter without gradients has no state
        fits = place < len(parameters) and all(
            t.ndim == 0 or t.shape == parameters[place].shape for t in slots.values()
        )
        if not fits:
            raise CheckpointError(f"the optimizer state of parameter {place} does not fit this run's {len(parameters)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
