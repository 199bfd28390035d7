"""Stage `image_tokenizer`: VQ-KD against the teacher, then a pixel head (and a feature decoder) on the frozen codes.

vqkd/       checkpoints and metrics of the first phase, pixels/ of the second, described/ of the third
tokenizer/  the result: encoder, codebooks, pixel head
features/   the decoder from codes to the teacher's features, for evaluation and for those who want features
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from anygen.data.augmentation import AugmentationConfig
from anygen.data.neighbours import nearest_pictures
from anygen.data.pictures import PictureSet
from anygen.errors import ConfigError
from anygen.files import publishing, sha256_of
from anygen.seeding import borrowed_randomness, seed_of
from anygen.stages.base import StageConfig, StageResult, open_records
from anygen.stages.picture_losses import DescribingLoss, DistillationLoss, DrawingLoss
from anygen.stages.picture_phases import Describing, Distillation, Drawing, PictureBatches, make_vqkd
from anygen.training import processes
from anygen.training.loop import LoopConfig, train
from tokenizers_mm.features import FeatureDecoder, FeatureDecoderConfig
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.patchgan import PatchGANConfig
from tokenizers_mm.pixels import PixelHead, PixelHeadConfig
from tokenizers_mm.teacher import TeacherConfig, VisionTeacher
from tokenizers_mm.vqkd import VQKDConfig


class ImageTokenizerConfig(StageConfig):
    """Recipe of the stage."""

    several_processes: ClassVar[bool] = True
    stage: Literal["image_tokenizer"] = "image_tokenizer"
    encoder: VQKDConfig = VQKDConfig()
    head: PixelHeadConfig = PixelHeadConfig()
    teacher: TeacherConfig = TeacherConfig()
    """Without a path it is the one that stage `teacher` made; with both weights below at 0 there is none."""
    deep_weight: float = Field(1.0, ge=0)
    shallow_weight: float = Field(0.3, ge=0)
    """What can be drawn must be in the codes: the shallow features hold colours and edges."""
    commitment_weight: float = Field(1.0, ge=0)
    pixel_weight: float = Field(0.0, ge=0)
    """Weight of drawing already while the codes form; 0 is VQ-KD alone."""
    joint_structure_weight: float = Field(0.0, ge=0)
    """Weight of 1 - SSIM in that drawing."""
    joint_neighbour_weight: float = Field(0.0, ge=0, exclude_if=lambda weight: weight == 0)
    """Weight of errors that lead to another picture of the training split, one of the four nearest, in that drawing."""
    head_start: Literal["new", "joint"] = "new"
    """Where the second phase's pixel head starts: untrained, or from the one that drew while the codes formed."""
    perceptual_weight: float = Field(0.0, ge=0)
    """Weight of the teacher's shallow features in the pixel head's loss."""
    structure_weight: float = Field(0.0, ge=0)
    """Weight of 1 - SSIM in the pixel head's loss."""
    neighbour_weight: float = Field(0.0, ge=0, exclude_if=lambda weight: weight == 0)
    """Weight of errors that lead to such a neighbour in the pixel head's loss."""
    adversarial: PatchGANConfig = PatchGANConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    batch_size: int = Field(64, ge=1)
    """Pictures a step, of all processes together."""
    steps_without_quantiser: int = Field(0, ge=0)
    """First steps, in which the encoder learns to tell patches apart, so that the codebook starts on what it says."""
    usage_window: int = Field(50, ge=1)
    """Batches over which use of the codebook is watched."""
    usage_alarm: float = Field(0.5, ge=0, le=1)
    """Share of the codebook below which the run says that it collapses."""
    vqkd_loop: LoopConfig
    head_loop: LoopConfig
    features_loop: LoopConfig | None = Field(None, exclude_if=lambda loop: loop is None)
    """Third phase: a deeper decoder from the frozen codes to the teacher's features. Without it `features/` is that of
    the first phase, which is shallow so that the codes, not the decoder, say what the teacher sees."""
    features_depth: int = Field(3, ge=1, exclude_if=lambda depth: depth == 3)
    """Layers of that decoder."""

    @property
    def has_teacher(self) -> bool:
        """False for codes of pixels alone."""
        return self.deep_weight > 0 or self.shallow_weight > 0 or self.perceptual_weight > 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not (self.deep_weight or self.shallow_weight or self.pixel_weight):
            raise ValueError("nothing to learn from: one of deep_weight, shallow_weight, pixel_weight must be above 0")
        seen = 4 * 2**self.adversarial.layers
        if self.adversarial.weight and self.encoder.side_px < seen:
            raise ValueError(
                f"adversarial.layers={self.adversarial.layers} needs pictures of {seen} px or more; "
                f"side_px is {self.encoder.side_px}"
            )
        for name in ("joint_structure_weight", "joint_neighbour_weight"):
            if getattr(self, name) and not self.pixel_weight:
                raise ValueError(f"{name} needs pixel_weight above 0, otherwise nothing is drawn")
        if (self.structure_weight or self.joint_structure_weight) and self.encoder.side_px < 11:
            raise ValueError(f"comparing structure needs pictures of 11 px or more; side_px is {self.encoder.side_px}")
        if self.steps_without_quantiser >= self.vqkd_loop.steps:
            raise ValueError(f"steps_without_quantiser={self.steps_without_quantiser} leaves no step with codes")
        if self.features_loop and not (self.deep_weight or self.shallow_weight):
            raise ValueError("features_loop needs deep_weight or shallow_weight above 0, otherwise there is no teacher")
        if self.head_start == "joint" and not self.pixel_weight:
            raise ValueError("head_start: joint needs pixel_weight above 0, otherwise no head has been trained")
        return self

    @property
    def on_cpu(self) -> bool:
        """True where the recipe wants no GPU."""
        return self.vqkd_loop.device == "cpu"

    def check(self) -> None:
        """A teacher or batch size that cannot be used is told before anything is moved or trained."""
        processes.own_rows(self.batch_size)
        open_teacher(self)

    def outside_inputs(self) -> Mapping[str, str]:
        """The files of a teacher that does not come from this run."""
        if self.teacher.path is None or not self.has_teacher:
            return {}
        files = [*self.teacher.path.glob("*.safetensors"), *self.teacher.path.glob("*.json")]
        return {path.name: sha256_of(path) for path in sorted(files)}


def main(config: ImageTokenizerConfig) -> StageResult:
    """Train every phase; save `tokenizer/` and `features/`."""
    teacher = open_teacher(config)
    pictures = _pictures(config)

    compared = config.joint_neighbour_weight or config.neighbour_weight
    neighbours_NK = nearest_pictures(pictures[0]) if compared else None

    losses = distillation_loss(config, teacher)
    batches = _batches(
        config, pictures, config.vqkd_loop.seed, "vqkd", neighbours_NK if config.joint_neighbour_weight else None
    )
    distillation = Distillation(losses, batches, config.encoder)
    metrics = train(distillation, config.vqkd_loop, config.folder / "vqkd", title="vqkd")
    vqkd = losses.vqkd.cpu()

    with borrowed_randomness(seed_of(config.head_loop.seed, "head")):
        head = PixelHead(config.head, code_dim=config.encoder.code_dim, patch_px=config.encoder.patch_px)
    if config.head_start == "joint" and vqkd.pixel_head is not None:
        head.load_state_dict(vqkd.pixel_head.state_dict())
    tokenizer = ImageTokenizer(config.encoder, vqkd.encoder, config.head, head)
    head.requires_grad_(True)
    batches = _batches(
        config, pictures, config.head_loop.seed, "head", neighbours_NK if config.neighbour_weight else None
    )
    drawing = Drawing(drawing_loss(config, tokenizer, teacher), batches, tokenizer)
    metrics |= train(drawing, config.head_loop, config.folder / "pixels", title="pixel head")

    outputs = [config.folder / "tokenizer"]
    _save(tokenizer, outputs[0])
    if config.deep_weight or config.shallow_weight:
        features = vqkd.features
        if config.features_loop is not None and teacher is not None:
            describing_module = describing_loss(config, config.features_loop, features.config, teacher)
            batches = _batches(config, pictures, config.features_loop.seed, "described")
            describing = Describing(describing_module, batches, tokenizer)
            metrics |= train(describing, config.features_loop, config.folder / "described", title="feature decoder")
            features = describing_module.features.cpu()
        outputs.append(config.folder / "features")
        _save(features, outputs[1])
    return StageResult(config.folder, tuple(outputs), metrics)


def _save(made: ImageTokenizer | FeatureDecoder, path: Path) -> None:
    """Publish what every process has; the others wait for the first."""
    if processes.rank() == 0:
        with publishing(path) as folder:
            made.save(folder)
    processes.wait()


def open_teacher(config: ImageTokenizerConfig) -> VisionTeacher | None:
    """The teacher of a recipe, from outside or from the run; None where no loss asks for one.

    Raises:
        ConfigError: no teacher there, or without the layer that is asked for.
    """
    if not config.has_teacher:
        return None
    path = config.teacher.path or config.root / "teacher" / "model"
    if not path.is_dir():
        raise ConfigError(
            f"there is no teacher in {path}: run the stage teacher first, or name a folder of transformers' layout "
            "(CLIP, SigLIP, DINOv2, ...) in teacher.path"
        )
    return VisionTeacher.open(config.teacher.model_copy(update={"path": path}))


def distillation_loss(config: ImageTokenizerConfig, teacher: VisionTeacher | None) -> DistillationLoss:
    """The first phase's module, untrained."""
    distils = bool(config.deep_weight or config.shallow_weight)
    vqkd = make_vqkd(
        config.encoder,
        config.head if config.pixel_weight else None,
        teacher if distils else None,
        teacher_config=config.teacher,
        batch_size=config.batch_size,
        seed=seed_of(config.vqkd_loop.seed, "vqkd"),
        structure=config.joint_structure_weight > 0,
    )
    weights = {
        "deep": config.deep_weight,
        "shallow": config.shallow_weight,
        "commitment": config.commitment_weight,
        "pixels": config.pixel_weight,
        "structure": config.joint_structure_weight,
        "neighbours": config.joint_neighbour_weight,
    }
    return DistillationLoss(
        vqkd,
        teacher if distils else None,
        config.encoder,
        weights=weights,
        steps_without_quantiser=config.steps_without_quantiser,
        usage_window=config.usage_window,
        usage_alarm=config.usage_alarm,
    )


def drawing_loss(config: ImageTokenizerConfig, tokenizer: ImageTokenizer, teacher: VisionTeacher | None) -> DrawingLoss:
    """The second phase's module."""
    with borrowed_randomness(seed_of(config.head_loop.seed, "gan")):
        return DrawingLoss(
            tokenizer.pixel_head,
            tokenizer.grid_hw,
            teacher if config.perceptual_weight else None,
            perceptual_weight=config.perceptual_weight,
            structure_weight=config.structure_weight,
            neighbour_weight=config.neighbour_weight,
            gan=config.adversarial,
            gan_start=round(config.adversarial.start_share * config.head_loop.steps),
        )


def describing_loss(
    config: ImageTokenizerConfig, loop: LoopConfig, decoder: FeatureDecoderConfig, teacher: VisionTeacher
) -> DescribingLoss:
    """The third phase's module, untrained."""
    rows = config.encoder.side_px // config.encoder.patch_px
    with borrowed_randomness(seed_of(loop.seed, "described")):
        features = FeatureDecoder(decoder.model_copy(update={"depth": config.features_depth}))
    weights = {"deep_weight": config.deep_weight, "shallow_weight": config.shallow_weight}
    return DescribingLoss(features, teacher, (rows, rows), **weights)


def _pictures(config: ImageTokenizerConfig) -> tuple[PictureSet, PictureSet]:
    """Training and held-out pictures."""
    train_set, held_out = (
        PictureSet(open_records(config.root, split), config.encoder.side_px) for split in ("train", "validation")
    )
    return train_set, held_out


def _batches(
    config: ImageTokenizerConfig,
    pictures: tuple[PictureSet, PictureSet],
    seed: int,
    phase: str,
    neighbours_NK: Tensor | None = None,
) -> PictureBatches:
    return PictureBatches(
        *pictures,
        batch_size=config.batch_size,
        augmentation=config.augmentation,
        seed=seed_of(seed, phase),
        neighbours_NK=neighbours_NK,
    )
