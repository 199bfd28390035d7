"""Choosing one id from logits: temperature, top-k, top-p, min-p, then an exponential race.

Id i waits for a time drawn from Exp(p_i), and the first one wins: this draws from p (the Gumbel-max trick, arXiv
1411.0030). The waits come from the sample's own CPU generator and belong to ids, so a sample does not depend on its
batch: the last bits of the logits, which do, decide only where two ids arrive together. (An inverse of the cumulative
distribution adds up thousands of such bits; at high guidance 4 of 24 pictures changed with their batch.)

Names, meaning and order of the options are those of transformers. Dimension key: B rows, A allowed ids.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
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
            is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
            if not is_number or not low <= value <= high or (name == "top_k" and value != int(value)):
                kind = "an integer" if name == "top_k" else "a number"
                raise InputError(f"{name} must be {kind} from {low} to {high}; got {value!r}")
            object.__setattr__(self, name, int(value) if name == "top_k" else float(value))  # numpy's become Python's

    def override(self, **options: Any) -> SamplingOptions:
        """A copy with the options that are not None."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


OPTION_NAMES = tuple(field.name for field in fields(SamplingOptions))


def choose(logits_BA: Tensor, options: SamplingOptions, waits_BA: Tensor) -> Tensor:
    """Index of the chosen id in each row.

    Args:
        logits_BA: fp32 scores of the allowed ids, guidance already applied.
        options: of this modality.
        waits_BA: fp64, drawn from the exponential distribution of rate 1.

    >>> logits = torch.log(torch.tensor([[0.1, 0.6, 0.3]]))
    >>> [int(choose(logits, SamplingOptions(), torch.tensor([waits]).double())) for waits in ([1, 1, 1], [1, 9, 1])]
    [1, 2]
    """
    if options.temperature == 0:
        return logits_BA.argmax(-1)
    return (probabilities(logits_BA, options) / waits_BA).argmax(-1)


def probabilities(logits_BA: Tensor, options: SamplingOptions) -> Tensor:
    """What ids are drawn with at a temperature above 0: fp64, on the CPU, up to a factor for each row.

    >>> probabilities(torch.log(torch.tensor([[0.1, 0.6, 0.3]])), SamplingOptions(top_k=2)).round(decimals=2).tolist()
    [[0.0, 0.6, 0.3]]
    """
    kept_BA = (logits_BA.double().cpu() / options.temperature).softmax(-1)
    if 0 < options.top_k < logits_BA.shape[-1]:
        kept_BA = kept_BA * (kept_BA >= kept_BA.topk(options.top_k, dim=-1).values[:, -1:])
    if options.top_p < 1:
        ordered_BA, index_BA = (kept_BA / kept_BA.sum(-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
        is_in_BA = ordered_BA.cumsum(-1) - ordered_BA < options.top_p
        kept_BA = kept_BA * torch.zeros_like(is_in_BA).scatter(-1, index_BA, is_in_BA)
    if options.min_p > 0:
        kept_BA = kept_BA * (kept_BA >= options.min_p * kept_BA.max(-1, keepdim=True).values)
    return kept_BA
