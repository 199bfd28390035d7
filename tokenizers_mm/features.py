"""VQ-KD's second half: code vectors to the teacher's features. It trains the codes; kept, it says what they mean.

Dimension key: B pictures, N patches, D width, X code dimension.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokenizers_mm.config import Config
from tokenizers_mm.errors import CheckpointError
from tokenizers_mm.teacher import TeacherConfig, TeacherFeatures
from tokenizers_mm.vit import Transformer, check_width
from tokenizers_mm.weights import load_facts, load_weights, save_facts, save_weights

KIND = "vqkd_features"


class FeatureDecoderConfig(Config):
    """Architecture, and the teacher it was trained against."""

    code_dim: int = Field(ge=1)
    width: int = Field(ge=1)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    deep_width: int = Field(ge=1)
    """Channels of the teacher's deep features."""
    shallow_width: int = Field(ge=1)
    teacher: TeacherConfig = TeacherConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_width(self.width, self.num_heads)
        return self


class FeatureDecoder(nn.Module):
    """A transformer over the grid, then Linear-Tanh-Linear to the deep and to the shallow features (BEiT v2)."""

    def __init__(self, config: FeatureDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.from_code = nn.Linear(config.code_dim, config.width)
        self.transformer = Transformer(config.width, config.depth, config.num_heads)
        self.to_deep = task_layer(config.width, config.deep_width)
        self.to_shallow = task_layer(config.width, config.shallow_width)

    def forward(self, vectors_BNX: Tensor, grid_hw: tuple[int, int]) -> TeacherFeatures:
        """Code vectors to what the teacher would see in the picture."""
        decoded_BND = self.transformer(self.from_code(vectors_BNX), grid_hw)
        return TeacherFeatures(self.to_deep(decoded_BND), self.to_shallow(decoded_BND))

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_facts(folder, {"kind": KIND, "features": self.config.model_dump(mode="json")})
        save_weights(folder, {"features": self})

    @classmethod
    def load(cls, folder: Path) -> FeatureDecoder:
        """Read what `save` wrote; frozen, in eval mode.

        Raises:
            CheckpointError: missing, broken or of another kind.
        """
        facts: dict[str, Any] = load_facts(folder, kind=KIND)
        try:
            decoder = cls(FeatureDecoderConfig(**facts["features"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / 'config.json'} is broken: {error}") from error
        load_weights(folder, {"features": decoder})
        return decoder.eval().requires_grad_(False)


def task_layer(width_in: int, width_out: int) -> nn.Sequential:
    """Linear-Tanh-Linear, as BEiT v2 has it on both sides of the codes."""
    return nn.Sequential(nn.Linear(width_in, width_in), nn.Tanh(), nn.Linear(width_in, width_out))


def cosine_loss(predicted_BND: Tensor, target_BND: Tensor) -> Tensor:
    """1 - cosine, mean over patches (BEiT v2, equation 2)."""
    return 1 - F.cosine_similarity(predicted_BND.float(), target_BND, dim=-1).mean()
