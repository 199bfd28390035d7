"""Stage `teacher`: a two-tower contrastive model (CLIP, arXiv 2103.00020) from scratch on picture-caption pairs.

It is a `transformers.CLIPModel`, saved in CLIP's layout, so that VQ-KD reads it in the way it reads any published
teacher. A third tower, for sounds, can learn beside it; VQ-KD's teacher is the vision tower all the same.

model/   the CLIPModel and its pixel normalisation
sound/   the sound tower, where the recipe has one: `tokenizers_mm.sound_tower.SoundTower.load`
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from anygen.config import Config
from anygen.data.augmentation import AugmentationConfig, augment
from anygen.data.pictures import PictureSet
from anygen.errors import DataError
from anygen.files import publishing
from anygen.seeding import borrowed_randomness, seed_of
from anygen.stages.base import Shuffled, StageConfig, StageResult, open_records, open_text_tokenizer
from anygen.stages.contrastive import PIXEL_MEAN, PIXEL_STD, Towers
from anygen.stages.sound_pairs import SoundPairs
from anygen.training import processes
from anygen.training.loop import LoopConfig, train
from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.llm_text import SomeTextTokenizer
from tokenizers_mm.sound_tower import SoundTower, SoundTowerConfig
from tokenizers_mm.vit import check_width


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

    several_processes: ClassVar[bool] = True
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
    augmentation: AugmentationConfig = AugmentationConfig()
    """What else is done to each training picture."""
    batch_size: int = Field(128, ge=2)
    """Of all processes together. Every other pair of a batch is a negative, but for `equal_captions`."""
    equal_captions: Literal["negatives", "positives"] = "negatives"
    """What equal captions of a batch are to one another; `positives` (UniCL) for data labelled with few classes."""
    sound: TowerConfig | None = None
    """A third tower, which learns from pictures with utterances; null for none."""
    sound_s: float = Field(2.0, gt=0, le=60)
    """Utterances are cut to this length, or padded with silence."""
    sound_weight: float = Field(1.0, ge=0)
    """Weight of the loss of pictures and sounds beside that of pictures and captions."""
    loop: LoopConfig

    @model_validator(mode="after")
    def _patches(self) -> Self:
        if self.side_px % self.patch_px:
            raise ValueError(f"side_px={self.side_px} must be a multiple of patch_px={self.patch_px}")
        if self.sound is not None:
            check_width(self.sound.width, self.sound.num_heads)
        return self

    @property
    def on_cpu(self) -> bool:
        """True where the recipe wants no GPU."""
        return self.loop.device == "cpu"

    def check(self) -> None:
        """A batch size that cannot be divided is told before anything is moved."""
        processes.own_rows(self.batch_size)


def main(config: TeacherConfig) -> StageResult:
    """Train and save `model/`, and `sound/` where there is a sound tower."""
    tokenizer = open_text_tokenizer(config.root)
    with borrowed_randomness(config.loop.seed):
        model = _create(config, tokenizer.codebook_size)
    sound = _create_sound(config) if config.sound is not None else None
    share_equal = config.equal_captions == "positives"
    towers = Towers(model, sound, share_equal=share_equal, sound_weight=config.sound_weight)
    trainee = _Contrastive(config, towers, tokenizer)
    metrics = train(trainee, config.loop, config.folder, title="teacher")
    outputs = [config.folder / "model"] + ([config.folder / "sound"] if sound is not None else [])
    if processes.rank() == 0:
        _save(config, model, sound)
    processes.wait()
    return StageResult(config.folder, tuple(outputs), metrics)


def _save(config: TeacherConfig, model: Any, sound: SoundTower | None) -> None:
    with publishing(config.folder / "model") as folder:
        model.save_pretrained(folder)
        preprocessing: dict[str, Any] = {
            "image_processor_type": "CLIPImageProcessor",
            "image_mean": [PIXEL_MEAN] * 3,
            "image_std": [PIXEL_STD] * 3,
        }
        preprocessing |= {"size": {"height": config.side_px, "width": config.side_px}, "do_center_crop": False}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1) + "\n", encoding="utf-8")
    if sound is not None:
        with publishing(config.folder / "sound") as folder:
            sound.save(folder)


def _create_sound(config: TeacherConfig) -> SoundTower:
    assert config.sound is not None, "the recipe has no sound tower"
    size = SoundTowerConfig(sound_s=config.sound_s, embedding=config.embedding, **config.sound.model_dump())
    with borrowed_randomness(seed_of(config.loop.seed, "sound")):
        return SoundTower(size)


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


class _Pairs:
    """The pictures of a split with their captions as text pieces, and their sounds where there is a tower for them."""

    def __init__(
        self, config: TeacherConfig, split: str, tokenizer: SomeTextTokenizer, sound: SoundTower | None
    ) -> None:
        self._length, self._tokenizer = config.max_pieces, tokenizer
        self.pictures = PictureSet(open_records(config.root, split), config.side_px)
        store, indices = self.pictures.store, self.pictures.indices
        self._captions = [[self._pieces(caption) for caption in store[index].captions] for index in indices]
        if not all(self._captions):
            key = store.keys()[indices[self._captions.index([])]]
            raise DataError(f"record {key!r} of the split {split} has a picture and no caption: the teacher needs both")
        self.sounds: SoundPairs | None = None
        if sound is not None:
            size = sound.config
            self.sounds = SoundPairs(store, indices, rate_hz=size.rate_hz, num_samples=size.num_samples)

    def batch(
        self, items: list[int], generator: random.Random | None = None, *, rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        """Pixels, and captions and sounds drawn from `generator`, or the first of each; of these rows of the batch."""
        pixels = self.pictures.pixels(items[rows])
        captions = [self._captions[item] for item in items]
        ids = torch.stack([generator.choice(some) if generator else some[0] for some in captions])[rows]
        sounds = self.sounds.batch(items, generator, rows=rows) if self.sounds is not None else {}
        return {"pixels": pixels, "ids": ids, **sounds}

    def _pieces(self, caption: str) -> Tensor:
        pieces = self._tokenizer.encode(caption).codes_KT[0][: self._length]
        ids = torch.full((self._length + 1,), self._tokenizer.codebook_size)
        ids[: len(pieces)] = torch.from_numpy(pieces.copy())
        return ids


class _Contrastive:
    def __init__(self, config: TeacherConfig, towers: Towers, tokenizer: SomeTextTokenizer) -> None:
        self.module: nn.Module = towers
        self._config, self._towers = config, towers
        self._train = _Pairs(config, "train", tokenizer, towers.sound)
        if self._train.sounds is not None and not len(self._train.sounds):
            raise DataError("sound is set, and no record with a picture has a sound: set sound=null")
        self._held_out = _Pairs(config, "validation", tokenizer, towers.sound) if _has_validation(config) else None
        seed = seed_of(config.loop.seed, "teacher")
        self._order = Shuffled(len(self._train.pictures), config.batch_size, seed=seed)
        self._rows = processes.own_rows(config.batch_size)

    def next_batch(self) -> dict[str, Tensor]:
        items = self._order.next()
        generator = self._order.generator()
        limit = self._config.max_shift_px
        shift = (generator.randint(-limit, limit), generator.randint(-limit, limit))
        batch = self._train.batch(items, generator, rows=self._rows)
        draws = torch.Generator().manual_seed(generator.getrandbits(62))
        pixels = augment(batch["pixels"], self._config.augmentation, draws, rows=self._rows, of=len(items))
        return {**batch, "pixels": torch.roll(pixels, shift, dims=(2, 3))}

    def to_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def state(self) -> dict[str, Any]:
        return {"position": self._order.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self._order.position = int(state["position"])

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return processes.agreed(states)

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """Loss and matched share of held-out pairs, in order and in batches of the training's size."""
        if self._held_out is None:
            return {}
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for items in _in_order(len(self._held_out.pictures), self._config.batch_size):
            loss, report = module(self.to_device(self._held_out.batch(items), device))
            for name, value in {"loss": loss, **report}.items():
                if not torch.isnan(value):  # no two sounds in this batch
                    totals[name] = totals.get(name, 0.0) + float(value) * len(items)
                    counts[name] = counts.get(name, 0) + len(items)
        return {name: total / counts[name] for name, total in totals.items()}

    def compile(self) -> None:
        for layer in self._towers.model.vision_model.encoder.layers:
            layer.compile()
        for block in self._towers.sound.transformer.blocks if self._towers.sound else ():
            block.compile()


def _has_validation(config: TeacherConfig) -> bool:
    return any((config.root / "data").glob("validation-*.tar"))


def _in_order(num_items: int, size: int) -> Iterator[list[int]]:
    """Batches of `size`; what is left over at the end makes one of its own where it is two or more.

    >>> list(_in_order(7, 3)), list(_in_order(8, 3))
    ([[0, 1, 2], [3, 4, 5]], [[0, 1, 2], [3, 4, 5], [6, 7]])
    """
    for start in range(0, num_items - 1, size):
        yield list(range(start, min(start + size, num_items)))
