"""VQ-KD: a ViT whose quantised outputs predict a frozen teacher's features (BEiT v2, arXiv 2208.06366).

    pixels -> ViT -> Linear-Tanh-Linear -> codes on the unit sphere
    codes -> ViT -> Linear-Tanh-Linear -> the teacher's features (cosine)

Deviations from BEiT v2, each measured (reference figures: 9 % -> 100 % of the codebook used, +5 dB of drawable detail):
dead codes are replaced, with a threshold set from the mean hits a code gets; gradients pass by the rotation trick
(arXiv 2410.06424); a shallow teacher layer is predicted beside the deep one, so that codes can be drawn.

Dimension key: B pictures, N patches, D width, X code dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from tokenizers_mm.config import Config
from tokenizers_mm.pixels import PixelHead
from tokenizers_mm.teacher import TeacherFeatures
from tokenizers_mm.vit import PatchEncoder, Transformer, check_width


class VQKDConfig(Config):
    """Architecture of encoder and codebook; saved with the tokenizer."""

    side_px: int = Field(64, ge=1)
    """Native side of a picture."""
    patch_px: int = Field(8, ge=1)
    width: int = Field(192, ge=1)
    depth: int = Field(4, ge=1)
    num_heads: int = Field(6, ge=1)
    codebook_size: int = Field(1024, ge=2)
    code_dim: int = Field(16, ge=1)
    decoder_depth: int = Field(1, ge=1)
    """Of the transformer from codes to the teacher's features, which serves training only."""
    ema_decay: float = Field(0.99, gt=0, lt=1)
    dead_code_share: float = Field(0.25, ge=0, lt=1)
    """A code is replaced when its average hits fall below this share of the mean, batch x patches / codebook size."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.side_px % self.patch_px:
            raise ValueError(f"side_px={self.side_px} must be a multiple of patch_px={self.patch_px}")
        check_width(self.width, self.num_heads)
        return self


@dataclass(frozen=True)
class VQKDLosses:
    """Losses of one batch, each a mean over patches."""

    deep: Tensor
    shallow: Tensor
    commitment: Tensor
    pixels: Tensor
    codes_BN: Tensor


class PictureEncoder(nn.Module):
    """Pixels to codes: what remains of VQ-KD after training."""

    def __init__(self, config: VQKDConfig, *, tokens_per_batch: int = 0) -> None:
        super().__init__()
        self.encoder = PatchEncoder(config.width, config.depth, config.num_heads, config.patch_px)
        self.to_code = task_layer(config.width, config.code_dim)
        mean_hits = tokens_per_batch / config.codebook_size
        self.quantizer = VectorQuantize(
            dim=config.code_dim,
            codebook_size=config.codebook_size,
            use_cosine_sim=True,
            decay=config.ema_decay,
            kmeans_init=True,
            kmeans_iters=10,
            rotation_trick=True,
            threshold_ema_dead_code=config.dead_code_share * mean_hits,
            commitment_weight=1.0,
        )

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels in [0, 1] to (quantised B x N x X, codes B x N, commitment loss)."""
        z_BNX = self.to_code(self.encoder(pixels_BCHW))
        # The quantiser always works in fp32: under bf16 autocast 2.6 % of the codes change.
        with torch.autocast(pixels_BCHW.device.type, enabled=False):
            quantised_BNX, codes_BN, commitment = self.quantizer(z_BNX.float())
        return quantised_BNX, codes_BN, commitment.sum()

    @property
    def codebook_KX(self) -> Tensor:
        """The codes' vectors, on the unit sphere."""
        codebook: Tensor = self.quantizer.codebook
        return codebook


class VQKD(nn.Module):
    """The whole of training: encoder, quantiser, and decoder to the teacher's features.

    Args:
        config: architecture.
        teacher_width: channels of the teacher's features.
        tokens_per_batch: pictures times patches of one training batch; sets the dead-code threshold.
        pixel_head: also learn to draw from the codes while they form (gradients reach the encoder); None trains on
        the teacher alone.
    """

    def __init__(
        self, config: VQKDConfig, *, teacher_width: int, tokens_per_batch: int, pixel_head: PixelHead | None = None
    ) -> None:
        super().__init__()
        self.encoder = PictureEncoder(config, tokens_per_batch=tokens_per_batch)
        self.from_code = nn.Linear(config.code_dim, config.width)
        self.decoder = Transformer(config.width, config.decoder_depth, config.num_heads)
        self.to_deep = task_layer(config.width, teacher_width)
        self.to_shallow = task_layer(config.width, teacher_width)
        self.pixel_head = pixel_head
        self.patch_px = config.patch_px

    def forward(self, pixels_BCHW: Tensor, target: TeacherFeatures) -> VQKDLosses:
        """Losses of one batch of pixels in [0, 1]."""
        grid_hw = (pixels_BCHW.shape[2] // self.patch_px, pixels_BCHW.shape[3] // self.patch_px)
        quantised_BNX, codes_BN, commitment = self.encoder(pixels_BCHW)
        decoded_BND = self.decoder(self.from_code(quantised_BNX), grid_hw)
        pixels = torch.zeros((), device=pixels_BCHW.device)
        if self.pixel_head is not None:
            pixels = F.mse_loss(self.pixel_head(quantised_BNX, grid_hw).float(), pixels_BCHW)
        return VQKDLosses(
            cosine_loss(self.to_deep(decoded_BND), target.deep_BND),
            cosine_loss(self.to_shallow(decoded_BND), target.shallow_BND),
            commitment,
            pixels,
            codes_BN,
        )


def task_layer(width_in: int, width_out: int) -> nn.Sequential:
    """Linear-Tanh-Linear, as BEiT v2 has it on both sides of the codes."""
    return nn.Sequential(nn.Linear(width_in, width_in), nn.Tanh(), nn.Linear(width_in, width_out))


def cosine_loss(predicted_BND: Tensor, target_BND: Tensor) -> Tensor:
    """1 - cosine, mean over patches (BEiT v2, equation 2)."""
    return 1 - F.cosine_similarity(predicted_BND.float(), target_BND, dim=-1).mean()
