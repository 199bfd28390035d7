"""Helpers of the dry runs: figures as they are told, parameters, and what a forward pass keeps for its backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

BYTES_PER_PARAMETER = 16
"""fp32 weight, gradient and AdamW's two moments."""


@dataclass
class Saved:
    """Bytes that autograd keeps, each storage counted once."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all storages."""
        return sum(self.storages.values())


@contextmanager
def counting_saved(modules: Iterable[nn.Module]) -> Iterator[Saved]:
    """Inside, what is saved for the backward is counted, without the weights of `modules`; tensors may be fake."""
    saved = Saved()
    weights = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:  # a transposed weight is saved too, and is the weight
            saved.storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def figure(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def num_parameters(module: nn.Module) -> int:
    """Parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())
