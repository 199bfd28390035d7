"""Training state on disk: atomic, checked, without pickle.

A checkpoint is a folder `step-00001234` with every tensor of module and optimizer, named, in safetensors (one file, or
one a process where the module is sharded), everything else in JSON, and a manifest of checksums
(`anygen.files.publishing`). Loading takes the newest one that verifies, whatever number of processes wrote it.
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
from torch import Tensor, nn

from anygen.errors import CheckpointError
from anygen.files import publishing, read_json, remove_leftovers, verify, write_json
from anygen.training import processes, sharding
from anygen.training.sharding import ONE_FILE

logger = logging.getLogger("anygen")
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Restored:
    """Where training goes on."""

    step: int
    """The next step to do."""
    extra: dict[str, Any]
    averages: dict[str, Tensor]
    """Both as they were passed to `save`; of a sharded module this process's slices."""


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    *,
    averages: Mapping[str, Tensor] | None = None,
    keep: int = 2,
    sharded: bool = False,
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
        sharded: every process calls this and writes its slices; otherwise only one process calls.

    Raises:
        CheckpointError: the disk is full or not writable; what was there before is intact.
    """
    path = folder / f"step-{step:08d}"
    means = {f"average.{name}": tensor for name, tensor in (averages or {}).items()}
    tensors = {**_module_tensors(module), **_optimizer_tensors(module, optimizer), **means}
    try:
        with sharding.publishing_together(path) if sharded else publishing(path) as temporary:
            if sharded:
                sharding.write(tensors, temporary)
            else:
                save_file({name: t.contiguous() for name, t in tensors.items()}, temporary / ONE_FILE)
            if not sharded or processes.rank() == 0:
                write_json(temporary / "state.json", {"step": step, "extra": extra})
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free // 2**20 if folder.exists() else 0
        raise CheckpointError(f"cannot save {path} ({free} MiB free): {error}") from error
    if not sharded or processes.rank() == 0:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def restore(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool = False
) -> Restored | None:
    """Load the newest undamaged checkpoint; None where there are no checkpoints. Every process of a run calls this.

    Raises:
        CheckpointError: it is undamaged but does not fit this module or optimizer; or all are damaged: the run does not
        quietly begin anew.
    """
    if processes.rank() == 0:
        remove_leftovers(folder)
    newest, damaged = processes.told(_newest(folder) if processes.rank() == 0 else None)
    if newest:
        return _load(Path(newest), module, optimizer, sharded=sharded)
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}): bring one back from a copy, or remove "
            "the folder to begin anew"
        )
    return None


def start_from(folder: Path, module: nn.Module, *, sharded: bool = False) -> None:
    """Give a module the newest weights of another training, their running means where it kept such.

    Raises:
        CheckpointError: there is no undamaged checkpoint, or it does not fit this module.
    """
    newest, damaged = processes.told(_newest(folder) if processes.rank() == 0 else None)
    if not newest:
        found = f"only damaged ones ({', '.join(damaged)})" if damaged else "none"
        raise CheckpointError(f"start_from: expected checkpoints of an earlier training in {folder}, found {found}")
    _load_module(Path(newest), module, sharded=sharded, means=True)
    logger.info("beginning with the weights of %s", newest)


def _newest(folder: Path) -> tuple[str, list[str]]:
    """The newest undamaged checkpoint, if any, and the names of the damaged ones after it."""
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
            damaged.append(path.name)
        else:
            return str(path), damaged
    return "", damaged


def _load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool) -> Restored:
    state = read_json(path / "state.json")
    tensors = _load_module(path, module, sharded=sharded)
    try:
        _load_optimizer(module, optimizer, {n: t for n, t in tensors.items() if n.startswith("optimizer.")})
        means = _named(tensors, "average.")
        step, extra = state["step"], state["extra"]
        if type(step) is not int or step < 0 or not isinstance(extra, dict):
            raise CheckpointError(f"{path / 'state.json'} was altered: step is {step!r}, extra is {extra!r:.80}")
        return Restored(step, extra, means)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not fit this run: {error}") from error


def _load_module(path: Path, module: nn.Module, *, sharded: bool, means: bool = False) -> dict[str, Tensor]:
    """Weights into the module, with `means` the running means in their place; returns all tensors of the checkpoint."""
    try:
        tensors = _read_slices(path, module) if sharded else _read_whole(path)
        found = _named(tensors, "module.")
        expected = _named(_module_tensors(module), "module.")
        if expected.keys() != found.keys():
            odd = sorted(expected.keys() ^ found.keys())
            raise CheckpointError(f"{path} is of another model: {len(odd)} tensors differ, {odd[0]!r} first")
        module.load_state_dict(found | (_named(tensors, "average.") if means else {}), strict=False)
        return tensors
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not fit this run: {error}") from error


def _named(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}


def _read_whole(path: Path) -> dict[str, Tensor]:
    if (path / ONE_FILE).exists():
        return load_file(path / ONE_FILE)
    tensors = {name: torch.zeros(shape) for name, shape in sharding.shapes_in(path).items()}
    sharding.read(tensors, path)
    return tensors


def _read_slices(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Tensors that are sliced as the module's weights are."""
    parameters = dict(module.named_parameters())
    tensors = _module_tensors(module)
    for name, shape in sharding.shapes_in(path).items():
        kind, _, rest = name.partition(".")
        if kind == "average":
            tensors[name] = torch.zeros_like(parameters[rest])
        elif kind == "optimizer":
            parameter, slot = rest.rsplit(".", 1)
            tensors[name] = torch.zeros(shape) if slot == "step" else torch.zeros_like(parameters[parameter])
    tensors = {name: torch.empty_like(t) if name.startswith("module.") else t for name, t in tensors.items()}
    sharding.read(tensors, path)
    return tensors


def _module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """State by name; of tensors that share memory (tied embeddings) only the first."""
    own = sharding.own_names(module)
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict().items():
        place = getattr(tensor, "_local_tensor", tensor).data_ptr()
        if name not in own or (tensor.numel() and place in seen):
            continue
        seen.add(place)
        tensors[f"module.{name}"] = tensor.detach()
    return tensors


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        f"optimizer.{names[id(parameter)]}.{slot}": value.detach()
        for parameter in _parameters_of(optimizer)
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = _parameters_of(optimizer)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    places = {names[id(parameter)]: place for place, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, slot = key.removeprefix("optimizer.").rsplit(".", 1)
        # the first checkpoints numbered their parameters
        place = int(name) if name.isdecimal() else places.get(name, -1)
        whole = tensor.reshape(()) if slot == "step" else tensor
        fits = 0 <= place < len(parameters) and (whole.ndim == 0 or whole.shape == parameters[place].shape)
        if not fits:
            raise CheckpointError(f"the optimizer state of parameter {name} does not fit this run's {len(parameters)}")
        state.setdefault(place, {})[slot] = whole
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
