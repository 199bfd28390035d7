"""What vokens are trained on that drive a pretrained pipeline: MiniGPT-5's three terms (arXiv 2310.02239).

loss = denoise + align + text, each with its weight. `denoise` goes through the pipeline's frozen denoiser, which reads
the mapper's embeddings; `align` is the distance of those to what the pipeline's own text encoder gives for the caption,
without which vokens are ignored (their ablation); `text` is next-token prediction, whose only label in a voken block is
its begin token.

Dimension key: M voken blocks, N vokens a block, D width, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anygen.data.pictures import NamedPictures
from anygen.data.tasks import DocumentStream
from anygen.documents import Document, Vokens
from anygen.errors import ConfigError
from anygen.evaluation.voken_gap import shuffled
from anygen.model.loss import LossWeights, NextTokenLoss, TensorBatch
from anygen.packing import collate
from anygen.sequence import Sequencer
from anygen.stages.voken_losses import VokenRows, read_vokens
from anygen.training.parts import Part
from anygen.vocabulary import Vocabulary
from decoders.prompt import PromptDecoder
from decoders.prompt_ports import denoiser_of
from tokenizers_mm.codes import Codes


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Packed documents, and picture and caption of each of their voken blocks in order."""

    text: TensorBatch
    pixels_MCHW: Tensor
    """In [0, 1]."""
    captions: tuple[str, ...]
    """The text before each block; "" where there is none."""

    def to(self, device: torch.device) -> PromptBatch:
        """The batch on another device."""
        return replace(self, text=self.text.to(device), pixels_MCHW=self.pixels_MCHW.to(device))


@dataclass(frozen=True)
class PromptData:
    """A stream of documents, and what makes batches of them."""

    stream: DocumentStream
    pictures: NamedPictures
    sequencer: Sequencer
    weights: LossWeights
    text_tokenizer: Any
    documents_per_batch: int

    def batch(self, number: int) -> PromptBatch:
        """Batch `number`: a pure function of it. All its documents are packed into one row as long as they are."""
        first = number * self.documents_per_batch
        documents = [self.stream(first + place)[0] for place in range(self.documents_per_batch)]
        sequences = [self.sequencer.build(document) for document in documents]
        pad_id = self.sequencer.vocabulary.control("pad")
        packed = collate([sequences], sum(len(s) for s in sequences), pad_id=pad_id)
        drawn = [pair for document in documents for pair in self._drawn(document)]
        pixels_MCHW = self.pictures.pixels([name for name, _ in drawn])
        return PromptBatch(self.weights.batch(packed), pixels_MCHW, tuple(caption for _, caption in drawn))

    def _drawn(self, document: Document) -> list[tuple[str, str]]:
        """Name of the picture and caption of every voken block."""
        found, caption = [], ""
        for segment in document.segments:
            if isinstance(segment.content, Vokens):
                found.append((segment.content.key, caption))
            elif segment.modality == "text" and isinstance(segment.content, Codes):
                caption = self.text_tokenizer.decode(segment.content)
        return found


@dataclass(frozen=True)
class PromptWeights:
    """Weights of the terms."""

    denoise: float
    align: float
    text: float
    drop_share: float
    """Share of conditions replaced by the mappers' null; it is aligned to the empty caption."""


class PromptLoss(nn.Module):
    """The loss of a phase.

    Args:
        model: a `Qwen3ForCausalLM`; it is trained where `rows` is None.
        vocabulary: of the model.
        decoder: its mappers are trained; its pipeline is no part of this module, nor of its checkpoints.
        weights: of the terms.
        rows: the trained rows of a frozen model.
        model_lr_ratio: learning rate of rows or model over the mappers'.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        decoder: PromptDecoder,
        *,
        weights: PromptWeights,
        rows: VokenRows | None,
        model_lr_ratio: float,
    ) -> None:
        super().__init__()
        model.requires_grad_(rows is None)
        self.text = NextTokenLoss(model, vocabulary, z_loss=0.0)
        self.rows, self.mappers = rows, decoder.mappers
        self._decoder, self._weights, self._model_lr_ratio = decoder, weights, model_lr_ratio
        self._vokens_N = vocabulary.vokens_N

    @property
    def side_px(self) -> int:
        """Side of the pictures that the pipeline was trained on.

        Raises:
            ConfigError: its config does not say.
        """
        if self._decoder.side_px is None:
            raise ConfigError(
                "the pipeline's config does not say the side of the pictures that it was trained on: "
                "give renderer.side_px"
            )
        return self._decoder.side_px

    def parts(self) -> Sequence[Part]:
        """Model or rows, then the mappers: each has its own clipping, and rows no weight decay."""
        read = self.text if self.rows is None else self.rows
        first = Part(list(read.parameters()), self._model_lr_ratio, decays=self.rows is None)
        return first, Part(list(self.mappers.parameters()))

    def forward(self, batch: PromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, and its terms; a batch without voken pictures is one of text alone."""
        states_MND, text, report = read_vokens(self.text, batch.text, self._vokens_N, rows=self.rows)
        report = {"text": text.detach(), **report}
        if not len(states_MND):  # every parameter has its part, a 0, in every batch's graph
            nothing = sum((p.sum() * 0 for p in self.mappers.parameters()), torch.zeros((), device=text.device))
            return self._weights.text * text + nothing, report
        drop_M = (torch.rand(len(states_MND)) < self._weights.drop_share).to(states_MND.device)
        denoise = self._denoise(states_MND, batch, drop_M)
        align = self._align(states_MND, batch.captions, drop_M)
        loss = self._weights.text * text + self._weights.denoise * denoise + self._weights.align * align
        return loss, report | {"denoise": denoise.detach(), "align": align.detach()}

    @torch.no_grad()
    def gaps(self, batch: PromptBatch, encode: Any = None) -> dict[str, float]:
        """What the denoiser loses with another picture's vokens, under the same noise; {} for less than two pictures.

        `encode`, which a flow decoder's losses take, is not asked for: a pipeline's pictures have no codes.
        """
        states_MND, _, _ = read_vokens(self.text, batch.text, self._vokens_N, rows=self.rows)
        if len(states_MND) < 2:
            return {}
        own, other = (
            self._denoise(states, batch, None, seed=0) for states in (states_MND, states_MND[shuffled(len(states_MND))])
        )
        return {"denoise_gap": float(other - own)}

    def _denoise(
        self, states_MND: Tensor, batch: PromptBatch, drop_M: Tensor | None, *, seed: int | None = None
    ) -> Tensor:
        denoiser = denoiser_of(self._decoder.pipeline)
        if denoiser.device != states_MND.device:  # it is no part of the module that the loop moves
            self._decoder.pipeline.to(states_MND.device)
        generator = torch.Generator(states_MND.device)
        generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        latents = self._decoder.latents_of(batch.pixels_MCHW, generator=generator)
        return self._decoder.denoise_loss(states_MND, latents, drop_M, generator=generator)

    def _align(self, states_MND: Tensor, captions: Sequence[str], drop_M: Tensor) -> Tensor:
        told = [place for place, caption in enumerate(captions) if caption]
        if not told or not self._weights.align:
            return torch.zeros((), device=states_MND.device)
        return self._decoder.align_loss(states_MND[told], [captions[place] for place in told], drop_M[told])
