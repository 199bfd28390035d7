"""Tokenizer weights on disk: JSON facts and safetensors, nothing else; strict about names and shapes.

Weights are rounded to bf16 on the way out (half the size) and computed in fp32 after loading. A tokenizer is rounded
*before* it encodes anything (`rounded`), so what is saved gives exactly the codes that were trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tokenizers_mm.errors import CheckpointError

UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SafetensorError,
    StrictDataclassError,
)
"""What `from_pretrained` raises on damaged folders."""


Module = TypeVar("Module", bound=nn.Module)


def rounded(module: Module, *, keep: tuple[str, ...] = ()) -> Module:
    """Round every floating point tensor of `module` to bf16 in place, but for names that hold one of `keep`."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not any(part in name for part in keep):
                tensor.copy_(tensor.bfloat16())
    return module


def save_weights(folder: Path, modules: dict[str, nn.Module], *, keep: tuple[str, ...] = ()) -> None:
    """Write `model.safetensors`, tensors named `module.parameter`; bf16 but for names that hold one of `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{prefix}.{name}": tensor.detach().contiguous()
        if not tensor.is_floating_point() or any(part in name for part in keep)
        else tensor.detach().bfloat16().contiguous()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")


def shrink(path: Path) -> None:
    """Store the matrices of a safetensors file in bf16 where that loses nothing: who loads it computes as before."""
    tensors = load_file(path)
    half = {name: t.bfloat16() for name, t in tensors.items() if t.dtype == torch.float32 and t.ndim > 1}
    exact = {name: short for name, short in half.items() if torch.equal(short.float(), tensors[name])}
    save_file(tensors | exact, path, {"format": "pt"})


def load_weights(folder: Path, modules: dict[str, nn.Module]) -> None:
    """Fill modules from what `save_weights` wrote.

    Raises:
        CheckpointError: the file is missing or broken, or has other names or shapes than the modules.
    """
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    for prefix, module in modules.items():
        part = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
        expected = module.state_dict()
        if part.keys() != expected.keys():
            odd = sorted(part.keys() ^ expected.keys())
            raise CheckpointError(
                f"{path} does not fit its configuration: tensor {prefix}.{odd[0]} is missing or unknown"
            )
        for name, tensor in part.items():
            if tensor.shape != expected[name].shape:
                raise CheckpointError(
                    f"{path}: {prefix}.{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
                )
        module.load_state_dict(part)


def save_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_facts(folder: Path, *, kind: str) -> dict[str, Any]:
    """Read `config.json` and check its `kind`.

    Raises:
        CheckpointError: missing, broken, or of another kind.
    """
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"no {kind} tokenizer in {folder}: {error}") from error
    if not isinstance(facts, dict) or facts.get("kind") != kind:
        found = facts.get("kind") if isinstance(facts, dict) else type(facts).__name__
        raise CheckpointError(f"{folder / 'config.json'} is of kind {found!r}, expected {kind!r}")
    return facts
