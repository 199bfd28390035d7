"""Choosing one id from logits: repetition penalty, temperature, top-k, top-p, min-p, then an exponential race.

Id i waits for a time drawn from Exp(p_i), and the first one wins: this draws from p (the Gumbel-max trick, arXiv
1411.0030). The waits are the sample's own and belong to ids (`anygen.sampling.race`), so a sample does not depend on
its batch: the last bits of the logits, which do, decide only where two ids arrive together. (An inverse of the
cumulative distribution, four times as fast, adds up thousands of such bits; at high guidance 4 of 24 pictures changed
with their batch.)

Names, meaning and order of the options are those of transformers. Dimension key: B rows, A allowed ids.
"""

from __future__ import annotations

from collections.abc import Callable
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
    repetition_penalty: float = 1.0
    """Scores of ids that stand before, in the prompt or the answer, are divided by this where positive and multiplied
    where negative (arXiv 1909.05858); ids that end a block are spared. 1 is off."""
    guidance_scale: float = 1.0
    """Classifier-free guidance on logits: unconditional + scale x (conditional - unconditional); 1 is off."""

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0.0, 100.0),
            "top_k": (0, 2**31),
            "top_p": (1e-6, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-6, 100.0),
            "guidance_scale": (0.0, 100.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
            if not is_number or not low <= value <= high or (name == "top_k" and value != int(value)):
                kind = "an integer" if name == "top_k" else "a number"
                raise InputError(f"{name} must be {kind} from {low} to {high}; got {value!r}")
            object.__setattr__(self, name, int(value) if name == "top_k" else float(value))  # numpy's become Python's

    @property
    def is_greedy(self) -> bool:
        """True where every draw is the same."""
        return self.temperature == 0 or self.top_k == 1

    def override(self, **options: Any) -> SamplingOptions:
        """A copy with the options that are not None."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


OPTION_NAMES = tuple(field.name for field in fields(SamplingOptions))


TEXT_ONLY = ("repetition_penalty",)
"""Options of a call that mean text: a picture repeats its codes with good reason."""
_CHUNK = 1 << 16
"""Numbers at once on a CPU: intermediate results stay in its caches."""


def choose(logits_BA: Tensor, options: SamplingOptions, waits: Callable[[slice], Tensor]) -> Tensor:
    """Index of the chosen id in each row.

    Args:
        logits_BA: fp32 scores of the allowed ids, guidance already applied.
        options: of this modality.
        waits: of a slice of the rows: fp64 times from the exponential distribution of rate 1, for each allowed id.

    >>> logits = torch.log(torch.tensor([[0.1, 0.6, 0.3]]))
    >>> all_waits = [torch.tensor([waits]).double() for waits in ([1, 1, 1], [1, 9, 1])]
    >>> [int(choose(logits, SamplingOptions(), waits.__getitem__)) for waits in all_waits]
    [1, 2]
    """
    if options.temperature == 0:
        return logits_BA.argmax(-1)
    at_once = len(logits_BA) if logits_BA.is_cuda else max(1, _CHUNK // logits_BA.shape[-1])
    rows = [slice(first, first + at_once) for first in range(0, len(logits_BA), at_once)]
    chosen = [(probabilities(logits_BA[these], options) / waits(these)).argmax(-1) for these in rows]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def probabilities(logits_BA: Tensor, options: SamplingOptions) -> Tensor:
    """What ids are drawn with at a temperature above 0: fp64, up to a factor for each row.

    >>> probabilities(torch.log(torch.tensor([[0.1, 0.6, 0.3]])), SamplingOptions(top_k=2)).round(decimals=2).tolist()
    [[0.0, 0.6, 0.3]]
    """
    kept_BA = (logits_BA.double() / options.temperature).softmax(-1)
    if 0 < options.top_k < logits_BA.shape[-1]:
        kept_BA = kept_BA * (kept_BA >= kept_BA.topk(options.top_k, dim=-1).values[:, -1:])
    if options.top_p < 1:
        ordered_BA, index_BA = (kept_BA / kept_BA.sum(-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
        is_in_BA = ordered_BA.cumsum(-1) - ordered_BA < options.top_p
        kept_BA = kept_BA * torch.zeros_like(is_in_BA).scatter(-1, index_BA, is_in_BA)
    if options.min_p > 0:
        kept_BA = kept_BA * (kept_BA >= options.min_p * kept_BA.max(-1, keepdim=True).values)
    return kept_BA


def penalise(logits_A: Tensor, seen_K: Tensor, penalty: float) -> None:
    """Apply a repetition penalty in place, to the allowed ids of these indices.

    >>> logits = torch.tensor([2.0, -2.0, 3.0])
    >>> penalise(logits, torch.tensor([0, 1]), 2.0)
    >>> logits.tolist()
    [1.0, -4.0, 3.0]
    """
    seen = logits_A[seen_K]
    logits_A[seen_K] = torch.where(seen < 0, seen * penalty, seen / penalty)
