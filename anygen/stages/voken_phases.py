"""Batches of documents with voken blocks and their pictures, and the trainee of both phases of stage `vokens`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anygen.data.pictures import NamedPictures
from anygen.data.tasks import DocumentStream
from anygen.documents import Document, Vokens
from anygen.model.loss import LossWeights
from anygen.packing import collate
from anygen.seeding import borrowed_randomness
from anygen.sequence import Sequence, Sequencer
from anygen.stages.voken_losses import VokenBatch, VokenLoss

_VALIDATION_BATCHES = 4


@dataclass(frozen=True)
class VokenData:
    """A stream of documents, and what makes batches of them."""

    stream: DocumentStream
    pictures: NamedPictures
    sequencer: Sequencer
    weights: LossWeights
    documents_per_batch: int

    def batch(self, number: int) -> VokenBatch:
        """Batch `number`: a pure function of it. All its documents are packed into one row as long as they are."""
        first = number * self.documents_per_batch
        examples = [self.stream(first + place) for place in range(self.documents_per_batch)]
        sequences = [self.sequencer.build(document, drop_inputs=dropped) for document, dropped in examples]
        return self.of(sequences, [d for d, _ in examples], [dropped for _, dropped in examples])

    def of(self, sequences: list[Sequence], documents: list[Document], dropped: list[bool]) -> VokenBatch:
        """A batch of given documents."""
        vokens = [v for document, drop in zip(documents, dropped, strict=True) for v in _written(document, drop)]
        codes = [v.picture.codes_KT[0].tolist() for v in vokens if v.picture is not None]
        pad_id = self.sequencer.vocabulary.control("pad")
        packed = collate([sequences], sum(len(s) for s in sequences), pad_id=pad_id)
        patches = math.prod(self.sequencer.layout.native_grid_hw)
        return VokenBatch(
            self.weights.batch(packed),
            torch.tensor(codes, dtype=torch.long).reshape(-1, patches),
            self.pictures.pixels([v.key for v in vokens]),
        )


def _written(document: Document, dropped: bool) -> list[Vokens]:
    """The voken blocks of a document that its sequence holds: dropped inputs are not written."""
    first = next(place for place, segment in enumerate(document.segments) if segment.target)
    kept = document.segments[first:] if dropped else document.segments
    return [segment.content for segment in kept if isinstance(segment.content, Vokens)]


class VokenTraining:
    """Trainee of a phase."""

    def __init__(
        self, losses: VokenLoss, train: VokenData, held_out: VokenData, encode: Callable[[Tensor], Tensor]
    ) -> None:
        self.losses, self.train, self.held_out, self.encode = losses, train, held_out, encode
        self.module: nn.Module = losses
        self._number = 0

    def next_batch(self) -> VokenBatch:
        """The next batch, on the CPU."""
        self._number += 1
        return self.train.batch(self._number - 1)

    def to_device(self, batch: VokenBatch, device: torch.device) -> VokenBatch:
        """The batch where the module is."""
        return batch.to(device)

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream of batches."""
        return {"number": self._number}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        self._number = int(state["number"])

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """Losses, text by modality, and the gap between own and other pictures' vokens, on held-out documents."""
        totals: dict[str, list[float]] = {}
        for number in range(_VALIDATION_BATCHES):
            batch = self.held_out.batch(number).to(device)
            with borrowed_randomness(number):  # the same noise each time
                loss, report = module(batch)
                figures = {"loss": loss, **report} | self.losses.gaps(batch, self.encode)
            for name, value in figures.items():
                if name not in ("flops", "tokens", "utilisation") and not math.isnan(float(value)):
                    totals.setdefault(name, []).append(float(value))
        return {name: sum(values) / len(values) for name, values in totals.items()}

    def compile(self) -> None:
        """Compile the repeated blocks."""
        for layer in self.losses.text.model.model.layers:
            layer.compile()
