"""Stage `teacher`: a two-tower contrastive model (CLIP, arXiv 2103.00020) from scratch on picture-caption pairs.

It is a `transformers.CLIPModel`, saved in CLIP's layout, so that VQ-KD reads it in the way it reads any published
teacher.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from anygen.config import Config
from anygen.files import publishing
from anygen.seeding import borrowed_randomness, seed_of
from anygen.stages.base import PictureSet, Shuffled, StageConfig, StageResult, open_records, open_text_tokenizer
from anygen.training.loop import LoopConfig, train
from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.text import TextTokenizer

_MEAN = _STD = 0.5


class TowerConfig(Config):
    """Size of one tower."""

    width: int = Field(192, ge=1)
    """A multiple of `num_heads`."""
    depth: int = Field(4, ge=1)
    """Layers."""
    num_heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
        return self


class TeacherConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["teacher"] = "teacher"
    side_px: int = Field(64, ge=1)
    """Side of the pictures."""
    patch_px: int = Field(8, ge=1)
    """The picture tokenizer needs the same."""
    vision: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig(width=128, depth=2)
    embedding: int = Field(128, ge=1)
    """Width of the space that both towers meet in."""
    max_pieces: int = Field(40, ge=1)
    """Captions are cut to this many text pieces."""
    max_shift_px: int = Field(3, ge=0)
    """Pictures of a batch are shifted together by up to this much."""
    batch_size: int = Field(128, ge=2)
    """Every other pair of a batch is a negative."""
    loop: LoopConfig

    @model_validator(mode="after")
    def _patches(self) -> Self:
        if self.side_px % self.patch_px:
            raise ValueError(f"side_px={self.side_px} must be a multiple of patch_px={self.patch_px}")
        return self


def main(config: TeacherConfig) -> StageResult:
    """Train and save `model/`."""
    tokenizer = open_text_tokenizer(config.root)
    with borrowed_randomness(config.loop.seed):
        model = _create(config, tokenizer.codebook_size)
    trainee = _Contrastive(config, model, tokenizer)
    metrics = train(trainee, config.loop, config.folder, title="teacher")
    with publishing(config.folder / "model") as folder:
        model.save_pretrained(folder)
        preprocessing: dict[str, Any] = {
            "image_processor_type": "CLIPImageProcessor",
            "image_mean": [_MEAN] * 3,
            "image_std": [_STD] * 3,
        }
        preprocessing |= {"size": {"height": config.side_px, "width": config.side_px}, "do_center_crop": False}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1) + "\n", encoding="utf-8")
    return StageResult(config.folder, (config.folder / "model",), metrics)


def _create(config: TeacherConfig, num_pieces: int) -> Any:
    from transformers import CLIPConfig, CLIPModel

    def tower(size: TowerConfig, **more: Any) -> dict[str, Any]:
        return {
            "hidden_size": size.width,
            "intermediate_size": 4 * size.width,
            "num_hidden_layers": size.depth,
            "num_attention_heads": size.num_heads,
            "projection_dim": config.embedding,
            "hidden_act": "gelu",
            **more,
        }

    end = num_pieces  # one id behind the text pieces closes and pads every caption
    text = tower(
        config.text,
        vocab_size=num_pieces + 1,
        max_position_embeddings=config.max_pieces + 1,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    vision = tower(config.vision, image_size=config.side_px, patch_size=config.patch_px)
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.embedding)
    # SDPA's CPU backward in bf16 is slower than plain products on these lengths
    return CLIPModel._from_config(clip, attn_implementation="eager")


class _Towers(nn.Module):
    """Symmetric InfoNCE over the pairs of a batch."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.model(
            input_ids=batch["ids"], attention_mask=None, pixel_values=(batch["pixels"] - _MEAN) / _STD, return_dict=True
        )
        logits = out.logits_per_image.float()
        truth = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        return loss, {"matched": (logits.argmax(1) == truth).float().mean()}


class _Contrastive:
    def __init__(self, config: TeacherConfig, model: Any, tokenizer: TextTokenizer) -> None:
        self.module: nn.Module = _Towers(model)
        self._config, self._tokenizer = config, tokenizer
        self._train = PictureSet(open_records(config.root, "train"), config.side_px)
        self._captions = [[self._pieces(c) for c in self._train.store[i].captions] for i in self._train.indices]
        self._order = Shuffled(len(self._train), config.batch_size, seed=seed_of(config.loop.seed, "teacher"))

    def _pieces(self, caption: str) -> Tensor:
        pieces = self._tokenizer.encode(caption).codes_KT[0][: self._config.max_pieces]
        ids = torch.full((self._config.max_pieces + 1,), self._tokenizer.codebook_size)
        ids[: len(pieces)] = torch.from_numpy(pieces.copy())
        return ids

    def next_batch(self) -> dict[str, Tensor]:
        items = self._order.next()
        generator = self._order.generator()
        pixels = self._train.pixels(items)
        limit = self._config.max_shift_px
        shift = (generator.randint(-limit, limit), generator.randint(-limit, limit))
        ids = torch.stack([generator.choice(self._captions[item]) for item in items])
        return {"pixels": torch.roll(pixels, shift, dims=(2, 3)), "ids": ids}

    def to_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def state(self) -> dict[str, Any]:
        return {"position": self._order.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self._order.position = int(state["position"])

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        return {}

    def compile(self) -> None:
        for layer in self.module.model.vision_model.encoder.layers:  # type: ignore[union-attr]
            layer.compile()
