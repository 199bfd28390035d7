"""Retrieve or draw, as an option of stage `vokens`: GILL's head (arXiv 2305.17216) on the finished, frozen vokens.

The recipe says which kinds of record an index of pictures will hold (`library`). A document that asks for a picture of
another kind is one to draw; so the decision is taught without GILL's human votes (deviation). Pictures' features are
what the picture tokenizer's encoder finds before quantising.

Dimension key: M voken blocks, N vokens a block, D width, F features of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from anygen.config import Config
from anygen.documents import Vokens
from anygen.stages.voken_losses import VokenBatch
from anygen.stages.voken_phases import VokenData
from anygen.training.loop import LoopConfig
from anygen.training.parts import Part
from decoders.retrieval import DRAW, RETRIEVE, RetrievalHead


class RetrievalConfig(Config):
    """The head, and what it is taught."""

    library: tuple[str, ...] = Field(min_length=1)
    """Kinds of record whose pictures an index will hold; pictures of other kinds are drawn."""
    embed_dim: int = Field(256, ge=1)
    drop: float = Field(0.5, ge=0, lt=1)
    """Dropout in front of the decision."""
    loop: LoopConfig


@dataclass(frozen=True, eq=False)
class RetrievalBatch:
    """A batch of stage `vokens`, and what to do for each of its pictures."""

    vokens: VokenBatch
    labels_M: Tensor
    """`RETRIEVE` or `DRAW`."""

    def to(self, device: torch.device) -> RetrievalBatch:
        """The batch on another device."""
        return replace(self, vokens=self.vokens.to(device), labels_M=self.labels_M.to(device))


@dataclass(frozen=True)
class RetrievalData:
    """Batches of stage `vokens` with the decision of each."""

    data: VokenData
    library: frozenset[str]
    """Keys of the records that the index will hold."""

    def batch(self, number: int) -> RetrievalBatch:
        """Batch `number`: a pure function of it."""
        size = self.data.documents_per_batch
        documents = [self.data.stream(number * size + place)[0] for place in range(size)]
        sequences = [self.data.sequencer.build(document) for document in documents]
        keys = [s.content.key for d in documents for s in d.segments if isinstance(s.content, Vokens)]
        labels = [RETRIEVE if key in self.library else DRAW for key in keys]
        return RetrievalBatch(self.data.of(sequences, documents, [False] * size), torch.tensor(labels))


def features_of(image: Any, pixels_MCHW: Tensor) -> Tensor:
    """What the picture tokenizer finds in pictures, M x F: for training, and for an index."""
    with torch.no_grad():
        found: Tensor = image.to(pixels_MCHW.device).encoder.unquantised(pixels_MCHW).float()
    return found.flatten(1)


class RetrievalLoss(nn.Module):
    """InfoNCE between vokens and the pictures of the library, and the decision.

    Args:
        head: what is trained.
        read: a batch to hidden states at its vokens, M x N x D; nothing of it is trained.
        image: the picture tokenizer.
    """

    def __init__(self, head: RetrievalHead, read: Callable[[VokenBatch], Tensor], image: Any) -> None:
        super().__init__()
        self.head, self._read, self._image = head, read, image

    def parts(self) -> Sequence[Part]:
        """The head."""
        return (Part(list(self.head.parameters())),)

    def forward(self, batch: RetrievalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms."""
        states_MND, features_MF, is_in_M = self._given(batch)
        decision = self.head.decision_loss(states_MND, batch.labels_M)
        if not is_in_M.any():
            return decision + 0 * sum(p.sum() for p in self.head.parameters()), {"decision": decision.detach()}
        contrast = self.head.contrastive_loss(states_MND[is_in_M], features_MF[is_in_M], _same(batch)[is_in_M])
        return contrast + decision, {"contrast": contrast.detach(), "decision": decision.detach()}

    @torch.no_grad()
    def gaps(self, batch: RetrievalBatch, encode: Any = None) -> dict[str, float]:
        """Share of decisions that are right, and of pictures found first among those of the batch's library."""
        states_MND, features_MF, is_in_M = self._given(batch)
        figures = {"decided": float((self.head.decide(states_MND).argmax(-1) == batch.labels_M).float().mean())}
        if is_in_M.any():
            index = self.head.index(features_MF[is_in_M], [""] * int(is_in_M.sum()))
            found, same = self.head.rank(states_MND[is_in_M], index).argmax(-1), _same(batch)[is_in_M]
            figures["found"] = float((same[found] == same).float().mean())
        return figures

    def _given(self, batch: RetrievalBatch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            states_MND = self._read(batch.vokens)
        return states_MND, features_of(self._image, batch.vokens.pixels_MCHW), batch.labels_M == RETRIEVE


def _same(batch: RetrievalBatch) -> Tensor:
    """A number for each picture, M: equal codes are one picture, and no negatives of each other."""
    number_M: Tensor = batch.vokens.codes_MP.unique(dim=0, return_inverse=True)[1]
    return number_M
