"""The two phases of a picture tokenizer: codes that say what a teacher sees, then a head that draws from them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anygen.data.augmentation import AugmentationConfig, augment
from anygen.data.pictures import PictureSet
from anygen.seeding import borrowed_randomness
from anygen.stages.base import Shuffled
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.patchgan import (
    PatchDiscriminator,
    PatchGANConfig,
    adaptive_weight,
    discriminator_loss,
    head_loss,
)
from tokenizers_mm.pixels import PixelHead, PixelHeadConfig, pixel_loss
from tokenizers_mm.ssim import structural_similarity
from tokenizers_mm.teacher import TeacherConfig, TeacherFeatures, VisionTeacher
from tokenizers_mm.usage import UsageMonitor, usage_of
from tokenizers_mm.vqkd import VQKD, VQKDConfig


class PictureBatches:
    """Batches of pixels of the training split, augmented, and the held-out pictures."""

    def __init__(
        self,
        train: PictureSet,
        held_out: PictureSet,
        *,
        batch_size: int,
        augmentation: AugmentationConfig,
        seed: int,
    ) -> None:
        self.train, self.held_out, self.augmentation = train, held_out, augmentation
        self.order = Shuffled(len(train), batch_size, seed=seed)

    def next(self) -> tuple[list[int], Tensor]:
        """Item numbers and their pixels."""
        items = self.order.next()
        generator = torch.Generator().manual_seed(self.order.generator().getrandbits(62))
        return items, augment(self.train.pixels(items), self.augmentation, generator)

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream of batches."""
        return {"position": self.order.position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        self.order.position = int(state["position"])


class DistillationLoss(nn.Module):
    """VQ-KD's losses, weighted, and the monitor of its codebook."""

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

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels to the weighted loss and its parts."""
        quantise = int(self._step) >= self._start
        self._step += 1
        losses = self.vqkd(pixels_BCHW, self.target(pixels_BCHW), quantise=quantise)
        parts = {
            "deep": losses.deep,
            "shallow": losses.shallow,
            "commitment": losses.commitment,
            "pixels": losses.pixels,
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


class Distillation:
    """Trainee of the first phase."""

    def __init__(self, losses: DistillationLoss, batches: PictureBatches, config: VQKDConfig) -> None:
        self.losses, self._batches, self._config = losses, batches, config
        self.module: nn.Module = losses

    def next_batch(self) -> Tensor:
        """The next batch, on the CPU."""
        return self._batches.next()[1]

    def to_device(self, batch: Tensor, device: torch.device) -> Tensor:
        """The batch where the module is."""
        return batch.to(device)

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream of batches."""
        return self._batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        self._batches.load_state(state)

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures on held-out pictures, in fp32."""
        vqkd = self.losses.vqkd
        codes, losses = [], []
        for pixels in self._batches.held_out.batches(device):
            found = vqkd(pixels, self.losses.target(pixels))
            codes.append(found.codes.cpu())
            losses.append(torch.stack([found.deep, found.shallow, found.pixels]) * len(pixels))
        means = (torch.stack(losses).sum(0) / len(self._batches.held_out)).tolist()
        usage, perplexity = usage_of(torch.cat(codes), self._config.codebook_size)
        return {
            "usage": usage,
            "perplexity": perplexity,
            **dict(zip(("deep", "shallow", "pixels"), means, strict=True)),
        }

    def compile(self) -> None:
        """Compile the repeated blocks."""
        vqkd = self.losses.vqkd
        heads = [] if vqkd.pixel_head is None else [vqkd.pixel_head.transformer]
        for transformer in (vqkd.encoder.encoder.transformer, vqkd.features.transformer, *heads):
            for block in transformer.blocks:
                block.compile()


class DrawingLoss(nn.Module):
    """L1 and MSE, SSIM, the teacher's shallow features, and late in training the judgement of a PatchGAN."""

    def __init__(
        self,
        head: PixelHead,
        grid_hw: tuple[int, int],
        teacher: VisionTeacher | None,
        *,
        perceptual_weight: float,
        structure_weight: float,
        gan: PatchGANConfig,
        gan_start: int,
    ) -> None:
        super().__init__()
        self.head, self._grid_hw, self._teacher = head, grid_hw, [teacher]
        self._perceptual_weight, self._structure_weight = perceptual_weight, structure_weight
        self._gan, self._gan_start = gan, gan_start
        self.discriminator = PatchDiscriminator(gan) if gan.weight else None
        self._step: Tensor
        self.register_buffer("_step", torch.zeros((), dtype=torch.long))

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(code vectors, pixels) to the loss and its parts."""
        vectors_BNX, pixels_BCHW = batch
        drawn_BCHW = self.head(vectors_BNX, self._grid_hw).float()
        loss = pixel_loss(drawn_BCHW, pixels_BCHW)
        report = {"mse": F.mse_loss(drawn_BCHW, pixels_BCHW)}
        if self._structure_weight:
            with torch.autocast(drawn_BCHW.device.type, enabled=False):  # differences of squares need fp32
                report["ssim"] = structural_similarity(drawn_BCHW, pixels_BCHW)
            loss = loss + self._structure_weight * (1 - report["ssim"])
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


class Drawing:
    """Trainee of the second phase: the codes are frozen, the pixel head learns to draw them."""

    def __init__(self, losses: DrawingLoss, batches: PictureBatches, tokenizer: ImageTokenizer) -> None:
        self.module: nn.Module = losses
        self._batches, self._tokenizer = batches, tokenizer
        self._codes: dict[int, Tensor] = {}
        self._keeps_codes = batches.augmentation == AugmentationConfig()

    def next_batch(self) -> tuple[list[int], Tensor]:
        """The next batch, on the CPU."""
        return self._batches.next()

    def to_device(self, batch: tuple[list[int], Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """(code vectors, pixels) where the module is; the codes are found there too, in fp32."""
        items, pixels = batch[0], batch[1].to(device)
        self._tokenizer.to(device)
        missing = [place for place, item in enumerate(items) if item not in self._codes]
        if missing:
            found = self._tokenizer.encode_pixels(pixels[missing])
            self._codes |= {items[place]: codes for place, codes in zip(missing, found, strict=True)}
        vectors = self._tokenizer.encoder.vectors_of(torch.stack([self._codes[item] for item in items]).to(device))
        if not self._keeps_codes:  # the next time a picture comes it is another one
            self._codes.clear()
        return vectors, pixels

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream of batches."""
        return self._batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        self._batches.load_state(state)

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures on held-out pictures, in fp32."""
        errors = []
        for pixels in self._batches.held_out.batches(torch.device("cpu")):
            codes = self._tokenizer.encode_pixels(pixels)
            drawn = self._tokenizer.decode_codes(codes, self._tokenizer.grid_hw)
            errors.append((drawn - pixels).square().flatten(1).mean(1))
        return {"psnr_db": float(-10 * torch.cat(errors).log10().mean())}

    def compile(self) -> None:
        """Compile the repeated blocks."""
        for block in self._tokenizer.pixel_head.transformer.blocks:
            block.compile()


def make_vqkd(
    config: VQKDConfig,
    head: PixelHeadConfig | None,
    teacher: VisionTeacher | None,
    *,
    teacher_config: TeacherConfig,
    batch_size: int,
    seed: int,
) -> VQKD:
    """An untrained VQ-KD; with a head it also learns to draw while the codes form."""
    patches = (config.side_px // config.patch_px) ** 2
    with borrowed_randomness(seed):
        pixel_head = PixelHead(head, code_dim=config.code_dim, patch_px=config.patch_px) if head else None
        return VQKD(
            config,
            teacher=teacher_config,
            deep_width=teacher.deep_width if teacher else config.width,
            shallow_width=teacher.shallow_width if teacher else config.width,
            tokens_per_batch=batch_size * patches,
            pixel_head=pixel_head,
        )
