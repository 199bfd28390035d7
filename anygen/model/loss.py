"""Next-token loss over a packed batch, weighted and reported by modality, with z-loss.

Dimension key: T packed ids, P positions that predict something, D width, V vocabulary, R its ranges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anygen.model.cost import TrainingCost
from anygen.model.cross_entropy import Slice, cross_entropy
from anygen.model.segments import Segments
from anygen.packing import PackedBatch
from anygen.vocabulary import Vocabulary


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
    normaliser: Tensor | None = None
    """0-d: what the weighted sum is divided by; None is the sum of the batch's own weights."""
    num_padding: int = 0
    """Ids among the T that are padding."""

    @property
    def total_weight(self) -> Tensor:
        """What the weighted sum is divided by where no `normaliser` is given."""
        return self.weights_T.sum()

    def divided_by(self, normaliser: Tensor) -> TensorBatch:
        """The batch with another normaliser: with a common one the losses of parts add up to that of the whole."""
        return replace(self, normaliser=normaliser)

    def to(self, device: torch.device) -> TensorBatch:
        """The batch on another device."""
        return TensorBatch(
            self.ids_T.to(device),
            self.positions_T.to(device),
            self.labels_T.to(device),
            self.weights_T.to(device),
            self.target_T.to(device),
            Segments(self.segments.lengths, device),
            None if self.normaliser is None else self.normaliser.to(device),
            self.num_padding,
        )


class LossWeights:
    """Weight of predicting an id, by its modality and by whether it is input or target.

    Args:
        vocabulary: says which modality an id belongs to.
        modalities: weights by name (`text`, `control`, `image`, ...); 1 where not named. Vokens and the end of their
            block weigh nothing: sampling never chooses them, only their begin token is a decision.
        inputs: factor for ids of input segments; 0 learns the targets only.
    """

    def __init__(self, vocabulary: Vocabulary, modalities: Mapping[str, float], *, inputs: float) -> None:
        self._vocabulary = vocabulary
        weights = [0.0 if r.group == "voken" else modalities.get(r.group, 1.0) for r in vocabulary.ranges]
        self._weights_R = torch.tensor([*weights, 0.0])  # the unused tail weighs nothing
        self._inputs = inputs
        self._voken_end = vocabulary.control("/voken")

    def batch(self, packed: PackedBatch) -> TensorBatch:
        """A packed batch with its weights."""
        kinds_T = torch.from_numpy(self._vocabulary.range_index(packed.labels_T))
        role_T = torch.from_numpy(packed.target_T).float()
        role_T = role_T + (1 - role_T) * self._inputs
        weights_T = self._weights_R[kinds_T] * role_T * torch.from_numpy(packed.predicts_T)
        weights_T = weights_T * torch.from_numpy(packed.labels_T != self._voken_end)
        return TensorBatch(
            torch.from_numpy(packed.ids_T),
            torch.from_numpy(packed.positions_T),
            torch.from_numpy(packed.labels_T),
            weights_T,
            torch.from_numpy(packed.target_T),
            Segments(packed.lengths, torch.device("cpu")),
            num_padding=packed.num_padding,
        )


class NextTokenLoss(nn.Module):
    """A causal language model with its loss: what training optimises.

    loss = sum_t w_t (-log p(label_t) + z (log Z_t)^2) / sum_t w_t

    The z-loss (PaLM, arXiv 2204.02311) is over the same positions as the labels: shifted with them.

    With `sliced_softmax` the softmax of a code (of a picture, a sound or a box) runs over its own range of ids: there
    the grammar of sampling allows nothing else, so p is what is sampled from. All other ids, among them the numbers and
    end tokens of media blocks, keep the softmax over the vocabulary. Nats of the two kinds do not compare.

    Args:
        model: a `Qwen3ForCausalLM` with our attention.
        vocabulary: for the report by modality, and the slices.
        z_loss: z.
        sliced_softmax: as above.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, *, z_loss: float, sliced_softmax: bool = False) -> None:
        super().__init__()
        self.model = model
        self._z_loss = z_loss
        groups = list(dict.fromkeys(r.group for r in vocabulary.ranges))
        self._groups = groups
        self._cost = TrainingCost.of_config(model.config)
        codes = set(vocabulary.modalities) - {"text"}
        self._own_slices = [r for r in vocabulary.ranges if r.group in codes] if sliced_softmax else []
        stops = torch.tensor([r.stop for r in vocabulary.ranges])
        group_of_range = torch.tensor([groups.index(r.group) for r in vocabulary.ranges])
        self._stops_R: Tensor
        self._group_R: Tensor
        self.register_buffer("_stops_R", stops, persistent=False)
        self.register_buffer("_group_R", group_of_range, persistent=False)

    def forward(self, batch: TensorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what to report: nats per target id of each modality, size of the hidden states, rows."""
        with _rms_before(self.model.model.norm) as rms:
            hidden_TD = self.read(batch)
        loss, report = self.score(hidden_TD, batch, self.model.lm_head.weight)
        return loss, report | {"hidden_norm": rms[0]}

    def read(self, batch: TensorBatch, embed_VD: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, T x D; `embed_VD` takes the place of the input matrix."""
        ids_1T = batch.ids_T[None]
        inputs = {"input_ids": ids_1T} if embed_VD is None else {"inputs_embeds": F.embedding(ids_1T, embed_VD)}
        hidden_1TD: Tensor = self.model.model(
            **inputs,
            position_ids=batch.positions_T[None],
            segments=batch.segments,
            use_cache=False,
        ).last_hidden_state
        return hidden_1TD[0]

    def score(self, hidden_TD: Tensor, batch: TensorBatch, head_VD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, with `head_VD` as the output matrix, and what to report of it."""
        predicts = batch.weights_T > 0
        labels_P, weights_P = batch.labels_T[predicts], batch.weights_T[predicts]
        normaliser = weights_P.sum() if batch.normaliser is None else batch.normaliser
        result = cross_entropy(
            hidden_TD[predicts],
            head_VD,
            labels_P,
            weights_P / normaliser.clamp_min(1e-8),
            z_loss=self._z_loss,
            slices=self._slices(labels_P),
        )
        target_P = batch.target_T[predicts]
        report = self._by_modality(result.nll_P[target_P], labels_P[target_P])
        report["flops"] = torch.tensor(self._cost.of(batch.segments.lengths, num_predicted=len(labels_P)))
        report["tokens"] = torch.tensor(float(len(batch.ids_T)))
        report["utilisation"] = torch.tensor(1 - batch.num_padding / max(1, len(batch.ids_T)))
        return result.loss, report

    def _slices(self, labels_P: Tensor) -> list[Slice] | None:
        if not self._own_slices:
            return None
        elsewhere_P = torch.ones_like(labels_P, dtype=torch.bool)
        slices = []
        for r in self._own_slices:
            inside_P = (labels_P >= r.start) & (labels_P < r.stop)
            elsewhere_P &= ~inside_P
            slices.append(Slice(inside_P.nonzero()[:, 0], r.start, r.stop))
        return [*slices, Slice(elsewhere_P.nonzero()[:, 0], 0, len(self.model.lm_head.weight))]

    def _by_modality(self, nll_P: Tensor, labels_P: Tensor) -> dict[str, Tensor]:
        group_P = self._group_R[
            torch.searchsorted(self._stops_R, labels_P, right=True).clamp_max(len(self._group_R) - 1)
        ]
        counts = torch.bincount(group_P, minlength=len(self._groups))
        sums = torch.bincount(group_P, weights=nll_P, minlength=len(self._groups))
        means = sums / counts  # NaN where a batch has none: left out of the report
        return {f"{name}_nats": means[index] for index, name in enumerate(self._groups)}


@contextlib.contextmanager
def _rms_before(norm: nn.Module) -> Iterator[list[Tensor]]:
    """Root mean square of what comes into a norm: after it growth no longer shows."""
    found: list[Tensor] = []
    hook = norm.register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].detach().float().square().mean().sqrt())
    )
    try:
        yield found
    finally:
        hook.remove()
