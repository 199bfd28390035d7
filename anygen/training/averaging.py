"""A running mean of the weights (EMA): steadier than the last ones, which the last few batches pushed about.

All that the optimizer moves is averaged, a discriminator too, and only that. Buffers stay as they are: a codebook is a
running mean already, of what the encoder said lately; where a dead code was replaced, the mean of its two places would
be near neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from anygen.errors import CheckpointError


class WeightAverage:
    """The mean of a module's trainable parameters over about 1 / (1 - decay) steps.

    Args:
        module: where it is trained, at the weights that the mean starts from.
        decay: share of the old mean in the new one; in the first steps less, (1 + step) / (10 + step).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        self._means = {name: weight.clone() for name, weight in self._weights.items()}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The means, by the parameters' names."""
        return self._means

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step 0, 1, ..."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._means.values()), list(self._weights.values()), share)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from saved means.

        Raises:
            CheckpointError: they are of other parameters, or there are none.
        """
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in self._means.items()}:
            raise CheckpointError(
                f"the checkpoint holds means of {len(tensors)} weights that do not fit the {len(self._means)} of this "
                "run: it was trained with another model, or without ema_decay; use another root"
            )
        for name, tensor in tensors.items():
            self._means[name].copy_(tensor)

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the module's weights by their means."""
        _copy(self._means, self._weights)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the means for weights; afterwards its own, to the last bit."""
        own = {name: weight.clone() for name, weight in self._weights.items()}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                _copy(own, self._weights)


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():  # sharded tensors have no foreach copy
        target[name].copy_(tensor)
