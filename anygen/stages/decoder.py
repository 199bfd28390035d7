"""Stage `decoder`: a flow decoder that draws pictures from their codes. No language model is in memory.

flow/ and, where there is a second phase, finishing/ hold checkpoints and metrics; model/ is a diffusers pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from anygen.config import Config
from anygen.data.coded import CodedStore
from anygen.data.pictures import PictureSet
from anygen.errors import DataError
from anygen.evaluation.voken_gap import compare
from anygen.files import publishing
from anygen.seeding import borrowed_randomness, seed_of
from anygen.stages.base import Shuffled, StageConfig, StageResult, open_records
from anygen.stages.coded_shards import places_of
from anygen.stages.finishing import FinishingConfig, FinishingLoss
from anygen.stages.tokenize import coded_facts, open_media_tokenizers
from anygen.training.loop import LoopConfig, train
from decoders.flow import flow_loss
from decoders.optional import load_diffusers
from tokenizers_mm.image import ImageTokenizer

_VALIDATION_PICTURES = 128


class DenoiserConfig(Config):
    """Size of the denoiser; its patches are those of the picture tokenizer."""

    width: int = Field(192, ge=8)
    depth: int = Field(6, ge=1)
    heads: int = Field(3, ge=1)
    condition_dim: int = Field(64, ge=1)
    """Features of a patch's condition."""


class DecoderConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["decoder"] = "decoder"
    denoiser: DenoiserConfig = DenoiserConfig()
    batch_size: int = Field(32, ge=1)
    drop_share: float = Field(0.1, ge=0, le=1)
    """Share of conditions replaced by the null (classifier-free guidance)."""
    code_noise: float = Field(0.05, ge=0, le=1)
    """Share of codes replaced by random ones: a language model's codes are not the tokenizer's."""
    loop: LoopConfig
    finishing: FinishingConfig | None = None
    """A second phase, through the steps of drawing; none where left out."""

    @property
    def on_cpu(self) -> bool:
        """True where the recipe wants no GPU."""
        return self.loop.device == "cpu"

    def check(self) -> None:
        """Without diffusers nothing is moved or trained."""
        load_diffusers()


@dataclass(frozen=True, eq=False)
class CodedPictures:
    """Codes and pixels of the pictures of a split."""

    codes_NP: Tensor
    pictures: PictureSet
    items: list[int]

    @classmethod
    def open(cls, config: StageConfig, image: ImageTokenizer, split: str) -> CodedPictures:
        """Those of a run.

        Raises:
            DataError: it has none.
        """
        pictures = PictureSet(open_records(config.root, split), image.config.side_px)
        keys = pictures.store.keys()
        item_of = {keys[index]: item for item, index in enumerate(pictures.indices)}
        facts = coded_facts(*open_media_tokenizers(config.root))
        found = [
            (item_of[record.key], record.picture.codes_KT[0].tolist())
            for record in CodedStore(places_of(None, config.root, split), facts=facts)
            if record.picture is not None and record.key in item_of
        ]
        if not found:
            raise DataError(f"{config.root} has no coded pictures of split {split}: run the stages data and tokenize")
        return cls(torch.tensor([codes for _, codes in found]), pictures, [item for item, _ in found])

    def batch(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Codes, B x P, and pixels in [0, 1]."""
        return self.codes_NP[numbers], self.pictures.pixels([self.items[number] for number in numbers])


class RenderingLoss(nn.Module):
    """Flow loss of pictures under their codes, some of them wrong, some conditions dropped."""

    def __init__(self, decoder: Any, *, drop_share: float, code_noise: float) -> None:
        super().__init__()
        self.denoiser, self.codes = decoder.denoiser.requires_grad_(True), decoder.codes.requires_grad_(True)
        self._drop_share, self._code_noise = drop_share, code_noise

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; nothing else to report."""
        codes_BP, pixels_BCHW = batch
        device = codes_BP.device
        wrong_BP = (torch.rand(codes_BP.shape) < self._code_noise).to(device)
        others_BP = torch.randint(self.codes.config.codebook_size, codes_BP.shape).to(device)
        drop_B = (torch.rand(len(codes_BP)) < self._drop_share).to(device)
        condition = self.codes(torch.where(wrong_BP, others_BP, codes_BP), drop=drop_B)
        return flow_loss(self.denoiser, pixels_BCHW * 2 - 1, condition), {}


class Rendering:
    """Trainee of the stage."""

    def __init__(
        self,
        decoder: Any,
        losses: nn.Module,
        splits: tuple[CodedPictures, CodedPictures],
        order: Shuffled,
        encode: Callable[[Tensor], Tensor],
    ) -> None:
        self.module: nn.Module = losses
        self._decoder, self._order, self._encode = decoder, order, encode
        self._train, self._held_out = splits

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next batch, on the CPU."""
        return self._train.batch(self._order.next())

    def to_device(self, batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """The batch where the module is."""
        return batch[0].to(device), batch[1].to(device)

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream of batches."""
        return {"position": self._order.position}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to such a position."""
        self._order.position = int(state["position"])

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """Code agreement and PSNR of four-step drawings of held-out pictures, and their flow loss."""
        numbers = list(range(min(_VALIDATION_PICTURES, len(self._held_out.items))))
        codes, pixels = self.to_device(self._held_out.batch(numbers), device)
        with borrowed_randomness(0):
            loss = module((codes, pixels))[0]
        drawn = self._decoder(codes=codes, generator=torch.Generator().manual_seed(0)).data_BCHW
        found = compare((drawn + 1) / 2, pixels, codes, self._encode)
        means = {"agreement": float(found.agreement_B.mean()), "psnr": float(found.psnr_B.mean())}
        return {"loss": float(loss), **means}

    def compile(self) -> None:
        """Compile the repeated blocks."""
        for block in self._decoder.denoiser.blocks:
            block.compile()


def main(config: DecoderConfig) -> StageResult:
    """Train, and save the pipeline."""
    image, _ = open_media_tokenizers(config.root)
    if image is None:
        raise DataError(f"{config.root} has no picture tokenizer: run the stage image_tokenizer first")
    decoder = make_decoder(config, image)
    splits = CodedPictures.open(config, image, "train"), CodedPictures.open(config, image, "validation")

    def phase(losses: nn.Module, loop: LoopConfig, batch_size: int, name: str) -> dict[str, float]:
        order = Shuffled(len(splits[0].items), batch_size, seed=seed_of(loop.seed, name))
        trainee = Rendering(decoder, losses, splits, order, encoder_of(image))
        return train(trainee, loop, config.folder / name, title=f"decoder, {name}")

    losses = RenderingLoss(decoder, drop_share=config.drop_share, code_noise=config.code_noise)
    metrics = phase(losses, config.loop, config.batch_size, "flow")
    if config.finishing is not None:
        finishing = FinishingLoss(decoder, image, config.finishing, drop_share=config.drop_share)
        more = phase(finishing, config.finishing.loop, config.finishing.batch_size, "finishing")
        metrics |= {f"finished_{name}": value for name, value in more.items()}
    with publishing(config.folder / "model") as folder:
        decoder.save_small(folder)
    return StageResult(config.folder, (config.folder / "model",), metrics)


def make_decoder(config: DecoderConfig, image: ImageTokenizer) -> Any:
    """An untrained flow decoder for the pictures of a tokenizer."""
    diffusers = load_diffusers()
    from decoders.decoder import FlowDecoder
    from decoders.denoiser import FlowTransformer
    from decoders.drivers import CodeEmbedder

    side, patch = image.config.side_px, image.config.patch_px
    with borrowed_randomness(seed_of(config.loop.seed, "denoiser")):
        denoiser = FlowTransformer(size=(side, side), patch=(patch, patch), **config.denoiser.model_dump())
        codes = CodeEmbedder(
            codebook_size=image.codebook_size, dim=config.denoiser.condition_dim, patches=math.prod(image.grid_hw)
        )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    return FlowDecoder(denoiser, scheduler, codes=codes)


def encoder_of(image: ImageTokenizer) -> Callable[[Tensor], Tensor]:
    """Pixels, B x C x H x W in [0, 1], to the codes of the first book, B x P."""

    def encode(pixels: Tensor) -> Tensor:
        codes: Tensor = image.to(pixels.device).encode_pixels(pixels)
        return codes.reshape(len(pixels), image.num_codebooks, -1)[:, 0]

    return encode
