"""Stage `vokens` against a pretrained diffusers pipeline (a recipe with `renderer`): MiniGPT-5 itself.

frozen/   checkpoints and metrics of the first phase: only the rows of vokens and the mapper learn
joint/    of the second, where the recipe has one: the transformer learns too
model/    the result: a Qwen3 checkpoint with its vocabulary and layout, as of stage `pretrain`
decoder/  the mapper and the name of the pipeline, whose weights stay where they are

No stage `decoder` is needed. Captions are the texts before voken blocks; pictures come from the record shards of stage
`data`, at the side that the pipeline was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator

from anygen.config import Config
from anygen.data.coded import CodedStore
from anygen.data.pictures import NamedPictures
from anygen.data.tasks import Direction, DocumentStream
from anygen.documents import Tokenizers
from anygen.files import publishing, write_json
from anygen.model import attention
from anygen.model.loss import LossWeights
from anygen.seeding import borrowed_randomness, seed_of
from anygen.sequence import Sequencer
from anygen.stages.base import StageConfig, StageResult, open_records
from anygen.stages.coded_shards import places_of
from anygen.stages.pretrain import load_pretrained, open_tokenizers
from anygen.stages.prompt_losses import PromptData, PromptLoss, PromptWeights
from anygen.stages.tokenize import coded_facts
from anygen.stages.voken_losses import VokenRows
from anygen.stages.voken_phases import VokenTraining
from anygen.training.loop import LoopConfig, train
from decoders.pretrained import check_pipeline, open_pipeline
from decoders.prompt import PromptDecoder
from decoders.prompt_ports import denoiser_of
from tokenizers_mm.codes import fingerprint_of

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RendererConfig(Config):
    """The pretrained pipeline, and the mapper in front of it; sizes are MiniGPT-5's."""

    pipeline: str
    """Folder in diffusers' layout, or a repository's id."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of its frozen weights."""
    recompute: bool = False
    """Compute the denoiser's activations anew in the backward pass instead of keeping them."""
    side_px: int | None = Field(None, ge=8)
    """Of the pictures; None takes the side that the denoiser was trained on."""
    queries: int = Field(77, ge=1)
    """Embeddings that the mapper gives: those of the text encoder, where `align_weight` is not 0."""
    width: int = Field(1024, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(8, ge=1)


class PromptVokensConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["vokens"] = "vokens"
    renderer: RendererConfig
    mixture: dict[str, float] = {"text>voken": 1.0}
    """Directions of the first phase, to voken pictures; see `anygen.data.tasks`."""
    joint_mixture: dict[str, float] = {}
    """Directions of the second phase, such as `story>voken` and `story>text,voken`; those of the first where empty."""
    documents_per_batch: int = Field(48, ge=1)
    denoise_weight: float = Field(1.0, ge=0)
    align_weight: float = Field(0.1, ge=0)
    """Distance to the text encoder's embeddings of the caption."""
    text_weight: float = Field(0.01, ge=0)
    joint_align_weight: float = Field(0.0, ge=0)
    """In the second phase MiniGPT-5 goes without captions."""
    drop_share: float = Field(0.1, ge=0, le=1)
    """Share of conditions replaced by the null (classifier-free guidance)."""
    rows_lr_ratio: float = Field(0.1, gt=0)
    """Learning rate of the voken rows over the mapper's."""
    model_lr_ratio: float = Field(1.0, gt=0)
    """Learning rate of the transformer in the second phase over the mapper's."""
    frozen_loop: LoopConfig
    joint_loop: LoopConfig | None = Field(None, exclude_if=lambda loop: loop is None)
    """None leaves the second phase out: the transformer stays as pretrained but for its voken rows."""

    @field_validator("mixture", "joint_mixture")
    @classmethod
    def _directions(cls, mixture: dict[str, float]) -> dict[str, float]:
        for direction in mixture:
            Direction.parse(direction)
        return mixture

    @property
    def on_cpu(self) -> bool:
        """True where the recipe wants no GPU."""
        return self.frozen_loop.device == "cpu"

    def check(self) -> None:
        """Without diffusers, or without the pipeline, nothing is moved or trained."""
        check_pipeline(self.renderer.pipeline)

    def outside_inputs(self) -> Mapping[str, str]:
        """Names and sizes of the pipeline's files, where it lies in a folder."""
        folder = Path(self.renderer.pipeline)
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        return {"pipeline": fingerprint_of(sizes)} if sizes else {}


def main(config: PromptVokensConfig) -> StageResult:
    """Train the phases; save `model/` and `decoder/`."""
    model, vocabulary, layout = load_pretrained(config.root / "pretrain" / "model")
    model.set_attn_implementation(attention.register())
    tokenizers = open_tokenizers(config.root, location_bins=vocabulary.range("region").size)
    sequencer = Sequencer(vocabulary, layout)
    decoder = start_decoder(config, hidden_dim=model.config.hidden_size, vokens=len(vocabulary.vokens_N))
    with borrowed_randomness(seed_of(config.frozen_loop.seed, "rows")):
        rows = VokenRows(model, vocabulary)
        rows.start(model, vocabulary, layout.native_grid_hw)

    weights = PromptWeights(config.denoise_weight, config.align_weight, config.text_weight, config.drop_share)
    losses = PromptLoss(model, vocabulary, decoder, weights=weights, rows=rows, model_lr_ratio=config.rows_lr_ratio)
    phase = _phase(config, losses, sequencer, tokenizers, config.mixture, seed=config.frozen_loop.seed)
    metrics = train(phase, config.frozen_loop, config.folder / "frozen", title="vokens, frozen")
    rows.write(model)

    if config.joint_loop is not None:
        weights = PromptWeights(config.denoise_weight, config.joint_align_weight, config.text_weight, config.drop_share)
        ratio = config.model_lr_ratio
        losses = PromptLoss(model, vocabulary, decoder, weights=weights, rows=None, model_lr_ratio=ratio)
        mixture = config.joint_mixture or config.mixture
        phase = _phase(config, losses, sequencer, tokenizers, mixture, seed=config.joint_loop.seed)
        metrics |= train(phase, config.joint_loop, config.folder / "joint", title="vokens, joint")

    with publishing(config.folder / "model") as folder:
        model.cpu().save_pretrained(folder)
        write_json(folder / "vocabulary.json", vocabulary.manifest())
        write_json(folder / "layout.json", layout.to_json())
    with publishing(config.folder / "decoder") as folder:
        decoder.save_pretrained(folder, base=config.renderer.pipeline)
    return StageResult(config.folder, (config.folder / "model", config.folder / "decoder"), metrics)


def start_decoder(config: PromptVokensConfig, *, hidden_dim: int, vokens: int) -> PromptDecoder:
    """The pipeline with fresh mappers; its text encoders are opened where a loss asks for them."""
    wanted = config.renderer
    needs_text = bool(config.align_weight or (config.joint_loop and config.joint_align_weight))
    pipeline = open_pipeline(wanted.pipeline, text=needs_text, dtype=_DTYPES[wanted.precision])
    if wanted.recompute:
        denoiser_of(pipeline).enable_gradient_checkpointing()
    sizes = {"queries": wanted.queries, "width": wanted.width, "layers": wanted.layers, "heads": wanted.heads}
    with borrowed_randomness(seed_of(config.frozen_loop.seed, "mapper")):
        return PromptDecoder.create(pipeline, hidden_dim=hidden_dim, vokens=vokens, **sizes)


def _phase(
    config: PromptVokensConfig,
    losses: PromptLoss,
    sequencer: Sequencer,
    tokenizers: Tokenizers,
    mixture: dict[str, float],
    *,
    seed: int,
) -> VokenTraining:
    side_px = config.renderer.side_px or losses.side_px

    def data(split: str) -> PromptData:
        facts = coded_facts(tokenizers.get("image"), tokenizers.get("audio"))  # type: ignore[arg-type]
        store = CodedStore(places_of(None, config.root, split), facts=facts)
        stream = DocumentStream(
            store, mixture, tokenizers, drop_share=0.0, free_share=0.0, seed=seed_of(seed, split)
        )  # conditions are dropped by the mapper's null
        pictures = NamedPictures(open_records(config.root, split), side_px)
        weights = LossWeights(sequencer.vocabulary, {}, inputs=0.0)
        return PromptData(stream, pictures, sequencer, weights, tokenizers["text"], config.documents_per_batch)

    return VokenTraining(losses, data("train"), data("validation"), encode=None)  # type: ignore[arg-type]
