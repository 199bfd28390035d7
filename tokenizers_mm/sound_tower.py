"""A small transformer over patches of the log-mel spectrum (AST, arXiv 2104.01778): a sound to one vector.

The third tower of the stage `teacher`, in the space of pictures and captions (as AudioCLIP, arXiv 2106.13043).

Dimension key: B sounds, T samples, M mel bands, N patches (rows of bands, columns of frames), D width, E embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from tokenizers_mm.config import Config
from tokenizers_mm.errors import CheckpointError
from tokenizers_mm.spectral import log_mel
from tokenizers_mm.vit import Transformer, check_width, to_patches
from tokenizers_mm.weights import load_facts, load_weights, save_facts, save_weights

KIND = "sound_tower"
_WINDOW, _PATCH = 1024, 16  # at 16 kHz: 64 bands, frames of 16 ms, patches of 16 bands x 256 ms
_SILENCE = -11.5129  # log of the floor of `log_mel`


class SoundTowerConfig(Config):
    """What the tower hears, and its size."""

    rate_hz: int = Field(16_000, ge=4_000)
    """Rate of its sounds."""
    sound_s: float = Field(2.0, gt=0)
    """Length of its window; sounds are cut, or padded with silence."""
    width: int = Field(128, ge=4)
    """A multiple of `num_heads` and of 4."""
    depth: int = Field(2, ge=1)
    """Layers."""
    num_heads: int = Field(4, ge=1)
    embedding: int = Field(128, ge=1)
    """Width of the space that the towers meet in."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_width(self.width, self.num_heads)
        return self

    @property
    def num_samples(self) -> int:
        """Samples of a window."""
        return max(1, round(self.sound_s * self.rate_hz))


class SoundTower(nn.Module):
    """Sounds to vectors of length 1; `logit_scale` is the log of their temperature against pictures, as in CLIP."""

    def __init__(self, config: SoundTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(_PATCH**2, config.width)
        self.transformer = Transformer(config.width, config.depth, config.num_heads)
        self.project = nn.Linear(config.width, config.embedding, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # CLIP's start: a temperature of 0.07

    def forward(self, sound_BT: Tensor) -> Tensor:
        """Samples in [-1, 1], `config.num_samples` of them, to B x E of length 1, fp32."""
        patches_BNX, grid_hw = self._patches(sound_BT)
        hidden_BND = self.transformer(self.embed(patches_BNX), grid_hw)
        return F.normalize(self.project(hidden_BND.mean(dim=1)).float(), dim=-1)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors (bf16)."""
        save_facts(folder, {"kind": KIND, "tower": self.config.model_dump(mode="json")})
        save_weights(folder, {"tower": self})

    @classmethod
    def load(cls, folder: Path) -> SoundTower:
        """Open what `save` wrote.

        Raises:
            CheckpointError: missing, broken or of another kind.
        """
        facts: dict[str, Any] = load_facts(folder, kind=KIND)
        try:
            config = SoundTowerConfig.model_validate(facts.get("tower"))
        except ValidationError as error:
            raise CheckpointError(f"{folder / 'config.json'} is no {KIND}: {error.errors()[0]['msg']}") from error
        tower = cls(config)
        load_weights(folder, {"tower": tower})
        return tower.eval()

    def _patches(self, sound_BT: Tensor) -> tuple[Tensor, tuple[int, int]]:
        with torch.autocast(sound_BT.device.type, enabled=False):  # a log of small numbers
            mel_BMN = log_mel(sound_BT, rate_hz=self.config.rate_hz, window=_WINDOW)
        mel_BMN = F.pad(mel_BMN, (0, -mel_BMN.shape[2] % _PATCH), value=_SILENCE)
        mel_BMN = mel_BMN / -_SILENCE + 0.5  # about [-0.5, 1]
        patches_BNX = to_patches(mel_BMN[:, None], _PATCH)
        return patches_BNX, (mel_BMN.shape[1] // _PATCH, mel_BMN.shape[2] // _PATCH)
