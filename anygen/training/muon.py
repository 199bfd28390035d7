"""Muon (Jordan et al. 2024) for the matrices of repeated blocks, AdamW for everything else, as one optimizer.

Muon orthogonalises the momentum of a matrix, so that an update turns all its directions alike. Embeddings, heads, norms
and biases are no such matrices and stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Joined(torch.optim.Optimizer):
    """Several optimizers with one state and one list of parameter groups, so that they are saved and driven as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        self._sizes = [len(part.param_groups) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._link()

    def _link(self) -> None:
        start = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.state, part.param_groups = self.state, self.param_groups[start : start + size]
            start += size

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every part."""
        assert closure is None, "no optimizer here evaluates the loss again"
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        self._link()


def block_matrices(module: nn.Module) -> list[Tensor]:
    """The trainable matrices inside lists of modules: the layers that a transformer repeats.

    >>> net = nn.ModuleDict({"embed": nn.Linear(2, 4), "blocks": nn.ModuleList([nn.Linear(4, 4)])})
    >>> [tuple(matrix.shape) for matrix in block_matrices(net)]
    [(4, 4)]
    """
    found: dict[int, Tensor] = {}
    for blocks in module.modules():
        if isinstance(blocks, nn.ModuleList):
            found |= {id(p): p for p in blocks.parameters() if p.ndim == 2 and p.requires_grad}
    return list(found.values())
