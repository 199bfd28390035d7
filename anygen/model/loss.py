"""Next-token loss over a packed batch, weighted and reported by modality, with z-loss.

Dimension key: T packed ids, P positions that predict something, C those of one chunk, D width, V vocabulary,
R its ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anygen.model.attention import Segments
from anygen.packing import PackedBatch
from anygen.vocabulary import Vocabulary

_CHUNK = 4096
"""Positions whose logits exist at once."""


@dataclass(frozen=True, eq=False)
class TensorBatch:
    """A `PackedBatch` as tensors on the model's device."""

    ids_T: Tensor
    positions_T: Tensor
    labels_T: Tensor
    weights_T: Tensor
    target_T: Tensor
    """True where the label is part of an answer, not of an input."""
    segments: Segments

    def to(self, device: torch.device) -> TensorBatch:
        """The batch on another device."""
        return TensorBatch(
            self.ids_T.to(device),
            self.positions_T.to(device),
            self.labels_T.to(device),
            self.weights_T.to(device),
            self.target_T.to(device),
            Segments(self.segments.lengths, device),
        )


class LossWeights:
    """Weight of predicting an id, by its modality and by whether it is input or target.

    Args:
        vocabulary: says which modality an id belongs to.
        modalities: weights by name (`text`, `control`, `image`, ...); 1 where not named.
        inputs: factor for ids of input segments; 0 learns the targets only.
    """

    def __init__(self, vocabulary: Vocabulary, modalities: Mapping[str, float], *, inputs: float) -> None:
        self._vocabulary = vocabulary
        weights = [modalities.get(r.group, 1.0) for r in vocabulary.ranges]
        self._weights_R = torch.tensor([*weights, 0.0])  # the unused tail weighs nothing
        self._inputs = inputs

    def batch(self, packed: PackedBatch) -> TensorBatch:
        """A packed batch with its weights."""
        kinds_T = torch.from_numpy(self._vocabulary.range_index(packed.labels_T))
        role_T = torch.from_numpy(packed.target_T).float()
        role_T = role_T + (1 - role_T) * self._inputs
        weights_T = self._weights_R[kinds_T] * role_T * torch.from_numpy(packed.predicts_T)
        return TensorBatch(
            torch.from_numpy(packed.ids_T),
            torch.from_numpy(packed.positions_T),
            torch.from_numpy(packed.labels_T),
            weights_T,
            torch.from_numpy(packed.target_T),
            Segments(packed.lengths, torch.device("cpu")),
        )


class NextTokenLoss(nn.Module):
    """A causal language model with its loss: what training optimises.

    loss = sum_t w_t (-log p(label_t) + z (log Z_t)^2) / sum_t w_t

    The z-loss (PaLM, arXiv 2204.02311) is over the same positions as the labels: shifted with them.

    Args:
        model: a `Qwen3ForCausalLM` with our attention.
        vocabulary: for the report by modality.
        z_loss: z.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, *, z_loss: float) -> None:
        super().__init__()
        self.model = model
        self._z_loss = z_loss
        groups = list(dict.fromkeys(r.group for r in vocabulary.ranges))
        self._groups = groups
        stops = torch.tensor([r.stop for r in vocabulary.ranges])
        group_of_range = torch.tensor([groups.index(r.group) for r in vocabulary.ranges])
        self._stops_R: Tensor
        self._group_R: Tensor
        self.register_buffer("_stops_R", stops, persistent=False)
        self.register_buffer("_group_R", group_of_range, persistent=False)

    def forward(self, batch: TensorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what to report: nats per target id of each modality, and ids per step."""
        hidden_TD = self.model.model(
            input_ids=batch.ids_T[None], position_ids=batch.positions_T[None], segments=batch.segments, use_cache=False
        ).last_hidden_state[0]
        predicts = batch.weights_T > 0
        hidden_PD, labels_P, weights_P = hidden_TD[predicts], batch.labels_T[predicts], batch.weights_T[predicts]
        nll, z = [], []
        for hidden_CD, labels_C in zip(hidden_PD.split(_CHUNK), labels_P.split(_CHUNK), strict=True):
            logits_CV = self.model.lm_head(hidden_CD).float()
            log_z_C = logits_CV.logsumexp(-1)
            nll.append(log_z_C - logits_CV.gather(1, labels_C[:, None])[:, 0])
            z.append(log_z_C.square())
        nll_P, z_P = torch.cat(nll), torch.cat(z)
        loss = (weights_P * (nll_P + self._z_loss * z_P)).sum() / weights_P.sum().clamp_min(1e-8)
        target_P = batch.target_T[predicts]
        report = self._by_modality(nll_P.detach()[target_P], labels_P[target_P])
        report["hidden_norm"] = hidden_TD.detach().float().square().mean().sqrt()
        report["tokens"] = torch.tensor(float(len(batch.ids_T)))
        return loss, report

    def _by_modality(self, nll_P: Tensor, labels_P: Tensor) -> dict[str, Tensor]:
        group_P = self._group_R[
            torch.searchsorted(self._stops_R, labels_P, right=True).clamp_max(len(self._group_R) - 1)
        ]
        counts = torch.bincount(group_P, minlength=len(self._groups))
        sums = torch.bincount(group_P, weights=nll_P, minlength=len(self._groups))
        means = sums / counts  # NaN where a batch has none: left out of the report
        return {f"{name}_nats": means[index] for index, name in enumerate(self._groups)}
