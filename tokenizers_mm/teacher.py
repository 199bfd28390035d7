"""A frozen vision model of transformers as VQ-KD's teacher: patch features of a deep and a shallow layer.

Targets are normalised per token (LayerNorm without weights), so that channels of large scale do not decide the cosine.

Dimension key: B pictures, C colours, H x W pixels, N patches in row order, L tokens with the
extra ones, D teacher width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.errors import CheckpointError


@dataclass(frozen=True)
class TeacherFeatures:
    """What the student is to predict."""

    deep_BND: Tensor
    shallow_BND: Tensor


class VisionTeacher(nn.Module):
    """The vision tower of a `transformers` checkpoint, frozen.

    Args:
        tower: a vision model that returns hidden states (CLIP, SigLIP, DINOv2, ...).
        shallow_layer: index of the shallow hidden state; 0 is the patch embedding.
        mean, std: the pixel normalisation the tower was trained with.
    """

    def __init__(self, tower: nn.Module, *, shallow_layer: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.shallow_layer = shallow_layer
        config: Any = tower.config
        self.width = int(config.hidden_size)
        self.patch_px = int(config.patch_size)
        self.num_layers = int(config.num_hidden_layers)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, folder: Path, *, shallow_layer: int) -> VisionTeacher:
        """Open a checkpoint folder in transformers' layout.

        Raises:
            CheckpointError: nothing readable there, or a model without a vision tower.
        """
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
            # Read directly: transformers' image processors want torchvision, only to normalise.
            processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
            mean, std = list(processor["image_mean"]), list(processor["image_std"])
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise CheckpointError(f"no usable vision model in {folder}: {str(error).splitlines()[0]}") from error
        tower = getattr(model, "vision_model", model)
        if not hasattr(tower.config, "patch_size"):
            raise CheckpointError(f"{folder} holds a {type(model).__name__}, which has no patches to predict")
        return cls(tower, shallow_layer=shallow_layer, mean=mean, std=std)

    @torch.no_grad()
    def forward(self, pixels_BCHW: Tensor) -> TeacherFeatures:
        """Pixels in [0, 1] to the features of both layers."""
        return TeacherFeatures(*self._features(pixels_BCHW, -1, self.shallow_layer))

    def differentiable(self, pixels_BCHW: Tensor) -> Tensor:
        """Shallow features with gradients to the pixels: the space of a perceptual loss."""
        return self._features(pixels_BCHW, self.shallow_layer)[0]

    def _features(self, pixels_BCHW: Tensor, *layers: int) -> list[Tensor]:
        num_patches = (pixels_BCHW.shape[2] // self.patch_px) * (pixels_BCHW.shape[3] // self.patch_px)
        states = self.tower((pixels_BCHW - self.mean) / self.std, output_hidden_states=True).hidden_states
        return [_patches(states[layer], num_patches) for layer in layers]


def _patches(states_BLD: Tensor, num_patches: int) -> Tensor:
    """Without class and register tokens, which come first; normalised per token."""
    patches_BND = states_BLD[:, states_BLD.shape[1] - num_patches :].float()
    return F.layer_norm(patches_BND, patches_BND.shape[-1:])
