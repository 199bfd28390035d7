"""How stage `pretrain` writes blocks: from its recipe and the tokenizers to a `Layout`."""

from __future__ import annotations

from pydantic import Field

from anygen.codebooks import OrderName
from anygen.config import Config
from anygen.documents import Tokenizers
from anygen.layout import Layout


class LayoutConfig(Config):
    """How blocks are written; see `anygen.layout.Layout`."""

    audio_order: OrderName = "flat"
    audio_kept: int = Field(0, ge=0)
    """Books of the sound codec that the transformer models; 0 means all."""
    max_duration_s: float = Field(10.0, gt=0)
    """Longest sound that the model may give."""

    def layout_of(self, tokenizers: Tokenizers) -> Layout:
        """The layout for these tokenizers."""
        image, audio = tokenizers.get("image"), tokenizers.get("audio")
        rate_hz = (audio.rate_hz if audio else None) or 1.0
        return Layout(
            image_codebooks=image.num_codebooks if image else 1,
            audio_codebooks=audio.num_codebooks if audio else 1,
            audio_order=self.audio_order,
            audio_kept=self.audio_kept,
            native_grid_hw=(image.grid_hw if image else None) or (8, 8),
            native_frames=max(1, round(2.0 * rate_hz)),
            max_frames=max(1, round(self.max_duration_s * rate_hz)),
        )
