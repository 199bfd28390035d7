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

from tokenizers_mm.config import Config
from tokenizers_mm.features import FeatureDecoder, FeatureDecoderConfig, cosine_loss, task_layer
from tokenizers_mm.pixels import PixelHead, neighbour_loss
from tokenizers_mm.quantizer import QuantizerConfig, codebooks_of, is_started, make_quantizer
from tokenizers_mm.ssim import structure_loss
from tokenizers_mm.teacher import TeacherConfig, TeacherFeatures
from tokenizers_mm.vit import PatchEncoder, check_width


class VQKDConfig(Config):
    """Architecture of encoder and codebook; saved with the tokenizer."""

    side_px: int = Field(64, ge=1)
    """Native side of a picture."""
    patch_px: int = Field(8, ge=1)
    width: int = Field(192, ge=1)
    depth: int = Field(4, ge=1)
    num_heads: int = Field(6, ge=1)
    margin_px: int | None = Field(None, ge=0, exclude_if=lambda margin: margin is None)
    """How far around its patch a code sees; None: the whole picture. A local code means the same wherever it stands."""
    codebook_size: int = Field(1024, ge=2)
    code_dim: int = Field(16, ge=1)
    decoder_depth: int = Field(1, ge=1)
    """Of the transformer from codes to the teacher's features, which serves training only."""
    ema_decay: float = Field(0.99, gt=0, lt=1)
    dead_code_share: float = Field(0.25, ge=0, lt=1)
    """A code is replaced when its average hits fall below this share of the mean, batch x patches / codebook size."""
    quantizer: QuantizerConfig = QuantizerConfig()

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
    structure: Tensor
    neighbours: Tensor
    codes: Tensor | None
    """B x N, or B x K x N with several codebooks; None where nothing was quantised."""


class PictureEncoder(nn.Module):
    """Pixels to codes: what remains of VQ-KD after training."""

    def __init__(self, config: VQKDConfig, *, tokens_per_batch: int = 0) -> None:
        super().__init__()
        self.encoder = PatchEncoder(config.width, config.depth, config.num_heads, config.patch_px, config.margin_px)
        self.to_code = task_layer(config.width, config.code_dim)
        self._on_sphere = config.quantizer.distance == "cosine"
        self.quantizer = make_quantizer(
            config.quantizer,
            dim=config.code_dim,
            codebook_size=config.codebook_size,
            decay=config.ema_decay,
            dead_hits=config.dead_code_share * tokens_per_batch / config.codebook_size,
        )

    def unquantised(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in [0, 1] to B x N x X, where the codes will be: on the unit sphere if they are compared by cosine."""
        states_BND = self.encoder(pixels_BCHW)
        with torch.autocast(pixels_BCHW.device.type, enabled=False):
            z_BNX: Tensor = self.to_code(states_BND.float())
            return F.normalize(z_BNX, dim=-1) if self._on_sphere else z_BNX

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels in [0, 1] to (quantised B x N x X, codes B x N or B x K x N, commitment loss)."""
        states_BND = self.encoder(pixels_BCHW)
        # The task layer and the quantiser always work in fp32, as in BEiT v2: under bf16 2.6 % of the codes change.
        with torch.autocast(pixels_BCHW.device.type, enabled=False):
            quantised_BNX, codes, commitment = self.quantizer(self.to_code(states_BND.float()))
        return quantised_BNX, codes, commitment.sum()

    @property
    def codebooks_KVX(self) -> Tensor:
        """The codes' vectors, one codebook after the other; the first lies on the unit sphere."""
        return codebooks_of(self.quantizer)

    @property
    def is_started(self) -> bool:
        """False before the first batch gave the codebooks their vectors."""
        return is_started(self.quantizer)

    def vectors_of(self, codes: Tensor) -> Tensor:
        """Codes B x N or B x K x N to their vectors B x N x X, summed over codebooks."""
        books_KVX = self.codebooks_KVX
        codes_BKN = codes[:, None] if codes.ndim == 2 else codes
        return torch.stack([books_KVX[k][codes_BKN[:, k]] for k in range(codes_BKN.shape[1])]).sum(0)


class VQKD(nn.Module):
    """The whole of training: encoder, quantiser, and decoder to the teacher's features.

    Args:
        config: architecture.
        teacher: whose features are predicted; kept with the decoder.
        deep_width, shallow_width: channels of the teacher's features.
        tokens_per_batch: pictures times patches of one training batch on all processes; sets the dead-code threshold.
        pixel_head: also learn to draw from the codes while they form (gradients reach the encoder); None trains on
        the teacher alone.
        structure: also compare the drawing by SSIM; otherwise that loss is 0.
    """

    def __init__(
        self,
        config: VQKDConfig,
        *,
        teacher: TeacherConfig | None = None,
        deep_width: int,
        shallow_width: int,
        tokens_per_batch: int,
        pixel_head: PixelHead | None = None,
        structure: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = PictureEncoder(config, tokens_per_batch=tokens_per_batch)
        self.features = FeatureDecoder(
            FeatureDecoderConfig(
                code_dim=config.code_dim,
                width=config.width,
                depth=config.decoder_depth,
                num_heads=config.num_heads,
                deep_width=deep_width,
                shallow_width=shallow_width,
                teacher=teacher or TeacherConfig(),
            )
        )
        self.pixel_head, self._structure = pixel_head, structure
        self.patch_px = config.patch_px

    def forward(
        self,
        pixels_BCHW: Tensor,
        target: TeacherFeatures | None,
        *,
        quantise: bool = True,
        neighbours_BCHW: Tensor | None = None,
    ) -> VQKDLosses:
        """Losses of one batch of pixels in [0, 1].

        Args:
            pixels_BCHW: the pictures.
            target: the teacher's features; None leaves the losses to the teacher at 0.
            quantise: False lets the encoder learn before there are codes: they then start on vectors that differ.
            neighbours_BCHW: for each picture another that its drawing is not to be mistaken for; None leaves that out.
        """
        grid_hw = (pixels_BCHW.shape[2] // self.patch_px, pixels_BCHW.shape[3] // self.patch_px)
        deep = shallow = pixels = structure = neighbours = commitment = pixels_BCHW.new_zeros(())
        codes = None
        if quantise:
            quantised_BNX, codes, commitment = self.encoder(pixels_BCHW)
        else:
            quantised_BNX = self.encoder.unquantised(pixels_BCHW)
        if target is not None:
            predicted = self.features(quantised_BNX, grid_hw)
            deep = cosine_loss(predicted.deep_BND, target.deep_BND)
            shallow = cosine_loss(predicted.shallow_BND, target.shallow_BND)
        if self.pixel_head is not None:
            drawn_BCHW = self.pixel_head(quantised_BNX, grid_hw).float()
            pixels = F.mse_loss(drawn_BCHW, pixels_BCHW)
            if self._structure:
                structure = structure_loss(drawn_BCHW, pixels_BCHW)
            if neighbours_BCHW is not None:
                neighbours = neighbour_loss(drawn_BCHW, pixels_BCHW, neighbours_BCHW)
        return VQKDLosses(deep, shallow, commitment, pixels, structure, neighbours, codes)
