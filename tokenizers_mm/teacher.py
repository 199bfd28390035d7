"""A frozen vision model of transformers as VQ-KD's teacher: patch features of a deep and a shallow layer.

Targets are normalised per token (LayerNorm without weights), so that channels of large scale do not decide the cosine.
(Deviation from BEiT v2, arXiv 2208.06366, which takes the cosine of raw features: it also removes their mean.)

`tokenizers_mm.tower` lists the families that can teach and what their hidden states are.

Dimension key: B pictures, C colours, H x W pixels, N patches in row order, D width of the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tokenizers_mm.config import Config
from tokenizers_mm.errors import ConfigError
from tokenizers_mm.tower import VisionTower


class TeacherConfig(Config):
    """Which model teaches, and which of its features."""

    path: Path | None = None
    """Folder of a checkpoint in transformers' layout; null is what the stage `teacher` made."""
    deep_layer: int = -1
    """Hidden state with the meaning: 0 is the patch embedding, -1 the last layer, before the final norm."""
    shallow_layer: int = 1
    """Hidden state with the looks, counted in the same way."""
    projected: bool = False
    """Deep features through CLIP's final norm and projection, all patch tokens, as BEiT v2 takes them."""
    resize: Literal["pixels", "features"] = "pixels"
    """How teacher and student meet on one grid: `pixels` shows the teacher a picture of as many patches as the student
    has; `features` shows it its native size, whatever the aspect ratio, and resizes what it sees."""
    native_side_px: int | None = Field(None, ge=1)
    """Side that `features` shows; null is the checkpoint's own."""


@dataclass(frozen=True)
class TeacherFeatures:
    """What the student is to predict: fp32, mean 0 and variance 1 in each token; the widths differ if projected."""

    deep_BND: Tensor
    shallow_BND: Tensor


class VisionTeacher(nn.Module):
    """Two layers of a frozen vision tower on the student's grid.

    Attributes:
        deep_width, shallow_width: D of the two features; `width` is the deep one.
        patch_px, num_layers, description: the tower's.

    Raises:
        ConfigError: a layer that the tower has not, or a size that it cannot read.
    """

    def __init__(self, tower: VisionTower, config: TeacherConfig) -> None:
        super().__init__()
        self.tower, self.config = tower, config
        self.patch_px, self.num_layers, self.description = tower.patch_px, tower.num_layers, tower.description
        self.shallow_layer = self._checked("shallow_layer", config.shallow_layer)
        self.deep_layer = self._checked("deep_layer", config.deep_layer)
        self.shallow_width = tower.width
        self.deep_width = tower.projected_width if config.projected and tower.projected_width else tower.width
        self.width = self.deep_width
        self._native_hw = self._native_size()

    @classmethod
    def open(cls, config: TeacherConfig) -> VisionTeacher:
        """Open the checkpoint at `config.path`, which must be set.

        Raises:
            CheckpointError: nothing readable there, or a model without patch tokens.
            ConfigError: a layer, a projection or a size that the model has not.
        """
        if config.path is None:
            raise ConfigError("the teacher has no path: name a checkpoint folder, or run the stage teacher")
        return cls(VisionTower.open(config.path, with_projection=config.projected), config)

    @classmethod
    def from_pretrained(cls, folder: Path, *, shallow_layer: int, **more: Any) -> VisionTeacher:
        """`open` with the fields of `TeacherConfig` as arguments."""
        return cls.open(TeacherConfig(path=folder, shallow_layer=shallow_layer, **more))

    @torch.no_grad()
    def forward(self, pixels_BCHW: Tensor, grid_hw: tuple[int, int] | None = None) -> TeacherFeatures:
        """Pixels in [0, 1] to the features of both layers.

        Args:
            pixels_BCHW: pictures of the student's size.
            grid_hw: rows and columns of the student's patches; the teacher's in these pixels where not given.

        Raises:
            ConfigError: the teacher cannot read pictures of the size that the grid asks for.
        """
        states, seen_hw, grid_hw = self._look(pixels_BCHW, grid_hw)
        deep_BND = states[self.deep_layer]
        if self.config.projected:
            deep_BND = self.tower.project(deep_BND)
        return TeacherFeatures(
            _on_grid(deep_BND, seen_hw, grid_hw), _on_grid(states[self.shallow_layer], seen_hw, grid_hw)
        )

    def differentiable(self, pixels_BCHW: Tensor, grid_hw: tuple[int, int] | None = None) -> Tensor:
        """Shallow features with gradients to the pixels: the space of a perceptual loss."""
        states, seen_hw, grid_hw = self._look(pixels_BCHW, grid_hw)
        return _on_grid(states[self.shallow_layer], seen_hw, grid_hw)

    def _look(
        self, pixels_BCHW: Tensor, grid_hw: tuple[int, int] | None
    ) -> tuple[list[Tensor], tuple[int, int], tuple[int, int]]:
        """Every hidden state, the grid that it has and the grid that is wanted."""
        grid_hw = grid_hw or self.tower.grid_of((pixels_BCHW.shape[2], pixels_BCHW.shape[3]))
        if min(grid_hw) < 1:
            raise ConfigError(
                f"pictures of {tuple(pixels_BCHW.shape[2:])} px hold no patch of {self.patch_px} px: say grid_hw"
            )
        size_hw = self._native_hw or (grid_hw[0] * self.patch_px, grid_hw[1] * self.patch_px)
        return self.tower(_resized(pixels_BCHW, size_hw)), self.tower.grid_of(size_hw), grid_hw

    def _checked(self, name: str, layer: int) -> int:
        if not -self.num_layers - 1 <= layer <= self.num_layers:
            raise ConfigError(
                f"{name}={layer}: {self.description} has hidden states 0 to {self.num_layers}, or -1 (the last) to "
                f"{-self.num_layers - 1}"
            )
        return layer

    def _native_size(self) -> tuple[int, int] | None:
        """Pixels that the teacher is always shown, None where that follows the grid."""
        side, native_hw = self.config.native_side_px, self.tower.native_hw_px
        if self.config.resize == "pixels":
            if side is not None:
                raise ConfigError(f"native_side_px={side} has no effect with resize=pixels: leave it out")
            return None
        wanted_hw = (side, side) if side is not None else native_hw
        if wanted_hw is None:
            raise ConfigError(f"{self.description} does not say its native size: set native_side_px")
        if wanted_hw != native_hw and not self.tower.any_size:
            raise ConfigError(f"native_side_px={side}: {self.description} reads pictures of {native_hw} px only")
        if min(self.tower.grid_of(wanted_hw)) < 1:
            raise ConfigError(f"native_side_px={side} is less than one patch of {self.patch_px} px")
        return wanted_hw


def _resized(pixels_BCHW: Tensor, size_hw: tuple[int, int]) -> Tensor:
    if tuple(pixels_BCHW.shape[2:]) == size_hw:
        return pixels_BCHW
    return F.interpolate(pixels_BCHW, size_hw, mode="bicubic", antialias=True).clamp(0, 1)  # bicubic overshoots


def _on_grid(states_BND: Tensor, seen_hw: tuple[int, int], grid_hw: tuple[int, int]) -> Tensor:
    """Features on another grid (antialiased, or a coarser grid would skip patches), then normalised per token."""
    states_BND = states_BND.float()
    if seen_hw != grid_hw:
        states_BDHW = states_BND.transpose(1, 2).unflatten(2, seen_hw)
        states_BDHW = F.interpolate(states_BDHW, grid_hw, mode="bilinear", antialias=True)
        states_BND = states_BDHW.flatten(2).transpose(1, 2)
    return F.layer_norm(states_BND, states_BND.shape[-1:])
