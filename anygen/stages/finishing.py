"""Second phase of stage `decoder`: the flow decoder learns through the few steps with which it will draw.

One-step errors are what flow matching minimises; what a user sees is the end of four steps. Gradients pass through
all of them (FlowMo, arXiv 2503.11056, and Layton, arXiv 2503.08377, post-train so), from three errors of the drawing:
squared pixels, SSIM, and the codes that the frozen picture tokenizer reads in it (cross-entropy over its codebook). The
flow loss goes on beside them, so that dropped conditions and guidance stay what they were.

Dimension key: B pictures, C colours, H x W pixels, P patches, V codes of the codebook, X width of a code's vector.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from anygen.config import Config
from anygen.training.loop import LoopConfig
from decoders.flow import flow_loss
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.ssim import structure_loss


class FinishingConfig(Config):
    """How long, and what counts."""

    batch_size: int = Field(16, ge=1)
    steps: int = Field(4, ge=1)
    """Network calls of a drawing, as it will be used."""
    pixel_weight: float = Field(10.0, ge=0)
    structure_weight: float = Field(0.5, ge=0)
    agreement_weight: float = Field(0.1, ge=0)
    """Of the tokenizer's codes: the drawing is to be read as what it was drawn from."""
    temperature: float = Field(0.05, gt=0)
    """Cosine to a code's vector over this is the code's logit."""
    flow_weight: float = Field(0.1, ge=0)
    loop: LoopConfig


class FinishingLoss(nn.Module):
    """Errors of what a decoder draws from right codes.

    Args:
        decoder: a `FlowDecoder` with a driver for codes.
        image: the tokenizer that made the codes; it stays as it is.
        config: weights.
        drop_share: of conditions in the flow loss.
    """

    def __init__(self, decoder: Any, image: ImageTokenizer, config: FinishingConfig, *, drop_share: float) -> None:
        super().__init__()
        self.denoiser, self.codes = decoder.denoiser.requires_grad_(True), decoder.codes.requires_grad_(True)
        self._decoder, self._config, self._drop_share = decoder, config, drop_share
        self._encoder = [image.encoder.requires_grad_(False)]  # in a list: no part of what is trained

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of codes, B x P, and pixels in [0, 1]; and its parts."""
        codes_BP, pixels_BCHW = batch
        config = self._config
        condition = self.codes(codes_BP)
        drawn_BCHW = (self._decoder.draw(condition, steps=config.steps).float() + 1) / 2
        drop_B = (torch.rand(len(codes_BP)) < self._drop_share).to(codes_BP.device)
        parts = {
            "pixels": F.mse_loss(drawn_BCHW, pixels_BCHW),
            "structure": structure_loss(drawn_BCHW, pixels_BCHW),
            "agreement": self._agreement(drawn_BCHW, codes_BP),
            "flow": flow_loss(self.denoiser, pixels_BCHW * 2 - 1, self.codes(codes_BP, drop=drop_B)),
        }
        weights = (config.pixel_weight, config.structure_weight, config.agreement_weight, config.flow_weight)
        loss = torch.stack([w * part for w, part in zip(weights, parts.values(), strict=True)]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _agreement(self, drawn_BCHW: Tensor, codes_BP: Tensor) -> Tensor:
        """Cross-entropy of the codes that the tokenizer reads in a drawing."""
        encoder = self._encoder[0]
        z_BPX = encoder.unquantised(drawn_BCHW.clamp(0, 1))
        with torch.autocast(drawn_BCHW.device.type, enabled=False):
            logits_BPV = z_BPX.float() @ encoder.codebooks_KVX[0].T / self._config.temperature
            return F.cross_entropy(logits_BPV.flatten(0, 1), codes_BP.flatten())
