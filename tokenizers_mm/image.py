"""The picture tokenizer: a VQ-KD encoder with its codebook, and the pixel head that draws from its codes.

Dimension key: B pictures, N patches, H x W pixels, C colours.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenizers_mm.codes import Codes, Modality, check_codes, fingerprint_of
from tokenizers_mm.errors import CheckpointError, InputError
from tokenizers_mm.media import PictureSource, load_picture
from tokenizers_mm.pixels import PixelHead, PixelHeadConfig
from tokenizers_mm.quantizer import QuantizerConfig
from tokenizers_mm.vqkd import PictureEncoder, VQKDConfig
from tokenizers_mm.weights import load_facts, load_weights, rounded, save_facts, save_weights

KIND = "vqkd"
_KEEP_FP32 = ("_codebook",)


class ImageTokenizer:
    """Pictures to one code a patch, and back.

    A picture is padded to a square with white and scaled to the native side; `encode_pixels` takes any grid.
    """

    modality: Modality = "image"
    rate_hz = None

    def __init__(
        self, config: VQKDConfig, encoder: PictureEncoder, head_config: PixelHeadConfig, pixel_head: PixelHead
    ) -> None:
        if not encoder.is_started:
            raise CheckpointError("this picture tokenizer has no codebook yet: train it first")
        self.config, self.head_config = config, head_config
        self.encoder, self.pixel_head = encoder, pixel_head
        for module, keep in ((encoder, _KEEP_FP32), (pixel_head, ())):
            rounded(module, keep=keep).eval().requires_grad_(False)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> ImageTokenizer:
        """Move to a device; returns itself."""
        self.encoder.to(device)
        self.pixel_head.to(device)
        self.device = device
        return self

    @property
    def codebook_size(self) -> int:
        """Entries of every codebook."""
        return self.config.codebook_size

    @property
    def num_codebooks(self) -> int:
        """Codebooks; each after the first holds what the ones before left over."""
        return self.config.quantizer.num_codebooks

    @property
    def code_vectors(self) -> Tensor:
        """K x V x X: what each code stands for."""
        return self.encoder.codebooks_KVX

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of patches of a picture at native size."""
        side = self.config.side_px // self.config.patch_px
        return side, side

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the codes: configuration, encoder and codebook, not the pixel head."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.encoder.state_dict().items()}
        return fingerprint_of({"kind": KIND, **self._facts()}, arrays)

    def _facts(self) -> dict[str, Any]:
        """The configuration, without what came later and is at its default: old tokenizers keep their fingerprint."""
        facts = self.config.model_dump(mode="json")
        if self.config.quantizer == QuantizerConfig():
            del facts["quantizer"]
        return facts

    def encode(self, media: PictureSource, *, keep_aspect: bool = False) -> Codes:
        """One picture to K x N codes.

        Args:
            media: the picture.
            keep_aspect: instead of padding to a square, a grid of about as many patches in the picture's own shape.

        Raises:
            InputError: not a picture, or beyond the limits of `tokenizers_mm.media`.
        """
        side, patch = self.config.side_px, self.config.patch_px
        picture = load_picture(media, max_side_px=4 * side if keep_aspect else side)
        fitted = in_its_shape(picture, side, patch) if keep_aspect else square(picture, side)
        codes = self.encode_pixels(to_pixels(fitted)[None])[0]
        grid_hw = fitted.height // patch, fitted.width // patch
        return Codes(codes.reshape(self.num_codebooks, -1).numpy(), "image", grid_hw)

    @torch.inference_mode()
    def encode_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in [0, 1] of any grid to codes on the CPU: B x N, or B x K x N with several codebooks.

        Raises:
            InputError: sides that are not multiples of the patch, or values that are not finite.
        """
        patch = self.config.patch_px
        if pixels_BCHW.shape[2] % patch or pixels_BCHW.shape[3] % patch:
            raise InputError(f"picture sides must be multiples of {patch} px, got {tuple(pixels_BCHW.shape[2:])}")
        if not torch.isfinite(pixels_BCHW).all():
            raise InputError("the picture holds NaN or infinite pixels")
        _, codes, _ = self.encoder(pixels_BCHW.to(self.device))
        return codes.cpu()

    def decode(self, codes: Codes) -> Image.Image:
        """K x N codes of any grid to a picture; fewer codebooks give a coarser one."""
        check_codes(codes, "image", self.codebook_size, self.num_codebooks)
        assert codes.grid_hw is not None
        return to_picture(self.decode_codes(torch.from_numpy(codes.codes_KT.copy())[None], codes.grid_hw)[0])

    @torch.inference_mode()
    def decode_codes(self, codes: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """Codes B x N or B x K x N to pixels in [0, 1], on the CPU."""
        vectors_BNX = self.encoder.vectors_of(codes.to(self.device))
        return self.pixel_head(vectors_BNX, grid_hw).clamp(0, 1).float().cpu()

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_facts(folder, {"kind": KIND, "vqkd": self._facts(), "pixel_head": self.head_config.model_dump()})
        save_weights(folder, {"encoder": self.encoder, "pixel_head": self.pixel_head}, keep=_KEEP_FP32)

    @classmethod
    def load(cls, folder: Path) -> ImageTokenizer:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, broken or of another kind.
        """
        facts = load_facts(folder, kind=KIND)
        try:
            config, head_config = VQKDConfig(**facts["vqkd"]), PixelHeadConfig(**facts["pixel_head"])
            encoder = PictureEncoder(config)
            head = PixelHead(head_config, code_dim=config.code_dim, patch_px=config.patch_px)
        except (KeyError, TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise CheckpointError(f"{folder / 'config.json'} is broken: {error}") from error
        load_weights(folder, {"encoder": encoder, "pixel_head": head})
        return cls(config, encoder, head_config, head)


def square(picture: Image.Image, side_px: int, *, fill: str = "white") -> Image.Image:
    """Scaled so that the longer side is `side_px`, padded to a square with `fill`."""
    scale = side_px / max(picture.size)
    if scale != 1:  # before padding: the square of a 16,384 x 1 picture would take 800 MB
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    if picture.size == (side_px, side_px):
        return picture
    canvas = Image.new(picture.mode, (side_px, side_px), fill)
    canvas.paste(picture, ((side_px - picture.width) // 2, (side_px - picture.height) // 2))
    return canvas


def in_its_shape(picture: Image.Image, side_px: int, patch_px: int) -> Image.Image:
    """Scaled to about `side_px`^2 pixels, each side a multiple of the patch; shapes beyond 1 : 16 are cut to that.

    >>> in_its_shape(Image.new("RGB", (300, 100)), 64, 8).size
    (112, 40)
    """
    ratio = min(max(picture.width / picture.height, 1 / 16), 16.0)
    width = max(1, round(side_px * ratio**0.5 / patch_px)) * patch_px
    height = max(1, round(side_px / ratio**0.5 / patch_px)) * patch_px
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)


def to_pixels(picture: Image.Image) -> Tensor:
    """An RGB picture as C x H x W in [0, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1).float() / 255


def to_picture(pixels_CHW: Tensor) -> Image.Image:
    """The inverse of `to_pixels`."""
    return Image.fromarray((pixels_CHW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
