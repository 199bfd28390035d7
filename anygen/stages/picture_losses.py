"""What the phases of a picture tokenizer minimise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm.features import FeatureDecoder, cosine_loss
from tokenizers_mm.patchgan import (
    PatchDiscriminator,
    PatchGANConfig,
    adaptive_weight,
    discriminator_loss,
    head_loss,
)
from tokenizers_mm.pixels import PixelHead, neighbour_loss, pixel_loss
from tokenizers_mm.ssim import structure_loss
from tokenizers_mm.teacher import TeacherFeatures, VisionTeacher
from tokenizers_mm.usage import UsageMonitor
from tokenizers_mm.vqkd import VQKD, VQKDConfig


class DistillationLoss(nn.Module):
    """VQ-KD's losses, weighted, and the monitor of its codebook."""

    spares_parameters = True

    def __init__(
        self,
        vqkd: VQKD,
        teacher: VisionTeacher | None,
        config: VQKDConfig,
        *,
        weights: dict[str, float],
        steps_without_quantiser: int,
        usage_window: int,
        usage_alarm: float,
    ) -> None:
        super().__init__()
        self.vqkd, self._weights, self._start = vqkd, weights, steps_without_quantiser
        self._step: Tensor
        self.register_buffer("_step", torch.zeros((), dtype=torch.long))
        self._teacher = [teacher]  # in a list: frozen, and no part of this module's state
        books = config.quantizer.num_codebooks
        self.monitors = nn.ModuleList(
            UsageMonitor(config.codebook_size, window=usage_window, alarm=usage_alarm) for _ in range(books)
        )

    def forward(self, batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
        """(pixels, those of a neighbour of each) to the weighted loss and its parts."""
        pixels_BCHW, neighbours_BCHW = batch
        quantise = int(self._step) >= self._start
        self._step += 1
        target = self.target(pixels_BCHW)
        losses = self.vqkd(pixels_BCHW, target, quantise=quantise, neighbours_BCHW=neighbours_BCHW)
        parts = {
            "deep": losses.deep,
            "shallow": losses.shallow,
            "commitment": losses.commitment,
            "pixels": losses.pixels,
            "structure": losses.structure,
            "neighbours": losses.neighbours,
        }
        loss = torch.stack([self._weights[name] * part for name, part in parts.items()]).sum()
        if losses.codes is None:
            return loss, parts
        codes_BKN = losses.codes[:, None] if losses.codes.ndim == 2 else losses.codes
        for book, monitor in enumerate(self.monitors):
            figures = monitor.update(codes_BKN[:, book])  # type: ignore[operator]
            parts |= {f"{name}{book or ''}": value for name, value in figures.items()}
        return loss, parts

    def target(self, pixels_BCHW: Tensor) -> TeacherFeatures | None:
        """What the codes are to say; None without a teacher."""
        teacher, patch = self._teacher[0], self.vqkd.patch_px
        if teacher is None:
            return None
        features: TeacherFeatures = teacher(pixels_BCHW, (pixels_BCHW.shape[2] // patch, pixels_BCHW.shape[3] // patch))
        return features

    def to(self, *args: Any, **kwargs: Any) -> DistillationLoss:
        """The teacher moves with the rest."""
        if self._teacher[0] is not None:
            self._teacher[0].to(*args, **kwargs)
        return super().to(*args, **kwargs)


class DescribingLoss(nn.Module):
    """Distance of the features that a decoder finds in frozen codes from the teacher's, weighted as in phase one."""

    def __init__(
        self,
        features: FeatureDecoder,
        teacher: VisionTeacher,
        grid_hw: tuple[int, int],
        *,
        deep_weight: float,
        shallow_weight: float,
    ) -> None:
        super().__init__()
        self.features, self._teacher, self._grid_hw = features, [teacher], grid_hw
        self._weights = deep_weight, shallow_weight

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(code vectors, pixels) to the loss and its parts."""
        vectors_BNX, pixels_BCHW = batch
        target = self._teacher[0](pixels_BCHW, self._grid_hw)
        found = self.features(vectors_BNX, self._grid_hw)
        deep = cosine_loss(found.deep_BND, target.deep_BND)
        shallow = cosine_loss(found.shallow_BND, target.shallow_BND)
        return self._weights[0] * deep + self._weights[1] * shallow, {"deep": deep, "shallow": shallow}

    def to(self, *args: Any, **kwargs: Any) -> DescribingLoss:
        """The teacher moves with the rest."""
        self._teacher[0].to(*args, **kwargs)
        return super().to(*args, **kwargs)


class DrawingLoss(nn.Module):
    """L1 and MSE, SSIM, neighbours, the teacher's shallow features, and late a PatchGAN's judgement."""

    spares_parameters = True

    def __init__(
        self,
        head: PixelHead,
        grid_hw: tuple[int, int],
        teacher: VisionTeacher | None,
        *,
        perceptual_weight: float,
        structure_weight: float,
        neighbour_weight: float,
        gan: PatchGANConfig,
        gan_start: int,
    ) -> None:
        super().__init__()
        self.head, self._grid_hw, self._teacher = head, grid_hw, [teacher]
        self._perceptual_weight, self._structure_weight = perceptual_weight, structure_weight
        self._neighbour_weight = neighbour_weight
        self._gan, self._gan_start = gan, gan_start
        self.discriminator = PatchDiscriminator(gan) if gan.weight else None
        self._step: Tensor
        self.register_buffer("_step", torch.zeros((), dtype=torch.long))

    def forward(self, batch: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
        """(code vectors, pixels, those of a neighbour of each) to the loss and its parts."""
        vectors_BNX, pixels_BCHW, neighbours_BCHW = batch
        drawn_BCHW = self.head(vectors_BNX, self._grid_hw).float()
        loss = pixel_loss(drawn_BCHW, pixels_BCHW)
        report = {"mse": F.mse_loss(drawn_BCHW, pixels_BCHW)}
        if self._structure_weight:
            structure = structure_loss(drawn_BCHW, pixels_BCHW)
            loss, report["ssim"] = loss + self._structure_weight * structure, 1 - structure
        if neighbours_BCHW is not None:
            report["neighbours"] = neighbour_loss(drawn_BCHW, pixels_BCHW, neighbours_BCHW)
            loss = loss + self._neighbour_weight * report["neighbours"]
        if (teacher := self._teacher[0]) is not None and self._perceptual_weight:
            target = teacher(pixels_BCHW, self._grid_hw).shallow_BND
            perceptual = F.mse_loss(teacher.differentiable(drawn_BCHW, self._grid_hw), target)
            loss = loss + self._perceptual_weight * perceptual
            report["perceptual"] = perceptual
        if self.discriminator is not None:
            self._step += 1
            if int(self._step) > self._gan_start:
                loss, judged = self._judged(loss, drawn_BCHW, pixels_BCHW)
                report |= judged
        return loss, report

    def _judged(self, loss: Tensor, drawn_BCHW: Tensor, pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Both sides in one loss: neither gradient reaches the other side's weights."""
        assert self.discriminator is not None
        ours = head_loss(self.discriminator, drawn_BCHW)
        weight = adaptive_weight(loss, ours, self.head.to_pixels.weight) if self._gan.adaptive else 1.0
        theirs = discriminator_loss(self.discriminator(pixels_BCHW), self.discriminator(drawn_BCHW.detach()))
        return loss + self._gan.weight * weight * ours + theirs, {"adversarial": ours, "discriminator": theirs}

    def to(self, *args: Any, **kwargs: Any) -> DrawingLoss:
        """The teacher moves with the rest."""
        if self._teacher[0] is not None:
            self._teacher[0].to(*args, **kwargs)
        return super().to(*args, **kwargs)
