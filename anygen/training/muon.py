"""Muon (Jordan et al. 2024) for the matrices of repeated blocks, AdamW for everything else, as one optimizer.

Muon orthogonalises the momentum of a matrix, so that an update turns all its directions alike. Embeddings, heads, norms
and biases are no such matrices and stay with AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anygen.training.precision import is_bf16_fast


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


class Muon(torch.optim.Muon):
    """torch's Muon; on a CPU whose bf16 is slow, with products in fp32."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; the learning rate is matched to AdamW's (Liu et al. 2025)."""
        assert closure is None, "no optimizer here evaluates the loss again"
        if is_bf16_fast(self.param_groups[0]["params"][0].device):
            super().step()
            return
        for group in self.param_groups:
            for matrix in (p for p in group["params"] if p.grad is not None):
                state = self.state[matrix]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(momentum, group["momentum"]), group["ns_coefficients"])
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], *, steps: int = 5) -> Tensor:
    """U V^T of a matrix U S V^T, roughly: Newton-Schulz iteration leaves singular values of about 0.7 to 1.2.

    >>> values = torch.linalg.svdvals(orthogonal(torch.diag(torch.tensor([3.0, 1.0, 0.5])), (3.4445, -4.775, 2.0315)))
    >>> bool(((values > 0.6) & (values < 1.3)).all())
    True
    """
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


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
