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
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from anygen.config import Config
from anygen.data.pictures import NamedPictures
from anygen.files import publishing
from anygen.model.loss import LossWeights
from anygen.seeding import borrowed_randomness, seed_of
from anygen.stages.base import StageResult, open_records
from anygen.stages.prompt_losses import PromptData, PromptLoss, PromptWeights
from anygen.stages.voken_base import VokenStageConfig, Writer, open_stream
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


class PromptVokensConfig(VokenStageConfig):
    """Recipe of the stage; alignment is the distance to the text encoder's embeddings of the caption."""

    renderer: RendererConfig
    documents_per_batch: int = Field(48, ge=1)
    denoise_weight: float = Field(1.0, ge=0)
    joint_align_weight: float = Field(0.0, ge=0)
    """In the second phase MiniGPT-5 goes without captions."""
    rows_lr_ratio: float = Field(0.1, gt=0)
    model_lr_ratio: float = Field(1.0, gt=0)

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
    writer = Writer.open(config)
    hidden_dim, vokens = writer.model.config.hidden_size, len(writer.vocabulary.vokens_N)
    decoder = start_decoder(config, hidden_dim=hidden_dim, vokens=vokens)
    weights = PromptWeights(config.denoise_weight, config.align_weight, config.text_weight, config.drop_share)

    def phase(name: str, loop: LoopConfig | None, mixture: dict[str, float], align: float) -> dict[str, float]:
        if loop is None:
            return {}
        rows, ratio = (None, config.model_lr_ratio) if name == "joint" else (writer.rows, config.rows_lr_ratio)
        losses = PromptLoss(
            writer.model, writer.vocabulary, decoder,
            weights=replace(weights, align=align), rows=rows, model_lr_ratio=ratio,
        )  # fmt: skip
        trainee = _trainee(config, writer, losses, mixture, seed=loop.seed)
        return train(trainee, loop, config.folder / name, title=f"vokens, {name}")

    metrics = phase("frozen", config.frozen_loop, config.mixture, config.align_weight)
    writer.rows.write(writer.model)
    joint_mixture = config.joint_mixture or config.mixture
    metrics |= phase("joint", config.joint_loop, joint_mixture, config.joint_align_weight)

    writer.save(config.folder / "model")
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


def _trainee(
    config: PromptVokensConfig, writer: Writer, losses: PromptLoss, mixture: dict[str, float], *, seed: int
) -> VokenTraining:
    side_px = config.renderer.side_px or losses.side_px

    def data(split: str) -> PromptData:
        stream = open_stream(config, writer.tokenizers, mixture, split, seed=seed)
        pictures = NamedPictures(open_records(config.root, split), side_px)
        weights = LossWeights(writer.vocabulary, {}, inputs=0.0)
        text = writer.tokenizers["text"]
        return PromptData(stream, pictures, writer.sequencer, weights, text, config.documents_per_batch)

    return VokenTraining(losses, data("train"), data("validation"), encode=None)  # type: ignore[arg-type]
