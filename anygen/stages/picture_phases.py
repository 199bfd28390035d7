"""The phases of a picture tokenizer: codes that say what a teacher sees, then a head that draws from them.

A third one may follow: a larger decoder from the codes, now frozen, to the teacher's features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anygen.data.augmentation import AugmentationConfig, augment
from anygen.data.pictures import PictureSet
from anygen.seeding import borrowed_randomness
from anygen.stages.base import Shuffled
from anygen.stages.picture_losses import DescribingLoss, DistillationLoss, DrawingLoss
from anygen.training import processes
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.pixels import PixelHead, PixelHeadConfig
from tokenizers_mm.teacher import TeacherConfig, VisionTeacher
from tokenizers_mm.usage import usage_of
from tokenizers_mm.vqkd import VQKD, VQKDConfig


class PictureBatch(NamedTuple):
    """Some pictures of the training split, on the CPU."""

    items: list[int]
    pixels_BCHW: Tensor
    neighbours_BCHW: Tensor | None


class PictureBatches:
    """Batches of pixels of the training split, augmented, and the held-out pictures.

    With `neighbours_NK`, the item numbers of each picture's neighbours, one of them comes with each picture, under the
    same augmentation.
    """

    def __init__(
        self,
        train: PictureSet,
        held_out: PictureSet,
        *,
        batch_size: int,
        augmentation: AugmentationConfig,
        seed: int,
        neighbours_NK: Tensor | None = None,
    ) -> None:
        self.train, self.held_out, self.augmentation = train, held_out, augmentation
        self._neighbours_NK = neighbours_NK
        self.order = Shuffled(len(train), batch_size, seed=seed)
        self._batch_size, self._rows = batch_size, processes.own_rows(batch_size)

    def next(self) -> PictureBatch:
        """This process's part of the next batch."""
        items = self.order.next()[self._rows]
        draws = self.order.generator()
        seed = draws.getrandbits(62)
        neighbours_BCHW = None
        if self._neighbours_NK is not None:
            places_B = [draws.randrange(self._neighbours_NK.shape[1]) for _ in range(self._batch_size)][self._rows]
            neighbours_BCHW = self._augmented(self._neighbours_NK[items, places_B].tolist(), seed)
        return PictureBatch(items, self._augmented(items, seed), neighbours_BCHW)

    def _augmented(self, items: list[int], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        pixels = self.train.pixels(items)
        return augment(pixels, self.augmentation, generator, rows=self._rows, of=self._batch_size)

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream of batches."""
        return {"position": self.order.position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        self.order.position = int(state["position"])


class Distillation:
    """Trainee of the first phase."""

    def __init__(self, losses: DistillationLoss, batches: PictureBatches, config: VQKDConfig) -> None:
        self.losses, self._batches, self._config = losses, batches, config
        self.module: nn.Module = losses

    def next_batch(self) -> PictureBatch:
        """The next batch, on the CPU."""
        return self._batches.next()

    def to_device(self, batch: PictureBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(pixels, those of the neighbours) where the module is."""
        return batch.pixels_BCHW.to(device), _moved(batch.neighbours_BCHW, device)

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream of batches."""
        return self._batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        self._batches.load_state(state)

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Every process stands at the same place of the whole stream."""
        return processes.agreed(states)

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures on held-out pictures, in fp32."""
        vqkd = self.losses.vqkd
        started = vqkd.encoder.is_started  # otherwise k-means would start on held-out pictures
        codes, losses = [], []
        for pixels in self._batches.held_out.batches(device):
            found = vqkd(pixels, self.losses.target(pixels), quantise=started)
            losses.append(torch.stack([found.deep, found.shallow, found.pixels]) * len(pixels))
            if found.codes is not None:
                codes.append(found.codes.cpu())
        means = (torch.stack(losses).sum(0) / len(self._batches.held_out)).tolist()
        figures = dict(zip(("deep", "shallow", "pixels"), means, strict=True))
        return figures | (self._usage(torch.cat(codes)) if codes else {})

    def _usage(self, codes: Tensor) -> dict[str, float]:
        """Of each codebook; the first has no number."""
        codes_BKN = codes[:, None] if codes.ndim == 2 else codes
        figures: dict[str, float] = {}
        for book in range(codes_BKN.shape[1]):
            usage, perplexity = usage_of(codes_BKN[:, book], self._config.codebook_size)
            figures |= {f"usage{book or ''}": usage, f"perplexity{book or ''}": perplexity}
        return figures

    def compile(self) -> None:
        """Compile the repeated blocks."""
        vqkd = self.losses.vqkd
        heads = [] if vqkd.pixel_head is None else [vqkd.pixel_head.transformer]
        for transformer in (vqkd.encoder.encoder.transformer, vqkd.features.transformer, *heads):
            for block in transformer.blocks:
                block.compile()


class FrozenCodes:
    """Vectors of the codes that a tokenizer gives pictures; in fp32, and found once a picture while pictures stay."""

    def __init__(self, tokenizer: ImageTokenizer, *, keep: bool) -> None:
        self._tokenizer, self._keep = tokenizer, keep
        self._codes: dict[int, Tensor] = {}

    def vectors(self, items: list[int], pixels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(code vectors, pixels) on the device."""
        pixels = pixels.to(device)
        self._tokenizer.to(device)
        if not self._keep:  # the next time a picture comes it is another one
            return self._tokenizer.encoder.vectors_of(self._tokenizer.encode_pixels(pixels).to(device)), pixels
        missing = [place for place, item in enumerate(items) if item not in self._codes]
        if missing:
            found = self._tokenizer.encode_pixels(pixels[missing])
            self._codes |= {items[place]: codes for place, codes in zip(missing, found, strict=True)}
        codes = torch.stack([self._codes[item] for item in items])
        return self._tokenizer.encoder.vectors_of(codes.to(device)), pixels


class Describing:
    """Trainee of the third phase: the codes are frozen, a decoder learns to say from them what the teacher sees."""

    def __init__(self, losses: DescribingLoss, batches: PictureBatches, tokenizer: ImageTokenizer) -> None:
        self.losses, self._batches = losses, batches
        self.module: nn.Module = losses
        self._codes = FrozenCodes(tokenizer, keep=batches.augmentation == AugmentationConfig())
        self._held_out = FrozenCodes(tokenizer, keep=False)

    def next_batch(self) -> PictureBatch:
        """The next batch, on the CPU."""
        return self._batches.next()

    def to_device(self, batch: PictureBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """(code vectors, pixels) where the module is."""
        return self._codes.vectors(batch.items, batch.pixels_BCHW, device)

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream of batches."""
        return self._batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        self._batches.load_state(state)

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Every process stands at the same place of the whole stream."""
        return processes.agreed(states)

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures on held-out pictures, in fp32."""
        parts = []
        for pixels in self._batches.held_out.batches(device):
            report = self.losses(self._held_out.vectors([], pixels, device))[1]
            parts.append(torch.stack([report["deep"], report["shallow"]]) * len(pixels))
        deep, shallow = (torch.stack(parts).sum(0) / len(self._batches.held_out)).tolist()
        return {"described_deep": deep, "described_shallow": shallow}

    def compile(self) -> None:
        """Compile the repeated blocks."""
        for block in self.losses.features.transformer.blocks:
            block.compile()


class Drawing:
    """Trainee of the second phase: the codes are frozen, the pixel head learns to draw them."""

    def __init__(self, losses: DrawingLoss, batches: PictureBatches, tokenizer: ImageTokenizer) -> None:
        self.module: nn.Module = losses
        self._batches, self._tokenizer = batches, tokenizer
        self._codes = FrozenCodes(tokenizer, keep=batches.augmentation == AugmentationConfig())

    def next_batch(self) -> PictureBatch:
        """The next batch, on the CPU."""
        return self._batches.next()

    def to_device(self, batch: PictureBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """(code vectors, pixels, those of the neighbours) where the module is."""
        found = self._codes.vectors(batch.items, batch.pixels_BCHW, device)
        return *found, _moved(batch.neighbours_BCHW, device)

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream of batches."""
        return self._batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        self._batches.load_state(state)

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Every process stands at the same place of the whole stream."""
        return processes.agreed(states)

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures on held-out pictures, in fp32."""
        self._tokenizer.to(device)  # a run that was stopped after its last step comes here first
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


def _moved(pixels: Tensor | None, device: torch.device) -> Tensor | None:
    return None if pixels is None else pixels.to(device)


def make_vqkd(
    config: VQKDConfig,
    head: PixelHeadConfig | None,
    teacher: VisionTeacher | None,
    *,
    teacher_config: TeacherConfig,
    batch_size: int,
    seed: int,
    structure: bool = False,
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
            structure=structure,
        )
