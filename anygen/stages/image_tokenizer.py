"""Stage `image_tokenizer`: VQ-KD against the teacher, then a pixel head on the frozen codes.

vqkd/    checkpoints and metrics of the first phase, pixels/ of the second, tokenizer/ the result
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from anygen.errors import ConfigError
from anygen.files import publishing
from anygen.seeding import borrowed_randomness, seed_of
from anygen.stages.base import (
    PictureSet,
    Shuffled,
    StageConfig,
    StageResult,
    open_records,
    usage_in_batch,
    usage_of,
)
from anygen.training.loop import LoopConfig, train
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.pixels import PixelHead, PixelHeadConfig, pixel_loss
from tokenizers_mm.teacher import VisionTeacher
from tokenizers_mm.vqkd import VQKD, PictureEncoder, VQKDConfig


class ImageTokenizerConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["image_tokenizer"] = "image_tokenizer"
    encoder: VQKDConfig = VQKDConfig()
    head: PixelHeadConfig = PixelHeadConfig()
    shallow_layer: int = 1
    """The teacher's layer whose features the codes must also hold (0 is the patch embedding)."""
    deep_weight: float = 1.0
    shallow_weight: float = 0.3
    commitment_weight: float = 1.0
    pixel_weight: float = 0.0
    """Weight of drawing already while the codes form; 0 is VQ-KD alone."""
    perceptual_weight: float = 0.0
    """Weight of the teacher's shallow features in the pixel head's loss."""
    batch_size: int = Field(64, ge=1)
    vqkd_loop: LoopConfig
    head_loop: LoopConfig


def main(config: ImageTokenizerConfig) -> StageResult:
    """Train both phases and save `tokenizer/`."""
    encoder_config, head_config = config.encoder, config.head
    teacher = VisionTeacher.from_pretrained(config.root / "teacher" / "model", shallow_layer=config.shallow_layer)
    _check_teacher(teacher, encoder_config)
    pictures = PictureSet(open_records(config.root, "train"), encoder_config.side_px)
    held_out = PictureSet(open_records(config.root, "validation"), encoder_config.side_px)

    vqkd = _Distillation(config, teacher, pictures, held_out)
    metrics = train(vqkd, config.vqkd_loop, config.folder / "vqkd", title="vqkd")
    encoder = vqkd.losses.vqkd.encoder

    with borrowed_randomness(seed_of(config.head_loop.seed, "head")):
        head = PixelHead(head_config, code_dim=encoder_config.code_dim, patch_px=encoder_config.patch_px)
    tokenizer = ImageTokenizer(encoder_config, encoder, head_config, head)
    head.requires_grad_(True)
    drawing = _Drawing(config, tokenizer, teacher, pictures, held_out)
    metrics |= train(drawing, config.head_loop, config.folder / "pixels", title="pixel head")

    with publishing(config.folder / "tokenizer") as folder:
        tokenizer.save(folder)
    return StageResult(config.folder, (config.folder / "tokenizer",), metrics)


def _check_teacher(teacher: VisionTeacher, config: VQKDConfig) -> None:
    if teacher.patch_px != config.patch_px:
        raise ConfigError(
            f"the teacher's patches have {teacher.patch_px} px, encoder.patch_px is {config.patch_px}: make them equal"
        )
    if not 0 <= teacher.shallow_layer <= teacher.num_layers:
        raise ConfigError(f"shallow_layer={teacher.shallow_layer}: the teacher has layers 0 to {teacher.num_layers}")


class _DistillationLoss(nn.Module):
    def __init__(self, config: ImageTokenizerConfig, vqkd: VQKD, teacher: VisionTeacher) -> None:
        super().__init__()
        self.vqkd = vqkd
        self._teacher = [teacher]  # in a list: frozen, and no part of this module's state
        self._config = config

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.vqkd(pixels_BCHW, self._teacher[0](pixels_BCHW))
        config = self._config
        loss = (
            config.deep_weight * losses.deep
            + config.shallow_weight * losses.shallow
            + config.commitment_weight * losses.commitment
            + config.pixel_weight * losses.pixels
        )
        report = {
            "deep": losses.deep,
            "shallow": losses.shallow,
            "commitment": losses.commitment,
            "pixels": losses.pixels,
        }
        return loss, {**report, "usage_batch": usage_in_batch(losses.codes_BN, config.encoder.codebook_size)}


class _Pictures:
    """Batches of pixels; the part that both phases share."""

    def __init__(
        self, teacher: VisionTeacher, pictures: PictureSet, held_out: PictureSet, batch_size: int, seed: int
    ) -> None:
        self._teacher, self._pictures, self._held_out = teacher, pictures, held_out
        self._order = Shuffled(len(pictures), batch_size, seed=seed)

    def to_device(self, batch: Any, device: torch.device) -> Any:
        self._teacher.to(device)  # no part of the trained module, so nobody else moves it
        return batch.to(device) if isinstance(batch, Tensor) else tuple(part.to(device) for part in batch)

    def state(self) -> dict[str, Any]:
        return {"position": self._order.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self._order.position = int(state["position"])


class _Distillation(_Pictures):
    def __init__(
        self,
        config: ImageTokenizerConfig,
        teacher: VisionTeacher,
        pictures: PictureSet,
        held_out: PictureSet,
    ) -> None:
        super().__init__(teacher, pictures, held_out, config.batch_size, seed_of(config.vqkd_loop.seed, "vqkd"))
        encoder_config = config.encoder
        patches = (encoder_config.side_px // encoder_config.patch_px) ** 2
        with borrowed_randomness(seed_of(config.vqkd_loop.seed, "vqkd")):
            head = PixelHead(config.head, code_dim=encoder_config.code_dim, patch_px=encoder_config.patch_px)
            vqkd = VQKD(
                encoder_config,
                teacher_width=teacher.width,
                tokens_per_batch=config.batch_size * patches,
                pixel_head=head if config.pixel_weight else None,
            )
        self.losses = _DistillationLoss(config, vqkd, teacher)
        self.module: nn.Module = self.losses
        self._codebook_size = encoder_config.codebook_size

    def next_batch(self) -> Tensor:
        return self._pictures.pixels(self._order.next())

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        self._teacher.to(device)
        codes = encode_all(self.losses.vqkd.encoder, self._held_out, device)
        usage, perplexity = usage_of(codes, self._codebook_size)
        deep = [self.losses.vqkd(p, self._teacher(p)).deep for p in _batches(self._held_out, device)]
        return {"usage": usage, "perplexity": perplexity, "deep": float(torch.stack(deep).mean())}

    def compile(self) -> None:
        for block in self.losses.vqkd.encoder.encoder.transformer.blocks:
            block.compile()


class _DrawingLoss(nn.Module):
    def __init__(
        self, head: PixelHead, grid_hw: tuple[int, int], teacher: VisionTeacher, perceptual_weight: float
    ) -> None:
        super().__init__()
        self.head = head
        self._grid_hw, self._teacher, self._perceptual_weight = grid_hw, [teacher], perceptual_weight

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        vectors_BNX, pixels_BCHW = batch
        drawn_BCHW = self.head(vectors_BNX, self._grid_hw).float()
        loss = pixel_loss(drawn_BCHW, pixels_BCHW)
        report = {"mse": F.mse_loss(drawn_BCHW, pixels_BCHW)}
        if self._perceptual_weight:
            teacher = self._teacher[0]
            target = teacher(pixels_BCHW).shallow_BND
            perceptual = F.mse_loss(teacher.differentiable(drawn_BCHW), target)
            loss = loss + self._perceptual_weight * perceptual
            report["perceptual"] = perceptual
        return loss, report


class _Drawing(_Pictures):
    def __init__(
        self,
        config: ImageTokenizerConfig,
        tokenizer: ImageTokenizer,
        teacher: VisionTeacher,
        pictures: PictureSet,
        held_out: PictureSet,
    ) -> None:
        super().__init__(teacher, pictures, held_out, config.batch_size, seed_of(config.head_loop.seed, "head"))
        self._tokenizer = tokenizer
        self._codes = encode_all(tokenizer.encoder, pictures, torch.device("cpu"))
        self.module: nn.Module = _DrawingLoss(
            tokenizer.pixel_head, tokenizer.grid_hw, teacher, config.perceptual_weight
        )

    def next_batch(self) -> tuple[Tensor, Tensor]:
        items = self._order.next()
        return self._tokenizer.encoder.codebook_KX.cpu()[self._codes[items]], self._pictures.pixels(items)

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        self._tokenizer.encoder.to(device)
        self._teacher.to(device)
        errors = []
        for pixels in _batches(self._held_out, device):
            codes = self._tokenizer.encoder(pixels)[1]
            vectors = self._tokenizer.encoder.codebook_KX[codes]
            drawn = self._tokenizer.pixel_head(vectors, self._tokenizer.grid_hw).float().clamp(0, 1)
            errors.append((drawn - pixels).square().flatten(1).mean(1))
        return {"psnr_db": float(-10 * torch.cat(errors).log10().mean())}

    def compile(self) -> None:
        for block in self._tokenizer.pixel_head.transformer.blocks:
            block.compile()


def encode_all(encoder: PictureEncoder, pictures: PictureSet, device: torch.device) -> Tensor:
    """Codes of every picture, in order."""
    encoder = encoder.eval().to(device)
    with torch.no_grad():
        return torch.cat([encoder(pixels)[1].cpu() for pixels in _batches(pictures, device)])


def _batches(pictures: PictureSet, device: torch.device, size: int = 128) -> Any:
    for start in range(0, len(pictures), size):
        yield pictures.pixels(list(range(start, min(start + size, len(pictures))))).to(device)
