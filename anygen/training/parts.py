"""Parts of a module that are trained each in its own way: own learning rate, own gradient clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True, eq=False)
class Part:
    """Parameters that are clipped together."""

    parameters: Sequence[nn.Parameter]
    lr_ratio: float = 1.0
    """Their learning rate over the optimizer's."""
    decays: bool = True
    """False keeps weight decay off them."""


@runtime_checkable
class InParts(Protocol):
    """A module that says its parts; one that does not is a single part."""

    def parts(self) -> Sequence[Part]:
        """Every trainable parameter, in one of them."""
        ...


@runtime_checkable
class Sparing(Protocol):
    """A module whose steps do not all use every parameter: a discriminator that starts late, a tower without data."""

    spares_parameters: bool


def parts_of(module: nn.Module) -> Sequence[Part]:
    """The parts of a module, trainable parameters only."""
    whole = [Part(list(module.parameters()))]
    parts = module.parts() if isinstance(module, InParts) else whole
    return [Part([p for p in part.parameters if p.requires_grad], part.lr_ratio, part.decays) for part in parts]
