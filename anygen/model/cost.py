"""What one training step computes, counted from the shapes: the numerator of MFU, and of a recipe's dry run.

A training step costs three forward passes: one forward, two backward. A matrix of n numbers costs 2n FLOPs an id, so
6n; the input embedding is looked up, not multiplied, and counts nothing. Attention costs 12 x layers x heads x head
width x length an id, for a segment of that length (PaLM, arXiv 2204.02311, appendix B). As there, and in the published
figures to compare with, causality is not discounted, nor is recomputation counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class TrainingCost:
    """FLOPs of a `Qwen3Config`'s training.

    >>> cost = TrainingCost(matrices=1000, head=500, attention=96)
    >>> cost.of((2, 3)) == 6 * (1000 + 500) * 5 + 96 * (2 * 2 + 3 * 3)
    True
    >>> cost.of((2, 3), num_predicted=1) == 6 * (1000 * 5 + 500 * 1) + 96 * (2 * 2 + 3 * 3)
    True
    """

    matrices: int
    """Numbers in the matrices of all layers."""
    head: int
    """Numbers in the output matrix."""
    attention: int
    """FLOPs of a pair of ids in all layers."""

    @classmethod
    def of_config(cls, config: Any) -> TrainingCost:
        """Of a `transformers.Qwen3Config`."""
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        per_layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
        return cls(
            matrices=config.num_hidden_layers * per_layer,
            head=config.vocab_size * config.hidden_size,
            attention=4 * FORWARD_AND_BACKWARD * config.num_hidden_layers * queries,
        )

    def of(self, lengths: Iterable[int], *, num_predicted: int | None = None) -> float:
        """FLOPs of a batch of packed segments.

        Args:
            lengths: ids of each segment.
            num_predicted: positions whose logits are computed; all of them by default.
        """
        lengths = tuple(lengths)
        num_ids = sum(lengths)
        predicted = num_ids if num_predicted is None else num_predicted
        products = 2 * FORWARD_AND_BACKWARD * (self.matrices * num_ids + self.head * predicted)
        return float(products + self.attention * sum(length * length for length in lengths))
