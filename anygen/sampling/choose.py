"""Choosing one id from logits: temperature, top-k, min-p, top-p, then the inverse of the cumulative distribution.

One uniform number decides, drawn from the sample's own CPU generator, so a sample does not depend on the rest of its
batch. Names and meaning of the options are those of transformers. Dimension key: B rows, A allowed ids.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from anygen.errors import InputError


@dataclass(frozen=True)
class SamplingOptions:
    """How ids of one modality are drawn.

    Raises:
        InputError: an option outside its range, by name.
    """

    temperature: float = 1.0
    """0 takes the most likely id."""
    top_k: int = 0
    """Keep the k most likely ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely ids that together have this probability."""
    min_p: float = 0.0
    """Drop ids less likely than this share of the likeliest one (arXiv 2407.01082)."""
    guidance_scale: float = 1.0
    """Classifier-free guidance on logits: unconditional + scale x (conditional - unconditional); 1 is off."""

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0.0, 100.0),
            "top_k": (0, 2**31),
            "top_p": (1e-6, 1.0),
            "min_p": (0.0, 1.0),
            "guidance_scale": (0.0, 100.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high or (name == "top_k" and value != int(value)):
                raise InputError(f"{name} must be a number from {low} to {high}; got {value!r}")

    def override(self, **options: Any) -> SamplingOptions:
        """A copy with the options that are not None."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


OPTION_NAMES = tuple(field.name for field in fields(SamplingOptions))


def choose(logits_BA: Tensor, options: SamplingOptions, uniform_B: Tensor) -> Tensor:
    """Index of the chosen id in each row.

    Args:
        logits_BA: fp32 scores of the allowed ids, guidance already applied.
        options: of this modality.
        uniform_B: fp64 in [0, 1), one number a row.

    >>> logits = torch.log(torch.tensor([[0.1, 0.6, 0.3]]))
    >>> [int(choose(logits, SamplingOptions(), torch.tensor([u]).double())) for u in (0.05, 0.2, 0.95)]
    [0, 1, 2]
    >>> int(choose(logits, SamplingOptions(top_k=2), torch.tensor([0.05]).double()))
    1
    """
    if options.temperature == 0:
        return logits_BA.argmax(-1)
    # fp64 on the CPU: cumulative sums of fp32 would make the last ids unreachable, and devices would differ
    probabilities_BA = (logits_BA.double().cpu() / options.temperature).softmax(-1)
    keep_BA = torch.ones_like(probabilities_BA, dtype=torch.bool)
    if 0 < options.top_k < logits_BA.shape[-1]:
        threshold_B1 = probabilities_BA.topk(options.top_k, dim=-1).values[:, -1:]
        keep_BA &= probabilities_BA >= threshold_B1
    if options.min_p > 0:
        keep_BA &= probabilities_BA >= options.min_p * probabilities_BA.max(-1, keepdim=True).values
    probabilities_BA = probabilities_BA * keep_BA
    if options.top_p < 1:
        probabilities_BA = probabilities_BA / probabilities_BA.sum(-1, keepdim=True)
        ordered_BA, index_BA = probabilities_BA.sort(dim=-1, descending=True, stable=True)
        before_BA = ordered_BA.cumsum(-1) - ordered_BA
        probabilities_BA = torch.zeros_like(ordered_BA).scatter(-1, index_BA, ordered_BA * (before_BA < options.top_p))
    cumulative_BA = probabilities_BA.cumsum(-1)
    target_B1 = uniform_B[:, None].cpu() * cumulative_BA[:, -1:]
    # right=True skips ids of probability 0; the clamp catches rounding at the very end
    last_B1 = (probabilities_BA > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulative_BA, target_B1, right=True), last_B1)[:, 0]
